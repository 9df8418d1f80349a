//! What an author writes: a [`Plugin`] that is a [`Filter`], a [`Router`] or both.

use schemars::JsonSchema;
use serde::Deserialize;
use serde::de::DeserializeOwned;

#[doc(inline)]
pub use crate::bindings::filter::exports::pointsman::plugin::filter::{Amendment, Verdict};
#[doc(inline)]
pub use crate::bindings::router::exports::pointsman::plugin::router::Route;
use crate::{Criteria, Event, Failure, Issue, Operator, Priority, Target, Test, Value};

/// A plugin with its configuration. It is made anew for every instance; there is no state between events.
pub trait Plugin: Sized + 'static {
    /// The operator's configuration. Unknown names are refused if it says `#[serde(deny_unknown_fields)]`, which it should. Its
    /// schema is in the plugin's manifest. [`NoConfig`] takes none.
    type Config: DeserializeOwned + JsonSchema;

    /// # Errors
    /// What of a well-formed configuration is wrong, and the fix. The host then refuses the plugin and says so.
    fn new(config: Self::Config) -> Result<Self, Issue>;

    /// Which events the plugin is called for and what of them it sees. By default every event with all its attributes, and nothing of
    /// its payload. What is not asked for is not copied.
    fn interest(&self) -> Interest {
        Interest::default()
    }
}

/// Keeps, amends or drops events, before any router sees them.
pub trait Filter: Plugin {
    /// # Errors
    /// [`Failure::Reject`] dead-letters the event at once, with the text as the reason.
    fn evaluate(&self, event: &Event) -> Result<Verdict, Failure>;
}

/// Decides who hears of an event.
pub trait Router: Plugin {
    /// No route is an answer too: this router names nobody.
    ///
    /// # Errors
    /// [`Failure::Reject`] dead-letters the event at once, with the text as the reason.
    fn resolve(&self, event: &Event) -> Result<Vec<Route>, Failure>;
}

/// The configuration of a plugin that takes none.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NoConfig {}

/// Which events a plugin is called for, and what of them it sees. See [`Plugin::interest`].
#[derive(Clone, Debug, PartialEq)]
pub struct Interest {
    /// Patterns of event types, such as `order.*`, where `*` stands for any characters. Empty: every event.
    pub types: Vec<String>,
    /// Names of extension attributes; `*` is all of them.
    pub attributes: Vec<String>,
    /// JSON pointers into a JSON payload, such as `/order/region`; each arrives as an attribute of that name.
    pub fields: Vec<String>,
    /// Whether the payload arrives whole.
    pub payload: bool,
}

impl Default for Interest {
    /// Every event, all attributes, nothing of the payload.
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
    /// Events whose type matches one of the patterns; of them no attribute and nothing of the payload.
    pub fn in_types<'a>(patterns: impl IntoIterator<Item = &'a str>) -> Self {
        Self {
            types: patterns.into_iter().map(str::to_owned).collect(),
            attributes: Vec::new(),
            fields: Vec::new(),
            payload: false,
        }
    }

    /// Every event; of them no attribute and nothing of the payload.
    pub fn in_every_type() -> Self {
        Self::in_types([])
    }

    /// And these attributes.
    #[must_use]
    pub fn attributes<'a>(mut self, names: impl IntoIterator<Item = &'a str>) -> Self {
        self.attributes.extend(names.into_iter().map(str::to_owned));
        self
    }

    /// And these fields of the payload, by their JSON pointers.
    #[must_use]
    pub fn fields<'a>(mut self, pointers: impl IntoIterator<Item = &'a str>) -> Self {
        self.fields.extend(pointers.into_iter().map(str::to_owned));
        self
    }

    /// And the payload whole.
    #[must_use]
    pub fn payload(mut self) -> Self {
        self.payload = true;
        self
    }
}

impl Route {
    /// To these targets, with the event's own priority, name and data, without a condition or an end.
    pub fn to(targets: impl Into<Vec<Target>>) -> Self {
        Self {
            targets: targets.into(),
            when: None,
            priority: None,
            ttl_ms: None,
            collapse_key: None,
            event_name: None,
            body: None,
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

    /// Only to those whose attributes pass all of these tests.
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

    /// Not delivered from so many milliseconds on.
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

    /// The SSE `event:` name.
    #[must_use]
    pub fn event_name(mut self, name: impl Into<String>) -> Self {
        self.event_name = Some(name.into());
        self
    }

    /// Delivered as `data` in place of the event's own.
    #[must_use]
    pub fn body(mut self, json: &serde_json::Value) -> Self {
        self.body = Some(json.to_string());
        self
    }
}

impl Test {
    /// A test of one attribute of a recipient; how many values it takes is the operator's.
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
}

impl Verdict {
    /// Keeps the event under another priority.
    pub fn with_priority(priority: Priority) -> Self {
        Self::Amend(Amendment {
            priority: Some(priority),
            attributes: Vec::new(),
        })
    }
}

impl Issue {
    /// `path`: where in the configuration, such as `rules[0].type`; empty for the whole.
    pub fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            message: message.into(),
        }
    }
}
