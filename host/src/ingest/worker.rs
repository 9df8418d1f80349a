//! The ingest loop gives each entry of a source exactly one outcome: it reads after the position,
//! runs the pipeline, commits and continues.
//!
//! The position is the only truth. Only a commit moves it, and only from where this loop expects
//! it. After any failure (a conflict, a timeout, a killed node, two owners) the loop reads the head
//! again and continues from its position: later entries are simply read again. A lease saves
//! duplicate work; correctness does not depend on it.
//!
//! Knows nothing of streams. `pipeline` runs plugins and handles their failures; the broker makes a
//! commit atomic.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use prometheus_client::metrics::counter::Counter;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::backoff::Backoff;
use crate::broker::{
    Batch, CommitResult, Entry, Error, Head, Item, Lease, MAX_COMMIT_BYTES, MAX_INDEX_ENTRIES,
    MAX_ITEMS, NewNotification, Partition, Proposal, Result, RetryPolicy, Slice, Sources,
};
use crate::event::{
    Decision, EntryId, Epoch, Event, Name, Notification, NotificationId, Outcome, PartitionNumber,
    Position,
};
use crate::ingest::pipeline::{MissingPlugins, Pipeline, Resolution, Unevaluated};
use crate::ingest::proposal::{
    SlicedRecordDecision, commit_proposal, dead_letter, decision_about, dedupe_key, n_bytes,
    n_targets, oversized, slice_of, unevaluated,
};
use crate::ingest::quotes::warn_of_quotes;
use crate::plugin::registry::generation::ChainIdentity;
use crate::telemetry::metrics::{Metrics, OutcomeLabel, SourceLabel};
use crate::telemetry::readiness::Readiness;

/// `[ingest]`: how sources are processed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The largest event, in bytes of all its fields (262,144; at most 524,288). A larger one is
    /// dead-lettered.
    pub max_event_bytes: usize,
    /// Time to live of a lease without renewal (3s). After a node is killed, its sources are idle
    /// for up to this time.
    #[serde(with = "crate::duration")]
    pub lease_ttl: Duration,
    /// The most retries of an event for which a plugin requested one (5). They are due after 1, 2,
    /// 4 ... seconds; events behind it do not wait.
    pub retries: u32,
    /// The most time from the first attempt to the last retry (1m).
    #[serde(with = "crate::duration")]
    pub retry_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_event_bytes: 256 * 1024,
            lease_ttl: Duration::from_secs(3),
            retries: 5,
            retry_timeout: Duration::from_secs(60),
        }
    }
}

/// After this many consecutive owners that did not move the position, entries are processed one at
/// a time and each attempt is noted in advance.
const CAREFUL_AFTER: u32 = 3;
/// After this many noted attempts, the entry is considered the cause of the crashes.
const POISON_AFTER: u32 = 5;
/// The longest pause between two attempts, before a random factor of up to 1.5.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// How long an error reported by the broker stays in readiness without a repetition: longer than
/// the longest pause, and at most 5 s after the cause is gone.
const PERMANENT_ERROR_SHOWN_FOR: Duration = Duration::from_secs(5);
const _: () = assert!(
    LONGEST_PAUSE.as_millis() * 3 / 2 < PERMANENT_ERROR_SHOWN_FOR.as_millis()
        && PERMANENT_ERROR_SHOWN_FOR.as_millis() <= 5_000
);
/// How long a lack of memory stays in readiness without a repetition.
const HOST_MEMORY_SHOWN_FOR: Duration = Duration::from_secs(10);
/// The longest time between two renewals of a lease, which also append the retries that are due.
const RENEW_AT_LEAST_EVERY: Duration = Duration::from_secs(1);
/// The most batches evaluated ahead of the commit.
const AHEAD: usize = 2;

/// The dependencies of ingest.
#[derive(Clone, Debug)]
pub struct Ingest {
    pub broker: Arc<dyn Sources>,
    pub pipeline: Pipeline,
    pub metrics: Metrics,
    pub config: Config,
    pub readiness: Readiness,
    /// The name of this node, under which leases are taken.
    pub node: String,
}

