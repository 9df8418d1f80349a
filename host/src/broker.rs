//! What ingest and delivery need from a broker, in the fewest operations. Two brokers keep these promises and pass one conformance
//! suite (`tests/conformance.rs`): [`redis`] for many nodes, [`embedded`] for one process.
//!
//! A broker holds, for each **partition**: its *source* (a stream of entries), its *position* (the last entry with an outcome), one *log*
//! for each [`Target`] (an index of notification ids), one *record* for each id, the dead letters and the decision records. It promises:
//!
//! - [`Broker::commit`] is one step: either all of it happened, at exactly the position and life that it names, or nothing.
//! - What it publishes on its [`Feed`] is published in the order of commits, after they are durable as far as the broker can make them.
//! - Reads ([`Broker::head`], [`Broker::page`], [`Broker::records`]) see every commit whose notice was published before the read began.
//!
//! It never decides who receives what (`recipients`, `subscription`) and never runs a plugin (`pipeline`).

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::event::criteria::Attributes;
use crate::event::{EntryId, Life, Name, NotificationId, Outcome, Position, Target};

pub mod embedded;
#[cfg(test)]
pub(crate) mod fake;
pub mod redis;

/// The number of a partition: 0 to 11, its own, never reused. A cursor names partitions by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PartitionNumber(pub u8);

impl PartitionNumber {
    /// The most numbers that can ever be given out; a cursor keeps a bit for each.
    pub const MAX: u8 = 12;
}

/// A partition of this installation.
#[derive(Clone, Debug)]
pub struct Partition {
    pub number: PartitionNumber,
    /// The key of its source, such as `pointsman:events`.
    pub source: String,
}

/// Bounds and windows that every node of an installation must share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Retention {
    /// Notifications kept in the log of a user or group (1,000).
    pub log_entries: u32,
    /// Notifications kept in the log of everyone (10,000).
    pub everyone_entries: u32,
    /// Seconds that a notification is kept (7 days, at least 10 minutes).
    pub max_age_s: u64,
    /// Seconds that a source entry is kept after its outcome, for operators (10 minutes); given up under memory pressure.
    pub keep_s: u64,
    /// Seconds within which a publisher's retry is recognised (5 minutes).
    pub dedupe_window_s: u64,
    /// Ids remembered in a window of that length (1,000,000); beyond it retries are no longer recognised, and counted.
    pub dedupe_entries: u32,
    /// Dead letters kept (10,000); what is trimmed is counted.
    pub dead_entries: u32,
    /// Decision records kept (100,000).
    pub decision_entries: u32,
    /// Entries waiting in a source above which `POST /v1/events` is refused with 429 (1,000,000).
    pub backlog_entries: u64,
    /// Seconds that a bookmark is kept after it was last moved (30 days); a read mark for `max_age_s` if that is longer.
    pub bookmark_age_s: u64,
    /// Devices of a user whose acknowledged bookmarks are kept (32), and as many that only began; one more takes the place of the one of its
    /// kind that was left alone for longest.
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
            bookmark_age_s: 30 * 24 * 3600,
            devices: 32,
        }
    }
}

impl Retention {
    /// How long a bookmark is kept after it was last moved, in milliseconds. A read mark lasts as long as anything that it could speak of.
    pub(crate) fn bookmark_age_ms(&self, which: &BookmarkOf) -> u64 {
        let age_s = match which {
            BookmarkOf::Device(_) => self.bookmark_age_s,
            BookmarkOf::ReadMark => self
                .bookmark_age_s
                .max(self.max_age_s.saturating_add(self.max_age_s / 50)),
        };
        age_s.saturating_mul(1000)
    }
}

/// Why a broker did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be reached, does not answer in time, is loading or read-only. A wait: nobody's event has failed. What was asked may or
    /// may not have happened; whoever asked for a commit reads the head again.
    #[error("the broker is away: {0}")]
    Away(String),
    /// It refuses more entries for want of memory or disk, or because the backlog is at its bound.
    #[error("the broker is full: {0}")]
    Full(String),
    /// It says no and will say so again: missing rights, a key of a foreign type. The text names the fix.
    #[error("the broker refuses: {0}")]
    Refused(String),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An entry of a source, as it was written: fields are bytes from outside.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub id: EntryId,
    pub fields: Vec<(Bytes, Bytes)>,
}

