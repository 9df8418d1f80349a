//! A loaded plugin: [`Plugin::load`] takes the bytes of a file through every check, [`Plugin::call`] asks it about one event.
//!
//! It promises that a plugin that traps, loops, grows, floods its output or lies costs one call its answer, and nothing else: the instance
//! is thrown away, and the next call has a fresh one. Calls are synchronous and belong on threads of their own, never on an async executor.
//! How bytes become code is `compile`'s business, and where code is kept, [`cache`]'s; which plugins there are, and in which version,
//! [`registry`]'s, and when that changes, [`watcher`]'s; what becomes of an event when one fails, `pipeline`'s.

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

/// The largest file of a plugin, in bytes: components made of JavaScript have 13 MB, of Python up to 35.
pub const MAX_FILE_BYTES: usize = 64 * 1024 * 1024;

/// An event is tried this often by a plugin that fails, the last time on a fresh instance.
pub(crate) const ATTEMPTS: u32 = 2;

/// What one call of a plugin may cost.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// How long a call about an event may run.
    pub deadline: Duration,
    /// How long making an instance, `describe` and `configure` may each run.
    pub setup_deadline: Duration,
    /// The most memory of an instance, in bytes.
    pub memory_bytes: usize,
    /// The most text in an answer, in bytes.
    pub result_bytes: usize,
    /// The most targets in an answer.
    pub targets: usize,
    /// Calls after which an instance is replaced by a fresh one.
    pub calls_per_instance: u32,
    /// The largest file, in bytes.
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

/// What a plugin says of itself: printable, and otherwise not to be believed.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    pub name: String,
    pub version: String,
    pub description: String,
    /// A JSON Schema of the configuration, for tools. The plugin itself checks its configuration as it parses it.
    pub config_schema: Option<String>,
}

/// Why a file is not a plugin that can run here. Reads as the end of a sentence that begins with the file's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct LoadError(String);

/// Whether the folder of plugins can be read.
///
/// # Errors
/// One line that names it, with the fix.
pub fn check_folder(dir: &Path) -> Result<(), String> {
    registry::folder::look(dir).map(drop)
}

/// Why a call has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// It ran longer than it may.
    #[error("{0}")]
    Deadline(String),
    /// It asked for more memory than it may have.
    #[error("{0}")]
    Memory(String),
    /// It trapped: a panic, mostly.
    #[error("{0}")]
    Trap(String),
    /// Its answer, or what it did, is not acceptable.
    #[error("{0}")]
    Refused(String),
    /// It says itself that it cannot decide, and never will.
    #[error("{0}")]
    Rejected(String),
    /// It says itself that it cannot decide now.
    #[error("{0}")]
    Retry(String),
}

impl CallError {
    /// The word for it in metrics; of a verdict, in decision records, too.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Deadline(_) => "deadline",
            Self::Memory(_) => "memory",
            Self::Trap(_) => "trap",
            Self::Refused(_) => "refused",
            Self::Rejected(_) => "rejected",
            Self::Retry(_) => "retry",
        }
    }

    /// Whether the plugin works, and this is what it says of the event: it would say so again.
    pub const fn is_verdict(&self) -> bool {
        matches!(self, Self::Rejected(_) | Self::Retry(_))
    }
}

/// Which of its two exports a plugin is called by. One may have both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Filter,
    Router,
}

/// What a plugin answered.
#[derive(Clone, Debug)]
pub enum Answer {
    Keep,
    /// With the reason.
    Drop(String),
    Amend(Box<Amended>),
    Routes(Plan),
}

/// An event as a filter wants it.
#[derive(Clone, Debug)]
pub struct Amended {
    pub event: Event,
    /// `None`: as it was.
    pub priority: Option<Priority>,
}

/// One event on its way through all plugins.
#[derive(Debug)]
pub struct Call<'a> {
    pub event: &'a Event,
    pub priority: Priority,
    /// The clock that the plugin is shown, in milliseconds since the Unix epoch.
    pub clock_ms: u64,
    pub payload: &'a ParsedPayload,
}

/// The payload of an event, parsed once for all plugins, if one asks for a field of it.
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

/// An instance of a plugin, for one thread: it is called about many events, one after the other.
pub struct Instance {
    store: Store<State>,
    exports: Exports,
    calls_left: u32,
    answer_bytes: usize,
}

impl Instance {
    /// The memory that it has, in bytes; it never has less again.
    pub fn memory_bytes(&self) -> usize {
        self.store.data().memory.used
    }

