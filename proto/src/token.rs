//! Bootstrap tokens as they travel: `id.secret`. The id is public; the secret is 256 random bits.

use std::{fmt, str::FromStr};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use secrecy::{ExposeSecret, SecretBox};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::digest::sha256;

/// Public half of a token: 16 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TokenId(String);

/// Not a token. Says nothing of the text, which may be most of a secret.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("not a bootstrap token of the form id.secret")]
pub struct TokenFormError;

impl TokenId {
    /// An id of the given random bytes.
    #[must_use]
    pub fn new(random: [u8; 8]) -> Self {
        Self(hex::encode(random))
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TokenId {
    type Err = TokenFormError;

    fn from_str(text: &str) -> Result<Self, TokenFormError> {
        let digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if text.len() == 16 && text.bytes().all(digit) {
            return Ok(Self(text.to_owned()));
        }
        Err(TokenFormError)
    }
}

impl TryFrom<String> for TokenId {
    type Error = TokenFormError;

    fn try_from(text: String) -> Result<Self, TokenFormError> {
        text.parse()
    }
}

impl From<TokenId> for String {
    fn from(id: TokenId) -> Self {
        id.0
    }
}

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A whole token. Prints only its id; the secret is wiped when it is dropped.
pub struct BootstrapToken {
    id: TokenId,
    secret: SecretBox<[u8; 32]>,
}

impl BootstrapToken {
    /// A token of the given random bytes.
    #[must_use]
    pub fn new(id: TokenId, secret: [u8; 32]) -> Self {
        Self { id, secret: SecretBox::new(Box::new(secret)) }
    }

    /// Which token.
    #[must_use]
    pub fn id(&self) -> &TokenId {
        &self.id
    }

    /// SHA-256 of the secret: all that the CA stores of it. A slow hash would add nothing to 256
    /// random bits but a lever for denial of service.
    #[must_use]
    pub fn secret_hash(&self) -> [u8; 32] {
        sha256(self.secret.expose_secret())
    }

    /// `id.secret`, for the join file and the request.
    #[must_use]
    pub fn expose(&self) -> secrecy::SecretString {
        let secret = BASE64_URL_SAFE_NO_PAD.encode(self.secret.expose_secret());
        format!("{}.{secret}", self.id).into()
    }
}

impl zeroize::ZeroizeOnDrop for BootstrapToken {}

impl FromStr for BootstrapToken {
    type Err = TokenFormError;

    fn from_str(text: &str) -> Result<Self, TokenFormError> {
        let (id, secret) = text.split_once('.').ok_or(TokenFormError)?;
        let mut bytes = zeroize::Zeroizing::new([0; 32]);
        let written =
            BASE64_URL_SAFE_NO_PAD.decode_slice(secret, &mut *bytes).map_err(|_| TokenFormError)?;
        if written != bytes.len() {
            return Err(TokenFormError);
        }
        Ok(Self::new(id.parse()?, *bytes))
    }
}

impl fmt::Debug for BootstrapToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BootstrapToken({}, ..)", self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_round_trips_and_prints_no_secret() {
        let token = BootstrapToken::new(TokenId::new([1; 8]), [0xab; 32]);
        let text = token.expose();
        let back: BootstrapToken = text.expose_secret().parse().unwrap();
        assert_eq!(back.secret_hash(), token.secret_hash());
        let secret = text.expose_secret().split('.').nth(1).unwrap().to_owned();
        assert!(!format!("{back:?}").contains(&secret));
    }

    #[test]
    fn other_shapes_are_refused() {
        for bad in ["", ".", "0101010101010101", "0101010101010101.AAAA", "xyz.AAAA"] {
            assert!(bad.parse::<BootstrapToken>().is_err(), "{bad}");
        }
        let long = format!("0101010101010101.{}", "A".repeat(64));
        assert!(long.parse::<BootstrapToken>().is_err());
    }
}
