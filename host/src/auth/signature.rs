//! Verification of token signatures with `ring`: every algorithm of `jsonwebtoken`.
//!
//! `jsonwebtoken` leaves cryptography to a provider. Both of its own take longer to compile:
//! `rust_crypto` adds some 35 crates, `aws_lc_rs` a large C library. This provider only verifies,
//! because a node signs nothing. `keys` decides which algorithms a key permits; `jsonwebtoken`
//! checks the claims.

use jsonwebtoken::crypto::{CryptoProvider, JwtVerifier, KeyUtils};
use jsonwebtoken::errors::{ErrorKind, Result};
use jsonwebtoken::{Algorithm, DecodingKey, DecodingKeyKind};
use ring::error::Unspecified;
use ring::hmac;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256,
    RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512, RSA_PSS_2048_8192_SHA256,
    RSA_PSS_2048_8192_SHA384, RSA_PSS_2048_8192_SHA512, RsaParameters, RsaPublicKeyComponents,
    UnparsedPublicKey, VerificationAlgorithm,
};

static PROVIDER: CryptoProvider = CryptoProvider {
    signer_factory: |_, _| Err(ErrorKind::InvalidAlgorithm.into()),
    verifier_factory: verifier,
    key_utils: KeyUtils::new_unimplemented(),
};

/// Makes `jsonwebtoken` verify with this module, in the whole process.
pub(super) fn install() {
    // An error means that an earlier call has installed it.
    PROVIDER.install_default().ok();
}

fn verifier(algorithm: &Algorithm, key: &DecodingKey) -> Result<Box<dyn JwtVerifier>> {
    // Otherwise a public key, which everyone knows, could serve as the secret of an HMAC.
    if key.family() != algorithm.family() {
        return Err(ErrorKind::InvalidKeyFormat.into());
    }
    Ok(Box::new(Verifier {
        algorithm: *algorithm,
        key: key.clone(),
    }))
}

struct Verifier {
    algorithm: Algorithm,
    key: DecodingKey,
}

impl Verifier {
    fn check(&self, message: &[u8], signature: &[u8]) -> std::result::Result<(), Unspecified> {
        let public = |algorithm: &'static dyn VerificationAlgorithm, key: &[u8]| {
            UnparsedPublicKey::new(algorithm, key).verify(message, signature)
        };
        let secret = |algorithm: hmac::Algorithm, secret: &[u8]| {
            // Compares in constant time.
            hmac::verify(&hmac::Key::new(algorithm, secret), message, signature)
        };
        match (self.algorithm, self.key.kind()) {
            (Algorithm::HS256, DecodingKeyKind::SecretOrDer(key)) => secret(hmac::HMAC_SHA256, key),
            (Algorithm::HS384, DecodingKeyKind::SecretOrDer(key)) => secret(hmac::HMAC_SHA384, key),
            (Algorithm::HS512, DecodingKeyKind::SecretOrDer(key)) => secret(hmac::HMAC_SHA512, key),
            (Algorithm::ES256, DecodingKeyKind::SecretOrDer(key)) => {
                public(&ECDSA_P256_SHA256_FIXED, key)
            }
            (Algorithm::ES384, DecodingKeyKind::SecretOrDer(key)) => {
                public(&ECDSA_P384_SHA384_FIXED, key)
            }
            (Algorithm::EdDSA, DecodingKeyKind::SecretOrDer(key)) => public(&ED25519, key),
            (algorithm, DecodingKeyKind::SecretOrDer(key)) => {
                public(rsa(algorithm).ok_or(Unspecified)?, key)
            }
            (algorithm, DecodingKeyKind::RsaModulusExponent { n, e }) => {
                let parameters = rsa(algorithm).ok_or(Unspecified)?;
                RsaPublicKeyComponents { n, e }.verify(parameters, message, signature)
            }
        }
    }
}

/// Keys of less than 2048 bits are refused.
fn rsa(algorithm: Algorithm) -> Option<&'static RsaParameters> {
    match algorithm {
        Algorithm::RS256 => Some(&RSA_PKCS1_2048_8192_SHA256),
        Algorithm::RS384 => Some(&RSA_PKCS1_2048_8192_SHA384),
        Algorithm::RS512 => Some(&RSA_PKCS1_2048_8192_SHA512),
        Algorithm::PS256 => Some(&RSA_PSS_2048_8192_SHA256),
        Algorithm::PS384 => Some(&RSA_PSS_2048_8192_SHA384),
        Algorithm::PS512 => Some(&RSA_PSS_2048_8192_SHA512),
        _ => None,
    }
}

impl jsonwebtoken::signature::Verifier<Vec<u8>> for Verifier {
    fn verify(
        &self,
        message: &[u8],
        signature: &Vec<u8>,
    ) -> std::result::Result<(), jsonwebtoken::signature::Error> {
        self.check(message, signature)
            .map_err(|Unspecified| jsonwebtoken::signature::Error::new())
    }
}

