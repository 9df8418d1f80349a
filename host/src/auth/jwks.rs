//! A key server: fetches the keys of tokens as a JWK set by HTTP.
//!
//! One fetch at a time, bounded in size and time, and none within `jwks_retry_interval` of the one
//! before, whatever tokens name. The keys of the last success stay in effect while fetches fail.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, oneshot};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};

use super::keys::{Secrets, VerificationKey, read_set};
use super::{Config, read_text};
use crate::shutdown::Shutdown;
use crate::telemetry::readiness::Readiness;

/// The deadline of a fetch, from connecting to the last byte.
const DEADLINE: Duration = Duration::from_secs(5);
/// The maximum size of a JWK set, in bytes.
const MAX_BYTES: u64 = 256 * 1024;

#[derive(Debug)]
pub(super) struct KeyServer {
    url: String,
    ca_file: Option<PathBuf>,
    refresh_interval: Duration,
    retry_interval: Duration,
    fetched: RwLock<Fetched>,
    /// When the last fetch began, and then ended. Locked while one is under way.
    last: Mutex<Option<Instant>>,
}

#[derive(Debug)]
struct Fetched {
    keys: Vec<Arc<VerificationKey>>,
    /// Why the keys may be outdated.
    fault: Option<String>,
}

impl KeyServer {
    /// # Errors
    /// The configuration key at fault and a message with the fix.
    pub(super) fn new(url: &str, config: &Config) -> Result<Self, (&'static str, String)> {
        let uri: Option<ureq::http::Uri> = url.parse().ok();
        let is_valid = uri.is_some_and(|uri| {
            matches!(uri.scheme_str(), Some("http" | "https"))
                && uri
                    .authority()
                    .is_some_and(|authority| !authority.as_str().contains('@'))
        });
        if !is_valid {
            let text = format!(
                "has '{}', which is not a URL of http or https without credentials; write it as in https://login.example/.well-known/jwks.json",
                url.escape_debug()
            );
            return Err(("jwks_urls", text));
        }
        if let Some(path) = &config.jwks_ca_file {
            authorities(path).map_err(|text| ("jwks_ca_file", text))?;
        }
        Ok(Self {
            url: url.to_owned(),
            ca_file: config.jwks_ca_file.clone(),
            refresh_interval: config.jwks_refresh_interval,
            retry_interval: config.jwks_retry_interval,
            fetched: RwLock::new(Fetched {
                keys: Vec::new(),
                fault: Some("not fetched yet".to_owned()),
            }),
            last: Mutex::new(None),
        })
    }

    pub(super) fn keys(&self) -> Vec<Arc<VerificationKey>> {
        let fetched = self.fetched.read().unwrap_or_else(PoisonError::into_inner);
        fetched.keys.clone()
    }

    /// Whether a key that a token names is among the fetched ones; for a token that names none,
    /// whether there are any.
    pub(super) fn knows(&self, id: Option<&str>) -> bool {
        let fetched = self.fetched.read().unwrap_or_else(PoisonError::into_inner);
        let mut keys = fetched.keys.iter();
        keys.any(|key| id.is_none() || key.id.is_none() || key.id.as_deref() == id)
    }

    /// Whether the last fetch succeeded.
    pub(super) fn is_current(&self) -> bool {
        let fetched = self.fetched.read().unwrap_or_else(PoisonError::into_inner);
        fetched.fault.is_none()
    }

    /// Fetches the keys, or waits for the fetch that is under way. Does nothing within
    /// `jwks_retry_interval` of the last one. If it is cancelled, the fetch continues.
    pub(super) async fn refresh(self: &Arc<Self>) {
        let asked = Instant::now();
        let mut last = self.last.lock().await;
        // One that was under way meanwhile serves all that waited for it.
        if last.is_some_and(|at| at >= asked || at.elapsed() < self.retry_interval) {
            return;
        }
        *last = Some(Instant::now());
        let (sender, fetched) = oneshot::channel();
        let server = Arc::clone(self);
        // A thread of its own: the runtime would wait for one of its own when the node stops.
        let thread = std::thread::Builder::new().name("key-fetch".to_owned());
        let spawned = thread.spawn(move || {
            server.store(server.fetch());
            // An error means that the request is gone.
            sender.send(()).ok();
        });
        match spawned {
            // An error means that the thread panicked.
            Ok(_) => fetched.await.unwrap_or_default(),
            Err(error) => self.store(Err(format!("no thread could be started: {error}"))),
        }
        *last = Some(Instant::now());
    }

