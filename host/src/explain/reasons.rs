//! Describes why a route does or does not match a user, as a predicate whose subject is the route.
//! `recipients` decides whether it matches.

use crate::delivery::recipients::{MatchFailure, Moment};
use crate::event::criteria::{AttributeValue, Attributes, Operator, Test};
use crate::event::{Name, Recipient, Route, Span, Target, Value, rfc3339};

/// Maximum number of clauses of a condition described.
const MAX_CLAUSES: usize = 3;
/// Maximum number of groups named.
const MAX_GROUPS: usize = 3;
/// Maximum number of elements of a list shown.
const MAX_ELEMENTS: usize = 5;
/// Maximum length of a value shown, in characters; longer values are cut.
const MAX_VALUE: usize = 64;

/// Why a route does not match a user.
#[derive(Debug)]
pub(super) struct MismatchReason {
    pub(super) text: String,
    /// The notification ids behind the reason.
    detail: Option<String>,
    pub(super) nearness: Nearness,
    pub(super) assumptions: &'static [Assumption],
}

/// An assumption about the time of the event, which was not recorded, behind a mismatch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Assumption {
    Attributes,
    Claims,
    FirstMembership,
}

impl Assumption {
    pub(super) const fn words(self) -> &'static str {
        match self {
            Self::Attributes => "the attributes have not changed since",
            Self::Claims => "no token claimed the group",
            Self::FirstMembership => "this membership was the first",
        }
    }
}

/// How close a route came to matching. Of several routes, the closest explains the most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Nearness {
    ForOthers,
    NoMember,
    /// The user is or was a member, but not at the time of the event.
    Member,
    Condition,
    Expired,
}

impl MismatchReason {
    pub(super) fn whole(&self) -> String {
        let Self { text, detail, .. } = self;
        detail
            .as_ref()
            .map_or_else(|| text.clone(), |detail| format!("{text} ({detail})"))
    }
}

/// Why a route matches the user.
pub(super) fn match_reason(target: &Target, user: &Name) -> String {
    match target {
        Target::User(_) => format!("names `{user}`"),
        Target::Group(group) => {
            format!("names group `{group}`, of which `{user}` was a member at that time")
        }
        Target::Everyone => "names everyone".to_owned(),
    }
}

/// Why a route does not match the user.
pub(super) fn mismatch_reason(
    route: &Route,
    failure: MatchFailure,
    user: &Name,
    recipient: &Recipient,
    moment: Moment,
) -> MismatchReason {
    let (text, nearness, assumptions): (_, _, &[_]) = match failure {
        MatchFailure::Target => return not_named(route, user, recipient, moment),
        MatchFailure::Condition => (
            condition(route, user, &recipient.attributes),
            Nearness::Condition,
            &[Assumption::Attributes],
        ),
        MatchFailure::Expired => (
            format!(
                "expired at {}",
                rfc3339(route.expires_ms.unwrap_or_default())
            ),
            Nearness::Expired,
            &[],
        ),
    };
    MismatchReason {
        text,
        detail: None,
        nearness,
        assumptions,
    }
}

/// Why none of the targets of a route names the user.
fn not_named(route: &Route, user: &Name, recipient: &Recipient, moment: Moment) -> MismatchReason {
    let (mut groups, mut users) = (Vec::new(), Vec::new());
    for target in &route.to {
        match target {
            Target::Group(group) => groups.push(group),
            Target::User(name) => users.push(name),
            Target::Everyone => {}
        }
    }
    if let Some(reason) = outside_membership(&groups, user, recipient, moment) {
        return reason;
    }
    let (text, nearness, assumptions): (_, _, &[_]) = if groups.is_empty() {
        (other_users(&users), Nearness::ForOthers, &[])
    } else {
        let text = no_member(&groups, user);
        (text, Nearness::NoMember, &[Assumption::Claims])
    };
    MismatchReason {
        text,
        detail: None,
        nearness,
        assumptions,
    }
}

/// The user is or was a member of one of the groups, but not at the time of the event.
fn outside_membership(
    groups: &[&Name],
    user: &Name,
    recipient: &Recipient,
    moment: Moment,
) -> Option<MismatchReason> {
    let spans = || {
        groups.iter().filter_map(|&group| {
            Some((group, recipient.groups.get(group)?.get(&moment.partition)?))
        })
    };
    let (group, Span { joined, left }) = spans().next()?;
    let id = moment.id;
    let (when, detail) = match left {
        Some(left) if *left < id => (
            "left before",
            format!("the event was committed as {id}, the membership ended at {left}"),
        ),
        _ => (
            "joined after",
            format!("the event was committed as {id}, the membership begins after {joined}"),
        ),
    };
    // Only the latest membership is stored: one that began after the event may have followed
    // another.
    let may_be_second = spans().any(|(_, span)| span.joined >= id);
    let assumptions: &[_] = if may_be_second {
        &[Assumption::Claims, Assumption::FirstMembership]
    } else {
        &[Assumption::Claims]
    };
    Some(MismatchReason {
        text: format!("names group `{group}`, which `{user}` {when} the event"),
        detail: Some(detail),
        nearness: Nearness::Member,
        assumptions,
    })
}

