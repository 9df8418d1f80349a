//! `pointsman check-config` and `pointsman config --defaults`.

use anyhow::ensure;
use pointsman::config::{BrokerChoice, Config, DEFAULTS};
use pointsman::plugin::registry::Registry;
use pointsman::plugin::registry::settings::OnMissing;
use pointsman::plugin::registry::state::{PluginState, PluginStatus};
use pointsman::plugin::runtime::cache::Cache;
use pointsman::plugin::{Engine, EngineOptions};
use pointsman::telemetry::metrics::Metrics;

use super::{printable, serve};

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Print every key with its default, in the format of pointsman.toml
    #[arg(long, required = true)]
    defaults: bool,
}

pub(super) fn print(options: &Options) -> anyhow::Result<()> {
    if options.defaults {
        print!("{DEFAULTS}");
    }
    Ok(())
}

/// Runs the checks that a node makes at start, except those that need a connection to Redis.
pub(super) fn check(options: &serve::Options) -> anyhow::Result<()> {
    let config = options.load()?;
    pointsman::check_folders(&config)?;
    let engine = Engine::with(EngineOptions {
        cache: cache(&config),
        compile_in: config.compile_in,
        ..EngineOptions::default()
    })?;
    let plugins = Registry::load(engine, config.plugins.clone(), Metrics::default())?.states();
    for plugin in plugins.iter().filter(|plugin| plugin.failure.is_none()) {
        println!(
            "plugin {}: {} {} of {}",
            printable(&plugin.name),
            plugin.kind.as_str(),
            printable(&plugin.version),
            printable(&plugin.file)
        );
    }
    let failures = plugins.iter().filter_map(|plugin| {
        let line = format!("plugin {}: {}", plugin.name, plugin.failure.as_ref()?);
        Some((is_optional(plugin), line))
    });
    let (optional, failures): (Vec<_>, Vec<_>) =
        failures.partition(|(is_optional, _)| *is_optional);
    for (_, warning) in &optional {
        println!("warning: {}", printable(warning));
    }
    let failures: Vec<String> = failures.into_iter().map(|(_, line)| line).collect();
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    if plugins.is_empty() && !config.node.allow_no_plugins {
        println!(
            "warning: no plugins found, so events would wait; add one to the plugin folder (--plugins), or pass --allow-no-plugins"
        );
    }
    for (key, fix) in config.auth.placeholders() {
        println!("warning: {key} {fix}");
    }
    let broker = match &config.broker {
        // The URL may hold a password.
        BrokerChoice::Redis { prefix, .. } => format!("Redis with prefix {prefix}"),
        BrokerChoice::Data(folder) => format!("embedded in {}", folder.display()),
        BrokerChoice::Ephemeral => "embedded in memory".to_owned(),
    };
    println!(
        "ok: listens on {} and {}; broker: {broker}; sources: {}",
        config.listen.address,
        config.listen.admin,
        config.sources.join(", ")
    );
    Ok(())
}

/// Whether a node decides events without this plugin and is ready.
fn is_optional(plugin: &PluginState) -> bool {
    let is_missing = matches!(plugin.state, PluginStatus::Missing | PluginStatus::Failed);
    plugin.state == PluginStatus::Ignored
        || (is_missing && !plugin.events_wait && plugin.settings.on_missing == OnMissing::Skip)
        || (plugin.state == PluginStatus::Missing && !plugin.events_wait)
}

/// Opens the node's cache of compiled plugins, if its folder exists. The folder is not created
/// here: checking a configuration leaves no files behind.
fn cache(config: &Config) -> Option<Cache> {
    let folder = config.plugin_cache().filter(|folder| folder.exists())?;
    let opened = Cache::open(&folder, Metrics::default());
    opened
        .inspect_err(|reason| {
            println!(
                "warning: a node would compile its plugins at each start: the plugin cache {} {reason}",
                folder.display()
            )
        })
        .ok()
}
