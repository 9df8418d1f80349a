//! One-time tickets: a page that can send neither a header nor a cookie opens its stream with one.

use std::sync::atomic::{AtomicUsize, Ordering};

use ring::hmac;
use serde_json::{Value, json};

use super::authorization::{in_s, signed};
use crate::harness::http::{self, Answer};
use crate::harness::node::{Node, SOON};
use crate::harness::publish::event;
use crate::harness::redis::RedisServer;
use crate::harness::sse::{OpenError, Request, Stream};

const SECRET: &str = "the secret of these tests, longer than 32 bytes";
const KEY: &str = "the key of these tests";

fn node(server: &RedisServer) -> Node {
    let config = format!(
        "[auth]\njwt_secret = \"{SECRET}\"\napi_key = \"{KEY}\"\nleeway = \"0s\"\ncookie = \"pointsman\"\n[plugins.discard]\nenabled = false"
    );
    let node = Node::builder().production().redis(server.url());
    node.config(&config).start()
}

fn token(claims: &Value) -> String {
    signed("HS256", hmac::HMAC_SHA256, SECRET, claims)
}

fn request(node: &Node, headers: &[(&str, &str)]) -> Answer {
    http::send("POST", &node.url("/v1/tickets"), headers, Some(b"")).expect("an answer")
}

fn ticket(node: &Node, token: &str) -> String {
    let answer = request(node, &[("authorization", &format!("Bearer {token}"))]);
    assert_eq!(answer.status, 201, "{answer:?}");
    assert_eq!(answer.header("cache-control"), Some("private, no-store"));
    assert_eq!(answer.json()["expires_in"], 30);
    let ticket = answer.json()["ticket"].as_str().expect("a text").to_owned();
    assert!(
        ticket
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
    );
    ticket
}

fn open(node: &Node, ticket: &str, more: &str) -> Result<Stream, OpenError> {
    Request::new(node.addr(), &format!("ticket={ticket}{more}")).open(SOON)
}

#[test]
fn a_ticket_opens_one_stream_of_its_user_on_any_node() {
    let server = RedisServer::start();
    let (one, two) = (node(&server), node(&server));
    let ann = token(&json!({ "sub": "ann", "exp": in_s(3_600), "groups": ["ops"] }));
    let first = ticket(&one, &ann);
    // The value in Redis opens nothing.
    let stored: Vec<String> = server.command("KEYS pointsman:ticket:*");
    let [key] = stored.as_slice() else {
        panic!("one ticket: {stored:?}")
    };
    let content: Vec<u8> = server.command(&format!("GET {key}"));
    let content = String::from_utf8_lossy(&content).into_owned();
    let claims = ann.split('.').nth(1).expect("claims");
    assert!(
        !key.contains(&first) && !content.contains(claims),
        "{key} {content}"
    );
    let ttl: i64 = server.command(&format!("PTTL {key}"));
    assert!((1..=30_000).contains(&ttl), "{ttl}");
    let id = key.rsplit_once(':').expect("an id").1;
    assert_eq!(open(&two, id, "").expect_err("an id").status, Some(401));

    // It identifies as the token does, whatever the URL names besides.
    let mut stream = open(&two, &first, "&user=bob&last_event_id=earliest").expect("200");
    let bearer = format!("Bearer {KEY}");
    let headers = [
        ("authorization", bearer.as_str()),
        ("content-type", "application/cloudevents+json"),
    ];
    for (id, to) in [
        ("b", json!({ "user": "bob" })),
        ("a", json!({ "user": "ann" })),
        ("g", json!({ "group": "ops" })),
    ] {
        let body = event(id, "t", to).to_string();
        let answer = one.send("POST", "/v1/events", &headers, body.as_bytes());
        assert_eq!(answer.status, 202, "{answer:?}");
    }
    assert_eq!(stream.next_notification(SOON).id, "a");
    assert_eq!(stream.next_notification(SOON).id, "g");

    // Once, also of several that race for it.
    for node in [&one, &two] {
        let refused = open(node, &first, "").expect_err("a used ticket");
        assert_eq!(refused.status, Some(401), "{refused:?}");
        assert!(refused.text.contains("POST /v1/tickets"), "{refused:?}");
    }
    let raced = ticket(&two, &ann);
    let opened = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for node in [&one, &two, &one, &two] {
            let (raced, opened) = (&raced, &opened);
            scope.spawn(move || match open(node, raced, "") {
                Ok(_) => {
                    opened.fetch_add(1, Ordering::SeqCst);
                }
                Err(refused) => assert_eq!(refused.status, Some(401), "{refused:?}"),
            });
        }
    });
    assert_eq!(opened.into_inner(), 1);

    // It opens a stream and nothing else.
    let other = ticket(&one, &ann);
    for (method, path) in [("GET", "/v1/notifications"), ("POST", "/v1/tickets")] {
        let url = one.url(&format!("{path}?ticket={other}"));
        let answer = http::send(method, &url, &[], None).expect("an answer");
        assert!((400..=401).contains(&answer.status), "{answer:?}");
    }
    let as_token = Request::new(one.addr(), "")
        .header("Authorization", &format!("Bearer {other}"))
        .open(SOON);
    assert_eq!(as_token.expect_err("no token").status, Some(401));
    for log in [one.log(), two.log()] {
        let secrets = [&first, &raced, &other, &ann];
        assert!(!secrets.iter().any(|secret| log.contains(*secret)), "{log}");
    }
}

