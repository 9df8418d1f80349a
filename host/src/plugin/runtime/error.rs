//! Why a file cannot run as a plugin, and the text of wasmtime's errors.

use super::log::printable;

/// Why a file cannot run as a plugin. The text continues a sentence that begins with the file name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct LoadError(pub(in crate::plugin) String);

/// Describes an error that is neither a trap nor an exceeded limit.
pub(super) fn contract_violation(error: &wasmtime::Error) -> String {
    let causes = causes(error);
    if causes.contains("fuel allocated for hostcalls") {
        return "its answer exceeds its limits (result_kib, max_targets)".to_owned();
    }
    format!("violates the plugin contract: {causes}")
}

/// The causes of an error without the backtrace, outermost first, on one line.
pub(super) fn causes(error: &wasmtime::Error) -> String {
    let causes: Vec<String> = error
        .chain()
        .map(|cause| cause.to_string())
        .filter(|cause| !cause.starts_with("error while executing at wasm backtrace"))
        .collect();
    printable(&causes.join(": "))
}
