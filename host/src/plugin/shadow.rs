//! Shadow candidates: each is called for the same live events as its plugin, and its decisions are
//! compared and counted. Its answers have no effect.
//!
//! Live events never wait for a candidate and never fail because of one. Calls go to a queue,
//! bounded in events and in bytes; a call that finds it full is counted as skipped and not
//! compared. One low-priority thread per candidate, `plugin-shadow`, works through the queue with
//! an instance of its own under the plugin's limits.
//!
//! `outcome` defines which decisions are the same; `registry` starts, stops and
//! promotes candidates.

use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread;

use bytes::Bytes;
use serde::Serialize;

pub mod groups;
pub mod outcome;

use self::groups::{GroupKey, Groups};
use self::outcome::{Difference, Differences, PluginDecision, json_bytes};
use super::runtime::engine::MAX_SHADOWS;
use super::{ATTEMPTS, Call, Engine, Instance, ParsedPayload, Plugin, Role, lower_thread_priority};
use crate::clock::now_ms;
use crate::event::{Event, Name, Priority};
use crate::plugin::runtime::plugin::short_hash;
use crate::telemetry::metrics::{Metrics, PluginShadowLabel};

/// The maximum number of queued calls per candidate.
const MAX_WAITING: usize = 1_024;
/// The maximum size of the queued calls per candidate, in bytes of JSON.
const MAX_WAITING_BYTES: usize = 8 * 1024 * 1024;

/// The shadow candidates of a node, by plugin name. A handle that is cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Shadows(Arc<OpenShadows>);

#[derive(Debug, Default)]
struct OpenShadows {
    /// The number of candidates; read without a lock on every call of every plugin.
    n: AtomicUsize,
    by_name: RwLock<BTreeMap<Name, Arc<Shadow>>>,
}

impl Drop for OpenShadows {
    fn drop(&mut self) {
        let by_name = self
            .by_name
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        by_name.values().for_each(|shadow| shadow.end());
    }
}

/// The report on a candidate.
#[derive(Clone, Debug, Serialize)]
pub struct ShadowReport {
    #[serde(flatten)]
    pub summary: ShadowSummary,
    /// The differences, counted by what they change.
    pub groups: Groups,
    /// The first differences.
    pub differences: Differences,
}

/// The counts of a candidate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ShadowSummary {
    /// SHA-256 of the candidate's file, in hexadecimal.
    pub hash: String,
    /// The first 12 hex digits of the SHA-256 of its configuration as JSON with sorted keys, as in
    /// decision records.
    pub config_hash: String,
    /// The version in its manifest.
    pub version: String,
    /// When it started, in milliseconds since the Unix epoch.
    pub since_ms: u64,
    /// The generation that it is compared with; `None` until the first event. All counts start
    /// again when the generation changes.
    pub generation: Option<u64>,
    /// Calls that both versions decided.
    pub compared: u64,
    /// Compared calls with different decisions.
    pub different: u64,
    /// Different calls on which only the candidate failed.
    pub failed: u64,
    /// Calls that were not compared because the queue was full.
    pub skipped: u64,
    /// Calls in the queue.
    pub waiting: usize,
}

/// The source of a candidate, kept for its promotion.
#[derive(Clone, Debug)]
pub(super) struct CandidateSource {
    /// The file.
    pub(super) bytes: Bytes,
    /// The section of the configuration, as TOML; `None`: that of the active version.
    pub(super) section: Option<String>,
}

/// One candidate.
#[derive(Debug)]
pub(crate) struct Shadow {
    plugin: Name,
    hash: String,
    config_hash: String,
    version: String,
    source: CandidateSource,
    since_ms: u64,
    metrics: Metrics,
    state: Mutex<QueueState>,
    is_ready: Condvar,
}

#[derive(Debug, Default)]
struct QueueState {
    waiting: VecDeque<QueuedCall>,
    waiting_bytes: usize,
    is_over: bool,
    tally: Tally,
}

