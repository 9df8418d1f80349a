//! The `data` object of a notification, as clients see it in SSE and in `GET /v1/notifications`. Its JSON Schema is `host/schema/notification.json`.

use base64::Engine as _;
use serde::Serialize;
use serde_json::value::RawValue;

use crate::event::{Notification, Payload, Priority, rfc3339};

#[derive(Serialize)]
struct Data<'a> {
    id: &'a str,
    source: &'a str,
    r#type: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    subject: Option<&'a str>,
    time: String,
    priority: Priority,
    #[serde(flatten)]
    payload: Body<'a>,
}

/// Always exactly one of the two members.
#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Body<'a> {
    Data(&'a RawValue),
    DataBase64(String),
}

/// The `data` object of a notification by the route with this index: the event's own data, or the body that the route puts in its place.
///
/// # Panics
/// If the plan has no such route.
pub fn data_of(notification: &Notification, route: usize) -> String {
    let (event, route) = (&notification.event, &notification.plan.routes[route]);
    let text;
    let payload = match (&route.body, &event.data) {
        (Some(body), _) => Body::Data(body),
        (None, Payload::None) => Body::Data(RawValue::NULL),
        (None, Payload::Json(json)) => {
            text = RawValue::from_string(json.to_string()).unwrap_or_else(|_| RawValue::NULL.to_owned());
            Body::Data(&text)
        }
        (None, Payload::Text(plain)) => {
            text = serde_json::value::to_raw_value(&**plain).unwrap_or_else(|_| RawValue::NULL.to_owned());
            Body::Data(&text)
        }
        (None, Payload::Binary(bytes)) => Body::DataBase64(base64::engine::general_purpose::STANDARD.encode(bytes)),
    };
    let data = Data {
        id: event.id.as_str(),
        source: event.source.as_str(),
        r#type: event.kind.as_str(),
        subject: event.subject.as_ref().map(crate::event::Name::as_str),
        time: rfc3339(event.time_ms),
        priority: route.priority,
        payload,
    };
    serde_json::to_string(&data).expect("made of strings and valid JSON")
}
