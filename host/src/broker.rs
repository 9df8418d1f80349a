//! The broker interface: everything ingest and delivery need from a broker, in as few operations as
//! possible. Two brokers implement it and pass one conformance suite (`tests/conformance.rs`):
//! [`redis`] for many nodes, [`embedded`] for a single process.
//!
//! For each **partition**, a broker holds its *source* (a stream of entries), its *position* (the
//! last entry with an outcome), one *log* per [`Target`] (an index of notification ids), one
//! *record* per id, the dead letters and the decision records. It guarantees:
//!
//! - [`Broker::commit`] is atomic: the whole batch is written at exactly the position and epoch
//!   that it names, or nothing is.
//! - Notices on a [`Feed`] arrive in commit order, each after its commit is as durable as the
//!   broker can make it.
//! - Reads ([`Broker::head`], [`Broker::page`], [`Broker::records`]) see every commit whose notice
//!   was published before the read began.
//!
//! A broker does not decide who receives an event (`recipients`, `subscription`) and does not run
//! plugins (`pipeline`).

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::event::criteria::Attributes;
use crate::event::{
    DeadReason, Decision, EntryId, Epoch, Name, NotificationId, Outcome, PartitionNumber, Position,
    Recipient, Target,
};

pub mod embedded;
#[cfg(test)]
pub(crate) mod fake;
pub mod redis;

/// A partition of this installation.
#[derive(Clone, Debug)]
pub struct Partition {
    pub number: PartitionNumber,
    /// The key of its source, such as `pointsman:events`.
    pub source: String,
}

/// Limits and windows that every node of an installation must share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Retention {
    /// Notifications kept in the log of one user or group (1,000).
    pub log_entries: u32,
    /// Notifications kept in the log of all users (10,000).
    pub everyone_entries: u32,
    /// How long a notification is kept, in seconds (7 days; at least 10 minutes).
    pub max_age_s: u64,
    /// How long a source entry is kept after its outcome, in seconds (10 minutes), for operators to
    /// inspect. Ignored under memory pressure.
    pub keep_s: u64,
    /// The window in which a publisher's retry is recognised as a duplicate, in seconds (5
    /// minutes).
    pub dedupe_window_s: u64,
    /// Ids remembered per dedupe window (1,000,000). Beyond that, retries are no longer recognised;
    /// the ids that were not remembered are counted.
    pub dedupe_entries: u32,
    /// Dead letters kept (10,000). Trimmed dead letters are counted.
    pub dead_entries: u32,
    /// Decision records kept (100,000).
    pub decision_entries: u32,
    /// Unprocessed entries in a source at which `POST /v1/events` is rejected with 429 (1,000,000).
    pub backlog_entries: u64,
    /// How long a device cursor is kept after it last moved, in seconds (30 days). A read marker is
    /// kept for the age of notifications (`max_age_s`) plus 2 % if that is longer.
    pub device_cursor_ttl_s: u64,
    /// Acknowledged device cursors kept per user (32), and as many unacknowledged ones. Beyond
    /// that, the least recently moved cursor of the same kind is evicted.
    pub devices: u32,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            log_entries: 1_000,
            everyone_entries: 10_000,
            max_age_s: 7 * 24 * 3600,
            keep_s: 600,
            dedupe_window_s: 300,
            dedupe_entries: 1_000_000,
            dead_entries: 10_000,
            decision_entries: 100_000,
            backlog_entries: 1_000_000,
            device_cursor_ttl_s: 30 * 24 * 3600,
            devices: 32,
        }
    }
}

impl Retention {
    /// How long a device cursor or read marker is kept after it last moved, in milliseconds. A read
    /// marker is kept at least as long as any notification it can refer to.
    pub(crate) fn bookmark_age_ms(&self, which: &CursorOwner) -> u64 {
        let age_s = match which {
            CursorOwner::Device(_) => self.device_cursor_ttl_s,
            CursorOwner::ReadMarker => self
                .device_cursor_ttl_s
                .max(self.max_age_s.saturating_add(self.max_age_s / 50)),
        };
        age_s.saturating_mul(1000)
    }
}

/// Why a broker request failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The broker is unreachable, does not answer in time, is loading or is read-only. Callers
    /// wait: no event has failed. The request may or may not have taken effect, so a caller of
    /// `commit` reads the head again.
    #[error("the broker is unavailable: {0}")]
    Unavailable(String),
    /// The broker accepts no more entries: it is out of memory or disk space, or the backlog is at
    /// its limit.
    #[error("the broker is full: {0}")]
    Full(String),
    /// The broker rejected the request and will reject it again: missing permissions, or a key of
    /// the wrong type. The text names the fix.
    #[error("the broker refused the request: {0}")]
    Refused(String),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An entry of a source as it was written. Its fields are untrusted bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub id: EntryId,
    pub fields: Vec<(Bytes, Bytes)>,
}

