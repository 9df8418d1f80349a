//! `pointsman plugin bench`: measures the cost of a plugin call on this machine, on one thread, and
//! compares it with a no-op plugin.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use pointsman::event::{Event, Name};
use pointsman::plugin::{Limits, Plugin, Role, noop};
use pointsman::preview::runner::PluginRunner;

use super::{Subject, sample};

/// Number of rounds, alternating between the two plugins. The median is reported, which ignores
/// rounds disturbed by other load.
const ROUNDS: usize = 9;

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    #[command(flatten)]
    subject: Subject,
    /// Events to run on: JSON CloudEvents, one per line [default: the crate's events.jsonl]
    #[arg(long, value_name = "FILE")]
    events: Option<PathBuf>,
    /// Approximate total time to run the plugin
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = parse_seconds)]
    seconds: f64,
}

pub(super) fn parse_seconds(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|seconds| (0.01..=600.0).contains(seconds))
        .ok_or_else(|| "use a number from 0.01 to 600".to_owned())
}

pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let loaded = options.subject.load()?;
    let events = sample::events(&sample::file(options.events.as_ref(), &loaded)?, None)?;
    let engine = loaded.engine()?;
    let plugin = loaded.plugin(&engine)?;
    let wanted: Vec<(Event, u64)> = events
        .into_iter()
        .filter(|(event, _)| plugin.wants(&event.kind))
        .collect();
    ensure!(
        !wanted.is_empty(),
        "the plugin's types match none of the events, so a node would not call it; pass other events with --events"
    );
    let roles: Vec<Role> = [Role::Filter, Role::Router]
        .into_iter()
        .filter(|role| plugin.has_role(*role))
        .collect();
    let nothing = Plugin::load(
        &engine,
        Name::parse("nothing")?,
        &noop()?,
        "{}",
        Limits::default(),
    )?;

    let (mut plugin, mut nothing) = (
        PluginRunner::new(&engine, plugin),
        PluginRunner::new(&engine, nothing),
    );
    let time = |runner: &mut PluginRunner, n: usize| {
        let mut took = Duration::ZERO;
        for _ in 0..n {
            took += runner
                .time(&roles, &wanted)
                .context("the plugin failed; see: pointsman plugin test")?;
        }
        anyhow::Ok(took)
    };
    // The first run creates the instance; the timed one determines how many runs fill the time.
    time(&mut plugin, 1)?;
    time(&mut nothing, 1)?;
    let once = time(&mut plugin, 1)?.max(Duration::from_nanos(100));
    let n = ((options.seconds / ROUNDS as f64 / once.as_secs_f64()) as usize).clamp(1, 1_000_000);
    let n_calls = (n * wanted.len()) as f64;
    let (mut of_plugin, mut of_nothing) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        of_plugin.push(time(&mut plugin, n)?.as_nanos() as f64 / n_calls);
        of_nothing.push(time(&mut nothing, n)?.as_nanos() as f64 / n_calls);
    }
    let (of_plugin, of_nothing) = (median(of_plugin), median(of_nothing));
    println!(
        "{}: {} events of {}, one thread",
        loaded.file.display(),
        wanted.len(),
        loaded.name
    );
    println!(
        "  {:<24}  {:>12}  {:>16}  {:>8}",
        "", "ns/event", "events/s", "ratio"
    );
    for (what, ns) in [
        ("no-op plugin", of_nothing),
        (loaded.name.as_str(), of_plugin),
    ] {
        println!(
            "  {what:<26}{ns:>12.0}  {:>16.0}  {:>8.1}",
            1e9 / ns,
            ns / of_nothing
        );
    }
    if cfg!(debug_assertions) {
        println!(
            "warning: this is a debug build of pointsman, in which calls take many times longer; build it with `make build` before you measure"
        );
    }
    Ok(())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
