//! The entries of a source and its dead letters: append, read, redrive, count attempts. Also reads
//! decision records.

use std::ops::Bound;

use bytes::Bytes;
use redb::{ReadOnlyTable, ReadTransaction, ReadableTable as _};

use super::commit::{DeadLetterRow, DecisionRow};
use super::layout::{self, Meta, entry_key, owned, successor};
use super::store::Failure;
use super::work::Work;
use crate::broker::partition::excerpt;
use crate::broker::{
    DeadLetter, DecisionSearch, Entry, Error, MAX_COMMIT_BYTES, MAX_ENTRY_FIELDS, Oversized,
    StoredDecision,
};
use crate::event::{ChainMembers, EntryId};

type Field = (Bytes, Bytes);

/// Retries appended at once.
const MAX_DUE: usize = 256;

impl Work<'_> {
    /// See [`crate::broker::Sources::append`].
    pub(super) fn append(
        &mut self,
        slot: usize,
        entries: &[Vec<Field>],
    ) -> Result<Vec<EntryId>, Failure> {
        self.check_room(slot)?;
        entries
            .iter()
            .map(|fields| self.append_entry(slot, fields))
            .collect()
    }

    fn append_entry(&mut self, slot: usize, fields: &[Field]) -> Result<EntryId, Failure> {
        let number = self.number(slot);
        let meta = &mut self.metas[slot];
        // Above the position as well: a commit may have moved it past entries that the partition
        // never stored.
        let before = meta.last_entry.max(meta.position().entry);
        let id = successor(before).max(EntryId {
            ms: self.now_ms,
            seq: 0,
        });
        let fields: Vec<(&[u8], &[u8])> = fields
            .iter()
            .map(|(name, value)| (name.as_ref(), value.as_ref()))
            .collect();
        self.tables.source.insert(entry_key(number, id), fields)?;
        meta.last_entry = id;
        meta.appended += 1;
        Ok(id)
    }

    /// Appends the events whose retry is due to the source again, up to the limits of one commit.
    pub(super) fn append_due(&mut self, slot: usize) -> Result<(), Failure> {
        let number = self.number(slot);
        let mut n_bytes = 0;
        for _ in 0..MAX_DUE {
            let next = self
                .tables
                .due
                .range((number, 0, 0, 0)..=(number, self.now_ms, u64::MAX, u64::MAX))?
                .next();
            let Some(key) = next.transpose()?.map(|(key, _)| key.value()) else {
                break;
            };
            let (_, _, ms, seq) = key;
            let id = EntryId { ms, seq };
            let taken = match self.take_retry(slot, id) {
                // Reported in the log. It stays in the list; the others must not wait behind it.
                Err(Failure::Answer(_)) => None,
                taken => taken?,
            };
            let Some((row, fields)) = taken else {
                self.tables.due.remove(key)?;
                self.find_next_due(slot)?;
                continue;
            };
            n_bytes += super::weight(&fields);
            let entry = self.append_entry(slot, &fields)?;
            let earlier = row.retry.map(|retry| retry.earlier);
            let row = serde_json::to_vec(&earlier).expect("numbers are JSON");
            self.tables
                .retried
                .insert(entry_key(number, entry), row.as_slice())?;
            if n_bytes > MAX_COMMIT_BYTES {
                break;
            }
        }
        Ok(())
    }

    /// Removes the dead letter of an event that waits for a retry.
    fn take_retry(
        &mut self,
        slot: usize,
        id: EntryId,
    ) -> Result<Option<(DeadLetterRow, Vec<Field>)>, Failure> {
        let number = self.number(slot);
        let found = self.tables.retrying.get(entry_key(number, id))?.map(|row| {
            let (row, fields) = row.value();
            parse::<DeadLetterRow>(row, || format!("the row of the retry {id}"))
                .map(|row| (row, owned(&fields)))
        });
        // Read before the first write: a group is not undone because of an unreadable row.
        let Some((row, fields)) = found.transpose()? else {
            return Ok(None);
        };
        self.tables.retrying.remove(entry_key(number, id))?;
        if let Some(retry) = row.retry {
            self.tables
                .due
                .remove((number, retry.due_ms, id.ms, id.seq))?;
        }
        self.metas[slot].retrying = self.metas[slot].retrying.saturating_sub(1);
        self.find_next_due(slot)?;
        Ok(Some((row, fields)))
    }

    fn find_next_due(&mut self, slot: usize) -> Result<(), Failure> {
        let number = self.number(slot);
        let next = self
            .tables
            .due
            .range((number, 0, 0, 0)..=(number, u64::MAX, u64::MAX, u64::MAX))?
            .next();
        self.metas[slot].next_due_ms = next.transpose()?.map(|(key, _)| key.value().1);
        Ok(())
    }

    fn check_room(&self, slot: usize) -> Result<(), Failure> {
        if let Some(shortage) = &self.shortage {
            return Err(Error::Full(shortage.clone()).into());
        }
        let (lag, bound) = (self.metas[slot].lag(), self.retention.backlog_entries);
        if lag < bound {
            return Ok(());
        }
        let source = &self.partitions[slot].source;
        Err(Error::Full(format!(
            "{lag} entries are waiting in '{source}' and limits.backlog_entries is {bound}; try again later"
        ))
        .into())
    }

    /// See [`crate::broker::Sources::take_over`].
    pub(super) fn take_over(&mut self, slot: usize) -> u32 {
        let meta = &mut self.metas[slot];
        let position = meta.position();
        let at = (position.entry, position.slices);
        meta.takeovers = if meta.taken_over_at == at {
            meta.takeovers.saturating_add(1)
        } else {
            1
        };
        meta.taken_over_at = at;
        meta.takeovers
    }

    /// See [`crate::broker::Sources::note_attempt`].
    pub(super) fn note_attempt(&mut self, slot: usize, entry: EntryId) -> u32 {
        let meta = &mut self.metas[slot];
        // Only one entry at a time is tried with recorded attempts, so only one is stored.
        let noted = meta
            .attempts
            .filter(|&(noted, _)| noted == entry)
            .map_or(0, |(_, n)| n);
        meta.attempts = Some((entry, noted.saturating_add(1)));
        noted.saturating_add(1)
    }

    /// See [`crate::broker::Operations::redrive`]. Rejected like any append if the backlog is at
    /// its limit.
    pub(super) fn redrive(&mut self, slot: usize, id: EntryId) -> Result<bool, Failure> {
        let key = entry_key(self.number(slot), id);
        let row = match self.tables.dead.get(key)? {
            Some(row) => Some(row),
            None => self.tables.retrying.get(key)?,
        };
        let found = row.map(|row| {
            let (stored, fields) = row.value();
            (stored.to_vec(), owned(&fields))
        });
        let Some((stored, fields)) = found else {
            return Ok(false);
        };
        let row: DeadLetterRow = parse(&stored, || format!("the row of dead letter {id}"))?;
        if row.entry_bytes.is_some() {
            return Err(Error::Permanent(format!(
                "the dead letter {id} holds only the beginning of its entry; publish the event in smaller parts, then drop the dead letter"
            ))
            .into());
        }
        self.append(slot, &[fields])?;
        self.drop_dead_letter(slot, id)
    }

    /// See [`crate::broker::Operations::drop_dead_letter`].
    pub(super) fn drop_dead_letter(&mut self, slot: usize, id: EntryId) -> Result<bool, Failure> {
        let key = entry_key(self.number(slot), id);
        if self.tables.dead.remove(key)?.is_some() {
            self.metas[slot].dead_letters = self.metas[slot].dead_letters.saturating_sub(1);
            return Ok(true);
        }
        Ok(self.take_retry(slot, id)?.is_some())
    }
}

