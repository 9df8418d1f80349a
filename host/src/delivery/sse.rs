//! Writes a subscription as SSE: framing, heartbeats, stream end. The only module that knows the
//! SSE format (WHATWG HTML, "Server-sent events").
//!
//! `data:` is rendered once for each notification and winning route and shared by all streams. Two
//! parts are specific to a stream: `id:`, its cursor, and `to` in the data, because a recipient must
//! not learn the other targets of a route. All queued items leave in one write. One
//! timer serves the heartbeats and deadlines of all streams.
//!
//! The server writes the bytes to the socket: a [`Body`] is an ordinary HTTP body. `auth` decides
//! who may read.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http_body::Frame;
use serde::{Deserialize, Serialize};

use crate::clock;
use crate::delivery::hub::StreamGuard;
use crate::delivery::recipients::RouteMatch;
use crate::delivery::subscription::{Gap, Next, Record, Rendered, Subscription};
use crate::event::{Target, rfc3339};
use crate::telemetry::metrics::{Metrics, ReasonLabel};

mod data;
mod framing;
mod timer;

pub use data::data_of;
use framing::put_data;
pub use framing::{EventName, Format, Framing, FramingChoice};
pub use timer::{StreamPermit, StreamTimer, TooManyStreams};

/// The reconnect delay of a stream above `stream.max_open_per_user`, ±50 %: another attempt succeeds
/// only when one of the user's streams has ended, or ends another one.
pub const USER_LIMIT_RETRY: Duration = Duration::from_secs(60);

/// The transport of a stream: a connection or a share of one.
pub trait Socket: std::fmt::Debug + Send + Sync {
    /// Bytes taken so far, of this stream and of earlier data. Increases while the peer reads.
    fn taken(&self) -> u64;
    /// Ready when `n` bytes in total have been taken, or when the transport bounds its own buffer.
    /// Otherwise wakes the task as more are taken.
    fn poll_taken(&self, cx: &mut Context<'_>, n: u64) -> Poll<()>;
    /// Closes the connection.
    fn kill(&self);
}

/// Approximate bound, in bytes, of one write. No further write starts before these bytes have left:
/// items still queued can be overtaken by more urgent ones.
const WRITE: usize = 16 * 1024;

/// `[stream]`: heartbeats, limits and lifetimes of streams.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Interval between heartbeats, ±20 % (20s). Proxies cut idle connections after 50 or 60
    /// seconds.
    #[serde(with = "crate::duration")]
    pub heartbeat_interval: Duration,
    /// Age at which a stream ends and its client reconnects, reduced by up to 20 % at random (1h;
    /// 0s for never).
    #[serde(with = "crate::duration")]
    pub max_age: Duration,
    /// Delay before clients reconnect, ±50 % at random for each (2s).
    #[serde(with = "crate::duration")]
    pub retry: Duration,
    /// Time without progress after which a stream with pending data is cut, and any other response
    /// (30s). The system reports progress in steps of a few kilobytes, so a client that takes less
    /// than about 500 bytes a second counts as stalled.
    #[serde(with = "crate::duration")]
    pub stall_timeout: Duration,
    /// Interval between cursors sent without a notification (3m).
    #[serde(with = "crate::duration")]
    pub cursor_interval: Duration,
    /// Maximum open streams (10,000). Further clients receive a reconnect delay. One HTTP/2
    /// connection carries many streams.
    pub max_open: usize,
    /// Maximum open streams of one user on this node (64).
    pub max_open_per_user: usize,
    /// Which stream is closed, with a long reconnect delay, when a user opens one more (the new one).
    pub at_user_limit: UserLimit,
    /// Maximum bytes of notifications in the buffers of all streams together (256 MiB). Above it,
    /// the streams that hold most return to replay, and each holds its fair share.
    pub max_buffer_bytes: usize,
    /// The content of `data:` unless the request or its token chooses it: `notification` or `data`
    /// (`notification`).
    pub format: Format,
    /// The source of `event:` unless the request or its token chooses it: `route` or `type`
    /// (`route`).
    pub event: EventName,
}