/// The state of a partition, read atomically from the broker's primary, never from a replica.
#[derive(Clone, Debug)]
pub struct Head {
    pub epoch: Epoch,
    /// The newest 16 epochs of this partition, oldest first, each with the last id that was still
    /// valid when the epoch began.
    pub epochs: Vec<(Epoch, NotificationId)>,
    /// The id of the last complete notification.
    pub last: NotificationId,
    /// The id of a plan that is being committed in slices.
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

    /// The highest id that is still valid for a client whose last cursor was issued in epoch `epoch`.
    /// Ids above the last one that was valid when the following epoch began cannot be trusted,
    /// because they are issued again after a rewind. Returns 0 for an unknown epoch.
    pub fn survived(&self, epoch: Epoch) -> NotificationId {
        let bound = if epoch == self.epoch {
            // In the current epoch no client can have received an id above the top: a cursor that
            // claims one is forged.
            self.top()
        } else {
            match self.epochs.iter().position(|(known, _)| *known == epoch) {
                Some(index) => self
                    .epochs
                    .get(index + 1)
                    .map_or(self.top(), |(_, survived)| *survived),
                None => return NotificationId(0),
            }
        };
        // Readers of a quiet partition stand at the floor or the origin, and no id at or below them
        // is issued again.
        bound.max(self.floor).max(self.origin)
    }
}

/// One entry with its proposed outcome and everything that a commit writes about it.
#[derive(Clone, Debug)]
pub struct Item {
    pub entry: EntryId,
    /// Hash of the event's `source` and `id`, if the publisher gave an id.
    pub dedupe: Option<[u8; 16]>,
    pub proposal: Proposal,
    pub decision: Decision,
}

/// The outcome that the pipeline proposes. Only the broker can turn it into `duplicate`.
#[derive(Clone, Debug)]
pub enum Proposal {
    /// The record ([`crate::event::Notification`] as JSON) and the logs to index it in, sorted and
    /// without duplicates.
    Commit {
        record: Bytes,
        targets: Vec<Target>,
    },
    Discard,
    Unrouted,
    DeadLetter(DeadReason),
}

/// The result of a search for decisions by event id.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Found {
    /// Newest first, up to the requested limit: entry, outcome, notification id and decision.
    pub decisions: Vec<(EntryId, Outcome, Option<NotificationId>, Decision)>,
    /// The entry of the oldest decision that the search examined, for any event.
    pub reaches_to: Option<EntryId>,
}

/// Maximum number of items in one commit.
pub const MAX_ITEMS: usize = 64;
/// Maximum number of index entries in one commit. A plan with more targets is committed in slices.
pub const MAX_INDEX_ENTRIES: usize = 1_000;
/// Maximum size of all records in one commit, in bytes.
pub const MAX_COMMIT_BYTES: usize = 1024 * 1024;

/// A batch of outcomes, written atomically if the partition is still at `prev` in epoch `epoch`.
#[derive(Clone, Debug)]
pub struct Batch {
    pub epoch: Epoch,
    pub prev: Position,
    /// In source order and without gaps. The entry of the last item becomes the new position.
    pub items: Vec<Item>,
}

/// One slice of a plan with more than [`MAX_INDEX_ENTRIES`] targets.
#[derive(Clone, Debug)]
pub struct Slice {
    pub epoch: Epoch,
    pub prev: Position,
    /// A [`Proposal::Commit`] that names only the targets of this slice. The record holds the whole
    /// plan.
    pub item: Item,
    /// 0 for the first.
    pub index: u32,
    pub is_last: bool,
}

/// The result of a commit.
#[derive(Clone, Debug, PartialEq)]
pub enum Committed {
    /// The outcome of each item in order, with the notification id if the item was committed.
    Done(Vec<(Outcome, Option<NotificationId>)>),
    /// The partition is at another position or in another epoch; continue from [`Broker::head`].
    Conflict,
}

/// A range of a log.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// Ids above the requested one, ascending. Each comes with its predecessor in this log when it
    /// was written, or the floor at that time.
    pub entries: Vec<(NotificationId, NotificationId)>,
    /// Whether the log exists. Also `false` if everything above the requested id is older than the
    /// retention.
    pub is_present: bool,
    /// Whether no further entries follow.
    pub is_last: bool,
    /// The floor, read atomically with the entries.
    pub floor: NotificationId,
}

