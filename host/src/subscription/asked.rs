//! What a client asks for: where its stream begins, and what of its own it wants to see.

use crate::event::{Notification, Priority, Route};

use super::cursor::Cursor;

/// Where a stream begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// Where this client left off.
    Cursor(Cursor),
    /// With what is committed from now on.
    Latest,
    /// With everything that is still kept.
    Earliest,
    /// With what was committed since this moment, in milliseconds since the Unix epoch.
    Since(u64),
    /// As [`Start::Latest`], but the client named a place that nobody knows, and is told so.
    Unknown,
}

/// What a client wants to see of what is its.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Event types, exact or ending in `*`; empty means all.
    pub types: Vec<String>,
    pub min_priority: Option<Priority>,
}

impl Filter {
    /// Whether it leaves out nothing.
    pub fn is_all(&self) -> bool {
        self.types.is_empty() && self.min_priority.is_none()
    }

    pub(super) fn passes(&self, notification: &Notification, route: &Route) -> bool {
        let kind = notification.event.kind.as_str();
        let is_type = |pattern: &String| pattern.strip_suffix('*').map_or(pattern == kind, |prefix| kind.starts_with(prefix));
        (self.types.is_empty() || self.types.iter().any(is_type)) && self.min_priority.is_none_or(|min| route.priority >= min)
    }
}
