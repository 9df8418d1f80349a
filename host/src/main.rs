//! The `pointsman` command: arguments and exit code. `cli/` implements the commands, the library
//! the node.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
