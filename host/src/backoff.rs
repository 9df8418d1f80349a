//! Exponential backoff: the pauses between the attempts of one task.
//!
//! It computes pauses and does not sleep. A pause that a peer dictates, such as `Retry-After`, does
//! not belong here; neither does the breaker of a plugin, whose pauses are not random.

use std::ops::RangeInclusive;
use std::time::Duration;

/// Each pause is twice as long as the one before, up to a limit, and multiplied by a random factor,
/// so that nodes do not retry in lockstep.
#[derive(Clone, Debug)]
pub struct Backoff {
    from: Duration,
    to: Duration,
    jitter: RangeInclusive<f64>,
    next: Duration,
}

impl Backoff {
    /// `from` and `to`: the first and the longest pause before `jitter`, the range of the factor.
    pub const fn new(from: Duration, to: Duration, jitter: RangeInclusive<f64>) -> Self {
        Self {
            from,
            to,
            jitter,
            next: from,
        }
    }

    /// The pause before the next attempt. The one after it is twice as long.
    pub fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = pause.saturating_mul(2).min(self.to);
        pause.mul_f64(rand::random_range(self.jitter.clone()))
    }

    /// Starts again with the shortest pause, after a success.
    pub fn reset(&mut self) {
        self.next = self.from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn pauses_double_up_to_the_limit_and_start_again_after_a_reset() {
        let mut backoff = Backoff::new(ms(100), ms(500), 1.0..=1.0);
        let mut pauses = || [(); 4].map(|()| backoff.pause());
        assert_eq!(pauses(), [ms(100), ms(200), ms(400), ms(500)]);
        assert_eq!(pauses(), [ms(500); 4]);
        backoff.reset();
        assert_eq!(backoff.pause(), ms(100));
    }

    #[test]
    fn jitter_scales_each_pause_within_its_range() {
        let mut backoff = Backoff::new(ms(100), ms(100), 0.5..=1.5);
        let pauses: Vec<Duration> = (0..100).map(|_| backoff.pause()).collect();
        assert!(
            pauses
                .iter()
                .all(|pause| (ms(50)..=ms(150)).contains(pause))
        );
        assert!(
            pauses.iter().any(|pause| *pause != pauses[0]),
            "all pauses are {:?}",
            pauses[0]
        );
    }
}
