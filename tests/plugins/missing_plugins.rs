//! A plugin that is expected and has no active version stops ingest on its node: events wait, or
//! another node that has it decides them. Only what an operator states lets events pass without it.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use crate::harness::command::{output_of, pointsman, said};
use crate::harness::eventually;
use crate::harness::guests::{core_module, versioned};
use crate::harness::http;
use crate::harness::node::{Node, SOON};
use crate::harness::plugins::{Plugins, Site, by, deciders, generations};
use crate::harness::publish::{event, xadd};
use crate::harness::redis::RedisServer;

/// Longer than the grace period of a vanished file, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// The names of the plugins in each decision, by event.
fn note_deciders(node: &Node, deciders: &mut BTreeMap<String, Vec<String>>) {
    let decisions = node.admin("/v1/decisions?limit=500").json();
    for decision in decisions.as_array().expect("a list") {
        let id = decision["event_id"].as_str().expect("an id").to_owned();
        let names = generations(decision).into_iter().map(|(name, _)| name);
        deciders.insert(id, names.collect());
    }
}

/// The readiness of a node as JSON.
fn readiness(node: &Node) -> Value {
    let accept = [("Accept", "application/json")];
    http::send("GET", &node.admin_url("/readyz"), &accept, None)
        .expect("an answer")
        .json()
}

/// Waits until this many entries wait, and the node has settled none since `outcomes`.
fn await_waiting(site: &Site, n: f64, outcomes: f64) {
    eventually(PATIENCE, "the event waits", || {
        (site.node.metric("pointsman_source_lag_entries") == n).then_some(())
    });
    assert_eq!(site.node.metric("pointsman_events_total"), outcomes);
}

#[test]
fn no_event_is_decided_without_a_plugin_that_one_of_two_nodes_lacks() {
    const ROUNDS: usize = 10;
    const HALF: usize = 50;
    let server = RedisServer::start();
    let (good, damaged) = (versioned(1), versioned(1)[..1_000].to_vec());
    let folder = |bytes: Vec<u8>| {
        Plugins::new(&[
            ("address.wasm", core_module("address")),
            ("versioned.wasm", bytes),
        ])
    };
    let folders = [folder(good), folder(damaged)];
    let [whole, broken] = folders.each_ref().map(|plugins| {
        Node::builder()
            .redis(server.url())
            .plugins(plugins.dir())
            .config("[plugins.versioned]\n")
    });
    let (mut whole, mut broken) = (whole.start(), broken.may_be_unready().start());
    let mut connection = server.connection();
    let mut n_published = 0;
    let mut publish = || {
        let ids = n_published..n_published + HALF;
        n_published += HALF;
        let entries: Vec<_> = ids
            .map(|n| event(&format!("e{n}"), "t", json!({ "user": "7" })))
            .map(|event| vec![("event", event.to_string())])
            .collect();
        xadd(&mut connection, "pointsman:events", &entries);
    };
    let mut deciders = BTreeMap::new();
    for round in 0..ROUNDS {
        publish();
        // The damaged node is the only one while events arrive, and restarts in between.
        whole.terminate(SOON);
        publish();
        if round % 3 == 0 {
            broken.terminate(SOON);
            broken.restart();
        }
        eventually(PATIENCE, "the node reports the plugin", || {
            let report = readiness(&broken);
            let reasons = report["reasons"].as_array().expect("a list");
            let reason = reasons.iter().find(|r| r["name"] == "plugins.versioned")?;
            let text = reason["text"].as_str().expect("a text");
            (text.contains("versioned.wasm is truncated or damaged")
                && text.contains("events wait on this node")
                && reasons.len() == 1)
                .then_some(())
        });
        let owner: Option<String> = server.command("GET pointsman:{pointsman:events}:owner");
        assert_eq!(owner, None, "the node without the plugin holds the lease");
        whole.restart();
        eventually(PATIENCE, "all events are decided", || {
            note_deciders(&whole, &mut deciders);
            (deciders.len() == (round + 1) * 2 * HALF).then_some(())
        });
    }
    assert_eq!(deciders.len(), 1_000);
    for (id, names) in deciders {
        assert_eq!(names, ["address", "versioned"], "{id}");
    }
    let dead = whole.request("GET", "/v1/dead-letters").json();
    assert_eq!(dead["dead_letters"], json!([]));
}

