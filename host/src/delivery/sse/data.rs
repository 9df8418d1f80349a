//! The `data` object of a notification, as sent over SSE and returned by `GET /v1/notifications`.
//! Its JSON Schema is `host/schema/notification.json`.

use base64::Engine as _;
use serde::Serialize;
use serde_json::value::RawValue;

use crate::delivery::recipients::RouteMatch;
use crate::event::{LongName, Name, Notification, Payload, Priority, rfc3339};

/// All members except `to` and the payload.
#[derive(Serialize)]
struct DataHead<'a> {
    id: &'a str,
    source: &'a str,
    r#type: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    subject: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    datacontenttype: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dataschema: Option<&'a str>,
    time: String,
    priority: Priority,
    by: &'a Name,
    #[serde(skip_serializing_if = "Option::is_none")]
    slot: Option<&'a Name>,
}

/// Exactly one of the two members is always present.
#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum DataBody<'a> {
    Data(&'a RawValue),
    DataBase64(String),
}

/// Returns the `data` object of a notification for one recipient.
///
/// # Panics
/// If the plan has no such route or target.
pub fn data_of(notification: &Notification, route_match: RouteMatch) -> String {
    let (before, after) = around_target(notification, route_match.route);
    let target = &notification.plan.routes[route_match.route].to[route_match.target];
    before + &json(target) + &after
}

/// Returns the JSON before and after the value of `to`, which is the same for all recipients of the
/// route. The payload is the event's own data, or the body that replaces it in the route.
///
/// # Panics
/// If the plan has no such route.
pub(super) fn around_target(notification: &Notification, route: usize) -> (String, String) {
    let (event, route) = (&notification.event, &notification.plan.routes[route]);
    let text;
    let payload = match (&route.body, &event.data) {
        (Some(body), _) => DataBody::Data(body),
        (None, Payload::None) => DataBody::Data(RawValue::NULL),
        (None, Payload::Json(json)) => {
            text = RawValue::from_string(json.to_string())
                .unwrap_or_else(|_| RawValue::NULL.to_owned());
            DataBody::Data(&text)
        }
        (None, Payload::Text(plain)) => {
            text = serde_json::value::to_raw_value(&**plain)
                .unwrap_or_else(|_| RawValue::NULL.to_owned());
            DataBody::Data(&text)
        }
        (None, Payload::Binary(bytes)) => {
            DataBody::DataBase64(base64::engine::general_purpose::STANDARD.encode(bytes))
        }
    };
    // They describe the data of the event, not a body that replaces it.
    let described = route.body.is_none().then_some(event);
    let content_type = described.and_then(|event| event.datacontenttype.as_ref());
    let schema = described.and_then(|event| event.dataschema.as_ref());
    let mut before = json(&DataHead {
        id: event.id.as_str(),
        source: event.source.as_str(),
        r#type: event.kind.as_str(),
        subject: event.subject.as_ref().map(LongName::as_str),
        datacontenttype: content_type.map(Name::as_str),
        dataschema: schema.map(LongName::as_str),
        time: rfc3339(event.time_ms),
        priority: route.priority,
        by: &route.by,
        slot: route.slot.as_ref(),
    });
    // Joins two objects into one: `to` goes after the last member of the first and before the first
    // member of the second.
    before.truncate(before.len() - 1);
    before += r#","to":"#;
    let after = json(&payload).replacen('{', ",", 1);
    (before, after)
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("strings and valid JSON serialise")
}
