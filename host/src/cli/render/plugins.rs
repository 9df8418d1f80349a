//! Formats a node's responses about plugins: a line for an admin command, a table for the list, a
//! short report for a candidate.
//!
//! Unknown fields are ignored, because the node may be newer than this program; `--json` prints the
//! whole response.

use std::collections::BTreeMap;

use pointsman::event::{EntryId, rfc3339};
use serde::Deserialize;
use serde_json::Value;

use super::super::printable;
use super::super::render::table::table;

/// Maximum length of one side of a difference, in characters.
const MAX_SIDE: usize = 400;

/// `GET /v1/plugins`.
#[derive(Debug, Deserialize)]
pub(in crate::cli) struct Plugins {
    pub(in crate::cli) plugins: Vec<Plugin>,
    folder_failure: Option<String>,
}

/// A plugin, an invalid plugin file, or a configured plugin without a file.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(in crate::cli) struct Plugin {
    pub(in crate::cli) name: String,
    state: String,
    kind: String,
    version: String,
    /// 0: no generation is active.
    pub(in crate::cli) generation: u64,
    hash: String,
    since_ms: u64,
    settings: Settings,
    failure: Option<String>,
    events_wait: bool,
    refusal: Option<Refusal>,
    /// Newest first.
    ended: Vec<EndedGeneration>,
    pub(in crate::cli) shadow: Option<Candidate>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Settings {
    probation: String,
}

/// A generation that is no longer active.
#[derive(Debug, Deserialize)]
struct EndedGeneration {
    generation: u64,
    hash: String,
    state: String,
}

#[derive(Debug, Deserialize)]
struct Refusal {
    at_ms: u64,
    reason: String,
}

/// A candidate that shadows a plugin, with its counters.
#[derive(Debug, Deserialize)]
pub(in crate::cli) struct Candidate {
    hash: String,
    #[serde(default)]
    config_hash: String,
    version: String,
    since_ms: u64,
    generation: Option<u64>,
    compared: u64,
    different: u64,
    failed: u64,
    skipped: u64,
    waiting: u64,
}

/// `GET /v1/plugins/NAME/shadow`.
#[derive(Debug, Deserialize)]
pub(in crate::cli) struct ShadowReport {
    #[serde(flatten)]
    candidate: Candidate,
    #[serde(default)]
    groups: Vec<Group>,
    differences: Vec<Difference>,
}

/// `POST /v1/plugins/NAME/backtest`.
#[derive(Debug, Deserialize)]
pub(in crate::cli) struct BacktestReport {
    plugin: String,
    hash: String,
    version: String,
    found: u64,
    compared: u64,
    different: u64,
    failed: u64,
    not_compared: BTreeMap<String, u64>,
    #[serde(default)]
    groups: Vec<Group>,
    differences: Vec<Difference>,
    reach: Vec<Reach>,
}

/// `GET /v1/plugins/NAME/shadow?all=true`.
#[derive(Debug, Deserialize)]
pub(in crate::cli) struct FleetShadowReport {
    hash: String,
    config_hash: String,
    version: String,
    #[serde(flatten)]
    counts: Counts,
    nodes: Vec<NodeShadow>,
    other_nodes: Vec<String>,
    groups: Vec<Group>,
    differences: Vec<Difference>,
}

#[derive(Debug, Deserialize)]
struct NodeShadow {
    node: String,
    #[serde(flatten)]
    counts: Counts,
}

#[derive(Debug, Deserialize)]
struct Counts {
    compared: u64,
    different: u64,
    failed: u64,
    skipped: u64,
    waiting: u64,
}

/// `GET /v1/plugins/NAME/rollout`.
#[derive(Debug, Deserialize)]
pub(in crate::cli) struct RolloutReport {
    plugin: String,
    from: PluginVersion,
    to: PluginVersion,
    percent: u64,
    partitions: Vec<u64>,
    n_partitions: u64,
    nodes: Vec<NodeRollout>,
    problem: Option<String>,
}

#[derive(Debug, Deserialize)]
struct PluginVersion {
    hash: String,
    config_hash: String,
}

#[derive(Debug, Deserialize)]
struct NodeRollout {
    node: String,
    state: String,
    #[serde(default)]
    reason: String,
}

/// `DELETE /v1/plugins/NAME/rollout`.
#[derive(Debug, Deserialize)]
pub(in crate::cli) struct RollbackReport {
    nodes: Vec<String>,
    pending: Vec<String>,
    problem: Option<String>,
}

