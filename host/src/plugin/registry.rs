//! The registry of plugins: their order and generations. It loads the files of a folder, reloads
//! them when they or their settings change, and applies uploads, admin commands and the
//! consequences of failures (disabling, rollback).
//!
//! Guarantees: an invalid file replaces nothing, does not prevent other plugins from loading, and
//! is listed with the reason ([`Registry::states`]). Changes that are found together become active
//! together. A plugin whose bytes and settings are already active is left alone. A rollback never
//! waits for a compilation. While an expected plugin has no active version, the chain is incomplete
//! ([`Snapshot::missing`]).
//!
//! `watcher` decides when to load files and `loading` loads them; `folder` determines which file
//! belongs to which plugin; `health` decides when a plugin is no longer trusted; `commands` carries
//! out admin commands.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use tokio::sync::{Notify, watch};

mod admission;
mod ahead;
mod candidate;
mod commands;
pub(super) mod folder;
pub mod generation;
pub mod health;
mod job;
mod loading;
pub mod rollout;
mod section;
pub mod settings;
mod slot;
mod staged;
pub mod state;
pub mod watcher;

use self::ahead::Wait;
pub use self::candidate::{CandidateChain, CandidateParts, Change, Promotion};
use self::folder::{FileStamp, FolderSnapshot};
use self::rollout::Following;
use self::slot::{Failure, Slot, Slots};
use super::Engine;
use super::registry::generation::{Chain, Generation};
use super::registry::health::{BreakerState, Transition};
use super::registry::settings::Config;
use super::registry::state::{PluginState, PluginStatus, Refusal};
use super::runtime::plugin::short_hash;
use super::shadow::Shadows;
use crate::clock::now_ms;
use crate::event::PartitionNumber;
use crate::telemetry::metrics::{Metrics, PluginInfoLabel, PluginLabel};

/// The published state at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    pub chain: Arc<Chain>,
    /// The chains of partitions in which a rolled-out version decides.
    pub by_partition: BTreeMap<PartitionNumber, Arc<Chain>>,
    /// The plugins whose rolled-out version is being loaded, by the partitions whose events wait for
    /// it.
    pub awaited: BTreeMap<PartitionNumber, Vec<String>>,
    /// How often a rolled-out version was withdrawn from a partition.
    pub n_withdrawals: u64,
    /// Every plugin: the active ones first, in order, then inactive ones with something to report.
    pub plugins: Vec<PluginState>,
    /// The plugins that have no active version and without which no event must be decided.
    pub missing: Vec<String>,
    /// Why the folder cannot be read. Active plugins stay active.
    pub folder_failure: Option<String>,
}

/// The plugins of a node.
#[derive(Debug)]
pub struct Registry {
    engine: Engine,
    /// The plugin folder; fixed as long as the node runs.
    dir: Option<PathBuf>,
    metrics: Metrics,
    /// Held while files are loaded or plugins are removed, one operation at a time, for up to
    /// seconds. Lock order: taken before `slots`, never after.
    loading: Mutex<()>,
    /// Held only briefly.
    slots: Mutex<Slots>,
    /// Replaced as a whole; never borrowed across a blocking call.
    current: watch::Sender<Snapshot>,
    shadows: Shadows,
    /// The configuration file, for advice.
    config_file: OnceLock<PathBuf>,
    following: watch::Sender<Following>,
    rollouts_changed: Notify,
    /// Held while the roll-outs are read and followed, so that an older answer of the broker is not
    /// followed after a newer one.
    pub(crate) rollouts_turn: tokio::sync::Mutex<()>,
}

/// Why an admin command failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdminError {
    #[error("there is no plugin '{0}'")]
    Unknown(String),
    /// The text includes the fix.
    #[error("{0}")]
    New(String),
    #[error("the plugin '{0}' has no candidate")]
    NoCandidate(String),
    /// The text includes the fix.
    #[error("{0}")]
    Impossible(String),
    /// The file is invalid. The text continues a sentence that begins with "it".
    #[error("it {0}")]
    InvalidFile(String),
    /// The text names the problem and the fix.
    #[error("{0}")]
    InvalidConfig(String),
    /// The folder cannot be written for another reason than a missing permission.
    #[error("{0}")]
    Folder(String),
}

