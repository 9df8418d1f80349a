//! A CloudEvents 1.0 event: parsed from the fields of a source entry or from its JSON format,
//! written as JSON.
//!
//! The only module that knows the CloudEvents formats (CloudEvents 1.0.2, "JSON Event Format").
//! `http::events` converts the headers of HTTP's binary mode to the same fields.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use bytes::Bytes;
use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{BoundedName, EntryId, LongName, Name};

/// Why external input is invalid. Reads as the end of a sentence that starts with the name of the
/// input.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(String);

impl Malformed {
    pub fn new(what: impl Into<String>) -> Self {
        Self(what.into())
    }

    /// Returns the same error with the name of the input prepended.
    #[must_use]
    pub fn of(self, thing: impl fmt::Display) -> Self {
        Self(format!("{thing} {}", self.0))
    }
}

/// The value of an extension attribute.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Value {
    Flag(bool),
    Integer(i64),
    Decimal(f64),
    Text(String),
}

/// CloudEvents `data`, interpreted by its `datacontenttype`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Payload {
    #[default]
    None,
    /// Valid JSON on one line, without white space outside strings.
    Json(Arc<str>),
    Text(Arc<str>),
    Binary(Bytes),
}

/// A CloudEvents 1.0 event.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    pub id: Name,
    pub source: LongName,
    /// CloudEvents `type`.
    pub kind: Name,
    pub subject: Option<LongName>,
    /// CloudEvents `time`, in milliseconds since the Unix epoch.
    pub time_ms: u64,
    pub datacontenttype: Option<Name>,
    pub dataschema: Option<LongName>,
    /// Extension attributes. Names are 1 to 64 characters of `a-z 0-9 _`, none of them a core name.
    pub attributes: BTreeMap<String, Value>,
    pub data: Payload,
    /// Whether the publisher set the id; only then can a retry be detected.
    pub id_given: bool,
}

impl Event {
    /// The longest string value of an extension attribute, in bytes: room for a list of a few
    /// thousand users.
    pub const MAX_ATTRIBUTE: usize = 64 * 1024;
    /// The most extension attributes.
    pub const MAX_ATTRIBUTES: usize = 64;

    /// Parses an event from the fields of a source entry: either flat fields named as the
    /// CloudEvents attributes, or one field `event` with a CloudEvents JSON document. A missing
    /// `id` defaults to the entry's id, a missing `time` to its time, a missing `source` to the
    /// name of the source.
    ///
    /// # Errors
    /// [`Malformed`] names the field and its fault; such an entry is dead-lettered.
    pub fn from_fields(
        entry: EntryId,
        source: &str,
        fields: &[(Bytes, Bytes)],
    ) -> Result<Self, Malformed> {
        Self::from_fields_at(entry, entry.ms, source, fields)
    }

    /// Like [`Event::from_fields`], for an entry whose id may not be a time of day. A missing
    /// `time` defaults to `time_ms`, in milliseconds since the Unix epoch.
    ///
    /// # Errors
    /// The same as [`Event::from_fields`].
    pub fn from_fields_at(
        entry: EntryId,
        time_ms: u64,
        source: &str,
        fields: &[(Bytes, Bytes)],
    ) -> Result<Self, Malformed> {
        if let [(name, document)] = fields
            && name.as_ref() == b"event"
        {
            return Self::from_json_at(entry, time_ms, source, document);
        }
        let mut draft = Draft::default();
        let mut data = None;
        for (name, value) in fields {
            let name = std::str::from_utf8(name)
                .map_err(|_| Malformed::new("a field name is not UTF-8"))?;
            if name == "data" {
                if data.replace(value).is_some() {
                    return Err(Malformed::new("appears twice").of("data"));
                }
                continue;
            }
            if name == "event" {
                return Err(Malformed::new("must be the only field, or be omitted").of("event"));
            }
            if name == "data_base64" {
                let fix = "is valid in JSON documents only; put the raw bytes into 'data' with a datacontenttype such as application/octet-stream";
                return Err(Malformed::new(fix).of("data_base64"));
            }
            let text = std::str::from_utf8(value)
                .map_err(|_| Malformed::new("is not UTF-8").of(printable(name)))?;
            draft.set(name, Value::Text(text.to_owned()))?;
        }
        draft.finish(entry, time_ms, source, |content_type| match data {
            None => Ok(Payload::None),
            Some(bytes) => Payload::parse(content_type, bytes),
        })
    }

