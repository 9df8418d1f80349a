//! The backtest: compares a candidate for a plugin with past decisions. The entries that the
//! sources still hold are evaluated again by the active chain with the candidate in its plugin's
//! place and with the clock that each decision recorded.
//!
//! A backtest has no effect: nothing is committed, and no metric or breaker of an active plugin
//! changes. It is bounded in events, in time and in output, and runs on a low-priority thread of
//! its own. Events that were not compared are counted by reason. The report states how far back the
//! data reaches: an entry is kept for `retention.processed_entries_ttl`, and a decision while it is
//! among the newest `retention.decision_entries`.
//!
//! Not to be confused with `subscription::replay`, by which a stream catches up with its logs.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::{mpsc, oneshot};

use crate::broker::{self, Broker, Partition, StoredDecision};
use crate::event::{
    ChainMembers, Decision, EntryId, Event, Name, Notification, NotificationId, Outcome,
    PartitionNumber, Plan, Verdict, VerdictKind,
};
use crate::ingest::pipeline::{DryRunner, Evaluation, Resolution};
use crate::ingest::proposal::check_plan;
use crate::plugin::Role;
use crate::plugin::registry::generation::Chain;
use crate::plugin::registry::{CandidateChain, Registry};
use crate::plugin::shadow::groups::{GroupKey, Groups};
use crate::plugin::shadow::outcome::{Difference, Differences, PluginDecision};

/// The maximum number of events in one backtest.
pub const MAX_EVENTS: usize = 10_000;
/// The maximum duration of a backtest; events not compared by then are counted as such.
const MAX_DURATION: Duration = Duration::from_secs(60);
/// Entries per read; each may take half a megabyte.
const READ: usize = 16;

/// Reasons why an event was not compared.
const ENTRY_TRIMMED: &str = "the source no longer holds its entry";
const INVALID_EVENT: &str = "its entry is not a valid event";
const NOT_CALLED: &str = "the plugin was not called for it";
const NOT_REACHED: &str = "the other active plugins no longer pass it on to this one";
const OTHER_ROLE: &str = "the plugin was of a different kind";
const PLAN_UNKNOWN: &str = "its plan is unknown: it was not committed, or its record was trimmed";
const TIMED_OUT: &str = "the time limit was reached";

/// The result of a backtest.
#[derive(Clone, Debug, Serialize)]
pub struct BacktestReport {
    pub plugin: Name,
    /// SHA-256 of the candidate's file, in hexadecimal.
    pub hash: String,
    /// The first 12 hex digits of the SHA-256 of its configuration, as in decision records.
    pub config_hash: String,
    /// The version in its manifest.
    pub version: String,
    /// Decisions found, at most the number requested.
    pub found: u64,
    pub compared: u64,
    /// Compared events with different decisions.
    pub different: u64,
    /// Different events on which only the candidate failed.
    pub failed: u64,
    /// Counts by reason.
    pub not_compared: BTreeMap<&'static str, u64>,
    /// The differences, counted by what they change.
    pub groups: Groups,
    /// The first differences.
    pub differences: Differences,
    pub reach: Vec<Reach>,
}

/// How far back the data of a partition reaches.
#[derive(Clone, Debug, Serialize)]
pub struct Reach {
    pub source: String,
    /// The oldest entry in the source.
    pub oldest_entry: Option<EntryId>,
    /// The entry of the oldest decision that was read.
    pub oldest_decision: Option<EntryId>,
    /// Whether the decisions read are all that are kept.
    pub is_every_decision: bool,
}

/// A recorded decision.
type Recorded = (Outcome, Option<NotificationId>, Decision);

