//! Guarantees of a large plan that is written in slices: one id, one record and one outcome, even
//! if several owners write it.

use super::*;

const BEGIN: NotificationId = NotificationId(0);

fn entry() -> EntryId {
    EntryId {
        ms: 1_700_000_000_000,
        seq: 1,
    }
}

fn logs(range: std::ops::Range<u32>) -> Vec<String> {
    range.map(|k| format!("u:{k}")).collect()
}

fn part(range: std::ops::Range<u32>) -> Item {
    let logs = logs(range);
    commit(
        entry(),
        "the whole plan",
        &logs.iter().map(String::as_str).collect::<Vec<_>>(),
    )
}

fn done(committed: &CommitResult) -> (Outcome, Option<NotificationId>) {
    match committed {
        CommitResult::Done(outcomes) => outcomes[0],
        CommitResult::Conflict => panic!("the slice was rejected"),
    }
}

pub(super) async fn a_plan_in_slices_ends_with_one_id_in_all_logs(bench: Bench) {
    let node = bench.open().await;
    let first = done(&node.slice(part(0..1_000), 0, false).await);
    let second = done(&node.slice(part(1_000..2_000), 1, false).await);
    let third = done(&node.slice(part(2_000..2_001), 2, true).await);
    assert_eq!((first.0, first), (Outcome::Committed, second));
    assert_eq!(first, third);
    let id = first.1.unwrap();
    for log in ["u:0", "u:999", "u:1000", "u:2000"] {
        assert_eq!(node.ids(log, BEGIN).await, [id]);
    }
    assert_eq!(
        node.broker.records(node.p, &[id]).await.unwrap(),
        [Some(Bytes::from_static(b"the whole plan"))]
    );
    assert!(node.publish("next", &["u:1"]).await > id);
}

pub(super) async fn last_moves_with_the_final_slice_only(bench: Bench) {
    let node = bench.open().await;
    let before = node.publish("before", &["u:1"]).await;
    let entry = after(node.head().await.position.entry);
    let slice = |log: &str| commit(entry, "R", &[log]);
    let id = done(&node.slice(slice("u:1"), 0, false).await).1.unwrap();
    let head = node.head().await;
    assert_eq!(
        (head.position, head.last, head.pending),
        (Position { entry, slices: 1 }, before, Some(id))
    );
    assert_eq!(head.top(), id);
    // The written part is already readable, and so is its record.
    assert_eq!(node.ids("u:1", before).await, [id]);
    assert!(node.broker.records(node.p, &[id]).await.unwrap()[0].is_some());
    node.slice(slice("u:2"), 1, true).await;
    let head = node.head().await;
    assert_eq!(
        (head.position, head.last, head.pending),
        (entry.into(), id, None)
    );
}

pub(super) async fn a_slice_from_another_position_is_rejected(bench: Bench) {
    let node = bench.open().await;
    let head = node.head().await;
    node.slice(part(0..1), 0, false).await;
    let attempt = async |prev, item, index| {
        let slice = Slice {
            epoch: head.epoch,
            prev,
            item,
            index,
            is_last: true,
        };
        node.broker.commit_slice(node.p, slice).await.unwrap()
    };
    let at = Position {
        entry: entry(),
        slices: 1,
    };
    assert_eq!(
        attempt(head.position, part(0..1), 0).await,
        CommitResult::Conflict,
        "the first slice, repeated"
    );
    assert_eq!(
        attempt(at, part(1..2), 2).await,
        CommitResult::Conflict,
        "a slice other than the next one"
    );
    let other = commit(after(entry()), "R", &["u:1"]);
    assert_eq!(
        attempt(at, other, 1).await,
        CommitResult::Conflict,
        "a slice of another plan"
    );
    let batch = Batch {
        epoch: head.epoch,
        prev: at,
        items: vec![commit(after(entry()), "R", &["u:1"])],
    };
    assert_eq!(
        node.broker.commit(node.p, batch).await.unwrap(),
        CommitResult::Conflict,
        "a batch in the middle of a plan"
    );
    assert_eq!(node.head().await.position, at);
    assert_eq!(
        done(&attempt(at, part(1..2), 1).await).0,
        Outcome::Committed
    );
}

