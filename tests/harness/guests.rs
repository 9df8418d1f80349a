//! Plugins for tests, built once a run: the bundled ones, `unruly`, which misbehaves on command, `forger`, which lies in every string,
//! `versioned`, which says which version of it decides, `turning`, whose versions decide otherwise where an event says so, and components
//! that are made of an interface and do nothing.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The bytes of a guest built for `wasm32-unknown-unknown`, a core module.
pub(crate) fn core_module(name: &str) -> Vec<u8> {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    read(DIR.get_or_init(|| build("wasm32-unknown-unknown")), name)
}

/// The bytes of a guest built for `wasm32-wasip2`, a component that imports WASI.
pub(crate) fn wasi_component(name: &str) -> Vec<u8> {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    read(DIR.get_or_init(|| build("wasm32-wasip2")), name)
}

/// A version of `versioned` that panics on events whose ids end in 0, 1 or 2.
pub(crate) const FAULTY: u32 = 9_000_000;

/// The bytes of `versioned` that say that they are this version.
pub(crate) fn versioned(number: u32) -> Vec<u8> {
    of_version("versioned", number)
}

/// The bytes of `turning` that are this version of it.
pub(crate) fn turning(number: u32) -> Vec<u8> {
    of_version("turning", number)
}

fn of_version(guest: &str, number: u32) -> Vec<u8> {
    const PLACE: &[u8] = b"version:0000000";
    let mut bytes = core_module(guest);
    let places: Vec<usize> = bytes
        .windows(PLACE.len())
        .enumerate()
        .filter(|(_, bytes)| *bytes == PLACE)
        .map(|(at, _)| at)
        .collect();
    let [at] = places[..] else {
        panic!(
            "the number of the version stands {} times in the file",
            places.len()
        )
    };
    bytes[at..at + PLACE.len()].copy_from_slice(format!("version:{number:07}").as_bytes());
    bytes
}

/// A component of the full world of this contract, made of its text as somebody else might have it. Its functions only trap.
pub(crate) fn component_of(contract: &str, world: &str) -> Vec<u8> {
    use wit_component::{ComponentEncoder, StringEncoding, dummy_module, embed_component_metadata};
    use wit_parser::{LiftLowerAbi, ManglingAndAbi, Resolve};

    let mut resolve = Resolve::default();
    let package = resolve
        .push_str("contract.wit", contract)
        .expect("a contract");
    let world = resolve
        .select_world(&[package], Some(world))
        .expect("a world of it");
    let mut module = dummy_module(&resolve, world, ManglingAndAbi::Legacy(LiftLowerAbi::Sync));
    embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8).expect("metadata");
    ComponentEncoder::default()
        .module(&module)
        .and_then(|mut encoder| encoder.encode())
        .expect("a component")
}

/// The text of the contract that this host speaks, as one file.
pub(crate) fn contract() -> String {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("host/ lies in the repository");
    let file = |name: &str| {
        std::fs::read_to_string(repository.join("wit").join(name)).expect("a file of the contract")
    };
    let package = "package pointsman:plugin@0.1.0;";
    let rest = ["types.wit", "host.wit"].map(|name| file(name).replace(package, ""));
    file("plugin.wit") + &rest.concat()
}

fn read(dir: &Path, name: &str) -> Vec<u8> {
    let path = dir.join(format!("{name}.wasm"));
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Builds all guests for a target, and answers where they are. Cargo knows what is up to date, and keeps two test processes apart.
fn build(target: &str) -> PathBuf {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("host/ lies in the repository");
    // Where this very test was built, whatever CARGO_TARGET_DIR says.
    let target_dir = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .parent()
        .expect("the folder for temporary files lies in that of the target");
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .current_dir(repository)
        .args([
            "build",
            "--quiet",
            "--profile",
            "plugin",
            "--target",
            target,
            "--target-dir",
        ])
        .arg(target_dir);
    let status = cargo
        .args([
            "-p",
            "address",
            "-p",
            "discard",
            "-p",
            "prioritize",
            "-p",
            "rules",
        ])
        .args([
            "-p",
            "unruly",
            "-p",
            "forger",
            "-p",
            "versioned",
            "-p",
            "turning",
        ])
        .status()
        .expect("cargo, which built this, runs");
    assert!(
        status.success(),
        "the guests do not build for {target}; if the target is missing: rustup target add {target}"
    );
    target_dir.join(target).join("plugin")
}
