//! The targets of a rule: users, groups and everyone, as templates. A value that is a list yields a
//! target for each of its elements.
//!
//! A payload is untrusted: a name that the host would refuse yields no target, so that no payload
//! can cost an event its other routes.

use std::borrow::Cow;
use std::fmt;

use pointsman_plugin::{
    Event, OneOrMore, RESERVED_EVENT_NAMES, Selector, Target, Value, is_reserved_event_name,
};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::Error;
use serde::{Deserialize, Deserializer};

use crate::template::{Part, Template, found};

/// The longest name that the host accepts, in bytes.
const MAX_NAME: usize = 256;

/// The targets; all keys may be combined.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct To {
    user: Option<NameTemplate>,
    users: Option<OneOrMore<NameTemplate>>,
    group: Option<NameTemplate>,
    groups: Option<OneOrMore<NameTemplate>>,
    everyone: bool,
}

impl To {
    pub(crate) fn is_nobody(&self) -> bool {
        self.templates().next().is_none() && !self.everyone
    }

    pub(crate) fn templates(&self) -> impl Iterator<Item = &NameTemplate> {
        self.users().chain(self.groups())
    }

    fn users(&self) -> impl Iterator<Item = &NameTemplate> {
        self.user
            .iter()
            .chain(self.users.iter().flat_map(|list| list.iter()))
    }

    fn groups(&self) -> impl Iterator<Item = &NameTemplate> {
        self.group
            .iter()
            .chain(self.groups.iter().flat_map(|list| list.iter()))
    }

    /// Returns the targets for an event. Calls `note` with the reason for each template that yields
    /// no target, or fewer targets than it has values.
    pub(crate) fn targets(&self, event: &Event, note: &dyn Fn(fmt::Arguments<'_>)) -> Vec<Target> {
        let mut targets = Vec::new();
        for template in self.users() {
            targets.extend(template.names(event, note).into_iter().map(Target::User));
        }
        for template in self.groups() {
            targets.extend(template.names(event, note).into_iter().map(Target::Group));
        }
        if self.everyone {
            targets.push(Target::Everyone);
        }
        targets
    }
}

/// A template whose text is a name: of a user, of a group, or a collapse key.
#[derive(Clone, Debug)]
pub(crate) struct NameTemplate(Template);

impl NameTemplate {
    pub(crate) fn selectors(&self) -> impl Iterator<Item = &Selector> {
        self.0.selectors()
    }

    /// Returns the single name that the template yields.
    ///
    /// # Errors
    /// The reason why it yields none.
    pub(crate) fn name(&self, event: &Event) -> Result<String, String> {
        let mut name = String::new();
        for part in self.0.parts() {
            match part {
                Part::Literal(literal) => name.push_str(literal),
                Part::Value(selector) => {
                    let value = found(selector, event)?;
                    name.push_str(&as_name(selector, &value)?);
                }
            }
        }
        check(&name)?;
        Ok(name)
    }

