//! The decisions of the bundled plugins match their documentation: a second implementation of all
//! four in another language (`decisions/second.js`), which shares no code with them, makes the same
//! decision about every event, in every detail.
//!
//! The events are recorded payloads of other services and generated ones that cover the edge cases.
//! They enter a node through `POST /v1/events?dry_run=true`, which returns the plan. Requires Node
//! 20 or newer and npm; `make test` installs them (`scripts/need.sh`).

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::time::Duration;

use rand::Rng as _;
use serde_json::{Value, json};

use crate::harness::node::{Folder, Node};
use crate::harness::{eventually, every_bundled_plugin, node_interpreter, repository, seed};

mod events;

/// The minimum number of times that each operator must decide each way.
const ENOUGH: usize = 10;
/// The operators on values.
pub(crate) const OPERATORS: [&str; 13] = [
    "equals",
    "not_equals",
    "one_of",
    "prefix",
    "suffix",
    "contains",
    "matches",
    "less",
    "at_most",
    "greater",
    "at_least",
    "includes",
    "present",
];
/// The keys of conditions on events.
pub(crate) const CONDITIONS: [&str; 8] = [
    "type",
    "source",
    "subject",
    "priority",
    "older_than_s",
    "all",
    "any",
    "not",
];

/// Returns the decisions of the node, in the format of the second implementation.
fn decided_by_node(node: &Node, events: &[String]) -> Vec<Value> {
    let mut decisions = Vec::with_capacity(events.len());
    for batch in events.chunks(200) {
        // The id of an event without an id starts with the time of the dry run, from which times to
        // live are measured.
        let body = format!(
            r#"[{{"type":"clock","source":"/clock"}},{}]"#,
            batch.join(",")
        );
        let answer = node.send(
            "POST",
            "/v1/events?dry_run=true",
            &[("Content-Type", "application/cloudevents-batch+json")],
            body.as_bytes(),
        );
        assert_eq!(answer.status, 200, "{answer:?}");
        let answer = answer.json();
        let [clock, tried @ ..] = answer["events"]
            .as_array()
            .expect("a list of events")
            .as_slice()
        else {
            panic!("{answer}")
        };
        let clock_ms: u64 = clock["id"]
            .as_str()
            .and_then(|id| id.strip_suffix("-0"))
            .and_then(|ms| ms.parse().ok())
            .expect("an id that starts with a time");
        assert_eq!(tried.len(), batch.len());
        decisions.extend(tried.iter().map(|tried| in_plain_words(tried, clock_ms)));
    }
    decisions
}

fn in_plain_words(tried: &Value, clock_ms: u64) -> Value {
    assert_eq!(tried["status"], "dry_run", "{tried}");
    let route = |route: &Value| {
        let mut route = route.clone();
        let members = route.as_object_mut().expect("a route");
        if let Some(at) = members.remove("expires_ms") {
            members.insert(
                "ttl_ms".into(),
                (at.as_u64().expect("a time") - clock_ms).into(),
            );
        }
        if let Some(body) = members.remove("body") {
            members.insert("body".into(), json!({ "is": body }));
        }
        route
    };
    let mut decision = json!({ "routes": tried["plan"].as_array().expect("a plan").iter().map(route).collect::<Vec<_>>() });
    for member in [
        "id",
        "outcome",
        "plugin",
        "reason",
        "priority",
        "attributes",
    ] {
        if let Some(value) = tried.get(member) {
            decision[member] = value.clone();
        }
    }
    decision
}

fn decided_again(plugins: &Value, events: &[String]) -> Vec<Value> {
    let folder = Folder::new();
    let [plugins_file, events_file] =
        ["plugins.json", "events.jsonl"].map(|file| folder.path().join(file));
    fs::write(&plugins_file, plugins.to_string())
        .and_then(|()| fs::write(&events_file, events.join("\n")))
        .expect("write the events");
    let mut command = Command::new(node_interpreter());
    command
        .arg(repository().join("tests/plugins/decisions/second.js"))
        .args([&plugins_file, &events_file]);
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("cannot run node ({error}); `make test` installs it"));
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let lines = String::from_utf8(output.stdout).expect("UTF-8 output");
    lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
        .collect()
}

