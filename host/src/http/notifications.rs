//! `GET /v1/notifications?after=CURSOR`: the same logs as JSON, for who cannot hold a stream open.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Request, State as Shared};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::clock::now_ms;
use crate::event::{Name, NotificationId};
use crate::sse;
use crate::subscription::{Next, Start};

use super::stream::{Selection, read_start};
use super::{ApiError, Query, State};

#[derive(Debug, Deserialize)]
pub(super) struct Asked {
    /// A cursor, as in `id:`; or as `/v1/stream` takes it. Without one, from the earliest.
    after: Option<String>,
    limit: Option<usize>,
}

const DEFAULT_LIMIT: usize = 100;
const MAX_LIMIT: usize = 1_000;

#[derive(Debug, Serialize)]
pub(super) struct Page {
    notifications: Vec<Item>,
    /// Stretches of history of which something may be missing.
    gaps: Vec<Missing>,
    /// What to ask for next, and what a stream may begin with.
    cursor: String,
    /// Whether asking on would answer more now.
    more: bool,
}

#[derive(Debug, Serialize)]
struct Item {
    /// The cursor after this one.
    id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    event: Option<Name>,
    data: Box<RawValue>,
}

#[derive(Debug, Serialize)]
struct Missing {
    reason: &'static str,
    partition: u8,
    from: NotificationId,
    to: NotificationId,
}

/// A page of what is kept for the user.
///
/// # Errors
/// 400 for a query that cannot be read, 401 or 403 for a token that does not hold, 503 while the broker is away.
pub(super) async fn page(
    Shared(state): Shared<Arc<State>>,
    Query(selection): Query<Selection>,
    Query(asked): Query<Asked>,
    request: Request,
) -> Result<Json<Page>, ApiError> {
    let (parts, _) = request.into_parts();
    let user = state.auth().stream_identity(&parts)?.user;
    let limit = asked.limit.unwrap_or(DEFAULT_LIMIT);
    if !(1..=MAX_LIMIT).contains(&limit) {
        return Err(ApiError::bad_request(format!("limit is {limit}; it may be 1 to {MAX_LIMIT}")));
    }
    let start = asked.after.map_or(Start::Earliest, |after| read_start(&after, &user));
    let filter = selection.filter()?;
    let hub = state.hub().ok_or_else(|| ApiError::away("this node has not reached its broker yet"))?;
    let mut page = Page { notifications: Vec::new(), gaps: Vec::new(), cursor: String::new(), more: false };
    let read = hub.read(user, start, filter, limit, |subscription| {
        while page.notifications.len() < limit
            && let Some(next) = subscription.next(now_ms())
        {
            let mut id = String::new();
            subscription.encode_cursor(&mut id);
            page.cursor.clone_from(&id);
            match next {
                Next::Notification { record, way, .. } => {
                    let event = record.route(way.route).event_name.clone();
                    let data = sse::data_of(record.notification(), way);
                    // Made by serde_json a moment ago.
                    let data = RawValue::from_string(data).unwrap_or_else(|_| RawValue::NULL.to_owned());
                    page.notifications.push(Item { id, event, data });
                }
                Next::Gap(gap) => {
                    page.gaps.push(Missing { reason: gap.reason.as_str(), partition: gap.partition.0, from: gap.from, to: gap.to });
                }
                Next::Cursor => {}
            }
        }
        page.cursor.clear();
        subscription.encode_cursor(&mut page.cursor);
        page.more = !subscription.is_idle();
        page.notifications.len()
    });
    // A broker that does not come back is waited for by streams; who asks for a page wants to know.
    let read = tokio::time::timeout(Duration::from_secs(state.limits.read_wait_s), read).await;
    read.map_err(|_| ApiError::away("the broker did not answer in time"))?;
    Ok(Json(page))
}
