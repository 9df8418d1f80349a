//! Shutdown of a node: one handle, cloned into every part, with two levels. *Begin*: finish current
//! work and accept none. *Skip*: stop now.
//!
//! A first signal begins the shutdown and a second one skips. [`Shutdown::finish`] waits for every
//! part spawned here, but no longer than the given time. A part that panics begins the shutdown,
//! too: without it the node would report ready and do half of its work, which a supervisor cannot
//! detect, whereas a node that exits is restarted. `node.rs` defines the order in which parts stop;
//! `sse` ends streams.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A cheap handle: clones share one shutdown.
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

    /// Begins the shutdown on SIGTERM or SIGINT, and skips on the next of either.
    ///
    /// # Errors
    /// The signal handlers cannot be installed.
    pub fn on_signals(&self) -> std::io::Result<()> {
        let (mut terminate, mut interrupt) = (
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
        );
        let shutdown = self.clone();
        // Not a tracked task: it waits as long as the process runs.
        tokio::spawn(async move {
            for step in [Self::begin, Self::skip] {
                tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
                step(&shutdown);
            }
        });
        Ok(())
    }

    /// Requests every part to finish.
    pub fn begin(&self) {
        if !self.begin.is_cancelled() {
            tracing::info!("shutting down; a second signal stops at once");
        }
        self.begin.cancel();
    }

    /// Requests every part to stop at once.
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

    /// Returns a token that is cancelled when the shutdown begins, for parts that need nothing
    /// else.
    pub fn token(&self) -> CancellationToken {
        self.begin.child_token()
    }

    /// Starts a part of the node, which [`Shutdown::finish`] waits for. `part` is its name in
    /// messages about a panic.
    pub fn spawn(&self, part: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(self.clone().run(part, task));
    }

    /// Like [`Shutdown::spawn`], for a part that continues while the others stop, until the runtime
    /// ends: `finish` does not wait for it.
    pub fn spawn_lasting(
        &self,
        part: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        tokio::spawn(self.clone().run(part, task));
    }

    async fn run(self, part: &'static str, task: impl Future<Output = ()> + Send) {
        // Unwind safety: nothing of the part is used after a panic.
        if AssertUnwindSafe(task).catch_unwind().await.is_err() {
            self.begin_broken(part);
        }
    }

    /// Like [`Shutdown::spawn`], for a separate thread, which holds the alarm as long as it runs.
    pub fn alarm(&self, part: &'static str) -> Alarm {
        Alarm {
            shutdown: self.clone(),
            part,
        }
    }

    fn begin_broken(&self, part: &'static str) {
        tracing::error!("{part} panicked; the node cannot continue and shuts down");
        if self.broken.set(part).is_err() {
            tracing::debug!("already shutting down because another part panicked");
        }
        self.begin();
    }

    /// Returns the part whose panic began the shutdown, if any.
    pub fn broken(&self) -> Option<&'static str> {
        self.broken.get().copied()
    }

    /// Waits until every task has ended, for at most `grace` or until skipped. Returns `true` if
    /// all ended.
    pub async fn finish(&self, grace: Duration) -> bool {
        self.tasks.close();
        tokio::select! {
            () = self.tasks.wait() => true,
            () = tokio::time::sleep(grace) => false,
            () = self.skipped() => self.tasks.is_empty(),
        }
    }

    /// Waits after a skip until every task has seen it, for at most `limit`.
    pub async fn finish_cut(&self, limit: Duration) {
        if tokio::time::timeout(limit, self.tasks.wait())
            .await
            .is_err()
        {
            tracing::warn!(tasks = self.tasks.len(), "stopping with unfinished tasks");
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
    async fn finish_waits_for_tasks_but_not_beyond_the_grace_period() {
        let shutdown = Shutdown::new();
        let begun = shutdown.clone();
        shutdown.spawn("a waiting part", async move { begun.begun().await });
        shutdown.begin();
        assert!(shutdown.finish(Duration::from_secs(10)).await);

        shutdown.spawn("a hanging part", std::future::pending());
        assert!(!shutdown.finish(Duration::from_millis(1)).await);
    }

    #[tokio::test]
    async fn a_skip_does_not_wait_for_the_grace_period() {
        let shutdown = Shutdown::new();
        shutdown.spawn("a hanging part", std::future::pending());
        shutdown.skip();
        assert!(shutdown.has_begun());
        assert!(!shutdown.finish(Duration::from_secs(3600)).await);
    }

    #[tokio::test]
    async fn a_part_that_panics_shuts_the_node_down_and_is_named() {
        let shutdown = Shutdown::new();
        let other = shutdown.clone();
        shutdown.spawn("another", async move { other.begun().await });
        assert_eq!(shutdown.broken(), None);
        shutdown.spawn("ingest", async { panic!("simulated panic") });
        tokio::time::timeout(Duration::from_secs(60), shutdown.begun())
            .await
            .expect("the shutdown begins");
        assert!(shutdown.finish(Duration::from_secs(60)).await);
        assert_eq!(shutdown.broken(), Some("ingest"));
    }

    #[tokio::test]
    async fn a_thread_that_panics_shuts_the_node_down_and_one_that_returns_does_not() {
        let shutdown = Shutdown::new();
        let run = |alarm: Alarm, panics: bool| {
            let thread = std::thread::spawn(move || {
                let _alarm = alarm;
                assert!(!panics, "simulated panic");
            });
            thread.join().is_err()
        };
        assert!(!run(shutdown.alarm("a thread that returns"), false));
        assert!(!shutdown.has_begun());
        assert!(run(shutdown.alarm("the watcher"), true));
        assert!(shutdown.has_begun());
        assert_eq!(shutdown.broken(), Some("the watcher"));
    }
}
