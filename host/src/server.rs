//! The accept loop: sockets in, requests to the routes, and a handle on each connection.
//!
//! Hyper directly (HTTP/1.0, 1.1, and 2 with prior knowledge), not `axum::serve`, so that a stream can leave hyper once its head is parsed
//! and a connection whose socket does not move can be cut. It promises that connections are bounded, that a client who says nothing is
//! dropped, and that a shutdown lets running requests end. What a request means is `http`'s; when a stream ends is `sse`'s.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use serde::{Deserialize, Serialize};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use crate::shutdown::Shutdown;
use crate::sse;

/// The most bytes that wait for a socket, with us and with the system each, beyond what is on its way to the client: they are overtaken by nothing any
/// more, however urgent.
const MAX_UNSENT: usize = 16 * 1024;

/// The `[listen]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// For `/v1/*` (127.0.0.1:8080).
    pub address: SocketAddr,
    /// For `/healthz`, `/readyz`, `/metrics` and `/v1/decisions`, which ask nobody who they are, and `/v1/events`, which asks for the key (127.0.0.1:8081).
    pub admin: SocketAddr,
    /// Origins whose pages may call `address` from a browser, such as `https://shop.example` (none; in dev mode every loopback origin).
    pub origins: Vec<String>,
    /// Open connections to `address` (10,000). A few more are answered that it is too many, the rest are closed.
    pub max_connections: usize,
    /// Seconds that a client has to send a request's head (10).
    pub header_timeout_s: u64,
    /// Seconds that a shutdown may take; streams end spread over them (10).
    pub grace_s: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 8080)),
            admin: SocketAddr::from((Ipv4Addr::LOCALHOST, 8081)),
            origins: Vec::new(),
            max_connections: 10_000,
            header_timeout_s: 10,
            grace_s: 10,
        }
    }
}

/// The bounds of one listener.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub max_connections: usize,
    pub header_timeout: Duration,
}

/// A connection, as the handlers of its requests know it: in the extensions of each request, as `Arc<Connection>`.
#[derive(Debug)]
pub struct Connection {
    peer: SocketAddr,
    is_surplus: bool,
    has_request: AtomicBool,
    kill: CancellationToken,
    /// The start of time for `stalled_since_ms`.
    accepted: Instant,
    /// When the socket last refused bytes and has taken none since, in milliseconds after `accepted`, plus one; 0: it takes what it gets.
    stalled_since_ms: AtomicU64,
}

impl Connection {
    fn new(peer: SocketAddr, is_surplus: bool, kill: CancellationToken) -> Self {
        Self { peer, is_surplus, has_request: AtomicBool::new(false), kill, accepted: Instant::now(), stalled_since_ms: AtomicU64::new(0) }
    }

    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Whether it came above the bound on connections, and should be told so and nothing else.
    pub fn is_surplus(&self) -> bool {
        self.is_surplus
    }

    fn note_write<T>(&self, outcome: &Poll<io::Result<T>>) {
        match outcome {
            Poll::Pending if self.stalled_since_ms.load(Relaxed) == 0 => {
                let now = u64::try_from(self.accepted.elapsed().as_millis()).unwrap_or(u64::MAX - 1);
                self.stalled_since_ms.store(now + 1, Relaxed);
            }
            Poll::Ready(_) if self.stalled_since_ms.load(Relaxed) != 0 => self.stalled_since_ms.store(0, Relaxed),
            _ => {}
        }
    }
}

impl sse::Socket for Connection {
    fn stalled_for(&self) -> Option<Duration> {
        let since = self.stalled_since_ms.load(Relaxed).checked_sub(1)?;
        Some(self.accepted.elapsed().saturating_sub(Duration::from_millis(since)))
    }

    /// Whatever is under way, with a reset: bytes waiting for a socket that does not move would wait on.
    fn kill(&self) {
        self.kill.cancel();
    }
}

/// Binds an address, also right after a process that held it was killed.
///
/// # Errors
/// The address is taken or not this machine's.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    // A storm of reconnecting streams waits here and not in SYN retries of a second each.
    socket.listen(4096)
}

