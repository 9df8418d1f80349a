//! The state that the handlers of a node share, and the bounds on what they hold at once.

use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use super::body::BodyBudget;
use super::turns::Turns;
use super::{ApiError, Origins};
use crate::auth::Auth;
use crate::broker::Broker;
use crate::delivery::device_cursors::DeviceCursors;
use crate::delivery::hub::Hub;
use crate::delivery::sse::StreamTimer;
use crate::event::Name;
use crate::ingest::pipeline::Pipeline;
use crate::rate::{Bucket, Rate};
use crate::rollout::Fleet;
use crate::server::{ClientAddresses, ResponseBudget};
use crate::telemetry::metrics::Metrics;
use crate::telemetry::readiness::Readiness;

/// The maximum number of concurrent admin commands.
const MAX_ADMIN_COMMANDS: usize = 8;

/// The maximum number of concurrent dry runs. They are evaluated one event at a time.
const MAX_DRY_RUNS: usize = 8;

/// The `[limits]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// The maximum size of one event with all its fields, in bytes. Set by
    /// `ingest.max_event_bytes`; not a key of this section.
    #[serde(skip)]
    pub event_bytes: usize,
    /// The number of waiting entries of a source at which publishing is refused with 429
    /// (1,000,000).
    pub backlog_entries: u64,
    /// The maximum size of a batch in bytes (4 MiB).
    pub batch_bytes: usize,
    /// The maximum number of events in a batch (10,000).
    pub batch_events: usize,
    /// Events per second that may be published by HTTP with the API key, in bursts of up to ten
    /// seconds' worth (0: any number). Further requests are refused with 429.
    pub publish_rate: u32,
    /// The maximum number of concurrent publish requests (64). Further requests wait up to
    /// `publish_wait` and are then refused with 503.
    pub publish_requests: usize,
    /// How long a publish request waits for its turn (5s).
    #[serde(with = "crate::duration")]
    pub publish_wait: Duration,
    /// Time to send a request body (30s).
    #[serde(with = "crate::duration")]
    pub body_timeout: Duration,
    /// Time after which a body is refused if no byte of it has arrived meanwhile (10s).
    #[serde(with = "crate::duration")]
    pub body_stall_timeout: Duration,
    /// The maximum number of bytes of all request bodies under way on the public listener (64 MiB).
    /// The bodies on one connection hold at most an eighth of them, or one batch.
    pub body_bytes: usize,
    /// How long a read of notifications waits for the broker (5s).
    #[serde(with = "crate::duration")]
    pub read_wait: Duration,
    /// The maximum number of bytes of all responses under way on a listener, streams excepted
    /// (128 MiB). One user or connection holds at most an eighth of them.
    pub response_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            event_bytes: 256 * 1024,
            backlog_entries: 1_000_000,
            batch_bytes: 4 * 1024 * 1024,
            batch_events: 10_000,
            publish_rate: 0,
            publish_requests: 64,
            publish_wait: Duration::from_secs(5),
            body_timeout: Duration::from_secs(30),
            body_stall_timeout: Duration::from_secs(10),
            body_bytes: 64 * 1024 * 1024,
            read_wait: Duration::from_secs(5),
            response_bytes: 128 * 1024 * 1024,
        }
    }
}

/// The state that the handlers of a node share.
#[derive(Debug)]
pub struct State {
    /// The name of this node.
    pub(super) node: String,
    /// Empty until the broker has answered once: the listeners start before that.
    pub(super) broker: OnceLock<Arc<dyn Broker>>,
    /// Set together with the broker.
    pub(super) hub: OnceLock<Hub>,
    /// Set together with the broker.
    pub(super) device_cursors: OnceLock<DeviceCursors>,
    /// For dry runs and for the plugin routes; empty until the plugins are loaded.
    pub(super) pipeline: OnceLock<Pipeline>,
    pub(super) stream_timer: StreamTimer,
    pub(super) auth: Auth,
    pub(super) readiness: Readiness,
    pub(super) metrics: Metrics,
    pub(super) limits: Limits,
    pub(super) default_type: Option<Name>,
    pub(super) origins: Origins,
    pub(super) addresses: ClientAddresses,
    /// Bounds the publish requests whose events are parsed and stored.
    pub(super) publishing: Semaphore,
    /// The order in which large publish requests are appended.
    pub(super) turns: Turns,
    /// The rest of `limits.publish_rate`.
    pub(super) publish_rate: Option<Mutex<Bucket>>,
    /// Bounds the dry runs, which take none of the places of publish requests.
    pub(super) dry_running: Semaphore,
    /// Bounds the request bodies on the public listener.
    pub(super) bodies: BodyBudget,
    /// Bounds the responses under way on the public listener.
    pub(super) responses: ResponseBudget,
    /// The same on the admin listener, so that neither listener takes the bytes of the other.
    pub(super) admin_responses: ResponseBudget,
    /// One plugin upload at a time: a file may be large, and compiling it takes a processor for
    /// seconds.
    pub(super) uploading: Arc<Semaphore>,
    /// Bounds the admin commands that run or wait for one another.
    pub(super) ordering: Arc<Semaphore>,
    /// One backtest at a time.
    pub(super) backtesting: Semaphore,
}

