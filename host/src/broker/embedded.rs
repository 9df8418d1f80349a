//! The embedded broker: runs inside the node's process and stores its data in a data folder or in
//! memory. One process uses a folder at a time. After kill -9, the next process can open the folder
//! at once and finds everything that was acknowledged.
//!
//! It keeps the guarantees of [`super::Broker`] and one more: everything it published is durable. A
//! durable partition therefore never rewinds and stays in one epoch forever. In memory, each start
//! begins a new epoch. Sources are written only through [`Sources::append`].
//!
//! The layout of `store.redb`, version 2 (integers in redb's format, *JSON* as UTF-8; an id is the
//! number of a [`NotificationId`]):
//!
//! | table        | key                                | value                                                                       |
//! |--------------|------------------------------------|-----------------------------------------------------------------------------|
//! | `layout`     | `version`                          | the version of this layout; a higher one is rejected                        |
//! | `partitions` | source key                         | partition number, 0 to 11, assigned once and never reused                   |
//! | `meta`       | partition                          | JSON: epochs, position, last and pending id, floor, counters                |
//! | `source`     | (partition, entry ms, entry seq)   | the entry's fields: names and values as received                            |
//! | `records`    | (partition, id)                    | the record as committed                                                     |
//! | `logs`       | (partition, target)                | (number of entries, newest id); no row if the log is absent                 |
//! | `index`      | (partition, target, id)            | the predecessor of the id in this log when it was written, or the floor then |
//! | `seen`       | (partition, bucket start ms, hash) | empty; a publisher's event id, remembered for the dedupe window             |
//! | `dead`       | (partition, letter ms, letter seq) | (JSON: entry, reason, plugin, attempts, `entry_bytes` and `entry_fields` if only the beginning is kept; the entry's fields) |
//! | `retrying`   | (partition, letter ms, letter seq) | as `dead`, for an event that waits for a retry                              |
//! | `due`        | (partition, ms, letter ms, letter seq) | empty; when the retry of a letter in `retrying` is due                  |
//! | `retried`    | (partition, entry ms, entry seq)   | JSON: the earlier attempts at the entry of a retry, until it has an outcome |
//! | `decisions`  | (partition, entry ms, entry seq)   | JSON: outcome, id, decision record                                          |
//! | `users`      | user                               | JSON: attributes, and memberships with a span of ids per partition          |
//! | `device_cursors`  | user                               | JSON: device cursors and the read marker, each with the time (ms) of its last move |
//!
//! A target is written `u:<user>`, `g:<group>` or `all`. Leases are not stored, because they end
//! with the process. The folder also contains a file `lock`.
//!
//! A write passes through these modules in order: `writer` (queue, groups), `work` (transaction),
//! then `source`, `commit`, `recipients` or `device_cursors` (the requests), `layout`, `store` (the
//! file) and `feeds` (the subscribers). `sweep` removes expired data.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use anyhow::Context as _;
use async_trait::async_trait;
use bytes::Bytes;
use redb::ReadTransaction;
use tokio::sync::Notify;
use tokio::time::Instant;

use self::feeds::Feeds;
use self::layout::Meta;
use self::store::{Failure, Medium, Store};
use self::writer::Writer;
use super::clock::BrokerClock;
use super::{
    Advertised, Batch, CommitResult, CursorOwner, DeadLetter, DecisionSearch, Entry, Error, Feed,
    Finding, Head, Lease, Logs, Operations, Page, Partition, PartitionState, Partitions, Peer,
    RecipientChange, Result, Retention, Rollout, Rollouts, Severity, Slice, Sources, StoredCursor,
    StoredDecision, StoredReport, Users, WantedVersions,
};
use crate::event::{
    ChainMembers, EntryId, Name, NotificationId, PartitionNumber, Recipient, Target,
};
use crate::shutdown::Alarm;

