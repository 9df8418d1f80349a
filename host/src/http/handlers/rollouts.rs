//! `/v1/plugins/{name}/rollout` on the admin listener: roll a version of a plugin out over all nodes,
//! for a share of the partitions or all of them, and back.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract;
use axum::http::HeaderMap;
use serde::Deserialize;

use super::candidates::parts;
use super::plugins::{receive, run_command};
use crate::event::Name;
use crate::http::extract::{ApiKey, Path, Query};
use crate::http::{ApiError, State};
use crate::plugin::registry::Registry;
use crate::rollout::{RollbackReport, RolloutReport};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Options {
    /// The share of the partitions in percent, 0 to 100 (100).
    #[serde(default = "all")]
    share: u32,
    /// As for a candidate.
    config_bytes: Option<usize>,
}

fn all() -> u32 {
    100
}

/// `GET /v1/plugins/{name}/rollout`.
pub(in crate::http) async fn show(
    extract::State(state): extract::State<Arc<State>>,
    _: ApiKey,
    Path(name): Path<String>,
) -> Result<Json<RolloutReport>, ApiError> {
    let report = state.fleet()?.rollout(&plugin(&name)?).await?;
    report.map(Json).ok_or_else(|| none(&name))
}

/// `PUT /v1/plugins/{name}/rollout?share=PERCENT` with a version, as for a candidate; without a
/// body, the share of the present roll-out changes.
pub(in crate::http) async fn begin(
    extract::State(state): extract::State<Arc<State>>,
    _: ApiKey,
    Path(name): Path<String>,
    Query(options): Query<Options>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<RolloutReport>, ApiError> {
    if options.share > 100 {
        return Err(ApiError::bad_request(format!(
            "share is {}; use 0 to 100, in percent of the partitions",
            options.share
        )));
    }
    let fleet = state.fleet()?;
    let plugin = plugin(&name)?;
    let (body, permit) = receive(&state, body).await?;
    if body.is_empty() && options.config_bytes.is_none() {
        drop(permit);
        let report = fleet.set_share(&plugin, options.share).await?;
        return report.map(Json).ok_or_else(|| none(&name));
    }
    let parts = parts(&headers, options.config_bytes, body)?;
    let stage = move |registry: &Registry| {
        let _permit = permit;
        registry.stage(&name, parts)
    };
    let (from, to) = run_command(&state, stage).await?;
    let report = fleet.begin(&plugin, from, to, options.share).await?;
    Ok(Json(report))
}

/// `DELETE /v1/plugins/{name}/rollout`.
pub(in crate::http) async fn roll_back(
    extract::State(state): extract::State<Arc<State>>,
    _: ApiKey,
    Path(name): Path<String>,
) -> Result<Json<RollbackReport>, ApiError> {
    let report = state.fleet()?.roll_back(&plugin(&name)?).await?;
    report.map(Json).ok_or_else(|| none(&name))
}

fn plugin(name: &str) -> Result<Name, ApiError> {
    Name::parse(name).map_err(|_| none(name))
}

fn none(name: &str) -> ApiError {
    ApiError::not_found(format!(
        "the plugin '{}' has no roll-out",
        name.escape_debug()
    ))
    .fix("PUT a file or a configuration to /v1/plugins/NAME/rollout")
}
