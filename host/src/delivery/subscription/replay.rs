//! The transition from history to live, on which delivery rests.
//!
//! A replay follows the logs, waits until the broker has confirmed this, reads the head, reads
//! history up to the head's top, and then goes live with the notices that arrived meanwhile. The
//! order matters: following before reading leaves no interval in which an append is missed.
//! Anything that raises the subscription's round on the way (a lost feed, a membership change) has
//! started another replay, and this one stops at its next step. Reads that fail are retried; the
//! marks do not move.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Semaphore;

use crate::backoff::Backoff;
use crate::broker::{self, Head, Logs};
use crate::event::criteria::Pool;
use crate::event::{Epoch, NotificationId, PartitionNumber, Target};
use crate::telemetry::metrics::Metrics;

use super::{Gap, GapReason, OpenStream, Record, Room, Subscription, WINDOW};
use recipient_reads::RecipientReads;
use record_cache::RecordCache;

mod recipient_reads;
pub mod record_cache;

/// The most ids read from a log at a time.
const PAGE: usize = 256;
/// The most records read at first, before their size is known.
const FIRST_BATCH: usize = 8;
/// The most ids read from all logs at a time, unless this is fewer than [`MIN_PAGE`] for each.
const PAGES: usize = 4_096;
const MIN_PAGE: usize = 16;
/// The most concurrent reads of history on a node, so that a fail-over does not turn every stream
/// into a simultaneous request.
const READS: usize = 64;

/// Follows logs for a stream.
#[async_trait]
pub trait FollowLogs: Send + Sync {
    /// Returns once appends to all of these logs, and to no others of this partition, are delivered
    /// to this stream. Does nothing if `round` is over. May be cancelled.
    async fn follow(
        &self,
        stream: &Arc<OpenStream>,
        partition: PartitionNumber,
        round: u64,
        targets: Vec<Target>,
    );
}

/// The source of replays: the broker and the node's shared records.
#[derive(Debug)]
pub struct History {
    broker: Arc<dyn Logs>,
    records: RecordCache,
    recipients: RecipientReads,
    /// The attributes of the node's streams, shared where equal.
    attributes: Pool,
    reads: Semaphore,
    metrics: Metrics,
}

/// Why an attempt ended before the partition was live.
enum StopReason {
    /// The round is over or the stream is closed.
    Obsolete,
    /// The epoch changed during the attempt: begin again at once.
    EpochChanged,
    Broker(broker::Error),
}

impl From<broker::Error> for StopReason {
    fn from(error: broker::Error) -> Self {
        Self::Broker(error)
    }
}

/// One log of a replay.
struct ReplayLog {
    target: Target,
    /// The last id read, or the id after which reading begins.
    at: NotificationId,
    ids: VecDeque<NotificationId>,
    is_done: bool,
}

impl History {
    pub fn new(broker: Arc<dyn Logs>, metrics: Metrics) -> Self {
        Self {
            broker,
            records: RecordCache::default(),
            recipients: RecipientReads::default(),
            attributes: Pool::default(),
            reads: Semaphore::new(READS),
            metrics,
        }
    }

    pub fn records(&self) -> &RecordCache {
        &self.records
    }

    /// Moves one partition of a stream from replay to live. Ends when that is done or when `round`
    /// is over.
    pub async fn replay(
        &self,
        stream: Arc<OpenStream>,
        partition: PartitionNumber,
        mut round: u64,
        follows: &dyn FollowLogs,
    ) {
        let mut backoff =
            Backoff::new(Duration::from_millis(50), Duration::from_secs(2), 0.5..=1.5);
        loop {
            let stop = match self.attempt(&stream, partition, round, follows).await {
                Ok(None) | Err(StopReason::Obsolete) => return,
                Ok(Some(next)) => {
                    round = next;
                    continue;
                }
                Err(stop) => stop,
            };
            if let StopReason::Broker(error) = stop {
                tracing::debug!(user.id = %stream.lock().user(), stream.id = stream.id, partition = partition.0, %error, "replay failed to read from the broker; it will be retried");
                tokio::time::sleep(backoff.pause()).await;
            }
            // Checked and entered under one lock: if another cause has begun a replay meanwhile,
            // that one goes on and this one ends.
            let mut subscription = stream.lock();
            if subscription.round(partition) != round || stream.is_closed() {
                return;
            }
            round = subscription.enter_replay(partition);
        }
    }

