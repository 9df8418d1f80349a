//! The pipeline: folds the ordered chain of plugins into one resolution per event. Filters run
//! until one drops the event, then all routers run and their routes are combined.
//!
//! A batch is split among the threads of `pool` and returned in its order. Every event gets an
//! evaluation, whatever the plugins do (`evaluate`): a plugin that fails is called once more on a
//! fresh instance, and then its failure policy applies (`policy`). A batch is evaluated by one
//! generation of each plugin, even if plugins are swapped meanwhile.
//!
//! Committing an evaluation is in `ingest::worker`; plugins are in `plugin`.

mod evaluate;
mod policy;
mod pool;

use std::sync::Arc;

use tokio::sync::{Semaphore, watch};

pub use self::evaluate::DryRunner;
pub(crate) use self::evaluate::published_priority;

use self::evaluate::unrouted;
use self::pool::{Job, Pool};
use crate::event::{Event, Name, PartitionNumber, Plan, Priority, Verdict};
use crate::plugin::registry::generation::{Chain, ChainIdentity};
use crate::plugin::registry::rollout::Incomplete;
use crate::plugin::registry::{Registry, Snapshot};
use crate::telemetry::metrics::Metrics;

/// The minimum number of events per share: handing a share over costs as much as a few calls.
const MIN_SHARE: usize = 4;

/// The outcome of one event.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// As amended by filters. If the event failed, as published, so that it can be retried.
    pub event: Event,
    /// As set by filters, or as published.
    pub priority: Priority,
    pub resolution: Resolution,
    /// In order. Those of a dry run include the plugins that were skipped because their types did
    /// not match.
    pub verdicts: Vec<Verdict>,
    /// The plugins that evaluated it.
    pub chain: Arc<ChainIdentity>,
}

#[derive(Clone, Debug)]
pub enum Resolution {
    /// With at least one route.
    Planned(Plan),
    Discarded {
        plugin: String,
        reason: String,
    },
    /// No router returned a route.
    Unrouted,
    Failed {
        plugin: String,
        reason: String,
        attempts: u32,
        /// The plugin requested a retry. Otherwise the event is to be dead-lettered at once.
        retry: bool,
    },
}

/// Why events wait for plugins.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MissingPlugins {
    /// No plugin is active and the operator did not allow that: every event would be unrouted
    /// permanently.
    #[error("no plugins loaded, so events wait")]
    All,
    /// These plugins have no active version: events that they would drop or route would be decided
    /// without them permanently.
    #[error("no active version of the plugin {}, so events wait", .0.join(" and of "))]
    Named(Vec<String>),
    /// Versions that decided in this partition before the node started are being loaded.
    #[error("the version of the roll-out of the plugin {} is being loaded, so events wait", .0.join(" and of "))]
    RolledOut(Vec<String>),
    /// The roll-outs of plugins may have changed since they were last read.
    #[error("the roll-outs of plugins were not read in time, so events wait")]
    Unconfirmed,
}

impl From<Incomplete> for MissingPlugins {
    fn from(incomplete: Incomplete) -> Self {
        match incomplete {
            Incomplete::Plugins(names) => Self::Named(names),
            Incomplete::Rollouts(names) => Self::RolledOut(names),
            Incomplete::Unconfirmed => Self::Unconfirmed,
        }
    }
}

/// Why events wait instead of being evaluated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unevaluated {
    #[error(transparent)]
    Missing(#[from] MissingPlugins),
    /// There is no memory for an instance of this plugin. Some events may have been evaluated; that
    /// is to be repeated.
    #[error("plugin '{plugin}': {reason}")]
    HostMemory { plugin: Name, reason: String },
}

/// A handle: clones share the threads, which end when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct Pipeline(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    registry: Arc<Registry>,
    allow_none: bool,
    pool: Pool,
    /// Holds one permit: the turn of a dry run.
    dry_runs: Arc<Semaphore>,
}

impl Pipeline {
    /// Starts the threads. `allow_none`: without a plugin, every event is unrouted instead of none
    /// being evaluated.
    ///
    /// # Errors
    /// The system cannot start a thread.
    pub fn start(
        registry: Arc<Registry>,
        allow_none: bool,
        metrics: Metrics,
    ) -> std::io::Result<Self> {
        Ok(Self(Arc::new(Shared {
            pool: Pool::start(&registry, &metrics)?,
            registry,
            allow_none,
            dry_runs: Arc::new(Semaphore::new(1)),
        })))
    }

    /// Evaluates a batch with the same generation of each plugin, and returns one evaluation per
    /// event, in order. These evaluations have an effect: they count towards the health of plugins
    /// and are offered to shadow candidates.
    ///
    /// `clock_ms`: the clock shown to plugins, in milliseconds since the Unix epoch; a time to live
    /// counts from it.
    ///
    /// Cancel-safe: events already handed over are evaluated and their evaluations discarded.
    ///
    /// # Errors
    /// [`Unevaluated`]: the events wait.
    pub async fn evaluate(
        &self,
        events: Vec<Event>,
        clock_ms: u64,
    ) -> Result<Vec<Evaluation>, Unevaluated> {
        let chain = self.chain()?;
        self.evaluate_on(&chain, events, clock_ms).await
    }

