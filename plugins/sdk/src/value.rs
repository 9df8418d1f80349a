//! Values, priorities and times to live as an operator writes them in a configuration, and the
//! comparison of values.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer};

use crate::{Priority, Value};

impl Value {
    /// Compares two values of the same kind: numbers by their exact numeric value, whether integer
    /// or decimal; texts by code point; `false` before `true`. Returns `None` for values of
    /// different kinds.
    pub fn compare(&self, other: &Self) -> Option<Ordering> {
        match (self, other) {
            (Self::Text(a), Self::Text(b)) => Some(a.cmp(b)),
            (Self::Flag(a), Self::Flag(b)) => Some(a.cmp(b)),
            (Self::Integer(a), Self::Integer(b)) => Some(a.cmp(b)),
            (Self::Decimal(a), Self::Decimal(b)) => a.partial_cmp(b),
            (Self::Integer(a), Self::Decimal(b)) => integer_to_decimal(*a, *b),
            (Self::Decimal(a), Self::Integer(b)) => {
                integer_to_decimal(*b, *a).map(Ordering::reverse)
            }
            _ => None,
        }
    }

    /// Converts a JSON scalar; `None` for a list, an object or `null`.
    pub(crate) fn of_json(json: &serde_json::Value) -> Option<Self> {
        match json {
            serde_json::Value::Bool(flag) => Some(Self::Flag(*flag)),
            // The host passes such an integer as a text, because the nearest decimal is a different
            // number.
            serde_json::Value::Number(number) if number.is_u64() && !number.is_i64() => {
                Some(Self::Text(number.to_string()))
            }
            serde_json::Value::Number(number) => Self::of_number(number),
            serde_json::Value::String(text) => Some(Self::Text(text.clone())),
            serde_json::Value::Null
            | serde_json::Value::Array(_)
            | serde_json::Value::Object(_) => None,
        }
    }

    fn of_number(number: &serde_json::Number) -> Option<Self> {
        number
            .as_i64()
            .map(Self::Integer)
            .or_else(|| number.as_f64().map(Self::Decimal))
    }

    /// Parses a text written as JSON writes numbers; `None` for any other text.
    pub fn of_numeral(text: &str) -> Option<Self> {
        // `serde_json` accepts surrounding white space; a numeral must not have any.
        let is_bare = text.starts_with(|c: char| c == '-' || c.is_ascii_digit())
            && text.ends_with(|c: char| c.is_ascii_digit());
        let number = if is_bare {
            serde_json::from_str(text).ok()?
        } else {
            None
        };
        number.as_ref().and_then(Self::of_number)
    }
}

/// Compares exactly. Converting the integer to `f64` would make distinct large integers equal.
fn integer_to_decimal(integer: i64, decimal: f64) -> Option<Ordering> {
    const BEYOND: f64 = 9_223_372_036_854_775_808.0;
    if decimal.is_nan() {
        return None;
    }
    if decimal >= BEYOND {
        return Some(Ordering::Less);
    }
    if decimal < -BEYOND {
        return Some(Ordering::Greater);
    }
    // Within these bounds the integral part is exactly an i64.
    Some(
        integer
            .cmp(&(decimal.trunc() as i64))
            .then_with(|| 0.0_f64.total_cmp(&(decimal.fract() + 0.0))),
    )
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => f.write_str(text),
            Self::Integer(i) => i.fmt(f),
            Self::Decimal(d) => d.fmt(f),
            Self::Flag(b) => b.fmt(f),
        }
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<i64> for Value {
    fn from(i: i64) -> Self {
        Self::Integer(i)
    }
}

impl From<f64> for Value {
    fn from(d: f64) -> Self {
        Self::Decimal(d)
    }
}

impl From<bool> for Value {
    fn from(b: bool) -> Self {
        Self::Flag(b)
    }
}

/// A text, a number, `true` or `false` in a configuration.
impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Scalar;
        impl Visitor<'_> for Scalar {
            type Value = Value;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text, a number, true or false")
            }
            fn visit_bool<E: Error>(self, flag: bool) -> Result<Value, E> {
                Ok(Value::Flag(flag))
            }
            fn visit_i64<E: Error>(self, integer: i64) -> Result<Value, E> {
                Ok(Value::Integer(integer))
            }
            fn visit_u64<E: Error>(self, integer: u64) -> Result<Value, E> {
                Ok(i64::try_from(integer).map_or(Value::Decimal(integer as f64), Value::Integer))
            }
            fn visit_f64<E: Error>(self, decimal: f64) -> Result<Value, E> {
                Ok(Value::Decimal(decimal))
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Value, E> {
                Ok(text.into())
            }
        }
        d.deserialize_any(Scalar)
    }
}

impl JsonSchema for Value {
    fn schema_name() -> Cow<'static, str> {
        "Value".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": ["string", "number", "boolean"]})
    }
}

impl Priority {
    const WORDS: [(&'static str, Self); 4] = [
        ("low", Self::Low),
        ("normal", Self::Normal),
        ("high", Self::High),
        ("urgent", Self::Urgent),
    ];

    /// Returns the priority of this name: `low`, `normal` (or `medium`), `high` or `urgent`, in any
    /// case.
    pub fn named(word: &str) -> Option<Self> {
        let word = if word.eq_ignore_ascii_case("medium") {
            "normal"
        } else {
            word
        };
        Self::WORDS
            .into_iter()
            .find_map(|(name, priority)| name.eq_ignore_ascii_case(word).then_some(priority))
    }

    pub fn name(self) -> &'static str {
        Self::WORDS[self as usize].0
    }
}

