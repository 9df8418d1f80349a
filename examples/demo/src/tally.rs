//! Counts the fate of every published event for each recipient: delivered, superseded, expired,
//! lost or duplicated. The count is exact and pessimistic: a missing delivery is lost unless there
//! is a valid reason for it.

use std::collections::HashSet;
use std::time::{Duration, Instant};

/// Allowance for delivery latency: an event published this shortly before a cut, or expired this
/// shortly after the reconnect, may also be missing.
const SLACK: Duration = Duration::from_secs(2);

/// The expected and actual deliveries of an event, for each of `N` people.
struct Fate<const N: usize> {
    recipients: [bool; N],
    arrivals: [u32; N],
    collapse: Option<&'static str>,
    published: Instant,
    expires: Option<Instant>,
}

pub(crate) struct Tally<const N: usize> {
    events: Vec<Fate<N>>,
    /// The periods in which each person was disconnected, as (from, until).
    away: [Vec<(Instant, Instant)>; N],
}

/// Counts of deliveries: an event counts once for each of its recipients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) delivered: u32,
    /// Not delivered, but a later event with the same key was.
    pub(crate) superseded: u32,
    /// Not delivered, and expired while its recipient was disconnected.
    pub(crate) expired: u32,
    pub(crate) lost: u32,
    /// Delivered more than once, or delivered to a person who is not a recipient.
    pub(crate) duplicated: u32,
}

impl<const N: usize> Default for Tally<N> {
    fn default() -> Self {
        Self {
            events: Vec::new(),
            away: std::array::from_fn(|_| Vec::new()),
        }
    }
}

impl<const N: usize> Tally<N> {
    pub(crate) fn n_published(&self) -> usize {
        self.events.len()
    }

    /// Registers an event that is about to be published and returns its number.
    pub(crate) fn publishes(
        &mut self,
        recipients: [bool; N],
        collapse: Option<&'static str>,
        ttl: Option<Duration>,
    ) -> usize {
        let published = Instant::now();
        self.events.push(Fate {
            recipients,
            arrivals: [0; N],
            collapse,
            published,
            expires: ttl.map(|ttl| published + ttl),
        });
        self.events.len() - 1
    }

    pub(crate) fn cut(&mut self, who: usize, away: Duration) {
        self.away[who].push((Instant::now(), Instant::now() + away));
    }

    /// Registers a delivery of the event with this number. Numbers that were never published are
    /// ignored.
    pub(crate) fn arrives(&mut self, who: usize, number: usize) {
        if let Some(fate) = self.events.get_mut(number) {
            fate.arrivals[who] += 1;
        }
    }

    pub(crate) fn count(&self) -> Count {
        let mut count = Count::default();
        for who in 0..N {
            // Iterates backwards, so that later deliveries with the same key are known.
            let mut newer = HashSet::new();
            for fate in self.events.iter().rev() {
                let (expected, arrived) = (u32::from(fate.recipients[who]), fate.arrivals[who]);
                count.delivered += arrived.min(expected);
                count.duplicated += arrived.saturating_sub(expected);
                if arrived < expected {
                    let reason = if fate.collapse.is_some_and(|key| newer.contains(key)) {
                        &mut count.superseded
                    } else if self.may_have_expired(who, fate) {
                        &mut count.expired
                    } else {
                        &mut count.lost
                    };
                    *reason += 1;
                } else if arrived > 0 {
                    newer.extend(fate.collapse);
                }
            }
        }
        count
    }

    /// Whether the recipient was disconnected from the publication of the event until it expired.
    fn may_have_expired(&self, who: usize, fate: &Fate<N>) -> bool {
        let is_over = |expires: Instant| {
            self.away[who]
                .iter()
                .any(|&(from, until)| from <= fate.published + SLACK && expires <= until + SLACK)
        };
        fate.expires.is_some_and(is_over)
    }
}
