//! Which pages may call us from a browser: the configured origins, and in dev mode every loopback one. Answers preflights. In dev mode, where
//! nobody is asked for a key, it also keeps out pages that call us by a name of their own.
//!
//! This guards readers' browsers, not the node: who may do what is `auth`'s, and a client that is no browser sends no origin.

use std::sync::Arc;

use axum::extract::{self, Request};
use axum::http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE,
    ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD, HOST, ORIGIN, VARY,
};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use super::{ApiError, State};

/// Origins that may call.
#[derive(Clone, Debug, Default)]
pub struct Origins {
    listed: Vec<String>,
    loopback: bool,
}

impl Origins {
    /// `listed`: as a browser writes them; `loopback`: every one of this machine, too.
    ///
    /// # Errors
    /// The one that no browser would write.
    pub fn new(listed: &[String], loopback: bool) -> Result<Self, String> {
        for origin in listed {
            let host = origin
                .strip_prefix("https://")
                .or_else(|| origin.strip_prefix("http://"));
            if host.is_none_or(|host| {
                host.is_empty()
                    || host.contains(['/', '*', '@'])
                    || host
                        .chars()
                        .any(|c| c.is_ascii_uppercase() || c.is_whitespace())
            }) {
                return Err(format!(
                    "'{}' is no origin; write scheme and host in lower case and nothing after them, as in https://shop.example",
                    origin.escape_debug()
                ));
            }
        }
        Ok(Self {
            listed: listed.to_vec(),
            loopback,
        })
    }

    /// Whether a page sent this that a browser keeps from reading the answer, with its user's cookie perhaps: it should change nothing, either.
    pub(super) fn are_foreign_to(&self, headers: &HeaderMap) -> bool {
        let site = headers.get("sec-fetch-site").map(HeaderValue::as_bytes);
        match headers.get(ORIGIN) {
            Some(origin) => {
                site != Some(b"same-origin")
                    && !origin.to_str().is_ok_and(|origin| self.allow(origin))
            }
            // What a page asks for as an image or a script, say, has no origin.
            None => matches!(site, Some(b"cross-site" | b"same-site")),
        }
    }

    fn allow(&self, origin: &str) -> bool {
        self.listed.iter().any(|listed| listed == origin) || (self.loopback && is_loopback(origin))
    }
}

fn is_loopback(origin: &str) -> bool {
    origin
        .strip_prefix("http://")
        .or_else(|| origin.strip_prefix("https://"))
        .is_some_and(names_loopback)
}

/// Of a host, with a port or without.
fn names_loopback(authority: &str) -> bool {
    let (host, port) = match authority.strip_prefix('[') {
        Some(v6) => v6.split_once(']').unwrap_or_default(),
        None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
    };
    let is_port = port.is_empty()
        || port
            .strip_prefix(':')
            .is_some_and(|port| port.bytes().all(|b| b.is_ascii_digit()));
    let name = host.strip_suffix('.').unwrap_or(host);
    is_port
        && (name.eq_ignore_ascii_case("localhost")
            || host
                .parse::<std::net::IpAddr>()
                .is_ok_and(|ip| ip.is_loopback()))
}

/// Refuses what is asked of us by a name that is not this machine's own, in dev mode. To a browser, a page whose name was made to point to
/// 127.0.0.1 after it was loaded (DNS rebinding) is of our own origin: it may read every answer, and sends no foreign `Origin`.
pub(super) async fn refuse_other_names(
    extract::State(state): extract::State<Arc<State>>,
    request: Request,
    next: Next,
) -> Response {
    // HTTP/2 has it in the address; a client that says neither is no browser.
    let said = request.headers().get(HOST).map(HeaderValue::to_str);
    let name = request
        .uri()
        .authority()
        .map(|authority| Ok(authority.as_str()))
        .or(said);
    if state.auth.is_dev() && !name.is_none_or(|name| name.is_ok_and(names_loopback)) {
        return ApiError::forbidden("a node in dev mode answers by names of this machine only")
            .fix("ask for localhost or 127.0.0.1; for another name, give the node a key and a way to check tokens instead of --dev")
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
        // Without the headers below, the browser keeps the answer from the page.
        (false, _) => next.run(request).await,
    };
    let headers = response.headers_mut();
    headers.append(VARY, HeaderValue::from_static("Origin"));
    if is_allowed {
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        // For the cookie that may carry a token.
        headers.insert(
            ACCESS_CONTROL_ALLOW_CREDENTIALS,
            HeaderValue::from_static("true"),
        );
        headers.insert(
            ACCESS_CONTROL_EXPOSE_HEADERS,
            HeaderValue::from_static("Retry-After, WWW-Authenticate"),
        );
    }
    response
}

/// What a page is told that may not call.
pub(super) fn foreign() -> ApiError {
    ApiError::forbidden("pages of this origin may not call this node")
        .fix("its operator adds the origin to listen.origins")
}

/// Whatever headers the page wants to send, `Last-Event-ID` and `ce-*` among them: with credentials, a browser takes no `*` for an answer.
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
    use crate::http::site::Site;

    #[tokio::test]
    async fn preflights_are_answered_for_known_origins_only() {
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
    async fn a_page_that_made_its_name_point_to_this_machine_is_told_nothing_in_dev_mode() {
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
    async fn a_page_may_read_errors_too() {
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

    /// A browser sends the cookie of its user along with whatever any page asks for.
    #[tokio::test]
    async fn a_page_that_may_not_read_the_answer_begins_no_device() {
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
        // Those, a client that is no browser, and an address that somebody typed. (The fake knows no place to begin, which is told in band.)
        for own in [
            &[page][..],
            &[],
            &[("sec-fetch-site", "none")],
            &[("sec-fetch-site", "same-origin")],
            // Behind a proxy, the page's own origin is none that this node knows.
            &[
                ("origin", "https://www.example"),
                ("sec-fetch-site", "same-origin"),
            ],
        ] {
            assert_eq!(ask(own, "").await, StatusCode::OK, "{own:?}");
        }
    }

    #[test]
    fn what_no_browser_would_write_is_a_configuration_error() {
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
