//! Large entries, which clients add by `XADD`: they are neither transferred nor copied without need.

use pointsman::broker::{Entry, MAX_ENTRY_FIELDS};

use super::*;

const MIB: usize = 1024 * 1024;

/// Adds an entry with `data` of this size in bytes.
fn add(server: &RedisServer, bytes: usize) -> EntryId {
    let id: String = redis::cmd("XADD")
        .arg(SOURCE)
        .arg("*")
        .arg(&[("type", "t"), ("data", &"x".repeat(bytes))])
        .query(&mut server.connection())
        .expect("XADD");
    id.parse().expect("an id")
}

fn info(server: &RedisServer, section: &str, name: &str) -> Option<String> {
    let info: String = server.command(&format!("INFO {section}"));
    info.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(str::to_owned)
}

/// The number of bytes that Redis sent to its clients.
fn sent(server: &RedisServer) -> usize {
    info(server, "stats", "total_net_output_bytes")
        .and_then(|n| n.parse().ok())
        .expect("a number")
}

async fn read(node: &Node, after: EntryId, count: usize, wait: Duration) -> Vec<Entry> {
    node.broker
        .read(node.p, after, count, wait)
        .await
        .expect("read")
}

/// A batch ends after a large entry, and the next one begins behind it.
#[tokio::test]
async fn a_large_entry_is_measured_in_redis_and_not_transferred() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    node.append(&["a"]).await;
    let large = add(&server, 24 * MIB);
    let after_it = node.append(&["b"]).await;
    let before = sent(&server);
    let entries = read(&node, EntryId::default(), 64, Duration::ZERO).await;
    assert_eq!(entries[1].id, large);
    let size = entries[1].oversized.expect("it is too large");
    assert_eq!((size.bytes as usize, size.is_exact), (24 * MIB + 9, true));
    let rest = read(&node, large, 64, Duration::ZERO).await;
    assert_eq!(rest[0].id, after_it[0]);
    let n_sent = sent(&server) - before;
    assert!(n_sent < 64 * 1024, "{n_sent} bytes were sent");
}

/// The wait ends with an entry, of which the beginning is read before the connection is closed. The
/// sockets buffer a few megabytes.
#[tokio::test]
async fn a_large_entry_that_ends_a_wait_is_cut() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let reader = node.clone();
    let reading = tokio::spawn(async move {
        read(&reader, EntryId::default(), 64, Duration::from_secs(60)).await
    });
    until(async || {
        let clients: String = server.command("CLIENT LIST TYPE normal");
        clients.contains("cmd=xread")
    })
    .await;
    let before = sent(&server);
    let large = add(&server, 64 * MIB);
    let entries = reading.await.expect("no panic");
    assert_eq!(entries[0].id, large);
    let size = entries[0].oversized.expect("it is too large");
    assert_eq!((size.bytes as usize, size.is_exact), (64 * MIB + 9, false));
    assert_eq!(entries[0].fields[0], field("type", "t"));
    let n_sent = sent(&server) - before;
    assert!(n_sent < 32 * MIB, "{n_sent} bytes were sent");
    let next = node.append(&["b"]).await;
    assert_eq!(read(&node, large, 64, Duration::ZERO).await[0].id, next[0]);
}

#[tokio::test]
async fn an_entry_of_many_fields_is_oversized() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    for n_fields in [MAX_ENTRY_FIELDS, MAX_ENTRY_FIELDS + 1, 50_000] {
        let fields: Vec<(String, &str)> = (0..n_fields).map(|n| (n.to_string(), "v")).collect();
        redis::cmd("XADD")
            .arg(SOURCE)
            .arg("*")
            .arg(&fields)
            .exec(&mut server.connection())
            .expect("XADD");
    }
    for count in [64, 1] {
        let (mut after, mut fields) = (EntryId::default(), Vec::new());
        while let [entry, ..] = &read(&node, after, count, Duration::ZERO).await[..] {
            after = entry.id;
            fields.push(entry.oversized.map(|size| size.fields as usize));
        }
        assert_eq!(
            fields,
            [None, Some(MAX_ENTRY_FIELDS + 1), Some(50_000)],
            "reading {count} at a time"
        );
    }
}

/// Redis copies a large entry for longer than the deadline of a command; a repetition would take as
/// long. After a timeout, the entry is read on its own, which is cheaper, with a longer deadline.
#[tokio::test]
async fn after_a_timeout_a_large_entry_is_read_in_another_way() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let large = add(&server, 8 * MIB);
    server.pause();
    let timed_out = node
        .broker
        .read(node.p, EntryId::default(), 64, Duration::ZERO)
        .await;
    assert!(matches!(timed_out, Err(Error::Unavailable(_))));
    server.resume();
    let calls = || info(&server, "commandstats", "cmdstat_xread").is_some();
    assert!(!calls());
    until(async || {
        let read = node
            .broker
            .read(node.p, EntryId::default(), 64, Duration::ZERO)
            .await;
        read.is_ok_and(|entries| entries[0].id == large)
    })
    .await;
    assert!(calls(), "it was read with XREAD");
}

