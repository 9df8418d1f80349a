//! The layers around all routes: the form of requests, fallbacks, the connection limit, pages on
//! the admin listener, and the count of refused requests.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{self, Request};
use axum::http::header::{ACCEPT_ENCODING, CACHE_CONTROL, HOST, ORIGIN, TRANSFER_ENCODING};
use axum::http::{HeaderValue, Version};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use http_body::Body as _;

use super::coding::{Coding, INFLATED};
use super::error::Refused;
use super::{ApiError, State};
use crate::server::{
    AddressRefusal, ClientAddresses, Connection, ResponseBudget, Surplus, hold_until_sent,
};
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

/// Refuses a connection above a limit. A stream request passes, because it reports the limit in
/// band, with 200 and a `retry`: an `EventSource` never reconnects after any other status.
pub(super) async fn refuse_surplus(request: Request, next: Next) -> Response {
    let connection = request.extensions().get::<Arc<Connection>>();
    let surplus = connection.and_then(|connection| connection.surplus());
    match surplus.filter(|_| request.uri().path() != "/v1/stream") {
        None => next.run(request).await,
        Some(Surplus::Listener) => {
            ApiError::overloaded("this node has reached its connection limit").into_response()
        }
        Some(Surplus::TooFast(wait)) => too_fast(wait).into_response(),
    }
}

fn too_fast(wait: Duration) -> ApiError {
    let reason = "this address opens connections or sends requests too fast";
    ApiError::too_fast(reason, wait)
        .fix("use connections again, and repeat the request after Retry-After")
}

/// Refuses requests of a client behind a trusted proxy that has as many in progress as one address
/// may have, or sends them too fast. As above, a stream request passes and reports it in band.
pub(super) async fn bound_addresses(
    extract::State(state): extract::State<Arc<State>>,
    mut request: Request,
    next: Next,
) -> Response {
    let peer = request
        .extensions()
        .get::<Arc<Connection>>()
        .map(|connection| connection.peer().ip());
    let begun = peer.map(|peer| state.addresses.begin(peer, request.headers()));
    match begun.transpose() {
        Ok(permit) => {
            let response = next.run(request).await;
            match permit.flatten() {
                Some(permit) => response.map(|body| hold_until_sent(body, permit)),
                None => response,
            }
        }
        Err(refusal) if request.uri().path() == "/v1/stream" => {
            request.extensions_mut().insert(refusal);
            next.run(request).await
        }
        Err(AddressRefusal::TooFast(wait)) => too_fast(wait).into_response(),
        Err(AddressRefusal::TooMany) => ApiError::overloaded(
            "too many requests of this address are in progress",
        )
        .fix("wait for the responses to earlier requests, and close streams that are not needed")
        .into_response(),
    }
}

/// Refuses requests that a proxy may read differently than this node, and bodies in an encoding
/// that this node does not decode.
pub(super) async fn refuse_ambiguous(request: Request, next: Next) -> Response {
    let headers = request.headers();
    let mut hosts = headers.get_all(HOST).iter();
    let is_named_once = match (hosts.next(), hosts.next()) {
        // HTTP/2 names the host in the URI, and HTTP/1.0 need not name it.
        (None, _) => request.version() != Version::HTTP_11,
        (Some(host), None) => {
            request.version() != Version::HTTP_2
                || request
                    .uri()
                    .authority()
                    .is_none_or(|authority| authority.as_str().as_bytes() == host.as_bytes())
        }
        (Some(_), Some(_)) => false,
    };
    if !is_named_once {
        return ApiError::bad_request("the request does not name exactly one host")
            .fix("send one Host header")
            .into_response();
    }
    let mut transfer = headers.get_all(TRANSFER_ENCODING).iter();
    if let Some(encoding) = transfer.next()
        && (transfer.next().is_some() || !encoding.as_bytes().eq_ignore_ascii_case(b"chunked"))
    {
        return ApiError::bad_request("the request has a Transfer-Encoding other than chunked")
            .fix("send it with Content-Length, or chunked only")
            .into_response();
    }
    let accepts = if request.uri().path() == "/v1/events" {
        INFLATED
    } else {
        Coding::Identity.as_str()
    };
    let is_read = match Coding::of(headers) {
        Some(coding) => coding == Coding::Identity || accepts == INFLATED,
        None => false,
    };
    if !is_read {
        let refused = ApiError::unsupported_media_type(format!(
            "the request has a Content-Encoding other than {}",
            accepts.replace(", ", " or ")
        ))
        .fix("send the body uncompressed");
        return ([(ACCEPT_ENCODING, accepts)], refused).into_response();
    }
    next.run(request).await
}

/// Keeps answers about users, events and their contents out of caches, errors included.
pub(super) async fn keep_private(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    response
        .headers_mut()
        .insert(CACHE_CONTROL, HeaderValue::from_static("private, no-store"));
    response
}

/// Responses up to this size are not charged: they take no more than their connection does.
const MAX_FREE: usize = 4 * 1024;

/// Counts the responses of the public routes against the budget of its listener.
pub(super) async fn hold_responses(
    extract::State(state): extract::State<Arc<State>>,
    request: Request,
    next: Next,
) -> Response {
    hold(&state.responses, &state.addresses, request, next).await
}

/// The same for the admin routes.
pub(super) async fn hold_admin_responses(
    extract::State(state): extract::State<Arc<State>>,
    request: Request,
    next: Next,
) -> Response {
    hold(&state.admin_responses, &state.addresses, request, next).await
}

/// Gives the handler a permit, which it reserves before it builds a large response, and holds the
/// bytes of the response until the client has taken them.
async fn hold(
    budget: &ResponseBudget,
    addresses: &ClientAddresses,
    mut request: Request,
    next: Next,
) -> Response {
    // On a connection of a proxy, one client would use up the share of the others.
    let connection = request.extensions().get::<Arc<Connection>>();
    let connection = connection.filter(|at| !addresses.is_trusted_proxy(at.peer().ip()));
    let permit = budget.permit(connection.map(Arc::as_ref));
    request.extensions_mut().insert(permit.clone());
    // The response to a change reports that it has taken effect, so it is sent in any case. It is
    // small, or its handler has reserved it.
    let is_safe = request.method().is_safe();
    let response = next.run(request).await;
    let n_bytes = response.body().size_hint().exact().unwrap_or_default();
    let n_bytes = usize::try_from(n_bytes).unwrap_or(usize::MAX);
    let n_charged = if n_bytes > MAX_FREE { n_bytes } else { 0 };
    if !permit.settle(n_charged) && is_safe {
        return ApiError::overloaded("this node has no room for a response of this size now")
            .fix("ask for less at once, or read earlier responses first")
            .into_response();
    }
    response.map(|body| hold_until_sent(body, permit))
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
    extract::State(state): extract::State<Arc<State>>,
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
