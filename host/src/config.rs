//! The configuration of a node, in two steps. [`RawConfig`] is `pointsman.toml` overlaid with the
//! environment and the command line; [`Config`] is checked and ready for use.
//!
//! The command line overrides the environment, the environment the file, the file the defaults.
//! Each section's struct and defaults are defined next to the code that it configures; this file
//! composes them, `layers` overlays the sources and `checks` holds the bounds of the keys. An
//! [`Error`] is one line with the place, the key, the reason and the fix.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::auth::{self, Auth};
use crate::bridge::{self, Bridge};
use crate::broker::redis::Prefix;
use crate::broker::{RecipientLimits, Retention};
use crate::delivery::sse;
use crate::event::Name;
use crate::http::{self, Origins};
use crate::ingest;
use crate::plugin::CompileIn;
use crate::plugin::registry::settings;
use crate::rate::Rate;
use crate::server::{self, AddressLimits, ClientAddresses};

mod checks;
mod layers;
pub(crate) mod reload;
pub(crate) mod secrets;

pub use layers::Layers;
pub use reload::{ConfigOrigin, ConfigSource};

/// The output of `pointsman config --defaults`: every key with its default and its meaning. A test
/// reads it back.
pub const DEFAULTS: &str = include_str!("config/defaults.toml");

/// The file that is read if none is named and this one exists.
pub const DEFAULT_FILE: &str = "pointsman.toml";

/// The options of `serve` by their long names, with the key that each one sets. Their environment
/// variables are `POINTSMAN_<OPTION>`; every key also has `POINTSMAN_<SECTION>_<KEY>`.
pub const OPTIONS: [(&str, &str); 11] = [
    ("redis", "broker.redis"),
    ("data", "broker.data"),
    ("ephemeral", "broker.ephemeral"),
    ("listen", "listen.address"),
    ("admin", "listen.admin"),
    ("plugins", "plugins.dir"),
    ("allow-no-plugins", "node.allow_no_plugins"),
    ("dev", "auth.dev"),
    ("node", "node.name"),
    ("log", "log.filter"),
    ("log-format", "log.format"),
];

/// The configuration as written, with defaults for missing keys. Values have the right type but are
/// not checked against each other.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawConfig {
    #[serde(deserialize_with = "crate::table::deserialize")]
    pub node: Node,
    #[serde(deserialize_with = "crate::table::deserialize")]
    pub listen: server::Config,
    #[serde(deserialize_with = "crate::table::deserialize")]
    pub broker: Broker,
    #[serde(deserialize_with = "crate::table::deserialize")]
    pub retention: Retention,
    #[serde(deserialize_with = "crate::table::deserialize")]
    pub recipients: RecipientLimits,
    pub plugins: settings::Config,
    #[serde(deserialize_with = "crate::table::deserialize")]
    pub auth: auth::Config,
    #[serde(deserialize_with = "crate::table::deserialize")]
    pub stream: sse::Config,
    #[serde(deserialize_with = "crate::table::deserialize")]
    pub ingest: ingest::Config,
    #[serde(deserialize_with = "crate::table::deserialize")]
    pub limits: http::Limits,
    #[serde(deserialize_with = "crate::table::deserialize")]
    pub defaults: Defaults,
    /// The `[[bridge]]` tables.
    #[serde(deserialize_with = "crate::table::deserialize_list")]
    pub bridge: Vec<bridge::Settings>,
    #[serde(deserialize_with = "crate::table::deserialize")]
    pub log: Log,
}

/// The `[node]` section.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Node {
    /// The name under which the node takes leases; a node that restarts with the same name
    /// reclaims its leases at once (host name and listen address).
    pub name: Option<Name>,
    /// Be ready without a plugin; every event is then unrouted (false).
    pub allow_no_plugins: bool,
}

