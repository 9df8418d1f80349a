//! Converts between the contract in `wit/` and the types of `event`; the only file that knows both.
//!
//! Data from a guest is hostile until it is converted: names are parsed, counts and sizes are
//! bounded, control characters are refused where they could forge a key or a frame, and escaped
//! where an operator reads them.

use wasmtime::Store;
use wasmtime::component::{HasSelf, Instance, InstancePre, Linker};

use self::exports::pointsman::plugin::{filter, lifecycle, router};
use self::pointsman::plugin::types;
use super::call::{Amended, Answer};
use super::limits::Limits;
use super::log::{Level, printable};
use super::manifest::{Description, Manifest};
use super::selection::{Document, Selection};
use super::store::HostState;
use crate::event::criteria::{Criteria, Operator, Test};
use crate::event::{
    Event, Name, Payload, Plan, Priority, RESERVED_EVENT_NAMES, Route, Target, Value,
    is_reserved_event_name, json_line,
};

wasmtime::component::bindgen!({
    path: "../wit",
    world: "full-plugin",
});

/// The contract version that this host implements.
pub(super) const VERSION: &str = "0.1";

/// The latest expiry of a route: the end of the year 9999, in milliseconds since the Unix epoch.
const LATEST_MS: u64 = 253_402_300_799_999;

pub(super) fn add_to_linker(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    FullPlugin::add_to_linker::<HostState, HasSelf<HostState>>(linker, |state| state)
}

impl pointsman::plugin::log::Host for HostState {
    fn log(&mut self, level: pointsman::plugin::log::Level, message: String) {
        use self::pointsman::plugin::log::Level as Wit;
        let level = match level {
            Wit::Trace => Level::Trace,
            Wit::Debug => Level::Debug,
            Wit::Info => Level::Info,
            Wit::Warn => Level::Warn,
            Wit::Error => Level::Error,
        };
        self.log.line(level, self.event.as_ref(), &message);
        if level == Level::Error {
            self.last_error = Some(printable(&message));
        }
    }
}

impl pointsman::plugin::clock::Host for HostState {
    fn now_ms(&mut self) -> u64 {
        self.clock_ms()
    }
}

impl types::Host for HostState {}

/// The indices of a component's exports; the exports present determine the kind of plugin.
pub(super) struct ExportIndices {
    lifecycle: lifecycle::GuestIndices,
    pub(super) filter: Option<filter::GuestIndices>,
    pub(super) router: Option<router::GuestIndices>,
}

impl ExportIndices {
    pub(super) fn find(
        component: &InstancePre<HostState>,
        has_filter: bool,
        has_router: bool,
    ) -> wasmtime::Result<Self> {
        Ok(Self {
            lifecycle: lifecycle::GuestIndices::new(component)?,
            filter: has_filter
                .then(|| filter::GuestIndices::new(component))
                .transpose()?,
            router: has_router
                .then(|| router::GuestIndices::new(component))
                .transpose()?,
        })
    }

    /// Checks the types of all exports, which `instantiate_pre` does not do.
    pub(super) fn load(
        &self,
        store: &mut Store<HostState>,
        instance: &Instance,
    ) -> wasmtime::Result<Exports> {
        Ok(Exports {
            lifecycle: self.lifecycle.load(&mut *store, instance)?,
            filter: self
                .filter
                .as_ref()
                .map(|indices| indices.load(&mut *store, instance))
                .transpose()?,
            router: self
                .router
                .as_ref()
                .map(|indices| indices.load(&mut *store, instance))
                .transpose()?,
        })
    }
}

/// The exports of one instance.
pub(super) struct Exports {
    lifecycle: lifecycle::Guest,
    filter: Option<filter::Guest>,
    router: Option<router::Guest>,
}

impl Exports {
    pub(super) fn describe(&self, store: &mut Store<HostState>) -> wasmtime::Result<Description> {
        let lifecycle::Manifest {
            name,
            version,
            description,
            types,
            reads,
            config_schema,
            options,
        } = self.lifecycle.call_describe(store)?;
        let lifecycle::Selection {
            attributes,
            fields,
            payload,
        } = reads;
        let manifest = Manifest {
            name: printable(&name),
            version: printable(&version),
            description: printable(&description),
            config_schema,
        };
        Ok(Description {
            unknown_option: unknown_option(&options, &[])
                .map(|problem| format!("has an invalid manifest: {problem}")),
            manifest,
            selection: Selection {
                types,
                attributes,
                fields,
                payload,
            },
        })
    }

