//! `GET /v1/openapi.json` on both listeners: the whole HTTP API as an OpenAPI 3.1 document, for
//! authors of clients.
//!
//! The document is written by hand in `host/openapi`: `about.md` is the introduction,
//! `pointsman.json` holds the shared parts, and the files under `public` and `admin` hold the paths
//! of one listener each with the components that they use. This module only assembles them;
//! `tests/openapi.rs` checks the document against real responses.

use std::sync::LazyLock;

use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use bytes::Bytes;
use serde_json::{Map, Value};

const ABOUT: &str = include_str!("../../openapi/about.md");
const SHARED: &str = include_str!("../../openapi/pointsman.json");
const PUBLIC: [&str; 5] = [
    include_str!("../../openapi/public/events.json"),
    include_str!("../../openapi/public/stream.json"),
    include_str!("../../openapi/public/recipients.json"),
    include_str!("../../openapi/public/dead-letters.json"),
    include_str!("../../openapi/public/health.json"),
];
const ADMIN: [&str; 7] = [
    include_str!("../../openapi/admin/health.json"),
    include_str!("../../openapi/admin/decisions.json"),
    include_str!("../../openapi/admin/explain.json"),
    include_str!("../../openapi/admin/events.json"),
    include_str!("../../openapi/admin/plugins.json"),
    include_str!("../../openapi/admin/candidates.json"),
    include_str!("../../openapi/admin/rollouts.json"),
];
/// A schema that is also published on its own.
const NOTIFICATION: &str = include_str!("../../schema/notification.json");

pub(super) async fn document() -> impl IntoResponse {
    static DOCUMENT: LazyLock<Bytes> =
        LazyLock::new(|| Bytes::from(format!("{:#}\n", Value::Object(compose()))));
    (
        [(CONTENT_TYPE, "application/json")],
        Bytes::clone(&DOCUMENT),
    )
}

fn compose() -> Map<String, Value> {
    let mut document = parse(SHARED);
    document["info"]["description"] = ABOUT.into();
    document["info"]["version"] = env!("CARGO_PKG_VERSION").into();
    let mut notification = parse(NOTIFICATION);
    // The surrounding document sets both, and with an `$id` of its own references would not
    // resolve.
    notification.retain(|key, _| !["$schema", "$id"].contains(&key.as_str()));
    put(
        &mut document["components"]["schemas"],
        "Notification".to_owned(),
        notification.into(),
    );
    for (listener, pieces) in [PUBLIC.as_slice(), ADMIN.as_slice()]
        .into_iter()
        .enumerate()
    {
        let server = Value::Array(vec![document["servers"][listener].clone()]);
        for (kind, members) in pieces.iter().flat_map(|piece| parse(piece)) {
            for (name, member) in object(members) {
                if kind == "paths" {
                    put_path(&mut document["paths"][&name], &server, object(member));
                } else {
                    put(&mut document["components"][&kind], name, member);
                }
            }
        }
    }
    document
}

/// Each operation names its listener, because a path may exist on both with different methods.
fn put_path(into: &mut Value, server: &Value, item: Map<String, Value>) {
    if into.is_null() {
        *into = Value::Object(Map::new());
    }
    for (key, mut member) in item {
        if key != "parameters" {
            member["servers"] = server.clone();
        }
        put(into, key, member);
    }
}

fn put(into: &mut Value, name: String, member: Value) {
    let was = into
        .as_object_mut()
        .expect("pointsman.json has this kind")
        .insert(name.clone(), member);
    assert!(was.is_none(), "{name} is defined twice in host/openapi");
}

fn parse(piece: &str) -> Map<String, Value> {
    object(serde_json::from_str(piece).expect("host/openapi is JSON"))
}

fn object(value: Value) -> Map<String, Value> {
    let Value::Object(members) = value else {
        panic!("not an object in host/openapi: {value}")
    };
    members
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Parses the routes that a function of `http.rs` lists, such as `GET /v1/dead-letters`.
    fn listed(function: &str) -> BTreeSet<String> {
        let code = include_str!("../http.rs")
            .split(&format!("pub fn {function}("))
            .nth(1)
            .and_then(|rest| rest.split("\n}\n").next());
        let routes = code.expect("the function exists").split(".route(").skip(1);
        let methods = |route: &str| {
            let path = route
                .split('"')
                .nth(1)
                .expect("a path in quotes")
                .to_owned();
            let named = ["get", "put", "post", "delete", "patch", "options"];
            // Matches `get(..)` and `.get(..)`, but not names that merely end in `get`.
            let words = route
                .split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != '(')
                .filter_map(|word| word.split_once('('));
            let found = words
                .map(|(word, _)| word.to_owned())
                .filter(move |word| named.contains(&word.as_str()));
            found
                .map(move |method| format!("{} {path}", method.to_uppercase()))
                .collect::<Vec<_>>()
        };
        routes.flat_map(methods).collect()
    }

    /// The documented operations of a listener: 0 is public, 1 is admin.
    fn documented(document: &Map<String, Value>, listener: usize) -> BTreeSet<String> {
        let is_here = |operation: &Value| {
            operation
                .get("servers")
                .is_none_or(|servers| servers[0] == document["servers"][listener])
        };
        let items = document["paths"].as_object().unwrap().iter();
        let operations = items.flat_map(|(path, item)| {
            item.as_object()
                .unwrap()
                .iter()
                .map(move |(method, operation)| (path, method, operation))
        });
        let here = operations
            .filter(|(_, method, operation)| *method != "parameters" && is_here(operation));
        here.map(|(path, method, _)| format!("{} {path}", method.to_uppercase()))
            .collect()
    }

    #[test]
    fn routes_and_documented_operations_are_the_same() {
        let document = compose();
        for (listener, function) in ["routes", "admin_routes"].into_iter().enumerate() {
            let routes = listed(function);
            assert!(routes.len() >= 5, "{function}: {routes:?}");
            assert_eq!(routes, documented(&document, listener), "{function}");
        }
    }

    #[test]
    fn every_component_is_referenced() {
        let document = compose();
        let text = Value::from(document.clone()).to_string();
        for (kind, members) in document["components"]
            .as_object()
            .unwrap()
            .iter()
            .filter(|(kind, _)| *kind != "securitySchemes")
        {
            for name in members.as_object().unwrap().keys() {
                assert!(
                    text.contains(&format!("\"#/components/{kind}/{name}\"")),
                    "nothing references {kind}/{name}"
                );
            }
        }
    }
}