fn other_users(users: &[&Name]) -> String {
    match users {
        [other] => format!("names another user, `{other}`"),
        others => format!("names {} other users", others.len()),
    }
}

fn no_member(groups: &[&Name], user: &Name) -> String {
    if let [group] = groups {
        return format!("names group `{group}`, of which `{user}` is not a member");
    }
    let names: Vec<String> = groups
        .iter()
        .take(MAX_GROUPS)
        .map(|group| format!("`{group}`"))
        .collect();
    let more = if groups.len() > MAX_GROUPS {
        format!(" and {} more", groups.len() - MAX_GROUPS)
    } else {
        String::new()
    };
    format!(
        "names groups {}{more}, but `{user}` is not a member of any",
        names.join(", ")
    )
}

fn condition(route: &Route, user: &Name, attributes: &Attributes) -> String {
    let unmet = route
        .when
        .as_ref()
        .map(|criteria| criteria.unmet(attributes))
        .unwrap_or_default();
    if unmet.is_empty() {
        return "has a condition that is never true".to_owned();
    }
    let clauses: Vec<String> = unmet
        .iter()
        .take(MAX_CLAUSES)
        .map(|test| shortfall(test, attributes))
        .collect();
    let more = if unmet.len() > MAX_CLAUSES {
        format!(", and {} more alternatives fail", unmet.len() - MAX_CLAUSES)
    } else {
        String::new()
    };
    format!(
        "has a condition that is false for `{user}`: {}{more}",
        clauses.join(", and ")
    )
}

/// Why one test fails.
fn shortfall(test: &Test, attributes: &Attributes) -> String {
    let Test {
        attribute,
        operator,
        values,
    } = test;
    let expected: Vec<String> = values.iter().map(display).collect();
    let expected = expected.join(" or ");
    let must = match operator {
        Operator::Equals | Operator::OneOf => format!("must be {expected}"),
        Operator::NotEquals | Operator::NotOneOf => format!("must not be {expected}"),
        Operator::Contains => format!("must contain {expected}"),
        Operator::NotContains => format!("must not contain {expected}"),
        Operator::Prefix => format!("must begin with {expected}"),
        Operator::Suffix => format!("must end with {expected}"),
        Operator::Less => format!("must be below {expected}"),
        Operator::AtMost => format!("must be at most {expected}"),
        Operator::Greater => format!("must be above {expected}"),
        Operator::AtLeast => format!("must be at least {expected}"),
        Operator::Present => "must be present".to_owned(),
        Operator::Absent => "must be absent".to_owned(),
    };
    let of_values = || values.first().map_or("value", kind);
    match attributes.get(attribute) {
        None => format!("attribute `{attribute}` is absent but {must}"),
        Some(actual) if *operator == Operator::Absent => {
            format!("attribute `{attribute}` is {} but {must}", shown(actual))
        }
        Some(AttributeValue::List(actual))
            if !matches!(operator, Operator::Contains | Operator::NotContains) =>
        {
            format!(
                "attribute `{attribute}` is {} (list) but {must} ({})",
                list(actual),
                of_values()
            )
        }
        Some(AttributeValue::One(actual))
            if values.iter().all(|value| kind(value) != kind(actual)) =>
        {
            format!(
                "attribute `{attribute}` is {} ({}) but {must} ({})",
                display(actual),
                kind(actual),
                of_values()
            )
        }
        Some(actual) => format!("attribute `{attribute}` is {} but {must}", shown(actual)),
    }
}

fn shown(value: &AttributeValue) -> String {
    match value {
        AttributeValue::One(value) => display(value),
        AttributeValue::List(values) => list(values),
    }
}

fn list(values: &[Value]) -> String {
    let elements: Vec<String> = values.iter().take(MAX_ELEMENTS).map(display).collect();
    let more = if values.len() > MAX_ELEMENTS {
        format!(", and {} more", values.len() - MAX_ELEMENTS)
    } else {
        String::new()
    };
    format!("[{}{more}]", elements.join(", "))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Flag(_) => "boolean",
        Value::Integer(_) | Value::Decimal(_) => "number",
        Value::Text(_) => "text",
    }
}

