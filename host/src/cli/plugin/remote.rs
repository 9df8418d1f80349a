//! `pointsman plugin list` and what else an operator does with the plugins of a running node, by its listener for operators.
//!
//! What each of these does there, and when it refuses, is the node's business; how its answers read is `told`'s. An upload alone has a rule of
//! its own: under a name that no plugin there has, it makes one more that decides, beside all others, and so it is asked for by `--new`. A
//! slip in the name would otherwise do that without a word, and the version that was to be replaced would go on.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use pointsman::plugin::{MAX_FILE_BYTES, called};
use serde::de::DeserializeOwned;

use super::super::{Admin, accept, agent, pretty_json, read as answer};
use super::read;
use crate::cli::render::plugins::{
    Candidate, Plugin, Plugins, Replay as Rehearsed, Shadow as Shadowed,
};

/// An interpreter compiled to WebAssembly takes seconds to load, and a replay asks about thousands of events.
const PATIENCE: Duration = Duration::from_secs(300);

/// A node whose plugins are looked at or changed.
#[derive(Debug, clap::Args)]
struct Remote {
    #[command(flatten)]
    admin: Admin,
    /// Print the node's answer as it is, in JSON
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
    /// What the plugin is called there
    name: String,
    #[command(flatten)]
    node: Remote,
}

#[derive(Debug, clap::Args)]
pub(super) struct Upload {
    /// The new version
    #[arg(value_name = "FILE.wasm")]
    file: PathBuf,
    /// What the plugin is called there; otherwise as its file
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// It is one more plugin, which decides beside those that are there
    #[arg(long)]
    new: bool,
    #[command(flatten)]
    node: Remote,
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
    node: Remote,
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
    node: Remote,
}

/// What takes nothing but a plugin's name.
#[derive(Clone, Copy, Debug)]
pub(super) enum Order {
    Enable,
    Disable,
    Remove,
    RollBack,
    Promote,
}

pub(super) fn list(List { node }: &List) -> anyhow::Result<()> {
    let text = node.ask("GET", "/v1/plugins", None)?;
    node.say(&text, |plugins: Plugins| Ok(plugins.listed()))
}

pub(super) fn upload(
    Upload {
        file,
        name,
        new,
        node,
    }: &Upload,
) -> anyhow::Result<()> {
    let name = name
        .clone()
        .unwrap_or_else(|| called(&file.file_name().unwrap_or_default().to_string_lossy()));
    let path = path(&name, "")?;
    let before = node.plugins()?;
    let former = before.find(&name);
    match former {
        None if !new && !before.plugins.is_empty() => bail!(
            "no plugin is called '{name}' there (there: {}); give --name NAME for a new version of one of these, or --new for one more, which decides beside them",
            before.names()
        ),
        Some(former) if *new && !former.is_missing() => {
            bail!(
                "there is a plugin '{}' already; leave out --new for a new version of it",
                former.who()
            )
        }
        _ => {}
    }
    let text = node.send("PUT", &path, Some(file))?;
    node.say(&text, |plugin: Plugin| {
        let (who, stands) = (plugin.who(), plugin.stands());
        Ok(match former {
            None => format!("new plugin {who}: {stands}; {}", node.plugins()?.deciders()),
            Some(former) if plugin.is_as(former) => {
                format!("{who} is what was at work already: {stands}")
            }
            Some(former) if former.generation > 0 && plugin.generation > 0 => {
                format!(
                    "uploaded {who}: {stands}, in place of generation {}",
                    former.generation
                )
            }
            Some(_) => format!("uploaded {who}: {stands}"),
        })
    })
}

pub(super) fn order(Named { name, node }: &Named, order: Order) -> anyhow::Result<()> {
    let (method, rest) = match order {
        Order::Enable => ("POST", "/enable"),
        Order::Disable => ("POST", "/disable"),
        Order::Remove => ("DELETE", ""),
        Order::RollBack => ("POST", "/rollback"),
        Order::Promote => ("POST", "/promote"),
    };
    let path = path(name, rest)?;
    let before = node.plugins()?;
    let former = known(&before, name)?;
    if matches!(order, Order::Promote) {
        has_candidate(former)?;
    }
    let text = node.send(method, &path, None)?;
    if matches!(order, Order::Remove) {
        if !node.json {
            println!(
                "removed {}, and its file; {}",
                former.who(),
                node.plugins()?.deciders()
            );
        }
        return Ok(());
    }
    node.say(&text, |plugin: Plugin| {
        let (who, stands, number) = (plugin.who(), plugin.stands(), former.generation);
        let instead = format!("in place of generation {number}");
        Ok(match order {
            Order::Enable if plugin.is_as(former) => format!("{who} is enabled already: {stands}"),
            Order::Enable => {
                let again = plugin.rolled_back().map(|number| format!(", from the file that was rolled back as generation {number}"));
                format!("enabled {who}: {stands}{}; {}", again.unwrap_or_default(), node.plugins()?.deciders())
            }
            Order::Disable if number == 0 => format!("disabled {who}: it was not at work"),
            Order::Disable => {
                format!("disabled {}: generation {number} is not at work any more; {}", former.who(), node.plugins()?.deciders())
            }
            Order::RollBack => {
                let file =
                    "on this node only: the file is still the newer one, which other nodes keep, and with which a node begins that starts";
                format!("rolled back {who}: {stands}, {instead}; {file}")
            }
            Order::Promote if number == 0 => format!("promoted {who}: {stands}"),
            Order::Promote | Order::Remove => format!("promoted {who}: {stands}, {instead}"),
        })
    })
}

