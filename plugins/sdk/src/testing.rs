//! Support for native `cargo test`: events, the configuration as the host passes it, a frozen clock
//! and captured log lines.
//!
//! ```
//! # use pointsman_plugin::{Event, Failure, Issue, NoConfig, Plugin, Route, Router, testing};
//! # struct Owner;
//! # impl Plugin for Owner {
//! #     type Config = NoConfig;
//! #     fn new(_: NoConfig) -> Result<Self, Issue> { Ok(Self) }
//! # }
//! # impl Router for Owner {
//! #     fn resolve(&self, event: &Event) -> Result<Vec<Route>, Failure> {
//! #         Ok(event.text("owner").map(Route::to_user).into_iter().collect())
//! #     }
//! # }
//! let plugin: Owner = testing::configure(serde_json::json!({})).unwrap();
//! let event = testing::event("order.shipped").attribute("owner", "42").seen_by(&plugin).unwrap();
//! assert_eq!(plugin.resolve(&event), Ok(vec![Route::to_user("42")]));
//! ```
//!
//! These tests cover neither the limits nor how the host processes a decision; the host does that
//! with the built plugin.

use crate::configuration::create_plugin;
use crate::log::Level;
use crate::pattern::matches;
use crate::test_host;
use crate::{Event, Issue, Payload, Plugin, Priority, Value};

/// Creates the plugin from a configuration, as the host does.
///
/// # Errors
/// The issues that the operator would see.
pub fn configure<P: Plugin>(config: serde_json::Value) -> Result<P, Vec<Issue>> {
    create_plugin(&config.to_string())
}

/// Sets the clock of this thread to `ms` milliseconds since the Unix epoch. The initial value is
/// 2026-01-01T00:00:00Z.
pub fn freeze_clock(ms: u64) {
    test_host::set_clock(ms);
}

/// Returns and clears the lines that this thread has logged.
pub fn logged() -> Vec<(Level, String)> {
    test_host::take_lines()
}

/// Starts building an event of this type with an id, a source and the time of the frozen clock, and
/// nothing else.
pub fn event(kind: &str) -> EventBuilder {
    EventBuilder(Event {
        id: "test-1".into(),
        source: "/test".into(),
        kind: kind.into(),
        subject: None,
        time_ms: test_host::now_ms(),
        priority: Priority::Normal,
        attributes: Vec::new(),
        data: Payload::None,
    })
}

/// Builds an event.
#[derive(Clone, Debug)]
pub struct EventBuilder(Event);

impl EventBuilder {
    #[must_use]
    pub fn id(mut self, id: &str) -> Self {
        self.0.id = id.into();
        self
    }

    #[must_use]
    pub fn source(mut self, source: &str) -> Self {
        self.0.source = source.into();
        self
    }

    #[must_use]
    pub fn subject(mut self, subject: &str) -> Self {
        self.0.subject = Some(subject.into());
        self
    }

    #[must_use]
    pub fn time_ms(mut self, ms: u64) -> Self {
        self.0.time_ms = ms;
        self
    }

    #[must_use]
    pub fn priority(mut self, priority: Priority) -> Self {
        self.0.priority = priority;
        self
    }

    #[must_use]
    pub fn attribute(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.0.attributes.push((name.into(), value.into()));
        self
    }

    #[must_use]
    pub fn json(mut self, data: &serde_json::Value) -> Self {
        self.0.data = Payload::Json(data.to_string());
        self
    }

    #[must_use]
    pub fn text(mut self, data: &str) -> Self {
        self.0.data = Payload::Text(data.into());
        self
    }

    /// Returns the event with everything that was set.
    pub fn build(self) -> Event {
        self.0
    }

    /// Returns the event as the host would pass it to this plugin, reduced to its
    /// [`Interest`](crate::Interest); `None` if the host would not call the plugin for it.
    pub fn seen_by(self, plugin: &impl Plugin) -> Option<Event> {
        let interest = plugin.interest();
        let mut event = self.0;
        if !interest.types.is_empty()
            && !interest
                .types
                .iter()
                .any(|pattern| matches(pattern, &event.kind))
        {
            return None;
        }
        if !interest.attributes.iter().any(|name| name == "*") {
            event
                .attributes
                .retain(|(name, _)| interest.attributes.contains(name));
        }
        if let Payload::Json(text) = &event.data
            && !interest.fields.is_empty()
            && let Ok(document) = serde_json::from_str::<serde_json::Value>(text)
        {
            for pointer in &interest.fields {
                if let Some(value) = document.pointer(pointer).and_then(field) {
                    event.attributes.push((pointer.clone(), value));
                }
            }
        }
        if !interest.payload {
            event.data = Payload::None;
        }
        Some(event)
    }
}

/// Converts a field of the payload as the host does.
fn field(json: &serde_json::Value) -> Option<Value> {
    match json {
        serde_json::Value::Array(_) | serde_json::Value::Object(_) => {
            Some(Value::Text(json.to_string()))
        }
        scalar => Value::of_json(scalar),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Interest, NoConfig, clock, log};

    struct Reader;

    impl Plugin for Reader {
        type Config = NoConfig;
        fn new(_: NoConfig) -> Result<Self, Issue> {
            Ok(Self)
        }
        fn interest(&self) -> Interest {
            Interest::in_types(["order.*", "*.paid"])
                .attributes(["user"])
                .fields(["/a/b", "/none", "/list"])
        }
    }

    #[test]
    fn a_plugin_sees_exactly_what_its_interest_includes() {
        let reader: Reader = configure(serde_json::json!({})).unwrap();
        let seen = event("order.shipped")
            .attribute("user", "42")
            .attribute("secret", true)
            .json(&serde_json::json!({"a": {"b": 7}, "none": null, "list": [1, "x"]}))
            .seen_by(&reader)
            .unwrap();
        let expect = [
            ("user", "42".into()),
            ("/a/b", 7.into()),
            ("/list", r#"[1,"x"]"#.into()),
        ]
        .map(|(name, value): (_, Value)| (name.to_owned(), value));
        assert_eq!(seen.attributes, expect);
        assert_eq!(seen.data, Payload::None);
        assert!(event("bill.paid").seen_by(&reader).is_some());
        assert!(event("bill.sent").seen_by(&reader).is_none());
    }

    #[test]
    fn an_unknown_configuration_name_is_reported_without_a_line_number() {
        let Err(issues) = configure::<Reader>(serde_json::json!({"colour": 1})) else {
            panic!("an unknown name was accepted")
        };
        assert!(
            issues[0].message.contains("unknown field `colour`"),
            "{issues:?}"
        );
        assert!(!issues[0].message.contains("line"), "{issues:?}");
    }

    #[test]
    fn each_test_has_its_own_clock_and_log() {
        freeze_clock(5);
        log::warn(format_args!("at {}", clock::now_ms()));
        assert_eq!(logged(), [(Level::Warn, "at 5".to_owned())]);
        assert!(logged().is_empty());
    }
}
