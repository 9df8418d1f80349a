//! `POST /v1/events`: CloudEvents over HTTP in the structured, binary and batch content modes (CloudEvents 1.0.2, "HTTP Protocol Binding").
//!
//! A 2xx means that each event is stored, or refused for good, and the answer says which; a retry of an event that is stored already
//! becomes a duplicate as it is decided. Anything else means that all of it may be sent again: what was stored of it before the failure is
//! then a duplicate if the publisher gave ids. What the fields of an event may be is `event`'s.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest as _, Sha256};

use super::dry_run;
use crate::broker::{self, Broker, Partition, PartitionNumber};
use crate::event::{EntryId, Event, Malformed, Name, Value};
use crate::http::{ApiError, Keyed, Query, State, read_body};

/// For so long a node says that its broker is full: until somebody tries again, nobody knows otherwise.
const FULL_FOR: Duration = Duration::from_secs(10);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Options {
    /// Answer what would become of it, and store nothing.
    #[serde(default)]
    dry_run: bool,
}

/// What became of one event of a request.
#[derive(Debug, PartialEq, Serialize)]
#[serde(tag = "status", rename_all = "kebab-case")]
enum Receipt {
    /// The broker has it. Without an `id` from the publisher, the entry's.
    Stored {
        id: String,
        source: Name,
        partition: PartitionNumber,
        entry: EntryId,
    },
    /// It will be refused again: this is what is wrong with it.
    Refused { error: String },
}

/// Events in the order of the batch.
#[derive(Debug, Serialize)]
struct Receipts {
    events: Vec<Receipt>,
}

pub(in crate::http) async fn publish(
    extract::State(state): extract::State<Arc<State>>,
    _: Keyed,
    Query(options): Query<Options>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let mode = Mode::of(&headers)?;
    let wait = Duration::from_secs(state.limits.publish_wait_s);
    let Ok(Ok(_permit)) = tokio::time::timeout(wait, state.publishing.acquire()).await else {
        return Err(ApiError::overloaded("too many requests to publish at once"));
    };
    let max = if mode == Mode::Batch {
        state.limits.batch_bytes
    } else {
        state.limits.event_bytes
    };
    let body = read_body(body, max, Duration::from_secs(state.limits.body_timeout_s)).await?;
    let broker = state.broker()?;
    let source = broker
        .partitions()
        .first()
        .map_or("-", |partition| partition.source.as_str());
    let drafts = match mode {
        Mode::Structured => vec![Draft::structured(body, source)],
        Mode::Binary => vec![Draft::binary(&headers, body, source)],
        Mode::Batch => batch(&body, &state.limits, source)?,
    };
    let drafts = drafts
        .into_iter()
        .map(|draft| draft?.within(state.limits.event_bytes))
        .collect();
    if options.dry_run {
        return try_out(&state, broker.as_ref(), mode, drafts).await;
    }
    let receipts = store(&state, broker.as_ref(), drafts).await?;
    Ok(answer(mode, receipts))
}

async fn try_out(
    state: &State,
    broker: &dyn Broker,
    mode: Mode,
    drafts: Vec<Result<Draft, Malformed>>,
) -> Result<Response, ApiError> {
    let events = drafts.into_iter().map(|draft| {
        draft.map(|Draft { event, .. }| {
            let number = partition_of(&event, broker.partitions()).number;
            (event, number)
        })
    });
    let trials = dry_run::try_out(state, broker, events.collect()).await?;
    Ok(match (mode, trials.as_slice()) {
        (Mode::Structured | Mode::Binary, [trial]) => Json(trial).into_response(),
        _ => Json(serde_json::json!({ "events": trials })).into_response(),
    })
}

/// The content mode of a request.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    Structured,
    Binary,
    Batch,
}

impl Mode {
    fn of(headers: &HeaderMap) -> Result<Self, ApiError> {
        let content_type = headers
            .get(CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        let essence = content_type
            .split(';')
            .next()
            .unwrap_or_default()
            .trim()
            .to_ascii_lowercase();
        match essence.as_str() {
            "application/cloudevents-batch+json" => Ok(Self::Batch),
            "application/cloudevents+json" => Ok(Self::Structured),
            // Binary mode is known by its headers; its content type is that of the data.
            _ if headers.keys().any(|name| name.as_str().starts_with("ce-")) => Ok(Self::Binary),
            "application/json" => Ok(Self::Structured),
            other => {
                let error = ApiError::unsupported_media_type(format!(
                    "no event can be read from '{}' without ce-* headers",
                    other.escape_debug()
                ));
                Err(error.fix("send a CloudEvent as application/cloudevents+json, many as application/cloudevents-batch+json, or its attributes as ce-* headers"))
            }
        }
    }
}

/// An event that holds, with the fields of the entry that it will be.
struct Draft {
    event: Event,
    fields: Vec<(Bytes, Bytes)>,
}

impl Draft {
    /// Measured as ingest measures an entry: what is stored here must not be dead-lettered there for its size.
    fn within(self, max_bytes: usize) -> Result<Self, Malformed> {
        let n_bytes: usize = self
            .fields
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum();
        if n_bytes > max_bytes {
            return Err(
                Malformed::new(format!("has {n_bytes} bytes; {max_bytes} is the most"))
                    .of("the event"),
            );
        }
        Ok(self)
    }