/// Runs a candidate on the newest decided events, at most `last` and at most [`MAX_EVENTS`].
///
/// Cancel-safe: when dropped, the thread ends after its current event.
///
/// # Errors
/// Errors of the broker.
pub async fn backtest(
    broker: &dyn Broker,
    registry: Arc<Registry>,
    candidate: CandidateChain,
    last: usize,
) -> Result<BacktestReport, broker::Error> {
    let last = last.min(MAX_EVENTS);
    let mut report = BacktestReport {
        plugin: candidate.name.clone(),
        hash: candidate.hash.clone(),
        config_hash: candidate.config_hash.clone(),
        version: candidate.version.clone(),
        found: 0,
        compared: 0,
        different: 0,
        failed: 0,
        not_compared: BTreeMap::new(),
        groups: Groups::default(),
        differences: Differences::default(),
        reach: Vec::new(),
    };
    let wanted = newest(broker, last, &mut report).await?;
    let thread = BacktestThread::start(registry, Arc::clone(&candidate.chain))?;
    for (partition, decisions) in wanted {
        compare_source(
            broker,
            &partition,
            decisions,
            &candidate.name,
            &thread,
            &mut report,
        )
        .await?;
    }
    Ok(report)
}

/// Finds the newest decisions across all partitions, ordered by the ids of their entries.
async fn newest(
    broker: &dyn Broker,
    last: usize,
    report: &mut BacktestReport,
) -> Result<Vec<(Partition, HashMap<EntryId, Recorded>)>, broker::Error> {
    let mut all = Vec::new();
    for (n, partition) in broker.partitions().iter().enumerate() {
        let mut decisions = broker.decisions(partition.number, last).await?;
        add_skipped(broker, partition.number, &mut decisions).await?;
        let oldest_entry = broker
            .read(partition.number, EntryId::default(), 1, Duration::ZERO)
            .await?
            .first()
            .map(|entry| entry.id);
        report.reach.push(Reach {
            source: partition.source.clone(),
            oldest_entry,
            oldest_decision: decisions.iter().map(|(entry, ..)| *entry).min(),
            is_every_decision: decisions.len() < last,
        });
        all.extend(
            decisions
                .into_iter()
                .map(|(entry, outcome, id, decision)| (entry, n, (outcome, id, decision))),
        );
    }
    all.sort_by_key(|(entry, n, _)| (*entry, *n));
    let newest = all.split_off(all.len().saturating_sub(last));
    let mut wanted: Vec<_> = broker
        .partitions()
        .iter()
        .map(|partition| (partition.clone(), HashMap::new()))
        .collect();
    for (entry, n, recorded) in newest {
        wanted[n].1.insert(entry, recorded);
    }
    report.found = wanted
        .iter()
        .map(|(_, decisions)| decisions.len() as u64)
        .sum();
    Ok(wanted)
}

/// Adds the plugins to the decisions that were in their chain and whose types did not match: the
/// candidate may handle those types.
async fn add_skipped(
    broker: &dyn Broker,
    partition: PartitionNumber,
    decisions: &mut [StoredDecision],
) -> Result<(), broker::Error> {
    let mut chains: HashMap<String, Option<ChainMembers>> = HashMap::new();
    for (.., decision) in decisions.iter() {
        if decision.members.is_some() {
            chains.insert(decision.chain.clone(), decision.members.clone());
        }
    }
    for (_, outcome, _, decision) in decisions {
        if decision.chain.is_empty() {
            continue;
        }
        if !chains.contains_key(&decision.chain) {
            // Listed by a decision that is older than those read.
            let found = broker.find_chain(partition, &decision.chain).await?;
            chains.insert(decision.chain.clone(), found);
        }
        if let Some(Some(members)) = chains.get(&decision.chain) {
            decision.add_skipped(*outcome, members);
        }
    }
    Ok(())
}

