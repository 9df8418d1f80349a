//! Probe and metrics routes of the admin listener.

use std::sync::Arc;

use axum::extract;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};

use crate::http::State;

/// `GET /healthz`: the process responds. Nothing else is checked, because restarting a node does
/// not repair its broker.
pub(in crate::http) async fn is_alive() -> &'static str {
    "ok\n"
}

/// `GET /readyz`: 200, or 503 with one line per reason. Warnings are listed in both.
pub(in crate::http) async fn is_ready(
    extract::State(state): extract::State<Arc<State>>,
) -> Response {
    let report = state.readiness.report();
    let (status, first) = if report.is_ready {
        (StatusCode::OK, Some("ready"))
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, None)
    };
    let lines: String = first
        .into_iter()
        .chain(report.lines.iter().map(String::as_str))
        .flat_map(|line| [line, "\n"])
        .collect();
    (status, lines).into_response()
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
}
