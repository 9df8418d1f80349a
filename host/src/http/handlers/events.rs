//! `POST /v1/events`: publishes one CloudEvent or a batch. [`crate::http::cloudevents`] reads the
//! request.
//!
//! After a 2xx, each event is either stored or permanently refused, as listed in the response. A
//! retry of a stored event becomes a duplicate when it is decided. After any other status, the
//! whole request may be sent again: events that were stored before the failure are then duplicates,
//! provided that the publisher gave ids.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::{self, Request};
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::dry_run;
use crate::broker::{self, Broker, Partition};
use crate::event::{EntryId, Event, LongName, Malformed, PartitionNumber, Value};
use crate::http::body::BodyReader;
use crate::http::cloudevents::{Draft, Mode};
use crate::http::coding::Coding;
use crate::http::default_type::add_type;
use crate::http::extract::{ApiKey, ClientAddress, Query, ResponseRoom};
use crate::http::{ApiError, State, turns};
use crate::preview::dry_run::DryRunResult;
use crate::server::{FIRST_BYTES, ResponsePermit};

/// How long readiness reports a full broker. Only the next publish attempt can show whether it is
/// still full.
const FULL_FOR: Duration = Duration::from_secs(5);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Options {
    /// Return the outcome that the events would have, and store nothing.
    #[serde(default)]
    dry_run: bool,
}

/// The result of publishing one event.
#[derive(Debug, PartialEq, Serialize)]
#[serde(tag = "status", rename_all = "kebab-case")]
enum Receipt {
    /// The broker has stored it. Without an `id` from the publisher, `id` is the entry's.
    Stored {
        id: String,
        source: LongName,
        partition: PartitionNumber,
        entry: EntryId,
    },
    /// It is permanently refused; `error` gives the reason.
    Refused { error: String },
}

/// One receipt per event, in the order of the batch.
#[derive(Debug, Serialize)]
struct Receipts {
    events: Vec<Receipt>,
}

/// The results of a dry run, in the order of the batch.
#[derive(Serialize)]
struct DryRunResults {
    events: Vec<DryRunResult>,
}

/// The approximate size of a receipt.
const RECEIPT_BYTES: usize = 256;

pub(in crate::http) async fn publish(
    extract::State(state): extract::State<Arc<State>>,
    _: ApiKey,
    Query(options): Query<Options>,
    room: ResponseRoom,
    reader: BodyReader,
    ClientAddress(client): ClientAddress,
    request: Request,
) -> Result<Response, ApiError> {
    let (Parts { headers, .. }, body) = request.into_parts();
    if !options.dry_run {
        check_rate(&state)?;
    }
    let mode = Mode::of(&headers)?;
    // Any other coding was refused before it came here.
    let coding = Coding::of(&headers).unwrap_or(Coding::Identity);
    let max = if mode == Mode::Batch {
        state.limits.batch_bytes
    } else {
        state.limits.event_bytes
    };
    let held = reader.read_coded(body, coding, max).await?;
    // Taken after the body has arrived, or requests that send none would keep all others out.
    let (places, kind) = if options.dry_run {
        (&state.dry_running, "dry runs")
    } else {
        (&state.publishing, "publish requests")
    };
    let wait = state.limits.publish_wait;
    let Ok(Ok(permit)) = tokio::time::timeout(wait, places.acquire()).await else {
        return Err(ApiError::overloaded(format!("too many concurrent {kind}")));
    };
    let (headers, body) = match &state.default_type {
        Some(kind) => add_type(mode, headers, held.bytes.clone(), kind),
        None => (headers, held.bytes.clone()),
    };
    let broker = state.broker()?;
    let source = broker
        .partitions()
        .first()
        .map_or("-", |partition| partition.source.as_str());
    let drafts = mode.drafts(&headers, body, source, &state.limits)?;
    // Before anything is stored: afterwards, the receipts must be sent.
    let room = room.reserve(None, FIRST_BYTES, &state.limits).await?;
    if !room.grow(drafts.len() * RECEIPT_BYTES) {
        return Err(no_room());
    }
    if options.dry_run {
        return dry_run(&state, broker.as_ref(), mode, drafts, &room).await;
    }
    if let Some(bucket) = &state.publish_rate {
        let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
        bucket.take(drafts.len(), Instant::now());
    }
    let appends = Appends::of(drafts, broker.partitions());
    // While a large request waits for its turns, small ones need the place.
    let _permit = (!appends.is_large()).then_some(permit);
    let receipts = store(&state, broker, appends, client).await?;
    answer(mode, prefers_minimal(&headers), receipts)
}

