//! Whatever is thrown at a node, by `XADD`, by `POST`, by a client of a stream or into the folder of plugins: each thing ends in exactly one
//! outcome that names the fix, and the next event is right.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::harness::command::{pointsman, told};
use crate::harness::node::{Folder, Node, SOON};
use crate::harness::publish::event;
use crate::harness::redis::RedisServer;
use crate::harness::sse::{Refused, Request, Stream};
use crate::harness::{eventually, guests};

/// As little to compile at the start as there can be.
const LEAN: &str = "[plugins.discard]\nenabled = false";

type Fields = Vec<(Vec<u8>, Vec<u8>)>;

/// Fields of an entry.
fn fields(pairs: &[(&str, &str)]) -> Fields {
    pairs
        .iter()
        .map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec()))
        .collect()
}

/// Fields of an entry, after those of an event that would be fine.
fn and(name: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Fields {
    let mut all = fields(&[("type", "t"), ("user", "42")]);
    all.push((name.as_ref().to_vec(), value.as_ref().to_vec()));
    all
}

/// The one field of an entry that is a CloudEvents document.
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

/// What one must be able to read in a terminal and a log without harm.
fn assert_harmless(text: &str) {
    assert!(
        !text.is_empty() && text.chars().all(|c| !c.is_control()),
        "{text:?}"
    );
}

/// The node went through it all without a panic.
fn assert_calm(node: &Node) {
    let log = node.log();
    assert!(!log.contains("panicked"), "{log}");
}

fn outcomes(node: &Node, outcome: &str) -> f64 {
    node.metric(&format!("pointsman_events_total{{outcome=\"{outcome}\"}}"))
}

/// The dead letters of a node, with their fields, by the entry that each was.
fn dead_letters(node: &Node) -> BTreeMap<String, (String, Value, Fields)> {
    let list = node.request("GET", "/v1/dead?limit=1000").json();
    assert_eq!(list.get("next"), None);
    let letters = list["dead"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|listed| {
            let id = listed["id"].as_str().expect("an id").to_owned();
            let shown = node.request("GET", &format!("/v1/dead/{id}")).json();
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

/// Entries that are none, and what must be said of each.
fn bad_entries() -> Vec<(Fields, &'static str)> {
    let thousands = |n: usize| {
        let mut many = fields(&[("type", "t"), ("user", "42")]);
        many.extend((0..n).map(|n| (format!("f{n}").into_bytes(), b"v".to_vec())));
        many
    };
    // Short ones: the attribute itself must not be too long.
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
        (and("type", "u"), "type stands twice"),
        (fields(&[("type", ""), ("user", "42")]), "type is empty"),
        (
            fields(&[("", "")]),
            "'' is no attribute name: 1 to 64 of a-z, 0-9 and _",
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
            "the CloudEvents document is not UTF-8",
        ),
        (document(r#"{"type":"t","type":"t"}"#), "type stands twice"),
        (document(r#"{"type":{"a":1}}"#), "type is an object"),
        (
            document(r#"{"type":"t","data":1,"data_base64":"AA=="}"#),
            "data and data_base64 exclude each other",
        ),
        (
            document(r#"{"type":"t","data_base64":"?"}"#),
            "data_base64 is not base64",
        ),
        (and("event", "{}"), "event must be the only field"),
        // JSON by its grammar, in which nobody could find a field.
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
            "262144 is the most ([ingest] max_event_bytes)",
        ),
        (and("x".repeat(2 * 1024 * 1024), ""), "262144 is the most"),
        (and("x".repeat(100_000), ""), "is no attribute name"),
        (
            and("data\nid", "forged"),
            "'data\\nid' is no attribute name",
        ),
        (and("a\0b", "v"), "'a\\0b' is no attribute name"),
        (and("\u{1b}[2J", "v"), "is no attribute name"),
        (and("User", "43"), "'User' is no attribute name"),
        (and("__proto__.x", "v"), "is no attribute name"),
        (and(b"\xff\xff", "v"), "a field name is not UTF-8"),
        (and("colour", b"\xff"), "colour is not UTF-8"),
        (
            and("id", "a\nid: forged"),
            "id has the control character U+000A",
        ),
        (
            and("id", "x".repeat(257)),
            "id has 257 bytes; 256 is the most",
        ),
        (
            and("source", "/shop\0"),
            "source has the control character U+0000",
        ),
        (
            and("subject", "\u{85}"),
            "subject has the control character U+0085",
        ),
        (
            fields(&[("type", "t\r\ndata: forged"), ("user", "42")]),
            "type has the control character U+000D",
        ),
        (
            fields(&[("type", "t"), ("user", "4\n2")]),
            "user has the control character U+000A",
        ),
        (
            fields(&[("type", "t"), ("user", "")]),
            "the attribute user is ''; give it a text that is not empty",
        ),
        // Escaped, so that only the plugin, and then whoever reads its answer, gets to see the line feed itself.
        (
            document(r#"{"type":"t","users":["42","4\n2"]}"#),
            "the user has the control character U+000A",
        ),
        (
            document(r#"{"type":"t","users":["42",43]}"#),
            "give it names with commas between them",
        ),
        (
            fields(&[("type", "t"), ("user", &"x".repeat(300))]),
            "the user has 300 bytes; 256 is the most",
        ),
        (
            fields(&[("type", "t"), ("users", &users(10_001))]),
            "10000 is the most (max_targets)",
        ),
        (
            fields(&[("type", "t"), ("users", &"u,".repeat(40_000))]),
            "users has 80000 bytes; 65536 is the most",
        ),
        (
            and("priority", "highest"),
            "it is low, normal, high or urgent",
        ),
        (and("ttl", "-1"), "give it a number of seconds above 0"),
        (
            and("time", "yesterday"),
            "time 'yesterday' is no RFC 3339 time",
        ),
        (
            and("specversion", "0.3"),
            "specversion is '0.3'; only 1.0 is spoken",
        ),
        (
            and("data_base64", "AAE="),
            "give the bytes as they are in 'data'",
        ),
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
fn a_bad_entry_is_one_dead_letter_with_the_fix_and_its_fields_byte_for_byte_and_the_next_event_is_right()
 {
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
            "what comes after {expected:?}"
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
            "{expected:?} is not in {reason:?}"
        );
        assert_harmless(reason);
        assert!(
            kept == *bad,
            "the fields are not as they were: {reason}, {} of {}",
            kept.len(),
            bad.len()
        );
        assert_eq!(
            (letter["source"].as_str(), id.starts_with("0/")),
            (Some("pointsman:events"), true)
        );
        // A plugin whose answer is none is asked once more, on a fresh instance.
        let most = if letter.get("plugin").is_some() { 2 } else { 1 };
        assert!(
            letter["attempts"]
                .as_u64()
                .is_some_and(|attempts| (1..=most).contains(&attempts)),
            "{letter}"
        );
    }
    // Exactly one outcome each, in the counters as in the records.
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
    // Also where no plugin was asked.
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

/// `pointsman dead`, as an operator has it.
fn the_command_line_shows_what_is_dead(node: &Node, entry: &str) {
    let dead = |arguments: &[&str]| {
        let output = pointsman(&[&["dead"], arguments].concat())
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
fn odd_but_legal_entries_arrive_as_they_were_published() {
    let server = RedisServer::start();
    let node = Node::builder().redis(server.url()).config(LEAN).start();
    let mut stream = node.stream("42");
    let mut last_of_many = node.stream("u8999");
    let mut connection = server.connection();
    // Beyond 127 levels it is refused: nobody could find a field in it.
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
    // Also as a page.
    assert_eq!(last_of_many.next_notification(SOON).data, 1);
    assert_eq!(node.request("GET", "/v1/notifications?user=42").status, 200);
    // The frames as they are: one of them, around its payload, is nested more deeply than this test's own parser goes.
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
fn what_a_plugin_answers_wrongly_is_a_dead_letter_that_names_it_and_forges_no_frame() {
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
            "the event name has the control character U+000A",
        ),
        ("reserved-name", "the event name 'cursor' is reserved"),
        (
            "user-with-a-line-feed",
            "the user has the control character U+000A",
        ),
        ("empty-group", "the group is empty"),
        ("body-of-no-json", "the body is not valid JSON"),
        ("many-targets", "10000 is the most (max_targets)"),
        ("huge-answer", "result_kib"),
        ("panic", "as the type said"),
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
        let (reason, plugin) = reasons.next().expect("a dead letter each");
        assert!(
            reason.contains(expected) && plugin == Some("unruly"),
            "{kind}: {expected:?} is not in {reason:?}"
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
fn a_bad_post_is_400_or_413_with_a_clear_error_and_stores_nothing() {
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
            "'a\\nb' is no attribute name",
        ),
        (
            &[STRUCTURED],
            text(r#"{"type":"t","id":"\u0000"}"#),
            400,
            "id has the control character U+0000",
        ),
        (
            &[STRUCTURED],
            text(r#"{"type":"t\r\ndata: x"}"#),
            400,
            "type has the control character U+000D",
        ),
        (
            &[STRUCTURED],
            text(r#"{"type":"t","user":"4\n2"}"#),
            400,
            "user has the control character U+000A",
        ),
        (
            &[STRUCTURED],
            text(r#"{"type":"t","ttl":1e999}"#),
            400,
            "ttl is no attribute value",
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
            "type has the control character U+000A",
        ),
        (&[("ce-type", "a%FF")], text(""), 400, "type is not UTF-8"),
        (
            &[("ce-type", "t"), ("ce-user", "4%0A2")],
            text(""),
            400,
            "user has the control character U+000A",
        ),
        (
            &[("ce-type", "t"), ("ce-a-b", "v")],
            text(""),
            400,
            "'a-b' is no attribute name",
        ),
        (&[("ce-", "t")], text(""), 400, "'' is no attribute name"),
        (
            &[("content-type", "image/png")],
            vec![0x89],
            415,
            "no event can be read from 'image/png'",
        ),
        (
            &[BATCH],
            text("{}"),
            400,
            "the batch is not a JSON list of events",
        ),
        (&[BATCH], vec![b'[', 0xff], 400, "the batch is not UTF-8"),
        (
            &[BATCH],
            list(10_001),
            413,
            "the batch has 10001 events; 10000 is the most",
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
        assert!(error.contains(expected), "{expected:?} is not in {error:?}");
        assert_harmless(&error);
        node.publisher()
            .publish(&[event(&n.to_string(), "good", json!({ "user": "42" }))]);
        assert_eq!(stream.next_notification(SOON).id, n.to_string());
    }
    let answer = node.send("POST", "/v1/events?dry_run=perhaps", &[STRUCTURED], b"{}");
    assert_eq!(answer.status, 400, "{answer:?}");
    // In a batch, what does not hold is refused for good, by name, and the others are stored.
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
        "262144 is the most",
        "U+000A",
    ]) {
        assert_eq!(receipt["status"], "refused", "{receipt}");
        assert!(
            receipt["error"]
                .as_str()
                .is_some_and(|error| error.contains(expected)),
            "{expected:?} is not in {receipt}"
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

/// Sends bytes and answers what comes back: one whole answer, the first words of a stream, or all until the node closes.
fn say(addr: SocketAddr, bytes: &[u8]) -> String {
    let mut socket = TcpStream::connect(addr).expect("connect");
    socket.set_read_timeout(Some(SOON)).expect("set a timeout");
    // The node may answer and close before it has read everything.
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
fn no_bytes_of_a_request_bring_a_node_to_panic_or_to_answer_5xx() {
    let node = Node::builder()
        .config(&format!("[listen]\nheader_timeout_s = 1\n{LEAN}"))
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
        (b"DELETE /v1/dead/999/18446744073709551616-0 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".to_vec(), &[400, 404]),
        (b"GET /v1/dead/0/0-0 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".to_vec(), &[404]),
        (b"GET /v1/dead?limit=-1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".to_vec(), &[400]),
        (b"GET /v1/dead?after=%00 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".to_vec(), &[400]),
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
        // The HTTP layer refuses a header with a control character; everything else is a place that nobody knows.
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
            "not one of {expected:?} to {shown:?}: {answer:?}"
        );
    }
    // What is no request at all is worth no answer, or a short one.
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
fn a_last_event_id_that_nobody_can_read_is_told_as_a_gap_and_what_follows_arrives() {
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
    // A mark in the future, as if made up.
    own.replace_range(own.len() - 9..own.len() - 6, "f--");
    let gap = |stream: &mut Stream| stream.next_state("gap", SOON).data.expect("data");
    for (id, reason) in [
        ("garbled", "unknown"),
        ("1", "unknown"),
        ("ünïcode", "unknown"),
        (own.as_str(), "rewound"),
    ] {
        let mut hostile = open(id);
        let told: Value = serde_json::from_str(&gap(&mut hostile)).expect("JSON");
        assert_eq!(told["reason"], reason, "for {id:?}: {hostile:?}");
        // With the cursor that follows the gap the client is in good order again.
        hostile.next_state("cursor", SOON);
        node.publisher()
            .publish(&[event(id, "t", json!({ "user": "42" }))]);
        assert_eq!(hostile.next_notification(SOON).id, id);
        assert_eq!(stream.next_notification(SOON).id, id);
    }
    // Somebody else's says nothing of this user, so nothing is missing.
    let others = node.stream("43").last_event_id().to_owned();
    let mut stream = open(&others);
    stream.next_state("cursor", SOON);
    node.publisher()
        .publish(&[event("last", "t", json!({ "user": "42" }))]);
    assert_eq!(stream.next_notification(SOON).id, "last");
    let Refused { status, text } = Request::new(node.addr(), "user=42&min_priority=most")
        .open(SOON)
        .expect_err("refused");
    assert!(
        status == Some(400) && text.contains("no priority: low, normal, high or urgent"),
        "{text}"
    );
}

#[test]
fn a_file_that_is_no_plugin_is_named_in_the_log_and_by_readiness_and_the_good_ones_work() {
    let folder = Folder::new();
    let address = guests::core_module("address");
    let wrong = wat::parse_str("(module (func (export \"run\")))").expect("a module");
    for (name, bytes) in [
        ("address.wasm", address.as_slice()),
        ("truncated.wasm", &address[..address.len() / 2]),
        ("empty.wasm", b""),
        ("text.wasm", b"#!/bin/sh\n"),
        ("wrong.wasm", &wrong),
        ("notes.txt", b"no plugin, and not meant to be one"),
    ] {
        fs::write(folder.path().join(name), bytes).expect("write a file");
    }
    fs::create_dir(folder.path().join("folder.wasm")).expect("make a folder");
    let node = Node::builder()
        .plugins(folder.path())
        .may_be_unready()
        .start();
    // It comes back while the node is still starting.
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
            "the file is not named: {line}"
        );
        assert_harmless(line);
        let (_, reason) = line.split_once(": ").expect("a name before it");
        assert!(log.contains(reason), "{reason:?} is not in the log: {log}");
    }
    assert_eq!(ready.body.lines().count(), 5, "{}", ready.body);
    assert_calm(&node);
}

#[test]
fn dead_letters_are_counted_told_before_there_are_too_many_and_counted_when_they_are_gone() {
    let server = RedisServer::start();
    let config = format!("{LEAN}\n[retention]\ndead_entries = 10");
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
        eventually(SOON, "they are counted", || {
            (of_source("dead_letters") == 7.0).then_some(())
        });
        assert_eq!(warning(), None);
        die(1);
        let line = eventually(SOON, "there is a warning", warning);
        assert!(
            line.starts_with("warning: dead-letters: 8 of pointsman:events, and of more than 10 the oldest are lost: redrive"),
            "{line}"
        );
        assert_eq!(node.admin("/readyz").status, 200);
        die(5);
        eventually(SOON, "what is gone is counted", || {
            (of_source("dead_letters_trimmed_total") == 3.0).then_some(())
        });
        assert_eq!(of_source("dead_letters"), 10.0);
        told(pointsman(&["dead", "drop", "--all"]).env("POINTSMAN_URL", node.url("")));
        eventually(SOON, "the warning goes", || {
            warning().is_none().then_some(())
        });
    }
}
