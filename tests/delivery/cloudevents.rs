//! CloudEvents over HTTP as its bindings describe them: content codings, encodings of text, formats,
//! attributes at their limits, preferences of the publisher, and the handshake of webhooks. The
//! SDKs' own requests are in `tests/clients`.

use std::io::Write as _;

use flate2::Compression;
use flate2::write::{GzEncoder, ZlibEncoder};
use serde_json::{Value, json};

use crate::harness::node::{Node, SOON};
use crate::harness::publish::{event, xadd};
use crate::harness::redis::RedisServer;
use crate::harness::sse::Stream;

const STRUCTURED: (&str, &str) = ("content-type", "application/cloudevents+json");
const BATCH: (&str, &str) = ("content-type", "application/cloudevents-batch+json");
const GZIP: (&str, &str) = ("content-encoding", "gzip");

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes).expect("compress");
    encoder.finish().expect("compress")
}

fn zlib(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes).expect("compress");
    encoder.finish().expect("compress")
}

fn body(event: &Value) -> Vec<u8> {
    serde_json::to_vec(event).expect("JSON")
}

/// The next notification as JSON, with all its members.
fn next_data(stream: &mut Stream) -> Value {
    loop {
        let frame = stream.next_frame(SOON).expect("a frame");
        if frame.notification().is_some() {
            return serde_json::from_str(&frame.data.expect("data")).expect("JSON");
        }
    }
}

/// Asserts that a request is refused with this status and reason, and returns the response.
fn refused(
    node: &Node,
    headers: &[(&str, &str)],
    body: &[u8],
    (status, reason): (u16, &str),
) -> crate::harness::http::Answer {
    let answer = node.send("POST", "/v1/events", headers, body);
    assert_eq!(answer.status, status, "{headers:?}: {answer:?}");
    let error = answer.json()["error"]
        .as_str()
        .expect("an error")
        .to_owned();
    assert!(
        error.contains(reason),
        "{reason:?} is missing from {error:?}"
    );
    answer
}

#[test]
fn a_compressed_event_is_delivered_as_sent_in_every_mode() {
    let node = Node::builder().start();
    let mut stream = node.stream("42");
    let of = |id: &str| {
        event(
            id,
            "t",
            json!({ "user": "42", "data": { "text": "ä".repeat(50) } }),
        )
    };
    let deflate = ("content-encoding", "deflate");
    let binary = [
        ("ce-type", "t"),
        ("ce-id", "binary"),
        ("ce-user", "42"),
        ("content-type", "application/json"),
    ];
    let data = body(&of("")["data"]);
    for (headers, sent) in [
        ([STRUCTURED, GZIP].to_vec(), gzip(&body(&of("gzip")))),
        ([STRUCTURED, deflate].to_vec(), zlib(&body(&of("deflate")))),
        ([BATCH, GZIP].to_vec(), gzip(&body(&json!([of("batch")])))),
        ([&binary[..], &[GZIP]].concat(), gzip(&data)),
    ] {
        let answer = node.send("POST", "/v1/events", &headers, &sent);
        assert!(
            [200, 202].contains(&answer.status),
            "{headers:?}: {answer:?}"
        );
    }
    for id in ["gzip", "deflate", "batch", "binary"] {
        let notification = stream.next_notification(SOON);
        assert_eq!(
            (notification.id.as_str(), &notification.data),
            (id, &of("")["data"])
        );
    }
    let answer = refused(
        &node,
        &[STRUCTURED, ("content-encoding", "br")],
        b"\x0b\x02\x80",
        (415, "Content-Encoding other than gzip or deflate"),
    );
    assert_eq!(answer.header("accept-encoding"), Some("gzip, deflate"));
    refused(
        &node,
        &[STRUCTURED, ("content-encoding", "gzip, gzip")],
        &gzip(&gzip(b"{}")),
        (415, "Content-Encoding"),
    );
    let mut cut = gzip(&body(&of("cut")));
    cut.truncate(cut.len() - 4);
    refused(
        &node,
        &[STRUCTURED, GZIP],
        &cut,
        (400, "the body is not valid gzip"),
    );
    refused(
        &node,
        &[STRUCTURED, GZIP],
        &body(&of("plain")),
        (400, "the body is not valid gzip"),
    );
    refused(
        &node,
        &[STRUCTURED, GZIP],
        &[gzip(&body(&of("first"))), gzip(&body(&of("second")))].concat(),
        (400, "bytes follow its end"),
    );
    node.publisher().publish(&[of("last")]);
    assert_eq!(stream.next_notification(SOON).id, "last");
}

