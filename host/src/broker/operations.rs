//! Data for operators: dead letters, decision records and findings.
//!
//! The counters of a partition are in `partition`.

use serde::Serialize;

use super::partition::Oversized;
use crate::event::{DeadReason, Decision, EntryId, NotificationId, Outcome};

/// A dead letter as it is listed.
#[derive(Clone, Debug, PartialEq)]
pub struct DeadLetter {
    /// The id of the dead letter itself, by which it is shown, redriven and dropped.
    pub id: EntryId,
    pub entry: EntryId,
    /// The entry's fields, or only its beginning if `oversized` is set.
    pub why: DeadReason,
    /// Set if the entry was too large to be kept here as a whole. It cannot be redriven.
    pub oversized: Option<Oversized>,
    /// When the event is tried again, in milliseconds since the Unix epoch; `None` for a dead letter
    /// that stays.
    pub due_ms: Option<u64>,
}

/// A decision record as it is listed: entry, outcome, notification id and decision.
pub type StoredDecision = (EntryId, Outcome, Option<NotificationId>, Decision);

/// The result of a search for decisions by event id.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DecisionSearch {
    /// Newest first, up to the requested limit.
    pub decisions: Vec<StoredDecision>,
    /// The entry of the oldest decision that the search examined, for any event.
    pub reaches_to: Option<EntryId>,
}

/// One result of a start-up check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The name of the check, one word, unique within a check.
    pub name: &'static str,
    pub severity: Severity,
    /// The problem and its fix, in one line.
    pub text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The node starts and stays ready.
    Warning,
    /// The node does not start, or becomes unready.
    Refusal,
}
