//! Changes to the data of a user: attributes, memberships, device cursors and the read marker.
//!
//! [`crate::event::Recipient`] is the stored data itself.

use serde::{Deserialize, Serialize};

use crate::event::Name;
use crate::event::criteria::Attributes;

/// A change to a user's attributes or memberships.
#[derive(Clone, Debug)]
pub enum RecipientChange {
    Join {
        group: Name,
    },
    Leave {
        group: Name,
    },
    /// Replaces all attributes.
    Attributes(Attributes),
}

/// Identifies one of a user's stored cursors.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CursorOwner {
    /// The device cursor: the position of one of the user's devices.
    Device(Name),
    /// The read marker: the position up to which the user has read, on any device.
    ReadMarker,
}

/// A position in a user's notifications that outlives streams.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredCursor {
    /// The cursor in its client-visible form. A broker does not parse it: comparing two cursors
    /// requires the epochs of the partitions.
    pub cursor: String,
    /// `false` if the device never acknowledged this position; it is where the device's first
    /// stream began.
    pub is_acknowledged: bool,
}
