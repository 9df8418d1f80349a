//! The registry's record of each plugin: its files, the active and the previous generation, and why
//! a file is not active.
//!
//! Pure bookkeeping under the registry's lock: nothing here reads a file, compiles or blocks.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::AdminError;
use crate::clock::now_ms;
use crate::plugin::Plugin;
use crate::plugin::registry::admission::{self, Inadmissible};
use crate::plugin::registry::folder::FileStamp;
use crate::plugin::registry::generation::Generation;
use crate::plugin::registry::health::BreakerState;
use crate::plugin::registry::settings::{Config, OnMissing, Settings};
use crate::plugin::registry::staged::ActiveRollout;
use crate::plugin::registry::state::{Ended, PluginState, PluginStatus, Refusal};
use crate::plugin::runtime::compiler::Compilation;
use crate::plugin::runtime::error::{EMPTY, TRUNCATED};

/// How long a plugin whose file vanished stays active: a deployment may remove a file before it
/// writes the next one.
pub(super) const GRACE: Duration = Duration::from_secs(10);
/// The maximum number of former generations remembered per plugin.
const MAX_ENDED: usize = 20;
/// The pause before a file is tried again that failed for want of memory in the host.
const TRY_AGAIN_AFTER: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(super) struct Slots {
    pub(super) config: Config,
    pub(super) by_name: BTreeMap<String, Slot>,
    /// The roll-outs, by plugin.
    pub(super) rollouts: BTreeMap<String, ActiveRollout>,
    pub(super) has_read_rollouts: bool,
    /// How often a rolled-out version was withdrawn from a partition.
    pub(super) n_withdrawals: u64,
}

/// The record of one plugin. It is kept after the plugin is gone, so that generation numbers are
/// never reused.
#[derive(Debug, Default)]
pub(super) struct Slot {
    /// The files as they were last loaded. The first one is used; empty if the plugin is gone.
    pub(super) files: Vec<FileStamp>,
    pub(super) running: Option<Arc<Generation>>,
    /// Since when `running` is active, in milliseconds since the Unix epoch.
    pub(super) since_ms: u64,
    /// The generation to roll back to: the last one that passed its probation, if any did.
    pub(super) previous: Option<Arc<Generation>>,
    /// Why the present file is not the active version.
    pub(super) failure: Option<Failure>,
    /// The last failed attempt to replace the active version, from any source.
    pub(super) refusal: Option<Refusal>,
    /// The hash and settings of the version that was rolled back. The same combination is not tried
    /// again.
    pub(super) rolled_back: Option<(String, Settings)>,
    /// Set by an operator, overriding the configuration.
    pub(super) enabled: Option<bool>,
    /// Whether events wait for it while it has no active version although the configuration does
    /// not name it: it was active, or its file was there when the node started.
    pub(super) is_awaited: bool,
    /// Whether an admin command removed it, on this node or another one with this folder.
    pub(super) is_removed: bool,
    /// Whether its file is gone, but not for long enough to deactivate it.
    pub(super) is_vanishing: bool,
    /// Why its file is not that of a plugin, by its name.
    pub(super) inadmissible: Option<Inadmissible>,
    /// The compilation of its file, if that takes long.
    pub(super) compilation: Option<Compilation>,
    /// When a file is tried again that failed for want of something in the host.
    pub(super) next_attempt: Option<Instant>,
    pub(super) n_generations: u64,
    /// Newest first.
    pub(super) ended: VecDeque<Ended>,
}

/// Why a file is not active.
#[derive(Debug)]
pub(super) struct Failure {
    /// A sentence that begins with the file name.
    pub(super) reason: String,
    /// SHA-256 of the file, if it could be read.
    pub(super) hash: Option<String>,
    /// Whether the host lacked something, so that the file is tried again.
    pub(super) is_transient: bool,
}

impl Failure {
    /// A failure that lasts until the file or its settings change.
    pub(super) fn of_file(reason: String, hash: Option<String>) -> Self {
        Self {
            reason,
            hash,
            is_transient: false,
        }
    }
}

/// The outcome of a job.
pub(super) enum LoadOutcome {
    Removed,
    Disabled,
    /// The file is already active; holds its hash.
    Unchanged(String),
    Loaded(Box<Plugin>, Settings),
    Failed(Failure),
    /// The file is not that of a plugin, by its name.
    Ignored(Inadmissible),
    /// It is loaded once this has ended.
    Compiling(Compilation),
}

impl Slots {
    pub(super) fn n_running(&self) -> usize {
        self.by_name
            .values()
            .filter(|slot| slot.running.is_some())
            .count()
    }

