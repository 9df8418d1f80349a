//! The notice connection of a node: one Pub/Sub connection for all partitions. Redis preserves the
//! order in which messages are published.
//!
//! Notices are delivered in batches. While the receiver does not accept them, the socket is not
//! read; Redis then buffers up to its `client-output-buffer-limit pubsub` and closes the
//! connection, which ends in a [`Notice::Reset`] like any other loss. The receiver decides whether
//! the connection was quiet for too long and requests a new one with [`Follow::Reconnect`].

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::Bytes;
use redis::ConnectionInfo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::command_connection::{BACKOFF, DEADLINE};
use super::pubsub_connection::{PubSubConnection, READ_BYTES};
use super::resp::{Decoder, Element, Frame, encode};
use crate::broker::{Error, Feed, Follow, Notice, Result};
use crate::event::{Name, NotificationId, PartitionNumber, Target};

/// Maximum number of batches waiting for the receiver.
const BATCHES: usize = 64;
/// A connection that lasted this long was not cut because it was made.
const SETTLED: Duration = Duration::from_secs(3);
/// Maximum number of requests taken at once.
const REQUESTS: usize = 256;

/// Connects, subscribes to the ticks and recipient changes of all partitions, and starts delivering
/// notices.
pub(super) async fn open(
    info: &ConnectionInfo,
    partitions: Vec<(String, PartitionNumber)>,
) -> Result<Feed> {
    let session = Session::connect(info, &partitions).await?;
    let (follow, requests) = mpsc::unbounded_channel();
    let (notices_in, notices) = mpsc::channel(BATCHES);
    tokio::spawn(run(info.clone(), partitions, session, requests, notices_in));
    Ok(Feed { follow, notices })
}

/// Why a session ended.
enum End {
    /// The feed was dropped.
    Dropped,
    Lost(String),
}

async fn run(
    info: ConnectionInfo,
    partitions: Vec<(String, PartitionNumber)>,
    mut session: Session,
    mut requests: mpsc::UnboundedReceiver<Follow>,
    notices: mpsc::Sender<Vec<Notice>>,
) {
    let numbers: Vec<PartitionNumber> = partitions.iter().map(|(_, number)| *number).collect();
    let mut backoff = BACKOFF;
    loop {
        let began = Instant::now();
        match session.serve(&mut requests, &notices).await {
            End::Dropped => return,
            End::Lost(why) => tracing::warn!(error = %why, "the notice connection was lost"),
        }
        if began.elapsed() >= SETTLED {
            backoff.reset();
        } else {
            tokio::select! {
                () = tokio::time::sleep(backoff.pause()) => {}
                () = notices.closed() => return,
            }
        }
        session = loop {
            tokio::select! {
                connected = Session::connect(&info, &partitions) => match connected {
                    Ok(session) => break session,
                    Err(error) => tracing::debug!(%error, "the notice connection cannot be established"),
                },
                () = notices.closed() => return,
            }
            tokio::select! {
                () = tokio::time::sleep(backoff.pause()) => {}
                () = notices.closed() => return,
            }
        };
        let Ok(permit) = notices.reserve().await else {
            return;
        };
        // Void the requests made so far before the reset is sent: their senders repeat them when
        // they receive it.
        while requests.try_recv().is_ok() {}
        permit.send(vec![Notice::Reset {
            partitions: numbers.clone(),
        }]);
        tracing::info!("the notice connection was re-established");
    }
}

/// The kind of messages on a channel.
#[derive(Clone, Debug)]
enum Channel {
    Log(PartitionNumber, Target),
    Tick(PartitionNumber),
    Recipients(PartitionNumber),
}

/// One connection.
struct Session {
    connection: PubSubConnection,
    channels: HashMap<Bytes, Channel>,
    /// The channel prefix of each partition.
    prefixes: HashMap<PartitionNumber, String>,
    /// The requests without an answer, oldest first, with the token to confirm, if any. Redis
    /// answers in the order of the requests, so an answer always belongs to the oldest one and is
    /// never mistaken for that to a later request about the same log.
    unanswered: VecDeque<Option<u64>>,
}

impl Session {
    /// Opens a connection that receives the ticks and recipient changes of all partitions.
    async fn connect(
        info: &ConnectionInfo,
        partitions: &[(String, PartitionNumber)],
    ) -> Result<Self> {
        let connected = timeout(DEADLINE, async {
            let mut session = Self {
                connection: PubSubConnection::open(info, Decoder::default()).await?,
                channels: HashMap::new(),
                prefixes: partitions
                    .iter()
                    .map(|(prefix, number)| (*number, prefix.clone()))
                    .collect(),
                unanswered: VecDeque::new(),
            };
            for (prefix, number) in partitions {
                session.subscribe(format!("{prefix}tick"), Channel::Tick(*number), None);
                session.subscribe(
                    format!("{prefix}recipients"),
                    Channel::Recipients(*number),
                    None,
                );
            }
            session.connection.flush().await?;
            let mut early = Vec::new();
            while !session.unanswered.is_empty() {
                let frame = session.connection.frame().await?;
                session.take(frame, &mut early)?;
            }
            Ok(session)
        });
        connected.await.unwrap_or_else(|_| {
            Err(Error::Unavailable(format!(
                "no answer within {} s",
                DEADLINE.as_secs()
            )))
        })
    }

