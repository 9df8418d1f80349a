//! Guarantees of deduplication: publishers' ids are remembered within a window of the entries'
//! time, and not for dead letters.

use super::*;

const WINDOW_MS: u64 = 1_000;

fn window() -> Retention {
    Retention {
        dedupe_window: Duration::from_millis(WINDOW_MS),
        ..Retention::default()
    }
}

/// An entry `ms` after a time that is a multiple of the window.
fn at(ms: u64) -> EntryId {
    EntryId {
        ms: 1_700_000_000_000 + ms,
        seq: 1,
    }
}

fn event(ms: u64, publisher_id: u8) -> Item {
    with_id(commit(at(ms), "R", &["u:1"]), publisher_id)
}

async fn outcomes(node: &Node, items: Vec<Item>) -> Vec<Outcome> {
    node.commit(items)
        .await
        .into_iter()
        .map(|(outcome, _)| outcome)
        .collect()
}

/// The window uses the times of the entries. With the clock of the commit, a stalled consumer would
/// not recognise a late retry.
pub(super) async fn a_retry_within_the_window_is_a_duplicate(bench: Bench) {
    let node = bench.open_with(&window()).await;
    assert_eq!(
        outcomes(&node, vec![event(10, 1), event(20, 2)]).await,
        [Outcome::Committed; 2]
    );
    assert_eq!(
        outcomes(&node, vec![event(30, 1)]).await,
        [Outcome::Duplicate]
    );
    // The previous bucket still counts in the next one.
    assert_eq!(
        outcomes(&node, vec![event(WINDOW_MS + 5, 2)]).await,
        [Outcome::Duplicate]
    );
    assert_eq!(node.ids("u:1", NotificationId(0)).await.len(), 2);
}

pub(super) async fn a_retry_within_the_same_batch_is_a_duplicate(bench: Bench) {
    let node = bench.open_with(&window()).await;
    let got = outcomes(
        &node,
        vec![
            event(10, 1),
            event(20, 2),
            event(30, 1),
            event(WINDOW_MS + 1, 2),
        ],
    )
    .await;
    assert_eq!(
        got,
        [
            Outcome::Committed,
            Outcome::Committed,
            Outcome::Duplicate,
            Outcome::Duplicate
        ]
    );
}

/// The window uses the times of the entries: a stalled consumer does not widen it, and a fast one
/// does not narrow it.
pub(super) async fn a_repeat_after_the_window_is_not_a_duplicate(bench: Bench) {
    let node = bench.open_with(&window()).await;
    assert_eq!(
        outcomes(&node, vec![event(10, 1)]).await,
        [Outcome::Committed]
    );
    assert_eq!(
        outcomes(&node, vec![event(2 * WINDOW_MS + 10, 1)]).await,
        [Outcome::Committed]
    );
}

/// After a stall, one batch can span hours. A repeat in it that lies beyond the window is a new
/// event.
pub(super) async fn a_repeat_in_the_same_batch_but_after_the_window_is_not_a_duplicate(
    bench: Bench,
) {
    let node = bench.open_with(&window()).await;
    assert_eq!(
        outcomes(&node, vec![event(10, 1), event(2 * WINDOW_MS + 10, 1)]).await,
        [Outcome::Committed; 2]
    );
}

pub(super) async fn discarded_and_unrouted_events_are_remembered(bench: Bench) {
    let node = bench.open_with(&window()).await;
    let items = vec![
        with_id(item(at(1), Proposal::Discard), 1),
        with_id(item(at(2), Proposal::Unrouted), 2),
    ];
    assert_eq!(
        outcomes(&node, items).await,
        [Outcome::Discarded, Outcome::Unrouted]
    );
    assert_eq!(
        outcomes(&node, vec![event(3, 1), event(4, 2)]).await,
        [Outcome::Duplicate; 2]
    );
}

/// If the id of a dead-lettered event were remembered, redriving it within the window would make it
/// a duplicate and lose it.
pub(super) async fn a_dead_letter_is_not_remembered(bench: Bench) {
    let node = bench.open_with(&window()).await;
    let got = outcomes(
        &node,
        vec![with_id(dead(at(1), "trap"), 1), event(2, 1), event(3, 1)],
    )
    .await;
    assert_eq!(
        got,
        [
            Outcome::DeadLettered,
            Outcome::Committed,
            Outcome::Duplicate
        ]
    );
}

/// A quiet period skips buckets. The buckets before it must be removed, and ids after it are
/// remembered again.
pub(super) async fn a_quiet_period_leaves_no_bucket_behind(bench: Bench) {
    // With room for one id per bucket, a bucket left behind shows as an overflow.
    let node = bench
        .open_with(&Retention {
            dedupe_entries: 1,
            ..window()
        })
        .await;
    for window in [0, 1, 2, 50, 51, 90] {
        assert_eq!(
            outcomes(&node, vec![event(window * WINDOW_MS, window as u8)]).await,
            [Outcome::Committed]
        );
    }
    assert_eq!(node.broker.state(node.p).await.unwrap().dedupe_overflows, 0);
    assert_eq!(
        outcomes(&node, vec![event(90 * WINDOW_MS + 1, 90)]).await,
        [Outcome::Duplicate]
    );
}

/// Without a limit, a fast source would fill the broker with the ids of its publishers.
pub(super) async fn a_full_window_stops_remembering_and_counts(bench: Bench) {
    let node = bench
        .open_with(&Retention {
            dedupe_entries: 2,
            ..window()
        })
        .await;
    assert_eq!(
        outcomes(&node, vec![event(1, 1), event(2, 2), event(3, 3)]).await,
        [Outcome::Committed; 3]
    );
    assert_eq!(
        outcomes(&node, vec![event(4, 2), event(5, 3)]).await,
        [Outcome::Duplicate, Outcome::Committed]
    );
    assert_eq!(node.broker.state(node.p).await.unwrap().dedupe_overflows, 2);
}

/// Ids are remembered per partition, like everything derived from a source: another partition may
/// be on another server.
pub(super) async fn the_same_id_in_another_partition_is_a_different_event(bench: Bench) {
    let node = bench.open_with(&window()).await;
    for partition in node.broker.partitions() {
        let one = Node {
            p: partition.number,
            ..node.clone()
        };
        assert_eq!(
            outcomes(&one, vec![event(10, 1), event(20, 1)]).await,
            [Outcome::Committed, Outcome::Duplicate]
        );
    }
}
