//! Measures a condition on one recipient against the same condition as a closure. A fan-out
//! multiplies this cost by the number of recipients.
//!
//! `max` and `mean` are in nanoseconds per recipient; the allocation columns must be empty. The
//! closures look up the same attributes, as any code for attributes known only at run time has to.

use divan::{AllocProfiler, Bencher, black_box};
use pointsman::event::Value;
use pointsman::event::criteria::{AttributeValue, Attributes, Criteria, Operator, Test};

#[global_allocator]
static ALLOCATIONS: AllocProfiler = AllocProfiler::system();

fn main() {
    divan::main();
}

fn text(value: &str) -> Value {
    Value::Text(value.into())
}

fn test(attribute: &str, operator: Operator, values: &[Value]) -> Test {
    Test {
        attribute: attribute.into(),
        operator,
        values: values.to_vec(),
    }
}

/// Typical recipients; the conditions hold for some of them.
fn recipients() -> Vec<Attributes> {
    let recipient = |n: usize| {
        Attributes::from([
            ("age".into(), Value::Integer(15 + n as i64)),
            ("beta".into(), Value::Flag(n.is_multiple_of(2))),
            ("locale".into(), text(["de-DE", "en-GB", "pt-BR"][n % 3])),
            ("plan".into(), text(["free", "pro", "team"][n / 2 % 3])),
            ("region".into(), text(["eu-central", "us-east"][n / 3 % 2])),
            ("score".into(), Value::Decimal(n as f64 / 16.0)),
        ])
    };
    (0..16).map(recipient).collect()
}

/// One test of one string.
mod simple {
    use super::*;

    fn criteria() -> Criteria {
        Criteria::new(vec![vec![test("plan", Operator::Equals, &[text("pro")])]])
            .expect("well-formed")
    }

    #[divan::bench]
    fn criteria_of_a_route(bencher: Bencher<'_, '_>) {
        let criteria = criteria();
        each(bencher, |recipient| criteria.hold(recipient));
    }

    #[divan::bench]
    fn native_closure(bencher: Bencher<'_, '_>) {
        each(
            bencher,
            |recipient| matches!(recipient.get("plan"), Some(AttributeValue::One(Value::Text(plan))) if plan == "pro"),
        );
    }
}

/// Seven tests in two clauses; the first clause mostly fails late.
mod complex {
    use super::*;

    fn criteria() -> Criteria {
        let paying = vec![
            test(
                "plan",
                Operator::OneOf,
                &[text("pro"), text("team"), text("enterprise")],
            ),
            test("region", Operator::Prefix, &[text("eu-")]),
            test("age", Operator::Greater, &[Value::Integer(17)]),
            test("beta", Operator::Equals, &[Value::Flag(true)]),
        ];
        let german = vec![
            test("locale", Operator::Contains, &[text("de")]),
            test("score", Operator::Less, &[Value::Decimal(0.5)]),
            test("age", Operator::Present, &[]),
        ];
        Criteria::new(vec![paying, german]).expect("well-formed")
    }

    #[divan::bench]
    fn criteria_of_a_route(bencher: Bencher<'_, '_>) {
        let criteria = criteria();
        each(bencher, |recipient| criteria.hold(recipient));
    }

    #[divan::bench]
    fn native_closure(bencher: Bencher<'_, '_>) {
        let text = |recipient: &Attributes, name: &str, holds: fn(&str) -> bool| matches!(recipient.get(name), Some(AttributeValue::One(Value::Text(text))) if holds(text));
        each(bencher, |recipient| {
            (text(recipient, "plan", |plan| {
                matches!(plan, "pro" | "team" | "enterprise")
            }) && text(recipient, "region", |region| region.starts_with("eu-"))
                && matches!(recipient.get("age"), Some(AttributeValue::One(Value::Integer(age))) if *age > 17)
                && matches!(
                    recipient.get("beta"),
                    Some(AttributeValue::One(Value::Flag(true)))
                ))
                || (text(recipient, "locale", |locale| locale.contains("de"))
                    && matches!(recipient.get("score"), Some(AttributeValue::One(Value::Decimal(score))) if *score < 0.5)
                    && recipient.get("age").is_some())
        });
    }
}

/// Cycles through the recipients, so that branches are not predicted perfectly.
fn each(bencher: Bencher<'_, '_>, mut holds: impl FnMut(&Attributes) -> bool) {
    let recipients = recipients();
    let mut next = 0;
    bencher.bench_local(|| {
        next = (next + 1) % recipients.len();
        holds(black_box(&recipients[next]))
    });
}
