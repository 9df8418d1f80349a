//! Ids that a publisher chose and that are not the time of day: in seconds, in microseconds, and
//! those that Redis soon cannot continue from, up to the largest.

use super::*;

/// A time in microseconds, tens of thousands of years ahead.
const FAR: &str = "1700000000000000-5";
const LAST: &str = "18446744073709551615-18446744073709551615";

fn add(server: &RedisServer, id: &str, value: &str) -> EntryId {
    let id: String = server.command(&format!("XADD {SOURCE} {id} v {value}"));
    id.parse().expect("an id")
}

/// The numbers of the buckets of remembered ids.
fn buckets(server: &RedisServer) -> Vec<u64> {
    let keys: Vec<String> = server.command(&format!("KEYS {TAG}seen:*"));
    let number = |key: String| key.rsplit(':').next().and_then(|n| n.parse().ok());
    keys.into_iter()
        .map(|key| number(key).expect("a number"))
        .collect()
}

fn now_ms(server: &RedisServer) -> u64 {
    let (seconds, _): (u64, u64) = server.command("TIME");
    seconds * 1_000
}

async fn node_without_ttl(server: &RedisServer) -> Node {
    let retention = Retention {
        processed_entries_ttl: Duration::ZERO,
        ..Retention::default()
    };
    connect_to(&server.url(), &[SOURCE], retention)
        .await
        .expect("connect")
}

/// Ids that Redis chooses continue from the large one, so that no entry would ever look old.
#[tokio::test]
async fn a_source_with_ids_in_microseconds_is_trimmed() {
    let server = RedisServer::start();
    let node = node_without_ttl(&server).await;
    add(&server, FAR, "a");
    node.append(&["v"; 500]).await;
    assert_eq!(drain(&node).await, 501);
    until(async || {
        let () = server.command(&format!("HDEL {TAG}meta trim_at"));
        node.broker.tick(node.p).await.unwrap();
        server.command::<u64>(&format!("XLEN {SOURCE}")) <= 100
    })
    .await;
    let next = node.append(&["b"]).await;
    assert_eq!(drain(&node).await, 1);
    assert_eq!(node.head().await.position, next[0].into());
}

/// Such entries are kept for `processed_entries_ttl` as well, however old their ids look.
#[tokio::test]
async fn processed_entries_with_ids_in_seconds_are_kept_for_a_while() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    for n in 0..500 {
        add(&server, &format!("1700000000-{}", n + 1), "a");
    }
    assert_eq!(drain(&node).await, 500);
    for _ in 0..3 {
        let () = server.command(&format!("HDEL {TAG}meta trim_at"));
        node.broker.tick(node.p).await.unwrap();
    }
    assert_eq!(server.command::<u64>(&format!("XLEN {SOURCE}")), 500);
}

/// A bucket in the future would remember an id for ever, and be the only one that remembers.
#[tokio::test]
async fn ids_are_remembered_by_the_clock_if_entries_do_not_tell_the_time() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let entry = |text: &str| text.parse::<EntryId>().expect("an id");
    for (id, publisher_id) in [("1700000000-1", 1), (FAR, 2)] {
        let item = with_id(commit(entry(id), "R", &["u:1"]), publisher_id);
        assert_eq!(node.commit(vec![item]).await[0].0, Outcome::Committed);
    }
    let present = now_ms(&server) / 300_000;
    for bucket in buckets(&server) {
        assert!(
            (present - 1..=present + 1).contains(&bucket),
            "{bucket} of {present}"
        );
    }
    let mut after_it = entry(FAR);
    for publisher_id in [1, 2] {
        after_it.seq += 1;
        let item = with_id(commit(after_it, "R", &["u:1"]), publisher_id);
        assert_eq!(node.commit(vec![item]).await[0].0, Outcome::Duplicate);
    }
}

/// The newest bucket of an installation that an earlier version moved into the future.
#[tokio::test]
async fn a_bucket_in_the_future_does_not_stop_the_recognition_of_retries() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let () = server.command(&format!("HSET {TAG}meta b 5666666666"));
    let () = server.command(&format!("SADD {TAG}seen:5666666666 old"));
    let ids = node.append(&["a", "b"]).await;
    for (id, outcome) in ids
        .into_iter()
        .zip([Outcome::Committed, Outcome::Duplicate])
    {
        let item = with_id(commit(id, "R", &["u:1"]), 1);
        assert_eq!(node.commit(vec![item]).await[0].0, outcome);
    }
    let present = now_ms(&server) / 300_000;
    assert!(buckets(&server).iter().all(|bucket| *bucket <= present + 1));
}

