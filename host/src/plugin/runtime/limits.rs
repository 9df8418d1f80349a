//! The resource limits of a plugin. [`Plugin`](super::plugin::Plugin) applies them to each call,
//! `compile` to the file; operators set them in `plugins.NAME`.

use std::time::Duration;

/// The maximum size of a plugin file, in bytes. Components built from JavaScript take 13 MB, from
/// Python up to 35 MB.
pub const MAX_FILE_BYTES: usize = 64 * 1024 * 1024;

/// The resource limits of one plugin.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// CPU time of a call for an event.
    pub deadline: Duration,
    /// CPU time of each of instantiation, `describe` and `configure`.
    pub setup_deadline: Duration,
    /// The maximum memory of an instance, in bytes.
    pub memory_bytes: usize,
    /// The maximum size of the text in an answer, in bytes.
    pub result_bytes: usize,
    /// The maximum number of targets in an answer.
    pub targets: usize,
    /// Calls after which an instance is replaced by a fresh one.
    pub calls_per_instance: u32,
    /// The maximum file size, in bytes.
    pub file_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            deadline: Duration::from_millis(50),
            setup_deadline: Duration::from_secs(1),
            memory_bytes: 32 * 1024 * 1024,
            result_bytes: 256 * 1024,
            targets: 10_000,
            calls_per_instance: 10_000,
            file_bytes: MAX_FILE_BYTES,
        }
    }
}
