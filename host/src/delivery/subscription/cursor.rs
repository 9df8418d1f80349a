//! The cursor: how far a client has read, in at most 126 bytes of `[A-Za-z0-9_-]`. It is the `id:`
//! of every frame and comes back as `Last-Event-ID`.
//!
//! A longer cursor, or one with other bytes, would make browsers send a CORS preflight before every
//! reconnect to another origin. The grammar, in base64url characters of six bits each:
//!
//! ```text
//! cursor     = "1" user partitions *8position *3sent_ahead
//! user       = 2                  ; 12 bits of SHA-256 of the user's name
//! partitions = 2                  ; a bit for each of twelve partition numbers, lowest first
//! position   = epoch(2) id(9)     ; for each bit that is set, ascending
//! sent_ahead = partition(1) id(9) route(1) ; above its position, sent before lower ids
//! ```
//!
//! The first character is the version of the grammar. Any other input returns [`CursorError`] and
//! never panics: clients store cursors and may send anything.

use sha2::{Digest, Sha256};

use crate::event::{BASE64URL, Epoch, Name, NotificationId, PartitionNumber};

const VERSION: u8 = b'1';

/// The most ids sent ahead of lower ones, over all partitions: more would not fit the cursor.
pub const MAX_SENT_AHEAD: usize = 3;

/// The most positions that a stream writes: more would not fit 126 bytes with the ids sent ahead. A
/// node has at most this many partitions.
pub const MAX_POSITIONS: usize = 8;

/// A client's position in one partition: everything up to `low_water` was sent or rejected, in this
/// epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    pub partition: PartitionNumber,
    pub epoch: Epoch,
    pub low_water: NotificationId,
}

/// How far a client has read in all partitions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    /// Ascending by partition. A missing partition was added later and is read from its beginning;
    /// one that this node does not have is kept for the nodes that do.
    pub positions: Vec<Position>,
    /// Ids sent ahead; at most [`MAX_SENT_AHEAD`].
    pub sent_ahead: Vec<SentAhead>,
}

/// A notification above the low-water mark of its partition that was sent before lower ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SentAhead {
    pub partition: PartitionNumber,
    pub id: NotificationId,
    pub route: SentRoute,
}

/// The route by which a notification was sent ahead. Its collapse key keeps older states superseded
/// after the client has resumed, whatever has become of the membership, the condition or the token
/// that the route matched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SentRoute(u8);

impl SentRoute {
    /// Stands for every route whose index does not fit one character.
    const BEYOND: u8 = 63;

    /// The route with this index in its plan.
    pub fn new(index: usize) -> Self {
        Self(index.min(Self::BEYOND.into()) as u8)
    }

    /// The index in the plan, unless it is above 62.
    pub fn index(self) -> Option<usize> {
        (self.0 < Self::BEYOND).then_some(self.0.into())
    }
}

/// Why a text is not a valid cursor for this user.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CursorError {
    #[error("not a cursor of this version")]
    Malformed,
    #[error("the cursor belongs to another user")]
    OtherUser,
}

impl Cursor {
    /// Appends the cursor of this user to `out`.
    pub fn encode(&self, user: &Name, out: &mut String) {
        out.push(char::from(VERSION));
        put(out, user_hash(user), 2);
        let bits = self
            .positions
            .iter()
            .fold(0, |bits, position| bits | 1 << position.partition.0);
        put(out, bits, 2);
        for position in &self.positions {
            put(out, u64::from(position.epoch.bits()), 2);
            put(out, position.low_water.0, 9);
        }
        for sent in &self.sent_ahead {
            put(out, u64::from(sent.partition.0), 1);
            put(out, sent.id.0, 9);
            put(out, u64::from(sent.route.0), 1);
        }
    }

    /// Adds as much of a cursor as has room: positions of other partitions, those added last first,
    /// and their ids sent ahead. What does not fit is delivered again.
    pub fn carry(&mut self, other: &Self) {
        for position in other.positions.iter().rev() {
            if self.positions.len() >= MAX_POSITIONS {
                break;
            }
            self.positions.push(*position);
            let sent_ahead = other.sent_ahead.iter();
            let room = MAX_SENT_AHEAD.saturating_sub(self.sent_ahead.len());
            self.sent_ahead.extend(
                sent_ahead
                    .filter(|sent| sent.partition == position.partition)
                    .take(room),
            );
        }
        self.positions
            .sort_unstable_by_key(|position| position.partition);
    }

    /// Parses a cursor.
    ///
    /// # Errors
    /// [`CursorError`] for anything that [`Cursor::encode`] did not write for this user.
    pub fn decode(text: &str, user: &Name) -> Result<Self, CursorError> {
        let mut rest = text
            .as_bytes()
            .strip_prefix(&[VERSION])
            .ok_or(CursorError::Malformed)?;
        let hash = take(&mut rest, 2)?;
        let bits = take(&mut rest, 2)?;
        if bits.count_ones() as usize > MAX_POSITIONS {
            return Err(CursorError::Malformed);
        }
        let mut cursor = Self::default();
        for number in (0..PartitionNumber::MAX).filter(|number| bits >> number & 1 == 1) {
            let epoch = Epoch::from_bits(take(&mut rest, 2)? as u16);
            cursor.positions.push(Position {
                partition: PartitionNumber(number),
                epoch,
                low_water: id(&mut rest)?,
            });
        }
        while !rest.is_empty() {
            let sent_ahead = SentAhead {
                partition: PartitionNumber(take(&mut rest, 1)? as u8),
                id: id(&mut rest)?,
                route: SentRoute(take(&mut rest, 1)? as u8),
            };
            let position = cursor
                .positions
                .iter()
                .find(|position| position.partition == sent_ahead.partition);
            let is_listed = |other: &SentAhead| {
                (other.partition, other.id) == (sent_ahead.partition, sent_ahead.id)
            };
            if cursor.sent_ahead.len() == MAX_SENT_AHEAD
                || position.is_none_or(|position| sent_ahead.id <= position.low_water)
                || cursor.sent_ahead.iter().any(is_listed)
            {
                return Err(CursorError::Malformed);
            }
            cursor.sent_ahead.push(sent_ahead);
        }
        // Checked last: text that is not a cursor at all, such as `10min`, belongs to no user.
        if hash == user_hash(user) {
            Ok(cursor)
        } else {
            Err(CursorError::OtherUser)
        }
    }
}

