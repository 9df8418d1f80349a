//! The tests of a single value. This module alone defines the operators.
//!
//! A field of the payload has its JSON type: `"5"` is a text and `5` a number. An attribute is
//! converted to the type of the operand, because flat entries and HTTP headers carry only text: for
//! an attribute, `5` and `"5"` are equal, so an event is decided in the same way however it was
//! published.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::alternatives;
use crate::pattern::odd_in_text;
use crate::{Event, OneOrMore, Priority, Selector, Value};

/// The tests that a value must pass, as an operator writes them: a value, a list of alternative
/// values, or a table of operators that must all hold.
///
/// An absent value passes only `present = false`. A value of another type passes no comparison,
/// including `not_equals`. Lists and objects arrive as their JSON text.
#[derive(Clone, Debug)]
pub struct Wanted(Operators);

#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(rename = "Operators")]
struct Operators {
    equals: Option<Value>,
    /// Present, of the same type, and different.
    not_equals: Option<Value>,
    one_of: Option<OneOrMore<Value>>,
    prefix: Option<String>,
    suffix: Option<String>,
    /// The text contains this text.
    contains: Option<String>,
    /// The text contains a match of this regular expression.
    matches: Option<Regex>,
    less: Option<Bound>,
    at_most: Option<Bound>,
    greater: Option<Bound>,
    at_least: Option<Bound>,
    /// The list contains one of these values.
    includes: Option<OneOrMore<Value>>,
    /// Whether the value must be present (`true`) or absent (`false`).
    present: Option<bool>,
}

/// How the type of a value is determined.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Reading {
    /// The value keeps its own type.
    Own,
    /// The value is converted to the type of the operand, if possible.
    Operand,
    /// Like `Operand`; two words for the same priority are equal, as in `match.priority`.
    Priority,
}

impl Reading {
    pub(super) fn of_attribute(name: &str) -> Self {
        if name == "priority" {
            Self::Priority
        } else {
            Self::Operand
        }
    }
}

impl Wanted {
    /// Whether the selected value of an event passes all tests.
    pub fn holds(&self, event: &Event, selector: &Selector) -> bool {
        let reading = match selector {
            Selector::Field(_) => Reading::Own,
            Selector::Attribute(name) => Reading::of_attribute(name.as_str()),
            Selector::Id | Selector::Source | Selector::Type | Selector::Subject => {
                Reading::Operand
            }
        };
        self.holds_for(selector.of(event).as_deref(), reading)
    }

    pub(super) fn holds_for(&self, value: Option<&Value>, reading: Reading) -> bool {
        let Some(value) = value else {
            return self.0.present == Some(false);
        };
        let Operators {
            equals,
            not_equals,
            one_of,
            prefix,
            suffix,
            contains,
            matches,
            ..
        } = &self.0;
        let Operators {
            less,
            at_most,
            greater,
            at_least,
            includes,
            present,
            ..
        } = &self.0;
        let compared =
            |with: &Value| read(value, with, reading).and_then(|value| value.compare(with));
        let ranges = |bound: &Option<Bound>, is_so: fn(Ordering) -> bool| {
            bound
                .as_ref()
                .is_none_or(|Bound(bound)| compared(bound).is_some_and(is_so))
        };
        // Converts to text only when an operator needs a text.
        let text =
            |is_so: &dyn Fn(&str) -> bool| text(value, reading).is_some_and(|text| is_so(&text));
        *present != Some(false)
            && equals
                .as_ref()
                .is_none_or(|wanted| compared(wanted) == Some(Ordering::Equal))
            && not_equals
                .as_ref()
                .is_none_or(|wanted| compared(wanted).is_some_and(Ordering::is_ne))
            && one_of.as_ref().is_none_or(|list| {
                list.iter()
                    .any(|wanted| compared(wanted) == Some(Ordering::Equal))
            })
            && prefix
                .as_ref()
                .is_none_or(|prefix| text(&|text| text.starts_with(prefix)))
            && suffix
                .as_ref()
                .is_none_or(|suffix| text(&|text| text.ends_with(suffix)))
            && contains
                .as_ref()
                .is_none_or(|part| text(&|text| text.contains(part)))
            && matches
                .as_ref()
                .is_none_or(|regex| text(&|text| regex.is_match(text)))
            && ranges(less, Ordering::is_lt)
            && ranges(at_most, Ordering::is_le)
            && ranges(greater, Ordering::is_gt)
            && ranges(at_least, Ordering::is_ge)
            && includes.as_ref().is_none_or(|list| has_one_of(value, list))
    }