/// `XINFO STREAM` copies the first and the last entry, whatever their size. Ticks, commits,
/// publishers and monitors call scripts every second.
#[tokio::test]
async fn no_regular_script_copies_the_first_or_the_last_entry() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    node.append(&["a", "b"]).await;
    drain(&node).await;
    node.append(&["c"]).await;
    node.broker.tick(node.p).await.unwrap();
    let () = server.command("CONFIG RESETSTAT");
    for round in 0..3 {
        node.append(&["d"]).await;
        node.broker.tick(node.p).await.unwrap();
        assert_eq!(node.broker.state(node.p).await.unwrap().lag, 2);
        node.broker.take_over(node.p).await.unwrap();
        let head = node.head().await;
        let next = read(&node, head.position.entry, 64, Duration::ZERO).await;
        node.commit_from(&head, vec![commit(next[0].id, "R", &["u:1"])])
            .await;
        node.broker.tick(node.p).await.unwrap();
        let calls = info(&server, "commandstats", "cmdstat_xinfo|stream");
        assert_eq!(calls, None, "in round {round}");
    }
    drain(&node).await;
    node.broker.tick(node.p).await.unwrap();
    assert_eq!(node.broker.state(node.p).await.unwrap().lag, 0);
    assert_eq!(info(&server, "commandstats", "cmdstat_xinfo|stream"), None);
}

/// A newest entry that was deleted before it was read: Redis does not count behind it, and the
/// source is still recognised as read.
#[tokio::test]
async fn a_deleted_waiting_entry_does_not_count_as_waiting() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let ids = node.append(&["a", "b", "c"]).await;
    let head = node.head().await;
    node.commit_from(
        &head,
        vec![commit(ids[0], "R", &["u:1"]), commit(ids[1], "R", &["u:1"])],
    )
    .await;
    let () = server.command(&format!("XDEL {SOURCE} {}", ids[2]));
    node.broker.tick(node.p).await.unwrap();
    let state = node.broker.state(node.p).await.unwrap();
    assert_eq!((state.lag, state.trimmed_unread), (0, 1));
    let next = node.append(&["d"]).await;
    assert_eq!(drain(&node).await, 1);
    assert_eq!(node.head().await.position, next[0].into());
    node.broker.tick(node.p).await.unwrap();
    let state = node.broker.state(node.p).await.unwrap();
    assert_eq!((state.lag, state.trimmed_unread), (0, 1));
}

/// A source that was created again with lower ids is moved above the position, except for what is
/// too large to be moved: that becomes a dead letter and stays where it is.
#[tokio::test]
async fn a_large_entry_of_a_recreated_source_becomes_a_dead_letter() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    node.append(&["old"]).await;
    drain(&node).await;
    let () = server.command(&format!("DEL {SOURCE}"));
    let data = "x".repeat(5 * MIB);
    for (id, data) in [("5-1", "a"), ("6-1", &data), ("7-1", "b")] {
        redis::cmd("XADD")
            .arg(SOURCE)
            .arg(id)
            .arg(&[("data", data)])
            .exec(&mut server.connection())
            .expect("XADD");
    }
    node.broker.tick(node.p).await.unwrap();
    let head = node.head().await;
    let waiting = read(&node, head.position.entry, 10, Duration::ZERO).await;
    let data: Vec<_> = waiting.into_iter().map(|entry| entry.fields).collect();
    assert_eq!(data, [[field("data", "a")], [field("data", "b")]]);
    let letters = node
        .broker
        .dead_letters(node.p, EntryId::default(), 10)
        .await
        .unwrap();
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].entry, EntryId { ms: 6, seq: 1 });
    assert!(
        letters[0]
            .oversized
            .is_some_and(|size| size.bytes as usize == 5 * MIB + 4)
    );
    assert_eq!(drain(&node).await, 2);
    node.broker.tick(node.p).await.unwrap();
    let state = node.broker.state(node.p).await.unwrap();
    assert_eq!((state.lag, state.trimmed_unread), (0, 0));
}

/// 64 records of 1 MiB would take longer than the deadline over a slow link.
#[tokio::test]
async fn large_records_are_read_in_several_calls() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let mut ids = Vec::new();
    for n in 0..12 {
        ids.push(node.publish(&n.to_string().repeat(MIB / 2), &["u:1"]).await);
    }
    let absent = NotificationId(1);
    ids.insert(5, absent);
    let () = server.command("CONFIG RESETSTAT");
    let records = node.broker.records(node.p, &ids).await.unwrap();
    assert_eq!(records.len(), 13);
    for (n, record) in records.iter().enumerate() {
        match (n, record) {
            (5, None) => {}
            (_, Some(record)) if n != 5 => {
                let digits = if n < 5 { n } else { n - 1 }.to_string();
                assert!(record.starts_with(digits.as_bytes()), "record {n}");
            }
            other => panic!("record {n}: {}", other.1.is_some()),
        }
    }
    let calls = info(&server, "commandstats", "cmdstat_mget").expect("MGET was called");
    assert!(calls.starts_with("calls=2,"), "{calls}");
}