/// `POST /v1/plugins/NAME/promote`.
#[derive(Debug, Deserialize)]
pub(in crate::cli) struct Promotion {
    #[serde(flatten)]
    pub(in crate::cli) plugin: Plugin,
    #[serde(default)]
    pub(in crate::cli) changes: Vec<Change>,
}

/// A change that the node leaves to the operator.
#[derive(Debug, Deserialize)]
pub(in crate::cli) struct Change {
    path: String,
    reason: String,
    /// Of a new file.
    hash: Option<String>,
    /// Of a new section.
    text: Option<String>,
}

/// Differences that change the same.
#[derive(Debug, Deserialize)]
struct Group {
    count: u64,
    role: String,
    #[serde(rename = "type")]
    kind: String,
    old: String,
    new: String,
}

#[derive(Debug, Deserialize)]
struct Reach {
    source: String,
    oldest_entry: Option<EntryId>,
    oldest_decision: Option<EntryId>,
    is_every_decision: bool,
}

#[derive(Debug, Deserialize)]
struct Difference {
    event: Event,
    role: String,
    old: Value,
    new: Value,
}

#[derive(Debug, Deserialize)]
struct Event {
    id: String,
    #[serde(rename = "type")]
    kind: String,
}

impl Plugins {
    pub(in crate::cli) fn find(&self, name: &str) -> Option<&Plugin> {
        self.plugins.iter().find(|plugin| plugin.name == name)
    }

    /// Comma-separated plugin names, or `none`.
    pub(in crate::cli) fn names(&self) -> String {
        list(self.plugins.iter().map(|plugin| plugin.name.as_str()))
    }

    /// The active plugins, in the order in which they are called.
    pub(in crate::cli) fn active_plugins(&self) -> String {
        let active: Vec<&str> = self
            .plugins
            .iter()
            .filter(|plugin| plugin.generation > 0)
            .map(|plugin| plugin.name.as_str())
            .collect();
        match active.len() {
            0 => "no plugin is active; events wait unless the node runs with --allow-no-plugins"
                .to_owned(),
            1 => format!("1 active plugin: {}", list(active)),
            n => format!("{n} active plugins: {}", list(active)),
        }
    }

    /// A table of all plugins, followed by the last load failure of each.
    pub(in crate::cli) fn render(&self) -> String {
        let mut rows = vec![
            [
                "NAME",
                "KIND",
                "STATE",
                "GENERATION",
                "VERSION",
                "HASH",
                "SINCE",
                "SHADOW",
            ]
            .map(str::to_owned),
        ];
        rows.extend(self.plugins.iter().map(|plugin| {
            let since = if plugin.since_ms > 0 {
                rfc3339(plugin.since_ms)
            } else {
                String::new()
            };
            let generation = if plugin.generation > 0 {
                plugin.generation.to_string()
            } else {
                String::new()
            };
            let shadow = plugin
                .shadow
                .as_ref()
                .map(|candidate| format!("{}: {}", candidate.name(), candidate.share()));
            let cells = [
                printable(&plugin.name),
                printable(&plugin.kind),
                printable(&plugin.state),
                generation,
                printable(&plugin.version),
                short(&plugin.hash),
                since,
                shadow.unwrap_or_default(),
            ];
            cells.map(|cell| {
                if cell.is_empty() {
                    "-".to_owned()
                } else {
                    cell
                }
            })
        }));
        let mut text = table(&rows);
        for plugin in &self.plugins {
            let failure = plugin.failure.as_deref();
            let refused = plugin.refusal.as_ref().map(|refusal| {
                // For a rejected file, the failure is the same reason with the fix.
                let reason = failure
                    .filter(|failure| failure.contains(&refusal.reason))
                    .unwrap_or(&refusal.reason);
                format!("rejected at {}: {reason}", rfc3339(refusal.at_ms))
            });
            if let Some(reason) = refused.as_deref().or(failure) {
                let waits = if plugin.events_wait {
                    "; events wait on this node"
                } else {
                    ""
                };
                text += &format!(
                    "{}: {}{waits}\n",
                    printable(&plugin.name),
                    printable(reason)
                );
            }
        }
        text + &self
            .folder_failure
            .iter()
            .map(|failure| printable(failure) + "\n")
            .collect::<String>()
    }
}

impl Plugin {
    /// Whether the plugin is configured but has no file.
    pub(in crate::cli) fn is_missing(&self) -> bool {
        self.state == "missing"
    }

