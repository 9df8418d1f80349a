//! The accept loop: sockets in, requests to the routes, and a handle on each connection.
//!
//! Hyper directly (HTTP/1.0, 1.1, and 2 with prior knowledge), not `axum::serve`, so that a stream can leave hyper once its head is parsed
//! and a connection whose socket does not move can be cut. It promises that connections are bounded, that a client who says nothing is
//! dropped, and that a shutdown lets running requests end. What a request means is `http`'s; when a stream ends is `sse`'s.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use serde::{Deserialize, Serialize};
use socket2::SockRef;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use crate::shutdown::Shutdown;

mod connection;

pub use connection::Connection;

use connection::{Socket, Spawner};

/// The most bytes that wait with the system beyond what is on its way to the client: they are overtaken by nothing any more, however urgent.
/// What waits with us is bounded by `sse`, or in HTTP/2 by this as well.
const MAX_UNSENT: usize = 16 * 1024;
/// The longest request head: proxies pass on 32 KiB, and cookies may make use of it.
const MAX_HEAD: usize = 40 * 1024;
/// The most requests at once on a connection of HTTP/2. How many streams are open on all of them is `sse`'s to bound.
const MAX_MULTIPLEXED: u32 = 128;

/// The `[listen]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// For `/v1/*` (127.0.0.1:8080).
    pub address: SocketAddr,
    /// For `/healthz`, `/readyz`, `/metrics` and `/v1/decisions`, which ask nobody who they are, and `/v1/events` and `/v1/explain`, which ask for the key (127.0.0.1:8081).
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

/// Binds an address, also right after a process that held it was killed.
///
/// # Errors
/// The address is taken or not this machine's.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    // A storm of reconnecting streams waits here and not in SYN retries of a second each.
    socket.listen(4096)
}

