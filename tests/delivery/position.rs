//! The position of a stream: its head means "from here on", and a position before the first
//! notification is as good as any other. Redis receives the events directly, because an XADD does
//! not wait for the node.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::harness::eventually;
use crate::harness::node::{Node, SOON};
use crate::harness::publish::{event, xadd};
use crate::harness::redis::RedisServer;
use crate::harness::sse::{Request, Stream, StreamEnd};

const SOURCE: &str = "pointsman:events";

fn add(connection: &mut redis::Connection, source: &str, id: &str, user: &str) {
    let fields = [("type", "t"), ("user", user), ("id", id)];
    let fields = fields.map(|(name, value)| (name, value.to_owned()));
    xadd(connection, source, &[fields.to_vec()]);
}

/// Reads the head only: `onopen` of an `EventSource` fires then.
fn open(node: &Node, query: &str, last_event_id: &str) -> Stream {
    Request::new(node.addr(), query)
        .last_event_id(last_event_id)
        .open(SOON)
        .expect("open a stream")
}

/// A page of `GET /v1/notifications`: its events, the number of its gaps, and its cursor.
fn page(node: &Node, query: &str) -> (Vec<String>, usize, String) {
    let page = node
        .request("GET", &format!("/v1/notifications?{query}"))
        .json();
    let list = |name: &str| page[name].as_array().expect("a list").clone();
    let ids = list("notifications")
        .iter()
        .map(|item| item["data"]["id"].as_str().expect("an id").to_owned())
        .collect();
    let cursor = page["cursor"].as_str().expect("a cursor").to_owned();
    (ids, list("gaps").len(), cursor)
}

#[test]
fn an_event_added_once_the_head_has_arrived_is_received() {
    let server = RedisServer::start();
    let node = Node::builder().redis(server.url()).start();
    let mut connection = server.connection();
    for n in 0..50 {
        let user = format!("u{n}");
        let mut stream = open(&node, &format!("user={user}"), "");
        add(&mut connection, SOURCE, &n.to_string(), &user);
        assert_eq!(stream.next_notification(SOON).id, n.to_string());
        assert!(
            stream.text().starts_with(": pointsman\nid: "),
            "the first cursor must begin the stream: {stream:?}"
        );
    }
}

#[test]
fn an_event_added_after_a_page_is_received_on_a_stream_from_its_cursor() {
    let server = RedisServer::start();
    let node = Node::builder().redis(server.url()).start();
    let mut connection = server.connection();
    for n in 0..10 {
        let (ids, n_gaps, cursor) = page(&node, "user=42");
        assert_eq!((ids.len(), n_gaps), (n * 2, 0));
        add(&mut connection, SOURCE, &format!("before {n}"), "42");
        let mut stream = open(&node, "user=42", &cursor);
        add(&mut connection, SOURCE, &format!("after {n}"), "42");
        for id in [format!("before {n}"), format!("after {n}")] {
            assert_eq!(stream.next_notification(SOON).id, id);
        }
    }
}

/// Redis does not answer, so the node cannot know where the stream starts. A client with a cursor
/// has its position and waits on an open stream.
#[test]
fn a_stream_whose_position_is_unknown_in_time_is_closed_and_one_with_a_cursor_opens_at_once() {
    let server = RedisServer::start();
    let node = Node::builder()
        .redis(server.url())
        .environment("POINTSMAN_LIMITS_READ_WAIT", "1s")
        .start();
    let kept = node.stream("42").last_event_id().to_owned();
    server.pause();
    let begin = Instant::now();
    let (frames, stop) = open(&node, "user=42", "").read_to_end(SOON);
    assert!(matches!(stop, StreamEnd::Complete), "{stop:?}");
    assert!(begin.elapsed() >= Duration::from_secs(1), "{frames:?}");
    let [close] = frames.as_slice() else {
        panic!("expected one frame: {frames:?}")
    };
    assert_eq!(
        (close.state(), close.data.as_deref(), close.retry.is_some()),
        (Some("close"), Some("{\"reason\":\"unavailable\"}"), true)
    );
    let mut stream = open(&node, "user=42", &kept);
    stream.next_state("cursor", Duration::from_millis(900));
    server.resume();
    add(&mut server.connection(), SOURCE, "a", "42");
    assert_eq!(stream.next_notification(SOON).id, "a");
}

#[test]
fn a_client_that_disconnects_while_its_position_is_read_releases_its_stream() {
    let server = RedisServer::start();
    let node = Node::builder()
        .redis(server.url())
        .config("[stream]\nmax_open = 1")
        .environment("POINTSMAN_LIMITS_READ_WAIT", "1h")
        .start();
    server.pause();
    let mut socket = TcpStream::connect(node.addr()).expect("connect");
    write!(
        socket,
        "GET /v1/stream?user=42 HTTP/1.1\r\nHost: {}\r\n\r\n",
        node.addr()
    )
    .expect("send");
    let n_open = |n: f64| {
        eventually(SOON, &format!("{n} streams are open"), || {
            (node.metric("pointsman_streams_open") == n).then_some(())
        });
    };
    n_open(1.0);
    socket
        .set_read_timeout(Some(Duration::from_millis(100)))
        .expect("set a timeout");
    let early = socket.read(&mut [0; 1]);
    assert!(
        early.is_err(),
        "the head must wait for the position: {early:?}"
    );
    drop(socket);
    n_open(0.0);
    server.resume();
    // The only permit is free again.
    eventually(SOON, "a stream opens", || {
        let mut stream = open(&node, "user=42", "");
        let frame = stream.next_frame(SOON).expect("a frame");
        (frame.state() == Some("cursor")).then_some(())
    });
}