    /// Describes the tests in words, as in `name is this`.
    pub(super) fn describe(&self, name: &str) -> String {
        let Operators {
            equals,
            not_equals,
            one_of,
            prefix,
            suffix,
            contains,
            matches,
            ..
        } = &self.0;
        let Operators {
            less,
            at_most,
            greater,
            at_least,
            includes,
            present,
            ..
        } = &self.0;
        let mut parts = Vec::new();
        parts.extend(equals.as_ref().map(|value| format!("is {value}")));
        parts.extend(not_equals.as_ref().map(|value| format!("is not {value}")));
        parts.extend(
            one_of
                .as_ref()
                .map(|values| format!("is {}", alternatives(values))),
        );
        parts.extend(
            prefix
                .as_ref()
                .map(|prefix| format!("begins with {prefix}")),
        );
        parts.extend(suffix.as_ref().map(|suffix| format!("ends with {suffix}")));
        parts.extend(contains.as_ref().map(|part| format!("contains {part}")));
        parts.extend(
            matches
                .as_ref()
                .map(|regex| format!("matches {}", regex.as_str())),
        );
        let bounds = [
            (at_least, "is at least"),
            (greater, "is above"),
            (at_most, "is at most"),
            (less, "is below"),
        ];
        parts.extend(bounds.into_iter().filter_map(|(bound, word)| {
            bound.as_ref().map(|Bound(bound)| format!("{word} {bound}"))
        }));
        parts.extend(
            includes
                .as_ref()
                .map(|values| format!("includes {}", alternatives(values))),
        );
        parts.extend(
            present.map(|present| (if present { "is present" } else { "is absent" }).to_owned()),
        );
        format!("{name} {}", parts.join(" and "))
    }

    /// The first text that is compared as it is and looks like a pattern, and the character that
    /// has no meaning there.
    pub(super) fn odd_text(&self) -> Option<(&str, char)> {
        let Operators {
            equals,
            not_equals,
            one_of,
            prefix,
            suffix,
            contains,
            includes,
            ..
        } = &self.0;
        let values = equals.iter().chain(not_equals);
        let lists = one_of.iter().chain(includes);
        let values = values.chain(lists.flat_map(|list| list.iter()));
        let values = values.filter_map(|value| match value {
            Value::Text(text) => Some(text),
            _ => None,
        });
        let texts = values.chain(prefix).chain(suffix).chain(contains);
        texts
            .map(String::as_str)
            .find_map(|text| Some((text, odd_in_text(text)?)))
    }

    fn is_empty(&self) -> bool {
        self.describe("").trim().is_empty()
    }
}

/// Converts a value to the type of `like`; `None` if that is not possible.
fn read<'a>(value: &'a Value, like: &Value, reading: Reading) -> Option<Cow<'a, Value>> {
    if reading == Reading::Own {
        return Some(Cow::Borrowed(value));
    }
    match (like, value) {
        (Value::Text(wanted), Value::Text(word))
            if reading == Reading::Priority
                && Priority::named(word)
                    .is_some_and(|own| Priority::named(wanted) == Some(own)) =>
        {
            Some(Cow::Owned(like.clone()))
        }
        (Value::Text(_), Value::Text(_)) => Some(Cow::Borrowed(value)),
        (Value::Text(_), _) => {
            text(value, reading).map(|text| Cow::Owned(Value::Text(text.into_owned())))
        }
        (Value::Integer(_) | Value::Decimal(_), Value::Text(text)) => {
            Value::of_numeral(text).map(Cow::Owned)
        }
        (Value::Flag(_), Value::Text(text)) => {
            text.parse().ok().map(|flag| Cow::Owned(Value::Flag(flag)))
        }
        _ => Some(Cow::Borrowed(value)),
    }
}

