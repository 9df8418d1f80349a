//! The outage monitor: closes the streams of a node that has lost the broker while another node has
//! it, so that their clients reconnect there.
//!
//! A client cannot see whether its node receives notifications: heartbeats go on during an outage.
//! The node decides for it, by asking the nodes that it last read from the broker. If one of them
//! is ready, the streams close, spread over some seconds, and new ones are refused. If none is, or
//! none is known, the outage is everywhere: the streams stay open and resume when it is over.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use ureq::tls::TlsConfig;

use crate::broker::{Advertised, Error, Operations, Peer};
use crate::delivery::hub::Hub;
use crate::delivery::sse::StreamTimer;
use crate::shutdown::Shutdown;
use crate::telemetry::readiness::Readiness;

/// Interval between registrations, well below [`crate::broker::REGISTERED_FOR`].
const REGISTER_EVERY: Duration = Duration::from_secs(2);
/// Interval between attempts while the broker does not answer.
const RETRY_EVERY: Duration = Duration::from_secs(1);
/// An outage up to this long closes no stream. Longer than a ready node may be without a tick by
/// more than a second ([`crate::delivery::hub::FRESH`]): when the broker fails for all nodes, none
/// is ready any more when the first one asks.
const TOLERATED: Duration = Duration::from_secs(5);
/// Another node must be ready this many times in a row before streams close.
const CONFIRMATIONS: u32 = 2;
/// None must be ready this many times in a row before new streams are accepted again: a node that
/// is busy may miss the deadline of a probe.
const DENIALS: u32 = 3;
/// The most nodes asked at a time.
const MAX_PROBED: usize = 8;
/// The deadline of a probe.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// See the head of this file.
pub(super) struct OutageMonitor {
    pub(super) broker: Arc<dyn Operations>,
    pub(super) hub: Hub,
    pub(super) stream_timer: StreamTimer,
    pub(super) readiness: Readiness,
    /// The name of this node.
    pub(super) node: String,
    pub(super) advertised: Advertised,
    /// Whether the public listeners of the nodes use TLS.
    pub(super) is_tls: bool,
}

impl OutageMonitor {
    /// Runs until the shutdown begins.
    pub(super) async fn run(self, shutdown: Shutdown) {
        let mut peers: Vec<Peer> = Vec::new();
        let mut failing_since: Option<Instant> = None;
        let (mut n_ready, mut n_unready) = (0, 0);
        loop {
            match self
                .broker
                .register_node(&self.node, &self.advertised)
                .await
            {
                Ok(found) => (peers, failing_since) = (found, None),
                Err(error) => {
                    tracing::debug!(%error, "cannot register this node with the broker");
                    // Any other error is an answer.
                    failing_since = match error {
                        Error::Unavailable(_) => failing_since.or_else(|| Some(Instant::now())),
                        Error::Full(_) | Error::Permanent(_) | Error::TooManyGroups { .. } => None,
                    };
                }
            }
            let failing = failing_since.map_or(Duration::ZERO, |since| since.elapsed());
            let is_outage = failing.max(self.hub.silence()) >= TOLERATED;
            (n_ready, n_unready) = if !is_outage {
                (0, DENIALS)
            } else if is_one_ready(&peers, self.is_tls).await {
                (n_ready + 1, 0)
            } else {
                (0, n_unready + 1)
            };
            if n_ready >= CONFIRMATIONS {
                self.stream_timer.begin_outage();
                self.readiness.set("streams", "another node has the broker, so this node closes its streams and accepts none; see broker and feed");
            } else if n_unready >= DENIALS {
                self.stream_timer.end_outage();
                self.readiness.clear("streams");
            }
            let pause = if failing_since.is_some() || is_outage {
                RETRY_EVERY
            } else {
                REGISTER_EVERY
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = shutdown.begun() => return,
            }
        }
    }
}

/// Whether one of some random nodes among `peers` is ready.
async fn is_one_ready(peers: &[Peer], is_tls: bool) -> bool {
    let mut probes = JoinSet::new();
    for at in rand::seq::index::sample(&mut rand::rng(), peers.len(), peers.len().min(MAX_PROBED)) {
        let peer = peers[at].clone();
        // On the blocking pool: the client waits on its thread.
        probes.spawn_blocking(move || is_ready(&peer, is_tls));
    }
    while let Some(answer) = probes.join_next().await {
        if answer.is_ok_and(|is_ready| is_ready) {
            return true;
        }
    }
    false
}

/// Asks a node whether it is ready and has this name: an address may lead to another node, or to
/// this one.
fn is_ready(peer: &Peer, is_tls: bool) -> bool {
    let scheme = if is_tls { "https" } else { "http" };
    // Nodes reach one another by addresses that their certificate need not name. The answer is no
    // more than a hint, and no secret is sent.
    let tls = TlsConfig::builder().disable_verification(true).build();
    let config = ureq::Agent::config_builder()
        .tls_config(tls)
        .http_status_as_error(false)
        .max_redirects(0)
        .timeout_global(Some(PROBE_TIMEOUT))
        // Ignores the proxy variables of the environment.
        .proxy(None);
    let answer = config
        .build()
        .new_agent()
        .get(format!("{scheme}://{}/v1/ready", peer.address))
        .query("node", &peer.name)
        .call();
    answer.is_ok_and(|answer| answer.status() == 200)
}
