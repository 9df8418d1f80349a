//! A plugin folder that a test changes under a running node, and the effects visible from outside:
//! which plugins decided, in which generation.

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::eventually;
use super::http::Answer;
use super::node::{Builder, Folder, Node, SOON};
use super::publish::event;
use super::sse::Stream;

/// A plugin folder that a test changes.
pub(crate) struct Plugins(Folder);

impl Plugins {
    pub(crate) fn new(files: &[(&str, Vec<u8>)]) -> Self {
        let plugins = Self(Folder::new());
        fs::create_dir(plugins.dir()).unwrap();
        for (file, bytes) in files {
            plugins.replace(file, bytes);
        }
        plugins
    }

    pub(crate) fn dir(&self) -> PathBuf {
        self.0.path().join("plugins")
    }

    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.dir().join(file)
    }

    /// Replaces a file in one step, as a careful deployment does.
    pub(crate) fn replace(&self, file: &str, bytes: &[u8]) {
        let draft = self.path(&format!(".{file}"));
        fs::write(&draft, bytes).unwrap();
        fs::rename(draft, self.path(file)).unwrap();
    }

    pub(crate) fn remove(&self, file: &str) {
        fs::remove_file(self.path(file)).unwrap();
    }
}

/// A node with a stream of user 7, whose notifications carry the version of `versioned` that
/// decided.
pub(crate) struct Site {
    pub(crate) node: Node,
    pub(crate) stream: Stream,
    n_events: u32,
}

impl Site {
    pub(crate) fn new(plugins: &Plugins) -> Self {
        Self::of(Node::builder(), plugins)
    }

    pub(crate) fn of(node: Builder, plugins: &Plugins) -> Self {
        let node = node.plugins(plugins.dir()).start();
        Self {
            stream: node.stream("7"),
            node,
            n_events: 0,
        }
    }

    /// Shuts the node down cleanly and starts it again with the same files.
    pub(crate) fn restart(&mut self) {
        self.node.terminate(SOON);
        self.node.restart();
        self.stream = self.node.stream("7");
    }

    /// Sends an admin command about the plugin `versioned`.
    pub(crate) fn order(&self, method: &str, order: &str, body: &[u8]) -> Answer {
        self.node
            .order(method, &format!("/v1/plugins/versioned{order}"), &[], body)
    }

    /// Publishes an event and returns its id.
    pub(crate) fn publish(&mut self) -> String {
        self.n_events += 1;
        let id = format!("e{}", self.n_events);
        self.node
            .publisher()
            .publish(&[event(&id, "t", json!({"user": "7"}))]);
        id
    }

    /// Publishes an event. Returns the version that decided on it, and each plugin that decided
    /// with its generation.
    pub(crate) fn next_decision(&mut self) -> (u64, Vec<(String, u64)>) {
        let id = self.publish();
        self.decision(&id)
    }

    /// Like [`Site::next_decision`], for an event published before.
    pub(crate) fn decision(&mut self, id: &str) -> (u64, Vec<(String, u64)>) {
        let notification = self.stream.next_notification(SOON);
        assert_eq!(notification.id, id);
        (
            notification.data["version"].as_u64().unwrap(),
            deciders(&self.node, id),
        )
    }

    pub(crate) fn await_loads(&self, plugin: &str, outcome: &str, n: u32) {
        await_loads(&self.node, plugin, outcome, n);
    }

    /// Waits until `/readyz` has this status and a body that `wish` accepts, and returns the body.
    pub(crate) fn await_ready(&self, status: u16, wish: impl Fn(&str) -> bool) -> String {
        eventually(SOON, "the expected readiness", || {
            let answer = self.node.admin("/readyz");
            (answer.status == status && wish(&answer.body)).then_some(answer.body)
        })
    }
}

pub(crate) fn n_loads(node: &Node, plugin: &str, outcome: &str) -> f64 {
    node.metric(&format!(
        "pointsman_plugin_loads_total{{plugin=\"{plugin}\",outcome=\"{outcome}\"}}"
    ))
}

pub(crate) fn await_loads(node: &Node, plugin: &str, outcome: &str, n: u32) {
    eventually(
        SOON,
        &format!("{n} loads of {plugin} with the outcome {outcome}"),
        || (n_loads(node, plugin, outcome) >= f64::from(n)).then_some(()),
    );
    assert_eq!(n_loads(node, plugin, outcome), f64::from(n));
}

/// The plugins that decided on an event, in order, each with its generation.
pub(crate) fn deciders(node: &Node, event_id: &str) -> Vec<(String, u64)> {
    let decisions = node
        .admin(&format!("/v1/decisions?event_id={event_id}"))
        .json();
    let [decision] = decisions.as_array().unwrap().as_slice() else {
        panic!("expected one decision on {event_id}, got {decisions}")
    };
    generations(decision)
}

pub(crate) fn generations(decision: &Value) -> Vec<(String, u64)> {
    let verdicts = decision["verdicts"].as_array().unwrap().iter();
    verdicts
        .map(|verdict| {
            (
                verdict["plugin"].as_str().unwrap().to_owned(),
                verdict["generation"].as_u64().unwrap(),
            )
        })
        .collect()
}

pub(crate) fn by(plugin: &str, generation: u64) -> (String, u64) {
    (plugin.to_owned(), generation)
}

pub(crate) fn hash(bytes: &[u8]) -> String {
    format!("{:x}", Sha256::digest(bytes))
}
