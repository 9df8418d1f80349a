//! The accept loop: accepts sockets, passes requests to the routes, and keeps a handle on each
//! connection.
//!
//! Uses hyper directly (HTTP/1.0, 1.1, and 2 with prior knowledge) instead of `axum::serve`, so
//! that a connection whose socket makes no progress can be cut. Connections are bounded, clients
//! that are silent or do not read are dropped, and a shutdown lets running requests finish. `http`
//! interprets requests; `sse` decides when a stream ends.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::header::{CONNECTION, HeaderName};
use axum::http::{HeaderValue, Method, Request, Response, Version};
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use serde::{Deserialize, Serialize};
use socket2::SockRef;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;
use tokio_rustls::server::TlsStream;
use tokio_util::either::Either;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use crate::broker::NodeAddress;
use crate::escape::printable;
use crate::shutdown::Shutdown;
use crate::telemetry::metrics::{Metrics, ReasonLabel};

mod client_addresses;
mod connection;
mod proxy_header;
mod response_budget;
mod tls;

pub use client_addresses::{AddressLimits, AddressPermit, AddressRefusal, ClientAddresses};
pub use connection::{Connection, Surplus};
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
/// The target of the access log, for `log.filter`.
const ACCESS_LOG: &str = "pointsman::access";
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");

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
    /// Connections that one client address may open to `address` per second, in bursts of up to ten
    /// seconds' worth (0: any number); behind a trusted proxy, requests. Further ones are refused
    /// with 429.
    pub connection_rate_per_address: u32,
    /// Proxies whose `X-Forwarded-For` or `Forwarded` names the client, as addresses or networks
    /// (none).
    pub trusted_proxies: Vec<String>,
    /// Whether the trusted proxies begin each connection to `address` with a header of the PROXY
    /// protocol, version 1 or 2, which names the client (false).
    pub proxy_protocol: bool,
    /// Time to send a request head, from its first byte, or of the first head from the beginning of
    /// the connection (10s).
    #[serde(with = "crate::duration")]
    pub header_timeout: Duration,
    /// Time after which a connection without an open stream or a request in progress ends (75s).
    /// Responses tell it to their clients (`Keep-Alive: timeout=75`).
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
            connection_rate_per_address: 0,
            trusted_proxies: Vec::new(),
            proxy_protocol: false,
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

/// The state that the connections of a listener share.
#[derive(Clone)]
struct Service {
    tls: Option<Tls>,
    routes: axum::Router,
    bounds: Bounds,
    addresses: Option<ClientAddresses>,
    metrics: Metrics,
    shutdown: Shutdown,
    /// The value of `Keep-Alive`, by which clients know for how long they may use a connection again.
    keep_alive: HeaderValue,
    /// Extra permits to refuse a connection in HTTP, so that an `EventSource` can read when to
    /// reconnect; bounded as well.
    surplus_permits: Arc<Semaphore>,
    kill_all: CancellationToken,
}

impl Service {
    /// Counts a connection that is closed without a response: nothing more is held for it. An
    /// `EventSource` sees a network error and reconnects.
    fn note_refused(&self, reason: &'static str) {
        let refused = &self.metrics.connections_refused;
        refused.get_or_create(&ReasonLabel { reason }).inc();
    }

    /// Counts a connection of this client address. `None`: it is closed without a response.
    fn admit(&self, client: IpAddr) -> Option<(Option<AddressPermit>, Option<Surplus>)> {
        let addresses = self.addresses.as_ref();
        match addresses.map(|addresses| addresses.connect(client)) {
            None => Some((None, None)),
            Some(Ok(permit)) => Some((permit, None)),
            Some(Err(AddressRefusal::TooFast(wait))) => Some((None, Some(Surplus::TooFast(wait)))),
            Some(Err(AddressRefusal::TooMany)) => {
                self.note_refused("address");
                None
            }
        }
    }

