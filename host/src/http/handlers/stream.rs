//! `GET /v1/stream`: a user's notifications as Server-Sent Events.
//!
//! The start comes from the header `Last-Event-ID`, or else from the query as `last_event_id`,
//! `lastEventId` or `evs_last_event_id` (polyfills cannot send the header). It is a cursor,
//! `earliest`, `latest`, or a duration such as `10m`. Of several query values the last one counts,
//! because polyfills append theirs. Without any, a stream that names its `device` starts at that
//! device's cursor, or with `devices=all` at the furthest cursor of the user's devices; any other
//! stream starts at the latest notification.
//!
//! The response head follows once the stream has its position in every partition: events published
//! after a client has read the head arrive on the stream.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State as Shared};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;

use crate::auth;
use crate::delivery::sse::{self, FramingChoice, StreamEnd, TooManyStreams};
use crate::delivery::subscription::{Filter, Start};
use crate::event::{Name, Priority};
use crate::server::{AddressRefusal, Connection};
use crate::telemetry::metrics::ReasonLabel;

use super::tickets;
use crate::http::extract::{Parameters, Query};
use crate::http::{ApiError, State, cors};

/// The filter parameters shared by streams and pages.
#[derive(Debug, Default, Deserialize)]
pub(in crate::http) struct Selection {
    /// Event types, comma-separated, exact or ending in `*`.
    types: Option<String>,
    min_priority: Option<String>,
}

/// The maximum number of patterns of a stream: each notification is matched against all of them.
const MAX_TYPES: usize = 64;

impl Selection {
    pub(in crate::http) fn filter(&self) -> Result<Filter, ApiError> {
        let types = self
            .types
            .iter()
            .flat_map(|types| types.split(','))
            .map(str::trim)
            .filter(|one| !one.is_empty());
        let types: BTreeSet<&str> = types.collect();
        if types.len() > MAX_TYPES {
            return Err(ApiError::bad_request(format!(
                "types has {} patterns; the limit is {MAX_TYPES}",
                types.len()
            )));
        }
        if let Some(wrong) = types
            .iter()
            .find(|one| one.trim_end_matches('*').contains('*'))
        {
            let message = format!(
                "types has '{}'; * is allowed at the end only",
                wrong.escape_debug()
            );
            return Err(ApiError::bad_request(message)
                .fix("name each type, or a common prefix such as order.*"));
        }
        let min_priority = self
            .min_priority
            .as_deref()
            .map(str::parse::<Priority>)
            .transpose();
        let min_priority =
            min_priority.map_err(|e| ApiError::bad_request(e.of("min_priority").to_string()))?;
        Ok(Filter {
            types: types.into_iter().map(str::to_owned).collect(),
            min_priority,
        })
    }
}

/// The query parameters of a stream.
const KNOWN: [&str; 9] = [
    "user",
    "ticket",
    "device",
    "devices",
    "last_event_id",
    "types",
    "min_priority",
    "format",
    "event",
];

/// Whether a parameter is ignored: pages add these to every URL, to get around caches, because
/// another server reads a token there, or with the state of the page (Datastar). None of them could
/// be a misspelt filter or start.
fn is_ignored(name: &str) -> bool {
    matches!(name, "t" | "token" | "datastar") || name.starts_with('_')
}

/// The value of the header that names the ignored parameters, at most eight of them.
fn ignored(parameters: &Parameters) -> Option<HeaderValue> {
    let mut names: Vec<String> = Vec::new();
    for name in parameters.names(is_ignored) {
        let name: String = name
            .chars()
            .take(64)
            .flat_map(char::escape_default)
            .collect();
        if !names.contains(&name) && names.len() < 8 {
            names.push(name);
        }
    }
    (!names.is_empty())
        .then(|| HeaderValue::from_str(&names.join(", ")).ok())
        .flatten()
}

/// Whether a parameter names the start position, in any spelling that polyfills use.
fn is_place(name: &str) -> bool {
    let bare: String = name
        .chars()
        .filter(|c| !matches!(c, '-' | '_'))
        .map(|c| c.to_ascii_lowercase())
        .collect();
    matches!(bare.as_str(), "lasteventid" | "evslasteventid")
}

/// The device that opens a stream.
#[derive(Debug, Default, Deserialize)]
pub(in crate::http) struct Device {
    device: Option<Name>,
    devices: Option<String>,
}

