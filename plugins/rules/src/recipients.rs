//! Conditions on recipients, which restrict the targets of a rule by their attributes. The plugin
//! only builds them; the host evaluates them for each recipient (`wit/types.wit`). Texts are
//! templates: `{ region = "{/order/region}" }` selects the recipients in the region of the order.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use pointsman_plugin::{Event, OneOrMore, Operator, Selector, Test, Value};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Error, IntoDeserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::template::{Template, found};

/// Tests that must all hold, by the name of the attribute of the recipient.
#[derive(Clone, Debug, JsonSchema)]
#[schemars(with = "BTreeMap<String, Wanted>")]
pub(crate) struct Clause(BTreeMap<String, Wanted>);

impl Clause {
    /// The maximum number of tests that the host accepts in all clauses of a route.
    pub(crate) const MAX_TESTS: usize = 256;

    pub(crate) fn n_tests(&self) -> usize {
        self.0.values().map(|wanted| wanted.0.len()).sum()
    }

    pub(crate) fn selectors(&self) -> impl Iterator<Item = &Selector> {
        self.0
            .values()
            .flat_map(|wanted| &wanted.0)
            .flat_map(|(_, terms)| terms)
            .filter_map(Term::template)
            .flat_map(Template::selectors)
    }

    /// Returns the tests with their values filled in.
    ///
    /// # Errors
    /// The reason why one of the tests cannot hold for any recipient.
    pub(crate) fn tests(&self, event: &Event) -> Result<Vec<Test>, String> {
        let mut tests = Vec::with_capacity(self.n_tests());
        for (attribute, Wanted(wanted)) in &self.0 {
            for (operator, terms) in wanted {
                let values = terms
                    .iter()
                    .map(|term| term.value(event, *operator))
                    .collect::<Result<Vec<_>, _>>()?;
                tests.push(Test::new(attribute, *operator, values));
            }
        }
        Ok(tests)
    }
}

/// The tests that an attribute of a recipient must pass: a value, a list of alternative values, or
/// a table of operators.
#[derive(Clone, Debug)]
struct Wanted(Vec<(Operator, Vec<Term>)>);

/// The tests as written in a configuration. The host defines these operators.
#[derive(Default, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
#[schemars(rename = "RecipientOperators")]
struct Operators {
    equals: Option<Term>,
    /// Present, of the same type, and different.
    not_equals: Option<Term>,
    one_of: Option<OneOrMore<Term>>,
    /// Present, of the type of one of the values, and different from all.
    not_one_of: Option<OneOrMore<Term>>,
    /// A list that contains the value, or a text that contains the text.
    contains: Option<Term>,
    /// Absent, or not as in `contains`.
    not_contains: Option<Term>,
    prefix: Option<Of<Texts>>,
    suffix: Option<Of<Texts>>,
    less: Option<Of<Numbers>>,
    at_most: Option<Of<Numbers>>,
    greater: Option<Of<Numbers>>,
    at_least: Option<Of<Numbers>>,
    /// Whether the attribute must be present (`true`) or absent (`false`).
    present: Option<bool>,
    /// `true`: the attribute must be absent, as with `present = false`.
    absent: Option<bool>,
}

/// A value, or a template.
#[derive(Clone, Debug)]
enum Term {
    Value(Value),
    Template(Template),
}

impl Term {
    fn template(&self) -> Option<&Template> {
        match self {
            Self::Value(_) => None,
            Self::Template(template) => Some(template),
        }
    }

    /// Returns a value that this operator accepts.
    ///
    /// # Errors
    /// The reason why there is no such value.
    fn value(&self, event: &Event, operator: Operator) -> Result<Value, String> {
        let (value, selector) = match self {
            Self::Value(value) => return Ok(value.clone()),
            Self::Template(template) => match template.single() {
                // A template that consists of a single value keeps its type.
                Some(selector) => (found(selector, event)?.into_owned(), Some(selector)),
                None => (Value::Text(template.fill(event)?), None),
            },
        };
        match operator {
            Operator::Prefix | Operator::Suffix => Ok(Value::Text(value.to_string())),
            Operator::Less | Operator::AtMost | Operator::Greater | Operator::AtLeast => {
                number(value, selector)
            }
            // The elements of a list have types, so that the value keeps its own.
            _ => Ok(value),
        }
    }
}

/// # Errors
/// The reason why the value is not a number.
fn number(value: Value, selector: Option<&Selector>) -> Result<Value, String> {
    match (value, selector) {
        (value @ (Value::Integer(_) | Value::Decimal(_)), _) => Ok(value),
        // Attributes may arrive as text only.
        (Value::Text(text), Some(Selector::Attribute(name))) => {
            Value::of_numeral(&text).ok_or_else(|| format!("{} is not a number", name.as_str()))
        }
        (_, selector) => Err(format!(
            "{} is not a number",
            selector.map_or("the text", Selector::as_str)
        )),
    }
}

impl<'de> Deserialize<'de> for Clause {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let tests = BTreeMap::deserialize(d)?;
        if tests.is_empty() {
            return Err(D::Error::custom(
                "is empty; add a test of a recipient attribute or remove when",
            ));
        }
        Ok(Self(tests))
    }
}

