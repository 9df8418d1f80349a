//! `GET /v1/decisions` on the admin listener: the outcomes of the newest events and the reasons.
//! `explain` covers which users one of them reached.

use std::sync::Arc;

use axum::Json;
use axum::extract;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::explain::DecidedEvent;
use crate::http::extract::{Query, Reserved};
use crate::http::{ApiError, State};

/// The maximum number of decisions of a partition in one response.
const MAX_LIMIT: usize = 1_000;
/// The maximum size of a response in bytes, divided among the partitions; beyond it, the oldest
/// decisions of a partition are left out.
const MAX_BYTES: usize = 4 * 1024 * 1024;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Options {
    /// The maximum number of decisions of each partition, newest first (100).
    limit: Option<usize>,
    /// Only decisions about events with this CloudEvents `id`, among the newest.
    event_id: Option<String>,
}

/// Returns the newest decisions of each partition.
///
/// # Errors
/// 400 for an invalid query, 503 while the broker is unavailable or too many bytes of responses are
/// under way.
pub(in crate::http) async fn list(
    extract::State(state): extract::State<Arc<State>>,
    Query(options): Query<Options>,
    _: Reserved,
) -> Result<Json<Vec<Box<RawValue>>>, ApiError> {
    let limit = options.limit.unwrap_or(100).clamp(1, MAX_LIMIT);
    let broker = state.broker()?;
    let mut all = Vec::new();
    for partition in broker.partitions() {
        // A search for one event covers as many decisions as a response may hold.
        let reach = if options.event_id.is_some() {
            MAX_LIMIT
        } else {
            limit
        };
        let decisions = broker.decisions(partition.number, reach).await?.into_iter();
        let wanted = decisions
            .filter(|(.., decision)| {
                options
                    .event_id
                    .as_ref()
                    .is_none_or(|id| *id == decision.event_id)
            })
            .take(limit);
        let mut n_left = MAX_BYTES / broker.partitions().len();
        for (entry, outcome, notification, decision) in wanted {
            let decided = DecidedEvent {
                partition: partition.number,
                entry,
                outcome,
                notification,
                decision,
            };
            let written = serde_json::value::to_raw_value(&decided)
                .map_err(|error| ApiError::internal("a decision cannot be written").cause(error))?;
            let Some(left) = n_left.checked_sub(written.get().len()) else {
                break;
            };
            n_left = left;
            all.push(written);
        }
    }
    Ok(Json(all))
}
