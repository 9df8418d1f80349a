//! CloudEvents over HTTP in the structured, binary and batch content modes (CloudEvents 1.0.2,
//! "HTTP Protocol Binding"): from the headers and the body of a request to the fields of source
//! entries.
//!
//! Performs no I/O. `event` defines the valid fields of an event, and `handlers::events` stores
//! them.

use std::borrow::Cow;

use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;
use bytes::Bytes;
use serde_json::value::RawValue;

use super::{ApiError, Limits};
use crate::event::{
    EntryId, Event, Malformed, essence, foreign_charset, is_json, is_text, utf8_json,
};

/// The content mode of a request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    Structured,
    Binary,
    Batch,
}

impl Mode {
    /// Determines the mode of a request.
    ///
    /// # Errors
    /// 415 for a content type that holds no event that this node can read.
    pub fn of(headers: &HeaderMap) -> Result<Self, ApiError> {
        let content_type = headers
            .get(CONTENT_TYPE)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default();
        let essence = essence(content_type);
        // Binary mode is recognised by its headers; its content type is that of the data.
        let is_binary = headers.keys().any(|name| name.as_str().starts_with("ce-"));
        let mode = match (essence.strip_prefix("application/cloudevents"), is_binary) {
            (Some("-batch+json"), _) => Self::Batch,
            (Some("+json"), _) => Self::Structured,
            // HTTP binding, section 3: the prefix alone makes it an event, in whichever format.
            (Some(_), _) => return Err(unknown_format(&essence)),
            (None, true) => Self::Binary,
            (None, false) if essence == "application/json" => Self::Structured,
            (None, false) => {
                let error = ApiError::unsupported_media_type(format!(
                    "cannot read an event from content type '{}' without ce-* headers",
                    essence.escape_debug()
                ));
                return Err(error.fix("send one CloudEvent as application/cloudevents+json, several as application/cloudevents-batch+json, or the attributes as ce-* headers"));
            }
        };
        // Data that is neither text nor JSON is passed on as bytes, in whichever encoding.
        let is_decoded =
            mode != Self::Binary || is_json(Some(content_type)) || is_text(content_type);
        match foreign_charset(content_type).filter(|_| is_decoded) {
            None => Ok(mode),
            Some(charset) => Err(ApiError::unsupported_media_type(format!(
                "cannot read text in the charset '{}'",
                charset.escape_debug()
            ))
            .fix("send it in UTF-8; to pass it on as bytes, use a content type such as application/octet-stream")),
        }
    }

    /// Reads the events of a request in this mode, in order. `source` is the default of the
    /// attribute of that name.
    ///
    /// # Errors
    /// 400 or 413 for a batch that cannot be split into events. An invalid event is an error of
    /// that event alone.
    pub fn drafts(
        self,
        headers: &HeaderMap,
        body: Bytes,
        source: &str,
        limits: &Limits,
    ) -> Result<Vec<Result<Draft, Malformed>>, ApiError> {
        let drafts = match self {
            Self::Structured => vec![Draft::structured(body, source)],
            Self::Binary => vec![Draft::binary(headers, body, source)],
            Self::Batch => batch(&body, limits, source)?,
        };
        let drafts = drafts.into_iter();
        Ok(drafts
            .map(|draft| draft?.within(limits.event_bytes))
            .collect())
    }
}

fn unknown_format(essence: &str) -> ApiError {
    ApiError::unsupported_media_type(format!(
        "cannot read events in the format '{}'",
        essence.escape_debug()
    ))
    .fix("send JSON: application/cloudevents+json, or application/cloudevents-batch+json for several events")
}

/// A valid event with the fields of its future entry.
#[derive(Debug)]
pub struct Draft {
    pub event: Event,
    pub fields: Vec<(Bytes, Bytes)>,
}

impl Draft {
    /// Checks the size in the same way as ingest does, so that no stored event is dead-lettered for
    /// its size.
    fn within(self, max_bytes: usize) -> Result<Self, Malformed> {
        let n_bytes: usize = self
            .fields
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum();
        if n_bytes > max_bytes {
            return Err(
                Malformed::new(format!("has {n_bytes} bytes; the limit is {max_bytes}"))
                    .of("the event"),
            );
        }
        Ok(self)
    }

    /// Stores the document as it was sent, so that an omitted id or time stays omitted and is later
    /// taken from the entry.
    fn structured(document: Bytes, source: &str) -> Result<Self, Malformed> {
        let event = Event::from_json(EntryId::default(), source, &document)?;
        Ok(Self {
            event,
            fields: vec![(Bytes::from_static(b"event"), document)],
        })
    }

    /// Stores the headers as flat fields.
    fn binary(headers: &HeaderMap, data: Bytes, source: &str) -> Result<Self, Malformed> {
        let mut fields = Vec::new();
        for (name, value) in headers {
            let Some(name) = name.as_str().strip_prefix("ce-") else {
                continue;
            };
            if ["data", "data_base64", "datacontenttype", "event"].contains(&name) {
                return Err(Malformed::new(
                    "is not a valid attribute; send the data as the body and its type as Content-Type",
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

/// Decodes a header value as the binding encodes it: optionally in double quotes, with `%XX` for
/// anything but printable ASCII (section 3.1.3.2).
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
            // A % without two hex digits is taken literally; no publisher can have meant anything
            // else.
            _ => {
                text.push(*byte);
                rest = tail;
            }
        }
    }
    Cow::Owned(text)
}

/// Splits a batch. An invalid event becomes a refusal of that event.
///
/// # Errors
/// 400 for a batch that is not UTF-8 or not a JSON array, 413 for one with too many
/// events.
fn batch(
    body: &Bytes,
    limits: &Limits,
    source: &str,
) -> Result<Vec<Result<Draft, Malformed>>, ApiError> {
    let text = utf8_json(body).map_err(|fault| fault.of("the batch"))?;
    let documents: Vec<&RawValue> = serde_json::from_str(text).map_err(|e| {
        ApiError::bad_request(format!("the batch is not a JSON array of events: {e}"))
    })?;
    if documents.len() > limits.batch_events {
        return Err(ApiError::too_large(format!(
            "the batch has {} events; the limit is {}",
            documents.len(),
            limits.batch_events
        ))
        .fix("split it into smaller batches"));
    }
    let drafts = documents
        .into_iter()
        .map(|document| Draft::structured(body.slice_ref(document.get().as_bytes()), source));
    Ok(drafts.collect())
}