    /// The document is stored as it was sent, so that an id or time which the publisher left out stays left out and becomes the entry's.
    fn structured(document: Bytes, source: &str) -> Result<Self, Malformed> {
        let event = Event::from_json(EntryId::default(), source, &document)?;
        Ok(Self {
            event,
            fields: vec![(Bytes::from_static(b"event"), document)],
        })
    }

    /// Stored as flat fields: that is what headers are.
    fn binary(headers: &HeaderMap, data: Bytes, source: &str) -> Result<Self, Malformed> {
        let mut fields = Vec::new();
        for (name, value) in headers {
            let Some(name) = name.as_str().strip_prefix("ce-") else {
                continue;
            };
            if ["data", "data_base64", "datacontenttype", "event"].contains(&name) {
                return Err(Malformed::new(
                    "is no attribute; the data is the body, and its type the Content-Type",
                )
                .of(format!("ce-{name}")));
            }
            fields.push((
                Bytes::copy_from_slice(name.as_bytes()),
                Bytes::from(header_text(value.as_bytes()).into_owned()),
            ));
        }
        if let Some(content_type) = headers.get(CONTENT_TYPE) {
            fields.push((
                Bytes::from_static(b"datacontenttype"),
                Bytes::copy_from_slice(content_type.as_bytes()),
            ));
        }
        if !data.is_empty() {
            fields.push((Bytes::from_static(b"data"), data));
        }
        Ok(Self {
            event: Event::from_fields(EntryId::default(), source, &fields)?,
            fields,
        })
    }
}

/// A header's value as the binding writes it: perhaps in double quotes, with `%XX` for what is not printable ASCII (section 3.1.3.2).
fn header_text(value: &[u8]) -> Cow<'_, [u8]> {
    let unquoted = match value {
        [b'"', inner @ .., b'"'] => {
            let mut text = Vec::with_capacity(inner.len());
            let mut bytes = inner.iter();
            while let Some(&byte) = bytes.next() {
                text.push(if byte == b'\\' {
                    bytes.next().copied().unwrap_or(byte)
                } else {
                    byte
                });
            }
            Cow::Owned(text)
        }
        _ => Cow::Borrowed(value),
    };
    if !unquoted.contains(&b'%') {
        return unquoted;
    }
    let hex = |byte: Option<&u8>| {
        byte.and_then(|&b| char::from(b).to_digit(16))
            .and_then(|digit| u8::try_from(digit).ok())
    };
    let mut text = Vec::with_capacity(unquoted.len());
    let mut rest = &*unquoted;
    while let [byte, tail @ ..] = rest {
        match (byte, hex(tail.first()), hex(tail.get(1))) {
            (b'%', Some(high), Some(low)) => {
                text.push(high << 4 | low);
                rest = &tail[2..];
            }
            // A bare % is what it looks like: no publisher meant anything else by it.
            _ => {
                text.push(*byte);
                rest = tail;
            }
        }
    }
    Cow::Owned(text)
}

/// Takes a batch apart. An event that does not hold is one refusal; a batch that is no list, or too long, is an error.
fn batch(
    body: &Bytes,
    limits: &crate::http::Limits,
    source: &str,
) -> Result<Vec<Result<Draft, Malformed>>, ApiError> {
    let text =
        std::str::from_utf8(body).map_err(|_| ApiError::bad_request("the batch is not UTF-8"))?;
    let documents: Vec<&RawValue> = serde_json::from_str(text).map_err(|e| {
        ApiError::bad_request(format!("the batch is not a JSON list of events: {e}"))
    })?;
    if documents.len() > limits.batch_events {
        return Err(ApiError::too_large(format!(
            "the batch has {} events; {} is the most",
            documents.len(),
            limits.batch_events
        ))
        .fix("send it in parts"));
    }
    let drafts = documents
        .into_iter()
        .map(|document| Draft::structured(body.slice_ref(document.get().as_bytes()), source));
    Ok(drafts.collect())
}

/// The partition of an event: the same for all with one `partitionkey`, else one `subject`, else for an event and its retries. Changes
/// when a source is added. An event with neither an id of its own goes where its `source` goes.
fn partition_of<'a>(event: &Event, partitions: &'a [Partition]) -> &'a Partition {
    let key = match (event.attribute("partitionkey"), &event.subject) {
        (Some(Value::Text(key)), _) => Cow::Borrowed(key.as_str()),
        (Some(key), _) => Cow::Owned(serde_json::to_string(key).unwrap_or_default()),
        (None, Some(subject)) => Cow::Borrowed(subject.as_str()),
        // No name holds a line feed, so two pairs never read alike.
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
    // A hash that is the same in every version on every machine, as a publisher's retry must meet the first attempt.
    let digest = Sha256::digest(key.as_bytes());
    let number = digest
        .iter()
        .take(8)
        .fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
    &partitions[usize::try_from(number % partitions.len() as u64).unwrap_or_default()]
}

