//! Guarantees of a feed: commit order, only the followed logs, and a reset after a loss.

use super::*;

pub(super) async fn notices_arrive_in_commit_order(bench: Bench) {
    let node = bench.open().await;
    let mut receiver = node.receiver().await;
    receiver.follow_and_wait("u:1", 1).await;
    receiver.follow_and_wait("g:ops", 2).await;
    let epoch = node.head().await.epoch;
    let entry = after(node.head().await.position.entry);
    let at = |k| EntryId {
        seq: entry.seq + k,
        ..entry
    };
    let items = (0..50)
        .map(|k| {
            commit(
                at(k),
                "R",
                if k % 2 == 0 {
                    &["u:1"]
                } else {
                    &["g:ops", "u:1"]
                },
            )
        })
        .collect();
    let ids: Vec<_> = node
        .commit(items)
        .await
        .into_iter()
        .map(|(_, id)| id.unwrap())
        .collect();
    let last = node.publish("R", &["g:ops"]).await;
    let mut received = Vec::new();
    while received.last() != Some(&("g:ops".to_owned(), last)) {
        match receiver.next().await {
            Notice::Append {
                partition,
                target,
                epoch: of,
                id,
                ..
            } => {
                assert_eq!((partition, of), (node.p, epoch));
                received.push((target.to_string(), id));
            }
            Notice::Tick { .. } | Notice::Alive { .. } => {}
            other => panic!("unexpected notice {other:?}"),
        }
    }
    assert!(received.is_sorted_by_key(|(_, id)| *id), "{received:?}");
    let of = |log: &str| {
        received
            .iter()
            .filter(|(target, _)| target == log)
            .map(|(_, id)| *id)
            .collect::<Vec<_>>()
    };
    assert_eq!(of("u:1"), ids);
    assert_eq!(of("g:ops").len(), 26);
}

pub(super) async fn only_followed_logs_are_delivered(bench: Bench) {
    let node = bench.open().await;
    let mut receiver = node.receiver().await;
    receiver.follow_and_wait("u:1", 1).await;
    node.publish("R", &["u:2"]).await;
    node.publish("R", &["all"]).await;
    let id = node.publish("R", &["u:1"]).await;
    assert_eq!(receiver.append().await, ("u:1".into(), id));
}

pub(super) async fn a_notice_includes_a_small_record_but_not_a_large_one(bench: Bench) {
    let node = bench.open().await;
    let mut receiver = node.receiver().await;
    receiver.follow_and_wait("u:1", 1).await;
    let small = r#"{"a b":"ü \r"}"#;
    node.publish(small, &["u:1"]).await;
    node.publish(&"x".repeat(200_000), &["u:1"]).await;
    let mut records = Vec::new();
    while records.len() < 2 {
        if let Notice::Append { record, .. } = receiver.next().await {
            records.push(record);
        }
    }
    assert_eq!(
        records,
        [Some(Bytes::copy_from_slice(small.as_bytes())), None]
    );
}

/// The answer to an earlier request must not be mistaken for the answer to a later one: in between,
/// the log was not followed.
pub(super) async fn following_the_same_log_again_is_acknowledged_again(bench: Bench) {
    let node = bench.open().await;
    let mut receiver = node.receiver().await;
    receiver.follow("u:1", 1);
    receiver
        .feed
        .follow
        .send(Follow::Stop {
            partition: receiver.p,
            target: target("u:1"),
        })
        .unwrap();
    receiver.follow("u:1", 2);
    receiver.follow("u:1", 3);
    let mut tokens = Vec::new();
    while tokens.len() < 3 {
        if let Notice::Following { token } = receiver.next().await {
            tokens.push(token);
        }
    }
    assert_eq!(tokens, [1, 2, 3]);
    let id = node.publish("R", &["u:1"]).await;
    assert_eq!(
        receiver.append().await,
        ("u:1".into(), id),
        "delivered once, although the log was followed twice"
    );
    let next = node.publish("R", &["u:1"]).await;
    assert_eq!(receiver.append().await, ("u:1".into(), next));
}

