//! The demo counts exactly: delivered, superseded, expired, lost and duplicated deliveries.

use std::time::Duration;

use tally::{Count, Tally};

#[path = "../src/tally.rs"]
mod tally;

const NOW: Duration = Duration::ZERO;
const HOUR: Duration = Duration::from_secs(3_600);

/// An event for two people: its recipients, collapse key and time to live, and the people at whom
/// it arrives.
type Told<'a> = (
    [bool; 2],
    Option<&'static str>,
    Option<Duration>,
    &'a [usize],
);

fn count(events: &[Told<'_>], away: Option<Duration>) -> Count {
    let mut tally = Tally::<2>::default();
    if let Some(away) = away {
        tally.cut(0, away);
    }
    for (recipients, collapse, ttl, _) in events {
        tally.publishes(*recipients, *collapse, *ttl);
    }
    for (number, (.., arrivals)) in events.iter().enumerate() {
        for who in *arrivals {
            tally.arrives(*who, number);
        }
    }
    assert_eq!(tally.n_published(), events.len());
    tally.count()
}

#[test]
fn the_demo_counts_missing_deliveries_as_lost_and_extra_ones_as_doubled() {
    let both = [true, true];
    assert_eq!(
        count(&[(both, None, None, &[0, 1])], None),
        Count {
            delivered: 2,
            ..Count::default()
        }
    );
    assert_eq!(
        count(&[(both, None, None, &[1])], None),
        Count {
            delivered: 1,
            lost: 1,
            ..Count::default()
        }
    );
    assert_eq!(
        count(&[(both, None, None, &[0, 0, 1])], None),
        Count {
            delivered: 2,
            duplicated: 1,
            ..Count::default()
        }
    );
    let stranger = count(&[([true, false], None, None, &[0, 1])], None);
    assert_eq!(
        stranger,
        Count {
            delivered: 1,
            duplicated: 1,
            ..Count::default()
        }
    );
}

#[test]
fn the_demo_counts_as_superseded_only_events_replaced_by_a_delivered_one_with_the_same_key() {
    let keyed =
        |key: &'static str, arrivals: &'static [usize]| ([true, false], Some(key), None, arrivals);
    assert_eq!(
        count(&[keyed("k", &[]), keyed("k", &[0])], None),
        Count {
            delivered: 1,
            superseded: 1,
            ..Count::default()
        }
    );
    assert_eq!(
        count(&[keyed("k", &[0]), keyed("k", &[])], None),
        Count {
            delivered: 1,
            lost: 1,
            ..Count::default()
        }
    );
    assert_eq!(
        count(&[keyed("k", &[]), keyed("other", &[0])], None),
        Count {
            delivered: 1,
            lost: 1,
            ..Count::default()
        }
    );
    let others = ([true, true], Some("k"), None, &[][..]);
    assert_eq!(
        count(&[others, ([false, true], Some("k"), None, &[1][..])], None),
        Count {
            delivered: 1,
            superseded: 1,
            lost: 1,
            ..Count::default()
        }
    );
}

#[test]
fn the_demo_counts_as_expired_only_events_that_expired_while_the_recipient_was_disconnected() {
    let short = |ttl| [([true, false], None, Some(ttl), &[][..])];
    let expired = Count {
        expired: 1,
        ..Count::default()
    };
    let lost = Count {
        lost: 1,
        ..Count::default()
    };
    assert_eq!(count(&short(NOW), Some(HOUR)), expired);
    assert_eq!(count(&short(HOUR), Some(HOUR)), expired);
    assert_eq!(
        count(&short(HOUR), Some(NOW)),
        lost,
        "it had not expired when the recipient reconnected"
    );
    assert_eq!(
        count(&short(NOW), None),
        lost,
        "the recipient was connected"
    );
}
