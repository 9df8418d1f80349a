//! Access control: a stream belongs to the user of its token only, lasts as long as the token is
//! valid, and leaving a group ends access to its later events.

use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use ring::hmac;
use serde_json::{Value, json};

use crate::harness::eventually;
use crate::harness::guests;
use crate::harness::http;
use crate::harness::node::{Folder, Node, SOON};
use crate::harness::ports;
use crate::harness::publish::event;
use crate::harness::sse::{Frame, Request, Stream, StreamEnd};

const SECRET: &str = "the secret of these tests, longer than 32 bytes";
/// Disables a plugin, to keep compilation at the start short.
const LEAN: &str = "[plugins.discard]\nenabled = false";
const KEY: &str = "the key of these tests";

/// A node that requires tokens and keys, without leeway: one machine has one clock.
fn node() -> Node {
    let config = format!(
        "[auth]\njwt_secret = \"{SECRET}\"\napi_key = \"{KEY}\"\nleeway = \"0s\"\ncookie = \"pointsman\"\n{LEAN}"
    );
    Node::builder().production().config(&config).start()
}

/// The time `seconds` from now, in seconds since the Unix epoch.
pub(super) fn in_s(seconds: i64) -> i64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("after 1970")
        .as_secs();
    i64::try_from(now).expect("before the year 292277026596") + seconds
}

pub(super) fn signed(
    name: &str,
    algorithm: hmac::Algorithm,
    secret: &str,
    claims: &Value,
) -> String {
    signed_with(
        &json!({ "alg": name, "typ": "JWT" }),
        algorithm,
        secret,
        claims,
    )
}

