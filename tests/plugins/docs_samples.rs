//! The documentation matches the programs: its samples load, and it describes every configuration
//! key.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::sync::OnceLock;

use pointsman::plugin::registry::Registry;
use pointsman::plugin::registry::settings::Config;
use pointsman::telemetry::metrics::Metrics;
use serde_json::Value;

use super::decisions::{CONDITIONS, OPERATORS};
use crate::harness::{engine, every_bundled_plugin, repository};

/// Loads the bundled plugins with the `[plugins]` section of this text.
///
/// # Panics
/// If a plugin rejects its configuration, or the section is missing or invalid.
fn load(toml: &str) -> Registry {
    let text: toml::Table = toml.parse().unwrap_or_else(|e| panic!("{e}\n{toml}"));
    let section = text
        .get("plugins")
        .unwrap_or_else(|| panic!("no plugins in:\n{toml}"));
    let mut config: Config = section
        .clone()
        .try_into()
        .unwrap_or_else(|e| panic!("{e}\n{toml}"));
    config.dir = Some(every_bundled_plugin());
    let registry =
        Registry::load(engine(), config, Metrics::default()).expect("load the plugin folder");
    let failures: Vec<_> = registry
        .states()
        .into_iter()
        .filter_map(|state| state.failure)
        .collect();
    assert!(failures.is_empty(), "{failures:?} of\n{toml}");
    registry
}

/// Returns the section of docs/plugins.md with this heading.
fn chapter(heading: &str) -> String {
    let page =
        fs::read_to_string(repository().join("docs/plugins.md")).expect("read docs/plugins.md");
    let chapter = page
        .split(&format!("\n## {heading}\n"))
        .nth(1)
        .unwrap_or_else(|| panic!("no section '{heading}'"));
    chapter.split("\n## ").next().unwrap_or_default().to_owned()
}

/// Loads all plugins with all samples of their section as one configuration. Loaded once for all
/// tests, because compiling plugins takes seconds in a development build.
fn by_the_samples() -> &'static Registry {
    static LOADED: OnceLock<Registry> = OnceLock::new();
    LOADED.get_or_init(|| {
        let chapter = chapter("The bundled plugins");
        let samples: Vec<&str> = chapter
            .split("```toml\n")
            .skip(1)
            .filter_map(|rest| rest.split("```").next())
            .collect();
        for name in ["address", "discard", "prioritize", "rules"] {
            assert!(
                samples
                    .iter()
                    .any(|sample| sample.contains(&format!("[plugins.{name}"))),
                "no sample for {name}"
            );
        }
        load(&samples.concat())
    })
}

#[test]
fn the_samples_of_the_bundled_plugins_load() {
    let chain = by_the_samples().chain();
    assert_eq!((chain.filters.len(), chain.routers.len()), (2, 2));
}

#[test]
fn the_annotated_configuration_and_its_plugins_pass_check_config() {
    let file = repository().join("examples/pointsman.toml");
    let mut command = Command::new(env!("CARGO_BIN_EXE_pointsman"));
    let output = command
        .args(["check-config", "--config"])
        .arg(&file)
        .arg("--plugins")
        .arg(every_bundled_plugin())
        .output();
    let output = output.expect("run pointsman");
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(said.matches("plugin ").count(), 4, "{output:?}");
    // The check warns about secrets that were copied from the example.
    for secret in ["auth.jwt_secret", "auth.api_key"] {
        assert!(
            said.contains(&format!("warning: {secret} is still the example value")),
            "{said}"
        );
    }
}

#[test]
fn every_configuration_key_is_documented_and_in_the_second_implementation() {
    let chain = by_the_samples().chain();
    let rules = chain
        .routers
        .iter()
        .find(|router| router.plugin.name().as_str() == "rules")
        .expect("rules is active");
    let schema: Value = serde_json::from_str(
        rules
            .plugin
            .manifest()
            .config_schema
            .as_deref()
            .expect("a schema"),
    )
    .expect("a JSON schema");
    let keys = |name: &str| -> BTreeSet<String> {
        let properties = schema["$defs"][name]["properties"]
            .as_object()
            .unwrap_or_else(|| panic!("no {name} in {schema:#}"));
        properties.keys().cloned().collect()
    };
    let chapter = chapter("The bundled plugins");
    for key in ["Rule", "To", "Condition", "Operators", "RecipientOperators"]
        .into_iter()
        .flat_map(keys)
    {
        assert!(
            chapter.contains(&format!("`{key}`")) || chapter.contains(&format!("`{key} = true`")),
            "docs/plugins.md does not document `{key}`"
        );
    }
    assert_eq!(keys("Operators"), OPERATORS.map(str::to_owned).into());
    // The second implementation tests the operators on attributes and fields, so these two keys
    // have no entry of their own.
    let conditions = keys("Condition")
        .into_iter()
        .filter(|key| !["attributes", "payload"].contains(&key.as_str()));
    assert_eq!(
        conditions.collect::<BTreeSet<_>>(),
        CONDITIONS.map(str::to_owned).into()
    );
}
