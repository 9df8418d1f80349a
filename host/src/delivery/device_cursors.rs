//! Device cursors: how far each of a user's devices has acknowledged, and the read marker, up to
//! which the user has read. Both are cursors stored by the broker.
//!
//! - An acknowledgement moves a device cursor, never backwards: in each partition it keeps the
//!   further of the stored and the acknowledged position. Concurrent acknowledgements on any nodes
//!   are serialised: a move is a compare-and-set at the broker.
//! - A device without a cursor starts as every stream does, with notifications from then on. That
//!   start becomes its first cursor, so a device that never acknowledged anything misses nothing
//!   when it returns.
//! - A device cursor of an ended epoch behaves like any other cursor: a stream that starts there
//!   receives the gap.
//!
//! The broker bounds the number and the retention of device cursors. `subscription` handles the
//! stream after its start.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use crate::broker::{self, CursorOwner, Head, StoredCursor, Users};
use crate::delivery::subscription::Start;
use crate::delivery::subscription::cursor::{Cursor, MAX_SENT_AHEAD, Position, SentAhead};
use crate::event::{Epoch, Name, NotificationId, PartitionNumber};

/// The most compare-and-set attempts for one device cursor. An attempt fails only if another one
/// succeeded, so that only a large number of concurrent moves exhausts them.
const ATTEMPTS: usize = 32;

/// Why an acknowledgement was rejected.
#[derive(Debug, thiserror::Error)]
pub enum AcknowledgeError {
    /// It names ids that do not exist yet.
    #[error("the id is ahead of every notification ever sent")]
    Ahead,
    /// Concurrent acknowledgements won every attempt.
    #[error("too many concurrent acknowledgements of the same device cursor")]
    Contention,
    #[error(transparent)]
    Broker(#[from] broker::Error),
}

/// A cheap handle: clones share the heads.
#[derive(Clone, Debug)]
pub struct DeviceCursors(Arc<DeviceCursorsInner>);

#[derive(Debug)]
struct DeviceCursorsInner {
    broker: Arc<dyn Users>,
    /// Heads as last read. A head's information about the epochs it knows stays valid, so an
    /// acknowledgement need not read the head again. A std mutex: held for a copy only.
    heads: Mutex<Heads>,
}

type Heads = BTreeMap<PartitionNumber, Head>;

impl DeviceCursors {
    pub fn new(broker: Arc<dyn Users>) -> Self {
        Self(Arc::new(DeviceCursorsInner {
            broker,
            heads: Mutex::default(),
        }))
    }

    /// Moves these device cursors to the acknowledged position, none of them backwards, and renews
    /// their retention.
    ///
    /// # Errors
    /// See [`AcknowledgeError`]. Cursors of earlier `owners` may have been moved nevertheless.
    pub async fn acknowledge(
        &self,
        user: &Name,
        acknowledged: &Cursor,
        owners: &[CursorOwner],
    ) -> Result<(), AcknowledgeError> {
        if self.is_ahead(acknowledged).await? {
            return Err(AcknowledgeError::Ahead);
        }
        for owner in owners {
            self.move_device_cursor(user, acknowledged, owner).await?;
        }
        Ok(())
    }

    /// Whether the cursor names ids not committed yet. A device cursor there could never be moved
    /// back.
    async fn is_ahead(&self, cursor: &Cursor) -> broker::Result<bool> {
        let heads = self.heads_for(&[cursor]).await?;
        Ok(cursor.positions.iter().any(|position| {
            let head = heads.get(&position.partition);
            head.is_some_and(|head| {
                head.epoch == position.epoch
                    && highest(cursor, position) > head.last_valid_id(head.epoch)
            })
        }))
    }

