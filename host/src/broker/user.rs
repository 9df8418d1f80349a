//! Changes to the data of a user, and their limits: attributes, memberships, device cursors and the
//! read marker.
//!
//! [`crate::event::Recipient`] is the stored data itself.

use serde::{Deserialize, Serialize};

use crate::event::Name;
use crate::event::criteria::Attributes;

/// The `[recipients]` section: limits that every node of an installation must share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RecipientLimits {
    /// Groups that a user may be a member of (1,000), and as many that the user left within
    /// `retention.max_age`: their notifications can still be delivered.
    pub max_groups_per_user: u32,
}

impl Default for RecipientLimits {
    fn default() -> Self {
        Self {
            max_groups_per_user: 1_000,
        }
    }
}

/// The limit by which a membership is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupLimit {
    /// Of the groups that the user is a member of.
    Joined,
    /// Of the groups that the user left and whose notifications are still kept.
    Left,
}

impl GroupLimit {
    /// Why a membership is refused at a limit of `most` groups.
    pub fn reason(self, most: u32) -> String {
        match self {
            Self::Joined => format!("the user is a member of {most} groups, which is the limit"),
            Self::Left => format!(
                "the user left {most} groups whose notifications are still kept, which is the limit"
            ),
        }
    }

    pub fn fix(self) -> &'static str {
        match self {
            Self::Joined => "remove a membership, or raise recipients.max_groups_per_user",
            Self::Left => {
                "wait until some have expired (retention.max_age), or raise recipients.max_groups_per_user"
            }
        }
    }
}

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
