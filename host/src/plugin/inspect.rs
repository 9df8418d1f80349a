//! What can be known of a file that is a plugin, or should be one, for the person who wrote it: what it is, what it wants, what it says of
//! itself, and why it would not run.
//!
//! It goes through the checks of [`Plugin::load`] and adds none; it promises to show whatever stands before the first that fails. Whatever
//! comes out of the file is hostile text, and printable here.

use std::collections::BTreeSet;

use wasmparser::{Parser, Payload};

pub mod contract;
pub(super) mod noop;

use super::runtime::bindings::Description;
use super::runtime::compile::is_granted;
use super::runtime::deadline;
use super::runtime::log::printable;
use super::{Engine, Limits, LoadError, Manifest, Plugin, Role, Selection, hash};
use crate::event::Name;

/// The most imports, and exports, that are looked at.
const MAX_NAMES: usize = 1_000;

/// See the head of this file.
#[derive(Clone, Debug)]
pub struct Inspection {
    /// `None`: it is no WebAssembly.
    pub form: Option<Form>,
    pub bytes: usize,
    /// SHA-256 of the file, in hexadecimal.
    pub hash: String,
    /// In the order of their names.
    pub imports: Vec<Import>,
    /// The versions of `pointsman:plugin` that its imports and exports name.
    pub contracts: BTreeSet<String>,
    pub is_filter: bool,
    pub is_router: bool,
    /// What it says of itself, with or without its configuration.
    pub manifest: Option<Manifest>,
    /// What it wants to be asked about and to see, as it is configured; `None` if it does not take its configuration.
    pub selection: Option<Selection>,
    /// The memory with which an instance of it begins.
    pub memory_bytes: Option<usize>,
    /// Why it would not run.
    pub failure: Option<LoadError>,
}

/// The two kinds of files that WebAssembly knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    CoreModule,
    Component,
}

/// Something that a plugin wants of its host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Import {
    pub name: String,
    /// Otherwise it is not loaded.
    pub is_granted: bool,
}

/// Looks at the bytes of a file, and at an instance with this configuration, as far as it comes to one. Compiles.
pub fn inspect(
    engine: &Engine,
    name: Name,
    bytes: &[u8],
    config: &str,
    limits: Limits,
) -> Inspection {
    let mut inspection = look(bytes);
    inspection.failure = inspection.run(engine, name, bytes, config, limits).err();
    inspection
}

/// Looks at the bytes of a file and no further: nothing is compiled, and `failure` is `None` whatever they are.
pub fn look(bytes: &[u8]) -> Inspection {
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
        hash: hash(bytes),
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
        let tried = plugin.trial();
        if tried.is_err() {
            // Before it is configured, it may well say who it is.
            self.manifest = plugin.first_words();
        }
        let Description {
            manifest,
            selection,
        } = tried.map_err(LoadError)?;
        (self.manifest, self.selection) = (Some(manifest), Some(selection));
        self.memory_bytes = plugin
            .instantiate(&engine.ticking())
            .ok()
            .map(|instance| instance.memory_bytes());
        Ok(())
    }
}

impl Plugin {
    /// What it says of itself, unconfigured.
    fn first_words(&self) -> Option<Manifest> {
        let ticking = self.engine.ticking();
        let (mut store, exports) = self.raw_instance(&ticking).ok()?;
        deadline::set(&mut store, &ticking, self.limits.setup_deadline);
        exports
            .describe(&mut store)
            .ok()
            .map(|description| description.manifest)
    }
}

/// What stands in a file without anything of it being run.
#[derive(Default)]
struct Surface {
    form: Option<Form>,
    imports: BTreeSet<String>,
    exports: BTreeSet<String>,
}

impl Surface {
    /// As far as the bytes are what they should be.
    fn of(bytes: &[u8]) -> Self {
        let mut surface = Self::default();
        if Parser::is_core_wasm(bytes) {
            surface.form = Some(Form::CoreModule);
        } else if Parser::is_component(bytes) {
            surface.form = Some(Form::Component);
        } else {
            return surface;
        }
        // Within a component stand others, whose imports are not of the host.
        let mut depth = 0;
        for payload in Parser::new(0).parse_all(bytes).map_while(Result::ok) {
            match payload {
                Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => depth += 1,
                Payload::End(_) if depth > 0 => depth -= 1,
                _ if depth > 0 => {}
                Payload::ImportSection(section) => {
                    let names = section
                        .into_imports()
                        .map_while(Result::ok)
                        .map(|import| import.module.to_owned());
                    add(&mut surface.imports, names);
                }
                Payload::ComponentImportSection(section) => {
                    add(
                        &mut surface.imports,
                        section
                            .into_iter()
                            .map_while(Result::ok)
                            .map(|import| import.name.name.to_owned()),
                    );
                }
                // A core module exports `interface#function`.
                Payload::ExportSection(section) => {
                    let names = section
                        .into_iter()
                        .map_while(Result::ok)
                        .filter_map(|export| export.name.split_once('#'));
                    add(
                        &mut surface.exports,
                        names.map(|(interface, _)| interface.to_owned()),
                    );
                }
                Payload::ComponentExportSection(section) => {
                    add(
                        &mut surface.exports,
                        section
                            .into_iter()
                            .map_while(Result::ok)
                            .map(|export| export.name.name.to_owned()),
                    );
                }
                _ => {}
            }
        }
        surface
    }
}

fn add(names: &mut BTreeSet<String>, more: impl Iterator<Item = String>) {
    for name in more {
        if names.len() < MAX_NAMES {
            names.insert(name);
        }
    }
}
