//! The nodes that use this Redis.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use redis::ConnectionAddr;
use tokio::net::{UdpSocket, lookup_host};

use super::command_connection::write_refusal;
use super::{Redis, scripts};
use crate::broker::{Advertised, Error, MAX_PEERS, NodeAddress, Peer, REGISTERED_FOR, Result};
use crate::duration::millis;

/// See [`crate::broker::Operations::register_node`].
pub(super) async fn register(redis: &Redis, name: &str, at: &Advertised) -> Result<Vec<Peer>> {
    let address = match at {
        Advertised::Address(address) => address.clone(),
        Advertised::Port(port) => SocketAddr::new(redis.local_ip, *port).into(),
    };
    let call = redis.connection.eval(&scripts::NODES, |command| {
        command
            .arg(1)
            .arg(redis.prefix.nodes())
            .arg(name)
            .arg(address.to_string())
            .arg(millis(REGISTERED_FOR))
            .arg(MAX_PEERS);
    });
    let found: Vec<Vec<u8>> = match call.await {
        // Redis answers, and no node can register.
        Err(error) if write_refusal(&error).is_some() => return Ok(Vec::new()),
        answer => answer?,
    };
    // What Pointsman did not write is skipped.
    let text = |bytes: &[u8]| std::str::from_utf8(bytes).ok().map(str::to_owned);
    let peers = found.chunks_exact(2).filter_map(|pair| {
        Some(Peer {
            name: text(&pair[0])?,
            address: text(&pair[1])?.parse::<NodeAddress>().ok()?,
        })
    });
    Ok(peers.collect())
}

/// The address from which this machine reaches Redis. Sends nothing.
pub(super) async fn local_ip(redis: &ConnectionAddr) -> Result<IpAddr> {
    let ConnectionAddr::Tcp(host, port) = redis else {
        // On a Unix socket, all nodes are on this machine.
        return Ok(Ipv4Addr::LOCALHOST.into());
    };
    let found = async {
        let mut addresses = lookup_host((host.as_str(), *port)).await?;
        let remote = addresses
            .next()
            .ok_or_else(|| std::io::Error::other("the name has no address"))?;
        let any: IpAddr = match remote {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0)).await?;
        socket.connect(remote).await?;
        socket.local_addr()
    };
    found
        .await
        .map(|local| local.ip())
        .map_err(|error: std::io::Error| Error::Unavailable(error.to_string()))
}
