//! Redis outages: missing, lost, full, slow, flushed or misconfigured. A node reports the fault,
//! refuses requests that it cannot serve, keeps its streams open, and resumes exactly where it
//! stopped. The publisher determines the expected notifications.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::eventually;
use crate::harness::http::Answer;
use crate::harness::node::{Builder, Node, SOON};
use crate::harness::proxy::Proxy;
use crate::harness::publish::{event, xadd};
use crate::harness::redis::RedisServer;
use crate::harness::sse::{Follower, Request, Stream, StreamEnd};

/// How long eventual conditions may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
const N_USERS: usize = 4;
/// The maximum number of log lines about one outage of a few seconds.
const MOST_LINES: usize = 30;

/// A node on this Redis with few plugins, to keep compilation at the start short.
fn node_on(url: &str) -> Builder {
    Node::builder()
        .redis(url)
        .config("[plugins.discard]\nenabled = false")
}

fn n_lines(node: &Node) -> usize {
    node.log().lines().count()
}

/// Waits until the node is unready with this reason.
fn red(node: &Node, reason: &str) {
    eventually(SOON, &format!("readiness reports {reason:?}"), || {
        let ready = node.admin("/readyz");
        (ready.status == 503 && ready.body.contains(reason)).then_some(())
    });
}

fn green(node: &Node) {
    eventually(PATIENCE, "the node is ready", || {
        (node.admin("/readyz").status == 200).then_some(())
    });
}

/// Asserts a 503 with an error text and a `Retry-After`.
fn assert_refused(answer: &Answer) {
    assert_eq!(answer.status, 503, "{answer:?}");
    let seconds: u64 = answer
        .header("retry-after")
        .expect("Retry-After")
        .parse()
        .expect("seconds");
    assert!((1..=5).contains(&seconds), "{answer:?}");
    assert!(
        answer.json()["error"]
            .as_str()
            .is_some_and(|error| !error.is_empty()),
        "{answer:?}"
    );
}

fn number(number: usize) -> Value {
    let more = if number.is_multiple_of(7) {
        json!({ "everyone": true })
    } else {
        json!({ "user": (number % N_USERS).to_string() })
    };
    event(&number.to_string(), "outage", more)
}

/// The streams of all users.
fn streams(node: &Node) -> Vec<Stream> {
    (0..N_USERS)
        .map(|user| node.stream(&user.to_string()))
        .collect()
}

/// Publishes numbered events while `during` runs, retrying until each is accepted, and returns
/// their number.
fn flow(node: &Node, during: impl FnOnce(&AtomicUsize)) -> usize {
    let (n_published, is_over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let publisher = node.publisher();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Relaxed) {
                let first = n_published.load(Relaxed);
                let batch: Vec<Value> = (first..first + 5).map(number).collect();
                publisher.publish_surely(&batch, PATIENCE);
                n_published.store(first + batch.len(), Relaxed);
                // Limits the rate; during an outage, publishing takes longer.
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        // Stop the publisher even on a panic: otherwise it would run forever.
        let _over = OnDrop(&is_over);
        during(&n_published);
    });
    n_published.load(Relaxed)
}

struct OnDrop<'a>(&'a AtomicBool);

impl Drop for OnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Waits until some more events are published.
fn some_more(n_published: &AtomicUsize) {
    let before = n_published.load(Relaxed);
    eventually(PATIENCE, "events are published", || {
        (n_published.load(Relaxed) >= before + 50).then_some(())
    });
}

/// Asserts that each stream, still open and without a gap, has exactly the events published to its
/// user, once and in order.
fn assert_exact(node: &Node, streams: &mut [Stream], n_published: usize) {
    node.publisher().publish_surely(
        &[event("last", "outage", json!({ "everyone": true }))],
        PATIENCE,
    );
    for (user, stream) in streams.iter_mut().enumerate() {
        let expected = (0..n_published)
            .filter(|number| number % 7 == 0 || number % N_USERS == user)
            .map(|number| number.to_string());
        for number in expected.chain(["last".to_owned()]) {
            assert_eq!(
                stream.next_notification(PATIENCE).id,
                number,
                "for user {user}"
            );
        }
    }
}