impl Device {
    /// Whether the user's devices are in sync (`devices=all`).
    ///
    /// # Errors
    /// 400 if `devices` has another value or comes without `device`.
    fn is_in_sync(&self) -> Result<bool, ApiError> {
        match (&self.device, self.devices.as_deref()) {
            (_, None) => Ok(false),
            (Some(_), Some("all")) => Ok(true),
            (None, Some("all")) => Err(ApiError::bad_request(
                "devices=all needs the name of this device",
            )
            .fix("add device=NAME")),
            (_, Some(other)) => Err(ApiError::bad_request(format!(
                "devices is '{}', which is not a valid value",
                other.escape_debug()
            ))
            .fix("use devices=all, or leave it out")),
        }
    }
}

/// Opens a stream.
///
/// # Errors
/// 400 for an invalid query, 401 or 403 for a missing or invalid token, 403 for a page of a foreign
/// origin. Every other refusal is reported in band with 200, because an `EventSource` never
/// reconnects after any other status; so is a token that has expired.
pub(in crate::http) async fn open(
    Shared(state): Shared<Arc<State>>,
    Query(selection): Query<Selection>,
    Query(device): Query<Device>,
    Query(framing): Query<FramingChoice>,
    parameters: Parameters,
    request: Request,
) -> Result<Response, ApiError> {
    let ignored = ignored(&parameters);
    let (parts, _) = request.into_parts();
    let wanted = Wanted {
        selection,
        device,
        framing,
    };
    let mut response = begin(&state, wanted, &parameters, &parts).await?;
    if let Some(ignored) = ignored {
        response
            .headers_mut()
            .insert("x-pointsman-ignored", ignored);
    }
    Ok(response)
}

/// The parameters of a stream that have a type.
struct Wanted {
    selection: Selection,
    device: Device,
    framing: FramingChoice,
}

async fn begin(
    state: &State,
    wanted: Wanted,
    parameters: &Parameters,
    parts: &Parts,
) -> Result<Response, ApiError> {
    let Wanted {
        selection,
        device,
        framing,
    } = wanted;
    let identified = match parameters.last(|name| name == "ticket") {
        None => state.auth().stream_identity(parts).await.map(Some),
        Some(ticket) => tickets::redeem(state, ticket).await,
    };
    let identity = match identified {
        Ok(Some(identity)) => identity,
        Ok(None) => return Ok(refuse(state, "unavailable")),
        Err(auth::Error::Expired) => return Ok(refuse(state, TOKEN_EXPIRED)),
        Err(auth::Error::KeysUnavailable) => return Ok(refuse(state, "unavailable")),
        Err(error) => return Err(error.into()),
    };
    parameters.are_all(&KNOWN, |name| {
        is_place(name) || is_ignored(name) || name == "evs_preamble"
    })?;
    let filter = selection.filter()?;
    let is_in_sync = device.is_in_sync()?;
    // A device's start is stored, so this request changes state; a stream without a device changes
    // nothing.
    if device.device.is_some() && state.origins.are_foreign_to(&parts.headers) {
        return Err(cors::foreign());
    }
    if parts
        .extensions
        .get::<Arc<Connection>>()
        .is_some_and(|connection| connection.is_surplus())
        || parts.extensions.get::<AddressRefusal>().is_some()
    {
        return Ok(refuse(state, "overloaded"));
    }
    let permit = match state.stream_timer().permit(&identity.reader.user) {
        Ok(permit) => permit,
        Err(TooManyStreams::OfNode) => return Ok(refuse(state, "overloaded")),
        Err(TooManyStreams::OfUser) => return Ok(refuse(state, TOO_MANY_OF_USER)),
    };
    let Some(hub) = state.hub() else {
        return Ok(refuse(state, "starting"));
    };
    // At once: the stream could neither begin nor resume here, and it can on another node.
    if state.stream_timer().is_in_outage() {
        return Ok(refuse(state, "unavailable"));
    }
    if is_in_sync && !filter.is_all() {
        let message = "devices=all cannot be combined with types or min_priority, because notifications that one device filters out would count as seen by all";
        return Err(ApiError::bad_request(message).fix("leave out one of them"));
    }
    let asked = start(parts, parameters, &identity.reader.user, hub.now_ms());
    let start = match device.device {
        None => asked.unwrap_or(Start::Latest),
        Some(device) => {
            let user = &identity.reader.user;
            match start_of_device(state, user, device, is_in_sync, asked).await? {
                Some(start) => start,
                None => return Ok(refuse(state, "unavailable")),
            }
        }
    };
    let framing = framing.or(identity.framing, state.stream_timer().config().framing());
    tracing::debug!(user.id = %identity.reader.user, ?start, "stream opened");
    let guard = hub.open(identity.reader, start, filter);
    let socket = parts.extensions.get::<Arc<dyn sse::Socket>>().cloned();
    let body = sse::Body::new(
        guard,
        permit,
        state.stream_timer(),
        state.metrics().clone(),
        framing,
        identity.expiry,
        socket,
    );
    // The head fires `onopen`. Sent earlier, it would claim that the stream receives what is
    // published from now on, while the start of the stream were still to come.
    if tokio::time::timeout(state.limits.read_wait, body.placed())
        .await
        .is_err()
    {
        return Ok(refuse(state, "unavailable"));
    }
    Ok(event_stream(Body::new(body)))
}

