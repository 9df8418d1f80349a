//! How a node reads logs: page by page, and live through its feed.
//!
//! A feed may lose notices, and a [`Notice::Reset`] reports this. The hub then reads pages.

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::event::{Epoch, Name, NotificationId, PartitionNumber, Target};

/// A range of a log.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// Ids above the requested one, ascending. Each comes with its predecessor in this log when it
    /// was written, or the floor at that time.
    pub entries: Vec<(NotificationId, NotificationId)>,
    /// Whether the log exists. Also `false` if everything above the requested id is older than the
    /// retention.
    pub is_present: bool,
    /// Whether no further entries follow.
    pub is_last: bool,
    /// The floor, read atomically with the entries.
    pub floor: NotificationId,
}

/// A message of the feed. The broker publishes them in commit order.
#[derive(Clone, Debug)]
pub enum Notice {
    /// `id` was appended to the log of `target`. Small records are included.
    Append {
        partition: PartitionNumber,
        target: Target,
        epoch: Epoch,
        id: NotificationId,
        record: Option<Bytes>,
    },
    /// All notices of this partition up to `last` precede this one.
    Tick {
        partition: PartitionNumber,
        epoch: Epoch,
        last: NotificationId,
    },
    /// The broker is up but cannot write. Shows that it answers, and advances nothing.
    Alive { partition: PartitionNumber },
    /// Memberships or attributes of the user changed. Published in every partition before the
    /// change is acknowledged, so that in each partition it precedes the notices of later events.
    RecipientChanged {
        partition: PartitionNumber,
        user: Name,
    },
    /// The follow request with this token is in effect: all later appends are delivered.
    Following { token: u64 },
    /// The connection to the broker was lost and re-established, or notices were dropped. All
    /// earlier follow requests are void and must be repeated.
    Reset { partitions: Vec<PartitionNumber> },
}

/// A request to the feed.
#[derive(Clone, Debug)]
pub enum Follow {
    /// Deliver the appends to this log. Answered by [`Notice::Following`].
    Start {
        partition: PartitionNumber,
        target: Target,
        token: u64,
    },
    Stop {
        partition: PartitionNumber,
        target: Target,
    },
    /// No notice arrived for too long: drop the connection of this partition and open another one.
    /// Answered by [`Notice::Reset`].
    Reconnect { partition: PartitionNumber },
}

/// The notice connection of a node to the broker. Dropping it closes it. Ticks and recipient
/// changes of all partitions arrive without a follow request.
#[derive(Debug)]
pub struct Feed {
    /// Never blocks the hub. Unbounded, because the number of streams on the node bounds its
    /// length.
    pub follow: mpsc::UnboundedSender<Follow>,
    /// In batches, to save channel operations. Bounded: while it is full, the feed stops reading
    /// its socket, or drops notices and sends a [`Notice::Reset`].
    pub notices: mpsc::Receiver<Vec<Notice>>,
}