pub(super) async fn a_new_owner_continues_the_plan_from_the_stored_record(bench: Bench) {
    let node = bench.open().await;
    let id = done(&node.slice(part(0..2), 0, false).await).1.unwrap();
    drop(node);
    // The next owner has never seen the event: position, id and record must be enough.
    let node = bench.reopen().await;
    let head = node.head().await;
    assert_eq!(
        (head.position, head.pending),
        (
            Position {
                entry: entry(),
                slices: 1
            },
            Some(id)
        )
    );
    let record = node.broker.records(node.p, &[id]).await.unwrap()[0]
        .clone()
        .unwrap();
    let rest = item(entry(), Proposal::commit(record, vec![target("u:2")]));
    assert_eq!(
        done(&node.slice(rest, 1, true).await),
        (Outcome::Committed, Some(id))
    );
    assert_eq!(node.ids("u:2", BEGIN).await, [id]);
}

/// A slice covers targets of both notifications of the event.
pub(super) async fn notifications_of_several_slots_have_consecutive_ids_in_slices(bench: Bench) {
    let node = bench.open().await;
    let both =
        |first: &[&str], second: &[&str]| commit_all(entry(), &[("A", first), ("B", second)]);
    let first = done(&node.slice(both(&["u:1", "u:2"], &[]), 0, false).await)
        .1
        .unwrap();
    let second = NotificationId(first.0 + 1);
    let head = node.head().await;
    assert_eq!((head.pending, head.top()), (Some(second), second));
    let records = node.broker.records(node.p, &[first, second]).await.unwrap();
    assert_eq!(
        records,
        [
            Some(Bytes::from_static(b"A")),
            Some(Bytes::from_static(b"B"))
        ]
    );
    assert_eq!(
        done(&node.slice(both(&["u:3"], &["u:1"]), 1, false).await).1,
        Some(first)
    );
    assert_eq!(
        done(&node.slice(both(&[], &["u:3"]), 2, true).await),
        (Outcome::Committed, Some(first))
    );
    assert_eq!(node.ids("u:1", BEGIN).await, [first, second]);
    assert_eq!(node.ids("u:2", BEGIN).await, [first]);
    assert_eq!(node.ids("u:3", BEGIN).await, [first, second]);
    let head = node.head().await;
    assert_eq!((head.pending, head.last), (None, second));
    // The next event lies above both.
    let next = node
        .commit(vec![commit(after(entry()), "C", &["u:1"])])
        .await[0]
        .1
        .unwrap();
    assert!(next > second);
}

pub(super) async fn slice_0_finds_a_duplicate_and_ends_the_plan(bench: Bench) {
    let node = bench.open().await;
    node.commit(vec![with_id(commit(entry(), "R", &["u:1"]), 1)])
        .await;
    let again = with_id(commit(after(entry()), "R", &["u:2"]), 1);
    assert_eq!(
        done(&node.slice(again, 0, false).await),
        (Outcome::Duplicate, None)
    );
    let head = node.head().await;
    assert_eq!((head.position, head.pending), (after(entry()).into(), None));
    assert!(node.ids("u:2", BEGIN).await.is_empty());
}

pub(super) async fn a_plan_in_slices_is_counted_once(bench: Bench) {
    let node = bench.open().await;
    for (index, is_last) in [(0, false), (1, false), (2, true)] {
        assert_eq!(node.count(Outcome::Committed).await, 0);
        node.slice(with_id(part(index..index + 1), 1), index, is_last)
            .await;
    }
    assert_eq!(node.count(Outcome::Committed).await, 1);
    assert_eq!(node.broker.decisions(node.p, 10).await.unwrap().len(), 1);
    // Slice 0 remembered the publisher's id, and the later slices were not taken for its
    // duplicates.
    assert_eq!(
        node.commit(vec![with_id(commit(after(entry()), "R", &["u:1"]), 1)])
            .await[0]
            .0,
        Outcome::Duplicate
    );
}

pub(super) async fn a_plan_of_one_slice_is_a_commit(bench: Bench) {
    let node = bench.open().await;
    let (outcome, id) = done(&node.slice(part(0..3), 0, true).await);
    let head = node.head().await;
    assert_eq!(
        (outcome, head.last, head.pending, head.position),
        (Outcome::Committed, id.unwrap(), None, entry().into())
    );
}

/// Some logs already contain the event, so it cannot become a dead letter, even if the rest
/// fails.
pub(super) async fn a_started_plan_cannot_become_a_dead_letter(bench: Bench) {
    let node = bench.open().await;
    node.slice(part(0..1), 0, false).await;
    let head = node.head().await;
    let slice = Slice {
        epoch: head.epoch,
        prev: head.position,
        item: dead(entry(), "too often"),
        index: 1,
        is_last: true,
    };
    assert!(!matches!(
        node.broker.commit_slice(node.p, slice).await,
        Ok(CommitResult::Done(_))
    ));
    assert_eq!(
        (
            node.head().await.pending,
            node.count(Outcome::DeadLettered).await
        ),
        (head.pending, 0)
    );
}