#[test]
fn a_compressed_batch_of_the_largest_size_fits_where_an_uncompressed_one_does() {
    let node = Node::builder()
        .config("[limits]\nbody_bytes = 8388608")
        .start();
    let mut stream = node.stream("42");
    // Characters that hardly compress, from a generator that is good enough for that.
    let mut state = 1_u64;
    let mut text = |n: usize| -> String {
        let next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            char::from(b'!' + (state >> 58) as u8)
        };
        std::iter::repeat_with(next)
            .take(n)
            .collect::<String>()
            .replace(['"', '\\'], "x")
    };
    let events: Vec<Value> = (0..20)
        .map(|n| {
            event(
                &n.to_string(),
                "t",
                json!({ "user": "42", "data": text(200_000) }),
            )
        })
        .collect();
    let sent = gzip(&serde_json::to_vec(&events).expect("JSON"));
    assert!(sent.len() > 2 * 1024 * 1024, "{} bytes", sent.len());
    let answer = node.send("POST", "/v1/events", &[BATCH, GZIP], &sent);
    assert_eq!(answer.status, 200, "{answer:?}");
    for n in 0..20 {
        assert_eq!(stream.next_notification(SOON).id, n.to_string());
    }
}

/// 64 bodies of 250 KB that would inflate to 256 MB each.
#[test]
fn bodies_that_inflate_without_end_are_refused_and_hold_bounded_memory() {
    let node = Node::builder().start();
    let mut stream = node.stream("42");
    let bomb = gzip(&vec![b' '; 256 * 1024 * 1024 - 1]);
    assert!(bomb.len() <= 262_144, "{} bytes", bomb.len());
    let peak_kib = || {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", node.pid())).expect("/proc");
        let peak = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .expect("VmHWM");
        peak.trim()
            .trim_end_matches(" kB")
            .parse::<u64>()
            .expect("a number")
    };
    let before = peak_kib();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for headers in [[STRUCTURED, GZIP], [BATCH, GZIP]].iter().cycle().take(8) {
                    let answer = node.send("POST", "/v1/events", headers, &bomb);
                    assert_eq!(answer.status, 413, "{answer:?}");
                    let answer = answer.json();
                    let error = answer["error"].as_str().expect("an error");
                    assert!(error.contains("inflates to more than"), "{error}");
                    assert!(answer["fix"].is_string(), "{answer}");
                }
            });
        }
    });
    let grown = peak_kib() - before;
    // The eight at a time hold their compressed bodies and at most a batch of 4 MiB each.
    assert!(
        grown < 100 * 1024,
        "the memory of the node has grown by {grown} KiB"
    );
    node.publisher()
        .publish(&[event("after", "t", json!({ "user": "42" }))]);
    assert_eq!(stream.next_notification(SOON).id, "after");
}

