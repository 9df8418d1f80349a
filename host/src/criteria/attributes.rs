//! Attributes of a recipient as JSON says them, whoever says them: texts, numbers and booleans by name, so many and no larger.

use std::collections::BTreeMap;

use super::Attributes;
use crate::event::{Malformed, Value};

/// The most attributes of a user.
const MAX_ATTRIBUTES: usize = 64;
/// The longest name of one, in bytes.
const MAX_NAME: usize = 64;
/// The longest text of one, in bytes.
const MAX_TEXT: usize = 1024;

/// Reads attributes.
///
/// # Errors
/// [`Malformed`] names the attribute that no condition could read.
pub fn parse_attributes(members: serde_json::Map<String, serde_json::Value>) -> Result<Attributes, Malformed> {
    if members.len() > MAX_ATTRIBUTES {
        return Err(Malformed::new(format!("has {} attributes; {MAX_ATTRIBUTES} is the most", members.len())).of("the user"));
    }
    let mut attributes = BTreeMap::new();
    for (name, value) in members {
        if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
            return Err(Malformed::new(format!("is no attribute name: 1 to {MAX_NAME} bytes without control characters"))
                .of(format!("'{}'", name.escape_debug())));
        }
        let value = match value {
            serde_json::Value::Bool(flag) => Value::Flag(flag),
            serde_json::Value::Number(number) => match (number.as_i64(), number.as_f64()) {
                (Some(integer), _) => Value::Integer(integer),
                (None, Some(decimal)) => Value::Decimal(decimal),
                (None, None) => return Err(Malformed::new("is a number out of range").of(name)),
            },
            serde_json::Value::String(text) if text.len() > MAX_TEXT => {
                return Err(Malformed::new(format!("has {} bytes; {MAX_TEXT} is the most", text.len())).of(name));
            }
            serde_json::Value::String(text) => Value::Text(text),
            _ => return Err(Malformed::new("is neither a text, a number nor a boolean; leave out what is not known").of(name)),
        };
        attributes.insert(name, value);
    }
    Ok(attributes.into())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_no_condition_could_read_is_refused_by_name() {
        let check = |body: &str, expect: &str| {
            let error = parse_attributes(serde_json::from_str(body).unwrap()).unwrap_err().to_string();
            assert!(error.contains(expect), "{body} gave: {error}");
        };
        check(r#"{"plan":null}"#, "plan is neither");
        check(r#"{"plan":["a"]}"#, "plan is neither");
        check(r#"{"":1}"#, "'' is no attribute name");
        check(r#"{"a\nb":1}"#, "is no attribute name");
        check(&json!({ "a": "x".repeat(1025) }).to_string(), "a has 1025 bytes");
        let many: serde_json::Map<_, _> = (0..65).map(|n| (n.to_string(), json!(n))).collect();
        check(&serde_json::Value::Object(many).to_string(), "has 65 attributes");
    }
}
