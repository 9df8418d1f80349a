//! The state of one open stream: history first, then live, each notification once and in order.
//! Bounded.
//!
//! It does no I/O: [`replay`] reads the broker for it, the hub feeds it and `sse` drains it. It
//! knows neither HTTP nor access rights (see `auth`).
//!
//! In each partition a subscription is in one of two states, *replay* and *live*, with one
//! transition: any disturbance (connect, lost feed, missing tick, full buffer, fail-over, joining
//! or leaving a group, changed attributes) sends it back to replay from its low-water mark through
//! [`Subscription::enter_replay`].
//!
//! Each partition has these marks, all of them notification ids:
//! - `low_water`: everything up to this id was sent or rejected by evaluation. The cursor carries
//!   it.
//! - `seen`: the highest id handled, at or above `low_water`. Notifications between the two wait in
//!   the queues.
//! - *sent ahead*: at most three ids above `low_water` that were sent before lower ones.
//!
//! `partition` is the state of one partition, `queue` orders what waits for the socket,
//! `ahead_queue` holds what leaves before lower ids, and `evaluator` chooses the route.

use std::sync::Arc;

use crate::broker::Head;
use crate::delivery::recipients::{Reader, RouteMatch};
use crate::event::criteria::Pool;
use crate::event::{Epoch, Name, NotificationId, PartitionNumber, Priority, Recipient, Target};

mod ahead_queue;
mod buffer_budget;
pub mod cursor;
mod evaluator;
mod gaps;
mod partition;
mod queue;
mod record;
pub mod replay;
mod start;
mod stream;

pub use buffer_budget::BufferBudget;
pub use gaps::{Gap, GapReason};
pub use record::{Record, Rendered};
pub use start::{Filter, Start};
pub use stream::OpenStream;

use ahead_queue::AheadQueue;
use buffer_budget::BufferShare;
use cursor::{Cursor, Position};
use evaluator::Evaluator;
use gaps::Gaps;
use partition::{BufferedNotice, PartitionState};
use queue::{PriorityQueue, QueuedNotification};

/// Replay takes no more notifications of a partition while this many wait. Four times as many live
/// notices send the partition back to replay. Small in unit tests, whose random histories are too
/// short to fill more.
pub const WINDOW: usize = if cfg!(test) { 4 } else { 64 };
const MAX_LIVE: usize = 4 * WINDOW;
/// The same bound in bytes of records, summed over all partitions.
const MAX_BYTES: usize = 1024 * 1024;

/// The next item to write.
#[derive(Debug)]
pub enum Next {
    Notification {
        partition: PartitionNumber,
        id: NotificationId,
        record: Arc<Record>,
        route_match: RouteMatch,
    },
    Gap(Gap),
    /// The cursor without a notification, so that a client that received nothing can resume.
    Cursor,
}

/// See the module documentation.
#[derive(Debug)]
pub struct Subscription {
    evaluator: Evaluator,
    start: Start,
    partitions: Vec<PartitionState>,
    /// The part of the client's cursor that names partitions of other nodes: where a source is
    /// added or removed node by node, the client may return to one that has it.
    elsewhere: Cursor,
    queue: PriorityQueue,
    ahead: AheadQueue,
    gaps: Gaps,
    is_cursor_due: bool,
    share: BufferShare,
}

/// The room that a replay may fill.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    pub n_records: usize,
    pub n_bytes: usize,
}

impl Subscription {
    /// Returns a subscription that is in replay in every partition and waits for its first
    /// [`Subscription::begin`].
    pub fn new(
        reader: impl Into<Reader>,
        start: Start,
        filter: Filter,
        partitions: impl IntoIterator<Item = PartitionNumber>,
    ) -> Self {
        let cursor = match &start {
            Start::Cursor(cursor) => Some(cursor),
            _ => None,
        };
        let position = |number| {
            let positions = &cursor?.positions;
            positions
                .iter()
                .find(|position| position.partition == number)
                .map(|position| (position.epoch, position.low_water))
        };
        let partitions: Vec<PartitionState> = partitions
            .into_iter()
            .map(|number| PartitionState::new(number, position(number)))
            .collect();
        let is_here = |number| partitions.iter().any(|at| at.number == number);
        let mut elsewhere = cursor.cloned().unwrap_or_default();
        elsewhere.positions.retain(|at| !is_here(at.partition));
        elsewhere.sent_ahead.retain(|sent| !is_here(sent.partition));
        let sent_ahead = cursor
            .into_iter()
            .flat_map(|cursor| cursor.sent_ahead.iter().copied())
            .filter(|sent| is_here(sent.partition));
        let ahead = AheadQueue::new(sent_ahead);
        Self {
            evaluator: Evaluator::new(reader.into(), filter),
            partitions,
            elsewhere,
            start,
            queue: PriorityQueue::default(),
            ahead,
            gaps: Gaps::default(),
            is_cursor_due: true,
            share: BufferBudget::unlimited().share(),
        }
    }