    /// # Errors
    /// Outer: the call failed. Inner: the issues that the guest found, joined with semicolons.
    pub(super) fn configure(
        &self,
        store: &mut Store<HostState>,
        config: &str,
    ) -> wasmtime::Result<Result<(), String>> {
        let issues = match self.lifecycle.call_configure(store, config)? {
            Ok(()) => return Ok(Ok(())),
            Err(issues) => issues,
        };
        let shown = issues
            .iter()
            .take(8)
            .map(|lifecycle::Issue { path, message }| {
                if path.is_empty() {
                    message.clone()
                } else {
                    format!("{path}: {message}")
                }
            });
        Ok(Err(printable(&shown.collect::<Vec<_>>().join("; "))))
    }

    /// `None` if the plugin is not a filter.
    pub(super) fn evaluate(
        &self,
        store: &mut Store<HostState>,
        event: &types::Event,
    ) -> Option<wasmtime::Result<Result<filter::Verdict, types::Failure>>> {
        self.filter
            .as_ref()
            .map(|filter| filter.call_evaluate(store, event))
    }

    /// `None` if the plugin is not a router.
    pub(super) fn resolve(
        &self,
        store: &mut Store<HostState>,
        event: &types::Event,
    ) -> Option<wasmtime::Result<Result<Vec<router::Route>, types::Failure>>> {
        self.router
            .as_ref()
            .map(|router| router.call_resolve(store, event))
    }
}

/// The event as presented to a plugin with this selection.
pub(super) fn present(
    event: &Event,
    priority: Priority,
    selection: &Selection,
    document: &Document,
) -> types::Event {
    let attributes = selection
        .pick(event, document)
        .map(|(name, value)| types::Attribute {
            name: name.to_owned(),
            value: value.into(),
        });
    types::Event {
        id: event.id.as_str().to_owned(),
        source: event.source.as_str().to_owned(),
        type_: event.kind.as_str().to_owned(),
        subject: event
            .subject
            .as_ref()
            .map(|subject| subject.as_str().to_owned()),
        time_ms: event.time_ms,
        priority: priority.into(),
        attributes: attributes.collect(),
        data: match &event.data {
            _ if !selection.payload => types::Payload::None,
            Payload::None => types::Payload::None,
            Payload::Json(text) => types::Payload::Json(text.to_string()),
            Payload::Text(text) => types::Payload::Text(text.to_string()),
            Payload::Binary(bytes) => types::Payload::Binary(bytes.to_vec()),
        },
    }
}

/// Converts a filter's verdict on this event; also returns the size of its text in bytes.
///
/// # Errors
/// The part of the answer that is invalid.
pub(super) fn verdict(
    verdict: filter::Verdict,
    event: &Event,
    limits: &Limits,
) -> Result<(Answer, usize), String> {
    match verdict {
        filter::Verdict::Keep => Ok((Answer::Keep, 0)),
        filter::Verdict::Drop(reason) => Ok((Answer::Drop(printable(&reason)), reason.len())),
        filter::Verdict::Amend(filter::Amendment {
            priority,
            attributes,
            options,
        }) => {
            if let Some(problem) = unknown_option(&options, &[]) {
                return Err(format!("its amendment is invalid: {problem}"));
            }
            let mut size = Size::new(limits);
            let mut amended = event.clone();
            for types::Attribute { name, value } in attributes {
                size.count(&name)?;
                if let types::Value::Text(text) = &value {
                    size.count(text)?;
                }
                amended
                    .set_attribute(&name, value.into())
                    .map_err(|e| format!("its amendment is invalid: {e}"))?;
            }
            let priority = priority.map(Priority::from);
            // Later plugins would otherwise judge the word that the priority has replaced.
            if let Some(priority) = priority
                && amended.attribute("priority").is_some()
            {
                amended
                    .set_attribute("priority", Value::Text(priority.to_string()))
                    .map_err(|e| format!("its amendment is invalid: {e}"))?;
            }
            let answer = Answer::Amend(Box::new(Amended {
                event: amended,
                priority,
            }));
            Ok((answer, size.bytes))
        }
    }
}