impl Config {
    /// The form of notifications unless the request or its token chooses it.
    pub fn framing(&self) -> Framing {
        Framing {
            format: self.format,
            event: self.event,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            heartbeat_interval: Duration::from_secs(20),
            max_age: Duration::from_secs(3_600),
            retry: Duration::from_secs(2),
            stall_timeout: Duration::from_secs(30),
            cursor_interval: Duration::from_secs(180),
            max_open: 10_000,
            max_open_per_user: 64,
            at_user_limit: UserLimit::default(),
            max_buffer_bytes: 256 * 1024 * 1024,
            format: Format::default(),
            event: EventName::default(),
        }
    }
}

/// The end of the token of a stream, in milliseconds since the Unix epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenExpiry {
    /// When it expires by its own statement.
    pub expires_ms: u64,
    /// When the stream ends: later by the clock difference that the node tolerates.
    pub ends_ms: u64,
}

/// The stream that is closed when a user opens more than `max_open_per_user`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UserLimit {
    /// The new stream is refused.
    #[default]
    RefuseNewest,
    /// The oldest one ends.
    CloseOldest,
}

/// Why this node ends a stream. Clients receive it as `event: close`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamEnd {
    /// The stream reached its maximum age; the client reconnects.
    Age,
    /// The token has expired; the client reconnects with a new one.
    TokenExpired,
    /// The node is shutting down; the client reconnects to another node.
    Drain,
    /// The node has lost the broker and another has it; the client reconnects there.
    Unavailable,
    /// The user has opened a newer stream and has as many as one may have.
    TooManyStreams,
}

impl StreamEnd {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Age => "age",
            Self::TokenExpired => "token-expired",
            Self::Drain => "drain",
            Self::Unavailable => "unavailable",
            Self::TooManyStreams => "too-many-streams",
        }
    }
}

/// Stream control: state shared by the stream timer and a stream's socket.
#[derive(Debug)]
struct StreamControl {
    guard: StreamGuard,
    heartbeat: AtomicBool,
    cursor: AtomicBool,
    reauth: AtomicBool,
    token_expiry: Option<TokenExpiry>,
    end: Mutex<Option<StreamEnd>>,
    /// `None` where the connection is unknown, as in tests.
    socket: Option<Arc<dyn Socket>>,
}

impl StreamControl {
    fn wake(&self) {
        self.guard.stream().wake();
    }

