//! Drops orders from the test system and raises the priority of large orders.

use pointsman_plugin::{
    Amendment, Attribute, Event, Failure, Filter, Interest, Issue, Plugin, Priority, Value, Verdict, export,
};
use schemars::JsonSchema;
use serde::Deserialize;

/// The plugin's configuration. Its schema is embedded in the plugin.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Config {
    /// Minimum total of a large order.
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

    // Only what is listed here is available in `evaluate`.
    fn interest(&self) -> Interest {
        Interest::in_types(["order.*"]).attributes(["test"]).fields(["/order/total"])
    }
}

impl Filter for MyPlugin {
    fn evaluate(&self, event: &Event) -> Result<Verdict, Failure> {
        // Attributes of events added with XADD are always text.
        let is_test = match event.attribute("test") {
            Some(Value::Flag(is_test)) => *is_test,
            Some(Value::Text(text)) => text == "true",
            _ => false,
        };
        if is_test {
            return Ok(Verdict::Drop("order from the test system".into()));
        }
        let total = match event.attribute("/order/total") {
            Some(Value::Integer(total)) => *total as f64,
            Some(Value::Decimal(total)) => *total,
            _ => return Ok(Verdict::Keep),
        };
        if total < self.0.large {
            return Ok(Verdict::Keep);
        }
        // Plugins called after this one see the attribute.
        let desk = Attribute { name: "desk".into(), value: "large".into() };
        Ok(Verdict::Amend(Amendment {
            priority: Some(Priority::High),
            attributes: vec![desk],
            ..Amendment::default()
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pointsman_plugin::testing;
    use serde_json::json;

    #[test]
    fn a_large_order_gets_high_priority() {
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
    fn other_event_types_are_not_passed_to_the_plugin() {
        let plugin: MyPlugin = testing::configure(json!({})).unwrap();
        assert_eq!(testing::event("invoice.sent").seen_by(&plugin), None);
    }

    #[test]
    fn a_configuration_error_names_the_field() {
        let Err(issues) = testing::configure::<MyPlugin>(json!({ "large": -1 })) else {
            panic!("a negative total was accepted");
        };
        assert_eq!(issues[0].path, "large");
    }
}