impl<'de> Deserialize<'de> for Wanted {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct AnyForm;
        impl<'de> Visitor<'de> for AnyForm {
            type Value = Wanted;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value, a list of values or a table of operators")
            }
            fn visit_bool<E: Error>(self, flag: bool) -> Result<Wanted, E> {
                equals(flag)
            }
            fn visit_i64<E: Error>(self, integer: i64) -> Result<Wanted, E> {
                equals(integer)
            }
            fn visit_u64<E: Error>(self, integer: u64) -> Result<Wanted, E> {
                equals(integer)
            }
            fn visit_f64<E: Error>(self, decimal: f64) -> Result<Wanted, E> {
                equals(decimal)
            }
            fn visit_str<E: Error>(self, text: &str) -> Result<Wanted, E> {
                equals(text)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Wanted, A::Error> {
                let one_of: OneOrMore<Term> =
                    OneOrMore::deserialize(SeqAccessDeserializer::new(seq))?;
                Ok(Wanted(vec![(Operator::OneOf, one_of.to_vec())]))
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Wanted, A::Error> {
                Ok(Operators::deserialize(MapAccessDeserializer::new(map))?.into())
            }
        }
        fn equals<'de, E: Error>(value: impl IntoDeserializer<'de, E>) -> Result<Wanted, E> {
            Ok(Wanted(vec![(
                Operator::Equals,
                vec![Term::deserialize(value.into_deserializer())?],
            )]))
        }
        let wanted = d.deserialize_any(AnyForm)?;
        if wanted.0.is_empty() {
            return Err(D::Error::custom(
                "has no operator; set equals, one_of, contains, not_contains, at_least, at_most, present or another operator",
            ));
        }
        let has = |operator: Operator| wanted.0.iter().any(|(own, _)| *own == operator);
        let needs_none =
            |operator: Operator| matches!(operator, Operator::Absent | Operator::NotContains);
        if has(Operator::Absent) && !wanted.0.iter().all(|(own, _)| needs_none(*own)) {
            return Err(D::Error::custom(
                "can never hold, because an absent attribute passes no other test; remove absent or the other operators",
            ));
        }
        Ok(wanted)
    }
}

impl From<Operators> for Wanted {
    fn from(operators: Operators) -> Self {
        let Operators {
            equals,
            not_equals,
            one_of,
            not_one_of,
            contains,
            not_contains,
            prefix,
            suffix,
            less,
            at_most,
            greater,
            at_least,
            present,
            absent,
        } = operators;
        let one = |operator, term: Option<Term>| term.map(|term| (operator, vec![term]));
        let list = |operator, terms: Option<OneOrMore<Term>>| {
            terms.map(|terms| (operator, terms.to_vec()))
        };
        let presence = |is_present: bool| {
            let operator = if is_present {
                Operator::Present
            } else {
                Operator::Absent
            };
            (operator, Vec::new())
        };
        let tests = [
            one(Operator::Equals, equals),
            one(Operator::NotEquals, not_equals),
            list(Operator::OneOf, one_of),
            list(Operator::NotOneOf, not_one_of),
            one(Operator::Contains, contains),
            one(Operator::NotContains, not_contains),
            one(Operator::Prefix, prefix.map(Of::term)),
            one(Operator::Suffix, suffix.map(Of::term)),
            one(Operator::Less, less.map(Of::term)),
            one(Operator::AtMost, at_most.map(Of::term)),
            one(Operator::Greater, greater.map(Of::term)),
            one(Operator::AtLeast, at_least.map(Of::term)),
            present.map(presence),
            absent.map(|is_absent| presence(!is_absent)),
        ];
        Self(tests.into_iter().flatten().collect())
    }
}

impl JsonSchema for Wanted {
    fn schema_name() -> Cow<'static, str> {
        "WantedOfRecipient".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let (value, values) = (
            generator.subschema_for::<Term>(),
            generator.subschema_for::<OneOrMore<Term>>(),
        );
        json_schema!({
            "description": "A value, a list of alternative values, or a table of operators that must all hold.",
            "anyOf": [value, values, generator.subschema_for::<Operators>()]
        })
    }
}

impl<'de> Deserialize<'de> for Term {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(d)?;
        let Value::Text(text) = &value else {
            return Ok(Self::Value(value));
        };
        let template = Template::parse(text).map_err(D::Error::custom)?;
        Ok(match template.literal() {
            Some(text) => Self::Value(text.into()),
            None => Self::Template(template),
        })
    }
}

impl JsonSchema for Term {
    fn schema_name() -> Cow<'static, str> {
        "Term".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        Value::json_schema(generator)
    }
}

/// A term whose value must be of one kind.
struct Of<K>(Term, std::marker::PhantomData<K>);

impl<K> Of<K> {
    fn term(self) -> Term {
        self.0
    }
}

trait Kind {
    const NAME: &'static str;
    const TYPE: &'static [&'static str];
    fn has(value: &Value) -> bool;
}

struct Texts;
struct Numbers;

impl Kind for Texts {
    const NAME: &'static str = "a text";
    const TYPE: &'static [&'static str] = &["string"];
    fn has(value: &Value) -> bool {
        matches!(value, Value::Text(_))
    }
}

impl Kind for Numbers {
    const NAME: &'static str = "a number";
    // A string is valid only as a template.
    const TYPE: &'static [&'static str] = &["number", "string"];
    fn has(value: &Value) -> bool {
        matches!(value, Value::Integer(_) | Value::Decimal(_))
    }
}

impl<'de, K: Kind> Deserialize<'de> for Of<K> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        match Term::deserialize(d)? {
            Term::Value(value) if !K::has(&value) => Err(D::Error::custom(format!(
                "'{value}' is not valid here; use {}",
                K::NAME
            ))),
            term => Ok(Self(term, std::marker::PhantomData)),
        }
    }
}

impl<K: Kind> JsonSchema for Of<K> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        K::NAME.into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": K::TYPE})
    }
}
