//! Candidate routes of the admin listener: run a candidate in shadow on live events
//! (`/v1/plugins/{name}/shadow`), promote it to the active version (`/v1/plugins/{name}/promote`),
//! or backtest it on past events (`/v1/plugins/{name}/backtest`).

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract;
use axum::http::StatusCode;
use serde::Deserialize;

use super::plugins::{receive, run_command};
use crate::http::extract::{ApiKey, Path, Query};
use crate::http::{ApiError, State};
use crate::plugin::registry::Registry;
use crate::plugin::registry::state::PluginState;
use crate::plugin::shadow::ShadowReport;
use crate::preview::backtest::{self, BacktestReport, MAX_EVENTS};

/// `PUT /v1/plugins/{name}/shadow` with the bytes of a plugin file.
pub(in crate::http) async fn begin(
    extract::State(state): extract::State<Arc<State>>,
    _: ApiKey,
    Path(name): Path<String>,
    body: Body,
) -> Result<Json<ShadowReport>, ApiError> {
    let (file, permit) = receive(&state, body).await?;
    let begin = move |registry: &Registry| {
        let _permit = permit;
        registry.begin_shadow(&name, file)
    };
    run_command(&state, begin).await.map(Json)
}

/// `GET /v1/plugins/{name}/shadow`.
pub(in crate::http) async fn report(
    extract::State(state): extract::State<Arc<State>>,
    // The report contains recipients and bodies.
    _: ApiKey,
    Path(name): Path<String>,
) -> Result<Json<ShadowReport>, ApiError> {
    Ok(Json(state.pipeline()?.registry().shadow(&name)?))
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

/// `POST /v1/plugins/{name}/promote`.
pub(in crate::http) async fn promote(
    extract::State(state): extract::State<Arc<State>>,
    _: ApiKey,
    Path(name): Path<String>,
) -> Result<Json<PluginState>, ApiError> {
    run_command(&state, move |registry| registry.promote(&name))
        .await
        .map(Json)
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Options {
    /// How many of the newest decisions to use, over all sources together (1,000).
    #[serde(default = "default_limit")]
    limit: usize,
}

fn default_limit() -> usize {
    1_000
}

/// `POST /v1/plugins/{name}/backtest?limit=N` with the bytes of a plugin file.
pub(in crate::http) async fn backtest(
    extract::State(state): extract::State<Arc<State>>,
    _: ApiKey,
    Path(name): Path<String>,
    Query(options): Query<Options>,
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
        let (file, permit) = receive(&state, body).await?;
        let load = move |registry: &Registry| {
            let _permit = permit;
            registry.candidate_chain(&name, &file)
        };
        run_command(&state, load).await?
    };
    let registry = Arc::clone(state.pipeline()?.registry());
    Ok(Json(
        backtest::backtest(broker.as_ref(), registry, candidate, options.limit).await?,
    ))
}
