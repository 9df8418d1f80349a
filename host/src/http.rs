//! Every route in one list, what their handlers share, and the one shape of an error.
//!
//! Handlers take a request apart, ask the part whose concept it is, and put the answer together: they decide nothing. This and the files
//! under `http/` are the only ones that know status codes. Sockets are `server`'s, identities `auth`'s, the bytes of a stream `sse`'s.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{FromRequestParts, Request};
use axum::http::header::ORIGIN;
use axum::http::request::Parts;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post, put};
use bytes::Bytes;
use http_body::Body as _;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use crate::auth::Auth;
use crate::broker::{Broker, Retention};
use crate::delivery::device_cursors::Bookmarks;
use crate::delivery::hub::Hub;
use crate::delivery::sse::Pulse;
use crate::ingest::pipeline::Pipeline;
use crate::server::Connection;
use crate::telemetry::metrics::{Metrics, ReasonLabel};
use crate::telemetry::readiness::Readiness;

mod cors;
mod error;
mod extract;
mod handlers;
mod openapi;
#[cfg(test)]
mod site;

pub use cors::Origins;
pub use error::ApiError;

use extract::{Parameters, Path, Query};
use handlers::{
    acks, candidates, dead_letters, decisions, events, explain, export, health, members,
    notifications, page, plugins, stream, users,
};

/// The routes of the listener for applications.
pub fn routes(state: Arc<State>) -> Router {
    let mut routes = Router::new()
        .route("/v1/openapi.json", get(openapi::document))
        .route("/v1/events", post(events::publish))
        .route("/v1/stream", get(stream::open))
        .route("/v1/notifications", get(notifications::page))
        .route("/v1/acks", post(acks::acknowledge))
        .route(
            "/v1/groups/{group}/members/{user}",
            put(members::join).delete(members::leave).get(members::show),
        )
        .route(
            "/v1/users/{user}/attributes",
            get(users::show).put(users::replace).delete(users::clear),
        )
        .route("/v1/dead", get(dead_letters::list))
        .route(
            "/v1/dead/{partition}/{id}",
            get(dead_letters::show).delete(dead_letters::drop),
        )
        .route(
            "/v1/dead/{partition}/{id}/redrive",
            post(dead_letters::redrive),
        );
    if state.auth.is_dev() {
        routes = routes.merge(page::routes());
    }
    finish(routes, state)
}

/// The routes of the listener for operators: who reads is asked for no key, who changes something, or sees payloads or what is
/// known of a user, is. They answer no other origin.
pub fn admin_routes(state: Arc<State>) -> Router {
    let routes = Router::new()
        .route("/v1/openapi.json", get(openapi::document))
        .route("/healthz", get(health::is_alive))
        .route("/readyz", get(health::is_ready))
        .route("/metrics", get(health::metrics))
        .route("/v1/decisions", get(decisions::list))
        .route("/v1/explain", get(explain::explain))
        .route("/v1/events", get(export::newest))
        .route("/v1/plugins", get(plugins::list))
        .route(
            "/v1/plugins/{name}",
            get(plugins::show)
                .put(plugins::upload)
                .delete(plugins::remove),
        )
        .route("/v1/plugins/{name}/enable", post(plugins::enable))
        .route("/v1/plugins/{name}/disable", post(plugins::disable))
        .route("/v1/plugins/{name}/rollback", post(plugins::roll_back))
        .route(
            "/v1/plugins/{name}/shadow",
            get(candidates::report)
                .put(candidates::begin)
                .delete(candidates::end),
        )
        .route("/v1/plugins/{name}/promote", post(candidates::promote))
        .route("/v1/plugins/{name}/replay", post(candidates::replay));
    let routes = routes
        .fallback(nothing_here)
        .method_not_allowed_fallback(other_method);
    routes
        .layer(middleware::from_fn(refuse_pages))
        .layer(middleware::from_fn_with_state(
            Arc::clone(&state),
            cors::refuse_other_names,
        ))
        .layer(middleware::from_fn_with_state(
            Arc::clone(&state),
            count_refusals,
        ))
        .with_state(state)
}

