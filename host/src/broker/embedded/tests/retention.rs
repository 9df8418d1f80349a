//! Expired data is removed, and never silently: the floor and the stored predecessors show what is
//! missing.

use redb::ReadableTableMetadata as _;

use super::*;

fn short() -> Retention {
    Retention {
        max_age: Duration::from_secs(1_000),
        processed_entries_ttl: Duration::from_secs(60),
        dedupe_window: Duration::from_secs(100),
        ..Retention::default()
    }
}

/// A log that was removed completely looks like one that never existed; only the floor and the
/// predecessor of its next entry reveal it.
#[tokio::test]
async fn entries_older_than_max_age_are_removed_and_the_floor_covers_them() {
    let time = Time::new();
    let broker = in_memory(short(), &time);
    let old = publish(&broker, "old", &["u:1", "u:2"]).await;
    time.pass(500);
    let young = publish(&broker, "young", &["u:2"]).await;
    time.pass(600);
    sweep(&broker, &time).await;

    assert_eq!(
        broker.records(P, &[old, young]).await.unwrap(),
        [None, Some(Bytes::from_static(b"young"))]
    );
    let gone = page(&broker, "u:1", NotificationId(0)).await;
    assert!(
        !gone.is_present && gone.entries.is_empty() && gone.floor > old,
        "{gone:?}"
    );
    let cut = page(&broker, "u:2", NotificationId(0)).await;
    assert_eq!(
        cut.entries,
        [(young, old)],
        "the predecessor of the first entry is the removed one"
    );

    let floor = broker.head(P).await.unwrap().floor;
    let new = publish(&broker, "new", &["u:1"]).await;
    assert_eq!(
        page(&broker, "u:1", NotificationId(0)).await.entries,
        [(new, floor.min(young))]
    );
}

/// The clock jumps ahead, entries that seem old are removed, and the clock returns.
#[tokio::test]
async fn the_floor_never_falls_below_removed_entries() {
    let time = Time::new();
    let broker = in_memory(short(), &time);
    let id = publish(&broker, "x", &["u:1"]).await;
    let now_ms = time.now_ms();
    time.pass(100_000);
    sweep(&broker, &time).await;
    assert_eq!(broker.records(P, &[id]).await.unwrap(), [None]);
    time.0.store(now_ms, Ordering::SeqCst);
    assert!(broker.head(P).await.unwrap().floor > id);
}

/// `max_age` is raised after entries written under the lower one were removed or are about to be.
#[tokio::test]
async fn raising_max_age_restores_nothing_and_keeps_the_floor() {
    let (time, folder) = (Time::new(), Folder::new());
    let broker = in_folder(&folder, short(), &time);
    let gone = publish(&broker, "gone", &["u:1"]).await;
    time.pass(900);
    let kept = publish(&broker, "kept", &["u:1"]).await;
    time.pass(200);
    sweep(&broker, &time).await;
    let floor = broker.head(P).await.unwrap().floor;
    broker.close();

    let broker = in_folder(
        &folder,
        Retention {
            max_age: Duration::from_secs(100_000),
            ..short()
        },
        &time,
    );
    assert!(broker.head(P).await.unwrap().floor >= floor && floor > gone);
    time.pass(5_000);
    sweep(&broker, &time).await;
    assert_eq!(
        page(&broker, "u:1", NotificationId(0)).await.entries,
        [(kept, gone)]
    );
    assert_eq!(
        broker.records(P, &[kept]).await.unwrap(),
        [Some(Bytes::from_static(b"kept"))]
    );
    assert!(
        broker.head(P).await.unwrap().floor < kept,
        "existing entries are not below the floor"
    );
    broker.close();

    let broker = in_folder(&folder, short(), &time);
    sweep(&broker, &time).await;
    let head = broker.head(P).await.unwrap();
    assert!(head.floor > kept && !page(&broker, "u:1", NotificationId(0)).await.is_present);
}