/// Reads and compares the entries of one source.
async fn compare_source(
    broker: &dyn Broker,
    partition: &Partition,
    mut wanted: HashMap<EntryId, Recorded>,
    plugin: &Name,
    thread: &BacktestThread,
    report: &mut BacktestReport,
) -> Result<(), broker::Error> {
    let (Some(&oldest), Some(&newest)) = (wanted.keys().min(), wanted.keys().max()) else {
        return Ok(());
    };
    let mut after = oldest.before().unwrap_or_default();
    while after < newest {
        let entries = broker
            .read(partition.number, after, READ, Duration::ZERO)
            .await?;
        let Some(last) = entries.last() else { break };
        after = last.id;
        let mut events = Vec::new();
        for entry in &entries {
            let Some(recorded) = wanted.remove(&entry.id) else {
                continue;
            };
            // The time that the plugins were given.
            let time_ms = entry.id.time_ms(recorded.2.clock_ms);
            match Event::from_fields_at(entry.id, time_ms, &partition.source, &entry.fields) {
                Ok(event) if entry.oversized.is_none() => events.push((event, recorded)),
                _ => report.not_compared(INVALID_EVENT),
            }
        }
        compare(broker, partition.number, events, plugin, thread, report).await?;
    }
    for _ in wanted {
        report.not_compared(ENTRY_TRIMMED);
    }
    Ok(())
}

async fn compare(
    broker: &dyn Broker,
    partition: PartitionNumber,
    events: Vec<(Event, Recorded)>,
    plugin: &Name,
    thread: &BacktestThread,
    report: &mut BacktestReport,
) -> Result<(), broker::Error> {
    let ids: Vec<NotificationId> = events
        .iter()
        .filter_map(|(_, (_, first, decision))| Some(decision.notifications((*first)?)))
        .flatten()
        .collect();
    let records = if ids.is_empty() {
        Vec::new()
    } else {
        broker.records(partition, &ids).await?
    };
    let mut records: HashMap<NotificationId, Notification> = ids
        .into_iter()
        .zip(records)
        .filter_map(|(id, record)| Some((id, serde_json::from_slice(&record?).ok()?)))
        .collect();
    let calls = events
        .iter()
        .map(|(event, (_, _, decision))| (event.clone(), decision.clock_ms))
        .collect();
    let mut evaluations = thread.evaluate(calls).await.into_iter();
    for (event, (outcome, first, decision)) in events {
        let Some(evaluation) = evaluations.next() else {
            report.not_compared(TIMED_OUT);
            continue;
        };
        let mut take = |id| records.remove(&id);
        let of_slots = first.and_then(|first| {
            let ids = decision.notifications(first);
            ids.map(&mut take).collect::<Option<Vec<Notification>>>()
        });
        let record = of_slots.and_then(|records| {
            records.into_iter().reduce(|mut whole, record| {
                whole.plan.routes.extend(record.plan.routes);
                whole
            })
        });
        let past = Past {
            verdicts: &decision.verdicts,
            record: record.as_ref(),
            is_refused: outcome == Outcome::DeadLettered && !has_failure(&decision.verdicts),
        };
        match compare_decisions(plugin, &past, &evaluation) {
            Err(reason) => report.not_compared(reason),
            Ok(sides) => report.note(&event, decision.clock_ms, &sides),
        }
    }
    Ok(())
}

impl BacktestReport {
    fn not_compared(&mut self, reason: &'static str) {
        *self.not_compared.entry(reason).or_default() += 1;
    }

    /// `sides`: the role, the recorded decision, and the candidate's decision.
    fn note(
        &mut self,
        event: &Event,
        clock_ms: u64,
        sides: &[(Role, PluginDecision, PluginDecision)],
    ) {
        self.compared += 1;
        let Some((role, old, new)) = sides.iter().find(|(_, old, new)| !old.is_same(new)) else {
            return;
        };
        self.different += 1;
        self.failed += u64::from(new.has_failed());
        let group = GroupKey::new(*role, event.kind.as_str(), clock_ms, old, new);
        self.groups.note(group, event.id.as_str());
        self.differences
            .push(Difference::new(event, *role, clock_ms, old, new));
    }
}

/// The decision about an event in the past.
struct Past<'a> {
    verdicts: &'a [Verdict],
    record: Option<&'a Notification>,
    /// Whether the plan of all routers could not be committed.
    is_refused: bool,
}

/// Whether the event may be a dead letter because of a plugin. Otherwise it is one because its plan
/// could not be committed.
fn has_failure(verdicts: &[Verdict]) -> bool {
    verdicts.iter().any(|verdict| {
        matches!(
            verdict.verdict,
            VerdictKind::Rejected | VerdictKind::Retry | VerdictKind::Failed
        )
    })
}

