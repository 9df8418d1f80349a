//! The WebAssembly engine and its sandbox, which limits the access, the CPU time and the memory of
//! guests.
//!
//! There is one engine per process. No guest can reach a file, the environment, a network or a real
//! clock, and no host function blocks. [`super::deadline`] enforces the time of a call, `plugin`
//! implements the calls, `plugin::log` handles the output of guests.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::AsyncWrite;
use wasmtime::component::{HasData, Linker, Resource, ResourceTable};
use wasmtime::{
    Config, InstanceAllocationStrategy, PoolingAllocationConfig, ResourceLimiter, Store,
};
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::clocks::{HostMonotonicClock, HostWallClock};
use wasmtime_wasi::p2::bindings::sync::io::poll;
use wasmtime_wasi::p2::{DynPollable, OutputStream, Pollable, StreamResult};
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};

use super::bindings;
use super::cache::Cache;
use super::deadline::{Deadline, Ticker, Ticking};
use super::log::{GuestLog, Level, MAX_LINE};
use crate::event::Name;
use crate::plugin::shadow::MAX_SHADOWS;

/// The maximum number of plugins in a chain; determines the size of the instance pool.
pub(in crate::plugin) const MAX_PLUGINS: usize = 32;
/// The maximum number of threads that run plugins.
pub(in crate::plugin) const MAX_WORKERS: usize = 16;
/// The maximum number of memories per plugin; most have one.
pub(in crate::plugin) const MAX_MEMORIES: usize = 2;
/// The maximum number of tables per plugin.
const MAX_TABLES: usize = 8;
/// The maximum number of elements per table; interpreters compiled to WebAssembly have about ten
/// thousand.
const MAX_TABLE_ELEMENTS: usize = 100_000;
/// A handle that is cheap to clone.
#[derive(Clone)]
pub struct Engine(Arc<Shared>);

struct Shared {
    engine: wasmtime::Engine,
    linker: Linker<State>,
    ticker: Arc<Ticker>,
    cache: Option<Cache>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("is_pooling", &self.is_pooling())
            .finish_non_exhaustive()
    }
}

impl Engine {
    /// Creates the engine with an instance pool if its address space can be reserved (some hundred
    /// GiB, mostly unused), else without one; instances are then slower to create.
    ///
    /// # Errors
    /// The processor or the system lacks a feature that compiled WebAssembly needs.
    pub fn new() -> anyhow::Result<Self> {
        Self::with_cache(None)
    }

