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

use super::super::{Admin, accept, pretty_json, read as answer};
use super::read;
use crate::cli::render::plugins::{
    BacktestReport, Candidate, FleetShadowReport, Plugin, Plugins, Promotion, ShadowReport,
};

/// Timeout of each read. An interpreter compiled to WebAssembly takes seconds to load, and a
/// backtest runs on thousands of events.
const PATIENCE: Duration = Duration::from_secs(300);

/// The node whose plugins are managed.
#[derive(Debug, clap::Args)]
pub(super) struct Remote {
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
    pub(super) name: String,
    #[command(flatten)]
    pub(super) node: Remote,
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
    /// Start shadowing with this candidate; without it and without --config, print how the current
    /// candidate differs
    #[arg(value_name = "FILE.wasm")]
    file: Option<PathBuf>,
    #[command(flatten)]
    config: ConfigFile,
    /// Stop the candidate
    #[arg(long, conflicts_with_all = ["file", "config"])]
    stop: bool,
    /// Print the sum of the candidates on all nodes
    #[arg(long, conflicts_with_all = ["file", "config", "stop"])]
    all: bool,
    #[command(flatten)]
    node: Remote,
}

#[derive(Debug, clap::Args)]
pub(super) struct Backtest {
    /// Name of the plugin
    name: String,
    /// Candidate to backtest [default: the active file]
    #[arg(value_name = "FILE.wasm", required_unless_present = "config")]
    file: Option<PathBuf>,
    #[command(flatten)]
    config: ConfigFile,
    /// Number of newest events to backtest on
    #[arg(long, value_name = "N", default_value = "1000")]
    limit: usize,
    #[command(flatten)]
    node: Remote,
}

#[derive(Debug, clap::Args)]
pub(super) struct Promote {
    /// Name of the plugin
    name: String,
    /// Promote this candidate instead of the one in shadow
    #[arg(value_name = "FILE.wasm")]
    file: Option<PathBuf>,
    #[command(flatten)]
    config: ConfigFile,
    #[command(flatten)]
    node: Remote,
}

/// The configuration of a candidate.
#[derive(Debug, clap::Args)]
pub(super) struct ConfigFile {
    /// Take the candidate's settings from [plugins.NAME] in this pointsman.toml; without FILE.wasm,
    /// they are those of the active file
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Admin commands whose only argument is the plugin's name.
#[derive(Clone, Copy, Debug)]
pub(super) enum AdminCommand {
    Enable,
    Disable,
    Remove,
    RollBack,
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
    };
    let path = path(name, rest)?;
    let before = node.plugins()?;
    let former = known(&before, name)?;
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
            AdminCommand::Remove => format!("removed {label}"),
        })
    })
}

pub(super) fn shadow(
    Shadow {
        name,
        file,
        config,
        stop,
        all,
        node,
    }: &Shadow,
) -> anyhow::Result<()> {
    if *all {
        let text = node.request("GET", &path(name, "/shadow?all=true")?, None)?;
        return node.print(&text, |sum: FleetShadowReport| Ok(sum.render(name)));
    }
    let candidate = config.with_file(file.as_deref())?;
    let path = path(name, &format!("/shadow{}", candidate.query('?')))?;
    let before = node.plugins()?;
    let former = known(&before, name)?;
    if !candidate.body.is_empty() {
        let text = node.send_candidate("PUT", &path, &candidate)?;
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
        config,
        limit,
        node,
    }: &Backtest,
) -> anyhow::Result<()> {
    let candidate = config.with_file(file.as_deref())?;
    let path = path(
        name,
        &format!("/backtest?limit={limit}{}", candidate.query('&')),
    )?;
    known(&node.plugins()?, name)?;
    let text = node.send_candidate("POST", &path, &candidate)?;
    node.print(&text, |report: BacktestReport| Ok(report.render()))
}

/// Promotes a candidate, or prints the changes that the node may not make.
pub(super) fn promote(
    Promote {
        name,
        file,
        config,
        node,
    }: &Promote,
) -> anyhow::Result<()> {
    let candidate = config.with_file(file.as_deref())?;
    let path = path(name, &format!("/promote{}", candidate.query('?')))?;
    let before = node.plugins()?;
    let former = known(&before, name)?;
    if candidate.body.is_empty() {
        has_candidate(former)?;
    }
    let text = node.send_candidate("POST", &path, &candidate)?;
    node.print(&text, |promotion: Promotion| {
        if !promotion.changes.is_empty() {
            return Ok(promotion.render_changes());
        }
        let plugin = promotion.plugin;
        let (label, status) = (plugin.label(), plugin.status());
        Ok(match former.generation {
            _ if plugin.is_as(former) => format!("{label} is already active: {status}"),
            0 => format!("promoted {label}: {status}"),
            number => format!("promoted {label}: {status}, replacing generation {number}"),
        })
    })
}

/// The body of a request with a candidate: its configuration and then its file.
pub(super) struct CandidateBody {
    body: Vec<u8>,
    config_bytes: usize,
    /// The files, for errors.
    files: String,
}

impl ConfigFile {
    pub(super) fn with_file(&self, file: Option<&Path>) -> anyhow::Result<CandidateBody> {
        let mut body = Vec::new();
        if let Some(config) = &self.config {
            body = read(config, MAX_FILE_BYTES)?;
            ensure!(!body.is_empty(), "{} is empty", config.display());
        }
        let config_bytes = body.len();
        if let Some(file) = file {
            body.extend(read(file, MAX_FILE_BYTES)?);
        }
        let files = self.config.iter().map(PathBuf::as_path).chain(file);
        let files: Vec<String> = files.map(|file| file.display().to_string()).collect();
        Ok(CandidateBody {
            body,
            config_bytes,
            files: files.join(" with "),
        })
    }
}

impl CandidateBody {
    /// Whether neither a file nor a configuration was given.
    pub(super) fn is_empty(&self) -> bool {
        self.body.is_empty()
    }

    /// The query parameter that separates configuration and file, after this character.
    pub(super) fn query(&self, first: char) -> String {
        match self.config_bytes {
            0 => String::new(),
            n => format!("{first}config_bytes={n}"),
        }
    }
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

pub(super) fn path(name: &str, rest: &str) -> anyhow::Result<String> {
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

    /// Sends an admin command with a candidate, if there is one.
    pub(super) fn send_candidate(
        &self,
        method: &str,
        path: &str,
        candidate: &CandidateBody,
    ) -> anyhow::Result<String> {
        let body = Some(candidate.body.as_slice()).filter(|body| !body.is_empty());
        self.request(method, path, body)
            .map_err(|error| match body {
                Some(_) => error.context(format!("{} was not accepted", candidate.files)),
                None => error,
            })
    }

    /// Sends a request without a body. `None`: the node has nothing there.
    pub(super) fn request_if_found(
        &self,
        method: &str,
        path: &str,
    ) -> anyhow::Result<Option<String>> {
        let agent = self.admin.trust.agent(PATIENCE)?;
        let (status, text) = answer(self.admin.request(&agent, method, path, None)?)?;
        if status == 404 {
            return Ok(None);
        }
        accept((status, text)).map(Some)
    }

    pub(super) fn request(
        &self,
        method: &str,
        path: &str,
        body: Option<&[u8]>,
    ) -> anyhow::Result<String> {
        accept(answer(self.admin.request(
            &self.admin.trust.agent(PATIENCE)?,
            method,
            path,
            body,
        )?)?)
    }

    /// Prints a response: as JSON with `--json`, formatted by `render` otherwise.
    pub(super) fn print<T: DeserializeOwned>(
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