#[test]
fn a_node_started_without_redis_reports_it_and_recovers_once_redis_starts() {
    let mut server = RedisServer::start();
    server.kill();
    let node = node_on(&server.url()).may_be_unready().start();
    red(
        &node,
        &format!(
            "broker: the broker is unavailable: 127.0.0.1:{}: ",
            server.port()
        ),
    );
    assert_eq!(
        node.admin("/healthz").status,
        200,
        "an unavailable broker must not fail the liveness probe"
    );
    let follower = Follower::start(node.addr(), "user=42");
    for (method, path) in [
        ("PUT", "/v1/groups/ops/members/42"),
        ("GET", "/v1/notifications?user=42"),
        ("GET", "/v1/dead-letters"),
    ] {
        assert_refused(&node.request(method, path));
    }
    assert_refused(
        &node
            .publisher()
            .try_publish(&[number(0)])
            .expect("an answer"),
    );
    // An `EventSource` never reconnects after any status but 200, but does so after the end of a
    // stream.
    let (frames, stop) = Request::new(node.addr(), "user=42")
        .open(SOON)
        .expect("200")
        .read_to_end(SOON);
    assert!(matches!(stop, StreamEnd::Complete), "{stop:?}");
    let [close] = frames.as_slice() else {
        panic!("expected one frame: {frames:?}")
    };
    assert_eq!(
        (close.state(), close.data.as_deref(), close.retry.is_some()),
        (Some("close"), Some("{\"reason\":\"starting\"}"), true)
    );

    server.restart();
    green(&node);
    let follower = follower.connected(SOON);
    node.publisher()
        .publish(&[event("a", "t", json!({ "user": "42" }))]);
    let record = follower.wait(SOON, "a notification", |record| {
        !record.notifications.is_empty()
    });
    assert_eq!(
        (record.notifications[0].id.as_str(), record.gaps.len()),
        ("a", 0)
    );
    assert!(n_lines(&node) < MOST_LINES, "{}", node.log());
}

#[test]
fn a_restart_of_redis_loses_and_duplicates_nothing_and_streams_stay_open() {
    let mut server = RedisServer::with(&["--appendonly", "yes", "--appendfsync", "always"]);
    let node = node_on(&server.url()).start();
    let mut streams = streams(&node);
    let kept = node.stream("late").last_event_id().to_owned();
    let n_published = flow(&node, |n_published| {
        some_more(n_published);
        let before = n_lines(&node);
        server.kill();
        red(
            &node,
            &format!(
                "broker: the broker is unavailable: 127.0.0.1:{}: ",
                server.port()
            ),
        );
        // Publish attempts during an outage are answered, but not logged one by one.
        for _ in 0..100 {
            assert_refused(
                &node
                    .publisher()
                    .try_publish(&[number(0)])
                    .expect("an answer"),
            );
        }
        // A stream that resumes during the outage waits.
        let mut late = Request::new(node.addr(), "user=late")
            .last_event_id(&kept)
            .open(SOON)
            .expect("200");
        server.restart();
        green(&node);
        node.publisher().publish_surely(
            &[event("late", "outage", json!({ "user": "late" }))],
            PATIENCE,
        );
        while late.next_notification(PATIENCE).id != "late" {}
        some_more(n_published);
        // A second restart, too short for the readiness check to notice.
        server.kill();
        server.restart();
        some_more(n_published);
        let log = node.log();
        let lines: Vec<&str> = log.lines().skip(before).collect();
        assert!(lines.len() < 2 * MOST_LINES, "{}", lines.join("\n"));
        assert!(
            lines
                .iter()
                .any(|line| line.contains("the source waits") && line.contains("retry_ms=")),
            "{}",
            lines.join("\n")
        );
    });
    assert_exact(&node, &mut streams, n_published);
}

