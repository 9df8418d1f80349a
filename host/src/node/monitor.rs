//! How a node reaches its broker, and what it says of it and of its plugins afterwards: readiness is kept true to both, whatever becomes of
//! them.
//!
//! Nothing here stops anything. Ingest and streams go through an outage by themselves, and ingest waits for plugins by itself; this is for
//! whoever asks how the node is.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::broker::{self, Broker, Finding, Severity};
use crate::delivery::hub::Hub;
use crate::ingest::pipeline::Pipeline;
use crate::plugin::registry::Snapshot;
use crate::plugin::registry::state::{PluginState, Word};
use crate::shutdown::Shutdown;
use crate::telemetry::metrics::{Metrics, SourceLabel};
use crate::telemetry::readiness::Readiness;

/// How long between two looks at the broker's health.
const CHECK_EVERY: Duration = Duration::from_secs(2);

/// How full of dead letters a source is when operators are warned, in percent.
const DEAD_WARNING_PERCENT: u64 = 80;

/// The longest pause between two attempts to reach the broker.
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// Tries `connect` until it succeeds. Cancel-safe.
pub(crate) async fn reach<F: Future<Output = broker::Result<Arc<dyn Broker>>>>(
    mut connect: impl FnMut() -> F,
    readiness: &Readiness,
) -> Arc<dyn Broker> {
    let mut pause = Duration::from_millis(100);
    loop {
        match connect().await {
            Ok(broker) => return broker,
            Err(error) => readiness.set("broker", error.to_string()),
        }
        tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

/// Keeps readiness and the gauges of the sources true to the broker: red while it is away, silent or refuses, a line for each finding.
///
/// `max_dead`: dead letters that a source may have before the oldest go.
pub(crate) async fn watch(
    broker: Arc<dyn Broker>,
    hub: Hub,
    max_dead: u32,
    metrics: Metrics,
    readiness: Readiness,
    shutdown: Shutdown,
) {
    loop {
        look(broker.as_ref(), &readiness).await;
        look_at_sources(broker.as_ref(), max_dead, &metrics, &readiness).await;
        tokio::select! {
            () = tokio::time::sleep(CHECK_EVERY) => {}
            () = shutdown.begun() => return,
        }
        // Only now: at the first look, the first tick may be on its way.
        match hub.silent().as_slice() {
            [] => readiness.clear("feed"),
            silent => readiness.set(
                "feed",
                format!(
                    "{} of {} partitions are silent; streams replay when they are heard again",
                    silent.len(),
                    broker.partitions().len()
                ),
            ),
        }
    }
}

/// One look at the broker.
async fn look(broker: &dyn Broker, readiness: &Readiness) {
    let findings = match broker.check().await {
        Ok(findings) => findings,
        Err(error) => return readiness.set("broker", error.to_string()),
    };
    readiness.clear("broker");
    for Finding {
        name,
        severity,
        text,
    } in &findings
    {
        match severity {
            Severity::Refusal => readiness.set(&format!("broker.{name}"), text),
            Severity::Warning => readiness.warn(&format!("broker.{name}"), text),
        }
    }
    readiness.retain("broker.", |name| {
        findings
            .iter()
            .any(|finding| name.strip_prefix("broker.") == Some(finding.name))
    });
}

/// One look at the numbers of each source.
async fn look_at_sources(
    broker: &dyn Broker,
    max_dead: u32,
    metrics: &Metrics,
    readiness: &Readiness,
) {
    let mut crowded = Vec::new();
    for partition in broker.partitions() {
        // That the broker is away, readiness says.
        let Ok(state) = broker.state(partition.number).await else {
            return;
        };
        let source = SourceLabel {
            source: partition.source.clone(),
        };
        let gauge = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        metrics
            .source_lag
            .get_or_create(&source)
            .set(gauge(state.lag));
        metrics
            .dead_letters
            .get_or_create(&source)
            .set(gauge(state.dead_letters));
        // The broker counts for all nodes.
        for (counter, n) in [
            (&metrics.source_entries_lost, state.lost_upstream),
            (&metrics.source_ids_forgotten, state.dedupe_overflows),
            (&metrics.dead_letters_trimmed, state.dead_trimmed),
        ] {
            counter
                .get_or_create(&source)
                .inner()
                .store(n, Ordering::Relaxed);
        }
        if state.dead_letters >= u64::from(max_dead).saturating_mul(DEAD_WARNING_PERCENT) / 100
            && state.dead_letters > 0
        {
            crowded.push(format!("{} of {}", state.dead_letters, partition.source));
        }
    }
    if crowded.is_empty() {
        readiness.clear("dead-letters");
    } else {
        let fix = "redrive or drop them (pointsman dead list), or raise retention.dead_entries";
        let sources = crowded.join(", ");
        readiness.warn(
            "dead-letters",
            format!("{sources}, and of more than {max_dead} the oldest are lost: {fix}"),
        );
    }
}

/// Keeps readiness true to the plugins as they change, and has what was swapped out given back.
pub(crate) async fn watch_plugins(pipeline: Pipeline, readiness: Readiness, shutdown: Shutdown) {
    let mut changes = pipeline.changes();
    loop {
        // Not kept while it waits, or it would keep the plugins of then.
        tell(
            &changes.borrow_and_update().clone(),
            pipeline.allows_none(),
            &readiness,
        );
        pipeline.give_back_retired();
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = shutdown.begun() => return,
        }
    }
}

/// Red where a plugin that should be at work is not; a warning where another generation of it is, where it fails, or where it was put out of
/// work by hand.
fn tell(
    Snapshot {
        chain,
        plugins,
        folder_failure,
    }: &Snapshot,
    allow_none: bool,
    readiness: &Readiness,
) {
    let troubled = plugins
        .iter()
        .filter_map(|plugin| Some((format!("plugins.{}", plugin.name), trouble(plugin)?)));
    let troubled: BTreeMap<_, _> = troubled.collect();
    readiness.retain("plugins.", |name| troubled.contains_key(name));
    for (name, (is_red, text)) in &troubled {
        if *is_red {
            readiness.set(name, text)
        } else {
            readiness.warn(name, text)
        }
    }
    match (chain.is_empty(), allow_none) {
        (false, _) => readiness.clear("plugins"),
        (true, true) => readiness.warn("plugins", "none is loaded, so every event is unrouted"),
        (true, false) => {
            let fix = "put one into the folder of --plugins, or start with --allow-no-plugins";
            readiness.set("plugins", format!("none is loaded, so events wait; {fix}"));
        }
    }
    match folder_failure {
        Some(reason) => readiness.warn(
            "plugin-folder",
            format!("{reason}; what is loaded stays at work"),
        ),
        None => readiness.clear("plugin-folder"),
    }
}

/// What there is to say of a plugin, and whether it makes the node unready.
fn trouble(plugin: &PluginState) -> Option<(bool, String)> {
    let generation = plugin.generation;
    match (&plugin.failure, plugin.state) {
        (Some(failure), _) if generation == 0 => Some((true, failure.clone())),
        (Some(failure), Word::BreakerOpen) => Some((
            false,
            format!(
                "{failure}; generation {generation} stays at work, and fails on one event after the other"
            ),
        )),
        (Some(failure), _) => Some((
            false,
            format!("{failure}; generation {generation} stays at work"),
        )),
        (None, Word::BreakerOpen) => {
            let n = plugin
                .health
                .as_ref()
                .map_or(0, |health| health.failed_in_row);
            let settled = "until it is tried again its on_failure settles them";
            Some((
                false,
                format!(
                    "generation {generation} failed on {n} events in a row; {settled} (plugins.{}.breaker_failures)",
                    plugin.name
                ),
            ))
        }
        (None, Word::Disabled) if plugin.is_enabled_by_hand == Some(false) => Some((
            false,
            "it is disabled by hand, until it is enabled again or the node ends".to_owned(),
        )),
        (None, _) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::Error;
    use crate::broker::fake::FakeBroker;

    #[test]
    fn a_plugin_that_fails_is_a_reason_unless_a_generation_of_it_is_at_work() {
        let readiness = Readiness::default();
        let plugin = |name: &str, generation: u64, failure: Option<&str>| PluginState {
            name: name.into(),
            generation,
            state: if generation == 0 {
                Word::Failed
            } else {
                Word::Active
            },
            failure: failure.map(str::to_owned),
            ..PluginState::default()
        };
        let now = |plugins: Vec<PluginState>| Snapshot {
            plugins,
            ..Snapshot::default()
        };
        tell(
            &now(vec![
                plugin("a", 3, Some("a.wasm is empty")),
                plugin("b", 0, Some("b.wasm is empty")),
                plugin("c", 1, None),
            ]),
            true,
            &readiness,
        );
        let none = "warning: plugins: none is loaded, so every event is unrouted";
        assert_eq!(
            readiness.report().lines,
            [
                "plugins.b: b.wasm is empty",
                none,
                "warning: plugins.a: a.wasm is empty; generation 3 stays at work"
            ]
        );
        tell(&now(vec![plugin("a", 4, None)]), true, &readiness);
        assert_eq!(readiness.report().lines, [none]);
        tell(
            &Snapshot {
                folder_failure: Some("it is gone".into()),
                ..Snapshot::default()
            },
            false,
            &readiness,
        );
        let lines = readiness.report().lines;
        assert!(
            lines[0].starts_with("plugins: none is loaded, so events wait; "),
            "{lines:?}"
        );
        assert_eq!(
            lines[1..],
            ["warning: plugin-folder: it is gone; what is loaded stays at work"]
        );
    }

    #[tokio::test]
    async fn a_broker_that_is_away_at_the_start_is_tried_again_and_told_of() {
        let readiness = Readiness::default();
        let mut answers = vec![
            Ok(Arc::new(FakeBroker::default()) as Arc<dyn Broker>),
            Err(Error::Away("connection refused".into())),
        ];
        reach(|| std::future::ready(answers.pop().unwrap()), &readiness).await;
        assert_eq!(
            readiness.report().lines,
            ["broker: the broker is away: connection refused"]
        );
    }

    #[tokio::test]
    async fn readiness_follows_what_the_broker_finds() {
        let readiness = Readiness::default();
        let finding = |name, severity, text: &str| Finding {
            name,
            severity,
            text: text.into(),
        };
        let eviction = finding(
            "eviction",
            Severity::Refusal,
            "maxmemory-policy is allkeys-lru: CONFIG SET maxmemory-policy noeviction",
        );
        let volatile = finding(
            "append-only-file",
            Severity::Warning,
            "the append-only file is off: CONFIG SET appendonly yes",
        );
        look(
            &FakeBroker::default().with_findings(vec![eviction.clone(), volatile.clone()]),
            &readiness,
        )
        .await;
        let report = readiness.report();
        assert!(!report.is_ready);
        assert_eq!(
            report.lines,
            [
                format!("broker.eviction: {}", eviction.text),
                format!("warning: broker.append-only-file: {}", volatile.text)
            ]
        );

        look(
            &FakeBroker::default().with_findings(vec![volatile.clone()]),
            &readiness,
        )
        .await;
        let report = readiness.report();
        assert!(report.is_ready);
        assert_eq!(
            report.lines,
            [format!(
                "warning: broker.append-only-file: {}",
                volatile.text
            )]
        );

        look(
            &FakeBroker::failing(|| Error::Away("no answer in 2 s".into())),
            &readiness,
        )
        .await;
        assert_eq!(
            readiness.report().lines[0],
            "broker: the broker is away: no answer in 2 s"
        );
        look(&FakeBroker::default(), &readiness).await;
        assert!(readiness.report().lines.is_empty());
    }
}