    /// Reads, writes and delivers notices until the connection or the feed ends.
    async fn serve(
        &mut self,
        requests: &mut mpsc::UnboundedReceiver<Follow>,
        notices: &mpsc::Sender<Vec<Notice>>,
    ) -> End {
        let mut batch = Vec::new();
        let mut requested = Vec::new();
        loop {
            let connection = &mut self.connection;
            let (mut reader, mut writer) = tokio::io::split(&mut connection.socket);
            // Dropping a branch loses nothing: `read_buf`, `write_buf`, `reserve` and `recv_many`
            // are cancel-safe.
            let read = tokio::select! {
                permit = notices.reserve(), if !batch.is_empty() => {
                    let Ok(permit) = permit else { return End::Dropped };
                    permit.send(std::mem::take(&mut batch));
                    continue;
                }
                written = writer.write_buf(&mut connection.output), if !connection.output.is_empty() => {
                    if let Err(error) = written {
                        return End::Lost(error.to_string());
                    }
                    continue;
                }
                n = requests.recv_many(&mut requested, REQUESTS) => {
                    if n == 0 {
                        return End::Dropped;
                    }
                    for request in requested.drain(..) {
                        if !self.handle(request) {
                            return End::Lost("no message arrived for too long".into());
                        }
                    }
                    continue;
                }
                // Backpressure: while a batch waits for the receiver, the socket is not read.
                read = reader.read_buf(&mut connection.input), if batch.is_empty() => read,
                () = notices.closed() => return End::Dropped,
            };
            match read {
                Ok(0) => return End::Lost("Redis closed it".into()),
                Ok(_) => {}
                Err(error) => return End::Lost(error.to_string()),
            }
            loop {
                match self.connection.received() {
                    Ok(Some(frame)) => {
                        if let Err(error) = self.take(frame, &mut batch) {
                            return End::Lost(error.to_string());
                        }
                    }
                    Ok(None) => break,
                    Err(error) => return End::Lost(error.to_string()),
                }
            }
            self.connection.input.reserve(READ_BYTES);
        }
    }

    /// Handles a request. `false`: the connection has to be dropped.
    fn handle(&mut self, request: Follow) -> bool {
        match request {
            Follow::Start {
                partition,
                target,
                token,
            } => {
                if let Some(name) = self.log_channel(partition, &target) {
                    self.subscribe(name, Channel::Log(partition, target), Some(token));
                }
            }
            Follow::Stop { partition, target } => {
                if let Some(name) = self.log_channel(partition, &target) {
                    encode(
                        &mut self.connection.output,
                        &[b"UNSUBSCRIBE", name.as_bytes()],
                    );
                    self.unanswered.push_back(None);
                    self.channels.remove(name.as_bytes());
                }
            }
            Follow::Reconnect { .. } => return false,
        }
        true
    }

    fn log_channel(&self, partition: PartitionNumber, target: &Target) -> Option<String> {
        self.prefixes
            .get(&partition)
            .map(|prefix| format!("{prefix}l:{target}"))
    }

    fn subscribe(&mut self, name: String, channel: Channel, token: Option<u64>) {
        encode(
            &mut self.connection.output,
            &[b"SUBSCRIBE", name.as_bytes()],
        );
        self.unanswered.push_back(token);
        self.channels.insert(name.into(), channel);
    }

    /// Adds the notice in a frame to the batch.
    fn take(&mut self, frame: Frame, batch: &mut Vec<Notice>) -> Result<()> {
        let elements = match frame {
            Frame::Array(elements) => elements,
            Frame::Simple(_) => return Ok(()),
            Frame::Error(why) => {
                return Err(Error::Permanent(format!(
                    "{}; grant it with ACL SETUSER",
                    String::from_utf8_lossy(&why)
                )));
            }
        };
        match elements.as_slice() {
            [
                Element::Text(kind),
                Element::Text(channel),
                Element::Text(message),
            ] if &kind[..] == b"message" => {
                match self
                    .channels
                    .get(channel)
                    .and_then(|channel| notice(channel, message))
                {
                    Some(notice) => batch.push(notice),
                    // A message for a log that was followed until just now, or one that Pointsman
                    // did not write.
                    None => {
                        tracing::trace!(channel = %String::from_utf8_lossy(channel), "ignored a message that is not a valid notice")
                    }
                }
            }
            [Element::Text(kind), _, Element::Number(_)]
                if matches!(&kind[..], b"subscribe" | b"unsubscribe") =>
            {
                match self.unanswered.pop_front() {
                    Some(Some(token)) => batch.push(Notice::Following { token }),
                    Some(None) => {}
                    None => return Err(Error::Unavailable("an answer without a request".into())),
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// Parses a message on one of our channels; `None` if Pointsman did not write it.
fn notice(channel: &Channel, message: &Bytes) -> Option<Notice> {
    match channel {
        Channel::Log(partition, target) => {
            // `epoch id` or `epoch id record`; the record is arbitrary JSON.
            let mut parts = message.splitn(3, |&b| b == b' ');
            let epoch = std::str::from_utf8(parts.next()?).ok()?.parse().ok()?;
            let id = std::str::from_utf8(parts.next()?).ok()?.parse().ok()?;
            // A copy, because a slice would keep the whole read buffer in memory.
            let record = parts.next().map(Bytes::copy_from_slice);
            Some(Notice::Append {
                partition: *partition,
                target: target.clone(),
                epoch,
                id: NotificationId(id),
                record,
            })
        }
        Channel::Tick(partition) => {
            if &message[..] == b"alive" {
                return Some(Notice::Alive {
                    partition: *partition,
                });
            }
            let (epoch, last) = std::str::from_utf8(message).ok()?.split_once(' ')?;
            Some(Notice::Tick {
                partition: *partition,
                epoch: epoch.parse().ok()?,
                last: NotificationId(last.parse().ok()?),
            })
        }
        Channel::Recipients(partition) => {
            let user = Name::parse(std::str::from_utf8(message).ok()?).ok()?;
            Some(Notice::RecipientChanged {
                partition: *partition,
                user,
            })
        }
    }
}
