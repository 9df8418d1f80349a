//! Core modules as components: most compilers write a core module, and the host runs components.
//!
//! A module names the world that it implements in a custom section, which [`embed`] adds for
//! compilers that do not know WIT. Its exports are found by the names of the canonical ABI. WASI
//! preview 1, which some compilers still use, is translated to preview 2 by wasmtime's adapter.

use std::path::Path;

use anyhow::Context as _;
use wasi_preview1_component_adapter_provider::{
    WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME, WASI_SNAPSHOT_PREVIEW1_REACTOR_ADAPTER,
};
use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};
use wit_parser::Resolve;

/// Converts a core module that names its world to a component.
///
/// # Errors
/// The module does not implement the world that it names, or imports something else.
pub(super) fn encode(module: &[u8]) -> anyhow::Result<Vec<u8>> {
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

/// Converts a core module of any compiler to a component that implements a world of the WIT package
/// in a folder, as `wasm-tools component embed` and `wasm-tools component new` do.
///
/// # Errors
/// The folder is not a WIT package, it does not have the world, or the module does not implement it.
pub fn embed(module: &[u8], wit: &Path, world: &str) -> anyhow::Result<Vec<u8>> {
    let mut contract = Resolve::default();
    let (package, _) = contract
        .push_path(wit)
        .with_context(|| format!("cannot read the contract in {}", wit.display()))?;
    let world = contract.select_world(&[package], Some(world))?;
    let mut module = module.to_vec();
    embed_component_metadata(&mut module, &contract, world, StringEncoding::UTF8)?;
    encode(&module)
}