/// What stands around every route: origins outermost, so that a page may read errors, too.
fn finish(routes: Router<Arc<State>>, state: Arc<State>) -> Router {
    routes
        .fallback(nothing_here)
        .method_not_allowed_fallback(other_method)
        .layer(middleware::from_fn(refuse_surplus))
        .layer(middleware::from_fn_with_state(
            Arc::clone(&state),
            cors::refuse_other_names,
        ))
        .layer(middleware::from_fn_with_state(
            Arc::clone(&state),
            count_refusals,
        ))
        .layer(middleware::from_fn_with_state(
            Arc::clone(&state),
            cors::apply,
        ))
        .with_state(state)
}

/// The `[limits]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Bytes of one event with all its fields: `[ingest] max_event_bytes`, and not a key of this section.
    #[serde(skip)]
    pub event_bytes: usize,
    /// Bytes of a batch (4 MiB).
    pub batch_bytes: usize,
    /// Events of a batch (10,000).
    pub batch_events: usize,
    /// Requests to publish that are worked on at once (64); another waits for its turn, and after `publish_wait_s` is refused with 503.
    pub publish_requests: usize,
    /// Seconds that a request to publish waits for its turn (5).
    pub publish_wait_s: u64,
    /// Seconds that a client has to send a body (30).
    pub body_timeout_s: u64,
    /// Seconds that a request to read notifications waits for the broker (5).
    pub read_wait_s: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            event_bytes: 256 * 1024,
            batch_bytes: 4 * 1024 * 1024,
            batch_events: 10_000,
            publish_requests: 64,
            publish_wait_s: 5,
            body_timeout_s: 30,
            read_wait_s: 5,
        }
    }
}

/// What the handlers of a node share.
#[derive(Debug)]
pub struct State {
    /// Empty until the broker answered for the first time: the listeners are up before it is.
    broker: OnceLock<Arc<dyn Broker>>,
    /// Empty as long as there is no broker.
    hub: OnceLock<Hub>,
    /// As the hub.
    bookmarks: OnceLock<Bookmarks>,
    /// For trying events out; empty until the plugins are loaded.
    pipeline: OnceLock<Pipeline>,
    pulse: Pulse,
    auth: Auth,
    readiness: Readiness,
    metrics: Metrics,
    limits: Limits,
    retention: Retention,
    origins: Origins,
    /// Bounds the bodies held in memory.
    publishing: Semaphore,
    /// One file of a plugin at a time: it may be large, and takes a processor for seconds.
    uploading: Arc<Semaphore>,
    /// Orders of operators that are being carried out, or wait for one another.
    ordering: Arc<Semaphore>,
    /// One candidate at a time is asked about past events.
    rehearsing: Semaphore,
}

impl State {
    pub fn new(
        auth: Auth,
        origins: Origins,
        limits: Limits,
        retention: Retention,
        readiness: Readiness,
        metrics: Metrics,
        pulse: Pulse,
    ) -> Self {
        let publishing = Semaphore::new(limits.publish_requests.clamp(1, Semaphore::MAX_PERMITS));
        Self {
            broker: OnceLock::new(),
            hub: OnceLock::new(),
            bookmarks: OnceLock::new(),
            pipeline: OnceLock::new(),
            pulse,
            auth,
            readiness,
            metrics,
            limits,
            retention,
            origins,
            publishing,
            uploading: Arc::new(Semaphore::new(1)),
            ordering: Arc::new(Semaphore::new(MAX_ORDERS)),
            rehearsing: Semaphore::new(1),
        }
    }

    /// Gives the handlers their broker and the hub that listens to it; a second one is ignored.
    pub fn set_broker(&self, broker: Arc<dyn Broker>, hub: Hub) {
        let bookmarks = Bookmarks::new(Arc::clone(&broker));
        if self.broker.set(broker).is_err()
            || self.bookmarks.set(bookmarks).is_err()
            || self.hub.set(hub).is_err()
        {
            tracing::debug!("the broker was there already");
        }
    }

    /// Gives the handlers the plugins, to try events out; a second one is ignored.
    pub fn set_pipeline(&self, pipeline: Pipeline) {
        if self.pipeline.set(pipeline).is_err() {
            tracing::debug!("the pipeline was there already");
        }
    }

