//! The bound of connections per client address, and the address of a client behind a proxy.
//!
//! A direct peer counts with its connections. A peer that may be a proxy carries the connections of
//! many clients and does not count: loopback addresses, those in `listen.trusted_proxies`, and while
//! that is empty, private addresses. Behind a trusted proxy a client counts with its requests and
//! streams in progress, by the address that the proxy has added to `X-Forwarded-For` or `Forwarded`.
//! In IPv6 one client may use a whole /64, which counts as one address. The same addresses have a
//! rate: of connections, or behind a trusted proxy of requests.
//!
//! A proxy that speaks the PROXY protocol names the client of the whole connection, which then counts
//! as a direct peer.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::http::HeaderMap;
use ipnet::IpNet;

use crate::rate::{Bucket, Rate};

/// A cheap handle: clones share the counts.
#[derive(Clone, Debug)]
pub struct ClientAddresses(Arc<AddressesInner>);

#[derive(Debug)]
struct AddressesInner {
    trusted: Vec<IpNet>,
    limits: AddressLimits,
    counts_loopback: bool,
    in_progress: Mutex<HashMap<IpAddr, usize>>,
    recent: Mutex<Recent>,
    /// The time of the last warning about a request without a client's address.
    warned: Mutex<Option<Instant>>,
}

/// One connection, request or stream of a client address, until it is dropped.
#[derive(Debug)]
pub struct AddressPermit {
    addresses: ClientAddresses,
    address: IpAddr,
}

/// The bounds of each client address.
#[derive(Clone, Copy, Debug)]
pub struct AddressLimits {
    /// Connections open, or requests in progress, at a time.
    pub max_in_progress: usize,
    /// Connections, or requests, per second.
    pub rate: Option<Rate>,
    /// Whether trusted proxies begin their connections with a PROXY header.
    pub proxy_protocol: bool,
}

/// A client address is at one of its bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressRefusal {
    TooMany,
    /// How long it has to wait.
    TooFast(Duration),
}

/// The rest of the rates of the addresses that came recently.
#[derive(Debug, Default)]
struct Recent {
    buckets: HashMap<IpAddr, Bucket>,
    /// The number at which those are removed that have waited for long enough.
    full: usize,
}

impl Recent {
    /// # Errors
    /// How long the address has to wait.
    fn take(&mut self, address: IpAddr, rate: Rate, now: Instant) -> Result<(), Duration> {
        if self.buckets.len() >= self.full {
            self.buckets.retain(|_, bucket| !bucket.is_full(now));
            self.full = 2 * self.buckets.len() + 1024;
        }
        let bucket = self.buckets.entry(address);
        let bucket = bucket.or_insert_with(|| Bucket::full(rate, now));
        match bucket.wait(now) {
            None => {
                bucket.take(1, now);
                Ok(())
            }
            Some(wait) => Err(wait),
        }
    }
}

impl Drop for AddressPermit {
    fn drop(&mut self) {
        let mut in_progress = self.addresses.in_progress();
        if let Some(n) = in_progress.get_mut(&self.address) {
            *n -= 1;
            if *n == 0 {
                in_progress.remove(&self.address);
            }
        }
    }
}

impl ClientAddresses {
    /// `trusted`: the proxies, as addresses or networks such as `10.0.0.0/8`.
    ///
    /// # Errors
    /// A message about the first text that is neither.
    pub fn new(trusted: &[String], limits: AddressLimits) -> Result<Self, String> {
        let parse = |text: &String| {
            let network = text.parse::<IpNet>();
            let network = network.or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
            network.map_err(|_| {
                format!(
                    "'{}' is neither an address nor a network; use one such as 10.0.0.7 or 10.0.0.0/8",
                    text.escape_debug()
                )
            })
        };
        let trusted = trusted.iter().map(parse).collect::<Result<_, _>>()?;
        Ok(Self(Arc::new(AddressesInner {
            trusted,
            limits,
            counts_loopback: false,
            in_progress: Mutex::default(),
            recent: Mutex::default(),
            warned: Mutex::default(),
        })))
    }

    /// Counts loopback addresses too: tests have no others.
    #[cfg(test)]
    pub(super) fn of_loopback(limits: AddressLimits) -> Self {
        Self(Arc::new(AddressesInner {
            trusted: Vec::new(),
            limits,
            counts_loopback: true,
            in_progress: Mutex::default(),
            recent: Mutex::default(),
            warned: Mutex::default(),
        }))
    }

    /// Counts a connection of this peer. `None`: the peer does not count.
    ///
    /// # Errors
    /// The peer has the maximum open, or has opened too many in a short time.
    pub fn connect(&self, peer: IpAddr) -> Result<Option<AddressPermit>, AddressRefusal> {
        let peer = peer.to_canonical();
        let is_proxy = (peer.is_loopback() && !self.0.counts_loopback)
            || self.trusts(peer)
            || (self.0.trusted.is_empty() && is_private(peer));
        if is_proxy {
            Ok(None)
        } else {
            self.count(peer).map(Some)
        }
    }