    /// Name, version and kind as far as known: `my-router 0.1.0 (router)`.
    pub(in crate::cli) fn label(&self) -> String {
        let version = if self.version.is_empty() {
            String::new()
        } else {
            format!(" {}", self.version)
        };
        let kind = if self.kind.is_empty() {
            String::new()
        } else {
            format!(" ({})", self.kind)
        };
        printable(&format!("{}{version}{kind}", self.name))
    }

    /// The active generation and the state.
    pub(in crate::cli) fn status(&self) -> String {
        let state = match self.state.as_str() {
            "on-probation" => format!("on probation for {}", printable(&self.settings.probation)),
            state => printable(state),
        };
        if self.generation == 0 {
            state
        } else {
            format!("generation {}, {state}", self.generation)
        }
    }

    /// The generation under which the active file was rolled back earlier, if any.
    pub(in crate::cli) fn rolled_back(&self) -> Option<u64> {
        let same =
            |ended: &&EndedGeneration| ended.state == "rolled-back" && ended.hash == self.hash;
        self.ended.iter().find(same).map(|ended| ended.generation)
    }

    /// Whether the active generation is the same as before: the same file with the same
    /// configuration does not start a new generation.
    pub(in crate::cli) fn is_as(&self, before: &Self) -> bool {
        self.generation > 0 && self.generation == before.generation
    }
}

impl Candidate {
    /// `0.2.0 (3f2a91c04b7d)`.
    pub(in crate::cli) fn name(&self) -> String {
        format!("{} ({})", printable(&self.version), short(&self.hash))
    }

    /// How many of the compared decisions differ.
    pub(in crate::cli) fn share(&self) -> String {
        format!("{} of {} differ", self.different, self.compared)
    }
}

impl ShadowReport {
    /// The candidate's version and hash.
    pub(in crate::cli) fn name(&self) -> String {
        self.candidate.name()
    }

    pub(in crate::cli) fn render(&self, plugin: &str) -> String {
        let Self {
            candidate,
            groups,
            differences,
        } = self;
        let Candidate {
            since_ms,
            compared,
            different,
            failed,
            skipped,
            waiting,
            ..
        } = candidate;
        let beside = candidate.generation.map_or_else(
            || {
                "no event compared yet (only the node that owns a source compares its events: --url)"
                    .to_owned()
            },
            |number| format!("beside generation {number}"),
        );
        let head = format!(
            "{plugin}: candidate {}, {beside}, since {}, configuration {}\n",
            candidate.name(),
            rfc3339(*since_ms),
            printable(&candidate.config_hash)
        );
        let counts = format!(
            "compared {compared}, different {different}, failed {failed}, skipped {skipped}, waiting {waiting}\n"
        );
        head + &counts
            + &render_groups(groups, *different)
            + &render_differences(differences, *different)
    }
}

impl BacktestReport {
    pub(in crate::cli) fn render(&self) -> String {
        let Self {
            plugin,
            found,
            compared,
            different,
            failed,
            ..
        } = self;
        let version = printable(&self.version);
        let mut text = format!(
            "{plugin}: candidate {version} ({}), backtested on {found} decided events\n",
            short(&self.hash)
        );
        text += &format!("compared {compared}, different {different}, failed {failed}\n");
        for (reason, n) in &self.not_compared {
            text += &format!("not compared {n}: {}\n", printable(reason));
        }
        for Reach {
            source,
            oldest_entry,
            oldest_decision,
            is_every_decision,
        } in &self.reach
        {
            let since = |entry: &Option<EntryId>| {
                entry.map_or_else(
                    || "none".to_owned(),
                    |entry| {
                        if entry.is_time(pointsman::clock::now_ms()) {
                            format!("since {}", rfc3339(entry.ms))
                        } else {
                            format!("since entry {entry}")
                        }
                    },
                )
            };
            let whole = if *is_every_decision {
                " (complete)"
            } else {
                ""
            };
            let (decisions, entries) = (since(oldest_decision), since(oldest_entry));
            text += &format!(
                "{}: decisions {decisions}{whole}; entries {entries} (retention.processed_entries_ttl)\n",
                printable(source)
            );
        }
        text + &render_groups(&self.groups, *different)
            + &render_differences(&self.differences, *different)
    }
}

