//! Why a file cannot run as a plugin, and the text of wasmtime's errors.

use std::panic::{AssertUnwindSafe, catch_unwind};

use wasmtime::{PoolConcurrencyLimitError, WasmBacktrace};

use super::log::printable;

/// How the refusal of a file begins whose end is missing, as while it is being copied.
pub(in crate::plugin) const TRUNCATED: &str = "is truncated or damaged";
/// The refusal of a file without a byte.
pub(in crate::plugin) const EMPTY: &str = "is empty";
/// The innermost functions that a failure names, and the size of a name in bytes.
const MAX_FRAMES: usize = 5;
const MAX_FRAME: usize = 100;

/// Why a file cannot run as a plugin. The text continues a sentence that begins with the file name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct LoadError {
    reason: String,
    /// Whether the host lacked something and the file may load later. Otherwise the file is at
    /// fault.
    is_transient: bool,
}

impl LoadError {
    /// The file is at fault.
    pub(in crate::plugin) fn of_file(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            is_transient: false,
        }
    }

    /// The host is at fault, at this moment.
    pub(in crate::plugin) fn of_host(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            is_transient: true,
        }
    }

    pub(in crate::plugin) const fn is_transient(&self) -> bool {
        self.is_transient
    }
}

/// Runs a step of loading a file. The validator, the encoder, the compiler and the runtime take any
/// input, and a bug in them must cost the file and not the thread.
///
/// # Errors
/// That of the step, or that it panicked.
pub(super) fn contain_panic<T>(
    step: impl FnOnce() -> Result<T, LoadError>,
) -> Result<T, LoadError> {
    // Whatever the step left behind is dropped: it shares nothing but the engine, which does not
    // depend on a file.
    catch_unwind(AssertUnwindSafe(step)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        Err(LoadError::of_file(format!(
            "makes this host panic: {}; report it with the file",
            printable(text)
        )))
    })
}

/// Describes an error that is neither a trap nor an exceeded limit.
pub(super) fn contract_violation(error: &wasmtime::Error) -> String {
    let causes = causes(error);
    if causes.contains("fuel allocated for hostcalls") {
        return "its answer exceeds its limits (result_kib, max_targets)".to_owned();
    }
    format!("violates the plugin contract: {causes}")
}

/// An exported function of the contract. The engine reports neither the function nor the field of
/// an answer that it cannot read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Function {
    /// While the instance starts.
    Start,
    Describe,
    Configure,
    Evaluate,
    Resolve,
}

impl Function {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Describe => "describe",
            Self::Configure => "configure",
            Self::Evaluate => "evaluate",
            Self::Resolve => "resolve",
        }
    }

    /// Where an error was found that lies in the answer of this function: its name and the fields
    /// of the type concerned. Empty for other errors.
    pub(super) fn place(self, error: &wasmtime::Error) -> String {
        let causes = causes(error);
        let fields = if causes.contains("list pointer") {
            match self {
                Self::Start => "",
                Self::Describe => "types, reads.attributes or reads.fields",
                Self::Configure => "the list of issues",
                Self::Evaluate => "amend.attributes",
                Self::Resolve => {
                    "the list of routes, or targets, when.any-of, its clauses or values of a route"
                }
            }
        } else if causes.contains("string pointer") || causes.contains("utf-8") {
            match self {
                Self::Start => "",
                Self::Describe => {
                    "name, version, description, config-schema, or an element of types, reads.attributes or reads.fields"
                }
                Self::Configure => "path or message of an issue",
                Self::Evaluate => {
                    "the reason of a drop or failure, or name or value of amend.attributes"
                }
                Self::Resolve => {
                    "targets, collapse-key, event-name, body or when of a route, or the reason of a failure"
                }
            }
        } else if causes.contains("discriminant") {
            match self {
                Self::Start => "",
                Self::Describe => "config-schema",
                Self::Configure => "the result",
                Self::Evaluate => "the verdict, its priority, or a value of amend.attributes",
                Self::Resolve => "the result, or targets, when, priority or an option of a route",
            }
        } else {
            ""
        };
        if fields.is_empty() {
            return String::new();
        }
        format!(" in the answer of `{}` ({fields})", self.name())
    }
}

/// The innermost functions of the guest at an error, innermost first. Functions without a name are
/// shown by their index.
pub(super) fn frames(error: &wasmtime::Error) -> Vec<String> {
    let Some(backtrace) = error.downcast_ref::<WasmBacktrace>() else {
        return Vec::new();
    };
    // The text is the only form that has the names as they were written and not as linked.
    let text = backtrace.to_string();
    let names = text.lines().filter_map(|line| {
        let (at, name) = line.split_once(" - ")?;
        let (number, _) = at.split_once(':')?;
        number.trim().parse::<u32>().ok()?;
        let name = name.split_once('!').map_or(name, |(_, function)| function);
        let cut = name.floor_char_boundary(MAX_FRAME);
        Some(printable(&name[..cut]))
    });
    names.take(MAX_FRAMES).collect()
}

