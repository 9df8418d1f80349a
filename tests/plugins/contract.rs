//! What routes can say: conditions on lists and thresholds of recipients, and several notifications
//! of one event, by `rules` and by a plugin in Rust, on both brokers. And which components are of
//! this contract.

use std::fs;

use serde_json::{Value, json};

use crate::harness::command::{output_of, pointsman};
use crate::harness::eventually;
use crate::harness::guests::{component_of, contract, core_module};
use crate::harness::node::{Folder, Node, SOON};
use crate::harness::plugins::{Plugins, Site};
use crate::harness::publish::event;
use crate::harness::redis::RedisServer;
use crate::harness::sse::{Notification, Request, Stream};

/// `unruly` decides about events of the type `rust.*`, `rules` in the same way about `rules.*`.
const CONFIG: &str = r#"
[plugins.unruly.config]
types = ["rust.*"]
fields = ["/severity"]

[[plugins.rules.config.rules]]
match.type = "rules.topic"
to.everyone = true
when = { muted = { not_contains = "{topic}" } }

[[plugins.rules.config.rules]]
match.type = "rules.alarm"
to.everyone = true
when = [{ min_severity = { at_most = "{/severity}" } }, { min_severity = { absent = true } }]

[[plugins.rules.config.rules]]
match.type = "rules.two"
to.user = "{recipient}"
slot = "summary"
collapse = "k"
body = "short"

[[plugins.rules.config.rules]]
match.type = "rules.two"
to.user = "{recipient}"
slot = "detail"
collapse = "k"
priority = "Urgent"
body = "long"

[[plugins.rules.config.rules]]
match.type = "rules.two"
to.user = "{recipient}"
slot = "detail"
body = "not this one"
"#;

fn plugins() -> Folder {
    let folder = Folder::new();
    for name in ["address", "rules", "unruly"] {
        fs::write(
            folder.path().join(format!("{name}.wasm")),
            core_module(name),
        )
        .expect("write a plugin");
    }
    folder
}

/// A node on each broker.
fn on_both_brokers(check: impl Fn(&Node)) {
    let (folder, server) = (plugins(), RedisServer::start());
    for builder in [Node::builder(), Node::builder().redis(server.url())] {
        let node = builder.plugins(folder.path()).config(CONFIG).start();
        check(&node);
    }
}

/// Publishes an event that everyone receives, and returns the ids received before it.
fn until_witness(node: &Node, streams: &mut [Stream], id: &str) -> Vec<Vec<String>> {
    node.publisher()
        .publish(&[event(id, "t", json!({ "everyone": true }))]);
    let before = |stream: &mut Stream| {
        let mut ids = Vec::new();
        loop {
            let received = stream.next_notification(SOON).id;
            if received == id {
                return ids;
            }
            ids.push(received);
        }
    };
    streams.iter_mut().map(before).collect()
}

