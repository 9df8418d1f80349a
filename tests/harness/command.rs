//! The `pointsman` command line and its output.

use std::process::{Command, Output, Stdio};

/// A `pointsman` command that reads no `pointsman.toml` and no `POINTSMAN_` variable of the person
/// who runs the tests.
pub(crate) fn pointsman(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pointsman"));
    command
        .args(arguments)
        .current_dir(std::env::temp_dir())
        .stdin(Stdio::null());
    for (variable, _) in
        std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("POINTSMAN_"))
    {
        command.env_remove(variable);
    }
    command
}

/// Runs a command. Returns whether it succeeded, and its standard output followed by its standard
/// error.
pub(crate) fn said(command: &mut Command) -> (bool, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().expect("run it");
    (
        status.success(),
        format!(
            "{}{}",
            String::from_utf8_lossy(&stdout),
            String::from_utf8_lossy(&stderr)
        ),
    )
}

/// Like [`said`], for a command that must succeed.
///
/// # Panics
/// If it fails.
pub(crate) fn output_of(command: &mut Command) -> String {
    let (is_well, said) = said(command);
    assert!(is_well, "{command:?}:\n{said}");
    said
}
