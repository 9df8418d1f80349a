//! The form of a notification on a stream: `data:` is the whole notification or only the event's
//! data, and `event:` is the name of its route or the type of the event.

use base64::Engine as _;
use bytes::{BufMut as _, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use crate::delivery::subscription::Record;
use crate::event::{Name, Payload, is_reserved_event_name};

/// The content of `data:`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// One JSON object with the event's attributes, the route and the data.
    #[default]
    Notification,
    /// Only the event's data, or the body that replaces it in the route.
    Data,
}

/// The source of `event:`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EventName {
    /// The name that the route sets, if it sets one.
    #[default]
    Route,
    /// The type of the event.
    Type,
}

/// The form of the notifications of a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Framing {
    pub format: Format,
    pub event: EventName,
}

/// The parts of a [`Framing`] that a request or a token chooses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct FramingChoice {
    pub format: Option<Format>,
    pub event: Option<EventName>,
}

impl FramingChoice {
    /// Completes the choice with another one, then with the default.
    pub fn or(self, other: Self, default: Framing) -> Framing {
        Framing {
            format: self.format.or(other.format).unwrap_or(default.format),
            event: self.event.or(other.event).unwrap_or(default.event),
        }
    }
}

/// Whether a reader ends a line at this character. SSE ends lines at CR and LF; clients in Python
/// often use `str.splitlines`, which also ends them at the others.
fn ends_line(c: char) -> bool {
    matches!(
        c,
        '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}'
    )
}

/// Appends `event:` if the notification has a name. A type that is a reserved name is left out, so
/// that `onmessage` fires: a client must not take a notification for the state of its stream.
pub(super) fn put_event_name(out: &mut BytesMut, record: &Record, route: usize, event: EventName) {
    let name = match event {
        EventName::Route => record.route(route).event_name.as_ref().map(Name::as_str),
        EventName::Type => Some(record.notification().event.kind.as_str())
            .filter(|kind| !is_reserved_event_name(kind)),
    };
    if let Some(name) = name {
        out.put_slice(b"event: ");
        // Names have no control characters, but may have other line ends.
        out.put_slice(name.replace(ends_line, " ").as_bytes());
        out.put_slice(b"\n");
    }
}

/// Renders the event's data as `data:` lines, with the blank line that ends the notification. Text,
/// also as a JSON string, has a `data:` line for each of its lines; other JSON is one line. Bytes
/// are base64.
pub(super) fn payload(record: &Record, route: usize) -> Bytes {
    let mut out = BytesMut::new();
    match (&record.route(route).body, &record.notification().event.data) {
        (Some(body), _) => put_json(&mut out, body.get()),
        (None, Payload::None) => put_text(&mut out, ""),
        (None, Payload::Json(json)) => put_json(&mut out, json),
        (None, Payload::Text(text)) => put_text(&mut out, text),
        (None, Payload::Binary(bytes)) => {
            let encoded = base64::engine::general_purpose::STANDARD.encode(bytes);
            put_text(&mut out, &encoded);
        }
    }
    out.put_slice(b"\n");
    out.freeze()
}

fn put_json(out: &mut BytesMut, json: &str) {
    if json.starts_with('"')
        && let Ok(text) = serde_json::from_str::<String>(json)
    {
        return put_text(out, &text);
    }
    out.put_slice(b"data: ");
    put_data(out, json.as_bytes());
    out.put_slice(b"\n");
}

/// A character besides line feed and carriage return that ends a line for some readers, such as
/// `str.splitlines` of Python: U+0085, U+2028 or U+2029. The others of that kind are control
/// characters, which JSON escapes anyway.
struct Separator {
    at: usize,
    n_bytes: usize,
    /// Its escape in JSON.
    escape: &'static [u8],
}

/// The first separator in a text.
fn next_separator(text: &[u8]) -> Option<Separator> {
    // The first bytes of the three. They also begin other characters, which are rare in most texts.
    memchr::memchr2_iter(0xc2, 0xe2, text).find_map(|at| {
        let (n_bytes, escape): (_, &[u8]) = match text[at..] {
            [0xc2, 0x85, ..] => (2, br"\u0085"),
            [0xe2, 0x80, 0xa8, ..] => (3, br"\u2028"),
            [0xe2, 0x80, 0xa9, ..] => (3, br"\u2029"),
            _ => return None,
        };
        Some(Separator {
            at,
            n_bytes,
            escape,
        })
    })
}

/// Appends part of a `data:` field: JSON, in which separators can only be within strings, so that
/// their escapes mean the same. JSON written by the node has no line ends; a payload passed through
/// unchanged could contain one only if an earlier check failed.
pub(super) fn put_data(out: &mut BytesMut, mut json: &[u8]) {
    while let Some(separator) = next_separator(json) {
        put_lines(out, &json[..separator.at]);
        out.put_slice(separator.escape);
        json = &json[separator.at + separator.n_bytes..];
    }
    put_lines(out, json);
}

fn put_lines(out: &mut BytesMut, mut text: &[u8]) {
    while let Some(at) = memchr::memchr2(b'\n', b'\r', text) {
        out.put_slice(&text[..at]);
        out.put_slice(b"\ndata: ");
        text = &text[at + 1..];
    }
    out.put_slice(text);
}

fn put_text(out: &mut BytesMut, text: &str) {
    for line in text.replace("\r\n", "\n").split(ends_line) {
        out.put_slice(b"data: ");
        out.put_slice(line.as_bytes());
        out.put_slice(b"\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> String {
        let mut out = BytesMut::new();
        put_text(&mut out, text);
        String::from_utf8(out.to_vec()).unwrap()
    }

    fn json(json: &str) -> String {
        let mut out = BytesMut::new();
        put_json(&mut out, json);
        String::from_utf8(out.to_vec()).unwrap()
    }

    #[test]
    fn each_line_of_a_text_has_its_own_field() {
        assert_eq!(text(""), "data: \n");
        assert_eq!(text(" a: b"), "data:  a: b\n");
        assert_eq!(
            text("a\nb\r\nc\rd\r\n\ne\n"),
            "data: a\ndata: b\ndata: c\ndata: d\ndata: \ndata: e\ndata: \n"
        );
        assert_eq!(
            text("event: close\n\nid: 1\u{2028}retry: 0\u{85}:\x0b\x0c\x1c\x1d\x1e\u{2029}")
                .lines()
                .filter(|line| !line.starts_with("data: "))
                .count(),
            0
        );
    }

    #[test]
    fn json_is_one_line_and_a_string_of_it_is_text() {
        assert_eq!(json("{\"a\":[1,null]}"), "data: {\"a\":[1,null]}\n");
        assert_eq!(json("null"), "data: null\n");
        assert_eq!(
            json("{\"a\":\"b\u{2028}c\u{85}\"}"),
            "data: {\"a\":\"b\\u2028c\\u0085\"}\n"
        );
        assert_eq!(json("\"<p>\\n\\u00e9</p>\""), "data: <p>\ndata: é</p>\n");
    }
}
