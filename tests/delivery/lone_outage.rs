//! Outages of Redis as clients of several nodes see them: a node that alone has lost Redis sends its
//! clients to another; where no node has it, they stay.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::json;

use crate::harness::eventually;
use crate::harness::node::{Builder, Node, SOON};
use crate::harness::proxy::Proxy;
use crate::harness::publish::event;
use crate::harness::redis::RedisServer;
use crate::harness::sse::{Frame, Request, Stream, StreamEnd};

/// How long eventual conditions may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
const N_STREAMS: usize = 8;
const CLOSED: &str = "pointsman_streams_closed_total{reason=\"unavailable\"}";

/// A node that would let a stream without a known start wait for longer than a test.
fn node_on(proxy: &Proxy) -> Builder {
    Node::builder()
        .redis(proxy.url())
        .config("[limits]\nread_wait = \"10m\"\n[plugins.discard]\nenabled = false")
}

fn streams(node: &Node) -> Vec<Stream> {
    (0..N_STREAMS)
        .map(|user| node.stream(&format!("u{user}")))
        .collect()
}

/// Waits until each of the two nodes has read the registration of the other: both have registered
/// again since both are registered.
fn acquainted(server: &RedisServer) {
    let entries = || -> BTreeMap<String, String> { server.command("HGETALL pointsman:nodes") };
    let first = eventually(SOON, "both nodes register", || {
        Some(entries()).filter(|entries| entries.len() == 2)
    });
    eventually(SOON, "both nodes register again", || {
        let now = entries();
        first
            .iter()
            .all(|(name, entry)| now.get(name) != Some(entry))
            .then_some(())
    });
}

fn publish(node: &Node, id: &str) {
    let to_all = event(id, "t", json!({ "everyone": true }));
    node.publisher().publish_surely(&[to_all], PATIENCE);
}

fn readyz(node: &Node, status: u16) {
    eventually(PATIENCE, &format!("readiness is {status}"), || {
        (node.admin("/readyz").status == status).then_some(())
    });
}

fn assert_unavailable(close: &Frame) {
    assert_eq!(
        close.data.as_deref(),
        Some("{\"reason\":\"unavailable\"}"),
        "{close:?}"
    );
    assert!(close.retry.is_some(), "{close:?}");
}

/// Asserts that the node refuses a stream with one frame and ends it.
fn assert_refused(request: Request) {
    let request = request.header("Connection", "close");
    let mut stream = request.open(SOON).expect("200");
    let (frames, end) = stream.read_to_end(SOON);
    assert!(matches!(end, StreamEnd::Complete), "{end:?}");
    let [close] = frames.as_slice() else {
        panic!("expected one frame: {frames:?}")
    };
    assert_eq!(close.state(), Some("close"));
    assert_unavailable(close);
}

#[test]
fn clients_of_a_node_that_alone_lost_redis_resume_on_another_exactly() {
    // Connections that are closed, and connections on which nothing arrives any more.
    for lose in [Proxy::cut, Proxy::hold_answers] {
        let server = RedisServer::start();
        let (link, other_link) = (Proxy::to(server.port()), Proxy::to(server.port()));
        let (cut_off, well) = (node_on(&link).start(), node_on(&other_link).start());
        let mut moving = streams(&cut_off);
        let mut staying = streams(&well);
        publish(&well, "before");
        for stream in moving.iter_mut().chain(&mut staying) {
            assert_eq!(stream.next_notification(SOON).id, "before");
        }

        acquainted(&server);
        lose(&link);
        publish(&well, "meanwhile");
        for (user, stream) in moving.iter_mut().enumerate() {
            assert_unavailable(&stream.next_state("close", PATIENCE));
            let (rest, end) = stream.read_to_end(SOON);
            assert!(rest.is_empty(), "{rest:?}");
            assert!(matches!(end, StreamEnd::Complete), "{end:?}");

            let user = format!("user=u{user}");
            let kept = stream.last_event_id().to_owned();
            assert_refused(Request::new(cut_off.addr(), &user));
            assert_refused(Request::new(cut_off.addr(), &user).last_event_id(&kept));
            *stream = Request::new(well.addr(), &user)
                .last_event_id(&kept)
                .open(SOON)
                .expect("200");
            assert_eq!(stream.next_notification(SOON).id, "meanwhile");
        }
        assert_eq!(cut_off.metric(CLOSED), N_STREAMS as f64);
        assert_eq!(well.metric(CLOSED), 0.0);
        let report = cut_off.admin("/readyz");
        assert!(
            report.status == 503 && report.body.contains("streams: another node has the broker"),
            "{report:?}"
        );

        link.heal();
        readyz(&cut_off, 200);
        let mut returned = cut_off.stream("u0");
        publish(&cut_off, "after");
        assert_eq!(returned.next_notification(SOON).id, "after");
        for stream in &mut moving {
            assert_eq!(stream.next_notification(SOON).id, "after");
        }
        for stream in &mut staying {
            assert_eq!(stream.next_notification(SOON).id, "meanwhile");
            assert_eq!(stream.next_notification(SOON).id, "after");
        }
    }
}

#[test]
fn streams_stay_open_while_no_node_has_redis() {
    for freezes in [false, true] {
        let mut server = RedisServer::with(&["--appendonly", "yes", "--appendfsync", "always"]);
        let links = [Proxy::to(server.port()), Proxy::to(server.port())];
        let nodes = links.each_ref().map(|link| node_on(link).start());
        let mut open: Vec<Vec<Stream>> = nodes.iter().map(streams).collect();
        publish(&nodes[0], "before");
        for stream in open.iter_mut().flatten() {
            assert_eq!(stream.next_notification(SOON).id, "before");
        }
        let late =
            Request::new(nodes[0].addr(), "user=u0").last_event_id(open[0][0].last_event_id());

        acquainted(&server);
        if freezes {
            server.pause();
        } else {
            server.kill();
        }
        // Each node asks the other and is told that it is not ready. Later answers are the same:
        // the silence only becomes longer.
        for node in &nodes {
            eventually(PATIENCE, "the other node has asked this one", || {
                let refused = "pointsman_requests_refused_total{reason=\"unavailable\"}";
                (node.metric(refused) >= 3.0).then_some(())
            });
        }
        let mut late = late.open(SOON).expect("200");
        if freezes {
            server.resume();
        } else {
            server.restart();
        }
        for node in &nodes {
            readyz(node, 200);
        }
        publish(&nodes[1], "after");
        for stream in open.iter_mut().flatten().chain([&mut late]) {
            assert_eq!(stream.next_notification(PATIENCE).id, "after");
        }
        for node in &nodes {
            assert_eq!(node.metric(CLOSED), 0.0);
        }
    }
}