mod commit;
mod device_cursors;
mod feeds;
mod layout;
mod log;
mod recipients;
mod rollouts;
mod source;
mod store;
mod sweep;
mod tickets;
mod work;
mod writer;

#[cfg(test)]
mod tests;

/// The time of the broker. A parameter, so that a test can advance it by a week.
trait Clock: Send + Sync {
    /// Milliseconds since the Unix epoch.
    fn now_ms(&self) -> u64;

    /// See [`BrokerClock::node_ahead_s`].
    fn node_ahead_s(&self) -> Option<i64> {
        None
    }
}

impl Clock for BrokerClock {
    fn now_ms(&self) -> u64 {
        self.now_ms()
    }

    fn node_ahead_s(&self) -> Option<i64> {
        self.node_ahead_s()
    }
}

/// See the head of this file. Dropping it closes it.
#[derive(Debug)]
pub struct Embedded {
    shared: Arc<SharedState>,
    writer: Writer,
    /// The node that processes each partition, and the end of its lease.
    leases: Mutex<HashMap<PartitionNumber, (String, Instant)>>,
    /// The reports of nodes; there is only one.
    reports: Mutex<BTreeMap<String, StoredReport>>,
    tickets: Mutex<tickets::Tickets>,
}

/// State shared by the writer, the readers and the feeds.
struct SharedState {
    store: Store,
    partitions: Vec<Partition>,
    /// In the order of `partitions`: the state as of the last durable group, set before its notices
    /// are published. A std lock, held only for a copy.
    metas: RwLock<Vec<Meta>>,
    /// In the order of `partitions`: notified when entries were appended.
    arrivals: Vec<Notify>,
    feeds: Arc<Feeds>,
    retention: Retention,
    clock: Arc<dyn Clock>,
}

impl SharedState {
    /// Records a failure of the store and returns the error for the caller.
    fn failed(&self, failure: Failure) -> Error {
        self.store.failed(failure, self.clock.now_ms())
    }
}

impl std::fmt::Debug for SharedState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedState")
            .field("store", &self.store)
            .field("partitions", &self.partitions)
            .finish_non_exhaustive()
    }
}

/// Checks whether a data folder is writable, or can be created if it does not exist. Does not
/// create it.
///
/// # Errors
/// One line that names the folder and the fix.
pub fn check_folder(dir: &Path) -> anyhow::Result<()> {
    let there = dir
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("."));
    let probe = there.join(format!(".pointsman-{}", std::process::id()));
    let written = std::fs::write(&probe, b"").and_then(|()| std::fs::remove_file(&probe));
    written.with_context(|| {
        format!("the data folder {} is not writable; make it writable for this user or use another --data", dir.display())
    })
}

impl Embedded {
    /// Opens the data folder and creates it if it does not exist. `sources` are the keys of the
    /// sources; the folder remembers their partition numbers. `alarm` is raised when the broker can
    /// no longer write.
    ///
    /// # Errors
    /// One line that names the folder and the fix: another process uses it, a newer pointsman
    /// created it, it is damaged, or it is not writable.
    pub fn open(
        dir: &Path,
        sources: &[String],
        retention: Retention,
        alarm: Alarm,
    ) -> anyhow::Result<Self> {
        Self::start(
            Medium::Folder(dir.to_owned()),
            sources,
            retention,
            Arc::new(BrokerClock::of_node()),
            alarm,
        )
    }

    /// Opens a broker that keeps all data in memory.
    ///
    /// # Errors
    /// A source is listed twice, or there are too many sources.
    pub fn ephemeral(
        sources: &[String],
        retention: Retention,
        alarm: Alarm,
    ) -> anyhow::Result<Self> {
        Self::start(
            Medium::Memory,
            sources,
            retention,
            Arc::new(BrokerClock::of_node()),
            alarm,
        )
    }

