//! One partition of a subscription: its marks, and whether it replays or is live.
//!
//! While it replays, live notices wait in a bounded buffer. A buffer that overflows is emptied, and
//! the partition replays once more at the end, so that no notice is missing. The module knows
//! neither queues nor routes.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::event::{Epoch, NotificationId, PartitionNumber};

use super::{MAX_BYTES, MAX_LIVE, Record};

/// A live notice that waits for the end of a replay.
pub(super) type BufferedNotice = (Epoch, NotificationId, Arc<Record>);

#[derive(Debug)]
pub(super) struct PartitionState {
    pub(super) number: PartitionNumber,
    /// `None` until the first head is read; never `None` again after that.
    pub(super) epoch: Option<Epoch>,
    pub(super) low_water: NotificationId,
    pub(super) seen: NotificationId,
    pub(super) phase: Phase,
    /// Incremented by each [`PartitionState::enter_replay`]. A replay that holds an older round is
    /// obsolete and stops.
    pub(super) round: u64,
    /// Until the partition is live, trimmed history up to this id is not announced: the client
    /// requested the earliest that is kept, or a gap has already covered it.
    pub(super) expects_nothing_to: NotificationId,
    pub(super) has_gap: bool,
}

#[derive(Debug)]
pub(super) enum Phase {
    Replay(ReplayBuffer),
    Live,
}

#[derive(Debug)]
pub(super) struct ReplayBuffer {
    pub(super) notices: VecDeque<BufferedNotice>,
    n_bytes: usize,
    pub(super) is_overflowed: bool,
    /// Every urgent notification above the low-water mark was sent or waits to be sent ahead, so
    /// that the next one may be sent ahead without overtaking another urgent one.
    pub(super) knows_urgent: bool,
}

impl PartitionState {
    /// Returns a partition in replay. `position` is its position in the cursor, if it has one.
    pub(super) fn new(number: PartitionNumber, position: Option<(Epoch, NotificationId)>) -> Self {
        Self {
            number,
            epoch: position.map(|(epoch, _)| epoch),
            low_water: position.map_or(NotificationId(0), |(_, low_water)| low_water),
            seen: NotificationId(0),
            phase: Phase::Replay(ReplayBuffer::new(false)),
            round: 0,
            expects_nothing_to: NotificationId(0),
            has_gap: false,
        }
    }

    pub(super) fn is_live(&self) -> bool {
        matches!(self.phase, Phase::Live)
    }

    /// Returns to replay from the low-water mark. Returns the new round.
    pub(super) fn enter_replay(&mut self, knows_urgent: bool) -> u64 {
        self.seen = self.low_water;
        self.phase = Phase::Replay(ReplayBuffer::new(knows_urgent));
        self.round += 1;
        self.round
    }

    /// Goes live. Returns the buffer of the replay; `None` if the partition was live already.
    pub(super) fn go_live(&mut self) -> Option<ReplayBuffer> {
        match std::mem::replace(&mut self.phase, Phase::Live) {
            Phase::Replay(buffer) => Some(buffer),
            Phase::Live => None,
        }
    }

    /// The number of notices in the buffer of the replay.
    pub(super) fn n_buffered(&self) -> usize {
        match &self.phase {
            Phase::Replay(buffer) => buffer.notices.len(),
            Phase::Live => 0,
        }
    }

    /// The bytes of their records.
    pub(super) fn n_buffered_bytes(&self) -> usize {
        match &self.phase {
            Phase::Replay(buffer) => buffer.n_bytes,
            Phase::Live => 0,
        }
    }

    /// The buffer of the replay; `None` if the partition is live.
    pub(super) fn buffer_mut(&mut self) -> Option<&mut ReplayBuffer> {
        match &mut self.phase {
            Phase::Replay(buffer) => Some(buffer),
            Phase::Live => None,
        }
    }

    /// From now on an urgent notification may have to precede the next one.
    pub(super) fn forget_urgent(&mut self) {
        if let Some(buffer) = self.buffer_mut() {
            buffer.knows_urgent = false;
        }
    }
}

impl ReplayBuffer {
    fn new(knows_urgent: bool) -> Self {
        Self {
            notices: VecDeque::new(),
            n_bytes: 0,
            is_overflowed: false,
            knows_urgent,
        }
    }

    /// Appends a notice, unless the buffer is full or may not hold more.
    pub(super) fn push(
        &mut self,
        epoch: Epoch,
        id: NotificationId,
        record: &Arc<Record>,
        may_hold: bool,
    ) {
        if self.notices.len() >= MAX_LIVE || self.n_bytes > MAX_BYTES || !may_hold {
            // Replaying again at the end, not at once, guarantees progress.
            self.is_overflowed = true;
            self.notices = VecDeque::new();
            self.n_bytes = 0;
        }
        if !self.is_overflowed {
            self.n_bytes += record.n_bytes();
            self.notices.push_back((epoch, id, Arc::clone(record)));
        }
    }
}
