//! The one error that a handler answers with: a short public text and its fix as JSON, the full cause in the log.

use axum::Json;
use axum::http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::event::Malformed;
use crate::{auth, broker};

/// See the head of this file.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    /// For the metric.
    reason: &'static str,
    body: Body,
    retry_after_s: Option<u64>,
    www_authenticate: Option<&'static str>,
    cause: Option<anyhow::Error>,
}

#[derive(Debug, Serialize)]
struct Body {
    error: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

/// In the extensions of a response: why it was refused, in one of the fixed words that label the metric.
#[derive(Clone, Copy, Debug)]
pub(super) struct Refused(pub(super) &'static str);

impl ApiError {
    fn new(status: StatusCode, reason: &'static str, error: impl Into<String>) -> Self {
        Self {
            status,
            reason,
            body: Body {
                error: error.into(),
                fix: None,
            },
            retry_after_s: None,
            www_authenticate: None,
            cause: None,
        }
    }

    /// 400: sent again, it is refused again.
    pub fn bad_request(error: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "malformed", error)
    }

    /// 404.
    pub fn not_found(error: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not-found", error)
    }

    /// 405.
    pub fn method_not_allowed(error: impl Into<String>) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "method", error)
    }

    /// 408.
    pub fn timeout(error: impl Into<String>) -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "slow", error)
    }

    /// 413.
    pub fn too_large(error: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too-large", error)
    }

    /// 415.
    pub fn unsupported_media_type(error: impl Into<String>) -> Self {
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "media-type", error)
    }

    /// 403: asking otherwise does not help.
    pub fn forbidden(error: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "forbidden", error)
    }

    /// 409: not as things stand.
    pub fn conflict(error: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "conflict", error)
    }

    /// 422: understood, and no good.
    pub fn unprocessable(error: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "no-good", error)
    }

    /// 500: this node cannot; the text is for its operator.
    pub fn incapable(error: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "incapable", error)
    }

    /// 429 with `Retry-After`: the broker takes no more for now, because what it has is not worked off.
    pub fn backlog(error: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "backlog", error).retry_soon()
    }

    /// 503 with `Retry-After`: the broker cannot be reached.
    pub fn away(error: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "away", error).retry_soon()
    }

    /// 503 with `Retry-After`: this node has its hands full.
    pub fn overloaded(error: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "overloaded", error).retry_soon()
    }

    /// Says what to do about it.
    #[must_use]
    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.body.fix = Some(fix.into());
        self
    }

    /// For the log only.
    #[must_use]
    pub fn cause(mut self, cause: impl Into<anyhow::Error>) -> Self {
        self.cause = Some(cause.into());
        self
    }

    /// Jittered, or everybody would come again at once.
    fn retry_soon(mut self) -> Self {
        self.retry_after_s = Some(rand::random_range(1..=5));
        self
    }
}

impl From<Malformed> for ApiError {
    fn from(malformed: Malformed) -> Self {
        Self::bad_request(malformed.to_string())
    }
}

impl From<auth::Error> for ApiError {
    fn from(error: auth::Error) -> Self {
        let text = error.to_string();
        match error {
            auth::Error::Missing(_) => Self {
                www_authenticate: Some("Bearer"),
                ..Self::new(StatusCode::UNAUTHORIZED, "unidentified", text)
            },
            auth::Error::Invalid(_) => Self {
                www_authenticate: Some("Bearer error=\"invalid_token\""),
                ..Self::new(StatusCode::UNAUTHORIZED, "unidentified", text)
            },
            auth::Error::Unavailable { fix, .. } => {
                tracing::warn!(
                    "a request was refused because {text}; to let such requests in, {fix}"
                );
                Self::forbidden(text)
            }
        }
    }
}

impl From<broker::Error> for ApiError {
    fn from(error: broker::Error) -> Self {
        match error {
            broker::Error::Away(_) => {
                Self::away("the broker cannot be reached right now").cause(error)
            }
            broker::Error::Full(_) => Self {
                reason: "full",
                ..Self::away("the broker has no room right now")
            }
            .cause(error),
            broker::Error::Refused(_) => Self::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "broker",
                "the broker refuses; its operator finds the reason in this node's log",
            )
            .cause(error),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        if let Some(cause) = &self.cause {
            let (status, error) = (self.status.as_u16(), &self.body.error);
            // That the broker is away or full is said once, by readiness: publishers who try again must not fill the log.
            match self.status {
                StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS => {
                    tracing::debug!(status, "{error}: {cause:#}")
                }
                _ => tracing::warn!(status, "{error}: {cause:#}"),
            }
        }
        let mut response = (self.status, Json(self.body)).into_response();
        if let Some(seconds) = self.retry_after_s {
            response
                .headers_mut()
                .insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Some(challenge) = self.www_authenticate {
            response
                .headers_mut()
                .insert(WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
        }
        response.extensions_mut().insert(Refused(self.reason));
        response
    }
}
