//! How far each of a user's devices is, and up to where the user has read: bookmarks, which are cursors that the broker keeps.
//!
//! - A bookmark is moved by acknowledgement, never backwards: in each partition it stands at the further of where it was and what was
//!   acknowledged. Two that acknowledge at once do so in some order, on whatever nodes: a move is a compare-and-set at the broker.
//! - A device that has none begins as every stream does, with what comes from then on; this beginning is its first bookmark. So a device
//!   that never acknowledged anything and comes back misses nothing.
//! - Of a life that is over, a bookmark is what any cursor is: the stream that begins there is told of the gap.
//!
//! The broker bounds how many there are and how long they are kept. What a stream does from its start on is `subscription`'s.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use crate::broker::{self, Bookmark, BookmarkOf, Broker, Head, PartitionNumber};
use crate::delivery::subscription::Start;
use crate::delivery::subscription::cursor::{Cursor, MAX_HAD, Position};
use crate::event::{Life, Name, NotificationId};

/// Looks at a bookmark that others are quicker to move. Each time one of them has moved it, so that only a crowd can use them up.
const ATTEMPTS: usize = 32;

/// Why an acknowledgement was not taken.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// It names what is yet to come.
    #[error("the id lies ahead of everything that was ever sent")]
    Ahead,
    /// Others moved the same bookmark all the while.
    #[error("too many acknowledgements of the same at once")]
    Crowded,
    #[error(transparent)]
    Broker(#[from] broker::Error),
}

/// A cheap handle.
#[derive(Clone, Debug)]
pub struct Bookmarks(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    broker: Arc<dyn Broker>,
    /// As they were when something had last to be explained by them. What a head says of lives that it knows stays true, so that an
    /// acknowledgement need not read it again. A std mutex: held for a copy.
    heads: Mutex<Heads>,
}

type Heads = BTreeMap<PartitionNumber, Head>;

impl Bookmarks {
    pub fn new(broker: Arc<dyn Broker>) -> Self {
        Self(Arc::new(Shared {
            broker,
            heads: Mutex::default(),
        }))
    }

    /// Moves these bookmarks to where the user says to be, but none of them backwards, and keeps them for another while.
    ///
    /// # Errors
    /// See [`Refusal`]. Those of `which` that come first may have been moved all the same.
    pub async fn acknowledge(
        &self,
        user: &Name,
        told: &Cursor,
        which: &[BookmarkOf],
    ) -> Result<(), Refusal> {
        if self.is_ahead(told).await? {
            return Err(Refusal::Ahead);
        }
        for which in which {
            self.move_to(user, told, which).await?;
        }
        Ok(())
    }

    /// Whether the cursor names what was not committed yet. A bookmark there could never be moved back.
    async fn is_ahead(&self, cursor: &Cursor) -> broker::Result<bool> {
        let heads = self.heads_for(&[cursor]).await?;
        Ok(cursor.positions.iter().any(|position| {
            let head = heads.get(&position.partition);
            head.is_some_and(|head| {
                head.life == position.life && highest(cursor, position) > head.survived(head.life)
            })
        }))
    }

    async fn move_to(&self, user: &Name, told: &Cursor, which: &BookmarkOf) -> Result<(), Refusal> {
        for _ in 0..ATTEMPTS {
            let seen = self.0.broker.bookmarks(user).await?.remove(which);
            let cursor = match seen.as_ref().and_then(|seen| readable(user, seen)) {
                Some(kept) => further(&kept, told, &self.heads_for(&[&kept, told]).await?),
                None => told.clone(),
            };
            let to = bookmark(user, &cursor, true);
            // Also where it stands already: it is kept anew.
            if self
                .0
                .broker
                .move_bookmark(user, which, seen.as_ref(), &to)
                .await?
            {
                return Ok(());
            }
        }
        Err(Refusal::Crowded)
    }