    /// Returns `Some(round)` if the partition went live but had to return to replay at once for
    /// lack of room.
    ///
    /// In one piece: the order of its steps is the guarantee of the hand-over.
    async fn attempt(
        &self,
        stream: &Arc<OpenStream>,
        partition: PartitionNumber,
        round: u64,
        follows: &dyn FollowLogs,
    ) -> Result<Option<u64>, StopReason> {
        // First, because the recipient's groups determine the logs. A change after this read raises
        // the round.
        self.read_recipient(stream, partition, round).await?;
        let logs = in_round(stream, partition, round, |subscription| {
            subscription.logs(partition)
        })?;
        follows
            .follow(
                stream,
                partition,
                round,
                logs.into_iter().map(|(target, _)| target).collect(),
            )
            .await;

        // Read after the follows are confirmed: an append is either at or below the head, and read
        // from the logs, or above it, and in the buffer.
        let head = self.head(partition).await?;
        let (sent_ahead, logs) = in_round(stream, partition, round, |subscription| {
            subscription.begin(partition, &head);
            (
                subscription.unread_sent_ahead(partition),
                // Again, because `begin` may have moved the low-water mark.
                subscription.logs(partition),
            )
        })?;
        // The cursor of a new stream may be known now.
        stream.wake();
        // Read before the history: their collapse keys decide which older states are superseded.
        let sent_ahead_records = self
            .read_records(partition, head.epoch, &sent_ahead)
            .await?;
        in_round(stream, partition, round, |subscription| {
            for (id, record) in sent_ahead.iter().zip(&sent_ahead_records) {
                subscription.set_sent_ahead(partition, *id, record.as_deref());
            }
        })?;

        let mut logs: Vec<ReplayLog> = logs
            .into_iter()
            .map(|(target, at)| ReplayLog {
                target,
                at,
                ids: VecDeque::new(),
                is_done: false,
            })
            .collect();
        let mut is_first = true;
        loop {
            self.fill(stream, partition, round, &head, &mut logs, is_first)
                .await?;
            is_first = false;
            let ids = merge(&mut logs);
            if ids.is_empty() {
                break;
            }
            self.hand_over_all(stream, partition, round, &head, &ids)
                .await?;
        }
        let again = in_round(stream, partition, round, |subscription| {
            subscription.go_live(partition, head.complete(), self.broker.now_ms())
        })?;
        stream.wake();
        if again.is_some() {
            self.metrics.stream_overflows.inc();
        }
        Ok(again)
    }

    async fn read_recipient(
        &self,
        stream: &OpenStream,
        partition: PartitionNumber,
        round: u64,
    ) -> Result<(), StopReason> {
        // The ticket is drawn before the read: it orders reads by their start, so that a late
        // result of an early read loses.
        let (ticket, user) = in_round(stream, partition, round, |subscription| {
            (
                subscription.begin_recipient_read(),
                subscription.user().clone(),
            )
        })?;
        let read = async {
            let _permit = self.reads.acquire().await;
            let mut known = self.broker.recipient(&user).await?;
            known.attributes = self.attributes.share(known.attributes);
            Ok(known)
        };
        let recipient = self.recipients.read(&user, read).await?;
        in_round(stream, partition, round, |subscription| {
            subscription.set_recipient(ticket, recipient, &self.attributes)
        })
    }

    async fn head(&self, partition: PartitionNumber) -> Result<Head, StopReason> {
        let _permit = self.reads.acquire().await;
        Ok(self.broker.head(partition).await?)
    }

