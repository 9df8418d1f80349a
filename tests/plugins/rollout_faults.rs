//! Roll-outs under faults: while a version is being compiled, with a node that was stopped, that
//! cannot follow, or whose keys another client has overwritten.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::Duration;

use serde_json::json;

use super::rollout::{Fleet, NEW, SOURCES, configuration, file, folder, plugin, try_plugin};
use crate::harness::eventually;
use crate::harness::guests::{core_module, slow_to_compile};
use crate::harness::node::{Folder, Node, SOON};
use crate::harness::redis::RedisServer;

/// Time limit for what waits for a processor, on a machine whose processors are busy.
const EVENTUALLY: Duration = Duration::from_secs(60);

/// Variables of a function that is compiled in seconds, long enough to be stopped meanwhile.
const SECONDS: u32 = 5_000;

/// Stops the process that compiles for this node, as soon as there is one. It ends with its node.
fn stop_compiler(node: &Node) -> u32 {
    let parent = node.pid().to_string();
    let compiler = eventually(EVENTUALLY, "a file is being compiled", || {
        let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"));
        let of_threads = fs::read_dir(format!("/proc/{parent}/task")).ok()?.flatten();
        let of_threads =
            of_threads.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
        let all: String = children.into_iter().chain(of_threads).collect();
        all.split_whitespace().next()?.parse().ok()
    });
    let stopped = Command::new("kill")
        .args(["-s", "STOP", &format!("{compiler}")])
        .status();
    assert!(stopped.expect("run kill").success());
    compiler
}

