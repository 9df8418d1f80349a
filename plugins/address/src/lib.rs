//! A router for events that name their recipients in these extension attributes:
//!
//! | attribute | value | meaning |
//! |---|---|---|
//! | `user`, `group` | text or integer | one recipient |
//! | `users`, `groups` | `a,b,c`, or a JSON array of strings and integers: `["a",42]` | several recipients |
//! | `everyone` | `true` or `false`, as a boolean or as text | all recipients |
//! | `priority` | `low`, `normal` or `medium`, `high`, `urgent`, in any case | the urgency; a filter may have changed it |
//! | `ttl` | `30` (seconds, as an integer or as text), `500ms`, `30s`, `5m`, `2h` | the time to live |
//! | `collapse` | text | a later event with the same key supersedes this one |
//! | `event_name` | text | the SSE event name |
//! | `when` | a JSON object of tests, or a list of alternatives: `{"plan":["pro","team"]}` | restricts the recipients by their attributes |
//!
//! Spaces around commas are ignored. The attributes may be combined and may name a recipient more
//! than once: each recipient gets one notification. An event that names no recipient has no routes.
//! Any other value is rejected, with the name of the attribute and the fix: a dead letter is better
//! than a notification that silently reaches fewer people.

mod when;

use pointsman_plugin::is_reserved_event_name;
use pointsman_plugin::{
    Event, Failure, Interest, Issue, NoConfig, Plugin, Priority, Route, Router, Target, Ttl, Value,
    export,
};

struct Address;

export!(Address as router);

impl Plugin for Address {
    type Config = NoConfig;

    fn new(_: NoConfig) -> Result<Self, Issue> {
        Ok(Self)
    }

    fn interest(&self) -> Interest {
        Interest::in_every_type().attributes([
            "user",
            "users",
            "group",
            "groups",
            "everyone",
            "priority",
            "ttl",
            "collapse",
            "event_name",
            "when",
        ])
    }
}

impl Router for Address {
    fn resolve(&self, event: &Event) -> Result<Vec<Route>, Failure> {
        let mut targets = Vec::new();
        for (one, several, target) in [
            ("user", "users", Target::User as fn(String) -> Target),
            ("group", "groups", Target::Group),
        ] {
            targets.extend(
                event
                    .attribute(one)
                    .map(|value| name(one, value))
                    .transpose()?
                    .map(target),
            );
            for name in event
                .attribute(several)
                .map(|value| names(several, value))
                .transpose()?
                .unwrap_or_default()
            {
                targets.push(target(name));
            }
        }
        if event.attribute("everyone").map(flag).transpose()? == Some(true) {
            targets.push(Target::Everyone);
        }
        // Only validated: the route takes the event's priority, which a filter may have changed.
        event
            .attribute("priority")
            .map(check_priority)
            .transpose()?;
        let ttl_ms = event.attribute("ttl").map(ttl_ms).transpose()?;
        let collapse_key = event
            .attribute("collapse")
            .map(|value| name("collapse", value))
            .transpose()?;
        let event_name = event.attribute("event_name").map(event_name).transpose()?;
        // Before the targets are found to be empty: a wrong condition is a mistake in each event.
        let alternatives = event.attribute("when").map(when::parse).transpose()?;
        if targets.is_empty() {
            return Ok(Vec::new());
        }
        let route = Route {
            ttl_ms,
            collapse_key,
            event_name,
            ..Route::to(targets)
        };
        let alternatives = alternatives.into_iter().flatten();
        Ok(vec![alternatives.fold(route, Route::when)])
    }
}

fn rejected(attribute: &str, value: &Value, fix: &str) -> Failure {
    let value: String = value.to_string().chars().take(64).collect();
    Failure::Reject(format!("the attribute {attribute} is '{value}'; {fix}"))
}

