//! The broker's clock as a node knows it. Every decision about an event that depends on time uses
//! it, so that nodes whose clocks differ decide alike.
//!
//! Redis sends its time with the answers to ticks and heads. In between, the clock advances with
//! the uptime of this machine; setting the node's own clock does not move it. The embedded broker
//! takes the node's clock once, when it starts.

use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

use crate::clock::{now_ms, uptime_ms};

/// A difference between the two clocks up to this, in milliseconds, is not reported.
const TOLERANCE_MS: i64 = 2_000;
/// A reported difference stays the same until it has changed by more than this, in milliseconds:
/// otherwise each check would report another number.
const REPORT_STEP_MS: i64 = 1_000;

/// See the head of this file.
#[derive(Debug)]
pub(super) struct BrokerClock {
    /// The broker's time minus the uptime of this machine, in milliseconds.
    offset_ms: AtomicI64,
    /// The last reported difference between the clocks, in milliseconds; 0: none.
    reported_ms: AtomicI64,
}

/// The uptime of this machine when a request was sent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sent(u64);

impl Sent {
    pub(super) fn now() -> Self {
        Self(uptime_ms())
    }
}

impl BrokerClock {
    /// The clock of a broker in this process: begins with the node's clock.
    pub(super) fn of_node() -> Self {
        Self::at(now_ms(), uptime_ms())
    }

    /// A clock that begins with the broker's time in the answer to a request.
    pub(super) fn from_answer(broker_ms: u64, sent: Sent) -> Self {
        Self::at(broker_ms, sent.0)
    }

    fn at(broker_ms: u64, uptime_ms: u64) -> Self {
        Self {
            offset_ms: AtomicI64::new(offset(broker_ms, uptime_ms)),
            reported_ms: AtomicI64::new(0),
        }
    }

    /// The broker's time in milliseconds since the Unix epoch.
    pub(super) fn now_ms(&self) -> u64 {
        uptime_ms().saturating_add_signed(self.offset_ms.load(Relaxed))
    }

    /// Corrects the clock by the broker's time in the answer to a request.
    pub(super) fn observe(&self, broker_ms: u64, sent: Sent) {
        self.correct(broker_ms, sent.0, uptime_ms());
    }

    /// The broker read its clock between `sent_ms` and `received_ms`, both uptimes. The offset
    /// stays where that is possible and otherwise moves to the nearer end, so that a slow answer
    /// does not set the clock back.
    fn correct(&self, broker_ms: u64, sent_ms: u64, received_ms: u64) {
        let lowest = offset(broker_ms, received_ms);
        // The broker's time is rounded down to a millisecond.
        let highest = offset(broker_ms, sent_ms).max(lowest) + 1;
        // `None` is never returned, so this always stores.
        let _before = self
            .offset_ms
            .fetch_update(Relaxed, Relaxed, |now| Some(now.clamp(lowest, highest)));
    }

    /// The seconds by which this node's clock is ahead of the broker's, negative if it is behind;
    /// `None` if they differ by at most 2 s.
    pub(super) fn node_ahead_s(&self) -> Option<i64> {
        self.ahead_s(offset(now_ms(), 0) - offset(self.now_ms(), 0))
    }

    fn ahead_s(&self, ahead_ms: i64) -> Option<i64> {
        let reported_ms = self.reported_ms.load(Relaxed);
        let ahead_ms = if ahead_ms.abs() <= TOLERANCE_MS {
            0
        } else if (ahead_ms - reported_ms).abs() <= REPORT_STEP_MS {
            reported_ms
        } else {
            ahead_ms
        };
        self.reported_ms.store(ahead_ms, Relaxed);
        (ahead_ms != 0).then(|| (ahead_ms as f64 / 1_000.0).round() as i64)
    }
}

/// `at_ms - from_ms`.
fn offset(at_ms: u64, from_ms: u64) -> i64 {
    let most = i64::MAX as u64;
    at_ms.min(most) as i64 - from_ms.min(most) as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offset_of(clock: &BrokerClock) -> i64 {
        clock.offset_ms.load(Relaxed)
    }

    #[test]
    fn the_broker_clock_follows_each_step_of_the_broker_within_the_time_of_a_request() {
        let clock = BrokerClock::at(1_000_000, 0);
        for (broker_ms, uptime_ms) in [(4_600_000, 10), (1_000_020, 20), (1_000_030, 30)] {
            clock.correct(broker_ms, uptime_ms, uptime_ms + 4);
            let error = offset_of(&clock) - offset(broker_ms, uptime_ms);
            assert!((-4..=1).contains(&error), "{error}");
        }
    }

    #[test]
    fn a_slow_answer_does_not_set_the_broker_clock_back() {
        let clock = BrokerClock::at(1_000_000, 0);
        // Read at once and answered after two seconds, then read only after two seconds.
        clock.correct(1_000_100, 100, 2_100);
        assert_eq!(offset_of(&clock), 1_000_000);
        clock.correct(1_005_000, 3_000, 5_000);
        assert_eq!(offset_of(&clock), 1_000_000);
    }

    #[test]
    fn a_clock_difference_above_two_seconds_is_reported_and_small_changes_of_it_are_not() {
        let clock = BrokerClock::at(1_000_000, 0);
        assert_eq!(clock.ahead_s(2_000), None);
        assert_eq!(clock.ahead_s(-3_600_000), Some(-3600));
        for ms in [-3_600_600, -3_599_400] {
            assert_eq!(clock.ahead_s(ms), Some(-3600));
        }
        assert_eq!(clock.ahead_s(-3_602_000), Some(-3602));
        assert_eq!(clock.ahead_s(-1_500), None);
        assert_eq!(clock.ahead_s(2_400), Some(2));
    }
}
