//! Reads one feed: passes appends and ticks to the streams, and sends streams back to replay
//! wherever the feed proves nothing.
//!
//! The feed is never trusted. A tick per second and partition serves as probe, loss detector and
//! low-water mark in one. A reset, or [`SILENCE`] without a tick, sends every stream of the
//! partition back to replay. A notice of an unknown epoch is checked against the partition's head
//! before it counts. Notices are handled in the order of the feed, because a tick confirms
//! everything before it.
//!
//! `follow` keeps the follow requests; `subscription` decides what a notice changes in a stream.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;

use crate::broker::{Feed, Follow, Notice};
use crate::delivery::subscription::{OpenStream, Record, Subscription};
use crate::event::{Epoch, Name, NotificationId, PartitionNumber, Target};

use super::{HubInner, HubState, SILENCE, TICK};

/// The only reader of a feed.
pub(super) struct FeedReader<'a> {
    hub: &'a Arc<HubInner>,
    /// The current epoch of each partition, as known to this node.
    epochs: HashMap<PartitionNumber, Epoch>,
    /// Partitions whose head could not be read for the current batch.
    unread: HashSet<PartitionNumber>,
}

impl<'a> FeedReader<'a> {
    pub(super) fn new(hub: &'a Arc<HubInner>) -> Self {
        Self {
            hub,
            epochs: HashMap::new(),
            unread: HashSet::new(),
        }
    }

    /// Returns when the feed has ended.
    pub(super) async fn run(mut self, feed: Feed) {
        let Feed {
            follow,
            mut notices,
        } = feed;
        let begin = Instant::now();
        {
            let mut state = self.hub.lock();
            state.last_tick = self
                .hub
                .partitions
                .iter()
                .map(|&partition| (partition, begin))
                .collect();
            state
                .followed
                .open_feed(follow.clone(), &self.hub.partitions);
        }
        // Replayed after the requests are sent: a replay waits for their confirmation before it
        // reads, so that no append falls between the feeds.
        self.hub.replay_all(&self.hub.partitions, "feed");
        let mut silence_check = tokio::time::interval(TICK);
        loop {
            tokio::select! {
                batch = notices.recv() => match batch {
                    Some(batch) => self.handle_batch(batch).await,
                    None => return,
                },
                _ = silence_check.tick() => self.reconnect_silent(&follow),
            }
        }
    }

    pub(super) fn reconnect_silent(&self, follow: &mpsc::UnboundedSender<Follow>) {
        let mut state = self.hub.lock();
        let HubState {
            last_tick,
            reconnected,
            ..
        } = &mut *state;
        for (&partition, last) in last_tick {
            if last.elapsed() <= SILENCE {
                reconnected.remove(&partition);
                continue;
            }
            let before = reconnected.get(&partition);
            if before.is_some_and(|before| before.elapsed() <= SILENCE) {
                continue;
            }
            if before.is_none() {
                tracing::warn!(
                    partition = partition.0,
                    silence_s = SILENCE.as_secs(),
                    "no tick received; reconnecting the feed until one arrives"
                );
            }
            reconnected.insert(partition, Instant::now());
            follow.send(Follow::Reconnect { partition }).ok();
        }
    }

