//! For tests of the routes: a node's routes without a socket, on a broker of a few vectors.

use std::sync::Arc;

use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode};
use http_body_util::BodyExt as _;
use tower::ServiceExt as _;

use super::{Limits, Origins, Settings, State, admin_routes, routes};
use crate::auth::{self, Auth};
use crate::broker::Broker;
use crate::broker::fake::FakeBroker;
use crate::delivery::hub::Hub;
use crate::delivery::sse::{self, StreamTimer};
use crate::server::{AddressLimits, ClientAddresses};
use crate::shutdown::Shutdown;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::readiness::Readiness;

/// A node's routes, called without a socket.
pub(in crate::http) struct Site {
    pub(in crate::http) state: Arc<State>,
    pub(in crate::http) broker: FakeBroker,
}

impl Site {
    pub(in crate::http) fn dev(broker: FakeBroker) -> Self {
        Self::new(
            broker,
            auth::Config {
                dev: true,
                ..auth::Config::default()
            },
        )
    }

    pub(in crate::http) fn new(broker: FakeBroker, auth: auth::Config) -> Self {
        let site = Self {
            state: Self::state(&auth),
            broker,
        };
        let broker: Arc<dyn Broker> = Arc::new(site.broker.clone());
        let hub = Hub::start(broker.clone(), Metrics::default(), &Shutdown::new());
        site.state.set_broker(broker, hub);
        site
    }

    pub(in crate::http) fn without_broker() -> Self {
        Self {
            state: Self::state(&auth::Config {
                dev: true,
                ..auth::Config::default()
            }),
            broker: FakeBroker::default(),
        }
    }

    fn state(auth: &auth::Config) -> Arc<State> {
        let origins = Origins::new(&["https://shop.example".to_owned()], auth.dev).unwrap();
        let auth = Auth::new(auth, &[]).unwrap();
        let settings = Settings {
            node: "test/1".to_owned(),
            auth,
            origins,
            addresses: ClientAddresses::new(
                &[],
                AddressLimits {
                    max_in_progress: usize::MAX,
                    rate: None,
                    proxy_protocol: false,
                },
            )
            .unwrap(),
            limits: Limits::default(),
            default_type: None,
        };
        Arc::new(State::new(
            settings,
            Readiness::default(),
            Metrics::default(),
            StreamTimer::start(sse::Config::default(), Metrics::default(), &Shutdown::new()),
        ))
    }

    /// Sends one request to the application routes. Returns the body as JSON, or `null` if it is
    /// not JSON.
    pub(in crate::http) async fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> (StatusCode, HeaderMap, serde_json::Value) {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if headers.iter().all(|(name, _)| *name != "host") {
            request = request.header("host", "localhost");
        }
        let request = request.body(Body::from(body.to_owned())).unwrap();
        let (parts, body) = routes(Arc::clone(&self.state))
            .oneshot(request)
            .await
            .unwrap()
            .into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        (
            parts.status,
            parts.headers,
            serde_json::from_slice(&body).unwrap_or_default(),
        )
    }

    /// Sends a GET request to the admin routes.
    pub(in crate::http) async fn admin(&self, path: &str) -> (StatusCode, String) {
        let request = Request::get(path).header("host", "localhost");
        let request = request.body(Body::empty()).unwrap();
        let (parts, body) = admin_routes(Arc::clone(&self.state))
            .oneshot(request)
            .await
            .unwrap()
            .into_parts();
        (
            parts.status,
            String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap(),
        )
    }
}
