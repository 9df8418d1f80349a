//! The event about which a plugin decides.

use serde::de::DeserializeOwned;

use crate::bindings::lifecycle::pointsman::plugin::types;
use crate::{Failure, Payload, Priority, Value, clock};

/// A CloudEvents 1.0 event, with the attributes and fields that the plugin's
/// [`Interest`](crate::Interest) requests.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    pub id: String,
    pub source: String,
    /// The CloudEvents `type`, such as `order.shipped`.
    pub kind: String,
    pub subject: Option<String>,
    /// CloudEvents `time`, in milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// The priority set by an earlier filter, otherwise the attribute `priority`, otherwise normal.
    pub priority: Priority,
    /// Extension attributes, and fields of the payload under their JSON pointers, in no particular
    /// order.
    pub attributes: Vec<(String, Value)>,
    /// [`Payload::None`] unless the plugin's interest includes the whole payload.
    pub data: Payload,
}

impl Event {
    /// Returns an attribute by its name, or a field of the payload by its JSON pointer.
    pub fn attribute(&self, name: &str) -> Option<&Value> {
        self.attributes
            .iter()
            .find_map(|(n, value)| (n == name).then_some(value))
    }

    /// Returns the attribute if it is present and a text.
    pub fn text(&self, name: &str) -> Option<&str> {
        match self.attribute(name) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// The event's age in milliseconds, by its own time; 0 if that is in the future. Subtracting the
    /// times directly would overflow then.
    pub fn age_ms(&self) -> u64 {
        clock::now_ms().saturating_sub(self.time_ms)
    }

    /// Parses the payload.
    ///
    /// # Errors
    /// [`Failure::Reject`] if the payload is not JSON or does not deserialize into `T`; the text
    /// gives the path and the cause.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, Failure> {
        let Payload::Json(text) = &self.data else {
            return Err(Failure::Reject("the event has no JSON payload".into()));
        };
        serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_str(text)).map_err(
            |e| {
                Failure::Reject(format!(
                    "the payload has an unexpected shape at {}: {}",
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
