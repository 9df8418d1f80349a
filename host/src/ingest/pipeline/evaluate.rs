//! Evaluates one event after another on one thread, with plugin instances of its own.
//!
//! Live evaluations count towards the health of plugins and are offered to shadow candidates; dry
//! runs have no effect. A panic of the host costs one event its route and the thread its instances.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::policy::StepOutcome;
use super::{Evaluation, Resolution, Unevaluated};
use crate::event::{
    ChainMember, Event, HOST_PANICKED, Name, Plan, Priority, Value, Verdict, VerdictKind,
};
use crate::plugin::registry::Registry;
use crate::plugin::registry::generation::{Chain, Generation};
use crate::plugin::registry::health::{Health, Permit, Transition};
use crate::plugin::{
    ATTEMPTS, Answer, Call, CallError, Instance, ParsedPayload, Role, Ticking, thread_cpu_time,
};
use crate::telemetry::metrics::{Metrics, PluginCallLabel, PluginLabel, PluginVerdictLabel};

/// The evaluations of a share of a batch, one per event, in order; or why it has to be evaluated
/// again.
pub(super) type Share = Result<Vec<Evaluation>, Unevaluated>;

/// The evaluator of one thread.
#[derive(Debug)]
pub(super) struct Evaluator {
    registry: Arc<Registry>,
    metrics: Metrics,
    /// The chain that the instances belong to.
    chain: Arc<Chain>,
    /// By plugin name and generation. An instance that is in a call is not in the map.
    instances: HashMap<(Name, u64), Instance>,
    /// The number of instances included in the metric, and their memory by plugin, in bytes.
    n_counted: i64,
    counted_memory: BTreeMap<Name, i64>,
    /// Whether the current evaluation has an effect, that is, is not a dry run.
    is_live: bool,
    /// Why the current evaluation has to be repeated: an instance could not be made.
    lacking: Option<Unevaluated>,
    /// The slow calls of the current batch, and when each plugin was last reported.
    slow: HashMap<Name, SlowCalls>,
    reported: HashMap<Name, Instant>,
}

/// The time of a call from which it is reported. A batch of such calls holds up its source for half
/// a second or more, long before a call reaches its deadline.
const SLOW_CALL: Duration = Duration::from_millis(10);
/// The shortest time between two reports on one plugin by one thread.
const REPORT_EVERY: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
struct SlowCalls {
    n: u32,
    time: Duration,
}

impl Evaluator {
    pub(super) fn new(registry: Arc<Registry>, metrics: Metrics) -> Self {
        Self {
            registry,
            metrics,
            chain: Arc::default(),
            instances: HashMap::new(),
            n_counted: 0,
            counted_memory: BTreeMap::new(),
            is_live: false,
            slow: HashMap::new(),
            reported: HashMap::new(),
            lacking: None,
        }
    }

    /// Evaluates events by one chain, in order. `is_live`: not a dry run.
    ///
    /// # Errors
    /// The host has no memory for an instance; the events are to be evaluated again.
    pub(super) fn evaluate_batch(
        &mut self,
        chain: &Arc<Chain>,
        events: Vec<Event>,
        clock_ms: u64,
        is_live: bool,
    ) -> Share {
        self.keep_only(chain);
        self.is_live = is_live;
        let ticking = self.registry.engine().ticking();
        let (n_events, began, cpu) = (events.len(), Instant::now(), thread_cpu_time());
        self.lacking = None;
        let mut evaluations = Vec::with_capacity(n_events);
        for event in events {
            evaluations.push(self.evaluate(chain, event, clock_ms, &ticking));
            if let Some(reason) = self.lacking.take() {
                return Err(reason);
            }
        }
        if !self.slow.is_empty() {
            let cpu = thread_cpu_time().saturating_sub(cpu);
            self.report_slow_calls(n_events, began.elapsed(), cpu);
        }
        Ok(evaluations)
    }

