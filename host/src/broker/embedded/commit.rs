//! Writes outcomes: compares and moves the position, detects duplicates, and writes records, logs,
//! dead letters, decision records and counters.
//!
//! Everything happens within one group of `writer`, so it becomes durable completely or not at all.
//! A batch is rejected, if at all, before its first write.

use std::time::Duration;

use bytes::Bytes;
use redb::ReadableTable as _;
use serde::{Deserialize, Serialize};

use super::layout::{EntryKey, Meta, entry_key, owned, successor};
use super::store::Failure;
use super::work::Work;
use crate::broker::{
    Batch, CommitResult, Error, Item, NewNotification, Notice, Oversized, Proposal, RetryPolicy,
    Slice,
};
use crate::duration::millis;
use crate::event::{
    DeadReason, Decision, EntryId, NotificationId, Outcome, Position, Retry, Target,
};

/// Records up to this size, in bytes, are sent with their notice. Within the process this copies
/// nothing, but a full feed keeps them in memory.
const INLINE_RECORD: usize = 16 * 1024;

/// A decision record as stored: JSON.
#[derive(Serialize, Deserialize)]
pub(super) struct DecisionRow {
    pub(super) outcome: Outcome,
    pub(super) id: Option<NotificationId>,
    pub(super) decision: Decision,
}

/// A dead letter as stored: JSON, next to its fields.
#[derive(Serialize, Deserialize)]
pub(super) struct DeadLetterRow {
    pub(super) entry: EntryId,
    pub(super) why: DeadReason,
    /// The size of the entry if the row holds only its beginning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) entry_bytes: Option<u64>,
    #[serde(default)]
    pub(super) entry_fields: u64,
    /// Only of an event that waits for a retry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) retry: Option<PendingRetry>,
}

/// A retry that is not due yet, and what its entry is to count as earlier attempts.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub(super) struct PendingRetry {
    pub(super) due_ms: u64,
    pub(super) earlier: EarlierAttempts,
}

/// The attempts at an event before the entry of a retry, which no publisher can set, unlike a field
/// of the entry.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub(super) struct EarlierAttempts {
    pub(super) attempts: u32,
    pub(super) retries: u32,
    /// When the first attempt failed, in milliseconds since the Unix epoch.
    pub(super) first_ms: u64,
}

