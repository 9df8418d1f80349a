//! A message of a channel, with the values that templates read from it.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde_json::Value;
use serde_json::value::RawValue;

/// A message with what templates read from it.
pub(super) struct Message<'a> {
    /// The channel, then the texts at each `*` of its pattern.
    pub(super) captures: Vec<&'a str>,
    pub(super) body: &'a Bytes,
    /// `None` if the body is not JSON.
    pub(super) json: Option<Value>,
}

impl<'a> Message<'a> {
    pub(super) fn new(captures: Vec<&'a str>, body: &'a Bytes) -> Self {
        Self {
            captures,
            body,
            json: serde_json::from_slice(body).ok(),
        }
    }

    /// The value at a JSON pointer.
    pub(super) fn value(&self, pointer: &str) -> Option<&Value> {
        self.json.as_ref()?.pointer(pointer)
    }

    /// Like [`Message::value`], as it was written: numbers keep their digits.
    pub(super) fn raw(&self, pointer: &str) -> Option<&'a RawValue> {
        let mut raw: &RawValue = serde_json::from_slice(self.body).ok()?;
        for name in pointer.split('/').skip(1) {
            let name = name.replace("~1", "/").replace("~0", "~");
            raw = match raw.get().as_bytes().first()? {
                b'[' => {
                    let list: Vec<&RawValue> = serde_json::from_str(raw.get()).ok()?;
                    list.get(name.parse::<usize>().ok()?)?
                }
                _ => {
                    let members: BTreeMap<String, &RawValue> =
                        serde_json::from_str(raw.get()).ok()?;
                    members.get(&name)?
                }
            };
        }
        Some(raw)
    }

    /// Whether the body is a JSON text that contains JSON, as a serializer writes it that is given
    /// JSON.
    pub(super) fn is_quoted_json(&self) -> bool {
        matches!(&self.json, Some(Value::String(text)) if text.trim_start().starts_with('{'))
    }
}
