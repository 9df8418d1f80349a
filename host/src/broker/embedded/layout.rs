//! The tables of the store, the contents of a partition's row, and the creation and check of both
//! when the store is opened.
//!
//! This file defines the complete layout. A change that an older pointsman would misread must
//! increment [`VERSION`]. The tables are written by `commit`, `source`, `recipients`,
//! `device_cursors` and `sweep`.

use std::collections::{BTreeMap, VecDeque};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use redb::{
    ReadTransaction, ReadableTable, ReadableTableMetadata as _, Table, TableDefinition,
    WriteTransaction,
};
use serde::{Deserialize, Serialize};

use super::store::Failure;
use crate::broker::{Head, Partition, Retention};
use crate::duration::millis;
use crate::event::{EntryId, Epoch, NotificationId, Outcome, PartitionNumber, Position};

/// The version of this layout. A store with a higher version is rejected.
pub(super) const VERSION: u64 = 2;
/// The oldest version that this one reads: what is new in a later one is created when the store is
/// opened.
const OLDEST_VERSION: u64 = 1;

/// The fields of an entry.
pub(super) type Fields = Vec<(&'static [u8], &'static [u8])>;
/// Partition number and the two halves of an [`EntryId`].
pub(super) type EntryKey = (u8, u64, u64);
/// Partition number, time at which a retry is due in ms, and the two halves of the id of its letter.
pub(super) type DueKey = (u8, u64, u64, u64);

pub(super) const LAYOUT: TableDefinition<'_, &str, u64> = TableDefinition::new("layout");
pub(super) const PARTITIONS: TableDefinition<'_, &str, u8> = TableDefinition::new("partitions");
pub(super) const META: TableDefinition<'_, u8, &[u8]> = TableDefinition::new("meta");
pub(super) const SOURCE: TableDefinition<'_, EntryKey, Fields> = TableDefinition::new("source");
pub(super) const RECORDS: TableDefinition<'_, (u8, u64), &[u8]> = TableDefinition::new("records");
pub(super) const LOGS: TableDefinition<'_, (u8, &str), (u32, u64)> = TableDefinition::new("logs");
pub(super) const INDEX: TableDefinition<'_, (u8, &str, u64), u64> = TableDefinition::new("index");
pub(super) const SEEN: TableDefinition<'_, (u8, u64, &[u8; 16]), ()> = TableDefinition::new("seen");
pub(super) const DEAD: TableDefinition<'_, EntryKey, (&[u8], Fields)> =
    TableDefinition::new("dead");
pub(super) const RETRYING: TableDefinition<'_, EntryKey, (&[u8], Fields)> =
    TableDefinition::new("retrying");
pub(super) const DUE: TableDefinition<'_, DueKey, ()> = TableDefinition::new("due");
pub(super) const RETRIED: TableDefinition<'_, EntryKey, &[u8]> = TableDefinition::new("retried");
pub(super) const DECISIONS: TableDefinition<'_, EntryKey, &[u8]> =
    TableDefinition::new("decisions");
pub(super) const USERS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("users");
pub(super) const DEVICE_CURSORS: TableDefinition<'_, &str, &[u8]> =
    TableDefinition::new("device_cursors");
/// Plugin -> [`crate::broker::Rollout`] as JSON.
pub(super) const ROLLOUTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("rollouts");

/// The tables that requests write, opened once per group.
pub(super) struct Tables<'t> {
    pub(super) meta: Table<'t, u8, &'static [u8]>,
    pub(super) source: Table<'t, EntryKey, Fields>,
    pub(super) records: Table<'t, (u8, u64), &'static [u8]>,
    pub(super) logs: Table<'t, (u8, &'static str), (u32, u64)>,
    pub(super) index: Table<'t, (u8, &'static str, u64), u64>,
    pub(super) seen: Table<'t, (u8, u64, &'static [u8; 16]), ()>,
    pub(super) dead: Table<'t, EntryKey, (&'static [u8], Fields)>,
    pub(super) retrying: Table<'t, EntryKey, (&'static [u8], Fields)>,
    pub(super) due: Table<'t, DueKey, ()>,
    pub(super) retried: Table<'t, EntryKey, &'static [u8]>,
    pub(super) decisions: Table<'t, EntryKey, &'static [u8]>,
    pub(super) users: Table<'t, &'static str, &'static [u8]>,
    pub(super) device_cursors: Table<'t, &'static str, &'static [u8]>,
    pub(super) rollouts: Table<'t, &'static str, &'static [u8]>,
}

impl<'t> Tables<'t> {
    pub(super) fn open(transaction: &'t WriteTransaction) -> Result<Self, Failure> {
        Ok(Self {
            meta: transaction.open_table(META)?,
            source: transaction.open_table(SOURCE)?,
            records: transaction.open_table(RECORDS)?,
            logs: transaction.open_table(LOGS)?,
            index: transaction.open_table(INDEX)?,
            seen: transaction.open_table(SEEN)?,
            dead: transaction.open_table(DEAD)?,
            retrying: transaction.open_table(RETRYING)?,
            due: transaction.open_table(DUE)?,
            retried: transaction.open_table(RETRIED)?,
            decisions: transaction.open_table(DECISIONS)?,
            users: transaction.open_table(USERS)?,
            device_cursors: transaction.open_table(DEVICE_CURSORS)?,
            rollouts: transaction.open_table(ROLLOUTS)?,
        })
    }
}

