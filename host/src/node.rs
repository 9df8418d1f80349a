//! A node: binds the listeners, opens the broker, loads the plugins, wires the parts and stops
//! them.
//!
//! [`run`] is the whole life cycle. `listeners` serves the routes, `start` opens the broker and
//! loads the plugins, `monitor` reports their state in readiness afterwards, and `outage` sends
//! clients away while only this node is without its broker.

use std::sync::Arc;
use std::time::Duration;

use crate::bridge::{Bridge, Listener};
use crate::broker::{Advertised, Broker, Channels, Retention, embedded};
use crate::config::{BrokerChoice, Config, reload, secrets};
use crate::delivery::hub::Hub;
use crate::delivery::sse::StreamTimer;
use crate::delivery::subscription::BufferBudget;
use crate::http::{self, State};
use crate::ingest::pipeline::Pipeline;
use crate::ingest::worker::{self, Ingest};
use crate::plugin;
use crate::plugin::registry::watcher::Watcher;
use crate::rollout::Fleet;
use crate::shutdown::Shutdown;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::readiness::Readiness;

mod listeners;
mod monitor;
mod outage;
mod start;

use start::OpenBroker;

pub use listeners::Listeners;

/// Validates a node's folders as far as possible before it listens. Slower checks, and conflicts
/// with other processes, are detected during startup.
///
/// # Errors
/// A folder cannot be read, or cannot be written where required; one line with the fix.
pub fn check_folders(config: &Config) -> anyhow::Result<()> {
    if let Some(dir) = &config.plugins.dir {
        plugin::check_folder(dir).map_err(anyhow::Error::msg)?;
    }
    match &config.broker {
        BrokerChoice::Data(dir) => embedded::check_folder(dir),
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
    let node = Node::listen(listeners, &config, shutdown)?;
    let (ingest, grace) = (config.ingest.clone(), config.listen.shutdown_grace);
    let bridges = config.bridges.clone();
    let started = tokio::select! {
        started = node.start(config) => Some(started?),
        () = node.shutdown.begun() => None,
    };
    if let Some(started) = started {
        node.ingest(&started, &ingest);
        node.listen_to_channels(&started, bridges, &ingest);
        node.shutdown.begun().await;
        // A node that shuts down compiles nothing more.
        drop(started.watcher);
    }
    node.stop(grace).await
}

/// The parts that exist from the first moment, so that probes and clients get an answer while the
/// broker and the plugins are still starting.
struct Node {
    name: String,
    /// Where other nodes reach the public listener.
    advertised: Advertised,
    /// Whether the public listener uses TLS; the others then do too.
    is_tls: bool,
    state: Arc<State>,
    stream_timer: StreamTimer,
    metrics: Metrics,
    readiness: Readiness,
    shutdown: Shutdown,
}

/// The parts that take time to start.
struct Started {
    broker: Arc<dyn Broker>,
    channels: Option<Arc<dyn Channels>>,
    pipeline: Pipeline,
    /// `None` without a plugin folder. Watches until it is dropped.
    watcher: Option<Watcher>,
}

impl Node {
    /// Starts to serve both listeners.
    fn listen(listeners: Listeners, config: &Config, shutdown: Shutdown) -> anyhow::Result<Self> {
        let address = listeners.applications.local_addr()?;
        let admin = listeners.admin.local_addr()?;
        // Uses the bound port: two nodes that both requested any free port must not share a name,
        // and with it their leases.
        let name = match &config.node.name {
            Some(name) => name.to_string(),
            None => format!("{}/{address}", host_name()),
        };
        let (metrics, readiness) = (Metrics::default(), Readiness::default());
        metrics.note_start();
        readiness.expect("broker", "not connected yet");
        readiness.expect("plugins", "still loading");
        if config.auth.is_dev() {
            tracing::warn!("dev mode: every local process may publish and read every stream");
        }
        for (key, fix) in config.auth.placeholders() {
            readiness.warn(key, fix);
        }
        let stream_timer = StreamTimer::start(config.stream.clone(), metrics.clone(), &shutdown);
        let settings = http::Settings {
            node: name.clone(),
            auth: config.auth.clone(),
            origins: config.origins.clone(),
            addresses: config.addresses.clone(),
            limits: config.limits.clone(),
            default_type: config.defaults.r#type.clone(),
        };
        let state = Arc::new(State::new(
            settings,
            readiness.clone(),
            metrics.clone(),
            stream_timer.clone(),
        ));
        // Listening before the broker is connected: a probe sees the reason, and a publisher
        // receives 503 instead of a refused connection.
        let stall_timeout = config.stream.stall_timeout;
        listeners.serve(&config.listen, stall_timeout, &state, &shutdown)?;
        let follow = secrets::follow(config.auth.clone(), readiness.clone(), shutdown.clone());
        shutdown.spawn("the monitor of secrets", follow);
        let auth = config.auth.clone();
        let follow = auth.follow_key_servers(readiness.clone(), shutdown.clone());
        shutdown.spawn("the monitor of key servers", follow);
        let is_tls = config.listen.tls_certificate.is_some();
        tracing::info!(node.name = name, %address, %admin, tls = is_tls, "listening");
        Ok(Self {
            name,
            advertised: Advertised::new(config.listen.advertise.clone(), address),
            is_tls,
            state,
            stream_timer,
            metrics,
            readiness,
            shutdown,
        })
    }

    /// Opens the broker and loads the plugins. Concurrently: streams are served from history while
    /// plugins still compile, and plugins load while Redis is unavailable.
    async fn start(&self, mut config: Config) -> anyhow::Result<Started> {
        let origin = config.origin.take();
        let cache_folder = config.plugin_cache();
        let broker = self.connect(
            &config.broker,
            &config.sources,
            &config.bridges,
            &config.retention,
        );
        let plugins = async {
            let (pipeline, watcher) = start::load_plugins(
                config.plugins,
                cache_folder,
                config.compile_in,
                config.node.allow_no_plugins,
                &self.metrics,
                &self.shutdown,
            )
            .await?;
            self.state.set_pipeline(pipeline.clone());
            let (readiness, shutdown) = (self.readiness.clone(), self.shutdown.clone());
            let watch = monitor::watch_plugins(pipeline.clone(), readiness, shutdown);
            self.shutdown.spawn("the plugin monitor", watch);
            if let Some(origin) = origin {
                let registry = Arc::clone(pipeline.registry());
                let (readiness, shutdown) = (self.readiness.clone(), self.shutdown.clone());
                let follow = reload::follow(origin, registry, readiness, shutdown);
                self.shutdown.spawn("the configuration monitor", follow);
            }
            anyhow::Ok((pipeline, watcher))
        };
        let (OpenBroker { broker, channels }, (pipeline, watcher)) =
            tokio::try_join!(broker, plugins)?;
        let fleet = Fleet {
            broker: Arc::clone(&broker),
            registry: Arc::clone(pipeline.registry()),
            node: self.name.clone(),
        };
        // Before ingest begins, so that partitions of a roll-out are decided by its version after a
        // restart as well.
        fleet.start(&self.readiness, &self.shutdown);
        Ok(Started {
            broker,
            channels,
            pipeline,
            watcher,
        })
    }

    /// Opens the broker and starts what follows it: the hub and the broker monitor.
    async fn connect(
        &self,
        choice: &BrokerChoice,
        sources: &[String],
        bridges: &[Bridge],
        retention: &Retention,
    ) -> anyhow::Result<OpenBroker> {
        let (readiness, shutdown) = (&self.readiness, &self.shutdown);
        let opened =
            start::open_broker(choice, sources, bridges, retention, readiness, shutdown).await?;
        let broker = Arc::clone(&opened.broker);
        let hub = Hub::start_within(
            BufferBudget::new(self.stream_timer.config().max_buffer_bytes),
            broker.clone(),
            self.metrics.clone(),
            &self.shutdown,
        );
        self.state.set_broker(Arc::clone(&broker), hub.clone());
        let outage = outage::OutageMonitor {
            broker: broker.clone(),
            hub: hub.clone(),
            stream_timer: self.stream_timer.clone(),
            readiness: self.readiness.clone(),
            node: self.name.clone(),
            advertised: self.advertised.clone(),
            is_tls: self.is_tls,
        };
        self.shutdown
            .spawn("the outage monitor", outage.run(self.shutdown.clone()));
        let watch = monitor::watch(
            broker.clone(),
            hub,
            retention.dead_letter_entries,
            self.metrics.clone(),
            self.readiness.clone(),
            self.shutdown.clone(),
        );
        self.shutdown.spawn("the broker monitor", watch);
        Ok(opened)
    }

    /// Starts to work every partition of the broker.
    fn ingest(&self, started: &Started, config: &worker::Config) {
        for partition in started.broker.partitions() {
            let ingest = Ingest {
                broker: started.broker.clone(),
                pipeline: started.pipeline.clone(),
                metrics: self.metrics.clone(),
                readiness: self.readiness.clone(),
                config: config.clone(),
                node: self.name.clone(),
            };
            let run = ingest.run(partition.clone(), self.shutdown.token());
            self.shutdown.spawn("ingest", run);
        }
    }

    /// Starts the listeners of the bridges.
    fn listen_to_channels(&self, started: &Started, bridges: Vec<Bridge>, config: &worker::Config) {
        let Some(channels) = &started.channels else {
            return;
        };
        for bridge in bridges {
            let partitions = started.broker.partitions().iter();
            let mut into = partitions.filter(|one| one.source == bridge.append_to());
            let Some(partition) = into.next() else {
                continue;
            };
            let listener = Listener {
                bridge,
                partition: partition.number,
                channels: Arc::clone(channels),
                node: self.name.clone(),
                lease_ttl: config.lease_ttl,
                max_event_bytes: config.max_event_bytes,
                metrics: self.metrics.clone(),
                readiness: self.readiness.clone(),
                shutdown: self.shutdown.clone(),
            };
            self.shutdown.spawn("a bridge", listener.run());
        }
    }

    /// Ends the streams, waits for all parts within `grace`, and cuts the rest.
    async fn stop(self, grace: Duration) -> anyhow::Result<()> {
        // Streams end within 80 % of the grace period, which leaves time for their last bytes.
        self.stream_timer.drain(grace.mul_f64(0.8));
        if !self.shutdown.finish(grace).await {
            tracing::warn!(
                ?grace,
                "the grace period ended with unfinished tasks; they are cut"
            );
            self.shutdown.skip();
            // A cut task ends at its next step; only a blocked thread could take longer.
            self.shutdown.finish_cut(Duration::from_secs(1)).await;
        }
        tracing::info!("stopped");
        match self.shutdown.broken() {
            Some(part) => Err(anyhow::anyhow!(
                "{part} panicked (see the log), so the node stopped; start it again and report the bug"
            )),
            None => Ok(()),
        }
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
