//! Channels of applications: the lease of a bridge's listener, its appends, and a connection that
//! receives messages.

use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use redis::ConnectionInfo;
use tokio::time::{sleep_until, timeout};

use super::command_connection::{DEADLINE, unexpected};
use super::prefix::Prefix;
use super::pubsub_connection::PubSubConnection;
use super::resp::{Decoder, Element, Frame, encode};
use super::{Redis, add_fields, scripts};
use crate::broker::{
    Channel, ChannelMessage, Channels, Error, HeardAppend, ListenerLease, ListenerSession, Result,
    Subscription,
};
use crate::duration::millis;

/// Interval between probes of the connection. Each is answered, so that a connection that lost its
/// peer is noticed.
const PROBE_EVERY: Duration = Duration::from_secs(1);
/// Content of the probe whose answer shows that everything before it was received.
const LAST_PROBE: &[u8] = b"drain";

#[async_trait]
impl Channels for Redis {
    async fn lease_listener(
        &self,
        session: &ListenerSession,
        silent: Option<Duration>,
        ttl: Duration,
    ) -> Result<ListenerLease> {
        let (is_mine, is_taken_over, ms, node): (bool, bool, u64, Vec<u8>) = self
            .run(
                self.keys(session.partition)?,
                &scripts::BRIDGE_LEASE,
                |command| {
                    command
                        .arg(&session.bridge)
                        .arg(&session.session)
                        .arg(silent_ms(silent))
                        .arg(&session.node)
                        .arg(millis(ttl).max(1));
                },
            )
            .await?;
        let time = Duration::from_millis(ms);
        Ok(if is_mine {
            ListenerLease::Mine {
                is_taken_over,
                unheard: time,
            }
        } else {
            ListenerLease::Others {
                node: String::from_utf8_lossy(&node).into_owned(),
                left: time,
            }
        })
    }

    async fn release_listener(
        &self,
        session: &ListenerSession,
        silent: Option<Duration>,
    ) -> Result<()> {
        self.run(
            self.keys(session.partition)?,
            &scripts::BRIDGE_RELEASE,
            |command| {
                command
                    .arg(&session.bridge)
                    .arg(&session.session)
                    .arg(silent_ms(silent));
            },
        )
        .await
    }

    async fn append_heard(
        &self,
        session: &ListenerSession,
        first: u64,
        entries: &[Vec<(Bytes, Bytes)>],
    ) -> Result<HeardAppend> {
        let keys = self.keys(session.partition)?;
        let (word, waiting): (String, u64) = self
            .run(keys, &scripts::BRIDGE_APPEND, |command| {
                command
                    .arg(&session.bridge)
                    .arg(&session.session)
                    .arg(first)
                    .arg(entries.len());
                for fields in entries {
                    add_fields(command.arg(2 * fields.len()), fields);
                }
            })
            .await?;
        match word.as_str() {
            "done" => Ok(HeardAppend::Done),
            "lost" => Ok(HeardAppend::LeaseLost),
            "full" => Err(Error::Full(format!(
                "{waiting} entries are waiting in '{}'; try again later",
                keys.partition.source
            ))),
            _ => Err(unexpected(&"a malformed result of an append")),
        }
    }

    async fn subscribe(
        &self,
        channel: &Channel,
        max_bytes: usize,
    ) -> Result<Box<dyn Subscription>> {
        let info = self.client.get_connection_info();
        let opened = ChannelConnection::open(info, &self.prefix, channel, max_bytes);
        let opened = timeout(DEADLINE, opened).await.unwrap_or_else(|_| {
            let why = format!("no answer within {} s", DEADLINE.as_secs());
            Err(Error::Unavailable(why))
        });
        Ok(Box::new(opened?))
    }
}

/// As the scripts expect it: empty without a subscription.
fn silent_ms(silent: Option<Duration>) -> String {
    silent
        .map(millis)
        .map(|ms| ms.to_string())
        .unwrap_or_default()
}

/// A connection that is subscribed to one channel or pattern.
struct ChannelConnection {
    connection: PubSubConnection,
    /// The beginning of the channels of Pointsman. A pattern may match them, and a notice that
    /// became an event would cause another notice.
    own_channels: String,
    last_alive: Instant,
    next_probe: Instant,
    /// When the oldest probe without an answer was sent.
    unanswered: Option<Instant>,
    is_drained: bool,
}

