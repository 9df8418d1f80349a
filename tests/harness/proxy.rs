//! A TCP proxy between a node and its Redis whose responses a test can hold back, from a chosen
//! request on, or slow down.
//!
//! Requests always pass at once. A test can thus force a state that is otherwise a matter of luck:
//! a command that Redis has run and whose reply does not arrive in time. The proxy does not
//! interpret the protocol.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// A proxy; see the head of this file. Dropping it closes all of its connections.
pub(crate) struct Proxy {
    addr: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// After the request that contains these bytes, replies are held back.
    trigger: Option<Vec<u8>>,
    is_holding: bool,
    is_cut: bool,
    bytes_per_s: Option<u64>,
    is_over: bool,
    sockets: Vec<TcpStream>,
}

impl Proxy {
    /// A proxy to the server on this port of this machine.
    pub(crate) fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
        let addr = listener.local_addr().expect("an address");
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let mut state = accepting.lock();
                if state.is_over {
                    return;
                }
                // If the server does not accept, the client's connection breaks.
                if state.is_cut {
                    // Dropped, and thereby closed.
                    continue;
                }
                let (Ok(client), Ok(server)) = (client, TcpStream::connect(("127.0.0.1", port)))
                else {
                    continue;
                };
                let pair = || Some((client.try_clone().ok()?, server.try_clone().ok()?));
                let (Some(requests), Some(answers), Some((a, b))) = (pair(), pair(), pair()) else {
                    continue;
                };
                state.sockets.extend([a, b]);
                drop(state);
                let (for_requests, for_answers) = (Arc::clone(&accepting), Arc::clone(&accepting));
                std::thread::spawn(move || for_requests.pass_requests(requests.0, requests.1));
                std::thread::spawn(move || for_answers.pass_answers(answers.1, answers.0));
            }
        });
        Self { addr, shared }
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://{}/", self.addr)
    }

    /// Holds back all replies from the next request on that contains these bytes; the request
    /// itself still passes.
    pub(crate) fn hold_answers_from(&self, request: &str) {
        self.shared.lock().trigger = Some(request.as_bytes().to_vec());
    }

    /// Holds back all replies from now on.
    pub(crate) fn hold_answers(&self) {
        self.shared.lock().is_holding = true;
    }

    /// Closes all connections, and each new one at once, until [`Proxy::heal`].
    pub(crate) fn cut(&self) {
        let mut state = self.shared.lock();
        state.is_cut = true;
        for socket in state.sockets.drain(..) {
            drop(socket.shutdown(Shutdown::Both));
        }
    }

    /// Ends [`Proxy::cut`] and [`Proxy::hold_answers`].
    pub(crate) fn heal(&self) {
        self.shared.lock().is_cut = false;
        self.release();
    }

    /// Whether replies are being held back.
    pub(crate) fn is_holding(&self) -> bool {
        self.shared.lock().is_holding
    }

    /// Sends the held replies to the clients still connected, and lets later ones pass.
    pub(crate) fn release(&self) {
        let mut state = self.shared.lock();
        (state.trigger, state.is_holding) = (None, false);
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Limits the rate of replies on each connection, in bytes per second.
    pub(crate) fn slow_answers_to(&self, bytes_per_s: u64) {
        self.shared.lock().bytes_per_s = Some(bytes_per_s);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic under the lock")
    }

    fn pass_requests(&self, mut from: TcpStream, mut to: TcpStream) {
        let (mut buffer, mut seen) = (vec![0; 64 * 1024], Vec::new());
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            let mut state = self.lock();
            if let Some(trigger) = &state.trigger {
                // The bytes may have arrived in two pieces.
                seen.extend_from_slice(&buffer[..n]);
                if seen.windows(trigger.len()).any(|window| window == trigger) {
                    (state.trigger, state.is_holding) = (None, true);
                }
                seen.drain(..seen.len().saturating_sub(1024));
            }
            drop(state);
            if to.write_all(&buffer[..n]).is_err() {
                break;
            }
        }
        close(&from, &to);
    }

    fn pass_answers(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            let state = self.lock();
            let state = self
                .changed
                .wait_while(state, |state| state.is_holding && !state.is_over)
                .expect("no panic under the lock");
            let pause = state
                .bytes_per_s
                .map(|rate| Duration::from_secs_f64(n as f64 / rate as f64));
            drop(state);
            pause.into_iter().for_each(std::thread::sleep);
            if to.write_all(&buffer[..n]).is_err() {
                break;
            }
        }
        close(&from, &to);
    }
}

fn close(a: &TcpStream, b: &TcpStream) {
    // Either may be closed already, which is fine.
    drop((a.shutdown(Shutdown::Both), b.shutdown(Shutdown::Both)));
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let mut state = self
            .shared
            .state
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        state.is_over = true;
        for socket in state.sockets.drain(..) {
            drop(socket.shutdown(Shutdown::Both));
        }
        drop(state);
        self.shared.changed.notify_all();
        // Wakes the accepting thread, which then sees `is_over`.
        drop(TcpStream::connect(self.addr));
    }
}
