//! The broker in this process: durable in a data folder, or in memory. One process has a folder at a time; after kill -9 the next one has
//! it at once, with everything that was acknowledged.
//!
//! It keeps the promises of [`super::Broker`], and one more: what it published is durable, so there is never a rewind, and a durable
//! partition has one life for ever. In memory, each start begins a life. Sources are fed by [`Broker::append`] alone.
//!
//! The layout of `store.redb`, version 1 (integers as redb has them, *JSON* as UTF-8; an id is a [`NotificationId`]'s number):
//!
//! | table        | key                                  | value                                                                     |
//! |--------------|--------------------------------------|---------------------------------------------------------------------------|
//! | `layout`     | `version`                            | the version of this table; a higher one is refused                        |
//! | `partitions` | key of a source                      | partition number: 0 to 11, given once, never again                        |
//! | `meta`       | partition                            | JSON: life and lives, position, last and pending id, floor, counters      |
//! | `source`     | (partition, entry ms, entry seq)     | the entry's fields: name and value, as they came                          |
//! | `records`    | (partition, id)                      | the record, as it was committed                                           |
//! | `logs`       | (partition, target)                  | (entries in the log, newest id); no row: the log is absent                |
//! | `index`      | (partition, target, id)              | the id before it in this log when it was written, or the floor then       |
//! | `seen`       | (partition, bucket start ms, hash)   | nothing; a publisher's event, remembered for the dedupe window            |
//! | `dead`       | (partition, ms, seq of the letter)   | (JSON: entry, reason, plugin, attempts; the entry's fields)               |
//! | `decisions`  | (partition, entry ms, entry seq)     | JSON: outcome, id, decision record                                        |
//! | `users`      | user                                 | JSON: attributes, and memberships with a span of ids for each partition   |
//! | `bookmarks`  | user                                 | JSON: bookmarks of devices and the read mark, with the times (ms) of their last moves |
//!
//! A target is written `u:<user>`, `g:<group>` or `all`. Leases need no disk: they end with the process. Beside `store.redb` lies `lock`.
//!
//! In order of the way of a write: `writer` (queue, groups) -> `source`, `commit`, `recipients`, `bookmarks` (what requests do) -> `layout` -> `store`
//! (the file) -> `feeds` (who hears of it). `sweep` removes what is too old.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
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
use super::{
    Batch, Bookmark, BookmarkOf, Broker, Committed, DeadLetter, Decision, Entry, Error, Feed,
    Finding, Found, Head, Lease, Page, Partition, PartitionNumber, PartitionState, Recipient,
    RecipientChange, Result, Retention, Slice,
};
use crate::clock::now_ms;
use crate::event::{EntryId, Name, NotificationId, Outcome, Target};
use crate::shutdown::Alarm;

mod commit;
mod device_cursors;
mod feeds;
mod layout;
mod log;
mod recipients;
mod source;
mod store;
mod sweep;
mod writer;

#[cfg(test)]
mod tests;

/// Milliseconds since the Unix epoch. Passed in, so that a test can let a week pass.
type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// See the head of this file. Dropping it closes it.
#[derive(Debug)]
pub struct Embedded {
    shared: Arc<Shared>,
    writer: Writer,
    /// Who works a partition, and until when.
    leases: Mutex<HashMap<PartitionNumber, (String, Instant)>>,
}

/// What the writer, the readers and the feeds have in common.
struct Shared {
    store: Store,
    partitions: Vec<Partition>,
    /// By place, as `partitions`: the state as of the last durable group, set before its notices go out. A std lock: held for a copy.
    metas: RwLock<Vec<Meta>>,
    /// By place: entries were appended.
    arrivals: Vec<Notify>,
    feeds: Arc<Feeds>,
    retention: Retention,
    clock: Clock,
}

impl Shared {
    /// Notes that the store failed, and answers what to tell whoever asked.
    fn failed(&self, failure: Failure) -> Error {
        self.store.failed(failure, (self.clock)())
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("store", &self.store)
            .field("partitions", &self.partitions)
            .finish_non_exhaustive()
    }
}

/// Whether a data folder can be written to, or made where it is not there yet. Makes nothing.
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
        format!("the data folder {} cannot be written to; make it so for this user, or give another --data", dir.display())
    })
}

