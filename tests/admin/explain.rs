//! `GET /v1/explain` and `pointsman explain`: why an event did or did not reach a user, for events
//! that went through a real node.

use std::fs;

use serde_json::{Value, json};

use crate::harness::command::{output_of, pointsman, said};
use crate::harness::guests::core_module;
use crate::harness::http::{self, Answer};
use crate::harness::node::{Builder, Folder, Node, SOON};
use crate::harness::plugins::{Plugins, hash};
use crate::harness::publish::event;
use crate::harness::redis::RedisServer;
use crate::harness::sse::Request;
use crate::harness::{eventually, every_bundled_plugin};

const KEY: &str = "the key of these tests";

/// A filter, and rules with two routes for one event type: one with a condition, one to a group.
const CONFIG: &str = r#"
[plugins.prioritize]
enabled = false
[[plugins.discard.config.rules]]
match.type = "noise"
reason = "nobody wants noise."
[[plugins.rules.config.rules]]
match.type = "promotion"
to.everyone = true
when = { plan = "pro" }
priority = "high"
collapse = "promotion"
[[plugins.rules.config.rules]]
match.type = "promotion"
to.group = "ops"
"#;

fn builder() -> Builder {
    Node::builder()
        .plugins(every_bundled_plugin())
        .config(CONFIG)
}

fn ask(node: &Node, query: &str) -> Answer {
    node.admin(&format!("/v1/explain?{query}"))
}

fn encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

/// The explanation for a user, once the event is decided.
fn explained(node: &Node, event_id: &str, user: &str) -> Value {
    eventually(SOON, "the event is decided", || {
        let answer = ask(
            node,
            &format!("event_id={}&user={}", encoded(event_id), encoded(user)),
        );
        assert!([200, 404].contains(&answer.status), "{answer:?}");
        (answer.status == 200).then(|| answer.json())
    })
}

fn concludes(node: &Node, event_id: &str, user: &str, conclusion: &str) -> Value {
    let explanation = explained(node, event_id, user);
    assert_eq!(explanation["conclusion"], conclusion, "{explanation:#}");
    explanation
}

fn publish(node: &Node, id: &str, kind: &str, more: Value) {
    node.publisher().publish(&[event(id, kind, more)]);
}

fn set_attributes(node: &Node, user: &str, attributes: &Value) {
    let path = format!("/v1/users/{user}/attributes");
    assert_eq!(
        node.send("PUT", &path, &[], attributes.to_string().as_bytes())
            .status,
        204
    );
}

fn leave(node: &Node, group: &str, user: &str) {
    assert_eq!(
        node.request("DELETE", &format!("/v1/groups/{group}/members/{user}"))
            .status,
        204
    );
}

#[test]
fn each_route_reports_why_it_does_or_does_not_match_the_user() {
    let node = builder().start();
    publish(
        &node,
        "direct",
        "t",
        json!({ "users": ["ann", "bob"], "priority": "urgent" }),
    );
    let explanation = concludes(
        &node,
        "direct",
        "ann",
        "The event is for `ann` (route of `address` to `u:ann`): it is in the log; whether a client received it is unknown, because the user has no devices.",
    );
    assert_eq!(explanation["decision"]["outcome"], "committed");
    assert_eq!(
        explanation["decision"]["verdicts"].as_array().map(Vec::len),
        Some(3)
    );
    assert_eq!(
        explanation["plan"],
        json!([{ "by": "address", "to": ["u:ann", "u:bob"], "priority": "urgent" }])
    );
    let recipient = &explanation["recipient"];
    assert_eq!(
        recipient["routes"],
        json!([{ "target": "u:ann", "reason": "names `ann`" }])
    );
    assert_eq!(
        (&recipient["won"], &recipient["wins"], &recipient["in_log"]),
        (&json!(0), &json!(0), &json!(true))
    );
    assert_eq!(
        (
            &recipient["devices"],
            &recipient["read"],
            &recipient["streams"]["open"]
        ),
        (&json!([]), &json!(false), &json!(0))
    );
    assert!(
        recipient["not_known"]
            .as_array()
            .is_some_and(|all| all.len() == 3),
        "{recipient}"
    );

    // No target names the user.
    publish(&node, "others", "t", json!({ "user": "bob" }));
    let explanation = concludes(
        &node,
        "others",
        "ann",
        "`ann` was not reached: the only route names another user, `bob`.",
    );
    assert_eq!(explanation["recipient"]["routes"][0]["miss"], "target");
    assert_eq!(
        (
            &explanation["recipient"]["won"],
            &explanation["recipient"]["in_log"]
        ),
        (&Value::Null, &Value::Null)
    );
    publish(
        &node,
        "many",
        "t",
        json!({ "users": ["b", "c", "d"], "groups": ["ops", "dev"] }),
    );
    concludes(
        &node,
        "many",
        "ann",
        "`ann` was not reached: the only route names groups `ops`, `dev`, but `ann` is not a member of any. This assumes that no token claimed the group.",
    );

    // A condition is false; of two routes, the one closest to matching is reported.
    publish(&node, "for pros", "promotion", json!({}));
    let holds = "This assumes that the attributes have not changed since and that no token claimed the group.";
    let nearest = "`ann` was not reached: none of the 2 routes matches; the closest, of `rules`, has a condition that is false for `ann`: attribute";
    let id = "for pros";
    concludes(
        &node,
        id,
        "ann",
        &format!("{nearest} `plan` is absent but must be \"pro\". {holds}"),
    );
    set_attributes(&node, "ann", &json!({ "plan": "free" }));
    let explanation = concludes(
        &node,
        id,
        "ann",
        &format!("{nearest} `plan` is \"free\" but must be \"pro\". {holds}"),
    );
    assert_eq!(explanation["recipient"]["routes"][0]["miss"], "condition");
    assert_eq!(
        explanation["recipient"]["routes"][1]["reason"],
        "names group `ops`, of which `ann` is not a member"
    );
    assert_eq!(
        explanation["plan"][0]["when"],
        json!([[{ "attribute": "plan", "operator": "equals", "values": ["pro"] }]])
    );
    set_attributes(&node, "ann", &json!({ "plan": 3 }));
    concludes(
        &node,
        id,
        "ann",
        &format!("{nearest} `plan` is 3 (number) but must be \"pro\" (text). {holds}"),
    );
    set_attributes(&node, "ann", &json!({ "plan": "pro" }));
    let explanation = explained(&node, id, "ann");
    assert_eq!(
        (
            &explanation["recipient"]["won"],
            &explanation["recipient"]["routes"][0]["target"]
        ),
        (&json!(0), &json!("all"))
    );

    // Without a user, the response has only the decision and the plan.
    let answer = ask(&node, "event_id=direct").json();
    assert_eq!(
        answer["conclusion"],
        "The event was committed; its plan names `u:ann`, `u:bob`. Specify a user to see whether it reached them."
    );
    assert!(
        answer["plan"].is_array() && answer["recipient"].is_null(),
        "{answer}"
    );
}

