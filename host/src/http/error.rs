//! The error type of all handlers: a short public message with its fix as JSON, and the full cause
//! in the log.

use std::time::Duration;

use axum::Json;
use axum::http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::value::RawValue;

use crate::event::Malformed;
use crate::{auth, broker};

/// An error response; see the head of this file.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    /// The label of the refusal metric; coarser than the code of the body.
    reason: &'static str,
    body: Body,
    retry_after_s: Option<u16>,
    www_authenticate: Option<&'static str>,
    cause: Option<anyhow::Error>,
}

#[derive(Debug, Serialize)]
struct Body {
    /// A stable word for programs to branch on; the texts may change.
    code: &'static str,
    error: Box<str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<Box<str>>,
    /// The receipts of a batch of which every event is refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    events: Option<Box<RawValue>>,
}

/// A response extension with the reason of a refusal, one of the fixed labels of the metric.
#[derive(Clone, Copy, Debug)]
pub(super) struct Refused(pub(super) &'static str);

impl ApiError {
    fn new(status: StatusCode, reason: &'static str, error: impl Into<String>) -> Self {
        Self {
            status,
            reason,
            body: Body {
                code: reason,
                error: error.into().into_boxed_str(),
                fix: None,
                events: None,
            },
            retry_after_s: None,
            www_authenticate: None,
            cause: None,
        }
    }

    /// 400: a retry of the same request fails the same way.
    pub fn bad_request(error: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "malformed", error)
    }

    /// 404.
    pub fn not_found(error: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", error)
    }

    /// 405.
    pub fn method_not_allowed(error: impl Into<String>) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", error)
    }

    /// 408.
    pub fn timeout(error: impl Into<String>) -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "timeout", error)
    }

    /// 413.
    pub fn too_large(error: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", error)
    }

    /// 415.
    pub fn unsupported_media_type(error: impl Into<String>) -> Self {
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported_media_type",
            error,
        )
    }

    /// 403: other credentials do not help.
    pub fn forbidden(error: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "forbidden", error)
    }

    /// 409: the current state does not allow it.
    pub fn conflict(error: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "conflict", error)
    }

    /// 422: the request is well-formed but its content is invalid.
    pub fn unprocessable(error: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid", error)
    }

    /// 500: this node cannot carry out the request; the message is for its operator.
    pub fn internal(error: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", error)
    }

    /// 429 with `Retry-After`: the broker accepts no more events until its backlog shrinks.
    pub fn backlog(error: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "backlog", error).retry_soon()
    }

    /// 429 with `Retry-After`: the client is above its rate for `wait`.
    pub fn too_fast(error: impl Into<String>, wait: Duration) -> Self {
        let seconds = wait.as_secs_f64().ceil().clamp(1.0, f64::from(u16::MAX));
        Self {
            retry_after_s: Some(seconds as u16),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limited", error)
        }
    }

    /// 503 with `Retry-After`: the broker is unavailable.
    pub fn unavailable(error: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", error).retry_soon()
    }

    /// 503 with `Retry-After`: this node is at a limit.
    pub fn overloaded(error: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "overloaded", error).retry_soon()
    }

    /// Adds the action that fixes the error.
    #[must_use]
    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.body.fix = Some(fix.into().into_boxed_str());
        self
    }

    /// Replaces the code of the body by a finer one than the metric's reason.
    #[must_use]
    pub fn code(mut self, code: &'static str) -> Self {
        self.body.code = code;
        self
    }

    /// Adds the receipts of a batch.
    #[must_use]
    pub fn events(mut self, receipts: &impl Serialize) -> Self {
        self.body.events = serde_json::value::to_raw_value(receipts).ok();
        self
    }

    /// Adds the cause, which appears in the log only.
    #[must_use]
    pub fn cause(mut self, cause: impl Into<anyhow::Error>) -> Self {
        self.cause = Some(cause.into());
        self
    }

    /// Jittered, so that clients do not all retry at the same moment.
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
                ..Self::new(StatusCode::UNAUTHORIZED, "unauthorized", text)
            },
            auth::Error::Expired | auth::Error::Invalid(_) => Self {
                www_authenticate: Some("Bearer error=\"invalid_token\""),
                ..Self::new(StatusCode::UNAUTHORIZED, "unauthorized", text)
            },
            auth::Error::KeysUnavailable => Self::unavailable(text),
            auth::Error::Unavailable { fix, .. } => {
                tracing::warn!("request refused: {text}; to accept such requests, {fix}");
                Self::forbidden(text)
            }
        }
    }
}

impl From<broker::Error> for ApiError {
    fn from(error: broker::Error) -> Self {
        match error {
            broker::Error::Unavailable(_) => {
                Self::unavailable("the broker is unavailable right now").cause(error)
            }
            broker::Error::Full(_) => Self {
                reason: "full",
                ..Self::unavailable("the broker is full right now")
            }
            .code("full")
            .cause(error),
            broker::Error::TooManyGroups { limit, most } => Self::conflict(limit.reason(most))
                .code("too_many_groups")
                .fix(limit.fix()),
            broker::Error::Permanent(_) => Self::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "broker",
                "the broker refused the request; the reason is in this node's log",
            )
            .cause(error),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        if let Some(cause) = &self.cause {
            let (status, error) = (self.status.as_u16(), &self.body.error);
            // Readiness reports an unavailable or full broker once; retries by publishers must not
            // fill the log.
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
