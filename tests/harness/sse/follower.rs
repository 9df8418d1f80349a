//! A client that reconnects like a browser: it reads its stream in its own thread and reconnects
//! with its last event id whenever it is cut, until it is stopped or gets another response than a
//! stream. [`Stream`] checks the bytes.

use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Notification, OpenError, Request, Stream};

/// Everything that a [`Follower`] has received so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Record {
    /// In the order of arrival.
    pub(crate) notifications: Vec<Notification>,
    /// The data of every `gap`.
    pub(crate) gaps: Vec<String>,
    /// The number of streams opened.
    pub(crate) connections: usize,
    pub(crate) last_event_id: String,
    /// The response that made it give up: like a browser, it stops at any status but 200.
    pub(crate) gave_up: Option<String>,
}

/// A client in its own thread that reads its stream, and reconnects with its last event id whenever
/// it is cut.
///
/// It reconnects after 20 ms regardless of `retry:`, because tests need many reconnects.
pub(crate) struct Follower {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    record: Record,
    /// A handle to the open connection.
    scissors: Option<TcpStream>,
    stopping: bool,
    /// Does not reconnect before this moment.
    away_until: Option<Instant>,
}

impl Follower {
    /// Follows `/v1/stream?query` without waiting for the first connection; see
    /// [`Follower::connected`].
    pub(crate) fn start(addr: SocketAddr, query: &str) -> Self {
        let shared = Arc::new(Shared::default());
        let (query, worker) = (query.to_owned(), shared.clone());
        let thread = std::thread::spawn(move || worker.follow(addr, &query));
        Self {
            shared,
            thread: Some(thread),
        }
    }

    /// Waits until it has a first event id: from then on it misses nothing.
    ///
    /// # Panics
    /// If that takes longer than `within`.
    pub(crate) fn connected(self, within: Duration) -> Self {
        self.wait(within, "a first event id", |record| {
            !record.last_event_id.is_empty()
        });
        self
    }

    /// Waits until `wish` accepts the record, and returns the record.
    ///
    /// # Panics
    /// If that takes longer than `within`, or the follower gave up or panicked.
    pub(crate) fn wait(
        &self,
        within: Duration,
        what: &str,
        wish: impl FnMut(&Record) -> bool,
    ) -> Record {
        self.wait_until(within, what, wish).record.clone()
    }

    /// Like [`Follower::wait`], without copying a long record.
    ///
    /// # Panics
    /// Like [`Follower::wait`].
    pub(crate) fn look(&self, within: Duration, what: &str, wish: impl FnMut(&Record) -> bool) {
        drop(self.wait_until(within, what, wish));
    }

    fn wait_until(
        &self,
        within: Duration,
        what: &str,
        mut wish: impl FnMut(&Record) -> bool,
    ) -> MutexGuard<'_, State> {
        let deadline = Instant::now() + within;
        let mut state = self.shared.lock();
        while !wish(&state.record) {
            assert!(
                state.record.gave_up.is_none(),
                "waiting for {what}, but it gave up: {:?}",
                state.record
            );
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero(),
                "no {what} within {within:?}; {} notifications received, the last {:?}",
                state.record.notifications.len(),
                state.record.notifications.last()
            );
            assert!(
                !self.thread.as_ref().is_some_and(JoinHandle::is_finished),
                "waiting for {what}, but the follower panicked"
            );
            state = self
                .shared
                .changed
                .wait_timeout(state, left.min(Duration::from_secs(1)))
                .expect("the follower panicked")
                .0;
        }
        state
    }

    /// Removes the notifications from the record and returns them.
    #[allow(dead_code, reason = "for the demo, which includes this file")]
    pub(crate) fn take_notifications(&self) -> Vec<Notification> {
        std::mem::take(&mut self.shared.lock().record.notifications)
    }

    /// Cuts the connection, if one is open, like a lost network, and reconnects after the given
    /// time at the earliest.
    pub(crate) fn cut(&self, away: Duration) {
        let mut state = self.shared.lock();
        state.away_until = Some(Instant::now() + away);
        state.cut();
    }

    /// Stops the follower and returns its record.
    ///
    /// # Panics
    /// With the panic of the follower, if it panicked.
    pub(crate) fn stop(mut self) -> Record {
        self.end()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        self.shared.lock().record.clone()
    }

    fn end(&mut self) -> std::thread::Result<()> {
        {
            let mut state = self
                .shared
                .state
                .lock()
                .unwrap_or_else(|poisoned| poisoned.into_inner());
            state.stopping = true;
            state.cut();
        }
        self.shared.changed.notify_all();
        self.thread.take().map_or(Ok(()), JoinHandle::join)
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        // The thread reported its own panic; a second one here would hide the failure of the test.
        drop(self.end());
    }
}

impl State {
    fn cut(&mut self) {
        if let Some(socket) = self.scissors.take() {
            // It may be closed already, which is fine.
            drop(socket.shutdown(Shutdown::Both));
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the follower panicked")
    }

    fn follow(&self, addr: SocketAddr, query: &str) {
        loop {
            let mut state = self.lock();
            loop {
                if state.stopping {
                    return;
                }
                let Some(left) = state
                    .away_until
                    .map(|until| until.saturating_duration_since(Instant::now()))
                    .filter(|left| !left.is_zero())
                else {
                    break;
                };
                state = self
                    .changed
                    .wait_timeout(state, left)
                    .expect("no panic under the lock")
                    .0;
            }
            let request = Request::new(addr, query).last_event_id(&state.record.last_event_id);
            drop(state);
            match request.open(Duration::from_secs(5)) {
                Ok(stream) => self.read(stream),
                Err(OpenError { status: None, .. }) => {}
                Err(OpenError {
                    status: Some(_),
                    text,
                }) => {
                    self.lock().record.gave_up = Some(text);
                    self.changed.notify_all();
                    return;
                }
            }
            let state = self.lock();
            drop(
                self.changed
                    .wait_timeout_while(state, Duration::from_millis(20), |state| !state.stopping),
            );
        }
    }

    fn read(&self, mut stream: Stream) {
        {
            let mut state = self.lock();
            if state.stopping {
                return;
            }
            state.scissors = stream.scissors().ok();
            state.record.connections += 1;
        }
        loop {
            match stream.next_frame(Duration::from_secs(3600)) {
                Ok(frame) => {
                    let mut state = self.lock();
                    state.record.notifications.extend(frame.notification());
                    if frame.state() == Some("gap") {
                        state.record.gaps.push(frame.data.unwrap_or_default());
                    }
                    stream
                        .last_event_id()
                        .clone_into(&mut state.record.last_event_id);
                    self.changed.notify_all();
                    drop(state);
                    stream.forget();
                }
                Err(_) => {
                    self.lock().scissors = None;
                    return;
                }
            }
        }
    }
}