    fn try_surplus_permit(&self) -> Option<OwnedSemaphorePermit> {
        let permit = Arc::clone(&self.surplus_permits).try_acquire_owned().ok();
        if permit.is_none() {
            self.note_refused("listener");
        }
        permit
    }
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
    let permits = Arc::new(Semaphore::new(
        bounds.max_connections.clamp(1, Semaphore::MAX_PERMITS),
    ));
    let service = Service {
        tls,
        routes,
        bounds,
        addresses,
        metrics,
        shutdown,
        keep_alive: HeaderValue::try_from(format!("timeout={}", bounds.idle_timeout.as_secs()))
            .expect("digits"),
        surplus_permits: Arc::new(Semaphore::new(bounds.max_connections / 16 + 16)),
        kill_all: CancellationToken::new(),
    };
    let connections = tokio_util::task::TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            () = service.shutdown.begun() => break,
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
        let is_proxied = service
            .addresses
            .as_ref()
            .is_some_and(|addresses| addresses.sends_proxy_header(peer.ip()));
        let admitted = if is_proxied {
            None
        } else {
            let Some(admitted) = service.admit(peer.ip()) else {
                continue;
            };
            Some(admitted)
        };
        // Taken before the task is spawned: a burst must not outrun the bound.
        let (permit, is_full) = match Arc::clone(&permits).try_acquire_owned() {
            Ok(permit) => (permit, false),
            Err(_) => match service.try_surplus_permit() {
                Some(permit) => (permit, true),
                None => continue,
            },
        };
        // Extension point: to let a stream bypass hyper, read the head of the first request here,
        // hand a GET of /v1/stream in HTTP/1 to a writer that owns the bare socket, and hand every
        // other request to hyper with the bytes already read put back in front.
        let arrival = Arrival {
            stream,
            peer,
            permit,
            is_full,
        };
        connections.spawn(greet(arrival, admitted, service.clone()));
    }
    // Closed before the wait, so that new connections are refused instead of queued.
    drop(listener);
    // Without it, `wait` would not return even when no connection is left.
    connections.close();
    tokio::select! {
        () = connections.wait() => return,
        () = service.shutdown.skipped() => service.kill_all.cancel(),
    }
    connections.wait().await;
}

/// A connection that was just accepted.
struct Arrival {
    stream: TcpStream,
    peer: SocketAddr,
    permit: OwnedSemaphorePermit,
    /// Whether the listener is at its limit.
    is_full: bool,
}

/// Finds out which client a connection belongs to, and serves it.
async fn greet(
    arrival: Arrival,
    admitted: Option<(Option<AddressPermit>, Option<Surplus>)>,
    service: Service,
) {
    let Arrival {
        mut stream,
        mut peer,
        mut permit,
        is_full,
    } = arrival;
    let (of_address, too_fast) = match admitted {
        Some(admitted) => admitted,
        None => {
            let header = proxy_header::read(&mut stream);
            let limit = service.bounds.header_timeout;
            match tokio::time::timeout(limit, header).await {
                Ok(Ok(client)) => peer = client.unwrap_or(peer),
                Ok(Err(error)) => {
                    service.note_refused("proxy_header");
                    tracing::debug!(%peer, %error, "connection of a trusted proxy without a valid PROXY header refused; let it send one, or set listen.proxy_protocol = false");
                    return;
                }
                Err(_) => return service.note_refused("proxy_header"),
            }
            match service.admit(peer.ip()) {
                Some(admitted) => admitted,
                None => return,
            }
        }
    };
    let surplus = is_full.then_some(Surplus::Listener).or(too_fast);
    if surplus.is_some() && !is_full {
        // It takes no place of a connection that is served.
        match service.try_surplus_permit() {
            Some(surplus) => permit = surplus,
            None => return,
        }
    }
    let kill = service.kill_all.child_token();
    let connection = Arc::new(Connection::new(peer, surplus, kill));
    drive(stream, connection, service).await;
    // Held until here, so that the connection counts until it ends.
    drop((permit, of_address));
}

/// Passes the requests of a connection to the routes.
fn requests(
    connection: Arc<Connection>,
    service: &Service,
) -> impl hyper::service::Service<
    Request<Incoming>,
    Response = Response<ResponseBody>,
    Error = Infallible,
    Future: Send + 'static,
> + use<> {
    let routes = service.routes.clone();
    let addresses = service.addresses.clone();
    let keep_alive = (!connection.is_surplus()).then(|| service.keep_alive.clone());
    hyper::service::service_fn(move |request: Request<Incoming>| {
        // Before the task of an HTTP/2 request runs, which its client may reset at once.
        let in_progress = connection.begin_request(request.version());
        let (connection, routes) = (Arc::clone(&connection), routes.clone());
        let keep_alive = keep_alive.clone().filter(|_| keeps_alive(&request));
        let access = Access::of(&request, connection.peer(), addresses.as_ref());
        async move {
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(connection.carrier());
            request.extensions_mut().insert(connection);
            let mut response = routes.oneshot(request).await?;
            if let Some(keep_alive) = keep_alive {
                response.headers_mut().insert(KEEP_ALIVE, keep_alive);
            }
            if let Some(access) = access {
                access.log(response.status().as_u16());
            }
            Ok::<_, Infallible>(response.map(|body| ResponseBody::new(body, in_progress)))
        }
    })
}

/// Whether the client may send another request on the connection.
fn keeps_alive(request: &Request<Incoming>) -> bool {
    let mut options = request.headers().get_all(CONNECTION).iter();
    request.version() == Version::HTTP_11
        && !options.any(|value| value.as_bytes().eq_ignore_ascii_case(b"close"))
}

