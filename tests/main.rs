//! The integration tests: one file a promise. They enter where users enter (`POST` and `XADD` in, SSE bytes out) and start real processes.

#![expect(
    clippy::print_stderr,
    reason = "what a test says of itself, such as its seed, belongs on standard error"
)]

mod architecture;
mod authors;
mod candidates;
mod clients;
mod commands;
mod compiled;
mod conformance;
mod decisions;
mod demo;
mod devices;
mod durability;
mod embedded;
mod explain;
mod gallery;
mod greed;
mod groups;
mod harness;
mod hostile;
mod languages;
mod openapi;
mod operators;
mod outage;
mod overtaking;
mod plugins;
mod privacy;
mod protocol;
mod reload;
mod resume;
mod samples;
mod stability;
mod wire;
