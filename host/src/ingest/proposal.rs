//! The proposals of ingest to the broker about an entry: the records of a plan, whole or in slices, a
//! dead letter, and the decision that is kept with each.
//!
//! Decides nothing about the event and knows neither position nor lease: `pipeline` decides, `worker`
//! commits, and only the broker finds duplicates.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::broker::{
    EXCERPT_BYTES, Entry, Item, MAX_COMMIT_BYTES, MAX_INDEX_ENTRIES, NewNotification, Oversized,
    Partition, Proposal,
};
use crate::event::{DeadReason, Decision, EntryId, Event, Notification, Plan, Target, Verdict};

/// The notifications of an event with the targets of one slice: of all targets in order, those from
/// `index` times [`MAX_INDEX_ENTRIES`].
pub(super) fn slice_of(notifications: &[NewNotification], index: u32) -> Vec<NewNotification> {
    let mut skipped = index as usize * MAX_INDEX_ENTRIES;
    let mut room = MAX_INDEX_ENTRIES;
    let part = |NewNotification { record, targets }: &NewNotification| {
        let begin = skipped.min(targets.len());
        skipped -= begin;
        let n = room.min(targets.len() - begin);
        room -= n;
        NewNotification {
            record: record.clone(),
            targets: targets[begin..begin + n].to_vec(),
        }
    };
    notifications.iter().map(part).collect()
}

/// Serialises the notifications of an event for a commit, one for each slot.
///
/// # Errors
/// The reason for a dead letter: there are too many slots, or the records are too large or cannot
/// be serialised.
pub(super) fn commit_proposal(
    entry: EntryId,
    event: Event,
    plan: Plan,
    decision: &Decision,
) -> Result<Proposal, String> {
    let plans = plan.by_slot();
    if plans.len() > Plan::MAX_SLOTS {
        return Err(format!(
            "the routes of all routers have {} slots; the limit is {}; use fewer",
            plans.len(),
            Plan::MAX_SLOTS
        ));
    }
    let targets: Vec<Vec<Target>> = plans.iter().map(Plan::targets).collect();
    let is_sliced = targets.iter().map(Vec::len).sum::<usize>() > MAX_INDEX_ENTRIES;
    let mut n_bytes = 0;
    let mut notifications = Vec::with_capacity(plans.len());
    // Moves the event into the last one: most events have one notification.
    let events = std::iter::repeat_n(event, plans.len());
    for ((plan, targets), event) in plans.into_iter().zip(targets).zip(events) {
        let notification = Notification { entry, event, plan };
        let record = if is_sliced {
            serde_json::to_vec(&SlicedRecord {
                notification: &notification,
                decision,
            })
        } else {
            serde_json::to_vec(&notification)
        };
        let record = record.map_err(|error| format!("cannot serialise the record: {error}"))?;
        n_bytes += record.len();
        notifications.push(NewNotification {
            record: Bytes::from(record),
            targets,
        });
    }
    if n_bytes > MAX_COMMIT_BYTES {
        let each = if notifications.len() > 1 {
            ", which each slot repeats,"
        } else {
            ""
        };
        return Err(format!(
            "the event{each} with its plan has {n_bytes} bytes; the limit is {MAX_COMMIT_BYTES}"
        ));
    }
    Ok(Proposal::Commit(notifications))
}

/// Checks what a commit checks of a plan before it writes.
///
/// # Errors
/// The reason for a dead letter.
pub(crate) fn check_plan(event: &Event, plan: &Plan, verdicts: &[Verdict]) -> Result<(), String> {
    let decision = decision_about(event, verdicts.to_vec(), 0);
    commit_proposal(EntryId::default(), event.clone(), plan.clone(), &decision).map(|_| ())
}

/// The record of a plan that is written in slices. The decision is written with the last slice,
/// possibly by another owner, which takes it from here.
#[derive(Serialize)]
struct SlicedRecord<'a> {
    #[serde(flatten)]
    notification: &'a Notification,
    decision: &'a Decision,
}

/// The part of such a record beyond the notification.
#[derive(Deserialize)]
pub(super) struct SlicedRecordDecision {
    pub(super) decision: Option<Decision>,
}

pub(super) fn decision_about(event: &Event, verdicts: Vec<Verdict>, clock_ms: u64) -> Decision {
    Decision {
        event_id: event.id.to_string(),
        event_source: event.source.to_string(),
        event_type: event.kind.to_string(),
        verdicts,
        clock_ms,
        ..Decision::default()
    }
}

/// The reason for the dead letter of an entry that was not read as a whole.
pub(super) fn oversized(size: Oversized, max_event_bytes: usize) -> String {
    let Oversized {
        bytes,
        fields,
        is_exact,
    } = size;
    if bytes <= max_event_bytes as u64 {
        return format!(
            "the event has more than 64 extension attributes: {fields} fields; send fewer"
        );
    }
    let bound = if is_exact { "" } else { " or more" };
    format!(
        "the event has {bytes} bytes{bound}; the limit is {max_event_bytes} ([ingest] max_event_bytes)"
    )
}

/// Returns a dead letter with everything needed to process the entry again.
pub(super) fn dead_letter(
    entry: &Entry,
    reason: String,
    plugin: Option<String>,
    attempts: u32,
    decision: Decision,
) -> Item {
    let decision = Decision {
        reason: reason.clone(),
        ..decision
    };
    let why = DeadReason {
        reason,
        plugin,
        attempts,
        fields: entry.fields.clone(),
    };
    Item {
        entry: entry.id,
        dedupe: None,
        proposal: match entry.oversized {
            None => Proposal::DeadLetter(why),
            Some(size) => Proposal::OversizedEntry { why, size },
        },
        decision,
    }
}

/// Returns the decision about an entry for which no plugin was called, with the names it carries,
/// so that its publisher can find it.
pub(super) fn unevaluated(partition: &Partition, entry: &Entry, clock_ms: u64) -> Decision {
    let (id, source, kind) = Event::names_in(&partition.source, &entry.fields);
    Decision {
        event_id: id.map(|id| id.to_string()).unwrap_or_default(),
        event_source: source.map(|source| source.to_string()).unwrap_or_default(),
        event_type: kind.map(|kind| kind.to_string()).unwrap_or_default(),
        clock_ms,
        ..Decision::default()
    }
}

/// Returns the key that identifies a publisher's retry: 16 bytes of SHA-256 over the event's
/// `source` and `id`.
pub(super) fn dedupe_key(event: &Event) -> [u8; 16] {
    let mut hash = Sha256::new();
    hash.update(event.source.as_str());
    // Names contain no NUL, so two different pairs never yield the same input.
    hash.update([0]);
    hash.update(event.id.as_str());
    let digest = hash.finalize();
    std::array::from_fn(|at| digest[at])
}

pub(super) fn n_targets(item: &Item) -> usize {
    if let Proposal::Commit(notifications) = &item.proposal {
        notifications.iter().map(|new| new.targets.len()).sum()
    } else {
        0
    }
}

pub(super) fn n_bytes(item: &Item) -> usize {
    match &item.proposal {
        Proposal::Commit(notifications) => notifications.iter().map(|new| new.record.len()).sum(),
        Proposal::DeadLetter(why) | Proposal::Retry(why, _) => why
            .fields
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum(),
        Proposal::OversizedEntry { size, .. } if size.fits_dead_letter() => size.bytes as usize,
        Proposal::OversizedEntry { .. } => EXCERPT_BYTES,
        Proposal::Discard | Proposal::Unrouted => 0,
    }
}