    /// Where a device's stream begins: where it `asked` to, or at the device's bookmark, or, in sync with the user's other devices, at the
    /// furthest place that any of them acknowledged. A device without a bookmark has one from now on: where it begins, or, if it asked for history
    /// by time or for what is not there yet, where that ends.
    ///
    /// # Errors
    /// The broker's: where the device is cannot be known, or not be kept.
    pub async fn start(
        &self,
        user: &Name,
        device: Name,
        is_in_sync: bool,
        asked: Option<Start>,
    ) -> broker::Result<Start> {
        let own = BookmarkOf::Device(device);
        for _ in 0..ATTEMPTS {
            let all = self.0.broker.bookmarks(user).await?;
            let start = match &asked {
                Some(asked) => asked.clone(),
                None => self.place(user, &own, is_in_sync, &all).await?,
            };
            if all.contains_key(&own) {
                return Ok(start);
            }
            let first = match &start {
                Start::Cursor(cursor) if !self.is_ahead(cursor).await? => cursor.clone(),
                _ => self.latest().await?,
            };
            if self
                .0
                .broker
                .move_bookmark(user, &own, None, &bookmark(user, &first, false))
                .await?
            {
                return Ok(start);
            }
        }
        Err(broker::Error::Away(
            "too many streams of the same device begin at once".to_owned(),
        ))
    }

    /// Where a device is by its user's bookmarks.
    async fn place(
        &self,
        user: &Name,
        own: &BookmarkOf,
        is_in_sync: bool,
        all: &BTreeMap<BookmarkOf, Bookmark>,
    ) -> broker::Result<Start> {
        let counts = |which: &BookmarkOf, kept: &Bookmark| {
            // Where another device began, nobody has seen what came before.
            which == own
                || (is_in_sync && kept.is_acknowledged && matches!(which, BookmarkOf::Device(_)))
        };
        let counting: Vec<&Bookmark> = all
            .iter()
            .filter(|(which, kept)| counts(which, kept))
            .map(|(_, kept)| kept)
            .collect();
        if counting.is_empty() {
            return Ok(Start::Cursor(self.latest().await?));
        }
        let places: Vec<Cursor> = counting
            .iter()
            .filter_map(|kept| readable(user, kept))
            .collect();
        let heads = if places.len() > 1 {
            self.heads_for(&places.iter().collect::<Vec<_>>()).await?
        } else {
            Heads::new()
        };
        Ok(places
            .into_iter()
            .reduce(|one, other| further(&one, &other, &heads))
            .map_or(Start::Unknown, Start::Cursor))
    }

    /// Up to where the user has read. `None`: nothing.
    ///
    /// # Errors
    /// The broker's.
    pub async fn read_mark(&self, user: &Name) -> broker::Result<Option<Cursor>> {
        let mark = self
            .0
            .broker
            .bookmarks(user)
            .await?
            .remove(&BookmarkOf::ReadMark);
        Ok(mark.and_then(|mark| readable(user, &mark)))
    }

    /// What still stands of what a cursor says to have been had: ids that were lost with a life are issued again.
    ///
    /// # Errors
    /// The broker's.
    pub async fn standing(&self, cursor: &Cursor) -> broker::Result<Standing> {
        let mut standing = Standing::default();
        for position in &cursor.positions {
            if self.is_here(position.partition) {
                let head = self.read_head(position.partition).await?;
                standing.add(cursor, position, &head);
            }
        }
        Ok(standing)
    }

    /// Where each of a user's bookmarks stands beside a notification; without those that cannot be read, which is logged.
    ///
    /// # Errors
    /// The broker's.
    pub async fn beside(
        &self,
        user: &Name,
        partition: PartitionNumber,
        id: NotificationId,
    ) -> broker::Result<Vec<Beside>> {
        let all = self.0.broker.bookmarks(user).await?;
        let head = self.read_head(partition).await?;
        let beside = |(which, kept): (BookmarkOf, Bookmark)| {
            let (cursor, mut standing) = (readable(user, &kept)?, Standing::default());
            if let Some(position) = cursor
                .positions
                .iter()
                .find(|position| position.partition == partition)
            {
                standing.add(&cursor, position, &head);
            }
            Some(Beside {
                which,
                is_acknowledged: kept.is_acknowledged,
                is_past: standing.covers(partition, id),
            })
        };
        Ok(all.into_iter().filter_map(beside).collect())
    }

