//! A signed JWT that enrols a workload, as both sides name it: by the hash of what is signed.

use crate::{digest::sha256, token::TokenId};

/// Longest JWT, in bytes; those of Kubernetes have about 1,100.
pub const JWT_LEN_MAX: usize = 16 * 1024;

/// SHA-256 of what is signed (header and claims as they stand, RFC 7515 5.1). The signature is left out:
/// one ECDSA signature can be written in two ways, and both would be one more use.
#[must_use]
pub fn signed_part(jwt: &str) -> [u8; 32] {
    let signed = jwt.rsplit_once('.').map_or(jwt, |(signed, _)| signed);
    sha256(signed.as_bytes())
}

/// The id under which the CA knows it.
#[must_use]
pub fn token_id(jwt: &str) -> TokenId {
    let hash = signed_part(jwt);
    let first: [u8; 8] = hash[..8].try_into().expect("a hash is longer");
    TokenId::new(first)
}
