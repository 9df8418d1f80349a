//! The `[plugins]` section of the configuration: the folder, the order, and a table for each plugin
//! that needs one.
//!
//! Parsed values are within their bounds, and an error names its key. `config` reads the text,
//! `registry` applies the settings.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::health::HealthPolicy;
use crate::duration;
use crate::plugin::{CompileBudget, Limits};

/// The `[plugins]` section of the configuration: keys of its own, and a table for each plugin that
/// needs one. Defaults are in parentheses.
///
/// A plugin with the name of one of these keys cannot be configured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Config {
    /// The plugin folder; its `.wasm` files are loaded, and it is watched for changes (none).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dir: Option<PathBuf>,
    /// Plugin names in calling order; the other plugins follow in the order of their file names
    /// (none).
    pub order: Vec<String>,
    /// Load only the plugins that this section names, in `order` or by a table (false).
    pub only_configured: bool,
    /// The folder of the compile cache, private to this user; `false` or `""` disables the cache
    /// (`plugins` in the folder of `broker.data`; without one, `pointsman` in `$XDG_CACHE_HOME` or
    /// `~/.cache`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
    /// CPU time of compiling a file, 1s to 1h (2m). On the clock it may take ten times as long.
    #[serde(with = "crate::duration")]
    pub compile_timeout: Duration,
    /// Address space of the process that compiles a file in MiB, 256 to 65,536 (2,048).
    pub compile_memory_mib: u32,
    /// `[plugins.<name>]`.
    #[serde(flatten)]
    pub plugins: BTreeMap<String, Settings>,
}

impl Default for Config {
    fn default() -> Self {
        let budget = CompileBudget::default();
        Self {
            dir: None,
            order: Vec::new(),
            only_configured: false,
            cache: None,
            compile_timeout: budget.time,
            compile_memory_mib: budget.memory_mib,
            plugins: BTreeMap::new(),
        }
    }
}

impl Config {
    /// What compiling one file may cost.
    pub fn compile_budget(&self) -> CompileBudget {
        CompileBudget {
            time: self.compile_timeout,
            memory_mib: self.compile_memory_mib,
        }
    }

    /// # Errors
    /// The key, the problem and the fix.
    fn check(&self) -> Result<(), String> {
        let (least, most) = (Duration::from_secs(1), Duration::from_secs(3_600));
        if !(least..=most).contains(&self.compile_timeout) {
            let [value, least, most] = [self.compile_timeout, least, most].map(duration::format);
            return Err(format!(
                "compile_timeout is \"{value}\"; give it \"{least}\" to \"{most}\""
            ));
        }
        if !(256..=65_536).contains(&self.compile_memory_mib) {
            return Err(format!(
                "compile_memory_mib is {}; give it 256 to 65536",
                self.compile_memory_mib
            ));
        }
        Ok(())
    }

    /// The folder of the compile cache. `None` if the cache is disabled, no plugin folder is
    /// configured, or no location is known. `data` is the folder of the embedded broker.
    pub fn cache_folder(&self, data: Option<&Path>) -> Option<PathBuf> {
        self.dir.as_ref()?;
        if let Some(folder) = &self.cache {
            return Some(folder.clone()).filter(|folder| !folder.as_os_str().is_empty());
        }
        data.map(|data| data.join("plugins"))
            .or_else(user_cache_folder)
    }

    /// Whether `order` or a table names this plugin.
    pub(super) fn names(&self, name: &str) -> bool {
        self.plugins.contains_key(name) || self.order.iter().any(|ordered| ordered == name)
    }
}

/// The folder of compiled plugins of this user: `pointsman` in `$XDG_CACHE_HOME` or `~/.cache`.
/// `None`: neither is known.
pub fn user_cache_folder() -> Option<PathBuf> {
    let variable = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    variable("XDG_CACHE_HOME")
        .or_else(|| Some(variable("HOME")?.join(".cache")))
        .map(|caches| caches.join("pointsman"))
}

/// `[plugins.<name>]`: the settings of one plugin. Defaults are in parentheses.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Whether the plugin is loaded (true).
    pub enabled: bool,
    /// The policy for events while the plugin has no active version: `wait` or `skip` (continue
    /// without this plugin) (`wait`).
    pub on_missing: OnMissing,
    /// The policy for an event on which the plugin failed twice: `dead-letter`, `skip` (continue
    /// without this plugin) or `drop` (`dead-letter`).
    pub on_failure: OnFailure,
    /// CPU time of a call, 1ms to 10s (50ms).
    #[serde(with = "crate::duration")]
    pub deadline: Duration,
    /// Maximum memory of an instance in MiB, 1 to 4,096 (32).
    pub memory_mib: u32,
    /// Maximum size of the text in an answer in KiB, 1 to 65,536 (256).
    pub result_kib: u32,
    /// Maximum number of targets in an answer, 1 to 1,000,000 (10,000).
    pub max_targets: u32,
    /// Calls after which an instance is replaced by a fresh one, at least 1 (10,000).
    pub calls_per_instance: u32,
    /// Probation of a new version, 0s to 24h, and at least its first 20 events (60s; 0s: none). If
    /// it fails too often, the previous version takes over again.
    #[serde(with = "crate::duration")]
    pub probation: Duration,
    /// Maximum share of events in the probation that may fail, in percent, 1 to 100 (10). Fewer
    /// than 5 failures never count.
    pub probation_failure_percent: u32,
    /// Consecutive failures that open the breaker: only one event is then tried now and then, at
    /// first after a second, later once a minute (10; 0: never).
    pub breaker_failures: u32,
    /// If set, only the file with this SHA-256 in hexadecimal is loaded (none).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// The plugin's own configuration, passed to it as JSON (none).
    #[serde(skip_serializing_if = "serde_json::Map::is_empty")]
    pub config: serde_json::Map<String, serde_json::Value>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            enabled: true,
            on_missing: OnMissing::Wait,
            on_failure: OnFailure::DeadLetter,
            deadline: Duration::from_millis(50),
            memory_mib: 32,
            result_kib: 256,
            max_targets: 10_000,
            calls_per_instance: 10_000,
            probation: Duration::from_secs(60),
            probation_failure_percent: 10,
            breaker_failures: 10,
            sha256: None,
            config: serde_json::Map::new(),
        }
    }
}