    /// Counts what the subscription holds against this budget.
    #[must_use]
    pub fn within(mut self, budget: &BufferBudget) -> Self {
        self.share = budget.share();
        self
    }

    /// The bytes of the records that it holds.
    pub fn n_bytes(&self) -> usize {
        let of_partitions = self.partitions.iter().map(PartitionState::n_buffered_bytes);
        self.queue.n_bytes() + self.ahead.n_bytes() + of_partitions.sum::<usize>()
    }

    /// The bytes that it frees when it returns to replay, or 0 if it holds too little to matter.
    pub fn n_reclaimable_bytes(&self) -> usize {
        let of_partitions = self.partitions.iter().map(PartitionState::n_buffered);
        // The replay would read a single notification again at once.
        if self.queue.len() + of_partitions.sum::<usize>() > 1 {
            self.n_bytes()
        } else {
            0
        }
    }

    /// Counts what it holds now.
    pub(super) fn settle_buffers(&mut self) {
        self.share.settle(self.n_bytes());
    }

    /// Whether the budget lets it hold one more live notice.
    fn may_hold(&self) -> bool {
        self.n_bytes() <= self.share.live_limit()
    }

    pub fn user(&self) -> &Name {
        self.evaluator.user()
    }

    /// Whether every partition is live and nothing is queued.
    pub fn is_idle(&self) -> bool {
        self.is_live() && self.queue.is_empty() && self.ahead.is_empty() && self.gaps.is_empty()
    }

    /// Whether every partition is live.
    pub fn is_live(&self) -> bool {
        self.partitions.iter().all(PartitionState::is_live)
    }

    /// Whether [`Subscription::next`] would return an item now.
    pub fn is_ready(&self) -> bool {
        let has_next = self.is_cursor_due
            || !self.gaps.is_empty()
            || !self.queue.is_empty()
            || !self.ahead.is_empty();
        has_next && self.has_begun()
    }

    /// Requests that a cursor be sent.
    pub fn request_cursor(&mut self) {
        self.is_cursor_due = true;
    }

    /// Records that a read of the recipient is about to start. Returns the ticket to pass with the
    /// result.
    pub fn begin_recipient_read(&mut self) -> u64 {
        self.evaluator.begin_read()
    }

    /// Replaces the known recipient unless a later read was stored first: partitions replay
    /// concurrently.
    pub fn set_recipient(&mut self, ticket: u64, known: Arc<Recipient>, pool: &Pool) {
        let partitions = self.partitions.iter().map(|partition| partition.number);
        self.evaluator
            .set_recipient(ticket, known, partitions, pool);
    }

    /// The logs to read in a partition, each with the id after which to start.
    pub fn logs(&self, partition: PartitionNumber) -> Vec<(Target, NotificationId)> {
        self.evaluator.logs(partition, self.at(partition).low_water)
    }

    /// Returns to replay from the low-water mark. Returns the round that the replay must present.
    pub fn enter_replay(&mut self, partition: PartitionNumber) -> u64 {
        self.ahead.clear(partition);
        self.enter(partition, false)
    }

    /// Like `enter_replay`, but for lack of room. The notices received so far are complete, so
    /// urgent notifications need not wait for the replay to reach them.
    fn overflow(&mut self, partition: PartitionNumber, knew_urgent: bool) -> u64 {
        // Taken before `enter` empties the queues.
        let urgent = self.queue.urgent(partition);
        let all_fit = self.ahead.put_first(partition, urgent);
        self.enter(partition, knew_urgent && all_fit)
    }

    fn enter(&mut self, partition: PartitionNumber, knows_urgent: bool) -> u64 {
        self.queue.retain(|queued| queued.partition != partition);
        self.at_mut(partition).enter_replay(knows_urgent)
    }

    /// The user's memberships or attributes in this partition are out of date: nothing is evaluated
    /// until they are read again.
    pub fn recipient_changed(&mut self, partition: PartitionNumber) -> u64 {
        self.evaluator.require_new_read();
        self.enter_replay(partition)
    }

