//! `pointsman dev`: a node in memory for those who write plugins, with its page, a watched folder, and their crates rebuilt as they are saved.
//!
//! It promises that a crate that does not compile, or a file that is no plugin, replaces nothing; and to leave no process and no folder of its
//! own behind. A built file is put into the folder, and what becomes of it there is the node's business, as with anybody's file.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use pointsman::Listeners;
use pointsman::config::{Config, Layers};
use pointsman::plugin::called;
use pointsman::shutdown::Shutdown;
use tracing_subscriber::EnvFilter;

use self::news::News;
use self::workshop::Workshop;
use super::plugin::toolchain::Profile;

mod news;
mod workshop;

/// What is to be read beside the commands' own lines: what goes wrong, and what plugins say.
const LOG: &str = "warn,pointsman::plugin::registry=off,plugin=debug";

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
    let folder = Folder::new(options.plugins.as_deref())?;
    let config = options.node(&crates, folder.path())?;
    let filter = EnvFilter::try_new(&options.log).with_context(|| format!("--log {}", options.log))?;
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")?;
    let ended = runtime.block_on(async {
        let shutdown = Shutdown::new();
        shutdown.on_signals().context("cannot listen to signals")?;
        let listeners = Listeners::bind(&config.listen)?;
        let (address, admin) = (listeners.applications.local_addr()?, listeners.admin.local_addr()?);
        println!("page       http://{address}/");
        println!("publish    pointsman publish --url http://{address} --type order.shipped --user 42 --data '{{\"order\":{{\"region\":\"eu\"}}}}'");
        println!("listen     pointsman tail --url http://{address} --user 42");
        println!("plugins    {} is watched: put a .wasm file there", folder.path().display());
        println!("operators  http://{admin}/v1/decisions, pointsman plugin list --url http://{admin}");
        for Crate { folder, name } in &crates {
            println!("crate      {name}, in {}: rebuilt as it is saved", folder.display());
        }
        println!("Ctrl-C ends it.\n");
        let workshops = crates.iter().map(|known| Workshop::open(known, &options.profile, folder.path())).collect::<anyhow::Result<Vec<_>>>()?;
        let news = News::start(admin)?;
        let ended = pointsman::run_on(listeners, config, shutdown).await;
        // Before the runtime, so that nothing is built for a node that is gone.
        drop((workshops, news));
        ended
    });
    // A thread that still compiles a plugin has nothing to finish.
    runtime.shutdown_timeout(Duration::from_millis(100));
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
            let text = fs::read_to_string(&manifest).with_context(|| format!("cannot read {}", manifest.display()))?;
            let manifest: toml::Table = text.parse().with_context(|| manifest.display().to_string())?;
            let name = manifest.get("package").and_then(|package| package.get("name")?.as_str());
            let name = name.with_context(|| format!("{} holds no package; name the folders of the plugins", folder.display()))?;
            Ok(Crate { folder: folder.canonicalize()?, name: called(name) })
        };
        folders.iter().map(known).collect()
    }

    /// A node in memory, in dev mode, with these plugins configured as their crates' `config.json` says, unless the file configures them.
    fn node(&self, crates: &[Crate], plugins: &Path) -> anyhow::Result<Config> {
        let plugins = plugins.to_str().with_context(|| format!("{} is no UTF-8", plugins.display()))?;
        let fixed = [("ephemeral", "true".to_owned()), ("dev", "true".to_owned()), ("plugins", plugins.to_owned())];
        let given = [("listen", self.listen.clone()), ("admin", self.admin.clone())];
        let options = fixed.into_iter().chain(given.into_iter().filter_map(|(option, text)| Some((option, text?))));
        let mut config = Config::new(&Layers::file(self.config.as_deref())?.options(options)?)?;
        for Crate { folder, name } in crates {
            let settings = config.plugins.plugins.entry(name.clone()).or_default();
            let file = folder.join("config.json");
            if settings.config.is_empty() && file.is_file() {
                let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
                settings.config = serde_json::from_str(&text).with_context(|| format!("{} is no JSON object", file.display()))?;
            }
        }
        Ok(config)
    }
}

/// The folder of plugins: the one that was named, or one that goes away with this command.
#[derive(Debug)]
enum Folder {
    Named(PathBuf),
    Scratch(PathBuf),
}

impl Folder {
    fn new(named: Option<&Path>) -> anyhow::Result<Self> {
        if let Some(named) = named {
            ensure!(named.is_dir(), "{} is no folder; make it, or leave out --plugins", named.display());
            return Ok(Self::Named(named.to_owned()));
        }
        let path = std::env::temp_dir().join(format!("pointsman-dev-{}", std::process::id()));
        // New, or it could be anybody's: plugins are loaded from it.
        fs::create_dir(&path).with_context(|| format!("cannot make {}; name a folder by --plugins", path.display()))?;
        Ok(Self::Scratch(path))
    }

    fn path(&self) -> &Path {
        match self {
            Self::Named(path) | Self::Scratch(path) => path,
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Self::Scratch(path) = self
            && let Err(error) = fs::remove_dir_all(&path)
        {
            eprintln!("pointsman: {} stays behind: {error}", path.display());
        }
    }
}
