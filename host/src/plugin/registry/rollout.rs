//! Roll-outs: a version of a plugin that decides in some partitions, beside the node's own version,
//! which is that of its folder and its configuration.
//!
//! The version is loaded from two staged files in the plugin folder, `.NAME.next.wasm` and
//! `.NAME.next.toml`, of which the one that equals the own version may be missing. A node that does
//! not have the version decides by its own and reports it. The node's own files are never changed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard, TryLockError};
use std::time::{Instant, SystemTime};

use serde::{Deserialize, Serialize};

use super::candidate::{Candidate, CandidateParts};
use super::section::{MAX_BYTES, Section};
use super::{AdminError, Registry, folder};
use crate::event::PartitionNumber;
use crate::plugin::registry::generation::{Chain, Generation};
use crate::plugin::runtime::plugin::{file_hash, short_hash};
use crate::plugin::shadow::ShadowReport;

/// A version: the hashes of its file and of its configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VersionHashes {
    /// SHA-256 of the file, in hexadecimal.
    pub file: String,
    /// The first 12 hex digits of the SHA-256 of the configuration, as in decision records.
    pub config: String,
}

/// The version that should decide in some partitions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RolloutWish {
    /// The own version of the nodes that take part.
    pub from: VersionHashes,
    pub to: VersionHashes,
    pub partitions: BTreeSet<PartitionNumber>,
    /// When it was written, in milliseconds since the Unix epoch: identifies it in reports.
    pub at_ms: u64,
}

/// A node's part in a roll-out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RolloutStatus {
    /// It has the version, which decides in the chosen partitions.
    Ready,
    /// The version is the node's own and decides in all partitions.
    Own,
    /// It does not have the version; its own decides.
    Missing,
    /// Its own version is neither the old nor the new one and decides.
    OtherVersion,
    /// The version cannot be loaded, or failed on too many events; its own decides.
    Failed,
}

/// A node's part in a roll-out, as reported.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RolloutState {
    pub state: RolloutStatus,
    /// Which write of the roll-out the node has followed, as the time of that write.
    pub at_ms: u64,
    /// The node's own version.
    pub hash: String,
    pub config_hash: String,
    /// Why its own version decides; empty otherwise.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

/// A roll-out that this node takes part in.
#[derive(Clone, Debug)]
pub(super) struct ActiveRollout {
    wish: RolloutWish,
    state: RolloutState,
    /// The version, if this node has it and does not have it as its own.
    generation: Option<Arc<Generation>>,
    /// The staged files as they were last read.
    stamps: [Option<(SystemTime, u64)>; 2],
    /// Whether it failed on too many events.
    has_failed: bool,
}

impl Registry {
    /// The active plugins for events of a partition, unless one without which no event must be
    /// decided is missing.
    ///
    /// # Errors
    /// The names of the missing plugins.
    pub(crate) fn complete_chain_of(
        &self,
        partition: PartitionNumber,
    ) -> Result<Arc<Chain>, Vec<String>> {
        // Read at once: the chain of one moment must not be judged by another moment's plugins.
        let current = self.current.borrow();
        if !current.missing.is_empty() {
            return Err(current.missing.clone());
        }
        let special = current.by_partition.get(&partition);
        Ok(Arc::clone(special.unwrap_or(&current.chain)))
    }

    /// Whether this generation decides in any partition.
    pub(crate) fn is_deciding(&self, name: &crate::event::Name, number: u64) -> bool {
        let current = self.current.borrow();
        let mut chains = current.by_partition.values().chain([&current.chain]);
        chains.any(|chain| chain.has(name, number))
    }

    /// Takes part in these roll-outs, by plugin, and in no others. Returns this node's part in each.
    ///
    /// Compiles, so it may take seconds; not for an async thread. While other plugins are being
    /// loaded, it waits or changes nothing.
    pub fn apply_rollouts(
        &self,
        wishes: &BTreeMap<String, RolloutWish>,
        is_waiting: bool,
    ) -> BTreeMap<String, RolloutState> {
        let loading = match self.loading.try_lock() {
            Ok(loading) => loading,
            Err(_) if is_waiting => self.begin_loading(),
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return self.rollout_states(),
        };
        let before = self.slots().rollouts.clone();
        let mut after = BTreeMap::new();
        for (name, wish) in wishes {
            let rollout = self.rollout(&loading, name, wish, before.get(name));
            after.insert(name.clone(), rollout);
        }
        let deciding = |rollouts: &BTreeMap<String, ActiveRollout>| {
            let each = rollouts.iter().filter_map(|(name, rollout)| {
                let number = rollout.generation.as_ref()?.number;
                Some((name.clone(), number, rollout.wish.partitions.clone()))
            });
            each.collect::<Vec<_>>()
        };
        let is_new = deciding(&before) != deciding(&after);
        {
            let mut slots = self.slots();
            slots.rollouts = after;
            if is_new {
                self.publish(&slots);
            }
        }
        self.rollout_states()
    }

