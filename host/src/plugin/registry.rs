//! Which plugins there are, in which order and generation: the files of a folder, loaded, and loaded again when they change.
//!
//! A [`Chain`] is a snapshot: whoever holds one finishes on it. It promises that a file that is no good replaces nothing, keeps nobody else
//! from loading, and is there with the reason ([`Registry::states`]); that what changed together takes over together; and that a plugin whose
//! bytes are those that run is left alone. When files are taken up is `watcher`'s business; which file is which plugin's, `folder`'s.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};

use serde::Serialize;
use tokio::sync::watch;

use super::engine::MAX_PLUGINS;
use super::folder::{self, Look, Sighting};
use super::settings::{Config, OnFailure, Settings};
use super::{Engine, Plugin, Role, hash};
use crate::clock::now_ms;
use crate::event::Name;
use crate::metrics::{Metrics, PluginLoadLabel};

/// One version of one plugin at work.
#[derive(Debug)]
pub struct Generation {
    pub plugin: Plugin,
    /// 1 for the first of this name in this process.
    pub number: u64,
    /// When it was loaded, in milliseconds since the Unix epoch.
    pub since_ms: u64,
    pub on_failure: OnFailure,
}

/// All plugins at work, at one moment.
#[derive(Debug, Default)]
pub struct Chain {
    /// In the order in which they are asked. A plugin that is filter and router is in both.
    pub filters: Vec<Arc<Generation>>,
    pub routers: Vec<Arc<Generation>>,
}

impl Chain {
    pub fn is_empty(&self) -> bool {
        self.filters.is_empty() && self.routers.is_empty()
    }

    /// Each plugin once.
    fn generations(&self) -> impl Iterator<Item = &Arc<Generation>> {
        self.filters.iter().chain(self.routers.iter().filter(|generation| !generation.plugin.has_role(Role::Filter)))
    }

    /// Whether this generation is of this chain.
    pub(crate) fn has(&self, name: &Name, number: u64) -> bool {
        self.generations().any(|generation| generation.plugin.name() == name && generation.number == number)
    }
}

/// A plugin, or a file that should be one, for readiness and for operators.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PluginState {
    pub name: String,
    /// The name of its file.
    pub file: String,
    /// `filter`, `router`, `filter and router`, or nothing if it is not at work.
    pub kind: &'static str,
    /// What it says its version is.
    pub version: String,
    /// The generation at work; 0 for none.
    pub generation: u64,
    /// SHA-256 of the file that is at work, in hexadecimal.
    pub hash: String,
    pub since_ms: u64,
    /// Why the file that is there now is not at work. `None`: it is.
    pub failure: Option<String>,
    /// SHA-256 of the file that failed, if it could be read.
    pub failed_hash: Option<String>,
}

/// What everybody sees, at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    pub chain: Arc<Chain>,
    /// Every plugin, those at work first, in order, then the files that are none.
    pub plugins: Vec<PluginState>,
    /// Why the folder cannot be looked at. What is at work stays so.
    pub folder_failure: Option<String>,
}

/// The plugins of a node.
#[derive(Debug)]
pub struct Registry {
    engine: Engine,
    config: Config,
    metrics: Metrics,
    /// By name. Held while files are loaded, and by one thread only: that which starts the node, and then the watcher.
    slots: Mutex<BTreeMap<String, Slot>>,
    /// Replaced whole; never borrowed over anything that waits.
    current: watch::Sender<Snapshot>,
}

/// What is known of one plugin. It stays when the plugin is gone, so that no two generations ever have the same number.
#[derive(Debug, Default)]
struct Slot {
    /// As they were when they were taken up. The first is the plugin's; none is left of a plugin that is gone.
    files: Vec<Sighting>,
    running: Option<Arc<Generation>>,
    /// Why what runs, if anything, is not the file that is there.
    failure: Option<Failure>,
    n_generations: u64,
}

/// Why a file was not loaded.
#[derive(Debug)]
struct Failure {
    /// A sentence that begins with the file's name.
    reason: String,
    /// Of the file, if it could be read.
    hash: Option<String>,
}

impl Registry {
    /// Loads every `.wasm` file of the configured folder. Without a folder there is no plugin.
    ///
    /// Compiles, so it may take seconds; not for an async thread.
    ///
    /// # Errors
    /// If the folder cannot be read. A bad file, or one that is configured and missing, is no error: see [`Registry::states`].
    pub fn load(engine: Engine, config: Config, metrics: Metrics) -> anyhow::Result<Self> {
        let look = match &config.dir {
            Some(dir) => folder::look(dir).map_err(anyhow::Error::msg)?,
            None => Look::new(),
        };
        let registry = Self { engine, config, metrics, slots: Mutex::default(), current: watch::Sender::default() };
        registry.take_up(look);
        Ok(registry)
    }

    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The configured folder.
    pub fn dir(&self) -> Option<&Path> {
        self.config.dir.as_deref()
    }

    /// The plugins at work now.
    pub fn chain(&self) -> Arc<Chain> {
        Arc::clone(&self.current.borrow().chain)
    }