/// Serves `routes` until the shutdown begins, then lets running requests end. It returns when the last connection is gone: bounding that
/// is `lib.rs`'s grace period, after which `Shutdown::skip` cuts the rest.
pub async fn serve(listener: TcpListener, routes: axum::Router, bounds: Bounds, shutdown: Shutdown) {
    let permits = Arc::new(Semaphore::new(bounds.max_connections.clamp(1, Semaphore::MAX_PERMITS)));
    // Room to answer "too many" in HTTP, for an `EventSource` to read when to come back; bounded as well.
    let surplus_permits = Arc::new(Semaphore::new(bounds.max_connections / 16 + 16));
    let connections = tokio_util::task::TaskTracker::new();
    let kill_all = CancellationToken::new();
    loop {
        let accepted = tokio::select! {
            () = shutdown.begun() => break,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) if is_of_one_connection(&error) => continue,
            Err(error) => {
                // Out of file descriptors, most likely: accepting at once would fail again and burn a core.
                tracing::error!(%error, "cannot accept connections; raise the limit of open files (ulimit -n) above listen.max_connections");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (permit, is_surplus) = match Arc::clone(&permits).try_acquire_owned() {
            Ok(permit) => (permit, false),
            Err(_) => match Arc::clone(&surplus_permits).try_acquire_owned() {
                Ok(permit) => (permit, true),
                // Closed without a word; for an `EventSource` that is a network error, after which it comes again.
                Err(_) => continue,
            },
        };
        let connection = Arc::new(Connection::new(peer, is_surplus, kill_all.child_token()));
        // Here a stream will leave hyper: read the head of the first request ourselves; a GET of /v1/stream in HTTP/1 goes to a writer of our
        // own that keeps the bare socket, every other one to hyper with the bytes read put back in front of it.
        connections.spawn(drive(stream, connection, routes.clone(), bounds.header_timeout, shutdown.clone(), permit));
    }
    drop(listener);
    connections.close();
    tokio::select! {
        () = connections.wait() => return,
        () = shutdown.skipped() => kill_all.cancel(),
    }
    connections.wait().await;
}

/// One connection, from its first byte to its end.
async fn drive(
    stream: TcpStream,
    connection: Arc<Connection>,
    routes: axum::Router,
    header_timeout: Duration,
    shutdown: Shutdown,
    permit: OwnedSemaphorePermit,
) {
    // A frame must leave when it is written, not when the peer has acknowledged the one before.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(peer = %connection.peer, %error, "no TCP_NODELAY; frames are late");
    }
    // The system would take megabytes for a client that does not read.
    if let Err(error) = SockRef::from(&stream).set_tcp_notsent_lowat(MAX_UNSENT as u32) {
        tracing::debug!(peer = %connection.peer, %error, "no TCP_NOTSENT_LOWAT; what is urgent waits behind what the system has taken");
    }
    let handle = Arc::clone(&connection);
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        handle.has_request.store(true, Relaxed);
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(Arc::clone(&handle));
        routes.clone().oneshot(request)
    });
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .keep_alive(!connection.is_surplus)
        .max_headers(100)
        // Also the longest request head.
        .max_buf_size(MAX_UNSENT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_send_buf_size(MAX_UNSENT)
        .max_concurrent_streams(128)
        .max_header_list_size(32 * 1024)
        // A peer that vanished without a word is found out by a ping; HTTP/1 streams by their heartbeat.
        .keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(20));
    let mut serving = pin!(builder.serve_connection(TokioIo::new(Socket { stream, connection: Arc::clone(&connection) }), service));
    // Hyper's own timer starts with the first bytes of a head it takes for HTTP/1; a client that says nothing, or half of HTTP/2's preface,
    // is only noticed here. A surplus connection has this long in all.
    let mut deadline = pin!(tokio::time::sleep(header_timeout));
    let (mut is_ending, mut is_timed) = (false, true);
    loop {
        tokio::select! {
            biased;
            () = connection.kill.cancelled() => break,
            ended = serving.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(peer = %connection.peer, %error, "connection ended");
                }
                break;
            }
            () = shutdown.begun(), if !is_ending => {
                is_ending = true;
                serving.as_mut().graceful_shutdown();
            }
            () = deadline.as_mut(), if is_timed => {
                is_timed = false;
                if connection.is_surplus || !connection.has_request.load(Relaxed) {
                    break;
                }
            }
        }
    }
    drop(permit);
}

/// Whether an error of `accept` says something of one connection only.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionRefused | io::ErrorKind::Interrupted
    )
}

/// A socket that notes whether it moves.
struct Socket {
    stream: TcpStream,
    connection: Arc<Connection>,
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
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.connection.note_write(&outcome);
        outcome
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sse::Socket as _;
    use axum::Extension;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

