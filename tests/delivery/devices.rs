//! Devices: a page closed at night that returns in the morning with only its device name receives
//! the notifications in between, once each. Also `POST /v1/acks` and the read marker.

use serde_json::{Value, json};

use crate::harness::http::Answer;
use crate::harness::node::{Builder, Node, SOON};
use crate::harness::publish::event;
use crate::harness::redis::RedisServer;
use crate::harness::sse::{Request, Stream};

/// A configuration with as few plugins to compile at startup as possible.
fn builder() -> Builder {
    Node::builder().config("[plugins.discard]\nenabled = false")
}

fn acknowledge(node: &Node, user: &str, cursor: &Value) -> Answer {
    let headers = [("content-type", "application/json")];
    node.send(
        "POST",
        &format!("/v1/acks?user={user}"),
        &headers,
        cursor.to_string().as_bytes(),
    )
}

fn acknowledged(node: &Node, user: &str, cursor: &Value) {
    let answer = acknowledge(node, user, cursor);
    assert_eq!(answer.status, 204, "{answer:?}");
}

/// Opens a stream and reads past its first cursor.
fn open(node: &Node, query: &str) -> Stream {
    let mut stream = Request::new(node.addr(), query)
        .open(SOON)
        .unwrap_or_else(|refused| panic!("{refused:?}"));
    stream.next_state("cursor", SOON);
    stream
}

fn publish(node: &Node, user: &str, ids: &[&str]) {
    let events: Vec<_> = ids
        .iter()
        .map(|id| event(id, "device", json!({ "user": user })))
        .collect();
    node.publisher().publish(&events);
}

fn expect(stream: &mut Stream, ids: &[&str]) {
    let received: Vec<String> = ids
        .iter()
        .map(|_| stream.next_notification(SOON).id)
        .collect();
    assert_eq!(received, ids);
}

#[test]
fn a_device_without_a_cursor_resumes_at_its_device_cursor_on_any_node() {
    let server = RedisServer::start();
    for (evening, morning) in [
        (builder().start(), None),
        (
            builder().redis(server.url()).start(),
            Some(builder().redis(server.url()).start()),
        ),
    ] {
        let morning = morning.as_ref().unwrap_or(&evening);
        let mut witness = open(&evening, "user=ann");
        publish(&evening, "ann", &["before"]);
        expect(&mut witness, &["before"]);
        // The first stream of a device starts now, as any stream does, and its start is stored.
        let stream = open(&evening, "user=ann&device=phone");
        drop(stream);
        publish(&evening, "ann", &["a", "b", "c"]);
        let mut stream = open(morning, "user=ann&device=phone");
        expect(&mut stream, &["a", "b"]);
        acknowledged(
            &evening,
            "ann",
            &json!({ "id": stream.last_event_id(), "device": "phone" }),
        );
        expect(&mut stream, &["c"]);
        drop(stream);
        publish(&evening, "ann", &["d"]);
        // The last one was not acknowledged, so it may not have been seen.
        let mut stream = open(morning, "user=ann&device=phone");
        expect(&mut stream, &["c", "d"]);
        acknowledged(
            morning,
            "ann",
            &json!({ "id": stream.last_event_id(), "device": "phone" }),
        );
        let received = stream.last_event_id().to_owned();
        drop(stream);
        publish(&evening, "ann", &["e"]);
        expect(&mut open(&evening, "user=ann&device=phone"), &["e"]);
        // Another device, and another user's device of the same name, are unaffected. A device in
        // sync follows the others.
        let mut tablet = open(&evening, "user=ann&device=tablet");
        let mut bobs = open(&evening, "user=bob&device=phone");
        expect(
            &mut open(&evening, "user=ann&device=watch&devices=all"),
            &["e"],
        );
        publish(&evening, "ann", &["f"]);
        publish(&evening, "bob", &["f of bob"]);
        expect(&mut tablet, &["f"]);
        expect(&mut bobs, &["f of bob"]);
        // A position sent by the client takes precedence.
        let mut stream = Request::new(
            evening.addr(),
            "user=ann&device=phone&last_event_id=earliest",
        )
        .open(SOON)
        .expect("200");
        expect(&mut stream, &["before", "a", "b", "c", "d", "e", "f"]);
        let mut stream = Request::new(evening.addr(), "user=ann&device=tablet")
            .last_event_id(&received)
            .open(SOON)
            .expect("200");
        expect(&mut stream, &["e", "f"]);
    }
}

#[test]
fn acknowledgements_survive_a_killed_node() {
    let mut node = builder().data().start();
    let stream = open(&node, "user=ann&device=phone");
    publish(&node, "ann", &["a"]);
    drop(stream);
    let mut stream = open(&node, "user=ann&device=phone");
    expect(&mut stream, &["a"]);
    acknowledged(
        &node,
        "ann",
        &json!({ "id": stream.last_event_id(), "device": "phone" }),
    );
    node.kill();
    node.restart();
    publish(&node, "ann", &["b"]);
    expect(&mut open(&node, "user=ann&device=phone"), &["b"]);
}

