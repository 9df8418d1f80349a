//! A plugin as operators see it: in the admin API, in readiness and in tests.

use serde::Serialize;

use super::generation::Generation;
use super::health::Report;
use super::settings::Settings;
use crate::plugin::Role;
use crate::plugin::shadow::Summary;

/// A plugin, or a file that should be one, or one that is configured and has no file.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct PluginState {
    pub name: String,
    /// The name of its file.
    pub file: String,
    pub state: Word,
    /// What an operator said, over what is configured; `None`: nothing.
    pub is_enabled_by_hand: Option<bool>,
    /// `filter`, `router`, `filter and router`, or nothing if it is not at work.
    pub kind: &'static str,
    /// What it says of itself.
    pub version: String,
    pub description: String,
    /// The generation at work; 0 for none.
    pub generation: u64,
    /// SHA-256 of what is at work, in hexadecimal.
    pub hash: String,
    /// Since when, in milliseconds since the Unix epoch.
    pub since_ms: u64,
    /// What is configured for it, its own configuration left out: that may hold what is nobody's business.
    pub settings: Settings,
    /// The generation that a rollback goes back to.
    pub previous: Option<u64>,
    /// Why the file that is there now is not at work. `None`: it is.
    pub failure: Option<String>,
    /// SHA-256 of the file that is not at work, if it could be read.
    pub failed_hash: Option<String>,
    /// The last attempt to replace what is at work that came to nothing, by a file, an upload or a probation.
    pub refusal: Option<Refusal>,
    /// `None`: nothing is at work.
    pub health: Option<Report>,
    /// The candidate beside it, if there is one.
    pub shadow: Option<Summary>,
    /// Generations that are no longer at work, newest first.
    pub ended: Vec<Ended>,
}

impl PluginState {
    pub(in crate::plugin) fn at_work(mut self, generation: &Generation) -> Self {
        let plugin = &generation.plugin;
        self.kind = match (plugin.has_role(Role::Filter), plugin.has_role(Role::Router)) {
            (true, true) => "filter and router",
            (true, false) => "filter",
            _ => "router",
        };
        self.version.clone_from(&plugin.manifest().version);
        self.description.clone_from(&plugin.manifest().description);
        plugin.hash().clone_into(&mut self.hash);
        self.generation = generation.number;
        self
    }
}

/// How a plugin, or one of its generations, stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Word {
    /// At work, and so are the next three.
    Active,
    /// It has just taken another generation's place, which takes over again if it fails too often.
    OnProbation,
    /// It failed on so many events in a row that it is asked only now and then.
    BreakerOpen,
    /// Its file is no plugin that can run here.
    #[default]
    Failed,
    /// By its configuration or by an operator.
    Disabled,
    /// It is configured, and there is no file of this name.
    Missing,
    /// Of a generation: another took its place.
    Replaced,
    /// Of a generation: the one before it took over again.
    RolledBack,
    /// Of a generation: its file was removed.
    Removed,
}

/// An attempt that came to nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// In milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// SHA-256, in hexadecimal, if there was something to read.
    pub hash: Option<String>,
    pub reason: String,
}

/// A generation that is no longer at work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Ended {
    pub generation: u64,
    pub version: String,
    pub hash: String,
    pub state: Word,
    /// From when to when it was at work, in milliseconds since the Unix epoch.
    pub since_ms: u64,
    pub until_ms: u64,
    /// Why it ended, where there is more to say than that another came.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
}
