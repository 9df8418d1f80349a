//! The traits that a plugin author implements: a [`Plugin`] that is a [`Filter`], a [`Router`] or
//! both.

use schemars::JsonSchema;
use serde::Deserialize;
use serde::de::DeserializeOwned;

#[doc(inline)]
pub use crate::bindings::filter::exports::pointsman::plugin::filter::{Amendment, Verdict};
#[doc(inline)]
pub use crate::bindings::router::exports::pointsman::plugin::router::Route;
use crate::{Attribute, Criteria, Event, Failure, Issue, Operator, Priority, Target, Test, Value};

/// A plugin with its configuration. The host creates one for every instance; it keeps no state
/// between events.
pub trait Plugin: Sized + 'static {
    /// The operator's configuration. Add `#[serde(deny_unknown_fields)]` so that unknown names are
    /// rejected. Its JSON Schema becomes part of the plugin's manifest. Use [`NoConfig`] for a
    /// plugin without configuration.
    type Config: DeserializeOwned + JsonSchema;

    /// # Errors
    /// The problem in a well-formed configuration, and the fix. The host then refuses to load the
    /// plugin and reports the issue.
    fn new(config: Self::Config) -> Result<Self, Issue>;

    /// The events for which the plugin is called, and the parts of them that it sees. The default
    /// is every event with all its attributes and nothing of its payload. Parts that are not
    /// requested are not copied.
    fn interest(&self) -> Interest {
        Interest::default()
    }
}

/// Keeps, amends or drops events before they reach any router.
pub trait Filter: Plugin {
    /// # Errors
    /// [`Failure::Reject`] dead-letters the event at once, with the text as the reason.
    fn evaluate(&self, event: &Event) -> Result<Verdict, Failure>;
}

/// Decides who is notified of an event.
pub trait Router: Plugin {
    /// Returns the routes for the event. An empty list is valid: this router then addresses no one.
    ///
    /// # Errors
    /// [`Failure::Reject`] dead-letters the event at once, with the text as the reason.
    fn resolve(&self, event: &Event) -> Result<Vec<Route>, Failure>;
}

/// The configuration of a plugin that has no settings.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NoConfig {}

/// The events for which a plugin is called, and the parts of them that it sees. See
/// [`Plugin::interest`].
#[derive(Clone, Debug, PartialEq)]
pub struct Interest {
    /// Patterns of event types, such as `order.*`, in which `*` matches any sequence of characters,
    /// including none. Empty: every event.
    pub types: Vec<String>,
    /// Names of extension attributes; `*` selects all of them.
    pub attributes: Vec<String>,
    /// JSON pointers into a JSON payload, such as `/order/region`; each field arrives as an
    /// attribute named after its pointer.
    pub fields: Vec<String>,
    /// Whether the whole payload is passed.
    pub payload: bool,
}

impl Default for Interest {
    /// Every event with all its attributes and nothing of its payload.
    fn default() -> Self {
        Self {
            types: Vec::new(),
            attributes: vec!["*".into()],
            fields: Vec::new(),
            payload: false,
        }
    }
}

impl Interest {
    /// Events whose type matches one of the patterns, without attributes or payload.
    pub fn in_types<'a>(patterns: impl IntoIterator<Item = &'a str>) -> Self {
        Self {
            types: patterns.into_iter().map(str::to_owned).collect(),
            attributes: Vec::new(),
            fields: Vec::new(),
            payload: false,
        }
    }

    /// Every event, without attributes or payload.
    pub fn in_every_type() -> Self {
        Self::in_types([])
    }

    /// Adds these attributes.
    #[must_use]
    pub fn attributes<'a>(mut self, names: impl IntoIterator<Item = &'a str>) -> Self {
        self.attributes.extend(names.into_iter().map(str::to_owned));
        self
    }

    /// Adds these fields of the payload, by their JSON pointers.
    #[must_use]
    pub fn fields<'a>(mut self, pointers: impl IntoIterator<Item = &'a str>) -> Self {
        self.fields.extend(pointers.into_iter().map(str::to_owned));
        self
    }

    /// Adds the whole payload.
    #[must_use]
    pub fn payload(mut self) -> Self {
        self.payload = true;
        self
    }
}

/// Event names with a meaning in Pointsman or `EventSource`. The host refuses a route that has one.
pub const RESERVED_EVENT_NAMES: [&str; 8] = [
    "cursor",
    "gap",
    "reauth",
    "close",
    "open",
    "error",
    "message",
    "heartbeat",
];

/// Whether the host refuses a route with this event name: one of [`RESERVED_EVENT_NAMES`], also with
/// spaces around it.
pub fn is_reserved_event_name(name: &str) -> bool {
    RESERVED_EVENT_NAMES.contains(&name.trim())
}

impl Route {
    /// A route to these targets with the event's own priority and data, and without an event name,
    /// a condition or a time to live.
    pub fn to(targets: impl Into<Vec<Target>>) -> Self {
        Self {
            targets: targets.into(),
            when: None,
            priority: None,
            ttl_ms: None,
            collapse_key: None,
            event_name: None,
            body: None,
            options: Vec::new(),
        }
    }

    pub fn to_user(user: impl Into<String>) -> Self {
        Self::to([Target::User(user.into())])
    }

    pub fn to_group(group: impl Into<String>) -> Self {
        Self::to([Target::Group(group.into())])
    }

    pub fn to_everyone() -> Self {
        Self::to([Target::Everyone])
    }

    /// Restricts the targets to recipients whose attributes pass all of these tests. Each call adds
    /// an alternative.
    #[must_use]
    pub fn when(mut self, tests: impl Into<Vec<Test>>) -> Self {
        self.when
            .get_or_insert_with(|| Criteria { any_of: Vec::new() })
            .any_of
            .push(tests.into());
        self
    }

