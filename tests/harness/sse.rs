//! A client of Server-Sent Events that forgives nothing: one connection as bytes ([`Stream`]). The one that comes back whenever it is cut,
//! as a browser does, is [`Follower`].
//!
//! The wire is parsed byte by byte: response head, chunks of HTTP/1.1, frames, fields. Whatever a lenient client would swallow (a carriage
//! return, an unknown field, an id with a NUL) is a panic with the bytes. The last event id moves as in a browser: with a frame that is
//! complete, never with a half one. Standard library and `serde_json` only, for the demo uses this file, too.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde_json::Value;

// With its path, because the demo includes this file by its own.
#[path = "sse/follower.rs"]
mod follower;

pub(crate) use follower::Follower;

/// The event names by which a node speaks of the stream itself; every other frame with data is a notification.
const STATE_EVENTS: [&str; 4] = ["cursor", "gap", "reauth", "close"];

/// How a stream is asked for.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    addr: SocketAddr,
    path: String,
    headers: Vec<(String, String)>,
    version: &'static str,
}

impl Request {
    /// `query`: what follows the question mark of `/v1/stream`, percent-encoded, such as `user=42`.
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

    /// Sends `Last-Event-ID`; an empty id is none, as in a browser.
    pub(crate) fn last_event_id(self, id: &str) -> Self {
        if id.is_empty() {
            self
        } else {
            self.header("Last-Event-ID", id)
        }
    }

    /// Speaks HTTP/1.0: no chunks, and the end of the connection is the end of the stream.
    pub(crate) fn http_1_0(mut self) -> Self {
        self.version = "HTTP/1.0";
        self
    }

    /// Connects and reads the response head.
    ///
    /// # Errors
    /// [`Refused`] if there is no connection, no complete head within the time, or another status than 200.
    pub(crate) fn open(self, within: Duration) -> Result<Stream, Refused> {
        let unreachable = |error: io::Error| Refused {
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

/// No stream: what the node answered instead, or why it did not answer (no `status`).
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) status: Option<u16>,
    /// The whole response as it came, or the error.
    pub(crate) text: String,
}

/// Why there is no further frame.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The time given is over; the stream goes on.
    Deadline,
    /// The node ended the stream in good order.
    Ended,
    /// The connection broke.
    Cut(io::Error),
}

/// One frame: everything up to an empty line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) id: Option<String>,
    pub(crate) event: Option<String>,
    /// The lines of `data:`, joined by line feeds.
    pub(crate) data: Option<String>,
    pub(crate) retry: Option<u64>,
    /// Comments that stood in the frame or before it: heartbeats.
    pub(crate) comments: Vec<String>,
    /// As it came, the empty line included.
    pub(crate) text: String,
}

impl Frame {
    /// # Panics
    /// If it is not what a strict reader of the format and of Pointsman's protocol expects.
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
                wrong("a line that is no field")
            };
            let value = value.strip_prefix(' ').unwrap_or(value);
            let twice = match field {
                "id" => frame.id.replace(value.to_owned()).is_some(),
                "event" => frame.event.replace(value.to_owned()).is_some(),
                "retry" => match value.parse() {
                    Ok(ms) => frame.retry.replace(ms).is_some(),
                    Err(_) => wrong("a retry that is no number"),
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
                wrong("a field twice");
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

    /// The name, if this frame speaks of the stream itself.
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
            data: json.get("data").cloned().unwrap_or_default(),
        })
    }
}

/// One notification as a client has it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Notification {
    /// The last event id that it leaves behind.
    pub(crate) cursor: String,
    /// The SSE event name, if it has one.
    pub(crate) name: Option<String>,
    /// CloudEvents `id`, `source` and `type` of the event.
    pub(crate) id: String,
    pub(crate) source: String,
    pub(crate) kind: String,
    pub(crate) time: String,
    pub(crate) priority: String,
    /// The router that sent it, and the target by which it reached this user.
    pub(crate) by: String,
    pub(crate) to: String,
    pub(crate) data: Value,
}

/// How the body of the response is delimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Body {
    Chunked,
    UntilClosed,
}

/// One open stream.
pub(crate) struct Stream {
    socket: TcpStream,
    head: String,
    body: Body,
    /// Every byte after the head, as it came.
    wire: Vec<u8>,
    /// How much of `wire` has become `text`.
    decoded: usize,
    /// The last chunk was read.
    is_over: bool,
    /// The body without chunk heads.
    text: Vec<u8>,
    /// How much of `text` has become frames.
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

    /// What a browser would send as `Last-Event-ID` if it were cut now.
    pub(crate) fn last_event_id(&self) -> &str {
        &self.last_event_id
    }