/// Before the body is read: a publisher that is too fast costs as little as possible.
///
/// # Errors
/// 429 if earlier events have used up `limits.publish_rate`.
fn check_rate(state: &State) -> Result<(), ApiError> {
    let Some(bucket) = &state.publish_rate else {
        return Ok(());
    };
    let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
    match bucket.wait(Instant::now()) {
        None => Ok(()),
        Some(wait) => {
            let rate = state.limits.publish_rate;
            let reason = format!("more than {rate} events per second are published to this node");
            Err(ApiError::too_fast(reason, wait)
                .fix("repeat the request after Retry-After, or let the operator raise limits.publish_rate"))
        }
    }
}

/// The handshake of a webhook (CloudEvents 1.0, "HTTP 1.1 Web Hooks for Event Delivery", section 4):
/// tells the sender that it may deliver events here, and how many a minute. Grants nothing by
/// itself: each delivery needs the API key.
///
/// # Errors
/// 400 without `WebHook-Request-Origin`, 403 for a sender that is not in `listen.webhook_origins`.
pub(in crate::http) async fn validate_webhook(
    extract::State(state): extract::State<Arc<State>>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let Some(origin) = headers.get("webhook-request-origin") else {
        return Err(
            ApiError::bad_request("the request names no sender of webhooks")
                .fix("send WebHook-Request-Origin, or POST the event"),
        );
    };
    if !origin
        .to_str()
        .is_ok_and(|origin| state.origins.allow_webhook(origin))
    {
        return Err(
            ApiError::forbidden("this sender may not deliver webhooks to this node").fix(
                "ask the operator to add its WebHook-Request-Origin to listen.webhook_origins",
            ),
        );
    }
    let per_minute = state.limits.publish_rate.saturating_mul(60);
    let rate = match per_minute {
        0 => HeaderValue::from_static("*"),
        _ => HeaderValue::from(per_minute),
    };
    let allowed = [
        ("allow", HeaderValue::from_static("OPTIONS,POST")),
        ("webhook-allowed-origin", origin.clone()),
        ("webhook-allowed-rate", rate),
    ];
    Ok((StatusCode::OK, allowed).into_response())
}

/// Whether the publisher asks for a response without a body (`Prefer: return=minimal`, RFC 7240).
fn prefers_minimal(headers: &HeaderMap) -> bool {
    let lists = headers.get_all("prefer").iter();
    let preferences = lists
        .filter_map(|list| list.to_str().ok())
        .flat_map(|list| list.split(','));
    // The first of several `return` counts.
    let mut returned = preferences.filter_map(|preference| {
        let (name, value) = preference.split(';').next()?.split_once('=')?;
        let is_return = name.trim().eq_ignore_ascii_case("return");
        is_return.then(|| {
            value
                .trim()
                .trim_matches('"')
                .eq_ignore_ascii_case("minimal")
        })
    });
    returned.next() == Some(true)
}

async fn dry_run(
    state: &State,
    broker: &dyn Broker,
    mode: Mode,
    drafts: Vec<Result<Draft, Malformed>>,
    room: &ResponsePermit,
) -> Result<Response, ApiError> {
    let events = drafts.into_iter().map(|draft| {
        draft.map(|Draft { event, .. }| {
            let number = partition_of(&event, broker.partitions()).number;
            (event, number)
        })
    });
    let results = dry_run::dry_run(state, broker, events.collect()).await?;
    let body = match (mode, results.as_slice()) {
        (Mode::Structured | Mode::Binary, [result]) => serde_json::to_vec(result),
        _ => serde_json::to_vec(&DryRunResults { events: results }),
    };
    let body =
        body.map_err(|error| ApiError::internal("the results cannot be written").cause(error))?;
    if !room.grow(body.len()) {
        return Err(no_room());
    }
    Ok(([(CONTENT_TYPE, "application/json")], body).into_response())
}

fn no_room() -> ApiError {
    ApiError::overloaded("this node has no room for a response of this size now")
        .fix("send fewer events at once, or read earlier responses first")
}