impl Registry {
    /// Loads every `.wasm` file of the configured folder. Without a folder, no plugins are loaded.
    ///
    /// Compiles, so it may take minutes; not for an async thread.
    ///
    /// # Errors
    /// The folder cannot be read. An invalid file, or a configured plugin without a file, is not an
    /// error: see [`Registry::states`].
    pub fn load(engine: Engine, config: Config, metrics: Metrics) -> anyhow::Result<Self> {
        Self::load_within(engine, config, metrics, Wait::All)
    }

    /// As [`Registry::load`], but files that take long to compile are left to a [`watcher`], which
    /// must be started.
    ///
    /// # Errors
    /// As [`Registry::load`].
    pub fn start(engine: Engine, config: Config, metrics: Metrics) -> anyhow::Result<Self> {
        Self::load_within(engine, config, metrics, Wait::Briefly)
    }

    fn load_within(
        engine: Engine,
        config: Config,
        metrics: Metrics,
        wait: Wait,
    ) -> anyhow::Result<Self> {
        engine.set_compile_budget(config.compile_budget());
        let dir = config.dir.clone();
        let snapshot = match &dir {
            Some(dir) => folder::snapshot(dir).map_err(anyhow::Error::msg)?,
            None => FolderSnapshot::new(),
        };
        let mut slots = Slots {
            config,
            by_name: BTreeMap::new(),
            rollouts: BTreeMap::new(),
            has_read_rollouts: false,
            n_withdrawals: 0,
        };
        let removed = dir.as_deref().map(folder::removals).unwrap_or_default();
        for name in removed.into_keys() {
            slots.by_name.entry(name).or_default().is_removed = true;
        }
        // It was probably active before this start: events wait until it is again.
        for name in snapshot.keys() {
            slots.by_name.entry(name.clone()).or_default().is_awaited = true;
        }
        let before_loading = Snapshot {
            missing: slots.missing(),
            ..Snapshot::default()
        };
        let slots = Mutex::new(slots);
        let registry = Self {
            engine,
            dir,
            metrics,
            loading: Mutex::default(),
            slots,
            current: watch::Sender::new(before_loading),
            shadows: Shadows::default(),
            config_file: OnceLock::new(),
            following: watch::Sender::new(Following::No),
            rollouts_changed: Notify::new(),
            rollouts_turn: tokio::sync::Mutex::default(),
        };
        registry.load_snapshot(snapshot, wait);
        Ok(registry)
    }

    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The plugin folder, if one is configured.
    pub fn dir(&self) -> Option<&Path> {
        self.dir.as_deref()
    }

    /// Names the configuration file in the advice about a change of it that was rolled back.
    pub fn set_config_file(&self, file: &Path) {
        // Only the first call counts: a node has one file.
        self.config_file.set(file.to_owned()).ok();
    }

    /// The active plugins.
    pub fn chain(&self) -> Arc<Chain> {
        Arc::clone(&self.current.borrow().chain)
    }

    /// The active plugins, unless one without which no event must be decided is missing.
    ///
    /// # Errors
    /// The names of the missing plugins.
    pub(crate) fn complete_chain(&self) -> Result<Arc<Chain>, Vec<String>> {
        // Read at once: the chain of one moment must not be judged by another moment's plugins.
        let current = self.current.borrow();
        if current.missing.is_empty() {
            Ok(Arc::clone(&current.chain))
        } else {
            Err(current.missing.clone())
        }
    }

    /// Every plugin: the active ones first, in order, then inactive ones with something to report.
    pub fn states(&self) -> Vec<PluginState> {
        let slots = self.slots();
        self.states_of(&slots, &self.chain())
    }

