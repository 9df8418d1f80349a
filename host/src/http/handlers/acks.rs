//! `POST /v1/acks`: moves a device cursor, the user's read marker, or both. Either is kept for
//! weeks.
//!
//! The body is JSON: `id`, the id of a frame, and `device` (a name), `"read": true`, or both. A 204
//! means that the position is stored; a cursor or marker that is already further ahead stays where
//! it is. `device_cursors` decides which of two positions is further ahead.

use std::sync::Arc;

use axum::extract::{Request, State as Shared};
use axum::http::{StatusCode, header};
use serde::Deserialize;

use crate::broker::CursorOwner;
use crate::delivery::device_cursors::AcknowledgeError;
use crate::delivery::subscription::cursor::{Cursor, CursorError};
use crate::event::Name;
use crate::http::body::BodyReader;
use crate::http::{ApiError, State};

/// Fits an id and the longest name with its JSON escapes.
const MAX_BODY: usize = 4 * 1024;
const SHAPE: &str = "send {\"id\": \"<the id of a frame>\", \"device\": \"<its name>\"}, or \"read\": true instead of the device";

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Acknowledgement {
    id: String,
    device: Option<Name>,
    #[serde(default)]
    read: bool,
}

/// Moves the device cursor, the read marker, or both.
///
/// # Errors
/// 400 or 415 for a body that is not a valid acknowledgement, 401 or 403 for a missing or invalid
/// token, 403 for another user's id, 413 for a body above 4 KiB, 503 while the broker is
/// unavailable.
pub(in crate::http) async fn acknowledge(
    Shared(state): Shared<Arc<State>>,
    reader: BodyReader,
    request: Request,
) -> Result<StatusCode, ApiError> {
    let (parts, body) = request.into_parts();
    let user = state.auth().stream_identity(&parts).await?.reader.user;
    // Requires `application/json`: a page of another origin can send any simple content type with
    // the user's cookie and without a preflight.
    let kind = parts
        .headers
        .get(header::CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok())
        .unwrap_or_default();
    if !kind
        .split(';')
        .next()
        .is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"))
    {
        return Err(
            ApiError::unsupported_media_type("an acknowledgement must be JSON")
                .fix("send Content-Type: application/json"),
        );
    }
    let body = reader.read(body, MAX_BODY).await?;
    let acknowledgement: Acknowledgement =
        serde_json::from_slice(&body.bytes).map_err(|error| {
            ApiError::bad_request(format!("the body is not a valid acknowledgement: {error}"))
                .fix(SHAPE)
        })?;
    let which: Vec<CursorOwner> = acknowledgement
        .device
        .map(CursorOwner::Device)
        .into_iter()
        .chain(acknowledgement.read.then_some(CursorOwner::ReadMarker))
        .collect();
    if which.is_empty() {
        return Err(
            ApiError::bad_request("the body has neither a device nor \"read\": true").fix(SHAPE),
        );
    }
    let cursor = Cursor::decode(&acknowledgement.id, &user).map_err(|error| match error {
        CursorError::Malformed => {
            ApiError::bad_request("id is not the id of a frame").fix("send the id of the last frame received, unchanged")
        }
        CursorError::OtherUser => ApiError::forbidden("this id belongs to another user")
            .fix("acknowledge as the user whose stream sent it, and discard stored ids when another user logs in"),
    })?;
    let taken = state.device_cursors()?.acknowledge(&user, &cursor, &which);
    // This takes several broker reads and writes: it must not go on after the client has stopped
    // waiting.
    let taken = tokio::time::timeout(state.limits.read_wait, taken).await;
    match taken.map_err(|_| ApiError::unavailable("the broker did not answer in time"))? {
        Ok(()) => Ok(StatusCode::NO_CONTENT),
        Err(refusal @ AcknowledgeError::Ahead) => Err(ApiError::bad_request(refusal.to_string())
            .fix("send the id of the last frame received, unchanged")),
        Err(refusal @ AcknowledgeError::Contention) => {
            Err(ApiError::overloaded(refusal.to_string())
                .fix("acknowledge only the newest frame, not every frame"))
        }
        Err(AcknowledgeError::Broker(error)) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;
    use serde_json::json;

    use super::*;
    use crate::broker::fake::FakeBroker;
    use crate::http::site::Site;

    const JSON: (&str, &str) = ("content-type", "application/json; charset=utf-8");

    fn id(user: &str) -> String {
        let mut text = String::new();
        Cursor::default().encode(&Name::parse(user).unwrap(), &mut text);
        text
    }

    #[tokio::test]
    async fn an_invalid_acknowledgement_is_refused_with_a_fix() {
        let site = Site::dev(FakeBroker::default());
        let long = "x".repeat(257);
        for (body, expect) in [
            (String::new(), "EOF"),
            ("[1]".to_owned(), "not a valid acknowledgement"),
            ("null".to_owned(), "not a valid acknowledgement"),
            ("{}".to_owned(), "missing field `id`"),
            (
                json!({ "id": 7, "device": "phone" }).to_string(),
                "invalid type",
            ),
            (json!({ "id": id("ann") }).to_string(), "neither a device"),
            (
                json!({ "id": id("ann"), "read": false }).to_string(),
                "neither a device",
            ),
            (
                json!({ "id": id("ann"), "read": 1 }).to_string(),
                "invalid type",
            ),
            (
                json!({ "id": id("ann"), "device": "" }).to_string(),
                "is empty",
            ),
            (
                json!({ "id": id("ann"), "device": "a\nb" }).to_string(),
                "control character",
            ),
            (
                json!({ "id": id("ann"), "device": long }).to_string(),
                "257 bytes",
            ),
            (
                json!({ "id": id("ann"), "device": "phone", "user": "bob" }).to_string(),
                "unknown field `user`",
            ),
            (
                json!({ "id": "latest", "device": "phone" }).to_string(),
                "not the id of a frame",
            ),
            (
                json!({ "id": "", "device": "phone" }).to_string(),
                "not the id of a frame",
            ),
            (
                json!({ "id": "1\u{0}", "device": "phone" }).to_string(),
                "not the id of a frame",
            ),
            (
                json!({ "id": format!("{}A", id("ann")), "device": "phone" }).to_string(),
                "not the id of a frame",
            ),
        ] {
            let (status, _, answer) = site
                .request("POST", "/v1/acks?user=ann", &[JSON], &body)
                .await;
            assert_eq!(status, StatusCode::BAD_REQUEST, "{body}: {answer}");
            let (error, fix) = (
                answer["error"].as_str().unwrap(),
                answer["fix"].as_str().unwrap(),
            );
            assert!(
                error.contains(expect) && fix.starts_with("send "),
                "{body}: {answer}"
            );
        }
        let good = json!({ "id": id("ann"), "device": "phone" }).to_string();
        for headers in [
            &[][..],
            &[("content-type", "text/plain")],
            &[("content-type", "application/json+x")],
        ] {
            assert_eq!(
                site.request("POST", "/v1/acks?user=ann", headers, &good)
                    .await
                    .0,
                StatusCode::UNSUPPORTED_MEDIA_TYPE
            );
        }
        let (status, _, answer) = site
            .request("POST", "/v1/acks?user=bob", &[JSON], &good)
            .await;
        assert_eq!(
            (status, answer["error"].as_str()),
            (
                StatusCode::FORBIDDEN,
                Some("this id belongs to another user")
            )
        );
        let large = json!({ "id": "1".repeat(5_000), "read": true }).to_string();
        assert_eq!(
            site.request("POST", "/v1/acks?user=ann", &[JSON], &large)
                .await
                .0,
            StatusCode::PAYLOAD_TOO_LARGE
        );
        assert_eq!(
            site.request("POST", "/v1/acks", &[JSON], &good).await.0,
            StatusCode::UNAUTHORIZED
        );
        assert_eq!(
            site.request("POST", "/v1/acks?user=ann", &[JSON], &good)
                .await
                .0,
            StatusCode::NO_CONTENT
        );
    }
}
