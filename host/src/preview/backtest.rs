//! What a candidate for a plugin would have decided about past events: the entries that sources still hold, asked about again by the chain at
//! work with the candidate in its plugin's place, under the clock that each decision recorded, and compared with what was recorded.
//!
//! It promises that nothing comes of it: no event is decided anew, no count or breaker of a plugin at work moves. It is bounded in events, in
//! time and in what it shows, and runs on a thread of its own, of low importance. What was not compared is counted by the reason, and the report
//! says how far back it could look: an entry is kept for `retention.keep_s`, a decision among the newest `retention.decision_entries`.
//!
//! (Not to be confused with `subscription::replay`, by which a stream catches up with its logs.)

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::sync::{mpsc, oneshot};

use crate::broker::{self, Broker, Decision, Partition, PartitionNumber, Verdict};
use crate::event::{EntryId, Event, Name, Notification, NotificationId, Outcome, Plan};
use crate::ingest::pipeline::{Aside, Evaluation, Resolution};
use crate::plugin::Role;
use crate::plugin::registry::generation::Chain;
use crate::plugin::registry::{Registry, Understudy};
use crate::plugin::shadow::outcome::{Decided, Difference, Differences};

/// The most events that may be asked for.
pub const MAX_EVENTS: usize = 10_000;
/// The longest that one may take; what was not compared by then is counted as such.
const MAX_DURATION: Duration = Duration::from_secs(60);
/// Entries read at once: each may hold half a megabyte.
const READ: usize = 16;

/// Why an event was not compared.
const ENTRY_GONE: &str = "its entry has left the source";
const NO_EVENT: &str = "its entry is no event";
const NOT_ASKED: &str = "the plugin was not asked about it";
const NOT_REACHED: &str = "the other plugins, as they are now, do not let it come to this one";
const OTHER_KIND: &str = "the plugin was of another kind";
const PLAN_GONE: &str = "its plan is not known: it was not committed, or its record is gone";
const TIME_OVER: &str = "there was no time left for it";

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub plugin: Name,
    /// SHA-256 of the candidate's file, in hexadecimal.
    pub hash: String,
    /// What it says its version is.
    pub version: String,
    /// Decisions that were found, of those asked for.
    pub found: u64,
    pub compared: u64,
    /// Of these, decided otherwise.
    pub different: u64,
    /// Of these, those on which only the candidate failed.
    pub failed: u64,
    /// By the reason.
    pub not_compared: BTreeMap<&'static str, u64>,
    /// The first ones.
    pub differences: Differences,
    pub reach: Vec<Reach>,
}

/// How far back one could look in a partition.
#[derive(Clone, Debug, Serialize)]
pub struct Reach {
    pub source: String,
    /// The oldest entry that the source holds.
    pub oldest_entry: Option<EntryId>,
    /// Of the decisions that were read, the entry of the oldest.
    pub oldest_decision: Option<EntryId>,
    /// Whether there is no older decision than that.
    pub is_every_decision: bool,
}

/// A decision as it was recorded.
type Recorded = (Outcome, Option<NotificationId>, Decision);

/// Asks a candidate about the newest events that were decided, at most `last` of them and [`MAX_EVENTS`].
///
/// Cancel-safe: dropped, the thread ends with the event that it is at.
///
/// # Errors
/// The broker's.
pub async fn rehearse(
    broker: &dyn Broker,
    registry: Arc<Registry>,
    candidate: Understudy,
    last: usize,
) -> Result<Report, broker::Error> {
    let last = last.min(MAX_EVENTS);
    let mut report = Report {
        plugin: candidate.name.clone(),
        hash: candidate.hash.clone(),
        version: candidate.version.clone(),
        found: 0,
        compared: 0,
        different: 0,
        failed: 0,
        not_compared: BTreeMap::new(),
        differences: Differences::default(),
        reach: Vec::new(),
    };
    let wanted = newest(broker, last, &mut report).await?;
    let stage = Stage::start(registry, Arc::clone(&candidate.chain))?;
    for (partition, decisions) in wanted {
        replay(
            broker,
            &partition,
            decisions,
            &candidate.name,
            &stage,
            &mut report,
        )
        .await?;
    }
    Ok(report)
}

