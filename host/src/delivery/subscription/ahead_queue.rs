//! Notifications that leave before lower ids of their partition: urgent ones that wait to be sent
//! ahead of a replay, and the ids that were sent ahead.
//!
//! Bounded: at most [`MAX_SENT_AHEAD`] over all partitions, because the cursor must name each id
//! that was sent ahead, or a client that resumes would receive it again. `subscription` decides
//! when one may be sent ahead.

use std::collections::VecDeque;

use crate::event::{Name, NotificationId, PartitionNumber, StateKey};

use super::cursor::{self, MAX_SENT_AHEAD, SentRoute};
use super::queue::QueuedNotification;
use super::record::Record;

#[derive(Debug, Default)]
pub(super) struct AheadQueue {
    sent: Vec<SentAhead>,
    /// Urgent notifications of partitions in replay. Their ids lie above `seen`.
    pending: VecDeque<QueuedNotification>,
}

/// An id above the low-water mark of its partition that was sent before lower ones.
#[derive(Clone, Debug)]
struct SentAhead {
    partition: PartitionNumber,
    id: NotificationId,
    route: SentRoute,
    collapse: CollapseKey,
}

/// The collapse key of the route by which a notification was sent ahead.
#[derive(Clone, Debug, PartialEq, Eq)]
enum CollapseKey {
    /// Only the cursor names the notification; its record has not been read since.
    Unread,
    Read(Option<OwnedStateKey>),
}

/// A [`StateKey`] that outlives its record.
#[derive(Clone, Debug, PartialEq, Eq)]
struct OwnedStateKey {
    slot: Option<Name>,
    key: Name,
}

impl OwnedStateKey {
    fn new(state: StateKey<'_>) -> Self {
        Self {
            slot: state.slot.cloned(),
            key: state.key.clone(),
        }
    }

    fn borrowed(&self) -> StateKey<'_> {
        StateKey {
            slot: self.slot.as_ref(),
            key: &self.key,
        }
    }
}

impl AheadQueue {
    /// Returns an empty queue with the ids that a cursor lists as sent ahead.
    pub(super) fn new(sent: impl Iterator<Item = cursor::SentAhead>) -> Self {
        let sent = sent.map(|sent| SentAhead {
            partition: sent.partition,
            id: sent.id,
            route: sent.route,
            collapse: CollapseKey::Unread,
        });
        Self {
            sent: sent.collect(),
            pending: VecDeque::new(),
        }
    }

    /// The ids sent ahead, for the cursor.
    pub(super) fn sent(&self) -> impl Iterator<Item = cursor::SentAhead> {
        self.sent.iter().map(|sent| cursor::SentAhead {
            partition: sent.partition,
            id: sent.id,
            route: sent.route,
        })
    }

    /// Whether the cursor has room for one more id that is sent ahead.
    pub(super) fn may_send(&self) -> bool {
        self.sent.len() < MAX_SENT_AHEAD
    }

    /// Whether one more notification can wait: each that waits will need room in the cursor.
    pub(super) fn has_room(&self) -> bool {
        self.sent.len() + self.pending.len() < MAX_SENT_AHEAD
    }

    pub(super) fn was_sent(&self, partition: PartitionNumber, id: NotificationId) -> bool {
        self.sent_in(partition).any(|sent| sent.id == id)
    }

    /// Whether the id was sent ahead or waits to be.
    pub(super) fn contains(&self, partition: PartitionNumber, id: NotificationId) -> bool {
        let is_pending =
            |queued: &QueuedNotification| queued.partition == partition && queued.id == id;
        self.was_sent(partition, id) || self.pending.iter().any(is_pending)
    }

    /// Whether a later notification with this collapse key was sent ahead.
    pub(super) fn supersedes(
        &self,
        partition: PartitionNumber,
        id: NotificationId,
        key: StateKey<'_>,
    ) -> bool {
        self.sent_in(partition).any(|sent| {
            sent.id > id
                && matches!(&sent.collapse, CollapseKey::Read(Some(of_sent)) if of_sent.borrowed() == key)
        })
    }

    pub(super) fn highest_sent(&self, partition: PartitionNumber) -> Option<NotificationId> {
        self.sent_in(partition).map(|sent| sent.id).max()
    }

    /// The ids sent ahead whose records have not been read since: their collapse keys are unknown.
    pub(super) fn unread(&self, partition: PartitionNumber) -> Vec<NotificationId> {
        self.sent_in(partition)
            .filter(|sent| sent.collapse == CollapseKey::Unread)
            .map(|sent| sent.id)
            .collect()
    }

