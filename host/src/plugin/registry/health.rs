//! How a generation of a plugin fares with the events it is asked about: its probation and its breaker.
//!
//! On **probation** is what has just taken another generation's place: if it fails on more events than it may, it is to be rolled back. The
//! **breaker** opens when a plugin failed on so many events in a row that the next call is likely wasted: while it is open, events are
//! settled by the plugin's failure policy without a call, at once instead of after two deadlines; then one event is tried (half open), and by
//! that it closes or opens for longer. What a plugin says of an event (`reject`, `retry`) is its verdict, and no failure.
//!
//! Judges only. Who is asked, and what becomes of the event, is `pipeline`'s business; what takes the place of what is rolled back,
//! `registry`'s. While all is well, it costs two relaxed reads an event.

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use serde::Serialize;

/// So many events must have failed before a share of them is a reason to roll back.
const MIN_FAILED: u64 = 5;
/// So many events end a probation, beside its time: at night, time alone says nothing.
const MIN_ASKED: u64 = 20;
/// For how long the breaker is open the first time, and at the most: twice as long each time that the event it tries fails.
const PAUSE: Duration = Duration::from_secs(1);
const MAX_PAUSE: Duration = Duration::from_secs(60);

/// When a plugin is no longer trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::plugin) struct Tolerance {
    /// How long a probation lasts; zero: there is none.
    pub(in crate::plugin) probation: Duration,
    /// Of the events of a probation, the most that may fail, in percent.
    pub(in crate::plugin) probation_failure_percent: u64,
    /// Failures in a row that open the breaker; zero: it never opens.
    pub(in crate::plugin) breaker_failures: u32,
}

/// See the head of this file.
#[derive(Debug)]
pub struct Health {
    tolerance: Tolerance,
    /// Of the probation, as long as it lasts.
    n_asked: AtomicU64,
    is_on_probation: AtomicBool,
    /// Whether the last event failed, or the breaker is not closed: else the lock need not be taken.
    is_ailing: AtomicBool,
    ailments: Mutex<Ailments>,
}

#[derive(Debug)]
struct Ailments {
    probation_ends: Instant,
    /// Within the probation.
    n_failed: u64,
    n_failed_in_row: u32,
    breaker: Breaker,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Breaker {
    Closed,
    Open {
        until: Instant,
        pause: Duration,
    },
    /// One event is being tried; if nothing was heard of it by then, another is.
    HalfOpen {
        until: Instant,
        pause: Duration,
    },
}

/// Whether a plugin may be asked about an event.
#[derive(Debug, PartialEq)]
pub(crate) enum Admission {
    Asked,
    /// The breaker is open.
    Spared(Spared),
}

/// Why an event is settled without a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spared {
    n_failed_in_row: u32,
    again_in: Duration,
}

impl fmt::Display for Spared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            n_failed_in_row,
            again_in,
        } = self;
        write!(
            f,
            "it was not asked: it failed on {n_failed_in_row} events in a row, and is tried again in {} ms",
            again_in.as_millis()
        )
    }
}

/// What follows from an event that was settled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Consequence {
    /// Nothing that anybody else need know.
    None,
    /// The breaker opened or closed.
    Breaker,
    /// It fails too often for its probation; with the reason.
    RollBack(String),
}

/// For operators.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// `None`: it is over.
    pub probation: Option<Probation>,
    pub breaker: BreakerState,
    /// Events that failed since the last that did not.
    pub failed_in_row: u32,
    /// Milliseconds until the breaker lets the next event through; `None` while it is closed.
    pub retry_in_ms: Option<u64>,
}

impl Report {
    /// The more, the worse.
    pub(in crate::plugin) fn trouble(&self) -> (bool, u64, u32) {
        (
            self.breaker != BreakerState::Closed,
            self.probation.map_or(0, |probation| probation.failed),
            self.failed_in_row,
        )
    }
}

/// A probation under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Probation {
    pub ends_in_ms: u64,
    pub asked: u64,
    pub failed: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BreakerState {
    #[default]
    Closed,
    Open,
    HalfOpen,
}

impl Health {
    /// `is_on_probation`: another generation could take its place.
    pub(in crate::plugin) fn new(
        tolerance: Tolerance,
        is_on_probation: bool,
        now: Instant,
    ) -> Self {
        let ailments = Ailments {
            probation_ends: now + tolerance.probation,
            n_failed: 0,
            n_failed_in_row: 0,
            breaker: Breaker::Closed,
        };
        Self {
            tolerance,
            n_asked: AtomicU64::new(0),
            is_on_probation: AtomicBool::new(is_on_probation && !tolerance.probation.is_zero()),
            is_ailing: AtomicBool::new(false),
            ailments: Mutex::new(ailments),
        }
    }

