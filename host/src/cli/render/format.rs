//! Formats sizes, times, imports and limits for the plugin commands.

use std::io::IsTerminal as _;
use std::time::Duration;

use pointsman::plugin::Limits;
use pointsman::plugin::inspect::Import;

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// A size in bytes, KiB or MiB.
pub(in crate::cli) fn size(bytes: usize) -> String {
    match bytes {
        0..KIB => format!("{bytes} bytes"),
        KIB..MIB => format!("{:.1} KiB", bytes as f64 / KIB as f64),
        _ => format!("{:.1} MiB", bytes as f64 / MIB as f64),
    }
}

/// A time in milliseconds; to the microsecond below 10 ms.
pub(in crate::cli) fn time(time: Duration) -> String {
    let ms = time.as_secs_f64() * 1_000.0;
    if ms < 10.0 {
        format!("{ms:.3} ms")
    } else {
        format!("{ms:.1} ms")
    }
}

/// The imports, one per line; those not granted in red.
pub(in crate::cli) fn imports(imports: &[Import]) -> Vec<String> {
    if imports.is_empty() {
        return vec!["none".to_owned()];
    }
    let line = |import: &Import| {
        if import.is_granted {
            import.name.clone()
        } else {
            red(&format!("{}: not granted", import.name))
        }
    };
    imports.iter().map(line).collect()
}

/// The limits under their configuration keys.
pub(in crate::cli) fn limits(limits: &Limits) -> String {
    format!(
        "deadline {}ms, memory_mib {}, result_kib {}, max_targets {}, calls_per_instance {}",
        limits.deadline.as_millis(),
        limits.memory_bytes / MIB,
        limits.result_bytes / KIB,
        limits.targets,
        limits.calls_per_instance
    )
}

/// Red text if standard output is a terminal; unchanged otherwise.
pub(in crate::cli) fn red(text: &str) -> String {
    if std::io::stdout().is_terminal() {
        format!("\u{1b}[31m{text}\u{1b}[0m")
    } else {
        text.to_owned()
    }
}