/// The counts against one generation.
#[derive(Debug, Default)]
struct Tally {
    generation: Option<u64>,
    compared: u64,
    different: u64,
    failed: u64,
    skipped: u64,
    groups: Groups,
    differences: Differences,
}

/// A live call and its decision.
#[derive(Debug)]
struct QueuedCall {
    event: Event,
    priority: Priority,
    clock_ms: u64,
    role: Role,
    generation: u64,
    decided: PluginDecision,
    bytes: usize,
}

impl Shadows {
    /// The candidate of this plugin.
    pub(crate) fn of(&self, plugin: &Name) -> Option<Arc<Shadow>> {
        if self.0.n.load(Ordering::Relaxed) == 0 {
            return None;
        }
        self.0
            .by_name
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(plugin)
            .cloned()
    }

    /// Starts a candidate for the plugin of its name, replacing an earlier one.
    ///
    /// # Errors
    /// The limit is reached, or the system cannot start a thread; the text gives the cause.
    pub(super) fn begin(
        &self,
        engine: &Engine,
        candidate: Plugin,
        source: CandidateSource,
        metrics: Metrics,
    ) -> Result<ShadowReport, String> {
        let mut by_name = self
            .0
            .by_name
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let (name, candidate) = (candidate.name().clone(), candidate.logging_as("candidate"));
        if by_name.len() >= MAX_SHADOWS && !by_name.contains_key(&name) {
            let others: Vec<&str> = by_name.keys().map(Name::as_str).collect();
            return Err(format!(
                "the limit of {MAX_SHADOWS} shadow candidates per node is reached; stop one of {}",
                others.join(", ")
            ));
        }
        let shadow = Arc::new(Shadow {
            plugin: name.clone(),
            hash: candidate.hash().to_owned(),
            config_hash: short_hash(candidate.config_hash()),
            version: candidate.manifest().version.clone(),
            source,
            since_ms: now_ms(),
            metrics,
            state: Mutex::default(),
            is_ready: Condvar::new(),
        });
        let (engine, run) = (engine.clone(), Arc::clone(&shadow));
        let thread = thread::Builder::new()
            .name("plugin-shadow".into())
            .spawn(move || run.work(&engine, &candidate));
        thread.map_err(|error| format!("cannot start a thread for it: {error}"))?;
        let report = shadow.report();
        if let Some(former) = by_name.insert(name, shadow) {
            former.end();
        }
        self.0.n.store(by_name.len(), Ordering::Relaxed);
        Ok(report)
    }

    /// Stops this candidate.
    pub(super) fn end(&self, shadow: &Arc<Shadow>) {
        let mut by_name = self
            .0
            .by_name
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        // By now another candidate may have replaced this one and must stay.
        if by_name
            .get(&shadow.plugin)
            .is_some_and(|found| Arc::ptr_eq(found, shadow))
        {
            by_name.remove(&shadow.plugin);
        }
        self.0.n.store(by_name.len(), Ordering::Relaxed);
        shadow.end();
    }
}

impl Shadow {
    pub(super) fn source(&self) -> &CandidateSource {
        &self.source
    }

    pub(super) fn report(&self) -> ShadowReport {
        let state = self.state();
        ShadowReport {
            summary: self.summarize(&state),
            groups: state.tally.groups.clone(),
            differences: state.tally.differences.clone(),
        }
    }

    pub(super) fn summary(&self) -> ShadowSummary {
        self.summarize(&self.state())
    }

    fn summarize(&self, QueueState { tally, waiting, .. }: &QueueState) -> ShadowSummary {
        ShadowSummary {
            hash: self.hash.clone(),
            config_hash: self.config_hash.clone(),
            version: self.version.clone(),
            since_ms: self.since_ms,
            generation: tally.generation,
            compared: tally.compared,
            different: tally.different,
            failed: tally.failed,
            skipped: tally.skipped,
            waiting: waiting.len(),
        }
    }

