//! One plugin alone, for its author: asked about events as the pipeline asks it, with what each answer cost.
//!
//! It promises that what it shows is what a node would get of this plugin: the same presentation of an event, the same limits, and for a
//! plugin that is both filter and router the same event between the two. A plugin that fails is asked no second time, and no policy hides it.
//! Whether a decision is the right one, the author's golden file says.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value as Json;

use super::published_priority;
use crate::event::{Event, Priority, Route, Value};
use crate::plugin::{Answer, Call, CallError, Engine, Instance, ParsedPayload, Plugin, Role, Ticking};

/// See the head of this file.
#[derive(Debug)]
pub struct Rehearsal {
    plugin: Plugin,
    ticking: Ticking,
    slot: Option<Instance>,
}

/// What a plugin made of one event, and at which cost.
#[derive(Clone, Debug)]
pub struct Performance {
    pub decided: Decided,
    /// Why there is no answer.
    pub error: Option<CallError>,
    /// Of all calls about the event, without the making of an instance.
    pub time: Duration,
    /// Of the instance, after the event; `None` if it was thrown away.
    pub memory_bytes: Option<usize>,
    /// Of the largest answer about the event.
    pub answer_bytes: usize,
    pub n_targets: usize,
}

/// What a plugin decided about one event, as golden files have it: nothing in it is of chance or of the machine.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Decided {
    /// The CloudEvents `id`.
    pub event: String,
    /// As decision records have them: `keep`, `amend`, `drop`, `routes`, `none`, `skipped` (its types do not match), or `failed`.
    pub verdicts: Vec<&'static str>,
    /// Why it was dropped, or what failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What the filter made of the event's priority.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<Priority>,
    /// What the filter set.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub attributes: BTreeMap<String, Value>,
    /// Without the name of the plugin.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<Json>,
}

impl Performance {
    /// Whether the plugin is broken. To reject an event, or to ask for it again, is a verdict.
    pub fn is_failure(&self) -> bool {
        self.error.as_ref().is_some_and(|error| !matches!(error, CallError::Rejected(_) | CallError::Retry(_)))
    }
}

impl Rehearsal {
    pub fn new(engine: &Engine, plugin: Plugin) -> Self {
        Self { plugin, ticking: engine.ticking(), slot: None }
    }

    pub fn plugin(&self) -> &Plugin {
        &self.plugin
    }

    /// Asks about one event. `clock_ms`: the clock that the plugin is shown, in milliseconds since the Unix epoch.
    pub fn perform(&mut self, event: &Event, clock_ms: u64) -> Performance {
        let mut decided = Decided { event: event.id.to_string(), ..Decided::default() };
        let mut performance = Performance {
            decided: Decided::default(),
            error: None,
            time: Duration::ZERO,
            memory_bytes: None,
            answer_bytes: 0,
            n_targets: 0,
        };
        if let Err(error) = self.fold(event, clock_ms, &mut decided, &mut performance) {
            decided.verdicts.push("failed");
            decided.reason = Some(error.to_string());
            performance.error = Some(error);
        }
        performance.memory_bytes = self.slot.as_ref().map(Instance::memory_bytes);
        Performance { decided, ..performance }
    }

    fn fold(&mut self, event: &Event, clock_ms: u64, decided: &mut Decided, costs: &mut Performance) -> Result<(), CallError> {
        if !self.plugin.wants(&event.kind) {
            decided.verdicts.push("skipped");
            return Ok(());
        }
        let payload = ParsedPayload::default();
        let mut priority = published_priority(event);
        let mut amended = None;
        for role in [Role::Filter, Role::Router] {
            if !self.plugin.has_role(role) {
                continue;
            }
            let call = Call { event: amended.as_ref().unwrap_or(event), priority, clock_ms, payload: &payload };
            match self.ask(role, &call, costs)? {
                Answer::Keep => decided.verdicts.push("keep"),
                Answer::Drop(reason) => {
                    decided.verdicts.push("drop");
                    decided.reason = Some(reason);
                    return Ok(());
                }
                Answer::Amend(answer) => {
                    decided.verdicts.push("amend");
                    decided.priority = answer.priority;
                    let set = answer.event.attributes.iter().filter(|(name, value)| event.attributes.get(*name) != Some(value));
                    decided.attributes = set.map(|(name, value)| (name.clone(), value.clone())).collect();
                    priority = answer.priority.unwrap_or(priority);
                    amended = Some(answer.event);
                }
                Answer::Routes(plan) => {
                    decided.verdicts.push(if plan.routes.is_empty() { "none" } else { "routes" });
                    costs.n_targets = plan.routes.iter().map(|route| route.to.len()).sum();
                    decided.routes = plan.routes.iter().map(route_without_author).collect();
                }
            }
        }
        Ok(())
    }

    fn ask(&mut self, role: Role, call: &Call<'_>, costs: &mut Performance) -> Result<Answer, CallError> {
        if self.slot.is_none() {
            self.slot = Some(self.plugin.instantiate(&self.ticking)?);
        }
        let began = Instant::now();
        let answer = self.plugin.call(&mut self.slot, &self.ticking, role, call);
        costs.time += began.elapsed();
        costs.answer_bytes = costs.answer_bytes.max(self.slot.as_ref().map_or(0, Instance::answer_bytes));
        answer
    }

    /// Asks about all of these events, in these roles and with all that a call takes, and answers how long that took; what is decided is
    /// thrown away. Without a warm-up: the first time is slower.
    ///
    /// # Errors
    /// The first failure; a verdict is none.
    pub fn time(&mut self, roles: &[Role], events: &[(Event, u64)]) -> Result<Duration, CallError> {
        let began = Instant::now();
        for (event, clock_ms) in events {
            if !self.plugin.wants(&event.kind) {
                continue;
            }
            let payload = ParsedPayload::default();
            let call = Call { event, priority: published_priority(event), clock_ms: *clock_ms, payload: &payload };
            for role in roles {
                match self.plugin.call(&mut self.slot, &self.ticking, *role, &call) {
                    Ok(Answer::Drop(_)) | Err(CallError::Rejected(_) | CallError::Retry(_)) => break,
                    Ok(_) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(began.elapsed())
    }
}

/// A route as records have it, but for the name of the plugin, which is that of its file.
fn route_without_author(route: &Route) -> Json {
    let mut json = serde_json::to_value(route).unwrap_or_default();
    if let Some(route) = json.as_object_mut() {
        route.remove("by");
    }
    json
}
