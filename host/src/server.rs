//! The accept loop: accepts sockets, passes requests to the routes, and keeps a handle on each
//! connection.
//!
//! Uses hyper directly (HTTP/1.0, 1.1, and 2 with prior knowledge) instead of `axum::serve`, so
//! that a connection whose socket makes no progress can be cut. Connections are bounded, clients
//! that are silent or do not read are dropped, and a shutdown lets running requests finish. `http`
//! interprets requests; `sse` decides when a stream ends.

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, Response};
use hyper::body::Incoming;
use hyper::service::Service;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use serde::{Deserialize, Serialize};
use socket2::SockRef;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::server::TlsStream;
use tokio_util::either::Either;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use crate::broker::NodeAddress;
use crate::shutdown::Shutdown;
use crate::telemetry::metrics::{Metrics, ReasonLabel};

mod client_addresses;
mod connection;
mod response_budget;
mod tls;

pub use client_addresses::{AddressPermit, ClientAddresses, TooManyOfAddress};
pub use connection::Connection;
pub use response_budget::{
    Exhausted, FIRST_BYTES, ResponseBudget, ResponsePermit, hold as hold_until_sent,
};

pub use tls::{CertificateFiles, Tls};

use connection::{CountingSocket, ResponseBody, Spawner};

/// The maximum number of unsent bytes in the kernel's send buffer. No frame can overtake them,
/// however urgent. Bytes queued in this process are bounded by `sse`, and in HTTP/2 by this
/// constant as well.
const MAX_UNSENT: usize = 16 * 1024;
/// The maximum size of a request head: proxies pass on up to 32 KiB, and cookies can use all of it.
const MAX_HEAD: usize = 40 * 1024;
/// The maximum number of concurrent requests on an HTTP/2 connection. `sse` bounds the streams over
/// all connections.
const MAX_MULTIPLEXED: u32 = 128;

/// The `[listen]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The public listener, for `/v1/*` (127.0.0.1:8080).
    pub address: SocketAddr,
    /// The admin listener, for `/healthz`, `/readyz`, `/metrics`, `/v1/decisions` and the plugin
    /// states, which require no key, and for `/v1/events`, `/v1/explain` and the admin commands,
    /// which require the API key (127.0.0.1:8081).
    pub admin: SocketAddr,
    /// The host and port at which other nodes reach `address` (`address`; if that is every address
    /// of the machine, the one from which it reaches Redis). They ask it whether it is ready when
    /// they lose Redis.
    pub advertise: Option<NodeAddress>,
    /// The certificate of `address` and those of its issuers, in PEM (none: the listener uses no
    /// TLS). Read again when the file changes.
    pub tls_certificate: Option<PathBuf>,
    /// The private key of the certificate, in PEM.
    pub tls_key: Option<PathBuf>,
    /// Whether `admin` uses TLS with this certificate as well (false).
    pub admin_tls: bool,
    /// Origins whose pages may call `address` from a browser, such as `https://shop.example` (none;
    /// in dev mode every loopback origin).
    pub origins: Vec<String>,
    /// Senders that may deliver webhooks to `/v1/events`, as they name themselves in
    /// `WebHook-Request-Origin`, such as `events.example`; `*` for every sender (none).
    pub webhook_origins: Vec<String>,
    /// Host names under which `admin` may be called, besides loopback names and IP addresses, such
    /// as `notify.internal` (none). In dev mode only loopback names are accepted.
    pub admin_hosts: Vec<String>,
    /// The maximum number of open connections to `address` (10,000). A few more are answered with a
    /// refusal; the rest are closed.
    pub max_connections: usize,
    /// Connections that one client address may have open to `address` (1,000); behind a trusted
    /// proxy, requests and streams in progress. Further connections are closed, further requests
    /// refused.
    pub max_connections_per_address: usize,
    /// Proxies whose `X-Forwarded-For` or `Forwarded` names the client, as addresses or networks
    /// (none).
    pub trusted_proxies: Vec<String>,
    /// Time to send a request head (10s).
    #[serde(with = "crate::duration")]
    pub header_timeout: Duration,
    /// Time after which a connection without an open stream or a request in progress ends (75s).
    #[serde(with = "crate::duration")]
    pub idle_timeout: Duration,
    /// Time for a shutdown; the ends of streams are spread over it (10s).
    #[serde(with = "crate::duration")]
    pub shutdown_grace: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 8080)),
            admin: SocketAddr::from((Ipv4Addr::LOCALHOST, 8081)),
            advertise: None,
            tls_certificate: None,
            tls_key: None,
            admin_tls: false,
            origins: Vec::new(),
            webhook_origins: Vec::new(),
            admin_hosts: Vec::new(),
            max_connections: 10_000,
            max_connections_per_address: 1_000,
            trusted_proxies: Vec::new(),
            header_timeout: Duration::from_secs(10),
            // Proxies keep idle connections for 60 s or less: they close first, so that no request
            // meets a connection that is just ending.
            idle_timeout: Duration::from_secs(75),
            shutdown_grace: Duration::from_secs(10),
        }
    }
}

