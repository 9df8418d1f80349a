//! The parts that take time to start: the broker and the plugins.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;

use super::monitor;
use crate::bridge::Bridge;
use crate::broker::embedded::Embedded;
use crate::broker::redis::Redis;
use crate::broker::{Broker, Channels, Retention};
use crate::config::BrokerChoice;
use crate::ingest::pipeline::Pipeline;
use crate::plugin::registry::watcher::Watcher;
use crate::plugin::registry::{Registry, settings};
use crate::plugin::runtime::cache::Cache;
use crate::plugin::{CompileIn, Engine, EngineOptions};
use crate::shutdown::Shutdown;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::readiness::Readiness;

/// Loads the plugins, starts their threads and the plugin watcher.
pub(super) async fn load_plugins(
    plugins: settings::Config,
    cache_folder: Option<PathBuf>,
    compile_in: CompileIn,
    allow_none: bool,
    metrics: &Metrics,
    shutdown: &Shutdown,
) -> anyhow::Result<(Pipeline, Option<Watcher>)> {
    let counting = metrics.clone();
    let load = move || {
        let cache = cache_folder.and_then(|folder| Cache::open_if_safe(&folder, counting.clone()));
        let engine = Engine::with(EngineOptions {
            cache,
            compile_in,
            budget: plugins.compile_budget(),
            metrics: counting.clone(),
        })?;
        Registry::start(engine, plugins, counting)
    };
    let registry = tokio::task::spawn_blocking(load).await;
    let registry = Arc::new(registry.context("panic while loading the plugins")??);
    let pipeline = Pipeline::start(Arc::clone(&registry), allow_none, metrics.clone())
        .context("cannot start the plugin threads")?;
    let watcher = Watcher::start(registry, shutdown.alarm("the plugin watcher"))
        .context("cannot start the thread of the plugin watcher")?;
    Ok((pipeline, watcher))
}

/// An open broker.
pub(super) struct OpenBroker {
    pub(super) broker: Arc<dyn Broker>,
    /// `None` for an embedded broker.
    pub(super) channels: Option<Arc<dyn Channels>>,
}

impl From<Embedded> for OpenBroker {
    fn from(broker: Embedded) -> Self {
        Self {
            broker: Arc::new(broker),
            channels: None,
        }
    }
}

/// Opens the broker. The connection to an unavailable Redis is retried, with a growing and jittered
/// pause, until it succeeds.
pub(super) async fn open_broker(
    choice: &BrokerChoice,
    sources: &[String],
    bridges: &[Bridge],
    retention: &Retention,
    readiness: &Readiness,
    shutdown: &Shutdown,
) -> anyhow::Result<OpenBroker> {
    let (own_sources, retention) = (sources.to_vec(), retention.clone());
    let alarm = shutdown.alarm("the store writer");
    match choice.clone() {
        BrokerChoice::Redis { url, prefix } => {
            let connect = || async {
                let redis = Redis::connect(&url, &prefix, sources, retention.clone()).await?;
                let accesses = bridges.iter().map(Bridge::access).collect();
                let redis = Arc::new(redis.with_bridges(accesses));
                Ok(OpenBroker {
                    broker: redis.clone(),
                    channels: Some(redis),
                })
            };
            Ok(monitor::reach(connect, readiness).await)
        }
        BrokerChoice::Data(folder) => {
            // Recovers the store after a crash: blocks too long for an async thread.
            let opened = tokio::task::spawn_blocking(move || {
                Embedded::open(&folder, &own_sources, retention, alarm)
            })
            .await;
            Ok(opened.context("panic while opening the store")??.into())
        }
        BrokerChoice::Ephemeral => Ok(Embedded::ephemeral(&own_sources, retention, alarm)?.into()),
    }
}
