//! `GET /v1/notifications?after=CURSOR`: a user's notifications as JSON pages, for clients that
//! cannot hold a stream open, with a flag for those already read.
//!
//! `POST /v1/acks` moves the read marker: see `acks`, and `device_cursors` for its meaning.

use std::sync::Arc;

use axum::extract::{Request, State as Shared};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::broker;
use crate::delivery::device_cursors::DeviceCursors;
use crate::delivery::hub::Hub;
use crate::delivery::recipients::Reader;
use crate::delivery::sse;
use crate::delivery::subscription::cursor::Cursor;
use crate::delivery::subscription::{Filter, Next, Start};
use crate::event::{Name, NotificationId, PartitionNumber};

use super::stream::Selection;
use crate::http::extract::{Parameters, Query, ResponseRoom};
use crate::http::{ApiError, State};
use crate::server::ResponsePermit;

#[derive(Debug, Deserialize)]
pub(in crate::http) struct Params {
    /// A cursor as in `id:`, or any other start that `/v1/stream` accepts; from the earliest if
    /// absent.
    after: Option<String>,
    limit: Option<usize>,
}

const DEFAULT_LIMIT: usize = 100;
const MAX_LIMIT: usize = 1_000;
/// The bytes at which a page ends, with the notification that reaches them.
const MAX_PAGE_BYTES: usize = 4 * 1024 * 1024;
/// The bytes that a page is charged while it is built: what it reads, and as many items as most
/// pages have. The response then holds its own size.
const BUILD_BYTES: usize = 4 * 1024 * 1024;
/// The bytes of an item besides its id and its data.
const ITEM_BYTES: usize = 64;
/// The maximum unread count: applications show "99+" beyond it, and counting costs as much as
/// reading.
const MAX_UNREAD: usize = 100;

#[derive(Debug, Serialize)]
pub(in crate::http) struct Page {
    notifications: Vec<Item>,
    /// Ranges of history in which notifications may be missing.
    gaps: Vec<Missing>,
    /// The `after` of the next page, also valid as the start of a stream.
    cursor: String,
    /// Whether the next page would have notifications now.
    more: bool,
    unread: Unread,
    /// The approximate size of its items.
    #[serde(skip)]
    n_bytes: usize,
}

#[derive(Debug, Serialize)]
struct Item {
    /// The cursor after this notification.
    id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    event: Option<Name>,
    data: Box<RawValue>,
    read: bool,
    #[serde(skip)]
    at: (PartitionNumber, NotificationId),
}

/// Over all stored notifications that match `types` and `min_priority`, on this page or not.
#[derive(Debug, Serialize)]
struct Unread {
    count: usize,
    /// `false`: there are more.
    exact: bool,
}

#[derive(Debug, Serialize)]
struct Missing {
    reason: &'static str,
    partition: u8,
    from: NotificationId,
    to: NotificationId,
}

/// Returns a page of the user's stored notifications.
///
/// # Errors
/// 400 for an invalid query, 401 or 403 for a missing or invalid token, 503 while the broker is
/// unavailable or too many bytes of pages are under way.
pub(in crate::http) async fn page(
    Shared(state): Shared<Arc<State>>,
    Query(selection): Query<Selection>,
    Query(asked): Query<Params>,
    parameters: Parameters,
    room: ResponseRoom,
    request: Request,
) -> Result<Response, ApiError> {
    let (parts, _) = request.into_parts();
    let reader = state.auth().stream_identity(&parts).await?.reader;
    parameters.are_all(&["user", "after", "limit", "types", "min_priority"], |_| {
        false
    })?;
    let limit = asked.limit.unwrap_or(DEFAULT_LIMIT);
    if !(1..=MAX_LIMIT).contains(&limit) {
        return Err(ApiError::bad_request(format!(
            "limit is {limit}; use 1 to {MAX_LIMIT}"
        )));
    }
    let filter = selection.filter()?;
    let hub = state
        .hub()
        .ok_or_else(|| ApiError::unavailable("this node has not reached its broker yet"))?;
    let start = asked.after.map_or(Start::Earliest, |after| {
        Start::read(&after, &reader.user, hub.now_ms()).unwrap_or(Start::Latest)
    });
    let device_cursors = state.device_cursors()?;
    let permit = room
        .reserve(Some(&reader.user), BUILD_BYTES, &state.limits)
        .await?;
    let read = async {
        let mark = device_cursors.read_marker(&reader.user).await?;
        let (mut page, unread) = tokio::join!(
            read_page(hub, &reader, start, filter.clone(), limit, &permit),
            count_unread(hub, &reader, mark.as_ref(), filter.clone())
        );
        page.unread = unread;
        page.mark_read(device_cursors, mark.as_ref()).await?;
        Ok::<_, broker::Error>(page)
    };
    // Streams wait for an unavailable broker; a page request fails instead.
    let read = tokio::time::timeout(state.limits.read_wait, read).await;
    let page = read.map_err(|_| ApiError::unavailable("the broker did not answer in time"))??;
    // Written to its size: a buffer that doubles as it grows would hold up to twice as much.
    let mut body = Vec::with_capacity(page.n_bytes + 1024);
    serde_json::to_writer(&mut body, &page)
        .map_err(|error| ApiError::internal("the page cannot be written").cause(error))?;
    body.shrink_to_fit();
    Ok(([(CONTENT_TYPE, "application/json")], body).into_response())
}

