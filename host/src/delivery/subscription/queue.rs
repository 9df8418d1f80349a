//! The queues of one stream, one for each priority, drained from the urgent end. The caller bounds
//! them (see `subscription`).
//!
//! Order is kept within a queue. Notifications sent while lower ids of their partition are still
//! queued (*overtakers*) are limited, because the cursor must name each of them: see
//! [`PriorityQueue::pop`].

use std::collections::VecDeque;
use std::sync::Arc;

use crate::delivery::recipients::RouteMatch;
use crate::event::{Name, NotificationId, PartitionNumber, Priority};

use super::Record;

/// A queued notification, with the route by which it reached the user.
#[derive(Clone, Debug)]
pub(super) struct QueuedNotification {
    pub(super) partition: PartitionNumber,
    pub(super) id: NotificationId,
    pub(super) record: Arc<Record>,
    pub(super) way: RouteMatch,
}

impl QueuedNotification {
    pub(super) fn priority(&self) -> Priority {
        self.record.route(self.way.route).priority
    }

    pub(super) fn collapse(&self) -> Option<&Name> {
        self.record.route(self.way.route).collapse.as_ref()
    }

    pub(super) fn is_expired(&self, now_ms: u64) -> bool {
        self.record
            .route(self.way.route)
            .expires_ms
            .is_some_and(|expires| expires <= now_ms)
    }
}

#[derive(Debug, Default)]
pub(super) struct PriorityQueue {
    /// Indexed by priority, lowest first.
    queue: [VecDeque<QueuedNotification>; 4],
    n_bytes: usize,
}

impl PriorityQueue {
    /// Inserts a notification. Ids of a partition ascend within a queue, so it usually goes to the
    /// end.
    pub(super) fn push(&mut self, waiting: QueuedNotification) {
        self.n_bytes += waiting.record.n_bytes();
        let lane = &mut self.queue[waiting.priority() as usize];
        let at = lane
            .iter()
            .position(|other| other.partition == waiting.partition && other.id > waiting.id);
        lane.insert(at.unwrap_or(lane.len()), waiting);
    }

    pub(super) fn any(&self, is_meant: impl FnMut(&QueuedNotification) -> bool) -> bool {
        self.iter().any(is_meant)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.iter().all(VecDeque::is_empty)
    }

    /// Bytes of all queued records. A record shared with other streams counts fully for each.
    pub(super) fn n_bytes(&self) -> usize {
        self.n_bytes
    }

    pub(super) fn n_of(&self, partition: PartitionNumber) -> usize {
        self.iter()
            .filter(|waiting| waiting.partition == partition)
            .count()
    }

    /// The urgent notifications of a partition, in order.
    pub(super) fn urgent(&self, partition: PartitionNumber) -> Vec<QueuedNotification> {
        self.queue[Priority::Urgent as usize]
            .iter()
            .filter(|waiting| waiting.partition == partition)
            .cloned()
            .collect()
    }

    pub(super) fn has_urgent(&self, partition: PartitionNumber) -> bool {
        self.queue[Priority::Urgent as usize]
            .iter()
            .any(|waiting| waiting.partition == partition)
    }

    /// The lowest queued id of a partition.
    pub(super) fn lowest(&self, partition: PartitionNumber) -> Option<NotificationId> {
        // Ids of a partition ascend within a queue, so its first entry in each queue is enough.
        self.queue
            .iter()
            .filter_map(|lane| lane.iter().find(|waiting| waiting.partition == partition))
            .map(|waiting| waiting.id)
            .min()
    }

    pub(super) fn retain(&mut self, keep: impl Fn(&QueuedNotification) -> bool) {
        for lane in &mut self.queue {
            lane.retain(|waiting| {
                let stays = keep(waiting);
                if !stays {
                    self.n_bytes -= waiting.record.n_bytes();
                }
                stays
            });
        }
    }

    /// Removes and returns the expired notifications.
    pub(super) fn take_expired(&mut self, now_ms: u64) -> Vec<QueuedNotification> {
        let expired: Vec<QueuedNotification> = self
            .iter()
            .filter(|waiting| waiting.is_expired(now_ms))
            .cloned()
            .collect();
        if !expired.is_empty() {
            self.retain(|waiting| !waiting.is_expired(now_ms));
        }
        expired
    }

    /// Removes the next notification and returns it with whether it overtakes. Next is the head of
    /// the highest non-empty queue, or, if `may_overtake` is false, the highest-priority one that
    /// is the lowest of its partition. The latter always exists while anything is queued.
    pub(super) fn pop(&mut self, may_overtake: bool) -> Option<(QueuedNotification, bool)> {
        for at in (0..self.queue.len()).rev() {
            for place in 0..self.queue[at].len() {
                let waiting = &self.queue[at][place];
                let overtakes = self.lowest(waiting.partition) != Some(waiting.id);
                if overtakes && !may_overtake {
                    continue;
                }
                let taken = self.queue[at].remove(place)?;
                self.n_bytes -= taken.record.n_bytes();
                return Some((taken, overtakes));
            }
        }
        None
    }

    fn iter(&self) -> impl Iterator<Item = &QueuedNotification> {
        self.queue.iter().flatten()
    }
}