    /// Counts a request that a trusted proxy passes on for its client. `None`: the peer is not a
    /// trusted proxy, or does not name a client.
    ///
    /// # Errors
    /// The client has the maximum in progress, or has sent too many in a short time.
    pub fn begin(
        &self,
        peer: IpAddr,
        headers: &HeaderMap,
    ) -> Result<Option<AddressPermit>, AddressRefusal> {
        if !self.is_trusted_proxy(peer) {
            return Ok(None);
        }
        let client = self.client(headers);
        if client.is_none() && !self.0.limits.proxy_protocol {
            self.warn_of_unnamed_client(peer);
        }
        client.map(|client| self.count(client)).transpose()
    }

    /// Whether the peer is a configured proxy: its connections carry requests of many clients.
    pub fn is_trusted_proxy(&self, peer: IpAddr) -> bool {
        self.trusts(peer.to_canonical())
    }

    /// Whether this peer begins its connections with a PROXY header.
    pub fn sends_proxy_header(&self, peer: IpAddr) -> bool {
        self.0.limits.proxy_protocol && self.is_trusted_proxy(peer)
    }

    /// The address of the client that sent a request: the peer, or the client that a trusted proxy
    /// names.
    pub fn client_of(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        let named = self.is_trusted_proxy(peer).then(|| self.client(headers));
        named.flatten().unwrap_or(peer)
    }

    /// The client that the proxies name: read from the right, where the nearest proxy has added its
    /// peer, the first address that is not a trusted proxy. What is left of it may be forged.
    fn client(&self, headers: &HeaderMap) -> Option<IpAddr> {
        let lists = |name| {
            let values = headers.get_all(name).iter();
            let texts: Option<Vec<&str>> = values.map(|value| value.to_str().ok()).collect();
            texts.filter(|texts| !texts.is_empty())
        };
        let elements: Vec<IpAddr> = match (lists("x-forwarded-for"), lists("forwarded")) {
            (Some(lists), _) => rightmost(&lists, address),
            (None, Some(lists)) => rightmost(&lists, |element| {
                let parameters = element.split(';');
                let mut named = parameters.filter_map(|part| part.trim().split_once('='));
                let (_, node) = named.find(|(name, _)| name.eq_ignore_ascii_case("for"))?;
                address(node)
            }),
            (None, None) => Vec::new(),
        };
        elements.into_iter().find(|address| !self.trusts(*address))
    }

    /// At most once an hour: every request through such a proxy is one.
    fn warn_of_unnamed_client(&self, proxy: IpAddr) {
        let mut warned = self.0.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if warned.is_some_and(|at| at.elapsed() < Duration::from_secs(3_600)) {
            return;
        }
        *warned = Some(Instant::now());
        drop(warned);
        tracing::warn!(%proxy, "a trusted proxy names no client of a request, so that listen.max_connections_per_address does not bound its clients; let the proxy add the client's address to X-Forwarded-For");
    }

    fn trusts(&self, address: IpAddr) -> bool {
        self.0
            .trusted
            .iter()
            .any(|network| network.contains(&address))
    }

    fn count(&self, address: IpAddr) -> Result<AddressPermit, AddressRefusal> {
        let address = match address {
            IpAddr::V4(_) => address,
            IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << 64))),
        };
        let mut in_progress = self.in_progress();
        let n = in_progress.get(&address).copied().unwrap_or_default();
        if n >= self.0.limits.max_in_progress {
            return Err(AddressRefusal::TooMany);
        }
        if let Some(rate) = self.0.limits.rate {
            let mut recent = self.0.recent.lock().unwrap_or_else(PoisonError::into_inner);
            let taken = recent.take(address, rate, Instant::now());
            taken.map_err(AddressRefusal::TooFast)?;
        }
        in_progress.insert(address, n + 1);
        drop(in_progress);
        Ok(AddressPermit {
            addresses: self.clone(),
            address,
        })
    }

    fn in_progress(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.0
            .in_progress
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The elements of a list header from the right, up to the first that is not an address.
fn rightmost(lists: &[&str], parse: impl Fn(&str) -> Option<IpAddr>) -> Vec<IpAddr> {
    let elements = lists.iter().rev().flat_map(|list| list.rsplit(','));
    elements
        .map_while(|element| parse(element.trim()))
        .collect()
}

/// An address, in `Forwarded` also quoted, with or without a port: `1.2.3.4:80`, `"[2001:db8::1]:80"`.
fn address(text: &str) -> Option<IpAddr> {
    let text = text.trim().trim_matches('"');
    let bare = match text.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => match text.rsplit_once(':') {
            Some((host, _)) if !host.contains(':') => host,
            _ => text,
        },
    };
    bare.parse()
        .ok()
        .map(|address: IpAddr| address.to_canonical())
}