    /// A second handle to the connection, by which another thread can cut it.
    pub(crate) fn scissors(&self) -> io::Result<TcpStream> {
        self.socket.try_clone()
    }

    /// The next frame.
    ///
    /// # Errors
    /// [`Stop`] says why there is none.
    pub(crate) fn next_frame(&mut self, within: Duration) -> Result<Frame, Stop> {
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

    /// The next notification; cursors and comments on the way are taken note of and passed over.
    ///
    /// # Panics
    /// If none comes in time, or the stream says something else of itself, or ends.
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

    /// The next frame by which the node speaks of the stream itself under this name.
    ///
    /// # Panics
    /// If none comes in time, or a notification comes first.
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

    /// Reads until the stream is over, and answers how: [`Stop::Ended`], [`Stop::Cut`], or [`Stop::Deadline`] if it is not.
    pub(crate) fn read_to_end(&mut self, within: Duration) -> (Vec<Frame>, Stop) {
        let deadline = Instant::now() + within;
        let mut frames = Vec::new();
        loop {
            match self.next_frame(deadline.saturating_duration_since(Instant::now())) {
                Ok(frame) => frames.push(frame),
                Err(stop) => return (frames, stop),
            }
        }
    }

    /// Gives up the transcript of what was read already; a follower may live for hours.
    fn forget(&mut self) {
        if self.parsed > 64 * 1024 {
            self.text.drain(..self.parsed);
            self.parsed = 0;
            self.wire.drain(..self.decoded);
            self.decoded = 0;
        }
    }

    fn read_head(&mut self, deadline: Instant) -> Result<(), Refused> {
        let length = loop {
            if let Some(length) = find(&self.wire, b"\r\n\r\n") {
                break length;
            }
            if let Err(error) = self.receive(deadline) {
                return Err(Refused {
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
            // What is worth reading of a refusal comes with its head or right after it.
            while self
                .receive(deadline.min(Instant::now() + Duration::from_millis(200)))
                .is_ok()
            {}
            let text = format!("{}{}", self.head, String::from_utf8_lossy(&self.wire));
            return Err(Refused {
                status: Some(status),
                text,
            });
        }
        let fields = self.head.to_ascii_lowercase();
        assert!(
            fields.contains("\r\ncontent-type: text/event-stream"),
            "no event stream: {}",
            self.head
        );
        self.body = if fields.contains("\r\ntransfer-encoding: chunked\r\n") {
            Body::Chunked
        } else {
            Body::UntilClosed
        };
        Ok(())
    }

    /// Makes `text` longer.
    fn read_some(&mut self, deadline: Instant) -> Result<(), Stop> {
        let before = self.text.len();
        loop {
            self.decode();
            if self.text.len() > before {
                return Ok(());
            }
            if self.is_over {
                return Err(Stop::Ended);
            }
            self.receive(deadline).map_err(|error| match error.kind() {
                ErrorKind::TimedOut => Stop::Deadline,
                ErrorKind::UnexpectedEof if self.body == Body::UntilClosed => Stop::Ended,
                _ => Stop::Cut(error),
            })?;
        }
    }

    /// Turns what is complete of `wire` into `text`.
    fn decode(&mut self) {
        if self.body == Body::UntilClosed {
            self.text.extend_from_slice(&self.wire[self.decoded..]);
            self.decoded = self.wire.len();
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
                "a chunk that does not end where it says, at byte {} of {:?}",
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
    /// The transcript: what a failing test wants to show.
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

    /// A server that gives each of these bodies to one connection after the other and closes it; it answers the request heads.
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
    fn a_stream_reads_frames_across_chunks_and_knows_a_good_end_from_a_cut() {
        let (addr, _) = serve(&[
            "Transfer-Encoding: chunked\r\n\r\n3\r\n:\nd\r\nc\r\nata: {}\nid: \r\n3\r\na1\n\r\n1\r\n\n\r\n0\r\n\r\n",
        ]);
        let (frames, stop) = open(addr).read_to_end(SOON);
        assert!(matches!(stop, Stop::Ended), "{stop:?}");
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
            matches!(&stop, Stop::Cut(error) if error.kind() == ErrorKind::UnexpectedEof),
            "{stop:?}"
        );
    }

    #[test]
    fn a_half_frame_does_not_move_the_last_event_id() {
        let (addr, _) = serve(&["\r\nid: a1\ndata: x\n\nid: a2\ndata: y\n"]);
        let mut stream = open(addr);
        let (frames, _) = stream.read_to_end(SOON);
        assert_eq!((frames.len(), stream.last_event_id()), (1, "a1"));
    }

    #[test]
    fn a_follower_comes_back_with_its_last_event_id() {
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
    fn what_a_lenient_client_would_swallow_is_refused() {
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
