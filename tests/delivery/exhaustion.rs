//! Attacks on the memory and the places of a node, over its sockets: each is bounded, and other
//! users are served meanwhile. `docs/security.md` lists them.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use serde_json::{Value, json};

use crate::harness::eventually;
use crate::harness::guests::core_module;
use crate::harness::http2::{DATA, HEADERS, Multiplexed, RST_STREAM};
use crate::harness::node::{Node, SOON};
use crate::harness::plugins::Plugins;
use crate::harness::publish::event;
use crate::harness::redis::RedisServer;
use crate::harness::sse::Request;

/// A configuration with as few plugins to compile at startup as possible.
const LEAN: &str = "[plugins.discard]\nenabled = false\n";
const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// Publishes `n` notifications of about 200 KiB to a user and waits until they are stored.
fn publish_large(node: &Node, user: &str, n: usize) {
    let before = node.metric("pointsman_events_total") as usize;
    for first in (0..n).step_by(10) {
        let events: Vec<Value> = (first..n.min(first + 10))
            .map(|n| {
                let more = json!({ "user": user, "data": "x".repeat(200 * KIB) });
                event(&format!("{user}-{n}"), "t", more)
            })
            .collect();
        node.publisher().publish(&events);
    }
    node.await_outcomes(before + n, SOON);
}

fn ids(page: &Value) -> Vec<String> {
    let items = page["notifications"].as_array().expect("a page");
    items
        .iter()
        .map(|item| item["data"]["id"].as_str().expect("an id").to_owned())
        .collect()
}

/// The kind of the next frame of this stream other than window updates; `None` once the connection
/// is closed or nothing arrives.
fn next_kind(client: &mut Multiplexed, stream: u32) -> Option<u8> {
    loop {
        let (kind, of, _) = client.next(SOON)?;
        if of == stream {
            return Some(kind);
        }
    }
}

#[test]
fn a_page_ends_at_four_mebibytes_and_the_next_one_continues() {
    let node = Node::builder().config(LEAN).start();
    publish_large(&node, "42", 30);
    let (mut all, mut after) = (Vec::new(), "earliest".to_owned());
    loop {
        let path = format!("/v1/notifications?user=42&limit=1000&after={after}");
        let answer = node.request("GET", &path);
        assert!(
            answer.body.len() < 4 * MIB + 300 * KIB,
            "{}",
            answer.body.len()
        );
        let page = answer.json();
        all.extend(ids(&page));
        page["cursor"]
            .as_str()
            .expect("a cursor")
            .clone_into(&mut after);
        if page["more"] == false {
            break;
        }
        assert!(answer.body.len() >= 4 * MIB, "{}", answer.body.len());
    }
    let expected: Vec<String> = (0..30).map(|n| format!("42-{n}")).collect();
    assert_eq!(all, expected);
}

/// One token, four HTTP/2 connections with closed windows, 128 requests each.
#[test]
fn unread_pages_of_one_user_hold_bounded_memory_and_other_users_are_served() {
    // Longer than the default: on a busy machine a read of the other user may wait for processor
    // time.
    let config = format!("{LEAN}[limits]\nread_wait = \"15s\"\n");
    let node = Node::builder().config(&config).start();
    publish_large(&node, "mallory", 100);
    publish_large(&node, "42", 1);
    let page = |user: &str| {
        let began = Instant::now();
        let path = format!("/v1/notifications?user={user}&limit=1000");
        let answer = node.request("GET", &path);
        assert_eq!(answer.status, 200, "{answer:?}");
        (ids(&answer.json()), began.elapsed())
    };
    page("mallory");
    let before = node.memory_kib() as usize * KIB;
    let mut clients: Vec<Multiplexed> = (0..4).map(|_| Multiplexed::connect(node.addr())).collect();
    for client in &mut clients {
        for n in 0..128 {
            client.get(2 * n + 1, "/v1/notifications?user=mallory&limit=1000");
        }
    }
    let refused = "pointsman_requests_refused_total{reason=\"overloaded\"}";
    let (mut highest, mut slowest) = (0, std::time::Duration::ZERO);
    eventually(SOON, "all requests have a response", || {
        highest = highest.max(node.memory_kib() as usize * KIB);
        let (found, latency) = page("42");
        assert_eq!(found, ["42-0"]);
        slowest = slowest.max(latency);
        // The user's share has room for few pages.
        (node.metric(refused) >= 480.0).then_some(())
    });
    eprintln!(
        "unread pages: {} MiB before, {} MiB at most; another user's page took {slowest:?} at most",
        before / MIB,
        highest / MIB
    );
    assert!(highest < before + 128 * MIB, "{before} to {highest}");
    let mut other = node.stream("42");
    node.publisher()
        .publish(&[event("last", "t", json!({ "user": "42" }))]);
    assert_eq!(other.next_notification(SOON).id, "last");
}

