//! Roll-outs: a version of a plugin that decides in some partitions, beside the node's own version,
//! which is that of its folder and its configuration.
//!
//! The version is loaded from two staged files in the plugin folder, `.NAME.next.wasm` and
//! `.NAME.next.toml`, of which the one that equals the own version may be missing. A node that does
//! not have the version decides by its own and reports it. The node's own files are never changed.
//!
//! To follow a change ([`Registry::follow_rollouts`]) neither compiles nor waits for a compilation,
//! so that a withdrawn version decides nothing more at once. Versions are loaded afterwards, beside
//! everything else ([`Registry::load_rollout`]); while they are at a start, events of their
//! partitions wait. A node that has not read the roll-outs for [`CONFIRMED_FOR`] decides nothing:
//! it may have been stopped while they changed, and the others no longer wait for it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::candidate::{Candidate, CandidateParts};
use super::section::{MAX_BYTES, Section};
use super::settings::Settings;
use super::slot::{Failure, Slots};
use super::staged::{ActiveRollout, StagedVersion, Stamps};
pub use super::staged::{RolloutState, RolloutStatus, RolloutWish, VersionHashes};
use super::{AdminError, Registry, folder};
use crate::event::{Name, PartitionNumber};
use crate::plugin::Plugin;
use crate::plugin::registry::generation::{Chain, Generation};
use crate::plugin::runtime::plugin::{file_hash, short_hash};
use crate::plugin::shadow::ShadowReport;

/// How long a node decides after it has read the roll-outs. Much shorter than its report counts
/// ([`crate::broker::REPORTED_FOR`]), so that a node that is not listed any more does not decide.
pub const CONFIRMED_FOR: Duration = Duration::from_secs(5);
/// The pause before a version is tried again that was not loaded for want of something in the host.
const TRY_AGAIN_AFTER: Duration = Duration::from_secs(2);
/// The interval between two looks whether a version that is being compiled is still wanted.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Whether this node has read the roll-outs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Following {
    /// It takes part in none.
    No,
    NotYet,
    /// When it last began to read them.
    Since(Instant),
}

/// Why an event of a partition must not be decided now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Incomplete {
    /// These plugins have no active version.
    Plugins(Vec<String>),
    /// The versions of roll-outs of these plugins are being loaded.
    Rollouts(Vec<String>),
    /// The roll-outs have not been read for [`CONFIRMED_FOR`].
    Unconfirmed,
}

impl Registry {
    /// The active plugins for events of a partition, unless no event of it must be decided now.
    ///
    /// # Errors
    /// See [`Incomplete`].
    pub(crate) fn complete_chain_of(
        &self,
        partition: PartitionNumber,
    ) -> Result<Arc<Chain>, Incomplete> {
        if !self.has_confirmed_rollouts() {
            return Err(Incomplete::Unconfirmed);
        }
        // Read at once: the chain of one moment must not be judged by another moment's plugins.
        let current = self.current.borrow();
        if !current.missing.is_empty() {
            return Err(Incomplete::Plugins(current.missing.clone()));
        }
        if let Some(plugins) = current.awaited.get(&partition) {
            return Err(Incomplete::Rollouts(plugins.clone()));
        }
        let special = current.by_partition.get(&partition);
        Ok(Arc::clone(special.unwrap_or(&current.chain)))
    }

    /// Whether this generation decides in any partition.
    pub(crate) fn is_deciding(&self, name: &Name, number: u64) -> bool {
        let current = self.current.borrow();
        let mut chains = current.by_partition.values().chain([&current.chain]);
        chains.any(|chain| chain.has(name, number))
    }

    /// From now on, no event is decided unless the roll-outs were read within [`CONFIRMED_FOR`].
    pub fn require_rollouts(&self) {
        self.following.send_replace(Following::NotYet);
    }

    /// The roll-outs that were read at this time or later are followed, and the other nodes can know
    /// it. Ignored without [`Registry::require_rollouts`].
    pub fn confirm_rollouts(&self, began: Instant) {
        self.following.send_if_modified(|following| {
            let is_required = *following != Following::No;
            if is_required {
                *following = Following::Since(began);
            }
            is_required
        });
    }