    /// Returns the `id`, `source` and `type` that the fields of a source entry name, each if it is
    /// readable, even if they do not form a valid event. A missing `source` defaults to the name of
    /// the source.
    pub fn names_in(
        source: &str,
        fields: &[(Bytes, Bytes)],
    ) -> (Option<Name>, Option<LongName>, Option<Name>) {
        #[derive(Deserialize)]
        struct Document<'a> {
            #[serde(borrow)]
            id: Option<&'a RawValue>,
            #[serde(borrow)]
            source: Option<&'a RawValue>,
            #[serde(borrow, rename = "type")]
            kind: Option<&'a RawValue>,
        }
        fn member<const MAX: usize>(raw: &RawValue) -> Option<BoundedName<MAX>> {
            serde_json::from_str(raw.get()).ok()
        }
        fn field<const MAX: usize>(value: &Bytes) -> Option<BoundedName<MAX>> {
            BoundedName::parse(std::str::from_utf8(value).ok()?).ok()
        }
        let missing = || LongName::parse(source).ok();
        if let [(name, document)] = fields
            && name.as_ref() == b"event"
        {
            let Ok(Document { id, source, kind }) = serde_json::from_slice(document) else {
                return (None, None, None);
            };
            return (
                id.and_then(member),
                source.map_or_else(missing, member),
                kind.and_then(member),
            );
        }
        let named = |wanted: &str| {
            fields
                .iter()
                .find(|(name, _)| name.as_ref() == wanted.as_bytes())
                .map(|(_, value)| value)
        };
        (
            named("id").and_then(field),
            named("source").map_or_else(missing, field),
            named("type").and_then(field),
        )
    }

    /// Parses an event from a CloudEvents JSON document.
    ///
    /// # Errors
    /// The same as [`Event::from_fields`].
    pub fn from_json(entry: EntryId, source: &str, document: &[u8]) -> Result<Self, Malformed> {
        Self::from_json_at(entry, entry.ms, source, document)
    }

    fn from_json_at(
        entry: EntryId,
        time_ms: u64,
        source: &str,
        document: &[u8],
    ) -> Result<Self, Malformed> {
        let text = utf8_json(document).map_err(|e| e.of("the CloudEvents document"))?;
        let members: Members = serde_json::from_str(text).map_err(|e| {
            Malformed::new(format!("is not a JSON object: {e}")).of("the CloudEvents document")
        })?;
        let mut draft = Draft::default();
        let (mut data, mut data_base64) = (None, None);
        for (name, raw) in members.0 {
            let slot = match name.as_str() {
                "data" => &mut data,
                "data_base64" => &mut data_base64,
                _ => {
                    // Of other attributes, lists and integers of many digits are kept as texts.
                    let first = raw.get().as_bytes().first();
                    let is_kept = matches!(first, Some(b'[' | b'-' | b'0'..=b'9'));
                    if is_kept && CORE.contains(&name.as_str()) {
                        return Err(Malformed::new("must be a string").of(name));
                    }
                    if let Some(value) = attribute_value(&name, &raw)? {
                        draft.set(&name, value)?;
                    }
                    continue;
                }
            };
            if slot.replace(raw).is_some() {
                return Err(Malformed::new("appears twice").of(name));
            }
        }
        draft.finish(entry, time_ms, source, |content_type| {
            match (data, data_base64) {
                (None, None) => Ok(Payload::None),
                (Some(_), Some(_)) => {
                    Err(Malformed::new("and data_base64 are mutually exclusive").of("data"))
                }
                (None, Some(raw)) => {
                    let text: String = serde_json::from_str(raw.get())
                        .map_err(|_| Malformed::new("is not a string").of("data_base64"))?;
                    let bytes = base64::engine::general_purpose::STANDARD
                        .decode(text)
                        .map_err(|e| {
                            Malformed::new(format!("is not base64: {e}")).of("data_base64")
                        })?;
                    match content_type {
                        // JSON format, section 3.1: the JSON type is implied for `data` only.
                        None => Ok(Payload::Binary(bytes.into())),
                        Some(_) => Payload::parse(content_type, &Bytes::from(bytes)),
                    }
                }
                (Some(raw), None) if is_json(content_type) => Payload::json(raw.get()),
                // JSON format, section 3.1.1: data of another type is carried as a JSON string.
                (Some(raw), None) => match serde_json::from_str::<String>(raw.get()) {
                    Ok(text) => Ok(Payload::Text(text.into())),
                    Err(_) => Payload::json(raw.get()),
                },
            }
        })
    }

    /// Returns the event as a CloudEvents JSON document, from which [`Event::from_json`] parses the
    /// same event.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("an event is made of strings, numbers and valid JSON")
    }

    /// Sets an extension attribute, replacing one of that name.
    ///
    /// # Errors
    /// [`Malformed`] names the attribute if its name is invalid or reserved by CloudEvents, if its
    /// value contains a control character or is too long, or if the event would have too many
    /// attributes. The event is unchanged then.
    pub fn set_attribute(&mut self, name: &str, value: Value) -> Result<(), Malformed> {
        if CORE.contains(&name) || ["data", "data_base64"].contains(&name) {
            return Err(
                Malformed::new("is not an extension attribute and cannot be changed").of(name),
            );
        }
        set_attribute(&mut self.attributes, name, value).map(|_was_there| ())
    }

    /// Returns the value of an extension attribute.
    pub fn attribute(&self, name: &str) -> Option<&Value> {
        self.attributes.get(name)
    }
}