    /// The hub; `None` as long as the broker never answered.
    pub fn hub(&self) -> Option<&Hub> {
        self.hub.get()
    }

    /// The users' bookmarks.
    ///
    /// # Errors
    /// 503 as long as the broker never answered.
    pub fn bookmarks(&self) -> Result<&Bookmarks, ApiError> {
        self.bookmarks
            .get()
            .ok_or_else(|| ApiError::away("this node has not reached its broker yet"))
    }

    /// The plugins.
    ///
    /// # Errors
    /// 503 as long as they are being loaded.
    pub fn pipeline(&self) -> Result<&Pipeline, ApiError> {
        self.pipeline
            .get()
            .ok_or_else(|| ApiError::away("the plugins of this node are still being loaded"))
    }

    pub fn pulse(&self) -> &Pulse {
        &self.pulse
    }

    /// The broker.
    ///
    /// # Errors
    /// 503 as long as it never answered.
    pub fn broker(&self) -> Result<&Arc<dyn Broker>, ApiError> {
        self.broker
            .get()
            .ok_or_else(|| ApiError::away("this node has not reached its broker yet"))
    }

    pub fn auth(&self) -> &Auth {
        &self.auth
    }

    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    pub fn readiness(&self) -> &Readiness {
        &self.readiness
    }
}

/// Proof that the request showed the key (or that the node is in dev mode): a handler that takes one cannot forget to ask.
struct Keyed;

impl FromRequestParts<Arc<State>> for Keyed {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &Arc<State>) -> Result<Self, ApiError> {
        state.auth.authorize_key(parts)?;
        Ok(Self)
    }
}

/// The most orders of operators at once.
const MAX_ORDERS: usize = 8;

/// Of a body that is too large, so much is received and thrown away before it is refused.
const MAX_THROWN_AWAY: usize = 16 * 1024 * 1024;

/// Reads a whole body.
///
/// # Errors
/// 413 above `max` bytes, 408 when it takes longer than `wait`, 400 when it breaks off.
async fn read_body(mut body: Body, max: usize, wait: Duration) -> Result<Bytes, ApiError> {
    let too_large = || ApiError::too_large(format!("the body is larger than {max} bytes"));
    let is_too_large = body.size_hint().lower() > max as u64;
    let read = async {
        if !is_too_large {
            match Limited::new(&mut body, max).collect().await {
                Err(e) if e.is::<LengthLimitError>() => {}
                read => return read.map(|body| Some(body.to_bytes())),
            }
        }
        // A client that is still sending when the connection is closed sees a broken pipe in place of the answer.
        let mut rest = Limited::new(body, MAX_THROWN_AWAY);
        while rest.frame().await.is_some_and(|frame| frame.is_ok()) {}
        Ok(None)
    };
    match tokio::time::timeout(wait, read).await {
        Err(_) if is_too_large => Err(too_large()),
        Err(_) => Err(ApiError::timeout(format!(
            "the body did not arrive within {} s",
            wait.as_secs()
        ))),
        Ok(Ok(None)) => Err(too_large()),
        Ok(Err(e)) => {
            Err(ApiError::bad_request("the body broke off").cause(anyhow::Error::from_boxed(e)))
        }
        Ok(Ok(Some(body))) => Ok(body),
    }
}

async fn nothing_here(request: Request) -> ApiError {
    ApiError::not_found(format!("there is nothing at {}", request.uri().path().escape_debug()))
        .fix("GET /v1/openapi.json lists the paths of both listeners: applications have one, operators the other")
}

async fn other_method(request: Request) -> ApiError {
    ApiError::method_not_allowed(format!(
        "{} takes no {}",
        request.uri().path().escape_debug(),
        request.method()
    ))
}

/// Tells a connection above the bound that it is too many. A stream is let through to say it in its own words, with 200 and a `retry`,
/// because an `EventSource` stops for ever on any other status.
async fn refuse_surplus(request: Request, next: Next) -> Response {
    let is_surplus = request
        .extensions()
        .get::<Arc<Connection>>()
        .is_some_and(|connection| connection.is_surplus());
    if is_surplus && request.uri().path() != "/v1/stream" {
        return ApiError::overloaded("this node has as many connections as it takes")
            .into_response();
    }
    next.run(request).await
}