#[tokio::test]
async fn the_state_says_whether_ids_are_times() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let has_foreign_ids = async || {
        drain(&node).await;
        node.broker.state(node.p).await.unwrap().has_foreign_ids
    };
    assert!(!has_foreign_ids().await, "no entry was processed");
    add(&server, "1700000000-1", "a");
    assert!(has_foreign_ids().await, "in seconds");
    node.append(&["b"]).await;
    assert!(!has_foreign_ids().await);
    add(&server, FAR, "c");
    node.append(&["d"]).await;
    assert!(has_foreign_ids().await, "in microseconds");
}

/// The entry becomes a dead letter at the next tick, and publishers can add entries again, even if
/// no node processes the source.
#[tokio::test]
async fn an_entry_with_the_largest_id_is_refused_and_the_source_accepts_entries_again() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    node.append(&["a", "b"]).await;
    add(&server, LAST, "last");
    let refused = redis::cmd("XADD")
        .arg(&[SOURCE, "*", "v", "c"])
        .exec(&mut server.connection());
    assert!(refused.is_err(), "Redis has no id left");
    node.broker.tick(node.p).await.unwrap();
    node.broker.tick(node.p).await.unwrap();
    add(&server, "*", "c");
    let letters = node
        .broker
        .dead_letters(node.p, EntryId::default(), 10)
        .await
        .unwrap();
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].entry, EntryId::MAX);
    assert_eq!(letters[0].why.fields, [field("v", "last")]);
    assert!(letters[0].why.reason.contains("XADD KEY *"), "{letters:?}");
    let decisions = node.broker.decisions(node.p, 1).await.unwrap();
    assert_eq!(
        (decisions[0].0, decisions[0].1),
        (EntryId::MAX, Outcome::DeadLettered)
    );
    assert_eq!(node.broker.state(node.p).await.unwrap().lag, 3);
    assert_eq!(drain(&node).await, 3);
    node.broker.tick(node.p).await.unwrap();
    let state = node.broker.state(node.p).await.unwrap();
    assert_eq!((state.lag, state.trimmed_unread), (0, 0));
    assert_eq!(node.count(Outcome::DeadLettered).await, 1);
    assert!(node.broker.redrive(node.p, letters[0].id).await.unwrap());
    assert_eq!(drain(&node).await, 1);
}

/// It displaces an older dead letter, which is counted as every displaced one.
#[tokio::test]
async fn a_dead_letter_that_a_refused_entry_displaces_is_counted() {
    let server = RedisServer::start();
    let retention = Retention {
        dead_letter_entries: 1,
        ..Retention::default()
    };
    let node = connect_to(&server.url(), &[SOURCE], retention)
        .await
        .expect("connect");
    let ids = node.append(&["a"]).await;
    node.commit(vec![dead(ids[0], "broken")]).await;
    add(&server, LAST, "last");
    node.broker.tick(node.p).await.unwrap();
    let letters = node
        .broker
        .dead_letters(node.p, EntryId::default(), 10)
        .await
        .unwrap();
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].entry, EntryId::MAX);
    assert_eq!(node.broker.state(node.p).await.unwrap().dead_trimmed, 1);
}

/// A publisher does not wait for the next tick, even if the entry itself was deleted.
#[tokio::test]
async fn a_publisher_sets_a_source_right_that_reached_the_largest_id() {
    for is_deleted in [false, true] {
        let server = RedisServer::start();
        let node = node_on(&server).await;
        node.append(&["a"]).await;
        node.broker.tick(node.p).await.unwrap();
        add(&server, LAST, "last");
        if is_deleted {
            let () = server.command(&format!("XDEL {SOURCE} {LAST}"));
        }
        let ids = node.append(&["b"]).await;
        assert!(ids[0] < EntryId::MAX);
        assert_eq!(drain(&node).await, 2, "{is_deleted}");
    }
}

/// An owner read the entry before the source was set right. Its commit is rejected, and it continues
/// from the position.
#[tokio::test]
async fn a_commit_of_the_largest_id_is_rejected_and_sets_the_source_right() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    node.append(&["a"]).await;
    node.broker.tick(node.p).await.unwrap();
    add(&server, LAST, "last");
    let head = node.head().await;
    let read = node
        .broker
        .read(node.p, head.position.entry, 10, Duration::ZERO)
        .await
        .unwrap();
    assert_eq!(read[1].id, EntryId::MAX);
    let batch = Batch {
        epoch: head.epoch,
        prev: head.position,
        items: read
            .iter()
            .map(|entry| commit(entry.id, "R", &["u:1"]))
            .collect(),
    };
    let committed = node.broker.commit(node.p, batch).await.unwrap();
    assert_eq!(committed, CommitResult::Conflict);
    assert_eq!(drain(&node).await, 1);
    assert_eq!(node.count(Outcome::DeadLettered).await, 1);
    node.append(&["b"]).await;
    assert_eq!(drain(&node).await, 1);
}

