//! The two listeners of a node, for applications and for operators.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::net::TcpListener;

use crate::http::{self, State};
use crate::server::{self, Bounds, Tls};
use crate::shutdown::Shutdown;

/// Maximum connections to the admin listener: probes and scrapers are few.
const MAX_ADMIN_CONNECTIONS: usize = 256;

/// The two listeners of a node, bound.
#[derive(Debug)]
pub struct Listeners {
    pub applications: TcpListener,
    pub admin: TcpListener,
}

impl Listeners {
    /// Binds both addresses. Port 0 binds a free port.
    ///
    /// # Errors
    /// An address cannot be bound; the text names the key to change.
    pub fn bind(listen: &server::Config) -> anyhow::Result<Self> {
        let bind = |key, address| {
            server::bind(address)
                .with_context(|| format!("cannot listen on {address}; free it or change {key}"))
        };
        Ok(Self {
            applications: bind("listen.address", listen.address)?,
            admin: bind("listen.admin", listen.admin)?,
        })
    }

    /// Serves the routes of both listeners until `shutdown`.
    ///
    /// # Errors
    /// The certificate cannot be used.
    pub(super) fn serve(
        self,
        listen: &server::Config,
        stall_timeout: Duration,
        state: &Arc<State>,
        shutdown: &Shutdown,
    ) -> anyhow::Result<()> {
        let tls = match listen.certificate_files().map(Tls::new).transpose() {
            Ok(tls) => tls,
            Err(text) => bail!("{text}"),
        };
        if let Some(tls) = tls.clone() {
            let follow = tls.follow(state.readiness().clone(), shutdown.clone());
            shutdown.spawn("the certificate monitor", follow);
        }
        let routes = [
            (
                self.admin,
                tls.clone().filter(|_| listen.admin_tls),
                http::admin_routes(Arc::clone(state)),
                MAX_ADMIN_CONNECTIONS,
                None,
            ),
            (
                self.applications,
                tls,
                http::routes(Arc::clone(state)),
                listen.max_connections,
                Some(state.addresses().clone()),
            ),
        ];
        for (listener, tls, routes, max_connections, addresses) in routes {
            let bounds = Bounds {
                max_connections,
                header_timeout: listen.header_timeout,
                idle_timeout: listen.idle_timeout,
                stall_timeout,
            };
            let metrics = state.metrics().clone();
            let serve = server::serve(
                listener,
                tls,
                routes,
                bounds,
                addresses,
                metrics,
                shutdown.clone(),
            );
            shutdown.spawn("a listener", serve);
        }
        Ok(())
    }
}