    async fn read_records(
        &self,
        partition: PartitionNumber,
        epoch: Epoch,
        ids: &[NotificationId],
    ) -> Result<Vec<Option<Arc<Record>>>, StopReason> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let _permit = self.reads.acquire().await;
        Ok(self
            .records
            .read(&*self.broker, partition, epoch, ids)
            .await?)
    }

    /// Reads the next page of every log that has no ids left to merge.
    async fn fill(
        &self,
        stream: &OpenStream,
        partition: PartitionNumber,
        round: u64,
        head: &Head,
        logs: &mut [ReplayLog],
        is_first: bool,
    ) -> Result<(), StopReason> {
        for log in logs.iter_mut() {
            // Ids above the top are not read here, and none below it are missing: it is as if the
            // page had been read. Most replays of a user with many groups begin at the top of all.
            log.is_done |= log.at >= head.top();
        }
        let mut wanted: Vec<&mut ReplayLog> = logs
            .iter_mut()
            .filter(|log| log.ids.is_empty() && !log.is_done)
            .collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let limit = (PAGES / wanted.len()).clamp(MIN_PAGE, PAGE);
        let from: Vec<_> = wanted
            .iter()
            .map(|log| (log.target.clone(), log.at))
            .collect();
        let pages = {
            let _permit = self.reads.acquire().await;
            self.broker.pages(partition, &from, limit).await?
        };
        let mut missing: Option<Gap> = None;
        for (log, page) in wanted.iter_mut().zip(pages) {
            let before = log.at;
            let missing_to = match page.entries.first() {
                // The first id above the top also counts, through its predecessor: the log may have
                // been trimmed, or deleted and recreated, since the top was read.
                Some(&(_, pred)) if pred > before => Some(pred.min(head.top())),
                Some(_) => None,
                // The log is absent: it may have expired, unless nothing that old was ever written.
                None if !page.is_present => Some(page.floor.min(head.top())),
                None => None,
            };
            if let Some(to) = missing_to.filter(|&to| to > before) {
                let gap = missing.get_or_insert(Gap {
                    partition,
                    reason: GapReason::Trimmed,
                    from: before,
                    to,
                });
                gap.from = gap.from.min(before);
                gap.to = gap.to.max(to);
            }
            log.is_done =
                page.is_last || page.entries.last().is_some_and(|&(id, _)| id > head.top());
            log.ids.extend(
                page.entries
                    .iter()
                    .map(|&(id, _)| id)
                    .filter(|&id| id <= head.top()),
            );
            log.at = log.ids.back().copied().unwrap_or(before);
        }
        let Some(mut gap) = missing else {
            return Ok(());
        };
        self.same_epoch(partition, head).await?;
        in_round(stream, partition, round, |subscription| {
            let (low_water, seen) = subscription.marks(partition);
            gap.from = if is_first {
                low_water
            } else {
                gap.from.min(seen)
            };
            if gap.to > gap.from {
                subscription.announce(gap);
            }
        })
    }

    /// Reads the records of these ids and hands them over as the queues have room. Without room it
    /// holds no records: there may be as many waiting replays as streams.
    async fn hand_over_all(
        &self,
        stream: &OpenStream,
        partition: PartitionNumber,
        round: u64,
        head: &Head,
        mut ids: &[NotificationId],
    ) -> Result<(), StopReason> {
        while !ids.is_empty() {
            // The socket must see the items that fill the queues before this waits for room.
            stream.wake();
            let room = stream.when(|subscription| {
                if subscription.round(partition) != round {
                    return Some(Err(StopReason::Obsolete));
                }
                subscription.room(partition).map(Ok)
            });
            let room = room.await.unwrap_or(Err(StopReason::Obsolete))?;
            let records = self.read_fitting(partition, head.epoch, ids, room).await?;
            // One check covers all missing records: they were read before it.
            if records.iter().any(Option::is_none) {
                self.same_epoch(partition, head).await?;
            }
            let now_ms = self.broker.now_ms();
            // In one step: an urgent one among them leaves before the others.
            let n_taken = in_round(stream, partition, round, |subscription| {
                let read = ids.iter().zip(records);
                read.take_while(|(id, record)| {
                    hand_over(subscription, partition, **id, record.as_ref(), now_ms)
                })
                .count()
            })?;
            ids = &ids[n_taken..];
        }
        stream.wake();
        Ok(())
    }

    /// Reads the records of the first of these ids: as many as fill the room, at least one.
    async fn read_fitting(
        &self,
        partition: PartitionNumber,
        epoch: Epoch,
        ids: &[NotificationId],
        room: Room,
    ) -> Result<Vec<Option<Arc<Record>>>, StopReason> {
        let ids = &ids[..ids.len().min(room.n_records.max(1))];
        let mut records = Vec::new();
        let mut n = FIRST_BATCH.min(ids.len());
        while n > 0 {
            let next = &ids[records.len()..][..n];
            records.extend(self.read_records(partition, epoch, next).await?);
            let n_bytes: usize = records
                .iter()
                .flatten()
                .map(|record| record.n_bytes())
                .sum();
            // The next records are about as large as the previous ones.
            let n_fitting = room.n_bytes.saturating_sub(n_bytes) / (n_bytes / records.len()).max(1);
            n = n_fitting.min(ids.len() - records.len());
        }
        Ok(records)
    }

    /// Checks the epoch before a gap is announced: after a fail-over the earlier reads prove
    /// nothing, and the replay begins again.
    async fn same_epoch(&self, partition: PartitionNumber, head: &Head) -> Result<(), StopReason> {
        if self.head(partition).await?.epoch == head.epoch {
            Ok(())
        } else {
            Err(StopReason::EpochChanged)
        }
    }
}

/// Hands one id over. Returns `false` if the queues have no room for it.
fn hand_over(
    subscription: &mut Subscription,
    partition: PartitionNumber,
    id: NotificationId,
    record: Option<&Arc<Record>>,
    now_ms: u64,
) -> bool {
    let Some(record) = record else {
        if subscription.skip(partition, id) {
            subscription.announce(Gap {
                partition,
                reason: GapReason::Trimmed,
                from: NotificationId(id.0 - 1),
                to: id,
            });
        }
        return true;
    };
    let has_room = subscription.has_room(partition);
    if has_room {
        subscription.handle(partition, id, record, now_ms);
    }
    has_room
}

/// Runs `act` under the lock if the current round still is `round`.
fn in_round<T>(
    stream: &OpenStream,
    partition: PartitionNumber,
    round: u64,
    act: impl FnOnce(&mut Subscription) -> T,
) -> Result<T, StopReason> {
    let mut subscription = stream.lock();
    if subscription.round(partition) != round || stream.is_closed() {
        return Err(StopReason::Obsolete);
    }
    Ok(act(&mut subscription))
}

/// Returns up to [`WINDOW`] ids in ascending order without duplicates. Ends early where a log needs
/// its next page: the lowest known id is the lowest of all only while the next id of every log is
/// known.
fn merge(logs: &mut [ReplayLog]) -> Vec<NotificationId> {
    let mut merged = Vec::new();
    while merged.len() < WINDOW && logs.iter().all(|log| log.is_done || !log.ids.is_empty()) {
        let Some(lowest) = logs.iter().filter_map(|log| log.ids.front().copied()).min() else {
            break;
        };
        for log in logs.iter_mut() {
            if log.ids.front() == Some(&lowest) {
                log.ids.pop_front();
            }
        }
        merged.push(lowest);
    }
    merged
}