/// Converts a value to text. Decimals are excluded, because they have more than one textual form.
fn text(value: &Value, reading: Reading) -> Option<Cow<'_, str>> {
    match value {
        Value::Text(text) => Some(Cow::Borrowed(text)),
        Value::Integer(_) | Value::Flag(_) if reading == Reading::Operand => {
            Some(Cow::Owned(value.to_string()))
        }
        Value::Integer(_) | Value::Flag(_) | Value::Decimal(_) => None,
    }
}

/// Whether a value is a list that contains one of these values.
fn has_one_of(value: &Value, wanted: &[Value]) -> bool {
    let Value::Text(text) = value else {
        return false;
    };
    if !text.starts_with('[') {
        return false;
    }
    let Ok(list) = serde_json::from_str::<Vec<serde_json::Value>>(text) else {
        return false;
    };
    let is_wanted = |element: &Value| {
        wanted
            .iter()
            .any(|wanted| element.compare(wanted) == Some(Ordering::Equal))
    };
    list.iter()
        .filter_map(Value::of_json)
        .any(|element| is_wanted(&element))
}

impl<'de> Deserialize<'de> for Wanted {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct AnyForm;
        impl<'de> Visitor<'de> for AnyForm {
            type Value = Operators;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value, a list of values or a table of operators")
            }
            fn visit_bool<E: Error>(self, flag: bool) -> Result<Operators, E> {
                Ok(equals(flag.into()))
            }
            fn visit_i64<E: Error>(self, integer: i64) -> Result<Operators, E> {
                Ok(equals(integer.into()))
            }
            fn visit_u64<E: Error>(self, integer: u64) -> Result<Operators, E> {
                Ok(equals(
                    i64::try_from(integer).map_or(Value::Decimal(integer as f64), Value::Integer),
                ))
            }
            fn visit_f64<E: Error>(self, decimal: f64) -> Result<Operators, E> {
                Ok(equals(decimal.into()))
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Operators, E> {
                Ok(equals(text.into()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Operators, A::Error> {
                let one_of = OneOrMore::deserialize(SeqAccessDeserializer::new(seq))?;
                Ok(Operators {
                    one_of: Some(one_of),
                    ..Operators::default()
                })
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Operators, A::Error> {
                Operators::deserialize(MapAccessDeserializer::new(map))
            }
        }
        fn equals(value: Value) -> Operators {
            Operators {
                equals: Some(value),
                ..Operators::default()
            }
        }
        let wanted = Self(d.deserialize_any(AnyForm)?);
        if wanted.is_empty() {
            return Err(D::Error::custom(
                "has no operator; set equals, one_of, at_least, prefix, matches, present or another operator",
            ));
        }
        let without_present = Self(Operators {
            present: None,
            ..wanted.0.clone()
        });
        if wanted.0.present == Some(false) && !without_present.is_empty() {
            return Err(D::Error::custom(
                "can never hold, because an absent value passes no other test; remove present or the other operators",
            ));
        }
        Ok(wanted)
    }
}

impl JsonSchema for Wanted {
    fn schema_name() -> Cow<'static, str> {
        "Wanted".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let (value, values) = (
            generator.subschema_for::<Value>(),
            generator.subschema_for::<OneOrMore<Value>>(),
        );
        json_schema!({
            "description": "A value, a list of alternative values, or a table of operators that must all hold.",
            "anyOf": [value, values, generator.subschema_for::<Operators>()]
        })
    }
}

/// A bound of a range: a number or a text.
#[derive(Clone, Debug)]
struct Bound(Value);

impl<'de> Deserialize<'de> for Bound {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        match Value::deserialize(d)? {
            Value::Flag(flag) => Err(D::Error::custom(format!(
                "'{flag}' is not a valid bound; use a number or a text"
            ))),
            value => Ok(Self(value)),
        }
    }
}

impl JsonSchema for Bound {
    fn schema_name() -> Cow<'static, str> {
        "Bound".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": ["number", "string"]})
    }
}

