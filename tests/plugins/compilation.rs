//! Compiling has a budget: a file that takes minutes delays nothing but its own plugin, and one that
//! exceeds its time or memory is refused. An event waits if the host has no memory for an instance.

use std::fs;
use std::time::Duration;

use serde_json::json;

use crate::harness::command::{pointsman, said};
use crate::harness::eventually;
use crate::harness::guests::{core_module, slow_to_compile, slow_with_foreign_import, versioned};
use crate::harness::node::{Folder, Node, SOON};
use crate::harness::plugins::{Plugins, Site, await_loads};
use crate::harness::publish::event;

/// Time limit for what waits for a processor, on a machine whose processors are busy.
const EVENTUALLY: Duration = Duration::from_secs(60);

/// More variables than any compiler takes within the time of a test.
const MINUTES: u32 = 49_000;

/// A folder with the plugin `versioned` and one that compiles for minutes.
fn plugins_with_slow() -> Plugins {
    let plugins = Plugins::new(&[("versioned.wasm", versioned(1))]);
    plugins.replace("slow.wasm", &slow_to_compile(MINUTES));
    plugins
}

/// The state of a plugin in `/v1/plugins`; `None` also while the node starts.
fn state(node: &Node, plugin: &str) -> Option<String> {
    let plugins = node.admin("/v1/plugins").json();
    let mut plugins = plugins["plugins"].as_array()?.iter();
    let plugin = plugins.find(|listed| listed["name"] == plugin)?;
    Some(plugin["state"].as_str().expect("a state").to_owned())
}

fn n_compilations(node: &Node, outcome: &str) -> f64 {
    node.metric(&format!(
        "pointsman_plugin_compilations_total{{outcome=\"{outcome}\"}}"
    ))
}

/// Waits until the plugin is reported as being compiled.
fn await_compiling(node: &Node, plugin: &str) {
    eventually(EVENTUALLY, "the file is being compiled", || {
        (state(node, plugin).as_deref() == Some("compiling")).then_some(())
    });
}

/// The processes that this node has started.
fn children(node: &Node) -> Vec<u32> {
    let parent = node.pid().to_string();
    let processes = fs::read_dir("/proc").expect("/proc").flatten();
    let children = processes.filter_map(|process| {
        let pid = process.file_name().to_str()?.parse().ok()?;
        (stat(pid)?.get(1)? == &parent).then_some(pid)
    });
    children.collect()
}

/// The fields of `/proc/PID/stat` after the name: the state, the parent and so on. `None`: the
/// process has ended.
fn stat(pid: u32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = text.rsplit_once(") ")?;
    let fields: Vec<String> = rest.split(' ').map(str::to_owned).collect();
    (fields.first()? != "Z").then_some(fields)
}

#[test]
fn uploads_and_other_files_do_not_wait_for_a_file_that_compiles_for_minutes() {
    let plugins = Plugins::new(&[("versioned.wasm", versioned(1))]);
    let mut site = Site::new(&plugins);
    plugins.replace("slow.wasm", &slow_to_compile(MINUTES));
    await_compiling(&site.node, "slow");
    let answer = site.order("PUT", "", &versioned(2));
    assert_eq!(answer.status, 200, "{answer:?}");
    plugins.replace("discard.wasm", &core_module("discard"));
    await_loads(&site.node, "discard", "loaded", 1);
    assert_eq!(state(&site.node, "slow").as_deref(), Some("compiling"));
    assert_eq!(site.next_decision().0, 2);

    // Its removal ends the compilation.
    plugins.remove("slow.wasm");
    eventually(EVENTUALLY, "the compilation is stopped", || {
        (n_compilations(&site.node, "cancelled") == 1.0 && children(&site.node).is_empty())
            .then_some(())
    });
    assert_eq!(state(&site.node, "slow"), None);
}

#[test]
fn events_wait_while_a_file_of_a_restarted_node_is_compiled_and_the_others_are_loaded() {
    let plugins = plugins_with_slow();
    let node = Node::builder()
        .plugins(plugins.dir())
        .may_be_unready()
        .start();
    await_compiling(&node, "slow");
    await_loads(&node, "versioned", "loaded", 1);
    let body = node.admin("/readyz").body;
    assert!(
        body.contains("plugins.slow: slow.wasm is still being compiled; "),
        "{body}"
    );
    let mut stream = node.stream("7");
    node.publisher()
        .publish(&[event("e1", "t", json!({ "user": "7" }))]);
    // Counted by the broker: without the wait it would have been decided long before it is counted.
    eventually(EVENTUALLY, "the event waits", || {
        (node.metric("pointsman_source_lag_entries") == 1.0).then_some(())
    });
    assert_eq!(node.metric("pointsman_events_total"), 0.0);
    plugins.remove("slow.wasm");
    assert_eq!(stream.next_notification(EVENTUALLY).id, "e1");
}

