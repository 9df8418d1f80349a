//! The open streams of this node, and their replays.
//!
//! `feed_reader` passes the notices of the feed on to the streams; `follow` keeps the logs that
//! each stream follows. The hub never waits for a stream: one whose buffer is full returns to
//! replay. Delivery needs no session table: the broker knows which node follows which log, and
//! drops a dead node's follows.
//!
//! The hub does not decide which notifications reach a user (`recipients`), how far a stream has
//! read (`subscription`) or how it is written (`sse`).

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;

use crate::backoff::Backoff;
use crate::broker::Logs;
use crate::delivery::follow::FollowedLogs;
use crate::delivery::recipients::Reader;
use crate::delivery::subscription::replay::{FollowLogs, History};
use crate::delivery::subscription::{BufferBudget, Filter, OpenStream, Start, Subscription};
use crate::event::{Name, NotificationId, PartitionNumber, Target};
use crate::shutdown::Shutdown;
use crate::telemetry::metrics::{Metrics, ReasonLabel};

mod feed_reader;

use feed_reader::FeedReader;

/// A partition without a tick for this long counts as silent, whatever the state of the connection.
pub const SILENCE: Duration = Duration::from_secs(3);
/// A node without a tick in a partition for this long is not asked to serve more streams.
pub const FRESH: Duration = Duration::from_millis(2_500);
/// How often each node ticks each partition.
pub const TICK: Duration = Duration::from_secs(1);

/// How long a look for streams to return to replay follows the previous one at the earliest.
const RECLAIM_PAUSE: Duration = Duration::from_millis(100);

/// A cheap handle: clones share one hub.
#[derive(Clone, Debug)]
pub struct Hub(Arc<HubInner>);

#[derive(Debug)]
struct HubInner {
    broker: Arc<dyn Logs>,
    history: History,
    metrics: Metrics,
    /// Bounds what the streams hold together.
    buffers: BufferBudget,
    partitions: Vec<PartitionNumber>,
    started: Instant,
    next_stream: AtomicU64,
    /// A std mutex: held for look-ups and hand-overs, never across an `.await`. Lock order: this
    /// one before a stream's, never after.
    state: Mutex<HubState>,
}

#[derive(Debug, Default)]
struct HubState {
    streams: HashMap<u64, Arc<OpenStream>>,
    by_user: HashMap<Name, HashSet<u64>>,
    followed: FollowedLogs,
    last_tick: HashMap<PartitionNumber, Instant>,
    /// When the feed of a silent partition was last requested to reconnect, or did so.
    reconnected: HashMap<PartitionNumber, Instant>,
}

/// Keeps a stream open until it is dropped.
#[derive(Debug)]
pub struct StreamGuard {
    hub: Hub,
    stream: Arc<OpenStream>,
}

impl StreamGuard {
    pub fn stream(&self) -> &Arc<OpenStream> {
        &self.stream
    }

    pub fn hub(&self) -> &Hub {
        &self.hub
    }
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        // Closed before it is forgotten: a replay that sees it open may still follow a log, which
        // `forget` then removes; a later one finds the stream unregistered.
        self.stream.close();
        let user = self.stream.lock().user().clone();
        self.hub.0.forget(self.stream.id, &user);
    }
}

impl Hub {
    /// Starts a hub whose streams are bounded one by one only.
    pub fn start(broker: Arc<dyn Logs>, metrics: Metrics, shutdown: &Shutdown) -> Self {
        Self::start_within(BufferBudget::unlimited(), broker, metrics, shutdown)
    }

    /// Starts the feed, the ticks and the bound on what the streams hold together. They end with the
    /// runtime. Without them streams would stay open and receive nothing, or hold more than they
    /// may, so a panic in one of them ends the node.
    pub fn start_within(
        buffers: BufferBudget,
        broker: Arc<dyn Logs>,
        metrics: Metrics,
        shutdown: &Shutdown,
    ) -> Self {
        let partitions = broker
            .partitions()
            .iter()
            .map(|partition| partition.number)
            .collect();
        let history = History::new(Arc::clone(&broker), metrics.clone());
        let (next_stream, state) = (AtomicU64::new(1), Mutex::default());
        let hub = Self(Arc::new(HubInner {
            broker,
            history,
            metrics,
            buffers,
            partitions,
            started: Instant::now(),
            next_stream,
            state,
        }));
        shutdown.spawn_lasting("the notice reader", Arc::clone(&hub.0).read_feeds());
        shutdown.spawn_lasting(
            "the bound on stream buffers",
            Arc::clone(&hub.0).reclaim_buffers(),
        );
        for &partition in &hub.0.partitions {
            shutdown.spawn_lasting(
                "the partition ticker",
                tick(Arc::downgrade(&hub.0), partition),
            );
        }
        hub
    }

