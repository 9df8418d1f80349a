//! A deserializer for configurations in which a structure is written as a table only.
//!
//! The code that `serde` derives also reads a structure from a list, by the order in which its
//! fields are declared: `to = ["ann", "bob"]` would set the first two fields of `to`, whatever they
//! mean. A list where a table belongs is a mistake at any depth, in the types of a plugin as in
//! those of this crate.

use serde::Deserializer;
use serde::de::value::{MapAccessDeserializer, MapDeserializer, SeqDeserializer};
use serde::de::{Error as _, IntoDeserializer, Visitor};
use serde_json::{Error, Value as Json};

/// Deserializes a JSON value whose structures are objects.
#[derive(Clone, Copy)]
pub(super) struct Tables<'de>(pub(super) &'de Json);

impl<'de> Tables<'de> {
    /// # Errors
    /// The value is not an object.
    fn visit_table<V: Visitor<'de>>(self, keys: &[&str], visitor: V) -> Result<V::Value, Error> {
        let fix = || match keys {
            [] => "write a table".to_owned(),
            [key] => format!("write a table with the key {key}"),
            [keys @ .., last] => format!(
                "write a table with keys from {} and {last}",
                keys.join(", ")
            ),
        };
        match self.0 {
            Json::Array(_) => Err(Error::custom(format!("is a list; {}", fix()))),
            Json::String(_) | Json::Number(_) | Json::Bool(_) => {
                Err(Error::custom(format!("is a single value; {}", fix())))
            }
            Json::Object(_) | Json::Null => self.deserialize_any(visitor),
        }
    }
}

impl<'de> Deserializer<'de> for Tables<'de> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Json::Null => visitor.visit_unit(),
            Json::Bool(flag) => visitor.visit_bool(*flag),
            Json::Number(number) => number.deserialize_any(visitor),
            Json::String(text) => visitor.visit_borrowed_str(text),
            Json::Array(list) => {
                let mut elements = SeqDeserializer::new(list.iter().map(Self));
                let value = visitor.visit_seq(&mut elements)?;
                elements.end().map(|()| value)
            }
            Json::Object(table) => {
                let members = table.iter().map(|(key, value)| (Key(key), Self(value)));
                let mut members = MapDeserializer::new(members);
                let value = visitor.visit_map(&mut members)?;
                members.end().map(|()| value)
            }
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        keys: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.visit_table(keys, visitor)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.visit_table(&[], visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.0.is_null() {
            visitor.visit_none()
        } else {
            visitor.visit_some(self)
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        match self.0 {
            Json::String(text) => visitor.visit_enum(text.as_str().into_deserializer()),
            Json::Object(table) => {
                let members = table.iter().map(|(key, value)| (Key(key), Self(value)));
                visitor.visit_enum(MapAccessDeserializer::new(MapDeserializer::new(members)))
            }
            _ => self.deserialize_any(visitor),
        }
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit
        unit_struct seq tuple tuple_struct identifier ignored_any
    }
}

impl<'de> IntoDeserializer<'de, Error> for Tables<'de> {
    type Deserializer = Self;
    fn into_deserializer(self) -> Self {
        self
    }
}

/// The key of a member. Numbers and booleans are written as texts, because keys of JSON are texts.
struct Key<'de>(&'de str);

macro_rules! parse_key {
    ($($method:ident => $visit:ident),+ $(,)?) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            match self.0.parse() {
                Ok(value) => visitor.$visit(value),
                Err(_) => visitor.visit_borrowed_str(self.0),
            }
        }
    )+};
}

impl<'de> Deserializer<'de> for Key<'de> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_borrowed_str(self.0)
    }

    parse_key! {
        deserialize_bool => visit_bool,
        deserialize_i8 => visit_i8,
        deserialize_i16 => visit_i16,
        deserialize_i32 => visit_i32,
        deserialize_i64 => visit_i64,
        deserialize_u8 => visit_u8,
        deserialize_u16 => visit_u16,
        deserialize_u32 => visit_u32,
        deserialize_u64 => visit_u64,
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_enum(self.0.into_deserializer())
    }

    serde::forward_to_deserialize_any! {
        i128 u128 f32 f64 char str string bytes byte_buf option unit unit_struct seq tuple
        tuple_struct map struct identifier ignored_any
    }
}

impl<'de> IntoDeserializer<'de, Error> for Key<'de> {
    type Deserializer = Self;
    fn into_deserializer(self) -> Self {
        self
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Debug, Deserialize, PartialEq)]
    struct Named {
        first: Option<String>,
        second: Option<String>,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(rename_all = "lowercase")]
    enum Choice {
        Plain,
        Number(u32),
        List(Vec<String>),
        Table { first: bool },
    }

    #[derive(Debug, Default, Deserialize, PartialEq)]
    #[serde(default)]
    struct Everything {
        choice: Vec<Choice>,
        by_number: BTreeMap<u16, (i8, f32)>,
        by_flag: BTreeMap<bool, char>,
        free: serde_json::Value,
        named: Option<Named>,
    }

    fn parse<T: for<'de> Deserialize<'de>>(json: &Json) -> Result<T, Error> {
        T::deserialize(Tables(json))
    }

    #[test]
    fn everything_but_a_structure_is_read_as_serde_json_reads_it() {
        let json = json!({
            "choice": ["plain", {"number": 7}, {"list": ["a", "b"]}, {"table": {"first": true}}],
            "by_number": {"7": [-1, 1.5]}, "by_flag": {"true": "x"},
            "free": {"a": [1, null, {"b": 18_446_744_073_709_551_615_u64}]},
            "named": {"first": "a", "second": null}
        });
        let expect: Everything = serde_json::from_value(json.clone()).unwrap();
        assert_eq!(parse::<Everything>(&json).unwrap(), expect);
        assert!(expect.named.is_some() && expect.by_number.len() == 1);
    }

    #[test]
    fn a_structure_is_not_read_from_a_list_or_a_value() {
        assert!(serde_json::from_value::<Named>(json!(["a", "b"])).is_ok());
        for (json, reason) in [
            (
                json!(["a", "b"]),
                "is a list; write a table with keys from first and second",
            ),
            (
                json!("a"),
                "is a single value; write a table with keys from first and second",
            ),
        ] {
            assert_eq!(parse::<Named>(&json).unwrap_err().to_string(), reason);
        }
        for (json, reason) in [
            (json!({"named": ["a", "b"]}), "is a list"),
            (json!({"choice": [{"table": [true]}]}), "is a list"),
            (json!({"by_flag": []}), "is a list; write a table"),
        ] {
            let error = parse::<Everything>(&json).unwrap_err().to_string();
            assert!(error.contains(reason), "{json} gave: {error}");
        }
    }
}
