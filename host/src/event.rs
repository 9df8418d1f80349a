//! The vocabulary: the input (an [`Event`]), the decision (a [`Plan`] of [`Route`]s), and their
//! ids.
//!
//! Everything here is parsed once, at the boundary, and valid from then on: a [`Name`] contains no
//! control character, an [`EntryId`] is a Redis stream id, a [`NotificationId`] fits 53 bits. No
//! I/O, no clock. `broker` reads events, `http` checks who may publish them, and `pipeline` decides
//! about them.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

mod attributes;
mod cloudevents;
pub mod criteria;
mod decision;
mod plan;
mod recipient;

pub use cloudevents::{
    Event, Malformed, Payload, Value, essence, foreign_charset, is_json, is_text, json_line,
    rfc3339, utf8_json,
};
pub(crate) use decision::HOST_PANICKED;
pub use decision::{ChainMember, ChainMembers, DeadReason, Decision, Retry, Verdict, VerdictKind};
pub use plan::{
    Notification, Outcome, Plan, Priority, RESERVED_EVENT_NAMES, Route, StateKey, Target,
    is_reserved_event_name,
};
pub use recipient::{Recipient, Span};

/// A text from outside that names something: 1 to `MAX` bytes of UTF-8 without control characters.
///
/// Names end up in Redis keys, SSE fields and terminal logs; a line feed in one would forge any of
/// the three.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BoundedName<const MAX: usize>(Arc<str>);

/// The name of a user, a group, an event or a type.
pub type Name = BoundedName<256>;

/// The `source`, `subject` or `dataschema` of an event. The first and the last are URIs, and the
/// subject is often the path of a stored object: 256 bytes are too few for signed URLs.
pub type LongName = BoundedName<2048>;

impl<const MAX: usize> BoundedName<MAX> {
    /// The longest name, in bytes.
    pub const MAX: usize = MAX;

    /// Parses a name.
    ///
    /// # Errors
    /// [`Malformed`] if it is empty, longer than `MAX` bytes, or contains a control character.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        if text.is_empty() {
            return Err(Malformed::new("is empty"));
        }
        if text.len() > MAX {
            return Err(Malformed::new(format!(
                "has {} bytes; the limit is {MAX}",
                text.len(),
            )));
        }
        if let Some(c) = text.chars().find(|c| c.is_control()) {
            return Err(Malformed::new(format!(
                "contains the control character U+{:04X}",
                u32::from(c)
            )));
        }
        Ok(Self(text.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl<const MAX: usize> fmt::Display for BoundedName<MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<const MAX: usize> fmt::Debug for BoundedName<MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

impl<const MAX: usize> Serialize for BoundedName<MAX> {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.0)
    }
}

impl<'de, const MAX: usize> Deserialize<'de> for BoundedName<MAX> {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(d)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

/// The id of an entry of a source: milliseconds and a sequence number, as in Redis streams. Written
/// `1700000000000-0`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EntryId {
    pub ms: u64,
    pub seq: u64,
}

impl EntryId {
    /// The largest id. A stream of Redis that reached it accepts no further entry.
    pub const MAX: Self = Self {
        ms: u64::MAX,
        seq: u64::MAX,
    };

    /// The largest distance by which the milliseconds of an id that Redis chose may be ahead of
    /// another clock.
    const CLOCKS_DIFFER_MS: u64 = 60_000;
    /// 2020-01-01T00:00:00Z in milliseconds since the Unix epoch, before which there were no
    /// entries.
    const EARLIEST_MS: u64 = 1_577_836_800_000;

    /// Whether the milliseconds of this id are a time of day. A publisher may choose any ids, such
    /// as times in seconds or microseconds, and ids that Redis chooses after a large one continue
    /// from it. `now_ms`: milliseconds since the Unix epoch.
    pub const fn is_time(self, now_ms: u64) -> bool {
        self.ms >= Self::EARLIEST_MS && self.ms <= now_ms.saturating_add(Self::CLOCKS_DIFFER_MS)
    }

    /// The time at which the entry was added, in milliseconds since the Unix epoch, or `now_ms` if
    /// the id is not a time of day.
    pub const fn time_ms(self, now_ms: u64) -> u64 {
        if self.is_time(now_ms) {
            self.ms
        } else {
            now_ms
        }
    }

    /// Returns the id directly before this one: a read after it returns this entry first. `None`
    /// for the lowest id.
    pub fn before(self) -> Option<Self> {
        match (self.ms, self.seq) {
            (ms, seq @ 1..) => Some(Self { ms, seq: seq - 1 }),
            (ms @ 1.., 0) => Some(Self {
                ms: ms - 1,
                seq: u64::MAX,
            }),
            (0, 0) => None,
        }
    }
}

impl fmt::Display for EntryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.ms, self.seq)
    }
}

impl FromStr for EntryId {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        let parsed = text.split_once('-').and_then(|(ms, seq)| {
            Some(Self {
                ms: ms.parse().ok()?,
                seq: seq.parse().ok()?,
            })
        });
        parsed.ok_or_else(|| {
            Malformed::new(format!(
                "'{}' is not a valid entry id; use the form 1700000000000-0",
                text.escape_debug()
            ))
        })
    }
}

