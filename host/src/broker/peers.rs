//! The nodes of an installation: each registers its address with the broker, so that a node that
//! loses the broker can ask the others whether they have it.

use std::fmt;
use std::net::{Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How long a registration lasts without a repetition, by the broker's clock.
pub const REGISTERED_FOR: Duration = Duration::from_secs(10);
/// The most nodes that a registration returns.
pub const MAX_PEERS: usize = 64;

/// The host and port of a node's public listener. Checked, so that it names nothing else in a URL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeAddress(String);

/// Where other nodes reach this one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Advertised {
    Address(NodeAddress),
    /// At this port, and at the address from which this node reaches the broker.
    Port(u16),
}

/// Another node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub name: String,
    pub address: NodeAddress,
}

impl FromStr for NodeAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_port = |port: &str| {
            port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|n| n > 0)
        };
        match text.rsplit_once(':') {
            Some((host, port)) if is_host(host) && is_port(port) => Ok(Self(text.to_owned())),
            _ => Err(format!(
                "'{}' is not a host and a port; write host:port, such as notify-1.internal:8080",
                text.escape_debug()
            )),
        }
    }
}

fn is_host(host: &str) -> bool {
    if let Some(address) = host.strip_prefix('[') {
        return address
            .strip_suffix(']')
            .is_some_and(|address| address.parse::<Ipv6Addr>().is_ok());
    }
    let is_of_name = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    (1..=253).contains(&host.len()) && host.bytes().all(is_of_name)
}

impl TryFrom<String> for NodeAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<NodeAddress> for String {
    fn from(address: NodeAddress) -> Self {
        address.0
    }
}

impl From<SocketAddr> for NodeAddress {
    fn from(address: SocketAddr) -> Self {
        Self(address.to_string())
    }
}

impl fmt::Display for NodeAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Advertised {
    /// `configured` if it is set, otherwise the address that listens.
    pub fn new(configured: Option<NodeAddress>, listens: SocketAddr) -> Self {
        match configured {
            Some(address) => Self::Address(address),
            // It accepts connections at every address of the machine and names none.
            None if listens.ip().is_unspecified() => Self::Port(listens.port()),
            None => Self::Address(listens.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_address_is_a_host_and_a_port_and_nothing_else() {
        for good in ["notify-1.internal:8080", "127.0.0.1:1", "[::1]:65535"] {
            assert_eq!(good.parse::<NodeAddress>().unwrap().to_string(), good);
        }
        for bad in [
            "",
            ":80",
            "host",
            "host:",
            "host:0",
            "host:65536",
            "host:+80",
            "http://host:80",
            "user@host:80",
            "host/path?:80",
            "::1:80",
            "[::1:80",
            "[evil]:80",
            "a b:80",
            "a\n:80",
        ] {
            assert!(bad.parse::<NodeAddress>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_node_that_listens_everywhere_advertises_the_address_that_reaches_the_broker() {
        let advertised = |listens: &str| Advertised::new(None, listens.parse().unwrap());
        assert_eq!(advertised("0.0.0.0:80"), Advertised::Port(80));
        assert_eq!(advertised("[::]:80"), Advertised::Port(80));
        let address = |text: &str| Advertised::Address(text.parse().unwrap());
        assert_eq!(advertised("10.0.0.7:80"), address("10.0.0.7:80"));
        let configured = Some("notify-1:8080".parse().unwrap());
        assert_eq!(
            Advertised::new(configured, "0.0.0.0:80".parse().unwrap()),
            address("notify-1:8080")
        );
    }
}