/// On a store that never removed anything: a page read, and a stream cut, before the first event.
#[test]
fn a_position_before_the_first_event_is_not_a_gap() {
    let server = RedisServer::start();
    for node in [
        Node::builder().start(),
        Node::builder().redis(server.url()).start(),
    ] {
        let (ids, n_gaps, cursor) = page(&node, "user=42");
        assert_eq!((ids.len(), n_gaps), (0, 0));
        let mut earliest = open(&node, "user=42", "earliest");
        earliest.next_state("cursor", SOON);
        let kept = earliest.last_event_id().to_owned();
        drop(earliest);
        node.publisher()
            .publish(&[event("a", "t", json!({ "user": "42" }))]);
        node.await_outcomes(1, SOON);
        let (ids, n_gaps, _) = page(&node, &format!("user=42&after={cursor}"));
        assert_eq!((ids, n_gaps), (vec!["a".to_owned()], 0));
        for id in [&kept, &cursor, "earliest"] {
            // Panics on a gap.
            let mut stream = open(&node, "user=42", id);
            assert_eq!(stream.next_notification(SOON).id, "a", "from {id}");
        }
    }
}

/// A source is added node by node: while both configurations serve, a client alternates between
/// them.
#[test]
fn a_source_that_only_some_nodes_have_is_not_delivered_again_at_a_change_of_node() {
    const ADDED: &str = "pointsman:added";
    let server = RedisServer::start();
    let narrow = Node::builder().redis(server.url()).start();
    let wide = Node::builder()
        .redis(server.url())
        .config(&format!("[broker]\nsources = [\"{SOURCE}\", \"{ADDED}\"]"))
        .start();
    let mut connection = server.connection();
    let mut stream = open(&wide, "user=42", "");
    let mut resume = |stream: &mut Stream, node: &Node, added: &[&str]| {
        let kept = stream.last_event_id().to_owned();
        *stream = open(node, "user=42", &kept);
        for id in added {
            assert_eq!(stream.next_notification(SOON).id, *id);
        }
        let id = format!("after {kept}");
        add(&mut connection, SOURCE, &id, "42");
        assert_eq!(stream.next_notification(SOON).id, id);
    };
    let mut other = server.connection();
    add(&mut other, ADDED, "a", "42");
    assert_eq!(stream.next_notification(SOON).id, "a");
    resume(&mut stream, &narrow, &[]);
    resume(&mut stream, &wide, &[]);
    resume(&mut stream, &narrow, &[]);
    add(&mut other, ADDED, "b", "42");
    wide.await_outcomes(2, SOON);
    resume(&mut stream, &wide, &["b"]);
    resume(&mut stream, &narrow, &[]);
    // A device acknowledges on the node that does not have the source, and returns on the other.
    let body = json!({ "id": stream.last_event_id(), "device": "laptop" }).to_string();
    let acknowledged = narrow.send(
        "POST",
        "/v1/acks?user=42",
        &[("Content-Type", "application/json")],
        body.as_bytes(),
    );
    assert_eq!(acknowledged.status, 204, "{acknowledged:?}");
    let mut stream = open(&narrow, "user=42&device=laptop", "");
    resume(&mut stream, &wide, &[]);
    // A page carries it as well.
    let (_, _, cursor) = page(
        &narrow,
        &format!("user=42&after={}", stream.last_event_id()),
    );
    let mut stream = open(&wide, "user=42", &cursor);
    resume(&mut stream, &wide, &[]);
}

/// Redis is restarted again and again while nobody publishes. Each restart is an epoch that ends
/// where it began, so none of them concerns the cursor.
#[test]
fn a_cursor_resumes_exactly_after_any_number_of_idle_restarts() {
    let server = RedisServer::start();
    let node = Node::builder().redis(server.url()).start();
    let mut connection = server.connection();
    let mut stream = open(&node, "user=42", "");
    add(&mut connection, SOURCE, "a", "42");
    assert_eq!(stream.next_notification(SOON).id, "a");
    let kept = stream.last_event_id().to_owned();
    drop(stream);
    for _ in 0..40 {
        server.change_replid();
        // The first read begins the epoch.
        page(&node, "user=42");
    }
    // Panics on a gap.
    let mut stream = open(&node, "user=42", &kept);
    add(&mut connection, SOURCE, "b", "42");
    assert_eq!(stream.next_notification(SOON).id, "b");
}
