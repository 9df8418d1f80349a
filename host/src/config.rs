//! From what the user wrote to what the node needs, in two steps: [`RawConfig`] is `pointsman.toml` with the environment and the command line
//! laid over it; [`Config`] is checked and ready, made from it by one step that may fail.
//!
//! Each section's struct and defaults stand beside the code that it configures; this file composes them. The command line goes before the
//! environment, the environment before the file, the file before the defaults. An [`Error`] is one line: where, which key, what to do.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::auth::{self, Auth};
use crate::broker::Retention;
use crate::delivery::sse;
use crate::event::Name;
use crate::http::{self, Origins};
use crate::plugin::registry::settings;
use crate::{ingest, server};

mod layers;
pub(crate) mod reload;

pub use layers::Layers;
pub use reload::{ConfigOrigin, ConfigSource};

/// The most of any time that is added to a clock, in seconds.
const TEN_YEARS_S: u64 = 315_360_000;

/// `pointsman config --defaults`: every key with its default and what it is for. A test reads it back.
pub const DEFAULTS: &str = include_str!("config/defaults.toml");

/// The file that is read where none is named and it is there.
pub const DEFAULT_FILE: &str = "pointsman.toml";

/// The options of `serve`, by their long name, with the key that each one sets. As environment variables they are `POINTSMAN_` and the
/// name; every other key is `POINTSMAN_<SECTION>_<KEY>`.
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

/// What the user wrote, or would have.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RawConfig {
    pub node: Node,
    pub listen: server::Config,
    pub broker: Broker,
    pub retention: Retention,
    pub plugins: settings::Config,
    pub auth: auth::Config,
    pub stream: sse::Config,
    pub ingest: ingest::Config,
    pub limits: http::Limits,
    pub log: Log,
}

/// The `[node]` section.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Node {
    /// What this node is called: under its own name, one that starts again takes its old leases at once (host and listen address).
    pub name: Option<Name>,
    /// Be ready without a plugin: every event is then unrouted (false).
    pub allow_no_plugins: bool,
}

/// The `[broker]` section: one of the first three.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Broker {
    /// The URL of a Redis (none).
    pub redis: Option<String>,
    /// The folder of the embedded broker, made where it is not there (none).
    pub data: Option<PathBuf>,
    /// Keep everything in memory and lose it with the process (false).
    pub ephemeral: bool,
    /// The keys of the sources, 1 to 8 (`pointsman:events`).
    pub sources: Vec<String>,
}

impl Default for Broker {
    fn default() -> Self {
        Self {
            redis: None,
            data: None,
            ephemeral: false,
            sources: vec!["pointsman:events".to_owned()],
        }
    }
}

/// The `[log]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// What is logged, as `tracing` filters are written (`info`).
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

