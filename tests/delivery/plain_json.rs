//! Events as applications write them: plain JSON without a type, numbers as users, and names in
//! quotes.

use std::time::Duration;

use serde_json::json;

use crate::harness::eventually;
use crate::harness::node::Node;
use crate::harness::publish::xadd;
use crate::harness::redis::RedisServer;

/// Time limit of whatever should happen at once, on a loaded machine.
const SOON: Duration = Duration::from_secs(60);
const LEAN: &str = "[plugins.discard]\nenabled = false\n";

#[test]
fn a_body_without_a_type_has_the_default_type() {
    let node = Node::builder()
        .config(&format!("{LEAN}[defaults]\ntype = 'alert'\n"))
        .start();
    let mut stream = node.stream("42");
    let json = [("content-type", "application/json")];
    let batch = [("content-type", "application/cloudevents-batch+json")];
    let binary = [
        ("content-type", "text/plain"),
        ("ce-user", "42"),
        ("ce-id", "binary"),
    ];
    let post = |headers: &[(&str, &str)], body: &str| {
        let answer = node.send("POST", "/v1/events", headers, body.as_bytes());
        assert!((200..300).contains(&answer.status), "{answer:?}");
    };
    post(&json, r#"{"user":42,"data":{"text":"Hello"}}"#);
    post(&json, r#"{"type":"own","user":"42"}"#);
    post(
        &batch,
        r#"[{"id":"a","users":[42,"43"]},{"id":"b","type":"own","user":42}]"#,
    );
    post(&binary, "text");
    let received = [(); 5].map(|()| stream.next_notification(SOON));
    let kinds = received.each_ref().map(|one| one.kind.as_str());
    assert_eq!(kinds, ["alert", "own", "alert", "own", "alert"]);
    assert_eq!(received[0].data, json!({ "text": "Hello" }));
}

/// As Spring's `RedisTemplate` writes them with a serializer for JSON.
#[test]
fn names_in_quotes_are_reported_once_with_the_fix() {
    let server = RedisServer::start();
    let node = Node::builder().redis(server.url()).config(LEAN).start();
    let entry = |kind: &str, user: &str| {
        let fields = [("type", kind), ("user", user)];
        fields.map(|(name, value)| (name, value.to_owned())).into()
    };
    let entries = [
        entry("\"order\"", "\"42\""),
        entry("order", "\"42\""),
        entry("order", "42"),
    ];
    let mut stream = node.stream("42");
    xadd(&mut server.connection(), "pointsman:events", &entries);
    assert_eq!(stream.next_notification(SOON).kind, "order");
    node.await_outcomes(3, SOON);
    let warning = "the type of an event begins and ends with quotes, which then belong to the name; publish it without them";
    eventually(SOON, "the warning", || {
        node.log().contains(warning).then_some(())
    });
    assert_eq!(node.log().matches("begins and ends with quotes").count(), 1);
}