#[test]
fn a_frozen_redis_makes_the_node_unready_and_loses_nothing() {
    let server = RedisServer::start();
    let node = node_on(&server.url()).start();
    let mut streams = streams(&node);
    let n_published = flow(&node, |n_published| {
        some_more(n_published);
        let before = n_lines(&node);
        server.pause();
        red(
            &node,
            &format!(
                "broker: the broker is unavailable: 127.0.0.1:{}: ",
                server.port()
            ),
        );
        assert_refused(
            &node
                .publisher()
                .try_publish(&[number(0)])
                .expect("an answer"),
        );
        // Wait until the feed counts as dead as well.
        red(&node, "feed: 1 of 1 partitions are silent");
        server.resume();
        green(&node);
        some_more(n_published);
        let log = node.log();
        let lines: Vec<&str> = log.lines().skip(before).collect();
        assert!(lines.len() < MOST_LINES, "{}", lines.join("\n"));
    });
    assert_exact(&node, &mut streams, n_published);
}

#[test]
fn a_command_whose_answer_was_late_is_not_executed_twice() {
    let server = RedisServer::start();
    let proxy = Proxy::to(server.port());
    let node = node_on(&proxy.url()).start();
    let mut stream = node.stream("42");
    let mut connection = server.connection();
    let mut position = || -> Option<String> {
        redis::cmd("HGET")
            .arg("pointsman:{pointsman:events}:meta")
            .arg("pos")
            .query(&mut connection)
            .expect("HGET")
    };
    // The first event loads the scripts: Redis answers an unknown script hash at once without
    // executing anything, so no answer could be held back.
    node.publisher()
        .publish(&[event("first", "t", json!({ "user": "42" }))]);
    assert_eq!(stream.next_notification(SOON).id, "first");
    // A commit: its decision names the event in this form.
    proxy.hold_answers_from("\"event_id\":\"committed\"");
    let fields = |id: &str| {
        vec![
            ("type", "t".to_owned()),
            ("user", "42".to_owned()),
            ("id", id.to_owned()),
        ]
    };
    let entry = xadd(
        &mut server.connection(),
        "pointsman:events",
        &[fields("committed")],
    )
    .remove(0);
    eventually(SOON, "the commit is done", || {
        (position().as_ref() == Some(&entry)).then_some(())
    });
    assert!(
        proxy.is_holding(),
        "the answer to the commit must be held back"
    );
    red(&node, ": no answer within 2 s");
    proxy.release();
    green(&node);
    assert_eq!(stream.next_notification(SOON).id, "committed");

    // An append: the publisher receives no answer and sends the event again.
    let posted = [event("posted", "t", json!({ "user": "42" }))];
    proxy.hold_answers_from("\"id\":\"posted\"");
    assert_refused(&node.publisher().try_publish(&posted).expect("an answer"));
    proxy.release();
    node.publisher().publish_surely(&posted, PATIENCE);
    node.publisher()
        .publish_surely(&[event("last", "t", json!({ "user": "42" }))], PATIENCE);
    assert_eq!(stream.next_notification(SOON).id, "posted");
    assert_eq!(stream.next_notification(SOON).id, "last");
    eventually(SOON, "the retry is a duplicate", || {
        (node.metric("pointsman_events_total{outcome=\"duplicate\"}") == 1.0).then_some(())
    });
}