#[test]
fn muted_topics_and_severity_thresholds_select_the_recipients() {
    on_both_brokers(|node| {
        for (user, attributes) in [
            (
                "ann",
                json!({"muted": ["billing", "chat"], "min_severity": 3}),
            ),
            ("carl", json!({"muted": [], "min_severity": 1})),
        ] {
            let answer = node.send(
                "PUT",
                &format!("/v1/users/{user}/attributes"),
                &[("content-type", "application/json")],
                attributes.to_string().as_bytes(),
            );
            assert_eq!(answer.status, 204, "{answer:?}");
            let stored = node.request("GET", &format!("/v1/users/{user}/attributes"));
            assert_eq!(stored.json(), attributes);
        }
        let mut streams = ["ann", "bob", "carl"].map(|user| node.stream(user));
        for by in ["rules", "rust"] {
            let topic = |topic: &str| {
                event(
                    &format!("{by}-{topic}"),
                    &format!("{by}.topic"),
                    json!({ "topic": topic }),
                )
            };
            let alarm = |severity: u32| {
                event(
                    &format!("{by}-{severity}"),
                    &format!("{by}.alarm"),
                    json!({ "data": { "severity": severity } }),
                )
            };
            node.publisher().publish(&[
                topic("billing"),
                topic("orders"),
                alarm(0),
                alarm(2),
                alarm(3),
            ]);
            let received = until_witness(node, &mut streams, &format!("{by}-witness"));
            let expect = [
                vec!["orders", "3"],
                vec!["billing", "orders", "0", "2", "3"],
                vec!["billing", "orders", "2", "3"],
            ];
            let expect = expect.map(|ids| {
                let full = ids.iter().map(|id| format!("{by}-{id}"));
                full.collect::<Vec<_>>()
            });
            assert_eq!(received, expect, "by {by}");
        }
        let explained = node
            .admin("/v1/explain?event_id=rules-billing&user=ann")
            .json();
        let reason =
            "attribute `muted` is [\"billing\", \"chat\"] but must not contain \"billing\"";
        assert!(
            explained["conclusion"]
                .as_str()
                .is_some_and(|text| text.contains(reason)),
            "{explained}"
        );
    });
}

fn is(notification: &Notification, id: &str, slot: &str, data: &str) -> bool {
    notification.id == id
        && notification.slot.as_deref() == Some(slot)
        && notification.data == json!(data)
}

/// Everything that a stream from this cursor receives before the witness.
fn rest(node: &Node, cursor: &str, witness: &str) -> Vec<Notification> {
    let mut stream = Request::new(node.addr(), "user=ann")
        .last_event_id(cursor)
        .open(SOON)
        .expect("open a stream");
    let mut rest = Vec::new();
    loop {
        let notification = stream.next_notification(SOON);
        if notification.id == witness {
            return rest;
        }
        rest.push(notification);
    }
}

#[test]
fn two_slots_of_an_event_are_two_notifications_that_survive_a_cut_between_them() {
    on_both_brokers(|node| {
        for by in ["rules", "rust"] {
            let (two, end) = (format!("{by}-two"), format!("{by}-end"));
            let mut live = node.stream("ann");
            let start = live.last_event_id().to_owned();
            node.publisher().publish(&[
                // Not `user`, by which `address` would add a notification without a slot.
                event(&two, &format!("{by}.two"), json!({ "recipient": "ann" })),
                event(&end, "t", json!({ "user": "ann" })),
            ]);
            let both = [0, 1].map(|_| live.next_notification(SOON));
            assert_ne!(both[0].cursor, both[1].cursor);
            let summary = both.iter().find(|one| is(one, &two, "summary", "short"));
            let detail = both.iter().find(|one| is(one, &two, "detail", "long"));
            let (Some(summary), Some(detail)) = (summary, detail) else {
                panic!("{both:#?}")
            };
            assert_eq!(
                (&*summary.priority, &*detail.priority),
                ("normal", "urgent")
            );
            assert_eq!(live.next_notification(SOON).id, end);
            // History: the urgent one first, and a cut after either loses and repeats nothing.
            let mut history = Request::new(node.addr(), "user=ann")
                .last_event_id(&start)
                .open(SOON)
                .expect("open a stream");
            let first = history.next_notification(SOON);
            let second = history.next_notification(SOON);
            assert!(is(&first, &two, "detail", "long"), "{first:?}");
            assert!(is(&second, &two, "summary", "short"), "{second:?}");
            let after_first = rest(node, &first.cursor, &end);
            assert!(
                matches!(after_first.as_slice(), [one] if is(one, &two, "summary", "short")),
                "{after_first:#?}"
            );
            assert_eq!(rest(node, &second.cursor, &end), []);
            pages_and_explanations_list_both(node, &two);
        }
    });
}