/// A connection on which this head of a `POST /v1/events` was sent. Returns once the node has begun
/// to read the body.
fn begin_publishing(addr: SocketAddr, kind: &str, n_bytes: usize, query: &str) -> TcpStream {
    let mut socket = TcpStream::connect(addr).expect("connect");
    socket.set_read_timeout(Some(SOON)).expect("set a timeout");
    let head = format!(
        "POST /v1/events{query} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {n_bytes}\r\nExpect: 100-continue\r\n\r\n"
    );
    socket.write_all(head.as_bytes()).expect("write");
    let mut answer = [0; 25];
    socket.read_exact(&mut answer).expect("100 Continue");
    assert_eq!(&answer, b"HTTP/1.1 100 Continue\r\n\r\n");
    socket
}

const STRUCTURED: &str = "application/cloudevents+json";
const BATCH: &str = "application/cloudevents-batch+json";

/// The status of the response that ends a connection.
fn status_of(mut socket: TcpStream) -> String {
    let mut answer = Vec::new();
    // A reset also ends the answer.
    drop(socket.read_to_end(&mut answer));
    let answer = String::from_utf8_lossy(&answer).into_owned();
    answer.split(' ').nth(1).unwrap_or_default().to_owned()
}

fn publish_one(node: &Node, id: &str) {
    let began = Instant::now();
    let more = json!({ "user": "42" });
    node.publisher().publish(&[event(id, "t", more)]);
    eprintln!("{id}: published in {:?}", began.elapsed());
}

#[test]
fn heads_without_bodies_do_not_keep_publishers_out() {
    // No request waits for a place.
    let config = format!("{LEAN}[limits]\nbody_stall_timeout = \"5s\"\npublish_wait = \"0s\"\n");
    let node = Node::builder().config(&config).start();
    // Each is read at the same time as the others, so that none has taken a place.
    let silent: Vec<_> = (0..80)
        .map(|_| begin_publishing(node.addr(), STRUCTURED, 100, ""))
        .collect();
    publish_one(&node, "a");
    for socket in silent {
        assert_eq!(status_of(socket), "408");
    }
    let refused = "pointsman_requests_refused_total{reason=\"timeout\"}";
    assert_eq!(node.metric(refused), 80.0);
    let mut stream = Request::new(node.addr(), "user=42&last_event_id=earliest")
        .open(SOON)
        .expect("200");
    assert_eq!(stream.next_notification(SOON).id, "a");
}

#[test]
fn unfinished_bodies_hold_bounded_memory_and_small_events_are_published() {
    let config = format!(
        "{LEAN}[limits]\nbody_stall_timeout = \"5s\"\npublish_wait = \"3s\"\nbody_bytes = {}\n",
        16 * MIB
    );
    let node = Node::builder().config(&config).start();
    publish_one(&node, "first");
    let before = node.memory_kib() as usize * KIB;
    let sockets: Vec<_> = (0..40)
        .map(|_| {
            let mut socket = begin_publishing(node.addr(), BATCH, 4 * MIB, "");
            let some_time = std::time::Duration::from_millis(50);
            socket
                .set_write_timeout(Some(some_time))
                .expect("set a timeout");
            // As much as the node and the socket take: 140 MiB together.
            drop(socket.write_all(&vec![b' '; 3584 * KIB]));
            socket
        })
        .collect();
    let ended = || {
        node.metric("pointsman_requests_refused_total{reason=\"timeout\"}")
            + node.metric("pointsman_requests_refused_total{reason=\"overloaded\"}")
    };
    let (mut highest, mut n) = (0, 0);
    eventually(2 * SOON, "all bodies are refused", || {
        highest = highest.max(node.memory_kib() as usize * KIB);
        n += 1;
        publish_one(&node, &format!("small-{n}"));
        (ended() >= 40.0).then_some(())
    });
    eprintln!(
        "unfinished bodies: {} MiB before, {} MiB at most",
        before / MIB,
        highest / MIB
    );
    assert!(highest < before + 64 * MIB, "{before} to {highest}");
    for socket in sockets {
        // Some are reset with bytes that the node did not read.
        let status = status_of(socket);
        assert!(["408", "503", ""].contains(&status.as_str()), "{status}");
    }
}

