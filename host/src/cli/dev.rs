//! `pointsman dev`: a node in memory for those who write plugins, with its page, a watched folder, and their crates rebuilt as they are saved.
//!
//! It promises that a crate that does not compile, or a file that is no plugin, replaces nothing; and to leave no process and no folder of its
//! own behind. A built file is put into the folder, and what becomes of it there is the node's business, as with anybody's file.

use std::fs;
use std::io::IsTerminal as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use pointsman::Listeners;
use pointsman::config::{Config, DEFAULT_FILE, Layers, Recipe};
use pointsman::plugin::called;
use pointsman::shutdown::Shutdown;
use tracing_subscriber::EnvFilter;

use self::activity::News;
use self::crate_builder::Workshop;
use super::plugin::toolchain::Profile;

mod activity;
mod crate_builder;

/// What is to be read beside the commands' own lines: what goes wrong, and what plugins say. Which plugins are at work, the news say.
const LOG: &str =
    "warn,pointsman::plugin::registry=off,pointsman::telemetry::readiness=off,plugin=debug";

/// Where a crate has the configuration of its plugin.
const CONFIG: &str = "config.json";

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// The folders of the plugins' crates (this one, if it is a crate)
    dirs: Vec<PathBuf>,
    /// Load the plugins of this folder as well; what is built is put into it, too
    #[arg(long, value_name = "DIR")]
    plugins: Option<PathBuf>,
    /// Read this file (pointsman.toml, where it is there)
    #[arg(long, value_name = "FILE", env = "POINTSMAN_CONFIG")]
    config: Option<PathBuf>,
    /// Listen here for applications (127.0.0.1:8080)
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// Listen here for operators (127.0.0.1:8081)
    #[arg(long, value_name = "ADDR")]
    admin: Option<String>,
    /// What to log, such as info,plugin=trace
    #[arg(long, value_name = "FILTER", default_value = LOG)]
    log: String,
    #[command(flatten)]
    profile: Profile,
}

/// The crate of a plugin.
#[derive(Clone, Debug)]
struct Crate {
    folder: PathBuf,
    /// What the plugin will be called.
    name: String,
}

pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let crates = options.crates()?;
    if let Some(named) = &options.plugins {
        ensure!(
            named.is_dir(),
            "{} is no folder; make it, or leave out --plugins",
            named.display()
        );
    }
    let scratch = Scratch::new()?;
    let plugins = options.plugins.clone().unwrap_or_else(|| scratch.plugins());
    let settings = Arc::new(Settings::new(
        options.config.as_deref(),
        crates.clone(),
        scratch.0.join("pointsman.toml"),
    )?);
    let config = options.node(&settings, &plugins)?;
    let filter =
        EnvFilter::try_new(&options.log).with_context(|| format!("--log {}", options.log))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .log_internal_errors(false)
        .without_time()
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let ended = runtime.block_on(async {
        let shutdown = Shutdown::new();
        shutdown.on_signals().context("cannot listen to signals")?;
        let listeners = Listeners::bind(&config.listen)?;
        let (address, admin) = (listeners.applications.local_addr()?, listeners.admin.local_addr()?);
        println!("page       http://{address}/");
        println!(
            "publish    pointsman publish --url http://{address} --type order.shipped --user 42 --attribute customer=42 --data '{{\"order\":{{\"region\":\"eu\"}}}}'"
        );
        println!("listen     pointsman tail --url http://{address} --user 42");
        println!("plugins    {} is watched: put a .wasm file there", plugins.display());
        println!("operators  http://{admin}/v1/decisions, pointsman plugin list --url http://{admin}");
        for Crate { folder, name } in &crates {
            println!("crate      {name}, in {}: rebuilt as it is saved", folder.display());
        }
        println!("Ctrl-C ends it.\n");
        let open = |known| Workshop::open(known, &options.profile, &plugins, &settings);
        let workshops = crates.iter().map(open).collect::<anyhow::Result<Vec<_>>>()?;
        let news = News::start(admin, crates.iter().map(|known| known.name.clone()).collect())?;
        let ended = pointsman::run_on(listeners, config, shutdown).await;
        // Before the runtime, so that nothing is built for a node that is gone.
        drop((workshops, news));
        ended
    });
    // A thread that still compiles a plugin has nothing to finish.
    runtime.shutdown_background();
    ended
}