    /// Every plugin, those at work first, in order, then the files that are none.
    pub fn states(&self) -> Vec<PluginState> {
        self.current.borrow().plugins.clone()
    }

    /// What everybody sees, as it changes.
    pub fn changes(&self) -> watch::Receiver<Snapshot> {
        self.current.subscribe()
    }

    /// The files as they were taken up.
    pub(super) fn taken_up(&self) -> Look {
        let slots = self.slots.lock().expect("a panic while loading is caught");
        slots.iter().filter(|(_, slot)| !slot.files.is_empty()).map(|(name, slot)| (name.clone(), slot.files.clone())).collect()
    }

    /// Loads these plugins from their files, or removes those that have none any more, and swaps the chain once for all of them.
    ///
    /// Compiles, so it may take seconds; not for an async thread.
    pub(super) fn take_up(&self, look: Look) {
        let mut slots = self.slots.lock().expect("a panic while loading is caught");
        let mut outcomes = Vec::with_capacity(look.len());
        for (name, files) in look {
            let n_others = slots.iter().filter(|(other, slot)| **other != name && slot.running.is_some()).count();
            let outcome = self.take_up_one(&name, files, n_others, slots.entry(name.clone()).or_default());
            outcomes.extend(outcome.map(|outcome| PluginLoadLabel { plugin: name, outcome }));
        }
        self.publish(&slots);
        // Not before it is true: who waits for the number may rely on what it says.
        for label in outcomes {
            self.metrics.plugin_loads.get_or_create(&label).inc();
        }
    }

    /// Notes why the folder cannot be looked at, or that it can be.
    pub(super) fn set_folder_failure(&self, reason: Option<String>) {
        self.current.send_if_modified(|current| {
            let is_new = current.folder_failure != reason;
            current.folder_failure = reason;
            is_new
        });
    }

