//! The plugin runner: runs one plugin in isolation for its author, called as in the pipeline, and
//! measures the cost of each answer.
//!
//! The result is what a node would get from this plugin: the same presentation of an event, the
//! same limits, and, for a plugin that is both filter and router, the same event for both. A
//! failing plugin is not called again, and no policy hides the failure.
//!
//! Whether a decision is correct is defined by the author's golden file. Interaction with other
//! plugins only shows on a node.

use std::time::{Duration, Instant};

use serde_json::{Value as Json, json};

use crate::event::Event;
use crate::ingest::pipeline::published_priority;
use crate::plugin::shadow::outcome::PluginDecision;
use crate::plugin::{
    Answer, Call, CallError, Engine, Instance, ParsedPayload, Plugin, Role, Ticking,
    thread_cpu_time,
};

/// Runs one plugin on one event after another, on the same instance where possible.
#[derive(Debug)]
pub struct PluginRunner {
    plugin: Plugin,
    ticking: Ticking,
    slot: Option<Instance>,
}

/// The decisions of a plugin about one event, and their cost.
#[derive(Clone, Debug, Default)]
pub struct RunReport {
    /// The decision as a filter, then as a router; empty if the event's type does not match.
    pub decided: Vec<PluginDecision>,
    /// Why a decision is missing.
    pub error: Option<CallError>,
    /// CPU time, as counted by deadlines, of all calls for the event, without creating an instance.
    pub time: Duration,
    /// The memory of the instance after the event, in bytes; `None` if it was discarded.
    pub memory_bytes: Option<usize>,
    /// The size of the largest answer for the event, in bytes.
    pub answer_bytes: usize,
    pub n_targets: usize,
}

impl RunReport {
    /// Whether the plugin is broken. Rejecting an event, or requesting a retry, is a verdict.
    pub fn is_failure(&self) -> bool {
        self.error
            .as_ref()
            .is_some_and(|error| !matches!(error, CallError::Rejected(_) | CallError::Retry(_)))
    }

    /// The decisions in the format of golden files: reproducible, independent of the machine and of
    /// the name of the plugin's file.
    pub fn to_golden(&self, event: &Event) -> Json {
        let mut decided = json!({ "event": event.id, "decided": self.decided });
        for decided in decided["decided"].as_array_mut().into_iter().flatten() {
            for route in decided
                .get_mut("plan")
                .and_then(Json::as_array_mut)
                .into_iter()
                .flatten()
                .filter_map(Json::as_object_mut)
            {
                route.remove("by");
            }
        }
        decided
    }
}

impl PluginRunner {
    pub fn new(engine: &Engine, plugin: Plugin) -> Self {
        Self {
            plugin,
            ticking: engine.ticking(),
            slot: None,
        }
    }

    /// Ends the instance and returns the plugin.
    pub fn into_plugin(self) -> Plugin {
        self.plugin
    }

    /// Calls the plugin for one event. `clock_ms`: the clock shown to the plugin, in milliseconds
    /// since the Unix epoch.
    pub fn run(&mut self, event: &Event, clock_ms: u64) -> RunReport {
        let mut report = RunReport::default();
        if let Err(error) = self.fold(event, clock_ms, &mut report) {
            report.decided.push(PluginDecision::of_failure(&error));
            report.error = Some(error);
        }
        report.memory_bytes = self.slot.as_ref().map(Instance::memory_bytes);
        report
    }

    fn fold(
        &mut self,
        event: &Event,
        clock_ms: u64,
        report: &mut RunReport,
    ) -> Result<(), CallError> {
        if !self.plugin.wants(&event.kind) {
            return Ok(());
        }
        let payload = ParsedPayload::default();
        let mut priority = published_priority(event);
        let mut amended = None;
        for role in [Role::Filter, Role::Router]
            .into_iter()
            .filter(|role| self.plugin.has_role(*role))
            .collect::<Vec<_>>()
        {
            let call = Call {
                event: amended.as_ref().unwrap_or(event),
                priority,
                clock_ms,
                payload: &payload,
            };
            let answer = self.call(role, &call, report)?;
            report
                .decided
                .push(PluginDecision::of_answer(&answer, &call));
            match answer {
                Answer::Keep => {}
                Answer::Drop(_) => return Ok(()),
                Answer::Amend(answer) => {
                    priority = answer.priority.unwrap_or(priority);
                    amended = Some(answer.event);
                }
                Answer::Routes(plan) => {
                    report.n_targets = plan.routes.iter().map(|route| route.to.len()).sum()
                }
            }
        }
        Ok(())
    }

    fn call(
        &mut self,
        role: Role,
        call: &Call<'_>,
        costs: &mut RunReport,
    ) -> Result<Answer, CallError> {
        if self.slot.is_none() {
            self.slot = Some(self.plugin.instantiate(&self.ticking)?);
        }
        let began = thread_cpu_time();
        let answer = self.plugin.call(&mut self.slot, &self.ticking, role, call);
        costs.time += thread_cpu_time().saturating_sub(began);
        costs.answer_bytes = costs
            .answer_bytes
            .max(self.slot.as_ref().map_or(0, Instance::answer_bytes));
        answer
    }

    /// Calls the plugin for all of these events, each with its clock, in these roles, and returns
    /// the time taken; decisions are discarded. The first call is slower, because it creates an
    /// instance.
    ///
    /// # Errors
    /// The first failure; a verdict is not a failure.
    pub fn time(&mut self, roles: &[Role], events: &[(Event, u64)]) -> Result<Duration, CallError> {
        let began = Instant::now();
        for (event, clock_ms) in events
            .iter()
            .filter(|(event, _)| self.plugin.wants(&event.kind))
        {
            let payload = ParsedPayload::default();
            let call = Call {
                event,
                priority: published_priority(event),
                clock_ms: *clock_ms,
                payload: &payload,
            };
            for role in roles {
                match self
                    .plugin
                    .call(&mut self.slot, &self.ticking, *role, &call)
                {
                    Ok(Answer::Drop(_)) | Err(CallError::Rejected(_) | CallError::Retry(_)) => {
                        break;
                    }
                    Ok(_) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(began.elapsed())
    }
}