    /// Warns of plugins whose calls were slow in a batch. `took`: the time of the batch, `cpu`: the
    /// processor time of it.
    fn report_slow_calls(&mut self, n_events: usize, took: Duration, cpu: Duration) {
        for (name, SlowCalls { n, time }) in std::mem::take(&mut self.slow) {
            // On a busy machine calls wait for the processor, which is not the plugin's fault: what
            // counts is their part of the processor time.
            let own = time.mul_f64(cpu.as_secs_f64() / took.as_secs_f64());
            if own < SLOW_CALL * n {
                continue;
            }
            let now = Instant::now();
            let last = self.reported.get(&name);
            if last.is_some_and(|last| now.duration_since(*last) < REPORT_EVERY) {
                continue;
            }
            let share = (100.0 * time.as_secs_f64() / took.as_secs_f64()).round();
            tracing::warn!(
                plugin.name = name.as_str(),
                calls = n,
                plugin_ms = time.as_millis() as u64,
                batch_ms = took.as_millis() as u64,
                batch_events = n_events,
                "plugin is slow: {n} of its calls in a batch of {n_events} events took {} ms or more, together {share} % of the time of the batch; later events wait meanwhile, so make the plugin faster or lower its deadline",
                SLOW_CALL.as_millis()
            );
            self.reported.insert(name, now);
        }
    }

    /// Drops all instances.
    pub(super) fn release_instances(&mut self) {
        self.instances.clear();
    }

    /// Drops instances of plugins that are no longer active, and updates the metric.
    pub(super) fn release_retired_instances(&mut self) {
        self.keep_only(&self.registry.chain());
        let n_instances = self.instances.len() as i64;
        self.metrics
            .plugin_instances
            .inc_by(n_instances - self.n_counted);
        self.n_counted = n_instances;
        let mut memory: BTreeMap<Name, i64> = BTreeMap::new();
        for ((name, _), instance) in &self.instances {
            let bytes = i64::try_from(instance.memory_bytes()).unwrap_or(i64::MAX);
            *memory.entry(name.clone()).or_default() += bytes;
        }
        // Both: a plugin may have no instance any more.
        let names: BTreeSet<&Name> = memory.keys().chain(self.counted_memory.keys()).collect();
        for name in names {
            let of = |bytes: &BTreeMap<Name, i64>| bytes.get(name).copied().unwrap_or_default();
            let change = of(&memory) - of(&self.counted_memory);
            if change != 0 {
                let plugin = name.to_string();
                self.metrics
                    .plugin_memory
                    .get_or_create(&PluginLabel { plugin })
                    .inc_by(change);
            }
        }
        self.counted_memory = memory;
    }

