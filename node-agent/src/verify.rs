//! What must hold before a certificate or a bundle from the CA replaces a file: the chain up to the
//! roots, our key, our names, both uses, the time. Judged by webpki and x509-parser, neither of
//! which wrote the certificate. It reads no file and asks no clock.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};

use raymtls_proto::{
    identity::{Subject, TrustDomain},
    leaf::{LeafError, LeafFacts},
    v1,
};
use rustls::{
    RootCertStore,
    client::{WebPkiServerVerifier, danger::ServerCertVerifier},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::WebPkiClientVerifier,
};
use thiserror::Error;
use time::OffsetDateTime;
use x509_parser::prelude::{CertificateRevocationList, FromDer, X509Certificate};

use crate::moment::Moment;

/// Most roots in a bundle.
const ROOTS_MAX: usize = 16;
/// Most CRLs in a bundle.
const CRLS_MAX: usize = 64;
/// Longest Ray token, in bytes.
const RAY_TOKEN_LEN_MAX: usize = 4096;
/// Most issuers after a leaf.
const ISSUERS_MAX: usize = 8;

/// Why something from the CA must not replace a file.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum VerifyError {
    /// A part is missing from the answer.
    #[error("the answer of the CA lacks {0}")]
    Missing(&'static str),
    /// Not readable.
    #[error(transparent)]
    Unreadable(#[from] LeafError),
    /// Certifies another key.
    #[error("the certificate is for another key than the one asked for")]
    OtherKey,
    /// Speaks for somebody else.
    #[error("the certificate names {found:?} where {wanted:?} was asked for")]
    OtherName {
        /// What stands in it.
        found: String,
        /// What should.
        wanted: String,
    },
    /// Lacks an address or name, or has one that was not asked for.
    #[error("the certificate {what} {name}")]
    Names {
        /// `lacks` or `was not asked for but has`.
        what: &'static str,
        /// The address or DNS name.
        name: String,
    },
    /// May not be used as it has to be.
    #[error("the certificate does not allow {0}")]
    Usage(&'static str),
    /// Not valid now.
    #[error(
        "the certificate is valid from {from} to {to} and now is {now}: \
         compare the clocks of this machine and of the CA"
    )]
    Time {
        /// First moment.
        from: Moment,
        /// Last moment.
        to: Moment,
        /// When it was judged.
        now: Moment,
    },
    /// Does not chain to the roots.
    #[error("the certificate does not chain to the {roots}: {why}")]
    Chain {
        /// Which roots.
        roots: &'static str,
        /// What the verifier says.
        why: String,
    },
    /// A Ray token of no form.
    #[error("Ray's token is not 1 to {RAY_TOKEN_LEN_MAX} visible characters")]
    RayToken,
    /// A trust bundle of no use.
    #[error("the trust bundle of the CA is of no use: {0}")]
    Bundle(String),
}

/// What was asked for.
#[derive(Debug)]
pub struct Wanted<'a> {
    /// Who the certificate must speak for.
    pub subject: &'a Subject,
    /// The deployment.
    pub trust_domain: &'a TrustDomain,
    /// Whose key.
    pub spki_der: &'a [u8],
    /// Addresses it must have, and besides loopback the only ones.
    pub addresses: &'a [IpAddr],
    /// DNS names it must have, and besides localhost the only ones.
    pub dns_names: &'a [String],
    /// When.
    pub now: OffsetDateTime,
}