/// Whether the address is of a private network, where a proxy may be.
fn is_private(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let [a, b, ..] = v4.octets();
            // Shared address space, RFC 6598: some clouds and orchestrators use it inside.
            v4.is_private() || v4.is_link_local() || (a == 100 && (64..128).contains(&b))
        }
        IpAddr::V6(v6) => v6.is_unique_local() || v6.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderName, HeaderValue};

    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn addresses(trusted: &[&str], max: usize) -> ClientAddresses {
        let trusted: Vec<String> = trusted.iter().map(|text| (*text).to_owned()).collect();
        ClientAddresses::new(&trusted, limits(max)).unwrap()
    }

    fn limits(max_in_progress: usize) -> AddressLimits {
        AddressLimits {
            max_in_progress,
            rate: None,
            proxy_protocol: false,
        }
    }

    #[test]
    fn a_direct_peer_has_a_bounded_number_of_connections_and_a_possible_proxy_has_not() {
        let open = addresses(&[], 2);
        let held: Vec<_> = (0..2).map(|_| open.connect(ip("203.0.113.7"))).collect();
        assert!(held.iter().all(|held| matches!(held, Ok(Some(_)))));
        let mapped = open.connect(ip("::ffff:203.0.113.7"));
        assert!(matches!(mapped, Err(AddressRefusal::TooMany)));
        assert!(matches!(open.connect(ip("203.0.113.8")), Ok(Some(_))));
        drop(held);
        assert!(matches!(open.connect(ip("203.0.113.7")), Ok(Some(_))));
        let _first = open.connect(ip("2001:db8::1"));
        let _second = open.connect(ip("2001:db8::2"));
        let third = open.connect(ip("2001:db8::3"));
        assert!(matches!(third, Err(AddressRefusal::TooMany)));
        for proxy in ["127.0.0.1", "::1", "10.1.2.3", "100.64.0.1", "fd00::1"] {
            assert!(matches!(open.connect(ip(proxy)), Ok(None)), "{proxy}");
        }
        // Which peers are proxies is known here.
        let known = addresses(&["10.0.0.0/24"], 2);
        assert!(matches!(known.connect(ip("10.0.0.9")), Ok(None)));
        assert!(matches!(known.connect(ip("10.0.1.9")), Ok(Some(_))));
    }

    #[test]
    fn the_client_is_the_first_address_from_the_right_that_is_not_a_trusted_proxy() {
        let known = addresses(&["10.0.0.0/8", "2001:db8:1::1"], 2);
        for (name, values, expect) in [
            ("x-forwarded-for", &["203.0.113.7"][..], Some("203.0.113.7")),
            (
                "x-forwarded-for",
                &["1.1.1.1, 203.0.113.7, 10.0.0.1"],
                Some("203.0.113.7"),
            ),
            (
                "x-forwarded-for",
                &["1.1.1.1", "203.0.113.7:4711"],
                Some("203.0.113.7"),
            ),
            ("x-forwarded-for", &["1.1.1.1, unknown, 10.0.0.1"], None),
            ("x-forwarded-for", &["10.0.0.2"], None),
            (
                "forwarded",
                &["for=1.1.1.1, for=203.0.113.7;proto=https;by=10.0.0.1"],
                Some("203.0.113.7"),
            ),
            (
                "forwarded",
                &["proto=https;For=\"[2001:db8:2::7]:4711\""],
                Some("2001:db8:2::7"),
            ),
            ("forwarded", &["for=_hidden"], None),
            ("x-real-ip", &["203.0.113.7"], None),
        ] {
            let mut headers = HeaderMap::new();
            for value in values {
                let name = HeaderName::from_static(name);
                headers.append(name, HeaderValue::from_static(value));
            }
            let found = known.client(&headers);
            assert_eq!(found, expect.map(ip), "{name}: {values:?}");
            // Only a trusted proxy is believed.
            assert!(matches!(known.begin(ip("203.0.113.9"), &headers), Ok(None)));
            let begun = known.begin(ip("10.9.9.9"), &headers);
            assert_eq!(begun.unwrap().is_some(), expect.is_some());
        }
    }

    #[test]
    fn an_address_that_comes_too_fast_waits_and_the_memory_of_others_is_bounded() {
        let mut recent = Recent::default();
        let (rate, now) = (Rate::new(1).unwrap(), Instant::now());
        for _ in 0..10 {
            recent.take(ip("203.0.113.7"), rate, now).unwrap();
        }
        let wait = recent.take(ip("203.0.113.7"), rate, now).unwrap_err();
        assert_eq!(wait, Duration::from_secs(1));
        recent.take(ip("203.0.113.8"), rate, now).unwrap();
        for n in 0..100_000_u32 {
            let later = now + Duration::from_millis(u64::from(n));
            recent.take(IpAddr::V4(n.into()), rate, later).unwrap();
        }
        assert!(
            recent.buckets.len() < 10_000,
            "{} addresses",
            recent.buckets.len()
        );
    }

    #[test]
    fn a_text_that_is_neither_address_nor_network_is_refused() {
        for wrong in ["", "10.0.0.0/33", "proxy.internal"] {
            let refused = ClientAddresses::new(&[wrong.to_owned()], limits(1)).unwrap_err();
            assert!(refused.contains("use one such as"), "{refused}");
        }
    }
}
