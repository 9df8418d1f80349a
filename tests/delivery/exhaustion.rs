//! Attacks on the memory and the places of a node, over its sockets: each is bounded, and other
//! users are served meanwhile. `docs/security.md` lists them.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use serde_json::{Value, json};

use crate::harness::eventually;
use crate::harness::http2::{DATA, HEADERS, Multiplexed, RST_STREAM};
use crate::harness::node::{Node, SOON};
use crate::harness::publish::event;

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
    let node = Node::builder().config(LEAN).start();
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
