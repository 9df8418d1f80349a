//! Which plugins there are, in which order and generation: the files of a folder, loaded.
//!
//! A [`Chain`] is a snapshot: whoever holds one finishes on it. It promises that a file that is no good keeps nobody else from loading, and
//! is there with the reason ([`Registry::states`]). A plugin is called by the name of its file, without `.wasm`, without a leading number
//! and hyphen (`10-discard.wasm` is `discard`), and with hyphens for underscores (Cargo writes the crate `my-router` as `my_router.wasm`):
//! the name that the operator gave and sees, and not what the guest says of itself.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::engine::MAX_PLUGINS;
use super::{Engine, Limits, Plugin, Role, hash};
use crate::clock::now_ms;
use crate::event::Name;

/// The `[plugins]` section of the configuration: keys of its own, and a table for each plugin that needs one.
///
/// A plugin called `dir` or `order` cannot be configured.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Config {
    /// The folder whose `.wasm` files are the plugins (none).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dir: Option<PathBuf>,
    /// Names of plugins, in the order in which they are called; the others follow in the order of their file names (none).
    pub order: Vec<String>,
    /// `[plugins.<name>]`.
    #[serde(flatten)]
    pub plugins: BTreeMap<String, Settings>,
}

/// `[plugins.<name>]`: one plugin.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Whether the plugin is loaded at all (true).
    pub enabled: bool,
    /// What becomes of an event when the plugin fails on it, twice: `dead-letter`, `skip` (as if the plugin were not there) or `drop` (`dead-letter`).
    pub on_failure: OnFailure,
    /// Milliseconds that a call may run, 1 to 10,000 (50).
    pub deadline_ms: u64,
    /// MiB of memory that an instance may have, 1 to 4,096 (32).
    pub memory_mib: u32,
    /// KiB of text that an answer may have, 1 to 65,536 (256).
    pub result_kib: u32,
    /// Targets that an answer may have, 1 to 1,000,000 (10,000).
    pub max_targets: u32,
    /// Calls after which an instance is replaced by a fresh one, at least 1 (10,000).
    pub calls_per_instance: u32,
    /// If set, only the file with this SHA-256, in hexadecimal, is loaded (none).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// The plugin's own configuration, handed to it as JSON (none).
    #[serde(skip_serializing_if = "serde_json::Map::is_empty")]
    pub config: serde_json::Map<String, serde_json::Value>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            enabled: true,
            on_failure: OnFailure::DeadLetter,
            deadline_ms: 50,
            memory_mib: 32,
            result_kib: 256,
            max_targets: 10_000,
            calls_per_instance: 10_000,
            sha256: None,
            config: serde_json::Map::new(),
        }
    }
}

/// What becomes of an event when a plugin fails on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFailure {
    #[default]
    DeadLetter,
    /// As if the plugin were not there.
    Skip,
    Drop,
}

impl Settings {
    /// # Errors
    /// The key, what is wrong with it, and the fix.
    fn check(&self) -> Result<(), String> {
        let bounds = [
            ("deadline_ms", self.deadline_ms, 1, 10_000),
            ("memory_mib", self.memory_mib.into(), 1, 4_096),
            ("result_kib", self.result_kib.into(), 1, 65_536),
            ("max_targets", self.max_targets.into(), 1, 1_000_000),
            ("calls_per_instance", self.calls_per_instance.into(), 1, u32::MAX.into()),
        ];
        for (key, value, least, most) in bounds {
            if !(least..=most).contains(&value) {
                return Err(format!("{key} is {value}; give it {least} to {most}"));
            }
        }
        match &self.sha256 {
            Some(hash) if hash.len() != 64 || !hash.bytes().all(|b| b.is_ascii_hexdigit()) => {
                Err("sha256 is no hash: 64 hexadecimal digits, as `sha256sum FILE` prints them".to_owned())
            }
            _ => Ok(()),
        }
    }

    fn limits(&self) -> Limits {
        Limits {
            deadline: Duration::from_millis(self.deadline_ms),
            memory_bytes: self.memory_mib as usize * 1024 * 1024,
            result_bytes: self.result_kib as usize * 1024,
            targets: self.max_targets as usize,
            calls_per_instance: self.calls_per_instance,
            ..Limits::default()
        }
    }
}

/// By hand, because what is neither a key nor a table is to be named in the error.
impl<'de> Deserialize<'de> for Config {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Sections;
        impl<'de> Visitor<'de> for Sections {
            type Value = Config;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the keys dir and order, and a table for each plugin")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Config, A::Error> {
                let mut config = Config::default();
                while let Some(key) = map.next_key::<String>()? {
                    match key.as_str() {
                        "dir" => config.dir = Some(map.next_value()?),
                        "order" => config.order = map.next_value()?,
                        _ => {
                            let settings: Settings = map.next_value().map_err(|e| A::Error::custom(format!("plugins.{key}: {e}")))?;
                            settings.check().map_err(|e| A::Error::custom(format!("plugins.{key}.{e}")))?;
                            config.plugins.insert(key, settings);
                        }
                    }
                }
                Ok(config)
            }
        }
        d.deserialize_map(Sections)
    }
}

