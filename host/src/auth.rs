//! Authentication: the user of a stream, and whether a request may publish, change recipients or
//! read dead letters.
//!
//! The user comes from a verified token, never from the URL. The exception is `dev` mode, which
//! requires no token and therefore listens on loopback only. This module reads request heads and
//! knows no status codes: `http` turns an [`Error`] into a response. `subscription` decides what a
//! user may *see*.
//!
//! `keys` are those of files and of key servers (`jwks`); `token` checks a token with one of them.

mod jwks;
mod keys;
mod signature;
#[cfg(test)]
mod tests;
mod ticket;
mod token;

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use axum::http::header::{AUTHORIZATION, COOKIE};
use axum::http::request::Parts;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::delivery::recipients::Reader;
use crate::delivery::sse::{FramingChoice, TokenExpiry};
use crate::event::Name;
use crate::regular_file;
use crate::shutdown::Shutdown;
use crate::telemetry::readiness::Readiness;

use jwks::KeyServer;
use keys::VerificationKey;
pub use ticket::{Credentials, Ticket};
use token::{Failure, TokenChecks};

/// The maximum number of keys with which one token is checked.
const MAX_CANDIDATES: usize = 16;

/// The `[auth]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Trust `?user=` and require no key; listens on loopback only (false).
    pub dev: bool,
    /// The secret of HS256 tokens, at least 32 bytes (none). From 48 bytes on also of HS384 tokens,
    /// from 64 bytes on also of HS512 tokens.
    pub jwt_secret: Option<Secret>,
    /// A file that holds the token secret instead; line breaks at its end are ignored (none).
    pub jwt_secret_file: Option<PathBuf>,
    /// Files with keys of tokens: public keys in PEM, a JWK or a JWK set (none).
    pub jwt_key_files: Vec<PathBuf>,
    /// URLs of JWK sets with the keys of tokens (none).
    pub jwks_urls: Vec<String>,
    /// A file in PEM with the certificates of the authorities that are trusted for `jwks_urls`,
    /// instead of Mozilla's (none).
    pub jwks_ca_file: Option<PathBuf>,
    /// Time between two fetches of a JWK set, up to 20 % less (10m).
    #[serde(with = "crate::duration")]
    pub jwks_refresh_interval: Duration,
    /// The shortest time between two fetches of a JWK set: after a failure, or for a token with an
    /// unknown key (10s).
    #[serde(with = "crate::duration")]
    pub jwks_retry_interval: Duration,
    /// The claim that names the user (`sub`).
    pub user_claim: String,
    /// The claim that may list further groups of the user for requests with this token (`groups`;
    /// empty: ignored).
    pub groups_claim: String,
    /// The claim that may hold further attributes of the user for requests with this token
    /// (`attributes`; empty: ignored).
    pub attributes_claim: String,
    /// The claim that may choose the form of notifications on streams with this token, as an object
    /// with `format` and `event` (`pointsman`; empty: ignored).
    pub stream_claim: String,
    /// Refuse tokens without `exp`, which would never expire (true).
    pub require_expiry: bool,
    /// The clock difference that the checks of `exp` and `nbf` tolerate (30s).
    #[serde(with = "crate::duration")]
    pub leeway: Duration,
    /// The value that `aud` must have (none: not checked).
    pub audience: Option<String>,
    /// The value that `iss` must have (none: not checked).
    pub issuer: Option<String>,
    /// A cookie that may carry the token, because `EventSource` in a browser cannot send a header
    /// (none).
    pub cookie: Option<String>,
    /// The API key of publishers and operators, at least 16 bytes (none: publishing over HTTP is
    /// refused).
    pub api_key: Option<Secret>,
    /// A file that holds the API key instead; line breaks at its end are ignored (none).
    pub api_key_file: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            dev: false,
            jwt_secret: None,
            jwt_secret_file: None,
            jwt_key_files: Vec::new(),
            jwks_urls: Vec::new(),
            jwks_ca_file: None,
            jwks_refresh_interval: Duration::from_secs(600),
            jwks_retry_interval: Duration::from_secs(10),
            user_claim: "sub".to_owned(),
            groups_claim: "groups".to_owned(),
            attributes_claim: "attributes".to_owned(),
            stream_claim: "pointsman".to_owned(),
            require_expiry: true,
            leeway: Duration::from_secs(30),
            audience: None,
            issuer: None,
            cookie: None,
            api_key: None,
            api_key_file: None,
        }
    }
}