/// Returns the settings of the plugins: the text of the configuration file, and the configuration
/// of each plugin as JSON.
fn settings() -> (String, Value) {
    let text = fs::read_to_string(repository().join("tests/plugins/decisions/pointsman.toml"))
        .expect("read pointsman.toml");
    let parsed: Value = toml::from_str(&text).expect("valid TOML");
    let own = ["discard", "prioritize", "rules"]
        .map(|name| (name.to_owned(), parsed["plugins"][name]["config"].clone()));
    (text, own.into_iter().collect())
}

#[test]
fn a_second_implementation_makes_the_same_decision_about_every_event() {
    let (mut generator, _) = seed::generator("decisions");
    let (toml, own) = settings();
    let recorded = events::recorded();
    assert!(
        recorded.len() >= 300,
        "{} recorded payloads",
        recorded.len()
    );
    let events = [recorded, events::made(2_000, generator.random())].concat();
    let node = Node::builder()
        .plugins(every_bundled_plugin())
        .config(&toml)
        .may_be_unready()
        .start();
    // A development build compiles four plugins, which takes longer on a busy machine.
    eventually(Duration::from_secs(300), "the plugins are loaded", || {
        (node.admin("/readyz").status == 200).then_some(())
    });
    let decisions = decided_by_node(&node, &events);
    let expected = decided_again(&own, &events);
    assert_eq!(expected.len(), events.len());
    for ((event, decided), expect) in events.iter().zip(&decisions).zip(&expected) {
        assert_eq!(decided, expect, "decision about {event}");
    }
    let outcomes = tally(
        decisions
            .iter()
            .map(|decision| decision["outcome"].as_str().expect("an outcome").to_owned()),
    );
    for outcome in ["committed", "discarded", "unrouted", "dead-lettered"] {
        assert!(
            outcomes.get(outcome).is_some_and(|n| *n >= ENOUGH),
            "{outcomes:?}"
        );
    }
    every_operator_decided_both_ways(&own, &decisions);
}

/// Each rule `op/...` is evaluated for every event that reaches the routers and is not muted. Its
/// group among the targets shows the decision.
fn every_operator_decided_both_ways(own: &Value, decisions: &[Value]) {
    let rules = own["rules"]["rules"].as_array().expect("a list of rules");
    let groups: Vec<&str> = rules
        .iter()
        .filter_map(|rule| rule["to"]["group"].as_str())
        .filter(|group| group.starts_with("op/"))
        .collect();
    let has = |group: String| assert!(groups.contains(&group.as_str()), "no rule tests {group}");
    OPERATORS.iter().for_each(|operator| {
        ["a", "v"]
            .iter()
            .for_each(|of| has(format!("op/{of}/{operator}")))
    });
    CONDITIONS
        .iter()
        .for_each(|condition| has(format!("op/condition/{condition}")));
    let asked: Vec<Vec<&str>> = decisions
        .iter()
        .filter(|decision| {
            ["committed", "unrouted"].contains(&decision["outcome"].as_str().expect("an outcome"))
        })
        .filter(|decision| decision["attributes"]["mute"] != true)
        .map(|decision| {
            decision["routes"]
                .as_array()
                .expect("routes")
                .iter()
                .filter_map(|route| route["to"][0].as_str())
                .collect()
        })
        .collect();
    let counts = groups.iter().map(|group| {
        let n_yes = asked
            .iter()
            .filter(|targets| targets.contains(&format!("g:{group}").as_str()))
            .count();
        (*group, n_yes, asked.len() - n_yes)
    });
    let rare: Vec<_> = counts
        .filter(|(_, n_yes, n_no)| *n_yes < ENOUGH || *n_no < ENOUGH)
        .collect();
    assert!(
        rare.is_empty(),
        "too few decisions each way (group, yes, no): {rare:?}"
    );
}

fn tally(words: impl Iterator<Item = String>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for word in words {
        *counts.entry(word).or_default() += 1;
    }
    counts
}
