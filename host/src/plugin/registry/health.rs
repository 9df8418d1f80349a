//! The health of one generation of a plugin: its probation and its circuit breaker.
//!
//! A generation that has just replaced another is on **probation**: if it fails on more events than
//! allowed, it is to be rolled back. The **breaker** opens when a plugin failed on so many events
//! in a row that the next call is likely to be wasted. While it is open, events are settled by the
//! plugin's failure policy without a call, immediately instead of after two deadlines. Then one
//! event is tried (half-open), and its result closes the breaker or opens it for longer. A plugin's
//! verdict on an event (`reject`, `retry`) is not a failure.
//!
//! This file only judges. `pipeline` calls the plugins and settles the events; `registry` rolls
//! back. While a plugin is healthy, the cost is two relaxed reads per event.

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use serde::Serialize;

/// Failed events before a failure rate is a reason to roll back.
const MIN_FAILED: u64 = 5;
/// Events before a probation can end: without traffic, as at night, elapsed time proves nothing.
const MIN_EVENTS: u64 = 20;
/// How long the breaker stays open the first time, and at most. The pause doubles each time that
/// the half-open attempt fails.
const PAUSE: Duration = Duration::from_secs(1);
const MAX_PAUSE: Duration = Duration::from_secs(60);

/// When a plugin counts as unhealthy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HealthPolicy {
    /// The duration of a probation; zero disables it.
    pub(super) probation: Duration,
    /// The maximum share of events in a probation that may fail, in percent.
    pub(super) probation_failure_percent: u64,
    /// Consecutive failures that open the breaker; zero disables it.
    pub(super) breaker_failures: u32,
}

/// The health of one role of one generation. Thread-safe.
#[derive(Debug)]
pub struct Health {
    policy: HealthPolicy,
    /// Events of the probation, counted while it lasts.
    n_events: AtomicU64,
    is_on_probation: AtomicBool,
    /// Whether the last event failed or the breaker is not closed. While false, the lock is not
    /// taken.
    is_impaired: AtomicBool,
    failures: Mutex<FailureCounts>,
}

#[derive(Debug)]
struct FailureCounts {
    probation_ends: Instant,
    /// Events that failed during the probation.
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
    /// One event is being tried; if its result is still unknown by `until`, another is tried.
    HalfOpen {
        until: Instant,
        pause: Duration,
    },
}

/// Whether a plugin may be called for an event.
#[derive(Debug, PartialEq)]
pub(crate) enum Permit {
    Granted,
    /// The breaker is open.
    Rejected(Rejected),
}

/// Why an event is settled without a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rejected {
    n_failed_in_row: u32,
    again_in: Duration,
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            n_failed_in_row,
            again_in,
        } = self;
        write!(
            f,
            "it was not called: it failed on {n_failed_in_row} events in a row; the next attempt is in {} ms",
            again_in.as_millis()
        )
    }
}

/// The effect of a settled event on its plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Transition {
    /// No change that others need to know.
    None,
    /// The breaker opened or closed.
    Breaker,
    /// It failed too often during its probation. Holds the reason.
    RollBack(String),
}

/// The health as shown to operators.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct HealthReport {
    /// `None`: the probation is over.
    pub probation: Option<Probation>,
    pub breaker: BreakerState,
    /// Events that failed since the last success.
    pub consecutive_failures: u32,
    /// Milliseconds until the breaker lets the next event through; `None` while it is closed.
    pub retry_in_ms: Option<u64>,
}

impl HealthReport {
    /// Sorts by severity; greater is worse.
    pub(super) fn severity(&self) -> (bool, u64, u32) {
        (
            self.breaker != BreakerState::Closed,
            self.probation.map_or(0, |probation| probation.failed),
            self.consecutive_failures,
        )
    }
}

