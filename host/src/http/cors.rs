//! The CORS middleware and the check against DNS rebinding. Answers preflights, and in dev mode,
//! which requires no key, rejects requests to host names that are not loopback names. `origins`
//! decides which origins are allowed.
//!
//! This protects users' browsers, not the node: `auth` decides who may do what, and clients other
//! than browsers send no origin.

use std::sync::Arc;

use axum::extract::{self, Request};
use axum::http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE,
    ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD, HOST, ORIGIN, VARY,
};
use axum::http::{HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use super::origins::names_loopback;
use super::{ApiError, State};

/// Refuses requests to the admin listener under a host name that is not known to be this node's: a
/// page whose name points to this address after it was loaded could read every response that needs
/// no key (DNS rebinding).
pub(super) async fn refuse_unknown_admin_names(
    extract::State(state): extract::State<Arc<State>>,
    request: Request,
    next: Next,
) -> Response {
    if !state.auth.is_dev()
        && !name(&request)
            .is_none_or(|name| name.is_some_and(|n| state.origins.allow_admin_host(n)))
    {
        return ApiError::forbidden("the admin listener is not known by this host name")
            .fix("use localhost or an IP address, or ask the operator to add the name to listen.admin_hosts")
            .into_response();
    }
    next.run(request).await
}

/// In dev mode, which requires no key, refuses changes by pages whose origin may not call this
/// node. A browser sends simple requests without asking first.
pub(super) async fn refuse_foreign_pages(
    extract::State(state): extract::State<Arc<State>>,
    request: Request,
    next: Next,
) -> Response {
    if state.auth.is_dev()
        && !request.method().is_safe()
        && state.origins.are_foreign_to(request.headers())
    {
        return foreign().into_response();
    }
    next.run(request).await
}

/// The host name of a request: `None` if there is none, `Some(None)` if it is not text.
fn name(request: &Request) -> Option<Option<&str>> {
    // HTTP/2 carries the name in the URI. A client that sends neither is not a browser.
    let said = request.headers().get(HOST).map(|name| name.to_str().ok());
    request
        .uri()
        .authority()
        .map(|authority| Some(authority.as_str()))
        .or(said)
}

/// In dev mode, refuses requests to a host name that is not a loopback name. This prevents DNS
/// rebinding: to a browser, a page whose name points to 127.0.0.1 after it was loaded has this
/// node's origin, can read every response, and sends no foreign `Origin`.
pub(super) async fn refuse_other_names(
    extract::State(state): extract::State<Arc<State>>,
    request: Request,
    next: Next,
) -> Response {
    if state.auth.is_dev() && !name(&request).is_none_or(|name| name.is_some_and(names_loopback)) {
        return ApiError::forbidden("a node in dev mode accepts requests to loopback host names only")
            .fix("use localhost or 127.0.0.1; for another host name, configure an API key and a token secret instead of --dev")
            .into_response();
    }
    next.run(request).await
}

pub(super) async fn apply(
    extract::State(state): extract::State<Arc<State>>,
    request: Request,
    next: Next,
) -> Response {
    let Some(origin) = request.headers().get(ORIGIN).cloned() else {
        return next.run(request).await;
    };
    let is_preflight = request.method() == Method::OPTIONS
        && request
            .headers()
            .contains_key(ACCESS_CONTROL_REQUEST_METHOD);
    let is_allowed = origin
        .to_str()
        .is_ok_and(|origin| state.origins.allow(origin));
    let mut response = match (is_preflight, is_allowed) {
        (true, false) => foreign().into_response(),
        (true, true) => preflight(&request),
        // Without the headers below, the browser hides the response from the page.
        (false, _) => next.run(request).await,
    };
    let headers = response.headers_mut();
    headers.append(VARY, HeaderValue::from_static("Origin"));
    if is_allowed {
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        // The token may be in a cookie.
        headers.insert(
            ACCESS_CONTROL_ALLOW_CREDENTIALS,
            HeaderValue::from_static("true"),
        );
        headers.insert(
            ACCESS_CONTROL_EXPOSE_HEADERS,
            HeaderValue::from_static("Retry-After, WWW-Authenticate, X-Pointsman-Ignored"),
        );
    }
    response
}

/// The error for a page whose origin may not call this node.
pub(super) fn foreign() -> ApiError {
    ApiError::forbidden("pages of this origin may not call this node")
        .fix("ask the operator to add the origin to listen.origins")
}

/// Allows every requested header, including `Last-Event-ID` and `ce-*`. With credentials, browsers
/// do not accept `*`, so the request's list is echoed.
fn preflight(request: &Request) -> Response {
    let wanted = request
        .headers()
        .get(ACCESS_CONTROL_REQUEST_HEADERS)
        .cloned();
    let mut response = StatusCode::NO_CONTENT.into_response();
    let headers = response.headers_mut();
    headers.insert(
        ACCESS_CONTROL_ALLOW_METHODS,
        HeaderValue::from_static("GET, POST, PUT, DELETE"),
    );
    headers.insert(
        ACCESS_CONTROL_ALLOW_HEADERS,
        wanted.unwrap_or(HeaderValue::from_static(
            "Authorization, Content-Type, Last-Event-ID",
        )),
    );
    headers.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::fake::FakeBroker;
    use crate::http::Origins;
    use crate::http::site::Site;

    #[tokio::test]
    async fn preflights_succeed_for_known_origins_only() {
        let site = Site::dev(FakeBroker::default());
        let ask = async |origin: &str| {
            let headers = [
                ("origin", origin),
                ("access-control-request-method", "GET"),
                (
                    "access-control-request-headers",
                    "last-event-id,authorization",
                ),
            ];
            site.request("OPTIONS", "/v1/stream", &headers, "").await
        };
        for origin in [
            "http://localhost:5173",
            "http://127.0.0.1",
            "https://[::1]:8443",
            "https://shop.example",
        ] {
            let (status, headers, _) = ask(origin).await;
            assert_eq!(status, StatusCode::NO_CONTENT, "{origin}");
            assert_eq!(headers["access-control-allow-origin"], origin);
            assert_eq!(
                headers["access-control-allow-headers"],
                "last-event-id,authorization"
            );
        }
        for origin in [
            "https://evil.example",
            "http://localhost.evil.example",
            "http://127.0.0.1.evil.example",
            "null",
        ] {
            let (status, headers, _) = ask(origin).await;
            assert_eq!(status, StatusCode::FORBIDDEN, "{origin}");
            assert!(
                !headers.contains_key("access-control-allow-origin"),
                "{origin}"
            );
        }
    }

    #[tokio::test]
    async fn dev_mode_refuses_requests_to_other_host_names() {
        let site = Site::dev(FakeBroker::default());
        for path in [
            "/v1/stream?user=ann&device=made-up",
            "/v1/openapi.json",
            "/",
        ] {
            let others = [
                "evil.example",
                "evil.example:8080",
                "localhost.evil.example",
                "127.0.0.1.evil.example:8080",
                "",
            ];
            for host in others.into_iter().chain([
                "localhost:8080@evil.example",
                "[::1]evil.example",
                "[::1",
                "localhost:evil",
            ]) {
                assert_eq!(
                    site.request("GET", path, &[("host", host)], "").await.0,
                    StatusCode::FORBIDDEN,
                    "{path} of {host}"
                );
            }
            for host in [
                "localhost",
                "LOCALHOST",
                "localhost.",
                "localhost:8080",
                "127.0.0.1:8080",
                "[::1]:8080",
            ] {
                assert_eq!(
                    site.request("GET", path, &[("host", host)], "").await.0,
                    StatusCode::OK,
                    "{path} of {host}"
                );
            }
        }
    }

    #[tokio::test]
    async fn a_page_can_read_error_responses() {
        let site = Site::dev(FakeBroker::default());
        let (status, headers, _) = site
            .request("GET", "/nothing", &[("origin", "https://shop.example")], "")
            .await;
        assert_eq!(status, StatusCode::NOT_FOUND);
        assert_eq!(
            (&headers["access-control-allow-origin"], &headers["vary"]),
            (
                &HeaderValue::from_static("https://shop.example"),
                &HeaderValue::from_static("Origin")
            )
        );
    }

    /// A browser attaches the user's cookie to any page's requests.
    #[tokio::test]
    async fn a_page_that_may_not_read_the_response_cannot_start_a_device_cursor() {
        let site = Site::dev(FakeBroker::default());
        let ask = async |headers: &[(&str, &str)], query: &str| {
            site.request(
                "GET",
                &format!("/v1/stream?user=ann&device=made-up{query}"),
                headers,
                "",
            )
            .await
            .0
        };
        let page = ("origin", "https://shop.example");
        for foreign in [
            &[("origin", "https://evil.example")][..],
            &[("origin", "null")],
            &[
                ("origin", "https://evil.example"),
                ("sec-fetch-site", "cross-site"),
            ],
            &[
                ("sec-fetch-site", "cross-site"),
                ("sec-fetch-mode", "no-cors"),
            ],
            &[("sec-fetch-site", "same-site")],
        ] {
            assert_eq!(ask(foreign, "").await, StatusCode::FORBIDDEN, "{foreign:?}");
            assert_eq!(
                ask(foreign, "&last_event_id=earliest").await,
                StatusCode::FORBIDDEN,
                "{foreign:?}"
            );
        }
        // Allowed pages, clients other than browsers, and a URL typed by the user. (The fake broker
        // has no start position, which is reported in band.)
        for own in [
            &[page][..],
            &[],
            &[("sec-fetch-site", "none")],
            &[("sec-fetch-site", "same-origin")],
            // Behind a proxy, this node does not know the page's own origin.
            &[
                ("origin", "https://www.example"),
                ("sec-fetch-site", "same-origin"),
            ],
        ] {
            assert_eq!(ask(own, "").await, StatusCode::OK, "{own:?}");
        }
    }

    #[test]
    fn an_invalid_origin_is_a_configuration_error() {
        for bad in [
            "*",
            "shop.example",
            "https://",
            "https://shop.example/",
            "https://Shop.example",
            "ftp://x",
        ] {
            assert!(Origins::new(&[bad.to_owned()], false).is_err(), "{bad}");
        }
        assert!(Origins::new(&["https://shop.example:8443".to_owned()], false).is_ok());
    }
}