    /// The broker's time, in milliseconds since the Unix epoch.
    pub fn now_ms(&self) -> u64 {
        self.0.broker.now_ms()
    }

    /// Opens a stream. Until the guard is dropped, history is read for it and it follows the feed.
    pub fn open(&self, reader: impl Into<Reader>, start: Start, filter: Filter) -> StreamGuard {
        let shared = &self.0;
        let reader = reader.into();
        let user = reader.user.clone();
        let subscription =
            Subscription::new(reader, start, filter, shared.partitions.iter().copied())
                .within(&shared.buffers);
        let stream = Arc::new(OpenStream::new(
            shared.next_stream.fetch_add(1, Ordering::Relaxed),
            subscription,
        ));
        let mut state = shared.lock();
        // Registered before the first replay: `follow` ignores a stream that is not, and a reset in
        // between must reach it.
        state.streams.insert(stream.id, Arc::clone(&stream));
        state.by_user.entry(user).or_default().insert(stream.id);
        shared.metrics.streams_open.set(state.streams.len() as i64);
        drop(state);
        for &partition in &shared.partitions {
            shared.replay(&stream, partition, "connect", Subscription::enter_replay);
        }
        StreamGuard {
            hub: self.clone(),
            stream,
        }
    }

    /// Reads the history kept for a reader, from `start` until now and up to `limit` notifications,
    /// without following the feed. `take` is called after each step that may have produced items;
    /// it returns the total number of notifications taken.
    pub async fn read(
        &self,
        reader: Reader,
        start: Start,
        filter: Filter,
        limit: usize,
        mut take: impl FnMut(&mut Subscription) -> usize,
    ) {
        let shared = &self.0;
        let subscription =
            Subscription::new(reader, start, filter, shared.partitions.iter().copied());
        let stream = Arc::new(OpenStream::new(
            shared.next_stream.fetch_add(1, Ordering::Relaxed),
            subscription,
        ));
        let replays = shared.partitions.iter().map(|&partition| {
            let round = stream.lock().enter_replay(partition);
            shared
                .history
                .replay(Arc::clone(&stream), partition, round, &HistoryOnly)
        });
        let mut replays = std::pin::pin!(futures_util::future::join_all(replays));
        // Replays wake this task for new items, as they would wake a socket's task.
        std::future::poll_fn(|cx| {
            // Registered before the replays are polled, or an item queued in between would wake no
            // task.
            stream.register(cx.waker());
            loop {
                let is_done = replays.as_mut().poll(cx).is_ready();
                let n_taken = take(&mut stream.lock());
                stream.made_room();
                if is_done || n_taken >= limit {
                    return std::task::Poll::Ready(());
                }
                if !stream.lock().is_ready() {
                    return std::task::Poll::Pending;
                }
            }
        })
        .await;
        stream.close();
    }

    /// Returns the number of a user's open streams on this node, and how many of them are past this
    /// notification: they have sent it, have rejected it, or began after it.
    pub fn streams_past(
        &self,
        user: &Name,
        partition: PartitionNumber,
        id: NotificationId,
    ) -> (usize, usize) {
        let state = self.0.lock();
        let open: Vec<_> = state
            .by_user
            .get(user)
            .into_iter()
            .flatten()
            .filter_map(|stream| state.streams.get(stream))
            .collect();
        let is_past = |stream: &&&Arc<OpenStream>| stream.lock().is_past(partition, id);
        (open.len(), open.iter().filter(is_past).count())
    }

    /// The time since the last tick of the partition that has been without one for longest.
    pub fn silence(&self) -> Duration {
        let state = self.0.lock();
        let since = |partition| state.last_tick.get(partition).unwrap_or(&self.0.started);
        let silences = self.0.partitions.iter().map(|at| since(at).elapsed());
        silences.max().unwrap_or_default()
    }

    /// Partitions without a tick for [`SILENCE`], or without any tick yet.
    pub fn silent(&self) -> Vec<PartitionNumber> {
        let state = self.0.lock();
        let is_silent = |partition: &&PartitionNumber| {
            state
                .last_tick
                .get(partition)
                .is_none_or(|tick| tick.elapsed() > SILENCE)
        };
        self.0
            .partitions
            .iter()
            .filter(is_silent)
            .copied()
            .collect()
    }
}

/// Follows no log: a page of history ends where its reads end.
struct HistoryOnly;

#[async_trait]
impl FollowLogs for HistoryOnly {
    async fn follow(&self, _: &Arc<OpenStream>, _: PartitionNumber, _: u64, _: Vec<Target>) {}
}

