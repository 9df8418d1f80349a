//! Compares the decisions of two versions of a plugin about the same event, and keeps a bounded
//! sample of the differences.
//!
//! The versions are run by `plugin::shadow` on live events and by `preview::backtest` on past
//! events.

use std::collections::BTreeMap;
use std::io;

use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};

use crate::event::{Event, LongName, Name, Plan, Priority, Value};
use crate::plugin::{Answer, Call, CallError, Role};

/// The maximum number of differences that are kept; all are counted.
const MAX_DIFFERENCES: usize = 100;
/// The maximum size of one side of a difference, in bytes of JSON.
const MAX_SIDE: usize = 16 * 1024;

/// The decision of a version of a plugin about an event in one role. It is serialised as in
/// decision records.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "verdict", rename_all = "lowercase")]
pub enum PluginDecision {
    Keep,
    Drop {
        reason: String,
    },
    Amend {
        /// `None`: unchanged.
        #[serde(skip_serializing_if = "Option::is_none")]
        priority: Option<Priority>,
        /// The attributes that changed.
        attributes: BTreeMap<String, Value>,
    },
    /// The empty answer of a router.
    None,
    Routes {
        /// `None`: no longer known.
        #[serde(skip_serializing_if = "Option::is_none")]
        plan: Option<Plan>,
    },
    Failed {
        reason: String,
    },
}

impl PluginDecision {
    /// The implied decision of a plugin that is not called because its types do not match.
    pub fn nothing(role: Role) -> Self {
        match role {
            Role::Filter => Self::Keep,
            Role::Router => Self::None,
        }
    }

    /// The decision expressed by an answer to this call.
    pub fn of_answer(answer: &Answer, call: &Call<'_>) -> Self {
        match answer {
            Answer::Keep => Self::Keep,
            Answer::Drop(reason) => Self::Drop {
                reason: reason.clone(),
            },
            Answer::Amend(amended) => {
                let is_new = |(name, value): &(&String, &Value)| {
                    call.event.attributes.get(*name) != Some(*value)
                };
                let attributes = amended
                    .event
                    .attributes
                    .iter()
                    .filter(is_new)
                    .map(|(name, value)| (name.clone(), value.clone()));
                Self::Amend {
                    priority: amended
                        .priority
                        .filter(|priority| *priority != call.priority),
                    attributes: attributes.collect(),
                }
            }
            Answer::Routes(plan) if plan.routes.is_empty() => Self::None,
            Answer::Routes(plan) => Self::Routes {
                plan: Some(plan.clone()),
            },
        }
    }

    pub fn of_failure(error: &CallError) -> Self {
        Self::Failed {
            reason: error.to_string(),
        }
    }

    pub fn has_failed(&self) -> bool {
        matches!(self, Self::Failed { .. })
    }

    /// Whether both decisions have the same effect. Reasons are ignored because they are written
    /// for people; the cause of a failure is ignored as well.
    pub fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Keep, Self::Keep) | (Self::None, Self::None) => true,
            (Self::Drop { .. }, Self::Drop { .. }) | (Self::Failed { .. }, Self::Failed { .. }) => {
                true
            }
            (
                Self::Amend {
                    priority,
                    attributes,
                },
                Self::Amend {
                    priority: other_priority,
                    attributes: other_attributes,
                },
            ) => (priority, attributes) == (other_priority, other_attributes),
            // Compared as stored and sent: raw JSON bodies have no other equality.
            (Self::Routes { plan: Some(plan) }, Self::Routes { plan: Some(other) }) => {
                serde_json::to_vec(plan).ok() == serde_json::to_vec(other).ok()
            }
            _ => false,
        }
    }
}

/// An event about which the versions decide differently.
#[derive(Clone, Debug, Serialize)]
pub struct Difference {
    event: EventIdentity,
    role: Role,
    /// The clock shown to both versions, in milliseconds since the Unix epoch.
    clock_ms: u64,
    /// The recorded or live decision.
    old: Box<RawValue>,
    /// The decision of the candidate.
    new: Box<RawValue>,
}

/// The identity of an event.
#[derive(Clone, Debug, Serialize)]
struct EventIdentity {
    id: Name,
    source: LongName,
    #[serde(rename = "type")]
    kind: Name,
}

/// Replaces a side that is too large to show.
#[derive(Debug, Serialize)]
struct TooLarge {
    /// The size of its JSON, in bytes.
    too_large_bytes: usize,
}

impl Difference {
    pub fn new(
        event: &Event,
        role: Role,
        clock_ms: u64,
        old: &PluginDecision,
        new: &PluginDecision,
    ) -> Self {
        let Event {
            id, source, kind, ..
        } = event;
        let event = EventIdentity {
            id: id.clone(),
            source: source.clone(),
            kind: kind.clone(),
        };
        Self {
            event,
            role,
            clock_ms,
            old: side(old),
            new: side(new),
        }
    }
}