impl ChannelConnection {
    async fn open(
        info: &ConnectionInfo,
        prefix: &Prefix,
        channel: &Channel,
        max_bytes: usize,
    ) -> Result<Self> {
        let mut connection = PubSubConnection::open(info, Decoder::with_limit(max_bytes)).await?;
        let command: &[u8] = match channel {
            Channel::Exact(_) => b"SUBSCRIBE",
            Channel::Pattern(_) => b"PSUBSCRIBE",
            Channel::Sharded(_) => b"SSUBSCRIBE",
        };
        encode(
            &mut connection.output,
            &[command, channel.as_str().as_bytes()],
        );
        connection.flush().await?;
        match connection.frame().await? {
            Frame::Array(_) => {}
            Frame::Error(why) => return Err(refused(&why)),
            Frame::Simple(_) => {
                return Err(Error::Unavailable("unexpected answer to SUBSCRIBE".into()));
            }
        }
        let now = Instant::now();
        Ok(Self {
            connection,
            own_channels: format!("{prefix}:"),
            last_alive: now,
            next_probe: now + PROBE_EVERY,
            unanswered: None,
            is_drained: false,
        })
    }

    /// Takes all complete frames out of the input.
    fn take(&mut self) -> Result<Vec<ChannelMessage>> {
        let mut messages = Vec::new();
        while let Some(frame) = self.connection.received()? {
            let elements = match frame {
                Frame::Array(elements) => elements,
                Frame::Error(why) => return Err(refused(&why)),
                Frame::Simple(_) => continue,
            };
            let mut elements = elements.into_iter();
            let Some(Element::Text(kind)) = elements.next() else {
                continue;
            };
            match &kind[..] {
                b"message" | b"smessage" => {}
                // Its second element is the pattern.
                b"pmessage" => drop(elements.next()),
                b"pong" => {
                    self.unanswered = None;
                    let content = elements.next();
                    self.is_drained |=
                        matches!(content, Some(Element::Text(text)) if &text[..] == LAST_PROBE);
                    continue;
                }
                // The slot of a sharded channel has moved to another node.
                b"sunsubscribe" => {
                    let why = "Redis ended the subscription, because the slot has moved";
                    return Err(Error::Unavailable(why.into()));
                }
                _ => continue,
            }
            let body = |element| match element {
                // Copies, because slices would keep the whole read buffer in memory.
                Element::Text(text) => Some(Some(Bytes::copy_from_slice(&text))),
                Element::TooLong => Some(None),
                Element::Number(_) | Element::Nil => None,
            };
            if let (Some(Element::Text(channel)), Some(body)) =
                (elements.next(), elements.next().and_then(body))
                && !channel.starts_with(self.own_channels.as_bytes())
            {
                let channel = Bytes::copy_from_slice(&channel);
                messages.push(ChannelMessage { channel, body });
            }
        }
        Ok(messages)
    }

    fn probe(&mut self, content: &[u8]) {
        let now = Instant::now();
        encode(&mut self.connection.output, &[b"PING", content]);
        self.next_probe = now + PROBE_EVERY;
        self.unanswered.get_or_insert(now);
    }
}

fn refused(why: &[u8]) -> Error {
    let why = String::from_utf8_lossy(why);
    Error::Permanent(if why.starts_with("NOPERM") {
        format!("{why}; grant it with ACL SETUSER")
    } else if why.starts_with("MOVED") {
        format!("{why}; the URL must name the node that has the slot of the channel")
    } else {
        why.into_owned()
    })
}

#[async_trait]
impl Subscription for ChannelConnection {
    async fn next(&mut self) -> Result<Vec<ChannelMessage>> {
        // Messages that arrived together with the confirmation of the subscription.
        let early = self.take()?;
        if !early.is_empty() || self.is_drained {
            return Ok(early);
        }
        loop {
            // Cancel-safe: what was not written stays in `output`.
            self.connection.flush().await?;
            let (probe_at, lost_at) = (self.next_probe, self.unanswered.map(|at| at + DEADLINE));
            let wake_at = lost_at.map_or(probe_at, |lost_at| lost_at.min(probe_at));
            tokio::select! {
                // Received bytes count before the deadline: the socket was not read meanwhile.
                biased;
                read = self.connection.read() => {
                    read?;
                    self.last_alive = Instant::now();
                    return self.take();
                }
                () = sleep_until(wake_at.into()) => {
                    if lost_at.is_some_and(|at| at <= Instant::now()) {
                        let why = format!("no answer within {} s", DEADLINE.as_secs());
                        return Err(Error::Unavailable(why));
                    }
                    self.probe(b"");
                }
            }
        }
    }

    fn last_alive(&self) -> Instant {
        self.last_alive
    }

    fn drain(&mut self) {
        self.probe(LAST_PROBE);
    }

    fn is_drained(&self) -> bool {
        self.is_drained
    }
}
