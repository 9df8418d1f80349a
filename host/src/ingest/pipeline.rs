//! The pipeline: folds the ordered chain of plugins into one resolution per event. Filters run
//! until one drops the event, then all routers run and their routes are combined.
//!
//! Plugins run on a few dedicated OS threads, never on an async executor; a batch is split among
//! the threads and returned in its order. Every event gets an evaluation, whatever the plugins do:
//! a plugin that fails is called once more on a fresh instance, and then its failure policy
//! applies. A batch is evaluated by one generation of each plugin, even if plugins are swapped
//! meanwhile, and every thread, busy or idle, releases its instances of generations that were
//! swapped out.
//!
//! Committing an evaluation is in `ingest`; plugins are in `plugin`.

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Instant;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};

use crate::event::{Event, Name, Plan, Priority, Value, Verdict};
use crate::plugin::registry::generation::{Chain, Generation};
use crate::plugin::registry::health::{Health, Permit, Transition};
use crate::plugin::registry::settings::OnFailure;
use crate::plugin::registry::{Registry, Snapshot};
use crate::plugin::shadow::outcome::PluginDecision;
use crate::plugin::{
    ATTEMPTS, Answer, Call, CallError, Engine, Instance, ParsedPayload, Role, Ticking,
};
use crate::telemetry::metrics::{Metrics, PluginCallLabel, PluginLabel};

/// The maximum number of batch shares that wait for a thread; further callers wait their turn.
const MAX_WAITING: usize = 256;
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
    /// In order, including those of plugins that were skipped because their types did not match.
    pub verdicts: Vec<Verdict>,
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
        /// The plugin requested a retry. Otherwise the event is to be dead-lettered.
        retry: bool,
    },
}

/// No plugin is active and the operator did not allow that: every event would be unrouted
/// permanently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no plugins loaded, so events wait")]
pub struct NoPlugins;