impl Embedded {
    /// Opens the data folder, and makes it if it is not there. `sources`: the keys of the sources, whose numbers the folder remembers.
    /// `alarm`: for when it can no longer write.
    ///
    /// # Errors
    /// One line that names the folder and the fix: another process has it, a newer pointsman made it, it is damaged, it cannot be written.
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
            Arc::new(now_ms),
            alarm,
        )
    }

    /// Opens a broker that keeps all in memory.
    ///
    /// # Errors
    /// If a source is named twice, or there are too many.
    pub fn ephemeral(
        sources: &[String],
        retention: Retention,
        alarm: Alarm,
    ) -> anyhow::Result<Self> {
        Self::start(Medium::Memory, sources, retention, Arc::new(now_ms), alarm)
    }

    fn start(
        medium: Medium,
        sources: &[String],
        retention: Retention,
        clock: Clock,
        alarm: Alarm,
    ) -> anyhow::Result<Self> {
        let opened = Store::open(medium, |transaction| {
            layout::prepare(transaction, sources, &retention, clock())
        });
        // One line with all causes, however it is printed.
        let (store, prepared) = opened.map_err(|error| anyhow::anyhow!("{error:#}"))?;
        let (partitions, metas): (Vec<Partition>, Vec<Meta>) = prepared.into_iter().unzip();
        let feeds = Arc::new(Feeds::new(
            partitions
                .iter()
                .map(|partition| partition.number)
                .collect(),
        ));
        let arrivals = partitions.iter().map(|_| Notify::new()).collect();
        let shared = Arc::new(Shared {
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
        })
    }

    /// Does what was asked until now, closes the store and lets go of the folder; what is asked later finds the broker away. Blocks for a
    /// group or two. A process may as well just end: nothing that was acknowledged depends on an orderly close.
    pub fn close(&self) {
        self.writer.close();
    }

    fn place(&self, partition: PartitionNumber) -> Result<usize> {
        let found = self
            .shared
            .partitions
            .iter()
            .position(|known| known.number == partition);
        found.ok_or_else(|| {
            Error::Refused(format!(
                "there is no partition {}: its source is not configured",
                partition.0
            ))
        })
    }

    /// The state of a partition as of the last durable group.
    fn meta(&self, place: usize) -> Result<Meta> {
        self.shared.store.check()?;
        Ok(self
            .shared
            .metas
            .read()
            .unwrap_or_else(PoisonError::into_inner)[place]
            .clone())
    }

    /// Reads from one snapshot of the store.
    ///
    /// On a thread that may block: a page that is not in memory, or a disk that is busy with an fsync, would else hold up every stream that
    /// shares the executor's thread. The hop costs some 10 us, once for a batch or a page.
    async fn look<T, F>(&self, read: F) -> Result<T>
    where
        F: FnOnce(&ReadTransaction, &Shared) -> Result<T, Failure> + Send + 'static,
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
            Error::Away("a read of the store was broken off; the log says why".to_owned())
        })?
    }
}

/// Roughly what an entry weighs.
fn weight(fields: &[(Bytes, Bytes)]) -> usize {
    fields
        .iter()
        .map(|(name, value)| name.len() + value.len() + 16)
        .sum()
}

#[async_trait]
impl Broker for Embedded {
    fn partitions(&self) -> &[Partition] {
        &self.shared.partitions
    }

    async fn check(&self) -> Result<Vec<Finding>> {
        let mut findings = self.shared.store.findings((self.shared.clock)());
        findings.extend(self.writer.findings());
        Ok(findings)
    }

    async fn append(
        &self,
        partition: PartitionNumber,
        entries: Vec<Vec<(Bytes, Bytes)>>,
    ) -> Result<Vec<EntryId>> {
        let place = self.place(partition)?;
        let bytes = entries.iter().map(|fields| weight(fields)).sum();
        self.writer
            .write(bytes, move |work| work.append(place, &entries))
            .await
    }

