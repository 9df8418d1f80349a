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
//! - `had` (sent ahead): at most three ids above `low_water` that were sent before lower ones.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::broker::Head;
use crate::delivery::recipients::{Moment, Reader, RouteMatch, winning_route};
use crate::event::criteria::{Criteria, Pool};
use crate::event::{Epoch, Name, NotificationId, PartitionNumber, Priority, Recipient, Target};

pub mod cursor;
mod gaps;
mod queue;
mod record;
pub mod replay;
mod start;
mod stream;

pub use gaps::{Gap, GapReason};
pub use record::{Record, Rendered};
pub use start::{Filter, Start};
pub use stream::OpenStream;

use cursor::{Cursor, MAX_SENT_AHEAD, Position};
use gaps::Gaps;
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
        way: RouteMatch,
    },
    Gap(Gap),
    /// The cursor without a notification, so that a client that received nothing can resume.
    Cursor,
}

#[derive(Debug)]
enum State {
    /// `knows_urgent`: every urgent notification above the low-water mark was sent or is in
    /// `ahead`, so that the next one may be sent ahead without overtaking another urgent one.
    Replay {
        buffer: VecDeque<(Epoch, NotificationId, Arc<Record>)>,
        is_overflowed: bool,
        knows_urgent: bool,
    },
    Live,
}

impl State {
    fn replay(knows_urgent: bool) -> Self {
        Self::Replay {
            buffer: VecDeque::new(),
            is_overflowed: false,
            knows_urgent,
        }
    }
}

#[derive(Debug)]
struct Partition {
    number: PartitionNumber,
    /// `None` until the first head is read; never `None` again after that.
    epoch: Option<Epoch>,
    low_water: NotificationId,
    seen: NotificationId,
    state: State,
    /// Incremented by each [`Subscription::enter_replay`]. A replay that holds an older round is
    /// obsolete and stops.
    round: u64,
    /// Announce no trimmed history: the client requested the earliest that is kept.
    is_lenient: bool,
    has_gap: bool,
}

#[derive(Clone, Debug)]
struct SentAhead {
    partition: PartitionNumber,
    id: NotificationId,
    /// The collapse key under which it was sent, if any. If only the cursor records the sending,
    /// all keys under which it may have been sent. `None`: the record has not been read since.
    collapse: Option<Vec<Name>>,
}

impl SentAhead {
    /// Whether an older notification with this key is obsolete.
    fn supersedes(&self, older: NotificationId, key: &Name) -> bool {
        self.id > older
            && self
                .collapse
                .as_ref()
                .is_some_and(|keys| keys.contains(key))
    }
}

