//! The attribute `when`: a condition on the attributes of recipients, as JSON in the form of the
//! rules of the plugin `rules`.

use pointsman_plugin::{Failure, Operator, Test, Value};
use serde_json::{Map, Value as Json};

use crate::rejected;

const FIX: &str = r#"use a JSON object such as {"plan":"pro"}, {"plan":["pro","team"]} or {"level":{"at_least":5}}, or a list of such objects"#;
/// The most tests that the host accepts in all alternatives of a route.
const MAX_TESTS: usize = 256;

/// Returns the alternatives, of which each is a list of tests that must all hold. An object without
/// tests adds none.
pub(crate) fn parse(value: &Value) -> Result<Vec<Vec<Test>>, Failure> {
    let refused = || rejected("when", value, FIX);
    let Value::Text(text) = value else {
        return Err(refused());
    };
    let alternatives = match serde_json::from_str(text) {
        Ok(Json::Object(tests)) if tests.is_empty() => return Ok(Vec::new()),
        Ok(Json::Object(tests)) => vec![tests],
        Ok(Json::Array(list)) => {
            let tables = list.into_iter().map(|one| match one {
                Json::Object(tests) if !tests.is_empty() => Some(tests),
                _ => None,
            });
            let tables: Option<Vec<Map<String, Json>>> = tables.collect();
            // An empty list has no alternative that could hold.
            let tables = tables.filter(|tables| !tables.is_empty());
            tables.ok_or_else(refused)?
        }
        _ => return Err(refused()),
    };
    let alternatives = alternatives.iter().map(tests).collect::<Option<Vec<_>>>();
    let alternatives = alternatives.ok_or_else(refused)?;
    let n_tests: usize = alternatives.iter().map(Vec::len).sum();
    if n_tests > MAX_TESTS {
        return Err(rejected("when", value, "use at most 256 tests"));
    }
    Ok(alternatives)
}

fn tests(wanted: &Map<String, Json>) -> Option<Vec<Test>> {
    let mut tests = Vec::new();
    for (attribute, wanted) in wanted {
        match wanted {
            Json::Array(values) => {
                tests.push(Test::new(attribute, Operator::OneOf, values_of(values)?));
            }
            Json::Object(operators) if !operators.is_empty() => {
                for (name, term) in operators {
                    let (operator, values) = operation(name, term)?;
                    tests.push(Test::new(attribute, operator, values));
                }
            }
            wanted => tests.push(Test::new(attribute, Operator::Equals, [value_of(wanted)?])),
        }
    }
    Some(tests)
}

fn operation(name: &str, term: &Json) -> Option<(Operator, Vec<Value>)> {
    let operator = match (name, term) {
        ("present", Json::Bool(true)) | ("absent", Json::Bool(false)) => {
            return Some((Operator::Present, Vec::new()));
        }
        ("present", Json::Bool(false)) | ("absent", Json::Bool(true)) => {
            return Some((Operator::Absent, Vec::new()));
        }
        ("one_of", Json::Array(values)) => return Some((Operator::OneOf, values_of(values)?)),
        ("not_one_of", Json::Array(values)) => {
            return Some((Operator::NotOneOf, values_of(values)?));
        }
        ("equals", _) => Operator::Equals,
        ("not_equals", _) => Operator::NotEquals,
        ("contains", _) => Operator::Contains,
        ("not_contains", _) => Operator::NotContains,
        ("prefix", Json::String(_)) => Operator::Prefix,
        ("suffix", Json::String(_)) => Operator::Suffix,
        ("less", Json::Number(_)) => Operator::Less,
        ("at_most", Json::Number(_)) => Operator::AtMost,
        ("greater", Json::Number(_)) => Operator::Greater,
        ("at_least", Json::Number(_)) => Operator::AtLeast,
        _ => return None,
    };
    Some((operator, vec![value_of(term)?]))
}

fn values_of(values: &[Json]) -> Option<Vec<Value>> {
    let values: Option<Vec<Value>> = values.iter().map(value_of).collect();
    values.filter(|values| !values.is_empty())
}

fn value_of(json: &Json) -> Option<Value> {
    serde_json::from_value(json.clone()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_has_the_forms_of_the_rules() {
        let parsed = |text: &str| parse(&Value::from(text)).map_err(|_| ());
        assert_eq!(parsed("{}"), Ok(vec![]));
        assert_eq!(
            parsed(
                r#"{"plan":"pro","age":30,"team":["a","b"],"level":{"at_least":2},"muted":{"not_contains":"x","present":true}}"#
            ),
            Ok(vec![vec![
                Test::equals("age", 30),
                Test::at_least("level", 2),
                Test::not_contains("muted", "x"),
                Test::present("muted"),
                Test::equals("plan", "pro"),
                Test::one_of("team", ["a", "b"]),
            ]])
        );
        assert_eq!(
            parsed(r#"[{"a":true},{"b":{"absent":true}}]"#),
            Ok(vec![vec![Test::equals("a", true)], vec![Test::absent("b")]])
        );
        for text in [
            "",
            "pro",
            "[]",
            "[{}]",
            "1",
            r#"{"a":null}"#,
            r#"{"a":[]}"#,
            r#"{"a":{}}"#,
            r#"{"a":{"atleast":1}}"#,
            r#"{"a":{"less":"x"}}"#,
            r#"{"a":[[1]]}"#,
        ] {
            assert_eq!(parsed(text), Err(()), "{text}");
        }
    }
}