/// The part of the configuration that the handlers use.
#[derive(Debug)]
pub struct Settings {
    /// The name of this node.
    pub node: String,
    pub auth: Auth,
    pub origins: Origins,
    pub addresses: ClientAddresses,
    pub limits: Limits,
    /// The type of published events that have none.
    pub default_type: Option<Name>,
}

impl State {
    pub fn new(
        settings: Settings,
        readiness: Readiness,
        metrics: Metrics,
        stream_timer: StreamTimer,
    ) -> Self {
        let Settings {
            node,
            auth,
            origins,
            addresses,
            limits,
            default_type,
        } = settings;
        let publishing = Semaphore::new(limits.publish_requests.clamp(1, Semaphore::MAX_PERMITS));
        let publish_rate = Rate::new(limits.publish_rate);
        let publish_rate = publish_rate.map(|rate| Mutex::new(Bucket::full(rate, Instant::now())));
        let bodies = BodyBudget::new(&limits);
        let responses = ResponseBudget::new(limits.response_bytes);
        let admin_responses = ResponseBudget::new(limits.response_bytes);
        Self {
            node,
            broker: OnceLock::new(),
            hub: OnceLock::new(),
            device_cursors: OnceLock::new(),
            pipeline: OnceLock::new(),
            stream_timer,
            auth,
            readiness,
            metrics,
            limits,
            default_type,
            origins,
            addresses,
            publishing,
            turns: Turns::default(),
            publish_rate,
            dry_running: Semaphore::new(MAX_DRY_RUNS),
            bodies,
            responses,
            admin_responses,
            uploading: Arc::new(Semaphore::new(1)),
            ordering: Arc::new(Semaphore::new(MAX_ADMIN_COMMANDS)),
            backtesting: Semaphore::new(1),
        }
    }

    /// Sets the broker and the hub that follows it. Later calls are ignored.
    pub fn set_broker(&self, broker: Arc<dyn Broker>, hub: Hub) {
        // The hub is set last: a handler that sees it finds the other two as well.
        let device_cursors = DeviceCursors::new(broker.clone());
        if self.broker.set(broker).is_err()
            || self.device_cursors.set(device_cursors).is_err()
            || self.hub.set(hub).is_err()
        {
            tracing::debug!("the broker is already set; a second one is ignored");
        }
    }

    /// Sets the pipeline. Later calls are ignored.
    pub fn set_pipeline(&self, pipeline: Pipeline) {
        if self.pipeline.set(pipeline).is_err() {
            tracing::debug!("the pipeline is already set; a second one is ignored");
        }
    }

    /// The hub, or `None` until the broker has answered once.
    pub fn hub(&self) -> Option<&Hub> {
        self.hub.get()
    }

    /// The device cursors and read markers of users.
    ///
    /// # Errors
    /// 503 until the broker has answered once.
    pub fn device_cursors(&self) -> Result<&DeviceCursors, ApiError> {
        self.device_cursors
            .get()
            .ok_or_else(|| ApiError::unavailable("this node has not reached its broker yet"))
    }

    /// The pipeline of loaded plugins.
    ///
    /// # Errors
    /// 503 until the plugins are loaded.
    pub fn pipeline(&self) -> Result<&Pipeline, ApiError> {
        self.pipeline
            .get()
            .ok_or_else(|| ApiError::unavailable("this node is still loading its plugins"))
    }

    /// The addresses of clients with something in progress.
    pub fn addresses(&self) -> &ClientAddresses {
        &self.addresses
    }

    pub fn stream_timer(&self) -> &StreamTimer {
        &self.stream_timer
    }

    /// The broker.
    ///
    /// # Errors
    /// 503 until the broker has answered once.
    pub fn broker(&self) -> Result<&Arc<dyn Broker>, ApiError> {
        self.broker
            .get()
            .ok_or_else(|| ApiError::unavailable("this node has not reached its broker yet"))
    }

    /// This node as a member of the fleet.
    ///
    /// # Errors
    /// 503 until the broker has answered once and the plugins are loaded.
    pub fn fleet(&self) -> Result<Fleet, ApiError> {
        Ok(Fleet {
            broker: Arc::clone(self.broker()?),
            registry: Arc::clone(self.pipeline()?.registry()),
            node: self.node.clone(),
        })
    }

    pub fn auth(&self) -> &Auth {
        &self.auth
    }

    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    pub fn readiness(&self) -> &Readiness {
        &self.readiness
    }
}