    /// The published state, as it changes.
    pub fn changes(&self) -> watch::Receiver<Snapshot> {
        self.current.subscribe()
    }

    /// The files as they were last loaded.
    fn loaded(&self) -> FolderSnapshot {
        let slots = self.slots();
        let files = slots
            .by_name
            .iter()
            .filter(|(_, slot)| !slot.files.is_empty() && !slot.is_due());
        files
            .map(|(name, slot)| (name.clone(), slot.files.clone()))
            .collect()
    }

    /// Applies a change in a generation's health. Neither compiles nor waits for a
    /// compilation.
    pub(crate) fn follow(&self, generation: &Generation, transition: Transition) {
        let name = generation.plugin.name().as_str();
        match transition {
            Transition::None => {}
            Transition::RollBack(reason) => {
                self.fail_rollout(name, generation.number, &reason);
                self.roll_back_in(&mut self.slots(), name, generation.number, &reason);
            }
            Transition::Breaker => {
                let report = generation.report(Instant::now());
                match report.breaker {
                    BreakerState::Closed => {
                        tracing::info!(
                            plugin.name = name,
                            plugin.generation = generation.number,
                            "plugin breaker closed"
                        );
                    }
                    BreakerState::Open | BreakerState::HalfOpen => tracing::error!(
                        plugin.name = name,
                        plugin.generation = generation.number,
                        "plugin breaker opened: the plugin failed on {} events in a row; until the next attempt succeeds, on_failure settles its events",
                        report.consecutive_failures
                    ),
                }
                self.publish(&self.slots());
            }
        }
    }

    /// The plugins whose versions stay active for a while when their files vanish.
    fn active_names(&self) -> BTreeSet<String> {
        let slots = self.slots();
        let active = slots.by_name.iter();
        let active = active.filter(|(_, slot)| slot.running.is_some());
        active.map(|(name, _)| name.clone()).collect()
    }

    /// Records which plugins were removed on purpose, and which have lost their file only recently.
    fn note_absent(&self, removed: &BTreeSet<String>, vanishing: &BTreeSet<String>) {
        let mut slots = self.slots();
        let known = slots.by_name.keys().chain(removed);
        let mut is_new = false;
        for name in known.cloned().collect::<BTreeSet<_>>() {
            let (is_removed, is_vanishing) = (removed.contains(&name), vanishing.contains(&name));
            let slot = slots.by_name.entry(name.clone()).or_default();
            if is_vanishing && !slot.is_vanishing {
                tracing::warn!(
                    plugin.name = name,
                    "the file of an active plugin is gone; it stays active for {} s",
                    slot::GRACE.as_secs()
                );
            }
            is_new |= (slot.is_removed, slot.is_vanishing) != (is_removed, is_vanishing);
            (slot.is_removed, slot.is_vanishing) = (is_removed, is_vanishing);
        }
        if is_new {
            self.publish(&slots);
        }
    }

    /// Records why the folder cannot be read, or that it can be.
    fn set_folder_failure(&self, reason: Option<String>) {
        self.current.send_if_modified(|current| {
            let is_new = current.folder_failure != reason;
            current.folder_failure = reason;
            is_new
        });
    }

    fn begin_loading(&self) -> MutexGuard<'_, ()> {
        // The lock guards no data, so a panic under it leaves nothing inconsistent: all state is
        // behind the other lock.
        self.loading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        // Poisoning is ignored: each change is one assignment and the chain is published as a
        // whole, and a node that can no longer be operated would be worse.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state of one plugin.
    fn state(&self, name: &str) -> Result<PluginState, AdminError> {
        self.states()
            .into_iter()
            .find(|state| state.name == name)
            .ok_or_else(|| AdminError::Unknown(name.to_owned()))
    }

