//! A resuming client receives each notification it has not received yet, once and in order, from
//! the id that it kept, in whichever form it sends the id.

use std::time::Duration;

use rand::Rng as _;
use serde_json::json;

use crate::harness::node::{Node, SOON};
use crate::harness::publish::event;
use crate::harness::redis::RedisServer;
use crate::harness::seed;
use crate::harness::sse::{Request, StreamEnd};

#[test]
fn clients_cut_repeatedly_receive_each_notification_once_and_in_order() {
    const N_EVENTS: usize = 2_000;
    const N_CLIENTS: usize = 5;
    let (mut random, _) = seed::generator("clients cut again and again");
    let server = RedisServer::start();
    for node in [
        Node::builder().start(),
        Node::builder().redis(server.url()).start(),
    ] {
        let followers: Vec<_> = (0..N_CLIENTS)
            .map(|client| node.follower(&format!("u{client}")))
            .collect();
        let publisher = node.publisher();
        let expected: Vec<String> = (0..N_EVENTS).map(|n| n.to_string()).collect();
        for batch in expected.chunks(20) {
            let events: Vec<_> = batch
                .iter()
                .map(|id| event(id, "resume", json!({ "everyone": true })))
                .collect();
            publisher.publish(&events);
            // Often cuts a connection in the middle of the batch just published.
            followers[random.random_range(0..N_CLIENTS)]
                .cut(Duration::from_millis(random.random_range(0..50)));
        }
        let mut n_connections = 0;
        for follower in followers {
            let record = follower.wait(SOON, "the last event", |record| {
                record
                    .notifications
                    .last()
                    .is_some_and(|n| n.id == expected[N_EVENTS - 1])
            });
            let received: Vec<&String> = record.notifications.iter().map(|n| &n.id).collect();
            assert!(
                received.iter().copied().eq(&expected),
                "received {received:?}"
            );
            assert_eq!(record.gaps, Vec::<String>::new());
            n_connections += record.connections;
        }
        assert!(
            n_connections > 5 * N_CLIENTS,
            "only {n_connections} connections: the clients were hardly cut"
        );
    }
}

#[test]
fn a_client_that_received_no_notification_resumes_from_its_cursor_and_misses_nothing() {
    let node = Node::builder().start();
    let stream = node.stream("42");
    let kept = stream.last_event_id().to_owned();
    drop(stream);
    let ids = ["a", "b", "c"];
    node.publisher()
        .publish(&ids.map(|id| event(id, "resume", json!({ "user": "42" }))));
    // As browsers send it, and as polyfills do that cannot set headers.
    let by_header = Request::new(node.addr(), "user=42").last_event_id(&kept);
    let by_query = ["last_event_id", "lastEventId", "evs_last_event_id"]
        .map(|name| Request::new(node.addr(), &format!("user=42&{name}={kept}")));
    let earliest = Request::new(node.addr(), "user=42&last_event_id=earliest");
    // Some clients always send the header, even without an id.
    let without_one = earliest.clone().header("Last-Event-ID", " ");
    for request in [by_header, earliest, without_one]
        .into_iter()
        .chain(by_query)
    {
        let mut stream = request.clone().open(SOON).expect("open a stream");
        let received = ids.map(|_| stream.next_notification(SOON).id);
        assert_eq!(received, ids, "{request:?}");
    }
    // The id that a browser sends on a reconnect is newer than the one in the URL that the page
    // built.
    let newest = node.stream("42").last_event_id().to_owned();
    let mut stream = Request::new(node.addr(), &format!("user=42&last_event_id={kept}"))
        .last_event_id(&newest)
        .open(SOON)
        .expect("open a stream");
    node.publisher()
        .publish(&[event("d", "resume", json!({ "user": "42" }))]);
    assert_eq!(stream.next_notification(SOON).id, "d");
}

#[test]
fn a_stream_ends_cleanly_before_a_restart_of_its_node_and_resumes_after_it() {
    let mut node = Node::builder().data().start();
    let mut stream = node.stream("42");
    node.publisher()
        .publish(&[event("a", "resume", json!({ "user": "42" }))]);
    assert_eq!(stream.next_notification(SOON).id, "a");
    let status = node.terminate(Duration::from_secs(60));
    assert!(status.success(), "{status}");
    let (frames, stop) = stream.read_to_end(SOON);
    assert!(
        matches!(stop, StreamEnd::Complete),
        "{stop:?} after {frames:?}"
    );
    assert!(
        frames.iter().any(|frame| frame.state() == Some("close")),
        "{frames:?}"
    );
    let kept = stream.last_event_id().to_owned();
    node.restart();
    node.publisher()
        .publish(&[event("b", "resume", json!({ "user": "42" }))]);
    let mut stream = Request::new(node.addr(), "user=42")
        .last_event_id(&kept)
        .open(SOON)
        .expect("open a stream");
    assert_eq!(stream.next_notification(SOON).id, "b");
}