/// A line of the access log. Without the query, which may contain a token, and without headers.
struct Access {
    method: Method,
    path: String,
    version: Version,
    client: IpAddr,
    begun: Instant,
}

impl Access {
    /// `None` while the log is off.
    fn of(
        request: &Request<Incoming>,
        peer: SocketAddr,
        addresses: Option<&ClientAddresses>,
    ) -> Option<Self> {
        if !tracing::enabled!(target: ACCESS_LOG, tracing::Level::DEBUG) {
            return None;
        }
        let peer = peer.ip();
        let client = addresses.map(|addresses| addresses.client_of(peer, request.headers()));
        Some(Self {
            method: request.method().clone(),
            path: printable(request.uri().path()),
            version: request.version(),
            client: client.unwrap_or(peer),
            begun: Instant::now(),
        })
    }

    /// Once the head of the response is known: a stream has no end yet.
    fn log(self, status: u16) {
        let Self {
            method,
            path,
            version,
            client,
            begun,
        } = self;
        let ms = begun.elapsed().as_millis() as u64;
        tracing::debug!(target: ACCESS_LOG, %client, %method, path, ?version, status, ms, "request");
    }
}

/// Serves one connection from its first byte to its end.
///
/// In one piece: everything that can end a connection stands in one `select`.
async fn drive(stream: TcpStream, connection: Arc<Connection>, service: Service) {
    let bounds = service.bounds;
    set_socket_options(&stream, &connection);
    let socket = CountingSocket {
        stream,
        connection: Arc::clone(&connection),
    };
    let transport = tokio::select! {
        biased;
        () = connection.killed() => return,
        () = service.shutdown.begun(), if service.tls.is_some() => return,
        transport = transport(socket, service.tls.as_ref(), bounds.header_timeout) => transport,
    };
    let transport = match transport {
        Ok(transport) => transport,
        Err(error) => {
            tracing::debug!(peer = %connection.peer(), %error, "TLS handshake failed");
            return;
        }
    };
    let builder = http_builder(!connection.is_surplus());
    let mut serving = pin!(builder.serve_connection(
        TokioIo::new(transport),
        requests(Arc::clone(&connection), &service)
    ));
    let mut head_timer = pin!(tokio::time::sleep(bounds.header_timeout));
    // A surplus connection gets no more than this time in total.
    let mut surplus_end = pin!(tokio::time::sleep(bounds.header_timeout));
    // Without it, connections that are kept without use would hold `max_connections` for good.
    let mut idle_check = pin!(tokio::time::sleep(bounds.idle_timeout));
    // Without it, a client that does not read would hold its responses for good.
    let mut stall_check = pin!(tokio::time::sleep(bounds.stall_timeout));
    let mut was_asked_to_end = false;
    let mut is_ending = false;
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
            () = service.shutdown.begun(), if !is_ending => {
                is_ending = true;
                serving.as_mut().graceful_shutdown();
            }
            () = head_overdue(&connection, bounds.header_timeout, head_timer.as_mut()) => break,
            () = surplus_end.as_mut(), if connection.is_surplus() => break,
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
                    service.metrics.responses_stalled.inc_by(check.n_cut);
                    tracing::debug!(peer = %connection.peer(), n_responses = check.n_cut, "cut responses whose client reads nothing");
                }
                stall_check.as_mut().reset(check.next.into());
            }
        }
    }
}

/// Waits until a head has been incomplete for `limit`. To be polled after the connection itself,
/// whose reads begin a head. Hyper's own timer would also run while a connection is idle, which may
/// take much longer than a head, and not in HTTP/2.
fn head_overdue<'a>(
    connection: &'a Connection,
    limit: Duration,
    mut timer: Pin<&'a mut Sleep>,
) -> impl Future<Output = ()> + 'a {
    std::future::poll_fn(move |cx| {
        let Some(deadline) = connection.head_deadline(limit) else {
            return Poll::Pending;
        };
        if timer.deadline() != deadline.into() {
            timer.as_mut().reset(deadline.into());
        }
        timer.as_mut().poll(cx)
    })
}

/// A connection with or without TLS. The socket counts what it accepts, encrypted or not.
type Transport = Either<CountingSocket, TlsStream<CountingSocket>>;

/// Completes the TLS handshake, if the listener uses TLS, within `timeout`.
async fn transport(
    socket: CountingSocket,
    tls: Option<&Tls>,
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
fn http_builder(keeps_alive: bool) -> Builder<Spawner> {
    let mut builder = Builder::new(Spawner);
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(None)
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

    const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

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
        let addresses = ClientAddresses::of_loopback(AddressLimits {
            max_in_progress: 2,
            rate: None,
            proxy_protocol: false,
        });
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
