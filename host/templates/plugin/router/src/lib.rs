//! Routes order events to the order's owner and to the group of its region.

use pointsman_plugin::{Event, Failure, Interest, Issue, Plugin, Route, Router, export};
use schemars::JsonSchema;
use serde::Deserialize;

/// The plugin's configuration. Its schema is embedded in the plugin.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Config {
    /// The event attribute that names the owner of the order.
    owner: String,
}

impl Default for Config {
    fn default() -> Self {
        Self { owner: "owner".into() }
    }
}

struct MyPlugin(Config);

export!(MyPlugin as router);

impl Plugin for MyPlugin {
    type Config = Config;

    fn new(config: Config) -> Result<Self, Issue> {
        if config.owner.is_empty() {
            return Err(Issue::new("owner", "name an attribute, such as customer"));
        }
        Ok(Self(config))
    }

    // Only what is listed here is available in `resolve`.
    fn interest(&self) -> Interest {
        Interest::in_types(["order.*"])
            .attributes([self.0.owner.as_str()])
            .fields(["/order/region"])
    }
}

impl Router for MyPlugin {
    fn resolve(&self, event: &Event) -> Result<Vec<Route>, Failure> {
        let owner = event.text(&self.0.owner).map(Route::to_user);
        let region = event.text("/order/region");
        let region = region.map(|region| Route::to_group(format!("region-{region}")));
        Ok(owner.into_iter().chain(region).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pointsman_plugin::testing;
    use serde_json::json;

    #[test]
    fn an_order_is_routed_to_its_owner_and_its_region() {
        let plugin: MyPlugin = testing::configure(json!({ "owner": "customer" })).unwrap();
        let event = testing::event("order.shipped")
            .attribute("customer", "42")
            .json(&json!({ "order": { "region": "eu" } }));
        let routes = plugin.resolve(&event.seen_by(&plugin).unwrap()).unwrap();
        assert_eq!(routes, [Route::to_user("42"), Route::to_group("region-eu")]);
    }

    #[test]
    fn other_event_types_are_not_passed_to_the_plugin() {
        let plugin: MyPlugin = testing::configure(json!({})).unwrap();
        assert_eq!(testing::event("invoice.sent").seen_by(&plugin), None);
    }

    #[test]
    fn a_configuration_error_names_the_field() {
        let Err(issues) = testing::configure::<MyPlugin>(json!({ "owner": "" })) else {
            panic!("an empty name was accepted");
        };
        assert_eq!(issues[0].path, "owner");
    }
}
