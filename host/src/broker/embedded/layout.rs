//! The tables of the store, what a partition's row holds, and how both are made and checked when the store is opened.
//!
//! This is the layout, all of it: a change here that an older pointsman would misread raises [`VERSION`]. What is written into the
//! tables, and when, is `commit`, `source`, `recipients`, `bookmarks` and `sweep`.

use std::collections::{BTreeMap, VecDeque};

use anyhow::{Context as _, bail, ensure};
use redb::{
    ReadTransaction, ReadableTable, ReadableTableMetadata as _, Table, TableDefinition,
    WriteTransaction,
};
use serde::{Deserialize, Serialize};

use super::store::Failure;
use crate::broker::{Head, Partition, PartitionNumber, Retention};
use crate::event::{EntryId, Life, NotificationId, Position};

/// The version of this layout. A store with a higher one is refused.
pub(super) const VERSION: u64 = 1;

/// The fields of an entry.
pub(super) type Fields = Vec<(&'static [u8], &'static [u8])>;
/// Partition number, and the two halves of an [`EntryId`].
pub(super) type EntryKey = (u8, u64, u64);

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
pub(super) const DECISIONS: TableDefinition<'_, EntryKey, &[u8]> =
    TableDefinition::new("decisions");
pub(super) const USERS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("users");
pub(super) const BOOKMARKS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("bookmarks");

/// The tables that requests write, opened once for each group.
pub(super) struct Tables<'t> {
    pub(super) meta: Table<'t, u8, &'static [u8]>,
    pub(super) source: Table<'t, EntryKey, Fields>,
    pub(super) records: Table<'t, (u8, u64), &'static [u8]>,
    pub(super) logs: Table<'t, (u8, &'static str), (u32, u64)>,
    pub(super) index: Table<'t, (u8, &'static str, u64), u64>,
    pub(super) seen: Table<'t, (u8, u64, &'static [u8; 16]), ()>,
    pub(super) dead: Table<'t, EntryKey, (&'static [u8], Fields)>,
    pub(super) decisions: Table<'t, EntryKey, &'static [u8]>,
    pub(super) users: Table<'t, &'static str, &'static [u8]>,
    pub(super) bookmarks: Table<'t, &'static str, &'static [u8]>,
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
            decisions: transaction.open_table(DECISIONS)?,
            users: transaction.open_table(USERS)?,
            bookmarks: transaction.open_table(BOOKMARKS)?,
        })
    }
}

/// The key of an entry, and of what else is ordered as entries are.
pub(super) fn entry_key(partition: u8, id: EntryId) -> EntryKey {
    (partition, id.ms, id.seq)
}

/// The least id above `id`.
pub(super) fn successor(id: EntryId) -> EntryId {
    match id.seq.checked_add(1) {
        Some(seq) => EntryId { ms: id.ms, seq },
        None => EntryId {
            ms: id.ms + 1,
            seq: 0,
        },
    }
}

/// What is known of a partition as a whole. One row, JSON, rewritten by every group that touches the partition.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Meta {
    /// The bits of the present life's name.
    life: u16,
    /// Each life with the last id that survived when it began, oldest first.
    lives: Vec<(u16, NotificationId)>,
    /// The last complete notification.
    pub(super) last: NotificationId,
    /// A plan that is being sliced.
    pub(super) pending: Option<NotificationId>,
    /// The position, in two fields.
    entry: EntryId,
    slices: u32,
    /// Nothing at or above this id was ever removed for its age. Never falls.
    pub(super) floor: NotificationId,
    /// The floor when the partition was made.
    origin: NotificationId,
    /// The age at which notifications are removed, so that a change of it is noticed.
    max_age_ms: u64,
    /// Entries ever appended, and those of them that have an outcome.
    pub(super) appended: u64,
    pub(super) settled: u64,
    pub(super) last_entry: EntryId,
    /// The start of the newest dedupe bucket, and how many ids each bucket holds.
    pub(super) bucket_ms: u64,
    pub(super) bucket_sizes: BTreeMap<u64, u32>,
    /// How many owners began at this position.
    pub(super) takeovers: u32,
    pub(super) taken_over_at: (EntryId, u32),
    /// The entry tried last, and how often.
    pub(super) attempts: Option<(EntryId, u32)>,
    pub(super) outcomes: BTreeMap<String, u64>,
    pub(super) dead_letters: u64,
    pub(super) last_dead_letter: EntryId,
    pub(super) dead_trimmed: u64,
    pub(super) dedupe_overflows: u64,
    pub(super) decisions: u64,
    /// Where the position was at some moments (ms) of the last `keep_s`: entries up to the newest mark that old may go.
    pub(super) marks: VecDeque<(u64, EntryId)>,
}

