//! One open stream: history, then live, each notification once and in order. Bounded. No I/O: [`replay`] reads the broker for it, the
//! hub feeds it, `sse` empties it. Knows neither HTTP nor who may read it: see `auth`.
//!
//! In each partition a subscription is in one of two states, *replay* and *live*, with one transition: whatever happens (connecting, a
//! lost feed, a missing tick, a full buffer, a fail-over, a group joined or left, attributes changed) sends it back to replay from its
//! low-water mark, by [`Subscription::enter_replay`].
//!
//! The marks of a partition, all of them ids:
//! - `low_water`: everything up to it was sent or judged away. It is what the cursor says.
//! - `seen`: the highest id handled, at or above `low_water`; what lies between the two waits in the lanes.
//! - `had`: at most three ids above `low_water` that were sent before lower ones.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::broker::{Head, PartitionNumber, Recipient};
use crate::delivery::recipients::{Moment, Reader, Way, winning_route};
use crate::event::criteria::{Criteria, Pool};
use crate::event::{Life, Name, NotificationId, Priority, Target};

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

use cursor::{Cursor, MAX_HAD, Position};
use gaps::Gaps;
use queue::{Lanes, Waiting};

/// Replay takes no more of a partition while so many wait; live notices beyond four times that send the partition back to replay.
/// Random histories in unit tests are too short to fill more.
pub const WINDOW: usize = if cfg!(test) { 4 } else { 64 };
const MAX_LIVE: usize = 4 * WINDOW;
/// The same bound in bytes of records, over all partitions.
const MAX_BYTES: usize = 1024 * 1024;

/// What is to be written next.
#[derive(Debug)]
pub enum Next {
    Notification {
        partition: PartitionNumber,
        id: NotificationId,
        record: Arc<Record>,
        way: Way,
    },
    Gap(Gap),
    /// The cursor, without a notification, so that a client that received nothing can resume.
    Cursor,
}

