//! Keys that verify tokens, read from a secret, PEM, a JWK or a JWK set. Each permits only the
//! algorithms of its type, whatever a token names.

use base64::Engine as _;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyOperations, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde_json::Value;

/// The maximum number of keys in a file or set.
const MAX_KEYS: usize = 64;

const RSA: [Algorithm; 6] = [
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
];

/// A key with the algorithms that it permits, at least one.
#[derive(Clone, Debug)]
pub(super) struct VerificationKey {
    /// Its `kid`; a token that names another one is not checked with it.
    pub(super) id: Option<String>,
    pub(super) algorithms: Vec<Algorithm>,
    pub(super) key: DecodingKey,
}

impl VerificationKey {
    /// A shared secret. RFC 7518 3.2: not shorter than the output of the hash.
    pub(super) fn secret(secret: &[u8]) -> Option<Self> {
        let algorithms: Vec<Algorithm> = [
            (32, Algorithm::HS256),
            (48, Algorithm::HS384),
            (64, Algorithm::HS512),
        ]
        .into_iter()
        .filter(|(bytes, _)| secret.len() >= *bytes)
        .map(|(_, algorithm)| algorithm)
        .collect();
        (!algorithms.is_empty()).then(|| Self {
            id: None,
            algorithms,
            key: DecodingKey::from_secret(secret),
        })
    }
}

/// Reads the keys of a file: PEM, a JWK, or a JWK set.
///
/// # Errors
/// The reason and the fix, for every key that cannot be used: the operator chose each of them.
pub(super) fn read_file(text: &str) -> Result<Vec<VerificationKey>, String> {
    if text.trim_start().starts_with('{') {
        let (keys, unusable) = read_set(text, Secrets::Allowed)?;
        return match unusable.into_iter().next() {
            Some(reason) => Err(reason),
            None => Ok(keys),
        };
    }
    let blocks = pem_blocks(text);
    if blocks.is_empty() {
        return Err("holds no key; use PEM (openssl pkey -pubout), a JWK or a JWK set".to_owned());
    }
    bounded(blocks.len())?;
    blocks.into_iter().map(from_pem).collect()
}

/// Whether a set may hold shared secrets. A published one is not a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Secrets {
    Allowed,
    Refused,
}

/// Reads a JWK set, or a single JWK. Returns the keys, and for each key that cannot be used the
/// reason; keys for other purposes are left out.
///
/// # Errors
/// The text is not a set, or has too many keys or none.
pub(super) fn read_set(
    text: &str,
    secrets: Secrets,
) -> Result<(Vec<VerificationKey>, Vec<String>), String> {
    let set: Value = serde_json::from_str(text)
        .map_err(|e| format!("is not a JWK set ({e}); use valid JSON"))?;
    let members = match set.get("keys") {
        Some(Value::Array(keys)) => keys.clone(),
        Some(_) => return Err("is not a JWK set; 'keys' must be a list".to_owned()),
        None => vec![set],
    };
    bounded(members.len())?;
    let (mut keys, mut unusable) = (Vec::new(), Vec::new());
    for member in &members {
        match from_jwk(member, secrets) {
            Ok(Some(key)) => keys.push(key),
            Ok(None) => {}
            Err(reason) => unusable.push(reason),
        }
    }
    if keys.is_empty() {
        let reason = unusable.into_iter().next();
        return Err(reason.unwrap_or_else(|| {
            "holds no key for signatures; publish one with use \"sig\"".to_owned()
        }));
    }
    Ok((keys, unusable))
}

fn bounded(n_keys: usize) -> Result<(), String> {
    if n_keys > MAX_KEYS {
        return Err(format!(
            "holds {n_keys} keys; the limit is {MAX_KEYS}, so remove outdated ones"
        ));
    }
    Ok(())
}

