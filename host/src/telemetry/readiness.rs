//! Readiness of this node for traffic: a list of named reasons that any part may set and clear.
//!
//! A *reason* makes the node unready; a *warning* is only displayed. Both are one line that
//! includes the fix. A *note* is the state of a part that is neither. `http::health` serves them. Nothing here reacts to an unready node, and
//! nothing stops because of it: open streams stay open.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::escape::printable;

/// A cheap handle: clones share the reasons.
#[derive(Clone, Debug, Default)]
pub struct Readiness {
    /// By name. A std mutex, held for a map operation and never across an `.await`: written on
    /// failures, read by probes.
    reasons: Arc<Mutex<BTreeMap<String, Reason>>>,
    /// By name. Like `reasons`.
    notes: Arc<Mutex<BTreeMap<String, String>>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Reason {
    text: String,
    is_warning: bool,
    /// Set for a step of the startup that is still pending; not logged.
    is_expected: bool,
    /// When the reason expires unless it is set again.
    until: Option<Instant>,
    /// The last log line about it.
    logged: Option<Logged>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Logged {
    at: Instant,
    text: String,
}

/// A reason whose text changes is logged again after this time: during an outage, the same cause is
/// described in turn by several errors.
const LOG_EVERY: Duration = Duration::from_secs(10);

impl Reason {
    fn holds(&self) -> bool {
        self.until.is_none_or(|until| Instant::now() < until)
    }

    /// The last log line about the reason, if this one can replace `before` without another.
    fn logged_as(&self, before: Option<&Self>) -> Option<Logged> {
        let before = before.filter(|b| b.holds() && b.is_warning == self.is_warning)?;
        let logged = before.logged.clone();
        logged.filter(|logged| logged.text == self.text || logged.at.elapsed() < LOG_EVERY)
    }
}

/// A snapshot of the readiness.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    pub is_ready: bool,
    /// One line for each reason, warning or note, as `name: text`; in this order.
    pub lines: Vec<String>,
    pub reasons: Vec<NamedText>,
    pub warnings: Vec<NamedText>,
    pub notes: Vec<NamedText>,
}

/// A reason, a warning or a note.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NamedText {
    pub name: String,
    pub text: String,
}

impl Readiness {
    /// Like [`Readiness::set`], for a pending step of the startup. Not logged, because nothing
    /// failed.
    pub fn expect(&self, name: &str, text: &str) {
        self.lock().insert(
            name.to_owned(),
            Reason {
                text: text.to_owned(),
                is_warning: false,
                is_expected: true,
                until: None,
                logged: None,
            },
        );
    }

    /// Makes the node unready for the reason `name` until [`Readiness::clear`]. Logged if the
    /// reason is new, or if its text changed and it was not logged within [`LOG_EVERY`].
    pub fn set(&self, name: &str, text: impl Into<String>) {
        self.put(name, text.into(), false, None);
    }

    /// Like [`Readiness::set`], for a condition that is visible only when it occurs: expires after
    /// `long` unless it is set again.
    pub fn set_for(&self, name: &str, text: impl Into<String>, long: Duration) {
        self.put(name, text.into(), false, Some(Instant::now() + long));
    }

    /// Like [`Readiness::set`], for a reason that was logged where it was found.
    pub fn set_unlogged(&self, name: &str, text: impl Into<String>) {
        self.insert(name, text.into(), false, None, false);
    }

    /// Like [`Readiness::set`], for a text with figures that change: logged only if the reason is
    /// new.
    pub fn update(&self, name: &str, text: impl Into<String>) {
        let is_known = self
            .lock()
            .get(&printable(name))
            .is_some_and(|reason| reason.holds() && !reason.is_warning);
        self.insert(name, text.into(), false, None, !is_known);
    }

    /// Displays a warning; the node stays ready.
    pub fn warn(&self, name: &str, text: impl Into<String>) {
        self.put(name, text.into(), true, None);
    }

    /// Like [`Readiness::warn`], for a condition that is visible only when it occurs: expires after
    /// `long` unless it is set again.
    pub fn warn_for(&self, name: &str, text: impl Into<String>, long: Duration) {
        self.put(name, text.into(), true, Some(Instant::now() + long));
    }

    /// Displays the state of a part, which needs no attention. Not logged.
    pub fn note(&self, name: &str, text: impl Into<String>) {
        let text = printable(&text.into().replace(['\n', '\r'], " "));
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        notes.insert(printable(name), text);
    }

    fn put(&self, name: &str, text: String, is_warning: bool, until: Option<Instant>) {
        self.insert(name, text, is_warning, until, true);
    }