#[test]
fn a_compilation_has_the_lowest_priority_and_ends_with_its_node() {
    let plugins = plugins_with_slow();
    let mut node = Node::builder()
        .plugins(plugins.dir())
        .may_be_unready()
        .start();
    let child = eventually(
        EVENTUALLY,
        "a process compiles at the lowest priority",
        || {
            const NICE: usize = 16;
            children(&node)
                .into_iter()
                .find(|pid| stat(*pid).is_some_and(|fields| fields[NICE] == "19"))
        },
    );
    node.kill();
    eventually(EVENTUALLY, "it ends", || {
        stat(child).is_none().then_some(())
    });
}

#[test]
fn a_file_that_exceeds_the_budget_of_compiling_is_refused_with_the_fix() {
    let folder = Folder::new();
    let plugins = folder.path().join("plugins");
    fs::create_dir(&plugins).expect("create a folder");
    let refusal = |n_variables: u32, budget: &str| {
        fs::write(plugins.join("slow.wasm"), slow_to_compile(n_variables)).expect("write a plugin");
        let config = folder.path().join("pointsman.toml");
        fs::write(
            &config,
            format!("[broker]\nephemeral = true\n[auth]\ndev = true\n[plugins]\ndir = {plugins:?}\n{budget}\n"),
        )
        .expect("write a configuration");
        let mut check = pointsman(&["check-config", "--config", config.to_str().expect("UTF-8")]);
        let (is_valid, said) = said(&mut check);
        assert!(!is_valid, "{said}");
        said
    };
    let said = refusal(MINUTES, "compile_timeout = \"1s\"");
    assert!(
        said.contains("plugin slow: slow.wasm takes more than 1s of CPU time to compile; split its largest function, or raise plugins.compile_timeout"),
        "{said}"
    );
    let said = refusal(MINUTES, "compile_memory_mib = 256");
    assert!(
        said.contains("plugin slow: slow.wasm takes more than 256 MiB of memory to compile; split its largest function, or raise plugins.compile_memory_mib"),
        "{said}"
    );
}

#[test]
fn a_component_with_an_import_that_is_not_granted_is_refused_without_compiling_it() {
    let plugins = Plugins::new(&[("versioned.wasm", versioned(1))]);
    let site = Site::new(&plugins);
    let n_before = n_compilations(&site.node, "compiled");
    let answer = site.order("PUT", "", &slow_with_foreign_import());
    assert_eq!(answer.status, 422, "{answer:?}");
    assert!(
        answer
            .body
            .contains("imports wasi:http/outgoing-handler@0.2.0, which plugins are not granted"),
        "{answer:?}"
    );
    assert_eq!(
        site.node.metric("pointsman_plugin_compilations_total"),
        n_before
    );
}

#[test]
fn a_node_with_little_address_space_decides_every_event() {
    let node = Node::builder().limits("ulimit -v 8000000").start();
    let mut stream = node.stream("7");
    for n in 0..8 {
        let id = format!("e{n}");
        node.publisher()
            .publish(&[event(&id, "t", json!({ "user": "7" }))]);
        assert_eq!(stream.next_notification(SOON).id, id);
    }
    assert!(
        node.log()
            .contains("not enough address space for an instance pool"),
        "{}",
        node.log()
    );
}

#[test]
fn an_event_waits_while_the_host_has_no_memory_for_its_instance() {
    let plugins = Plugins::new(&[("unruly.wasm", core_module("unruly"))]);
    let mut node = Node::builder()
        .data()
        .config("[plugins.unruly]\nmemory_mib = 4096\ndeadline = \"10s\"\n")
        .limits("ulimit -v 2000000")
        .plugins(plugins.dir())
        .start();
    node.publisher()
        .publish(&[event("e1", "grow", json!({ "user": "42" }))]);
    let body = eventually(EVENTUALLY, "readiness reports the lack", || {
        let answer = node.admin("/readyz");
        (answer.status == 503 && answer.body.contains("host-memory: ")).then_some(answer.body)
    });
    assert!(
        body.contains("plugin 'unruly': the host has no memory for an instance of it"),
        "{body}"
    );
    assert_eq!(node.metric("pointsman_events_total"), 0.0);

    // Another process with memory decides it, here that the plugin exceeds its own limit.
    node.terminate(SOON);
    node.unlimited();
    node.reconfigure("[plugins.unruly]\nmemory_mib = 64\n");
    node.restart();
    eventually(EVENTUALLY, "the event has an outcome", || {
        (node.metric("pointsman_events_total{outcome=\"dead-lettered\"}") == 1.0).then_some(())
    });
}
