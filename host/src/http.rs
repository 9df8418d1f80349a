//! Every route in one list, the state that the handlers share, and the extractors and middleware
//! around them.
//!
//! Handlers parse a request, call the module that owns the concept, and build the response; they
//! make no decisions. Only this file and the files under `http/` know status codes. Sockets are
//! handled in `server`, identities in `auth`, and the bytes of a stream in `sse`.

use std::sync::Arc;

use axum::Router;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::{get, post, put};

mod body;
pub mod cloudevents;
mod coding;
mod cors;
mod default_type;
mod error;
mod extract;
mod handlers;
mod middleware;
mod openapi;
mod origins;
#[cfg(test)]
mod site;
mod state;
mod turns;

pub use error::ApiError;
pub use origins::Origins;
pub use state::{Limits, Settings, State};

use handlers::{
    acks, candidates, dead_letters, decisions, events, explain, export, health, members,
    notifications, page, plugins, rollouts, stream, tickets, users,
};
use middleware::{
    bound_addresses, count_refusals, hold_admin_responses, hold_responses, keep_private,
    nothing_here, other_method, refuse_ambiguous, refuse_pages, refuse_surplus,
};

/// The routes of the public listener.
pub fn routes(state: Arc<State>) -> Router {
    let personal = Router::new()
        .route("/v1/notifications", get(notifications::page))
        .route("/v1/acks", post(acks::acknowledge))
        .route("/v1/tickets", post(tickets::issue))
        .route(
            "/v1/groups/{group}/members/{user}",
            put(members::join).delete(members::leave).get(members::show),
        )
        .route(
            "/v1/users/{user}/attributes",
            get(users::show).put(users::replace).delete(users::clear),
        )
        .route("/v1/dead-letters", get(dead_letters::list))
        .route(
            "/v1/dead-letters/{partition}/{id}",
            get(dead_letters::show).delete(dead_letters::drop),
        )
        .route(
            "/v1/dead-letters/{partition}/{id}/redrive",
            post(dead_letters::redrive),
        )
        .layer(from_fn_with_state(Arc::clone(&state), hold_responses))
        .layer(from_fn(keep_private));
    let publish = Router::new()
        .route(
            "/v1/events",
            post(events::publish).options(events::validate_webhook),
        )
        .layer(from_fn_with_state(Arc::clone(&state), hold_responses));
    // Documents are shared by all their responses, and a stream is bounded by `delivery`.
    let mut routes = Router::new()
        .route("/v1/openapi.json", get(openapi::document))
        .route("/v1/ready", get(health::is_ready_for_streams))
        .route("/v1/stream", get(stream::open))
        .merge(publish)
        .merge(personal);
    if state.auth.is_dev() {
        routes = routes.merge(page::routes());
    }
    finish(routes, state)
}

/// The routes of the admin listener. Reads need no key, except those that show payloads or user
/// data; every change needs one. Responses have no CORS headers, so that pages of other origins
/// cannot read them.
pub fn admin_routes(state: Arc<State>) -> Router {
    let personal = Router::new()
        .route("/v1/decisions", get(decisions::list))
        .route("/v1/explain", get(explain::explain))
        .route("/v1/events", get(export::newest))
        .layer(from_fn_with_state(Arc::clone(&state), hold_admin_responses))
        .layer(from_fn(keep_private));
    let held = Router::new()
        .route("/metrics", get(health::metrics))
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
        .route(
            "/v1/plugins/{name}/rollout",
            get(rollouts::show)
                .put(rollouts::begin)
                .delete(rollouts::roll_back),
        )
        .route("/v1/plugins/{name}/promote", post(candidates::promote))
        .route("/v1/plugins/{name}/backtest", post(candidates::backtest))
        .layer(from_fn_with_state(Arc::clone(&state), hold_admin_responses));
    // Probes are answered in any case.
    let routes = Router::new()
        .route("/v1/openapi.json", get(openapi::document))
        .route("/healthz", get(health::is_alive))
        .route("/readyz", get(health::is_ready))
        .merge(held)
        .merge(personal);
    let routes = routes
        .fallback(nothing_here)
        .method_not_allowed_fallback(other_method);
    routes
        .layer(from_fn(refuse_pages))
        .layer(from_fn(refuse_ambiguous))
        .layer(from_fn_with_state(
            Arc::clone(&state),
            cors::refuse_unknown_admin_names,
        ))
        .layer(from_fn_with_state(
            Arc::clone(&state),
            cors::refuse_other_names,
        ))
        .layer(from_fn_with_state(Arc::clone(&state), count_refusals))
        .with_state(state)
}

/// The layers around every public route. CORS is outermost, so that pages can also read error
/// responses.
fn finish(routes: Router<Arc<State>>, state: Arc<State>) -> Router {
    routes
        .fallback(nothing_here)
        .method_not_allowed_fallback(other_method)
        .layer(from_fn_with_state(Arc::clone(&state), bound_addresses))
        .layer(from_fn(refuse_surplus))
        .layer(from_fn(refuse_ambiguous))
        .layer(from_fn_with_state(
            Arc::clone(&state),
            cors::refuse_foreign_pages,
        ))
        .layer(from_fn_with_state(
            Arc::clone(&state),
            cors::refuse_other_names,
        ))
        .layer(from_fn_with_state(Arc::clone(&state), count_refusals))
        .layer(from_fn_with_state(Arc::clone(&state), cors::apply))
        .with_state(state)
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
            ("GET", "/v1/dead-letters?limit=x", StatusCode::BAD_REQUEST),
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
                .contains("pointsman_requests_refused_total{reason=\"not_found\"} 1")
        );
    }

    #[tokio::test]
    async fn without_the_api_key_nothing_is_written_or_shown() {
        let config = auth::Config {
            jwt_secret: Some("0123456789abcdef0123456789abcdef".into()),
            api_key: Some("publisher-key-0001".into()),
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
            ("GET", "/v1/dead-letters"),
            ("GET", "/v1/dead-letters/0/1-0"),
            ("DELETE", "/v1/dead-letters/0/1-0"),
            ("POST", "/v1/dead-letters/0/1-0/redrive"),
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