/// A message of the feed. The broker publishes them in commit order.
#[derive(Clone, Debug)]
pub enum Notice {
    /// `id` was appended to the log of `target`. Small records are included.
    Append {
        partition: PartitionNumber,
        target: Target,
        epoch: Epoch,
        id: NotificationId,
        record: Option<Bytes>,
    },
    /// All notices of this partition up to `last` precede this one.
    Tick {
        partition: PartitionNumber,
        epoch: Epoch,
        last: NotificationId,
    },
    /// The broker is up but cannot write. Counts as a sign of epoch and advances nothing.
    Alive { partition: PartitionNumber },
    /// Memberships or attributes of the user changed. Published in every partition before the
    /// change is acknowledged, so that in each partition it precedes the notices of later events.
    RecipientChanged {
        partition: PartitionNumber,
        user: Name,
    },
    /// The follow request with this token is in effect: all later appends are delivered.
    Following { token: u64 },
    /// The connection to the broker was lost and re-established, or notices were dropped. All
    /// earlier follow requests are void and must be repeated.
    Reset { partitions: Vec<PartitionNumber> },
}

/// A request to the feed.
#[derive(Clone, Debug)]
pub enum Follow {
    /// Deliver the appends to this log. Answered by [`Notice::Following`].
    Start {
        partition: PartitionNumber,
        target: Target,
        token: u64,
    },
    Stop {
        partition: PartitionNumber,
        target: Target,
    },
    /// No notice arrived for too long: drop the connection of this partition and open another one.
    /// Answered by [`Notice::Reset`].
    Reconnect { partition: PartitionNumber },
}

/// The notice connection of a node to the broker. Dropping it closes it. Ticks and recipient
/// changes of all partitions arrive without a follow request.
#[derive(Debug)]
pub struct Feed {
    /// Never blocks the hub. Unbounded, because the number of streams on the node bounds its
    /// length.
    pub follow: mpsc::UnboundedSender<Follow>,
    /// In batches, to save channel operations. Bounded: while it is full, the feed stops reading
    /// its socket, or drops notices and sends a [`Notice::Reset`].
    pub notices: mpsc::Receiver<Vec<Notice>>,
}

/// A change to a user's attributes or memberships.
#[derive(Clone, Debug)]
pub enum RecipientChange {
    Join {
        group: Name,
    },
    Leave {
        group: Name,
    },
    /// Replaces all attributes.
    Attributes(Attributes),
}

/// Identifies one of a user's stored cursors.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CursorOwner {
    /// The device cursor: the position of one of the user's devices.
    Device(Name),
    /// The read marker: the position up to which the user has read, on any device.
    ReadMarker,
}

/// A position in a user's notifications that outlives streams.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredCursor {
    /// The cursor in its client-visible form. A broker does not parse it: comparing two cursors
    /// requires the epochs of the partitions.
    pub cursor: String,
    /// `false` if the device never acknowledged this position; it is where the device's first
    /// stream began.
    pub is_acknowledged: bool,
}

/// A lease on processing a partition. It avoids duplicate work; it does not guard writes, which
/// compare the position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lease {
    Mine,
    /// Another node holds the lease for at most this long.
    Others(Duration),
}

/// A dead letter as it is listed.
#[derive(Clone, Debug, PartialEq)]
pub struct DeadLetter {
    /// The id of the dead letter itself, by which it is shown, redriven and dropped.
    pub id: EntryId,
    pub entry: EntryId,
    pub why: DeadReason,
}

/// Statistics of a partition for operators.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct PartitionState {
    /// Number of events by outcome since the partition was created.
    pub outcomes: BTreeMap<String, u64>,
    /// Entries after the position.
    pub lag: u64,
    /// Entries that another client of the broker removed before they were read.
    pub trimmed_unread: u64,
    pub dead_letters: u64,
    /// Dead letters trimmed because of their limit.
    pub dead_trimmed: u64,
    /// Ids not remembered because the dedupe window was full.
    pub dedupe_overflows: u64,
    /// How far notification ids run ahead of the broker's clock, in milliseconds.
    pub ids_ahead_ms: u64,
}

/// One result of a start-up check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The name of the check, one word, unique within a check.
    pub name: &'static str,
    pub severity: Severity,
    /// The problem and its fix, in one line.
    pub text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The node starts and stays ready.
    Warning,
    /// The node does not start, or becomes unready.
    Refusal,
}

