//! The bytes that clients receive: response heads and frames, and which clients receive none.

use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::node::{Node, SOON};
use crate::harness::publish::{event, xadd};
use crate::harness::redis::RedisServer;
use crate::harness::sse::{Request, StreamEnd};

#[test]
fn an_entry_added_to_redis_reaches_only_the_stream_of_its_user_as_one_event() {
    let server = RedisServer::start();
    let node = Node::builder().redis(server.url()).start();
    let (mut stream, mut other) = (node.stream("42"), node.stream("43"));
    let fields = [
        ("type", "order.shipped"),
        ("source", "/shop"),
        ("user", "42"),
        ("data", "{\"order\": 7}"),
    ];
    let [entry] = &xadd(
        &mut server.connection(),
        "pointsman:events",
        &[fields
            .map(|(name, value)| (name, value.to_owned()))
            .to_vec()],
    )[..] else {
        panic!("one entry, one id");
    };
    let notification = stream.next_notification(SOON);
    assert_eq!(notification.name, None, "onmessage must fire");
    assert_eq!(
        &notification.id, entry,
        "without an id from the publisher, the entry's id"
    );
    let said = (
        notification.source.as_str(),
        notification.kind.as_str(),
        notification.priority.as_str(),
        &notification.data,
    );
    assert_eq!(
        said,
        ("/shop", "order.shipped", "normal", &json!({ "order": 7 }))
    );
    // The next event for both is the first one the other stream receives, and the second one here.
    node.publisher()
        .publish(&[event("after", "t", json!({ "everyone": true }))]);
    assert_eq!(stream.next_notification(SOON).id, "after");
    assert_eq!(other.next_notification(SOON).id, "after");
}

#[test]
fn a_stream_forbids_caches_and_buffers_and_its_data_is_one_object_on_one_line() {
    let node = Node::builder().start();
    let mut stream = node.stream("42");
    let head = stream.head().to_ascii_lowercase();
    for line in [
        "cache-control: no-cache, no-transform\r\n",
        "x-accel-buffering: no\r\n",
        "content-type: text/event-stream",
    ] {
        assert!(head.contains(line), "{line:?} is missing from {head:?}");
    }
    node.publisher().publish(&[event(
        "a",
        "t",
        json!({ "user": "42", "data": { "text": "two\nlines" } }),
    )]);
    stream.next_notification(SOON);
    let line = stream
        .text()
        .lines()
        .rfind(|line| line.starts_with("data: {"))
        .expect("data");
    let data: Value = serde_json::from_str(&line["data: ".len()..]).expect("JSON on one line");
    let mut names: Vec<&str> = data
        .as_object()
        .expect("an object")
        .keys()
        .map(String::as_str)
        .collect();
    names.sort_unstable();
    assert_eq!(
        names,
        [
            "by", "data", "id", "priority", "source", "time", "to", "type"
        ]
    );
    let schema: Value = serde_json::from_str(include_str!("../../host/schema/notification.json"))
        .expect("the schema is JSON");
    assert!(
        names
            .iter()
            .all(|name| schema["properties"].get(name).is_some()),
        "{names:?} against {schema}"
    );
    let required = schema["required"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(Value::as_str);
    assert!(
        required.clone().count() >= 7 && required.clone().all(|name| names.contains(&name)),
        "{names:?} against {schema}"
    );
    assert_eq!(data["data"]["text"], "two\nlines");
}

#[test]
fn a_notification_names_its_router_and_the_users_own_target_but_no_other_target() {
    let node = Node::builder().start();
    node.join("ops", "cy");
    // The user as written in the URL, and the target that reaches the user, which may need escaping
    // in JSON.
    let users = [
        ("ann", "u:ann"),
        ("b%22ob", "u:b\"ob"),
        ("cy", "g:ops"),
        ("dan", "all"),
    ];
    let mut streams = users.map(|(user, _)| node.stream(user));
    node.publisher().publish(&[event(
        "a",
        "t",
        json!({ "users": "ann,b\"ob", "group": "ops", "everyone": true }),
    )]);
    for ((user, to), stream) in users.iter().zip(&mut streams) {
        let notification = stream.next_notification(SOON);
        assert_eq!(
            (notification.by.as_str(), notification.to.as_str()),
            ("address", *to)
        );
        let data = stream
            .text()
            .lines()
            .rfind(|line| line.starts_with("data: {"))
            .expect("data");
        let targets = ["u:ann", "ob", "g:ops", "all"]
            .into_iter()
            .filter(|part| data.contains(part));
        assert_eq!(targets.count(), 1, "{user} sees other targets: {data}");
        // `GET /v1/notifications` returns the same object.
        let page = node
            .request("GET", &format!("/v1/notifications?user={user}"))
            .json();
        assert_eq!(
            page["notifications"][0]["data"],
            serde_json::from_str::<Value>(&data["data: ".len()..]).expect("JSON")
        );
    }
}

#[test]
fn an_http_1_0_stream_is_not_chunked_and_ends_with_the_connection() {
    let mut node = Node::builder().start();
    let mut stream = Request::new(node.addr(), "user=42")
        .http_1_0()
        .open(SOON)
        .expect("open a stream");
    assert!(
        !stream
            .head()
            .to_ascii_lowercase()
            .contains("transfer-encoding"),
        "{}",
        stream.head()
    );
    stream.next_state("cursor", SOON);
    node.publisher()
        .publish(&[event("a", "t", json!({ "user": "42" }))]);
    assert_eq!(stream.next_notification(SOON).id, "a");
    node.terminate(Duration::from_secs(60));
    let (frames, stop) = stream.read_to_end(SOON);
    assert!(
        matches!(stop, StreamEnd::Complete),
        "{stop:?} after {frames:?}"
    );
}