/// `None`: the key has another purpose.
fn from_jwk(member: &Value, secrets: Secrets) -> Result<Option<VerificationKey>, String> {
    let jwk: Jwk = serde_json::from_value(member.clone())
        .map_err(|e| format!("has a key that cannot be read ({e}); remove it"))?;
    let common = &jwk.common;
    let is_for_signatures = common
        .public_key_use
        .as_ref()
        .is_none_or(|purpose| *purpose == PublicKeyUse::Signature)
        && common
            .key_operations
            .as_ref()
            .is_none_or(|operations| operations.contains(&KeyOperations::Verify));
    if !is_for_signatures {
        return Ok(None);
    }
    let id = common.key_id.clone();
    let fault = |why: &str| {
        let id: String = id
            .as_deref()
            .unwrap_or("without kid")
            .chars()
            .take(64)
            .collect();
        format!("has the key '{}', which {why}", id.escape_debug())
    };
    let is_oct = matches!(jwk.algorithm, AlgorithmParameters::OctetKey(_));
    if !is_oct && member.get("d").is_some() {
        return Err(fault(
            "is a private key; replace it with the public one, as anyone who reads it can sign tokens",
        ));
    }
    let of_type = match &jwk.algorithm {
        AlgorithmParameters::RSA(rsa) => {
            let n_bytes = decoded(&rsa.n).map_or(0, |n| n.len());
            if n_bytes < 256 {
                return Err(fault("has less than 2048 bits; use a longer one"));
            }
            RSA.to_vec()
        }
        AlgorithmParameters::EllipticCurve(ec) => {
            let (n_bytes, algorithm) = match ec.curve {
                EllipticCurve::P256 => (32, Algorithm::ES256),
                EllipticCurve::P384 => (48, Algorithm::ES384),
                _ => {
                    return Err(fault(
                        "has a curve other than P-256, P-384 and Ed25519; use one of these",
                    ));
                }
            };
            if [&ec.x, &ec.y]
                .iter()
                .any(|part| decoded(part).is_none_or(|part| part.len() != n_bytes))
            {
                return Err(fault(
                    "has coordinates of the wrong length; export it again",
                ));
            }
            vec![algorithm]
        }
        AlgorithmParameters::OctetKeyPair(pair) => {
            if pair.curve != EllipticCurve::Ed25519
                || decoded(&pair.x).is_none_or(|x| x.len() != 32)
            {
                return Err(fault("is not a valid Ed25519 key; export it again"));
            }
            vec![Algorithm::EdDSA]
        }
        AlgorithmParameters::OctetKey(secret) => {
            if secrets == Secrets::Refused {
                return Err(fault("is a shared secret; publish public keys only"));
            }
            let key = decoded(&secret.value).and_then(|secret| VerificationKey::secret(&secret));
            key.ok_or_else(|| fault("has less than 32 bytes; use a longer one"))?
                .algorithms
        }
        _ => return Err(fault("has an unknown type; use RSA, EC, OKP or oct")),
    };
    let algorithms = match common.key_algorithm {
        None => of_type,
        Some(named) => of_type
            .into_iter()
            .filter(|algorithm| jsonwebtoken::jwk::KeyAlgorithm::from(*algorithm) == named)
            .collect(),
    };
    if algorithms.is_empty() {
        return Err(fault(
            "names an algorithm that its type does not have, or that is not supported; correct 'alg' or leave it out",
        ));
    }
    let key = DecodingKey::from_jwk(&jwk).map_err(|_| fault("cannot be read; export it again"))?;
    Ok(Some(VerificationKey {
        id,
        algorithms,
        key,
    }))
}

fn decoded(base64: &str) -> Option<Vec<u8>> {
    BASE64_URL_SAFE_NO_PAD.decode(base64).ok()
}

/// A block of PEM: its label and its text between the markers.
fn pem_blocks(text: &str) -> Vec<(&str, &str)> {
    let mut blocks = Vec::new();
    let mut rest = text;
    while let Some((_, after)) = rest.split_once("-----BEGIN ") {
        let Some((label, after)) = after.split_once("-----") else {
            break;
        };
        let Some((body, after)) = after.split_once("-----END ") else {
            break;
        };
        blocks.push((label, body));
        rest = after;
    }
    blocks
}