/// The key of an entry, and of everything else that is ordered by entry id.
pub(super) fn entry_key(partition: u8, id: EntryId) -> EntryKey {
    (partition, id.ms, id.seq)
}

/// Copies the fields of an entry.
pub(super) fn owned(fields: &[(&[u8], &[u8])]) -> Vec<(Bytes, Bytes)> {
    fields
        .iter()
        .map(|(name, value)| (Bytes::copy_from_slice(name), Bytes::copy_from_slice(value)))
        .collect()
}

/// The smallest id above `id`.
pub(super) fn successor(id: EntryId) -> EntryId {
    match id.seq.checked_add(1) {
        Some(seq) => EntryId { ms: id.ms, seq },
        None => EntryId {
            ms: id.ms + 1,
            seq: 0,
        },
    }
}

/// The state of a partition. One JSON row, rewritten by every group that touches the partition.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Meta {
    /// The bits of the name of the current epoch.
    epoch: u16,
    /// Each epoch with the last id that was valid when it began, oldest first.
    epochs: Vec<(u16, NotificationId)>,
    /// The last complete notification.
    pub(super) last: NotificationId,
    /// The id of a plan that is being committed in slices.
    pub(super) pending: Option<NotificationId>,
    /// The position, split into two fields.
    entry: EntryId,
    slices: u32,
    /// Nothing at or above this id was ever removed because of its age. Never decreases.
    pub(super) floor: NotificationId,
    /// The floor when the partition was created.
    origin: NotificationId,
    /// The age at which notifications are removed; stored to detect a change.
    max_age_ms: u64,
    /// The number of entries ever appended, and of those with an outcome.
    pub(super) appended: u64,
    pub(super) settled: u64,
    pub(super) last_entry: EntryId,
    /// The start of the newest dedupe bucket, and the number of ids in each bucket.
    pub(super) bucket_ms: u64,
    pub(super) bucket_sizes: BTreeMap<u64, u32>,
    /// How many owners started at this position.
    pub(super) takeovers: u32,
    pub(super) taken_over_at: (EntryId, u32),
    /// The entry tried last, and how often.
    pub(super) attempts: Option<(EntryId, u32)>,
    pub(super) outcomes: BTreeMap<Outcome, u64>,
    pub(super) dead_letters: u64,
    /// Events that wait for a retry, and when the first of them is due.
    #[serde(default)]
    pub(super) retrying: u64,
    #[serde(default)]
    pub(super) next_due_ms: Option<u64>,
    /// Of the dead letters that stay and those that are retried.
    pub(super) last_dead_letter: EntryId,
    pub(super) dead_trimmed: u64,
    pub(super) dedupe_overflows: u64,
    pub(super) decisions: u64,
    /// Samples of (time in ms, position) covering the last `processed_entries_ttl`. Entries up to
    /// the newest sample of that age may be removed.
    pub(super) marks: VecDeque<(u64, EntryId)>,
}

impl Meta {
    fn new(now_ms: u64, retention: &Retention) -> Self {
        let epoch = rand::random::<u16>() & 0xfff;
        let origin = NotificationId::at_ms(now_ms);
        Self {
            epoch,
            epochs: vec![(epoch, NotificationId(0))],
            last: NotificationId(0),
            pending: None,
            entry: EntryId::default(),
            slices: 0,
            floor: origin,
            origin,
            max_age_ms: millis(retention.max_age),
            appended: 0,
            settled: 0,
            last_entry: EntryId::default(),
            bucket_ms: 0,
            bucket_sizes: BTreeMap::new(),
            takeovers: 0,
            taken_over_at: (EntryId::default(), 0),
            attempts: None,
            outcomes: BTreeMap::new(),
            dead_letters: 0,
            retrying: 0,
            next_due_ms: None,
            last_dead_letter: EntryId::default(),
            dead_trimmed: 0,
            dedupe_overflows: 0,
            decisions: 0,
            marks: VecDeque::new(),
        }
    }

    pub(super) fn epoch(&self) -> Epoch {
        Epoch::from_bits(self.epoch)
    }

    pub(super) fn position(&self) -> Position {
        Position {
            entry: self.entry,
            slices: self.slices,
        }
    }

    pub(super) fn set_position(&mut self, position: Position) {
        (self.entry, self.slices) = (position.entry, position.slices);
    }

    /// The newest id that a reader may encounter.
    pub(super) fn top(&self) -> NotificationId {
        self.pending.unwrap_or(self.last)
    }