impl Meta {
    fn new(now_ms: u64, retention: &Retention) -> Self {
        let life = rand::random::<u16>() & 0xfff;
        let origin = NotificationId::at_ms(now_ms);
        Self {
            life,
            lives: vec![(life, NotificationId(0))],
            last: NotificationId(0),
            pending: None,
            entry: EntryId::default(),
            slices: 0,
            floor: origin,
            origin,
            max_age_ms: retention.max_age_s.saturating_mul(1000),
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
            last_dead_letter: EntryId::default(),
            dead_trimmed: 0,
            dedupe_overflows: 0,
            decisions: 0,
            marks: VecDeque::new(),
        }
    }

    pub(super) fn life(&self) -> Life {
        Life::from_bits(self.life)
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

    /// The newest id that a reader may meet.
    pub(super) fn top(&self) -> NotificationId {
        self.pending.unwrap_or(self.last)
    }

    /// Below this id, logs may have lost entries to age.
    ///
    /// The sweep removes strictly below what it writes to `self.floor` in the same step, at the age that is configured then. So one
    /// stored floor is enough here: unlike keys with an expiry of their own, nothing written under an earlier `max_age` goes by itself.
    pub(super) fn floor(&self, now_ms: u64) -> NotificationId {
        self.floor.max(NotificationId::at_ms(
            now_ms.saturating_sub(self.max_age_ms),
        ))
    }

    pub(super) fn origin(&self) -> NotificationId {
        self.origin
    }

    /// Entries without an outcome.
    pub(super) fn lag(&self) -> u64 {
        self.appended.saturating_sub(self.settled)
    }

    pub(super) fn head(&self, now_ms: u64) -> Head {
        Head {
            life: self.life(),
            lives: self
                .lives
                .iter()
                .map(|&(life, survived)| (Life::from_bits(life), survived))
                .collect(),
            last: self.last,
            pending: self.pending,
            position: self.position(),
            floor: self.floor(now_ms),
            origin: self.origin,
            now_ms,
        }
    }

    fn set_max_age(&mut self, now_ms: u64, max_age_s: u64) {
        self.floor = self.floor(now_ms);
        self.max_age_ms = max_age_s.saturating_mul(1000);
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

/// Makes or checks the layout, gives each source its partition number, and answers the partitions by ascending number.
pub(super) fn prepare(
    transaction: &WriteTransaction,
    sources: &[String],
    retention: &Retention,
    now_ms: u64,
) -> anyhow::Result<Vec<(Partition, Meta)>> {
    let mut layout = transaction.open_table(LAYOUT)?;
    let version = layout.get("version")?.map(|version| version.value());
    match version {
        None => drop(layout.insert("version", VERSION)?),
        Some(VERSION) => {}
        Some(newer) if newer > VERSION => {
            bail!(
                "it was made by a newer pointsman (layout {newer}, this one knows {VERSION}): start that one, or give another folder"
            )
        }
        Some(older) => bail!(
            "its layout {older} is not known to this pointsman (layout {VERSION}): give another folder"
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
            "the source '{source}' is named twice"
        );
        let given = numbers.get(source.as_str())?.map(|number| number.value());
        let number = match given {
            Some(number) => number,
            None => {
                // Rows are never removed, so their count is the next number, and no number is given twice.
                let next = u8::try_from(numbers.len()?)
                    .ok()
                    .filter(|&next| next < PartitionNumber::MAX);
                let next = next.with_context(|| {
                    format!(
                        "'{source}' would be its 13th source; {} is the most that a store can ever have: give another folder",
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
        if meta.max_age_ms != retention.max_age_s.saturating_mul(1000) {
            meta.set_max_age(now_ms, retention.max_age_s);
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
