//! The layers around all routes: fallbacks, the connection limit, pages on the admin listener, and the
//! count of refused requests.

use std::sync::Arc;

use axum::extract::Request;
use axum::http::header::ORIGIN;
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use super::error::Refused;
use super::{ApiError, State};
use crate::server::Connection;
use crate::telemetry::metrics::ReasonLabel;

pub(super) async fn nothing_here(request: Request) -> ApiError {
    ApiError::not_found(format!(
        "there is nothing at {}",
        request.uri().path().escape_debug()
    ))
    .code("unknown_path")
    .fix("GET /v1/openapi.json lists the paths of the public and the admin listener")
}

pub(super) async fn other_method(request: Request) -> ApiError {
    ApiError::method_not_allowed(format!(
        "{} does not support {}",
        request.uri().path().escape_debug(),
        request.method()
    ))
}

/// Refuses a connection above the limit. A stream request passes, because it reports the limit in
/// band, with 200 and a `retry`: an `EventSource` never reconnects after any other status.
pub(super) async fn refuse_surplus(request: Request, next: Next) -> Response {
    let is_surplus = request
        .extensions()
        .get::<Arc<Connection>>()
        .is_some_and(|connection| connection.is_surplus());
    if is_surplus && request.uri().path() != "/v1/stream" {
        return ApiError::overloaded("this node has reached its connection limit").into_response();
    }
    next.run(request).await
}

/// Refuses changes requested by a browser page. A node in dev mode requires no key, so that any
/// page open in the browser could otherwise act as its operator.
pub(super) async fn refuse_pages(request: Request, next: Next) -> Response {
    if !request.method().is_safe() && request.headers().contains_key(ORIGIN) {
        return ApiError::forbidden("the admin listener accepts no changes from browser pages")
            .fix("send the request without the Origin header")
            .into_response();
    }
    next.run(request).await
}

pub(super) async fn count_refusals(
    axum::extract::State(state): axum::extract::State<Arc<State>>,
    request: Request,
    next: Next,
) -> Response {
    let response = next.run(request).await;
    if let Some(Refused(reason)) = response.extensions().get() {
        state
            .metrics
            .requests_refused
            .get_or_create(&ReasonLabel { reason })
            .inc();
    }
    response
}