/// Requests that held a part of their room while they wait for the rest would all wait for one
/// another.
#[test]
fn large_requests_at_the_same_time_have_room_one_after_another() {
    let config = format!(
        "{LEAN}[limits]\npublish_wait = \"60s\"\nbody_bytes = {}\n",
        8 * MIB
    );
    let node = Node::builder().config(&config).start();
    let posting: Vec<_> = (0..6)
        .map(|n| {
            let publisher = node.publisher();
            let event = |m: usize| {
                let more = json!({ "user": "42", "data": "x".repeat(200 * KIB) });
                event(&format!("{n}-{m}"), "t", more)
            };
            let batch: Vec<Value> = (0..18).map(event).collect();
            std::thread::spawn(move || publisher.publish(&batch))
        })
        .collect();
    for request in posting {
        request.join().expect("every request is stored");
    }
    node.await_outcomes(6 * 18, SOON);
}

/// A dry run with a slow plugin.
#[test]
fn dry_runs_do_not_keep_publishers_out() {
    let plugins = Plugins::new(&[("unruly.wasm", core_module("unruly"))]);
    let node = Node::builder()
        .config("[plugins.unruly]\ndeadline = '500ms'\n[limits]\npublish_requests = 2\npublish_wait = '0s'\n")
        .plugins(plugins.dir())
        .start();
    let mut stream = node.stream("42");
    let loops: Vec<_> = (0..200)
        .map(|n| event(&format!("loop-{n}"), "loop", json!({})))
        .collect();
    let body = serde_json::to_string(&loops).expect("JSON");
    let _running: Vec<_> = (0..3)
        .map(|_| {
            let mut socket = begin_publishing(node.addr(), BATCH, body.len(), "?dry_run=true");
            socket.write_all(body.as_bytes()).expect("write");
            socket
        })
        .collect();
    let calls = "pointsman_plugin_calls_total{plugin=\"unruly\",outcome=\"deadline\"}";
    eventually(SOON, "a dry run is running", || {
        (node.metric(calls) >= 1.0).then_some(())
    });
    node.publisher()
        .publish(&[event("live", "good", json!({}))]);
    assert_eq!(stream.next_notification(SOON).id, "live");
}

/// Each stream is read by a user of its own, so that no two share a notification; Redis keeps them.
#[test]
fn streams_that_are_not_read_share_one_budget_and_lose_nothing() {
    const STREAMS: usize = 40;
    const EVENTS: usize = 50;
    let server = RedisServer::start();
    let config = format!(
        "{LEAN}[stream]\nmax_buffer_bytes = {}\nstall_timeout = \"10m\"\n",
        4 * MIB
    );
    let node = Node::builder().redis(server.url()).config(&config).start();
    let mut streams: Vec<_> = (0..STREAMS)
        .map(|n| node.stream(&format!("slow-{n}")))
        .collect();
    let mut reading = node.stream("42");
    let before = node.memory_kib() as usize * KIB;
    let id = |user: usize, n: usize| format!("{user}-{n}");
    let mut highest = 0;
    for n in 0..EVENTS {
        let mut events: Vec<Value> = (0..STREAMS)
            .map(|user| {
                let more = json!({ "user": format!("slow-{user}"), "data": "x".repeat(20 * KIB) });
                event(&id(user, n), "t", more)
            })
            .collect();
        events.push(event(&format!("live-{n}"), "t", json!({ "user": "42" })));
        node.publisher().publish(&events);
        assert_eq!(reading.next_notification(SOON).id, format!("live-{n}"));
        highest = highest.max(node.memory_kib() as usize * KIB);
    }
    let held = node.metric("pointsman_stream_buffer_bytes") as usize;
    let n_returned = node.metric("pointsman_replays_total{reason=\"memory\"}");
    eprintln!(
        "streams: {} KiB held after {n_returned} returns; {} MiB before, {} MiB at most",
        held / KIB,
        before / MIB,
        highest / MIB
    );
    // A stream above its fair share holds one notification more.
    assert!(held <= 4 * MIB + STREAMS * 24 * KIB, "{held}");
    assert!(n_returned >= 1.0);
    assert!(highest < before + 64 * MIB, "{before} to {highest}");
    for (user, stream) in streams.iter_mut().enumerate() {
        for n in 0..EVENTS {
            assert_eq!(stream.next_notification(SOON).id, id(user, n));
        }
    }
}

