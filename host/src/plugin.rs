//! A loaded plugin: [`Plugin::load`] checks and compiles a plugin file, [`Plugin::call`] evaluates
//! one event.
//!
//! A plugin that traps, loops, exhausts its memory, floods its output or returns invalid data costs
//! only that call: its instance is discarded and the next call gets a fresh one. Calls are
//! synchronous and must run on a dedicated thread, never on an async executor.
//!
//! Compiling is in `compile`, the code cache in [`cache`], the set of plugins and their versions in
//! [`registry`], reloading in [`watcher`], and the handling of an event whose plugin failed in
//! `pipeline`.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use sha2::{Digest, Sha256};
use wasmtime::component::InstancePre;
use wasmtime::{Store, Trap};

pub mod inspect;
pub mod registry;
pub mod runtime;
pub mod shadow;

pub use self::inspect::noop::noop;
pub use self::registry::folder::called;
pub use self::runtime::deadline::{Ticking, used_by_this_thread};
pub use self::runtime::engine::Engine;
pub use self::runtime::selection::Selection;

use self::runtime::bindings::{Description, ExportIndices, Exports};
use self::runtime::compile::{Compiled, compile};
use self::runtime::engine::State;
use self::runtime::log::GuestLog;
use self::runtime::selection::Document;
use self::runtime::{bindings, deadline, engine, log};
use crate::event::{Event, Name, Plan, Priority};

/// The maximum size of a plugin file, in bytes. Components built from JavaScript take 13 MB, from
/// Python up to 35 MB.
pub const MAX_FILE_BYTES: usize = 64 * 1024 * 1024;

/// Attempts per event for a plugin that fails; the last one uses a fresh instance.
pub(crate) const ATTEMPTS: u32 = 2;

/// The resource limits of one plugin.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// CPU time of a call for an event.
    pub deadline: Duration,
    /// CPU time of each of instantiation, `describe` and `configure`.
    pub setup_deadline: Duration,
    /// The maximum memory of an instance, in bytes.
    pub memory_bytes: usize,
    /// The maximum size of the text in an answer, in bytes.
    pub result_bytes: usize,
    /// The maximum number of targets in an answer.
    pub targets: usize,
    /// Calls after which an instance is replaced by a fresh one.
    pub calls_per_instance: u32,
    /// The maximum file size, in bytes.
    pub file_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            deadline: Duration::from_millis(50),
            setup_deadline: Duration::from_secs(1),
            memory_bytes: 32 * 1024 * 1024,
            result_bytes: 256 * 1024,
            targets: 10_000,
            calls_per_instance: 10_000,
            file_bytes: MAX_FILE_BYTES,
        }
    }
}

/// A plugin's description of itself: made printable, but otherwise untrusted.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    pub name: String,
    pub version: String,
    pub description: String,
    /// A JSON Schema of the configuration, for tools. The host does not validate against it; the
    /// plugin checks its configuration when it parses it.
    pub config_schema: Option<String>,
}

/// Why a file cannot run as a plugin. The text continues a sentence that begins with the file name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct LoadError(String);

/// Checks that the plugin folder can be read.
///
/// # Errors
/// One line that names the folder and the fix.
pub fn check_folder(dir: &Path) -> Result<(), String> {
    registry::folder::look(dir).map(drop)
}

/// Why a call returned no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The call exceeded its CPU time.
    #[error("{0}")]
    Deadline(String),
    /// The instance requested more memory than its limit.
    #[error("{0}")]
    Memory(String),
    /// The guest trapped, mostly because of a panic.
    #[error("{0}")]
    Trap(String),
    /// The answer, or something that the guest did, is invalid.
    #[error("{0}")]
    InvalidOutput(String),
    /// The plugin rejected the event and would do so again.
    #[error("{0}")]
    Rejected(String),
    /// The plugin cannot decide now and requests a retry.
    #[error("{0}")]
    Retry(String),
}

impl CallError {
    /// The label in metrics; for a verdict, also the word in decision records.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Deadline(_) => "deadline",
            Self::Memory(_) => "memory",
            Self::Trap(_) => "trap",
            Self::InvalidOutput(_) => "invalid_output",
            Self::Rejected(_) => "rejected",
            Self::Retry(_) => "retry",
        }
    }

    /// Whether this is the plugin's verdict on the event and not a failure of the plugin. Calling
    /// again immediately would return the same verdict.
    pub const fn is_verdict(&self) -> bool {
        matches!(self, Self::Rejected(_) | Self::Retry(_))
    }
}