#[test]
fn a_membership_outside_the_time_of_the_event_is_reported() {
    let server = RedisServer::start();
    for node in [builder().start(), builder().redis(server.url()).start()] {
        let tell = |id: &str| {
            publish(&node, id, "t", json!({ "group": "ops" }));
            explained(&node, id, "bob");
        };
        tell("stranger");
        concludes(
            &node,
            "stranger",
            "bob",
            "`bob` was not reached: the only route names group `ops`, of which `bob` is not a member. This assumes that no token claimed the group.",
        );
        node.join("ops", "bob");
        tell("member");
        leave(&node, "ops", "bob");
        tell("too late");
        let explanation = concludes(
            &node,
            "stranger",
            "bob",
            "`bob` was not reached: the only route names group `ops`, which `bob` joined after the event. This assumes that no token claimed the group and that this membership was the first.",
        );
        // The reason includes the ids behind it.
        let reason = explanation["recipient"]["routes"][0]["reason"]
            .as_str()
            .unwrap();
        let id = &explanation["decision"]["notification"];
        assert!(
            reason.contains(&format!(
                "the event was committed as {id}, the membership begins after "
            )),
            "{reason}"
        );
        let explanation = explained(&node, "member", "bob");
        assert_eq!(
            explanation["recipient"]["routes"][0]["reason"],
            "names group `ops`, of which `bob` was a member at that time"
        );
        let member = explanation["decision"]["notification"].to_string();
        let explanation = concludes(
            &node,
            "too late",
            "bob",
            "`bob` was not reached: the only route names group `ops`, which `bob` left before the event. This assumes that no token claimed the group.",
        );
        let reason = explanation["recipient"]["routes"][0]["reason"]
            .as_str()
            .unwrap();
        assert!(
            reason.contains(&format!("the membership ended at {member}")),
            "{reason}"
        );
        // Only the latest period of membership is known, although the event was delivered in the
        // earlier one.
        node.join("ops", "bob");
        concludes(
            &node,
            "member",
            "bob",
            "`bob` was not reached: the only route names group `ops`, which `bob` joined after the event. This assumes that no token claimed the group and that this membership was the first.",
        );
    }
}

