//! Periodic cleanup: removes expired data, a bounded number of rows at a time.
//!
//! The writer runs it after a group, at most once a second. A node ticks once a second, so an idle
//! node is swept too. A step without work writes nothing; a step that used up its budget continues
//! after the next group.

use std::sync::PoisonError;

use redb::{ReadableTable as _, Table};

use super::SharedState;
use super::layout::{self, Meta};
use super::store::Failure;
use super::work::{Work, transact};
use super::{device_cursors, recipients};
use crate::duration::millis;
use crate::event::{EntryId, NotificationId, Plan};

/// Rows examined or removed per step, for each partition and kind: about 10 ms of the writer's
/// time.
const BUDGET: usize = 2_000;
const EVERY_MS: u64 = 1_000;
/// How often the rows of all users are examined. Their contents are kept for days, and the row of
/// an active user is cleaned up when it changes.
const USERS_EVERY_MS: u64 = 3_600_000;

/// The progress of the cleanup.
#[derive(Debug, Default)]
pub(super) struct Sweep {
    /// When it last had nothing left to do, in milliseconds since the Unix epoch.
    done_ms: Option<u64>,
    /// In the order of `partitions`: the log at which an unfinished pass over the logs continues.
    walks: Vec<Option<String>>,
    /// When the last pass over all users began, and the user at which it continues in each table
    /// while it is unfinished.
    users_ms: Option<u64>,
    device_cursors_walk: Option<String>,
    recipients_walk: Option<String>,
}

/// The data of a partition that can be removed.
struct SweepBounds {
    /// Notifications below this id.
    records: NotificationId,
    /// Entries up to and including this one.
    entries: Option<EntryId>,
    /// Dedupe buckets that start before this time.
    seen_ms: u64,
}

/// An id at or below those of a plan in slices, of which the last is stored.
fn first_pending(last: NotificationId) -> NotificationId {
    NotificationId(last.0.saturating_sub(Plan::MAX_SLOTS as u64 - 1))
}

impl SweepBounds {
    fn new(meta: &Meta, shared: &SharedState, now_ms: u64) -> Self {
        let max_age_ms = millis(shared.retention.max_age);
        // Slightly later than the floor, so that a reader that has just read a page still finds its
        // records. Never a plan that is still being written in slices: its owner may be down for
        // longer than that.
        let cutoff = NotificationId::at_ms(now_ms.saturating_sub(max_age_ms + max_age_ms / 50));
        // Processed entries are kept only for operators; when space is short, outcomes take
        // precedence.
        let keep_ms = if shared.store.shortage(now_ms).is_some() {
            0
        } else {
            millis(shared.retention.processed_entries_ttl)
        };
        let window_ms = millis(shared.retention.dedupe_window);
        Self {
            records: meta
                .pending
                .map_or(cutoff, |last| cutoff.min(first_pending(last))),
            entries: meta.trimmable(now_ms, keep_ms),
            seen_ms: meta.bucket_ms.saturating_sub(window_ms),
        }
    }

    fn is_any(&self, shared: &SharedState, number: u8) -> Result<bool, Failure> {
        let transaction = shared.store.begin_read()?;
        let (records, source, seen) = (
            transaction.open_table(layout::RECORDS)?,
            transaction.open_table(layout::SOURCE)?,
            transaction.open_table(layout::SEEN)?,
        );
        let has_entries = match self.entries {
            Some(EntryId { ms, seq }) => source
                .range((number, 0, 0)..=(number, ms, seq))?
                .next()
                .is_some(),
            None => false,
        };
        Ok(has_entries
            || records
                .range((number, 0)..(number, self.records.0))?
                .next()
                .is_some()
            || seen
                .range((number, 0, &[0; 16])..(number, self.seen_ms, &[0; 16]))?
                .next()
                .is_some())
    }
}

impl Sweep {
    pub(super) fn run_if_due(&mut self, shared: &SharedState) {
        let now_ms = shared.clock.now_ms();
        // Compare the difference: a clock that was set back must not stop the cleanup.
        if shared.store.is_failed()
            || self
                .done_ms
                .is_some_and(|done_ms| now_ms.abs_diff(done_ms) < EVERY_MS)
        {
            return;
        }
        match self.run(shared, now_ms) {
            Ok(is_unfinished) => self.done_ms = (!is_unfinished).then_some(now_ms),
            Err(failure) => drop(shared.store.failed(failure, now_ms)),
        }
    }

    /// Runs one step. Returns `true` if there may be more to do.
    fn run(&mut self, shared: &SharedState, now_ms: u64) -> Result<bool, Failure> {
        self.walks.resize(shared.partitions.len(), None);
        let metas = shared
            .metas
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let due: Vec<SweepBounds> = metas
            .iter()
            .map(|meta| SweepBounds::new(meta, shared, now_ms))
            .collect();
        let mut has_work = self.walks.iter().any(Option::is_some);
        for (due, partition) in due.iter().zip(&shared.partitions) {
            has_work = has_work || due.is_any(shared, partition.number.0)?;
        }
        if self
            .users_ms
            .is_none_or(|looked_ms| now_ms.abs_diff(looked_ms) >= USERS_EVERY_MS)
        {
            self.users_ms = Some(now_ms);
            let transaction = shared.store.begin_read()?;
            let has_device_cursors = transaction
                .open_table(layout::DEVICE_CURSORS)?
                .first()?
                .is_some();
            self.device_cursors_walk = has_device_cursors.then(String::new);
            let has_recipients = transaction.open_table(layout::USERS)?.first()?.is_some();
            self.recipients_walk = has_recipients.then(String::new);
        }
        if !has_work && self.device_cursors_walk.is_none() && self.recipients_walk.is_none() {
            return Ok(false);
        }
        let mut is_unfinished = false;
        let (metas, _) = transact(shared, metas, |work| {
            for (slot, due) in due.iter().enumerate() {
                is_unfinished |= work.sweep(slot, due, &mut self.walks[slot])?;
            }
            if let Some(from) = self.device_cursors_walk.take() {
                self.device_cursors_walk = work.walk_device_cursors(&from)?;
                is_unfinished |= self.device_cursors_walk.is_some();
            }
            if let Some(from) = self.recipients_walk.take() {
                self.recipients_walk = work.walk_recipients(&from)?;
                is_unfinished |= self.recipients_walk.is_some();
            }
            Ok(())
        })?;
        *shared.metas.write().unwrap_or_else(PoisonError::into_inner) = metas;
        Ok(is_unfinished)
    }
}

