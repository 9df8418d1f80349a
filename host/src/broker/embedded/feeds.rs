//! The feeds of this process: who follows which log, and what the writer published, handed over in order.
//!
//! The writer never waits for a feed. One that is full loses what it follows, hears nothing more, and is sent a reset once it has room: its
//! streams then read what they missed. A follow request is answered through the same channel and under the same lock as notices, so
//! whoever hears that it is in force hears every later append.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, mpsc};

use crate::broker::{Feed, Follow, Notice, PartitionNumber};
use crate::event::Target;

/// Batches that may wait in a feed; each is what one group published to it.
const CAPACITY: usize = 256;
/// Follow requests answered at once.
const REQUESTS: usize = 256;

/// See the head of this file.
#[derive(Debug)]
pub(super) struct Feeds {
    /// A std lock: held for a hand-over, never across an await.
    ears: Mutex<Vec<Arc<Ear>>>,
    partitions: Vec<PartitionNumber>,
}

#[derive(Debug)]
struct Ear {
    notices: mpsc::Sender<Vec<Notice>>,
    /// A std lock, as above. Whoever publishes or changes what is followed holds it until the hand-over, which makes the order.
    state: Mutex<State>,
    /// Somebody wants a reset to be sent.
    deafened: Notify,
}

#[derive(Debug, Default)]
struct State {
    followed: HashMap<PartitionNumber, HashSet<Target>>,
    /// Notices were dropped, and the reset that says so is not sent yet. Follow requests are void until then.
    is_deaf: bool,
}

impl Feeds {
    pub(super) fn new(partitions: Vec<PartitionNumber>) -> Self {
        Self {
            ears: Mutex::default(),
            partitions,
        }
    }

    /// Opens a feed, served by a task that ends with it. Must be called within a runtime.
    pub(super) fn open(self: &Arc<Self>) -> Feed {
        let (follow, requests) = mpsc::unbounded_channel();
        let (sender, notices) = mpsc::channel(CAPACITY);
        let ear = Arc::new(Ear {
            notices: sender,
            state: Mutex::default(),
            deafened: Notify::new(),
        });
        self.ears().push(Arc::clone(&ear));
        let feeds = Arc::clone(self);
        tokio::spawn(async move {
            ear.serve(requests, &feeds.partitions).await;
            feeds.ears().retain(|other| !Arc::ptr_eq(other, &ear));
        });
        Feed { follow, notices }
    }

    pub(super) fn publish(&self, notices: &[Notice]) {
        if notices.is_empty() {
            return;
        }
        for ear in self.ears().iter() {
            ear.publish(notices);
        }
    }

    /// Notices may have been lost: everyone starts over.
    pub(super) fn reset_all(&self) {
        for ear in self.ears().iter() {
            ear.deafen(&mut ear.state());
        }
    }

    fn ears(&self) -> MutexGuard<'_, Vec<Arc<Ear>>> {
        self.ears.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ear {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, notices: &[Notice]) {
        let mut state = self.state();
        if state.is_deaf {
            return;
        }
        let is_for_me = |notice: &&Notice| match notice {
            Notice::Append {
                partition, target, ..
            } => state
                .followed
                .get(partition)
                .is_some_and(|logs| logs.contains(target)),
            _ => true,
        };
        let batch: Vec<Notice> = notices.iter().filter(is_for_me).cloned().collect();
        self.hand_over(&mut state, batch);
    }

    fn hand_over(&self, state: &mut State, batch: Vec<Notice>) {
        if !batch.is_empty() && self.notices.try_send(batch).is_err() {
            self.deafen(state);
        }
    }

    fn deafen(&self, state: &mut State) {
        *state = State {
            is_deaf: true,
            ..State::default()
        };
        self.deafened.notify_one();
    }