    /// The place of who has had everything.
    async fn latest(&self) -> broker::Result<Cursor> {
        let mut cursor = Cursor::default();
        for partition in self.0.broker.partitions() {
            let head = self.read_head(partition.number).await?;
            cursor.positions.push(Position {
                partition: partition.number,
                life: head.life,
                low_water: head.latest(),
            });
        }
        Ok(cursor)
    }

    /// Heads that know what these cursors speak of, if anybody does.
    async fn heads_for(&self, cursors: &[&Cursor]) -> broker::Result<Heads> {
        let mut heads = self
            .0
            .heads
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let numbers: BTreeSet<_> = cursors
            .iter()
            .flat_map(|cursor| &cursor.positions)
            .map(|position| position.partition)
            .collect();
        for number in numbers.into_iter().filter(|&number| self.is_here(number)) {
            let is_explained = |head: &Head| {
                let here = |cursor: &&Cursor| {
                    cursor
                        .positions
                        .iter()
                        .find(|position| position.partition == number)
                        .copied()
                };
                cursors.iter().all(|cursor| {
                    here(cursor).is_none_or(|position| {
                        let is_known = head.lives.iter().any(|(life, _)| *life == position.life);
                        is_known
                            && (position.life != head.life
                                || highest(cursor, &position) <= head.survived(head.life))
                    })
                })
            };
            if !heads.get(&number).is_some_and(is_explained) {
                heads.insert(number, self.read_head(number).await?);
            }
        }
        Ok(heads)
    }

    async fn read_head(&self, partition: PartitionNumber) -> broker::Result<Head> {
        let head = self.0.broker.head(partition).await?;
        self.0
            .heads
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(partition, head.clone());
        Ok(head)
    }

    /// Whether the partition is configured on this node.
    fn is_here(&self, partition: PartitionNumber) -> bool {
        self.0
            .broker
            .partitions()
            .iter()
            .any(|here| here.number == partition)
    }
}

/// What is known to have been had, of what is still there.
#[derive(Debug, Default)]
pub struct Standing {
    low_water: BTreeMap<PartitionNumber, NotificationId>,
    had: BTreeSet<(PartitionNumber, NotificationId)>,
}

impl Standing {
    fn add(&mut self, cursor: &Cursor, position: &Position, head: &Head) {
        let survived = head.survived(position.life);
        self.low_water
            .insert(position.partition, position.low_water.min(survived));
        self.had.extend(
            had_of(cursor, position.partition)
                .filter(|id| *id <= survived)
                .map(|id| (position.partition, id)),
        );
    }

    pub fn covers(&self, partition: PartitionNumber, id: NotificationId) -> bool {
        self.low_water
            .get(&partition)
            .is_some_and(|low_water| id <= *low_water)
            || self.had.contains(&(partition, id))
    }
}

/// Where a bookmark stands beside a notification.
#[derive(Debug, PartialEq, Eq)]
pub struct Beside {
    pub which: BookmarkOf,
    /// `false`: it is where the device began.
    pub is_acknowledged: bool,
    /// Whether the notification lies before it, in what still stands of it.
    pub is_past: bool,
}

fn bookmark(user: &Name, cursor: &Cursor, is_acknowledged: bool) -> Bookmark {
    let mut text = String::new();
    cursor.encode(user, &mut text);
    Bookmark {
        cursor: text,
        is_acknowledged,
    }
}

