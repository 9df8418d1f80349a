//! One connection, as seen by the handlers of its requests, the streams that it carries, and the
//! code that may cut it.
//!
//! In HTTP/1, a stream owns the connection. In HTTP/2, it is one of several: its progress is
//! limited by the peer's window and not by the socket, and it is cut alone, because behind a proxy
//! the other streams of the connection belong to other clients.
//!
//! A response that is not a stream is cut if its client takes none of it for the stall timeout: in
//! HTTP/2 by itself, in HTTP/1 with its connection. `sse` cuts stalled streams.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::Version;
use bytes::Bytes;
use futures_util::task::AtomicWaker;
use http_body::{Body as _, Frame};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::delivery::sse;

/// The part of a response that is handed to hyper at a time. Hyper, and in HTTP/2 its send buffer,
/// hold at most this much beyond what the client takes.
const CHUNK: usize = 16 * 1024;

/// A connection. Each request has it in its extensions, as `Arc<Connection>`.
#[derive(Debug)]
pub struct Connection {
    peer: SocketAddr,
    surplus: Option<Surplus>,
    usage: Mutex<Usage>,
    kill: CancellationToken,
    /// Bytes that the kernel has accepted.
    n_taken: AtomicU64,
    /// The waker of a stream that waits for the kernel to accept more bytes.
    writer: AtomicWaker,
    /// The bytes that its responses may hold together.
    response_share: OnceLock<Arc<Semaphore>>,
    /// The bytes that its request bodies may hold together.
    body_share: OnceLock<Arc<Semaphore>>,
}

/// Why the requests of a connection are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Surplus {
    /// The listener is at its limit.
    Listener,
    /// The client address has opened too many in a short time; how long it has to wait.
    TooFast(Duration),
}

/// The requests in progress on a connection.
#[derive(Debug)]
struct Usage {
    n_requests: usize,
    /// Since when the head of a request is incomplete; from the first on, since its first byte.
    head_since: Option<Instant>,
    /// Whether it is HTTP/2, where bytes may arrive outside of requests.
    is_http_2: bool,
    /// When the last request ended.
    idle_since: Instant,
    /// The responses under way that are streams.
    n_streams: usize,
    /// Since when the kernel accepts no bytes, because the peer reads none.
    blocked_since: Option<Instant>,
    /// The other responses under way in HTTP/2.
    multiplexed: BTreeMap<u64, MultiplexedResponse>,
    last_response: u64,
}

/// A response in HTTP/2 that is not a stream.
#[derive(Debug)]
struct MultiplexedResponse {
    /// When the client last took a chunk.
    moved: Instant,
    cancel: CancellationToken,
}

/// A request in progress, from its head until its response is written or dropped.
#[derive(Debug)]
pub(super) struct InProgress {
    connection: Arc<Connection>,
    kind: ResponseKind,
}

#[derive(Debug)]
enum ResponseKind {
    /// Not known yet, or one that is cut with its connection.
    Plain,
    Stream,
    /// By its number among the responses of the connection.
    Multiplexed(u64),
}

impl InProgress {
    /// Marks the response as a stream, or else as one that is cut if its client takes nothing. To be
    /// called in the task that serves the request.
    fn begin_response(&mut self, is_stream: bool) {
        let mut usage = self.connection.usage();
        if is_stream {
            usage.n_streams += 1;
            self.kind = ResponseKind::Stream;
        } else if let Ok(cancel) = CANCEL.try_with(CancellationToken::clone) {
            usage.last_response += 1;
            let number = usage.last_response;
            let moved = Instant::now();
            usage
                .multiplexed
                .insert(number, MultiplexedResponse { moved, cancel });
            self.kind = ResponseKind::Multiplexed(number);
        }
    }

    /// The client has taken the previous chunk: hyper polls for more only then.
    fn note_progress(&self) {
        if let ResponseKind::Multiplexed(number) = self.kind
            && let Some(response) = self.connection.usage().multiplexed.get_mut(&number)
        {
            response.moved = Instant::now();
        }
    }
}

impl Drop for InProgress {
    fn drop(&mut self) {
        let mut usage = self.connection.usage();
        usage.n_requests -= 1;
        usage.idle_since = Instant::now();
        match self.kind {
            ResponseKind::Plain => {}
            ResponseKind::Stream => usage.n_streams -= 1,
            ResponseKind::Multiplexed(number) => {
                usage.multiplexed.remove(&number);
            }
        }
    }
}

/// The body of a response; its request is in progress until it is dropped. A body other than a
/// stream is passed on in chunks, so that it is dropped only when the client has taken nearly all of
/// it.
#[derive(Debug)]
pub(super) struct ResponseBody {
    body: Body,
    is_stream: bool,
    /// The rest of a frame of `body`.
    rest: Bytes,
    in_progress: InProgress,
}

impl ResponseBody {
    /// Must be called in the task that serves the request.
    pub(super) fn new(body: Body, mut in_progress: InProgress) -> Self {
        // A stream has no end yet, and every other response is complete when it begins.
        let is_stream = body.size_hint().exact().is_none();
        in_progress.begin_response(is_stream);
        Self {
            body,
            is_stream,
            rest: Bytes::new(),
            in_progress,
        }
    }

