//! What the certificates that Ray serves are worth, and when the first of them ends. Only a leaf
//! that chains to a root of the cluster and names this node counts. Pure: no file, network or clock.

use std::collections::BTreeSet;

use raymtls_proto::{
    leaf::LeafFacts,
    serial::Serial,
    v1::{self, CertificateChain},
};
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use x509_parser::{
    prelude::{FromDer, X509Certificate},
    revocation_list::CertificateRevocationList,
};

use super::kind::{Class, Kind, printable};
use crate::{statedir::issued_at, verify};

/// A process is to be recycled when this part of its leaf's life is left: a leaf lives for two
/// longest jobs, and from here on the longest that starts would outlast it.
pub const DUE_PART_LEFT: i32 = 2;
/// A recycle is overdue, and a driver's owner must act, when this part is left.
pub const OVERDUE_PART_LEFT: i32 = 3;

/// Who counts.
#[derive(Clone, Debug)]
pub struct Trust {
    /// Roots of the cluster.
    pub roots: Vec<CertificateDer<'static>>,
    /// URIs of this machine's own leaves, as node and as driver.
    pub uris: Vec<String>,
    /// Serial numbers on the cluster's CRLs.
    pub revoked: BTreeSet<Serial>,
}

impl Trust {
    /// By what the CA told of the cluster.
    #[must_use]
    pub fn new(bundle: &v1::TrustBundle, uris: Vec<String>) -> Self {
        Self { roots: roots(bundle), uris, revoked: revoked(&bundle.crls_der) }
    }
}

/// A leaf that counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Serial number.
    pub serial: Serial,
    /// When the CA issued it.
    pub issued: OffsetDateTime,
    /// Its last moment.
    pub not_after: OffsetDateTime,
}

/// What a served certificate is worth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Worth {
    /// This node's, under the cluster's root; it may have ended.
    Counts(Leaf),
    /// Anything else: shown, never counted.
    Foreign {
        /// Why it does not count.
        why: String,
        /// Its serial number in hexadecimal digits, as far as it can be read.
        serial: Option<String>,
        /// Its last moment, as far as it can be read.
        not_after: Option<OffsetDateTime>,
    },
}

/// Where a process stands. In order: the worst of several is the largest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// A job of the longest kind may start.
    Fresh,
    /// It should serve a leaf of this node, and shows none.
    Unknown,
    /// The longest job that starts now would outlast the leaf.
    RecycleDue,
    /// The leaf ends soon, or has ended.
    RecycleOverdue,
}

impl State {
    /// The word in tables and metrics.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Fresh => "fresh",
            Self::Unknown => "unknown",
            Self::RecycleDue => "recycle-due",
            Self::RecycleOverdue => "recycle-overdue",
        }
    }
}

/// Judges what a socket serves. Whether it has ended is no part of it: an ended leaf that counts is
/// what an operator must know of first.
#[must_use]
pub fn judge(chain: &CertificateChain, trust: &Trust, now: OffsetDateTime) -> Worth {
    let facts = match LeafFacts::parse(&chain.leaf_der) {
        Ok(facts) => facts,
        Err(error) => return foreign(chain, error.to_string()),
    };
    if let Err(why) = is_ours(&facts, trust) {
        return foreign(chain, why);
    }
    // At a moment at which the leaf itself was good: no certificate of ours outlives its issuer.
    let last = facts.not_after - time::Duration::SECOND;
    let at = now.min(last).max(facts.not_before);
    match verify::chains(chain, &trust.roots, None, at) {
        Err(why) => foreign(chain, format!("it does not chain to the cluster's roots: {why}")),
        Ok(()) => Worth::Counts(Leaf {
            serial: facts.serial,
            issued: issued_at(&facts),
            not_after: facts.not_after,
        }),
    }
}

