//! Conditions on events, as an operator writes them in the configuration of a plugin:
//!
//! ```toml
//! match.type = ["order.*", "bill.*"]  # patterns, in which `*` matches any characters
//! match.attributes = { env = ["prod", "stage"], user = { present = true } }
//! match.payload = { "/order/total" = { at_least = 100 }, "/order/state" = "paid" }
//! match.not = { subject = { prefix = "test-" } }
//! ```
//!
//! Every part of a condition must hold; [`Wanted`] describes the tests of a single value. A
//! condition that cannot be decided is false and never an error: an absent value and a value of
//! another type pass no comparison. Consequently `not` holds if its inner condition cannot be
//! decided.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use schemars::JsonSchema;
use serde::de::Error;
use serde::{Deserialize, Deserializer};

use crate::pattern::{matches, odd_in_pattern};
use crate::{AttributeName, Event, Interest, OneOrMore, Pointer, Priority, Selector, Value, log};

mod wanted;

pub use wanted::{Regex, Wanted};

/// A condition on an event. All its parts must hold, and it has at least one part.
#[derive(Clone, Debug, JsonSchema)]
#[schemars(with = "Written")]
pub struct Condition(Written);

/// The condition as written in a configuration.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(rename = "Condition")]
struct Written {
    /// Patterns of event types, in which `*` matches any characters; at least one pattern must
    /// match.
    r#type: Option<OneOrMore<String>>,
    source: Option<Wanted>,
    subject: Option<Wanted>,
    /// The event's current priority, which an earlier filter may have set.
    priority: Option<OneOrMore<Priority>>,
    /// Extension attributes, by name.
    attributes: BTreeMap<AttributeName, Wanted>,
    /// Fields of a JSON payload, by JSON pointer.
    payload: BTreeMap<Pointer, Wanted>,
    /// The event's minimum age in seconds, exclusive, measured from its own time.
    older_than_s: Option<u64>,
    /// Conditions; all must hold.
    all: Option<OneOrMore<Condition>>,
    /// Conditions; at least one must hold.
    any: Option<OneOrMore<Condition>>,
    /// A condition that must not hold.
    not: Option<Box<Condition>>,
}

/// An empty condition is rejected, because it would hold for every event.
impl<'de> Deserialize<'de> for Condition {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let written = Written::deserialize(d)?;
        let condition = Self(written);
        if condition.parts().is_empty() {
            let fix = "set type, source, subject, priority, attributes, payload, older_than_s, all, any or not";
            return Err(D::Error::custom(format!(
                "is empty and would hold for every event; {fix}"
            )));
        }
        Ok(condition)
    }
}

impl Condition {
    /// Whether the condition holds for an event, as far as the plugin's [`Interest`] shows it: see
    /// [`Interest::in_conditions`].
    pub fn holds(&self, event: &Event) -> bool {
        let Written {
            r#type,
            source,
            subject,
            priority,
            attributes,
            payload,
            older_than_s,
            all,
            any,
            not,
        } = &self.0;
        let is = |wanted: &Option<Wanted>, selector| {
            wanted
                .as_ref()
                .is_none_or(|wanted| wanted.holds(event, &selector))
        };
        r#type
            .as_ref()
            .is_none_or(|patterns| patterns.iter().any(|pattern| matches(pattern, &event.kind)))
            && is(source, Selector::Source)
            && is(subject, Selector::Subject)
            && priority
                .as_ref()
                .is_none_or(|priorities| priorities.contains(&event.priority))
            && older_than_s.is_none_or(|limit| event.age_ms() > limit.saturating_mul(1_000))
            && attributes.iter().all(|(name, wanted)| {
                let reading = wanted::Reading::of_attribute(name.as_str());
                wanted.holds_for(event.attribute(name.as_str()), reading)
            })
            && payload.iter().all(|(pointer, wanted)| {
                wanted.holds_for(event.attribute(pointer.as_str()), wanted::Reading::Own)
            })
            && all
                .as_ref()
                .is_none_or(|all| all.iter().all(|condition| condition.holds(event)))
            && any
                .as_ref()
                .is_none_or(|any| any.iter().any(|condition| condition.holds(event)))
            && not.as_ref().is_none_or(|not| !not.holds(event))
    }

