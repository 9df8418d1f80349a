//! `pointsman plugin list`, `upload` and the other commands that manage the plugins of a running
//! node over its admin listener.
//!
//! The node implements and validates these commands; `render::plugins` formats its responses. Only
//! `upload` adds a check of its own, which names the options of this program: a name that the node
//! does not know creates an additional plugin, so it requires `--create`. Otherwise a typo in the
//! name would silently add a plugin and leave the version that was to be replaced active.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use pointsman::plugin::{MAX_FILE_BYTES, name_of_file};
use serde::de::DeserializeOwned;

use super::super::{Admin, accept, agent, pretty_json, read as answer};
use super::read;
use crate::cli::render::plugins::{BacktestReport, Candidate, Plugin, Plugins, ShadowReport};

/// Timeout of each read. An interpreter compiled to WebAssembly takes seconds to load, and a
/// backtest runs on thousands of events.
const PATIENCE: Duration = Duration::from_secs(300);

/// The node whose plugins are managed.
#[derive(Debug, clap::Args)]
struct Remote {
    #[command(flatten)]
    admin: Admin,
    /// Print the node's response as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct List {
    #[command(flatten)]
    node: Remote,
}

/// A plugin of a node.
#[derive(Debug, clap::Args)]
pub(super) struct Named {
    /// Name of the plugin
    name: String,
    #[command(flatten)]
    node: Remote,
}

#[derive(Debug, clap::Args)]
pub(super) struct Upload {
    /// Plugin file to upload
    #[arg(value_name = "FILE.wasm")]
    file: PathBuf,
    /// Name of the plugin [default: derived from the file name]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Add a new plugin instead of replacing an existing one
    #[arg(long)]
    create: bool,
    #[command(flatten)]
    node: Remote,
}

#[derive(Debug, clap::Args)]
pub(super) struct Shadow {
    /// Name of the plugin
    name: String,
    /// Start shadowing with this candidate; without it, print how the current candidate differs
    #[arg(value_name = "FILE.wasm")]
    file: Option<PathBuf>,
    /// Stop the candidate
    #[arg(long, conflicts_with = "file")]
    stop: bool,
    #[command(flatten)]
    node: Remote,
}

#[derive(Debug, clap::Args)]
pub(super) struct Backtest {
    /// Name of the plugin
    name: String,
    /// Candidate to backtest
    #[arg(value_name = "FILE.wasm")]
    file: PathBuf,
    /// Number of newest events to backtest on
    #[arg(long, value_name = "N", default_value = "1000")]
    limit: usize,
    #[command(flatten)]
    node: Remote,
}

/// Admin commands whose only argument is the plugin's name.
#[derive(Clone, Copy, Debug)]
pub(super) enum AdminCommand {
    Enable,
    Disable,
    Remove,
    RollBack,
    Promote,
}

pub(super) fn list(List { node }: &List) -> anyhow::Result<()> {
    let text = node.request("GET", "/v1/plugins", None)?;
    node.print(&text, |plugins: Plugins| Ok(plugins.render()))
}

pub(super) fn upload(
    Upload {
        file,
        name,
        create,
        node,
    }: &Upload,
) -> anyhow::Result<()> {
    let name = name
        .clone()
        .unwrap_or_else(|| name_of_file(&file.file_name().unwrap_or_default().to_string_lossy()));
    let path = path(&name, "")?;
    let before = node.plugins()?;
    let former = before.find(&name);
    match former {
        None if !create && !before.plugins.is_empty() => bail!(
            "the node has no plugin '{name}' (its plugins: {}); pass --name NAME to update one of these, or --create to add a new plugin",
            before.names()
        ),
        Some(former) if *create && !former.is_missing() => {
            bail!(
                "plugin '{}' already exists; omit --create to update it",
                former.label()
            )
        }
        _ => {}
    }
    // The first plugin of a node cannot be meant to replace another one.
    let path = if former.is_none() {
        format!("{path}?create=true")
    } else {
        path
    };
    let text = node.send("PUT", &path, Some(file))?;
    node.print(&text, |plugin: Plugin| {
        let (label, status) = (plugin.label(), plugin.status());
        Ok(match former {
            None => format!(
                "new plugin {label}: {status}; {}",
                node.plugins()?.active_plugins()
            ),
            Some(former) if plugin.is_as(former) => {
                format!("{label} is already active: {status}")
            }
            Some(former) if former.generation > 0 && plugin.generation > 0 => {
                format!(
                    "uploaded {label}: {status}, replacing generation {}",
                    former.generation
                )
            }
            Some(_) => format!("uploaded {label}: {status}"),
        })
    })
}

