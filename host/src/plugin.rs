//! A loaded plugin: [`Plugin::load`] takes the bytes of a file through every check, [`Plugin::call`] asks it about one event.
//!
//! It promises that a plugin that traps, loops, grows, floods its output or lies costs one call its answer, and nothing else: the instance
//! is thrown away, and the next call has a fresh one. Calls are synchronous and belong on threads of their own, never on an async executor.
//! Which plugins there are, and in which version, is [`registry`]'s business, and when that changes, [`watcher`]'s; what becomes of an event when one fails, `pipeline`'s.

use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};
use wasmtime::component::{Component, InstancePre};
use wasmtime::{Store, Trap};

mod bindings;
pub mod contract;
mod engine;
mod folder;
pub mod generation;
pub mod health;
pub mod inspection;
mod log;
mod noop;
pub mod registry;
mod selection;
pub mod settings;
pub mod state;
pub mod watcher;

pub use engine::{Engine, Ticking};
pub use folder::called;
pub use noop::noop;
pub use selection::Selection;

use self::bindings::{Description, ExportIndices, Exports};
use self::engine::State;
use self::log::GuestLog;
use self::selection::Document;
use crate::event::{Event, Name, Plan, Priority};

/// The largest file of a plugin, in bytes: components made of JavaScript have 13 MB, of Python up to 35.
pub const MAX_FILE_BYTES: usize = 64 * 1024 * 1024;

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
    /// The word for it in metrics.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Deadline(_) => "deadline",
            Self::Memory(_) => "memory",
            Self::Trap(_) => "trap",
            Self::Refused(_) => "refused",
            Self::Rejected(_) | Self::Retry(_) => "failed",
        }
    }
}

