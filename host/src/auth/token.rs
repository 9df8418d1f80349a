//! A signed token: checks its signature with a key and its claims, and reads the user, groups,
//! attributes and the form of notifications.

use std::borrow::Cow;
use std::collections::HashSet;

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, Header, Validation};
use serde::Deserialize as _;
use serde_json::Value;

use super::keys::VerificationKey;
use super::{Config, Error, StreamIdentity};
use crate::clock;
use crate::delivery::recipients::{Claims, Reader};
use crate::delivery::sse::{FramingChoice, TokenExpiry};
use crate::duration::millis;
use crate::event::Name;
use crate::event::criteria::parse_attributes;

/// The maximum number of groups in a token: its streams follow the log of each.
const MAX_GROUPS: usize = 256;
/// The maximum size of a token, in bytes: more than the header fields of a request may have.
const MAX_BYTES: usize = 64 * 1024;
/// The latest `exp`, in seconds from now. One beyond is a mistake, such as milliseconds, and the
/// token would never expire.
const MAX_LIFE_S: u64 = 10 * 365 * 24 * 3_600;

/// The result of checking a token with one key.
#[derive(Debug)]
pub(super) enum Failure {
    /// Another key signed it.
    Signature,
    Refused(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Refused(error)
    }
}

fn invalid(text: impl Into<String>) -> Error {
    Error::Invalid(text.into())
}

/// Reads the header of a token, which nothing has verified yet.
///
/// # Errors
/// The text is not a token, or its algorithm is `none` or unknown.
pub(super) fn header(token: &str) -> Result<Header, Error> {
    if token.len() > MAX_BYTES {
        return Err(invalid(format!(
            "the token has {} bytes; the limit is {MAX_BYTES}",
            token.len()
        )));
    }
    jsonwebtoken::decode_header(token).map_err(|_| invalid("this is not a valid token"))
}

/// The requirements of the configuration for a token.
#[derive(Debug)]
pub(super) struct TokenChecks {
    config: Config,
    validation: Validation,
}

impl TokenChecks {
    pub(super) fn new(config: &Config) -> Self {
        Self {
            config: config.clone(),
            validation: validation(config),
        }
    }

    /// Checks a token with a key that permits its algorithm.
    pub(super) fn check(
        &self,
        token: &str,
        algorithm: Algorithm,
        key: &VerificationKey,
    ) -> Result<StreamIdentity, Failure> {
        let mut validation = self.validation.clone();
        validation.algorithms = vec![algorithm];
        let decode = |validation: &Validation| {
            jsonwebtoken::decode::<serde_json::Map<String, Value>>(token, &key.key, validation)
        };
        let mut decoded = decode(&validation);
        // Everything else is checked before the client learns that only the time is wrong.
        let has_expired = matches!(&decoded, Err(e) if *e.kind() == ErrorKind::ExpiredSignature);
        if has_expired {
            validation.validate_exp = false;
            decoded = decode(&validation);
        }
        let decoded = decoded.map_err(|e| match e.kind() {
            ErrorKind::InvalidSignature => Failure::Signature,
            ErrorKind::ImmatureSignature => invalid("the token is not valid yet").into(),
            ErrorKind::InvalidAudience => invalid("the token is for another audience").into(),
            ErrorKind::InvalidIssuer => invalid("the token is from another issuer").into(),
            ErrorKind::MissingRequiredClaim(claim) | ErrorKind::InvalidClaimFormat(claim) => {
                invalid(format!("the token has no readable claim '{claim}'")).into()
            }
            _ => Failure::Refused(invalid("this is not a valid token")),
        })?;
        // RFC 7515 4.1.11: a token with an extension that its reader does not know is invalid.
        // This node knows none.
        if decoded.header.crit.is_some() {
            let text = "the token's header 'crit' names extensions that this node does not know";
            return Err(invalid(text).into());
        }
        let claims = &decoded.claims;
        let identity = StreamIdentity {
            reader: Reader {
                user: self.user(claims)?,
                claims: self.claims(claims)?,
            },
            expiry: self.expiry(claims)?,
            framing: self.framing(claims)?,
        };
        if has_expired {
            return Err(Error::Expired.into());
        }
        Ok(identity)
    }

    /// The user.
    fn user(&self, claims: &serde_json::Map<String, Value>) -> Result<Name, Error> {
        let claim = &self.config.user_claim;
        let user = claims.get(claim).and_then(as_name).ok_or_else(|| {
            invalid(format!(
                "the token has no claim '{claim}' with a string or a whole number, which names the user"
            ))
        })?;
        Name::parse(&user)
            .map_err(|e| invalid(e.of(format!("the token's claim '{claim}'")).to_string()))
    }

    fn expiry(
        &self,
        claims: &serde_json::Map<String, Value>,
    ) -> Result<Option<TokenExpiry>, Error> {
        let Some(expires_s) = claims.get("exp").and_then(Value::as_f64) else {
            return Ok(None);
        };
        let expires_s = expires_s.max(0.0) as u64;
        if expires_s > clock::now_ms() / 1_000 + MAX_LIFE_S {
            return Err(invalid(
                "the token expires in more than ten years; 'exp' is in seconds",
            ));
        }
        Ok(Some(TokenExpiry {
            expires_ms: expires_s.saturating_mul(1000),
            // Without the leeway, a token accepted just after its `exp` would open a stream that
            // ends at once, again and again.
            ends_ms: expires_s
                .saturating_add(leeway_s(&self.config))
                .saturating_mul(1000),
        }))
    }

    /// The form of notifications that the token chooses. Refused if it is malformed: a page that
    /// expects the data alone could not read the notifications.
    fn framing(&self, claims: &serde_json::Map<String, Value>) -> Result<FramingChoice, Error> {
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
    fn claims(&self, claims: &serde_json::Map<String, Value>) -> Result<Claims, Error> {
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

/// The leeway in seconds, as the library counts it. Rounded up, so that "500ms" is not 0.
fn leeway_s(config: &Config) -> u64 {
    millis(config.leeway).div_ceil(1_000)
}

fn validation(config: &Config) -> Validation {
    // `check` replaces the algorithm by that of the token, if the key permits it.
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

/// The name in a claim. Many applications know their users and groups as whole numbers, and JSON
/// keeps them as numbers.
fn as_name(claim: &Value) -> Option<Cow<'_, str>> {
    match claim {
        Value::String(text) => Some(Cow::Borrowed(text)),
        Value::Number(number) if !number.is_f64() => Some(Cow::Owned(number.to_string())),
        _ => None,
    }
}
