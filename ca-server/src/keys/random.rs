//! The one place randomness is drawn, from the crypto library's generator. Pure code is given it.

use raymtls_proto::{
    serial::Serial,
    token::{BootstrapToken, TokenId},
};
use time::OffsetDateTime;

use crate::store::unix_ms;

/// `N` random bytes.
///
/// # Panics
/// Where the system has no randomness to give: nothing safe can be done then.
#[must_use]
#[allow(clippy::disallowed_methods, reason = "the place randomness is drawn")]
pub fn bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).expect("the system gives random bytes");
    bytes
}

/// A serial of now.
#[must_use]
pub fn serial(now: OffsetDateTime) -> Serial {
    Serial::new(unix_ms(now).unsigned_abs(), bytes())
}

/// A new bootstrap token.
#[must_use]
pub fn token() -> BootstrapToken {
    BootstrapToken::new(TokenId::new(bytes()), bytes())
}

/// An epoch of the store.
#[must_use]
pub fn epoch() -> u64 {
    u64::from_be_bytes(bytes())
}
