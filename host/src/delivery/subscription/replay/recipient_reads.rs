//! Reads of recipients, shared by the streams of a user that ask at the same time.
//!
//! A user may have many streams, each in several partitions, and many memberships. A change of one
//! sends all of them to replay, and each begins with the user's data: without sharing, Redis would
//! send the memberships once for each.
//!
//! Nothing is kept for later. A caller gets the result of a read that began after its call, because
//! an earlier one may lack the change that caused the call. While one read is in progress, all
//! further callers therefore wait for the next one.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::broker::Result;
use crate::event::{Name, Recipient};

/// See the module documentation.
#[derive(Debug, Default)]
pub(super) struct RecipientReads(Mutex<HashMap<Name, Shared>>);

/// Exists as long as it has callers.
#[derive(Debug, Default)]
struct Shared {
    n_callers: usize,
    reads: Arc<UserReads>,
}

#[derive(Debug, Default)]
struct UserReads {
    n_calls: AtomicU64,
    /// The newest result. Held during a read, so that there is one at a time.
    newest: tokio::sync::Mutex<Option<SharedResult>>,
}

#[derive(Debug)]
struct SharedResult {
    /// The number of calls before the read began.
    n_calls: u64,
    result: Result<Arc<Recipient>>,
}

impl RecipientReads {
    /// Returns the result of `read`, or that of another caller for this user if it began after this
    /// call. `read` does not start before it is polled.
    ///
    /// # Errors
    /// The error of the read.
    pub(super) async fn read(
        &self,
        user: &Name,
        read: impl Future<Output = Result<Recipient>>,
    ) -> Result<Arc<Recipient>> {
        let caller = Caller::new(self, user);
        let number = caller.reads.n_calls.fetch_add(1, Ordering::SeqCst) + 1;
        let mut newest = caller.reads.newest.lock().await;
        if let Some(shared) = newest.as_ref().filter(|shared| shared.n_calls >= number) {
            return shared.result.clone();
        }
        // Before the read begins: a later call may know of a change that this read misses.
        let n_calls = caller.reads.n_calls.load(Ordering::SeqCst);
        let result = read.await.map(Arc::new);
        *newest = Some(SharedResult {
            n_calls,
            result: result.clone(),
        });
        result
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Name, Shared>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call. Dropped when the call ends or is cancelled; the last one of a user removes the entry.
struct Caller<'a> {
    all: &'a RecipientReads,
    user: &'a Name,
    reads: Arc<UserReads>,
}

impl<'a> Caller<'a> {
    fn new(all: &'a RecipientReads, user: &'a Name) -> Self {
        let mut by_user = all.lock();
        let shared = by_user.entry(user.clone()).or_default();
        shared.n_callers += 1;
        let reads = Arc::clone(&shared.reads);
        Self { all, user, reads }
    }
}

impl Drop for Caller<'_> {
    fn drop(&mut self) {
        let mut by_user = self.all.lock();
        if let Some(shared) = by_user.get_mut(self.user) {
            shared.n_callers -= 1;
            if shared.n_callers == 0 {
                by_user.remove(self.user);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use futures_util::FutureExt as _;
    use futures_util::future::join_all;
    use tokio::sync::Semaphore;

    use super::*;
    use crate::broker::Error;

    fn ann() -> Name {
        Name::parse("ann").unwrap()
    }

    /// A broker whose reads can be held back.
    struct Source {
        n_begun: AtomicUsize,
        answers: Semaphore,
    }

    impl Source {
        async fn read(&self) -> Result<Recipient> {
            self.n_begun.fetch_add(1, Ordering::SeqCst);
            self.answers.acquire().await.unwrap().forget();
            Ok(Recipient::default())
        }
    }

    fn source() -> Source {
        Source {
            n_begun: AtomicUsize::new(0),
            answers: Semaphore::new(0),
        }
    }

    /// The first caller reads; a read that began before a call does not answer it.
    #[tokio::test]
    async fn calls_during_a_read_share_the_next_one() {
        let (reads, source, user) = (RecipientReads::default(), source(), ann());
        let mut first = Box::pin(reads.read(&user, source.read()));
        assert!((&mut first).now_or_never().is_none());
        let mut later = Box::pin(join_all((0..40).map(|_| reads.read(&user, source.read()))));
        assert!((&mut later).now_or_never().is_none());
        assert_eq!(source.n_begun.load(Ordering::SeqCst), 1);
        source.answers.add_permits(1);
        first.await.unwrap();
        assert!((&mut later).now_or_never().is_none());
        assert_eq!(source.n_begun.load(Ordering::SeqCst), 2);
        source.answers.add_permits(1);
        assert!(later.await.iter().all(Result::is_ok));
        assert_eq!(source.n_begun.load(Ordering::SeqCst), 2);
        // A call afterwards reads again, and nothing is kept.
        source.answers.add_permits(1);
        reads.read(&user, source.read()).await.unwrap();
        assert_eq!(source.n_begun.load(Ordering::SeqCst), 3);
        assert!(reads.lock().is_empty());
    }

    #[tokio::test]
    async fn a_cancelled_read_is_repeated_by_the_next_caller() {
        let (reads, source, user) = (RecipientReads::default(), source(), ann());
        let mut first = Box::pin(reads.read(&user, source.read()));
        assert!((&mut first).now_or_never().is_none());
        let mut second = Box::pin(reads.read(&user, source.read()));
        assert!((&mut second).now_or_never().is_none());
        drop(first);
        source.answers.add_permits(1);
        second.await.unwrap();
        assert_eq!(source.n_begun.load(Ordering::SeqCst), 2);
        assert!(reads.lock().is_empty());
    }

    /// Otherwise each caller would wait for the deadline of its own read, one after another.
    #[tokio::test]
    async fn calls_share_a_failure() {
        let (reads, user) = (RecipientReads::default(), ann());
        let n_begun = AtomicUsize::new(0);
        let read = async || {
            n_begun.fetch_add(1, Ordering::SeqCst);
            tokio::task::yield_now().await;
            Err(Error::Unavailable("gone".into()))
        };
        let answers = join_all((0..40).map(|_| reads.read(&user, read()))).await;
        assert!(answers.iter().all(Result::is_err));
        assert_eq!(n_begun.load(Ordering::SeqCst), 2);
    }
}
