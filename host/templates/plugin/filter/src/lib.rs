//! Drops orders of the test system, and gives large ones a higher priority.

use pointsman_plugin::{
    Amendment, Attribute, Event, Failure, Filter, Interest, Issue, Plugin, Priority, Value, Verdict, export,
};
use schemars::JsonSchema;
use serde::Deserialize;

/// What an operator may configure. The schema of it is part of the plugin.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Config {
    /// From this total on, an order is large.
    large: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self { large: 1000.0 }
    }
}

struct MyPlugin(Config);

export!(MyPlugin as filter);

impl Plugin for MyPlugin {
    type Config = Config;

    fn new(config: Config) -> Result<Self, Issue> {
        if config.large <= 0.0 {
            return Err(Issue::new("large", "give a number above 0"));
        }
        Ok(Self(config))
    }

    // What is not asked for here is not there in `evaluate`.
    fn interest(&self) -> Interest {
        Interest::in_types(["order.*"]).attributes(["test"]).fields(["/order/total"])
    }
}

impl Filter for MyPlugin {
    fn evaluate(&self, event: &Event) -> Result<Verdict, Failure> {
        // By XADD, every attribute is text.
        let is_test = match event.attribute("test") {
            Some(Value::Flag(is_test)) => *is_test,
            Some(Value::Text(text)) => text == "true",
            _ => false,
        };
        if is_test {
            return Ok(Verdict::Drop("an order of the test system".into()));
        }
        let total = match event.attribute("/order/total") {
            Some(Value::Integer(total)) => *total as f64,
            Some(Value::Decimal(total)) => *total,
            _ => return Ok(Verdict::Keep),
        };
        if total < self.0.large {
            return Ok(Verdict::Keep);
        }
        // Later plugins see the attribute.
        let desk = Attribute { name: "desk".into(), value: "large".into() };
        Ok(Verdict::Amend(Amendment { priority: Some(Priority::High), attributes: vec![desk] }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pointsman_plugin::testing;
    use serde_json::json;

    #[test]
    fn a_large_order_is_of_high_priority() {
        let plugin: MyPlugin = testing::configure(json!({ "large": 500 })).unwrap();
        let verdict_on = |total: f64| {
            let event = testing::event("order.paid").json(&json!({ "order": { "total": total } }));
            plugin.evaluate(&event.seen_by(&plugin).unwrap()).unwrap()
        };
        assert_eq!(verdict_on(499.5), Verdict::Keep);
        assert!(matches!(
            verdict_on(500.0),
            Verdict::Amend(Amendment { priority: Some(Priority::High), .. })
        ));
    }

    #[test]
    fn what_is_no_order_is_not_its_business() {
        let plugin: MyPlugin = testing::configure(json!({})).unwrap();
        assert_eq!(testing::event("invoice.sent").seen_by(&plugin), None);
    }

    #[test]
    fn a_mistake_in_the_configuration_is_told_with_its_place() {
        let Err(issues) = testing::configure::<MyPlugin>(json!({ "large": -1 })) else {
            panic!("a negative total was taken");
        };
        assert_eq!(issues[0].path, "large");
    }
}