    pub(super) async fn handle_batch(&mut self, batch: Vec<Notice>) {
        // Read for the whole batch before its first notice, one request instead of one per append.
        let records = self.records(&batch).await;
        self.unread.clear();
        for notice in batch {
            match notice {
                Notice::Append {
                    partition,
                    target,
                    epoch,
                    id,
                    ..
                } => {
                    let record = records.get(&(partition, epoch, id));
                    self.on_append(partition, &target, epoch, id, record).await;
                }
                Notice::Tick {
                    partition,
                    epoch,
                    last,
                } => {
                    if self.is_current_epoch(partition, epoch).await
                        && !self.tick(partition, epoch, last)
                    {
                        self.check_epoch(partition).await;
                    }
                }
                Notice::Alive { partition } => {
                    self.hub.lock().last_tick.insert(partition, Instant::now());
                }
                Notice::RecipientChanged { partition, user } => {
                    self.on_recipient_changed(partition, &user);
                }
                Notice::Following { token } => self.hub.lock().followed.confirm(token),
                Notice::Reset { partitions } => {
                    self.hub.metrics.feed_resets.inc();
                    let mut state = self.hub.lock();
                    // The silence so far is that of the connection before.
                    let now = Instant::now();
                    state
                        .reconnected
                        .extend(partitions.iter().map(|at| (*at, now)));
                    // Requested again before the replays start, which wait for the confirmations.
                    state.followed.request_again(&partitions);
                    drop(state);
                    self.hub.replay_all(&partitions, "feed");
                }
            }
        }
    }

    /// `record` is `None` if no stream follows the log, and `Some(None)` if the record could not be
    /// read.
    async fn on_append(
        &mut self,
        partition: PartitionNumber,
        target: &Target,
        epoch: Epoch,
        id: NotificationId,
        record: Option<&Option<Arc<Record>>>,
    ) {
        if !self.is_current_epoch(partition, epoch).await {
            return;
        }
        let is_known = match record {
            Some(Some(record)) => self.append(partition, target, epoch, id, record),
            // Replay will find the record or announce that it is gone.
            Some(None) => {
                self.replay_followers(partition, target);
                true
            }
            None => true,
        };
        if !is_known {
            self.check_epoch(partition).await;
        }
    }

    fn on_recipient_changed(&self, partition: PartitionNumber, user: &Name) {
        let state = self.hub.lock();
        let streams: Vec<_> = state
            .by_user
            .get(user)
            .into_iter()
            .flatten()
            .filter_map(|id| state.streams.get(id).cloned())
            .collect();
        drop(state);
        // Immediately and in order: the low-water mark must not pass a notification that the user
        // has just become a recipient of.
        for stream in streams {
            self.hub.replay(
                &stream,
                partition,
                "recipient",
                Subscription::recipient_changed,
            );
        }
    }

    /// Reads the records of a batch's appends in one request per partition and epoch. `None` where
    /// the broker could not be read.
    async fn records(
        &self,
        batch: &[Notice],
    ) -> HashMap<(PartitionNumber, Epoch, NotificationId), Option<Arc<Record>>> {
        let mut records = HashMap::new();
        let mut absent: HashMap<(PartitionNumber, Epoch), Vec<NotificationId>> = HashMap::new();
        {
            let state = self.hub.lock();
            for notice in batch {
                let Notice::Append {
                    partition,
                    target,
                    epoch,
                    id,
                    record,
                } = notice
                else {
                    continue;
                };
                let key = (*partition, *epoch, *id);
                // Unfollowed meanwhile: no stream needs it.
                if records.contains_key(&key) || !state.followed.is_followed(*partition, target) {
                    continue;
                }
                let cache = self.hub.history.records();
                let record = record
                    .as_ref()
                    .and_then(|stored| cache.insert(key, stored))
                    .or_else(|| cache.get(key));
                if record.is_none() {
                    absent.entry((*partition, *epoch)).or_default().push(*id);
                }
                records.insert(key, record);
            }
        }
        for ((partition, epoch), ids) in absent {
            match self
                .hub
                .history
                .records()
                .read(&*self.hub.broker, partition, epoch, &ids)
                .await
            {
                Ok(read) => records.extend(
                    ids.iter()
                        .zip(read)
                        .map(|(&id, record)| ((partition, epoch, id), record)),
                ),
                Err(error) => {
                    tracing::warn!(partition = partition.0, %error, "cannot read records of live notifications; their streams return to replay")
                }
            }
        }
        records
    }

