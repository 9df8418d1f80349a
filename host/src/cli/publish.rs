//! `pointsman publish`: sends events from options or standard input to a node.
//!
//! An event without an id is assigned one, so that the node recognises retries made here after a
//! temporary error or a lost connection as duplicates.

use std::collections::BTreeMap;
use std::io::Read;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use clap::builder::NonEmptyStringValueParser;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use ureq::Agent;
use ureq::http::StatusCode;

use super::render::decision::{line, list, route, text, verdict};
use super::{NODE_URL, Node, no_node, parse_time, pretty_json, printable, read, refusal};

/// Appended to groups and everyone, whose members a dry run does not check against conditions.
const AS_FAR: &str = ", subject to the route's condition";
/// Maximum number of attempts per request.
const MAX_ATTEMPTS: u32 = 6;
/// Limits of one request, well below a node's default limits.
const MAX_EVENTS: usize = 1_000;
const MAX_BYTES: usize = 1024 * 1024;

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    #[command(flatten)]
    node: Node,
    /// Event type, such as order.shipped; without it, events are read from standard input as JSON
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<String>,
    /// Event source
    #[arg(long, default_value = "/cli", requires = "kind")]
    source: String,
    /// Event id; events with the same source and id are duplicates [default: random]
    #[arg(long, requires = "kind")]
    id: Option<String>,
    /// Time of the event, such as 2026-01-01T00:00:00Z [default: the time of its arrival]
    #[arg(long, requires = "kind", value_parser = rfc3339_time)]
    time: Option<String>,
    /// Event subject
    #[arg(long, requires = "kind")]
    subject: Option<String>,
    /// Address the event to this user; may be repeated
    #[arg(long, requires = "kind", value_parser = NonEmptyStringValueParser::new())]
    user: Vec<String>,
    /// Address the event to the members of this group; may be repeated
    #[arg(long, requires = "kind", value_parser = NonEmptyStringValueParser::new())]
    group: Vec<String>,
    /// Address the event to everyone
    #[arg(long, requires = "kind")]
    everyone: bool,
    /// Priority of the event
    #[arg(long, requires = "kind", value_parser = ["low", "normal", "high", "urgent"])]
    priority: Option<String>,
    /// Event data, as JSON
    #[arg(long, value_name = "JSON", requires = "kind")]
    data: Option<String>,
    /// Additional attribute; may be repeated
    #[arg(long, value_name = "NAME=VALUE", requires = "kind")]
    attribute: Vec<String>,
    /// Print the decision and the recipients without storing the event
    #[arg(long)]
    dry_run: bool,
    /// Print the response to a dry run as JSON
    #[arg(long, requires = "dry_run")]
    json: bool,
}

fn rfc3339_time(text: &str) -> Result<String, String> {
    parse_time(text).map(|_ms| text.to_owned())
}

/// The members of a CloudEvents document as raw JSON, so that numbers keep their digits.
type Document = BTreeMap<String, Box<RawValue>>;

pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let events = match &options.kind {
        Some(kind) => vec![from_options(options, kind)?],
        None => from_input(std::io::stdin().lock())?,
    };
    let agent = options.node.trust.agent(Duration::from_secs(60))?;
    let mut n_refused = 0;
    for batch in batches(&events)? {
        let path = if options.dry_run {
            "/v1/events?dry_run=true"
        } else {
            "/v1/events"
        };
        let answer = send(&options.node, &agent, path, batch)?;
        for event in answer["events"].as_array().into_iter().flatten() {
            if options.dry_run {
                println!(
                    "{}",
                    if options.json {
                        pretty_json(event)
                    } else {
                        render_dry_run(event)
                    }
                );
            } else if event["status"] == "stored" {
                println!(
                    "stored\t{}\tpartition {}\tentry {}",
                    printable(&text(&event["id"])),
                    event["partition"],
                    text(&event["entry"])
                );
            } else {
                n_refused += 1;
                println!("rejected\t{}", printable(&text(&event["error"])));
            }
        }
    }
    ensure!(
        n_refused == 0,
        "{n_refused} of {} events were rejected",
        events.len()
    );
    Ok(())
}

