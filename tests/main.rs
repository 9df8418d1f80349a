//! The integration tests: one file a promise. They enter where users enter (`POST` and `XADD` in, SSE bytes out) and start real processes.

mod clients;
mod conformance;
mod durability;
mod embedded;
mod harness;
mod hostile;
mod outage;
mod plugins;
mod privacy;
mod stability;
mod wire;
