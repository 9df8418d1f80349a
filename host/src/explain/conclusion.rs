//! Summarises an explanation in a sentence or two: the result, then the assumptions or the next
//! step.

use super::{DecidedEvent, DevicePosition, Explanation, RecipientExplanation};
use crate::delivery::recipients::{MatchFailure, RouteMatch};
use crate::event::{Outcome, Plan, Verdict, VerdictKind, rfc3339};

/// Maximum number of targets named.
const MAX_TARGETS: usize = 3;

pub(super) fn of(explanation: &Explanation) -> String {
    let Explanation {
        decision,
        dead_letter,
        is_search_complete,
        plan,
        recipient,
        other_notifications,
        ..
    } = explanation;
    match (decision.outcome, other_notifications.as_slice()) {
        (Outcome::Committed, []) => committed(decision, plan.as_ref(), recipient.as_ref()),
        (Outcome::Committed, others) => {
            let first = decision.decision.slots.first().map(String::as_str);
            let first = (first.unwrap_or_default(), plan, recipient);
            let others = others.iter().map(|other| (other.slot.as_str(), &other.plan, &other.recipient));
            let parts = std::iter::once(first).chain(others).map(|(slot, plan, recipient)| {
                let slot = if slot.is_empty() { "Without a slot".to_owned() } else { format!("Slot `{slot}`") };
                format!("{slot}: {}", committed(decision, plan.as_ref(), recipient.as_ref()))
            });
            parts.collect::<Vec<_>>().join(" ")
        }
        (Outcome::Discarded, ..) => format!("Not delivered: {}.", discarded(decision)),
        (Outcome::Unrouted, ..) => format!("Not delivered: {}{}.", unrouted(decision), left_out(decision)),
        (Outcome::Duplicate, ..) => {
            "Not delivered again: this is a retry of an earlier event with the same source and id. The decision about that event is no longer kept, or lies more than 1,000 retries back.".to_owned()
        }
        (Outcome::DeadLettered, ..) => {
            let next = match dead_letter {
                Some(id) => format!("It is a dead letter: fix the cause, then run `pointsman dead-letters redrive {id}`"),
                None if *is_search_complete => "It is no longer a dead letter: it was redriven, dropped or trimmed".to_owned(),
                None => "It is one of very many dead letters: fix the cause, then find it by its entry in `pointsman dead-letters list`"
                    .to_owned(),
            };
            format!("Not delivered: {}{}. {next}.", dead_lettered(decision), because(&decision.decision.reason))
        }
        (Outcome::Retrying, ..) => retrying(decision, dead_letter.as_deref()),
    }
}

/// The conclusion about one notification of a committed event.
fn committed(
    decision: &DecidedEvent,
    plan: Option<&Plan>,
    recipient: Option<&RecipientExplanation>,
) -> String {
    match (plan, recipient) {
        (Some(plan), Some(recipient)) => for_user(decision, plan, recipient),
        (Some(plan), None) => format!(
            "The event was committed; {}. Specify a user to see whether it reached them.",
            names(plan)
        ),
        (None, _) => "The event was committed, but its record is no longer kept, so its recipients are unknown."
            .to_owned(),
    }
}

fn for_user(event: &DecidedEvent, plan: &Plan, recipient: &RecipientExplanation) -> String {
    let user = &recipient.user;
    let Some(route_match) = recipient.matches.latest() else {
        return format!(
            "{}{}.{}",
            not_reached(plan, recipient),
            left_out(event),
            assumptions(recipient)
        );
    };
    let by = by(plan, route_match);
    if let Some(later) = &recipient.superseded_by {
        let key = plan.routes[route_match.route]
            .collapse
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default();
        let later_state = format!("the later event `{}`", later.event_id);
        // If this event's own route has expired as well, that is reported further below.
        if !later.expired {
            return format!(
                "The event was for `{user}` {by}, but {later_state} replaced it (collapse key `{key}`): clients that had not received it by then get only the later one."
            );
        }
        if recipient.matches.now.is_some() && recipient.in_log != Some(false) {
            return format!(
                "The event is for `{user}` {by}, but {later_state} replaced it until that expired (collapse key `{key}`): clients that received the later one do not get this one, clients that received neither do."
            );
        }
    }
    if recipient.matches.now.is_none() {
        let is_over =
            |index: &usize| recipient.routes[*index].failure == Some(MatchFailure::Expired);
        let end = (0..plan.routes.len())
            .filter(is_over)
            .filter_map(|index| plan.routes[index].expires_ms)
            .max()
            .unwrap_or_default();
        return format!(
            "The event was for `{user}` {by}, but expired at {}: clients that had not received it by then do not get it.",
            rfc3339(end)
        );
    }
    let acknowledged: Vec<String> = recipient
        .devices
        .iter()
        .filter(|device| device.at == DevicePosition::Acknowledged)
        .map(|device| format!("`{}`", device.device))
        .collect();
    match acknowledged.as_slice() {
        [] if recipient.read => {
            format!("The event is for `{user}` {by}: it or a later one was marked as read.")
        }
        [] if recipient.in_log == Some(false) => {
            format!(
                "The event was for `{user}` {by}, but retention has removed it from the log: clients that had not received it by then get a gap."
            )
        }
        [] if recipient.devices.is_empty() => {
            format!(
                "The event is for `{user}` {by}: it is in the log; whether a client received it is unknown, because the user has no devices."
            )
        }
        [] => format!(
            "The event is for `{user}` {by}: it is in the log; no device has acknowledged it."
        ),
        [device] => format!(
            "The event is for `{user}` {by}: device {device} has acknowledged it or a later one."
        ),
        devices => {
            format!(
                "The event is for `{user}` {by}: devices {} have acknowledged it or a later one.",
                devices.join(", ")
            )
        }
    }
}