    /// Rolls back, if this generation is still active and there is one to roll back to.
    fn roll_back_in(&self, slots: &mut Slots, name: &str, number: u64, reason: &str) {
        let Some(slot) = slots.by_name.get_mut(name) else {
            return;
        };
        if slot
            .running
            .as_ref()
            .is_none_or(|running| running.number != number)
        {
            return;
        }
        let (Some(previous), Some(running)) = (slot.previous.take(), slot.running.take()) else {
            return;
        };
        let file = slot.files.first().map(FileStamp::file).unwrap_or_default();
        let hash = running.plugin.hash();
        tracing::error!(
            plugin.name = name,
            plugin.generation = number,
            plugin.hash = hash,
            plugin.former_generation = previous.number,
            plugin.former_hash = previous.plugin.hash(),
            "plugin rolled back: generation {number} {reason}"
        );
        slot.rolled_back = Some((hash.to_owned(), running.settings.clone()));
        slot.refusal = Some(Refusal {
            at_ms: now_ms(),
            hash: Some(hash.to_owned()),
            reason: reason.to_owned(),
        });
        // Names what has to change: the same file with another configuration works.
        let advice = if hash == previous.plugin.hash() {
            let section = self.config_file.get().map_or_else(
                || format!("[plugins.{name}]"),
                |path| format!("[plugins.{name}] in {}", path.display()),
            );
            format!(
                "{name} was rolled back to its previous settings: it {reason}; {section} still contains the new ones, so change that section before the node restarts"
            )
        } else {
            format!(
                "{file} was rolled back: it {reason}; the folder still contains it, so replace it before the node restarts"
            )
        };
        slot.failure = Some(Failure {
            reason: advice,
            hash: Some(hash.to_owned()),
            is_transient: false,
        });
        slot.end(&running, PluginStatus::RolledBack, reason);
        // Nothing is left to roll back to.
        previous.end_probation();
        (slot.running, slot.since_ms) = (Some(previous), now_ms());
        self.publish(slots);
        self.metrics
            .plugin_rollbacks
            .get_or_create(&PluginLabel {
                plugin: name.to_owned(),
            })
            .inc();
    }

    /// Publishes the contents of the slots.
    fn publish(&self, slots: &Slots) {
        let place = |name: &str| {
            slots
                .config
                .order
                .iter()
                .position(|ordered| ordered == name)
                .unwrap_or(usize::MAX)
        };
        let mut running: Vec<_> = slots
            .by_name
            .iter()
            .filter_map(|(name, slot)| Some((name, slot, slot.running.as_ref()?)))
            .collect();
        running.sort_by(|(name, slot, _), (other, other_slot, _)| {
            let in_folder = || match (slot.files.first(), other_slot.files.first()) {
                (Some(file), Some(other)) => file.natural_order(other),
                (file, other) => file.is_some().cmp(&other.is_some()),
            };
            place(name).cmp(&place(other)).then_with(in_folder)
        });
        let chain = Arc::new(Chain::new(
            running.iter().map(|(.., generation)| *generation),
        ));
        let plugins = self.states_of(slots, &chain);
        for (name, slot) in &slots.by_name {
            let is_open = slot.running.as_ref().is_some_and(|running| {
                running.report(Instant::now()).breaker != BreakerState::Closed
            });
            self.metrics
                .plugin_breaker_open
                .get_or_create(&PluginLabel {
                    plugin: name.clone(),
                })
                .set(is_open.into());
        }
        self.publish_info(&chain);
        // The old snapshot may hold the last reference to a generation. It is only dropped after
        // the lock of the channel has been released.
        let folder_failure = self.current.borrow().folder_failure.clone();
        let missing = slots.missing();
        let by_partition = rollout::chains_by_partition(&slots.rollouts, &chain);
        let awaited = rollout::awaited_by_partition(slots);
        drop(self.current.send_replace(Snapshot {
            chain,
            by_partition,
            awaited,
            n_withdrawals: slots.n_withdrawals,
            plugins,
            missing,
            folder_failure,
        }));
    }

