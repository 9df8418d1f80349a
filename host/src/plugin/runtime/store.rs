//! The store of one instance: the host's data for it, the memory limit and the deadline.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use wasmtime::component::ResourceTable;
use wasmtime::{ResourceLimiter, Store, UpdateDeadline};
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};

use super::deadline::{Deadline, Ticking};
use super::error::{causes, is_lack_of_host};
use super::log::GuestLog;
use super::profiler::Profiler;
use super::random::SeededRandom;
use super::wasi::{FrozenClock, GuestOutput, OutputLines};
use crate::event::Name;

/// The maximum number of memories per plugin. Most have one; a component composed of several has one
/// for each of its parts. `memory_bytes` limits their sum.
pub(super) const MAX_MEMORIES: usize = 4;
/// The maximum number of tables per plugin: for each part of a composed component its own, and that
/// by which its imports reach the host.
pub(super) const MAX_TABLES: usize = 16;
/// The maximum number of core instances per plugin.
pub(super) const MAX_INSTANCES: usize = 64;
/// The maximum number of elements in all tables of a plugin; interpreters compiled to WebAssembly have
/// about ten thousand.
pub(super) const MAX_TABLE_ELEMENTS: usize = 100_000;
/// Ticks until the CPU time of a call is first read: the current, partial one and a whole one.
const FIRST_LOOK: u64 = 2;

/// The host's data for one instance.
pub(super) struct HostState {
    wasi: WasiCtx,
    pub(super) table: ResourceTable,
    pub(super) memory: MemoryLimit,
    pub(super) log: Arc<GuestLog>,
    pub(super) deadline: Deadline,
    clock_ms: Arc<AtomicU64>,
    pub(super) random: SeededRandom,
    /// The id of the event of the current call.
    pub(super) event: Option<Name>,
    /// What the guest has written to its standard output and error.
    output: Arc<OutputLines>,
    /// The last line that the guest logged as an error in this call; a panic hook logs the message
    /// before the trap.
    pub(super) last_error: Option<String>,
    /// `None`: calls are not sampled.
    pub(super) profiler: Option<Profiler>,
}

impl HostState {
    pub(super) fn clock_ms(&self) -> u64 {
        self.clock_ms.load(Ordering::Relaxed)
    }

    /// Begins a call for an event.
    pub(super) fn begin_call(&mut self, event: &Name, clock_ms: u64) {
        self.clock_ms.store(clock_ms, Ordering::Relaxed);
        self.random.begin(event);
        self.output.begin_call(event);
        self.event = Some(event.clone());
        self.last_error = None;
    }

    /// The last lines of the standard error in this call, in printable form.
    pub(super) fn last_stderr_lines(&self) -> Vec<String> {
        self.output.last_stderr_lines()
    }
}

/// Creates a store with all limits in place. `plugin` seeds the random numbers. `hostcall_bytes`: the maximum number of bytes that one
/// call of the guest, or of the host, may copy out of the guest.
pub(super) fn store(
    engine: &wasmtime::Engine,
    memory_bytes: usize,
    hostcall_bytes: usize,
    plugin: &Name,
    log: &Arc<GuestLog>,
) -> Store<HostState> {
    let clock_ms = Arc::new(AtomicU64::new(0));
    let mut table = ResourceTable::new();
    table.set_max_capacity(1_000);
    let output = Arc::new(OutputLines::new(Arc::clone(log)));
    let wasi = WasiCtx::builder()
        .allow_tcp(false)
        .allow_udp(false)
        .wall_clock(FrozenClock(Arc::clone(&clock_ms)))
        .stdout(GuestOutput::stdout(&output))
        .stderr(GuestOutput::stderr(&output))
        .build();
    let memory = MemoryLimit {
        max: memory_bytes,
        used: 0,
        refused: None,
        table_elements: 0,
        lacking: None,
    };
    let state = HostState {
        wasi,
        table,
        memory,
        log: Arc::clone(log),
        deadline: Deadline::default(),
        clock_ms,
        random: SeededRandom::new(plugin.clone()),
        event: None,
        output,
        last_error: None,
        profiler: None,
    };
    let mut store = Store::new(engine, state);
    store.limiter(|state| &mut state.memory);
    store.epoch_deadline_callback(|mut store| {
        let update = store.data_mut().deadline.check();
        let Some(profiler) = store.data().profiler.clone() else {
            return Ok(update);
        };
        profiler.sample(&store);
        Ok(match update {
            UpdateDeadline::Continue(_) => UpdateDeadline::Continue(1),
            other => other,
        })
    });
    store.set_hostcall_fuel(hostcall_bytes);
    store
}

/// Limits the memories and tables of an instance, which may consist of several modules, and records
/// a refusal, because to the guest it looks like any
/// other trap.
pub(super) struct MemoryLimit {
    max: usize,
    pub(super) used: usize,
    /// The total size of the last refused request, in bytes.
    pub(super) refused: Option<usize>,
    table_elements: usize,
    /// Why the host could not provide memory within the limit.
    pub(super) lacking: Option<String>,
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

    fn memory_grow_failed(&mut self, error: wasmtime::Error) -> wasmtime::Result<()> {
        // Also called for a memory that reached the maximum of its own type, which is a matter of
        // the guest.
        if is_lack_of_host(&error) {
            self.lacking = Some(causes(&error));
            return Err(error);
        }
        Ok(())
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let total = self
            .table_elements
            .saturating_sub(current)
            .saturating_add(desired);
        if total > MAX_TABLE_ELEMENTS {
            return Err(wasmtime::format_err!(
                "tables of {total} elements were requested; the limit is {MAX_TABLE_ELEMENTS}"
            ));
        }
        self.table_elements = total;
        Ok(true)
    }

    fn instances(&self) -> usize {
        MAX_INSTANCES
    }

    fn tables(&self) -> usize {
        MAX_TABLES
    }

    fn memories(&self) -> usize {
        MAX_MEMORIES
    }
}

impl WasiView for HostState {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView {
            ctx: &mut self.wasi,
            table: &mut self.table,
        }
    }
}

/// Sets the limit of the next call.
pub(super) fn set_deadline(store: &mut Store<HostState>, ticking: &Ticking, limit: Duration) {
    let state = store.data_mut();
    state.deadline = Deadline::new(limit, ticking);
    // A sampled call is interrupted by the next tick, however short the call is.
    let first_look = if state.profiler.is_some() {
        1
    } else {
        FIRST_LOOK
    };
    store.set_epoch_deadline(first_look);
}