    /// Returns the names that the template yields: one, or one for each element of a list in it.
    fn names(&self, event: &Event, note: &dyn Fn(fmt::Arguments<'_>)) -> Vec<String> {
        let expanded = self.expand(event).unwrap_or_else(|why| {
            note(format_args!(
                "'{}' yields no target: {why}",
                self.0.as_str()
            ));
            Vec::new()
        });
        let is_usable = |name: &Result<String, String>| match name {
            Ok(_) => true,
            Err(why) => {
                note(format_args!(
                    "'{}' yields fewer targets: {why}",
                    self.0.as_str()
                ));
                false
            }
        };
        expanded.into_iter().filter(is_usable).flatten().collect()
    }

    /// # Errors
    /// Outer: the reason why the template yields no name at all. Inner: the reason why one element
    /// does not.
    fn expand(&self, event: &Event) -> Result<Vec<Result<String, String>>, String> {
        let mut before = String::new();
        let mut list = None;
        let mut after = String::new();
        for part in self.0.parts() {
            let text = if list.is_some() {
                &mut after
            } else {
                &mut before
            };
            match part {
                Part::Literal(literal) => text.push_str(literal),
                Part::Value(selector) => {
                    let value = found(selector, event)?;
                    match (elements(&value), &list) {
                        (Some(elements), None) => list = Some((selector, elements)),
                        // Two lists would yield all pairs, whose number is the product of both
                        // lengths.
                        (Some(_), Some(_)) => {
                            return Err(format!(
                                "{} is a second list in the template",
                                selector.as_str()
                            ));
                        }
                        (None, _) => text.push_str(&as_name(selector, &value)?),
                    }
                }
            }
        }
        let Some((selector, elements)) = list else {
            check(&before)?;
            return Ok(vec![Ok(before)]);
        };
        let name = |element: &serde_json::Value| {
            let name = match element {
                serde_json::Value::String(text) if !text.is_empty() => {
                    format!("{before}{text}{after}")
                }
                serde_json::Value::Number(number) if number.is_i64() => {
                    format!("{before}{number}{after}")
                }
                _ => {
                    return Err(format!(
                        "{} has an element that is neither a text nor an integer",
                        selector.as_str()
                    ));
                }
            };
            check(&name)?;
            Ok(name)
        };
        Ok(elements.iter().map(name).collect())
    }
}

/// Returns the elements of a list, which arrives as its JSON text.
fn elements(value: &Value) -> Option<Vec<serde_json::Value>> {
    match value {
        Value::Text(text) if text.starts_with('[') => serde_json::from_str(text).ok(),
        _ => None,
    }
}

/// Ids are often numbers, and JSON keeps them as numbers.
fn as_name<'a>(selector: &Selector, value: &'a Value) -> Result<Cow<'a, str>, String> {
    match value {
        Value::Text(text) if text.is_empty() => Err(format!("{} is empty", selector.as_str())),
        Value::Text(text) => Ok(Cow::Borrowed(text)),
        Value::Integer(number) => Ok(Cow::Owned(number.to_string())),
        Value::Decimal(_) | Value::Flag(_) => Err(format!(
            "{} is {value}, neither a text nor an integer",
            selector.as_str()
        )),
    }
}

/// Checks that the host would accept the name.
fn check(name: &str) -> Result<(), String> {
    match name {
        "" => Err("the name is empty".into()),
        _ if name.len() > MAX_NAME => Err(format!(
            "the name has {} bytes, but the limit is {MAX_NAME}",
            name.len()
        )),
        _ if name.chars().any(char::is_control) => {
            Err("the name contains a control character".into())
        }
        _ => Ok(()),
    }
}

impl<'de> Deserialize<'de> for NameTemplate {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let template = Template::parse(&String::deserialize(d)?).map_err(D::Error::custom)?;
        if let Some(name) = template.literal() {
            check(name).map_err(|e| {
                D::Error::custom(format!(
                    "{e}; use 1 to {MAX_NAME} bytes without control characters"
                ))
            })?;
        }
        Ok(Self(template))
    }
}

impl JsonSchema for NameTemplate {
    fn schema_name() -> Cow<'static, str> {
        "Template".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"description": "A text that may contain values of the event: {/pointer}, {attribute}, {subject}", "type": "string", "minLength": 1})
    }
}

/// The SSE `event:` name of a notification.
#[derive(Clone, Debug)]
pub(crate) struct EventName(String);

impl EventName {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl<'de> Deserialize<'de> for EventName {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let name = String::deserialize(d)?;
        check(&name).map_err(|e| {
            D::Error::custom(format!(
                "{e}; use 1 to {MAX_NAME} bytes without control characters"
            ))
        })?;
        if is_reserved_event_name(&name) {
            return Err(D::Error::custom(format!(
                "'{name}' is reserved; use a name other than {}",
                RESERVED_EVENT_NAMES.join(", ")
            )));
        }
        Ok(Self(name))
    }
}

impl JsonSchema for EventName {
    fn schema_name() -> Cow<'static, str> {
        "EventName".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "minLength": 1, "maxLength": MAX_NAME, "not": {"enum": RESERVED_EVENT_NAMES}})
    }
}

/// The slot of a route.
#[derive(Clone, Debug)]
pub(crate) struct SlotName(String);

impl SlotName {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl<'de> Deserialize<'de> for SlotName {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let name = String::deserialize(d)?;
        check(&name).map_err(|e| {
            D::Error::custom(format!(
                "{e}; use 1 to {MAX_NAME} bytes without control characters"
            ))
        })?;
        Ok(Self(name))
    }
}

impl JsonSchema for SlotName {
    fn schema_name() -> Cow<'static, str> {
        "SlotName".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "minLength": 1, "maxLength": MAX_NAME})
    }
}
