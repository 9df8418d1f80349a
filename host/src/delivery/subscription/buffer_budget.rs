//! The bytes that the streams of a node may hold together: the records in their queues, and those
//! of the notices that wait for the end of a replay.
//!
//! Above half of the budget, replays fill the queues of a stream only up to half of its fair share;
//! above all of it, live notices stay within the fair share as well, and the streams that hold most
//! return to replay (see `hub`), which reads again what they drop. A stream below its fair share is
//! never limited, so that clients that read do not wait for those that do not. One notification
//! always fits. A record counts fully for each stream that holds it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use tokio::sync::Notify;

/// The fair share of a stream is at least this, or a sixteenth of a budget that is small.
const LEAST_SHARE: usize = 16 * 1024;

/// A cheap handle: clones share one budget.
#[derive(Clone, Debug)]
pub struct BufferBudget(Arc<BudgetInner>);

#[derive(Debug)]
struct BudgetInner {
    max_bytes: usize,
    n_bytes: AtomicUsize,
    n_streams: AtomicUsize,
    exceeded: Notify,
}

impl BufferBudget {
    pub fn new(max_bytes: usize) -> Self {
        Self(Arc::new(BudgetInner {
            max_bytes,
            n_bytes: AtomicUsize::new(0),
            n_streams: AtomicUsize::new(0),
            exceeded: Notify::new(),
        }))
    }

    /// A budget that limits nothing.
    pub fn unlimited() -> Self {
        Self::new(usize::MAX)
    }

    /// The bytes held now.
    pub fn n_bytes(&self) -> usize {
        self.0.n_bytes.load(Relaxed)
    }

    /// Waits until the budget is exceeded. May be cancelled.
    pub async fn exceeded(&self) {
        self.0.exceeded.notified().await;
    }

    /// Whether so much is free that streams need not return to replay.
    pub fn is_relieved(&self) -> bool {
        self.n_bytes() <= self.0.max_bytes / 4 * 3
    }

    /// The bytes that each stream may hold whatever the others hold.
    pub fn fair_share(&self) -> usize {
        let n_streams = self.0.n_streams.load(Relaxed).max(1);
        let least = (self.0.max_bytes / 16).min(LEAST_SHARE);
        (self.0.max_bytes / n_streams).max(least)
    }

    /// The share of a new stream.
    pub(super) fn share(&self) -> BufferShare {
        self.0.n_streams.fetch_add(1, Relaxed);
        BufferShare {
            budget: self.clone(),
            n_bytes: 0,
        }
    }
}

/// The part of the budget that one stream holds, until it is dropped.
#[derive(Debug)]
pub(super) struct BufferShare {
    budget: BufferBudget,
    n_bytes: usize,
}

impl BufferShare {
    /// Sets the bytes that the stream holds.
    pub(super) fn settle(&mut self, n_bytes: usize) {
        if n_bytes == self.n_bytes {
            return;
        }
        let budget = &self.budget.0;
        budget.n_bytes.fetch_add(n_bytes, Relaxed);
        budget.n_bytes.fetch_sub(self.n_bytes, Relaxed);
        let has_grown = n_bytes > self.n_bytes;
        self.n_bytes = n_bytes;
        if has_grown && self.budget.n_bytes() > budget.max_bytes {
            budget.exceeded.notify_one();
        }
    }

    /// The bytes up to which a replay may fill the queues.
    pub(super) fn replay_limit(&self) -> usize {
        if self.budget.n_bytes() <= self.budget.0.max_bytes / 2 {
            usize::MAX
        } else {
            self.budget.fair_share() / 2
        }
    }

    /// The bytes up to which live notices may fill the queues and the buffers.
    pub(super) fn live_limit(&self) -> usize {
        if self.budget.n_bytes() <= self.budget.0.max_bytes {
            usize::MAX
        } else {
            self.budget.fair_share()
        }
    }
}

impl Drop for BufferShare {
    fn drop(&mut self) {
        self.budget.0.n_bytes.fetch_sub(self.n_bytes, Relaxed);
        self.budget.0.n_streams.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn above_the_budget_each_stream_has_its_fair_share_and_a_closed_one_frees_its_bytes() {
        let budget = BufferBudget::new(1_000_000);
        let (mut large, mut small) = (budget.share(), budget.share());
        large.settle(400_000);
        assert_eq!(small.replay_limit(), usize::MAX);
        large.settle(900_000);
        assert_eq!(
            (small.replay_limit(), small.live_limit()),
            (250_000, usize::MAX)
        );
        small.settle(200_000);
        assert_eq!(small.live_limit(), 500_000);
        assert!(!budget.is_relieved());
        drop(large);
        assert!(budget.is_relieved() && budget.n_bytes() == 200_000);
        assert_eq!(small.live_limit(), usize::MAX);
    }
}
