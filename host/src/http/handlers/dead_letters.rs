//! `/v1/dead-letters`: dead letters of all partitions. They can be listed, shown with their
//! original fields, redriven and dropped. Events that wait for a retry are listed apart. A dead letter is identified by `partition/id`, as in the
//! path.

use std::sync::Arc;

use axum::Json;
use axum::extract;
use axum::http::StatusCode;
use base64::Engine as _;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::broker::{DeadLetter, Operations, Partitions};
use crate::event::{EntryId, Malformed, PartitionNumber};
use crate::http::extract::{ApiKey, Path, Query, Reserved};
use crate::http::{ApiError, State};

/// The maximum number of dead letters in one response.
const MAX_LIMIT: usize = 1_000;

/// The bytes of reasons, plugins and sources at which a response ends.
const MAX_BYTES: usize = 1024 * 1024;

/// Dead letters per broker read. Each may hold megabytes, which are examined but not transferred.
const READ: usize = 16;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct Page {
    /// The `id` of the last dead letter of the previous page.
    after: Option<String>,
    #[serde(default = "default_limit")]
    limit: usize,
    /// Whether to list the dead letters of events that wait for a retry, instead of those that stay.
    #[serde(default)]
    retrying: bool,
}

fn default_limit() -> usize {
    100
}

