//! A node: binds the listeners, opens the broker, loads the plugins, wires the parts and stops them.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use tokio::net::TcpListener;

use crate::broker::embedded::Embedded;
use crate::broker::redis::Redis;
use crate::broker::{Broker, Retention};
use crate::config::{BrokerChoice, Config};
use crate::delivery::hub::Hub;
use crate::delivery::sse::StreamTimer;
use crate::http::State;
use crate::ingest::pipeline::Pipeline;
use crate::ingest::worker::Ingest;
use crate::plugin::Engine;
use crate::plugin::registry::Registry;
use crate::plugin::registry::watcher::Watcher;
use crate::plugin::runtime::cache::Cache;
use crate::server::Bounds;
use crate::shutdown::Shutdown;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::readiness::Readiness;

mod monitor;

/// Maximum connections to the admin listener: probes and scrapers are few.
const MAX_ADMIN_CONNECTIONS: usize = 256;

/// The two listeners of a node, bound.
#[derive(Debug)]
pub struct Listeners {
    pub applications: TcpListener,
    pub admin: TcpListener,
}

impl Listeners {
    /// Binds both addresses. Port 0 binds a free port.
    ///
    /// # Errors
    /// An address cannot be bound; the text names the key to change.
    pub fn bind(listen: &crate::server::Config) -> anyhow::Result<Self> {
        let bind = |key, address| {
            crate::server::bind(address)
                .with_context(|| format!("cannot listen on {address}; free it or change {key}"))
        };
        Ok(Self {
            applications: bind("listen.address", listen.address)?,
            admin: bind("listen.admin", listen.admin)?,
        })
    }
}

/// Validates a node's folders as far as possible before it listens. Slower checks, and conflicts
/// with other processes, are detected during startup.
///
/// # Errors
/// A folder cannot be read, or cannot be written where required; one line with the fix.
pub fn check_folders(config: &Config) -> anyhow::Result<()> {
    if let Some(dir) = &config.plugins.dir {
        crate::plugin::check_folder(dir).map_err(anyhow::Error::msg)?;
    }
    match &config.broker {
        BrokerChoice::Data(dir) => crate::broker::embedded::check_folder(dir),
        BrokerChoice::Redis { .. } | BrokerChoice::Ephemeral => Ok(()),
    }
}

/// Runs a node until `shutdown` begins, then stops it: ingest stops reading, waits for its last
/// commit and releases its leases; streams end spread over the grace period; requests in progress
/// complete; the rest is cut.
///
/// # Errors
/// An address cannot be bound, the plugin folder cannot be read, or the embedded broker's folder
/// cannot be opened; or a part of the node panicked, after which the rest was shut down regularly.
/// An unreachable Redis is not an error: the listeners are up, readiness reports the reason, and
/// the connection is retried.
pub async fn run(config: Config, shutdown: Shutdown) -> anyhow::Result<()> {
    check_folders(&config)?;
    let listeners = Listeners::bind(&config.listen)?;
    run_on(listeners, config, shutdown).await
}

