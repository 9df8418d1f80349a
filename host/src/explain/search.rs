//! Finds the decisions about an event by its id. If there are none, determines whether the event is
//! still waiting in a source.

use std::time::Duration;

use super::DecidedEvent;
use crate::broker::{self, Broker, Partition};
use crate::event::{EntryId, Event, Name, rfc3339};

/// Maximum number of decisions per event id and partition. High, because the original decision must
/// be found behind those about a publisher's retries.
const MAX_DECISIONS: usize = 1_000;
/// Limits of the search through the entries waiting in a source: number of entries and bytes.
const MAX_WAITING: u64 = 10_000;
const MAX_WAITING_BYTES: usize = 16 * 1024 * 1024;
/// Number of waiting entries read at once.
const READ: usize = 64;

/// Why an event cannot be explained.
#[derive(Debug, thiserror::Error)]
pub enum ExplainError {
    #[error("event '{event_id}' is not decided yet: its entry {entry} is waiting in {source_key}, {}", behind(*n_before))]
    Waiting {
        event_id: Name,
        source_key: String,
        entry: EntryId,
        n_before: u64,
    },
    #[error("no decision found for event '{event_id}'")]
    Unknown { event_id: Name, reach: Vec<String> },
    #[error(transparent)]
    Broker(#[from] broker::Error),
}

impl ExplainError {
    /// The next step for the operator.
    pub fn fix(&self) -> String {
        match self {
            Self::Waiting { .. } => "check GET /readyz on this listener for what blocks the node; retry once the event is decided".to_owned(),
            Self::Unknown { reach, .. } => format!(
                "compare the id with the one returned to the publisher (an event published without an id has its entry id); \
                 decisions are kept for {} (retention.decision_entries), older events cannot be explained; an event that never \
                 reached a source of this node has no decision",
                reach.join(", ")
            ),
            Self::Broker(_) => String::new(),
        }
    }
}

fn behind(n_before: u64) -> String {
    match n_before {
        0 => "next in line".to_owned(),
        1 => "behind 1 other".to_owned(),
        n => format!("behind {n} others"),
    }
}

/// All decisions about the event, newest first; at least one.
///
/// # Errors
/// There are none, or the broker failed.
pub(super) async fn decisions(
    broker: &dyn Broker,
    event_id: &Name,
) -> Result<Vec<DecidedEvent>, ExplainError> {
    // Positions are read before decisions. An event decided in between is then reported as waiting;
    // in the other order it would not be found at all.
    let mut begins = Vec::new();
    for partition in broker.partitions() {
        let position = broker.head(partition.number).await?.position;
        // An entry whose plan is still being written in slices has no outcome yet, so it counts as
        // waiting.
        begins.push(if position.slices > 0 {
            position.entry.before().unwrap_or_default()
        } else {
            position.entry
        });
    }
    let (mut all, mut reach) = (Vec::new(), Vec::new());
    for partition in broker.partitions() {
        let found = broker
            .find_decisions(partition.number, event_id.as_str(), MAX_DECISIONS)
            .await?;
        let event = |(entry, outcome, notification, decision)| DecidedEvent {
            partition: partition.number,
            entry,
            outcome,
            notification,
            decision,
        };
        all.extend(found.decisions.into_iter().map(event));
        reach.push(match found.reaches_to {
            Some(entry) if entry.is_time(crate::clock::now_ms()) => {
                format!("{} back to {}", partition.source, rfc3339(entry.ms))
            }
            Some(entry) => format!("{} back to entry {entry}", partition.source),
            None => format!("{}: none", partition.source),
        });
    }
    if !all.is_empty() {
        all.sort_by_key(|event| std::cmp::Reverse(event.entry));
        return Ok(all);
    }
    for ((partition, after), reach) in broker.partitions().iter().zip(begins).zip(&mut reach) {
        match search_waiting(broker, partition, after, event_id).await? {
            WaitingSearch::Entry { entry, n_before } => {
                let source_key = partition.source.clone();
                return Err(ExplainError::Waiting {
                    event_id: event_id.clone(),
                    source_key,
                    entry,
                    n_before,
                });
            }
            WaitingSearch::Absent => {}
            WaitingSearch::Inconclusive { n_before } => reach.push_str(&format!(
                " (the event may still be waiting there, behind {n_before} other entries that were searched)"
            )),
        }
    }
    Err(ExplainError::Unknown {
        event_id: event_id.clone(),
        reach,
    })
}

/// Whether an undecided event is waiting in a source.
enum WaitingSearch {
    Entry {
        entry: EntryId,
        n_before: u64,
    },
    Absent,
    /// Not found, but more entries are waiting than are searched.
    Inconclusive {
        n_before: u64,
    },
}

async fn search_waiting(
    broker: &dyn Broker,
    partition: &Partition,
    mut after: EntryId,
    event_id: &Name,
) -> broker::Result<WaitingSearch> {
    let (mut n_before, mut n_bytes) = (0, 0);
    while n_before < MAX_WAITING && n_bytes < MAX_WAITING_BYTES {
        let entries = broker
            .read(partition.number, after, READ, Duration::ZERO)
            .await?;
        let Some(last) = entries.last() else {
            return Ok(WaitingSearch::Absent);
        };
        after = last.id;
        for entry in entries {
            let id = Event::from_fields(entry.id, &partition.source, &entry.fields)
                .map(|event| event.id);
            if id.is_ok_and(|id| id == *event_id) || entry.id.to_string() == event_id.as_str() {
                return Ok(WaitingSearch::Entry {
                    entry: entry.id,
                    n_before,
                });
            }
            n_before += 1;
            n_bytes += entry
                .fields
                .iter()
                .map(|(name, value)| name.len() + value.len())
                .sum::<usize>();
        }
    }
    Ok(WaitingSearch::Inconclusive { n_before })
}
