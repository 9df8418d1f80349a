//! Runs Cargo, rustc and rustup to build plugins written in Rust.

use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::Value;

/// The Rust target that plugins are built for.
pub(in crate::cli) const WASM: &str = "wasm32-unknown-unknown";

const NO_RUST: &str = "install Rust from https://rustup.rs";

/// The command that adds the target.
fn line() -> String {
    format!("rustup target add {WASM}")
}

/// Whether the compiler that rustup selects in this folder has the target.
///
/// # Errors
/// rustc cannot be run.
fn has_wasm_target(folder: &Path) -> anyhow::Result<bool> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc)
        .args(["--print", "target-libdir", "--target", WASM])
        .current_dir(folder)
        .stdin(Stdio::null())
        .output();
    let output = output.with_context(|| format!("cannot run rustc; {NO_RUST}"))?;
    let libraries = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    Ok(output.status.success() && libraries.is_dir())
}

/// Adds the target if it is missing. Returns whether it was added.
///
/// # Errors
/// The step that the user has to take by hand.
pub(super) fn add_wasm_target(folder: &Path) -> Result<bool, String> {
    match has_wasm_target(folder) {
        Err(_) => return Err(NO_RUST.to_owned()),
        Ok(true) => return Ok(false),
        Ok(false) => {}
    }
    let added = Command::new("rustup")
        .args(["target", "add", WASM])
        .current_dir(folder)
        .stdin(Stdio::null())
        .status();
    if added.is_ok_and(|status| status.success()) && has_wasm_target(folder).unwrap_or(false) {
        Ok(true)
    } else {
        Err(format!("add the target: {}", line()))
    }
}

/// Build options of plugins.
#[derive(Clone, Debug, clap::Args)]
pub(in crate::cli) struct Profile {
    /// Cargo profile to build with
    #[arg(long, default_value = "release")]
    profile: String,
}

/// A running build. Clones share it; dropping the last one ends Cargo and every process it started.
#[derive(Clone, Debug)]
pub(in crate::cli) struct Build(Arc<Running>);

#[derive(Debug)]
struct Running {
    /// `None` once Cargo has ended, because another process may then have its id. Waiting and
    /// signalling both take the value under this lock, so no other process is ever signalled.
    cargo: Mutex<Option<Child>>,
    manifest: PathBuf,
    /// Whether Cargo leads its own process group, which signals from the terminal do not reach.
    is_apart: bool,
}

impl Build {
    /// Starts Cargo on the crate in this folder with this profile. Cargo's diagnostics go to
    /// standard error.
    ///
    /// `is_apart`: run Cargo in its own process group, out of reach of terminal signals; the build
    /// then ends only when it finishes or is dropped.
    ///
    /// # Errors
    /// The crate, Cargo or the target is missing; the message has the fix.
    pub(in crate::cli) fn start(
        folder: &Path,
        profile: &Profile,
        is_apart: bool,
    ) -> anyhow::Result<Self> {
        let manifest = folder.join("Cargo.toml");
        if !manifest.is_file() {
            bail!(
                "neither Cargo.toml nor plugin.toml in {}; create a project with: pointsman plugin new my-router --kind router",
                folder.display()
            );
        }
        if !has_wasm_target(folder)? {
            bail!("the target {WASM} is missing; add it with: {}", line());
        }
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        command.args([
            "build",
            "--profile",
            &profile.profile,
            "--target",
            WASM,
            "--message-format",
            "json-render-diagnostics",
        ]);
        command
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        if is_apart {
            command.process_group(0);
        }
        let manifest = manifest.canonicalize()?;
        let cargo = command
            .spawn()
            .with_context(|| format!("cannot run cargo; {NO_RUST}"))?;
        Ok(Self(Arc::new(Running {
            cargo: Mutex::new(Some(cargo)),
            manifest,
            is_apart,
        })))
    }

    /// Waits for the build to end and returns the plugin files it made, usually one.
    ///
    /// # Errors
    /// The build failed (Cargo has printed the reason), was cancelled, or made no plugin.
    pub(in crate::cli) fn finish(&self) -> anyhow::Result<Vec<PathBuf>> {
        let Running {
            cargo, manifest, ..
        } = &*self.0;
        let out = lock(cargo)
            .as_mut()
            .and_then(|cargo| cargo.stdout.take())
            .context("the build was cancelled")?;
        let (mut own, mut all) = (Vec::new(), Vec::new());
        for line in BufReader::new(out).lines() {
            let message: Value = serde_json::from_str(&line?).unwrap_or_default();
            let has_library = message["target"]["crate_types"]
                .as_array()
                .is_some_and(|types| types.iter().any(|kind| kind == "cdylib"));
            if message["reason"] != "compiler-artifact" || !has_library {
                continue;
            }
            let files = message["filenames"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .map(PathBuf::from);
            let files: Vec<PathBuf> = files
                .filter(|file| {
                    file.extension()
                        .is_some_and(|extension| extension == "wasm")
                })
                .collect();
            if message["manifest_path"].as_str().map(Path::new) == Some(manifest) {
                own.extend(files.iter().cloned());
            }
            all.extend(files);
        }
        // Cargo has closed its output and is about to exit.
        let has_succeeded = lock(cargo)
            .take()
            .context("the build was cancelled")?
            .wait()?
            .success();
        ensure!(has_succeeded, "cargo build failed; see its output above");
        // The manifest of a workspace may build several plugins.
        let made = if own.is_empty() { all } else { own };
        let lacks = "does not build a plugin, because it has no cdylib target; add:\n[lib]\ncrate-type = [\"cdylib\", \"rlib\"]";
        ensure!(!made.is_empty(), "{} {lacks}", manifest.display());
        Ok(made)
    }

    /// Cancels the build; [`Build::finish`] then fails.
    pub(in crate::cli) fn end(&self) {
        self.0.end();
    }
}

impl Running {
    fn end(&self) {
        let Some(mut cargo) = lock(&self.cargo).take() else {
            return;
        };
        let group = i32::try_from(cargo.id())
            .ok()
            .and_then(Pid::from_raw)
            .filter(|_| self.is_apart);
        // The group includes the compilers that Cargo started. An error means that the process has
        // already ended.
        match group {
            Some(group) => drop(kill_process_group(group, Signal::TERM)),
            None => drop(cargo.kill()),
        }
        drop(cargo.wait());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

fn lock(cargo: &Mutex<Option<Child>>) -> MutexGuard<'_, Option<Child>> {
    cargo.lock().expect("no panic under this lock")
}
