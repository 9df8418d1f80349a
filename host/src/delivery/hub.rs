//! The streams of this node, the logs that each follows, and the feed that delivers notices of
//! appends to them.
//!
//! The feed is never trusted. A tick per second and partition serves as probe, loss detector and
//! low-water mark in one. A reset, or [`SILENCE`] without a tick, sends every stream of the
//! partition back to replay. The hub never waits for a stream: one whose buffer is full returns to
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
use tokio::sync::{mpsc, oneshot};

use crate::backoff::Backoff;
use crate::broker::{Feed, Follow, Logs, Notice};
use crate::clock::now_ms;
use crate::delivery::recipients::Reader;
use crate::delivery::subscription::replay::{Follows, History};
use crate::delivery::subscription::{Filter, OpenStream, Record, Start, Subscription};
use crate::event::{Epoch, Name, NotificationId, PartitionNumber, Target};
use crate::shutdown::Shutdown;
use crate::telemetry::metrics::{Metrics, ReasonLabel};

/// A partition without a tick for this long counts as silent, whatever the state of the connection.
pub const SILENCE: Duration = Duration::from_secs(3);
/// How often each node ticks each partition.
const TICK: Duration = Duration::from_secs(1);

/// A cheap handle: clones share one hub.
#[derive(Clone, Debug)]
pub struct Hub(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    broker: Arc<dyn Logs>,
    history: History,
    metrics: Metrics,
    partitions: Vec<PartitionNumber>,
    next_stream: AtomicU64,
    /// A std mutex: held for look-ups and hand-overs, never across an `.await`. Lock order: this
    /// one before a stream's, never after.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    streams: HashMap<u64, Arc<OpenStream>>,
    by_user: HashMap<Name, HashSet<u64>>,
    logs: HashMap<(PartitionNumber, Target), Log>,
    followed: HashMap<(u64, PartitionNumber), Vec<Target>>,
    /// `None` while no feed is open.
    follow: Option<mpsc::UnboundedSender<Follow>>,
    next_token: u64,
    /// Follow requests not yet confirmed, by token.
    asked: HashMap<u64, (PartitionNumber, Target)>,
    last_tick: HashMap<PartitionNumber, Instant>,
    /// When the feed of a silent partition was last requested to reconnect.
    reconnected: HashMap<PartitionNumber, Instant>,
}

#[derive(Debug)]
struct Log {
    followers: HashMap<u64, Arc<OpenStream>>,
    /// Token of the latest request; confirmations of earlier ones are ignored.
    token: u64,
    is_confirmed: bool,
    waiting: Vec<oneshot::Sender<()>>,
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
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        self.stream.close();
        let user = self.stream.lock().user().clone();
        self.hub.0.forget(self.stream.id, &user);
    }
}

impl Hub {
    /// Starts the feed and the ticks. Both end with the runtime. Without them streams would stay
    /// open and receive nothing, so a panic in either ends the node.
    pub fn start(broker: Arc<dyn Logs>, metrics: Metrics, shutdown: &Shutdown) -> Self {
        let partitions = broker
            .partitions()
            .iter()
            .map(|partition| partition.number)
            .collect();
        let history = History::new(Arc::clone(&broker), metrics.clone());
        let (next_stream, state) = (AtomicU64::new(1), Mutex::default());
        let hub = Self(Arc::new(Shared {
            broker,
            history,
            metrics,
            partitions,
            next_stream,
            state,
        }));
        shutdown.spawn_lasting("the notice reader", Arc::clone(&hub.0).listen());
        for &partition in &hub.0.partitions {
            shutdown.spawn_lasting(
                "the partition ticker",
                tick(Arc::downgrade(&hub.0), partition),
            );
        }
        hub
    }