impl Promotion {
    /// The changes that the node leaves to the operator.
    pub(in crate::cli) fn render_changes(&self) -> String {
        let mut text = format!(
            "not promoted: this node may not write its files; to make the candidate the active version of {}, change on every node:\n",
            printable(&self.plugin.name)
        );
        for Change {
            path,
            reason,
            hash,
            text: section,
        } in &self.changes
        {
            let (path, reason) = (printable(path), printable(reason));
            if let Some(hash) = hash {
                let hash = printable(hash);
                text += &format!(
                    "- {path} ({reason}): replace it by the candidate's file, SHA-256 {hash}\n"
                );
            }
            if let Some(section) = section {
                let name = printable(&self.plugin.name);
                text +=
                    &format!("- {path} ({reason}): replace the section [plugins.{name}] by\n\n");
                let lines = section.trim_end().lines();
                text += &lines.map(|line| printable(line) + "\n").collect::<String>();
            }
        }
        text
    }
}

impl FleetShadowReport {
    pub(in crate::cli) fn render(&self, plugin: &str) -> String {
        let mut text = format!(
            "{plugin}: candidate {} ({}), configuration {}, on {} nodes\n{}\n",
            printable(&self.version),
            short(&self.hash),
            printable(&self.config_hash),
            self.nodes.len(),
            self.counts.render()
        );
        for NodeShadow { node, counts } in &self.nodes {
            text += &format!("  {}: {}\n", printable(node), counts.render());
        }
        for node in &self.other_nodes {
            text += &format!("  {}: another candidate, not counted\n", printable(node));
        }
        text + &render_groups(&self.groups, self.counts.different)
            + &render_differences(&self.differences, self.counts.different)
    }
}

impl Counts {
    fn render(&self) -> String {
        let Self {
            compared,
            different,
            failed,
            skipped,
            waiting,
        } = self;
        format!(
            "compared {compared}, different {different}, failed {failed}, skipped {skipped}, waiting {waiting}"
        )
    }
}

impl RolloutReport {
    pub(in crate::cli) fn render(&self) -> String {
        let Self {
            plugin,
            from,
            to,
            percent,
            n_partitions,
            ..
        } = self;
        let plugin = printable(plugin);
        let share = match self.partitions.len() {
            0 => "decides in no partition".to_owned(),
            n if n as u64 == *n_partitions => format!("decides in all {n} partitions"),
            n => {
                let numbers: Vec<String> = self.partitions.iter().map(u64::to_string).collect();
                let numbers = numbers.join(", ");
                format!("decides in {n} of {n_partitions} partitions ({percent} %): {numbers}")
            }
        };
        let mut text = format!(
            "{plugin}: {} {share}, instead of {}\n",
            to.render(),
            from.render()
        );
        for NodeRollout {
            node,
            state,
            reason,
        } in &self.nodes
        {
            let reason = if reason.is_empty() {
                String::new()
            } else {
                format!(": {}", printable(reason))
            };
            text += &format!("  {}: {}{reason}\n", printable(node), printable(state));
        }
        if let Some(problem) = &self.problem {
            text += &format!("{}\n", printable(problem));
        }
        text
    }
}

impl PluginVersion {
    fn render(&self) -> String {
        format!(
            "{} with configuration {}",
            short(&self.hash),
            printable(&self.config_hash)
        )
    }
}

impl RollbackReport {
    pub(in crate::cli) fn render(&self, plugin: &str) -> String {
        let nodes = list(self.nodes.iter().map(String::as_str));
        if let Some(problem) = &self.problem {
            return format!("rolled back {plugin}: {}\n", printable(problem));
        }
        if self.pending.is_empty() {
            return format!(
                "rolled back {plugin} on all nodes; each decides by its own version: {nodes}\n"
            );
        }
        let pending = list(self.pending.iter().map(String::as_str));
        let followed = match self.nodes.len() {
            0 => String::new(),
            _ => format!("; followed: {nodes}"),
        };
        format!(
            "rolled back {plugin}, but not on all nodes yet{followed}; not followed yet: {pending}; look again at their GET /readyz, or stop them\n"
        )
    }
}

/// The differences counted by what they change, the largest group first.
fn render_groups(groups: &[Group], all: u64) -> String {
    let mut text = String::new();
    let mut n_grouped = 0;
    for Group {
        count,
        role,
        kind,
        old,
        new,
    } in groups
    {
        n_grouped += count;
        // Most plugins are routers; their groups have the form of a rule.
        let role = if role == "router" {
            String::new()
        } else {
            format!(" ({})", printable(role))
        };
        let [kind, old, new] = [kind, old, new].map(|text| printable(text));
        text += &format!("{count} x {kind}{role}: {old} -> {new}\n");
    }
    match all.saturating_sub(n_grouped) {
        0 => text,
        more => format!("{text}{more} x other differences\n"),
    }
}

