//! `pointsman plugin list` and what else an operator does with the plugins of a running node, by its listener for operators.
//!
//! What each of these does there, and when it refuses, is the node's business.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use pointsman::event::rfc3339;
use pointsman::plugin::{MAX_FILE_BYTES, called};
use serde_json::Value;

use super::super::{Admin, accept, agent, read as answer};
use super::read;

/// An interpreter compiled to WebAssembly takes seconds to load, and a replay asks about thousands of events.
const PATIENCE: Duration = Duration::from_secs(300);

#[derive(Debug, clap::Args)]
pub(super) struct List {
    #[command(flatten)]
    admin: Admin,
}

/// A plugin of a node.
#[derive(Debug, clap::Args)]
pub(super) struct Named {
    /// What the plugin is called there
    name: String,
    #[command(flatten)]
    admin: Admin,
}

#[derive(Debug, clap::Args)]
pub(super) struct Upload {
    /// The new version
    #[arg(value_name = "FILE.wasm")]
    file: PathBuf,
    /// What the plugin is called there; otherwise as its file
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    #[command(flatten)]
    admin: Admin,
}

#[derive(Debug, clap::Args)]
pub(super) struct Shadow {
    /// What the plugin is called there
    name: String,
    /// Begin with this candidate; without it, print how the one that runs differs
    #[arg(value_name = "FILE.wasm")]
    file: Option<PathBuf>,
    /// End it
    #[arg(long, conflicts_with = "file")]
    end: bool,
    #[command(flatten)]
    admin: Admin,
}

#[derive(Debug, clap::Args)]
pub(super) struct Replay {
    /// What the plugin is called there
    name: String,
    /// The candidate
    #[arg(value_name = "FILE.wasm")]
    file: PathBuf,
    /// Over so many of the newest events
    #[arg(long, value_name = "N", default_value = "1000")]
    last: usize,
    #[command(flatten)]
    admin: Admin,
}

pub(super) fn list(options: &List) -> anyhow::Result<()> {
    let listed: Value =
        serde_json::from_str(&send(&options.admin, "GET", "/v1/plugins", None)?).context("the node's answer is not JSON")?;
    let mut rows = vec![["NAME", "KIND", "STATE", "GENERATION", "VERSION", "HASH", "SINCE", "LAST REFUSED"].map(str::to_owned)];
    for plugin in listed["plugins"].as_array().into_iter().flatten() {
        let text = |key: &str| plugin[key].as_str().map(|text| text.escape_debug().to_string()).filter(|text| !text.is_empty());
        let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let hash = text("hash").map(|hash| hash.chars().take(12).collect());
        let since = plugin["since_ms"].as_u64().filter(|ms| *ms > 0).map(rfc3339);
        let [name, kind, state, version] = ["name", "kind", "state", "version"].map(|key| or_none(text(key)));
        let refused = plugin["refusal"]["reason"].as_str().map(|reason| {
            let at = plugin["refusal"]["at_ms"].as_u64().map(|ms| format!("{}: ", rfc3339(ms))).unwrap_or_default();
            format!("{at}{}", reason.escape_debug())
        });
        let refused = refused.or_else(|| text("failure"));
        rows.push([name, kind, state, plugin["generation"].to_string(), version, or_none(hash), or_none(since), or_none(refused)]);
    }
    // The last column is a sentence.
    let widths: [usize; 7] = std::array::from_fn(|at| rows.iter().map(|row| row[at].chars().count()).max().unwrap_or_default());
    for row in &rows {
        let cells = row.iter().zip(widths.into_iter().chain([0])).map(|(cell, width)| format!("{cell:<width$}"));
        println!("{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
    if let Some(failure) = listed["folder_failure"].as_str() {
        println!("{failure}");
    }
    Ok(())
}

pub(super) fn upload(Upload { file, name, admin }: &Upload) -> anyhow::Result<()> {
    let name = name.clone().unwrap_or_else(|| called(&file.file_name().unwrap_or_default().to_string_lossy()));
    print(&send(admin, "PUT", &path(&name, "")?, Some(file))?)
}

/// What takes nothing but the name: `method` at the plugin's path with `rest`.
pub(super) fn act(Named { name, admin }: &Named, method: &str, rest: &str) -> anyhow::Result<()> {
    print(&send(admin, method, &path(name, rest)?, None)?)
}

pub(super) fn shadow(Shadow { name, file, end, admin }: &Shadow) -> anyhow::Result<()> {
    let method = match (file, end) {
        (Some(_), _) => "PUT",
        (None, true) => "DELETE",
        (None, false) => "GET",
    };
    print(&send(admin, method, &path(name, "/shadow")?, file.as_deref())?)
}

pub(super) fn replay(Replay { name, file, last, admin }: &Replay) -> anyhow::Result<()> {
    print(&send(admin, "POST", &path(name, &format!("/replay?last={last}"))?, Some(file))?)
}

fn path(name: &str, rest: &str) -> anyhow::Result<String> {
    let is_plain = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~".contains(&b));
    ensure!(is_plain, "'{}' cannot be named here; rename its file to letters, digits and hyphens", name.escape_debug());
    Ok(format!("/v1/plugins/{name}{rest}"))
}

fn send(admin: &Admin, method: &str, path: &str, file: Option<&Path>) -> anyhow::Result<String> {
    let body = file.map(|file| read(file, MAX_FILE_BYTES)).transpose()?;
    accept(answer(admin.request(&agent(PATIENCE), method, path, body.as_deref())?)?)
}

/// An answer for people: JSON with line breaks.
fn print(text: &str) -> anyhow::Result<()> {
    if !text.is_empty() {
        let answer: Value = serde_json::from_str(text).context("the node's answer is not JSON")?;
        println!("{answer:#}");
    }
    Ok(())
}
