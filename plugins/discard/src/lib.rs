//! A filter that drops the events that match one of its rules and records the rule as the reason.
//! Without rules it keeps every event.
//!
//! ```toml
//! [[plugins.discard.config.rules]]
//! reason = "test traffic of the shop"  # optional; the default is a description of the rule
//! match.type = "order.*"               # all parts must hold; the first rule that holds decides
//! match.attributes = { env = ["test", "dev"] }
//! match.payload = { "/order/total" = 0 }
//! match.older_than_s = 3600
//! ```
//!
//! [`pointsman_plugin::Condition`] documents the conditions.

use pointsman_plugin::{
    Condition, Event, Failure, Filter, Interest, Issue, Plugin, Verdict, export,
};
use schemars::JsonSchema;
use serde::Deserialize;

/// The configuration.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Config {
    #[serde(default)]
    rules: Vec<Rule>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Rule {
    /// The reason recorded with each event that the rule drops.
    reason: Option<String>,
    /// The events to drop.
    r#match: Option<Condition>,
}

struct Discard {
    rules: Vec<(Condition, String)>,
}

export!(Discard as filter);

impl Plugin for Discard {
    type Config = Config;

    fn new(config: Config) -> Result<Self, Issue> {
        let rules = config.rules.into_iter().enumerate().map(|(at, rule)| {
            let would_drop_all = || {
                Issue::new(
                    format!("rules[{at}]"),
                    "would drop every event; add a condition, such as match = { type = \"debug.*\" }",
                )
            };
            let condition = rule.r#match.ok_or_else(would_drop_all)?;
            let reason = rule.reason.unwrap_or_else(|| condition.to_string());
            Ok((condition, reason))
        });
        Ok(Self {
            rules: rules.collect::<Result<_, Issue>>()?,
        })
    }

    /// Exactly the values that the rules read.
    fn interest(&self) -> Interest {
        Interest::in_conditions(self.rules.iter().map(|(condition, _)| Some(condition)))
    }
}

impl Filter for Discard {
    fn evaluate(&self, event: &Event) -> Result<Verdict, Failure> {
        let rule = self
            .rules
            .iter()
            .find(|(condition, _)| condition.holds(event));
        Ok(rule.map_or(Verdict::Keep, |(_, reason)| Verdict::Drop(reason.clone())))
    }
}

#[cfg(test)]
mod tests {
    use pointsman_plugin::testing::{self, EventBuilder, configure, event};
    use serde_json::json;

    use super::*;

    /// The verdict on the event as the host would pass it; `Keep` if the host would not call the
    /// plugin.
    fn verdict(rules: serde_json::Value, event: EventBuilder) -> Verdict {
        let plugin: Discard = configure(json!({ "rules": rules })).unwrap();
        event
            .seen_by(&plugin)
            .map_or(Verdict::Keep, |event| plugin.evaluate(&event).unwrap())
    }

    fn dropped(reason: &str) -> Verdict {
        Verdict::Drop(reason.into())
    }

    #[test]
    fn without_configuration_everything_is_kept() {
        let plugin: Discard = configure(json!({})).unwrap();
        let seen = event("anything")
            .attribute("a", 1)
            .seen_by(&plugin)
            .unwrap();
        assert!(
            seen.attributes.is_empty(),
            "without rules no attribute is read"
        );
        assert_eq!(plugin.evaluate(&seen), Ok(Verdict::Keep));
    }

    #[test]
    fn the_first_rule_that_holds_drops_the_event_and_gives_the_reason() {
        let rules = json!([
            {"match": {"type": "order.*", "attributes": {"env": "test"}}},
            {"match": {"payload": {"/order/total": 0}}, "reason": "free orders"},
            {"match": {"older_than_s": 60}}
        ]);
        testing::freeze_clock(1_000_000);
        assert_eq!(
            verdict(rules.clone(), event("order.paid").attribute("env", "test")),
            dropped("type is order.* and env is test")
        );
        assert_eq!(
            verdict(
                rules.clone(),
                event("t").json(&json!({"order": {"total": 0}})).time_ms(0)
            ),
            dropped("free orders")
        );
        assert_eq!(
            verdict(rules.clone(), event("t").time_ms(939_999)),
            dropped("older than 60 s")
        );
        assert_eq!(
            verdict(rules.clone(), event("bill.paid").attribute("env", "test")),
            Verdict::Keep
        );
        assert_eq!(
            verdict(
                rules.clone(),
                event("t").json(&json!({"order": {"total": 5}}))
            ),
            Verdict::Keep
        );
        assert_eq!(verdict(rules, event("t").text("no JSON")), Verdict::Keep);
    }

    #[test]
    fn the_interest_covers_only_the_types_that_a_rule_names() {
        let plugin: Discard =
            configure(json!({"rules": [{"match": {"type": "a.*", "payload": {"/x": 1}}}, {"match": {"type": "b"}}]})).unwrap();
        assert_eq!(
            plugin.interest(),
            Interest::in_types(["a.*", "b"]).fields(["/x"])
        );
    }

    #[test]
    fn a_rule_that_matches_everything_or_is_invalid_is_rejected_with_its_location() {
        for (rule, path, message) in [
            (json!({}), "rules[0]", "would drop every event"),
            (
                json!({"reason": "why"}),
                "rules[0]",
                "would drop every event",
            ),
            (
                json!({"match": {}}),
                "rules[0].match",
                "is empty and would hold for every event",
            ),
            (
                json!({"match": {"payload": {"order": 1}}}),
                "rules[0].match.payload.order",
                "write '/order'",
            ),
            (
                json!({"match": {"typ": "x"}}),
                "rules[0].match.typ",
                "unknown field `typ`",
            ),
            (
                json!({"type": "x"}),
                "rules[0].type",
                "expected `reason` or `match`",
            ),
        ] {
            let Err(issues) = configure::<Discard>(json!({ "rules": [rule] })) else {
                panic!("{rule} was accepted")
            };
            assert!(
                issues[0].path == path && issues[0].message.contains(message),
                "{rule} gave {issues:?}"
            );
        }
    }
}