impl Config {
    /// The files of the certificate. `None`: without TLS, or one of the files is missing.
    pub fn certificate_files(&self) -> Option<CertificateFiles> {
        Some(CertificateFiles {
            chain: self.tls_certificate.clone()?,
            key: self.tls_key.clone()?,
        })
    }
}

/// The limits of one listener.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    pub max_connections: usize,
    pub header_timeout: Duration,
    pub idle_timeout: Duration,
    /// Time after which a response is cut if its client takes nothing.
    pub stall_timeout: Duration,
}

/// Binds an address, even immediately after a process that held it was killed.
///
/// # Errors
/// The address is in use or does not belong to this machine.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    // A burst of reconnecting streams waits in this queue instead of in SYN retries of one second
    // each.
    socket.listen(4096)
}

/// Serves `routes` until the shutdown begins, then lets running requests finish. Returns when the
/// last connection is closed. The shutdown grace period in `node.rs` bounds that wait: after it,
/// `Shutdown::skip` cuts the remaining connections.
pub async fn serve(
    listener: TcpListener,
    tls: Option<Tls>,
    routes: axum::Router,
    bounds: Bounds,
    addresses: Option<ClientAddresses>,
    metrics: Metrics,
    shutdown: Shutdown,
) {
    let refused = |reason| {
        metrics
            .connections_refused
            .get_or_create(&ReasonLabel { reason })
            .inc();
    };
    let permits = Arc::new(Semaphore::new(
        bounds.max_connections.clamp(1, Semaphore::MAX_PERMITS),
    ));
    // Extra permits to refuse a connection in HTTP, so that an `EventSource` can read when to
    // reconnect; bounded as well.
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
                // Most likely out of file descriptors: accepting again at once would fail again and
                // burn a core.
                tracing::error!(%error, "cannot accept connections; raise the open file limit (ulimit -n) above listen.max_connections");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let of_address = match &addresses {
            None => None,
            Some(addresses) => match addresses.connect(peer.ip()) {
                Ok(permit) => permit,
                // Closed without a response, so that nothing more is held for it.
                Err(TooManyOfAddress) => {
                    refused("address");
                    continue;
                }
            },
        };
        // Taken before the task is spawned: a burst must not outrun the bound.
        let (permit, is_surplus) = match Arc::clone(&permits).try_acquire_owned() {
            Ok(permit) => (permit, false),
            Err(_) => match Arc::clone(&surplus_permits).try_acquire_owned() {
                Ok(permit) => (permit, true),
                // Closed without a response: nothing more is held for it. An `EventSource` sees a
                // network error and reconnects.
                Err(_) => {
                    refused("listener");
                    continue;
                }
            },
        };
        let connection = Arc::new(Connection::new(peer, is_surplus, kill_all.child_token()));
        // Extension point: to let a stream bypass hyper, read the head of the first request here,
        // hand a GET of /v1/stream in HTTP/1 to a writer that owns the bare socket, and hand every
        // other request to hyper with the bytes already read put back in front.
        connections.spawn(drive(
            stream,
            tls.clone(),
            connection,
            routes.clone(),
            bounds,
            metrics.clone(),
            shutdown.clone(),
            (permit, of_address),
        ));
    }
    // Closed before the wait, so that new connections are refused instead of queued.
    drop(listener);
    // Without it, `wait` would not return even when no connection is left.
    connections.close();
    tokio::select! {
        () = connections.wait() => return,
        () = shutdown.skipped() => kill_all.cancel(),
    }
    connections.wait().await;
}

/// Passes the requests of a connection to the routes.
fn requests(
    connection: Arc<Connection>,
    routes: axum::Router,
) -> impl Service<
    Request<Incoming>,
    Response = Response<ResponseBody>,
    Error = Infallible,
    Future: Send + 'static,
> {
    hyper::service::service_fn(move |request: Request<Incoming>| {
        // Before the task of an HTTP/2 request runs, which its client may reset at once.
        let in_progress = connection.begin_request();
        let (connection, routes) = (Arc::clone(&connection), routes.clone());
        async move {
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(connection.carrier());
            request.extensions_mut().insert(connection);
            let response = routes.oneshot(request).await?;
            Ok::<_, Infallible>(response.map(|body| ResponseBody::new(body, in_progress)))
        }
    })
}

