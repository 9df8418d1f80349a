//! A commit: a batch of outcomes, or one slice of a large plan, and the limits of both.
//!
//! The brokers implement commits; `ingest` proposes the outcomes.

use std::time::Duration;

use bytes::Bytes;

use super::partition::Oversized;
use crate::event::{
    DeadReason, Decision, EntryId, Epoch, NotificationId, Outcome, Position, Target,
};

/// Maximum number of items in one commit.
pub const MAX_ITEMS: usize = 64;
/// Maximum number of index entries in one commit. A plan with more targets is committed in slices.
pub const MAX_INDEX_ENTRIES: usize = 1_000;
/// Maximum size of all records in one commit, in bytes.
pub const MAX_COMMIT_BYTES: usize = 1024 * 1024;

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
    /// The notifications of the event, at least one: one for each slot of its routes. Their ids
    /// follow each other.
    Commit(Vec<NewNotification>),
    Discard,
    Unrouted,
    DeadLetter(DeadReason),
    /// A dead letter of an entry that was not read as a whole; the reason holds its beginning. The
    /// broker copies all fields from the source if [`Oversized::fits_dead_letter`] and the entry
    /// still exists.
    OversizedEntry {
        why: DeadReason,
        size: Oversized,
    },
    /// A plugin requested a retry: the event waits for it, or becomes a dead letter if its retries
    /// are used up or too many events wait.
    Retry(DeadReason, RetryPolicy),
}

impl Proposal {
    /// Commits a single notification.
    pub fn commit(record: Bytes, targets: Vec<Target>) -> Self {
        Self::Commit(vec![NewNotification { record, targets }])
    }
}

/// A notification that a commit writes.
#[derive(Clone, Debug)]
pub struct NewNotification {
    /// A [`crate::event::Notification`] as JSON.
    pub record: Bytes,
    /// The logs to index it in, sorted and without duplicates. In a slice, those that the slice
    /// covers, possibly none.
    pub targets: Vec<Target>,
}

/// How often and how long an event is tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// The most retries of one event. The first is due after 1 s, and each later one after twice
    /// the time of the one before.
    pub retries: u32,
    /// The most time from the first attempt to the last retry.
    pub timeout: Duration,
}

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
    /// A [`Proposal::Commit`] with every notification of the event, but only the targets of this
    /// slice. The records hold the whole plan.
    pub item: Item,
    /// 0 for the first.
    pub index: u32,
    pub is_last: bool,
}

/// The result of a commit.
#[derive(Clone, Debug, PartialEq)]
pub enum CommitResult {
    /// The outcome of each item in order, with the id of its first notification if the item was
    /// committed.
    Done(Vec<(Outcome, Option<NotificationId>)>),
    /// The partition is at another position or in another epoch; continue from
    /// [`super::Partitions::head`].
    Conflict,
}
