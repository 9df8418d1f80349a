//! The monitors: connecting to the broker, and keeping readiness true to the broker and the plugins
//! afterwards.
//!
//! Nothing here stops anything. Ingest and streams handle an outage themselves, and ingest waits
//! for plugins itself; this module only reports.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::backoff::Backoff;
use crate::broker::redis::DEADLINE;
use crate::broker::{self, Finding, Operations, Partition, PartitionState, Severity};
use crate::delivery::hub::{Hub, TICK};
use crate::event::{PartitionNumber, Position};
use crate::ingest::pipeline::Pipeline;
use crate::plugin::registry::Snapshot;
use crate::plugin::registry::settings::OnMissing;
use crate::plugin::registry::state::{PluginState, PluginStatus};
use crate::shutdown::Shutdown;
use crate::telemetry::metrics::{Metrics, SourceLabel};
use crate::telemetry::readiness::Readiness;

/// Interval between checks of the broker's health.
const CHECK_EVERY: Duration = Duration::from_secs(2);
/// The same while the broker does not answer or its feed is silent.
const RECHECK_EVERY: Duration = Duration::from_millis(500);

/// The time within which a node is ready after its broker answers again.
const READY_WITHIN: Duration = Duration::from_secs(5);
// A command that is in flight when the broker comes back fails at its deadline. Then two ticks
// follow, of which the first may fall into the pause before the next connection, and one check.
const _: () = assert!(
    DEADLINE.as_millis() + 2 * TICK.as_millis() + RECHECK_EVERY.as_millis()
        <= READY_WITHIN.as_millis()
);

/// How long a position may stay the same while entries wait. Longer than a batch of events takes,
/// unless a plugin is slow.
const STALLED_AFTER: Duration = Duration::from_secs(10);

/// Entries that nothing needs, in a source that is not trimmed, at which a warning is set for it.
const UNNEEDED_WARNING: u64 = 1_000;

/// Percentage of the dead-letter limit at which a warning is set for a source.
const DEAD_WARNING_PERCENT: u64 = 80;

/// Calls `connect` until it succeeds. Cancel-safe.
pub(crate) async fn reach<T, F: Future<Output = broker::Result<T>>>(
    mut connect: impl FnMut() -> F,
    readiness: &Readiness,
) -> T {
    let mut backoff = Backoff::new(
        Duration::from_millis(100),
        Duration::from_secs(1),
        0.5..=1.0,
    );
    loop {
        match connect().await {
            Ok(broker) => return broker,
            Err(error) => readiness.set("broker", error.to_string()),
        }
        tokio::time::sleep(backoff.pause()).await;
    }
}

/// The broker monitor. Keeps readiness and the source gauges up to date: the node is unready while
/// the broker is unavailable, silent or refusing, and each finding has a line.
///
/// `max_dead`: dead letters that a source may have before the oldest are deleted.
pub(crate) async fn watch(
    broker: Arc<dyn Operations>,
    hub: Hub,
    max_dead: u32,
    metrics: Metrics,
    readiness: Readiness,
    shutdown: Shutdown,
) {
    let mut stalls = Stalls::default();
    let mut is_silent = false;
    loop {
        let answers = look(broker.as_ref(), &readiness).await;
        // Each read would only wait for its deadline.
        if answers {
            look_at_sources(broker.as_ref(), max_dead, &metrics, &readiness, &mut stalls).await;
        }
        tokio::select! {
            () = tokio::time::sleep(pause(answers && !is_silent)) => {}
            () = shutdown.begun() => return,
        }
        // Checked after the pause: during the first check, the first tick may still be on its way.
        let silent = hub.silent();
        is_silent = !silent.is_empty();
        if is_silent {
            readiness.set(
                "feed",
                format!(
                    "{} of {} partitions are silent; streams replay when notices arrive again",
                    silent.len(),
                    broker.partitions().len()
                ),
            );
        } else {
            readiness.clear("feed");
        }
    }
}

/// The pause after a check.
const fn pause(is_well: bool) -> Duration {
    if is_well { CHECK_EVERY } else { RECHECK_EVERY }
}

