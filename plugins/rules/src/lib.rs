//! A router driven by a list of rules, for routing that is easier to express in a table than in a
//! program.
//!
//! ```toml
//! [[plugins.rules.config.rules]]
//! name = "large orders"              # optional, for the log
//! match.type = "order.*"             # without match: every event
//! match.payload = { "/order/total" = { at_least = 1000 } }
//! # Targets: user, users, group, groups and everyone.
//! to = { user = "{/order/owner}", groups = ["sales-{region}"] }
//! when = { plan = ["pro", "team"] }  # restricts the targets by their attributes
//! priority = "high"
//! ttl = "2h"
//! collapse = "order-{/order/id}"
//! event_name = "order"
//! body = { text = "{/order/owner} ordered", total = "{/order/total}" }
//! slot = "sales"                     # a notification of its own beside that of other rules
//! ```
//!
//! **Every rule whose condition holds adds a route**, in order. A recipient addressed by several
//! routes gets one notification for each slot, with the highest priority of its routes; without
//! slots, it is one notification. `stop = true` ends the list after a
//! rule that holds, even if the rule addresses no one; set it in every rule for first-match
//! behaviour.
//!
//! A rule never fails at an event. A condition that cannot be decided is false. A template whose
//! value is missing, or is not a valid name, yields no target, which is logged at debug. Mistakes
//! in the configuration are reported with their location when it is loaded.
//!
//! [`pointsman_plugin::Condition`] documents the conditions on events. `template.rs` implements
//! templates, `targets.rs` the targets, `recipients.rs` the conditions on recipients and `body.rs`
//! the bodies.

use std::fmt;

use pointsman_plugin::{
    Condition, Event, Failure, Interest, Issue, OneOrMore, Plugin, Priority, Route, Router,
    Selector, Ttl, export, log,
};
use schemars::JsonSchema;
use serde::Deserialize;

mod body;
mod recipients;
mod targets;
mod template;

use body::{Body, Document};
use recipients::Clause;
use targets::{EventName, NameTemplate, SlotName, To};

/// The configuration.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The rules. Every rule whose condition holds adds a route, in this order.
    #[serde(default)]
    rules: Vec<Rule>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Rule {
    /// The name of the rule in the log.
    name: Option<String>,
    /// The events to which the rule applies; if absent, every event.
    r#match: Option<Condition>,
    /// The targets.
    to: Option<To>,
    /// Restricts the targets by the attributes of the recipients: a table whose tests must all
    /// hold, or a list of alternative tables.
    when: Option<OneOrMore<Clause>>,
    /// The priority, instead of the event's own.
    priority: Option<Priority>,
    /// The time to live, after which the notification is not delivered.
    ttl: Option<Ttl>,
    /// A template for the collapse key; a later notification with the same key supersedes this one.
    collapse: Option<NameTemplate>,
    /// The SSE `event:` name.
    event_name: Option<EventName>,
    /// The JSON to deliver as `data` instead of the event's own data. All texts in it are
    /// templates.
    body: Option<Body>,
    /// The name of the notification to which the route belongs. A recipient gets one notification
    /// for each slot; rules without one belong to the same notification.
    slot: Option<SlotName>,
    /// Whether to skip the remaining rules if this one holds.
    #[serde(default)]
    stop: bool,
}

/// The plugin.
pub struct Rules(Vec<Rule>);

export!(Rules as router);

impl Plugin for Rules {
    type Config = Config;

    fn new(config: Config) -> Result<Self, Issue> {
        for (at, rule) in config.rules.iter().enumerate() {
            rule.check()
                .map_err(|(key, message)| Issue::new(format!("rules[{at}]{key}"), message))?;
        }
        Ok(Self(config.rules))
    }