/// Judges an agent identity.
///
/// # Errors
/// See [`VerifyError`].
pub fn identity(
    chain: &v1::CertificateChain,
    control_roots: &[CertificateDer<'_>],
    wanted: &Wanted<'_>,
) -> Result<LeafFacts, VerifyError> {
    let facts = common(chain, wanted)?;
    if !facts.client_auth || facts.server_auth || facts.other_eku {
        return Err(VerifyError::Usage("clientAuth alone"));
    }
    chains(chain, control_roots, None, wanted.now)
        .map_err(|why| VerifyError::Chain { roots: "control root", why })?;
    Ok(facts)
}

/// Judges a Ray leaf, of a node or a driver.
///
/// # Errors
/// See [`VerifyError`].
pub fn leaf(
    chain: &v1::CertificateChain,
    cluster_roots: &[CertificateDer<'_>],
    wanted: &Wanted<'_>,
) -> Result<LeafFacts, VerifyError> {
    let facts = common(chain, wanted)?;
    if !facts.client_auth || !facts.server_auth {
        return Err(VerifyError::Usage("both serverAuth and clientAuth"));
    }
    same_names(&facts, wanted)?;
    let dialled = wanted.addresses.first().copied();
    chains(chain, cluster_roots, dialled, wanted.now)
        .map_err(|why| VerifyError::Chain { roots: "cluster root", why })?;
    Ok(facts)
}

/// Whether a chain verifies as client and, where an address is given, as server at that address.
///
/// # Errors
/// The verifier's words.
pub fn chains(
    chain: &v1::CertificateChain,
    roots: &[CertificateDer<'_>],
    dialled: Option<IpAddr>,
    now: OffsetDateTime,
) -> Result<(), String> {
    let store = Arc::new(root_store(roots)?);
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let certificates = chain.certificates();
    let (leaf, issuers) = certificates.split_first().ok_or("no certificate")?;
    let time = unix_time(now).ok_or("the clock stands before 1970")?;
    WebPkiClientVerifier::builder_with_provider(store.clone(), provider.clone())
        .build()
        .map_err(|e| e.to_string())?
        .verify_client_cert(leaf, issuers, time)
        .map_err(|e| e.to_string())?;
    let Some(address) = dialled else { return Ok(()) };
    WebPkiServerVerifier::builder_with_provider(store, provider)
        .build()
        .map_err(|e| e.to_string())?
        .verify_server_cert(leaf, issuers, &ServerName::from(address), &[], time)
        .map_err(|e| e.to_string())?;
    Ok(())
}

/// Judges a trust bundle by itself: bounded, readable, at least one root.
///
/// # Errors
/// [`VerifyError::Bundle`].
pub fn bundle(bundle: &v1::TrustBundle) -> Result<(), VerifyError> {
    let bad = |why: String| Err(VerifyError::Bundle(why));
    if bundle.roots_der.is_empty() || bundle.roots_der.len() > ROOTS_MAX {
        return bad(format!("it has {} roots, 1 to {ROOTS_MAX} wanted", bundle.roots_der.len()));
    }
    if bundle.crls_der.len() > CRLS_MAX {
        return bad(format!("it has {} CRLs, at most {CRLS_MAX} wanted", bundle.crls_der.len()));
    }
    for root in &bundle.roots_der {
        // Not by `LeafFacts`: a root made elsewhere may have a serial of 20 bytes.
        match X509Certificate::from_der(root) {
            Ok(([], root)) if root.is_ca() => {}
            Ok(_) | Err(_) => return bad("one of its roots is no CA certificate".to_owned()),
        }
    }
    crls(&bundle.crls_der)
}

/// Judges CRLs by themselves: readable to the last byte.
///
/// # Errors
/// [`VerifyError::Bundle`].
pub fn crls(crls_der: &[Vec<u8>]) -> Result<(), VerifyError> {
    for crl in crls_der {
        match CertificateRevocationList::from_der(crl) {
            Ok(([], _)) => {}
            Ok(_) | Err(_) => return Err(VerifyError::Bundle("unreadable CRL".to_owned())),
        }
    }
    Ok(())
}

/// Judges Ray's token by its form: one bounded line of visible characters, as Ray reads it.
///
/// # Errors
/// [`VerifyError::RayToken`].
pub fn ray_token(token: &[u8]) -> Result<(), VerifyError> {
    let visible = token.iter().all(u8::is_ascii_graphic);
    if (1..=RAY_TOKEN_LEN_MAX).contains(&token.len()) && visible {
        return Ok(());
    }
    Err(VerifyError::RayToken)
}

/// A store of trust anchors.
///
/// # Errors
/// None of them is readable, or one is not.
pub(crate) fn root_store(roots: &[CertificateDer<'_>]) -> Result<RootCertStore, String> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone().into_owned()).map_err(|e| e.to_string())?;
    }
    Ok(store)
}

fn common(chain: &v1::CertificateChain, wanted: &Wanted<'_>) -> Result<LeafFacts, VerifyError> {
    if chain.issuers_der.len() > ISSUERS_MAX {
        return Err(VerifyError::Missing("a chain of a sane length"));
    }
    let facts = LeafFacts::parse(&chain.leaf_der)?;
    if facts.spki_der != wanted.spki_der {
        return Err(VerifyError::OtherKey);
    }
    if facts.is_ca {
        return Err(VerifyError::Usage("use as a leaf: it is a CA certificate"));
    }
    let uri = wanted.subject.uri(wanted.trust_domain);
    if facts.uris != [uri.as_str()] || facts.other_names > 0 {
        return Err(VerifyError::OtherName { found: facts.uris.join(", "), wanted: uri });
    }
    if wanted.now < facts.not_before || wanted.now >= facts.not_after {
        return Err(VerifyError::Time {
            from: facts.not_before.into(),
            to: facts.not_after.into(),
            now: wanted.now.into(),
        });
    }
    Ok(facts)
}

fn same_names(facts: &LeafFacts, wanted: &Wanted<'_>) -> Result<(), VerifyError> {
    let loopback = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    same_set(&facts.addresses, wanted.addresses, &loopback)?;
    same_set(&facts.dns_names, wanted.dns_names, &["localhost".to_owned()])
}

/// All of `wanted`, and beyond it only what is `free`.
fn same_set<T: Ord + ToString>(found: &[T], wanted: &[T], free: &[T]) -> Result<(), VerifyError> {
    let has: BTreeSet<&T> = found.iter().collect();
    let asked: BTreeSet<&T> = wanted.iter().collect();
    if let Some(name) = asked.difference(&has).next() {
        return Err(VerifyError::Names { what: "lacks", name: name.to_string() });
    }
    match has.difference(&asked).find(|name| !free.contains(name)) {
        None => Ok(()),
        Some(name) => {
            Err(VerifyError::Names { what: "was not asked for but has", name: name.to_string() })
        }
    }
}

fn unix_time(now: OffsetDateTime) -> Option<UnixTime> {
    let seconds = u64::try_from(now.unix_timestamp()).ok()?;
    Some(UnixTime::since_unix_epoch(Duration::from_secs(seconds)))
}
