//! WASI as guests see it: clocks that stand still, no waiting, and output that goes to the plugin's
//! log.
//!
//! A wait for a clock ends at once, because time does not pass for a guest: runtimes such as that of
//! Go yield by waiting for a clock while they start. A wait that nothing ends is an error.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::AsyncWrite;
use wasmtime::component::{HasData, Resource, ResourceTable};
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::clocks::HostWallClock;
use wasmtime_wasi::p2::bindings::clocks::monotonic_clock;
use wasmtime_wasi::p2::bindings::io::poll as async_poll;
use wasmtime_wasi::p2::bindings::sync::io::poll;
use wasmtime_wasi::p2::{DynPollable, OutputStream, Pollable, StreamResult, subscribe};
use wasmtime_wasi::runtime::poll_noop;

use super::log::{GuestLog, Level, MAX_LINE, printable};
use crate::event::Name;

/// The lines of the standard error that a failure reports, and the size of one of them in bytes:
/// the end of a traceback.
const MAX_TAIL: usize = 5;
const MAX_TAIL_LINE: usize = 200;

/// `wasi:clocks`, fixed at the clock of the call, so that a plugin's decision can be reproduced.
pub(super) struct FrozenClock(pub(super) Arc<AtomicU64>);

impl HostWallClock for FrozenClock {
    fn resolution(&self) -> Duration {
        Duration::from_millis(1)
    }

    fn now(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }
}

/// The monotonic clock in nanoseconds, the same in every call. Not 0, which the runtime of Go takes
/// for a broken clock.
const MONOTONIC_NS: u64 = 1_000_000_000;
const MONOTONIC_RESOLUTION_NS: u64 = 1_000_000;

/// `wasi:clocks/monotonic-clock` and `wasi:io/poll` without blocking.
pub(super) struct NoWaiting;

impl HasData for NoWaiting {
    type Data<'a> = NonBlocking<'a>;
}

pub(super) struct NonBlocking<'a>(pub(super) &'a mut ResourceTable);

/// A pollable of a clock, for any time: it is ready.
struct Alarm;

#[async_trait::async_trait]
impl Pollable for Alarm {
    async fn ready(&mut self) {}
}

impl monotonic_clock::Host for NonBlocking<'_> {
    fn now(&mut self) -> wasmtime::Result<u64> {
        Ok(MONOTONIC_NS)
    }

    fn resolution(&mut self) -> wasmtime::Result<u64> {
        Ok(MONOTONIC_RESOLUTION_NS)
    }

    fn subscribe_instant(&mut self, _when: u64) -> wasmtime::Result<Resource<DynPollable>> {
        let alarm = self.0.push(Alarm)?;
        subscribe(self.0, alarm)
    }

    fn subscribe_duration(&mut self, _ns: u64) -> wasmtime::Result<Resource<DynPollable>> {
        let alarm = self.0.push(Alarm)?;
        subscribe(self.0, alarm)
    }
}

/// The outcome of a future that does not wait for anything. The pollables of this host are ready
/// when they are first polled, or never.
///
/// # Errors
/// The future is pending, so it would block the thread for ever.
fn at_once<T>(waiting: impl Future<Output = wasmtime::Result<T>>) -> wasmtime::Result<T> {
    poll_noop(pin!(waiting)).unwrap_or_else(|| {
        Err(wasmtime::format_err!(
            "it waits (wasi:io/poll) for what never happens; plugins must not block"
        ))
    })
}

impl poll::Host for NonBlocking<'_> {
    fn poll(&mut self, pollables: Vec<Resource<DynPollable>>) -> wasmtime::Result<Vec<u32>> {
        at_once(async_poll::Host::poll(self.0, pollables))
    }
}

impl poll::HostPollable for NonBlocking<'_> {
    fn ready(&mut self, pollable: Resource<DynPollable>) -> wasmtime::Result<bool> {
        at_once(async_poll::HostPollable::ready(self.0, pollable))
    }

    fn block(&mut self, pollable: Resource<DynPollable>) -> wasmtime::Result<()> {
        at_once(async_poll::HostPollable::block(self.0, pollable))
    }

    fn drop(&mut self, pollable: Resource<DynPollable>) -> wasmtime::Result<()> {
        poll::HostPollable::drop(self.0, pollable)
    }
}

/// Standard output and error of one instance, written to the plugin's log line by line.
pub(super) struct OutputLines {
    log: Arc<GuestLog>,
    written: Mutex<Written>,
}

#[derive(Default)]
struct Written {
    /// The id of the event of the current call.
    event: Option<Name>,
    /// Lines without their end: at most [`MAX_LINE`] bytes, and one more that marks it as too long.
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    /// The last lines of the standard error in this call.
    tail: VecDeque<String>,
}

impl OutputLines {
    pub(super) fn new(log: Arc<GuestLog>) -> Self {
        Self {
            log,
            written: Mutex::default(),
        }
    }