/// Why work on a partition stopped.
#[derive(Debug)]
enum Stop {
    /// The position of the partition is not the expected one.
    Conflict,
    Broker(Error),
    LeaseLost,
    /// Without a plugin events would be decided wrongly for good: they wait in the source.
    MissingPlugins(MissingPlugins),
    /// The host has no memory for an instance of a plugin: events wait in the source.
    HostMemory(String),
    Shutdown,
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Broker(error)
    }
}

/// Counts the entries that one run of the loop has read and not yet given an outcome. When the run
/// ends, for any reason, these count as read again.
struct Progress {
    n_in_flight: AtomicU64,
    read: Counter,
    reread: Counter,
}

impl Progress {
    fn begin(metrics: &Metrics, partition: &Partition) -> Self {
        let label = SourceLabel {
            source: partition.source.clone(),
        };
        let (read, reread) = (
            metrics.events_read.get_or_create_owned(&label),
            metrics.events_reread.get_or_create_owned(&label),
        );
        Self {
            n_in_flight: AtomicU64::new(0),
            read,
            reread,
        }
    }

    fn read(&self, n_entries: u64) {
        self.read.inc_by(n_entries);
        self.n_in_flight.fetch_add(n_entries, Relaxed);
    }

    fn done(&self, n_entries: u64) {
        self.n_in_flight.fetch_sub(n_entries, Relaxed);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.reread.inc_by(self.n_in_flight.load(Relaxed));
    }
}

/// State of a source kept between attempts to process it.
struct SourceState {
    /// Only the end of a node counts as a take-over; an outage of the broker does not.
    is_new_owner: bool,
    /// Set after a take-over from owners that did not move the position: see [`CAREFUL_AFTER`].
    is_careful: bool,
    /// The most entries to read at once.
    read_limit: usize,
}

/// The decisions between two that list the members of the same chain: few enough that a list is
/// still kept for most decisions, and many enough that a list costs each decision a few bytes.
const MEMBERS_EVERY: u32 = 256;

/// Names the chain in decisions, and lists its members in the first one of each run of the loop, in
/// the first one after a change, and in every [`MEMBERS_EVERY`]th. A list that does not reach the
/// broker ends the run, so the next run repeats it.
#[derive(Default)]
struct ChainNotes {
    listed: String,
    n_since: u32,
}

impl ChainNotes {
    fn note(&mut self, chain: &ChainIdentity, decision: &mut Decision) {
        if chain.id.is_empty() {
            return;
        }
        decision.chain.clone_from(&chain.id);
        self.n_since += 1;
        if self.listed != chain.id || self.n_since >= MEMBERS_EVERY {
            decision.members = Some(chain.members.clone());
            self.listed.clone_from(&chain.id);
            self.n_since = 0;
        }
    }
}

/// An evaluated batch, ready to commit.
struct EvaluatedBatch {
    items: Vec<Item>,
    /// See [`Registry::n_withdrawals`](crate::plugin::registry::Registry); as before its evaluation.
    n_withdrawals: u64,
}