    async fn move_device_cursor(
        &self,
        user: &Name,
        acknowledged: &Cursor,
        owner: &CursorOwner,
    ) -> Result<(), AcknowledgeError> {
        for _ in 0..ATTEMPTS {
            // Read in each attempt: the move counts only if the cursor is still the one merged
            // here.
            let stored = self.0.broker.device_cursors(user).await?.remove(owner);
            let cursor = match stored.as_ref().and_then(|stored| decode(user, stored)) {
                Some(current) => furthest(
                    &current,
                    acknowledged,
                    &self.heads_for(&[&current, acknowledged]).await?,
                ),
                None => acknowledged.clone(),
            };
            let to = encode(user, &cursor, true);
            // Stored even if the position is unchanged: this renews its retention.
            if self
                .0
                .broker
                .move_device_cursor(user, owner, stored.as_ref(), &to)
                .await?
            {
                return Ok(());
            }
        }
        Err(AcknowledgeError::Contention)
    }

    /// Returns the start of a device's stream: the `requested` start, else the device's own cursor,
    /// or, with `is_in_sync`, the furthest cursor acknowledged by any of the user's devices. A
    /// device without a cursor gets one now: at its start, or, if it requested history by time or
    /// ids that do not exist yet, at the end of the history.
    ///
    /// # Errors
    /// The broker's: the device cursor cannot be read or stored.
    pub async fn start(
        &self,
        user: &Name,
        device: Name,
        is_in_sync: bool,
        requested: Option<Start>,
    ) -> broker::Result<Start> {
        let own = CursorOwner::Device(device);
        for _ in 0..ATTEMPTS {
            // Read in each attempt: the one that won the last compare-and-set may have been this
            // device's first cursor.
            let all = self.0.broker.device_cursors(user).await?;
            let start = match &requested {
                Some(requested) => requested.clone(),
                None => self.stored_start(user, &own, is_in_sync, &all).await?,
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
                .move_device_cursor(user, &own, None, &encode(user, &first, false))
                .await?
            {
                return Ok(start);
            }
        }
        Err(broker::Error::Unavailable(
            "too many streams of the same device start concurrently; try again".to_owned(),
        ))
    }

    /// Returns the start of a device according to its user's device cursors.
    async fn stored_start(
        &self,
        user: &Name,
        own: &CursorOwner,
        is_in_sync: bool,
        all: &BTreeMap<CursorOwner, StoredCursor>,
    ) -> broker::Result<Start> {
        let counts = |owner: &CursorOwner, stored: &StoredCursor| {
            // Another device's start is not evidence that the user has seen what precedes it.
            owner == own
                || (is_in_sync && stored.is_acknowledged && matches!(owner, CursorOwner::Device(_)))
        };
        let counting: Vec<&StoredCursor> = all
            .iter()
            .filter(|(owner, stored)| counts(owner, stored))
            .map(|(_, stored)| stored)
            .collect();
        if counting.is_empty() {
            return Ok(Start::Cursor(self.latest().await?));
        }
        let cursors: Vec<Cursor> = counting
            .iter()
            .filter_map(|stored| decode(user, stored))
            .collect();
        let heads = if cursors.len() > 1 {
            self.heads_for(&cursors.iter().collect::<Vec<_>>()).await?
        } else {
            Heads::new()
        };
        Ok(cursors
            .into_iter()
            .reduce(|one, other| furthest(&one, &other, &heads))
            .map_or(Start::Unknown, Start::Cursor))
    }

    /// Returns the cursor up to which the user has read. `None`: nothing.
    ///
    /// # Errors
    /// The broker's.
    pub async fn read_marker(&self, user: &Name) -> broker::Result<Option<Cursor>> {
        let mark = self
            .0
            .broker
            .device_cursors(user)
            .await?
            .remove(&CursorOwner::ReadMarker);
        Ok(mark.and_then(|mark| decode(user, &mark)))
    }

    /// Returns the part of a cursor that is still valid: ids lost with an epoch are issued again.
    ///
    /// # Errors
    /// The broker's.
    pub async fn valid_part(&self, cursor: &Cursor) -> broker::Result<ValidCursor> {
        let mut valid = ValidCursor::default();
        for position in &cursor.positions {
            if self.is_here(position.partition) {
                let head = self.read_head(position.partition).await?;
                valid.add(cursor, position, &head);
            }
        }
        Ok(valid)
    }

    /// Compares each of a user's device cursors with a notification. Unreadable cursors are skipped
    /// and logged.
    ///
    /// # Errors
    /// The broker's.
    pub async fn compare(
        &self,
        user: &Name,
        partition: PartitionNumber,
        id: NotificationId,
    ) -> broker::Result<Vec<CursorComparison>> {
        let all = self.0.broker.device_cursors(user).await?;
        let head = self.read_head(partition).await?;
        let compare = |(owner, stored): (CursorOwner, StoredCursor)| {
            let (cursor, mut valid) = (decode(user, &stored)?, ValidCursor::default());
            if let Some(position) = cursor
                .positions
                .iter()
                .find(|position| position.partition == partition)
            {
                valid.add(&cursor, position, &head);
            }
            Some(CursorComparison {
                owner,
                is_acknowledged: stored.is_acknowledged,
                is_past: valid.covers(partition, id),
            })
        };
        Ok(all.into_iter().filter_map(compare).collect())
    }

    /// Returns the cursor of a reader that has received everything.
    async fn latest(&self) -> broker::Result<Cursor> {
        let mut cursor = Cursor::default();
        for partition in self.0.broker.partitions() {
            let head = self.read_head(partition.number).await?;
            cursor.positions.push(Position {
                partition: partition.number,
                epoch: head.epoch,
                low_water: head.latest(),
            });
        }
        Ok(cursor)
    }

    /// Returns heads that know the epochs and ids these cursors name, as far as the broker knows
    /// them. Reads only the partitions for which the cached head is insufficient.
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
                        let is_known = head
                            .epochs
                            .iter()
                            .any(|(epoch, _)| *epoch == position.epoch);
                        is_known
                            && (position.epoch != head.epoch
                                || highest(cursor, &position) <= head.last_valid_id(head.epoch))
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

/// The part of a cursor that is still valid.
#[derive(Debug, Default)]
pub struct ValidCursor {
    low_water: BTreeMap<PartitionNumber, NotificationId>,
    sent_ahead: BTreeSet<(PartitionNumber, NotificationId)>,
}

impl ValidCursor {
    fn add(&mut self, cursor: &Cursor, position: &Position, head: &Head) {
        let survived = head.last_valid_id(position.epoch);
        self.low_water
            .insert(position.partition, position.low_water.min(survived));
        self.sent_ahead.extend(
            sent_ahead_in(cursor, position.partition)
                .filter(|sent| sent.id <= survived)
                .map(|sent| (sent.partition, sent.id)),
        );
    }

    pub fn covers(&self, partition: PartitionNumber, id: NotificationId) -> bool {
        self.low_water
            .get(&partition)
            .is_some_and(|low_water| id <= *low_water)
            || self.sent_ahead.contains(&(partition, id))
    }
}

/// The result of comparing a device cursor with a notification.
#[derive(Debug, PartialEq, Eq)]
pub struct CursorComparison {
    pub owner: CursorOwner,
    /// `false`: it is the start of the device.
    pub is_acknowledged: bool,
    /// Whether the part of the cursor that is still valid covers the notification.
    pub is_past: bool,
}

fn encode(user: &Name, cursor: &Cursor, is_acknowledged: bool) -> StoredCursor {
    let mut text = String::new();
    cursor.encode(user, &mut text);
    StoredCursor {
        cursor: text,
        is_acknowledged,
    }
}

fn decode(user: &Name, stored: &StoredCursor) -> Option<Cursor> {
    let read = Cursor::decode(&stored.cursor, user);
    read.inspect_err(|error| tracing::error!(user.id = %user, %error, "cannot parse a device cursor; check whether a newer version wrote it")).ok()
}

fn sent_ahead_in(cursor: &Cursor, partition: PartitionNumber) -> impl Iterator<Item = SentAhead> {
    let sent_ahead = cursor.sent_ahead.iter().copied();
    sent_ahead.filter(move |sent| sent.partition == partition)
}

fn highest(cursor: &Cursor, position: &Position) -> NotificationId {
    sent_ahead_in(cursor, position.partition)
        .map(|sent| sent.id)
        .max()
        .unwrap_or_default()
        .max(position.low_water)
}

/// Merges two cursors: in each partition, the further position.
fn furthest(kept: &Cursor, acknowledged: &Cursor, heads: &Heads) -> Cursor {
    let numbers: BTreeSet<_> = kept
        .positions
        .iter()
        .chain(&acknowledged.positions)
        .map(|position| position.partition)
        .collect();
    let mut merged = Cursor::default();
    for number in numbers {
        let here = |cursor: &Cursor| {
            cursor
                .positions
                .iter()
                .find(|position| position.partition == number)
                .copied()
        };
        let (position, sent_ahead): (Position, Vec<SentAhead>) =
            match (here(kept), here(acknowledged)) {
                (Some(one), Some(other)) if one.epoch == other.epoch => {
                    let low_water = one.low_water.max(other.low_water);
                    (
                        Position { low_water, ..one },
                        // By id: two devices may have received one notification by two routes.
                        sent_ahead_in(kept, number)
                            .chain(sent_ahead_in(acknowledged, number))
                            .filter(|sent| sent.id > low_water)
                            .map(|sent| (sent.id, sent))
                            .collect::<BTreeMap<_, _>>()
                            .into_values()
                            .collect(),
                    )
                }
                (Some(one), Some(other)) => {
                    // A position in an ended epoch counts up to the id that survived the epoch.
                    // Positions of a partition not configured on this node cannot be compared: the
                    // newer acknowledgement wins.
                    let is_kept = heads
                        .get(&number)
                        .is_some_and(|head| rank(head, &one) > rank(head, &other));
                    if is_kept {
                        (one, sent_ahead_in(kept, number).collect())
                    } else {
                        (other, sent_ahead_in(acknowledged, number).collect())
                    }
                }
                (Some(one), None) => (one, sent_ahead_in(kept, number).collect()),
                (None, other) => {
                    let Some(other) = other else { continue };
                    (other, sent_ahead_in(acknowledged, number).collect())
                }
            };
        merged.positions.push(position);
        merged.sent_ahead.extend(sent_ahead);
    }
    // A dropped id may be delivered twice; the cursor has no room for it.
    merged.sent_ahead.truncate(MAX_SENT_AHEAD);
    merged
}

/// Orders positions: by the id that is still valid, then by how recent their epoch is.
fn rank(head: &Head, position: &Position) -> (NotificationId, Option<usize>) {
    let age = |epoch: Epoch| head.epochs.iter().position(|(known, _)| *known == epoch);
    (
        position.low_water.min(head.last_valid_id(position.epoch)),
        age(position.epoch),
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::delivery::subscription::cursor::SentRoute;
    use crate::event::Position as EntryPosition;

    const P: PartitionNumber = PartitionNumber(0);

    fn epoch(n: u16) -> Epoch {
        Epoch::from_bits(n)
    }

    /// Epochs 1, 2 and 3: epoch 2 began after id 100 of epoch 1, epoch 3 after id 200 of epoch 2.
    fn heads() -> Heads {
        let epochs = vec![
            (epoch(1), NotificationId(0)),
            (epoch(2), NotificationId(100)),
            (epoch(3), NotificationId(200)),
        ];
        let head = Head {
            epoch: epoch(3),
            epochs,
            last: NotificationId(300),
            pending: None,
            position: EntryPosition::default(),
            floor: NotificationId(0),
            origin: NotificationId(0),
            now_ms: 0,
        };
        Heads::from([(P, head)])
    }

    fn at(n: u16, low_water: u64, sent_ahead: &[u64]) -> Cursor {
        let positions = vec![Position {
            partition: P,
            epoch: epoch(n),
            low_water: NotificationId(low_water),
        }];
        Cursor {
            positions,
            sent_ahead: sent_ahead.iter().map(|id| sent(P, *id, 0)).collect(),
        }
    }

    fn sent(partition: PartitionNumber, id: u64, route: usize) -> SentAhead {
        SentAhead {
            partition,
            id: NotificationId(id),
            route: SentRoute::new(route),
        }
    }

    #[test]
    fn a_device_cursor_never_moves_backwards() {
        let check = |kept: &Cursor, acknowledged: &Cursor, expect: &Cursor| {
            assert_eq!(
                furthest(kept, acknowledged, &heads()),
                *expect,
                "{kept:?} {acknowledged:?}"
            )
        };
        // Within one epoch.
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
        // Acknowledged in the next epoch, beyond the surviving id.
        check(&at(1, 150, &[]), &at(2, 120, &[]), &at(2, 120, &[]));
        check(&at(1, 150, &[]), &at(2, 100, &[]), &at(2, 100, &[]));
        // A stream that did not reach that far: the device must receive the gap when it returns.
        check(&at(1, 150, &[]), &at(2, 90, &[]), &at(1, 150, &[]));
        // Late, from an ended epoch.
        check(&at(3, 210, &[]), &at(2, 290, &[]), &at(3, 210, &[]));
        check(&at(3, 150, &[]), &at(2, 160, &[]), &at(2, 160, &[]));
        // Nothing of an unknown epoch is still valid.
        check(&at(9, 900, &[]), &at(1, 10, &[]), &at(1, 10, &[]));
        check(&at(1, 10, &[]), &at(9, 900, &[]), &at(1, 10, &[]));
    }

    #[test]
    fn a_partition_named_by_only_one_cursor_is_taken_from_it() {
        let other = PartitionNumber(1);
        let elsewhere = Cursor {
            positions: vec![Position {
                partition: other,
                epoch: epoch(7),
                low_water: NotificationId(5),
            }],
            sent_ahead: vec![sent(other, 6, 0)],
        };
        let merged = furthest(&at(3, 250, &[251]), &elsewhere, &heads());
        assert_eq!(
            merged
                .positions
                .iter()
                .map(|position| position.low_water.0)
                .collect::<Vec<_>>(),
            [250, 5]
        );
        assert_eq!(merged.sent_ahead, [sent(P, 251, 0), sent(other, 6, 0)]);
    }

    /// Two devices with tokens of different groups: a cursor that listed the id twice would be
    /// malformed.
    #[test]
    fn an_id_that_two_devices_received_by_two_routes_is_listed_once() {
        let mut acknowledged = at(3, 250, &[]);
        acknowledged.sent_ahead.push(sent(P, 251, 1));
        let merged = furthest(&at(3, 250, &[251]), &acknowledged, &heads());
        assert_eq!(merged.sent_ahead, [sent(P, 251, 1)]);
    }

    proptest! {
        #[test]
        fn the_furthest_acknowledged_cursor_is_kept_in_any_order(
            cursors in prop::collection::vec((1..4_u16, 0..300_u64), 1..6),
            order in any::<prop::sample::Index>(),
        ) {
            let heads = heads();
            let join = |cursors: &[(u16, u64)]| {
                cursors.iter().map(|&(n, id)| at(n, id, &[])).reduce(|kept, acknowledged| furthest(&kept, &acknowledged, &heads)).unwrap()
            };
            let rank_of = |cursor: &Cursor| rank(&heads[&P], &cursor.positions[0]);
            let mut turned = cursors.clone();
            turned.rotate_left(order.index(cursors.len()));
            let furthest = cursors.iter().map(|&(n, id)| rank_of(&at(n, id, &[]))).max().unwrap();
            prop_assert_eq!(rank_of(&join(&cursors)), furthest);
            prop_assert_eq!(rank_of(&join(&turned)), furthest);
        }

        #[test]
        fn a_merged_cursor_round_trips(
            kept in (0..300_u64, prop::collection::btree_set(1..50_u64, 0..=3)),
            acknowledged in (0..300_u64, prop::collection::btree_set(1..50_u64, 0..=3)),
        ) {
            let cursor = |(low, sent_ahead): (u64, BTreeSet<u64>)| at(3, low, &sent_ahead.into_iter().map(|above| low + above).collect::<Vec<_>>());
            let merged = furthest(&cursor(kept), &cursor(acknowledged), &heads());
            let user = Name::parse("ann").unwrap();
            prop_assert_eq!(decode(&user, &encode(&user, &merged, true)), Some(merged));
        }
    }
}