    /// Before each event. An event that is admitted is to be noted afterwards.
    pub(crate) fn admit(&self, now: Instant) -> Admission {
        if !self.is_ailing.load(Relaxed) {
            return Admission::Asked;
        }
        let mut ailments = self.ailments.lock().expect("no panic under this lock");
        let n_failed_in_row = ailments.n_failed_in_row;
        match ailments.breaker {
            Breaker::Closed => Admission::Asked,
            Breaker::Open { until, pause } | Breaker::HalfOpen { until, pause } if now >= until => {
                ailments.breaker = Breaker::HalfOpen {
                    until: now + pause,
                    pause,
                };
                Admission::Asked
            }
            Breaker::Open { until, .. } | Breaker::HalfOpen { until, .. } => {
                Admission::Spared(Spared {
                    n_failed_in_row,
                    again_in: until - now,
                })
            }
        }
    }

    /// After each event that it was asked about, whatever its answer: what it says of an event is no failure.
    pub(crate) fn note_answer(&self) -> Consequence {
        if self.is_on_probation.load(Relaxed) {
            self.n_asked.fetch_add(1, Relaxed);
        }
        if !self.is_ailing.load(Relaxed) {
            return Consequence::None;
        }
        let mut ailments = self.ailments.lock().expect("no panic under this lock");
        ailments.n_failed_in_row = 0;
        self.is_ailing.store(false, Relaxed);
        match std::mem::replace(&mut ailments.breaker, Breaker::Closed) {
            Breaker::Closed => Consequence::None,
            Breaker::Open { .. } | Breaker::HalfOpen { .. } => Consequence::Breaker,
        }
    }

    /// After each event that it failed on.
    pub(crate) fn note_failure(&self, now: Instant) -> Consequence {
        let mut ailments = self.ailments.lock().expect("no panic under this lock");
        self.is_ailing.store(true, Relaxed);
        ailments.n_failed_in_row = ailments.n_failed_in_row.saturating_add(1);
        if self.is_on_probation.load(Relaxed) {
            if !self.is_over(&ailments, now) {
                let n_asked = self.n_asked.fetch_add(1, Relaxed) + 1;
                ailments.n_failed += 1;
                let n_failed = ailments.n_failed;
                if n_failed >= MIN_FAILED
                    && n_failed * 100 > n_asked * self.tolerance.probation_failure_percent
                {
                    self.is_on_probation.store(false, Relaxed);
                    let most = self.tolerance.probation_failure_percent;
                    return Consequence::RollBack(format!(
                        "failed on {n_failed} of {n_asked} events within its probation; {most} % is the most (probation_failure_percent)"
                    ));
                }
            } else {
                self.is_on_probation.store(false, Relaxed);
            }
        }
        let opens = self.tolerance.breaker_failures;
        match ailments.breaker {
            Breaker::HalfOpen { pause, .. } => {
                let pause = (pause * 2).min(MAX_PAUSE);
                ailments.breaker = Breaker::Open {
                    until: now + pause,
                    pause,
                };
                Consequence::None
            }
            Breaker::Closed if opens > 0 && ailments.n_failed_in_row >= opens => {
                ailments.breaker = Breaker::Open {
                    until: now + PAUSE,
                    pause: PAUSE,
                };
                Consequence::Breaker
            }
            // Calls that were under way as it opened, on other threads.
            Breaker::Closed | Breaker::Open { .. } => Consequence::None,
        }
    }

    /// Ends the probation, whatever came of it.
    pub(in crate::plugin) fn end_probation(&self) {
        self.is_on_probation.store(false, Relaxed);
    }

    /// Whether nothing is held against it: its probation, if it had one, is over.
    pub(in crate::plugin) fn is_proven(&self, now: Instant) -> bool {
        !self.is_on_probation.load(Relaxed)
            || self.is_over(
                &self.ailments.lock().expect("no panic under this lock"),
                now,
            )
    }

    /// Whether a probation has lasted for long enough.
    fn is_over(&self, ailments: &Ailments, now: Instant) -> bool {
        now >= ailments.probation_ends && self.n_asked.load(Relaxed) >= MIN_ASKED
    }

