//! Pointsman: a WebAssembly-extensible notification router.
//!
//! The modules, in the order in which data flows:
//!
//! - [`event`]: the vocabulary. [`criteria`]: conditions over recipients.
//! - [`broker`]: where events wait, logs live and nodes hear of appends.
//! - [`plugin`]: a loaded plugin, and which there are. [`pipeline`]: the ordered chain of them, folded to one resolution an event.
//! - [`auth`]: who is asking. [`http`]: every route. [`server`]: the accept loop.
//! - [`config`]: from what the user wrote to what the node needs.
//! - [`metrics`], [`readiness`], [`shutdown`]: what every part is handed.
//!
//! [`run`] wires them and stops them.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use tokio::net::TcpListener;

use crate::broker::{Broker, Severity};
use crate::config::{BrokerChoice, Config};
use crate::http::State;
use crate::metrics::Metrics;
use crate::readiness::Readiness;
use crate::server::Bounds;
use crate::shutdown::Shutdown;

pub mod auth;
pub mod broker;
pub mod config;
pub mod criteria;
pub mod event;
pub mod http;
pub mod hub;
pub mod ingest;
pub mod metrics;
pub mod pipeline;
pub mod plugin;
pub mod readiness;
pub mod recipients;
pub mod server;
pub mod shutdown;
pub mod sse;
pub mod subscription;

/// How long between two looks at the broker's health.
const CHECK_EVERY: Duration = Duration::from_secs(5);

/// Connections to the admin listener: probes and scrapers are few.
const MAX_ADMIN_CONNECTIONS: usize = 256;

/// The two listeners of a node, bound.
#[derive(Debug)]
pub struct Listeners {
    pub applications: TcpListener,
    pub admin: TcpListener,
}

impl Listeners {
    /// Binds both addresses; with port 0, to a free one.
    ///
    /// # Errors
    /// An address cannot be bound; the text says which key to change.
    pub fn bind(listen: &server::Config) -> anyhow::Result<Self> {
        let bind = |key, address| server::bind(address).with_context(|| format!("cannot listen on {address}; free it or change {key}"));
        Ok(Self { applications: bind("listen.address", listen.address)?, admin: bind("listen.admin", listen.admin)? })
    }
}

/// Runs a node until `shutdown` begins, and stops it: ingest stops reading, its last commit returns and its leases go; streams end spread
/// over the grace period; requests under way end; what is left is cut.
///
/// # Errors
/// An address cannot be bound, or the embedded broker's folder not be opened. A Redis that cannot be reached is no error: the listeners are
/// up, readiness says why, and it is tried again.
pub async fn run(config: Config, shutdown: Shutdown) -> anyhow::Result<()> {
    let listeners = Listeners::bind(&config.listen)?;
    run_on(listeners, config, shutdown).await
}

