//! How a node stops: one handle, cloned into every part. It says *begin* (finish what you have, take nothing new) and *skip* (leave now).
//!
//! It promises that a first signal begins, a second skips, and that [`Shutdown::finish`] waits for every part spawned here, but no longer
//! than it is told. A part that panics begins it, too: a node of which a part is missing would say that it is ready and do half of its work,
//! and whoever supervises it cannot see that; a node that ends is started again. The order in which parts stop is `lib.rs`'s; how a stream says good-bye is `sse`'s.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A cheap handle: clones are the same shutdown.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    begin: CancellationToken,
    skip: CancellationToken,
    tasks: TaskTracker,
    /// The first part that panicked.
    broken: Arc<OnceLock<&'static str>>,
}

impl Shutdown {
    pub fn new() -> Self {
        Self::default()
    }

    /// Begins on SIGTERM or SIGINT, and skips on the next of either.
    ///
    /// # Errors
    /// The signals cannot be listened to.
    pub fn on_signals(&self) -> std::io::Result<()> {
        let (mut terminate, mut interrupt) = (
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
        );
        let shutdown = self.clone();
        // Not one of the tracked tasks: it waits for as long as the process lives.
        tokio::spawn(async move {
            for step in [Self::begin, Self::skip] {
                tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
                step(&shutdown);
            }
        });
        Ok(())
    }

    /// Asks every part to finish.
    pub fn begin(&self) {
        if !self.begin.is_cancelled() {
            tracing::info!("shutting down; a second signal leaves at once");
        }
        self.begin.cancel();
    }

    /// Asks every part to leave at once.
    pub fn skip(&self) {
        self.begin.cancel();
        self.skip.cancel();
    }

    pub fn has_begun(&self) -> bool {
        self.begin.is_cancelled()
    }

    /// Returns when the shutdown begins. Cancel-safe.
    pub async fn begun(&self) {
        self.begin.cancelled().await;
    }

    /// Returns when the rest is to be skipped. Cancel-safe.
    pub async fn skipped(&self) {
        self.skip.cancelled().await;
    }

    /// A token that is cancelled as the shutdown begins, for parts that want no more of it than that.
    pub fn token(&self) -> CancellationToken {
        self.begin.child_token()
    }

    /// Starts a part of the node, which [`Shutdown::finish`] waits for. `part`: what it is called where it breaks.
    pub fn spawn(&self, part: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(self.clone().run(part, task));
    }

    /// The same for a part that goes on while the others stop, for as long as the runtime: nobody waits for it.
    pub fn spawn_lasting(
        &self,
        part: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        tokio::spawn(self.clone().run(part, task));
    }

    async fn run(self, part: &'static str, task: impl Future<Output = ()> + Send) {
        // Nothing of the part is used again.
        if AssertUnwindSafe(task).catch_unwind().await.is_err() {
            self.begin_broken(part);
        }
    }

    /// The same for a thread of its own: it holds the alarm for as long as it runs.
    pub fn alarm(&self, part: &'static str) -> Alarm {
        Alarm {
            shutdown: self.clone(),
            part,
        }
    }

    fn begin_broken(&self, part: &'static str) {
        tracing::error!("{part} panicked; this node cannot go on without, and stops");
        if self.broken.set(part).is_err() {
            tracing::debug!("it was stopping for that reason already");
        }
        self.begin();
    }

    /// The part that panicked and so began the shutdown, if it was that.
    pub fn broken(&self) -> Option<&'static str> {
        self.broken.get().copied()
    }

    /// Waits until every task has ended, for at most `grace`, or until skipped. `true`: all ended by themselves.
    pub async fn finish(&self, grace: Duration) -> bool {
        self.tasks.close();
        tokio::select! {
            () = self.tasks.wait() => true,
            () = tokio::time::sleep(grace) => false,
            () = self.skipped() => self.tasks.is_empty(),
        }
    }

    /// After a skip: waits until every task has seen it, for at most `limit`.
    pub async fn finish_cut(&self, limit: Duration) {
        if tokio::time::timeout(limit, self.tasks.wait())
            .await
            .is_err()
        {
            tracing::warn!(tasks = self.tasks.len(), "left with tasks that did not end");
        }
    }
}

/// See [`Shutdown::alarm`].
#[derive(Debug)]
pub struct Alarm {
    shutdown: Shutdown,
    part: &'static str,
}

impl Drop for Alarm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.shutdown.begin_broken(self.part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_waits_for_tasks_and_not_for_longer_than_told() {
        let shutdown = Shutdown::new();
        let begun = shutdown.clone();
        shutdown.spawn("one that waits", async move { begun.begun().await });
        shutdown.begin();
        assert!(shutdown.finish(Duration::from_secs(10)).await);

        shutdown.spawn("one that stays", std::future::pending());
        assert!(!shutdown.finish(Duration::from_millis(1)).await);
    }

    #[tokio::test]
    async fn a_skip_does_not_wait_for_the_grace_period() {
        let shutdown = Shutdown::new();
        shutdown.spawn("one that stays", std::future::pending());
        shutdown.skip();
        assert!(shutdown.has_begun());
        assert!(!shutdown.finish(Duration::from_secs(3600)).await);
    }

    #[tokio::test]
    async fn a_part_that_panics_ends_the_node_and_is_named() {
        let shutdown = Shutdown::new();
        let other = shutdown.clone();
        shutdown.spawn("another", async move { other.begun().await });
        assert_eq!(shutdown.broken(), None);
        shutdown.spawn("ingest", async {
            panic!("so that the test has something to see")
        });
        tokio::time::timeout(Duration::from_secs(60), shutdown.begun())
            .await
            .expect("it begins");
        assert!(shutdown.finish(Duration::from_secs(60)).await);
        assert_eq!(shutdown.broken(), Some("ingest"));
    }

    #[tokio::test]
    async fn a_thread_that_panics_ends_the_node_and_one_that_ends_does_not() {
        let shutdown = Shutdown::new();
        let run = |alarm: Alarm, panics: bool| {
            let thread = std::thread::spawn(move || {
                let _alarm = alarm;
                assert!(!panics, "so that the test has something to see");
            });
            thread.join().is_err()
        };
        assert!(!run(shutdown.alarm("one that ends"), false));
        assert!(!shutdown.has_begun());
        assert!(run(shutdown.alarm("the watcher"), true));
        assert!(shutdown.has_begun());
        assert_eq!(shutdown.broken(), Some("the watcher"));
    }
}