pub(super) fn signed_with(
    header: &Value,
    algorithm: hmac::Algorithm,
    secret: &str,
    claims: &Value,
) -> String {
    let [header, claims] =
        [header, claims].map(|part| BASE64_URL_SAFE_NO_PAD.encode(part.to_string()));
    let message = format!("{header}.{claims}");
    let key = hmac::Key::new(algorithm, secret.as_bytes());
    let signature = hmac::sign(&key, message.as_bytes());
    format!("{message}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
}

fn token(user: &str, expires: i64) -> String {
    signed(
        "HS256",
        hmac::HMAC_SHA256,
        SECRET,
        &json!({ "sub": user, "exp": expires }),
    )
}

/// Opens a stream with this token and reads its first cursor.
fn stream(node: &Node, token: &str, query: &str, last_event_id: &str) -> Stream {
    let request = Request::new(node.addr(), query)
        .header("Authorization", &format!("Bearer {token}"))
        .last_event_id(last_event_id);
    let mut stream = request
        .open(SOON)
        .unwrap_or_else(|refused| panic!("{refused:?}"));
    stream.next_state("cursor", SOON);
    stream
}

fn publish(node: &Node, id: &str, more: Value) {
    let bearer = format!("Bearer {KEY}");
    let headers = [
        ("authorization", bearer.as_str()),
        ("content-type", "application/cloudevents+json"),
    ];
    let answer = node.send(
        "POST",
        "/v1/events",
        &headers,
        event(id, "t", more).to_string().as_bytes(),
    );
    assert_eq!(answer.status, 202, "{answer:?}");
}

fn member(node: &Node, method: &str, group: &str, user: &str) {
    let answer = node.send(
        method,
        &format!("/v1/groups/{group}/members/{user}"),
        &[("authorization", &format!("Bearer {KEY}"))],
        b"",
    );
    assert_eq!(answer.status, 204, "{answer:?}");
}

/// RFC 7515 4.1.11: a reader that does not know a critical extension must refuse the token.
#[test]
fn a_token_with_an_unknown_critical_header_is_refused() {
    let node = node();
    let claims = json!({ "sub": "ann", "exp": in_s(3_600) });
    for critical in [json!(["b64"]), json!(["exp"]), json!([]), json!("b64")] {
        let header = json!({ "alg": "HS256", "typ": "JWT", "crit": critical, "b64": true });
        let token = signed_with(&header, hmac::HMAC_SHA256, SECRET, &claims);
        let refused = Request::new(node.addr(), "")
            .header("Authorization", &format!("Bearer {token}"))
            .open(SOON)
            .expect_err("a refusal");
        assert_eq!(refused.status, Some(401), "{critical}: {refused:?}");
    }
    stream(&node, &token("ann", in_s(3_600)), "", "");
}

#[test]
fn reading_and_publishing_require_a_valid_token_or_key() {
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
        (
            "signature",
            signed(
                "HS256",
                hmac::HMAC_SHA256,
                "another secret, which is longer than 32 bytes",
                &json!({ "sub": "ann", "exp": later }),
            ),
        ),
        ("signature", format!("{head}.{others_claims}.{signature}")),
        (
            "HS256",
            signed(
                "HS512",
                hmac::HMAC_SHA512,
                SECRET,
                &json!({ "sub": "ann", "exp": later }),
            ),
        ),
        ("token", unsigned),
        (
            "no readable claim 'exp'",
            signed("HS256", hmac::HMAC_SHA256, SECRET, &json!({ "sub": "ann" })),
        ),
        (
            "no claim 'sub'",
            signed("HS256", hmac::HMAC_SHA256, SECRET, &json!({ "exp": later })),
        ),
        ("control character", token("ann\nbob", later)),
        ("token", KEY.to_owned()),
        ("token", String::new()),
        ("token", "a.b.c".to_owned()),
    ];
    for path in [
        "/v1/stream?user=ann",
        "/v1/notifications?user=ann",
        "/v1/stream",
    ] {
        let answer = node.request("GET", path);
        assert_eq!(
            (answer.status, answer.header("www-authenticate")),
            (401, Some("Bearer")),
            "{path}: {answer:?}"
        );
        for (expected, token) in &bad {
            let answer = http::send(
                "GET",
                &node.url(path),
                &[("authorization", &format!("Bearer {token}"))],
                None,
            )
            .expect("an answer");
            // The head is 200 for a stream, so that an `EventSource` tries again.
            if *expected == "expired" && path.starts_with("/v1/stream") {
                assert_eq!(answer.status, 200, "{path}: {answer:?}");
                continue;
            }
            assert_eq!(
                answer.status, 401,
                "{path} with a token to be refused for {expected:?}: {answer:?}"
            );
            assert!(
                answer
                    .header("www-authenticate")
                    .is_some_and(|challenge| challenge.starts_with("Bearer")),
                "{answer:?}"
            );
            let error = answer.json()["error"]
                .as_str()
                .expect("an error")
                .to_owned();
            assert!(error.contains(expected), "{expected:?} is not in {error:?}");
            assert!(
                token.is_empty() || !error.contains(token.as_str()),
                "an error must not contain the token: {error}"
            );
        }
    }
    let acknowledgement = br#"{"id":"1","device":"phone"}"#;
    assert_eq!(
        node.send(
            "POST",
            "/v1/acks?user=ann",
            &[("content-type", "application/json")],
            acknowledgement
        )
        .status,
        401
    );
    // A user token is not a key, and the key is not a user.
    for (method, path) in [
        ("POST", "/v1/events"),
        ("PUT", "/v1/groups/ops/members/ann"),
        ("DELETE", "/v1/groups/ops/members/ann"),
        ("GET", "/v1/groups/ops/members/ann"),
        ("PUT", "/v1/users/ann/attributes"),
        ("GET", "/v1/dead-letters"),
    ] {
        for authorization in [None, Some(format!("Bearer {honest}"))] {
            let headers: Vec<(&str, &str)> = authorization
                .iter()
                .map(|value| ("authorization", value.as_str()))
                .collect();
            let answer = node.send(method, path, &headers, b"{}");
            assert_eq!(answer.status, 401, "{method} {path}: {answer:?}");
            assert!(answer.header("www-authenticate").is_some(), "{answer:?}");
        }
    }
    let log = node.log();
    assert!(
        ![SECRET, KEY, signature]
            .iter()
            .any(|secret| log.contains(secret)),
        "{log}"
    );
}

