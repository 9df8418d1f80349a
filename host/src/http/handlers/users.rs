//! `/v1/users/{user}/attributes`: the attributes of a recipient that route conditions test. A JSON
//! object that is replaced as a whole; `criteria` defines its valid contents.

use std::fmt;
use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract;
use axum::http::StatusCode;
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::broker::RecipientChange;
use crate::event::criteria::{Attributes, parse_attributes};
use crate::event::{Malformed, Name};
use crate::http::body::BodyReader;
use crate::http::extract::{ApiKey, Path};
use crate::http::{ApiError, State};

/// Fits the maximum attributes with their JSON escapes.
const MAX_BODY: usize = 512 * 1024;

pub(in crate::http) async fn show(
    extract::State(state): extract::State<Arc<State>>,
    _: ApiKey,
    Path(user): Path<Name>,
) -> Result<Json<Attributes>, ApiError> {
    Ok(Json(state.broker()?.recipient(&user).await?.attributes))
}

pub(in crate::http) async fn replace(
    extract::State(state): extract::State<Arc<State>>,
    _: ApiKey,
    Path(user): Path<Name>,
    reader: BodyReader,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let body = reader.read(body, MAX_BODY).await?;
    let attributes = parse(&body.bytes)?;
    state
        .broker()?
        .change_recipient(&user, RecipientChange::Attributes(attributes))
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

pub(in crate::http) async fn clear(
    extract::State(state): extract::State<Arc<State>>,
    _: ApiKey,
    Path(user): Path<Name>,
) -> Result<StatusCode, ApiError> {
    state
        .broker()?
        .change_recipient(&user, RecipientChange::Attributes(Attributes::default()))
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

fn parse(body: &[u8]) -> Result<Attributes, Malformed> {
    let Members(members) = serde_json::from_slice(body)
        .map_err(|e| Malformed::new(format!("is not a JSON object: {e}")).of("the body"))?;
    parse_attributes(members)
}

/// A JSON object whose names are all different. Of two equal names, readers of JSON may use either.
struct Members(serde_json::Map<String, serde_json::Value>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(MembersVisitor)
    }
}

struct MembersVisitor;

impl<'de> Visitor<'de> for MembersVisitor {
    type Value = Members;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of attributes")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
        let mut members = serde_json::Map::new();
        while let Some((name, value)) = map.next_entry::<String, serde_json::Value>()? {
            if members.contains_key(&name) {
                return Err(A::Error::custom(format!(
                    "'{}' appears twice",
                    name.escape_debug()
                )));
            }
            members.insert(name, value);
        }
        Ok(Members(members))
    }
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;
    use serde_json::json;

    use super::*;
    use crate::broker::fake::FakeBroker;
    use crate::http::site::Site;

    #[tokio::test]
    async fn attributes_are_replaced_as_a_whole() {
        let site = Site::dev(FakeBroker::default());
        let path = "/v1/users/ann/attributes";
        assert_eq!(site.request("GET", path, &[], "").await.2, json!({}));
        let (status, ..) = site
            .request(
                "PUT",
                path,
                &[],
                r#"{"plan":"pro","age":30,"score":0.5,"beta":true}"#,
            )
            .await;
        assert_eq!(status, StatusCode::NO_CONTENT);
        assert_eq!(
            site.request("GET", path, &[], "").await.2,
            json!({ "plan": "pro", "age": 30, "score": 0.5, "beta": true })
        );
        site.request("PUT", path, &[], r#"{"plan":"free"}"#).await;
        assert_eq!(
            site.request("GET", path, &[], "").await.2,
            json!({ "plan": "free" })
        );
        assert_eq!(
            site.request("DELETE", path, &[], "").await.0,
            StatusCode::NO_CONTENT
        );
        assert_eq!(site.request("GET", path, &[], "").await.2, json!({}));
    }

    #[test]
    fn attributes_that_are_not_an_object_are_refused() {
        let error = parse(b"[]").unwrap_err().to_string();
        assert!(error.contains("not a JSON object"), "{error}");
    }
}