impl JwtVerifier for Verifier {
    fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::prelude::BASE64_URL_SAFE_NO_PAD;
    use ring::rand::SystemRandom;
    use ring::signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _,
    };

    use super::*;

    const MESSAGE: &[u8] = b"header.claims";
    /// Of a key made for this test by `openssl genrsa 2048`.
    const RSA_MODULUS: &str = "opExJuwGfOKvsnT6OVw3MNQ5WBp_5qBRrMJiimZddOIfEYSSZGNK16DASom5zV2PBkMaU-\
        6PsIz_nG7ftl0K_sgMp4bKgVyScZb67KPUr0OOg099rosk9Q-pSLLIoJNK8PdpJQ1DeAETCZCb1VT5Aj-YvyYf\
        Hjq0ETcRy3ux_w7sqD_WSZ6SQW31Z8SfWdbaxpio767IQs0_kG1N45ouNiLEUaQTGwybRQVuPp3LMu2VU7RYkc\
        hV-XNCUhteuliYryI67R0kB1QhUU4x89ZMCbLBUoFzR51LlE6S17soyLE0Q0Y504TgrP-7YSfRcRpzZLOB_iN-\
        B5wq2l-vcQtHlQ";
    /// `MESSAGE`, signed with it by `openssl dgst -sha256 -sign`.
    const RSA_SIGNATURE: &str = "MZKHBMJc1-NTzBYDoqhZMsF_g1n347ca_BvphmhLl7rC6ceicAyX4JoXGpJvQE_F2MlW_8jFTOm-0763f3-\
        35UZT_N0TrcHUocfYYtJ1BagnlidUd42b-lHEp_2vgs-gD_WG0prB0ui-g9UgruHJxc-\
        N9BwlGmx20PsG0WiI4txCk66rw0LHLkkF1u3rYIkQtYWure2nUb9zVnf5mhWpxfDHiaM_5yHsNeJVHIsi8DhyI\
        hX2BnvQh7KWJelHFPmO4XjojXXljXsWr-WDAuObmNsnHhNmXb7--MwKCyoe-\
        qgBvvqr2H8nlsu2IZ___9FE8pQqkZTQeSbktQgTsx-Bhw";

    /// One signature of `MESSAGE` by each accepted algorithm, with its key.
    fn signatures() -> [(Algorithm, DecodingKey, Vec<u8>); 4] {
        let secret = [7; 32];
        let hmac = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &secret), MESSAGE);
        let random = SystemRandom::new();
        let pair = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).unwrap();
        let ec = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pair.as_ref(), &random)
            .unwrap();
        let ed = Ed25519KeyPair::from_seed_unchecked(&[9; 32]).unwrap();
        [
            (
                Algorithm::HS256,
                DecodingKey::from_secret(&secret),
                hmac.as_ref().to_vec(),
            ),
            (
                Algorithm::RS256,
                DecodingKey::from_rsa_components(RSA_MODULUS, "AQAB").unwrap(),
                BASE64_URL_SAFE_NO_PAD.decode(RSA_SIGNATURE).unwrap(),
            ),
            (
                Algorithm::ES256,
                DecodingKey::from_ec_der(ec.public_key().as_ref()),
                ec.sign(&random, MESSAGE).unwrap().as_ref().to_vec(),
            ),
            (
                Algorithm::EdDSA,
                DecodingKey::from_ed_der(ed.public_key().as_ref()),
                ed.sign(MESSAGE).as_ref().to_vec(),
            ),
        ]
    }

    #[test]
    fn a_signature_matches_only_its_own_message_and_key() {
        for (algorithm, key, signature) in signatures() {
            let verifier = verifier(&algorithm, &key).unwrap();
            assert!(
                verifier.verify(MESSAGE, &signature).is_ok(),
                "{algorithm:?}"
            );
            assert!(
                verifier.verify(b"header.other", &signature).is_err(),
                "{algorithm:?}"
            );
            assert!(
                verifier.verify(MESSAGE, &Vec::new()).is_err(),
                "{algorithm:?}"
            );
            for at in [0, signature.len() - 1] {
                let mut changed = signature.clone();
                changed[at] ^= 1;
                assert!(
                    verifier.verify(MESSAGE, &changed).is_err(),
                    "{algorithm:?} byte {at}"
                );
            }
        }
    }

    #[test]
    fn a_key_of_one_family_is_refused_for_another() {
        let signatures = signatures();
        for (algorithm, ..) in &signatures {
            for (other, key, _) in &signatures {
                assert_eq!(
                    verifier(algorithm, key).is_ok(),
                    algorithm == other,
                    "{algorithm:?} with the key of {other:?}"
                );
            }
        }
        // Within a family, the signature of one algorithm is not that of another.
        let (_, rsa, signature) = &signatures[1];
        for other in [Algorithm::RS384, Algorithm::RS512, Algorithm::PS256] {
            let verifier = verifier(&other, rsa).unwrap();
            assert!(verifier.verify(MESSAGE, signature).is_err(), "{other:?}");
        }
    }
}
