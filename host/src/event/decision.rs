//! Decisions: the verdict of each plugin on an event, and why the event became what it became.
//!
//! Stored by the broker with the outcome, shown by `explain` and compared by backtests.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{EntryId, NotificationId, Outcome};

/// A decision record: why an event got its outcome.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// CloudEvents `id`, `source` and `type`; each is empty if it could not be read.
    pub event_id: String,
    pub event_source: String,
    pub event_type: String,
    /// In the order in which the plugins ran. A record lists the plugins that were called; see
    /// [`Decision::add_skipped`] for the others.
    pub verdicts: Vec<Verdict>,
    /// The id of the chain that the event was evaluated by: equal for equal chains on all nodes.
    /// Empty if no plugin was called, and in records written by an earlier version.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub chain: String,
    /// The members of that chain. Only in some records, because it may be long: see `ingest`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub members: Option<ChainMembers>,
    /// Why the event was dead-lettered or is retried, including cases in which no plugin was called.
    /// Empty for every other outcome.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// The attempts at the event, if a plugin requested a retry. The broker adds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry: Option<Retry>,
    /// The slots of the event's notifications in the order of their ids, if there are several; the
    /// slot without a name is empty. The ids follow each other, beginning with that of the outcome.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub slots: Vec<String>,
    /// The clock that the plugins were given, in milliseconds since the Unix epoch.
    pub clock_ms: u64,
}

impl Decision {
    /// The ids of the event's notifications, of which `first` is the id of the outcome.
    pub fn notifications(&self, first: NotificationId) -> impl Iterator<Item = NotificationId> {
        let n = self.slots.len().max(1) as u64;
        (first.0..first.0.saturating_add(n)).map(NotificationId)
    }

    /// Whether this is the decision about the event with this id. An entry that could not be read
    /// as an event has no event id, so its entry id matches as well.
    pub fn is_about(&self, entry: EntryId, event_id: &str) -> bool {
        self.event_id == event_id || event_id.parse().is_ok_and(|id: EntryId| id == entry)
    }

    /// Adds a verdict for each member of the chain that the event reached and that was not called,
    /// because its types do not match. `chain`: the members of the chain with this decision's id.
    pub fn add_skipped(&mut self, outcome: Outcome, chain: &ChainMembers) {
        let is_over = self.is_ended_by_its_last_verdict(outcome);
        let mut called = std::mem::take(&mut self.verdicts).into_iter().peekable();
        let mut verdicts = Vec::with_capacity(chain.filters.len() + chain.routers.len());
        for member in chain.filters.iter().chain(&chain.routers) {
            match called.next_if(|verdict| verdict.plugin == member.plugin) {
                Some(verdict) => verdicts.push(verdict),
                // Members behind the one that decided were not reached.
                None if is_over && called.peek().is_none() => break,
                None => verdicts.push(member.skipped()),
            }
        }
        // None is left if these are the members of the chain; a verdict is never hidden.
        verdicts.extend(called);
        self.verdicts = verdicts;
    }

    /// Whether no plugin was called after the one with the last verdict, because it decided.
    fn is_ended_by_its_last_verdict(&self, outcome: Outcome) -> bool {
        // The host failed, so it is unknown which plugins were reached.
        if outcome == Outcome::DeadLettered && self.reason.starts_with(HOST_PANICKED) {
            return true;
        }
        self.verdicts.last().is_some_and(|last| match last.verdict {
            VerdictKind::Drop | VerdictKind::Rejected | VerdictKind::Retry => true,
            VerdictKind::Failed => matches!(outcome, Outcome::Discarded | Outcome::DeadLettered),
            VerdictKind::Keep
            | VerdictKind::Amend
            | VerdictKind::Routes
            | VerdictKind::None
            | VerdictKind::Skipped
            | VerdictKind::Unknown => false,
        })
    }
}

/// How the reason of an event begins on which the host panicked.
pub(crate) const HOST_PANICKED: &str = "the host panicked";

/// The plugins of a chain, in calling order. A plugin that is both filter and router is in both
/// lists.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChainMembers {
    pub filters: Vec<ChainMember>,
    pub routers: Vec<ChainMember>,
}

/// A plugin in a chain. The fields are those of [`Verdict`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChainMember {
    pub plugin: String,
    pub generation: u64,
    pub hash: String,
    pub config_hash: String,
}

impl ChainMember {
    fn skipped(&self) -> Verdict {
        let Self {
            plugin,
            generation,
            hash,
            config_hash,
        } = self.clone();
        Verdict {
            plugin,
            generation,
            hash,
            config_hash,
            verdict: VerdictKind::Skipped,
            reason: String::new(),
        }
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
    /// The first 12 hex digits of the SHA-256 of the generation's configuration as JSON with sorted
    /// keys. Empty in records written by an earlier version.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub config_hash: String,
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
    fn plugins_that_were_reached_and_not_called_get_a_verdict() {
        let member = |plugin: &str| ChainMember {
            plugin: plugin.into(),
            generation: 1,
            hash: "f00".into(),
            config_hash: "c00".into(),
        };
        let members = |names: &str| names.split(' ').map(member).collect();
        let chain = ChainMembers {
            filters: members("a both c"),
            routers: members("both r s"),
        };
        let verdicts = |words: &str| -> Vec<Verdict> {
            let each = words.split_whitespace().map(|word| {
                let (plugin, kind) = word.split_once(':').unwrap();
                Verdict {
                    verdict: serde_json::from_value(kind.into()).unwrap(),
                    ..member(plugin).skipped()
                }
            });
            each.collect()
        };
        for (outcome, called, expect) in [
            (
                Outcome::Committed,
                "both:keep both:none r:routes",
                "a:skipped both:keep c:skipped both:none r:routes s:skipped",
            ),
            (
                Outcome::Unrouted,
                "",
                "a:skipped both:skipped c:skipped both:skipped r:skipped s:skipped",
            ),
            (
                Outcome::Discarded,
                "both:keep c:drop",
                "a:skipped both:keep c:drop",
            ),
            (Outcome::DeadLettered, "a:failed", "a:failed"),
            (
                Outcome::DeadLettered,
                "c:failed r:rejected",
                "a:skipped both:skipped c:failed both:skipped r:rejected",
            ),
            // Skipped by its policy.
            (
                Outcome::Unrouted,
                "s:failed",
                "a:skipped both:skipped c:skipped both:skipped r:skipped s:failed",
            ),
        ] {
            let mut decision = Decision {
                verdicts: verdicts(called),
                ..Decision::default()
            };
            decision.add_skipped(outcome, &chain);
            assert_eq!(decision.verdicts, verdicts(expect), "{called}");
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
