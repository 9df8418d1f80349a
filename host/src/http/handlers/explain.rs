//! `GET /v1/explain?event_id=ID&user=USER` on the admin listener: why an event reached a user or
//! did not. The `explain` module builds the explanation.
//!
//! The response contains user data and router output derived from payloads, so it requires the API
//! key.

use std::sync::Arc;

use axum::Json;
use axum::extract;
use serde::Deserialize;
use tokio::sync::Semaphore;

use crate::event::Name;
use crate::explain::{ExplainError, Explanation, Sources};
use crate::http::extract::{ApiKey, Query, Reserved};
use crate::http::{ApiError, State};

/// Bounds concurrent requests, because each may scan all stored decisions.
static ANSWERS: Semaphore = Semaphore::const_new(MAX_ANSWERS);
const MAX_ANSWERS: usize = 2;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Options {
    /// The CloudEvents `id`, or the id of the entry.
    event_id: Name,
    /// If absent, the response has only the decision and the plan.
    user: Option<Name>,
}

pub(in crate::http) async fn explain(
    extract::State(state): extract::State<Arc<State>>,
    _: ApiKey,
    Query(options): Query<Options>,
    _: Reserved,
) -> Result<Json<Explanation>, ApiError> {
    let hub = state
        .hub()
        .ok_or_else(|| ApiError::unavailable("this node has not reached its broker yet"))?;
    let sources = Sources {
        broker: state.broker()?.as_ref(),
        device_cursors: state.device_cursors()?,
        hub,
    };
    let Ok(_permit) = ANSWERS.try_acquire() else {
        return Err(ApiError::overloaded(
            "this node is already running as many explain requests as it allows",
        ));
    };
    sources
        .explain(&options.event_id, options.user.as_ref())
        .await
        .map(Json)
        .map_err(|unexplained| match unexplained {
            ExplainError::Broker(error) => error.into(),
            unexplained => ApiError::not_found(unexplained.to_string()).fix(unexplained.fix()),
        })
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;

    use super::*;
    use crate::broker::fake::FakeBroker;
    use crate::http::site::Site;

    #[tokio::test]
    async fn an_explain_request_above_the_limit_gets_503() {
        let site = Site::dev(FakeBroker::default());
        let _all = ANSWERS.acquire_many(MAX_ANSWERS as u32).await.unwrap();
        let (status, body) = site.admin("/v1/explain?event_id=a").await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{body}");
        assert!(
            body.contains("as many explain requests as it allows"),
            "{body}"
        );
    }
}