/// See the head of this file. All methods are cancel-safe; a cancelled [`Broker::append`] or
/// [`Broker::commit`] may still take effect.
#[async_trait]
pub trait Broker: std::fmt::Debug + Send + Sync + 'static {
    /// The partitions, by ascending number.
    fn partitions(&self) -> &[Partition];

    /// Checks version, settings and permissions. An empty result means that everything is in order.
    async fn check(&self) -> Result<Vec<Finding>>;

    /// Appends entries to the source in order and returns once they are as durable as the broker
    /// can make them. If the backlog is at its limit, returns [`Error::Full`] and appends none.
    async fn append(
        &self,
        partition: PartitionNumber,
        entries: Vec<Vec<(Bytes, Bytes)>>,
    ) -> Result<Vec<EntryId>>;

    /// Reads up to `count` entries after `after`, waiting up to `wait` for the first one.
    async fn read(
        &self,
        partition: PartitionNumber,
        after: EntryId,
        count: usize,
        wait: Duration,
    ) -> Result<Vec<Entry>>;

    async fn head(&self, partition: PartitionNumber) -> Result<Head>;

    /// Writes a batch atomically. If the result is in doubt, the caller reads the head again.
    async fn commit(&self, partition: PartitionNumber, batch: Batch) -> Result<Committed>;

    /// Writes one slice of a large plan atomically. Slice 0 may find a duplicate or a key of the
    /// wrong type, which ends the plan with that outcome.
    async fn commit_slice(&self, partition: PartitionNumber, slice: Slice) -> Result<Committed>;

    /// Publishes a [`Notice::Tick`].
    async fn tick(&self, partition: PartitionNumber) -> Result<()>;

    /// Takes or renews the lease. A node whose earlier process held the lease under the same name
    /// gets it at once.
    async fn lease(&self, partition: PartitionNumber, node: &str, ttl: Duration) -> Result<Lease>;

    /// Releases the lease if this node holds it.
    async fn release(&self, partition: PartitionNumber, node: &str) -> Result<()>;

    /// Records that a new owner starts, and returns how many owners in a row started without moving
    /// the position, including this one.
    async fn take_over(&self, partition: PartitionNumber) -> Result<u32>;

    /// Records that an entry is about to be tried, and returns how many attempts were recorded,
    /// including this one.
    async fn note_attempt(&self, partition: PartitionNumber, entry: EntryId) -> Result<u32>;

    /// Reads up to `limit` ids of a log above `after`.
    async fn page(
        &self,
        partition: PartitionNumber,
        target: &Target,
        after: NotificationId,
        limit: usize,
    ) -> Result<Page>;

    /// Reads the records of these ids; `None` for a record that no longer exists.
    async fn records(
        &self,
        partition: PartitionNumber,
        ids: &[NotificationId],
    ) -> Result<Vec<Option<Bytes>>>;

    /// Opens a feed.
    async fn feed(&self) -> Result<Feed>;

    async fn recipient(&self, user: &Name) -> Result<Recipient>;

    /// Changes a user's attributes or memberships and notifies every node. The change applies to
    /// all events appended after it returns.
    async fn change_recipient(&self, user: &Name, change: RecipientChange) -> Result<()>;

    /// Reads a user's device cursors and read marker, without expired ones.
    async fn device_cursors(&self, user: &Name) -> Result<BTreeMap<CursorOwner, StoredCursor>>;

    /// Atomically moves a device cursor or read marker and restarts its expiry, if it still equals
    /// `seen` (`None`: it does not exist). Returns `false` if it does not. A device beyond
    /// [`Retention::devices`] evicts the least recently moved cursor of the same kind. Acknowledged
    /// and unacknowledged cursors are limited separately, so that merely opening streams cannot
    /// evict a device that acknowledged something.
    async fn move_device_cursor(
        &self,
        user: &Name,
        which: &CursorOwner,
        seen: Option<&StoredCursor>,
        to: &StoredCursor,
    ) -> Result<bool>;

    /// Reads up to `limit` dead letters after `after`, oldest first.
    async fn dead_letters(
        &self,
        partition: PartitionNumber,
        after: EntryId,
        limit: usize,
    ) -> Result<Vec<DeadLetter>>;

    /// Atomically appends the original fields to the source again and removes the dead letter.
    /// Returns `false` if it does not exist.
    async fn redrive(&self, partition: PartitionNumber, id: EntryId) -> Result<bool>;

    /// Removes a dead letter. Returns `false` if it does not exist.
    async fn drop_dead_letter(&self, partition: PartitionNumber, id: EntryId) -> Result<bool>;

    /// Reads up to `limit` decision records, newest first: entry, outcome, notification id and
    /// decision.
    async fn decisions(
        &self,
        partition: PartitionNumber,
        limit: usize,
    ) -> Result<Vec<(EntryId, Outcome, Option<NotificationId>, Decision)>>;

    /// Searches all decision records that are kept for those of the event with this id, or of the
    /// entry with this id.
    async fn find_decisions(
        &self,
        partition: PartitionNumber,
        event_id: &str,
        limit: usize,
    ) -> Result<Found>;

    async fn state(&self, partition: PartitionNumber) -> Result<PartitionState>;
}
