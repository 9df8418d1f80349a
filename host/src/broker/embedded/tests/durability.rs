//! Everything that is acknowledged survives failures of the disk, the process and the power.

use std::fs;

use redb::{ReadableDatabase as _, ReadableTableMetadata as _};
use tokio::sync::mpsc::error::TryRecvError;

use super::*;

/// Waits for the next batch of notices.
async fn receive(feed: &mut Feed) -> Vec<Notice> {
    tokio::time::timeout(Duration::from_secs(20), feed.notices.recv())
        .await
        .expect("a notice arrives")
        .expect("the feed is open")
}

async fn follow(broker: &Embedded, log: &str) -> Feed {
    let mut feed = broker.feed().await.unwrap();
    feed.follow
        .send(Follow::Start {
            partition: P,
            target: target(log),
            token: 1,
        })
        .unwrap();
    assert!(matches!(
        *receive(&mut feed).await,
        [Notice::Following { token: 1 }]
    ));
    feed
}

/// A crash undoes data that is not on disk yet. A notice or an answer sent before that would have
/// shown it to clients.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_published_or_answered_before_it_is_durable() {
    let (folder, switch, time) = (Folder::new(), Arc::<disk::Switch>::default(), Time::new());
    let broker = Arc::new(on_disk(&folder, &switch, &time));
    let mut feed = follow(&broker, "u:1").await;

    let shut = switch.shut();
    let committing = tokio::spawn({
        let broker = Arc::clone(&broker);
        async move { publish(&broker, "{}", &["u:1"]).await }
    });
    shut.wait_for_knock();
    assert!(!committing.is_finished());
    assert!(matches!(feed.notices.try_recv(), Err(TryRecvError::Empty)));
    assert_eq!(broker.head(P).await.unwrap().last, NotificationId(0));
    assert!(
        page(&broker, "u:1", NotificationId(0))
            .await
            .entries
            .is_empty()
    );

    drop(shut);
    let id = committing.await.unwrap();
    let received = receive(&mut feed).await;
    assert!(
        matches!(&*received, [Notice::Append { id: received, .. }] if *received == id),
        "{received:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_wait_for_the_disk_share_the_next_fsync() {
    let (folder, switch, time) = (Folder::new(), Arc::<disk::Switch>::default(), Time::new());
    let broker = Arc::new(on_disk(&folder, &switch, &time));
    let append = |value: u32| {
        let broker = Arc::clone(&broker);
        tokio::spawn(async move {
            broker
                .append(P, vec![entry(&value.to_string())])
                .await
                .unwrap()
        })
    };
    let shut = switch.shut();
    let mut tasks = vec![append(0)];
    shut.wait_for_knock();
    tasks.extend((1..100).map(append));
    while broker.writer.n_waiting() < 99 {
        tokio::task::yield_now().await;
    }
    let before = switch.syncs.load(Ordering::SeqCst);
    drop(shut);
    for task in tasks {
        task.await.unwrap();
    }
    let n_syncs = switch.syncs.load(Ordering::SeqCst) - before;
    assert!(
        n_syncs <= 6,
        "two for the blocked group, and some for one more group: {n_syncs}"
    );
    assert_eq!(broker.state(P).await.unwrap().lag, 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_rejects_entries_is_reported_and_loses_nothing() {
    let (folder, switch, time) = (Folder::new(), Arc::<disk::Switch>::default(), Time::new());
    let broker = on_disk(&folder, &switch, &time);
    let kept = broker.append(P, vec![entry("kept")]).await.unwrap();
    let mut feed = follow(&broker, "u:1").await;

    switch.is_full.store(true, Ordering::SeqCst);
    let refused = broker.append(P, vec![entry("refused")]).await;
    assert!(
        matches!(&refused, Err(Error::Full(text)) if text.contains(folder.0.to_str().unwrap()) && text.contains("free disk space")),
        "{refused:?}"
    );
    assert!(matches!(broker.head(P).await, Err(Error::Full(_))));
    broker.tick(P).await.unwrap();
    assert!(matches!(
        *receive(&mut feed).await,
        [Notice::Alive { partition: P }]
    ));
    let findings = broker.check().await.unwrap();
    assert!(
        matches!(
            &*findings,
            [Finding {
                severity: Severity::Refusal,
                ..
            }]
        ),
        "{findings:?}"
    );

    switch.is_full.store(false, Ordering::SeqCst);
    time.pass(2);
    let after = broker.append(P, vec![entry("after")]).await.unwrap();
    assert_eq!(broker.check().await.unwrap(), []);
    let entries = broker
        .read(P, EntryId::default(), 10, Duration::ZERO)
        .await
        .unwrap();
    assert_eq!(
        entries.iter().map(|entry| entry.id).collect::<Vec<_>>(),
        [kept, after].concat()
    );
}

/// If publishers could fill the disk, there would be no space to write outcomes, and nothing would
/// ever be removed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nearly_full_disk_accepts_outcomes_but_no_new_entries() {
    let (folder, switch, time) = (Folder::new(), Arc::<disk::Switch>::default(), Time::new());
    let broker = on_disk(&folder, &switch, &time);
    let ids = broker
        .append(P, vec![entry("a"), entry("b")])
        .await
        .unwrap();

    switch.is_short.store(true, Ordering::SeqCst);
    time.pass(2);
    let refused = broker.append(P, vec![entry("c")]).await;
    assert!(
        matches!(&refused, Err(Error::Full(text)) if text.contains("less than 64 MiB are free")),
        "{refused:?}"
    );
    let findings = broker.check().await.unwrap();
    assert!(
        matches!(
            &*findings,
            [Finding {
                severity: Severity::Warning,
                ..
            }]
        ),
        "{findings:?}"
    );
    commit(
        &broker,
        ids.iter()
            .map(|&id| committing(id, "{}", &["u:1"]))
            .collect(),
    )
    .await;
    sweep(&broker, &time).await;
    let n_entries = rows(&broker, |transaction| {
        transaction
            .open_table(layout::SOURCE)
            .unwrap()
            .len()
            .unwrap()
    });
    assert_eq!(n_entries, 0, "entries with an outcome are removed at once");

    switch.is_short.store(false, Ordering::SeqCst);
    time.pass(2);
    broker.append(P, vec![entry("c")]).await.unwrap();
    assert_eq!(broker.check().await.unwrap(), []);
}

/// The last group before a failure may or may not be on disk afterwards, and its callers got no
/// answer: every stream must read again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_store_is_reopened_and_every_feed_is_reset() {
    let (folder, switch, time) = (Folder::new(), Arc::<disk::Switch>::default(), Time::new());
    let broker = on_disk(&folder, &switch, &time);
    let first = publish(&broker, "{}", &["u:1"]).await;
    let epoch = broker.head(P).await.unwrap().epoch;
    let mut feed = follow(&broker, "u:1").await;

    switch.is_broken.store(true, Ordering::SeqCst);
    let item = committing(entry_now(&broker), "{}", &["u:1"]);
    let batch = Batch {
        epoch,
        prev: broker.head(P).await.unwrap().position,
        items: vec![item],
    };
    let lost = broker.commit(P, batch.clone()).await;
    assert!(
        matches!(&lost, Err(Error::Unavailable(text)) if text.contains("the test broke the disk")),
        "{lost:?}"
    );
    // Reopening is neither tried at once nor does it succeed while the disk is broken.
    assert!(matches!(
        broker.commit(P, batch.clone()).await,
        Err(Error::Unavailable(_))
    ));
    time.pass(2);
    assert!(matches!(
        broker.commit(P, batch).await,
        Err(Error::Unavailable(_))
    ));

    switch.is_broken.store(false, Ordering::SeqCst);
    time.pass(2);
    broker.tick(P).await.unwrap();
    let mut received = Vec::new();
    while !received
        .iter()
        .any(|notice| matches!(notice, Notice::Reset { .. }))
    {
        received.extend(receive(&mut feed).await);
    }
    assert!(
        !received
            .iter()
            .any(|notice| matches!(notice, Notice::Append { .. })),
        "{received:?}"
    );
    let head = broker.head(P).await.unwrap();
    assert_eq!(
        (head.epoch, head.last),
        (epoch, first),
        "the failed commit had no effect, and no epoch began"
    );
    assert!(publish(&broker, "{}", &["u:1"]).await > first);
    assert_eq!(
        page(&broker, "u:1", NotificationId(0)).await.entries.len(),
        2
    );
}