/// The lease would last for ten minutes: it is released, and not only left to expire.
#[test]
fn a_node_whose_configuration_names_a_plugin_that_it_lacks_hands_its_sources_over() {
    let server = RedisServer::start();
    let lacking = "[plugins.absent]\n[ingest]\nlease_ttl = '10m'\n";
    let config = "[ingest]\nlease_ttl = '10m'\n";
    let plugins = Plugins::new(&[("versioned.wasm", versioned(1))]);
    let start = || {
        Node::builder()
            .redis(server.url())
            .plugins(plugins.dir())
            .config(config)
            .start()
    };
    let first = start();
    let mut stream = first.stream("7");
    let mut publish = |id: &str| {
        first
            .publisher()
            .publish(&[event(id, "t", json!({"user": "7"}))]);
        assert_eq!(stream.next_notification(PATIENCE).id, id);
    };
    publish("e1");
    let second = start();
    let n_decided = |node: &Node| node.metric("pointsman_events_total");
    assert_eq!((n_decided(&first), n_decided(&second)), (1.0, 0.0));

    first.reconfigure(lacking);
    let reason = "plugins.absent: the plugin 'absent' is configured, but no file in ";
    let fix = "; events wait on this node, unless plugins.absent.enabled = false or on_missing = \"skip\" lets them pass";
    eventually(PATIENCE, "the node reports the plugin", || {
        let page = first.admin("/readyz");
        (page.status == 503 && page.body.contains(reason) && page.body.contains(fix)).then_some(())
    });
    publish("e2");
    assert_eq!((n_decided(&first), n_decided(&second)), (1.0, 1.0));
}