#[derive(Debug, Serialize)]
pub(in crate::http) struct Listed {
    dead_letters: Vec<Shown>,
    /// The `after` of the next page; absent on the last page.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

#[derive(Debug, Serialize)]
pub(in crate::http) struct Shown {
    /// `partition/id`.
    id: String,
    /// The key of the source.
    source: String,
    /// The id of the original entry.
    entry: EntryId,
    reason: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    plugin: Option<String>,
    attempts: u32,
    /// The size of the entry in bytes, or a lower bound, if the dead letter holds only its
    /// beginning.
    #[serde(skip_serializing_if = "Option::is_none")]
    entry_bytes: Option<u64>,
    /// When the event is tried again, in milliseconds since the Unix epoch; only of one that waits
    /// for a retry.
    #[serde(skip_serializing_if = "Option::is_none")]
    due_ms: Option<u64>,
    /// The entry's original fields; only when a single dead letter is shown.
    #[serde(skip_serializing_if = "Option::is_none")]
    fields: Option<Vec<Field>>,
}

impl Shown {
    /// The bytes of its texts.
    fn n_bytes(&self) -> usize {
        self.reason.len() + self.source.len() + self.plugin.as_ref().map_or(0, String::len)
    }
}

/// A field of untrusted bytes: text if it is UTF-8, base64 otherwise.
#[derive(Debug, Serialize)]
struct Field {
    #[serde(flatten)]
    name: FieldName,
    #[serde(flatten)]
    value: FieldValue,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum FieldName {
    Name(String),
    NameBase64(String),
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum FieldValue {
    Value(String),
    ValueBase64(String),
}

impl Field {
    fn new((name, value): (Bytes, Bytes)) -> Self {
        let text = |bytes: &Bytes| {
            std::str::from_utf8(bytes)
                .map(str::to_owned)
                .map_err(|_| base64::engine::general_purpose::STANDARD.encode(bytes))
        };
        Self {
            name: text(&name).map_or_else(FieldName::NameBase64, FieldName::Name),
            value: text(&value).map_or_else(FieldValue::ValueBase64, FieldValue::Value),
        }
    }
}

fn shown(
    broker: &dyn Partitions,
    number: PartitionNumber,
    letter: DeadLetter,
    with_fields: bool,
) -> Shown {
    let partition = broker
        .partitions()
        .iter()
        .find(|partition| partition.number == number);
    Shown {
        id: format!("{}/{}", number.0, letter.id),
        source: partition
            .map(|partition| partition.source.clone())
            .unwrap_or_default(),
        entry: letter.entry,
        reason: letter.why.reason,
        plugin: letter.why.plugin,
        attempts: letter.why.attempts,
        entry_bytes: letter.oversized.map(|size| size.bytes),
        due_ms: letter.due_ms,
        fields: with_fields.then(|| letter.why.fields.into_iter().map(Field::new).collect()),
    }
}

pub(in crate::http) async fn list(
    extract::State(state): extract::State<Arc<State>>,
    _: ApiKey,
    Query(page): Query<Page>,
    _: Reserved,
) -> Result<Json<Listed>, ApiError> {
    let limit = page.limit.clamp(1, MAX_LIMIT);
    let (first, mut after) = match &page.after {
        None => (PartitionNumber(0), EntryId::default()),
        Some(id) => parse_id(id)?,
    };
    let broker = state.broker()?;
    let mut dead: Vec<Shown> = Vec::new();
    let mut n_bytes = 0;
    for partition in broker
        .partitions()
        .iter()
        .filter(|partition| partition.number >= first)
    {
        if partition.number > first {
            after = EntryId::default();
        }
        while dead.len() < limit && n_bytes < MAX_BYTES {
            let n = READ.min(limit - dead.len());
            let letters = if page.retrying {
                broker.retrying(partition.number, after, n).await?
            } else {
                broker
                    .dead_letter_headers(partition.number, after, n)
                    .await?
            };
            let Some(last) = letters.last() else { break };
            after = last.id;
            for letter in letters {
                let shown = shown(broker.as_ref(), partition.number, letter, false);
                n_bytes += shown.n_bytes();
                dead.push(shown);
            }
        }
    }
    let next = if dead.len() >= limit || n_bytes >= MAX_BYTES {
        dead.last().map(|last| last.id.clone())
    } else {
        None
    };
    Ok(Json(Listed {
        dead_letters: dead,
        next,
    }))
}

pub(in crate::http) async fn show(
    extract::State(state): extract::State<Arc<State>>,
    _: ApiKey,
    Path((partition, id)): Path<(u8, EntryId)>,
) -> Result<Json<Shown>, ApiError> {
    let (broker, partition) = known(&state, partition)?;
    let before = id.before().ok_or_else(gone)?;
    let mut letters = broker.dead_letters(partition, before, 1).await?;
    letters.extend(broker.retrying(partition, before, 1).await?);
    let letter = letters
        .into_iter()
        .find(|letter| letter.id == id)
        .ok_or_else(gone)?;
    Ok(Json(shown(broker, partition, letter, true)))
}

pub(in crate::http) async fn redrive(
    extract::State(state): extract::State<Arc<State>>,
    _: ApiKey,
    Path((partition, id)): Path<(u8, EntryId)>,
) -> Result<StatusCode, ApiError> {
    let (broker, partition) = known(&state, partition)?;
    let before = id.before().ok_or_else(gone)?;
    let letters = broker.dead_letter_headers(partition, before, 1).await?;
    if let Some(size) = letters
        .first()
        .filter(|letter| letter.id == id)
        .and_then(|letter| letter.oversized)
    {
        return Err(ApiError::conflict(format!(
            "the dead letter holds only the beginning of an entry of {} bytes and {} fields, which would be dead-lettered again; publish the event in smaller parts, then drop the dead letter",
            size.bytes, size.fields
        )));
    }
    if broker.redrive(partition, id).await? {
        Ok(StatusCode::NO_CONTENT)
    } else {
        Err(gone())
    }
}

pub(in crate::http) async fn drop(
    extract::State(state): extract::State<Arc<State>>,
    _: ApiKey,
    Path((partition, id)): Path<(u8, EntryId)>,
) -> Result<StatusCode, ApiError> {
    let (broker, partition) = known(&state, partition)?;
    if broker.drop_dead_letter(partition, id).await? {
        Ok(StatusCode::NO_CONTENT)
    } else {
        Err(gone())
    }
}

fn gone() -> ApiError {
    ApiError::not_found("there is no such dead letter")
}

fn known(state: &State, number: u8) -> Result<(&dyn Operations, PartitionNumber), ApiError> {
    let broker = state.broker()?;
    let number = PartitionNumber(number);
    if broker
        .partitions()
        .iter()
        .any(|partition| partition.number == number)
    {
        Ok((broker.as_ref(), number))
    } else {
        Err(gone())
    }
}

fn parse_id(text: &str) -> Result<(PartitionNumber, EntryId), Malformed> {
    let malformed = || {
        Malformed::new(format!(
            "'{}' is not a valid dead letter id; use one such as 0/1700000000000-0",
            text.escape_debug()
        ))
    };
    let (partition, id) = text.split_once('/').ok_or_else(malformed)?;
    Ok((
        PartitionNumber(partition.parse().map_err(|_| malformed())?),
        id.parse().map_err(|_| malformed())?,
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::broker::fake::FakeBroker;
    use crate::http::site::Site;

    fn site() -> Site {
        let broker = FakeBroker::with_partitions(2);
        for (partition, ms) in [(0, 1), (0, 2), (1, 1), (1, 3)] {
            broker.bury(
                PartitionNumber(partition),
                EntryId { ms, seq: 0 },
                vec![(Bytes::from_static(b"type"), Bytes::from_static(&[0xff]))],
            );
        }
        Site::dev(broker)
    }

    #[tokio::test]
    async fn a_list_pages_through_all_partitions() {
        let site = site();
        let (mut path, mut found) = ("/v1/dead-letters?limit=3".to_owned(), Vec::new());
        for _ in 0..3 {
            let (_, _, body) = site.request("GET", &path, &[], "").await;
            found.extend(
                body["dead_letters"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|dead| dead["id"].as_str().unwrap().to_owned()),
            );
            assert!(
                body["dead_letters"][0]["reason"]
                    .as_str()
                    .is_some_and(|reason| !reason.is_empty())
            );
            let Some(next) = body["next"].as_str() else {
                break;
            };
            path = format!("/v1/dead-letters?limit=3&after={next}");
        }
        assert_eq!(found, ["0/1-0", "0/2-0", "1/1-0", "1/3-0"]);
    }

    #[tokio::test]
    async fn a_long_list_is_read_in_small_batches() {
        let broker = FakeBroker::default();
        for ms in 1..=100 {
            broker.bury(PartitionNumber(0), EntryId { ms, seq: 0 }, Vec::new());
        }
        let site = Site::dev(broker);
        let (_, _, body) = site
            .request("GET", "/v1/dead-letters?limit=99", &[], "")
            .await;
        assert_eq!(
            (
                body["dead_letters"].as_array().unwrap().len(),
                &body["next"]
            ),
            (99, &json!("0/99-0"))
        );
        assert!(site.broker.most_dead_read() <= READ);
    }

    #[tokio::test]
    async fn a_dead_letter_is_shown_with_its_fields_and_redriven_or_dropped_once() {
        let site = site();
        let (_, _, body) = site.request("GET", "/v1/dead-letters/1/3-0", &[], "").await;
        assert_eq!(
            body["fields"],
            json!([{ "name": "type", "value_base64": "/w==" }])
        );
        assert_eq!(
            site.request("POST", "/v1/dead-letters/1/3-0/redrive", &[], "")
                .await
                .0,
            StatusCode::NO_CONTENT
        );
        assert_eq!(
            site.request("DELETE", "/v1/dead-letters/0/1-0", &[], "")
                .await
                .0,
            StatusCode::NO_CONTENT
        );
        for (method, path) in [
            ("GET", "/v1/dead-letters/1/3-0"),
            ("GET", "/v1/dead-letters/0/0-0"),
            ("GET", "/v1/dead-letters/7/1-0"),
            ("POST", "/v1/dead-letters/1/3-0/redrive"),
            ("DELETE", "/v1/dead-letters/0/1-0"),
        ] {
            assert_eq!(
                site.request(method, path, &[], "").await.0,
                StatusCode::NOT_FOUND,
                "{method} {path}"
            );
        }
    }
}
