//! Warns of names in quotes, such as the user `"42"` of an entry by Spring's `RedisTemplate`, whose
//! serializer writes every text as JSON. Such an event is valid and reaches nobody, so its
//! publisher needs a hint.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::event::{Event, Value};

/// Logs a warning if the type or a recipient of the event begins and ends with quotes; once in a
/// process, because every event of such a publisher is like this.
pub(crate) fn warn_of_quotes(source: &str, event: &Event) {
    static HAS_WARNED: AtomicBool = AtomicBool::new(false);
    if let Some(attribute) = quoted(event)
        && !HAS_WARNED.swap(true, Ordering::Relaxed)
    {
        tracing::warn!(source.key = source, event.id = %event.id, "the {attribute} of an event begins and ends with quotes, which then belong to the name; publish it without them (in Spring, set StringRedisSerializer for keys, fields and values)");
    }
}

/// The first attribute that is a text in quotes.
fn quoted(event: &Event) -> Option<&'static str> {
    let is_quoted = |text: &str| text.len() >= 2 && text.starts_with('"') && text.ends_with('"');
    if is_quoted(event.kind.as_str()) {
        return Some("type");
    }
    let recipients = ["user", "users", "group", "groups"];
    recipients
        .into_iter()
        .find(|name| matches!(event.attribute(name), Some(Value::Text(text)) if is_quoted(text)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::EntryId;

    #[test]
    fn names_in_quotes_are_found() {
        let of = |document: &str| {
            quoted(&Event::from_json(EntryId::default(), "-", document.as_bytes()).unwrap())
        };
        assert_eq!(of(r#"{"type":"\"t\""}"#), Some("type"));
        assert_eq!(of(r#"{"type":"t","user":"\"42\""}"#), Some("user"));
        assert_eq!(of(r#"{"type":"t","groups":"\"a\",\"b\""}"#), Some("groups"));
        assert_eq!(of(r#"{"type":"t","user":42,"users":["\"a\""]}"#), None);
        assert_eq!(of(r#"{"type":"\"","user":"a \"b\""}"#), None);
    }
}
