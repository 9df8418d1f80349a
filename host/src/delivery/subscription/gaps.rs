//! Gaps: stretches of history of which something may be missing, queued until the client is
//! informed. Bounded: gaps that exceed the bound are merged.

use std::collections::VecDeque;

use crate::event::{NotificationId, PartitionNumber};

/// The most gaps queued; further ones are merged where partition and reason agree.
const MAX_GAPS: usize = 8;

/// Why history is incomplete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GapReason {
    /// History no longer reaches back that far.
    Trimmed,
    /// The broker lost a tail in a fail-over or was replaced; later notifications may repeat.
    Rewound,
    /// The client named an unreadable position; it receives notifications from now on.
    Unknown,
}

impl GapReason {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Trimmed => "trimmed",
            Self::Rewound => "rewound",
            Self::Unknown => "unknown",
        }
    }
}

/// A stretch of history, above `from` up to and including `to`, of which something may be missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    pub partition: PartitionNumber,
    pub reason: GapReason,
    pub from: NotificationId,
    pub to: NotificationId,
}

/// Gaps in the order in which they were detected.
#[derive(Debug, Default)]
pub(super) struct Gaps(VecDeque<Gap>);

impl Gaps {
    pub(super) fn push(&mut self, gap: Gap) {
        let is_full = self.0.len() >= MAX_GAPS;
        match self
            .0
            .iter_mut()
            .find(|known| known.partition == gap.partition && known.reason == gap.reason)
        {
            Some(known) if is_full => {
                known.from = known.from.min(gap.from);
                known.to = known.to.max(gap.to);
            }
            _ => self.0.push_back(gap),
        }
    }

    pub(super) fn pop(&mut self) -> Option<Gap> {
        self.0.pop_front()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