    fn start(
        medium: Medium,
        sources: &[String],
        retention: Retention,
        clock: Arc<dyn Clock>,
        alarm: Alarm,
    ) -> anyhow::Result<Self> {
        let opened = Store::open(medium, |transaction| {
            layout::prepare(transaction, sources, &retention, clock.now_ms())
        });
        // One line with all causes, regardless of how the caller formats it.
        let (store, prepared) = opened.map_err(|error| anyhow::anyhow!("{error:#}"))?;
        let (partitions, metas): (Vec<Partition>, Vec<Meta>) = prepared.into_iter().unzip();
        let feeds = Arc::new(Feeds::new(
            partitions
                .iter()
                .map(|partition| partition.number)
                .collect(),
        ));
        let arrivals = partitions.iter().map(|_| Notify::new()).collect();
        let shared = Arc::new(SharedState {
            store,
            partitions,
            metas: RwLock::new(metas),
            arrivals,
            feeds,
            retention,
            clock,
        });
        let writer = Writer::start(Arc::clone(&shared), alarm)?;
        Ok(Self {
            shared,
            writer,
            leases: Mutex::default(),
            reports: Mutex::default(),
            tickets: Mutex::default(),
        })
    }

    /// Completes the requests made so far, closes the store and releases the folder; later requests
    /// fail with [`Error::Unavailable`]. Blocks for one or two groups. A process may also simply
    /// exit: no acknowledged write depends on an orderly close.
    pub fn close(&self) {
        self.writer.close();
    }

    /// The index of a partition in `partitions`, `metas` and `arrivals`.
    fn slot(&self, partition: PartitionNumber) -> Result<usize> {
        let found = self
            .shared
            .partitions
            .iter()
            .position(|known| known.number == partition);
        found.ok_or_else(|| {
            Error::Permanent(format!(
                "partition {} does not exist; its source is not configured",
                partition.0
            ))
        })
    }

    fn take_lease(&self, partition: PartitionNumber, node: &str, ttl: Duration) -> Lease {
        let now = Instant::now();
        let mut leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        match leases.get(&partition) {
            Some((holder, until)) if holder != node && *until > now => Lease::Others(*until - now),
            _ => {
                leases.insert(partition, (node.to_owned(), now + ttl));
                Lease::Mine
            }
        }
    }

    /// The state of a partition as of the last durable group.
    fn meta(&self, slot: usize) -> Result<Meta> {
        self.shared.store.check()?;
        Ok(self
            .shared
            .metas
            .read()
            .unwrap_or_else(PoisonError::into_inner)[slot]
            .clone())
    }

    /// Reads from one snapshot of the store.
    ///
    /// Runs on the blocking pool: a page that is not in memory, or a disk that is busy with an
    /// fsync, would otherwise block every stream on the same executor thread. The switch costs
    /// about 10 us per batch or page.
    async fn read_snapshot<T, F>(&self, read: F) -> Result<T>
    where
        F: FnOnce(&ReadTransaction, &SharedState) -> Result<T, Failure> + Send + 'static,
        T: Send + 'static,
    {
        let shared = Arc::clone(&self.shared);
        let task = tokio::task::spawn_blocking(move || {
            let found = shared
                .store
                .begin_read()
                .and_then(|transaction| read(&transaction, &shared));
            found.map_err(|failure| shared.failed(failure))
        });
        task.await.map_err(|_| {
            Error::Unavailable("a read of the store was aborted; see the log".to_owned())
        })?
    }
}

/// The finding for a node's clock that was set while the broker runs.
fn clock_finding(ahead_s: i64) -> Finding {
    let direction = if ahead_s < 0 { "back" } else { "forward" };
    let text = format!(
        "this node's clock was set {direction} by {} s after the node started; events still expire by the time that has passed; restart the node to use the new time",
        ahead_s.unsigned_abs()
    );
    Finding {
        name: "clock",
        severity: Severity::Warning,
        text,
    }
}

