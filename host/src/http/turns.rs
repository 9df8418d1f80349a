//! Turns: large publish requests are appended to a source in pieces, and those of different clients
//! alternate.
//!
//! A source is decided in its order, so an event that is appended behind the 700,000 recipients of
//! one request waits for all of them. A large request therefore appends its next piece only after
//! the last one was decided, and a small request is appended at once: it waits for one piece.
//!
//! While a source is not decided, as without its plugins, no order is better than another: turns
//! are then free, and the backlog limit bounds what is appended.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::broker::{Broker, Error, Result};
use crate::event::{EntryId, PartitionNumber, Position};

/// The size up to which entries are appended at once, in bytes: about 9,400 recipients, which
/// Redis writes in a sixth of a second.
const PIECE_BYTES: usize = 64 * 1024;
/// The interval between two looks at the position of a source.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// A source whose position has not moved for this long is not waited for.
const STALLED_AFTER: Duration = Duration::from_secs(1);
/// How long turns at such a source are free.
const FREE_FOR: Duration = Duration::from_secs(5);

type Entry = Vec<(Bytes, Bytes)>;

/// The turns at all sources of this node. A cheap handle.
#[derive(Clone, Debug, Default)]
pub(super) struct Turns(Arc<Mutex<HashMap<PartitionNumber, Queue>>>);

/// Large requests that wait to append their next piece to a source.
#[derive(Debug, Default)]
struct Queue {
    is_taken: bool,
    free_until: Option<Instant>,
    /// Clients that wait, in the order of their turns, each with its requests in their order.
    clients: VecDeque<(IpAddr, VecDeque<oneshot::Sender<Turn>>)>,
}

/// The right to append one piece, until it is dropped.
#[derive(Debug)]
struct Turn {
    turns: Turns,
    partition: PartitionNumber,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.turns.pass_on(self.partition);
    }
}

/// Whether these entries are appended in turns.
pub(super) fn is_large(entries: &[Entry]) -> bool {
    entries.iter().map(n_bytes).sum::<usize>() > PIECE_BYTES
}

impl Turns {
    /// Appends entries to a source in order, in pieces if they are large.
    ///
    /// # Errors
    /// As for [`crate::broker::Sources::append`]. Pieces before the failure stay appended. A later
    /// piece for which the backlog leaves no room waits for up to `wait`.
    pub(super) async fn append(
        &self,
        broker: &Arc<dyn Broker>,
        partition: PartitionNumber,
        entries: Vec<Entry>,
        client: IpAddr,
        wait: Duration,
    ) -> Result<Vec<EntryId>> {
        if !is_large(&entries) {
            return broker.append(partition, entries).await;
        }
        let mut ids = Vec::with_capacity(entries.len());
        let mut pieces = pieces(entries).into_iter();
        while let Some(piece) = pieces.next() {
            let turn = self.take(partition, client).await;
            let piece = if turn.is_some() {
                piece
            } else {
                // Free turns: the rest at once.
                piece.into_iter().chain(pieces.by_ref().flatten()).collect()
            };
            let added = if ids.is_empty() {
                broker.append(partition, piece).await?
            } else {
                append_with_room(broker.as_ref(), partition, piece, wait).await?
            };
            let last = added.last().copied();
            ids.extend(added);
            if let (Some(turn), Some(last)) = (turn, last) {
                // Apart, so that the response does not wait for the last piece. The next one queues
                // behind the requests that wait by now.
                tokio::spawn(turn.hold_until_decided(Arc::clone(broker), last));
            }
        }
        Ok(ids)
    }

    /// Waits for this client's turn. `None`: turns are free.
    async fn take(&self, partition: PartitionNumber, client: IpAddr) -> Option<Turn> {
        let turn = {
            let mut queues = self.queues();
            let queue = queues.entry(partition).or_default();
            if queue.free_until.is_some_and(|until| Instant::now() < until) {
                return None;
            }
            if !queue.is_taken {
                queue.is_taken = true;
                return Some(self.turn(partition));
            }
            let (passed_on, turn) = oneshot::channel();
            match queue
                .clients
                .iter_mut()
                .find(|(waiting, _)| *waiting == client)
            {
                Some((_, requests)) => requests.push_back(passed_on),
                None => queue
                    .clients
                    .push_back((client, VecDeque::from([passed_on]))),
            }
            turn
        };
        turn.await.ok()
    }

    /// Gives the turn to the next client that waits, which is then last in the order.
    fn pass_on(&self, partition: PartitionNumber) {
        let next = {
            let mut queues = self.queues();
            let queue = queues.entry(partition).or_default();
            // A request whose client is gone no longer waits.
            let next = std::iter::from_fn(|| queue.next()).find(|next| !next.is_closed());
            queue.is_taken = next.is_some();
            next
        };
        if let Some(next) = next {
            // If its client is gone by now, the turn is dropped, and passed on again.
            drop(next.send(self.turn(partition)));
        }
    }

    fn turn(&self, partition: PartitionNumber) -> Turn {
        Turn {
            turns: self.clone(),
            partition,
        }
    }

    /// Lets all requests go that wait for a source that is not decided.
    fn free(&self, partition: PartitionNumber) {
        let mut queues = self.queues();
        let queue = queues.entry(partition).or_default();
        queue.free_until = Some(Instant::now() + FREE_FOR);
        queue.clients.clear();
    }

