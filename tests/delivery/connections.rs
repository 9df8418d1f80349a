//! Connections at the edge of a node: how long they live, which client they belong to behind a proxy,
//! how fast they may come, and what the access log says about their requests.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};

use serde_json::json;
use socket2::{Domain, Socket, Type};

use crate::harness::eventually;
use crate::harness::node::{Node, SOON};
use crate::harness::publish::event;

/// A connection of one client.
struct Client(TcpStream);

impl Client {
    fn connect(node: &Node) -> Self {
        Self::connect_from(node, Ipv4Addr::LOCALHOST)
    }

    /// `from`: a loopback address.
    fn connect_from(node: &Node, from: Ipv4Addr) -> Self {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket
            .bind(&SocketAddr::from((from, 0)).into())
            .expect("bind");
        socket.connect(&node.addr().into()).expect("connect");
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(SOON)).expect("set a timeout");
        Self(stream)
    }

    fn send(&mut self, bytes: impl AsRef<[u8]>) {
        // The node may have closed it already, which the next read shows.
        drop(self.0.write_all(bytes.as_ref()));
    }

    /// Sends a request and returns its response, or what there is of it when the node closes.
    fn ask(&mut self, head: &str) -> String {
        self.send(format!("GET {head}\r\nHost: localhost\r\n\r\n"));
        self.answer()
    }

    /// One response, up to the first frame of a stream.
    fn answer(&mut self) -> String {
        let (mut answer, mut byte) = (String::new(), [0; 1]);
        let is_complete = |answer: &str| {
            let Some((head, body)) = answer.split_once("\r\n\r\n") else {
                return false;
            };
            let mut lines = head.lines();
            let length = lines.find_map(|line| line.strip_prefix("content-length: "));
            let length = length.map(|length| length.parse::<usize>().expect("a number"));
            length.map_or(body.contains("\n\n"), |length| body.len() >= length)
        };
        while !is_complete(&answer) {
            match self.0.read(&mut byte) {
                Ok(1) => answer.push(char::from(byte[0])),
                _ => break,
            }
        }
        answer
    }

    /// Reads to the end of the connection, which the node must close.
    fn is_closed(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.0.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

const READY: &str = "/v1/ready HTTP/1.1";

#[test]
fn a_connection_may_be_used_again_until_the_idle_timeout_that_its_responses_name() {
    let node = Node::builder()
        .config("[listen]\nheader_timeout = \"1s\"\nidle_timeout = \"10m\"")
        .start();
    let mut idle = Client::connect(&node);
    let answer = idle.ask(READY);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("keep-alive: timeout=600\r\n"), "{answer}");
    // One that sends nothing is closed after the time for a head, which is shorter: the first one has
    // been idle for longer than that now.
    assert!(Client::connect(&node).is_closed());
    let answer = idle.ask(READY);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    // Nor does a later head have more time than the first.
    idle.send("GET /v1/ready HTT");
    assert!(idle.is_closed());
    let mut last = Client::connect(&node);
    let answer = last.ask(&format!("{READY}\r\nConnection: close"));
    assert!(!answer.contains("keep-alive:"), "{answer}");
}

#[test]
fn a_connection_that_is_not_used_ends_after_the_idle_timeout() {
    let node = Node::builder()
        .config("[listen]\nheader_timeout = \"10m\"\nidle_timeout = \"1s\"")
        .start();
    let mut idle = Client::connect(&node);
    assert!(idle.ask(READY).contains("keep-alive: timeout=1\r\n"));
    assert!(idle.is_closed());
}

/// A header of the PROXY protocol, version 1.
fn line(client: &str) -> Vec<u8> {
    format!("PROXY TCP4 {client} 127.0.0.1 4711 80\r\n").into_bytes()
}

/// The same in version 2.
fn binary(client: [u8; 4]) -> Vec<u8> {
    let signature = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c";
    [&signature[..], &client, &[127, 0, 0, 1, 0x12, 0x67, 0, 80]].concat()
}

