//! `wasi:random` without chance: the numbers follow from the plugin's name and the event's id, so
//! that a second attempt, a shadow candidate and a backtest get the same ones as the first call.
//!
//! All three interfaces are predictable for those who know both; a plugin has no secrets to keep by
//! them. What a guest draws while it starts depends on the plugin's name alone, because an instance
//! is reused for many events.

use sha2::{Digest, Sha256};
use wasmtime::component::HasData;
use wasmtime_wasi::p2::bindings::random::{insecure, insecure_seed, random};

use crate::event::Name;

/// The most bytes of one request.
const MAX_BYTES: u64 = 64 * 1024;

/// The random numbers of one instance.
#[derive(Debug)]
pub(super) struct SeededRandom {
    plugin: Name,
    event: Option<Name>,
    secure: Stream,
    insecure: Stream,
}

impl SeededRandom {
    pub(super) fn new(plugin: Name) -> Self {
        Self {
            plugin,
            event: None,
            secure: Stream::new("random"),
            insecure: Stream::new("insecure"),
        }
    }

    /// Begins the numbers of a call for the event with this id.
    pub(super) fn begin(&mut self, event: &Name) {
        self.event = Some(event.clone());
        self.secure.begin();
        self.insecure.begin();
    }

    fn secure(&mut self, bytes: &mut [u8]) {
        self.secure.fill(&self.plugin, self.event.as_ref(), bytes);
    }

    fn insecure(&mut self, bytes: &mut [u8]) {
        self.insecure.fill(&self.plugin, self.event.as_ref(), bytes);
    }
}

/// SHA-256 in counter mode.
#[derive(Debug)]
struct Stream {
    /// Separates the interfaces.
    domain: &'static str,
    n_blocks: u64,
    block: [u8; 32],
    n_used: usize,
}

impl Stream {
    fn new(domain: &'static str) -> Self {
        Self {
            domain,
            n_blocks: 0,
            block: [0; 32],
            n_used: 32,
        }
    }

    fn begin(&mut self) {
        (self.n_blocks, self.n_used) = (0, self.block.len());
    }

    fn fill(&mut self, plugin: &Name, event: Option<&Name>, bytes: &mut [u8]) {
        for byte in bytes {
            if self.n_used == self.block.len() {
                self.block = block(self.domain, plugin, event, self.n_blocks);
                self.n_blocks += 1;
                self.n_used = 0;
            }
            *byte = self.block[self.n_used];
            self.n_used += 1;
        }
    }
}

fn block(domain: &str, plugin: &Name, event: Option<&Name>, number: u64) -> [u8; 32] {
    let mut hash = Sha256::new();
    // Names contain no NUL, so two different pairs never yield the same input.
    for text in [domain, plugin.as_str(), event.map_or("", Name::as_str)] {
        hash.update(text);
        hash.update([0]);
    }
    hash.update(number.to_le_bytes());
    hash.finalize().into()
}

fn bytes(n: u64, fill: impl FnOnce(&mut [u8])) -> wasmtime::Result<Vec<u8>> {
    if n > MAX_BYTES {
        return Err(wasmtime::format_err!(
            "it requested {n} random bytes at once; the limit is {MAX_BYTES}"
        ));
    }
    let mut bytes = vec![0; n as usize];
    fill(&mut bytes);
    Ok(bytes)
}

fn number(fill: impl FnOnce(&mut [u8])) -> u64 {
    let mut bytes = [0; 8];
    fill(&mut bytes);
    u64::from_le_bytes(bytes)
}

impl HasData for SeededRandom {
    type Data<'a> = &'a mut Self;
}

impl random::Host for SeededRandom {
    fn get_random_bytes(&mut self, n: u64) -> wasmtime::Result<Vec<u8>> {
        bytes(n, |bytes| self.secure(bytes))
    }

    fn get_random_u64(&mut self) -> wasmtime::Result<u64> {
        Ok(number(|bytes| self.secure(bytes)))
    }
}

impl insecure::Host for SeededRandom {
    fn get_insecure_random_bytes(&mut self, n: u64) -> wasmtime::Result<Vec<u8>> {
        bytes(n, |bytes| self.insecure(bytes))
    }

    fn get_insecure_random_u64(&mut self) -> wasmtime::Result<u64> {
        Ok(number(|bytes| self.insecure(bytes)))
    }
}

impl insecure_seed::Host for SeededRandom {
    fn insecure_seed(&mut self) -> wasmtime::Result<(u64, u64)> {
        let mut seed = Stream::new("insecure-seed");
        let mut next = || number(|bytes| seed.fill(&self.plugin, self.event.as_ref(), bytes));
        Ok((next(), next()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(plugin: &str, event: &str) -> (Vec<u8>, u64, u64, (u64, u64)) {
        let mut random = SeededRandom::new(Name::parse(plugin).unwrap());
        random.begin(&Name::parse(event).unwrap());
        (
            random::Host::get_random_bytes(&mut random, 100).unwrap(),
            random::Host::get_random_u64(&mut random).unwrap(),
            insecure::Host::get_insecure_random_u64(&mut random).unwrap(),
            insecure_seed::Host::insecure_seed(&mut random).unwrap(),
        )
    }

    #[test]
    fn numbers_follow_from_plugin_and_event() {
        assert_eq!(drawn("a", "1"), drawn("a", "1"));
        let all = [drawn("a", "1"), drawn("a", "2"), drawn("b", "1")];
        for (n, one) in all.iter().enumerate() {
            for other in &all[n + 1..] {
                assert!(one.0 != other.0 && one.1 != other.1);
                assert!(one.2 != other.2 && one.3 != other.3);
            }
            assert!(one.1 != one.2 && one.3.0 != one.3.1);
        }
    }

    #[test]
    fn a_call_does_not_depend_on_those_before_it() {
        let mut random = SeededRandom::new(Name::parse("a").unwrap());
        let mut next = |event: &str| {
            random.begin(&Name::parse(event).unwrap());
            random::Host::get_random_bytes(&mut random, 7).unwrap()
        };
        let first = next("1");
        assert_ne!(next("2"), first);
        assert_eq!(next("1"), first);
        assert!(random::Host::get_random_bytes(&mut random, MAX_BYTES + 1).is_err());
    }
}
