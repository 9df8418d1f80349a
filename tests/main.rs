//! The integration tests. They enter where users enter (`POST` and `XADD` in, SSE bytes out), start
//! real processes, and are named after promises: see `tests/README.md`.

#![expect(
    clippy::print_stderr,
    reason = "a test reports its random seed on standard error"
)]

mod admin;
mod architecture;
mod cli;
mod clients;
mod conformance;
mod delivery;
mod fuzz;
mod harness;
mod plugins;
mod protocol;
mod publishers;
