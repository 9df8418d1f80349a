//! A partition: its source, its head, its lease and its statistics.
//!
//! `commit` moves a partition; `feed` reports how it moved.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;

use crate::event::{EntryId, Epoch, NotificationId, Outcome, PartitionNumber, Position};

/// A partition of this installation.
#[derive(Clone, Debug)]
pub struct Partition {
    pub number: PartitionNumber,
    /// The key of its source, such as `pointsman:events`.
    pub source: String,
}

/// Maximum number of fields of an entry: the number that a script of Redis can pass to a command,
/// limited by Lua's `unpack`. An entry with more fields is read as [`Oversized`].
pub const MAX_ENTRY_FIELDS: usize = 3_900;

/// Size up to which the dead letter of an entry holds all its fields, in bytes of names and values.
pub const MAX_DEAD_LETTER_BYTES: usize = 4 * 1024 * 1024;

/// The part of an oversized entry that is read and kept, in bytes of names and values.
pub const EXCERPT_BYTES: usize = 1024;

/// An entry of a source as it was written. Its fields are untrusted bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub id: EntryId,
    pub fields: Vec<(Bytes, Bytes)>,
    /// Set if the entry exceeds [`super::Retention::max_event_bytes`] or [`MAX_ENTRY_FIELDS`]. Then
    /// `fields` holds only the first [`EXCERPT_BYTES`] of the entry, and the last field may be cut.
    pub oversized: Option<Oversized>,
}

/// The size of an entry that is not read as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Oversized {
    /// Bytes of all names and values.
    pub bytes: u64,
    /// Number of fields.
    pub fields: u64,
    /// Whether `bytes` is the exact size and not a lower bound.
    pub is_exact: bool,
}

impl Oversized {
    /// Whether a dead letter of the entry can hold all its fields.
    pub fn fits_dead_letter(self) -> bool {
        self.is_exact
            && self.bytes <= MAX_DEAD_LETTER_BYTES as u64
            && self.fields <= MAX_ENTRY_FIELDS as u64
    }
}

/// Returns the first [`EXCERPT_BYTES`] of an entry. The last field may be cut.
pub(super) fn excerpt<'a>(
    fields: impl IntoIterator<Item = (&'a [u8], &'a [u8])>,
) -> Vec<(Bytes, Bytes)> {
    let mut room = EXCERPT_BYTES;
    let mut cut = |text: &[u8]| {
        let kept = text.get(..room).unwrap_or(text);
        room -= kept.len();
        Bytes::copy_from_slice(kept)
    };
    let mut kept = Vec::new();
    // Empty fields take no room, so their number is bounded as well.
    for (name, value) in fields.into_iter().take(EXCERPT_BYTES / 16) {
        kept.push((cut(name), cut(value)));
    }
    kept.retain(|(name, value)| !name.is_empty() || !value.is_empty());
    kept
}

/// The state of a partition, read atomically from the broker's primary, never from a replica.
#[derive(Clone, Debug)]
pub struct Head {
    pub epoch: Epoch,
    /// The newest epochs of this partition, oldest first, each with the last id that was still
    /// valid when the epoch began: at least 16, and those that ended where they began in addition.
    pub epochs: Vec<(Epoch, NotificationId)>,
    /// The id of the last complete notification.
    pub last: NotificationId,
    /// The id of a plan that is being committed in slices; the last one if it has several.
    pub pending: Option<NotificationId>,
    pub position: Position,
    /// Logs may have lost entries below this id because of their age.
    pub floor: NotificationId,
    /// The `floor` when the partition was created. A cursor without a position in this partition
    /// starts here.
    pub origin: NotificationId,
    /// The broker's clock, in milliseconds since the Unix epoch.
    pub now_ms: u64,
}

impl Head {
    /// The newest id that a reader may encounter.
    pub fn top(&self) -> NotificationId {
        self.pending.unwrap_or(self.last)
    }

    /// The start of a reader that wants only events committed from now on. Never below the floor,
    /// so that a quiet partition does not look trimmed.
    pub fn latest(&self) -> NotificationId {
        self.last.max(self.floor)
    }

    /// The id up to which a reader of the whole history has everything. Not the top: a plan that is
    /// being written in slices is not complete, and its notices are still to come. Otherwise not
    /// below the floor: later ids lie above it, and a reader that stood below it could not tell a
    /// log that was never written to from one that expired.
    pub fn complete(&self) -> NotificationId {
        match self.pending {
            Some(_) => self.last,
            None => self.latest(),
        }
    }

    /// The highest id that is still valid for a client whose last cursor was issued in epoch
    /// `epoch`. Ids above the last one that was valid when the following epoch began cannot be
    /// trusted, because they are issued again after a rewind. Returns 0 for an unknown epoch.
    pub fn last_valid_id(&self, epoch: Epoch) -> NotificationId {
        let bound = if epoch == self.epoch {
            // In the current epoch no client can have received an id above the top: a cursor that
            // claims one is forged.
            self.top()
        } else {
            match self.epochs.iter().position(|(known, _)| *known == epoch) {
                Some(index) => self
                    .epochs
                    .get(index + 1)
                    .map_or(self.top(), |(_, last_valid)| *last_valid),
                None => return NotificationId(0),
            }
        };
        // Readers of a quiet partition stand at the floor or the origin, and no id at or below them
        // is issued again.
        bound.max(self.floor).max(self.origin)
    }
}

/// A lease on processing a partition. It avoids duplicate work; it does not guard writes, which
/// compare the position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lease {
    Mine,
    /// Another node holds the lease for at most this long.
    Others(Duration),
}

/// Statistics of a partition for operators.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct PartitionState {
    /// Number of events by outcome since the partition was created.
    pub outcomes: BTreeMap<Outcome, u64>,
    /// The last entry with an outcome, and the slices of the next one.
    #[serde(skip)]
    pub position: Position,
    /// Entries after the position.
    pub lag: u64,
    /// Entries that another client of the broker removed before they were read.
    pub trimmed_unread: u64,
    pub dead_letters: u64,
    /// Events that wait for a retry; not included in `dead_letters`.
    pub retrying: u64,
    /// Dead letters trimmed because of their limit.
    pub dead_trimmed: u64,
    /// Ids not remembered because the dedupe window was full.
    pub dedupe_overflows: u64,
    /// How far notification ids run ahead of the broker's clock, in milliseconds.
    pub ids_ahead_ms: u64,
    /// Whether the id of the newest processed entry is not a time of day.
    #[serde(skip)]
    pub has_foreign_ids: bool,
    /// Entries that neither Pointsman nor another consumer group needs, of a source that is not
    /// trimmed.
    #[serde(skip)]
    pub unneeded: u64,
}
