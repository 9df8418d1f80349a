//! Publishers share a source: the events of one large request do not hold up those of others.

use serde_json::{Value, json};

use crate::harness::node::{Node, SOON};
use crate::harness::publish::event;
use crate::harness::redis::RedisServer;
use crate::harness::sse::Stream;

/// A request as large as it may be: each event is more than half of a piece.
fn large(prefix: &str) -> Vec<Value> {
    let event = |n: usize| {
        let more = json!({ "user": "42", "data": "x".repeat(40_000) });
        event(&format!("{prefix}-{n}"), "t", more)
    };
    (0..90).map(event).collect()
}

fn next_id(stream: &mut Stream) -> String {
    stream.next_notification(SOON).id
}

#[test]
fn an_event_is_decided_between_those_of_a_large_request_of_another_publisher() {
    let redis = RedisServer::start();
    for on_redis in [false, true] {
        let builder = Node::builder();
        let node = if on_redis {
            builder.redis(redis.url()).start()
        } else {
            builder.start()
        };
        let mut stream = node.stream("42");
        let batch = large("large");
        let publisher = node.publisher();
        let posting = std::thread::spawn(move || publisher.publish(&batch));
        assert_eq!(next_id(&mut stream), "large-0");
        let small = event("small", "t", json!({ "user": "42" }));
        node.publisher().publish(&[small]);
        let rest: Vec<String> = (1..=90).map(|_| next_id(&mut stream)).collect();
        posting.join().expect("the large request is stored");
        let at = rest.iter().position(|id| id == "small");
        assert!(at.is_some_and(|at| at < 89), "{rest:?}");
        let large: Vec<&String> = rest.iter().filter(|id| *id != "small").collect();
        let expected: Vec<String> = (1..90).map(|n| format!("large-{n}")).collect();
        assert_eq!(large, expected.iter().collect::<Vec<_>>(), "in order, once");
    }
}

/// Publishers must not wait for a source that waits for its plugins.
#[test]
fn large_requests_are_stored_while_their_source_is_not_decided() {
    let node = Node::builder()
        .config("[plugins.absent]\n")
        .may_be_unready()
        .start();
    let posting = ["a", "b"].map(|prefix| {
        let publisher = node.publisher();
        let batch = large(prefix);
        std::thread::spawn(move || publisher.publish(&batch))
    });
    for request in posting {
        request.join().expect("the request is stored");
    }
    let mut stream = node.stream("42");
    node.reconfigure("[plugins.absent]\nenabled = false\n");
    let ids: Vec<String> = (0..180).map(|_| next_id(&mut stream)).collect();
    for prefix in ["a", "b"] {
        let own = ids.iter().filter(|id| id.starts_with(prefix)).cloned();
        let expected: Vec<String> = (0..90).map(|n| format!("{prefix}-{n}")).collect();
        assert_eq!(own.collect::<Vec<_>>(), expected);
    }
}