#[test]
fn a_device_whose_first_stream_named_a_start_misses_nothing_after_it() {
    let node = builder().start();
    drop(open(&node, "user=ann&device=phone&last_event_id=latest"));
    let mut witness = open(&node, "user=ann");
    publish(&node, "ann", &["a"]);
    expect(&mut witness, &["a"]);
    expect(&mut open(&node, "user=ann&device=phone"), &["a"]);
    // An unreadable position is ignored in favour of the device cursor.
    expect(
        &mut open(&node, "user=ann&device=phone&last_event_id=garbage!"),
        &["a"],
    );
}

/// Notifications that one device filters out would count as seen by all devices. The number of
/// patterns is bounded because every notification is matched against each of them.
#[test]
fn a_filter_is_limited_to_one_device_and_bounded() {
    let node = builder().start();
    let many = (0..65)
        .map(|n| format!("t{n}"))
        .collect::<Vec<_>>()
        .join(",");
    for (query, expect) in [
        (
            "device=phone&devices=all&types=a".to_owned(),
            "cannot be combined",
        ),
        (
            "device=phone&devices=all&min_priority=high".to_owned(),
            "cannot be combined",
        ),
        (format!("types={many}"), "the limit is 64"),
    ] {
        let refused = Request::new(node.addr(), &format!("user=ann&{query}"))
            .open(SOON)
            .map(|_| ())
            .unwrap_err();
        assert!(
            refused.status == Some(400) && refused.text.contains(expect),
            "{query}: {refused:?}"
        );
    }
    open(
        &node,
        &format!("user=ann&types={}", many.trim_end_matches(",t64")),
    );
}

#[test]
fn an_invalid_acknowledgement_is_rejected_with_the_reason_and_moves_nothing() {
    let node = builder().start();
    let mut bob = open(&node, "user=bob&device=phone");
    let stream = open(&node, "user=ann&device=phone");
    publish(&node, "bob", &["of bob"]);
    publish(&node, "ann", &["a"]);
    expect(&mut bob, &["of bob"]);
    // As from a page in which another user left an id.
    let answer = acknowledge(
        &node,
        "ann",
        &json!({ "id": bob.last_event_id(), "device": "phone" }),
    );
    assert_eq!(
        (answer.status, answer.json()["error"].as_str()),
        (403, Some("this id belongs to another user"))
    );
    // Adds seconds to hours: the id ends with 9 base64url characters, and `_` is the highest.
    let mut ahead = stream.last_event_id().to_owned();
    let mut high = ahead.char_indices().rev().skip(4);
    let (at, _) = high.find(|(_, one)| *one != '_').expect("an id is longer");
    ahead.replace_range(at..=at, "_");
    for (cursor, expect) in [
        (
            json!({ "id": ahead, "device": "phone" }),
            "ahead of every notification",
        ),
        (
            json!({ "id": "earliest", "device": "phone" }),
            "not the id of a frame",
        ),
        (json!({ "id": stream.last_event_id() }), "neither a device"),
    ] {
        let answer = acknowledge(&node, "ann", &cursor);
        let body = answer.json();
        assert_eq!(answer.status, 400, "{cursor}: {answer:?}");
        assert!(
            body["error"]
                .as_str()
                .is_some_and(|error| error.contains(expect))
                && body["fix"].is_string(),
            "{cursor}: {body}"
        );
    }
    // Streams also reject invalid devices before they open.
    let long = "x".repeat(257);
    for query in [
        "device=",
        "device=a%0Ab",
        &format!("device={long}"),
        "devices=all",
        "device=phone&devices=some",
    ] {
        let refused = Request::new(node.addr(), &format!("user=ann&{query}"))
            .open(SOON)
            .expect_err("a rejection");
        assert_eq!(refused.status, Some(400), "{query}");
    }
    expect(&mut open(&node, "user=ann&device=phone"), &["a"]);
}

/// At any other start the device would silently miss notifications.
#[test]
fn a_device_reconnects_after_an_outage_of_redis_and_misses_nothing() {
    let server = RedisServer::start();
    let node = builder().redis(server.url()).start();
    drop(open(&node, "user=ann&device=phone"));
    publish(&node, "ann", &["a"]);
    node.await_outcomes(1, SOON);
    server.pause();
    let mut stream = Request::new(node.addr(), "user=ann&device=phone")
        .open(SOON)
        .expect("200");
    let close = stream.next_state("close", SOON);
    assert_eq!(close.data.as_deref(), Some("{\"reason\":\"unavailable\"}"));
    assert!(close.retry.is_some());
    let answer = acknowledge(&node, "ann", &json!({ "id": "1", "device": "phone" }));
    assert_eq!(
        answer.status, 400,
        "an unreadable id is rejected without the broker: {answer:?}"
    );
    server.resume();
    crate::harness::eventually(SOON, "the broker is available again", || {
        let mut stream = Request::new(node.addr(), "user=ann&device=phone")
            .open(SOON)
            .ok()?;
        (stream.next_frame(SOON).ok()?.state() == Some("cursor"))
            .then(|| expect(&mut stream, &["a"]))
    });
}