#[test]
fn a_full_redis_refuses_publishers_keeps_streams_and_drains() {
    const MEMORY: usize = 24 * 1024 * 1024;
    let server = RedisServer::with(&[
        "--maxmemory",
        &MEMORY.to_string(),
        "--maxmemory-policy",
        "noeviction",
    ]);
    let node = node_on(&server.url()).start();
    let mut stream = node.stream("42");
    // While the node is stopped, another Redis client fills Redis with undecided events.
    node.signal("STOP");
    let mut connection = server.connection();
    let mut n_added = 0;
    let refusal = loop {
        let mut command = redis::cmd("XADD");
        command
            .arg("pointsman:events")
            .arg("*")
            .arg("type")
            .arg("t")
            .arg("id")
            .arg(n_added)
            .arg("data");
        match command
            .arg(format!("\"{}\"", "x".repeat(100_000)))
            .query::<String>(&mut connection)
        {
            Ok(_) => n_added += 1,
            Err(error) => break error,
        }
        assert!(n_added * 100_000 < MEMORY, "Redis should be full by now");
    };
    assert_eq!(refusal.code(), Some("OOM"), "{refusal}");
    node.signal("CONT");
    // Once decided, the entries are no longer needed and free their memory.
    let expected = n_added as f64;
    eventually(PATIENCE, "every event is decided", || {
        (node.metric("pointsman_events_total{outcome=\"unrouted\"}") == expected).then_some(())
    });
    node.publisher()
        .publish_surely(&[event("drained", "t", json!({ "user": "42" }))], SOON);
    assert_eq!(stream.next_notification(SOON).id, "drained");

    // Full of data that cannot be trimmed: publishing is refused, the reason is reported, and
    // everything else continues.
    let () = server.command("CONFIG SET maxmemory 1mb");
    let before = n_lines(&node);
    for _ in 0..100 {
        let answer = node
            .publisher()
            .try_publish(&[event("refused", "t", json!({ "user": "42" }))])
            .expect("an answer");
        assert_refused(&answer);
        assert!(
            answer.json()["error"]
                .as_str()
                .is_some_and(|error| error.contains("is full")),
            "{answer:?}"
        );
    }
    red(&node, "raise maxmemory or let the backlog drain");
    assert!(n_lines(&node) - before < MOST_LINES, "{}", node.log());
    let mut second = node.stream("43");
    let () = server.command(&format!("CONFIG SET maxmemory {MEMORY}"));
    // The decided entries leave the source within a second, and may still fill Redis until then.
    node.publisher()
        .publish_surely(&[event("last", "t", json!({ "everyone": true }))], SOON);
    assert_eq!(stream.next_notification(SOON).id, "last");
    assert_eq!(second.next_notification(SOON).id, "last");
}

#[test]
fn an_evicting_redis_makes_the_node_unready_until_the_named_fix_is_applied() {
    let server = RedisServer::with(&["--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"]);
    let node = node_on(&server.url()).may_be_unready().start();
    red(
        &node,
        "maxmemory-policy is allkeys-lru, which may evict positions and logs; run CONFIG SET maxmemory-policy noeviction",
    );
    assert!(
        node.log()
            .contains("CONFIG SET maxmemory-policy noeviction"),
        "{}",
        node.log()
    );
    let () = server.command("CONFIG SET maxmemory-policy noeviction");
    green(&node);
}

#[test]
fn clients_do_not_notice_a_lost_feed_or_flushed_scripts() {
    let server = RedisServer::start();
    let node = node_on(&server.url()).start();
    let mut streams = streams(&node);
    let n_published = flow(&node, |n_published| {
        for _ in 0..5 {
            some_more(n_published);
            let n_killed: u64 = server.command("CLIENT KILL TYPE pubsub");
            assert_eq!(n_killed, 1, "the one notice connection");
            let () = server.command("SCRIPT FLUSH");
            eventually(SOON, "the feed is back", || {
                let channels: Vec<String> = server.command("PUBSUB CHANNELS *l:u:*");
                (channels.len() == N_USERS).then_some(())
            });
        }
    });
    assert_exact(&node, &mut streams, n_published);
    let log = node.log();
    let n_lost = log
        .lines()
        .filter(|line| line.contains("the notice connection was lost"))
        .count();
    assert_eq!(n_lost, 5, "{log}");
}