#[derive(Debug)]
enum State {
    /// `knows_urgent`: every urgent notification above the low-water mark was sent or is in `ahead`, so that the next one may go ahead
    /// without overtaking another.
    Replay {
        buffer: VecDeque<(Life, NotificationId, Arc<Record>)>,
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
    /// `None` until the first head is read, and then again never.
    life: Option<Life>,
    low_water: NotificationId,
    seen: NotificationId,
    state: State,
    /// Raised by each [`Subscription::enter_replay`]; a replay that began under another one has been overtaken by events and stops.
    round: u64,
    /// Announce no gap: the client asked for whatever there is.
    is_lenient: bool,
    has_gap: bool,
}

#[derive(Clone, Debug)]
struct Had {
    partition: PartitionNumber,
    id: NotificationId,
    /// The key under which it was sent, if it has one; all under which it may have been sent, where only the cursor knows that it was. `None`:
    /// the record has not been read since.
    collapse: Option<Vec<Name>>,
}

impl Had {
    /// Whether an older notification with this key is superfluous.
    fn supersedes(&self, older: NotificationId, key: &Name) -> bool {
        self.id > older
            && self
                .collapse
                .as_ref()
                .is_some_and(|keys| keys.contains(key))
    }
}

/// See the head of this file.
#[derive(Debug)]
pub struct Subscription {
    reader: Reader,
    filter: Filter,
    start: Start,
    recipient: Recipient,
    /// Reads of the recipient begun so far; the one that `recipient` came from; the first that is new enough.
    n_reads: u64,
    recipient_read: u64,
    needed_read: u64,
    partitions: Vec<Partition>,
    had: Vec<Had>,
    lanes: Lanes,
    /// Urgent ones that go ahead of a replay; their ids lie above `seen`.
    ahead: VecDeque<Waiting>,
    gaps: Gaps,
    is_cursor_due: bool,
    /// The broker's clock less this node's, in milliseconds.
    clock_offset_ms: i64,
}

impl Subscription {
    /// A subscription that is in replay everywhere and waits for its first [`Subscription::begin`].
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
            life: named(number).map(|position| position.life),
            low_water: named(number).map_or(NotificationId(0), |position| position.low_water),
            seen: NotificationId(0),
            state: State::replay(false),
            round: 0,
            is_lenient: start == Start::Earliest,
            has_gap: false,
        });
        let partitions: Vec<Partition> = partitions.collect();
        let had: &[_] = if let Start::Cursor(cursor) = &start {
            &cursor.had
        } else {
            &[]
        };
        // A partition that was taken out of the configuration has nothing to say any more.
        let had = had
            .iter()
            .filter(|(number, _)| partitions.iter().any(|p| p.number == *number));
        let had = had
            .map(|&(partition, id)| Had {
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
            had,
            lanes: Lanes::default(),
            ahead: VecDeque::new(),
            gaps: Gaps::default(),
            is_cursor_due: true,
            clock_offset_ms: 0,
        }
    }

    pub fn user(&self) -> &Name {
        &self.reader.user
    }

    /// Whether every partition is live and nothing waits.
    pub fn is_idle(&self) -> bool {
        self.partitions
            .iter()
            .all(|p| matches!(p.state, State::Live))
            && self.lanes.is_empty()
            && self.ahead.is_empty()
            && self.gaps.is_empty()
    }

    /// Whether every partition is live.
    pub fn is_live(&self) -> bool {
        self.partitions
            .iter()
            .all(|p| matches!(p.state, State::Live))
    }

    /// Whether [`Subscription::next`] has something now.
    pub fn is_ready(&self) -> bool {
        let waits = self.is_cursor_due
            || !self.gaps.is_empty()
            || !self.lanes.is_empty()
            || !self.ahead.is_empty();
        waits && self.has_begun()
    }

    /// Asks for a cursor to be sent.
    pub fn request_cursor(&mut self) {
        self.is_cursor_due = true;
    }

    /// Says that the recipient is about to be read, and answers the ticket to hand in with what was read.
    pub fn read_recipient(&mut self) -> u64 {
        self.n_reads += 1;
        self.n_reads
    }

    /// Replaces what is known of the user, unless a later read came first: partitions replay side by side.
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

    /// The logs that count in a partition, each with the id above which.
    pub fn logs(&self, partition: PartitionNumber) -> Vec<(Target, NotificationId)> {
        self.recipient
            .logs(self.user(), partition, self.at(partition).low_water)
    }

    /// Goes back to replay from the low-water mark, and answers the round that the replay must name.
    pub fn enter_replay(&mut self, partition: PartitionNumber) -> u64 {
        self.ahead.retain(|waiting| waiting.partition != partition);
        self.enter(partition, false)
    }

    /// The same for want of room: what was heard is whole, so that urgent notifications need not wait for the replay to come by.
    fn overflow(&mut self, partition: PartitionNumber, knew_urgent: bool) -> u64 {
        let mut urgent = self.lanes.urgent(partition);
        urgent.extend(
            self.ahead
                .iter()
                .filter(|waiting| waiting.partition == partition)
                .cloned(),
        );
        self.ahead.retain(|waiting| waiting.partition != partition);
        let room = MAX_HAD.saturating_sub(self.had.len() + self.ahead.len());
        let all_fit = urgent.len() <= room;
        urgent.truncate(room);
        self.ahead.extend(urgent);
        self.enter(partition, knew_urgent && all_fit)
    }

    fn enter(&mut self, partition: PartitionNumber, knows_urgent: bool) -> u64 {
        self.lanes.retain(|waiting| waiting.partition != partition);
        let at = self.at_mut(partition);
        at.seen = at.low_water;
        at.state = State::replay(knows_urgent);
        at.round += 1;
        at.round
    }

    /// What a user's memberships or attributes were is no longer true in this partition: nothing is judged until they are read again.
    pub fn recipient_changed(&mut self, partition: PartitionNumber) -> u64 {
        self.needed_read = self.n_reads + 1;
        self.enter_replay(partition)
    }

    pub fn round(&self, partition: PartitionNumber) -> u64 {
        self.at(partition).round
    }

    /// The life of the partition that the subscription knows. `None`: it has not begun.
    pub fn life(&self, partition: PartitionNumber) -> Option<Life> {
        self.at(partition).life
    }

    /// Whether it is live, and in another life than this one: it would hear nothing of what comes in it.
    pub fn lives_elsewhere(&self, partition: PartitionNumber, life: Life) -> bool {
        let at = self.at(partition);
        matches!(at.state, State::Live) && at.life != Some(life)
    }

    /// Begins a replay at what the head says: places a new subscription, and notices lives that came and went.
    pub fn begin(&mut self, partition: PartitionNumber, head: &Head, node_now_ms: u64) {
        self.clock_offset_ms = head.now_ms as i64 - node_now_ms as i64;
        let at = self.index(partition);
        if self.partitions[at].life.is_none() {
            self.place(at, head);
        }
        self.survive(at, head);
        let at = &mut self.partitions[at];
        at.seen = at.low_water;
    }

    /// Where a new subscription starts in a partition.
    fn place(&mut self, at: usize, head: &Head) {
        let number = self.partitions[at].number;
        let (life, low_water) = match &self.start {
            // Added since the cursor was written: from its beginning.
            Start::Cursor(_) => (head.life, head.origin),
            Start::Latest | Start::Unknown => (head.life, head.latest()),
            Start::Earliest => (head.life, NotificationId(0)),
            // Before the partition's beginning there is nothing, so that asking for it misses nothing.
            Start::Since(ms) => (
                head.life,
                NotificationId::at_ms(*ms).min(head.top()).max(head.origin),
            ),
        };
        self.partitions[at].life = Some(life);
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

    /// If the own life is over: what did not survive it was not had, see [`Head::survived`].
    fn survive(&mut self, at: usize, head: &Head) {
        let number = self.partitions[at].number;
        let is_mine = |had: &Had| had.partition == number;
        let own = self.partitions[at].life;
        let low_water = self.partitions[at].low_water;
        let highest = self
            .had
            .iter()
            .filter(|had| is_mine(had))
            .map(|had| had.id)
            .max()
            .unwrap_or_default()
            .max(low_water);
        let bound = own.map_or(NotificationId(0), |life| head.survived(life));
        if highest > bound {
            self.announce(Gap {
                partition: number,
                reason: GapReason::Rewound,
                from: bound,
                to: highest,
            });
            self.had.retain(|had| !is_mine(had) || had.id <= bound);
        }
        if own != Some(head.life) {
            // What was about to go ahead is of the life that is over; the replay comes by what survived.
            self.ahead.retain(|waiting| waiting.partition != number);
            if let State::Replay { knows_urgent, .. } = &mut self.partitions[at].state {
                *knows_urgent = false;
            }
        }
        let at = &mut self.partitions[at];
        at.low_water = low_water.min(bound);
        at.life = Some(head.life);
    }

    /// Announces a gap, before whatever waits. It moves no mark: what still exists of the stretch is sent after it.
    pub fn announce(&mut self, gap: Gap) {
        let at = self.at_mut(gap.partition);
        if at.is_lenient && gap.reason == GapReason::Trimmed {
            return;
        }
        at.has_gap = true;
        self.gaps.push(gap);
    }

    /// The ids that a cursor says were had and whose records have not been read since.
    pub fn had_unknown(&self, partition: PartitionNumber) -> Vec<NotificationId> {
        self.had
            .iter()
            .filter(|had| had.partition == partition && had.collapse.is_none())
            .map(|had| had.id)
            .collect()
    }

    /// Says what the record of an id that was had is, so that its collapse key is known. `None`: it is gone.
    pub fn had_is(
        &mut self,
        partition: PartitionNumber,
        id: NotificationId,
        record: Option<&Record>,
        node_now_ms: u64,
    ) {
        let keys = record
            .map(|record| self.keys_until_now(partition, id, record, self.broker_now(node_now_ms)))
            .unwrap_or_default();
        if let Some(had) = self
            .had
            .iter_mut()
            .find(|had| had.partition == partition && had.id == id)
        {
            had.collapse = Some(keys);
        }
    }

    /// The collapse keys of the routes that have won for this reader at some time up to now, one after another as they expired. That one has
    /// expired since does not bring back the states that it made superfluous.
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
    ) -> Option<Way> {
        self.judge_at(partition, id, record, self.broker_now(node_now_ms))
    }

    fn judge_at(
        &self,
        partition: PartitionNumber,
        id: NotificationId,
        record: &Record,
        now_ms: u64,
    ) -> Option<Way> {
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

    /// Decides about one notification: skipped, judged away, or queued. Ids of a partition must come in ascending order.
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
        self.come_by(partition, NotificationId(id.0 - 1));
        self.ahead
            .retain(|waiting| waiting.partition != partition || waiting.id != id);
        if let Some(way) = self.judge(partition, id, record, node_now_ms) {
            self.queue(Waiting {
                partition,
                id,
                record: Arc::clone(record),
                way,
            });
        }
        self.advance(partition);
    }

    /// Puts a notification in its lane, unless a later one has made it superfluous, or it was had.
    fn queue(&mut self, waiting: Waiting) {
        let (partition, id) = (waiting.partition, waiting.id);
        let mine = self.had.iter().filter(|had| had.partition == partition);
        let is_had = mine.clone().any(|had| had.id == id);
        if let Some(key) = waiting.collapse() {
            let is_this_state =
                |other: &Waiting| other.partition == partition && other.collapse() == Some(key);
            if mine.clone().any(|had| had.supersedes(id, key))
                || self
                    .lanes
                    .any(|newer| newer.id > id && is_this_state(newer))
            {
                return;
            }
            // The later state makes the earlier one superfluous, also when the later one has been sent already.
            self.lanes.retain(|older| !is_this_state(older));
        }
        if !is_had {
            self.lanes.push(waiting);
        }
    }

    /// History up to `id` was read. What was to go ahead of it and was not met there, because its log was cut meanwhile, takes its place
    /// in the lanes: later ones would overtake it.
    fn come_by(&mut self, partition: PartitionNumber, id: NotificationId) {
        while let Some(at) = self
            .ahead
            .iter()
            .position(|waiting| waiting.partition == partition && waiting.id <= id)
            && let Some(waiting) = self.ahead.remove(at)
        {
            self.queue(waiting);
        }
    }

    /// A notification appended while the stream was open. `Some`: there was no room, and this is the round of the replay to begin.
    pub fn on_append(
        &mut self,
        partition: PartitionNumber,
        life: Life,
        id: NotificationId,
        record: &Arc<Record>,
        node_now_ms: u64,
    ) -> Option<u64> {
        let at = self.index(partition);
        if !matches!(self.partitions[at].state, State::Live) {
            self.wait(partition, life, id, record, node_now_ms);
            return None;
        }
        if self.partitions[at].life != Some(life) || id <= self.partitions[at].seen {
            return None;
        }
        if self.lanes.n_bytes() <= MAX_BYTES && self.lanes.n_of(partition) < MAX_LIVE {
            self.handle(partition, id, record, node_now_ms);
            return None;
        }
        let round = self.overflow(partition, true);
        self.wait(partition, life, id, record, node_now_ms);
        Some(round)
    }

    /// Into the buffer of a replay, to be handled at its end. An urgent notification does not wait for that; `seen` is not touched, so
    /// that the replay goes on below it. It waits where another urgent one may still have to come first.
    fn wait(
        &mut self,
        partition: PartitionNumber,
        life: Life,
        id: NotificationId,
        record: &Arc<Record>,
        node_now_ms: u64,
    ) {
        let at = self.index(partition);
        let is_mine = self.partitions[at].life == Some(life) && id > self.partitions[at].seen;
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
            // Replaying again at the end, not at once, is what makes progress certain.
            *is_overflowed = true;
            buffer.clear();
        }
        if !*is_overflowed {
            buffer.push_back((life, id, Arc::clone(record)));
        }
        let may_go_ahead = *knows_urgent && is_mine && self.recipient_read >= self.needed_read;
        let is_known = |of: PartitionNumber, known: NotificationId| of == partition && known == id;
        if !may_go_ahead
            || self.had.iter().any(|had| is_known(had.partition, had.id))
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
        if self.had.len() + self.ahead.len() < MAX_HAD {
            self.ahead.push_back(Waiting {
                partition,
                id,
                record: Arc::clone(record),
                way,
            });
        } else if let State::Replay { knows_urgent, .. } = &mut self.partitions[at].state {
            *knows_urgent = false;
        }
    }

    /// All notices of this partition up to `last` came before this one. A tick of another life is no tick.
    pub fn on_tick(&mut self, partition: PartitionNumber, life: Life, last: NotificationId) {
        let at = self.at_mut(partition);
        if matches!(at.state, State::Live) && at.life == Some(life) {
            // Never backwards: a tick that waited, or one during a sliced plan, is older than what was handled since.
            at.seen = at.seen.max(last);
            self.advance(partition);
        }
    }

    /// Passes over an id whose record is gone. `true`: nobody has had it or holds it, so that it is a gap.
    pub fn pass_over(&mut self, partition: PartitionNumber, id: NotificationId) -> bool {
        let is_here = |of: PartitionNumber, known: NotificationId| of == partition && known == id;
        let is_had = self.had.iter().any(|had| is_here(had.partition, had.id))
            || self
                .ahead
                .iter()
                .any(|waiting| is_here(waiting.partition, waiting.id));
        self.come_by(partition, id);
        let at = self.at_mut(partition);
        let is_new = id > at.seen;
        at.seen = at.seen.max(id);
        self.advance(partition);
        is_new && !is_had
    }

    /// The low-water mark and the highest id handled.
    pub fn marks(&self, partition: PartitionNumber) -> (NotificationId, NotificationId) {
        let at = self.at(partition);
        (at.low_water, at.seen)
    }

    /// Whether nothing of this id is still to come: it was handed out or judged away, or lies before the beginning.
    pub fn is_past(&self, partition: PartitionNumber, id: NotificationId) -> bool {
        let at = self.at(partition);
        let is_had = self
            .had
            .iter()
            .any(|had| had.partition == partition && had.id == id);
        at.life.is_some() && (id <= at.low_water || is_had)
    }

    /// Whether replay may take more of this partition.
    pub fn has_room(&self, partition: PartitionNumber) -> bool {
        self.lanes.n_of(partition) < WINDOW && self.lanes.n_bytes() <= MAX_BYTES
    }

    /// History up to `last` was handled: goes live with what arrived meanwhile. `Some`: too much arrived, and this is the round of the
    /// next replay.
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
        self.come_by(partition, seen);
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
        while let Some((life, id, record)) = buffer.next() {
            let round = self.on_append(partition, life, id, &record, node_now_ms);
            if round.is_some() {
                for (life, id, record) in buffer {
                    self.wait(partition, life, id, &record, node_now_ms);
                }
                return round;
            }
        }
        None
    }

    /// What is to be written next. The cursor ([`Subscription::encode_cursor`]) after this call is the one to write with it, but for a gap:
    /// that has none, because a client that is cut before the next one would never be told of it. A cursor follows the last gap.
    pub fn next(&mut self, node_now_ms: u64) -> Option<Next> {
        // There is no cursor to write with it yet.
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
        // What a replay has come by goes first: its ids are lower.
        if let Some(first) = self.ahead.front()
            && self.had.len() < MAX_HAD
            && !self.lanes.has_urgent(first.partition)
            && let Some(waiting) = self.ahead.pop_front()
        {
            self.remember(&waiting);
            if let Some(key) = waiting.collapse() {
                // What the replay has queued of the same key is an older state.
                self.lanes.retain(|older| {
                    older.partition != waiting.partition || older.collapse() != Some(key)
                });
            }
            self.advance(waiting.partition);
            return Some(waiting.into_next());
        }
        let (waiting, overtakes) = self.lanes.pop(self.had.len() < MAX_HAD)?;
        if overtakes {
            self.remember(&waiting);
        }
        self.advance(waiting.partition);
        Some(waiting.into_next())
    }

    /// Takes out what has expired. Where another route still reaches the reader, it waits on by that one, in its place.
    fn expire(&mut self, now_ms: u64) {
        if self.ahead.iter().any(|waiting| waiting.is_expired(now_ms)) {
            // What is urgent no longer, the replay will come by.
            let again = |this: &Self, waiting: Waiting| {
                let way = this.judge_at(waiting.partition, waiting.id, &waiting.record, now_ms)?;
                (waiting.record.route(way.route).priority == Priority::Urgent)
                    .then_some(Waiting { way, ..waiting })
            };
            let ahead = std::mem::take(&mut self.ahead);
            self.ahead = ahead
                .into_iter()
                .filter_map(|waiting| again(self, waiting))
                .collect();
        }
        let expired = self.lanes.take_expired(now_ms);
        if expired.is_empty() {
            return;
        }
        for Waiting {
            partition,
            id,
            record,
            ..
        } in expired
        {
            if let Some(way) = self.judge_at(partition, id, &record, now_ms) {
                self.queue(Waiting {
                    partition,
                    id,
                    record,
                    way,
                });
            }
        }
        self.advance_all();
    }

    fn remember(&mut self, waiting: &Waiting) {
        let collapse = Some(waiting.collapse().cloned().into_iter().collect());
        self.had.push(Had {
            partition: waiting.partition,
            id: waiting.id,
            collapse,
        });
    }

    /// The cursor as it stands, in the form that goes over the wire. Nothing, until every partition has its place: a client that comes back
    /// with a cursor that names only some would begin the others anew.
    pub fn encode_cursor(&self, out: &mut String) {
        if !self.has_begun() {
            return;
        }
        let positions = self.partitions.iter().filter_map(|p| {
            Some(Position {
                partition: p.number,
                life: p.life?,
                low_water: p.low_water,
            })
        });
        let had = self.had.iter().map(|had| (had.partition, had.id));
        Cursor {
            positions: positions.collect(),
            had: had.collect(),
        }
        .encode(self.user(), out);
    }

    /// Moves the low-water mark to just below the lowest that waits, or to `seen`.
    fn advance(&mut self, partition: PartitionNumber) {
        let lowest = self.lanes.lowest(partition);
        let at = self.at_mut(partition);
        let mark = lowest.map_or(at.seen, |id| NotificationId(id.0 - 1));
        at.low_water = at.low_water.max(mark);
        let low_water = at.low_water;
        self.had
            .retain(|had| had.partition != partition || had.id > low_water);
    }

    fn advance_all(&mut self) {
        for at in 0..self.partitions.len() {
            self.advance(self.partitions[at].number);
        }
    }

    fn has_begun(&self) -> bool {
        self.partitions.iter().all(|p| p.life.is_some())
    }

    fn broker_now(&self, node_now_ms: u64) -> u64 {
        node_now_ms.saturating_add_signed(self.clock_offset_ms)
    }

    fn index(&self, partition: PartitionNumber) -> usize {
        self.partitions
            .iter()
            .position(|p| p.number == partition)
            .expect("streams have every partition of the node, and a node has no others")
    }

    fn at(&self, partition: PartitionNumber) -> &Partition {
        &self.partitions[self.index(partition)]
    }

    fn at_mut(&mut self, partition: PartitionNumber) -> &mut Partition {
        let at = self.index(partition);
        &mut self.partitions[at]
    }
}

impl Waiting {
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
