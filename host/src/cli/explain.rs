//! `pointsman explain`: prints a node's explanation of why an event did or did not reach a user.
//!
//! The conclusion comes first, then the facts behind it, one a line. The explanation itself is made
//! by the node (`explain` in the library).

use std::time::Duration;

use anyhow::Context as _;
use pointsman::event::rfc3339;
use serde_json::Value;

use super::render::decision::{line, list, route, text, verdict};
use super::{Admin, accept, pretty_json, printable, read};

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Id of the event, or its entry id if it was published without an id
    event_id: String,
    /// Explain delivery to this user; without it, only the decision is shown
    #[arg(long)]
    user: Option<String>,
    /// Print the node's response as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    admin: Admin,
}

pub(super) fn run(
    Options {
        event_id,
        user,
        json,
        admin,
    }: &Options,
) -> anyhow::Result<()> {
    let user = user
        .as_ref()
        .map(|user| format!("&user={}", encoded(user)))
        .unwrap_or_default();
    let path = format!("/v1/explain?event_id={}{user}", encoded(event_id));
    let text = accept(read(admin.request(
        &admin.trust.agent(Duration::from_secs(60))?,
        "GET",
        &path,
        None,
    )?)?)?;
    let explanation: Value =
        serde_json::from_str(&text).context("the node's response is not JSON")?;
    if *json {
        println!("{}", pretty_json(&explanation));
    } else {
        for line in lines(&explanation) {
            // Reasons and values quote untrusted text, which must not control the terminal.
            println!("{}", printable(&line).trim_end());
        }
    }
    Ok(())
}

/// Percent-encodes a value for a query string.
fn encoded(text: &str) -> String {
    let byte = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
            char::from(byte).to_string()
        }
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(byte).collect()
}

fn lines(explanation: &Value) -> Vec<String> {
    let mut lines = vec![text(&explanation["conclusion"]), String::new()];
    let mut say = |label: &str, what: String| lines.push(line(label, &what));
    let decision = &explanation["decision"];
    say("decided", decided(decision));
    say(
        "event",
        format!(
            "{} of type {} from {}",
            decision["event_id"], decision["event_type"], decision["event_source"]
        ),
    );
    for one in list(&decision["verdicts"]) {
        say("plugin", verdict(one));
    }
    if decision["chain"].is_string() && !decision["members"].is_object() {
        say(
            "plugin",
            format!(
                "the plugins of chain {} that were not called are no longer recorded",
                text(&decision["chain"])
            ),
        );
    }
    for other in list(&explanation["other_decisions"]) {
        say("also", decided(other));
    }
    if let Some(reason) = decision["reason"].as_str() {
        say("reason", reason.to_owned());
    }
    let recipient = &explanation["recipient"];
    for (at, planned) in list(&explanation["plan"]).iter().enumerate() {
        let wins = match (recipient["won"] == at, recipient["wins"] == at) {
            (_, true) => ", and wins",
            (true, false) => ", and won",
            _ => "",
        };
        let reason = recipient["routes"][at]["reason"]
            .as_str()
            .map(|reason| format!(": {reason}{wins}"))
            .unwrap_or_default();
        say(
            &format!("route {}", at + 1),
            format!("{}{reason}", route(planned)),
        );
    }
    if recipient.is_object() {
        standing(recipient, &mut say);
    }
    lines
}

/// The lines about the user: log, later notification, devices, read marker and streams.
fn standing(recipient: &Value, say: &mut impl FnMut(&str, String)) {
    if let Some(is_in_log) = recipient["in_log"].as_bool() {
        say(
            "log",
            if is_in_log {
                "it is in one of the user's logs"
            } else {
                "it is no longer in any of the user's logs"
            }
            .to_owned(),
        );
    }
    if let Some(later) = recipient["superseded_by"].as_object() {
        let is_over = if recipient["superseded_by"]["expired"] == true {
            ", but has expired"
        } else {
            ""
        };
        say(
            "superseded",
            format!(
                "by {} (notification {}), which has the same collapse key{is_over}",
                later["event_id"], later["notification"]
            ),
        );
    }
    for device in list(&recipient["devices"]) {
        let at = match device["at"].as_str() {
            Some("acknowledged") => "has acknowledged it or a later one",
            Some("began-after") => "started after it and has acknowledged nothing",
            _ => "has not reached it yet",
        };
        say("device", format!("{} {at}", text(&device["device"])));
    }
    say(
        "read",
        if recipient["read"] == true {
            "the read marker is past it"
        } else {
            "it is not marked as read"
        }
        .to_owned(),
    );
    let Value::Object(streams) = &recipient["streams"] else {
        return;
    };
    say(
        "streams",
        format!(
            "{} open on this node, {} of them past this event",
            streams["open"], streams["past"]
        ),
    );
    for unknown in list(&recipient["not_known"]) {
        say("unknown", text(unknown));
    }
}

fn decided(decision: &Value) -> String {
    let id = decision["notification"]
        .as_u64()
        .map(|id| format!(" as notification {id}"))
        .unwrap_or_default();
    let at = decision["clock_ms"]
        .as_u64()
        .filter(|ms| *ms > 0)
        .map(|ms| format!(" at {}", rfc3339(ms)))
        .unwrap_or_default();
    format!(
        "{}{at}{id}, entry {} of partition {}",
        text(&decision["outcome"]),
        text(&decision["entry"]),
        decision["partition"]
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_values_are_percent_encoded() {
        assert_eq!(encoded("a-1_.~ &ü%"), "a-1_.~%20%26%C3%BC%25");
    }
}