    /// Drops instances that do not belong to this chain.
    fn keep_only(&mut self, chain: &Arc<Chain>) {
        if !Arc::ptr_eq(&self.chain, chain) {
            // Partitions may have different chains, between which the batches alternate.
            self.instances.retain(|(name, number), _| {
                chain.has(name, *number) || self.registry.is_deciding(name, *number)
            });
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
        let mut verdicts = Vec::new();
        let state = catch_unwind(AssertUnwindSafe(|| {
            self.fold(chain, &event, &mut verdicts, clock_ms, ticking)
        }));
        let EventState {
            amended,
            priority,
            resolution,
        } = state.unwrap_or_else(|panic| {
            self.instances.clear();
            let message = panic_message(panic.as_ref());
            tracing::error!(
                event.id = event.id.as_str(),
                "the host panicked while evaluating an event: {message}"
            );
            let reason = format!("{HOST_PANICKED}: {message}");
            EventState::as_published(
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
            chain: Arc::clone(chain.identity()),
        }
    }

    fn fold(
        &mut self,
        chain: &Chain,
        event: &Event,
        verdicts: &mut Vec<Verdict>,
        clock_ms: u64,
        ticking: &Ticking,
    ) -> EventState {
        let payload = ParsedPayload::default();
        let mut state = EventState::as_published(event, Resolution::Unrouted);
        for generation in &chain.filters {
            match self.step(
                generation,
                Role::Filter,
                &state.call(event, clock_ms, &payload),
                verdicts,
                ticking,
            ) {
                StepOutcome::Answered(Answer::Amend(answer)) => {
                    state.priority = answer.priority.unwrap_or(state.priority);
                    state.amended = Some(answer.event);
                }
                StepOutcome::Answered(Answer::Drop(reason)) => {
                    state.resolution = Resolution::Discarded {
                        plugin: generation.plugin.name().to_string(),
                        reason,
                    };
                    return state;
                }
                StepOutcome::Answered(Answer::Keep | Answer::Routes(_)) | StepOutcome::Passed => {}
                StepOutcome::Over(resolution) => {
                    return EventState::as_published(event, resolution);
                }
            }
        }
        let mut plan = Plan::default();
        for generation in &chain.routers {
            match self.step(
                generation,
                Role::Router,
                &state.call(event, clock_ms, &payload),
                verdicts,
                ticking,
            ) {
                StepOutcome::Answered(Answer::Routes(answered)) => {
                    plan.routes.extend(answered.routes)
                }
                StepOutcome::Answered(Answer::Keep | Answer::Drop(_) | Answer::Amend(_))
                | StepOutcome::Passed => {}
                StepOutcome::Over(resolution) => {
                    return EventState::as_published(event, resolution);
                }
            }
        }
        if !plan.routes.is_empty() {
            state.resolution = Resolution::Planned(plan);
        }
        state
    }

    /// Calls one plugin, unless its types do not match or its breaker is open, and offers the call
    /// to its shadow candidate.
    fn step(
        &mut self,
        generation: &Generation,
        role: Role,
        call: &Call<'_>,
        verdicts: &mut Vec<Verdict>,
        ticking: &Ticking,
    ) -> StepOutcome {
        let n_verdicts = verdicts.len();
        let outcome = if !generation.plugin.wants(&call.event.kind) {
            // Not recorded of a live event: the members of its chain show who was there, and a
            // record does not grow with the plugins that do not concern its event.
            if !self.is_live {
                verdicts.push(verdict(generation, VerdictKind::Skipped, ""));
            }
            StepOutcome::Passed
        } else {
            if self.is_live
                && let Permit::Rejected(why) = generation.health(role).admit(Instant::now())
            {
                let reason = why.to_string();
                verdicts.push(verdict(generation, VerdictKind::Failed, &reason));
                self.count_verdict(generation, VerdictKind::Failed);
                // Not offered to a candidate, which would have no decision to be compared with.
                return StepOutcome::of_failure(generation, reason, 0);
            }
            let n_verdicts = verdicts.len();
            let outcome = self.call_with_retry(generation, role, call, verdicts, ticking);
            if let Some(verdict) = verdicts.get(n_verdicts)
                && self.lacking.is_none()
            {
                self.count_verdict(generation, verdict.verdict);
            }
            outcome
        };
        // An event that is evaluated again is offered then. A version that is being rolled out is not
        // what a candidate is compared with.
        if self.is_live
            && self.lacking.is_none()
            && self
                .registry
                .chain()
                .has(generation.plugin.name(), generation.number)
            && let Some(shadow) = self.registry.shadows().of(generation.plugin.name())
        {
            shadow.offer(generation.number, role, call, || {
                let own = verdicts.get(n_verdicts..).unwrap_or_default();
                outcome.decision(role, call, own.last())
            });
        }
        outcome
    }

    /// Calls one plugin, once more if it fails, and applies its policy if it fails again.
    ///
    /// In one piece: each way in which a call can end is one arm with its verdict.
    fn call_with_retry(
        &mut self,
        generation: &Generation,
        role: Role,
        call: &Call<'_>,
        verdicts: &mut Vec<Verdict>,
        ticking: &Ticking,
    ) -> StepOutcome {
        let plugin = &generation.plugin;
        let mut record = |kind, reason: &str| verdicts.push(verdict(generation, kind, reason));
        let mut attempts = 0;
        let error = loop {
            attempts += 1;
            match self.call(generation, role, call, ticking) {
                Ok(answer) => {
                    self.note(generation, role, Health::note_answer);
                    let (kind, reason) = match &answer {
                        Answer::Keep => (VerdictKind::Keep, ""),
                        Answer::Drop(reason) => (VerdictKind::Drop, reason.as_str()),
                        Answer::Amend(_) => (VerdictKind::Amend, ""),
                        Answer::Routes(plan) if plan.routes.is_empty() => (VerdictKind::None, ""),
                        Answer::Routes(_) => (VerdictKind::Routes, ""),
                    };
                    record(kind, reason);
                    return StepOutcome::Answered(answer);
                }
                Err(error) if error.is_verdict() => {
                    // Only live events: a backtest of past ones would look like new rejections.
                    if self.is_live {
                        tracing::info!(
                            plugin.name = plugin.name().as_str(),
                            event.id = call.event.id.as_str(),
                            verdict = error.kind(),
                            "plugin did not decide: {error}"
                        );
                    }
                    let kind = match error {
                        CallError::Retry(_) => VerdictKind::Retry,
                        _ => VerdictKind::Rejected,
                    };
                    record(kind, &error.to_string());
                    break error;
                }
                // Instances of other plugins that are only kept for the next event give way.
                Err(CallError::HostMemory(_)) if !self.instances.is_empty() => {
                    self.instances.clear();
                    attempts -= 1;
                }
                Err(CallError::HostMemory(reason)) => {
                    self.lacking = Some(Unevaluated::HostMemory {
                        plugin: plugin.name().clone(),
                        reason: reason.clone(),
                    });
                    record(VerdictKind::Failed, &reason);
                    break CallError::HostMemory(reason);
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
                        record(VerdictKind::Failed, &error.to_string());
                        break error;
                    }
                }
            }
        };
        self.settle(generation, role, error, attempts)
    }

    /// Applies the consequence of a call that returned no answer.
    fn settle(
        &self,
        generation: &Generation,
        role: Role,
        error: CallError,
        attempts: u32,
    ) -> StepOutcome {
        let reason = error.to_string();
        let plugin = generation.plugin.name().to_string();
        match error {
            // A verdict on the event; the policy is only for plugins that do not work.
            CallError::Rejected(_) | CallError::Retry(_) => {
                self.note(generation, role, Health::note_answer);
                StepOutcome::Over(Resolution::Failed {
                    plugin,
                    reason,
                    attempts,
                    retry: matches!(error, CallError::Retry(_)),
                })
            }
            // Neither the plugin's health nor its policy: the event is evaluated again.
            CallError::HostMemory(_) => StepOutcome::Over(Resolution::Failed {
                plugin,
                reason,
                attempts,
                retry: true,
            }),
            CallError::Deadline(_)
            | CallError::Memory(_)
            | CallError::Trap(_)
            | CallError::InvalidOutput(_) => {
                self.note(generation, role, |health| {
                    health.note_failure(Instant::now())
                });
                StepOutcome::of_failure(generation, reason, attempts)
            }
        }
    }

    fn count_verdict(&self, generation: &Generation, kind: VerdictKind) {
        if self.is_live {
            let label = PluginVerdictLabel {
                plugin: generation.plugin.name().to_string(),
                verdict: kind.as_str(),
            };
            self.metrics.plugin_verdicts.get_or_create(&label).inc();
        }
    }

    /// Records a result in the plugin's health and applies the consequence.
    fn note(
        &self,
        generation: &Generation,
        role: Role,
        result: impl FnOnce(&Health) -> Transition,
    ) {
        if self.is_live {
            self.registry
                .follow(generation, result(generation.health(role)));
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
        let took = began.elapsed();
        let label = PluginLabel {
            plugin: plugin.name().to_string(),
        };
        self.metrics
            .plugin_call_duration
            .get_or_create(&label)
            .observe(took.as_secs_f64());
        if self.is_live && took >= SLOW_CALL {
            let slow = self.slow.entry(plugin.name().clone()).or_default();
            slow.n += 1;
            slow.time += took;
        }
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
struct EventState {
    /// `None`: no filter changed it.
    amended: Option<Event>,
    priority: Priority,
    resolution: Resolution,
}

impl EventState {
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

fn verdict(generation: &Generation, kind: VerdictKind, reason: &str) -> Verdict {
    let ChainMember {
        plugin,
        generation,
        hash,
        config_hash,
    } = generation.member();
    Verdict {
        plugin,
        generation,
        hash,
        config_hash,
        verdict: kind,
        reason: reason.to_owned(),
    }
}

/// Evaluates events on the caller's thread without any effect: with instances of its own, not
/// counted in metrics or health.
#[derive(Debug)]
pub struct DryRunner(Evaluator);

impl DryRunner {
    pub fn new(registry: Arc<Registry>) -> Self {
        Self(Evaluator::new(registry, Metrics::default()))
    }

    /// Evaluates one event by any chain. Takes as long as the plugins may run: not for an async
    /// thread.
    pub fn evaluate(&mut self, chain: &Arc<Chain>, event: Event, clock_ms: u64) -> Evaluation {
        let ticking = self.0.registry.engine().ticking();
        self.0.keep_only(chain);
        self.0.evaluate(chain, event, clock_ms, &ticking)
    }
}

/// The evaluation of an event without any plugin.
pub(super) fn unrouted(event: Event) -> Evaluation {
    let priority = published_priority(&event);
    Evaluation {
        event,
        priority,
        resolution: Resolution::Unrouted,
        verdicts: Vec::new(),
        chain: Arc::default(),
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

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(no message)")
}