    pub(in crate::plugin) fn report(&self, now: Instant) -> Report {
        let ailments = self.ailments.lock().expect("no panic under this lock");
        let left = ailments.probation_ends.saturating_duration_since(now);
        let is_on_probation = self.is_on_probation.load(Relaxed) && !self.is_over(&ailments, now);
        let (asked, failed) = (self.n_asked.load(Relaxed), ailments.n_failed);
        let (breaker, retry_in) = match ailments.breaker {
            Breaker::Closed => (BreakerState::Closed, None),
            Breaker::Open { until, .. } => (
                BreakerState::Open,
                Some(until.saturating_duration_since(now)),
            ),
            Breaker::HalfOpen { until, .. } => (
                BreakerState::HalfOpen,
                Some(until.saturating_duration_since(now)),
            ),
        };
        Report {
            probation: is_on_probation.then_some(Probation {
                ends_in_ms: left.as_millis() as u64,
                asked,
                failed,
            }),
            breaker,
            failed_in_row: ailments.n_failed_in_row,
            retry_in_ms: retry_in.map(|wait| wait.as_millis() as u64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOLERANCE: Tolerance = Tolerance {
        probation: Duration::from_secs(60),
        probation_failure_percent: 10,
        breaker_failures: 10,
    };

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn what_fails_too_often_on_probation_is_to_be_rolled_back_once_it_is_more_than_bad_luck() {
        let began = Instant::now();
        // Of ten events, three fail.
        let fares = |is_on_probation, at| {
            let health = Health::new(TOLERANCE, is_on_probation, began);
            let consequences = (0..100).map(|n| {
                if n % 10 < 3 {
                    health.note_failure(at)
                } else {
                    health.note_answer()
                }
            });
            consequences
                .enumerate()
                .filter(|(_, consequence)| *consequence != Consequence::None)
                .collect::<Vec<_>>()
        };
        let rolled_back = fares(true, began + seconds(59));
        let [(11, Consequence::RollBack(reason))] = rolled_back.as_slice() else {
            panic!("{rolled_back:?}")
        };
        assert!(
            reason.starts_with("failed on 5 of 12 events within its probation; 10 % is the most"),
            "{reason}"
        );
        assert_eq!(
            fares(true, began + seconds(60)).len(),
            1,
            "time alone says nothing"
        );
        assert_eq!(fares(false, began), [], "it has none");
    }

    #[test]
    fn what_fails_as_seldom_as_it_may_passes_its_probation() {
        let began = Instant::now();
        let health = Health::new(TOLERANCE, true, began);
        for n in 1..=1_000 {
            let consequence = if n % 10 == 0 {
                health.note_failure(began)
            } else {
                health.note_answer()
            };
            assert_eq!(consequence, Consequence::None, "{n}");
        }
        assert_eq!(
            health.report(began).probation,
            Some(Probation {
                ends_in_ms: 60_000,
                asked: 1_000,
                failed: 100
            })
        );
        assert!(!health.is_proven(began) && health.is_proven(began + seconds(60)));
        assert_eq!(health.report(began + seconds(60)).probation, None);
    }

    #[test]
    fn the_breaker_opens_after_failures_in_a_row_tries_one_event_and_waits_twice_as_long_if_that_fails()
     {
        let mut now = Instant::now();
        let health = Health::new(TOLERANCE, false, now);
        let fail = |n: u32, at| (0..n).map(|_| health.note_failure(at)).collect::<Vec<_>>();
        assert!(
            fail(9, now)
                .iter()
                .all(|consequence| *consequence == Consequence::None)
        );
        // One that does not fail makes the count begin anew.
        assert_eq!(health.note_answer(), Consequence::None);
        assert!(
            fail(9, now)
                .iter()
                .all(|consequence| *consequence == Consequence::None)
        );
        assert_eq!(health.admit(now), Admission::Asked);
        assert_eq!(health.note_failure(now), Consequence::Breaker);
        for pause in [1, 2, 4, 8, 16, 32, 60, 60] {
            let Admission::Spared(spared) = health.admit(now) else {
                panic!("it was asked within its pause of {pause} s")
            };
            assert_eq!(spared.again_in, seconds(pause));
            assert_eq!(health.report(now).breaker, BreakerState::Open);
            now += seconds(pause);
            assert_eq!(health.admit(now), Admission::Asked);
            assert!(
                matches!(health.admit(now), Admission::Spared(_)),
                "one event is enough to try"
            );
            assert_eq!(health.report(now).breaker, BreakerState::HalfOpen);
            // Nothing is heard of it, as where the host itself panicked.
            now += seconds(pause);
            assert_eq!(health.admit(now), Admission::Asked);
            assert_eq!(health.note_failure(now), Consequence::None);
        }
        now += seconds(60);
        assert_eq!(health.admit(now), Admission::Asked);
        assert_eq!(health.note_answer(), Consequence::Breaker);
        assert_eq!(
            (health.admit(now), health.report(now).failed_in_row),
            (Admission::Asked, 0)
        );
    }

    #[test]
    fn a_breaker_that_was_put_out_of_force_never_opens() {
        let now = Instant::now();
        let health = Health::new(
            Tolerance {
                breaker_failures: 0,
                ..TOLERANCE
            },
            false,
            now,
        );
        for _ in 0..1_000 {
            assert_eq!(health.note_failure(now), Consequence::None);
            assert_eq!(health.admit(now), Admission::Asked);
        }
    }
}