/// The approximate size of an entry in bytes.
fn weight(fields: &[(Bytes, Bytes)]) -> usize {
    fields
        .iter()
        .map(|(name, value)| name.len() + value.len() + 16)
        .sum()
}

#[async_trait]
impl Partitions for Embedded {
    fn partitions(&self) -> &[Partition] {
        &self.shared.partitions
    }

    fn now_ms(&self) -> u64 {
        self.shared.clock.now_ms()
    }

    async fn head(&self, partition: PartitionNumber) -> Result<Head> {
        let meta = self.meta(self.slot(partition)?)?;
        Ok(meta.head(self.shared.clock.now_ms()))
    }

    async fn records(
        &self,
        partition: PartitionNumber,
        ids: &[NotificationId],
    ) -> Result<Vec<Option<Bytes>>> {
        self.slot(partition)?;
        let ids = ids.to_vec();
        self.read_snapshot(move |transaction, _| log::records(transaction, partition.0, &ids))
            .await
    }
}

#[async_trait]
impl Sources for Embedded {
    async fn append(
        &self,
        partition: PartitionNumber,
        entries: Vec<Vec<(Bytes, Bytes)>>,
    ) -> Result<Vec<EntryId>> {
        let slot = self.slot(partition)?;
        let bytes = entries.iter().map(|fields| weight(fields)).sum();
        self.writer
            .write(bytes, move |work| work.append(slot, &entries))
            .await
    }

    async fn read(
        &self,
        partition: PartitionNumber,
        after: EntryId,
        count: usize,
        wait: Duration,
    ) -> Result<Vec<Entry>> {
        let slot = self.slot(partition)?;
        let waited = tokio::time::sleep(wait);
        tokio::pin!(waited);
        loop {
            // Register for arrivals before looking, so that an arrival in between is not missed.
            let arrival = self.shared.arrivals[slot].notified();
            tokio::pin!(arrival);
            arrival.as_mut().enable();
            if self.meta(slot)?.last_entry > after {
                let entries = self
                    .read_snapshot(move |transaction, shared| {
                        let most = shared.retention.max_event_bytes;
                        source::entries(transaction, partition.0, after, count, most)
                    })
                    .await?;
                if !entries.is_empty() {
                    return Ok(entries);
                }
            }
            tokio::select! {
                () = arrival => {}
                () = &mut waited => return Ok(Vec::new()),
            }
        }
    }

    async fn lease(&self, partition: PartitionNumber, node: &str, ttl: Duration) -> Result<Lease> {
        let slot = self.slot(partition)?;
        let lease = self.take_lease(partition, node, ttl);
        let is_due = |due_ms| due_ms <= self.shared.clock.now_ms();
        if lease == Lease::Mine && self.meta(slot)?.next_due_ms.is_some_and(is_due) {
            self.writer
                .write(0, move |work| work.append_due(slot))
                .await?;
        }
        Ok(lease)
    }

    async fn release(&self, partition: PartitionNumber, node: &str) -> Result<()> {
        let mut leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        if leases
            .get(&partition)
            .is_some_and(|(holder, _)| holder == node)
        {
            leases.remove(&partition);
        }
        Ok(())
    }

    async fn take_over(&self, partition: PartitionNumber) -> Result<u32> {
        let slot = self.slot(partition)?;
        self.writer
            .write(0, move |work| Ok(work.take_over(slot)))
            .await
    }

    async fn note_attempt(&self, partition: PartitionNumber, entry: EntryId) -> Result<u32> {
        let slot = self.slot(partition)?;
        self.writer
            .write(0, move |work| Ok(work.note_attempt(slot, entry)))
            .await
    }

    async fn commit(&self, partition: PartitionNumber, batch: Batch) -> Result<CommitResult> {
        let slot = self.slot(partition)?;
        let bytes = batch.items.iter().map(commit::weight).sum();
        self.writer
            .write(bytes, move |work| work.commit(slot, &batch))
            .await
    }

