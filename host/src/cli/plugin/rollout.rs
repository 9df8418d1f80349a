//! `pointsman plugin rollout`: a version of a plugin on all nodes, for a share of the partitions or
//! all of them. `plugin rollback` ends it on all nodes.

use std::path::PathBuf;

use super::remote::{AdminCommand, ConfigFile, Named, Remote, execute, path};
use crate::cli::render::plugins::{RollbackReport, RolloutReport};

#[derive(Debug, clap::Args)]
pub(super) struct Rollout {
    /// Name of the plugin
    name: String,
    /// Version to roll out; without it and without --config, change the share of the present
    /// roll-out, or show it
    #[arg(value_name = "FILE.wasm")]
    file: Option<PathBuf>,
    #[command(flatten)]
    config: ConfigFile,
    /// Share of the partitions that the version decides [default: 100%]
    #[arg(long, value_name = "PERCENT", value_parser = percent)]
    share: Option<u32>,
    #[command(flatten)]
    node: Remote,
}

/// Parses `5%` or `5`.
fn percent(text: &str) -> Result<u32, String> {
    let number = text.strip_suffix('%').unwrap_or(text).trim();
    let number = number.parse().ok().filter(|percent| *percent <= 100);
    number.ok_or_else(|| "use a percentage from 0% to 100%".to_owned())
}

pub(super) fn run(
    Rollout {
        name,
        file,
        config,
        share,
        node,
    }: &Rollout,
) -> anyhow::Result<()> {
    let candidate = config.with_file(file.as_deref())?;
    if candidate.is_empty() && share.is_none() {
        let text = node.request("GET", &path(name, "/rollout")?, None)?;
        return node.print(&text, |report: RolloutReport| Ok(report.render()));
    }
    let share = share.unwrap_or(100);
    let query = candidate.query('&');
    let path = path(name, &format!("/rollout?share={share}{query}"))?;
    let text = node.send_candidate("PUT", &path, &candidate)?;
    node.print(&text, |report: RolloutReport| Ok(report.render()))
}

/// Ends the roll-out of a plugin on all nodes. Without one, rolls the plugin back on this node.
pub(super) fn roll_back(named: &Named) -> anyhow::Result<()> {
    let Named { name, node } = named;
    match node.request_if_found("DELETE", &path(name, "/rollout")?)? {
        Some(text) => node.print(&text, |report: RollbackReport| Ok(report.render(name))),
        None => execute(named, AdminCommand::RollBack),
    }
}