#[test]
fn formats_and_encodings_that_are_not_read_are_refused_by_name_in_every_mode() {
    let server = RedisServer::start();
    let node = Node::builder().redis(server.url()).start();
    let mut stream = node.stream("42");
    let document = body(&event("a", "t", json!({ "user": "42" })));
    let binary = [("ce-type", "t"), ("ce-id", "a"), ("ce-user", "42")];
    for format in [
        "application/cloudevents+xml",
        "application/cloudevents+avro",
        "application/cloudevents+protobuf",
        "application/cloudevents-batch+xml; charset=utf-8",
        "application/cloudevents-batch+avro",
        "application/cloudevents",
    ] {
        let of_format = [("content-type", format)];
        for headers in [of_format.to_vec(), [&binary[..], &of_format].concat()] {
            refused(
                &node,
                &headers,
                &document,
                (415, "cannot read events in the format"),
            );
        }
    }
    for content_type in [
        "application/cloudevents+json; charset=utf-16",
        "application/cloudevents-batch+json;charset=\"ISO-8859-1\"",
        "application/json; charset=windows-1252",
    ] {
        let headers = [("content-type", content_type)];
        refused(
            &node,
            &headers,
            &document,
            (415, "cannot read text in the charset"),
        );
    }
    let latin = [
        &binary[..],
        &[("content-type", "text/plain; charset=iso-8859-1")],
    ]
    .concat();
    refused(
        &node,
        &latin,
        b"sch\xf6n",
        (415, "cannot read text in the charset 'iso-8859-1'"),
    );

    let utf16 = |order: fn(u16) -> [u8; 2], mark: bool| -> Vec<u8> {
        let text = String::from_utf8(document.clone()).expect("UTF-8");
        let text = if mark {
            format!("\u{feff}{text}")
        } else {
            text
        };
        text.encode_utf16().flat_map(order).collect()
    };
    let marked = [b"\xef\xbb\xbf".as_slice(), &document].concat();
    let json = [&binary[..], &[("content-type", "application/json")]].concat();
    for (bytes, reason) in [
        (marked, "begins with a byte order mark (U+FEFF)"),
        (utf16(u16::to_le_bytes, true), "is UTF-16"),
        (utf16(u16::to_be_bytes, true), "is UTF-16"),
        (utf16(u16::to_le_bytes, false), "is UTF-16"),
        (utf16(u16::to_be_bytes, false), "is UTF-16"),
    ] {
        refused(&node, &[STRUCTURED], &bytes, (400, reason));
        refused(&node, &[BATCH], &bytes, (400, reason));
        refused(&node, &json, &bytes, (400, reason));
        // The same added to Redis, which has no answer: a dead letter names it.
        redis::cmd("XADD")
            .arg("pointsman:events")
            .arg("*")
            .arg("event")
            .arg(&bytes)
            .exec(&mut server.connection())
            .expect("XADD");
    }
    node.publisher()
        .publish(&[event("last", "t", json!({ "user": "42" }))]);
    assert_eq!(stream.next_notification(SOON).id, "last");
    let letters = node.request("GET", "/v1/dead-letters").json();
    let reasons = letters["dead_letters"].as_array().expect("a list").iter();
    let reasons: Vec<&str> = reasons
        .filter_map(|letter| letter["reason"].as_str())
        .collect();
    let n_of = |text: &str| {
        reasons
            .iter()
            .filter(|reason| reason.contains(text))
            .count()
    };
    assert_eq!(
        (n_of("byte order mark"), n_of("is UTF-16")),
        (1, 4),
        "{reasons:?}"
    );
}

