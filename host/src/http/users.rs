//! `/v1/users/{user}/attributes`: what conditions know of a recipient. A JSON object of texts, numbers and booleans, replaced as a whole.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract;
use axum::http::StatusCode;

use super::{ApiError, Keyed, Path, State, read_body};
use crate::broker::RecipientChange;
use crate::criteria::Attributes;
use crate::event::{Malformed, Name, Value};

/// The most attributes of a user.
const MAX_ATTRIBUTES: usize = 64;
/// The longest name of one, in bytes.
const MAX_NAME: usize = 64;
/// The longest text of one, in bytes.
const MAX_TEXT: usize = 1024;
/// Room for all of them with their JSON escapes.
const MAX_BODY: usize = 512 * 1024;

pub(super) async fn show(
    extract::State(state): extract::State<Arc<State>>,
    _: Keyed,
    Path(user): Path<Name>,
) -> Result<Json<Attributes>, ApiError> {
    Ok(Json(state.broker()?.recipient(&user).await?.attributes))
}

pub(super) async fn replace(
    extract::State(state): extract::State<Arc<State>>,
    _: Keyed,
    Path(user): Path<Name>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let body = read_body(body, MAX_BODY, Duration::from_secs(state.limits.body_timeout_s)).await?;
    let attributes = parse(&body)?;
    state.broker()?.change_recipient(&user, RecipientChange::Attributes(attributes)).await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn clear(
    extract::State(state): extract::State<Arc<State>>,
    _: Keyed,
    Path(user): Path<Name>,
) -> Result<StatusCode, ApiError> {
    state.broker()?.change_recipient(&user, RecipientChange::Attributes(Attributes::default())).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn parse(body: &[u8]) -> Result<Attributes, Malformed> {
    let members: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(body).map_err(|e| Malformed::new(format!("is not a JSON object: {e}")).of("the body"))?;
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
    use axum::http::StatusCode;
    use serde_json::json;

    use super::super::fake::{FakeBroker, Site};
    use super::*;

    #[tokio::test]
    async fn attributes_are_replaced_as_a_whole() {
        let site = Site::dev(FakeBroker::default());
        let path = "/v1/users/ann/attributes";
        assert_eq!(site.request("GET", path, &[], "").await.2, json!({}));
        let (status, ..) = site.request("PUT", path, &[], r#"{"plan":"pro","age":30,"score":0.5,"beta":true}"#).await;
        assert_eq!(status, StatusCode::NO_CONTENT);
        assert_eq!(site.request("GET", path, &[], "").await.2, json!({ "plan": "pro", "age": 30, "score": 0.5, "beta": true }));
        site.request("PUT", path, &[], r#"{"plan":"free"}"#).await;
        assert_eq!(site.request("GET", path, &[], "").await.2, json!({ "plan": "free" }));
        assert_eq!(site.request("DELETE", path, &[], "").await.0, StatusCode::NO_CONTENT);
        assert_eq!(site.request("GET", path, &[], "").await.2, json!({}));
    }

    #[test]
    fn what_no_condition_could_read_is_refused_by_name() {
        let check = |body: &str, expect: &str| {
            let error = parse(body.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(expect), "{body} gave: {error}");
        };
        check("[]", "not a JSON object");
        check(r#"{"plan":null}"#, "plan is neither");
        check(r#"{"plan":["a"]}"#, "plan is neither");
        check(r#"{"":1}"#, "'' is no attribute name");
        check(r#"{"a\nb":1}"#, "is no attribute name");
        check(&json!({ "a": "x".repeat(1025) }).to_string(), "a has 1025 bytes");
        let many: serde_json::Map<_, _> = (0..65).map(|n| (n.to_string(), json!(n))).collect();
        check(&serde_json::Value::Object(many).to_string(), "has 65 attributes");
    }
}
