//! Resource limits between clients: stream permits and plugin threads. Streams are bounded on every
//! transport, a stream that accepts no data is cut alone, and a dry run waits behind publishers.

use std::io::Write as _;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::harness::eventually;
use crate::harness::guests::core_module;
use crate::harness::http2::{DATA, HEADERS, Multiplexed, RST_STREAM};
use crate::harness::node::{Node, SOON};
use crate::harness::plugins::Plugins;
use crate::harness::publish::event;
use crate::harness::sse::{Request, StreamEnd};

fn n_stalled(node: &Node) -> f64 {
    node.metric("pointsman_streams_closed_total{reason=\"stalled\"}")
}

#[test]
fn a_stalled_http_2_stream_is_cut_without_the_others_of_its_connection() {
    let node = Node::builder()
        .config("[stream]\nheartbeat_interval = '1s'\nstall_timeout = '2s'\n")
        .start();
    let mut client = Multiplexed::connect(node.addr());
    client.get(1, "/v1/stream?user=idle");
    client.get(3, "/v1/stream?user=42");
    client.open_window(3, 1 << 20);
    client.await_text(3, "event: cursor");
    // Only heartbeats are pending for the stalled stream.
    let deadline = Instant::now() + SOON;
    loop {
        assert!(Instant::now() < deadline, "the stalled stream must be cut");
        match client.next(SOON) {
            Some((RST_STREAM, 1, _)) => break,
            Some((kind, 1, _)) => assert_eq!(
                kind, HEADERS,
                "a stream with a closed window must receive no data"
            ),
            Some((kind, _, _)) => assert_eq!(kind, DATA, "the other stream must continue"),
            None => panic!("the connection must stay open"),
        }
    }
    assert_eq!(n_stalled(&node), 1.0);
    eventually(SOON, "the cut stream is no longer counted", || {
        (node.metric("pointsman_streams_open") == 1.0).then_some(())
    });
    node.publisher()
        .publish(&[event("a", "t", json!({ "user": "42" }))]);
    client.await_text(3, "\"id\":\"a\"");
}

#[test]
fn a_client_that_stops_reading_is_cut_and_one_that_reads_is_not() {
    let node = Node::builder()
        .config("[stream]\nheartbeat_interval = '1s'\nstall_timeout = '5s'\n")
        .start();
    let (mut reading, mut stopped) = (node.stream("42"), node.stream("42"));
    let (mut n, deadline) = (0, Instant::now() + 3 * SOON);
    // Publish until more is pending than socket buffers hold, and then until the stall timeout.
    while n_stalled(&node) < 1.0 {
        assert!(
            Instant::now() < deadline,
            "the client that stopped reading must be cut"
        );
        let id = format!("e{n}");
        node.publisher().publish(&[event(
            &id,
            "t",
            json!({ "user": "42", "data": "x".repeat(64 * 1024) }),
        )]);
        assert_eq!(reading.next_notification(SOON).id, id);
        n += 1;
    }
    let cut = loop {
        if let Err(stop) = stopped.next_frame(SOON) {
            break stop;
        }
    };
    assert!(matches!(cut, StreamEnd::Cut(_)), "{cut:?}");
    node.publisher()
        .publish(&[event("last", "t", json!({ "user": "42" }))]);
    assert_eq!(reading.next_notification(SOON).id, "last");
    assert_eq!(n_stalled(&node), 1.0);
}

#[test]
fn a_stream_above_the_limit_is_asked_to_reconnect_also_on_a_shared_connection() {
    let node = Node::builder().config("[stream]\nmax_open = 2\n").start();
    let first = node.stream("1");
    let mut client = Multiplexed::connect(node.addr());
    for stream in [1, 3] {
        client.get(stream, "/v1/stream?user=42");
        client.open_window(stream, 1 << 20);
        client.await_text(
            stream,
            if stream == 1 {
                "event: cursor"
            } else {
                "event: close\ndata: {\"reason\":\"overloaded\"}"
            },
        );
    }
    let refused = Request::new(node.addr(), "user=42")
        .open(SOON)
        .expect("200")
        .next_state("close", SOON);
    assert!(refused.retry.is_some(), "{refused:?}");
    drop(first);
    eventually(SOON, "a stream permit is free again", || {
        let mut stream = Request::new(node.addr(), "user=42").open(SOON).ok()?;
        (stream.next_frame(SOON).ok()?.state() == Some("cursor")).then_some(())
    });
}

/// A dry run of many events with a slow plugin takes no thread from live events.
#[test]
fn a_large_dry_run_delays_no_live_event_and_ends_when_its_client_disconnects() {
    let plugins = Plugins::new(&[("unruly.wasm", core_module("unruly"))]);
    // Each event takes two attempts of half a second: all of them would take half an hour.
    let node = Node::builder()
        .config("[plugins.unruly]\ndeadline = '500ms'\n")
        .plugins(plugins.dir())
        .start();
    let mut stream = node.stream("42");
    let calls =
        || node.metric("pointsman_plugin_calls_total{plugin=\"unruly\",outcome=\"deadline\"}");
    let loops: Vec<_> = (0..2_000)
        .map(|n| event(&format!("loop-{n}"), "loop", json!({})))
        .collect();
    let body = serde_json::to_string(&loops).expect("JSON");
    let mut client = TcpStream::connect(node.addr()).expect("connect");
    let head = "POST /v1/events?dry_run=true HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/cloudevents-batch+json";
    write!(
        client,
        "{head}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .expect("write");
    eventually(SOON, "the dry run is running", || {
        (calls() >= 1.0).then_some(())
    });
    for n in 0..3 {
        let id = format!("live-{n}");
        node.publisher().publish(&[event(&id, "good", json!({}))]);
        assert_eq!(stream.next_notification(SOON).id, id);
    }
    let n_before = calls();
    eventually(SOON, "the dry run continues", || {
        (calls() > n_before).then_some(())
    });
    drop(client);
    // The current event takes two calls of about a second in total; after them, no more follow.
    let mut last = (calls(), Instant::now());
    eventually(SOON, "the dry run has ended", || {
        let now = calls();
        if now > last.0 {
            last = (now, Instant::now());
        }
        (last.1.elapsed() > Duration::from_secs(3)).then_some(())
    });
}
