//! Who may see what: a stream is its token's user's and nobody else's, for as long as the token holds, and membership ends with leaving.

use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};

use crate::harness::eventually;
use crate::harness::http;
use crate::harness::node::{Node, SOON};
use crate::harness::ports;
use crate::harness::publish::event;
use crate::harness::sse::{Request, Stop, Stream};

const SECRET: &str = "the secret of these tests, longer than 32 bytes";
/// As little to compile at the start as there can be.
const LEAN: &str = "[plugins.discard]\nenabled = false";
const KEY: &str = "the key of these tests";

/// A node that asks for tokens and keys. Clocks need no leeway on one machine.
fn node() -> Node {
    let config = format!("[auth]\njwt_secret = \"{SECRET}\"\nkey = \"{KEY}\"\nleeway_s = 0\ncookie = \"pointsman\"\n{LEAN}");
    Node::builder().production().config(&config).start()
}

/// A moment so many seconds from now, as tokens tell time.
fn in_s(seconds: i64) -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    i64::try_from(now).expect("before the year 292277026596") + seconds
}

fn signed(algorithm: Algorithm, secret: &str, claims: &Value) -> String {
    jsonwebtoken::encode(&Header::new(algorithm), claims, &EncodingKey::from_secret(secret.as_bytes())).expect("a token")
}

fn token(user: &str, expires: i64) -> String {
    signed(Algorithm::HS256, SECRET, &json!({ "sub": user, "exp": expires }))
}

/// A stream with this token, past its first cursor.
fn stream(node: &Node, token: &str, query: &str, last_event_id: &str) -> Stream {
    let request = Request::new(node.addr(), query).header("Authorization", &format!("Bearer {token}")).last_event_id(last_event_id);
    let mut stream = request.open(SOON).unwrap_or_else(|refused| panic!("{refused:?}"));
    stream.next_state("cursor", SOON);
    stream
}

fn publish(node: &Node, id: &str, more: Value) {
    let bearer = format!("Bearer {KEY}");
    let headers = [("authorization", bearer.as_str()), ("content-type", "application/cloudevents+json")];
    let answer = node.send("POST", "/v1/events", &headers, event(id, "t", more).to_string().as_bytes());
    assert_eq!(answer.status, 202, "{answer:?}");
}

fn member(node: &Node, method: &str, group: &str, user: &str) {
    let answer = node.send(method, &format!("/v1/groups/{group}/members/{user}"), &[("authorization", &format!("Bearer {KEY}"))], b"");
    assert_eq!(answer.status, 204, "{answer:?}");
}

#[test]
fn nobody_reads_or_publishes_without_a_token_or_key_that_holds() {
    let node = node();
    let later = in_s(3_600);
    let honest = token("ann", later);
    let (rest, signature) = honest.rsplit_once('.').expect("a signature");
    let (head, _) = rest.split_once('.').expect("claims");
    let others = token("bob", later);
    let others_claims = others.split('.').nth(1).expect("claims");
    // {"alg":"none","typ":"JWT"}
    let unsigned = format!("eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{others_claims}.");
    let bad = [
        ("expired", token("ann", in_s(-60))),
        ("signature", signed(Algorithm::HS256, "another secret, which is longer than 32 bytes", &json!({ "sub": "ann", "exp": later }))),
        ("signature", format!("{head}.{others_claims}.{signature}")),
        ("HS256", signed(Algorithm::HS512, SECRET, &json!({ "sub": "ann", "exp": later }))),
        ("token", unsigned),
        ("no claim 'exp'", signed(Algorithm::HS256, SECRET, &json!({ "sub": "ann" }))),
        ("no text claim 'sub'", signed(Algorithm::HS256, SECRET, &json!({ "exp": later }))),
        ("control character", token("ann\nbob", later)),
        ("token", KEY.to_owned()),
        ("token", String::new()),
        ("token", "a.b.c".to_owned()),
    ];
    for path in ["/v1/stream?user=ann", "/v1/notifications?user=ann", "/v1/stream"] {
        let answer = node.request("GET", path);
        assert_eq!((answer.status, answer.header("www-authenticate")), (401, Some("Bearer")), "{path}: {answer:?}");
        for (expected, token) in &bad {
            let answer = http::send("GET", &node.url(path), &[("authorization", &format!("Bearer {token}"))], None).expect("an answer");
            assert_eq!(answer.status, 401, "{path} with a token of which {expected:?} is to be said: {answer:?}");
            assert!(answer.header("www-authenticate").is_some_and(|challenge| challenge.starts_with("Bearer")), "{answer:?}");
            let error = answer.json()["error"].as_str().expect("an error").to_owned();
            assert!(error.contains(expected), "{expected:?} is not in {error:?}");
            assert!(token.is_empty() || !error.contains(token.as_str()), "a token is nobody else's to read: {error}");
        }
    }
    // A user's token is no key, and the key no user.
    for (method, path) in [
        ("POST", "/v1/events"),
        ("PUT", "/v1/groups/ops/members/ann"),
        ("DELETE", "/v1/groups/ops/members/ann"),
        ("GET", "/v1/groups/ops/members/ann"),
        ("PUT", "/v1/users/ann/attributes"),
        ("GET", "/v1/dead"),
    ] {
        for authorization in [None, Some(format!("Bearer {honest}"))] {
            let headers: Vec<(&str, &str)> = authorization.iter().map(|value| ("authorization", value.as_str())).collect();
            let answer = node.send(method, path, &headers, b"{}");
            assert_eq!(answer.status, 401, "{method} {path}: {answer:?}");
            assert!(answer.header("www-authenticate").is_some(), "{answer:?}");
        }
    }
    let log = node.log();
    assert!(![SECRET, KEY, signature].iter().any(|secret| log.contains(secret)), "{log}");
}