#[test]
fn expired_and_superseded_events_are_reported_as_such() {
    let server = RedisServer::start();
    for node in [builder().start(), builder().redis(server.url()).start()] {
        publish(
            &node,
            "short",
            "t",
            json!({ "user": "ann", "ttl": "700ms" }),
        );
        let explanation = eventually(SOON, "the event expires", || {
            let explanation = explained(&node, "short", "ann");
            explanation["recipient"]["wins"]
                .is_null()
                .then_some(explanation)
        });
        let conclusion = explanation["conclusion"].as_str().unwrap();
        assert!(
            conclusion.starts_with(
                "The event was for `ann` (route of `address` to `u:ann`), but expired at 20"
            ) && conclusion.ends_with("Z: clients that had not received it by then do not get it."),
            "{conclusion}"
        );
        assert_eq!(
            (
                &explanation["recipient"]["won"],
                &explanation["recipient"]["routes"][0]["miss"]
            ),
            (&json!(0), &json!("expired"))
        );

        publish(
            &node,
            "state 1",
            "t",
            json!({ "user": "ann", "collapse": "cart" }),
        );
        publish(
            &node,
            "beside",
            "t",
            json!({ "user": "ann", "collapse": "another" }),
        );
        publish(
            &node,
            "bob's",
            "t",
            json!({ "user": "bob", "collapse": "cart" }),
        );
        let still = concludes_so(&explained(&node, "state 1", "ann"));
        assert!(still.starts_with("The event is for `ann`"), "{still}");
        publish(
            &node,
            "state 2",
            "t",
            json!({ "everyone": true, "collapse": "cart" }),
        );
        publish(
            &node,
            "state 3",
            "t",
            json!({ "user": "ann", "collapse": "cart" }),
        );
        explained(&node, "state 3", "ann");
        let explanation = concludes(
            &node,
            "state 1",
            "ann",
            "The event was for `ann` (route of `address` to `u:ann`), but the later event `state 2` replaced it (collapse key `cart`): clients that had not received it by then get only the later one.",
        );
        assert_eq!(
            explanation["recipient"]["superseded_by"]["event_id"],
            "state 2"
        );

        // After the later event has expired, clients that received neither get the earlier one, as
        // `/v1/notifications` shows.
        publish(
            &node,
            "long",
            "t",
            json!({ "user": "ann", "collapse": "door" }),
        );
        publish(
            &node,
            "brief",
            "t",
            json!({ "user": "ann", "collapse": "door", "ttl": "700ms" }),
        );
        eventually(SOON, "the event expires", || {
            explained(&node, "brief", "ann")["recipient"]["wins"]
                .is_null()
                .then_some(())
        });
        let kept = node
            .send("GET", "/v1/notifications?user=ann&limit=100", &[], b"")
            .body;
        assert!(
            kept.contains("\"long\"") && !kept.contains("\"brief\""),
            "{kept}"
        );
        let explanation = concludes(
            &node,
            "long",
            "ann",
            "The event is for `ann` (route of `address` to `u:ann`), but the later event `brief` replaced it until that expired (collapse key `door`): clients that received the later one do not get this one, clients that received neither do.",
        );
        assert_eq!(explanation["recipient"]["superseded_by"]["expired"], true);
        // The next event with the key that has not expired does supersede it.
        publish(
            &node,
            "newest",
            "t",
            json!({ "user": "ann", "collapse": "door" }),
        );
        explained(&node, "newest", "ann");
        assert_eq!(
            explained(&node, "long", "ann")["recipient"]["superseded_by"]["event_id"],
            "newest"
        );
    }
}

fn concludes_so(explanation: &Value) -> String {
    explanation["conclusion"]
        .as_str()
        .expect("a conclusion")
        .to_owned()
}

#[test]
fn an_undelivered_event_reports_the_responsible_plugin_and_the_next_step() {
    let node = builder().start();
    let user = json!({ "user": "ann" });
    publish(&node, "dropped", "noise", user.clone());
    let explanation = concludes(
        &node,
        "dropped",
        "ann",
        "Not delivered: the filter `discard` dropped the event: nobody wants noise.",
    );
    assert!(
        explanation["plan"].is_null() && explanation["recipient"].is_null(),
        "{explanation}"
    );
    publish(&node, "unaddressed", "t", json!({}));
    concludes(
        &node,
        "unaddressed",
        "ann",
        "Not delivered: the only router that answered, `address`, returned no recipients.",
    );

    publish(
        &node,
        "broken",
        "t",
        json!({ "user": "ann", "ttl": "soon" }),
    );
    let explanation = explained(&node, "broken", "ann");
    let id = explanation["dead_letter"]
        .as_str()
        .expect("the id of the dead letter");
    let reason = explanation["decision"]["reason"]
        .as_str()
        .expect("a reason");
    assert!(reason.contains("ttl"), "{reason}");
    assert_eq!(
        explanation["conclusion"],
        format!(
            "Not delivered: `address` rejected the event: {}. It is a dead letter: fix the cause, then run `pointsman dead-letters redrive {id}`.",
            reason.trim_end_matches('.')
        )
    );
    // The redriven entry is the same event.
    assert_eq!(
        node.request("POST", &format!("/v1/dead-letters/{id}/redrive"))
            .status,
        204
    );
    let again = eventually(SOON, "the event is processed again", || {
        let again = explained(&node, "broken", "ann");
        (again["other_decisions"]
            .as_array()
            .is_some_and(|all| all.len() == 1))
        .then_some(again)
    });
    let id = again["dead_letter"].as_str().expect("another dead letter");
    assert_eq!(
        node.request("DELETE", &format!("/v1/dead-letters/{id}"))
            .status,
        204
    );
    let gone = concludes_so(&explained(&node, "broken", "ann"));
    assert!(
        gone.ends_with(". It is no longer a dead letter: it was redriven, dropped or trimmed."),
        "{gone}"
    );

    // The original decision is explained even if the publisher has retried many times.
    publish(&node, "again and again", "t", user.clone());
    let retry = event("again and again", "t", user);
    node.publisher().publish(&vec![retry; 20]);
    let explanation = eventually(SOON, "all events are decided", || {
        let explanation = explained(&node, "again and again", "ann");
        (explanation["other_decisions"]
            .as_array()
            .is_some_and(|all| all.len() == 10))
        .then_some(explanation)
    });
    assert_eq!(
        (
            &explanation["decision"]["outcome"],
            &explanation["other_decisions"][0]["outcome"]
        ),
        (&json!("committed"), &json!("duplicate"))
    );
}

