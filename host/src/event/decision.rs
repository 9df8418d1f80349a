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
    /// Why the event was dead-lettered or is retried, including cases in which no plugin was called.
    /// Empty for every other outcome.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// The attempts at the event, if a plugin requested a retry. The broker adds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<Retry>,
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

/// The attempts at an event for which a plugin requested a retry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retry {
    /// How often the event was tried, including the attempt that this decision is about.
    pub attempts: u32,
    /// When the next attempt is due, in milliseconds since the Unix epoch; absent after the last
    /// one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub due_ms: Option<u64>,
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
    pub verdict: VerdictKind,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

/// The kind of a verdict, written in lower case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VerdictKind {
    /// A filter left the event as it was.
    Keep,
    /// A filter changed the event.
    Amend,
    /// A filter discarded the event.
    Drop,
    /// A router returned routes.
    Routes,
    /// A router returned no routes.
    None,
    /// Not called: the plugin does not handle this event type.
    Skipped,
    /// The plugin itself rejected the event.
    Rejected,
    /// The plugin itself requested a retry.
    Retry,
    /// The plugin failed, or was not called because it had failed too often.
    Failed,
    /// A kind of another version of this program. Keeps its record readable; the word is lost if
    /// the record is written again.
    #[serde(other)]
    Unknown,
}

impl VerdictKind {
    /// The word in records, in answers of the API and in logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Amend => "amend",
            Self::Drop => "drop",
            Self::Routes => "routes",
            Self::None => "none",
            Self::Skipped => "skipped",
            Self::Rejected => "rejected",
            Self::Retry => "retry",
            Self::Failed => "failed",
            Self::Unknown => "unknown",
        }
    }
}

/// Why an entry is dead-lettered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeadReason {
    pub reason: String,
    /// The plugin that caused it, if any.
    pub plugin: Option<String>,
    /// How often the entry was tried; of a listed dead letter, with the attempts at the entries
    /// before its retries.
    pub attempts: u32,
    /// The original fields of the entry.
    #[serde(skip)]
    pub fields: Vec<(Bytes, Bytes)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdict_kinds_are_written_as_their_words() {
        for kind in [
            VerdictKind::Keep,
            VerdictKind::Amend,
            VerdictKind::Drop,
            VerdictKind::Routes,
            VerdictKind::None,
            VerdictKind::Skipped,
            VerdictKind::Rejected,
            VerdictKind::Retry,
            VerdictKind::Failed,
            VerdictKind::Unknown,
        ] {
            let word = serde_json::to_string(&kind).unwrap();
            assert_eq!(word, format!("\"{}\"", kind.as_str()));
            assert_eq!(serde_json::from_str::<VerdictKind>(&word).unwrap(), kind);
        }
    }

    #[test]
    fn a_record_with_a_verdict_of_another_version_stays_readable() {
        let record = r#"{"event_id":"e","event_source":"s","event_type":"t","clock_ms":1,"verdicts":[
            {"plugin":"p","generation":1,"verdict":"keep"},
            {"plugin":"q","generation":2,"verdict":"postponed","reason":"it is night"}]}"#;
        let decision: Decision = serde_json::from_str(record).unwrap();
        let kinds = decision.verdicts.iter().map(|verdict| verdict.verdict);
        assert!(kinds.eq([VerdictKind::Keep, VerdictKind::Unknown]));
        assert_eq!(decision.verdicts[1].reason, "it is night");
    }
}