/// All keys of a partition above `after`.
fn above(partition: u8, after: EntryId) -> (Bound<layout::EntryKey>, Bound<layout::EntryKey>) {
    (
        Bound::Excluded(entry_key(partition, after)),
        Bound::Included((partition, u64::MAX, u64::MAX)),
    )
}

pub(super) fn entries(
    transaction: &ReadTransaction,
    partition: u8,
    after: EntryId,
    count: usize,
    max_event_bytes: usize,
) -> Result<Vec<Entry>, Failure> {
    let table = transaction.open_table(layout::SOURCE)?;
    let rows = table.range(above(partition, after))?.take(count);
    let read = rows.map(|row| {
        let (key, fields) = row?;
        let (_, ms, seq) = key.value();
        let (id, fields) = (EntryId { ms, seq }, fields.value());
        let bytes = size(&fields);
        if bytes > max_event_bytes || fields.len() > MAX_ENTRY_FIELDS {
            return Ok(Entry {
                id,
                fields: excerpt(fields.iter().copied()),
                oversized: Some(Oversized {
                    bytes: bytes as u64,
                    fields: fields.len() as u64,
                    is_exact: true,
                }),
            });
        }
        Ok(Entry {
            id,
            fields: owned(&fields),
            oversized: None,
        })
    });
    read.collect()
}

