//! WASI as guests see it: clocks that stand still, no waiting, and output that goes to the plugin's
//! log.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::AsyncWrite;
use wasmtime::component::{HasData, Resource, ResourceTable};
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::clocks::{HostMonotonicClock, HostWallClock};
use wasmtime_wasi::p2::bindings::sync::io::poll;
use wasmtime_wasi::p2::{DynPollable, OutputStream, Pollable, StreamResult};

use super::log::{GuestLog, Level, MAX_LINE};

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

impl HostMonotonicClock for FrozenClock {
    fn resolution(&self) -> u64 {
        1_000_000
    }

    fn now(&self) -> u64 {
        0
    }
}

/// `wasi:io/poll` without blocking: every wait fails.
pub(super) struct NoWaiting;

impl HasData for NoWaiting {
    type Data<'a> = NonBlockingPoll<'a>;
}

pub(super) struct NonBlockingPoll<'a>(pub(super) &'a mut ResourceTable);

fn no_waiting() -> wasmtime::Error {
    wasmtime::format_err!("it waits (wasi:io/poll); plugins must not block")
}

impl poll::Host for NonBlockingPoll<'_> {
    fn poll(&mut self, _: Vec<Resource<DynPollable>>) -> wasmtime::Result<Vec<u32>> {
        Err(no_waiting())
    }
}

impl poll::HostPollable for NonBlockingPoll<'_> {
    fn ready(&mut self, _: Resource<DynPollable>) -> wasmtime::Result<bool> {
        Err(no_waiting())
    }

    fn block(&mut self, _: Resource<DynPollable>) -> wasmtime::Result<()> {
        Err(no_waiting())
    }

    fn drop(&mut self, pollable: Resource<DynPollable>) -> wasmtime::Result<()> {
        poll::HostPollable::drop(self.0, pollable)
    }
}

/// Standard output and error, written to the plugin's log line by line.
#[derive(Clone)]
pub(super) struct GuestOutput {
    pub(super) log: Arc<GuestLog>,
    pub(super) level: Level,
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
        Box::new(Lines {
            output: self.clone(),
            begun: Vec::new(),
        })
    }
}

struct Lines {
    output: GuestOutput,
    /// A line without its end: at most [`MAX_LINE`] bytes, and one more that marks it as too long.
    begun: Vec<u8>,
}

#[async_trait::async_trait]
impl OutputStream for Lines {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        for &byte in &bytes {
            if byte == b'\n' {
                self.output.log.line(
                    self.output.level,
                    None,
                    &String::from_utf8_lossy(&self.begun),
                );
                self.begun.clear();
            } else if self.begun.len() <= MAX_LINE {
                self.begun.push(byte);
            }
        }
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
impl Pollable for Lines {
    async fn ready(&mut self) {}
}
