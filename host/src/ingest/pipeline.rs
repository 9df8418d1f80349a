//! The ordered chain of plugins, folded to one resolution for each event: filters until one drops, then all routers, their routes united.
//!
//! Plugins run on a few OS threads of their own, and no async task ever runs one: a batch is split among the threads and answered in its
//! order. It promises an evaluation for every event, whatever plugins do: one that fails is asked once more, on a fresh instance, and then
//! its policy decides. A batch is evaluated by one generation of each plugin, whatever is swapped meanwhile, and what was swapped out is given
//! back by every thread, busy or not. What happens to an evaluation is `ingest`'s business; what a plugin is, `plugin`'s.

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Instant;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};

use crate::broker::Verdict;
use crate::event::{Event, Name, Plan, Priority, Value};
use crate::plugin::registry::generation::{Chain, Generation};
use crate::plugin::registry::health::{Admission, Consequence, Health};
use crate::plugin::registry::settings::OnFailure;
use crate::plugin::registry::{Registry, Snapshot};
use crate::plugin::shadow::outcome::Decided;
use crate::plugin::{
    ATTEMPTS, Answer, Call, CallError, Engine, Instance, ParsedPayload, Role, Ticking,
};
use crate::telemetry::metrics::{Metrics, PluginCallLabel, PluginLabel};

/// The most shares of batches that wait for a thread; callers beyond it wait their turn.
const MAX_WAITING: usize = 256;
/// Fewer events than this are not worth another thread: a hand-over costs as much as calling a plugin some times.
const MIN_SHARE: usize = 4;

/// What became of one event.
#[derive(Clone, Debug)]
pub struct Evaluation {
    /// As filters amended it; if it failed, as it was published, so that it can be tried again.
    pub event: Event,
    /// What filters made it, or as it was published.
    pub priority: Priority,
    pub resolution: Resolution,
    /// Of the plugins that were asked, and of those that were not for want of interest, in order.
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
    /// No router named anyone.
    Unrouted,
    Failed {
        plugin: String,
        reason: String,
        attempts: u32,
        /// The plugin itself asks to see the event again later. Otherwise it is to be dead-lettered.
        retry: bool,
    },
}

/// No plugin is at work, and the operator did not allow that: every event would be unrouted, for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no plugin is loaded, so events wait")]
pub struct NoPlugins;

