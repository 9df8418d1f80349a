//! `pointsman compile-plugin`: the process in which a node or another command compiles a plugin. Not
//! for users; `pointsman plugin compile` is.

use std::process::ExitCode;
use std::time::Duration;

use pointsman::plugin::{CompileBudget, MemoryLayout, compile_as_child};

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    time_ms: u64,
    memory_mib: u32,
    #[arg(value_parser = layout)]
    layout: MemoryLayout,
}

fn layout(word: &str) -> Result<MemoryLayout, String> {
    MemoryLayout::of_word(word).ok_or_else(|| "use reserved or compact".to_owned())
}

pub(super) fn run(options: &Options) -> ExitCode {
    let budget = CompileBudget {
        time: Duration::from_millis(options.time_ms),
        memory_mib: options.memory_mib,
    };
    ExitCode::from(compile_as_child(budget, options.layout))
}
