//! Adds the contract to a core module of any compiler, for authors whose toolchain does not know WIT.

use std::path::Path;

use anyhow::Context as _;
use wit_component::{StringEncoding, embed_component_metadata};
use wit_parser::Resolve;

use crate::plugin::runtime::component::encode;

/// Converts a core module to a component that implements a world of the WIT package in a folder, as
/// `wasm-tools component embed` and `wasm-tools component new` do.
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
