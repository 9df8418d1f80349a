//! The Wasm runtime: from the bytes of a plugin file to answers about events.
//!
//! The only module that knows wasmtime. Which plugins exist, in which version, and when that
//! changes is in `registry`; the outcome of an event whose plugin failed is in `ingest::pipeline`.

mod bindings;
pub mod cache;
pub(super) mod call;
pub(super) mod compile;
pub(super) mod compiler;
pub(super) mod component;
pub(super) mod deadline;
pub(super) mod engine;
pub(super) mod error;
pub(super) mod layout;
pub(super) mod limits;
pub(super) mod log;
pub(super) mod manifest;
pub(super) mod plugin;
mod profiler;
mod random;
mod schema;
pub(super) mod selection;
mod store;
mod structure;
pub(super) mod surface;
pub(super) mod thread;
pub(super) mod translate;
mod wasi;