/// The attributes that CloudEvents defines, all of them strings. Others are extension attributes.
const CORE: [&str; 8] = [
    "id",
    "source",
    "type",
    "subject",
    "time",
    "specversion",
    "datacontenttype",
    "dataschema",
];

/// Attributes collected in any order and validated at the end.
#[derive(Default)]
struct Draft {
    id: Option<Name>,
    source: Option<LongName>,
    kind: Option<Name>,
    subject: Option<LongName>,
    time_ms: Option<u64>,
    datacontenttype: Option<Name>,
    dataschema: Option<LongName>,
    specversion: Option<()>,
    attributes: BTreeMap<String, Value>,
}

impl Draft {
    fn set(&mut self, name: &str, value: Value) -> Result<(), Malformed> {
        let text = |value: Value| match value {
            Value::Text(text) => Ok(text),
            _ => Err(Malformed::new("must be a string").of(name)),
        };
        let parsed = |value: Value| Name::parse(&text(value)?).map_err(|e| e.of(name));
        let long = |value: Value| LongName::parse(&text(value)?).map_err(|e| e.of(name));
        let twice = match name {
            "id" => self.id.replace(parsed(value)?).is_some(),
            "source" => self.source.replace(long(value)?).is_some(),
            "type" => self.kind.replace(parsed(value)?).is_some(),
            "subject" => self.subject.replace(long(value)?).is_some(),
            "datacontenttype" => self.datacontenttype.replace(parsed(value)?).is_some(),
            "dataschema" => self.dataschema.replace(long(value)?).is_some(),
            "time" => {
                let text = text(value)?;
                let time = OffsetDateTime::parse(&text, &Rfc3339)
                    .ok()
                    .and_then(|time| u64::try_from(time.unix_timestamp_nanos() / 1_000_000).ok())
                    .ok_or_else(|| {
                        Malformed::new(format!(
                            "'{}' is not a valid RFC 3339 time since 1970",
                            printable(&text)
                        ))
                        .of("time")
                    })?;
                self.time_ms.replace(time).is_some()
            }
            "specversion" => {
                let text = text(value)?;
                if text != "1.0" {
                    return Err(Malformed::new(format!(
                        "is '{}'; only 1.0 is supported",
                        printable(&text)
                    ))
                    .of("specversion"));
                }
                self.specversion.replace(()).is_some()
            }
            _ => set_attribute(&mut self.attributes, name, value)?,
        };
        if twice {
            Err(Malformed::new("appears twice").of(name))
        } else {
            Ok(())
        }
    }