/// A handle: clones share the threads, which end when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct Pipeline(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    registry: Arc<Registry>,
    allow_none: bool,
    queue: Arc<Queue>,
    /// Bounds [`Queue`].
    waiting: Arc<Semaphore>,
    /// Holds one permit: the turn of a dry run.
    trying: Arc<Semaphore>,
    n_workers: usize,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.queue
            .jobs
            .lock()
            .expect("no panic under this lock")
            .is_closed = true;
        self.queue.is_ready.notify_all();
    }
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
        let queue = Arc::new(Queue::default());
        let n_workers = Engine::n_workers();
        let waiting = Arc::new(Semaphore::new(MAX_WAITING));
        let trying = Arc::new(Semaphore::new(1));
        let shared = Shared {
            registry,
            allow_none,
            queue: Arc::clone(&queue),
            waiting,
            trying,
            n_workers,
        };
        for n in 0..n_workers {
            let mut worker = Worker::new(Arc::clone(&shared.registry), metrics.clone());
            let queue = Arc::clone(&queue);
            thread::Builder::new()
                .name(format!("plugins-{n}"))
                .spawn(move || worker.work(&queue))?;
        }
        Ok(Self(Arc::new(shared)))
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
    /// [`NoPlugins`]: nothing was evaluated.
    pub async fn evaluate(
        &self,
        events: Vec<Event>,
        clock_ms: u64,
    ) -> Result<Vec<Evaluation>, NoPlugins> {
        let chain = self.able_chain()?;
        if chain.is_empty() {
            return Ok(events.into_iter().map(unrouted).collect());
        }
        let mut evaluations = Vec::with_capacity(events.len());
        let share = events.len().div_ceil(self.0.n_workers).max(MIN_SHARE);
        let mut answers = Vec::new();
        let mut events = events.into_iter();
        while events.len() > 0 {
            answers.push(
                self.hand_over(
                    &chain,
                    events.by_ref().take(share).collect(),
                    clock_ms,
                    None,
                )
                .await,
            );
        }
        for answer in answers {
            evaluations.extend(
                answer
                    .await
                    .expect("a worker outlives its panics and answers every job"),
            );
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
    ) -> Result<Vec<Evaluation>, NoPlugins> {
        let chain = self.able_chain()?;
        if chain.is_empty() {
            return Ok(events.into_iter().map(unrouted).collect());
        }
        let mut evaluations = Vec::with_capacity(events.len());
        for event in events {
            let turn = Arc::clone(&self.0.trying)
                .acquire_owned()
                .await
                .expect("the semaphore is never closed");
            let answer = self
                .hand_over(&chain, vec![event], clock_ms, Some(turn))
                .await;
            evaluations.extend(
                answer
                    .await
                    .expect("a worker outlives its panics and answers every job"),
            );
        }
        Ok(evaluations)
    }

    fn able_chain(&self) -> Result<Arc<Chain>, NoPlugins> {
        let chain = self.0.registry.chain();
        if self.can_work_on(&chain) {
            Ok(chain)
        } else {
            Err(NoPlugins)
        }
    }

    /// `trial`: the turn of a dry run, held until the share is evaluated; `None` for live events.
    async fn hand_over(
        &self,
        chain: &Arc<Chain>,
        events: Vec<Event>,
        clock_ms: u64,
        trial: Option<OwnedSemaphorePermit>,
    ) -> oneshot::Receiver<Vec<Evaluation>> {
        let (answer, answered) = oneshot::channel();
        let permit = Arc::clone(&self.0.waiting)
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        self.0.queue.push(Job {
            chain: Arc::clone(chain),
            events,
            clock_ms,
            trial,
            answer,
            _permit: permit,
        });
        answered
    }

    fn can_work_on(&self, chain: &Chain) -> bool {
        self.0.allow_none || !chain.is_empty()
    }

    /// Waits until events can be evaluated. Cancel-safe.
    pub async fn can_work(&self) {
        self.becomes(true).await;
    }

    /// Waits until no event can be evaluated because there is no plugin. Cancel-safe.
    pub async fn cannot_work(&self) {
        self.becomes(false).await;
    }

    async fn becomes(&self, able: bool) {
        let mut changes = self.changes();
        // Cannot fail: the sender is in the registry, which epochs as long as this handle.
        drop(
            changes
                .wait_for(|now| self.can_work_on(&now.chain) == able)
                .await,
        );
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
    pub fn give_back_retired(&self) {
        self.0
            .queue
            .jobs
            .lock()
            .expect("no panic under this lock")
            .n_calls_to_give_back += 1;
        self.0.queue.is_ready.notify_all();
    }
}

/// A share of a batch.
#[derive(Debug)]
struct Job {
    chain: Arc<Chain>,
    events: Vec<Event>,
    clock_ms: u64,
    /// `None` for live events. A dry run holds its turn until it is done, so that the next one
    /// waits.
    trial: Option<OwnedSemaphorePermit>,
    answer: oneshot::Sender<Vec<Evaluation>>,
    _permit: OwnedSemaphorePermit,
}

/// The shared queue of jobs: any free thread takes the next one, so no job waits behind a plugin
/// that loops.
#[derive(Debug, Default)]
struct Queue {
    jobs: Mutex<Jobs>,
    is_ready: Condvar,
}

#[derive(Debug, Default)]
struct Jobs {
    waiting: VecDeque<Job>,
    is_closed: bool,
    /// A counter and not a flag, because every thread must see each request.
    n_calls_to_give_back: u64,
}

/// The next task of a thread.
enum Task {
    Evaluate(Job),
    GiveBack,
}

impl Queue {
    fn push(&self, job: Job) {
        self.jobs
            .lock()
            .expect("no panic under this lock")
            .waiting
            .push_back(job);
        self.is_ready.notify_one();
    }

    /// `n_heard`: the requests to release instances that this thread has seen. `None`: the queue is
    /// closed and empty.
    fn pop(&self, n_heard: &mut u64) -> Option<Task> {
        let mut jobs = self.jobs.lock().expect("no panic under this lock");
        loop {
            if let Some(job) = jobs.waiting.pop_front() {
                return Some(Task::Evaluate(job));
            }
            if *n_heard != jobs.n_calls_to_give_back {
                *n_heard = jobs.n_calls_to_give_back;
                return Some(Task::GiveBack);
            }
            if jobs.is_closed {
                return None;
            }
            jobs = self.is_ready.wait(jobs).expect("no panic under this lock");
        }
    }
}

/// One thread with its plugin instances.
#[derive(Debug)]
struct Worker {
    registry: Arc<Registry>,
    metrics: Metrics,
    /// The chain that the instances belong to.
    chain: Arc<Chain>,
    /// By plugin name and generation. An instance that is in a call is not in the map.
    instances: HashMap<(Name, u64), Instance>,
    /// The number of instances included in the metric.
    n_counted: i64,
    /// Whether the current evaluation has an effect, that is, is not a dry run.
    is_live: bool,
}

impl Worker {
    fn new(registry: Arc<Registry>, metrics: Metrics) -> Self {
        Self {
            registry,
            metrics,
            chain: Arc::default(),
            instances: HashMap::new(),
            n_counted: 0,
            is_live: false,
        }
    }

    fn work(&mut self, queue: &Queue) {
        let mut n_heard = 0;
        while let Some(task) = queue.pop(&mut n_heard) {
            if let Task::Evaluate(Job {
                chain,
                events,
                clock_ms,
                trial,
                answer,
                _permit,
            }) = task
            {
                self.keep_only(&chain);
                self.is_live = trial.is_none();
                let ticking = self.registry.engine().ticking();
                let evaluations = events
                    .into_iter()
                    .map(|event| self.evaluate(&chain, event, clock_ms, &ticking))
                    .collect();
                // The receiver is gone if the caller was cancelled.
                drop(answer.send(evaluations));
            }
            // The chain may have been swapped during the job, and the next job may be far off.
            self.keep_only(&self.registry.chain());
            let n_instances = self.instances.len() as i64;
            self.metrics
                .plugin_instances
                .inc_by(n_instances - self.n_counted);
            self.n_counted = n_instances;
        }
    }

    /// Drops instances that do not belong to this chain.
    fn keep_only(&mut self, chain: &Arc<Chain>) {
        if !Arc::ptr_eq(&self.chain, chain) {
            self.instances
                .retain(|(name, number), _| chain.has(name, *number));
            self.chain = Arc::clone(chain);
        }
    }

    /// Survives a panic of the host that a plugin provoked: the event fails and all instances are
    /// discarded.
    fn evaluate(
        &mut self,
        chain: &Chain,
        event: Event,
        clock_ms: u64,
        ticking: &Ticking,
    ) -> Evaluation {
        let mut verdicts = Vec::with_capacity(chain.filters.len() + chain.routers.len());
        let folded = catch_unwind(AssertUnwindSafe(|| {
            self.fold(chain, &event, &mut verdicts, clock_ms, ticking)
        }));
        let Folded {
            amended,
            priority,
            resolution,
        } = folded.unwrap_or_else(|panic| {
            self.instances.clear();
            let said = said(panic.as_ref());
            tracing::error!(
                event.id = event.id.as_str(),
                "the host panicked while evaluating an event: {said}"
            );
            let reason = format!("the host panicked: {said}");
            Folded::as_published(
                &event,
                Resolution::Failed {
                    plugin: String::new(),
                    reason,
                    attempts: 1,
                    retry: false,
                },
            )
        });
        Evaluation {
            event: amended.unwrap_or(event),
            priority,
            resolution,
            verdicts,
        }
    }

    fn fold(
        &mut self,
        chain: &Chain,
        event: &Event,
        verdicts: &mut Vec<Verdict>,
        clock_ms: u64,
        ticking: &Ticking,
    ) -> Folded {
        let payload = ParsedPayload::default();
        let mut folded = Folded::as_published(event, Resolution::Unrouted);
        for generation in &chain.filters {
            match self.ask(
                generation,
                Role::Filter,
                &folded.call(event, clock_ms, &payload),
                verdicts,
                ticking,
            ) {
                StepOutcome::Answered(Answer::Amend(answer)) => {
                    folded.priority = answer.priority.unwrap_or(folded.priority);
                    folded.amended = Some(answer.event);
                }
                StepOutcome::Answered(Answer::Drop(reason)) => {
                    folded.resolution = Resolution::Discarded {
                        plugin: generation.plugin.name().to_string(),
                        reason,
                    };
                    return folded;
                }
                StepOutcome::Answered(Answer::Keep | Answer::Routes(_)) | StepOutcome::Passed => {}
                StepOutcome::Over(resolution) => return Folded::as_published(event, resolution),
            }
        }
        let mut plan = Plan::default();
        for generation in &chain.routers {
            match self.ask(
                generation,
                Role::Router,
                &folded.call(event, clock_ms, &payload),
                verdicts,
                ticking,
            ) {
                StepOutcome::Answered(Answer::Routes(answered)) => {
                    plan.routes.extend(answered.routes)
                }
                StepOutcome::Answered(Answer::Keep | Answer::Drop(_) | Answer::Amend(_))
                | StepOutcome::Passed => {}
                StepOutcome::Over(resolution) => return Folded::as_published(event, resolution),
            }
        }
        if !plan.routes.is_empty() {
            folded.resolution = Resolution::Planned(plan);
        }
        folded
    }

    /// Calls one plugin, unless its types do not match or its breaker is open, and offers the call
    /// to its shadow candidate.
    fn ask(
        &mut self,
        generation: &Generation,
        role: Role,
        call: &Call<'_>,
        verdicts: &mut Vec<Verdict>,
        ticking: &Ticking,
    ) -> StepOutcome {
        let asked = if !generation.plugin.wants(&call.event.kind) {
            verdicts.push(verdict(generation, "skipped", ""));
            StepOutcome::Passed
        } else {
            if self.is_live
                && let Permit::Rejected(why) = generation.health(role).admit(Instant::now())
            {
                let reason = why.to_string();
                verdicts.push(verdict(generation, "failed", &reason));
                // Not offered to a candidate: there is no decision to compare.
                return settle(generation, reason, 0);
            }
            self.have_decided(generation, role, call, verdicts, ticking)
        };
        if self.is_live
            && let Some(shadow) = self.registry.shadows().of(generation.plugin.name())
        {
            shadow.offer(generation.number, role, call, || {
                asked.decided(role, call, verdicts.last())
            });
        }
        asked
    }

    /// Calls one plugin, once more if it fails, and applies its policy if it fails again.
    fn have_decided(
        &mut self,
        generation: &Generation,
        role: Role,
        call: &Call<'_>,
        verdicts: &mut Vec<Verdict>,
        ticking: &Ticking,
    ) -> StepOutcome {
        let plugin = &generation.plugin;
        let mut note = |word: &str, reason: &str| verdicts.push(verdict(generation, word, reason));
        let mut attempts = 0;
        let error = loop {
            attempts += 1;
            match self.call(generation, role, call, ticking) {
                Ok(answer) => {
                    self.follow(generation, role, Health::note_answer);
                    match &answer {
                        Answer::Keep => note("keep", ""),
                        Answer::Drop(reason) => note("drop", reason),
                        Answer::Amend(_) => note("amend", ""),
                        Answer::Routes(plan) if plan.routes.is_empty() => note("none", ""),
                        Answer::Routes(_) => note("routes", ""),
                    }
                    return StepOutcome::Answered(answer);
                }
                Err(error) if error.is_verdict() => {
                    tracing::info!(
                        plugin.name = plugin.name().as_str(),
                        event.id = call.event.id.as_str(),
                        verdict = error.kind(),
                        "plugin did not decide: {error}"
                    );
                    note(error.kind(), &error.to_string());
                    break error;
                }
                Err(error) => {
                    tracing::warn!(
                        plugin.name = plugin.name().as_str(),
                        event.id = call.event.id.as_str(),
                        attempt = attempts,
                        kind = error.kind(),
                        "plugin failed: {error}"
                    );
                    if attempts == ATTEMPTS {
                        note("failed", &error.to_string());
                        break error;
                    }
                }
            }
        };
        let reason = error.to_string();
        let plugin = plugin.name().to_string();
        match error {
            // A verdict on the event; the policy is only for plugins that do not work.
            CallError::Rejected(_) | CallError::Retry(_) => {
                self.follow(generation, role, Health::note_answer);
                StepOutcome::Over(Resolution::Failed {
                    plugin,
                    reason,
                    attempts,
                    retry: matches!(error, CallError::Retry(_)),
                })
            }
            CallError::Deadline(_)
            | CallError::Memory(_)
            | CallError::Trap(_)
            | CallError::InvalidOutput(_) => {
                self.follow(generation, role, |health| {
                    health.note_failure(Instant::now())
                });
                settle(generation, reason, attempts)
            }
        }
    }

    /// Records a result in the plugin's health and applies the consequence.
    fn follow(
        &self,
        generation: &Generation,
        role: Role,
        note: impl FnOnce(&Health) -> Transition,
    ) {
        if self.is_live {
            self.registry
                .follow(generation, note(generation.health(role)));
        }
    }

    fn call(
        &mut self,
        generation: &Generation,
        role: Role,
        call: &Call<'_>,
        ticking: &Ticking,
    ) -> Result<Answer, CallError> {
        let plugin = &generation.plugin;
        let key = (plugin.name().clone(), generation.number);
        // Removed for the duration of the call: if the host panics, the instance is dropped by
        // unwinding and not reused.
        let mut slot = self.instances.remove(&key);
        let began = Instant::now();
        let answer = plugin.call(&mut slot, ticking, role, call);
        let label = PluginLabel {
            plugin: plugin.name().to_string(),
        };
        self.metrics
            .plugin_call_duration
            .get_or_create(&label)
            .observe(began.elapsed().as_secs_f64());
        let outcome = answer.as_ref().map_or_else(CallError::kind, |_| "ok");
        self.metrics
            .plugin_calls
            .get_or_create(&PluginCallLabel {
                plugin: label.plugin,
                outcome,
            })
            .inc();
        if let Some(instance) = slot {
            self.instances.insert(key, instance);
        }
        answer
    }
}

/// The state of an event on its way through the chain.
struct Folded {
    /// `None`: no filter changed it.
    amended: Option<Event>,
    priority: Priority,
    resolution: Resolution,
}

impl Folded {
    fn as_published(event: &Event, resolution: Resolution) -> Self {
        Self {
            amended: None,
            priority: published_priority(event),
            resolution,
        }
    }

    /// The call for the next plugin.
    fn call<'a>(
        &'a self,
        published: &'a Event,
        clock_ms: u64,
        payload: &'a ParsedPayload,
    ) -> Call<'a> {
        Call {
            event: self.amended.as_ref().unwrap_or(published),
            priority: self.priority,
            clock_ms,
            payload,
        }
    }
}