#[test]
fn a_stream_has_only_the_events_of_the_user_in_its_token() {
    let node = node();
    let (later, mut others_cursor) = (in_s(3_600), String::new());
    let mut bob = stream(&node, &token("bob", later), "", "");
    for id in ["b1", "b2"] {
        publish(&node, id, json!({ "user": "bob" }));
        others_cursor = bob.next_notification(SOON).cursor;
    }
    // Ann claims to be Bob in the URL and sends his cursor, as a browser does after another user
    // has logged in.
    let mut ann = stream(&node, &token("ann", later), "user=bob", "");
    let mut with_his_cursor = stream(
        &node,
        &token("ann", later),
        "user=bob&last_event_id=earliest",
        &others_cursor,
    );
    let mut from_the_beginning = stream(
        &node,
        &token("ann", later),
        "user=bob&last_event_id=earliest",
        "",
    );
    publish(&node, "b3", json!({ "user": "bob" }));
    publish(&node, "a1", json!({ "user": "ann" }));
    for stream in [&mut ann, &mut with_his_cursor, &mut from_the_beginning] {
        assert_eq!(stream.next_notification(SOON).id, "a1");
        assert!(!stream.text().contains("\"id\":\"b"), "{stream:?}");
    }
    assert_eq!(bob.next_notification(SOON).id, "b3");
    let bearer = format!("Bearer {}", token("ann", later));
    let page = http::send(
        "GET",
        &node.url("/v1/notifications?user=bob"),
        &[("authorization", &bearer)],
        None,
    )
    .expect("an answer")
    .json();
    let ids: Vec<&Value> = page["notifications"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|item| &item["data"]["id"])
        .collect();
    assert_eq!(ids, ["a1"]);
    // A browser's `EventSource` can send only a cookie.
    let cookie = format!("a=b; pointsman={}", token("bob", later));
    let mut by_cookie = Request::new(node.addr(), "user=ann&last_event_id=earliest")
        .header("Cookie", &cookie)
        .open(SOON)
        .expect("200");
    assert_eq!(by_cookie.next_notification(SOON).id, "b1");
}

#[test]
fn a_stream_ends_with_its_token_and_reports_the_reason() {
    let node = node();
    let expires = in_s(3);
    let mut brief = stream(&node, &token("ann", expires), "", "");
    let mut long = stream(&node, &token("ann", in_s(3_600)), "", "");
    publish(&node, "a", json!({ "user": "ann" }));
    let (frames, stop) = brief.read_to_end(SOON);
    assert!(matches!(stop, StreamEnd::Complete), "{stop:?}");
    let notified: Vec<String> = frames
        .iter()
        .filter_map(|frame| Some(frame.notification()?.id))
        .collect();
    assert_eq!(notified, ["a"], "{brief:?}");
    assert!(
        in_s(0) >= expires,
        "it ended {} s too early",
        expires - in_s(0)
    );
    let close = frames.last().expect("a last frame");
    assert_eq!(
        (close.state(), close.data.as_deref()),
        (Some("close"), Some("{\"reason\":\"token-expired\"}"))
    );
    assert!(
        close.retry.is_some() && close.id.is_some(),
        "the close must have the cursor to resume from: {close:?}"
    );
    // The old token no longer opens a stream; with a new one, nothing is missing.
    let back = Request::new(node.addr(), "").header(
        "Authorization",
        &format!("Bearer {}", token("ann", expires)),
    );
    eventually(SOON, "the old token opens no stream", || {
        let first = back.clone().open(SOON).ok()?.next_frame(SOON).ok()?;
        (first.data? == "{\"reason\":\"token-expired\"}").then_some(())
    });
    publish(&node, "b", json!({ "user": "ann" }));
    let mut again = stream(&node, &token("ann", in_s(3_600)), "", brief.last_event_id());
    assert_eq!(again.next_notification(SOON).id, "b");
    assert_eq!(
        (
            long.next_notification(SOON).id,
            long.next_notification(SOON).id
        ),
        ("a".to_owned(), "b".to_owned())
    );
}

/// A client that renews its token in time is never without a stream.
#[test]
fn a_stream_asks_once_for_a_new_token_before_the_present_one_expires() {
    let node = node();
    let expires = in_s(6);
    let mut brief = stream(&node, &token("ann", expires), "", "");
    let mut long = stream(&node, &token("ann", in_s(3_600)), "", "");
    let (frames, stop) = brief.read_to_end(SOON);
    assert!(matches!(stop, StreamEnd::Complete), "{stop:?}");
    let states: Vec<&str> = frames.iter().filter_map(Frame::state).collect();
    assert_eq!(states, ["reauth", "close"], "{brief:?}");
    let data: Value = serde_json::from_str(frames[0].data.as_deref().expect("data")).expect("JSON");
    let at = time::OffsetDateTime::from_unix_timestamp(expires)
        .expect("a time")
        .format(&time::format_description::well_known::Rfc3339)
        .expect("a text");
    assert_eq!(data["expires_at"], at.replace('Z', ".000Z"));
    assert!(
        data["expires_in"].as_u64().is_some_and(|left| left < 6),
        "{data}"
    );
    assert!(frames[0].id.is_none(), "it moves no cursor: {frames:?}");
    publish(&node, "a", json!({ "user": "ann" }));
    assert_eq!(long.next_notification(SOON).id, "a");
    assert!(!long.text().contains("reauth"), "{long:?}");
}