/// The state of a partition, read in one step from the broker that decides (never from a replica).
#[derive(Clone, Debug)]
pub struct Head {
    pub life: Life,
    /// The lives of this partition with the last id that survived when each began, oldest first, 16 newest.
    pub lives: Vec<(Life, NotificationId)>,
    /// The id of the last complete notification.
    pub last: NotificationId,
    /// The id of a plan that is being written in slices.
    pub pending: Option<NotificationId>,
    pub position: Position,
    /// Below this id, logs may have lost entries to age.
    pub floor: NotificationId,
    /// The `floor` when the partition was made: a cursor from before the partition starts here.
    pub origin: NotificationId,
    /// The broker's clock, in milliseconds since the Unix epoch.
    pub now_ms: u64,
}

impl Head {
    /// The newest id that a reader may meet.
    pub fn top(&self) -> NotificationId {
        self.pending.unwrap_or(self.last)
    }

    /// Where a reader begins who wants what is committed from now on: at the floor if nothing newer is there, so that a quiet partition does
    /// not look trimmed.
    pub fn latest(&self) -> NotificationId {
        self.last.max(self.floor)
    }

    /// The highest id that still stands of those that somebody can have had who was last told in this life: nothing above the last id
    /// that survived into the life that followed it can be trusted, because ids are issued again after a rewind.
    pub fn survived(&self, life: Life) -> NotificationId {
        let bound = if life == self.life {
            // In the present life nobody can have had what is not there; a client that says so made it up.
            self.top()
        } else {
            match self.lives.iter().position(|(known, _)| *known == life) {
                Some(index) => self
                    .lives
                    .get(index + 1)
                    .map_or(self.top(), |(_, survived)| *survived),
                None => return NotificationId(0),
            }
        };
        // Where readers of a quiet partition stand; nothing is issued there again.
        bound.max(self.floor).max(self.origin)
    }
}

/// What is to become of one entry, with everything that a commit writes about it.
#[derive(Clone, Debug)]
pub struct Item {
    pub entry: EntryId,
    /// Hash of the event's `source` and `id`, if the publisher gave an id.
    pub dedupe: Option<[u8; 16]>,
    pub proposal: Proposal,
    pub decision: Decision,
}

/// The outcome that the pipeline proposes; only the broker can say `duplicate`.
#[derive(Clone, Debug)]
pub enum Proposal {
    /// The record ([`crate::event::Notification`] as JSON) and the logs to index it in, sorted and without repeats.
    Commit {
        record: Bytes,
        targets: Vec<Target>,
    },
    Discard,
    Unrouted,
    DeadLetter(DeadReason),
}

/// Why an entry is dead-lettered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeadReason {
    pub reason: String,
    /// The plugin at fault, if one was.
    pub plugin: Option<String>,
    /// How often the entry was tried.
    pub attempts: u32,
    /// The entry's fields as they were.
    #[serde(skip)]
    pub fields: Vec<(Bytes, Bytes)>,
}

/// The record of a decision: why the event became what it became.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// CloudEvents `id`, `source` and `type`; each empty where it could not be read.
    pub event_id: String,
    pub event_source: String,
    pub event_type: String,
    /// In the order in which the plugins ran.
    pub verdicts: Vec<Verdict>,
    /// Why it was dead-lettered, whoever said so: also where no plugin was asked. Empty for every other outcome.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// The clock that plugins were shown, in milliseconds since the Unix epoch.
    pub clock_ms: u64,
}

