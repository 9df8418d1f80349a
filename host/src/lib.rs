//! Pointsman: a WebAssembly-extensible notification router.
//!
//! The modules, in the order in which data flows:
//!
//! - [`event`]: the vocabulary, parsed once and valid from then on.
//! - [`broker`]: stores events, logs and records, and delivers notices of appends to nodes.
//! - [`plugin`]: the Wasm runtime, the registry of plugins, and shadow candidates.
//! - [`bridge`]: appends the messages of Redis channels to a source.
//! - [`ingest`]: reads a source, evaluates its events and commits their outcomes.
//! - [`delivery`]: from the logs to open SSE streams.
//! - [`preview`]: dry runs, backtests and the plugin runner, all without effect.
//! - [`rollout`]: versions of plugins on all nodes of an installation.
//! - [`explain`]: why an event reached a user, or did not.
//! - [`auth`]: authentication. [`server`]: the accept loop. [`http`]: every route.
//! - [`config`]: from configuration sources to a validated configuration.
//! - [`node`]: wires the parts, runs them and stops them.
//! - [`escape`]: makes foreign text safe to print. `table`: reads configuration from tables only.
//! - [`rate`]: how many of something may happen in a second.
//! - [`telemetry`], [`shutdown`], [`clock`]: handles passed to every part.
//!
//! ARCHITECTURE.md describes how they fit together, and which may import which.

pub mod auth;
pub mod backoff;
pub mod bridge;
pub mod broker;
pub mod clock;
pub mod config;
pub mod delivery;
pub mod duration;
pub mod escape;
pub mod event;
pub mod explain;
pub mod http;
pub mod ingest;
pub mod node;
pub mod plugin;
pub mod preview;
pub mod rate;
mod regular_file;
pub mod rollout;
pub mod server;
pub mod shutdown;
mod table;
pub mod telemetry;

pub use node::{Listeners, check_folders, run, run_on};