fn is_running(process: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

/// A folder with `rules` and a plugin `slow` that decides nothing, and a file with its next version,
/// which is slow to compile.
fn folder_with_slow(files: &Folder) -> (Folder, String) {
    let plugins = folder();
    fs::write(plugins.path().join("slow.wasm"), slow_to_compile(1)).expect("write a plugin");
    let next = files.path().join("slow-next.wasm");
    fs::write(&next, slow_to_compile(SECONDS)).expect("write a plugin");
    (plugins, next.to_str().expect("UTF-8").to_owned())
}

#[test]
fn a_rollback_takes_effect_at_once_while_a_version_of_another_plugin_is_being_compiled() {
    let files = Folder::new();
    let (plugins, next) = folder_with_slow(&files);
    // Each compiles for itself.
    let caches = [Folder::new(), Folder::new()];
    let fleet = Fleet::of(plugins, |node, n| {
        // The node creates it, for itself alone.
        let cache = caches[n].path().join("code");
        node.environment("POINTSMAN_PLUGINS_CACHE", cache.to_str().expect("UTF-8"))
    });
    fleet.share_sources();
    let [one, two] = &fleet.nodes;
    let new = file(&files, "new.toml", NEW);
    plugin(
        one,
        &["rollout", "rules", "--config", new.to_str().expect("UTF-8")],
    );
    fleet.assert_decided("before", [true, true]);
    thread::scope(|scope| {
        let rollout = scope.spawn(|| plugin(one, &["rollout", "slow", &next]));
        let compiler = stop_compiler(two);
        // The command ends although a node does not.
        let said = rollout.join().expect("the command ends");
        assert!(
            said.contains(": loading\n") && said.contains(": ready\n"),
            "{said}"
        );

        let said = plugin(one, &["rollback", "rules"]);
        assert!(said.starts_with("rolled back rules on all nodes"), "{said}");
        fleet.assert_decided("after", [false, false]);
        // Other plugins are loaded meanwhile.
        let discard = core_module("discard");
        let answer = two.order("PUT", "/v1/plugins/discard?create=true", &[], &discard);
        assert_eq!(answer.status, 200, "{answer:?}");
        assert!(is_running(compiler), "the compilation has ended");

        // A version that is no longer wanted is not compiled further.
        plugin(one, &["rollback", "slow"]);
        eventually(EVENTUALLY, "the compilation is stopped", || {
            (!is_running(compiler)).then_some(())
        });
    });
}

#[test]
fn partitions_of_a_rollout_wait_at_a_start_until_its_version_is_compiled() {
    let (files, cache) = (Folder::new(), Folder::new());
    let (plugins, next) = folder_with_slow(&files);
    let server = RedisServer::start();
    let mut node = Node::builder()
        .redis(server.url())
        .plugins(plugins.path())
        .config(&configuration())
        .environment(
            "POINTSMAN_PLUGINS_CACHE",
            cache.path().join("code").to_str().expect("UTF-8"),
        )
        .start();
    let path = "/v1/groups/region-eu/members/bob";
    assert_eq!(node.request("PUT", path).status, 204);
    let said = plugin(&node, &["rollout", "slow", &next, "--share", "50%"]);
    assert!(
        said.contains("decides in 1 of 2 partitions (50 %)"),
        "{said}"
    );
    let partitions = node.admin("/v1/plugins/slow/rollout").json()["partitions"].clone();
    node.terminate(SOON);
    // As on a machine of its own: the code of all versions is gone.
    fs::remove_dir_all(cache.path().join("code")).expect("remove the code");
    node.restart_unready();
    // `rules` and the own version of `slow` come first.
    eventually(EVENTUALLY, "the own versions are active", || {
        let plugins = node.admin("/v1/plugins").json();
        let active = plugins["plugins"].as_array()?.iter();
        (active.filter(|listed| listed["state"] == "active").count() == 2).then_some(())
    });
    let compiler = stop_compiler(&node);
    let line = "rollouts.slow: the version of the roll-out is still being loaded; events of its partitions wait";
    eventually(EVENTUALLY, "readiness names the plugin", || {
        let ready = node.admin("/readyz");
        (ready.status == 503 && ready.body.contains(line)).then_some(())
    });
    let mut stream = node.stream("bob");
    let mut is_covered = SOURCES.map(|source| {
        let number: u64 = server.command(&format!("HGET pointsman:partitions {source}"));
        let words = format!("XADD {source} * type incident.open id {source} source /tests");
        let _entry: String = server.command(&words);
        (partitions == json!([number]), source)
    });
    is_covered.sort_unstable();
    let [(false, free), (true, covered)] = is_covered else {
        panic!("not one of two partitions: {is_covered:?}")
    };
    assert_eq!(stream.next_notification(EVENTUALLY).id, free);
    // A second event of the free partition overtakes the one that waits.
    let words = format!("XADD {free} * type incident.open id second source /tests");
    let _entry: String = server.command(&words);
    assert_eq!(stream.next_notification(EVENTUALLY).id, "second");
    let discard = core_module("discard");
    let answer = node.order("PUT", "/v1/plugins/discard?create=true", &[], &discard);
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(is_running(compiler), "the compilation has ended");

    let said = plugin(&node, &["rollback", "slow"]);
    assert!(said.starts_with("rolled back slow on all nodes"), "{said}");
    assert_eq!(stream.next_notification(EVENTUALLY).id, covered);
    eventually(EVENTUALLY, "the node is ready", || {
        (node.admin("/readyz").status == 200).then_some(())
    });
}

/// The second node is stopped longer than it is listed, so that a rollback no longer waits for it.
/// When it continues, an event has been waiting that was published after the rollback.
#[test]
fn a_node_that_was_stopped_during_a_rollback_decides_nothing_by_the_withdrawn_version() {
    let (files, plugins) = (Folder::new(), [folder(), folder()]);
    let server = RedisServer::start();
    let start = |n: usize, more: &str| {
        Node::builder()
            .redis(server.url())
            .plugins(plugins[n].path())
            .config(&format!("{}{more}", configuration()))
            .may_be_unready()
            .start()
    };
    // The first one lacks a plugin and decides nothing.
    let one = start(0, "[plugins.discard]\n");
    let two = start(1, "");
    for node in [&one, &two] {
        eventually(EVENTUALLY, "its version is active", || {
            let answer = node.admin("/v1/plugins/rules");
            (answer.status == 200 && answer.json()["generation"] == 1).then_some(())
        });
    }
    for (user, group) in [("ann", "region-us"), ("bob", "region-eu")] {
        let path = format!("/v1/groups/{group}/members/{user}");
        eventually(EVENTUALLY, "the node has reached its broker", || {
            (one.request("PUT", &path).status == 204).then_some(())
        });
    }
    let new = file(&files, "new.toml", NEW);
    let new = new.to_str().expect("UTF-8");
    plugin(
        &one,
        &["rollout", "rules", "--config", new, "--share", "0%"],
    );
    let staged = ".rules.next.toml";
    fs::copy(
        plugins[0].path().join(staged),
        plugins[1].path().join(staged),
    )
    .expect("copy the staged file");
    eventually(SOON, "both have the version", || {
        let report = one.admin("/v1/plugins/rules/rollout").json();
        let nodes = report["nodes"].as_array()?;
        let ready = nodes.iter().filter(|node| node["state"] == "ready");
        (ready.count() == 2).then_some(())
    });
    plugin(&one, &["rollout", "rules", "--share", "100%"]);
    let incident = |id: &str| {
        let words = format!(
            "XADD {} * type incident.open id {id} source /tests site dublin",
            SOURCES[0]
        );
        let _entry: String = server.command(&words);
    };
    let [mut ann, mut bob] = ["ann", "bob"].map(|user| one.stream(user));
    incident("before");
    assert_eq!(ann.next_notification(SOON).id, "before");

    two.signal("STOP");
    let said = plugin(&one, &["rollback", "rules"]);
    assert!(said.starts_with("rolled back rules on all nodes"), "{said}");
    incident("after");
    two.signal("CONT");
    assert_eq!(bob.next_notification(EVENTUALLY).id, "after");
}

#[test]
fn a_live_node_that_cannot_follow_is_pending() {
    let (files, plugins) = (Folder::new(), folder());
    let server = RedisServer::start();
    let rules = "ACL SETUSER two on >secret ~* &* +@all -hstrlen";
    let () = server.command(rules);
    let start = |url: String| {
        Node::builder()
            .redis(url)
            .plugins(plugins.path())
            .config(&configuration())
            .may_be_unready()
            .start()
    };
    let one = start(server.url());
    let two = start(format!("redis://two:secret@127.0.0.1:{}/", server.port()));
    eventually(SOON, "readiness names the right", || {
        let body = two.admin("/readyz").body;
        let line = "rollouts: the roll-outs of plugins cannot be followed";
        (body.contains(line) && body.contains("NOPERM")).then_some(())
    });
    let new = file(&files, "new.toml", NEW);
    let new = new.to_str().expect("UTF-8");
    thread::scope(|scope| {
        let rollout = scope.spawn(|| plugin(&one, &["rollout", "rules", "--config", new]));
        eventually(SOON, "the roll-out is written", || {
            let answer = one.admin("/v1/plugins/rules/rollout");
            (answer.status == 200).then_some(())
        });
        let name = format!("test-{}", two.addr().port());
        let said = plugin(&one, &["rollback", "rules"]);
        assert!(
            said.starts_with("rolled back rules, but not on all nodes yet")
                && said.contains(&format!("not followed yet: {name}")),
            "{said}"
        );
        let said = rollout.join().expect("the command ends");
        assert!(
            said.contains(&format!("  {name}: pending: it has not reported\n")),
            "{said}"
        );
    });
}

#[test]
fn keys_that_another_client_has_overwritten_are_reported_and_commands_tell_what_they_did() {
    let (fleet, files) = (Fleet::start(), Folder::new());
    let [one, two] = &fleet.nodes;
    let key = "pointsman:rollouts";
    let await_line = |text: &str| {
        eventually(SOON, text, || {
            let ready = one.admin("/readyz");
            (ready.status == 200 && ready.body.contains(text)).then_some(())
        });
    };
    let new = file(&files, "new.toml", NEW);
    let new = new.to_str().expect("UTF-8");
    let rollout = ["rollout", "rules", "--config", new];

    // Not a roll-out: ignored, reported and removed by a rollback.
    let _: u64 = fleet.server.command(&format!("HSET {key} rules nonsense"));
    await_line(
        "rollouts: the broker holds something else than a roll-out for rules, which is ignored; end it (pointsman plugin rollback NAME)",
    );
    fleet.assert_decided("ignored", [false, false]);
    plugin(two, &["rollback", "rules"]);
    eventually(SOON, "the line is gone", || {
        (!one.admin("/readyz").body.contains("rollouts:")).then_some(())
    });

    // The key of a report: the next report replaces it.
    let name = format!("test-{}", one.addr().port());
    let _: u64 = fleet
        .server
        .command(&format!("DEL pointsman:report:{name}"));
    let _: u64 = fleet
        .server
        .command(&format!("RPUSH pointsman:report:{name} x"));
    let said = plugin(two, &rollout);
    assert_eq!(said.matches(": ready\n").count(), 2, "{said}");
    fleet.assert_decided("new", [true, true]);

    // The list of nodes: the rollback takes effect, and the answer tells what is not known.
    let _: u64 = fleet.server.command("DEL pointsman:nodes");
    let _: String = fleet.server.command("SET pointsman:nodes x");
    await_line("rollouts: the roll-outs of plugins cannot be followed");
    let said = plugin(two, &["rollback", "rules"]);
    assert!(
        said.starts_with(
            "rolled back rules: the change is written, and the reports of the nodes cannot be read"
        ) && said.contains("WRONGTYPE"),
        "{said}"
    );
    eventually(SOON, "the other node has followed", || {
        let state = one.admin("/v1/plugins/rules/rollout");
        (state.status == 404).then_some(())
    });
    let _: u64 = fleet.server.command("DEL pointsman:nodes");
    eventually(SOON, "both nodes are registered again", || {
        let n: u64 = fleet.server.command("HLEN pointsman:nodes");
        (n == 2).then_some(())
    });

    // The roll-outs themselves: nothing is written, and the reason is the answer.
    let _: u64 = fleet.server.command(&format!("DEL {key}"));
    let _: String = fleet.server.command(&format!("SET {key} x"));
    await_line(
        "rollouts: the roll-outs of plugins cannot be followed, so this node keeps the versions that it has",
    );
    let (is_well, said) = try_plugin(two, &rollout);
    assert!(
        !is_well && said.contains("the broker refused the request"),
        "{said}"
    );
    let _: u64 = fleet.server.command(&format!("DEL {key}"));
    let said = plugin(two, &rollout);
    assert_eq!(said.matches(": ready\n").count(), 2, "{said}");
}
