//! Retention: the limits and windows that all nodes of an installation share.
//!
//! `config` reads them; the brokers apply them.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::user::{CursorOwner, RecipientLimits};
use crate::duration;

/// Limits and windows that every node of an installation must share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Retention {
    /// Notifications kept in the log of one user or group (1,000).
    pub log_entries: u32,
    /// Notifications kept in the log of all users (10,000).
    pub everyone_entries: u32,
    /// How long a notification is kept (7d; at least 10m).
    #[serde(with = "crate::duration")]
    pub max_age: Duration,
    /// How long a source entry is kept after its outcome (10m), for operators to inspect. Ignored
    /// under memory pressure.
    #[serde(with = "crate::duration")]
    pub processed_entries_ttl: Duration,
    /// The window in which a publisher's retry is recognised as a duplicate (5m).
    #[serde(with = "crate::duration")]
    pub dedupe_window: Duration,
    /// Ids remembered per dedupe window (1,000,000). Beyond that, retries are no longer recognised;
    /// the ids that were not remembered are counted.
    pub dedupe_entries: u32,
    /// Dead letters kept (10,000). Trimmed dead letters are counted.
    pub dead_letter_entries: u32,
    /// Decision records kept (100,000).
    pub decision_entries: u32,
    /// Unprocessed entries in a source at which `POST /v1/events` is rejected with 429 (1,000,000).
    /// Set by `limits.backlog_entries`; not a key of this section.
    #[serde(skip)]
    pub backlog_entries: u64,
    /// The largest entry that is read as a whole, in bytes of all its fields (262,144). Set by
    /// `ingest.max_event_bytes`; not a key of this section.
    #[serde(skip)]
    pub max_event_bytes: usize,
    /// Sources in Redis from which processed entries are not removed, because programs read them
    /// without a consumer group (none).
    pub untrimmed_sources: Vec<String>,
    /// How long a device cursor is kept after it last moved (30d). A read marker is kept for the
    /// age of notifications (`max_age`) plus 2 % if that is longer.
    #[serde(with = "crate::duration")]
    pub device_cursor_ttl: Duration,
    /// Acknowledged device cursors kept per user (32), and as many unacknowledged ones. Beyond
    /// that, the least recently moved cursor of the same kind is evicted.
    pub max_devices_per_user: u32,
    /// Current memberships of a user (1,000), and as many that ended within `max_age`. Set by
    /// `recipients.max_groups_per_user`; not a key of this section.
    #[serde(skip)]
    pub max_groups_per_user: u32,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            log_entries: 1_000,
            everyone_entries: 10_000,
            max_age: Duration::from_secs(7 * 24 * 3600),
            processed_entries_ttl: Duration::from_secs(600),
            dedupe_window: Duration::from_secs(300),
            dedupe_entries: 1_000_000,
            dead_letter_entries: 10_000,
            decision_entries: 100_000,
            untrimmed_sources: Vec::new(),
            backlog_entries: 1_000_000,
            max_event_bytes: 256 * 1024,
            device_cursor_ttl: Duration::from_secs(30 * 24 * 3600),
            max_devices_per_user: 32,
            max_groups_per_user: RecipientLimits::default().max_groups_per_user,
        }
    }
}

impl Retention {
    /// Whether processed entries of this source are removed.
    pub(crate) fn trims(&self, source: &str) -> bool {
        !self.untrimmed_sources.iter().any(|kept| kept == source)
    }

    /// How long a device cursor or read marker is kept after it last moved, in milliseconds. A read
    /// marker is kept at least as long as any notification it can refer to.
    pub(crate) fn cursor_ttl_ms(&self, which: &CursorOwner) -> u64 {
        let age = match which {
            CursorOwner::Device(_) => self.device_cursor_ttl,
            CursorOwner::ReadMarker => self
                .device_cursor_ttl
                .max(self.max_age.saturating_add(self.max_age / 50)),
        };
        duration::millis(age)
    }
}