    async fn commit_slice(&self, partition: PartitionNumber, slice: Slice) -> Result<CommitResult> {
        let slot = self.slot(partition)?;
        self.writer
            .write(commit::weight(&slice.item), move |work| {
                work.commit_slice(slot, &slice)
            })
            .await
    }
}

#[async_trait]
impl Logs for Embedded {
    async fn pages(
        &self,
        partition: PartitionNumber,
        logs: &[(Target, NotificationId)],
        limit: usize,
    ) -> Result<Vec<Page>> {
        self.slot(partition)?;
        let logs = logs.to_vec();
        self.read_snapshot(move |transaction, shared| {
            log::pages(
                transaction,
                partition.0,
                &logs,
                limit,
                shared.clock.now_ms(),
            )
        })
        .await
    }

    async fn feed(&self) -> Result<Feed> {
        Ok(self.shared.feeds.open())
    }

    async fn tick(&self, partition: PartitionNumber) -> Result<()> {
        self.writer.tick(self.slot(partition)?).await
    }

    async fn recipient(&self, user: &Name) -> Result<Recipient> {
        let user = user.clone();
        self.read_snapshot(move |transaction, shared| {
            let metas = shared
                .metas
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .clone();
            recipients::recipient(transaction, &user, &shared.partitions, &metas)
        })
        .await
    }
}

#[async_trait]
impl Users for Embedded {
    async fn change_recipient(&self, user: &Name, change: RecipientChange) -> Result<()> {
        let user = user.clone();
        self.writer
            .write(0, move |work| work.change_recipient(&user, &change))
            .await
    }

    async fn device_cursors(&self, user: &Name) -> Result<BTreeMap<CursorOwner, StoredCursor>> {
        let user = user.clone();
        self.read_snapshot(move |transaction, shared| {
            device_cursors::device_cursors(
                transaction,
                &user,
                &shared.retention,
                shared.clock.now_ms(),
            )
        })
        .await
    }

    async fn move_device_cursor(
        &self,
        user: &Name,
        which: &CursorOwner,
        seen: Option<&StoredCursor>,
        to: &StoredCursor,
    ) -> Result<bool> {
        let (user, which, seen, to) = (user.clone(), which.clone(), seen.cloned(), to.clone());
        self.writer
            .write(0, move |work| {
                work.move_device_cursor(&user, &which, seen.as_ref(), to)
            })
            .await
    }

    async fn store_ticket(&self, id: &str, ticket: Bytes, ttl: Duration) -> Result<()> {
        self.tickets().store(id, ticket, ttl)
    }

    async fn take_ticket(&self, id: &str) -> Result<Option<Bytes>> {
        Ok(self.tickets().take(id))
    }
}

#[async_trait]
impl Operations for Embedded {
    async fn check(&self) -> Result<Vec<Finding>> {
        let mut findings = self.shared.store.findings(self.shared.clock.now_ms());
        findings.extend(self.writer.findings());
        findings.extend(self.shared.clock.node_ahead_s().map(clock_finding));
        Ok(findings)
    }

    async fn register_node(&self, _name: &str, _at: &Advertised) -> Result<Vec<Peer>> {
        Ok(Vec::new())
    }

    async fn state(&self, partition: PartitionNumber) -> Result<PartitionState> {
        let meta = self.meta(self.slot(partition)?)?;
        Ok(source::state(&meta, self.shared.clock.now_ms()))
    }

    async fn dead_letters(
        &self,
        partition: PartitionNumber,
        after: EntryId,
        limit: usize,
    ) -> Result<Vec<DeadLetter>> {
        self.slot(partition)?;
        self.read_snapshot(move |transaction, _| {
            let table = transaction.open_table(layout::DEAD)?;
            source::dead_letters(&table, partition.0, after, limit, true)
        })
        .await
    }