    /// Takes follow requests and sends resets, until either end of the feed is dropped.
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
                () = self.deafened.notified() => {
                    let Ok(room) = self.notices.reserve().await else { return };
                    let mut state = self.state();
                    state.is_deaf = false;
                    room.send(vec![Notice::Reset { partitions: partitions.to_vec() }]);
                }
                () = self.notices.closed() => return,
            }
        }
    }

    fn follow(&self, requests: impl Iterator<Item = Follow>) {
        let mut state = self.state();
        if state.is_deaf {
            // The reset to come voids them.
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
        self.hand_over(&mut state, answers);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Life, NotificationId};

    const P: PartitionNumber = PartitionNumber(0);

    fn appended(log: &str, id: u64) -> Notice {
        Notice::Append {
            partition: P,
            target: log.parse().unwrap(),
            life: Life::from_bits(1),
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

    async fn hear(feed: &mut Feed) -> Vec<Notice> {
        feed.notices.recv().await.expect("the feed is open")
    }

    #[tokio::test]
    async fn only_what_is_followed_is_heard_and_ticks_by_everyone() {
        let feeds = Arc::new(Feeds::new(vec![P]));
        let mut feed = feeds.open();
        feed.follow.send(start("u:1", 7)).unwrap();
        assert!(matches!(
            *hear(&mut feed).await,
            [Notice::Following { token: 7 }]
        ));
        let tick = Notice::Tick {
            partition: P,
            life: Life::from_bits(1),
            last: NotificationId(2),
        };
        feeds.publish(&[appended("u:2", 1), appended("u:1", 2), tick]);
        assert!(matches!(
            *hear(&mut feed).await,
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
                *hear(&mut feed).await,
                [Notice::Append {
                    id: NotificationId(4),
                    ..
                }]
            ),
            "no empty batch for what is not for it"
        );
    }

    /// The hub sleeps while more is published than the feed holds, and follows a log in that time: it must do so again, and knows.
    #[tokio::test]
    async fn a_full_feed_is_reset_once_it_has_room_and_then_hears_again() {
        let feeds = Arc::new(Feeds::new(vec![P]));
        let mut feed = feeds.open();
        feed.follow.send(start("u:1", 1)).unwrap();
        assert!(matches!(
            *hear(&mut feed).await,
            [Notice::Following { token: 1 }]
        ));
        for id in 0..CAPACITY as u64 + 5 {
            feeds.publish(&[appended("u:1", id)]);
        }
        feed.follow.send(start("u:2", 2)).unwrap();
        for expect in 0..CAPACITY as u64 {
            let heard = hear(&mut feed).await;
            assert!(
                matches!(&*heard, [Notice::Append { id: NotificationId(id), .. }] if *id == expect),
                "{heard:?}"
            );
        }
        assert!(
            matches!(&*hear(&mut feed).await, [Notice::Reset { partitions }] if *partitions == [P])
        );
        // The request lay before the reset or behind it; in either case one after the reset is in force once it is answered.
        feed.follow.send(start("u:1", 3)).unwrap();
        while !matches!(
            hear(&mut feed).await.last(),
            Some(Notice::Following { token: 3 })
        ) {}
        feeds.publish(&[appended("u:1", 1_000)]);
        assert!(matches!(
            *hear(&mut feed).await,
            [Notice::Append {
                id: NotificationId(1_000),
                ..
            }]
        ));
    }

    #[tokio::test]
    async fn a_reset_voids_what_was_followed() {
        let feeds = Arc::new(Feeds::new(vec![P]));
        let mut feed = feeds.open();
        feed.follow.send(start("u:1", 1)).unwrap();
        hear(&mut feed).await;
        feeds.reset_all();
        feeds.publish(&[appended("u:1", 1)]);
        assert!(matches!(*hear(&mut feed).await, [Notice::Reset { .. }]));
        feed.follow.send(start("u:2", 2)).unwrap();
        hear(&mut feed).await;
        feeds.publish(&[appended("u:1", 2), appended("u:2", 2)]);
        let heard = hear(&mut feed).await;
        assert!(
            matches!(&*heard, [Notice::Append { target, .. }] if target.to_string() == "u:2"),
            "{heard:?}"
        );
    }

    #[tokio::test]
    async fn a_dropped_feed_is_forgotten() {
        let feeds = Arc::new(Feeds::new(vec![P]));
        let (kept, dropped) = (feeds.open(), feeds.open());
        drop(dropped);
        while feeds.ears().len() > 1 {
            tokio::task::yield_now().await;
        }
        drop(kept);
    }
}
