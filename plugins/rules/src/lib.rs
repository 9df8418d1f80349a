//! A router that answers by a list of rules, for what is said in a table sooner than in a program.
//!
//! ```toml
//! [[plugins.rules.config.rules]]
//! name = "large orders"                                          # optional, for the log
//! match.type = "order.*"                                         # without match: every event
//! match.payload = { "/order/total" = { at_least = 1000 } }
//! to = { user = "{/order/owner}", groups = ["sales-{region}"] }  # user, users, group, groups, everyone
//! when = { plan = ["pro", "team"] }                              # which of them, by their attributes
//! priority = "high"
//! ttl = "2h"
//! collapse = "order-{/order/id}"
//! event_name = "order"
//! body = { text = "{/order/owner} ordered", total = "{/order/total}" }
//! ```
//!
//! **Every rule whose condition holds answers**, in order, and a recipient whom several name gets one notification, with the highest
//! priority. `stop = true` ends the list after a rule that holds, whether or not it names anybody: first-match is `stop` in every rule.
//!
//! A rule is never an error at an event. A condition that cannot be decided is false; a template whose value is missing, or is no name,
//! makes no target, and says so in the log at debug. Mistakes in the configuration are told with their place as it is loaded.
//!
//! What a condition can say is [`pointsman_plugin::Condition`]'s; templates are `template.rs`, who is named `targets.rs`, conditions over
//! recipients `recipients.rs`, and bodies `body.rs`.

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
use targets::{EventName, NameTemplate, To};

/// The configuration.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Config {
    /// Every rule whose condition holds answers, in this order.
    #[serde(default)]
    rules: Vec<Rule>,
}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Rule {
    /// What the log calls it.
    name: Option<String>,
    /// Which events it answers; without it, every event.
    r#match: Option<Condition>,
    /// Whom it names.
    to: Option<To>,
    /// Which of them, by their attributes: a table whose tests must all hold, or a list of such tables of which one must.
    when: Option<OneOrMore<Clause>>,
    /// In place of the event's.
    priority: Option<Priority>,
    /// Not delivered after that.
    ttl: Option<Ttl>,
    /// A template; a later notification with the same key makes this one superfluous.
    collapse: Option<NameTemplate>,
    /// The SSE `event:` name.
    event_name: Option<EventName>,
    /// Delivered as `data` in place of the event's own: any JSON, whose texts are templates.
    body: Option<Body>,
    /// No rule after this one is looked at where this one holds.
    #[serde(default)]
    stop: bool,
}

struct Rules(Vec<Rule>);

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

    /// What the rules look at, and no more: the payload whole only for a body that takes a value from it as it is.
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
    /// The key, what is wrong, and the fix.
    fn check(&self) -> Result<(), (&'static str, String)> {
        if self.to.as_ref().is_some_and(To::is_nobody) {
            return Err((
                ".to",
                "names nobody; give it user, users, group, groups or everyone = true".into(),
            ));
        }
        let has_more = self.when.is_some()
            || self.priority.is_some()
            || self.ttl.is_some()
            || self.collapse.is_some()
            || self.event_name.is_some()
            || self.body.is_some();
        if self.to.is_none() && (has_more || !self.stop) {
            let fix = r#"say whom, as in to = { user = "{/customer/id}" }, or only stop = true"#;
            return Err(("", format!("names nobody; {fix}")));
        }
        let n_tests: usize = self
            .when
            .iter()
            .flat_map(|clauses| clauses.iter())
            .map(Clause::n_tests)
            .sum();
        if n_tests > Clause::MAX_TESTS {
            let fix = "write a list of values for several tests of one attribute";
            return Err((
                ".when",
                format!(
                    "has {n_tests} tests; {} is the most; {fix}",
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

    /// Its answer about an event for which it holds.
    fn route(&self, event: &Event, document: &Document<'_>, at: usize) -> Option<Route> {
        let Self {
            to,
            when,
            priority,
            ttl,
            collapse,
            event_name,
            body,
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
                    "its condition on recipients holds for nobody: {why}"
                )),
            }
        }
        // A condition of which nothing is left never holds, where none at all would always.
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
                    note(format_args!("its notification collapses with none: {why}"));
                    None
                }
            });
        route.event_name = event_name.as_ref().map(|name| name.as_str().to_owned());
        route.body = body.as_ref().map(|body| body.fill(event, document));
        Some(route)
    }
}

#[cfg(test)]
mod tests;
