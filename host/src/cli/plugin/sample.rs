//! Reads the sample events for `plugin test` and `plugin bench`: a file of JSON CloudEvents, one
//! per line, as `pointsman events export` writes it.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use pointsman::event::{EntryId, Event};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::Loaded;
use crate::cli::parse_time;

/// Time of events without one, in Unix milliseconds: 2026-01-01T00:00:00Z, as in the SDK's tests.
const NOW_MS: u64 = 1_767_225_600_000;

/// A line that also gives the time that the plugin's clock shows for its event.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TimedEvent {
    clock: String,
    event: Box<RawValue>,
}

/// Reads the events of a file, each with the time that the plugin's clock shows for it, in Unix
/// milliseconds: that of its line (`{"clock": "2026-01-01T00:00:00Z", "event": {...}}`), otherwise
/// `clock_ms` if given, otherwise the event's own time.
///
/// # Errors
/// The file cannot be read, or contains an invalid event or none; the error names the event.
pub(super) fn events(path: &Path, clock_ms: Option<u64>) -> anyhow::Result<Vec<(Event, u64)>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut events = Vec::new();
    for (n, document) in serde_json::Deserializer::from_str(&text)
        .into_iter::<Box<RawValue>>()
        .enumerate()
    {
        let place = || format!("{}: document {}", path.display(), n + 1);
        let mut document = document.with_context(|| format!("{} is not JSON", place()))?;
        let mut clock_ms = clock_ms;
        // An event has a type and no member `event`, so the two forms cannot be confused.
        if let Ok(timed) = serde_json::from_str::<TimedEvent>(document.get()) {
            let clock = parse_time(&timed.clock).map_err(anyhow::Error::msg);
            clock_ms = Some(clock.with_context(|| format!("{}: clock", place()))?);
            document = timed.event;
        }
        // Supplies the id and time of an event without them, as the source entry does in a node.
        let entry = EntryId {
            ms: NOW_MS,
            seq: n as u64,
        };
        let event = Event::from_json(entry, "pointsman:events", document.get().as_bytes())
            .with_context(place)?;
        let clock_ms = clock_ms.unwrap_or(event.time_ms);
        events.push((event, clock_ms));
    }
    ensure!(
        !events.is_empty(),
        "{} has no events; add JSON CloudEvents, one per line",
        path.display()
    );
    Ok(events)
}

/// The given events file, or that of the crate.
///
/// # Errors
/// There is neither.
pub(super) fn file(named: Option<&PathBuf>, loaded: &Loaded) -> anyhow::Result<PathBuf> {
    let file = named.cloned().or_else(|| loaded.beside("events.jsonl"));
    file.context("no events given; pass --events FILE with JSON CloudEvents, one per line")
}