pub(super) fn execute(Named { name, node }: &Named, command: AdminCommand) -> anyhow::Result<()> {
    let (method, rest) = match command {
        AdminCommand::Enable => ("POST", "/enable"),
        AdminCommand::Disable => ("POST", "/disable"),
        AdminCommand::Remove => ("DELETE", ""),
        AdminCommand::RollBack => ("POST", "/rollback"),
        AdminCommand::Promote => ("POST", "/promote"),
    };
    let path = path(name, rest)?;
    let before = node.plugins()?;
    let former = known(&before, name)?;
    if matches!(command, AdminCommand::Promote) {
        has_candidate(former)?;
    }
    let text = node.send(method, &path, None)?;
    if matches!(command, AdminCommand::Remove) {
        if !node.json {
            println!(
                "removed {}{}; {}",
                former.label(),
                if former.is_missing() {
                    ""
                } else {
                    " and its file"
                },
                node.plugins()?.active_plugins()
            );
        }
        return Ok(());
    }
    node.print(&text, |plugin: Plugin| {
        let (label, status, number) = (plugin.label(), plugin.status(), former.generation);
        let instead = format!("replacing generation {number}");
        Ok(match command {
            AdminCommand::Enable if plugin.is_as(former) => format!("{label} is already enabled: {status}"),
            AdminCommand::Enable => {
                let again = plugin.rolled_back().map(|number| format!(", from the file that was rolled back as generation {number}"));
                format!("enabled {label}: {status}{}; {}", again.unwrap_or_default(), node.plugins()?.active_plugins())
            }
            AdminCommand::Disable if number == 0 => format!("disabled {label}; it was not active"),
            AdminCommand::Disable => {
                format!("disabled {}: generation {number} is no longer active; {}", former.label(), node.plugins()?.active_plugins())
            }
            AdminCommand::RollBack => {
                let file =
                    "on this node only: the plugin file is unchanged, so other nodes and restarted nodes use the newer version";
                format!("rolled back {label}: {status}, {instead}; {file}")
            }
            AdminCommand::Promote if number == 0 => format!("promoted {label}: {status}"),
            AdminCommand::Promote | AdminCommand::Remove => format!("promoted {label}: {status}, {instead}"),
        })
    })
}

pub(super) fn shadow(
    Shadow {
        name,
        file,
        stop,
        node,
    }: &Shadow,
) -> anyhow::Result<()> {
    let path = path(name, "/shadow")?;
    let before = node.plugins()?;
    let former = known(&before, name)?;
    if let Some(file) = file {
        let text = node.send("PUT", &path, Some(file))?;
        return node.print(&text, |shadow: ShadowReport| {
            let instead = former
                .shadow
                .as_ref()
                .map(|candidate| format!(", replacing {}", candidate.name()))
                .unwrap_or_default();
            let see = format!("show differences: pointsman plugin shadow {name}");
            Ok(format!(
                "candidate {} now shadows {}{instead}, without effect; {see}",
                shadow.name(),
                former.label()
            ))
        });
    }
    let candidate = has_candidate(former)?;
    if *stop {
        node.send("DELETE", &path, None)?;
        if !node.json {
            println!(
                "candidate {} of {} stopped: {}",
                candidate.name(),
                former.label(),
                candidate.share()
            );
        }
        return Ok(());
    }
    let text = node.send("GET", &path, None)?;
    node.print(&text, |shadow: ShadowReport| Ok(shadow.render(name)))
}

pub(super) fn backtest(
    Backtest {
        name,
        file,
        limit,
        node,
    }: &Backtest,
) -> anyhow::Result<()> {
    let path = path(name, &format!("/backtest?limit={limit}"))?;
    known(&node.plugins()?, name)?;
    let text = node.send("POST", &path, Some(file))?;
    node.print(&text, |report: BacktestReport| Ok(report.render()))
}

/// The plugin with this name.
///
/// # Errors
/// The node has no such plugin.
fn known<'a>(plugins: &'a Plugins, name: &str) -> anyhow::Result<&'a Plugin> {
    plugins.find(name).with_context(|| {
        format!(
            "the node has no plugin '{name}' (its plugins: {})",
            plugins.names()
        )
    })
}

fn has_candidate(plugin: &Plugin) -> anyhow::Result<&Candidate> {
    let begin = format!(
        "start one with: pointsman plugin shadow {} FILE.wasm",
        plugin.name
    );
    plugin
        .shadow
        .as_ref()
        .with_context(|| format!("plugin '{}' has no candidate; {begin}", plugin.name))
}

fn path(name: &str, rest: &str) -> anyhow::Result<String> {
    let is_plain = !name.is_empty()
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-._~".contains(&b));
    ensure!(
        is_plain,
        "'{}' is not a valid plugin name; rename the file to letters, digits and hyphens",
        name.escape_debug()
    );
    Ok(format!("/v1/plugins/{name}{rest}"))
}

impl Remote {
    fn plugins(&self) -> anyhow::Result<Plugins> {
        read_as(&self.request("GET", "/v1/plugins", None)?)
    }

    /// Sends an admin command, with the content of a file if one is given.
    fn send(&self, method: &str, path: &str, file: Option<&Path>) -> anyhow::Result<String> {
        let bytes = file.map(|file| read(file, MAX_FILE_BYTES)).transpose()?;
        self.request(method, path, bytes.as_deref())
            .map_err(|error| match file {
                Some(file) => error.context(format!("{} was not accepted", file.display())),
                None => error,
            })
    }

    fn request(&self, method: &str, path: &str, body: Option<&[u8]>) -> anyhow::Result<String> {
        accept(answer(self.admin.request(
            &agent(PATIENCE),
            method,
            path,
            body,
        )?)?)
    }

    /// Prints a response: as JSON with `--json`, formatted by `render` otherwise.
    fn print<T: DeserializeOwned>(
        &self,
        text: &str,
        render: impl FnOnce(T) -> anyhow::Result<String>,
    ) -> anyhow::Result<()> {
        if self.json {
            println!("{}", pretty_json(&read_as(text)?));
        } else {
            println!("{}", render(read_as(text)?)?.trim_end());
        }
        Ok(())
    }
}

fn read_as<T: DeserializeOwned>(text: &str) -> anyhow::Result<T> {
    serde_json::from_str(text).context(
        "this version of pointsman does not understand the node's response; --json prints it",
    )
}