/// Nothing is changed for a page in somebody's browser: a node in dev mode asks for no key, and whoever visits a page would be its operator.
async fn refuse_pages(request: Request, next: Next) -> Response {
    if !request.method().is_safe() && request.headers().contains_key(ORIGIN) {
        return ApiError::forbidden("pages in a browser change nothing here")
            .fix("send it without the header Origin")
            .into_response();
    }
    next.run(request).await
}

async fn count_refusals(
    axum::extract::State(state): axum::extract::State<Arc<State>>,
    request: Request,
    next: Next,
) -> Response {
    let response = next.run(request).await;
    if let Some(error::Refused(reason)) = response.extensions().get() {
        state
            .metrics
            .requests_refused
            .get_or_create(&ReasonLabel { reason })
            .inc();
    }
    response
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;

    use crate::auth;
    use crate::broker::fake::FakeBroker;
    use crate::http::site::Site;

    #[tokio::test]
    async fn every_error_is_json_with_a_text() {
        let site = Site::dev(FakeBroker::default());
        for (method, path, status) in [
            ("GET", "/nothing", StatusCode::NOT_FOUND),
            ("GET", "/v1/events", StatusCode::METHOD_NOT_ALLOWED),
            ("GET", "/v1/groups/a%0Ab/members/u", StatusCode::BAD_REQUEST),
            ("GET", "/v1/groups/%FF/members/u", StatusCode::BAD_REQUEST),
            ("GET", "/v1/dead?limit=x", StatusCode::BAD_REQUEST),
        ] {
            let (found, _, body) = site.request(method, path, &[], "").await;
            assert_eq!(found, status, "{method} {path}");
            assert!(
                body["error"].as_str().is_some_and(|text| !text.is_empty()),
                "{method} {path}: {body}"
            );
        }
        assert!(
            site.state
                .metrics()
                .render()
                .contains("pointsman_requests_refused_total{reason=\"not-found\"} 1")
        );
    }

    #[tokio::test]
    async fn without_the_key_nothing_is_written_or_shown() {
        let config = auth::Config {
            jwt_secret: Some("0123456789abcdef0123456789abcdef".into()),
            key: Some("publisher-key-0001".into()),
            ..Default::default()
        };
        let site = Site::new(FakeBroker::default(), config);
        for (method, path) in [
            ("POST", "/v1/events"),
            ("PUT", "/v1/groups/ops/members/ann"),
            ("DELETE", "/v1/groups/ops/members/ann"),
            ("GET", "/v1/groups/ops/members/ann"),
            ("GET", "/v1/users/ann/attributes"),
            ("PUT", "/v1/users/ann/attributes"),
            ("DELETE", "/v1/users/ann/attributes"),
            ("GET", "/v1/dead"),
            ("GET", "/v1/dead/0/1-0"),
            ("DELETE", "/v1/dead/0/1-0"),
            ("POST", "/v1/dead/0/1-0/redrive"),
        ] {
            let (status, headers, _) = site.request(method, path, &[], "{}").await;
            assert_eq!(status, StatusCode::UNAUTHORIZED, "{method} {path}");
            assert_eq!(headers["www-authenticate"], "Bearer");
            let (status, headers, _) = site
                .request(method, path, &[("authorization", "Bearer wrong")], "{}")
                .await;
            assert_eq!(status, StatusCode::UNAUTHORIZED, "{method} {path}");
            assert_eq!(
                headers["www-authenticate"],
                "Bearer error=\"invalid_token\""
            );
        }
        let (status, ..) = site
            .request(
                "PUT",
                "/v1/groups/ops/members/ann",
                &[("authorization", "Bearer publisher-key-0001")],
                "",
            )
            .await;
        assert_eq!(status, StatusCode::NO_CONTENT);
        // The page is for dev mode.
        assert_eq!(
            site.request("GET", "/", &[], "").await.0,
            StatusCode::NOT_FOUND
        );
    }

    #[tokio::test]
    async fn before_the_broker_answered_requests_are_asked_to_come_again() {
        let site = Site::without_broker();
        let (status, headers, _) = site
            .request("PUT", "/v1/groups/ops/members/ann", &[], "")
            .await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(headers.contains_key("retry-after"));
    }
}