/// What a node needs to run.
#[derive(Debug)]
pub struct Config {
    pub node: Node,
    pub listen: server::Config,
    pub origins: Origins,
    pub broker: BrokerChoice,
    pub sources: Vec<String>,
    pub retention: Retention,
    pub plugins: settings::Config,
    pub auth: Auth,
    pub stream: sse::Config,
    pub ingest: ingest::Config,
    pub limits: http::Limits,
    pub log: Log,
    /// So that what changes in the file can be taken over while the node runs; `None`: nothing is.
    pub origin: Option<ConfigOrigin>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BrokerChoice {
    Redis { url: String },
    Data(PathBuf),
    Ephemeral,
}

impl Config {
    /// The one step from what was written to what is needed.
    ///
    /// # Errors
    /// Something is missing, excludes something else, or is out of its range.
    pub fn new(layers: &Layers) -> Result<Self, Error> {
        let RawConfig {
            node,
            listen,
            broker,
            retention,
            plugins,
            auth,
            stream,
            ingest,
            mut limits,
            log,
        } = layers.raw()?;
        let addresses: [SocketAddr; 2] = [listen.address, listen.admin];
        if listen.address == listen.admin && listen.address.port() != 0 {
            return Err(layers.fault(
                "listen.admin",
                format!(
                    "is {} as listen.address is; give it a port of its own",
                    listen.admin
                ),
            ));
        }
        let at_least = |key: &str, value: u64, least: u64| {
            if value < least {
                Err(layers.fault(key, format!("is {value}; give at least {least}")))
            } else {
                Ok(())
            }
        };
        at_least("listen.max_connections", listen.max_connections as u64, 1)?;
        at_least("listen.header_timeout_s", listen.header_timeout_s, 1)?;
        at_least(
            "ingest.max_event_bytes",
            ingest.max_event_bytes as u64,
            1024,
        )?;
        if ingest.max_event_bytes > 512 * 1024 {
            let text = format!(
                "is {}; give at most 524288, as an event and its plan must fit one commit",
                ingest.max_event_bytes
            );
            return Err(layers.fault("ingest.max_event_bytes", text));
        }
        // One bound with one key: what is published must not be dead-lettered for its size.
        limits.event_bytes = ingest.max_event_bytes;
        at_least(
            "limits.batch_bytes",
            limits.batch_bytes as u64,
            limits.event_bytes as u64,
        )?;
        at_least("ingest.lease_ms", ingest.lease_ms, 500)?;
        at_least("stream.heartbeat_s", stream.heartbeat_s, 1)?;
        at_least("stream.stall_s", stream.stall_s, 1)?;
        at_least("stream.cursor_s", stream.cursor_s, 1)?;
        at_least("stream.max_open", stream.max_open as u64, 1)?;
        at_least("limits.batch_events", limits.batch_events as u64, 1)?;
        at_least("limits.publish_requests", limits.publish_requests as u64, 1)?;
        at_least("limits.body_timeout_s", limits.body_timeout_s, 1)?;
        // A record outlives its ids by 2 % of this, and that must be more than two clocks differ.
        at_least("retention.max_age_s", retention.max_age_s, 600)?;
        at_least("retention.log_entries", retention.log_entries.into(), 1)?;
        at_least(
            "retention.everyone_entries",
            retention.everyone_entries.into(),
            1,
        )?;
        at_least("retention.dedupe_window_s", retention.dedupe_window_s, 1)?;
        at_least("retention.backlog_entries", retention.backlog_entries, 1)?;
        at_least(
            "retention.device_cursor_ttl_s",
            retention.device_cursor_ttl_s,
            60,
        )?;
        at_least("retention.devices", retention.devices.into(), 1)?;
        for (key, value) in [
            ("stream.heartbeat_s", stream.heartbeat_s),
            ("stream.stall_s", stream.stall_s),
            ("stream.cursor_s", stream.cursor_s),
            ("stream.max_age_s", stream.max_age_s),
            ("retention.max_age_s", retention.max_age_s),
            ("retention.keep_s", retention.keep_s),
            ("retention.dedupe_window_s", retention.dedupe_window_s),
            (
                "retention.device_cursor_ttl_s",
                retention.device_cursor_ttl_s,
            ),
        ] {
            // What is added to a time must stay one.
            if value > TEN_YEARS_S {
                return Err(layers.fault(
                    key,
                    format!("is {value}; give at most {TEN_YEARS_S}, which is ten years"),
                ));
            }
        }
        check_sources(layers, &broker.sources)?;
        let choice = choose(layers, &broker)?;
        let origins = Origins::new(&listen.origins, auth.dev)
            .map_err(|text| layers.fault("listen.origins", text))?;
        let auth = Auth::new(&auth, &addresses)
            .map_err(|(key, text)| layers.fault(&format!("auth.{key}"), text))?;
        tracing_subscriber::EnvFilter::try_new(&log.filter).map_err(|e| {
            layers.fault(
                "log.filter",
                format!(
                    "'{}' is no filter ({e}); write one as in info,pointsman=debug",
                    log.filter.escape_debug()
                ),
            )
        })?;
        Ok(Self {
            node,
            listen,
            origins,
            broker: choice,
            sources: broker.sources,
            retention,
            plugins,
            auth,
            stream,
            ingest,
            limits,
            log,
            origin: None,
        })
    }