    pub fn round(&self, partition: PartitionNumber) -> u64 {
        self.at(partition).round
    }

    /// The epoch of the partition that the subscription is in. `None`: it has not begun.
    pub fn epoch(&self, partition: PartitionNumber) -> Option<Epoch> {
        self.at(partition).epoch
    }

    /// Whether the partition is live in another epoch than this one and would therefore ignore
    /// notices of this one.
    pub fn is_live_in_other_epoch(&self, partition: PartitionNumber, epoch: Epoch) -> bool {
        let at = self.at(partition);
        at.is_live() && at.epoch != Some(epoch)
    }

    /// Begins a replay from `head`: positions a new subscription and detects epoch changes.
    pub fn begin(&mut self, partition: PartitionNumber, head: &Head) {
        let at = self.index(partition);
        if self.partitions[at].epoch.is_none() {
            self.set_start(at, head);
        }
        self.enter_epoch(at, head);
        let at = &mut self.partitions[at];
        at.seen = at.low_water;
        // Position 0 is that of a client that has received nothing and requested the earliest, now
        // or before it resumed. No other client stands there: the origin is above it.
        if at.low_water == NotificationId(0) && at.expects_nothing_to == NotificationId(0) {
            at.expects_nothing_to = NotificationId::MAX;
        }
    }

    /// Sets the start of a new subscription in a partition.
    fn set_start(&mut self, at: usize, head: &Head) {
        let number = self.partitions[at].number;
        let (epoch, low_water) = match &self.start {
            // Added since the cursor was written: start at its beginning.
            Start::Cursor(_) => (head.epoch, head.origin),
            Start::Latest | Start::Unknown => (head.epoch, head.latest()),
            Start::Earliest => (head.epoch, NotificationId(0)),
            // Nothing precedes the partition's origin, so starting there misses nothing.
            Start::Since(ms) => (
                head.epoch,
                NotificationId::at_ms(*ms).min(head.top()).max(head.origin),
            ),
        };
        self.partitions[at].epoch = Some(epoch);
        self.partitions[at].low_water = low_water;
        if self.start == Start::Unknown {
            self.announce(Gap {
                partition: number,
                reason: GapReason::Unknown,
                from: NotificationId(0),
                to: low_water,
            });
        }
    }

    /// Enters the epoch of `head`. If another one ended, ids that did not survive it count as not
    /// sent. See [`Head::last_valid_id`].
    fn enter_epoch(&mut self, at: usize, head: &Head) {
        let PartitionState {
            number,
            epoch: before,
            low_water,
            ..
        } = self.partitions[at];
        let highest = self
            .ahead
            .highest_sent(number)
            .unwrap_or_default()
            .max(low_water);
        let bound = before.map_or(NotificationId(0), |epoch| head.last_valid_id(epoch));
        if highest > bound {
            // The broker does not know this epoch, so the client starts over. Any history trimmed
            // up to here is part of this gap.
            let to = if bound == NotificationId(0) {
                let to = highest.max(head.floor);
                self.partitions[at].expects_nothing_to = to;
                to
            } else {
                highest
            };
            self.announce(Gap {
                partition: number,
                reason: GapReason::Rewound,
                from: bound,
                to,
            });
            self.ahead.forget_above(number, bound);
        }
        if before != Some(head.epoch) {
            // Queued urgent notifications belong to the ended epoch. The replay reaches those that
            // survived.
            self.ahead.clear(number);
            self.partitions[at].forget_urgent();
        }
        let at = &mut self.partitions[at];
        at.low_water = low_water.min(bound);
        at.epoch = Some(head.epoch);
    }

    /// Announces a gap ahead of everything queued. It moves no mark: records of the stretch that
    /// still exist are sent after it.
    pub fn announce(&mut self, mut gap: Gap) {
        let at = self.at_mut(gap.partition);
        if gap.reason == GapReason::Trimmed {
            gap.from = gap.from.max(at.expects_nothing_to);
            if gap.to <= gap.from {
                return;
            }
        }
        at.has_gap = true;
        self.gaps.push(gap);
    }

    /// The ids that the cursor lists as sent ahead and whose records have not been read since.
    pub fn unread_sent_ahead(&self, partition: PartitionNumber) -> Vec<NotificationId> {
        self.ahead.unread(partition)
    }

    /// Provides the record of an id that the cursor lists as sent ahead; `None` if it is gone.
    pub fn set_sent_ahead(
        &mut self,
        partition: PartitionNumber,
        id: NotificationId,
        record: Option<&Record>,
    ) {
        self.ahead.set_record(partition, id, record);
    }