#[test]
fn a_proxy_header_names_the_client_of_a_connection_and_only_trusted_proxies_send_one() {
    let node = Node::builder()
        .config(
            "[listen]\ntrusted_proxies = [\"127.0.0.1\"]\nproxy_protocol = true\nmax_connections_per_address = 1\nheader_timeout = \"1s\"\n[log]\nfilter = \"info,pointsman::access=debug\"",
        )
        .start();
    let connect = |header: &[u8]| {
        let mut client = Client::connect(&node);
        client.send(header);
        client
    };
    let mut first = connect(&line("203.0.113.7"));
    assert!(first.ask(READY).starts_with("HTTP/1.1 200"));
    eventually(SOON, "the access log names the client", || {
        node.log().contains("client=203.0.113.7").then_some(())
    });
    // The second connection of the same client, by either version, is above its limit.
    for header in [line("203.0.113.7"), binary([203, 0, 113, 7])] {
        assert!(connect(&header).is_closed());
    }
    // Others are served, and so are the health checks of the proxy.
    let mut others = [
        connect(&line("203.0.113.8")),
        connect(&binary([203, 0, 113, 9])),
        connect(b"PROXY UNKNOWN\r\n"),
        connect(b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"),
    ];
    for other in &mut others {
        let answer = other.ask(READY);
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    assert!(first.ask(READY).starts_with("HTTP/1.1 200"));
    // Without a header, with a wrong one, and without any byte.
    let refused = "pointsman_connections_refused_total{reason=\"proxy_header\"}";
    assert_eq!(node.metric(refused), 0.0);
    for wrong in [
        &b"GET /v1/ready HTTP/1.1\r\nHost: localhost\r\n\r\n"[..],
        b"PROXY TCP4 x y 1 2\r\n",
        b"",
    ] {
        assert!(connect(wrong).is_closed());
    }
    assert_eq!(node.metric(refused), 3.0);
    // Any other peer has none, and what it claims is not believed.
    let stranger = Ipv4Addr::new(127, 0, 0, 2);
    assert!(
        Client::connect_from(&node, stranger)
            .ask(READY)
            .starts_with("HTTP/1.1 200")
    );
    let mut liar = Client::connect_from(&node, stranger);
    liar.send(line("203.0.113.10"));
    assert!(liar.answer().starts_with("HTTP/1.1 400"));
}

#[test]
fn a_client_address_that_connects_too_fast_is_asked_to_wait() {
    let node = Node::builder()
        .config("[listen]\ntrusted_proxies = [\"127.0.0.1\"]\nproxy_protocol = true\nconnection_rate_per_address = 1")
        .start();
    let connect = |client: &str| {
        let mut connection = Client::connect(&node);
        connection.send(line(client));
        connection
    };
    // More than a burst, as fast as the machine can.
    let refused = eventually(SOON, "a refusal", || {
        let mut connection = connect("203.0.113.7");
        let answer = connection.ask(READY);
        answer
            .starts_with("HTTP/1.1 429")
            .then_some((connection, answer))
    });
    let (mut connection, answer) = refused;
    assert!(
        answer.contains("retry-after: 1\r\n") && answer.contains("rate_limited"),
        "{answer}"
    );
    assert!(connection.is_closed());
    // A stream reports it in band, because an `EventSource` never reconnects after another status.
    eventually(SOON, "a stream is refused", || {
        let answer = connect("203.0.113.7").ask("/v1/stream?user=42 HTTP/1.1");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        answer.contains("{\"reason\":\"overloaded\"}").then_some(())
    });
    assert!(
        connect("203.0.113.8")
            .ask(READY)
            .starts_with("HTTP/1.1 200")
    );
}

#[test]
fn a_client_behind_a_trusted_proxy_that_sends_requests_too_fast_is_asked_to_wait() {
    let node = Node::builder()
        .config("[listen]\ntrusted_proxies = [\"127.0.0.1\"]\nconnection_rate_per_address = 1")
        .start();
    let mut proxy = Client::connect(&node);
    let mut ask =
        |client: &str| proxy.ask(&format!("{READY}\r\nX-Forwarded-For: 1.1.1.1, {client}"));
    eventually(SOON, "a refusal", || {
        let answer = ask("203.0.113.7");
        answer.starts_with("HTTP/1.1 429").then_some(())
    });
    // The connection of the proxy serves the others.
    assert!(ask("203.0.113.8").starts_with("HTTP/1.1 200"));
}

#[test]
fn a_publisher_above_its_rate_is_asked_to_wait_and_a_dry_run_is_not() {
    let config = "[limits]\npublish_rate = 1\n[listen]\nwebhook_origins = [\"*\"]";
    let node = Node::builder().config(config).start();
    let mut stream = node.stream("42");
    let of = |n: usize| event(&n.to_string(), "t", json!({ "user": "42" }));
    // A batch counts with each of its events, and is stored as a whole.
    let events: Vec<_> = (0..1_000).map(of).collect();
    node.publisher().publish(&events);
    let send = |path: &str| {
        let body = serde_json::to_vec(&of(1_000)).expect("JSON");
        let kind = ("content-type", "application/cloudevents+json");
        node.send("POST", path, &[kind], &body)
    };
    let answer = send("/v1/events");
    assert_eq!(
        (answer.status, &answer.json()["code"]),
        (429, &json!("rate_limited")),
        "{answer:?}"
    );
    let wait = answer
        .header("retry-after")
        .and_then(|wait| wait.parse::<u32>().ok());
    assert!(wait.is_some_and(|wait| wait > 60), "{answer:?}");
    assert!(answer.json()["fix"].is_string());
    assert_eq!(send("/v1/events?dry_run=true").status, 200);
    // A sender of webhooks is told the rate beforehand.
    let sender = ("webhook-request-origin", "events.example");
    let handshake = node.send("OPTIONS", "/v1/events", &[sender], b"");
    assert_eq!(
        handshake.header("webhook-allowed-rate"),
        Some("60"),
        "{handshake:?}"
    );
    assert_eq!(
        handshake.header("webhook-allowed-origin"),
        Some("events.example")
    );
    for n in 0..1_000 {
        assert_eq!(stream.next_notification(SOON).id, n.to_string());
    }
}

#[test]
fn the_access_log_has_a_line_for_each_request_and_no_secret() {
    let node = Node::builder()
        .config("[listen]\ntrusted_proxies = [\"127.0.0.1\"]\n[log]\nfilter = \"info,pointsman::access=debug\"")
        .start();
    let mut client = Client::connect(&node);
    let secrets =
        "X-Forwarded-For: 203.0.113.7\r\nAuthorization: Bearer secret-1\r\nCookie: token=secret-2";
    client.ask(&format!(
        "/v1/nothing/%0a?token=secret-3 HTTP/1.1\r\n{secrets}"
    ));
    client.ask(&format!(
        "/v1/stream?user=42&_=secret-4 HTTP/1.1\r\n{secrets}"
    ));
    let lines = eventually(SOON, "both requests are logged", || {
        let log = node.log();
        let lines: Vec<String> = log
            .lines()
            .filter(|line| {
                line.contains("pointsman::access") && line.contains("client=203.0.113.7")
            })
            .map(str::to_owned)
            .collect();
        (lines.len() == 2).then_some(lines)
    });
    let has = |line: &str, parts: &[&str]| parts.iter().all(|part| line.contains(part));
    assert!(
        has(
            &lines[0],
            &[
                "method=GET",
                "path=\"/v1/nothing/%0a\"",
                "status=404",
                "DEBUG"
            ]
        ),
        "{lines:?}"
    );
    assert!(
        has(
            &lines[1],
            &["path=\"/v1/stream\"", "status=200", "version=HTTP/1.1"]
        ),
        "{lines:?}"
    );
    assert!(!node.log().contains("secret"), "{}", node.log());
}