fn pages_and_explanations_list_both(node: &Node, two: &str) {
    let page = node.request("GET", "/v1/notifications?user=ann").json();
    let listed: Vec<&Value> = page["notifications"]
        .as_array()
        .expect("a page")
        .iter()
        .filter(|item| item["data"]["id"] == two)
        .collect();
    assert_eq!(listed.len(), 2, "{page:#}");
    let explained = node
        .admin(&format!("/v1/explain?event_id={two}&user=ann"))
        .json();
    assert_eq!(explained["decision"]["slots"], json!(["summary", "detail"]));
    let other = &explained["other_notifications"][0];
    assert_eq!(
        (
            &explained["plan"][0]["slot"],
            &explained["recipient"]["wins"],
            &other["slot"],
            &other["recipient"]["wins"]
        ),
        (&json!("summary"), &json!(0), &json!("detail"), &json!(0)),
        "{explained:#}"
    );
    let conclusion = explained["conclusion"].as_str().unwrap_or_default();
    assert!(
        conclusion.contains("Slot `summary`: ") && conclusion.contains("Slot `detail`: "),
        "{conclusion}"
    );
}

/// After a filter has set the priority, no router judges the published word.
#[test]
fn the_words_of_other_publishers_are_priorities_and_a_filter_replaces_any_word() {
    let config = r#"
[[plugins.prioritize.config.tables]]
by = "priority"
rows = [{ value = "P1", priority = "Urgent" }]
"#;
    let node = Node::builder()
        .plugins(crate::harness::every_bundled_plugin())
        .config(config)
        .start();
    let mut stream = node.stream("ann");
    let published = [
        ("HIGH", "high"),
        ("Normal", "normal"),
        ("medium", "normal"),
        ("P1", "urgent"),
    ];
    for (word, priority) in published {
        node.publisher()
            .publish(&[event(word, "t", json!({ "user": "ann", "priority": word }))]);
        let notification = stream.next_notification(SOON);
        assert_eq!(
            (&*notification.id, &*notification.priority),
            (word, priority)
        );
    }
    // Without a filter, an unknown word is still a dead letter with the fix.
    node.publisher()
        .publish(&[event("e", "t", json!({ "user": "ann", "priority": "P2" }))]);
    let reason = eventually(SOON, "a dead letter", || {
        let letters = node.request("GET", "/v1/dead-letters").json();
        letters["dead_letters"][0]["reason"]
            .as_str()
            .map(str::to_owned)
    });
    assert!(
        reason.contains("use low, normal, high or urgent"),
        "{reason}"
    );
}

