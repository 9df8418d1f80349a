//! Every route in one list, the state that the handlers share, and the extractors and middleware
//! around them.
//!
//! Handlers parse a request, call the module that owns the concept, and build the response; they
//! make no decisions. Only this file and the files under `http/` know status codes. Sockets are
//! handled in `server`, identities in `auth`, and the bytes of a stream in `sse`.

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
use crate::delivery::device_cursors::DeviceCursors;
use crate::delivery::hub::Hub;
use crate::delivery::sse::StreamTimer;
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

/// The routes of the public listener.
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

/// The routes of the admin listener. Reads need no key, except those that show payloads or user
/// data; every change needs one. Responses have no CORS headers, so that pages of other origins
/// cannot read them.
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

/// The layers around every public route. CORS is outermost, so that pages can also read error
/// responses.
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
    /// The maximum size of one event with all its fields, in bytes. Set by
    /// `ingest.max_event_bytes`; not a key of this section.
    #[serde(skip)]
    pub event_bytes: usize,
    /// The maximum size of a batch in bytes (4 MiB).
    pub batch_bytes: usize,
    /// The maximum number of events in a batch (10,000).
    pub batch_events: usize,
    /// The maximum number of concurrent publish requests (64). Further requests wait up to
    /// `publish_wait_s` and are then refused with 503.
    pub publish_requests: usize,
    /// Seconds that a publish request waits for its turn (5).
    pub publish_wait_s: u64,
    /// Seconds that a client has to send a request body (30).
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

/// The state that the handlers of a node share.
#[derive(Debug)]
pub struct State {
    /// Empty until the broker has answered once: the listeners start before that.
    broker: OnceLock<Arc<dyn Broker>>,
    /// Set together with the broker.
    hub: OnceLock<Hub>,
    /// Set together with the broker.
    device_cursors: OnceLock<DeviceCursors>,
    /// For dry runs and for the plugin routes; empty until the plugins are loaded.
    pipeline: OnceLock<Pipeline>,
    stream_timer: StreamTimer,
    auth: Auth,
    readiness: Readiness,
    metrics: Metrics,
    limits: Limits,
    retention: Retention,
    origins: Origins,
    /// Bounds the bodies that publish requests hold in memory.
    publishing: Semaphore,
    /// One plugin upload at a time: a file may be large, and compiling it takes a processor for
    /// seconds.
    uploading: Arc<Semaphore>,
    /// Bounds the admin commands that run or wait for one another.
    ordering: Arc<Semaphore>,
    /// One backtest at a time.
    backtesting: Semaphore,
}

impl State {
    pub fn new(
        auth: Auth,
        origins: Origins,
        limits: Limits,
        retention: Retention,
        readiness: Readiness,
        metrics: Metrics,
        stream_timer: StreamTimer,
    ) -> Self {
        let publishing = Semaphore::new(limits.publish_requests.clamp(1, Semaphore::MAX_PERMITS));
        Self {
            broker: OnceLock::new(),
            hub: OnceLock::new(),
            device_cursors: OnceLock::new(),
            pipeline: OnceLock::new(),
            stream_timer,
            auth,
            readiness,
            metrics,
            limits,
            retention,
            origins,
            publishing,
            uploading: Arc::new(Semaphore::new(1)),
            ordering: Arc::new(Semaphore::new(MAX_ORDERS)),
            backtesting: Semaphore::new(1),
        }
    }

    /// Sets the broker and the hub that follows it. Later calls are ignored.
    pub fn set_broker(&self, broker: Arc<dyn Broker>, hub: Hub) {
        // The hub is set last: a handler that sees it finds the other two as well.
        let device_cursors = DeviceCursors::new(Arc::clone(&broker));
        if self.broker.set(broker).is_err()
            || self.device_cursors.set(device_cursors).is_err()
            || self.hub.set(hub).is_err()
        {
            tracing::debug!("the broker is already set; a second one is ignored");
        }
    }

