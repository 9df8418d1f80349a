//! A benchmark plugin that makes one small decision: from nothing, from declared attributes or
//! fields, or from the whole payload. Used as a library, it makes the same decision in native code.

use pointsman_plugin::{
    Event, Failure, Interest, Issue, Payload, Plugin, Priority, Route, Router, Value, export,
};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum From {
    /// Returns no route for any event.
    #[default]
    Nothing,
    /// Decides from six attributes.
    Attributes,
    /// Decides from six fields of the payload, extracted by the host.
    Fields,
    /// Decides from the same fields, parsed from the payload by the plugin.
    Payload,
}

#[derive(Default, Debug, serde::Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub from: From,
}

#[derive(Debug)]
pub struct Costs(From);

export!(Costs as router);

/// The inputs of the decision.
pub const ATTRIBUTES: [&str; 6] = ["customer", "region", "tier", "total", "express", "seller"];
pub const FIELDS: [&str; 6] = [
    "/customer/id",
    "/order/region",
    "/customer/tier",
    "/order/total",
    "/order/express",
    "/seller",
];

impl Plugin for Costs {
    type Config = Config;

    fn new(config: Config) -> Result<Self, Issue> {
        Ok(Self(config.from))
    }

    fn interest(&self) -> Interest {
        let all = Interest::in_types(["*"]);
        match self.0 {
            From::Nothing => all,
            From::Attributes => all.attributes(ATTRIBUTES),
            From::Fields => all.fields(FIELDS),
            From::Payload => all.payload(),
        }
    }
}

impl Router for Costs {
    fn resolve(&self, event: &Event) -> Result<Vec<Route>, Failure> {
        let decided = match self.0 {
            From::Nothing => None,
            From::Attributes => declared(event, ATTRIBUTES),
            From::Fields => declared(event, FIELDS),
            From::Payload => whole(event),
        };
        Ok(decided.into_iter().collect())
    }
}

/// Notifies the customer of an order, with a higher priority if it is large or express, unless the
/// customer is the seller.
fn decide(
    customer: &str,
    region: &str,
    tier: &str,
    total: f64,
    is_express: bool,
    seller: &str,
) -> Option<Route> {
    let priority = if is_express || total > 500.0 {
        Priority::High
    } else {
        Priority::Normal
    };
    (customer != seller && region != "none" && tier != "closed")
        .then(|| Route::to_user(customer).priority(priority))
}

fn declared(event: &Event, names: [&str; 6]) -> Option<Route> {
    let [customer, region, tier, total, express, seller] = names;
    let text = |name| event.text(name);
    let total = match event.attribute(total)? {
        Value::Integer(n) => *n as f64,
        Value::Decimal(d) => *d,
        Value::Text(_) | Value::Flag(_) => return None,
    };
    let is_express = matches!(event.attribute(express)?, Value::Flag(true));
    decide(
        text(customer)?,
        text(region)?,
        text(tier)?,
        total,
        is_express,
        text(seller)?,
    )
}

fn whole(event: &Event) -> Option<Route> {
    let Payload::Json(text) = &event.data else {
        return None;
    };
    let data: serde_json::Value = serde_json::from_str(text).ok()?;
    let [customer, region, tier, total, express, seller] =
        FIELDS.map(|pointer| data.pointer(pointer));
    decide(
        customer?.as_str()?,
        region?.as_str()?,
        tier?.as_str()?,
        total?.as_f64()?,
        express?.as_bool()?,
        seller?.as_str()?,
    )
}