/// Checks the broker once. Returns whether it answered.
async fn look(broker: &dyn Operations, readiness: &Readiness) -> bool {
    let findings = match broker.check().await {
        Ok(findings) => findings,
        Err(error) => {
            readiness.set("broker", error.to_string());
            return false;
        }
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
    true
}

/// Reads the numbers of each source once.
async fn look_at_sources(
    broker: &dyn Operations,
    max_dead: u32,
    metrics: &Metrics,
    readiness: &Readiness,
    stalls: &mut Stalls,
) {
    let mut crowded = Vec::new();
    for partition in broker.partitions() {
        // The check of the broker reports an unavailable broker.
        let Ok(state) = broker.state(partition.number).await else {
            return;
        };
        stalls.look(partition, &state, readiness, Instant::now());
        warn_about_source(partition, &state, readiness);
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
        metrics
            .retrying
            .get_or_create(&source)
            .set(gauge(state.retrying));
        // The broker counts for all nodes, so its totals replace the local ones.
        for (counter, n) in [
            (&metrics.source_entries_trimmed_unread, state.trimmed_unread),
            (&metrics.dedupe_overflows, state.dedupe_overflows),
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
            crowded.push(format!("{} in {}", state.dead_letters, partition.source));
        }
    }
    if crowded.is_empty() {
        readiness.clear("dead-letters");
    } else {
        let fix = "redrive or drop them (pointsman dead-letters list), or raise retention.dead_letter_entries";
        let sources = crowded.join(", ");
        readiness.warn(
            "dead-letters",
            format!("{sources}; the oldest beyond {max_dead} per source are deleted; {fix}"),
        );
    }
}

/// Warns of a source that grows without bound, and of one whose ids are not times.
fn warn_about_source(partition: &Partition, state: &PartitionState, readiness: &Readiness) {
    let warn = |kind: &str, text: Option<String>| {
        let name = format!("sources.{}.{kind}", partition.source);
        match text {
            Some(text) => readiness.warn(&name, text),
            None => readiness.clear(&name),
        }
    };
    let fix = "trim it (XTRIM), or remove it from retention.untrimmed_sources";
    let is_full = state.unneeded >= UNNEEDED_WARNING;
    warn(
        "untrimmed",
        is_full.then(|| {
            format!(
                "it holds at least {UNNEEDED_WARNING} entries that no consumer group needs; {fix}"
            )
        }),
    );
    let fix = "add events with XADD KEY *, and to a new source if the ids are in the future";
    warn(
        "ids",
        state.has_foreign_ids.then(|| {
            format!(
                "the ids of entries are not the time of day, so events without `time` get the time of processing, and retries are recognised by it; {fix}"
            )
        }),
    );
}

/// The positions of the partitions, and since when each has not moved while entries wait.
#[derive(Default)]
struct Stalls(BTreeMap<PartitionNumber, (Position, Instant)>);

impl Stalls {
    /// Makes the node unready while the position of a partition does not move, whatever the reason.
    fn look(
        &mut self,
        partition: &Partition,
        state: &PartitionState,
        readiness: &Readiness,
        now: Instant,
    ) {
        let name = format!("sources.{}.position", partition.source);
        let (position, since) = self
            .0
            .entry(partition.number)
            .or_insert_with(|| (state.position, now));
        if *position != state.position || state.lag == 0 {
            (*position, *since) = (state.position, now);
        }
        let still = now.duration_since(*since);
        if still < STALLED_AFTER {
            return readiness.clear(&name);
        }
        let entries = if state.lag == 1 {
            "1 entry waits".to_owned()
        } else {
            format!("{} entries wait", state.lag)
        };
        readiness.update(
            &name,
            format!(
                "{} has not moved for {} s while {entries}; look for a slow plugin, a retry or a broker error in the log of the node that processes the source",
                state.position,
                still.as_secs()
            ),
        );
    }
}

/// The plugin monitor. Keeps readiness true to the plugins as they change, and releases retired
/// generations.
pub(crate) async fn watch_plugins(pipeline: Pipeline, readiness: Readiness, shutdown: Shutdown) {
    let mut changes = pipeline.changes();
    loop {
        // Cloned and dropped before waiting; holding the snapshot would keep its plugins in memory.
        report_plugins(
            &changes.borrow_and_update().clone(),
            pipeline.allows_none(),
            &readiness,
        );
        pipeline.release_retired_instances();
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = shutdown.begun() => return,
        }
    }
}

