//! A filter that sets the priority and attributes of events from tables keyed by one of their
//! values. It drops nothing.
//!
//! ```toml
//! [[plugins.prioritize.config.tables]]
//! match.type = "order.*"  # optional: the events to which the table applies
//! by = "/order/total"     # attribute, JSON pointer, type, source, subject or id
//! rows = [
//!     { value = { at_least = 1000 }, priority = "high", attributes = { desk = "large" } },
//!     { value = { less = 10 }, priority = "low" },
//! ]
//! default = { attributes = { desk = "general" } }
//! ```
//!
//! The first row that the value matches applies. If there is none, or the event does not have the
//! value, the default applies. All tables whose condition holds apply in order, and each sees the
//! changes of those before it. [`pointsman_plugin::Wanted`] documents the tests of a row.

use std::borrow::Cow;
use std::collections::BTreeMap;

use pointsman_plugin::{
    Amendment, Attribute, AttributeName, Condition, Event, Failure, Filter, Interest, Issue,
    Plugin, Priority, Selector, Value, Verdict, Wanted, export,
};
use schemars::JsonSchema;
use serde::Deserialize;

/// The configuration.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Config {
    /// The tables. All whose condition holds apply, in this order.
    #[serde(default)]
    tables: Vec<Table>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Table {
    /// The events to which the table applies; if absent, every event.
    r#match: Option<Condition>,
    /// The value that selects the row: an attribute, a JSON pointer into the payload, or type,
    /// source, subject or id.
    by: Selector,
    /// The rows; the first that the value matches applies.
    #[serde(default)]
    rows: Vec<Row>,
    /// Applies if no row does.
    default: Option<Change>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Row {
    value: Wanted,
    priority: Option<Priority>,
    #[serde(default)]
    attributes: BTreeMap<AttributeName, Value>,
}

/// The change to an event.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Change {
    priority: Option<Priority>,
    #[serde(default)]
    attributes: BTreeMap<AttributeName, Value>,
}

struct Prioritize(Vec<Table>);

export!(Prioritize as filter);

impl Plugin for Prioritize {
    type Config = Config;

    fn new(config: Config) -> Result<Self, Issue> {
        for (at, table) in config.tables.iter().enumerate() {
            let issue =
                |key: &str, message: String| Issue::new(format!("tables[{at}]{key}"), message);
            if table.rows.is_empty() && table.default.is_none() {
                return Err(issue("", "changes nothing; add rows or a default".into()));
            }
            for (row, Row { attributes, .. }) in table.rows.iter().enumerate() {
                check(attributes).map_err(|(name, message)| {
                    issue(&format!(".rows[{row}].attributes.{name}"), message)
                })?;
            }
            if let Some(Change { attributes, .. }) = &table.default {
                check(attributes).map_err(|(name, message)| {
                    issue(&format!(".default.attributes.{name}"), message)
                })?;
            }
        }
        Ok(Self(config.tables))
    }