/// The export that a call uses. A plugin may have both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Filter,
    Router,
}

/// The answer of a plugin.
#[derive(Clone, Debug)]
pub enum Answer {
    Keep,
    /// Holds the reason.
    Drop(String),
    Amend(Box<Amended>),
    Routes(Plan),
}

/// An event as amended by a filter.
#[derive(Clone, Debug)]
pub struct Amended {
    pub event: Event,
    /// `None`: unchanged.
    pub priority: Option<Priority>,
}

/// One event on its way through all plugins.
#[derive(Debug)]
pub struct Call<'a> {
    pub event: &'a Event,
    pub priority: Priority,
    /// The clock shown to the plugin, in milliseconds since the Unix epoch.
    pub clock_ms: u64,
    pub payload: &'a ParsedPayload,
}

/// The payload of an event, parsed at most once for all plugins, when one of them reads a field.
#[derive(Debug, Default)]
pub struct ParsedPayload(Document);

/// A plugin that passed every check.
pub struct Plugin {
    name: Name,
    manifest: Manifest,
    hash: String,
    is_cached: bool,
    selection: Selection,
    config: String,
    limits: Limits,
    engine: Engine,
    component: InstancePre<State>,
    exports: ExportIndices,
    log: Arc<GuestLog>,
}

impl std::fmt::Debug for Plugin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plugin")
            .field("name", &self.name)
            .field("hash", &self.hash)
            .finish_non_exhaustive()
    }
}

/// An instance of a plugin, owned by one thread and reused for many events in sequence.
pub struct Instance {
    store: Store<State>,
    exports: Exports,
    calls_left: u32,
    answer_bytes: usize,
}

impl Instance {
    /// The memory of the instance, in bytes; it never shrinks.
    pub fn memory_bytes(&self) -> usize {
        self.store.data().memory.used
    }

    /// The size of the text in the last answer, in bytes, counted like [`Limits::result_bytes`].
    pub fn answer_bytes(&self) -> usize {
        self.answer_bytes
    }
}

impl std::fmt::Debug for Instance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Instance")
            .field("calls_left", &self.calls_left)
            .finish_non_exhaustive()
    }
}

impl Plugin {
    /// Compiles a core module or a component, checks its imports and exports, creates a first
    /// instance and configures it. Takes a few milliseconds (a small plugin in Rust) to a few
    /// seconds (an interpreter).
    ///
    /// `config`: the operator's configuration, a JSON object.
    ///
    /// # Errors
    /// Why the file was refused and, where there is one, the fix.
    pub fn load(
        engine: &Engine,
        name: Name,
        bytes: &[u8],
        config: &str,
        limits: Limits,
    ) -> Result<Self, LoadError> {
        let mut plugin = Self::prepare(engine, name, bytes, config, limits)?;
        let Description {
            manifest,
            selection,
        } = plugin.trial().map_err(LoadError)?;
        plugin.manifest = manifest;
        plugin.selection = selection;
        Ok(plugin)
    }

    /// The first half of [`Plugin::load`]: everything except the first instance.
    fn prepare(
        engine: &Engine,
        name: Name,
        bytes: &[u8],
        config: &str,
        limits: Limits,
    ) -> Result<Self, LoadError> {
        let hash = hash(bytes);
        let Compiled {
            component,
            has_filter,
            has_router,
            is_cached,
        } = compile(engine, bytes, &hash, &limits).map_err(LoadError)?;
        let component = engine
            .linker()
            .instantiate_pre(&component)
            .map_err(|e| LoadError(format!("cannot be linked to this host: {}", causes(&e))))?;
        let exports = ExportIndices::find(&component, has_filter, has_router)
            .map_err(|e| LoadError(unfit(&e)))?;
        Ok(Self {
            log: Arc::new(GuestLog::new(name.clone())),
            name,
            manifest: Manifest {
                name: String::new(),
                version: String::new(),
                description: String::new(),
                config_schema: None,
            },
            hash,
            is_cached,
            selection: Selection::default(),
            config: config.to_owned(),
            limits,
            engine: engine.clone(),
            component,
            exports,
        })
    }