#[test]
fn a_ticket_needs_a_valid_token_and_lives_no_longer() {
    let server = RedisServer::start();
    let node = node(&server);
    let expires = in_s(5);
    let brief = token(&json!({ "sub": "ann", "exp": expires }));
    let issued = ticket(&node, &brief);
    for headers in [
        &[][..],
        &[("authorization", "Bearer x")],
        &[("authorization", &format!("Bearer {KEY}"))],
        &[(
            "authorization",
            &format!(
                "Bearer {}",
                token(&json!({ "sub": "ann", "exp": in_s(-60) }))
            ),
        )],
    ] {
        let answer = request(&node, headers);
        assert_eq!(answer.status, 401, "{headers:?}: {answer:?}");
    }
    let cookie = format!(
        "pointsman={}",
        token(&json!({ "sub": "ann", "exp": in_s(60) }))
    );
    assert_eq!(request(&node, &[("cookie", &cookie)]).status, 201);
    let other = "another secret, which is longer than 32 bytes";
    let claims = json!({ "sub": "ann", "exp": in_s(60) });
    let forged = format!(
        "Bearer {}",
        signed("HS256", hmac::HMAC_SHA256, other, &claims)
    );
    assert_eq!(request(&node, &[("authorization", &forged)]).status, 401);
    // The token behind the ticket is checked when it is used: the stream is that of the token, which
    // has expired or expires at once.
    let (frames, _) = open(&node, &issued, "").expect("200").read_to_end(SOON);
    let close = frames.last().expect("a close");
    assert_eq!(
        (close.state(), close.data.as_deref()),
        (Some("close"), Some("{\"reason\":\"token-expired\"}"))
    );
    assert!(in_s(0) >= expires);
}

#[test]
fn a_node_in_dev_mode_issues_tickets_for_the_user_in_the_url() {
    let node = Node::builder().start();
    let answer = node.send("POST", "/v1/tickets?user=ann", &[], b"");
    assert_eq!(answer.status, 201, "{answer:?}");
    let issued = answer.json()["ticket"].as_str().expect("a text").to_owned();
    let mut stream = open(&node, &issued, "").expect("200");
    stream.next_state("cursor", SOON);
    node.publisher()
        .publish(&[event("a", "t", json!({ "user": "ann" }))]);
    assert_eq!(stream.next_notification(SOON).id, "a");
    assert_eq!(
        open(&node, &issued, "").expect_err("used").status,
        Some(401)
    );
    assert_eq!(
        open(&node, "x", "").expect_err("no ticket").status,
        Some(401)
    );
}
