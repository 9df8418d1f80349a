//! Publishers that know only `PUBLISH`: ioredis and redis-py, with the bridges of docs/migrate.md.
//! The programs are in `publishers/`.
//!
//! They need Node 20 or newer, npm and Python 3 with venv; `make test` installs them
//! (`scripts/need.sh`).

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::command::output_of;
use crate::harness::node::Node;
use crate::harness::publish::event;
use crate::harness::redis::RedisServer;
use crate::harness::sse::Stream;
use crate::harness::{eventually, node_interpreter, repository};

/// Time limit of whatever should happen at once, on a loaded machine.
const SOON: Duration = Duration::from_secs(60);

/// The `[[bridge]]` tables of docs/migrate.md.
pub(crate) fn documented_bridges() -> String {
    let page = repository().join("docs/migrate.md");
    let page = std::fs::read_to_string(page).expect("docs/migrate.md");
    let samples = page
        .split("```toml\n")
        .skip(1)
        .filter_map(|rest| rest.split("```").next())
        .filter(|sample| sample.contains("[[bridge]]"));
    let samples: String = samples.collect();
    assert_eq!(samples.matches("[[bridge]]").count(), 9, "{samples}");
    samples
}

/// Waits until this node listens to a number of bridges.
fn await_listening(node: &Node, n: usize) {
    eventually(SOON, "the node listens", || {
        let listening = node.metric_if_up("pointsman_bridge_listening")?;
        (listening as usize == n).then_some(())
    });
}

/// The program with its interpreter.
fn program(language: &str) -> Command {
    static NODE: OnceLock<()> = OnceLock::new();
    static PYTHON: OnceLock<PathBuf> = OnceLock::new();
    let folder = repository().join("tests/publishers");
    let mut command;
    if language == "node" {
        NODE.get_or_init(|| {
            let mut npm = Command::new("npm");
            npm.args(["ci", "--silent", "--no-audit", "--no-fund"]);
            output_of(npm.current_dir(&folder));
        });
        command = Command::new(node_interpreter());
        command.arg(folder.join("publish.js"));
    } else {
        let python = PYTHON.get_or_init(|| {
            let venv = Path::new(env!("CARGO_TARGET_TMPDIR")).join("publishers-venv");
            output_of(Command::new("python3").args(["-m", "venv"]).arg(&venv));
            let mut pip = Command::new(venv.join("bin/pip"));
            pip.args(["install", "--quiet", "--disable-pip-version-check", "-r"]);
            output_of(pip.arg(folder.join("requirements.txt")));
            venv.join("bin/python")
        });
        command = Command::new(python);
        command.arg(folder.join("publish.py"));
    }
    command
}

/// Publishes messages of one language: command, channel, message.
fn publish(language: &str, server: &RedisServer, messages: &[(&str, String, String)]) {
    let mut command = program(language);
    command
        .arg(serde_json::to_string(messages).expect("JSON"))
        .env("REDIS_URL", server.url());
    output_of(&mut command);
}

/// The notifications that a stream receives up to and including the notification with the id `last`: priority, type
/// and data, sorted, because bridges append independently of each other.
fn received_until(stream: &mut Stream, last: &str) -> Vec<String> {
    let mut received = Vec::new();
    loop {
        let notification = stream.next_notification(SOON);
        if notification.id == last {
            received.sort();
            return received;
        }
        received.push(line(
            &notification.priority,
            &notification.kind,
            &notification.data,
        ));
    }
}

fn line(priority: &str, kind: &str, data: &Value) -> String {
    format!("{priority} {kind} {data}")
}