/// The `[broker]` section: exactly one of the first three keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Broker {
    /// The URL of a Redis (none).
    pub redis: Option<String>,
    /// The folder of the embedded broker, created if it does not exist (none).
    pub data: Option<PathBuf>,
    /// Use the embedded broker in memory; its data is lost with the process (false).
    pub ephemeral: bool,
    /// The prefix of all keys, channels and consumer groups in Redis (`pointsman`): installations
    /// with different prefixes may share a database. In each broker, the default source has it.
    pub prefix: String,
    /// The keys of the sources, 1 to 8 (`<prefix>:events`).
    pub sources: Option<Vec<String>>,
}

impl Default for Broker {
    fn default() -> Self {
        Self {
            redis: None,
            data: None,
            ephemeral: false,
            prefix: Prefix::default().to_string(),
            sources: None,
        }
    }
}

/// The `[defaults]` section.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Defaults {
    /// The type of events by `POST /v1/events` and by bridges that have none (none).
    pub r#type: Option<Name>,
}

/// The `[log]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// A filter in the syntax of `tracing` (`info`).
    pub filter: String,
    /// `text` or `json` (text).
    pub format: LogFormat,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            filter: "info".to_owned(),
            format: LogFormat::Text,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// The checked configuration of a node.
#[derive(Debug)]
pub struct Config {
    pub node: Node,
    pub listen: server::Config,
    pub origins: Origins,
    pub addresses: ClientAddresses,
    pub broker: BrokerChoice,
    pub sources: Vec<String>,
    pub retention: Retention,
    pub plugins: settings::Config,
    pub auth: Auth,
    pub stream: sse::Config,
    pub ingest: ingest::Config,
    pub limits: http::Limits,
    pub defaults: Defaults,
    pub bridges: Vec<Bridge>,
    pub log: Log,
    /// Set by a program that can compile plugins in processes of its own.
    pub compile_in: CompileIn,
    /// For reloading a changed file while the node runs; `None`: nothing is reloaded.
    pub origin: Option<ConfigOrigin>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BrokerChoice {
    Redis { url: String, prefix: Prefix },
    Data(PathBuf),
    Ephemeral,
}

impl Config {
    /// Checks the configuration and reads the files that it names.
    ///
    /// # Errors
    /// A key is missing, conflicts with another, or is out of its bounds.
    pub fn new(layers: &Layers) -> Result<Self, Error> {
        let RawConfig {
            node,
            listen,
            broker,
            mut retention,
            recipients,
            plugins,
            auth,
            stream,
            ingest,
            mut limits,
            defaults,
            bridge,
            log,
        } = layers.raw()?;
        // Each of these bounds has one key, in the section where an operator looks for it. An event
        // that was accepted by HTTP must not be dead-lettered for its size.
        limits.event_bytes = ingest.max_event_bytes;
        retention.backlog_entries = limits.backlog_entries;
        retention.max_event_bytes = ingest.max_event_bytes;
        retention.max_groups_per_user = recipients.max_groups_per_user;
        checks::listen(layers, &listen)?;
        checks::ingest(layers, &ingest)?;
        checks::stream(layers, &stream)?;
        checks::limits(layers, &limits)?;
        checks::retention(layers, &retention)?;
        checks::recipients(layers, &recipients)?;
        let prefix = checks::prefix(layers, &broker)?;
        let choice = checks::broker(layers, &broker, &prefix)?;
        let sources = broker
            .sources
            .unwrap_or_else(|| vec![prefix.default_source()]);
        checks::sources(layers, &sources, &choice)?;
        checks::untrimmed_sources(layers, &retention.untrimmed_sources, &sources)?;
        let bridges = checks::bridges(layers, bridge, &defaults, &sources, &choice)?;
        checks::auth(layers, &auth)?;
        let origins = Origins::new(&listen.origins, auth.dev)
            .map_err(|text| layers.fault("listen.origins", text))?
            .with_admin_hosts(&listen.admin_hosts)
            .map_err(|text| layers.fault("listen.admin_hosts", text))?
            .with_webhook_origins(&listen.webhook_origins)
            .map_err(|text| layers.fault("listen.webhook_origins", text))?;
        let per_address = AddressLimits {
            max_in_progress: listen.max_connections_per_address,
            rate: Rate::new(listen.connection_rate_per_address),
            proxy_protocol: listen.proxy_protocol,
        };
        let addresses = ClientAddresses::new(&listen.trusted_proxies, per_address)
            .map_err(|text| layers.fault("listen.trusted_proxies", text))?;
        let auth = Auth::new(&auth, &[listen.address, listen.admin])
            .map_err(|(key, text)| layers.fault(&format!("auth.{key}"), text))?;
        checks::log(layers, &log)?;
        Ok(Self {
            node,
            listen,
            origins,
            addresses,
            broker: choice,
            sources,
            retention,
            plugins,
            auth,
            stream,
            ingest,
            limits,
            defaults,
            bridges,
            log,
            compile_in: CompileIn::default(),
            origin: None,
        })
    }

