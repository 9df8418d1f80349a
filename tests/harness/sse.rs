//! A strict client for Server-Sent Events: one connection, down to its bytes ([`Stream`]).
//! [`Follower`] is the client that reconnects like a browser.
//!
//! The wire is parsed byte by byte: response head, HTTP/1.1 chunks, frames, fields. Anything that a
//! lenient client would accept (a carriage return, an unknown field, an id with a NUL) panics and
//! shows the bytes. The last event id moves as in a browser: with a complete frame, never with a
//! partial one. This file uses only the standard library and `serde_json`, because the demo
//! includes it, too.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde_json::Value;

// With an explicit path, because the demo includes this file by path.
#[path = "sse/follower.rs"]
mod follower;

pub(crate) use follower::Follower;

/// The event names for the state of the stream itself; every other frame with data is a
/// notification.
const STATE_EVENTS: [&str; 4] = ["cursor", "gap", "reauth", "close"];

/// A request for a stream.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    addr: SocketAddr,
    path: String,
    headers: Vec<(String, String)>,
    version: &'static str,
}

impl Request {
    /// `query` is the percent-encoded query of `/v1/stream`, such as `user=42`.
    pub(crate) fn new(addr: SocketAddr, query: &str) -> Self {
        let headers = vec![("Accept".to_owned(), "text/event-stream".to_owned())];
        Self {
            addr,
            path: format!("/v1/stream?{query}"),
            headers,
            version: "HTTP/1.1",
        }
    }

    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Sends `Last-Event-ID`; like a browser, omits an empty id.
    pub(crate) fn last_event_id(self, id: &str) -> Self {
        if id.is_empty() {
            self
        } else {
            self.header("Last-Event-ID", id)
        }
    }

    /// Uses HTTP/1.0: no chunks, and the stream ends with the connection.
    pub(crate) fn http_1_0(mut self) -> Self {
        self.version = "HTTP/1.0";
        self
    }

    /// Connects and reads the response head.
    ///
    /// # Errors
    /// [`OpenError`] if there is no connection, no complete head in time, or a status other than
    /// 200.
    pub(crate) fn open(self, within: Duration) -> Result<Stream, OpenError> {
        let unreachable = |error: io::Error| OpenError {
            status: None,
            text: error.to_string(),
        };
        let socket = TcpStream::connect_timeout(&self.addr, within).map_err(unreachable)?;
        socket.set_nodelay(true).map_err(unreachable)?;
        let mut head = format!(
            "GET {} {}\r\nHost: {}\r\n",
            self.path, self.version, self.addr
        );
        for (name, value) in &self.headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += "\r\n";
        (&socket).write_all(head.as_bytes()).map_err(unreachable)?;
        let given = self
            .headers
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case("last-event-id"));
        let mut stream = Stream {
            socket,
            head: String::new(),
            body: Body::UntilClosed,
            wire: Vec::new(),
            decoded: 0,
            is_over: false,
            text: Vec::new(),
            parsed: 0,
            last_event_id: given.map(|(_, id)| id.clone()).unwrap_or_default(),
        };
        stream.read_head(Instant::now() + within)?;
        Ok(stream)
    }
}

/// The failure to open a stream: the response of the node, or the reason that there is none (no
/// `status`).
#[derive(Debug)]
pub(crate) struct OpenError {
    pub(crate) status: Option<u16>,
    /// The whole response as received, or the error.
    pub(crate) text: String,
}

/// The reason that no further frame arrives.
#[derive(Debug)]
pub(crate) enum StreamEnd {
    /// The time limit expired; the stream is still open.
    Timeout,
    /// The node ended the stream properly.
    Complete,
    /// The connection broke.
    Cut(io::Error),
}

/// One frame: everything up to and including an empty line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) id: Option<String>,
    pub(crate) event: Option<String>,
    /// The lines of `data:`, joined by line feeds.
    pub(crate) data: Option<String>,
    pub(crate) retry: Option<u64>,
    /// Comments in or before the frame: heartbeats.
    pub(crate) comments: Vec<String>,
    /// The text as received, including the empty line.
    pub(crate) text: String,
}

