//! Tests that only this broker allows: of its disk, and of time, which they advance by hand. The
//! guarantees shared by all brokers are tested by `tests/conformance.rs`.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::*;
use crate::broker::{Follow, Item, Notice, Proposal};
use crate::event::{DeadReason, Decision, Outcome, Position, Value};
use crate::shutdown::Shutdown;

pub(super) mod disk;
mod durability;
mod retention;

/// A clock that a test advances. Starts in 2025.
#[derive(Clone)]
struct Time(Arc<AtomicU64>);

impl Time {
    fn new() -> Self {
        Self(Arc::new(AtomicU64::new(1_750_000_000_000)))
    }

    fn pass(&self, seconds: u64) {
        self.0.fetch_add(seconds * 1000, Ordering::SeqCst);
    }

    fn now_ms(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    fn clock(&self) -> Arc<dyn Clock> {
        Arc::new(self.clone())
    }
}

impl Clock for Time {
    fn now_ms(&self) -> u64 {
        self.now_ms()
    }
}

/// A temporary folder that is removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static N: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "pointsman-embedded-{}-{}",
            std::process::id(),
            N.fetch_add(1, Ordering::Relaxed)
        );
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir(&dir).unwrap();
        Self(dir)
    }

    fn file(&self) -> PathBuf {
        self.0.join("store.redb")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

const P: PartitionNumber = PartitionNumber(0);

fn sources() -> Vec<String> {
    vec!["pointsman:events".to_owned()]
}

/// The alarm of a node that does not run.
fn alarm() -> Alarm {
    Shutdown::new().alarm("the writer")
}

fn in_memory(retention: Retention, time: &Time) -> Embedded {
    Embedded::start(Medium::Memory, &sources(), retention, time.clock(), alarm()).unwrap()
}

fn in_folder(folder: &Folder, retention: Retention, time: &Time) -> Embedded {
    Embedded::start(
        Medium::Folder(folder.0.clone()),
        &sources(),
        retention,
        time.clock(),
        alarm(),
    )
    .unwrap()
}

/// A store on a disk controlled by the switch.
fn on_disk(folder: &Folder, switch: &Arc<disk::Switch>, time: &Time) -> Embedded {
    Embedded::start(
        Medium::Failing(folder.0.clone(), Arc::clone(switch)),
        &sources(),
        Retention::default(),
        time.clock(),
        alarm(),
    )
    .unwrap()
}

fn entry(value: &str) -> Vec<(Bytes, Bytes)> {
    vec![(
        Bytes::from_static(b"v"),
        Bytes::copy_from_slice(value.as_bytes()),
    )]
}

fn target(log: &str) -> Target {
    log.parse().unwrap()
}

fn item(entry: EntryId, proposal: Proposal) -> Item {
    Item {
        entry,
        dedupe: None,
        proposal,
        decision: Decision::default(),
    }
}

fn committing(entry: EntryId, record: &str, logs: &[&str]) -> Item {
    item(
        entry,
        Proposal::commit(
            Bytes::copy_from_slice(record.as_bytes()),
            logs.iter().map(|log| target(log)).collect(),
        ),
    )
}

/// The id of an entry created now.
fn entry_now(broker: &Embedded) -> EntryId {
    let (now_ms, at) = (
        broker.shared.clock.now_ms(),
        broker.shared.metas.read().unwrap()[0].position().entry,
    );
    layout::successor(at).max(EntryId { ms: now_ms, seq: 0 })
}

async fn commit(broker: &Embedded, items: Vec<Item>) -> Vec<(Outcome, Option<NotificationId>)> {
    let head = broker.head(P).await.unwrap();
    match broker
        .commit(
            P,
            Batch {
                epoch: head.epoch,
                prev: head.position,
                items,
            },
        )
        .await
        .unwrap()
    {
        CommitResult::Done(outcomes) => outcomes,
        CommitResult::Conflict => panic!("the position is current"),
    }
}

/// Commits one event to these logs and returns its id.
async fn publish(broker: &Embedded, record: &str, logs: &[&str]) -> NotificationId {
    let outcomes = commit(broker, vec![committing(entry_now(broker), record, logs)]).await;
    outcomes[0].1.unwrap()
}

/// Lets the sweep run until it has nothing left to do: it runs after the answer to a tick, and
/// before the answer to the next one.
async fn sweep(broker: &Embedded, time: &Time) {
    for _ in 0..10 {
        time.pass(1);
        broker.tick(P).await.unwrap();
    }
}

async fn page(broker: &Embedded, log: &str, after: NotificationId) -> Page {
    broker.page(P, &target(log), after, 1000).await.unwrap()
}

fn rows(broker: &Embedded, count: impl Fn(&ReadTransaction) -> u64) -> u64 {
    count(&broker.shared.store.begin_read().unwrap())
}
