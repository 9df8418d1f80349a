//! `pointsman` as a person calls it, and what it says.

use std::process::{Command, Output, Stdio};

/// `pointsman`, away from any `pointsman.toml` and from what is configured for whoever runs the tests.
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

/// What a command says, on both outputs, and whether it ended well.
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

/// As [`said`], of a command that must end well.
pub(crate) fn told(command: &mut Command) -> String {
    let (is_well, said) = said(command);
    assert!(is_well, "{command:?}:\n{said}");
    said
}
