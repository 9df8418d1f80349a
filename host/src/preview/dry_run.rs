//! The dry run: the outcome and the reach that events would have, given the current plugins,
//! memberships and attributes. Nothing is stored. Duplicates are not detected, because only a
//! commit can detect them.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use crate::broker::{self, Logs};
use crate::delivery::recipients::{Moment, winning_route};
use crate::event::criteria::Criteria;
use crate::event::{
    EntryId, Event, LongName, Malformed, Name, NotificationId, Outcome, PartitionNumber, Plan,
    Priority, Target, Value, Verdict,
};
use crate::ingest::pipeline::{Evaluation, Pipeline, Resolution, Unevaluated};
use crate::ingest::proposal::check_plan;

/// The maximum number of named users of one event whose conditions are evaluated.
const MAX_USERS: usize = 100;
/// The maximum duration of a dry run: its request holds one of the few places of dry runs.
const MAX_DURATION: Duration = Duration::from_secs(30);

/// The dry-run result of one event.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum DryRunResult {
    Refused { status: &'static str, error: String },
    Evaluated(Box<DryRunReport>),
}

/// The outcome that an event would have.
#[derive(Debug, Serialize)]
pub struct DryRunReport {
    status: &'static str,
    id: Name,
    source: LongName,
    #[serde(rename = "type")]
    kind: Name,
    partition: PartitionNumber,
    outcome: Outcome,
    /// Priority and extension attributes after the filters.
    priority: Priority,
    attributes: BTreeMap<String, Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    plugin: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    plan: Plan,
    reaches: Reach,
    verdicts: Vec<Verdict>,
}

/// The recipients that a plan reaches. Members of a group are not listed: no broker can list them
/// without reading every user.
#[derive(Debug, Default, Serialize)]
struct Reach {
    /// Named users who are reached, with the priority of the winning route.
    users: Vec<ReachedUser>,
    /// Named users who are not reached, because no condition holds for them.
    excluded: Vec<Name>,
    /// The number of named users beyond the first hundred; these are not evaluated.
    not_evaluated: usize,
    groups: Vec<Name>,
    everyone: bool,
}

#[derive(Debug, Serialize)]
struct ReachedUser {
    user: Name,
    priority: Priority,
    /// The router of the winning route.
    by: Name,
    /// The slot of the winning route; a user is listed once for each.
    #[serde(skip_serializing_if = "Option::is_none")]
    slot: Option<Name>,
}

