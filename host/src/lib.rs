//! Pointsman: a WebAssembly-extensible notification router.
//!
//! The modules, in the order in which data flows:
//!
//! - [`event`]: the vocabulary. [`criteria`]: conditions over recipients.
//! - [`broker`]: where events wait, logs live and nodes hear of appends.
//! - [`plugin`]: one loaded plugin. [`pipeline`]: all of them, in order. [`ingest`]: read, evaluate, commit.
//! - [`rehearsal`]: what a candidate for a plugin would have decided about past events.
//! - [`recipients`]: who gets what. [`hub`]: the open streams of this node. [`subscription`]: one of them. [`sse`]: its bytes.
//! - [`device_cursors`]: where devices are while they have no stream, and what was read.
//! - [`explain`]: why somebody was told of an event, or not.
//! - [`auth`]: who is asking. [`http`]: every route. [`server`]: the accept loop.
//! - [`config`]: from what the user wrote to what the node needs.
//! - [`metrics`], [`readiness`], [`shutdown`], [`clock`]: what every part is handed.
//!
//! [`run`] wires them and stops them.

pub mod auth;
pub mod broker;
pub mod clock;
pub mod config;
pub mod delivery;
pub mod event;
pub mod explain;
pub mod http;
pub mod ingest;
pub mod node;
pub mod plugin;
pub mod preview;
pub mod server;
pub mod shutdown;
pub mod telemetry;

pub use node::{Listeners, check_folders, run, run_on};