    /// Returns `false` if a live stream is in another epoch.
    fn tick(&self, partition: PartitionNumber, epoch: Epoch, last: NotificationId) -> bool {
        let mut state = self.hub.lock();
        state.last_tick.insert(partition, Instant::now());
        let mut is_known = true;
        // Every stream, not only the followers of a log: a tick moves the low-water mark of streams
        // that received nothing.
        for stream in state.streams.values() {
            let mut subscription = stream.lock();
            is_known &= !subscription.is_live_in_other_epoch(partition, epoch);
            subscription.on_tick(partition, epoch, last);
        }
        is_known
    }

    /// Returns `false` if a live stream is in another epoch.
    fn append(
        &self,
        partition: PartitionNumber,
        target: &Target,
        epoch: Epoch,
        id: NotificationId,
        record: &Arc<Record>,
    ) -> bool {
        let now_ms = self.hub.broker.now_ms();
        let mut overflowed = Vec::new();
        let mut is_known = true;
        let state = self.hub.lock();
        for stream in state.followed.followers(partition, target) {
            let mut subscription = stream.lock();
            is_known &= !subscription.is_live_in_other_epoch(partition, epoch);
            if let Some(round) = subscription.on_append(partition, epoch, id, record, now_ms) {
                overflowed.push((Arc::clone(stream), round));
            }
            let is_ready = subscription.is_ready();
            // Released before the wake, or the socket's task could start only to wait for it.
            drop(subscription);
            if is_ready {
                stream.wake();
            }
        }
        drop(state);
        // The streams are in replay already: no later notice can pass this one before the replays
        // start.
        for (stream, round) in overflowed {
            self.hub.metrics.stream_overflows.inc();
            self.hub
                .replay(&stream, partition, "overflow", |_, _| round);
        }
        is_known
    }

    fn replay_followers(&self, partition: PartitionNumber, target: &Target) {
        let followers: Vec<_> = self
            .hub
            .lock()
            .followed
            .followers(partition, target)
            .cloned()
            .collect();
        for stream in followers {
            self.hub
                .replay(&stream, partition, "record", Subscription::enter_replay);
        }
    }

    /// Whether a notice is of the current epoch. A notice of another epoch may be older or newer
    /// than this node's knowledge; only the head decides.
    async fn is_current_epoch(&mut self, partition: PartitionNumber, epoch: Epoch) -> bool {
        self.epochs.get(&partition) == Some(&epoch)
            || self.check_epoch(partition).await == Some(epoch)
    }

    /// Reads the current epoch of a partition and sends the streams that are in another one to
    /// replay, which handles the change. Called when feed, node and streams disagree: each may have
    /// its information from a former primary.
    async fn check_epoch(&mut self, partition: PartitionNumber) -> Option<Epoch> {
        // One read per batch: the replays started by a failed read also cover the rest of the
        // batch.
        if self.unread.contains(&partition) {
            return None;
        }
        let current = match self.hub.broker.head(partition).await {
            Ok(head) => head.epoch,
            Err(error) => {
                // The notice cannot be evaluated, and the next one must not move a mark past it.
                tracing::warn!(partition = partition.0, %error, "cannot read the head; the partition's streams return to replay");
                self.hub.replay_all(&[partition], "epoch");
                self.unread.insert(partition);
                return None;
            }
        };
        let before = self.epochs.insert(partition, current);
        if before.is_some_and(|before| before != current) {
            tracing::warn!(partition = partition.0, epoch = %current, "new epoch: the broker was restarted or failed over");
        }
        // A stream that has not begun may be about to begin with a head from before the change.
        let is_new = before != Some(current);
        let is_elsewhere = |stream: &Arc<OpenStream>| {
            stream
                .lock()
                .epoch(partition)
                .map_or(is_new, |epoch| epoch != current)
        };
        let streams: Vec<_> = self
            .hub
            .lock()
            .streams
            .values()
            .filter(|stream| is_elsewhere(stream))
            .cloned()
            .collect();
        for stream in streams {
            self.hub
                .replay(&stream, partition, "epoch", Subscription::enter_replay);
        }
        Some(current)
    }
}