/// The recorded and the new decision for each role of the plugin.
///
/// # Errors
/// Why they cannot be compared.
fn compare_decisions(
    plugin: &Name,
    past: &Past<'_>,
    now: &Evaluation,
) -> Result<Vec<(Role, PluginDecision, PluginDecision)>, &'static str> {
    let of_plugin = |verdicts: &[Verdict]| -> Vec<Verdict> {
        verdicts
            .iter()
            .filter(|verdict| verdict.plugin == plugin.as_str())
            .cloned()
            .collect()
    };
    let record = past.record;
    let (then, now_verdicts) = (of_plugin(past.verdicts), of_plugin(&now.verdicts));
    if then.is_empty() {
        return Err(NOT_CALLED);
    }
    if now_verdicts.is_empty() {
        return Err(NOT_REACHED);
    }
    let planned = match &now.resolution {
        // In the order of the records.
        Resolution::Planned(plan) => Some(plan.clone().by_slot().into_iter().fold(
            Plan::default(),
            |mut whole, plan| {
                whole.routes.extend(plan.routes);
                whole
            },
        )),
        Resolution::Discarded { .. } | Resolution::Unrouted | Resolution::Failed { .. } => None,
    };
    // As the commit would: the routes of all routers together may be too many.
    let refused_now = match &now.resolution {
        Resolution::Planned(plan) => check_plan(&now.event, plan, &now.verdicts).err(),
        Resolution::Discarded { .. } | Resolution::Unrouted | Resolution::Failed { .. } => None,
    };
    let refused_then = past
        .is_refused
        .then(|| "the plan of all routers could not be committed".to_owned());
    let mut sides = Vec::new();
    for (then, now_verdict) in then.iter().zip(&now_verdicts) {
        let role = match (role(then.verdict), role(now_verdict.verdict)) {
            (Some(then), Some(now)) if then != now => return Err(OTHER_ROLE),
            (Some(role), _) | (None, Some(role)) => role,
            // Both skipped or both failed: the same in either role.
            (None, None) => Role::Router,
        };
        let old = reconstruct(
            plugin,
            then,
            role,
            record.map(|record| (&record.event, &record.plan)),
        );
        let new = reconstruct(
            plugin,
            now_verdict,
            role,
            planned.as_ref().map(|plan| (&now.event, plan)),
        );
        let (old, new) = (
            unless_refused(old, refused_then.as_ref()),
            unless_refused(new, refused_now.as_ref()),
        );
        match (&old, &new) {
            (PluginDecision::Routes { plan: old }, PluginDecision::Routes { plan: new })
                if old.is_none() || new.is_none() =>
            {
                return Err(PLAN_UNKNOWN);
            }
            (PluginDecision::Amend { .. }, PluginDecision::Amend { .. })
                if record.is_none() || planned.is_none() =>
            {
                return Err(PLAN_UNKNOWN);
            }
            _ => {}
        }
        let is_other = !old.is_same(&new);
        sides.push((role, old, new));
        if is_other {
            return Ok(sides);
        }
    }
    // Equal in the recorded roles. Whether the other role is reached now depends on other plugins.
    if then.len() != now_verdicts.len() {
        Err(NOT_REACHED)
    } else {
        Ok(sides)
    }
}

/// Routes of a plan that cannot be committed end in a dead letter.
fn unless_refused(decision: PluginDecision, refused: Option<&String>) -> PluginDecision {
    match (decision, refused) {
        (PluginDecision::Routes { .. }, Some(reason)) => PluginDecision::Failed {
            reason: reason.clone(),
        },
        (decision, _) => decision,
    }
}

/// The role that a verdict belongs to.
fn role(verdict: VerdictKind) -> Option<Role> {
    match verdict {
        VerdictKind::Keep | VerdictKind::Drop | VerdictKind::Amend => Some(Role::Filter),
        VerdictKind::Routes | VerdictKind::None => Some(Role::Router),
        VerdictKind::Skipped
        | VerdictKind::Rejected
        | VerdictKind::Retry
        | VerdictKind::Failed
        | VerdictKind::Unknown => None,
    }
}