/// The refusal of a component with asynchronous functions, if this is why it is not valid or does
/// not compile.
pub(super) fn asynchronous(what: &str) -> Option<String> {
    let is_async = what.contains("component model async")
        || what.contains("`async`")
        || what.contains("async function type");
    is_async.then(|| {
        format!(
            "has asynchronous functions, which plugins may not have; build it with synchronous ones: with wit-bindgen without `async: true` or `--async`, with wasm-tools without `--async-callback` and `--async-stackful`: {what}"
        )
    })
}

/// Describes why a file is not valid WebAssembly for plugins, as the rest of a sentence that begins
/// with the file name.
pub(super) fn not_valid(error: &wasmparser::BinaryReaderError) -> String {
    let text = error.message();
    let what = printable(&error.to_string());
    if let Some(advice) = asynchronous(&what) {
        return advice;
    }
    let is_feature = ["not enabled", "proposal", "must be enabled", " feature"]
        .iter()
        .any(|word| text.contains(word));
    if is_feature {
        return format!(
            "uses a WebAssembly proposal that plugins may not use; build it without: {what}"
        );
    }
    let is_unknown = ["illegal opcode", "unknown binary version"]
        .iter()
        .any(|word| text.contains(word));
    if is_unknown {
        return format!(
            "is damaged, or uses a WebAssembly proposal that this host does not know; build it for WebAssembly 2.0: {what}"
        );
    }
    format!("{TRUNCATED}: {what}")
}

/// Whether the system, and not the plugin, is the reason of an error: no memory, no address space
/// or no free place in the instance pool.
pub(super) fn is_lack_of_host(error: &wasmtime::Error) -> bool {
    error.is::<PoolConcurrencyLimitError>()
        || error.chain().any(|cause| {
            let code = cause.downcast_ref::<rustix::io::Errno>();
            let io = cause.downcast_ref::<std::io::Error>();
            code.is_some_and(|code| *code == rustix::io::Errno::NOMEM)
                || io.is_some_and(|io| io.kind() == std::io::ErrorKind::OutOfMemory)
        })
        || error.is::<wasmtime::OutOfMemory>()
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

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(bytes: &[u8]) -> String {
        let validated = wasmparser::Validator::new().validate_all(bytes);
        not_valid(&validated.map(drop).unwrap_err())
    }

    #[test]
    fn a_proposal_is_not_reported_as_damage() {
        let wat = |text: &str| wat::parse_str(text).unwrap();
        let paged = refusal(&wat("(module (memory 1 2 (pagesize 1)))"));
        assert!(
            paged.starts_with(
                "uses a WebAssembly proposal that plugins may not use; build it without: "
            ),
            "{paged}"
        );
        let whole = wat("(module (func nop))");
        let mut unknown = whole.clone();
        let at = unknown.iter().rposition(|byte| *byte == 1).unwrap();
        unknown[at] = 0x27;
        let unknown = refusal(&unknown);
        assert!(
            unknown.starts_with(
                "is damaged, or uses a WebAssembly proposal that this host does not know"
            ),
            "{unknown}"
        );
        let cut = refusal(&whole[..whole.len() - 3]);
        assert!(cut.starts_with("is truncated or damaged: "), "{cut}");
    }

    #[test]
    fn an_asynchronous_component_is_told_the_flag() {
        for text in [
            "does not compile: `task.return` requires the component model async feature",
            "the `async` canonical option requires an async function type",
        ] {
            let advice = asynchronous(text).unwrap();
            assert!(advice.contains("--async"), "{advice}");
        }
        assert_eq!(asynchronous("unexpected end-of-file"), None);
    }

    #[test]
    fn an_answer_that_cannot_be_read_names_function_and_fields() {
        let error = wasmtime::format_err!("list pointer/length out of bounds of memory");
        assert_eq!(
            Function::Evaluate.place(&error),
            " in the answer of `evaluate` (amend.attributes)"
        );
        assert!(Function::Resolve.place(&error).contains("targets"));
        let error = wasmtime::format_err!("something else");
        assert_eq!(Function::Resolve.place(&error), "");
    }

    #[test]
    fn a_panic_while_a_file_is_loaded_refuses_the_file() {
        let refused = |step: fn() -> Result<(), LoadError>| contain_panic(step).unwrap_err().reason;
        assert_eq!(refused(|| Err(LoadError::of_file("is empty"))), "is empty");
        assert_eq!(
            refused(|| panic!("no\nmemory")),
            "makes this host panic: no\\nmemory; report it with the file"
        );
        assert!(refused(|| std::panic::panic_any(7)).contains("no message"));
    }
}
