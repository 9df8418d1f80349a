//! The imports and exports of a plugin file, read in linear time without compiling or running it.
//!
//! Which imports are granted is in `compile`.

use std::collections::BTreeSet;

use wasmparser::{Parser, Payload};

/// The maximum number of imports, and of exports, that are examined.
const MAX_NAMES: usize = 1_000;

/// The two kinds of WebAssembly files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    CoreModule,
    Component,
}

/// The imports and exports of a file, found without running it.
#[derive(Default)]
pub(in crate::plugin) struct Surface {
    /// `None`: the file is not WebAssembly.
    pub(in crate::plugin) form: Option<Form>,
    pub(in crate::plugin) imports: BTreeSet<String>,
    pub(in crate::plugin) exports: BTreeSet<String>,
}

impl Surface {
    /// Parses as far as the bytes are valid.
    pub(in crate::plugin) fn of(bytes: &[u8]) -> Self {
        let mut surface = Self::default();
        if Parser::is_core_wasm(bytes) {
            surface.form = Some(Form::CoreModule);
        } else if Parser::is_component(bytes) {
            surface.form = Some(Form::Component);
        } else {
            return surface;
        }
        // Nested components and modules have imports of their own, which do not concern the host.
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