/// Power fails at an arbitrary moment: of the sectors written since the last sync, any subset has
/// reached the disk, in any order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[expect(clippy::print_stdout, reason = "the seed reproduces a failing run")]
async fn no_power_failure_loses_or_tears_an_acknowledged_commit() {
    let seed = rand::random();
    println!("seed {seed}");
    let (folder, switch, time) = (Folder::new(), Arc::<disk::Switch>::default(), Time::new());
    let broker = on_disk(&folder, &switch, &time);
    let acknowledged = Arc::new(AtomicU64::new(0));
    switch.keep_images(&folder.file(), seed, Arc::clone(&acknowledged));
    const N: u64 = 12;
    for n in 0..N {
        publish(&broker, &format!("record {n}"), &["u:1", "all"]).await;
        acknowledged.store(n + 1, Ordering::SeqCst);
    }
    let images = switch.take_images();
    broker.close();
    assert!(
        images.len() as u64 >= 4 * N,
        "two syncs per commit, two images per sync"
    );
    for (n_acknowledged, image) in images {
        let left = Folder::new();
        fs::write(left.file(), image).unwrap();
        let broker = in_folder(&left, Retention::default(), &time);
        let n_settled = broker
            .state(P)
            .await
            .unwrap()
            .outcomes
            .get(&Outcome::Committed)
            .copied()
            .unwrap_or(0);
        assert!(
            (n_acknowledged..=n_acknowledged + 1).contains(&n_settled),
            "{n_settled} of {n_acknowledged} acknowledged"
        );
        for log in ["u:1", "all"] {
            let ids: Vec<NotificationId> = page(&broker, log, NotificationId(0))
                .await
                .entries
                .into_iter()
                .map(|(id, _)| id)
                .collect();
            let records = broker.records(P, &ids).await.unwrap();
            let expect: Vec<_> = (0..n_settled)
                .map(|n| Some(Bytes::from(format!("record {n}"))))
                .collect();
            assert_eq!(records, expect);
        }
    }
}