/// A regular expression whose matching time is linear in the length of the text.
///
/// The engine is `regex-lite`, which is designed for small binaries and adds about 40 KiB to a
/// plugin. It never backtracks, so no payload can make a call miss its deadline. In return it has
/// no Unicode classes (`\w` is ASCII only, while `.` matches any character) and folds case for
/// ASCII only.
#[derive(Clone, Debug)]
pub struct Regex(regex_lite::Regex);

impl Regex {
    /// The longest text that is searched, in bytes; a longer text never matches. This bounds the
    /// duration of a call, because only the event size limit bounds a payload.
    pub const MAX_TEXT: usize = 16 * 1024;

    /// # Errors
    /// A message that names the problem and the fix.
    pub fn parse(expression: &str) -> Result<Self, String> {
        regex_lite::Regex::new(expression)
            .map(Self)
            .map_err(|e| format!("'{expression}' is not a valid regular expression ({e}); write \\ before a literal special character"))
    }

    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }

    /// Whether the text contains a match. `^` and `$` are the ends of the text.
    pub fn is_match(&self, text: &str) -> bool {
        text.len() <= Self::MAX_TEXT && self.0.is_match(text)
    }
}

impl<'de> Deserialize<'de> for Regex {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(d)?).map_err(D::Error::custom)
    }
}

