//! Pointsman: a WebAssembly-extensible notification router.
//!
//! The modules, in the order in which data flows:
//!
//! - [`event`]: the vocabulary. [`criteria`]: conditions over recipients.
//! - [`broker`]: where events wait, logs live and nodes hear of appends.
//! - [`plugin`]: a loaded plugin, and which there are. [`pipeline`]: the ordered chain of them, folded to one resolution an event.
//! - [`auth`]: who is asking. [`http`]: every route. [`server`]: the accept loop.
//! - [`metrics`], [`readiness`], [`shutdown`]: what every part is handed.

pub mod auth;
pub mod broker;
pub mod criteria;
pub mod event;
pub mod http;
pub mod hub;
pub mod ingest;
pub mod metrics;
pub mod pipeline;
pub mod plugin;
pub mod readiness;
pub mod recipients;
pub mod server;
pub mod shutdown;
pub mod sse;
pub mod subscription;
