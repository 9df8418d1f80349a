//! What guests say: log lines, standard output, reasons. All of it is hostile text, made fit for a terminal, bounded in length and in rate.
//!
//! It goes to `tracing` under the target `plugin`, with the plugin's name and the event's id.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::event::Name;

/// The most bytes of a line, or of a reason.
pub(in crate::plugin) const MAX_LINE: usize = 1024;
/// The most lines of one plugin in a second, all its instances together.
pub(in crate::plugin) const MAX_LINES_PER_SECOND: u32 = 100;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::plugin) enum Level {
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
pub(in crate::plugin) struct GuestLog {
    plugin: Name,
    second: Mutex<Second>,
}

#[derive(Debug)]
struct Second {
    began: Instant,
    lines: u32,
}

impl GuestLog {
    pub(in crate::plugin) fn new(plugin: Name) -> Self {
        Self {
            plugin,
            second: Mutex::new(Second {
                began: Instant::now(),
                lines: 0,
            }),
        }
    }

    /// Writes a line, unless nobody wants lines of its level, or this second has had its share.
    pub(in crate::plugin) fn line(&self, level: Level, event: Option<&Name>, text: &str) {
        // A plugin that tells much at debug must not use up what it has for errors.
        if !level.is_wanted() {
            return;
        }
        let (may_speak, dropped) = self.admit(Instant::now());
        let plugin = self.plugin.as_str();
        if dropped > 0 {
            tracing::warn!(target: "plugin", { plugin.name = plugin }, "{dropped} more lines of this plugin were dropped; {MAX_LINES_PER_SECOND} a second is the most");
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

    /// Whether a line may be written now, and how many were dropped in a second that is over.
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

/// Hostile text as at most [`MAX_LINE`] bytes of it, on one line, without a control character that a terminal would obey.
pub(in crate::plugin) fn printable(text: &str) -> String {
    let cut = text.floor_char_boundary(MAX_LINE);
    let mut line = String::with_capacity(cut);
    for c in text[..cut].chars() {
        // Beyond the control characters, those that turn the direction of writing: they make a line look like another.
        if c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
        {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
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
    fn lines_that_nobody_wants_do_not_count() {
        let log = GuestLog::new(Name::parse("chatty").unwrap());
        let warnings_only = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::WARN)
            .with_writer(std::io::sink)
            .finish();
        tracing::subscriber::with_default(warnings_only, || {
            (0..250).for_each(|_| log.line(Level::Debug, None, "nobody is named"))
        });
        assert_eq!(
            log.admit(Instant::now() + Duration::from_millis(1_100)),
            (true, 0)
        );
    }

    #[test]
    fn a_plugin_has_a_hundred_lines_a_second_and_the_rest_is_counted() {
        let log = GuestLog::new(Name::parse("chatty").unwrap());
        let now = Instant::now();
        let spoken = (0..250).filter(|_| log.admit(now).0).count();
        assert_eq!(spoken, 100);
        assert_eq!(log.admit(now + Duration::from_millis(1_100)), (true, 150));
        assert_eq!(log.admit(now + Duration::from_millis(1_101)), (true, 0));
    }
}