/// The start of a stream that names its device; `None` if the broker does not answer in time.
/// Starting anywhere else would silently skip the notifications in between.
async fn start_of_device(
    state: &State,
    user: &Name,
    device: Name,
    is_in_sync: bool,
    asked: Option<Start>,
) -> Result<Option<Start>, ApiError> {
    // The device cursor is more useful than an unreadable id.
    let asked = asked.filter(|asked| *asked != Start::Unknown);
    let cursors = state.device_cursors()?;
    let start = cursors.start(user, device, is_in_sync, asked);
    match tokio::time::timeout(state.limits.read_wait, start).await {
        Ok(Ok(start)) => Ok(Some(start)),
        failed => {
            tracing::debug!(user.id = %user, ?failed, "cannot read the device cursor; the client is asked to reconnect");
            Ok(None)
        }
    }
}

/// The reason for a stream above `stream.max_open_per_user`.
const TOO_MANY_OF_USER: &str = "too-many-streams";

/// The reason for a stream that is opened with a token that has expired. The client may hold a
/// cookie that its page renews, so it is asked to try again instead of being refused for good.
const TOKEN_EXPIRED: &str = StreamEnd::TokenExpired.as_str();
/// The reconnect delay of such a stream, +-50 %.
const TOKEN_EXPIRED_RETRY: Duration = Duration::from_secs(10);

/// The answer to a stream that cannot be served now.
fn refuse(state: &State, reason: &'static str) -> Response {
    state
        .metrics()
        .streams_refused
        .get_or_create(&ReasonLabel { reason })
        .inc();
    let retry = match reason {
        TOO_MANY_OF_USER => sse::USER_LIMIT_RETRY,
        TOKEN_EXPIRED => TOKEN_EXPIRED_RETRY,
        _ => state.stream_timer().config().retry,
    };
    event_stream(Body::from(sse::refusal(reason, retry)))
}

fn event_stream(body: Body) -> Response {
    let mut headers = HeaderMap::new();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream"),
    );
    headers.insert(
        header::CACHE_CONTROL,
        HeaderValue::from_static("no-cache, no-transform"),
    );
    // Without it, nginx buffers the response and the stream stalls.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    (headers, body).into_response()
}

/// The start that the client requests, if any.
fn start(parts: &Parts, parameters: &Parameters, user: &Name, now_ms: u64) -> Option<Start> {
    // Lossy: an id that is not valid text must count as an unknown id, not as an absent one.
    let header = parts
        .headers
        .get("last-event-id")
        .map(|value| String::from_utf8_lossy(value.as_bytes()).trim().to_owned());
    // A client without an id may send an empty one, which counts as absent.
    let asked = header
        .filter(|asked| !asked.is_empty())
        .or_else(|| parameters.last(is_place).map(str::to_owned));
    asked
        .filter(|asked| !asked.is_empty())
        .and_then(|asked| Start::read(&asked, user, now_ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_polyfill_spelling_of_the_start_parameter_is_accepted() {
        for name in [
            "last_event_id",
            "lastEventId",
            "lastEventID",
            "Last-Event-ID",
            "evs_last_event_id",
        ] {
            assert!(is_place(name), "{name}");
        }
        assert!(!is_place("last_event") && !is_place("id"));
    }

    #[test]
    fn a_parameter_that_could_be_misspelt_is_not_ignored() {
        for name in ["t", "token", "datastar", "_", "_t", "_=1"] {
            assert!(is_ignored(name), "{name}");
        }
        for name in ["", "T", "tokens", "type", "after", "fields", "formats"] {
            assert!(!is_ignored(name), "{name}");
        }
    }
}