/// The policy for events while a plugin has no active version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnMissing {
    /// Events wait on this node; another node that has the plugin decides them.
    #[default]
    Wait,
    /// Continue as if the plugin did not exist.
    Skip,
}

/// The policy for an event on which a plugin failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFailure {
    #[default]
    DeadLetter,
    /// Continue as if the plugin did not exist.
    Skip,
    Drop,
}

impl Settings {
    /// # Errors
    /// The key, the problem and the fix.
    fn check(&self) -> Result<(), String> {
        let numbers = [
            ("memory_mib", self.memory_mib, 1, 4_096),
            ("result_kib", self.result_kib, 1, 65_536),
            ("max_targets", self.max_targets, 1, 1_000_000),
            ("calls_per_instance", self.calls_per_instance, 1, u32::MAX),
            (
                "probation_failure_percent",
                self.probation_failure_percent,
                1,
                100,
            ),
        ];
        for (key, value, least, most) in numbers {
            if !(least..=most).contains(&value) {
                return Err(format!("{key} is {value}; give it {least} to {most}"));
            }
        }
        let durations = [
            (
                "deadline",
                self.deadline,
                Duration::from_millis(1),
                Duration::from_secs(10),
            ),
            (
                "probation",
                self.probation,
                Duration::ZERO,
                Duration::from_secs(86_400),
            ),
        ];
        for (key, value, least, most) in durations {
            if !(least..=most).contains(&value) {
                let [value, least, most] = [value, least, most].map(duration::format);
                return Err(format!(
                    "{key} is \"{value}\"; give it \"{least}\" to \"{most}\""
                ));
            }
        }
        match &self.sha256 {
            Some(hash) if hash.len() != 64 || !hash.bytes().all(|b| b.is_ascii_hexdigit()) => Err(
                "sha256 is not a valid hash; use 64 hexadecimal digits, as printed by `sha256sum FILE`"
                    .to_owned(),
            ),
            _ => Ok(()),
        }
    }

    /// The resource limits of the plugin.
    pub fn limits(&self) -> Limits {
        Limits {
            deadline: self.deadline,
            memory_bytes: self.memory_mib as usize * 1024 * 1024,
            result_bytes: self.result_kib as usize * 1024,
            targets: self.max_targets as usize,
            calls_per_instance: self.calls_per_instance,
            ..Limits::default()
        }
    }

    pub(super) fn policy(&self) -> HealthPolicy {
        HealthPolicy {
            probation: self.probation,
            probation_failure_percent: self.probation_failure_percent.into(),
            breaker_failures: self.breaker_failures,
        }
    }

    /// A copy without the plugin's own configuration, which may hold secrets.
    pub(super) fn shown(&self) -> Self {
        Self {
            config: serde_json::Map::new(),
            ..self.clone()
        }
    }
}

impl Config {
    /// The settings of the plugin with this name, or the defaults.
    pub(super) fn settings(&self, name: &str) -> Settings {
        self.plugins.get(name).cloned().unwrap_or_default()
    }
}

/// Settings that are within their bounds.
struct Checked(Settings);

impl<'de> Deserialize<'de> for Checked {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let what = "a table for a plugin (the other keys of this section are dir, order, only_configured, cache, compile_timeout and compile_memory_mib)";
        let settings: Settings = crate::table::deserialize_as(what, d)?;
        // Checked while parsing, so that the error gets the position of the table in the file.
        settings.check().map_err(D::Error::custom)?;
        Ok(Self(settings))
    }
}