/// A stream evaluates a plan when it reaches it; the explanation has to do the same.
#[test]
fn after_the_winning_route_expires_the_next_matching_route_is_explained() {
    let rules = r#"
[[plugins.rules.config.rules]]
match.type = "twice"
to.user = "ann"
priority = "high"
ttl = "700ms"
collapse = "lift"
[[plugins.rules.config.rules]]
match.type = "twice"
to.group = "ops"
"#;
    let node = builder().config(&format!("{CONFIG}{rules}")).start();
    node.join("ops", "ann");
    publish(&node, "two", "twice", json!({}));
    publish(
        &node,
        "later",
        "t",
        json!({ "user": "ann", "collapse": "lift" }),
    );
    explained(&node, "later", "ann");
    let of_two = || explained(&node, "two", "ann");
    let explanation = eventually(SOON, "the first route expires", || {
        (of_two()["recipient"]["wins"] == 1).then(of_two)
    });
    let kept = node
        .send("GET", "/v1/notifications?user=ann&limit=100", &[], b"")
        .body;
    assert!(
        kept.contains("\"two\"") && kept.contains("\"later\""),
        "{kept}"
    );
    assert_eq!(
        (
            &explanation["recipient"]["won"],
            &explanation["recipient"]["superseded_by"]
        ),
        (&json!(0), &Value::Null)
    );
    let conclusion = explanation["conclusion"].as_str().expect("a conclusion");
    assert!(
        conclusion
            .starts_with("The event is for `ann` (route of `rules` to `g:ops`): it is in the log"),
        "{conclusion}"
    );
}

/// An operator need not know which node decided an event, or whether that node is still running.
#[test]
fn every_node_explains_events_that_another_node_decided_even_one_that_is_dead() {
    let server = RedisServer::start();
    let mut first = builder().redis(server.url()).start();
    let second = builder().redis(server.url()).start();
    let mut elsewhere = second.stream("ann");
    let mut ids = Vec::new();
    // Either node may decide the first ten events; after the first node is killed, the second
    // decides.
    for n in 0..20 {
        if n == 10 {
            first.kill();
        }
        ids.push(format!("e{n}"));
        second
            .publisher()
            .publish(&[event(&ids[n], "t", json!({ "user": "ann" }))]);
        assert_eq!(elsewhere.next_notification(SOON).id, ids[n]);
    }
    first.restart();
    for id in &ids {
        let of = |node: &Node| explained(node, id, "ann");
        let (mut one, mut other) = (of(&first), of(&second));
        let streams = |explanation: &mut Value| explanation["recipient"]["streams"].take();
        assert_eq!(
            streams(&mut one),
            json!({ "open": 0, "past": 0 }),
            "a stream is visible only on its own node"
        );
        assert_eq!(streams(&mut other), json!({ "open": 1, "past": 1 }));
        assert_eq!(one, other);
    }
}

/// The broker does not count dead letters as duplicates, so a publisher's retry can become a dead
/// letter after the event was delivered.
#[test]
fn a_dead_lettered_retry_does_not_hide_an_earlier_delivery() {
    let server = RedisServer::start();
    for node in [builder().start(), builder().redis(server.url()).start()] {
        publish(&node, "a", "t", json!({ "user": "ann" }));
        explained(&node, "a", "ann");
        publish(&node, "a", "t", json!({ "user": "ann", "ttl": "soon" }));
        let explanation = eventually(SOON, "both entries are decided", || {
            let explanation = explained(&node, "a", "ann");
            explanation["other_decisions"]
                .is_array()
                .then_some(explanation)
        });
        let conclusion = explanation["conclusion"].as_str().expect("a conclusion");
        assert!(
            conclusion.starts_with("The event is for `ann` (route of"),
            "{conclusion}"
        );
        assert_eq!(
            explanation["other_decisions"][0]["outcome"],
            "dead-lettered"
        );
    }
}