    /// Exactly the values that the tables read.
    fn interest(&self) -> Interest {
        let conditions = self.0.iter().map(|table| table.r#match.as_ref());
        Interest::in_conditions(conditions).selectors(self.0.iter().map(|table| &table.by))
    }
}

/// Rejects attributes that the host would refuse on every event.
fn check(attributes: &BTreeMap<AttributeName, Value>) -> Result<(), (&str, String)> {
    for (name, value) in attributes {
        let name = name.as_str();
        if name == "priority" {
            return Err((
                name,
                "cannot change the priority; use the key priority, next to attributes".into(),
            ));
        }
        if let Value::Text(text) = value
            && (text.chars().any(char::is_control) || text.len() > 65_536)
        {
            return Err((
                name,
                "contains a control character or exceeds 65536 bytes; remove the character or shorten it".into(),
            ));
        }
    }
    Ok(())
}

impl Filter for Prioritize {
    fn evaluate(&self, event: &Event) -> Result<Verdict, Failure> {
        let mut amended = Cow::Borrowed(event);
        let mut changes = BTreeMap::new();
        let mut priority = None;
        for table in &self.0 {
            let Some((to, attributes)) = table.change(&amended) else {
                continue;
            };
            if let Some(to) = to {
                priority = Some(to);
                amended.to_mut().priority = to;
            }
            for (name, value) in attributes {
                let seen = &mut amended.to_mut().attributes;
                seen.retain(|(known, _)| known != name.as_str());
                seen.push((name.as_str().to_owned(), value.clone()));
                changes.insert(name.as_str(), value.clone());
            }
        }
        if priority.is_none() && changes.is_empty() {
            return Ok(Verdict::Keep);
        }
        let attributes = changes
            .into_iter()
            .map(|(name, value)| Attribute {
                name: name.to_owned(),
                value,
            })
            .collect();
        Ok(Verdict::Amend(Amendment {
            priority,
            attributes,
            ..Amendment::default()
        }))
    }
}

impl Table {
    /// Returns the change that the table makes to an event.
    fn change(&self, event: &Event) -> Option<(Option<Priority>, &BTreeMap<AttributeName, Value>)> {
        if self
            .r#match
            .as_ref()
            .is_some_and(|condition| !condition.holds(event))
        {
            return None;
        }
        let row = self
            .rows
            .iter()
            .find(|row| row.value.holds(event, &self.by))
            .map(|row| (row.priority, &row.attributes));
        row.or_else(|| {
            self.default
                .as_ref()
                .map(|default| (default.priority, &default.attributes))
        })
    }
}

#[cfg(test)]
mod tests {
    use pointsman_plugin::testing::{EventBuilder, configure, event};
    use serde_json::{Value as Json, json};

    use super::*;

    /// The verdict on the event as the host would pass it; `Keep` if the host would not call the
    /// plugin.
    fn verdict(tables: &Json, event: EventBuilder) -> Verdict {
        let plugin: Prioritize = configure(json!({ "tables": tables })).unwrap();
        event
            .seen_by(&plugin)
            .map_or(Verdict::Keep, |event| plugin.evaluate(&event).unwrap())
    }

    fn amended(priority: Option<Priority>, attributes: &[(&str, Value)]) -> Verdict {
        let attributes = attributes
            .iter()
            .map(|(name, value)| Attribute {
                name: (*name).into(),
                value: value.clone(),
            })
            .collect();
        Verdict::Amend(Amendment {
            priority,
            attributes,
            ..Amendment::default()
        })
    }

    #[test]
    fn without_configuration_nothing_changes() {
        assert_eq!(
            verdict(&json!([]), event("t").attribute("a", 1)),
            Verdict::Keep
        );
    }

    #[test]
    fn the_first_row_that_matches_applies_otherwise_the_default() {
        let tables = json!([{
            "match": {"type": "order.*"}, "by": "/total",
            "rows": [
                {"value": 0, "attributes": {"free": true}},
                {"value": [13, 17], "priority": "urgent"},
                {"value": {"at_least": 1000}, "priority": "high", "attributes": {"desk": "large", "n": 1.5}},
                {"value": {"greater": 500}, "priority": "normal"},
                {"value": {"less": 10}}
            ],
            "default": {"priority": "low"}
        }]);
        let order = |total: Json| event("order.paid").json(&json!({"total": total}));
        assert_eq!(
            verdict(&tables, order(json!(0))),
            amended(None, &[("free", true.into())])
        );
        assert_eq!(
            verdict(&tables, order(json!(17))),
            amended(Some(Priority::Urgent), &[])
        );
        assert_eq!(
            verdict(&tables, order(json!(1000))),
            amended(
                Some(Priority::High),
                &[("desk", "large".into()), ("n", 1.5.into())]
            )
        );
        assert_eq!(
            verdict(&tables, order(json!(999.5))),
            amended(Some(Priority::Normal), &[])
        );
        assert_eq!(
            verdict(&tables, order(json!(9))),
            Verdict::Keep,
            "the default does not apply if a row without changes matches"
        );
        for other in [json!(100), json!("1000"), json!(null), json!([1000])] {
            assert_eq!(
                verdict(&tables, order(other)),
                amended(Some(Priority::Low), &[])
            );
        }
        assert_eq!(verdict(&tables, event("bill.paid")), Verdict::Keep);
    }

