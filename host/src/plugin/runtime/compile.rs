//! From the bytes of a file to a component that may run here: whether the file is whole, what it is compiled to, what it imports and exports.
//!
//! It promises that nothing is compiled that is no WebAssembly, a compiled file least of all: what was compiled before comes from [`cache`],
//! whose files nobody hands in. Whether a component keeps what it says of itself shows its first instance, in `plugin`.
//!
//! [`cache`]: super::cache

use wasmtime::component::Component;

use super::cache::Key;
use super::log::printable;
use crate::plugin::{Engine, Limits, bindings, causes, engine};

/// A component whose imports are granted.
pub(in crate::plugin) struct Compiled {
    pub(in crate::plugin) component: Component,
    pub(in crate::plugin) has_filter: bool,
    pub(in crate::plugin) has_router: bool,
    /// Its code was not made now.
    pub(in crate::plugin) is_cached: bool,
}

/// Checks the bytes of a file, and compiles them unless the engine's cache has their code. `hash`: of the bytes, in hexadecimal.
///
/// # Errors
/// Why not, as the end of a sentence that begins with the file's name.
pub(in crate::plugin) fn compile(
    engine: &Engine,
    bytes: &[u8],
    hash: &str,
    limits: &Limits,
) -> Result<Compiled, String> {
    const MIB: usize = 1024 * 1024;
    if bytes.is_empty() {
        return Err("is empty".to_owned());
    }
    if bytes.len() > limits.file_bytes {
        return Err(format!(
            "has {} MiB; {} is the most",
            bytes.len().div_ceil(MIB),
            limits.file_bytes / MIB
        ));
    }
    if !bytes.starts_with(b"\0asm") {
        return Err("is no WebAssembly: it does not begin with '\\0asm'".to_owned());
    }
    let cache = engine
        .cache()
        .map(|cache| (cache, Key::new(engine.wasmtime(), hash)));
    let cached = cache
        .as_ref()
        .and_then(|(cache, key)| cache.take(engine.wasmtime(), key));
    let is_cached = cached.is_some();
    let component = match cached {
        // The same bytes were checked and compiled by this version of the host.
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
    // Looked through before anything is made of it, for a clear word about a file that is still being written.
    wasmparser::Validator::new()
        .validate_all(bytes)
        .map_err(|error| format!("is truncated or damaged: {}", printable(&error.to_string())))?;
    let encoded;
    let component = if wasmparser::Parser::is_component(bytes) {
        bytes
    } else {
        let encoder = wit_component::ComponentEncoder::default().module(bytes);
        encoded = encoder
            .and_then(|mut encoder| encoder.encode())
            .map_err(|e| {
                format!(
                    "is a core module that cannot be made a component: {}",
                    printable(&format!("{e:#}"))
                )
            })?;
        &encoded
    };
    Component::from_binary(engine.wasmtime(), component)
        .map_err(|e| format!("does not compile: {}", causes(&e)))
}

/// Whether plugins are granted what they import under this name.
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

/// Whether a component's imports are granted, and what it exports: a filter, a router or both.
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
                "was built for pointsman:plugin {built_for}; this host speaks {}",
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
        return Err("exports neither pointsman:plugin/filter nor pointsman:plugin/router; a plugin in Rust does so with `pointsman_plugin::export!`".to_owned());
    }
    if !has("lifecycle") {
        return Err(
            "does not export pointsman:plugin/lifecycle, by which it is configured".to_owned(),
        );
    }
    if let Some(resources) = component.resources_required()
        && resources.num_memories as usize > engine::MAX_MEMORIES
    {
        return Err(format!(
            "has {} memories; {} is the most",
            resources.num_memories,
            engine::MAX_MEMORIES
        ));
    }
    Ok((is_filter, is_router))
}
