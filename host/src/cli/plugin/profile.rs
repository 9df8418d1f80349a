//! `pointsman plugin profile`: samples where a plugin spends its time, by the functions of the guest,
//! and writes a file that https://profiler.firefox.com opens.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use pointsman::escape::printable;
use pointsman::plugin::Role;
use pointsman::preview::runner::PluginRunner;

use super::bench::parse_seconds;
use super::{Subject, sample};

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    #[command(flatten)]
    subject: Subject,
    /// Events to run on: JSON CloudEvents, one per line [default: the crate's events.jsonl]
    #[arg(long, value_name = "FILE")]
    events: Option<PathBuf>,
    /// How long to run the plugin; one sample is taken per millisecond
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = parse_seconds)]
    seconds: f64,
    /// File to write the profile to
    #[arg(long, value_name = "FILE", default_value = "profile.json")]
    output: PathBuf,
}

pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let loaded = options.subject.load()?;
    let mut events = sample::events(&sample::file(options.events.as_ref(), &loaded)?, None)?;
    let engine = loaded.engine()?;
    let plugin = loaded.plugin(&engine)?.with_profiler()?;
    events.retain(|(event, _)| plugin.wants(&event.kind));
    ensure!(
        !events.is_empty(),
        "the plugin's types match none of the events, so a node would not call it; pass other events with --events"
    );
    let roles: Vec<Role> = [Role::Filter, Role::Router]
        .into_iter()
        .filter(|role| plugin.has_role(*role))
        .collect();
    let path = printable(&options.output.display().to_string());
    // Created first: a path that cannot be written is reported before the time is spent.
    let output = File::create(&options.output).with_context(|| format!("cannot write {path}"))?;
    let mut runner = PluginRunner::new(&engine, plugin);
    let until = Instant::now() + Duration::from_secs_f64(options.seconds);
    let mut n_rounds = 0;
    while Instant::now() < until || n_rounds == 0 {
        runner
            .time(&roles, &events)
            .context("the plugin failed; see: pointsman plugin test")?;
        n_rounds += 1;
    }
    let mut output = BufWriter::new(output);
    let n_samples = runner.into_plugin().finish_profile(&mut output)?;
    output
        .flush()
        .with_context(|| format!("cannot write {path}"))?;
    println!(
        "{path}: {n_samples} samples of {} events, each run {n_rounds} times; open it in https://profiler.firefox.com",
        events.len()
    );
    if n_samples == 0 {
        println!("warning: the calls are too short to be seen; pass more events or --seconds");
    }
    Ok(())
}