fn from_pem((label, body): (&str, &str)) -> Result<VerificationKey, String> {
    match label {
        "PUBLIC KEY" | "RSA PUBLIC KEY" => {}
        "CERTIFICATE" => {
            return Err(
                "holds a certificate; extract its key with openssl x509 -pubkey -noout".to_owned(),
            );
        }
        label if label.ends_with("PRIVATE KEY") => {
            return Err(
                "holds a private key, which a node must not have; use openssl pkey -pubout"
                    .to_owned(),
            );
        }
        label => {
            return Err(format!(
                "holds '{}' in PEM; use PUBLIC KEY, as from openssl pkey -pubout",
                label.escape_debug()
            ));
        }
    }
    let body: String = body.split_whitespace().collect();
    let der = BASE64_STANDARD
        .decode(body)
        .map_err(|e| format!("is not valid PEM ({e}); export it again"))?;
    let key = if label == "PUBLIC KEY" {
        from_public_key_info(&der)
    } else {
        from_rsa(&der)
    };
    key.ok_or_else(|| {
        "holds a key other than RSA (2048 to 8192 bits), P-256, P-384 and Ed25519; use one of these"
            .to_owned()
    })
}

/// The DER before the key itself in a `SubjectPublicKeyInfo`. It has one form for each type of key.
const P256_PREFIX: &[u8] = b"\x30\x59\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07\x03\x42\x00";
const P384_PREFIX: &[u8] =
    b"\x30\x76\x30\x10\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x05\x2b\x81\x04\x00\x22\x03\x62\x00";
const ED25519_PREFIX: &[u8] = b"\x30\x2a\x30\x05\x06\x03\x2b\x65\x70\x03\x21\x00";
/// `rsaEncryption`, after the header of the outer sequence.
const RSA_ALGORITHM: &[u8] = b"\x30\x0d\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01\x05\x00";

fn from_public_key_info(der: &[u8]) -> Option<VerificationKey> {
    let key = |algorithm, key| {
        Some(VerificationKey {
            id: None,
            algorithms: vec![algorithm],
            key,
        })
    };
    if let Some(point) = der
        .strip_prefix(P256_PREFIX)
        .filter(|point| point.len() == 65)
    {
        return key(Algorithm::ES256, DecodingKey::from_ec_der(point));
    }
    if let Some(point) = der
        .strip_prefix(P384_PREFIX)
        .filter(|point| point.len() == 97)
    {
        return key(Algorithm::ES384, DecodingKey::from_ec_der(point));
    }
    if let Some(point) = der
        .strip_prefix(ED25519_PREFIX)
        .filter(|point| point.len() == 32)
    {
        return key(Algorithm::EdDSA, DecodingKey::from_ed_der(point));
    }
    // Of 2048 bits and more, so that both lengths take two bytes; then the number of unused bits.
    let rest = der.strip_prefix(b"\x30\x82")?.get(2..)?;
    let rest = rest
        .strip_prefix(RSA_ALGORITHM)?
        .strip_prefix(b"\x03\x82")?;
    from_rsa(rest.get(2..)?.strip_prefix(b"\x00")?)
}

/// From a PKCS#1 `RSAPublicKey`.
fn from_rsa(der: &[u8]) -> Option<VerificationKey> {
    let [0x30, 0x82, high, low, rest @ ..] = der else {
        return None;
    };
    let is_whole = rest.len() == usize::from(u16::from_be_bytes([*high, *low]));
    // A modulus of 256 to 1024 bytes, perhaps after a zero byte, and an exponent.
    (is_whole && (260..1_040).contains(&rest.len())).then(|| VerificationKey {
        id: None,
        algorithms: RSA.to_vec(),
        key: DecodingKey::from_rsa_der(der),
    })
}