    /// Sets the pipeline. Later calls are ignored.
    pub fn set_pipeline(&self, pipeline: Pipeline) {
        if self.pipeline.set(pipeline).is_err() {
            tracing::debug!("the pipeline is already set; a second one is ignored");
        }
    }

    /// The hub, or `None` until the broker has answered once.
    pub fn hub(&self) -> Option<&Hub> {
        self.hub.get()
    }

    /// The device cursors and read markers of users.
    ///
    /// # Errors
    /// 503 until the broker has answered once.
    pub fn device_cursors(&self) -> Result<&DeviceCursors, ApiError> {
        self.device_cursors
            .get()
            .ok_or_else(|| ApiError::unavailable("this node has not reached its broker yet"))
    }

    /// The pipeline of loaded plugins.
    ///
    /// # Errors
    /// 503 until the plugins are loaded.
    pub fn pipeline(&self) -> Result<&Pipeline, ApiError> {
        self.pipeline
            .get()
            .ok_or_else(|| ApiError::unavailable("this node is still loading its plugins"))
    }

    pub fn stream_timer(&self) -> &StreamTimer {
        &self.stream_timer
    }

    /// The broker.
    ///
    /// # Errors
    /// 503 until the broker has answered once.
    pub fn broker(&self) -> Result<&Arc<dyn Broker>, ApiError> {
        self.broker
            .get()
            .ok_or_else(|| ApiError::unavailable("this node has not reached its broker yet"))
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

/// Proof that the request carried the API key, or that the node is in dev mode. A handler that
/// takes it as an argument cannot forget the check.
struct Keyed;

impl FromRequestParts<Arc<State>> for Keyed {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &Arc<State>) -> Result<Self, ApiError> {
        state.auth.authorize_key(parts)?;
        Ok(Self)
    }
}

/// The maximum number of concurrent admin commands.
const MAX_ORDERS: usize = 8;

/// How many bytes of an oversized body are read and discarded before it is refused.
const MAX_THROWN_AWAY: usize = 16 * 1024 * 1024;

/// Reads a whole body.
///
/// # Errors
/// 413 above `max` bytes, 408 if it takes longer than `wait`, 400 if it ends early.
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
        // Drain the rest first: a client that is still sending when the connection closes sees a
        // broken pipe instead of the response.
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
            Err(ApiError::bad_request("the body ended early").cause(anyhow::Error::from_boxed(e)))
        }
        Ok(Ok(Some(body))) => Ok(body),
    }
}

async fn nothing_here(request: Request) -> ApiError {
    ApiError::not_found(format!(
        "there is nothing at {}",
        request.uri().path().escape_debug()
    ))
    .fix("GET /v1/openapi.json lists the paths of the public and the admin listener")
}

async fn other_method(request: Request) -> ApiError {
    ApiError::method_not_allowed(format!(
        "{} does not support {}",
        request.uri().path().escape_debug(),
        request.method()
    ))
}

/// Refuses a connection above the limit. A stream request passes, because it reports the limit in
/// band, with 200 and a `retry`: an `EventSource` never reconnects after any other status.
async fn refuse_surplus(request: Request, next: Next) -> Response {
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
async fn refuse_pages(request: Request, next: Next) -> Response {
    if !request.method().is_safe() && request.headers().contains_key(ORIGIN) {
        return ApiError::forbidden("the admin listener accepts no changes from browser pages")
            .fix("send the request without the Origin header")
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
    async fn every_error_is_json_with_a_message() {
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
    async fn without_the_api_key_nothing_is_written_or_shown() {
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
        // The demo page exists in dev mode only.
        assert_eq!(
            site.request("GET", "/", &[], "").await.0,
            StatusCode::NOT_FOUND
        );
    }

    #[tokio::test]
    async fn requests_before_the_first_broker_answer_get_503_with_retry_after() {
        let site = Site::without_broker();
        let (status, headers, _) = site
            .request("PUT", "/v1/groups/ops/members/ann", &[], "")
            .await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(headers.contains_key("retry-after"));
    }
}