/// An `EventSource` never reconnects after a 401, but its page may renew the cookie meanwhile.
#[test]
fn an_expired_token_is_answered_in_band_and_a_forged_one_is_not() {
    let node = node();
    let past = in_s(-60);
    let open = |token: &str, query: &str| {
        Request::new(node.addr(), query)
            .header("Authorization", &format!("Bearer {token}"))
            .open(SOON)
    };
    let expired = token("ann", past);
    let (frames, stop) = open(&expired, "last_event_id=earliest&device=phone")
        .expect("200")
        .read_to_end(SOON);
    assert!(matches!(stop, StreamEnd::Complete), "{stop:?}");
    let [close] = frames.as_slice() else {
        panic!("only a close: {frames:?}")
    };
    assert_eq!(
        (close.state(), close.data.as_deref(), &close.id),
        (Some("close"), Some("{\"reason\":\"token-expired\"}"), &None)
    );
    assert!(
        close.retry.is_some_and(|ms| (5_000..=15_000).contains(&ms)),
        "{close:?}"
    );
    let claims = json!({ "sub": "ann", "exp": past });
    let other = "another secret, which is longer than 32 bytes";
    for forged in [
        signed("HS256", hmac::HMAC_SHA256, other, &claims),
        signed("none", hmac::HMAC_SHA256, SECRET, &claims),
        signed_with(
            &json!({ "alg": "HS256", "crit": ["b64"] }),
            hmac::HMAC_SHA256,
            SECRET,
            &claims,
        ),
        signed(
            "HS256",
            hmac::HMAC_SHA256,
            SECRET,
            &json!({ "sub": "a\nb", "exp": past }),
        ),
        signed(
            "HS256",
            hmac::HMAC_SHA256,
            SECRET,
            &json!({ "sub": "ann", "exp": past, "nbf": in_s(3_600) }),
        ),
        signed("HS256", hmac::HMAC_SHA256, SECRET, &json!({ "exp": past })),
    ] {
        assert_eq!(
            open(&forged, "").expect_err("a refusal").status,
            Some(401),
            "{forged}"
        );
    }
    let bearer = format!("Bearer {expired}");
    let headers = [
        ("authorization", bearer.as_str()),
        ("content-type", "application/json"),
    ];
    for (method, path, body) in [
        ("GET", "/v1/notifications", ""),
        ("POST", "/v1/acks", r#"{"id":"1","device":"phone"}"#),
    ] {
        let answer = node.send(method, path, &headers, body.as_bytes());
        assert_eq!(answer.status, 401, "{path}: {answer:?}");
    }
}

#[test]
fn a_parameter_that_cannot_change_a_stream_is_ignored_and_named() {
    let node = node();
    let token = token("ann", in_s(3_600));
    let head = |query: &str| {
        let opened = stream(&node, &token, query, "");
        opened.head().to_ascii_lowercase()
    };
    let named = head("t=1&_cache=2&token=secret-of-another&t=3&datastar=%7B%7D&_%0A=1");
    assert!(
        named.contains("\r\nx-pointsman-ignored: t, _cache, token, datastar, _\\n\r\n"),
        "{named}"
    );
    assert!(!head("types=a").contains("x-pointsman-ignored"));
    for query in ["type=order", "tokens=x", "t=1&last=2", "fields=x"] {
        let refused = Request::new(node.addr(), query)
            .header("Authorization", &format!("Bearer {token}"))
            .open(SOON)
            .expect_err("a refusal");
        assert_eq!(refused.status, Some(400), "{query}: {refused:?}");
    }
    // It is not a way to send a token.
    let refused = Request::new(node.addr(), &format!("token={token}"))
        .open(SOON)
        .expect_err("a refusal");
    assert_eq!(refused.status, Some(401), "{refused:?}");
    let log = node.log();
    assert!(!log.contains(&token) && !log.contains("secret-of-another"));
}

#[test]
fn a_former_member_sees_no_later_events_of_the_group_live_or_in_history() {
    let node = node();
    let ann = token("ann", in_s(3_600));
    let mut live = stream(&node, &ann, "", "");
    publish(&node, "too early", json!({ "group": "ops" }));
    // A user who joins before an event is decided receives it, so wait until it is decided.
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

/// A token of ann with these additional claims.
fn claiming(claims: Value) -> String {
    let mut all = json!({ "sub": "ann", "exp": in_s(3_600) });
    all.as_object_mut()
        .expect("an object")
        .extend(claims.as_object().expect("an object").clone());
    signed("HS256", hmac::HMAC_SHA256, SECRET, &all)
}

fn page(node: &Node, token: &str) -> Vec<String> {
    let bearer = format!("Bearer {token}");
    let answer = http::send(
        "GET",
        &node.url("/v1/notifications"),
        &[("authorization", &bearer)],
        None,
    )
    .expect("an answer");
    let items = answer.json()["notifications"]
        .as_array()
        .unwrap_or_else(|| panic!("{answer:?}"))
        .clone();
    items
        .iter()
        .map(|item| item["data"]["id"].as_str().expect("an id").to_owned())
        .collect()
}

#[test]
fn groups_in_a_token_apply_to_its_streams_live_and_in_replay_only() {
    let node = node();
    let (plain, member_of_ops) = (claiming(json!({})), claiming(json!({ "groups": ["ops"] })));
    let mut by_claim = stream(&node, &member_of_ops, "", "");
    let mut by_name = stream(&node, &plain, "", "");
    let begin = by_claim.last_event_id().to_owned();
    publish(&node, "for ops", json!({ "group": "ops" }));
    publish(&node, "hers", json!({ "user": "ann" }));
    let mut both = ["for ops", "hers"].map(str::to_owned).to_vec();
    assert_eq!(
        [(); 2]
            .map(|()| by_claim.next_notification(SOON).id)
            .to_vec(),
        both
    );
    assert_eq!(by_name.next_notification(SOON).id, "hers");
    // The start of a claimed membership is unknown, so everything that is kept counts.
    let mut back = stream(&node, &member_of_ops, "", &begin);
    assert_eq!(
        [(); 2].map(|()| back.next_notification(SOON).id).to_vec(),
        both
    );
    assert_eq!(page(&node, &member_of_ops), both);
    assert_eq!(page(&node, &plain), ["hers"]);
    // The claim adds to stored memberships; leaving a stored one does not affect the claim.
    member(&node, "PUT", "dev", "ann");
    member(&node, "PUT", "ops", "ann");
    publish(&node, "for dev", json!({ "group": "dev" }));
    assert_eq!(
        (
            by_claim.next_notification(SOON).id,
            by_name.next_notification(SOON).id
        ),
        ("for dev".into(), "for dev".into())
    );
    member(&node, "DELETE", "ops", "ann");
    publish(&node, "for ops again", json!({ "group": "ops" }));
    publish(&node, "hers again", json!({ "user": "ann" }));
    assert_eq!(
        (
            by_claim.next_notification(SOON).id,
            by_claim.next_notification(SOON).id
        ),
        ("for ops again".into(), "hers again".into())
    );
    assert_eq!(by_name.next_notification(SOON).id, "hers again");
    both.extend(["for dev", "for ops again", "hers again"].map(str::to_owned));
    assert_eq!(page(&node, &member_of_ops), both);
    // Without the claim, a token has no membership, whatever the cursor has passed.
    let mut without = stream(&node, &plain, "", &begin);
    assert_eq!(
        [(); 3].map(|()| without.next_notification(SOON).id),
        ["hers", "for dev", "hers again"]
    );
    // A malformed claim is refused, not treated as empty.
    for (claims, expect) in [
        (json!({ "groups": "ops" }), "claim 'groups'"),
        (json!({ "attributes": { "a": {} } }), "claim 'attributes'"),
        (
            json!({ "attributes": { "a": [["b"]] } }),
            "claim 'attributes'",
        ),
    ] {
        let bearer = format!("Bearer {}", claiming(claims));
        let answer = http::send(
            "GET",
            &node.url("/v1/stream"),
            &[("authorization", &bearer)],
            None,
        )
        .expect("an answer");
        assert_eq!(answer.status, 401, "{answer:?}");
        assert!(
            answer.json()["error"]
                .as_str()
                .is_some_and(|error| error.contains(expect)),
            "{answer:?}"
        );
    }
}

#[test]
fn attributes_in_a_token_override_stored_attributes_for_its_streams() {
    let plugins = Folder::new();
    for name in ["address", "unruly"] {
        std::fs::write(
            plugins.path().join(format!("{name}.wasm")),
            guests::core_module(name),
        )
        .expect("write a plugin");
    }
    // The plugin routes events of this type to user 42 if the plan is `pro`.
    let config = format!(
        "[auth]\njwt_secret = \"{SECRET}\"\napi_key = \"{KEY}\"\n[plugins.unruly.config]\ntypes = [\"test-of-a-plan\"]\n"
    );
    let node = Node::builder()
        .production()
        .config(&config)
        .plugins(plugins.path())
        .start();
    let claiming = |attributes: Value| {
        let claims = json!({ "sub": "42", "exp": in_s(3_600), "attributes": attributes });
        signed("HS256", hmac::HMAC_SHA256, SECRET, &claims)
    };
    let set = |attributes: &str| {
        let answer = node.send(
            "PUT",
            "/v1/users/42/attributes",
            &[("authorization", &format!("Bearer {KEY}"))],
            attributes.as_bytes(),
        );
        assert_eq!(answer.status, 204, "{answer:?}");
    };
    let promote = |id: &str| {
        let bearer = format!("Bearer {KEY}");
        let headers = [
            ("authorization", bearer.as_str()),
            ("content-type", "application/cloudevents+json"),
        ];
        let promotion = event(id, "test-of-a-plan", json!({})).to_string();
        assert_eq!(
            node.send("POST", "/v1/events", &headers, promotion.as_bytes())
                .status,
            202
        );
    };
    let mut pro = stream(&node, &claiming(json!({ "plan": "pro" })), "", "");
    let mut plain = stream(&node, &claiming(json!({})), "", "");
    let mut free = stream(
        &node,
        &claiming(json!({ "plan": "free", "age": 30 })),
        "",
        "",
    );
    promote("1");
    assert_eq!(pro.next_notification(SOON).id, "1");
    // A change by the application takes effect, and the claim still overrides it.
    set(r#"{"plan":"pro","locale":"ko"}"#);
    promote("2");
    set(r#"{"plan":"free"}"#);
    promote("3");
    publish(&node, "end", json!({ "user": "42" }));
    assert_eq!(
        [(); 3].map(|()| pro.next_notification(SOON).id),
        ["2", "3", "end"]
    );
    assert_eq!(free.next_notification(SOON).id, "end");
    // Whether "2" was written before the plan changed back is a race.
    let next = plain.next_notification(SOON).id;
    assert!(
        next == "end" || (next == "2" && plain.next_notification(SOON).id == "end"),
        "{next}"
    );
}

#[test]
fn dev_mode_refuses_addresses_other_than_loopback_with_exit_code_64() {
    let (one, other) = (ports::free(), ports::free());
    let everywhere = |port: u16| format!("0.0.0.0:{port}");
    for (listen, admin) in [
        (everywhere(one.port()), other.to_string()),
        (one.to_string(), everywhere(other.port())),
        (format!("[::]:{}", one.port()), other.to_string()),
        (format!("192.0.2.1:{}", one.port()), other.to_string()),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pointsman"));
        command.args([
            "serve",
            "--ephemeral",
            "--allow-no-plugins",
            "--dev",
            "--listen",
            &listen,
            "--admin",
            &admin,
        ]);
        let output = command.output().expect("run pointsman");
        let said = String::from_utf8(output.stderr).expect("text");
        assert_eq!(
            (output.status.code(), said.lines().count()),
            (Some(64), 1),
            "{said}"
        );
        assert!(
            said.contains("dev")
                && said.contains("loopback")
                && said.contains("listen on 127.0.0.1"),
            "{said}"
        );
    }
}

#[test]
fn a_number_in_a_token_is_a_user_and_a_group() {
    let node = node();
    let claims = json!({ "sub": 42, "groups": [7], "exp": in_s(3600) });
    let token = signed("HS256", hmac::HMAC_SHA256, SECRET, &claims);
    let mut stream = stream(&node, &token, "", "");
    let headers = [
        ("authorization", &*format!("Bearer {KEY}")),
        ("content-type", "application/json"),
    ];
    for body in [
        r#"{"type":"t","id":"user","user":42}"#,
        r#"{"type":"t","id":"users","users":[41,42]}"#,
        r#"{"type":"t","id":"group","group":7}"#,
    ] {
        let answer = node.send("POST", "/v1/events", &headers, body.as_bytes());
        assert_eq!(answer.status, 202, "{answer:?}");
    }
    for id in ["user", "users", "group"] {
        assert_eq!(stream.next_notification(SOON).id, id);
    }
}
