//! `pointsman dead-letters`: lists, shows, redrives and drops dead letters.

use std::time::Duration;

use anyhow::Context as _;
use pointsman::event::EntryId;
use serde::Deserialize;
use ureq::Agent;

use super::render::table::table;
use super::{Node, accept, agent, pretty_json, printable};

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    #[command(flatten)]
    node: Node,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// List all dead letters in a table
    List,
    /// Print a dead letter with its original fields as JSON
    Show {
        /// Id of the dead letter, such as 0/1700000000000-0
        #[arg(value_parser = letter_id)]
        id: String,
    },
    /// Process dead letters again as new entries of their source; an event that fails again becomes
    /// a new dead letter
    Redrive(Selection),
    /// Delete dead letters; their events are never delivered
    Drop(Selection),
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Selection {
    /// Ids of the dead letters, such as 0/1700000000000-0
    #[arg(value_name = "ID", value_parser = letter_id)]
    ids: Vec<String>,
    /// All current dead letters of every source
    #[arg(long)]
    all: bool,
}

/// Checks an id of the form `PARTITION/ENTRY`. Any other text would change the path of the request,
/// which the node answers as an unknown path.
fn letter_id(text: &str) -> Result<String, String> {
    let is_id = text.split_once('/').is_some_and(|(partition, entry)| {
        partition.parse::<u8>().is_ok() && entry.parse::<EntryId>().is_ok()
    });
    if is_id {
        Ok(text.to_owned())
    } else {
        Err(
            "it is not the id of a dead letter; use PARTITION/ENTRY, such as 0/1700000000000-0"
                .to_owned(),
        )
    }
}

#[derive(Debug, Deserialize)]
struct Page {
    dead_letters: Vec<Letter>,
    next: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Letter {
    id: String,
    source: String,
    entry: String,
    reason: String,
    #[serde(default)]
    plugin: Option<String>,
    attempts: u32,
}

pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let (node, agent) = (&options.node, agent(Duration::from_secs(60)));
    match &options.action {
        Action::List => {
            let letters = all(node, &agent)?;
            if letters.is_empty() {
                eprintln!("pointsman: no dead letters");
                return Ok(());
            }
            let mut rows =
                vec![["ID", "SOURCE", "ENTRY", "ATTEMPTS", "PLUGIN", "REASON"].map(str::to_owned)];
            // Reasons quote untrusted text.
            rows.extend(letters.iter().map(
                |Letter {
                     id,
                     source,
                     entry,
                     reason,
                     plugin,
                     attempts,
                 }| {
                    let plugin = plugin.as_deref().unwrap_or("-");
                    [
                        printable(id),
                        printable(source),
                        printable(entry),
                        attempts.to_string(),
                        printable(plugin),
                        printable(reason),
                    ]
                },
            ));
            print!("{}", table(&rows));
        }
        Action::Show { id } => {
            let text = accept(node.request(&agent, "GET", &format!("/v1/dead-letters/{id}"))?)?;
            let letter: serde_json::Value =
                serde_json::from_str(&text).context("the node's response is not JSON")?;
            println!("{}", pretty_json(&letter));
        }
        Action::Redrive(selection) => act(node, &agent, selection, "POST", "/redrive", "redriven")?,
        Action::Drop(selection) => act(node, &agent, selection, "DELETE", "", "dropped")?,
    }
    Ok(())
}

/// Sends one request per dead letter. Stops at the first error.
fn act(
    node: &Node,
    agent: &Agent,
    selection: &Selection,
    method: &str,
    suffix: &str,
    done: &str,
) -> anyhow::Result<()> {
    // Lists all before the first redrive: an event that fails again becomes a new dead letter,
    // which paging would otherwise find again without end.
    let ids = if selection.all {
        all(node, agent)?
            .into_iter()
            .map(|letter| letter.id)
            .collect()
    } else {
        selection.ids.clone()
    };
    for id in ids {
        accept(node.request(agent, method, &format!("/v1/dead-letters/{id}{suffix}"))?)
            .with_context(|| id.clone())?;
        println!("{}\t{done}", printable(&id));
    }
    Ok(())
}

/// Fetches all dead letters, page by page.
fn all(node: &Node, agent: &Agent) -> anyhow::Result<Vec<Letter>> {
    let (mut letters, mut after) = (Vec::new(), String::new());
    loop {
        let text =
            accept(node.request(agent, "GET", &format!("/v1/dead-letters?limit=1000{after}"))?)?;
        let page: Page = serde_json::from_str(&text)
            .context("the node's response is not a list of dead letters")?;
        letters.extend(page.dead_letters);
        match page.next {
            Some(next) => after = format!("&after={next}"),
            None => return Ok(letters),
        }
    }
}