/// Converts a router's answer; also returns the size of its text in bytes. Routes without a target
/// are omitted; routes without a priority get that of the event.
///
/// # Errors
/// The part of the answer that is invalid.
pub(super) fn plan(
    routes: Vec<router::Route>,
    by: &Name,
    priority: Priority,
    clock_ms: u64,
    limits: &Limits,
) -> Result<(Answer, usize), String> {
    let n_targets = routes
        .iter()
        .map(|route| route.targets.len())
        .sum::<usize>()
        .max(routes.len());
    if n_targets > limits.targets {
        return Err(format!(
            "its answer has {n_targets} targets or routes; the limit is {} (max_targets)",
            limits.targets
        ));
    }
    let mut size = Size::new(limits);
    let mut plan = Plan::default();
    for (at, route) in routes.into_iter().enumerate() {
        let route = convert(route, by, priority, clock_ms, &mut size)
            .map_err(|e| format!("its route {at} is invalid: {e}"))?;
        if !route.to.is_empty() {
            plan.routes.push(route);
        }
    }
    let n_slots = plan.slots().len();
    if n_slots > Plan::MAX_SLOTS {
        return Err(format!(
            "its routes have {n_slots} slots; the limit is {}",
            Plan::MAX_SLOTS
        ));
    }
    Ok((Answer::Routes(plan), size.bytes))
}

fn convert(
    route: router::Route,
    by: &Name,
    of_event: Priority,
    clock_ms: u64,
    size: &mut Size<'_>,
) -> Result<Route, String> {
    let router::Route {
        targets,
        when,
        priority,
        ttl_ms,
        collapse_key,
        event_name,
        body,
        options,
    } = route;
    let mut name = |what: &str, text: String| {
        size.count(&text)?;
        Name::parse(&text).map_err(|e| e.of(what).to_string())
    };
    let to = targets.into_iter().map(|target| match target {
        types::Target::User(user) => name("the user", user).map(Target::User),
        types::Target::Group(group) => name("the group", group).map(Target::Group),
        types::Target::Everyone => Ok(Target::Everyone),
    });
    let to = to.collect::<Result<Vec<_>, _>>()?;
    let collapse = collapse_key
        .map(|key| name("the collapse key", key))
        .transpose()?;
    let event_name = event_name
        .map(|text| name("the event name", text))
        .transpose()?;
    if let Some(reserved) = event_name
        .as_ref()
        .filter(|name| is_reserved_event_name(name.as_str()))
    {
        return Err(format!(
            "the event name '{reserved}' is reserved; reserved names are {}",
            RESERVED_EVENT_NAMES.join(", ")
        ));
    }
    let slot = slot(options)?
        .map(|text| name("the slot", text))
        .transpose()?;
    let body = match body {
        None => None,
        Some(body) => {
            size.count(&body)?;
            Some(json_line(&body).map_err(|e| e.of("the body").to_string())?)
        }
    };
    if ttl_ms == Some(0) {
        return Err(
            "the ttl is 0, so it would never be delivered; leave out the route or the ttl"
                .to_owned(),
        );
    }
    Ok(Route {
        by: by.clone(),
        to,
        when: when
            .map(|criteria| convert_criteria(criteria, size))
            .transpose()?,
        priority: priority.map_or(of_event, Priority::from),
        expires_ms: ttl_ms.map(|ttl| clock_ms.saturating_add(ttl).min(LATEST_MS)),
        collapse,
        event_name,
        body,
        slot,
    })
}

/// Why the options are not all known, if so.
fn unknown_option(options: &[types::Attribute], known: &[&str]) -> Option<String> {
    let unknown = options
        .iter()
        .find(|option| !known.contains(&option.name.as_str()))?;
    let fix = match known {
        [] => "none is known here; remove it".to_owned(),
        known => format!("use {}", known.join(" or ")),
    };
    Some(format!(
        "the option '{}' is unknown to this host; {fix}",
        printable(&unknown.name)
    ))
}

/// The slot that the options of a route name.
///
/// # Errors
/// An option is unknown, repeated or not a text.
fn slot(options: Vec<types::Attribute>) -> Result<Option<String>, String> {
    if let Some(problem) = unknown_option(&options, &["slot"]) {
        return Err(problem);
    }
    let mut options = options.into_iter();
    match (options.next(), options.next()) {
        (None, _) => Ok(None),
        (Some(_), Some(_)) => Err("the option 'slot' is set twice; set it once".to_owned()),
        (Some(option), None) => match option.value {
            types::Value::Text(slot) => Ok(Some(slot)),
            types::Value::Integer(_) | types::Value::Decimal(_) | types::Value::Flag(_) => {
                Err("the option 'slot' is not a text; use a name".to_owned())
            }
        },
    }
}