    /// Handles one notification: skips, rejects or queues it. Ids of a partition must arrive in
    /// ascending order. `now_ms`: the broker's time, here and below.
    pub fn handle(
        &mut self,
        partition: PartitionNumber,
        id: NotificationId,
        record: &Arc<Record>,
        now_ms: u64,
    ) {
        let at = self.at_mut(partition);
        if id <= at.seen {
            return;
        }
        at.seen = id;
        self.requeue_up_to(partition, NotificationId(id.0 - 1));
        self.ahead.remove(partition, id);
        if let Some(route_match) = self.evaluator.evaluate(partition, id, record, now_ms) {
            self.queue(QueuedNotification {
                partition,
                id,
                record: Arc::clone(record),
                route_match,
            });
        }
        self.advance(partition);
    }

    /// Queues a notification unless a later one superseded it or it was already sent ahead.
    fn queue(&mut self, queued: QueuedNotification) {
        let (partition, id) = (queued.partition, queued.id);
        if let Some(key) = queued.state() {
            let is_same_state = |other: &QueuedNotification| {
                other.partition == partition && other.state() == Some(key)
            };
            if self.ahead.supersedes(partition, id, key)
                || self
                    .queue
                    .any(|newer| newer.id > id && is_same_state(newer))
            {
                return;
            }
            // The later state supersedes the earlier one even if the later one has been sent
            // already.
            self.queue.retain(|older| !is_same_state(older));
        }
        if !self.ahead.was_sent(partition, id) {
            self.queue.push(queued);
        }
    }

    /// History up to `id` has been read. Notifications in `ahead` that were not met there, because
    /// their log was trimmed meanwhile, move to the queues; otherwise later ones would overtake
    /// them.
    fn requeue_up_to(&mut self, partition: PartitionNumber, id: NotificationId) {
        while let Some(queued) = self.ahead.pop_up_to(partition, id) {
            self.queue(queued);
        }
    }

    /// Handles a notification appended while the stream is open. Returns the round of the replay to
    /// begin if there was no room.
    pub fn on_append(
        &mut self,
        partition: PartitionNumber,
        epoch: Epoch,
        id: NotificationId,
        record: &Arc<Record>,
        now_ms: u64,
    ) -> Option<u64> {
        let at = self.index(partition);
        if !self.partitions[at].is_live() {
            self.on_append_in_replay(partition, epoch, id, record, now_ms);
            return None;
        }
        if self.partitions[at].epoch != Some(epoch) || id <= self.partitions[at].seen {
            return None;
        }
        if self.queue.n_bytes() <= MAX_BYTES
            && self.queue.n_of(partition) < MAX_LIVE
            && self.may_hold()
        {
            self.handle(partition, id, record, now_ms);
            return None;
        }
        let round = self.overflow(partition, true);
        // After the partition has entered replay, so that this notification waits in its buffer.
        self.on_append_in_replay(partition, epoch, id, record, now_ms);
        Some(round)
    }

    /// Buffers a notification until the end of the replay. An urgent one may be sent ahead instead,
    /// unless another urgent one may still have to precede it. `seen` is not moved, so that the
    /// replay continues below it.
    fn on_append_in_replay(
        &mut self,
        partition: PartitionNumber,
        epoch: Epoch,
        id: NotificationId,
        record: &Arc<Record>,
        now_ms: u64,
    ) {
        let at = self.index(partition);
        let is_next = self.partitions[at].epoch == Some(epoch) && id > self.partitions[at].seen;
        let may_hold = self.may_hold();
        let Some(buffer) = self.partitions[at].buffer_mut() else {
            return;
        };
        // Buffered even if it is sent ahead: the end of the replay must account for every id.
        buffer.push(epoch, id, record, may_hold);
        let may_go_ahead = buffer.knows_urgent && is_next && self.evaluator.is_current();
        if !may_go_ahead || self.ahead.contains(partition, id) {
            return;
        }
        let Some(route_match) = self.evaluator.evaluate(partition, id, record, now_ms) else {
            return;
        };
        if record.route(route_match.route).priority != Priority::Urgent {
            return;
        }
        if self.ahead.has_room() && may_hold {
            self.ahead.push(QueuedNotification {
                partition,
                id,
                record: Arc::clone(record),
                route_match,
            });
        } else {
            // This one stays behind, and no later one may overtake it.
            self.partitions[at].forget_urgent();
        }
    }