    fn finish(
        self,
        entry: EntryId,
        time_ms: u64,
        source: &str,
        data: impl FnOnce(Option<&str>) -> Result<Payload, Malformed>,
    ) -> Result<Event, Malformed> {
        let kind = self.kind.ok_or_else(|| {
            Malformed::new("is missing; every event needs one, such as order.shipped").of("type")
        })?;
        let source = match self.source {
            Some(source) => source,
            None => LongName::parse(source)?,
        };
        let id_given = self.id.is_some();
        let id = match self.id {
            Some(id) => id,
            None => Name::parse(&entry.to_string())?,
        };
        let data = data(self.datacontenttype.as_ref().map(Name::as_str))?;
        Ok(Event {
            id,
            source,
            kind,
            subject: self.subject,
            time_ms: self.time_ms.unwrap_or(time_ms),
            datacontenttype: self.datacontenttype,
            dataschema: self.dataschema,
            attributes: self.attributes,
            data,
            id_given,
        })
    }
}

/// Sets an extension attribute and returns whether it was set before.
fn set_attribute(
    attributes: &mut BTreeMap<String, Value>,
    name: &str,
    value: Value,
) -> Result<bool, Malformed> {
    let legal = (1..=64).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    if !legal {
        return Err(
            Malformed::new("is not a valid attribute name; use 1 to 64 of a-z, 0-9 and _")
                .of(format!("'{}'", printable(name))),
        );
    }
    match &value {
        Value::Text(text) => {
            if text.len() > Event::MAX_ATTRIBUTE {
                return Err(Malformed::new(format!(
                    "has {} bytes; the limit is {}",
                    text.len(),
                    Event::MAX_ATTRIBUTE
                ))
                .of(name));
            }
            if let Some(c) = text.chars().find(|c| c.is_control()) {
                return Err(Malformed::new(format!(
                    "contains the control character U+{:04X}",
                    u32::from(c)
                ))
                .of(name));
            }
        }
        // JSON cannot represent them: they would be parsed as `null`.
        Value::Decimal(d) if !d.is_finite() => {
            return Err(
                Malformed::new(format!("is {d}, which is not a valid JSON number")).of(name),
            );
        }
        Value::Decimal(_) | Value::Integer(_) | Value::Flag(_) => {}
    }
    if attributes.len() == Event::MAX_ATTRIBUTES && !attributes.contains_key(name) {
        return Err(Malformed::new(format!(
            "has more than {} extension attributes",
            Event::MAX_ATTRIBUTES
        ))
        .of("the event"));
    }
    Ok(attributes.insert(name.to_owned(), value).is_some())
}

/// The members of a JSON object in order, including repeated names: a map would silently keep the
/// last one.
struct Members(Vec<(String, Box<RawValue>)>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Members;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: serde::de::MapAccess<'de>>(
                self,
                mut map: A,
            ) -> Result<Members, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        d.deserialize_map(Visitor)
    }
}

