//! Priority at a socket that is not read: an urgent notification goes ahead of everything that has
//! not left the node.

use std::collections::HashSet;
use std::fs;
use std::net::SocketAddr;

use serde_json::json;

use crate::harness::eventually;
use crate::harness::node::{Node, SOON};
use crate::harness::publish::event;
use crate::harness::sse::{Notification, Request, Stream};

const N_LOW: usize = 500;
/// Bytes of one notification. All of them together are several times what a node has to write ahead
/// for a connection to be fast.
const BYTES: usize = 8 * 1024;
/// Bytes taken from the queues and not yet passed to the kernel: one write of 16 KiB and the excess
/// of its last notification.
const UNDER_WAY: usize = 16 * 1024 + BYTES + 1024;

#[test]
fn an_urgent_notification_overtakes_all_not_yet_in_the_socket_and_a_cut_loses_nothing() {
    let node = Node::builder()
        .config("[stream]\nstall_timeout = '10m'\n")
        .start();
    // One stream for each point at which it is cut.
    let cuts = [
        0,
        1,
        2,
        10,
        40,
        80,
        120,
        160,
        200,
        256,
        300,
        400,
        N_LOW,
        N_LOW + 1,
    ];
    let streams: Vec<_> = cuts.map(|_| node.stream("42")).into();
    // Notifications that a reading stream has received are available to all streams.
    let mut witness = node.stream("42");
    let low = |n: usize| {
        event(
            &format!("low{n}"),
            "t",
            json!({ "user": "42", "priority": "low", "data": "x".repeat(BYTES) }),
        )
    };
    for begin in (0..N_LOW).step_by(100) {
        node.publisher()
            .publish(&(begin..begin + 100).map(low).collect::<Vec<_>>());
    }
    while witness.next_notification(SOON).id != format!("low{}", N_LOW - 1) {}
    node.publisher().publish(&[event(
        "urgent",
        "t",
        json!({ "user": "42", "priority": "urgent" }),
    )]);
    assert_eq!(witness.next_notification(SOON).id, "urgent");
    let mut resumed = Vec::new();
    for (cut, mut stream) in cuts.into_iter().zip(streams) {
        let in_socket = bytes_in_the_kernel(&stream, node.addr());
        assert!(
            in_socket < N_LOW * BYTES / 2,
            "the node wrote {in_socket} bytes to a client that does not read"
        );
        let mut received: Vec<Notification> = Vec::new();
        while received.len() < cut {
            received.push(stream.next_notification(SOON));
            if received.last().is_some_and(|last| last.id == "urgent") {
                let n_before = received.len() - 1;
                assert!(
                    (n_before * BYTES) < in_socket + UNDER_WAY,
                    "{n_before} low-priority notifications arrived first with {in_socket} bytes in the socket"
                );
            }
        }
        let mut again = Request::new(node.addr(), "user=42")
            .last_event_id(stream.last_event_id())
            .open(SOON)
            .expect("reopen the stream");
        drop(stream);
        while received.len() < N_LOW + 1 {
            received.push(again.next_notification(SOON));
        }
        let ids: HashSet<&str> = received
            .iter()
            .map(|notification| notification.id.as_str())
            .collect();
        assert_eq!(
            ids.len(),
            N_LOW + 1,
            "each arrives once when the stream is cut after {cut}"
        );
        let order: Vec<&str> = received
            .iter()
            .map(|notification| notification.id.as_str())
            .filter(|id| *id != "urgent")
            .collect();
        assert_eq!(
            order,
            (0..N_LOW).map(|n| format!("low{n}")).collect::<Vec<_>>(),
            "cut after {cut}"
        );
        resumed.push(again);
    }
    // Nothing else is pending.
    node.publisher()
        .publish(&[event("last", "t", json!({ "user": "42" }))]);
    for mut stream in resumed {
        assert_eq!(stream.next_notification(SOON).id, "last");
    }
}

/// More notifications than a replay queues at once: it waits for room, which only the expiry makes.
#[test]
fn an_unread_stream_whose_queued_notifications_all_expire_continues_when_it_is_read() {
    let node = Node::builder()
        .config("[stream]\nstall_timeout = '10m'\n")
        .start();
    let mut stream = node.stream("42");
    let mut witness = node.stream("42");
    let brief = |n: usize| {
        event(
            &format!("brief{n}"),
            "t",
            json!({ "user": "42", "ttl": "3s", "data": "x".repeat(BYTES) }),
        )
    };
    node.publisher()
        .publish(&(0..N_LOW).map(brief).collect::<Vec<_>>());
    while witness.next_notification(SOON).id != format!("brief{}", N_LOW - 1) {}
    assert!(
        bytes_in_the_kernel(&stream, node.addr()) < N_LOW * BYTES / 2,
        "most of them are queued"
    );
    eventually(SOON, "they have expired", || {
        let page = node.request("GET", "/v1/notifications?user=42").json();
        (page["notifications"] == json!([])).then_some(())
    });
    node.publisher()
        .publish(&[event("lasting", "t", json!({ "user": "42" }))]);
    assert_eq!(witness.next_notification(SOON).id, "lasting");
    while stream.next_notification(SOON).id != "lasting" {}
}

/// Bytes written by the node and not read by the client.
fn bytes_in_the_kernel(stream: &Stream, node: SocketAddr) -> usize {
    let client = stream
        .scissors()
        .and_then(|socket| socket.local_addr())
        .expect("the client's address");
    let table = fs::read_to_string("/proc/net/tcp").expect("read /proc/net/tcp");
    let queues = |local: SocketAddr, remote: SocketAddr| {
        let (local, remote) = (
            format!(":{:04X}", local.port()),
            format!(":{:04X}", remote.port()),
        );
        let mut lines = table
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>());
        let line = lines
            .find(|line| line.len() > 4 && line[1].ends_with(&local) && line[2].ends_with(&remote))
            .expect("the connection");
        let (sent, received) = line[4].split_once(':').expect("two queues");
        [sent, received]
            .map(|queue| usize::from_str_radix(queue, 16).expect("a hexadecimal number"))
    };
    let ([unacknowledged, _], [_, unread]) = (queues(node, client), queues(client, node));
    unacknowledged + unread
}