/// Serves one connection from its first byte to its end.
///
/// In one piece: everything that can end a connection stands in one `select`.
async fn drive(
    stream: TcpStream,
    tls: Option<Tls>,
    connection: Arc<Connection>,
    routes: axum::Router,
    bounds: Bounds,
    metrics: Metrics,
    shutdown: Shutdown,
    permits: (OwnedSemaphorePermit, Option<AddressPermit>),
) {
    set_socket_options(&stream, &connection);
    let socket = CountingSocket {
        stream,
        connection: Arc::clone(&connection),
    };
    let transport = tokio::select! {
        biased;
        () = connection.killed() => return,
        () = shutdown.begun(), if tls.is_some() => return,
        transport = transport(socket, tls, bounds.header_timeout) => transport,
    };
    let transport = match transport {
        Ok(transport) => transport,
        Err(error) => {
            tracing::debug!(peer = %connection.peer(), %error, "TLS handshake failed");
            return;
        }
    };
    let builder = http_builder(bounds.header_timeout, !connection.is_surplus());
    let mut serving = pin!(builder.serve_connection(
        TokioIo::new(transport),
        requests(Arc::clone(&connection), routes)
    ));
    // Hyper's own timer starts with the first bytes of a head that it takes for HTTP/1. Only this
    // deadline catches a silent client, or one that sends half of the HTTP/2 preface. A surplus
    // connection gets no more than this time in total.
    let mut deadline = pin!(tokio::time::sleep(bounds.header_timeout));
    // Without it, connections that are kept without use would hold `max_connections` for good.
    let mut idle_check = pin!(tokio::time::sleep(bounds.idle_timeout));
    // Without it, a client that does not read would hold its responses for good.
    let mut stall_check = pin!(tokio::time::sleep(bounds.stall_timeout));
    let mut was_asked_to_end = false;
    let (mut is_ending, mut is_timed) = (false, true);
    loop {
        tokio::select! {
            // A kill takes effect before the connection is polled again, which could write more.
            biased;
            () = connection.killed() => break,
            ended = serving.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(peer = %connection.peer(), %error, "connection ended");
                }
                break;
            }
            // Once only: the token stays cancelled and the loop would spin.
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
            () = idle_check.as_mut() => {
                let wait = match connection.idle_for() {
                    Some(idle) if idle >= bounds.idle_timeout => {
                        // A client that does not answer is cut at the second check.
                        if was_asked_to_end {
                            break;
                        }
                        was_asked_to_end = true;
                        serving.as_mut().graceful_shutdown();
                        bounds.header_timeout
                    }
                    Some(idle) => bounds.idle_timeout - idle,
                    None => bounds.idle_timeout,
                };
                idle_check.as_mut().reset(tokio::time::Instant::now() + wait);
            }
            () = stall_check.as_mut() => {
                let check = connection.cut_stalled(bounds.stall_timeout);
                if check.n_cut > 0 {
                    metrics.responses_stalled.inc_by(check.n_cut);
                    tracing::debug!(peer = %connection.peer(), n_responses = check.n_cut, "cut responses whose client reads nothing");
                }
                stall_check.as_mut().reset(check.next.into());
            }
        }
    }
    // Moved into this task, so that the connection counts until it ends.
    drop(permits);
}

/// A connection with or without TLS. The socket counts what it accepts, encrypted or not.
type Transport = Either<CountingSocket, TlsStream<CountingSocket>>;

/// Completes the TLS handshake, if the listener uses TLS, within `timeout`.
async fn transport(
    socket: CountingSocket,
    tls: Option<Tls>,
    timeout: Duration,
) -> io::Result<Transport> {
    let Some(tls) = tls else {
        return Ok(Either::Left(socket));
    };
    let accepted = tokio::time::timeout(timeout, tls.accept(socket)).await?;
    accepted.map(Either::Right)
}

/// Failures are logged only: the connection then works, but urgent frames may be late.
fn set_socket_options(stream: &TcpStream, connection: &Connection) {
    // A frame must leave when it is written, not when the peer has acknowledged the previous one.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(peer = %connection.peer(), %error, "cannot set TCP_NODELAY; frames may be delayed");
    }
    // Without it, the kernel would buffer megabytes for a client that does not read.
    if let Err(error) = SockRef::from(stream).set_tcp_notsent_lowat(MAX_UNSENT as u32) {
        tracing::debug!(peer = %connection.peer(), %error, "cannot set TCP_NOTSENT_LOWAT; urgent frames wait behind bytes already in the send buffer");
    }
}