/// Converts a JSON member to an attribute value. `null` means "not set" (JSON format, section 2.3).
/// Lists are kept as their JSON text.
fn attribute_value(name: &str, raw: &RawValue) -> Result<Option<Value>, Malformed> {
    let text = raw.get();
    Ok(match text.as_bytes().first() {
        Some(b'n') => None,
        Some(b'[') => Some(Value::Text(one_line(text))),
        Some(b'{') => {
            return Err(Malformed::new(
                "is an object; an attribute is a string, number, boolean or list",
            )
            .of(printable(name)));
        }
        // A conversion to a decimal would change the number.
        Some(b'-' | b'0'..=b'9')
            if !text.contains(['.', 'e', 'E']) && text.parse::<i64>().is_err() =>
        {
            Some(Value::Text(text.to_owned()))
        }
        _ => Some(serde_json::from_str(text).map_err(|e| {
            Malformed::new(format!("is not a valid attribute value: {e}")).of(printable(name))
        })?),
    })
}

/// Whether this content type is JSON; it is if there is none.
pub fn is_json(content_type: Option<&str>) -> bool {
    let Some(content_type) = content_type else {
        return true;
    };
    let essence = essence(content_type);
    essence.ends_with("/json") || essence.ends_with("+json")
}

/// Whether data of this content type is text other than JSON.
pub fn is_text(content_type: &str) -> bool {
    let essence = essence(content_type);
    essence.starts_with("text/") || essence.contains("xml")
}

/// The content type without its parameters, in lower case.
pub fn essence(content_type: &str) -> String {
    let essence = content_type.split(';').next().unwrap_or_default();
    essence.trim().to_ascii_lowercase()
}

/// The encoding of characters that a content type names, in lower case, if it is not UTF-8 or the
/// part of UTF-8 that is ASCII.
pub fn foreign_charset(content_type: &str) -> Option<String> {
    let mut parameters = content_type.split(';').skip(1);
    let charset = parameters.find_map(|parameter| {
        let (name, value) = parameter.split_once('=')?;
        name.trim().eq_ignore_ascii_case("charset").then_some(value)
    })?;
    let charset = charset
        .trim()
        .trim_matches(['"', '\''])
        .to_ascii_lowercase();
    let is_utf8 = ["utf-8", "utf8", "us-ascii", "ascii"].contains(&charset.as_str());
    (!is_utf8).then_some(charset)
}

/// Returns the text of a JSON document.
///
/// # Errors
/// [`Malformed`] names the encoding of a document that is not UTF-8, and a byte order mark: a JSON
/// parser would only report an unexpected character.
pub fn utf8_json(document: &[u8]) -> Result<&str, Malformed> {
    let fault = match document {
        [0xef, 0xbb, 0xbf, ..] => {
            "begins with a byte order mark (U+FEFF); send the JSON without it"
        }
        [0xff, 0xfe, 0, 0, ..] | [0, 0, 0xfe, 0xff, ..] | [_, 0, 0, 0, ..] | [0, 0, 0, _, ..] => {
            "is UTF-32; send UTF-8"
        }
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => "is UTF-16; send UTF-8",
        // Without a mark: the first two characters of a document are ASCII.
        [_, 0] | [_, 0, _, 0, ..] | [0, _] | [0, _, 0, ..] => "is UTF-16; send UTF-8",
        _ => {
            return std::str::from_utf8(document)
                .map_err(|_| Malformed::new("is not UTF-8; send UTF-8"));
        }
    };
    Err(Malformed::new(fault))
}

/// Removes the white space outside strings, so that a payload is one line of an SSE frame. Numbers
/// keep their digits.
fn one_line(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    let (mut in_string, mut escaped) = (false, false);
    for c in json.chars() {
        if in_string {
            in_string = escaped || c != '"';
            escaped = c == '\\' && !escaped;
        } else if c.is_ascii_whitespace() {
            continue;
        } else {
            in_string = c == '"';
        }
        out.push(c);
    }
    out
}

/// Returns valid JSON from outside, reduced to one line.
///
/// # Errors
/// [`Malformed`] if it is not JSON.
pub fn json_line(json: &str) -> Result<Box<RawValue>, Malformed> {
    RawValue::from_string(json.to_owned())
        .map_err(|e| Malformed::new(format!("is not valid JSON: {e}")))?;
    Ok(RawValue::from_string(one_line(json)).expect("white space between tokens is insignificant"))
}

