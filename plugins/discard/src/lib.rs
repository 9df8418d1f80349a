//! A filter that drops what its rules describe, and says which rule it was. Without a rule it keeps everything.
//!
//! ```toml
//! [[plugins.discard.config.rules]]
//! reason = "test traffic of the shop"     # optional; without one the rule describes itself
//! type = "order.*"                        # `*` stands for any characters
//! attributes = { env = ["test", "dev"] }  # one value, or a list of which one must match
//! payload = { "/order/total" = 0 }        # fields of a JSON payload, by JSON pointer
//! older_than_s = 3600                     # by the event's own time
//! ```
//!
//! All conditions of a rule must hold; one rule is enough. An absent attribute or field matches nothing. Attributes come as text from
//! flat entries and typed from JSON, so `1`, `1.0` and `"1"` are the same value here, as are `true` and `"true"`.

use std::collections::BTreeMap;

use pointsman_plugin::{Event, Failure, Filter, Interest, Issue, Plugin, Value, Verdict, clock, export};
use schemars::JsonSchema;
use serde::Deserialize;

/// The configuration.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Config {
    #[serde(default)]
    rules: Vec<Rule>,
}

/// Conditions that must all hold; at least one.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Rule {
    /// What is recorded with each event that the rule drops.
    reason: Option<String>,
    /// A pattern of event types, in which `*` stands for any characters.
    r#type: Option<String>,
    /// Extension attributes and the values that they must have.
    #[serde(default)]
    attributes: BTreeMap<String, OneOrMore>,
    /// Fields of a JSON payload, by JSON pointer, and the values that they must have.
    #[serde(default)]
    payload: BTreeMap<String, OneOrMore>,
    /// Seconds since the event's own time.
    older_than_s: Option<u64>,
}

/// A value, or several of which one must match.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(untagged)]
enum OneOrMore {
    One(Scalar),
    More(Vec<Scalar>),
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(untagged)]
enum Scalar {
    Flag(bool),
    Number(f64),
    Text(String),
}

struct Discard {
    rules: Vec<Rule>,
}

export!(Discard as filter);

impl Plugin for Discard {
    type Config = Config;

    fn new(config: Config) -> Result<Self, Issue> {
        for (at, rule) in config.rules.iter().enumerate() {
            rule.check().map_err(|(field, message)| Issue::new(format!("rules[{at}]{field}"), message))?;
        }
        Ok(Self { rules: config.rules })
    }

    /// What the rules look at, and no more.
    fn interest(&self) -> Interest {
        // One rule without a type looks at every event.
        let types = self.rules.iter().map(|rule| rule.r#type.as_deref()).collect::<Option<Vec<_>>>().unwrap_or_default();
        let names = |of: fn(&Rule) -> &BTreeMap<String, OneOrMore>| {
            let mut names: Vec<&str> = self.rules.iter().flat_map(|rule| of(rule).keys()).map(String::as_str).collect();
            names.sort_unstable();
            names.dedup();
            names
        };
        Interest::in_types(types).attributes(names(|rule| &rule.attributes)).fields(names(|rule| &rule.payload))
    }
}

impl Filter for Discard {
    fn evaluate(&self, event: &Event) -> Result<Verdict, Failure> {
        let rule = self.rules.iter().find(|rule| rule.holds(event));
        Ok(rule.map_or(Verdict::Keep, |rule| Verdict::Drop(rule.reason.clone().unwrap_or_else(|| rule.describe()))))
    }
}

impl Rule {
    fn check(&self) -> Result<(), (&'static str, String)> {
        if self.r#type.is_none() && self.attributes.is_empty() && self.payload.is_empty() && self.older_than_s.is_none() {
            return Err(("", "would drop every event; give it a type, attributes, payload or older_than_s".into()));
        }
        if let Some(pointer) = self.payload.keys().find(|pointer| !pointer.starts_with('/')) {
            return Err((".payload", format!("'{pointer}' is no JSON pointer; write '/{pointer}'")));
        }
        if let Some((name, _)) =
            self.attributes.iter().chain(&self.payload).find(|(_, values)| matches!(values, OneOrMore::More(list) if list.is_empty()))
        {
            return Err(("", format!("'{name}' has no value to match; give it one")));
        }
        Ok(())
    }