#[test]
fn a_dead_letter_behind_many_others_is_found_or_reported_as_one_of_many() {
    let server = RedisServer::start();
    // Events wait for a plugin without a file until all are published: otherwise the last entry may be
    // newer than most of the dead letters.
    let waiting = || {
        let config = format!("{CONFIG}[plugins.absent]\n");
        builder().config(&config).may_be_unready()
    };
    for node in [waiting().start(), waiting().redis(server.url()).start()] {
        let broken = |id: &str| event(id, "t", json!({ "user": "ann", "ttl": "soon" }));
        let many: Vec<Value> = (0..1_100).map(|n| broken(&n.to_string())).collect();
        node.publisher().publish(&many);
        node.reconfigure(CONFIG);
        let conclusion = concludes_so(&explained(&node, "1099", "ann"));
        assert!(
            conclusion.ends_with("then find it by its entry in `pointsman dead-letters list`."),
            "{conclusion}"
        );
        node.publisher().publish(&[broken("another")]);
        let explanation = explained(&node, "another", "ann");
        assert!(explanation["dead_letter"].is_string(), "{explanation:#}");
    }
}

/// Bounds the time of an explanation.
#[test]
fn a_superseding_event_is_searched_among_the_next_thousand_notifications() {
    let node = builder().start();
    let state = |id: &str| publish(&node, id, "t", json!({ "user": "ann", "collapse": "cart" }));
    let many = |n: usize| {
        (0..n)
            .map(|n| event(&format!("{n}"), "t", json!({ "everyone": true })))
            .collect::<Vec<_>>()
    };
    state("first");
    node.publisher().publish(&many(999));
    state("second");
    explained(&node, "second", "ann");
    let recipient = |id: &str| explained(&node, id, "ann")["recipient"].clone();
    let is_told = |recipient: &Value| {
        recipient["not_known"]
            .to_string()
            .contains("Only the next 1,000 notifications were searched")
    };
    let first = recipient("first");
    assert!(
        first["superseded_by"]["event_id"] == "second" && !is_told(&first),
        "{first}"
    );
    node.publisher().publish(&many(1_999)[999..]);
    state("third");
    explained(&node, "third", "ann");
    let second = recipient("second");
    assert!(
        second["superseded_by"].is_null() && is_told(&second),
        "{second}"
    );
}

