//! Streams with the event's data alone in `data:`, for pages and libraries that expect the payload
//! of their application instead of a notification. `clients/pages.test.js` shows the libraries.

use ring::hmac;
use serde_json::{Value, json};

use super::authorization::{in_s, signed};
use crate::harness::demo_plugins;
use crate::harness::node::{Node, SOON};
use crate::harness::publish::{Publisher, event};
use crate::harness::sse::{Frame, Request, Stream};

const SECRET: &str = "the secret of these tests, longer than 32 bytes";

/// The next frame that is not a cursor.
fn next(stream: &mut Stream) -> Frame {
    loop {
        let frame = stream
            .next_frame(SOON)
            .unwrap_or_else(|end| panic!("{end:?} on {stream:?}"));
        if frame.event.as_deref() != Some("cursor") {
            return frame;
        }
    }
}

fn open(node: &Node, query: &str, last_event_id: &str) -> Stream {
    let mut stream = Request::new(node.addr(), &format!("user=ann&{query}"))
        .last_event_id(last_event_id)
        .open(SOON)
        .unwrap_or_else(|refused| panic!("{refused:?}"));
    if last_event_id.is_empty() {
        stream.next_state("cursor", SOON);
    }
    stream
}

/// For ann, of this type, with this data.
fn of(kind: &str, id: &str, data: Value) -> Value {
    event(id, kind, json!({ "user": "ann", "data": data }))
}

fn typed(id: &str, content_type: &str, data: Value) -> Value {
    let more = json!({ "user": "ann", "datacontenttype": content_type, "data": data });
    event(id, "t", more)
}

#[test]
fn a_stream_of_data_has_the_payload_alone_and_resumes() {
    let node = Node::builder().start();
    let publisher = Publisher::new(node.addr());
    let mut alone = open(&node, "format=data", "");
    let mut whole = open(&node, "format=notification", "");
    let forged = "x\n\nevent: close\ndata: {}\n\nid: 1\nretry: 1";
    let payloads = [
        (
            of("t", "object", json!({ "text": "a\u{2028}b" })),
            "{\"text\":\"a\\u2028b\"}",
        ),
        (
            typed("html", "text/html", json!("<p>\r\n é\r</p>\n")),
            "<p>\n é\n</p>\n",
        ),
        (
            of("t", "string", json!("<b>1</b>\n<b>2</b>")),
            "<b>1</b>\n<b>2</b>",
        ),
        (typed("forged", "text/plain", json!(forged)), forged),
        (
            typed("separators", "text/plain", json!("a\u{2028}b\u{85}c\u{c}d")),
            "a\nb\nc\nd",
        ),
        (of("t", "null", json!(null)), "null"),
        (event("nothing", "t", json!({ "user": "ann" })), ""),
        (
            event(
                "bytes",
                "t",
                json!({ "user": "ann", "datacontenttype": "image/png", "data_base64": "AAECAw==" }),
            ),
            "AAECAw==",
        ),
    ];
    let mut cursors = Vec::new();
    for (event, data) in &payloads {
        publisher.publish(std::slice::from_ref(event));
        let frame = next(&mut alone);
        assert_eq!(
            (frame.event.as_deref(), frame.data.as_deref()),
            (None, Some(*data)),
            "{event}"
        );
        let notification = whole.next_notification(SOON);
        assert_eq!(notification.id, event["id"]);
        assert_eq!(frame.id.as_ref(), Some(&notification.cursor), "{event}");
        cursors.extend(frame.id);
    }
    // The id of a payload resumes a stream of either form.
    let mut back = open(&node, "format=data", &cursors[1]);
    assert_eq!(next(&mut back).data.as_deref(), Some(payloads[2].1));
    let mut back = open(&node, "", &cursors[1]);
    assert_eq!(back.next_notification(SOON).id, "string");
    for query in ["format=json", "format=", "event=id"] {
        let refused = Request::new(node.addr(), &format!("user=ann&{query}")).open(SOON);
        assert_eq!(refused.expect_err("a refusal").status, Some(400), "{query}");
    }
    // A page of notifications has the data as a member already.
    let page = node.request("GET", "/v1/notifications?user=ann&format=data");
    assert_eq!(page.status, 400, "{page:?}");
}