fn readable(user: &Name, bookmark: &Bookmark) -> Option<Cursor> {
    let read = Cursor::decode(&bookmark.cursor, user);
    read.inspect_err(|error| tracing::error!(user.id = %user, %error, "a bookmark cannot be read; was it written by a newer version?")).ok()
}

fn had_of(cursor: &Cursor, partition: PartitionNumber) -> impl Iterator<Item = NotificationId> {
    cursor
        .had
        .iter()
        .filter(move |(of, _)| *of == partition)
        .map(|(_, id)| *id)
}

fn highest(cursor: &Cursor, position: &Position) -> NotificationId {
    had_of(cursor, position.partition)
        .max()
        .unwrap_or_default()
        .max(position.low_water)
}

/// The place of who has had what both say: in each partition, the further of the two.
fn further(kept: &Cursor, told: &Cursor, heads: &Heads) -> Cursor {
    let numbers: BTreeSet<_> = kept
        .positions
        .iter()
        .chain(&told.positions)
        .map(|position| position.partition)
        .collect();
    let mut joined = Cursor::default();
    for number in numbers {
        let here = |cursor: &Cursor| {
            cursor
                .positions
                .iter()
                .find(|position| position.partition == number)
                .copied()
        };
        let (position, had): (Position, BTreeSet<NotificationId>) = match (here(kept), here(told)) {
            (Some(one), Some(other)) if one.life == other.life => {
                let low_water = one.low_water.max(other.low_water);
                (
                    Position { low_water, ..one },
                    had_of(kept, number)
                        .chain(had_of(told, number))
                        .filter(|id| *id > low_water)
                        .collect(),
                )
            }
            (Some(one), Some(other)) => {
                // Who was told last in a life that is over has had what survived it. That of a partition that is not configured here
                // nobody can judge: the last word counts.
                let is_kept = heads
                    .get(&number)
                    .is_some_and(|head| rank(head, &one) > rank(head, &other));
                if is_kept {
                    (one, had_of(kept, number).collect())
                } else {
                    (other, had_of(told, number).collect())
                }
            }
            (Some(one), None) => (one, had_of(kept, number).collect()),
            (None, other) => {
                let Some(other) = other else { continue };
                (other, had_of(told, number).collect())
            }
        };
        joined.positions.push(position);
        joined.had.extend(had.into_iter().map(|id| (number, id)));
    }
    // One that is left out may come twice; a cursor has no room for it.
    joined.had.truncate(MAX_HAD);
    joined
}