/// Each difference: the plugin's decision, and the candidate's below it.
fn render_differences(differences: &[Difference], all: u64) -> String {
    let mut text = String::new();
    for Difference {
        event,
        role,
        old,
        new,
    } in differences
    {
        text += &format!(
            "\n{} {} ({})\n",
            printable(&event.kind),
            printable(&event.id),
            printable(role)
        );
        text += &format!("  old  {}\n  new  {}\n", side(old), side(new));
    }
    match all.saturating_sub(differences.len() as u64) {
        0 => text,
        more => format!(
            "{text}\n... and {more} more; only the first {} are kept\n",
            differences.len()
        ),
    }
}

/// One side of a difference. The wording is that of decision records.
fn side(side: &Value) -> String {
    let reason = side["reason"].as_str().unwrap_or_default();
    let text = match side["verdict"].as_str() {
        Some("routes") => match side["plan"].as_array() {
            Some(routes) => format!(
                "routes {}",
                routes.iter().map(route).collect::<Vec<_>>().join("; ")
            ),
            None => "routes, targets no longer known".to_owned(),
        },
        Some("none") => "none: no recipients".to_owned(),
        Some("amend") => format!("amend{}", facts(side, &["verdict"])),
        Some(verdict) if reason.is_empty() => verdict.to_owned(),
        Some(verdict) => format!("{verdict}: {reason}"),
        None => format!("too large to show: {} bytes", side["too_large_bytes"]),
    };
    let text = printable(&text);
    if text.chars().count() <= MAX_SIDE {
        return text;
    }
    let begins: String = text.chars().take(MAX_SIDE).collect();
    format!("{begins}... (--json prints all of it)")
}

/// The targets of a route, and its other fields.
fn route(route: &Value) -> String {
    let to = list(
        route["to"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str),
    );
    format!("to {to}{}", facts(route, &["by", "to"]))
}

/// The fields of an object except these keys.
fn facts(object: &Value, without: &[&str]) -> String {
    let facts = object
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(key, _)| !without.contains(&key.as_str()));
    let facts = facts.map(
        |(key, value)| match (key.as_str(), value.as_str(), value.as_u64()) {
            ("expires_ms", _, Some(ms)) => format!(", until {}", rfc3339(ms)),
            (_, Some(text), _) => format!(", {key} {text}"),
            _ => format!(", {key} {value}"),
        },
    );
    facts.collect()
}

fn list<'a>(items: impl IntoIterator<Item = &'a str>) -> String {
    let items: Vec<&str> = items.into_iter().collect();
    if items.is_empty() {
        "none".to_owned()
    } else {
        printable(&items.join(", "))
    }
}

/// The first 12 characters of a hash, enough for a person to compare.
fn short(hash: &str) -> String {
    printable(&hash.chars().take(12).collect::<String>())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_side_of_a_difference_is_one_line_of_bounded_length() {
        let route = json!({ "by": "r", "to": ["u:1", "g:ops"], "priority": "high", "expires_ms": 1_800_000_000_000_u64, "collapse": "c\u{1b}[2J" });
        for (decision, expect) in [
            (json!({ "verdict": "keep" }), "keep"),
            (
                json!({ "verdict": "drop", "reason": "a test" }),
                "drop: a test",
            ),
            (
                json!({ "verdict": "amend", "priority": "low", "attributes": { "a": 1 } }),
                r#"amend, attributes {"a":1}, priority low"#,
            ),
            (json!({ "verdict": "none" }), "none: no recipients"),
            (
                json!({ "verdict": "routes" }),
                "routes, targets no longer known",
            ),
            (
                json!({ "verdict": "routes", "plan": [route] }),
                "routes to u:1, g:ops, collapse c\\u{1b}[2J, until 2027-01-15T08:00:00.000Z, priority high",
            ),
            (
                json!({ "verdict": "failed", "reason": "it trapped" }),
                "failed: it trapped",
            ),
            (
                json!({ "too_large_bytes": 70_000 }),
                "too large to show: 70000 bytes",
            ),
        ] {
            assert_eq!(side(&decision), expect);
        }
        let many: Vec<String> = (0..1_000).map(|n| format!("u:{n}")).collect();
        let long = side(&json!({ "verdict": "routes", "plan": [{ "to": many }] }));
        assert!(
            long.len() < 500 && long.ends_with("(--json prints all of it)"),
            "{long}"
        );
    }
}
