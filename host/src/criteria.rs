//! Conditions over a recipient's attributes: an *or* of *ands*, validated at the border, evaluated natively for each recipient without
//! allocating. Plugins answer them; they are never called for a recipient.
//!
//! An absent attribute and a value of another type make a test false, `not-equals` included: what is not known is not decided.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::event::{Malformed, Value};

mod attributes;

pub use attributes::parse_attributes;

/// A recipient's attributes, by name.
pub type Attributes = BTreeMap<String, Value>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operator {
    /// The attribute is the one value.
    Equals,
    /// The attribute is there, of the value's type, and another value.
    NotEquals,
    /// The attribute is one of the values.
    OneOf,
    /// The attribute is a text that contains the one text.
    Contains,
    /// The attribute is a text that begins with the one text.
    Prefix,
    /// The attribute is a number below the one number.
    Less,
    /// The attribute is a number above the one number.
    Greater,
    /// The attribute is there; takes no value.
    Present,
}

/// One test of one attribute.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Test {
    pub attribute: String,
    pub operator: Operator,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<Value>,
}

/// Holds if every test of at least one clause holds. Without a clause it never holds; a clause without a test always does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Vec<Test>>", into = "Vec<Vec<Test>>")]
pub struct Criteria(Vec<Vec<Test>>);

impl Criteria {
    /// The most tests in all clauses together.
    pub const MAX_TESTS: usize = 256;

    /// Checks that every test has the values that its operator takes.
    ///
    /// # Errors
    /// [`Malformed`] names the attribute and what its test should have.
    pub fn new(any_of: Vec<Vec<Test>>) -> Result<Self, Malformed> {
        let n_tests: usize = any_of.iter().map(Vec::len).sum();
        if n_tests > Self::MAX_TESTS {
            return Err(Malformed::new(format!("have {n_tests} tests; {} is the most", Self::MAX_TESTS)).of("the criteria"));
        }
        for test in any_of.iter().flatten() {
            let numeric = |value: &Value| matches!(value, Value::Integer(_)) || matches!(value, Value::Decimal(d) if !d.is_nan());
            let wanted = match (test.operator, test.values.as_slice()) {
                (Operator::Present, []) | (Operator::Equals | Operator::NotEquals, [_]) | (Operator::OneOf, [_, ..]) => continue,
                (Operator::Contains | Operator::Prefix, [Value::Text(_)]) => continue,
                (Operator::Less | Operator::Greater, [value]) if numeric(value) => continue,
                (Operator::Present, _) => "no value",
                (Operator::Equals | Operator::NotEquals, _) => "one value",
                (Operator::OneOf, _) => "at least one value",
                (Operator::Contains | Operator::Prefix, _) => "one text",
                (Operator::Less | Operator::Greater, _) => "one number",
            };
            return Err(Malformed::new(format!("'{}' takes {wanted}", test.attribute.escape_debug())).of("the test of"));
        }
        Ok(Self(any_of))
    }

    /// Whether they hold for a recipient with these attributes.
    pub fn hold(&self, attributes: &Attributes) -> bool {
        self.0.iter().any(|clause| clause.iter().all(|test| test.holds(attributes)))
    }
}

impl TryFrom<Vec<Vec<Test>>> for Criteria {
    type Error = Malformed;
    fn try_from(any_of: Vec<Vec<Test>>) -> Result<Self, Malformed> {
        Self::new(any_of)
    }
}

impl From<Criteria> for Vec<Vec<Test>> {
    fn from(criteria: Criteria) -> Self {
        criteria.0
    }
}

