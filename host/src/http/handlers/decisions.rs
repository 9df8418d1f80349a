//! `GET /v1/decisions` on the admin listener: what became of the newest events and why. Whom one of them reached, `explain` says.

use std::sync::Arc;

use axum::Json;
use axum::extract;
use serde::Deserialize;

use crate::explain::Decided;
use crate::http::{ApiError, Query, State};

/// The most decisions of a partition in one answer.
const MAX_LIMIT: usize = 1_000;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Options {
    /// Of each partition, newest first (100).
    limit: Option<usize>,
    /// Only those of events with this CloudEvents `id`, among the newest.
    event_id: Option<String>,
}

pub(in crate::http) async fn list(
    extract::State(state): extract::State<Arc<State>>,
    Query(options): Query<Options>,
) -> Result<Json<Vec<Decided>>, ApiError> {
    let limit = options.limit.unwrap_or(100).clamp(1, MAX_LIMIT);
    let broker = state.broker()?;
    let mut all = Vec::new();
    for partition in broker.partitions() {
        // Where one event is asked for, it is looked for as far back as an answer may reach.
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
        all.extend(
            wanted.map(|(entry, outcome, notification, decision)| Decided {
                partition: partition.number,
                entry,
                outcome,
                notification,
                decision,
            }),
        );
    }
    Ok(Json(all))
}