impl Work<'_> {
    /// See [`crate::broker::Sources::commit`].
    pub(super) fn commit(&mut self, slot: usize, batch: &Batch) -> Result<CommitResult, Failure> {
        let meta = &self.metas[slot];
        // While a plan is being written in slices, only its next slice is accepted.
        if batch.epoch != meta.epoch() || batch.prev != meta.position() || batch.prev.slices > 0 {
            return Ok(CommitResult::Conflict);
        }
        let ascends = batch
            .items
            .first()
            .is_none_or(|first| first.entry > batch.prev.entry)
            && batch.items.is_sorted_by(|a, b| a.entry < b.entry);
        if !ascends {
            return Err(invalid_request(
                "the entries of a batch must follow its position in ascending order",
            ));
        }
        let mut outcomes = Vec::with_capacity(batch.items.len());
        for item in &batch.items {
            outcomes.push(self.settle(slot, item)?);
        }
        if let Some(last) = batch.items.last() {
            self.move_position(slot, last.entry);
        }
        Ok(CommitResult::Done(outcomes))
    }

    /// See [`crate::broker::Sources::commit_slice`].
    pub(super) fn commit_slice(
        &mut self,
        slot: usize,
        slice: &Slice,
    ) -> Result<CommitResult, Failure> {
        let Slice {
            epoch,
            prev,
            item,
            index,
            is_last,
        } = slice;
        let meta = &self.metas[slot];
        let follows = if *index == 0 {
            item.entry > prev.entry
        } else {
            item.entry == prev.entry
        };
        if *epoch != meta.epoch() || *prev != meta.position() || *index != prev.slices || !follows {
            return Ok(CommitResult::Conflict);
        }
        let Proposal::Commit(notifications) = &item.proposal else {
            return Err(invalid_request("only a committed plan can have slices"));
        };
        let n_more = notifications.len().saturating_sub(1) as u64;
        // The id of the first notification; that of the last is pending.
        let id = match (index, meta.pending) {
            (0, _) if *is_last || self.is_duplicate(slot, item)? => {
                let outcome = self.settle(slot, item)?;
                self.move_position(slot, item.entry);
                return Ok(CommitResult::Done(vec![outcome]));
            }
            (0, _) => {
                let id = self.next_id(slot);
                self.remember(slot, item)?;
                for (own, notification) in (id.0..).zip(notifications) {
                    self.tables.records.insert(
                        (self.partitions[slot].number.0, own),
                        notification.record.as_ref(),
                    )?;
                }
                id
            }
            (_, Some(pending)) => NotificationId(pending.0.saturating_sub(n_more)),
            (_, None) => {
                return Err(Failure::damaged(format!(
                    "partition {} is in the middle of a plan but has no pending id",
                    self.number(slot)
                )));
            }
        };
        for (own, notification) in (id.0..).zip(notifications) {
            self.index(slot, NotificationId(own), notification)?;
        }
        let last = NotificationId(id.0 + n_more);
        let meta = &mut self.metas[slot];
        if *is_last {
            meta.pending = None;
            meta.last = last;
            self.record(slot, item, Outcome::Committed, Some(id), None)?;
            self.move_position(slot, item.entry);
        } else {
            meta.pending = Some(last);
            meta.set_position(Position {
                entry: item.entry,
                slices: index + 1,
            });
        }
        Ok(CommitResult::Done(vec![(Outcome::Committed, Some(id))]))
    }

    /// Writes the outcome of one item.
    fn settle(
        &mut self,
        slot: usize,
        item: &Item,
    ) -> Result<(Outcome, Option<NotificationId>), Failure> {
        let is_dead = matches!(
            item.proposal,
            Proposal::DeadLetter(_) | Proposal::OversizedEntry { .. } | Proposal::Retry(..)
        );
        // Dead letters are neither checked nor remembered: a redriven entry is not a retry by the
        // publisher.
        if !is_dead {
            if self.is_duplicate(slot, item)? {
                self.record(slot, item, Outcome::Duplicate, None, None)?;
                return Ok((Outcome::Duplicate, None));
            }
            self.remember(slot, item)?;
        }
        let (mut id, mut due_ms) = (None, None);
        let outcome = match &item.proposal {
            Proposal::Discard => Outcome::Discarded,
            Proposal::Unrouted => Outcome::Unrouted,
            Proposal::DeadLetter(why) => {
                self.add_dead_letter(slot, item.entry, why, None)?;
                Outcome::DeadLettered
            }
            Proposal::OversizedEntry { why, size } => {
                let whole = if size.fits_dead_letter() {
                    self.fields(slot, item.entry)?
                } else {
                    None
                };
                match whole {
                    Some(fields) => {
                        let why = DeadReason {
                            fields,
                            ..why.clone()
                        };
                        self.add_dead_letter(slot, item.entry, &why, None)?;
                    }
                    None => self.add_dead_letter(slot, item.entry, why, Some(*size))?,
                }
                Outcome::DeadLettered
            }
            Proposal::Retry(why, policy) => {
                due_ms = self.add_retry(slot, item.entry, why, *policy)?;
                match due_ms {
                    Some(_) => Outcome::Retrying,
                    None => Outcome::DeadLettered,
                }
            }
            Proposal::Commit(notifications) => {
                for notification in notifications {
                    let own = self.next_id(slot);
                    self.tables.records.insert(
                        (self.partitions[slot].number.0, own.0),
                        notification.record.as_ref(),
                    )?;
                    self.index(slot, own, notification)?;
                    self.metas[slot].last = own;
                    id.get_or_insert(own);
                }
                Outcome::Committed
            }
        };
        self.record(slot, item, outcome, id, due_ms)?;
        Ok((outcome, id))
    }

    /// Moves the position to an entry whose outcome is written.
    fn move_position(&mut self, slot: usize, entry: EntryId) {
        let keep_ms = millis(self.retention.processed_entries_ttl);
        let now_ms = self.now_ms;
        let meta = &mut self.metas[slot];
        meta.set_position(entry.into());
        // A few marks per period are enough: an entry is kept at most an eighth longer than
        // configured.
        if meta
            .marks
            .back()
            .is_none_or(|&(ms, _)| now_ms.saturating_sub(ms) >= keep_ms / 8)
        {
            while meta
                .marks
                .get(1)
                .is_some_and(|&(ms, _)| ms.saturating_add(keep_ms) <= now_ms)
            {
                meta.marks.pop_front();
            }
            meta.marks.push_back((now_ms, entry));
        }
    }

    /// Above the floor as well: after the clock was set back, the floor may be ahead of the clock,
    /// and streams start there.
    fn next_id(&self, slot: usize) -> NotificationId {
        let meta = &self.metas[slot];
        let after = meta.last.max(meta.floor(self.now_ms));
        NotificationId(after.0 + 1).max(NotificationId::at_ms(self.now_ms))
    }

    /// Adds the notification to the logs and queues the notices.
    fn index(
        &mut self,
        slot: usize,
        id: NotificationId,
        NewNotification { record, targets }: &NewNotification,
    ) -> Result<(), Failure> {
        let number = self.number(slot);
        let meta = &self.metas[slot];
        // The predecessor of the first entry of an absent log: unknown below the floor, and none
        // above it.
        let absent = meta.floor(self.now_ms).min(meta.last);
        for target in targets {
            let log = target.to_string();
            let cap = if *target == Target::Everyone {
                self.retention.everyone_entries
            } else {
                self.retention.log_entries
            };
            let found = self
                .tables
                .logs
                .get((number, log.as_str()))?
                .map(|row| row.value());
            let (mut length, top) = found.unwrap_or((0, absent.0));
            self.tables
                .index
                .insert((number, log.as_str(), id.0), top)?;
            length += 1;
            while length > cap.max(1) {
                let first = self
                    .tables
                    .index
                    .range((number, log.as_str(), 0)..=(number, log.as_str(), u64::MAX))?
                    .next();
                let Some(first) = first.transpose()?.map(|(key, _)| key.value().2) else {
                    break;
                };
                self.tables.index.remove((number, log.as_str(), first))?;
                length -= 1;
            }
            self.tables
                .logs
                .insert((number, log.as_str()), (length, id.0))?;
            let record = (record.len() <= INLINE_RECORD).then(|| record.clone());
            let partition = self.partitions[slot].number;
            self.notices.push(Notice::Append {
                partition,
                target: target.clone(),
                epoch: self.metas[slot].epoch(),
                id,
                record,
            });
        }
        Ok(())
    }

    /// The start of the dedupe bucket of an entry. Uses the time of the entry, so that a stalled
    /// consumer does not stretch the window.
    fn bucket(&self, entry: EntryId) -> (u64, u64) {
        let window_ms = millis(self.retention.dedupe_window).max(1);
        (entry.ms - entry.ms % window_ms, window_ms)
    }

    fn is_duplicate(&self, slot: usize, item: &Item) -> Result<bool, Failure> {
        let Some(hash) = &item.dedupe else {
            return Ok(false);
        };
        let (bucket, window_ms) = self.bucket(item.entry);
        let is_in = |bucket: u64| -> Result<bool, Failure> {
            Ok(self
                .tables
                .seen
                .get((self.number(slot), bucket, hash))?
                .is_some())
        };
        Ok(is_in(bucket)? || (bucket > 0 && is_in(bucket.saturating_sub(window_ms))?))
    }

    fn remember(&mut self, slot: usize, item: &Item) -> Result<(), Failure> {
        let Some(hash) = &item.dedupe else {
            return Ok(());
        };
        let (bucket, _) = self.bucket(item.entry);
        let number = self.number(slot);
        let meta = &mut self.metas[slot];
        meta.bucket_ms = meta.bucket_ms.max(bucket);
        let size = meta.bucket_sizes.entry(bucket).or_default();
        if *size >= self.retention.dedupe_entries {
            meta.dedupe_overflows += 1;
            return Ok(());
        }
        *size += 1;
        self.tables.seen.insert((number, bucket, hash), ())?;
        Ok(())
    }

    /// The fields of an entry, if the source still holds it.
    fn fields(&self, slot: usize, entry: EntryId) -> Result<Option<Vec<(Bytes, Bytes)>>, Failure> {
        let found = self
            .tables
            .source
            .get(entry_key(self.number(slot), entry))?;
        Ok(found.map(|fields| owned(&fields.value())))
    }

    /// The attempts at the event before this entry. An unreadable row counts as none: a batch must
    /// not fail after its first write.
    fn earlier(&self, slot: usize, entry: EntryId) -> Result<Option<EarlierAttempts>, Failure> {
        let key = entry_key(self.number(slot), entry);
        let row = self.tables.retried.get(key)?;
        Ok(row.and_then(|row| serde_json::from_slice(row.value()).ok()))
    }

    /// Keeps the event for its retry. Returns when that is due, or `None` if the event became a dead
    /// letter that stays instead.
    fn add_retry(
        &mut self,
        slot: usize,
        entry: EntryId,
        why: &DeadReason,
        policy: RetryPolicy,
    ) -> Result<Option<u64>, Failure> {
        let before = self.earlier(slot, entry)?.unwrap_or(EarlierAttempts {
            attempts: 0,
            retries: 0,
            first_ms: self.now_ms,
        });
        let delay_ms = 1_u64.checked_shl(before.retries).unwrap_or(u64::MAX);
        let due_ms = self.now_ms.saturating_add(delay_ms.saturating_mul(1_000));
        if before.retries >= policy.retries
            || due_ms.saturating_sub(before.first_ms) > millis(policy.timeout)
        {
            self.add_dead_letter(slot, entry, why, None)?;
            return Ok(None);
        }
        let n = self.metas[slot].retrying;
        if n >= u64::from(self.retention.dead_letter_entries) {
            let reason = format!(
                "{}; it is not retried, because {n} events wait for a retry (retention.dead_letter_entries)",
                why.reason
            );
            let why = DeadReason {
                reason,
                ..why.clone()
            };
            self.add_dead_letter(slot, entry, &why, None)?;
            return Ok(None);
        }
        let earlier = EarlierAttempts {
            attempts: before.attempts.saturating_add(why.attempts),
            retries: before.retries + 1,
            first_ms: before.first_ms,
        };
        let retry = Some(PendingRetry { due_ms, earlier });
        let (key, row) = self.letter(slot, entry, why, earlier.attempts, retry, None);
        self.tables
            .retrying
            .insert(key, (row.as_slice(), borrowed(&why.fields)))?;
        let (number, ms, seq) = key;
        self.tables.due.insert((number, due_ms, ms, seq), ())?;
        let meta = &mut self.metas[slot];
        meta.retrying += 1;
        meta.next_due_ms = Some(meta.next_due_ms.map_or(due_ms, |next| next.min(due_ms)));
        Ok(Some(due_ms))
    }

    /// The key and the row of a new dead letter.
    fn letter(
        &mut self,
        slot: usize,
        entry: EntryId,
        why: &DeadReason,
        attempts: u32,
        retry: Option<PendingRetry>,
        oversized: Option<Oversized>,
    ) -> (EntryKey, Vec<u8>) {
        let meta = &mut self.metas[slot];
        let id = successor(meta.last_dead_letter).max(EntryId {
            ms: self.now_ms,
            seq: 0,
        });
        meta.last_dead_letter = id;
        let why = DeadReason {
            reason: why.reason.clone(),
            plugin: why.plugin.clone(),
            attempts,
            fields: Vec::new(),
        };
        let row = serde_json::to_vec(&DeadLetterRow {
            entry,
            why,
            entry_bytes: oversized.map(|size| size.bytes),
            entry_fields: oversized.map_or(0, |size| size.fields),
            retry,
        })
        .expect("strings and numbers are JSON");
        (entry_key(self.number(slot), id), row)
    }

    fn add_dead_letter(
        &mut self,
        slot: usize,
        entry: EntryId,
        why: &DeadReason,
        oversized: Option<Oversized>,
    ) -> Result<(), Failure> {
        let earlier = self
            .earlier(slot, entry)?
            .map_or(0, |earlier| earlier.attempts);
        let attempts = earlier.saturating_add(why.attempts);
        let (key, row) = self.letter(slot, entry, why, attempts, None, oversized);
        self.tables
            .dead
            .insert(key, (row.as_slice(), borrowed(&why.fields)))?;
        let number = self.number(slot);
        let meta = &mut self.metas[slot];
        meta.dead_letters += 1;
        while meta.dead_letters > u64::from(self.retention.dead_letter_entries) {
            let oldest = self
                .tables
                .dead
                .range((number, 0, 0)..=(number, u64::MAX, u64::MAX))?
                .next();
            let Some(oldest) = oldest.transpose()?.map(|(key, _)| key.value()) else {
                break;
            };
            self.tables.dead.remove(oldest)?;
            meta.dead_letters -= 1;
            meta.dead_trimmed += 1;
        }
        Ok(())
    }

    /// Counts the outcome and writes the decision record.
    fn record(
        &mut self,
        slot: usize,
        item: &Item,
        outcome: Outcome,
        id: Option<NotificationId>,
        due_ms: Option<u64>,
    ) -> Result<(), Failure> {
        let earlier = self.earlier(slot, item.entry)?;
        let number = self.number(slot);
        let meta = &mut self.metas[slot];
        meta.settled += 1;
        *meta.outcomes.entry(outcome).or_default() += 1;
        let mut decision = item.decision.clone();
        if earlier.is_some() || due_ms.is_some() {
            let own = match &item.proposal {
                Proposal::DeadLetter(why)
                | Proposal::OversizedEntry { why, .. }
                | Proposal::Retry(why, _) => why.attempts,
                Proposal::Commit(_) | Proposal::Discard | Proposal::Unrouted => 1,
            };
            let earlier = earlier.map_or(0, |earlier| earlier.attempts);
            decision.retry = Some(Retry {
                attempts: earlier.saturating_add(own),
                due_ms,
            });
            self.tables.retried.remove(entry_key(number, item.entry))?;
        }
        let stored = DecisionRow {
            outcome,
            id,
            decision,
        };
        let row = serde_json::to_vec(&stored).expect("strings and numbers are JSON");
        if self
            .tables
            .decisions
            .insert(entry_key(number, item.entry), row.as_slice())?
            .is_none()
        {
            meta.decisions += 1;
        }
        while meta.decisions > u64::from(self.retention.decision_entries) {
            let oldest = self
                .tables
                .decisions
                .range((number, 0, 0)..=(number, u64::MAX, u64::MAX))?
                .next();
            let Some(oldest) = oldest.transpose()?.map(|(key, _)| key.value()) else {
                break;
            };
            self.tables.decisions.remove(oldest)?;
            meta.decisions -= 1;
        }
        Ok(())
    }
}