/// All presets, from the publishers unchanged.
fn each_message_reaches_exactly_the_users_that_it_names(language: &str) {
    let server = RedisServer::start();
    let node = Node::builder()
        .redis(server.url())
        .config(&documented_bridges())
        .start();
    await_listening(&node, 9);
    node.join("ops", "42");
    let headers = [("content-type", "application/json")];
    let attributes = br#"{"role":"admin","plan":"team"}"#;
    let path = "/v1/users/42/attributes";
    assert_eq!(node.send("PUT", path, &headers, attributes).status, 204);
    let (mut ann, mut bob) = (node.stream("42"), node.stream("bob"));

    let message = |n: u32| json!({ "n": n }).to_string();
    let of_user = |user: Value, n: u32| json!({ "userId": user, "n": n }).to_string();
    let conditional = |criteria: Value, n: u32| {
        json!({ "message": { "n": n }, "criteria": criteria }).to_string()
    };
    let publish_to = |channel: &str, message: String| ("publish", channel.to_owned(), message);
    let messages = [
        publish_to("notifications", of_user(json!(42), 1)),
        publish_to("notifications", of_user(json!("bob"), 2)),
        publish_to("user:42", message(3)),
        publish_to("user:bob", message(4)),
        publish_to("user-42", message(5)),
        publish_to("user-bob", "six, not JSON".to_owned()),
        publish_to("sse:channel:42", message(7)),
        publish_to("sse:channel:bob", message(8)),
        publish_to("sse:broadcast", message(9)),
        publish_to("group:ops", message(10)),
        publish_to("group:nobody", message(11)),
        publish_to(
            "conditional",
            conditional(json!({ "role": "admin", "plan": ["pro", "team"] }), 12),
        ),
        publish_to("conditional", conditional(json!({ "role": "guest" }), 13)),
        publish_to("conditional", json!({ "message": { "n": 14 } }).to_string()),
        publish_to("alerts:urgent", of_user(json!(42), 15)),
        publish_to("alerts:low", of_user(json!("bob"), 16)),
        (
            "spublish",
            "orders".to_owned(),
            json!({ "customer": 42, "id": "a" }).to_string(),
        ),
        (
            "spublish",
            "orders".to_owned(),
            json!({ "customer": "bob", "id": "b" }).to_string(),
        ),
        // Names no user.
        publish_to("notifications", message(19)),
        publish_to("notifications", "not JSON".to_owned()),
        publish_to("user:", message(20)),
    ];
    publish(language, &server, &messages);
    eventually(SOON, "every message has its outcome", || {
        let n = node.metric("pointsman_bridge_messages_total") as usize;
        (n == messages.len()).then_some(())
    });
    let n_unresolved = 4;
    assert_eq!(outcome(&node, "unresolved"), n_unresolved);
    assert_eq!(outcome(&node, "appended"), messages.len() - n_unresolved);
    let end = json!({ "users": "42,bob", "priority": "low" });
    node.publisher().publish(&[event("end", "t", end)]);

    let normal = |n: u32| line("normal", "message", &json!({ "n": n }));
    let named = |user: Value, n: u32| json!({ "n": n, "userId": user });
    let mut of_ann: Vec<String> = [3, 5, 7, 9, 10, 12].map(normal).into();
    of_ann.extend([
        line("normal", "message", &named(json!(42), 1)),
        line("urgent", "alert", &named(json!(42), 15)),
        line("normal", "order", &json!({ "customer": 42, "id": "a" })),
    ]);
    let mut of_bob: Vec<String> = [4, 8, 9].map(normal).into();
    of_bob.extend([
        line("normal", "message", &named(json!("bob"), 2)),
        line("normal", "message", &json!("six, not JSON")),
        line("low", "alert", &named(json!("bob"), 16)),
        line("normal", "order", &json!({ "customer": "bob", "id": "b" })),
    ]);
    of_ann.sort();
    of_bob.sort();
    assert_eq!(received_until(&mut ann, "end"), of_ann);
    assert_eq!(received_until(&mut bob, "end"), of_bob);
}

/// The messages of all bridges with this outcome.
fn outcome(node: &Node, outcome: &str) -> usize {
    let page = node.admin("/metrics").body;
    let label = format!("outcome=\"{outcome}\"}}");
    let lines = page.lines().filter(|line| {
        line.starts_with("pointsman_bridge_messages_total{") && line.contains(&label)
    });
    let values = lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok());
    values.sum::<f64>() as usize
}

#[test]
fn messages_of_ioredis_reach_exactly_the_users_that_they_name() {
    each_message_reaches_exactly_the_users_that_it_names("node");
}

#[test]
fn messages_of_redis_py_reach_exactly_the_users_that_they_name() {
    each_message_reaches_exactly_the_users_that_it_names("python");
}