/// Why no route matched.
fn not_reached(plan: &Plan, recipient: &RecipientExplanation) -> String {
    let user = &recipient.user;
    let Some((index, reason)) = &recipient.matches.nearest else {
        return format!("`{user}` was not reached: the plan has no routes");
    };
    let reason = match plan.routes.as_slice() {
        [_] => format!("the only route {}", reason.text),
        routes => format!(
            "none of the {} routes matches; the closest, of `{}`, {}",
            routes.len(),
            routes[*index].by,
            reason.text
        ),
    };
    format!("`{user}` was not reached: {reason}")
}

/// The assumptions behind a mismatch, about facts that were not recorded.
fn assumptions(recipient: &RecipientExplanation) -> String {
    let assumptions: Vec<&str> = recipient
        .matches
        .assumptions
        .iter()
        .map(|assumption| assumption.words())
        .collect();
    if assumptions.is_empty() {
        String::new()
    } else {
        format!(" This assumes that {}.", assumptions.join(" and that "))
    }
}

fn by(plan: &Plan, route_match: RouteMatch) -> String {
    let route = &plan.routes[route_match.route];
    format!(
        "(route of `{}` to `{}`)",
        route.by, route.to[route_match.target]
    )
}

fn names(plan: &Plan) -> String {
    let targets = plan.targets();
    let names: Vec<String> = targets
        .iter()
        .take(MAX_TARGETS)
        .map(|target| format!("`{target}`"))
        .collect();
    let more = if targets.len() > MAX_TARGETS {
        format!(" and {} more", targets.len() - MAX_TARGETS)
    } else {
        String::new()
    };
    format!("its plan names {}{more}", names.join(", "))
}

fn discarded(event: &DecidedEvent) -> String {
    let dropped = of_kind(event, VerdictKind::Drop).map(|by| {
        format!(
            "the filter `{}` dropped the event{}",
            by.plugin,
            because(&by.reason)
        )
    });
    let failed = |by: &Verdict| {
        format!(
            "`{}` failed on the event, and its on_failure policy drops it{}",
            by.plugin,
            because(&by.reason)
        )
    };
    // The last failure dropped the event, because no plugin is called after a drop. Earlier
    // failures were skipped.
    dropped
        .chain(of_kind(event, VerdictKind::Failed).last().map(failed))
        .next()
        .unwrap_or_else(|| "the event was dropped".to_owned())
}

fn dead_lettered(event: &DecidedEvent) -> String {
    // The plugin that caused the dead letter was called last and gave its reason. If the reasons
    // differ, the last failure was skipped by policy. Without a verdict, the entry was not a valid
    // event and no plugin was called.
    match event
        .decision
        .verdicts
        .last()
        .filter(|by| by.reason == event.decision.reason)
    {
        Some(by) if by.verdict == VerdictKind::Rejected => {
            format!("`{}` rejected the event", by.plugin)
        }
        Some(by) if by.verdict == VerdictKind::Failed => {
            format!("`{}` failed on the event", by.plugin)
        }
        _ => "the event became a dead letter".to_owned(),
    }
}

