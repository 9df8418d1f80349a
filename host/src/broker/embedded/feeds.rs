//! The feeds of this process: tracks the logs each feed follows and delivers the notices that the
//! writer published, in order.
//!
//! The writer never waits for a feed. A feed that is full loses its follow requests, receives
//! nothing more, and is sent a reset once it has room; its streams then read the missed entries.
//! Follow requests are answered through the same channel and under the same lock as notices, so a
//! feed that receives the answer receives every later append.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, mpsc};

use crate::broker::{Feed, Follow, Notice};
use crate::event::{PartitionNumber, Target};

/// Batches that may wait in a feed. Each holds the notices of one group.
const CAPACITY: usize = 256;
/// Maximum number of follow requests handled at once.
const REQUESTS: usize = 256;

/// See the head of this file.
#[derive(Debug)]
pub(super) struct Feeds {
    /// A std lock, held while delivering notices and never across an await.
    receivers: Mutex<Vec<Arc<Receiver>>>,
    partitions: Vec<PartitionNumber>,
}

#[derive(Debug)]
struct Receiver {
    notices: mpsc::Sender<Vec<Notice>>,
    /// A std lock, as above. Held from a publication or a change of the followed logs until its
    /// delivery, which guarantees the order.
    state: Mutex<ReceiverState>,
    /// Notified when a reset has to be sent.
    reset_due: Notify,
}

#[derive(Debug, Default)]
struct ReceiverState {
    followed: HashMap<PartitionNumber, HashSet<Target>>,
    /// Notices were dropped and the reset has not been sent yet. Until then, follow requests are
    /// void.
    needs_reset: bool,
}

impl Feeds {
    pub(super) fn new(partitions: Vec<PartitionNumber>) -> Self {
        Self {
            receivers: Mutex::default(),
            partitions,
        }
    }

    /// Opens a feed, served by a task that ends with it. Must be called within a Tokio runtime.
    pub(super) fn open(self: &Arc<Self>) -> Feed {
        let (follow, requests) = mpsc::unbounded_channel();
        let (sender, notices) = mpsc::channel(CAPACITY);
        let receiver = Arc::new(Receiver {
            notices: sender,
            state: Mutex::default(),
            reset_due: Notify::new(),
        });
        self.receivers().push(Arc::clone(&receiver));
        let feeds = Arc::clone(self);
        tokio::spawn(async move {
            receiver.serve(requests, &feeds.partitions).await;
            feeds
                .receivers()
                .retain(|other| !Arc::ptr_eq(other, &receiver));
        });
        Feed { follow, notices }
    }

    pub(super) fn publish(&self, notices: &[Notice]) {
        if notices.is_empty() {
            return;
        }
        for receiver in self.receivers().iter() {
            receiver.publish(notices);
        }
    }

    /// Resets all feeds after notices may have been lost.
    pub(super) fn reset_all(&self) {
        for receiver in self.receivers().iter() {
            receiver.require_reset(&mut receiver.state());
        }
    }

    fn receivers(&self) -> MutexGuard<'_, Vec<Arc<Receiver>>> {
        self.receivers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Receiver {
    fn state(&self) -> MutexGuard<'_, ReceiverState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, notices: &[Notice]) {
        let mut state = self.state();
        if state.needs_reset {
            return;
        }
        let is_followed = |notice: &&Notice| match notice {
            Notice::Append {
                partition, target, ..
            } => state
                .followed
                .get(partition)
                .is_some_and(|logs| logs.contains(target)),
            _ => true,
        };
        let batch: Vec<Notice> = notices.iter().filter(is_followed).cloned().collect();
        self.deliver(&mut state, batch);
    }

    fn deliver(&self, state: &mut ReceiverState, batch: Vec<Notice>) {
        if !batch.is_empty() && self.notices.try_send(batch).is_err() {
            self.require_reset(state);
        }
    }

    fn require_reset(&self, state: &mut ReceiverState) {
        *state = ReceiverState {
            needs_reset: true,
            ..ReceiverState::default()
        };
        self.reset_due.notify_one();
    }

    /// Handles follow requests and sends resets until either end of the feed is dropped.
    async fn serve(
        &self,
        mut requests: mpsc::UnboundedReceiver<Follow>,
        partitions: &[PartitionNumber],
    ) {
        let mut some = Vec::new();
        loop {
            tokio::select! {
                n = requests.recv_many(&mut some, REQUESTS) => match n {
                    0 => return,
                    _ => self.follow(some.drain(..)),
                },
                () = self.reset_due.notified() => {
                    let Ok(room) = self.notices.reserve().await else { return };
                    // Under one lock: notices published from now on queue up behind the reset.
                    let mut state = self.state();
                    state.needs_reset = false;
                    room.send(vec![Notice::Reset { partitions: partitions.to_vec() }]);
                }
                () = self.notices.closed() => return,
            }
        }
    }