/// The newest decisions of all partitions together, by the entries that they are about.
async fn newest(
    broker: &dyn Broker,
    last: usize,
    report: &mut Report,
) -> Result<Vec<(Partition, HashMap<EntryId, Recorded>)>, broker::Error> {
    let mut all = Vec::new();
    for (n, partition) in broker.partitions().iter().enumerate() {
        let decisions = broker.decisions(partition.number, last).await?;
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

/// Goes through the entries of one source.
async fn replay(
    broker: &dyn Broker,
    partition: &Partition,
    mut wanted: HashMap<EntryId, Recorded>,
    plugin: &Name,
    stage: &Stage,
    report: &mut Report,
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
        let mut asked = Vec::new();
        for entry in &entries {
            let Some(recorded) = wanted.remove(&entry.id) else {
                continue;
            };
            match Event::from_fields(entry.id, &partition.source, &entry.fields) {
                Ok(event) => asked.push((event, recorded)),
                Err(_) => report.not_compared(NO_EVENT),
            }
        }
        compare(broker, partition.number, asked, plugin, stage, report).await?;
    }
    for _ in wanted {
        report.not_compared(ENTRY_GONE);
    }
    Ok(())
}

async fn compare(
    broker: &dyn Broker,
    partition: PartitionNumber,
    asked: Vec<(Event, Recorded)>,
    plugin: &Name,
    stage: &Stage,
    report: &mut Report,
) -> Result<(), broker::Error> {
    let ids: Vec<NotificationId> = asked.iter().filter_map(|(_, (_, id, _))| *id).collect();
    let records = if ids.is_empty() {
        Vec::new()
    } else {
        broker.records(partition, &ids).await?
    };
    let records: HashMap<NotificationId, Notification> = ids
        .into_iter()
        .zip(records)
        .filter_map(|(id, record)| Some((id, serde_json::from_slice(&record?).ok()?)))
        .collect();
    let calls = asked
        .iter()
        .map(|(event, (_, _, decision))| (event.clone(), decision.clock_ms))
        .collect();
    let mut evaluations = stage.evaluate(calls).await.into_iter();
    for (event, (_, id, decision)) in asked {
        let Some(evaluation) = evaluations.next() else {
            report.not_compared(TIME_OVER);
            continue;
        };
        let record = id.and_then(|id| records.get(&id));
        match judge(plugin, &decision.verdicts, record, &evaluation) {
            Err(reason) => report.not_compared(reason),
            Ok(sides) => report.note(&event, decision.clock_ms, &sides),
        }
    }
    Ok(())
}

impl Report {
    fn not_compared(&mut self, reason: &'static str) {
        *self.not_compared.entry(reason).or_default() += 1;
    }

    /// `sides`: role, what was recorded, and what the candidate decides.
    fn note(&mut self, event: &Event, clock_ms: u64, sides: &[(Role, Decided, Decided)]) {
        self.compared += 1;
        let Some((role, old, new)) = sides.iter().find(|(_, old, new)| !old.is_same(new)) else {
            return;
        };
        self.different += 1;
        self.failed += u64::from(new.has_failed());
        self.differences
            .push(Difference::new(event, *role, clock_ms, old, new));
    }
}

/// What was decided then and what is decided now, for each role that the plugin has.
///
/// # Errors
/// Why they cannot be compared.
fn judge(
    plugin: &Name,
    recorded: &[Verdict],
    record: Option<&Notification>,
    now: &Evaluation,
) -> Result<Vec<(Role, Decided, Decided)>, &'static str> {
    let of_plugin = |verdicts: &[Verdict]| -> Vec<Verdict> {
        verdicts
            .iter()
            .filter(|verdict| verdict.plugin == plugin.as_str())
            .cloned()
            .collect()
    };
    let (then, now_verdicts) = (of_plugin(recorded), of_plugin(&now.verdicts));
    if then.is_empty() {
        return Err(NOT_ASKED);
    }
    if now_verdicts.is_empty() {
        return Err(NOT_REACHED);
    }
    let planned = match &now.resolution {
        Resolution::Planned(plan) => Some(plan),
        Resolution::Discarded { .. } | Resolution::Unrouted | Resolution::Failed { .. } => None,
    };
    let mut sides = Vec::new();
    for (then, now_verdict) in then.iter().zip(&now_verdicts) {
        let role = match (role(&then.verdict), role(&now_verdict.verdict)) {
            (Some(then), Some(now)) if then != now => return Err(OTHER_KIND),
            (Some(role), _) | (None, Some(role)) => role,
            // Neither was of interest, or on both it fails: the same in either role.
            (None, None) => Role::Router,
        };
        let old = decided(
            plugin,
            then,
            role,
            record.map(|record| (&record.event, &record.plan)),
        );
        let new = decided(
            plugin,
            now_verdict,
            role,
            planned.map(|plan| (&now.event, plan)),
        );
        match (&old, &new) {
            (Decided::Routes { plan: old }, Decided::Routes { plan: new })
                if old.is_none() || new.is_none() =>
            {
                return Err(PLAN_GONE);
            }
            (Decided::Amend { .. }, Decided::Amend { .. })
                if record.is_none() || planned.is_none() =>
            {
                return Err(PLAN_GONE);
            }
            _ => {}
        }
        let is_other = !old.is_same(&new);
        sides.push((role, old, new));
        if is_other {
            return Ok(sides);
        }
    }
    // The same as far as it was asked then; whether it is asked again in its other role is up to others.
    if then.len() != now_verdicts.len() {
        Err(NOT_REACHED)
    } else {
        Ok(sides)
    }
}

