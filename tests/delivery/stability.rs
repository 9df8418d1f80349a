//! Resource use: after thousands of streams a node holds as much as before, and an event to a large
//! group costs as much as one to a small group.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::json;

use crate::harness::eventually;
use crate::harness::node::{Node, SOON};
use crate::harness::publish::event;
use crate::harness::redis::RedisServer;
use crate::harness::sse::Request;

/// Streams that are open concurrently while thousands are opened and dropped.
const AT_ONCE: usize = 20;

#[test]
fn streams_subscriptions_and_memory_return_to_their_level_after_5000_connections() {
    let server = RedisServer::start();
    let node = Node::builder().redis(server.url()).start();
    // The first streams create lasting structures (threads' stacks, pools, caches); warm up before
    // measuring.
    come_and_go(&node, "early", 1_000);
    let before = Held::by(&node, &server, "early");
    come_and_go(&node, "late", 5_000);
    let after = Held::by(&node, &server, "late");
    assert_eq!(
        (after.n_channels, after.n_patterns, after.n_connections),
        (before.n_channels, before.n_patterns, before.n_connections)
    );
    eprintln!(
        "memory: {} KiB before, {} KiB after",
        before.memory_kib, after.memory_kib
    );
    let grown = after.memory_kib.saturating_sub(before.memory_kib);
    // The allocator keeps some freed memory; a leaked stream would cost more than 2 KiB, times
    // 5,000.
    assert!(
        grown < 10 * 1024,
        "the node grew from {} KiB to {} KiB",
        before.memory_kib,
        after.memory_kib
    );
}

/// The resources of a node without open streams.
struct Held {
    n_channels: usize,
    n_patterns: usize,
    /// The node's connections to Redis.
    n_connections: usize,
    memory_kib: u64,
}

impl Held {
    /// Waits until no stream is open, then measures. The node notices a lost client when it writes
    /// to it or reads its end.
    fn by(node: &Node, server: &RedisServer, prefix: &str) -> Self {
        eventually(SOON, "all streams are closed", || {
            (node.metric("pointsman_streams_open") == 0.0).then_some(())
        });
        let wanted = format!("*u:{prefix}-*");
        eventually(SOON, "all subscriptions of users are gone", || {
            let channels: Vec<String> = server.command(&format!("PUBSUB CHANNELS {wanted}"));
            channels.is_empty().then_some(())
        });
        let channels: Vec<String> = server.command("PUBSUB CHANNELS");
        let clients: String = server.command("CLIENT LIST");
        Self {
            n_channels: channels.len(),
            n_patterns: server.command("PUBSUB NUMPAT"),
            // One of them is this test's connection.
            n_connections: clients.lines().count() - 1,
            memory_kib: node.memory_kib(),
        }
    }
}

/// Opens this many streams, each of another user, and drops them: some before the response, some
/// after the first frame, some in the middle of the request.
fn come_and_go(node: &Node, prefix: &str, n_streams: usize) {
    let addr = node.addr();
    std::thread::scope(|scope| {
        for worker in 0..AT_ONCE {
            scope.spawn(move || {
                for n in (worker..n_streams).step_by(AT_ONCE) {
                    let query = format!("user={prefix}-{n}");
                    match n % 10 {
                        0 => say(
                            addr,
                            &format!("GET /v1/stream?{query} HTTP/1.1\r\nHost: localhost\r\n\r\n"),
                        ),
                        1 => say(
                            addr,
                            &format!(
                                "GET /v1/stream?{query} HTTP/1.1\r\nHost: localhost\r\nLast-Ev"
                            ),
                        ),
                        _ => {
                            let mut stream = Request::new(addr, &query)
                                .open(SOON)
                                .unwrap_or_else(|refused| panic!("{refused:?}"));
                            stream.next_state("cursor", SOON);
                        }
                    }
                }
            });
        }
    });
}

fn say(addr: SocketAddr, text: &str) {
    let mut socket = TcpStream::connect(addr).expect("connect");
    socket.write_all(text.as_bytes()).expect("write");
}

#[test]
fn an_event_to_a_group_of_100_000_costs_the_same_redis_commands_as_to_a_group_of_1() {
    const N_MEMBERS: usize = 100_000;
    let server = RedisServer::start();
    let node = Node::builder().redis(server.url()).start();
    node.join("small", "only-one");
    join_many(node.addr(), "large", N_MEMBERS);
    let (small, large) = (
        commands_of_an_event(&node, &server, "small", "only-one"),
        commands_of_an_event(&node, &server, "large", "member-77777"),
    );
    assert!(
        small.values().sum::<u64>() > 3,
        "an event costs some commands: {small:?}"
    );
    assert_eq!(small, large);
}

