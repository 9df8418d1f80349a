//! Pointsman: a WebAssembly-extensible notification router.
//!
//! The modules, in the order in which data flows:
//!
//! - [`event`]: the vocabulary. [`criteria`]: conditions over recipients.
//! - [`broker`]: where events wait, logs live and nodes hear of appends.

pub mod broker;
pub mod criteria;
pub mod event;
pub mod hub;
pub mod ingest;
pub mod metrics;
pub mod pipeline;
pub mod recipients;
pub mod sse;
pub mod subscription;