/// A text that `Debug` does not print.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

/// Why a request is refused. The message is for the client; [`Error::Unavailable`] also holds the
/// fix for the operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A token, key or user is missing.
    #[error("{0}")]
    Missing(String),
    /// The token is valid except that it has expired.
    #[error("the token has expired")]
    Expired,
    /// The token, key or user is invalid.
    #[error("{0}")]
    Invalid(String),
    /// The key of the token is not known, and a key server that may know it does not answer.
    #[error("the keys of tokens cannot be fetched right now")]
    KeysUnavailable,
    /// This node has no secret or key configured to check the request with.
    #[error("{what}")]
    Unavailable {
        what: &'static str,
        fix: &'static str,
    },
}

/// The reader of a stream, and what its token says about the stream.
#[derive(Clone, Debug)]
pub struct StreamIdentity {
    pub reader: Reader,
    /// When the token expires.
    pub expiry: Option<TokenExpiry>,
    /// The form of notifications that the token chooses.
    pub framing: FramingChoice,
}

const NO_TOKENS: Error = Error::Unavailable {
    what: "this node accepts no tokens",
    fix: "set auth.jwt_secret, auth.jwt_key_files or auth.jwks_urls",
};

/// A file with a secret or with keys, which takes effect when it changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchedFile {
    /// The configuration key that names it, such as `jwt_secret_file`.
    pub key: &'static str,
    pub path: PathBuf,
    content: Content,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Secret,
    Keys(usize),
    ApiKey,
}

/// The checked `[auth]` section with its secrets and keys. A cheap handle: clones share them.
#[derive(Clone)]
pub struct Auth(Arc<AuthInner>);

struct AuthInner {
    config: Config,
    checks: TokenChecks,
    local: RwLock<LocalKeys>,
    servers: Vec<Arc<KeyServer>>,
}

/// The secrets and keys of the configuration and of files.
#[derive(Default)]
struct LocalKeys {
    secret: Option<Arc<VerificationKey>>,
    /// The keys of each of `jwt_key_files`.
    files: Vec<Vec<Arc<VerificationKey>>>,
    /// The hash of the API key, so that a comparison takes the same time for every guess.
    api_key: Option<[u8; 32]>,
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Auth")
            .field("config", &self.0.config)
            .finish_non_exhaustive()
    }
}

impl Auth {
    /// Checks the section and reads the files that it names. `listen`: every address that the node
    /// listens on.
    ///
    /// A node that could open no stream is refused at start, instead of showing up as a 401 to the
    /// first reader. A node without an API key is valid, because events may come from Redis alone.
    /// Key servers are not asked yet: see [`Auth::follow_key_servers`].
    ///
    /// # Errors
    /// The configuration key at fault, such as `jwt_secret`, and a message with the fix.
    pub fn new(config: &Config, listen: &[SocketAddr]) -> Result<Self, (&'static str, String)> {
        if config.dev
            && let Some(address) = listen.iter().find(|address| !address.ip().is_loopback())
        {
            let text = format!(
                "requires no token and therefore may listen on loopback only, not on {address}; listen on 127.0.0.1, or remove dev and set auth.jwt_secret"
            );
            return Err(("dev", text));
        }
        let servers: Vec<Arc<KeyServer>> = config
            .jwks_urls
            .iter()
            .map(|url| KeyServer::new(url, config).map(Arc::new))
            .collect::<Result<_, _>>()?;
        let local = LocalKeys {
            secret: read_secret(config)?.map(Arc::new),
            files: config
                .jwt_key_files
                .iter()
                .map(|path| read_keys(path).map_err(|text| ("jwt_key_files", text)))
                .collect::<Result<_, _>>()?,
            api_key: read_api_key(config)?,
        };
        if local.secret.is_none() && local.files.is_empty() && servers.is_empty() && !config.dev {
            return Err((
                "jwt_secret",
                "is missing, so no stream could be opened; set it, jwt_secret_file, jwt_key_files or jwks_urls, or use --dev for local testing".to_owned(),
            ));
        }
        signature::install();
        Ok(Self(Arc::new(AuthInner {
            config: config.clone(),
            checks: TokenChecks::new(config),
            local: RwLock::new(local),
            servers,
        })))
    }