    #[test]
    fn tables_apply_in_order_and_see_earlier_changes() {
        let tables = json!([
            {"by": "tier", "rows": [{"value": {"prefix": "g"}, "priority": "high", "attributes": {"tier": "vip", "seen": 1}}]},
            {"by": "tier", "rows": [{"value": "vip", "attributes": {"desk": "a", "seen": 2}}], "default": {"attributes": {"desk": "b"}}},
            {"match": {"priority": "high", "attributes": {"desk": "a"}}, "by": "subject", "rows": [{"value": {"present": false}, "priority": "urgent"}]}
        ]);
        let gold = event("t").attribute("tier", "gold");
        let all = [
            ("desk", Value::from("a")),
            ("seen", 2.into()),
            ("tier", "vip".into()),
        ];
        assert_eq!(
            verdict(&tables, gold.clone()),
            amended(Some(Priority::Urgent), &all)
        );
        assert_eq!(
            verdict(&tables, gold.subject("s")),
            amended(Some(Priority::High), &all)
        );
        assert_eq!(
            verdict(&tables, event("t")),
            amended(None, &[("desk", "b".into())])
        );
    }

    #[test]
    fn the_interest_covers_exactly_the_values_that_the_tables_read() {
        let tables = json!([
            {"match": {"type": "a", "attributes": {"x": 1}}, "by": "/p", "default": {}},
            {"match": {"type": "b"}, "by": "y", "default": {}},
            {"match": {"type": "b"}, "by": "source", "default": {}}
        ]);
        let plugin: Prioritize = configure(json!({ "tables": tables })).unwrap();
        assert_eq!(
            plugin.interest(),
            Interest::in_types(["a", "b"])
                .attributes(["x", "y"])
                .fields(["/p"])
        );
    }

    #[test]
    fn a_mistake_is_reported_with_its_location_and_the_fix() {
        for (table, path, fix) in [
            (json!({}), "", "missing field `by`"),
            (json!({"by": "a"}), "", "add rows or a default"),
            (json!({"by": "A"}), ".by", "use 1 to 64 characters"),
            (
                json!({"by": "a", "rows": [{"priority": "high"}]}),
                ".rows[0]",
                "missing field `value`",
            ),
            (
                json!({"by": "a", "rows": [{"value": {}}]}),
                ".rows[0].value",
                "has no operator",
            ),
            (
                json!({"by": "a", "rows": [{"value": 1, "priority": "top"}]}),
                ".rows[0].priority",
                "use low, normal, high or urgent",
            ),
            (
                json!({"by": "a", "rows": [{"value": 1, "attributes": {"id": 1}}]}),
                ".rows[0].attributes.id",
                "is not an extension attribute",
            ),
            (
                json!({"by": "a", "rows": [{"value": 1, "attributes": {"x": []}}]}),
                ".rows[0].attributes.x",
                "expected a text, a number",
            ),
            (
                json!({"by": "a", "rows": [{"value": 1}, {"value": 1, "attributes": {"priority": "high"}}]}),
                ".rows[1].attributes.priority",
                "use the key priority",
            ),
            (
                json!({"by": "a", "default": {"attributes": {"x": "a\nb"}}}),
                ".default.attributes.x",
                "control character",
            ),
            (
                json!({"by": "a", "default": {"prio": 1}}),
                ".default.prio",
                "unknown field `prio`",
            ),
        ] {
            let Err(issues) = configure::<Prioritize>(json!({ "tables": [table] })) else {
                panic!("{table} was accepted")
            };
            assert!(
                issues[0].path == format!("tables[0]{path}") && issues[0].message.contains(fix),
                "{table} gave {issues:?}"
            );
        }
    }
}
