//! What happens in a node, in lines for the person who writes its plugins: which version of which plugin is at work or why not, and what was
//! decided about each event.
//!
//! It asks the listener for operators, as anybody could, and knows no more than that says.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use pointsman::event::EntryId;
use serde_json::Value;
use ureq::Agent;

use super::super::{agent, read};

/// How often the node is asked.
const EVERY: Duration = Duration::from_millis(200);
/// The most decisions that are told in one go.
const MAX_TOLD: usize = 20;

/// Tells until it is dropped.
#[derive(Debug)]
pub(super) struct News(Arc<AtomicBool>);

impl News {
    pub(super) fn start(admin: SocketAddr) -> anyhow::Result<Self> {
        let is_over = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&is_over);
        let teller = Teller {
            agent: agent(Duration::from_secs(5)),
            url: format!("http://{admin}"),
            plugins: BTreeMap::new(),
            last: EntryId::default(),
        };
        thread::Builder::new().name("news".to_owned()).spawn(move || teller.tell(&told)).context("cannot start a thread")?;
        Ok(Self(is_over))
    }
}

impl Drop for News {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

struct Teller {
    agent: Agent,
    url: String,
    /// By name: the generation at work, and why another file is not.
    plugins: BTreeMap<String, (u64, Option<String>)>,
    /// The newest entry whose decision was told.
    last: EntryId,
}

impl Teller {
    fn tell(mut self, is_over: &AtomicBool) {
        while !is_over.load(Ordering::SeqCst) {
            if let Some(answer) = self.ask("/v1/plugins") {
                self.tell_plugins(&answer);
            }
            if let Some(answer) = self.ask("/v1/decisions?limit=100") {
                self.tell_decisions(&answer);
            }
            thread::sleep(EVERY);
        }
    }

    fn ask(&self, path: &str) -> Option<Value> {
        let response = self.agent.get(format!("{}{path}", self.url)).call().ok()?;
        let (status, text) = read(response).ok()?;
        serde_json::from_str(&text).ok().filter(|_| status.is_success())
    }

    fn tell_plugins(&mut self, answer: &Value) {
        let mut plugins = BTreeMap::new();
        for plugin in answer["plugins"].as_array().into_iter().flatten() {
            let name = plugin["name"].as_str().unwrap_or_default().to_owned();
            let now = (plugin["generation"].as_u64().unwrap_or(0), plugin["failure"].as_str().map(str::to_owned));
            if self.plugins.get(&name) != Some(&now) {
                match &now {
                    (0, Some(failure)) => println!("{name}: not at work: {failure}"),
                    (generation, Some(failure)) => println!("{name}: not swapped in: {failure}; generation {generation} stays at work"),
                    (0, None) => {}
                    (generation, None) => println!("{name}: generation {generation} is at work"),
                }
            }
            plugins.insert(name, now);
        }
        for gone in self.plugins.keys().filter(|name| !plugins.contains_key(*name)) {
            println!("{gone}: removed");
        }
        self.plugins = plugins;
    }

    fn tell_decisions(&mut self, answer: &Value) {
        let entry = |decided: &Value| decided["entry"].as_str().and_then(|entry| entry.parse::<EntryId>().ok()).unwrap_or_default();
        let mut new: Vec<&Value> = answer.as_array().into_iter().flatten().filter(|decided| entry(decided) > self.last).collect();
        new.sort_by_key(|decided| entry(decided));
        let n_left_out = new.len().saturating_sub(MAX_TOLD);
        if n_left_out > 0 {
            println!("... {n_left_out} more events");
        }
        for decided in new.iter().skip(n_left_out) {
            let text = |value: &Value| value.as_str().unwrap_or_default().escape_debug().to_string();
            let verdicts = decided["verdicts"].as_array().into_iter().flatten().filter(|verdict| verdict["verdict"] != "skipped");
            let verdicts = verdicts.map(|verdict| {
                let reason = text(&verdict["reason"]);
                let reason = if reason.is_empty() { reason } else { format!(" ({reason})") };
                format!("{} {}{reason}", text(&verdict["plugin"]), text(&verdict["verdict"]))
            });
            let verdicts: Vec<String> = verdicts.collect();
            println!(
                "{} {}: {}: {}",
                text(&decided["event_type"]),
                text(&decided["event_id"]),
                verdicts.join(", "),
                text(&decided["outcome"])
            );
        }
        self.last = new.last().map_or(self.last, |decided| entry(decided));
    }
}