/// The test is the proxy: it names its clients.
#[test]
fn a_client_behind_a_trusted_proxy_has_a_bounded_number_of_requests_in_progress() {
    let config = format!(
        "{LEAN}[listen]\nmax_connections_per_address = 2\ntrusted_proxies = [\"127.0.0.0/8\"]\n"
    );
    let node = Node::builder().config(&config).start();
    let open = |client: &str| {
        let request = Request::new(node.addr(), "user=42").header("X-Forwarded-For", client);
        let mut stream = request.open(SOON).expect("200");
        let first = stream.next_frame(SOON).expect("a frame");
        let is_open = first.state() == Some("cursor");
        (stream, is_open)
    };
    let (first, is_open) = open("203.0.113.7");
    // The first addresses come from the client itself and from another proxy.
    let (_second, is_second_open) = open("198.51.100.1, 203.0.113.7, 127.0.0.9");
    assert!(is_open && is_second_open);
    assert!(!open("203.0.113.7").1);
    let ask = |client: &str| {
        let headers = [("x-forwarded-for", client)];
        node.send("POST", "/v1/acks?user=42", &headers, b"")
    };
    let refused = ask("203.0.113.7");
    assert_eq!(refused.status, 503, "{refused:?}");
    assert!(refused.header("retry-after").is_some(), "{refused:?}");
    // Others are not affected, nor are requests without a client, such as those of the proxy.
    assert!(open("198.51.100.1").1);
    assert_ne!(ask("198.51.100.1").status, 503);
    node.stream("42");
    drop(first);
    eventually(SOON, "the client may open another stream", || {
        open("203.0.113.7").1.then_some(())
    });
}

fn raw_request(addr: SocketAddr, path: &str) -> TcpStream {
    let mut socket = TcpStream::connect(addr).expect("connect");
    socket.set_read_timeout(Some(SOON)).expect("set a timeout");
    let head = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    socket.write_all(head.as_bytes()).expect("write");
    socket
}

#[test]
fn a_response_of_which_its_client_takes_nothing_is_cut_on_every_listener_and_protocol() {
    let config = format!("{LEAN}[stream]\nstall_timeout = \"2s\"\n");
    let node = Node::builder().config(&config).start();
    publish_large(&node, "42", 30);
    let page = "/v1/notifications?user=42&limit=1000";
    let stalled = || node.metric("pointsman_responses_stalled_total");
    for (n, (addr, path)) in [(node.addr(), page), (node.admin_addr(), "/v1/events")]
        .into_iter()
        .enumerate()
    {
        let mut socket = raw_request(addr, path);
        eventually(SOON, "the response is cut", || {
            (stalled() == n as f64 + 1.0).then_some(())
        });
        let mut answer = Vec::new();
        let end = socket.read_to_end(&mut answer);
        assert!(end.is_err(), "{path}: a whole response of {}", answer.len());
    }
    let mut client = Multiplexed::connect(node.addr());
    client.get(1, page);
    assert_eq!(next_kind(&mut client, 1), Some(HEADERS));
    assert_eq!(next_kind(&mut client, 1), Some(RST_STREAM));
    assert_eq!(stalled(), 3.0);
    // The other requests of the connection go on, also where a client takes a response slowly.
    client.get(3, "/v1/notifications?user=42&limit=1");
    assert_eq!(next_kind(&mut client, 3), Some(HEADERS));
    for _ in 0..4 {
        client.open_window(3, 40 * 1024);
        assert_eq!(next_kind(&mut client, 3), Some(DATA));
    }
    assert_eq!(stalled(), 3.0);
}