/// Reconstructs a decision from a verdict and what is known of its plan, and of the event as
/// amended by filters.
fn reconstruct(
    plugin: &Name,
    verdict: &Verdict,
    role: Role,
    known: Option<(&Event, &Plan)>,
) -> PluginDecision {
    match verdict.verdict {
        VerdictKind::Keep => PluginDecision::Keep,
        VerdictKind::Drop => PluginDecision::Drop {
            reason: verdict.reason.clone(),
        },
        // These are the attributes after all filters. The other filters are the same on both
        // sides, so a difference is this plugin's.
        VerdictKind::Amend => PluginDecision::Amend {
            priority: None,
            attributes: known
                .map(|(event, _)| event.attributes.clone())
                .unwrap_or_default(),
        },
        VerdictKind::None => PluginDecision::None,
        VerdictKind::Routes => {
            let own = |plan: &Plan| Plan {
                routes: plan
                    .routes
                    .iter()
                    .filter(|route| route.by == *plugin)
                    .cloned()
                    .collect(),
            };
            PluginDecision::Routes {
                plan: known.map(|(_, plan)| own(plan)),
            }
        }
        VerdictKind::Rejected | VerdictKind::Retry | VerdictKind::Failed => {
            PluginDecision::Failed {
                reason: verdict.reason.clone(),
            }
        }
        VerdictKind::Skipped | VerdictKind::Unknown => PluginDecision::nothing(role),
    }
}

/// The thread that runs the candidate; it ends when this value is dropped.
#[derive(Debug)]
struct BacktestThread {
    calls: mpsc::Sender<Calls>,
}

type Calls = (Vec<(Event, u64)>, oneshot::Sender<Vec<Evaluation>>);

impl BacktestThread {
    fn start(registry: Arc<Registry>, chain: Arc<Chain>) -> Result<Self, broker::Error> {
        let (calls, mut waiting) = mpsc::channel::<Calls>(1);
        let deadline = Instant::now() + MAX_DURATION;
        let run = move || {
            crate::plugin::lower_thread_priority();
            let mut runner = DryRunner::new(registry);
            while let Some((events, answer)) = waiting.blocking_recv() {
                let mut evaluations = Vec::with_capacity(events.len());
                for (event, clock_ms) in events {
                    if answer.is_closed() || Instant::now() > deadline {
                        break;
                    }
                    evaluations.push(runner.evaluate(&chain, event, clock_ms));
                }
                // The receiver is gone if the caller was cancelled.
                drop(answer.send(evaluations));
            }
        };
        let thread = thread::Builder::new()
            .name("plugin-backtest".into())
            .spawn(run);
        thread
            .map_err(|error| broker::Error::Permanent(format!("cannot start a thread: {error}")))?;
        Ok(Self { calls })
    }

