//! Every metric in one table, under `pointsman_`. Names and labels are an API boundary; labels are bounded, never a user or an event id.
//!
//! A [`Metrics`] handle is passed in; there is no global. Served by `http` on the admin listener in the OpenMetrics text format.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// The key of a source.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct SourceLabel {
    pub source: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct OutcomeLabel {
    /// One of the five outcome words.
    pub outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PluginLabel {
    pub plugin: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PluginCallLabel {
    pub plugin: String,
    /// `ok`, or the kind of failure: `deadline`, `memory`, `trap`, `refused`, `failed`.
    pub outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PluginLoadLabel {
    pub plugin: String,
    /// `loaded`, or `failed`: what ran before, if anything did, goes on.
    pub outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PluginCacheLabel {
    /// `hit`, `miss`, `damaged` (there, of no use, and removed), or `unwritten` (compiled, and could not be kept).
    pub outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PluginShadowLabel {
    pub plugin: String,
    /// `same`, `different`, `failed` (the candidate only), or `skipped` (too many waited).
    pub outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReasonLabel {
    /// A fixed word of the code.
    pub reason: &'static str,
}

type DurationFamily<L> = Family<L, Histogram, fn() -> Histogram>;

macro_rules! metrics {
    ($( $(#[doc = $help:literal])+ $field:ident: $kind:ty = $name:literal $(, unit $unit:expr)? $(, new $new:expr)? ;)+) => {
        /// A cheap handle: clones share the numbers.
        #[derive(Clone, Debug)]
        pub struct Metrics {
            $( $(#[doc = $help])+ pub $field: $kind, )+
            registry: Arc<Registry>,
        }

        impl Default for Metrics {
            fn default() -> Self {
                let mut registry = Registry::with_prefix("pointsman");
                $(
                    let $field: $kind = metrics!(@new $($new)?);
                    let help = [$($help),+].join(" ");
                    metrics!(@register registry, $name, help.trim().trim_end_matches('.'), $field $(, $unit)?);
                )+
                Self { $($field,)+ registry: Arc::new(registry) }
            }
        }
    };
    (@new) => { Default::default() };
    (@new $new:expr) => { $new };
    (@register $registry:ident, $name:literal, $help:expr, $field:ident) => { $registry.register($name, $help, $field.clone()) };
    (@register $registry:ident, $name:literal, $help:expr, $field:ident, $unit:expr) => { $registry.register_with_unit($name, $help, $unit, $field.clone()) };
}

fn call_durations() -> Histogram {
    Histogram::new([
        1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 1e-3, 1e-2, 5e-2, 1.0,
    ])
}

metrics! {
    /// Entries read from the sources: the five outcomes, those in flight, and those read again after a refusal.
    events_read: Family<SourceLabel, Counter> = "events_read";
    /// Entries read again because a commit was refused or its outcome unknown.
    events_reread: Family<SourceLabel, Counter> = "events_reread";
    /// Events by outcome, as committed by this node.
    events: Family<OutcomeLabel, Counter> = "events";
    /// Entries beyond the position.
    source_lag: Family<SourceLabel, Gauge> = "source_lag_entries";
    /// Entries that somebody else removed from a source before any node read them, as the broker counts them.
    source_entries_lost: Family<SourceLabel, Counter> = "source_entries_lost";
    /// Events whose ids the window of a source had no room to remember, so that a retry of them is not known as one.
    source_ids_forgotten: Family<SourceLabel, Counter> = "source_ids_forgotten";
    /// Dead letters that wait for a redrive.
    dead_letters: Family<SourceLabel, Gauge> = "dead_letters";
    /// Dead letters that were the oldest when there were too many, and are gone.
    dead_letters_trimmed: Family<SourceLabel, Counter> = "dead_letters_trimmed";
    /// Times that this node found the broker away.
    broker_away: Counter = "broker_away";
    /// Calls of plugins by how they ended.
    plugin_calls: Family<PluginCallLabel, Counter> = "plugin_calls";
    /// How long calls of plugins took.
    plugin_call_duration: DurationFamily<PluginLabel> = "plugin_call_duration", unit Unit::Seconds, new Family::new_with_constructor(call_durations as fn() -> Histogram);
    /// Files of plugins that were loaded or were not, at the start and whenever they changed.
    plugin_loads: Family<PluginLoadLabel, Counter> = "plugin_loads";
    /// Compiled plugins that were looked for in the cache, or could not be put there.
    plugin_cache: Family<PluginCacheLabel, Counter> = "plugin_cache";
    /// Times that a plugin's generation failed too often, or an operator had enough of it, and the one before took over again.
    plugin_rollbacks: Family<PluginLabel, Counter> = "plugin_rollbacks";
    /// 1 while a plugin failed on so many events in a row that it is asked only now and then.
    plugin_breaker_open: Family<PluginLabel, Gauge> = "plugin_breaker_open";
    /// Calls of plugins that a candidate beside them was asked about as well, by what it would have decided.
    plugin_shadow_comparisons: Family<PluginShadowLabel, Counter> = "plugin_shadow_comparisons";
    /// Instances of plugins that are kept for the next event.
    plugin_instances: Gauge = "plugin_instances";
    /// Open streams on this node.
    streams_open: Gauge = "streams_open";
    /// Streams ended by this node, by reason.
    streams_closed: Family<ReasonLabel, Counter> = "streams_closed";
    /// Notifications written to streams.
    notifications_sent: Counter = "notifications_sent";
    /// Times that a stream's buffer was full and it went back to replay.
    stream_overflows: Counter = "stream_overflows";
    /// Replays begun, by cause.
    replays: Family<ReasonLabel, Counter> = "replays";
    /// Gaps announced, by reason.
    gaps: Family<ReasonLabel, Counter> = "gaps";
    /// Logs that this node follows.
    logs_followed: Gauge = "logs_followed";
    /// Times that the feed was lost and made again.
    feed_resets: Counter = "feed_resets";
    /// Requests to the HTTP interface refused, by reason.
    requests_refused: Family<ReasonLabel, Counter> = "requests_refused";
    /// Process start, in seconds since the Unix epoch.
    start_time: Gauge<f64, AtomicU64> = "start_time", unit Unit::Seconds;
}

impl Metrics {
    /// All metrics in the OpenMetrics text format.
    pub fn render(&self) -> String {
        let mut text = String::new();
        match encode(&mut text, &self.registry) {
            Ok(()) => text,
            // Writing to a String does not fail; if the library refuses a metric, the reader of the page must see it.
            Err(error) => format!("{text}# error {error}\n"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rendered_names_are_the_documented_ones() {
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
        ] {
            assert!(page.contains(line), "{line} is not in:\n{page}");
        }
    }
}