fn user_hash(user: &Name) -> u64 {
    let digest = Sha256::digest(user.as_str());
    u64::from(digest[0]) << 4 | u64::from(digest[1] >> 4)
}

/// Appends the lowest `n * 6` bits, highest first.
fn put(out: &mut String, value: u64, n: u32) {
    for at in (0..n).rev() {
        out.push(char::from(BASE64URL[(value >> (at * 6) & 63) as usize]));
    }
}

fn take(rest: &mut &[u8], n: usize) -> Result<u64, CursorError> {
    let (head, tail) = rest.split_at_checked(n).ok_or(CursorError::Malformed)?;
    *rest = tail;
    head.iter().try_fold(0, |value, byte| {
        let six = BASE64URL
            .iter()
            .position(|c| c == byte)
            .ok_or(CursorError::Malformed)?;
        Ok(value << 6 | six as u64)
    })
}

fn id(rest: &mut &[u8]) -> Result<NotificationId, CursorError> {
    let id = NotificationId(take(rest, 9)?);
    if id > NotificationId::MAX {
        Err(CursorError::Malformed)
    } else {
        Ok(id)
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::{btree_map, btree_set, vec};
    use proptest::prelude::*;

    use super::*;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    prop_compose! {
        fn cursors()(
            numbers in btree_set(0..PartitionNumber::MAX, 0..=8),
            epochs in vec(0..4096_u16, 8),
            ids in vec(0..(1_u64 << 52), 8),
            sent_ahead in btree_map((0..8_usize, 1..(1_u64 << 51)), 0..100_usize, 0..=MAX_SENT_AHEAD),
        ) -> Cursor {
            let positions: Vec<_> = numbers.into_iter().zip(epochs).zip(ids).map(|((number, epoch), id)| Position {
                partition: PartitionNumber(number), epoch: Epoch::from_bits(epoch), low_water: NotificationId(id),
            }).collect();
            let sent_ahead = sent_ahead.into_iter().filter_map(|((at, above), route)| {
                positions.get(at).map(|p| SentAhead {
                    partition: p.partition,
                    id: NotificationId(p.low_water.0 + above),
                    route: SentRoute::new(route),
                })
            }).collect();
            Cursor { positions, sent_ahead }
        }
    }

    proptest! {
        #[test]
        fn a_cursor_round_trips_and_needs_no_preflight(cursor in cursors(), user in "[a-z]{1,8}") {
            let mut text = String::new();
            cursor.encode(&name(&user), &mut text);
            prop_assert!(text.len() <= 126);
            prop_assert!(text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_'));
            prop_assert_eq!(Cursor::decode(&text, &name(&user)), Ok(cursor));
        }

        #[test]
        fn any_other_text_is_rejected_without_a_panic(text in "\\PC{0,133}", tail in "[A-Za-z0-9_-]{0,128}") {
            for text in [text, format!("1{tail}")] {
                let read = Cursor::decode(&text, &name("u"));
                prop_assert!(read.is_err() || text.len() <= 126);
            }
        }
    }

    /// Two configurations with more than eight sources between them.
    #[test]
    fn a_cursor_that_carries_every_partition_needs_no_preflight() {
        let at = |number: u8| Position {
            partition: PartitionNumber(number),
            epoch: Epoch::from_bits(1),
            low_water: NotificationId(5),
        };
        let sent = |number: u8, id| SentAhead {
            partition: PartitionNumber(number),
            id: NotificationId(id),
            route: SentRoute::new(0),
        };
        let mut cursor = Cursor {
            positions: (2..7).map(at).collect(),
            sent_ahead: vec![sent(2, 9)],
        };
        cursor.carry(&Cursor {
            positions: [0, 1, 7, 8, 9, 10, 11].map(at).to_vec(),
            sent_ahead: [0, 11, 11, 11].map(|number| sent(number, 7)).to_vec(),
        });
        let numbers: Vec<u8> = cursor.positions.iter().map(|at| at.partition.0).collect();
        assert_eq!(numbers, [2, 3, 4, 5, 6, 9, 10, 11]);
        assert_eq!(cursor.sent_ahead.len(), MAX_SENT_AHEAD);
        let mut text = String::new();
        cursor.encode(&name("ann"), &mut text);
        assert_eq!(text.len(), 126);
    }

    #[test]
    fn a_cursor_of_another_user_is_rejected() {
        let mut text = String::new();
        Cursor::default().encode(&name("alice"), &mut text);
        assert_eq!(
            Cursor::decode(&text, &name("bob")),
            Err(CursorError::OtherUser)
        );
    }

    #[test]
    fn a_text_that_is_not_a_cursor_is_garbled_rather_than_another_users() {
        for text in ["10min", "1h30m", "1hour", "10M", "15", "1", ""] {
            assert_eq!(
                Cursor::decode(text, &name("bob")),
                Err(CursorError::Malformed),
                "{text}"
            );
        }
    }
}
