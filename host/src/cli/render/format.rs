//! How what is said of a plugin is put into words and figures.

use std::io::IsTerminal as _;
use std::time::Duration;

use pointsman::plugin::Limits;
use pointsman::plugin::inspect::Import;

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// A size in the unit that fits.
pub(in crate::cli) fn size(bytes: usize) -> String {
    match bytes {
        0..KIB => format!("{bytes} bytes"),
        KIB..MIB => format!("{:.1} KiB", bytes as f64 / KIB as f64),
        _ => format!("{:.1} MiB", bytes as f64 / MIB as f64),
    }
}

/// A time in milliseconds, to the microsecond where it is short.
pub(in crate::cli) fn time(time: Duration) -> String {
    let ms = time.as_secs_f64() * 1_000.0;
    if ms < 10.0 {
        format!("{ms:.3} ms")
    } else {
        format!("{ms:.1} ms")
    }
}

/// What is wanted of the host, a line each.
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

/// The limits with the names that the configuration has for them.
pub(in crate::cli) fn limits(limits: &Limits) -> String {
    format!(
        "deadline_ms {}, memory_mib {}, result_kib {}, max_targets {}, calls_per_instance {}",
        limits.deadline.as_millis(),
        limits.memory_bytes / MIB,
        limits.result_bytes / KIB,
        limits.targets,
        limits.calls_per_instance
    )
}

/// For what is wrong, where it is read by a person.
pub(in crate::cli) fn red(text: &str) -> String {
    if std::io::stdout().is_terminal() {
        format!("\u{1b}[31m{text}\u{1b}[0m")
    } else {
        text.to_owned()
    }
}
