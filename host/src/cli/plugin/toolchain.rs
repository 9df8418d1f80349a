//! Cargo, rustc and rustup, as far as a plugin in Rust needs them.

use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::Value;

/// The target that plugins are built for.
pub(in crate::cli) const WASM: &str = "wasm32-unknown-unknown";

const NO_RUST: &str = "install Rust, as https://rustup.rs says";

/// The exact line that adds the target.
fn line() -> String {
    format!("rustup target add {WASM}")
}

/// Whether the compiler that works in this folder has the target.
///
/// # Errors
/// There is no compiler.
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

/// Adds the target where it is missing; `false`: it was there.
///
/// # Errors
/// What is to be done by hand.
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

/// How plugins are built.
#[derive(Clone, Debug, clap::Args)]
pub(in crate::cli) struct Profile {
    /// The profile of Cargo to build in
    #[arg(long, default_value = "release")]
    profile: String,
}

/// A build under way; clones are the same one. With the last of them it ends, and everything that it started.
#[derive(Clone, Debug)]
pub(in crate::cli) struct Build(Arc<Running>);

#[derive(Debug)]
struct Running {
    /// `None`: it has ended, and its number may be another process's. Ended and taken under one lock, so that no other is ever signalled.
    cargo: Mutex<Option<Child>>,
    manifest: PathBuf,
    /// Whether Cargo is the head of a process group, which signals of the terminal do not reach.
    is_apart: bool,
}

impl Build {
    /// Starts Cargo on the crate in this folder, in this profile. What Cargo says goes to standard error.
    ///
    /// `is_apart`: signals of the terminal do not reach it; whoever drops this ends it.
    ///
    /// # Errors
    /// There is no crate, no Cargo, or no target; with the fix.
    pub(in crate::cli) fn start(
        folder: &Path,
        profile: &Profile,
        is_apart: bool,
    ) -> anyhow::Result<Self> {
        let manifest = folder.join("Cargo.toml");
        if !manifest.is_file() {
            bail!(
                "there is no Cargo.toml in {}; make a project by: pointsman plugin new my-router --kind router",
                folder.display()
            );
        }
        if !has_wasm_target(folder)? {
            bail!("the target {WASM} is missing; add it by: {}", line());
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

    /// Waits for its end, and answers the plugins that it made: one, as a rule.
    ///
    /// # Errors
    /// It failed, and has said why; or what it built is no plugin.
    pub(in crate::cli) fn finish(&self) -> anyhow::Result<Vec<PathBuf>> {
        let Running {
            cargo, manifest, ..
        } = &*self.0;
        let out = lock(cargo)
            .as_mut()
            .and_then(|cargo| cargo.stdout.take())
            .context("the build was ended")?;
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
        // It has closed its output, and is about to end.
        let has_succeeded = lock(cargo)
            .take()
            .context("the build was ended")?
            .wait()?
            .success();
        ensure!(
            has_succeeded,
            "it does not compile; what cargo says stands above"
        );
        // In the folder of a workspace there may be several.
        let made = if own.is_empty() { all } else { own };
        let lacks = "is no plugin: it builds no cdylib; write into it:\n[lib]\ncrate-type = [\"cdylib\", \"rlib\"]";
        ensure!(!made.is_empty(), "{} {lacks}", manifest.display());
        Ok(made)
    }

    /// Ends it; [`Build::finish`] then fails.
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
        // The compilers that Cargo started are of its group; whatever is gone already is well.
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
