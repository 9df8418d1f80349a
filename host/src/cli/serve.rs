//! `pointsman serve`: runs a node until it receives SIGINT or SIGTERM.

use std::io::IsTerminal as _;
use std::path::PathBuf;

use anyhow::Context as _;
use pointsman::config::{Config, ConfigSource, Error, Log, LogFormat};
use pointsman::plugin::CompileIn;
use pointsman::shutdown::Shutdown;
use tracing_subscriber::EnvFilter;

/// Every option except --config is also a key of pointsman.toml and an environment variable,
/// POINTSMAN_<OPTION>.
#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Configuration file [default: pointsman.toml, if it exists]
    #[arg(long, value_name = "FILE", env = "POINTSMAN_CONFIG")]
    config: Option<PathBuf>,
    /// Use Redis at this URL as the broker
    #[arg(long, value_name = "URL")]
    redis: Option<String>,
    /// Use the embedded broker with its data in this folder
    #[arg(long, value_name = "DIR")]
    data: Option<String>,
    /// Use the embedded broker in memory; data is lost on exit
    #[arg(long)]
    ephemeral: bool,
    /// Address of the application listener [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// Address of the admin listener [default: 127.0.0.1:8081]
    #[arg(long, value_name = "ADDR")]
    admin: Option<String>,
    /// Plugin folder; changed files are reloaded
    #[arg(long, value_name = "DIR")]
    plugins: Option<String>,
    /// Become ready without any plugin; events are then unrouted
    #[arg(long)]
    allow_no_plugins: bool,
    /// Trust ?user= and require no token or API key; loopback only
    #[arg(long)]
    dev: bool,
    /// Name of this node [default: host name and listen address]
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    /// Log filter, such as info,pointsman=debug [default: info]
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
    /// Log format: text or json [default: text]
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<String>,
}

impl Options {
    /// Combines file, environment and options into the configuration of a node.
    ///
    /// # Errors
    /// The first invalid setting, as one line with its fix.
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
        // A variable that is not valid UTF-8 cannot be one of ours.
        let environment = std::env::vars_os()
            .filter_map(|(name, text)| Some((name.into_string().ok()?, text.into_string().ok()?)));
        let source = ConfigSource {
            file: self.config.clone(),
            environment: environment.collect(),
            options: texts.chain(flags).collect(),
        };
        Ok(Config {
            compile_in: CompileIn::ChildProcess,
            ..source.load()?
        })
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
        shutdown
            .on_signals()
            .context("cannot install signal handlers")?;
        pointsman::run(config, shutdown).await
    });
    // Does not wait for a thread that is still compiling a plugin: its result is unused.
    runtime.shutdown_background();
    ended
}

/// Logs to standard error, the only output of a node.
fn start_log(log: &Log) {
    // Valid: the filter was checked with the configuration.
    let filter = EnvFilter::try_new(&log.filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    // A line that cannot be written (full disk, closed pipe) is dropped. By default the subscriber
    // would report the failure on standard error, which cannot be written either, and panic in the
    // code that logged the line.
    let builder = builder.log_internal_errors(false);
    match log.format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
}
