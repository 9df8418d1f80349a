//! Conditions over a recipient's attributes: a disjunction of conjunctions, validated when parsed
//! and evaluated natively for each recipient without allocating. Plugins return conditions; they
//! are never called for a recipient.
//!
//! A test of an absent attribute or of one with another type is false, including `not-equals`:
//! unknown values decide nothing. `absent` and `not-contains` hold for an absent attribute: what
//! does not exist contains nothing.

use std::cmp::Ordering;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::{Deserialize, Serialize};

use crate::event::{Malformed, Value};

pub use super::attributes::{AttributeValue, Attributes, Pool, parse_attributes};

use super::attributes::Key;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operator {
    /// The attribute equals the one value.
    Equals,
    /// The attribute is present, has the value's type and differs from the value.
    NotEquals,
    /// The attribute equals one of the values.
    OneOf,
    /// The attribute is a list with an element that equals the one value, or a string that contains
    /// the one string.
    Contains,
    /// The attribute is a string that starts with the one string.
    Prefix,
    /// The attribute is a number less than the one number.
    Less,
    /// The attribute is a number greater than the one number.
    Greater,
    /// The attribute is present. Takes no value.
    Present,
    /// The attribute is absent. Takes no value.
    Absent,
    /// The attribute is present, has the type of one of the values and equals none of them.
    NotOneOf,
    /// The attribute is absent, a list without an element that equals the one value, or a string
    /// that does not contain the one string.
    NotContains,
    /// The attribute is a number not less than the one number.
    AtLeast,
    /// The attribute is a number not greater than the one number.
    AtMost,
    /// The attribute is a string that ends with the one string.
    Suffix,
}

/// One test of one attribute.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Test {
    pub attribute: String,
    pub operator: Operator,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<Value>,
}

/// Holds if every test of at least one clause holds. Without clauses it never holds; an empty
/// clause always holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Vec<Test>>", into = "Vec<Vec<Test>>")]
pub struct Criteria(Box<[Box<[CompiledTest]>]>);

/// A test whose values are valid for its operator.
#[derive(Clone, Debug, PartialEq)]
struct CompiledTest {
    key: Key,
    check: Check,
}

#[derive(Clone, Debug, PartialEq)]
enum Check {
    Equals(Value),
    NotEquals(Value),
    OneOf(Box<[Value]>),
    NotOneOf(Box<[Value]>),
    Contains(Value),
    NotContains(Value),
    Prefix(Box<str>),
    Suffix(Box<str>),
    Less(Value),
    AtMost(Value),
    Greater(Value),
    AtLeast(Value),
    Present,
    Absent,
}

impl Criteria {
    /// The most tests in all clauses together.
    pub const MAX_TESTS: usize = 256;