    #[must_use]
    pub fn priority(mut self, priority: Priority) -> Self {
        self.priority = Some(priority);
        self
    }

    /// Sets the time to live: the notification is not delivered once `ms` milliseconds have passed.
    #[must_use]
    pub fn ttl_ms(mut self, ms: u64) -> Self {
        self.ttl_ms = Some(ms);
        self
    }

    #[must_use]
    pub fn collapse_key(mut self, key: impl Into<String>) -> Self {
        self.collapse_key = Some(key.into());
        self
    }

    /// Sets the SSE `event:` name; not one of [`RESERVED_EVENT_NAMES`].
    #[must_use]
    pub fn event_name(mut self, name: impl Into<String>) -> Self {
        self.event_name = Some(name.into());
        self
    }

    /// Names the notification to which the route belongs. A recipient receives one notification of
    /// an event for each slot, by the route with the highest priority; without a slot, all routes
    /// belong to one notification. An event has at most 8.
    #[must_use]
    pub fn slot(mut self, name: impl Into<String>) -> Self {
        self.options.retain(|option| option.name != "slot");
        self.options.push(Attribute {
            name: "slot".into(),
            value: Value::Text(name.into()),
        });
        self
    }

    /// Sets the JSON to deliver as `data` instead of the event's own data.
    #[must_use]
    pub fn body(mut self, json: &serde_json::Value) -> Self {
        self.body = Some(json.to_string());
        self
    }
}

impl Test {
    /// A test of one attribute of a recipient. The operator determines how many values it takes.
    pub fn new(
        attribute: impl Into<String>,
        operator: Operator,
        values: impl Into<Vec<Value>>,
    ) -> Self {
        Self {
            attribute: attribute.into(),
            operator,
            values: values.into(),
        }
    }

    /// The attribute equals the value.
    pub fn equals(attribute: impl Into<String>, value: impl Into<Value>) -> Self {
        Self::new(attribute, Operator::Equals, [value.into()])
    }

    /// The attribute is present, has the type of the value and differs from it.
    pub fn not_equals(attribute: impl Into<String>, value: impl Into<Value>) -> Self {
        Self::new(attribute, Operator::NotEquals, [value.into()])
    }

    /// The attribute equals one of the values, of which there is at least one.
    pub fn one_of<V: Into<Value>>(
        attribute: impl Into<String>,
        values: impl IntoIterator<Item = V>,
    ) -> Self {
        let values: Vec<Value> = values.into_iter().map(Into::into).collect();
        Self::new(attribute, Operator::OneOf, values)
    }

    /// The attribute is present, has the type of one of the values and equals none of them.
    pub fn not_one_of<V: Into<Value>>(
        attribute: impl Into<String>,
        values: impl IntoIterator<Item = V>,
    ) -> Self {
        let values: Vec<Value> = values.into_iter().map(Into::into).collect();
        Self::new(attribute, Operator::NotOneOf, values)
    }

    /// The attribute is a list with an element that equals the value, or a text that contains it.
    pub fn contains(attribute: impl Into<String>, value: impl Into<Value>) -> Self {
        Self::new(attribute, Operator::Contains, [value.into()])
    }

    /// The attribute is absent, a list without an element that equals the value, or a text that does
    /// not contain it.
    pub fn not_contains(attribute: impl Into<String>, value: impl Into<Value>) -> Self {
        Self::new(attribute, Operator::NotContains, [value.into()])
    }

    /// The attribute is a text that begins with this text.
    pub fn prefix(attribute: impl Into<String>, text: impl Into<String>) -> Self {
        Self::new(attribute, Operator::Prefix, [Value::Text(text.into())])
    }

    /// The attribute is a text that ends with this text.
    pub fn suffix(attribute: impl Into<String>, text: impl Into<String>) -> Self {
        Self::new(attribute, Operator::Suffix, [Value::Text(text.into())])
    }

    /// The attribute is a number below this one.
    pub fn less(attribute: impl Into<String>, number: impl Into<Value>) -> Self {
        Self::new(attribute, Operator::Less, [number.into()])
    }

    /// The attribute is this number or one below it.
    pub fn at_most(attribute: impl Into<String>, number: impl Into<Value>) -> Self {
        Self::new(attribute, Operator::AtMost, [number.into()])
    }

    /// The attribute is a number above this one.
    pub fn greater(attribute: impl Into<String>, number: impl Into<Value>) -> Self {
        Self::new(attribute, Operator::Greater, [number.into()])
    }

    /// The attribute is this number or one above it.
    pub fn at_least(attribute: impl Into<String>, number: impl Into<Value>) -> Self {
        Self::new(attribute, Operator::AtLeast, [number.into()])
    }

    /// The recipient has the attribute.
    pub fn present(attribute: impl Into<String>) -> Self {
        Self::new(attribute, Operator::Present, [])
    }

    /// The recipient does not have the attribute.
    pub fn absent(attribute: impl Into<String>) -> Self {
        Self::new(attribute, Operator::Absent, [])
    }
}

impl Default for Amendment {
    /// Changes nothing.
    fn default() -> Self {
        Self {
            priority: None,
            attributes: Vec::new(),
            options: Vec::new(),
        }
    }
}

impl Verdict {
    /// Keeps the event and changes its priority.
    pub fn with_priority(priority: Priority) -> Self {
        Self::Amend(Amendment {
            priority: Some(priority),
            ..Amendment::default()
        })
    }
}

impl Issue {
    /// `path` is the location in the configuration, such as `rules[0].type`; empty for the
    /// configuration as a whole.
    pub fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            message: message.into(),
        }
    }
}
