//! Ports that no other process takes between being chosen and being bound, even while a killed node
//! restarts.
//!
//! Binding port 0 and closing it again is a race as soon as tests run in parallel. This process
//! therefore claims blocks of a hundred ports, by listening on the first port of each until it
//! exits, and hands out the others one by one. All blocks lie below the ephemeral range of Linux
//! (32768 and up), so no outgoing connection uses one of these ports.

use std::net::{SocketAddr, TcpListener};
use std::sync::Mutex;

const BLOCKS: std::ops::Range<u16> = 110..320;
const BLOCK: u16 = 100;

struct Claim {
    /// Listeners on the first port of this block and of the used-up ones, which mark the blocks as
    /// taken for other test processes.
    flags: Vec<TcpListener>,
    next: u16,
    end: u16,
}

static CLAIM: Mutex<Option<Claim>> = Mutex::new(None);

/// A loopback address that no process listens on and that no other caller of this function gets.
///
/// # Panics
/// If every block is taken, that is, if some 200 test processes run at once.
pub(crate) fn free() -> SocketAddr {
    let mut claim = CLAIM.lock().expect("no panic under the lock");
    loop {
        if let Some(claim) = claim.as_mut() {
            while claim.next < claim.end {
                let addr = SocketAddr::from(([127, 0, 0, 1], claim.next));
                claim.next += 1;
                // A process outside the tests may use it.
                if TcpListener::bind(addr).is_ok() {
                    return addr;
                }
            }
        }
        // Starting at a block that depends on the process id avoids most collisions.
        let n_blocks = BLOCKS.end - BLOCKS.start;
        let first = (std::process::id() % u32::from(n_blocks)) as u16;
        let mut flags = (0..n_blocks).map(|n| (BLOCKS.start + (first + n) % n_blocks) * BLOCK);
        let taken = flags.find_map(|port| {
            TcpListener::bind(("127.0.0.1", port))
                .ok()
                .map(|flag| (port, flag))
        });
        let (port, flag) = taken.expect("a block of ports that no other test process has");
        let mut flags = claim
            .take()
            .map(|used_up| used_up.flags)
            .unwrap_or_default();
        flags.push(flag);
        *claim = Some(Claim {
            flags,
            next: port + 1,
            end: port + BLOCK,
        });
    }
}
