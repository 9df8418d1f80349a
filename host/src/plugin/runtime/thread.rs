//! The CPU time and the priority of the calling thread.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// The CPU time that this thread has used since it started; the measure of all deadlines.
pub fn thread_cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    // Neither value is negative.
    Duration::new(
        time.tv_sec.unsigned_abs(),
        time.tv_nsec.unsigned_abs() as u32,
    )
}

/// Gives this thread the lowest CPU priority, for calls that are not urgent.
pub(crate) fn lower_thread_priority() {
    // On Linux, `nice` applies to the calling thread only.
    if let Err(error) = rustix::process::nice(19) {
        tracing::debug!(%error, "cannot lower the priority of a candidate thread");
    }
}