impl Serialize for EntryId {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for EntryId {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        std::borrow::Cow::<'de, str>::deserialize(d)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// The progress of a partition: the last entry with an outcome, and, while a large plan is written
/// in slices, the number of slices written for the next entry. Written `entry` or `entry/k`; with
/// `/k`, `entry` is the one being sliced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    pub entry: EntryId,
    /// Slices of `entry` written so far; 0 means that `entry` has its outcome.
    pub slices: u32,
}

impl From<EntryId> for Position {
    fn from(entry: EntryId) -> Self {
        Self { entry, slices: 0 }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.slices {
            0 => write!(f, "{}", self.entry),
            k => write!(f, "{}/{k}", self.entry),
        }
    }
}

impl FromStr for Position {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        match text.split_once('/') {
            None => Ok(Self {
                entry: text.parse()?,
                slices: 0,
            }),
            Some((entry, k)) => {
                let slices = k.parse().map_err(|_| {
                    Malformed::new(format!("'{k}' is not a valid number of slices"))
                })?;
                Ok(Self {
                    entry: entry.parse()?,
                    slices,
                })
            }
        }
    }
}

/// The number of a partition, 0 to 11: unique within an installation and never reused. Cursors name
/// partitions by this number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PartitionNumber(pub u8);

impl PartitionNumber {
    /// The number of partition numbers an installation can ever assign; a cursor keeps one bit per
    /// number.
    pub const MAX: u8 = 12;
}

/// The id of a notification in its partition: `max(last + 1, floor + 1, ms since 2024-01-01 *
/// 4096)`. Ids ascend even if the clock does not, encode the time, and stay below 2^53: exact as a
/// Lua number, a sorted-set score and a JavaScript number.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct NotificationId(pub u64);

impl NotificationId {
    /// 2024-01-01T00:00:00Z in milliseconds since the Unix epoch.
    pub const EPOCH_MS: u64 = 1_704_067_200_000;
    /// The largest id: 2^53 - 1.
    pub const MAX: Self = Self((1 << 53) - 1);

    /// Returns the smallest id of a moment. `ms`: milliseconds since the Unix epoch; 0 for moments
    /// before 2024.
    pub const fn at_ms(ms: u64) -> Self {
        Self(ms.saturating_sub(Self::EPOCH_MS) * 4096)
    }

    /// The moment of this id, in milliseconds since the Unix epoch. Ids run ahead of the clock
    /// under more than 4,096 events a millisecond.
    pub const fn ms(self) -> u64 {
        self.0 / 4096 + Self::EPOCH_MS
    }
}

impl fmt::Display for NotificationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The name of an *epoch*: a period of a partition's history without a fail-over. 12 random bits,
/// written as two base64url characters. Random rather than numbered: numbers would be issued again
/// after a double fail-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Epoch(u16);

/// The base64url alphabet, in order of value (RFC 4648, section 5).
pub(crate) const BASE64URL: &[u8; 64] =
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

impl Epoch {
    /// Uses the lowest 12 bits.
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits & 0xfff)
    }

    pub const fn bits(self) -> u16 {
        self.0
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [high, low] =
            [self.0 >> 6, self.0 & 63].map(|six| char::from(BASE64URL[usize::from(six)]));
        write!(f, "{high}{low}")
    }
}

impl FromStr for Epoch {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        let value = |b: u8| BASE64URL.iter().position(|&c| c == b).map(|at| at as u16);
        let bits = match *text.as_bytes() {
            [high, low] => value(high)
                .zip(value(low))
                .map(|(high, low)| high << 6 | low),
            _ => None,
        };
        bits.map(Self).ok_or_else(|| {
            Malformed::new("is not a valid epoch name; use two base64url characters")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_forge_a_key_a_frame_or_a_log_line_are_rejected() {
        for bad in [
            "",
            "a\nb",
            "a\rb",
            "a\0b",
            "\u{7f}",
            "\u{85}",
            &"x".repeat(257),
        ] {
            assert!(Name::parse(bad).is_err(), "{bad:?}");
        }
        for good in ["42", "user:42", "Ülrike", "a b", "{x}", &"x".repeat(256)] {
            assert_eq!(Name::parse(good).unwrap().as_str(), good);
        }
    }

    #[test]
    fn ids_and_positions_round_trip_through_text() {
        for text in [
            "0-0",
            "1700000000000-3",
            "18446744073709551615-18446744073709551615",
        ] {
            assert_eq!(text.parse::<EntryId>().unwrap().to_string(), text);
            assert_eq!(
                format!("{text}/2").parse::<Position>().unwrap().to_string(),
                format!("{text}/2")
            );
        }
        for bad in ["", "1", "1-", "-1", "1-x", "a-1"] {
            assert!(bad.parse::<EntryId>().is_err(), "{bad}");
        }
        for bits in 0..4096 {
            let epoch = Epoch::from_bits(bits);
            assert_eq!(epoch.to_string().parse::<Epoch>().unwrap(), epoch);
        }
    }

    #[test]
    fn before_returns_the_greatest_lower_entry_id() {
        let id = |ms, seq| EntryId { ms, seq };
        assert_eq!(
            [id(7, 3), id(7, 0), id(0, 0)].map(EntryId::before),
            [Some(id(7, 2)), Some(id(6, u64::MAX)), None]
        );
    }

    #[test]
    fn an_id_of_the_year_2090_still_fits_53_bits() {
        let year_2090 = 3_786_912_000_000;
        assert!(NotificationId::at_ms(year_2090) < NotificationId::MAX);
        assert_eq!(NotificationId::at_ms(year_2090).ms(), year_2090);
    }
}