    fn holds(&self, event: &Event) -> bool {
        let matches_all = |conditions: &BTreeMap<String, OneOrMore>| {
            conditions.iter().all(|(name, values)| event.attribute(name).is_some_and(|have| values.has(have)))
        };
        self.r#type.as_ref().is_none_or(|pattern| matches(pattern, &event.kind))
            && self.older_than_s.is_none_or(|limit| clock::now_ms().saturating_sub(event.time_ms) > limit.saturating_mul(1_000))
            && matches_all(&self.attributes)
            && matches_all(&self.payload)
    }

    fn describe(&self) -> String {
        let mut parts = Vec::new();
        parts.extend(self.r#type.as_ref().map(|pattern| format!("type is {pattern}")));
        parts.extend(self.attributes.iter().map(|(name, values)| format!("{name} is {}", values.describe())));
        parts.extend(self.payload.iter().map(|(pointer, values)| format!("{pointer} is {}", values.describe())));
        parts.extend(self.older_than_s.map(|seconds| format!("older than {seconds} s")));
        parts.join(" and ")
    }
}

impl OneOrMore {
    fn all(&self) -> &[Scalar] {
        match self {
            Self::One(value) => std::slice::from_ref(value),
            Self::More(values) => values,
        }
    }

    fn has(&self, have: &Value) -> bool {
        self.all().iter().any(|value| value.is(have))
    }

    fn describe(&self) -> String {
        self.all().iter().map(Scalar::to_string).collect::<Vec<_>>().join(" or ")
    }
}

impl Scalar {
    fn is(&self, have: &Value) -> bool {
        match (self, have) {
            (Self::Flag(a), Value::Flag(b)) => a == b,
            (Self::Number(a), Value::Integer(b)) => *a == *b as f64,
            (Self::Number(a), Value::Decimal(b)) => a == b,
            (Self::Number(a), Value::Text(b)) => b.parse() == Ok(*a),
            (Self::Text(a), Value::Text(b)) => a == b,
            (Self::Text(a), Value::Integer(b)) => a.parse() == Ok(*b),
            (Self::Text(a), Value::Decimal(b)) => a.parse() == Ok(*b),
            (Self::Text(a), Value::Flag(b)) => a == if *b { "true" } else { "false" },
            (Self::Flag(a), Value::Text(b)) => b == if *a { "true" } else { "false" },
            (Self::Flag(_), Value::Integer(_) | Value::Decimal(_)) | (Self::Number(_), Value::Flag(_)) => false,
        }
    }
}

impl std::fmt::Display for Scalar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Flag(flag) => flag.fmt(f),
            Self::Number(number) => number.fmt(f),
            Self::Text(text) => text.fmt(f),
        }
    }
}

/// Whether a text matches a pattern in which `*` stands for any characters: its parts must follow each other.
fn matches(pattern: &str, text: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else { return pattern == text };
    let Some(mut text) = text.strip_prefix(head) else { return false };
    let (middle, tail) = rest.rsplit_once('*').map_or((None, rest), |(middle, tail)| (Some(middle), tail));
    for part in middle.into_iter().flat_map(|middle| middle.split('*')) {
        match text.find(part) {
            Some(at) => text = &text[at + part.len()..],
            None => return false,
        }
    }
    text.ends_with(tail)
}

#[cfg(test)]
mod tests {
    use pointsman_plugin::testing::{self, EventBuilder, configure, event};
    use serde_json::json;

    use super::*;

    /// The verdict on the event as the host would show it; `Keep` where the host would not even ask.
    fn verdict(rules: serde_json::Value, event: EventBuilder) -> Verdict {
        let plugin: Discard = configure(json!({ "rules": rules })).unwrap();
        event.seen_by(&plugin).map_or(Verdict::Keep, |event| plugin.evaluate(&event).unwrap())
    }

    fn dropped(reason: &str) -> Verdict {
        Verdict::Drop(reason.into())
    }