/// Serves `routes` until the shutdown begins, then lets running requests end. It returns when the last connection is gone: bounding that
/// is `lib.rs`'s grace period, after which `Shutdown::skip` cuts the rest.
pub async fn serve(
    listener: TcpListener,
    routes: axum::Router,
    bounds: Bounds,
    shutdown: Shutdown,
) {
    let permits = Arc::new(Semaphore::new(
        bounds.max_connections.clamp(1, Semaphore::MAX_PERMITS),
    ));
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
        connections.spawn(drive(
            stream,
            connection,
            routes.clone(),
            bounds.header_timeout,
            shutdown.clone(),
            permit,
        ));
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
        tracing::debug!(peer = %connection.peer(), %error, "no TCP_NODELAY; frames are late");
    }
    // The system would take megabytes for a client that does not read.
    if let Err(error) = SockRef::from(&stream).set_tcp_notsent_lowat(MAX_UNSENT as u32) {
        tracing::debug!(peer = %connection.peer(), %error, "no TCP_NOTSENT_LOWAT; what is urgent waits behind what the system has taken");
    }
    let handle = Arc::clone(&connection);
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        handle.note_request();
        let (connection, routes) = (Arc::clone(&handle), routes.clone());
        async move {
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(connection.carrier());
            request.extensions_mut().insert(connection);
            routes.oneshot(request).await
        }
    });
    let mut builder = Builder::new(Spawner);
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .keep_alive(!connection.is_surplus())
        .max_headers(100)
        // Also the most that is taken of a response, but a stream gives no more than is written.
        .max_buf_size(MAX_HEAD);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_send_buf_size(MAX_UNSENT)
        .max_concurrent_streams(MAX_MULTIPLEXED)
        .max_header_list_size(MAX_HEAD as u32)
        // A peer that vanished without a word is found out by a ping; HTTP/1 streams by their heartbeat.
        .keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(20));
    let mut serving = pin!(builder.serve_connection(
        TokioIo::new(Socket {
            stream,
            connection: Arc::clone(&connection)
        }),
        service
    ));
    // Hyper's own timer starts with the first bytes of a head it takes for HTTP/1; a client that says nothing, or half of HTTP/2's preface,
    // is only noticed here. A surplus connection has this long in all.
    let mut deadline = pin!(tokio::time::sleep(header_timeout));
    let (mut is_ending, mut is_timed) = (false, true);
    loop {
        tokio::select! {
            biased;
            () = connection.killed() => break,
            ended = serving.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(peer = %connection.peer(), %error, "connection ended");
                }
                break;
            }
            () = shutdown.begun(), if !is_ending => {
                is_ending = true;
                serving.as_mut().graceful_shutdown();
            }
            () = deadline.as_mut(), if is_timed => {
                is_timed = false;
                if connection.is_surplus() || !connection.has_request() {
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
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delivery::sse;
    use axum::Extension;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

    fn start(
        bounds: Bounds,
        routes: axum::Router,
    ) -> (SocketAddr, Shutdown, tokio::task::JoinHandle<()>) {
        let listener = bind(LOOPBACK).unwrap();
        let (address, shutdown) = (listener.local_addr().unwrap(), Shutdown::new());
        let task = tokio::spawn(serve(listener, routes, bounds, shutdown.clone()));
        (address, shutdown, task)
    }

    fn bounds(max_connections: usize, header_timeout: Duration) -> Bounds {
        Bounds {
            max_connections,
            header_timeout,
        }
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
            let ended =
                tokio::time::timeout(Duration::from_secs(10), transcript(&mut stream)).await;
            assert!(ended.is_ok(), "{first_bytes:?} held the connection");
        }
    }

    #[tokio::test]
    async fn one_connection_too_many_is_marked_and_closed_after_its_answer() {
        let routes = axum::Router::new().route(
            "/",
            get(|Extension(c): Extension<Arc<Connection>>| async move {
                format!("surplus: {}", c.is_surplus())
            }),
        );
        let (address, ..) = start(bounds(1, Duration::from_secs(60)), routes);
        let mut first = TcpStream::connect(address).await.unwrap();
        first
            .write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            .await
            .unwrap();
        let mut answer = vec![0; 4096];
        let n = first.read(&mut answer).await.unwrap();
        assert!(String::from_utf8_lossy(&answer[..n]).ends_with("surplus: false"));

        let mut second = TcpStream::connect(address).await.unwrap();
        second
            .write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            .await
            .unwrap();
        assert!(transcript(&mut second).await.ends_with("surplus: true"));
    }

    #[tokio::test]
    async fn a_connection_says_what_its_socket_has_taken_and_can_be_cut_whatever_is_under_way() {
        let (found, mut handles) = tokio::sync::mpsc::unbounded_channel();
        let endless = move |Extension(socket): Extension<Arc<dyn sse::Socket>>| async move {
            found.send(socket).unwrap();
            let chunk = bytes::Bytes::from(vec![b'x'; 64 * 1024]);
            Body::from_stream(futures_util::stream::repeat_with(move || {
                Ok::<_, io::Error>(chunk.clone())
            }))
        };
        let (address, shutdown, task) = start(
            bounds(10, Duration::from_secs(60)),
            axum::Router::new().route("/", get(endless)),
        );
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream
            .write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            .await
            .unwrap();
        let socket = handles.recv().await.unwrap();
        let taken = std::future::poll_fn(|cx| socket.poll_taken(cx, 64 * 1024));
        tokio::time::timeout(Duration::from_secs(30), taken)
            .await
            .expect("the system takes what nobody reads, up to a point");
        assert!(socket.taken() >= 64 * 1024);
        socket.kill();
        shutdown.begin();
        tokio::time::timeout(Duration::from_secs(10), task)
            .await
            .expect("the killed connection must end")
            .unwrap();
    }

    #[tokio::test]
    async fn a_head_of_32_kib_is_read_and_one_without_an_end_is_not() {
        let routes =
            axum::Router::new().route(
                "/",
                get(|request: Request<Body>| async move {
                    request.headers()["cookie"].len().to_string()
                }),
            );
        let (address, ..) = start(bounds(10, Duration::from_secs(60)), routes);
        for (n_bytes, status, text) in [
            (32 * 1024, "HTTP/1.1 200", "\r\n32768"),
            (64 * 1024, "HTTP/1.1 431", ""),
        ] {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let head = format!(
                "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nCookie: {}\r\n\r\n",
                "c".repeat(n_bytes)
            );
            // It may be refused before all of it is sent.
            drop(stream.write_all(head.as_bytes()).await);
            let answer = transcript(&mut stream).await;
            assert!(
                answer.starts_with(status) && answer.ends_with(text),
                "{n_bytes}: {answer}"
            );
        }
    }

    #[tokio::test]
    async fn a_shutdown_lets_a_running_request_end_and_a_skip_does_not() {
        let (gate, waiting) = (
            Arc::new(tokio::sync::Notify::new()),
            Arc::new(tokio::sync::Notify::new()),
        );
        let (opened, arrived) = (Arc::clone(&gate), Arc::clone(&waiting));
        let slow = move || async move {
            arrived.notify_one();
            opened.notified().await;
            "done"
        };
        let (address, shutdown, task) = start(
            bounds(10, Duration::from_secs(60)),
            axum::Router::new().route("/", get(slow)),
        );
        let mut first = TcpStream::connect(address).await.unwrap();
        first
            .write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            .await
            .unwrap();
        waiting.notified().await;
        let mut second = TcpStream::connect(address).await.unwrap();
        second
            .write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            .await
            .unwrap();
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
        let (address, shutdown, task) = start(
            bounds(10, Duration::from_secs(60)),
            axum::Router::new().route("/", get(|| async { "x" })),
        );
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream
            .write_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            .await
            .unwrap();
        // The server closed first, so its end is in TIME_WAIT now.
        transcript(&mut stream).await;
        shutdown.begin();
        task.await.unwrap();
        bind(address).unwrap();
    }
}