/// Formats the dry run of one event, one fact a line.
fn render_dry_run(event: &Value) -> String {
    if event["status"] != "dry_run" {
        return format!("rejected   {}", printable(&text(&event["error"])));
    }
    let reason = event["reason"]
        .as_str()
        .filter(|reason| !reason.is_empty())
        .map(|reason| format!(": {reason}"))
        .unwrap_or_default();
    let by = event["plugin"]
        .as_str()
        .map(|plugin| format!(" by {plugin}{reason}"))
        .unwrap_or_default();
    let mut lines = vec![format!(
        "{} of type {} would be {}{by}",
        event["id"],
        event["type"],
        text(&event["outcome"])
    )];
    lines.extend(
        list(&event["verdicts"])
            .iter()
            .map(|one| line("plugin", &verdict(one))),
    );
    lines.extend(
        list(&event["plan"])
            .iter()
            .enumerate()
            .map(|(at, planned)| line(&format!("route {}", at + 1), &route(planned))),
    );
    let mut reaches = |who: String| lines.push(line("reaches", &who));
    let of = &event["reaches"];
    for reached in list(&of["users"]) {
        reaches(format!(
            "user {}, by {}, {}",
            text(&reached["user"]),
            text(&reached["by"]),
            text(&reached["priority"])
        ));
    }
    list(&of["groups"])
        .iter()
        .for_each(|group| reaches(format!("the members of group {}{AS_FAR}", text(group))));
    if of["everyone"] == true {
        reaches(format!("everyone{AS_FAR}"));
    }
    lines.extend(list(&of["excluded"]).iter().map(|user| {
        line(
            "left out",
            &format!("user {}: no route condition holds", text(user)),
        )
    }));
    if of["not_evaluated"].as_u64().is_some_and(|n| n > 0) {
        lines.push(line(
            "unchecked",
            &format!("{} more users", of["not_evaluated"]),
        ));
    }
    lines
        .iter()
        .map(|line| printable(line))
        .collect::<Vec<_>>()
        .join("\n")
}

fn from_options(options: &Options, kind: &str) -> anyhow::Result<Document> {
    let mut event = Document::new();
    let mut set = |name: &str, value: Value| -> anyhow::Result<()> {
        event.insert(name.to_owned(), serde_json::value::to_raw_value(&value)?);
        Ok(())
    };
    for pair in &options.attribute {
        let (name, value) = pair
            .split_once('=')
            .with_context(|| format!("--attribute {pair} has no value; use NAME=VALUE"))?;
        set(name, json!(value))?;
    }
    set("type", json!(kind))?;
    set("source", json!(options.source))?;
    set("id", json!(options.id.clone().unwrap_or_else(new_id)))?;
    for (name, value) in [
        ("time", &options.time),
        ("subject", &options.subject),
        ("priority", &options.priority),
    ] {
        if let Some(value) = value {
            set(name, json!(value))?;
        }
    }
    for (one, many, names) in [
        ("user", "users", &options.user),
        ("group", "groups", &options.group),
    ] {
        match names.as_slice() {
            [] => {}
            [name] => set(one, json!(name))?,
            names => set(many, json!(names))?,
        }
    }
    if options.everyone {
        set("everyone", json!(true))?;
    }
    if let Some(data) = &options.data {
        let data: Box<RawValue> = serde_json::from_str(data)
            .with_context(|| format!("--data is not JSON; quote a string: --data '\"{data}\"'"))?;
        event.insert("data".to_owned(), data);
    }
    event.insert(
        "specversion".to_owned(),
        serde_json::value::to_raw_value("1.0")?,
    );
    Ok(event)
}

/// Reads a sequence of JSON documents, with or without line breaks between them. An array counts as
/// the events in it.
fn from_input(input: impl Read) -> anyhow::Result<Vec<Document>> {
    let mut events = Vec::new();
    for (n, document) in serde_json::Deserializer::from_reader(input)
        .into_iter::<Box<RawValue>>()
        .enumerate()
    {
        let document = document
            .with_context(|| format!("document {} of the input is not valid JSON", n + 1))?;
        if document.get().trim_start().starts_with('[') {
            events.extend(
                serde_json::from_str::<Vec<Document>>(document.get())
                    .context("an array in the input contains something other than events")?,
            );
        } else {
            events.push(
                serde_json::from_str(document.get())
                    .with_context(|| format!("document {} of the input is not an event", n + 1))?,
            );
        }
    }
    ensure!(
        !events.is_empty(),
        "no event given; pass --type, or write events to standard input"
    );
    for event in &mut events {
        if !event.contains_key("id") {
            event.insert("id".to_owned(), serde_json::value::to_raw_value(&new_id())?);
        }
    }
    Ok(events)
}

fn new_id() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// Splits the events into request bodies, each a JSON array.
fn batches(events: &[Document]) -> anyhow::Result<Vec<String>> {
    let mut batches: Vec<(usize, String)> = Vec::new();
    for event in events {
        let event = serde_json::to_string(event)?;
        match batches.last_mut() {
            Some((n, batch)) if *n < MAX_EVENTS && batch.len() + event.len() < MAX_BYTES => {
                *n += 1;
                batch.push(',');
                batch.push_str(&event);
            }
            _ => batches.push((1, format!("[{event}"))),
        }
    }
    Ok(batches.into_iter().map(|(_, batch)| batch + "]").collect())
}

