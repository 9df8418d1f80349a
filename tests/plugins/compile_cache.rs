//! The compile cache: a plugin is compiled once, the next start loads the compiled code, and code
//! that another user may have written is never loaded.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::harness::eventually;
use crate::harness::guests::versioned;
use crate::harness::node::{Folder, Node, SOON};
use crate::harness::publish::event;

/// Uses the default location of the cache, next to the data.
fn node(plugins: &Path) -> Node {
    Node::builder()
        .data()
        .plugins(plugins)
        .environment("POINTSMAN_PLUGINS_CACHE", "")
        .start()
}

fn plugins() -> Folder {
    let folder = Folder::new();
    fs::write(folder.path().join("versioned.wasm"), versioned(1)).expect("write a plugin");
    folder
}

fn compiled(node: &Node) -> PathBuf {
    node.folder().join("data/plugins")
}

fn files(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder)
        .expect("the folder of compiled plugins")
        .map(|file| file.expect("a file").path())
        .collect()
}

/// The number of cache hits, misses, corrupt files and failed writes since the start.
fn counts(node: &Node) -> [f64; 4] {
    ["hit", "miss", "corrupt", "write_failed"].map(|outcome| {
        node.metric(&format!(
            "pointsman_plugin_compile_cache_total{{outcome=\"{outcome}\"}}"
        ))
    })
}

/// Asserts that the node's plugin decides correctly.
fn decides(node: &Node) {
    let mut stream = node.stream("7");
    node.publisher().publish(&[event(
        &format!("after-{}", node.pid()),
        "t",
        json!({ "user": "7" }),
    )]);
    assert_eq!(stream.next_notification(SOON).data["version"], 1);
}

fn start_again(node: &mut Node) {
    node.terminate(SOON);
    node.restart();
}

#[test]
fn a_plugin_is_compiled_at_the_first_start_and_loaded_from_the_cache_at_the_next() {
    let plugins = plugins();
    let mut node = node(plugins.path());
    assert_eq!(counts(&node), [0.0, 1.0, 0.0, 0.0]);
    let folder = fs::metadata(compiled(&node)).expect("a folder");
    assert_eq!(folder.mode() & 0o777, 0o700);
    assert_eq!(files(&compiled(&node)).len(), 1);
    decides(&node);

    start_again(&mut node);
    assert_eq!(counts(&node), [1.0, 0.0, 0.0, 0.0]);
    assert!(
        node.log()
            .lines()
            .any(|line| line.contains("plugin loaded") && line.contains("plugin.cached=true")),
        "{}",
        node.log()
    );
    decides(&node);

    // A file with other bytes is compiled.
    fs::write(plugins.path().join("versioned.wasm"), versioned(2)).expect("write a plugin");
    eventually(SOON, "the second version is compiled", || {
        (counts(&node) == [1.0, 1.0, 0.0, 0.0]).then_some(())
    });
}

#[test]
fn a_corrupt_cache_file_is_removed_and_its_plugin_compiled_again() {
    let plugins = plugins();
    let mut node = node(plugins.path());
    let [file] = files(&compiled(&node)).try_into().expect("one file");
    let whole = fs::read(&file).expect("compiled code");
    // One truncated file, and one with a flipped bit in its code.
    let mut rotten = whole.clone();
    rotten[whole.len() / 2] ^= 0x10;
    for corrupt in [whole[..whole.len() / 2].to_vec(), rotten] {
        node.terminate(SOON);
        fs::write(&file, corrupt).expect("corrupt the file");
        node.restart();
        assert_eq!(counts(&node), [0.0, 0.0, 1.0, 0.0]);
        assert!(
            node.log().contains("it is truncated or corrupt"),
            "{}",
            node.log()
        );
        decides(&node);
        assert_eq!(fs::read(&file).expect("compiled code").len(), whole.len());
    }
    start_again(&mut node);
    assert_eq!(counts(&node), [1.0, 0.0, 0.0, 0.0]);
}

#[test]
fn no_code_is_loaded_from_a_cache_folder_that_others_may_write_to() {
    let plugins = plugins();
    let mut node = node(plugins.path());
    let folder = compiled(&node);
    node.terminate(SOON);
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o770))
        .expect("make it writable for others");
    node.restart();
    assert_eq!(counts(&node), [0.0; 4]);
    let log = node.log();
    let warning = log
        .lines()
        .find(|line| line.contains("has mode 770 instead of 700"));
    assert!(
        warning.is_some_and(|line| line.contains("WARN") && line.contains("plugins.cache")),
        "{log}"
    );
    decides(&node);
}

#[test]
fn a_compiled_file_is_not_accepted_as_a_plugin() {
    let plugins = plugins();
    let node = node(plugins.path());
    let [file] = files(&compiled(&node)).try_into().expect("one file");
    let bytes = fs::read(file).expect("compiled code");
    let elf = bytes
        .windows(4)
        .position(|four| four == b"\x7fELF")
        .expect("machine code in the file");
    for (name, bytes) in [("kept", &bytes[..]), ("code", &bytes[elf..])] {
        fs::write(plugins.path().join(format!("{name}.wasm")), bytes).expect("write a file");
        let refusal = format!("plugins.{name}: {name}.wasm is not WebAssembly");
        eventually(SOON, "it is refused", || {
            node.admin("/readyz").body.contains(&refusal).then_some(())
        });
    }
    decides(&node);
}

#[test]
fn nodes_that_start_at_the_same_time_share_one_cache_folder() {
    let (plugins, shared) = (plugins(), Folder::new());
    let cache = shared.path().join("compiled");
    let start = || {
        let builder = Node::builder()
            .plugins(plugins.path())
            .environment("POINTSMAN_PLUGINS_CACHE", cache.to_str().expect("UTF-8"));
        let node = builder.start();
        decides(&node);
        counts(&node)
    };
    let first: Vec<[f64; 4]> = std::thread::scope(|scope| {
        let nodes: Vec<_> = (0..4).map(|_| scope.spawn(start)).collect();
        nodes
            .into_iter()
            .map(|node| node.join().expect("a working node"))
            .collect()
    });
    for [hits, misses, corrupt, write_failed] in first {
        assert_eq!((hits + misses, corrupt, write_failed), (1.0, 0.0, 0.0));
    }
    assert_eq!(files(&cache).len(), 1, "a draft was left behind");
    assert_eq!(start(), [1.0, 0.0, 0.0, 0.0]);
}
