//! The body of a notification: any JSON, whose texts are templates. A text that is nothing but one value becomes that value with its type,
//! lists and objects as well; one that is missing becomes `null` there, and nothing within a longer text.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::fmt;

use pointsman_plugin::{Event, Selector, Value};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value as Json;

use crate::template::Template;

#[derive(Clone, Debug)]
pub(crate) enum Body {
    Literal(Json),
    Text(Template),
    List(Vec<Body>),
    Object(BTreeMap<String, Body>),
}

/// The payload of an event, parsed when the first body asks for a value of it. As a field of the payload, a list could not be told from a
/// text that looks like one.
pub(crate) struct Document<'a> {
    event: &'a Event,
    parsed: OnceCell<Option<Json>>,
}

impl<'a> Document<'a> {
    pub(crate) fn of(event: &'a Event) -> Self {
        Self { event, parsed: OnceCell::new() }
    }

    fn pointer(&self, pointer: &str) -> Option<&Json> {
        self.parsed.get_or_init(|| self.event.json().ok()).as_ref()?.pointer(pointer)
    }
}

impl Body {
    /// Whether it needs the payload whole.
    pub(crate) fn reads_payload(&self) -> bool {
        match self {
            Self::Literal(_) => false,
            Self::Text(template) => matches!(template.single(), Some(Selector::Field(_))),
            Self::List(list) => list.iter().any(Self::reads_payload),
            Self::Object(members) => members.values().any(Self::reads_payload),
        }
    }

    /// What it reads beside the payload whole.
    pub(crate) fn selectors(&self) -> Box<dyn Iterator<Item = &Selector> + '_> {
        match self {
            Self::Literal(_) => Box::new(std::iter::empty()),
            Self::Text(_) if self.reads_payload() => Box::new(std::iter::empty()),
            Self::Text(template) => Box::new(template.selectors()),
            Self::List(list) => Box::new(list.iter().flat_map(Self::selectors)),
            Self::Object(members) => Box::new(members.values().flat_map(Self::selectors)),
        }
    }

    pub(crate) fn fill(&self, event: &Event, document: &Document<'_>) -> Json {
        match self {
            Self::Literal(json) => json.clone(),
            Self::Text(template) => match template.single() {
                Some(Selector::Field(pointer)) => document.pointer(pointer.as_str()).cloned().unwrap_or_default(),
                Some(selector) => selector.of(event).map(|value| json(&value)).unwrap_or_default(),
                None => Json::String(template.fill_with_gaps(event)),
            },
            Self::List(list) => list.iter().map(|body| body.fill(event, document)).collect(),
            Self::Object(members) => members.iter().map(|(name, body)| (name.clone(), body.fill(event, document))).collect(),
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
        json_schema!({"description": "Any JSON, whose texts are templates."})
    }
}