impl Work<'_> {
    fn sweep(
        &mut self,
        slot: usize,
        due: &SweepBounds,
        walk: &mut Option<String>,
    ) -> Result<bool, Failure> {
        let number = self.number(slot);
        let mut is_unfinished = false;

        let mut n_records = 0;
        for row in self
            .tables
            .records
            .extract_from_if((number, 0)..(number, due.records.0), |_, _| true)?
            .take(BUDGET)
        {
            row?;
            n_records += 1;
        }
        is_unfinished |= n_records == BUDGET;
        if n_records > 0 {
            let meta = &mut self.metas[slot];
            meta.floor = meta.floor.max(due.records);
            // Every index entry has a record with the same id, so the logs need a pass only when
            // records were removed.
            walk.get_or_insert_default();
        }

        if let Some(EntryId { ms, seq }) = due.entries {
            let mut n_entries = 0;
            for row in self
                .tables
                .source
                .extract_from_if((number, 0, 0)..=(number, ms, seq), |_, _| true)?
                .take(BUDGET)
            {
                row?;
                n_entries += 1;
            }
            is_unfinished |= n_entries == BUDGET;
        }

        let mut n_seen = 0;
        for row in self
            .tables
            .seen
            .extract_from_if(
                (number, 0, &[0; 16])..(number, due.seen_ms, &[0; 16]),
                |_, _| true,
            )?
            .take(BUDGET)
        {
            row?;
            n_seen += 1;
        }
        is_unfinished |= n_seen == BUDGET;
        self.metas[slot]
            .bucket_sizes
            .retain(|&bucket, _| bucket >= due.seen_ms);

        if let Some(from) = walk.take() {
            *walk = self.walk(number, &from, due.records)?;
        }
        Ok(is_unfinished || walk.is_some())
    }

    /// Removes index entries below `cutoff` from some logs. Returns the log at which to continue.
    fn walk(
        &mut self,
        number: u8,
        from: &str,
        cutoff: NotificationId,
    ) -> Result<Option<String>, Failure> {
        let mut logs = Vec::new();
        for row in self.tables.logs.range((number, from)..)?.take(BUDGET) {
            let (key, value) = row?;
            let (partition, log) = key.value();
            if partition != number {
                break;
            }
            logs.push((log.to_owned(), value.value()));
        }
        let mut budget = BUDGET;
        for (i, (log, (length, top))) in logs.iter().enumerate() {
            let range = (number, log.as_str(), 0)..(number, log.as_str(), cutoff.0);
            let mut n_removed = 0;
            for row in self
                .tables
                .index
                .extract_from_if(range, |_, _| true)?
                .take(budget)
            {
                row?;
                n_removed += 1;
            }
            let left = length.saturating_sub(u32::try_from(n_removed).unwrap_or(u32::MAX));
            if left == 0 {
                self.tables.logs.remove((number, log.as_str()))?;
            } else if n_removed > 0 {
                self.tables
                    .logs
                    .insert((number, log.as_str()), (left, *top))?;
            }
            budget -= n_removed;
            if budget == 0 {
                return Ok(Some(logs[i].0.clone()));
            }
        }
        // The smallest name after the last one: that name followed by the smallest character.
        Ok((logs.len() == BUDGET).then(|| format!("{}\0", logs[BUDGET - 1].0)))
    }

    /// Removes expired cursors of some users. Returns the user at which to continue.
    fn walk_device_cursors(&mut self, from: &str) -> Result<Option<String>, Failure> {
        let (retention, now_ms) = (self.retention, self.now_ms);
        let is_over = |row: &[u8]| {
            device_cursors::DeviceCursorsRow::read(row)
                .is_ok_and(|mut stored| !stored.retain(retention, now_ms))
        };
        walk_users(&mut self.tables.device_cursors, from, is_over)
    }

    /// Removes the rows of some users that hold only ended memberships of long ago. Returns the
    /// user at which to continue.
    fn walk_recipients(&mut self, from: &str) -> Result<Option<String>, Failure> {
        let floors = self.floors();
        let is_over = |row: &[u8]| {
            recipients::RecipientRow::read(row).is_ok_and(|mut stored| !stored.retain(&floors))
        };
        walk_users(&mut self.tables.users, from, is_over)
    }
}

/// Removes expired rows of some users. Returns the user at which to continue. Unreadable rows are
/// kept, so that a request for one reports the error.
fn walk_users(
    table: &mut Table<'_, &'static str, &'static [u8]>,
    from: &str,
    is_over: impl Fn(&[u8]) -> bool,
) -> Result<Option<String>, Failure> {
    let (mut n_users, mut last, mut gone) = (0, String::new(), Vec::new());
    for row in table.range(from..)?.take(BUDGET) {
        let (user, row) = row?;
        n_users += 1;
        user.value().clone_into(&mut last);
        if is_over(row.value()) {
            gone.push(last.clone());
        }
    }
    for user in gone {
        table.remove(user.as_str())?;
    }
    Ok((n_users == BUDGET).then(|| format!("{last}\0")))
}
