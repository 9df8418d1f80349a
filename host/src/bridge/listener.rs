//! The listener of a bridge on this node: waits for the lease, subscribes, and appends what it
//! receives.
//!
//! The node subscribes only when it has the lease, and an append checks the lease. A message that it
//! receives was therefore published after the node before lost the right to append: no message is
//! appended by both. A session that lost its lease never appends again, however late it is. A
//! shutdown first receives what was already published, then appends it, and then releases the
//! lease.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::metrics::counter::Counter;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::conversion::{Fields, Rejection};
use super::queue::{self, Receiver, Sender};
use super::settings::Bridge;
use crate::backoff::Backoff;
use crate::broker::{
    ChannelMessage, Channels, Error, HeardAppend, ListenerLease, ListenerSession, Subscription,
};
use crate::event::PartitionNumber;
use crate::shutdown::Shutdown;
use crate::telemetry::metrics::{BridgeLabel, BridgeMessageLabel, Metrics};
use crate::telemetry::readiness::Readiness;

/// How often a node without the lease asks for it: the pause of a bridge after a node is shut down.
const ASK_EVERY: Duration = Duration::from_millis(250);
/// The longest time between two renewals of the lease.
const RENEW_AT_LEAST_EVERY: Duration = Duration::from_secs(1);
/// The pauses between attempts of a node.
const BACKOFF: Backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2), 0.5..=1.0);
/// A connection that lasted this long was not cut because it was made.
const SETTLED: Duration = Duration::from_secs(3);
/// How long a node that cannot subscribe leaves the lease to others.
const GIVE_UP_FOR: Duration = Duration::from_secs(2);
/// How long an error reported by the broker stays in readiness without a repetition: longer than
/// the longest pause.
const ERROR_SHOWN_FOR: Duration = Duration::from_secs(5);
/// The least time between two log lines of a kind.
const LOG_EVERY: Duration = Duration::from_secs(60);

/// The dependencies of a listener.
pub struct Listener {
    pub bridge: Bridge,
    /// The partition of [`Bridge::append_to`].
    pub partition: PartitionNumber,
    pub channels: Arc<dyn Channels>,
    /// The name of this node.
    pub node: String,
    pub lease_ttl: Duration,
    pub max_event_bytes: usize,
    pub metrics: Metrics,
    pub readiness: Readiness,
    pub shutdown: Shutdown,
}

/// The state of the subscription, for the renewals of the lease.
#[derive(Default)]
struct Link {
    state: Mutex<LinkState>,
    changed: Notify,
}

#[derive(Clone, Copy, Default)]
struct LinkState {
    /// When the subscription last showed that it works; `None` while there is none.
    last_alive: Option<Instant>,
    /// Whether the time without a listener before it is not counted yet.
    is_new: bool,
}

impl LinkState {
    fn silent(self) -> Option<Duration> {
        self.last_alive.map(|at| at.elapsed())
    }
}

