//! A changed configuration of a plugin: tried without effect on live and on past events, then made
//! the active one, on one node or rolled out over all nodes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::harness::command;
use crate::harness::eventually;
use crate::harness::guests::{FAULTY, core_module, versioned};
use crate::harness::node::{Builder, Folder, Node, SOON};
use crate::harness::plugins::hash;
use crate::harness::publish::event;
use crate::harness::redis::RedisServer;

/// The active rules. The deadline is long, so that a busy machine does not fail the test.
pub(super) const OLD: &str = "# who is told of incidents
[plugins.rules]
deadline = '1s'
[[plugins.rules.config.rules]]
match.type = 'incident.*'
to.group = 'region-eu'
";

/// Sends incidents of Dublin elsewhere.
pub(super) const NEW: &str = "# who is told of incidents
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
pub(super) fn folder() -> Folder {
    let folder = Folder::new();
    fs::write(folder.path().join("rules.wasm"), core_module("rules")).expect("write a plugin");
    folder
}

/// A file with this configuration.
pub(super) fn file(folder: &Folder, name: &str, toml: &str) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, toml).expect("write a configuration");
    path
}

fn start(builder: Builder, plugins: &Folder) -> Node {
    builder.plugins(plugins.path()).config(OLD).start()
}

/// The output of `pointsman plugin ARGUMENTS`, which succeeds.
pub(super) fn plugin(node: &Node, arguments: &[&str]) -> String {
    let (is_well, said) = try_plugin(node, arguments);
    assert!(is_well, "{arguments:?}: {said}");
    said
}

pub(super) fn try_plugin(node: &Node, arguments: &[&str]) -> (bool, String) {
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

/// Mounts a folder read-only over itself for as long as this lives.
struct ReadOnly<'a>(&'a Path);

impl<'a> ReadOnly<'a> {
    /// `None`: this process may not mount anything.
    fn mount(folder: &'a Path) -> Option<Self> {
        let mount = |options: &[&str]| {
            let mounted = Command::new("mount").args(options).arg(folder).status();
            mounted.is_ok_and(|status| status.success())
        };
        let path = folder.to_str().expect("UTF-8");
        if !mount(&["--bind", path]) {
            return None;
        }
        let mounted = Self(folder);
        mount(&["-o", "remount,ro,bind"]).then_some(mounted)
    }
}

impl Drop for ReadOnly<'_> {
    fn drop(&mut self) {
        Command::new("umount").arg(self.0).status().ok();
    }
}

