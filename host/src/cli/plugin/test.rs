//! `pointsman plugin test`: runs a plugin on sample events, prints its decisions and resource use,
//! and compares the decisions with a golden file.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, bail, ensure};
use pointsman::escape::printable;
use pointsman::event::{Event, Plan};
use pointsman::plugin::Limits;
use pointsman::plugin::shadow::outcome::PluginDecision;
use pointsman::preview::runner::{PluginRunner, RunReport};
use serde_json::Value;
use tracing_subscriber::EnvFilter;

use super::{Subject, sample};
use crate::cli::parse_time;
use crate::cli::render::format;

/// Maximum number of targets shown per decision.
const MAX_SHOWN: usize = 4;

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    #[command(flatten)]
    subject: Subject,
    /// Events to test with: JSON CloudEvents, one per line [default: the project's events.jsonl]
    #[arg(long, value_name = "FILE")]
    events: Option<PathBuf>,
    /// Expected decisions [default: the project's golden.json]
    #[arg(long, value_name = "FILE")]
    expect: Option<PathBuf>,
    /// Write the decisions to that file instead of comparing
    #[arg(long)]
    write_golden: bool,
    /// Time that the plugin sees, such as 2026-01-01T00:00:00Z [default: the time of each event]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    clock: Option<u64>,
}

/// In one piece: the command's output from top to bottom.
pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let log = PluginLog::listen();
    let loaded = options.subject.load()?;
    let events = sample::events(
        &sample::file(options.events.as_ref(), &loaded)?,
        options.clock,
    )?;
    let golden = match &options.expect {
        Some(path) => Some(path.clone()),
        None => loaded.beside("golden.json").or_else(|| {
            loaded
                .folder
                .as_ref()
                .map(|dir| dir.join("golden.json"))
                .filter(|_| options.write_golden)
        }),
    };
    let mut expected = match &golden {
        Some(path) if !options.write_golden => Some(Golden::read(path)?),
        None if options.write_golden => bail!("no file to write; pass --expect golden.json"),
        _ => None,
    };
    let engine = loaded.engine()?;
    let plugin = loaded.plugin(&engine)?;
    let (limits, mut runner) = (plugin.limits().clone(), PluginRunner::new(&engine, plugin));
    println!(
        "{}: {}",
        printable(&loaded.file.display().to_string()),
        format::limits(&limits)
    );
    log.print();

    let (mut decided, mut n_failures, mut n_differences) = (Vec::with_capacity(events.len()), 0, 0);
    for (event, clock_ms) in &events {
        let report = runner.run(event, *clock_ms);
        show(event, &report, &limits);
        log.print();
        n_failures += usize::from(report.is_failure());
        let found = report.to_golden(event);
        if let Some(golden) = &mut expected {
            let wanted = golden.take(&found);
            if wanted != found {
                n_differences += 1;
                println!("    {}", format::red("differs"));
                println!("      expected {wanted}\n      found    {found}");
            }
        }
        decided.push(found);
    }
    let n = events.len();
    ensure!(
        n_failures == 0,
        "the plugin failed on {n_failures} of {n} events"
    );
    if let (Some(path), true) = (&golden, options.write_golden) {
        Golden(decided).write(path)?;
        println!(
            "{n} decisions written to {}; review them before you commit",
            path.display()
        );
        return Ok(());
    }
    if let (Some(golden), Some(path)) = (expected, golden) {
        let file = path.display();
        ensure!(
            n_differences == 0,
            "{n_differences} of {n} decisions differ from {file}; if they are correct, run with --write-golden"
        );
        ensure!(
            golden.0.is_empty(),
            "{file} has {} decisions about other events, such as {}; if the events are correct, run with --write-golden",
            golden.0.len(),
            golden.0[0]["event"]
        );
        println!("{n} events, all decisions match {file}");
    } else {
        println!(
            "{n} events, nothing to compare with; save the decisions with: --expect golden.json --write-golden"
        );
    }
    Ok(())
}

