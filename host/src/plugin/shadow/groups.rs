//! Counts the differences between two versions of a plugin by what they change: `10 x
//! incident.open: g:region-eu -> g:region-us`.
//!
//! A change of a rule changes many events in the same way, and one line per change shows whether it
//! is the intended one. The number of groups and the length of their texts are bounded.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize, Serializer};

use super::outcome::PluginDecision;
use crate::event::{Plan, Route};
use crate::plugin::Role;

/// The maximum number of groups. Differences beyond them are counted in the total only.
const MAX_GROUPS: usize = 100;
/// The maximum length of one side of a group, in characters.
const MAX_SIDE: usize = 200;

/// What a difference changes. Events with equal keys differ in the same way.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct GroupKey {
    role: String,
    kind: String,
    old: String,
    new: String,
}

/// Groups of differences, at most [`MAX_GROUPS`]. Serialised as a list, the largest group first.
#[derive(Clone, Debug, Default)]
pub struct Groups(BTreeMap<GroupKey, Tally>);

#[derive(Clone, Debug)]
struct Tally {
    count: u64,
    event: String,
}

/// A group as serialised.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DifferenceGroup {
    pub count: u64,
    pub role: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub old: String,
    pub new: String,
    /// The id of the first event.
    pub event: String,
}

impl GroupKey {
    /// `clock_ms`: the clock that both versions were given, so that an expiry is shown as the time
    /// to live that the plugin chose.
    pub fn new(
        role: Role,
        kind: &str,
        clock_ms: u64,
        old: &PluginDecision,
        new: &PluginDecision,
    ) -> Self {
        let (old, new) = (&without_common(old, new), &without_common(new, old));
        let [mut old_side, mut new_side] = [old, new].map(|side| summary(side, None));
        if old_side == new_side {
            [old_side, new_side] = [old, new].map(|side| summary(side, Some(clock_ms)));
        }
        // Only the bodies differ, and they may be different for each event.
        if old_side == new_side {
            new_side += ", another body";
        }
        Self {
            role: match role {
                Role::Filter => "filter".to_owned(),
                Role::Router => "router".to_owned(),
            },
            kind: kind.to_owned(),
            old: bounded(old_side),
            new: bounded(new_side),
        }
    }
}

impl Groups {
    /// Counts a difference, if its group exists or has room. `event`: its event's id.
    pub fn note(&mut self, key: GroupKey, event: &str) {
        self.add(key, 1, event);
    }

    /// Adds a group that was counted elsewhere.
    pub fn merge(&mut self, group: DifferenceGroup) {
        let DifferenceGroup {
            count,
            role,
            kind,
            old,
            new,
            event,
        } = group;
        let key = GroupKey {
            role,
            kind,
            old,
            new,
        };
        self.add(key, count, &event);
    }

    fn add(&mut self, key: GroupKey, count: u64, event: &str) {
        if let Some(tally) = self.0.get_mut(&key) {
            tally.count += count;
        } else if self.0.len() < MAX_GROUPS {
            let event = event.to_owned();
            self.0.insert(key, Tally { count, event });
        }
    }

    /// The groups, the largest first.
    pub fn list(&self) -> Vec<DifferenceGroup> {
        let group = |(key, tally): (&GroupKey, &Tally)| DifferenceGroup {
            count: tally.count,
            role: key.role.clone(),
            kind: key.kind.clone(),
            old: key.old.clone(),
            new: key.new.clone(),
            event: tally.event.clone(),
        };
        let mut groups: Vec<_> = self.0.iter().map(group).collect();
        groups.sort_by_key(|group| std::cmp::Reverse(group.count));
        groups
    }
}

impl Serialize for Groups {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.list().serialize(serializer)
    }
}

/// The decision without the attributes that both sides set to the same value: those of a backtest
/// include every attribute of the event.
fn without_common(decision: &PluginDecision, other: &PluginDecision) -> PluginDecision {
    let mut decision = decision.clone();
    if let (
        PluginDecision::Amend { attributes, .. },
        PluginDecision::Amend {
            attributes: others, ..
        },
    ) = (&mut decision, other)
    {
        attributes.retain(|name, value| others.get(name) != Some(value));
    }
    decision
}

/// The decision in a few words. `clock_ms`: with everything besides the targets.
fn summary(decision: &PluginDecision, clock_ms: Option<u64>) -> String {
    match decision {
        PluginDecision::Keep => "keep".to_owned(),
        PluginDecision::Drop { .. } => "drop".to_owned(),
        PluginDecision::Amend {
            priority,
            attributes,
        } => {
            let priority = priority.map(|priority| format!("priority {priority}"));
            let attributes = attributes.iter().map(|(name, value)| {
                format!(
                    "{name} {}",
                    serde_json::to_string(value).unwrap_or_default()
                )
            });
            let all: Vec<_> = priority.into_iter().chain(attributes).collect();
            format!("amend {}", all.join(", "))
        }
        PluginDecision::None => "no recipients".to_owned(),
        PluginDecision::Routes { plan: None } => "routes".to_owned(),
        PluginDecision::Routes { plan: Some(plan) } => routes(plan, clock_ms),
        PluginDecision::Failed { reason } => {
            format!("failed: {}", reason.lines().next().unwrap_or_default())
        }
    }
}