/// A probation in progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Probation {
    pub ends_in_ms: u64,
    pub events: u64,
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
    /// `is_on_probation`: there is another generation to roll back to.
    pub(super) fn new(policy: HealthPolicy, is_on_probation: bool, now: Instant) -> Self {
        let failures = FailureCounts {
            probation_ends: now + policy.probation,
            n_failed: 0,
            n_failed_in_row: 0,
            breaker: Breaker::Closed,
        };
        Self {
            policy,
            n_events: AtomicU64::new(0),
            is_on_probation: AtomicBool::new(is_on_probation && !policy.probation.is_zero()),
            is_impaired: AtomicBool::new(false),
            failures: Mutex::new(failures),
        }
    }

    /// Call before each event. The result of an admitted event must be noted afterwards.
    pub(crate) fn admit(&self, now: Instant) -> Permit {
        if !self.is_impaired.load(Relaxed) {
            return Permit::Granted;
        }
        let mut failures = self.failures.lock().expect("no panic under this lock");
        let n_failed_in_row = failures.n_failed_in_row;
        match failures.breaker {
            Breaker::Closed => Permit::Granted,
            Breaker::Open { until, pause } | Breaker::HalfOpen { until, pause } if now >= until => {
                failures.breaker = Breaker::HalfOpen {
                    until: now + pause,
                    pause,
                };
                Permit::Granted
            }
            Breaker::Open { until, .. } | Breaker::HalfOpen { until, .. } => {
                Permit::Rejected(Rejected {
                    n_failed_in_row,
                    again_in: until - now,
                })
            }
        }
    }

    /// Call after each event that the plugin answered; verdicts such as `reject` count as answers.
    pub(crate) fn note_answer(&self) -> Transition {
        if self.is_on_probation.load(Relaxed) {
            self.n_events.fetch_add(1, Relaxed);
        }
        if !self.is_impaired.load(Relaxed) {
            return Transition::None;
        }
        let mut failures = self.failures.lock().expect("no panic under this lock");
        failures.n_failed_in_row = 0;
        self.is_impaired.store(false, Relaxed);
        match std::mem::replace(&mut failures.breaker, Breaker::Closed) {
            Breaker::Closed => Transition::None,
            Breaker::Open { .. } | Breaker::HalfOpen { .. } => Transition::Breaker,
        }
    }

    /// Call after each event that the plugin failed on.
    pub(crate) fn note_failure(&self, now: Instant) -> Transition {
        let mut failures = self.failures.lock().expect("no panic under this lock");
        self.is_impaired.store(true, Relaxed);
        failures.n_failed_in_row = failures.n_failed_in_row.saturating_add(1);
        if self.is_on_probation.load(Relaxed) {
            if !self.is_over(&failures, now) {
                let n_events = self.n_events.fetch_add(1, Relaxed) + 1;
                failures.n_failed += 1;
                let n_failed = failures.n_failed;
                if n_failed >= MIN_FAILED
                    && n_failed * 100 > n_events * self.policy.probation_failure_percent
                {
                    self.is_on_probation.store(false, Relaxed);
                    let most = self.policy.probation_failure_percent;
                    return Transition::RollBack(format!(
                        "failed on {n_failed} of {n_events} events during its probation; the limit is {most} % (probation_failure_percent)"
                    ));
                }
            } else {
                self.is_on_probation.store(false, Relaxed);
            }
        }
        let opens = self.policy.breaker_failures;
        match failures.breaker {
            Breaker::HalfOpen { pause, .. } => {
                let pause = (pause * 2).min(MAX_PAUSE);
                failures.breaker = Breaker::Open {
                    until: now + pause,
                    pause,
                };
                Transition::None
            }
            Breaker::Closed if opens > 0 && failures.n_failed_in_row >= opens => {
                failures.breaker = Breaker::Open {
                    until: now + PAUSE,
                    pause: PAUSE,
                };
                Transition::Breaker
            }
            // Calls on other threads that were already running when the breaker opened.
            Breaker::Closed | Breaker::Open { .. } => Transition::None,
        }
    }

    /// Ends the probation without a judgement.
    pub(super) fn end_probation(&self) {
        self.is_on_probation.store(false, Relaxed);
    }

    /// Whether the generation has no probation, or has passed it.
    pub(super) fn is_proven(&self, now: Instant) -> bool {
        !self.is_on_probation.load(Relaxed)
            || self.is_over(
                &self.failures.lock().expect("no panic under this lock"),
                now,
            )
    }

    /// Whether a probation has lasted long enough, in time and in events.
    fn is_over(&self, failures: &FailureCounts, now: Instant) -> bool {
        now >= failures.probation_ends && self.n_events.load(Relaxed) >= MIN_EVENTS
    }

    pub(super) fn report(&self, now: Instant) -> HealthReport {
        let failures = self.failures.lock().expect("no panic under this lock");
        let left = failures.probation_ends.saturating_duration_since(now);
        let is_on_probation = self.is_on_probation.load(Relaxed) && !self.is_over(&failures, now);
        let (events, failed) = (self.n_events.load(Relaxed), failures.n_failed);
        let (breaker, retry_in) = match failures.breaker {
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
        HealthReport {
            probation: is_on_probation.then_some(Probation {
                ends_in_ms: left.as_millis() as u64,
                events,
                failed,
            }),
            breaker,
            consecutive_failures: failures.n_failed_in_row,
            retry_in_ms: retry_in.map(|wait| wait.as_millis() as u64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: HealthPolicy = HealthPolicy {
        probation: Duration::from_secs(60),
        probation_failure_percent: 10,
        breaker_failures: 10,
    };

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn a_plugin_that_fails_too_often_on_probation_is_rolled_back_after_a_minimum_of_failures() {
        let began = Instant::now();
        // Three of ten events fail.
        let transitions_of = |is_on_probation, at| {
            let health = Health::new(POLICY, is_on_probation, began);
            let transitions = (0..100).map(|n| {
                if n % 10 < 3 {
                    health.note_failure(at)
                } else {
                    health.note_answer()
                }
            });
            transitions
                .enumerate()
                .filter(|(_, transition)| *transition != Transition::None)
                .collect::<Vec<_>>()
        };
        let rolled_back = transitions_of(true, began + seconds(59));
        let [(11, Transition::RollBack(reason))] = rolled_back.as_slice() else {
            panic!("{rolled_back:?}")
        };
        assert!(
            reason.starts_with("failed on 5 of 12 events during its probation; the limit is 10 %"),
            "{reason}"
        );
        assert_eq!(
            transitions_of(true, began + seconds(60)).len(),
            1,
            "the probation does not end by time alone"
        );
        assert_eq!(transitions_of(false, began), [], "there is no probation");
    }

    #[test]
    fn a_plugin_at_the_failure_limit_passes_its_probation() {
        let began = Instant::now();
        let health = Health::new(POLICY, true, began);
        for n in 1..=1_000 {
            let transition = if n % 10 == 0 {
                health.note_failure(began)
            } else {
                health.note_answer()
            };
            assert_eq!(transition, Transition::None, "{n}");
        }
        assert_eq!(
            health.report(began).probation,
            Some(Probation {
                ends_in_ms: 60_000,
                events: 1_000,
                failed: 100
            })
        );
        assert!(!health.is_proven(began) && health.is_proven(began + seconds(60)));
        assert_eq!(health.report(began + seconds(60)).probation, None);
    }

    #[test]
    fn the_breaker_opens_after_consecutive_failures_and_doubles_its_pause_if_the_attempt_fails() {
        let mut now = Instant::now();
        let health = Health::new(POLICY, false, now);
        let fail = |n: u32, at| (0..n).map(|_| health.note_failure(at)).collect::<Vec<_>>();
        assert!(
            fail(9, now)
                .iter()
                .all(|transition| *transition == Transition::None)
        );
        // A success resets the count.
        assert_eq!(health.note_answer(), Transition::None);
        assert!(
            fail(9, now)
                .iter()
                .all(|transition| *transition == Transition::None)
        );
        assert_eq!(health.admit(now), Permit::Granted);
        assert_eq!(health.note_failure(now), Transition::Breaker);
        for pause in [1, 2, 4, 8, 16, 32, 60, 60] {
            let Permit::Rejected(rejected) = health.admit(now) else {
                panic!("it was called within its pause of {pause} s")
            };
            assert_eq!(rejected.again_in, seconds(pause));
            assert_eq!(health.report(now).breaker, BreakerState::Open);
            now += seconds(pause);
            assert_eq!(health.admit(now), Permit::Granted);
            assert!(
                matches!(health.admit(now), Permit::Rejected(_)),
                "only one event is tried"
            );
            assert_eq!(health.report(now).breaker, BreakerState::HalfOpen);
            // The result never arrives, for example because the host panicked.
            now += seconds(pause);
            assert_eq!(health.admit(now), Permit::Granted);
            assert_eq!(health.note_failure(now), Transition::None);
        }
        now += seconds(60);
        assert_eq!(health.admit(now), Permit::Granted);
        assert_eq!(health.note_answer(), Transition::Breaker);
        assert_eq!(
            (health.admit(now), health.report(now).consecutive_failures),
            (Permit::Granted, 0)
        );
    }

    #[test]
    fn a_disabled_breaker_never_opens() {
        let now = Instant::now();
        let health = Health::new(
            HealthPolicy {
                breaker_failures: 0,
                ..POLICY
            },
            false,
            now,
        );
        for _ in 0..1_000 {
            assert_eq!(health.note_failure(now), Transition::None);
            assert_eq!(health.admit(now), Permit::Granted);
        }
    }
}
