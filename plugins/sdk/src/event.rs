//! The event that a plugin decides about.

use serde::de::DeserializeOwned;

use crate::bindings::lifecycle::pointsman::plugin::types;
use crate::{Failure, Payload, Priority, Value};

/// A CloudEvents 1.0 event, with what the plugin's [`Interest`](crate::Interest) asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    pub id: String,
    pub source: String,
    /// The CloudEvents `type`, such as `order.shipped`.
    pub kind: String,
    pub subject: Option<String>,
    /// CloudEvents `time`, in milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// What an earlier filter made it, else the attribute `priority`, else normal.
    pub priority: Priority,
    /// Extension attributes, and fields of the payload under their JSON pointers, in no order.
    pub attributes: Vec<(String, Value)>,
    /// [`Payload::None`] unless the plugin's interest is in the payload whole.
    pub data: Payload,
}

impl Event {
    /// An attribute by its name, or a field of the payload by its JSON pointer.
    pub fn attribute(&self, name: &str) -> Option<&Value> {
        self.attributes
            .iter()
            .find_map(|(n, value)| (n == name).then_some(value))
    }

    /// The attribute if it is there and a text.
    pub fn text(&self, name: &str) -> Option<&str> {
        match self.attribute(name) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// The payload, parsed.
    ///
    /// # Errors
    /// [`Failure::Reject`] if the payload is not JSON, or not of this shape, with where and why.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        let Payload::Json(text) = &self.data else {
            return Err(Failure::Reject("the event has no JSON payload".into()));
        };
        serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_str(text)).map_err(
            |e| {
                Failure::Reject(format!(
                    "the payload does not fit: {}: {}",
                    e.path(),
                    e.inner()
                ))
            },
        )
    }
}

impl From<types::Event> for Event {
    fn from(event: types::Event) -> Self {
        let types::Event {
            id,
            source,
            type_,
            subject,
            time_ms,
            priority,
            attributes,
            data,
        } = event;
        let attributes = attributes
            .into_iter()
            .map(|attribute| (attribute.name, attribute.value))
            .collect();
        Self {
            id,
            source,
            kind: type_,
            subject,
            time_ms,
            priority,
            attributes,
            data,
        }
    }
}