    fn insert(
        &self,
        name: &str,
        text: String,
        is_warning: bool,
        until: Option<Instant>,
        is_logged: bool,
    ) {
        // A line break would forge a second reason in the report; names quote file names.
        let name = &printable(name);
        let mut reason = Reason {
            text: printable(&text.replace(['\n', '\r'], " ")),
            is_warning,
            is_expected: false,
            until,
            logged: None,
        };
        let mut reasons = self.lock();
        let before = reasons.get(name);
        reason.logged = if is_logged {
            reason.logged_as(before)
        } else {
            before.and_then(|before| before.logged.clone())
        };
        let is_logged = is_logged && reason.logged.is_none();
        let text = reason.text.clone();
        reason.logged.get_or_insert_with(|| Logged {
            at: Instant::now(),
            text: text.clone(),
        });
        reasons.insert(name.to_owned(), reason);
        drop(reasons);
        match (is_logged, is_warning) {
            (false, _) => {}
            (true, false) => tracing::error!(reason = name, "not ready: {text}"),
            (true, true) => tracing::warn!(reason = name, "{text}"),
        }
    }

    /// Removes a reason or warning, if it is set.
    pub fn clear(&self, name: &str) {
        let Some(reason) = self.lock().remove(name) else {
            return;
        };
        if !reason.is_expected {
            tracing::info!(reason = name, "resolved: {}", reason.text);
        }
        if !reason.is_warning && self.is_ready() {
            tracing::info!("ready");
        }
    }

    /// Removes every reason and warning whose name begins with `prefix`, unless `is_kept` returns
    /// true for it.
    pub fn retain(&self, prefix: &str, is_kept: impl Fn(&str) -> bool) {
        let names: Vec<String> = self
            .lock()
            .keys()
            .filter(|name| name.starts_with(prefix) && !is_kept(name))
            .cloned()
            .collect();
        for name in names {
            self.clear(&name);
        }
    }

    pub fn is_ready(&self) -> bool {
        self.lock()
            .values()
            .all(|reason| reason.is_warning || !reason.holds())
    }

    pub fn report(&self) -> Report {
        let reasons = self.lock();
        let of = |is_warning| {
            let held = reasons
                .iter()
                .filter(|(_, r)| r.is_warning == is_warning && r.holds());
            let texts = held.map(|(name, r)| NamedText {
                name: name.clone(),
                text: r.text.clone(),
            });
            texts.collect::<Vec<_>>()
        };
        let (reasons, warnings) = (of(false), of(true));
        let notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        let notes = notes.iter().map(|(name, text)| NamedText {
            name: name.clone(),
            text: text.clone(),
        });
        let notes: Vec<_> = notes.collect();
        let line =
            |prefix: &str, NamedText { name, text }: &NamedText| format!("{prefix}{name}: {text}");
        let red = reasons.iter().map(|reason| line("", reason));
        let yellow = warnings.iter().map(|warning| line("warning: ", warning));
        let grey = notes.iter().map(|note| line("note: ", note));
        Report {
            is_ready: reasons.is_empty(),
            lines: red.chain(yellow).chain(grey).collect(),
            reasons,
            warnings,
            notes,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Reason>> {
        // A map operation does not panic half-way, so the map behind a poisoned lock is intact.
        self.reasons.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_whose_text_alternates_is_not_logged_each_time() {
        let now = Instant::now();
        let long_ago = now.checked_sub(2 * LOG_EVERY).unwrap();
        let reason = |text: &str, is_warning, logged: Option<(Instant, &str)>| Reason {
            text: text.to_owned(),
            is_warning,
            is_expected: false,
            until: None,
            logged: logged.map(|(at, text)| Logged {
                at,
                text: text.to_owned(),
            }),
        };
        let next = reason("reset", false, None);
        let is_logged = |before: &Reason| next.logged_as(Some(before)).is_some();
        let pipe = "broken pipe";
        assert!(is_logged(&reason(pipe, false, Some((now, pipe)))));
        assert!(!is_logged(&reason(pipe, false, Some((long_ago, pipe)))));
        assert!(is_logged(&reason(pipe, false, Some((long_ago, "reset")))));
        assert!(
            !is_logged(&reason("reset", false, Some((long_ago, pipe)))),
            "a text that stays is logged once"
        );
        assert!(!is_logged(&reason("reset", true, Some((now, "reset")))));
        assert!(!is_logged(&reason("reset", false, None)));
        assert_eq!(next.logged_as(None), None);
        let expired = Reason {
            until: Some(now),
            ..reason("reset", false, Some((now, "reset")))
        };
        assert!(!is_logged(&expired));
    }

    #[test]
    fn reasons_make_the_node_unready_and_warnings_do_not() {
        let readiness = Readiness::default();
        readiness.warn(
            "broker.append-only-file",
            "the append-only file is off; run CONFIG SET appendonly yes",
        );
        assert!(readiness.is_ready());
        readiness.set("broker", "unavailable:\nconnection refused");
        let report = readiness.report();
        assert!(!report.is_ready);
        assert_eq!(
            report.lines,
            [
                "broker: unavailable: connection refused",
                "warning: broker.append-only-file: the append-only file is off; run CONFIG SET appendonly yes"
            ]
        );
        readiness.retain("broker", |_| false);
        assert!(readiness.is_ready());
        readiness.set_for("publishing", "full", Duration::from_secs(3600));
        assert!(!readiness.is_ready());
        readiness.set_for("publishing", "full", Duration::ZERO);
        assert!(readiness.is_ready());
    }
}