    fn queues(&self) -> MutexGuard<'_, HashMap<PartitionNumber, Queue>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    fn next(&mut self) -> Option<oneshot::Sender<Turn>> {
        let (client, mut requests) = self.clients.pop_front()?;
        let next = requests.pop_front();
        if !requests.is_empty() {
            self.clients.push_back((client, requests));
        }
        next
    }
}

impl Turn {
    /// Keeps the turn until the source is decided up to this entry, or its position stands still.
    async fn hold_until_decided(self, broker: Arc<dyn Broker>, last: EntryId) {
        let mut seen = Position::default();
        let mut moved_at = Instant::now();
        loop {
            // Without an answer, the position does not move.
            if let Ok(state) = broker.state(self.partition).await {
                let position = state.position;
                if position.slices == 0 && position.entry >= last {
                    return;
                }
                if position != seen {
                    (seen, moved_at) = (position, Instant::now());
                }
            }
            if moved_at.elapsed() >= STALLED_AFTER {
                self.turns.free(self.partition);
                return;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

/// Appends a later piece: the first ones were accepted, so a full backlog is waited for.
async fn append_with_room(
    broker: &dyn Broker,
    partition: PartitionNumber,
    piece: Vec<Entry>,
    wait: Duration,
) -> Result<Vec<EntryId>> {
    let until = Instant::now() + wait;
    loop {
        match broker.append(partition, piece.clone()).await {
            Err(Error::Full(_)) if Instant::now() < until => {
                tokio::time::sleep(LOOK_EVERY).await;
            }
            result => return result,
        }
    }
}

/// Groups entries in order into pieces of up to [`PIECE_BYTES`], or of one entry.
fn pieces(entries: Vec<Entry>) -> Vec<Vec<Entry>> {
    let mut pieces: Vec<Vec<Entry>> = Vec::new();
    let mut room = 0;
    for entry in entries {
        let n = n_bytes(&entry);
        match pieces.last_mut() {
            Some(piece) if n <= room => {
                room -= n;
                piece.push(entry);
            }
            _ => {
                room = PIECE_BYTES.saturating_sub(n);
                pieces.push(vec![entry]);
            }
        }
    }
    pieces
}

fn n_bytes(entry: &Entry) -> usize {
    entry
        .iter()
        .map(|(name, value)| name.len() + value.len())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARTITION: PartitionNumber = PartitionNumber(0);

    fn client(n: u8) -> IpAddr {
        [10, 0, 0, n].into()
    }

    fn entry(n: usize) -> Entry {
        vec![(Bytes::new(), vec![0; n].into())]
    }

    #[test]
    fn pieces_keep_the_order_and_their_size() {
        let sizes = [1, PIECE_BYTES - 1, 1, 3 * PIECE_BYTES, 2, 3];
        let pieces = pieces(sizes.map(entry).into());
        let sizes: Vec<Vec<usize>> = pieces
            .iter()
            .map(|piece| piece.iter().map(n_bytes).collect())
            .collect();
        let expected = [
            vec![1, PIECE_BYTES - 1],
            vec![1],
            vec![3 * PIECE_BYTES],
            vec![2, 3],
        ];
        assert_eq!(sizes, expected);
    }

    #[tokio::test]
    async fn clients_take_turns_however_many_requests_each_has() {
        let turns = Turns::default();
        let first = turns.take(PARTITION, client(1)).await.unwrap();
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut waiting = Vec::new();
        for (n, of) in [1, 1, 1, 2, 3].into_iter().enumerate() {
            let (turns, order) = (turns.clone(), Arc::clone(&order));
            waiting.push(tokio::spawn(async move {
                let turn = turns.take(PARTITION, client(of)).await.unwrap();
                order.lock().unwrap().push((of, n));
                drop(turn);
            }));
            tokio::task::yield_now().await;
        }
        drop(first);
        for request in waiting {
            request.await.unwrap();
        }
        let expected = [(1, 0), (2, 3), (3, 4), (1, 1), (1, 2)];
        assert_eq!(*order.lock().unwrap(), expected);
        assert!(!turns.queues()[&PARTITION].is_taken);
    }

    #[tokio::test]
    async fn a_request_whose_client_is_gone_is_skipped() {
        let turns = Turns::default();
        let first = turns.take(PARTITION, client(1)).await.unwrap();
        let gone = turns.clone();
        let gone = tokio::spawn(async move { gone.take(PARTITION, client(2)).await });
        tokio::task::yield_now().await;
        gone.abort();
        assert!(gone.await.unwrap_err().is_cancelled());
        drop(first);
        assert!(turns.take(PARTITION, client(3)).await.is_some());
    }

    #[tokio::test]
    async fn turns_are_free_at_a_source_that_is_not_decided() {
        let turns = Turns::default();
        let first = turns.take(PARTITION, client(1)).await;
        assert!(first.is_some());
        let waiting = turns.clone();
        let waiting = tokio::spawn(async move { waiting.take(PARTITION, client(2)).await });
        tokio::task::yield_now().await;
        turns.free(PARTITION);
        assert!(waiting.await.unwrap().is_none());
        assert!(turns.take(PARTITION, client(2)).await.is_none());
    }
}
