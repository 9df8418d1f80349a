//! The host's imports in a native build: a frozen clock and captured log lines, both of the current
//! thread, so that tests running concurrently do not see each other's. [`testing`](crate::testing)
//! is the public interface to it.

use std::cell::{Cell, RefCell};

use crate::bindings::lifecycle::pointsman::plugin::log::Level;

thread_local! {
    static CLOCK_MS: Cell<u64> = const { Cell::new(1_767_225_600_000) };
    static LINES: RefCell<Vec<(Level, String)>> = const { RefCell::new(Vec::new()) };
}

pub(crate) fn set_clock(ms: u64) {
    CLOCK_MS.set(ms);
}

pub(crate) fn now_ms() -> u64 {
    CLOCK_MS.get()
}

#[cfg(not(target_arch = "wasm32"))]
pub(crate) fn log(level: Level, message: String) {
    LINES.with_borrow_mut(|lines| lines.push((level, message)));
}

/// Returns and clears the captured lines.
pub(crate) fn take_lines() -> Vec<(Level, String)> {
    LINES.take()
}
