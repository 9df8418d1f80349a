//! What the bundled plugins decide is what their documentation says: a second implementation of all four in another language, which shares no
//! code with them (`decisions/second.js`), decides the same about every event, in every detail.
//!
//! The events are payloads that others recorded and made ones that try the edges; they enter a node by `POST /v1/events?dry_run=true`, which
//! answers the plan. Node 20 or newer and npm must be there; `make test` sees to it (`scripts/need.sh`).

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::time::Duration;

use rand::Rng as _;
use serde_json::{Value, json};

use crate::harness::node::{Folder, Node};
use crate::harness::{eventually, every_bundled_plugin, node_interpreter, repository, seed};

mod events;

/// So often must each operator decide each way.
const ENOUGH: usize = 10;
/// Of values.
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
/// Of events.
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

/// What the node decides, in the words of the second implementation.
fn decided_by_node(node: &Node, events: &[String]) -> Vec<Value> {
    let mut decisions = Vec::with_capacity(events.len());
    for batch in events.chunks(200) {
        // An event without an id is given one of the moment at which the batch was tried: times to live count from it.
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
            .expect("a moment");
        assert_eq!(tried.len(), batch.len());
        decisions.extend(tried.iter().map(|tried| in_plain_words(tried, clock_ms)));
    }
    decisions
}

fn in_plain_words(tried: &Value, clock_ms: u64) -> Value {
    assert_eq!(tried["status"], "tried", "{tried}");
    let route = |route: &Value| {
        let mut route = route.clone();
        let members = route.as_object_mut().expect("a route");
        if let Some(at) = members.remove("expires_ms") {
            members.insert(
                "ttl_ms".into(),
                (at.as_u64().expect("a moment") - clock_ms).into(),
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
        .unwrap_or_else(|error| panic!("node cannot be run ({error}); `make test` installs it"));
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let lines = String::from_utf8(output.stdout).expect("UTF-8");
    lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
        .collect()
}

/// The settings of each plugin: as they stand in the node's file, and what of them is the plugin's own, as JSON.
fn settings() -> (String, Value) {
    let text = fs::read_to_string(repository().join("tests/plugins/decisions/pointsman.toml"))
        .expect("pointsman.toml");
    let parsed: Value = toml::from_str(&text).expect("TOML");
    let own = ["discard", "prioritize", "rules"]
        .map(|name| (name.to_owned(), parsed["plugins"][name]["config"].clone()));
    (text, own.into_iter().collect())
}

#[test]
fn a_second_implementation_decides_the_same_about_every_event() {
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
    // A development build compiles four plugins for as many seconds as others leave it.
    eventually(Duration::from_secs(300), "the plugins are loaded", || {
        (node.admin("/readyz").status == 200).then_some(())
    });
    let decisions = decided_by_node(&node, &events);
    let expected = decided_again(&own, &events);
    assert_eq!(expected.len(), events.len());
    for ((event, decided), expect) in events.iter().zip(&decisions).zip(&expected) {
        assert_eq!(decided, expect, "about {event}");
    }
    let outcomes = tally(
        decisions
            .iter()
            .map(|decision| decision["outcome"].as_str().expect("a word").to_owned()),
    );
    for outcome in ["committed", "discarded", "unrouted", "dead-lettered"] {
        assert!(
            outcomes.get(outcome).is_some_and(|n| *n >= ENOUGH),
            "{outcomes:?}"
        );
    }
    every_operator_decided_both_ways(&own, &decisions);
}

/// A rule `op/...` was asked about each event that came as far as the routers and was not muted, and its group says how it decided.
fn every_operator_decided_both_ways(own: &Value, decisions: &[Value]) {
    let rules = own["rules"]["rules"].as_array().expect("a list of rules");
    let groups: Vec<&str> = rules
        .iter()
        .filter_map(|rule| rule["to"]["group"].as_str())
        .filter(|group| group.starts_with("op/"))
        .collect();
    let has = |group: String| assert!(groups.contains(&group.as_str()), "no rule tries {group}");
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
            ["committed", "unrouted"].contains(&decision["outcome"].as_str().expect("a word"))
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
        "decided too seldom (group, yes, no): {rare:?}"
    );
}

fn tally(words: impl Iterator<Item = String>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for word in words {
        *counts.entry(word).or_default() += 1;
    }
    counts
}
