//! A line between a node and its Redis that a test can spoil: answers can be held from a chosen request on, and be slow.
//!
//! Requests always pass at once. So a test can have what is otherwise a matter of luck: a command that Redis has run and whose answer
//! does not come in time. It knows nothing of either side's protocol.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// See the head of this file. It ends, with all its connections, when dropped.
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
    /// A request with these bytes is the last that is answered in time.
    trigger: Option<Vec<u8>>,
    is_holding: bool,
    bytes_per_s: Option<u64>,
    is_over: bool,
    sockets: Vec<TcpStream>,
}

impl Proxy {
    /// A line to the server on this port of this machine.
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
                // A server that is not there is a connection that breaks.
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

    /// Holds all answers from the next request on that has these bytes in it; that request still passes.
    pub(crate) fn hold_answers_from(&self, request: &str) {
        self.shared.lock().trigger = Some(request.as_bytes().to_vec());
    }

    /// Whether answers are held.
    pub(crate) fn is_holding(&self) -> bool {
        self.shared.lock().is_holding
    }

    /// Lets the answers that were held pass, to whoever is still there to hear them.
    pub(crate) fn release(&self) {
        let mut state = self.shared.lock();
        (state.trigger, state.is_holding) = (None, false);
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Lets answers pass at this rate, over each connection.
    pub(crate) fn slow_answers_to(&self, bytes_per_s: u64) {
        self.shared.lock().bytes_per_s = Some(bytes_per_s);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with it")
    }

    fn pass_requests(&self, mut from: TcpStream, mut to: TcpStream) {
        let (mut buffer, mut seen) = (vec![0; 64 * 1024], Vec::new());
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            let mut state = self.lock();
            if let Some(trigger) = &state.trigger {
                // What was sought may have come in two pieces.
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
                .expect("nobody panics with it");
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
    // Either may be closed already, which is what is wanted.
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
        // The thread that accepts looks up.
        drop(TcpStream::connect(self.addr));
    }
}
