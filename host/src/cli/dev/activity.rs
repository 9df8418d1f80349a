//! Prints plugin activity for `pointsman dev`: which generation of each plugin is active or why
//! none is, and for each event the outcome, the verdict of each plugin generation and the targets.
//!
//! All of it is polled from the node's public admin listener.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use pointsman::event::{EntryId, VerdictKind};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use ureq::Agent;

use super::super::{Trust, printable, read};

/// Polling interval.
const EVERY: Duration = Duration::from_millis(200);
/// Maximum number of decisions printed per poll.
const MAX_SHOWN: usize = 20;
/// Maximum number of targets printed per plugin.
const MAX_TARGETS: usize = 8;

/// Prints activity until it is dropped.
#[derive(Debug)]
pub(super) struct Activity(Arc<AtomicBool>);

impl Activity {
    /// `crates`: names of the plugins being built, which may not have a file yet.
    pub(super) fn start(admin: SocketAddr, crates: BTreeSet<String>) -> anyhow::Result<Self> {
        let is_over = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&is_over);
        let reporter = Reporter {
            agent: Trust::default().agent(Duration::from_secs(5))?,
            url: format!("http://{admin}"),
            crates,
            plugins: BTreeMap::new(),
            warnings: BTreeSet::new(),
            last: EntryId::default(),
        };
        thread::Builder::new()
            .name("activity".to_owned())
            .spawn(move || reporter.run(&stop))
            .context("cannot start a thread")?;
        Ok(Self(is_over))
    }
}