/// A handle: clones share the threads, which end with the last of them.
#[derive(Clone, Debug)]
pub struct Pipeline(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    registry: Arc<Registry>,
    allow_none: bool,
    queue: Arc<Queue>,
    /// Keeps [`Queue`] at its bound.
    waiting: Arc<Semaphore>,
    /// Has one permit: the turn to try an event out.
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
    /// Starts the threads. `allow_none`: without a plugin every event is unrouted, instead of none being evaluated.
    ///
    /// # Errors
    /// If the system gives none.
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

    /// Evaluates a batch, all of it with the same generations of plugins; answers in its order, one for each event. Something comes of it: it
    /// counts for the health of plugins, and candidates beside them hear of it.
    ///
    /// `clock_ms`: the clock that plugins are shown, in milliseconds since the Unix epoch; times to live count from it.
    ///
    /// Cancel-safe: events that were handed over are evaluated, and their evaluations dropped.
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

    /// As [`Pipeline::evaluate`], for whoever only wants to know what would be decided. Of all who do, one event at a time is evaluated, so that
    /// those of which something comes find a thread, however many and slow these are.
    ///
    /// Cancel-safe: at most one event is still evaluated.
    ///
    /// # Errors
    /// See there.
    pub async fn try_out(
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

    /// `trial`: nothing comes of these events, and this is the turn of whoever tries them out.
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

    /// Returns when events can be evaluated. Cancel-safe.
    pub async fn can_work(&self) {
        self.becomes(true).await;
    }

    /// Returns when no event can be evaluated for want of a plugin. Cancel-safe.
    pub async fn cannot_work(&self) {
        self.becomes(false).await;
    }

    async fn becomes(&self, able: bool) {
        let mut changes = self.changes();
        // It does not fail: the registry lives as long as this handle.
        drop(
            changes
                .wait_for(|now| self.can_work_on(&now.chain) == able)
                .await,
        );
    }

    pub fn registry(&self) -> &Arc<Registry> {
        &self.0.registry
    }

    /// The plugins, as they change.
    pub fn changes(&self) -> watch::Receiver<Snapshot> {
        self.0.registry.changes()
    }

    /// Whether the operator allowed that there is no plugin.
    pub fn allows_none(&self) -> bool {
        self.0.allow_none
    }

    /// Has threads without work give back what they keep of plugins that are no longer at work; those with work do so by themselves.
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
    /// Something comes of it, unless it is a trial; the next one of these waits until this one is done.
    trial: Option<OwnedSemaphorePermit>,
    answer: oneshot::Sender<Vec<Evaluation>>,
    _permit: OwnedSemaphorePermit,
}

/// Where the threads take their jobs: whoever is free takes the next, so that nobody waits behind a plugin that loops.
#[derive(Debug, Default)]
struct Queue {
    jobs: Mutex<Jobs>,
    is_ready: Condvar,
}

#[derive(Debug, Default)]
struct Jobs {
    waiting: VecDeque<Job>,
    is_closed: bool,
    /// A count, as every thread is to hear each call.
    n_calls_to_give_back: u64,
}

/// What a thread is to do next.
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

    /// `n_heard`: how many calls to give back this thread has heard. `None`: there will be no more tasks.
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

/// One thread with its instances.
#[derive(Debug)]
struct Worker {
    registry: Arc<Registry>,
    metrics: Metrics,
    /// The chain that the instances are of.
    chain: Arc<Chain>,
    /// By name and generation. An instance that is in a call is not here.
    instances: HashMap<(Name, u64), Instance>,
    /// How many of them the metric has heard of.
    n_counted: i64,
    /// Whether something comes of what is being evaluated.
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
                // Nobody listens if the caller was cancelled.
                drop(answer.send(evaluations));
            }
            // The chain may have been swapped while it was at work, and there may be no work for a long time.
            self.keep_only(&self.registry.chain());
            let n_instances = self.instances.len() as i64;
            self.metrics
                .plugin_instances
                .inc_by(n_instances - self.n_counted);
            self.n_counted = n_instances;
        }
    }

    /// Drops the instances of every other chain.
    fn keep_only(&mut self, chain: &Arc<Chain>) {
        if !Arc::ptr_eq(&self.chain, chain) {
            self.instances
                .retain(|(name, number), _| chain.has(name, *number));
            self.chain = Arc::clone(chain);
        }
    }

    /// Survives a panic of the host in whatever a plugin provoked: the event fails, and the instances start afresh.
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
                "the host panicked as it evaluated an event: {said}"
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
                Asked::Answered(Answer::Amend(answer)) => {
                    folded.priority = answer.priority.unwrap_or(folded.priority);
                    folded.amended = Some(answer.event);
                }
                Asked::Answered(Answer::Drop(reason)) => {
                    folded.resolution = Resolution::Discarded {
                        plugin: generation.plugin.name().to_string(),
                        reason,
                    };
                    return folded;
                }
                Asked::Answered(Answer::Keep | Answer::Routes(_)) | Asked::Passed => {}
                Asked::Over(resolution) => return Folded::as_published(event, resolution),
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
                Asked::Answered(Answer::Routes(answered)) => plan.routes.extend(answered.routes),
                Asked::Answered(Answer::Keep | Answer::Drop(_) | Answer::Amend(_))
                | Asked::Passed => {}
                Asked::Over(resolution) => return Folded::as_published(event, resolution),
            }
        }
        if !plan.routes.is_empty() {
            folded.resolution = Resolution::Planned(plan);
        }
        folded
    }

    /// Asks one plugin, unless it has no interest or has failed too often, and has a candidate beside it asked the same.
    fn ask(
        &mut self,
        generation: &Generation,
        role: Role,
        call: &Call<'_>,
        verdicts: &mut Vec<Verdict>,
        ticking: &Ticking,
    ) -> Asked {
        let asked = if !generation.plugin.wants(&call.event.kind) {
            verdicts.push(verdict(generation, "skipped", ""));
            Asked::Passed
        } else {
            if self.is_live
                && let Admission::Spared(why) = generation.health(role).admit(Instant::now())
            {
                let reason = why.to_string();
                verdicts.push(verdict(generation, "failed", &reason));
                // It decides nothing that could be compared.
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

    /// Asks one plugin, and once more if it fails, and applies its policy if it fails again.
    fn have_decided(
        &mut self,
        generation: &Generation,
        role: Role,
        call: &Call<'_>,
        verdicts: &mut Vec<Verdict>,
        ticking: &Ticking,
    ) -> Asked {
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
                    return Asked::Answered(answer);
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
            // What a plugin says of an event is its verdict; the policy is for plugins that do not work.
            CallError::Rejected(_) | CallError::Retry(_) => {
                self.follow(generation, role, Health::note_answer);
                Asked::Over(Resolution::Failed {
                    plugin,
                    reason,
                    attempts,
                    retry: matches!(error, CallError::Retry(_)),
                })
            }
            CallError::Deadline(_)
            | CallError::Memory(_)
            | CallError::Trap(_)
            | CallError::Refused(_) => {
                self.follow(generation, role, |health| {
                    health.note_failure(Instant::now())
                });
                settle(generation, reason, attempts)
            }
        }
    }

    /// Notes how a plugin fared, and sees to what follows from it.
    fn follow(
        &self,
        generation: &Generation,
        role: Role,
        note: impl FnOnce(&Health) -> Consequence,
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
        // Taken out for the call: should the host panic in it, the instance is gone with its stack.
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

/// An event on its way through the chain.
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

    /// What the next plugin is asked about.
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

/// What becomes of an event that a plugin fails on.
fn settle(generation: &Generation, reason: String, attempts: u32) -> Asked {
    let plugin = generation.plugin.name().to_string();
    match generation.settings.on_failure {
        OnFailure::DeadLetter => Asked::Over(Resolution::Failed {
            plugin,
            reason,
            attempts,
            retry: false,
        }),
        OnFailure::Skip => Asked::Passed,
        OnFailure::Drop => Asked::Over(Resolution::Discarded {
            plugin,
            reason: format!("the plugin failed: {reason}"),
        }),
    }
}

/// What asking one plugin led to.
enum Asked {
    Answered(Answer),
    /// It has no say in this event.
    Passed,
    /// No other plugin is asked.
    Over(Resolution),
}

impl Asked {
    /// What the plugin decided about this call, on which this is its verdict.
    fn decided(&self, role: Role, call: &Call<'_>, verdict: Option<&Verdict>) -> Decided {
        match (self, verdict) {
            (Self::Answered(answer), _) => Decided::of_answer(answer, call),
            (_, Some(verdict))
                if ["rejected", "retry", "failed"].contains(&verdict.verdict.as_str()) =>
            {
                Decided::Failed {
                    reason: verdict.reason.clone(),
                }
            }
            _ => Decided::nothing(role),
        }
    }
}

/// A thread of the caller's own that asks plugins about events of which nothing comes: apart from those at work, and counted nowhere.
#[derive(Debug)]
pub struct Aside(Worker);

impl Aside {
    pub fn new(registry: Arc<Registry>) -> Self {
        Self(Worker::new(registry, Metrics::default()))
    }

    /// Evaluates one event by a chain that need not be the one at work. Takes as long as plugins may: not for an async thread.
    pub fn evaluate(&mut self, chain: &Arc<Chain>, event: Event, clock_ms: u64) -> Evaluation {
        let ticking = self.0.registry.engine().ticking();
        self.0.keep_only(chain);
        self.0.evaluate(chain, event, clock_ms, &ticking)
    }
}

/// Without plugins.
fn unrouted(event: Event) -> Evaluation {
    let priority = published_priority(&event);
    Evaluation {
        event,
        priority,
        resolution: Resolution::Unrouted,
        verdicts: Vec::new(),
    }
}

/// The attribute `priority`, if it is one; a router that minds a bad one rejects the event.
pub(crate) fn published_priority(event: &Event) -> Priority {
    match event.attribute("priority") {
        Some(Value::Text(text)) => text.parse().unwrap_or_default(),
        _ => Priority::default(),
    }
}

fn said(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(no text)")
}