    /// The patterns of event types outside which the condition never holds; `None` if it may hold
    /// for an event of any type.
    fn types(&self) -> Option<Vec<&str>> {
        let Written {
            r#type, all, any, ..
        } = &self.0;
        let own = || Some(r#type.as_ref()?.iter().map(String::as_str).collect());
        let of_all = || all.as_ref()?.iter().find_map(Self::types);
        let of_any = || {
            Some(
                any.as_ref()?
                    .iter()
                    .map(Self::types)
                    .collect::<Option<Vec<_>>>()?
                    .concat(),
            )
        };
        own().or_else(of_all).or_else(of_any)
    }

    /// Adds a warning for each pattern and each text with characters that have a meaning in other
    /// pattern languages only. `seen`: the patterns of which the host warns.
    fn warn_of_odd_texts(&self, seen: &[String], warnings: &mut BTreeSet<String>) {
        let Written {
            r#type,
            source,
            subject,
            attributes,
            payload,
            all,
            any,
            not,
            ..
        } = &self.0;
        let patterns = r#type.iter().flat_map(|patterns| patterns.iter());
        for pattern in patterns.filter(|pattern| !seen.contains(pattern)) {
            warnings.extend(odd_in_pattern(pattern).map(|odd| {
                format!("the type pattern '{pattern}' contains '{odd}', which matches only itself; the one wildcard is '*', so list several patterns instead")
            }));
        }
        let named = [("source", source.as_ref()), ("subject", subject.as_ref())];
        let named = named
            .into_iter()
            .filter_map(|(name, wanted)| Some((name, wanted?)));
        let attributes = attributes
            .iter()
            .map(|(name, wanted)| (name.as_str(), wanted));
        let payload = payload.iter().map(|(name, wanted)| (name.as_str(), wanted));
        for (name, wanted) in named.chain(attributes).chain(payload) {
            warnings.extend(wanted.odd_text().map(|(text, odd)| {
                format!("the text '{text}' for {name} contains '{odd}', which matches only itself; for a pattern, use prefix, suffix, contains or matches")
            }));
        }
        let of_lists = [all, any]
            .into_iter()
            .flatten()
            .flat_map(|list| list.iter());
        for condition in of_lists.chain(not.as_deref()) {
            condition.warn_of_odd_texts(seen, warnings);
        }
    }

    fn add_what_it_reads(&self, interest: &mut Interest) {
        let Written {
            attributes,
            payload,
            all,
            any,
            not,
            ..
        } = &self.0;
        for name in attributes.keys() {
            add(&mut interest.attributes, name.as_str());
        }
        for pointer in payload.keys() {
            add(&mut interest.fields, pointer.as_str());
        }
        let of_lists = [all, any]
            .into_iter()
            .flatten()
            .flat_map(|list| list.iter());
        for condition in of_lists.chain(not.as_deref()) {
            condition.add_what_it_reads(interest);
        }
    }

    /// Describes each part in words.
    fn parts(&self) -> Vec<String> {
        let Written {
            r#type,
            source,
            subject,
            priority,
            attributes,
            payload,
            older_than_s,
            all,
            any,
            not,
        } = &self.0;
        let mut parts = Vec::new();
        parts.extend(
            r#type
                .as_ref()
                .map(|patterns| format!("type is {}", patterns.join(" or "))),
        );
        parts.extend(source.as_ref().map(|wanted| wanted.describe("source")));
        parts.extend(subject.as_ref().map(|wanted| wanted.describe("subject")));
        let words = |priorities: &OneOrMore<Priority>| {
            priorities
                .iter()
                .map(|priority| priority.name())
                .collect::<Vec<_>>()
                .join(" or ")
        };
        parts.extend(
            priority
                .as_ref()
                .map(|priorities| format!("priority is {}", words(priorities))),
        );
        parts.extend(
            attributes
                .iter()
                .map(|(name, wanted)| wanted.describe(name.as_str())),
        );
        parts.extend(
            payload
                .iter()
                .map(|(pointer, wanted)| wanted.describe(pointer.as_str())),
        );
        parts.extend(older_than_s.map(|seconds| format!("older than {seconds} s")));
        let list = |conditions: &OneOrMore<Self>, word| {
            let told = conditions
                .iter()
                .map(Self::to_string)
                .collect::<Vec<_>>()
                .join(word);
            if conditions.len() > 1 {
                format!("({told})")
            } else {
                told
            }
        };
        parts.extend(all.as_ref().map(|all| list(all, " and ")));
        parts.extend(any.as_ref().map(|any| list(any, " or ")));
        parts.extend(not.as_ref().map(|not| format!("not ({not})")));
        parts
    }
}

/// Describes the condition in words, for use as a reason: `type is order.* and /order/total is at
/// least 100`.
impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.parts().join(" and "))
    }
}