    /// As [`Engine::new`], but takes code that was compiled before from this cache.
    ///
    /// # Errors
    /// As [`Engine::new`].
    pub fn with_cache(cache: Option<Cache>) -> anyhow::Result<Self> {
        let engine = match wasmtime::Engine::new(&config(true)) {
            Ok(engine) => engine,
            Err(error) => {
                tracing::info!(%error, "not enough address space for an instance pool; plugin instances are allocated one by one");
                wasmtime::Engine::new(&config(false))?
            }
        };
        let linker = linker(&engine)?;
        let ticker = Ticker::start(engine.weak())?;
        Ok(Self(Arc::new(Shared {
            engine,
            linker,
            ticker,
            cache,
        })))
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

    pub(in crate::plugin) fn wasmtime(&self) -> &wasmtime::Engine {
        &self.0.engine
    }

    pub(in crate::plugin) fn cache(&self) -> Option<&Cache> {
        self.0.cache.as_ref()
    }

    pub(in crate::plugin) fn linker(&self) -> &Linker<State> {
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

fn config(is_pooling: bool) -> Config {
    let mut config = Config::new();
    config.concurrency_support(false);
    config.epoch_interruption(true);
    config.wasm_memory64(false);
    config.wasm_multi_memory(false);
    // Exceptions and shared memories are disabled by leaving out the crate features `gc` and
    // `threads`.
    if is_pooling {
        // Per plugin: one instance per thread, one while a new version is loaded and one for a
        // backtest. Plus one per shadow candidate.
        let n = (MAX_PLUGINS * (Engine::n_workers() + 2) + MAX_SHADOWS) as u32;
        let mut pool = PoolingAllocationConfig::new();
        pool.total_component_instances(n)
            .total_core_instances(n * 32)
            .total_memories(n * MAX_MEMORIES as u32)
            .total_tables(n * MAX_TABLES as u32)
            .total_stacks(1)
            .table_elements(MAX_TABLE_ELEMENTS);
        config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
    }
    config
}

fn linker(engine: &wasmtime::Engine) -> wasmtime::Result<Linker<State>> {
    let mut linker = Linker::new(engine);
    wasmtime_wasi::p2::add_to_linker_sync(&mut linker)?;
    // Deadlines cannot interrupt a host function, so those that block are replaced.
    linker.allow_shadowing(true);
    poll::add_to_linker::<State, NoWaiting>(&mut linker, |state| Unwaiting(&mut state.table))?;
    linker.allow_shadowing(false);
    bindings::add_to_linker(&mut linker)?;
    Ok(linker)
}

/// The host's data for one instance.
pub(in crate::plugin) struct State {
    wasi: WasiCtx,
    table: ResourceTable,
    pub(in crate::plugin) memory: MemoryLimit,
    pub(in crate::plugin) log: Arc<GuestLog>,
    pub(in crate::plugin) deadline: Deadline,
    clock_ms: Arc<AtomicU64>,
    /// The id of the event of the current call.
    pub(in crate::plugin) event: Option<Name>,
    /// The last line that the guest logged as an error in this call; a panic hook logs the message
    /// before the trap.
    pub(in crate::plugin) last_error: Option<String>,
}

impl State {
    pub(in crate::plugin) fn clock_ms(&self) -> u64 {
        self.clock_ms.load(Ordering::Relaxed)
    }

    pub(in crate::plugin) fn set_clock_ms(&mut self, ms: u64) {
        self.clock_ms.store(ms, Ordering::Relaxed);
    }
}

/// Creates a store with all limits in place. `handed_back`: the maximum number of bytes that one
/// call of the guest, or of the host, may copy out of the guest.
pub(in crate::plugin) fn store(
    engine: &Engine,
    memory_bytes: usize,
    handed_back: usize,
    log: &Arc<GuestLog>,
) -> Store<State> {
    let clock_ms = Arc::new(AtomicU64::new(0));
    let mut table = ResourceTable::new();
    table.set_max_capacity(1_000);
    let wasi = WasiCtx::builder()
        .allow_tcp(false)
        .allow_udp(false)
        .max_random_size(64 * 1024)
        .wall_clock(FrozenClock(Arc::clone(&clock_ms)))
        .monotonic_clock(FrozenClock(Arc::clone(&clock_ms)))
        .stdout(GuestOutput {
            log: Arc::clone(log),
            level: Level::Info,
        })
        .stderr(GuestOutput {
            log: Arc::clone(log),
            level: Level::Warn,
        })
        .build();
    let memory = MemoryLimit {
        max: memory_bytes,
        used: 0,
        refused: None,
    };
    let state = State {
        wasi,
        table,
        memory,
        log: Arc::clone(log),
        deadline: Deadline::default(),
        clock_ms,
        event: None,
        last_error: None,
    };
    let mut store = Store::new(engine.wasmtime(), state);
    store.limiter(|state| &mut state.memory);
    store.epoch_deadline_callback(|mut store| Ok(store.data_mut().deadline.look()));
    store.set_hostcall_fuel(handed_back);
    store
}

/// Limits the memory of an instance and records a refusal, because to the guest it looks like any
/// other trap.
pub(in crate::plugin) struct MemoryLimit {
    max: usize,
    pub(in crate::plugin) used: usize,
    /// The total size of the last refused request, in bytes.
    pub(in crate::plugin) refused: Option<usize>,
}

impl ResourceLimiter for MemoryLimit {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        // The limit applies to the sum of all memories of the instance.
        let total = self.used.saturating_sub(current).saturating_add(desired);
        if total > self.max {
            self.refused = Some(total);
            // Trap immediately with this cause: most guests would only abort without mentioning
            // memory.
            return Err(wasmtime::format_err!("memory of {total} bytes refused"));
        }
        self.used = total;
        Ok(true)
    }

    fn table_growing(
        &mut self,
        _current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        if desired > MAX_TABLE_ELEMENTS {
            return Err(wasmtime::format_err!(
                "a table of {desired} elements was requested; the limit is {MAX_TABLE_ELEMENTS}"
            ));
        }
        Ok(true)
    }

    fn instances(&self) -> usize {
        64
    }

    fn tables(&self) -> usize {
        MAX_TABLES
    }

    fn memories(&self) -> usize {
        MAX_MEMORIES
    }
}

impl WasiView for State {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView {
            ctx: &mut self.wasi,
            table: &mut self.table,
        }
    }
}

/// `wasi:clocks`, fixed at the clock of the call, so that a plugin's decision can be reproduced.
struct FrozenClock(Arc<AtomicU64>);

impl HostWallClock for FrozenClock {
    fn resolution(&self) -> Duration {
        Duration::from_millis(1)
    }

    fn now(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }
}

impl HostMonotonicClock for FrozenClock {
    fn resolution(&self) -> u64 {
        1_000_000
    }

    fn now(&self) -> u64 {
        0
    }
}

/// `wasi:io/poll` without blocking: every wait fails.
struct NoWaiting;

impl HasData for NoWaiting {
    type Data<'a> = Unwaiting<'a>;
}

struct Unwaiting<'a>(&'a mut ResourceTable);

fn no_waiting() -> wasmtime::Error {
    wasmtime::format_err!("it waits (wasi:io/poll); plugins must not block")
}

impl poll::Host for Unwaiting<'_> {
    fn poll(&mut self, _: Vec<Resource<DynPollable>>) -> wasmtime::Result<Vec<u32>> {
        Err(no_waiting())
    }
}

impl poll::HostPollable for Unwaiting<'_> {
    fn ready(&mut self, _: Resource<DynPollable>) -> wasmtime::Result<bool> {
        Err(no_waiting())
    }

    fn block(&mut self, _: Resource<DynPollable>) -> wasmtime::Result<()> {
        Err(no_waiting())
    }

    fn drop(&mut self, pollable: Resource<DynPollable>) -> wasmtime::Result<()> {
        poll::HostPollable::drop(self.0, pollable)
    }
}

/// Standard output and error, written to the plugin's log line by line.
#[derive(Clone)]
struct GuestOutput {
    log: Arc<GuestLog>,
    level: Level,
}

impl IsTerminal for GuestOutput {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for GuestOutput {
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        // Only used by WASI preview 3, which is not linked.
        Box::new(tokio::io::sink())
    }

    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(Lines {
            output: self.clone(),
            begun: Vec::new(),
        })
    }
}

struct Lines {
    output: GuestOutput,
    /// A line without its end: at most [`MAX_LINE`] bytes, and one more that marks it as too long.
    begun: Vec<u8>,
}

#[async_trait::async_trait]
impl OutputStream for Lines {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        for &byte in &bytes {
            if byte == b'\n' {
                self.output.log.line(
                    self.output.level,
                    None,
                    &String::from_utf8_lossy(&self.begun),
                );
                self.begun.clear();
            } else if self.begun.len() <= MAX_LINE {
                self.begun.push(byte);
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(64 * 1024)
    }
}

#[async_trait::async_trait]
impl Pollable for Lines {
    async fn ready(&mut self) {}
}
