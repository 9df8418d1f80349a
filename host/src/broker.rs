//! The broker interface: everything ingest and delivery need from a broker, in as few operations as
//! possible. Two brokers implement it and pass one conformance suite (`tests/conformance.rs`):
//! [`redis`] for many nodes, [`embedded`] for a single process.
//!
//! The interface is split by caller: [`Sources`] for publishing and ingest, [`Logs`] for delivery,
//! [`Users`] and [`Operations`]. Each includes [`Partitions`], and [`Broker`] is their sum.
//! [`Channels`], for bridges, is separate, because only Redis has channels.
//!
//! For each **partition**, a broker holds its *source* (a stream of entries), its *position* (the
//! last entry with an outcome), one *log* per [`Target`] (an index of notification ids), one
//! *record* per id, the dead letters and the decision records. It guarantees:
//!
//! - [`Sources::commit`] is atomic: the whole batch is written at exactly the position and epoch
//!   that it names, or nothing is.
//! - Notices on a [`Feed`] arrive in commit order, each after its commit is as durable as the
//!   broker can make it.
//! - Reads ([`Partitions::head`], [`Logs::page`], [`Partitions::records`]) see every commit whose
//!   notice was published before the read began.
//!
//! A broker does not decide who receives an event (`recipients`, `subscription`) and does not run
//! plugins (`pipeline`).

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use crate::event::{
    ChainMembers, EntryId, Name, NotificationId, PartitionNumber, Recipient, Target,
};

mod channels;
mod clock;
mod commit;
pub mod embedded;
#[cfg(test)]
pub(crate) mod fake;
mod feed;
mod operations;
mod partition;
mod peers;
pub mod redis;
mod retention;
mod rollouts;
mod user;

pub use channels::{
    BridgeAccess, Channel, ChannelMessage, Channels, HeardAppend, ListenerLease, ListenerSession,
    Subscription,
};
pub use commit::{
    Batch, CommitResult, Item, MAX_COMMIT_BYTES, MAX_INDEX_ENTRIES, MAX_ITEMS, NewNotification,
    Proposal, RetryPolicy, Slice,
};
pub use feed::{Feed, Follow, Notice, Page};
pub use operations::{DeadLetter, DecisionSearch, Finding, Severity, StoredDecision};
pub use partition::{
    EXCERPT_BYTES, Entry, Head, Lease, MAX_DEAD_LETTER_BYTES, MAX_ENTRY_FIELDS, Oversized,
    Partition, PartitionState,
};
pub use peers::{Advertised, MAX_PEERS, NodeAddress, Peer, REGISTERED_FOR};
pub use retention::Retention;
pub use rollouts::{
    MAX_REPORT_BYTES, MAX_REPORTS, MAX_ROLLOUT_BYTES, PluginVersion, REPORTED_FOR, Rollout,
    StoredReport, WantedVersions,
};
pub use user::{CursorOwner, GroupLimit, RecipientChange, RecipientLimits, StoredCursor};

/// Why a broker request failed.
#[derive(Clone, Debug, thiserror::Error)]
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
    /// The broker rejected the request and will reject it again: missing permissions, a key of the
    /// wrong type, or a request that is not valid. The text names the fix.
    #[error("the broker refused the request: {0}")]
    Permanent(String),
    /// A user's memberships are at a limit, which allows `most` groups. Nothing has changed.
    #[error("{}; {}", .limit.reason(*.most), .limit.fix())]
    TooManyGroups { limit: GroupLimit, most: u32 },
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Access to partitions that every caller needs. All methods of the six traits are cancel-safe; a
/// cancelled [`Sources::append`] or [`Sources::commit`] may still take effect.
#[async_trait]
pub trait Partitions: std::fmt::Debug + Send + Sync + 'static {
    /// The partitions, by ascending number.
    fn partitions(&self) -> &[Partition];

    /// The broker's clock, in milliseconds since the Unix epoch. It decides when an event expires;
    /// the node's own clock never does.
    fn now_ms(&self) -> u64;

    async fn head(&self, partition: PartitionNumber) -> Result<Head>;

    /// Reads the records of these ids; `None` for a record that no longer exists.
    async fn records(
        &self,
        partition: PartitionNumber,
        ids: &[NotificationId],
    ) -> Result<Vec<Option<Bytes>>>;
}

/// Sources, for publishing and ingest.
#[async_trait]
pub trait Sources: Partitions {
    /// Appends entries to the source in order and returns once they are as durable as the broker
    /// can make them. If the backlog is at its limit, returns [`Error::Full`] and appends none.
    async fn append(
        &self,
        partition: PartitionNumber,
        entries: Vec<Vec<(Bytes, Bytes)>>,
    ) -> Result<Vec<EntryId>>;