/// One version of one plugin at work.
#[derive(Debug)]
pub struct Generation {
    pub plugin: Plugin,
    /// 1 for the first of this name in this process.
    pub number: u64,
    /// When it was loaded, in milliseconds since the Unix epoch.
    pub since_ms: u64,
    pub on_failure: OnFailure,
    file: String,
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
    /// `filter`, `router`, `filter and router`, or nothing if it is not loaded.
    pub kind: &'static str,
    /// What it says its version is.
    pub version: String,
    pub generation: u64,
    /// SHA-256 of the file, in hexadecimal.
    pub hash: String,
    pub since_ms: u64,
    /// Why it is not loaded. `None`: it is at work.
    pub failure: Option<String>,
}

/// The plugins of a node.
#[derive(Debug)]
pub struct Registry {
    engine: Engine,
    /// Replaced whole; never held over anything that waits.
    current: RwLock<Current>,
}

#[derive(Clone, Debug, Default)]
struct Current {
    chain: Arc<Chain>,
    failures: Vec<PluginState>,
}

impl Registry {
    /// Loads every `.wasm` file of the configured folder, in the order of their names. Without a folder there is no plugin.
    ///
    /// Compiles, so it may take seconds; not for an async thread.
    ///
    /// # Errors
    /// If the folder cannot be read. A bad file, or one that is configured and missing, is no error: see [`Registry::states`].
    pub fn load(engine: Engine, config: &Config) -> anyhow::Result<Self> {
        let files = match &config.dir {
            Some(dir) => list(dir)?,
            None => Vec::new(),
        };
        let mut current = Current::default();
        let mut loaded: Vec<Arc<Generation>> = Vec::new();
        let mut known = BTreeSet::new();
        for path in files {
            let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let name = called(&file);
            let settings = config.plugins.get(&name).cloned().unwrap_or_default();
            let is_first = known.insert(name.clone());
            if !settings.enabled {
                tracing::info!(plugin.name = name, plugin.file = file, "plugin is not enabled");
                continue;
            }
            let result = if !is_first {
                Err(format!("is the second file of a plugin called '{name}'; rename or remove one"))
            } else if loaded.len() == MAX_PLUGINS {
                Err(format!("is beyond the {MAX_PLUGINS} plugins that one node runs"))
            } else {
                load_file(&engine, &path, &name, &settings)
            };
            match result {
                Ok(plugin) => {
                    tracing::info!(
                        plugin.name = name,
                        plugin.file = file,
                        plugin.hash = plugin.hash(),
                        plugin.version = plugin.manifest().version,
                        "plugin loaded"
                    );
                    if plugin.manifest().name != name {
                        tracing::info!(plugin.name = name, "the plugin calls itself '{}'", plugin.manifest().name);
                    }
                    loaded.push(Arc::new(Generation { plugin, number: 1, since_ms: now_ms(), on_failure: settings.on_failure, file }));
                }
                Err(reason) => {
                    tracing::error!(plugin.name = name, plugin.file = file, "plugin not loaded: {file} {reason}");
                    current.failures.push(not_loaded(&name, &file, format!("{file} {reason}")));
                }
            }
        }
        let there = known.iter().cloned().collect::<Vec<_>>().join(", ");
        let configured = config.plugins.iter().filter(|(_, settings)| settings.enabled).map(|(name, _)| name).chain(&config.order);
        for name in configured.filter(|name| !known.contains(*name)).collect::<BTreeSet<_>>() {
            let place =
                config.dir.as_deref().map_or_else(|| "no folder, as plugins.dir is not set".to_owned(), |dir| dir.display().to_string());
            let reason = format!(
                "the plugin '{name}' is configured, and no file in {place} is called so (there: {there}); put {name}.wasm there, or remove it from the configuration"
            );
            tracing::error!(plugin.name = name, "plugin not loaded: {reason}");
            current.failures.push(not_loaded(name, "", reason));
        }
        // Stable: what is not named keeps its place behind the rest.
        loaded
            .sort_by_key(|generation| config.order.iter().position(|name| name == generation.plugin.name().as_str()).unwrap_or(usize::MAX));
        let of_role = |role| loaded.iter().filter(|generation| generation.plugin.has_role(role)).cloned().collect();
        current.chain = Arc::new(Chain { filters: of_role(Role::Filter), routers: of_role(Role::Router) });
        Ok(Self { engine, current: RwLock::new(current) })
    }

    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The plugins at work now.
    pub fn chain(&self) -> Arc<Chain> {
        Arc::clone(&self.current.read().expect("no panic under this lock").chain)
    }

