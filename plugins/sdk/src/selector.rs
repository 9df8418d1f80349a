//! Selects a value of an event: an attribute by its name, a field of the payload by its JSON
//! pointer, or one of the attributes that every event has. Selectors are parsed from the
//! configuration, so that an invalid name is rejected there.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::Error;
use serde::{Deserialize, Deserializer};

use crate::{Event, Value};

/// The context attributes of CloudEvents 1.0, which are not extensions, and the names of its
/// payload.
const RESERVED: [&str; 10] = [
    "id",
    "source",
    "type",
    "subject",
    "time",
    "specversion",
    "datacontenttype",
    "dataschema",
    "data",
    "data_base64",
];

/// The name of an extension attribute: 1 to 64 characters from a-z, 0-9 and _.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct AttributeName(String);

impl AttributeName {
    /// # Errors
    /// A message that names the problem and the fix.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.starts_with('/') {
            return Err(format!(
                "'{text}' is a field of the payload, not an attribute; move it under payload"
            ));
        }
        if RESERVED.contains(&text) {
            return Err(format!(
                "'{text}' is not an extension attribute; use a name that the publisher defines, such as user or region"
            ));
        }
        let is_legal = (1..=64).contains(&text.len())
            && text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        if is_legal {
            Ok(Self(text.to_owned()))
        } else {
            Err(format!(
                "'{text}' is not a valid attribute name; use 1 to 64 characters from a-z, 0-9 and _"
            ))
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A JSON pointer (RFC 6901) into the payload, such as `/order/region`. The empty pointer, which
/// selects the whole payload, is not allowed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pointer(String);

impl Pointer {
    /// # Errors
    /// A message that names the problem and the fix.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("'' selects the whole payload, which cannot be tested; name a field, such as '/order/id'".to_owned());
        }
        if !text.starts_with('/') {
            return Err(format!(
                "'{text}' is not a valid JSON pointer; write '/{}'",
                text.replace('.', "/")
            ));
        }
        // The only escapes are ~0 for ~ and ~1 for /.
        match text
            .split('~')
            .skip(1)
            .all(|after| after.starts_with(['0', '1']))
        {
            true => Ok(Self(text.to_owned())),
            false => Err(format!(
                "'{text}' is not a valid JSON pointer; write ~0 for ~ and ~1 for a / in a name"
            )),
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Selects a value of an event: `region` is an attribute, `/order/region` a field of the payload;
/// `id`, `source`, `type` and `subject` are the context attributes of the same name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selector {
    Id,
    Source,
    Type,
    Subject,
    Attribute(AttributeName),
    Field(Pointer),
}

impl Selector {
    /// # Errors
    /// A message that names the problem and the fix.
    pub fn parse(text: &str) -> Result<Self, String> {
        Ok(match text {
            "id" => Self::Id,
            "source" => Self::Source,
            "type" => Self::Type,
            "subject" => Self::Subject,
            _ if text.starts_with('/') => Self::Field(Pointer::parse(text)?),
            _ => Self::Attribute(AttributeName::parse(text)?),
        })
    }

    pub fn as_str(&self) -> &str {
        match self {
            Self::Id => "id",
            Self::Source => "source",
            Self::Type => "type",
            Self::Subject => "subject",
            Self::Attribute(name) => name.as_str(),
            Self::Field(pointer) => pointer.as_str(),
        }
    }

    /// Returns the value if the event has it and the plugin's interest includes it.
    pub fn of<'a>(&self, event: &'a Event) -> Option<Cow<'a, Value>> {
        let text = match self {
            Self::Id => &event.id,
            Self::Source => &event.source,
            Self::Type => &event.kind,
            Self::Subject => event.subject.as_ref()?,
            Self::Attribute(AttributeName(name)) | Self::Field(Pointer(name)) => {
                return event.attribute(name).map(Cow::Borrowed);
            }
        };
        Some(Cow::Owned(Value::Text(text.clone())))
    }
}

/// Implements the traits of a type that is a single string in a configuration.
macro_rules! is_a_string {
    ($($name:ident, $pattern:literal;)+) => {$(
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                Self::parse(&String::deserialize(d)?).map_err(D::Error::custom)
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({"type": "string", "pattern": $pattern})
            }
        }
    )+};
}

is_a_string! {
    AttributeName, "^[a-z0-9_]{1,64}$";
    Pointer, "^/([^~]|~[01])*$";
    Selector, "^([a-z0-9_]{1,64}|/([^~]|~[01])*)$";
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::event;

    #[test]
    fn a_selector_finds_what_it_names() {
        let event = event("t")
            .id("a")
            .source("/s")
            .attribute("user", "42")
            .attribute("/user", "7")
            .build();
        let found = |text: &str| {
            Selector::parse(text)
                .unwrap()
                .of(&event)
                .map(|value| value.to_string())
        };
        for (text, expect) in [
            ("id", "a"),
            ("source", "/s"),
            ("type", "t"),
            ("user", "42"),
            ("/user", "7"),
            ("subject", ""),
            ("gone", ""),
            ("/gone", ""),
        ] {
            assert_eq!(found(text).unwrap_or_default(), expect, "{text}");
            assert_eq!(Selector::parse(text).unwrap().as_str(), text);
        }
    }

    #[test]
    fn an_invalid_selector_is_rejected_with_the_fix() {
        for (text, fix) in [
            ("", "use 1 to 64 characters"),
            ("Region", "use 1 to 64 characters"),
            ("order.region", "use 1 to 64 characters"),
            ("time", "is not an extension attribute"),
            ("/a~b", "write ~0 for ~"),
            ("/a~", "write ~0 for ~"),
        ] {
            let error = Selector::parse(text).unwrap_err();
            assert!(error.contains(fix), "{text} gave: {error}");
        }
        assert!(
            Pointer::parse("order.total")
                .unwrap_err()
                .contains("write '/order/total'")
        );
        assert!(
            AttributeName::parse("/order")
                .unwrap_err()
                .contains("move it under payload")
        );
    }
}
