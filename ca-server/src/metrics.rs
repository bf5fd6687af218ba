//! What the server counts, in Prometheus' text format.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// The counters. Names carry their units.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    issued: Family<Kind, Counter>,
    refused: Family<Word, Counter>,
    handshakes_failed: Family<Why, Counter>,
    connections: Family<Listener, Gauge>,
    waiting: Gauge,
    server_certificate_expiry: Gauge<i64, std::sync::atomic::AtomicI64>,
    started: Gauge<i64, std::sync::atomic::AtomicI64>,
    syncs: Counter<u64, AtomicU64>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Kind {
    kind: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Word {
    reason: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Why {
    listener: &'static str,
    why: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Listener {
    listener: &'static str,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("raymtls_ca"),
            issued: Family::default(),
            refused: Family::default(),
            handshakes_failed: Family::default(),
            connections: Family::default(),
            waiting: Gauge::default(),
            server_certificate_expiry: Gauge::default(),
            started: Gauge::default(),
            syncs: Counter::default(),
        };
        let registry = &mut metrics.registry;
        registry.register("certificates_issued", "Certificates issued", metrics.issued.clone());
        registry.register("refusals", "Refused calls by reason word", metrics.refused.clone());
        registry.register(
            "handshakes_failed",
            "TLS handshakes that did not finish",
            metrics.handshakes_failed.clone(),
        );
        registry.register("connections", "Open connections", metrics.connections.clone());
        registry.register("syncs_waiting", "Sync calls that wait", metrics.waiting.clone());
        registry.register("syncs", "Sync calls answered", metrics.syncs.clone());
        registry.register(
            "server_certificate_expiry_timestamp_seconds",
            "When the server's own TLS certificate ends",
            metrics.server_certificate_expiry.clone(),
        );
        registry.register(
            "start_timestamp_seconds",
            "When the server began to serve",
            metrics.started.clone(),
        );
        metrics
    }
}

impl Metrics {
    /// A certificate was issued.
    pub fn issued(&self, kind: &'static str) {
        self.issued.get_or_create(&Kind { kind }).inc();
    }

    /// A call was refused.
    pub fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&Word { reason }).inc();
    }

    /// A handshake did not finish.
    pub fn handshake_failed(&self, listener: &'static str, why: &'static str) {
        self.handshakes_failed.get_or_create(&Why { listener, why }).inc();
    }

    /// The gauge of a listener's connections.
    #[must_use]
    pub fn connections(&self, listener: &'static str) -> Gauge {
        self.connections.get_or_create_owned(&Listener { listener })
    }

    /// The gauge of waiting Syncs.
    #[must_use]
    pub fn waiting(&self) -> &Gauge {
        &self.waiting
    }

    /// A Sync was answered.
    pub fn synced(&self) {
        self.syncs.inc();
    }

    /// The server's own certificate ends then.
    pub fn server_certificate_ends(&self, unix: i64) {
        self.server_certificate_expiry.set(unix);
    }

    /// The server began to serve then.
    pub fn started(&self, unix: i64) {
        self.started.set(unix);
    }

    /// Everything, as Prometheus scrapes it.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("writing to a string cannot fail");
        text
    }
}