    /// Whether events may be decided: the roll-outs were read within [`CONFIRMED_FOR`].
    pub(crate) fn has_confirmed_rollouts(&self) -> bool {
        match *self.following.borrow() {
            Following::No => true,
            Following::NotYet => false,
            Following::Since(began) => began.elapsed() < CONFIRMED_FOR,
        }
    }

    /// Changes whenever the roll-outs were read.
    pub(crate) fn confirmations(&self) -> watch::Receiver<impl Send + Sync + use<>> {
        self.following.subscribe()
    }

    /// How often a rolled-out version was withdrawn from a partition: what was evaluated before may
    /// have been decided by it.
    pub(crate) fn n_withdrawals(&self) -> u64 {
        self.current.borrow().n_withdrawals
    }

    /// The names for which there may be roll-outs.
    pub fn names(&self) -> Vec<Name> {
        let slots = self.slots();
        let known = slots.by_name.keys();
        let known = known.chain(slots.config.plugins.keys());
        let known: BTreeSet<&String> = known.chain(&slots.config.order).collect();
        known
            .into_iter()
            .filter_map(|name| Name::parse(name).ok())
            .collect()
    }

    /// Takes part in these roll-outs, by plugin, and in no others. Returns this node's part in each.
    ///
    /// Versions that are not wanted any more decide nothing from here on; new ones wait for
    /// [`Registry::load_rollout`]. Neither compiles nor waits for a compilation.
    pub fn follow_rollouts(
        &self,
        wishes: &BTreeMap<String, RolloutWish>,
    ) -> BTreeMap<String, RolloutState> {
        let mut slots = self.slots();
        let before = std::mem::take(&mut slots.rollouts);
        // At a start, the version may have decided in its partitions before.
        let is_first = !std::mem::replace(&mut slots.has_read_rollouts, true);
        let after = wishes.iter().map(|(name, wish)| {
            let same = before.get(name).filter(|before| before.is_for(wish));
            let rollout = match same {
                Some(same) => ActiveRollout {
                    wish: wish.clone(),
                    ..same.clone()
                },
                None => ActiveRollout::new(wish, is_first),
            };
            (name.clone(), rollout)
        });
        let after: BTreeMap<String, ActiveRollout> = after.collect();
        let deciding_now = deciding(&after);
        let is_withdrawn = |version| !deciding_now.contains(version);
        let has_withdrawn = deciding(&before).iter().any(is_withdrawn);
        let wishes_before = before.iter().map(|(name, rollout)| (name, &rollout.wish));
        let is_new = is_first || !wishes_before.eq(wishes);
        slots.rollouts = after;
        slots.n_withdrawals += u64::from(has_withdrawn);
        if is_new {
            self.publish(&slots);
        }
        drop(slots);
        self.rollouts_changed.notify_one();
        self.rollout_states()
    }

    /// This node's part in each roll-out, by plugin.
    pub fn rollout_states(&self) -> BTreeMap<String, RolloutState> {
        let slots = self.slots();
        let states = slots.rollouts.iter().map(|(name, rollout)| {
            let own = own_version(&slots, name).map(|own| hashes(own));
            (name.clone(), rollout.state(name, own.as_ref()))
        });
        states.collect()
    }

    /// Waits until [`Registry::follow_rollouts`] was called. Cancel-safe.
    pub(crate) async fn rollouts_changed(&self) {
        self.rollouts_changed.notified().await;
    }

    /// The versions that [`Registry::load_rollout`] should load now.
    pub(crate) fn due_rollouts(&self) -> Vec<(String, RolloutWish)> {
        let would_decide: Vec<_> = {
            let slots = self.slots();
            let rollouts = slots.rollouts.iter().filter(|(name, rollout)| {
                own_version(&slots, name).is_some_and(|own| hashes(own) == rollout.wish.from)
            });
            rollouts
                .map(|(name, rollout)| (name.clone(), rollout.clone()))
                .collect()
        };
        let due = would_decide
            .into_iter()
            .filter(|(name, rollout)| match &rollout.version {
                StagedVersion::Loading { due, .. } => *due <= Instant::now(),
                StagedVersion::Missing(stamps) | StagedVersion::Refused { stamps, .. } => {
                    *stamps != self.stamps(name)
                }
                StagedVersion::Loaded(_) | StagedVersion::Withdrawn { .. } => false,
            });
        due.map(|(name, rollout)| (name, rollout.wish)).collect()
    }

