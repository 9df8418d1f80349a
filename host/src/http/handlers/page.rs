//! The demo page at `/` in dev mode and its files under `/demo/`, taken from `examples/demo`, with the
//! client of `clients/js`. The page uses nothing but `/v1/*`.

use std::sync::Arc;

use axum::Router;
use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::routing::get;

use crate::http::State;

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// Path, type and content.
const FILES: [(&str, &str, &str); 6] = [
    (
        "/",
        HTML,
        include_str!("../../../../examples/demo/index.html"),
    ),
    (
        "/demo/page.css",
        CSS,
        include_str!("../../../../examples/demo/page.css"),
    ),
    (
        "/demo/page.js",
        SCRIPT,
        include_str!("../../../../examples/demo/page.js"),
    ),
    (
        "/demo/device.js",
        SCRIPT,
        include_str!("../../../../examples/demo/device.js"),
    ),
    (
        "/demo/pointsman.js",
        SCRIPT,
        include_str!("../../../../clients/js/index.js"),
    ),
    (
        "/demo/words.js",
        SCRIPT,
        include_str!("../../../../examples/demo/words.js"),
    ),
];

pub(in crate::http) fn routes() -> Router<Arc<State>> {
    FILES
        .into_iter()
        .fold(Router::new(), |routes, (path, kind, content)| {
            let headers = [
                (CONTENT_TYPE, kind),
                (CACHE_CONTROL, "no-store"),
                (
                    CONTENT_SECURITY_POLICY,
                    "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
                ),
            ];
            routes.route(path, get(async move || (headers, content)))
        })
}