pub(super) async fn a_log_that_is_no_longer_followed_sends_no_notices(bench: Bench) {
    let node = bench.open().await;
    let mut receiver = node.receiver().await;
    receiver.follow_and_wait("u:1", 1).await;
    receiver
        .feed
        .follow
        .send(Follow::Stop {
            partition: receiver.p,
            target: target("u:1"),
        })
        .unwrap();
    // Requests are handled in order: when the second is in effect, so is the first.
    receiver.follow_and_wait("u:2", 2).await;
    node.publish("R", &["u:1"]).await;
    let id = node.publish("R", &["u:2"]).await;
    assert_eq!(receiver.append().await, ("u:2".into(), id));
}

pub(super) async fn an_append_after_the_acknowledgement_is_delivered(bench: Bench) {
    let node = bench.open().await;
    let mut receiver = node.receiver().await;
    for round in 0..50 {
        let log = format!("u:{round}");
        receiver.follow_and_wait(&log, round).await;
        let id = node.publish("R", &[&log]).await;
        assert_eq!(receiver.append().await, (log, id));
    }
}

pub(super) async fn a_tick_carries_the_last_id_and_follows_its_notices(bench: Bench) {
    let node = bench.open().await;
    let mut receiver = node.receiver().await;
    receiver.follow_and_wait("u:1", 1).await;
    let mut ids = Vec::new();
    for _ in 0..20 {
        ids.push(node.publish("R", &["u:1"]).await);
    }
    node.broker.tick(node.p).await.unwrap();
    let mut received = Vec::new();
    loop {
        let (last, appended) = receiver.tick().await;
        received.extend(appended);
        // A broker may also tick on its own: every tick must be correct, and the last one carries
        // the last id.
        assert_eq!(received.last().copied().unwrap_or_default(), last);
        if last == ids[19] {
            break;
        }
    }
    assert_eq!(received, ids);
}

pub(super) async fn a_tick_during_a_plan_in_slices_carries_the_id_before_it(bench: Bench) {
    let node = bench.open().await;
    let mut receiver = node.receiver().await;
    let before = node.publish("R", &["u:1"]).await;
    let entry = after(node.head().await.position.entry);
    node.slice(commit(entry, "R", &["u:1"]), 0, false).await;
    node.broker.tick(node.p).await.unwrap();
    while receiver.tick().await.0 != before {}
    node.slice(commit(entry, "R", &["u:2"]), 1, true).await;
    node.broker.tick(node.p).await.unwrap();
    let last = node.head().await.last;
    while receiver.tick().await.0 != last {}
}

pub(super) async fn reconnecting_sends_a_reset_and_a_new_follow_request_works(bench: Bench) {
    let node = bench.open().await;
    let mut receiver = node.receiver().await;
    receiver.follow_and_wait("u:1", 1).await;
    receiver
        .feed
        .follow
        .send(Follow::Reconnect {
            partition: receiver.p,
        })
        .unwrap();
    loop {
        if let Notice::Reset { partitions } = receiver.next().await {
            assert!(partitions.contains(&node.p));
            break;
        }
    }
    node.publish("R", &["u:1"]).await;
    receiver.follow_and_wait("u:1", 2).await;
    let id = node.publish("R", &["u:1"]).await;
    assert_eq!(
        receiver.append().await,
        ("u:1".into(), id),
        "events published before the new request are only in the history"
    );
}

pub(super) async fn two_feeds_receive_the_same_notices(bench: Bench) {
    let node = bench.open().await;
    let (mut one, mut two) = (node.receiver().await, node.receiver().await);
    one.follow_and_wait("all", 1).await;
    two.follow_and_wait("all", 1).await;
    drop(node.receiver().await);
    let id = node.publish("R", &["all"]).await;
    assert_eq!(one.append().await, two.append().await);
    assert!(id > NotificationId(0));
}