    /// Loads the version of a roll-out. Other plugins are loaded meanwhile.
    ///
    /// Compiles, so it may take minutes, unless the version is not wanted any more; not for an async
    /// thread. `is_cancelled`: whether the node shuts down.
    pub(crate) fn load_rollout(
        &self,
        name: &str,
        wish: &RolloutWish,
        is_cancelled: impl Fn() -> bool,
    ) {
        let Some(own) = own_version(&self.slots(), name).cloned() else {
            return;
        };
        let stamps = self.stamps(name);
        let is_wanted = || !is_cancelled() && self.wants(name, wish);
        let loaded = match self.load_staged(name, wish, &own, is_wanted) {
            Ok(Loaded::Cancelled) => return,
            loaded => loaded,
        };
        let mut slots = self.slots();
        let version = match loaded {
            Ok(Loaded::Version(plugin, settings)) => {
                let slot = slots.by_name.entry(name.to_owned()).or_default();
                slot.n_generations += 1;
                let number = slot.n_generations;
                tracing::info!(
                    plugin.name = name,
                    plugin.generation = number,
                    plugin.hash = plugin.hash(),
                    "plugin version of a roll-out loaded"
                );
                // On probation: if it fails too often, it is withdrawn from all nodes.
                let generation = Generation::new(*plugin, number, settings, true, Instant::now());
                StagedVersion::Loaded(Arc::new(generation))
            }
            Ok(_) => StagedVersion::Missing(stamps),
            Err(Failure {
                reason,
                is_transient: true,
                ..
            }) => StagedVersion::Loading {
                reason: format!("it {reason}"),
                due: Instant::now() + TRY_AGAIN_AFTER,
            },
            Err(Failure { reason, .. }) => {
                tracing::error!(
                    plugin.name = name,
                    "plugin version of a roll-out not loaded: it {reason}"
                );
                StagedVersion::Refused { reason, stamps }
            }
        };
        // Another one may be wanted by now.
        if let Some(rollout) = slots.rollouts.get_mut(name).filter(|now| now.is_for(wish)) {
            rollout.version = version;
            self.publish(&slots);
        }
    }

    /// Whether this version is still that of a roll-out.
    fn wants(&self, name: &str, wish: &RolloutWish) -> bool {
        let slots = self.slots();
        slots.rollouts.get(name).is_some_and(|now| now.is_for(wish))
    }