    async fn read(
        &self,
        partition: PartitionNumber,
        after: EntryId,
        count: usize,
        wait: Duration,
    ) -> Result<Vec<Entry>> {
        let place = self.place(partition)?;
        let waited = tokio::time::sleep(wait);
        tokio::pin!(waited);
        loop {
            // Listening begins before looking, so that no arrival falls between.
            let arrival = self.shared.arrivals[place].notified();
            tokio::pin!(arrival);
            arrival.as_mut().enable();
            if self.meta(place)?.last_entry > after {
                let entries = self
                    .look(move |transaction, _| {
                        source::entries(transaction, partition.0, after, count)
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

    async fn head(&self, partition: PartitionNumber) -> Result<Head> {
        let meta = self.meta(self.place(partition)?)?;
        Ok(meta.head((self.shared.clock)()))
    }

    async fn commit(&self, partition: PartitionNumber, batch: Batch) -> Result<Committed> {
        let place = self.place(partition)?;
        let bytes = batch.items.iter().map(commit::weight).sum();
        self.writer
            .write(bytes, move |work| work.commit(place, &batch))
            .await
    }

    async fn commit_slice(&self, partition: PartitionNumber, slice: Slice) -> Result<Committed> {
        let place = self.place(partition)?;
        self.writer
            .write(commit::weight(&slice.item), move |work| {
                work.commit_slice(place, &slice)
            })
            .await
    }

    async fn tick(&self, partition: PartitionNumber) -> Result<()> {
        self.writer.tick(self.place(partition)?).await
    }

    async fn lease(&self, partition: PartitionNumber, node: &str, ttl: Duration) -> Result<Lease> {
        self.place(partition)?;
        let now = Instant::now();
        let mut leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        match leases.get(&partition) {
            Some((holder, until)) if holder != node && *until > now => {
                Ok(Lease::Others(*until - now))
            }
            _ => {
                leases.insert(partition, (node.to_owned(), now + ttl));
                Ok(Lease::Mine)
            }
        }
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
        let place = self.place(partition)?;
        self.writer
            .write(0, move |work| Ok(work.take_over(place)))
            .await
    }

    async fn note_attempt(&self, partition: PartitionNumber, entry: EntryId) -> Result<u32> {
        let place = self.place(partition)?;
        self.writer
            .write(0, move |work| Ok(work.note_attempt(place, entry)))
            .await
    }

    async fn page(
        &self,
        partition: PartitionNumber,
        target: &Target,
        after: NotificationId,
        limit: usize,
    ) -> Result<Page> {
        self.place(partition)?;
        let log = target.to_string();
        self.look(move |transaction, shared| {
            log::page(
                transaction,
                partition.0,
                &log,
                after,
                limit,
                (shared.clock)(),
            )
        })
        .await
    }

    async fn records(
        &self,
        partition: PartitionNumber,
        ids: &[NotificationId],
    ) -> Result<Vec<Option<Bytes>>> {
        self.place(partition)?;
        let ids = ids.to_vec();
        self.look(move |transaction, _| log::records(transaction, partition.0, &ids))
            .await
    }

    async fn feed(&self) -> Result<Feed> {
        Ok(self.shared.feeds.open())
    }

    async fn recipient(&self, user: &Name) -> Result<Recipient> {
        let user = user.clone();
        self.look(move |transaction, shared| {
            let metas = shared
                .metas
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .clone();
            recipients::recipient(transaction, &user, &shared.partitions, &metas)
        })
        .await
    }

    async fn change_recipient(&self, user: &Name, change: RecipientChange) -> Result<()> {
        let user = user.clone();
        self.writer
            .write(0, move |work| work.change_recipient(&user, &change))
            .await
    }

    async fn bookmarks(&self, user: &Name) -> Result<BTreeMap<BookmarkOf, Bookmark>> {
        let user = user.clone();
        self.look(move |transaction, shared| {
            device_cursors::bookmarks(transaction, &user, &shared.retention, (shared.clock)())
        })
        .await
    }

    async fn move_bookmark(
        &self,
        user: &Name,
        which: &BookmarkOf,
        seen: Option<&Bookmark>,
        to: &Bookmark,
    ) -> Result<bool> {
        let (user, which, seen, to) = (user.clone(), which.clone(), seen.cloned(), to.clone());
        self.writer
            .write(0, move |work| {
                work.move_bookmark(&user, &which, seen.as_ref(), to)
            })
            .await
    }

    async fn dead_letters(
        &self,
        partition: PartitionNumber,
        after: EntryId,
        limit: usize,
    ) -> Result<Vec<DeadLetter>> {
        self.place(partition)?;
        self.look(move |transaction, _| {
            source::dead_letters(transaction, partition.0, after, limit)
        })
        .await
    }

    async fn redrive(&self, partition: PartitionNumber, id: EntryId) -> Result<bool> {
        let place = self.place(partition)?;
        self.writer
            .write(0, move |work| work.redrive(place, id))
            .await
    }

    async fn drop_dead_letter(&self, partition: PartitionNumber, id: EntryId) -> Result<bool> {
        let place = self.place(partition)?;
        self.writer
            .write(0, move |work| work.drop_dead_letter(place, id))
            .await
    }

    async fn decisions(
        &self,
        partition: PartitionNumber,
        limit: usize,
    ) -> Result<Vec<(EntryId, Outcome, Option<NotificationId>, Decision)>> {
        self.place(partition)?;
        self.look(move |transaction, _| source::decisions(transaction, partition.0, limit))
            .await
    }

    async fn find_decisions(
        &self,
        partition: PartitionNumber,
        event_id: &str,
        limit: usize,
    ) -> Result<Found> {
        self.place(partition)?;
        let event_id = event_id.to_owned();
        self.look(move |transaction, _| {
            source::find_decisions(transaction, partition.0, &event_id, limit)
        })
        .await
    }

    async fn state(&self, partition: PartitionNumber) -> Result<PartitionState> {
        let meta = self.meta(self.place(partition)?)?;
        Ok(source::state(&meta, (self.shared.clock)()))
    }
}