/// User ids are often numbers, and JSON keeps them as numbers.
fn name(attribute: &str, value: &Value) -> Result<String, Failure> {
    match value {
        Value::Text(text) if !text.trim().is_empty() => Ok(text.clone()),
        Value::Integer(number) => Ok(number.to_string()),
        _ => Err(rejected(
            attribute,
            value,
            "use a non-empty text or remove the attribute",
        )),
    }
}

fn names(attribute: &str, value: &Value) -> Result<Vec<String>, Failure> {
    let refused = || {
        rejected(
            attribute,
            value,
            r#"use comma-separated names (a,b) or a JSON array of strings or integers (["a",42])"#,
        )
    };
    let list: Vec<String> = match value {
        Value::Integer(number) => vec![number.to_string()],
        Value::Text(text) if text.trim_start().starts_with('[') => {
            let elements: Vec<Value> = serde_json::from_str(text).map_err(|_| refused())?;
            let names = elements.into_iter().map(|element| match element {
                Value::Text(text) => Some(text),
                Value::Integer(number) => Some(number.to_string()),
                Value::Decimal(_) | Value::Flag(_) => None,
            });
            names.collect::<Option<Vec<_>>>().ok_or_else(refused)?
        }
        // An application that joins an empty list means no recipients.
        Value::Text(text) if text.trim().is_empty() => Vec::new(),
        Value::Text(text) => text.split(',').map(|name| name.trim().to_owned()).collect(),
        Value::Decimal(_) | Value::Flag(_) => return Err(refused()),
    };
    if list.iter().any(|name| name.trim().is_empty()) {
        Err(refused())
    } else {
        Ok(list)
    }
}

fn event_name(value: &Value) -> Result<String, Failure> {
    let name = name("event_name", value)?;
    if is_reserved_event_name(&name) {
        return Err(rejected(
            "event_name",
            value,
            "the name is reserved; use another one",
        ));
    }
    Ok(name)
}

fn flag(value: &Value) -> Result<bool, Failure> {
    match value {
        Value::Flag(flag) => Ok(*flag),
        Value::Text(text) if text == "true" => Ok(true),
        Value::Text(text) if text == "false" => Ok(false),
        _ => Err(rejected("everyone", value, "use true or false")),
    }
}

fn check_priority(value: &Value) -> Result<(), Failure> {
    match value {
        Value::Text(text) if Priority::named(text).is_some() => Ok(()),
        _ => Err(rejected(
            "priority",
            value,
            "use low, normal, high or urgent",
        )),
    }
}

fn ttl_ms(value: &Value) -> Result<u64, Failure> {
    Ttl::of(value)
        .map(|ttl| ttl.ms)
        .ok_or_else(|| rejected("ttl", value, Ttl::FIX))
}

#[cfg(test)]
mod tests {
    use pointsman_plugin::testing;

    use super::*;

    fn resolve(attributes: &[(&str, Value)]) -> Result<Vec<Route>, Failure> {
        let plugin: Address = testing::configure(serde_json::json!({})).unwrap();
        let event = attributes
            .iter()
            .fold(testing::event("t"), |event, (name, value)| {
                event.attribute(name, value.clone())
            });
        plugin.resolve(&event.seen_by(&plugin).unwrap())
    }

    /// Formats users as they are, groups with a leading `@` and everyone as `*`.
    fn targets(attributes: &[(&str, Value)]) -> Vec<String> {
        let routes = resolve(attributes).unwrap();
        let written = |target: &Target| match target {
            Target::User(user) => user.clone(),
            Target::Group(group) => format!("@{group}"),
            Target::Everyone => "*".into(),
        };
        routes
            .iter()
            .flat_map(|route| &route.targets)
            .map(written)
            .collect()
    }