    /// Reads up to `count` entries after `after`, waiting up to `wait` for the first one. Returns
    /// fewer entries if they are large. Of an entry above [`Retention::max_event_bytes`] only the
    /// beginning is transferred: see [`Entry::oversized`].
    async fn read(
        &self,
        partition: PartitionNumber,
        after: EntryId,
        count: usize,
        wait: Duration,
    ) -> Result<Vec<Entry>>;

    /// Takes or renews the lease. A node whose earlier process held the lease under the same name
    /// gets it at once.
    ///
    /// If the node has the lease, this also appends events whose retry is due to the source again,
    /// each in one step with the removal of its dead letter. Not more at once than the broker can do
    /// in a few milliseconds; the others follow with the next call. Neither the backlog limit nor a
    /// shortage of space holds them back.
    async fn lease(&self, partition: PartitionNumber, node: &str, ttl: Duration) -> Result<Lease>;

    /// Releases the lease if this node holds it.
    async fn release(&self, partition: PartitionNumber, node: &str) -> Result<()>;

    /// Records that a new owner starts, and returns how many owners in a row started without moving
    /// the position, including this one.
    async fn take_over(&self, partition: PartitionNumber) -> Result<u32>;

    /// Records that an entry is about to be tried, and returns how many attempts were recorded,
    /// including this one.
    async fn note_attempt(&self, partition: PartitionNumber, entry: EntryId) -> Result<u32>;

    /// Writes a batch atomically. If the result is in doubt, the caller reads the head again.
    async fn commit(&self, partition: PartitionNumber, batch: Batch) -> Result<CommitResult>;

    /// Writes one slice of a large plan atomically. Slice 0 may find a duplicate or a key of the
    /// wrong type, which ends the plan with that outcome.
    async fn commit_slice(&self, partition: PartitionNumber, slice: Slice) -> Result<CommitResult>;
}

/// Logs, for delivery.
#[async_trait]
pub trait Logs: Partitions {
    /// Reads up to `limit` ids of each log above its id, in the order of `logs`. Each page is
    /// consistent in itself; different pages may be of different moments.
    async fn pages(
        &self,
        partition: PartitionNumber,
        logs: &[(Target, NotificationId)],
        limit: usize,
    ) -> Result<Vec<Page>>;

    /// Reads up to `limit` ids of a log above `after`.
    async fn page(
        &self,
        partition: PartitionNumber,
        target: &Target,
        after: NotificationId,
        limit: usize,
    ) -> Result<Page> {
        let log = [(target.clone(), after)];
        let pages = self.pages(partition, &log, limit).await?;
        pages
            .into_iter()
            .next()
            .ok_or_else(|| Error::Permanent("no page was read; report the bug".into()))
    }

    /// Opens a feed.
    async fn feed(&self) -> Result<Feed>;

    /// Publishes a [`Notice::Tick`].
    async fn tick(&self, partition: PartitionNumber) -> Result<()>;

    async fn recipient(&self, user: &Name) -> Result<Recipient>;
}

/// The data of users.
#[async_trait]
pub trait Users: Partitions {
    /// Changes a user's attributes or memberships and notifies every node. The change applies to
    /// all events appended after it returns. To join a group that the user is a member of changes
    /// nothing and is never refused; neither is leaving.
    ///
    /// # Errors
    /// [`Error::TooManyGroups`] if the user is a member of
    /// [`Retention::max_groups_per_user`] groups, or left as many within
    /// [`Retention::max_age`] and would join another one.
    async fn change_recipient(&self, user: &Name, change: RecipientChange) -> Result<()>;

    /// Reads a user's device cursors and read marker, without expired ones.
    async fn device_cursors(&self, user: &Name) -> Result<BTreeMap<CursorOwner, StoredCursor>>;

    /// Atomically moves a device cursor or read marker and restarts its expiry, if it still equals
    /// `seen` (`None`: it does not exist). Returns `false` if it does not. A device beyond
    /// [`Retention::max_devices_per_user`] evicts the least recently moved cursor of the same kind.
    /// Acknowledged and unacknowledged cursors are limited separately, so that merely opening
    /// streams cannot evict a device that acknowledged something.
    async fn move_device_cursor(
        &self,
        user: &Name,
        which: &CursorOwner,
        seen: Option<&StoredCursor>,
        to: &StoredCursor,
    ) -> Result<bool>;

    /// Stores a ticket, for every node, until it is taken or `ttl` has passed.
    async fn store_ticket(&self, id: &str, ticket: Bytes, ttl: Duration) -> Result<()>;