    /// Queues a call that a generation of the plugin has decided, or counts it as skipped if the
    /// queue is full. Never blocks.
    pub(crate) fn offer(
        &self,
        generation: u64,
        role: Role,
        call: &Call<'_>,
        decided: impl FnOnce() -> PluginDecision,
    ) {
        {
            let state = self.state();
            if state.is_over {
                return;
            }
            if state.is_full(0) {
                drop(state);
                // Checked before the event is copied, so that a full queue costs no copy.
                return self.skip(generation);
            }
        }
        let (event, decided) = (call.event.clone(), decided());
        let bytes = json_bytes(&event).saturating_add(json_bytes(&decided));
        let job = QueuedCall {
            event,
            priority: call.priority,
            clock_ms: call.clock_ms,
            role,
            generation,
            decided,
            bytes,
        };
        let mut state = self.state();
        if state.is_over {
            return;
        }
        if state.is_full(bytes) {
            drop(state);
            return self.skip(generation);
        }
        state.waiting_bytes += bytes;
        state.waiting.push_back(job);
        drop(state);
        self.is_ready.notify_one();
    }

    fn skip(&self, generation: u64) {
        self.state().tally.of(generation).skipped += 1;
        self.count("skipped");
    }

    fn end(&self) {
        let mut state = self.state();
        state.is_over = true;
        state.waiting.clear();
        drop(state);
        self.is_ready.notify_one();
    }

    /// The candidate's thread.
    fn work(&self, engine: &Engine, candidate: &Plugin) {
        lower_thread_priority();
        let mut slot = None;
        while let Some(job) = self.next() {
            let new = catch_unwind(AssertUnwindSafe(|| {
                decide(candidate, &mut slot, engine, &job)
            }));
            let new = new.unwrap_or_else(|_| PluginDecision::Failed {
                reason: "it made the host panic".to_owned(),
            });
            self.note(&job, &new);
        }
    }

