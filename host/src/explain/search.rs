//! The decisions of an event, by its id; and where there is none, what that can mean.

use std::time::Duration;

use super::Decided;
use crate::broker::{self, Broker, Partition};
use crate::event::{EntryId, Event, Name, rfc3339};

/// Decisions of one event that are looked at in a partition. A publisher may have retried often: what it retried must be among them.
const MAX_DECISIONS: usize = 1_000;
/// Of the entries that wait in a source, so many are looked through, and so many bytes of them ...
const MAX_WAITING: u64 = 10_000;
const MAX_WAITING_BYTES: usize = 16 * 1024 * 1024;
/// ... read so many at once.
const READ: usize = 64;

/// Why there is nothing to explain.
#[derive(Debug, thiserror::Error)]
pub enum Unexplained {
    #[error("the event '{event_id}' is not decided yet: its entry {entry} waits in {source_key}, {}", behind(*n_before))]
    Waiting {
        event_id: Name,
        source_key: String,
        entry: EntryId,
        n_before: u64,
    },
    #[error("there is no decision about an event '{event_id}'")]
    Unknown { event_id: Name, reach: Vec<String> },
    #[error(transparent)]
    Broker(#[from] broker::Error),
}

impl Unexplained {
    /// What an operator can do about it.
    pub fn fix(&self) -> String {
        match self {
            Self::Waiting { .. } => "GET /readyz on this listener says what holds the node up; ask again once it is decided".to_owned(),
            Self::Unknown { reach, .. } => format!(
                "compare the id with what the publisher was answered (an event that was published without one has its entry's); decisions \
                 are kept {} (retention.decision_entries), and what is older than that cannot be explained; what never came to a \
                 source of this node was never decided",
                reach.join(", ")
            ),
            Self::Broker(_) => String::new(),
        }
    }
}

fn behind(n_before: u64) -> String {
    match n_before {
        0 => "the next in line".to_owned(),
        1 => "behind 1 other".to_owned(),
        n => format!("behind {n} others"),
    }
}

/// All of them, newest first; at least one.
pub(super) async fn decisions(
    broker: &dyn Broker,
    event_id: &Name,
) -> Result<Vec<Decided>, Unexplained> {
    // Read before the decisions are: what is decided between the two is found to wait, and not to be nowhere.
    let mut begins = Vec::new();
    for partition in broker.partitions() {
        let position = broker.head(partition.number).await?.position;
        // An entry whose plan is being written in slices has no outcome yet.
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
        let decided = |(entry, outcome, notification, decision)| Decided {
            partition: partition.number,
            entry,
            outcome,
            notification,
            decision,
        };
        all.extend(found.decisions.into_iter().map(decided));
        reach.push(match found.reaches_to {
            Some(entry) => format!("of {} back to {}", partition.source, rfc3339(entry.ms)),
            None => format!("of {} none", partition.source),
        });
    }
    if !all.is_empty() {
        all.sort_by_key(|decided| std::cmp::Reverse(decided.entry));
        return Ok(all);
    }
    for ((partition, after), reach) in broker.partitions().iter().zip(begins).zip(&mut reach) {
        match waiting(broker, partition, after, event_id).await? {
            Waiting::At { entry, n_before } => {
                let source_key = partition.source.clone();
                return Err(Unexplained::Waiting {
                    event_id: event_id.clone(),
                    source_key,
                    entry,
                    n_before,
                });
            }
            Waiting::Nowhere => {}
            Waiting::Perhaps { n_before } => reach.push_str(&format!(
                " (and it may wait there behind {n_before} others, which were looked through)"
            )),
        }
    }
    Err(Unexplained::Unknown {
        event_id: event_id.clone(),
        reach,
    })
}

/// Where an event waits that has no outcome yet.
enum Waiting {
    At {
        entry: EntryId,
        n_before: u64,
    },
    Nowhere,
    /// More wait than are looked through.
    Perhaps {
        n_before: u64,
    },
}

async fn waiting(
    broker: &dyn Broker,
    partition: &Partition,
    mut after: EntryId,
    event_id: &Name,
) -> broker::Result<Waiting> {
    let (mut n_before, mut n_bytes) = (0, 0);
    while n_before < MAX_WAITING && n_bytes < MAX_WAITING_BYTES {
        let entries = broker
            .read(partition.number, after, READ, Duration::ZERO)
            .await?;
        let Some(last) = entries.last() else {
            return Ok(Waiting::Nowhere);
        };
        after = last.id;
        for entry in entries {
            let id = Event::from_fields(entry.id, &partition.source, &entry.fields)
                .map(|event| event.id);
            if id.is_ok_and(|id| id == *event_id) || entry.id.to_string() == event_id.as_str() {
                return Ok(Waiting::At {
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
    Ok(Waiting::Perhaps { n_before })
}