/// A node reads the logs of many groups in few calls, and not at all where nothing can be new.
#[test]
fn the_streams_of_a_user_with_many_groups_cost_few_calls_of_redis() {
    const N_GROUPS: usize = 300;
    const N_STREAMS: usize = 20;
    let server = RedisServer::start();
    let node = Node::builder().redis(server.url()).start();
    for group in 0..N_GROUPS {
        node.join(&group.to_string(), "42");
    }
    let send = |id: &str, group: usize| {
        let to_group = event(id, "stability", json!({ "group": group.to_string() }));
        node.publisher().publish(&[to_group]);
    };
    let mut left_behind = node.stream("42");
    send("first", 0);
    let cursor = left_behind.next_notification(SOON).cursor;
    drop(left_behind);
    send("second", N_GROUPS - 1);
    node.await_outcomes(2, SOON);

    // At the newest event, and one that resumes before it.
    let () = server.command("CONFIG RESETSTAT");
    let mut streams: Vec<_> = (0..N_STREAMS).map(|_| node.stream("42")).collect();
    let query = "user=42";
    let resumed = Request::new(node.addr(), query).last_event_id(&cursor);
    streams.push(resumed.open(SOON).expect("open a stream"));
    let last = streams.len() - 1;
    assert_eq!(streams[last].next_notification(SOON).id, "second");
    let counts = command_counts(&server);
    let n_logs = counts.get("zrevrange").copied().unwrap_or(0) as usize;
    assert!(
        (N_GROUPS..2 * N_GROUPS).contains(&n_logs),
        "only the resumed stream reads its logs: {counts:?}"
    );
    // A change returns all of them to replay.
    node.join("one%20more", "42");
    send("third", 1);
    for stream in &mut streams {
        assert_eq!(stream.next_notification(SOON).id, "third");
    }
    let counts = command_counts(&server);
    let n_calls = counts.get("evalsha").copied().unwrap_or(0) as usize;
    assert!(n_calls < N_STREAMS * N_GROUPS / 10, "{counts:?}");
}

/// The Redis commands, by name, that one event to a group with one open stream costs. Takes the
/// minimum over several attempts, because concurrent work of the node (a tick, a lease) can only
/// add commands. The first attempt is ignored: it finds an empty source, which is cheaper.
fn commands_of_an_event(
    node: &Node,
    server: &RedisServer,
    group: &str,
    listener: &str,
) -> BTreeMap<String, u64> {
    let mut stream = node.stream(listener);
    let mut least: Option<BTreeMap<String, u64>> = None;
    for n in 0..20 {
        let n_before = node.metric("pointsman_events_total") as usize;
        let () = server.command("CONFIG RESETSTAT");
        let id = format!("{group}-{n}");
        node.publisher()
            .publish(&[event(&id, "stability", json!({ "group": group }))]);
        assert_eq!(stream.next_notification(SOON).id, id);
        node.await_outcomes(n_before + 1, SOON);
        if n == 0 {
            continue;
        }
        let now = command_counts(server);
        least = Some(match least {
            None => now,
            Some(least) => least
                .into_iter()
                .filter_map(|(name, count)| now.get(&name).map(|other| (name, count.min(*other))))
                .collect(),
        });
    }
    least.expect("at least one attempt")
}

fn command_counts(server: &RedisServer) -> BTreeMap<String, u64> {
    let info: String = server.command("INFO commandstats");
    let lines = info.lines().filter_map(|line| {
        let (name, rest) = line.strip_prefix("cmdstat_")?.split_once(":calls=")?;
        Some((name.to_owned(), rest.split_once(',')?.0.parse().ok()?))
    });
    // Leave out the commands of this test.
    lines
        .filter(|(name, _)| {
            !name.starts_with("config") && !name.starts_with("info") && !name.starts_with("client")
        })
        .collect()
}

/// Joins `member-0` and so on, with a few hundred requests in flight on each of a few connections.
fn join_many(addr: SocketAddr, group: &str, n_members: usize) {
    const CONNECTIONS: usize = 4;
    const IN_FLIGHT: usize = 250;
    let members: Vec<usize> = (0..n_members).collect();
    std::thread::scope(|scope| {
        for share in members.chunks(n_members.div_ceil(CONNECTIONS)) {
            scope.spawn(move || {
                let mut socket = TcpStream::connect(addr).expect("connect");
                socket.set_read_timeout(Some(Duration::from_secs(60))).expect("set a timeout");
                for batch in share.chunks(IN_FLIGHT) {
                    let requests = batch.iter().map(|n| {
                        format!("PUT /v1/groups/{group}/members/member-{n} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
                    });
                    socket.write_all(requests.collect::<String>().as_bytes()).expect("write");
                    let (mut answers, mut buffer) = (String::new(), [0; 64 * 1024]);
                    while answers.matches("\r\n\r\n").count() < batch.len() {
                        let n = socket.read(&mut buffer).expect("an answer in time");
                        assert!(n > 0, "the node closed the connection after {answers}");
                        answers.push_str(&String::from_utf8_lossy(&buffer[..n]));
                    }
                    assert_eq!(answers.matches("HTTP/1.1 2").count(), batch.len(), "{answers}");
                }
            });
        }
    });
}