/// Makes the node unready where an enabled plugin has no active generation, unless events may pass
/// without it. Warns where a load failed but an earlier generation is active, where a file is not
/// that of a plugin, where a plugin keeps failing, or where it was disabled by an admin command.
fn report_plugins(
    Snapshot {
        chain,
        plugins,
        missing,
        awaited,
        folder_failure,
        ..
    }: &Snapshot,
    allow_none: bool,
    readiness: &Readiness,
) {
    let troubled = plugins
        .iter()
        .filter_map(|plugin| Some((format!("plugins.{}", plugin.name), trouble(plugin)?)));
    let troubled: BTreeMap<_, _> = troubled.collect();
    // The registry has logged them as a warning: a file that is being copied is not an error.
    let incomplete = plugins.iter().filter(|plugin| plugin.is_incomplete());
    let incomplete: BTreeSet<_> = incomplete
        .map(|plugin| format!("plugins.{}", plugin.name))
        .collect();
    readiness.retain("plugins.", |name| troubled.contains_key(name));
    for (name, (is_red, text)) in &troubled {
        if *is_red && incomplete.contains(name) {
            readiness.set_unlogged(name, text)
        } else if *is_red {
            readiness.set(name, text)
        } else {
            readiness.warn(name, text)
        }
    }
    let rollouts: BTreeSet<_> = awaited
        .values()
        .flatten()
        .map(|plugin| format!("rollouts.{plugin}"))
        .collect();
    readiness.retain("rollouts.", |name| rollouts.contains(name));
    for name in rollouts {
        let fix = "wait, build the image with its code (pointsman plugin compile), or end the roll-out (pointsman plugin rollback)";
        readiness.set(
            &name,
            format!(
                "the version of the roll-out is still being loaded; events of its partitions wait on this node; {fix}"
            ),
        );
    }
    match (chain.is_empty(), allow_none) {
        (false, _) => readiness.clear("plugins"),
        (true, true) if !missing.is_empty() => readiness.clear("plugins"),
        (true, true) => {
            readiness.warn("plugins", "no plugins loaded; every event will be unrouted")
        }
        (true, false) => {
            let fix = "add one to the plugin folder (--plugins) or start with --allow-no-plugins";
            readiness.set(
                "plugins",
                format!("no plugins loaded, so events wait; {fix}"),
            );
        }
    }
    match folder_failure {
        Some(reason) => readiness.warn(
            "plugin-folder",
            format!("{reason}; loaded plugins stay active"),
        ),
        None => readiness.clear("plugin-folder"),
    }
}

