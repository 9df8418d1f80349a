//! A changed configuration of a plugin: tried without effect on live and on past events, then made
//! the active one.

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::harness::command;
use crate::harness::eventually;
use crate::harness::guests::core_module;
use crate::harness::node::{Builder, Folder, Node, SOON};
use crate::harness::publish::event;

/// The active rules. The deadline is long, so that a busy machine does not fail the test.
const OLD: &str = "# who is told of incidents
[plugins.rules]
deadline = '1s'
[[plugins.rules.config.rules]]
match.type = 'incident.*'
to.group = 'region-eu'
";

/// Sends incidents of Dublin elsewhere.
const NEW: &str = "# who is told of incidents
[plugins.rules]
deadline = '1s'
[[plugins.rules.config.rules]]
match = { type = 'incident.open', attributes = { site = 'dublin' } }
to.group = 'region-us'
stop = true
[[plugins.rules.config.rules]]
match.type = 'incident.*'
to.group = 'region-eu'
";

/// The events of a thousand that the new rules route otherwise.
const N_TURNED: usize = 7;

/// A thousand incidents; the new rules route seven of them otherwise.
fn thousand() -> Vec<Value> {
    let events = (0..1_000).map(|n| {
        let site = if n % 150 == 77 { "dublin" } else { "berlin" };
        event(&format!("e{n}"), "incident.open", json!({ "site": site }))
    });
    events.collect()
}

/// The ids of the events that the new rules route otherwise.
fn turned() -> Vec<String> {
    let ids = (0..1_000).filter(|n| n % 150 == 77);
    ids.map(|n| format!("e{n}")).collect()
}

/// A folder with `rules` as its one plugin.
fn folder() -> Folder {
    let folder = Folder::new();
    fs::write(folder.path().join("rules.wasm"), core_module("rules")).expect("write a plugin");
    folder
}

/// A file with this configuration.
fn file(folder: &Folder, name: &str, toml: &str) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, toml).expect("write a configuration");
    path
}

fn start(builder: Builder, plugins: &Folder) -> Node {
    builder.plugins(plugins.path()).config(OLD).start()
}

/// The output of `pointsman plugin ARGUMENTS`, which succeeds.
fn plugin(node: &Node, arguments: &[&str]) -> String {
    let (is_well, said) = try_plugin(node, arguments);
    assert!(is_well, "{arguments:?}: {said}");
    said
}

fn try_plugin(node: &Node, arguments: &[&str]) -> (bool, String) {
    command::said(
        command::pointsman(&["plugin"])
            .args(arguments)
            .args(["--url", &node.admin_url("")]),
    )
}

/// Asserts that exactly the events of [`turned`] are reported, in one group.
fn assert_turned(report: &Value) {
    assert_eq!(
        (&report["different"], &report["failed"]),
        (&json!(N_TURNED), &json!(0)),
        "{report}"
    );
    let [group] = report["groups"].as_array().expect("a list").as_slice() else {
        panic!("not one group: {report}")
    };
    assert_eq!(
        (&group["count"], &group["type"], &group["role"]),
        (&json!(N_TURNED), &json!("incident.open"), &json!("router"))
    );
    assert_eq!(
        (&group["old"], &group["new"]),
        (&json!("g:region-eu"), &json!("g:region-us"))
    );
    let differences = report["differences"].as_array().expect("a list");
    let mut ids: Vec<&str> = differences
        .iter()
        .map(|difference| difference["event"]["id"].as_str().expect("an id"))
        .collect();
    let mut expected = turned();
    ids.sort_unstable();
    expected.sort_unstable();
    assert_eq!(ids, expected);
}