/// An installation whose position an earlier version moved to the largest id.
#[tokio::test]
async fn a_position_at_the_largest_id_is_lowered() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    node.append(&["a"]).await;
    drain(&node).await;
    add(&server, LAST, "last");
    let () = server.command(&format!("HSET {TAG}meta pos {LAST} n 2"));
    let stuck = node
        .broker
        .read(node.p, EntryId::MAX, 10, Duration::ZERO)
        .await;
    assert!(matches!(stuck, Err(Error::Unavailable(_))), "{stuck:?}");
    node.broker.tick(node.p).await.unwrap();
    let ids = node.append(&["b"]).await;
    assert_eq!(drain(&node).await, 1);
    assert_eq!(node.head().await.position, ids[0].into());
    node.broker.tick(node.p).await.unwrap();
    let state = node.broker.state(node.p).await.unwrap();
    assert_eq!((state.lag, state.trimmed_unread), (0, 0));
}

/// Redis generates one more id after this one, or a few: an entry of another publisher got it before
/// a node looked. That entry is delivered, in its order.
#[tokio::test]
async fn entries_behind_an_id_just_below_the_largest_are_committed_in_order() {
    for id in [
        "18446744073709551615-18446744073709551612",
        "18446744073709551614-18446744073709551615",
        "9223372036854775808-0",
    ] {
        let server = RedisServer::start();
        let node = node_on(&server).await;
        node.append(&["a"]).await;
        add(&server, id, "chosen");
        for value in ["b", "c", "d"] {
            add(&server, "*", value);
        }
        node.append(&["e"]).await;
        node.broker.tick(node.p).await.unwrap();
        let waiting = node
            .broker
            .read(node.p, EntryId::default(), 10, Duration::ZERO)
            .await
            .unwrap();
        let values: Vec<_> = waiting.iter().map(|entry| &entry.fields[0].1).collect();
        assert_eq!(values, ["a", "b", "c", "d", "e"], "{id}");
        assert!(waiting.iter().all(|entry| entry.id.ms < 1 << 62), "{id}");
        let state = node.broker.state(node.p).await.unwrap();
        assert_eq!((state.lag, state.trimmed_unread), (5, 0), "{id}");
        assert_eq!(drain(&node).await, 5);
        node.broker.tick(node.p).await.unwrap();
        node.append(&["f"]).await;
        assert_eq!(drain(&node).await, 1);
        let state = node.broker.state(node.p).await.unwrap();
        assert_eq!((state.lag, state.trimmed_unread), (0, 0), "{id}");
        assert_eq!(node.count(Outcome::DeadLettered).await, 1);
    }
}

/// Below the ids that are set right, Redis generates ids without end: nothing is moved.
#[tokio::test]
async fn entries_with_large_ids_that_redis_can_continue_are_committed() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    add(&server, "9223372036854775807-1", "a");
    node.broker.tick(node.p).await.unwrap();
    let ids = node.append(&["b"]).await;
    assert_eq!(ids[0].to_string(), "9223372036854775807-2");
    assert_eq!(drain(&node).await, 2);
    // The next id is set right, and what was processed is not committed again.
    add(&server, "9223372036854775808-0", "c");
    add(&server, "*", "d");
    node.broker.tick(node.p).await.unwrap();
    assert_eq!(drain(&node).await, 2);
    assert_eq!(node.head().await.position.entry.ms >> 62, 0);
}

/// The source is deleted while the position is among the large ids, as an earlier version left it.
#[tokio::test]
async fn entries_of_a_source_that_was_deleted_at_a_large_id_are_committed() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let near = "18446744073709551615-18446744073709551613";
    for is_recreated in [false, true] {
        add(&server, near, "high");
        if !is_recreated {
            let () = server.command(&format!("XGROUP CREATE {SOURCE} pointsman 0"));
        }
        let () = server.command(&format!("HSET {TAG}meta pos {near} n 1"));
        let () = server.command(&format!("XGROUP SETID {SOURCE} pointsman {near}"));
        let () = server.command(&format!("DEL {SOURCE}"));
        for value in ["a", "b", "c"] {
            add(&server, "*", value);
        }
        if is_recreated {
            let () = server.command(&format!("XGROUP CREATE {SOURCE} pointsman 0"));
        }
        node.broker.tick(node.p).await.unwrap();
        assert_eq!(drain(&node).await, 3, "{is_recreated}");
        node.broker.tick(node.p).await.unwrap();
        let state = node.broker.state(node.p).await.unwrap();
        assert_eq!((state.lag, state.trimmed_unread), (0, 0), "{is_recreated}");
    }
}