    /// Sets the info metric of each active plugin, and removes those of versions that are not active
    /// any more.
    fn publish_info(&self, chain: &Chain) {
        let info = |generation: &Arc<Generation>| {
            let plugin = &generation.plugin;
            PluginInfoLabel {
                plugin: plugin.name().to_string(),
                // The author of the plugin chose it.
                version: plugin.manifest().version.chars().take(64).collect(),
                hash: short_hash(plugin.hash()),
                config_hash: short_hash(plugin.config_hash()),
            }
        };
        let now: Vec<PluginInfoLabel> = chain.generations().map(info).collect();
        for label in &now {
            self.metrics.plugin_info.get_or_create(label).set(1);
        }
        let before = self.chain();
        for label in before
            .generations()
            .map(info)
            .filter(|label| !now.contains(label))
        {
            self.metrics.plugin_info.remove(&label);
        }
    }

    fn states_of(&self, slots: &Slots, chain: &Chain) -> Vec<PluginState> {
        let now = Instant::now();
        let active = chain
            .generations()
            .map(|generation| generation.plugin.name().as_str());
        let active: Vec<&str> = active.collect();
        let idle = slots.by_name.iter().filter(|(name, slot)| {
            !active.contains(&name.as_str())
                && (slot.failure.is_some() || !slots.is_enabled(name))
                && (!slot.files.is_empty() || slot.enabled == Some(false))
        });
        let names = active
            .iter()
            .copied()
            .chain(idle.map(|(name, _)| name.as_str()));
        let state = |name: &str| {
            let shadow = self.find_shadow(name).ok().map(|shadow| shadow.summary());
            Some(PluginState {
                shadow,
                ..slots.by_name.get(name)?.state(name, slots, now)
            })
        };
        let mut states: Vec<PluginState> = names.filter_map(state).collect();
        states.extend(self.without_file(slots));
        states
    }

    /// Plugins that have no file: configured ones, and those that were active when it vanished.
    fn without_file(&self, slots: &Slots) -> Vec<PluginState> {
        let known: Vec<&str> = slots
            .by_name
            .iter()
            .filter(|(_, slot)| !slot.files.is_empty())
            .map(|(name, _)| name.as_str())
            .collect();
        let named = slots.config.plugins.keys().chain(&slots.config.order);
        let vanished = slots.by_name.iter();
        let vanished = vanished
            .filter(|(_, slot)| slot.is_awaited && slot.running.is_none() && !slot.is_removed);
        let missing: BTreeSet<&String> = named
            .chain(vanished.map(|(name, _)| name))
            .filter(|name| !known.contains(&name.as_str()) && slots.is_enabled(name))
            .collect();
        let missing = missing.into_iter().map(|name| {
            let slot = slots.by_name.get(name);
            let remove = format!("run `pointsman plugin remove {name}`");
            let reason = match self.dir() {
                _ if slot.is_some_and(|slot| slot.is_removed) => format!(
                    "an admin command removed the plugin '{name}', which the configuration still names; upload it, or remove it from the configuration"
                ),
                Some(dir) if !slots.config.names(name) => format!(
                    "the plugin '{name}' was active, but its file in {} is gone; put it back, or {remove}",
                    dir.display()
                ),
                Some(dir) => format!(
                    "the plugin '{name}' is configured, but no file in {} has this name (found: {}); add {name}.wasm, remove it from the configuration, or {remove}",
                    dir.display(),
                    known.join(", ")
                ),
                None => format!("the plugin '{name}' is configured, but there is no plugin folder; start the node with --plugins DIR, or set plugins.dir"),
            };
            if !self.current.borrow().plugins.iter().any(|before| before.name == *name && before.failure.as_ref() == Some(&reason)) {
                tracing::error!(plugin.name = name, "plugin not loaded: {reason}");
            }
            PluginState {
                failure: Some(reason),
                state: PluginStatus::Missing,
                ..slot.map_or_else(
                    || Slot::default().state(name, slots, Instant::now()),
                    |slot| slot.state(name, slots, Instant::now()),
                )
            }
        });
        missing.collect()
    }
}