/// Which of its two exports a plugin is called by. One may have both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
        f.debug_struct("Plugin").field("name", &self.name).field("hash", &self.hash).finish_non_exhaustive()
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
        f.debug_struct("Instance").field("calls_left", &self.calls_left).finish_non_exhaustive()
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
    pub fn load(engine: &Engine, name: Name, bytes: &[u8], config: &str, limits: Limits) -> Result<Self, LoadError> {
        let mut plugin = Self::prepare(engine, name, bytes, config, limits)?;
        let Description { manifest, selection } = plugin.trial().map_err(LoadError)?;
        plugin.manifest = manifest;
        plugin.selection = selection;
        Ok(plugin)
    }

    /// The first half of [`Plugin::load`]: everything but a trial.
    fn prepare(engine: &Engine, name: Name, bytes: &[u8], config: &str, limits: Limits) -> Result<Self, LoadError> {
        let component = compile(engine, bytes, &limits).map_err(LoadError)?;
        let (has_filter, has_router) = inspect(engine, &component).map_err(LoadError)?;
        let component =
            engine.linker().instantiate_pre(&component).map_err(|e| LoadError(format!("does not fit this host: {}", causes(&e))))?;
        let exports = ExportIndices::find(&component, has_filter, has_router).map_err(|e| LoadError(unfit(&e)))?;
        Ok(Self {
            log: Arc::new(GuestLog::new(name.clone())),
            name,
            manifest: Manifest { name: String::new(), version: String::new(), description: String::new(), config_schema: None },
            hash: hash(bytes),
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
    pub fn call(&self, slot: &mut Option<Instance>, ticking: &Ticking, role: Role, call: &Call<'_>) -> Result<Answer, CallError> {
        let mut instance = match slot.take() {
            Some(instance) => instance,
            None => self.instantiate(ticking)?,
        };
        let answer = self.ask(&mut instance, ticking, role, call);
        instance.calls_left -= 1;
        // After a trap, an instance answers nothing any more; after a strange answer, who knows.
        let is_sound = matches!(answer, Ok(_) | Err(CallError::Rejected(_) | CallError::Retry(_)));
        if is_sound && instance.calls_left > 0 {
            *slot = Some(instance);
        }
        answer
    }

    fn ask(
        &self,
        Instance { store, exports, answer_bytes, .. }: &mut Instance,
        ticking: &Ticking,
        role: Role,
        call: &Call<'_>,
    ) -> Result<Answer, CallError> {
        let presented = bindings::present(call.event, call.priority, &self.selection, &call.payload.0);
        let state = store.data_mut();
        state.set_clock_ms(call.clock_ms);
        state.event = Some(call.event.id.clone());
        state.last_error = None;
        engine::set_deadline(store, ticking, self.limits.deadline);
        let answer = match role {
            Role::Filter => match exports.evaluate(store, &presented) {
                Some(Ok(verdict)) => verdict.map(|verdict| bindings::verdict(verdict, call.event, &self.limits)),
                Some(Err(error)) => return Err(self.call_error(&error, store, self.limits.deadline)),
                None => return Err(CallError::Refused("it is no filter".into())),
            },
            Role::Router => match exports.resolve(store, &presented) {
                Some(Ok(routes)) => routes.map(|routes| bindings::plan(routes, &self.name, call.priority, call.clock_ms, &self.limits)),
                Some(Err(error)) => return Err(self.call_error(&error, store, self.limits.deadline)),
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
        engine::set_deadline(&mut store, ticking, self.limits.setup_deadline);
        match exports.configure(&mut store, &self.config) {
            Ok(Ok(())) => Ok(Instance { store, exports, calls_left: self.limits.calls_per_instance.max(1), answer_bytes: 0 }),
            Ok(Err(issues)) => {
                Err(CallError::Refused(format!("a new instance refuses the configuration that its first one took: {issues}")))
            }
            Err(error) => Err(self.call_error(&error, &mut store, self.limits.setup_deadline)),
        }
    }

    fn raw_instance(&self, ticking: &Ticking) -> Result<(Store<State>, Exports), CallError> {
        let mut store = engine::store(&self.engine, self.limits.memory_bytes, handed_back(&self.limits), &self.log);
        engine::set_deadline(&mut store, ticking, self.limits.setup_deadline);
        let made = self.component.instantiate(&mut store).and_then(|instance| self.exports.load(&mut store, &instance));
        made.map_err(|error| self.call_error(&error, &mut store, self.limits.setup_deadline)).map(|exports| (store, exports))
    }

    /// The first instance, which shows whether the plugin can work: what does not fit in its records fails here and not before.
    fn trial(&self) -> Result<Description, String> {
        let ticking = self.engine.ticking();
        let (mut store, exports) = self.raw_instance(&ticking).map_err(|e| match e {
            CallError::Refused(reason) => reason,
            other => format!("fails to start: {other}"),
        })?;
        let mut step = |what: &str, call: &mut dyn FnMut(&mut Store<State>) -> wasmtime::Result<()>| {
            engine::set_deadline(&mut store, &ticking, self.limits.setup_deadline);
            call(&mut store)
                .map_err(|error| format!("fails in {what}: {}", self.call_error(&error, &mut store, self.limits.setup_deadline)))
        };
        let (mut before, mut configured, mut after) = (None, None, None);
        step("describe", &mut |store| exports.describe(store).map(|d| before = Some(d)))?;
        step("configure", &mut |store| exports.configure(store, &self.config).map(|c| configured = Some(c)))?;
        if let Some(Err(issues)) = configured {
            return Err(format!("refuses its configuration: {issues}"));
        }
        // What it reads may depend on the configuration.
        step("describe", &mut |store| exports.describe(store).map(|d| after = Some(d)))?;
        let (Some(before), Some(after)) = (before, after) else { return Err("does not describe itself".to_owned()) };
        after.selection.check()?;
        if let Some(schema) = &before.manifest.config_schema
            && let Err(error) = serde_json::from_str::<serde::de::IgnoredAny>(schema)
        {
            return Err(format!("has a config-schema that is not JSON: {error}"));
        }
        Ok(Description { manifest: before.manifest, selection: after.selection })
    }

    fn call_error(&self, error: &wasmtime::Error, store: &mut Store<State>, deadline: Duration) -> CallError {
        const MIB: usize = 1024 * 1024;
        let state = store.data_mut();
        if let Some(bytes) = state.memory.refused.take() {
            let most = self.limits.memory_bytes / MIB;
            return CallError::Memory(format!("it asked for {} MiB of memory; {most} is the most (memory_mib)", bytes.div_ceil(MIB)));
        }
        let said = state.last_error.take();
        match error.downcast_ref::<Trap>() {
            Some(Trap::Interrupt) => CallError::Deadline(format!("it ran longer than {} ms (deadline_ms)", deadline.as_millis())),
            Some(trap) => CallError::Trap(match said {
                Some(said) => format!("it trapped: {said}"),
                None => format!("it trapped: {}", trap.to_string().trim_start_matches("wasm trap: ")),
            }),
            None => CallError::Refused(unfit(error)),
        }
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

/// From bytes of a file to compiled code.
fn compile(engine: &Engine, bytes: &[u8], limits: &Limits) -> Result<Component, String> {
    const MIB: usize = 1024 * 1024;
    if bytes.is_empty() {
        return Err("is empty".to_owned());
    }
    if bytes.len() > limits.file_bytes {
        return Err(format!("has {} MiB; {} is the most", bytes.len().div_ceil(MIB), limits.file_bytes / MIB));
    }
    if !bytes.starts_with(b"\0asm") {
        return Err("is no WebAssembly: it does not begin with '\\0asm'".to_owned());
    }
    // Looked through before anything is made of it, for a clear word about a file that is still being written.
    wasmparser::Validator::new().validate_all(bytes).map_err(|error| format!("is truncated or damaged: {error}"))?;
    let encoded;
    let component = if wasmparser::Parser::is_component(bytes) {
        bytes
    } else {
        let encoder = wit_component::ComponentEncoder::default().module(bytes);
        encoded = encoder
            .and_then(|mut encoder| encoder.encode())
            .map_err(|e| format!("is a core module that cannot be made a component: {e:#}"))?;
        &encoded
    };
    Component::from_binary(engine.wasmtime(), component).map_err(|e| format!("does not compile: {}", causes(&e)))
}

/// Whether plugins are granted what they import under this name.
fn is_granted(import: &str) -> bool {
    const GRANTED: [&str; 9] = [
        "pointsman:plugin/types@",
        "pointsman:plugin/log@",
        "pointsman:plugin/clock@",
        "wasi:cli/",
        "wasi:clocks/",
        "wasi:filesystem/",
        "wasi:io/",
        "wasi:random/",
        "wasi:sockets/",
    ];
    GRANTED.iter().any(|granted| import.starts_with(granted))
}

/// Whether a component's imports are granted, and what it exports: a filter, a router or both.
fn inspect(engine: &Engine, component: &Component) -> Result<(bool, bool), String> {
    let ty = component.component_type();
    let imports: Vec<&str> = ty.imports(engine.wasmtime()).map(|(name, _)| name).collect();
    let exports: Vec<&str> = ty.exports(engine.wasmtime()).map(|(name, _)| name).collect();
    for name in imports.iter().chain(&exports) {
        let version = name.strip_prefix("pointsman:plugin/").and_then(|rest| rest.split_once('@')).map(|(_, version)| version);
        if let Some(version) =
            version.filter(|version| *version != bindings::VERSION && !version.starts_with(&format!("{}.", bindings::VERSION)))
        {
            let built_for = version.splitn(3, '.').take(2).collect::<Vec<_>>().join(".");
            return Err(format!("was built for pointsman:plugin {built_for}; this host speaks {}", bindings::VERSION));
        }
    }
    if let Some(foreign) = imports.iter().find(|name| !is_granted(name)) {
        return Err(format!("imports {}, which plugins are not granted", foreign.escape_debug()));
    }
    let has = |interface: &str| {
        exports.iter().any(|name| {
            name.strip_prefix("pointsman:plugin/").and_then(|rest| rest.split_once('@')).is_some_and(|(name, _)| name == interface)
        })
    };
    let (is_filter, is_router) = (has("filter"), has("router"));
    if !is_filter && !is_router {
        return Err("exports neither pointsman:plugin/filter nor pointsman:plugin/router; a plugin in Rust does so with `pointsman_plugin::export!`".to_owned());
    }
    if !has("lifecycle") {
        return Err("does not export pointsman:plugin/lifecycle, by which it is configured".to_owned());
    }
    if let Some(resources) = component.resources_required()
        && resources.num_memories as usize > engine::MAX_MEMORIES
    {
        return Err(format!("has {} memories; {} is the most", resources.num_memories, engine::MAX_MEMORIES));
    }
    Ok((is_filter, is_router))
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
