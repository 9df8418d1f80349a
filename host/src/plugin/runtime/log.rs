//! The log of guests: log lines, standard output and reasons. All of it is hostile text; it is
//! escaped for terminals, truncated and rate-limited.
//!
//! The lines go to `tracing` with the target `plugin`, the plugin's name and the event's id.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::escape;
use crate::event::Name;

/// The maximum size of a line or a reason, in bytes.
pub(super) const MAX_LINE: usize = 1024;
/// The maximum number of lines per plugin and second, over all its instances.
pub(super) const MAX_LINES_PER_SECOND: u32 = 100;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Level {
    Trace,
    Debug,
    Info,
    Warn,
    Error,
}

impl Level {
    fn is_wanted(self) -> bool {
        match self {
            Self::Trace => tracing::enabled!(target: "plugin", tracing::Level::TRACE),
            Self::Debug => tracing::enabled!(target: "plugin", tracing::Level::DEBUG),
            Self::Info => tracing::enabled!(target: "plugin", tracing::Level::INFO),
            Self::Warn => tracing::enabled!(target: "plugin", tracing::Level::WARN),
            Self::Error => tracing::enabled!(target: "plugin", tracing::Level::ERROR),
        }
    }
}

/// The log of one plugin, shared by its instances.
#[derive(Debug)]
pub(super) struct GuestLog {
    plugin: Name,
    second: Mutex<Second>,
}

#[derive(Debug)]
struct Second {
    began: Instant,
    lines: u32,
}

impl GuestLog {
    pub(super) fn new(plugin: Name) -> Self {
        Self {
            plugin,
            second: Mutex::new(Second {
                began: Instant::now(),
                lines: 0,
            }),
        }
    }

    /// Writes a line, unless its level is disabled or the limit of this second is reached.
    pub(super) fn line(&self, level: Level, event: Option<&Name>, text: &str) {
        // Checked first: lines of a disabled level must not use up the limit for errors.
        if !level.is_wanted() {
            return;
        }
        let (may_speak, dropped) = self.admit(Instant::now());
        let plugin = self.plugin.as_str();
        if dropped > 0 {
            tracing::warn!(target: "plugin", { plugin.name = plugin }, "dropped {dropped} log lines of this plugin; the limit is {MAX_LINES_PER_SECOND} per second");
        }
        if !may_speak {
            return;
        }
        let text = printable(text);
        let event = event.map(Name::as_str);
        match level {
            Level::Trace => {
                tracing::trace!(target: "plugin", { plugin.name = plugin, event.id = event }, "{text}")
            }
            Level::Debug => {
                tracing::debug!(target: "plugin", { plugin.name = plugin, event.id = event }, "{text}")
            }
            Level::Info => {
                tracing::info!(target: "plugin", { plugin.name = plugin, event.id = event }, "{text}")
            }
            Level::Warn => {
                tracing::warn!(target: "plugin", { plugin.name = plugin, event.id = event }, "{text}")
            }
            Level::Error => {
                tracing::error!(target: "plugin", { plugin.name = plugin, event.id = event }, "{text}")
            }
        }
    }

    /// Whether a line may be written now, and the number of lines dropped in the second that ended.
    fn admit(&self, now: Instant) -> (bool, u32) {
        let mut second = self.second.lock().expect("no panic under this lock");
        let mut dropped = 0;
        if now.duration_since(second.began) >= Duration::from_secs(1) {
            dropped = second.lines.saturating_sub(MAX_LINES_PER_SECOND);
            *second = Second {
                began: now,
                lines: 0,
            };
        }
        second.lines = second.lines.saturating_add(1);
        (second.lines <= MAX_LINES_PER_SECOND, dropped)
    }
}

/// Makes hostile text printable: one line of at most [`MAX_LINE`] bytes without control characters
/// that a terminal would interpret.
pub(in crate::plugin) fn printable(text: &str) -> String {
    let cut = text.floor_char_boundary(MAX_LINE);
    let mut line = escape::printable(&text[..cut]);
    if cut < text.len() {
        line.push('…');
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_cannot_forge_another_or_move_the_cursor() {
        assert_eq!(
            printable("a\nERROR b\u{1b}[2J\u{202e}c\t"),
            "a\\nERROR b\\u{1b}[2J\\u{202e}c\\t"
        );
        assert_eq!(printable("Grüße 日本"), "Grüße 日本");
    }

    #[test]
    fn a_long_line_is_cut_between_characters() {
        let line = printable(&"ä".repeat(5_000));
        assert_eq!(line, format!("{}…", "ä".repeat(MAX_LINE / 2)));
        assert!(printable(&format!("x{}", "ä".repeat(5_000))).ends_with("ä…"));
    }

    #[test]
    fn lines_of_a_disabled_level_do_not_count_against_the_limit() {
        let log = GuestLog::new(Name::parse("chatty").unwrap());
        let warnings_only = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::WARN)
            .with_writer(std::io::sink)
            .finish();
        tracing::subscriber::with_default(warnings_only, || {
            (0..250).for_each(|_| log.line(Level::Debug, None, "not logged"))
        });
        assert_eq!(
            log.admit(Instant::now() + Duration::from_millis(1_100)),
            (true, 0)
        );
    }

    #[test]
    fn a_plugin_may_log_100_lines_per_second_and_the_rest_are_counted() {
        let log = GuestLog::new(Name::parse("chatty").unwrap());
        let now = Instant::now();
        let spoken = (0..250).filter(|_| log.admit(now).0).count();
        assert_eq!(spoken, 100);
        assert_eq!(log.admit(now + Duration::from_millis(1_100)), (true, 150));
        assert_eq!(log.admit(now + Duration::from_millis(1_101)), (true, 0));
    }
}
