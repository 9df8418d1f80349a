//! TLS on the listeners: the certificate and its key, read from files, and again when they change.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::MAX_UNSENT;
use super::connection::CountingSocket;
use crate::regular_file;
use crate::shutdown::Shutdown;
use crate::telemetry::readiness::Readiness;

/// The interval between two looks at the files.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// The response to a request without TLS.
const PLAIN_REFUSAL: &[u8] = b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: 75\r\nConnection: close\r\n\r\n{\"code\":\"tls_required\",\"error\":\"this listener uses TLS; use https:// here\"}";

/// The files of a certificate, `listen.tls_certificate` and `listen.tls_key`.
#[derive(Clone, Debug)]
pub struct CertificateFiles {
    /// The certificate and those of its issuers, in PEM.
    pub chain: PathBuf,
    /// Its private key, in PEM.
    pub key: PathBuf,
}

/// The content of the files.
#[derive(Debug, PartialEq, Eq)]
struct Pem {
    chain: Vec<u8>,
    key: Vec<u8>,
}

/// The certificate of a listener. A cheap handle.
#[derive(Clone, Debug)]
pub struct Tls {
    files: CertificateFiles,
    certificate: Arc<Certificate>,
    config: Arc<ServerConfig>,
}

#[derive(Debug)]
struct Certificate {
    key: RwLock<Arc<CertifiedKey>>,
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let key = self.key.read().unwrap_or_else(PoisonError::into_inner);
        Some(Arc::clone(&key))
    }
}

impl CertificateFiles {
    /// Checks the files.
    ///
    /// # Errors
    /// The key of the configuration that is wrong, and a message.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        self.read().and_then(|pem| self.parse(&pem)).map(drop)
    }

    fn read(&self) -> Result<Pem, (&'static str, String)> {
        let read = |key, path: &PathBuf| {
            regular_file::read(path).map_err(|error| {
                let text = format!(
                    "cannot read {}: {error}; correct the path or the rights",
                    path.display()
                );
                (key, text)
            })
        };
        Ok(Pem {
            chain: read("listen.tls_certificate", &self.chain)?,
            key: read("listen.tls_key", &self.key)?,
        })
    }

    fn parse(&self, pem: &Pem) -> Result<CertifiedKey, (&'static str, String)> {
        let of_chain = |error: &dyn std::fmt::Display| {
            let text = format!(
                "{} holds no certificate in PEM ({error}); write the certificate first, then those of its issuers",
                self.chain.display()
            );
            ("listen.tls_certificate", text)
        };
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&pem.chain)
            .collect::<Result<_, _>>()
            .map_err(|error| of_chain(&error))?;
        if chain.is_empty() {
            return Err(of_chain(&"no section CERTIFICATE"));
        }
        let key = PrivateKeyDer::from_pem_slice(&pem.key).map_err(|error| {
            let text = format!(
                "{} holds no private key in PEM without a passphrase ({error}); write it as PKCS#8, for example with `openssl pkey`",
                self.key.display()
            );
            ("listen.tls_key", text)
        })?;
        // Also compares the two keys.
        CertifiedKey::from_der(chain, key, &ring::default_provider()).map_err(|error| {
            let text = format!(
                "{} cannot be used with {} ({error}); give the key of this certificate",
                self.key.display(),
                self.chain.display()
            );
            ("listen.tls_key", text)
        })
    }
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// As for [`CertificateFiles::check`], as one message.
    pub fn new(files: CertificateFiles) -> Result<Self, String> {
        let describe = |(key, text)| format!("{key} {text}");
        let pem = files.read().map_err(describe)?;
        let key = files.parse(&pem).map_err(describe)?;
        let certificate = Arc::new(Certificate {
            key: RwLock::new(Arc::new(key)),
        });
        let builder = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()));
        let builder = builder
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("TLS is not available: {error}"))?;
        let mut config = builder
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&certificate) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        // So that a storm of clients that reconnect costs less. Only this node can read its tickets.
        config.ticketer = ring::Ticketer::new()
            .map_err(|error| format!("the system gives no random numbers: {error}"))?;
        Ok(Self {
            files,
            certificate,
            config: Arc::new(config),
        })
    }

    /// Reads the files again when they change, until the shutdown begins. Connections keep the
    /// certificate with which they began. Files that do not fit are named in readiness, and change
    /// nothing.
    pub async fn follow(self, readiness: Readiness, shutdown: Shutdown) {
        let mut seen = None;
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = shutdown.begun() => return,
            }
            let files = self.files.clone();
            let read = tokio::task::spawn_blocking(move || files.read()).await;
            let Ok(read) = read else {
                continue;
            };
            let before = seen.replace(read);
            // Only what two looks saw: between them, one of the files may be a new one already.
            if before != seen {
                continue;
            }
            let loaded = match &seen {
                Some(Ok(pem)) => self.files.parse(pem),
                Some(Err(error)) => Err(error.clone()),
                None => continue,
            };
            match loaded {
                Ok(key) => {
                    readiness.clear("tls");
                    self.replace(key);
                }
                Err((key, text)) => readiness.warn(
                    "tls",
                    format!("{key} {text}; the last certificate stays in use"),
                ),
            }
        }
    }

    fn replace(&self, key: CertifiedKey) {
        let mut current = self
            .certificate
            .key
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if current.cert != key.cert {
            tracing::info!(file = %self.files.chain.display(), "TLS certificate loaded");
        }
        *current = Arc::new(key);
    }

    /// Completes the handshake on a connection.
    ///
    /// # Errors
    /// The client speaks no TLS, which it is told if it sends HTTP, or none that this node accepts.
    pub(super) async fn accept(
        &self,
        mut socket: CountingSocket,
    ) -> io::Result<TlsStream<CountingSocket>> {
        let mut first = [0];
        // The first byte of TLS is not a letter, and that of a method is.
        if socket.stream.peek(&mut first).await? == 1 && first[0].is_ascii_alphabetic() {
            // Unread bytes would turn the end of the connection into a reset.
            let mut head = vec![0; 4096];
            let _n = socket.read(&mut head).await?;
            socket.write_all(PLAIN_REFUSAL).await?;
            socket.shutdown().await?;
            return Err(io::Error::other("HTTP without TLS"));
        }
        let acceptor = TlsAcceptor::from(Arc::clone(&self.config));
        // Encrypted bytes can no longer be overtaken.
        let accepting = acceptor.accept_with(socket, |session| {
            session.set_buffer_limit(Some(MAX_UNSENT));
        });
        accepting.await
    }
}
