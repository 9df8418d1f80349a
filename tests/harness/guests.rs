//! Guest plugins for tests, built once per run: the bundled plugins; `unruly`, which misbehaves on
//! request; `forger`, which puts false text into every string; `versioned`, which reports the
//! version that decides; `turning`, whose versions decide differently if an event requests it;
//! `relay`, which passes the log of a plugin on; components composed of several; and components
//! generated from an interface, which do nothing.

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

/// The bytes of `versioned` with this version number.
pub(crate) fn versioned(number: u32) -> Vec<u8> {
    of_version("versioned", number)
}

/// The bytes of `turning` with this version number.
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
            "the version number occurs {} times in the file",
            places.len()
        )
    };
    bytes[at..at + PLACE.len()].copy_from_slice(format!("version:{number:07}").as_bytes());
    bytes
}

/// A core module whose one large function has this many variables that are all used at its end, so
/// that compiling it takes time and memory that grow with the square of their number. It decides
/// nothing.
pub(crate) fn slow_to_compile(n_variables: u32) -> Vec<u8> {
    let noop = include_str!("../../host/src/plugin/inspect/noop.wat");
    let (rest, _) = noop.rsplit_once(')').expect("the end of the module");
    let numbers = 0..n_variables;
    let locals = " i64".repeat(n_variables as usize);
    let set: String = numbers
        .clone()
        .map(|n| {
            format!(
                "(local.set {} (i64.mul (local.get 0) (i64.const {n})))\n",
                n + 1
            )
        })
        .collect();
    let used: String = numbers
        .map(|n| {
            format!(
                "(local.set 0 (i64.xor (local.get 0) (local.get {})))\n",
                n + 1
            )
        })
        .collect();
    let function = format!(
        "(func (export \"slow\") (param i64) (result i64) (local{locals})\n{set}(loop $again\n{used}(br_if $again (i64.eqz (local.get 0))))\n{used}(local.get 0))"
    );
    in_full_world(&format!("{rest}{function})"))
}

/// A component that imports what plugins are not granted, and contains a module that is slow to
/// compile.
pub(crate) fn slow_with_foreign_import() -> Vec<u8> {
    let module = slow_to_compile(49_000);
    let mut component =
        wat::parse_str(r#"(component (import "wasi:http/outgoing-handler@0.2.0" (instance)))"#)
            .expect("a component");
    // A section with a nested core module.
    component.push(1);
    let mut length = module.len();
    while length >= 0x80 {
        component.push((length % 0x80) as u8 | 0x80);
        length /= 0x80;
    }
    component.push(length as u8);
    component.extend(module);
    component
}

/// A plugin in the text format that implements the world `full-plugin` of the contract.
pub(crate) fn in_full_world(text: &str) -> Vec<u8> {
    use wit_component::{StringEncoding, embed_component_metadata};

    let mut resolve = wit_parser::Resolve::default();
    let package = resolve
        .push_str("contract.wit", &contract())
        .expect("the contract");
    let world = resolve
        .select_world(&[package], Some("full-plugin"))
        .expect("a world of the contract");
    let mut module = wat::parse_str(text).expect("a module");
    embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8).expect("metadata");
    module
}

/// A component that implements a world of `contract`, a WIT text that another author might have.
/// Its functions only trap.
pub(crate) fn component_of(contract: &str, world: &str) -> Vec<u8> {
    use wit_component::{ComponentEncoder, StringEncoding, dummy_module, embed_component_metadata};
    use wit_parser::{LiftLowerAbi, ManglingAndAbi, Resolve};

    let mut resolve = Resolve::default();
    let package = resolve
        .push_str("contract.wit", contract)
        .expect("a contract");
    let world = resolve
        .select_world(&[package], Some(world))
        .expect("a world of the contract");
    let mut module = dummy_module(&resolve, world, ManglingAndAbi::Legacy(LiftLowerAbi::Sync));
    embed_component_metadata(&mut module, &resolve, world, StringEncoding::UTF8).expect("metadata");
    ComponentEncoder::default()
        .module(&module)
        .and_then(|mut encoder| encoder.encode())
        .expect("a component")
}

/// A guest as a component whose log passes through this number of relays, which are components with
/// memories of their own.
pub(crate) fn relayed(guest: &str, n_relays: usize) -> Vec<u8> {
    use wasm_compose::graph::{Component, CompositionGraph, EncodeOptions, ExportIndex};
    use wasmparser::Validator;
    use wit_component::ComponentEncoder;

    const LOG: &str = "pointsman:plugin/log@0.1.0";
    let encoded = |guest: &str| {
        ComponentEncoder::default()
            .module(&core_module(guest))
            .and_then(|mut encoder| encoder.encode())
            .expect("a component")
    };
    let mut validator = Validator::new();
    let mut graph = CompositionGraph::new();
    let mut add = |name: String, bytes: Vec<u8>| {
        let component =
            Component::from_bytes(&mut validator, name, bytes).expect("a valid component");
        let id = graph.add_component(component).expect("a new name");
        let component = graph.get_component(id).expect("it was added");
        let import = component.import_by_name(LOG).expect("it logs").0;
        let export = component.export_by_name(LOG).map(|(export, ..)| export);
        (graph.instantiate(id).expect("an instance"), import, export)
    };
    let (plugin, import, _) = add(guest.to_owned(), encoded(guest));
    let relay = encoded("relay");
    let relays: Vec<_> = (0..n_relays)
        .map(|n| add(format!("relay-{n}"), relay.clone()))
        .collect();
    let mut last = (plugin, import);
    for (relay, import, export) in relays {
        let export: Option<ExportIndex> = export;
        graph
            .connect(relay, export, last.0, last.1)
            .expect("the log of one is that of the other");
        last = (relay, import);
    }
    let options = EncodeOptions {
        define_components: true,
        export: Some(plugin),
        validate: true,
    };
    graph.encode(options).expect("a composed component")
}

/// The WIT text of the contract that this host implements, as one file.
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

/// Builds all guests for a target and returns their folder. Cargo rebuilds only the outdated ones,
/// and its lock keeps two test processes apart.
fn build(target: &str) -> PathBuf {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("host/ lies in the repository");
    // The target folder in which this test was built, regardless of CARGO_TARGET_DIR.
    let target_dir = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .parent()
        .expect("the folder for temporary files lies in the target folder");
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
            "-p",
            "relay",
        ])
        .status()
        .expect("cargo, which built this, runs");
    assert!(
        status.success(),
        "cannot build the guests for {target}; if the target is missing: rustup target add {target}"
    );
    target_dir.join(target).join("plugin")
}
