//! Large plans and batches are cheap for Redis and for other publishers.

use super::*;

impl Node {
    /// Asserts that the key of a log outlives its newest entry by `max_age`.
    async fn outlives(&self, server: &RedisServer, id: NotificationId, max_age: Duration) {
        let until: u64 = server.command(&format!("PEXPIRETIME {TAG}l:u:1"));
        let newest = self.ids("u:1", BEGIN).await.pop();
        assert_eq!(newest, Some(id));
        assert!(
            until >= id.ms() + max_age.as_millis() as u64,
            "the key expires at {until}, and its newest entry is of {}",
            id.ms()
        );
    }
}

/// The expiry is renewed once in a hundredth of the age, not at each write: a log that is written to
/// all the time must not expire in between.
#[tokio::test]
async fn a_log_in_use_outlives_its_newest_entry() {
    let server = RedisServer::start();
    let max_age = Duration::from_secs(1);
    let retention = Retention {
        max_age,
        ..Retention::default()
    };
    let node = connect_to(&server.url(), &[SOURCE], retention)
        .await
        .expect("connect");
    let first = node.publish("R", &["u:1"]).await;
    until(async || {
        let id = node.publish("R", &["u:1"]).await;
        node.outlives(&server, id, max_age).await;
        id.ms() > first.ms() + 1_500
    })
    .await;
    // Expired entries left it as well.
    let oldest = node.ids("u:1", BEGIN).await[0];
    assert!(oldest > first, "{oldest:?}");
}

/// The key still has the expiry of the lower age, and the entry before is of the same period.
#[tokio::test]
async fn a_log_outlives_its_newest_entry_after_max_age_was_raised() {
    let server = RedisServer::start();
    for max_age in [Duration::from_secs(60), Duration::from_secs(86_400)] {
        let retention = Retention {
            max_age,
            ..Retention::default()
        };
        let node = connect_to(&server.url(), &[SOURCE], retention)
            .await
            .expect("connect");
        for _ in 0..2 {
            let id = node.publish("R", &["u:1"]).await;
            node.outlives(&server, id, max_age).await;
        }
    }
}

/// A plan for 10,000 users has a record of hundreds of kilobytes and ten slices.
#[tokio::test]
async fn a_large_record_is_sent_with_the_first_slice_only() {
    let server = RedisServer::start();
    let node = node_on(&server).await;
    let n_bytes = || {
        let stats: String = server.command("INFO stats");
        let line = stats
            .lines()
            .find_map(|line| line.strip_prefix("total_net_input_bytes:"));
        line.and_then(|n| n.trim().parse::<u64>().ok())
            .expect("a number")
    };
    let record = "x".repeat(500_000);
    let entry = after(EntryId::default());
    node.slice(commit(entry, &record, &["u:1"]), 0, false).await;
    let before = n_bytes();
    node.slice(commit(entry, &record, &["u:2"]), 1, false).await;
    node.slice(commit(entry, &record, &["u:3"]), 2, true).await;
    let sent = n_bytes() - before;
    assert!(sent < 100_000, "{sent} bytes for two slices");
    let id = node.ids("u:3", BEGIN).await[0];
    let stored = node.broker.records(node.p, &[id]).await.unwrap();
    assert_eq!(stored[0].as_deref(), Some(record.as_bytes()));
}

/// A batch is appended in parts, and the entries of other publishers come in between.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_batch_does_not_keep_other_publishers_from_appending() {
    let server = RedisServer::start();
    let (bulk, other) = (node_on(&server).await, node_on(&server).await);
    until(async || {
        let batch = tokio::spawn({
            let bulk = bulk.clone();
            async move { bulk.append(&["v"; 5_000]).await }
        });
        let mut single = Vec::new();
        while !batch.is_finished() {
            single.extend(other.append(&["v"]).await);
        }
        let batch = batch.await.expect("no panic");
        assert!(batch.is_sorted());
        let is_between = |id: &EntryId| *id > batch[0] && *id < batch[4_999];
        single.iter().any(is_between)
    })
    .await;
}
