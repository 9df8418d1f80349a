//! Turns the bytes of a file into a component: checks that the file is intact, compiles it, and
//! checks its imports and exports.
//!
//! Only WebAssembly is compiled; a compiled file is never accepted as a plugin. Code that was
//! compiled before comes from [`cache`], whose files cannot be supplied by users. Whether a
//! component conforms to the contract shows when `plugin` creates its first instance.
//!
//! [`cache`]: super::cache

use wasmtime::component::Component;

use super::bindings;
use super::cache::Key;
use super::component;
use super::engine::Engine;
use super::error::{EMPTY, asynchronous, causes, not_valid};
use super::limits::Limits;
use super::log::printable;
use super::store::{MAX_MEMORIES, MAX_TABLES};
use super::structure;

/// A component whose imports are all granted.
pub(super) struct Compiled {
    pub(super) component: Component,
    pub(super) has_filter: bool,
    pub(super) has_router: bool,
    /// Whether its code came from the cache.
    pub(super) is_cached: bool,
}

/// Checks the bytes of a file and compiles them, unless the engine's cache has their code. `hash`:
/// the SHA-256 of the bytes, in hexadecimal.
///
/// # Errors
/// Why not, as the rest of a sentence that begins with the file name.
pub(super) fn compile(
    engine: &Engine,
    bytes: &[u8],
    hash: &str,
    limits: &Limits,
) -> Result<Compiled, String> {
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
    let cache = engine
        .cache()
        .map(|cache| (cache, Key::new(engine.wasmtime(), hash)));
    let cached = cache
        .as_ref()
        .and_then(|(cache, key)| cache.take(engine.wasmtime(), key));
    let is_cached = cached.is_some();
    let component = match cached {
        // These bytes were checked and compiled by this version of the host before.
        Some(component) => component,
        None => compile_anew(engine, bytes)?,
    };
    let (has_filter, has_router) = inspect(engine, &component)?;
    if let Some((cache, key)) = cache.filter(|_| !is_cached) {
        cache.put(&key, &component);
    }
    Ok(Compiled {
        component,
        has_filter,
        has_router,
        is_cached,
    })
}

fn compile_anew(engine: &Engine, bytes: &[u8]) -> Result<Component, String> {
    // Validated first, for a clear message about a file that is still being written.
    wasmparser::Validator::new()
        .validate_all(bytes)
        .map_err(|error| not_valid(&error))?;
    let encoded;
    let component = if wasmparser::Parser::is_component(bytes) {
        bytes
    } else {
        encoded = component::encode(bytes).map_err(|e| {
            format!(
                "is a core module that cannot be converted to a component: {}",
                printable(&format!("{e:#}"))
            )
        })?;
        &encoded
    };
    Component::from_binary(engine.wasmtime(), component).map_err(|e| {
        let causes = causes(&e);
        asynchronous(&causes).unwrap_or_else(|| format!("does not compile: {causes}"))
    })
}

/// Whether plugins may import this name.
pub(in crate::plugin) fn is_granted(import: &str) -> bool {
    const GRANTED: [&str; 9] = [
        "pointsman:plugin/types@",
        "pointsman:plugin/log@",
        "pointsman:plugin/clock@",
        "wasi:cli/",
        "wasi:clocks/",
        "wasi:filesystem/",
        "wasi:io/",
        "wasi:random/",
        "wasi:sockets/",
    ];
    GRANTED.iter().any(|granted| import.starts_with(granted))
}

/// Checks a component's imports and exports. Returns whether it is a filter and whether it is a
/// router.
fn inspect(engine: &Engine, component: &Component) -> Result<(bool, bool), String> {
    let ty = component.component_type();
    let imports: Vec<&str> = ty
        .imports(engine.wasmtime())
        .map(|(name, _)| name)
        .collect();
    let exports: Vec<&str> = ty
        .exports(engine.wasmtime())
        .map(|(name, _)| name)
        .collect();
    for name in imports.iter().chain(&exports) {
        let version = name
            .strip_prefix("pointsman:plugin/")
            .and_then(|rest| rest.split_once('@'))
            .map(|(_, version)| version);
        if let Some(version) = version.filter(|version| {
            *version != bindings::VERSION
                && !version.starts_with(&format!("{}.", bindings::VERSION))
        }) {
            let built_for = version.splitn(3, '.').take(2).collect::<Vec<_>>().join(".");
            return Err(format!(
                "was built for pointsman:plugin {built_for}; this host supports {}",
                bindings::VERSION
            ));
        }
    }
    if let Some(foreign) = imports.iter().find(|name| !is_granted(name)) {
        return Err(format!(
            "imports {}, which plugins are not granted",
            foreign.escape_debug()
        ));
    }
    let has = |interface: &str| {
        exports.iter().any(|name| {
            name.strip_prefix("pointsman:plugin/")
                .and_then(|rest| rest.split_once('@'))
                .is_some_and(|(name, _)| name == interface)
        })
    };
    let (is_filter, is_router) = (has("filter"), has("router"));
    if !is_filter && !is_router {
        return Err("exports neither pointsman:plugin/filter nor pointsman:plugin/router; in Rust, use `pointsman_plugin::export!`".to_owned());
    }
    if !has("lifecycle") {
        return Err(
            "does not export pointsman:plugin/lifecycle, which every plugin must export".to_owned(),
        );
    }
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
    Ok((is_filter, is_router))
}
