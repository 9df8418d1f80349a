//! Turns the bytes of a file into a component: checks its imports, has it compiled, and checks its
//! exports.
//!
//! Only WebAssembly is compiled; a compiled file is never accepted as a plugin. Code that was
//! compiled before comes from [`cache`], whose files cannot be supplied by users. Where and within
//! which budget a file is compiled is in `compiler`. Whether a component conforms to the contract
//! shows when `plugin` creates its first instance.
//!
//! [`cache`]: super::cache

use std::time::Duration;

use wasmtime::component::Component;

use super::cache::Key;
use super::compiler::{Code, Compilation};
use super::engine::Engine;
use super::error::{EMPTY, LoadError};
use super::limits::Limits;
use super::store::{MAX_MEMORIES, MAX_TABLES};
use super::structure;
use super::surface::{Form, Surface};
use super::translate::{check_imports, check_names};

/// A component whose imports are all granted.
pub(super) struct Compiled {
    pub(super) component: Component,
    pub(super) has_filter: bool,
    pub(super) has_router: bool,
    /// How long compiling took; `None`: the code was there.
    pub(super) time: Option<Duration>,
    /// Keeps the code for whatever loads the same file while this is held.
    pub(super) code: Compilation,
}

/// Checks the bytes of a file and begins to compile them, unless that is under way already or the
/// engine's cache has their code. `hash`: the SHA-256 of the bytes, in hexadecimal.
///
/// # Errors
/// The file is refused without compiling it.
pub(in crate::plugin) fn begin(
    engine: &Engine,
    bytes: &[u8],
    hash: &str,
    limits: &Limits,
) -> Result<Compilation, LoadError> {
    check_bytes(bytes, limits).map_err(LoadError::of_file)?;
    let cache = engine
        .cache()
        .map(|cache| (cache.clone(), Key::new(engine.wasmtime(), hash)));
    Ok(engine
        .compiler()
        .begin(engine.wasmtime(), cache, hash, bytes))
}

/// As [`begin`], but waits for the code and checks the component.
///
/// # Errors
/// Why the file was refused.
pub(super) fn compile(
    engine: &Engine,
    bytes: &[u8],
    hash: &str,
    limits: &Limits,
) -> Result<Compiled, LoadError> {
    let code = begin(engine, bytes, hash, limits)?;
    let Code { component, time } = code.outcome()?;
    let (has_filter, has_router) = inspect(engine, &component).map_err(LoadError::of_file)?;
    Ok(Compiled {
        component,
        has_filter,
        has_router,
        time,
        code,
    })
}

/// The checks that take milliseconds, in an order that makes the first message the most useful one.
fn check_bytes(bytes: &[u8], limits: &Limits) -> Result<(), String> {
    const MIB: usize = 1024 * 1024;
    if bytes.is_empty() {
        return Err(EMPTY.to_owned());
    }
    if bytes.len() > limits.file_bytes {
        return Err(format!(
            "has {} MiB; the limit is {}",
            bytes.len().div_ceil(MIB),
            limits.file_bytes / MIB
        ));
    }
    if !bytes.starts_with(b"\0asm") {
        return Err("is not WebAssembly: it does not begin with '\\0asm'".to_owned());
    }
    // Before anything else reads the file: the validator and the compiler are slow on deep files.
    structure::check(bytes)?;
    let surface = Surface::of(bytes);
    // The imports of a core module are only known once it is a component.
    if surface.form == Some(Form::Component) {
        check_imports(
            surface.imports.iter().map(String::as_str),
            surface.exports.iter().map(String::as_str),
        )?;
    }
    Ok(())
}

/// Checks a compiled component. Returns whether it is a filter and whether it is a router.
fn inspect(engine: &Engine, component: &Component) -> Result<(bool, bool), String> {
    let ty = component.component_type();
    let imports = ty.imports(engine.wasmtime()).map(|(name, _)| name);
    let imports: Vec<&str> = imports.collect();
    let exports = ty.exports(engine.wasmtime()).map(|(name, _)| name);
    let exports: Vec<&str> = exports.collect();
    let roles = check_names(imports.iter().copied(), exports.iter().copied())?;
    if let Some(resources) = component.resources_required() {
        for (what, count, limit) in [
            ("memories", resources.num_memories, MAX_MEMORIES),
            ("tables", resources.num_tables, MAX_TABLES),
        ] {
            if count as usize > limit {
                return Err(format!(
                    "has {count} {what}; the limit is {limit}: compose it of fewer components"
                ));
            }
        }
    }
    Ok(roles)
}
