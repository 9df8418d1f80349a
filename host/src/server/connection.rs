//! One connection as others know it: the handlers of its requests, the streams that it carries, and who may cut it.
//!
//! In HTTP/1 a stream has the connection for itself. In HTTP/2 it has a share of it, which moves by the peer's window and not by the socket,
//! and which is cut alone: behind a proxy, the other streams of the connection are other people's.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use crate::delivery::sse;

/// A connection, as the handlers of its requests know it: in the extensions of each request, as `Arc<Connection>`.
#[derive(Debug)]
pub struct Connection {
    peer: SocketAddr,
    is_surplus: bool,
    has_request: AtomicBool,
    kill: CancellationToken,
    /// Bytes that the system has taken.
    n_taken: AtomicU64,
    /// A stream that waits for the system to take more.
    writer: AtomicWaker,
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
            kill,
            n_taken,
            writer,
        }
    }

    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Whether it came above the bound on connections, and should be told so and nothing else.
    pub fn is_surplus(&self) -> bool {
        self.is_surplus
    }

    pub(super) fn has_request(&self) -> bool {
        self.has_request.load(Relaxed)
    }

    pub(super) fn note_request(&self) {
        self.has_request.store(true, Relaxed);
    }

    /// Returns when somebody cut it. Cancel-safe.
    pub(super) async fn killed(&self) {
        self.kill.cancelled().await;
    }

    /// What carries the response to the request that is being served in this task.
    pub(super) fn carrier(self: &Arc<Self>) -> Arc<dyn sse::Socket> {
        match CUT.try_with(CancellationToken::clone) {
            Ok(cut) => Arc::new(Share {
                n_asked: AtomicU64::new(0),
                cut,
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
        // Registered before looking again, or what is taken in between would wake nobody.
        self.writer.register(cx.waker());
        if self.taken() >= n {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }

    /// Whatever is under way, with a reset: bytes waiting for a socket that does not move would wait on.
    fn kill(&self) {
        self.kill.cancel();
    }
}

tokio::task_local! {
    /// Cuts the stream of HTTP/2 that this task serves.
    static CUT: CancellationToken;
}

/// A stream of HTTP/2.
#[derive(Debug)]
struct Share {
    n_asked: AtomicU64,
    cut: CancellationToken,
}

impl sse::Socket for Share {
    /// It asks for more when the peer's window had room for all but one piece of what came before. So each time it asks is progress.
    fn taken(&self) -> u64 {
        self.n_asked.load(Relaxed)
    }

    /// The protocol bounds by itself what waits of one stream.
    fn poll_taken(&self, _: &mut Context<'_>, _: u64) -> Poll<()> {
        self.n_asked.fetch_add(1, Relaxed);
        Poll::Ready(())
    }

    fn kill(&self) {
        self.cut.cancel();
    }
}

/// Spawns a task for each stream of HTTP/2, which can be cut: dropping it resets the stream.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spawner;

impl<F: Future<Output: Send> + Send + 'static> hyper::rt::Executor<F> for Spawner {
    fn execute(&self, serving: F) {
        let cut = CancellationToken::new();
        tokio::spawn(CUT.scope(cut.clone(), async move {
            tokio::select! {
                biased;
                () = cut.cancelled() => {}
                _ = serving => {}
            }
        }));
    }
}

/// A socket that says how much it has taken.
pub(super) struct Socket {
    pub(super) stream: TcpStream,
    pub(super) connection: Arc<Connection>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Without it the kernel would keep what the peer does not take for minutes.
        if self.connection.kill.is_cancelled()
            && let Err(error) = self.stream.set_zero_linger()
        {
            tracing::debug!(peer = %self.connection.peer, %error, "no reset; the kernel keeps what was not taken");
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
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