fn side(decided: &PluginDecision) -> Box<RawValue> {
    let shown = to_raw_value(decided).unwrap_or_default();
    match shown.get().len() {
        0..=MAX_SIDE => shown,
        too_large_bytes => to_raw_value(&TooLarge { too_large_bytes }).unwrap_or_default(),
    }
}

/// The first differences, at most [`MAX_DIFFERENCES`].
#[derive(Clone, Debug, Default, Serialize)]
#[serde(transparent)]
pub struct Differences(Vec<Difference>);

impl Differences {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Keeps a difference if there is room.
    pub fn push(&mut self, difference: Difference) {
        if self.0.len() < MAX_DIFFERENCES {
            self.0.push(difference);
        }
    }
}

/// The size of a value as JSON, in bytes, computed without building the text.
pub(super) fn json_bytes(value: &impl Serialize) -> usize {
    struct Counter(usize);
    impl io::Write for Counter {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 += bytes.len();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut counter = Counter(0);
    serde_json::to_writer(&mut counter, value).map_or(usize::MAX, |()| counter.0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::event::EntryId;
    use crate::plugin::{Amended, ParsedPayload};

    fn plan(to: &[&str]) -> Option<Plan> {
        serde_json::from_value(json!([{ "by": "r", "to": to, "priority": "normal" }])).unwrap()
    }

    fn event() -> Event {
        Event::from_json(
            EntryId::default(),
            "-",
            br#"{"type":"t","id":"e","a":1,"b":"x"}"#,
        )
        .unwrap()
    }

    #[test]
    fn decisions_are_compared_by_effect_and_not_by_reason() {
        let text = |text: &str| text.to_owned();
        let amend = |value: i64| PluginDecision::Amend {
            priority: None,
            attributes: [(text("a"), Value::Integer(value))].into(),
        };
        let all = [
            PluginDecision::Keep,
            PluginDecision::None,
            PluginDecision::Drop {
                reason: text("old"),
            },
            PluginDecision::Failed {
                reason: text("it trapped"),
            },
            amend(1),
            amend(2),
            PluginDecision::Amend {
                priority: Some(Priority::High),
                attributes: BTreeMap::new(),
            },
            PluginDecision::Routes {
                plan: plan(&["u:1"]),
            },
            PluginDecision::Routes {
                plan: plan(&["u:1", "u:2"]),
            },
        ];
        for (n, one) in all.iter().enumerate() {
            for (m, other) in all.iter().enumerate() {
                assert_eq!(one.is_same(other), n == m, "{one:?} {other:?}");
            }
        }
        assert!(all[2].is_same(&PluginDecision::Drop {
            reason: text("old age")
        }));
        assert!(all[3].is_same(&PluginDecision::Failed {
            reason: text("it ran longer than 50 ms")
        }));
    }

    #[test]
    fn an_amendment_contains_only_its_changes() {
        let (event, payload) = (event(), ParsedPayload::default());
        let call = Call {
            event: &event,
            priority: Priority::High,
            clock_ms: 1,
            payload: &payload,
        };
        let mut amended = event.clone();
        amended.set_attribute("a", Value::Integer(1)).unwrap();
        amended.set_attribute("b", Value::Text("y".into())).unwrap();
        let answer = Answer::Amend(Box::new(Amended {
            event: amended,
            priority: Some(Priority::High),
        }));
        let shown = serde_json::to_value(PluginDecision::of_answer(&answer, &call)).unwrap();
        assert_eq!(
            shown,
            json!({ "verdict": "amend", "attributes": { "b": "y" } })
        );
    }

    #[test]
    fn the_sample_and_each_side_of_a_difference_are_bounded() {
        let many: Vec<String> = (0..5_000).map(|n| format!("u:{n}")).collect();
        let large = PluginDecision::Routes {
            plan: plan(&many.iter().map(String::as_str).collect::<Vec<_>>()),
        };
        let mut sample = Differences::default();
        for _ in 0..=MAX_DIFFERENCES {
            sample.push(Difference::new(
                &event(),
                Role::Router,
                7,
                &large,
                &PluginDecision::None,
            ));
        }
        let shown = serde_json::to_value(&sample).unwrap();
        assert_eq!(shown.as_array().unwrap().len(), MAX_DIFFERENCES);
        let expect = json!({
            "event": { "id": "e", "source": "-", "type": "t" }, "role": "router", "clock_ms": 7,
            "old": { "too_large_bytes": json_bytes(&large) }, "new": { "verdict": "none" }
        });
        assert_eq!(shown[0], expect);
    }
}