#[test]
fn a_changed_configuration_is_shadowed_backtested_and_promoted_with_the_active_file() {
    let (plugins, files) = (folder(), Folder::new());
    let node = start(Node::builder(), &plugins);
    let new = file(&files, "new.toml", NEW);
    let new = new.to_str().expect("UTF-8");
    let begun = plugin(&node, &["shadow", "rules", "--config", new]);
    assert!(begun.contains(" now shadows rules "), "{begun}");
    for batch in thousand().chunks(100) {
        node.publisher().publish(batch);
    }
    node.await_outcomes(1_000, SOON);
    let report = eventually(SOON, "all are compared", || {
        let report = node.admin("/v1/plugins/rules/shadow").json();
        (report["compared"] == 1_000).then_some(report)
    });
    assert_turned(&report);
    let shown = plugin(&node, &["shadow", "rules"]);
    assert!(
        shown.contains("\n7 x incident.open: g:region-eu -> g:region-us\n"),
        "{shown}"
    );

    let backtest = ["backtest", "rules", "--config", new, "--json"];
    let report: Value = serde_json::from_str(&plugin(&node, &backtest)).expect("JSON");
    assert_turned(&report);
    // The same by HTTP, with the file as well.
    let body = [NEW.as_bytes(), &core_module("rules")].concat();
    let path = format!("/v1/plugins/rules/backtest?config_bytes={}", NEW.len());
    assert_turned(&node.order("POST", &path, &[], &body).json());

    let promoted = plugin(&node, &["promote", "rules"]);
    assert!(
        promoted.starts_with("promoted rules ") && promoted.contains("replacing generation 1"),
        "{promoted}"
    );
    // It decides at once, and after a restart as well.
    let config = fs::read_to_string(node.folder().join("pointsman.toml")).expect("its file");
    assert_eq!(config, NEW);
    let mut stream = node.stream("ann");
    let answer = node.request("PUT", "/v1/groups/region-us/members/ann");
    assert_eq!(answer.status, 204, "{answer:?}");
    let dublin = event("last", "incident.open", json!({ "site": "dublin" }));
    node.publisher().publish(&[dublin]);
    assert_eq!(stream.next_notification(SOON).id, "last");
    // The node reads its changed file and finds what is active.
    eventually(SOON, "the file is read", || {
        node.log().contains("configuration reloaded").then_some(())
    });
    assert_eq!(node.admin("/v1/plugins/rules").json()["generation"], 2);
}

#[test]
fn a_promotion_that_the_node_may_not_write_prints_the_change_and_has_no_effect() {
    let (plugins, files) = (folder(), Folder::new());
    // A form that cannot be changed without a guess.
    let inline = "[plugins]\nrules = { deadline = '1s', config = { rules = [{ to = { group = 'region-eu' } }] } }\n";
    let node = Node::builder()
        .plugins(plugins.path())
        .config(inline)
        .start();
    let new = file(&files, "new.toml", NEW);
    let printed = plugin(
        &node,
        &["promote", "rules", "--config", new.to_str().expect("UTF-8")],
    );
    let path = node.folder().join("pointsman.toml");
    for expect in [
        "not promoted: ",
        path.to_str().expect("UTF-8"),
        "replace the section [plugins.rules] by\n\n",
        NEW,
    ] {
        assert!(printed.contains(expect), "{expect} is not in {printed}");
    }
    assert_eq!(node.admin("/v1/plugins/rules").json()["generation"], 1);
    assert_eq!(fs::read_to_string(path).expect("its file"), inline);
}

#[test]
fn a_configuration_that_the_plugin_or_the_node_rejects_is_refused_with_the_fix() {
    let (plugins, files) = (folder(), Folder::new());
    let node = start(Node::builder(), &plugins);
    for (toml, expect) in [
        ("[plugins.other]\n", "has no section [plugins.rules]"),
        (
            "[plugins.rules]\ndeadline = '1s'\nnonsense = 1\n",
            "is not valid in line 3: unknown field `nonsense`",
        ),
        (
            "[plugins.rules.config]\nrules = [{ nonsense = 1 }]\n",
            "nonsense",
        ),
    ] {
        let path = file(&files, "wrong.toml", toml);
        let path = path.to_str().expect("UTF-8");
        for command in ["shadow", "backtest", "promote"] {
            let (is_well, said) = try_plugin(&node, &[command, "rules", "--config", path]);
            assert!(
                !is_well && said.contains(expect) && said.contains("wrong.toml was not accepted"),
                "{command}: {said}"
            );
        }
    }
    let config = [("Content-Type", "application/toml")];
    let shadow = "/v1/plugins/rules/shadow";
    assert_eq!(node.order("PUT", shadow, &config, b"").status, 400);
    assert_eq!(node.order("PUT", shadow, &config, b"\xff").status, 400);
    let short = format!("{shadow}?config_bytes=100");
    assert_eq!(node.order("PUT", &short, &[], b"x").status, 400);
    assert_eq!(node.admin(shadow).status, 404);
    let begun = node.order("PUT", shadow, &config, NEW.as_bytes());
    assert_eq!(begun.status, 200, "{begun:?}");
}