    pub(super) fn is_enabled(&self, name: &str) -> bool {
        self.by_name
            .get(name)
            .and_then(|slot| slot.enabled)
            .unwrap_or_else(|| self.config.settings(name).enabled)
    }

    /// Whether events wait for this plugin on this node: it has no active version, and nothing says
    /// that events may pass without it.
    pub(super) fn is_missing(&self, name: &str) -> bool {
        let slot = self.by_name.get(name);
        let is_expected = match slot {
            Some(slot) if slot.running.is_some() => false,
            Some(slot) if slot.is_removed && slot.files.is_empty() => false,
            Some(slot) if slot.inadmissible.is_some() => {
                slot.is_awaited && !self.is_stray(name, slot)
            }
            slot => slot.is_some_and(|slot| slot.is_awaited) || self.config.names(name),
        };
        is_expected
            && self.is_enabled(name)
            && self.config.settings(name).on_missing == OnMissing::Wait
    }

    /// The plugins that events wait for on this node.
    pub(super) fn missing(&self) -> Vec<String> {
        let named = self.config.plugins.keys().chain(&self.config.order);
        let names: BTreeSet<&String> = named.chain(self.by_name.keys()).collect();
        let missing = names.into_iter().filter(|name| self.is_missing(name));
        missing.cloned().collect()
    }

    /// Whether the file of a refused name is a copy or a version of a plugin that is known without
    /// it, or one that the configuration excludes: nothing is missed without it.
    pub(super) fn is_stray(&self, name: &str, slot: &Slot) -> bool {
        match &slot.inadmissible {
            None => false,
            Some(Inadmissible::NotConfigured) => true,
            Some(Inadmissible::Invalid | Inadmissible::Version) => {
                let base = admission::base(name);
                base != name && self.is_known(base)
            }
        }
    }

    /// Whether the plugin has a file, or the configuration or an active version names it.
    pub(super) fn is_known(&self, name: &str) -> bool {
        let slot = self.by_name.get(name);
        self.config.names(name)
            || slot.is_some_and(|slot| {
                !slot.files.is_empty() || slot.running.is_some() || slot.is_removed
            })
            || self.is_missing(name)
    }

    /// Records an operator's choice and returns the plugin's files.
    ///
    /// # Errors
    /// There is no such plugin.
    pub(super) fn set_enabled(
        &mut self,
        name: &str,
        is_enabled: bool,
    ) -> Result<Vec<FileStamp>, AdminError> {
        let is_as_configured = self.config.settings(name).enabled == is_enabled;
        let is_missing = self.is_missing(name);
        let slot = self.by_name.entry(name.to_owned());
        let slot = match slot {
            Entry::Occupied(slot) => Some(slot.into_mut()),
            Entry::Vacant(slot) => is_missing.then(|| slot.insert(Slot::default())),
        };
        let slot =
            slot.filter(|slot| is_missing || !slot.files.is_empty() || slot.enabled == Some(false));
        let slot = slot.ok_or_else(|| AdminError::Unknown(name.to_owned()))?;
        slot.enabled = (!is_as_configured).then_some(is_enabled);
        Ok(slot.files.clone())
    }

    /// The hash of the active file, if it is active with exactly these settings.
    pub(super) fn running_as(&self, name: &str, settings: &Settings) -> Option<String> {
        let running = self.by_name.get(name)?.running.as_ref()?;
        (running.settings == *settings).then(|| running.plugin.hash().to_owned())
    }
}