    /// Logs may have lost entries below this id because of their age.
    ///
    /// The sweep removes entries strictly below the value it stores in `self.floor` in the same
    /// step, using the age configured at that time. One stored floor is therefore enough: unlike
    /// Redis keys with an expiry of their own, nothing written under an earlier `max_age`
    /// disappears by itself.
    pub(super) fn floor(&self, now_ms: u64) -> NotificationId {
        self.floor.max(NotificationId::at_ms(
            now_ms.saturating_sub(self.max_age_ms),
        ))
    }

    pub(super) fn origin(&self) -> NotificationId {
        self.origin
    }

    /// The number of entries without an outcome.
    pub(super) fn lag(&self) -> u64 {
        self.appended.saturating_sub(self.settled)
    }

    pub(super) fn head(&self, now_ms: u64) -> Head {
        Head {
            epoch: self.epoch(),
            epochs: self
                .epochs
                .iter()
                .map(|&(epoch, last_valid)| (Epoch::from_bits(epoch), last_valid))
                .collect(),
            last: self.last,
            pending: self.pending,
            position: self.position(),
            floor: self.floor(now_ms),
            origin: self.origin,
            now_ms,
        }
    }

    fn set_max_age(&mut self, now_ms: u64, max_age_ms: u64) {
        self.floor = self.floor(now_ms);
        self.max_age_ms = max_age_ms;
    }

    pub(super) fn write(
        &self,
        number: u8,
        table: &mut Table<'_, u8, &'static [u8]>,
    ) -> Result<(), Failure> {
        let row = serde_json::to_vec(self).expect("numbers, strings and lists of them are JSON");
        table.insert(number, row.as_slice())?;
        Ok(())
    }

    /// The row as a read transaction sees it.
    pub(super) fn read(number: u8, transaction: &ReadTransaction) -> Result<Self, Failure> {
        let table = transaction.open_table(META)?;
        Self::find(number, &table)?.ok_or_else(|| {
            Failure::damaged(format!("partition {number} has no row in the table 'meta'"))
        })
    }

    fn find(
        number: u8,
        table: &impl ReadableTable<u8, &'static [u8]>,
    ) -> Result<Option<Self>, Failure> {
        let Some(row) = table.get(number)? else {
            return Ok(None);
        };
        match serde_json::from_slice(row.value()) {
            Ok(meta) => Ok(Some(meta)),
            Err(error) => Err(Failure::damaged(format!(
                "the row of partition {number} in the table 'meta' cannot be read: {error}"
            ))),
        }
    }
}

/// Creates or checks the layout, assigns each source its partition number, and returns the
/// partitions by ascending number.
pub(super) fn prepare(
    transaction: &WriteTransaction,
    sources: &[String],
    retention: &Retention,
    now_ms: u64,
) -> anyhow::Result<Vec<(Partition, Meta)>> {
    let mut layout = transaction.open_table(LAYOUT)?;
    let version = layout.get("version")?.map(|version| version.value());
    match version {
        None | Some(OLDEST_VERSION..VERSION) => drop(layout.insert("version", VERSION)?),
        Some(VERSION) => {}
        Some(newer) if newer > VERSION => {
            bail!(
                "it was created by a newer pointsman (layout {newer}, this version supports {VERSION}); run that version or use another folder"
            )
        }
        Some(older) => bail!(
            "its layout {older} is not supported by this pointsman (layouts {OLDEST_VERSION} to {VERSION}); use another folder"
        ),
    }
    let mut numbers = transaction.open_table(PARTITIONS)?;
    let mut tables = Tables::open(transaction).map_err(Failure::into_text)?;
    let mut prepared: Vec<(Partition, Meta)> = Vec::new();
    for source in sources {
        ensure!(
            prepared
                .iter()
                .all(|(partition, _)| partition.source != *source),
            "the source '{source}' is listed twice; remove one of the two"
        );
        let given = numbers.get(source.as_str())?.map(|number| number.value());
        let number = match given {
            Some(number) => number,
            None => {
                // Rows are never removed, so the number of rows is the next number and no number is
                // assigned twice.
                let next = u8::try_from(numbers.len()?)
                    .ok()
                    .filter(|&next| next < PartitionNumber::MAX);
                let next = next.with_context(|| {
                    format!(
                        "'{source}' would be its 13th source, but a store can have at most {} over its lifetime; use another folder",
                        PartitionNumber::MAX
                    )
                })?;
                numbers.insert(source.as_str(), next)?;
                next
            }
        };
        let mut meta = match Meta::find(number, &tables.meta).map_err(Failure::into_text)? {
            Some(meta) => meta,
            None => Meta::new(now_ms, retention),
        };
        if meta.max_age_ms != millis(retention.max_age) {
            meta.set_max_age(now_ms, millis(retention.max_age));
        }
        meta.write(number, &mut tables.meta)
            .map_err(Failure::into_text)?;
        prepared.push((
            Partition {
                number: PartitionNumber(number),
                source: source.clone(),
            },
            meta,
        ));
    }
    prepared.sort_unstable_by_key(|(partition, _)| partition.number);
    Ok(prepared)
}
