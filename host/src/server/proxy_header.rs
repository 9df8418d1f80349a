//! The PROXY protocol, versions 1 and 2 (HAProxy, "The PROXY protocol"): the header with which a
//! proxy begins a connection, and the client that it names.
//!
//! Reads exactly the header and nothing after it. `client_addresses` decides which peers send one.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::{AsyncRead, AsyncReadExt as _};

/// The beginning of a header of version 2.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// The longest line of version 1.
const MAX_LINE: usize = 107;
/// The most bytes that follow the first 16 of version 2: addresses, and extensions such as the names
/// of certificates.
const MAX_REST: usize = 4096;

/// Reads the header. `None`: the proxy speaks for itself, as in its health checks, or for a client
/// without an IP address.
///
/// # Errors
/// The connection does not begin with a valid header, or ends within it.
pub(super) async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<SocketAddr>> {
    let mut start = [0; SIGNATURE.len()];
    stream.read_exact(&mut start).await?;
    if start == SIGNATURE {
        return read_binary(stream).await;
    }
    if !start.starts_with(b"PROXY ") {
        return Err(invalid("it does not begin with a PROXY header"));
    }
    let mut line = start.to_vec();
    while !line.ends_with(b"\r\n") {
        if line.len() == MAX_LINE {
            return Err(invalid("its PROXY header is too long"));
        }
        line.push(stream.read_u8().await?);
    }
    let line = std::str::from_utf8(&line[..line.len() - 2]).ok();
    let parsed = line.and_then(from_line);
    parsed.ok_or_else(|| invalid("its PROXY header cannot be read"))
}

fn invalid(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

/// Parses `PROXY TCP4 CLIENT SERVER CLIENT_PORT SERVER_PORT` without its line end.
fn from_line(line: &str) -> Option<Option<SocketAddr>> {
    let words: Vec<&str> = line.split(' ').collect();
    match *words.as_slice() {
        ["PROXY", "UNKNOWN", ..] => Some(None),
        ["PROXY", family @ ("TCP4" | "TCP6"), client, _, port, _] => {
            let client: IpAddr = client.parse().ok()?;
            let is_of_family = client.is_ipv4() == (family == "TCP4");
            let port = port.parse().ok()?;
            is_of_family.then_some(Some(SocketAddr::new(client, port)))
        }
        _ => None,
    }
}

/// Reads a header of version 2 after its signature.
async fn read_binary(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<SocketAddr>> {
    let mut head = [0; 4];
    stream.read_exact(&mut head).await?;
    let [command, family, length @ ..] = head;
    let length = usize::from(u16::from_be_bytes(length));
    if length > MAX_REST {
        return Err(invalid("its PROXY header is too long"));
    }
    let mut rest = vec![0; length];
    stream.read_exact(&mut rest).await?;
    match (command, family, rest.as_slice()) {
        // LOCAL, and PROXY for a family without IP addresses.
        (0x20, _, _) | (0x21, 0x00 | 0x31 | 0x32, _) => Ok(None),
        // TCP or UDP: both addresses, then both ports, and perhaps extensions.
        (0x21, 0x11 | 0x12, [a, b, c, d, _, _, _, _, high, low, _, _, ..]) => {
            let client = Ipv4Addr::new(*a, *b, *c, *d);
            Ok(Some(SocketAddr::from((
                client,
                u16::from_be_bytes([*high, *low]),
            ))))
        }
        (0x21, 0x21 | 0x22, rest) if rest.len() >= 36 => Ok(from_v6(&rest[..16], &rest[32..34])),
        _ => Err(invalid("its PROXY header cannot be read")),
    }
}

fn from_v6(client: &[u8], port: &[u8]) -> Option<SocketAddr> {
    let client: [u8; 16] = client.try_into().ok()?;
    let port: [u8; 2] = port.try_into().ok()?;
    Some(SocketAddr::from((
        Ipv6Addr::from(client),
        u16::from_be_bytes(port),
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn parse(bytes: &[u8]) -> io::Result<(Option<SocketAddr>, Vec<u8>)> {
        let mut rest = bytes;
        let client = read(&mut rest).await?;
        Ok((client, rest.to_vec()))
    }

    fn binary(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let length = u16::try_from(rest.len()).unwrap().to_be_bytes();
        [&SIGNATURE, &[command, family][..], &length, rest, b"GET /"].concat()
    }

    #[tokio::test]
    async fn the_client_of_either_version_is_read_and_nothing_after_the_header() {
        let v4 = [203, 0, 113, 7, 10, 0, 0, 1, 0x12, 0x67, 0, 80];
        let v6 = [
            &[0x20, 1, 0xd, 0xb8][..],
            &[0; 11],
            &[7],
            &[0; 16],
            &[0x12, 0x67, 0, 80],
        ]
        .concat();
        for (bytes, client) in [
            (
                b"PROXY TCP4 203.0.113.7 10.0.0.1 4711 80\r\nGET /".to_vec(),
                Some("203.0.113.7:4711"),
            ),
            (
                b"PROXY TCP6 2001:db8::7 ::1 4711 80\r\nGET /".to_vec(),
                Some("[2001:db8::7]:4711"),
            ),
            (b"PROXY UNKNOWN\r\nGET /".to_vec(), None),
            (b"PROXY UNKNOWN ff:: ff:: 1 2\r\nGET /".to_vec(), None),
            (binary(0x21, 0x11, &v4), Some("203.0.113.7:4711")),
            (
                binary(0x21, 0x11, &[&v4[..], &[4, 0, 1, 0]].concat()),
                Some("203.0.113.7:4711"),
            ),
            (binary(0x21, 0x21, &v6), Some("[2001:db8::7]:4711")),
            (
                binary(0x21, 0x21, &[&v6[..], &[4, 0, 1, 0]].concat()),
                Some("[2001:db8::7]:4711"),
            ),
            (binary(0x20, 0x00, &[]), None),
            (binary(0x20, 0x11, &v4), None),
            (binary(0x21, 0x31, &[0; 216]), None),
        ] {
            let client = client.map(|client| client.parse::<SocketAddr>().unwrap());
            let read = parse(&bytes).await.unwrap();
            assert_eq!(
                read,
                (client, b"GET /".to_vec()),
                "{}",
                bytes.escape_ascii()
            );
        }
    }

    #[tokio::test]
    async fn everything_else_is_refused_within_a_bounded_number_of_bytes() {
        let long = [b"PROXY UNKNOWN ".to_vec(), vec![b'x'; 10_000]].concat();
        for bytes in [
            b"GET /v1/stream HTTP/1.1\r\n\r\n".to_vec(),
            b"".to_vec(),
            b"PROXY TCP4".to_vec(),
            b"PROXY TCP4 203.0.113.7 10.0.0.1 4711\r\n".to_vec(),
            b"PROXY TCP4 2001:db8::7 ::1 4711 80\r\n".to_vec(),
            b"PROXY TCP4 203.0.113.7 10.0.0.1 70000 80\r\n".to_vec(),
            b"PROXY  TCP4 203.0.113.7 10.0.0.1 1 80\r\n".to_vec(),
            long,
            binary(0x11, 0x11, &[0; 12]),
            binary(0x21, 0x11, &[0; 11])[..27].to_vec(),
            binary(0x21, 0x21, &[0; 35]),
            [&SIGNATURE[..], &[0x21, 0x11, 0xff, 0xff]].concat(),
        ] {
            assert!(parse(&bytes).await.is_err(), "{}", bytes.escape_ascii());
        }
    }
}
