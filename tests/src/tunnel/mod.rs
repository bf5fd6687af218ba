//! Tunnel mode without a CA and without an agent: hosts that are network namespaces, a `ray-tunnel`
//! on each, certificates as the CA makes them or as it never would. Wants root, `ip` and `nft`.

pub mod authority;
pub mod host;
pub mod peer;

pub use authority::{Authority, Leaf};
pub use host::{Host, Lab, Tunnel};