fn display(value: &Value) -> String {
    match value {
        Value::Text(text) => {
            let begin: String = text.chars().take(MAX_VALUE).collect();
            let more = if begin.len() < text.len() { "..." } else { "" };
            format!("\"{}{more}\"", begin.escape_debug())
        }
        Value::Flag(flag) => flag.to_string(),
        Value::Integer(integer) => integer.to_string(),
        Value::Decimal(decimal) => decimal.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Priority;
    use crate::event::criteria::Criteria;

    fn test(attribute: &str, operator: Operator, values: &[Value]) -> Test {
        Test {
            attribute: attribute.into(),
            operator,
            values: values.to_vec(),
        }
    }

    fn text(value: &str) -> Value {
        Value::Text(value.into())
    }

    #[test]
    fn a_failed_test_is_described_by_operator_and_values() {
        let have = Attributes::from([
            ("plan".into(), text("free")),
            ("age".into(), Value::Integer(17)),
            ("beta".into(), Value::Flag(false)),
            ("bio".into(), text(&format!("a\nb{}", "x".repeat(100)))),
        ]);
        let mut have = std::collections::BTreeMap::from(have);
        let muted = ["billing", "chat"].map(text).into();
        have.insert("muted".into(), AttributeValue::List(muted));
        let have = Attributes::from(have);
        let check = |attribute: &str, operator: Operator, values: &[Value], expect: &str| {
            assert_eq!(
                shortfall(&test(attribute, operator, values), &have),
                format!("attribute `{attribute}` {expect}")
            );
        };
        use Operator::*;
        check(
            "plan",
            Equals,
            &[text("pro")],
            "is \"free\" but must be \"pro\"",
        );
        check(
            "plan",
            NotEquals,
            &[text("free")],
            "is \"free\" but must not be \"free\"",
        );
        check(
            "plan",
            OneOf,
            &[text("pro"), text("team")],
            "is \"free\" but must be \"pro\" or \"team\"",
        );
        check(
            "plan",
            Contains,
            &[text("x")],
            "is \"free\" but must contain \"x\"",
        );
        check(
            "plan",
            Prefix,
            &[text("x")],
            "is \"free\" but must begin with \"x\"",
        );
        check(
            "age",
            Less,
            &[Value::Integer(10)],
            "is 17 but must be below 10",
        );
        check(
            "age",
            Greater,
            &[Value::Decimal(17.5)],
            "is 17 but must be above 17.5",
        );
        check(
            "beta",
            Equals,
            &[Value::Flag(true)],
            "is false but must be true",
        );
        check("city", Present, &[], "is absent but must be present");
        check("age", Absent, &[], "is 17 but must be absent");
        check(
            "age",
            AtLeast,
            &[Value::Integer(18)],
            "is 17 but must be at least 18",
        );
        check(
            "plan",
            NotOneOf,
            &[text("free"), text("old")],
            "is \"free\" but must not be \"free\" or \"old\"",
        );
        check(
            "muted",
            NotContains,
            &[text("chat")],
            "is [\"billing\", \"chat\"] but must not contain \"chat\"",
        );
        check(
            "muted",
            Equals,
            &[text("chat")],
            "is [\"billing\", \"chat\"] (list) but must be \"chat\" (text)",
        );
        check(
            "city",
            Less,
            &[Value::Integer(1)],
            "is absent but must be below 1",
        );
        check(
            "age",
            Prefix,
            &[text("1")],
            "is 17 (number) but must begin with \"1\" (text)",
        );
        check(
            "beta",
            Greater,
            &[Value::Integer(0)],
            "is false (boolean) but must be above 0 (number)",
        );
        check(
            "bio",
            Equals,
            &[text("")],
            &format!("is \"a\\nb{}...\" but must be \"\"", "x".repeat(61)),
        );
    }

    #[test]
    fn a_failed_condition_describes_its_first_alternatives_and_counts_the_rest() {
        let described = |any_of: Vec<Vec<Test>>| {
            let when = Some(Criteria::new(any_of).unwrap());
            let route = Route {
                by: Name::parse("r").unwrap(),
                to: vec![Target::Everyone],
                when,
                priority: Priority::Normal,
                expires_ms: None,
                collapse: None,
                event_name: None,
                body: None,
                slot: None,
            };
            condition(&route, &Name::parse("ann").unwrap(), &Attributes::default())
        };
        let clauses = |n: usize| {
            (0..n)
                .map(|n| vec![test(&format!("a{n}"), Operator::Present, &[])])
                .collect()
        };
        let begin =
            "has a condition that is false for `ann`: attribute `a0` is absent but must be present";
        assert_eq!(described(clauses(1)), begin);
        assert_eq!(
            described(clauses(2)),
            format!("{begin}, and attribute `a1` is absent but must be present")
        );
        assert!(
            described(clauses(5))
                .ends_with("`a2` is absent but must be present, and 2 more alternatives fail"),
            "{}",
            described(clauses(5))
        );
        assert_eq!(described(vec![]), "has a condition that is never true");
    }
}