impl Interest {
    /// The events for which one of these conditions may hold, with the values that the conditions
    /// read. `None` stands for a condition that holds for every event.
    pub fn in_conditions<'a>(conditions: impl IntoIterator<Item = Option<&'a Condition>>) -> Self {
        let conditions: Vec<Option<&Condition>> = conditions.into_iter().collect();
        let types = conditions
            .iter()
            .map(|condition| (*condition)?.types())
            .collect::<Option<Vec<_>>>();
        let mut interest = Self::in_every_type();
        // If a single condition has no type, the plugin must be called for every event.
        for pattern in types.unwrap_or_default().concat() {
            add(&mut interest.types, pattern);
        }
        let mut warnings = BTreeSet::new();
        for condition in conditions.into_iter().flatten() {
            condition.add_what_it_reads(&mut interest);
            condition.warn_of_odd_texts(&interest.types, &mut warnings);
        }
        // Here and not where it is parsed: the host asks for this once per load.
        warnings.into_iter().for_each(log::warn);
        interest
    }

    /// Adds the values that these selectors read.
    #[must_use]
    pub fn selectors<'a>(mut self, selectors: impl IntoIterator<Item = &'a Selector>) -> Self {
        for selector in selectors {
            match selector {
                Selector::Id | Selector::Source | Selector::Type | Selector::Subject => {}
                Selector::Attribute(name) => add(&mut self.attributes, name.as_str()),
                Selector::Field(pointer) => add(&mut self.fields, pointer.as_str()),
            }
        }
        self
    }
}

/// Adds a name unless it is already in the list.
fn add(names: &mut Vec<String>, name: &str) {
    if !names.iter().any(|known| known == name) {
        names.push(name.to_owned());
    }
}

