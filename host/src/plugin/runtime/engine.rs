//! The WebAssembly engine and its sandbox, which limits the access, the CPU time and the memory of
//! guests.
//!
//! There is one engine per process. No guest can reach a file, the environment, a network or a real
//! clock, and no host function blocks. `store` limits one instance, `deadline` the time of a call,
//! and `log` the output of guests; `plugin` implements the calls.

use std::sync::Arc;
use std::thread;

use wasmtime::component::Linker;
use wasmtime::{Config, InstanceAllocationStrategy, PoolingAllocationConfig};
use wasmtime_wasi::p2::bindings::clocks::monotonic_clock;
use wasmtime_wasi::p2::bindings::random;
use wasmtime_wasi::p2::bindings::sync::io::poll;

use super::bindings;
use super::cache::Cache;
use super::compiler::{CompileBudget, CompileIn, Compiler};
use super::deadline::{Ticker, Ticking};
use super::layout::MemoryLayout;
use super::random::SeededRandom;
use super::store::{HostState, MAX_INSTANCES, MAX_MEMORIES, MAX_TABLE_ELEMENTS, MAX_TABLES};
use super::wasi::{NoWaiting, NonBlocking};
use crate::telemetry::metrics::Metrics;

/// The maximum number of plugins in a chain; determines the size of the instance pool.
pub(in crate::plugin) const MAX_PLUGINS: usize = 32;
/// The maximum number of shadow candidates per node.
pub(in crate::plugin) const MAX_SHADOWS: usize = 4;
/// The maximum number of threads that run plugins.
pub(super) const MAX_WORKERS: usize = 16;

/// A handle that is cheap to clone.
#[derive(Clone)]
pub struct Engine(Arc<Shared>);

struct Shared {
    engine: wasmtime::Engine,
    linker: Linker<HostState>,
    ticker: Arc<Ticker>,
    cache: Option<Cache>,
    compiler: Compiler,
}

/// What an [`Engine`] uses beside wasmtime.
#[derive(Debug, Default)]
pub struct EngineOptions {
    /// Code that was compiled before.
    pub cache: Option<Cache>,
    pub compile_in: CompileIn,
    pub budget: CompileBudget,
    pub metrics: Metrics,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("is_pooling", &self.is_pooling())
            .finish_non_exhaustive()
    }
}

impl Engine {
    /// Creates an engine without a cache, whose plugins are compiled on threads of this process.
    ///
    /// # Errors
    /// As [`Engine::with`].
    pub fn new() -> anyhow::Result<Self> {
        Self::with(EngineOptions::default())
    }

    /// Creates the engine with an instance pool if its address space can be reserved (some hundred
    /// GiB, mostly unused). Otherwise instances are allocated one by one, in a layout that reserves
    /// little.
    ///
    /// # Errors
    /// The processor or the system lacks a feature that compiled WebAssembly needs.
    pub fn with(options: EngineOptions) -> anyhow::Result<Self> {
        let (engine, layout) = match wasmtime::Engine::new(&pooling_config()) {
            Ok(engine) => (engine, MemoryLayout::Reserved),
            Err(error) => {
                tracing::warn!(%error, "not enough address space for an instance pool; plugin instances are allocated one by one, and calls take longer (raise `ulimit -v`)");
                let layout = MemoryLayout::Compact;
                (wasmtime::Engine::new(&layout.config())?, layout)
            }
        };
        let linker = linker(&engine)?;
        let ticker = Ticker::start(engine.weak())?;
        Ok(Self(Arc::new(Shared {
            engine,
            linker,
            ticker,
            cache: options.cache,
            compiler: Compiler::new(options.compile_in, layout, options.budget, options.metrics),
        })))
    }

    /// Changes what compiling a file may cost from now on.
    pub(in crate::plugin) fn set_compile_budget(&self, budget: CompileBudget) {
        self.0.compiler.set_budget(budget);
    }

    pub(super) fn compiler(&self) -> &Compiler {
        &self.0.compiler
    }

    /// The number of threads to run plugins on: one per processor, at most `MAX_WORKERS`.
    pub fn n_workers() -> usize {
        thread::available_parallelism()
            .map_or(2, usize::from)
            .min(MAX_WORKERS)
    }

    fn is_pooling(&self) -> bool {
        self.0.engine.get_pooling_config().is_some()
    }

    pub(super) fn wasmtime(&self) -> &wasmtime::Engine {
        &self.0.engine
    }

    pub(super) fn cache(&self) -> Option<&Cache> {
        self.0.cache.as_ref()
    }

    pub(super) fn linker(&self) -> &Linker<HostState> {
        &self.0.linker
    }

    /// Makes time pass for deadlines while the returned value is held. Without one, a call is never
    /// interrupted, so every call requires one.
    pub fn ticking(&self) -> Ticking {
        self.0.ticker.tick_for_a_caller()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.ticker.end();
    }
}

/// The settings of an engine whose instances are taken from a pool.
fn pooling_config() -> Config {
    let mut config = MemoryLayout::Reserved.config();
    // Per plugin: one instance per thread, one while a new version is loaded and one for a
    // backtest. Plus one per shadow candidate.
    let n = (MAX_PLUGINS * (Engine::n_workers() + 2) + MAX_SHADOWS) as u32;
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(n)
        .total_core_instances(n * MAX_INSTANCES as u32)
        .total_memories(n * MAX_MEMORIES as u32)
        .total_tables(n * MAX_TABLES as u32)
        .max_memories_per_module(MAX_MEMORIES as u32)
        .max_tables_per_module(MAX_TABLES as u32)
        .total_stacks(1)
        .table_elements(MAX_TABLE_ELEMENTS);
    config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
    config
}

fn linker(engine: &wasmtime::Engine) -> wasmtime::Result<Linker<HostState>> {
    let mut linker = Linker::new(engine);
    wasmtime_wasi::p2::add_to_linker_sync(&mut linker)?;
    // Deadlines cannot interrupt a host function, so those that block are replaced.
    linker.allow_shadowing(true);
    poll::add_to_linker::<HostState, NoWaiting>(&mut linker, |state| {
        NonBlocking(&mut state.table)
    })?;
    monotonic_clock::add_to_linker::<HostState, NoWaiting>(&mut linker, |state| {
        NonBlocking(&mut state.table)
    })?;
    // Real randomness would make a decision that cannot be reproduced.
    random::random::add_to_linker::<HostState, SeededRandom>(&mut linker, |s| &mut s.random)?;
    random::insecure::add_to_linker::<HostState, SeededRandom>(&mut linker, |s| &mut s.random)?;
    random::insecure_seed::add_to_linker::<HostState, SeededRandom>(&mut linker, |s| {
        &mut s.random
    })?;
    linker.allow_shadowing(false);
    bindings::add_to_linker(&mut linker)?;
    Ok(linker)
}