fn verdict(Generation { plugin, number, .. }: &Generation, word: &str, reason: &str) -> Verdict {
    let hash = plugin.hash().get(..12).unwrap_or_default().to_owned();
    Verdict {
        plugin: plugin.name().to_string(),
        generation: *number,
        hash,
        verdict: word.to_owned(),
        reason: reason.to_owned(),
    }
}

/// Applies the failure policy to an event that a plugin failed on.
fn settle(generation: &Generation, reason: String, attempts: u32) -> StepOutcome {
    let plugin = generation.plugin.name().to_string();
    match generation.settings.on_failure {
        OnFailure::DeadLetter => StepOutcome::Over(Resolution::Failed {
            plugin,
            reason,
            attempts,
            retry: false,
        }),
        OnFailure::Skip => StepOutcome::Passed,
        OnFailure::Drop => StepOutcome::Over(Resolution::Discarded {
            plugin,
            reason: format!("the plugin failed: {reason}"),
        }),
    }
}

/// The outcome of calling one plugin.
enum StepOutcome {
    Answered(Answer),
    /// The plugin does not affect this event.
    Passed,
    /// The event is resolved; no other plugin is called.
    Over(Resolution),
}

impl StepOutcome {
    /// The plugin's decision about this call. `verdict`: the one recorded for it.
    fn decided(&self, role: Role, call: &Call<'_>, verdict: Option<&Verdict>) -> PluginDecision {
        match (self, verdict) {
            (Self::Answered(answer), _) => PluginDecision::of_answer(answer, call),
            (_, Some(verdict))
                if ["rejected", "retry", "failed"].contains(&verdict.verdict.as_str()) =>
            {
                PluginDecision::Failed {
                    reason: verdict.reason.clone(),
                }
            }
            _ => PluginDecision::nothing(role),
        }
    }
}