    /// Evaluates in order; returns fewer evaluations if the time limit is reached.
    async fn evaluate(&self, calls: Vec<(Event, u64)>) -> Vec<Evaluation> {
        let (answer, answered) = oneshot::channel();
        if self.calls.send((calls, answer)).await.is_err() {
            return Vec::new();
        }
        answered.await.unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::event::Priority;

    fn name() -> Name {
        Name::parse("p").unwrap()
    }

    fn event(more: &str) -> Event {
        Event::from_json(
            EntryId::default(),
            "-",
            format!(r#"{{"type":"t","id":"e"{more}}}"#).as_bytes(),
        )
        .unwrap()
    }

    /// `p:keep p:routes q:drop`.
    fn verdicts(text: &str) -> Vec<Verdict> {
        let one = |word: &str| {
            let (plugin, verdict) = word.split_once(':').unwrap();
            Verdict {
                plugin: plugin.into(),
                generation: 1,
                hash: String::new(),
                config_hash: String::new(),
                verdict: serde_json::from_value(json!(verdict)).unwrap(),
                reason: String::new(),
            }
        };
        text.split_whitespace().map(one).collect()
    }

    /// A route of `p` to this target, after one of another router.
    fn plan(to: &str) -> Plan {
        let route = |by: &str, to: &str| json!({ "by": by, "to": [to], "priority": "normal" });
        serde_json::from_value(json!([route("q", to), route("p", to)])).unwrap()
    }

    fn record(more: &str, to: &str) -> Notification {
        Notification {
            entry: EntryId::default(),
            event: event(more),
            plan: plan(to),
        }
    }

    fn evaluation(words: &str, more: &str, to: Option<&str>) -> Evaluation {
        let resolution = to.map_or(Resolution::Unrouted, |to| Resolution::Planned(plan(to)));
        Evaluation {
            event: event(more),
            priority: Priority::Normal,
            resolution,
            verdicts: verdicts(words),
            chain: Arc::default(),
        }
    }

    #[test]
    fn only_the_known_parts_of_a_decision_are_compared() {
        let kept = record("", "u:1");
        let amended = record(r#","a":1"#, "u:1");
        let (same, other) = (Ok(true), Ok(false));
        for (then, record, now, more, to, expect) in [
            ("p:routes", Some(&kept), "p:routes", "", Some("u:1"), same),
            ("p:routes", Some(&kept), "p:routes", "", Some("u:2"), other),
            ("p:routes", Some(&kept), "p:none", "", None, other),
            ("p:routes", Some(&kept), "p:skipped", "", Some("u:1"), other),
            ("p:none", None, "p:skipped", "", None, same),
            ("p:skipped", None, "p:skipped", "", None, same),
            ("p:none", None, "p:failed", "", None, other),
            ("p:failed", None, "p:failed", "", None, same),
            ("p:keep", Some(&kept), "p:skipped", "", Some("u:1"), same),
            ("p:keep", Some(&kept), "p:drop", "", None, other),
            ("p:drop", None, "p:drop", "", None, same),
            (
                "p:amend",
                Some(&amended),
                "p:amend",
                r#","a":1"#,
                Some("u:1"),
                same,
            ),
            (
                "p:amend",
                Some(&amended),
                "p:amend",
                r#","a":2"#,
                Some("u:1"),
                other,
            ),
            ("p:amend", Some(&amended), "p:keep", "", Some("u:1"), other),
            // A plugin in both roles.
            (
                "p:keep q:routes p:routes",
                Some(&kept),
                "p:keep q:routes p:routes",
                "",
                Some("u:1"),
                same,
            ),
            (
                "p:keep q:routes p:routes",
                Some(&kept),
                "p:keep q:routes p:none",
                "",
                None,
                other,
            ),
            ("p:keep q:drop", None, "p:drop", "", None, other),
            // The plans are needed only if the verdicts agree.
            (
                "p:routes",
                None,
                "p:routes",
                "",
                Some("u:1"),
                Err(PLAN_UNKNOWN),
            ),
            (
                "p:routes",
                Some(&kept),
                "p:routes q:failed",
                "",
                None,
                Err(PLAN_UNKNOWN),
            ),
            (
                "p:amend",
                None,
                "p:amend",
                "",
                Some("u:1"),
                Err(PLAN_UNKNOWN),
            ),
            ("p:routes", None, "p:none", "", None, other),
            // Decisions of other plugins do not count.
            ("q:drop", None, "p:routes", "", Some("u:1"), Err(NOT_CALLED)),
            (
                "p:routes",
                Some(&kept),
                "q:drop",
                "",
                None,
                Err(NOT_REACHED),
            ),
            (
                "p:keep q:drop",
                None,
                "p:keep p:routes",
                "",
                Some("u:1"),
                Err(NOT_REACHED),
            ),
            ("p:keep", None, "p:routes", "", Some("u:1"), Err(OTHER_ROLE)),
        ] {
            let past = Past {
                verdicts: &verdicts(then),
                record,
                is_refused: false,
            };
            let compared = compare_decisions(&name(), &past, &evaluation(now, more, to));
            let compared = compared.map(|sides| sides.iter().all(|(_, old, new)| old.is_same(new)));
            assert_eq!(compared, expect, "{then} and {now}");
        }
    }
}