/// What one plugin answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    pub plugin: String,
    /// Each node numbers its own, from 1 at its start.
    pub generation: u64,
    /// The first 12 digits of the SHA-256 of the generation's file, which are the same on every node; empty where an earlier version wrote the record.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub hash: String,
    /// `keep`, `amend`, `drop`, `routes`, `none`, `skipped` (its types do not match), `rejected` and `retry` (it says so itself), or `failed`.
    pub verdict: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

impl Decision {
    /// Whether it is about the event with this id, or the entry with it: what cannot be read as an event has no other.
    pub fn is_about(&self, entry: EntryId, event_id: &str) -> bool {
        self.event_id == event_id || event_id.parse().is_ok_and(|id: EntryId| id == entry)
    }
}

/// What is known of an event by its id.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Found {
    /// Newest first, up to as many as were asked for: entry, outcome, notification id and decision.
    pub decisions: Vec<(EntryId, Outcome, Option<NotificationId>, Decision)>,
    /// The entry of the oldest decision that was looked at, whatever event it is about.
    pub reaches_to: Option<EntryId>,
}

/// At most this many items in one commit.
pub const MAX_ITEMS: usize = 64;
/// At most this many index entries in one commit; a plan with more targets is committed in slices.
pub const MAX_INDEX_ENTRIES: usize = 1_000;
/// At most this many bytes of records in one commit.
pub const MAX_COMMIT_BYTES: usize = 1024 * 1024;

/// A batch of outcomes, to be written in one step if the partition is still at `prev` in `life`.
#[derive(Clone, Debug)]
pub struct Batch {
    pub life: Life,
    pub prev: Position,
    /// In the order of the source, none missing; the last one's entry is the next position.
    pub items: Vec<Item>,
}

/// One slice of a plan with more than [`MAX_INDEX_ENTRIES`] targets.
#[derive(Clone, Debug)]
pub struct Slice {
    pub life: Life,
    pub prev: Position,
    /// With a [`Proposal::Commit`] that names the targets of this slice only; the record holds the whole plan.
    pub item: Item,
    /// 0 for the first.
    pub index: u32,
    pub is_last: bool,
}

/// What a commit did.
#[derive(Clone, Debug, PartialEq)]
pub enum Committed {
    /// The outcome of each item, in order, with the id of what was committed.
    Done(Vec<(Outcome, Option<NotificationId>)>),
    /// The partition was elsewhere: continue from what [`Broker::head`] says.
    Refused,
}

/// A stretch of a log.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// Ids above the one asked for, ascending, each with the id before it in this log when it was written (or the floor then).
    pub entries: Vec<(NotificationId, NotificationId)>,
    /// Whether the log exists at all. `false`, too, where all that lies above the id asked for is too old to be kept.
    pub is_present: bool,
    /// Nothing follows.
    pub is_last: bool,
    /// The floor, read in the same step.
    pub floor: NotificationId,
}

/// What the feed says, in the order in which the broker published it.
#[derive(Clone, Debug)]
pub enum Notice {
    /// `id` was appended to the log of `target`. Small records come along.
    Append {
        partition: PartitionNumber,
        target: Target,
        life: Life,
        id: NotificationId,
        record: Option<Bytes>,
    },
    /// All notices of this partition up to `last` came before this one.
    Tick {
        partition: PartitionNumber,
        life: Life,
        last: NotificationId,
    },
    /// The broker lives but cannot write: counts as a sign of life, moves nothing.
    Alive { partition: PartitionNumber },
    /// Memberships or attributes of the user changed. Published in every partition before the change is acknowledged, so that in each
    /// it comes before the notices of later events.
    RecipientChanged {
        partition: PartitionNumber,
        user: Name,
    },
    /// The follow request with this token is in force: later appends will be heard.
    Following { token: u64 },
    /// The connection to the broker was lost and made again, or notices were dropped. Every follow request before it is void and must be made again.
    Reset { partitions: Vec<PartitionNumber> },
}

/// A request to the feed.
#[derive(Clone, Debug)]
pub enum Follow {
    /// Hear the appends to this log; answered by [`Notice::Following`].
    Start {
        partition: PartitionNumber,
        target: Target,
        token: u64,
    },
    Stop {
        partition: PartitionNumber,
        target: Target,
    },
    /// Notices stayed away too long: drop the connection of this partition and make another; answered by [`Notice::Reset`].
    Reconnect { partition: PartitionNumber },
}