    /// Fetches the keys again and again.
    pub(super) async fn follow(self: Arc<Self>, readiness: &Readiness, shutdown: &Shutdown) {
        let name = format!("auth.jwks_urls.{}", self.url);
        loop {
            self.refresh().await;
            let fault = {
                let fetched = self.fetched.read().unwrap_or_else(PoisonError::into_inner);
                let stale = if fetched.keys.is_empty() {
                    "no token of its keys is accepted"
                } else {
                    "the keys fetched before stay in effect"
                };
                let fault = fetched.fault.as_ref();
                fault.map(|fault| format!("{} cannot be fetched: {fault}; {stale}", self.url))
            };
            let pause = match fault {
                Some(fault) => {
                    readiness.warn(&name, fault);
                    self.retry_interval
                }
                None => {
                    readiness.clear(&name);
                    self.refresh_interval.mul_f64(rand::random_range(0.8..1.0))
                }
            };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = shutdown.begun() => return,
            }
        }
    }

    fn store(&self, set: Result<Vec<VerificationKey>, String>) {
        let mut fetched = self.fetched.write().unwrap_or_else(PoisonError::into_inner);
        match set {
            Ok(keys) => {
                *fetched = Fetched {
                    keys: keys.into_iter().map(Arc::new).collect(),
                    fault: None,
                }
            }
            Err(fault) => fetched.fault = Some(fault),
        }
    }

    fn fetch(&self) -> Result<Vec<VerificationKey>, String> {
        let response = self
            .agent()?
            .get(&self.url)
            .header("accept", "application/jwk-set+json, application/json")
            .call()
            .map_err(|e| e.to_string())?;
        let status = response.status();
        if status != ureq::http::StatusCode::OK {
            return Err(format!("the status is {}", status.as_u16()));
        }
        let mut text = String::new();
        response
            .into_body()
            .into_reader()
            .take(MAX_BYTES + 1)
            .read_to_string(&mut text)
            .map_err(|e| format!("the answer cannot be read: {e}"))?;
        if text.len() as u64 > MAX_BYTES {
            return Err(format!("the answer has more than {MAX_BYTES} bytes"));
        }
        let (keys, unusable) =
            read_set(&text, Secrets::Refused).map_err(|why| format!("the answer {why}"))?;
        for reason in unusable {
            tracing::debug!(url = self.url, "a key is not used: the set {reason}");
        }
        Ok(keys)
    }

    /// Built for each fetch, so that a changed file of authorities takes effect.
    fn agent(&self) -> Result<ureq::Agent, String> {
        let mut config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            // A redirect could lead to any host.
            .max_redirects(0)
            .timeout_global(Some(DEADLINE));
        if let Some(path) = &self.ca_file {
            let roots = RootCerts::new_with_certs(&authorities(path)?);
            config = config.tls_config(TlsConfig::builder().root_certs(roots).build());
        }
        Ok(config.build().new_agent())
    }
}

fn authorities(path: &Path) -> Result<Vec<Certificate<'static>>, String> {
    let text = read_text(path)?;
    let certificates: Vec<_> = parse_pem(text.as_bytes())
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        return Err(format!("{} holds no certificate; use PEM", path.display()));
    }
    Ok(certificates)
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;
    use std::sync::mpsc;

    use super::*;

    /// An interval shorter than a fetch must not let each request make one of its own.
    #[tokio::test]
    async fn requests_that_wait_for_a_fetch_share_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/keys", listener.local_addr().unwrap());
        let (allow, allowed) = mpsc::channel();
        let fetches = std::thread::spawn(move || {
            let mut n = 0;
            while let Ok((mut socket, _)) = listener.accept() {
                if n == 0 {
                    allowed.recv().unwrap();
                }
                let mut head = [0; 4096];
                if socket.read(&mut head).unwrap_or_default() == 0 {
                    return n;
                }
                n += 1;
                let answer =
                    b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\nConnection: close\r\n\r\n{\"keys\":[]}";
                socket.write_all(answer).unwrap();
            }
            n
        });
        let config = Config {
            jwks_retry_interval: Duration::from_nanos(1),
            ..Config::default()
        };
        let server = Arc::new(KeyServer::new(&url, &config).expect("a server"));
        let waiting: Vec<_> = (0..5)
            .map(|_| {
                let server = Arc::clone(&server);
                tokio::spawn(async move { server.refresh().await })
            })
            .collect();
        // All have asked, and all but one wait.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        allow.send(()).unwrap();
        for request in waiting {
            request.await.unwrap();
        }
        let address = url.trim_start_matches("http://").trim_end_matches("/keys");
        drop(std::net::TcpStream::connect(address));
        assert_eq!(fetches.join().unwrap(), 1);
    }
}
