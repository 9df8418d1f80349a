//! Core modules as components: most compilers write a core module, and the host runs components.
//!
//! A module names the world that it implements in a custom section; `inspect::embed` adds it for
//! compilers that do not know WIT. Its exports are found by the names of the canonical ABI. WASI
//! preview 1, which some compilers still use, is translated to preview 2 by wasmtime's adapter.

use wasi_preview1_component_adapter_provider::{
    WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME, WASI_SNAPSHOT_PREVIEW1_REACTOR_ADAPTER,
};
use wit_component::ComponentEncoder;

/// Converts a core module that names its world to a component.
///
/// # Errors
/// The module does not implement the world that it names, or imports something else.
pub(in crate::plugin) fn encode(module: &[u8]) -> anyhow::Result<Vec<u8>> {
    ComponentEncoder::default()
        .module(module)?
        .adapter(
            WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME,
            WASI_SNAPSHOT_PREVIEW1_REACTOR_ADAPTER,
        )?
        // The adapter must not call the module's `cabi_realloc`, because the runtime of Go calls
        // the adapter before it can allocate.
        .realloc_via_memory_grow(true)
        .encode()
}