/// A truncated or overwritten store is never mistaken for an empty one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_store_is_rejected_and_left_unchanged() {
    let time = Time::new();
    let whole = {
        let folder = Folder::new();
        let broker = in_folder(&folder, Retention::default(), &time);
        for n in 0..200 {
            publish(&broker, &format!("record {n}"), &["u:1"]).await;
        }
        broker.close();
        fs::read(folder.file()).unwrap()
    };
    let garbage: Vec<u8> = (0..whole.len()).map(|i| (i * 7919) as u8).collect();
    for (what, bytes) in [
        ("empty", &whole[..0]),
        ("one page", &whole[..4096]),
        ("half", &whole[..whole.len() / 2]),
        ("garbage", &garbage),
    ] {
        let folder = Folder::new();
        fs::write(folder.file(), bytes).unwrap();
        let refused =
            Embedded::open(&folder.0, &sources(), Retention::default(), alarm()).map(drop);
        let text = format!("{:#}", refused.expect_err(what));
        assert!(
            text.contains(folder.0.to_str().unwrap())
                && text.contains("store.redb is not a valid store or is damaged"),
            "{what}: {text}"
        );
        assert_eq!(
            fs::read(folder.file()).unwrap(),
            bytes,
            "{what}: the file is unchanged"
        );
    }
}

fn set_version(folder: &Folder, version: u64) {
    let database = redb::Database::open(folder.file()).unwrap();
    let transaction = database.begin_write().unwrap();
    transaction
        .open_table(layout::LAYOUT)
        .unwrap()
        .insert("version", version)
        .unwrap();
    transaction.commit().unwrap();
}

/// An older pointsman would not append the retries of a store that this one has written.
#[test]
fn a_store_of_an_earlier_layout_is_opened_and_given_the_present_one() {
    let (folder, time) = (Folder::new(), Time::new());
    in_folder(&folder, Retention::default(), &time).close();
    set_version(&folder, 1);
    in_folder(&folder, Retention::default(), &time).close();
    let database = redb::Database::open(folder.file()).unwrap();
    let table = database
        .begin_read()
        .unwrap()
        .open_table(layout::LAYOUT)
        .unwrap();
    let version = table.get("version").unwrap().unwrap().value();
    assert_eq!(version, layout::VERSION);
}

#[test]
fn a_store_of_a_newer_pointsman_is_rejected() {
    let (folder, time) = (Folder::new(), Time::new());
    in_folder(&folder, Retention::default(), &time).close();
    set_version(&folder, layout::VERSION + 1);
    let refused = Embedded::open(&folder.0, &sources(), Retention::default(), alarm())
        .map(drop)
        .unwrap_err();
    let text = format!("{refused:#}");
    assert!(
        text.contains("created by a newer pointsman (layout 3, this version supports 2)")
            && text.contains(folder.0.to_str().unwrap()),
        "{text}"
    );
}

/// A crash while the store was being created leaves an incomplete file, which is discarded.
#[test]
fn an_incomplete_new_store_is_created_again() {
    let (folder, time) = (Folder::new(), Time::new());
    fs::write(folder.0.join("store.redb.new"), b"half").unwrap();
    in_folder(&folder, Retention::default(), &time).close();
    assert!(folder.file().exists() && !folder.0.join("store.redb.new").exists());
}