    /// Exactly the values that the rules read. The whole payload is requested only for a body that
    /// copies a value from it verbatim.
    fn interest(&self) -> Interest {
        let interest = Interest::in_conditions(self.0.iter().map(|rule| rule.r#match.as_ref()));
        let interest = interest.selectors(self.0.iter().flat_map(Rule::selectors));
        let reads_payload = self
            .0
            .iter()
            .filter_map(|rule| rule.body.as_ref())
            .any(Body::reads_payload);
        if reads_payload {
            interest.payload()
        } else {
            interest
        }
    }
}

impl Router for Rules {
    fn resolve(&self, event: &Event) -> Result<Vec<Route>, Failure> {
        let document = Document::of(event);
        let mut routes = Vec::new();
        for (at, rule) in self.0.iter().enumerate() {
            if rule
                .r#match
                .as_ref()
                .is_some_and(|condition| !condition.holds(event))
            {
                continue;
            }
            routes.extend(rule.route(event, &document, at));
            if rule.stop {
                break;
            }
        }
        Ok(routes)
    }
}

impl Rule {
    /// # Errors
    /// The key, and a message that names the problem and the fix.
    fn check(&self) -> Result<(), (&'static str, String)> {
        if self.to.as_ref().is_some_and(To::is_nobody) {
            return Err((
                ".to",
                "addresses no one; set user, users, group, groups or everyone = true".into(),
            ));
        }
        let has_more = self.when.is_some()
            || self.priority.is_some()
            || self.ttl.is_some()
            || self.collapse.is_some()
            || self.event_name.is_some()
            || self.body.is_some()
            || self.slot.is_some();
        if self.to.is_none() && (has_more || !self.stop) {
            let fix =
                r#"add targets, such as to = { user = "{/customer/id}" }, or set only stop = true"#;
            return Err(("", format!("addresses no one; {fix}")));
        }
        let n_tests: usize = self
            .when
            .iter()
            .flat_map(|clauses| clauses.iter())
            .map(Clause::n_tests)
            .sum();
        if n_tests > Clause::MAX_TESTS {
            let fix = "replace several tests of one attribute with a list of values";
            return Err((
                ".when",
                format!(
                    "has {n_tests} tests, but the limit is {}; {fix}",
                    Clause::MAX_TESTS
                ),
            ));
        }
        Ok(())
    }

    fn selectors(&self) -> impl Iterator<Item = &Selector> {
        let of_names = self
            .to
            .iter()
            .flat_map(To::templates)
            .chain(&self.collapse)
            .flat_map(NameTemplate::selectors);
        let of_when = self
            .when
            .iter()
            .flat_map(|clauses| clauses.iter())
            .flat_map(Clause::selectors);
        of_names
            .chain(of_when)
            .chain(self.body.iter().flat_map(Body::selectors))
    }

    /// Returns the route for an event for which the rule holds; `None` if it yields no target.
    fn route(&self, event: &Event, document: &Document<'_>, at: usize) -> Option<Route> {
        let Self {
            to,
            when,
            priority,
            ttl,
            collapse,
            event_name,
            body,
            slot,
            ..
        } = self;
        let note = |what: fmt::Arguments<'_>| match &self.name {
            Some(name) => log::debug(format_args!("rules[{at}] ({name}): {what}")),
            None => log::debug(format_args!("rules[{at}]: {what}")),
        };
        let targets = to.as_ref()?.targets(event, &note);
        if targets.is_empty() {
            return None;
        }
        let mut route = Route::to(targets);
        for clause in when.iter().flat_map(|clauses| clauses.iter()) {
            match clause.tests(event) {
                Ok(tests) => route = route.when(tests),
                Err(why) => note(format_args!(
                    "the condition on recipients holds for no one: {why}"
                )),
            }
        }
        // All clauses were dropped, so the condition never holds. The host would treat a route
        // without a condition as one that always holds.
        if when.is_some() && route.when.is_none() {
            return None;
        }
        route.priority = *priority;
        route.ttl_ms = ttl.map(|ttl| ttl.ms);
        route.collapse_key = collapse
            .as_ref()
            .and_then(|template| match template.name(event) {
                Ok(key) => Some(key),
                Err(why) => {
                    note(format_args!("the notification has no collapse key: {why}"));
                    None
                }
            });
        route.event_name = event_name.as_ref().map(|name| name.as_str().to_owned());
        route.body = body.as_ref().map(|body| body.fill(event, document));
        if let Some(slot) = slot {
            route = route.slot(slot.as_str());
        }
        Some(route)
    }
}

#[cfg(test)]
mod tests;
