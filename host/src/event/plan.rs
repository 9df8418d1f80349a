//! The decision about an event: its plan, the targets it names and the outcome.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{EntryId, Event, Malformed, Name};
use crate::event::criteria::Criteria;

/// Event names with a meaning in Pointsman or `EventSource`; plugins and publishers may not use
/// them.
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

/// Whether this is a reserved event name, also with spaces around it: some clients trim the name.
pub fn is_reserved_event_name(name: &str) -> bool {
    RESERVED_EVENT_NAMES.contains(&name.trim())
}

/// The urgency of a notification. One of a higher priority may be sent ahead of lower ones.
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

/// Publishers write the words in any case, and some write `medium`.
impl FromStr for Priority {
    type Err = Malformed;
    fn from_str(text: &str) -> Result<Self, Malformed> {
        let word = if text.eq_ignore_ascii_case("medium") {
            "normal"
        } else {
            text
        };
        let found = Self::ALL
            .into_iter()
            .find(|priority| priority.as_str().eq_ignore_ascii_case(word));
        found.ok_or_else(|| {
            Malformed::new(format!(
                "'{}' is not a valid priority; use low, normal, high or urgent",
                text.escape_debug()
            ))
        })
    }
}

/// A target of a route. Each target has one log in each partition, under its written form: `u:42`,
/// `g:ops`, `all`.
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
                "'{}' is not a valid target; use u:<user>, g:<group> or all",
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

/// One decision of a router: targets, condition, priority, expiry and collapse key.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Route {
    /// The router that returned it.
    pub by: Name,
    pub to: Vec<Target>,
    /// Condition on the recipients' attributes, evaluated just before sending. `None`: all
    /// recipients.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when: Option<Criteria>,
    pub priority: Priority,
    /// Not delivered from this moment on, in milliseconds since the Unix epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_ms: Option<u64>,
    /// A later notification with the same key supersedes this one for a recipient that has not
    /// received it yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collapse: Option<Name>,
    /// The SSE `event:` name; without one, `onmessage` is called. Never one of
    /// [`RESERVED_EVENT_NAMES`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event_name: Option<Name>,
    /// JSON delivered as `data` in place of the event's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<Box<serde_json::value::RawValue>>,
    /// The notification to which the route belongs; `None`: the one without a name. A recipient
    /// receives one notification of an event for each slot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<Name>,
}

impl Route {
    /// The state that a notification by this route replaces, if it has a collapse key. Two slots of
    /// one event never supersede each other.
    pub fn state(&self) -> Option<StateKey<'_>> {
        let key = self.collapse.as_ref()?;
        Some(StateKey {
            slot: self.slot.as_ref(),
            key,
        })
    }
}

/// A collapse key within its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateKey<'a> {
    pub slot: Option<&'a Name>,
    pub key: &'a Name,
}

/// All routes of an event, in the order of the routers and of their results.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Plan {
    pub routes: Vec<Route>,
}

impl Plan {
    /// The most slots of one event.
    pub const MAX_SLOTS: usize = 8;

    /// The slots of the routes, in the order of their first routes.
    pub fn slots(&self) -> Vec<Option<&Name>> {
        let mut slots = Vec::new();
        for route in &self.routes {
            if !slots.contains(&route.slot.as_ref()) {
                slots.push(route.slot.as_ref());
            }
        }
        slots
    }

    /// Divides the plan into one for each slot, in the order of [`Plan::slots`].
    pub fn by_slot(self) -> Vec<Self> {
        let mut plans: Vec<Self> = Vec::new();
        for route in self.routes {
            match plans
                .iter_mut()
                .find(|plan| plan.routes[0].slot == route.slot)
            {
                Some(plan) => plan.routes.push(route),
                None => plans.push(Self {
                    routes: vec![route],
                }),
            }
        }
        plans
    }

    /// Every target named by a route, each once, in a fixed order: the logs that index the event.
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

/// The content of a record: an event with its plan, stored once as JSON under one id that all logs
/// share. If the routes of an event have several slots, it has a record for each, with the routes of
/// that slot. The records of a plan written in slices also hold the decision, for the `ingest` that
/// completes it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Notification {
    /// The source entry of the event.
    pub entry: EntryId,
    pub event: Event,
    pub plan: Plan,
}

/// The outcome of an entry; each entry has exactly one. Code, counters, records and documents use
/// the same words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Indexed in every log that its plan names.
    Committed,
    /// Dropped by a filter, which gave a reason.
    Discarded,
    /// No router named a target.
    Unrouted,
    /// A publisher's retry of an event within the dedupe window.
    Duplicate,
    /// Stored as a dead letter with the reason.
    DeadLettered,
    /// Stored as a dead letter that becomes a new entry when its retry is due, because a plugin
    /// requested one. The event has no outcome yet.
    Retrying,
}

impl Outcome {
    pub const ALL: [Self; 6] = [
        Self::Committed,
        Self::Discarded,
        Self::Unrouted,
        Self::Duplicate,
        Self::DeadLettered,
        Self::Retrying,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Committed => "committed",
            Self::Discarded => "discarded",
            Self::Unrouted => "unrouted",
            Self::Duplicate => "duplicate",
            Self::DeadLettered => "dead-lettered",
            Self::Retrying => "retrying",
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
        found.ok_or_else(|| {
            Malformed::new(format!("'{}' is not a valid outcome", text.escape_debug()))
        })
    }
}