impl Meta {
    /// The newest entry whose outcome is at least `keep_ms` old, according to the marks.
    pub(super) fn trimmable(&self, now_ms: u64, keep_ms: u64) -> Option<EntryId> {
        let is_old = |&&(ms, _): &&(u64, EntryId)| ms.saturating_add(keep_ms) <= now_ms;
        self.marks
            .iter()
            .take_while(is_old)
            .last()
            .map(|&(_, entry)| entry)
    }

    /// How far ids run ahead of the clock.
    pub(super) fn ids_ahead(&self, now_ms: u64) -> Duration {
        Duration::from_millis(self.last.ms().saturating_sub(now_ms))
    }
}

fn borrowed(fields: &[(Bytes, Bytes)]) -> Vec<(&[u8], &[u8])> {
    fields
        .iter()
        .map(|(name, value)| (name.as_ref(), value.as_ref()))
        .collect()
}

/// The approximate size of an item in bytes.
pub(super) fn weight(item: &Item) -> usize {
    match &item.proposal {
        Proposal::Commit(notifications) => notifications
            .iter()
            .map(|new| new.record.len() + new.targets.len() * 64)
            .sum(),
        Proposal::DeadLetter(why) | Proposal::Retry(why, _) => super::weight(&why.fields),
        Proposal::OversizedEntry { size, .. } if size.fits_dead_letter() => size.bytes as usize,
        Proposal::OversizedEntry { why, .. } => super::weight(&why.fields),
        Proposal::Discard | Proposal::Unrouted => 256,
    }
}

fn invalid_request(text: &str) -> Failure {
    Failure::Answer(Error::Permanent(text.to_owned()))
}