/// A node's ear at the broker. Dropping it ends it. Ticks and recipient changes of all partitions come unasked.
#[derive(Debug)]
pub struct Feed {
    /// Unbounded, as its length is bounded by the streams on the node; never blocks the hub.
    pub follow: mpsc::UnboundedSender<Follow>,
    /// In batches, to spare hand-overs. Bounded: when full, the feed stops reading its socket, or drops and sends a [`Notice::Reset`].
    pub notices: mpsc::Receiver<Vec<Notice>>,
}

/// A user's membership of a group, in one partition: ids, not times, because ids are what logs are ordered by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// The member sees ids above this one ...
    pub joined: NotificationId,
    /// ... up to and with this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left: Option<NotificationId>,
}

/// What is known of a user.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Recipient {
    pub attributes: Attributes,
    /// By group, then by partition.
    pub groups: BTreeMap<Name, BTreeMap<PartitionNumber, Span>>,
}

/// A change to what is known of a user.
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

/// Which of a user's bookmarks.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BookmarkOf {
    /// How far one of the user's devices is.
    Device(Name),
    /// Up to where the user has read, on whatever device.
    ReadMark,
}

/// A place in a user's notifications that outlives streams.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bookmark {
    /// As clients have it. A broker does not read it: which of two is further, only who knows the lives of partitions can say.
    pub cursor: String,
    /// `false`: nobody has said so; it is where the device's first stream began.
    pub is_acknowledged: bool,
}

/// A lease on the work of a partition: it spares wasted work and guards no write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lease {
    Mine,
    /// Held by another node for at most so long.
    Others(Duration),
}

/// A dead letter, as it is listed.
#[derive(Clone, Debug, PartialEq)]
pub struct DeadLetter {
    /// Its own id, by which it is shown, redriven and dropped.
    pub id: EntryId,
    pub entry: EntryId,
    pub why: DeadReason,
}

/// Numbers of a partition for operators.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct PartitionState {
    /// Events by outcome word, since the partition was made.
    pub outcomes: BTreeMap<String, u64>,
    /// Entries beyond the position.
    pub lag: u64,
    /// Entries that somebody else removed before they were read.
    pub lost_upstream: u64,
    pub dead_letters: u64,
    /// Dead letters trimmed by their bound.
    pub dead_trimmed: u64,
    /// Ids not remembered because the window was full.
    pub dedupe_overflows: u64,
    /// Milliseconds by which ids run ahead of the broker's clock.
    pub ids_ahead_ms: u64,
}

/// One line of a start-up check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was checked, in a word: no two of one check have the same.
    pub name: &'static str,
    pub severity: Severity,
    /// What is wrong and how to mend it, in one line.
    pub text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The node starts; readiness stays green.
    Warning,
    /// The node does not start, or turns unready.
    Refusal,
}