fn convert_criteria(criteria: types::Criteria, size: &mut Size<'_>) -> Result<Criteria, String> {
    let mut any_of = Vec::with_capacity(criteria.any_of.len().min(Criteria::MAX_TESTS));
    if criteria.any_of.len() > Criteria::MAX_TESTS {
        return Err(format!(
            "the criteria have {} clauses; the limit is {}",
            criteria.any_of.len(),
            Criteria::MAX_TESTS
        ));
    }
    for clause in criteria.any_of {
        let mut all_of = Vec::new();
        for types::Test {
            attribute,
            operator,
            values,
        } in clause
        {
            size.count(&attribute)?;
            for value in &values {
                match value {
                    types::Value::Text(text) => size.count(text)?,
                    types::Value::Decimal(d) if !d.is_finite() => {
                        return Err(format!(
                            "the criteria contain the number {d}, which JSON cannot represent"
                        ));
                    }
                    types::Value::Integer(_) | types::Value::Decimal(_) | types::Value::Flag(_) => {
                        size.count("")?
                    }
                }
            }
            all_of.push(Test {
                attribute,
                operator: operator.into(),
                values: values.into_iter().map(Value::from).collect(),
            });
        }
        any_of.push(all_of);
    }
    Criteria::new(any_of).map_err(|e| e.to_string())
}

/// The reason of a failure, and whether the event may be retried.
pub(super) fn failure(failure: types::Failure) -> (String, bool) {
    match failure {
        types::Failure::Reject(reason) => (printable(&reason), false),
        types::Failure::Retry(reason) => (printable(&reason), true),
    }
}

/// Counts the size of the data that a guest returns.
struct Size<'a> {
    bytes: usize,
    limits: &'a Limits,
}

impl<'a> Size<'a> {
    fn new(limits: &'a Limits) -> Self {
        Self { bytes: 0, limits }
    }

    fn count(&mut self, text: &str) -> Result<(), String> {
        // Each string counts as more than its bytes: otherwise a million empty ones would be free.
        self.bytes = self.bytes.saturating_add(text.len()).saturating_add(8);
        if self.bytes > self.limits.result_bytes {
            return Err(format!(
                "its answer is larger than the limit of {} KiB (result_kib)",
                self.limits.result_bytes / 1024
            ));
        }
        Ok(())
    }
}

impl From<Value> for types::Value {
    fn from(value: Value) -> Self {
        match value {
            Value::Text(text) => Self::Text(text),
            Value::Integer(i) => Self::Integer(i),
            Value::Decimal(d) => Self::Decimal(d),
            Value::Flag(b) => Self::Flag(b),
        }
    }
}

impl From<types::Value> for Value {
    fn from(value: types::Value) -> Self {
        match value {
            types::Value::Text(text) => Self::Text(text),
            types::Value::Integer(i) => Self::Integer(i),
            types::Value::Decimal(d) => Self::Decimal(d),
            types::Value::Flag(b) => Self::Flag(b),
        }
    }
}

impl From<Priority> for types::Priority {
    fn from(priority: Priority) -> Self {
        match priority {
            Priority::Low => Self::Low,
            Priority::Normal => Self::Normal,
            Priority::High => Self::High,
            Priority::Urgent => Self::Urgent,
        }
    }
}

impl From<types::Priority> for Priority {
    fn from(priority: types::Priority) -> Self {
        match priority {
            types::Priority::Low => Self::Low,
            types::Priority::Normal => Self::Normal,
            types::Priority::High => Self::High,
            types::Priority::Urgent => Self::Urgent,
        }
    }
}

impl From<types::Operator> for Operator {
    fn from(operator: types::Operator) -> Self {
        match operator {
            types::Operator::Equals => Self::Equals,
            types::Operator::NotEquals => Self::NotEquals,
            types::Operator::OneOf => Self::OneOf,
            types::Operator::Contains => Self::Contains,
            types::Operator::Prefix => Self::Prefix,
            types::Operator::Less => Self::Less,
            types::Operator::Greater => Self::Greater,
            types::Operator::Present => Self::Present,
            types::Operator::Absent => Self::Absent,
            types::Operator::NotOneOf => Self::NotOneOf,
            types::Operator::NotContains => Self::NotContains,
            types::Operator::AtLeast => Self::AtLeast,
            types::Operator::AtMost => Self::AtMost,
            types::Operator::Suffix => Self::Suffix,
        }
    }
}
