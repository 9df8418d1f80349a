//! Authentication: the user of a stream, and whether a request may publish, change recipients or
//! read dead letters.
//!
//! The user comes from a verified token, never from the URL. The exception is `dev` mode, which
//! requires no token and therefore listens on loopback only. This module reads request heads and
//! knows no status codes: `http` turns an [`Error`] into a response. `subscription` decides what a
//! user may *see*.

mod signature;

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::http::header::{AUTHORIZATION, COOKIE};
use axum::http::request::Parts;
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::delivery::recipients::{Claims, Reader};
use crate::delivery::sse::{FramingChoice, TokenExpiry};
use crate::duration::millis;
use crate::event::Name;
use crate::event::criteria::parse_attributes;

/// The maximum number of groups in a token: its streams follow the log of each.
const MAX_GROUPS: usize = 256;

/// The `[auth]` section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Trust `?user=` and require no key; listens on loopback only (false).
    pub dev: bool,
    /// The secret of HS256 tokens, at least 32 bytes (none).
    pub jwt_secret: Option<Secret>,
    /// A file that holds the token secret instead; line breaks at its end are ignored (none).
    pub jwt_secret_file: Option<PathBuf>,
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
    Missing(&'static str),
    /// The token is valid except that it has expired.
    #[error("the token has expired")]
    Expired,
    /// The token, key or user is invalid.
    #[error("{0}")]
    Invalid(String),
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

/// The checked `[auth]` section with its loaded secrets.
#[derive(Clone)]
pub struct Auth {
    config: Config,
    tokens: Option<(DecodingKey, Validation)>,
    /// The hash of the API key, so that a comparison takes the same time for every guess.
    api_key: Option<[u8; 32]>,
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Auth")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Auth {
    /// Checks the section and reads the files that it names. `listen`: every address that the node
    /// listens on.
    ///
    /// A node that could open no stream is refused at start, instead of showing up as a 401 to the
    /// first reader. A node without an API key is valid, because events may come from Redis alone.
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
        let jwt_secret = secret(
            "jwt_secret",
            config.jwt_secret.as_ref(),
            "jwt_secret_file",
            config.jwt_secret_file.as_deref(),
            32,
        )?;
        let key = secret(
            "api_key",
            config.api_key.as_ref(),
            "api_key_file",
            config.api_key_file.as_deref(),
            16,
        )?;
        if jwt_secret.is_none() && !config.dev {
            return Err((
                "jwt_secret",
                "is missing, so no stream could be opened; set it or jwt_secret_file, or use --dev for local testing".to_owned(),
            ));
        }
        signature::install();
        let tokens = jwt_secret.map(|secret| {
            (
                DecodingKey::from_secret(secret.as_bytes()),
                validation(config),
            )
        });
        Ok(Self {
            config: config.clone(),
            tokens,
            api_key: key.map(|key| Sha256::digest(key.as_bytes()).into()),
        })
    }

    /// The secrets that still have the placeholder text of the annotated configuration: the
    /// configuration key, such as `auth.jwt_secret`, and a message with the fix. Only secrets given
    /// in place are checked, not files.
    pub fn placeholders(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        let fix = "is still the example value, which is public; set your own, for example from: openssl rand -hex 32";
        let secrets = [
            ("auth.jwt_secret", &self.config.jwt_secret),
            ("auth.api_key", &self.config.api_key),
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
        self.config.dev
    }

    /// The user of a stream: from the bearer token, the configured cookie, or in dev mode `?user=`.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn stream_identity(&self, parts: &Parts) -> Result<StreamIdentity, Error> {
        let token = bearer(parts).or_else(|| cookie(parts, self.config.cookie.as_deref()?));
        match (&self.tokens, token) {
            (Some(tokens), Some(token)) => self.verify(tokens, token),
            _ if self.config.dev => {
                let user = query(parts, "user").ok_or(Error::Missing(
                    "the user is missing; in dev mode add ?user=NAME",
                ))?;
                let user =
                    Name::parse(&user).map_err(|e| Error::Invalid(e.of("the user").to_string()))?;
                Ok(StreamIdentity {
                    reader: user.into(),
                    expiry: None,
                    framing: FramingChoice::default(),
                })
            }
            (Some(_), None) => Err(Error::Missing(
                "a user token is required; send Authorization: Bearer <token>",
            )),
            (None, _) => Err(Error::Unavailable {
                what: "this node accepts no tokens",
                fix: "set auth.jwt_secret or auth.jwt_secret_file",
            }),
        }
    }

    /// Checks that the request may publish, change recipients, and read and redrive dead letters.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn authorize_key(&self, parts: &Parts) -> Result<(), Error> {
        if self.config.dev {
            return Ok(());
        }
        let Some(key) = &self.api_key else {
            return Err(Error::Unavailable {
                what: "this node accepts no API keys",
                fix: "set auth.api_key or auth.api_key_file",
            });
        };
        let shown: [u8; 32] = Sha256::digest(bearer(parts).ok_or(Error::Missing(
            "the API key is required; send Authorization: Bearer <key>",
        ))?)
        .into();
        // Compare all bytes, so that the time does not reveal where they differ.
        let difference = key.iter().zip(shown).fold(0, |all, (a, b)| all | (a ^ b));
        if difference == 0 {
            Ok(())
        } else {
            Err(Error::Invalid("the API key does not match".to_owned()))
        }
    }

    fn verify(
        &self,
        (key, validation): &(DecodingKey, Validation),
        token: &str,
    ) -> Result<StreamIdentity, Error> {
        let decode = |validation| {
            jsonwebtoken::decode::<serde_json::Map<String, serde_json::Value>>(
                token, key, validation,
            )
        };
        let mut decoded = decode(validation);
        // Everything else is checked before the client learns that only the time is wrong.
        let has_expired = matches!(&decoded, Err(e) if *e.kind() == ErrorKind::ExpiredSignature);
        if has_expired {
            let mut any_time = validation.clone();
            any_time.validate_exp = false;
            decoded = decode(&any_time);
        }
        let claims = decoded.map_err(|e| {
            Error::Invalid(match e.kind() {
                ErrorKind::ImmatureSignature => "the token is not valid yet".to_owned(),
                ErrorKind::InvalidSignature => "the token's signature is invalid".to_owned(),
                ErrorKind::InvalidAlgorithm | ErrorKind::InvalidAlgorithmName => {
                    "the token is not signed with HS256".to_owned()
                }
                ErrorKind::InvalidAudience => "the token is for another audience".to_owned(),
                ErrorKind::InvalidIssuer => "the token is from another issuer".to_owned(),
                ErrorKind::MissingRequiredClaim(claim) => {
                    format!("the token has no readable claim '{claim}'")
                }
                _ => "this is not a valid token".to_owned(),
            })
        })?;
        // RFC 7515 4.1.11: a token with an extension that its reader does not know is invalid.
        // This node knows none.
        if claims.header.crit.is_some() {
            return Err(Error::Invalid(
                "the token's header 'crit' names extensions that this node does not know"
                    .to_owned(),
            ));
        }
        let claim = &self.config.user_claim;
        let user = claims.claims.get(claim).and_then(as_name).ok_or_else(|| {
            Error::Invalid(format!(
                "the token has no string claim '{claim}', which names the user"
            ))
        })?;
        let user = Name::parse(&user).map_err(|e| {
            Error::Invalid(e.of(format!("the token's claim '{claim}'")).to_string())
        })?;
        let expires_s = claims
            .claims
            .get("exp")
            .and_then(serde_json::Value::as_f64)
            .map(|s| s.max(0.0) as u64);
        let expiry = expires_s.map(|expires_s| TokenExpiry {
            expires_ms: expires_s.saturating_mul(1000),
            // Without the leeway, a token accepted just after its `exp` would open a stream that
            // ends at once, again and again.
            ends_ms: expires_s
                .saturating_add(leeway_s(&self.config))
                .saturating_mul(1000),
        });
        let framing = self.framing(&claims.claims)?;
        let claims = self.claims(&claims.claims)?;
        if has_expired {
            return Err(Error::Expired);
        }
        Ok(StreamIdentity {
            reader: Reader { user, claims },
            expiry,
            framing,
        })
    }

    /// The form of notifications that the token chooses. Refused if it is malformed: a page that
    /// expects the data alone could not read the notifications.
    fn framing(
        &self,
        claims: &serde_json::Map<String, serde_json::Value>,
    ) -> Result<FramingChoice, Error> {
        let claim = &self.config.stream_claim;
        let value = claims
            .get(claim)
            .filter(|value| !claim.is_empty() && !value.is_null());
        let Some(value) = value else {
            return Ok(FramingChoice::default());
        };
        let refused = |why: String| Error::Invalid(format!("the token's claim '{claim}' {why}"));
        if !value.is_object() {
            return Err(refused("is not an object".to_owned()));
        }
        FramingChoice::deserialize(value).map_err(|e| refused(format!("cannot be read: {e}")))
    }

    /// The groups and attributes in the token. A malformed claim is refused instead of ignored: a
    /// user left out of a group because of it would never notice.
    fn claims(&self, claims: &serde_json::Map<String, serde_json::Value>) -> Result<Claims, Error> {
        let find = |claim: &String| {
            claims
                .get(claim)
                .filter(|value| !claim.is_empty() && !value.is_null())
        };
        let refused = |claim: &String, why: String| {
            Error::Invalid(format!("the token's claim '{claim}' {why}"))
        };
        let mut read = Claims::default();
        let claim = &self.config.groups_claim;
        if let Some(value) = find(claim) {
            let groups = value
                .as_array()
                .ok_or_else(|| refused(claim, "is not a list of groups".to_owned()))?;
            if groups.len() > MAX_GROUPS {
                return Err(refused(
                    claim,
                    format!("has {} groups; the limit is {MAX_GROUPS}", groups.len()),
                ));
            }
            for group in groups {
                let group = as_name(group)
                    .ok_or_else(|| refused(claim, "has a group that is not a string".to_owned()))?;
                read.groups.insert(
                    Name::parse(&group)
                        .map_err(|e| refused(claim, e.of("has a group that").to_string()))?,
                );
            }
        }
        let claim = &self.config.attributes_claim;
        if let Some(value) = find(claim) {
            let members = value
                .as_object()
                .ok_or_else(|| refused(claim, "is not an object of attributes".to_owned()))?;
            read.attributes = parse_attributes(members.clone())
                .map_err(|e| refused(claim, format!("cannot be read: {e}")))?;
        }
        Ok(read)
    }
}