#[test]
fn a_source_keeps_its_number_and_no_number_is_reused() {
    let (folder, time) = (Folder::new(), Time::new());
    let numbers = |sources: &[&str]| -> anyhow::Result<Vec<(u8, String)>> {
        let sources: Vec<String> = sources.iter().map(|source| (*source).to_owned()).collect();
        let broker = Embedded::start(
            Medium::Folder(folder.0.clone()),
            &sources,
            Retention::default(),
            time.clock(),
            alarm(),
        )?;
        Ok(broker
            .partitions()
            .iter()
            .map(|partition| (partition.number.0, partition.source.clone()))
            .collect())
    };
    assert_eq!(
        numbers(&["b", "a"]).unwrap(),
        [(0, "b".into()), (1, "a".into())]
    );
    assert_eq!(
        numbers(&["c", "a"]).unwrap(),
        [(1, "a".into()), (2, "c".into())]
    );
    assert_eq!(numbers(&["b"]).unwrap(), [(0, "b".into())]);
    assert!(
        numbers(&["b", "b"])
            .unwrap_err()
            .to_string()
            .contains("'b' is listed twice")
    );
    for n in 3..12 {
        assert_eq!(
            numbers(&[&format!("s{n}")]).unwrap(),
            [(n, format!("s{n}"))]
        );
    }
    assert!(format!("{:#}", numbers(&["one more"]).unwrap_err()).contains("at most 12"));
}

/// A panicked writer cannot be restarted, and a node that kept running would reject every request.
#[tokio::test]
async fn a_writer_that_panics_ends_the_node() {
    let shutdown = Shutdown::new();
    let alarm = shutdown.alarm("the writer");
    let broker = Embedded::start(
        Medium::Memory,
        &sources(),
        Retention::default(),
        Time::new().clock(),
        alarm,
    )
    .unwrap();
    let answer = broker
        .writer
        .write::<(), _>(0, |_| panic!("the test panics on purpose"))
        .await;
    assert!(matches!(answer, Err(Error::Unavailable(_))), "{answer:?}");
    tokio::time::timeout(Duration::from_secs(60), shutdown.begun())
        .await
        .expect("the shutdown begins");
    assert_eq!(shutdown.broken(), Some("the writer"));
}

/// An unreadable row is rejected only for requests that need it: it affects no head, no write and
/// no feed.
#[tokio::test]
async fn an_unreadable_row_fails_only_the_requests_for_it() {
    let time = Time::new();
    let broker = in_memory(Retention::default(), &time);
    let (ann, bob) = (Name::parse("ann").unwrap(), Name::parse("bob").unwrap());
    let at = EntryId { ms: 7, seq: 1 };
    let transaction = broker.shared.store.begin_write().unwrap();
    {
        let mut tables = layout::Tables::open(&transaction).unwrap();
        tables.users.insert("ann", &b"{"[..]).unwrap();
        tables.device_cursors.insert("ann", &b"{"[..]).unwrap();
        tables
            .dead
            .insert(layout::entry_key(0, at), (&b"{"[..], Vec::new()))
            .unwrap();
        tables
            .decisions
            .insert(layout::entry_key(0, at), &b"{"[..])
            .unwrap();
    }
    transaction.commit().unwrap();

    let join = RecipientChange::Join {
        group: Name::parse("ops").unwrap(),
    };
    let stored = StoredCursor {
        cursor: "A".to_owned(),
        is_acknowledged: true,
    };
    let refusals = [
        ("user 'ann'", broker.recipient(&ann).await.map(drop)),
        (
            "user 'ann'",
            broker.change_recipient(&ann, join.clone()).await,
        ),
        (
            "device cursors of user 'ann'",
            broker.device_cursors(&ann).await.map(drop),
        ),
        (
            "device cursors of user 'ann'",
            broker
                .move_device_cursor(&ann, &CursorOwner::ReadMarker, None, &stored)
                .await
                .map(drop),
        ),
        (
            "dead letter 7-1",
            broker
                .dead_letters(P, EntryId::default(), 10)
                .await
                .map(drop),
        ),
        ("entry 7-1", broker.decisions(P, 10).await.map(drop)),
        (
            "entry 7-1",
            broker.find_decisions(P, "e", 10).await.map(drop),
        ),
    ];
    for (what, refused) in refusals {
        assert!(
            matches!(&refused, Err(Error::Permanent(text)) if text.contains(what)),
            "{what}: {refused:?}"
        );
        broker.head(P).await.expect("the store still works");
    }
    broker.change_recipient(&bob, join).await.unwrap();
    assert_eq!(broker.recipient(&bob).await.unwrap().groups.len(), 1);
    publish(&broker, "x", &["u:bob"]).await;
    // The sweep skips it as well.
    sweep(&broker, &time).await;
    broker.head(P).await.expect("the store still works");
}