/// The owner of a plan that is being written in slices is down for longer than `max_age`.
#[tokio::test]
async fn a_plan_being_written_in_slices_never_expires() {
    let time = Time::new();
    let broker = in_memory(short(), &time);
    let slice = |head: Head, index, log: &str, is_last| {
        let entry = if index == 0 {
            EntryId {
                ms: time.now_ms(),
                seq: 0,
            }
        } else {
            head.position.entry
        };
        Slice {
            epoch: head.epoch,
            prev: head.position,
            item: committing(entry, "plan", &[log]),
            index,
            is_last,
        }
    };
    let head = broker.head(P).await.unwrap();
    let CommitResult::Done(done) = broker
        .commit_slice(P, slice(head, 0, "u:1", false))
        .await
        .unwrap()
    else {
        panic!("the position is current")
    };
    let id = done[0].1.unwrap();
    time.pass(5_000);
    sweep(&broker, &time).await;
    assert_eq!(
        broker.records(P, &[id]).await.unwrap(),
        [Some(Bytes::from_static(b"plan"))]
    );
    assert_eq!(
        page(&broker, "u:1", NotificationId(0)).await.entries.len(),
        1
    );
    let head = broker.head(P).await.unwrap();
    assert_eq!((head.pending, head.position.slices), (Some(id), 1));
    assert_eq!(
        broker
            .commit_slice(P, slice(head, 1, "u:2", true))
            .await
            .unwrap(),
        CommitResult::Done(vec![(Outcome::Committed, Some(id))])
    );
    sweep(&broker, &time).await;
    assert_eq!(broker.records(P, &[id]).await.unwrap(), [None]);
}

/// Buckets follow the time of entries, and quiet periods skip some of them. The buckets left behind
/// are removed all the same.
#[tokio::test]
async fn no_dedupe_bucket_is_left_behind() {
    let time = Time::new();
    let broker = in_memory(short(), &time);
    let named = |hash: u8, entry| Item {
        dedupe: Some([hash; 16]),
        ..item(entry, Proposal::Discard)
    };
    let n_seen = || {
        rows(&broker, |transaction| {
            transaction.open_table(layout::SEEN).unwrap().len().unwrap()
        })
    };
    for hash in 0..20 {
        commit(&broker, vec![named(hash, entry_now(&broker))]).await;
        // Sometimes one bucket later, sometimes ten.
        time.pass(if hash % 3 == 0 { 1_000 } else { 100 });
        sweep(&broker, &time).await;
        assert!(n_seen() <= 2, "{}", n_seen());
    }
    assert!(broker.meta(0).unwrap().bucket_sizes.len() <= 2);
}

/// The window uses the time of the entries, so that a stalled consumer still recognises a retry.
#[tokio::test]
async fn a_stalled_consumer_recognises_a_retry_but_not_a_repeat_after_the_window() {
    let time = Time::new();
    let broker = in_memory(short(), &time);
    let named = |ms: u64| Item {
        dedupe: Some([7; 16]),
        ..item(EntryId { ms, seq: 0 }, Proposal::Discard)
    };
    let start = time.now_ms() / 100_000 * 100_000;
    assert_eq!(
        commit(&broker, vec![named(start)]).await[0].0,
        Outcome::Discarded
    );
    time.pass(900);
    sweep(&broker, &time).await;
    // One batch after a stall: an id repeated after ten seconds is a retry, and after three windows
    // a new event.
    let outcomes = commit(
        &broker,
        vec![
            named(start + 10_000),
            named(start + 310_000),
            named(start + 320_000),
        ],
    )
    .await;
    assert_eq!(
        outcomes
            .iter()
            .map(|(outcome, _)| *outcome)
            .collect::<Vec<_>>(),
        [Outcome::Duplicate, Outcome::Discarded, Outcome::Duplicate]
    );
}

/// The window is bounded; ids beyond it are let through and counted.
#[tokio::test]
async fn ids_beyond_a_full_dedupe_window_are_counted() {
    let time = Time::new();
    let broker = in_memory(
        Retention {
            dedupe_entries: 2,
            ..short()
        },
        &time,
    );
    let named = |hash: u8, seq| Item {
        dedupe: Some([hash; 16]),
        ..item(
            EntryId {
                ms: time.now_ms(),
                seq,
            },
            Proposal::Discard,
        )
    };
    let outcomes = commit(
        &broker,
        vec![
            named(1, 1),
            named(2, 2),
            named(3, 3),
            named(1, 4),
            named(3, 5),
        ],
    )
    .await;
    let expect = [
        Outcome::Discarded,
        Outcome::Discarded,
        Outcome::Discarded,
        Outcome::Duplicate,
        Outcome::Discarded,
    ];
    assert_eq!(
        outcomes
            .iter()
            .map(|(outcome, _)| *outcome)
            .collect::<Vec<_>>(),
        expect
    );
    assert_eq!(broker.state(P).await.unwrap().dedupe_overflows, 2);
}