    #[test]
    fn without_configuration_everything_is_kept() {
        let plugin: Discard = configure(json!({})).unwrap();
        let seen = event("anything").attribute("a", 1).seen_by(&plugin).unwrap();
        assert!(seen.attributes.is_empty(), "nothing is read for no rule");
        assert_eq!(plugin.evaluate(&seen), Ok(Verdict::Keep));
    }

    #[test]
    fn a_type_pattern_drops_and_says_so() {
        let rules = json!([{"type": "order.*"}]);
        assert_eq!(verdict(rules.clone(), event("order.shipped")), dropped("type is order.*"));
        assert_eq!(verdict(rules, event("bill.paid")), Verdict::Keep);
    }

    #[test]
    fn patterns_match_part_by_part() {
        for (pattern, text, expect) in [
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("*", "", true),
            ("a*a", "a", false),
            ("*.x", "a.x", true),
            ("**", "q", true),
        ] {
            assert_eq!(matches(pattern, text), expect, "{pattern} {text}");
        }
    }

    #[test]
    fn an_attribute_matches_whether_it_came_as_text_or_typed() {
        for (want, have, expect) in [
            (json!("test"), Value::from("test"), true),
            (json!("test"), "prod".into(), false),
            (json!(["test", "dev"]), "dev".into(), true),
            (json!(1), 1.into(), true),
            (json!(1), "1".into(), true),
            (json!("1"), 1.into(), true),
            (json!(1.5), 1.5.into(), true),
            (json!(1), true.into(), false),
            (json!(true), true.into(), true),
            (json!(true), "true".into(), true),
            (json!(true), "yes".into(), false),
        ] {
            let verdict = verdict(json!([{"attributes": {"env": want}}]), event("t").attribute("env", have.clone()));
            assert_eq!(matches!(verdict, Verdict::Drop(_)), expect, "{want} {have:?}");
        }
        assert_eq!(verdict(json!([{"attributes": {"env": "test"}}]), event("t")), Verdict::Keep, "what is absent matches nothing");
    }

    #[test]
    fn a_field_of_the_payload_matches() {
        let rules = json!([{"payload": {"/order/total": 0}, "reason": "free orders"}]);
        assert_eq!(verdict(rules.clone(), event("t").json(&json!({"order": {"total": 0}}))), dropped("free orders"));
        assert_eq!(verdict(rules.clone(), event("t").json(&json!({"order": {"total": 5}}))), Verdict::Keep);
        assert_eq!(verdict(rules, event("t").text("no JSON")), Verdict::Keep);
    }

    #[test]
    fn age_is_by_the_events_own_time() {
        testing::freeze_clock(1_000_000);
        let rules = json!([{"older_than_s": 60}]);
        assert_eq!(verdict(rules.clone(), event("t").time_ms(939_999)), dropped("older than 60 s"));
        assert_eq!(verdict(rules.clone(), event("t").time_ms(940_000)), Verdict::Keep);
        assert_eq!(verdict(rules, event("t").time_ms(2_000_000)), Verdict::Keep, "a clock ahead of ours is no age");
    }

    #[test]
    fn all_conditions_of_one_rule_must_hold() {
        let rules = json!([{"type": "a", "attributes": {"x": 1}}, {"type": "b"}]);
        assert_eq!(verdict(rules.clone(), event("a")), Verdict::Keep);
        assert_eq!(verdict(rules.clone(), event("a").attribute("x", 1)), dropped("type is a and x is 1"));
        assert_eq!(verdict(rules, event("b")), dropped("type is b"));
    }

    #[test]
    fn a_rule_that_cannot_be_meant_is_refused_with_its_place() {
        for (rule, path, message) in [
            (json!({}), "rules[0]", "would drop every event"),
            (json!({"payload": {"order": 1}}), "rules[0].payload", "write '/order'"),
            (json!({"attributes": {"env": []}}), "rules[0]", "'env' has no value"),
            (json!({"typ": "x"}), "rules[0]", "unknown field `typ`"),
            (json!({"older_than_s": -1}), "rules[0].older_than_s", "invalid value"),
        ] {
            let Err(issues) = configure::<Discard>(json!({ "rules": [rule] })) else { panic!("{rule} was taken") };
            assert!(issues[0].path.starts_with(path) && issues[0].message.contains(message), "{rule} gave {issues:?}");
        }
    }
}
