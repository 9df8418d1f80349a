//! The time as the host presents it: constant during one call, and frozen in tests (see
//! [`testing::freeze_clock`](crate::testing::freeze_clock)).

/// Returns the current time in milliseconds since the Unix epoch.
pub fn now_ms() -> u64 {
    #[cfg(target_arch = "wasm32")]
    return crate::bindings::lifecycle::pointsman::plugin::clock::now_ms();
    #[cfg(not(target_arch = "wasm32"))]
    return crate::test_host::now_ms();
}
