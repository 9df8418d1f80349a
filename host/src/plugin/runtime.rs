//! The Wasm runtime: from the bytes of a plugin file to answers about events.
//!
//! The only module that knows wasmtime. Which plugins exist, in which version, and when that changes
//! is `registry`; what becomes of an event when a call fails is `ingest::pipeline`.

pub(super) mod bindings;
pub mod cache;
pub(super) mod compile;
pub(super) mod deadline;
pub(super) mod engine;
pub(super) mod log;
pub(super) mod selection;