/// Returns the line for a plugin with a problem, and whether the problem makes the node unready.
fn trouble(plugin: &PluginState) -> Option<(bool, String)> {
    let generation = plugin.generation;
    match (&plugin.failure, plugin.state) {
        (Some(failure), _) if plugin.events_wait => {
            let keys = format!(
                "plugins.{}.enabled = false or on_missing = \"skip\"",
                plugin.name
            );
            Some((
                true,
                format!("{failure}; events wait on this node, unless {keys} lets them pass"),
            ))
        }
        (Some(failure), PluginStatus::Ignored) => Some((false, failure.clone())),
        // Removed by an admin command, or `on_missing` is `skip`.
        (Some(failure), PluginStatus::Missing) => {
            Some((false, format!("{failure}; events pass without it")))
        }
        (Some(failure), PluginStatus::Failed) if plugin.settings.on_missing == OnMissing::Skip => {
            Some((
                false,
                format!("{failure}; events pass without it (on_missing)"),
            ))
        }
        (Some(failure), _) if generation == 0 => Some((true, failure.clone())),
        (Some(failure), PluginStatus::BreakerOpen) => Some((
            false,
            format!(
                "{failure}; generation {generation} stays active but fails on consecutive events"
            ),
        )),
        (Some(failure), _) => Some((
            false,
            format!("{failure}; generation {generation} stays active"),
        )),
        (None, PluginStatus::BreakerOpen) => {
            let n = plugin
                .health
                .as_ref()
                .map_or(0, |health| health.consecutive_failures);
            let settled = "its on_failure applies to events until the next attempt";
            Some((
                false,
                format!(
                    "generation {generation} failed on {n} events in a row; {settled} (plugins.{}.breaker_failures)",
                    plugin.name
                ),
            ))
        }
        (None, PluginStatus::Disabled) if plugin.override_enabled == Some(false) => Some((
            false,
            "disabled by an admin command until it is enabled again or the node stops".to_owned(),
        )),
        (None, _) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::Broker;
    use crate::broker::Error;
    use crate::broker::Partitions as _;
    use crate::broker::fake::FakeBroker;
    use crate::event::EntryId;

    #[test]
    fn a_failed_plugin_makes_the_node_unready_unless_a_generation_of_it_is_active() {
        let readiness = Readiness::default();
        let plugin = |name: &str, generation: u64, failure: Option<&str>| PluginState {
            name: name.into(),
            generation,
            state: if generation == 0 {
                PluginStatus::Failed
            } else {
                PluginStatus::Active
            },
            failure: failure.map(str::to_owned),
            ..PluginState::default()
        };
        let now = |plugins: Vec<PluginState>| Snapshot {
            plugins,
            ..Snapshot::default()
        };
        report_plugins(
            &now(vec![
                plugin("a", 3, Some("a.wasm is empty")),
                plugin("b", 0, Some("b.wasm is empty")),
                plugin("c", 1, None),
            ]),
            true,
            &readiness,
        );
        let none = "warning: plugins: no plugins loaded; every event will be unrouted";
        assert_eq!(
            readiness.report().lines,
            [
                "plugins.b: b.wasm is empty",
                none,
                "warning: plugins.a: a.wasm is empty; generation 3 stays active"
            ]
        );
        report_plugins(&now(vec![plugin("a", 4, None)]), true, &readiness);
        assert_eq!(readiness.report().lines, [none]);
        report_plugins(
            &Snapshot {
                folder_failure: Some("it is gone".into()),
                ..Snapshot::default()
            },
            false,
            &readiness,
        );
        let lines = readiness.report().lines;
        assert!(
            lines[0].starts_with("plugins: no plugins loaded, so events wait; "),
            "{lines:?}"
        );
        assert_eq!(
            lines[1..],
            ["warning: plugin-folder: it is gone; loaded plugins stay active"]
        );
    }

    #[test]
    fn a_source_that_stands_still_while_entries_wait_is_reported_until_it_moves() {
        let readiness = Readiness::default();
        let partition = &FakeBroker::default().partitions()[0].clone();
        let mut stalls = Stalls::default();
        let mut now = Instant::now();
        let mut look = |ms: u64, lag: u64| {
            let entry = EntryId { ms, seq: 0 };
            let state = PartitionState {
                position: entry.into(),
                lag,
                ..PartitionState::default()
            };
            stalls.look(partition, &state, &readiness, now);
            now += Duration::from_secs(6);
            readiness.report().lines
        };
        assert!(look(1, 94).is_empty());
        assert!(look(1, 94).is_empty(), "for 6 s");
        let lines = look(1, 94);
        assert!(
            lines[0].starts_with("sources.pointsman:events:0.position: 1-0 has not moved for 12 s while 94 entries wait; "),
            "{lines:?}"
        );
        assert!(look(1, 1)[0].contains("for 18 s while 1 entry waits"));
        assert!(look(2, 1).is_empty(), "it moved");
        for _ in 0..5 {
            assert!(look(2, 0).is_empty(), "no entry waits");
        }
        assert!(look(2, 1).is_empty(), "the entry is new");
    }

    #[test]
    fn a_source_that_nothing_trims_and_ids_that_are_not_times_are_warnings() {
        let readiness = Readiness::default();
        let partition = &FakeBroker::default().partitions()[0].clone();
        let look = |unneeded: u64, has_foreign_ids: bool| {
            let state = PartitionState {
                unneeded,
                has_foreign_ids,
                ..PartitionState::default()
            };
            warn_about_source(partition, &state, &readiness);
            assert!(readiness.is_ready());
            readiness.report().lines
        };
        assert!(look(UNNEEDED_WARNING - 1, false).is_empty());
        let lines = look(UNNEEDED_WARNING, true);
        assert!(
            lines[0].starts_with("warning: sources.pointsman:events:0.ids: ")
                && lines[1].starts_with("warning: sources.pointsman:events:0.untrimmed: "),
            "{lines:?}"
        );
        assert!(look(0, false).is_empty());
    }

    #[tokio::test]
    async fn an_unavailable_broker_at_startup_is_retried_and_reported() {
        let readiness = Readiness::default();
        let mut answers = vec![
            Ok(Arc::new(FakeBroker::default()) as Arc<dyn Broker>),
            Err(Error::Unavailable("connection refused".into())),
        ];
        reach(|| std::future::ready(answers.pop().unwrap()), &readiness).await;
        assert_eq!(
            readiness.report().lines,
            ["broker: the broker is unavailable: connection refused"]
        );
    }

    #[tokio::test]
    async fn readiness_follows_the_findings_of_the_broker() {
        let readiness = Readiness::default();
        let finding = |name, severity, text: &str| Finding {
            name,
            severity,
            text: text.into(),
        };
        let eviction = finding(
            "eviction",
            Severity::Refusal,
            "maxmemory-policy is allkeys-lru; run CONFIG SET maxmemory-policy noeviction",
        );
        let volatile = finding(
            "append-only-file",
            Severity::Warning,
            "the append-only file is off; run CONFIG SET appendonly yes",
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
            &FakeBroker::failing(|| Error::Unavailable("no answer in 2 s".into())),
            &readiness,
        )
        .await;
        assert_eq!(
            readiness.report().lines[0],
            "broker: the broker is unavailable: no answer in 2 s"
        );
        look(&FakeBroker::default(), &readiness).await;
        assert!(readiness.report().lines.is_empty());
    }
}