impl Options {
    fn crates(&self) -> anyhow::Result<Vec<Crate>> {
        let here = [PathBuf::from(".")];
        let folders = match self.dirs.as_slice() {
            [] if Path::new("Cargo.toml").is_file() => &here[..],
            named => named,
        };
        let known = |folder: &PathBuf| {
            let manifest = folder.join("Cargo.toml");
            let text = fs::read_to_string(&manifest)
                .with_context(|| format!("cannot read {}", manifest.display()))?;
            let manifest: toml::Table = text
                .parse()
                .with_context(|| manifest.display().to_string())?;
            let name = manifest
                .get("package")
                .and_then(|package| package.get("name")?.as_str());
            let name = name.with_context(|| {
                format!(
                    "{} holds no package; name the folders of the plugins",
                    folder.display()
                )
            })?;
            Ok(Crate {
                folder: folder.canonicalize()?,
                name: called(name),
            })
        };
        folders.iter().map(known).collect()
    }

    /// A node in memory, in dev mode, with these settings and these plugins.
    fn node(&self, settings: &Settings, plugins: &Path) -> anyhow::Result<Config> {
        let plugins = plugins
            .to_str()
            .with_context(|| format!("{} is no UTF-8", plugins.display()))?;
        let fixed = [
            ("ephemeral", "true".to_owned()),
            ("dev", "true".to_owned()),
            ("plugins", plugins.to_owned()),
        ];
        let given = [
            ("listen", self.listen.clone()),
            ("admin", self.admin.clone()),
        ];
        let options = fixed.into_iter().chain(
            given
                .into_iter()
                .filter_map(|(option, text)| Some((option, text?))),
        );
        let recipe = Recipe {
            file: Some(settings.file.clone()),
            environment: Vec::new(),
            options: options.collect(),
        };
        Ok(recipe.make()?)
    }
}

/// What the user configured, and for each crate that this does not speak of, its [`CONFIG`]: as one file, which the node follows.
#[derive(Debug)]
struct Settings {
    written: toml::Table,
    crates: Vec<Crate>,
    file: PathBuf,
}

impl Settings {
    /// # Errors
    /// What was configured is none, or a `config.json` is none.
    fn new(named: Option<&Path>, crates: Vec<Crate>, file: PathBuf) -> anyhow::Result<Self> {
        // For an error that names the user's file, and not this one.
        Layers::file(named)?;
        let path = named.unwrap_or(Path::new(DEFAULT_FILE));
        let text = if named.is_some() || path.is_file() {
            fs::read_to_string(path)?
        } else {
            String::new()
        };
        let settings = Self {
            written: text.parse()?,
            crates,
            file,
        };
        settings.write()?;
        Ok(settings)
    }

    /// Writes the file anew, in one step.
    ///
    /// # Errors
    /// A `config.json` is none; the file is as it was.
    fn write(&self) -> anyhow::Result<()> {
        let mut all = self.written.clone();
        for Crate { folder, name } in &self.crates {
            let path = folder.join(CONFIG);
            let Ok(text) = fs::read_to_string(&path) else {
                continue;
            };
            let own: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text)
                .with_context(|| format!("{} is no JSON object", path.display()))?;
            let own = toml::Table::try_from(own)
                .with_context(|| format!("{} is no configuration", path.display()))?;
            let plugins = all
                .entry("plugins")
                .or_insert_with(|| toml::Table::new().into());
            let plugin = plugins.as_table_mut().map(|plugins| {
                plugins
                    .entry(name)
                    .or_insert_with(|| toml::Table::new().into())
            });
            if let Some(plugin) = plugin.and_then(toml::Value::as_table_mut) {
                plugin.entry("config").or_insert(own.into());
            }
        }
        let draft = self.file.with_extension("draft");
        fs::write(&draft, toml::to_string(&all)?).and_then(|()| fs::rename(&draft, &self.file))?;
        Ok(())
    }
}

/// A folder that goes away with this command.
#[derive(Debug)]
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> anyhow::Result<Self> {
        let path = std::env::temp_dir().join(format!("pointsman-dev-{}", std::process::id()));
        // New, and this user's alone: plugins are loaded from it.
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("cannot make {}", path.display()))?;
        let scratch = Self(path);
        fs::create_dir(scratch.plugins())?;
        Ok(scratch)
    }

    fn plugins(&self) -> PathBuf {
        self.0.join("plugins")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("pointsman: {} stays behind: {error}", self.0.display());
        }
    }
}
