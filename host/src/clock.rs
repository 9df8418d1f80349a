//! The clocks of this machine: the time of day, which may be set, and the uptime, which only
//! advances. Neither decides about an event: `ttl`, retention and the clock of plugins go by the
//! broker's clock ([`crate::broker::Partitions::now_ms`]).

use std::time::{SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

/// Counts time in which the machine is suspended, unlike `CLOCK_MONOTONIC` of Linux.
#[cfg(target_os = "linux")]
const UPTIME: ClockId = ClockId::Boottime;
#[cfg(not(target_os = "linux"))]
const UPTIME: ClockId = ClockId::Monotonic;

/// Milliseconds since the Unix epoch by this node's clock; 0 before it. Jumps when the clock is
/// set.
pub fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| {
            u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
        })
}

/// Milliseconds since an arbitrary moment, including time in which the machine was suspended.
/// Setting the clock does not change it.
pub fn uptime_ms() -> u64 {
    let uptime = clock_gettime(UPTIME);
    // Neither part of an uptime is negative.
    uptime.tv_sec.unsigned_abs() * 1_000 + uptime.tv_nsec.unsigned_abs() / 1_000_000
}