    fn end(&self) -> Option<StreamEnd> {
        *self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The body of a stream's response.
#[derive(Debug)]
pub struct Body {
    control: Arc<StreamControl>,
    metrics: Metrics,
    framing: Framing,
    retry_ms: u64,
    is_opened: bool,
    is_ended: bool,
    buffer: BytesMut,
    cursor: String,
    sent_cursor: String,
    /// Total bytes the socket will have taken once it has taken everything written so far.
    n_written: u64,
    _permit: StreamPermit,
}

impl Body {
    /// Returns the body of an open stream; `stream_timer` drives its heartbeats and end.
    pub fn new(
        guard: StreamGuard,
        permit: StreamPermit,
        stream_timer: &StreamTimer,
        metrics: Metrics,
        framing: Framing,
        token_expiry: Option<TokenExpiry>,
        socket: Option<Arc<dyn Socket>>,
    ) -> Self {
        let control = Arc::new(StreamControl {
            guard,
            heartbeat: AtomicBool::new(false),
            cursor: AtomicBool::new(false),
            reauth: AtomicBool::new(false),
            token_expiry,
            end: Mutex::new(None),
            socket,
        });
        stream_timer.watch(&control);
        permit.belongs_to(&control);
        let retry_ms = stream_timer.retry_ms();
        let (buffer, cursor, sent_cursor) = (BytesMut::new(), String::new(), String::new());
        Self {
            control,
            metrics,
            framing,
            retry_ms,
            is_opened: false,
            is_ended: false,
            buffer,
            cursor,
            sent_cursor,
            n_written: 0,
            _permit: permit,
        }
    }

    /// Waits until the stream has its position in every partition, or ends. Events committed from
    /// then on arrive on it, so that the response head may be sent. May be cancelled.
    pub async fn placed(&self) {
        let stream = self.control.guard.stream();
        std::future::poll_fn(|cx| {
            // Registered before the check, or a replay that begins in between would wake no task.
            stream.register(cx.waker());
            if stream.lock().has_begun() || self.control.end().is_some() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }

    /// Fills the buffer with everything that can be written now, up to about [`WRITE`] bytes.
    fn collect(&mut self) {
        let stream = Arc::clone(self.control.guard.stream());
        if !self.is_opened {
            self.is_opened = true;
            // Proxies forward the response head with the first byte of the body, also where a
            // stream that resumes in an outage has no frame yet. No blank line: some clients call
            // `onmessage` for each one.
            self.buffer.put_slice(b": pointsman\n");
        }
        // Read before any notification: after a token has expired none may be sent. Queued
        // notifications stay in the log.
        let end = self.control.end();
        if end.is_none() {
            if self.control.reauth.swap(false, Ordering::AcqRel)
                && let Some(expiry) = self.control.token_expiry
            {
                put_reauth(&mut self.buffer, expiry.expires_ms);
            }
            self.collect_items(&mut stream.lock());
        }
        // Also when nothing is written: expired items have left the queues, too, and a replay may
        // wait for the room.
        stream.made_room();
        // Taken even if something else is written, which serves as the heartbeat.
        if self.control.heartbeat.swap(false, Ordering::AcqRel) && self.buffer.is_empty() {
            self.buffer.put_slice(b":\n");
        }
        if let Some(end) = end {
            self.collect_end(end, &stream.lock());
        }
    }

    /// Appends the queued items, each with the cursor after it.
    fn collect_items(&mut self, subscription: &mut Subscription) {
        if self.control.cursor.swap(false, Ordering::AcqRel) {
            self.read_cursor(subscription);
            if self.cursor != self.sent_cursor {
                subscription.request_cursor();
            }
        }
        let now_ms = self.control.guard.hub().now_ms();
        let mut n_sent = 0;
        while self.buffer.len() < WRITE
            && let Some(next) = subscription.next(now_ms)
        {
            self.read_cursor(subscription);
            match next {
                Next::Notification {
                    record,
                    route_match,
                    ..
                } => {
                    n_sent += 1;
                    self.put_notification(&record, route_match);
                }
                Next::Gap(gap) => {
                    put_gap(&mut self.buffer, gap);
                    let reason = gap.reason.as_str();
                    self.metrics
                        .gaps
                        .get_or_create(&ReasonLabel { reason })
                        .inc();
                }
                Next::Cursor => self.put_cursor(),
            }
        }
        if n_sent > 0 {
            self.metrics.notifications_sent.inc_by(n_sent);
        }
    }

    /// Appends the end of the stream, with the cursor at which the client resumes.
    fn collect_end(&mut self, end: StreamEnd, subscription: &Subscription) {
        self.is_ended = true;
        self.read_cursor(subscription);
        if !self.cursor.is_empty() {
            put_id(&mut self.buffer, &self.cursor);
        }
        let retry_ms = match end {
            StreamEnd::TooManyStreams => spread_retry(USER_LIMIT_RETRY),
            _ => self.retry_ms,
        };
        self.buffer.put_slice(
            format!(
                "retry: {retry_ms}\nevent: close\ndata: {{\"reason\":\"{}\"}}\n\n",
                end.as_str()
            )
            .as_bytes(),
        );
    }

    fn read_cursor(&mut self, subscription: &Subscription) {
        self.cursor.clear();
        subscription.encode_cursor(&mut self.cursor);
    }

    fn put_notification(&mut self, record: &Record, route_match: RouteMatch) {
        let route = route_match.route;
        put_id(&mut self.buffer, &self.cursor);
        framing::put_event_name(&mut self.buffer, record, route, self.framing.event);
        match self.framing.format {
            Format::Notification => {
                let rendered = record.rendered(route, |record| render(record, route));
                self.buffer.put_slice(&rendered.before_target);
                let target = &record.route(route).to[route_match.target];
                put_target(&mut self.buffer, target);
                self.buffer.put_slice(&rendered.after_target);
            }
            Format::Data => {
                let payload = record.payload(route, |record| framing::payload(record, route));
                self.buffer.put_slice(payload);
            }
        }
        self.sent_cursor.clone_from(&self.cursor);
    }

    fn put_cursor(&mut self) {
        put_id(&mut self.buffer, &self.cursor);
        // The first cursor of the stream brings the reconnect delay.
        if self.sent_cursor.is_empty() {
            self.buffer
                .put_slice(format!("retry: {}\n", self.retry_ms).as_bytes());
        }
        self.buffer.put_slice(b"event: cursor\ndata:\n\n");
        self.sent_cursor.clone_from(&self.cursor);
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        if this.is_ended {
            return Poll::Ready(None);
        }
        // Registered before the check, or an item that arrives in between would wait for the next
        // heartbeat.
        this.control.guard.stream().register(cx.waker());
        // Nothing is taken from the queues until the last write has left: what is queued can still
        // be overtaken by something more urgent, a frame in the buffer cannot.
        if let Some(socket) = &this.control.socket
            && socket.poll_taken(cx, this.n_written).is_pending()
        {
            return Poll::Pending;
        }
        this.collect();
        if this.buffer.is_empty() {
            // An idle stream holds no buffer.
            this.buffer = BytesMut::new();
            return Poll::Pending;
        }
        this.n_written = this
            .control
            .socket
            .as_ref()
            .map_or(0, |socket| socket.taken())
            + this.buffer.len() as u64;
        Poll::Ready(Some(Ok(Frame::data(this.buffer.split().freeze()))))
    }
}

/// The whole response of a stream that this node cannot serve now. Sent with status 200, because an
/// `EventSource` does not reconnect after any other.
pub fn refusal(reason: &str, retry: Duration) -> String {
    format!(
        "retry: {}\nevent: close\ndata: {{\"reason\":\"{reason}\"}}\n\n",
        spread_retry(retry)
    )
}

fn put_id(out: &mut BytesMut, cursor: &str) {
    out.put_slice(b"id: ");
    out.put_slice(cursor.as_bytes());
    out.put_slice(b"\n");
}

/// Appends the request to reconnect with a new token, before the present one expires.
fn put_reauth(out: &mut BytesMut, expires_ms: u64) {
    let data = format!(
        r#"{{"expires_at":"{}","expires_in":{}}}"#,
        rfc3339(expires_ms),
        expires_ms.saturating_sub(clock::now_ms()) / 1_000
    );
    out.put_slice(format!("event: reauth\ndata: {data}\n\n").as_bytes());
}

fn put_gap(out: &mut BytesMut, gap: Gap) {
    let Gap {
        partition,
        reason,
        from,
        to,
    } = gap;
    let data = format!(
        r#"{{"reason":"{}","partition":{},"from":{from},"to":{to}}}"#,
        reason.as_str(),
        partition.0
    );
    out.put_slice(format!("event: gap\ndata: {data}\n\n").as_bytes());
}

fn put_target(out: &mut BytesMut, target: &Target) {
    let from = out.len();
    serde_json::to_writer(out.writer(), target)
        .expect("serialising a string to memory cannot fail");
    // This is done for each stream, and most names are ASCII.
    if !out[from..].is_ascii() {
        let written = out.split_off(from);
        put_data(out, &written);
    }
}

/// Renders `data:` of a notification, with the blank line that ends it.
fn render(record: &Record, route: usize) -> Rendered {
    let (before, after) = data::around_target(record.notification(), route);
    let mut out = BytesMut::with_capacity(before.len() + after.len() + 64);
    out.put_slice(b"data: ");
    put_data(&mut out, before.as_bytes());
    let before_target = out.split().freeze();
    put_data(&mut out, after.as_bytes());
    out.put_slice(b"\n\n");
    Rendered {
        before_target,
        after_target: out.freeze(),
    }
}

/// The reconnect delay for one client in milliseconds, randomised so that a node's clients do not
/// reconnect at the same moment.
fn spread_retry(retry: Duration) -> u64 {
    retry.mul_f64(rand::random_range(0.5..1.5)).as_millis() as u64
}