    /// The text in its last answer, in bytes, as [`Limits::result_bytes`] counts it.
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
    /// Compiles a core module or a component, looks at what it wants and has, makes a trial instance and configures it.
    /// Takes from some milliseconds (a small plugin in Rust) to some seconds (an interpreter).
    ///
    /// `config`: the operator's configuration, a JSON object.
    ///
    /// # Errors
    /// Why not, and where there is one, the fix.
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

    /// The first half of [`Plugin::load`]: everything but a trial.
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
            .map_err(|e| LoadError(format!("does not fit this host: {}", causes(&e))))?;
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

    /// Has its lines in the log told apart from those of the version at work.
    fn logging_as(self, what: &str) -> Self {
        let name =
            Name::parse(&format!("{} ({what})", self.name)).unwrap_or_else(|_| self.name.clone());
        Self {
            log: Arc::new(GuestLog::new(name)),
            ..self
        }
    }

    /// Whether its code came from the cache, and was not compiled now.
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

    /// Whether the plugin wants to be asked about events of this type.
    pub fn wants(&self, kind: &Name) -> bool {
        self.selection.has_type(kind.as_str())
    }

    /// Asks the plugin about one event, on the instance in the slot, or on a fresh one if it is empty. The slot is empty afterwards if the
    /// instance is not to be used again.
    ///
    /// # Errors
    /// [`CallError`]; nothing has happened then but the time that it took.
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
        // After a trap, an instance answers nothing any more; after a strange answer, who knows.
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
                None => return Err(CallError::Refused("it is no filter".into())),
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
                None => return Err(CallError::Refused("it is no router".into())),
            },
        };
        match answer {
            Ok(acceptable) => {
                let (answer, bytes) = acceptable.map_err(CallError::Refused)?;
                *answer_bytes = bytes;
                Ok(answer)
            }
            Err(failure) => Err(match bindings::failure(failure) {
                (reason, false) => CallError::Rejected(reason),
                (reason, true) => CallError::Retry(reason),
            }),
        }
    }

    /// A configured instance, as [`Plugin::call`] makes one where the slot is empty.
    ///
    /// # Errors
    /// As there.
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
            Ok(Err(issues)) => Err(CallError::Refused(format!(
                "a new instance refuses the configuration that its first one took: {issues}"
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

    /// The first instance, which shows whether the plugin can work: what does not fit in its records fails here and not before.
    fn trial(&self) -> Result<Description, String> {
        let ticking = self.engine.ticking();
        let (mut store, exports) = self.raw_instance(&ticking).map_err(|e| match e {
            CallError::Refused(reason) => reason,
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
            return Err(format!("refuses its configuration: {issues}"));
        }
        // What it reads may depend on the configuration.
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
            return Err(format!("has a config-schema that is not JSON: {error}"));
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
                "it asked for {} MiB of memory; {most} is the most (memory_mib)",
                bytes.div_ceil(MIB)
            ));
        }
        let said = state.last_error.take();
        match error.downcast_ref::<Trap>() {
            Some(Trap::Interrupt) => CallError::Deadline(format!(
                "it ran longer than {} ms (deadline_ms)",
                deadline.as_millis()
            )),
            Some(trap) => CallError::Trap(match said {
                Some(said) => format!("it trapped: {said}"),
                None => format!(
                    "it trapped: {}",
                    trap.to_string().trim_start_matches("wasm trap: ")
                ),
            }),
            None => CallError::Refused(unfit(error)),
        }
    }
}

/// Lets every other thread go before this one, which asks plugins about what is not urgent.
pub(crate) fn make_unimportant() {
    // On Linux, of this thread only.
    if let Err(error) = rustix::process::nice(19) {
        tracing::debug!(%error, "a thread that asks candidates is as important as others");
    }
}

/// SHA-256 in hexadecimal.
fn hash(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

/// The most bytes that one call may copy out of a guest, in memory as the guest has it: enough for every target in a route of its own, whose
/// record is some 150 bytes. What is within is then counted exactly.
fn handed_back(limits: &Limits) -> usize {
    limits.result_bytes * 2 + limits.targets * 256 + 64 * 1024
}

fn unfit(error: &wasmtime::Error) -> String {
    let causes = causes(error);
    if causes.contains("fuel allocated for hostcalls") {
        return "its answer is larger than it may be (result_kib, max_targets)".to_owned();
    }
    format!("does not keep the contract: {causes}")
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