/// `letter`: the id of its dead letter, while it waits.
fn retrying(event: &DecidedEvent, letter: Option<&str>) -> String {
    let by = match of_kind(event, VerdictKind::Retry).last() {
        Some(by) => format!("`{}` requested a retry", by.plugin),
        None => "a plugin requested a retry".to_owned(),
    };
    let retry = event.decision.retry.unwrap_or_default();
    let due = rfc3339(retry.due_ms.unwrap_or_default());
    let next = match letter {
        Some(id) => format!(
            "The next attempt is due at {due}; until then `pointsman dead-letters list --retrying` lists the event as {id}"
        ),
        None => format!(
            "It no longer waits for the retry that was due at {due}: it is a new entry of its source, or was dropped. If it was published without an id, its id is now that of the new entry"
        ),
    };
    format!(
        "Not delivered yet: at attempt {}, {by}{}. {next}.",
        retry.attempts,
        because(&event.decision.reason)
    )
}

fn unrouted(event: &DecidedEvent) -> String {
    let routers: Vec<String> = of_kind(event, VerdictKind::None)
        .map(|by| format!("`{}`", by.plugin))
        .collect();
    match routers.as_slice() {
        [] if of_kind(event, VerdictKind::Failed).next().is_some() => {
            "no router returned a recipient".to_owned()
        }
        [] => "no router was active for this event type".to_owned(),
        [router] => format!("the only router that answered, {router}, returned no recipients"),
        routers => format!(
            "none of the routers {} returned a recipient",
            routers.join(", ")
        ),
    }
}

/// Plugins that failed and were skipped, and might have decided otherwise.
fn left_out(event: &DecidedEvent) -> String {
    let failed = |by: &Verdict| {
        format!(
            "; `{}` failed on the event and was skipped by its on_failure policy{}",
            by.plugin,
            because(&by.reason)
        )
    };
    of_kind(event, VerdictKind::Failed).map(failed).collect()
}

/// The verdicts of this kind.
fn of_kind(event: &DecidedEvent, kind: VerdictKind) -> impl Iterator<Item = &Verdict> {
    event
        .decision
        .verdicts
        .iter()
        .filter(move |verdict| verdict.verdict == kind)
}