    fn rollout_states(&self) -> BTreeMap<String, RolloutState> {
        let slots = self.slots();
        let states = slots.rollouts.iter();
        states
            .map(|(name, rollout)| (name.clone(), rollout.state.clone()))
            .collect()
    }

    /// The plugins whose rolled-out version failed on too many events, with that version and the
    /// reason.
    pub fn failed_rollouts(&self) -> Vec<(String, VersionHashes, String)> {
        let slots = self.slots();
        let failed = slots
            .rollouts
            .iter()
            .filter(|(_, rollout)| rollout.has_failed);
        failed
            .map(|(name, rollout)| {
                let to = rollout.wish.to.clone();
                (name.clone(), to, rollout.state.reason.clone())
            })
            .collect()
    }

    /// The reports on all candidates in shadow, by plugin.
    pub fn shadow_reports(&self) -> BTreeMap<String, ShadowReport> {
        let plugins = self.states().into_iter();
        let reports = plugins.filter_map(|plugin| {
            let report = self.shadow(&plugin.name).ok()?;
            Some((plugin.name, report))
        });
        reports.collect()
    }

    /// This node's own version of an active plugin.
    fn own_version(&self, name: &str) -> Option<(Arc<Generation>, VersionHashes)> {
        let chain = self.chain();
        let mut generations = chain.generations();
        let own = generations.find(|generation| generation.plugin.name().as_str() == name)?;
        Some((Arc::clone(own), hashes(own)))
    }

    fn rollout(
        &self,
        _: &MutexGuard<'_, ()>,
        name: &str,
        wish: &RolloutWish,
        before: Option<&ActiveRollout>,
    ) -> ActiveRollout {
        let stamps = self.staged(name).map(|path| {
            let file = fs::metadata(path).ok()?;
            Some((file.modified().ok()?, file.len()))
        });
        let part = |state, own: &VersionHashes, reason: &str, generation| ActiveRollout {
            wish: wish.clone(),
            state: RolloutState {
                state,
                at_ms: wish.at_ms,
                hash: own.file.clone(),
                config_hash: own.config.clone(),
                reason: reason.to_owned(),
            },
            generation,
            stamps,
            has_failed: false,
        };
        let Some((generation, own)) = self.own_version(name) else {
            let none = VersionHashes {
                file: String::new(),
                config: String::new(),
            };
            return part(
                RolloutStatus::Missing,
                &none,
                "the plugin is not active",
                None,
            );
        };
        if own == wish.to {
            return part(RolloutStatus::Own, &own, "", None);
        }
        if own != wish.from {
            let reason = "its own version has changed since the roll-out began";
            return part(RolloutStatus::OtherVersion, &own, reason, None);
        }
        // Of the same roll-out, possibly with another share.
        let same =
            before.filter(|before| before.wish.to == wish.to && before.wish.from == wish.from);
        let is_current = |same: &ActiveRollout| {
            let is_of_own = (&same.state.hash, &same.state.config_hash) == (&own.file, &own.config);
            match same.state.state {
                RolloutStatus::Ready => same.generation.is_some(),
                // Tried again when a staged file changes.
                RolloutStatus::Missing | RolloutStatus::Failed => {
                    is_of_own && (same.has_failed || same.stamps == stamps)
                }
                RolloutStatus::Own | RolloutStatus::OtherVersion => false,
            }
        };
        if let Some(same) = same.filter(|same| is_current(same)) {
            return ActiveRollout {
                wish: wish.clone(),
                state: RolloutState {
                    at_ms: wish.at_ms,
                    ..same.state.clone()
                },
                ..same.clone()
            };
        }
        match self.load_staged(name, wish, &generation) {
            Ok(Some(generation)) => {
                tracing::info!(
                    plugin.name = name,
                    plugin.generation = generation.number,
                    plugin.hash = generation.plugin.hash(),
                    "plugin version of a roll-out loaded"
                );
                part(RolloutStatus::Ready, &own, "", Some(Arc::new(generation)))
            }
            Ok(None) => {
                let [file, config] = self.staged(name);
                let reason = format!(
                    "it does not have this version; copy {} and {} of a node that has it to its plugin folder",
                    file_name(&file),
                    file_name(&config)
                );
                part(RolloutStatus::Missing, &own, &reason, None)
            }
            Err(reason) => {
                tracing::error!(
                    plugin.name = name,
                    "plugin version of a roll-out not loaded: it {reason}"
                );
                part(RolloutStatus::Failed, &own, &reason, None)
            }
        }
    }

