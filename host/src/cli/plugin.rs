//! `pointsman plugin`: commands for plugin authors, from an empty folder to a file that a node
//! loads, and for operators, who manage the plugins of a running node.
//!
//! The local commands load and run a plugin with the library's engine and limits, as a node does.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use pointsman::event::Name;
use pointsman::plugin::registry::settings::{self, Config};
use pointsman::plugin::runtime::cache::Cache;
use pointsman::plugin::{CompileIn, Engine, EngineOptions, Limits, Plugin, name_of_file};
use pointsman::telemetry::metrics::Metrics;
use serde::Deserialize;

use self::remote::AdminCommand;

mod bench;
mod build;
mod compile;
mod inspect;
mod language;
mod new;
mod profile;
mod remote;
mod rollout;
mod sample;
mod test;
pub(super) mod toolchain;

/// Environment variable that sets the folder of compiled plugins, as for a node.
const CACHE_VARIABLE: &str = "POINTSMAN_PLUGINS_CACHE";

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Create a plugin project
    New(new::Options),
    /// Build a plugin project
    Build(build::Options),
    /// Run a plugin on sample events and compare its decisions with the expected ones
    Test(test::Options),
    /// Show a plugin file's kind, imports, manifest and limits, and why it would not load
    Inspect(inspect::Options),
    /// Measure the cost of a plugin call, compared with a no-op plugin
    Bench(bench::Options),
    /// Sample where a plugin spends its time, for the Firefox profiler
    Profile(profile::Options),
    /// Compile the plugins of a folder into the cache of a node, when its image is built
    Compile(compile::Options),
    /// List the plugins of a running node
    List(remote::List),
    /// Upload a plugin, or a new version of one, to a running node
    Upload(remote::Upload),
    /// Enable a disabled plugin
    Enable(remote::Named),
    /// Disable a plugin without removing it
    Disable(remote::Named),
    /// Remove a plugin and its file
    Remove(remote::Named),
    /// Roll a version out over all nodes, for a share of the partitions or all of them
    Rollout(rollout::Rollout),
    /// End the roll-out of a plugin on all nodes; without one, roll the plugin back to its previous
    /// version on this node
    Rollback(remote::Named),
    /// Run a candidate in shadow on live events, or report how its decisions differ
    Shadow(remote::Shadow),
    /// Replace a plugin with its candidate
    Promote(remote::Promote),
    /// Run a candidate on past events and report how its decisions differ
    Backtest(remote::Backtest),
}

pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    match &options.command {
        Command::New(options) => new::run(options),
        Command::Build(options) => build::run(options),
        Command::Test(options) => test::run(options),
        Command::Inspect(options) => inspect::run(options),
        Command::Bench(options) => bench::run(options),
        Command::Profile(options) => profile::run(options),
        Command::Compile(options) => compile::run(options),
        Command::List(options) => remote::list(options),
        Command::Upload(options) => remote::upload(options),
        Command::Enable(options) => remote::execute(options, AdminCommand::Enable),
        Command::Disable(options) => remote::execute(options, AdminCommand::Disable),
        Command::Remove(options) => remote::execute(options, AdminCommand::Remove),
        Command::Rollout(options) => rollout::run(options),
        Command::Rollback(options) => rollout::roll_back(options),
        Command::Shadow(options) => remote::shadow(options),
        Command::Promote(options) => remote::promote(options),
        Command::Backtest(options) => remote::backtest(options),
    }
}

/// A plugin and the settings to run it with.
#[derive(Debug, clap::Args)]
struct Subject {
    /// Plugin file, or folder of a plugin project, which is built first
    #[arg(value_name = "FILE.wasm or DIR", default_value = ".")]
    plugin: PathBuf,
    /// Plugin configuration, a JSON file [default: the project's config.json]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Read limits, and the configuration unless --config is given, from [plugins.NAME] in this
    /// pointsman.toml
    #[arg(long, value_name = "FILE")]
    settings: Option<PathBuf>,
    /// Plugin name in --settings [default: derived from the file name]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    #[command(flatten)]
    profile: toolchain::Profile,
}

/// A plugin file with its configuration and limits, read from disk.
struct Loaded {
    file: PathBuf,
    /// The folder of the crate, if one was given.
    folder: Option<PathBuf>,
    name: Name,
    bytes: Vec<u8>,
    /// A JSON object.
    config: String,
    limits: Limits,
    /// The section `[plugins]`.
    plugins: Config,
}