    fn follow(&self, requests: impl Iterator<Item = Follow>) {
        let mut state = self.state();
        if state.needs_reset {
            // The pending reset voids these requests.
            return;
        }
        let mut answers = Vec::new();
        for request in requests {
            match request {
                Follow::Start {
                    partition,
                    target,
                    token,
                } => {
                    state.followed.entry(partition).or_default().insert(target);
                    answers.push(Notice::Following { token });
                }
                Follow::Stop { partition, target } => {
                    if let Some(logs) = state.followed.get_mut(&partition) {
                        logs.remove(&target);
                    }
                }
                Follow::Reconnect { partition } => {
                    state.followed.remove(&partition);
                    answers.push(Notice::Reset {
                        partitions: vec![partition],
                    });
                }
            }
        }
        self.deliver(&mut state, answers);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Epoch, NotificationId};

    const P: PartitionNumber = PartitionNumber(0);

    fn appended(log: &str, id: u64) -> Notice {
        Notice::Append {
            partition: P,
            target: log.parse().unwrap(),
            epoch: Epoch::from_bits(1),
            id: NotificationId(id),
            record: None,
        }
    }

    fn start(log: &str, token: u64) -> Follow {
        Follow::Start {
            partition: P,
            target: log.parse().unwrap(),
            token,
        }
    }

    async fn receive(feed: &mut Feed) -> Vec<Notice> {
        feed.notices.recv().await.expect("the feed is open")
    }

    #[tokio::test]
    async fn a_feed_receives_followed_logs_and_all_ticks() {
        let feeds = Arc::new(Feeds::new(vec![P]));
        let mut feed = feeds.open();
        feed.follow.send(start("u:1", 7)).unwrap();
        assert!(matches!(
            *receive(&mut feed).await,
            [Notice::Following { token: 7 }]
        ));
        let tick = Notice::Tick {
            partition: P,
            epoch: Epoch::from_bits(1),
            last: NotificationId(2),
        };
        feeds.publish(&[appended("u:2", 1), appended("u:1", 2), tick]);
        assert!(matches!(
            *receive(&mut feed).await,
            [
                Notice::Append {
                    id: NotificationId(2),
                    ..
                },
                Notice::Tick { .. }
            ]
        ));
        feeds.publish(&[appended("u:2", 3)]);
        feeds.publish(&[appended("u:1", 4)]);
        assert!(
            matches!(
                *receive(&mut feed).await,
                [Notice::Append {
                    id: NotificationId(4),
                    ..
                }]
            ),
            "notices of other logs do not cause an empty batch"
        );
    }

    /// The hub stalls while more is published than the feed holds, and follows another log in that
    /// time. The reset signals that it must repeat that request.
    #[tokio::test]
    async fn a_full_feed_is_reset_once_it_has_room_and_then_receives_notices_again() {
        let feeds = Arc::new(Feeds::new(vec![P]));
        let mut feed = feeds.open();
        feed.follow.send(start("u:1", 1)).unwrap();
        assert!(matches!(
            *receive(&mut feed).await,
            [Notice::Following { token: 1 }]
        ));
        for id in 0..CAPACITY as u64 + 5 {
            feeds.publish(&[appended("u:1", id)]);
        }
        feed.follow.send(start("u:2", 2)).unwrap();
        for expect in 0..CAPACITY as u64 {
            let received = receive(&mut feed).await;
            assert!(
                matches!(&*received, [Notice::Append { id: NotificationId(id), .. }] if *id == expect),
                "{received:?}"
            );
        }
        assert!(
            matches!(&*receive(&mut feed).await, [Notice::Reset { partitions }] if *partitions == [P])
        );
        // The earlier request came either before or after the reset. In both cases, a request after
        // the reset is in effect once it is answered.
        feed.follow.send(start("u:1", 3)).unwrap();
        while !matches!(
            receive(&mut feed).await.last(),
            Some(Notice::Following { token: 3 })
        ) {}
        feeds.publish(&[appended("u:1", 1_000)]);
        assert!(matches!(
            *receive(&mut feed).await,
            [Notice::Append {
                id: NotificationId(1_000),
                ..
            }]
        ));
    }

    #[tokio::test]
    async fn a_reset_voids_earlier_follow_requests() {
        let feeds = Arc::new(Feeds::new(vec![P]));
        let mut feed = feeds.open();
        feed.follow.send(start("u:1", 1)).unwrap();
        receive(&mut feed).await;
        feeds.reset_all();
        feeds.publish(&[appended("u:1", 1)]);
        assert!(matches!(*receive(&mut feed).await, [Notice::Reset { .. }]));
        feed.follow.send(start("u:2", 2)).unwrap();
        receive(&mut feed).await;
        feeds.publish(&[appended("u:1", 2), appended("u:2", 2)]);
        let received = receive(&mut feed).await;
        assert!(
            matches!(&*received, [Notice::Append { target, .. }] if target.to_string() == "u:2"),
            "{received:?}"
        );
    }

    #[tokio::test]
    async fn a_dropped_feed_is_removed() {
        let feeds = Arc::new(Feeds::new(vec![P]));
        let (kept, dropped) = (feeds.open(), feeds.open());
        drop(dropped);
        while feeds.receivers().len() > 1 {
            tokio::task::yield_now().await;
        }
        drop(kept);
    }
}