    fn next_chunk(&mut self) -> Frame<Bytes> {
        let n = self.rest.len().min(CHUNK);
        // Copied: a chunk in hyper's buffers would keep the whole response in memory.
        Frame::data(Bytes::copy_from_slice(&self.rest.split_to(n)))
    }
}

impl http_body::Body for ResponseBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.in_progress.note_progress();
        if !self.rest.is_empty() {
            return Poll::Ready(Some(Ok(self.next_chunk())));
        }
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        let Poll::Ready(Some(Ok(frame))) = polled else {
            return polled;
        };
        Poll::Ready(Some(Ok(match frame.into_data() {
            Ok(data) if data.len() > CHUNK && !self.is_stream => {
                self.rest = data;
                self.next_chunk()
            }
            Ok(data) => Frame::data(data),
            Err(frame) => frame,
        })))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        let mut hint = self.body.size_hint();
        let n_rest = self.rest.len() as u64;
        match hint.exact() {
            Some(n) => hint.set_exact(n + n_rest),
            None => hint.set_lower(hint.lower() + n_rest),
        }
        hint
    }
}

/// The result of a look for stalled responses.
#[derive(Debug)]
pub(super) struct StallCheck {
    /// The number of responses cut.
    pub(super) n_cut: u64,
    /// When the next one could be due.
    pub(super) next: Instant,
}

impl Connection {
    pub(super) fn new(peer: SocketAddr, surplus: Option<Surplus>, kill: CancellationToken) -> Self {
        let (n_taken, writer) = (AtomicU64::new(0), AtomicWaker::new());
        Self {
            peer,
            surplus,
            usage: Mutex::new(Usage {
                n_requests: 0,
                head_since: Some(Instant::now()),
                is_http_2: false,
                idle_since: Instant::now(),
                n_streams: 0,
                blocked_since: None,
                multiplexed: BTreeMap::new(),
                last_response: 0,
            }),
            kill,
            n_taken,
            writer,
            response_share: OnceLock::new(),
            body_share: OnceLock::new(),
        }
    }

    /// The bytes that the connection's responses may hold together; `new` sets them the first time.
    pub(super) fn response_share(&self, new: impl FnOnce() -> Semaphore) -> Arc<Semaphore> {
        Arc::clone(self.response_share.get_or_init(|| Arc::new(new())))
    }

    /// The bytes that the connection's request bodies may hold together; `new` sets them the first
    /// time.
    pub fn body_share(&self, new: impl FnOnce() -> Semaphore) -> Arc<Semaphore> {
        Arc::clone(self.body_share.get_or_init(|| Arc::new(new())))
    }

    /// Cuts the responses of which the client took nothing for `stall_timeout`, streams excepted.
    pub(super) fn cut_stalled(&self, stall_timeout: Duration) -> StallCheck {
        let now = Instant::now();
        let usage = self.usage();
        // While a stream is open, the stream timer decides: it counts and logs the streams it cuts.
        let blocked = usage.blocked_since.filter(|_| usage.n_streams == 0);
        let is_due = |since: Instant| now.duration_since(since) >= stall_timeout;
        if blocked.is_some_and(is_due) {
            self.kill.cancel();
            let next = now + stall_timeout;
            return StallCheck { n_cut: 1, next };
        }
        let (stalled, moving): (Vec<_>, Vec<_>) = usage
            .multiplexed
            .values()
            .partition(|response| is_due(response.moved));
        for response in &stalled {
            response.cancel.cancel();
        }
        let since = moving.iter().map(|response| response.moved).chain(blocked);
        StallCheck {
            n_cut: stalled.len() as u64,
            next: since.min().unwrap_or(now) + stall_timeout,
        }
    }

    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Whether the connection is above a limit; its requests are then refused.
    pub fn is_surplus(&self) -> bool {
        self.surplus.is_some()
    }

    pub fn surplus(&self) -> Option<Surplus> {
        self.surplus
    }

    pub(super) fn begin_request(self: &Arc<Self>, version: Version) -> InProgress {
        let mut usage = self.usage();
        usage.n_requests += 1;
        usage.head_since = None;
        usage.is_http_2 |= version == Version::HTTP_2;
        drop(usage);
        InProgress {
            connection: Arc::clone(self),
            kind: ResponseKind::Plain,
        }
    }

    /// When the head that is incomplete must have arrived; `None` if none is.
    pub(super) fn head_deadline(&self, header_timeout: Duration) -> Option<Instant> {
        self.usage().head_since.map(|since| since + header_timeout)
    }

    /// In HTTP/1, the first bytes while no request is in progress begin the next head.
    fn note_read(&self) {
        let mut usage = self.usage();
        if usage.n_requests == 0 && !usage.is_http_2 {
            usage.head_since.get_or_insert_with(Instant::now);
        }
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
        match outcome {
            Poll::Ready(Ok(n)) => {
                self.usage().blocked_since = None;
                self.n_taken.fetch_add(*n as u64, Relaxed);
                self.writer.wake();
            }
            Poll::Ready(Err(_)) => {}
            Poll::Pending => {
                self.usage().blocked_since.get_or_insert_with(Instant::now);
            }
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
        let n_before = buf.filled().len();
        let outcome = Pin::new(&mut self.stream).poll_read(cx, buf);
        if buf.filled().len() > n_before {
            self.connection.note_read();
        }
        outcome
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
