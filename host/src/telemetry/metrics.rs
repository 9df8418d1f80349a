//! Every metric. Those in the table have the prefix `pointsman_`; the start time of the process has
//! the conventional name without it. Names and labels are public API, documented in
//! `docs/metrics.md`, which a test compares with a node. Labels are bounded; none is a user or an
//! event id.
//!
//! A [`Metrics`] handle is passed in, because no registry is global. `http` serves the metrics on
//! the admin listener in the OpenMetrics text format.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::SystemTime;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

/// The key of a source.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct SourceLabel {
    pub source: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct OutcomeLabel {
    /// One of the outcomes.
    pub outcome: &'static str,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct BridgeLabel {
    pub bridge: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct BridgeMessageLabel {
    pub bridge: String,
    /// `appended`, `unresolved` (a template finds no value), `invalid` (the event would be),
    /// `too_large`, `overflow` (too many were waiting) or `lost` (this node lost its lease or
    /// stopped first).
    pub outcome: &'static str,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PluginLabel {
    pub plugin: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PluginCallLabel {
    pub plugin: String,
    /// `ok`, a verdict (`rejected`, `retry`), a failure (`deadline`, `memory`, `trap`,
    /// `invalid_output`) or `host_memory`.
    pub outcome: &'static str,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PluginLoadLabel {
    pub plugin: String,
    /// `loaded` or `failed`; after a failure the previous version, if any, stays active.
    pub outcome: &'static str,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PluginCacheLabel {
    /// `hit`, `miss`, `corrupt` (found but unusable, and removed) or `write_failed` (compiled but
    /// not stored).
    pub outcome: &'static str,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PluginVerdictLabel {
    pub plugin: String,
    /// The word in decision records.
    pub verdict: &'static str,
}

/// The active generation of a plugin.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PluginInfoLabel {
    pub plugin: String,
    /// From its manifest.
    pub version: String,
    /// The first 12 digits of the SHA-256 of its file, and of its configuration.
    pub hash: String,
    pub config_hash: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PluginCompilationLabel {
    /// `compiled`, `refused` (the file cannot be compiled), `timeout` or `memory` (it exceeds the
    /// budget), `cancelled` (it was replaced meanwhile) or `failed` (the host lacked something).
    pub outcome: &'static str,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PluginShadowLabel {
    pub plugin: String,
    /// `same`, `different`, `failed` (the candidate only) or `skipped` (too many were waiting).
    pub outcome: &'static str,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReasonLabel {
    /// A fixed word from the code.
    pub reason: &'static str,
}

type DurationFamily<L> = Family<L, Histogram, fn() -> Histogram>;

macro_rules! metrics {
    ($( $(#[doc = $help:literal])+ $field:ident: $kind:ty = $name:literal $(, unit $unit:expr)? $(, new $new:expr)? ;)+) => {
        /// A cheap handle: clones share the metrics.
        #[derive(Clone, Debug)]
        pub struct Metrics {
            $( $(#[doc = $help])+ pub $field: $kind, )+
            /// Start time of the process since the Unix epoch, in seconds.
            pub process_start_time: Gauge<f64, AtomicU64>,
            registry: Arc<Registry>,
        }

        impl Default for Metrics {
            fn default() -> Self {
                let mut all = Registry::default();
                let process_start_time = Gauge::default();
                all.register_with_unit(
                    "process_start_time",
                    "Start time of the process since the Unix epoch",
                    Unit::Seconds,
                    process_start_time.clone(),
                );
                let registry = all.sub_registry_with_prefix("pointsman");
                registry.register("build", "Version of this node", Info::new(build()));
                $(
                    let $field: $kind = metrics!(@new $($new)?);
                    // Every doc line begins with a space, and the library ends the help with a
                    // period.
                    let help = [$($help.trim()),+].join(" ");
                    metrics!(@register registry, $name, help.trim_end_matches('.'), $field $(, $unit)?);
                )+
                Self { $($field,)+ process_start_time, registry: Arc::new(all) }
            }
        }

        #[cfg(test)]
        impl Metrics {
            fn touch_all(&self) {
                $( tests::Touch::touch(&self.$field); )+
            }
        }
    };
    (@new) => { Default::default() };
    (@new $new:expr) => { $new };
    (@register $registry:ident, $name:literal, $help:expr, $field:ident) => { $registry.register($name, $help, $field.clone()) };
    (@register $registry:ident, $name:literal, $help:expr, $field:ident, $unit:expr) => { $registry.register_with_unit($name, $help, $unit, $field.clone()) };
}

/// The labels of `build_info`: the version, and the revision if the build was given one.
fn build() -> Vec<(&'static str, &'static str)> {
    let version = ("version", env!("CARGO_PKG_VERSION"));
    let revision = option_env!("POINTSMAN_REVISION").map(|revision| ("revision", revision));
    [version].into_iter().chain(revision).collect()
}

fn call_durations() -> Histogram {
    Histogram::new([
        1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 1e-3, 1e-2, 5e-2, 1.0,
    ])
}

metrics! {
    /// Entries read from the sources: those with an outcome, those in flight and those read again.
    events_read: Family<SourceLabel, Counter> = "events_read";
    /// Entries read again because a commit was rejected or its outcome is unknown.
    events_reread: Family<SourceLabel, Counter> = "events_reread";
    /// Events by outcome, as committed by this node.
    events: Family<OutcomeLabel, Counter> = "events";
    /// Entries after the position, not yet processed.
    source_lag: Family<SourceLabel, Gauge> = "source_lag_entries";
    /// Entries trimmed from a source before any node read them, as counted by the broker.
    source_entries_trimmed_unread: Family<SourceLabel, Counter> = "source_entries_trimmed_unread";
    /// Event ids that did not fit the dedupe window of a source; a retry of one is not detected.
    dedupe_overflows: Family<SourceLabel, Counter> = "dedupe_overflows";
    /// Dead letters stored, waiting to be redriven or dropped.
    dead_letters: Family<SourceLabel, Gauge> = "dead_letters";
    /// Events that wait for a retry that a plugin requested.
    retrying: Family<SourceLabel, Gauge> = "retrying_events";
    /// Dead letters deleted as the oldest because their number exceeded the limit.
    dead_letters_trimmed: Family<SourceLabel, Counter> = "dead_letters_trimmed";
    /// Errors of the broker that stopped the processing of a source on this node.
    broker_errors: Counter = "broker_errors";
    /// Messages received on the channel of a bridge, by outcome.
    bridge_messages: Family<BridgeMessageLabel, Counter> = "bridge_messages";
    /// 1 while this node is subscribed to the channel of a bridge.
    bridge_listening: Family<BridgeLabel, Gauge> = "bridge_listening";
    /// Times that this node took a bridge over from a node that did not release it.
    bridge_takeovers: Family<BridgeLabel, Counter> = "bridge_takeovers";
    /// Times that a connection to the channel of a bridge was lost.
    bridge_connections_lost: Family<BridgeLabel, Counter> = "bridge_connections_lost";
    /// Time in which no node was subscribed to the channel of a bridge, at most.
    bridge_unheard: Family<BridgeLabel, Counter<f64, AtomicU64>> = "bridge_unheard", unit Unit::Seconds;
    /// Plugin calls, by outcome.
    plugin_calls: Family<PluginCallLabel, Counter> = "plugin_calls";
    /// Duration of plugin calls.
    plugin_call_duration: DurationFamily<PluginLabel> = "plugin_call_duration", unit Unit::Seconds, new Family::new_with_constructor(call_durations as fn() -> Histogram);
    /// Verdicts of the plugins that were called for a live event, by kind.
    plugin_verdicts: Family<PluginVerdictLabel, Counter> = "plugin_verdicts";
    /// Memory of the instances of a plugin that are kept for the next event.
    plugin_memory: Family<PluginLabel, Gauge> = "plugin_memory", unit Unit::Bytes;
    /// 1 for the active generation of each plugin.
    plugin_info: Family<PluginInfoLabel, Gauge> = "plugin_info";
    /// Time that compiling the loaded files of a plugin took; nothing for code from the cache.
    plugin_compile: Family<PluginLabel, Counter<f64, AtomicU64>> = "plugin_compile", unit Unit::Seconds;
    /// Plugin files loaded or failed to load, at startup and after changes, by outcome.
    plugin_loads: Family<PluginLoadLabel, Counter> = "plugin_loads";
    /// Look-ups of compiled plugins in the cache and failures to store them, by outcome.
    plugin_compile_cache: Family<PluginCacheLabel, Counter> = "plugin_compile_cache";
    /// Compilations of plugin files, by outcome.
    plugin_compilations: Family<PluginCompilationLabel, Counter> = "plugin_compilations";
    /// Rollbacks of a plugin to its previous generation, automatic or by an admin command.
    plugin_rollbacks: Family<PluginLabel, Counter> = "plugin_rollbacks";
    /// 1 while a plugin is called only occasionally after failing on many events in a row.
    plugin_breaker_open: Family<PluginLabel, Gauge> = "plugin_breaker_open";
    /// Plugin calls repeated on a candidate, by comparison of the results.
    plugin_shadow_comparisons: Family<PluginShadowLabel, Counter> = "plugin_shadow_comparisons";
    /// Plugin instances kept for the next event.
    plugin_instances: Gauge = "plugin_instances";
    /// Open streams on this node.
    streams_open: Gauge = "streams_open";
    /// Streams ended by this node, by reason.
    streams_closed: Family<ReasonLabel, Counter> = "streams_closed";
    /// Streams refused by this node with a reconnect delay, by reason.
    streams_refused: Family<ReasonLabel, Counter> = "streams_refused";
    /// Notifications written to streams.
    notifications_sent: Counter = "notifications_sent";
    /// Bytes of notifications that wait in the buffers of all streams.
    stream_buffer_bytes: Gauge = "stream_buffer_bytes";
    /// Times that a stream returned to replay because its buffer was full.
    stream_overflows: Counter = "stream_overflows";
    /// Replays started, by cause.
    replays: Family<ReasonLabel, Counter> = "replays";
    /// Gaps announced, by reason.
    gaps: Family<ReasonLabel, Counter> = "gaps";
    /// Logs that this node follows.
    logs_followed: Gauge = "logs_followed";
    /// Times that the feed was lost and opened again.
    feed_resets: Counter = "feed_resets";
    /// Connections closed without a response because there were too many, by bound.
    connections_refused: Family<ReasonLabel, Counter> = "connections_refused";
    /// Requests to the HTTP interface rejected, by reason.
    requests_refused: Family<ReasonLabel, Counter> = "requests_refused";
    /// Responses other than streams cut because their client took nothing for the stall timeout.
    responses_stalled: Counter = "responses_stalled";
}

impl Metrics {
    /// Sets the start time of the process to now.
    pub fn note_start(&self) {
        let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let seconds = since_epoch.unwrap_or_default().as_secs_f64();
        self.process_start_time.set(seconds);
    }

    /// All metrics in the OpenMetrics text format.
    pub fn render(&self) -> String {
        let mut text = String::new();
        match encode(&mut text, &self.registry) {
            Ok(()) => text,
            // Writing to a String cannot fail. If the library rejects a metric, the scraper must
            // see the error.
            Err(error) => format!("{text}# error {error}\n"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::hash::Hash;

    use prometheus_client::metrics::family::MetricConstructor;

    use super::*;

    /// Creates a series of a metric: an empty family is not rendered.
    pub(super) trait Touch {
        fn touch(&self) {}
    }
    impl<N, A> Touch for Counter<N, A> {}
    impl Touch for Gauge {}
    impl<L, M, C> Touch for Family<L, M, C>
    where
        L: Clone + Default + Hash + Eq + EncodeLabelSet,
        C: MetricConstructor<M>,
    {
        fn touch(&self) {
            drop(self.get_or_create(&L::default()));
        }
    }

    /// The rows of docs/metrics.md: by name, the type and the labels, where optional ones are left
    /// out.
    fn documented() -> BTreeMap<String, (String, BTreeSet<String>)> {
        let page = include_str!("../../../docs/metrics.md");
        let rows = page.lines().filter_map(|line| {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            let name = cells.get(1)?.strip_prefix('`')?.strip_suffix('`')?;
            if !name.contains("_") || cells.len() < 6 {
                return None;
            }
            let kind = cells[2].split(',').next().unwrap_or_default();
            let labels = cells[3]
                .split(';')
                .filter(|label| !label.contains("optional"));
            let labels =
                labels.filter_map(|label| label.trim().strip_prefix('`')?.split('`').next());
            Some((
                name.to_owned(),
                (kind.to_owned(), labels.map(str::to_owned).collect()),
            ))
        });
        rows.collect()
    }

    #[test]
    fn every_metric_is_documented_and_every_documented_one_exists() {
        let metrics = Metrics::default();
        metrics.touch_all();
        let page = metrics.render();
        let mut rendered = BTreeMap::new();
        for line in page.lines() {
            let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|l| l.split_once(' '))
            else {
                continue;
            };
            let suffix = match kind {
                "counter" => "_total",
                "info" => "_info",
                _ => "",
            };
            let series = page.lines().find(|line| {
                let end = line.strip_prefix(name);
                // Not another metric whose name begins with this one.
                end.is_some_and(|end| {
                    end.trim_start_matches(suffix).starts_with(['{', ' '])
                        || end.starts_with("_bucket")
                })
            });
            let labels = series
                .and_then(|series| series.split_once('{')?.1.split_once('}'))
                .map(|(labels, _)| labels.split(','))
                .into_iter()
                .flatten()
                .filter_map(|label| label.split('=').next())
                .filter(|label| !["le", "revision"].contains(label));
            rendered.insert(
                format!("{name}{suffix}"),
                (kind.to_owned(), labels.map(str::to_owned).collect()),
            );
        }
        assert!(rendered.len() > 20);
        assert_eq!(documented(), rendered);
    }

    #[test]
    fn rendered_names_match_the_documentation() {
        let metrics = Metrics::default();
        metrics
            .events
            .get_or_create(&OutcomeLabel {
                outcome: "committed",
            })
            .inc();
        metrics
            .plugin_call_duration
            .get_or_create(&PluginLabel {
                plugin: "address".into(),
            })
            .observe(0.001);
        let page = metrics.render();
        for line in [
            "pointsman_events_total{outcome=\"committed\"} 1",
            "pointsman_plugin_call_duration_seconds_bucket",
            "pointsman_streams_open 0",
            "\nprocess_start_time_seconds 0",
            concat!(
                "pointsman_build_info{version=\"",
                env!("CARGO_PKG_VERSION"),
                "\""
            ),
        ] {
            assert!(page.contains(line), "{line} is missing from:\n{page}");
        }
        // A help text of several doc lines has single spaces and one period.
        for help in page.lines().filter(|line| line.starts_with("# HELP ")) {
            assert!(!help.contains("  ") && !help.contains(".."), "{help}");
        }
    }
}