/// See the module documentation.
#[derive(Debug)]
pub struct Subscription {
    reader: Reader,
    filter: Filter,
    start: Start,
    recipient: Recipient,
    /// Counters of reads of the recipient: those begun so far, the one that `recipient` came from,
    /// and the first that is recent enough.
    n_reads: u64,
    recipient_read: u64,
    needed_read: u64,
    partitions: Vec<Partition>,
    sent_ahead: Vec<SentAhead>,
    queue: PriorityQueue,
    /// Urgent notifications to be sent ahead of a replay. Their ids lie above `seen`.
    ahead: VecDeque<QueuedNotification>,
    gaps: Gaps,
    is_cursor_due: bool,
    /// The broker's clock minus this node's, in milliseconds.
    clock_offset_ms: i64,
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
        let named = |number| match &start {
            Start::Cursor(cursor) => cursor
                .positions
                .iter()
                .find(|position| position.partition == number),
            _ => None,
        };
        let partitions = partitions.into_iter().map(|number| Partition {
            number,
            epoch: named(number).map(|position| position.epoch),
            low_water: named(number).map_or(NotificationId(0), |position| position.low_water),
            seen: NotificationId(0),
            state: State::replay(false),
            round: 0,
            is_lenient: start == Start::Earliest,
            has_gap: false,
        });
        let partitions: Vec<Partition> = partitions.collect();
        let sent_ahead: &[_] = if let Start::Cursor(cursor) = &start {
            &cursor.sent_ahead
        } else {
            &[]
        };
        // Ids of partitions that were removed from the configuration are dropped.
        let sent_ahead = sent_ahead
            .iter()
            .filter(|(number, _)| partitions.iter().any(|p| p.number == *number));
        let sent_ahead = sent_ahead
            .map(|&(partition, id)| SentAhead {
                partition,
                id,
                collapse: None,
            })
            .collect();
        Self {
            partitions,
            reader: reader.into(),
            filter,
            start,
            recipient: Recipient::default(),
            n_reads: 0,
            recipient_read: 0,
            needed_read: 1,
            sent_ahead,
            queue: PriorityQueue::default(),
            ahead: VecDeque::new(),
            gaps: Gaps::default(),
            is_cursor_due: true,
            clock_offset_ms: 0,
        }
    }

    pub fn user(&self) -> &Name {
        &self.reader.user
    }

    /// Whether every partition is live and nothing is queued.
    pub fn is_idle(&self) -> bool {
        self.partitions
            .iter()
            .all(|p| matches!(p.state, State::Live))
            && self.queue.is_empty()
            && self.ahead.is_empty()
            && self.gaps.is_empty()
    }

    /// Whether every partition is live.
    pub fn is_live(&self) -> bool {
        self.partitions
            .iter()
            .all(|p| matches!(p.state, State::Live))
    }

    /// Whether [`Subscription::next`] would return an item now.
    pub fn is_ready(&self) -> bool {
        let waits = self.is_cursor_due
            || !self.gaps.is_empty()
            || !self.queue.is_empty()
            || !self.ahead.is_empty();
        waits && self.has_begun()
    }

    /// Requests that a cursor be sent.
    pub fn request_cursor(&mut self) {
        self.is_cursor_due = true;
    }

    /// Records that a read of the recipient is about to start. Returns the ticket to pass with the
    /// result.
    pub fn read_recipient(&mut self) -> u64 {
        self.n_reads += 1;
        self.n_reads
    }

    /// Replaces the known recipient unless a later read was stored first: partitions replay
    /// concurrently.
    pub fn set_recipient(&mut self, ticket: u64, known: Recipient, pool: &Pool) {
        if ticket > self.recipient_read {
            self.recipient_read = ticket;
            self.recipient = self.reader.as_recipient(
                known,
                self.partitions.iter().map(|partition| partition.number),
            );
            self.recipient.attributes = pool.share(std::mem::take(&mut self.recipient.attributes));
        }
    }

    /// The logs to read in a partition, each with the id after which to start.
    pub fn logs(&self, partition: PartitionNumber) -> Vec<(Target, NotificationId)> {
        self.recipient
            .logs(self.user(), partition, self.at(partition).low_water)
    }

    /// Returns to replay from the low-water mark. Returns the round that the replay must present.
    pub fn enter_replay(&mut self, partition: PartitionNumber) -> u64 {
        self.ahead.retain(|waiting| waiting.partition != partition);
        self.enter(partition, false)
    }

    /// Like `enter_replay`, but for lack of room. The notices received so far are complete, so
    /// urgent notifications need not wait for the replay to reach them.
    fn overflow(&mut self, partition: PartitionNumber, knew_urgent: bool) -> u64 {
        let mut urgent = self.queue.urgent(partition);
        urgent.extend(
            self.ahead
                .iter()
                .filter(|waiting| waiting.partition == partition)
                .cloned(),
        );
        self.ahead.retain(|waiting| waiting.partition != partition);
        let room = MAX_SENT_AHEAD.saturating_sub(self.sent_ahead.len() + self.ahead.len());
        let all_fit = urgent.len() <= room;
        urgent.truncate(room);
        self.ahead.extend(urgent);
        self.enter(partition, knew_urgent && all_fit)
    }

    fn enter(&mut self, partition: PartitionNumber, knows_urgent: bool) -> u64 {
        self.queue.retain(|waiting| waiting.partition != partition);
        let at = self.at_mut(partition);
        at.seen = at.low_water;
        at.state = State::replay(knows_urgent);
        at.round += 1;
        at.round
    }

    /// The user's memberships or attributes in this partition are out of date: nothing is evaluated
    /// until they are read again.
    pub fn recipient_changed(&mut self, partition: PartitionNumber) -> u64 {
        self.needed_read = self.n_reads + 1;
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
        matches!(at.state, State::Live) && at.epoch != Some(epoch)
    }

    /// Begins a replay from `head`: positions a new subscription and detects epoch changes.
    pub fn begin(&mut self, partition: PartitionNumber, head: &Head, node_now_ms: u64) {
        self.clock_offset_ms = head.now_ms as i64 - node_now_ms as i64;
        let at = self.index(partition);
        if self.partitions[at].epoch.is_none() {
            self.place(at, head);
        }
        self.survive(at, head);
        let at = &mut self.partitions[at];
        at.seen = at.low_water;
    }

    /// Sets the start of a new subscription in a partition.
    fn place(&mut self, at: usize, head: &Head) {
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

    /// Handles the end of the subscription's epoch: ids that did not survive it count as not sent.
    /// See [`Head::last_valid_id`].
    fn survive(&mut self, at: usize, head: &Head) {
        let number = self.partitions[at].number;
        let is_mine = |sent_ahead: &SentAhead| sent_ahead.partition == number;
        let own = self.partitions[at].epoch;
        let low_water = self.partitions[at].low_water;
        let highest = self
            .sent_ahead
            .iter()
            .filter(|sent_ahead| is_mine(sent_ahead))
            .map(|sent_ahead| sent_ahead.id)
            .max()
            .unwrap_or_default()
            .max(low_water);
        let bound = own.map_or(NotificationId(0), |epoch| head.last_valid_id(epoch));
        if highest > bound {
            self.announce(Gap {
                partition: number,
                reason: GapReason::Rewound,
                from: bound,
                to: highest,
            });
            self.sent_ahead
                .retain(|sent_ahead| !is_mine(sent_ahead) || sent_ahead.id <= bound);
        }
        if own != Some(head.epoch) {
            // Queued urgent notifications belong to the ended epoch. The replay reaches those that
            // survived.
            self.ahead.retain(|waiting| waiting.partition != number);
            if let State::Replay { knows_urgent, .. } = &mut self.partitions[at].state {
                *knows_urgent = false;
            }
        }
        let at = &mut self.partitions[at];
        at.low_water = low_water.min(bound);
        at.epoch = Some(head.epoch);
    }

    /// Announces a gap ahead of everything queued. It moves no mark: records of the stretch that
    /// still exist are sent after it.
    pub fn announce(&mut self, gap: Gap) {
        let at = self.at_mut(gap.partition);
        if at.is_lenient && gap.reason == GapReason::Trimmed {
            return;
        }
        at.has_gap = true;
        self.gaps.push(gap);
    }

    /// The ids that the cursor lists as sent ahead and whose records have not been read since.
    pub fn has_unknown_sent_ahead(&self, partition: PartitionNumber) -> Vec<NotificationId> {
        self.sent_ahead
            .iter()
            .filter(|sent_ahead| sent_ahead.partition == partition && sent_ahead.collapse.is_none())
            .map(|sent_ahead| sent_ahead.id)
            .collect()
    }

    /// Records the collapse keys of an id that was sent ahead. `record` is `None` if it is gone.
    pub fn sent_ahead_is(
        &mut self,
        partition: PartitionNumber,
        id: NotificationId,
        record: Option<&Record>,
        node_now_ms: u64,
    ) {
        let keys = record
            .map(|record| self.keys_until_now(partition, id, record, self.broker_now(node_now_ms)))
            .unwrap_or_default();
        if let Some(sent_ahead) = self
            .sent_ahead
            .iter_mut()
            .find(|sent_ahead| sent_ahead.partition == partition && sent_ahead.id == id)
        {
            sent_ahead.collapse = Some(keys);
        }
    }

    /// The collapse keys of the routes that have won for this reader up to now, one after another
    /// as they expired. A route that has expired since still keeps the older states superseded.
    fn keys_until_now(
        &self,
        partition: PartitionNumber,
        id: NotificationId,
        record: &Record,
        now_ms: u64,
    ) -> Vec<Name> {
        let (mut keys, mut at_ms) = (Vec::new(), 0);
        while let Some(way) = self.judge_at(partition, id, record, at_ms) {
            let route = record.route(way.route);
            keys.extend(route.collapse.clone());
            match route.expires_ms {
                Some(expires_ms) if expires_ms <= now_ms => at_ms = expires_ms,
                _ => break,
            }
        }
        keys
    }

    fn judge(
        &self,
        partition: PartitionNumber,
        id: NotificationId,
        record: &Record,
        node_now_ms: u64,
    ) -> Option<RouteMatch> {
        self.judge_at(partition, id, record, self.broker_now(node_now_ms))
    }

    fn judge_at(
        &self,
        partition: PartitionNumber,
        id: NotificationId,
        record: &Record,
        now_ms: u64,
    ) -> Option<RouteMatch> {
        let moment = Moment {
            partition,
            id,
            now_ms,
        };
        let attributes = &self.recipient.attributes;
        let holds = |route: usize, criteria: &Criteria| record.holds(route, criteria, attributes);
        let way = winning_route(
            &record.notification().plan,
            self.user(),
            &self.recipient,
            moment,
            holds,
        )?;
        self.filter
            .passes(record.notification(), record.route(way.route))
            .then_some(way)
    }

    /// Handles one notification: skips, rejects or queues it. Ids of a partition must arrive in
    /// ascending order.
    pub fn handle(
        &mut self,
        partition: PartitionNumber,
        id: NotificationId,
        record: &Arc<Record>,
        node_now_ms: u64,
    ) {
        let at = self.at_mut(partition);
        if id <= at.seen {
            return;
        }
        at.seen = id;
        self.try_next_route(partition, NotificationId(id.0 - 1));
        self.ahead
            .retain(|waiting| waiting.partition != partition || waiting.id != id);
        if let Some(way) = self.judge(partition, id, record, node_now_ms) {
            self.queue(QueuedNotification {
                partition,
                id,
                record: Arc::clone(record),
                way,
            });
        }
        self.advance(partition);
    }

    /// Queues a notification unless a later one superseded it or it was already sent ahead.
    fn queue(&mut self, waiting: QueuedNotification) {
        let (partition, id) = (waiting.partition, waiting.id);
        let mine = self
            .sent_ahead
            .iter()
            .filter(|sent_ahead| sent_ahead.partition == partition);
        let is_had = mine.clone().any(|sent_ahead| sent_ahead.id == id);
        if let Some(key) = waiting.collapse() {
            let is_this_state = |other: &QueuedNotification| {
                other.partition == partition && other.collapse() == Some(key)
            };
            if mine
                .clone()
                .any(|sent_ahead| sent_ahead.supersedes(id, key))
                || self
                    .queue
                    .any(|newer| newer.id > id && is_this_state(newer))
            {
                return;
            }
            // The later state supersedes the earlier one even if the later one has been sent
            // already.
            self.queue.retain(|older| !is_this_state(older));
        }
        if !is_had {
            self.queue.push(waiting);
        }
    }

    /// History up to `id` has been read. Notifications in `ahead` that were not met there, because
    /// their log was trimmed meanwhile, move to the queues; otherwise later ones would overtake
    /// them.
    fn try_next_route(&mut self, partition: PartitionNumber, id: NotificationId) {
        while let Some(at) = self
            .ahead
            .iter()
            .position(|waiting| waiting.partition == partition && waiting.id <= id)
            && let Some(waiting) = self.ahead.remove(at)
        {
            self.queue(waiting);
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
        node_now_ms: u64,
    ) -> Option<u64> {
        let at = self.index(partition);
        if !matches!(self.partitions[at].state, State::Live) {
            self.wait(partition, epoch, id, record, node_now_ms);
            return None;
        }
        if self.partitions[at].epoch != Some(epoch) || id <= self.partitions[at].seen {
            return None;
        }
        if self.queue.n_bytes() <= MAX_BYTES && self.queue.n_of(partition) < MAX_LIVE {
            self.handle(partition, id, record, node_now_ms);
            return None;
        }
        let round = self.overflow(partition, true);
        self.wait(partition, epoch, id, record, node_now_ms);
        Some(round)
    }

    /// Buffers a notification until the end of the replay. An urgent one may be sent ahead instead,
    /// unless another urgent one may still have to precede it. `seen` is not moved, so that the
    /// replay continues below it.
    fn wait(
        &mut self,
        partition: PartitionNumber,
        epoch: Epoch,
        id: NotificationId,
        record: &Arc<Record>,
        node_now_ms: u64,
    ) {
        let at = self.index(partition);
        let is_mine = self.partitions[at].epoch == Some(epoch) && id > self.partitions[at].seen;
        let State::Replay {
            buffer,
            is_overflowed,
            knows_urgent,
        } = &mut self.partitions[at].state
        else {
            return;
        };
        let n_bytes: usize = buffer.iter().map(|(_, _, record)| record.n_bytes()).sum();
        if buffer.len() >= MAX_LIVE || n_bytes > MAX_BYTES {
            // Replaying again at the end, not at once, guarantees progress.
            *is_overflowed = true;
            buffer.clear();
        }
        if !*is_overflowed {
            buffer.push_back((epoch, id, Arc::clone(record)));
        }
        let may_go_ahead = *knows_urgent && is_mine && self.recipient_read >= self.needed_read;
        let is_known = |of: PartitionNumber, known: NotificationId| of == partition && known == id;
        if !may_go_ahead
            || self
                .sent_ahead
                .iter()
                .any(|sent_ahead| is_known(sent_ahead.partition, sent_ahead.id))
            || self
                .ahead
                .iter()
                .any(|waiting| is_known(waiting.partition, waiting.id))
        {
            return;
        }
        let Some(way) = self.judge(partition, id, record, node_now_ms) else {
            return;
        };
        if record.route(way.route).priority != Priority::Urgent {
            return;
        }
        if self.sent_ahead.len() + self.ahead.len() < MAX_SENT_AHEAD {
            self.ahead.push_back(QueuedNotification {
                partition,
                id,
                record: Arc::clone(record),
                way,
            });
        } else if let State::Replay { knows_urgent, .. } = &mut self.partitions[at].state {
            *knows_urgent = false;
        }
    }

    /// Confirms that all notices of this partition up to `last` have arrived. A tick of another
    /// epoch is ignored.
    pub fn on_tick(&mut self, partition: PartitionNumber, epoch: Epoch, last: NotificationId) {
        let at = self.at_mut(partition);
        if matches!(at.state, State::Live) && at.epoch == Some(epoch) {
            // Never backwards: a delayed tick, or one during a sliced plan, is older than notices
            // handled since.
            at.seen = at.seen.max(last);
            self.advance(partition);
        }
    }

    /// Skips an id whose record is gone. Returns `true` if it was neither sent nor queued, so that
    /// the caller must announce a gap.
    pub fn skip(&mut self, partition: PartitionNumber, id: NotificationId) -> bool {
        let is_here = |of: PartitionNumber, known: NotificationId| of == partition && known == id;
        let is_had = self
            .sent_ahead
            .iter()
            .any(|sent_ahead| is_here(sent_ahead.partition, sent_ahead.id))
            || self
                .ahead
                .iter()
                .any(|waiting| is_here(waiting.partition, waiting.id));
        self.try_next_route(partition, id);
        let at = self.at_mut(partition);
        let is_new = id > at.seen;
        at.seen = at.seen.max(id);
        self.advance(partition);
        is_new && !is_had
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
        let is_had = self
            .sent_ahead
            .iter()
            .any(|sent_ahead| sent_ahead.partition == partition && sent_ahead.id == id);
        at.epoch.is_some() && (id <= at.low_water || is_had)
    }

    /// Whether replay may queue more of this partition.
    pub fn has_room(&self, partition: PartitionNumber) -> bool {
        self.queue.n_of(partition) < WINDOW && self.queue.n_bytes() <= MAX_BYTES
    }

    /// Goes live after history up to `last` was handled, and handles the notices buffered
    /// meanwhile. Returns the round of the next replay if too many arrived.
    pub fn go_live(
        &mut self,
        partition: PartitionNumber,
        last: NotificationId,
        node_now_ms: u64,
    ) -> Option<u64> {
        let at = self.at_mut(partition);
        at.seen = at.seen.max(last);
        at.is_lenient = false;
        let has_gap = std::mem::take(&mut at.has_gap);
        let state = std::mem::replace(&mut at.state, State::Live);
        let seen = at.seen;
        self.is_cursor_due |= has_gap;
        self.try_next_route(partition, seen);
        self.advance(partition);
        let State::Replay {
            buffer,
            is_overflowed,
            knows_urgent,
        } = state
        else {
            return None;
        };
        if is_overflowed {
            return Some(self.overflow(partition, knows_urgent));
        }
        let mut buffer = buffer.into_iter();
        while let Some((epoch, id, record)) = buffer.next() {
            let round = self.on_append(partition, epoch, id, &record, node_now_ms);
            if round.is_some() {
                for (epoch, id, record) in buffer {
                    self.wait(partition, epoch, id, &record, node_now_ms);
                }
                return round;
            }
        }
        None
    }

    /// Returns the next item to write.
    /// The cursor ([`Subscription::encode_cursor`]) after this call is the one to write with it,
    /// except with a gap, which carries none: a client disconnected right after would resume past
    /// the gap and never learn of it. A cursor follows the last gap.
    pub fn next(&mut self, node_now_ms: u64) -> Option<Next> {
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
        let now_ms = self.broker_now(node_now_ms);
        self.expire(now_ms);
        // Urgent notifications that the replay has already queued go first: their ids are lower.
        if let Some(first) = self.ahead.front()
            && self.sent_ahead.len() < MAX_SENT_AHEAD
            && !self.queue.has_urgent(first.partition)
            && let Some(waiting) = self.ahead.pop_front()
        {
            self.remember(&waiting);
            if let Some(key) = waiting.collapse() {
                // Entries of the same key that the replay has queued are older states.
                self.queue.retain(|older| {
                    older.partition != waiting.partition || older.collapse() != Some(key)
                });
            }
            self.advance(waiting.partition);
            return Some(waiting.into_next());
        }
        let (waiting, overtakes) = self.queue.pop(self.sent_ahead.len() < MAX_SENT_AHEAD)?;
        if overtakes {
            self.remember(&waiting);
        }
        self.advance(waiting.partition);
        Some(waiting.into_next())
    }

    /// Removes expired notifications. One that another route still delivers to the reader stays
    /// queued by that route, in the same position.
    fn expire(&mut self, now_ms: u64) {
        if self.ahead.iter().any(|waiting| waiting.is_expired(now_ms)) {
            // The replay reaches the ones that are no longer urgent.
            let again = |this: &Self, waiting: QueuedNotification| {
                let way = this.judge_at(waiting.partition, waiting.id, &waiting.record, now_ms)?;
                (waiting.record.route(way.route).priority == Priority::Urgent)
                    .then_some(QueuedNotification { way, ..waiting })
            };
            let ahead = std::mem::take(&mut self.ahead);
            self.ahead = ahead
                .into_iter()
                .filter_map(|waiting| again(self, waiting))
                .collect();
        }
        let expired = self.queue.take_expired(now_ms);
        if expired.is_empty() {
            return;
        }
        for QueuedNotification {
            partition,
            id,
            record,
            ..
        } in expired
        {
            if let Some(way) = self.judge_at(partition, id, &record, now_ms) {
                self.queue(QueuedNotification {
                    partition,
                    id,
                    record,
                    way,
                });
            }
        }
        self.advance_all();
    }

    fn remember(&mut self, waiting: &QueuedNotification) {
        let collapse = Some(waiting.collapse().cloned().into_iter().collect());
        self.sent_ahead.push(SentAhead {
            partition: waiting.partition,
            id: waiting.id,
            collapse,
        });
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
        let sent_ahead = self
            .sent_ahead
            .iter()
            .map(|sent_ahead| (sent_ahead.partition, sent_ahead.id));
        Cursor {
            positions: positions.collect(),
            sent_ahead: sent_ahead.collect(),
        }
        .encode(self.user(), out);
    }

    /// Moves the low-water mark to just below the lowest queued id, or to `seen` if nothing is
    /// queued.
    fn advance(&mut self, partition: PartitionNumber) {
        let lowest = self.queue.lowest(partition);
        let at = self.at_mut(partition);
        let mark = lowest.map_or(at.seen, |id| NotificationId(id.0 - 1));
        at.low_water = at.low_water.max(mark);
        let low_water = at.low_water;
        self.sent_ahead
            .retain(|sent_ahead| sent_ahead.partition != partition || sent_ahead.id > low_water);
    }

    fn advance_all(&mut self) {
        for at in 0..self.partitions.len() {
            self.advance(self.partitions[at].number);
        }
    }

    fn has_begun(&self) -> bool {
        self.partitions.iter().all(|p| p.epoch.is_some())
    }

    fn broker_now(&self, node_now_ms: u64) -> u64 {
        node_now_ms.saturating_add_signed(self.clock_offset_ms)
    }

    fn index(&self, partition: PartitionNumber) -> usize {
        self.partitions
            .iter()
            .position(|p| p.number == partition)
            .expect("a subscription covers every partition of the node")
    }

    fn at(&self, partition: PartitionNumber) -> &Partition {
        &self.partitions[self.index(partition)]
    }

    fn at_mut(&mut self, partition: PartitionNumber) -> &mut Partition {
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
            way: self.way,
        }
    }
}

#[cfg(test)]
mod tests;