    #[test]
    fn each_attribute_names_its_recipients() {
        assert_eq!(targets(&[("user", "42".into())]), ["42"]);
        assert_eq!(targets(&[("user", 42.into())]), ["42"]);
        assert_eq!(targets(&[("users", "a, b ,c".into())]), ["a", "b", "c"]);
        assert_eq!(targets(&[("users", r#"["a","b,c"]"#.into())]), ["a", "b,c"]);
        assert_eq!(targets(&[("users", r#"[42,"a"]"#.into())]), ["42", "a"]);
        assert_eq!(
            targets(&[("group", "ops".into()), ("groups", "x,y".into())]),
            ["@ops", "@x", "@y"]
        );
        assert_eq!(targets(&[("everyone", true.into())]), ["*"]);
        assert_eq!(targets(&[("everyone", "true".into())]), ["*"]);
        assert_eq!(
            targets(&[
                ("user", "a".into()),
                ("groups", "g".into()),
                ("everyone", true.into())
            ]),
            ["a", "@g", "*"]
        );
    }

    #[test]
    fn an_event_that_names_no_recipient_has_no_routes() {
        for attributes in [
            &[][..],
            &[("colour", "red".into())],
            &[("everyone", false.into())],
            &[("everyone", "false".into())],
            &[("users", "".into())],
            &[("users", "[]".into())],
        ] {
            assert_eq!(resolve(attributes), Ok(vec![]), "{attributes:?}");
        }
    }

    #[test]
    fn a_ttl_is_in_seconds_or_has_a_unit() {
        for (value, expect) in [
            (30.into(), 30_000),
            ("30".into(), 30_000),
            ("500ms".into(), 500),
            ("30s".into(), 30_000),
            ("5m".into(), 300_000),
            ("2h".into(), 7_200_000),
        ] {
            let value: Value = value;
            let routes = resolve(&[
                ("user", "a".into()),
                ("ttl", value),
                ("collapse", "k".into()),
            ])
            .unwrap();
            assert_eq!(
                routes,
                [Route::to_user("a").ttl_ms(expect).collapse_key("k")]
            );
        }
    }

    #[test]
    fn the_route_sets_no_priority_so_that_a_filter_can_change_it() {
        assert_eq!(
            resolve(&[("user", "a".into()), ("priority", "urgent".into())]),
            Ok(vec![Route::to_user("a")])
        );
    }

    #[test]
    fn the_words_of_other_publishers_are_priorities() {
        for word in ["HIGH", "Normal", "medium", "Urgent"] {
            let routes = resolve(&[("user", "a".into()), ("priority", word.into())]);
            assert_eq!(routes, Ok(vec![Route::to_user("a")]), "{word}");
        }
    }

    #[test]
    fn an_invalid_value_is_rejected_with_its_name_and_the_fix() {
        for (name, value, fix) in [
            ("user", "".into(), "non-empty"),
            ("user", true.into(), "non-empty"),
            ("users", "a,,b".into(), "comma-separated"),
            ("users", r#"["a",1.5]"#.into(), "JSON array of strings"),
            ("event_name", "close".into(), "reserved"),
            ("when", "plan".into(), "use a JSON object such as"),
            ("users", r#"["a""#.into(), "JSON array of strings"),
            ("groups", 1.5.into(), "JSON array of strings"),
            ("everyone", "yes".into(), "true or false"),
            ("everyone", 1.into(), "true or false"),
            ("priority", "highest".into(), "low, normal, high or urgent"),
            ("priority", 3.into(), "low, normal, high or urgent"),
            ("ttl", 0.into(), "seconds above 0"),
            ("ttl", (-1).into(), "seconds above 0"),
            ("ttl", "5 m".into(), "500ms, 30s, 5m, 2h"),
            ("ttl", "ms".into(), "500ms, 30s, 5m, 2h"),
            ("ttl", "99999999999999999h".into(), "500ms, 30s, 5m, 2h"),
            ("collapse", "".into(), "non-empty"),
        ] {
            let value: Value = value;
            // Rejected even if another attribute names a valid recipient.
            let Err(Failure::Reject(reason)) =
                resolve(&[("group", "ops".into()), (name, value.clone())])
            else {
                panic!("{name} {value:?} was accepted")
            };
            assert!(
                reason.contains(&format!("the attribute {name} is")) && reason.contains(fix),
                "{reason}"
            );
        }
    }
}
