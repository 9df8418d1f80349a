//! The page at `/` in dev mode: the demo of `examples/demo`, which uses nothing but `/v1/*`.

use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY};
use axum::response::{Html, IntoResponse};

pub(super) async fn demo() -> impl IntoResponse {
    let headers = [
        (CACHE_CONTROL, "no-store"),
        (CONTENT_SECURITY_POLICY, "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"),
    ];
    (headers, Html(include_str!("../../../examples/demo/index.html")))
}
