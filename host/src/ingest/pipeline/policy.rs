//! The outcome of one plugin call for its event, and the policy for plugins that fail.

use super::Resolution;
use crate::event::{Verdict, VerdictKind};
use crate::plugin::registry::generation::Generation;
use crate::plugin::registry::settings::OnFailure;
use crate::plugin::shadow::outcome::PluginDecision;
use crate::plugin::{Answer, Call, Role};

/// The outcome of calling one plugin.
pub(super) enum StepOutcome {
    Answered(Answer),
    /// The plugin does not affect this event.
    Passed,
    /// The event is resolved; no other plugin is called.
    Over(Resolution),
}

impl StepOutcome {
    /// Applies the failure policy to an event that a plugin failed on.
    pub(super) fn of_failure(generation: &Generation, reason: String, attempts: u32) -> Self {
        let plugin = generation.plugin.name().to_string();
        match generation.settings.on_failure {
            OnFailure::DeadLetter => Self::Over(Resolution::Failed {
                plugin,
                reason,
                attempts,
                retry: false,
            }),
            OnFailure::Skip => Self::Passed,
            OnFailure::Drop => Self::Over(Resolution::Discarded {
                plugin,
                reason: format!("the plugin failed: {reason}"),
            }),
        }
    }

    /// The plugin's decision about this call. `verdict`: the one recorded for it.
    pub(super) fn decision(
        &self,
        role: Role,
        call: &Call<'_>,
        verdict: Option<&Verdict>,
    ) -> PluginDecision {
        match (self, verdict) {
            (Self::Answered(answer), _) => PluginDecision::of_answer(answer, call),
            (_, Some(verdict))
                if matches!(
                    verdict.verdict,
                    VerdictKind::Rejected | VerdictKind::Retry | VerdictKind::Failed
                ) =>
            {
                PluginDecision::Failed {
                    reason: verdict.reason.clone(),
                }
            }
            _ => PluginDecision::nothing(role),
        }
    }
}
