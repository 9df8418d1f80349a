//! Decisions: the verdict of each plugin on an event, and why the event became what it became.
//!
//! Stored by the broker with the outcome, shown by `explain` and compared by backtests.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::EntryId;

/// A decision record: why an event got its outcome.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// CloudEvents `id`, `source` and `type`; each is empty if it could not be read.
    pub event_id: String,
    pub event_source: String,
    pub event_type: String,
    /// In the order in which the plugins ran.
    pub verdicts: Vec<Verdict>,
    /// Why the event was dead-lettered, including cases in which no plugin was called. Empty for
    /// every other outcome.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// The clock that the plugins were given, in milliseconds since the Unix epoch.
    pub clock_ms: u64,
}

impl Decision {
    /// Whether this is the decision about the event with this id. An entry that could not be read
    /// as an event has no event id, so its entry id matches as well.
    pub fn is_about(&self, entry: EntryId, event_id: &str) -> bool {
        self.event_id == event_id || event_id.parse().is_ok_and(|id: EntryId| id == entry)
    }
}

/// The result of one plugin call.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    pub plugin: String,
    /// The plugin's generation. Each node counts its own, from 1 at its start.
    pub generation: u64,
    /// The first 12 hex digits of the SHA-256 of the generation's file, which are the same on every
    /// node. Empty in records written by an earlier version.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub hash: String,
    /// `keep`, `amend`, `drop`, `routes`, `none`, `skipped` (the plugin does not handle this event
    /// type), `rejected` or `retry` (returned by the plugin itself), or `failed`.
    pub verdict: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

/// Why an entry is dead-lettered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeadReason {
    pub reason: String,
    /// The plugin that caused it, if any.
    pub plugin: Option<String>,
    /// How often the entry was tried.
    pub attempts: u32,
    /// The original fields of the entry.
    #[serde(skip)]
    pub fields: Vec<(Bytes, Bytes)>,
}
