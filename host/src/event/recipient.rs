//! Recipients: a user's attributes and memberships, by which conditions of routes are judged.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::criteria::Attributes;
use super::{Name, NotificationId, PartitionNumber};

/// The stored attributes and memberships of a user.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Recipient {
    pub attributes: Attributes,
    /// By group, then by partition.
    pub groups: BTreeMap<Name, BTreeMap<PartitionNumber, Span>>,
}

/// A user's membership of a group in one partition. Expressed in ids rather than times, because
/// logs are ordered by id.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// The member sees ids above this one ...
    pub joined: NotificationId,
    /// ... up to and including this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left: Option<NotificationId>,
}
