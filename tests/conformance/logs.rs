//! Guarantees of logs and records: one id per event, pages that distinguish a gap from an end, and
//! limits.

use super::*;

const BEGIN: NotificationId = NotificationId(0);

pub(super) async fn an_event_has_one_id_and_one_record_in_all_logs(bench: Bench) {
    let node = bench.open().await;
    let id = node
        .publish("{\"a\":1}", &["u:1", "g:ops", "g:Ülrike {x} : y", "all"])
        .await;
    for log in ["u:1", "g:ops", "g:Ülrike {x} : y", "all"] {
        assert_eq!(node.ids(log, BEGIN).await, [id], "{log}");
    }
    assert_eq!(
        node.broker.records(node.p, &[id]).await.unwrap(),
        [Some(Bytes::from_static(b"{\"a\":1}"))]
    );
}

pub(super) async fn the_first_entry_of_a_log_points_to_the_floor_or_the_last_id(bench: Bench) {
    let node = bench.open().await;
    let floor = node.head().await.floor;
    // Before the first commit, the predecessor is 0: a reader that starts from nothing has missed
    // nothing, although the floor is higher.
    let first = node.publish("1", &["u:1"]).await;
    let page = node
        .broker
        .page(node.p, &target("u:1"), BEGIN, 10)
        .await
        .unwrap();
    assert_eq!(page.entries, [(first, BEGIN)]);
    assert!(page.floor >= floor);
    let second = node.publish("2", &["u:2"]).await;
    let page = node
        .broker
        .page(node.p, &target("u:2"), BEGIN, 10)
        .await
        .unwrap();
    assert_eq!(page.entries, [(second, page.entries[0].1)]);
    assert!(
        page.entries[0].1 >= floor && page.entries[0].1 <= first,
        "{page:?}"
    );
}

pub(super) async fn each_entry_points_to_the_one_before_it_in_its_log(bench: Bench) {
    let node = bench.open().await;
    let a = node.publish("a", &["u:1", "all"]).await;
    let b = node.publish("b", &["u:2", "all"]).await;
    let entry = node.head().await.position.entry;
    let entries = [after(entry), after(after(entry))];
    let done = node
        .commit(vec![
            commit(entries[0], "c", &["u:1"]),
            commit(entries[1], "d", &["u:1", "all"]),
        ])
        .await;
    let (c, d) = (done[0].1.unwrap(), done[1].1.unwrap());
    let page = async |log| {
        node.broker
            .page(node.p, &target(log), BEGIN, 10)
            .await
            .unwrap()
            .entries
    };
    assert_eq!(page("u:1").await[1..], [(c, a), (d, c)]);
    assert_eq!(page("all").await[1..], [(b, a), (d, b)]);
}

pub(super) async fn a_page_continues_where_the_one_before_ended(bench: Bench) {
    let node = bench.open().await;
    let mut all = Vec::new();
    for _ in 0..5 {
        all.push(node.publish("r", &["u:1"]).await);
    }
    let page = async |after, limit| {
        node.broker
            .page(node.p, &target("u:1"), after, limit)
            .await
            .unwrap()
    };
    let ids = |page: &pointsman::broker::Page| {
        page.entries.iter().map(|entry| entry.0).collect::<Vec<_>>()
    };
    let first = page(BEGIN, 2).await;
    assert_eq!((ids(&first), first.is_last), (all[..2].to_vec(), false));
    let second = page(all[1], 3).await;
    assert_eq!((ids(&second), second.is_last), (all[2..].to_vec(), true));
    let none = page(all[4], 3).await;
    assert_eq!(
        (ids(&none), none.is_last, none.is_present),
        (vec![], true, true)
    );
}

/// Logs with and without entries above their id, absent ones, and more of them than a broker reads in
/// one step.
pub(super) async fn pages_of_many_logs_are_those_of_each_log_in_order(bench: Bench) {
    let node = bench.open().await;
    let mut ids = Vec::new();
    for k in 0..4 {
        let log = format!("g:{k}");
        ids.push(node.publish("r", &["all", &log]).await);
        ids.push(node.publish("r", &["all", &log]).await);
    }
    let mut logs = vec![(target("all"), ids[2])];
    for k in 0..150 {
        logs.push((target(&format!("g:{}", k % 6)), ids[k % ids.len()]));
    }
    let pages = node.broker.pages(node.p, &logs, 3).await.unwrap();
    assert_eq!(pages.len(), logs.len());
    for (page, (log, after)) in pages.iter().zip(&logs) {
        let alone = node.broker.page(node.p, log, *after, 3).await.unwrap();
        assert_eq!(
            (&page.entries, page.is_present, page.is_last),
            (&alone.entries, alone.is_present, alone.is_last),
            "{log} after {after}"
        );
    }
    assert_eq!((pages[0].entries.len(), pages[0].is_last), (3, false));
    assert_eq!(node.broker.pages(node.p, &[], 3).await.unwrap().len(), 0);
}

pub(super) async fn an_absent_log_differs_from_an_empty_range(bench: Bench) {
    let node = bench.open().await;
    let id = node.publish("r", &["u:1"]).await;
    let absent = node
        .broker
        .page(node.p, &target("u:2"), BEGIN, 10)
        .await
        .unwrap();
    assert!(!absent.is_present && absent.is_last && absent.entries.is_empty());
    let empty = node
        .broker
        .page(node.p, &target("u:1"), id, 10)
        .await
        .unwrap();
    assert!(empty.is_present && empty.is_last && empty.entries.is_empty());
}

