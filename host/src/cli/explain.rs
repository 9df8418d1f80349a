//! `pointsman explain`: why somebody was told of an event, or not, as a node explains it, in lines: first the sentence that says it all, then
//! what it is made from.

use std::time::Duration;

use anyhow::Context as _;
use pointsman::event::rfc3339;
use serde_json::Value;

use super::{Admin, accept, agent, printable, read};

/// Targets of a route that are named one by one.
const MAX_TARGETS: usize = 5;

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// The event's id; of one that was published without, its entry's
    event_id: String,
    /// Whom to explain it for; without one, only what was decided
    #[arg(long)]
    user: Option<String>,
    /// Print the node's answer as it is, in JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    admin: Admin,
}

pub(super) fn run(Options { event_id, user, json, admin }: &Options) -> anyhow::Result<()> {
    let user = user.as_ref().map(|user| format!("&user={}", encoded(user))).unwrap_or_default();
    let path = format!("/v1/explain?event_id={}{user}", encoded(event_id));
    let text = accept(read(admin.request(&agent(Duration::from_secs(60)), "GET", &path, None)?)?)?;
    let explanation: Value = serde_json::from_str(&text).context("the node's answer is not JSON")?;
    if *json {
        println!("{explanation:#}");
    } else {
        for line in lines(&explanation) {
            // Reasons and values quote what came from outside; a terminal must not obey it.
            println!("{}", printable(&line).trim_end());
        }
    }
    Ok(())
}

/// As it stands in a query.
fn encoded(text: &str) -> String {
    let byte = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(byte).collect()
}

fn lines(explanation: &Value) -> Vec<String> {
    let mut lines = vec![text(&explanation["conclusion"]), String::new()];
    let mut say = |label: &str, what: String| lines.push(format!("{label:<11}{what}"));
    let decision = &explanation["decision"];
    say("decided", decided(decision));
    say("event", format!("{} of type {} from {}", decision["event_id"], decision["event_type"], decision["event_source"]));
    for verdict in list(&decision["verdicts"]) {
        let (generation, hash) = (&verdict["generation"], verdict["hash"].as_str().map(|hash| format!(", {hash}")).unwrap_or_default());
        let (plugin, verdict, reason) = (&verdict["plugin"], text(&verdict["verdict"]), &verdict["reason"]);
        let reason = reason.as_str().or((verdict == "skipped").then_some("its types do not match"));
        let reason = reason.map(|reason| format!(": {reason}")).unwrap_or_default();
        say("plugin", format!("{} (generation {generation}{hash}) {verdict}{reason}", text(plugin)));
    }
    for other in list(&explanation["other_decisions"]) {
        say("beside it", decided(other));
    }
    if let Some(reason) = decision["reason"].as_str() {
        say("dead", reason.to_owned());
    }
    let recipient = &explanation["recipient"];
    for (at, planned) in list(&explanation["plan"]).iter().enumerate() {
        let wins = match (recipient["won"] == at, recipient["wins"] == at) {
            (_, true) => ", and wins",
            (true, false) => ", and won",
            _ => "",
        };
        let reason = recipient["routes"][at]["reason"].as_str().map(|reason| format!(": {reason}{wins}")).unwrap_or_default();
        say(&format!("route {}", at + 1), format!("{}{reason}", route(planned)));
    }
    if recipient.is_object() {
        standing(recipient, &mut say);
    }
    lines
}

/// What is known of the user who was asked about.
fn standing(recipient: &Value, say: &mut impl FnMut(&str, String)) {
    if let Some(is_in_log) = recipient["in_log"].as_bool() {
        say("log", if is_in_log { "it is in a log of the user" } else { "it has left the user's logs" }.to_owned());
    }
    if let Some(later) = recipient["superseded_by"].as_object() {
        let is_over = if recipient["superseded_by"]["expired"] == true { ", and has expired" } else { "" };
        say("later", format!("{} (notification {}) has the same collapse key{is_over}", later["event_id"], later["notification"]));
    }
    for device in list(&recipient["devices"]) {
        let at = match device["at"].as_str() {
            Some("acknowledged") => "has acknowledged it, or what came after it",
            Some("began-after") => "began after it, and acknowledged nothing",
            _ => "has yet to come to it",
        };
        say("device", format!("{} {at}", text(&device["device"])));
    }
    say("read", if recipient["read"] == true { "the read mark is past it" } else { "it is not marked as read" }.to_owned());
    let Value::Object(streams) = &recipient["streams"] else { return };
    say("streams", format!("{} open on this node, {} of them past it", streams["open"], streams["past"]));
    for unknown in list(&recipient["not_known"]) {
        say("not known", text(unknown));
    }
}

fn decided(decision: &Value) -> String {
    let id = decision["notification"].as_u64().map(|id| format!(" as notification {id}")).unwrap_or_default();
    let at = decision["clock_ms"].as_u64().filter(|ms| *ms > 0).map(|ms| format!(" at {}", rfc3339(ms))).unwrap_or_default();
    format!("{}{at}{id}, entry {} of partition {}", text(&decision["outcome"]), text(&decision["entry"]), decision["partition"])
}

fn route(route: &Value) -> String {
    let to: Vec<String> = list(&route["to"]).iter().take(MAX_TARGETS).map(text).collect();
    let more = list(&route["to"]).len().saturating_sub(MAX_TARGETS);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    let mut told = format!("by {} to {}{more}, {}", text(&route["by"]), to.join(" "), text(&route["priority"]));
    if let Some(any_of) = route["when"].as_array() {
        let clauses: Vec<String> = any_of.iter().map(|clause| list(clause).iter().map(test).collect::<Vec<_>>().join(" and ")).collect();
        told += &format!(", if {}", clauses.join(" or "));
    }
    if let Some(ms) = route["expires_ms"].as_u64() {
        told += &format!(", until {}", rfc3339(ms));
    }
    for (key, words) in [("collapse", "with the collapse key"), ("event_name", "as the event")] {
        if let Some(name) = route[key].as_str() {
            told += &format!(", {words} {name}");
        }
    }
    told
}

fn test(test: &Value) -> String {
    let values: Vec<String> = list(&test["values"]).iter().map(ToString::to_string).collect();
    [text(&test["attribute"]), text(&test["operator"]), values.join(", ")].join(" ").trim_end().to_owned()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_route_is_told_in_one_line() {
        let planned = json!({
            "by": "rules", "to": ["g:ops", "all"], "priority": "high", "expires_ms": 1_795_335_532_612_u64, "collapse": "k", "event_name": "n",
            "when": [[{ "attribute": "plan", "operator": "equals", "values": ["pro"] }, { "attribute": "beta", "operator": "present" }],
                     [{ "attribute": "age", "operator": "one-of", "values": [1, 2] }]],
        });
        assert_eq!(
            route(&planned),
            "by rules to g:ops all, high, if plan equals \"pro\" and beta present or age one-of 1, 2, until 2026-11-22T08:18:52.612Z, \
             with the collapse key k, as the event n"
        );
    }

    #[test]
    fn what_is_asked_for_arrives_as_it_is() {
        assert_eq!(encoded("a-1_.~ &ü%"), "a-1_.~%20%26%C3%BC%25");
    }
}