#[test]
fn a_stream_has_its_tokens_users_events_only_whatever_the_url_and_the_cursor_say() {
    let node = node();
    let (later, mut others_cursor) = (in_s(3_600), String::new());
    let mut bob = stream(&node, &token("bob", later), "", "");
    for id in ["b1", "b2"] {
        publish(&node, id, json!({ "user": "bob" }));
        others_cursor = bob.next_notification(SOON).cursor;
    }
    // Ann says that she is Bob: in the URL, and by his cursor, as a browser does after another one logged in.
    let mut ann = stream(&node, &token("ann", later), "user=bob", "");
    let mut with_his_cursor = stream(&node, &token("ann", later), "user=bob&last_event_id=earliest", &others_cursor);
    let mut from_the_beginning = stream(&node, &token("ann", later), "user=bob&last_event_id=earliest", "");
    publish(&node, "b3", json!({ "user": "bob" }));
    publish(&node, "a1", json!({ "user": "ann" }));
    for stream in [&mut ann, &mut with_his_cursor, &mut from_the_beginning] {
        assert_eq!(stream.next_notification(SOON).id, "a1");
        assert!(!stream.text().contains("\"b"), "{stream:?}");
    }
    assert_eq!(bob.next_notification(SOON).id, "b3");
    let bearer = format!("Bearer {}", token("ann", later));
    let page = http::send("GET", &node.url("/v1/notifications?user=bob"), &[("authorization", &bearer)], None).expect("an answer").json();
    let ids: Vec<&Value> = page["notifications"].as_array().expect("a list").iter().map(|item| &item["data"]["id"]).collect();
    assert_eq!(ids, ["a1"]);
    // A browser's `EventSource` has only a cookie to show.
    let cookie = format!("a=b; pointsman={}", token("bob", later));
    let mut by_cookie = Request::new(node.addr(), "user=ann&last_event_id=earliest").header("Cookie", &cookie).open(SOON).expect("200");
    assert_eq!(by_cookie.next_notification(SOON).id, "b1");
}

#[test]
fn a_stream_ends_with_its_token_and_says_why() {
    let node = node();
    let expires = in_s(3);
    let mut brief = stream(&node, &token("ann", expires), "", "");
    let mut long = stream(&node, &token("ann", in_s(3_600)), "", "");
    publish(&node, "a", json!({ "user": "ann" }));
    assert_eq!(brief.next_notification(SOON).id, "a");
    let (frames, stop) = brief.read_to_end(SOON);
    assert!(matches!(stop, Stop::Ended), "{stop:?}");
    assert!(in_s(0) >= expires, "it ended {} s too early", expires - in_s(0));
    let close = frames.last().expect("a last frame");
    assert_eq!((close.state(), close.data.as_deref()), (Some("close"), Some("{\"reason\":\"token-expired\"}")));
    assert!(close.retry.is_some() && close.id.is_some(), "with the cursor to come back with: {close:?}");
    // With the old token there is no way back, and with a new one nothing is missing.
    let back = Request::new(node.addr(), "").header("Authorization", &format!("Bearer {}", token("ann", expires)));
    eventually(SOON, "the old token is refused", || (back.clone().open(SOON).err()?.status == Some(401)).then_some(()));
    publish(&node, "b", json!({ "user": "ann" }));
    let mut again = stream(&node, &token("ann", in_s(3_600)), "", brief.last_event_id());
    assert_eq!(again.next_notification(SOON).id, "b");
    assert_eq!((long.next_notification(SOON).id, long.next_notification(SOON).id), ("a".to_owned(), "b".to_owned()));
}

#[test]
fn who_left_a_group_sees_nothing_of_it_that_came_later_live_or_in_history() {
    let node = node();
    let ann = token("ann", in_s(3_600));
    let mut live = stream(&node, &ann, "", "");
    publish(&node, "too early", json!({ "group": "ops" }));
    // Whoever joins before an event is decided is among those whom it is for: so it is decided first.
    publish(&node, "witness", json!({ "user": "ann" }));
    assert_eq!(live.next_notification(SOON).id, "witness");
    member(&node, "PUT", "ops", "ann");
    publish(&node, "in", json!({ "group": "ops" }));
    assert_eq!(live.next_notification(SOON).id, "in");
    member(&node, "DELETE", "ops", "ann");
    publish(&node, "too late", json!({ "group": "ops" }));
    publish(&node, "hers", json!({ "user": "ann" }));
    assert_eq!(live.next_notification(SOON).id, "hers");
    let mut history = stream(&node, &ann, "last_event_id=earliest", "");
    assert_eq!(history.next_notification(SOON).id, "witness");
    assert_eq!(history.next_notification(SOON).id, "in");
    assert_eq!(history.next_notification(SOON).id, "hers");
}

#[test]
fn dev_mode_refuses_to_listen_off_loopback_with_one_line_and_exit_code_64() {
    let (one, other) = (ports::free(), ports::free());
    let everywhere = |port: u16| format!("0.0.0.0:{port}");
    for (listen, admin) in [
        (everywhere(one.port()), other.to_string()),
        (one.to_string(), everywhere(other.port())),
        (format!("[::]:{}", one.port()), other.to_string()),
        (format!("192.0.2.1:{}", one.port()), other.to_string()),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pointsman"));
        command.args(["serve", "--ephemeral", "--allow-no-plugins", "--dev", "--listen", &listen, "--admin", &admin]);
        let output = command.output().expect("run pointsman");
        let said = String::from_utf8(output.stderr).expect("text");
        assert_eq!((output.status.code(), said.lines().count()), (Some(64), 1), "{said}");
        assert!(said.contains("dev") && said.contains("loopback") && said.contains("listen on 127.0.0.1"), "{said}");
    }
}
