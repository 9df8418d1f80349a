//! One connection, as seen by the handlers of its requests, the streams that it carries, and the
//! code that may cut it.
//!
//! In HTTP/1, a stream owns the connection. In HTTP/2, it is one of several: its progress is
//! limited by the peer's window and not by the socket, and it is cut alone, because behind a proxy
//! the other streams of the connection belong to other clients.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use crate::delivery::sse;

/// A connection. Each request has it in its extensions, as `Arc<Connection>`.
#[derive(Debug)]
pub struct Connection {
    peer: SocketAddr,
    is_surplus: bool,
    has_request: AtomicBool,
    usage: Mutex<Usage>,
    kill: CancellationToken,
    /// Bytes that the kernel has accepted.
    n_taken: AtomicU64,
    /// The waker of a stream that waits for the kernel to accept more bytes.
    writer: AtomicWaker,
}

/// The requests in progress on a connection.
#[derive(Debug)]
struct Usage {
    n_requests: usize,
    /// When the last request ended.
    idle_since: Instant,
}

/// A request in progress, from its head until its response is written or dropped.
#[derive(Debug)]
pub(super) struct InProgress(Arc<Connection>);

impl Drop for InProgress {
    fn drop(&mut self) {
        let mut usage = self.0.usage();
        usage.n_requests -= 1;
        usage.idle_since = Instant::now();
    }
}

/// The body of a response; its request is in progress until it is dropped.
#[derive(Debug)]
pub(super) struct ResponseBody {
    pub(super) body: axum::body::Body,
    pub(super) _in_progress: InProgress,
}

impl http_body::Body for ResponseBody {
    type Data = bytes::Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<bytes::Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

impl Connection {
    pub(super) fn new(peer: SocketAddr, is_surplus: bool, kill: CancellationToken) -> Self {
        let (has_request, n_taken, writer) = (
            AtomicBool::new(false),
            AtomicU64::new(0),
            AtomicWaker::new(),
        );
        Self {
            peer,
            is_surplus,
            has_request,
            usage: Mutex::new(Usage {
                n_requests: 0,
                idle_since: Instant::now(),
            }),
            kill,
            n_taken,
            writer,
        }
    }

    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Whether the connection is above the limit; its requests are then refused.
    pub fn is_surplus(&self) -> bool {
        self.is_surplus
    }

    pub(super) fn has_request(&self) -> bool {
        self.has_request.load(Relaxed)
    }

    pub(super) fn begin_request(self: &Arc<Self>) -> InProgress {
        self.has_request.store(true, Relaxed);
        self.usage().n_requests += 1;
        InProgress(Arc::clone(self))
    }

    /// How long no request has been in progress; `None` while one is.
    pub(super) fn idle_for(&self) -> Option<Duration> {
        let usage = self.usage();
        (usage.n_requests == 0).then(|| usage.idle_since.elapsed())
    }

    fn usage(&self) -> std::sync::MutexGuard<'_, Usage> {
        self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when the connection is cut. Cancel-safe.
    pub(super) async fn killed(&self) {
        self.kill.cancelled().await;
    }

    /// The socket that carries the response to the request served by the current task.
    pub(super) fn carrier(self: &Arc<Self>) -> Arc<dyn sse::Socket> {
        match CANCEL.try_with(CancellationToken::clone) {
            Ok(cancel) => Arc::new(Http2Stream {
                n_polls: AtomicU64::new(0),
                cancel,
            }),
            Err(_) => Arc::clone(self) as Arc<dyn sse::Socket>,
        }
    }

    fn note_write(&self, outcome: &Poll<io::Result<usize>>) {
        if let Poll::Ready(Ok(n)) = outcome {
            self.n_taken.fetch_add(*n as u64, Relaxed);
            self.writer.wake();
        }
    }
}

impl sse::Socket for Connection {
    fn taken(&self) -> u64 {
        self.n_taken.load(Relaxed)
    }

    fn poll_taken(&self, cx: &mut Context<'_>, n: u64) -> Poll<()> {
        if self.taken() >= n {
            return Poll::Ready(());
        }
        // Register before checking again: bytes accepted in between would otherwise wake no task.
        self.writer.register(cx.waker());
        if self.taken() >= n {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }

    /// Cuts the connection with a reset, even in the middle of a response: bytes queued for a
    /// stalled socket would otherwise wait on.
    fn kill(&self) {
        self.kill.cancel();
    }
}

tokio::task_local! {
    /// Cuts the HTTP/2 stream that this task serves.
    static CANCEL: CancellationToken;
}

/// An HTTP/2 stream.
#[derive(Debug)]
struct Http2Stream {
    n_polls: AtomicU64,
    cancel: CancellationToken,
}

impl sse::Socket for Http2Stream {
    /// Hyper polls for more when the peer's window had room for all but one chunk of the previous
    /// data, so each poll is progress.
    fn taken(&self) -> u64 {
        self.n_polls.load(Relaxed)
    }

    /// HTTP/2 flow control already bounds the unsent bytes of a stream.
    fn poll_taken(&self, _: &mut Context<'_>, _: u64) -> Poll<()> {
        self.n_polls.fetch_add(1, Relaxed);
        Poll::Ready(())
    }

    fn kill(&self) {
        self.cancel.cancel();
    }
}

/// Spawns a task for each HTTP/2 stream. The task can be cut; dropping it resets the stream.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spawner;

impl<F: Future<Output: Send> + Send + 'static> hyper::rt::Executor<F> for Spawner {
    fn execute(&self, serving: F) {
        let cancel = CancellationToken::new();
        tokio::spawn(CANCEL.scope(cancel.clone(), async move {
            tokio::select! {
                biased;
                () = cancel.cancelled() => {}
                _ = serving => {}
            }
        }));
    }
}

/// A socket that reports how many bytes it has accepted.
pub(super) struct CountingSocket {
    pub(super) stream: TcpStream,
    pub(super) connection: Arc<Connection>,
}

impl Drop for CountingSocket {
    fn drop(&mut self) {
        // Otherwise the kernel would keep undelivered bytes for minutes.
        if self.connection.kill.is_cancelled()
            && let Err(error) = self.stream.set_zero_linger()
        {
            tracing::debug!(peer = %self.connection.peer, %error, "cannot reset the connection; the kernel keeps undelivered bytes");
        }
    }
}

impl AsyncRead for CountingSocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for CountingSocket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.connection.note_write(&outcome);
        outcome
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.connection.note_write(&outcome);
        outcome
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
