//! Attacks by those who can reach a listener, hold a token or supply a plugin file: each is refused
//! with the reason, and the node serves the next request. `docs/security.md` lists them.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

use serde_json::{Value, json};

use crate::harness::command::{output_of, pointsman, said};
use crate::harness::eventually;
use crate::harness::node::{Folder, Node, SOON};
use crate::harness::plugins::Plugins;
use crate::harness::publish::event;
use crate::harness::sse::Request;

/// A configuration with as few plugins to compile at startup as possible.
const LEAN: &str = "[plugins.discard]\nenabled = false\n";

/// A section of a component: its id, its size and its content.
fn section(id: u8, content: &[u8]) -> Vec<u8> {
    let mut section = vec![id];
    let mut n = content.len();
    while n >= 0x80 {
        section.push(u8::try_from(n % 0x80).expect("seven bits") | 0x80);
        n /= 0x80;
    }
    section.push(u8::try_from(n).expect("seven bits"));
    section.extend_from_slice(content);
    section
}

fn component(sections: &[u8]) -> Vec<u8> {
    [b"\0asm\x0d\0\x01\0", sections].concat()
}

fn nested_components(depth: usize) -> Vec<u8> {
    (0..depth).fold(component(&[]), |inner, _| component(&section(4, &inner)))
}

/// A component type that contains a component type, and so on.
fn nested_types(depth: usize) -> Vec<u8> {
    let types = [&[1][..], &[0x41, 1, 1].repeat(depth), &[0x41, 0]].concat();
    component(&section(7, &types))
}

/// Both files take the validator time and memory that grow with the square of the depth, or its
/// stack. A refusal with these texts shows that neither it nor the compiler was called.
#[test]
fn a_plugin_file_of_nested_components_or_types_is_refused_before_it_is_compiled() {
    let node = Node::builder().config(LEAN).start();
    let folder = Folder::new();
    let deep = "nests components more than 32 levels deep";
    for (bytes, expect) in [
        (nested_components(500), deep),
        (nested_components(20_000), deep),
        (nested_types(200), "nests types more than 32 levels deep"),
        (nested_types(60_000), "nests types more than 32 levels deep"),
        (
            component(&section(4, &component(&[])).repeat(1_001)),
            "has more than 1000 components and modules",
        ),
    ] {
        let answer = node.order("PUT", "/v1/plugins/bomb?create=true", &[], &bytes);
        let error = answer.json()["error"].to_string();
        assert!(answer.status == 422 && error.contains(expect), "{answer:?}");
        let file = folder.path().join("bomb.wasm");
        fs::write(&file, &bytes).expect("write the plugin");
        let (_, output) = said(pointsman(&["plugin", "inspect"]).arg(&file));
        assert!(output.contains(expect), "{output}");
    }
}