    /// Validates that every test has the values that its operator takes.
    ///
    /// # Errors
    /// [`Malformed`] names the attribute and the values that its test takes.
    pub fn new(any_of: Vec<Vec<Test>>) -> Result<Self, Malformed> {
        let n_tests: usize = any_of.iter().map(Vec::len).sum();
        if n_tests > Self::MAX_TESTS {
            return Err(Malformed::new(format!(
                "have {n_tests} tests; the limit is {}",
                Self::MAX_TESTS
            ))
            .of("the criteria"));
        }
        let clause = |clause: Vec<Test>| clause.into_iter().map(Test::compile).collect();
        any_of
            .into_iter()
            .map(clause)
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Whether the criteria hold for a recipient with these attributes.
    pub fn hold(&self, attributes: &Attributes) -> bool {
        self.0
            .iter()
            .any(|clause| clause.iter().all(|test| test.holds(attributes)))
    }

    /// Returns the first failing test of each clause that does not hold.
    pub fn unmet(&self, attributes: &Attributes) -> Vec<Test> {
        let first = |clause: &[CompiledTest]| {
            clause
                .iter()
                .find(|test| !test.holds(attributes))
                .cloned()
                .map(Test::from)
        };
        self.0.iter().filter_map(|clause| first(clause)).collect()
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
        criteria
            .0
            .into_iter()
            .map(|clause| clause.into_iter().map(Test::from).collect())
            .collect()
    }
}

impl Test {
    fn compile(self) -> Result<CompiledTest, Malformed> {
        let Self {
            attribute,
            operator,
            values,
        } = self;
        let check = Check::new(operator, values).map_err(|wanted| {
            Malformed::new(format!("'{}' takes {wanted}", attribute.escape_debug()))
                .of("the test of")
        })?;
        Ok(CompiledTest {
            key: Key::new(&attribute),
            check,
        })
    }
}

impl CompiledTest {
    fn holds(&self, attributes: &Attributes) -> bool {
        match attributes.find(&self.key) {
            None => matches!(self.check, Check::Absent | Check::NotContains(_)),
            Some(AttributeValue::One(value)) => self.check.holds(value),
            Some(AttributeValue::List(values)) => self.check.holds_for_list(values),
        }
    }
}

impl From<CompiledTest> for Test {
    fn from(CompiledTest { key, check }: CompiledTest) -> Self {
        let text = |text: Box<str>| vec![Value::Text(text.into())];
        let (operator, values) = match check {
            Check::Equals(value) => (Operator::Equals, vec![value]),
            Check::NotEquals(value) => (Operator::NotEquals, vec![value]),
            Check::OneOf(values) => (Operator::OneOf, values.into()),
            Check::NotOneOf(values) => (Operator::NotOneOf, values.into()),
            Check::Contains(value) => (Operator::Contains, vec![value]),
            Check::NotContains(value) => (Operator::NotContains, vec![value]),
            Check::Prefix(begin) => (Operator::Prefix, text(begin)),
            Check::Suffix(end) => (Operator::Suffix, text(end)),
            Check::Less(value) => (Operator::Less, vec![value]),
            Check::AtMost(value) => (Operator::AtMost, vec![value]),
            Check::Greater(value) => (Operator::Greater, vec![value]),
            Check::AtLeast(value) => (Operator::AtLeast, vec![value]),
            Check::Present => (Operator::Present, Vec::new()),
            Check::Absent => (Operator::Absent, Vec::new()),
        };
        Self {
            attribute: key.into_name(),
            operator,
            values,
        }
    }
}

impl Check {
    /// The error names the values that the operator takes.
    fn new(operator: Operator, values: Vec<Value>) -> Result<Self, &'static str> {
        use Operator::{
            Absent, AtLeast, AtMost, Contains, Equals, Greater, Less, NotContains, NotEquals,
            NotOneOf, OneOf, Prefix, Present, Suffix,
        };
        match operator {
            Present if values.is_empty() => return Ok(Self::Present),
            Absent if values.is_empty() => return Ok(Self::Absent),
            Present | Absent => return Err("no value"),
            OneOf | NotOneOf if values.is_empty() => return Err("at least one value"),
            OneOf => return Ok(Self::OneOf(values.into())),
            NotOneOf => return Ok(Self::NotOneOf(values.into())),
            Equals | NotEquals | Contains | NotContains | Prefix | Suffix | Less | AtMost
            | Greater | AtLeast => {}
        }
        let wanted = match operator {
            Prefix | Suffix => "one string",
            Less | AtMost | Greater | AtLeast => "one number",
            _ => "one value",
        };
        let [value] = <[Value; 1]>::try_from(values).map_err(|_| wanted)?;
        let is_number =
            matches!(value, Value::Integer(_)) || matches!(value, Value::Decimal(d) if !d.is_nan());
        Ok(match (operator, value) {
            (Equals, value) => Self::Equals(value),
            (NotEquals, value) => Self::NotEquals(value),
            (Contains, value) => Self::Contains(value),
            (NotContains, value) => Self::NotContains(value),
            (Prefix, Value::Text(text)) => Self::Prefix(text.into()),
            (Suffix, Value::Text(text)) => Self::Suffix(text.into()),
            (Less, value) if is_number => Self::Less(value),
            (AtMost, value) if is_number => Self::AtMost(value),
            (Greater, value) if is_number => Self::Greater(value),
            (AtLeast, value) if is_number => Self::AtLeast(value),
            _ => return Err(wanted),
        })
    }