/// Joins values with `or`.
fn alternatives(values: &[Value]) -> String {
    values
        .iter()
        .map(Value::to_string)
        .collect::<Vec<_>>()
        .join(" or ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::{EventBuilder, event, freeze_clock};

    fn condition(json: serde_json::Value) -> Condition {
        serde_path_to_error::deserialize(json).unwrap()
    }

    fn holds(json: serde_json::Value, event: EventBuilder) -> bool {
        condition(json).holds(&event.build())
    }

    #[test]
    fn every_part_of_a_condition_must_hold() {
        let both = json!({"type": ["order.*", "bill.*"], "attributes": {"x": 1}});
        assert!(holds(both.clone(), event("order.paid").attribute("x", 1)));
        assert!(holds(both.clone(), event("bill.paid").attribute("x", 1)));
        assert!(!holds(both.clone(), event("chat.line").attribute("x", 1)));
        assert!(!holds(both, event("order.paid").attribute("x", 2)));
    }

    #[test]
    fn all_any_and_not_nest() {
        let nested = json!({"all": [{"any": [{"type": "a"}, {"type": "b"}]}, {"not": {"attributes": {"x": {"less": 5}}}}]});
        assert!(holds(nested.clone(), event("a").attribute("x", 5)));
        assert!(
            holds(nested.clone(), event("b")),
            "not holds if its inner condition cannot be decided"
        );
        assert!(!holds(nested.clone(), event("a").attribute("x", 4)));
        assert!(!holds(nested, event("c").attribute("x", 5)));
    }

    #[test]
    fn source_subject_and_priority_can_be_tested() {
        assert!(holds(json!({"source": {"prefix": "/te"}}), event("t")));
        assert!(holds(
            json!({"subject": {"suffix": "7"}}),
            event("t").subject("order-7")
        ));
        assert!(!holds(json!({"subject": {"suffix": "7"}}), event("t")));
        assert!(holds(
            json!({"priority": ["high", "urgent"]}),
            event("t").priority(Priority::Urgent)
        ));
        assert!(!holds(json!({"priority": "high"}), event("t")));
    }

    #[test]
    fn the_attribute_priority_is_compared_as_the_priority_is() {
        for (word, wanted, expect) in [
            ("HIGH", json!("high"), true),
            ("medium", json!(["low", "Normal"]), true),
            ("normal", json!("medium"), true),
            ("Low", json!({"not_equals": "low"}), false),
            ("urgent", json!("high"), false),
            ("P1", json!("P1"), true),
            ("p1", json!("P1"), false),
        ] {
            assert_eq!(
                holds(
                    json!({"attributes": {"priority": wanted}}),
                    event("t").attribute("priority", word)
                ),
                expect,
                "{word} and {wanted}"
            );
        }
        assert!(!holds(
            json!({"attributes": {"tier": "high"}}),
            event("t").attribute("tier", "HIGH")
        ));
    }

    #[test]
    fn age_is_measured_from_the_events_own_time() {
        freeze_clock(1_000_000);
        for (time_ms, expect) in [(939_999, true), (940_000, false), (2_000_000, false)] {
            assert_eq!(
                holds(json!({"older_than_s": 60}), event("t").time_ms(time_ms)),
                expect,
                "{time_ms}"
            );
        }
    }

    #[test]
    fn texts_that_look_like_patterns_are_warned_of_wherever_they_are_read() {
        let conditions = [
            json!({"type": "a.{b,c}"}),
            json!({"any": [{"type": ["^d", "e"]}, {"source": "/shop/*"}]}),
            json!({"not": {"attributes": {"site": {"prefix": "^eu"}}}}),
            json!({"payload": {"/x": ["{/y}", "plain"], "/z": {"matches": "^ok$"}}}),
        ]
        .map(condition);
        Interest::in_conditions(conditions.iter().map(Some));
        let logged = crate::testing::logged();
        let warnings: Vec<&str> = logged.iter().map(|(_, text)| text.as_str()).collect();
        assert_eq!(
            warnings,
            [
                "the text '/shop/*' for source contains '*', which matches only itself; for a pattern, use prefix, suffix, contains or matches",
                "the text '^eu' for site contains '^', which matches only itself; for a pattern, use prefix, suffix, contains or matches",
                "the text '{/y}' for /x contains '{', which matches only itself; for a pattern, use prefix, suffix, contains or matches",
                "the type pattern '^d' contains '^', which matches only itself; the one wildcard is '*', so list several patterns instead",
                "the type pattern 'a.{b,c}' contains '{', which matches only itself; the one wildcard is '*', so list several patterns instead",
            ]
        );
        // The host warns of the types of the interest.
        let first = &conditions[..1];
        assert_eq!(
            Interest::in_conditions(first.iter().map(Some)).types,
            ["a.{b,c}"]
        );
        assert_eq!(crate::testing::logged(), []);
    }

    #[test]
    fn the_interest_covers_exactly_the_values_that_the_conditions_read() {
        let conditions = [
            json!({"type": "a.*", "attributes": {"x": 1}, "not": {"payload": {"/p": 1}}}),
            json!({"all": [{"type": "b"}, {"type": "c"}, {"attributes": {"x": 2}}]}),
            json!({"any": [{"type": "d"}, {"type": ["e", "a.*"]}]}),
        ]
        .map(condition);
        let interest = Interest::in_conditions(conditions.iter().map(Some));
        assert_eq!(
            (interest.types, interest.attributes),
            (
                ["a.*", "b", "d", "e"].map(str::to_owned).to_vec(),
                vec!["x".to_owned()]
            )
        );
        assert_eq!(interest.fields, ["/p"]);
        let untyped = condition(json!({"any": [{"type": "d"}, {"source": "s"}]}));
        assert!(
            Interest::in_conditions(conditions.iter().chain([&untyped]).map(Some))
                .types
                .is_empty()
        );
        assert!(
            Interest::in_conditions(conditions.iter().map(Some).chain([None]))
                .types
                .is_empty()
        );
        let selectors = ["x", "/p", "type", "y"].map(|text| Selector::parse(text).unwrap());
        let more = Interest::in_conditions(conditions.iter().map(Some)).selectors(&selectors);
        assert_eq!(
            (more.attributes, more.fields),
            (vec!["x".to_owned(), "y".to_owned()], vec!["/p".to_owned()])
        );
    }

    #[test]
    fn a_condition_describes_itself_in_words() {
        let told = condition(json!({
            "type": ["a", "b"], "subject": {"prefix": "x"}, "priority": "high", "attributes": {"env": ["test", 1]},
            "payload": {"/n": {"at_least": 1, "less": 5.5}}, "older_than_s": 60, "any": [{"type": "c"}, {"type": "d"}], "not": {"source": "s"}
        }));
        let expect = "type is a or b and subject begins with x and priority is high and env is test or 1 and /n is at least 1 and is below 5.5 \
                      and older than 60 s and (type is c or type is d) and not (source is s)";
        assert_eq!(told.to_string(), expect);
    }

    #[test]
    fn a_mistake_is_reported_with_its_location_and_the_fix() {
        for (json, place, fix) in [
            (
                json!({}),
                ".",
                "is empty and would hold for every event; set type,",
            ),
            (json!({"all": [{"type": "a"}, {}]}), "all[1]", "is empty"),
            (json!({"any": []}), "any", "the list is empty"),
            (
                json!({"typ": "a"}),
                "typ",
                "unknown field `typ`, expected one of `type`",
            ),
            (json!({"type": 5}), "type", "expected a string"),
            (
                json!({"priority": "highest"}),
                "priority",
                "use low, normal, high or urgent",
            ),
            (
                json!({"attributes": {"/order": 1}}),
                "attributes./order",
                "move it under payload",
            ),
            (
                json!({"attributes": {"source": 1}}),
                "attributes.source",
                "'source' is not an extension attribute",
            ),
            (
                json!({"payload": {"order.total": 1}}),
                "payload.order.total",
                "write '/order/total'",
            ),
            (
                json!({"all": [{"payload": {"/a": {"atleast": 1}}}]}),
                "all[0].payload./a.atleast",
                "unknown field `atleast`",
            ),
            (
                json!({"not": {"subject": {"matches": "("}}}),
                "not.subject.matches",
                "is not a valid regular expression",
            ),
            (
                json!({"subject": {}}),
                "subject",
                "has no operator; set equals",
            ),
            (json!({"subject": []}), "subject", "the list is empty"),
            (
                json!({"subject": {"less": true}}),
                "subject.less",
                "use a number or a text",
            ),
            (
                json!({"subject": {"present": false, "prefix": "a"}}),
                "subject",
                "can never hold",
            ),
            (json!({"older_than_s": -1}), "older_than_s", "invalid value"),
        ] {
            // Parsed from text, as a real configuration is.
            let text = json.to_string();
            let error = serde_path_to_error::deserialize::<_, Condition>(
                &mut serde_json::Deserializer::from_str(&text),
            )
            .unwrap_err();
            assert_eq!(error.path().to_string(), place, "{json}: {error}");
            assert!(
                error.inner().to_string().contains(fix),
                "{json} gave: {error}"
            );
        }
    }
}
