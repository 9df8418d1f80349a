//! Parses the configuration that the host passes, as JSON, and creates the plugin from it. Mistakes
//! become issues with the path of the value concerned.

use crate::{Issue, Plugin};

mod tables;

use tables::Tables;

/// Parses the operator's configuration and creates the plugin.
pub(crate) fn create_plugin<P: Plugin>(config: &str) -> Result<P, Vec<Issue>> {
    let config: serde_json::Value = serde_json::from_str(config)
        .map_err(|e| vec![Issue::new("", without_place(&e.to_string()))])?;
    let config = serde_path_to_error::deserialize(Tables(&config)).map_err(|e| {
        let path = e.path().to_string();
        vec![Issue::new(
            if path == "." { "" } else { &path },
            without_place(&e.inner().to_string()),
        )]
    })?;
    P::new(config).map_err(|issue| vec![issue])
}

/// Cuts off the line and column: the host generates the JSON from its own configuration file, so
/// they would not match the text that the operator wrote.
fn without_place(message: &str) -> &str {
    message
        .rsplit_once(" at line ")
        .map_or(message, |(message, _)| message)
}