impl Ingest {
    /// Processes one partition until `shutdown`; then it stops reading, waits for the last commit
    /// and releases the lease.
    pub async fn run(self, partition: Partition, shutdown: CancellationToken) {
        let mut backoff = Backoff::new(Duration::from_millis(50), LONGEST_PAUSE, 0.5..=1.5);
        let mut state = SourceState {
            is_new_owner: true,
            is_careful: false,
            read_limit: MAX_ITEMS,
        };
        while !shutdown.is_cancelled() {
            // Checked before the lease is taken: another node may have the plugins.
            tokio::select! {
                () = self.pipeline.can_work(partition.number) => {}
                () = shutdown.cancelled() => break,
            }
            let began = Instant::now();
            let stop = self.own(&partition, &mut state, &shutdown).await;
            if began.elapsed() > Duration::from_secs(5) {
                backoff.reset();
            }
            let pause = match stop {
                Stop::Shutdown => break,
                Stop::Conflict => {
                    tracing::debug!(source.key = %partition.source, "the position moved; reading the head again");
                    continue;
                }
                Stop::LeaseLost => {
                    tracing::info!(source.key = %partition.source, "lost the lease; another node processes the source");
                    state.is_new_owner = true;
                    backoff.reset();
                    backoff.pause()
                }
                Stop::MissingPlugins(missing) => {
                    tracing::warn!(source.key = %partition.source, "{missing}; the lease is left to other nodes");
                    self.release(&partition).await;
                    // It has only been out of touch and continues within a moment: this is not the
                    // end of an owner that may have crashed.
                    state.is_new_owner |= missing != MissingPlugins::Unconfirmed;
                    continue;
                }
                Stop::HostMemory(reason) => {
                    let pause = backoff.pause();
                    tracing::warn!(source.key = %partition.source, retry_ms = pause.as_millis() as u64, "{reason}; the source waits");
                    // Another node may have memory. This one stays the owner in the sense of
                    // `take_over`: it has not crashed.
                    self.release(&partition).await;
                    pause
                }
                Stop::Broker(error) => {
                    self.metrics.broker_errors.inc();
                    if matches!(error, Error::Permanent(_)) {
                        // Not a passing outage, and the broker monitor need not detect it: the
                        // source may be overwritten, or the record of a plan lost.
                        self.readiness.set_for(
                            &format!("sources.{}", partition.source),
                            error.to_string(),
                            PERMANENT_ERROR_SHOWN_FOR,
                        );
                    }
                    let pause = backoff.pause();
                    tracing::warn!(source.key = %partition.source, %error, retry_ms = pause.as_millis() as u64, "the broker failed; the source waits");
                    pause
                }
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = shutdown.cancelled() => {}
            }
        }
        self.release(&partition).await;
    }

    async fn release(&self, partition: &Partition) {
        if let Err(error) = self.broker.release(partition.number, &self.node).await {
            tracing::debug!(source.key = %partition.source, %error, "cannot release the lease; it will expire");
        }
    }

    /// Takes the lease, then processes the partition and renews the lease until something stops it.
    async fn own(
        &self,
        partition: &Partition,
        state: &mut SourceState,
        shutdown: &CancellationToken,
    ) -> Stop {
        let ttl = self.config.lease_ttl;
        loop {
            match self.broker.lease(partition.number, &self.node, ttl).await {
                Ok(Lease::Mine) => break,
                Ok(Lease::Others(left)) => {
                    let wait = left.clamp(Duration::from_millis(20), Duration::from_secs(1));
                    tokio::select! {
                        () = tokio::time::sleep(wait) => {}
                        () = shutdown.cancelled() => return Stop::Shutdown,
                        missing = self.cannot_work(partition.number) => return missing,
                    }
                }
                Err(error) => return error.into(),
            }
        }
        // A take-over counts as an owner that may have crashed on the next entry.
        if let Err(missing) = self.pipeline.check(partition.number) {
            return Stop::MissingPlugins(missing);
        }
        state.is_careful = false;
        if state.is_new_owner {
            match self.broker.take_over(partition.number).await {
                Ok(n_owners) => state.is_careful = n_owners >= CAREFUL_AFTER,
                Err(error) => return error.into(),
            }
            state.is_new_owner = false;
        }
        let keep_lease = async {
            loop {
                tokio::time::sleep((ttl / 3).min(RENEW_AT_LEAST_EVERY)).await;
                match self.broker.lease(partition.number, &self.node, ttl).await {
                    Ok(Lease::Mine) => {}
                    Ok(Lease::Others(_)) => return Stop::LeaseLost,
                    // Retries cannot be appended, and no read or commit would report it.
                    Err(error @ Error::Permanent(_)) => return error.into(),
                    // The next read or commit returns the error as well; a lease that was not
                    // renewed is not a reason to stop.
                    Err(error) => {
                        tracing::debug!(source.key = %partition.source, %error, "cannot renew the lease")
                    }
                }
            }
        };
        tokio::select! {
            stop = self.work(partition, state, shutdown) => stop,
            stop = keep_lease => stop,
        }
    }