    async fn dead_letter_headers(
        &self,
        partition: PartitionNumber,
        after: EntryId,
        limit: usize,
    ) -> Result<Vec<DeadLetter>> {
        self.slot(partition)?;
        self.read_snapshot(move |transaction, _| {
            let table = transaction.open_table(layout::DEAD)?;
            source::dead_letters(&table, partition.0, after, limit, false)
        })
        .await
    }

    async fn retrying(
        &self,
        partition: PartitionNumber,
        after: EntryId,
        limit: usize,
    ) -> Result<Vec<DeadLetter>> {
        self.slot(partition)?;
        self.read_snapshot(move |transaction, _| {
            let table = transaction.open_table(layout::RETRYING)?;
            source::dead_letters(&table, partition.0, after, limit, true)
        })
        .await
    }

    async fn redrive(&self, partition: PartitionNumber, id: EntryId) -> Result<bool> {
        let slot = self.slot(partition)?;
        self.writer
            .write(0, move |work| work.redrive(slot, id))
            .await
    }

    async fn drop_dead_letter(&self, partition: PartitionNumber, id: EntryId) -> Result<bool> {
        let slot = self.slot(partition)?;
        self.writer
            .write(0, move |work| work.drop_dead_letter(slot, id))
            .await
    }

    async fn decisions(
        &self,
        partition: PartitionNumber,
        limit: usize,
    ) -> Result<Vec<StoredDecision>> {
        self.slot(partition)?;
        self.read_snapshot(move |transaction, _| source::decisions(transaction, partition.0, limit))
            .await
    }

    async fn find_decisions(
        &self,
        partition: PartitionNumber,
        event_id: &str,
        limit: usize,
    ) -> Result<DecisionSearch> {
        self.slot(partition)?;
        let event_id = event_id.to_owned();
        self.read_snapshot(move |transaction, _| {
            source::find_decisions(transaction, partition.0, &event_id, limit)
        })
        .await
    }

    async fn find_chain(
        &self,
        partition: PartitionNumber,
        id: &str,
    ) -> Result<Option<ChainMembers>> {
        self.slot(partition)?;
        let id = id.to_owned();
        self.read_snapshot(move |transaction, _| source::find_chain(transaction, partition.0, &id))
            .await
    }
}

#[async_trait]
impl Rollouts for Embedded {
    async fn rollouts(&self, plugins: &[Name]) -> Result<WantedVersions> {
        let plugins = plugins.to_vec();
        self.read_snapshot(move |transaction, _| rollouts::rollouts(transaction, &plugins))
            .await
    }

    async fn set_rollout(&self, plugin: &Name, rollout: Option<&Rollout>) -> Result<u64> {
        let (plugin, rollout, now_ms) = (plugin.clone(), rollout.cloned(), self.now_ms());
        self.writer
            .write(0, move |work| {
                work.set_rollout(&plugin, rollout.as_ref(), now_ms)
            })
            .await
    }

    async fn replace_rollout(
        &self,
        plugin: &Name,
        before: &Rollout,
        rollout: Option<&Rollout>,
    ) -> Result<Option<u64>> {
        let (plugin, before, now_ms) = (plugin.clone(), before.clone(), self.now_ms());
        let rollout = rollout.cloned();
        self.writer
            .write(0, move |work| {
                work.replace_rollout(&plugin, &before, rollout.as_ref(), now_ms)
            })
            .await
    }

    async fn report_node(&self, node: &str, report: Bytes) -> Result<bool> {
        let node = node.to_owned();
        let report = StoredReport {
            node: node.clone(),
            report: Some(report),
        };
        self.reports().insert(node, report);
        Ok(true)
    }

    async fn node_reports(&self) -> Result<Vec<StoredReport>> {
        Ok(self.reports().values().cloned().collect())
    }
}

impl Embedded {
    fn tickets(&self) -> MutexGuard<'_, tickets::Tickets> {
        self.tickets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reports(&self) -> MutexGuard<'_, BTreeMap<String, StoredReport>> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