impl Subject {
    fn load(&self) -> anyhow::Result<Loaded> {
        let (file, folder) = if self.plugin.is_dir() {
            let made = language::build(&self.plugin, &self.profile)?;
            let [file] = made.as_slice() else {
                bail!(
                    "{} builds {} plugins; pass the file of one of them",
                    self.plugin.display(),
                    made.len()
                )
            };
            (file.clone(), Some(self.plugin.clone()))
        } else {
            (self.plugin.clone(), None)
        };
        let name = self.name.clone().unwrap_or_else(|| {
            name_of_file(&file.file_name().unwrap_or_default().to_string_lossy())
        });
        let mut plugins = match &self.settings {
            Some(path) => plugins(path)?,
            None => Config::default(),
        };
        let settings = plugins.plugins.remove(&name).unwrap_or_default();
        let limits = settings.limits();
        let bytes = read(&file, limits.file_bytes)?;
        let config = match self.config.clone().or_else(|| {
            beside(folder.as_deref(), "config.json").filter(|_| settings.config.is_empty())
        }) {
            Some(path) => config(&path)?,
            None => serde_json::to_string(&settings.config)?,
        };
        let name = Name::parse(&name).map_err(|e| e.of("the plugin's name"))?;
        Ok(Loaded {
            file,
            folder,
            name,
            bytes,
            config,
            limits,
            plugins,
        })
    }
}

impl Loaded {
    /// An engine with the author's cache of compiled plugins.
    fn engine(&self) -> anyhow::Result<Engine> {
        let folder = std::env::var_os(CACHE_VARIABLE).map(PathBuf::from);
        let folder = folder.or_else(|| self.plugins.cache.clone());
        let folder = folder.or_else(settings::user_cache_folder);
        let folder = folder.filter(|folder| !folder.as_os_str().is_empty());
        engine(
            folder.and_then(|folder| Cache::open(&folder, Metrics::default()).ok()),
            &self.plugins,
        )
    }

    /// Loads the plugin, with every check that a node makes.
    fn plugin(&self, engine: &Engine) -> anyhow::Result<Plugin> {
        let loaded = Plugin::load(
            engine,
            self.name.clone(),
            &self.bytes,
            &self.config,
            self.limits.clone(),
        );
        loaded.with_context(|| self.file.display().to_string())
    }

    /// The path of this file in the crate, if it exists.
    fn beside(&self, name: &str) -> Option<PathBuf> {
        beside(self.folder.as_deref(), name)
    }
}

fn beside(folder: Option<&Path>, name: &str) -> Option<PathBuf> {
    folder
        .map(|folder| folder.join(name))
        .filter(|path| path.is_file())
}

/// Reads a file, but at most `max` + 1 bytes: enough to show that it is too large.
fn read(file: &Path, max: usize) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let opened = File::open(file).with_context(|| format!("cannot read {}", file.display()))?;
    opened
        .take(max as u64 + 1)
        .read_to_end(&mut bytes)
        .with_context(|| format!("cannot read {}", file.display()))?;
    Ok(bytes)
}

/// An engine that compiles in processes of its own, as a node does.
fn engine(cache: Option<Cache>, plugins: &Config) -> anyhow::Result<Engine> {
    Engine::with(EngineOptions {
        cache,
        compile_in: CompileIn::ChildProcess,
        budget: plugins.compile_budget(),
        ..EngineOptions::default()
    })
}

/// The section `[plugins]` of a pointsman.toml; the defaults if there is none.
fn plugins(path: &Path) -> anyhow::Result<Config> {
    /// Other sections are ignored; they concern a node.
    #[derive(Deserialize)]
    struct PluginSections {
        #[serde(default)]
        plugins: Config,
    }
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let PluginSections { plugins } =
        toml::from_str(&text).with_context(|| path.display().to_string())?;
    Ok(plugins)
}

/// Reads a plugin configuration, in the form that the host passes to the plugin.
fn config(path: &Path) -> anyhow::Result<String> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let config: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text)
        .with_context(|| format!("{} is not a JSON object", path.display()))?;
    Ok(serde_json::to_string(&config)?)
}
