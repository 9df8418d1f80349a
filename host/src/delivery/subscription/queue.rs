//! The queues of one stream, one for each priority, drained from the urgent end. The caller bounds
//! them (see `subscription`).
//!
//! Order is kept within a queue. Notifications sent while lower ids of their partition are still
//! queued (*overtakers*) are limited, because the cursor must name each of them: see
//! [`PriorityQueue::pop`].

use std::collections::VecDeque;
use std::sync::Arc;

use crate::delivery::recipients::RouteMatch;
use crate::event::{NotificationId, PartitionNumber, Priority, StateKey};

use super::Record;

/// A queued notification, with the route by which it reached the user.
#[derive(Clone, Debug)]
pub(super) struct QueuedNotification {
    pub(super) partition: PartitionNumber,
    pub(super) id: NotificationId,
    pub(super) record: Arc<Record>,
    pub(super) route_match: RouteMatch,
}

impl QueuedNotification {
    pub(super) fn priority(&self) -> Priority {
        self.record.route(self.route_match.route).priority
    }

    /// See [`crate::event::Route::state`].
    pub(super) fn state(&self) -> Option<StateKey<'_>> {
        self.record.route(self.route_match.route).state()
    }

    pub(super) fn is_expired(&self, now_ms: u64) -> bool {
        self.record
            .route(self.route_match.route)
            .expires_ms
            .is_some_and(|expires| expires <= now_ms)
    }
}

#[derive(Debug, Default)]
pub(super) struct PriorityQueue {
    /// Indexed by priority, lowest first.
    by_priority: [VecDeque<QueuedNotification>; 4],
    n_bytes: usize,
}

impl PriorityQueue {
    /// Inserts a notification. Ids of a partition ascend within a queue, so it usually goes to the
    /// end.
    pub(super) fn push(&mut self, queued: QueuedNotification) {
        self.n_bytes += queued.record.n_bytes();
        let queue = &mut self.by_priority[queued.priority() as usize];
        let at = queue
            .iter()
            .position(|other| other.partition == queued.partition && other.id > queued.id);
        queue.insert(at.unwrap_or(queue.len()), queued);
    }

    pub(super) fn any(&self, is_meant: impl FnMut(&QueuedNotification) -> bool) -> bool {
        self.iter().any(is_meant)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_priority.iter().all(VecDeque::is_empty)
    }

    /// Bytes of all queued records. A record shared with other streams counts fully for each.
    pub(super) fn n_bytes(&self) -> usize {
        self.n_bytes
    }

    /// The number of queued notifications.
    pub(super) fn len(&self) -> usize {
        self.by_priority.iter().map(VecDeque::len).sum()
    }

    pub(super) fn n_of(&self, partition: PartitionNumber) -> usize {
        self.iter()
            .filter(|queued| queued.partition == partition)
            .count()
    }

    /// The urgent notifications of a partition, in order.
    pub(super) fn urgent(&self, partition: PartitionNumber) -> Vec<QueuedNotification> {
        self.by_priority[Priority::Urgent as usize]
            .iter()
            .filter(|queued| queued.partition == partition)
            .cloned()
            .collect()
    }

    pub(super) fn has_urgent(&self, partition: PartitionNumber) -> bool {
        self.by_priority[Priority::Urgent as usize]
            .iter()
            .any(|queued| queued.partition == partition)
    }

    /// The lowest queued id of a partition.
    pub(super) fn lowest(&self, partition: PartitionNumber) -> Option<NotificationId> {
        // Ids of a partition ascend within a queue, so its first entry in each queue is enough.
        self.by_priority
            .iter()
            .filter_map(|queue| queue.iter().find(|queued| queued.partition == partition))
            .map(|queued| queued.id)
            .min()
    }

    pub(super) fn retain(&mut self, keep: impl Fn(&QueuedNotification) -> bool) {
        for queue in &mut self.by_priority {
            queue.retain(|queued| {
                let stays = keep(queued);
                if !stays {
                    self.n_bytes -= queued.record.n_bytes();
                }
                stays
            });
        }
    }

    /// Removes and returns the expired notifications.
    pub(super) fn take_expired(&mut self, now_ms: u64) -> Vec<QueuedNotification> {
        let expired: Vec<QueuedNotification> = self
            .iter()
            .filter(|queued| queued.is_expired(now_ms))
            .cloned()
            .collect();
        if !expired.is_empty() {
            self.retain(|queued| !queued.is_expired(now_ms));
        }
        expired
    }

    /// Removes the next notification and returns it with whether it overtakes. Next is the head of
    /// the highest non-empty queue, or, if `may_overtake` is false, the highest-priority one that
    /// is the lowest of its partition. The latter always exists while anything is queued.
    pub(super) fn pop(&mut self, may_overtake: bool) -> Option<(QueuedNotification, bool)> {
        for priority in (0..self.by_priority.len()).rev() {
            for at in 0..self.by_priority[priority].len() {
                let queued = &self.by_priority[priority][at];
                let overtakes = self.lowest(queued.partition) != Some(queued.id);
                if overtakes && !may_overtake {
                    continue;
                }
                let taken = self.by_priority[priority].remove(at)?;
                self.n_bytes -= taken.record.n_bytes();
                return Some((taken, overtakes));
            }
        }
        None
    }

    fn iter(&self) -> impl Iterator<Item = &QueuedNotification> {
        self.by_priority.iter().flatten()
    }
}