    fn start(bounds: Bounds, routes: axum::Router) -> (SocketAddr, Shutdown, tokio::task::JoinHandle<()>) {
        let listener = bind(LOOPBACK).unwrap();
        let (address, shutdown) = (listener.local_addr().unwrap(), Shutdown::new());
        let task = tokio::spawn(serve(listener, routes, bounds, shutdown.clone()));
        (address, shutdown, task)
    }

    fn bounds(max_connections: usize, header_timeout: Duration) -> Bounds {
        Bounds { max_connections, header_timeout }
    }

    /// Everything that the server sends until it closes.
    async fn transcript(stream: &mut TcpStream) -> String {
        let (mut bytes, mut chunk) = (Vec::new(), [0; 4096]);
        // A reset also ends it.
        while let Ok(n @ 1..) = stream.read(&mut chunk).await {
            bytes.extend_from_slice(&chunk[..n]);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    #[tokio::test]
    async fn a_client_that_says_nothing_is_dropped() {
        for first_bytes in ["", "PRI * HT", "GET / HTTP/1.1\r\nHo"] {
            let (address, ..) = start(bounds(10, Duration::from_millis(50)), axum::Router::new());
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(first_bytes.as_bytes()).await.unwrap();
            let ended = tokio::time::timeout(Duration::from_secs(10), transcript(&mut stream)).await;
            assert!(ended.is_ok(), "{first_bytes:?} held the connection");
        }
    }

    #[tokio::test]
    async fn one_connection_too_many_is_marked_and_closed_after_its_answer() {
        let routes = axum::Router::new()
            .route("/", get(|Extension(c): Extension<Arc<Connection>>| async move { format!("surplus: {}", c.is_surplus()) }));
        let (address, ..) = start(bounds(1, Duration::from_secs(60)), routes);
        let mut first = TcpStream::connect(address).await.unwrap();
        first.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut answer = vec![0; 4096];
        let n = first.read(&mut answer).await.unwrap();
        assert!(String::from_utf8_lossy(&answer[..n]).ends_with("surplus: false"));

        let mut second = TcpStream::connect(address).await.unwrap();
        second.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        assert!(transcript(&mut second).await.ends_with("surplus: true"));
    }

    #[tokio::test]
    async fn a_socket_that_does_not_move_is_seen_and_can_be_cut() {
        let (found, mut handles) = tokio::sync::mpsc::unbounded_channel();
        let endless = move |Extension(connection): Extension<Arc<Connection>>| async move {
            found.send(connection).unwrap();
            let chunk = bytes::Bytes::from(vec![b'x'; 64 * 1024]);
            Body::from_stream(futures_util::stream::repeat_with(move || Ok::<_, io::Error>(chunk.clone())))
        };
        let (address, shutdown, task) = start(bounds(10, Duration::from_secs(60)), axum::Router::new().route("/", get(endless)));
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let connection = handles.recv().await.unwrap();
        let stalled = async {
            while connection.stalled_for().is_none() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), stalled).await.expect("nobody reads, so the socket must fill");
        connection.kill();
        shutdown.begin();
        tokio::time::timeout(Duration::from_secs(10), task).await.expect("the killed connection must end").unwrap();
    }

    #[tokio::test]
    async fn a_shutdown_lets_a_running_request_end_and_a_skip_does_not() {
        let (gate, waiting) = (Arc::new(tokio::sync::Notify::new()), Arc::new(tokio::sync::Notify::new()));
        let (opened, arrived) = (Arc::clone(&gate), Arc::clone(&waiting));
        let slow = move || async move {
            arrived.notify_one();
            opened.notified().await;
            "done"
        };
        let (address, shutdown, task) = start(bounds(10, Duration::from_secs(60)), axum::Router::new().route("/", get(slow)));
        let mut first = TcpStream::connect(address).await.unwrap();
        first.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        waiting.notified().await;
        let mut second = TcpStream::connect(address).await.unwrap();
        second.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        waiting.notified().await;
        shutdown.begin();
        gate.notify_one();
        assert!(transcript(&mut first).await.ends_with("done"));
        shutdown.skip();
        assert_eq!(transcript(&mut second).await, "");
        task.await.unwrap();
    }

    #[tokio::test]
    async fn a_port_can_be_bound_again_at_once() {
        let (address, shutdown, task) = start(bounds(10, Duration::from_secs(60)), axum::Router::new().route("/", get(|| async { "x" })));
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.unwrap();
        // The server closed first, so its end is in TIME_WAIT now.
        transcript(&mut stream).await;
        shutdown.begin();
        task.await.unwrap();
        bind(address).unwrap();
    }
}