#[tokio::test]
async fn entries_are_removed_only_some_time_after_their_outcome() {
    let time = Time::new();
    let broker = in_memory(short(), &time);
    let n_entries = || {
        rows(&broker, |transaction| {
            transaction
                .open_table(layout::SOURCE)
                .unwrap()
                .len()
                .unwrap()
        })
    };
    let ids = broker
        .append(P, (0..5).map(|n| entry(&n.to_string())).collect())
        .await
        .unwrap();
    time.pass(10_000);
    sweep(&broker, &time).await;
    assert_eq!(n_entries(), 5, "entries without an outcome are kept");
    commit(
        &broker,
        ids[..3]
            .iter()
            .map(|&id| item(id, Proposal::Discard))
            .collect(),
    )
    .await;
    time.pass(30);
    sweep(&broker, &time).await;
    assert_eq!(n_entries(), 5, "entries with a recent outcome are kept");
    time.pass(60);
    sweep(&broker, &time).await;
    assert_eq!(n_entries(), 2);
    assert_eq!(
        broker
            .read(P, EntryId::default(), 10, Duration::ZERO)
            .await
            .unwrap()[0]
            .id,
        ids[3]
    );
}

/// More rows than one step removes: the sweep continues where it stopped.
#[tokio::test]
async fn a_long_sweep_runs_in_bounded_steps() {
    let time = Time::new();
    let broker = in_memory(short(), &time);
    let mut entry = entry_now(&broker);
    for batch in 0..100 {
        let items = (0..64).map(|n| {
            entry = layout::successor(entry);
            committing(entry, "x", &[&format!("u:{batch}-{n}")])
        });
        let items = items.collect();
        commit(&broker, items).await;
    }
    let n_rows = || {
        rows(&broker, |transaction| {
            let logs = transaction.open_table(layout::LOGS).unwrap().len().unwrap();
            let index = transaction
                .open_table(layout::INDEX)
                .unwrap()
                .len()
                .unwrap();
            logs + index
                + transaction
                    .open_table(layout::RECORDS)
                    .unwrap()
                    .len()
                    .unwrap()
        })
    };
    assert_eq!(n_rows(), 3 * 6_400);
    time.pass(2_000);
    broker.tick(P).await.unwrap();
    broker.tick(P).await.unwrap();
    assert!(n_rows() >= 6_400, "one step is bounded");
    sweep(&broker, &time).await;
    assert_eq!(n_rows(), 0);
}

/// Dead letters and decisions have a limit, and trimmed dead letters are counted.
#[tokio::test]
async fn dead_letters_and_decisions_are_bounded_and_trimming_is_counted() {
    let time = Time::new();
    let broker = in_memory(
        Retention {
            dead_letter_entries: 3,
            decision_entries: 4,
            ..short()
        },
        &time,
    );
    let why = |n: u64| DeadReason {
        reason: format!("reason {n}"),
        plugin: None,
        attempts: 1,
        fields: entry(&n.to_string()),
    };
    commit(
        &broker,
        (1..=5)
            .map(|seq| {
                item(
                    EntryId {
                        ms: time.now_ms(),
                        seq,
                    },
                    Proposal::DeadLetter(why(seq)),
                )
            })
            .collect(),
    )
    .await;
    let letters = broker
        .dead_letters(P, EntryId::default(), 10)
        .await
        .unwrap();
    assert_eq!(
        letters
            .iter()
            .map(|letter| &*letter.why.reason)
            .collect::<Vec<_>>(),
        ["reason 3", "reason 4", "reason 5"]
    );
    let state = broker.state(P).await.unwrap();
    assert_eq!((state.dead_letters, state.dead_trimmed), (3, 2));
    let decisions = broker.decisions(P, 10).await.unwrap();
    assert_eq!(
        decisions
            .iter()
            .map(|(entry, ..)| entry.seq)
            .collect::<Vec<_>>(),
        [5, 4, 3, 2]
    );
}

/// A user's row does not grow with every group that the user ever left.
#[tokio::test]
async fn a_membership_is_removed_once_none_of_its_events_can_be_replayed() {
    let time = Time::new();
    let broker = in_memory(short(), &time);
    let (user, change) = (Name::parse("1").unwrap(), |group: &str, joins: bool| {
        let group = Name::parse(group).unwrap();
        if joins {
            RecipientChange::Join { group }
        } else {
            RecipientChange::Leave { group }
        }
    });
    publish(&broker, "x", &["g:a"]).await;
    broker
        .change_recipient(&user, change("a", true))
        .await
        .unwrap();
    publish(&broker, "x", &["g:a"]).await;
    broker
        .change_recipient(&user, change("a", false))
        .await
        .unwrap();
    assert!(
        broker
            .recipient(&user)
            .await
            .unwrap()
            .groups
            .values()
            .all(|spans| spans[&P].left.is_some())
    );
    assert_eq!(broker.recipient(&user).await.unwrap().groups.len(), 1);
    time.pass(2_000);
    broker
        .change_recipient(&user, change("b", true))
        .await
        .unwrap();
    let groups = broker.recipient(&user).await.unwrap().groups;
    assert_eq!(groups.keys().map(Name::as_str).collect::<Vec<_>>(), ["b"]);
}

