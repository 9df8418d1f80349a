//! Notifies customers about their parcels: a filter and a router. `../README.md` describes its
//! decisions.

use pointsman_plugin::{
    Amendment, Attribute, Event, Failure, Filter, Interest, Issue, Operator, Plugin, Priority,
    Route, Router, Target, Test, Value, Verdict, export, log,
};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::json;

const HOUR_MS: u64 = 3_600_000;

/// The configuration.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Config {
    /// The fee from which on a held parcel is urgent.
    urgent_fee: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self { urgent_fee: 100.0 }
    }
}

struct Parcels(Config);

export!(Parcels as filter and router);

impl Plugin for Parcels {
    type Config = Config;

    fn new(config: Config) -> Result<Self, Issue> {
        if config.urgent_fee < 0.0 {
            return Err(Issue::new("urgent_fee", "use a number of 0 or more"));
        }
        Ok(Self(config))
    }

    fn interest(&self) -> Interest {
        Interest::in_types(["parcel.*"])
            .attributes(["customer", "depot", "late", "test"])
            .fields(["/fee", "/heavier_than", "/hours_late", "/number"])
            .payload()
    }
}

impl Filter for Parcels {
    fn evaluate(&self, event: &Event) -> Result<Verdict, Failure> {
        if matches!(event.attribute("test"), Some(Value::Flag(true)))
            || event.text("test") == Some("true")
        {
            return Ok(Verdict::Drop("test event".into()));
        }
        if event.age_ms() > 7 * 24 * HOUR_MS {
            return Ok(Verdict::Drop("older than 7 days".into()));
        }
        if number(event, "/hours_late").is_some_and(|hours| hours >= 24.0) {
            let is_urgent_enough = matches!(event.priority, Priority::High | Priority::Urgent);
            let late = Attribute {
                name: "late".into(),
                value: Value::Flag(true),
            };
            return Ok(Verdict::Amend(Amendment {
                priority: (!is_urgent_enough).then_some(Priority::High),
                attributes: vec![late],
                ..Amendment::default()
            }));
        }
        Ok(Verdict::Keep)
    }
}

impl Router for Parcels {
    fn resolve(&self, event: &Event) -> Result<Vec<Route>, Failure> {
        match event.kind.as_str() {
            "parcel.moved" => Ok(vec![moved(event)?]),
            "parcel.delivered" => Ok(vec![delivered(event)?]),
            "parcel.held" => self.held(event),
            "parcel.recalled" => Ok(vec![recalled(event)?]),
            _ => Ok(Vec::new()),
        }
    }
}

fn moved(event: &Event) -> Result<Route, Failure> {
    let (customer, parcel) = (customer(event)?, parcel(event)?);
    let (place, stops) = last_place(event)?;
    let route = Route::to([customer])
        .ttl_ms(6 * HOUR_MS)
        .collapse_key(format!("parcel-{parcel}"))
        .event_name("parcel")
        .body(&json!({ "number": parcel, "place": place, "stops": stops }));
    let is_late = matches!(event.attribute("late"), Some(Value::Flag(true)));
    Ok(if is_late {
        route
    } else {
        route.priority(Priority::Low)
    })
}

fn delivered(event: &Event) -> Result<Route, Failure> {
    let (customer, parcel) = (customer(event)?, parcel(event)?);
    let depot = event
        .text("depot")
        .filter(|depot| !depot.is_empty())
        .map(|depot| Target::Group(format!("depot-{depot}")));
    let targets: Vec<Target> = [customer].into_iter().chain(depot).collect();
    Ok(Route::to(targets)
        .collapse_key(format!("parcel-{parcel}"))
        .event_name("parcel"))
}