    /// The files that [`Auth::reload`] can read again.
    pub fn watched_files(&self) -> Vec<WatchedFile> {
        let config = &self.0.config;
        let of = |key, path: &Option<PathBuf>, content| {
            path.clone().map(|path| WatchedFile { key, path, content })
        };
        let secret = of("jwt_secret_file", &config.jwt_secret_file, Content::Secret);
        let api_key = of("api_key_file", &config.api_key_file, Content::ApiKey);
        let keys = config.jwt_key_files.iter().enumerate();
        let keys = keys.map(|(n, path)| WatchedFile {
            key: "jwt_key_files",
            path: path.clone(),
            content: Content::Keys(n),
        });
        secret.into_iter().chain(api_key).chain(keys).collect()
    }

    /// Reads a file again. Requests from now on are checked with its content; open streams stay.
    ///
    /// # Errors
    /// A message with the fix; the former content stays in effect.
    pub fn reload(&self, file: &WatchedFile) -> Result<(), String> {
        let AuthInner { config, local, .. } = &*self.0;
        let write = || local.write().unwrap_or_else(PoisonError::into_inner);
        match file.content {
            Content::Secret => {
                let secret = read_secret(config).map_err(|(_, text)| text)?;
                write().secret = secret.map(Arc::new);
            }
            Content::ApiKey => {
                let api_key = read_api_key(config).map_err(|(_, text)| text)?;
                write().api_key = api_key;
            }
            Content::Keys(n) => {
                let keys = read_keys(&file.path)?;
                write().files[n] = keys;
            }
        }
        Ok(())
    }

    /// Fetches the JWK sets until the node shuts down, and reports in readiness those that cannot
    /// be fetched. Their former keys stay in effect.
    pub async fn follow_key_servers(self, readiness: Readiness, shutdown: Shutdown) {
        let servers = self.0.servers.iter();
        let follow = servers.map(|server| Arc::clone(server).follow(&readiness, &shutdown));
        futures_util::future::join_all(follow).await;
    }

    /// The secrets that still have the placeholder text of the annotated configuration: the
    /// configuration key, such as `auth.jwt_secret`, and a message with the fix. Only secrets given
    /// in place are checked, not files.
    pub fn placeholders(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        let fix = "is still the example value, which is public; set your own, for example from: openssl rand -hex 32";
        let secrets = [
            ("auth.jwt_secret", &self.0.config.jwt_secret),
            ("auth.api_key", &self.0.config.api_key),
        ];
        let is_placeholder = |secret: &Option<Secret>| {
            secret
                .as_ref()
                .is_some_and(|secret| secret.0.starts_with("change-me"))
        };
        secrets
            .into_iter()
            .filter(move |(_, secret)| is_placeholder(secret))
            .map(move |(key, _)| (key, fix))
    }

    pub fn is_dev(&self) -> bool {
        self.0.config.dev
    }

