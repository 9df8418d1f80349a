//! `pointsman events export`: prints the decided events that a node's sources still hold, in a
//! format that `plugin test` and `POST /v1/events` accept.

use std::io::Write as _;
use std::time::Duration;

use anyhow::Context as _;
use pointsman::event::{EntryId, Event};

use super::{Admin, printable, printable_json, read, refusal};

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Print the newest decided events as JSON CloudEvents, one per line, oldest first
    Export(Export),
}

#[derive(Debug, clap::Args)]
struct Export {
    #[command(flatten)]
    admin: Admin,
    /// Maximum number of events, up to 10,000
    #[arg(long, value_name = "N", default_value = "1000")]
    limit: usize,
}

pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let Action::Export(Export { admin, limit }) = &options.action;
    let response = admin.request(
        &admin.trust.agent(Duration::from_secs(60))?,
        "GET",
        &format!("/v1/events?limit={limit}"),
        None,
    )?;
    let header = |name: &str| {
        response
            .headers()
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
            .to_owned()
    };
    let (bound, unreadable) = (header("pointsman-bound"), header("pointsman-unreadable"));
    let (status, text) = read(response)?;
    anyhow::ensure!(status.is_success(), "{}", refusal(status, &text));
    std::io::stdout()
        .write_all(printable_json(&text).as_bytes())
        .context("cannot write the events")?;
    let why = match bound.as_str() {
        "limit" => "limit reached (--limit)",
        "bytes" => "more do not fit into one response of 16 MiB",
        _ => "the sources hold no more decided events (retention.processed_entries_ttl)",
    };
    let since = text
        .lines()
        .next()
        .and_then(|line| Event::from_json(EntryId::default(), "-", line.as_bytes()).ok());
    let since = since
        .map(|event| {
            format!(
                ", the oldest '{}' of {}",
                printable(event.id.as_str()),
                pointsman::event::rfc3339(event.time_ms)
            )
        })
        .unwrap_or_default();
    let n = text.lines().count();
    eprintln!(
        "pointsman: {n} event{}{since}: {why}",
        if n == 1 { "" } else { "s" }
    );
    if !["", "0"].contains(&unreadable.as_str()) {
        let unreadable = printable(&unreadable);
        eprintln!(
            "pointsman: {unreadable} entries are not valid events and were omitted; see: pointsman dead-letters list"
        );
    }
    Ok(())
}
