//! From the bytes of a file to machine code, and which imports and exports a plugin may have.
//!
//! The checks that need no time are in `compile`, the budget for the rest in `compiler`.

use wasmtime::component::Component;

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

/// The interface and the version of a name of the contract, such as `lifecycle` and `0.1.0`.
fn contract_interface(name: &str) -> Option<(&str, &str)> {
    name.strip_prefix("pointsman:plugin/")?.split_once('@')
}

fn is_supported(version: &str) -> bool {
    version == bindings::VERSION || version.starts_with(&format!("{}.", bindings::VERSION))
}

/// Whether a component imports another version of the contract than this host supports.
pub(super) fn has_other_version(engine: &wasmtime::Engine, component: &Component) -> bool {
    let ty = component.component_type();
    ty.imports(engine)
        .filter_map(|(name, _)| contract_interface(name))
        .any(|(_, version)| !is_supported(version))
}

/// Whether these exports have the interface, in the version of the contract that this host supports.
fn has<'a>(mut exports: impl Iterator<Item = &'a str>, interface: &str) -> bool {
    exports.any(|export| {
        contract_interface(export)
            .is_some_and(|(name, version)| name == interface && is_supported(version))
    })
}

/// Checks that the component was built for a contract of this host and imports only what plugins
/// are granted. A later version of the contract may be served beside this one, by the same file. It
/// never runs here, so that its imports may trap.
pub(super) fn check_imports<'a>(
    mut imports: impl Iterator<Item = &'a str> + Clone,
    exports: impl Iterator<Item = &'a str> + Clone,
) -> Result<(), String> {
    let has = |interface| has(exports.clone(), interface);
    let is_plugin = (has("filter") || has("router")) && has("lifecycle");
    let mut versions = exports
        .clone()
        .chain(imports.clone())
        .filter_map(|name| contract_interface(name).map(|(_, version)| version));
    if !is_plugin && let Some(version) = versions.find(|version| !is_supported(version)) {
        let built_for = version.splitn(3, '.').take(2).collect::<Vec<_>>().join(".");
        return Err(format!(
            "was built for pointsman:plugin {}; this host supports {}",
            printable(&built_for),
            bindings::VERSION
        ));
    }
    if let Some(foreign) = imports.find(|name| !is_granted(name)) {
        return Err(format!(
            "imports {}, which plugins are not granted",
            foreign.escape_debug()
        ));
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
    let has = |interface| has(exports.clone(), interface);
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