/// See the head of this file. All methods are cancel-safe; a cancelled [`Broker::append`] or [`Broker::commit`] may still happen.
#[async_trait]
pub trait Broker: std::fmt::Debug + Send + Sync + 'static {
    /// The partitions, by ascending number.
    fn partitions(&self) -> &[Partition];

    /// Looks at version, settings and rights; empty is well.
    async fn check(&self) -> Result<Vec<Finding>>;

    /// Appends entries to the source, in order, and answers when the broker has them as durably as it can. A source at its backlog
    /// bound answers [`Error::Full`] and takes none.
    async fn append(
        &self,
        partition: PartitionNumber,
        entries: Vec<Vec<(Bytes, Bytes)>>,
    ) -> Result<Vec<EntryId>>;

    /// Reads up to `count` entries after `after`, waiting up to `wait` for the first.
    async fn read(
        &self,
        partition: PartitionNumber,
        after: EntryId,
        count: usize,
        wait: Duration,
    ) -> Result<Vec<Entry>>;

    async fn head(&self, partition: PartitionNumber) -> Result<Head>;

    /// Writes a batch in one step. Any doubt about what became of it ends with reading the head again.
    async fn commit(&self, partition: PartitionNumber, batch: Batch) -> Result<Committed>;

    /// Writes one slice of a large plan in one step. Slice 0 may find a duplicate, or a foreign type, and then ends the plan with that outcome.
    async fn commit_slice(&self, partition: PartitionNumber, slice: Slice) -> Result<Committed>;

    /// Publishes a [`Notice::Tick`].
    async fn tick(&self, partition: PartitionNumber) -> Result<()>;

    /// Takes or renews the lease. A node that holds it under its own name from an earlier process has it at once.
    async fn lease(&self, partition: PartitionNumber, node: &str, ttl: Duration) -> Result<Lease>;

    /// Gives the lease back, if it is this node's.
    async fn release(&self, partition: PartitionNumber, node: &str) -> Result<()>;

    /// Says that a new owner begins, and answers how many began in a row without moving the position, this one included.
    async fn take_over(&self, partition: PartitionNumber) -> Result<u32>;

    /// Notes that an entry is about to be tried, and answers how often it was noted, this time included.
    async fn note_attempt(&self, partition: PartitionNumber, entry: EntryId) -> Result<u32>;

    /// Up to `limit` ids of a log above `after`.
    async fn page(
        &self,
        partition: PartitionNumber,
        target: &Target,
        after: NotificationId,
        limit: usize,
    ) -> Result<Page>;

    /// The records of these ids, `None` where one is gone.
    async fn records(
        &self,
        partition: PartitionNumber,
        ids: &[NotificationId],
    ) -> Result<Vec<Option<Bytes>>>;

    /// Opens a feed.
    async fn feed(&self) -> Result<Feed>;

    async fn recipient(&self, user: &Name) -> Result<Recipient>;

    /// Changes what is known of a user and tells every node; events appended after it returned are judged by it.
    async fn change_recipient(&self, user: &Name, change: RecipientChange) -> Result<()>;

    /// A user's bookmarks, without those that were left alone for longer than they are kept.
    async fn bookmarks(&self, user: &Name) -> Result<BTreeMap<BookmarkOf, Bookmark>>;

    /// Puts a bookmark elsewhere and keeps it anew, if it still is what was seen of it (`None`: nothing), in one step. `false`: it is not.
    /// One device more than [`Retention::devices`] takes the place of the one of its kind, acknowledged or only begun, whose bookmark was left
    /// alone for longest: who merely opens streams pushes out no device that acknowledged anything.
    async fn move_bookmark(
        &self,
        user: &Name,
        which: &BookmarkOf,
        seen: Option<&Bookmark>,
        to: &Bookmark,
    ) -> Result<bool>;

    /// Up to `limit` dead letters after `after`, oldest first.
    async fn dead_letters(
        &self,
        partition: PartitionNumber,
        after: EntryId,
        limit: usize,
    ) -> Result<Vec<DeadLetter>>;

    /// Appends the original fields to the source again and removes the dead letter, in one step. `false`: it is not there.
    async fn redrive(&self, partition: PartitionNumber, id: EntryId) -> Result<bool>;

    /// Removes a dead letter. `false`: it is not there.
    async fn drop_dead_letter(&self, partition: PartitionNumber, id: EntryId) -> Result<bool>;

    /// Up to `limit` decision records, newest first: entry, outcome, notification id and decision.
    async fn decisions(
        &self,
        partition: PartitionNumber,
        limit: usize,
    ) -> Result<Vec<(EntryId, Outcome, Option<NotificationId>, Decision)>>;

    /// The decision records of the event with this id, or of the entry with it, in all that are kept.
    async fn find_decisions(
        &self,
        partition: PartitionNumber,
        event_id: &str,
        limit: usize,
    ) -> Result<Found>;

    async fn state(&self, partition: PartitionNumber) -> Result<PartitionState>;
}