    fn holds(&self, have: &Value) -> bool {
        let is =
            |value: &Value, holds: fn(Ordering) -> bool| compare(have, value).is_some_and(holds);
        match (self, have) {
            (Self::Present, _) => true,
            (Self::Equals(value), _) => equal(have, value) == Some(true),
            (Self::NotEquals(value), _) => equal(have, value) == Some(false),
            (Self::OneOf(values), _) => values.iter().any(|value| equal(have, value) == Some(true)),
            (Self::NotOneOf(values), _) => {
                let mut is_comparable = false;
                let is_none = values.iter().all(|value| {
                    let equal = equal(have, value);
                    is_comparable |= equal.is_some();
                    equal != Some(true)
                });
                is_none && is_comparable
            }
            (Self::Contains(Value::Text(text)), Value::Text(have)) => have.contains(&**text),
            (Self::NotContains(Value::Text(text)), Value::Text(have)) => !have.contains(&**text),
            (Self::Prefix(text), Value::Text(have)) => have.starts_with(&**text),
            (Self::Suffix(text), Value::Text(have)) => have.ends_with(&**text),
            (Self::Less(value), _) => is(value, Ordering::is_lt),
            (Self::AtMost(value), _) => is(value, Ordering::is_le),
            (Self::Greater(value), _) => is(value, Ordering::is_gt),
            (Self::AtLeast(value), _) => is(value, Ordering::is_ge),
            _ => false,
        }
    }

    fn holds_for_list(&self, have: &[Value]) -> bool {
        let has = |value| have.iter().any(|one| equal(one, value) == Some(true));
        match self {
            Self::Present => true,
            Self::Contains(value) => has(value),
            Self::NotContains(value) => !has(value),
            _ => false,
        }
    }
}

/// Cached results of a condition for the last few sets of attributes, shared by streams with equal
/// attributes.
#[derive(Debug, Default)]
pub struct Answers([AtomicU64; Self::SLOTS]);

impl Answers {
    const SLOTS: usize = 4;

    /// Returns the cached result for these attributes, or calls `decide` and caches its result.
    pub fn of(&self, attributes: &Attributes, decide: impl FnOnce() -> bool) -> bool {
        // The number and the result share one word, so no lock is needed. Sets are numbered from 1,
        // so an empty slot matches none.
        let slot = &self.0[attributes.number() as usize % Self::SLOTS];
        let known = slot.load(Relaxed);
        if known >> 1 == attributes.number() {
            return known & 1 == 1;
        }
        let answer = decide();
        slot.store(attributes.number() << 1 | u64::from(answer), Relaxed);
        answer
    }
}

/// Returns `None` for values of different types, which cannot be compared.
fn equal(a: &Value, b: &Value) -> Option<bool> {
    match (a, b) {
        (Value::Text(a), Value::Text(b)) => Some(a == b),
        (Value::Flag(a), Value::Flag(b)) => Some(a == b),
        _ => compare(a, b).map(Ordering::is_eq),
    }
}

/// Compares exactly: converting an integer to a decimal loses digits beyond 2^53.
fn compare_with_decimal(integer: i64, decimal: f64) -> Option<Ordering> {
    // 2^63, the smallest power that no i64 reaches.
    const BEYOND: f64 = 9_223_372_036_854_775_808.0;
    match decimal {
        _ if decimal.is_nan() => None,
        _ if decimal >= BEYOND => Some(Ordering::Less),
        _ if decimal < -BEYOND => Some(Ordering::Greater),
        _ => integer
            .cmp(&(decimal.trunc() as i64))
            .then(0.0.partial_cmp(&decimal.fract())?)
            .into(),
    }
}

