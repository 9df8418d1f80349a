//! The WebAssembly engine and its fences: what a guest may use, how long it may run, how much memory it may have.
//!
//! There is one engine in a process. It promises that no guest reaches a file, the environment, a network or a real clock, and that no
//! function of the host blocks. How long a call may run is kept by [`super::deadline`]; what calls mean is `plugin`'s business; what guests
//! say is in `plugin::log`.

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

/// The most plugins in a chain: the pool of instances is sized by it.
pub(in crate::plugin) const MAX_PLUGINS: usize = 32;
/// The most threads that run plugins.
pub(in crate::plugin) const MAX_WORKERS: usize = 16;
/// The most memories of one plugin; most have one.
pub(in crate::plugin) const MAX_MEMORIES: usize = 2;
/// The most tables of one plugin.
const MAX_TABLES: usize = 8;
/// The most elements of one table: interpreters compiled to WebAssembly have some ten thousand.
const MAX_TABLE_ELEMENTS: usize = 100_000;
/// A cheap handle.
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
    /// Makes the engine, with a pool of instances if the address space for it can be had (some hundred GiB, reserved and not used), else
    /// without: instances are then made more slowly.
    ///
    /// # Errors
    /// If the processor or the system lacks what compiled WebAssembly needs.
    pub fn new() -> anyhow::Result<Self> {
        Self::with_cache(None)
    }

    /// [`Engine::new`], which takes from this cache what was compiled before.
    ///
    /// # Errors
    /// As [`Engine::new`].
    pub fn with_cache(cache: Option<Cache>) -> anyhow::Result<Self> {
        let engine = match wasmtime::Engine::new(&config(true)) {
            Ok(engine) => engine,
            Err(error) => {
                tracing::info!(%error, "no address space for a pool of plugin instances; they are made one by one");
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

    /// The number of threads that plugins should run on: one for each processor, within bounds.
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

    /// Lets deadlines pass while the answer lives. Without one, no deadline ever does: calls ask for it.
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
    // Exceptions and shared memories are off with the crate's features `gc` and `threads`.
    if is_pooling {
        // One instance for each plugin on each thread, one more of each while a new version is tried, another while a candidate is asked about past
        // events, and one of each candidate beside a plugin.
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
    // Deadlines do not interrupt a function of the host: those that wait are replaced.
    linker.allow_shadowing(true);
    poll::add_to_linker::<State, NoWaiting>(&mut linker, |state| Unwaiting(&mut state.table))?;
    linker.allow_shadowing(false);
    bindings::add_to_linker(&mut linker)?;
    Ok(linker)
}

/// What the host keeps for one instance.
pub(in crate::plugin) struct State {
    wasi: WasiCtx,
    table: ResourceTable,
    pub(in crate::plugin) memory: MemoryLimit,
    pub(in crate::plugin) log: Arc<GuestLog>,
    pub(in crate::plugin) deadline: Deadline,
    clock_ms: Arc<AtomicU64>,
    /// The event of the call.
    pub(in crate::plugin) event: Option<Name>,
    /// The last line that the guest logged as an error in this call: what a panic hook says before the trap.
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

/// A store with every fence in place. `handed_back`: the most bytes that one call of the guest, or of the host, may copy out of the guest.
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

/// Bounds the memory of an instance, and remembers a refusal: to the guest it looks like any other trap.
pub(in crate::plugin) struct MemoryLimit {
    max: usize,
    pub(in crate::plugin) used: usize,
    /// The bytes that were asked for and refused.
    pub(in crate::plugin) refused: Option<usize>,
}

impl ResourceLimiter for MemoryLimit {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        // All memories of the instance together.
        let total = self.used.saturating_sub(current).saturating_add(desired);
        if total > self.max {
            self.refused = Some(total);
            // A trap at once, with this as its cause: most guests could only abort, and say nothing of memory.
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
                "a table of {desired} elements; {MAX_TABLE_ELEMENTS} is the most"
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

/// `wasi:clocks`, standing where the call's clock stands: what a plugin decides can be replayed.
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

/// `wasi:io/poll` without the waiting.
struct NoWaiting;

impl HasData for NoWaiting {
    type Data<'a> = Unwaiting<'a>;
}

struct Unwaiting<'a>(&'a mut ResourceTable);

fn no_waiting() -> wasmtime::Error {
    wasmtime::format_err!("it waits (wasi:io/poll); plugins cannot")
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

/// Standard output and error: lines of the plugin's log.
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
        // Only for WASI's third preview, which is not linked.
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
    /// A line without its end, at most [`MAX_LINE`] bytes and one more, by which it is known to be too long.
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
