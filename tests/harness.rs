//! The processes that tests start and talk to from outside, as users do: nodes, streams, publishers
//! and Redis servers.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use pointsman::plugin::runtime::cache::Cache;
use pointsman::plugin::{Engine, EngineOptions};
use pointsman::telemetry::metrics::Metrics;

pub(crate) mod clock;
pub(crate) mod command;
pub(crate) mod guests;
pub(crate) mod http;
pub(crate) mod http2;
pub(crate) mod node;
pub(crate) mod plugins;
pub(crate) mod ports;
pub(crate) mod proxy;
pub(crate) mod publish;
pub(crate) mod redis;
pub(crate) mod seed;
pub(crate) mod sse;

/// Polls `ask` every 10 ms until it returns a value, and returns that value.
///
/// # Panics
/// If it returns none in time.
pub(crate) fn eventually<T>(within: Duration, what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + within;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(
            Instant::now() < deadline,
            "{what}: timed out after {within:?}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The root folder of the repository.
pub(crate) fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("host/ lies in the repository")
}

/// A folder with only two of the bundled plugins, which most tests need, built from the present
/// sources.
pub(crate) fn bundled_plugins() -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER
        .get_or_init(|| gather("bundled", &["address", "discard"]))
        .clone()
}

/// Like [`bundled_plugins`], with the plugins that the demo configures.
pub(crate) fn demo_plugins() -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER
        .get_or_init(|| gather("demo", &["address", "prioritize", "rules"]))
        .clone()
}

/// A folder with all bundled plugins.
pub(crate) fn every_bundled_plugin() -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER
        .get_or_init(|| gather("every", &["address", "discard", "prioritize", "rules"]))
        .clone()
}

fn gather(folder: &str, plugins: &[&str]) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(folder);
    fs::create_dir_all(&folder).expect("create a folder for plugins");
    for name in plugins {
        let (file, wasm) = (
            folder.join(format!("{name}.wasm")),
            guests::core_module(name),
        );
        // Another test run may be reading the file, so it is replaced in one step.
        if fs::read(&file).ok().as_ref() != Some(&wasm) {
            let draft = folder.join(format!("{name}.{}", std::process::id()));
            fs::write(&draft, wasm)
                .and_then(|()| fs::rename(&draft, &file))
                .expect("write a plugin");
        }
    }
    folder
}

/// The folder in which nodes cache compiled plugins across test runs; otherwise they would compile
/// the same plugins hundreds of times.
pub(crate) fn compiled_plugins() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("compiled-plugins")
}

/// An engine configured like that of a node, for tests that call plugins without one.
///
/// # Panics
/// If the engine cannot be created on this machine.
pub(crate) fn engine() -> Engine {
    let cache = Cache::open(&compiled_plugins(), Metrics::default())
        .unwrap_or_else(|reason| panic!("the folder of compiled plugins {reason}"));
    let options = EngineOptions {
        cache: Some(cache),
        ..EngineOptions::default()
    };
    Engine::with(options).expect("an engine")
}

/// The Node.js interpreter, version 20 or newer.
pub(crate) fn node_interpreter() -> PathBuf {
    // scripts/need.sh installs one here if that of the machine is too old.
    let newer = repository().join("build/tools/node_modules/.bin/node");
    if newer.exists() {
        newer
    } else {
        PathBuf::from("node")
    }
}
