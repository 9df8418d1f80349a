//! Channels of Pub/Sub, for bridges: which node listens, and the messages that it receives.
//!
//! A message exists for a moment and has no id. Each channel therefore has one listener at a time,
//! which holds a lease. [`Channels::append_heard`] checks in one step with the append that the
//! listener still holds it, so a message is never appended by two nodes, however late one of them
//! is. Only the Redis broker has channels.

use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;

use super::Result;
use crate::event::PartitionNumber;

/// The channels to which a bridge subscribes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Channel {
    /// The channel with this name.
    Exact(String),
    /// The channels whose names match this pattern (`PSUBSCRIBE`).
    Pattern(String),
    /// The sharded channel with this name (`SSUBSCRIBE`).
    Sharded(String),
}

impl Channel {
    /// The name or the pattern.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Exact(name) | Self::Pattern(name) | Self::Sharded(name) => name,
        }
    }
}

/// The access that a bridge needs in Redis, so that it can be checked before it is needed.
#[derive(Clone, Debug)]
pub struct BridgeAccess {
    /// The name of the bridge.
    pub bridge: String,
    pub channel: Channel,
    /// The key of the source to which it appends.
    pub source: String,
}

/// One session of a node as the listener of a bridge. It never gets a lease again that it lost.
#[derive(Clone, Debug)]
pub struct ListenerSession {
    pub partition: PartitionNumber,
    /// The name of the bridge.
    pub bridge: String,
    /// The name of the node.
    pub node: String,
    /// Unique to this session.
    pub session: String,
}

/// The answer to a request for the lease of a bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenerLease {
    Mine {
        /// Whether another session held the lease before and did not release it.
        is_taken_over: bool,
        /// The time since a listener was last known to be subscribed, by the clock of the broker.
        /// Zero if there was never one.
        unheard: Duration,
    },
    /// Another session holds it for at most `left`.
    Others { node: String, left: Duration },
}

/// The result of [`Channels::append_heard`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeardAppend {
    Done,
    /// Another session has taken the lease. Nothing was appended.
    LeaseLost,
}

/// A message of a channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChannelMessage {
    /// The name of the channel, which is untrusted.
    pub channel: Bytes,
    /// `None` if it was larger than the limit of the subscription.
    pub body: Option<Bytes>,
}

/// A connection that receives the messages of channels.
#[async_trait]
pub trait Subscription: Send {
    /// Waits for further messages, in the order in which they were published. Cancel-safe. Also
    /// returns without messages, at least every second, when the connection shows that it works. While it
    /// is not called, the connection is not read, and Redis cuts it when its buffer is full
    /// (`client-output-buffer-limit pubsub`).
    ///
    /// # Errors
    /// The connection was lost. Messages published since are missed.
    async fn next(&mut self) -> Result<Vec<ChannelMessage>>;

    /// When the connection last showed that it works.
    fn last_alive(&self) -> Instant;

    /// Asks Redis for an answer behind every message that was published before the call. Once
    /// [`Subscription::is_drained`] is true, [`Subscription::next`] has returned all of them.
    fn drain(&mut self);

    fn is_drained(&self) -> bool;
}

/// See the head of this file.
#[async_trait]
pub trait Channels: std::fmt::Debug + Send + Sync + 'static {
    /// Takes or renews the lease of a bridge for `ttl`. `silent`: the time since the subscription
    /// of this session last showed that it works; `None` if there is none.
    async fn lease_listener(
        &self,
        session: &ListenerSession,
        silent: Option<Duration>,
        ttl: Duration,
    ) -> Result<ListenerLease>;

    /// Ends the lease of this session, if it holds it. `silent`: as in
    /// [`Channels::lease_listener`].
    async fn release_listener(
        &self,
        session: &ListenerSession,
        silent: Option<Duration>,
    ) -> Result<()>;

    /// Appends entries to the source in order, if this session holds the lease. `first` is the
    /// number of the first entry, counted from 1 in each session: entries that an earlier attempt
    /// appended are skipped, so a call whose result is in doubt can be repeated.
    ///
    /// # Errors
    /// [`super::Error::Full`] if the backlog is at its limit; nothing was appended.
    async fn append_heard(
        &self,
        session: &ListenerSession,
        first: u64,
        entries: &[Vec<(Bytes, Bytes)>],
    ) -> Result<HeardAppend>;

    /// Subscribes to a channel. Messages published after it returns are received, except those of
    /// the broker itself. Messages larger
    /// than `max_bytes` are received without their body.
    async fn subscribe(&self, channel: &Channel, max_bytes: usize)
    -> Result<Box<dyn Subscription>>;
}