    /// Like [`Pipeline::evaluate`], for events of this partition: a version that is being rolled out
    /// may decide in some partitions only.
    ///
    /// Cancel-safe, as [`Pipeline::evaluate`].
    ///
    /// # Errors
    /// As for [`Pipeline::evaluate`].
    pub async fn evaluate_in(
        &self,
        partition: PartitionNumber,
        events: Vec<Event>,
        clock_ms: u64,
    ) -> Result<Vec<Evaluation>, Unevaluated> {
        let chain = self.chain_of(partition)?;
        self.evaluate_on(&chain, events, clock_ms).await
    }

    async fn evaluate_on(
        &self,
        chain: &Arc<Chain>,
        events: Vec<Event>,
        clock_ms: u64,
    ) -> Result<Vec<Evaluation>, Unevaluated> {
        if chain.is_empty() {
            return Ok(events.into_iter().map(unrouted).collect());
        }
        let mut evaluations = Vec::with_capacity(events.len());
        let share = events
            .len()
            .div_ceil(self.0.pool.n_threads())
            .max(MIN_SHARE);
        let mut answers = Vec::new();
        let mut events = events.into_iter();
        while events.len() > 0 {
            let job = Job {
                chain: Arc::clone(chain),
                events: events.by_ref().take(share).collect(),
                clock_ms,
                dry_run: None,
            };
            answers.push(self.0.pool.submit(job).await);
        }
        // All are awaited, so that no share of these events is evaluated beside a repetition.
        let mut lacking = None;
        for answer in answers {
            match answer
                .await
                .expect("a worker outlives its panics and answers every job")
            {
                Ok(share) => evaluations.extend(share),
                Err(reason) => lacking = Some(reason),
            }
        }
        if let Some(reason) = lacking {
            self.0.pool.release_all_instances();
            return Err(reason);
        }
        Ok(evaluations)
    }

    /// Dry-run variant of [`Pipeline::evaluate`]. Dry runs are serialised across callers, one event
    /// at a time, so that they cannot starve live events, however many and slow they are.
    ///
    /// Cancel-safe: at most one event is still evaluated.
    ///
    /// # Errors
    /// As for [`Pipeline::evaluate`].
    pub async fn dry_run(
        &self,
        events: Vec<Event>,
        clock_ms: u64,
    ) -> Result<Vec<Evaluation>, Unevaluated> {
        let chain = self.chain()?;
        if chain.is_empty() {
            return Ok(events.into_iter().map(unrouted).collect());
        }
        let mut evaluations = Vec::with_capacity(events.len());
        for event in events {
            let turn = Arc::clone(&self.0.dry_runs)
                .acquire_owned()
                .await
                .expect("the semaphore is never closed");
            let job = Job {
                chain: Arc::clone(&chain),
                events: vec![event],
                clock_ms,
                dry_run: Some(turn),
            };
            let answer = self.0.pool.submit(job).await;
            evaluations.extend(
                answer
                    .await
                    .expect("a worker outlives its panics and answers every job")?,
            );
        }
        Ok(evaluations)
    }

    fn chain(&self) -> Result<Arc<Chain>, MissingPlugins> {
        let chain = self.0.registry.complete_chain();
        self.usable(chain.map_err(MissingPlugins::Named)?)
    }

    fn chain_of(&self, partition: PartitionNumber) -> Result<Arc<Chain>, MissingPlugins> {
        self.usable(self.0.registry.complete_chain_of(partition)?)
    }

    /// The chain, if events can be evaluated by it.
    fn usable(&self, chain: Arc<Chain>) -> Result<Arc<Chain>, MissingPlugins> {
        if chain.is_empty() && !self.0.allow_none {
            return Err(MissingPlugins::All);
        }
        Ok(chain)
    }

    /// Whether events of this partition can be decided now.
    ///
    /// # Errors
    /// The missing part.
    pub fn check(&self, partition: PartitionNumber) -> Result<(), MissingPlugins> {
        self.chain_of(partition).map(drop)
    }

    /// Waits until events of this partition can be decided. Cancel-safe.
    pub async fn can_work(&self, partition: PartitionNumber) {
        self.becomes(partition, true).await;
    }

    /// Waits until no event of this partition can be decided for lack of a plugin. Cancel-safe.
    pub async fn cannot_work(&self, partition: PartitionNumber) {
        self.becomes(partition, false).await;
    }

    async fn becomes(&self, partition: PartitionNumber, able: bool) {
        let mut changes = self.changes();
        let mut confirmations = self.0.registry.confirmations();
        loop {
            // Before the check: what changes after it is waited for.
            changes.mark_unchanged();
            confirmations.mark_unchanged();
            if self.check(partition).is_ok() == able {
                return;
            }
            // Cannot fail: the senders are in the registry, which lives as long as this handle.
            tokio::select! {
                changed = changes.changed() => drop(changed),
                changed = confirmations.changed() => drop(changed),
            }
        }
    }

    pub fn registry(&self) -> &Arc<Registry> {
        &self.0.registry
    }

    /// The published plugins, as they change.
    pub fn changes(&self) -> watch::Receiver<Snapshot> {
        self.0.registry.changes()
    }

    /// Whether the operator allowed running without plugins.
    pub fn allows_none(&self) -> bool {
        self.0.allow_none
    }

    /// Makes idle threads release their instances of plugins that are no longer active; busy
    /// threads do so after each job.
    pub fn release_retired_instances(&self) {
        self.0.pool.release_retired_instances();
    }
}