    /// The user of a stream: from the bearer token, the configured cookie, or in dev mode `?user=`.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn stream_identity(&self, parts: &Parts) -> Result<StreamIdentity, Error> {
        let credentials = self.credentials(parts)?;
        self.identify(&credentials).await
    }

    /// The credentials of the request, not checked yet.
    ///
    /// # Errors
    /// There is nothing, or a node with this configuration would accept nothing.
    pub fn credentials(&self, parts: &Parts) -> Result<Credentials, Error> {
        let config = &self.0.config;
        let token = match bearer(parts)? {
            Some(token) => Some(token),
            None => config
                .cookie
                .as_deref()
                .and_then(|name| cookie(parts, name)),
        };
        match token {
            Some(token) if self.accepts_tokens() => Ok(Credentials::Token(token.to_owned())),
            _ if config.dev => {
                let user = query(parts, "user").ok_or_else(|| {
                    Error::Missing("the user is missing; in dev mode add ?user=NAME".to_owned())
                })?;
                let user =
                    Name::parse(&user).map_err(|e| Error::Invalid(e.of("the user").to_string()))?;
                Ok(Credentials::User(user))
            }
            None if self.accepts_tokens() => {
                let or = config
                    .cookie
                    .as_ref()
                    .map(|name| format!(", or it in the cookie '{name}'"));
                Err(Error::Missing(format!(
                    "a user token is required; send Authorization: Bearer <token>{}",
                    or.unwrap_or_default()
                )))
            }
            _ => Err(NO_TOKENS),
        }
    }

    /// Checks credentials.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn identify(&self, credentials: &Credentials) -> Result<StreamIdentity, Error> {
        match credentials {
            Credentials::Token(token) => self.verify(token).await,
            Credentials::User(user) if self.0.config.dev => Ok(StreamIdentity {
                reader: user.clone().into(),
                expiry: None,
                framing: FramingChoice::default(),
            }),
            // A ticket of a node in dev mode, on the same broker.
            Credentials::User(_) => Err(NO_TOKENS),
        }
    }

    fn accepts_tokens(&self) -> bool {
        let AuthInner { local, servers, .. } = &*self.0;
        let local = local.read().unwrap_or_else(PoisonError::into_inner);
        local.secret.is_some() || !local.files.is_empty() || !servers.is_empty()
    }

    /// Checks that the request may publish, change recipients, and read and redrive dead letters.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn authorize_key(&self, parts: &Parts) -> Result<(), Error> {
        if self.0.config.dev {
            return Ok(());
        }
        let local = self.0.local.read().unwrap_or_else(PoisonError::into_inner);
        let Some(key) = &local.api_key else {
            return Err(Error::Unavailable {
                what: "this node accepts no API keys",
                fix: "set auth.api_key or auth.api_key_file",
            });
        };
        let shown = bearer(parts)?.ok_or_else(|| {
            Error::Missing("the API key is required; send Authorization: Bearer <key>".to_owned())
        })?;
        let shown: [u8; 32] = Sha256::digest(shown).into();
        // Compare all bytes, so that the time does not reveal where they differ.
        let difference = key.iter().zip(shown).fold(0, |all, (a, b)| all | (a ^ b));
        if difference == 0 {
            Ok(())
        } else {
            Err(Error::Invalid("the API key does not match".to_owned()))
        }
    }

    /// Checks a token with every key that may have signed it. If none did, and the token names an
    /// unknown one, the key servers are asked for new keys first.
    async fn verify(&self, token: &str) -> Result<StreamIdentity, Error> {
        let header = token::header(token)?;
        match self.check(token, &header) {
            Ok(identity) => return Ok(identity),
            Err(Failure::Refused(error)) => return Err(error),
            Err(Failure::Signature) => {}
        }
        let id = header.kid.as_deref();
        if !self.0.servers.is_empty() && !self.0.servers.iter().any(|server| server.knows(id)) {
            let refreshes = self.0.servers.iter().map(KeyServer::refresh);
            futures_util::future::join_all(refreshes).await;
            match self.check(token, &header) {
                Ok(identity) => return Ok(identity),
                Err(Failure::Refused(error)) => return Err(error),
                Err(Failure::Signature) => {}
            }
            let is_known = self.0.servers.iter().any(|server| server.knows(id));
            if !is_known && !self.0.servers.iter().all(|server| server.is_current()) {
                return Err(Error::KeysUnavailable);
            }
        }
        Err(self.unknown_key(&header))
    }

    fn check(&self, token: &str, header: &jsonwebtoken::Header) -> Result<StreamIdentity, Failure> {
        let keys = self.keys();
        let candidates = keys.iter().filter(|key| {
            key.algorithms.contains(&header.alg)
                // A key without an id may have signed any token, and a token without an id may be
                // signed by any key.
                && (key.id.is_none() || header.kid.is_none() || key.id == header.kid)
        });
        for key in candidates.take(MAX_CANDIDATES) {
            match self.0.checks.check(token, header.alg, key) {
                Err(Failure::Signature) => {}
                checked => return checked,
            }
        }
        Err(Failure::Signature)
    }

    fn keys(&self) -> Vec<Arc<VerificationKey>> {
        let mut keys: Vec<Arc<VerificationKey>> = {
            let local = self.0.local.read().unwrap_or_else(PoisonError::into_inner);
            let files = local.files.iter().flatten();
            local.secret.iter().chain(files).cloned().collect()
        };
        for server in &self.0.servers {
            keys.extend(server.keys());
        }
        keys
    }

    /// The error for a token that no key has signed.
    fn unknown_key(&self, header: &jsonwebtoken::Header) -> Error {
        let keys = self.keys();
        if keys.iter().any(|key| key.algorithms.contains(&header.alg)) {
            return Error::Invalid("the token's signature is invalid".to_owned());
        }
        let mut accepted: Vec<String> = keys
            .iter()
            .flat_map(|key| &key.algorithms)
            .map(|algorithm| format!("{algorithm:?}"))
            .collect();
        accepted.sort();
        accepted.dedup();
        Error::Invalid(format!(
            "the token is signed with {:?}; this node accepts {}",
            header.alg,
            accepted.join(", ")
        ))
    }
}