    /// `None`: nothing was to be loaded. Else the outcome, as the metric has it.
    fn take_up_one(&self, name: &str, files: Vec<Sighting>, n_others: usize, slot: &mut Slot) -> Option<&'static str> {
        let settings = self.config.plugins.get(name).cloned().unwrap_or_default();
        slot.files = files;
        slot.failure = None;
        let Some(first) = slot.files.first().filter(|_| settings.enabled) else {
            match slot.running.take() {
                Some(gone) => tracing::warn!(
                    plugin.name = name,
                    plugin.generation = gone.number,
                    plugin.hash = gone.plugin.hash(),
                    "plugin removed: its file is gone"
                ),
                None if !settings.enabled => tracing::info!(plugin.name = name, "plugin is not enabled"),
                None => {}
            }
            return None;
        };
        let file = first.file();
        let running = slot.running.as_deref();
        let loaded = if running.is_none() && n_others >= MAX_PLUGINS {
            let reason = format!("is beyond the {MAX_PLUGINS} plugins that one node runs; remove one and write this one again");
            Err(Failure { reason, hash: None })
        } else {
            self.load_file(&first.path, name, &settings, running.map(|running| running.plugin.hash()))
        };
        let outcome = match loaded {
            Ok(None) => {
                tracing::info!(plugin.name = name, plugin.file = file, "the plugin's file is what runs already");
                None
            }
            Ok(Some(plugin)) => {
                slot.n_generations += 1;
                tracing::info!(
                    plugin.name = name,
                    plugin.file = file,
                    plugin.generation = slot.n_generations,
                    plugin.hash = plugin.hash(),
                    plugin.former_hash = running.map(|running| running.plugin.hash()),
                    plugin.version = plugin.manifest().version,
                    plugin.cached = plugin.is_cached(),
                    "plugin loaded"
                );
                if plugin.manifest().name != name {
                    tracing::info!(plugin.name = name, "the plugin calls itself '{}'", plugin.manifest().name);
                }
                let generation = Generation { plugin, number: slot.n_generations, since_ms: now_ms(), on_failure: settings.on_failure };
                slot.running = Some(Arc::new(generation));
                Some("loaded")
            }
            Err(Failure { reason, hash }) => {
                let reason = format!("{file} {reason}");
                match running {
                    Some(running) => tracing::error!(
                        plugin.name = name,
                        plugin.file = file,
                        plugin.hash = running.plugin.hash(),
                        plugin.failed_hash = hash,
                        "plugin not replaced: {reason}; generation {} stays at work",
                        running.number
                    ),
                    None => {
                        tracing::error!(plugin.name = name, plugin.file = file, plugin.failed_hash = hash, "plugin not loaded: {reason}");
                    }
                }
                slot.failure = Some(Failure { reason, hash });
                Some("failed")
            }
        };
        if let (Some(second), None) = (slot.files.get(1), &slot.failure) {
            let file = second.file();
            let reason = format!("{file} is the second file of a plugin called '{name}'; rename or remove one");
            tracing::error!(plugin.name = name, plugin.file = file, "plugin not loaded: {reason}");
            slot.failure = Some(Failure { reason, hash: None });
        }
        outcome
    }

    /// A plugin from its file; `None` if it is what runs.
    fn load_file(&self, path: &Path, name: &str, settings: &Settings, running: Option<&str>) -> Result<Option<Plugin>, Failure> {
        let unread = |reason| Failure { reason, hash: None };
        let limits = settings.limits();
        let name = Name::parse(name).map_err(|e| unread(format!("gives no name to a plugin: it {e}")))?;
        let bytes = folder::read(path, limits.file_bytes).map_err(unread)?;
        let hash = hash(&bytes);
        if running == Some(hash.as_str()) {
            return Ok(None);
        }
        let failed = |reason| Failure { reason, hash: Some(hash.clone()) };
        if let Some(pinned) = &settings.sha256
            && !pinned.eq_ignore_ascii_case(&hash)
        {
            return Err(failed(format!("has the SHA-256 {hash}, and not the configured one")));
        }
        let config = serde_json::to_string(&settings.config).map_err(|e| failed(format!("has a configuration that is not JSON: {e}")))?;
        // On a thread of its own: WASI's functions may not run on one of an async executor, whoever calls this.
        let load = || Plugin::load(&self.engine, name, &bytes, &config, limits);
        let plugin = std::thread::scope(|scope| scope.spawn(load).join());
        let plugin = plugin.map_err(|_| failed("made the host panic as it was loaded".to_owned()))?;
        plugin.map(Some).map_err(|e| failed(e.to_string()))
    }

    /// Makes what the slots hold what everybody sees.
    fn publish(&self, slots: &BTreeMap<String, Slot>) {
        let place = |name: &str| self.config.order.iter().position(|ordered| ordered == name).unwrap_or(usize::MAX);
        let mut running: Vec<_> = slots.iter().filter_map(|(name, slot)| Some((name, slot, slot.running.as_ref()?))).collect();
        running.sort_by_key(|(name, slot, _)| (place(name), slot.files.first().map(|file| &file.path)));
        let of_role = |role| {
            let generations = running.iter().map(|(_, _, generation)| *generation);
            generations.filter(|generation| generation.plugin.has_role(role)).cloned().collect()
        };
        let chain = Arc::new(Chain { filters: of_role(Role::Filter), routers: of_role(Role::Router) });
        let mut plugins: Vec<PluginState> =
            chain.generations().map(|generation| state(generation.plugin.name().as_str(), slots, Some(generation))).collect();
        let failed = slots.iter().filter(|(_, slot)| slot.running.is_none() && slot.failure.is_some());
        plugins.extend(failed.map(|(name, _)| state(name, slots, None)));
        plugins.extend(self.missing(slots));
        // The old snapshot, and with it perhaps the last of a generation, is dropped after the lock was given back.
        let folder_failure = self.current.borrow().folder_failure.clone();
        drop(self.current.send_replace(Snapshot { chain, plugins, folder_failure }));
    }

    /// What is configured and has no file.
    fn missing(&self, slots: &BTreeMap<String, Slot>) -> Vec<PluginState> {
        let known: Vec<&str> = slots.iter().filter(|(_, slot)| !slot.files.is_empty()).map(|(name, _)| name.as_str()).collect();
        let place = self.dir().map_or_else(|| "no folder, as plugins.dir is not set".to_owned(), |dir| dir.display().to_string());
        let configured = self.config.plugins.iter().filter(|(_, settings)| settings.enabled).map(|(name, _)| name);
        let missing = configured.chain(&self.config.order).filter(|name| !known.contains(&name.as_str())).collect::<BTreeSet<_>>();
        let missing = missing.into_iter().map(|name| {
            let there = known.join(", ");
            let reason = format!(
                "the plugin '{name}' is configured, and no file in {place} is called so (there: {there}); put {name}.wasm there, or remove it from the configuration"
            );
            if !self.current.borrow().plugins.iter().any(|before| before.name == *name && before.generation == 0) {
                tracing::error!(plugin.name = name, "plugin not loaded: {reason}");
            }
            PluginState { failure: Some(reason), ..state(name, slots, None) }
        });
        missing.collect()
    }
}

/// `running`: what runs of this plugin.
fn state(name: &str, slots: &BTreeMap<String, Slot>, running: Option<&Arc<Generation>>) -> PluginState {
    let slot = slots.get(name);
    let failure = slot.and_then(|slot| slot.failure.as_ref());
    let plugin = running.map(|generation| &generation.plugin);
    PluginState {
        name: name.to_owned(),
        file: slot.and_then(|slot| slot.files.first()).map(Sighting::file).unwrap_or_default(),
        kind: match plugin.map(|plugin| (plugin.has_role(Role::Filter), plugin.has_role(Role::Router))) {
            Some((true, true)) => "filter and router",
            Some((true, false)) => "filter",
            Some(_) => "router",
            None => "",
        },
        version: plugin.map(|plugin| plugin.manifest().version.clone()).unwrap_or_default(),
        generation: running.map_or(0, |generation| generation.number),
        hash: plugin.map(|plugin| plugin.hash().to_owned()).unwrap_or_default(),
        since_ms: running.map_or(0, |generation| generation.since_ms),
        failure: failure.map(|failure| failure.reason.clone()),
        failed_hash: failure.and_then(|failure| failure.hash.clone()),
    }
}