#[test]
fn the_type_and_the_schema_of_the_data_reach_the_client() {
    let node = Node::builder()
        .plugins(crate::harness::demo_plugins())
        .config(
            "[[plugins.rules.config.rules]]\nmatch.type = \"replaced\"\nto.user = \"42\"\nbody = { text = \"another\" }",
        )
        .start();
    let mut stream = node.stream("42");
    let schema = format!("https://shop.example/{}.json", "s".repeat(2_000));
    let bytes = json!({ "user": "42", "data_base64": "eyJhIjoxfQ==" });
    let typed = json!({
        "user": "42", "datacontenttype": "application/vnd.shop+json", "dataschema": schema,
        "data": { "a": 1 }
    });
    let mut replaced = typed.clone();
    replaced.as_object_mut().expect("an object").remove("user");
    let events = [
        event("typed", "t", typed),
        event("bytes", "t", bytes),
        event("other", "replaced", replaced),
    ];
    node.publisher().publish(&events);
    let read: Vec<Value> = (0..3).map(|_| next_data(&mut stream)).collect();
    assert_eq!(read[0]["datacontenttype"], "application/vnd.shop+json");
    assert_eq!(read[0]["dataschema"], schema);
    // Without a type, `data_base64` is bytes, even if these could be JSON.
    assert_eq!(
        (&read[1]["data_base64"], read[1].get("data")),
        (&json!("eyJhIjoxfQ=="), None)
    );
    // A body that replaces the data is not what the type describes.
    assert_eq!(read[2]["data"], json!({ "text": "another" }));
    assert!(read[2].get("datacontenttype").is_none() && read[2].get("dataschema").is_none());
    let page = node.request("GET", "/v1/notifications?user=42").json();
    let items = page["notifications"].as_array().expect("a list").iter();
    assert_eq!(
        items.map(|item| item["data"].clone()).collect::<Vec<_>>(),
        read
    );
}

#[test]
fn a_source_subject_and_schema_of_2048_bytes_are_kept_by_both_brokers() {
    let server = RedisServer::start();
    for builder in [Node::builder().redis(server.url()), Node::builder().data()] {
        let mut node = builder.start();
        let mut stream = node.stream("42");
        let long =
            |scheme: &str, n: usize| format!("{scheme}:{}", "ä".repeat((n - scheme.len() - 1) / 2));
        let (source, subject, schema) = (long("src", 2048), long("sub", 2048), long("sch", 2048));
        let of = |id: &str| {
            json!({ "specversion": "1.0", "id": id, "type": "t", "source": source,
                    "subject": subject, "dataschema": schema, "user": "42" })
        };
        let binary = |name: &'static str, text: &str| (name, text.replace('ä', "%C3%A4"));
        node.publisher().publish(&[of("batch")]);
        let headers = [
            binary("ce-source", &source),
            binary("ce-subject", &subject),
            binary("ce-dataschema", &schema),
            ("ce-type", "t".to_owned()),
            ("ce-id", "binary".to_owned()),
            ("ce-user", "42".to_owned()),
        ];
        let headers: Vec<(&str, &str)> = headers
            .iter()
            .map(|(name, value)| (*name, value.as_str()))
            .collect();
        assert_eq!(node.send("POST", "/v1/events", &headers, b"").status, 202);
        // A retry is recognised by the whole source.
        node.publisher().publish(&[of("batch"), of("later")]);
        for id in ["batch", "binary", "later"] {
            let data = next_data(&mut stream);
            assert_eq!(
                (
                    &data["id"],
                    &data["source"],
                    &data["subject"],
                    &data["dataschema"]
                ),
                (&json!(id), &json!(source), &json!(subject), &json!(schema))
            );
        }
        let explained = node.admin("/v1/explain?event_id=binary&user=42");
        assert_eq!(explained.status, 200, "{explained:?}");
        assert!(explained.body.contains(&source));
        for name in ["source", "subject", "dataschema"] {
            let mut longer = of("longer");
            longer[name] = json!(long("x", 2050));
            refused(
                &node,
                &[STRUCTURED],
                &body(&longer),
                (400, &format!("{name} has 2050 bytes; the limit is 2048")),
            );
        }
        node.kill();
    }
    // The same by XADD, where the entry is a dead letter and the decision names its source.
    let node = Node::builder().redis(server.url()).start();
    let source = "s".repeat(2_048);
    let fields = [("type", "t"), ("source", source.as_str()), ("user", "4\n2")];
    let entry = fields
        .map(|(name, value)| (name, value.to_owned()))
        .to_vec();
    xadd(&mut server.connection(), "pointsman:events", &[entry]);
    crate::harness::eventually(SOON, "a decision names the source", || {
        let decisions = node.admin("/v1/decisions?limit=1").body;
        decisions.contains(&source).then_some(())
    });
}