impl Frame {
    /// Parses a frame.
    ///
    /// # Panics
    /// If the frame does not conform to the format and to Pointsman's protocol.
    fn parse(text: &str) -> Self {
        let mut frame = Self {
            text: text.to_owned(),
            ..Self::default()
        };
        let wrong = |what: &str| -> ! { panic!("{what} in the frame {text:?}") };
        for line in text.trim_end_matches('\n').split('\n') {
            if let Some(comment) = line.strip_prefix(':') {
                frame.comments.push(comment.trim_start().to_owned());
                continue;
            }
            let Some((field, value)) = line.split_once(':') else {
                wrong("a line that is not a field")
            };
            let value = value.strip_prefix(' ').unwrap_or(value);
            let twice = match field {
                "id" => frame.id.replace(value.to_owned()).is_some(),
                "event" => frame.event.replace(value.to_owned()).is_some(),
                "retry" => match value.parse() {
                    Ok(ms) => frame.retry.replace(ms).is_some(),
                    Err(_) => wrong("a retry that is not a number"),
                },
                "data" => {
                    match &mut frame.data {
                        None => frame.data = Some(value.to_owned()),
                        Some(data) => *data = format!("{data}\n{value}"),
                    }
                    false
                }
                _ => wrong("an unknown field"),
            };
            if twice {
                wrong("a repeated field");
            }
        }
        if let Some(id) = &frame.id
            && (id.is_empty()
                || id.len() > 128
                || !id
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-'))
        {
            wrong("an id that is not 1 to 128 of [A-Za-z0-9_-]");
        }
        frame
    }

    /// The event name, if this frame carries the state of the stream itself.
    pub(crate) fn state(&self) -> Option<&str> {
        self.event
            .as_deref()
            .filter(|name| STATE_EVENTS.contains(name))
    }

    /// The notification in this frame, if it is one.
    ///
    /// # Panics
    /// If the data is not the documented JSON object.
    pub(crate) fn notification(&self) -> Option<Notification> {
        let data = self.data.as_deref()?;
        if self.state().is_some() {
            return None;
        }
        let wrong = |what: &str| -> ! { panic!("{what} in the notification {:?}", self.text) };
        let json: Value =
            serde_json::from_str(data).unwrap_or_else(|_| wrong("data that is not JSON"));
        let text = |name: &str| match json.get(name).and_then(Value::as_str) {
            Some(text) => text.to_owned(),
            None => wrong(&format!("no text '{name}'")),
        };
        Some(Notification {
            cursor: self.id.clone().unwrap_or_else(|| wrong("no id")),
            name: self.event.clone(),
            id: text("id"),
            source: text("source"),
            kind: text("type"),
            time: text("time"),
            priority: text("priority"),
            by: text("by"),
            to: text("to"),
            slot: json.get("slot").and_then(Value::as_str).map(str::to_owned),
            data: json.get("data").cloned().unwrap_or_default(),
        })
    }
}

/// A notification as a client receives it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Notification {
    /// The last event id after it.
    pub(crate) cursor: String,
    /// The SSE event name, if it has one.
    pub(crate) name: Option<String>,
    /// CloudEvents `id`, `source` and `type` of the event.
    pub(crate) id: String,
    pub(crate) source: String,
    pub(crate) kind: String,
    pub(crate) time: String,
    pub(crate) priority: String,
    /// The router that decided on it, and the target that reached this user.
    pub(crate) by: String,
    pub(crate) to: String,
    /// The slot of the route, if it has one.
    pub(crate) slot: Option<String>,
    pub(crate) data: Value,
}

/// The framing of the response body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Body {
    Chunked,
    Length(usize),
    UntilClosed,
}

/// One open stream.
pub(crate) struct Stream {
    socket: TcpStream,
    head: String,
    body: Body,
    /// Every byte after the head, as received.
    wire: Vec<u8>,
    /// The number of bytes of `wire` decoded into `text`.
    decoded: usize,
    /// Whether the last chunk was read.
    is_over: bool,
    /// The body without chunk heads.
    text: Vec<u8>,
    /// The number of bytes of `text` parsed into frames.
    parsed: usize,
    last_event_id: String,
}

impl Stream {
    /// The response head, status line first.
    pub(crate) fn head(&self) -> &str {
        &self.head
    }

