//! `pointsman dev`: an in-memory node for plugin authors, with the web page, a watched plugin
//! folder and plugin crates that are rebuilt on save.
//!
//! A crate that does not compile and a file that is not a valid plugin replace nothing. No process
//! and no temporary folder is left behind. A built file is only copied into the plugin folder; the
//! node loads it from there like any other file.

use std::fs;
use std::io::IsTerminal as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use pointsman::Listeners;
use pointsman::config::{Config, ConfigSource, DEFAULT_FILE, Layers};
use pointsman::plugin::CompileIn;
use pointsman::plugin::name_of_file;
use pointsman::shutdown::Shutdown;
use tracing_subscriber::EnvFilter;

use self::activity::Activity;
use self::crate_builder::CrateBuilder;
use super::plugin::toolchain::Profile;

mod activity;
mod crate_builder;

/// Default log filter: problems and plugin logs. Plugin activity is printed by [`Activity`]
/// instead.
const LOG: &str =
    "warn,pointsman::plugin::registry=off,pointsman::telemetry::readiness=off,plugin=debug";

/// File in a crate that holds the configuration of its plugin.
const CONFIG: &str = "config.json";

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Folders of the plugin crates to build [default: the current folder, if it is a crate]
    dirs: Vec<PathBuf>,
    /// Plugin folder to load as well; built plugins are copied into it
    #[arg(long, value_name = "DIR")]
    plugins: Option<PathBuf>,
    /// Configuration file [default: pointsman.toml, if it exists]
    #[arg(long, value_name = "FILE", env = "POINTSMAN_CONFIG")]
    config: Option<PathBuf>,
    /// Address of the application listener [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// Address of the admin listener [default: 127.0.0.1:8081]
    #[arg(long, value_name = "ADDR")]
    admin: Option<String>,
    /// Log filter, such as info,plugin=trace
    #[arg(long, value_name = "FILTER", default_value = LOG)]
    log: String,
    #[command(flatten)]
    profile: Profile,
}

/// A plugin crate.
#[derive(Clone, Debug)]
struct Crate {
    folder: PathBuf,
    /// The name of the plugin that the crate builds.
    name: String,
}

pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let crates = options.crates()?;
    if let Some(named) = &options.plugins {
        ensure!(
            named.is_dir(),
            "{} is not a folder; create it, or omit --plugins",
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
        shutdown.on_signals().context("cannot install signal handlers")?;
        let listeners = Listeners::bind(&config.listen)?;
        let (address, admin) = (listeners.applications.local_addr()?, listeners.admin.local_addr()?);
        println!("page       http://{address}/");
        println!(
            "publish    pointsman publish --url http://{address} --type order.shipped --user 42 --attribute customer=42 --data '{{\"order\":{{\"region\":\"eu\"}}}}'"
        );
        println!("tail       pointsman tail --url http://{address} --user 42");
        println!("plugins    {} (watched; copy .wasm files there)", plugins.display());
        println!("admin      http://{admin}/v1/decisions, pointsman plugin list --url http://{admin}");
        for Crate { folder, name } in &crates {
            println!("crate      {name} in {} (rebuilt on save)", folder.display());
        }
        println!("Press Ctrl-C to stop.\n");
        let open = |known| CrateBuilder::open(known, &options.profile, &plugins, &settings);
        let builders = crates.iter().map(open).collect::<anyhow::Result<Vec<_>>>()?;
        let activity = Activity::start(admin, crates.iter().map(|known| known.name.clone()).collect())?;
        let ended = pointsman::run_on(listeners, config, shutdown).await;
        // Stopped before the runtime, so that no build continues for a node that has ended.
        drop((builders, activity));
        ended
    });
    // Does not wait for a thread that is still compiling a plugin: its result is unused.
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
                    "{} does not contain a package; pass the folders of the plugin crates",
                    folder.display()
                )
            })?;
            Ok(Crate {
                folder: folder.canonicalize()?,
                name: name_of_file(name),
            })
        };
        folders.iter().map(known).collect()
    }

    /// The configuration of an in-memory node in dev mode with these settings and plugins.
    fn node(&self, settings: &Settings, plugins: &Path) -> anyhow::Result<Config> {
        let plugins = plugins
            .to_str()
            .with_context(|| format!("{} is not valid UTF-8", plugins.display()))?;
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
        let source = ConfigSource {
            file: Some(settings.file.clone()),
            environment: Vec::new(),
            options: options.collect(),
        };
        Ok(Config {
            compile_in: CompileIn::ChildProcess,
            ..source.load()?
        })
    }
}

/// The user's configuration merged with the [`CONFIG`] file of each crate, written to one file
/// that the node watches. The user's configuration of a plugin takes precedence. It names each
/// crate, so that events wait for its first build.
#[derive(Debug)]
struct Settings {
    user: toml::Table,
    crates: Vec<Crate>,
    file: PathBuf,
}

impl Settings {
    /// # Errors
    /// The configuration file or a `config.json` is invalid.
    fn new(named: Option<&Path>, crates: Vec<Crate>, file: PathBuf) -> anyhow::Result<Self> {
        // Validated first, so that an error names the user's file and not the merged one.
        Layers::file(named)?;
        let path = named.unwrap_or(Path::new(DEFAULT_FILE));
        let text = if named.is_some() || path.is_file() {
            fs::read_to_string(path)?
        } else {
            String::new()
        };
        let settings = Self {
            user: text.parse()?,
            crates,
            file,
        };
        settings.write()?;
        Ok(settings)
    }

    /// Replaces the merged file atomically.
    ///
    /// # Errors
    /// A `config.json` is invalid or the file cannot be written; the file is unchanged.
    fn write(&self) -> anyhow::Result<()> {
        let mut all = self.user.clone();
        for Crate { folder, name } in &self.crates {
            let plugins = all
                .entry("plugins")
                .or_insert_with(|| toml::Table::new().into());
            let plugin = plugins.as_table_mut().map(|plugins| {
                plugins
                    .entry(name)
                    .or_insert_with(|| toml::Table::new().into())
            });
            let path = folder.join(CONFIG);
            let Ok(text) = fs::read_to_string(&path) else {
                continue;
            };
            let own: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&text)
                .with_context(|| format!("{} is not a JSON object", path.display()))?;
            let own = toml::Table::try_from(own).with_context(|| {
                format!("{} is not a valid plugin configuration", path.display())
            })?;
            if let Some(plugin) = plugin.and_then(toml::Value::as_table_mut) {
                plugin.entry("config").or_insert(own.into());
            }
        }
        let draft = self.file.with_extension("draft");
        fs::write(&draft, toml::to_string(&all)?).and_then(|()| fs::rename(&draft, &self.file))?;
        Ok(())
    }
}

/// A temporary folder that is deleted on drop.
#[derive(Debug)]
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> anyhow::Result<Self> {
        let path = std::env::temp_dir().join(format!("pointsman-dev-{}", std::process::id()));
        // Must not exist yet and is private to this user, because plugins are loaded from it.
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("cannot create {}", path.display()))?;
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
            eprintln!("pointsman: cannot remove {}: {error}", self.0.display());
        }
    }
}
