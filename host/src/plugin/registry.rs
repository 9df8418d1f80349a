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
//! When files are loaded is decided in `watcher`, which file belongs to which plugin in `folder`,
//! and when a plugin is no longer trusted in `health`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use tokio::sync::watch;

mod admission;
mod ahead;
mod candidate;
pub(super) mod folder;
pub mod generation;
pub mod health;
pub mod rollout;
mod section;
pub mod settings;
mod slot;
pub mod state;
pub mod watcher;

use self::admission::Inadmissible;
use self::ahead::{Ready, Wait};
pub use self::candidate::{CandidateChain, CandidateParts, Change, Promotion};
use self::folder::{FileStamp, FolderSnapshot};
use self::slot::{Failure, LoadOutcome, Slot, Slots};
use super::registry::generation::{Chain, Generation};
use super::registry::health::{BreakerState, Transition};
use super::registry::settings::{Config, Settings};
use super::registry::state::{PluginState, PluginStatus, Refusal};
use super::runtime::engine::MAX_PLUGINS;
use super::runtime::plugin::file_hash;
use super::shadow::Shadows;
use super::{Engine, Plugin};
use crate::clock::now_ms;
use crate::event::{Name, PartitionNumber};
use crate::telemetry::metrics::{Metrics, PluginInfoLabel, PluginLabel, PluginLoadLabel};

/// The published state at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    pub chain: Arc<Chain>,
    /// The chains of partitions in which a rolled-out version decides.
    pub by_partition: BTreeMap<PartitionNumber, Arc<Chain>>,
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
}

/// The action for one plugin whose files changed.
enum Job {
    /// Its files are gone.
    Remove,
    /// It is disabled.
    Rest,
    Load(Wanted),
    Refuse(Failure),
    Ignore(Inadmissible),
}

