//! `POST /v1/events?dry_run=true`: the outcome and the reach that events would have, given the
//! current plugins, memberships and attributes. Nothing is stored. Duplicates are not detected,
//! because only a commit can detect them.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use crate::broker::Logs;
use crate::clock::now_ms;
use crate::delivery::recipients::{Moment, winning_route};
use crate::event::criteria::Criteria;
use crate::event::{
    EntryId, Event, Malformed, Name, NotificationId, Outcome, PartitionNumber, Plan, Priority,
    Target, Value, Verdict,
};
use crate::http::{ApiError, State};
use crate::ingest::pipeline::{Evaluation, NoPlugins, Resolution};

/// The maximum number of named users of one event whose conditions are evaluated.
const MAX_USERS: usize = 100;
/// The maximum duration of a request: it holds a publish permit.
const MAX_DURATION: Duration = Duration::from_secs(30);

/// The dry-run result of one event.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(in crate::http) enum Trial {
    Refused { status: &'static str, error: String },
    Tried(Box<Tried>),
}

#[derive(Debug, Serialize)]
pub(in crate::http) struct Tried {
    status: &'static str,
    id: Name,
    source: Name,
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
    users: Vec<Reached>,
    /// Named users who are not reached, because no condition holds for them.
    left_out: Vec<Name>,
    /// The number of named users beyond the first hundred; these are not evaluated.
    n_not_judged: usize,
    groups: Vec<Name>,
    everyone: bool,
}

#[derive(Debug, Serialize)]
struct Reached {
    user: Name,
    priority: Priority,
    /// The router of the winning route.
    by: Name,
}

/// Runs events through the pipeline without storing them, in order. Each comes with the partition
/// that it would be appended to.
pub(in crate::http) async fn dry_run(
    state: &State,
    broker: &dyn Logs,
    events: Vec<Result<(Event, PartitionNumber), Malformed>>,
) -> Result<Vec<Trial>, ApiError> {
    let pipeline = state.pipeline()?;
    let now_ms = now_ms();
    let mut trials = Vec::with_capacity(events.len());
    let (mut tried, mut places) = (Vec::new(), Vec::new());
    for event in events {
        match event {
            Err(error) => trials.push(Trial::Refused {
                status: "refused",
                error: error.to_string(),
            }),
            Ok((event, partition)) => {
                places.push((trials.len(), partition));
                tried.push(as_of(event, now_ms));
                trials.push(Trial::Refused {
                    status: "refused",
                    error: String::new(),
                });
            }
        }
    }
    let trying = async {
        let evaluations = pipeline
            .dry_run(tried, now_ms)
            .await
            .map_err(|NoPlugins| ApiError::unavailable(NoPlugins.to_string()))?;
        for ((place, partition), evaluation) in places.into_iter().zip(evaluations) {
            trials[place] = Trial::Tried(Box::new(
                judge(broker, partition, evaluation, now_ms).await?,
            ));
        }
        Ok(trials)
    };
    within(MAX_DURATION, trying).await
}

async fn within<T>(
    most: Duration,
    trying: impl Future<Output = Result<T, ApiError>>,
) -> Result<T, ApiError> {
    tokio::time::timeout(most, trying)
        .await
        .unwrap_or_else(|_| {
            let error = ApiError::overloaded(format!(
                "the dry run took longer than {} seconds",
                most.as_secs()
            ));
            Err(error.fix("send fewer events at once"))
        })
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

async fn judge(
    broker: &dyn Logs,
    partition: PartitionNumber,
    evaluation: Evaluation,
    now_ms: u64,
) -> Result<Tried, ApiError> {
    let Evaluation {
        event,
        priority,
        resolution,
        verdicts,
    } = evaluation;
    let (outcome, plugin, reason, plan) = match resolution {
        Resolution::Planned(plan) => (Outcome::Committed, None, None, plan),
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
    let mut reaches = Reach::default();
    // Above every id, so that everyone who is a member now is reached.
    let moment = Moment {
        partition,
        id: NotificationId::MAX,
        now_ms,
    };
    for target in plan.targets() {
        match target {
            Target::Everyone => reaches.everyone = true,
            Target::Group(group) => reaches.groups.push(group),
            Target::User(_) if reaches.users.len() + reaches.left_out.len() == MAX_USERS => {
                reaches.n_not_judged += 1
            }
            Target::User(user) => {
                let recipient = broker.recipient(&user).await?;
                let holds = |_, criteria: &Criteria| criteria.hold(&recipient.attributes);
                match winning_route(&plan, &user, &recipient, moment, holds)
                    .map(|way| &plan.routes[way.route])
                {
                    Some(route) => reaches.users.push(Reached {
                        user,
                        priority: route.priority,
                        by: route.by.clone(),
                    }),
                    None => reaches.left_out.push(user),
                }
            }
        }
    }
    let Event {
        id,
        source,
        kind,
        attributes,
        ..
    } = event;
    Ok(Tried {
        status: "tried",
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

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;
    use axum::response::IntoResponse as _;
    use serde_json::json;

    use super::*;
    use crate::broker::fake::FakeBroker;
    use crate::broker::{RecipientChange, Users as _};
    use crate::event::Route;
    use crate::event::criteria::{Criteria, Operator, Test};

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    #[tokio::test]
    async fn a_dry_run_that_takes_too_long_is_refused_with_503() {
        let Err(error) = within::<()>(Duration::from_millis(1), std::future::pending()).await
        else {
            panic!("a future that never completes must time out")
        };
        assert_eq!(
            error.into_response().status(),
            StatusCode::SERVICE_UNAVAILABLE
        );
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
        };
        let tried = judge(&broker, PartitionNumber(0), evaluation, 1_000)
            .await
            .unwrap();
        let shown = serde_json::to_value(&tried).unwrap();
        assert_eq!(
            (&shown["outcome"], &shown["priority"]),
            (&json!("committed"), &json!("low"))
        );
        let expected = json!({
            "users": [{ "user": "ann", "priority": "high", "by": "r" }], "left_out": ["bob"], "n_not_judged": 0, "groups": ["ops"], "everyone": false
        });
        assert_eq!(shown["reaches"], expected);
    }
}