    async fn work(
        &self,
        partition: &Partition,
        state: &mut SourceState,
        shutdown: &CancellationToken,
    ) -> Stop {
        let progress = Progress::begin(&self.metrics, partition);
        // First (epoch, position), then the entries after it: in the reverse order a fail-over in
        // between would go unnoticed.
        let head = match self.settled_head(partition.number, &progress).await {
            Ok(head) => head,
            Err(stop) => return stop,
        };
        let (evaluated, batches) = mpsc::channel(AHEAD);
        let read = self.read(
            partition,
            head.position.entry,
            state,
            evaluated,
            &progress,
            shutdown,
        );
        let commit = self.commit(partition, head.epoch, head.position, batches, &progress);
        // Both run in this task: when the committer stops, the reader is dropped together with its
        // entries read ahead.
        tokio::pin!(read, commit);
        tokio::select! {
            stop = &mut commit => stop,
            stop = &mut read => match stop {
                // Every evaluated batch is in the channel: let the last commit return.
                Stop::Shutdown | Stop::MissingPlugins(_) | Stop::HostMemory(_) => match commit.await {
                    Stop::Shutdown => stop,
                    stop => stop,
                },
                stop => stop,
            },
        }
    }

    /// Waits until no event of the partition can be decided.
    async fn cannot_work(&self, partition: PartitionNumber) -> Stop {
        loop {
            self.pipeline.cannot_work(partition).await;
            // It may have become possible again.
            if let Err(missing) = self.pipeline.check(partition) {
                return Stop::MissingPlugins(missing);
            }
        }
    }

    /// Returns the head after completing a plan that an earlier owner left partly written: that
    /// plan, never another one for that event.
    async fn settled_head(
        &self,
        partition: PartitionNumber,
        progress: &Progress,
    ) -> Result<Head, Stop> {
        let head = self.broker.head(partition).await?;
        let Some(pending) = head.pending.filter(|_| head.position.slices > 0) else {
            return Ok(head);
        };
        let unreadable = |e| {
            Error::Permanent(format!(
                "cannot parse the record of the partly written plan {pending}: {e}"
            ))
        };
        let record = self.pending_record(partition, pending).await?;
        let notification: Notification = serde_json::from_slice(&record).map_err(unreadable)?;
        let SlicedRecordDecision { decision } =
            serde_json::from_slice(&record).map_err(unreadable)?;
        tracing::info!(
            notification.id = pending.0,
            slices = head.position.slices,
            "continuing a partly written plan"
        );
        // Records of earlier versions hold no decision.
        let decision =
            decision.unwrap_or_else(|| decision_about(&notification.event, Vec::new(), 0));
        let n_more = decision.slots.len().saturating_sub(1) as u64;
        let mut notifications = Vec::new();
        for id in pending.0.saturating_sub(n_more)..=pending.0 {
            let record = self.pending_record(partition, NotificationId(id)).await?;
            let notification: Notification = serde_json::from_slice(&record).map_err(unreadable)?;
            notifications.push(NewNotification {
                record,
                targets: notification.plan.targets(),
            });
        }
        let item = Item {
            entry: notification.entry,
            dedupe: None,
            proposal: Proposal::Commit(notifications),
            decision,
        };
        // New to this owner; the owner that began the plan counted the entry as read again.
        progress.read(1);
        self.commit_sliced(partition, head.epoch, item, head.position.slices)
            .await?;
        progress.done(1);
        Ok(self.broker.head(partition).await?)
    }

    /// The record of a partly written plan.
    async fn pending_record(
        &self,
        partition: PartitionNumber,
        id: NotificationId,
    ) -> Result<Bytes, Stop> {
        let record = self.broker.records(partition, &[id]).await?.pop().flatten();
        record.ok_or_else(|| {
            let reason = format!(
                "the record of the partly written plan {id} is gone; restore it or the partition"
            );
            Error::Permanent(reason).into()
        })
    }

