//! Extractors of path, query, API key and room for the response, with error messages in this API's
//! form.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use axum::extract::FromRequestParts;
use axum::extract::path::ErrorKind;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::http::request::Parts;
use serde::de::DeserializeOwned;

use super::{ApiError, Limits, State};
use crate::auth;
use crate::event::Name;
use crate::server::{Connection, Exhausted, FIRST_BYTES, ResponsePermit};

/// The parameters of the path.
pub(super) struct Path<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Path<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let path = axum::extract::Path::<T>::from_request_parts(parts, state).await;
        path.map(|path| Self(path.0))
            .map_err(|rejection| ApiError::bad_request(in_path(rejection)))
    }
}

fn in_path(rejection: PathRejection) -> String {
    let PathRejection::FailedToDeserializePathParams(failed) = rejection else {
        return rejection.body_text();
    };
    match failed.into_kind() {
        ErrorKind::DeserializeError {
            key,
            value,
            message,
        } => format!(
            "'{}' in the path is not a valid {key}: it {message}",
            value.escape_debug()
        ),
        ErrorKind::ParseErrorAtKey { key, value, .. } => {
            format!(
                "'{}' in the path is not a valid {key}",
                value.escape_debug()
            )
        }
        ErrorKind::InvalidUtf8InPathParam { key } => format!("the {key} in the path is not UTF-8"),
        ErrorKind::ParseErrorAtIndex { value, .. } | ErrorKind::ParseError { value, .. } => {
            format!("invalid path segment '{}'", value.escape_debug())
        }
        ErrorKind::Message(message) => format!("invalid path segment: {message}"),
        other => format!("the path cannot be read: {other}"),
    }
}

/// The parameters of the query string.
pub(super) struct Query<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let query = axum::extract::Query::<T>::from_request_parts(parts, state).await;
        query
            .map(|query| Self(query.0))
            .map_err(|rejection| ApiError::bad_request(in_query(&rejection)))
    }
}

fn in_query(rejection: &QueryRejection) -> String {
    // The framework's message is only the outermost error; its source has the detail.
    let cause = std::error::Error::source(rejection);
    format!(
        "the query cannot be read: {}",
        cause.map_or_else(|| rejection.body_text(), ToString::to_string)
    )
}

/// Every parameter of a query in order, for routes that reject unknown ones.
#[derive(Debug)]
pub(super) struct Parameters(Vec<(String, String)>);

impl<S: Send + Sync> FromRequestParts<S> for Parameters {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        Query::from_request_parts(parts, state)
            .await
            .map(|query| Self(query.0))
    }
}

impl Parameters {
    /// # Errors
    /// 400 for an unknown parameter: a misspelt one would otherwise be ignored silently. Names that
    /// begin with `_` are free, so that clients can add a cache buster.
    pub(super) fn are_all(
        &self,
        known: &[&str],
        is_known_too: impl Fn(&str) -> bool,
    ) -> Result<(), ApiError> {
        let is_known =
            |name: &str| known.contains(&name) || name.starts_with('_') || is_known_too(name);
        match self.0.iter().find(|(name, _)| !is_known(name)) {
            None => Ok(()),
            Some((unknown, _)) => {
                let shown: String = unknown.chars().take(64).collect();
                let fix = format!("remove it; the known parameters are {}", known.join(", "));
                Err(
                    ApiError::bad_request(format!("unknown parameter '{}'", shown.escape_debug()))
                        .fix(fix),
                )
            }
        }
    }

    /// The names of the parameters for which this is true, in order.
    pub(super) fn names(&self, is_meant: impl Fn(&str) -> bool) -> impl Iterator<Item = &str> {
        let names = self.0.iter().map(|(name, _)| name.as_str());
        names.filter(move |name| is_meant(name))
    }

    /// The last non-empty value among the parameters whose name matches.
    pub(super) fn last(&self, is_meant: impl Fn(&str) -> bool) -> Option<&str> {
        self.0
            .iter()
            .rev()
            .find(|(name, value)| is_meant(name) && !value.is_empty())
            .map(|(_, value)| value.as_str())
    }
}

/// Proof that the request carried the API key, or that the node is in dev mode. A handler that
/// takes it as an argument cannot forget the check.
pub(super) struct ApiKey;

