//! `GET /v1/events?last=N` on the admin listener: the newest events that were decided and that the sources still hold, for trying plugins on.
//!
//! A line each, oldest first, as CloudEvents in JSON: what `POST /v1/events` takes back, with the id and the time that plugins saw, which are
//! the entry's where the publisher gave none. Sources give an entry up some time after its outcome (`retention.keep_s`), so fewer may be
//! left than were asked for; headers say why. Payloads are in it, so it asks for the key. What was decided, `/v1/decisions` says.

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
use crate::event::{EntryId, Event};
use crate::http::{ApiError, Keyed, Query, State};

/// The most events in one answer.
const MAX_LAST: usize = 10_000;
/// The most bytes of one answer: of more, the oldest are left out.
const MAX_BYTES: usize = 16 * 1024 * 1024;
/// Read at once: each may be as large as an entry can be.
const READ: usize = 64;

/// Each answer is held in memory: so many at once.
static ANSWERS: Semaphore = Semaphore::const_new(2);

/// Why there are not more events: `last` (as many as were asked for), `source` (no more are held) or `bytes` (no more fit).
static BOUND: HeaderName = HeaderName::from_static("pointsman-bound");
/// How many entries were left out because they cannot be read as events.
static UNREADABLE: HeaderName = HeaderName::from_static("pointsman-unreadable");

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Options {
    /// At most so many, of all sources together (1,000).
    last: Option<usize>,
}

pub(in crate::http) async fn newest(
    extract::State(state): extract::State<Arc<State>>,
    _: Keyed,
    Query(options): Query<Options>,
) -> Result<Response, ApiError> {
    let last = options.last.unwrap_or(1_000);
    if !(1..=MAX_LAST).contains(&last) {
        return Err(ApiError::bad_request(format!(
            "last is {last}; give 1 to {MAX_LAST}"
        )));
    }
    let broker = state.broker()?;
    let Ok(_permit) = ANSWERS.try_acquire() else {
        return Err(ApiError::overloaded(
            "this node is already answering as many requests for events as it does at once",
        ));
    };
    let mut held = Held {
        last,
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

/// The newest events so far, oldest first, within the bounds.
struct Held {
    last: usize,
    events: VecDeque<(EntryId, String)>,
    bytes: usize,
    n_unreadable: usize,
    bound: &'static str,
}

impl Held {
    async fn read(&mut self, broker: &dyn Broker, partition: &Partition) -> Result<(), ApiError> {
        let decisions = broker.decisions(partition.number, self.last).await?;
        let entries = decisions.iter().map(|(entry, ..)| *entry);
        let (Some(oldest), Some(newest)) = (entries.clone().min(), entries.max()) else {
            return Ok(());
        };
        let mut after = oldest.before().unwrap_or_default();
        while after < newest {
            let read = broker
                .read(partition.number, after, READ, Duration::ZERO)
                .await?;
            let Some(last) = read.last().map(|entry| entry.id) else {
                break;
            };
            // What came since then is not decided, or is for the next answer.
            for entry in read.into_iter().filter(|entry| entry.id <= newest) {
                match Event::from_fields(entry.id, &partition.source, &entry.fields) {
                    Ok(event) => self.add(entry.id, event.to_json()),
                    Err(_) => self.n_unreadable += 1,
                }
            }
            after = last;
        }
        Ok(())
    }

    fn add(&mut self, entry: EntryId, line: String) {
        // Sources are read one after the other, and each in its order: of the first, all are before.
        let at = self.events.partition_point(|(other, _)| *other <= entry);
        self.bytes += line.len() + 1;
        self.events.insert(at, (entry, line));
        while self.events.len() > self.last || self.bytes > MAX_BYTES {
            self.bound = if self.events.len() > self.last {
                "last"
            } else {
                "bytes"
            };
            let Some((_, line)) = self.events.pop_front() else {
                break;
            };
            self.bytes -= line.len() + 1;
        }
        if self.events.len() == self.last && self.bound == "source" {
            self.bound = "last";
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(last: usize) -> Held {
        Held {
            last,
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
    fn of_all_sources_the_newest_are_kept_oldest_first() {
        let mut held = held(3);
        // One source after the other.
        for ms in [1, 4, 6, 2, 3] {
            held.add(EntryId { ms, seq: 0 }, String::new());
        }
        assert_eq!((entries(&held), held.bound), (vec![3, 4, 6], "last"));
    }

    #[test]
    fn what_does_not_fit_one_answer_is_left_out_from_the_oldest() {
        let mut held = held(1_000);
        for ms in 1..=5 {
            held.add(EntryId { ms, seq: 0 }, "x".repeat(MAX_BYTES / 4));
        }
        assert_eq!((entries(&held), held.bound), (vec![3, 4, 5], "bytes"));
        assert!(held.bytes <= MAX_BYTES);
    }
}