/// Chooses the partition of an event by hashing its `partitionkey`, else its `subject`, else its
/// `source` and `id`, so that retries meet the first attempt. For an event without an `id` of its
/// own, only the `source` counts. The choice changes when a source is added.
fn partition_of<'a>(event: &Event, partitions: &'a [Partition]) -> &'a Partition {
    let key = match (event.attribute("partitionkey"), &event.subject) {
        (Some(Value::Text(key)), _) => Cow::Borrowed(key.as_str()),
        (Some(key), _) => Cow::Owned(serde_json::to_string(key).unwrap_or_default()),
        (None, Some(subject)) => Cow::Borrowed(subject.as_str()),
        // No name contains a line feed, so two different pairs never give the same key.
        (None, None) => Cow::Owned(format!(
            "{}\n{}",
            event.source,
            if event.id_given {
                event.id.as_str()
            } else {
                ""
            }
        )),
    };
    // A hash that is stable across versions and machines: a retry must meet the first attempt.
    let digest = Sha256::digest(key.as_bytes());
    let number = digest
        .iter()
        .take(8)
        .fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
    &partitions[usize::try_from(number % partitions.len() as u64).unwrap_or_default()]
}

/// The entries to append to one partition.
#[derive(Default)]
struct Append {
    entries: Vec<Vec<(Bytes, Bytes)>>,
    /// For each entry, the event and its index in the request.
    origins: Vec<(usize, Event)>,
}

/// The entries of a request by partition, and the receipts of what is refused.
struct Appends {
    receipts: Vec<Option<Receipt>>,
    by_partition: BTreeMap<PartitionNumber, Append>,
}

impl Appends {
    fn of(drafts: Vec<Result<Draft, Malformed>>, partitions: &[Partition]) -> Self {
        let mut receipts: Vec<Option<Receipt>> = Vec::with_capacity(drafts.len());
        let mut by_partition: BTreeMap<PartitionNumber, Append> = BTreeMap::new();
        for (index, draft) in drafts.into_iter().enumerate() {
            match draft {
                Err(error) => receipts.push(Some(Receipt::Refused {
                    error: error.to_string(),
                })),
                Ok(draft) => {
                    let number = partition_of(&draft.event, partitions).number;
                    let append = by_partition.entry(number).or_default();
                    append.entries.push(draft.fields);
                    append.origins.push((index, draft.event));
                    receipts.push(None);
                }
            }
        }
        Self {
            receipts,
            by_partition,
        }
    }

    fn is_large(&self) -> bool {
        let mut appends = self.by_partition.values();
        appends.any(|append| turns::is_large(&append.entries))
    }
}

/// Appends the events, in order within each partition, and returns a receipt for each event.
async fn store(
    state: &State,
    broker: &Arc<dyn Broker>,
    appends: Appends,
    client: IpAddr,
) -> Result<Vec<Receipt>, ApiError> {
    let mut receipts = appends.receipts;
    let wait = state.limits.publish_wait;
    // Run the appends concurrently and all to completion, so that one failure does not leave the
    // outcome of the others unknown.
    let stored = futures_util::future::join_all(appends.by_partition.into_iter().map(
        |(partition, Append { entries, origins })| async move {
            let appended = state.turns.append(broker, partition, entries, client, wait);
            (partition, appended.await, origins)
        },
    ));
    for (partition, result, origins) in stored.await {
        let ids = match result {
            Ok(ids) => ids,
            Err(error) => return Err(refusal(state, broker.as_ref(), partition, error).await),
        };
        for ((index, event), entry) in origins.into_iter().zip(ids) {
            let id = if event.id_given {
                event.id.to_string()
            } else {
                entry.to_string()
            };
            receipts[index] = Some(Receipt::Stored {
                id,
                source: event.source,
                partition,
                entry,
            });
        }
    }
    let all: Option<Vec<Receipt>> = receipts.into_iter().collect();
    all.ok_or_else(|| ApiError::unavailable("the broker confirmed fewer events than it was sent"))
}

/// Distinguishes a full or refusing broker, which the operator must fix, from a source whose
/// backlog has reached its limit, which resolves as events are decided.
async fn refusal(
    state: &State,
    broker: &dyn Broker,
    partition: PartitionNumber,
    error: broker::Error,
) -> ApiError {
    if matches!(error, broker::Error::Full(_)) {
        if let Ok(now) = broker.state(partition).await
            && now.lag >= state.limits.backlog_entries
        {
            return ApiError::backlog(format!(
                "{} events are waiting in this source; it accepts no more until some are decided",
                now.lag
            ))
            .cause(error);
        }
        state
            .readiness
            .set_for("publishing", error.to_string(), FULL_FOR);
    }
    if matches!(error, broker::Error::Permanent(_)) {
        // The operator must fix it, not the publisher: the event was valid when it was appended.
        state
            .readiness
            .set_for("publishing", error.to_string(), FULL_FOR);
        return ApiError::unavailable("the broker refuses events right now").cause(error);
    }
    error.into()
}

