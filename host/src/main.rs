//! The command `pointsman`: arguments, and the exit code. What a command does is under `cli/`, what a node does in the library.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}