fn page(node: &Node, query: &str) -> Value {
    let answer = node.request("GET", &format!("/v1/notifications?{query}"));
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

/// Returns the ids of a page's events, read ones in parentheses, and the unread count.
fn shown(page: &Value) -> (Vec<String>, Value) {
    let items = page["notifications"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|item| {
            let id = item["data"]["id"].as_str().expect("an id");
            if item["read"].as_bool().expect("read or not") {
                format!("({id})")
            } else {
                id.to_owned()
            }
        });
    (items.collect(), page["unread"].clone())
}

#[test]
fn the_read_marker_applies_to_every_device_and_not_to_later_notifications() {
    let server = RedisServer::start();
    for node in [builder().start(), builder().redis(server.url()).start()] {
        let unread = |count: usize| json!({ "count": count, "exact": true });
        assert_eq!(shown(&page(&node, "user=ann")), (vec![], unread(0)));
        let mut stream = open(&node, "user=ann&device=phone");
        publish(&node, "ann", &["a", "b", "c"]);
        expect(&mut stream, &["a", "b", "c"]);
        let all = page(&node, "user=ann");
        assert_eq!(
            shown(&all),
            (vec!["a".into(), "b".into(), "c".into()], unread(3))
        );
        // With the id of an item in the list or of a frame.
        acknowledged(
            &node,
            "ann",
            &json!({ "id": all["notifications"][1]["id"], "read": true }),
        );
        assert_eq!(
            shown(&page(&node, "user=ann")),
            (vec!["(a)".into(), "(b)".into(), "c".into()], unread(1))
        );
        // Never backwards.
        acknowledged(
            &node,
            "ann",
            &json!({ "id": all["notifications"][0]["id"], "read": true }),
        );
        let after = all["notifications"][0]["id"].as_str().expect("an id");
        assert_eq!(
            shown(&page(&node, &format!("user=ann&after={after}&limit=1"))),
            (vec!["(b)".into()], unread(1))
        );
        // Acknowledging on a device does not mark as read; one request can do both.
        acknowledged(
            &node,
            "ann",
            &json!({ "id": stream.last_event_id(), "device": "phone" }),
        );
        assert_eq!(shown(&page(&node, "user=ann")).1, unread(1));
        acknowledged(
            &node,
            "ann",
            &json!({ "id": stream.last_event_id(), "device": "phone", "read": true }),
        );
        assert_eq!(
            shown(&page(&node, "user=ann")),
            (vec!["(a)".into(), "(b)".into(), "(c)".into()], unread(0))
        );
        publish(&node, "ann", &["d"]);
        expect(&mut stream, &["d"]);
        let (items, count) = shown(&page(&node, "user=ann"));
        assert_eq!((items[3].as_str(), count), ("d", unread(1)));
        // It applies to ann only.
        let mut bobs = open(&node, "user=bob");
        publish(&node, "bob", &["of bob"]);
        expect(&mut bobs, &["of bob"]);
        assert_eq!(
            shown(&page(&node, "user=bob")),
            (vec!["of bob".into()], unread(1))
        );
    }
}

/// Counts the notifications that pass the filter, up to a hundred, wherever the page starts.
#[test]
fn an_unread_count_that_is_a_lower_bound_is_marked_inexact() {
    let node = builder().start();
    let mut stream = open(&node, "user=ann&types=device");
    let many: Vec<_> = (1..=101)
        .map(|n| event(&n.to_string(), "chat", json!({ "user": "ann" })))
        .collect();
    node.publisher().publish(&many);
    publish(&node, "ann", &["the last"]);
    expect(&mut stream, &["the last"]);
    let count = |query: &str| page(&node, &format!("user=ann&{query}"))["unread"].clone();
    assert_eq!(count("limit=1"), json!({ "count": 100, "exact": false }));
    assert_eq!(count("types=device"), json!({ "count": 1, "exact": true }));
    let first = page(&node, "user=ann&limit=1");
    acknowledged(
        &node,
        "ann",
        &json!({ "id": first["cursor"], "read": true }),
    );
    assert_eq!(count("types=chat"), json!({ "count": 100, "exact": true }));
    assert_eq!(
        count("after=latest"),
        json!({ "count": 100, "exact": false })
    );
}