/// Ticks as long as the hub exists. Any node may tick a partition, and all do.
async fn tick(hub: std::sync::Weak<HubInner>, partition: PartitionNumber) {
    let mut interval = tokio::time::interval(TICK);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let Some(shared) = hub.upgrade() else { return };
        let n_buffered = shared.buffers.n_bytes();
        shared.metrics.stream_buffer_bytes.set(n_buffered as i64);
        if let Err(error) = shared.broker.tick(partition).await {
            tracing::debug!(partition = partition.0, %error, "cannot send a tick");
        }
    }
}

#[async_trait]
impl FollowLogs for HubInner {
    async fn follow(
        &self,
        stream: &Arc<OpenStream>,
        partition: PartitionNumber,
        round: u64,
        targets: Vec<Target>,
    ) {
        let confirmations = {
            let mut state = self.lock();
            // The stream closed meanwhile: nothing would unfollow the logs followed now.
            if !state.streams.contains_key(&stream.id) {
                return;
            }
            // Checked under the lock: a later round may follow the logs of other memberships
            // already, and would go live without those that this one does not know.
            if stream.lock().round(partition) != round {
                return;
            }
            let confirmations = state.followed.set(stream, partition, targets);
            self.metrics.logs_followed.set(state.followed.len() as i64);
            confirmations
        };
        // Awaited without the lock: the feed reader needs it to confirm.
        for confirmation in confirmations {
            // An error means that the log has no followers left; the round is then over, too.
            if confirmation.await.is_err() {
                return;
            }
        }
    }
}