    /// The plugins whose rolled-out version failed on too many events, with that version and the
    /// reason.
    pub fn failed_rollouts(&self) -> Vec<(String, VersionHashes, String)> {
        let slots = self.slots();
        let failed = slots.rollouts.iter().filter_map(|(name, rollout)| {
            let StagedVersion::Withdrawn { reason } = &rollout.version else {
                return None;
            };
            Some((name.clone(), rollout.wish.to.clone(), reason.clone()))
        });
        failed.collect()
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

    /// Loads a version from the staged files.
    ///
    /// # Errors
    /// The version cannot be loaded.
    fn load_staged(
        &self,
        name: &str,
        wish: &RolloutWish,
        own: &Generation,
        is_wanted: impl Fn() -> bool,
    ) -> Result<Loaded, Failure> {
        let [file, config] = self.staged(name);
        let max = own.settings.limits().file_bytes;
        let bytes = if wish.to.file == own.plugin.hash() {
            self.active_file(name, own).ok()
        } else {
            folder::read(&file, max).ok().map(Into::into)
        };
        let Some(bytes) = bytes.filter(|bytes| file_hash(bytes) == wish.to.file) else {
            return Ok(Loaded::Missing);
        };
        let settings = if wish.to.config == short_hash(own.plugin.config_hash()) {
            own.settings.clone()
        } else {
            let text = folder::read(&config, MAX_BYTES).ok();
            let text = text.and_then(|text| String::from_utf8(text).ok());
            let Some(section) = text.and_then(|text| Section::parse(name, &text).ok()) else {
                return Ok(Loaded::Missing);
            };
            section.settings
        };
        // A pinned hash restricts the own file; that of the version is the wanted one.
        let settings = Settings {
            sha256: None,
            ..settings
        };
        // Keeps the code until it is loaded. Errors are left to the load.
        let code = self.begin_to_compile(&bytes, &settings).ok();
        while let Some(code) = code.as_ref().filter(|code| !code.has_ended()) {
            if !is_wanted() {
                return Ok(Loaded::Cancelled);
            }
            code.wait_until(Instant::now() + LOOK_EVERY);
        }
        let plugin = self.load_bytes(name, &bytes, &settings)?;
        if short_hash(plugin.config_hash()) != wish.to.config {
            return Ok(Loaded::Missing);
        }
        Ok(Loaded::Version(Box::new(plugin), settings))
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
        let own = own_version(&self.slots(), name).map(|own| hashes(own));
        let own = own.ok_or_else(|| AdminError::Unknown(name.to_owned()))?;
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

    fn stamps(&self, name: &str) -> Stamps {
        self.staged(name).map(|path| {
            let file = fs::metadata(path).ok()?;
            Some((file.modified().ok()?, file.len()))
        })
    }

    /// Withdraws a rolled-out version that failed on too many events, if this is one.
    pub(super) fn fail_rollout(&self, name: &str, number: u64, reason: &str) {
        let mut slots = self.slots();
        let Some(rollout) = slots.rollouts.get_mut(name) else {
            return;
        };
        if rollout
            .generation()
            .is_none_or(|generation| generation.number != number)
        {
            return;
        }
        tracing::error!(
            plugin.name = name,
            plugin.generation = number,
            "plugin version of a roll-out withdrawn: it {reason}"
        );
        rollout.version = StagedVersion::Withdrawn {
            reason: reason.to_owned(),
        };
        self.publish(&slots);
    }
}

/// The result of loading a version.
enum Loaded {
    Version(Box<Plugin>, Settings),
    /// The staged files do not hold it.
    Missing,
    /// It is not wanted any more.
    Cancelled,
}

/// The rolled-out versions that decide: plugin, generation and partition.
fn deciding(rollouts: &BTreeMap<String, ActiveRollout>) -> BTreeSet<(&str, u64, PartitionNumber)> {
    let mut deciding = BTreeSet::new();
    for (name, rollout) in rollouts {
        if let Some(generation) = rollout.generation() {
            let partitions = rollout.wish.partitions.iter();
            deciding.extend(partitions.map(|partition| (&name[..], generation.number, *partition)));
        }
    }
    deciding
}

/// This node's own version of an active plugin.
fn own_version<'s>(slots: &'s Slots, name: &str) -> Option<&'s Arc<Generation>> {
    slots.by_name.get(name)?.running.as_ref()
}

/// The plugins for whose rolled-out versions events wait, by partition.
pub(super) fn awaited_by_partition(slots: &Slots) -> BTreeMap<PartitionNumber, Vec<String>> {
    let mut awaited: BTreeMap<PartitionNumber, Vec<String>> = BTreeMap::new();
    for (name, rollout) in &slots.rollouts {
        let is_loading = matches!(rollout.version, StagedVersion::Loading { .. });
        let would_decide =
            || own_version(slots, name).is_some_and(|own| hashes(own) == rollout.wish.from);
        if rollout.is_awaited && is_loading && would_decide() {
            for partition in &rollout.wish.partitions {
                awaited.entry(*partition).or_default().push(name.clone());
            }
        }
    }
    awaited
}

/// The chains of the partitions in which a rolled-out version decides. `chain`: that of the others.
pub(super) fn chains_by_partition(
    rollouts: &BTreeMap<String, ActiveRollout>,
    chain: &Arc<Chain>,
) -> BTreeMap<PartitionNumber, Arc<Chain>> {
    let mut by_partition: BTreeMap<PartitionNumber, Arc<Chain>> = BTreeMap::new();
    for rollout in rollouts.values() {
        let Some(generation) = rollout.generation() else {
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