    /// Confirms that all notices of this partition up to `last` have arrived. A tick of another
    /// epoch is ignored.
    pub fn on_tick(&mut self, partition: PartitionNumber, epoch: Epoch, last: NotificationId) {
        let at = self.at_mut(partition);
        if at.is_live() && at.epoch == Some(epoch) {
            // Never backwards: a delayed tick, or one during a sliced plan, is older than notices
            // handled since.
            at.seen = at.seen.max(last);
            self.advance(partition);
        }
    }

    /// Skips an id whose record is gone. Returns `true` if it was neither sent nor queued, so that
    /// the caller must announce a gap.
    pub fn skip(&mut self, partition: PartitionNumber, id: NotificationId) -> bool {
        // Checked first: `requeue_up_to` moves it to the queues.
        let is_ahead = self.ahead.contains(partition, id);
        self.requeue_up_to(partition, id);
        let at = self.at_mut(partition);
        let is_new = id > at.seen;
        at.seen = at.seen.max(id);
        self.advance(partition);
        is_new && !is_ahead
    }

    /// Returns the low-water mark and the highest id handled.
    pub fn marks(&self, partition: PartitionNumber) -> (NotificationId, NotificationId) {
        let at = self.at(partition);
        (at.low_water, at.seen)
    }

    /// Whether nothing of this id is still to come: it was sent, was rejected, or precedes the
    /// start of the stream.
    pub fn is_past(&self, partition: PartitionNumber, id: NotificationId) -> bool {
        let at = self.at(partition);
        at.epoch.is_some() && (id <= at.low_water || self.ahead.was_sent(partition, id))
    }

    /// Whether replay may queue one more notification of this partition.
    pub fn has_room(&self, partition: PartitionNumber) -> bool {
        self.queue.n_of(partition) < WINDOW && self.queue.n_bytes() <= self.replay_bytes()
    }

    /// How many records of this partition replay should read next, at least one. `None` until half
    /// of the room is free, so that replay reads several at a time.
    pub fn room(&self, partition: PartitionNumber) -> Option<Room> {
        let (n, n_bytes) = (self.queue.n_of(partition), self.queue.n_bytes());
        let most = self.replay_bytes();
        (n <= WINDOW / 2 && n_bytes <= most / 2).then(|| Room {
            n_records: WINDOW - n,
            n_bytes: most - n_bytes,
        })
    }

    fn replay_bytes(&self) -> usize {
        MAX_BYTES.min(self.share.replay_limit())
    }

    /// Goes live after history up to `read_to` was handled, and handles the notices buffered
    /// meanwhile. Returns the round of the next replay if too many arrived.
    pub fn go_live(
        &mut self,
        partition: PartitionNumber,
        read_to: NotificationId,
        now_ms: u64,
    ) -> Option<u64> {
        let at = self.at_mut(partition);
        at.seen = at.seen.max(read_to);
        at.expects_nothing_to = NotificationId(0);
        let has_gap = std::mem::take(&mut at.has_gap);
        let buffer = at.go_live();
        let seen = at.seen;
        // The cursor that followed the gap lies before it: without a newer one, a client that
        // resumes would receive the gap again.
        self.is_cursor_due |= has_gap;
        self.requeue_up_to(partition, seen);
        self.advance(partition);
        let buffer = buffer?;
        if buffer.is_overflowed {
            return Some(self.overflow(partition, buffer.knows_urgent));
        }
        self.handle_buffered(partition, buffer.notices, now_ms)
    }

    /// Handles the notices that arrived during a replay, in the order of the feed. Returns the
    /// round of the next replay if there was no room for one of them.
    fn handle_buffered(
        &mut self,
        partition: PartitionNumber,
        notices: impl IntoIterator<Item = BufferedNotice>,
        now_ms: u64,
    ) -> Option<u64> {
        let mut next_round = None;
        for (epoch, id, record) in notices {
            // After a return to replay, this moves the remaining notices to its buffer.
            let round = self.on_append(partition, epoch, id, &record, now_ms);
            next_round = next_round.or(round);
        }
        next_round
    }

