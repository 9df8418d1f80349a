//! Properties of the parsers of foreign bytes, which hold for any input. Each function is the body of
//! one fuzz target, and the tests run it on the corpus; it panics where a property does not hold.

use std::path::Path;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use bytes::{Bytes, BytesMut};
use pointsman::broker::redis::resp::{Decoder, Frame, FrameError};
use pointsman::config::{Config, Layers};
use pointsman::delivery::subscription::Record;
use pointsman::delivery::subscription::cursor::Cursor;
use pointsman::event::{EntryId, Event, Name, Notification, Plan};
use pointsman::http::Limits;
use pointsman::http::cloudevents::Mode;
use pointsman_plugin::Router as _;
use pointsman_plugin::testing;
use rules::Rules;

const SOURCE: &str = "pointsman:events";
const ENTRY: EntryId = EntryId {
    ms: 1_800_000_000_000,
    seq: 7,
};
/// Separates the fields of an entry, and the parts of an input. Not NUL, so that the corpus
/// consists of text files.
const SEPARATOR: u8 = 0x1e;

/// A cursor that is accepted is exactly what the node would write, and needs no preflight.
pub(crate) fn cursor(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    let user = Name::parse("ann").expect("a name");
    if let Ok(cursor) = Cursor::decode(text, &user) {
        let mut written = String::new();
        cursor.encode(&user, &mut written);
        assert_eq!(written, text);
        assert!(text.len() <= 126, "{} bytes", text.len());
    }
}

/// A request that is accepted becomes entries that ingest reads as the same events. The input is
/// header lines, an empty line and the body.
pub(crate) fn cloudevents(input: &[u8]) {
    let end = input.windows(2).position(|two| two == b"\n\n");
    let (head, body) = end.map_or((input, &[][..]), |end| (&input[..end], &input[end + 2..]));
    let mut headers = HeaderMap::new();
    for line in head.split(|&byte| byte == b'\n') {
        let Some(colon) = line.iter().position(|&byte| byte == b':') else {
            continue;
        };
        if let (Ok(name), Ok(value)) = (
            HeaderName::from_bytes(&line[..colon]),
            HeaderValue::from_bytes(line[colon + 1..].trim_ascii()),
        ) {
            headers.append(name, value);
        }
    }
    let Ok(mode) = Mode::of(&headers) else { return };
    let body = Bytes::copy_from_slice(body);
    let Ok(drafts) = mode.drafts(&headers, body, SOURCE, &Limits::default()) else {
        return;
    };
    for draft in drafts {
        match draft {
            Ok(draft) => {
                let read = Event::from_fields(EntryId::default(), SOURCE, &draft.fields);
                assert_eq!(read.as_ref(), Ok(&draft.event));
                check_event(&draft.event);
            }
            Err(reason) => check_line(&reason.to_string()),
        }
    }
}

/// An entry that is accepted survives its way through the log. Fields are `name=value`, with a
/// separator between them.
pub(crate) fn entry(input: &[u8]) {
    let fields: Vec<(Bytes, Bytes)> = input
        .split(|&byte| byte == SEPARATOR)
        .map(|field| {
            let at = field.iter().position(|&byte| byte == b'=');
            let (name, value) = at.map_or((field, &[][..]), |at| (&field[..at], &field[at + 1..]));
            (Bytes::copy_from_slice(name), Bytes::copy_from_slice(value))
        })
        .collect();
    // The names are read from entries that are invalid, too.
    let names = Event::names_in(SOURCE, &fields);
    match Event::from_fields(ENTRY, SOURCE, &fields) {
        Ok(event) => {
            let (id, source, kind) = names;
            assert_eq!(id.as_ref(), event.id_given.then_some(&event.id));
            assert_eq!(source.as_ref(), Some(&event.source));
            assert_eq!(kind.as_ref(), Some(&event.kind));
            check_event(&event);
        }
        Err(reason) => check_line(&reason.to_string()),
    }
}

/// The frames do not depend on how the input is split, and no more is buffered than one text and
/// one line. The first byte is the size of the pieces.
pub(crate) fn resp(input: &[u8]) {
    let Some((&piece, input)) = input.split_first() else {
        return;
    };
    let whole = frames(input, input.len().max(1));
    let split = frames(input, usize::from(piece).max(1));
    assert_eq!(whole.0, split.0);
    assert_eq!(whole.1.is_err(), split.1.is_err());
}

fn frames(input: &[u8], piece: usize) -> (Vec<Frame>, Result<(), FrameError>) {
    let (mut decoder, mut buffer, mut frames) = (Decoder::default(), BytesMut::new(), Vec::new());
    for piece in input.chunks(piece) {
        buffer.extend_from_slice(piece);
        loop {
            match decoder.next(&mut buffer) {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(error) => return (frames, Err(error)),
            }
        }
        assert!(buffer.len() <= 66 * 1024, "{} bytes wait", buffer.len());
    }
    (frames, Ok(()))
}

/// A list of rules is refused with its issues, or decides every event without a failure. The input
/// is the configuration and the payload of the event, both as JSON, and its attributes as one
/// object.
pub(crate) fn rules(input: &[u8]) {
    let mut parts = input.splitn(3, |&byte| byte == SEPARATOR);
    let mut next = || serde_json::from_slice::<serde_json::Value>(parts.next().unwrap_or_default());
    let Ok(config) = next() else { return };
    let plugin: Rules = match testing::configure(config) {
        Ok(plugin) => plugin,
        Err(issues) => return assert!(!issues.is_empty(), "refused without an issue"),
    };
    let mut event = testing::event("order.created");
    if let Ok(payload) = next() {
        event = event.json(&payload);
    }
    if let Ok(serde_json::Value::Object(attributes)) = next() {
        for (name, value) in &attributes {
            event = match value {
                serde_json::Value::Bool(flag) => event.attribute(name, *flag),
                serde_json::Value::String(text) => event.attribute(name, text.as_str()),
                serde_json::Value::Number(n) => match n.as_i64() {
                    Some(integer) => event.attribute(name, integer),
                    None => event.attribute(name, n.as_f64().unwrap_or_default()),
                },
                _ => event,
            };
        }
    }
    if let Some(event) = event.seen_by(&plugin) {
        let decision = plugin.resolve(&event);
        assert!(decision.is_ok(), "{decision:?}");
    }
    drop(testing::logged());
}

/// A configuration is accepted or refused with one line. The input is a TOML file.
pub(crate) fn configuration(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    let layers = match Layers::text(Path::new("pointsman.toml"), text) {
        Ok(layers) => layers,
        Err(error) => return check_line(&error.to_string()),
    };
    // Files that the configuration names are not part of the input.
    if text.contains("_file") {
        return;
    }
    if let Err(error) = Config::new(&layers) {
        check_line(&error.to_string());
    }
}

/// An event can be written as JSON and read again, alone and in the record of a notification.
fn check_event(event: &Event) {
    let document = event.to_json();
    check_line(&document);
    let given = Event {
        id_given: true,
        ..event.clone()
    };
    let read = Event::from_json(ENTRY, SOURCE, document.as_bytes());
    assert_eq!(read.as_ref(), Ok(&given), "{document}");
    let notification = Notification {
        entry: ENTRY,
        event: event.clone(),
        plan: Plan::default(),
    };
    let record = serde_json::to_vec(&notification).expect("a record");
    let read = Record::parse(&record).expect("the node wrote it");
    assert_eq!(read.notification().event.to_json(), document);
}

/// SSE frames, logs and answers rely on it.
fn check_line(text: &str) {
    assert!(!text.is_empty() && !text.contains(['\n', '\r']), "{text:?}");
}
