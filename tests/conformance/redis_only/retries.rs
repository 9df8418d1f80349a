//! Retries in Redis: a fail-over, missing permissions and external writes to their keys.

use super::super::retries::retry;
use super::rights::{node_of_app, refused_without};
use super::*;
use pointsman::broker::{Lease, RetryPolicy};

const PATIENT: RetryPolicy = RetryPolicy {
    retries: 5,
    timeout: Duration::from_secs(3_600),
};

/// Letter, due time, entry and attempts are in one slot and one replication stream, so they rewind
/// together.
#[tokio::test]
async fn a_fail_over_neither_loses_nor_doubles_a_retry() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let entry = node.claimant("a").await;
    node.commit(vec![retry(&entry, PATIENT)]).await;
    // The new primary has the letter, but not the entry that was appended and decided.
    server.snapshot();
    let lost = node.retried().await.remove(0);
    node.commit(vec![commit(lost.id, "R", &["u:1"])]).await;
    server.fail_over();
    let again = node.retried().await;
    assert_eq!(again.len(), 1, "{again:?}");
    assert_eq!(again[0].fields, entry.fields);
    // The new primary has the entry, but not its outcome.
    server.snapshot();
    node.commit(vec![retry(&again[0], PATIENT)]).await;
    server.fail_over();
    assert!(node.retrying().await.is_empty());
    assert_eq!(node.retried().await, again);
    node.commit(vec![retry(&again[0], PATIENT)]).await;
    assert_eq!(node.retrying().await[0].why.attempts, 2);
}

/// An entry that is appended while its letter stays would be appended at every renewal.
#[tokio::test]
async fn a_due_retry_without_a_right_writes_nothing() {
    let server = RedisServer::start();
    let node = node_of_app(&server).await;
    let entry = node.claimant("a").await;
    node.commit(vec![retry(&entry, PATIENT)]).await;
    let due_ms = node.retrying().await[0].due_ms.expect("a due time");
    until(async || node.head().await.now_ms >= due_ms).await;
    let lease = async || node.broker.lease(node.p, "a", Duration::from_secs(9)).await;
    let rules = ["-xadd", "-xdel", "-zrem", "-hset", "-zrangebyscore"];
    refused_without(&server, &rules, lease).await;
    assert_eq!(node.retried().await.len(), 1);
}

/// Without a right to a command of a retry, the whole batch is refused before its first write.
#[tokio::test]
async fn a_commit_of_a_retry_without_a_right_writes_nothing() {
    let server = RedisServer::start();
    let node = node_of_app(&server).await;
    let entry = node.claimant("a").await;
    let head = node.head().await;
    let batch = Batch {
        epoch: head.epoch,
        prev: head.position,
        items: vec![retry(&entry, PATIENT)],
    };
    let commit = async || node.broker.commit(node.p, batch.clone()).await;
    let rules = [
        "-zadd",
        "-xadd",
        "-xinfo",
        // Only a retry uses the key of due times, after it has stored the dead letter.
        "resetkeys ~pointsman:[^{]* ~pointsman:{pointsman:events}:[^d]* ~pointsman:{pointsman:events}:d[^u]*",
    ];
    refused_without(&server, &rules, commit).await;
    assert!(node.retrying().await.is_empty());
    node.commit(batch.items.clone()).await;
    assert_eq!(node.retrying().await.len(), 1);
}

#[tokio::test]
async fn a_key_of_retries_of_the_wrong_type_is_an_error_that_names_it() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let entry = node.claimant("a").await;
    for key in ["retrying", "due", "retried"] {
        let () = server.command(&format!("SET {TAG}{key} foreign"));
        let before: String = server.command("DEBUG DIGEST");
        let head = node.head().await;
        let batch = Batch {
            epoch: head.epoch,
            prev: head.position,
            items: vec![retry(&entry, PATIENT)],
        };
        let refused = [
            node.broker.commit(node.p, batch).await.map(|_| ()),
            node.broker
                .lease(node.p, "a", Duration::from_secs(9))
                .await
                .map(|_| ()),
        ];
        for refused in refused {
            match refused {
                Err(Error::Permanent(why)) => {
                    assert!(why.contains(&format!("{TAG}{key}")), "{why}")
                }
                other => panic!("{key}: {other:?}"),
            }
        }
        assert_eq!(server.command::<String>("DEBUG DIGEST"), before, "{key}");
        let () = server.command(&format!("DEL {TAG}{key}"));
    }
    node.commit(vec![retry(&entry, PATIENT)]).await;
    assert_eq!(node.retried().await.len(), 1);
}

/// The attempts of an entry that another client removed would otherwise be kept for ever.
#[tokio::test]
async fn the_attempts_at_a_removed_entry_are_forgotten() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let entry = node.claimant("a").await;
    node.commit(vec![retry(&entry, PATIENT)]).await;
    let entry = node.retried().await.remove(0);
    let n = || server.command::<u64>(&format!("HLEN {TAG}retried"));
    assert_eq!(n(), 1);
    let _: u64 = server.command(&format!("XDEL {SOURCE} {}", entry.id));
    node.broker.tick(node.p).await.unwrap();
    assert_eq!(n(), 0);
    // A letter that another client removed is no longer due either.
    let entry = node.claimant("b").await;
    node.commit(vec![retry(&entry, PATIENT)]).await;
    let () = server.command(&format!("DEL {TAG}retrying"));
    until(async || {
        let lease = node.broker.lease(node.p, "owner", Duration::from_secs(9));
        assert_eq!(lease.await.unwrap(), Lease::Mine);
        server.command::<u64>(&format!("ZCARD {TAG}due")) == 0
    })
    .await;
    assert!(node.retried().await.is_empty());
}

/// An error would end every renewal of the lease, and with it the work on the source.
#[tokio::test]
async fn what_other_clients_add_to_the_keys_of_retries_does_not_end_the_lease() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let entry = node.claimant("a").await;
    node.commit(vec![retry(&entry, PATIENT)]).await;
    let foreign: String = server.command(&format!("XADD {TAG}retrying * f:v x"));
    let no_fields: String = server.command(&format!("XADD {TAG}retrying * attempts 1 retries 1"));
    for member in [
        "foreign",
        "1-",
        "99999999999999999999999-1",
        "1-1",
        foreign.as_str(),
        no_fields.as_str(),
    ] {
        let () = server.command(&format!("ZADD {TAG}due 1 {member}"));
    }
    assert_eq!(node.retried().await.len(), 1);
    assert_eq!(server.command::<u64>(&format!("ZCARD {TAG}due")), 0);
    let renewed = node
        .broker
        .lease(node.p, "owner", Duration::from_secs(9))
        .await;
    assert!(matches!(renewed, Ok(Lease::Mine)), "{renewed:?}");
}

#[tokio::test]
async fn a_retry_whose_due_time_a_fast_clock_set_is_appended_at_once() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let entry = node.claimant("a").await;
    node.commit(vec![retry(&entry, PATIENT)]).await;
    let letter = node.retrying().await.remove(0);
    // A year ahead.
    let due_ms = letter.due_ms.expect("a due time") + 365 * 86_400_000;
    let () = server.command(&format!("ZADD {TAG}due {due_ms} {}", letter.id));
    let retried = node.retried().await;
    assert_eq!(retried.len(), 1);
    assert_eq!(retried[0].fields, entry.fields);
}
