//! `defaults.type`: adds a type to the events of a request that have none, before they are read. The
//! type is stored with the event, so that every node and every later reader sees the same.

use axum::http::{HeaderMap, HeaderValue};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::cloudevents::Mode;
use crate::event::Name;

/// Returns the headers and the body of a request with `kind` as the type of each event that has
/// none. A body that cannot be read stays as it is, and is refused later.
pub(in crate::http) fn add_type(
    mode: Mode,
    mut headers: HeaderMap,
    body: Bytes,
    kind: &Name,
) -> (HeaderMap, Bytes) {
    let body = match mode {
        Mode::Structured => typed(&body, kind).map_or(body, Bytes::from),
        Mode::Batch => batch(&body, kind).map_or(body, Bytes::from),
        Mode::Binary => {
            // The binding encodes anything but printable ASCII as %XX.
            let escape = |byte: u8| match byte {
                b'%' | b'"' | b'\\' => format!("%{byte:02X}"),
                b'!'..=b'~' => char::from(byte).to_string(),
                _ => format!("%{byte:02X}"),
            };
            let text: String = kind.as_str().bytes().map(escape).collect();
            if let (false, Ok(value)) = (
                headers.contains_key("ce-type"),
                HeaderValue::from_str(&text),
            ) {
                headers.insert("ce-type", value);
            }
            body
        }
    };
    (headers, body)
}

/// The document with the type, if it is an object without one.
fn typed(document: &[u8], kind: &Name) -> Option<String> {
    #[derive(Deserialize)]
    struct Document<'a> {
        #[serde(borrow, rename = "type")]
        kind: Option<&'a RawValue>,
    }
    let text = std::str::from_utf8(document).ok()?;
    let Document { kind: None } = serde_json::from_str(text).ok()? else {
        return None;
    };
    let members = text.trim_start().strip_prefix('{')?.trim_start();
    let comma = if members.starts_with('}') { "" } else { "," };
    let kind = serde_json::to_string(kind).ok()?;
    Some(format!("{{\"type\":{kind}{comma}{members}"))
}

fn batch(body: &[u8], kind: &Name) -> Option<String> {
    let documents: Vec<&RawValue> = serde_json::from_slice(body).ok()?;
    let documents: Vec<(&str, Option<String>)> = documents
        .iter()
        .map(|document| (document.get(), typed(document.get().as_bytes(), kind)))
        .collect();
    if documents.iter().all(|(_, typed)| typed.is_none()) {
        return None;
    }
    let documents: Vec<&str> = documents
        .iter()
        .map(|(own, typed)| typed.as_deref().unwrap_or(own))
        .collect();
    Some(format!("[{}]", documents.join(",")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_documents_without_a_type_get_one() {
        let kind = Name::parse("al\"ert").unwrap();
        for (document, expect) in [
            (r#"{"user":1}"#, Some(r#"{"type":"al\"ert","user":1}"#)),
            (" { } ", Some(r#"{"type":"al\"ert"} "#)),
            (
                r#"{"type":null}"#,
                Some(r#"{"type":"al\"ert","type":null}"#),
            ),
            (r#"{"type":"t"}"#, None),
            (r#"{"type":1}"#, None),
            (r#"["type"]"#, None),
            ("{", None),
            ("", None),
        ] {
            assert_eq!(
                typed(document.as_bytes(), &kind).as_deref(),
                expect,
                "{document}"
            );
        }
        let of_batch = |body: &str| batch(body.as_bytes(), &kind);
        assert_eq!(
            of_batch(r#"[{"type":"t"}, {"a":1}, 5]"#).as_deref(),
            Some(r#"[{"type":"t"},{"type":"al\"ert","a":1},5]"#)
        );
        assert_eq!(of_batch(r#"[{"type":"t"}]"#), None);
        assert_eq!(of_batch("{"), None);
    }
}