impl Link {
    fn get(&self) -> LinkState {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut LinkState)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Log lines about messages, at most one of each kind per [`LOG_EVERY`].
#[derive(Default)]
struct Complaints(Mutex<Vec<(&'static str, Instant, u64)>>);

impl Complaints {
    /// Returns how many there were since the last line of this kind, including this one, if it is
    /// time for a line.
    fn note(&self, kind: &'static str) -> Option<u64> {
        let mut kinds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match kinds.iter_mut().find(|(known, ..)| *known == kind) {
            None => {
                kinds.push((kind, Instant::now(), 0));
                Some(1)
            }
            Some((_, at, n)) if at.elapsed() >= LOG_EVERY => {
                *at = Instant::now();
                Some(std::mem::take(n) + 1)
            }
            Some((.., n)) => {
                *n += 1;
                None
            }
        }
    }
}

impl Listener {
    /// Runs until the shutdown begins; then it appends what was received and releases the lease.
    pub async fn run(self) {
        let label = self.label();
        self.metrics.bridge_listening.get_or_create(&label).set(0);
        let complaints = Complaints::default();
        let mut backoff = BACKOFF;
        while !self.shutdown.has_begun() {
            let session = self.session();
            let lease = self.channels.lease_listener(&session, None, self.lease_ttl);
            let pause = match lease.await {
                Ok(ListenerLease::Others { node, left }) => {
                    backoff.reset();
                    self.note(format!("node {node} listens"));
                    left.clamp(Duration::from_millis(20), ASK_EVERY)
                }
                Ok(ListenerLease::Mine { is_taken_over, .. }) => {
                    backoff.reset();
                    if is_taken_over {
                        self.metrics.bridge_takeovers.get_or_create(&label).inc();
                        tracing::warn!(bridge.name = %self.bridge.name(), "the node that listened did not release its lease; this node takes over");
                    }
                    if self.listen(&session, &complaints).await {
                        Duration::ZERO
                    } else {
                        GIVE_UP_FOR
                    }
                }
                Err(error) => {
                    self.report("cannot take the lease of a bridge", &error);
                    backoff.pause()
                }
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.shutdown.begun() => {}
            }
        }
    }

    fn label(&self) -> BridgeLabel {
        BridgeLabel {
            bridge: self.bridge.name().to_string(),
        }
    }

    fn session(&self) -> ListenerSession {
        ListenerSession {
            partition: self.partition,
            bridge: self.bridge.name().to_string(),
            node: self.node.clone(),
            session: format!("{:032x}", rand::random::<u128>()),
        }
    }

    /// Listens until the lease is lost or the shutdown has begun and everything is appended. Returns
    /// `false` if this node could not subscribe, so that another one should listen.
    async fn listen(&self, session: &ListenerSession, complaints: &Complaints) -> bool {
        self.note("this node connects".into());
        let (sender, mut receiver) = queue::new();
        let (link, ended) = (Link::default(), CancellationToken::new());
        let ((), has_subscribed, ()) = tokio::join!(
            self.keep_lease(session, &link, &ended),
            self.receive(sender, &link, &ended, complaints),
            self.append(session, &mut receiver, &ended, complaints),
        );
        self.set_listening(false);
        self.count("lost", receiver.clear());
        if let Err(error) = self
            .channels
            .release_listener(session, link.get().silent())
            .await
        {
            tracing::debug!(bridge.name = %self.bridge.name(), %error, "cannot release the lease; it will expire");
        }
        has_subscribed
    }

    /// Renews the lease until `ended`, which it causes if another session has the lease.
    async fn keep_lease(&self, session: &ListenerSession, link: &Link, ended: &CancellationToken) {
        let every = (self.lease_ttl / 3).min(RENEW_AT_LEAST_EVERY);
        loop {
            tokio::select! {
                () = tokio::time::sleep(every) => {}
                () = link.changed.notified() => {}
                () = ended.cancelled() => return,
            }
            let state = link.get();
            let lease = self
                .channels
                .lease_listener(session, state.silent(), self.lease_ttl);
            match lease.await {
                Ok(ListenerLease::Mine { unheard, .. }) => {
                    if state.is_new && state.last_alive.is_some() {
                        link.change(|state| state.is_new = false);
                        self.count_unheard(unheard);
                    }
                }
                Ok(ListenerLease::Others { node, .. }) => {
                    tracing::warn!(bridge.name = %self.bridge.name(), node.name = %node, "lost the lease; another node listens");
                    return ended.cancel();
                }
                // The append reports it as well. A lease that was not renewed is not a reason to
                // stop, as long as no other node has taken it.
                Err(error) => {
                    tracing::debug!(bridge.name = %self.bridge.name(), %error, "cannot renew the lease")
                }
            }
        }
    }

    fn count_unheard(&self, unheard: Duration) {
        self.metrics
            .bridge_unheard
            .get_or_create(&self.label())
            .inc_by(unheard.as_secs_f64());
        let unheard_ms = unheard.as_millis() as u64;
        if unheard_ms > 0 {
            tracing::warn!(bridge.name = %self.bridge.name(), unheard_ms, "no node was subscribed for up to this time; messages published meanwhile are missed");
        } else {
            tracing::info!(bridge.name = %self.bridge.name(), channel = %self.bridge.channel().as_str(), "this node listens");
        }
    }

    /// Receives messages into the queue until `ended` or the shutdown, and subscribes again after
    /// each failure. Returns `false` if that failed for as long as the lease lasts.
    async fn receive(
        &self,
        mut sender: Sender,
        link: &Link,
        ended: &CancellationToken,
        complaints: &Complaints,
    ) -> bool {
        let mut backoff = BACKOFF;
        let mut failing_since = Instant::now();
        loop {
            let subscribe = self
                .channels
                .subscribe(self.bridge.channel(), self.max_event_bytes);
            let subscribed = tokio::select! {
                subscribed = subscribe => subscribed,
                () = self.shutdown.begun() => return true,
                () = ended.cancelled() => return true,
            };
            match subscribed {
                Err(error) => {
                    self.report("cannot subscribe to the channel of a bridge", &error);
                    if failing_since.elapsed() >= self.lease_ttl {
                        return false;
                    }
                }
                Ok(mut subscription) => {
                    let began = Instant::now();
                    link.change(|state| {
                        (state.last_alive, state.is_new) = (Some(began), true);
                    });
                    link.changed.notify_one();
                    self.set_listening(true);
                    let forward =
                        self.forward(subscription.as_mut(), &mut sender, link, ended, complaints);
                    let Err(error) = forward.await else {
                        return true;
                    };
                    failing_since = Instant::now();
                    self.set_listening(false);
                    link.change(|state| state.last_alive = None);
                    self.metrics
                        .bridge_connections_lost
                        .get_or_create(&self.label())
                        .inc();
                    tracing::warn!(bridge.name = %self.bridge.name(), %error, "the connection to the channel was lost");
                    if began.elapsed() >= SETTLED {
                        backoff.reset();
                    }
                }
            }
            tokio::select! {
                () = tokio::time::sleep(backoff.pause()) => {}
                () = self.shutdown.begun() => return true,
                () = ended.cancelled() => return true,
            }
        }
    }

    /// Moves messages from a subscription into the queue until `ended`, or until everything is
    /// received that was published before the shutdown.
    async fn forward(
        &self,
        subscription: &mut dyn Subscription,
        sender: &mut Sender,
        link: &Link,
        ended: &CancellationToken,
        complaints: &Complaints,
    ) -> Result<(), Error> {
        let mut is_draining = false;
        while !subscription.is_drained() {
            let messages = tokio::select! {
                messages = subscription.next() => messages?,
                () = self.shutdown.begun(), if !is_draining => {
                    is_draining = true;
                    subscription.drain();
                    continue;
                }
                () = ended.cancelled() => return Ok(()),
            };
            link.change(|state| state.last_alive = Some(subscription.last_alive()));
            for message in messages {
                if !sender.send(message).await {
                    self.count("overflow", 1);
                    if let Some(n) = complaints.note("overflow") {
                        tracing::warn!(bridge.name = %self.bridge.name(), n, "messages arrive faster than they can be appended and were dropped; look at the backlog of the source and at the load of Redis");
                    }
                }
            }
        }
        Ok(())
    }

    /// Appends messages from the queue until it is closed and empty, or until the lease is lost.
    /// Then it causes `ended`.
    async fn append(
        &self,
        session: &ListenerSession,
        receiver: &mut Receiver,
        ended: &CancellationToken,
        complaints: &Complaints,
    ) {
        let mut first = 1;
        loop {
            let batch = tokio::select! {
                batch = receiver.batch() => batch,
                () = ended.cancelled() => None,
            };
            let Some(batch) = batch else { break };
            let messages = batch.messages();
            let entries: Vec<Fields> = messages
                .filter_map(|message| self.fields(message, complaints))
                .collect();
            if entries.is_empty() {
                continue;
            }
            if !self.append_all(session, first, &entries, ended).await {
                self.count("lost", entries.len());
                break;
            }
            self.count("appended", entries.len());
            first += entries.len() as u64;
        }
        ended.cancel();
    }

    /// Appends entries, repeatedly while the broker fails. Returns `false` if the lease is lost or
    /// the node must stop.
    async fn append_all(
        &self,
        session: &ListenerSession,
        first: u64,
        entries: &[Fields],
        ended: &CancellationToken,
    ) -> bool {
        let mut backoff = BACKOFF;
        loop {
            match self.channels.append_heard(session, first, entries).await {
                Ok(HeardAppend::Done) => return true,
                Ok(HeardAppend::LeaseLost) => {
                    tracing::warn!(bridge.name = %self.bridge.name(), "another node has taken the lease; messages that this node had received are dropped");
                    return false;
                }
                Err(error) => self.report("cannot append the messages of a bridge", &error),
            }
            tokio::select! {
                () = tokio::time::sleep(backoff.pause()) => {}
                () = ended.cancelled() => return false,
                () = self.shutdown.skipped() => return false,
            }
        }
    }

    fn fields(&self, message: &ChannelMessage, complaints: &Complaints) -> Option<Fields> {
        let rejection = match self.bridge.fields(message, self.max_event_bytes) {
            Ok(fields) => return Some(fields),
            Err(rejection) => rejection,
        };
        let (outcome, why) = match rejection {
            Rejection::Unresolved(why) => ("unresolved", why),
            Rejection::Invalid(why) => ("invalid", why),
            Rejection::TooLarge(why) => ("too_large", why),
        };
        self.count(outcome, 1);
        if let Some(n) = complaints.note(outcome) {
            tracing::warn!(bridge.name = %self.bridge.name(), n, "a message did not become an event: {why}");
        }
        None
    }

    fn count(&self, outcome: &'static str, n_messages: usize) {
        let label = BridgeMessageLabel {
            bridge: self.bridge.name().to_string(),
            outcome,
        };
        let counter: Counter = self.metrics.bridge_messages.get_or_create_owned(&label);
        counter.inc_by(n_messages as u64);
    }

    fn set_listening(&self, is_listening: bool) {
        self.metrics
            .bridge_listening
            .get_or_create(&self.label())
            .set(i64::from(is_listening));
        self.note(if is_listening {
            "this node listens".into()
        } else {
            "this node does not listen at present".into()
        });
    }

    fn note(&self, text: String) {
        self.readiness.note(&self.line(), text);
    }

    /// The broker monitor reports an outage; anything else is reported here.
    fn report(&self, what: &str, error: &Error) {
        match error {
            Error::Unavailable(_) => {
                tracing::debug!(bridge.name = %self.bridge.name(), %error, "{what}")
            }
            // Streams and publishers over HTTP can still use this node.
            Error::Full(_) => {
                self.readiness
                    .warn_for(&self.line(), error.to_string(), ERROR_SHOWN_FOR);
            }
            Error::Permanent(_) | Error::TooManyGroups { .. } => {
                self.readiness
                    .set_for(&self.line(), error.to_string(), ERROR_SHOWN_FOR);
            }
        }
    }

    /// The name of its lines in readiness.
    fn line(&self) -> String {
        format!("bridges.{}", self.bridge.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_of_a_kind_are_counted_between_their_log_lines() {
        let complaints = Complaints::default();
        assert_eq!(complaints.note("invalid"), Some(1));
        assert_eq!(complaints.note("overflow"), Some(1));
        assert_eq!(complaints.note("invalid"), None);
        assert_eq!(complaints.note("invalid"), None);
        for kind in complaints.0.lock().unwrap().iter_mut() {
            kind.1 = Instant::now().checked_sub(2 * LOG_EVERY).unwrap();
        }
        assert_eq!(complaints.note("invalid"), Some(3));
        assert_eq!(complaints.note("overflow"), Some(1));
    }
}