    /// Reads and evaluates batches ahead of the commit.
    async fn read(
        &self,
        partition: &Partition,
        mut after: EntryId,
        state: &mut SourceState,
        evaluated: mpsc::Sender<EvaluatedBatch>,
        progress: &Progress,
        shutdown: &CancellationToken,
    ) -> Stop {
        // Careful only until the position is known to move again.
        let mut n_careful = if state.is_careful { MAX_ITEMS } else { 0 };
        let mut chain_notes = ChainNotes::default();
        loop {
            let count = if n_careful > 0 { 1 } else { state.read_limit };
            let entries = tokio::select! {
                entries = self.broker.read(partition.number, after, count, Duration::from_secs(1)) => entries,
                () = shutdown.cancelled() => return Stop::Shutdown,
                missing = self.cannot_work(partition.number) => return missing,
            };
            let entries = match entries {
                Ok(entries) => entries,
                Err(error) => {
                    // Reading this many large entries may exceed the response timeout, and would do
                    // so on every attempt.
                    state.read_limit = (state.read_limit / 4).max(1);
                    return error.into();
                }
            };
            if entries.len() == state.read_limit {
                state.read_limit = (state.read_limit + 1).min(MAX_ITEMS);
            }
            let Some(last) = entries.last() else {
                if evaluated.is_closed() {
                    return Stop::Conflict;
                }
                continue;
            };
            after = last.id;
            progress.read(entries.len() as u64);
            // Not noted as an attempt, which would count as a crash of this node.
            if let Err(missing) = self.pipeline.check(partition.number) {
                return Stop::MissingPlugins(missing);
            }
            let n_withdrawals = self.pipeline.registry().n_withdrawals();
            let poison = if n_careful > 0 {
                self.poison(partition, &entries).await
            } else {
                Ok(None)
            };
            let is_noted = n_careful > 0;
            n_careful = n_careful.saturating_sub(1);
            let items = match poison {
                Ok(Some(item)) => vec![item],
                Ok(None) => {
                    let evaluated = tokio::select! {
                        evaluated = self.evaluate(partition, &entries, is_noted, &mut chain_notes) => evaluated,
                        // The calls for a batch may take longer than a shutdown may. None of these
                        // entries is committed, so they are read again. An entry with a noted
                        // attempt is awaited: without an outcome the attempt would count as a crash
                        // of the node.
                        () = shutdown.cancelled(), if !is_noted => return Stop::Shutdown,
                    };
                    match evaluated {
                        Ok(items) => items,
                        // A plugin was removed after they were read.
                        Err(Unevaluated::Missing(missing)) => return Stop::MissingPlugins(missing),
                        Err(lacking) => return Stop::HostMemory(lacking.to_string()),
                    }
                }
                Err(stop) => return stop,
            };
            let batch = EvaluatedBatch {
                items,
                n_withdrawals,
            };
            if evaluated.send(batch).await.is_err() {
                return Stop::Conflict;
            }
        }
    }

    /// Notes an attempt at the single entry. Returns a dead letter if nodes crashed on it too
    /// often.
    async fn poison(&self, partition: &Partition, entries: &[Entry]) -> Result<Option<Item>, Stop> {
        let [entry] = entries else { return Ok(None) };
        let attempts = self.broker.note_attempt(partition.number, entry.id).await?;
        if attempts <= POISON_AFTER {
            return Ok(None);
        }
        let reason = format!("the node crashed {POISON_AFTER} times while processing this entry");
        Ok(Some(dead_letter(
            entry,
            reason,
            None,
            attempts - 1,
            unevaluated(partition, entry, 0),
        )))
    }

    /// Turns entries into items, in order. Malformed and oversized entries are dead-lettered with
    /// the reason; the others go through the plugins. `is_noted`: waits for memory here, because a
    /// noted attempt without an outcome would count as a crash.
    async fn evaluate(
        &self,
        partition: &Partition,
        entries: &[Entry],
        is_noted: bool,
        chain_notes: &mut ChainNotes,
    ) -> Result<Vec<Item>, Unevaluated> {
        // Not the node's clock: a plan's expiry is compared with the broker's on every node.
        let clock_ms = self.broker.now_ms();
        let mut events = Vec::with_capacity(entries.len());
        let mut refused: Vec<Option<Item>> = Vec::with_capacity(entries.len());
        for entry in entries {
            refused.push(match self.event(partition, entry, clock_ms) {
                Ok(event) => {
                    events.push(event);
                    None
                }
                Err(reason) => Some(dead_letter(
                    entry,
                    reason,
                    None,
                    1,
                    unevaluated(partition, entry, clock_ms),
                )),
            });
        }
        let evaluations = loop {
            let batch = if is_noted {
                events.clone()
            } else {
                std::mem::take(&mut events)
            };
            let evaluated = self
                .pipeline
                .evaluate_in(partition.number, batch, clock_ms)
                .await;
            match evaluated {
                Err(Unevaluated::HostMemory { plugin, reason }) => {
                    self.readiness.set_for(
                        "host-memory",
                        format!("plugin '{plugin}': {reason}; events wait"),
                        HOST_MEMORY_SHOWN_FOR,
                    );
                    if !is_noted {
                        return Err(Unevaluated::HostMemory { plugin, reason });
                    }
                    tokio::time::sleep(LONGEST_PAUSE).await;
                }
                evaluations => break evaluations?,
            }
        };
        let mut evaluations = evaluations.into_iter();
        let mut items = Vec::with_capacity(entries.len());
        for (entry, refused) in entries.iter().zip(refused) {
            items.push(match refused {
                Some(item) => item,
                None => match evaluations.next() {
                    Some(evaluation) => {
                        let mut decision =
                            decision_about(&evaluation.event, evaluation.verdicts, clock_ms);
                        chain_notes.note(&evaluation.chain, &mut decision);
                        self.item(entry, evaluation.event, evaluation.resolution, decision)
                    }
                    // The pipeline returns one evaluation for each event; should one be missing,
                    // the event is kept as a dead letter, not lost.
                    None => dead_letter(
                        entry,
                        "the pipeline returned no result".into(),
                        None,
                        1,
                        unevaluated(partition, entry, clock_ms),
                    ),
                },
            });
        }
        Ok(items)
    }