pub(super) async fn a_log_at_its_limit_drops_its_oldest_entries(bench: Bench) {
    let node = bench
        .open_with(&Retention {
            log_entries: 3,
            ..Retention::default()
        })
        .await;
    let mut all = Vec::new();
    for _ in 0..5 {
        all.push(node.publish("r", &["u:1"]).await);
    }
    assert_eq!(node.ids("u:1", BEGIN).await, all[2..]);
    // The first remaining entry has the last removed one as its predecessor, so that a reader from
    // before it detects the gap.
    let page = node
        .broker
        .page(node.p, &target("u:1"), BEGIN, 10)
        .await
        .unwrap();
    assert_eq!(page.entries[0], (all[2], all[1]));
}

/// A log that is still written to does not keep expired entries. The first remaining entry has the
/// last removed one as its predecessor, so that a reader from before it sees exactly one gap.
pub(super) async fn expired_entries_leave_a_log_that_is_still_in_use(bench: Bench) {
    let node = bench
        .open_with(&Retention {
            max_age: Duration::from_secs(3),
            ..Retention::default()
        })
        .await;
    let (a, b) = (
        node.publish("a", &["u:1"]).await,
        node.publish("b", &["u:1"]).await,
    );
    let begun_ms = node.head().await.now_ms;
    until(async || node.head().await.now_ms >= begun_ms + 2_000).await;
    let young = node.publish("young", &["u:1"]).await;
    until(async || {
        node.broker.tick(node.p).await.unwrap();
        !node.ids("u:1", BEGIN).await.contains(&b)
    })
    .await;
    for before in [BEGIN, a, b] {
        let page = node
            .broker
            .page(node.p, &target("u:1"), before, 10)
            .await
            .unwrap();
        assert_eq!(
            (page.entries, page.is_present, page.is_last),
            (vec![(young, b)], true, true),
            "from {before}"
        );
    }
    let new = node.publish("new", &["u:1"]).await;
    let page = node
        .broker
        .page(node.p, &target("u:1"), BEGIN, 10)
        .await
        .unwrap();
    assert_eq!(page.entries, [(young, b), (new, young)]);
}

pub(super) async fn the_log_of_everyone_has_its_own_limit(bench: Bench) {
    let node = bench
        .open_with(&Retention {
            log_entries: 2,
            everyone_entries: 4,
            ..Retention::default()
        })
        .await;
    let mut all = Vec::new();
    for _ in 0..6 {
        all.push(node.publish("r", &["g:ops", "all"]).await);
    }
    assert_eq!(node.ids("g:ops", BEGIN).await, all[4..]);
    assert_eq!(node.ids("all", BEGIN).await, all[2..]);
}

pub(super) async fn absent_records_are_none_at_their_index(bench: Bench) {
    let node = bench.open().await;
    let a = node.publish("a", &["u:1"]).await;
    let b = node.publish("b", &["u:1"]).await;
    let records = node
        .broker
        .records(node.p, &[b, NotificationId(7), a])
        .await
        .unwrap();
    assert_eq!(
        records,
        [
            Some(Bytes::from_static(b"b")),
            None,
            Some(Bytes::from_static(b"a"))
        ]
    );
    assert!(node.broker.records(node.p, &[]).await.unwrap().is_empty());
}

/// A reader uses the floor to detect that a log may have existed and expired. A falling floor would
/// hide that again.
pub(super) async fn the_floor_rises_with_time_and_never_falls(bench: Bench) {
    let node = bench
        .open_with(&Retention {
            max_age: Duration::from_secs(1),
            ..Retention::default()
        })
        .await;
    let head = node.head().await;
    assert_eq!(
        head.floor, head.origin,
        "no entry can be older than the partition"
    );
    node.publish("r", &["u:1"]).await;
    let mut floor = head.floor;
    until(async || {
        let head = node.head().await;
        assert!(head.floor >= floor);
        floor = head.floor;
        assert!(floor <= NotificationId::at_ms(head.now_ms));
        floor > head.origin
    })
    .await;
    assert_eq!(node.head().await.origin, head.origin);
    // The first entry of a new log has the current floor as its predecessor, or the last id if that
    // is older: no id exists between the two.
    let last = node.head().await.last;
    let second = node.publish("r", &["u:2"]).await;
    let page = node
        .broker
        .page(node.p, &target("u:2"), BEGIN, 10)
        .await
        .unwrap();
    assert_eq!(page.entries[0].0, second);
    assert!(page.entries[0].1 <= page.floor && page.entries[0].1 <= last);
}

/// Entries written under a short age have expired or are about to. Raising the age must not make a
/// reader believe that all of them are still there.
pub(super) async fn raising_max_age_does_not_hide_that_old_entries_are_gone(bench: Bench) {
    let short = Retention {
        max_age: Duration::from_secs(1),
        ..Retention::default()
    };
    let node = bench.open_with(&short).await;
    let origin = node.head().await.origin;
    let id = node.publish("r", &["u:1"]).await;
    until(async || node.head().await.floor > origin).await;
    let before = node.head().await.floor;
    let node = Node {
        p: node.p,
        ..bench.open_with(&Retention::default()).await
    };
    let raised = node.head().await;
    assert!(
        raised.floor >= before,
        "{} fell below {before}",
        raised.floor
    );
    // A broker may remove the record now or keep it for the new age: in both cases, removed records
    // lie below the floor ...
    until(async || {
        let is_gone = node.broker.records(node.p, &[id]).await.unwrap()[0].is_none();
        let head = node.head().await;
        assert!(!is_gone || head.floor > id);
        head.now_ms > raised.now_ms + 2_000
    })
    .await;
    // ... and the floor rises no further than the time of the change.
    let changed_by = NotificationId::at_ms(raised.now_ms);
    assert!(node.head().await.floor <= changed_by.max(raised.last));
}
