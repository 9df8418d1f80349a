//! An explanation in a sentence, with what it holds under in a second one, for whoever has no time for its steps.

use super::{At, Decided, Explanation, Standing};
use crate::broker::Verdict;
use crate::delivery::recipients::{Miss, Way};
use crate::event::{Outcome, Plan, rfc3339};

/// Targets of a plan that are named one by one.
const MAX_TARGETS: usize = 3;

pub(super) fn of(explanation: &Explanation) -> String {
    let Explanation {
        decision,
        dead_letter,
        is_sought_to_the_end,
        plan,
        recipient,
        ..
    } = explanation;
    match (decision.outcome, plan, recipient) {
        (Outcome::Committed, Some(plan), Some(standing)) => for_user(decision, plan, standing),
        (Outcome::Committed, Some(plan), None) => {
            format!("The event was committed, {}; whom of them it reached, say which user.", names(plan))
        }
        (Outcome::Committed, None, _) => {
            "The event was committed, but its record is no longer kept, so that nobody can say any more whom it named.".to_owned()
        }
        (Outcome::Discarded, ..) => format!("Nobody was reached: {}.", discarded(decision)),
        (Outcome::Unrouted, ..) => format!("Nobody was reached: {}{}.", unrouted(decision), left_out(decision)),
        (Outcome::Duplicate, ..) => {
            "This was a retry of an event that was there already, and of that one, which alone counts, nothing is kept any more, unless it lies behind 1,000 retries.".to_owned()
        }
        (Outcome::DeadLettered, ..) => {
            let next = match dead_letter {
                Some(id) => format!("mend that, and `pointsman dead redrive {id}` sends it through again"),
                None if *is_sought_to_the_end => "it is no longer among the dead letters: it was redriven, dropped or trimmed".to_owned(),
                None => "mend that, and find it by its entry in `pointsman dead list`, as too many others became dead letters with it"
                    .to_owned(),
            };
            format!("Nobody was reached: {}{}; {next}.", dead_lettered(decision), because(&decision.decision.reason))
        }
    }
}

fn for_user(decided: &Decided, plan: &Plan, standing: &Standing) -> String {
    let user = &standing.user;
    // As a stream has it that comes by now; what nobody gets any more, as it was committed.
    let Some(way) = standing.ways.now.or(standing.ways.then) else {
        return format!(
            "{}{}.{}",
            missed(plan, standing),
            left_out(decided),
            provided(standing)
        );
    };
    let by = by(plan, way);
    if let Some(later) = &standing.superseded_by {
        let key = plan.routes[way.route]
            .collapse
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default();
        let later_state = format!("the later event `{}`", later.event_id);
        // Without its own expiry, which is told below.
        if !later.expired {
            return format!(
                "The event was for `{user}`, {by}, but {later_state} has the same collapse key `{key}`: who had not had this one by then gets only that."
            );
        }
        if standing.ways.now.is_some() && standing.in_log != Some(false) {
            return format!(
                "The event is for `{user}`, {by}, but {later_state} had the same collapse key `{key}` until it expired: who had that one does not get this one any more, and who had neither does."
            );
        }
    }
    if standing.ways.now.is_none() {
        let is_over = |index: &usize| standing.routes[*index].miss == Some(Miss::Expired);
        let end = (0..plan.routes.len())
            .filter(is_over)
            .filter_map(|index| plan.routes[index].expires_ms)
            .max()
            .unwrap_or_default();
        return format!(
            "The event was for `{user}`, {by}, but expired at {}: who had not had it by then does not get it.",
            rfc3339(end)
        );
    }
    let acknowledged: Vec<String> = standing
        .devices
        .iter()
        .filter(|device| device.at == At::Acknowledged)
        .map(|device| format!("`{}`", device.device))
        .collect();
    match acknowledged.as_slice() {
        [] if standing.read => format!(
            "The event is for `{user}`, {by}: it, or what came after it, was marked as read."
        ),
        [] if standing.in_log == Some(false) => {
            format!(
                "The event was for `{user}`, {by}, but has left the log, which keeps so many and no longer: who had not had it by then is told of a gap."
            )
        }
        [] if standing.devices.is_empty() => {
            format!(
                "The event is for `{user}`, {by}: it is in the log, and whether a client has had it is not known, as no device has said so."
            )
        }
        [] => format!(
            "The event is for `{user}`, {by}: it is in the log, and no device has acknowledged it."
        ),
        [device] => format!(
            "The event is for `{user}`, {by}: the device {device} has acknowledged it, or what came after it."
        ),
        devices => {
            format!(
                "The event is for `{user}`, {by}: the devices {} have acknowledged it, or what came after it.",
                devices.join(", ")
            )
        }
    }
}