/// How far a place is: by what still stands of it, then by how late its life was.
fn rank(head: &Head, position: &Position) -> (NotificationId, Option<usize>) {
    let age = |life: Life| head.lives.iter().position(|(known, _)| *known == life);
    (
        position.low_water.min(head.survived(position.life)),
        age(position.life),
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::event::Position as EntryPosition;

    const P: PartitionNumber = PartitionNumber(0);

    fn life(n: u16) -> Life {
        Life::from_bits(n)
    }

    /// The lives 1, 2 and 3: 2 began when 100 had survived of 1, 3 when 200 had of 2.
    fn heads() -> Heads {
        let lives = vec![
            (life(1), NotificationId(0)),
            (life(2), NotificationId(100)),
            (life(3), NotificationId(200)),
        ];
        let head = Head {
            life: life(3),
            lives,
            last: NotificationId(300),
            pending: None,
            position: EntryPosition::default(),
            floor: NotificationId(0),
            origin: NotificationId(0),
            now_ms: 0,
        };
        Heads::from([(P, head)])
    }

    fn at(n: u16, low_water: u64, had: &[u64]) -> Cursor {
        let positions = vec![Position {
            partition: P,
            life: life(n),
            low_water: NotificationId(low_water),
        }];
        Cursor {
            positions,
            had: had.iter().map(|id| (P, NotificationId(*id))).collect(),
        }
    }

    #[test]
    fn a_place_never_moves_backwards() {
        let check = |kept: &Cursor, told: &Cursor, expect: &Cursor| {
            assert_eq!(further(kept, told, &heads()), *expect, "{kept:?} {told:?}")
        };
        // In one life.
        check(&at(3, 250, &[]), &at(3, 260, &[]), &at(3, 260, &[]));
        check(&at(3, 250, &[]), &at(3, 240, &[]), &at(3, 250, &[]));
        check(
            &at(3, 250, &[255, 258]),
            &at(3, 256, &[257]),
            &at(3, 256, &[257, 258]),
        );
        check(
            &at(3, 250, &[251, 252, 253]),
            &at(3, 250, &[254]),
            &at(3, 250, &[251, 252, 253]),
        );
        // Acknowledged in the life that followed, beyond what survived.
        check(&at(1, 150, &[]), &at(2, 120, &[]), &at(2, 120, &[]));
        check(&at(1, 150, &[]), &at(2, 100, &[]), &at(2, 100, &[]));
        // A stream that never was as far: who comes back must be told what was lost.
        check(&at(1, 150, &[]), &at(2, 90, &[]), &at(1, 150, &[]));
        // Late, from a life that is over.
        check(&at(3, 210, &[]), &at(2, 290, &[]), &at(3, 210, &[]));
        check(&at(3, 150, &[]), &at(2, 160, &[]), &at(2, 160, &[]));
        // Of a life that nobody knows there is nothing left.
        check(&at(9, 900, &[]), &at(1, 10, &[]), &at(1, 10, &[]));
        check(&at(1, 10, &[]), &at(9, 900, &[]), &at(1, 10, &[]));
    }

    #[test]
    fn partitions_that_one_of_them_does_not_name_stay_as_the_other_says() {
        let other = PartitionNumber(1);
        let elsewhere = Cursor {
            positions: vec![Position {
                partition: other,
                life: life(7),
                low_water: NotificationId(5),
            }],
            had: vec![(other, NotificationId(6))],
        };
        let joined = further(&at(3, 250, &[251]), &elsewhere, &heads());
        assert_eq!(
            joined
                .positions
                .iter()
                .map(|position| position.low_water.0)
                .collect::<Vec<_>>(),
            [250, 5]
        );
        assert_eq!(
            joined.had,
            [(P, NotificationId(251)), (other, NotificationId(6))]
        );
    }

    proptest! {
        #[test]
        fn in_whatever_order_places_are_acknowledged_the_furthest_is_kept(
            places in prop::collection::vec((1..4_u16, 0..300_u64), 1..6),
            order in any::<prop::sample::Index>(),
        ) {
            let heads = heads();
            let join = |places: &[(u16, u64)]| {
                places.iter().map(|&(n, id)| at(n, id, &[])).reduce(|kept, told| further(&kept, &told, &heads)).unwrap()
            };
            let rank_of = |cursor: &Cursor| rank(&heads[&P], &cursor.positions[0]);
            let mut turned = places.clone();
            turned.rotate_left(order.index(places.len()));
            let furthest = places.iter().map(|&(n, id)| rank_of(&at(n, id, &[]))).max().unwrap();
            prop_assert_eq!(rank_of(&join(&places)), furthest);
            prop_assert_eq!(rank_of(&join(&turned)), furthest);
        }

        #[test]
        fn a_joined_place_reads_back(
            kept in (0..300_u64, prop::collection::btree_set(1..50_u64, 0..=3)),
            told in (0..300_u64, prop::collection::btree_set(1..50_u64, 0..=3)),
        ) {
            let cursor = |(low, had): (u64, BTreeSet<u64>)| at(3, low, &had.into_iter().map(|above| low + above).collect::<Vec<_>>());
            let joined = further(&cursor(kept), &cursor(told), &heads());
            let user = Name::parse("ann").unwrap();
            prop_assert_eq!(readable(&user, &bookmark(&user, &joined, true)), Some(joined));
        }
    }
}
