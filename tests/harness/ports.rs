//! Ports that nobody else takes between being chosen and being bound, not even after a node was killed and starts again.
//!
//! Asking the kernel for port 0 and closing it again is a race as soon as tests run in parallel. So this process claims blocks of a
//! hundred ports by listening on the first of each for as long as it lives, and hands out the others one by one. All blocks lie below the
//! ephemeral range of Linux (32768 and up), so no outgoing connection sits on one of them.

use std::net::{SocketAddr, TcpListener};
use std::sync::Mutex;

const BLOCKS: std::ops::Range<u16> = 110..320;
const BLOCK: u16 = 100;

struct Claim {
    /// Listen on the first ports of this block and of those used up; other test processes see by it that they are taken.
    flags: Vec<TcpListener>,
    next: u16,
    end: u16,
}

static CLAIM: Mutex<Option<Claim>> = Mutex::new(None);

/// An address on loopback that nobody listens on, and that nobody else who asks here is given.
///
/// # Panics
/// If every block is taken, which means that some 200 test processes run at once.
pub(crate) fn free() -> SocketAddr {
    let mut claim = CLAIM.lock().expect("nobody panics with it");
    loop {
        if let Some(claim) = claim.as_mut() {
            while claim.next < claim.end {
                let addr = SocketAddr::from(([127, 0, 0, 1], claim.next));
                claim.next += 1;
                // Something outside the tests may sit on it.
                if TcpListener::bind(addr).is_ok() {
                    return addr;
                }
            }
        }
        // Beginning at a block of our own spares most of the collisions.
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