/// Why no route reached.
fn missed(plan: &Plan, standing: &Standing) -> String {
    let user = &standing.user;
    let Some((index, why)) = &standing.ways.nearest else {
        return format!("`{user}` was not reached: its plan has no route");
    };
    let reason = match plan.routes.as_slice() {
        [_] => format!("the only route {}", why.text),
        routes => format!(
            "none of the {} routes does; the nearest, of `{}`, {}",
            routes.len(),
            routes[*index].by,
            why.text
        ),
    };
    format!("`{user}` was not reached: {reason}")
}

/// What must have been so for that to be true: nobody kept it.
fn provided(standing: &Standing) -> String {
    let provided: Vec<&str> = standing
        .ways
        .provided
        .iter()
        .map(|proviso| proviso.words())
        .collect();
    if provided.is_empty() {
        String::new()
    } else {
        format!(" That holds if {}.", provided.join(" and "))
    }
}

fn by(plan: &Plan, way: Way) -> String {
    let route = &plan.routes[way.route];
    format!(
        "by the route of `{}` to `{}`",
        route.by, route.to[way.target]
    )
}

fn names(plan: &Plan) -> String {
    let targets = plan.targets();
    let told: Vec<String> = targets
        .iter()
        .take(MAX_TARGETS)
        .map(|target| format!("`{target}`"))
        .collect();
    let more = if targets.len() > MAX_TARGETS {
        format!(" and {} more", targets.len() - MAX_TARGETS)
    } else {
        String::new()
    };
    format!("and its plan names {}{more}", told.join(", "))
}

fn discarded(decided: &Decided) -> String {
    let dropped = of_kind(decided, "drop").map(|by| {
        format!(
            "the filter `{}` dropped the event{}",
            by.plugin,
            because(&by.reason)
        )
    });
    let failed = |by: &Verdict| {
        format!(
            "`{}` failed on the event, which its on_failure drops then{}",
            by.plugin,
            because(&by.reason)
        )
    };
    // Others that failed before it were only left out: nobody is asked any more after a drop.
    dropped
        .chain(of_kind(decided, "failed").last().map(failed))
        .next()
        .unwrap_or_else(|| "the event was dropped".to_owned())
}

fn dead_lettered(decided: &Decided) -> String {
    // Whoever made it one was asked last and said why. Of what is no event nobody was asked, and a failure may have been left out.
    match decided
        .decision
        .verdicts
        .last()
        .filter(|by| by.reason == decided.decision.reason)
    {
        Some(by) if by.verdict == "rejected" => {
            format!("the event is a dead letter, as `{}` rejected it", by.plugin)
        }
        Some(by) if by.verdict == "failed" => format!(
            "the event is a dead letter, as `{}` failed on it",
            by.plugin
        ),
        _ => "the event is a dead letter".to_owned(),
    }
}

fn unrouted(decided: &Decided) -> String {
    let asked: Vec<String> = of_kind(decided, "none")
        .map(|by| format!("`{}`", by.plugin))
        .collect();
    match asked.as_slice() {
        [] if of_kind(decided, "failed").next().is_some() => "no router named anybody".to_owned(),
        [] => "no router was asked, as none was at work that wants events of its type".to_owned(),
        [router] => format!("the only router that answered, {router}, named nobody"),
        routers => format!("none of the routers {} named anybody", routers.join(", ")),
    }
}

/// Who could have decided otherwise, had it not failed.
fn left_out(decided: &Decided) -> String {
    let failed = |by: &Verdict| {
        format!(
            "; `{}` failed on the event and was left out, as its on_failure says{}",
            by.plugin,
            because(&by.reason)
        )
    };
    of_kind(decided, "failed").map(failed).collect()
}

/// Those who answered so.
fn of_kind<'a>(decided: &'a Decided, word: &'a str) -> impl Iterator<Item = &'a Verdict> {
    decided
        .decision
        .verdicts
        .iter()
        .filter(move |verdict| verdict.verdict == word)
}

