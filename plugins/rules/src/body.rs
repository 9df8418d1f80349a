//! The body of a notification: any JSON in which all texts are templates. A text that consists of a
//! single value becomes that value as it was written, including lists and objects. A missing value
//! becomes `null` there, and an empty string within a longer text.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;

use pointsman_plugin::{Event, Payload, Selector, Value};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value as Json;
use serde_json::value::RawValue;

use crate::template::Template;

#[derive(Clone, Debug)]
pub(crate) enum Body {
    Literal(Json),
    Text(Template),
    List(Vec<Body>),
    Object(BTreeMap<String, Body>),
}

/// The payload of an event as it was written, so that every number keeps its exact digits. (A field
/// of the payload that arrives as an attribute does not distinguish a list from a text that looks
/// like one.)
pub(crate) struct Document<'a> {
    event: &'a Event,
    /// The lists and objects along the requested pointers, by pointer. Each is parsed once.
    levels: RefCell<BTreeMap<String, Level<'a>>>,
}

enum Level<'a> {
    Object(BTreeMap<String, &'a RawValue>),
    List(Vec<&'a RawValue>),
    Neither,
}

impl<'a> Level<'a> {
    fn read(json: &'a str) -> Self {
        let read = match json.bytes().next() {
            Some(b'{') => serde_json::from_str(json).map(Self::Object),
            Some(b'[') => serde_json::from_str(json).map(Self::List),
            _ => Ok(Self::Neither),
        };
        // Parsing cannot fail, because the host has already parsed the whole payload.
        read.unwrap_or(Self::Neither)
    }

    /// Resolves one step of a pointer (RFC 6901).
    fn at(&self, step: &str) -> Option<&'a RawValue> {
        match self {
            Self::Object(members) => members
                .get(&step.replace("~1", "/").replace("~0", "~"))
                .copied(),
            Self::List(list) if step == "0" || !step.starts_with(['0', '+']) => {
                list.get(step.parse::<usize>().ok()?).copied()
            }
            Self::List(_) | Self::Neither => None,
        }
    }
}

impl<'a> Document<'a> {
    pub(crate) fn of(event: &'a Event) -> Self {
        Self {
            event,
            levels: RefCell::default(),
        }
    }

    fn pointer(&self, pointer: &str) -> Option<&'a str> {
        let Payload::Json(text) = &self.event.data else {
            return None;
        };
        let mut levels = self.levels.borrow_mut();
        let (mut json, mut walked) = (text.trim_start(), 0);
        for step in pointer.split('/').skip(1) {
            let level = levels
                .entry(pointer[..walked].to_owned())
                .or_insert_with(|| Level::read(json));
            json = level.at(step)?.get();
            walked += 1 + step.len();
        }
        Some(json)
    }
}

impl Body {
    /// Whether the body needs the whole payload.
    pub(crate) fn reads_payload(&self) -> bool {
        match self {
            Self::Literal(_) => false,
            Self::Text(template) => matches!(template.single(), Some(Selector::Field(_))),
            Self::List(list) => list.iter().any(Self::reads_payload),
            Self::Object(members) => members.values().any(Self::reads_payload),
        }
    }

    /// The values that the body reads in addition to the whole payload.
    pub(crate) fn selectors(&self) -> Box<dyn Iterator<Item = &Selector> + '_> {
        match self {
            Self::Literal(_) => Box::new(std::iter::empty()),
            Self::Text(_) if self.reads_payload() => Box::new(std::iter::empty()),
            Self::Text(template) => Box::new(template.selectors()),
            Self::List(list) => Box::new(list.iter().flat_map(Self::selectors)),
            Self::Object(members) => Box::new(members.values().flat_map(Self::selectors)),
        }
    }

    /// Fills in the body for this event, as JSON.
    pub(crate) fn fill(&self, event: &Event, document: &Document<'_>) -> String {
        let mut json = String::new();
        self.write(&mut json, event, document);
        json
    }

    fn write(&self, out: &mut String, event: &Event, document: &Document<'_>) {
        match self {
            Self::Literal(json) => out.push_str(&json.to_string()),
            Self::Text(template) => match template.single() {
                Some(Selector::Field(pointer)) => {
                    out.push_str(document.pointer(pointer.as_str()).unwrap_or("null"))
                }
                Some(selector) => out.push_str(
                    &selector
                        .of(event)
                        .map_or(Json::Null, |value| json(&value))
                        .to_string(),
                ),
                None => out.push_str(&Json::String(template.fill_with_gaps(event)).to_string()),
            },
            Self::List(list) => {
                out.push('[');
                for (n, body) in list.iter().enumerate() {
                    out.push_str(if n > 0 { "," } else { "" });
                    body.write(out, event, document);
                }
                out.push(']');
            }
            Self::Object(members) => {
                out.push('{');
                for (n, (name, body)) in members.iter().enumerate() {
                    out.push_str(if n > 0 { "," } else { "" });
                    out.push_str(&Json::from(name.as_str()).to_string());
                    out.push(':');
                    body.write(out, event, document);
                }
                out.push('}');
            }
        }
    }
}

fn json(value: &Value) -> Json {
    match value {
        Value::Text(text) => text.as_str().into(),
        Value::Integer(integer) => (*integer).into(),
        Value::Decimal(decimal) => (*decimal).into(),
        Value::Flag(flag) => (*flag).into(),
    }
}

impl<'de> Deserialize<'de> for Body {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct AnyJson;
        impl<'de> Visitor<'de> for AnyJson {
            type Value = Body;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any JSON")
            }
            fn visit_unit<E: Error>(self) -> Result<Body, E> {
                Ok(Body::Literal(Json::Null))
            }
            fn visit_bool<E: Error>(self, flag: bool) -> Result<Body, E> {
                Ok(Body::Literal(flag.into()))
            }
            fn visit_i64<E: Error>(self, integer: i64) -> Result<Body, E> {
                Ok(Body::Literal(integer.into()))
            }
            fn visit_u64<E: Error>(self, integer: u64) -> Result<Body, E> {
                Ok(Body::Literal(integer.into()))
            }
            fn visit_f64<E: Error>(self, decimal: f64) -> Result<Body, E> {
                Ok(Body::Literal(decimal.into()))
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Body, E> {
                Template::parse(text).map(Body::Text).map_err(E::custom)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Body, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(seq)).map(Body::List)
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Body, A::Error> {
                BTreeMap::deserialize(MapAccessDeserializer::new(map)).map(Body::Object)
            }
        }
        d.deserialize_any(AnyJson)
    }
}

impl JsonSchema for Body {
    fn schema_name() -> Cow<'static, str> {
        "Body".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"description": "Any JSON, in which all texts are templates."})
    }
}