/// Prints the decision about an event, and below it the resource use next to each limit; red if a
/// limit is exceeded.
fn show(event: &Event, report: &RunReport, limits: &Limits) {
    let mut decisions: Vec<String> = report.decided.iter().map(render).collect();
    if decisions.is_empty() {
        decisions.push("skipped: its types do not match".to_owned());
    }
    let mut decisions = decisions.join(", ");
    if report.is_failure() {
        decisions = format::red(&decisions);
    }
    println!("  {}  {}  {decisions}", event.id, event.kind);
    let cost = |used: String, limit: String, is_over: bool| {
        let cost = format!("{used} of {limit}");
        if is_over {
            format::red(&format!("{cost}: over"))
        } else {
            cost
        }
    };
    let mut costs = vec![cost(
        format::time(report.time),
        format::time(limits.deadline),
        report.time > limits.deadline,
    )];
    // Unknown if the instance is gone; the reason is in the line above.
    if let Some(bytes) = report.memory_bytes {
        costs.push(cost(
            format::size(bytes),
            format::size(limits.memory_bytes),
            bytes > limits.memory_bytes,
        ));
        costs.push(cost(
            format::size(report.answer_bytes),
            format::size(limits.result_bytes),
            report.answer_bytes > limits.result_bytes,
        ));
        costs.push(cost(
            report.n_targets.to_string(),
            format!("{} targets", limits.targets),
            report.n_targets > limits.targets,
        ));
    }
    if !report.decided.is_empty() {
        println!("    {}", costs.join(", "));
    }
}

fn render(decided: &PluginDecision) -> String {
    match decided {
        PluginDecision::Keep => "keep".to_owned(),
        PluginDecision::Drop { reason } => format!("drop: {reason}"),
        PluginDecision::Amend {
            priority,
            attributes,
        } => {
            let priority = priority
                .map(|priority| format!(" priority {priority}"))
                .unwrap_or_default();
            let attributes = attributes
                .iter()
                .map(|(name, value)| format!(" {name}={}", serde_json::json!(value)));
            format!("amend{priority}{}", attributes.collect::<String>())
        }
        PluginDecision::None => "none".to_owned(),
        PluginDecision::Routes { plan } => {
            let targets = plan.as_ref().map(Plan::targets).unwrap_or_default();
            let rest = targets.len().saturating_sub(MAX_SHOWN);
            let shown = targets
                .iter()
                .take(MAX_SHOWN)
                .map(|target| format!(" {target}"));
            let rest = if rest > 0 {
                format!(" and {rest} more")
            } else {
                String::new()
            };
            format!("routes{}{rest}", shown.collect::<String>())
        }
        PluginDecision::Failed { reason } => format!("failed: {reason}"),
    }
}

/// The expected decisions. They are found by the ids of their events, so that events may be
/// inserted, removed and reordered.
struct Golden(Vec<Value>);

impl Golden {
    fn read(path: &Path) -> anyhow::Result<Self> {
        let text = fs::read_to_string(path).with_context(|| {
            format!(
                "cannot read {}; create it with --write-golden",
                path.display()
            )
        })?;
        let decisions = serde_json::from_str(&text)
            .with_context(|| format!("{} is not a list of decisions", path.display()))?;
        Ok(Self(decisions))
    }

    /// Takes the decision about the same event, of several the first; null if there is none.
    fn take(&mut self, found: &Value) -> Value {
        let is_same = |wanted: &Value| wanted["event"] == found["event"];
        match self.0.iter().position(is_same) {
            Some(at) => self.0.remove(at),
            None => Value::Null,
        }
    }

    /// Writes one line per event, which keeps diffs readable.
    fn write(&self, path: &Path) -> anyhow::Result<()> {
        let lines: Vec<String> = self
            .0
            .iter()
            .map(|decision| format!("  {decision}"))
            .collect();
        fs::write(path, format!("[\n{}\n]\n", lines.join(",\n")))
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

/// The plugin's log lines, buffered until they are printed below their event.
#[derive(Clone, Debug, Default)]
struct PluginLog(Arc<Mutex<Vec<u8>>>);

impl PluginLog {
    fn listen() -> Self {
        let log = Self::default();
        let writer = log.clone();
        let builder = tracing_subscriber::fmt().with_env_filter(EnvFilter::new("off,plugin=debug"));
        builder
            .without_time()
            .with_target(false)
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .init();
        log
    }

    /// Prints and clears the lines logged since the last call.
    fn print(&self) {
        let bytes = std::mem::take(&mut *self.0.lock().expect("no panic under this lock"));
        for line in String::from_utf8_lossy(&bytes).lines() {
            println!("    log: {}", printable(line.trim()));
        }
    }
}

impl Write for PluginLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0
            .lock()
            .expect("no panic under this lock")
            .extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn golden_decisions_are_found_by_the_ids_of_their_events() {
        let decision = |id: &str, n: u32| json!({ "event": id, "decided": [n] });
        let mut golden = Golden(vec![decision("a", 1), decision("b", 2), decision("b", 3)]);
        // The events are in another order, one is new, and two have the same id.
        assert_eq!(golden.take(&decision("b", 9)), decision("b", 2));
        assert_eq!(golden.take(&decision("new", 9)), Value::Null);
        assert_eq!(golden.take(&decision("b", 9)), decision("b", 3));
        assert_eq!(golden.0, [decision("a", 1)]);
    }
}
