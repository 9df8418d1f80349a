//! Retention: the limits and windows that all nodes of an installation share.
//!
//! `config` reads them; the brokers apply them.

use serde::{Deserialize, Serialize};

use super::user::CursorOwner;

/// Limits and windows that every node of an installation must share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Retention {
    /// Notifications kept in the log of one user or group (1,000).
    pub log_entries: u32,
    /// Notifications kept in the log of all users (10,000).
    pub everyone_entries: u32,
    /// How long a notification is kept, in seconds (7 days; at least 10 minutes).
    pub max_age_s: u64,
    /// How long a source entry is kept after its outcome, in seconds (10 minutes), for operators to
    /// inspect. Ignored under memory pressure.
    pub keep_s: u64,
    /// The window in which a publisher's retry is recognised as a duplicate, in seconds (5
    /// minutes).
    pub dedupe_window_s: u64,
    /// Ids remembered per dedupe window (1,000,000). Beyond that, retries are no longer recognised;
    /// the ids that were not remembered are counted.
    pub dedupe_entries: u32,
    /// Dead letters kept (10,000). Trimmed dead letters are counted.
    pub dead_entries: u32,
    /// Decision records kept (100,000).
    pub decision_entries: u32,
    /// Unprocessed entries in a source at which `POST /v1/events` is rejected with 429 (1,000,000).
    pub backlog_entries: u64,
    /// How long a device cursor is kept after it last moved, in seconds (30 days). A read marker is
    /// kept for the age of notifications (`max_age_s`) plus 2 % if that is longer.
    pub device_cursor_ttl_s: u64,
    /// Acknowledged device cursors kept per user (32), and as many unacknowledged ones. Beyond
    /// that, the least recently moved cursor of the same kind is evicted.
    pub devices: u32,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            log_entries: 1_000,
            everyone_entries: 10_000,
            max_age_s: 7 * 24 * 3600,
            keep_s: 600,
            dedupe_window_s: 300,
            dedupe_entries: 1_000_000,
            dead_entries: 10_000,
            decision_entries: 100_000,
            backlog_entries: 1_000_000,
            device_cursor_ttl_s: 30 * 24 * 3600,
            devices: 32,
        }
    }
}

impl Retention {
    /// How long a device cursor or read marker is kept after it last moved, in milliseconds. A read
    /// marker is kept at least as long as any notification it can refer to.
    pub(crate) fn cursor_ttl_ms(&self, which: &CursorOwner) -> u64 {
        let age_s = match which {
            CursorOwner::Device(_) => self.device_cursor_ttl_s,
            CursorOwner::ReadMarker => self
                .device_cursor_ttl_s
                .max(self.max_age_s.saturating_add(self.max_age_s / 50)),
        };
        age_s.saturating_mul(1000)
    }
}