fn because(reason: &str) -> String {
    // Only the first line, because a trap has its stack in the lines below; without a full stop,
    // because the sentence goes on.
    let reason = reason
        .lines()
        .next()
        .unwrap_or_default()
        .trim_end_matches('.');
    if reason.is_empty() {
        String::new()
    } else {
        format!(": {reason}")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::{DeviceProgress, RouteMatches, StreamCounts, Successor};
    use super::*;
    use crate::event::{Decision, PartitionNumber, Retry};
    use crate::event::{EntryId, Name, NotificationId};

    fn explanation(outcome: Outcome, verdicts: &[(&str, &str)]) -> Explanation {
        let verdict = |&(plugin, verdict): &(&str, &str)| Verdict {
            plugin: plugin.into(),
            generation: 1,
            hash: String::new(),
            config_hash: String::new(),
            verdict: serde_json::from_value(json!(verdict)).unwrap(),
            reason: if verdict == "failed" {
                "it trapped.\n  0: here".into()
            } else {
                String::new()
            },
        };
        let decision = Decision {
            verdicts: verdicts.iter().map(verdict).collect(),
            ..Decision::default()
        };
        let (partition, entry) = (PartitionNumber(0), EntryId::default());
        Explanation {
            conclusion: String::new(),
            decision: DecidedEvent {
                partition,
                entry,
                outcome,
                notification: Some(NotificationId(1)),
                decision,
            },
            other_decisions: Vec::new(),
            dead_letter: None,
            is_search_complete: true,
            plan: None,
            recipient: None,
            other_notifications: Vec::new(),
        }
    }

    #[test]
    fn an_undelivered_event_names_the_plugin_responsible() {
        let check = |outcome, verdicts: &[(&str, &str)], expect: &str| {
            assert_eq!(of(&explanation(outcome, verdicts)), expect)
        };
        check(
            Outcome::Unrouted,
            &[("f", "keep"), ("r", "skipped")],
            "Not delivered: no router was active for this event type.",
        );
        check(
            Outcome::Unrouted,
            &[("a", "none"), ("b", "none")],
            "Not delivered: none of the routers `a`, `b` returned a recipient.",
        );
        let why = "`r` failed on the event and was skipped by its on_failure policy: it trapped";
        check(
            Outcome::Unrouted,
            &[("r", "failed")],
            &format!("Not delivered: no router returned a recipient; {why}."),
        );
        let other = "the only router that answered, `s`, returned no recipients";
        check(
            Outcome::Unrouted,
            &[("r", "failed"), ("s", "none")],
            &format!("Not delivered: {other}; {why}."),
        );
        check(
            Outcome::Discarded,
            &[("a", "keep"), ("b", "drop")],
            "Not delivered: the filter `b` dropped the event.",
        );
        let why = "`b` failed on the event, and its on_failure policy drops it: it trapped";
        check(
            Outcome::Discarded,
            &[("a", "keep"), ("b", "failed")],
            &format!("Not delivered: {why}."),
        );
        // The first plugin's policy is to skip it.
        check(
            Outcome::Discarded,
            &[("a", "failed"), ("b", "failed")],
            &format!("Not delivered: {why}."),
        );
        let gone = "It is no longer a dead letter: it was redriven, dropped or trimmed";
        let no_verdict = format!("Not delivered: the event became a dead letter. {gone}.");
        check(Outcome::DeadLettered, &[], &no_verdict);
        check(Outcome::DeadLettered, &[("a", "failed")], &no_verdict);
        let mut failed = explanation(Outcome::DeadLettered, &[("a", "keep"), ("b", "failed")]);
        failed.decision.decision.reason = failed.decision.decision.verdicts[1].reason.clone();
        assert_eq!(
            of(&failed),
            format!("Not delivered: `b` failed on the event: it trapped. {gone}.")
        );
        let mut waits = explanation(Outcome::Retrying, &[("a", "keep"), ("b", "retry")]);
        waits.decision.decision.reason = "not now".into();
        waits.decision.decision.retry = Some(Retry {
            attempts: 2,
            due_ms: Some(1_795_335_532_612),
        });
        let begin = "Not delivered yet: at attempt 2, `b` requested a retry: not now. ";
        let due = "due at 2026-11-22T08:18:52.612Z";
        assert_eq!(
            of(&waits),
            format!(
                "{begin}It no longer waits for the retry that was {due}: it is a new entry of its source, or was dropped. If it was published without an id, its id is now that of the new entry."
            )
        );
        waits.dead_letter = Some("0/7-0".into());
        assert_eq!(
            of(&waits),
            format!(
                "{begin}The next attempt is {due}; until then `pointsman dead-letters list --retrying` lists the event as 0/7-0."
            )
        );
        let retry = "Not delivered again: this is a retry of an earlier event with the same source and id. The decision about that event is no longer kept, or lies more than 1,000 retries back.";
        check(Outcome::Duplicate, &[], retry);
        let gone = "The event was committed, but its record is no longer kept, so its recipients are unknown.";
        check(Outcome::Committed, &[], gone);
    }

    #[test]
    fn all_acknowledging_devices_but_only_the_first_targets_are_named() {
        let mut committed = explanation(Outcome::Committed, &[]);
        let to = ["u:a", "u:b", "u:c", "u:d", "u:e"];
        committed.plan = Some(
            serde_json::from_value(json!([{ "by": "r", "to": to, "priority": "normal" }])).unwrap(),
        );
        assert_eq!(
            of(&committed),
            "The event was committed; its plan names `u:a`, `u:b`, `u:c` and 2 more. Specify a user to see whether it reached them."
        );
        let later = Successor {
            event_id: Name::parse("later").unwrap(),
            notification: NotificationId(2),
            expired: true,
        };
        let route_match = Some(RouteMatch {
            route: 0,
            target: 1,
        });
        let device = |name: &str, at| DeviceProgress {
            device: Name::parse(name).unwrap(),
            at,
        };
        committed.recipient = Some(RecipientExplanation {
            user: Name::parse("b").unwrap(),
            routes: Vec::new(),
            won: Some(0),
            wins: Some(0),
            in_log: Some(false),
            superseded_by: None,
            devices: vec![
                device("phone", DevicePosition::Acknowledged),
                device("tv", DevicePosition::Before),
                device("watch", DevicePosition::Acknowledged),
            ],
            read: false,
            streams: StreamCounts { open: 0, past: 0 },
            not_known: Vec::new(),
            matches: RouteMatches {
                at_commit: route_match,
                now: route_match,
                ..RouteMatches::default()
            },
        });
        assert_eq!(
            of(&committed),
            "The event is for `b` (route of `r` to `u:b`): devices `phone`, `watch` have acknowledged it or a later one."
        );
        // An expired later notification does not bring back an earlier one that has left the log.
        let recipient = committed.recipient.as_mut().unwrap();
        recipient.devices.clear();
        recipient.superseded_by = Some(later);
        let conclusion = of(&committed);
        assert!(
            conclusion.starts_with(
                "The event was for `b` (route of `r` to `u:b`), but retention has removed it from the log"
            ),
            "{conclusion}"
        );
    }
}
