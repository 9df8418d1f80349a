//! Guarantees of a commit: it is atomic, applies to one position in one epoch, and handles each
//! entry once.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use super::*;
use pointsman::broker::RetryPolicy;
use pointsman::event::Epoch;

pub(super) async fn a_new_partition_is_empty(bench: Bench) {
    let node = bench.open().await;
    let head = node.head().await;
    assert_eq!(
        (head.position, head.last, head.pending),
        (Position::default(), NotificationId(0), None)
    );
    assert_eq!(head.epochs, [(head.epoch, NotificationId(0))]);
    assert!(head.origin > NotificationId(0) && head.floor >= head.origin);
    assert!(head.floor <= NotificationId::at_ms(head.now_ms));
}

pub(super) async fn a_commit_moves_the_position_and_the_last_id_together(bench: Bench) {
    let node = bench.open().await;
    let ids = node.append(&["a", "b", "c"]).await;
    let done = node
        .commit(vec![
            commit(ids[0], "A", &["u:1"]),
            item(ids[1], Proposal::Unrouted),
        ])
        .await;
    let head = node.head().await;
    assert_eq!(head.position, ids[1].into());
    assert_eq!(head.last, done[0].1.unwrap());
    assert_eq!((done[1].0, done[1].1), (Outcome::Unrouted, None));
    let rest = node
        .broker
        .read(node.p, head.position.entry, 10, Duration::ZERO)
        .await
        .unwrap();
    assert_eq!(
        rest.iter().map(|entry| entry.id).collect::<Vec<_>>(),
        ids[2..]
    );
}

pub(super) async fn a_commit_from_another_position_is_rejected(bench: Bench) {
    let node = bench.open().await;
    let ids = node.append(&["a", "b"]).await;
    let head = node.head().await;
    node.commit(vec![commit(ids[0], "A", &["u:1"])]).await;
    for prev in [
        head.position,
        ids[1].into(),
        Position {
            entry: ids[0],
            slices: 1,
        },
    ] {
        let batch = Batch {
            epoch: head.epoch,
            prev,
            items: vec![commit(ids[0], "A", &["u:1"]), commit(ids[1], "B", &["u:1"])],
        };
        assert_eq!(
            node.broker.commit(node.p, batch).await.unwrap(),
            CommitResult::Conflict
        );
    }
    assert_eq!(node.head().await.position, ids[0].into());
    assert_eq!(node.ids("u:1", NotificationId(0)).await.len(), 1);
    assert_eq!(node.count(Outcome::Committed).await, 1);
}

pub(super) async fn a_commit_of_another_epoch_is_rejected(bench: Bench) {
    let node = bench.open().await;
    let head = node.head().await;
    let other = Epoch::from_bits(head.epoch.bits() ^ 1);
    let items = vec![commit(after(head.position.entry), "A", &["u:1"])];
    assert_eq!(
        node.broker
            .commit(
                node.p,
                Batch {
                    epoch: other,
                    prev: head.position,
                    items
                }
            )
            .await
            .unwrap(),
        CommitResult::Conflict
    );
    assert_eq!(node.head().await.position, head.position);
}

pub(super) async fn each_outcome_is_counted_and_recorded_under_its_name(bench: Bench) {
    let node = bench.open().await;
    let ids = node.append(&["a", "b", "c", "d", "e", "f"]).await;
    let (why, policy) = (
        DeadReason {
            reason: "not now".into(),
            plugin: None,
            attempts: 1,
            fields: vec![field("v", "f")],
        },
        RetryPolicy {
            retries: 1,
            timeout: Duration::from_secs(1),
        },
    );
    let items = vec![
        with_id(commit(ids[0], "A", &["u:1"]), 1),
        item(ids[1], Proposal::Discard),
        item(ids[2], Proposal::Unrouted),
        with_id(commit(ids[3], "A", &["u:1"]), 1),
        dead(ids[4], "no type"),
        item(ids[5], Proposal::Retry(why, policy)),
    ];
    let done = node.commit(items).await;
    let words = [
        Outcome::Committed,
        Outcome::Discarded,
        Outcome::Unrouted,
        Outcome::Duplicate,
        Outcome::DeadLettered,
        Outcome::Retrying,
    ];
    assert_eq!(
        done.iter().map(|(outcome, _)| *outcome).collect::<Vec<_>>(),
        words
    );
    let state = node.broker.state(node.p).await.unwrap();
    assert_eq!(
        state.outcomes,
        words
            .into_iter()
            .map(|outcome| (outcome, 1))
            .collect::<BTreeMap<_, _>>()
    );
    let mut decisions = node.broker.decisions(node.p, 10).await.unwrap();
    decisions.reverse();
    assert_eq!(
        decisions.iter().map(|d| (d.0, d.1)).collect::<Vec<_>>(),
        ids.into_iter().zip(words).collect::<Vec<_>>()
    );
    assert_eq!(decisions[0].2, done[0].1);
}

