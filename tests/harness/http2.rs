//! An HTTP/2 client of frames, whose flow-control windows a test opens by hand.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::node::SOON;

pub(crate) const HEADERS: u8 = 1;
pub(crate) const DATA: u8 = 0;
pub(crate) const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const WINDOW_UPDATE: u8 = 8;
const ACK: u8 = 1;
/// END_STREAM and END_HEADERS: a request without a body.
const WHOLE: u8 = 5;

/// An HTTP/2 client that opens streams with a closed window until it opens the window explicitly.
#[derive(Debug)]
pub(crate) struct Multiplexed {
    socket: TcpStream,
}

impl Multiplexed {
    pub(crate) fn connect(addr: SocketAddr) -> Self {
        let mut socket = TcpStream::connect(addr).expect("connect");
        socket
            .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            .expect("write");
        let mut client = Self { socket };
        // SETTINGS_INITIAL_WINDOW_SIZE is 0.
        client.send(SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0]);
        client
    }

    fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let n_bytes = u32::try_from(payload.len()).expect("short").to_be_bytes();
        let mut frame = vec![n_bytes[1], n_bytes[2], n_bytes[3], kind, flags];
        frame.extend_from_slice(&stream.to_be_bytes());
        frame.extend_from_slice(payload);
        self.socket.write_all(&frame).expect("write");
    }

    /// Sends `GET` of this path on this stream.
    pub(crate) fn get(&mut self, stream: u32, path: &str) {
        // HPACK: `GET` and `http` by index, path and authority as literals.
        let mut head = vec![0x82, 0x86];
        for (index, text) in [(4, path), (1, "localhost")] {
            head.extend([index, u8::try_from(text.len()).expect("short")]);
            head.extend_from_slice(text.as_bytes());
        }
        self.send(HEADERS, WHOLE, stream, &head);
    }

    pub(crate) fn open_window(&mut self, stream: u32, n_bytes: u32) {
        self.send(WINDOW_UPDATE, 0, stream, &n_bytes.to_be_bytes());
    }

    /// The next frame of a stream: kind, stream, payload. `None` if none arrives in time.
    pub(crate) fn next(&mut self, within: Duration) -> Option<(u8, u32, Vec<u8>)> {
        let deadline = Instant::now() + within;
        loop {
            let left = deadline
                .checked_duration_since(Instant::now())
                .filter(|left| !left.is_zero())?;
            self.socket
                .set_read_timeout(Some(left))
                .expect("set a timeout");
            let mut head = [0; 9];
            self.socket.read_exact(&mut head).ok()?;
            let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
            self.socket
                .set_read_timeout(Some(SOON))
                .expect("set a timeout");
            self.socket
                .read_exact(&mut payload)
                .expect("the rest of the frame");
            let (kind, flags, stream) = (
                head[3],
                head[4],
                u32::from_be_bytes([head[5], head[6], head[7], head[8]]),
            );
            match (kind, stream) {
                (SETTINGS, 0) if flags & ACK == 0 => self.send(SETTINGS, ACK, 0, &[]),
                (_, 0) => {}
                _ => return Some((kind, stream, payload)),
            }
        }
    }

    /// Reads until a stream has sent this text.
    pub(crate) fn await_text(&mut self, stream: u32, text: &str) {
        let (mut said, deadline) = (String::new(), Instant::now() + SOON);
        while !said.contains(text) {
            assert!(
                Instant::now() < deadline,
                "the stream did not send {text}, only {said}"
            );
            match self.next(SOON) {
                Some((DATA, from, bytes)) if from == stream => {
                    said += &String::from_utf8_lossy(&bytes)
                }
                Some(_) => {}
                None => panic!("the stream did not send {text}, only {said}"),
            }
        }
    }
}
