//! `doctor --explain HOST:PORT`: why this host and a port of Ray do not come together, where Ray says
//! only that it timed out. It looks as a caller of Ray would, once, with this node's leaf; a second
//! time without one where the first was refused. It changes nothing, and judges no other port.

mod dial;
mod judge;
#[cfg(test)]
mod tests;

use std::{fmt::Write, sync::Arc};

use raymtls_proto::{clock::Clock, leaf::LeafFacts, v1};
use rustls::pki_types::CertificateDer;
use serde::Serialize;

use super::own::Own;
use crate::{failure::Failure, moment::Moment, served::probe::Prober};

pub(crate) use dial::Bounds;

/// What is wrong, in one word. Several may hold; the first stands in the way first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Word {
    /// Both sides take each other's leaf.
    Good,
    /// The name has no address.
    UnknownName,
    /// Nobody listens at that port.
    NothingListens,
    /// No answer to the first packet.
    Filtered,
    /// No way to that host.
    Unreachable,
    /// It takes the connection and says nothing.
    Silent,
    /// HTTP without TLS.
    PlainHttp,
    /// gRPC without TLS: Ray, started without `RAY_USE_TLS`.
    PlainGrpc,
    /// It answers, in nothing we know.
    NoTls,
    /// TLS, and no handshake of TLS 1.3 with a certificate that it can prove.
    OtherTls,
    /// Its leaf is over.
    TheirLeafExpired,
    /// Its leaf does not hold yet.
    TheirLeafNotYetValid,
    /// Its leaf chains to no root of this cluster.
    Untrusted,
    /// Its leaf may not be a server's.
    WrongPurpose,
    /// Its leaf lacks what was dialled.
    WrongName,
    /// Our leaf is over.
    OurLeafExpired,
    /// Our leaf does not hold yet.
    OurLeafNotYetValid,
    /// Our leaf may not be a client's.
    OurLeafWrongPurpose,
    /// It trusts other CAs than ours.
    OurLeafUntrusted,
    /// It refuses our leaf for another reason.
    RefusesOurLeaf,
    /// There is no leaf here to show.
    NoLeafHere,
}

/// What is wrong, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Reason {
    pub(crate) word: Word,
    pub(crate) what: String,
    pub(crate) next: String,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Explained {
    /// What was asked about.
    pub(crate) target: String,
    /// The address that was dialled, where there is one.
    pub(crate) address: Option<String>,
    /// The leaf that is served there.
    pub(crate) serves: Option<Shown>,
    /// Names of the CAs whose leaves are taken there.
    pub(crate) trusts: Vec<String>,
    /// What is wrong, the first first; `good` alone where nothing is.
    pub(crate) reasons: Vec<Reason>,
}

/// A leaf, as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Shown {
    pub(crate) serial: String,
    pub(crate) names: Vec<String>,
    pub(crate) not_before: Moment,
    pub(crate) not_after: Moment,
    pub(crate) signed_by: String,
}

/// What is known of this side.
pub(crate) struct Ours<'a> {
    pub(crate) leaf: Option<&'a LeafFacts>,
    pub(crate) chain: Option<&'a v1::CertificateChain>,
    pub(crate) roots: &'a [CertificateDer<'static>],
    /// Why there is no leaf.
    pub(crate) missing: Option<&'a str>,
}

/// What Ray says in each of these cases.
pub(crate) const RAY_SAYS: &str =
    "Ray itself says only \"Timed out while waiting for GCS to become available.\"";

impl Explained {
    pub(crate) fn is_good(&self) -> bool {
        self.reasons.iter().all(|reason| reason.word == Word::Good)
    }

    pub(crate) fn text(&self) -> String {
        let mut out = String::new();
        let mut line = |name: &str, text: &str| {
            writeln!(out, "{name:<10} {}", super::print::clean(text)).expect("writing to a String");
        };
        line("target", &self.target);
        line("dialled", self.address.as_deref().unwrap_or("-"));
        if let Some(leaf) = &self.serves {
            line("serves", &format!("{} for {}", leaf.serial, leaf.names.join(", ")));
            line("", &format!("from {} to {}", leaf.not_before, leaf.not_after));
            line("signed by", &leaf.signed_by);
        }
        if !self.trusts.is_empty() {
            line("trusts", &self.trusts.join(", "));
        }
        for reason in &self.reasons {
            let word = if reason.word == Word::Good { "OK" } else { "WRONG" };
            line(word, &reason.what);
            line("next", &reason.next);
        }
        if !self.is_good() {
            line("", RAY_SAYS);
        }
        out
    }
}

/// Looks at a port as a caller of Ray would, and says what stands in the way.
pub(crate) async fn explain(
    target: &str,
    own: &Result<Own, String>,
    clock: Arc<dyn Clock>,
    bounds: Bounds,
) -> Result<Explained, Failure> {
    let target = dial::Target::parse(target).map_err(Failure::Usage)?;
    let prober = match own {
        Ok(own) => Prober::new(&own.chain, &own.key, clock.clone(), bounds.limits()),
        Err(_) => Prober::without_leaf(clock.clone(), bounds.limits()),
    };
    let bare = Prober::without_leaf(clock.clone(), bounds.limits()).map_err(Failure::failed)?;
    let seen = dial::look(&target, &prober.map_err(Failure::failed)?, &bare, bounds).await;
    let ours = Ours {
        leaf: own.as_ref().ok().map(|own| &own.facts),
        chain: own.as_ref().ok().map(|own| &own.chain),
        roots: own.as_ref().map(|own| own.roots.as_slice()).unwrap_or_default(),
        missing: own.as_ref().err().map(String::as_str),
    };
    Ok(judge::judge(&target, &seen, &ours, clock.now()))
}