    /// Waits for the next call. `None`: the candidate was stopped.
    fn next(&self) -> Option<QueuedCall> {
        let mut state = self.state();
        loop {
            if state.is_over {
                return None;
            }
            if let Some(job) = state.waiting.pop_front() {
                state.waiting_bytes -= job.bytes;
                return Some(job);
            }
            state = self
                .is_ready
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn note(&self, job: &QueuedCall, new: &PluginDecision) {
        let is_same = job.decided.is_same(new);
        let has_failed = !is_same && new.has_failed();
        let group = (!is_same).then(|| {
            GroupKey::new(
                job.role,
                job.event.kind.as_str(),
                job.clock_ms,
                &job.decided,
                new,
            )
        });
        let difference = (!is_same)
            .then(|| Difference::new(&job.event, job.role, job.clock_ms, &job.decided, new));
        {
            let mut state = self.state();
            let tally = state.tally.of(job.generation);
            tally.compared += 1;
            tally.different += u64::from(!is_same);
            tally.failed += u64::from(has_failed);
            if let Some(group) = group {
                tally.groups.note(group, job.event.id.as_str());
            }
            if let Some(difference) = difference {
                tally.differences.push(difference);
            }
        }
        self.count(match (is_same, has_failed) {
            (true, _) => "same",
            (false, false) => "different",
            (false, true) => "failed",
        });
    }

    fn count(&self, outcome: &'static str) {
        let label = PluginShadowLabel {
            plugin: self.plugin.to_string(),
            outcome,
        };
        self.metrics
            .plugin_shadow_comparisons
            .get_or_create(&label)
            .inc();
    }

    fn state(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl QueueState {
    /// Whether the queue has no room for this many more bytes.
    fn is_full(&self, bytes: usize) -> bool {
        self.waiting.len() >= MAX_WAITING
            || self.waiting_bytes.saturating_add(bytes) > MAX_WAITING_BYTES
    }
}

impl Tally {
    /// Starts again for another generation: differences from one do not apply to the next.
    fn of(&mut self, generation: u64) -> &mut Self {
        if self.generation != Some(generation) {
            *self = Self {
                generation: Some(generation),
                ..Self::default()
            };
        }
        self
    }
}

/// Calls the candidate as the pipeline calls a plugin: only for matching types, and once more on a
/// fresh instance if it fails.
fn decide(
    candidate: &Plugin,
    slot: &mut Option<Instance>,
    engine: &Engine,
    job: &QueuedCall,
) -> PluginDecision {
    if !candidate.wants(&job.event.kind) {
        return PluginDecision::nothing(job.role);
    }
    let (ticking, payload) = (engine.ticking(), ParsedPayload::default());
    let call = Call {
        event: &job.event,
        priority: job.priority,
        clock_ms: job.clock_ms,
        payload: &payload,
    };
    let mut attempts = 0;
    loop {
        attempts += 1;
        match candidate.call(slot, &ticking, job.role, &call) {
            Ok(answer) => return PluginDecision::of_answer(&answer, &call),
            Err(error) if error.is_verdict() || attempts == ATTEMPTS => {
                return PluginDecision::of_failure(&error);
            }
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::EntryId;

    /// Without a thread: every offered call stays queued.
    fn shadow() -> Shadow {
        Shadow {
            plugin: Name::parse("p").unwrap(),
            hash: String::new(),
            config_hash: String::new(),
            version: String::new(),
            source: CandidateSource {
                bytes: Bytes::new(),
                section: None,
            },
            since_ms: 0,
            metrics: Metrics::default(),
            state: Mutex::default(),
            is_ready: Condvar::new(),
        }
    }

    fn offer(shadow: &Shadow, generation: u64, data: &str) {
        let document = format!(r#"{{"type":"t","data":"{data}"}}"#);
        let event = Event::from_json(EntryId::default(), "-", document.as_bytes()).unwrap();
        let call = Call {
            event: &event,
            priority: Priority::Normal,
            clock_ms: 1,
            payload: &ParsedPayload::default(),
        };
        shadow.offer(generation, Role::Router, &call, || PluginDecision::None);
    }

    #[test]
    fn calls_beyond_the_queue_limits_are_counted_as_skipped() {
        let many = shadow();
        (0..MAX_WAITING + 10).for_each(|_| offer(&many, 1, "x"));
        assert_eq!(
            (many.summary().waiting, many.summary().skipped),
            (MAX_WAITING, 10)
        );
        let label = PluginShadowLabel {
            plugin: "p".into(),
            outcome: "skipped",
        };
        assert_eq!(
            many.metrics
                .plugin_shadow_comparisons
                .get_or_create(&label)
                .get(),
            10
        );
        // Taking one call makes room for one.
        assert!(many.next().is_some());
        offer(&many, 1, "x");
        assert_eq!(
            (many.summary().waiting, many.summary().skipped),
            (MAX_WAITING, 10)
        );

        let large = shadow();
        let data = "x".repeat(MAX_WAITING_BYTES / 10);
        (0..12).for_each(|_| offer(&large, 1, &data));
        assert_eq!((large.summary().waiting, large.summary().skipped), (9, 3));
        while large.summary().waiting > 0 {
            large.next().unwrap();
        }
        assert_eq!(large.state().waiting_bytes, 0);
        large.end();
        offer(&large, 1, "x");
        assert!(
            large.summary().waiting == 0 && large.next().is_none(),
            "a stopped candidate queues nothing"
        );
    }

    #[test]
    fn counts_start_again_with_each_generation() {
        let shadow = shadow();
        let note = |generation: u64, new: &PluginDecision| {
            offer(&shadow, generation, "x");
            shadow.note(&shadow.next().unwrap(), new);
        };
        let counts = || {
            let ShadowSummary {
                generation,
                compared,
                different,
                failed,
                ..
            } = shadow.summary();
            (generation, compared, different, failed)
        };
        assert_eq!(counts(), (None, 0, 0, 0));
        note(1, &PluginDecision::None);
        note(1, &PluginDecision::Keep);
        note(
            1,
            &PluginDecision::Failed {
                reason: "it trapped".into(),
            },
        );
        assert_eq!(counts(), (Some(1), 3, 2, 1));
        note(2, &PluginDecision::None);
        assert_eq!(counts(), (Some(2), 1, 0, 0));
        assert!(shadow.report().differences.is_empty());
    }
}