/// Implemented by hand for the keys that are not plugins. Errors of a plugin's table are passed on
/// unchanged, or their position in the file would be lost.
impl<'de> Deserialize<'de> for Config {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Sections;
        impl<'de> Visitor<'de> for Sections {
            type Value = Config;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the keys dir, order, only_configured, cache, compile_timeout and compile_memory_mib, and a table for each plugin")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Config, A::Error> {
                let mut config = Config::default();
                while let Some(key) = map.next_key::<String>()? {
                    match key.as_str() {
                        "dir" => config.dir = Some(map.next_value()?),
                        "order" => config.order = map.next_value()?,
                        "only_configured" => config.only_configured = map.next_value()?,
                        "compile_timeout" => {
                            let CompileTimeout(time) = map.next_value()?;
                            config.compile_timeout = time;
                        }
                        "compile_memory_mib" => config.compile_memory_mib = map.next_value()?,
                        "cache" => {
                            let FolderOrNone(folder) = map.next_value()?;
                            config.cache = Some(folder);
                        }
                        _ => {
                            let Checked(settings) = map.next_value()?;
                            config.plugins.insert(key, settings);
                        }
                    }
                }
                config.check().map_err(A::Error::custom)?;
                Ok(config)
            }
        }
        d.deserialize_map(Sections)
    }
}

/// The key `compile_timeout`.
#[derive(Deserialize)]
struct CompileTimeout(#[serde(with = "crate::duration")] Duration);

/// The key `cache`; an empty path means that the cache is disabled.
struct FolderOrNone(PathBuf);

impl<'de> Deserialize<'de> for FolderOrNone {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        match serde_json::Value::deserialize(d)? {
            // Environment variables arrive as text. A folder of this name is written `./false`.
            serde_json::Value::String(text) if text == "false" => Ok(Self(PathBuf::new())),
            serde_json::Value::String(text) => Ok(Self(PathBuf::from(text))),
            serde_json::Value::Bool(false) => Ok(Self(PathBuf::new())),
            other => Err(D::Error::custom(format!(
                "plugins.cache is {other}; use a folder as a string, or false to disable it"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_section_holds_its_own_keys_and_a_table_per_plugin() {
        let config: Config = toml::from_str(
            "dir = 'build/plugins'\norder = ['discard', 'address']\nonly_configured = true\n[discard]\non_failure = 'skip'\ndeadline = '5ms'\n[[discard.config.rules]]\nmatch.type = 'order.*'\n",
        )
        .unwrap();
        assert_eq!(config.dir.as_deref(), Some(Path::new("build/plugins")));
        assert!(config.only_configured && config.names("discard") && config.names("address"));
        assert!(!config.names("rules"));
        let discard = &config.plugins["discard"];
        assert_eq!(
            (discard.on_failure, discard.deadline, discard.memory_mib),
            (OnFailure::Skip, Duration::from_millis(5), 32)
        );
        assert_eq!(
            serde_json::Value::Object(discard.config.clone()),
            serde_json::json!({"rules": [{"match": {"type": "order.*"}}]})
        );
        let again: Config = toml::from_str(&toml::to_string(&config).unwrap()).unwrap();
        assert_eq!(config, again);
    }

    #[test]
    fn an_error_in_the_section_names_the_key_and_its_position() {
        for (text, expect, place) in [
            (
                "[address]\ndeadline_ms = 5\n",
                "unknown field `deadline_ms`",
                10..21,
            ),
            (
                "[address]\ndeadline = 5\n",
                "5 has no unit; write \"5ms\", \"5s\"",
                21..22,
            ),
            (
                "[address]\non_failure = 'ignore'\n",
                "unknown variant `ignore`",
                23..31,
            ),
            (
                "[first]\n[address]\ndeadline = '0s'\n",
                "deadline is \"0s\"; give it \"1ms\" to \"10s\"",
                8..17,
            ),
            (
                "[address]\nsha256 = 'abc'\n",
                "sha256 is not a valid hash",
                0..9,
            ),
            (
                "folder = 'x'\n",
                "a table for a plugin (the other keys of this section are dir, order, only_configured, cache, compile_timeout and compile_memory_mib)",
                9..12,
            ),
            ("address = [true]\n", "is a list; write a table", 10..16),
            ("dir = 5\n", "string", 6..7),
            (
                "cache = true\n",
                "plugins.cache is true; use a folder as a string, or false",
                8..12,
            ),
        ] {
            let error = toml::from_str::<Config>(text).unwrap_err();
            assert!(error.message().contains(expect), "{text} gave: {error}");
            assert_eq!(error.span(), Some(place), "{text} gave: {error}");
        }
    }

    #[test]
    fn the_cache_folder_is_the_configured_one_or_next_to_the_data() {
        let folder_of = |text: &str| {
            toml::from_str::<Config>(text)
                .unwrap()
                .cache_folder(Some(Path::new("/data")))
        };
        assert_eq!(folder_of(""), None, "without plugins");
        let folder = |text: &str| folder_of(&format!("dir = 'plugins'\n{text}"));
        assert_eq!(folder(""), Some("/data/plugins".into()));
        assert_eq!(
            folder("cache = '/var/cache/p'"),
            Some("/var/cache/p".into())
        );
        for none in ["cache = ''", "cache = false", "cache = 'false'"] {
            assert_eq!(folder(none), None, "{none}");
        }
    }

    #[test]
    fn the_default_settings_match_the_default_limits() {
        assert_eq!(Settings::default().limits(), Limits::default());
        assert_eq!(Settings::default().check(), Ok(()));
    }
}