/// The position survives the process, and so do the numbers of take-overs and attempts at it.
#[tokio::test]
async fn take_over_and_attempt_counts_survive_the_process() {
    let (time, folder) = (Time::new(), Folder::new());
    let at = EntryId { ms: 5, seq: 0 };
    for n in 1..=3 {
        let broker = in_folder(&folder, short(), &time);
        assert_eq!(
            (
                broker.take_over(P).await.unwrap(),
                broker.note_attempt(P, at).await.unwrap()
            ),
            (n, n)
        );
    }
    let broker = in_folder(&folder, short(), &time);
    commit(&broker, vec![item(at, Proposal::Unrouted)]).await;
    assert_eq!(broker.take_over(P).await.unwrap(), 1);
    assert_eq!(broker.head(P).await.unwrap().position, Position::from(at));
}

/// Includes users who never return, whose rows no request would clean up.
#[tokio::test]
async fn expired_device_cursors_are_removed() {
    let time = Time::new();
    let broker = in_memory(
        Retention {
            device_cursor_ttl: Duration::from_secs(50_000),
            ..short()
        },
        &time,
    );
    let (ann, phone) = (
        Name::parse("ann").unwrap(),
        CursorOwner::Device(Name::parse("phone").unwrap()),
    );
    let stored = StoredCursor {
        cursor: "A".to_owned(),
        is_acknowledged: true,
    };
    for user in (0..3_000)
        .map(|n| Name::parse(&n.to_string()).unwrap())
        .chain([ann.clone()])
    {
        assert!(
            broker
                .move_device_cursor(&user, &phone, None, &stored)
                .await
                .unwrap()
        );
    }
    time.pass(40_000);
    assert!(
        broker
            .move_device_cursor(&ann, &phone, Some(&stored), &stored)
            .await
            .unwrap()
    );
    let n_users = || {
        rows(&broker, |transaction| {
            transaction
                .open_table(layout::DEVICE_CURSORS)
                .unwrap()
                .len()
                .unwrap()
        })
    };
    sweep(&broker, &time).await;
    assert_eq!(n_users(), 3_001);
    time.pass(20_000);
    sweep(&broker, &time).await;
    assert_eq!(n_users(), 1);
    assert_eq!(
        broker.device_cursors(&ann).await.unwrap().get(&phone),
        Some(&stored)
    );
}

/// Includes users who never return, whose rows no request would clean up.
#[tokio::test]
async fn a_user_who_left_all_groups_long_ago_is_removed() {
    let time = Time::new();
    let broker = in_memory(short(), &time);
    let change = async |user: &str, change| {
        broker
            .change_recipient(&Name::parse(user).unwrap(), change)
            .await
            .unwrap()
    };
    let group = Name::parse("a").unwrap();
    publish(&broker, "x", &["g:a"]).await;
    for user in ["left", "member", "known"] {
        change(
            user,
            RecipientChange::Join {
                group: group.clone(),
            },
        )
        .await;
    }
    change(
        "known",
        RecipientChange::Attributes([("plan".into(), Value::Flag(true))].into()),
    )
    .await;
    change(
        "left",
        RecipientChange::Leave {
            group: group.clone(),
        },
    )
    .await;
    change("known", RecipientChange::Leave { group }).await;
    let n_users = || {
        rows(&broker, |transaction| {
            transaction
                .open_table(layout::USERS)
                .unwrap()
                .len()
                .unwrap()
        })
    };
    time.pass(900);
    sweep(&broker, &time).await;
    assert_eq!(
        n_users(),
        3,
        "events committed before the user left are still kept"
    );
    time.pass(4_000);
    sweep(&broker, &time).await;
    assert_eq!(n_users(), 2);
    for user in ["member", "known"] {
        assert_ne!(
            broker.recipient(&Name::parse(user).unwrap()).await.unwrap(),
            Recipient::default(),
            "{user}"
        );
    }
}