/// In which role a plugin says this word.
fn role(verdict: &str) -> Option<Role> {
    match verdict {
        "keep" | "drop" | "amend" => Some(Role::Filter),
        "routes" | "none" => Some(Role::Router),
        _ => None,
    }
}

/// What a verdict says, with what is known of the plan that it was a part of, and of the event as filters left it.
fn decided(
    plugin: &Name,
    verdict: &Verdict,
    role: Role,
    known: Option<(&Event, &Plan)>,
) -> Decided {
    match verdict.verdict.as_str() {
        "keep" => Decided::Keep,
        "drop" => Decided::Drop {
            reason: verdict.reason.clone(),
        },
        // All filters together have left these attributes; with the same other ones, a difference is this plugin's.
        "amend" => Decided::Amend {
            priority: None,
            attributes: known
                .map(|(event, _)| event.attributes.clone())
                .unwrap_or_default(),
        },
        "none" => Decided::None,
        "routes" => {
            let own = |plan: &Plan| Plan {
                routes: plan
                    .routes
                    .iter()
                    .filter(|route| route.by == *plugin)
                    .cloned()
                    .collect(),
            };
            Decided::Routes {
                plan: known.map(|(_, plan)| own(plan)),
            }
        }
        "rejected" | "retry" | "failed" => Decided::Failed {
            reason: verdict.reason.clone(),
        },
        _ => Decided::nothing(role),
    }
}

/// The thread on which the candidate is asked; it ends with this.
#[derive(Debug)]
struct Stage {
    calls: mpsc::Sender<Calls>,
}

type Calls = (Vec<(Event, u64)>, oneshot::Sender<Vec<Evaluation>>);

impl Stage {
    fn start(registry: Arc<Registry>, chain: Arc<Chain>) -> Result<Self, broker::Error> {
        let (calls, mut waiting) = mpsc::channel::<Calls>(1);
        let deadline = Instant::now() + MAX_DURATION;
        let run = move || {
            crate::plugin::make_unimportant();
            let mut aside = Aside::new(registry);
            while let Some((events, answer)) = waiting.blocking_recv() {
                let mut evaluations = Vec::with_capacity(events.len());
                for (event, clock_ms) in events {
                    if answer.is_closed() || Instant::now() > deadline {
                        break;
                    }
                    evaluations.push(aside.evaluate(&chain, event, clock_ms));
                }
                // Nobody listens if the caller was cancelled.
                drop(answer.send(evaluations));
            }
        };
        let thread = thread::Builder::new()
            .name("plugin-rehearsal".into())
            .spawn(run);
        thread.map_err(|error| {
            broker::Error::Refused(format!("the system gives no thread: {error}"))
        })?;
        Ok(Self { calls })
    }

    /// In the order of the calls; fewer than these if there is no time left.
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
                verdict: verdict.into(),
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

    fn evaluation(said: &str, more: &str, to: Option<&str>) -> Evaluation {
        let resolution = to.map_or(Resolution::Unrouted, |to| Resolution::Planned(plan(to)));
        Evaluation {
            event: event(more),
            priority: Priority::Normal,
            resolution,
            verdicts: verdicts(said),
        }
    }

    #[test]
    fn what_is_known_of_a_decision_is_compared_and_nothing_else() {
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
            // In both of its roles.
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
            // Not without both plans; but where the words differ, they are not needed.
            (
                "p:routes",
                None,
                "p:routes",
                "",
                Some("u:1"),
                Err(PLAN_GONE),
            ),
            (
                "p:routes",
                Some(&kept),
                "p:routes q:failed",
                "",
                None,
                Err(PLAN_GONE),
            ),
            ("p:amend", None, "p:amend", "", Some("u:1"), Err(PLAN_GONE)),
            ("p:routes", None, "p:none", "", None, other),
            // What others decide is not this plugin's.
            ("q:drop", None, "p:routes", "", Some("u:1"), Err(NOT_ASKED)),
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
            ("p:keep", None, "p:routes", "", Some("u:1"), Err(OTHER_KIND)),
        ] {
            let judged = judge(&name(), &verdicts(then), record, &evaluation(now, more, to));
            let judged = judged.map(|sides| sides.iter().all(|(_, old, new)| old.is_same(new)));
            assert_eq!(judged, expect, "{then} and {now}");
        }
    }
}