    /// Every plugin, those at work first, in order, then the files that are none.
    pub fn states(&self) -> Vec<PluginState> {
        let Current { chain, failures } = self.current.read().expect("no panic under this lock").clone();
        let at_work = chain.generations().map(|generation| {
            let plugin = &generation.plugin;
            PluginState {
                name: plugin.name().to_string(),
                file: generation.file.clone(),
                kind: match (plugin.has_role(Role::Filter), plugin.has_role(Role::Router)) {
                    (true, true) => "filter and router",
                    (true, false) => "filter",
                    _ => "router",
                },
                version: plugin.manifest().version.clone(),
                generation: generation.number,
                hash: plugin.hash().to_owned(),
                since_ms: generation.since_ms,
                failure: None,
            }
        });
        at_work.chain(failures).collect()
    }
}

fn not_loaded(name: &str, file: &str, reason: String) -> PluginState {
    let (name, file) = (name.to_owned(), file.to_owned());
    PluginState { name, file, kind: "", version: String::new(), generation: 0, hash: String::new(), since_ms: 0, failure: Some(reason) }
}

/// The `.wasm` files of a folder, by name. Files whose names begin with a dot are somebody's half-written ones.
fn list(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let unreadable =
        |error| anyhow::anyhow!("the folder of plugins {} cannot be read: {error}; make it, or set plugins.dir", dir.display());
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".wasm") && !name.starts_with('.') {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// What the plugin in this file is called: see the head of this file.
fn called(file: &str) -> String {
    let stem = file.strip_suffix(".wasm").unwrap_or(file);
    let unnumbered = match stem.split_once('-') {
        Some((number, rest)) if !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()) && !rest.is_empty() => rest,
        _ => stem,
    };
    unnumbered.replace('_', "-")
}

fn load_file(engine: &Engine, path: &Path, name: &str, settings: &Settings) -> Result<Plugin, String> {
    let limits = settings.limits();
    let name = Name::parse(name).map_err(|e| format!("gives no name to a plugin: it {e}"))?;
    // Not read beyond what can be used, whatever it is.
    let length = std::fs::metadata(path).map_err(|e| format!("cannot be read: {e}"))?.len();
    if length > limits.file_bytes as u64 {
        return Err(format!("has {length} bytes; {} is the most", limits.file_bytes));
    }
    let bytes = std::fs::read(path).map_err(|e| format!("cannot be read: {e}"))?;
    let hash = hash(&bytes);
    if let Some(pinned) = &settings.sha256
        && !pinned.eq_ignore_ascii_case(&hash)
    {
        return Err(format!("has the SHA-256 {hash}, and not the configured one"));
    }
    let config = serde_json::to_string(&settings.config).map_err(|e| format!("has a configuration that is not JSON: {e}"))?;
    // On a thread of its own: WASI's functions may not run on one of an async executor, whoever calls this.
    let load = || Plugin::load(engine, name, &bytes, &config, limits);
    let plugin = std::thread::scope(|scope| scope.spawn(load).join());
    plugin.map_err(|_| "made the host panic as it was loaded".to_owned())?.map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plugin_is_called_by_its_file() {
        for (file, name) in [
            ("address.wasm", "address"),
            ("10-discard.wasm", "discard"),
            ("my_router.wasm", "my-router"),
            ("2-my_router.wasm", "my-router"),
            ("x-y.wasm", "x-y"),
            ("10-.wasm", "10-"),
            ("10.wasm", "10"),
        ] {
            assert_eq!(called(file), name);
        }
    }

    #[test]
    fn the_section_holds_keys_and_a_table_for_each_plugin() {
        let config: Config = toml::from_str(
            "dir = 'build/plugins'\norder = ['discard', 'address']\n[discard]\non_failure = 'skip'\ndeadline_ms = 5\n[[discard.config.rules]]\ntype = 'order.*'\n",
        )
        .unwrap();
        assert_eq!(config.dir.as_deref(), Some(Path::new("build/plugins")));
        let discard = &config.plugins["discard"];
        assert_eq!((discard.on_failure, discard.deadline_ms, discard.memory_mib), (OnFailure::Skip, 5, 32));
        assert_eq!(serde_json::Value::Object(discard.config.clone()), serde_json::json!({"rules": [{"type": "order.*"}]}));
        let again: Config = toml::from_str(&toml::to_string(&config).unwrap()).unwrap();
        assert_eq!(config, again);
    }

    #[test]
    fn a_mistake_in_the_section_is_named() {
        for (text, expect) in [
            ("[address]\ndeadline = 5\n", "plugins.address: unknown field `deadline`"),
            ("[address]\non_failure = 'ignore'\n", "unknown variant `ignore`"),
            ("[address]\ndeadline_ms = 0\n", "plugins.address.deadline_ms is 0; give it 1 to 10000"),
            ("[address]\nsha256 = 'abc'\n", "plugins.address.sha256 is no hash"),
            ("folder = 'x'\n", "plugins.folder"),
            ("dir = 5\n", "string"),
        ] {
            let error = toml::from_str::<Config>(text).unwrap_err().to_string();
            assert!(error.contains(expect), "{text} gave: {error}");
        }
    }

    #[test]
    fn the_defaults_of_a_plugin_are_the_limits_of_the_engine() {
        assert_eq!(Settings::default().limits(), Limits::default());
        assert_eq!(Settings::default().check(), Ok(()));
    }
}