impl Parcels {
    fn held(&self, event: &Event) -> Result<Vec<Route>, Failure> {
        let customer = customer(event)?;
        let fee = number(event, "/fee")
            .ok_or_else(|| Failure::Retry("the fee is not known yet".into()))?;
        let priority = if fee >= self.0.urgent_fee {
            Priority::Urgent
        } else {
            Priority::High
        };
        let by_day = [Test::new("shift", Operator::Equals, ["day".into()])];
        let in_charge = [
            Test::new("role", Operator::OneOf, ["lead".into(), "stand-in".into()]),
            Test::new("open", Operator::Less, [50.into()]),
        ];
        Ok(vec![
            Route::to([customer])
                .priority(priority)
                .event_name("parcel"),
            Route::to_group("customs")
                .when(by_day)
                .when(in_charge)
                .ttl_ms(12 * HOUR_MS)
                .slot("customs"),
        ])
    }
}

fn recalled(event: &Event) -> Result<Route, Failure> {
    let parcel = parcel(event)?;
    log::warn("a recall goes to everyone");
    let concerned = match event.attribute("/heavier_than") {
        Some(weight @ (Value::Integer(_) | Value::Decimal(_))) => {
            Test::new("weight", Operator::Greater, [weight.clone()])
        }
        _ => Test::new("parcels", Operator::Greater, [0.into()]),
    };
    Ok(Route::to_everyone()
        .when([Test::new("staff", Operator::Present, [])])
        .when([concerned])
        .priority(Priority::Urgent)
        .ttl_ms(24 * HOUR_MS)
        .collapse_key(format!("recall-{parcel}"))
        .event_name("recall"))
}

fn customer(event: &Event) -> Result<Target, Failure> {
    let refused = "the event has no customer; set the attribute customer to a text or an integer";
    name(event, "customer")
        .map(Target::User)
        .ok_or_else(|| Failure::Reject(refused.into()))
}

fn parcel(event: &Event) -> Result<String, Failure> {
    name(event, "/number").ok_or_else(|| {
        Failure::Reject(
            "the payload has no parcel number; set /number to a text or an integer".into(),
        )
    })
}

/// Returns the location of the parcel and its number of stops. A JSON pointer cannot select the
/// last element of a list, so the payload is parsed here.
fn last_place(event: &Event) -> Result<(String, usize), Failure> {
    let payload: Option<serde_json::Value> = event.json().ok();
    let place = payload.as_ref().and_then(|payload| {
        let steps = payload["steps"].as_array()?;
        let place = steps.last()?["place"]
            .as_str()
            .filter(|place| !place.is_empty())?;
        Some((place.to_owned(), steps.len()))
    });
    place.ok_or_else(|| {
        Failure::Reject("the payload has no place; set place in the last element of /steps".into())
    })
}

/// Returns a non-empty text, or an integer as text.
fn name(event: &Event, attribute: &str) -> Option<String> {
    match event.attribute(attribute)? {
        Value::Text(text) => (!text.is_empty()).then(|| text.clone()),
        Value::Integer(number) => Some(number.to_string()),
        Value::Decimal(_) | Value::Flag(_) => None,
    }
}

fn number(event: &Event, field: &str) -> Option<f64> {
    match event.attribute(field)? {
        Value::Integer(number) => Some(*number as f64),
        Value::Decimal(number) => Some(*number),
        Value::Text(_) | Value::Flag(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use pointsman_plugin::testing;

    use super::*;

    #[test]
    fn a_moved_parcel_reports_its_location_and_supersedes_earlier_reports() {
        let plugin: Parcels = testing::configure(json!({})).unwrap();
        let payload = json!({"number": 9_007_199_254_740_993_i64, "steps": [{"place": "Graz"}, {"place": "Łódź"}]});
        let event = testing::event("parcel.moved")
            .attribute("customer", "42")
            .json(&payload);
        let routes = plugin.resolve(&event.seen_by(&plugin).unwrap()).unwrap();
        let expected = Route::to_user("42")
            .priority(Priority::Low)
            .ttl_ms(6 * HOUR_MS)
            .collapse_key("parcel-9007199254740993")
            .event_name("parcel")
            .body(&json!({"number": "9007199254740993", "place": "Łódź", "stops": 2}));
        assert_eq!(routes, [expected]);
    }
}