/// The connection is kept, as a client that ignores `close` would.
#[test]
fn a_user_has_a_bounded_number_of_streams_on_a_node_and_other_users_are_unaffected() {
    let config = format!("{LEAN}[stream]\nmax_open_per_user = 2\n");
    let node = Node::builder().config(&config).start();
    let open = || {
        Request::new(node.addr(), "user=42")
            .open(SOON)
            .expect("200")
    };
    let first = node.stream("42");
    let _second = node.stream("42");
    let refused = open().next_state("close", SOON);
    assert_eq!(
        refused.data.as_deref(),
        Some(r#"{"reason":"too-many-streams"}"#)
    );
    let retry = refused.retry.expect("a reconnect delay");
    assert!((30_000..=90_000).contains(&retry), "{retry}");
    let name = "pointsman_streams_refused_total{reason=\"too-many-streams\"}";
    assert_eq!(node.metric(name), 1.0);
    node.stream("43");
    drop(first);
    eventually(SOON, "a stream of the user is free again", || {
        (open().next_frame(SOON).ok()?.state() == Some("cursor")).then_some(())
    });
}

#[test]
fn the_oldest_stream_of_a_user_ends_for_a_newer_one_where_that_is_configured() {
    let limits = "[stream]\nmax_open_per_user = 2\nat_user_limit = \"close-oldest\"\n";
    let node = Node::builder().config(&format!("{LEAN}{limits}")).start();
    let mut first = node.stream("42");
    let mut other = node.stream("43");
    let mut newer: Vec<_> = (0..2).map(|_| node.stream("42")).collect();
    let end = first.next_state("close", SOON);
    assert_eq!(
        end.data.as_deref(),
        Some(r#"{"reason":"too-many-streams"}"#)
    );
    let retry = end.retry.expect("a reconnect delay");
    assert!((30_000..=90_000).contains(&retry), "{retry}");
    assert_eq!(end.id.as_deref(), Some(first.last_event_id()));
    let name = "pointsman_streams_closed_total{reason=\"too-many-streams\"}";
    assert_eq!(node.metric(name), 1.0);
    node.publisher()
        .publish(&[event("a", "t", json!({ "users": "42,43" }))]);
    for stream in newer.iter_mut().chain([&mut other]) {
        assert_eq!(stream.next_notification(SOON).id, "a");
    }
}

/// Sends these bytes and reads the answer until the node closes the connection.
fn raw(addr: SocketAddr, request: &str) -> String {
    let mut socket = TcpStream::connect(addr).expect("connect");
    socket.set_read_timeout(Some(SOON)).expect("set a timeout");
    socket.write_all(request.as_bytes()).expect("write");
    let mut answer = Vec::new();
    // A reset also ends the answer.
    drop(socket.read_to_end(&mut answer));
    String::from_utf8_lossy(&answer).into_owned()
}

fn status(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap_or_default()
}

#[test]
fn in_dev_mode_pages_of_foreign_origins_change_nothing() {
    let node = Node::builder().config(LEAN).start();
    // A simple request, which a browser sends without a preflight.
    for path in [
        "/v1/dead-letters/0/1-0/redrive",
        "/v1/events",
        "/v1/acks?user=42",
    ] {
        for headers in [
            &[("origin", "https://evil.example")][..],
            &[("origin", "null")],
            &[("sec-fetch-site", "cross-site")],
        ] {
            let answer = node.send("POST", path, headers, b"");
            assert_eq!(answer.status, 403, "{path} {headers:?}: {answer:?}");
        }
        let own = node.send("POST", path, &[("origin", "http://localhost:5173")], b"");
        assert_ne!(own.status, 403, "{path}: {own:?}");
    }
}

/// DNS rebinding: the page's host name points to this node after the page was loaded.
#[test]
fn the_admin_listener_answers_under_known_host_names_only() {
    let config = format!(
        "[auth]\njwt_secret = \"{}\"\n[listen]\nadmin_hosts = [\"notify.internal\"]\n{LEAN}",
        "s".repeat(32)
    );
    let node = Node::builder().production().config(&config).start();
    let ask = |host: &str| {
        let head = "GET /v1/decisions HTTP/1.1\r\nConnection: close\r\n";
        raw(node.admin_addr(), &format!("{head}Host: {host}\r\n\r\n"))
    };
    for host in ["localhost:8081", "127.0.0.1", "[::1]:8081", "10.0.0.7:8081"] {
        assert_eq!(status(&ask(host)), "200", "{host}");
    }
    for host in ["notify.internal", "NOTIFY.internal.:8081"] {
        assert_eq!(status(&ask(host)), "200", "{host}");
    }
    for host in [
        "evil.example",
        "127.0.0.1.evil.example",
        "notify.internal.evil.example",
        "",
    ] {
        let answer = ask(host);
        assert_eq!(status(&answer), "403", "{host}: {answer}");
        assert!(answer.contains("listen.admin_hosts"), "{answer}");
    }
}

/// Two parsers that disagree about a request are what request smuggling needs.
#[test]
fn requests_that_can_be_read_in_two_ways_are_refused() {
    let node = Node::builder().config(LEAN).start();
    let put = "PUT /v1/users/42/attributes HTTP/1.1\r\nConnection: close\r\n";
    let chunked = "2\r\n{}\r\n0\r\n\r\n";
    for (headers, body, expect) in [
        ("Host: localhost\r\nContent-Length: 2", "{}", "204"),
        (
            "Host: localhost\r\nTransfer-Encoding: chunked",
            chunked,
            "204",
        ),
        ("Content-Length: 2", "{}", "400"),
        (
            "Host: localhost\r\nHost: localhost\r\nContent-Length: 2",
            "{}",
            "400",
        ),
        (
            "Host: localhost\r\nTransfer-Encoding: gzip, chunked",
            chunked,
            "400",
        ),
        (
            "Host: localhost\r\nTransfer-Encoding: chunked, chunked",
            chunked,
            "400",
        ),
        (
            "Host: localhost\r\nContent-Encoding: identity\r\nContent-Length: 2",
            "{}",
            "204",
        ),
        (
            "Host: localhost\r\nContent-Encoding: gzip\r\nContent-Length: 2",
            "{}",
            "415",
        ),
    ] {
        let answer = raw(node.addr(), &format!("{put}{headers}\r\n\r\n{body}"));
        assert_eq!(status(&answer), expect, "{headers}: {answer}");
        let accepts = answer
            .to_lowercase()
            .contains("\r\naccept-encoding: identity\r\n");
        assert_eq!(accepts, expect == "415", "{answer}");
    }
    let twice = br#"{"plan":"free","plan":"pro"}"#;
    let answer = node.send("PUT", "/v1/users/42/attributes", &[], twice);
    assert!(
        answer.status == 400 && answer.body.contains("'plan' appears twice"),
        "{answer:?}"
    );
}

#[test]
fn answers_about_users_are_kept_out_of_caches() {
    let node = Node::builder().config(LEAN).start();
    for (method, path) in [
        ("GET", "/v1/notifications?user=42"),
        ("GET", "/v1/users/42/attributes"),
        ("GET", "/v1/groups/ops/members/42"),
        ("POST", "/v1/acks?user=42"),
        ("GET", "/v1/dead-letters"),
        ("GET", "/v1/dead-letters/0/1-0"),
    ] {
        let answer = node.request(method, path);
        let kept = answer.header("cache-control");
        assert_eq!(kept, Some("private, no-store"), "{path}: {answer:?}");
    }
    for path in [
        "/v1/explain?event_id=a&user=42",
        "/v1/decisions",
        "/v1/events",
    ] {
        let answer = node.admin(path);
        let kept = answer.header("cache-control");
        assert_eq!(kept, Some("private, no-store"), "{path}: {answer:?}");
    }
}

/// Whether a terminal acts on a character of this text, line feeds excepted.
fn is_harmless(text: &str) -> bool {
    text.chars().all(|c| {
        c == '\n'
            || !(c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'))
    })
}

const HOSTILE: &str = "a\u{7f}b\u{9b}2Jc\u{202e}d";

#[test]
fn foreign_text_does_not_control_the_terminal_of_a_command() {
    let node = Node::builder().config(LEAN).start();
    let hostile = |id: &str, kind: &str| {
        let more = json!({ "user": "42", "subject": "a\u{202e}b", "data": HOSTILE });
        event(id, kind, more)
    };
    node.publisher()
        .publish(&[hostile("a\u{2066}1", "t\u{202e}x"), hostile("2", "t")]);
    node.await_outcomes(2, SOON);
    let (url, admin) = (node.url(""), node.admin_url(""));
    for arguments in [
        &[
            "tail", "--url", &url, "--user", "42", "--after", "earliest", "--count", "2",
        ][..],
        &["events", "export", "--url", &admin],
        &["explain", "--url", &admin, "--user", "42", "a\u{2066}1"],
        &[
            "explain",
            "--url",
            &admin,
            "--json",
            "--user",
            "42",
            "a\u{2066}1",
        ],
        &["dead-letters", "--url", &url, "show", "0/\u{202e}"],
    ] {
        let (_, output) = said(&mut pointsman(arguments));
        assert!(is_harmless(&output), "{arguments:?}: {output:?}");
    }
    // Still the same JSON.
    let output = output_of(&mut pointsman(&["events", "export", "--url", &admin]));
    let first: Value =
        serde_json::from_str(output.lines().next().expect("an event")).expect("JSON");
    assert_eq!(first["data"], HOSTILE);
}

#[test]
fn a_plugin_file_name_does_not_control_the_terminal_of_an_operator() {
    let plugins = Plugins::new(&[("x\u{202e}\u{9b}2J.wasm", b"no plugin".to_vec())]);
    let node = Node::builder()
        .plugins(plugins.dir())
        .may_be_unready()
        .start();
    let report = eventually(SOON, "readiness names the file", || {
        let report = node.admin("/readyz").body;
        report.contains("2J").then_some(report)
    });
    assert!(is_harmless(&report), "{report:?}");
    let log = node.log();
    assert!(log.contains("2J") && is_harmless(&log), "{log:?}");
    let mut check = pointsman(&["check-config", "--ephemeral", "--dev", "--plugins"]);
    let (_, output) = said(check.arg(plugins.dir()));
    assert!(output.contains("2J") && is_harmless(&output), "{output:?}");
}

#[test]
fn a_redis_url_that_serve_cannot_use_is_refused_by_check_config() {
    for url in [
        "redis://",
        "redis://127.0.0.1:99999",
        "redis://:secret@127.0.0.1/none",
        "redis://:secret@127.0.0.1:6379:1",
        "redis://%ff:secret@127.0.0.1",
        "redis://127.0.0.1?protocol=9",
    ] {
        let mut check = pointsman(&[
            "check-config",
            "--dev",
            "--allow-no-plugins",
            "--redis",
            url,
        ]);
        let status = check.status().expect("run it");
        let (_, output) = said(&mut check);
        assert_eq!(status.code(), Some(64), "{url}: {output}");
        assert!(
            output.contains("broker.redis") && !output.contains("secret"),
            "{url}: {output}"
        );
    }
    output_of(&mut pointsman(&[
        "check-config",
        "--dev",
        "--allow-no-plugins",
        "--redis",
        "redis://:secret@127.0.0.1:6379/1",
    ]));
}

#[test]
fn a_connection_without_a_stream_or_a_request_ends_and_one_with_a_stream_does_not() {
    let config = format!("{LEAN}[listen]\nidle_timeout = \"1s\"\n");
    let node = Node::builder().config(&config).start();
    let mut stream = node.stream("42");
    let connect = |first: &[u8]| {
        let mut socket = TcpStream::connect(node.addr()).expect("connect");
        socket.set_read_timeout(Some(SOON)).expect("set a timeout");
        socket.write_all(first).expect("write");
        socket
    };
    let mut http_1 = connect(b"GET /v1/openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n");
    // The preface, empty SETTINGS, and `GET /` on stream 1 with END_STREAM and END_HEADERS.
    let mut http_2 = connect(
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\
          \0\0\x0e\x01\x05\0\0\0\x01\x82\x86\x84\x01\x09localhost",
    );
    // To the end of the connection, which the node closes. A client that ignores the announced end
    // of an HTTP/2 connection and sends nothing is cut.
    for socket in [&mut http_1, &mut http_2] {
        let mut answer = Vec::new();
        socket
            .read_to_end(&mut answer)
            .expect("the end of the connection");
        assert!(!answer.is_empty());
    }
    node.publisher()
        .publish(&[event("a", "t", json!({ "user": "42" }))]);
    assert_eq!(stream.next_notification(SOON).id, "a");
}