fn routes(plan: &Plan, clock_ms: Option<u64>) -> String {
    let route = |route: &Route| {
        // Bounded before it is joined: a route may have a million targets.
        let mut targets: Vec<String> = route.to.iter().take(20).map(ToString::to_string).collect();
        if route.to.len() > targets.len() {
            targets.push(format!("{} more", route.to.len() - targets.len()));
        }
        let more = clock_ms.map_or_else(String::new, |clock_ms| facts(route, clock_ms));
        targets.join(", ") + &more
    };
    let routes: Vec<String> = plan.routes.iter().map(route).collect();
    routes.join("; ")
}

/// Everything besides the targets and the body.
fn facts(route: &Route, clock_ms: u64) -> String {
    let all = serde_json::to_value(route).unwrap_or_default();
    let all = all.as_object().into_iter().flatten();
    let fact = |(key, value): (&String, &serde_json::Value)| match key.as_str() {
        "by" | "to" | "body" => None,
        "expires_ms" => {
            let left = value.as_u64().unwrap_or_default().saturating_sub(clock_ms);
            Some(format!(", ttl {left} ms"))
        }
        key => Some(match value.as_str() {
            Some(text) => format!(", {key} {text}"),
            None => format!(", {key} {value}"),
        }),
    };
    all.filter_map(fact).collect()
}

fn bounded(text: String) -> String {
    if text.chars().count() <= MAX_SIDE {
        return text;
    }
    let begins: String = text.chars().take(MAX_SIDE - 3).collect();
    begins + "..."
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn routes_to(route: &serde_json::Value) -> PluginDecision {
        let mut all = json!({ "by": "r", "priority": "normal" });
        all.as_object_mut()
            .unwrap()
            .extend(route.as_object().unwrap().clone());
        PluginDecision::Routes {
            plan: serde_json::from_value(json!([all])).unwrap(),
        }
    }

    fn key(old: &PluginDecision, new: &PluginDecision) -> (String, String) {
        let key = GroupKey::new(Role::Router, "t", 1_000, old, new);
        (key.old, key.new)
    }

    #[test]
    fn a_group_shows_the_targets_or_else_what_differs_besides_them() {
        let eu = routes_to(&json!({ "to": ["g:eu", "u:1"] }));
        let us = routes_to(&json!({ "to": ["g:us"], "expires_ms": 5_000 }));
        let urgent =
            routes_to(&json!({ "to": ["g:us"], "priority": "urgent", "expires_ms": 5_000 }));
        let body = routes_to(&json!({ "to": ["g:us"], "expires_ms": 5_000, "body": { "a": 1 } }));
        for (old, new, expect) in [
            (&eu, &us, ("g:eu, u:1", "g:us")),
            (&us, &PluginDecision::None, ("g:us", "no recipients")),
            (
                &us,
                &urgent,
                (
                    "g:us, ttl 4000 ms, priority normal",
                    "g:us, ttl 4000 ms, priority urgent",
                ),
            ),
            (
                &us,
                &body,
                (
                    "g:us, ttl 4000 ms, priority normal",
                    "g:us, ttl 4000 ms, priority normal, another body",
                ),
            ),
        ] {
            let (old, new) = key(old, new);
            assert_eq!((old.as_str(), new.as_str()), expect);
        }
    }

    #[test]
    fn groups_are_bounded_summed_and_sorted_by_size() {
        let mut groups = Groups::default();
        let user = |n: usize| routes_to(&json!({ "to": [format!("u:{n}")] }));
        for n in 0..MAX_GROUPS + 10 {
            let key = GroupKey::new(Role::Router, "t", 0, &user(n), &PluginDecision::None);
            groups.note(key.clone(), "first");
            if n == 7 {
                groups.note(key, "second");
            }
        }
        let list = groups.list();
        assert_eq!((list.len(), list[0].count), (MAX_GROUPS, 2));
        assert_eq!(
            (list[0].old.as_str(), list[0].event.as_str()),
            ("u:7", "first")
        );
        groups.merge(list[0].clone());
        assert_eq!(groups.list()[0].count, 4);
        let long: Vec<String> = (0..1_000).map(|n| format!("u:user-{n}")).collect();
        let (old, _) = key(&routes_to(&json!({ "to": long })), &PluginDecision::None);
        assert!(old.chars().count() <= MAX_SIDE, "{old}");
    }
}