impl JsonSchema for Regex {
    fn schema_name() -> Cow<'static, str> {
        "Regex".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "format": "regex"})
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value as Json, json};

    use super::*;

    fn holds(wanted: &Json, value: Option<&Value>, reading: Reading) -> bool {
        serde_json::from_value::<Wanted>(wanted.clone())
            .unwrap()
            .holds_for(value, reading)
    }

    /// Asserts the outcome for each value; `None` means that the value is absent.
    #[track_caller]
    fn check(
        wanted: Json,
        cases: impl IntoIterator<Item = (Option<Value>, bool)>,
        reading: Reading,
    ) {
        for (value, expect) in cases {
            assert_eq!(
                holds(&wanted, value.as_ref(), reading),
                expect,
                "{wanted} {value:?} {reading:?}"
            );
        }
    }

    fn some(value: impl Into<Value>) -> Option<Value> {
        Some(value.into())
    }

    #[test]
    fn every_operator_decides_both_ways_and_another_type_never_passes() {
        let typed = |wanted, cases: Vec<(Option<Value>, bool)>| check(wanted, cases, Reading::Own);
        typed(
            json!("a"),
            vec![
                (some("a"), true),
                (some("b"), false),
                (some(1), false),
                (None, false),
            ],
        );
        typed(
            json!(1),
            vec![
                (some(1), true),
                (some(1.0), true),
                (some("1"), false),
                (some(true), false),
            ],
        );
        typed(
            json!(true),
            vec![
                (some(true), true),
                (some(false), false),
                (some("true"), false),
            ],
        );
        typed(
            json!({"not_equals": "a"}),
            vec![
                (some("b"), true),
                (some("a"), false),
                (some(1), false),
                (None, false),
            ],
        );
        typed(
            json!(["a", 1]),
            vec![
                (some("a"), true),
                (some(1), true),
                (some("1"), false),
                (None, false),
            ],
        );
        typed(
            json!({"one_of": "a"}),
            vec![(some("a"), true), (some("b"), false)],
        );
        typed(
            json!({"prefix": "gr"}),
            vec![(some("grün"), true), (some("agr"), false), (some(1), false)],
        );
        typed(
            json!({"suffix": "ün"}),
            vec![(some("grün"), true), (some("n"), false), (None, false)],
        );
        typed(
            json!({"contains": "r"}),
            vec![
                (some("grün"), true),
                (some("blau"), false),
                (some(true), false),
            ],
        );
        typed(
            json!({"matches": "^g.ü"}),
            vec![
                (some("grün"), true),
                (some("agrü"), false),
                (some(1), false),
            ],
        );
        typed(
            json!({"less": 5}),
            vec![
                (some(4), true),
                (some(5), false),
                (some(4.9), true),
                (some("4"), false),
                (None, false),
            ],
        );
        typed(
            json!({"at_most": 5}),
            vec![(some(5), true), (some(5.1), false)],
        );
        typed(
            json!({"greater": "b"}),
            vec![(some("c"), true), (some("b"), false), (some(9), false)],
        );
        typed(
            json!({"at_least": "b", "less": "d"}),
            vec![(some("b"), true), (some("cz"), true), (some("d"), false)],
        );
        typed(
            json!({"includes": "a"}),
            vec![
                (some(r#"["b","a"]"#), true),
                (some(r#"["ab"]"#), false),
                (some("a"), false),
            ],
        );
        typed(
            json!({"includes": [1, true]}),
            vec![
                (some("[1.0]"), true),
                (some("[[1],null,true]"), true),
                (some("[\"1\"]"), false),
            ],
        );
        typed(
            json!({"includes": 1}),
            vec![
                (some("[1"), false),
                (some("{\"1\":1}"), false),
                (some(1), false),
                (None, false),
            ],
        );
        typed(
            json!({"present": true}),
            vec![(some(""), true), (None, false)],
        );
        typed(
            json!({"present": false}),
            vec![(some(""), false), (None, true)],
        );
    }

    #[test]
    fn an_attribute_is_converted_to_the_type_of_the_operand() {
        let asked =
            |wanted, cases: Vec<(Option<Value>, bool)>| check(wanted, cases, Reading::Operand);
        asked(
            json!(5),
            vec![
                (some("5"), true),
                (some("5.0"), true),
                (some("05"), false),
                (some("five"), false),
                (some(true), false),
            ],
        );
        asked(
            json!("5"),
            vec![(some(5), true), (some("5.0"), false), (some(5.0), false)],
        );
        asked(
            json!(true),
            vec![
                (some("true"), true),
                (some("True"), false),
                (some(1), false),
            ],
        );
        asked(json!("true"), vec![(some(true), true)]);
        asked(
            json!({"not_equals": 5}),
            vec![(some("6"), true), (some("x"), false), (some(6), true)],
        );
        asked(
            json!({"at_least": 100}),
            vec![
                (some("1e2"), true),
                (some("99"), false),
                (some(100), true),
                (some("many"), false),
            ],
        );
        asked(
            json!({"prefix": "42"}),
            vec![(some(4217), true), (some("4"), false), (some(42.5), false)],
        );
        asked(
            json!({"matches": "^[0-9]+$"}),
            vec![(some(7), true), (some("7"), true), (some(true), false)],
        );
        asked(
            json!({"less": "b"}),
            vec![(some(5), true), (some("c"), false)],
        );
    }

    #[test]
    fn a_regular_expression_takes_bounded_time() {
        // A backtracking engine takes exponential time here.
        let regex = Regex::parse("^(a+)+$").unwrap();
        assert!(!regex.is_match(&format!("{}b", "a".repeat(200))));
        let any = Regex::parse("a").unwrap();
        assert!(any.is_match(&"a".repeat(Regex::MAX_TEXT)));
        assert!(!any.is_match(&"a".repeat(Regex::MAX_TEXT + 1)));
    }
}