    pub(super) fn begin_call(&self, event: &Name) {
        let mut written = self.written();
        written.event = Some(event.clone());
        written.tail.clear();
    }

    /// The last lines of the standard error in this call, in printable form, including one without
    /// an end.
    pub(super) fn last_stderr_lines(&self) -> Vec<String> {
        let written = self.written();
        let unfinished = (!written.stderr.is_empty()).then(|| tail_line(&written.stderr));
        let lines = written.tail.iter().cloned().chain(unfinished);
        let n_left_out =
            (written.tail.len() + usize::from(!written.stderr.is_empty())).saturating_sub(MAX_TAIL);
        lines.skip(n_left_out).collect()
    }

    fn write(&self, stream: OutputStreamKind, bytes: &[u8]) {
        let written = &mut *self.written();
        let (begun, level) = match stream {
            OutputStreamKind::Stdout => (&mut written.stdout, Level::Info),
            OutputStreamKind::Stderr => (&mut written.stderr, Level::Warn),
        };
        for &byte in bytes {
            if byte == b'\n' {
                let line = String::from_utf8_lossy(begun);
                self.log.line(level, written.event.as_ref(), &line);
                if level == Level::Warn && !line.trim().is_empty() {
                    if written.tail.len() == MAX_TAIL {
                        written.tail.pop_front();
                    }
                    written.tail.push_back(tail_line(begun));
                }
                begun.clear();
            } else if begun.len() <= MAX_LINE {
                begun.push(byte);
            }
        }
    }

    fn written(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn tail_line(line: &[u8]) -> String {
    let line = String::from_utf8_lossy(line);
    let line = line.trim();
    let cut = line.floor_char_boundary(MAX_TAIL_LINE);
    let end = if cut < line.len() { "…" } else { "" };
    printable(&line[..cut]) + end
}

#[derive(Clone, Copy)]
enum OutputStreamKind {
    Stdout,
    Stderr,
}

/// One of the two standard streams. A guest may open it several times.
#[derive(Clone)]
pub(super) struct GuestOutput {
    lines: Arc<OutputLines>,
    stream: OutputStreamKind,
}

impl GuestOutput {
    pub(super) fn stdout(lines: &Arc<OutputLines>) -> Self {
        Self {
            lines: Arc::clone(lines),
            stream: OutputStreamKind::Stdout,
        }
    }

    pub(super) fn stderr(lines: &Arc<OutputLines>) -> Self {
        Self {
            lines: Arc::clone(lines),
            stream: OutputStreamKind::Stderr,
        }
    }
}

impl IsTerminal for GuestOutput {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for GuestOutput {
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        // Only used by WASI preview 3, which is not linked.
        Box::new(tokio::io::sink())
    }

    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }
}

#[async_trait::async_trait]
impl OutputStream for GuestOutput {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.lines.write(self.stream, &bytes);
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(64 * 1024)
    }
}

#[async_trait::async_trait]
impl Pollable for GuestOutput {
    async fn ready(&mut self) {}
}

#[cfg(test)]
mod tests {
    use wasmtime_wasi::p2::bindings::clocks::monotonic_clock::Host as _;
    use wasmtime_wasi::p2::bindings::sync::io::poll::{Host as _, HostPollable as _};

    use super::*;

    struct Never;

    #[async_trait::async_trait]
    impl Pollable for Never {
        async fn ready(&mut self) {
            std::future::pending().await
        }
    }

    #[test]
    fn a_wait_for_a_clock_ends_at_once_and_one_that_nothing_ends_is_an_error() {
        const HOUR_NS: u64 = 3_600_000_000_000;
        let mut table = ResourceTable::new();
        let never = table.push(Never).unwrap();
        let never = subscribe(&mut table, never).unwrap();
        let mut wasi = NonBlocking(&mut table);
        let [alarm, instant] = [
            wasi.subscribe_duration(HOUR_NS).unwrap(),
            wasi.subscribe_instant(u64::MAX).unwrap(),
        ];
        let borrowed = |pollable: &Resource<DynPollable>| Resource::new_borrow(pollable.rep());

        wasi.block(borrowed(&alarm)).unwrap();
        assert!(wasi.ready(borrowed(&instant)).unwrap());
        assert!(!wasi.ready(borrowed(&never)).unwrap());
        let ready = wasi.poll(vec![borrowed(&never), borrowed(&alarm), borrowed(&instant)]);
        assert_eq!(ready.unwrap(), [1, 2]);
        assert_eq!(wasi.now().unwrap(), MONOTONIC_NS);

        let waits = "it waits (wasi:io/poll) for what never happens; plugins must not block";
        let poll = wasi.poll(vec![borrowed(&never)]).unwrap_err();
        assert_eq!(poll.to_string(), waits);
        let block = wasi.block(borrowed(&never)).unwrap_err();
        assert_eq!(block.to_string(), waits);
    }
}