    /// Returns the next item to write.
    /// The cursor ([`Subscription::encode_cursor`]) after this call is the one to write with it,
    /// except with a gap, which carries none: a client disconnected right after would resume past
    /// the gap and never learn of it. A cursor follows the last gap.
    pub fn next(&mut self, now_ms: u64) -> Option<Next> {
        // No cursor exists yet that could be written with an item.
        if !self.has_begun() {
            return None;
        }
        if let Some(gap) = self.gaps.pop() {
            self.is_cursor_due = true;
            return Some(Next::Gap(gap));
        }
        if self.is_cursor_due {
            self.is_cursor_due = false;
            return Some(Next::Cursor);
        }
        self.expire(now_ms);
        // Urgent notifications that the replay has already queued go first: their ids are lower.
        if let Some(first) = self.ahead.first()
            && self.ahead.may_send()
            && !self.queue.has_urgent(first.partition)
            && let Some(queued) = self.ahead.pop()
        {
            // Noted before the mark moves: the caller writes the cursor of this moment with it.
            self.ahead.note_sent(&queued);
            if let Some(key) = queued.state() {
                // Entries of the same key that the replay has queued are older states.
                self.queue.retain(|older| {
                    older.partition != queued.partition || older.state() != Some(key)
                });
            }
            self.advance(queued.partition);
            return Some(queued.into_next());
        }
        let (queued, overtakes) = self.queue.pop(self.ahead.may_send())?;
        if overtakes {
            self.ahead.note_sent(&queued);
        }
        self.advance(queued.partition);
        Some(queued.into_next())
    }

    /// Removes expired notifications. One that another route still delivers to the reader stays
    /// queued by that route, in the same position.
    fn expire(&mut self, now_ms: u64) {
        let Self {
            ahead, evaluator, ..
        } = self;
        ahead.expire(now_ms, |queued| {
            let QueuedNotification {
                partition,
                id,
                ref record,
                ..
            } = queued;
            let route_match = evaluator.evaluate(partition, id, record, now_ms)?;
            // The replay reaches the ones that are no longer urgent.
            (record.route(route_match.route).priority == Priority::Urgent).then_some(
                QueuedNotification {
                    route_match,
                    ..queued
                },
            )
        });
        let expired = self.queue.take_expired(now_ms);
        if expired.is_empty() {
            return;
        }
        for queued in expired {
            if let Some(route_match) =
                self.evaluator
                    .evaluate(queued.partition, queued.id, &queued.record, now_ms)
            {
                self.queue(QueuedNotification {
                    route_match,
                    ..queued
                });
            }
        }
        // Afterwards, or the low-water mark would pass those that were queued again.
        self.advance_all();
    }

    /// Appends the current cursor in its wire form. Appends nothing until every partition has a
    /// position: a client resuming with a cursor that names only some would restart the others.
    pub fn encode_cursor(&self, out: &mut String) {
        if !self.has_begun() {
            return;
        }
        let positions = self.partitions.iter().filter_map(|p| {
            Some(Position {
                partition: p.number,
                epoch: p.epoch?,
                low_water: p.low_water,
            })
        });
        let mut cursor = Cursor {
            positions: positions.collect(),
            sent_ahead: self.ahead.sent().collect(),
        };
        cursor.carry(&self.elsewhere);
        cursor.encode(self.user(), out);
    }

    /// Moves the low-water mark to just below the lowest queued id, or to `seen` if nothing is
    /// queued.
    fn advance(&mut self, partition: PartitionNumber) {
        let lowest = self.queue.lowest(partition);
        let at = self.at_mut(partition);
        let mark = lowest.map_or(at.seen, |id| NotificationId(id.0 - 1));
        at.low_water = at.low_water.max(mark);
        let low_water = at.low_water;
        self.ahead.forget_up_to(partition, low_water);
    }

    fn advance_all(&mut self) {
        for at in 0..self.partitions.len() {
            self.advance(self.partitions[at].number);
        }
    }

    /// Whether the subscription has a position in every partition.
    pub fn has_begun(&self) -> bool {
        self.partitions.iter().all(|p| p.epoch.is_some())
    }

    fn index(&self, partition: PartitionNumber) -> usize {
        self.partitions
            .iter()
            .position(|p| p.number == partition)
            .expect("a subscription covers every partition of the node")
    }

    fn at(&self, partition: PartitionNumber) -> &PartitionState {
        &self.partitions[self.index(partition)]
    }

    fn at_mut(&mut self, partition: PartitionNumber) -> &mut PartitionState {
        let at = self.index(partition);
        &mut self.partitions[at]
    }
}

impl QueuedNotification {
    fn into_next(self) -> Next {
        Next::Notification {
            partition: self.partition,
            id: self.id,
            record: self.record,
            route_match: self.route_match,
        }
    }
}

#[cfg(test)]
mod tests;