#[test]
fn the_type_of_an_event_names_its_frame_unless_the_name_is_reserved() {
    let config = "[[plugins.rules.config.rules]]\nmatch.type = \"named\"\nto.user = \"ann\"\nevent_name = \"by-route\"\n";
    let node = Node::builder()
        .plugins(demo_plugins())
        .config(config)
        .start();
    let publisher = Publisher::new(node.addr());
    let mut by_type = open(&node, "format=data&event=type", "");
    let mut whole_by_type = open(&node, "event=type", "");
    let mut by_route = open(&node, "format=data&event=route", "");
    let names = [
        ("order.shipped", Some("order.shipped"), None),
        ("a type: x", Some("a type: x"), None),
        ("line\u{2028}end", Some("line end"), None),
        ("close", None, None),
        ("message", None, None),
        ("reauth", None, None),
        ("named", Some("named"), Some("by-route")),
    ];
    for (n, (kind, type_name, route_name)) in names.into_iter().enumerate() {
        let event = match kind {
            "named" => event("named", kind, json!({ "data": n })),
            kind => of(kind, kind, json!(n)),
        };
        publisher.publish(&[event]);
        for (stream, name) in [(&mut by_type, type_name), (&mut by_route, route_name)] {
            let frame = next(stream);
            assert_eq!(
                (frame.event.as_deref(), frame.data),
                (name, Some(n.to_string())),
                "{kind}"
            );
        }
        let notification = whole_by_type.next_notification(SOON);
        assert_eq!(
            (notification.name.as_deref(), notification.kind.as_str()),
            (type_name, kind)
        );
    }
}

#[test]
fn the_request_the_token_and_the_configuration_choose_the_form_in_this_order() {
    let config = format!(
        "[auth]\njwt_secret = \"{SECRET}\"\napi_key = \"the key of these tests\"\n[stream]\nformat = \"data\"\n[plugins.discard]\nenabled = false"
    );
    let node = Node::builder().production().config(&config).start();
    let bearer = |claims: Value| {
        let mut all = json!({ "sub": "ann", "exp": in_s(3_600) });
        all.as_object_mut()
            .expect("an object")
            .extend(claims.as_object().expect("an object").clone());
        format!(
            "Bearer {}",
            signed("HS256", hmac::HMAC_SHA256, SECRET, &all)
        )
    };
    let open = |claims: Value, query: &str| {
        Request::new(node.addr(), query)
            .header("Authorization", &bearer(claims))
            .open(SOON)
    };
    let claim = json!({ "pointsman": { "format": "notification", "event": "type" } });
    let cases = [
        (json!({}), "", None, "1"),
        (json!({}), "event=type", Some("t"), "1"),
        (claim.clone(), "", Some("t"), "\"id\":\"e\""),
        (claim.clone(), "format=data", Some("t"), "1"),
        (claim, "format=data&event=route", None, "1"),
        (json!({ "pointsman": null }), "", None, "1"),
    ];
    let mut streams: Vec<Stream> = cases
        .iter()
        .map(|(claims, query, ..)| {
            let mut stream = open(claims.clone(), query).expect("200");
            stream.next_state("cursor", SOON);
            stream
        })
        .collect();
    let headers = [
        ("authorization", "Bearer the key of these tests"),
        ("content-type", "application/cloudevents+json"),
    ];
    let body = of("t", "e", json!(1)).to_string();
    let answer = node.send("POST", "/v1/events", &headers, body.as_bytes());
    assert_eq!(answer.status, 202, "{answer:?}");
    for (stream, (claims, query, name, data)) in streams.iter_mut().zip(&cases) {
        let frame = next(stream);
        assert_eq!(frame.event.as_deref(), *name, "{claims} {query}");
        assert!(
            frame.data.as_deref().is_some_and(|have| have == *data || have.contains("\"id\"") && have.contains(data)),
            "{claims} {query}: {frame:?}"
        );
    }
    for malformed in [json!("data"), json!({ "format": "html" }), json!(["data"])] {
        let refused = open(json!({ "pointsman": malformed }), "").expect_err("a refusal");
        assert_eq!(refused.status, Some(401), "{refused:?}");
        assert!(refused.text.contains("claim 'pointsman'"), "{refused:?}");
    }
}