pub(super) async fn ids_ascend_and_contain_the_time(bench: Bench) {
    let node = bench.open().await;
    let mut last = NotificationId(0);
    for _ in 0..3 {
        let entry = node.head().await.position.entry;
        let first = after(entry);
        let items = (0..64)
            .map(|k| {
                commit(
                    EntryId {
                        ms: first.ms,
                        seq: first.seq + k,
                    },
                    "R",
                    &["all"],
                )
            })
            .collect();
        for (_, id) in node.commit(items).await {
            let id = id.unwrap();
            assert!(id > last);
            last = id;
        }
    }
    let now_ms = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_millis() as u64;
    assert!(
        last.ms().abs_diff(now_ms) < 60_000,
        "{} and {now_ms}",
        last.ms()
    );
}

/// Only the compare-and-set guarantees this: without a lease, every owner reads, plans and commits
/// at its own pace and in batches of its own size.
pub(super) async fn four_racing_owners_without_a_lease_commit_in_order_exactly_once(bench: Bench) {
    const ENTRIES: usize = 2_000;
    let node = bench
        .open_with(&Retention {
            everyone_entries: 100_000,
            ..Retention::default()
        })
        .await;
    let values: Vec<String> = (0..ENTRIES).map(|k| k.to_string()).collect();
    for some in values.chunks(500) {
        node.append(&some.iter().map(String::as_str).collect::<Vec<_>>())
            .await;
    }
    let mut owners = Vec::new();
    for owner in 0..4 {
        let node = Node {
            p: node.p,
            ..bench
                .open_with(&Retention {
                    everyone_entries: 100_000,
                    ..Retention::default()
                })
                .await
        };
        owners.push(tokio::spawn(async move {
            let (mut committed, mut refused) = (0, 0);
            loop {
                // Read the head before the entries: in the other order, a batch could be older than
                // the epoch it names.
                let head = node.head().await;
                let count = 7 + owner * 13;
                let entries = node
                    .broker
                    .read(node.p, head.position.entry, count, Duration::ZERO)
                    .await
                    .unwrap();
                if entries.is_empty() {
                    return (committed, refused);
                }
                let items = entries
                    .iter()
                    .map(|e| commit(e.id, std::str::from_utf8(&e.fields[0].1).unwrap(), &["all"]))
                    .collect();
                match node
                    .broker
                    .commit(
                        node.p,
                        Batch {
                            epoch: head.epoch,
                            prev: head.position,
                            items,
                        },
                    )
                    .await
                    .unwrap()
                {
                    CommitResult::Done(outcomes) => committed += outcomes.len(),
                    CommitResult::Conflict => refused += 1,
                }
            }
        }));
    }
    let (mut committed, mut refused) = (0, 0);
    for owner in owners {
        let (c, r) = owner.await.unwrap();
        committed += c;
        refused += r;
    }
    assert_eq!(committed, ENTRIES);
    assert!(refused > 0, "no commit was rejected");
    let ids = node.ids("all", NotificationId(0)).await;
    let records = node.broker.records(node.p, &ids).await.unwrap();
    let stored: Vec<String> = records
        .into_iter()
        .map(|r| String::from_utf8(r.unwrap().to_vec()).unwrap())
        .collect();
    assert_eq!(stored, values);
}

pub(super) async fn notifications_of_several_slots_are_committed_in_one_step(bench: Bench) {
    let node = bench.open().await;
    let entry = EntryId {
        ms: 1_700_000_000_000,
        seq: 1,
    };
    let event = commit_all(entry, &[("A", &["u:1", "u:2"]), ("B", &["u:1"])]);
    let results = node
        .commit(vec![
            with_id(event.clone(), 1),
            commit(after(entry), "C", &["u:1"]),
            // A retry of the publisher: neither notification is written again.
            with_id(
                Item {
                    entry: after(after(entry)),
                    ..event
                },
                1,
            ),
        ])
        .await;
    let outcomes: Vec<Outcome> = results.iter().map(|(outcome, _)| *outcome).collect();
    assert_eq!(
        outcomes,
        [Outcome::Committed, Outcome::Committed, Outcome::Duplicate]
    );
    let first = results[0].1.unwrap();
    let [second, third] = [1, 2].map(|n| NotificationId(first.0 + n));
    assert_eq!(results[1].1, Some(third));
    let begin = NotificationId(0);
    assert_eq!(node.ids("u:1", begin).await, [first, second, third]);
    assert_eq!(node.ids("u:2", begin).await, [first]);
    let records = node.broker.records(node.p, &[first, second]).await.unwrap();
    assert_eq!(
        records,
        ["A", "B"].map(|record| Some(Bytes::from_static(record.as_bytes())))
    );
    assert_eq!(node.head().await.last, third);
}