/// A file to load.
struct Wanted {
    path: PathBuf,
    settings: Settings,
    /// Hash of the active file, if its settings are unchanged.
    running: Option<String>,
    /// Hash of the file that was rolled back with the same settings.
    rolled_back: Option<String>,
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
        };
        for name in dir.as_deref().map(folder::removals).unwrap_or_default() {
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

    /// Loads these plugins from their files, removes those without files, and swaps the chain once
    /// for all of them.
    ///
    /// Compiles, so it may take seconds; not for an async thread.
    fn load_snapshot(&self, snapshot: FolderSnapshot, wait: Wait) {
        let Ready { files, slow, _code } = self.compile_ahead(snapshot, wait);
        let loading = self.begin_loading();
        // The lock may have been held by another load, or by an upload that wrote these files.
        // Entries that are outdated by now are dropped; the next scan finds them again.
        let now = self
            .dir
            .as_deref()
            .and_then(|dir| folder::snapshot(dir).ok())
            .unwrap_or_default();
        let is_still =
            |name: &str, files: &[FileStamp]| now.get(name).map_or(&[][..], Vec::as_slice) == files;
        let slow = slow.into_iter();
        let slow = slow.filter(|(name, files, _)| is_still(name, files));
        let slow = slow.collect();
        let still = files
            .into_iter()
            .filter(|(name, files)| is_still(name, files));
        self.load_snapshot_beside(&loading, still.collect(), slow);
    }

    /// Applies a changed `[plugins]` section. A plugin whose settings changed is reloaded and stays
    /// as it was if it rejects them. The order is that of the new section. The folder stays the
    /// same.
    ///
    /// Compiles, so it may take seconds; not for an async thread.
    pub fn configure(&self, config: Config) {
        self.engine.set_compile_budget(config.compile_budget());
        let _code = self.compile_for(&config);
        let loading = self.begin_loading();
        let changed = {
            let mut slots = self.slots();
            let before = std::mem::replace(&mut slots.config, config);
            let Slots {
                config, by_name, ..
            } = &mut *slots;
            let mut changed = FolderSnapshot::new();
            for (name, slot) in by_name
                .iter_mut()
                .filter(|(name, _)| config.settings(name) != before.settings(name))
            {
                if config.settings(name).enabled != before.settings(name).enabled {
                    slot.enabled = None;
                }
                changed.insert(name.clone(), slot.files.clone());
            }
            let admissions = by_name.iter().filter(|(name, slot)| {
                !slot.files.is_empty()
                    && admission::admit(name, config) != admission::admit(name, &before)
            });
            changed.extend(admissions.map(|(name, slot)| (name.clone(), slot.files.clone())));
            changed
        };
        self.load_snapshot_in(&loading, changed);
    }

    /// Checks that a file may be uploaded under this name. `is_new`: it adds a plugin instead of
    /// replacing one.
    ///
    /// # Errors
    /// There is no such plugin, or there is one although a new one is to be added; or this node
    /// loads no plugin of this name.
    pub fn check_upload(&self, name: &str, is_new: bool) -> Result<(), AdminError> {
        let slots = self.slots();
        let has_file = slots
            .by_name
            .get(name)
            .is_some_and(|slot| !slot.files.is_empty());
        if has_file && is_new {
            return Err(AdminError::Impossible(format!(
                "the plugin '{name}' already exists; omit create=true to replace it"
            )));
        }
        // An active plugin may be replaced whatever its name.
        if slots
            .by_name
            .get(name)
            .is_none_or(|slot| slot.running.is_none())
        {
            admission::admit(name, &slots.config)
                .map_err(|why| AdminError::Impossible(why.of_upload(name)))?;
        }
        if !has_file && !is_new && !slots.config.names(name) && !slots.is_missing(name) {
            let with_files = slots
                .by_name
                .iter()
                .filter(|(_, slot)| !slot.files.is_empty());
            let named = slots.config.plugins.keys().chain(&slots.config.order);
            let known: BTreeSet<&str> = named
                .chain(with_files.map(|(name, _)| name))
                .map(String::as_str)
                .collect();
            let near = admission::near(name, known.iter().copied());
            let candidates = match (near.as_slice(), known.is_empty()) {
                ([], true) => "it has none".to_owned(),
                ([], false) => {
                    let known: Vec<&str> = known.into_iter().collect();
                    format!("its plugins: {}", known.join(", "))
                }
                (near, _) => format!("did you mean '{}'?", near.join("' or '")),
            };
            return Err(AdminError::New(format!(
                "this node has no plugin '{name}' ({candidates}); add ?create=true to add a new plugin"
            )));
        }
        Ok(())
    }

    /// Checks a file, writes it into the folder under this name and makes it active. `is_new`: it
    /// adds a plugin instead of replacing one.
    ///
    /// Compiles, so it may take seconds; not for an async thread.
    ///
    /// # Errors
    /// As for [`Registry::check_upload`], or the file is invalid. On an error nothing has changed,
    /// except that the refusal is recorded.
    pub fn upload(
        &self,
        name: &str,
        bytes: &[u8],
        is_new: bool,
    ) -> Result<PluginState, AdminError> {
        // Before the lock: other plugins are loaded meanwhile.
        let _code = (self.dir.is_some() && self.check_upload(name, is_new).is_ok())
            .then(|| self.compile_upload(name, bytes));
        let loading = self.begin_loading();
        let Some(dir) = &self.dir else {
            return Err(AdminError::Impossible(
                "this node has no plugin folder; start it with --plugins DIR".to_owned(),
            ));
        };
        self.check_upload(name, is_new)?;
        let (settings, path) = {
            let slots = self.slots();
            let slot = slots.by_name.get(name);
            if slot.is_none_or(|slot| slot.running.is_none()) && slots.n_running() >= MAX_PLUGINS {
                return Err(AdminError::Impossible(format!(
                    "the limit of {MAX_PLUGINS} plugins per node is reached; remove one"
                )));
            }
            let path = slot.and_then(|slot| slot.files.first()).map_or_else(
                || dir.join(format!("{name}.wasm")),
                |file| file.path.clone(),
            );
            (slots.config.settings(name), path)
        };
        let loaded = self.load_bytes(name, bytes, &settings);
        let running = self.slots().running_as(name, &settings);
        let done = match loaded {
            Ok(plugin) if running.as_deref() == Some(plugin.hash()) => {
                LoadOutcome::Unchanged(plugin.hash().to_owned())
            }
            Ok(plugin) => LoadOutcome::Loaded(Box::new(plugin), settings),
            Err(failure) if failure.is_transient => return Err(failure.into()),
            Err(Failure { reason, hash, .. }) => {
                tracing::error!(
                    plugin.name = name,
                    plugin.failed_hash = hash,
                    "plugin upload refused: it {reason}"
                );
                self.refuse(name, &format!("the uploaded file {reason}"), hash);
                return Err(AdminError::InvalidFile(reason));
            }
        };
        // Written before it becomes active, so that a restart loads the version that decides now.
        let stamp = folder::write(&path, bytes)?;
        self.apply(&loading, vec![(name.to_owned(), vec![stamp], done)]);
        let state = self.state(name)?;
        // The active version may have been rolled back after it was found to equal the upload.
        if state.generation > 0 && state.hash != file_hash(bytes) {
            return Err(AdminError::Impossible(
                "it was rolled back during the upload; upload it again".to_owned(),
            ));
        }
        Ok(state)
    }

    /// Removes a plugin together with its file. From then on, no event waits for it, also on other
    /// nodes with this folder and after a restart, until it has a file again.
    ///
    /// # Errors
    /// There is no such plugin, or its file cannot be removed.
    pub fn remove(&self, name: &str) -> Result<(), AdminError> {
        let loading = self.begin_loading();
        let files = {
            let slots = self.slots();
            let files = slots.by_name.get(name).map(|slot| slot.files.clone());
            let files = files.unwrap_or_default();
            if files.is_empty() && !slots.is_missing(name) {
                return Err(AdminError::Unknown(name.to_owned()));
            }
            files
        };
        let record = || match &self.dir {
            Some(dir) if folder::is_name(name) => folder::note_removal(dir, name),
            _ => Ok(()),
        };
        record()?;
        // The file goes first: a scan in between would otherwise load the plugin again.
        for file in &files {
            if let Err(error) = folder::remove(&file.path) {
                if let Some(dir) = &self.dir {
                    folder::forget_removal(dir, name);
                }
                return Err(error);
            }
        }
        // Once more, because a node that loaded the file in between has withdrawn the record. An
        // error does no harm: events then wait on the other nodes.
        record().ok();
        self.slots()
            .by_name
            .entry(name.to_owned())
            .or_default()
            .is_removed = true;
        self.load_snapshot_in(
            &loading,
            FolderSnapshot::from([(name.to_owned(), Vec::new())]),
        );
        Ok(())
    }

    /// Deactivates a plugin, overriding the configuration, until it is enabled, the node ends or
    /// the configured `enabled` changes. Takes effect immediately, even while files are being
    /// loaded.
    ///
    /// # Errors
    /// There is no such plugin.
    pub fn disable(&self, name: &str) -> Result<PluginState, AdminError> {
        {
            let mut slots = self.slots();
            let files = slots.set_enabled(name, false)?;
            if let Some(slot) = slots.by_name.get_mut(name) {
                slot.apply(name, files, LoadOutcome::Disabled);
            }
            self.publish(&slots);
        }
        self.state(name)
    }

    /// Activates a plugin, overriding the configuration, until the node ends or the configured
    /// `enabled` changes.
    ///
    /// Compiles, so it may take seconds; not for an async thread.
    ///
    /// # Errors
    /// There is no such plugin, or its file is invalid.
    pub fn enable(&self, name: &str) -> Result<PluginState, AdminError> {
        let files = self.slots().set_enabled(name, true)?;
        let files = FolderSnapshot::from([(name.to_owned(), files)]);
        let _code = self.compile_ahead(files, Wait::All);
        let loading = self.begin_loading();
        let files = self.slots().set_enabled(name, true)?;
        self.load_snapshot_in(&loading, FolderSnapshot::from([(name.to_owned(), files)]));
        match self.state(name)? {
            PluginState {
                generation: 0,
                failure: Some(reason),
                ..
            } => Err(AdminError::Impossible(reason)),
            state => Ok(state),
        }
    }

    /// Reactivates the previous generation. The file stays in place and is not loaded again until
    /// it changes.
    ///
    /// # Errors
    /// There is no such plugin, or no generation to roll back to.
    pub fn roll_back(&self, name: &str) -> Result<PluginState, AdminError> {
        {
            let mut slots = self.slots();
            let slot = slots
                .by_name
                .get(name)
                .filter(|slot| !slot.files.is_empty())
                .ok_or_else(|| AdminError::Unknown(name.to_owned()))?;
            let Some(number) = slot
                .running
                .as_ref()
                .filter(|_| slot.previous.is_some())
                .map(|running| running.number)
            else {
                let fix = "upload the wanted version";
                return Err(AdminError::Impossible(format!(
                    "'{name}' has no earlier generation to roll back to; {fix}"
                )));
            };
            self.roll_back_in(&mut slots, name, number, "was withdrawn by an operator");
        }
        self.state(name)
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

    fn load_snapshot_in(&self, loading: &MutexGuard<'_, ()>, snapshot: FolderSnapshot) {
        self.load_snapshot_beside(loading, snapshot, Vec::new());
    }

    /// Loads these files and applies these outcomes of others together with theirs.
    fn load_snapshot_beside(
        &self,
        loading: &MutexGuard<'_, ()>,
        snapshot: FolderSnapshot,
        others: Vec<(String, Vec<FileStamp>, LoadOutcome)>,
    ) {
        let jobs = self.jobs(snapshot);
        let done = jobs.into_iter().map(|(name, files, job)| {
            let done = match job {
                Job::Remove => LoadOutcome::Removed,
                Job::Rest => LoadOutcome::Disabled,
                Job::Refuse(failure) => LoadOutcome::Failed(failure),
                Job::Ignore(why) => LoadOutcome::Ignored(why),
                Job::Load(wanted) => match self.load_file(&name, &wanted) {
                    Ok(done) => done,
                    Err(failure) => LoadOutcome::Failed(failure),
                },
            };
            (name, files, done)
        });
        let done = done.chain(others).collect();
        self.apply(loading, done);
    }

    /// Determines the action for each of these files.
    fn jobs(&self, snapshot: FolderSnapshot) -> Vec<(String, Vec<FileStamp>, Job)> {
        let slots = self.slots();
        let mut n_running = slots.n_running();
        let job = |(name, files): (String, Vec<FileStamp>)| {
            let settings = slots.config.settings(&name);
            let slot = slots.by_name.get(&name);
            let is_running = slot.is_some_and(|slot| slot.running.is_some());
            // The rules for names do not deactivate a plugin, only the configuration does.
            let ignored = admission::admit(&name, &slots.config).err();
            let ignored = ignored.filter(|why| !is_running || *why == Inadmissible::NotConfigured);
            let job = match (files.first(), ignored) {
                (None, _) => Job::Remove,
                (Some(_), Some(why)) => Job::Ignore(why),
                (Some(_), None) if !slots.is_enabled(&name) => Job::Rest,
                (Some(_), None)
                    if slot.is_none_or(|slot| slot.running.is_none())
                        && n_running >= MAX_PLUGINS =>
                {
                    let reason = format!(
                        "exceeds the limit of {MAX_PLUGINS} plugins per node; remove one and write this file again"
                    );
                    Job::Refuse(Failure::of_file(reason, None))
                }
                (Some(first), None) => {
                    n_running += usize::from(slot.is_none_or(|slot| slot.running.is_none()));
                    // Refused only while the earlier generation is active: a rolled-back version is
                    // better than none.
                    let active = slot.filter(|slot| slot.running.is_some());
                    let rolled_back = active
                        .and_then(|slot| slot.rolled_back.as_ref())
                        .filter(|(_, then)| *then == settings);
                    Job::Load(Wanted {
                        path: first.path.clone(),
                        running: slots.running_as(&name, &settings),
                        rolled_back: rolled_back.map(|(hash, _)| hash.clone()),
                        settings,
                    })
                }
            };
            (name, files, job)
        };
        snapshot.into_iter().map(job).collect()
    }

    fn load_file(&self, name: &str, wanted: &Wanted) -> Result<LoadOutcome, Failure> {
        let bytes = folder::read(&wanted.path, wanted.settings.limits().file_bytes)
            .map_err(|reason| Failure::of_file(reason, None))?;
        let hash = file_hash(&bytes);
        if wanted.running.as_ref() == Some(&hash) {
            return Ok(LoadOutcome::Unchanged(hash));
        }
        if wanted.rolled_back.as_ref() == Some(&hash) {
            let reason = "was rolled back before and is not loaded again; replace it, or upload it to try it again".to_owned();
            return Err(Failure::of_file(reason, Some(hash)));
        }
        self.load_bytes(name, &bytes, &wanted.settings)
            .map(|plugin| LoadOutcome::Loaded(Box::new(plugin), wanted.settings.clone()))
    }

    fn load_bytes(&self, name: &str, bytes: &[u8], settings: &Settings) -> Result<Plugin, Failure> {
        let hash = file_hash(bytes);
        let failed = |reason| Failure::of_file(reason, Some(hash.clone()));
        let name = Name::parse(name)
            .map_err(|e| failed(format!("does not give a valid plugin name: it {e}")))?;
        if let Some(pinned) = &settings.sha256
            && !pinned.eq_ignore_ascii_case(&hash)
        {
            return Err(failed(format!(
                "has the SHA-256 {hash}, which is not the configured one"
            )));
        }
        let config = serde_json::to_string(&settings.config)
            .map_err(|e| failed(format!("has a configuration that is not valid JSON: {e}")))?;
        // On a separate thread: WASI's synchronous functions must not run on an executor's thread,
        // and the caller may be on one.
        let load = || Plugin::load(&self.engine, name, bytes, &config, settings.limits());
        let plugin = std::thread::scope(|scope| {
            Ok(std::thread::Builder::new()
                .spawn_scoped(scope, load)?
                .join())
        });
        let plugin = plugin.map_err(|e: std::io::Error| Failure {
            is_transient: true,
            ..failed(format!(
                "was not checked, because no thread can be started: {e}"
            ))
        })?;
        let plugin =
            plugin.map_err(|_| failed("made the host panic while it was loaded".to_owned()))?;
        plugin.map_err(|e| Failure {
            is_transient: e.is_transient(),
            ..failed(e.to_string())
        })
    }

    /// Applies the outcomes of all jobs and publishes them together.
    fn apply(&self, _: &MutexGuard<'_, ()>, done: Vec<(String, Vec<FileStamp>, LoadOutcome)>) {
        let mut outcomes = Vec::with_capacity(done.len());
        if let Some(dir) = &self.dir {
            for (name, ..) in done.iter().filter(|(_, files, _)| !files.is_empty()) {
                folder::forget_removal(dir, name);
            }
        }
        {
            let mut slots = self.slots();
            for (name, files, done) in done {
                let done = match done {
                    LoadOutcome::Removed => {
                        if let Ok(shadow) = self.find_shadow(&name) {
                            self.shadows.end(&shadow);
                        }
                        LoadOutcome::Removed
                    }
                    // Disabled before or while it was loaded: it must not become active, whatever
                    // the outcome.
                    _ if !slots.is_enabled(&name) => LoadOutcome::Disabled,
                    done => done,
                };
                if let LoadOutcome::Loaded(plugin, _) = &done
                    && let Some(time) = plugin.compile_time()
                {
                    let plugin = name.clone();
                    let total = self
                        .metrics
                        .plugin_compile
                        .get_or_create(&PluginLabel { plugin });
                    total.inc_by(time.as_secs_f64());
                }
                let outcome = slots
                    .by_name
                    .entry(name.clone())
                    .or_default()
                    .apply(&name, files, done);
                outcomes.extend(outcome.map(|outcome| PluginLoadLabel {
                    plugin: name,
                    outcome,
                }));
            }
            self.publish(&slots);
        }
        // Counted after publishing, so that a reader of the metric can rely on the new state.
        for label in outcomes {
            self.metrics.plugin_loads.get_or_create(&label).inc();
        }
    }

    fn refuse(&self, name: &str, reason: &str, hash: Option<String>) {
        let mut slots = self.slots();
        // Unknown names get no metric label, because they come from outside and are unbounded.
        let Some(slot) = slots
            .by_name
            .get_mut(name)
            .filter(|slot| !slot.files.is_empty())
        else {
            return;
        };
        slot.refusal = Some(Refusal {
            at_ms: now_ms(),
            hash,
            reason: reason.to_owned(),
        });
        self.metrics
            .plugin_loads
            .get_or_create(&PluginLoadLabel {
                plugin: name.to_owned(),
                outcome: "failed",
            })
            .inc();
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
        drop(self.current.send_replace(Snapshot {
            chain,
            by_partition,
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
            let short = |hash: &str| hash.get(..12).unwrap_or_default().to_owned();
            PluginInfoLabel {
                plugin: plugin.name().to_string(),
                // The author of the plugin chose it.
                version: plugin.manifest().version.chars().take(64).collect(),
                hash: short(plugin.hash()),
                config_hash: short(plugin.config_hash()),
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