impl Slot {
    /// Applies what became of the plugin's files. Returns the outcome as labelled in the metric;
    /// `None`: nothing was loaded or refused.
    pub(super) fn apply(
        &mut self,
        name: &str,
        files: Vec<FileStamp>,
        outcome: LoadOutcome,
    ) -> Option<&'static str> {
        self.files = files;
        let file = self.files.first().map(FileStamp::file).unwrap_or_default();
        // The active version may have been rolled back while its file was examined; its failure
        // must then be kept.
        let is_rolled_back = matches!(&outcome, LoadOutcome::Unchanged(hash) if self.running.as_ref().is_none_or(|running| running.plugin.hash() != hash));
        if !is_rolled_back {
            self.failure = None;
        }
        self.inadmissible = None;
        if !self.files.is_empty() {
            (self.is_removed, self.is_vanishing) = (false, false);
        }
        if !matches!(outcome, LoadOutcome::Compiling(_)) {
            self.compilation = None;
        }
        let is_repeated = self.next_attempt.take().is_some();
        let label = match outcome {
            LoadOutcome::Removed => {
                let why = if self.is_removed {
                    "an admin command removed it"
                } else {
                    "its file is gone"
                };
                self.deactivate(name, PluginStatus::Removed, why);
                self.is_vanishing = false;
                // A file that never worked is not missed.
                let is_disabled = self.enabled == Some(false);
                self.is_awaited &= !self.is_removed && !is_disabled && self.n_generations > 0;
                // Forgotten with the file: adding the plugin again expresses the wish to run it.
                (self.enabled, self.rolled_back) = (None, None);
                None
            }
            LoadOutcome::Disabled => {
                if self.running.is_none() {
                    tracing::info!(plugin.name = name, "plugin is disabled");
                }
                // Events pass as long as it is disabled, not longer: enabled again, it is awaited.
                self.deactivate(name, PluginStatus::Disabled, "it is disabled");
                None
            }
            LoadOutcome::Ignored(why) => {
                let reason = why.of_file(&file, name);
                tracing::error!(
                    plugin.name = name,
                    plugin.file = file,
                    "plugin not loaded: {reason}"
                );
                self.deactivate(
                    name,
                    PluginStatus::Disabled,
                    "the configuration excludes it",
                );
                self.failure = Some(Failure::of_file(reason, None));
                self.inadmissible = Some(why);
                Some("failed")
            }
            LoadOutcome::Unchanged(_) => {
                tracing::info!(
                    plugin.name = name,
                    plugin.file = file,
                    "plugin unchanged: its file is already active"
                );
                None
            }
            LoadOutcome::Loaded(plugin, settings) => {
                self.take_over(name, &file, *plugin, settings);
                Some("loaded")
            }
            LoadOutcome::Failed(failure) => {
                let is_transient = failure.is_transient;
                if is_transient {
                    self.next_attempt = Some(Instant::now() + TRY_AGAIN_AFTER);
                }
                // Reported once, however often it is tried.
                if is_transient && is_repeated {
                    self.failure = Some(Failure {
                        reason: format!("{file} {}", failure.reason),
                        ..failure
                    });
                    None
                } else {
                    self.keep_active(name, &file, failure);
                    Some("failed")
                }
            }
            LoadOutcome::Compiling(compilation) => {
                self.await_compilation(name, &file, compilation);
                None
            }
        };
        self.report_second_file(name);
        label
    }

    /// Records that a file is still being compiled. The active generation, if there is one, stays
    /// active.
    fn await_compilation(&mut self, name: &str, file: &str, compilation: Compilation) {
        if self.compilation.is_none() {
            tracing::info!(
                plugin.name = name,
                plugin.file = file,
                "plugin is still being compiled; it is loaded as soon as it is ready"
            );
        }
        self.failure = Some(Failure::of_compiling(file));
        self.compilation = Some(compilation);
    }

    /// Ends the active generation, if there is one. There is nothing to roll back to afterwards.
    fn deactivate(&mut self, name: &str, status: PluginStatus, why: &str) {
        if let Some(gone) = self.running.take() {
            tracing::warn!(
                plugin.name = name,
                plugin.generation = gone.number,
                plugin.hash = gone.plugin.hash(),
                "plugin deactivated: {why}"
            );
            self.end(&gone, status, why);
        }
        self.previous = None;
        self.since_ms = now_ms();
    }

    /// Records that a file is invalid. The active generation, if there is one, stays active.
    fn keep_active(&mut self, name: &str, file: &str, failure: Failure) {
        let Failure {
            reason,
            hash,
            is_transient,
        } = failure;
        // A new file that is copied in pieces is no plugin yet; once whole, it is loaded.
        let is_incomplete = reason.starts_with(TRUNCATED) || reason == EMPTY;
        let reason = format!("{file} {reason}");
        match &self.running {
            None if is_incomplete => tracing::warn!(
                plugin.name = name,
                plugin.file = file,
                plugin.failed_hash = hash,
                "plugin not loaded yet: {reason}; it is loaded when it is complete"
            ),
            Some(running) => tracing::error!(
                plugin.name = name,
                plugin.file = file,
                plugin.hash = running.plugin.hash(),
                plugin.failed_hash = hash,
                "plugin not replaced: {reason}; generation {} stays active",
                running.number
            ),
            None => {
                tracing::error!(
                    plugin.name = name,
                    plugin.file = file,
                    plugin.failed_hash = hash,
                    "plugin not loaded: {reason}"
                );
            }
        }
        self.refusal = Some(Refusal {
            at_ms: now_ms(),
            hash: hash.clone(),
            reason: reason.clone(),
        });
        self.failure = Some(Failure {
            reason,
            hash,
            is_transient,
        });
    }

    /// Whether its file is to be loaded although it has not changed.
    pub(super) fn is_due(&self) -> bool {
        self.compilation
            .as_ref()
            .is_some_and(Compilation::has_ended)
            || self.next_attempt.is_some_and(|at| at <= Instant::now())
    }

    /// Records that a second file has the name of this plugin, unless there is another failure.
    fn report_second_file(&mut self, name: &str) {
        let (Some(second), None) = (self.files.get(1), &self.failure) else {
            return;
        };
        let file = second.file();
        let reason =
            format!("{file} is a second file for the plugin '{name}'; rename or remove one");
        tracing::error!(
            plugin.name = name,
            plugin.file = file,
            "plugin not loaded: {reason}"
        );
        self.failure = Some(Failure::of_file(reason, None));
    }

    /// Starts a new generation.
    fn take_over(&mut self, name: &str, file: &str, plugin: Plugin, settings: Settings) {
        self.n_generations += 1;
        let former = self.running.take();
        tracing::info!(
            plugin.name = name,
            plugin.file = file,
            plugin.generation = self.n_generations,
            plugin.hash = plugin.hash(),
            plugin.former_hash = former.as_ref().map(|former| former.plugin.hash()),
            plugin.version = plugin.manifest().version,
            plugin.cached = plugin.is_cached(),
            "plugin loaded"
        );
        if plugin.manifest().name != name {
            tracing::info!(
                plugin.name = name,
                "the manifest names this plugin '{}'",
                plugin.manifest().name
            );
        }
        let now = Instant::now();
        if let Some(former) = former {
            self.end(&former, PluginStatus::Replaced, "");
            // A generation that is itself on probation is not a safe fallback while there is a
            // better one, and one with an open breaker never is.
            let is_breaker_closed = former.report(now).breaker == BreakerState::Closed;
            if is_breaker_closed && (former.is_proven(now) || self.previous.is_none()) {
                self.previous = Some(former);
            }
        }
        (self.rolled_back, self.refusal) = (None, None);
        let generation = Generation::new(
            plugin,
            self.n_generations,
            settings,
            self.previous.is_some(),
            now,
        );
        self.running = Some(Arc::new(generation));
        self.since_ms = now_ms();
        self.is_awaited = true;
    }

    /// Remembers a former generation.
    pub(super) fn end(&mut self, generation: &Generation, how: PluginStatus, why: &str) {
        self.ended.push_front(Ended {
            generation: generation.number,
            version: generation.plugin.manifest().version.clone(),
            hash: generation.plugin.hash().to_owned(),
            config_hash: generation.member().config_hash,
            state: how,
            since_ms: self.since_ms,
            until_ms: now_ms(),
            reason: why.to_owned(),
        });
        self.ended.truncate(MAX_ENDED);
    }

    pub(super) fn state(&self, name: &str, slots: &Slots, now: Instant) -> PluginState {
        let report = self.running.as_ref().map(|running| running.report(now));
        let settings = self.running.as_ref().map_or_else(
            || slots.config.settings(name),
            |running| running.settings.clone(),
        );
        let status = match &report {
            Some(report) if report.breaker != BreakerState::Closed => PluginStatus::BreakerOpen,
            Some(report) if report.probation.is_some() => PluginStatus::OnProbation,
            Some(_) => PluginStatus::Active,
            None if slots.is_stray(name, self) => PluginStatus::Ignored,
            None if !slots.is_enabled(name) => PluginStatus::Disabled,
            None if self.compilation.is_some() => PluginStatus::Compiling,
            None => PluginStatus::Failed,
        };
        let state = PluginState {
            name: name.to_owned(),
            file: self.files.first().map(FileStamp::file).unwrap_or_default(),
            state: status,
            events_wait: slots.is_missing(name),
            override_enabled: self.enabled,
            since_ms: self.since_ms,
            settings: settings.shown(),
            previous: self.previous.as_ref().map(|previous| previous.number),
            failure: self.shown_failure(name, settings.on_missing),
            failed_hash: self
                .failure
                .as_ref()
                .and_then(|failure| failure.hash.clone()),
            refusal: self.refusal.clone(),
            health: report,
            ended: self.ended.iter().cloned().collect(),
            ..PluginState::default()
        };
        match &self.running {
            Some(running) => state.with_active(running),
            None => state,
        }
    }

    /// Why the present file is not the active version, with the fix.
    fn shown_failure(&self, name: &str, on_missing: OnMissing) -> Option<String> {
        let failure = self.failure.as_ref().map(|failure| failure.reason.clone());
        failure.or_else(|| {
            let file = self.files.first().map(FileStamp::file).unwrap_or_default();
            self.is_vanishing.then(|| {
                let then = match on_missing {
                    OnMissing::Wait => "events wait",
                    OnMissing::Skip => "events pass without it",
                };
                format!(
                    "{file} is gone, so after {} s {then}; put it back, or run `pointsman plugin remove {name}`",
                    GRACE.as_secs()
                )
            })
        })
    }
}