/// The HTTP versions and limits of a connection.
fn http_builder(header_timeout: Duration, keeps_alive: bool) -> Builder<Spawner> {
    let mut builder = Builder::new(Spawner);
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .keep_alive(keeps_alive)
        .max_headers(100)
        // Also bounds the buffered part of a response, but a stream produces no more than is
        // written.
        .max_buf_size(MAX_HEAD);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_send_buf_size(MAX_UNSENT)
        .max_concurrent_streams(MAX_MULTIPLEXED)
        .max_header_list_size(MAX_HEAD as u32)
        // Pings detect a peer that vanished silently; HTTP/1 streams detect it by their heartbeat.
        .keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(20));
    builder
}

/// Whether an error of `accept` concerns a single connection only.
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
        start_with(bounds, None, routes)
    }

    fn start_with(
        bounds: Bounds,
        addresses: Option<ClientAddresses>,
        routes: axum::Router,
    ) -> (SocketAddr, Shutdown, tokio::task::JoinHandle<()>) {
        let listener = bind(LOOPBACK).unwrap();
        let (address, shutdown) = (listener.local_addr().unwrap(), Shutdown::new());
        let task = tokio::spawn(serve(
            listener,
            None,
            routes,
            bounds,
            addresses,
            Metrics::default(),
            shutdown.clone(),
        ));
        (address, shutdown, task)
    }

    fn bounds(max_connections: usize, header_timeout: Duration) -> Bounds {
        Bounds {
            max_connections,
            header_timeout,
            idle_timeout: Duration::from_secs(75),
            stall_timeout: Duration::from_secs(30),
        }
    }

    /// Reads everything that the server sends until it closes.
    async fn transcript(stream: &mut TcpStream) -> String {
        let (mut bytes, mut chunk) = (Vec::new(), [0; 4096]);
        // A reset also ends the loop.
        while let Ok(n @ 1..) = stream.read(&mut chunk).await {
            bytes.extend_from_slice(&chunk[..n]);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    #[tokio::test]
    async fn a_silent_client_is_dropped() {
        for first_bytes in ["", "PRI * HT", "GET / HTTP/1.1\r\nHo"] {
            let (address, ..) = start(bounds(10, Duration::from_millis(50)), axum::Router::new());
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(first_bytes.as_bytes()).await.unwrap();
            let ended =
                tokio::time::timeout(Duration::from_secs(10), transcript(&mut stream)).await;
            assert!(
                ended.is_ok(),
                "a client that sent {first_bytes:?} kept the connection"
            );
        }
    }

    #[tokio::test]
    async fn a_connection_above_the_limit_is_marked_and_closed_after_its_response() {
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
    async fn a_connection_above_the_limit_of_its_address_is_closed_and_one_is_free_again_later() {
        let routes = axum::Router::new().route("/", get(|| async { "x" }));
        let addresses = ClientAddresses::of_loopback(2);
        let (address, ..) =
            start_with(bounds(10, Duration::from_secs(60)), Some(addresses), routes);
        let ask = async || {
            let mut stream = TcpStream::connect(address).await.unwrap();
            let head = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n";
            // The server may have closed it already.
            drop(stream.write_all(head).await);
            let mut answer = [0; 4096];
            let n = stream.read(&mut answer).await.unwrap_or_default();
            (stream, n > 0)
        };
        let (first, is_first_served) = ask().await;
        let (_second, is_second_served) = ask().await;
        assert!(is_first_served && is_second_served);
        assert!(!ask().await.1);
        drop(first);
        let again = async { while !ask().await.1 {} };
        tokio::time::timeout(Duration::from_secs(10), again)
            .await
            .expect("a connection that ends makes room for another");
    }

    #[tokio::test]
    async fn a_connection_reports_the_bytes_written_and_can_be_cut_at_any_time() {
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
            .expect("the kernel must buffer some bytes that the client does not read");
        assert!(socket.taken() >= 64 * 1024);
        socket.kill();
        shutdown.begin();
        tokio::time::timeout(Duration::from_secs(10), task)
            .await
            .expect("the server must stop after its connection was killed")
            .unwrap();
    }

    #[tokio::test]
    async fn a_head_of_32_kib_is_accepted_and_one_of_64_kib_is_refused() {
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
            // The server may refuse before all bytes are sent.
            drop(stream.write_all(head.as_bytes()).await);
            let answer = transcript(&mut stream).await;
            assert!(
                answer.starts_with(status) && answer.ends_with(text),
                "{n_bytes}: {answer}"
            );
        }
    }

    #[tokio::test]
    async fn a_shutdown_lets_a_running_request_finish_and_a_skip_does_not() {
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
    async fn a_port_can_be_rebound_immediately() {
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
