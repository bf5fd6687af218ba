//! Tunnel mode: Ray's connections between nodes go through TLS 1.3 that this host's `ray-tunnel`
//! speaks with the other node's.
//!
//! In the order of the data: [`rules`] is what the agent writes and [`control`] how it asks;
//! `inforce` is both read together with the key folder; `captured` takes what nftables redirects and
//! `dial`s the other node, whose `inbound` answers; `verifier` and `header` are what they must show
//! each other; `splice` carries the bytes. `sweep` looks after leaves that end, `run` is the process.
//! Nothing here speaks with the CA or writes a file.

pub mod control;
pub mod header;
pub mod reason;
pub mod rules;
pub mod run;

mod captured;
mod credentials;
mod dial;
mod expiry;
mod flows;
mod harden;
mod inbound;
mod inforce;
mod listeners;
mod log;
mod quiet;
mod refusals;
mod serve;
mod session;
mod splice;
mod state;
mod sweep;
mod tcp;
mod verifier;
mod wire;

use std::sync::{Arc, LazyLock};

use rustls::crypto::{CryptoProvider, aws_lc_rs};

/// The one provider. AES-128 first: it is what bulk costs least with, and no leaf outlives it.
fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        use aws_lc_rs::cipher_suite::{
            TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
        };
        Arc::new(CryptoProvider {
            cipher_suites: vec![
                TLS13_AES_128_GCM_SHA256,
                TLS13_AES_256_GCM_SHA384,
                TLS13_CHACHA20_POLY1305_SHA256,
            ],
            ..aws_lc_rs::default_provider()
        })
    });
    PROVIDER.clone()
}