/// The size of an entry in bytes of names and values.
fn size(fields: &[(&[u8], &[u8])]) -> usize {
    fields
        .iter()
        .map(|(name, value)| name.len() + value.len())
        .sum()
}

pub(super) fn dead_letters(
    table: &ReadOnlyTable<layout::EntryKey, (&'static [u8], layout::Fields)>,
    partition: u8,
    after: EntryId,
    limit: usize,
    with_fields: bool,
) -> Result<Vec<DeadLetter>, Failure> {
    let rows = table.range(above(partition, after))?.take(limit);
    let read = rows.map(|row| {
        let (key, value) = row?;
        let ((_, ms, seq), (stored, fields)) = (key.value(), value.value());
        let DeadLetterRow {
            entry,
            mut why,
            entry_bytes,
            entry_fields,
            retry,
        } = parse(stored, || format!("the row of dead letter {ms}-{seq}"))?;
        if with_fields {
            why.fields = owned(&fields);
        }
        Ok(DeadLetter {
            id: EntryId { ms, seq },
            entry,
            why,
            oversized: entry_bytes.map(|bytes| Oversized {
                bytes,
                fields: entry_fields,
                is_exact: true,
            }),
            due_ms: retry.map(|retry| retry.due_ms),
        })
    });
    read.collect()
}

pub(super) fn decisions(
    transaction: &ReadTransaction,
    partition: u8,
    limit: usize,
) -> Result<Vec<StoredDecision>, Failure> {
    let table = transaction.open_table(layout::DECISIONS)?;
    newest_first(&table, partition)?.take(limit).collect()
}

pub(super) fn find_decisions(
    transaction: &ReadTransaction,
    partition: u8,
    event_id: &str,
    limit: usize,
) -> Result<DecisionSearch, Failure> {
    let table = transaction.open_table(layout::DECISIONS)?;
    let mut found = DecisionSearch::default();
    for stored in newest_first(&table, partition)? {
        let stored = stored?;
        let (entry, .., decision) = &stored;
        found.reaches_to = Some(*entry);
        if decision.is_about(*entry, event_id) {
            found.decisions.push(stored);
            if found.decisions.len() == limit {
                break;
            }
        }
    }
    Ok(found)
}

pub(super) fn find_chain(
    transaction: &ReadTransaction,
    partition: u8,
    id: &str,
) -> Result<Option<ChainMembers>, Failure> {
    let table = transaction.open_table(layout::DECISIONS)?;
    for stored in newest_first(&table, partition)? {
        let (.., decision) = stored?;
        if decision.chain == id && decision.members.is_some() {
            return Ok(decision.members);
        }
    }
    Ok(None)
}

fn newest_first(
    table: &ReadOnlyTable<layout::EntryKey, &'static [u8]>,
    partition: u8,
) -> Result<impl Iterator<Item = Result<StoredDecision, Failure>>, Failure> {
    let rows = table
        .range((partition, 0, 0)..=(partition, u64::MAX, u64::MAX))?
        .rev();
    Ok(rows.map(|row| {
        let (key, value) = row?;
        let (_, ms, seq) = key.value();
        let DecisionRow {
            outcome,
            id,
            decision,
        } = parse(value.value(), || {
            format!("the decision record of entry {ms}-{seq}")
        })?;
        Ok((EntryId { ms, seq }, outcome, id, decision))
    }))
}

fn parse<T: serde::de::DeserializeOwned>(
    row: &[u8],
    what: impl FnOnce() -> String,
) -> Result<T, Failure> {
    serde_json::from_slice(row).map_err(|error| Failure::unreadable(&what(), &error))
}

/// Statistics of a partition for operators.
pub(super) fn state(meta: &Meta, now_ms: u64) -> crate::broker::PartitionState {
    crate::broker::PartitionState {
        outcomes: meta.outcomes.clone(),
        lag: meta.lag(),
        // No other process can write to the source.
        trimmed_unread: 0,
        position: meta.position(),
        dead_letters: meta.dead_letters,
        retrying: meta.retrying,
        dead_trimmed: meta.dead_trimmed,
        dedupe_overflows: meta.dedupe_overflows,
        // No other process can write to the source.
        has_foreign_ids: false,
        unneeded: 0,
        ids_ahead_ms: u64::try_from(meta.ids_ahead(now_ms).as_millis()).unwrap_or(u64::MAX),
    }
}