/// Reads a page that ends at the limit, at [`MAX_PAGE_BYTES`], or where the permit has no room for
/// more.
async fn read_page(
    hub: &Hub,
    reader: &Reader,
    start: Start,
    filter: Filter,
    limit: usize,
    permit: &ResponsePermit,
) -> Page {
    let unread = Unread {
        count: 0,
        exact: true,
    };
    let mut page = Page {
        notifications: Vec::new(),
        gaps: Vec::new(),
        cursor: String::new(),
        more: false,
        unread,
        n_bytes: 0,
    };
    let mut is_full = false;
    hub.read(reader.clone(), start, filter, limit, |subscription| {
        while page.notifications.len() < limit
            && !is_full
            && let Some(next) = subscription.next(hub.now_ms())
        {
            let mut id = String::new();
            subscription.encode_cursor(&mut id);
            page.cursor.clone_from(&id);
            match next {
                Next::Notification {
                    partition,
                    id: at,
                    record,
                    route_match,
                } => {
                    let event = record.route(route_match.route).event_name.clone();
                    let data = sse::data_of(record.notification(), route_match);
                    // Cannot fail: `serde_json` has just produced it.
                    let data =
                        RawValue::from_string(data).unwrap_or_else(|_| RawValue::NULL.to_owned());
                    page.n_bytes += id.len() + data.get().len() + ITEM_BYTES;
                    // Twice: as items and as the body that is written from them.
                    is_full = page.n_bytes >= MAX_PAGE_BYTES || !permit.grow(2 * page.n_bytes);
                    page.notifications.push(Item {
                        id,
                        event,
                        data,
                        read: false,
                        at: (partition, at),
                    });
                }
                Next::Gap(gap) => {
                    page.gaps.push(Missing {
                        reason: gap.reason.as_str(),
                        partition: gap.partition.0,
                        from: gap.from,
                        to: gap.to,
                    });
                }
                Next::Cursor => {}
            }
        }
        page.cursor.clear();
        subscription.encode_cursor(&mut page.cursor);
        page.more = !subscription.is_idle();
        if is_full {
            limit
        } else {
            page.notifications.len()
        }
    })
    .await;
    page
}

impl Page {
    /// Sets on each item whether the read marker covers it. The marker is resolved after the page
    /// was read: in the other order, an id that a fail-over rolled back and reassigned to another
    /// notification could count as read.
    async fn mark_read(
        &mut self,
        device_cursors: &DeviceCursors,
        mark: Option<&Cursor>,
    ) -> broker::Result<()> {
        if let Some(mark) = mark
            && !self.notifications.is_empty()
        {
            let valid = device_cursors.valid_part(mark).await?;
            for item in &mut self.notifications {
                item.read = valid.covers(item.at.0, item.at.1);
            }
        }
        Ok(())
    }
}

async fn count_unread(hub: &Hub, reader: &Reader, mark: Option<&Cursor>, filter: Filter) -> Unread {
    let start = mark.map_or(Start::Earliest, |mark| Start::Cursor(mark.clone()));
    let mut count = 0;
    hub.read(
        reader.clone(),
        start,
        filter,
        MAX_UNREAD + 1,
        |subscription| {
            while count <= MAX_UNREAD
                && let Some(next) = subscription.next(hub.now_ms())
            {
                count += usize::from(matches!(next, Next::Notification { .. }));
            }
            count
        },
    )
    .await;
    Unread {
        count: count.min(MAX_UNREAD),
        exact: count <= MAX_UNREAD,
    }
}