    /// The folder of the compile cache. `None` if the cache is disabled, no plugin folder is
    /// configured, or no location is known.
    pub fn plugin_cache(&self) -> Option<PathBuf> {
        let data = if let BrokerChoice::Data(folder) = &self.broker {
            Some(folder.as_path())
        } else {
            None
        };
        self.plugins.cache_folder(data)
    }
}

/// A configuration error in one line: the place, the key, the reason and the fix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error(String);

impl Error {
    fn new(place: impl fmt::Display, text: impl fmt::Display) -> Self {
        // Errors of the TOML parser may span lines.
        Self(
            format!("{place}: {text}")
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" "),
        )
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use toml::Table;

    use super::*;

    fn layers(
        file: &str,
        environment: &[(&str, &str)],
        options: &[(&'static str, &str)],
    ) -> Result<Config, Error> {
        let environment = environment
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        let options = options.iter().map(|(k, v)| (*k, (*v).to_owned()));
        Config::new(
            &Layers::text(Path::new("p.toml"), file)?
                .environment(environment)?
                .options(options)?,
        )
    }

    #[test]
    fn the_printed_defaults_match_the_code_and_contain_every_key() {
        assert_eq!(
            toml::from_str::<RawConfig>(DEFAULTS).unwrap(),
            RawConfig::default()
        );
        // Keys without a default are commented out; no other comment looks like a key.
        let bare = |line: &str| {
            line.strip_prefix("# ")
                .filter(|rest| {
                    rest.split(" = ").next().is_some_and(|key| {
                        !key.is_empty() && key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
                    }) && rest.contains(" = ")
                })
                .unwrap_or(line)
                .to_owned()
        };
        let all: Table = DEFAULTS
            .lines()
            .map(|line| bare(line) + "\n")
            .collect::<String>()
            .parse()
            .unwrap();
        toml::from_str::<RawConfig>(&all.to_string()).expect("everything commented out is a key");
        for section in layers::sections().keys() {
            // On an unknown key the deserializer lists the known ones. In [plugins], every other
            // key is a plugin.
            let error =
                toml::from_str::<RawConfig>(&format!("[{section}]\nno_such_key = 1")).unwrap_err();
            let known = if section == "plugins" {
                vec![
                    "dir",
                    "order",
                    "only_configured",
                    "compile_timeout",
                    "compile_memory_mib",
                ]
            } else {
                error.message().split('`').skip(3).step_by(2).collect()
            };
            assert!(!known.is_empty(), "{section}: {error}");
            for key in known {
                assert!(
                    all[section].get(key).is_some(),
                    "{section}.{key} is not in config/defaults.toml"
                );
            }
        }
    }

    #[test]
    fn the_command_line_overrides_the_environment_the_file_and_the_defaults() {
        let file = "[listen]\naddress = \"127.0.0.1:1\"\nadmin = \"127.0.0.1:2\"\nshutdown_grace = \"3s\"\n[broker]\nephemeral = true\n[auth]\ndev = true\n";
        let environment = [
            ("POINTSMAN_ADMIN", "127.0.0.1:22"),
            ("POINTSMAN_LISTEN", "127.0.0.1:11"),
            ("POINTSMAN_LOG", "debug"),
        ];
        let config = layers(file, &environment, &[("listen", "127.0.0.1:111")]).unwrap();
        assert_eq!(config.listen.address.port(), 111);
        assert_eq!(config.listen.admin.port(), 22);
        assert_eq!(config.listen.shutdown_grace, Duration::from_secs(3));
        assert_eq!(config.log.filter, "debug");
        assert_eq!(config.listen.max_connections, 10_000);
    }

    #[test]
    fn every_key_is_an_environment_variable() {
        let environment = [
            ("POINTSMAN_EPHEMERAL", "1"),
            ("POINTSMAN_DEV", "true"),
            ("POINTSMAN_BROKER_SOURCES", "a, b"),
            ("POINTSMAN_RETENTION_LOG_ENTRIES", "5"),
            ("POINTSMAN_NODE", "7"),
            ("POINTSMAN_INGEST_LEASE_TTL", "750ms"),
            ("POINTSMAN_STREAM_MAX_AGE", "0s"),
            ("POINTSMAN_LIMITS_BACKLOG_ENTRIES", "3"),
            ("POINTSMAN_LISTEN_ORIGINS", "[\"https://shop.example\"]"),
            ("POINTSMAN_DATA", ""),
            ("POINTSMAN_SERVICE_HOST", "10.0.0.1"),
            ("POINTSMAN_URL", "http://127.0.0.1:8080"),
            ("PATH", "/bin"),
        ];
        let config = layers("", &environment, &[]).unwrap();
        assert_eq!(config.sources, ["a", "b"]);
        assert_eq!(config.retention.log_entries, 5);
        assert_eq!(config.retention.backlog_entries, 3);
        assert_eq!(config.ingest.lease_ttl, Duration::from_millis(750));
        assert!(config.stream.max_age.is_zero());
        assert_eq!(config.node.name.unwrap().as_str(), "7");
        assert_eq!(config.broker, BrokerChoice::Ephemeral);
    }

    #[test]
    fn the_default_source_has_the_prefix() {
        let sources = |environment: &[(&str, &str)]| {
            let file = "[broker]\nredis = \"redis://a\"\n[auth]\ndev = true\n";
            layers(file, environment, &[]).unwrap().sources
        };
        assert_eq!(sources(&[]), ["pointsman:events"]);
        assert_eq!(
            sources(&[("POINTSMAN_BROKER_PREFIX", "shop")]),
            ["shop:events"]
        );
        let both = [
            ("POINTSMAN_BROKER_PREFIX", "shop"),
            ("POINTSMAN_BROKER_SOURCES", "orders"),
        ];
        assert_eq!(sources(&both), ["orders"]);
    }

    #[test]
    fn a_broker_chosen_in_one_layer_replaces_the_choice_of_the_layers_below() {
        let file = "[broker]\nredis = \"redis://a\"\n[auth]\ndev = true\n";
        let choice = |environment: &[(&str, &str)], options: &[(&'static str, &str)]| {
            layers(file, environment, options).map(|config| config.broker)
        };
        assert_eq!(
            choice(&[], &[]),
            Ok(BrokerChoice::Redis {
                url: "redis://a".into(),
                prefix: Prefix::default(),
            })
        );
        assert_eq!(
            choice(&[("POINTSMAN_DATA", "/d")], &[]),
            Ok(BrokerChoice::Data("/d".into()))
        );
        assert_eq!(
            choice(&[("POINTSMAN_DATA", "/d")], &[("ephemeral", "true")]),
            Ok(BrokerChoice::Ephemeral)
        );
        assert_eq!(
            choice(&[("POINTSMAN_EPHEMERAL", "0")], &[]),
            Ok(BrokerChoice::Redis {
                url: "redis://a".into(),
                prefix: Prefix::default(),
            })
        );
        assert!(choice(&[], &[("ephemeral", "true"), ("data", "/d")]).is_err());
    }

    #[test]
    fn an_error_is_one_line_with_place_key_and_fix() {
        let check = |file: &str,
                     environment: &[(&str, &str)],
                     options: &[(&'static str, &str)],
                     parts: &[&str]| {
            let error = layers(file, environment, options).unwrap_err().to_string();
            assert!(!error.contains('\n'), "{error:?}");
            for part in parts {
                assert!(error.contains(part), "'{part}' is not in: {error}");
            }
        };
        let good = "[broker]\nephemeral = true\n[auth]\ndev = true\n";
        check(
            "[listen]\n\naddres = 1\n",
            &[],
            &[],
            &[
                "p.toml:3: listen.addres: unknown field",
                "expected one of `address`",
                "config --defaults",
            ],
        );
        check("[listen\n", &[], &[], &["p.toml:1"]);
        check(
            "\nlisten = [\"127.0.0.1:1\", \"127.0.0.1:2\"]\n",
            &[],
            &[],
            &["p.toml:2: listen: is a list; write a table"],
        );
        check(
            "[nodes]\n",
            &[],
            &[],
            &["p.toml:1: unknown field `nodes`", "`node`"],
        );
        // With its line, although this section is deserialized by hand.
        let plugin = |table: &str| {
            format!("[plugins]\norder = []\n[plugins.first]\n\n[plugins.second]\n{table}\n")
        };
        check(
            &plugin("deadline_ms = 5"),
            &[],
            &[],
            &[
                "p.toml:6: plugins.second.deadline_ms: unknown field `deadline_ms`",
                "`deadline`",
            ],
        );
        check(
            &plugin("deadline = \"0s\""),
            &[],
            &[],
            &["p.toml:5: plugins.second: deadline is \"0s\"; give it \"1ms\" to \"10s\""],
        );
        check(
            "[plugins]\ndirs = \"x\"\n",
            &[],
            &[],
            &[
                "p.toml:2: plugins.dirs: ",
                "the other keys of this section are dir, order, only_configured, cache, compile_timeout and compile_memory_mib",
            ],
        );
        check(
            "[retention]\nprocessed_ttl = 600\n",
            &[],
            &[],
            &[
                "p.toml:2: retention.processed_ttl: unknown field",
                "`processed_entries_ttl`",
            ],
        );
        check(
            "[retention]\nprocessed_entries_ttl = 600\n",
            &[],
            &[],
            &[
                "p.toml:2: retention.processed_entries_ttl: 600 has no unit; write \"600ms\", \"600s\"",
            ],
        );
        check(
            good,
            &[("POINTSMAN_RETENTION_PROCESSED_ENTRIES_TTL", "600")],
            &[],
            &[
                "POINTSMAN_RETENTION_PROCESSED_ENTRIES_TTL: retention.processed_entries_ttl: ",
                "600 has no unit; write \"600ms\", \"600s\"",
            ],
        );
        check(
            "[retention]\nlog_entries = \"long\"\n",
            &[],
            &[],
            &[
                "p.toml:2: retention.log_entries: invalid type",
                "expected u32",
            ],
        );
        check(
            good,
            &[("POINTSMAN_RETENTION_LOG_ENTRIES", "long")],
            &[],
            &[
                "POINTSMAN_RETENTION_LOG_ENTRIES: retention.log_entries: ",
                "expected u32",
            ],
        );
        check(
            good,
            &[("POINTSMAN_LISTEN_ADDRES", "x")],
            &[],
            &["POINTSMAN_LISTEN_ADDRES: listen.addres: unknown field"],
        );
        check(
            good,
            &[],
            &[("listen", "localhost")],
            &["--listen: listen.address: ", "socket address"],
        );
        check(
            good,
            &[],
            &[("listen", "0.0.0.0:80")],
            &[
                "p.toml: auth.dev: ",
                "loopback only, not on 0.0.0.0:80",
                "auth.jwt_secret",
            ],
        );
        check(
            "[auth]\ndev = true\n",
            &[],
            &[],
            &["p.toml: broker: none is configured; give --redis"],
        );
        check(
            "[broker]\nephemeral = true\n",
            &[],
            &[],
            &["p.toml: auth.jwt_secret: is missing", "--dev"],
        );
        check(
            good,
            &[("POINTSMAN_REDIS", "localhost:6379")],
            &[],
            &[
                "POINTSMAN_REDIS: broker.redis: is not a valid Redis URL",
                "redis://127.0.0.1:6379",
            ],
        );
        check(
            good,
            &[("POINTSMAN_BROKER_SOURCES", "a,a")],
            &[],
            &["broker.sources: names 'a' twice"],
        );
        check(
            good,
            &[("POINTSMAN_BROKER_SOURCES", "a,b,c,d,e,f,g,h,i")],
            &[],
            &["names 9 sources; give 1 to 8"],
        );
        check(
            good,
            &[("POINTSMAN_BROKER_PREFIX", "a:b")],
            &[],
            &["POINTSMAN_BROKER_PREFIX: broker.prefix: 'a:b' has other characters; use 1 to 64"],
        );
        check(
            good,
            &[
                ("POINTSMAN_REDIS", "redis://a"),
                ("POINTSMAN_BROKER_PREFIX", "shop"),
                ("POINTSMAN_BROKER_SOURCES", "shop:user:ann"),
            ],
            &[],
            &[
                "broker.sources: source 'shop:user:ann' would share keys",
                "; give it another key",
            ],
        );
        check(
            good,
            &[("POINTSMAN_RETENTION_UNTRIMMED_SOURCES", "another")],
            &[],
            &[
                "POINTSMAN_RETENTION_UNTRIMMED_SOURCES: retention.untrimmed_sources: names 'another'",
                "not in broker.sources",
            ],
        );
        check(
            good,
            &[("POINTSMAN_RETENTION_MAX_AGE", "60s")],
            &[],
            &["retention.max_age: is \"1m\"; give at least \"10m\""],
        );
        for (variable, key) in [
            ("RETENTION_MAX_AGE", "retention.max_age"),
            ("STREAM_CURSOR_INTERVAL", "stream.cursor_interval"),
        ] {
            check(
                good,
                &[(&format!("POINTSMAN_{variable}"), "3651d")],
                &[],
                &[key, "give at most \"3650d\", which is ten years"],
            );
        }
        check(
            good,
            &[("POINTSMAN_INGEST_MAX_EVENT_BYTES", "1000000")],
            &[],
            &["give at most 524288"],
        );
        check(
            good,
            &[("POINTSMAN_LISTEN_ADMIN", "127.0.0.1:8080")],
            &[],
            &[
                "POINTSMAN_LISTEN_ADMIN: listen.admin: ",
                "a port of its own",
            ],
        );
        check(
            good,
            &[("POINTSMAN_LOG", "a=b=c")],
            &[],
            &["POINTSMAN_LOG: log.filter: 'a=b=c' is not a valid filter"],
        );
        check(
            good,
            &[("POINTSMAN_LOG_FORMAT", "xml")],
            &[],
            &["log.format: unknown variant", "`text`"],
        );
        let missing = Layers::file(Some(Path::new("/nowhere/p.toml")))
            .unwrap_err()
            .to_string();
        assert!(
            missing.starts_with("/nowhere/p.toml: cannot be read"),
            "{missing}"
        );
    }
}