    /// Loads a version from the staged files. `None`: they do not hold it.
    fn load_staged(
        &self,
        name: &str,
        wish: &RolloutWish,
        own: &Generation,
    ) -> Result<Option<Generation>, String> {
        let [file, config] = self.staged(name);
        let max = own.settings.limits().file_bytes;
        let bytes = if wish.to.file == own.plugin.hash() {
            self.active_file(name, own).map_err(|e| e.to_string()).ok()
        } else {
            folder::read(&file, max).ok().map(Into::into)
        };
        let Some(bytes) = bytes.filter(|bytes| file_hash(bytes) == wish.to.file) else {
            return Ok(None);
        };
        let settings = if wish.to.config == short_hash(own.plugin.config_hash()) {
            own.settings.clone()
        } else {
            let text = folder::read(&config, MAX_BYTES).ok();
            let text = text.and_then(|text| String::from_utf8(text).ok());
            let Some(section) = text.and_then(|text| Section::parse(name, &text).ok()) else {
                return Ok(None);
            };
            section.settings
        };
        let plugin = self
            .load_bytes(name, &bytes, &settings)
            .map_err(|failure| failure.reason)?;
        if short_hash(plugin.config_hash()) != wish.to.config {
            return Ok(None);
        }
        let number = {
            let mut slots = self.slots();
            let slot = slots.by_name.entry(name.to_owned()).or_default();
            slot.n_generations += 1;
            slot.n_generations
        };
        // On probation: if it fails too often, it is withdrawn from all nodes.
        Ok(Some(Generation::new(
            plugin,
            number,
            settings,
            true,
            Instant::now(),
        )))
    }

    /// Checks a version and stages its files in the plugin folder. Returns the own version and the
    /// staged one.
    ///
    /// Compiles, so it may take seconds; not for an async thread.
    ///
    /// # Errors
    /// As for a candidate; the version is the node's own; or the folder cannot be written.
    pub fn stage(
        &self,
        name: &str,
        parts: CandidateParts,
    ) -> Result<(VersionHashes, VersionHashes), AdminError> {
        // Before the lock: other plugins are loaded meanwhile.
        let _code = self.compile_parts(name, &parts);
        let loading = self.begin_loading();
        let Candidate { plugin, source, .. } = self.candidate(&loading, name, parts)?;
        let (_, own) = self
            .own_version(name)
            .ok_or_else(|| AdminError::Unknown(name.to_owned()))?;
        let to = VersionHashes {
            file: plugin.hash().to_owned(),
            config: short_hash(plugin.config_hash()),
        };
        if own == to {
            return Err(AdminError::Impossible(format!(
                "file and configuration are those of the active version of '{name}'; there is nothing to roll out"
            )));
        }
        let [file, config] = self.staged(name);
        let section = source.section.as_ref().map(String::as_bytes);
        let parts = [
            (file, (to.file != own.file).then_some(&source.bytes[..])),
            (config, section.filter(|_| to.config != own.config)),
        ];
        for (path, bytes) in parts {
            match bytes {
                Some(bytes) if fs::read(&path).is_ok_and(|staged| staged == bytes) => {}
                Some(bytes) => {
                    folder::write(&path, bytes)?;
                }
                None => {}
            }
        }
        Ok((own, to))
    }

    /// The staged file and configuration of a plugin.
    fn staged(&self, name: &str) -> [PathBuf; 2] {
        let dir = self.dir.as_deref().unwrap_or(Path::new(""));
        ["wasm", "toml"].map(|kind| dir.join(format!(".{name}.next.{kind}")))
    }

    /// Withdraws a rolled-out version that failed on too many events, if this is one.
    pub(super) fn fail_rollout(&self, name: &str, number: u64, reason: &str) {
        let mut slots = self.slots();
        let Some(rollout) = slots.rollouts.get_mut(name) else {
            return;
        };
        let is_it = |generation: &Arc<Generation>| generation.number == number;
        if rollout
            .generation
            .take_if(|generation| is_it(generation))
            .is_none()
        {
            return;
        }
        tracing::error!(
            plugin.name = name,
            plugin.generation = number,
            "plugin version of a roll-out withdrawn: it {reason}"
        );
        rollout.has_failed = true;
        rollout.state.state = RolloutStatus::Failed;
        reason.clone_into(&mut rollout.state.reason);
        self.publish(&slots);
    }
}

/// The chains of the partitions in which a rolled-out version decides. `chain`: that of the others.
pub(super) fn chains_by_partition(
    rollouts: &BTreeMap<String, ActiveRollout>,
    chain: &Arc<Chain>,
) -> BTreeMap<PartitionNumber, Arc<Chain>> {
    let mut by_partition: BTreeMap<PartitionNumber, Arc<Chain>> = BTreeMap::new();
    for rollout in rollouts.values() {
        let Some(generation) = &rollout.generation else {
            continue;
        };
        // A change of the node's own version ends its part at once.
        let name = generation.plugin.name();
        let mut own = chain.generations();
        let own = own.find(|own| own.plugin.name() == name);
        if own.is_none_or(|own| hashes(own) != rollout.wish.from) {
            continue;
        }
        for partition in &rollout.wish.partitions {
            let before = by_partition.get(partition).unwrap_or(chain);
            let with = Arc::new(before.with(generation));
            by_partition.insert(*partition, with);
        }
    }
    by_partition
}

fn hashes(generation: &Generation) -> VersionHashes {
    VersionHashes {
        file: generation.plugin.hash().to_owned(),
        config: short_hash(generation.plugin.config_hash()),
    }
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}
