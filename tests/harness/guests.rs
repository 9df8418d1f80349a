//! Plugins for tests, built once a run: the bundled ones, `unruly`, which misbehaves on command, and `versioned`, which says which version
//! of it decides.

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
    const PLACE: &[u8] = b"version:0000000";
    let mut bytes = core_module("versioned");
    let places: Vec<usize> = bytes.windows(PLACE.len()).enumerate().filter(|(_, bytes)| *bytes == PLACE).map(|(at, _)| at).collect();
    let [at] = places[..] else { panic!("the number of the version stands {} times in the file", places.len()) };
    bytes[at..at + PLACE.len()].copy_from_slice(format!("version:{number:07}").as_bytes());
    bytes
}

fn read(dir: &Path, name: &str) -> Vec<u8> {
    let path = dir.join(format!("{name}.wasm"));
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Builds all guests for a target, and answers where they are. Cargo knows what is up to date, and keeps two test processes apart.
fn build(target: &str) -> PathBuf {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("host/ lies in the repository");
    // Where this very test was built, whatever CARGO_TARGET_DIR says.
    let target_dir = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("the folder for temporary files lies in that of the target");
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(repository).args(["build", "--quiet", "--profile", "plugin", "--target", target, "--target-dir"]).arg(target_dir);
    let status = cargo
        .args(["-p", "address", "-p", "discard", "-p", "prioritize", "-p", "rules", "-p", "unruly", "-p", "versioned"])
        .status()
        .expect("cargo, which built this, runs");
    assert!(status.success(), "the guests do not build for {target}; if the target is missing: rustup target add {target}");
    target_dir.join(target).join("plugin")
}
