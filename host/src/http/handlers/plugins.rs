//! `/v1/plugins` on the admin listener: the plugins with their state and health, and the admin
//! commands that change them.
//!
//! Commands run on the blocking pool, because compiling takes seconds. The response is sent when
//! the command has taken effect.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract;
use axum::http::StatusCode;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::OwnedSemaphorePermit;

use crate::http::body::{self, Timeouts};
use crate::http::extract::{ApiKey, Path, Query};
use crate::http::{ApiError, State};
use crate::plugin::MAX_FILE_BYTES;
use crate::plugin::registry::state::PluginState;
use crate::plugin::registry::{AdminError, Registry};

/// How long an upload may take; longer than for events, because files are larger.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(120);

#[derive(Debug, Serialize)]
pub(in crate::http) struct Listed {
    plugins: Vec<PluginState>,
    /// Why the plugin folder cannot be read. Active plugins stay active.
    folder_failure: Option<String>,
}

/// `GET /v1/plugins`.
pub(in crate::http) async fn list(
    extract::State(state): extract::State<Arc<State>>,
) -> Result<Json<Listed>, ApiError> {
    let registry = state.pipeline()?.registry();
    let folder_failure = registry.changes().borrow().folder_failure.clone();
    Ok(Json(Listed {
        plugins: registry.states(),
        folder_failure,
    }))
}

/// `GET /v1/plugins/{name}`.
pub(in crate::http) async fn show(
    extract::State(state): extract::State<Arc<State>>,
    Path(name): Path<String>,
) -> Result<Json<PluginState>, ApiError> {
    let states = state.pipeline()?.registry().states();
    let found = states.into_iter().find(|plugin| plugin.name == name);
    found
        .map(Json)
        .ok_or_else(|| AdminError::Unknown(name).into())
}

/// The query of [`upload`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct UploadOptions {
    /// Whether the file adds a plugin instead of replacing one.
    #[serde(default)]
    create: bool,
}

/// `PUT /v1/plugins/{name}?create=BOOL` with the bytes of a plugin file.
pub(in crate::http) async fn upload(
    extract::State(state): extract::State<Arc<State>>,
    _: ApiKey,
    Path(name): Path<String>,
    Query(UploadOptions { create }): Query<UploadOptions>,
    body: Body,
) -> Result<Json<PluginState>, ApiError> {
    // Before the body is read, so that a mistyped name is refused without an upload.
    state.pipeline()?.registry().check_upload(&name, create)?;
    let (file, permit) = receive(&state, body).await?;
    let upload = move |registry: &Registry| {
        // Held until the upload is complete: a client that disconnects must not free the permit
        // early.
        let _permit = permit;
        registry.upload(&name, &file, create)
    };
    run_command(&state, upload).await.map(Json)
}

/// `DELETE /v1/plugins/{name}`.
pub(in crate::http) async fn remove(
    extract::State(state): extract::State<Arc<State>>,
    _: ApiKey,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    run_command(&state, move |registry| registry.remove(&name)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /v1/plugins/{name}/enable`.
pub(in crate::http) async fn enable(
    state: extract::State<Arc<State>>,
    _: ApiKey,
    Path(name): Path<String>,
) -> Result<Json<PluginState>, ApiError> {
    run_command(&state, move |registry| registry.enable(&name))
        .await
        .map(Json)
}

/// `POST /v1/plugins/{name}/disable`.
pub(in crate::http) async fn disable(
    state: extract::State<Arc<State>>,
    _: ApiKey,
    Path(name): Path<String>,
) -> Result<Json<PluginState>, ApiError> {
    run_command(&state, move |registry| registry.disable(&name))
        .await
        .map(Json)
}

/// `POST /v1/plugins/{name}/rollback`.
pub(in crate::http) async fn roll_back(
    state: extract::State<Arc<State>>,
    _: ApiKey,
    Path(name): Path<String>,
) -> Result<Json<PluginState>, ApiError> {
    run_command(&state, move |registry| registry.roll_back(&name))
        .await
        .map(Json)
}

/// Reads an uploaded file. The returned permit bounds the files in memory to one.
///
/// # Errors
/// 503 while another file is being uploaded; otherwise those of [`body::read`].
pub(in crate::http) async fn receive(
    state: &State,
    body: Body,
) -> Result<(Bytes, OwnedSemaphorePermit), ApiError> {
    let busy = |_| ApiError::overloaded("another plugin is being uploaded to this node");
    let permit = Arc::clone(&state.uploading)
        .try_acquire_owned()
        .map_err(busy)?;
    let timeouts = Timeouts {
        total: UPLOAD_TIMEOUT,
        // Bounds how long an upload that sends nothing keeps others out.
        stall: state.limits.body_stall_timeout,
    };
    let file = body::read(body, MAX_FILE_BYTES, timeouts, None).await?;
    Ok((file, permit))
}

/// Runs an admin command on the blocking pool. It completes even if the client disconnects.
///
/// # Errors
/// 503 while too many commands run or the plugins are loading; otherwise the command's own
/// error.
pub(in crate::http) async fn run_command<T: Send + 'static>(
    state: &State,
    command: impl FnOnce(&Registry) -> Result<T, AdminError> + Send + 'static,
) -> Result<T, ApiError> {
    let registry = Arc::clone(state.pipeline()?.registry());
    // The blocking pool is shared with the reads of an embedded broker.
    let busy = |_| {
        ApiError::overloaded("this node is already running as many admin commands as it allows")
    };
    let permit = Arc::clone(&state.ordering)
        .try_acquire_owned()
        .map_err(busy)?;
    let command = move || {
        let _permit = permit;
        command(&registry)
    };
    let done = tokio::task::spawn_blocking(command).await;
    done.map_err(|panic| ApiError::internal("the admin command panicked").cause(panic))?
        .map_err(ApiError::from)
}

impl From<AdminError> for ApiError {
    fn from(error: AdminError) -> Self {
        let text = error.to_string();
        match error {
            AdminError::Unknown(_) => Self::not_found(text).fix("GET /v1/plugins lists them"),
            AdminError::New(_) => Self::not_found(text),
            AdminError::NoCandidate(_) => Self::not_found(text)
                .fix("PUT its file or configuration to /v1/plugins/NAME/shadow"),
            AdminError::Impossible(_) => Self::conflict(text),
            AdminError::InvalidFile(_) => {
                Self::unprocessable(text).fix("the previous version keeps running")
            }
            AdminError::InvalidConfig(_) => Self::unprocessable(text),
            AdminError::Folder(_) => Self::internal(text),
        }
    }
}
