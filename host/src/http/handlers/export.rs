//! `GET /v1/events?limit=N` on the admin listener: the newest decided events that the sources still
//! hold, as input for testing plugins.
//!
//! The response has one CloudEvent in JSON per line, oldest first, in a form that `POST /v1/events`
//! accepts. Each has the id and time that plugins were given, which are the entry's if the
//! publisher gave none. Sources drop an entry some time after its outcome
//! (`retention.processed_entries_ttl`), so the response may hold fewer events than requested; a
//! header gives the reason. Payloads are included, so the request requires the API key.
//! `/v1/decisions` lists the outcomes.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use axum::extract;
use axum::http::HeaderName;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use tokio::sync::Semaphore;

use crate::broker::{Broker, Partition};
use crate::escape::printable_json;
use crate::event::{EntryId, Event};
use crate::http::extract::{ApiKey, Query, Reserved};
use crate::http::{ApiError, State};

/// The maximum number of events in one response.
const MAX_LIMIT: usize = 10_000;
/// The maximum size of one response in bytes; beyond it, the oldest events are left out.
const MAX_BYTES: usize = 16 * 1024 * 1024;
/// Entries per broker read; each may have the maximum size of an entry.
const READ: usize = 64;

/// Bounds concurrent requests, because each response is built in memory.
static ANSWERS: Semaphore = Semaphore::const_new(2);

/// Why the response has no more events: `limit` (the requested number was reached), `source` (no
/// more are held) or `bytes` (the size limit was reached).
static BOUND: HeaderName = HeaderName::from_static("pointsman-bound");
/// The number of entries left out because they are not valid events.
static UNREADABLE: HeaderName = HeaderName::from_static("pointsman-unreadable");

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Options {
    /// The maximum number of events, over all sources together (1,000).
    limit: Option<usize>,
}

pub(in crate::http) async fn newest(
    extract::State(state): extract::State<Arc<State>>,
    _: ApiKey,
    Query(options): Query<Options>,
    _: Reserved,
) -> Result<Response, ApiError> {
    let limit = options.limit.unwrap_or(1_000);
    if !(1..=MAX_LIMIT).contains(&limit) {
        return Err(ApiError::bad_request(format!(
            "limit is {limit}; use 1 to {MAX_LIMIT}"
        )));
    }
    let broker = state.broker()?;
    let Ok(_permit) = ANSWERS.try_acquire() else {
        return Err(ApiError::overloaded(
            "this node is already running as many event exports as it allows",
        ));
    };
    let mut held = Held {
        limit,
        events: VecDeque::new(),
        bytes: 0,
        n_unreadable: 0,
        bound: "source",
    };
    for partition in broker.partitions() {
        held.read(broker.as_ref(), partition).await?;
    }
    let body: String = held
        .events
        .into_iter()
        .flat_map(|(_, line)| [line, "\n".to_owned()])
        .collect();
    let headers = [
        (CONTENT_TYPE, "application/x-ndjson".to_owned()),
        (BOUND.clone(), held.bound.to_owned()),
        (UNREADABLE.clone(), held.n_unreadable.to_string()),
    ];
    Ok((headers, body).into_response())
}

/// The newest events collected so far, oldest first, within the limits.
struct Held {
    limit: usize,
    events: VecDeque<(EntryId, String)>,
    bytes: usize,
    n_unreadable: usize,
    bound: &'static str,
}

impl Held {
    async fn read(&mut self, broker: &dyn Broker, partition: &Partition) -> Result<(), ApiError> {
        let decisions = broker.decisions(partition.number, self.limit).await?;
        let entries = decisions.iter().map(|(entry, ..)| *entry);
        let (Some(oldest), Some(newest)) = (entries.clone().min(), entries.max()) else {
            return Ok(());
        };
        let mut after = oldest.before().unwrap_or_default();
        let now_ms = crate::clock::now_ms();
        while after < newest {
            let read = broker
                .read(partition.number, after, READ, Duration::ZERO)
                .await?;
            let Some(last) = read.last().map(|entry| entry.id) else {
                break;
            };
            // Entries after the newest decision are undecided or belong to the next request.
            for entry in read.into_iter().filter(|entry| entry.id <= newest) {
                let time_ms = entry.id.time_ms(now_ms);
                match Event::from_fields_at(entry.id, time_ms, &partition.source, &entry.fields) {
                    // The beginning of an oversized entry may look like a whole event.
                    Ok(event) if entry.oversized.is_none() => {
                        // One line for every reader, also for those that split at U+2028.
                        self.add(entry.id, printable_json(&event.to_json()));
                    }
                    _ => self.n_unreadable += 1,
                }
            }
            after = last;
        }
        Ok(())
    }

    fn add(&mut self, entry: EntryId, line: String) {
        // Sources are read one after the other, each in order, so entries of the first source
        // always append at the end.
        let at = self.events.partition_point(|(other, _)| *other <= entry);
        self.bytes += line.len() + 1;
        self.events.insert(at, (entry, line));
        while self.events.len() > self.limit || self.bytes > MAX_BYTES {
            self.bound = if self.events.len() > self.limit {
                "limit"
            } else {
                "bytes"
            };
            let Some((_, line)) = self.events.pop_front() else {
                break;
            };
            self.bytes -= line.len() + 1;
        }
        if self.events.len() == self.limit && self.bound == "source" {
            self.bound = "limit";
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(last: usize) -> Held {
        Held {
            limit: last,
            events: VecDeque::new(),
            bytes: 0,
            n_unreadable: 0,
            bound: "source",
        }
    }

    fn entries(held: &Held) -> Vec<u64> {
        held.events.iter().map(|(entry, _)| entry.ms).collect()
    }

    #[test]
    fn the_newest_events_of_all_sources_are_kept_oldest_first() {
        let mut held = held(3);
        // The order of reading: one source after the other.
        for ms in [1, 4, 6, 2, 3] {
            held.add(EntryId { ms, seq: 0 }, String::new());
        }
        assert_eq!((entries(&held), held.bound), (vec![3, 4, 6], "limit"));
    }

    #[test]
    fn the_oldest_events_are_left_out_above_the_size_limit() {
        let mut held = held(1_000);
        for ms in 1..=5 {
            held.add(EntryId { ms, seq: 0 }, "x".repeat(MAX_BYTES / 4));
        }
        assert_eq!((entries(&held), held.bound), (vec![3, 4, 5], "bytes"));
        assert!(held.bytes <= MAX_BYTES);
    }
}