impl HubInner {
    fn lock(&self) -> MutexGuard<'_, HubState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget(&self, stream: u64, user: &Name) {
        let mut state = self.lock();
        state.streams.remove(&stream);
        if let Some(streams) = state.by_user.get_mut(user) {
            streams.remove(&stream);
            if streams.is_empty() {
                state.by_user.remove(user);
            }
        }
        for &partition in &self.partitions {
            state.followed.remove_stream(stream, partition);
        }
        self.metrics.streams_open.set(state.streams.len() as i64);
        self.metrics.logs_followed.set(state.followed.len() as i64);
    }

    /// Sends one partition of a stream to replay, with the transition `enter` that fits the cause.
    fn replay(
        self: &Arc<Self>,
        stream: &Arc<OpenStream>,
        partition: PartitionNumber,
        cause: &'static str,
        enter: impl FnOnce(&mut Subscription, PartitionNumber) -> u64,
    ) {
        let round = enter(&mut stream.lock(), partition);
        self.metrics
            .replays
            .get_or_create(&ReasonLabel { reason: cause })
            .inc();
        let (shared, stream) = (Arc::clone(self), Arc::clone(stream));
        tokio::spawn(async move {
            shared
                .history
                .replay(stream, partition, round, &*shared)
                .await
        });
    }

    fn replay_all(self: &Arc<Self>, partitions: &[PartitionNumber], cause: &'static str) {
        // Copied, so that the hub's lock is not held while each replay starts.
        let streams: Vec<_> = self.lock().streams.values().cloned().collect();
        for stream in streams {
            for &partition in partitions {
                self.replay(&stream, partition, cause, Subscription::enter_replay);
            }
        }
    }

    /// Returns the streams that hold most to replay whenever the streams hold too much together.
    async fn reclaim_buffers(self: Arc<Self>) {
        loop {
            self.buffers.exceeded().await;
            let streams: Vec<_> = self.lock().streams.values().cloned().collect();
            let fair_share = self.buffers.fair_share();
            let mut by_size: Vec<_> = streams
                .into_iter()
                .map(|stream| {
                    let n_bytes = stream.lock().n_reclaimable_bytes();
                    (n_bytes, stream)
                })
                .filter(|(n_bytes, _)| *n_bytes > fair_share)
                .collect();
            by_size.sort_unstable_by_key(|(n_bytes, _)| std::cmp::Reverse(*n_bytes));
            for (_, stream) in by_size {
                if self.buffers.is_relieved() {
                    break;
                }
                for &partition in &self.partitions {
                    self.replay(&stream, partition, "memory", Subscription::enter_replay);
                }
            }
            // Each look takes the lock of every stream.
            tokio::time::sleep(RECLAIM_PAUSE).await;
        }
    }

    /// Opens one feed after another, forever.
    async fn read_feeds(self: Arc<Self>) {
        let mut backoff = Backoff::new(
            Duration::from_millis(100),
            Duration::from_secs(1),
            0.5..=1.5,
        );
        loop {
            let pause = match self.broker.feed().await {
                Ok(feed) => {
                    let began = Instant::now();
                    FeedReader::new(&self).run(feed).await;
                    self.lock().followed.close_feed();
                    // A feed that ends as soon as it is opened does not count as a success.
                    if began.elapsed() > SILENCE {
                        backoff.reset();
                    }
                    backoff.pause()
                }
                Err(error) => {
                    let pause = backoff.pause();
                    tracing::warn!(%error, retry_ms = pause.as_millis() as u64, "cannot open the feed; streams stay open without live notifications");
                    pause
                }
            };
            self.metrics.feed_resets.inc();
            tokio::time::sleep(pause).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::Notice;
    use crate::broker::fake::FakeBroker;
    use crate::event::{Epoch, Target};
    use futures_util::FutureExt as _;

    /// Each replay is a task, and each read of a head may take as long as an unavailable broker
    /// takes to time out.
    #[tokio::test]
    async fn streams_replay_once_per_batch_of_notices_whose_epoch_cannot_be_read() {
        let broker = FakeBroker::failing(|| {
            crate::broker::Error::Unavailable("simulated outage".to_owned())
        });
        let hub = Hub::start(Arc::new(broker), Metrics::default(), &Shutdown::new());
        let _stream = hub.open(
            Name::parse("ann").unwrap(),
            Start::Latest,
            Filter::default(),
        );
        let partition = hub.0.partitions[0];
        let mut reader = FeedReader::new(&hub.0);
        let replays = || {
            hub.0
                .metrics
                .replays
                .get_or_create(&ReasonLabel { reason: "epoch" })
                .get()
        };
        for n_batches in 1..=2 {
            let tick = |n| Notice::Tick {
                partition,
                epoch: Epoch::from_bits(7),
                last: NotificationId(n),
            };
            reader.handle_batch((0..50).map(tick).collect()).await;
            assert_eq!(replays(), n_batches);
        }
    }

    /// The task of a replay that is over may be slow to learn of it. If it withdrew the logs of the
    /// group that the user has joined meanwhile, the next tick would pass their notifications.
    #[tokio::test]
    async fn a_replay_that_is_over_changes_no_followed_log() {
        let hub = Hub::start(
            Arc::new(FakeBroker::default()),
            Metrics::default(),
            &Shutdown::new(),
        );
        let guard = hub.open(
            Name::parse("ann").unwrap(),
            Start::Latest,
            Filter::default(),
        );
        let (stream, partition) = (guard.stream(), hub.0.partitions[0]);
        let (all, group) = (Target::Everyone, Target::Group(Name::parse("ops").unwrap()));
        let is_followed = |log| hub.0.lock().followed.is_followed(partition, log);
        let before = stream.lock().enter_replay(partition);
        let now = stream.lock().recipient_changed(partition);
        let follow = async |round, logs: &[&Target]| {
            let logs = logs.iter().map(|&log| log.clone()).collect();
            let following = hub.0.follow(stream, partition, round, logs);
            // The fake broker may confirm later; the logs are requested at the first poll.
            following.now_or_never();
        };
        follow(now, &[&all, &group]).await;
        follow(before, &[&all]).await;
        assert!(is_followed(&group));
        // The check is not what keeps it: the present round may withdraw it.
        follow(now, &[&all]).await;
        assert!(!is_followed(&group));
    }

    /// The silence before the connection says nothing about it. Dropping it would prolong an outage
    /// by another connection.
    #[tokio::test]
    async fn a_new_feed_connection_is_not_dropped_for_the_silence_before_it() {
        let broker = FakeBroker::default();
        let hub = Hub::start(Arc::new(broker), Metrics::default(), &Shutdown::new());
        let partition = hub.0.partitions[0];
        let (follow, mut requests) = tokio::sync::mpsc::unbounded_channel();
        let mut reader = FeedReader::new(&hub.0);
        let long_ago = Instant::now().checked_sub(2 * SILENCE).unwrap();
        hub.0.lock().last_tick.insert(partition, long_ago);
        reader.reconnect_silent(&follow);
        assert!(requests.try_recv().is_ok(), "a silent feed reconnects");

        hub.0.lock().reconnected.insert(partition, long_ago);
        let partitions = vec![partition];
        reader
            .handle_batch(vec![Notice::Reset { partitions }])
            .await;
        reader.reconnect_silent(&follow);
        assert!(requests.try_recv().is_err(), "it has just reconnected");
    }

    #[tokio::test]
    async fn a_hub_that_panics_ends_the_node() {
        let shutdown = Shutdown::new();
        let broker = FakeBroker::failing(|| panic!("simulated panic"));
        let _hub = Hub::start(Arc::new(broker), Metrics::default(), &shutdown);
        tokio::time::timeout(Duration::from_secs(60), shutdown.begun())
            .await
            .expect("the shutdown begins");
        assert_eq!(shutdown.broken(), Some("the partition ticker"));
    }
}