#[test]
fn a_component_of_this_and_a_later_version_is_accepted() {
    let later = contract()
        .replace("plugin@0.1.0", "plugin@0.2.0")
        .replace("version: string,", "version: string, licence: string,");
    let both = format!(
        "{}\n{}",
        "package test:both; world both { include pointsman:plugin/full-plugin@0.1.0; include pointsman:plugin/full-plugin@0.2.0; }",
        [contract(), later].map(|text| nested(&text)).concat()
    );
    let component = component_of(&both, "both");
    let plugins = Plugins::new(&[("address.wasm", core_module("address"))]);
    let site = Site::of(Node::builder().config("[plugins]\n"), &plugins);
    // Every function of this component traps: the first one that the host calls is of 0.1.
    let upload = site
        .node
        .order("PUT", "/v1/plugins/address", &[], &component);
    let error = upload.json()["error"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    assert!(
        error.contains("fails in describe: it trapped"),
        "{upload:?}"
    );
}

/// The text of a package as a nested one.
fn nested(text: &str) -> String {
    let (head, rest) = text.split_once(';').expect("a package");
    format!("{head} {{ {rest} }}\n")
}

/// The rules of a router with this many slots of its own.
fn with_slots(plugin: &str, n: usize) -> String {
    let rules = (0..n).map(|n| {
        format!("[[plugins.{plugin}.config.rules]]\nto.user = 'ann'\nslot = '{plugin}-{n}'\n")
    });
    format!(
        "[plugins.{plugin}]\ndeadline = '1s'\n{}",
        rules.collect::<String>()
    )
}

/// Each router keeps the limit of 8, so only the host sees the sum.
#[test]
fn the_slots_of_all_routers_count_together_in_a_commit_a_dry_run_and_a_backtest() {
    let (folder, files) = (Folder::new(), Folder::new());
    for name in ["rules", "others"] {
        let path = folder.path().join(format!("{name}.wasm"));
        fs::write(path, core_module("rules")).expect("write a plugin");
    }
    let config = with_slots("rules", 5) + &with_slots("others", 3);
    let node = Node::builder()
        .plugins(folder.path())
        .config(&config)
        .start();
    let mut stream = node.stream("ann");
    node.publisher().publish(&[event("eight", "t", json!({}))]);
    for _ in 0..8 {
        assert_eq!(stream.next_notification(SOON).id, "eight");
    }
    let refused = "the routes of all routers have 9 slots; the limit is 8; use fewer";

    // The effect of the candidate on it.
    let more = files.path().join("more.toml");
    fs::write(&more, with_slots("others", 4)).expect("write a configuration");
    let more = more.to_str().expect("UTF-8");
    let backtest = |config: &str| -> Value {
        let said = output_of(&mut pointsman(&[
            "plugin",
            "backtest",
            "others",
            "--config",
            config,
            "--json",
            "--url",
            &node.admin_url(""),
        ]));
        serde_json::from_str(&said).expect("JSON")
    };
    let report = backtest(more);
    assert_eq!(
        (&report["compared"], &report["different"], &report["failed"]),
        (&json!(1), &json!(1), &json!(1)),
        "{report:#}"
    );
    let difference = &report["differences"][0];
    assert_eq!(difference["old"]["verdict"], "routes");
    assert_eq!(
        (&difference["new"]["verdict"], &difference["new"]["reason"]),
        (&json!("failed"), &json!(refused))
    );

    // The same as its own configuration: the dry run and the commit agree with the backtest.
    node.reconfigure(&(with_slots("rules", 5) + &with_slots("others", 4)));
    eventually(SOON, "the configuration is active", || {
        (node.admin("/v1/plugins/others").json()["generation"] == 2).then_some(())
    });
    let nine = event("nine", "t", json!({}));
    let json = [("content-type", "application/cloudevents+json")];
    let path = "/v1/events?dry_run=true";
    let dry_run = node.send("POST", path, &json, nine.to_string().as_bytes());
    assert!(
        dry_run.status == 200
            && dry_run.body.contains(refused)
            && dry_run.body.contains("dead-lettered"),
        "{dry_run:?}"
    );
    node.publisher().publish(&[nine]);
    let letters = eventually(SOON, "the event is a dead letter", || {
        let letters = node.request("GET", "/v1/dead-letters").json();
        let reason = letters["dead_letters"][0]["reason"].as_str();
        reason.map(str::to_owned)
    });
    assert_eq!(letters, refused);

    // A dead letter of the past: refused again, it is no difference; with fewer slots, it is one.
    let report = backtest(more);
    assert_eq!(
        (&report["compared"], &report["different"], &report["failed"]),
        (&json!(2), &json!(1), &json!(1)),
        "{report:#}"
    );
    let fewer = files.path().join("fewer.toml");
    fs::write(&fewer, with_slots("others", 3)).expect("write a configuration");
    let report = backtest(fewer.to_str().expect("UTF-8"));
    let difference = &report["differences"][0];
    assert_eq!(
        (
            &report["different"],
            &report["failed"],
            &difference["event"]["id"]
        ),
        (&json!(1), &json!(0), &json!("nine")),
        "{report:#}"
    );
    assert_eq!(
        (&difference["old"]["verdict"], &difference["new"]["verdict"]),
        (&json!("failed"), &json!("routes"))
    );
}