/// Evaluates events on the caller's thread without any effect: with instances of its own, not
/// counted in metrics or health.
#[derive(Debug)]
pub struct DryRunner(Worker);

impl DryRunner {
    pub fn new(registry: Arc<Registry>) -> Self {
        Self(Worker::new(registry, Metrics::default()))
    }

    /// Evaluates one event by any chain. Takes as long as the plugins may run: not for an async
    /// thread.
    pub fn evaluate(&mut self, chain: &Arc<Chain>, event: Event, clock_ms: u64) -> Evaluation {
        let ticking = self.0.registry.engine().ticking();
        self.0.keep_only(chain);
        self.0.evaluate(chain, event, clock_ms, &ticking)
    }
}

/// The evaluation of an event when there are no plugins.
fn unrouted(event: Event) -> Evaluation {
    let priority = published_priority(&event);
    Evaluation {
        event,
        priority,
        resolution: Resolution::Unrouted,
        verdicts: Vec::new(),
    }
}

/// The attribute `priority` if valid, else the default. A router that requires a valid one can
/// reject the event.
pub(crate) fn published_priority(event: &Event) -> Priority {
    match event.attribute("priority") {
        Some(Value::Text(text)) => text.parse().unwrap_or_default(),
        _ => Priority::default(),
    }
}

fn said(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(no message)")
}