impl FromRequestParts<Arc<State>> for ApiKey {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &Arc<State>) -> Result<Self, ApiError> {
        let checked = state.auth.authorize_key(parts);
        checked.map(|()| Self).map_err(|error| {
            let is_unauthorized = !matches!(
                error,
                auth::Error::Unavailable { .. } | auth::Error::KeysUnavailable
            );
            let refused = ApiError::from(error);
            // So that a client knows which of its credentials to send.
            if is_unauthorized {
                refused.code("api_key_required")
            } else {
                refused
            }
        })
    }
}

/// The address of the client: that of the peer, or the one that a trusted proxy names. Unspecified
/// in tests without sockets.
pub(super) struct ClientAddress(pub(super) IpAddr);

impl FromRequestParts<Arc<State>> for ClientAddress {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, state: &Arc<State>) -> Result<Self, Infallible> {
        let connection = parts.extensions.get::<Arc<Connection>>();
        Ok(Self(connection.map_or(
            IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            |connection| {
                state
                    .addresses
                    .client_of(connection.peer().ip(), &parts.headers)
            },
        )))
    }
}

/// The permit of the response, for a handler that builds a large one. It must be reserved first.
pub(super) struct ResponseRoom(ResponsePermit);

impl FromRequestParts<Arc<State>> for ResponseRoom {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &Arc<State>) -> Result<Self, ApiError> {
        let permit = parts.extensions.get::<ResponsePermit>().cloned();
        permit
            .map(Self)
            .ok_or_else(|| ApiError::internal("the route has no budget for its responses"))
    }
}

impl ResponseRoom {
    /// Waits for room for a response of up to `n_bytes`, to this user if it is one to a user.
    ///
    /// # Errors
    /// 503 if there is none within `limits.read_wait`.
    pub(super) async fn reserve(
        self,
        user: Option<&Name>,
        n_bytes: usize,
        limits: &Limits,
    ) -> Result<ResponsePermit, ApiError> {
        let reserved = self.0.reserve(user, n_bytes, limits.read_wait).await;
        reserved.map_err(|exhausted| {
            let (holder, fix) = match exhausted {
                Exhausted::User => ("user", "read earlier responses first"),
                Exhausted::Connection => ("connection", "read earlier responses first"),
                Exhausted::Node => ("node", "try again later"),
            };
            let error = format!("this {holder} has too many bytes of responses under way");
            ApiError::overloaded(error).fix(fix)
        })?;
        Ok(self.0)
    }
}

/// Proof that the request has room for its response; for routes that answer with a list.
pub(super) struct Reserved;

impl FromRequestParts<Arc<State>> for Reserved {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &Arc<State>) -> Result<Self, ApiError> {
        let room = ResponseRoom::from_request_parts(parts, state).await?;
        room.reserve(None, FIRST_BYTES, &state.limits).await?;
        Ok(Self)
    }
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;

    use crate::broker::fake::FakeBroker;
    use crate::http::site::Site;

    #[tokio::test]
    async fn path_and_query_errors_name_the_invalid_part() {
        let site = Site::dev(FakeBroker::default());
        for (method, path, expect) in [
            (
                "GET",
                "/v1/groups/a%0Ab/members/u",
                "invalid path segment: contains the control character U+000A",
            ),
            (
                "GET",
                "/v1/groups/%FF/members/u",
                "the group in the path is not UTF-8",
            ),
            (
                "GET",
                "/v1/dead-letters?limit=x",
                "the query cannot be read: limit: invalid digit found in string",
            ),
            (
                "GET",
                "/v1/dead-letters?limits=5",
                "the query cannot be read: limits: unknown field `limits`, expected one of `after`, `limit`, `retrying`",
            ),
            (
                "POST",
                "/v1/events?dryrun=true",
                "the query cannot be read: dryrun: unknown field `dryrun`, expected `dry_run`",
            ),
            (
                "GET",
                "/v1/stream?user=ann&prioriti=high",
                "unknown parameter 'prioriti'",
            ),
            (
                "GET",
                "/v1/notifications?user=ann&last=5",
                "unknown parameter 'last'",
            ),
        ] {
            let (status, _, body) = site
                .request(method, path, &[("content-type", "application/json")], "{}")
                .await;
            assert_eq!(
                (status, body["error"].as_str()),
                (StatusCode::BAD_REQUEST, Some(expect)),
                "{path}"
            );
        }
    }
}