    /// The body so far, without chunk heads.
    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.text).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }

    /// The `Last-Event-ID` that a browser would send if it were cut now.
    pub(crate) fn last_event_id(&self) -> &str {
        &self.last_event_id
    }

    /// A second handle to the connection, with which another thread can cut it.
    pub(crate) fn scissors(&self) -> io::Result<TcpStream> {
        self.socket.try_clone()
    }

    /// The next frame.
    ///
    /// # Errors
    /// [`StreamEnd`] with the reason that there is none.
    pub(crate) fn next_frame(&mut self, within: Duration) -> Result<Frame, StreamEnd> {
        let deadline = Instant::now() + within;
        loop {
            if let Some(length) = find(&self.text[self.parsed..], b"\n\n") {
                let end = self.parsed + length + 2;
                let text = std::str::from_utf8(&self.text[self.parsed..end])
                    .unwrap_or_else(|error| panic!("{error} in {self:?}"));
                assert!(
                    !text.starts_with('\n'),
                    "an empty line without a frame in {self:?}"
                );
                assert!(!text.contains('\r'), "a carriage return in {self:?}");
                let frame = Frame::parse(text);
                self.parsed = end;
                if let Some(id) = &frame.id {
                    self.last_event_id.clone_from(id);
                }
                return Ok(frame);
            }
            self.read_some(deadline)?;
        }
    }

    /// The next notification; skips cursors and comments.
    ///
    /// # Panics
    /// If none arrives in time, another state frame arrives, or the stream ends.
    pub(crate) fn next_notification(&mut self, within: Duration) -> Notification {
        let deadline = Instant::now() + within;
        loop {
            let frame = self.next_frame(deadline.saturating_duration_since(Instant::now()));
            let frame = frame.unwrap_or_else(|stop| {
                panic!("{stop:?} while waiting {within:?} for a notification on {self:?}")
            });
            if let Some(notification) = frame.notification() {
                return notification;
            }
            assert!(
                frame.state().is_none_or(|name| name == "cursor"),
                "{:?} while waiting for a notification on {self:?}",
                frame.text
            );
        }
    }

    /// The next state frame with this name.
    ///
    /// # Panics
    /// If none arrives in time, or a notification arrives first.
    pub(crate) fn next_state(&mut self, name: &str, within: Duration) -> Frame {
        let deadline = Instant::now() + within;
        loop {
            let frame = self.next_frame(deadline.saturating_duration_since(Instant::now()));
            let frame = frame.unwrap_or_else(|stop| {
                panic!("{stop:?} while waiting {within:?} for '{name}' on {self:?}")
            });
            if frame.state() == Some(name) {
                return frame;
            }
            assert!(
                frame.notification().is_none(),
                "a notification while waiting for '{name}' on {self:?}"
            );
        }
    }

    /// Reads until the stream is over. Returns its frames and how it ended:
    /// [`StreamEnd::Complete`], [`StreamEnd::Cut`], or [`StreamEnd::Timeout`] if it did not.
    pub(crate) fn read_to_end(&mut self, within: Duration) -> (Vec<Frame>, StreamEnd) {
        let deadline = Instant::now() + within;
        let mut frames = Vec::new();
        loop {
            match self.next_frame(deadline.saturating_duration_since(Instant::now())) {
                Ok(frame) => frames.push(frame),
                Err(stop) => return (frames, stop),
            }
        }
    }

    /// Drops the parsed part of the transcript, because a follower may run for hours.
    fn forget(&mut self) {
        if self.parsed > 64 * 1024 {
            self.text.drain(..self.parsed);
            self.parsed = 0;
            self.wire.drain(..self.decoded);
            self.decoded = 0;
        }
    }

    fn read_head(&mut self, deadline: Instant) -> Result<(), OpenError> {
        let length = loop {
            if let Some(length) = find(&self.wire, b"\r\n\r\n") {
                break length;
            }
            if let Err(error) = self.receive(deadline) {
                return Err(OpenError {
                    status: None,
                    text: format!("no response: {error}"),
                });
            }
        };
        self.head = String::from_utf8(self.wire.drain(..length + 4).collect())
            .expect("a response head is text");
        let status = self
            .head
            .split(' ')
            .nth(1)
            .and_then(|code| code.parse().ok())
            .expect("a response head begins with a status line");
        if status != 200 {
            // The useful part of an error response arrives with its head or right after it.
            while self
                .receive(deadline.min(Instant::now() + Duration::from_millis(200)))
                .is_ok()
            {}
            let text = format!("{}{}", self.head, String::from_utf8_lossy(&self.wire));
            return Err(OpenError {
                status: Some(status),
                text,
            });
        }
        let fields = self.head.to_ascii_lowercase();
        assert!(
            fields.contains("\r\ncontent-type: text/event-stream"),
            "not an event stream: {}",
            self.head
        );
        self.body = if fields.contains("\r\ntransfer-encoding: chunked\r\n") {
            Body::Chunked
        } else if let Some((_, length)) = fields.split_once("\r\ncontent-length: ") {
            let length = length.split("\r\n").next().unwrap_or_default();
            Body::Length(length.parse().expect("a length is a number"))
        } else {
            Body::UntilClosed
        };
        Ok(())
    }

    /// Reads until `text` grows.
    fn read_some(&mut self, deadline: Instant) -> Result<(), StreamEnd> {
        let before = self.text.len();
        loop {
            self.decode();
            if self.text.len() > before {
                return Ok(());
            }
            if self.is_over {
                return Err(StreamEnd::Complete);
            }
            self.receive(deadline).map_err(|error| match error.kind() {
                ErrorKind::TimedOut => StreamEnd::Timeout,
                ErrorKind::UnexpectedEof if self.body == Body::UntilClosed => StreamEnd::Complete,
                _ => StreamEnd::Cut(error),
            })?;
        }
    }

    /// Decodes the complete part of `wire` into `text`.
    fn decode(&mut self) {
        if self.body == Body::UntilClosed {
            self.text.extend_from_slice(&self.wire[self.decoded..]);
            self.decoded = self.wire.len();
            return;
        }
        if let Body::Length(length) = self.body {
            // A stream whose only frame is its end.
            self.text.extend_from_slice(&self.wire[self.decoded..]);
            self.decoded = self.wire.len();
            self.is_over = self.decoded >= length;
            return;
        }
        while !self.is_over {
            let rest = &self.wire[self.decoded..];
            let Some(length) = find(rest, b"\r\n") else {
                return;
            };
            let size = std::str::from_utf8(&rest[..length])
                .ok()
                .and_then(|hex| usize::from_str_radix(hex, 16).ok());
            let size = size.unwrap_or_else(|| {
                panic!(
                    "no chunk head at byte {} of {:?}",
                    self.decoded,
                    String::from_utf8_lossy(&self.wire)
                )
            });
            let Some(chunk) = rest.get(length + 2..length + 2 + size + 2) else {
                return;
            };
            assert!(
                chunk.ends_with(b"\r\n"),
                "a chunk that does not match its length, at byte {} of {:?}",
                self.decoded,
                String::from_utf8_lossy(&self.wire)
            );
            self.text.extend_from_slice(&chunk[..size]);
            self.decoded += length + 2 + size + 2;
            self.is_over = size == 0;
        }
    }

    fn receive(&mut self, deadline: Instant) -> io::Result<()> {
        let mut buffer = [0; 16 * 1024];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ErrorKind::TimedOut.into());
            }
            self.socket.set_read_timeout(Some(left))?;
            match self.socket.read(&mut buffer) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    self.wire.extend_from_slice(&buffer[..n]);
                    return Ok(());
                }
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::Interrupted | ErrorKind::WouldBlock | ErrorKind::TimedOut
                    ) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl fmt::Debug for Stream {
    /// Writes the transcript, for the message of a failing test.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "the stream of {:?}:", self.socket.peer_addr().ok())?;
        f.write_str(&self.head)?;
        f.write_str(&String::from_utf8_lossy(&self.text))
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack
        .windows(needle.len())
        .position(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;
    use std::thread::JoinHandle;

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    /// A server that sends each body on one connection after another and closes it; returns the
    /// request heads.
    fn serve(bodies: &[&'static str]) -> (SocketAddr, JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (addr, bodies) = (listener.local_addr().unwrap(), bodies.to_vec());
        let served = std::thread::spawn(move || {
            let serve_one = |body: &str| {
                let (mut socket, _) = listener.accept().unwrap();
                let head: Vec<String> = BufReader::new(&socket)
                    .lines()
                    .map_while(Result::ok)
                    .take_while(|line| !line.is_empty())
                    .collect();
                write!(
                    socket,
                    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{body}"
                )
                .unwrap();
                head.join("\n")
            };
            bodies.iter().map(|body| serve_one(body)).collect()
        });
        (addr, served)
    }

    fn open(addr: SocketAddr) -> Stream {
        Request::new(addr, "user=42").open(SOON).unwrap()
    }

    #[test]
    fn a_stream_reads_frames_across_chunks_and_distinguishes_an_end_from_a_cut() {
        let (addr, _) = serve(&[
            "Transfer-Encoding: chunked\r\n\r\n3\r\n:\nd\r\nc\r\nata: {}\nid: \r\n3\r\na1\n\r\n1\r\n\n\r\n0\r\n\r\n",
        ]);
        let (frames, stop) = open(addr).read_to_end(SOON);
        assert!(matches!(stop, StreamEnd::Complete), "{stop:?}");
        let expected = Frame {
            id: Some("a1".into()),
            data: Some("{}".into()),
            comments: vec![String::new()],
            ..Frame::default()
        };
        assert_eq!(
            frames,
            [Frame {
                text: ":\ndata: {}\nid: a1\n\n".into(),
                ..expected
            }]
        );

        let (addr, _) = serve(&["Transfer-Encoding: chunked\r\n\r\n4\r\n:ok\n\r\n"]);
        let (_, stop) = open(addr).read_to_end(SOON);
        assert!(
            matches!(&stop, StreamEnd::Cut(error) if error.kind() == ErrorKind::UnexpectedEof),
            "{stop:?}"
        );
    }

    #[test]
    fn a_partial_frame_does_not_move_the_last_event_id() {
        let (addr, _) = serve(&["\r\nid: a1\ndata: x\n\nid: a2\ndata: y\n"]);
        let mut stream = open(addr);
        let (frames, _) = stream.read_to_end(SOON);
        assert_eq!((frames.len(), stream.last_event_id()), (1, "a1"));
    }

    #[test]
    fn a_follower_reconnects_with_its_last_event_id() {
        let (addr, served) = serve(&[
            "\r\nevent: cursor\nid: a0\ndata:\n\n",
            "\r\n:\n\n",
            "\r\nid: a1\nevent: gap\ndata: {}\n\n",
        ]);
        let follower = Follower::start(addr, "user=42");
        let record = follower.wait(SOON, "a gap", |record| !record.gaps.is_empty());
        assert_eq!(
            (record.connections, record.last_event_id.as_str()),
            (3, "a1")
        );
        let heads = served.join().unwrap();
        let sent: Vec<bool> = heads
            .iter()
            .map(|head| head.contains("Last-Event-ID: a0"))
            .collect();
        assert_eq!(sent, [false, true, true]);
    }

    #[test]
    fn malformed_frames_panic() {
        for bad in [
            "id: a\nid: b\n\n",
            "id: a b\n\n",
            "id: \n\n",
            "what: x\n\n",
            "data\n\n",
            "retry: soon\n\n",
        ] {
            assert!(
                std::panic::catch_unwind(|| Frame::parse(bad)).is_err(),
                "{bad:?}"
            );
        }
        let notification = "id: a\ndata: {\"id\":\"1\",\"source\":\"/s\",\"type\":\"t\",\"time\":\"x\",\"priority\":\"low\",\"by\":\"r\",\"to\":\"all\",\"data\":null}\n\n";
        assert!(Frame::parse(notification).notification().is_some());
        assert!(
            Frame::parse("event: cursor\nid: a\ndata: \n\n")
                .notification()
                .is_none()
        );
        for bad in [
            notification.replace("id: a\n", ""),
            notification.replace("priority", "urgency"),
            notification.replace("{", ""),
        ] {
            assert!(
                std::panic::catch_unwind(|| Frame::parse(&bad).notification()).is_err(),
                "{bad:?}"
            );
        }
    }
}