impl Drop for Activity {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

struct Reporter {
    agent: Agent,
    url: String,
    crates: BTreeSet<String>,
    /// By name, in the state last printed.
    plugins: BTreeMap<String, Plugin>,
    /// Readiness lines that have been printed and still apply.
    warnings: BTreeSet<String>,
    /// The newest entry whose decision has been printed.
    last: EntryId,
}

#[derive(Deserialize)]
struct Plugins {
    plugins: Vec<Plugin>,
}

#[derive(PartialEq, Deserialize)]
struct Plugin {
    name: String,
    state: String,
    /// 0: no generation is active.
    generation: u64,
    failure: Option<String>,
}

/// The decision about an event.
#[derive(Deserialize)]
struct DecisionRecord {
    entry: EntryId,
    outcome: String,
    event_id: String,
    event_type: String,
    verdicts: Vec<Verdict>,
    #[serde(default)]
    reason: String,
}

#[derive(Deserialize)]
struct Verdict {
    plugin: String,
    generation: u64,
    verdict: VerdictKind,
    #[serde(default)]
    reason: String,
}

/// The plan and the decision, from an explanation of the event.
#[derive(Deserialize)]
struct Explanation {
    #[serde(default)]
    plan: Vec<Route>,
    decision: DecisionRecord,
}

#[derive(Deserialize)]
struct Route {
    by: String,
    to: Vec<String>,
}

impl Reporter {
    fn run(mut self, is_over: &AtomicBool) {
        while !is_over.load(Ordering::SeqCst) {
            if let Some(Plugins { plugins }) = self.get("/v1/plugins") {
                self.print_plugins(plugins);
            }
            self.print_warnings();
            if let Some(decisions) = self.get("/v1/decisions?limit=100") {
                self.print_decisions(decisions);
            }
            thread::sleep(EVERY);
        }
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> Option<T> {
        let (status, text) =
            read(self.agent.get(format!("{}{path}", self.url)).call().ok()?).ok()?;
        serde_json::from_str(&text)
            .ok()
            .filter(|_| status.is_success())
    }

    fn print_plugins(&mut self, plugins: Vec<Plugin>) {
        // A configured crate is `missing` until its first build, which is already announced.
        let is_awaited =
            |plugin: &Plugin| plugin.state == "missing" && self.crates.contains(&plugin.name);
        let plugins: BTreeMap<_, _> = plugins
            .into_iter()
            .filter(|p| !is_awaited(p))
            .map(|p| (p.name.clone(), p))
            .collect();
        for (name, plugin) in plugins
            .iter()
            .filter(|(name, plugin)| self.plugins.get(*name) != Some(*plugin))
        {
            let Plugin {
                generation,
                failure,
                state,
                ..
            } = plugin;
            let known = self.plugins.get(name);
            let before = known.map_or((0, ""), |before| (before.generation, before.state.as_str()));
            let was_refused = known.is_some_and(|before| before.failure.is_some());
            let name = printable(name);
            match (generation, failure) {
                (0, Some(failure)) => println!("{name}: not active: {}", printable(failure)),
                (0, None) => println!("{name}: not active: {}", printable(state)),
                (_, Some(failure)) => println!(
                    "{name}: not loaded: {}; generation {generation} stays active",
                    printable(failure)
                ),
                (_, None) if state == "breaker-open" => println!(
                    "{name}: breaker open: generation {generation} failed on too many events in a row and is called only occasionally (breaker_failures)"
                ),
                (_, None) if before.0 == *generation && was_refused => {
                    println!(
                        "{name}: generation {generation} is active; the earlier load error is resolved"
                    );
                }
                // The end of a probation is not worth a line.
                (_, None) if before.0 == *generation && before.1 != "breaker-open" => {}
                (_, None) => println!("{name}: generation {generation} is active"),
            }
        }
        for gone in self
            .plugins
            .keys()
            .filter(|name| !plugins.contains_key(*name))
        {
            println!("{}: removed", printable(gone));
        }
        self.plugins = plugins;
    }

    /// Prints readiness lines that do not concern plugins, such as a configuration change that
    /// takes effect only after a restart.
    fn print_warnings(&mut self) {
        let Some((_, page)) = self
            .agent
            .get(format!("{}/readyz", self.url))
            .call()
            .ok()
            .and_then(|response| read(response).ok())
        else {
            return;
        };
        // Broker lines are skipped: the embedded broker of this process is ready within moments.
        let is_shown = |line: &&str| {
            !["plugins", "broker", "ready"]
                .iter()
                .any(|known| line.starts_with(known))
        };
        let lines = page
            .lines()
            .map(|line| line.strip_prefix("warning: ").unwrap_or(line))
            .filter(is_shown);
        let warnings: BTreeSet<String> = lines.map(printable).collect();
        for new in warnings.difference(&self.warnings) {
            println!("{new}");
        }
        self.warnings = warnings;
    }

    fn print_decisions(&mut self, decisions: Vec<DecisionRecord>) {
        let mut new: Vec<DecisionRecord> = decisions
            .into_iter()
            .filter(|decision| decision.entry > self.last)
            .collect();
        new.sort_by_key(|decision| decision.entry);
        let n_left_out = new.len().saturating_sub(MAX_SHOWN);
        if n_left_out > 0 {
            println!("... {n_left_out} earlier events not shown");
        }
        for decision in &new[n_left_out..] {
            // Only an explanation has the targets, and the plugins that were not called.
            let is_explained = decision.outcome == "committed"
                || (decision.outcome == "unrouted" && decision.verdicts.is_empty());
            let explanation = is_explained.then(|| {
                self.get::<Explanation>(&format!("/v1/explain?event_id={}", decision.entry))
            });
            println!(
                "{}",
                match explanation.flatten() {
                    Some(explanation) if decision.verdicts.is_empty() =>
                        explanation.decision.render(Some(&explanation.plan)),
                    Some(explanation) => decision.render(Some(&explanation.plan)),
                    None => decision.render(None),
                }
            );
        }
        self.last = new.last().map_or(self.last, |decision| decision.entry);
    }
}

impl DecisionRecord {
    /// One line. `plan` is `None` if the event has no plan or the plan is unknown.
    fn render(&self, plan: Option<&[Route]>) -> String {
        let outcome = match self.outcome.as_str() {
            "unrouted" => "unrouted, no recipients",
            "duplicate" => "duplicate, already decided",
            outcome => outcome,
        };
        // Skipped plugins are shown only if every plugin was skipped.
        let was_called = |verdict: &&Verdict| verdict.verdict != VerdictKind::Skipped;
        let is_any_called = self.verdicts.iter().any(|verdict| was_called(&verdict));
        let shown = self
            .verdicts
            .iter()
            .filter(|verdict| !is_any_called || was_called(verdict));
        let verdicts: Vec<String> = shown.map(|verdict| verdict.render(plan)).collect();
        let by = match (verdicts.is_empty(), self.reason.is_empty()) {
            (false, _) => format!(": {}", verdicts.join("; ")),
            (true, false) => format!(": {}", self.reason),
            (true, true) => String::new(),
        };
        printable(&format!(
            "{} {}: {outcome}{by}",
            self.event_type, self.event_id
        ))
    }
}

impl Verdict {
    fn render(&self, plan: Option<&[Route]>) -> String {
        let Self {
            plugin,
            generation,
            verdict,
            reason,
        } = self;
        let action = match verdict {
            VerdictKind::Routes => plan.map_or_else(
                || "routes it".to_owned(),
                |plan| format!("routes it to {}", targets(plan, plugin)),
            ),
            VerdictKind::None => "names no recipients".to_owned(),
            VerdictKind::Keep => "keeps it".to_owned(),
            VerdictKind::Amend => "amends it".to_owned(),
            VerdictKind::Drop => "drops it".to_owned(),
            VerdictKind::Skipped => "is not called for this event type".to_owned(),
            VerdictKind::Rejected => "rejects it".to_owned(),
            VerdictKind::Retry => "requests a retry".to_owned(),
            VerdictKind::Failed | VerdictKind::Unknown => verdict.as_str().to_owned(),
        };
        let reason = if reason.is_empty() {
            String::new()
        } else {
            format!(" ({reason})")
        };
        format!("{plugin}, generation {generation}, {action}{reason}")
    }
}

/// The targets of this plugin's routes.
fn targets(plan: &[Route], plugin: &str) -> String {
    let all: Vec<&str> = plan
        .iter()
        .filter(|route| route.by == plugin)
        .flat_map(|route| &route.to)
        .map(String::as_str)
        .collect();
    let shown = all[..all.len().min(MAX_TARGETS)].join(", ");
    if all.len() > MAX_TARGETS {
        format!("{shown} and {} more", all.len() - MAX_TARGETS)
    } else {
        shown
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_decision_line_has_outcome_plugin_generation_verdict_and_targets() {
        let verdict = |plugin: &str, verdict: &str, reason: &str| json!({ "plugin": plugin, "generation": 3, "verdict": verdict, "reason": reason });
        let plan: Vec<Route> = serde_json::from_value(
            json!([{ "by": "r", "to": ["u:1", "g:ops"] }, { "by": "other", "to": ["all"] }]),
        )
        .unwrap();
        for (outcome, verdicts, expect) in [
            (
                "committed",
                vec![
                    verdict("f", "keep", ""),
                    verdict("s", "skipped", ""),
                    verdict("r", "routes", ""),
                ],
                "t e: committed: f, generation 3, keeps it; r, generation 3, routes it to u:1, g:ops",
            ),
            (
                "unrouted",
                vec![verdict("r", "none", "")],
                "t e: unrouted, no recipients: r, generation 3, names no recipients",
            ),
            (
                "unrouted",
                vec![verdict("r", "skipped", "")],
                "t e: unrouted, no recipients: r, generation 3, is not called for this event type",
            ),
            (
                "discarded",
                vec![verdict("f", "drop", "a test")],
                "t e: discarded: f, generation 3, drops it (a test)",
            ),
            (
                "dead-lettered",
                vec![verdict("r", "failed", "it ran\nlong")],
                "t e: dead-lettered: r, generation 3, failed (it ran\\nlong)",
            ),
        ] {
            let decision: DecisionRecord = serde_json::from_value(
                json!({ "entry": "1-0", "outcome": outcome, "event_id": "e", "event_type": "t", "verdicts": verdicts }),
            )
            .unwrap();
            assert_eq!(decision.render(Some(&plan)), expect);
        }
        let many = Route {
            by: "r".to_owned(),
            to: (0..20).map(|n| format!("u:{n}")).collect(),
        };
        assert!(targets(&[many], "r").ends_with("u:7 and 12 more"));
    }
}
