//! Rates: how many of something may happen in a second, in bursts of up to ten seconds' worth (a
//! token bucket).
//!
//! It computes and does not wait. The clock is an argument, so that tests need none.

use std::time::{Duration, Instant};

/// The seconds whose worth may come at once.
const BURST_S: f64 = 10.0;

/// A bound of events per second.
#[derive(Clone, Copy, Debug)]
pub struct Rate(f64);

impl Rate {
    /// `None`: 0 stands for no bound.
    pub fn new(per_second: u32) -> Option<Self> {
        (per_second > 0).then_some(Self(f64::from(per_second)))
    }
}

/// The rest of a rate.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    rate: Rate,
    tokens: f64,
    at: Instant,
}

impl Bucket {
    pub fn full(rate: Rate, now: Instant) -> Self {
        Self {
            rate,
            tokens: rate.0 * BURST_S,
            at: now,
        }
    }

    /// How long it takes until something is left; `None` if something is.
    pub fn wait(&mut self, now: Instant) -> Option<Duration> {
        self.refill(now);
        (self.tokens < 1.0).then(|| Duration::from_secs_f64((1.0 - self.tokens) / self.rate.0))
    }

    /// Takes as many, even if fewer are left: what follows then waits for longer.
    pub fn take(&mut self, n: usize, now: Instant) {
        self.refill(now);
        self.tokens -= n as f64;
    }

    pub fn is_full(&mut self, now: Instant) -> bool {
        self.refill(now);
        self.tokens >= self.rate.0 * BURST_S
    }

    fn refill(&mut self, now: Instant) {
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        self.tokens = (self.tokens + since * self.rate.0).min(self.rate.0 * BURST_S);
        self.at = self.at.max(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_holds_ten_seconds_worth_and_refills_at_its_rate() {
        let now = Instant::now();
        let after = |ms| now + Duration::from_millis(ms);
        assert!(Rate::new(0).is_none());
        let mut bucket = Bucket::full(Rate::new(2).unwrap(), now);
        for _ in 0..20 {
            assert_eq!(bucket.wait(now), None);
            bucket.take(1, now);
        }
        assert_eq!(bucket.wait(now), Some(Duration::from_millis(500)));
        assert_eq!(bucket.wait(after(250)), Some(Duration::from_millis(250)));
        assert_eq!(bucket.wait(after(500)), None);
        // A batch may take more than is left.
        bucket.take(5, after(500));
        assert_eq!(bucket.wait(after(500)), Some(Duration::from_millis(2_500)));
        assert!(!bucket.is_full(after(12_000)) && bucket.is_full(after(12_500)));
        // A clock that stands still or goes back adds nothing.
        bucket.take(20, after(13_000));
        assert!(bucket.wait(after(1)).is_some());
    }
}
