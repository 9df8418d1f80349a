//! The state of a plugin as shown to operators: in the admin API, in readiness and in tests.

use serde::Serialize;

use super::generation::Generation;
use super::health::HealthReport;
use super::settings::Settings;
use crate::plugin::runtime::error::TRUNCATED;
use crate::plugin::shadow::ShadowSummary;
use crate::plugin::{Plugin, Role};

/// The state of a plugin, of a file that cannot be loaded, or of a configured plugin without a
/// file.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct PluginState {
    pub name: String,
    /// The file name.
    pub file: String,
    pub state: PluginStatus,
    /// Whether events wait on this node because the plugin has no active version.
    pub events_wait: bool,
    /// Set by an operator, overriding the configuration; `None`: not overridden.
    pub override_enabled: Option<bool>,
    pub kind: PluginKind,
    /// From the plugin's manifest.
    pub version: String,
    pub description: String,
    /// The active generation; 0 if there is none.
    pub generation: u64,
    /// SHA-256 of the active file, in hexadecimal.
    pub hash: String,
    /// The first 12 hex digits of the SHA-256 of its configuration as JSON with sorted keys, as in
    /// decision records; empty if the plugin is not active.
    pub config_hash: String,
    /// Since when this has been the state, in milliseconds since the Unix epoch.
    pub since_ms: u64,
    /// Its settings, without the plugin's own configuration, which may hold secrets.
    pub settings: Settings,
    /// The generation that a rollback would return to.
    pub previous: Option<u64>,
    /// Why the present file is not active. `None`: it is.
    pub failure: Option<String>,
    /// SHA-256 of the file that is not active, if it could be read.
    pub failed_hash: Option<String>,
    /// The last failed attempt to replace the active generation: by a file, an upload or a
    /// probation.
    pub refusal: Option<Refusal>,
    /// `None`: the plugin is not active.
    pub health: Option<HealthReport>,
    /// The candidate running in its shadow, if any.
    pub shadow: Option<ShadowSummary>,
    /// Former generations, newest first.
    pub ended: Vec<Ended>,
}

impl PluginState {
    /// Whether the present file lacks its end, as while it is being copied.
    pub(crate) fn is_incomplete(&self) -> bool {
        let failure = self.failure.as_deref().unwrap_or_default();
        failure
            .strip_prefix(&self.file)
            .is_some_and(|reason| reason.trim_start().starts_with(TRUNCATED))
    }

    /// Adds what is known of the active generation.
    pub(super) fn with_active(mut self, generation: &Generation) -> Self {
        let plugin = &generation.plugin;
        self.kind = PluginKind::of(plugin);
        self.version.clone_from(&plugin.manifest().version);
        self.description.clone_from(&plugin.manifest().description);
        plugin.hash().clone_into(&mut self.hash);
        self.config_hash = generation.member().config_hash;
        self.generation = generation.number;
        self
    }
}

/// The roles of a plugin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PluginKind {
    /// Not known, because the plugin is not active; written as an empty text.
    #[default]
    #[serde(rename = "")]
    Inactive,
    Filter,
    Router,
    #[serde(rename = "filter and router")]
    FilterAndRouter,
}

impl PluginKind {
    pub(super) fn of(plugin: &Plugin) -> Self {
        match (plugin.has_role(Role::Filter), plugin.has_role(Role::Router)) {
            (true, true) => Self::FilterAndRouter,
            (true, false) => Self::Filter,
            (false, _) => Self::Router,
        }
    }

    /// The text as serialised.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Inactive => "",
            Self::Filter => "filter",
            Self::Router => "router",
            Self::FilterAndRouter => "filter and router",
        }
    }
}

/// The state of a plugin or of one of its generations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PluginStatus {
    /// Active; the next three states are active as well.
    Active,
    /// It has just replaced another generation, which takes over again if this one fails too often.
    OnProbation,
    /// It failed on so many events in a row that only one is tried now and then.
    BreakerOpen,
    /// Its file cannot run as a plugin.
    #[default]
    Failed,
    /// Disabled by the configuration or by an operator.
    Disabled,
    /// Its file is being compiled.
    Compiling,
    /// Configured, or active until its file vanished, but no file has this name.
    Missing,
    /// Its file is not that of a plugin, by its name: a copy or version of a plugin's file, or not
    /// configured while `plugins.only_configured` is set.
    Ignored,
    /// Generations only: another generation replaced it.
    Replaced,
    /// Generations only: it was rolled back to the one before.
    RolledBack,
    /// Generations only: its file was removed.
    Removed,
}

/// A failed attempt to replace a plugin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refusal {
    /// In milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// SHA-256, in hexadecimal, if the file could be read.
    pub hash: Option<String>,
    pub reason: String,
}

/// A former generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Ended {
    pub generation: u64,
    pub version: String,
    pub hash: String,
    /// The first 12 hex digits of the hash of its configuration.
    pub config_hash: String,
    pub state: PluginStatus,
    /// When it was active, in milliseconds since the Unix epoch.
    pub since_ms: u64,
    pub until_ms: u64,
    /// Why it ended; empty if another generation simply replaced it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
}