#[test]
fn an_overwritten_source_makes_the_node_unready_until_the_named_fix_is_applied() {
    let server = RedisServer::start();
    let node = node_on(&server.url()).start();
    let mut stream = node.stream("42");
    let () = server.command("DEL pointsman:events");
    let () = server.command("SET pointsman:events oops");
    red(
        &node,
        "a key of Pointsman has the wrong type; rename or delete it",
    );
    let () = server.command("RENAME pointsman:events oops");
    let fields = vec![
        ("type", "t".to_owned()),
        ("user", "42".to_owned()),
        ("id", "a".to_owned()),
    ];
    xadd(&mut server.connection(), "pointsman:events", &[fields]);
    assert_eq!(stream.next_notification(SOON).id, "a");
}

#[test]
fn flushall_is_reported_as_a_gap_and_later_events_arrive() {
    let server = RedisServer::start();
    let node = node_on(&server.url()).start();
    let (mut stream, mut quiet) = (node.stream("42"), node.stream("43"));
    node.publisher()
        .publish(&[event("before", "t", json!({ "user": "42" }))]);
    assert_eq!(stream.next_notification(SOON).id, "before");
    let () = server.command("FLUSHALL");
    for stream in [&mut stream, &mut quiet] {
        let gap: Value = serde_json::from_str(&stream.next_state("gap", SOON).data.expect("data"))
            .expect("JSON");
        assert_eq!(gap["reason"], "rewound", "{stream:?}");
    }
    let fields = vec![
        ("type", "t".to_owned()),
        ("everyone", "true".to_owned()),
        ("id", "added".to_owned()),
    ];
    xadd(&mut server.connection(), "pointsman:events", &[fields]);
    node.publisher()
        .publish_surely(&[event("posted", "t", json!({ "everyone": true }))], SOON);
    for stream in [&mut stream, &mut quiet] {
        assert_eq!(stream.next_notification(SOON).id, "added");
        assert_eq!(stream.next_notification(SOON).id, "posted");
    }
    // The loss leaves no fault behind.
    assert_eq!(node.admin("/readyz").status, 200);
}

#[test]
fn a_connection_too_slow_for_a_full_read_uses_smaller_reads() {
    let server = RedisServer::start();
    let proxy = Proxy::to(server.port());
    let node = node_on(&proxy.url()).start();
    let mut stream = node.stream("42");
    // 64 entries would take more than 6 s, and a read has a timeout of 3 s.
    proxy.slow_answers_to(1024 * 1024);
    let fields = |n: usize| {
        let data = format!("\"{}\"", "x".repeat(100_000));
        vec![
            ("type", "t".to_owned()),
            ("id", n.to_string()),
            ("data", data),
            ("user", if n == 63 { "42" } else { "43" }.to_owned()),
        ]
    };
    xadd(
        &mut server.connection(),
        "pointsman:events",
        &(0..64).map(fields).collect::<Vec<_>>(),
    );
    assert_eq!(stream.next_notification(PATIENCE).id, "63");
}

/// Whatever holds a source up: here another owner of its lease, which does nothing.
#[test]
fn a_position_that_does_not_move_while_entries_wait_makes_the_node_unready() {
    let server = RedisServer::start();
    let node = node_on(&server.url()).start();
    let mut stream = node.stream("0");
    let () = server.command("SET pointsman:{pointsman:events}:owner another PX 600000");
    eventually(PATIENCE, "the node lost the lease", || {
        node.log().contains("lost the lease").then_some(())
    });
    let mut connection = server.connection();
    for n in 0..3 {
        redis::cmd("XADD")
            .arg("pointsman:events")
            .arg("*")
            .arg(&[("type", "t"), ("user", "0"), ("id", &n.to_string())])
            .exec(&mut connection)
            .expect("XADD");
    }
    eventually(PATIENCE, "readiness reports the position", || {
        let ready = node.admin("/readyz");
        let is_red = ready.status == 503
            && ready
                .body
                .contains("sources.pointsman:events.position: 0-0 has not moved for 1")
            && ready.body.contains(" s while 3 entries wait; ");
        is_red.then_some(())
    });
    let () = server.command("DEL pointsman:{pointsman:events}:owner");
    for n in 0..3 {
        assert_eq!(stream.next_notification(PATIENCE).id, n.to_string());
    }
    green(&node);
}
