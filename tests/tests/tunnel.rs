//! `ray-tunnel` on hosts that are network namespaces, with real certificates, real nftables and
//! programs that depend on what TCP promises. Its own test binary because it wants root and the
//! machine's attention: it counts descriptors, memory and milliseconds.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

mod tunnel {
    mod agent;
    mod bounds;
    mod carried;
    mod cut;
    mod process;
    mod refused;
}
