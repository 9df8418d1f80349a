//! Guarantees of a source: order, blocking reads, unchanged bytes and a limit.

use std::time::Instant;

use super::*;
use pointsman::broker::{Entry, Error};

pub(super) async fn entries_are_read_in_append_order(bench: Bench) {
    let node = bench.open().await;
    let ids = node.append(&["a", "b", "c", "d"]).await;
    assert!(ids.is_sorted_by(|a, b| a < b), "{ids:?}");
    let read = |after, count| node.broker.read(node.p, after, count, Duration::ZERO);
    let all = read(EntryId::default(), 10).await.unwrap();
    assert_eq!(all.iter().map(|entry| entry.id).collect::<Vec<_>>(), ids);
    assert_eq!(all[3].fields, [field("v", "d")]);
    let some = read(ids[0], 2).await.unwrap();
    assert_eq!(
        some.iter().map(|entry| entry.id).collect::<Vec<_>>(),
        ids[1..3]
    );
    assert!(read(ids[3], 10).await.unwrap().is_empty());
}

pub(super) async fn a_read_waits_for_the_first_entry(bench: Bench) {
    let node = bench.open().await;
    let reader = node.clone();
    let reading = tokio::spawn(async move {
        reader
            .broker
            .read(reader.p, EntryId::default(), 10, Duration::from_secs(30))
            .await
    });
    // Depending on the scheduler, the append comes before the read or while it waits. Both must
    // return the entry.
    tokio::task::yield_now().await;
    let ids = node.append(&["a"]).await;
    let entries = reading.await.unwrap().unwrap();
    assert_eq!(entries[0].id, ids[0]);
}

pub(super) async fn a_read_without_entries_ends_after_its_wait(bench: Bench) {
    let node = bench.open().await;
    let began = Instant::now();
    let entries = node
        .broker
        .read(node.p, EntryId::default(), 10, Duration::from_millis(100))
        .await
        .unwrap();
    assert!(entries.is_empty());
    assert!(
        began.elapsed() >= Duration::from_millis(90),
        "the read waited {:?}",
        began.elapsed()
    );
}

pub(super) async fn fields_are_kept_as_raw_bytes(bench: Bench) {
    let node = bench.open().await;
    let raw = (
        Bytes::from_static(b"\xff\x00\r\n name"),
        Bytes::from_static(b"\x00\x80*3\r\n$"),
    );
    let fields = vec![raw, field("", ""), field("v", "1"), field("v", "2")];
    node.broker
        .append(node.p, vec![fields.clone()])
        .await
        .unwrap();
    let read = node
        .broker
        .read(node.p, EntryId::default(), 1, Duration::ZERO)
        .await
        .unwrap();
    assert_eq!(read[0].fields, fields);
}

pub(super) async fn a_source_at_its_backlog_limit_accepts_no_entries(bench: Bench) {
    let node = bench
        .open_with(&Retention {
            backlog_entries: 3,
            ..Retention::default()
        })
        .await;
    let ids = node.append(&["a", "b", "c"]).await;
    let more = || node.broker.append(node.p, vec![vec![field("v", "d")]]);
    assert!(matches!(more().await, Err(Error::Full(_))));
    node.commit(vec![
        item(ids[0], Proposal::Discard),
        item(ids[1], Proposal::Discard),
    ])
    .await;
    more().await.expect("the backlog is below its limit again");
    let left = node
        .broker
        .read(node.p, ids[1], 10, Duration::ZERO)
        .await
        .unwrap();
    assert_eq!(left.len(), 2, "the rejected entry was not appended");
}

/// Of an entry above the limit, the beginning is read, and the entries around it as a whole.
pub(super) async fn only_the_beginning_of_a_large_entry_is_read(bench: Bench) {
    let node = bench
        .open_with(&Retention {
            max_event_bytes: 5_000,
            ..Retention::default()
        })
        .await;
    let exactly = vec![field("type", "t"), field("data", &"x".repeat(4_991))];
    let large = vec![
        field("type", "t"),
        field("id", "7"),
        field("data", &"x".repeat(100_000)),
        field("after", "it"),
    ];
    let entries = vec![
        vec![field("v", "a")],
        exactly.clone(),
        large,
        vec![field("v", "b")],
    ];
    let ids = node.broker.append(node.p, entries).await.unwrap();
    // One at a time as well, as ingest reads entries on which nodes crashed.
    for count in [10, 1] {
        let mut found = Vec::new();
        while found.len() < ids.len() {
            let after = found
                .last()
                .map_or(EntryId::default(), |entry: &Entry| entry.id);
            let some = node
                .broker
                .read(node.p, after, count, Duration::ZERO)
                .await
                .unwrap();
            assert!(!some.is_empty(), "after {after}");
            found.extend(some);
        }
        assert_eq!(found.iter().map(|entry| entry.id).collect::<Vec<_>>(), ids);
        for (at, fields) in [
            (0, vec![field("v", "a")]),
            (1, exactly.clone()),
            (3, vec![field("v", "b")]),
        ] {
            assert_eq!((&found[at].fields, found[at].oversized), (&fields, None));
        }
        let size = found[2].oversized.expect("it exceeds the limit");
        assert_eq!((size.bytes, size.fields, size.is_exact), (100_019, 4, true));
        assert_eq!(
            found[2].fields,
            [
                field("type", "t"),
                field("id", "7"),
                field("data", &"x".repeat(1_024 - 12)),
            ],
            "reading {count} at a time"
        );
    }
}

/// Readiness compares it to detect a source that stands still.
pub(super) async fn the_position_is_part_of_the_state(bench: Bench) {
    let node = bench.open().await;
    let position = async || node.broker.state(node.p).await.unwrap().position;
    assert_eq!(position().await, node.head().await.position);
    node.publish("R", &["u:1"]).await;
    assert_ne!(position().await.entry, EntryId::default());
    assert_eq!(position().await, node.head().await.position);
}