    /// Records the collapse key of an id sent ahead, given its record. `None`: the record is gone.
    pub(super) fn set_record(
        &mut self,
        partition: PartitionNumber,
        id: NotificationId,
        record: Option<&Record>,
    ) {
        if let Some(sent) = self
            .sent
            .iter_mut()
            .find(|sent| sent.partition == partition && sent.id == id)
        {
            // A client may send a cursor with an index that the plan does not have.
            let route = record
                .zip(sent.route.index())
                .and_then(|(record, index)| record.notification().plan.routes.get(index));
            sent.collapse =
                CollapseKey::Read(route.and_then(|route| route.state().map(OwnedStateKey::new)));
        }
    }

    /// Records that a notification is sent ahead.
    pub(super) fn note_sent(&mut self, queued: &QueuedNotification) {
        self.sent.push(SentAhead {
            partition: queued.partition,
            id: queued.id,
            route: SentRoute::new(queued.route_match.route),
            collapse: CollapseKey::Read(queued.state().map(OwnedStateKey::new)),
        });
    }

    /// Forgets the ids that the low-water mark has reached: the cursor cannot name them.
    pub(super) fn forget_up_to(&mut self, partition: PartitionNumber, low_water: NotificationId) {
        self.sent
            .retain(|sent| sent.partition != partition || sent.id > low_water);
    }

    /// Forgets the ids that did not survive an epoch: they will be issued again.
    pub(super) fn forget_above(&mut self, partition: PartitionNumber, bound: NotificationId) {
        self.sent
            .retain(|sent| sent.partition != partition || sent.id <= bound);
    }

    /// Whether nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// Bytes of the records that wait.
    pub(super) fn n_bytes(&self) -> usize {
        let n_bytes = |queued: &QueuedNotification| queued.record.n_bytes();
        self.pending.iter().map(n_bytes).sum()
    }

    pub(super) fn push(&mut self, queued: QueuedNotification) {
        self.pending.push_back(queued);
    }

    /// The next notification to send ahead.
    pub(super) fn first(&self) -> Option<&QueuedNotification> {
        self.pending.front()
    }

    pub(super) fn pop(&mut self) -> Option<QueuedNotification> {
        self.pending.pop_front()
    }

    /// Removes and returns one that waits and has this id or a lower one.
    pub(super) fn pop_up_to(
        &mut self,
        partition: PartitionNumber,
        id: NotificationId,
    ) -> Option<QueuedNotification> {
        let at = self
            .pending
            .iter()
            .position(|queued| queued.partition == partition && queued.id <= id)?;
        self.pending.remove(at)
    }

    pub(super) fn remove(&mut self, partition: PartitionNumber, id: NotificationId) {
        self.pending
            .retain(|queued| queued.partition != partition || queued.id != id);
    }

    pub(super) fn clear(&mut self, partition: PartitionNumber) {
        self.pending.retain(|queued| queued.partition != partition);
    }

    /// Puts urgent notifications of a partition before those that wait already. Returns `false` if
    /// the last ones found no room.
    pub(super) fn put_first(
        &mut self,
        partition: PartitionNumber,
        mut urgent: Vec<QueuedNotification>,
    ) -> bool {
        urgent.extend(
            self.pending
                .iter()
                .filter(|queued| queued.partition == partition)
                .cloned(),
        );
        // Removed before the room is counted: they are in `urgent` now.
        self.clear(partition);
        let room = MAX_SENT_AHEAD.saturating_sub(self.sent.len() + self.pending.len());
        let all_fit = urgent.len() <= room;
        urgent.truncate(room);
        self.pending.extend(urgent);
        all_fit
    }

    /// Once any of those that wait has expired, passes all of them through `renew` and drops those
    /// for which it returns `None`.
    pub(super) fn expire(
        &mut self,
        now_ms: u64,
        renew: impl FnMut(QueuedNotification) -> Option<QueuedNotification>,
    ) {
        if self.pending.iter().any(|queued| queued.is_expired(now_ms)) {
            self.pending = std::mem::take(&mut self.pending)
                .into_iter()
                .filter_map(renew)
                .collect();
        }
    }

    fn sent_in(&self, partition: PartitionNumber) -> impl Iterator<Item = &SentAhead> {
        self.sent
            .iter()
            .filter(move |sent| sent.partition == partition)
    }

    #[cfg(test)]
    pub(super) fn n_pending(&self) -> usize {
        self.pending.len()
    }
}