/// Returns at most 64 characters of untrusted text, escaped for a log line.
fn printable(text: &str) -> String {
    text.chars().take(64).flat_map(char::escape_debug).collect()
}

impl Payload {
    /// Parses the whole document instead of only scanning it. Text that conforms to the JSON
    /// grammar but cannot be represented (half of a surrogate pair, 1e999, a thousand levels) would
    /// be a payload in which plugins find no field, and a publisher who controls a part of it could
    /// hide the rest from all rules.
    fn json(text: &str) -> Result<Self, Malformed> {
        serde_json::from_str::<serde_json::Value>(text).map_err(|e| {
            Malformed::new(format!(
                "is not valid JSON ({e}); give other data a datacontenttype such as text/plain"
            ))
            .of("data")
        })?;
        Ok(Self::Json(one_line(text).into()))
    }

    fn parse(content_type: Option<&str>, bytes: &Bytes) -> Result<Self, Malformed> {
        if is_json(content_type) {
            let text = utf8_json(bytes).map_err(|fault| {
                let fix = "or give binary data a datacontenttype such as application/octet-stream";
                Malformed::new(format!("{fault}, {fix}")).of("data")
            })?;
            return Self::json(text);
        }
        // Text in another encoding stays bytes: read as UTF-8, it could be another text.
        let is_text = content_type.is_some_and(|t| is_text(t) && foreign_charset(t).is_none());
        match std::str::from_utf8(bytes) {
            Ok(text) if is_text => Ok(Self::Text(text.into())),
            _ => Ok(Self::Binary(bytes.clone())),
        }
    }
}

