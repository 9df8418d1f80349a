//! Candidates: run without effect in the shadow of their plugin or in a backtest, then promoted
//! permanently.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::Instant;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::harness::command;
use crate::harness::eventually;
use crate::harness::guests::{core_module, turning, wasi_component};
use crate::harness::http::Answer;
use crate::harness::node::{Builder, Folder, Node, SOON};
use crate::harness::publish::event;
use crate::harness::redis::RedisServer;

const SHADOW: &str = "/v1/plugins/turning/shadow";

/// A node whose one plugin is the first version of `turning`.
struct Site {
    node: Node,
    plugins: Folder,
}

impl Site {
    fn new(builder: Builder) -> Self {
        let plugins = Folder::new();
        fs::write(plugins.path().join("turning.wasm"), turning(1)).expect("write a plugin");
        // A long deadline, so that a busy machine does not fail the test.
        let builder = builder
            .config("[plugins.turning]\ndeadline = '1s'\n")
            .plugins(plugins.path());
        Self {
            node: builder.start(),
            plugins,
        }
    }

    fn report(&self) -> Value {
        ok(self.node.admin(SHADOW))
    }

    /// Waits until `n` events were compared or skipped.
    fn compared(&self, n: u64) -> Value {
        eventually(SOON, "all are compared", || {
            let report = self.report();
            (number(&report, "compared") + number(&report, "skipped") == n).then_some(report)
        })
    }
}