    /// The folder of compiled plugins; `None`: there is no use for one, or no place.
    pub fn plugin_cache(&self) -> Option<PathBuf> {
        let data = if let BrokerChoice::Data(folder) = &self.broker {
            Some(folder.as_path())
        } else {
            None
        };
        self.plugins.cache_folder(data)
    }
}

fn choose(layers: &Layers, broker: &Broker) -> Result<BrokerChoice, Error> {
    match (&broker.redis, &broker.data, broker.ephemeral) {
        (Some(url), None, false) => {
            if !["redis://", "unix:", "redis+unix:"]
                .iter()
                .any(|scheme| url.starts_with(scheme))
            {
                // The URL may hold a password, so it is not repeated.
                return Err(layers.fault(
                    "broker.redis",
                    "is no URL of a Redis; write it as in redis://127.0.0.1:6379",
                ));
            }
            Ok(BrokerChoice::Redis { url: url.clone() })
        }
        (None, Some(folder), false) => Ok(BrokerChoice::Data(folder.clone())),
        (None, None, true) => Ok(BrokerChoice::Ephemeral),
        (None, None, false) => Err(layers.fault(
            "broker",
            "none is chosen; give --redis redis://127.0.0.1:6379, --data FOLDER or --ephemeral",
        )),
        _ => Err(layers.fault(
            "broker",
            "redis, data and ephemeral exclude each other; keep one",
        )),
    }
}

fn check_sources(layers: &Layers, sources: &[String]) -> Result<(), Error> {
    let fault = |text: String| Err(layers.fault("broker.sources", text));
    if !(1..=8).contains(&sources.len()) {
        return fault(format!("names {} sources; give 1 to 8", sources.len()));
    }
    for (n, source) in sources.iter().enumerate() {
        if let Err(e) = Name::parse(source) {
            return fault(format!(
                "'{}' {e}; write a key as in pointsman:events",
                source.escape_debug()
            ));
        }
        if sources[..n].contains(source) {
            return fault(format!("names '{source}' twice; keep one"));
        }
    }
    Ok(())
}

/// A configuration error, in one line: where it stands, which key, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error(String);

impl Error {
    fn new(place: impl fmt::Display, text: impl fmt::Display) -> Self {
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
    fn the_printed_defaults_are_the_defaults_and_name_every_key() {
        assert_eq!(
            toml::from_str::<RawConfig>(DEFAULTS).unwrap(),
            RawConfig::default()
        );
        // Keys without a default stand commented out; so does nothing else that looks like a key.
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
        toml::from_str::<RawConfig>(&all.to_string())
            .expect("what is commented out must be a key, too");
        for section in layers::sections().keys() {
            // The deserializer lists the keys that it knows when it meets one that it does not. In [plugins], every other key is a plugin.
            let error =
                toml::from_str::<RawConfig>(&format!("[{section}]\nno_such_key = 1")).unwrap_err();
            let known = if section == "plugins" {
                vec!["dir", "order"]
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
    fn the_command_line_goes_before_the_environment_before_the_file_before_the_defaults() {
        let file = "[listen]\naddress = \"127.0.0.1:1\"\nadmin = \"127.0.0.1:2\"\ngrace_s = 3\n[broker]\nephemeral = true\n[auth]\ndev = true\n";
        let environment = [
            ("POINTSMAN_ADMIN", "127.0.0.1:22"),
            ("POINTSMAN_LISTEN", "127.0.0.1:11"),
            ("POINTSMAN_LOG", "debug"),
        ];
        let config = layers(file, &environment, &[("listen", "127.0.0.1:111")]).unwrap();
        assert_eq!(config.listen.address.port(), 111);
        assert_eq!(config.listen.admin.port(), 22);
        assert_eq!(config.listen.grace_s, 3);
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
            ("POINTSMAN_LISTEN_ORIGINS", "[\"https://shop.example\"]"),
            ("POINTSMAN_DATA", ""),
            ("POINTSMAN_SERVICE_HOST", "10.0.0.1"),
            ("POINTSMAN_URL", "http://127.0.0.1:8080"),
            ("PATH", "/bin"),
        ];
        let config = layers("", &environment, &[]).unwrap();
        assert_eq!(config.sources, ["a", "b"]);
        assert_eq!(config.retention.log_entries, 5);
        assert_eq!(config.node.name.unwrap().as_str(), "7");
        assert_eq!(config.broker, BrokerChoice::Ephemeral);
    }

    #[test]
    fn a_broker_chosen_above_puts_the_one_below_out_of_force() {
        let file = "[broker]\nredis = \"redis://a\"\n[auth]\ndev = true\n";
        let choice = |environment: &[(&str, &str)], options: &[(&'static str, &str)]| {
            layers(file, environment, options).map(|config| config.broker)
        };
        assert_eq!(
            choice(&[], &[]),
            Ok(BrokerChoice::Redis {
                url: "redis://a".into()
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
                url: "redis://a".into()
            })
        );
        assert!(choice(&[], &[("ephemeral", "true"), ("data", "/d")]).is_err());
    }

    #[test]
    fn an_error_is_one_line_that_names_place_key_and_fix() {
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
            "[nodes]\n",
            &[],
            &[],
            &["p.toml:1: unknown field `nodes`", "`node`"],
        );
        // At its line, also where the section is read by hand.
        let plugin = |table: &str| {
            format!("[plugins]\norder = []\n[plugins.first]\n\n[plugins.second]\n{table}\n")
        };
        check(
            &plugin("dead_line_ms = 5"),
            &[],
            &[],
            &[
                "p.toml:6: plugins.second.dead_line_ms: unknown field `dead_line_ms`",
                "`deadline_ms`",
            ],
        );
        check(
            &plugin("deadline_ms = 0"),
            &[],
            &[],
            &["p.toml:5: plugins.second: deadline_ms is 0; give it 1 to 10000"],
        );
        check(
            "[plugins]\ndirs = \"x\"\n",
            &[],
            &[],
            &[
                "p.toml:2: plugins.dirs: ",
                "the keys of this section itself are dir, order and cache",
            ],
        );
        check(
            "[retention]\nkeep_s = \"long\"\n",
            &[],
            &[],
            &["p.toml:2: retention.keep_s: invalid type", "expected u64"],
        );
        check(
            good,
            &[("POINTSMAN_RETENTION_KEEP_S", "long")],
            &[],
            &[
                "POINTSMAN_RETENTION_KEEP_S: retention.keep_s: ",
                "expected u64",
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
            &["p.toml: broker: none is chosen; give --redis"],
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
                "POINTSMAN_REDIS: broker.redis: is no URL",
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
            &[("POINTSMAN_RETENTION_MAX_AGE_S", "60")],
            &[],
            &["retention.max_age_s: is 60; give at least 600"],
        );
        let endless = i64::MAX.to_string();
        for (variable, key) in [
            ("RETENTION_MAX_AGE_S", "retention.max_age_s"),
            ("STREAM_CURSOR_S", "stream.cursor_s"),
        ] {
            check(
                good,
                &[(&format!("POINTSMAN_{variable}"), &endless)],
                &[],
                &[key, "give at most 315360000, which is ten years"],
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
            &["POINTSMAN_LOG: log.filter: 'a=b=c' is no filter"],
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
