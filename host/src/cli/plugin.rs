//! `pointsman plugin`: for those who write plugins, from an empty folder to a file that a node takes.
//!
//! What these commands say of a plugin, the library knows: they run it by the engine of a node, within the limits of a node.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use pointsman::event::Name;
use pointsman::plugin::registry::settings::{Config, Settings};
use pointsman::plugin::{Engine, Limits, Plugin, called};
use serde::Deserialize;

use self::remote::Order;

mod bench;
mod build;
mod inspect;
mod new;
mod remote;
mod sample;
mod test;
pub(super) mod toolchain;

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Make a project that compiles as it is
    New(new::Options),
    /// Build a plugin in Rust, and say what came of it
    Build(build::Options),
    /// Ask a plugin about events as a node would, and compare with what it should decide
    Test(test::Options),
    /// Say what a file is, what it wants, what it says of itself, and why it would not run
    Inspect(inspect::Options),
    /// Measure what a plugin costs, beside one that does nothing
    Bench(bench::Options),
    /// List the plugins of a running node
    List(remote::List),
    /// Give a running node a plugin, or a new version of one
    Upload(remote::Upload),
    /// Put a plugin back to work
    Enable(remote::Named),
    /// Take a plugin from work
    Disable(remote::Named),
    /// Remove a plugin and its file
    Remove(remote::Named),
    /// Go back to the version before
    Rollback(remote::Named),
    /// Run a candidate beside a plugin, without effect, and say what it would decide otherwise
    Shadow(remote::Shadow),
    /// Make the candidate the plugin
    Promote(remote::Named),
    /// Ask a candidate about past events, and say what it would have decided otherwise
    Replay(remote::Replay),
}

pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    match &options.command {
        Command::New(options) => new::run(options),
        Command::Build(options) => build::run(options),
        Command::Test(options) => test::run(options),
        Command::Inspect(options) => inspect::run(options),
        Command::Bench(options) => bench::run(options),
        Command::List(options) => remote::list(options),
        Command::Upload(options) => remote::upload(options),
        Command::Enable(options) => remote::order(options, Order::Enable),
        Command::Disable(options) => remote::order(options, Order::Disable),
        Command::Remove(options) => remote::order(options, Order::Remove),
        Command::Rollback(options) => remote::order(options, Order::RollBack),
        Command::Shadow(options) => remote::shadow(options),
        Command::Promote(options) => remote::order(options, Order::Promote),
        Command::Replay(options) => remote::replay(options),
    }
}

/// A plugin, and what it is run with.
#[derive(Debug, clap::Args)]
struct Subject {
    /// The plugin's file, or the folder of its crate, which is built first
    #[arg(value_name = "FILE.wasm or DIR", default_value = ".")]
    plugin: PathBuf,
    /// Its configuration, as JSON; of a crate, its config.json
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Take its limits, and without --config its configuration, from [plugins.NAME] of this pointsman.toml
    #[arg(long, value_name = "FILE")]
    settings: Option<PathBuf>,
    /// What it is called there; otherwise as its file
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    #[command(flatten)]
    profile: toolchain::Profile,
}

/// A plugin's file with what it is run with, read.
struct Loaded {
    file: PathBuf,
    /// Of the crate, if one was named.
    folder: Option<PathBuf>,
    name: Name,
    bytes: Vec<u8>,
    /// A JSON object.
    config: String,
    limits: Limits,
}

impl Subject {
    fn load(&self) -> anyhow::Result<Loaded> {
        let (file, folder) = if self.plugin.is_dir() {
            let made = toolchain::Build::start(&self.plugin, &self.profile, false)?.finish()?;
            let [file] = made.as_slice() else {
                bail!(
                    "{} makes {} plugins; name the file of one",
                    self.plugin.display(),
                    made.len()
                )
            };
            (file.clone(), Some(self.plugin.clone()))
        } else {
            (self.plugin.clone(), None)
        };
        let name = self
            .name
            .clone()
            .unwrap_or_else(|| called(&file.file_name().unwrap_or_default().to_string_lossy()));
        let settings = match &self.settings {
            Some(path) => settings(path, &name)?,
            None => Settings::default(),
        };
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
        })
    }
}

impl Loaded {
    /// The plugin after every check of a node.
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

    /// A file of the crate, if there is one of that name.
    fn beside(&self, name: &str) -> Option<PathBuf> {
        beside(self.folder.as_deref(), name)
    }
}

fn beside(folder: Option<&Path>, name: &str) -> Option<PathBuf> {
    folder
        .map(|folder| folder.join(name))
        .filter(|path| path.is_file())
}

/// The bytes of a file, and of one that is too large as many as show it.
fn read(file: &Path, max: usize) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let opened = File::open(file).with_context(|| format!("cannot read {}", file.display()))?;
    opened
        .take(max as u64 + 1)
        .read_to_end(&mut bytes)
        .with_context(|| format!("cannot read {}", file.display()))?;
    Ok(bytes)
}

/// `[plugins.NAME]` of a pointsman.toml; the defaults if it has none.
fn settings(path: &Path, name: &str) -> anyhow::Result<Settings> {
    /// The rest is for a node.
    #[derive(Deserialize)]
    struct Written {
        #[serde(default)]
        plugins: Config,
    }
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let Written { mut plugins } =
        toml::from_str(&text).with_context(|| path.display().to_string())?;
    Ok(plugins.plugins.remove(name).unwrap_or_default())
}

/// A configuration, as the host hands it over.
fn config(path: &Path) -> anyhow::Result<String> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let config: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text)
        .with_context(|| format!("{} is no JSON object", path.display()))?;
    Ok(serde_json::to_string(&config)?)
}