#[test]
fn a_vanished_file_has_a_grace_period_and_then_stops_ingest_until_the_plugin_is_removed() {
    let plugins = Plugins::new(&[("first.wasm", versioned(1)), ("second.wasm", versioned(2))]);
    let order = Node::builder()
        .config("[plugins]\norder = ['first', 'second']\n")
        .data();
    let mut site = Site::of(order, &plugins);
    let both = [by("first", 1), by("second", 1)];
    assert_eq!(site.next_decision().1, both);

    // Gone for a moment, as with `rm` and `cp`: both decide, and nothing is loaded again.
    let gone = "warning: plugins.second: second.wasm is gone, so after 10 s events wait; put it back, or run `pointsman plugin remove second`; generation 1 stays active";
    plugins.remove("second.wasm");
    site.await_ready(200, |page| page.contains(gone));
    assert_eq!(site.next_decision().1, both);
    plugins.replace("second.wasm", &versioned(2));
    site.await_ready(200, |page| !page.contains("plugins"));
    assert_eq!(site.next_decision().1, both);

    plugins.remove("second.wasm");
    eventually(PATIENCE, "events wait for it", || {
        let page = site.node.admin("/readyz");
        (page.status == 503
            && page.body.contains("plugins.second: ")
            && page.body.contains("; events wait on this node, "))
        .then_some(())
    });
    let outcomes = site.node.metric("pointsman_events_total");
    let waiting = site.publish();
    await_waiting(&site, 1.0, outcomes);
    let dry_run = site.node.send(
        "POST",
        "/v1/events?dry_run=true",
        &[("Content-Type", "application/cloudevents+json")],
        &serde_json::to_vec(&event("dry", "t", json!({}))).expect("JSON"),
    );
    assert!(
        dry_run.status == 503
            && dry_run
                .body
                .contains("no active version of the plugin second"),
        "{dry_run:?}"
    );
    // It waits across a restart as well, because the configuration names it.
    site.node.kill();
    site.node.restart_unready();
    site.await_ready(503, |page| page.contains("plugins.second: "));
    await_waiting(&site, 1.0, 0.0);

    // The removal is what the operator wants, also after the next restart.
    let removed = output_of(
        pointsman(&["plugin", "remove", "second"]).args(["--url", &site.node.admin_url("")]),
    );
    assert!(removed.starts_with("removed second"), "{removed}");
    site.stream = site.node.stream("7");
    eventually(PATIENCE, "the event is decided", || {
        (site.node.metric("pointsman_events_total") == 1.0).then_some(())
    });
    let decisions = site
        .node
        .admin(&format!("/v1/decisions?event_id={waiting}"))
        .json();
    assert_eq!(generations(&decisions[0]), [by("first", 1)]);
    site.restart();
    let page = site.await_ready(200, |page| page.contains("plugins.second"));
    assert!(
        page.contains("warning: plugins.second: an admin command removed the plugin 'second', which the configuration still names; "),
        "{page}"
    );
    assert_eq!(site.next_decision().1, [by("first", 1)]);
    // A new file ends the removal.
    plugins.replace("second.wasm", &versioned(3));
    site.await_ready(200, |page| !page.contains("plugins"));
    assert_eq!(site.next_decision().1, [by("first", 1), by("second", 1)]);
    let left: Vec<_> = fs::read_dir(plugins.dir())
        .expect("read the folder")
        .map(|file| file.expect("an entry").file_name())
        .collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

/// Without a record of the removal, the second node would wait for the plugin after ten seconds.
#[test]
fn a_removal_by_command_applies_to_every_node_with_the_folder() {
    let plugins = Plugins::new(&[("first.wasm", versioned(1)), ("second.wasm", versioned(2))]);
    let (one, mut other) = (Site::new(&plugins), Site::new(&plugins));
    assert_eq!(other.next_decision().1, [by("first", 1), by("second", 1)]);
    let answer = one.node.order("DELETE", "/v1/plugins/second", &[], b"");
    assert_eq!(answer.status, 204, "{answer:?}");
    eventually(SOON, "the other node removes it", || {
        (other.node.admin("/v1/plugins/second").status == 404).then_some(())
    });
    assert_eq!(other.next_decision().1, [by("first", 1)]);
    other.restart();
    site_is_clear(&other);
    assert_eq!(other.next_decision().1, [by("first", 1)]);
}

fn site_is_clear(site: &Site) {
    assert_eq!(site.node.admin("/readyz").body, "ready\n");
}

#[test]
fn events_wait_at_a_start_until_every_plugin_file_is_active() {
    let good = versioned(2);
    let plugins = Plugins::new(&[("first.wasm", versioned(1)), ("second.wasm", good.clone())]);
    let mut site = Site::new(&plugins);
    site.node.kill();
    plugins.replace("second.wasm", &good[..good.len() / 2]);
    site.node.restart_unready();
    site.await_ready(503, |page| {
        page.contains("plugins.second: second.wasm is truncated or damaged")
            && page.contains("; events wait on this node, ")
            && !page.contains("broker: ")
    });
    site.stream = site.node.stream("7");
    let waiting = site.publish();
    await_waiting(&site, 1.0, 0.0);
    plugins.replace("second.wasm", &good);
    let (_, deciders) = site.decision(&waiting);
    assert_eq!(deciders, [by("first", 1), by("second", 1)]);
    // On a running node, a new file that is damaged was not active before: nothing is missing.
    plugins.replace("third.wasm", b"\0asm");
    site.await_ready(503, |page| {
        page.contains("plugins.third: third.wasm ") && !page.contains("events wait")
    });
    assert_eq!(site.next_decision().1, deciders);
}

/// What an operator does about a missing plugin.
type Statement<'a> = &'a dyn Fn(&Site);

#[test]
fn only_what_an_operator_states_lets_events_pass_without_a_plugin() {
    let plugins = Plugins::new(&[("versioned.wasm", versioned(1))]);
    let missing = "[plugins.absent]\n";
    let mut site = Site::of(Node::builder().config("[plugins]\n"), &plugins);
    let mut n_decided = 0.0;
    let disable = |site: &Site| {
        let answer = site
            .node
            .order("POST", "/v1/plugins/absent/disable", &[], b"");
        assert_eq!(answer.status, 200, "{answer:?}");
    };
    let reconfigure = |toml: &'static str| move |site: &Site| site.node.reconfigure(toml);
    let ways: [(Statement<'_>, &str); 4] = [
        (&reconfigure("[plugins.absent]\nenabled = false\n"), ""),
        (
            &reconfigure("[plugins.absent]\non_missing = 'skip'\n"),
            "warning: plugins.absent: the plugin 'absent' is configured, but no file in ",
        ),
        (&reconfigure("[plugins]\n"), ""),
        (
            &disable,
            "warning: plugins.absent: disabled by an admin command",
        ),
    ];
    for (state_it, warning) in ways {
        site.node.reconfigure(missing);
        site.await_ready(503, |page| page.contains("plugins.absent: "));
        let waiting = site.publish();
        await_waiting(&site, 1.0, n_decided);
        state_it(&site);
        assert_eq!(site.decision(&waiting), (1, vec![by("versioned", 1)]));
        n_decided += 1.0;
        site.await_ready(200, |page| {
            page.contains(warning) && page.contains("plugins") != warning.is_empty()
        });
    }
}

/// Such as a record that was copied with the folder, or a folder of that name.
#[test]
fn a_record_of_a_removal_from_before_the_file_was_last_seen_does_not_count() {
    let plugins = Plugins::new(&[("first.wasm", versioned(1)), ("second.wasm", versioned(2))]);
    let mut site = Site::new(&plugins);
    assert_eq!(site.next_decision().1, [by("first", 1), by("second", 1)]);
    let old = fs::File::create(plugins.dir().join(".first.removed")).expect("a record");
    let an_hour_ago = SystemTime::now() - Duration::from_secs(3_600);
    old.set_modified(an_hour_ago).expect("an old record");
    fs::create_dir(plugins.dir().join(".second.removed")).expect("a folder");
    plugins.remove("first.wasm");
    plugins.remove("second.wasm");
    let outcomes = site.node.metric("pointsman_events_total");
    site.await_ready(503, |page| {
        page.contains("plugins.first: ") && page.contains("plugins.second: ")
    });
    site.node
        .publisher()
        .publish(&[event("waits", "t", json!({ "user": "7" }))]);
    await_waiting(&site, 1.0, outcomes);
    plugins.replace("first.wasm", &versioned(1));
    plugins.replace("second.wasm", &versioned(2));
    site.await_ready(200, |page| page == "ready\n");
}

#[test]
fn events_wait_for_a_plugin_that_is_enabled_again_and_whose_file_is_damaged() {
    let plugins = Plugins::new(&[("first.wasm", versioned(1)), ("second.wasm", versioned(2))]);
    let mut site = Site::new(&plugins);
    let order = |site: &Site, what: &str| {
        let path = format!("/v1/plugins/second/{what}");
        site.node.order("POST", &path, &[], b"").status
    };
    assert_eq!(order(&site, "disable"), 200);
    assert_eq!(site.next_decision().1, [by("first", 1)]);
    plugins.replace("second.wasm", &versioned(2)[..1_000]);
    assert_eq!(order(&site, "enable"), 409);
    let outcomes = site.node.metric("pointsman_events_total");
    site.node
        .publisher()
        .publish(&[event("waits", "t", json!({ "user": "7" }))]);
    await_waiting(&site, 1.0, outcomes);
    plugins.replace("second.wasm", &versioned(2));
    site.await_ready(200, |page| page == "ready\n");
}

#[test]
fn a_copy_or_a_version_of_a_file_is_not_one_more_plugin() {
    let plugins = Plugins::new(&[("versioned.wasm", versioned(1))]);
    let mut site = Site::of(Node::builder().config("[plugins]\n"), &plugins);
    for (file, name) in [
        ("versioned-1.2.0.wasm", "versioned-1.2.0"),
        ("versioned (copy).wasm", "versioned (copy)"),
        ("versioned-2.wasm", "versioned-2"),
    ] {
        plugins.replace(file, &versioned(2));
        let page = site.await_ready(200, |page| page.contains(file));
        let line = page.lines().find(|line| line.contains(file));
        assert!(
            line.is_some_and(
                |line| line.starts_with(&format!("warning: plugins.{name}: {file} "))
                    && line.contains("rename it to versioned.wasm")
            ),
            "{page}"
        );
        assert_eq!(site.next_decision().1, [by("versioned", 1)]);
    }
    // They are stray files at a start as well, and check-config says so.
    site.restart();
    assert_eq!(site.next_decision().1, [by("versioned", 1)]);
    let mut check = pointsman(&["check-config", "--ephemeral", "--dev", "--plugins"]);
    let (is_well, checked) = said(check.arg(plugins.dir()));
    assert!(
        is_well
            && checked.contains("warning: plugin versioned-2: versioned-2.wasm ends in a version"),
        "{checked}"
    );
    let listed = site.node.admin("/v1/plugins/versioned-2").json();
    assert_eq!(
        (&listed["state"], &listed["events_wait"]),
        (&json!("ignored"), &json!(false))
    );
    // A name that the configuration states is a name.
    site.node.reconfigure("[plugins.versioned-2]\n");
    site.await_loads("versioned-2", "loaded", 1);
    assert_eq!(
        site.next_decision().1,
        [by("versioned-2", 1), by("versioned", 1)]
    );
}

#[test]
fn with_only_configured_the_configuration_alone_adds_plugins() {
    let plugins = Plugins::new(&[
        ("extra.wasm", versioned(2)),
        ("versioned.wasm", versioned(1)),
    ]);
    let only = "[plugins]\nonly_configured = true\n[plugins.versioned]\n";
    let mut site = Site::of(Node::builder().config(only), &plugins);
    site.await_ready(200, |page| {
        page.contains("warning: plugins.extra: extra.wasm is not loaded, because the configuration does not name the plugin 'extra'")
            && page.contains("add [plugins.extra]")
    });
    assert_eq!(site.next_decision().1, [by("versioned", 1)]);
    for name in ["extra", "other"] {
        let path = format!("/v1/plugins/{name}?create=true");
        let answer = site.node.order("PUT", &path, &[], &versioned(3));
        assert_eq!(answer.status, 409, "{name}: {answer:?}");
    }
    site.node
        .reconfigure(&format!("{only}[plugins.extra]\ndeadline = '1s'\n"));
    site.await_loads("extra", "loaded", 1);
    assert_eq!(site.next_decision().1, [by("extra", 1), by("versioned", 1)]);
    // What it no longer names is no longer active.
    site.node.reconfigure(only);
    site.await_ready(200, |page| page.contains("plugins.extra"));
    assert_eq!(site.next_decision().1, [by("versioned", 1)]);
}

#[test]
fn an_upload_over_http_adds_a_plugin_only_with_create() {
    let plugins = Plugins::new(&[("address.wasm", core_module("address"))]);
    let mut site = Site::of(
        Node::builder().config("[plugins.late]\non_missing = 'skip'\n"),
        &plugins,
    );
    let put = |site: &Site, path: &str| {
        let path = format!("/v1/plugins/{path}");
        let answer = site.node.order("PUT", &path, &[], &versioned(1));
        let error = answer.json()["error"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        (answer.status, error)
    };
    for (path, status, expect) in [
        (
            "adress",
            404,
            "this node has no plugin 'adress' (did you mean 'address'?); add ?create=true to add a new plugin",
        ),
        (
            "versioned",
            404,
            "this node has no plugin 'versioned' (its plugins: address, late); add ?create=true",
        ),
        (
            "address?create=true",
            409,
            "the plugin 'address' already exists; omit create=true to replace it",
        ),
        (
            "address-2?create=true",
            409,
            "'address-2' ends in a version, which is not part of a plugin's name; upload it as 'address'",
        ),
        (
            "address-1.2.0?create=true",
            409,
            "'address-1.2.0' is not a valid plugin name",
        ),
        ("versioned?create=maybe", 400, ""),
    ] {
        let (answered, error) = put(&site, path);
        assert!(
            answered == status && error.contains(expect),
            "{path}: {answered} {error}"
        );
    }
    assert_eq!(
        fs::read_dir(plugins.dir())
            .expect("read the folder")
            .count(),
        1
    );
    assert_eq!(put(&site, "versioned?create=true").0, 200);
    assert_eq!(put(&site, "versioned").0, 200);
    assert_eq!(put(&site, "late").0, 200, "the configuration names it");
    let id = site.publish();
    assert_eq!(site.stream.next_notification(SOON).id, id);
    let names = deciders(&site.node, &id);
    assert_eq!(names, [by("address", 1), by("late", 1), by("versioned", 1)]);
}