#[test]
fn a_publisher_that_prefers_a_minimal_response_gets_204_without_a_body() {
    let node = Node::builder().start();
    let minimal = (
        "prefer",
        "respond-async, return=minimal;foo=1, return=representation",
    );
    let of = |id: &str| event(id, "t", json!({ "user": "42" }));
    let binary = [
        ("ce-type", "t"),
        ("ce-id", "c"),
        ("prefer", "Return=\"minimal\""),
    ];
    for (headers, sent) in [
        ([STRUCTURED, minimal].to_vec(), body(&of("a"))),
        ([BATCH, minimal].to_vec(), body(&json!([of("b")]))),
        (binary.to_vec(), Vec::new()),
    ] {
        let answer = node.send("POST", "/v1/events", &headers, &sent);
        assert_eq!(
            (answer.status, answer.body.as_str()),
            (204, ""),
            "{headers:?}"
        );
        assert_eq!(answer.header("preference-applied"), Some("return=minimal"));
    }
    let other = [STRUCTURED, ("prefer", "return=representation")];
    assert_eq!(
        node.send("POST", "/v1/events", &other, &body(&of("d")))
            .status,
        202
    );
    // A refusal is reported in any case.
    let partly = body(&json!([of("e"), { "id": "no type" }]));
    let answer = node.send("POST", "/v1/events", &[BATCH, minimal], &partly);
    assert_eq!(
        (answer.status, answer.header("preference-applied")),
        (200, None)
    );
    assert_eq!(answer.json()["events"][1]["status"], "refused");
}

#[test]
fn a_batch_of_which_every_event_is_refused_is_an_error_with_its_receipts() {
    let node = Node::builder().start();
    let batch = br#"[{"id":"a"},{"type":"t","id":"\n"}]"#;
    let answer = refused(
        &node,
        &[BATCH],
        batch,
        (
            400,
            "every event of the batch is refused; the first: type is missing",
        ),
    );
    let answer = answer.json();
    assert_eq!(answer["code"], "malformed");
    let receipts = answer["events"].as_array().expect("receipts");
    assert!(
        receipts.len() == 2
            && receipts
                .iter()
                .all(|receipt| receipt["status"] == "refused"),
        "{answer}"
    );
    assert_eq!(node.send("POST", "/v1/events", &[BATCH], b"[]").status, 200);
}

#[test]
fn the_handshake_of_a_webhook_is_granted_to_configured_senders_only() {
    let node = Node::builder()
        .config("[listen]\nwebhook_origins = [\"events.example\"]")
        .start();
    let ask = |headers: &[(&str, &str)]| {
        crate::harness::http::send("OPTIONS", &node.url("/v1/events"), headers, None)
            .expect("a response")
    };
    let answer = ask(&[
        ("WebHook-Request-Origin", "Events.example"),
        ("WebHook-Request-Rate", "120"),
        ("WebHook-Request-Callback", "https://events.example/confirm"),
    ]);
    assert_eq!(
        (answer.status, answer.body.as_str()),
        (200, ""),
        "{answer:?}"
    );
    assert_eq!(
        answer.header("webhook-allowed-origin"),
        Some("Events.example")
    );
    assert_eq!(answer.header("webhook-allowed-rate"), Some("*"));
    assert!(
        answer
            .header("allow")
            .is_some_and(|allow| allow.contains("POST"))
    );
    let other = ask(&[("WebHook-Request-Origin", "evil.example")]);
    assert_eq!(
        (other.status, other.header("webhook-allowed-origin")),
        (403, None),
        "{other:?}"
    );
    assert!(
        other.json()["fix"]
            .as_str()
            .is_some_and(|fix| fix.contains("listen.webhook_origins"))
    );
    assert_eq!(ask(&[]).status, 400);
    // The preflight of a page is another matter.
    let preflight = ask(&[
        ("Origin", "http://localhost:5173"),
        ("Access-Control-Request-Method", "POST"),
    ]);
    assert_eq!(preflight.status, 204, "{preflight:?}");
}