impl<'de> Deserialize<'de> for Priority {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let word = String::deserialize(d)?;
        Self::named(&word).ok_or_else(|| {
            D::Error::custom(format!(
                "'{word}' is not a valid priority; use low, normal, high or urgent"
            ))
        })
    }
}

impl JsonSchema for Priority {
    fn schema_name() -> Cow<'static, str> {
        "Priority".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "low, normal (or medium), high or urgent, in any case.",
            "type": "string",
            "pattern": "^([Ll][Oo][Ww]|[Nn][Oo][Rr][Mm][Aa][Ll]|[Mm][Ee][Dd][Ii][Uu][Mm]|[Hh][Ii][Gg][Hh]|[Uu][Rr][Gg][Ee][Nn][Tt])$"
        })
    }
}

/// A time to live: a number of seconds above 0, or a number with a unit, such as `500ms`, `30s`,
/// `5m` or `2h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ttl {
    /// Milliseconds, at least 1.
    pub ms: u64,
}

impl Ttl {
    /// The fix for an invalid time to live, for error messages.
    pub const FIX: &'static str =
        "use a number of seconds above 0 or a number with a unit: 500ms, 30s, 5m, 2h";

    /// Converts a value to a time to live; `None` if it is not valid: see [`Ttl::FIX`].
    pub fn of(value: &Value) -> Option<Self> {
        let ms = match value {
            Value::Integer(seconds) => u64::try_from(*seconds).ok()?.checked_mul(1_000)?,
            Value::Text(text) => {
                let n_digits = text.bytes().take_while(u8::is_ascii_digit).count();
                let (number, unit) = text.split_at(n_digits);
                let unit_ms = match unit {
                    "ms" => 1,
                    "" | "s" => 1_000,
                    "m" => 60_000,
                    "h" => 3_600_000,
                    _ => return None,
                };
                number.parse::<u64>().ok()?.checked_mul(unit_ms)?
            }
            Value::Decimal(_) | Value::Flag(_) => return None,
        };
        (ms > 0).then_some(Self { ms })
    }
}

impl<'de> Deserialize<'de> for Ttl {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(d)?;
        Self::of(&value).ok_or_else(|| {
            D::Error::custom(format!(
                "'{value}' is not a valid time to live; {}",
                Self::FIX
            ))
        })
    }
}

impl JsonSchema for Ttl {
    fn schema_name() -> Cow<'static, str> {
        "Ttl".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"description": "Seconds, or a number with the unit ms, s, m or h.", "anyOf": [
            {"type": "integer", "minimum": 1}, {"type": "string", "pattern": "^[0-9]+(ms|s|m|h)?$"}
        ]})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_compare_by_exact_value_and_different_kinds_do_not_compare() {
        use Ordering::{Equal, Greater, Less};
        let large = 9_007_199_254_740_993; // 2^53 + 1, which an f64 cannot represent.
        for (a, b, expect) in [
            (Value::from(1), Value::from(1.0), Some(Equal)),
            (1.into(), 1.5.into(), Some(Less)),
            ((-1).into(), (-1.5).into(), Some(Greater)),
            (0.into(), (-0.0).into(), Some(Equal)),
            ((-0.0).into(), 0.0.into(), Some(Equal)),
            (large.into(), 9_007_199_254_740_992.0.into(), Some(Greater)),
            (large.into(), (large + 1).into(), Some(Less)),
            (
                i64::MAX.into(),
                9_223_372_036_854_775_808.0.into(),
                Some(Less),
            ),
            (
                i64::MIN.into(),
                (-9_223_372_036_854_775_808.0).into(),
                Some(Equal),
            ),
            (i64::MIN.into(), (-1e300).into(), Some(Greater)),
            (1.into(), f64::NAN.into(), None),
            ("b".into(), "a".into(), Some(Greater)),
            // By UTF-16 code unit, as some languages compare, the order would be reversed.
            ("\u{ffee}".into(), "😀".into(), Some(Less)),
            (true.into(), true.into(), Some(Equal)),
            ("1".into(), 1.into(), None),
            (true.into(), 1.into(), None),
        ] {
            assert_eq!(a.compare(&b), expect, "{a:?} {b:?}");
            assert_eq!(b.compare(&a), expect.map(Ordering::reverse), "{b:?} {a:?}");
        }
    }

    #[test]
    fn a_numeral_is_written_as_json_writes_numbers() {
        for (text, expect) in [
            ("5", Some(Value::from(5))),
            ("-5", Some((-5).into())),
            ("1.50", Some(1.5.into())),
            ("1e3", Some(1000.0.into())),
            (
                "9223372036854775808",
                Some(9_223_372_036_854_775_808.0.into()),
            ),
        ] {
            assert_eq!(Value::of_numeral(text), expect, "{text}");
        }
        for text in [
            "", "-", " 5", "5 ", "+5", "05", ".5", "5.", "1e999", "inf", "NaN", "0x1", "1_000",
            "5,5", "5\n5", "٥",
        ] {
            assert_eq!(Value::of_numeral(text), None, "{text}");
        }
    }

    #[test]
    fn a_priority_has_the_same_name_in_both_directions() {
        for (word, priority) in Priority::WORDS {
            assert_eq!(
                (Priority::named(word), priority.name()),
                (Some(priority), word)
            );
        }
        for (word, priority) in [
            ("HIGH", Some(Priority::High)),
            ("Normal", Some(Priority::Normal)),
            ("medium", Some(Priority::Normal)),
            ("Medium", Some(Priority::Normal)),
            ("highest", None),
            ("", None),
        ] {
            assert_eq!(Priority::named(word), priority, "{word}");
        }
    }
}
