//! An open stream as its three parties share it: the hub that feeds it, the replay that reads
//! history for it, and the socket that drains it. No party waits for another while holding the
//! lock.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use futures_util::task::AtomicWaker;
use tokio::sync::Notify;

use super::Subscription;

/// See the module documentation.
#[derive(Debug)]
pub struct OpenStream {
    /// Unique in this process.
    pub id: u64,
    subscription: Mutex<Subscription>,
    /// Wakes the socket's task.
    writer: AtomicWaker,
    /// Wakes replays when the queues shrink or the stream closes.
    room: Notify,
    is_closed: AtomicBool,
}

impl OpenStream {
    pub fn new(id: u64, subscription: Subscription) -> Self {
        let (writer, room) = (AtomicWaker::new(), Notify::new());
        Self {
            id,
            subscription: Mutex::new(subscription),
            writer,
            room,
            is_closed: AtomicBool::new(false),
        }
    }

    /// Locks the subscription. The std mutex is held for a few hundred nanoseconds, never across an
    /// `.await`. A panic under it leaves marks that can only lag behind, so continuing repeats
    /// notifications at worst; the panic has been logged.
    pub fn lock(&self) -> LockedSubscription<'_> {
        let locked = self.subscription.lock();
        LockedSubscription(locked.unwrap_or_else(PoisonError::into_inner))
    }

    /// Registers `waker` to be woken when there is something to write.
    pub fn register(&self, waker: &Waker) {
        self.writer.register(waker);
    }

    /// Wakes the socket's task.
    pub fn wake(&self) {
        self.writer.wake();
    }

    /// Signals that an item left the queues.
    pub fn made_room(&self) {
        self.room.notify_waiters();
    }

    /// Waits until `is_enough` returns `Some`, calling it again each time an item leaves the
    /// queues. Returns `None` if the stream is closed.
    pub async fn when<T>(
        &self,
        mut is_enough: impl FnMut(&mut Subscription) -> Option<T>,
    ) -> Option<T> {
        loop {
            let mut changed = std::pin::pin!(self.room.notified());
            // Registered before the check, or a change in between would be missed.
            changed.as_mut().enable();
            if self.is_closed() {
                return None;
            }
            if let Some(answer) = is_enough(&mut self.lock()) {
                return Some(answer);
            }
            changed.await;
        }
    }

    /// Marks the stream closed after its socket is gone. Replays that work for it stop.
    pub fn close(&self) {
        // Set before the wake: `when` checks it after it has registered.
        self.is_closed.store(true, Ordering::Release);
        self.room.notify_waiters();
    }

    pub fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Acquire)
    }
}

/// A locked subscription. Counts what it holds when the lock is released.
#[derive(Debug)]
pub struct LockedSubscription<'a>(MutexGuard<'a, Subscription>);

impl Deref for LockedSubscription<'_> {
    type Target = Subscription;

    fn deref(&self) -> &Subscription {
        &self.0
    }
}

impl DerefMut for LockedSubscription<'_> {
    fn deref_mut(&mut self) -> &mut Subscription {
        &mut self.0
    }
}

impl Drop for LockedSubscription<'_> {
    fn drop(&mut self) {
        self.0.settle_buffers();
    }
}