/// What goes to one partition.
#[derive(Default)]
struct Append {
    entries: Vec<Vec<(Bytes, Bytes)>>,
    /// For each entry, where in the request its event stood.
    origins: Vec<(usize, Event)>,
}

/// Appends what holds, in order within each partition, and says what became of each.
async fn store(
    state: &State,
    broker: &dyn Broker,
    drafts: Vec<Result<Draft, Malformed>>,
) -> Result<Vec<Receipt>, ApiError> {
    let mut receipts: Vec<Option<Receipt>> = Vec::with_capacity(drafts.len());
    let mut appends: BTreeMap<PartitionNumber, Append> = BTreeMap::new();
    for (index, draft) in drafts.into_iter().enumerate() {
        match draft {
            Err(error) => receipts.push(Some(Receipt::Refused {
                error: error.to_string(),
            })),
            Ok(draft) => {
                let number = partition_of(&draft.event, broker.partitions()).number;
                let append = appends.entry(number).or_default();
                append.entries.push(draft.fields);
                append.origins.push((index, draft.event));
                receipts.push(None);
            }
        }
    }
    // Side by side, and each to its end: one that fails does not leave the others half-told.
    let stored = futures_util::future::join_all(appends.into_iter().map(
        |(partition, Append { entries, origins })| async move {
            (partition, broker.append(partition, entries).await, origins)
        },
    ));
    for (partition, result, origins) in stored.await {
        let ids = match result {
            Ok(ids) => ids,
            Err(error) => return Err(refusal(state, broker, partition, error).await),
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
    all.ok_or_else(|| ApiError::away("the broker answered for fewer events than it was given"))
}

/// A broker that is full is told apart from a source that nobody works off: the first is the operator's, the second passes.
async fn refusal(
    state: &State,
    broker: &dyn Broker,
    partition: PartitionNumber,
    error: broker::Error,
) -> ApiError {
    if matches!(error, broker::Error::Full(_)) {
        if let Ok(now) = broker.state(partition).await
            && now.lag >= state.retention.backlog_entries
        {
            return ApiError::backlog(format!(
                "{} events wait in this source; it takes no more until some are decided",
                now.lag
            ))
            .cause(error);
        }
        state
            .readiness
            .set_for("publishing", error.to_string(), FULL_FOR);
    }
    error.into()
}

fn answer(mode: Mode, mut receipts: Vec<Receipt>) -> Response {
    match (mode, receipts.pop()) {
        (Mode::Structured | Mode::Binary, Some(Receipt::Refused { error })) => {
            ApiError::bad_request(error).into_response()
        }
        (Mode::Structured | Mode::Binary, Some(stored)) => {
            (StatusCode::ACCEPTED, Json(stored)).into_response()
        }
        (_, last) => {
            receipts.extend(last);
            Json(Receipts { events: receipts }).into_response()
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
    async fn a_structured_event_is_stored_as_it_was_sent() {
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
    async fn an_id_left_out_is_the_entrys() {
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
    async fn binary_mode_is_headers_and_a_body() {
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
    async fn bad_events_are_refused_for_good_and_named() {
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
            "id has the control character U+000A",
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
            "ce-data is no attribute",
        )
        .await;
        check(
            &[("ce-event", "{\"type\":\"t\"}")],
            "",
            StatusCode::BAD_REQUEST,
            "ce-event is no attribute",
        )
        .await;
        check(
            &[("ce-type", "a%0Ab")],
            "",
            StatusCode::BAD_REQUEST,
            "type has the control character U+000A",
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
            "not a JSON list",
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
    async fn a_batch_says_for_each_event_what_became_of_it() {
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
    async fn a_broker_that_is_away_or_full_is_a_reason_to_come_again() {
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
                "causes are for the log: {body}"
            );
            site.state.readiness().is_ready()
        };
        let full = || FakeBroker::failing(|| broker::Error::Full("secret detail".into()));
        // Being away is seen without anybody publishing, by `watch`; a backlog is no fault of the node.
        assert!(
            check(
                FakeBroker::failing(|| broker::Error::Away("secret detail".into())),
                StatusCode::SERVICE_UNAVAILABLE
            )
            .await
        );
        assert!(
            !check(full(), StatusCode::SERVICE_UNAVAILABLE).await,
            "a full broker turns the node unready"
        );
        assert!(check(full().with_lag(1_000_000), StatusCode::TOO_MANY_REQUESTS).await);
    }

    /// Each partition remembers publishers' ids for itself: chosen anew for a retry, it would be another one, and the event there twice.
    #[test]
    fn f14e_a_retry_meets_the_first_attempt_and_keys_spread() {
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
        // An interface: with another hash, retries on both sides of an upgrade would miss each other.
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