    /// Parses the event of an entry. The error is the reason for the dead letter.
    fn event(&self, partition: &Partition, entry: &Entry, clock_ms: u64) -> Result<Event, String> {
        if let Some(size) = entry.oversized {
            return Err(oversized(size, self.config.max_event_bytes));
        }
        let n_bytes: usize = entry
            .fields
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum();
        let most = self.config.max_event_bytes;
        if n_bytes > most {
            return Err(format!(
                "the event has {n_bytes} bytes; the limit is {most} ([ingest] max_event_bytes)"
            ));
        }
        let time_ms = entry.id.time_ms(clock_ms);
        let event = Event::from_fields_at(entry.id, time_ms, &partition.source, &entry.fields)
            .map_err(|e| e.to_string())?;
        warn_of_quotes(&partition.source, &event);
        Ok(event)
    }

    /// Turns an evaluation into an item to commit.
    fn item(
        &self,
        entry: &Entry,
        event: Event,
        resolution: Resolution,
        mut decision: Decision,
    ) -> Item {
        let dedupe = event.id_given.then(|| dedupe_key(&event));
        let proposal = match resolution {
            Resolution::Planned(plan) => {
                let slots = plan.slots();
                let name = |slot: &Option<&Name>| slot.map(ToString::to_string).unwrap_or_default();
                if slots.len() > 1 {
                    decision.slots = slots.iter().map(name).collect();
                }
                match commit_proposal(entry.id, event, plan, &decision) {
                    Ok(proposal) => proposal,
                    Err(reason) => {
                        decision.slots.clear();
                        return dead_letter(entry, reason, None, 1, decision);
                    }
                }
            }
            Resolution::Discarded { .. } => Proposal::Discard,
            Resolution::Unrouted => Proposal::Unrouted,
            Resolution::Failed {
                plugin,
                reason,
                attempts,
                retry,
            } => {
                let mut item = dead_letter(entry, reason, Some(plugin), attempts, decision);
                if retry && let Proposal::DeadLetter(why) = item.proposal {
                    item.proposal = Proposal::Retry(why, self.retry_policy());
                }
                return item;
            }
        };
        Item {
            entry: entry.id,
            dedupe,
            proposal,
            decision,
        }
    }

    fn retry_policy(&self) -> RetryPolicy {
        RetryPolicy {
            retries: self.config.retries,
            timeout: self.config.retry_timeout,
        }
    }

