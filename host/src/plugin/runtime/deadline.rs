//! How long a call may run: time of the processor that its thread has used, and not time of the day.
//!
//! It promises that no call outlives its deadline by more than a few milliseconds, as long as the caller holds a [`Ticking`]; and that a
//! machine with too much to do is not held against a plugin: while its thread waits for a processor, its time stands still. A guest cannot
//! wait for anything else (`engine`), so there is no time in which it could hide.
//!
//! A call that ends within a tick or two costs no look at a clock.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, Thread};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use wasmtime::{Store, UpdateDeadline};

use super::engine::State;

/// How often a call that runs can be interrupted.
const TICK: Duration = Duration::from_millis(1);
/// Ticks until the first look at what a call has used: the one that is under way, and a whole one.
const FIRST_LOOK: u64 = 2;

/// Sets how long the next call may run.
pub(in crate::plugin) fn set(store: &mut Store<State>, _: &Ticking, limit: Duration) {
    store.data_mut().deadline = Deadline { limit, began: None };
    store.set_epoch_deadline(FIRST_LOOK);
}

/// The deadline of one call, as its thread comes by.
#[derive(Debug, Default)]
pub(in crate::plugin) struct Deadline {
    limit: Duration,
    /// What the thread had used at the first look. `None`: not yet looked at.
    began: Option<Duration>,
}

impl Deadline {
    /// Whether the call may go on, and until when. On the thread of the call.
    pub(in crate::plugin) fn look(&mut self) -> UpdateDeadline {
        let now = used_by_this_thread();
        let used = now.saturating_sub(*self.began.get_or_insert(now));
        match self.limit.checked_sub(used) {
            None | Some(Duration::ZERO) => UpdateDeadline::Interrupt,
            Some(left) => {
                UpdateDeadline::Continue(left.as_millis().div_ceil(TICK.as_millis()).max(1) as u64)
            }
        }
    }
}

/// Time of processors that this thread has used since it began, by which deadlines count.
pub fn used_by_this_thread() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    // Neither is negative.
    Duration::new(
        time.tv_sec.unsigned_abs(),
        time.tv_nsec.unsigned_abs() as u32,
    )
}

/// Advances the epoch while somebody is in a call, and sleeps otherwise. An OS thread: a blocked executor does not tick.
pub(in crate::plugin) struct Ticker {
    n_callers: AtomicUsize,
    is_over: AtomicBool,
    thread: OnceLock<Thread>,
}

/// Lets deadlines pass while it lives: see [`crate::plugin::Engine::ticking`].
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
    /// The system gives no thread.
    pub(in crate::plugin) fn start(engine: wasmtime::EngineWeak) -> std::io::Result<Arc<Self>> {
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

    /// Ticks while the answer lives.
    pub(in crate::plugin) fn tick_for_a_caller(self: &Arc<Self>) -> Ticking {
        if self.n_callers.fetch_add(1, Ordering::SeqCst) == 0 {
            self.wake();
        }
        Ticking(Arc::clone(self))
    }

    pub(in crate::plugin) fn end(&self) {
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
                // An `unpark` since the check above makes this return at once.
                thread::park();
                continue;
            }
            thread::sleep(TICK);
            // Weak, so that this thread does not keep alive what it serves.
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

    use super::*;
    use crate::event::Name;
    use crate::plugin::{Engine, engine, log::GuestLog};

    const LIMIT: Duration = Duration::from_millis(50);

    /// Runs a guest that comes by in a loop until it is told that it is done.
    fn run(is_done: impl Fn(&Deadline) -> bool + Send + Sync + 'static) -> wasmtime::Result<()> {
        let engine = Engine::new().unwrap();
        let log = Arc::new(GuestLog::new(Name::parse("loop").unwrap()));
        let mut store = engine::store(&engine, 1024 * 1024, 1024, &log);
        let wat = r#"(module (import "" "is-done" (func $is_done (result i32))) (func (export "run") (loop (br_if 0 (i32.eqz (call $is_done))))))"#;
        let is_done = Func::wrap(&mut store, move |caller: Caller<'_, State>| {
            i32::from(is_done(&caller.data().deadline))
        });
        let module = Module::new(engine.wasmtime(), wat::parse_str(wat)?)?;
        let run = Instance::new(&mut store, &module, &[is_done.into()])?
            .get_typed_func::<(), ()>(&mut store, "run")?;
        let ticking = engine.ticking();
        set(&mut store, &ticking, LIMIT);
        run.call(&mut store, ())
    }

    #[test]
    fn a_call_that_uses_more_than_its_time_is_interrupted() {
        let interrupted = run(|_| false).unwrap_err();
        assert_eq!(interrupted.downcast_ref::<Trap>(), Some(&Trap::Interrupt));
    }

    #[test]
    fn time_in_which_its_thread_does_not_run_is_not_held_against_a_call() {
        let has_waited = AtomicBool::new(false);
        let done = run(move |deadline| {
            if has_waited.load(Ordering::SeqCst) {
                return true;
            }
            // From the first look on, time counts.
            if deadline.began.is_some() {
                // As if the machine had others to run.
                thread::sleep(3 * LIMIT);
                has_waited.store(true, Ordering::SeqCst);
            }
            false
        });
        done.expect("it has used a few milliseconds");
    }
}