fn because(reason: &str) -> String {
    // What comes after it goes on with the sentence; a trap has its stack in the lines below.
    let reason = reason
        .lines()
        .next()
        .unwrap_or_default()
        .trim_end_matches('.');
    if reason.is_empty() {
        String::new()
    } else {
        format!(", because: {reason}")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::{Device, Streams, Successor, Ways};
    use super::*;
    use crate::broker::{Decision, PartitionNumber};
    use crate::event::{EntryId, Name, NotificationId};

    fn explanation(outcome: Outcome, verdicts: &[(&str, &str)]) -> Explanation {
        let verdict = |&(plugin, verdict): &(&str, &str)| Verdict {
            plugin: plugin.into(),
            generation: 1,
            hash: String::new(),
            verdict: verdict.into(),
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
            decision: Decided {
                partition,
                entry,
                outcome,
                notification: Some(NotificationId(1)),
                decision,
            },
            other_decisions: Vec::new(),
            dead_letter: None,
            is_sought_to_the_end: true,
            plan: None,
            recipient: None,
        }
    }

    #[test]
    fn what_reached_nobody_is_said_of_whoever_had_a_say() {
        let check = |outcome, verdicts: &[(&str, &str)], expect: &str| {
            assert_eq!(of(&explanation(outcome, verdicts)), expect)
        };
        check(
            Outcome::Unrouted,
            &[("f", "keep"), ("r", "skipped")],
            "Nobody was reached: no router was asked, as none was at work that wants events of its type.",
        );
        check(
            Outcome::Unrouted,
            &[("a", "none"), ("b", "none")],
            "Nobody was reached: none of the routers `a`, `b` named anybody.",
        );
        let why =
            "`r` failed on the event and was left out, as its on_failure says, because: it trapped";
        check(
            Outcome::Unrouted,
            &[("r", "failed")],
            &format!("Nobody was reached: no router named anybody; {why}."),
        );
        let other = "the only router that answered, `s`, named nobody";
        check(
            Outcome::Unrouted,
            &[("r", "failed"), ("s", "none")],
            &format!("Nobody was reached: {other}; {why}."),
        );
        check(
            Outcome::Discarded,
            &[("a", "keep"), ("b", "drop")],
            "Nobody was reached: the filter `b` dropped the event.",
        );
        let why = "`b` failed on the event, which its on_failure drops then, because: it trapped";
        check(
            Outcome::Discarded,
            &[("a", "keep"), ("b", "failed")],
            &format!("Nobody was reached: {why}."),
        );
        // By the policy of the first, the event went on without it.
        check(
            Outcome::Discarded,
            &[("a", "failed"), ("b", "failed")],
            &format!("Nobody was reached: {why}."),
        );
        let gone = "it is no longer among the dead letters: it was redriven, dropped or trimmed";
        let nobody = format!("Nobody was reached: the event is a dead letter; {gone}.");
        check(Outcome::DeadLettered, &[], &nobody);
        check(Outcome::DeadLettered, &[("a", "failed")], &nobody);
        let mut failed = explanation(Outcome::DeadLettered, &[("a", "keep"), ("b", "failed")]);
        failed.decision.decision.reason = failed.decision.decision.verdicts[1].reason.clone();
        assert_eq!(
            of(&failed),
            format!(
                "Nobody was reached: the event is a dead letter, as `b` failed on it, because: it trapped; {gone}."
            )
        );
        let retry = "This was a retry of an event that was there already, and of that one, which alone counts, nothing is kept any more, unless it lies behind 1,000 retries.";
        check(Outcome::Duplicate, &[], retry);
        let gone = "The event was committed, but its record is no longer kept, so that nobody can say any more whom it named.";
        check(Outcome::Committed, &[], gone);
    }

    #[test]
    fn devices_that_acknowledged_are_named_and_targets_up_to_a_number() {
        let mut told = explanation(Outcome::Committed, &[]);
        let to = ["u:a", "u:b", "u:c", "u:d", "u:e"];
        told.plan = Some(
            serde_json::from_value(json!([{ "by": "r", "to": to, "priority": "normal" }])).unwrap(),
        );
        assert_eq!(
            of(&told),
            "The event was committed, and its plan names `u:a`, `u:b`, `u:c` and 2 more; whom of them it reached, say which user."
        );
        let later = Successor {
            event_id: Name::parse("later").unwrap(),
            notification: NotificationId(2),
            expired: true,
        };
        let way = Some(Way {
            route: 0,
            target: 1,
        });
        let device = |name: &str, at| Device {
            device: Name::parse(name).unwrap(),
            at,
        };
        told.recipient = Some(Standing {
            user: Name::parse("b").unwrap(),
            routes: Vec::new(),
            won: Some(0),
            wins: Some(0),
            in_log: Some(false),
            superseded_by: None,
            devices: vec![
                device("phone", At::Acknowledged),
                device("tv", At::Before),
                device("watch", At::Acknowledged),
            ],
            read: false,
            streams: Streams { open: 0, past: 0 },
            not_known: Vec::new(),
            ways: Ways {
                then: way,
                now: way,
                ..Ways::default()
            },
        });
        assert_eq!(
            of(&told),
            "The event is for `b`, by the route of `r` to `u:b`: the devices `phone`, `watch` have acknowledged it, or what came after it."
        );
        // A later state that has expired brings back no earlier one that is gone.
        let standing = told.recipient.as_mut().unwrap();
        standing.devices.clear();
        standing.superseded_by = Some(later);
        let conclusion = of(&told);
        assert!(
            conclusion.starts_with(
                "The event was for `b`, by the route of `r` to `u:b`, but has left the log"
            ),
            "{conclusion}"
        );
    }
}
