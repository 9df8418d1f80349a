//! A one-time ticket: stands for the credentials of a request, for a page that can send neither a
//! header nor a cookie when it opens a stream.
//!
//! The broker holds the credentials under a hash of the ticket and encrypted with the ticket, so that
//! a reader of Redis can use neither. A request with a ticket is checked as one with the credentials
//! themselves.

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use bytes::Bytes;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use ring::rand::{SecureRandom as _, SystemRandom};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::event::Name;

/// The credentials of a request that outlast it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Credentials {
    Token(String),
    /// In dev mode.
    User(Name),
}

/// See the head of this file.
pub struct Ticket([u8; 32]);

impl Ticket {
    /// Makes a ticket from random bytes.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub fn new() -> Result<Self, ring::error::Unspecified> {
        let mut bytes = [0; 32];
        SystemRandom::new().fill(&mut bytes)?;
        Ok(Self(bytes))
    }

    /// Parses the text of a ticket. `None`: no node has issued it.
    pub fn parse(text: &str) -> Option<Self> {
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(text).ok()?;
        Some(Self(bytes.try_into().ok()?))
    }

    /// The text of the ticket, 43 characters that need no escape in a URL.
    pub fn text(&self) -> String {
        BASE64_URL_SAFE_NO_PAD.encode(self.0)
    }

    /// The name under which the broker holds it, from which it cannot be derived.
    pub fn id(&self) -> String {
        BASE64_URL_SAFE_NO_PAD.encode(self.derive("id"))
    }

    /// Encrypts credentials, for this ticket only.
    pub fn seal(&self, credentials: &Credentials) -> Bytes {
        let mut sealed = serde_json::to_vec(credentials).expect("strings serialise");
        let (nonce, key) = self.key();
        key.seal_in_place_append_tag(nonce, Aad::empty(), &mut sealed)
            .expect("a token is shorter than the cipher's limit of 256 GiB");
        sealed.into()
    }

    /// Decrypts credentials. `None`: they were not sealed with this ticket.
    pub fn open(&self, sealed: &[u8]) -> Option<Credentials> {
        let mut sealed = sealed.to_vec();
        let (nonce, key) = self.key();
        let opened = key.open_in_place(nonce, Aad::empty(), &mut sealed).ok()?;
        serde_json::from_slice(opened).ok()
    }

    /// A ticket seals once, so that its key is used with one nonce.
    fn key(&self) -> (Nonce, LessSafeKey) {
        let key = UnboundKey::new(&CHACHA20_POLY1305, &self.derive("key"));
        let key = key.expect("the key has the length of the cipher's keys");
        (Nonce::assume_unique_for_key([0; 12]), LessSafeKey::new(key))
    }

    fn derive(&self, purpose: &str) -> [u8; 32] {
        let digest = Sha256::new_with_prefix("pointsman ticket ");
        digest
            .chain_update(purpose)
            .chain_update(self.0)
            .finalize()
            .into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_ticket_itself_opens_what_it_sealed() {
        let ticket = Ticket::new().unwrap();
        let credentials = Credentials::Token("header.claims.signature".to_owned());
        let sealed = ticket.seal(&credentials);
        let text = ticket.text();
        assert_eq!(text.len(), 43);
        assert_ne!(text, ticket.id());
        assert!(!String::from_utf8_lossy(&sealed).contains("claims"));
        let same = Ticket::parse(&text).unwrap();
        assert_eq!(same.id(), ticket.id());
        assert_eq!(same.open(&sealed), Some(credentials));
        let other = Ticket::new().unwrap();
        assert_ne!(other.id(), ticket.id());
        assert_eq!(other.open(&sealed), None);
        assert_eq!(ticket.open(&sealed[1..]), None);
        for text in ["", "x", "header.claims.signature", &text[1..]] {
            assert!(Ticket::parse(text).is_none(), "{text}");
        }
    }
}