/// The name in a claim. Ids are often numbers, and JSON keeps them as numbers.
fn as_name(claim: &serde_json::Value) -> Option<Cow<'_, str>> {
    match claim {
        serde_json::Value::String(text) => Some(Cow::Borrowed(text)),
        serde_json::Value::Number(number) if !number.is_f64() => {
            Some(Cow::Owned(number.to_string()))
        }
        _ => None,
    }
}

/// The leeway in seconds, as the library counts it. Rounded up, so that "500ms" is not 0.
fn leeway_s(config: &Config) -> u64 {
    millis(config.leeway).div_ceil(1_000)
}

fn validation(config: &Config) -> Validation {
    let mut validation = Validation::new(Algorithm::HS256);
    validation.leeway = leeway_s(config);
    validation.validate_nbf = true;
    let mut required = HashSet::new();
    if config.require_expiry {
        required.insert("exp".to_owned());
    }
    // `aud` is checked only if the operator configured one; otherwise the library would refuse
    // every token that has one.
    validation.validate_aud = config.audience.is_some();
    if let Some(audience) = &config.audience {
        validation.set_audience(&[audience]);
        required.insert("aud".to_owned());
    }
    if let Some(issuer) = &config.issuer {
        validation.set_issuer(&[issuer]);
        required.insert("iss".to_owned());
    }
    validation.required_spec_claims = required;
    validation
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
            let text = std::fs::read_to_string(path).map_err(|e| {
                (
                    file_name,
                    format!(
                        "{} cannot be read: {e}; use a file that this process can read",
                        path.display()
                    ),
                )
            })?;
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
fn bearer(parts: &Parts) -> Option<&str> {
    let (scheme, credentials) = parts
        .headers
        .get(AUTHORIZATION)?
        .to_str()
        .ok()?
        .split_once(' ')?;
    scheme
        .eq_ignore_ascii_case("bearer")
        .then(|| credentials.trim())
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

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::prelude::BASE64_URL_SAFE_NO_PAD;

    use super::*;
    use crate::event::criteria::Attributes;

    const SECRET: &str = "0123456789abcdef0123456789abcdef";
    /// 2100-01-01.
    const LATER: u64 = 4_102_444_800;

    fn config() -> Config {
        Config {
            jwt_secret: Some(SECRET.into()),
            api_key: Some("publisher-key-0001".into()),
            cookie: Some("pointsman".into()),
            ..Config::default()
        }
    }

    fn token(claims: &serde_json::Value) -> String {
        signed("HS256", ring::hmac::HMAC_SHA256, claims)
    }

    fn signed(name: &str, hmac: ring::hmac::Algorithm, claims: &serde_json::Value) -> String {
        let header = serde_json::json!({ "alg": name, "typ": "JWT" });
        let [header, claims] =
            [&header, claims].map(|part| BASE64_URL_SAFE_NO_PAD.encode(part.to_string()));
        let message = format!("{header}.{claims}");
        let key = ring::hmac::Key::new(hmac, SECRET.as_bytes());
        let signature = ring::hmac::sign(&key, message.as_bytes());
        format!("{message}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
    }

    fn request(uri: &str, headers: &[(&str, &str)]) -> Parts {
        let mut builder = axum::http::Request::get(uri);
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        builder.body(()).unwrap().into_parts().0
    }

    #[test]
    fn the_user_comes_from_the_token_not_from_the_url() {
        let auth = Auth::new(&config(), &[]).unwrap();
        let bearer = format!(
            "Bearer {}",
            token(&serde_json::json!({ "sub": "ann", "exp": LATER }))
        );
        let identity = auth
            .stream_identity(&request(
                "/v1/stream?user=bob",
                &[("authorization", &bearer)],
            ))
            .unwrap();
        assert_eq!(
            (identity.reader.user.as_str(), identity.expiry),
            (
                "ann",
                Some(TokenExpiry {
                    expires_ms: LATER * 1000,
                    ends_ms: (LATER + 30) * 1000,
                })
            )
        );
        assert!(matches!(
            auth.stream_identity(&request("/v1/stream?user=bob", &[])),
            Err(Error::Missing(_))
        ));

        let cookie = format!(
            "a=b; pointsman={}; c=d",
            token(&serde_json::json!({ "sub": "ann", "exp": LATER }))
        );
        assert_eq!(
            auth.stream_identity(&request("/v1/stream", &[("cookie", &cookie)]))
                .unwrap()
                .reader
                .user
                .as_str(),
            "ann"
        );
    }

    #[test]
    fn groups_and_attributes_come_from_the_token() {
        let read = |config: &Config, claims: serde_json::Value| {
            let mut all = serde_json::json!({ "sub": "ann", "exp": LATER });
            all.as_object_mut()
                .unwrap()
                .extend(claims.as_object().unwrap().clone());
            let bearer = format!("Bearer {}", token(&all));
            let identity = Auth::new(config, &[])
                .unwrap()
                .stream_identity(&request("/", &[("authorization", &bearer)]));
            identity
                .map(|identity| identity.reader.claims)
                .map_err(|error| error.to_string())
        };
        let claims = serde_json::json!({ "groups": ["ops", "Ülm", "ops"], "attributes": { "plan": "pro", "age": 30, "beta": true } });
        let whole = read(&config(), claims.clone()).unwrap();
        assert_eq!(
            whole.groups.iter().map(Name::as_str).collect::<Vec<_>>(),
            ["ops", "Ülm"]
        );
        assert_eq!(
            serde_json::to_value(&whole.attributes).unwrap(),
            claims["attributes"]
        );
        assert_eq!(
            read(
                &config(),
                serde_json::json!({ "groups": null, "attributes": null })
            )
            .unwrap(),
            Claims::default()
        );

        let renamed = Config {
            groups_claim: "https://shop.example/roles".into(),
            attributes_claim: String::new(),
            ..config()
        };
        let claims = serde_json::json!({ "groups": 7, "https://shop.example/roles": ["staff"], "attributes": "x", "": ["y"] });
        let read_renamed = read(&renamed, claims).unwrap();
        assert_eq!(
            (read_renamed.groups.len(), read_renamed.attributes),
            (1, Attributes::default())
        );

        let many: Vec<_> = (0..257).map(|n| n.to_string()).collect();
        for (claims, expect) in [
            (
                serde_json::json!({ "groups": "ops" }),
                "claim 'groups' is not a list",
            ),
            (
                serde_json::json!({ "groups": [true] }),
                "a group that is not a string",
            ),
            (
                serde_json::json!({ "groups": ["a\nb"] }),
                "control character",
            ),
            (
                serde_json::json!({ "groups": [""] }),
                "a group that is empty",
            ),
            (serde_json::json!({ "groups": many }), "has 257 groups"),
            (
                serde_json::json!({ "attributes": ["plan"] }),
                "claim 'attributes' is not an object",
            ),
            (
                serde_json::json!({ "attributes": { "plan": {"name": "pro"} } }),
                "plan is not a string, number, boolean or list of these",
            ),
        ] {
            let error = read(&config(), claims.clone()).unwrap_err();
            assert!(error.contains(expect), "{claims} gave: {error}");
        }
    }

    #[test]
    fn an_invalid_token_is_refused_with_the_reason() {
        let auth = Auth::new(
            &Config {
                audience: Some("shop".into()),
                ..config()
            },
            &[],
        )
        .unwrap();
        let check = |token: &str, expect: &str| {
            let error = auth
                .stream_identity(&request(
                    "/",
                    &[("authorization", &format!("Bearer {token}"))],
                ))
                .unwrap_err()
                .to_string();
            assert!(error.contains(expect), "{token} gave: {error}");
        };
        let claims = |changed: serde_json::Value| {
            let mut all = serde_json::json!({ "sub": "ann", "exp": LATER, "aud": "shop" });
            all.as_object_mut()
                .unwrap()
                .extend(changed.as_object().unwrap().clone());
            token(&all)
        };
        check("x.y.z", "not a valid token");
        check(&claims(serde_json::json!({ "exp": 1000 })), "expired");
        check(
            &claims(serde_json::json!({ "nbf": LATER })),
            "not valid yet",
        );
        check(
            &claims(serde_json::json!({ "aud": "bank" })),
            "another audience",
        );
        check(
            &claims(serde_json::json!({ "sub": 4.5 })),
            "no string claim 'sub'",
        );
        check(
            &claims(serde_json::json!({ "sub": "a\nb" })),
            "control character",
        );
        check(
            &token(&serde_json::json!({ "sub": "ann", "aud": "shop" })),
            "no readable claim 'exp'",
        );
        let (honest, other) = (
            claims(serde_json::json!({})),
            claims(serde_json::json!({ "sub": "bob" })),
        );
        let forged = format!(
            "{}.{}",
            other.rsplit_once('.').unwrap().0,
            honest.rsplit_once('.').unwrap().1
        );
        check(&forged, "signature");
        // {"alg":"none","typ":"JWT"}
        let body = claims(serde_json::json!({}))
            .split('.')
            .nth(1)
            .unwrap()
            .to_owned();
        check(
            &format!("eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{body}."),
            "token",
        );
        let hs512 = signed(
            "HS512",
            ring::hmac::HMAC_SHA512,
            &serde_json::json!({ "sub": "ann", "exp": LATER, "aud": "shop" }),
        );
        check(&hs512, "HS256");
    }

    #[test]
    fn only_the_configured_api_key_is_accepted() {
        let auth = Auth::new(&config(), &[]).unwrap();
        assert_eq!(
            auth.authorize_key(&request(
                "/",
                &[("authorization", "bearer publisher-key-0001")]
            )),
            Ok(())
        );
        assert!(matches!(
            auth.authorize_key(&request(
                "/",
                &[("authorization", "Bearer publisher-key-0002")]
            )),
            Err(Error::Invalid(_))
        ));
        assert!(matches!(
            auth.authorize_key(&request("/", &[])),
            Err(Error::Missing(_))
        ));
        let keyless = Auth::new(
            &Config {
                api_key: None,
                ..config()
            },
            &[],
        )
        .unwrap();
        assert!(matches!(
            keyless.authorize_key(&request("/", &[("authorization", "Bearer x")])),
            Err(Error::Unavailable { .. })
        ));
    }

    #[test]
    fn dev_mode_trusts_the_url_but_listens_on_loopback_only() {
        let dev = Config {
            dev: true,
            ..Config::default()
        };
        let auth = Auth::new(
            &dev,
            &[
                "127.0.0.1:8080".parse().unwrap(),
                "[::1]:1".parse().unwrap(),
            ],
        )
        .unwrap();
        assert_eq!(
            auth.stream_identity(&request("/v1/stream?user=%C3%9Clrike", &[]))
                .unwrap()
                .reader
                .user
                .as_str(),
            "Ülrike"
        );
        assert!(
            auth.stream_identity(&request("/v1/stream?user=a%0Ab", &[]))
                .is_err()
        );
        assert!(auth.stream_identity(&request("/v1/stream", &[])).is_err());
        assert_eq!(auth.authorize_key(&request("/", &[])), Ok(()));
        let (key, text) = Auth::new(&dev, &["0.0.0.0:8080".parse().unwrap()]).unwrap_err();
        assert!(
            key == "dev" && text.contains("loopback only, not on 0.0.0.0:8080"),
            "{text}"
        );
    }

    #[test]
    fn weak_missing_and_duplicate_secrets_are_configuration_errors() {
        let check =
            |config: Config, key: &str| assert_eq!(Auth::new(&config, &[]).unwrap_err().0, key);
        check(Config::default(), "jwt_secret");
        check(
            Config {
                jwt_secret: Some("short".into()),
                ..config()
            },
            "jwt_secret",
        );
        check(
            Config {
                api_key: Some("short".into()),
                ..config()
            },
            "api_key",
        );
        check(
            Config {
                jwt_secret_file: Some("/nowhere".into()),
                ..config()
            },
            "jwt_secret_file",
        );
        check(
            Config {
                jwt_secret: None,
                jwt_secret_file: Some("/nowhere/at/all".into()),
                ..config()
            },
            "jwt_secret_file",
        );
        assert!(!format!("{:?}", config()).contains("0123456789"));
    }

    #[test]
    fn example_secrets_are_accepted_and_reported() {
        let placeholders = |config: Config| {
            Auth::new(&config, &[])
                .unwrap()
                .placeholders()
                .map(|(key, _)| key)
                .collect::<Vec<_>>()
        };
        let placeholder: Option<Secret> =
            Some("change-me: openssl rand -hex 32 makes a good one".into());
        assert_eq!(placeholders(config()), [""; 0]);
        assert_eq!(
            placeholders(Config {
                jwt_secret: placeholder.clone(),
                ..config()
            }),
            ["auth.jwt_secret"]
        );
        assert_eq!(
            placeholders(Config {
                jwt_secret: placeholder.clone(),
                api_key: placeholder,
                ..config()
            }),
            ["auth.jwt_secret", "auth.api_key"]
        );
    }
}
