//! Probe and metrics routes of the admin listener.

use std::sync::Arc;

use axum::Json;
use axum::extract;
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use crate::delivery::hub::FRESH;
use crate::http::extract::Query;
use crate::http::{ApiError, State};
use crate::telemetry::readiness::{NamedText, Report};

/// `GET /healthz`: the process responds. Nothing else is checked, because restarting a node does
/// not repair its broker.
pub(in crate::http) async fn is_alive() -> &'static str {
    "ok\n"
}

/// `GET /readyz`: 200, or 503 with one line per reason; with `Accept: application/json`, the same as
/// JSON. Warnings and notes are listed in both.
pub(in crate::http) async fn is_ready(
    extract::State(state): extract::State<Arc<State>>,
    headers: HeaderMap,
) -> Response {
    let report = state.readiness.report();
    let (status, first) = if report.is_ready {
        (StatusCode::OK, Some("ready"))
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, None)
    };
    let accepted = headers
        .get(ACCEPT)
        .and_then(|accepted| accepted.to_str().ok());
    if accepted.is_some_and(|accepted| accepted.contains("application/json")) {
        let Report {
            is_ready: ready,
            reasons,
            warnings,
            notes,
            ..
        } = report;
        let report = ReadinessReport {
            ready,
            reasons,
            warnings,
            notes,
        };
        return (status, Json(report)).into_response();
    }
    let lines: String = first
        .into_iter()
        .chain(report.lines.iter().map(String::as_str))
        .flat_map(|line| [line, "\n"])
        .collect();
    (status, lines).into_response()
}

/// `GET /readyz` as JSON.
#[derive(Debug, Serialize)]
struct ReadinessReport {
    ready: bool,
    reasons: Vec<NamedText>,
    warnings: Vec<NamedText>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    notes: Vec<NamedText>,
}

/// The query of [`is_ready_for_streams`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Probe {
    /// The name of the node that the caller means.
    node: Option<String>,
}

/// `GET /v1/ready` of the public listener: whether this node can take more streams, for other
/// nodes and load balancers. Without the reasons, which are for operators.
///
/// # Errors
/// 503 if it cannot, or if it is not the node that the caller means.
pub(in crate::http) async fn is_ready_for_streams(
    extract::State(state): extract::State<Arc<State>>,
    Query(probe): Query<Probe>,
) -> Result<&'static str, ApiError> {
    if probe.node.is_some_and(|node| node != state.node) {
        return Err(ApiError::unavailable("this is another node"));
    }
    // Fresher than readiness: a node that has lost its broker asks another one, which may have lost
    // it as well and not have noticed.
    let is_fresh = state.hub().is_some_and(|hub| hub.silence() <= FRESH);
    if state.readiness.is_ready() && is_fresh {
        Ok("ready\n")
    } else {
        Err(ApiError::unavailable("this node is not ready"))
    }
}

/// `GET /metrics`.
pub(in crate::http) async fn metrics(
    extract::State(state): extract::State<Arc<State>>,
) -> impl IntoResponse {
    (
        [(
            CONTENT_TYPE,
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
        )],
        state.metrics.render(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::fake::FakeBroker;
    use crate::http::site::Site;

    #[tokio::test]
    async fn readiness_reports_one_line_per_reason() {
        let site = Site::dev(FakeBroker::default());
        site.state.readiness().warn(
            "broker.append-only-file",
            "no append-only file; set appendonly yes",
        );
        assert_eq!(
            site.admin("/readyz").await,
            (
                StatusCode::OK,
                "ready\nwarning: broker.append-only-file: no append-only file; set appendonly yes\n".to_owned()
            )
        );
        site.state
            .readiness()
            .set("broker", "unavailable: connection refused");
        let (status, text) = site.admin("/readyz").await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(
            text.lines().next(),
            Some("broker: unavailable: connection refused")
        );
        assert_eq!(
            site.admin("/healthz").await,
            (StatusCode::OK, "ok\n".to_owned())
        );
    }

    #[tokio::test]
    async fn metrics_are_on_the_admin_listener_only() {
        let site = Site::dev(FakeBroker::default());
        assert!(
            site.admin("/metrics")
                .await
                .1
                .contains("pointsman_streams_open")
        );
        assert_eq!(
            site.request("GET", "/metrics", &[], "").await.0,
            StatusCode::NOT_FOUND
        );
    }

    #[tokio::test]
    async fn the_public_listener_reports_readiness_without_reasons_and_for_this_node_only() {
        let site = Site::dev(FakeBroker::default());
        let ready = async |query: &str| {
            let path = format!("/v1/ready{query}");
            let (status, _, body) = site.request("GET", &path, &[], "").await;
            (status, body["error"].as_str().map(str::to_owned))
        };
        assert_eq!(ready("").await, (StatusCode::OK, None));
        assert_eq!(ready("?node=test%2F1").await, (StatusCode::OK, None));
        let unavailable = |why: &str| (StatusCode::SERVICE_UNAVAILABLE, Some(why.to_owned()));
        assert_eq!(
            ready("?node=other").await,
            unavailable("this is another node")
        );
        assert_eq!(ready("?nodes=x").await.0, StatusCode::BAD_REQUEST);
        site.state
            .readiness()
            .set("broker", "10.0.0.7:6379: connection refused");
        assert_eq!(ready("").await, unavailable("this node is not ready"));
    }
}
