//! Inspects a plugin file for its author: its form, imports and exports, its manifest, and why it
//! would not run.
//!
//! Runs the checks of [`Plugin::load`] and adds none; everything learned before the first failing
//! check is reported. All text from the file is hostile and is made printable here.

use std::collections::BTreeSet;

pub mod contract;
pub(super) mod embed;
pub(super) mod noop;

pub use super::runtime::surface::Form;

use super::runtime::log::printable;
use super::runtime::manifest::Description;
use super::runtime::plugin::file_hash;
use super::runtime::surface::Surface;
use super::runtime::translate::is_granted;
use super::{Engine, Limits, LoadError, Manifest, Plugin, Role, Selection};
use crate::event::Name;

/// The report on one file.
#[derive(Clone, Debug)]
pub struct Inspection {
    /// `None`: the file is not WebAssembly.
    pub form: Option<Form>,
    pub bytes: usize,
    /// SHA-256 of the file, in hexadecimal.
    pub hash: String,
    /// Sorted by name.
    pub imports: Vec<Import>,
    /// The versions of `pointsman:plugin` that its imports and exports name.
    pub contracts: BTreeSet<String>,
    pub is_filter: bool,
    pub is_router: bool,
    /// The manifest, with or without the configuration.
    pub manifest: Option<Manifest>,
    /// The events and data that it selects when configured; `None` if it rejects its configuration.
    pub selection: Option<Selection>,
    /// The initial memory of an instance.
    pub memory_bytes: Option<usize>,
    /// Why it would not run.
    pub failure: Option<LoadError>,
}

/// An import of the plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Import {
    pub name: String,
    /// A plugin with an import that is not granted is not loaded.
    pub is_granted: bool,
}

/// Inspects the bytes of a file and, if it loads, an instance with this configuration. Compiles.
pub fn inspect(
    engine: &Engine,
    name: Name,
    bytes: &[u8],
    config: &str,
    limits: Limits,
) -> Inspection {
    let mut inspection = scan(bytes);
    inspection.failure = inspection.run(engine, name, bytes, config, limits).err();
    inspection
}

/// Inspects the bytes of a file without compiling; `failure` is always `None`.
pub fn scan(bytes: &[u8]) -> Inspection {
    let surface = Surface::of(bytes);
    let imports = surface.imports.iter().map(|name| Import {
        name: printable(name),
        is_granted: is_granted(name),
    });
    let named = surface.imports.iter().chain(&surface.exports);
    let contracts = named
        .filter_map(|name| name.strip_prefix("pointsman:plugin/")?.split_once('@'))
        .map(|(_, version)| printable(version));
    let exports = |interface: &str| {
        surface
            .exports
            .iter()
            .any(|name| name.starts_with(&format!("pointsman:plugin/{interface}@")))
    };
    Inspection {
        form: surface.form,
        bytes: bytes.len(),
        hash: file_hash(bytes),
        imports: imports.collect(),
        contracts: contracts.collect(),
        is_filter: exports("filter"),
        is_router: exports("router"),
        manifest: None,
        selection: None,
        memory_bytes: None,
        failure: None,
    }
}

impl Inspection {
    fn run(
        &mut self,
        engine: &Engine,
        name: Name,
        bytes: &[u8],
        config: &str,
        limits: Limits,
    ) -> Result<(), LoadError> {
        let plugin = Plugin::prepare(engine, name, bytes, config, limits)?;
        (self.is_filter, self.is_router) =
            (plugin.has_role(Role::Filter), plugin.has_role(Role::Router));
        let described = plugin.check_first_instance();
        if described.is_err() {
            // The manifest may still be available without a configuration.
            self.manifest = plugin.unconfigured_manifest();
        }
        let Description {
            manifest,
            selection,
            ..
        } = described?;
        (self.manifest, self.selection) = (Some(manifest), Some(selection));
        self.memory_bytes = plugin
            .instantiate(&engine.ticking())
            .ok()
            .map(|instance| instance.memory_bytes());
        Ok(())
    }
}