/// # Errors
/// 400 if no event was stored, with the receipts of a batch.
fn answer(
    mode: Mode,
    prefers_minimal: bool,
    mut receipts: Vec<Receipt>,
) -> Result<Response, ApiError> {
    let is_refused = |receipt: &&Receipt| matches!(receipt, Receipt::Refused { .. });
    let n_refused = receipts.iter().filter(is_refused).count();
    if n_refused == 0 && prefers_minimal {
        // Knative counts a 2xx with a body that is not an event as a failure.
        let applied = [("preference-applied", "return=minimal")];
        return Ok((StatusCode::NO_CONTENT, applied).into_response());
    }
    match (mode, receipts.pop()) {
        (Mode::Structured | Mode::Binary, Some(Receipt::Refused { error })) => {
            Err(ApiError::bad_request(error))
        }
        (Mode::Structured | Mode::Binary, Some(stored)) => {
            Ok((StatusCode::ACCEPTED, Json(stored)).into_response())
        }
        (_, last) => {
            receipts.extend(last);
            match receipts.first() {
                // A sender that looks at the status alone would take the batch for delivered.
                Some(Receipt::Refused { error }) if n_refused == receipts.len() => {
                    let reason = format!("every event of the batch is refused; the first: {error}");
                    Err(ApiError::bad_request(reason).events(&receipts))
                }
                _ => Ok(Json(Receipts { events: receipts }).into_response()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::fake::FakeBroker;
    use crate::http::site::Site;
    use serde_json::json;

    const STRUCTURED: (&str, &str) = ("content-type", "application/cloudevents+json");
    const BATCH: (&str, &str) = ("content-type", "application/cloudevents-batch+json");

    fn text(fields: &[(Bytes, Bytes)]) -> Vec<(String, String)> {
        fields
            .iter()
            .map(|(k, v)| {
                (
                    String::from_utf8_lossy(k).into(),
                    String::from_utf8_lossy(v).into(),
                )
            })
            .collect()
    }

    #[tokio::test]
    async fn a_structured_event_is_stored_as_sent() {
        let site = Site::dev(FakeBroker::default());
        let document = r#"{"specversion":"1.0","type":"order.shipped","source":"/shop","id":"a","user":"42","data":{"order": 7}}"#;
        for content_type in [
            "application/cloudevents+json; charset=utf-8",
            "application/json",
        ] {
            let (status, _, body) = site
                .request(
                    "POST",
                    "/v1/events",
                    &[("content-type", content_type)],
                    document,
                )
                .await;
            assert_eq!(status, StatusCode::ACCEPTED);
            assert_eq!(body["status"], "stored");
            assert_eq!(
                (&body["id"], &body["source"], &body["partition"]),
                (&json!("a"), &json!("/shop"), &json!(0))
            );
            let (_, fields) = site.broker.appended().pop().unwrap();
            assert_eq!(text(&fields), [("event".to_owned(), document.to_owned())]);
        }
    }

    #[tokio::test]
    async fn an_omitted_id_becomes_the_id_of_the_entry() {
        let site = Site::dev(FakeBroker::default());
        let (_, _, body) = site
            .request("POST", "/v1/events", &[STRUCTURED], r#"{"type":"t"}"#)
            .await;
        assert_eq!(body["id"], body["entry"]);
        let (_, fields) = site.broker.appended().pop().unwrap();
        let entry: EntryId = body["entry"].as_str().unwrap().parse().unwrap();
        let event = Event::from_fields(entry, "pointsman:events", &fields).unwrap();
        assert_eq!(
            (event.id.as_str(), event.id_given, event.time_ms),
            (entry.to_string().as_str(), false, entry.ms)
        );
    }

    #[tokio::test]
    async fn binary_mode_reads_attributes_from_headers_and_data_from_the_body() {
        let site = Site::dev(FakeBroker::default());
        let headers = [
            ("ce-specversion", "1.0"),
            ("ce-type", "t"),
            ("ce-source", "/s"),
            ("ce-id", "Euro%20%E2%82%AC%20%F0%9F%98%80"),
            ("ce-subject", "\"a \\\"b\\\" 50%\""),
            ("content-type", "application/octet-stream"),
            ("x-other", "1"),
        ];
        let (status, _, body) = site
            .request("POST", "/v1/events", &headers, "\u{0}raw")
            .await;
        assert_eq!(
            (status, &body["id"]),
            (StatusCode::ACCEPTED, &json!("Euro € 😀"))
        );
        let (_, fields) = site.broker.appended().pop().unwrap();
        let event = Event::from_fields(EntryId::default(), "-", &fields).unwrap();
        assert_eq!(event.subject.unwrap().as_str(), "a \"b\" 50%");
        assert_eq!(
            event.data,
            crate::event::Payload::Binary(Bytes::from_static(b"\0raw"))
        );
        assert!(event.attributes.is_empty());
    }

    #[tokio::test]
    async fn invalid_events_are_refused_with_the_reason() {
        let site = Site::dev(FakeBroker::default());
        let large = format!(r#"{{"type":"t","data":"{}"}}"#, "x".repeat(256 * 1024));
        let check =
            async |headers: &[(&str, &str)], body: &str, status: StatusCode, expect: &str| {
                let (found, _, answer) = site.request("POST", "/v1/events", headers, body).await;
                let error = answer["error"].as_str().unwrap_or_default().to_owned();
                assert_eq!(found, status, "{error}");
                assert!(error.contains(expect), "{headers:?} gave: {error}");
            };
        check(
            &[STRUCTURED],
            r#"{"id":"a"}"#,
            StatusCode::BAD_REQUEST,
            "type is missing",
        )
        .await;
        check(
            &[STRUCTURED],
            r#"{"type":"#,
            StatusCode::BAD_REQUEST,
            "not a JSON object",
        )
        .await;
        check(
            &[STRUCTURED],
            r#"{"type":"t","id":"a\nb"}"#,
            StatusCode::BAD_REQUEST,
            "id contains the control character U+000A",
        )
        .await;
        check(
            &[STRUCTURED],
            &large,
            StatusCode::PAYLOAD_TOO_LARGE,
            "larger than 262144 bytes",
        )
        .await;
        check(
            &[("ce-type", "t"), ("ce-data", "1")],
            "",
            StatusCode::BAD_REQUEST,
            "ce-data is not a valid attribute",
        )
        .await;
        check(
            &[("ce-event", "{\"type\":\"t\"}")],
            "",
            StatusCode::BAD_REQUEST,
            "ce-event is not a valid attribute",
        )
        .await;
        check(
            &[("ce-type", "a%0Ab")],
            "",
            StatusCode::BAD_REQUEST,
            "type contains the control character U+000A",
        )
        .await;
        check(
            &[("ce-type", "a%FF")],
            "",
            StatusCode::BAD_REQUEST,
            "type is not UTF-8",
        )
        .await;
        check(
            &[("content-type", "text/plain")],
            "hello",
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "'text/plain'",
        )
        .await;
        check(&[], "hello", StatusCode::UNSUPPORTED_MEDIA_TYPE, "''").await;
        check(
            &[BATCH],
            r#"{"type":"t"}"#,
            StatusCode::BAD_REQUEST,
            "not a JSON array",
        )
        .await;
        check(
            &[BATCH],
            &format!("[{}]", vec!["{}"; 10_001].join(",")),
            StatusCode::PAYLOAD_TOO_LARGE,
            "10001 events",
        )
        .await;
        check(
            &[BATCH],
            &" ".repeat(4 * 1024 * 1024 + 1),
            StatusCode::PAYLOAD_TOO_LARGE,
            "larger than 4194304",
        )
        .await;
        assert!(site.broker.appended().is_empty());
    }

    #[tokio::test]
    async fn a_batch_response_has_a_receipt_for_each_event() {
        let site = Site::dev(FakeBroker::with_partitions(4));
        let large = format!(r#"{{"type":"t","data":"{}"}}"#, "x".repeat(256 * 1024));
        let batch = format!(
            r#"[{{"type":"t","id":"a","subject":"s"}}, {{"id":"b"}}, {large}, {{"type":"t","id":"c","subject":"s"}}]"#
        );
        let (status, _, body) = site.request("POST", "/v1/events", &[BATCH], &batch).await;
        assert_eq!(status, StatusCode::OK);
        let statuses: Vec<_> = body["events"]
            .as_array()
            .unwrap()
            .iter()
            .map(|event| event["status"].as_str().unwrap())
            .collect();
        assert_eq!(statuses, ["stored", "refused", "refused", "stored"]);
        assert_eq!(
            body["events"][0]["partition"],
            body["events"][3]["partition"]
        );
        assert!(
            body["events"][1]["error"]
                .as_str()
                .unwrap()
                .contains("type is missing")
        );
        let documents: Vec<String> = site
            .broker
            .appended()
            .iter()
            .map(|(_, fields)| text(fields)[0].1.clone())
            .collect();
        assert_eq!(
            documents,
            [
                r#"{"type":"t","id":"a","subject":"s"}"#,
                r#"{"type":"t","id":"c","subject":"s"}"#
            ]
        );

        let (status, _, body) = site.request("POST", "/v1/events", &[BATCH], "[]").await;
        assert_eq!((status, body), (StatusCode::OK, json!({ "events": [] })));
    }

    #[tokio::test]
    async fn an_unavailable_or_full_broker_asks_publishers_to_retry() {
        let check = async |broker: FakeBroker, status: StatusCode| {
            let site = Site::dev(broker);
            let (found, headers, body) = site
                .request("POST", "/v1/events", &[STRUCTURED], r#"{"type":"t"}"#)
                .await;
            assert_eq!(found, status, "{body}");
            let seconds: u64 = headers["retry-after"].to_str().unwrap().parse().unwrap();
            assert!((1..=5).contains(&seconds));
            assert!(
                !body["error"].as_str().unwrap().contains("secret detail"),
                "causes belong in the log only: {body}"
            );
            site.state.readiness().is_ready()
        };
        let full = || FakeBroker::failing(|| broker::Error::Full("secret detail".into()));
        // An unavailable broker is detected by `watch`, without a publish attempt; a backlog is not
        // a fault of the node.
        assert!(
            check(
                FakeBroker::failing(|| broker::Error::Unavailable("secret detail".into())),
                StatusCode::SERVICE_UNAVAILABLE
            )
            .await
        );
        assert!(
            !check(full(), StatusCode::SERVICE_UNAVAILABLE).await,
            "a full broker must make the node unready"
        );
        assert!(check(full().with_lag(1_000_000), StatusCode::TOO_MANY_REQUESTS).await);
        // The event is not at fault, and is accepted once the operator has granted the right.
        let denied = || FakeBroker::failing(|| broker::Error::Permanent("secret detail".into()));
        assert!(
            !check(denied(), StatusCode::SERVICE_UNAVAILABLE).await,
            "a broker that refuses publishing must make the node unready"
        );
    }

    /// Each partition deduplicates ids on its own: if a retry went to another partition, the event
    /// would be committed twice.
    #[test]
    fn a_retry_goes_to_the_same_partition_and_keys_are_spread() {
        let partitions: Vec<Partition> = (0..4)
            .map(|n| Partition {
                number: PartitionNumber(n),
                source: format!("s{n}"),
            })
            .collect();
        let of = |document: serde_json::Value| {
            partition_of(
                &Event::from_json(EntryId::default(), "-", document.to_string().as_bytes())
                    .unwrap(),
                &partitions,
            )
            .number
        };
        // This value is a stable interface: with another hash, retries before and after an upgrade
        // would not meet.
        assert_eq!(
            of(json!({ "type": "t", "partitionkey": "k" })),
            PartitionNumber(2)
        );
        assert_eq!(
            of(json!({ "type": "t", "partitionkey": "k", "subject": "x" })),
            of(json!({ "type": "u", "partitionkey": "k", "id": "1" }))
        );
        assert_eq!(
            of(json!({ "type": "t", "subject": "k" })),
            of(json!({ "type": "t", "partitionkey": "k" }))
        );
        assert_eq!(
            of(json!({ "type": "t", "id": "1", "source": "/s", "data": 1 })),
            of(json!({ "type": "t", "id": "1", "source": "/s", "data": 2 }))
        );
        let found: std::collections::BTreeSet<_> = (0..64)
            .map(|n| of(json!({ "type": "t", "subject": n.to_string() })))
            .collect();
        assert_eq!(found.len(), 4);
    }
}