/// Like [`run`], on listeners that are already bound.
///
/// # Errors
/// The same as [`run`].
pub async fn run_on(
    listeners: Listeners,
    config: Config,
    shutdown: Shutdown,
) -> anyhow::Result<()> {
    let cache_folder = config.plugin_cache();
    let Config {
        node,
        listen,
        origins,
        broker,
        sources,
        retention,
        plugins,
        auth,
        stream,
        ingest,
        limits,
        log: _,
        origin,
    } = config;
    let (address, admin) = (
        listeners.applications.local_addr()?,
        listeners.admin.local_addr()?,
    );
    // Uses the bound port: two nodes that both requested any free port must not share a name, and
    // with it their leases.
    let name = node.name.map_or_else(
        || format!("{}/{address}", host_name()),
        |name| name.to_string(),
    );
    let (metrics, readiness) = (Metrics::default(), Readiness::default());
    metrics.start_time.set(
        SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs_f64(),
    );
    readiness.expect("broker", "not connected yet");
    readiness.expect("plugins", "still loading");
    if auth.is_dev() {
        tracing::warn!("dev mode: every local process may publish and read every stream");
    }
    for (key, fix) in auth.placeholders() {
        readiness.warn(key, fix);
    }

    let stream_timer = StreamTimer::start(stream, metrics.clone(), &shutdown);
    let state = State::new(
        auth,
        origins,
        limits,
        retention.clone(),
        readiness.clone(),
        metrics.clone(),
        stream_timer.clone(),
    );
    let state = Arc::new(state);
    let header_timeout = Duration::from_secs(listen.header_timeout_s);
    let bounds = |max_connections| Bounds {
        max_connections,
        header_timeout,
    };
    // Listening before the broker is connected: a probe sees the reason, and a publisher receives
    // 503 instead of a refused connection.
    let routes = [(
        listeners.admin,
        crate::http::admin_routes(Arc::clone(&state)),
        MAX_ADMIN_CONNECTIONS,
    )];
    let routes = routes.into_iter().chain([(
        listeners.applications,
        crate::http::routes(Arc::clone(&state)),
        listen.max_connections,
    )]);
    for (listener, routes, max_connections) in routes {
        shutdown.spawn(
            "a listener",
            crate::server::serve(listener, routes, bounds(max_connections), shutdown.clone()),
        );
    }
    tracing::info!(node.name = name, %address, %admin, "listening");

    // Concurrently: streams are served from history while plugins still compile, or plugins load
    // while Redis is unavailable.
    let reached = async {
        let broker = open(&broker, &sources, &retention, &readiness, &shutdown).await?;
        let hub = Hub::start(Arc::clone(&broker), metrics.clone(), &shutdown);
        state.set_broker(Arc::clone(&broker), hub.clone());
        shutdown.spawn(
            "the broker monitor",
            monitor::watch(
                Arc::clone(&broker),
                hub,
                retention.dead_entries,
                metrics.clone(),
                readiness.clone(),
                shutdown.clone(),
            ),
        );
        Ok(broker)
    };
    let loaded = async {
        let (pipeline, watcher) = start_plugins(
            plugins,
            cache_folder,
            node.allow_no_plugins,
            &metrics,
            &shutdown,
        )
        .await?;
        state.set_pipeline(pipeline.clone());
        shutdown.spawn(
            "the plugin monitor",
            monitor::watch_plugins(pipeline.clone(), readiness.clone(), shutdown.clone()),
        );
        if let Some(origin) = origin {
            let registry = Arc::clone(pipeline.registry());
            shutdown.spawn(
                "the configuration monitor",
                crate::config::reload::follow(
                    origin,
                    registry,
                    readiness.clone(),
                    shutdown.clone(),
                ),
            );
        }
        anyhow::Ok((pipeline, watcher))
    };
    let started = tokio::select! {
        started = async { tokio::try_join!(reached, loaded) } => Some(started?),
        () = shutdown.begun() => None,
    };
    if let Some((broker, (pipeline, watcher))) = started {
        for partition in broker.partitions() {
            let (broker, pipeline, metrics) =
                (Arc::clone(&broker), pipeline.clone(), metrics.clone());
            let readiness = readiness.clone();
            let ingest = Ingest {
                broker,
                pipeline,
                metrics,
                readiness,
                config: ingest.clone(),
                node: name.clone(),
            };
            shutdown.spawn("ingest", ingest.run(partition.clone(), shutdown.token()));
        }
        shutdown.begun().await;
        // A node that shuts down compiles nothing more.
        drop(watcher);
    }
    let grace = Duration::from_secs(listen.grace_s);
    // Streams end within 80 % of the grace period, which leaves time for their last bytes.
    stream_timer.drain(grace.mul_f64(0.8));
    if !shutdown.finish(grace).await {
        tracing::warn!(
            grace_s = listen.grace_s,
            "the grace period ended with unfinished tasks; they are cut"
        );
        shutdown.skip();
        // A cut task ends at its next step; only a blocked thread could take longer.
        shutdown.finish_cut(Duration::from_secs(1)).await;
    }
    tracing::info!("stopped");
    match shutdown.broken() {
        Some(part) => Err(anyhow::anyhow!(
            "{part} panicked (see the log), so the node stopped; start it again and report the bug"
        )),
        None => Ok(()),
    }
}

/// Loads the plugins, starts their threads and the plugin watcher.
async fn start_plugins(
    plugins: crate::plugin::registry::settings::Config,
    cache_folder: Option<PathBuf>,
    allow_none: bool,
    metrics: &Metrics,
    shutdown: &Shutdown,
) -> anyhow::Result<(Pipeline, Option<Watcher>)> {
    let counting = metrics.clone();
    let load = move || {
        let cache = cache_folder.and_then(|folder| Cache::open_if_safe(&folder, counting.clone()));
        Registry::load(Engine::with_cache(cache)?, plugins, counting)
    };
    let registry = tokio::task::spawn_blocking(load).await;
    let registry = Arc::new(registry.context("panic while loading the plugins")??);
    let pipeline = Pipeline::start(Arc::clone(&registry), allow_none, metrics.clone())
        .context("cannot start the plugin threads")?;
    let watcher = Watcher::start(registry, shutdown.alarm("the plugin watcher"))
        .context("cannot start the thread of the plugin watcher")?;
    Ok((pipeline, watcher))
}

/// Opens the broker. The connection to an unavailable Redis is retried, with a growing and jittered
/// pause, until it succeeds.
async fn open(
    choice: &BrokerChoice,
    sources: &[String],
    retention: &Retention,
    readiness: &Readiness,
    shutdown: &Shutdown,
) -> anyhow::Result<Arc<dyn Broker>> {
    let (own_sources, retention) = (sources.to_vec(), retention.clone());
    let alarm = shutdown.alarm("the store writer");
    match choice.clone() {
        BrokerChoice::Redis { url } => {
            let connect = || async {
                Ok(
                    Arc::new(Redis::connect(&url, sources, retention.clone()).await?)
                        as Arc<dyn Broker>,
                )
            };
            Ok(monitor::reach(connect, readiness).await)
        }
        BrokerChoice::Data(folder) => {
            // Recovers the store after a crash: blocks too long for an async thread.
            let opened = tokio::task::spawn_blocking(move || {
                Embedded::open(&folder, &own_sources, retention, alarm)
            })
            .await;
            Ok(Arc::new(opened.context("panic while opening the store")??))
        }
        BrokerChoice::Ephemeral => Ok(Arc::new(Embedded::ephemeral(
            &own_sources,
            retention,
            alarm,
        )?)),
    }
}

/// The host name of this machine.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .ok()
        .or_else(|| std::env::var("HOSTNAME").ok());
    name.map(|name| name.trim().to_owned())
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "localhost".to_owned())
}