impl Test {
    fn holds(&self, attributes: &Attributes) -> bool {
        let Some(have) = attributes.get(&self.attribute) else { return false };
        let number = |value: &Value| match value {
            Value::Integer(i) => Some(*i as f64),
            Value::Decimal(d) => Some(*d),
            _ => None,
        };
        let equal = |value: &Value| match (have, value) {
            (Value::Text(a), Value::Text(b)) => Some(a == b),
            (Value::Flag(a), Value::Flag(b)) => Some(a == b),
            (Value::Integer(a), Value::Integer(b)) => Some(a == b),
            _ => Some(number(have)? == number(value)?),
        };
        match (self.operator, have, self.values.first()) {
            (Operator::Present, _, _) => true,
            (Operator::OneOf, _, _) => self.values.iter().any(|value| equal(value) == Some(true)),
            (Operator::Equals, _, Some(value)) => equal(value) == Some(true),
            (Operator::NotEquals, _, Some(value)) => equal(value) == Some(false),
            (Operator::Contains, Value::Text(a), Some(Value::Text(b))) => a.contains(b.as_str()),
            (Operator::Prefix, Value::Text(a), Some(Value::Text(b))) => a.starts_with(b.as_str()),
            (Operator::Less, _, Some(value)) => number(have).zip(number(value)).is_some_and(|(a, b)| a < b),
            (Operator::Greater, _, Some(value)) => number(have).zip(number(value)).is_some_and(|(a, b)| a > b),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(s: &str) -> Value {
        Value::Text(s.into())
    }

    #[test]
    fn every_operator_decides_both_ways_and_the_unknown_is_false() {
        let have = Attributes::from([
            ("plan".into(), text("pro")),
            ("age".into(), Value::Integer(30)),
            ("score".into(), Value::Decimal(0.5)),
            ("beta".into(), Value::Flag(true)),
        ]);
        let check = |attribute: &str, operator: Operator, values: &[Value], expect: bool| {
            let test = Test { attribute: attribute.into(), operator, values: values.to_vec() };
            let criteria = Criteria::new(vec![vec![test.clone()]]).unwrap();
            assert_eq!(criteria.hold(&have), expect, "{test:?}");
        };
        use Operator::*;
        check("plan", Equals, &[text("pro")], true);
        check("plan", Equals, &[text("free")], false);
        check("plan", Equals, &[Value::Integer(1)], false);
        check("plan", NotEquals, &[text("free")], true);
        check("plan", NotEquals, &[text("pro")], false);
        check("plan", NotEquals, &[Value::Flag(true)], false);
        check("nothing", NotEquals, &[text("free")], false);
        check("plan", OneOf, &[text("free"), text("pro")], true);
        check("plan", OneOf, &[text("free")], false);
        check("plan", Contains, &[text("r")], true);
        check("plan", Contains, &[text("x")], false);
        check("plan", Prefix, &[text("pr")], true);
        check("plan", Prefix, &[text("ro")], false);
        check("age", Less, &[Value::Decimal(30.5)], true);
        check("age", Less, &[Value::Integer(30)], false);
        check("score", Greater, &[Value::Integer(0)], true);
        check("plan", Greater, &[Value::Integer(0)], false);
        check("age", Equals, &[Value::Decimal(30.0)], true);
        check("beta", Present, &[], true);
        check("gone", Present, &[], false);
    }

    #[test]
    fn an_or_of_ands() {
        let pro = Test { attribute: "plan".into(), operator: Operator::Equals, values: vec![text("pro")] };
        let adult = Test { attribute: "age".into(), operator: Operator::Greater, values: vec![Value::Integer(17)] };
        let have = Attributes::from([("plan".into(), text("pro"))]);
        let hold = |any_of| Criteria::new(any_of).unwrap().hold(&have);
        assert!(hold(vec![vec![adult.clone()], vec![pro.clone()]]));
        assert!(!hold(vec![vec![adult, pro]]));
        assert!(hold(vec![vec![]]));
        assert!(!hold(vec![]));
    }

    #[test]
    fn a_test_with_the_wrong_values_is_refused_by_name() {
        for (operator, values) in [
            (Operator::Equals, vec![]),
            (Operator::Less, vec![text("x")]),
            (Operator::Less, vec![Value::Decimal(f64::NAN)]),
            (Operator::Prefix, vec![Value::Integer(1)]),
            (Operator::OneOf, vec![]),
            (Operator::Present, vec![text("x")]),
        ] {
            let test = Test { attribute: "age".into(), operator, values };
            assert!(Criteria::new(vec![vec![test]]).unwrap_err().to_string().contains("'age' takes"));
        }
    }
}
