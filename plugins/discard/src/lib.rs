//! A filter that drops what its rules describe, and says which rule it was. Without a rule it keeps everything.
//!
//! ```toml
//! [[plugins.discard.config.rules]]
//! reason = "test traffic of the shop"         # optional; without one the rule describes itself
//! match.type = "order.*"                      # all that a condition says must hold; one rule is enough
//! match.attributes = { env = ["test", "dev"] }
//! match.payload = { "/order/total" = 0 }
//! match.older_than_s = 3600
//! ```
//!
//! What a condition can say is [`pointsman_plugin::Condition`]'s.

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
    /// What is recorded with each event that the rule drops.
    reason: Option<String>,
    /// Which events it drops.
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
                    "would drop every event; say which: match = { type = \"debug.*\" }",
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

    /// What the rules look at, and no more.
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

    /// The verdict on the event as the host would show it; `Keep` where the host would not even ask.
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
        assert!(seen.attributes.is_empty(), "nothing is read for no rule");
        assert_eq!(plugin.evaluate(&seen), Ok(Verdict::Keep));
    }

    #[test]
    fn the_first_rule_whose_condition_holds_drops_and_says_why() {
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
    fn only_types_that_a_rule_names_are_asked_for() {
        let plugin: Discard =
            configure(json!({"rules": [{"match": {"type": "a.*", "payload": {"/x": 1}}}, {"match": {"type": "b"}}]})).unwrap();
        assert_eq!(
            plugin.interest(),
            Interest::in_types(["a.*", "b"]).fields(["/x"])
        );
    }

    #[test]
    fn a_rule_that_cannot_be_meant_is_refused_with_its_place() {
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
                "says nothing, so it would hold for every event",
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
                panic!("{rule} was taken")
            };
            assert!(
                issues[0].path == path && issues[0].message.contains(message),
                "{rule} gave {issues:?}"
            );
        }
    }
}