    /// Commits evaluated batches in order, in steps that fit one commit.
    async fn commit(
        &self,
        partition: &Partition,
        epoch: Epoch,
        mut prev: Position,
        mut batches: mpsc::Receiver<EvaluatedBatch>,
        progress: &Progress,
    ) -> Stop {
        while let Some(EvaluatedBatch {
            items,
            n_withdrawals,
        }) = batches.recv().await
        {
            let mut items = items.into_iter().peekable();
            while let Some(first) = items.next() {
                if let Err(stop) = self.check_still_valid(partition.number, n_withdrawals) {
                    return stop;
                }
                let mut n_items = 1;
                let next = if n_targets(&first) > MAX_INDEX_ENTRIES {
                    let entry = first.entry;
                    self.commit_sliced_from(partition.number, epoch, prev, first, 0)
                        .await
                        .map(|()| entry)
                } else {
                    let mut step = vec![first];
                    let (mut n_entries, mut n_bytes) = (n_targets(&step[0]), n_bytes(&step[0]));
                    while let Some(item) = items.next_if(|item| {
                        n_entries + n_targets(item) <= MAX_INDEX_ENTRIES
                            && n_bytes + self::n_bytes(item) <= MAX_COMMIT_BYTES
                    }) {
                        n_entries += n_targets(&item);
                        n_bytes += self::n_bytes(&item);
                        step.push(item);
                        n_items += 1;
                    }
                    self.commit_step(partition.number, epoch, prev, step).await
                };
                match next {
                    Ok(entry) => prev = entry.into(),
                    Err(stop) => return stop,
                }
                progress.done(n_items);
            }
        }
        Stop::Shutdown
    }

    /// Checks that what was evaluated may still be committed: a version that was withdrawn must not
    /// decide any more, and a node that was stopped meanwhile does not know whether one was.
    fn check_still_valid(
        &self,
        partition: PartitionNumber,
        n_withdrawals: u64,
    ) -> Result<(), Stop> {
        let registry = self.pipeline.registry();
        if !registry.has_confirmed_rollouts() {
            return Err(Stop::MissingPlugins(MissingPlugins::Unconfirmed));
        }
        if registry.n_withdrawals() != n_withdrawals {
            tracing::info!(
                partition = partition.0,
                "a rolled-out version was withdrawn; evaluating again"
            );
            return Err(Stop::Conflict);
        }
        Ok(())
    }

    async fn commit_step(
        &self,
        partition: PartitionNumber,
        epoch: Epoch,
        prev: Position,
        items: Vec<Item>,
    ) -> Result<EntryId, Stop> {
        let last = items.last().map_or(prev.entry, |item| item.entry);
        match self
            .broker
            .commit(partition, Batch { epoch, prev, items })
            .await?
        {
            CommitResult::Done(outcomes) => {
                for (outcome, _) in outcomes {
                    self.count(outcome);
                }
                Ok(last)
            }
            CommitResult::Conflict => Err(Stop::Conflict),
        }
    }

    async fn commit_sliced(
        &self,
        partition: PartitionNumber,
        epoch: Epoch,
        item: Item,
        slices: u32,
    ) -> Result<(), Stop> {
        let prev = Position {
            entry: item.entry,
            slices,
        };
        self.commit_sliced_from(partition, epoch, prev, item, slices)
            .await
    }

    /// Commits a large plan slice by slice, starting at slice `from`.
    async fn commit_sliced_from(
        &self,
        partition: PartitionNumber,
        epoch: Epoch,
        mut prev: Position,
        item: Item,
        from: u32,
    ) -> Result<(), Stop> {
        let Proposal::Commit(notifications) = &item.proposal else {
            return Ok(());
        };
        let n_slices = n_targets(&item).div_ceil(MAX_INDEX_ENTRIES) as u32;
        for index in from..n_slices {
            let proposal = Proposal::Commit(slice_of(notifications, index));
            let is_last = index + 1 == n_slices;
            let slice = Slice {
                epoch,
                prev,
                item: Item {
                    proposal,
                    ..item.clone()
                },
                index,
                is_last,
            };
            match self.broker.commit_slice(partition, slice).await? {
                CommitResult::Conflict => return Err(Stop::Conflict),
                CommitResult::Done(outcomes) => match outcomes.first() {
                    // Only the first slice can detect this: the plan ends here.
                    Some(&(outcome, _)) if outcome != Outcome::Committed => {
                        self.count(outcome);
                        return Ok(());
                    }
                    _ if is_last => self.count(Outcome::Committed),
                    _ => {}
                },
            }
            prev = Position {
                entry: item.entry,
                slices: index + 1,
            };
        }
        Ok(())
    }

    fn count(&self, outcome: Outcome) {
        self.metrics
            .events
            .get_or_create(&OutcomeLabel {
                outcome: outcome.as_str(),
            })
            .inc();
    }
}