fn ok(answer: Answer) -> Value {
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

fn number(report: &Value, key: &str) -> u64 {
    report[key]
        .as_u64()
        .unwrap_or_else(|| panic!("no {key} in {report}"))
}

fn hash(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

/// 1,000 events to user 1; version 2 sends seven of them to other users.
fn thousand(prefix: &str) -> (Vec<Value>, BTreeMap<String, String>) {
    let mut turned = BTreeMap::new();
    let events = (0..1_000).map(|n| {
        let id = format!("{prefix}{n}");
        match n % 150 {
            77 => {
                let to = format!("other-{n}");
                turned.insert(id.clone(), to.clone());
                event(
                    &id,
                    "order.paid",
                    json!({ "user": "1", "turns": 2, "then": to }),
                )
            }
            // Changes as well, but to the same user: the same decision.
            78 => event(
                &id,
                "order.paid",
                json!({ "user": "1", "turns": 2, "then": "1" }),
            ),
            // Changes only with version 3.
            79 => event(
                &id,
                "order.paid",
                json!({ "user": "1", "turns": 3, "then": "nobody" }),
            ),
            _ => event(&id, "order.paid", json!({ "user": "1" })),
        }
    });
    (events.collect(), turned)
}

fn plan(side: &Value) -> Value {
    let routes = side["plan"]
        .as_array()
        .unwrap_or_else(|| panic!("no plan in {side}"));
    routes.iter().map(|route| route["to"].clone()).collect()
}

/// Asserts that exactly these events are reported, with both plans.
fn assert_turned(report: &Value, turned: &BTreeMap<String, String>) {
    assert_eq!(number(report, "different"), turned.len() as u64, "{report}");
    assert_eq!(number(report, "failed"), 0);
    let differences = report["differences"].as_array().expect("a list");
    let reported: BTreeMap<String, (Value, Value)> = differences
        .iter()
        .map(|difference| {
            assert_eq!(
                (&difference["event"]["source"], &difference["event"]["type"]),
                (&json!("/tests"), &json!("order.paid"))
            );
            assert_eq!(difference["role"], "router");
            (
                difference["event"]["id"]
                    .as_str()
                    .expect("an id")
                    .to_owned(),
                (plan(&difference["old"]), plan(&difference["new"])),
            )
        })
        .collect();
    let expected = turned
        .iter()
        .map(|(id, to)| (id.clone(), (json!([["u:1"]]), json!([[format!("u:{to}")]]))));
    assert_eq!(reported, expected.collect());
}

#[test]
fn a_shadow_candidate_reports_exactly_the_events_that_differ_and_has_no_effect() {
    let site = Site::new(Node::builder());
    let begun = ok(site.node.order("PUT", SHADOW, &[], &turning(2)));
    assert_eq!(
        (&begun["hash"], number(&begun, "compared")),
        (&json!(hash(&turning(2))), 0)
    );
    let follower = site.node.follower("1");
    let (events, turned) = thousand("e");
    assert_eq!(turned.len(), 7);
    for batch in events.chunks(100) {
        site.node.publisher().publish(batch);
    }
    let record = follower.wait(SOON, "all events", |record| {
        record.notifications.len() >= events.len()
    });
    let ids: Vec<_> = record
        .notifications
        .iter()
        .map(|told| told.id.clone())
        .collect();
    assert_eq!(
        ids,
        (0..1_000).map(|n| format!("e{n}")).collect::<Vec<_>>(),
        "live events are not affected by the candidate"
    );
    let report = site.compared(1_000);
    // The queue is larger than this, so all are compared.
    assert_eq!(
        (
            number(&report, "compared"),
            number(&report, "skipped"),
            number(&report, "waiting")
        ),
        (1_000, 0, 0)
    );
    assert_eq!(report["generation"], 1);
    assert_turned(&report, &turned);
    let shown = ok(site.node.admin("/v1/plugins/turning"));
    assert_eq!(
        (number(&shown["shadow"], "different"), &shown["generation"]),
        (7, &json!(1))
    );
    let comparisons = |outcome: &str| {
        site.node.metric(&format!(
            "pointsman_plugin_shadow_comparisons_total{{plugin=\"turning\",outcome=\"{outcome}\"}}"
        ))
    };
    assert_eq!(
        (comparisons("same"), comparisons("different")),
        (993.0, 7.0)
    );

    // A dry run is not a live event.
    let trial = serde_json::to_vec(&event("trial", "t", json!({ "user": "1" }))).expect("JSON");
    let trial = site.node.send(
        "POST",
        "/v1/events?dry_run=true",
        &[("Content-Type", "application/cloudevents+json")],
        &trial,
    );
    assert_eq!(trial.status, 200, "{trial:?}");
    site.node.publisher().publish(&[event(
        "last",
        "order.paid",
        json!({ "user": "1", "turns": 2, "then": "9" }),
    )]);
    // Calls are compared in their order.
    let report = eventually(SOON, "the last is compared", || {
        Some(site.report()).filter(|report| number(report, "different") == 8)
    });
    assert_eq!(number(&report, "compared"), 1_001);

    // A page in a browser may not send admin commands.
    assert_eq!(
        site.node
            .order(
                "DELETE",
                SHADOW,
                &[("Origin", "http://127.0.0.1:8080")],
                b""
            )
            .status,
        403
    );
    assert_eq!(site.node.order("DELETE", SHADOW, &[], b"").status, 204);
    assert_eq!(site.node.admin(SHADOW).status, 404);
    assert_eq!(site.node.order("DELETE", SHADOW, &[], b"").status, 404);
}

#[test]
fn a_candidate_that_loops_or_traps_does_not_affect_live_events_and_is_reported() {
    const N: usize = 400;
    let site = Site::new(Node::builder());
    let follower = site.node.follower("1");
    for (round, what) in ["loop", "panic"].into_iter().enumerate() {
        ok(site.node.order("PUT", SHADOW, &[], &turning(2)));
        let began = Instant::now();
        for batch in 0..N / 50 {
            let events: Vec<_> = (0..50)
                .map(|n| {
                    event(
                        &format!("{what}-{}", batch * 50 + n),
                        "t",
                        json!({ "user": "1", "turns": 2, "then": what }),
                    )
                })
                .collect();
            site.node.publisher().publish(&events);
        }
        follower.wait(SOON, "all events", |record| {
            record.notifications.len() >= (round + 1) * N
        });
        // A loop runs for twice the deadline: if live events waited for the candidate, it would
        // take minutes.
        let compared = number(&site.report(), "compared");
        assert!(
            what != "loop" || compared < N as u64 / 10,
            "{compared} in {:?}",
            began.elapsed()
        );
        let report = eventually(SOON, "the candidate failed", || {
            Some(site.report()).filter(|report| number(report, "failed") > 0)
        });
        assert_eq!(
            number(&report, "different"),
            number(&report, "failed"),
            "{report}"
        );
        let difference = &report["differences"][0];
        assert_eq!(plan(&difference["old"]), json!([["u:1"]]));
        assert_eq!(difference["new"]["verdict"], "failed");
        let reason = difference["new"]["reason"].as_str().expect("a reason");
        assert!(
            reason.contains(if what == "loop" {
                "it ran longer than 1000 ms"
            } else {
                "requested by the event"
            }),
            "{reason}"
        );
    }
    // None of this counts as a failure of the active plugin.
    assert_eq!(
        site.node
            .metric("pointsman_plugin_calls_total{plugin=\"turning\",outcome=\"ok\"}"),
        2.0 * N as f64
    );
    assert_eq!(
        site.node.metric("pointsman_plugin_calls_total"),
        2.0 * N as f64
    );
}

#[test]
fn a_candidate_must_be_a_valid_plugin_of_the_same_kind() {
    let site = Site::new(Node::builder());
    let whole = turning(2);
    for (path, bytes, status, expect) in [
        (
            SHADOW,
            &whole[..whole.len() / 2],
            422,
            "is truncated or damaged",
        ),
        (SHADOW, b"<html>", 422, "is not WebAssembly"),
        (
            SHADOW,
            &core_module("unruly"),
            422,
            "is of a different kind",
        ),
        ("/v1/plugins/nobody/shadow", &whole, 404, "nobody"),
    ] {
        let answer = site.node.order("PUT", path, &[], bytes);
        assert!(
            answer.status == status && answer.body.contains(expect),
            "{path}: {answer:?}"
        );
    }
    assert_eq!(site.node.admin(SHADOW).status, 404);
    assert_eq!(
        site.node
            .order("POST", "/v1/plugins/turning/promote", &[], b"")
            .status,
        404
    );
}

#[test]
fn a_promoted_candidate_decides_immediately_and_after_a_restart() {
    let mut site = Site::new(Node::builder().data());
    ok(site.node.order("PUT", SHADOW, &[], &turning(2)));
    let promoted = ok(site
        .node
        .order("POST", "/v1/plugins/turning/promote", &[], b""));
    assert_eq!(
        (&promoted["hash"], &promoted["generation"]),
        (&json!(hash(&turning(2))), &json!(2))
    );
    assert_eq!(
        site.node.admin(SHADOW).status,
        404,
        "the candidate still exists after its promotion"
    );
    assert_eq!(
        fs::read(site.plugins.path().join("turning.wasm")).expect("the plugin's file"),
        turning(2)
    );
    for round in ["before", "after"] {
        let mut stream = site.node.stream("2");
        site.node.publisher().publish(&[event(
            round,
            "t",
            json!({ "user": "1", "turns": 2, "then": "2" }),
        )]);
        assert_eq!(stream.next_notification(SOON).id, round);
        if round == "before" {
            site.node.terminate(SOON);
            site.node.restart();
        }
    }
}

#[test]
fn dry_runs_do_not_affect_the_health_of_plugins() {
    let site = Site::new(Node::builder());
    let failing: Vec<_> = (0..30)
        .map(|n| {
            event(
                &format!("e{n}"),
                "t",
                json!({ "user": "1", "turns": 1, "then": "panic" }),
            )
        })
        .collect();
    let failing = serde_json::to_vec(&failing).expect("JSON");
    let batch = [("Content-Type", "application/cloudevents-batch+json")];
    let tried = ok(site
        .node
        .send("POST", "/v1/events?dry_run=true", &batch, &failing));
    for event in tried["events"].as_array().expect("a list") {
        // An open breaker would have skipped the last events.
        assert!(
            event["reason"]
                .as_str()
                .is_some_and(|reason| reason.contains("requested by the event")),
            "{event}"
        );
    }
    let shown = ok(site.node.admin("/v1/plugins/turning"));
    assert_eq!(
        number(&shown["health"], "consecutive_failures"),
        0,
        "{shown}"
    );
}

#[test]
fn a_candidate_is_shadowed_backtested_and_promoted_from_the_command_line() {
    let site = Site::new(Node::builder());
    let files = Folder::new();
    let file = files.path().join("turning-2.wasm");
    fs::write(&file, turning(2)).expect("write a plugin");
    let file = file.to_str().expect("UTF-8");
    let run = |arguments: &[&str]| {
        command::said(
            command::pointsman(&["plugin"])
                .args(arguments)
                .args(["--url", &site.node.admin_url("")]),
        )
    };
    let output_of = |arguments: &[&str]| {
        let (is_well, said) = run(arguments);
        assert!(is_well, "{arguments:?}: {said}");
        said
    };
    let short = &hash(&turning(2))[..12];
    for wish in [
        &["shadow", "turning"][..],
        &["shadow", "turning", "--stop"],
        &["promote", "turning"],
    ] {
        let (is_well, said) = run(wish);
        assert!(
            !is_well && said.contains("plugin 'turning' has no candidate; start one with: pointsman plugin shadow turning FILE.wasm"),
            "{said}"
        );
    }
    let begun = output_of(&["shadow", "turning", file]);
    assert_eq!(
        begun,
        format!(
            "candidate 0.1.0 ({short}) now shadows turning 0.1.0 (router), without effect; show differences: pointsman plugin shadow turning\n"
        )
    );
    assert!(output_of(&["shadow", "turning"]).contains(
        "no event compared yet (only the node that owns a source compares its events: --url)"
    ));
    let turns = |id: &str, to: &str| {
        event(
            id,
            "order.paid",
            json!({ "user": "1", "turns": 2, "then": to }),
        )
    };
    site.node.publisher().publish(&[
        turns("same", "1"),
        turns("other", "2"),
        event("plain", "order.paid", json!({ "user": "1" })),
    ]);
    site.node.await_outcomes(3, SOON);
    site.compared(3);

    let report = output_of(&["shadow", "turning"]);
    let lines: Vec<&str> = report.lines().collect();
    assert!(
        lines[0].starts_with(&format!(
            "turning: candidate 0.1.0 ({short}), beside generation 1, since 20"
        )),
        "{report}"
    );
    assert_eq!(
        lines[1..5],
        [
            "compared 3, different 1, failed 0, skipped 0, waiting 0",
            "1 x order.paid: u:1 -> u:2",
            "",
            "order.paid other (router)"
        ]
    );
    // The rest of a route, such as its expiry, is the same on both sides.
    let sides: Vec<_> = lines[5..]
        .iter()
        .map(|line| line.split_once(", ").expect("targets, and more"))
        .collect();
    assert_eq!(
        sides.iter().map(|(to, _)| *to).collect::<Vec<_>>(),
        ["  old  routes to u:1", "  new  routes to u:2"]
    );
    assert!(
        sides[0].1 == sides[1].1
            && sides[0].1.starts_with("until 20")
            && sides[0].1.ends_with("priority normal"),
        "{report}"
    );
    let listed = output_of(&["list"]);
    let columns = |line: usize| {
        listed
            .lines()
            .nth(line)
            .expect("a line")
            .split("  ")
            .filter(|cell| !cell.is_empty())
            .map(str::trim)
    };
    assert_eq!(
        columns(0)
            .zip(columns(1))
            .find(|(head, _)| *head == "SHADOW")
            .expect("a column")
            .1,
        format!("0.1.0 ({short}): 1 of 3 differ")
    );
    let whole: Value =
        serde_json::from_str(&output_of(&["shadow", "turning", "--json"])).expect("JSON");
    assert_eq!(number(&whole, "different"), 1);

    let report = output_of(&["backtest", "turning", file, "--limit", "2"]);
    for line in [
        &format!("turning: candidate 0.1.0 ({short}), backtested on 2 decided events"),
        "compared 2, different 1, failed 0",
        "order.paid other (router)\n  old  routes to u:1, ",
        "\n  new  routes to u:2, ",
        "pointsman:events: decisions since 20",
    ] {
        assert!(report.contains(line), "{line} is not in {report}");
    }
    let (is_well, refused) = run(&["backtest", "turning", file, "--limit", "0"]);
    assert!(
        !is_well && refused.contains("limit is 0; use 1 to 10000"),
        "{refused}"
    );

    assert_eq!(
        output_of(&["shadow", "turning", "--stop"]),
        format!("candidate 0.1.0 ({short}) of turning 0.1.0 (router) stopped: 1 of 3 differ\n")
    );
    output_of(&["shadow", "turning", file]);
    let promoted = output_of(&["promote", "turning"]);
    assert_eq!(
        promoted,
        "promoted turning 0.1.0 (router): generation 2, on probation for 1m, replacing generation 1\n"
    );
    assert_eq!(
        site.node.admin(SHADOW).status,
        404,
        "the candidate still exists after its promotion"
    );
}

fn backtest_of_past_events(builder: Builder) {
    let site = Site::new(builder);
    let backtest = |limit: usize, bytes: &[u8]| {
        site.node.order(
            "POST",
            &format!("/v1/plugins/turning/backtest?limit={limit}"),
            &[],
            bytes,
        )
    };
    let (events, turned) = thousand("p");
    let follower = site.node.follower("1");
    for batch in events.chunks(100) {
        site.node.publisher().publish(batch);
    }
    follower.wait(SOON, "all events", |record| {
        record.notifications.len() >= events.len()
    });
    // Neither can be compared fully: one is a duplicate, the other has no route.
    site.node.publisher().publish(&[
        event("p1", "order.paid", json!({ "user": "1" })),
        event("nobody", "t", json!({})),
    ]);
    site.node.await_outcomes(1_002, SOON);

    let report = ok(backtest(1_002, &turning(2)));
    assert_eq!(
        (number(&report, "found"), number(&report, "compared")),
        (1_002, 1_001),
        "{report}"
    );
    assert_eq!(
        report["not_compared"],
        json!({ "its plan is unknown: it was not committed, or its record was trimmed": 1 })
    );
    assert_turned(&report, &turned);
    let [reach] = report["reach"].as_array().expect("a list").as_slice() else {
        panic!("{report}")
    };
    assert!(
        reach["oldest_entry"]
            .as_str()
            .is_some_and(|entry| reach["oldest_decision"] == entry),
        "{reach}"
    );
    assert_eq!(reach["source"], "pointsman:events");

    // The version that decided them makes the same decisions again.
    let report = ok(backtest(10_000, &turning(1)));
    assert_eq!(
        (number(&report, "compared"), number(&report, "different")),
        (1_001, 0),
        "{report}"
    );
    assert_eq!(report["reach"][0]["is_every_decision"], true);
    // Only the newest 900: the first hundred are not among them.
    let report = ok(backtest(900, &turning(2)));
    assert_eq!(
        (number(&report, "found"), number(&report, "different")),
        (
            900,
            turned.keys().filter(|id| id.as_str() != "p77").count() as u64
        )
    );
    // Refused before the body is read.
    assert_eq!(backtest(0, b"").status, 400);
    assert_eq!(backtest(10_001, b"").status, 400);
    assert_eq!(backtest(10, b"<html>").status, 422);
    // The backtests had no effect.
    assert_eq!(site.node.metric("pointsman_plugin_calls_total"), 1_002.0);
    assert_eq!(site.node.metric("pointsman_events_total"), 1_002.0);
}

#[test]
fn a_backtest_on_the_embedded_broker_compares_with_the_recorded_decisions() {
    backtest_of_past_events(Node::builder());
}

#[test]
fn a_backtest_on_redis_compares_with_the_recorded_decisions() {
    let server = RedisServer::start();
    backtest_of_past_events(Node::builder().redis(server.url()));
}

#[test]
fn random_numbers_are_the_same_in_a_candidate_a_backtest_and_on_another_node() {
    const N: usize = 5;
    const PATH: &str = "/v1/plugins/unruly";
    let file = wasi_component("unruly");
    let plugins = Folder::new();
    fs::write(plugins.path().join("unruly.wasm"), &file).expect("write a plugin");
    // Each event gets a fresh instance, for which the guest's standard library draws a number.
    let start = || {
        Node::builder()
            .config("[plugins.unruly]\ndeadline = '10s'\nmemory_mib = 64\ncalls_per_instance = 1\n")
            .plugins(plugins.path())
            .start()
    };
    let numbers = |node: &Node| -> Vec<String> {
        let mut stream = node.stream("42");
        let events: Vec<_> = (0..N)
            .map(|n| event(&format!("e{n}"), "random", json!({})))
            .collect();
        node.publisher().publish(&events);
        (0..N)
            .map(|_| stream.next_notification(SOON).data["number"].to_string())
            .collect()
    };
    let node = start();
    let report = ok(node.order("PUT", &format!("{PATH}/shadow"), &[], &file));
    assert_eq!(number(&report, "compared"), 0);
    let of_node = numbers(&node);
    let different: BTreeSet<_> = of_node.iter().collect();
    assert_eq!(
        different.len(),
        N,
        "events get different numbers: {of_node:?}"
    );
    // Once as a filter and once as a router.
    let report = eventually(SOON, "all are compared", || {
        let report = ok(node.admin(&format!("{PATH}/shadow")));
        (number(&report, "compared") == 2 * N as u64).then_some(report)
    });
    assert_eq!(number(&report, "different"), 0, "{report}");
    let report = ok(node.order("POST", &format!("{PATH}/backtest?limit=100"), &[], &file));
    assert_eq!(
        (number(&report, "compared"), number(&report, "different")),
        (N as u64, 0),
        "{report}"
    );
    assert_eq!(numbers(&start()), of_node);
}