/// As from a ConfigMap: the node reads its plugins from there and cannot write.
#[test]
fn a_promotion_on_a_read_only_mount_prints_the_file_to_replace_and_has_no_effect() {
    let (plugins, files) = (Folder::new(), Folder::new());
    let own = plugins.path().join("versioned.wasm");
    fs::write(&own, versioned(1)).expect("write a plugin");
    let new = files.path().join("new.wasm");
    fs::write(&new, versioned(2)).expect("write a plugin");
    let new = new.to_str().expect("UTF-8");
    let Some(mounted) = ReadOnly::mount(plugins.path()) else {
        eprintln!("not run: mounting is not permitted here");
        return;
    };
    let node = Node::builder()
        .plugins(plugins.path())
        .config("[plugins.versioned]\ndeadline = '1s'\n")
        .start();
    plugin(&node, &["shadow", "versioned", new]);
    for promote in [
        &["promote", "versioned"][..],
        &["promote", "versioned", new],
    ] {
        let printed = plugin(&node, promote);
        for expect in [
            "not promoted: ",
            own.to_str().expect("UTF-8"),
            "Read-only file system",
            &hash(&versioned(2)),
        ] {
            assert!(printed.contains(expect), "{expect} is not in {printed}");
        }
    }
    assert_eq!(node.admin("/v1/plugins/versioned").json()["generation"], 1);
    let mut stream = node.stream("7");
    node.publisher()
        .publish(&[event("e1", "t", json!({ "user": "7" }))]);
    assert_eq!(stream.next_notification(SOON).data["version"], 1);
    // Neither can it be staged for other nodes.
    let (is_well, said) = try_plugin(&node, &["rollout", "versioned", new]);
    assert!(!is_well && said.contains("Read-only file system"), "{said}");
    // With the folder writable again, the same candidate is promoted.
    drop(mounted);
    let promoted = plugin(&node, &["promote", "versioned"]);
    assert!(promoted.starts_with("promoted versioned "), "{promoted}");
    assert_eq!(fs::read(&own).expect("its file"), versioned(2));
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

/// The sources of the fleet, and with them its partitions.
pub(super) const SOURCES: [&str; 2] = ["pointsman:one", "pointsman:two"];

/// The configuration of each node.
pub(super) fn configuration() -> String {
    let [one, two] = SOURCES;
    format!("[broker]\nsources = ['{one}', '{two}']\n{OLD}")
}

/// Two nodes on one Redis, with one plugin folder.
pub(super) struct Fleet {
    // Dropped first: a node that stops needs its Redis and its plugins.
    pub(super) nodes: [Node; 2],
    pub(super) server: RedisServer,
    _plugins: Folder,
}

impl Fleet {
    pub(super) fn start() -> Self {
        Self::of(folder(), |node, _| node)
    }

    /// `change` gets the number of the node, 0 or 1.
    pub(super) fn of(plugins: Folder, change: impl Fn(Builder, usize) -> Builder) -> Self {
        let server = RedisServer::start();
        let node = |n| {
            let node = Node::builder()
                .redis(server.url())
                .plugins(plugins.path())
                .config(&configuration());
            change(node, n).start()
        };
        let nodes = [node(0), node(1)];
        for (user, group) in [("ann", "region-us"), ("bob", "region-eu")] {
            let path = format!("/v1/groups/{group}/members/{user}");
            assert_eq!(nodes[0].request("PUT", &path).status, 204);
        }
        Self {
            nodes,
            server,
            _plugins: plugins,
        }
    }

    /// Adds an incident in Dublin to a source.
    pub(super) fn incident(&self, source: &str, id: &str) {
        let words = format!("XADD {source} * type incident.open id {id} source /tests site dublin");
        let _entry: String = self.server.command(&words);
    }

    /// Asserts that an incident in each source reaches ann, who is told by the new rules, or else
    /// bob.
    pub(super) fn assert_decided(&self, round: &str, by_new: [bool; 2]) {
        let mut streams = ["ann", "bob"].map(|user| self.nodes[0].stream(user));
        for (source, by_new) in SOURCES.into_iter().zip(by_new) {
            let id = format!("{round}-{source}");
            self.incident(source, &id);
            let stream = &mut streams[usize::from(!by_new)];
            assert_eq!(stream.next_notification(SOON).id, id, "{round}");
        }
    }

    /// Gives each node one of the sources.
    pub(super) fn share_sources(&self) {
        for (source, node) in SOURCES.iter().zip(&self.nodes) {
            let name = format!("test-{}", node.addr().port());
            let key = format!("pointsman:{{{source}}}:owner");
            let () = self.server.command(&format!("SET {key} {name} PX 60000"));
        }
        // The former owner of a source finds at its next commit that it is not the owner any more.
        let mut n = 0;
        for (source, node) in SOURCES.iter().zip(&self.nodes) {
            for _ in 0..2 {
                let before = node.metric("pointsman_events_total");
                eventually(SOON, "the node owns its source", || {
                    n += 1;
                    self.incident(source, &format!("first-{n}"));
                    (node.metric("pointsman_events_total") > before).then_some(())
                });
            }
        }
        for node in &self.nodes {
            eventually(SOON, "nothing is left to decide", || {
                (node.metric("pointsman_source_lag_entries") == 0.0).then_some(())
            });
        }
    }

    /// The partition number of each source.
    fn numbers(&self) -> [u64; 2] {
        SOURCES.map(|source| {
            self.server
                .command(&format!("HGET pointsman:partitions {source}"))
        })
    }

    fn report(&self) -> Value {
        let answer = self.nodes[1].admin("/v1/plugins/rules/rollout");
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()
    }
}

#[test]
fn a_rule_change_is_rolled_out_by_partition_then_to_all_and_rolled_back_on_all_nodes() {
    let (fleet, files) = (Fleet::start(), Folder::new());
    let [one, two] = &fleet.nodes;
    let new = file(&files, "new.toml", NEW);
    let new = new.to_str().expect("UTF-8");
    fleet.assert_decided("before", [false, false]);

    // Staged: every node has it, and it decides nothing.
    let rollout = ["rollout", "rules", "--config", new, "--share", "0%"];
    let said = plugin(one, &rollout);
    assert!(
        said.contains(" decides in no partition") && said.matches(": ready\n").count() == 2,
        "{said}"
    );
    fleet.assert_decided("staged", [false, false]);

    let said = plugin(two, &["rollout", "rules", "--share", "50%"]);
    assert!(
        said.contains("decides in 1 of 2 partitions (50 %)"),
        "{said}"
    );
    let chosen = fleet.report()["partitions"].clone();
    let half = fleet.numbers().map(|number| chosen == json!([number]));
    assert!(half[0] != half[1], "{chosen}");
    fleet.assert_decided("half", half);

    let said = plugin(one, &["rollout", "rules", "--share", "100%"]);
    assert!(said.contains("decides in all 2 partitions"), "{said}");
    fleet.assert_decided("all", [true, true]);
    assert_eq!(
        one.admin("/v1/plugins/rules").json()["generation"],
        1,
        "its own version has changed"
    );

    let said = plugin(two, &["rollback", "rules"]);
    assert!(
        said.starts_with("rolled back rules on all nodes") && !said.contains("not followed"),
        "{said}"
    );
    fleet.assert_decided("back", [false, false]);
    let (is_well, said) = try_plugin(one, &["rollout", "rules"]);
    assert!(
        !is_well && said.contains("the plugin 'rules' has no roll-out"),
        "{said}"
    );
}

#[test]
fn a_node_that_starts_during_a_rollout_takes_part_from_its_first_event() {
    let (mut fleet, files) = (Fleet::start(), Folder::new());
    let new = file(&files, "new.toml", NEW);
    let new = new.to_str().expect("UTF-8");
    plugin(&fleet.nodes[0], &["rollout", "rules", "--config", new]);
    for node in &mut fleet.nodes {
        node.terminate(SOON);
    }
    for (source, id) in SOURCES.into_iter().zip(["waiting-one", "waiting-two"]) {
        fleet.incident(source, id);
    }
    for node in &mut fleet.nodes {
        node.restart();
    }
    fleet.assert_decided("after", [true, true]);
    let history = fleet.nodes[0].request("GET", "/v1/notifications?user=ann");
    for id in ["waiting-one", "waiting-two"] {
        assert!(history.body.contains(id), "{id} is not in {history:?}");
    }
}

#[test]
fn a_node_without_the_version_or_with_another_one_of_its_own_reports_it() {
    let (fleet, files) = (Fleet::start(), Folder::new());
    let [one, two] = &fleet.nodes;
    let new = file(&files, "new.toml", NEW);
    plugin(
        one,
        &["rollout", "rules", "--config", new.to_str().expect("UTF-8")],
    );
    // The operator changes one node for good.
    let [source, other] = SOURCES;
    two.reconfigure(&format!(
        "[broker]\nsources = ['{source}', '{other}']\n{}",
        OLD.replace("region-eu", "region-asia")
    ));
    let state_of = |report: &Value, at: usize| report["nodes"][at]["state"].clone();
    let report = eventually(SOON, "the other version is reported", || {
        let report = fleet.report();
        let states = [state_of(&report, 0), state_of(&report, 1)];
        states.contains(&json!("other-version")).then_some(report)
    });
    assert!(
        [0, 1]
            .map(|at| state_of(&report, at))
            .contains(&json!("ready")),
        "{report}"
    );
    // The version of another roll-out cannot be staged if it is the node's own.
    let own = file(&files, "own.toml", OLD);
    let (is_well, said) = try_plugin(
        one,
        &["rollout", "rules", "--config", own.to_str().expect("UTF-8")],
    );
    assert!(
        !is_well && said.contains("there is nothing to roll out"),
        "{said}"
    );
}

#[test]
fn a_shadow_on_two_nodes_reports_the_sum_of_the_events_that_differ() {
    let (fleet, files) = (Fleet::start(), Folder::new());
    fleet.share_sources();
    let new = file(&files, "new.toml", NEW);
    let new = new.to_str().expect("UTF-8");
    for node in &fleet.nodes {
        plugin(node, &["shadow", "rules", "--config", new]);
    }
    let publish = |events: &[Value], source: &str| {
        let mut connection = fleet.server.connection();
        for event in events {
            let mut add = redis::cmd("XADD");
            add.arg(source).arg("*");
            for (name, value) in event.as_object().expect("an object") {
                add.arg(name).arg(value.as_str().expect("a text"));
            }
            add.exec(&mut connection).expect("XADD");
        }
    };
    let events = thousand();
    let (first, second) = events.split_at(500);
    publish(first, SOURCES[0]);
    publish(second, SOURCES[1]);
    let sum = eventually(SOON, "both nodes have reported", || {
        let sum = fleet.nodes[0]
            .admin("/v1/plugins/rules/shadow?all=true")
            .json();
        (sum["compared"] == 1_000).then_some(sum)
    });
    assert_turned(&sum);
    let nodes = sum["nodes"].as_array().expect("a list");
    let each: Vec<&Value> = nodes.iter().map(|node| &node["compared"]).collect();
    assert_eq!(each, [&json!(500), &json!(500)], "{sum}");
    let said = plugin(&fleet.nodes[1], &["shadow", "rules", "--all"]);
    assert!(
        said.contains(" on 2 nodes\n")
            && said.contains("\n7 x incident.open: g:region-eu -> g:region-us\n"),
        "{said}"
    );
}

#[test]
fn a_rolled_out_version_that_fails_too_often_ends_the_rollout() {
    let (plugins, files) = (Folder::new(), Folder::new());
    let own = plugins.path().join("versioned.wasm");
    fs::write(&own, versioned(1)).expect("write a plugin");
    let node = Node::builder()
        .plugins(plugins.path())
        .config("[plugins.versioned]\ndeadline = '1s'\n")
        .start();
    let faulty = files.path().join("faulty.wasm");
    fs::write(&faulty, versioned(FAULTY)).expect("write a plugin");
    let faulty = faulty.to_str().expect("UTF-8");
    let said = plugin(&node, &["rollout", "versioned", faulty]);
    assert!(said.contains("decides in all 1 partitions"), "{said}");
    // It fails on three of ten, which is more than its probation allows.
    let events: Vec<Value> = (0..100)
        .map(|n| event(&format!("e{n}"), "t", json!({ "user": "7" })))
        .collect();
    for batch in events.chunks(10) {
        node.publisher().publish(batch);
    }
    eventually(SOON, "the roll-out ends", || {
        let answer = node.admin("/v1/plugins/versioned/rollout");
        (answer.status == 404).then_some(())
    });
    eventually(SOON, "the reason is logged", || {
        let log = node.log();
        log.contains("plugin rolled back on all nodes: ")
            .then_some(())
    });
    // Its own version decides what the other one fails on.
    let mut stream = node.stream("7");
    let last = event("last-0", "t", json!({ "user": "7" }));
    node.publisher().publish(&[last]);
    let notification = stream.next_notification(SOON);
    assert_eq!(notification.id, "last-0");
    assert_eq!(fs::read(&own).expect("its file"), versioned(1));
}
