//! What the server counts, in Prometheus' text format.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, atomic::AtomicU64},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text::encode},
    metrics::{
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
    },
    registry::Registry,
};

use crate::{contacts::Horizons, store::Store};

/// The counters. Names carry their units.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    issued: Family<Kind, Counter>,
    refused: Family<Word, Counter>,
    wrong_tokens: Counter,
    handshakes_failed: Family<Why, Counter>,
    evicted: Family<Listener, Counter>,
    accepts_failed: Family<Listener, Counter>,
    connections: Family<Listener, Gauge>,
    waiting: Gauge,
    server_certificate_expiry: Gauge<i64, std::sync::atomic::AtomicI64>,
    started: Gauge<i64, std::sync::atomic::AtomicI64>,
    syncs: Counter<u64, AtomicU64>,
    ready: Gauge,
    horizons: Family<Horizon, Gauge>,
    log_alarms: Family<LogWitness, Gauge>,
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

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct LogWitness {
    witness: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Horizon {
    cluster: String,
    class: &'static str,
}

impl Metrics {
    /// The counters, and the store's own on each scrape.
    #[must_use]
    pub fn new(store: Arc<dyn Store>) -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("raymtls_ca"),
            issued: Family::default(),
            refused: Family::default(),
            wrong_tokens: Counter::default(),
            handshakes_failed: Family::default(),
            evicted: Family::default(),
            accepts_failed: Family::default(),
            connections: Family::default(),
            waiting: Gauge::default(),
            server_certificate_expiry: Gauge::default(),
            started: Gauge::default(),
            syncs: Counter::default(),
            ready: Gauge::default(),
            horizons: Family::default(),
            log_alarms: Family::default(),
        };
        let registry = &mut metrics.registry;
        registry.register("certificates_issued", "Certificates issued", metrics.issued.clone());
        registry.register("refusals", "Refused calls by reason word", metrics.refused.clone());
        registry.register(
            "handshakes_failed",
            "TLS handshakes that did not finish",
            metrics.handshakes_failed.clone(),
        );
        registry.register(
            "wrong_tokens",
            "Enrolments with a token that is not known here: somebody guesses, or has an old join file",
            metrics.wrong_tokens.clone(),
        );
        registry.register(
            "connections_evicted",
            "Connections closed to make room for newer ones",
            metrics.evicted.clone(),
        );
        registry.register(
            "accepts_failed",
            "Connections that could not be accepted, mostly for want of file descriptors",
            metrics.accepts_failed.clone(),
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
        registry.register(
            "ready",
            "1 if the server can sign and commit, as /readyz says",
            metrics.ready.clone(),
        );
        registry.register(
            "horizon_timestamp_seconds",
            "First end of a leaf that a process of Ray serves in a cluster, by class (node, driver), as \
             the agents say that were heard in the last hour",
            metrics.horizons.clone(),
        );
        registry.register(
            "audit_log_alarms",
            "Checkpoints of the audit log that it contradicts, by who holds them: the store itself, or \
             nodes; anything but 0 means that the store was edited, rolled back or forked",
            metrics.log_alarms.clone(),
        );
        registry.register_collector(Box::new(StoreTotals(store)));
        metrics.audit_log_alarms(false, 0);
        metrics
    }

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

    /// Somebody tried a token that is not known here.
    pub fn wrong_token(&self) {
        self.wrong_tokens.inc();
    }

    /// A connection was closed to make room for another.
    pub fn connection_evicted(&self, listener: &'static str) {
        self.evicted.get_or_create(&Listener { listener }).inc();
    }

    /// A connection could not be accepted.
    pub fn accept_failed(&self, listener: &'static str) {
        self.accepts_failed.get_or_create(&Listener { listener }).inc();
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

    /// Whether it can sign and commit.
    pub fn ready(&self, is_ready: bool) {
        self.ready.set(is_ready.into());
    }

    /// How many checkpoints contradict the audit log.
    pub fn audit_log_alarms(&self, store: bool, nodes: usize) {
        let nodes = i64::try_from(nodes).unwrap_or(i64::MAX);
        for (witness, count) in [("store", i64::from(store)), ("node", nodes)] {
            self.log_alarms.get_or_create(&LogWitness { witness }).set(count);
        }
    }

    /// Where the clusters stand; what is not named any more is gone.
    pub fn horizons(&self, horizons: &BTreeMap<String, Horizons>) {
        self.horizons.clear();
        for (cluster, of) in horizons {
            for (class, at) in [("node", of.node), ("driver", of.driver)] {
                let Some(unix) = at else { continue };
                let label = Horizon { cluster: cluster.clone(), class };
                self.horizons.get_or_create(&label).set(unix);
            }
        }
    }

    /// Everything, as Prometheus scrapes it.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("writing to a string cannot fail");
        text
    }
}

/// The store's running totals, read when they are scraped.
#[derive(Debug)]
struct StoreTotals(Arc<dyn Store>);

impl Collector for StoreTotals {
    #[allow(clippy::cast_precision_loss, reason = "a float is what the text format has")]
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let totals = self.0.counts();
        for (name, help, value) in [
            ("store_decisions", "Decisions of the store, reads included", totals.jobs),
            ("store_commits", "Commits, one flush to the disk each", totals.commits),
        ] {
            let counter = ConstCounter::new(value);
            let kind = prometheus_client::metrics::MetricType::Counter;
            counter.encode(encoder.encode_descriptor(name, help, None, kind)?)?;
        }
        let seconds = ConstCounter::new(totals.commit_micros as f64 / 1e6);
        let kind = prometheus_client::metrics::MetricType::Counter;
        let help = "Time all commits took";
        seconds.encode(encoder.encode_descriptor("store_commit_seconds", help, None, kind)?)?;
        let queued = ConstGauge::new(i64::try_from(totals.queued).unwrap_or(i64::MAX));
        let kind = prometheus_client::metrics::MetricType::Gauge;
        let help = "Decisions that wait for the store";
        queued.encode(encoder.encode_descriptor("store_queue", help, None, kind)?)
    }
}
