//! Conditions over a recipient's attributes: a disjunction of conjunctions, validated when parsed
//! and evaluated natively for each recipient without allocating. Plugins return conditions; they
//! are never called for a recipient.
//!
//! A test of an absent attribute or of one with another type is false, including `not-equals`:
//! unknown values decide nothing.

use std::cmp::Ordering;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::{Deserialize, Serialize};

use crate::event::{Malformed, Value};

pub use super::attributes::{Attributes, Pool, parse_attributes};

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
    /// The attribute is a string that contains the one string.
    Contains,
    /// The attribute is a string that starts with the one string.
    Prefix,
    /// The attribute is a number less than the one number.
    Less,
    /// The attribute is a number greater than the one number.
    Greater,
    /// The attribute is present. Takes no value.
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
    Contains(Box<str>),
    Prefix(Box<str>),
    Less(Value),
    Greater(Value),
    Present,
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
        attributes
            .find(&self.key)
            .is_some_and(|value| self.check.holds(value))
    }
}

impl From<CompiledTest> for Test {
    fn from(CompiledTest { key, check }: CompiledTest) -> Self {
        use Operator::{Contains, Equals, Greater, Less, NotEquals, OneOf, Prefix, Present};
        let (operator, values) = match check {
            Check::Equals(value) => (Equals, vec![value]),
            Check::NotEquals(value) => (NotEquals, vec![value]),
            Check::OneOf(values) => (OneOf, values.into()),
            Check::Contains(text) => (Contains, vec![Value::Text(text.into())]),
            Check::Prefix(text) => (Prefix, vec![Value::Text(text.into())]),
            Check::Less(value) => (Less, vec![value]),
            Check::Greater(value) => (Greater, vec![value]),
            Check::Present => (Present, Vec::new()),
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
        let [value] = match (operator, <[Value; 1]>::try_from(values)) {
            (Operator::Present, Err(values)) if values.is_empty() => return Ok(Self::Present),
            (Operator::Present, _) => return Err("no value"),
            (Operator::OneOf, Ok(values)) => return Ok(Self::OneOf(values.into())),
            (Operator::OneOf, Err(values)) if !values.is_empty() => {
                return Ok(Self::OneOf(values.into()));
            }
            (Operator::OneOf, Err(_)) => return Err("at least one value"),
            (Operator::Equals | Operator::NotEquals, Err(_)) => return Err("one value"),
            (Operator::Contains | Operator::Prefix, Err(_)) => return Err("one string"),
            (Operator::Less | Operator::Greater, Err(_)) => return Err("one number"),
            (_, Ok(one)) => one,
        };
        let is_number =
            matches!(value, Value::Integer(_)) || matches!(value, Value::Decimal(d) if !d.is_nan());
        Ok(match (operator, value) {
            (Operator::Equals, value) => Self::Equals(value),
            (Operator::NotEquals, value) => Self::NotEquals(value),
            (Operator::Contains, Value::Text(text)) => Self::Contains(text.into()),
            (Operator::Prefix, Value::Text(text)) => Self::Prefix(text.into()),
            (Operator::Contains | Operator::Prefix, _) => return Err("one string"),
            (Operator::Less, value) if is_number => Self::Less(value),
            (Operator::Greater, value) if is_number => Self::Greater(value),
            _ => return Err("one number"),
        })
    }

    fn holds(&self, have: &Value) -> bool {
        match (self, have) {
            (Self::Present, _) => true,
            (Self::Equals(value), _) => equal(have, value) == Some(true),
            (Self::NotEquals(value), _) => equal(have, value) == Some(false),
            (Self::OneOf(values), _) => values.iter().any(|value| equal(have, value) == Some(true)),
            (Self::Contains(text), Value::Text(have)) => have.contains(&**text),
            (Self::Prefix(text), Value::Text(have)) => have.starts_with(&**text),
            (Self::Less(value), _) => compare(have, value) == Some(Ordering::Less),
            (Self::Greater(value), _) => compare(have, value) == Some(Ordering::Greater),
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
    use super::*;

    fn text(s: &str) -> Value {
        Value::Text(s.into())
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
                attributes.get("plan") == Some(&text("pro"))
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
