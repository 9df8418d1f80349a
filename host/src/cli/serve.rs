//! `pointsman serve`: a node, until it is told to stop.

use std::io::IsTerminal as _;
use std::path::PathBuf;

use anyhow::Context as _;
use pointsman::config::{Config, Error, Log, LogFormat, Recipe};
use pointsman::shutdown::Shutdown;
use tracing_subscriber::EnvFilter;

/// Each option is also a key of pointsman.toml and an environment variable, POINTSMAN_<OPTION>.
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Read this file (pointsman.toml, where it is there)
    #[arg(long, value_name = "FILE", env = "POINTSMAN_CONFIG")]
    config: Option<PathBuf>,
    /// Use the Redis at this URL
    #[arg(long, value_name = "URL")]
    redis: Option<String>,
    /// Use the embedded broker, with its data in this folder
    #[arg(long, value_name = "DIR")]
    data: Option<String>,
    /// Use the embedded broker, in memory only
    #[arg(long)]
    ephemeral: bool,
    /// Listen here for applications (127.0.0.1:8080)
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// Listen here for operators (127.0.0.1:8081)
    #[arg(long, value_name = "ADDR")]
    admin: Option<String>,
    /// Load the plugins of this folder, and load them again as they change
    #[arg(long, value_name = "DIR")]
    plugins: Option<String>,
    /// Be ready without a plugin
    #[arg(long)]
    allow_no_plugins: bool,
    /// Take ?user= for the user and ask nobody for a token; on loopback only
    #[arg(long)]
    dev: bool,
    /// What this node is called (host and listen address)
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    /// What to log, such as info,pointsman=debug (info)
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
    /// How to log: text or json (text)
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<String>,
}

impl Options {
    /// What a node would run with.
    ///
    /// # Errors
    /// One line with its fix.
    pub(super) fn load(&self) -> Result<Config, Error> {
        let texts = [
            ("redis", &self.redis),
            ("data", &self.data),
            ("listen", &self.listen),
            ("admin", &self.admin),
            ("plugins", &self.plugins),
            ("node", &self.node),
            ("log", &self.log),
            ("log-format", &self.log_format),
        ];
        let flags = [
            ("ephemeral", self.ephemeral),
            ("allow-no-plugins", self.allow_no_plugins),
            ("dev", self.dev),
        ];
        let texts = texts
            .into_iter()
            .filter_map(|(option, text)| Some((option, text.clone()?)));
        let flags = flags
            .into_iter()
            .filter(|(_, is_given)| *is_given)
            .map(|(option, _)| (option, "true".to_owned()));
        // A variable that is no UTF-8 cannot be one of ours.
        let environment = std::env::vars_os()
            .filter_map(|(name, text)| Some((name.into_string().ok()?, text.into_string().ok()?)));
        Recipe {
            file: self.config.clone(),
            environment: environment.collect(),
            options: texts.chain(flags).collect(),
        }
        .make()
    }
}

pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let config = options.load()?;
    start_log(&config.log);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let ended = runtime.block_on(async {
        let shutdown = Shutdown::new();
        shutdown.on_signals().context("cannot listen to signals")?;
        pointsman::run(config, shutdown).await
    });
    // A thread that still compiles a plugin has nothing to finish.
    runtime.shutdown_background();
    ended
}

/// To standard error, as the only output of a node.
fn start_log(log: &Log) {
    // Checked as the configuration was.
    let filter = EnvFilter::try_new(&log.filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    // A line that cannot be written (a full disk, a pipe that nobody reads) is lost. By default it would be complained of on standard error,
    // which cannot be written either: a panic, wherever something was logged.
    let builder = builder.log_internal_errors(false);
    match log.format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
}
