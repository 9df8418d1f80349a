//! `pointsman dead-letters`: lists, shows, redrives and drops dead letters.

use std::iter;
use std::time::Duration;

use anyhow::Context as _;
use pointsman::event::{EntryId, rfc3339};
use serde::Deserialize;
use ureq::Agent;

use super::render::table::table;
use super::{Node, accept, pretty_json, printable};

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
    List {
        /// List the events that wait for a retry that a plugin requested, instead of those that stay
        #[arg(long)]
        retrying: bool,
    },
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
    /// All current dead letters of every source, without events that wait for a retry
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
    #[serde(default)]
    due_ms: Option<u64>,
}

pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let node = &options.node;
    let agent = node.trust.agent(Duration::from_secs(60))?;
    match &options.action {
        Action::List { retrying } => {
            let letters = all(node, &agent, *retrying)?;
            if letters.is_empty() && *retrying {
                eprintln!("pointsman: no event waits for a retry");
            } else if letters.is_empty() {
                eprintln!("pointsman: no dead letters");
            } else {
                print!("{}", listed(&letters, *retrying));
            }
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

/// The table of dead letters; `is_retrying`: with the time at which each is tried again.
fn listed(letters: &[Letter], is_retrying: bool) -> String {
    // Reasons quote untrusted text.
    let cells = |letter: &Letter| {
        let plugin = letter.plugin.as_deref().unwrap_or("-");
        let who = [&letter.id, &letter.source, &letter.entry].map(|text| printable(text));
        (who, printable(plugin), printable(&letter.reason))
    };
    if is_retrying {
        let head = [
            "ID", "SOURCE", "ENTRY", "ATTEMPTS", "DUE", "PLUGIN", "REASON",
        ];
        let rows = letters.iter().map(|letter| {
            let ([id, source, entry], plugin, reason) = cells(letter);
            let due = letter.due_ms.map(rfc3339).unwrap_or_default();
            let attempts = letter.attempts.to_string();
            [id, source, entry, attempts, due, plugin, reason]
        });
        let rows: Vec<_> = iter::once(head.map(str::to_owned)).chain(rows).collect();
        table(&rows)
    } else {
        let head = ["ID", "SOURCE", "ENTRY", "ATTEMPTS", "PLUGIN", "REASON"];
        let rows = letters.iter().map(|letter| {
            let ([id, source, entry], plugin, reason) = cells(letter);
            [
                id,
                source,
                entry,
                letter.attempts.to_string(),
                plugin,
                reason,
            ]
        });
        let rows: Vec<_> = iter::once(head.map(str::to_owned)).chain(rows).collect();
        table(&rows)
    }
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
        all(node, agent, false)?
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

/// Fetches all dead letters that stay, or those of events that wait for a retry, page by page.
fn all(node: &Node, agent: &Agent, retrying: bool) -> anyhow::Result<Vec<Letter>> {
    let (mut letters, mut after) = (Vec::new(), String::new());
    let list = format!("/v1/dead-letters?limit=1000&retrying={retrying}");
    loop {
        let text = accept(node.request(agent, "GET", &format!("{list}{after}"))?)?;
        let page: Page = serde_json::from_str(&text)
            .context("the node's response is not a list of dead letters")?;
        letters.extend(page.dead_letters);
        match page.next {
            Some(next) => after = format!("&after={next}"),
            None => return Ok(letters),
        }
    }
}
