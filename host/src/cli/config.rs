//! `pointsman check-config` and `pointsman config --defaults`.

use anyhow::ensure;
use pointsman::config::{BrokerChoice, Config, DEFAULTS};
use pointsman::plugin::Engine;
use pointsman::plugin::registry::Registry;
use pointsman::plugin::runtime::cache::Cache;
use pointsman::telemetry::metrics::Metrics;

use super::serve;

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Every key with its default, as a pointsman.toml
    #[arg(long, required = true)]
    defaults: bool,
}

pub(super) fn print(options: &Options) -> anyhow::Result<()> {
    if options.defaults {
        print!("{DEFAULTS}");
    }
    Ok(())
}

/// All that a node would find at its start, but for what only Redis could tell.
pub(super) fn check(options: &serve::Options) -> anyhow::Result<()> {
    let config = options.load()?;
    pointsman::check_folders(&config)?;
    let engine = Engine::with_cache(cache(&config))?;
    let plugins = Registry::load(engine, config.plugins.clone(), Metrics::default())?.states();
    for plugin in plugins.iter().filter(|plugin| plugin.failure.is_none()) {
        println!(
            "plugin {}: {} {} of {}",
            plugin.name, plugin.kind, plugin.version, plugin.file
        );
    }
    let failures: Vec<String> = plugins
        .iter()
        .filter_map(|plugin| {
            Some(format!(
                "plugin {}: {}",
                plugin.name,
                plugin.failure.as_ref()?
            ))
        })
        .collect();
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    if plugins.is_empty() && !config.node.allow_no_plugins {
        println!(
            "warning: no plugin is there, so events would wait; put one into the folder of --plugins, or give --allow-no-plugins"
        );
    }
    for (key, fix) in config.auth.placeholders() {
        println!("warning: {key} {fix}");
    }
    let broker = match &config.broker {
        // The URL may hold a password.
        BrokerChoice::Redis { .. } => "a Redis".to_owned(),
        BrokerChoice::Data(folder) => format!("the embedded one in {}", folder.display()),
        BrokerChoice::Ephemeral => "the embedded one in memory".to_owned(),
    };
    println!(
        "well: listens on {} and {}, broker is {broker}, sources are {}",
        config.listen.address,
        config.listen.admin,
        config.sources.join(", ")
    );
    Ok(())
}

/// The compiled plugins that a node would take, and add to, if there are any yet. The folder itself is made by a node that runs: who only asks
/// leaves nothing behind.
fn cache(config: &Config) -> Option<Cache> {
    let folder = config.plugin_cache().filter(|folder| folder.exists())?;
    let opened = Cache::open(&folder, Metrics::default());
    opened
        .inspect_err(|reason| {
            println!(
                "warning: a node would compile its plugins at each start: the folder for compiled ones, {}, {reason}",
                folder.display()
            )
        })
        .ok()
}