/// Compares two numbers; integers exactly, including those that a decimal cannot represent.
fn compare(a: &Value, b: &Value) -> Option<Ordering> {
    match (a, b) {
        (Value::Integer(a), Value::Integer(b)) => Some(a.cmp(b)),
        (Value::Integer(a), Value::Decimal(b)) => compare_with_decimal(*a, *b),
        (Value::Decimal(a), Value::Integer(b)) => {
            compare_with_decimal(*b, *a).map(Ordering::reverse)
        }
        (Value::Decimal(a), Value::Decimal(b)) => a.partial_cmp(b),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn text(s: &str) -> Value {
        Value::Text(s.into())
    }

    fn list(values: &[Value]) -> AttributeValue {
        AttributeValue::List(values.into())
    }

    #[test]
    fn every_operator_holds_and_fails_and_unknown_attributes_are_false() {
        let have = Attributes::from([
            ("plan".into(), text("pro")),
            ("age".into(), Value::Integer(30)),
            ("score".into(), Value::Decimal(0.5)),
            ("beta".into(), Value::Flag(true)),
        ]);
        let check = |attribute: &str, operator: Operator, values: &[Value], expect: bool| {
            let test = Test {
                attribute: attribute.into(),
                operator,
                values: values.to_vec(),
            };
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
        check("gone", Absent, &[], true);
        check("beta", Absent, &[], false);
        check("plan", NotOneOf, &[text("free"), Value::Integer(1)], true);
        check("plan", NotOneOf, &[text("free"), text("pro")], false);
        check("plan", NotOneOf, &[Value::Integer(1)], false);
        check("gone", NotOneOf, &[text("free")], false);
        check("plan", NotContains, &[text("x")], true);
        check("plan", NotContains, &[text("r")], false);
        check("plan", NotContains, &[Value::Integer(1)], false);
        check("gone", NotContains, &[text("x")], true);
        check("plan", Suffix, &[text("ro")], true);
        check("plan", Suffix, &[text("pr")], false);
        check("age", AtLeast, &[Value::Integer(30)], true);
        check("age", AtLeast, &[Value::Decimal(30.5)], false);
        check("age", AtMost, &[Value::Integer(30)], true);
        check("score", AtMost, &[Value::Integer(0)], false);
        check("plan", AtMost, &[Value::Integer(0)], false);
    }

    #[test]
    fn a_list_is_tested_by_its_elements_only() {
        let have = Attributes::from(BTreeMap::from([
            ("muted".to_owned(), list(&[text("billing"), text("chat")])),
            (
                "teams".to_owned(),
                list(&[Value::Integer(5), Value::Flag(true)]),
            ),
            ("none".to_owned(), list(&[])),
        ]));
        let holds = |attribute: &str, operator: Operator, values: &[Value]| {
            let test = Test {
                attribute: attribute.into(),
                operator,
                values: values.to_vec(),
            };
            Criteria::new(vec![vec![test]]).unwrap().hold(&have)
        };
        use Operator::*;
        assert!(holds("muted", Contains, &[text("chat")]));
        // Not a part of an element's text.
        assert!(!holds("muted", Contains, &[text("cha")]));
        assert!(!holds("muted", NotContains, &[text("chat")]));
        assert!(holds("muted", NotContains, &[text("orders")]));
        assert!(holds("teams", Contains, &[Value::Decimal(5.0)]));
        assert!(!holds("teams", Contains, &[text("5")]));
        assert!(holds("none", NotContains, &[text("chat")]));
        assert!(holds("none", Present, &[]) && !holds("none", Absent, &[]));
        for operator in [Equals, NotEquals, OneOf, NotOneOf, Prefix, Suffix] {
            assert!(!holds("muted", operator, &[text("chat")]), "{operator:?}");
        }
        for operator in [Less, AtMost, Greater, AtLeast] {
            assert!(
                !holds("teams", operator, &[Value::Integer(5)]),
                "{operator:?}"
            );
        }
    }

    #[test]
    fn criteria_hold_if_every_test_of_any_clause_holds() {
        let pro = Test {
            attribute: "plan".into(),
            operator: Operator::Equals,
            values: vec![text("pro")],
        };
        let adult = Test {
            attribute: "age".into(),
            operator: Operator::Greater,
            values: vec![Value::Integer(17)],
        };
        let have = Attributes::from([("plan".into(), text("pro"))]);
        let hold = |any_of| Criteria::new(any_of).unwrap().hold(&have);
        assert!(hold(vec![vec![adult.clone()], vec![pro.clone()]]));
        assert!(!hold(vec![vec![adult, pro]]));
        assert!(hold(vec![vec![]]));
        assert!(!hold(vec![]));
    }

    #[test]
    fn unmet_returns_the_first_failing_test_of_each_clause() {
        let test = |attribute: &str, value: &str| Test {
            attribute: attribute.into(),
            operator: Operator::Equals,
            values: vec![text(value)],
        };
        let have = Attributes::from([("plan".into(), text("pro")), ("region".into(), text("eu"))]);
        let unmet = |any_of: Vec<Vec<Test>>| Criteria::new(any_of).unwrap().unmet(&have);
        let (met, first, second) = (test("plan", "pro"), test("region", "us"), test("team", "a"));
        assert_eq!(
            unmet(vec![
                vec![met.clone(), first.clone(), second.clone()],
                vec![second.clone()]
            ]),
            [first, second]
        );
        assert_eq!(unmet(vec![vec![met], vec![]]), []);
    }

    #[test]
    fn whole_numbers_are_compared_exactly() {
        let have = Attributes::from([("n".into(), Value::Integer(i64::MAX))]);
        let holds = |operator, value| {
            Criteria::new(vec![vec![Test {
                attribute: "n".into(),
                operator,
                values: vec![value],
            }]])
            .unwrap()
            .hold(&have)
        };
        assert!(holds(Operator::Greater, Value::Integer(i64::MAX - 1)));
        assert!(!holds(Operator::Equals, Value::Integer(i64::MAX - 1)));
        assert!(!holds(Operator::Less, Value::Integer(i64::MAX)));
        assert!(
            !holds(Operator::Equals, Value::Decimal(i64::MAX as f64)),
            "the decimal is one greater"
        );
        assert!(holds(Operator::Less, Value::Decimal(i64::MAX as f64)));
        assert!(
            holds(Operator::Greater, Value::Decimal(-0.5))
                && holds(Operator::Greater, Value::Decimal(-1e300))
        );
    }

    #[test]
    fn evaluating_criteria_allocates_nothing() {
        let every = |values: &[(Operator, &[Value])]| {
            let test = |(operator, values): &(Operator, &[Value])| Test {
                attribute: "plan".into(),
                operator: *operator,
                values: values.to_vec(),
            };
            values
                .iter()
                .map(|operator| vec![test(operator)])
                .collect::<Vec<_>>()
        };
        use Operator::*;
        let (pro, one) = ([text("pr")], [Value::Integer(1)]);
        let criteria = Criteria::new(every(&[
            (Equals, &pro),
            (OneOf, &pro),
            (Less, &one),
            (Greater, &one),
            (NotEquals, &one),
            (Contains, &[text("x")]),
            (NotContains, &[text("pro")]),
            (NotOneOf, &[text("pro")]),
            (Suffix, &[text("x")]),
        ]))
        .unwrap();
        let have = Attributes::from([
            ("age".into(), Value::Integer(30)),
            ("plan".into(), text("pro")),
        ]);
        let counted = allocation_counter::measure(|| assert!(!criteria.hold(&have)));
        assert_eq!(counted.count_total, 0);
    }

    #[test]
    fn equal_attributes_share_a_result_and_different_ones_never_do() {
        let (pool, answers) = (Pool::default(), Answers::default());
        let of = |plan: &str| pool.share(Attributes::from([("plan".into(), text(plan))]));
        let n_decided = std::cell::Cell::new(0);
        let ask = |attributes: &Attributes| {
            answers.of(attributes, || {
                n_decided.set(n_decided.get() + 1);
                attributes.get("plan") == Some(&text("pro").into())
            })
        };
        let (pro, another, free) = (of("pro"), of("pro"), of("free"));
        assert_eq!((ask(&pro), ask(&another), n_decided.get()), (true, true, 1));
        assert_eq!((ask(&free), ask(&pro), n_decided.get()), (false, true, 2));
        for n in 0..100 {
            let other = of(&format!("plan {n}"));
            assert!(
                !ask(&other),
                "a set of attributes received the result of an earlier one"
            );
        }
        assert!(ask(&pro));
    }

    #[test]
    fn a_test_with_the_wrong_values_is_rejected_and_named() {
        for (operator, values) in [
            (Operator::Equals, vec![]),
            (Operator::Less, vec![text("x")]),
            (Operator::Less, vec![Value::Decimal(f64::NAN)]),
            (Operator::Prefix, vec![Value::Integer(1)]),
            (Operator::OneOf, vec![]),
            (Operator::Present, vec![text("x")]),
            (Operator::Absent, vec![text("x")]),
            (Operator::NotOneOf, vec![]),
            (Operator::NotContains, vec![text("a"), text("b")]),
            (Operator::AtLeast, vec![text("1")]),
            (Operator::Suffix, vec![Value::Integer(1)]),
        ] {
            let test = Test {
                attribute: "age".into(),
                operator,
                values,
            };
            assert!(
                Criteria::new(vec![vec![test]])
                    .unwrap_err()
                    .to_string()
                    .contains("'age' takes")
            );
        }
    }
}
