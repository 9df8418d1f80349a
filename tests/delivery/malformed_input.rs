//! Malformed input through `XADD`, `POST`, stream clients and the plugin folder: every item ends in
//! exactly one outcome that names the fix, and the next event is processed correctly.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::harness::command::{output_of, pointsman};
use crate::harness::node::{Folder, Node, SOON};
use crate::harness::proxy::Proxy;
use crate::harness::publish::event;
use crate::harness::redis::RedisServer;
use crate::harness::sse::{OpenError, Request, Stream};
use crate::harness::{eventually, guests};

/// A configuration with as few plugins to compile at startup as possible.
const LEAN: &str = "[plugins.discard]\nenabled = false";

type Fields = Vec<(Vec<u8>, Vec<u8>)>;

/// Fields of an entry.
fn fields(pairs: &[(&str, &str)]) -> Fields {
    pairs
        .iter()
        .map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec()))
        .collect()
}

/// The fields of an entry: those of a valid event, followed by this one.
fn and(name: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Fields {
    let mut all = fields(&[("type", "t"), ("user", "42")]);
    all.push((name.as_ref().to_vec(), value.as_ref().to_vec()));
    all
}

/// An entry whose only field is a CloudEvents document.
fn document(bytes: impl AsRef<[u8]>) -> Fields {
    vec![(b"event".to_vec(), bytes.as_ref().to_vec())]
}

fn add(connection: &mut redis::Connection, fields: &Fields) -> String {
    redis::cmd("XADD")
        .arg("pointsman:events")
        .arg("*")
        .arg(fields)
        .query(connection)
        .expect("XADD")
}

/// Asserts that a text is safe to print in a terminal and a log.
fn assert_harmless(text: &str) {
    assert!(
        !text.is_empty() && text.chars().all(|c| !c.is_control()),
        "{text:?}"
    );
}

/// Asserts that the node did not panic.
fn assert_calm(node: &Node) {
    let log = node.log();
    assert!(!log.contains("panicked"), "{log}");
}

fn outcomes(node: &Node, outcome: &str) -> f64 {
    node.metric(&format!("pointsman_events_total{{outcome=\"{outcome}\"}}"))
}

/// The dead letters of a node with their fields, keyed by the id of the source entry.
fn dead_letters(node: &Node) -> BTreeMap<String, (String, Value, Fields)> {
    let list = node.request("GET", "/v1/dead-letters?limit=1000").json();
    assert_eq!(list.get("next"), None);
    let letters = list["dead_letters"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|listed| {
            let id = listed["id"].as_str().expect("an id").to_owned();
            let shown = node
                .request("GET", &format!("/v1/dead-letters/{id}"))
                .json();
            let fields = shown["fields"]
                .as_array()
                .expect("fields")
                .iter()
                .map(|field| (bytes(field, "name"), bytes(field, "value")));
            (
                shown["entry"].as_str().expect("an entry").to_owned(),
                (id, shown.clone(), fields.collect()),
            )
        });
    letters.collect()
}

fn bytes(field: &Value, what: &str) -> Vec<u8> {
    match (
        field[what].as_str(),
        field[format!("{what}_base64")].as_str(),
    ) {
        (Some(text), None) => text.as_bytes().to_vec(),
        (None, Some(base64)) => STANDARD.decode(base64).expect("base64"),
        _ => panic!("one of {what} and {what}_base64: {field}"),
    }
}

/// Invalid entries, each with a part of the expected reason.
fn bad_entries() -> Vec<(Fields, &'static str)> {
    let thousands = |n: usize| {
        let mut many = fields(&[("type", "t"), ("user", "42")]);
        many.extend((0..n).map(|n| (format!("f{n}").into_bytes(), b"v".to_vec())));
        many
    };
    // Short names, so that the attribute does not exceed its own limit.
    let users = |n: u32| {
        (0..n)
            .map(|n| format!("{n:x}"))
            .collect::<Vec<_>>()
            .join(",")
    };
    vec![
        (
            fields(&[("source", "/shop"), ("user", "42")]),
            "type is missing; every event needs one, such as order.shipped",
        ),
        (and("type", "u"), "type appears twice"),
        (fields(&[("type", ""), ("user", "42")]), "type is empty"),
        (
            fields(&[("", "")]),
            "'' is not a valid attribute name; use 1 to 64 of a-z, 0-9 and _",
        ),
        (and("data", "{\"a\":"), "data is not valid JSON"),
        (
            and("data", "NaN"),
            "give other data a datacontenttype such as text/plain",
        ),
        (and("data", ""), "data is not valid JSON"),
        (
            and("data", b"\x80\xff\0"),
            "give binary data a datacontenttype such as application/octet-stream",
        ),
        (
            document("{\"type\":"),
            "the CloudEvents document is not a JSON object",
        ),
        (
            document("[]"),
            "the CloudEvents document is not a JSON object",
        ),
        (
            document(""),
            "the CloudEvents document is not a JSON object",
        ),
        (
            document(b"\xff\xfe{\0}\0"),
            "the CloudEvents document is UTF-16",
        ),
        (document(b"{\xff}"), "the CloudEvents document is not UTF-8"),
        (document(r#"{"type":"t","type":"t"}"#), "type appears twice"),
        (document(r#"{"type":{"a":1}}"#), "type is an object"),
        (
            document(r#"{"type":"t","data":1,"data_base64":"AA=="}"#),
            "data and data_base64 are mutually exclusive",
        ),
        (
            document(r#"{"type":"t","data_base64":"?"}"#),
            "data_base64 is not base64",
        ),
        (and("event", "{}"), "event must be the only field"),
        // Valid by the grammar of JSON, but no plugin could find a field in it.
        (
            and("data", r#"{"user":"42","cut":"\ud83d"}"#),
            "data is not valid JSON (",
        ),
        (
            and("data", r#"{"user":"42","x":1e999}"#),
            "data is not valid JSON (",
        ),
        (
            and("data", "[".repeat(200) + &"]".repeat(200)),
            "data is not valid JSON (",
        ),
        (
            document(r#"{"type":"t","data":{"cut":"\ud83d"}}"#),
            "data is not valid JSON",
        ),
        (
            and("data", format!("\"{}\"", "x".repeat(2 * 1024 * 1024))),
            "the limit is 262144 ([ingest] max_event_bytes)",
        ),
        (and("x".repeat(2 * 1024 * 1024), ""), "the limit is 262144"),
        (
            and("x".repeat(100_000), ""),
            "is not a valid attribute name",
        ),
        (
            and("data\nid", "forged"),
            "'data\\nid' is not a valid attribute name",
        ),
        (and("a\0b", "v"), "'a\\0b' is not a valid attribute name"),
        (and("\u{1b}[2J", "v"), "is not a valid attribute name"),
        (and("User", "43"), "'User' is not a valid attribute name"),
        (and("__proto__.x", "v"), "is not a valid attribute name"),
        (and(b"\xff\xff", "v"), "a field name is not UTF-8"),
        (and("colour", b"\xff"), "colour is not UTF-8"),
        (
            and("id", "a\nid: forged"),
            "id contains the control character U+000A",
        ),
        (
            and("id", "x".repeat(257)),
            "id has 257 bytes; the limit is 256",
        ),
        (
            and("source", "/shop\0"),
            "source contains the control character U+0000",
        ),
        (
            and("subject", "\u{85}"),
            "subject contains the control character U+0085",
        ),
        (
            fields(&[("type", "t\r\ndata: forged"), ("user", "42")]),
            "type contains the control character U+000D",
        ),
        (
            fields(&[("type", "t"), ("user", "4\n2")]),
            "user contains the control character U+000A",
        ),
        (
            fields(&[("type", "t"), ("user", "")]),
            "the attribute user is ''; use a non-empty text",
        ),
        // The line feed is escaped, so that it appears only when the plugin, and then the reader of
        // its result, decodes it.
        (
            document(r#"{"type":"t","users":["42","4\n2"]}"#),
            "the user contains the control character U+000A",
        ),
        (
            document(r#"{"type":66666666666666666666666,"user":"42"}"#),
            "type must be a string",
        ),
        (
            document(r#"{"type":"t","subject":["a"],"user":"42"}"#),
            "subject must be a string",
        ),
        (
            document(r#"{"type":"t","users":["42",4.5]}"#),
            "use comma-separated names",
        ),
        (
            fields(&[("type", "t"), ("user", &"x".repeat(300))]),
            "the user has 300 bytes; the limit is 256",
        ),
        (
            fields(&[("type", "t"), ("users", &users(10_001))]),
            "the limit is 10000 (max_targets)",
        ),
        (
            fields(&[("type", "t"), ("users", &"u,".repeat(40_000))]),
            "users has 80000 bytes; the limit is 65536",
        ),
        (
            and("priority", "highest"),
            "use low, normal, high or urgent",
        ),
        (and("ttl", "-1"), "use a number of seconds above 0"),
        (
            and("time", "yesterday"),
            "time 'yesterday' is not a valid RFC 3339 time",
        ),
        (
            and("specversion", "0.3"),
            "specversion is '0.3'; only 1.0 is supported",
        ),
        (and("data_base64", "AAE="), "put the raw bytes into 'data'"),
        (
            thousands(65),
            "the event has more than 64 extension attributes",
        ),
        (
            thousands(3_000),
            "the event has more than 64 extension attributes",
        ),
    ]
}

#[test]
fn an_invalid_entry_becomes_one_dead_letter_with_the_reason_and_its_exact_fields() {
    let server = RedisServer::start();
    let node = Node::builder().redis(server.url()).config(LEAN).start();
    let mut stream = node.stream("42");
    let mut connection = server.connection();
    let cases = bad_entries();
    let mut entries = Vec::new();
    for (n, (bad, _)) in cases.iter().enumerate() {
        entries.push(add(&mut connection, bad));
        add(
            &mut connection,
            &fields(&[
                ("type", "good"),
                ("user", "42"),
                ("id", &n.to_string()),
                ("data", "[]"),
            ]),
        );
    }
    for (n, (_, expected)) in cases.iter().enumerate() {
        assert_eq!(
            stream.next_notification(SOON).id,
            n.to_string(),
            "the event after {expected:?}"
        );
    }
    let mut dead = dead_letters(&node);
    assert_eq!(dead.len(), cases.len());
    for ((bad, expected), entry) in cases.iter().zip(&entries) {
        let (id, letter, kept) = dead
            .remove(entry)
            .unwrap_or_else(|| panic!("no dead letter for {expected:?}"));
        let reason = letter["reason"].as_str().expect("a reason");
        assert!(
            reason.contains(expected),
            "{expected:?} is missing from {reason:?}"
        );
        assert_harmless(reason);
        assert!(
            kept == *bad,
            "the fields changed: {reason}, {} of {}",
            kept.len(),
            bad.len()
        );
        assert_eq!(
            (letter["source"].as_str(), id.starts_with("0/")),
            (Some("pointsman:events"), true)
        );
        // A plugin that returns an invalid result is called a second time, on a fresh instance.
        let most = if letter.get("plugin").is_some() { 2 } else { 1 };
        assert!(
            letter["attempts"]
                .as_u64()
                .is_some_and(|attempts| (1..=most).contains(&attempts)),
            "{letter}"
        );
    }
    // Exactly one outcome each, in the counters and in the records.
    assert_eq!(
        (
            outcomes(&node, "dead-lettered"),
            outcomes(&node, "committed")
        ),
        (cases.len() as f64, cases.len() as f64)
    );
    let decisions = node.admin("/v1/decisions?limit=1000").json();
    let decisions = decisions.as_array().expect("a list");
    let dead = decisions
        .iter()
        .filter(|decision| decision["outcome"] == "dead-lettered");
    // Also where no plugin was called.
    dead.clone().for_each(|decision| {
        assert!(
            decision["reason"]
                .as_str()
                .is_some_and(|reason| !reason.is_empty()),
            "{decision}"
        )
    });
    let dead: HashSet<&str> = dead
        .map(|decision| decision["entry"].as_str().expect("an entry"))
        .collect();
    assert_eq!(
        (decisions.len(), dead),
        (
            2 * cases.len(),
            entries.iter().map(String::as_str).collect()
        )
    );
    assert_calm(&node);
    the_command_line_shows_what_is_dead(&node, &entries[0]);
}

/// Exercises `pointsman dead-letters` as an operator uses it.
fn the_command_line_shows_what_is_dead(node: &Node, entry: &str) {
    let dead = |arguments: &[&str]| {
        let output = pointsman(&[&["dead-letters"], arguments].concat())
            .env("POINTSMAN_URL", node.url(""))
            .output()
            .expect("run pointsman");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).expect("text")
    };
    let list = dead(&["list"]);
    let lines: Vec<&str> = list.lines().collect();
    assert!(lines[0].starts_with("ID  "), "{list}");
    assert_eq!(
        lines.len(),
        1 + bad_entries().len(),
        "one line each: {list}"
    );
    lines.iter().for_each(|line| assert_harmless(line));
    let columns: Vec<&str> = lines
        .iter()
        .find(|line| line.contains(entry))
        .expect("the first entry")
        .split_whitespace()
        .collect();
    assert_eq!(columns[1..5], ["pointsman:events", entry, "1", "-"]);
    let shown: Value = serde_json::from_str(&dead(&["show", columns[0]])).expect("JSON");
    assert_eq!(
        shown["fields"],
        json!([{ "name": "source", "value": "/shop" }, { "name": "user", "value": "42" }])
    );
    dead(&["drop", "--all"]);
    assert_eq!(dead(&["list"]), "");
}

#[test]
fn unusual_but_valid_entries_arrive_unchanged() {
    let server = RedisServer::start();
    let node = Node::builder().redis(server.url()).config(LEAN).start();
    let mut stream = node.stream("42");
    let mut last_of_many = node.stream("u8999");
    let mut connection = server.connection();
    // More than 127 levels are rejected: no plugin could find a field in it.
    let deep = format!("{}{}", "[".repeat(127), "]".repeat(127));
    let large = format!("\"{}\"", "x".repeat(250 * 1024));
    let separators = "\"\u{2028}\u{2029}\u{feff}\u{85}\\u0000\\r\\n\"";
    let users: Vec<String> = (0..9_000).map(|n| format!("u{n}")).collect();
    for (data, more) in [
        (
            b"\x80\xff\0\n".as_slice(),
            vec![("datacontenttype", "application/octet-stream")],
        ),
        (b"two\nlines\r\0", vec![("datacontenttype", "text/plain")]),
        (deep.as_bytes(), vec![]),
        (large.as_bytes(), vec![]),
        (
            separators.as_bytes(),
            vec![("id", "\u{2028}\u{202e}\"{}:"), ("subject", "</script>")],
        ),
        (b"1", vec![("users", &users.join(","))]),
    ] {
        let mut entry = and("data", data);
        entry.extend(fields(&more));
        add(&mut connection, &entry);
    }
    // Also through `GET /v1/notifications`.
    assert_eq!(last_of_many.next_notification(SOON).data, 1);
    assert_eq!(node.request("GET", "/v1/notifications?user=42").status, 200);
    // Compares raw frames: one of them, with its payload, is nested more deeply than this test's
    // parser supports.
    let mut data = || {
        stream
            .next_frame(SOON)
            .expect("a frame")
            .data
            .expect("data")
    };
    assert!(data().contains(&format!(
        "\"data_base64\":\"{}\"",
        STANDARD.encode(b"\x80\xff\0\n")
    )));
    let parsed = |data: String| serde_json::from_str::<Value>(&data).expect("JSON");
    assert_eq!(parsed(data())["data"], "two\nlines\r\0");
    assert!(data().contains(&deep));
    assert!(data().contains(&large));
    let odd = parsed(data());
    assert_eq!(
        (&odd["data"], &odd["id"]),
        (
            &json!("\u{2028}\u{2029}\u{feff}\u{85}\0\r\n"),
            &json!("\u{2028}\u{202e}\"{}:")
        )
    );
    assert_eq!(parsed(data())["data"], 1);
    assert_eq!(
        (
            outcomes(&node, "committed"),
            outcomes(&node, "dead-lettered")
        ),
        (6.0, 0.0)
    );
    assert_calm(&node);
}

#[test]
fn an_invalid_plugin_result_becomes_a_dead_letter_that_names_the_plugin_and_forges_no_frame() {
    let folder = Folder::new();
    fs::write(
        folder.path().join("unruly.wasm"),
        guests::core_module("unruly"),
    )
    .expect("write a plugin");
    let node = Node::builder().plugins(folder.path()).start();
    let mut stream = node.stream("42");
    let cases = [
        (
            "name-with-a-line-feed",
            "the event name contains the control character U+000A",
        ),
        ("reserved-name", "the event name 'cursor' is reserved"),
        (
            "user-with-a-line-feed",
            "the user contains the control character U+000A",
        ),
        ("empty-group", "the group is empty"),
        ("body-of-no-json", "the body is not valid JSON"),
        ("many-targets", "the limit is 10000 (max_targets)"),
        ("huge-answer", "result_kib"),
        ("panic", "requested by the event type"),
    ];
    for (kind, _) in cases {
        node.publisher().publish(&[
            event(kind, kind, json!({})),
            event(&format!("after {kind}"), "good", json!({})),
        ]);
        assert_eq!(stream.next_notification(SOON).id, format!("after {kind}"));
    }
    let dead = dead_letters(&node);
    let mut reasons = dead.values().map(|(_, letter, _)| {
        (
            letter["reason"].as_str().expect("a reason"),
            letter["plugin"].as_str(),
        )
    });
    for (kind, expected) in cases {
        let (reason, plugin) = reasons.next().expect("one dead letter per case");
        assert!(
            reason.contains(expected) && plugin == Some("unruly"),
            "{kind}: {expected:?} is missing from {reason:?}"
        );
        assert_harmless(reason);
    }
    assert_eq!(reasons.next(), None);
    assert!(!stream.text().contains("forged"), "{stream:?}");
}

const STRUCTURED: (&str, &str) = ("content-type", "application/cloudevents+json");
const OCTETS: (&str, &str) = ("content-type", "application/octet-stream");
const BATCH: (&str, &str) = ("content-type", "application/cloudevents-batch+json");

#[test]
fn an_invalid_post_returns_4xx_with_the_reason_and_stores_nothing() {
    let node = Node::builder().config(LEAN).start();
    let mut stream = node.stream("42");
    let large = |bytes: usize| {
        format!(
            r#"{{"type":"t","user":"42","data":"{}"}}"#,
            "x".repeat(bytes)
        )
        .into_bytes()
    };
    let list = |n: usize| format!("[{}]", vec![r#"{"type":"t"}"#; n].join(",")).into_bytes();
    let text = |text: &str| text.as_bytes().to_vec();
    type Case<'a> = (&'a [(&'a str, &'a str)], Vec<u8>, u16, &'a str);
    let cases: Vec<Case<'_>> = vec![
        (
            &[STRUCTURED],
            text(""),
            400,
            "the CloudEvents document is not a JSON object",
        ),
        (
            &[STRUCTURED],
            text("{}"),
            400,
            "type is missing; every event needs one",
        ),
        (&[STRUCTURED], text(r#"{"type":"#), 400, "not a JSON object"),
        (
            &[STRUCTURED],
            text(&"[".repeat(200_000)),
            400,
            "not a JSON object",
        ),
        (
            &[STRUCTURED],
            vec![0xff, 0, 0x80],
            400,
            "the CloudEvents document is not UTF-8",
        ),
        (
            &[STRUCTURED],
            text(r#"{"type":"t","a\nb":"v"}"#),
            400,
            "'a\\nb' is not a valid attribute name",
        ),
        (
            &[STRUCTURED],
            text(r#"{"type":"t","id":"\u0000"}"#),
            400,
            "id contains the control character U+0000",
        ),
        (
            &[STRUCTURED],
            text(r#"{"type":"t\r\ndata: x"}"#),
            400,
            "type contains the control character U+000D",
        ),
        (
            &[STRUCTURED],
            text(r#"{"type":"t","user":"4\n2"}"#),
            400,
            "user contains the control character U+000A",
        ),
        (
            &[STRUCTURED],
            text(r#"{"type":"t","ttl":1e999}"#),
            400,
            "ttl is not a valid attribute value",
        ),
        (
            &[STRUCTURED],
            large(2 * 1024 * 1024),
            413,
            "the body is larger than 262144 bytes",
        ),
        (
            &[STRUCTURED],
            large(262_144),
            413,
            "the body is larger than 262144 bytes",
        ),
        (
            &[("ce-type", "t"), OCTETS],
            vec![0; 2 * 1024 * 1024],
            413,
            "the body is larger than 262144 bytes",
        ),
        (
            &[("ce-id", "a"), OCTETS],
            vec![0xff],
            400,
            "type is missing",
        ),
        (
            &[("ce-type", "a%0Ab")],
            text(""),
            400,
            "type contains the control character U+000A",
        ),
        (&[("ce-type", "a%FF")], text(""), 400, "type is not UTF-8"),
        (
            &[("ce-type", "t"), ("ce-user", "4%0A2")],
            text(""),
            400,
            "user contains the control character U+000A",
        ),
        (
            &[("ce-type", "t"), ("ce-a-b", "v")],
            text(""),
            400,
            "'a-b' is not a valid attribute name",
        ),
        (
            &[("ce-", "t")],
            text(""),
            400,
            "'' is not a valid attribute name",
        ),
        (
            &[("content-type", "image/png")],
            vec![0x89],
            415,
            "cannot read an event from content type 'image/png'",
        ),
        (
            &[BATCH],
            text("{}"),
            400,
            "the batch is not a JSON array of events",
        ),
        (&[BATCH], vec![b'[', 0xff], 400, "the batch is not UTF-8"),
        (
            &[BATCH],
            list(10_001),
            413,
            "the batch has 10001 events; the limit is 10000",
        ),
        (
            &[BATCH],
            vec![b' '; 5 * 1024 * 1024],
            413,
            "the body is larger than 4194304 bytes",
        ),
    ];
    for (n, (headers, body, status, expected)) in cases.iter().enumerate() {
        let answer = node.send("POST", "/v1/events", headers, body);
        assert_eq!(answer.status, *status, "{expected:?}: {answer:?}");
        let error = answer.json()["error"]
            .as_str()
            .expect("an error")
            .to_owned();
        assert!(
            error.contains(expected),
            "{expected:?} is missing from {error:?}"
        );
        assert_harmless(&error);
        node.publisher()
            .publish(&[event(&n.to_string(), "good", json!({ "user": "42" }))]);
        assert_eq!(stream.next_notification(SOON).id, n.to_string());
    }
    let answer = node.send("POST", "/v1/events?dry_run=perhaps", &[STRUCTURED], b"{}");
    assert_eq!(answer.status, 400, "{answer:?}");
    // In a batch, invalid events are rejected permanently, each with its reason, and the others are
    // stored.
    let large = String::from_utf8(large(262_144)).expect("text");
    let batch = format!(
        r#"[1, {{"user":"42"}}, {large}, {{"type":"t","id":"\n"}}, {{"type":"t","id":"last","user":"42"}}]"#
    );
    let receipts = node
        .send("POST", "/v1/events", &[BATCH], batch.as_bytes())
        .json();
    let receipts: Vec<&Value> = receipts["events"]
        .as_array()
        .expect("a list")
        .iter()
        .collect();
    for (receipt, expected) in receipts.iter().zip([
        "not a JSON object",
        "type is missing",
        "the limit is 262144",
        "U+000A",
    ]) {
        assert_eq!(receipt["status"], "refused", "{receipt}");
        assert!(
            receipt["error"]
                .as_str()
                .is_some_and(|error| error.contains(expected)),
            "{expected:?} is missing from {receipt}"
        );
    }
    assert_eq!(
        (receipts.len(), &receipts[4]["status"]),
        (5, &json!("stored"))
    );
    assert_eq!(stream.next_notification(SOON).id, "last");
    let all = cases.len() as f64 + 1.0;
    eventually(SOON, "every event has its outcome", || {
        (node.metric("pointsman_events_total") >= all).then_some(())
    });
    assert_eq!(
        (
            node.metric("pointsman_events_total"),
            outcomes(&node, "committed")
        ),
        (all, all)
    );
    assert_calm(&node);
}

/// Sends bytes and returns the response: one complete response, the beginning of a stream, or
/// everything until the node closes.
fn say(addr: SocketAddr, bytes: &[u8]) -> String {
    let mut socket = TcpStream::connect(addr).expect("connect");
    socket.set_read_timeout(Some(SOON)).expect("set a timeout");
    // The node may respond and close before it has read everything.
    drop(socket.write_all(bytes));
    let (mut answer, mut buffer) = (String::new(), [0; 4096]);
    while let Ok(n @ 1..) = socket.read(&mut buffer) {
        answer.push_str(&String::from_utf8_lossy(&buffer[..n]));
        let Some((head, body)) = answer.split_once("\r\n\r\n") else {
            continue;
        };
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
        if length.map_or_else(
            || body.contains(": pointsman"),
            |length: usize| body.len() >= length,
        ) {
            break;
        }
    }
    answer
}

#[test]
fn no_request_bytes_make_a_node_panic_or_respond_5xx() {
    let node = Node::builder()
        .config(&format!("[listen]\nheader_timeout = '1s'\n{LEAN}"))
        .start();
    let stream = |query: &str, headers: &[u8]| {
        [
            format!("GET /v1/stream{query} HTTP/1.1\r\nHost: localhost\r\n").as_bytes(),
            headers,
            b"\r\n",
        ]
        .concat()
    };
    let id = |id: &[u8]| stream("?user=42", &[b"Last-Event-ID: ", id, b"\r\n"].concat());
    let many = b"X-A: b\r\n".repeat(200);
    let mut requests = vec![
        (stream("", b""), &[401][..]),
        (stream("?user=", b""), &[401]),
        (stream("?user=a%0Ab", b""), &[401]),
        (stream("?user=%ff", b""), &[200, 401]),
        (stream("?user=%zz%", b""), &[200, 401]),
        (stream(&format!("?user={}", "x".repeat(257)), b""), &[401]),
        (stream(&format!("?user={}", "x".repeat(100_000)), b""), &[414, 431]),
        (stream("?user=42&user=43", b""), &[200, 400]),
        (stream("?user=42&min_priority=%00", b""), &[400]),
        (stream("?user=42&types=,,*,%0A,**", b""), &[200]),
        (stream("?user=42&types=*.shipped", b""), &[400]),
        (stream("?user=42&last_event_id=a&last_event_id=b", b""), &[200, 400]),
        (stream("?user=42&last_event_id=%00%0A", b""), &[200]),
        (stream("?user=42&lastEventId=-1", b""), &[200]),
        (stream("?user=42", &many), &[431]),
        (stream("?user=42", b"Accept: \xff\xff\r\nCookie: \xff;=;\r\nAuthorization: Bearer \xff\r\nOrigin: \xff\r\n"), &[200, 400]),
        (stream("?user=42", b"Authorization: Bearer a.b.c\r\n"), &[200, 401]),
        (stream("?user=42", b"Content-Length: -1\r\n"), &[400]),
        (stream("?user=42", b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n"), &[200, 400]),
        (b"GET /v1/stream?user=42 HTTP/9.9\r\n\r\n".to_vec(), &[400, 505]),
        (b"POST /v1/events HTTP/1.1\r\nHost: localhost\r\nContent-Type: \xff\r\nContent-Length: 2\r\n\r\n{}".to_vec(), &[400, 415]),
        (b"POST /v1/events HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n".to_vec(), &[400]),
        (b"DELETE /v1/dead-letters/999/18446744073709551616-0 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".to_vec(), &[400, 404]),
        (b"GET /v1/dead-letters/0/0-0 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".to_vec(), &[404]),
        (b"GET /v1/dead-letters?limit=-1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".to_vec(), &[400]),
        (b"GET /v1/dead-letters?after=%00 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".to_vec(), &[400]),
        (b"GET /v1/notifications?user=42&limit=0&after=%00 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".to_vec(), &[400]),
        (b"GET /v1/notifications?user=42&after=%ff%00 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".to_vec(), &[200]),
        (b"PUT /v1/groups/a%0Ab/members/42 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_vec(), &[400]),
        (b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".to_vec(), &[404]),
    ];
    for given in [
        &b"\xff\xfe"[..],
        b"\x01",
        b"1",
        b"-",
        b"18446744073709551615",
        b"../../../etc/passwd",
        b"1AABB",
        b"99999999d",
        b"1____________________________________________________________________________________________________________________________",
        &b"A".repeat(4_000),
    ] {
        // The HTTP layer rejects a header with a control character; everything else is an unknown
        // position.
        requests.push((id(given), if given == b"\x01" { &[400] } else { &[200] }));
    }
    for (request, expected) in requests {
        let shown = String::from_utf8_lossy(&request[..request.len().min(300)]).into_owned();
        let answer = say(node.addr(), &request);
        let status = answer
            .split(' ')
            .nth(1)
            .and_then(|code| code.parse::<u16>().ok());
        assert!(
            status.is_some_and(|status| expected.contains(&status)),
            "expected one of {expected:?} for {shown:?}: {answer:?}"
        );
    }
    // Bytes that are not an HTTP request get no response, or a short one.
    for noise in [
        &b"\0\0\0\0"[..],
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\r\n\r\n\r\n",
    ] {
        let answer = say(node.addr(), noise);
        assert!(!answer.contains(" 50"), "{answer:?}");
    }
    let mut stream = node.stream("42");
    node.publisher()
        .publish(&[event("after", "t", json!({ "user": "42" }))]);
    assert_eq!(stream.next_notification(SOON).id, "after");
    assert_calm(&node);
}

#[test]
fn an_unreadable_last_event_id_yields_a_gap_and_later_notifications_arrive() {
    let node = Node::builder().config(LEAN).start();
    let mut stream = node.stream("42");
    node.publisher()
        .publish(&[event("before", "t", json!({ "user": "42" }))]);
    assert_eq!(stream.next_notification(SOON).id, "before");
    let open = |id: &str| {
        Request::new(node.addr(), "user=42")
            .last_event_id(id)
            .open(SOON)
            .unwrap_or_else(|refused| panic!("{refused:?}"))
    };
    let mut own = stream.last_event_id().to_owned();
    // Moves a mark into the future, as a forged cursor would.
    own.replace_range(own.len() - 9..own.len() - 6, "f--");
    let gap = |stream: &mut Stream| stream.next_state("gap", SOON).data.expect("data");
    for (id, reason) in [
        ("garbled", "unknown"),
        ("1", "unknown"),
        ("ünïcode", "unknown"),
        (own.as_str(), "rewound"),
    ] {
        let mut hostile = open(id);
        let announced: Value = serde_json::from_str(&gap(&mut hostile)).expect("JSON");
        assert_eq!(announced["reason"], reason, "for {id:?}: {hostile:?}");
        // The cursor that follows the gap makes the client's position valid again.
        hostile.next_state("cursor", SOON);
        node.publisher()
            .publish(&[event(id, "t", json!({ "user": "42" }))]);
        assert_eq!(hostile.next_notification(SOON).id, id);
        assert_eq!(stream.next_notification(SOON).id, id);
    }
    // A cursor of another user does not apply to this user, so nothing is missing.
    let others = node.stream("43").last_event_id().to_owned();
    let mut stream = open(&others);
    stream.next_state("cursor", SOON);
    node.publisher()
        .publish(&[event("last", "t", json!({ "user": "42" }))]);
    assert_eq!(stream.next_notification(SOON).id, "last");
    let OpenError { status, text } = Request::new(node.addr(), "user=42&min_priority=most")
        .open(SOON)
        .expect_err("a rejection");
    assert!(
        status == Some(400)
            && text.contains("not a valid priority; use low, normal, high or urgent"),
        "{text}"
    );
}

#[test]
fn an_invalid_plugin_file_is_named_in_log_and_readiness_and_valid_plugins_run() {
    let folder = Folder::new();
    let address = guests::core_module("address");
    let wrong = wat::parse_str("(module (func (export \"run\")))").expect("a module");
    fs::write(folder.path().join("address.wasm"), &address).expect("write a file");
    let node = Node::builder().plugins(folder.path()).start();
    for (name, bytes) in [
        ("truncated.wasm", &address[..address.len() / 2]),
        ("empty.wasm", b""),
        ("text.wasm", b"#!/bin/sh\n"),
        ("wrong.wasm", &wrong),
        ("notes.txt", b"not a plugin"),
    ] {
        fs::write(folder.path().join(name), bytes).expect("write a file");
    }
    fs::create_dir(folder.path().join("folder.wasm")).expect("make a folder");
    eventually(SOON, "every invalid file is named", || {
        let body = node.admin("/readyz").body;
        (body.lines().count() == 5).then_some(())
    });
    let follower = node.follower("42");
    node.publisher()
        .publish(&[event("a", "t", json!({ "user": "42" }))]);
    follower.wait(SOON, "a notification", |record| {
        !record.notifications.is_empty()
    });
    let ready = node.admin("/readyz");
    assert_eq!(ready.status, 503, "{ready:?}");
    let log = node.log();
    for name in ["truncated", "empty", "text", "wrong", "folder"] {
        let line = ready
            .body
            .lines()
            .find(|line| line.starts_with(&format!("plugins.{name}: ")))
            .unwrap_or_else(|| panic!("{name}: {ready:?}"));
        assert!(
            line.contains(&format!("{name}.wasm")),
            "the file name is missing: {line}"
        );
        assert_harmless(line);
        let (_, reason) = line.split_once(": ").expect("a name before it");
        assert!(
            log.contains(reason),
            "{reason:?} is missing from the log: {log}"
        );
    }
    assert_eq!(ready.body.lines().count(), 5, "{}", ready.body);
    assert_calm(&node);
}

#[test]
fn dead_letters_are_counted_warned_of_below_the_limit_and_counted_when_trimmed() {
    let server = RedisServer::start();
    let config = format!("{LEAN}\n[retention]\ndead_letter_entries = 10");
    for builder in [Node::builder(), Node::builder().redis(server.url())] {
        let node = builder.config(&config).start();
        let die = |n: usize| {
            let bad = |n: usize| event(&format!("bad-{n}"), "t", json!({ "ttl": "soon" }));
            node.publisher()
                .publish(&(0..n).map(bad).collect::<Vec<_>>());
        };
        let of_source =
            |name: &str| node.metric(&format!("pointsman_{name}{{source=\"pointsman:events\"}}"));
        let warning = || {
            node.admin("/readyz")
                .body
                .lines()
                .find(|line| line.contains("dead-letters"))
                .map(str::to_owned)
        };
        die(7);
        eventually(SOON, "the dead letters are counted", || {
            (of_source("dead_letters") == 7.0).then_some(())
        });
        assert_eq!(warning(), None);
        die(1);
        let line = eventually(SOON, "the warning appears", warning);
        assert!(
            line.starts_with("warning: dead-letters: 8 in pointsman:events; the oldest beyond 10 per source are deleted; redrive"),
            "{line}"
        );
        assert_eq!(node.admin("/readyz").status, 200);
        die(5);
        eventually(SOON, "trimmed dead letters are counted", || {
            (of_source("dead_letters_trimmed_total") == 3.0).then_some(())
        });
        assert_eq!(of_source("dead_letters"), 10.0);
        output_of(pointsman(&["dead-letters", "drop", "--all"]).env("POINTSMAN_URL", node.url("")));
        eventually(SOON, "the warning disappears", || {
            warning().is_none().then_some(())
        });
    }
}

/// The entry is never transferred, so neither its size nor a slow network makes later events wait.
#[test]
fn a_very_large_entry_becomes_a_dead_letter_with_its_beginning_and_later_events_are_delivered() {
    let server = RedisServer::start();
    // Transferred, the entries would take longer than any deadline.
    let link = Proxy::to(server.port());
    link.slow_answers_to(2 * 1024 * 1024);
    let node = Node::builder().redis(link.url()).config(LEAN).start();
    let mut stream = node.stream("42");
    let mut connection = server.connection();
    // The first is met by a node that waits, the second by one that is behind.
    let large = and("data", "x".repeat(48 * 1024 * 1024));
    let entries = [add(&mut connection, &large), add(&mut connection, &large)];
    let later: Vec<String> = (0..5).map(|n| n.to_string()).collect();
    for id in &later {
        let event = fields(&[("type", "t"), ("user", "42"), ("id", id)]);
        add(&mut connection, &event);
    }
    for id in &later {
        assert_eq!(&stream.next_notification(SOON).id, id);
    }
    let dead = dead_letters(&node);
    assert_eq!(
        dead.keys().collect::<Vec<_>>(),
        entries.iter().collect::<Vec<_>>()
    );
    for (id, letter, kept) in dead.values() {
        let size = letter["entry_bytes"].as_u64().expect("a size");
        assert!(size > 48 * 1024 * 1024, "{letter}");
        assert!(
            letter["reason"].as_str().is_some_and(
                |reason| reason.contains("the limit is 262144 ([ingest] max_event_bytes)")
            ),
            "{letter}"
        );
        assert_eq!(kept[..2], large[..2]);
        assert!(kept[2].1.len() < 1_024 && kept[2].1.iter().all(|&byte| byte == b'x'));
        let redriven = node.request("POST", &format!("/v1/dead-letters/{id}/redrive"));
        assert_eq!(redriven.status, 409, "{redriven:?}");
        assert!(redriven.body.contains("smaller parts"), "{redriven:?}");
    }
    assert_calm(&node);
}

/// Ids in seconds, then in microseconds, then the largest one: no time is taken from any of them,
/// and events are accepted and delivered afterwards.
#[test]
fn ids_that_are_not_the_time_of_day_do_no_harm() {
    let server = RedisServer::start();
    let node = Node::builder().redis(server.url()).config(LEAN).start();
    let mut stream = node.stream("42");
    let mut connection = server.connection();
    let now = pointsman::event::rfc3339(pointsman::clock::now_ms());
    let (year, last) = (&now[..4], "18446744073709551615-18446744073709551615");
    for (n, id) in ["1700000000-1", "1700000000000000-1", last]
        .iter()
        .enumerate()
    {
        let id_of_event = n.to_string();
        redis::cmd("XADD")
            .arg("pointsman:events")
            .arg(id)
            .arg(&[("type", "t"), ("user", "42"), ("id", &id_of_event)])
            .exec(&mut connection)
            .expect("XADD");
        if *id != last {
            let notification = stream.next_notification(SOON);
            assert_eq!(notification.id, id_of_event);
            assert!(notification.time.starts_with(year), "{notification:?}");
        }
    }
    let body = serde_json::to_vec(&event("posted", "t", json!({ "user": "42" }))).expect("JSON");
    let json = [("Content-Type", "application/cloudevents+json")];
    assert_eq!(node.send("POST", "/v1/events", &json, &body).status, 202);
    assert_eq!(stream.next_notification(SOON).id, "posted");
    let dead = dead_letters(&node);
    assert_eq!(dead.keys().collect::<Vec<_>>(), [last]);
    eventually(SOON, "readiness warns of the ids", || {
        let ready = node.admin("/readyz");
        let is_shown = ready
            .body
            .contains("warning: sources.pointsman:events.ids: ")
            && ready.body.contains("are not the time of day");
        (ready.status == 200 && is_shown).then_some(())
    });
    assert_calm(&node);
}