    pub fn name(&self) -> &Name {
        &self.name
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// SHA-256 of the file, in hexadecimal.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// Makes its log lines distinguishable from those of the active version.
    fn logging_as(self, what: &str) -> Self {
        let name =
            Name::parse(&format!("{} ({what})", self.name)).unwrap_or_else(|_| self.name.clone());
        Self {
            log: Arc::new(GuestLog::new(name)),
            ..self
        }
    }

    /// Whether its code came from the cache instead of being compiled now.
    pub fn is_cached(&self) -> bool {
        self.is_cached
    }

    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    pub fn has_role(&self, role: Role) -> bool {
        match role {
            Role::Filter => self.exports.filter.is_some(),
            Role::Router => self.exports.router.is_some(),
        }
    }

    /// Whether the plugin is called for events of this type.
    pub fn wants(&self, kind: &Name) -> bool {
        self.selection.has_type(kind.as_str())
    }

    /// Calls the plugin for one event, on the instance in the slot or on a fresh one if the slot is
    /// empty. Leaves the slot empty if the instance must not be reused.
    ///
    /// # Errors
    /// [`CallError`]; the call then had no effect other than the time that it took.
    pub fn call(
        &self,
        slot: &mut Option<Instance>,
        ticking: &Ticking,
        role: Role,
        call: &Call<'_>,
    ) -> Result<Answer, CallError> {
        let mut instance = match slot.take() {
            Some(instance) => instance,
            None => self.instantiate(ticking)?,
        };
        let answer = self.ask(&mut instance, ticking, role, call);
        instance.calls_left -= 1;
        // A trapped instance cannot be called again, and one that returned invalid data is not
        // trusted with the next event.
        let is_sound = answer.as_ref().err().is_none_or(CallError::is_verdict);
        if is_sound && instance.calls_left > 0 {
            *slot = Some(instance);
        }
        answer
    }

    fn ask(
        &self,
        Instance {
            store,
            exports,
            answer_bytes,
            ..
        }: &mut Instance,
        ticking: &Ticking,
        role: Role,
        call: &Call<'_>,
    ) -> Result<Answer, CallError> {
        let presented =
            bindings::present(call.event, call.priority, &self.selection, &call.payload.0);
        let state = store.data_mut();
        state.set_clock_ms(call.clock_ms);
        state.event = Some(call.event.id.clone());
        state.last_error = None;
        deadline::set(store, ticking, self.limits.deadline);
        let answer = match role {
            Role::Filter => match exports.evaluate(store, &presented) {
                Some(Ok(verdict)) => {
                    verdict.map(|verdict| bindings::verdict(verdict, call.event, &self.limits))
                }
                Some(Err(error)) => {
                    return Err(self.call_error(&error, store, self.limits.deadline));
                }
                None => return Err(CallError::InvalidOutput("it is not a filter".into())),
            },
            Role::Router => match exports.resolve(store, &presented) {
                Some(Ok(routes)) => routes.map(|routes| {
                    bindings::plan(
                        routes,
                        &self.name,
                        call.priority,
                        call.clock_ms,
                        &self.limits,
                    )
                }),
                Some(Err(error)) => {
                    return Err(self.call_error(&error, store, self.limits.deadline));
                }
                None => return Err(CallError::InvalidOutput("it is not a router".into())),
            },
        };
        match answer {
            Ok(acceptable) => {
                let (answer, bytes) = acceptable.map_err(CallError::InvalidOutput)?;
                *answer_bytes = bytes;
                Ok(answer)
            }
            Err(failure) => Err(match bindings::failure(failure) {
                (reason, false) => CallError::Rejected(reason),
                (reason, true) => CallError::Retry(reason),
            }),
        }
    }

    /// Creates a configured instance, as [`Plugin::call`] does when the slot is empty.
    ///
    /// # Errors
    /// As for [`Plugin::call`].
    pub fn instantiate(&self, ticking: &Ticking) -> Result<Instance, CallError> {
        let (mut store, exports) = self.raw_instance(ticking)?;
        deadline::set(&mut store, ticking, self.limits.setup_deadline);
        match exports.configure(&mut store, &self.config) {
            Ok(Ok(())) => Ok(Instance {
                store,
                exports,
                calls_left: self.limits.calls_per_instance.max(1),
                answer_bytes: 0,
            }),
            Ok(Err(issues)) => Err(CallError::InvalidOutput(format!(
                "a new instance rejected the configuration that the first one accepted: {issues}"
            ))),
            Err(error) => Err(self.call_error(&error, &mut store, self.limits.setup_deadline)),
        }
    }

    fn raw_instance(&self, ticking: &Ticking) -> Result<(Store<State>, Exports), CallError> {
        let mut store = engine::store(
            &self.engine,
            self.limits.memory_bytes,
            handed_back(&self.limits),
            &self.log,
        );
        deadline::set(&mut store, ticking, self.limits.setup_deadline);
        let made = self
            .component
            .instantiate(&mut store)
            .and_then(|instance| self.exports.load(&mut store, &instance));
        made.map_err(|error| self.call_error(&error, &mut store, self.limits.setup_deadline))
            .map(|exports| (store, exports))
    }

    /// Creates the first instance, which shows whether the plugin works at all: records whose
    /// fields do not match the contract fail here and not earlier.
    fn trial(&self) -> Result<Description, String> {
        let ticking = self.engine.ticking();
        let (mut store, exports) = self.raw_instance(&ticking).map_err(|e| match e {
            CallError::InvalidOutput(reason) => reason,
            other => format!("fails to start: {other}"),
        })?;
        let mut step =
            |what: &str, call: &mut dyn FnMut(&mut Store<State>) -> wasmtime::Result<()>| {
                deadline::set(&mut store, &ticking, self.limits.setup_deadline);
                call(&mut store).map_err(|error| {
                    format!(
                        "fails in {what}: {}",
                        self.call_error(&error, &mut store, self.limits.setup_deadline)
                    )
                })
            };
        let (mut before, mut configured, mut after) = (None, None, None);
        step("describe", &mut |store| {
            exports.describe(store).map(|d| before = Some(d))
        })?;
        step("configure", &mut |store| {
            exports
                .configure(store, &self.config)
                .map(|c| configured = Some(c))
        })?;
        if let Some(Err(issues)) = configured {
            return Err(format!("rejects its configuration: {issues}"));
        }
        // Described again: the selection may depend on the configuration.
        step("describe", &mut |store| {
            exports.describe(store).map(|d| after = Some(d))
        })?;
        let (Some(before), Some(after)) = (before, after) else {
            return Err("does not describe itself".to_owned());
        };
        after.selection.check()?;
        if let Some(schema) = &before.manifest.config_schema
            && let Err(error) = serde_json::from_str::<serde::de::IgnoredAny>(schema)
        {
            return Err(format!(
                "has a config-schema that is not valid JSON: {error}"
            ));
        }
        Ok(Description {
            manifest: before.manifest,
            selection: after.selection,
        })
    }

    fn call_error(
        &self,
        error: &wasmtime::Error,
        store: &mut Store<State>,
        deadline: Duration,
    ) -> CallError {
        const MIB: usize = 1024 * 1024;
        let state = store.data_mut();
        if let Some(bytes) = state.memory.refused.take() {
            let most = self.limits.memory_bytes / MIB;
            return CallError::Memory(format!(
                "it requested {} MiB of memory; the limit is {most} (memory_mib)",
                bytes.div_ceil(MIB)
            ));
        }
        let said = state.last_error.take();
        match error.downcast_ref::<Trap>() {
            Some(Trap::Interrupt) => CallError::Deadline(format!(
                "it ran longer than {} ms (deadline)",
                deadline.as_millis()
            )),
            Some(trap) => CallError::Trap(match said {
                Some(said) => format!("it trapped: {said}"),
                None => format!(
                    "it trapped: {}",
                    trap.to_string().trim_start_matches("wasm trap: ")
                ),
            }),
            None => CallError::InvalidOutput(unfit(error)),
        }
    }
}

/// Gives this thread, which calls plugins for work that is not urgent, the lowest CPU priority.
pub(crate) fn make_unimportant() {
    // On Linux, `nice` applies to the calling thread only.
    if let Err(error) = rustix::process::nice(19) {
        tracing::debug!(%error, "cannot lower the priority of a candidate thread");
    }
}

/// SHA-256 in hexadecimal.
fn hash(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

/// The maximum number of bytes that one call may copy out of a guest, measured in the guest's
/// memory layout: enough for every target in a route of its own, whose record takes about 150
/// bytes. The exact limits are checked afterwards.
fn handed_back(limits: &Limits) -> usize {
    limits.result_bytes * 2 + limits.targets * 256 + 64 * 1024
}

fn unfit(error: &wasmtime::Error) -> String {
    let causes = causes(error);
    if causes.contains("fuel allocated for hostcalls") {
        return "its answer exceeds its limits (result_kib, max_targets)".to_owned();
    }
    format!("violates the plugin contract: {causes}")
}

/// The causes of an error without the backtrace, outermost first, on one line.
fn causes(error: &wasmtime::Error) -> String {
    let causes: Vec<String> = error
        .chain()
        .map(|cause| cause.to_string())
        .filter(|cause| !cause.starts_with("error while executing at wasm backtrace"))
        .collect();
    log::printable(&causes.join(": "))
}