pub(super) fn shadow(
    Shadow {
        name,
        file,
        end,
        node,
    }: &Shadow,
) -> anyhow::Result<()> {
    let path = path(name, "/shadow")?;
    let before = node.plugins()?;
    let former = known(&before, name)?;
    if let Some(file) = file {
        let text = node.send("PUT", &path, Some(file))?;
        return node.say(&text, |shadow: Shadowed| {
            let instead = former
                .shadow
                .as_ref()
                .map(|candidate| format!(", in place of {}", candidate.name()))
                .unwrap_or_default();
            let see = format!("how it differs: pointsman plugin shadow {name}");
            Ok(format!(
                "candidate {} is asked beside {}{instead}, without effect; {see}",
                shadow.name(),
                former.who()
            ))
        });
    }
    let candidate = has_candidate(former)?;
    if *end {
        node.send("DELETE", &path, None)?;
        if !node.json {
            println!(
                "candidate {} beside {} has ended: {}",
                candidate.name(),
                former.who(),
                candidate.share()
            );
        }
        return Ok(());
    }
    let text = node.send("GET", &path, None)?;
    node.say(&text, |shadow: Shadowed| Ok(shadow.told(name)))
}

pub(super) fn replay(
    Replay {
        name,
        file,
        last,
        node,
    }: &Replay,
) -> anyhow::Result<()> {
    let path = path(name, &format!("/replay?last={last}"))?;
    known(&node.plugins()?, name)?;
    let text = node.send("POST", &path, Some(file))?;
    node.say(&text, |report: Rehearsed| Ok(report.told()))
}

/// The plugin of this name, of which a command has to say something.
fn known<'a>(plugins: &'a Plugins, name: &str) -> anyhow::Result<&'a Plugin> {
    plugins.find(name).with_context(|| {
        format!(
            "there is no plugin '{name}' there (there: {})",
            plugins.names()
        )
    })
}

fn has_candidate(plugin: &Plugin) -> anyhow::Result<&Candidate> {
    let begin = format!(
        "begin with one: pointsman plugin shadow {} FILE.wasm",
        plugin.name
    );
    plugin
        .shadow
        .as_ref()
        .with_context(|| format!("there is no candidate beside '{}'; {begin}", plugin.name))
}

fn path(name: &str, rest: &str) -> anyhow::Result<String> {
    let is_plain = !name.is_empty()
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-._~".contains(&b));
    ensure!(
        is_plain,
        "'{}' cannot be named here; rename its file to letters, digits and hyphens",
        name.escape_debug()
    );
    Ok(format!("/v1/plugins/{name}{rest}"))
}

impl Remote {
    fn plugins(&self) -> anyhow::Result<Plugins> {
        read_as(&self.ask("GET", "/v1/plugins", None)?)
    }

    /// An order, with the bytes of a file if there is one.
    fn send(&self, method: &str, path: &str, file: Option<&Path>) -> anyhow::Result<String> {
        let bytes = file.map(|file| read(file, MAX_FILE_BYTES)).transpose()?;
        self.ask(method, path, bytes.as_deref())
            .map_err(|error| match file {
                Some(file) => error.context(format!("{} was not taken", file.display())),
                None => error,
            })
    }

    fn ask(&self, method: &str, path: &str, body: Option<&[u8]>) -> anyhow::Result<String> {
        accept(answer(self.admin.request(
            &agent(PATIENCE),
            method,
            path,
            body,
        )?)?)
    }

    /// An answer as it is, or in words.
    fn say<T: DeserializeOwned>(
        &self,
        text: &str,
        tell: impl FnOnce(T) -> anyhow::Result<String>,
    ) -> anyhow::Result<()> {
        if self.json {
            println!("{}", pretty_json(&read_as(text)?));
        } else {
            println!("{}", tell(read_as(text)?)?.trim_end());
        }
        Ok(())
    }
}

fn read_as<T: DeserializeOwned>(text: &str) -> anyhow::Result<T> {
    serde_json::from_str(text).context(
        "the node's answer is not one that this version of pointsman knows; --json shows it",
    )
}