/// Why a dry run has no result.
#[derive(Debug, thiserror::Error)]
pub enum DryRunError {
    #[error(transparent)]
    Unevaluated(#[from] Unevaluated),
    #[error("the dry run took longer than {} seconds", MAX_DURATION.as_secs())]
    TooSlow,
    #[error(transparent)]
    Broker(#[from] broker::Error),
}

/// Runs events through the pipeline without storing them, in order. Each comes with the partition
/// that it would be appended to.
///
/// # Errors
/// [`DryRunError`]: nothing is known about any of the events.
pub async fn dry_run(
    pipeline: &Pipeline,
    broker: &dyn Logs,
    events: Vec<Result<(Event, PartitionNumber), Malformed>>,
) -> Result<Vec<DryRunResult>, DryRunError> {
    within(MAX_DURATION, dry_run_all(pipeline, broker, events)).await
}

async fn within<T>(
    limit: Duration,
    run: impl Future<Output = Result<T, DryRunError>>,
) -> Result<T, DryRunError> {
    tokio::time::timeout(limit, run)
        .await
        .unwrap_or(Err(DryRunError::TooSlow))
}

async fn dry_run_all(
    pipeline: &Pipeline,
    broker: &dyn Logs,
    events: Vec<Result<(Event, PartitionNumber), Malformed>>,
) -> Result<Vec<DryRunResult>, DryRunError> {
    let now_ms = broker.now_ms();
    let mut valid = Vec::new();
    let mut partitions = Vec::with_capacity(events.len());
    for event in events {
        partitions.push(event.map(|(event, partition)| {
            valid.push(as_of(event, now_ms));
            partition
        }));
    }
    let mut evaluations = pipeline.dry_run(valid, now_ms).await?.into_iter();
    let mut results = Vec::with_capacity(partitions.len());
    for partition in partitions {
        results.push(match partition {
            Err(error) => DryRunResult::Refused {
                status: "refused",
                error: error.to_string(),
            },
            Ok(partition) => {
                let evaluation = evaluations
                    .next()
                    .expect("the pipeline returns one evaluation for each event");
                DryRunResult::Evaluated(Box::new(
                    report(broker, partition, evaluation, now_ms).await?,
                ))
            }
        });
    }
    Ok(results)
}

/// Fills in an omitted id and time from the current time, as a commit would from the entry.
fn as_of(event: Event, now_ms: u64) -> Event {
    let time_ms = if event.time_ms == 0 {
        now_ms
    } else {
        event.time_ms
    };
    let entry = EntryId { ms: now_ms, seq: 0 };
    let id = if event.id_given {
        event.id.clone()
    } else {
        Name::parse(&entry.to_string()).unwrap_or_else(|_| event.id.clone())
    };
    Event {
        time_ms,
        id,
        ..event
    }
}

async fn report(
    broker: &dyn Logs,
    partition: PartitionNumber,
    evaluation: Evaluation,
    now_ms: u64,
) -> Result<DryRunReport, broker::Error> {
    let Evaluation {
        event,
        priority,
        resolution,
        verdicts,
        ..
    } = evaluation;
    let (outcome, plugin, reason, plan) = match resolution {
        Resolution::Planned(plan) => match check_plan(&event, &plan, &verdicts) {
            Ok(()) => (Outcome::Committed, None, None, plan),
            Err(reason) => (Outcome::DeadLettered, None, Some(reason), Plan::default()),
        },
        Resolution::Discarded { plugin, reason } => (
            Outcome::Discarded,
            Some(plugin),
            Some(reason),
            Plan::default(),
        ),
        Resolution::Unrouted => (Outcome::Unrouted, None, None, Plan::default()),
        Resolution::Failed { plugin, reason, .. } => (
            Outcome::DeadLettered,
            Some(plugin),
            Some(reason),
            Plan::default(),
        ),
    };
    // Above every id, so that everyone who is a member now is reached.
    let moment = Moment {
        partition,
        id: NotificationId::MAX,
        now_ms,
    };
    let reaches = reach(broker, &plan, moment).await?;
    let Event {
        id,
        source,
        kind,
        attributes,
        ..
    } = event;
    Ok(DryRunReport {
        status: "dry_run",
        id,
        source,
        kind,
        partition,
        outcome,
        priority,
        attributes,
        plugin,
        reason,
        plan,
        reaches,
        verdicts,
    })
}

async fn reach(broker: &dyn Logs, plan: &Plan, moment: Moment) -> Result<Reach, broker::Error> {
    let mut reach = Reach::default();
    let plans = plan.clone().by_slot();
    let mut n_evaluated = 0;
    for target in plan.targets() {
        match target {
            Target::Everyone => reach.everyone = true,
            Target::Group(group) => reach.groups.push(group),
            Target::User(_) if n_evaluated == MAX_USERS => reach.not_evaluated += 1,
            Target::User(user) => {
                n_evaluated += 1;
                let recipient = broker.recipient(&user).await?;
                let holds = |_, criteria: &Criteria| criteria.hold(&recipient.attributes);
                let n_before = reach.users.len();
                for plan in &plans {
                    if let Some(winner) = winning_route(plan, &user, &recipient, moment, holds) {
                        let route = &plan.routes[winner.route];
                        reach.users.push(ReachedUser {
                            user: user.clone(),
                            priority: route.priority,
                            by: route.by.clone(),
                            slot: route.slot.clone(),
                        });
                    }
                }
                if reach.users.len() == n_before {
                    reach.excluded.push(user);
                }
            }
        }
    }
    Ok(reach)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;
    use crate::broker::fake::FakeBroker;
    use crate::broker::{RecipientChange, Users as _};
    use crate::event::Route;
    use crate::event::criteria::{Operator, Test};

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    #[tokio::test]
    async fn a_dry_run_has_a_time_limit() {
        let result = within::<()>(Duration::from_millis(1), std::future::pending()).await;
        assert!(matches!(result, Err(DryRunError::TooSlow)), "{result:?}");
    }

    #[tokio::test]
    async fn conditions_are_evaluated_for_each_named_user() {
        let broker = FakeBroker::default();
        let pro =
            RecipientChange::Attributes([("plan".to_owned(), Value::Text("pro".into()))].into());
        broker.change_recipient(&name("ann"), pro).await.unwrap();
        let test = Test {
            attribute: "plan".into(),
            operator: Operator::Equals,
            values: vec![Value::Text("pro".into())],
        };
        let to = ["u:ann", "u:bob", "g:ops"]
            .map(|target| target.parse().unwrap())
            .to_vec();
        let when = Some(Criteria::new(vec![vec![test]]).unwrap());
        let route = Route {
            by: name("r"),
            to,
            when,
            priority: Priority::High,
            expires_ms: None,
            collapse: None,
            event_name: None,
            slot: None,
            body: None,
        };
        let event = Event::from_json(EntryId::default(), "-", br#"{"type":"t","id":"a"}"#).unwrap();
        let resolution = Resolution::Planned(Plan {
            routes: vec![route],
        });
        let evaluation = Evaluation {
            event,
            priority: Priority::Low,
            resolution,
            verdicts: Vec::new(),
            chain: Arc::default(),
        };
        let report = report(&broker, PartitionNumber(0), evaluation, 1_000)
            .await
            .unwrap();
        let shown = serde_json::to_value(&report).unwrap();
        assert_eq!(
            (&shown["outcome"], &shown["priority"]),
            (&json!("committed"), &json!("low"))
        );
        let expected = json!({
            "users": [{ "user": "ann", "priority": "high", "by": "r" }], "excluded": ["bob"], "not_evaluated": 0, "groups": ["ops"], "everyone": false
        });
        assert_eq!(shown["reaches"], expected);
    }
}