    /// Returns and removes a ticket in one step, so that only one caller gets it. `None`: it does
    /// not exist.
    async fn take_ticket(&self, id: &str) -> Result<Option<Bytes>>;
}

/// Checks, statistics, dead letters and decision records, for operators.
#[async_trait]
pub trait Operations: Partitions {
    /// Checks version, settings and permissions. An empty result means that everything is in order.
    async fn check(&self) -> Result<Vec<Finding>>;

    /// Registers this node for [`REGISTERED_FOR`] and returns the other nodes that are registered,
    /// at most [`MAX_PEERS`]. A broker of a single process has no others.
    async fn register_node(&self, name: &str, at: &Advertised) -> Result<Vec<Peer>>;

    async fn state(&self, partition: PartitionNumber) -> Result<PartitionState>;

    /// Reads up to `limit` dead letters after `after`, oldest first, without those of events that
    /// wait for a retry.
    async fn dead_letters(
        &self,
        partition: PartitionNumber,
        after: EntryId,
        limit: usize,
    ) -> Result<Vec<DeadLetter>>;

    /// Like [`Operations::dead_letters`], without the fields of the entries.
    async fn dead_letter_headers(
        &self,
        partition: PartitionNumber,
        after: EntryId,
        limit: usize,
    ) -> Result<Vec<DeadLetter>>;

    /// Reads up to `limit` dead letters after `after`, oldest first, of events that wait for a
    /// retry. At most [`Retention::dead_letter_entries`] wait. No id is also that of a dead letter
    /// that stays.
    async fn retrying(
        &self,
        partition: PartitionNumber,
        after: EntryId,
        limit: usize,
    ) -> Result<Vec<DeadLetter>>;

    /// Atomically appends the original fields to the source again and removes the dead letter,
    /// also of an event that waits for a retry. Its earlier attempts no longer count. Returns
    /// `false` if it does not exist.
    async fn redrive(&self, partition: PartitionNumber, id: EntryId) -> Result<bool>;

    /// Removes a dead letter, also of an event that waits for a retry. Returns `false` if it does
    /// not exist.
    async fn drop_dead_letter(&self, partition: PartitionNumber, id: EntryId) -> Result<bool>;

    /// Reads up to `limit` decision records, newest first.
    async fn decisions(
        &self,
        partition: PartitionNumber,
        limit: usize,
    ) -> Result<Vec<StoredDecision>>;

    /// Searches all decision records that are kept for those of the event with this id, or of the
    /// entry with this id.
    async fn find_decisions(
        &self,
        partition: PartitionNumber,
        event_id: &str,
        limit: usize,
    ) -> Result<DecisionSearch>;

    /// Searches the decision records that are kept, newest first, for one that lists the members of
    /// the chain with this id.
    async fn find_chain(
        &self,
        partition: PartitionNumber,
        id: &str,
    ) -> Result<Option<ChainMembers>>;
}

/// Roll-outs of plugins, for all nodes.
#[async_trait]
pub trait Rollouts: Partitions {
    /// The roll-outs of these plugins. Reads nothing else, so that other writers cannot make the
    /// answer large.
    async fn rollouts(&self, plugins: &[Name]) -> Result<WantedVersions>;

    /// Writes the roll-out of a plugin, or removes it. Returns the revision of the write.
    async fn set_rollout(&self, plugin: &Name, rollout: Option<&Rollout>) -> Result<u64>;

    /// As [`Rollouts::set_rollout`], if the present roll-out is still `before`: another node may
    /// have changed or ended it since it was read. `None`: it is another one, and nothing is written.
    async fn replace_rollout(
        &self,
        plugin: &Name,
        before: &Rollout,
        rollout: Option<&Rollout>,
    ) -> Result<Option<u64>>;

    /// Publishes the report of a node, JSON of at most [`MAX_REPORT_BYTES`], for [`REPORTED_FOR`].
    /// Returns whether the node is registered ([`Operations::register_node`]), and so among those
    /// that [`Rollouts::node_reports`] lists.
    async fn report_node(&self, node: &str, report: Bytes) -> Result<bool>;

    /// The live nodes by name, at most [`MAX_REPORTS`], with their reports.
    async fn node_reports(&self) -> Result<Vec<StoredReport>>;
}

/// A whole broker. A caller takes the smallest of its traits that suffices: ingest takes
/// [`Sources`] and cannot open a feed, and the hub takes [`Logs`] and cannot commit.
pub trait Broker: Sources + Logs + Users + Operations + Rollouts {}

impl<T: Sources + Logs + Users + Operations + Rollouts> Broker for T {}
