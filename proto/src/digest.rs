//! SHA-256, the one digest of this product.

use aws_lc_rs::digest::{SHA256, digest};

/// SHA-256 of some bytes.
#[must_use]
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    digest(&SHA256, bytes).as_ref().try_into().expect("SHA-256 gives 32 bytes")
}