fn read_secret(config: &Config) -> Result<Option<VerificationKey>, (&'static str, String)> {
    let secret = secret(
        "jwt_secret",
        config.jwt_secret.as_ref(),
        "jwt_secret_file",
        config.jwt_secret_file.as_deref(),
        32,
    )?;
    Ok(secret.and_then(|secret| VerificationKey::secret(secret.as_bytes())))
}

fn read_api_key(config: &Config) -> Result<Option<[u8; 32]>, (&'static str, String)> {
    let key = secret(
        "api_key",
        config.api_key.as_ref(),
        "api_key_file",
        config.api_key_file.as_deref(),
        16,
    )?;
    Ok(key.map(|key| Sha256::digest(key.as_bytes()).into()))
}

fn read_keys(path: &Path) -> Result<Vec<Arc<VerificationKey>>, String> {
    let text = read_text(path)?;
    let keys = keys::read_file(&text).map_err(|why| format!("{} {why}", path.display()))?;
    Ok(keys.into_iter().map(Arc::new).collect())
}

fn read_text(path: &Path) -> Result<String, String> {
    regular_file::read_text(path).map_err(|e| {
        format!(
            "{} cannot be read: {e}; use a file that this process can read",
            path.display()
        )
    })
}

/// Reads a secret given in place or in a file. `name` and `file_name` are the configuration keys
/// for errors.
fn secret(
    name: &'static str,
    text: Option<&Secret>,
    file_name: &'static str,
    file: Option<&Path>,
    min_bytes: usize,
) -> Result<Option<String>, (&'static str, String)> {
    let (blame, secret) = match (text, file) {
        (None, None) => return Ok(None),
        (Some(_), Some(_)) => {
            return Err((
                file_name,
                format!("and {name} are mutually exclusive; keep one"),
            ));
        }
        (Some(text), None) => (name, text.0.clone()),
        (None, Some(path)) => {
            let text = read_text(path).map_err(|text| (file_name, text))?;
            (file_name, text.trim_end_matches(['\n', '\r']).to_owned())
        }
    };
    if secret.len() < min_bytes {
        return Err((
            blame,
            format!(
                "has {} bytes, which can be guessed; use at least {min_bytes}, for example from: openssl rand -hex {min_bytes}",
                secret.len()
            ),
        ));
    }
    Ok(Some(secret))
}

/// The credentials of `Authorization: Bearer`.
///
/// # Errors
/// The header appears twice: a proxy and this node could take different ones.
fn bearer(parts: &Parts) -> Result<Option<&str>, Error> {
    let mut headers = parts.headers.get_all(AUTHORIZATION).iter();
    let Some(header) = headers.next() else {
        return Ok(None);
    };
    if headers.next().is_some() {
        return Err(Error::Invalid(
            "the request has several Authorization headers; send one".to_owned(),
        ));
    }
    let credentials = header.to_str().ok().and_then(|text| text.split_once(' '));
    Ok(credentials
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, credentials)| credentials.trim()))
}

fn cookie<'a>(parts: &'a Parts, name: &str) -> Option<&'a str> {
    let pairs = parts
        .headers
        .get_all(COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'));
    pairs
        .filter_map(|pair| pair.trim().split_once('='))
        .find(|(have, _)| *have == name)
        .map(|(_, value)| value.trim_matches('"'))
}

/// A parameter of the query, decoded.
fn query(parts: &Parts, name: &str) -> Option<String> {
    let axum::extract::Query(pairs) =
        axum::extract::Query::<Vec<(String, String)>>::try_from_uri(&parts.uri).ok()?;
    pairs
        .into_iter()
        .find(|(have, _)| have == name)
        .map(|(_, value)| value)
}