/// [`run`], on listeners bound before.
///
/// # Errors
/// As [`run`].
pub async fn run_on(listeners: Listeners, config: Config, shutdown: Shutdown) -> anyhow::Result<()> {
    let Config { node, listen, origins, broker, sources, retention, plugins: _, auth, limits, log: _ } = config;
    let (address, admin) = (listeners.applications.local_addr()?, listeners.admin.local_addr()?);
    // With the port that was bound: two nodes that both asked for any port must not share a name, and with it their leases.
    let node = node.name.map_or_else(|| format!("{}/{address}", host_name()), |name| name.to_string());
    let (metrics, readiness) = (Metrics::default(), Readiness::default());
    metrics.start_time.set(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64());
    readiness.set("broker", "not reached yet");
    if auth.is_dev() {
        tracing::warn!("dev mode: everybody on this machine may read every stream and publish");
    }

    let state = Arc::new(State::new(auth, origins, limits, retention.clone(), readiness.clone(), metrics.clone()));
    let header_timeout = Duration::from_secs(listen.header_timeout_s);
    let bounds = |max_connections| Bounds { max_connections, header_timeout };
    // Up before the broker is: a probe sees the reason, and a publisher 503 instead of a refused connection.
    shutdown.spawn(server::serve(listeners.admin, http::admin_routes(Arc::clone(&state)), bounds(MAX_ADMIN_CONNECTIONS), shutdown.clone()));
    shutdown.spawn(server::serve(
        listeners.applications,
        http::routes(Arc::clone(&state)),
        bounds(listen.max_connections),
        shutdown.clone(),
    ));
    tracing::info!(node.name = node, %address, %admin, "listening");

    let opened = tokio::select! {
        opened = open(&broker, &sources, &retention, &readiness) => Some(opened?),
        () = shutdown.begun() => None,
    };
    if let Some(broker) = opened {
        state.set_broker(Arc::clone(&broker));
        shutdown.spawn(watch(Arc::clone(&broker), readiness.clone(), shutdown.clone()));
        // Here the pipeline loads its plugins, ingest begins to read and the hub to follow; each is handed the broker, the readiness, the
        // metrics and the shutdown.
        shutdown.begun().await;
    }
    let grace = Duration::from_secs(listen.grace_s);
    if !shutdown.finish(grace).await {
        tracing::warn!(grace_s = listen.grace_s, "not everything ended within the grace period; the rest is cut");
        shutdown.skip();
        // What is cut ends at its next step; only a blocked thread could take longer.
        shutdown.finish_cut(Duration::from_secs(1)).await;
    }
    tracing::info!("stopped");
    Ok(())
}

/// Opens the broker. A Redis that is away is tried again, with a growing and jittered pause, until it is there.
async fn open(
    choice: &BrokerChoice,
    sources: &[String],
    retention: &broker::Retention,
    readiness: &Readiness,
) -> anyhow::Result<Arc<dyn Broker>> {
    let _ = (sources, retention, readiness);
    match choice {
        BrokerChoice::Redis { .. } | BrokerChoice::Data(_) | BrokerChoice::Ephemeral => anyhow::bail!("this build has no broker yet"),
    }
}

/// Tries `connect` until it succeeds. Cancel-safe.
async fn reach<F: Future<Output = broker::Result<Arc<dyn Broker>>>>(
    mut connect: impl FnMut() -> F,
    readiness: &Readiness,
) -> Arc<dyn Broker> {
    let mut pause = Duration::from_millis(100);
    loop {
        match connect().await {
            Ok(broker) => return broker,
            Err(error) => readiness.set("broker", error.to_string()),
        }
        tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
        pause = (pause * 2).min(CHECK_EVERY);
    }
}

/// Keeps readiness true to the broker: red while it is away or its settings refuse, with each finding as a line of its own.
async fn watch(broker: Arc<dyn Broker>, readiness: Readiness, shutdown: Shutdown) {
    loop {
        look(broker.as_ref(), &readiness).await;
        tokio::select! {
            () = tokio::time::sleep(CHECK_EVERY) => {}
            () = shutdown.begun() => return,
        }
    }
}

async fn look(broker: &dyn Broker, readiness: &Readiness) {
    match broker.check().await {
        Err(error) => readiness.set("broker", error.to_string()),
        Ok(findings) => {
            readiness.clear("broker");
            let lines: Vec<(String, &broker::Finding)> =
                findings.iter().enumerate().map(|(n, finding)| (format!("broker.{n}"), finding)).collect();
            for (name, finding) in &lines {
                match finding.severity {
                    Severity::Refusal => readiness.set(name, &finding.text),
                    Severity::Warning => readiness.warn(name, &finding.text),
                }
            }
            readiness.retain("broker.", |name| lines.iter().any(|(have, _)| have == name));
        }
    }
}

/// What this machine calls itself.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok().or_else(|| std::env::var("HOSTNAME").ok());
    name.map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).unwrap_or_else(|| "localhost".to_owned())
}
