//! Deadlines of calls, measured in CPU time of the calling thread, not in wall-clock time.
//!
//! A call exceeds its deadline by at most a few milliseconds, as long as the caller holds a
//! [`Ticking`]. An overloaded machine does not count against a plugin: while its thread waits for a
//! processor, its time stands still. A guest cannot wait for anything else (see `wasi`), so a
//! plugin cannot evade its deadline by blocking.
//!
//! A call that ends within one or two ticks never reads a clock.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, Thread};
use std::time::Duration;

use wasmtime::UpdateDeadline;

use super::thread::thread_cpu_time;

/// How often a running call can be interrupted.
pub(super) const TICK: Duration = Duration::from_millis(1);

/// The deadline of one call, checked on its thread.
#[derive(Debug, Default)]
pub(super) struct Deadline {
    limit: Duration,
    /// The thread's CPU time at the first check. `None`: not yet checked.
    began: Option<Duration>,
}

impl Deadline {
    /// The deadline of the next call. Requires a [`Ticking`], without which no deadline would pass.
    pub(super) fn new(limit: Duration, _: &Ticking) -> Self {
        Self { limit, began: None }
    }

    /// Decides whether the call may continue, and for how many ticks. Must run on the call's
    /// thread.
    pub(super) fn check(&mut self) -> UpdateDeadline {
        let now = thread_cpu_time();
        let used = now.saturating_sub(*self.began.get_or_insert(now));
        match self.limit.checked_sub(used) {
            None | Some(Duration::ZERO) => UpdateDeadline::Interrupt,
            Some(left) => {
                UpdateDeadline::Continue(left.as_millis().div_ceil(TICK.as_millis()).max(1) as u64)
            }
        }
    }
}

/// Increments the engine's epoch while there are callers, and sleeps otherwise. Runs on an OS
/// thread, because a blocked executor would not tick.
pub(super) struct Ticker {
    n_callers: AtomicUsize,
    is_over: AtomicBool,
    thread: OnceLock<Thread>,
}

/// Makes time pass for deadlines until it is dropped: see [`crate::plugin::Engine::ticking`].
pub struct Ticking(Arc<Ticker>);

impl std::fmt::Debug for Ticking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ticking")
    }
}

impl Drop for Ticking {
    fn drop(&mut self) {
        self.0.n_callers.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Ticker {
    /// # Errors
    /// The system cannot start a thread.
    pub(super) fn start(engine: wasmtime::EngineWeak) -> std::io::Result<Arc<Self>> {
        let ticker = Arc::new(Self {
            n_callers: AtomicUsize::new(0),
            is_over: AtomicBool::new(false),
            thread: OnceLock::new(),
        });
        let run = Arc::clone(&ticker);
        let thread = thread::Builder::new()
            .name("plugin-deadlines".into())
            .spawn(move || run.tick(&engine))?;
        ticker.thread.get_or_init(|| thread.thread().clone());
        Ok(ticker)
    }

    /// Ticks until the returned value is dropped.
    pub(super) fn tick_for_a_caller(self: &Arc<Self>) -> Ticking {
        if self.n_callers.fetch_add(1, Ordering::SeqCst) == 0 {
            self.wake();
        }
        Ticking(Arc::clone(self))
    }

    pub(super) fn end(&self) {
        self.is_over.store(true, Ordering::SeqCst);
        self.wake();
    }

    fn wake(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    fn tick(&self, engine: &wasmtime::EngineWeak) {
        while !self.is_over.load(Ordering::SeqCst) {
            if self.n_callers.load(Ordering::SeqCst) == 0 {
                // No lost wake-up: an `unpark` since the check above makes this return immediately.
                thread::park();
                continue;
            }
            thread::sleep(TICK);
            // A weak reference, so that this thread does not keep the engine alive.
            let Some(engine) = engine.upgrade() else {
                return;
            };
            engine.increment_epoch();
        }
    }
}

#[cfg(test)]
mod tests {
    use wasmtime::{Caller, Func, Instance, Module, Trap};

    use super::super::engine::Engine;
    use super::super::log::GuestLog;
    use super::super::store::{HostState, set_deadline, store};
    use super::*;
    use crate::event::Name;

    const LIMIT: Duration = Duration::from_millis(50);

    /// Runs a guest that calls the host in a loop until `is_done`.
    fn run(is_done: impl Fn(&Deadline) -> bool + Send + Sync + 'static) -> wasmtime::Result<()> {
        let engine = Engine::new().unwrap();
        let name = Name::parse("loop").unwrap();
        let log = Arc::new(GuestLog::new(name.clone()));
        let mut store = store(engine.wasmtime(), 1024 * 1024, 1024, &name, &log);
        let wat = r#"(module (import "" "is-done" (func $is_done (result i32))) (func (export "run") (loop (br_if 0 (i32.eqz (call $is_done))))))"#;
        let is_done = Func::wrap(&mut store, move |caller: Caller<'_, HostState>| {
            i32::from(is_done(&caller.data().deadline))
        });
        let module = Module::new(engine.wasmtime(), wat::parse_str(wat)?)?;
        let run = Instance::new(&mut store, &module, &[is_done.into()])?
            .get_typed_func::<(), ()>(&mut store, "run")?;
        let ticking = engine.ticking();
        set_deadline(&mut store, &ticking, LIMIT);
        run.call(&mut store, ())
    }

    #[test]
    fn a_call_that_exceeds_its_cpu_time_is_interrupted() {
        let interrupted = run(|_| false).unwrap_err();
        assert_eq!(interrupted.downcast_ref::<Trap>(), Some(&Trap::Interrupt));
    }

    #[test]
    fn time_in_which_the_thread_does_not_run_does_not_count() {
        let has_waited = AtomicBool::new(false);
        let done = run(move |deadline| {
            if has_waited.load(Ordering::SeqCst) {
                return true;
            }
            // Time counts from the first check on.
            if deadline.began.is_some() {
                // As if other threads had the processor.
                thread::sleep(3 * LIMIT);
                has_waited.store(true, Ordering::SeqCst);
            }
            false
        });
        done.expect("the guest used only a few milliseconds");
    }
}