    /// Opens a stream. Until the guard is dropped, history is read for it and it follows the feed.
    pub fn open(&self, reader: impl Into<Reader>, start: Start, filter: Filter) -> StreamGuard {
        let shared = &self.0;
        let reader = reader.into();
        let user = reader.user.clone();
        let subscription =
            Subscription::new(reader, start, filter, shared.partitions.iter().copied());
        let stream = Arc::new(OpenStream::new(
            shared.next_stream.fetch_add(1, Ordering::Relaxed),
            subscription,
        ));
        let mut state = shared.lock();
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
                .replay(Arc::clone(&stream), partition, round, &FollowsNothing)
        });
        let mut replays = std::pin::pin!(futures_util::future::join_all(replays));
        // Replays wake this task for new items, as they would wake a socket's task.
        std::future::poll_fn(|cx| {
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
    pub fn streams_beside(
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

struct FollowsNothing;

#[async_trait]
impl Follows for FollowsNothing {
    async fn follow(&self, _: &Arc<OpenStream>, _: PartitionNumber, _: Vec<Target>) {}
}

/// Ticks as long as the hub exists. Any node may tick a partition, and all do.
async fn tick(hub: std::sync::Weak<Shared>, partition: PartitionNumber) {
    let mut interval = tokio::time::interval(TICK);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let Some(shared) = hub.upgrade() else { return };
        if let Err(error) = shared.broker.tick(partition).await {
            tracing::debug!(partition = partition.0, %error, "cannot send a tick");
        }
    }
}

#[async_trait]
impl Follows for Shared {
    async fn follow(
        &self,
        stream: &Arc<OpenStream>,
        partition: PartitionNumber,
        targets: Vec<Target>,
    ) {
        let mut confirmations = Vec::new();
        {
            let mut state = self.lock();
            // The stream closed meanwhile: nothing would unfollow the logs followed now.
            if !state.streams.contains_key(&stream.id) {
                return;
            }
            let before = state
                .followed
                .insert((stream.id, partition), targets.clone())
                .unwrap_or_default();
            for target in before
                .into_iter()
                .filter(|target| !targets.contains(target))
            {
                state.unfollow(stream.id, partition, target);
            }
            for target in targets {
                let log = state.log(partition, target);
                log.followers.insert(stream.id, Arc::clone(stream));
                if !log.is_confirmed {
                    let (tell, confirmation) = oneshot::channel();
                    log.waiting.push(tell);
                    confirmations.push(confirmation);
                }
            }
            self.metrics.logs_followed.set(state.logs.len() as i64);
        }
        for confirmation in confirmations {
            // An error means that the log has no followers left; the round is then over, too.
            if confirmation.await.is_err() {
                return;
            }
        }
    }
}

impl State {
    fn log(&mut self, partition: PartitionNumber, target: Target) -> &mut Log {
        let Self {
            logs,
            follow,
            next_token,
            asked,
            ..
        } = self;
        logs.entry((partition, target))
            .or_insert_with_key(|(_, target)| {
                *next_token += 1;
                if let Some(follow) = follow {
                    ask(follow, asked, *next_token, partition, target);
                }
                Log {
                    followers: HashMap::new(),
                    token: *next_token,
                    is_confirmed: false,
                    waiting: Vec::new(),
                }
            })
    }

    fn unfollow(&mut self, stream: u64, partition: PartitionNumber, target: Target) {
        let key = (partition, target);
        let Some(log) = self.logs.get_mut(&key) else {
            return;
        };
        log.followers.remove(&stream);
        if log.followers.is_empty() {
            self.logs.remove(&key);
            if let Some(follow) = &self.follow {
                follow
                    .send(Follow::Stop {
                        partition,
                        target: key.1,
                    })
                    .ok();
            }
        }
    }

    /// Sends new follow requests for every log of these partitions.
    fn follow_again(&mut self, partitions: &[PartitionNumber]) {
        let Self {
            logs,
            follow,
            next_token,
            asked,
            ..
        } = self;
        let Some(follow) = follow else { return };
        asked.retain(|_, (partition, _)| !partitions.contains(partition));
        for ((partition, target), log) in logs
            .iter_mut()
            .filter(|((partition, _), _)| partitions.contains(partition))
        {
            *next_token += 1;
            log.token = *next_token;
            log.is_confirmed = false;
            ask(follow, asked, log.token, *partition, target);
        }
    }
}

fn ask(
    follow: &mpsc::UnboundedSender<Follow>,
    asked: &mut HashMap<u64, (PartitionNumber, Target)>,
    token: u64,
    partition: PartitionNumber,
    target: &Target,
) {
    asked.insert(token, (partition, target.clone()));
    // A feed that has ended answers nothing; all requests are repeated on the next feed.
    follow
        .send(Follow::Start {
            partition,
            target: target.clone(),
            token,
        })
        .ok();
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
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
            for target in state
                .followed
                .remove(&(stream, partition))
                .unwrap_or_default()
            {
                state.unfollow(stream, partition, target);
            }
        }
        self.metrics.streams_open.set(state.streams.len() as i64);
        self.metrics.logs_followed.set(state.logs.len() as i64);
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
        let streams: Vec<_> = self.lock().streams.values().cloned().collect();
        for stream in streams {
            for &partition in partitions {
                self.replay(&stream, partition, cause, Subscription::enter_replay);
            }
        }
    }

    /// Opens one feed after another, forever.
    async fn listen(self: Arc<Self>) {
        let mut backoff = Backoff::new(
            Duration::from_millis(100),
            Duration::from_secs(5),
            0.5..=1.5,
        );
        loop {
            let pause = match self.broker.feed().await {
                Ok(feed) => {
                    backoff.reset();
                    Listener {
                        hub: &self,
                        epochs: HashMap::new(),
                        unread: HashSet::new(),
                    }
                    .listen(feed)
                    .await;
                    self.lock().follow = None;
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

/// The only reader of a feed.
struct Listener<'a> {
    hub: &'a Arc<Shared>,
    /// The current epoch of each partition, as known to this node.
    epochs: HashMap<PartitionNumber, Epoch>,
    /// Partitions whose head could not be read for the current batch.
    unread: HashSet<PartitionNumber>,
}

impl Listener<'_> {
    async fn listen(mut self, feed: Feed) {
        let Feed {
            follow,
            mut notices,
        } = feed;
        let begin = Instant::now();
        {
            let mut state = self.hub.lock();
            state.follow = Some(follow.clone());
            state.last_tick = self
                .hub
                .partitions
                .iter()
                .map(|&partition| (partition, begin))
                .collect();
            state.follow_again(&self.hub.partitions);
        }
        self.hub.replay_all(&self.hub.partitions, "feed");
        let mut watch = tokio::time::interval(TICK);
        loop {
            tokio::select! {
                batch = notices.recv() => match batch {
                    Some(batch) => self.hear(batch).await,
                    None => return,
                },
                _ = watch.tick() => self.reconnect_silent(&follow),
            }
        }
    }

    fn reconnect_silent(&self, follow: &mpsc::UnboundedSender<Follow>) {
        let mut state = self.hub.lock();
        let State {
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

    async fn hear(&mut self, batch: Vec<Notice>) {
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
                    if !self.is_present_life(partition, epoch).await {
                        continue;
                    }
                    let is_known = match records.get(&(partition, epoch, id)) {
                        Some(Some(record)) => self.append(partition, &target, epoch, id, record),
                        // The record could not be read: replay will find it or announce that it is
                        // gone.
                        Some(None) => {
                            self.replay_followers(partition, &target);
                            true
                        }
                        None => true,
                    };
                    if !is_known {
                        self.look(partition).await;
                    }
                }
                Notice::Tick {
                    partition,
                    epoch,
                    last,
                } => {
                    if self.is_present_life(partition, epoch).await
                        && !self.tick(partition, epoch, last)
                    {
                        self.look(partition).await;
                    }
                }
                Notice::Alive { partition } => {
                    self.hub.lock().last_tick.insert(partition, Instant::now());
                }
                Notice::RecipientChanged { partition, user } => {
                    let state = self.hub.lock();
                    let streams: Vec<_> = state
                        .by_user
                        .get(&user)
                        .into_iter()
                        .flatten()
                        .filter_map(|id| state.streams.get(id).cloned())
                        .collect();
                    drop(state);
                    // Immediately and in order: the low-water mark must not pass a notification
                    // that the user has just become a recipient of.
                    for stream in streams {
                        self.hub.replay(
                            &stream,
                            partition,
                            "recipient",
                            Subscription::recipient_changed,
                        );
                    }
                }
                Notice::Following { token } => self.confirm(token),
                Notice::Reset { partitions } => {
                    self.hub.metrics.feed_resets.inc();
                    self.hub.lock().follow_again(&partitions);
                    self.hub.replay_all(&partitions, "feed");
                }
            }
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
                if records.contains_key(&key)
                    || !state.logs.contains_key(&(*partition, target.clone()))
                {
                    continue;
                }
                let held = self.hub.history.records();
                let record = record
                    .as_ref()
                    .and_then(|stored| held.insert(key, stored))
                    .or_else(|| held.get(key));
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
        for stream in state.streams.values() {
            let mut subscription = stream.lock();
            is_known &= !subscription.lives_elsewhere(partition, epoch);
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
        let now_ms = now_ms();
        let mut overflowed = Vec::new();
        let mut is_known = true;
        let state = self.hub.lock();
        let Some(log) = state.logs.get(&(partition, target.clone())) else {
            return true;
        };
        for stream in log.followers.values() {
            let mut subscription = stream.lock();
            is_known &= !subscription.lives_elsewhere(partition, epoch);
            if let Some(round) = subscription.on_append(partition, epoch, id, record, now_ms) {
                overflowed.push((Arc::clone(stream), round));
            }
            let is_ready = subscription.is_ready();
            drop(subscription);
            if is_ready {
                stream.wake();
            }
        }
        drop(state);
        for (stream, round) in overflowed {
            self.hub.metrics.stream_overflows.inc();
            self.hub
                .replay(&stream, partition, "overflow", |_, _| round);
        }
        is_known
    }

    fn replay_followers(&self, partition: PartitionNumber, target: &Target) {
        let state = self.hub.lock();
        let followers: Vec<_> = state
            .logs
            .get(&(partition, target.clone()))
            .into_iter()
            .flat_map(|log| log.followers.values().cloned())
            .collect();
        drop(state);
        for stream in followers {
            self.hub
                .replay(&stream, partition, "record", Subscription::enter_replay);
        }
    }

    fn confirm(&self, token: u64) {
        let mut state = self.hub.lock();
        let Some(key) = state.asked.remove(&token) else {
            return;
        };
        if let Some(log) = state.logs.get_mut(&key).filter(|log| log.token == token) {
            log.is_confirmed = true;
            for waiting in log.waiting.drain(..) {
                // The waiting replay may have been cancelled.
                waiting.send(()).ok();
            }
        }
    }

    /// Whether a notice is of the current epoch. A notice of another epoch may be older or newer
    /// than this node's knowledge; only the head decides.
    async fn is_present_life(&mut self, partition: PartitionNumber, epoch: Epoch) -> bool {
        self.epochs.get(&partition) == Some(&epoch) || self.look(partition).await == Some(epoch)
    }

    /// Reads the current epoch of a partition and sends the streams that are in another one to
    /// replay, which handles the change. Called when feed, node and streams disagree: each may have
    /// its information from a former primary.
    async fn look(&mut self, partition: PartitionNumber) -> Option<Epoch> {
        // One read per batch: the replays started by a failed read also cover the rest of the
        // batch.
        if self.unread.contains(&partition) {
            return None;
        }
        let present = match self.hub.broker.head(partition).await {
            Ok(head) => head.epoch,
            Err(error) => {
                // The notice cannot be evaluated, and the next one must not move a mark past it.
                tracing::warn!(partition = partition.0, %error, "cannot read the head; the partition's streams return to replay");
                self.hub.replay_all(&[partition], "epoch");
                self.unread.insert(partition);
                return None;
            }
        };
        let before = self.epochs.insert(partition, present);
        if before.is_some_and(|before| before != present) {
            tracing::warn!(partition = partition.0, epoch = %present, "new epoch: the broker was restarted or failed over");
        }
        // A stream that has not begun may be about to begin with a head from before the change.
        let is_new = before != Some(present);
        let is_elsewhere = |stream: &Arc<OpenStream>| {
            stream
                .lock()
                .epoch(partition)
                .map_or(is_new, |epoch| epoch != present)
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
        Some(present)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::fake::FakeBroker;

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
        let mut listener = Listener {
            hub: &hub.0,
            epochs: HashMap::new(),
            unread: HashSet::new(),
        };
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
            listener.hear((0..50).map(tick).collect()).await;
            assert_eq!(replays(), n_batches);
        }
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