/// Sends a batch, retrying after temporary errors. The wait is that of `Retry-After`, limited to
/// between 1 and 30 s.
///
/// # Errors
/// A permanent error, or [`MAX_ATTEMPTS`] temporary ones.
fn send(node: &Node, agent: &Agent, path: &str, batch: String) -> anyhow::Result<Value> {
    let url = node.at(path);
    let mut attempt = 1;
    loop {
        let mut request = agent
            .post(&url)
            .content_type("application/cloudevents-batch+json");
        if let Some(authorization) = node.authorization() {
            request = request.header("authorization", authorization);
        }
        let (why, wait_s) = match request.send(&batch) {
            Ok(response) => {
                let wait_s = response
                    .headers()
                    .get("retry-after")
                    .and_then(|value| value.to_str().ok()?.parse().ok());
                let (status, text) = read(response)?;
                if status.is_success() {
                    return serde_json::from_str(&text).context("the node's response is not JSON");
                }
                // Every event of the batch is refused, each with a reason of its own.
                if let Ok(answer) = serde_json::from_str::<Value>(&text)
                    && answer["events"].is_array()
                {
                    return Ok(answer);
                }
                if !matches!(
                    status,
                    StatusCode::TOO_MANY_REQUESTS
                        | StatusCode::SERVICE_UNAVAILABLE
                        | StatusCode::REQUEST_TIMEOUT
                ) {
                    bail!("{}", refusal(status, &text));
                }
                (refusal(status, &text), wait_s)
            }
            Err(error) => (no_node(&node.url, NODE_URL, &error).to_string(), None),
        };
        if attempt == MAX_ATTEMPTS {
            bail!("{why}; gave up after {attempt} attempts");
        }
        let wait_s = wait_s.unwrap_or(1_u64).clamp(1, 30);
        eprintln!("pointsman: {why}; retrying in {wait_s} s");
        std::thread::sleep(Duration::from_secs(wait_s));
        attempt += 1;
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn event(arguments: &[&str]) -> anyhow::Result<Value> {
        let line = Line::try_parse_from(["publish", "--type", "t"].iter().chain(arguments))?;
        let event = from_options(&line.options, "t")?;
        Ok(serde_json::from_str(&serde_json::to_string(&event)?)?)
    }

    #[test]
    fn options_become_attributes() {
        let found = event(&[
            "--id",
            "a",
            "--user",
            "1",
            "--user",
            "2",
            "--group",
            "g",
            "--everyone",
            "--attribute",
            "plan=pro",
            "--time",
            "2026-01-01T00:00:00Z",
            "--data",
            "{\"n\":1}",
        ])
        .unwrap();
        let expected = json!({ "specversion": "1.0", "type": "t", "source": "/cli", "id": "a", "users": ["1", "2"], "group": "g", "everyone": true, "plan": "pro", "time": "2026-01-01T00:00:00Z", "data": { "n": 1 } });
        assert_eq!(found, expected);
        let refused = Line::try_parse_from(["publish", "--type", "t", "--time", "noon"]);
        assert!(
            refused
                .unwrap_err()
                .to_string()
                .contains("use the form 2026-01-01T00:00:00Z")
        );
        assert!(
            event(&["--data", "hello"])
                .unwrap_err()
                .to_string()
                .contains("--data '\"hello\"'")
        );
        assert!(
            event(&["--attribute", "plan"])
                .unwrap_err()
                .to_string()
                .contains("NAME=VALUE")
        );
    }

    #[test]
    fn input_may_be_one_event_lines_or_an_array_and_every_event_gets_an_id() {
        let events =
            from_input("{\"type\":\"a\"}\n{\"type\":\"b\",\"id\":\"x\"} [{\"type\":\"c\"},\n{\"type\":\"d\",\"data\":1.10}]".as_bytes())
                .unwrap();
        let kinds: Vec<&str> = events.iter().map(|event| event["type"].get()).collect();
        assert_eq!(kinds, ["\"a\"", "\"b\"", "\"c\"", "\"d\""]);
        assert_eq!(events[1]["id"].get(), "\"x\"");
        assert_eq!(events[3]["data"].get(), "1.10");
        assert!(events[0]["id"].get().len() > 20 && events[0]["id"].get() != events[2]["id"].get());
        assert!(from_input("".as_bytes()).is_err());
        assert!(from_input("{\"type\":".as_bytes()).is_err());
        assert!(from_input("7".as_bytes()).is_err());
    }

    #[test]
    fn large_inputs_are_split_into_bounded_requests() {
        let events: Vec<Document> =
            from_input("{\"type\":\"t\"}".repeat(2_500).as_bytes()).unwrap();
        let sizes: Vec<usize> = batches(&events)
            .unwrap()
            .iter()
            .map(|batch| serde_json::from_str::<Vec<Value>>(batch).unwrap().len())
            .collect();
        assert_eq!(sizes, [1_000, 1_000, 500]);
    }
}