#[test]
fn an_invalid_event_is_explained_by_its_entry_id_and_by_its_event_id() {
    let server = RedisServer::start();
    let node = builder().redis(server.url()).start();
    let entry: String = server.command("XADD pointsman:events * user ann");
    let explanation = explained(&node, &entry, "ann");
    assert_eq!(explanation["decision"]["entry"], entry.as_str());
    let conclusion = concludes_so(&explanation);
    let expect = "Not delivered: the event became a dead letter: type is missing";
    assert!(conclusion.starts_with(expect), "{conclusion}");
    for (id, fields) in [
        ("flat", "id flat user ann"),
        ("whole", r#"event {"id":"whole","time":7}"#),
    ] {
        let _: String = server.command(&format!("XADD pointsman:events * {fields}"));
        let explanation = explained(&node, id, "ann");
        assert_eq!(
            (
                &explanation["decision"]["event_id"],
                &explanation["decision"]["outcome"]
            ),
            (&json!(id), &json!("dead-lettered"))
        );
    }
    // It does not hide the decision about an earlier event with the same id.
    publish(
        &node,
        "sound",
        "t",
        json!({ "source": "/s", "user": "ann" }),
    );
    explained(&node, "sound", "ann");
    let _: String = server.command("XADD pointsman:events * id sound source /s user ann");
    let explanation = eventually(SOON, "both entries are decided", || {
        let explanation = explained(&node, "sound", "ann");
        explanation["other_decisions"]
            .is_array()
            .then_some(explanation)
    });
    assert_eq!(explanation["decision"]["outcome"], "committed");
}

#[test]
fn device_positions_read_marker_and_a_trimmed_log_are_reported() {
    let server = RedisServer::start();
    let config = format!("[retention]\nlog_entries = 2\n{CONFIG}");
    for node in [
        builder().config(&config).start(),
        builder().config(&config).redis(server.url()).start(),
    ] {
        let open = |device: &str| {
            let mut stream = Request::new(node.addr(), &format!("user=ann&device={device}"))
                .open(SOON)
                .expect("open a stream");
            stream.next_state("cursor", SOON);
            stream
        };
        drop(open("tablet"));
        let mut phone = open("phone");
        publish(&node, "a", "t", json!({ "user": "ann" }));
        assert_eq!(phone.next_notification(SOON).id, "a");
        drop(open("watch"));
        let by = "(route of `address` to `u:ann`)";
        let explanation = concludes(
            &node,
            "a",
            "ann",
            &format!(
                "The event is for `ann` {by}: it is in the log; no device has acknowledged it."
            ),
        );
        let devices = |explanation: &Value| explanation["recipient"]["devices"].clone();
        let at = |phone: &str| json!([{ "device": "phone", "at": phone }, { "device": "tablet", "at": "before" }, { "device": "watch", "at": "began-after" }]);
        assert_eq!(devices(&explanation), at("before"));
        let streams = eventually(SOON, "the other streams are closed", || {
            let streams = explained(&node, "a", "ann")["recipient"]["streams"].clone();
            (streams["open"] == 1).then_some(streams)
        });
        assert_eq!(streams, json!({ "open": 1, "past": 1 }));

        let acknowledge = |told: Value| {
            let answer = node.send(
                "POST",
                "/v1/acks?user=ann",
                &[("content-type", "application/json")],
                told.to_string().as_bytes(),
            );
            assert_eq!(answer.status, 204, "{answer:?}");
        };
        acknowledge(json!({ "id": phone.last_event_id(), "read": true }));
        let explanation = concludes(
            &node,
            "a",
            "ann",
            &format!("The event is for `ann` {by}: it or a later one was marked as read."),
        );
        assert_eq!(explanation["recipient"]["read"], true);
        acknowledge(json!({ "id": phone.last_event_id(), "device": "phone" }));
        let explanation = concludes(
            &node,
            "a",
            "ann",
            &format!(
                "The event is for `ann` {by}: device `phone` has acknowledged it or a later one."
            ),
        );
        assert_eq!(devices(&explanation), at("acknowledged"));

        // A device that started after the event and acknowledged a later one never received it, but
        // looks the same as one that did.
        let mut late = open("late");
        publish(&node, "0", "t", json!({ "user": "ann" }));
        assert_eq!(late.next_notification(SOON).id, "0");
        acknowledge(json!({ "id": late.last_event_id(), "device": "late" }));
        concludes(
            &node,
            "a",
            "ann",
            &format!(
                "The event is for `ann` {by}: devices `late`, `phone` have acknowledged it or a later one."
            ),
        );

        for id in ["b", "c", "d"] {
            publish(&node, id, "t", json!({ "user": "ann" }));
        }
        explained(&node, "d", "ann");
        assert_eq!(explained(&node, "a", "ann")["recipient"]["in_log"], false);
        let explanation = concludes(
            &node,
            "b",
            "ann",
            &format!(
                "The event was for `ann` {by}, but retention has removed it from the log: clients that had not received it by then get a gap."
            ),
        );
        assert_eq!(explanation["recipient"]["in_log"], false);
    }
}

#[test]
fn undecided_and_unknown_events_are_errors_with_a_fix() {
    let node = builder().start();
    publish(&node, "a", "t", json!({ "user": "ann" }));
    explained(&node, "a", "ann");
    let answer = ask(&node, "event_id=b&user=ann");
    let body = answer.json();
    assert_eq!(
        (answer.status, &body["error"]),
        (404, &json!("no decision found for event 'b'"))
    );
    let fix = body["fix"].as_str().expect("a fix");
    assert!(
        fix.contains("pointsman:events back to 20") && fix.contains("retention.decision_entries"),
        "{fix}"
    );

    // Without plugins, no event is decided.
    let empty = Folder::new();
    let mut waiting = Node::builder()
        .plugins(empty.path())
        .may_be_unready()
        .start();
    eventually(SOON, "the node accepts events", || {
        waiting
            .publisher()
            .try_publish(&[event("first", "t", json!({}))])
            .ok()
            .filter(|answer| answer.status == 200)
    });
    publish(&waiting, "second", "t", json!({ "user": "ann" }));
    let answer = ask(&waiting, "event_id=second");
    let body = answer.json();
    let error = body["error"].as_str().unwrap_or_default();
    assert!(
        answer.status == 404
            && error.starts_with("event 'second' is not decided yet: its entry 1")
            && error.ends_with(" is waiting in pointsman:events, behind 1 other"),
        "{answer:?}"
    );
    assert!(
        body["fix"]
            .as_str()
            .is_some_and(|fix| fix.contains("/readyz")),
        "{body}"
    );
    // If more entries are waiting than are searched, the event may be one of them.
    let many: Vec<Value> = (0..10_100)
        .map(|n| event(&n.to_string(), "t", json!({})))
        .collect();
    many.chunks(5_050)
        .for_each(|batch| waiting.publisher().publish(batch));
    publish(&waiting, "last", "t", json!({}));
    let body = ask(&waiting, "event_id=last").json();
    let fix = body["fix"].as_str().unwrap_or_default();
    assert!(
        fix.contains("pointsman:events: none (the event may still be waiting there, behind 1")
            && fix.contains("that were searched"),
        "{body}"
    );
    waiting.kill();
}

#[test]
fn every_query_is_explained_or_rejected_with_the_reason() {
    let node = builder().start();
    let odd = "\u{1F4E6} \"it's\" <b>&amp;\\ %41+?#{}[]|";
    publish(&node, odd, "t", json!({ "user": odd }));
    let explanation = explained(&node, odd, odd);
    assert_eq!(
        (
            &explanation["decision"]["event_id"],
            &explanation["recipient"]["won"]
        ),
        (&json!(odd), &json!(0))
    );
    let long = "x".repeat(10_000);
    for (query, expect) in [
        (String::new(), "missing field `event_id`"),
        ("event_id=".to_owned(), "event_id: is empty"),
        (
            format!("event_id={long}"),
            "event_id: has 10000 bytes; the limit is 256",
        ),
        (
            "event_id=a%0Ab".to_owned(),
            "event_id: contains the control character U+000A",
        ),
        (format!("event_id=a&user={long}"), "user: has 10000 bytes"),
        ("event_id=a&user=".to_owned(), "user: is empty"),
        (
            "event_id=a&usr=ann".to_owned(),
            "unknown field `usr`, expected `event_id` or `user`",
        ),
        (
            "event_id=a&event_id=b".to_owned(),
            "duplicate field `event_id`",
        ),
        ("event_id=%FF".to_owned(), "no decision found"),
    ] {
        let answer = ask(&node, &query);
        let error = answer.json()["error"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        assert!(
            [400, 404].contains(&answer.status) && error.contains(expect),
            "{query}: {answer:?}"
        );
    }
    assert!(!node.log().contains("panicked"), "{}", node.log());
}

#[test]
fn an_explanation_requires_the_api_key() {
    let config = format!(
        "[auth]\njwt_secret = \"the secret of these tests, longer than 32 bytes\"\napi_key = \"{KEY}\"\n{CONFIG}"
    );
    let node = builder().production().config(&config).start();
    let bearer = format!("Bearer {KEY}");
    let batch = json!([event("a", "t", json!({ "user": "ann" }))]).to_string();
    let headers = [
        ("Content-Type", "application/cloudevents-batch+json"),
        ("Authorization", &bearer),
    ];
    assert_eq!(
        node.send("POST", "/v1/events", &headers, batch.as_bytes())
            .status,
        200
    );
    let asked = |headers: &[(&str, &str)]| {
        http::send(
            "GET",
            &node.admin_url("/v1/explain?event_id=a&user=ann"),
            headers,
            None,
        )
        .expect("a response")
    };
    eventually(SOON, "the event is decided", || {
        (asked(&[("Authorization", &bearer)]).status == 200).then_some(())
    });
    for headers in [&[][..], &[("Authorization", "Bearer wrong")]] {
        let refused = asked(headers);
        assert!(
            refused.status == 401 && !refused.body.contains("ann"),
            "{refused:?}"
        );
    }
    let url = format!("http://{}", node.admin_addr());
    let (is_well, refusal) = said(&mut pointsman(&[
        "explain", "a", "--user", "ann", "--url", &url,
    ]));
    assert!(
        !is_well && refusal.contains("pass --api-key or set POINTSMAN_API_KEY"),
        "{refusal}"
    );
    output_of(&mut pointsman(&[
        "explain",
        "a",
        "--user",
        "ann",
        "--url",
        &url,
        "--api-key",
        KEY,
    ]));
}

#[test]
fn the_command_prints_the_conclusion_and_then_one_fact_per_line() {
    let node = builder().start();
    let url = format!("http://{}", node.admin_addr());
    publish(&node, "for pros", "promotion", json!({}));
    explained(&node, "for pros", "bob");
    node.join("ops", "bob");
    set_attributes(&node, "bob", &json!({ "plan": "\u{1b}[2J free" }));
    let explain =
        |arguments: &[&str]| pointsman(&[&["explain", "--url", &url], arguments].concat());
    let steps = output_of(&mut explain(&["for pros", "--user", "bob"]));
    let lines: Vec<&str> = steps.lines().collect();
    assert_eq!(
        lines[0],
        "`bob` was not reached: none of the 2 routes matches; the closest, of `rules`, has a condition that is false for `bob`: attribute `plan` is \"\\u{1b}[2J free\" but must be \"pro\". This assumes that the attributes have not changed since and that no token claimed the group and that this membership was the first."
    );
    assert_eq!(lines[1], "");
    let hash_of = |plugin: &str| {
        let file = every_bundled_plugin().join(format!("{plugin}.wasm"));
        hash(&fs::read(file).expect("read it"))[..12].to_owned()
    };
    let config_of = |plugin: &str| {
        let state = node.admin(&format!("/v1/plugins/{plugin}")).json();
        state["config_hash"].as_str().expect("a hash").to_owned()
    };
    for (label, expect) in [
        ("decided", "committed at 20"),
        (
            "event",
            "\"for pros\" of type \"promotion\" from \"/tests\"",
        ),
        (
            "plugin",
            &format!(
                "discard (generation 1, {}, config {}) skipped: its types do not match",
                hash_of("discard"),
                config_of("discard")
            ),
        ),
        (
            "plugin",
            &format!(
                "rules (generation 1, {}, config {}) routes",
                hash_of("rules"),
                config_of("rules")
            ),
        ),
        (
            "route 1",
            "by rules to all, high, if plan equals \"pro\", with the collapse key promotion: has a condition that is false for `bob`",
        ),
        (
            "route 2",
            "by rules to g:ops, normal: names group `ops`, which `bob` joined after the event (the event was committed as ",
        ),
        ("log", "it is in one of the user's logs"),
        ("read", "it is not marked as read"),
        ("streams", "0 open on this node, 0 of them past this event"),
        ("unknown", "Attributes are evaluated as they are now"),
    ] {
        let found = lines.iter().any(|line| {
            line.strip_prefix(label)
                .is_some_and(|rest| rest.trim_start().starts_with(expect))
        });
        assert!(found, "no line '{label} {expect}' in\n{steps}");
    }
    assert!(
        steps.chars().all(|c| c == '\n' || !c.is_control()),
        "{steps:?}"
    );

    let whole: Value = serde_json::from_str(&output_of(&mut explain(&[
        "for pros", "--user", "bob", "--json",
    ])))
    .expect("JSON");
    assert_eq!(whole["conclusion"], lines[0]);
    let without = output_of(&mut explain(&["for pros"]));
    assert!(
        without.starts_with("The event was committed; its plan names `g:ops`, `all`.")
            && !without.contains("unknown"),
        "{without}"
    );
    let (is_well, unknown) = said(&mut explain(&["never came"]));
    assert!(
        !is_well && unknown.contains("no decision found for event 'never came'; compare the id"),
        "{unknown}"
    );
}

/// The decision record of an event, which has to be the newest one with its id.
fn recorded(node: &Node, event_id: &str) -> Value {
    eventually(SOON, "the event is decided", || {
        let found = node
            .admin(&format!("/v1/decisions?event_id={event_id}"))
            .json();
        found.get(0).cloned()
    })
}

/// `address`, and this many plugins that handle no event of the test.
fn with_idle_plugins(n: usize) -> (Plugins, Builder) {
    let (rules, mut config) = (core_module("rules"), String::new());
    let plugins = Plugins::new(&[("address.wasm", core_module("address"))]);
    for n in 0..n {
        plugins.replace(&format!("idle-{n}.wasm"), &rules);
        config += &format!(
            "[[plugins.idle-{n}.config.rules]]\nmatch.type = 'never.{n}'\nto.group = 'ops'\n"
        );
    }
    let builder = Node::builder().plugins(plugins.dir()).config(&config);
    (plugins, builder)
}

#[test]
fn a_record_does_not_grow_with_plugins_that_do_not_match_and_another_node_explains_them() {
    const IDLE: usize = 8;
    let server = RedisServer::start();
    let (_alone, builder) = with_idle_plugins(0);
    let alone = builder.start();
    let (_among, builder) = with_idle_plugins(IDLE);
    let mut among = builder.redis(server.url()).start();
    let size = |node: &Node| {
        for id in ["first", "second"] {
            publish(node, id, "t", json!({ "user": "ann" }));
            recorded(node, id);
        }
        let record = recorded(node, "second");
        assert!(record["members"].is_null(), "{record:#}");
        assert_eq!(record["chain"].as_str().map(str::len), Some(12));
        // The other texts have the length of the time.
        json!([
            record["chain"],
            record["verdicts"],
            record["event_id"],
            record["event_source"],
            record["event_type"]
        ])
        .to_string()
        .len()
    };
    assert_eq!(size(&among), size(&alone));
    let members = &recorded(&among, "first")["members"];
    assert_eq!(
        members["routers"].as_array().map(Vec::len),
        Some(1 + IDLE),
        "{members:#}"
    );

    // The deciding node is gone, and this one has other plugins.
    among.kill();
    let (_other, builder) = with_idle_plugins(1);
    let other = builder.redis(server.url()).start();
    let verdicts = explained(&other, "second", "ann")["decision"]["verdicts"].clone();
    let words: Vec<(&str, &str)> = verdicts
        .as_array()
        .expect("a list")
        .iter()
        .map(|verdict| {
            (
                verdict["plugin"].as_str().expect("a name"),
                verdict["verdict"].as_str().expect("a word"),
            )
        })
        .collect();
    let idle: Vec<String> = (0..IDLE).map(|n| format!("idle-{n}")).collect();
    let expect: Vec<(&str, &str)> = [("address", "routes")]
        .into_iter()
        .chain(idle.iter().map(|name| (name.as_str(), "skipped")))
        .collect();
    assert_eq!(words, expect);
    let url = format!("http://{}", other.admin_addr());
    let shown = output_of(&mut pointsman(&["explain", "second", "--url", &url]));
    let member = &members["routers"][1];
    let line = format!(
        "plugin     idle-0 (generation 1, {}, config {}) skipped: its types do not match",
        member["hash"].as_str().expect("a hash"),
        member["config_hash"].as_str().expect("a hash")
    );
    assert!(shown.contains(&line), "{shown}");
}
