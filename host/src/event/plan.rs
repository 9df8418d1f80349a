//! What plugins decided about an event, who that names, and how it ended.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{EntryId, Event, Malformed, Name};
use crate::event::criteria::Criteria;

/// Event names that Pointsman, or `EventSource` itself, gives a meaning; plugins and publishers may not use them.
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

/// How urgent a notification is. A higher one may overtake on its way to the socket.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    Low,
    #[default]
    Normal,
    High,
    Urgent,
}

impl Priority {
    pub const ALL: [Self; 4] = [Self::Low, Self::Normal, Self::High, Self::Urgent];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Normal => "normal",
            Self::High => "high",
            Self::Urgent => "urgent",
        }
    }
}

impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Priority {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        let found = Self::ALL.into_iter().find(|p| p.as_str() == text);
        found.ok_or_else(|| {
            Malformed::new(format!(
                "'{}' is no priority: low, normal, high or urgent",
                text.escape_debug()
            ))
        })
    }
}

/// Whom a route names. Each target has one log in each partition, under the target's written form: `u:42`, `g:ops`, `all`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    User(Name),
    Group(Name),
    Everyone,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(name) => write!(f, "u:{name}"),
            Self::Group(name) => write!(f, "g:{name}"),
            Self::Everyone => f.write_str("all"),
        }
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Target {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        match text.split_once(':') {
            Some(("u", name)) => Name::parse(name).map(Self::User),
            Some(("g", name)) => Name::parse(name).map(Self::Group),
            None if text == "all" => Ok(Self::Everyone),
            _ => Err(Malformed::new(format!(
                "'{}' is no target: u:<user>, g:<group> or all",
                text.escape_debug()
            ))),
        }
    }
}

impl Serialize for Target {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Target {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        std::borrow::Cow::<'de, str>::deserialize(d)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// One decision of a router: who, how urgent, under which condition, until when, under which collapse key.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Route {
    /// The router that answered it.
    pub by: Name,
    pub to: Vec<Target>,
    /// Which of the recipients, by their attributes, judged on the way to the socket. `None`: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when: Option<Criteria>,
    pub priority: Priority,
    /// Not delivered from this moment on, in milliseconds since the Unix epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_ms: Option<u64>,
    /// A later notification with the same key makes this one superfluous to a recipient who does not have it yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collapse: Option<Name>,
    /// The SSE `event:` name; without one, `onmessage` fires. Never one of [`RESERVED_EVENT_NAMES`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event_name: Option<Name>,
    /// JSON, delivered as `data` in place of the event's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<Box<serde_json::value::RawValue>>,
}

/// All routes of an event, in the order of the routers and of their answers.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Plan {
    pub routes: Vec<Route>,
}

impl Plan {
    /// Every target that a route names, each once, in a fixed order: the logs that the event is indexed in.
    pub fn targets(&self) -> Vec<Target> {
        let mut all: Vec<Target> = self
            .routes
            .iter()
            .flat_map(|route| route.to.iter().cloned())
            .collect();
        all.sort_unstable();
        all.dedup();
        all
    }
}

/// What a record holds: an event with its whole plan, stored once, as JSON, under one id that all logs share. That of a plan that is
/// written in slices also holds the decision, for the `ingest` that ends it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Notification {
    /// The source entry that it came from.
    pub entry: EntryId,
    pub event: Event,
    pub plan: Plan,
}

/// How an event ended; each ends in exactly one. The words are the same in code, counters, records and documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Indexed in every log that its plan names.
    Committed,
    /// A filter dropped it and said why.
    Discarded,
    /// No router named anyone.
    Unrouted,
    /// The publisher's retry of an event within the window.
    Duplicate,
    /// Kept aside with the reason.
    DeadLettered,
}

impl Outcome {
    pub const ALL: [Self; 5] = [
        Self::Committed,
        Self::Discarded,
        Self::Unrouted,
        Self::Duplicate,
        Self::DeadLettered,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Committed => "committed",
            Self::Discarded => "discarded",
            Self::Unrouted => "unrouted",
            Self::Duplicate => "duplicate",
            Self::DeadLettered => "dead-lettered",
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Outcome {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        let found = Self::ALL
            .into_iter()
            .find(|outcome| outcome.as_str() == text);
        found.ok_or_else(|| Malformed::new(format!("'{}' is no outcome", text.escape_debug())))
    }
}
