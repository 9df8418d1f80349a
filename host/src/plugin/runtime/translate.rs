//! From the bytes of a file to machine code, and which imports and exports a plugin may have.
//!
//! The checks that need no time are in `compile`, the budget for the rest in `compiler`.

use super::bindings;
use super::component;
use super::error::{asynchronous, causes, not_valid};
use super::log::printable;
use super::surface::Surface;

/// Turns the bytes of a file into machine code. Takes as long as the file demands, so it runs
/// within the budget of `compiler`.
///
/// # Errors
/// Why not, as the rest of a sentence that begins with the file name.
pub(super) fn translate(engine: &wasmtime::Engine, bytes: &[u8]) -> Result<Vec<u8>, String> {
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
    let surface = Surface::of(component);
    check_imports(
        surface.imports.iter().map(String::as_str),
        surface.exports.iter().map(String::as_str),
    )?;
    engine.precompile_component(component).map_err(|e| {
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

/// Checks that the component was built for a contract of this host and imports only what plugins
/// are granted.
pub(super) fn check_imports<'a>(
    imports: impl Iterator<Item = &'a str> + Clone,
    exports: impl Iterator<Item = &'a str>,
) -> Result<(), String> {
    for name in imports.clone().chain(exports) {
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
                "was built for pointsman:plugin {}; this host supports {}",
                printable(&built_for),
                bindings::VERSION
            ));
        }
    }
    for name in imports {
        if !is_granted(name) {
            return Err(format!(
                "imports {}, which plugins are not granted",
                name.escape_debug()
            ));
        }
    }
    Ok(())
}

/// Checks a component's imports and exports. Returns whether it is a filter and whether it is a
/// router.
pub(super) fn check_names<'a>(
    imports: impl Iterator<Item = &'a str> + Clone,
    exports: impl Iterator<Item = &'a str> + Clone,
) -> Result<(bool, bool), String> {
    check_imports(imports, exports.clone())?;
    let has = |interface: &str| {
        exports.clone().any(|name| {
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
    Ok((is_filter, is_router))
}