fn is_ours(facts: &LeafFacts, trust: &Trust) -> Result<(), String> {
    if !facts.uris.iter().any(|uri| trust.uris.contains(uri)) {
        let named = facts.uris.iter().map(|uri| printable(uri)).collect::<Vec<_>>().join(", ");
        let named = if named.is_empty() { "no node".to_owned() } else { named };
        return Err(format!("it names {named}, and not this node"));
    }
    if !facts.server_auth {
        return Err("it may not be used as a server".to_owned());
    }
    Ok(())
}

fn foreign(chain: &CertificateChain, why: String) -> Worth {
    let read = X509Certificate::from_der(&chain.leaf_der).ok().map(|(_, certificate)| certificate);
    let hex = |bytes: &[u8]| hex::encode(&bytes[..bytes.len().min(2 * Serial::LEN)]);
    Worth::Foreign {
        why,
        serial: read.as_ref().map(|certificate| hex(certificate.raw_serial())),
        not_after: read.map(|certificate| certificate.validity().not_after.to_datetime()),
    }
}

/// Where a process with this leaf stands.
#[must_use]
pub fn state_of(leaf: &Leaf, class: Class, now: OffsetDateTime) -> State {
    state_between(leaf.issued, leaf.not_after, class, now)
}

/// Where a process stands whose leaf lives from one moment to another.
#[must_use]
pub fn state_between(
    issued: OffsetDateTime,
    not_after: OffsetDateTime,
    class: Class,
    now: OffsetDateTime,
) -> State {
    let life = not_after - issued;
    let left = not_after - now;
    if left <= life / OVERDUE_PART_LEFT {
        return State::RecycleOverdue;
    }
    match class {
        Class::Node if left <= life / DUE_PART_LEFT => State::RecycleDue,
        // A driver ends by itself, mostly; its owner hears of it once, when it is late.
        Class::Node | Class::Driver => State::Fresh,
    }
}

/// Where a process stands by all its leaves that count; `None` where it has none and need not.
#[must_use]
pub fn state_of_process(kind: Kind, leaves: &[Leaf], now: OffsetDateTime) -> Option<State> {
    let worst = leaves.iter().map(|leaf| state_of(leaf, kind.class(), now)).max();
    worst.or_else(|| serves_a_leaf(kind).then_some(State::Unknown))
}

/// Whether a process of this kind listens with TLS, where Ray uses TLS.
fn serves_a_leaf(kind: Kind) -> bool {
    match kind {
        Kind::GcsServer
        | Kind::Raylet
        | Kind::RayClientServer
        | Kind::DashboardAgent
        | Kind::Driver
        | Kind::RayClientDriver
        | Kind::Worker => true,
        Kind::RuntimeEnvAgent
        | Kind::Dashboard
        | Kind::Monitor
        | Kind::LogMonitor
        | Kind::Other => false,
    }
}

/// Earliest end of leaves.
#[must_use]
pub fn earliest<'a>(leaves: impl IntoIterator<Item = &'a Leaf>) -> Option<OffsetDateTime> {
    leaves.into_iter().map(|leaf| leaf.not_after).min()
}

/// Serial numbers on CRLs, as far as they can be read.
#[must_use]
pub fn revoked(crls_der: &[Vec<u8>]) -> BTreeSet<Serial> {
    let mut all = BTreeSet::new();
    for der in crls_der {
        let Ok((_, crl)) = CertificateRevocationList::from_der(der) else { continue };
        let listed = crl.iter_revoked_certificates().take(REVOKED_MAX);
        all.extend(listed.filter_map(|one| Serial::from_slice(one.raw_serial()).ok()));
    }
    all
}

/// Most serial numbers of one CRL that are kept.
const REVOKED_MAX: usize = 100_000;

/// The roots of a bundle.
#[must_use]
pub fn roots(bundle: &v1::TrustBundle) -> Vec<CertificateDer<'static>> {
    bundle.roots_der.iter().map(|der| CertificateDer::from(der.clone())).collect()
}
