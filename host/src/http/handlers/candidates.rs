//! Candidate routes of the admin listener: run a candidate in shadow on live events
//! (`/v1/plugins/{name}/shadow`), promote it to the active version (`/v1/plugins/{name}/promote`),
//! or backtest it on past events (`/v1/plugins/{name}/backtest`).
//!
//! A candidate is a plugin file, a configuration file with the new section of the plugin, or both:
//! `Content-Type: application/toml` marks a body as configuration, and `?config_bytes=N` a body
//! whose first N bytes are.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use serde::Deserialize;

use super::plugins::{receive, run_command};
use crate::http::extract::{ApiKey, Path, Query};
use crate::http::{ApiError, State};
use crate::plugin::registry::{AdminError, CandidateParts, Promotion, Registry};
use crate::plugin::shadow::ShadowReport;
use crate::preview::backtest::{self, BacktestReport, MAX_EVENTS};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct BodyOptions {
    /// How many bytes at the beginning of the body are a configuration file; a plugin file follows
    /// unless the body ends there.
    config_bytes: Option<usize>,
}

/// Takes a request body apart.
///
/// # Errors
/// 400 if the body is empty or shorter than its configuration, or if that is not UTF-8.
pub(super) fn parts(
    headers: &HeaderMap,
    config_bytes: Option<usize>,
    mut body: Bytes,
) -> Result<CandidateParts, ApiError> {
    let kind = headers
        .get(CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok())
        .and_then(|kind| kind.split(';').next())
        .unwrap_or_default();
    let is_toml = kind.trim().eq_ignore_ascii_case("application/toml");
    let n = config_bytes.unwrap_or(if is_toml { body.len() } else { 0 });
    if n > body.len() {
        return Err(ApiError::bad_request(format!(
            "config_bytes is {n}, but the body has {} bytes; send the configuration first and then the file",
            body.len()
        )));
    }
    if body.is_empty() {
        return Err(ApiError::bad_request(
            "the body is empty; send a plugin file, or a configuration with Content-Type: application/toml",
        ));
    }
    let config = body.split_to(n);
    let config = std::str::from_utf8(&config).map_err(|error| {
        ApiError::bad_request(format!("the configuration is not UTF-8: {error}"))
    })?;
    Ok(CandidateParts {
        config: (n > 0).then(|| config.to_owned()),
        file: (!body.is_empty()).then_some(body),
    })
}

/// `PUT /v1/plugins/{name}/shadow` with a candidate.
pub(in crate::http) async fn begin(
    extract::State(state): extract::State<Arc<State>>,
    _: ApiKey,
    Path(name): Path<String>,
    Query(options): Query<BodyOptions>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<ShadowReport>, ApiError> {
    let (body, permit) = receive(&state, body).await?;
    let parts = parts(&headers, options.config_bytes, body)?;
    let begin = move |registry: &Registry| {
        let _permit = permit;
        registry.begin_shadow(&name, parts)
    };
    run_command(&state, begin).await.map(Json)
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct ReportOptions {
    /// Sum the candidates on all nodes (false).
    #[serde(default)]
    all: bool,
}

/// `GET /v1/plugins/{name}/shadow`, and with `?all=true` the sum over all nodes.
pub(in crate::http) async fn report(
    extract::State(state): extract::State<Arc<State>>,
    // The report contains recipients and bodies.
    _: ApiKey,
    Path(name): Path<String>,
    Query(options): Query<ReportOptions>,
) -> Result<Response, ApiError> {
    if options.all {
        let sum = state.fleet()?.shadows(&name).await?;
        return sum
            .map(|sum| Json(sum).into_response())
            .ok_or_else(|| AdminError::NoCandidate(name).into());
    }
    Ok(Json(state.pipeline()?.registry().shadow(&name)?).into_response())
}

/// `DELETE /v1/plugins/{name}/shadow`.
pub(in crate::http) async fn end(
    extract::State(state): extract::State<Arc<State>>,
    _: ApiKey,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    state.pipeline()?.registry().end_shadow(&name)?;
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /v1/plugins/{name}/promote`, for the candidate in shadow or with one in the body.
pub(in crate::http) async fn promote(
    extract::State(state): extract::State<Arc<State>>,
    _: ApiKey,
    Path(name): Path<String>,
    Query(options): Query<BodyOptions>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Promotion>, ApiError> {
    let (body, permit) = receive(&state, body).await?;
    let parts = if body.is_empty() && options.config_bytes.is_none() {
        None
    } else {
        Some(parts(&headers, options.config_bytes, body)?)
    };
    let promote = move |registry: &Registry| {
        let _permit = permit;
        match parts {
            Some(parts) => registry.promote_parts(&name, parts),
            None => registry.promote(&name),
        }
    };
    run_command(&state, promote).await.map(Json)
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Options {
    /// How many of the newest decisions to use, over all sources together (1,000).
    #[serde(default = "default_limit")]
    limit: usize,
    /// As in [`BodyOptions`].
    config_bytes: Option<usize>,
}

fn default_limit() -> usize {
    1_000
}

/// `POST /v1/plugins/{name}/backtest?limit=N` with a candidate.
pub(in crate::http) async fn backtest(
    extract::State(state): extract::State<Arc<State>>,
    _: ApiKey,
    Path(name): Path<String>,
    Query(options): Query<Options>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<BacktestReport>, ApiError> {
    if !(1..=MAX_EVENTS).contains(&options.limit) {
        return Err(ApiError::bad_request(format!(
            "limit is {}; use 1 to {MAX_EVENTS}",
            options.limit
        )));
    }
    let busy = |_| ApiError::overloaded("another backtest is running on this node");
    // Taken before the body is read, so that a second request is refused without an upload.
    let _one = state.backtesting.try_acquire().map_err(busy)?;
    let broker = state.broker()?;
    let candidate = {
        let (body, permit) = receive(&state, body).await?;
        let parts = parts(&headers, options.config_bytes, body)?;
        let load = move |registry: &Registry| {
            let _permit = permit;
            registry.candidate_chain(&name, parts)
        };
        run_command(&state, load).await?
    };
    let registry = Arc::clone(state.pipeline()?.registry());
    Ok(Json(
        backtest::backtest(broker.as_ref(), registry, candidate, options.limit).await?,
    ))
}
