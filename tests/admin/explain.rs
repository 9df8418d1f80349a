//! Why somebody was told of an event, or not: `GET /v1/explain` and `pointsman explain`, asked about events that went through a real node.

use std::fs;

use serde_json::{Value, json};

use crate::harness::command::{pointsman, said, told};
use crate::harness::http::{self, Answer};
use crate::harness::node::{Builder, Folder, Node, SOON};
use crate::harness::plugins::hash;
use crate::harness::publish::event;
use crate::harness::redis::RedisServer;
use crate::harness::sse::Request;
use crate::harness::{eventually, every_bundled_plugin};

const KEY: &str = "the key of these tests";

/// A rule by attributes, one by two ways, and a filter.
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

/// Explained for a user, once it is decided.
fn explained(node: &Node, event_id: &str, user: &str) -> Value {
    eventually(SOON, "it is decided", || {
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
fn each_route_says_why_it_reaches_a_user_or_not() {
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
        "The event is for `ann`, by the route of `address` to `u:ann`: it is in the log, and whether a client has had it is not known, as no device has said so.",
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

    // By another target.
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
        "`ann` was not reached: the only route names groups `ops`, `dev`, of none of which `ann` is a member. That holds if no token claimed the group.",
    );

    // By a condition; of two routes the one that lacks least is told.
    publish(&node, "for pros", "promotion", json!({}));
    let holds =
        "That holds if the attributes were then what they are now and no token claimed the group.";
    let nearest = "`ann` was not reached: none of the 2 routes does; the nearest, of `rules`, has a condition that is false for `ann`: attribute";
    let id = "for pros";
    concludes(
        &node,
        id,
        "ann",
        &format!("{nearest} `plan` is absent and must be \"pro\". {holds}"),
    );
    set_attributes(&node, "ann", &json!({ "plan": "free" }));
    let explanation = concludes(
        &node,
        id,
        "ann",
        &format!("{nearest} `plan` is \"free\" and must be \"pro\". {holds}"),
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
        &format!("{nearest} `plan` is the number 3 and must be \"pro\", a text. {holds}"),
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

    // Without a user: the decision and the plan.
    let answer = ask(&node, "event_id=direct").json();
    assert_eq!(
        answer["conclusion"],
        "The event was committed, and its plan names `u:ann`, `u:bob`; whom of them it reached, say which user."
    );
    assert!(
        answer["plan"].is_array() && answer["recipient"].is_null(),
        "{answer}"
    );
}

#[test]
fn a_member_learns_that_the_membership_began_after_the_event_or_ended_before_it() {
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
            "`bob` was not reached: the only route names group `ops`, of which `bob` is not a member. That holds if no token claimed the group.",
        );
        node.join("ops", "bob");
        tell("member");
        leave(&node, "ops", "bob");
        tell("too late");
        let explanation = concludes(
            &node,
            "stranger",
            "bob",
            "`bob` was not reached: the only route names group `ops`, which `bob` joined after the event. That holds if no token claimed the group and this membership was the first.",
        );
        // With the ids by which it is judged.
        let reason = explanation["recipient"]["routes"][0]["reason"]
            .as_str()
            .unwrap();
        let id = &explanation["decision"]["notification"];
        assert!(
            reason.contains(&format!(
                "it was committed as {id}, and the membership begins above "
            )),
            "{reason}"
        );
        let explanation = explained(&node, "member", "bob");
        assert_eq!(
            explanation["recipient"]["routes"][0]["reason"],
            "names group `ops`, of which `bob` was a member at the event"
        );
        let member = explanation["decision"]["notification"].to_string();
        let explanation = concludes(
            &node,
            "too late",
            "bob",
            "`bob` was not reached: the only route names group `ops`, which `bob` left before the event. That holds if no token claimed the group.",
        );
        let reason = explanation["recipient"]["routes"][0]["reason"]
            .as_str()
            .unwrap();
        assert!(
            reason.contains(&format!("and the membership ended with {member}")),
            "{reason}"
        );
        // Of two stretches only the newer is known: it was told of this one in the older.
        node.join("ops", "bob");
        concludes(
            &node,
            "member",
            "bob",
            "`bob` was not reached: the only route names group `ops`, which `bob` joined after the event. That holds if no token claimed the group and this membership was the first.",
        );
    }
}

#[test]
fn what_expired_and_what_a_later_one_took_the_place_of_is_told() {
    let server = RedisServer::start();
    for node in [builder().start(), builder().redis(server.url()).start()] {
        publish(
            &node,
            "short",
            "t",
            json!({ "user": "ann", "ttl": "700ms" }),
        );
        let explanation = eventually(SOON, "it expires", || {
            let explanation = explained(&node, "short", "ann");
            explanation["recipient"]["wins"]
                .is_null()
                .then_some(explanation)
        });
        let conclusion = explanation["conclusion"].as_str().unwrap();
        assert!(
            conclusion.starts_with(
                "The event was for `ann`, by the route of `address` to `u:ann`, but expired at 20"
            ) && conclusion.ends_with("Z: who had not had it by then does not get it."),
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
            "The event was for `ann`, by the route of `address` to `u:ann`, but the later event `state 2` has the same collapse key `cart`: who had not had this one by then gets only that.",
        );
        assert_eq!(
            explanation["recipient"]["superseded_by"]["event_id"],
            "state 2"
        );

        // A later state that has expired keeps nobody from getting the earlier one who had neither, as the streams show.
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
        eventually(SOON, "it expires", || {
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
            "The event is for `ann`, by the route of `address` to `u:ann`, but the later event `brief` had the same collapse key `door` until it expired: who had that one does not get this one any more, and who had neither does.",
        );
        assert_eq!(explanation["recipient"]["superseded_by"]["expired"], true);
        // The next that is still there takes its place all the same.
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
        .expect("a sentence")
        .to_owned()
}

#[test]
fn what_reached_nobody_says_who_decided_so_and_what_to_do() {
    let node = builder().start();
    let user = json!({ "user": "ann" });
    publish(&node, "dropped", "noise", user.clone());
    let explanation = concludes(
        &node,
        "dropped",
        "ann",
        "Nobody was reached: the filter `discard` dropped the event, because: nobody wants noise.",
    );
    assert!(
        explanation["plan"].is_null() && explanation["recipient"].is_null(),
        "{explanation}"
    );
    publish(&node, "nobody's", "t", json!({}));
    concludes(
        &node,
        "nobody's",
        "ann",
        "Nobody was reached: the only router that answered, `address`, named nobody.",
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
            "Nobody was reached: the event is a dead letter, as `address` rejected it, because: {}; mend that, and `pointsman dead redrive {id}` sends it through again.",
            reason.trim_end_matches('.')
        )
    );
    // Sent through again, it is the same event.
    assert_eq!(
        node.request("POST", &format!("/v1/dead/{id}/redrive"))
            .status,
        204
    );
    let again = eventually(SOON, "it is tried again", || {
        let again = explained(&node, "broken", "ann");
        (again["other_decisions"]
            .as_array()
            .is_some_and(|all| all.len() == 1))
        .then_some(again)
    });
    let id = again["dead_letter"].as_str().expect("another dead letter");
    assert_eq!(
        node.request("DELETE", &format!("/v1/dead/{id}")).status,
        204
    );
    let gone = concludes_so(&explained(&node, "broken", "ann"));
    assert!(
        gone.ends_with(
            "; it is no longer among the dead letters: it was redriven, dropped or trimmed."
        ),
        "{gone}"
    );

    // However often a publisher retries, what it retried is explained.
    publish(&node, "again and again", "t", user.clone());
    let retry = event("again and again", "t", user);
    node.publisher().publish(&vec![retry; 20]);
    let explanation = eventually(SOON, "all are decided", || {
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

/// Streams judge a plan as they come by, and so does what is said of them.
#[test]
fn what_another_route_brings_once_the_first_has_expired_is_told_as_that_route_has_it() {
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
    let conclusion = explanation["conclusion"].as_str().expect("a sentence");
    assert!(
        conclusion.starts_with(
            "The event is for `ann`, by the route of `rules` to `g:ops`: it is in the log"
        ),
        "{conclusion}"
    );
}

/// Whoever is asked at night need not know which node decided, nor whether that one still is.
#[test]
fn every_node_explains_what_another_decided_also_when_that_one_is_dead() {
    let server = RedisServer::start();
    let mut first = builder().redis(server.url()).start();
    let second = builder().redis(server.url()).start();
    let mut elsewhere = second.stream("ann");
    let mut ids = Vec::new();
    // Either node may decide an event; the later ones are decided by the second, as the first is killed.
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
            "a stream is seen by the node that has it"
        );
        assert_eq!(streams(&mut other), json!({ "open": 1, "past": 1 }));
        assert_eq!(one, other);
    }
}

/// Dead letters are no duplicates, so that a publisher's retry can become one after its event has reached somebody.
#[test]
fn a_retry_that_became_a_dead_letter_does_not_hide_that_somebody_was_reached() {
    let server = RedisServer::start();
    for node in [builder().start(), builder().redis(server.url()).start()] {
        publish(&node, "a", "t", json!({ "user": "ann" }));
        explained(&node, "a", "ann");
        publish(&node, "a", "t", json!({ "user": "ann", "ttl": "soon" }));
        let explanation = eventually(SOON, "both are decided", || {
            let explanation = explained(&node, "a", "ann");
            explanation["other_decisions"]
                .is_array()
                .then_some(explanation)
        });
        let conclusion = explanation["conclusion"].as_str().expect("a sentence");
        assert!(
            conclusion.starts_with("The event is for `ann`, by the route"),
            "{conclusion}"
        );
        assert_eq!(
            explanation["other_decisions"][0]["outcome"],
            "dead-lettered"
        );
    }
}

#[test]
fn a_dead_letter_is_found_behind_many_others_or_said_to_be_among_them() {
    let server = RedisServer::start();
    for node in [builder().start(), builder().redis(server.url()).start()] {
        let broken = |id: &str| event(id, "t", json!({ "user": "ann", "ttl": "soon" }));
        let many: Vec<Value> = (0..1_100).map(|n| broken(&n.to_string())).collect();
        node.publisher().publish(&many);
        let conclusion = concludes_so(&explained(&node, "1099", "ann"));
        assert!(
            conclusion.ends_with("find it by its entry in `pointsman dead list`, as too many others became dead letters with it."),
            "{conclusion}"
        );
        node.publisher().publish(&[broken("another")]);
        let explanation = explained(&node, "another", "ann");
        assert!(explanation["dead_letter"].is_string(), "{explanation:#}");
    }
}

/// Looking through all that came later would take as long as there is of it.
#[test]
fn a_later_state_is_looked_for_among_the_next_thousand() {
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
            .contains("Of the notifications after it only the next 1,000")
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
fn an_entry_that_is_no_event_is_explained_by_its_entry_and_by_the_id_that_it_names() {
    let server = RedisServer::start();
    let node = builder().redis(server.url()).start();
    let entry: String = server.command("XADD pointsman:events * user ann");
    let explanation = explained(&node, &entry, "ann");
    assert_eq!(explanation["decision"]["entry"], entry.as_str());
    let conclusion = concludes_so(&explanation);
    let expect = "Nobody was reached: the event is a dead letter, because: type is missing";
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
    // It does not hide what an event with the same id came to before.
    publish(
        &node,
        "sound",
        "t",
        json!({ "source": "/s", "user": "ann" }),
    );
    explained(&node, "sound", "ann");
    let _: String = server.command("XADD pointsman:events * id sound source /s user ann");
    let explanation = eventually(SOON, "both are decided", || {
        let explanation = explained(&node, "sound", "ann");
        explanation["other_decisions"]
            .is_array()
            .then_some(explanation)
    });
    assert_eq!(explanation["decision"]["outcome"], "committed");
}

#[test]
fn devices_say_where_they_are_and_a_trimmed_log_says_so() {
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
        let by = "by the route of `address` to `u:ann`";
        let explanation = concludes(
            &node,
            "a",
            "ann",
            &format!(
                "The event is for `ann`, {by}: it is in the log, and no device has acknowledged it."
            ),
        );
        let devices = |explanation: &Value| explanation["recipient"]["devices"].clone();
        let at = |phone: &str| json!([{ "device": "phone", "at": phone }, { "device": "tablet", "at": "before" }, { "device": "watch", "at": "began-after" }]);
        assert_eq!(devices(&explanation), at("before"));
        let streams = eventually(SOON, "other streams are closed", || {
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
            &format!(
                "The event is for `ann`, {by}: it, or what came after it, was marked as read."
            ),
        );
        assert_eq!(explanation["recipient"]["read"], true);
        acknowledge(json!({ "id": phone.last_event_id(), "device": "phone" }));
        let explanation = concludes(
            &node,
            "a",
            "ann",
            &format!(
                "The event is for `ann`, {by}: the device `phone` has acknowledged it, or what came after it."
            ),
        );
        assert_eq!(devices(&explanation), at("acknowledged"));

        // A device that began after it, and acknowledged what came then, never had it.
        let mut late = open("late");
        publish(&node, "0", "t", json!({ "user": "ann" }));
        assert_eq!(late.next_notification(SOON).id, "0");
        acknowledge(json!({ "id": late.last_event_id(), "device": "late" }));
        concludes(
            &node,
            "a",
            "ann",
            &format!(
                "The event is for `ann`, {by}: the devices `late`, `phone` have acknowledged it, or what came after it."
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
                "The event was for `ann`, {by}, but has left the log, which keeps so many and no longer: who had not had it by then is told of a gap."
            ),
        );
        assert_eq!(explanation["recipient"]["in_log"], false);
    }
}

#[test]
fn what_is_not_decided_and_what_never_came_is_told_with_the_fix() {
    let node = builder().start();
    publish(&node, "a", "t", json!({ "user": "ann" }));
    explained(&node, "a", "ann");
    let answer = ask(&node, "event_id=b&user=ann");
    let body = answer.json();
    assert_eq!(
        (answer.status, &body["error"]),
        (404, &json!("there is no decision about an event 'b'"))
    );
    let fix = body["fix"].as_str().expect("a fix");
    assert!(
        fix.contains("of pointsman:events back to 20")
            && fix.contains("retention.decision_entries"),
        "{fix}"
    );

    // Without plugins nothing is decided.
    let empty = Folder::new();
    let mut waiting = Node::builder()
        .plugins(empty.path())
        .may_be_unready()
        .start();
    eventually(SOON, "it takes events", || {
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
            && error.starts_with("the event 'second' is not decided yet: its entry 1")
            && error.ends_with(" waits in pointsman:events, behind 1 other"),
        "{answer:?}"
    );
    assert!(
        body["fix"]
            .as_str()
            .is_some_and(|fix| fix.contains("/readyz")),
        "{body}"
    );
    // Where more wait than are looked through, it may be one of them.
    let many: Vec<Value> = (0..10_100)
        .map(|n| event(&n.to_string(), "t", json!({})))
        .collect();
    many.chunks(5_050)
        .for_each(|batch| waiting.publisher().publish(batch));
    publish(&waiting, "last", "t", json!({}));
    let body = ask(&waiting, "event_id=last").json();
    let fix = body["fix"].as_str().unwrap_or_default();
    assert!(
        fix.contains("of pointsman:events none (and it may wait there behind 1")
            && fix.contains("were looked through"),
        "{body}"
    );
    waiting.kill();
}

#[test]
fn whatever_is_asked_is_answered_or_refused_with_the_reason() {
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
            "event_id: has 10000 bytes; 256 is the most",
        ),
        (
            "event_id=a%0Ab".to_owned(),
            "event_id: has the control character U+000A",
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
        ("event_id=%FF".to_owned(), "there is no decision"),
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
fn what_is_known_of_a_user_is_told_to_who_has_the_key() {
    let config = format!(
        "[auth]\njwt_secret = \"the secret of these tests, longer than 32 bytes\"\nkey = \"{KEY}\"\n{CONFIG}"
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
        .expect("an answer")
    };
    eventually(SOON, "it is decided", || {
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
        !is_well && refusal.contains("give --key or POINTSMAN_KEY"),
        "{refusal}"
    );
    told(&mut pointsman(&[
        "explain", "a", "--user", "ann", "--url", &url, "--key", KEY,
    ]));
}

#[test]
fn the_command_says_the_conclusion_first_and_then_its_steps_a_line_each() {
    let node = builder().start();
    let url = format!("http://{}", node.admin_addr());
    publish(&node, "for pros", "promotion", json!({}));
    explained(&node, "for pros", "bob");
    node.join("ops", "bob");
    set_attributes(&node, "bob", &json!({ "plan": "\u{1b}[2J free" }));
    let explain =
        |arguments: &[&str]| pointsman(&[&["explain", "--url", &url], arguments].concat());
    let steps = told(&mut explain(&["for pros", "--user", "bob"]));
    let lines: Vec<&str> = steps.lines().collect();
    assert_eq!(
        lines[0],
        "`bob` was not reached: none of the 2 routes does; the nearest, of `rules`, has a condition that is false for `bob`: attribute `plan` is \"\\u{1b}[2J free\" and must be \"pro\". That holds if the attributes were then what they are now and no token claimed the group and this membership was the first."
    );
    assert_eq!(lines[1], "");
    let hash_of = |plugin: &str| {
        let file = every_bundled_plugin().join(format!("{plugin}.wasm"));
        hash(&fs::read(file).expect("read it"))[..12].to_owned()
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
                "discard (generation 1, {}) skipped: its types do not match",
                hash_of("discard")
            ),
        ),
        (
            "plugin",
            &format!("rules (generation 1, {}) routes", hash_of("rules")),
        ),
        (
            "route 1",
            "by rules to all, high, if plan equals \"pro\", with the collapse key promotion: has a condition that is false for `bob`",
        ),
        (
            "route 2",
            "by rules to g:ops, normal: names group `ops`, which `bob` joined after the event (it was committed as ",
        ),
        ("log", "it is in a log of the user"),
        ("read", "it is not marked as read"),
        ("streams", "0 open on this node, 0 of them past it"),
        ("not known", "Attributes are judged as they are now"),
    ] {
        let found = lines.iter().any(|line| {
            line.strip_prefix(label)
                .is_some_and(|rest| rest.trim_start().starts_with(expect))
        });
        assert!(found, "no line '{label}: {expect}' in\n{steps}");
    }
    assert!(
        steps.chars().all(|c| c == '\n' || !c.is_control()),
        "{steps:?}"
    );

    let whole: Value = serde_json::from_str(&told(&mut explain(&[
        "for pros", "--user", "bob", "--json",
    ])))
    .expect("JSON");
    assert_eq!(whole["conclusion"], lines[0]);
    let without = told(&mut explain(&["for pros"]));
    assert!(
        without.starts_with("The event was committed, and its plan names `g:ops`, `all`;")
            && !without.contains("not known"),
        "{without}"
    );
    let (is_well, unknown) = said(&mut explain(&["never came"]));
    assert!(
        !is_well
            && unknown.contains("there is no decision about an event 'never came'; compare the id"),
        "{unknown}"
    );
}
