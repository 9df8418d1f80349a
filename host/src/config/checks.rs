//! The bounds of the keys, one function for each section.
//!
//! Types and durations are checked while parsing, and so are the tables of plugins
//! (`plugin::registry::settings`); secrets and origins are checked by the modules that hold them.

use std::fmt;
use std::time::Duration;

use super::{Broker, BrokerChoice, Defaults, Error, Layers, Log};
use crate::bridge::{self, Bridge};
use crate::broker::redis::{Prefix, check_url};
use crate::broker::{RecipientLimits, Retention};
use crate::delivery::sse;
use crate::event::Name;
use crate::{auth, duration, http, ingest, server};

/// The largest event. Together with its plan it must fit into one commit.
const MAX_EVENT_BYTES: usize = 512 * 1024;

/// A lower bound of a key.
struct AtLeast<'a, T>(&'a str, T, T);

fn numbers<const N: usize>(layers: &Layers, bounds: [AtLeast<'_, u64>; N]) -> Result<(), Error> {
    at_least(layers, bounds, |number| number.to_string())
}

fn durations<const N: usize>(
    layers: &Layers,
    bounds: [AtLeast<'_, Duration>; N],
) -> Result<(), Error> {
    at_least(layers, bounds, |d| format!("\"{}\"", duration::format(*d)))
}

fn at_least<T: PartialOrd, S: fmt::Display, const N: usize>(
    layers: &Layers,
    bounds: [AtLeast<'_, T>; N],
    show: impl Fn(&T) -> S,
) -> Result<(), Error> {
    match bounds.iter().find(|AtLeast(_, value, least)| value < least) {
        Some(AtLeast(key, value, least)) => {
            let text = format!("is {}; give at least {}", show(value), show(least));
            Err(layers.fault(key, text))
        }
        None => Ok(()),
    }
}

const SECOND: Duration = Duration::from_secs(1);

pub(super) fn listen(layers: &Layers, listen: &server::Config) -> Result<(), Error> {
    if listen.address == listen.admin && listen.address.port() != 0 {
        let text = format!(
            "is {}, the same as listen.address; give it a port of its own",
            listen.admin
        );
        return Err(layers.fault("listen.admin", text));
    }
    let pair = [
        ("listen.tls_certificate", &listen.tls_certificate),
        ("listen.tls_key", &listen.tls_key),
    ];
    if let [(given, Some(_)), (missing, None)] | [(missing, None), (given, Some(_))] = pair {
        let text = format!("is missing, but {given} is set; set both or none");
        return Err(layers.fault(missing, text));
    }
    match listen.certificate_files().map(|files| files.check()) {
        Some(Err((key, text))) => return Err(layers.fault(key, text)),
        None if listen.admin_tls => {
            let text = "needs a certificate; set listen.tls_certificate and listen.tls_key";
            return Err(layers.fault("listen.admin_tls", text.to_owned()));
        }
        Some(Ok(())) | None => {}
    }
    if listen.proxy_protocol && listen.trusted_proxies.is_empty() {
        let text =
            "is true, but listen.trusted_proxies is empty; list the proxies that send the header";
        return Err(layers.fault("listen.proxy_protocol", text));
    }
    numbers(
        layers,
        [
            AtLeast("listen.max_connections", listen.max_connections as u64, 1),
            AtLeast(
                "listen.max_connections_per_address",
                listen.max_connections_per_address as u64,
                1,
            ),
        ],
    )?;
    durations(
        layers,
        [
            AtLeast("listen.header_timeout", listen.header_timeout, SECOND),
            AtLeast("listen.idle_timeout", listen.idle_timeout, SECOND),
        ],
    )
}

pub(super) fn ingest(layers: &Layers, ingest: &ingest::Config) -> Result<(), Error> {
    let bytes = ingest.max_event_bytes;
    numbers(
        layers,
        [AtLeast("ingest.max_event_bytes", bytes as u64, 1024)],
    )?;
    if bytes > MAX_EVENT_BYTES {
        let text = format!(
            "is {bytes}; give at most {MAX_EVENT_BYTES}, as an event and its plan must fit one commit"
        );
        return Err(layers.fault("ingest.max_event_bytes", text));
    }
    let least = Duration::from_millis(500);
    durations(
        layers,
        [AtLeast("ingest.lease_ttl", ingest.lease_ttl, least)],
    )
}

pub(super) fn stream(layers: &Layers, stream: &sse::Config) -> Result<(), Error> {
    durations(
        layers,
        [
            AtLeast(
                "stream.heartbeat_interval",
                stream.heartbeat_interval,
                SECOND,
            ),
            AtLeast("stream.stall_timeout", stream.stall_timeout, SECOND),
            AtLeast("stream.cursor_interval", stream.cursor_interval, SECOND),
        ],
    )?;
    numbers(
        layers,
        [
            AtLeast("stream.max_open", stream.max_open as u64, 1),
            AtLeast(
                "stream.max_open_per_user",
                stream.max_open_per_user as u64,
                1,
            ),
            AtLeast(
                "stream.max_buffer_bytes",
                stream.max_buffer_bytes as u64,
                1024 * 1024,
            ),
        ],
    )
}

/// `limits.event_bytes` must be set.
pub(super) fn limits(layers: &Layers, limits: &http::Limits) -> Result<(), Error> {
    numbers(
        layers,
        [
            AtLeast("limits.backlog_entries", limits.backlog_entries, 1),
            AtLeast(
                "limits.batch_bytes",
                limits.batch_bytes as u64,
                limits.event_bytes as u64,
            ),
            AtLeast("limits.batch_events", limits.batch_events as u64, 1),
            AtLeast("limits.publish_requests", limits.publish_requests as u64, 1),
            AtLeast(
                "limits.response_bytes",
                limits.response_bytes as u64,
                1024 * 1024,
            ),
            AtLeast(
                "limits.body_bytes",
                limits.body_bytes as u64,
                // A part of the bytes is kept for the first bytes of each body.
                (2 * limits.batch_bytes as u64).max(8 * 1024 * 1024),
            ),
        ],
    )?;
    durations(
        layers,
        [
            AtLeast("limits.body_timeout", limits.body_timeout, SECOND),
            AtLeast(
                "limits.body_stall_timeout",
                limits.body_stall_timeout,
                SECOND,
            ),
        ],
    )
}

pub(super) fn retention(layers: &Layers, retention: &Retention) -> Result<(), Error> {
    let minute = 60 * SECOND;
    numbers(
        layers,
        [
            AtLeast("retention.log_entries", retention.log_entries.into(), 1),
            AtLeast(
                "retention.everyone_entries",
                retention.everyone_entries.into(),
                1,
            ),
            AtLeast(
                "retention.max_devices_per_user",
                retention.max_devices_per_user.into(),
                1,
            ),
        ],
    )?;
    durations(
        layers,
        [
            // A record outlives the ids that refer to it by 2 % of this age, which must be more
            // than the difference between two clocks.
            AtLeast("retention.max_age", retention.max_age, 10 * minute),
            AtLeast("retention.dedupe_window", retention.dedupe_window, SECOND),
            AtLeast(
                "retention.device_cursor_ttl",
                retention.device_cursor_ttl,
                minute,
            ),
        ],
    )
}

pub(super) fn auth(layers: &Layers, auth: &auth::Config) -> Result<(), Error> {
    durations(
        layers,
        [
            AtLeast(
                "auth.jwks_refresh_interval",
                auth.jwks_refresh_interval,
                SECOND,
            ),
            AtLeast("auth.jwks_retry_interval", auth.jwks_retry_interval, SECOND),
        ],
    )
}

pub(super) fn recipients(layers: &Layers, recipients: &RecipientLimits) -> Result<(), Error> {
    numbers(
        layers,
        [AtLeast(
            "recipients.max_groups_per_user",
            recipients.max_groups_per_user.into(),
            1,
        )],
    )
}

pub(super) fn prefix(layers: &Layers, broker: &Broker) -> Result<Prefix, Error> {
    Prefix::parse(&broker.prefix).map_err(|text| layers.fault("broker.prefix", text))
}

pub(super) fn untrimmed_sources(
    layers: &Layers,
    untrimmed: &[String],
    sources: &[String],
) -> Result<(), Error> {
    match untrimmed.iter().find(|source| !sources.contains(source)) {
        None => Ok(()),
        Some(source) => Err(layers.fault(
            "retention.untrimmed_sources",
            format!(
                "names '{}', which is not in broker.sources; add it there or remove it here",
                source.escape_debug()
            ),
        )),
    }
}

pub(super) fn sources(
    layers: &Layers,
    sources: &[String],
    choice: &BrokerChoice,
) -> Result<(), Error> {
    let fault = |text: String| Err(layers.fault("broker.sources", text));
    if !(1..=8).contains(&sources.len()) {
        return fault(format!("names {} sources; give 1 to 8", sources.len()));
    }
    for (n, source) in sources.iter().enumerate() {
        if let Err(e) = Name::parse(source) {
            return fault(format!(
                "'{}' {e}; use a key such as pointsman:events",
                source.escape_debug()
            ));
        }
        if sources[..n].contains(source) {
            return fault(format!("names '{source}' twice; keep one"));
        }
    }
    match choice {
        BrokerChoice::Redis { prefix, .. } => prefix.check_sources(sources).or_else(fault),
        BrokerChoice::Data(_) | BrokerChoice::Ephemeral => Ok(()),
    }
}

pub(super) fn broker(
    layers: &Layers,
    broker: &Broker,
    prefix: &Prefix,
) -> Result<BrokerChoice, Error> {
    match (&broker.redis, &broker.data, broker.ephemeral) {
        (Some(url), None, false) => {
            let schemes = ["redis://", "unix:", "redis+unix:"];
            if !schemes.iter().any(|scheme| url.starts_with(scheme)) {
                // The URL may hold a password, so it is not repeated.
                return Err(layers.fault(
                    "broker.redis",
                    "is not a valid Redis URL; use one such as redis://127.0.0.1:6379",
                ));
            }
            check_url(url).map_err(|error| {
                let text = format!(
                    "is not a valid URL of a Redis ({error}); write it as in redis://127.0.0.1:6379"
                );
                layers.fault("broker.redis", text)
            })?;
            Ok(BrokerChoice::Redis {
                url: url.clone(),
                prefix: prefix.clone(),
            })
        }
        (None, Some(folder), false) => Ok(BrokerChoice::Data(folder.clone())),
        (None, None, true) => Ok(BrokerChoice::Ephemeral),
        (None, None, false) => Err(layers.fault(
            "broker",
            "none is configured; give --redis redis://127.0.0.1:6379, --data FOLDER or --ephemeral",
        )),
        _ => Err(layers.fault(
            "broker",
            "redis, data and ephemeral are mutually exclusive; keep one",
        )),
    }
}

/// Bridges of a node: each has a connection to Redis and a series in each of its metrics.
const MAX_BRIDGES: usize = 32;

pub(super) fn bridges(
    layers: &Layers,
    tables: Vec<bridge::Settings>,
    defaults: &Defaults,
    sources: &[String],
    choice: &BrokerChoice,
) -> Result<Vec<Bridge>, Error> {
    if tables.is_empty() {
        return Ok(Vec::new());
    }
    let fault = |text: String| Err(layers.fault("bridge", text));
    let BrokerChoice::Redis { prefix, .. } = choice else {
        let reason = "needs Redis, because the embedded broker has no Pub/Sub";
        return fault(format!("{reason}; set broker.redis or remove [[bridge]]"));
    };
    if tables.len() > MAX_BRIDGES {
        let reason = format!("has {} tables; give at most {MAX_BRIDGES}", tables.len());
        return fault(format!("{reason}, with patterns such as \"user:*\""));
    }
    let mut bridges: Vec<Bridge> = Vec::with_capacity(tables.len());
    for (at, table) in tables.into_iter().enumerate() {
        let checked = table.check(defaults.r#type.as_ref(), sources);
        let bridge =
            checked.map_err(|(key, text)| layers.fault(&format!("bridge[{at}].{key}"), text))?;
        if prefix.owns(bridge.channel().as_str()) {
            let channel = bridge.channel().as_str();
            let text = format!(
                "'{channel}' is a channel of Pointsman itself, which begin with '{prefix}:'; use another channel, or set another broker.prefix"
            );
            return Err(layers.fault(&format!("bridge[{at}].channel"), text));
        }
        if bridges.iter().any(|other| other.name() == bridge.name()) {
            let text = format!(
                "'{}' is the name of another bridge, too; give one of them a name of its own (name = \"...\")",
                bridge.name()
            );
            return Err(layers.fault(&format!("bridge[{at}].name"), text));
        }
        bridges.push(bridge);
    }
    Ok(bridges)
}

pub(super) fn log(layers: &Layers, log: &Log) -> Result<(), Error> {
    let checked = tracing_subscriber::EnvFilter::try_new(&log.filter);
    checked.map(|_| ()).map_err(|e| {
        let text = format!(
            "'{}' is not a valid filter ({e}); use one such as info,pointsman=debug",
            log.filter.escape_debug()
        );
        layers.fault("log.filter", text)
    })
}
