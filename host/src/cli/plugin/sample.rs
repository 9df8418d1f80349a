//! The events that a plugin is tried on: CloudEvents in a file, a line each, as `pointsman events export` writes them.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use pointsman::event::{EntryId, Event};
use serde_json::value::RawValue;

use super::Loaded;

/// What an event without a time is given, and the clock then shows: 2026-01-01T00:00:00Z, as in the SDK's tests.
const NOW_MS: u64 = 1_767_225_600_000;

/// The events of a file with the clock that the plugin is shown for each: the event's own time, as if it was decided at once, or `clock_ms`.
///
/// # Errors
/// It cannot be read, or one of them is no event; which, and why.
pub(super) fn events(path: &Path, clock_ms: Option<u64>) -> anyhow::Result<Vec<(Event, u64)>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut events = Vec::new();
    for (n, document) in serde_json::Deserializer::from_str(&text)
        .into_iter::<Box<RawValue>>()
        .enumerate()
    {
        let place = || format!("{}: document {}", path.display(), n + 1);
        let document = document.with_context(|| format!("{} is not JSON", place()))?;
        // What the publisher left out is the entry's.
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
        "{} holds no event; write CloudEvents as JSON, a line each",
        path.display()
    );
    Ok(events)
}

/// The file that was named, or the one of the crate.
///
/// # Errors
/// There is neither.
pub(super) fn file(named: Option<&PathBuf>, loaded: &Loaded) -> anyhow::Result<PathBuf> {
    let file = named.cloned().or_else(|| loaded.beside("events.jsonl"));
    file.context("no events are named; give --events FILE, with CloudEvents as JSON, a line each")
}