impl Serialize for Event {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let mut map = s.serialize_map(None)?;
        map.serialize_entry("specversion", "1.0")?;
        // Written although a parsed id counts as set by the publisher: records must name the event.
        map.serialize_entry("id", &self.id)?;
        map.serialize_entry("source", &self.source)?;
        map.serialize_entry("type", &self.kind)?;
        if let Some(subject) = &self.subject {
            map.serialize_entry("subject", subject)?;
        }
        map.serialize_entry("time", &rfc3339(self.time_ms))?;
        if let Some(content_type) = &self.datacontenttype {
            map.serialize_entry("datacontenttype", content_type)?;
        }
        if let Some(schema) = &self.dataschema {
            map.serialize_entry("dataschema", schema)?;
        }
        for (name, value) in &self.attributes {
            map.serialize_entry(name, value)?;
        }
        match &self.data {
            Payload::None => {}
            Payload::Json(text) => {
                let raw: &RawValue =
                    serde_json::from_str(text).map_err(serde::ser::Error::custom)?;
                map.serialize_entry("data", raw)?;
            }
            Payload::Text(text) => map.serialize_entry("data", &**text)?,
            Payload::Binary(bytes) => map.serialize_entry(
                "data_base64",
                &base64::engine::general_purpose::STANDARD.encode(bytes),
            )?,
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Event {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let raw = Box::<RawValue>::deserialize(d)?;
        Self::from_json(EntryId::default(), "-", raw.get().as_bytes())
            .map_err(serde::de::Error::custom)
    }
}

/// Formats milliseconds since the Unix epoch as an RFC 3339 time in UTC, always with three
/// fractional digits, so that times align and sort as text.
pub fn rfc3339(ms: u64) -> String {
    let seconds = i64::try_from(ms / 1_000)
        .ok()
        .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok());
    match seconds.and_then(|time| time.format(&Rfc3339).ok()) {
        Some(time) => format!("{}.{:03}Z", time.trim_end_matches('Z'), ms % 1_000),
        None => "9999-12-31T23:59:59.999Z".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENTRY: EntryId = EntryId {
        ms: 1_700_000_000_123,
        seq: 4,
    };

    fn fields(pairs: &[(&str, &str)]) -> Result<Event, Malformed> {
        let pairs: Vec<_> = pairs
            .iter()
            .map(|(k, v)| {
                (
                    Bytes::copy_from_slice(k.as_bytes()),
                    Bytes::copy_from_slice(v.as_bytes()),
                )
            })
            .collect();
        Event::from_fields(ENTRY, "pointsman:events", &pairs)
    }

    #[test]
    fn flat_fields_are_the_cloudevents_attributes() {
        let event = fields(&[
            ("type", "order.shipped"),
            ("source", "/shop"),
            ("user", "42"),
            ("data", "{\"order\": 7,\n \"a b\": \"x  y\\\" \"}"),
        ])
        .unwrap();
        assert_eq!(event.kind.as_str(), "order.shipped");
        assert_eq!(
            (event.id.as_str(), event.time_ms, event.id_given),
            ("1700000000123-4", 1_700_000_000_123, false)
        );
        assert_eq!(event.attribute("user"), Some(&Value::Text("42".into())));
        assert_eq!(
            event.data,
            Payload::Json(r#"{"order":7,"a b":"x  y\" "}"#.into())
        );
    }

    #[test]
    fn an_event_round_trips_through_json() {
        let document = r#"{"specversion":"1.0","id":"a","source":"/s","type":"t","time":"2026-01-02T03:04:05.678Z","n":3,"big":1.5,"ok":true,
            "large":18446744073709551616,"users":["a","b"],"subject":"s","data":{"x":123456789012345678901234567890}}"#;
        let event = Event::from_json(ENTRY, "-", document.as_bytes()).unwrap();
        assert_eq!(
            event.attribute("users"),
            Some(&Value::Text(r#"["a","b"]"#.into()))
        );
        assert_eq!(
            event.attribute("large"),
            Some(&Value::Text("18446744073709551616".into()))
        );
        assert_eq!(
            event.data,
            Payload::Json(r#"{"x":123456789012345678901234567890}"#.into())
        );
        let again = Event::from_json(ENTRY, "-", event.to_json().as_bytes()).unwrap();
        assert_eq!(event, again);
    }

    #[test]
    fn an_error_names_the_invalid_field() {
        let check = |pairs: &[(&str, &str)], expect: &str| {
            let error = fields(pairs).unwrap_err().to_string();
            assert!(error.contains(expect), "{pairs:?} returned: {error}");
        };
        check(&[("user", "42")], "type is missing");
        check(&[("type", "")], "type is empty");
        check(
            &[("type", "a\nb")],
            "type contains the control character U+000A",
        );
        check(
            &[("type", "t"), ("id", "x\r")],
            "id contains the control character",
        );
        check(
            &[("type", "t"), ("id", &"x".repeat(300))],
            "id has 300 bytes",
        );
        check(&[("type", "t"), ("type", "u")], "type appears twice");
        check(
            &[("type", "t"), ("time", "yesterday")],
            "time 'yesterday' is not a valid RFC 3339",
        );
        check(
            &[("type", "t"), ("data", "{\"a\":")],
            "data is not valid JSON",
        );
        check(
            &[("type", "t"), ("Bad-Name", "1")],
            "'Bad-Name' is not a valid attribute name",
        );
        check(
            &[("type", "t"), ("a\u{1b}[31m", "1")],
            "is not a valid attribute name",
        );
        check(
            &[("type", "t"), ("user", "4\u{0}2")],
            "user contains the control character U+0000",
        );
        check(&[("type", "t"), ("specversion", "0.3")], "only 1.0");
        check(&[("event", "[]")], "is not a JSON object");
        check(
            &[("event", "{}"), ("type", "t")],
            "event must be the only field",
        );
        check(
            &[("type", "t"), ("data_base64", "AAE=")],
            "put the raw bytes into 'data'",
        );
        check(
            &[("event", r#"{"type":"t","data":1,"data_base64":"AA=="}"#)],
            "are mutually exclusive",
        );
        check(&[("event", r#"{"type":"t","x":{}}"#)], "x is an object");
    }

    #[test]
    fn attributes_set_by_a_plugin_are_validated_like_published_ones() {
        let mut event = fields(&[("type", "t"), ("a", "1")]).unwrap();
        let before = event.clone();
        for (name, value, expect) in [
            ("id", Value::Flag(true), "id is not an extension attribute"),
            ("A", Value::Flag(true), "'A' is not a valid attribute name"),
            (
                "a",
                Value::Text("x\ny".into()),
                "a contains the control character U+000A",
            ),
            ("a", Value::Decimal(f64::NAN), "a is NaN"),
            ("a", Value::Text("x".repeat(70_000)), "a has 70000 bytes"),
        ] {
            let error = event.set_attribute(name, value).unwrap_err().to_string();
            assert!(error.contains(expect), "{error}");
        }
        assert_eq!(event, before);
        for n in 1..Event::MAX_ATTRIBUTES {
            event
                .set_attribute(&format!("n{n}"), Value::Integer(1))
                .unwrap();
        }
        event.set_attribute("a", Value::Integer(2)).unwrap();
        assert!(
            event
                .set_attribute("b", Value::Integer(2))
                .unwrap_err()
                .to_string()
                .contains("more than 64")
        );
    }

    #[test]
    fn json_becomes_one_line_and_keeps_its_digits() {
        assert_eq!(
            json_line("{\n \"a\" : 1e400,\t\"b\": \"x y\"}")
                .unwrap()
                .get(),
            r#"{"a":1e400,"b":"x y"}"#
        );
        assert!(
            json_line("{\"a\":")
                .unwrap_err()
                .to_string()
                .contains("is not valid JSON")
        );
    }

    #[test]
    fn base64_without_a_content_type_is_bytes_and_round_trips() {
        let read = |document: &str| Event::from_json(ENTRY, "-", document.as_bytes()).unwrap();
        let event = read(r#"{"type":"t","data_base64":"eyJhIjoxfQ=="}"#);
        assert_eq!(
            event.data,
            Payload::Binary(Bytes::from_static(b"{\"a\":1}"))
        );
        assert_eq!(read(&event.to_json()).data, event.data);
        let typed = read(
            r#"{"type":"t","datacontenttype":"application/json","data_base64":"eyJhIjoxfQ=="}"#,
        );
        assert_eq!(typed.data, Payload::Json(r#"{"a":1}"#.into()));
    }

    #[test]
    fn text_in_another_encoding_than_utf_8_stays_bytes() {
        for (content_type, is_text) in [
            ("text/plain", true),
            ("text/plain; charset=UTF-8", true),
            ("text/plain; charset=\"us-ascii\"", true),
            ("text/plain;format=flowed;Charset=ISO-8859-1", false),
            ("application/xml; charset=utf-16", false),
        ] {
            let event = fields(&[
                ("type", "t"),
                ("datacontenttype", content_type),
                ("data", "x"),
            ]);
            let found = matches!(event.unwrap().data, Payload::Text(_));
            assert_eq!(found, is_text, "{content_type}");
        }
    }

    #[test]
    fn binary_data_round_trips() {
        let bytes = Bytes::from_static(&[0, 159, 146, 150]);
        let pairs = [
            ("type", "t"),
            ("datacontenttype", "application/octet-stream"),
        ]
        .map(|(k, v)| {
            (
                Bytes::from_static(k.as_bytes()),
                Bytes::from_static(v.as_bytes()),
            )
        });
        let all = [
            pairs.as_slice(),
            &[(Bytes::from_static(b"data"), bytes.clone())],
        ]
        .concat();
        let event = Event::from_fields(ENTRY, "-", &all).unwrap();
        assert_eq!(event.data, Payload::Binary(bytes));
        assert_eq!(
            Event::from_json(ENTRY, "-", event.to_json().as_bytes())
                .unwrap()
                .data,
            event.data
        );
    }
}
