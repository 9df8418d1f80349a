//! The messages of a bridge that were received and are not appended yet. They have a bound in bytes.
//!
//! A full queue first holds its sender back, which leaves the messages in the buffer that Redis has
//! for the connection. If there is still no room after [`PATIENCE`], messages are refused until
//! there is: otherwise Redis would cut the connection, and the number of messages that this costs
//! could not be known.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::broker::ChannelMessage;

/// Bytes of all messages in a queue.
const MAX_BYTES: usize = 8 * 1024 * 1024;
/// Bytes for which a message counts in addition to its content.
const MESSAGE_BYTES: usize = 256;
/// How long a full queue holds its sender back.
const PATIENCE: Duration = Duration::from_secs(1);
/// Messages and bytes of a batch. As many as an append may write at once.
const BATCH_MESSAGES: usize = 256;
const BATCH_BYTES: usize = 1024 * 1024;

/// A queue of at most [`MAX_BYTES`].
pub(super) fn new() -> (Sender, Receiver) {
    let (messages_in, messages) = mpsc::unbounded_channel();
    let room = Arc::new(Semaphore::new(MAX_BYTES));
    let sender = Sender {
        messages: messages_in,
        room,
        is_full: false,
    };
    let receiver = Receiver {
        messages,
        next: None,
    };
    (sender, receiver)
}

struct Queued {
    message: ChannelMessage,
    n_bytes: usize,
    _room: OwnedSemaphorePermit,
}

pub(super) struct Sender {
    /// Bounded by `room`.
    messages: mpsc::UnboundedSender<Queued>,
    room: Arc<Semaphore>,
    /// Whether the last message found no room.
    is_full: bool,
}

impl Sender {
    /// Adds a message. Returns `false` if there was no room for it in time.
    pub(super) async fn send(&mut self, message: ChannelMessage) -> bool {
        let body = message.body.as_ref().map_or(0, bytes::Bytes::len);
        // One message always fits: ingest.max_event_bytes is far below the bound.
        let n_bytes = (message.channel.len() + body + MESSAGE_BYTES).min(MAX_BYTES);
        let permits = u32::try_from(n_bytes).unwrap_or(u32::MAX);
        let room = match Arc::clone(&self.room).try_acquire_many_owned(permits) {
            Ok(room) => Some(room),
            Err(_) if self.is_full => None,
            Err(_) => {
                let room = Arc::clone(&self.room).acquire_many_owned(permits);
                let room = tokio::time::timeout(PATIENCE, room).await;
                room.ok().and_then(Result::ok)
            }
        };
        self.is_full = room.is_none();
        room.is_some_and(|room| {
            let queued = Queued {
                message,
                n_bytes,
                _room: room,
            };
            self.messages.send(queued).is_ok()
        })
    }
}

pub(super) struct Receiver {
    messages: mpsc::UnboundedReceiver<Queued>,
    /// A message that did not fit the last batch.
    next: Option<Queued>,
}

/// Messages to append together. They have their room in the queue until the batch is dropped.
pub(super) struct Batch(Vec<Queued>);

impl Batch {
    pub(super) fn messages(&self) -> impl Iterator<Item = &ChannelMessage> {
        self.0.iter().map(|queued| &queued.message)
    }
}

impl Receiver {
    /// Waits for messages. `None` if the sender was dropped and all messages were returned.
    pub(super) async fn batch(&mut self) -> Option<Batch> {
        let first = match self.next.take() {
            Some(queued) => queued,
            None => self.messages.recv().await?,
        };
        let mut n_bytes = first.n_bytes;
        let mut batch = vec![first];
        while batch.len() < BATCH_MESSAGES
            && let Ok(queued) = self.messages.try_recv()
        {
            n_bytes += queued.n_bytes;
            if n_bytes > BATCH_BYTES {
                self.next = Some(queued);
                break;
            }
            batch.push(queued);
        }
        Some(Batch(batch))
    }

    /// Removes all messages and returns their number.
    pub(super) fn clear(&mut self) -> usize {
        let mut n_messages = usize::from(self.next.take().is_some());
        self.messages.close();
        while self.messages.try_recv().is_ok() {
            n_messages += 1;
        }
        n_messages
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn message(n_bytes: usize) -> ChannelMessage {
        ChannelMessage {
            channel: Bytes::from_static(b"c"),
            body: Some(vec![b'x'; n_bytes].into()),
        }
    }

    #[tokio::test]
    async fn a_full_queue_refuses_messages_after_a_wait_and_accepts_them_when_there_is_room() {
        let (mut sender, mut receiver) = new();
        let half = MAX_BYTES / 2 - MESSAGE_BYTES - 1;
        assert!(sender.send(message(half)).await);
        assert!(sender.send(message(half)).await);
        assert!(!sender.send(message(1)).await);
        assert!(sender.is_full, "the next one does not wait");
        assert!(!sender.send(message(1)).await);
        // A batch keeps its room until its messages are appended.
        let batch = receiver.batch().await.unwrap();
        assert!(!sender.send(message(1)).await);
        drop(batch);
        assert!(sender.send(message(1)).await);
        drop(sender);
        assert_eq!(receiver.clear(), 2);
        assert!(receiver.batch().await.is_none());
    }

    #[tokio::test]
    async fn a_batch_is_bounded_and_keeps_the_order() {
        let (mut sender, mut receiver) = new();
        for n in 0..BATCH_MESSAGES + 1 {
            assert!(sender.send(message(n)).await);
        }
        assert!(sender.send(message(BATCH_BYTES)).await);
        drop(sender);
        let mut sizes = Vec::new();
        let mut lengths = Vec::new();
        while let Some(batch) = receiver.batch().await {
            lengths.push(batch.0.len());
            sizes.extend(batch.messages().map(|m| m.body.as_ref().unwrap().len()));
        }
        assert_eq!(lengths, [BATCH_MESSAGES, 1, 1]);
        let expect: Vec<usize> = (0..BATCH_MESSAGES + 1).chain([BATCH_BYTES]).collect();
        assert_eq!(sizes, expect);
    }
}
