//! How the memories of instances lie in the address space, and the settings of the engine on which
//! compiled code depends.
//!
//! The instance pool, on which it does not depend, is in `engine`.

use wasmtime::Config;

/// How the memories of instances are placed in the address space; compiled code depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryLayout {
    /// Each memory reserves the 4 GiB that a guest can address, so that accesses need no check.
    Reserved,
    /// Each memory reserves little more than it has, and moves when it grows beyond. For processes
    /// whose address space is limited. Calls take 10 to 30 % longer.
    Compact,
}

impl MemoryLayout {
    /// The word for it on the command line of the compiling process.
    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Reserved => "reserved",
            Self::Compact => "compact",
        }
    }

    /// The reverse of `word`.
    pub fn of_word(word: &str) -> Option<Self> {
        [Self::Reserved, Self::Compact]
            .into_iter()
            .find(|layout| layout.word() == word)
    }

    /// An engine that compiles for this layout and has no instances.
    pub(super) fn compiling_engine(self) -> wasmtime::Result<wasmtime::Engine> {
        wasmtime::Engine::new(&self.config())
    }

    /// The settings of an engine that allocates instances one by one.
    pub(super) fn config(self) -> Config {
        let mut config = Config::new();
        config.concurrency_support(false);
        config.epoch_interruption(true);
        config.wasm_memory64(false);
        // In a composed component, wasmtime's own code copies between the memories of its parts.
        config.wasm_multi_memory(true);
        // Exceptions and shared memories are disabled by leaving out the crate features `gc` and
        // `threads`.
        if self == Self::Compact {
            // The default of `memory_mib`; a memory that may grow beyond it moves.
            config.memory_reservation(32 * 1024 * 1024);
            config.memory_reservation_for_growth(64 * 1024 * 1024);
            config.memory_guard_size(64 * 1024);
            config.guard_before_linear_memory(false);
        }
        config
    }
}
