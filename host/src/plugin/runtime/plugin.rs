//! A loaded plugin: [`Plugin::load`] checks and compiles a plugin file, [`Plugin::call`] evaluates
//! one event.
//!
//! A plugin that traps, loops, exhausts its memory, floods its output or returns invalid data costs
//! only that call: its instance is discarded and the next call gets a fresh one. Calls are
//! synchronous and must run on a dedicated thread, never on an async executor.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use sha2::{Digest, Sha256};
use wasmtime::component::InstancePre;
use wasmtime::{Store, Trap};

use super::bindings::{self, ExportIndices, Exports};
use super::call::{Answer, Call, CallError, Role};
use super::compile::{Compiled, compile};
use super::compiler::Compilation;
use super::deadline::Ticking;
use super::engine::Engine;
use super::error::{
    Function, LoadError, causes, contain_panic, contract_violation, frames, is_lack_of_host,
};
use super::limits::Limits;
use super::log::{GuestLog, printable};
use super::manifest::{Description, Manifest};
use super::profiler::Profiler;
use super::schema::Schema;
use super::selection::Selection;
use super::store::{HostState, set_deadline, store};
use super::translate::has_other_version;
use crate::event::Name;

/// A plugin that passed every check.
pub struct Plugin {
    name: Name,
    manifest: Manifest,
    hash: String,
    compile_time: Option<Duration>,
    /// A change of the configuration loads the same file again.
    _code: Compilation,
    selection: Selection,
    config: String,
    config_hash: String,
    limits: Limits,
    engine: Engine,
    component: InstancePre<HostState>,
    exports: ExportIndices,
    log: Arc<GuestLog>,
    /// `None`: its calls are not sampled.
    profiler: Option<Profiler>,
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
    store: Store<HostState>,
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
            ..
        } = plugin.check_first_instance()?;
        plugin.manifest = manifest;
        plugin.selection = selection;
        Ok(plugin)
    }

    /// Compiles a file into the engine's cache without loading it. Returns how long that took;
    /// `None`: the code was there.
    ///
    /// # Errors
    /// Why the file was refused.
    pub fn compile(
        engine: &Engine,
        bytes: &[u8],
        limits: &Limits,
    ) -> Result<Option<Duration>, LoadError> {
        compile(engine, bytes, &file_hash(bytes), limits).map(|compiled| compiled.time)
    }

    /// The first half of [`Plugin::load`]: everything except the first instance.
    pub(in crate::plugin) fn prepare(
        engine: &Engine,
        name: Name,
        bytes: &[u8],
        config: &str,
        limits: Limits,
    ) -> Result<Self, LoadError> {
        let hash = file_hash(bytes);
        let (component, exports, compile_time, code) = contain_panic(|| {
            let Compiled {
                component,
                has_filter,
                has_router,
                time,
                code,
            } = compile(engine, bytes, &hash, &limits)?;
            let linked = if has_other_version(engine.wasmtime(), &component) {
                let mut linker = engine.linker().clone();
                linker
                    .define_unknown_imports_as_traps(&component)
                    .and_then(|()| linker.instantiate_pre(&component))
            } else {
                engine.linker().instantiate_pre(&component)
            };
            let component = linked.map_err(|e| {
                LoadError::of_file(format!("cannot be linked to this host: {}", causes(&e)))
            })?;
            let exports = ExportIndices::find(&component, has_filter, has_router)
                .map_err(|e| LoadError::of_file(contract_violation(&e)))?;
            Ok((component, exports, time, code))
        })?;
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
            compile_time,
            _code: code,
            selection: Selection::default(),
            config: config.to_owned(),
            config_hash: file_hash(config.as_bytes()),
            limits,
            engine: engine.clone(),
            component,
            exports,
            profiler: None,
        })
    }

    /// Samples the stack of the guest in all calls from now on, once per millisecond.
    ///
    /// # Errors
    /// wasmtime cannot read the symbols of the code.
    pub fn with_profiler(self) -> anyhow::Result<Self> {
        let profiler = Profiler::new(
            self.engine.wasmtime(),
            self.name.as_str(),
            self.component.component(),
        )?;
        Ok(Self {
            profiler: Some(profiler),
            ..self
        })
    }

    /// Writes what [`Plugin::with_profiler`] sampled, in the format of the Firefox profiler, and
    /// returns the number of samples. All instances must have been dropped.
    ///
    /// # Errors
    /// Nothing was sampled, an instance is left, or the profile cannot be written.
    pub fn finish_profile(self, output: impl std::io::Write) -> anyhow::Result<usize> {
        let profiler = self.profiler.context("the calls were not sampled")?;
        profiler.finish(output)
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

    /// SHA-256 of the configuration as JSON, in hexadecimal.
    pub fn config_hash(&self) -> &str {
        &self.config_hash
    }

    /// Makes its log lines distinguishable from those of the active version.
    pub(in crate::plugin) fn logging_as(self, suffix: &str) -> Self {
        let name =
            Name::parse(&format!("{} ({suffix})", self.name)).unwrap_or_else(|_| self.name.clone());
        Self {
            log: Arc::new(GuestLog::new(name)),
            ..self
        }
    }

    /// Whether its code was there, in the cache or in memory, instead of being compiled now.
    pub fn is_cached(&self) -> bool {
        self.compile_time.is_none()
    }

    /// How long compiling it took; `None`: its code was there.
    pub fn compile_time(&self) -> Option<Duration> {
        self.compile_time
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
        let answer = self.call_instance(&mut instance, ticking, role, call);
        instance.calls_left -= 1;
        // A trapped instance cannot be called again, and one that returned invalid data is not
        // trusted with the next event.
        let is_sound = answer.as_ref().err().is_none_or(CallError::is_verdict);
        if is_sound && instance.calls_left > 0 {
            *slot = Some(instance);
        }
        answer
    }

    fn call_instance(
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
        state.begin_call(&call.event.id, call.clock_ms);
        set_deadline(store, ticking, self.limits.deadline);
        let answer = match role {
            Role::Filter => match exports.evaluate(store, &presented) {
                Some(Ok(verdict)) => {
                    verdict.map(|verdict| bindings::verdict(verdict, call.event, &self.limits))
                }
                Some(Err(error)) => {
                    return Err(self.call_error(&error, store, Function::Evaluate));
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
                    return Err(self.call_error(&error, store, Function::Resolve));
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
        set_deadline(&mut store, ticking, self.limits.setup_deadline);
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
            Err(error) => Err(self.call_error(&error, &mut store, Function::Configure)),
        }
    }

    fn raw_instance(&self, ticking: &Ticking) -> Result<(Store<HostState>, Exports), CallError> {
        let mut store = store(
            self.engine.wasmtime(),
            self.limits.memory_bytes,
            hostcall_bytes(&self.limits),
            &self.name,
            &self.log,
        );
        store.data_mut().profiler.clone_from(&self.profiler);
        set_deadline(&mut store, ticking, self.limits.setup_deadline);
        let made = self
            .component
            .instantiate(&mut store)
            .and_then(|instance| self.exports.load(&mut store, &instance));
        made.map_err(|error| self.call_error(&error, &mut store, Function::Start))
            .map(|exports| (store, exports))
    }

    /// Creates the first instance, which shows whether the plugin works at all: records whose
    /// fields do not match the contract fail here and not earlier.
    pub(in crate::plugin) fn check_first_instance(&self) -> Result<Description, LoadError> {
        contain_panic(|| self.describe_first_instance())
    }

    fn describe_first_instance(&self) -> Result<Description, LoadError> {
        let ticking = self.engine.ticking();
        let (mut store, exports) = self.raw_instance(&ticking).map_err(|e| match e {
            CallError::HostMemory(reason) => LoadError::of_host(format!("waits: {reason}")),
            CallError::InvalidOutput(reason) => LoadError::of_file(reason),
            other => LoadError::of_file(format!("fails to start: {other}")),
        })?;
        let mut step =
            |function: Function,
             call: &mut dyn FnMut(&mut Store<HostState>) -> wasmtime::Result<()>| {
                set_deadline(&mut store, &ticking, self.limits.setup_deadline);
                call(&mut store).map_err(|error| {
                    match self.call_error(&error, &mut store, function) {
                        CallError::HostMemory(reason) => {
                            LoadError::of_host(format!("waits: {reason}"))
                        }
                        other => {
                            LoadError::of_file(format!("fails in {}: {other}", function.name()))
                        }
                    }
                })
            };
        let (mut before, mut configured, mut after) = (None, None, None);
        step(Function::Describe, &mut |store| {
            exports.describe(store).map(|d| before = Some(d))
        })?;
        let schema = before
            .as_ref()
            .and_then(|description: &Description| description.manifest.config_schema.as_deref())
            .map(Schema::parse)
            .transpose()
            .map_err(LoadError::of_file)?;
        let mismatch = match &schema {
            Some(schema) => self.check_config(schema).map_err(LoadError::of_file),
            None => Ok(()),
        };
        let called = step(Function::Configure, &mut |store| {
            exports
                .configure(store, &self.config)
                .map(|c| configured = Some(c))
        });
        // A plugin that traps on a configuration that its schema excludes failed for that reason.
        if called.is_err() {
            mismatch.clone()?;
        }
        called?;
        // The plugin's own words first: it knows more about its configuration than the schema.
        if let Some(Err(issues)) = configured {
            return Err(LoadError::of_file(format!(
                "rejects its configuration: {issues}"
            )));
        }
        mismatch?;
        // Described again: the selection may depend on the configuration.
        step(Function::Describe, &mut |store| {
            exports.describe(store).map(|d| after = Some(d))
        })?;
        let (Some(before), Some(after)) = (before, after) else {
            return Err(LoadError::of_file("does not describe itself"));
        };
        after.selection.check().map_err(LoadError::of_file)?;
        for warning in after.selection.odd_texts() {
            tracing::warn!(plugin.name = self.name.as_str(), "{warning}");
        }
        if let Some(problem) = [&before, &after]
            .into_iter()
            .find_map(|d| d.unknown_option.clone())
        {
            return Err(LoadError::of_file(problem));
        }
        Ok(Description {
            manifest: before.manifest,
            selection: after.selection,
            unknown_option: None,
        })
    }

    fn check_config(&self, schema: &Schema) -> Result<(), String> {
        let config = serde_json::from_str(&self.config)
            .map_err(|e| format!("has a configuration that is not valid JSON: {e}"))?;
        schema.check(&config)
    }

    /// The manifest of an unconfigured instance.
    pub(in crate::plugin) fn unconfigured_manifest(&self) -> Option<Manifest> {
        let ticking = self.engine.ticking();
        let (mut store, exports) = self.raw_instance(&ticking).ok()?;
        set_deadline(&mut store, &ticking, self.limits.setup_deadline);
        exports
            .describe(&mut store)
            .ok()
            .map(|description| description.manifest)
    }

    fn call_error(
        &self,
        error: &wasmtime::Error,
        store: &mut Store<HostState>,
        function: Function,
    ) -> CallError {
        const MIB: usize = 1024 * 1024;
        let state = store.data_mut();
        let message = state.last_error.take();
        let traces = traces(error, state, message.is_some());
        if let Some(bytes) = state.memory.refused.take() {
            let most = self.limits.memory_bytes / MIB;
            return CallError::Memory(format!(
                "it requested {} MiB of memory; the limit is {most} (memory_mib){traces}",
                bytes.div_ceil(MIB)
            ));
        }
        let lacking = state.memory.lacking.take();
        if let Some(reason) = lacking.or_else(|| is_lack_of_host(error).then(|| causes(error))) {
            return CallError::HostMemory(format!(
                "the host has no memory for an instance of it ({reason}); give the process more (ulimit -v, the limit of its container), or use less (memory_mib, fewer plugins)"
            ));
        }
        match error.downcast_ref::<Trap>() {
            Some(Trap::Interrupt) => {
                let deadline = match function {
                    Function::Evaluate | Function::Resolve => self.limits.deadline,
                    Function::Start | Function::Describe | Function::Configure => {
                        self.limits.setup_deadline
                    }
                };
                CallError::Deadline(format!(
                    "it ran longer than {} ms (deadline){traces}",
                    deadline.as_millis()
                ))
            }
            Some(trap) => {
                let trap = trap.to_string();
                let cause = message.as_deref().unwrap_or(&trap);
                let cause = cause.trim_start_matches("wasm trap: ");
                CallError::Trap(format!("it trapped: {cause}{traces}"))
            }
            None => CallError::InvalidOutput(format!(
                "{}{}{traces}",
                contract_violation(error),
                function.place(error)
            )),
        }
    }
}

/// What the guest left behind: its innermost functions unless it logged a message, the last lines
/// of its standard error, and the event.
fn traces(error: &wasmtime::Error, state: &HostState, has_message: bool) -> String {
    let mut traces = String::new();
    // Those of a panic are of the panic's own machinery.
    let frames = if has_message {
        Vec::new()
    } else {
        frames(error)
    };
    if !frames.is_empty() {
        traces += &format!("; in {}", frames.join(" < "));
    }
    let lines = state.last_stderr_lines();
    if !lines.is_empty() {
        traces += &format!("; stderr: {}", lines.join(" | "));
    }
    if let Some(event) = &state.event {
        traces += &format!("; event {}", printable(event.as_str()));
    }
    traces
}

/// The length of a hash in decision records and reports, in hex digits.
const SHORT_HASH: usize = 12;

/// The first digits of a hash, as decision records and reports show it.
pub(in crate::plugin) fn short_hash(hash: &str) -> String {
    hash.get(..SHORT_HASH).unwrap_or_default().to_owned()
}

/// SHA-256 in hexadecimal.
pub(in crate::plugin) fn file_hash(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}

/// The maximum number of bytes that one call may copy out of a guest, measured in the guest's
/// memory layout: enough for every target in a route of its own, whose record takes about 150
/// bytes. The exact limits are checked afterwards.
fn hostcall_bytes(limits: &Limits) -> usize {
    limits.result_bytes * 2 + limits.targets * 256 + 64 * 1024
}
