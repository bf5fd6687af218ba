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
/// Longest life of an identity: 30 days, and what the CA backdates.
const IDENTITY_LIFE_MAX: time::Duration = time::Duration::days(31);
/// Longest life of a leaf: twice the longest job of 40 days, and what the CA backdates.
const LEAF_LIFE_MAX: time::Duration = time::Duration::days(82);
/// An empty name, DER.
const EMPTY_NAME_DER: [u8; 2] = [0x30, 0x00];
/// keyUsage of digitalSignature alone (RFC 5280 4.2.1.3).
const DIGITAL_SIGNATURE: u16 = 1;
const ALTERNATIVE_NAMES: &str = "2.5.29.17";
/// The extensions our certificates have: subject key identifier, keyUsage, alternative names,
/// basicConstraints, authority key identifier, extended key usage.
const EXTENSIONS: [&str; 6] =
    ["2.5.29.14", "2.5.29.15", ALTERNATIVE_NAMES, "2.5.29.19", "2.5.29.35", "2.5.29.37"];

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
    /// Has something a certificate of ours never has.
    #[error("the certificate has {0}")]
    Odd(String),
    /// Valid for longer than any of ours.
    #[error("the certificate is valid for {days} days, at most {max} wanted")]
    Life {
        /// Days from first to last moment.
        days: i64,
        /// Most days.
        max: i64,
    },
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
    /// The addresses it must have; a node's leaf has loopback besides, an identity has none.
    pub addresses: &'a [IpAddr],
    /// The DNS names it must have; a node's leaf has localhost besides, an identity has none.
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
    let facts = read(chain)?;
    judge_identity(&facts, wanted)?;
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
    let facts = read(chain)?;
    judge_leaf(&facts, wanted)?;
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

fn read(chain: &v1::CertificateChain) -> Result<LeafFacts, VerifyError> {
    if chain.issuers_der.len() > ISSUERS_MAX {
        return Err(VerifyError::Missing("a chain of a sane length"));
    }
    Ok(LeafFacts::parse(&chain.leaf_der)?)
}

fn judge_identity(facts: &LeafFacts, wanted: &Wanted<'_>) -> Result<(), VerifyError> {
    judge(facts, wanted, IDENTITY_LIFE_MAX)?;
    if !facts.client_auth || facts.server_auth || facts.other_eku {
        return Err(VerifyError::Usage("clientAuth alone"));
    }
    same_set(&facts.addresses, &[])?;
    same_set(&facts.dns_names, &[])
}

fn judge_leaf(facts: &LeafFacts, wanted: &Wanted<'_>) -> Result<(), VerifyError> {
    judge(facts, wanted, LEAF_LIFE_MAX)?;
    if !facts.client_auth || !facts.server_auth || facts.other_eku {
        return Err(VerifyError::Usage("serverAuth and clientAuth alone"));
    }
    if wanted.addresses.is_empty() {
        return Err(VerifyError::Missing("any address of this node"));
    }
    let (mut addresses, mut dns_names) = (wanted.addresses.to_vec(), wanted.dns_names.to_vec());
    match wanted.subject {
        // Ray dials loopback too, and checks the name it dials.
        Subject::RayNode(..) => {
            addresses.extend([Ipv4Addr::LOCALHOST.into(), IpAddr::V6(Ipv6Addr::LOCALHOST)]);
            dns_names.push("localhost".to_owned());
        }
        Subject::RayDriver(..) | Subject::Agent(..) | Subject::Admin(..) => {}
    }
    same_set(&facts.addresses, &addresses)?;
    same_set(&facts.dns_names, &dns_names)
}

/// What holds for every certificate of ours.
fn judge(
    facts: &LeafFacts,
    wanted: &Wanted<'_>,
    life_max: time::Duration,
) -> Result<(), VerifyError> {
    let odd = |what: &str| Err(VerifyError::Odd(what.to_owned()));
    if facts.spki_der != wanted.spki_der {
        return Err(VerifyError::OtherKey);
    }
    if facts.is_ca || facts.path_len.is_some() {
        return Err(VerifyError::Usage("use as a leaf: it is a CA certificate"));
    }
    if facts.key_usage != Some(DIGITAL_SIGNATURE) {
        return Err(VerifyError::Usage("digitalSignature alone"));
    }
    let uri = wanted.subject.uri(wanted.trust_domain);
    if facts.uris != [uri.as_str()] || facts.other_names > 0 {
        return Err(VerifyError::OtherName { found: facts.uris.join(", "), wanted: uri });
    }
    if facts.subject_der != EMPTY_NAME_DER {
        return odd("a subject name");
    }
    if facts.authority_key_id.is_none() {
        return odd("no authority key identifier");
    }
    if let Some((oid, _)) =
        facts.extensions.iter().find(|(oid, _)| !EXTENSIONS.contains(&oid.as_str()))
    {
        return Err(VerifyError::Odd(format!("an extension {oid} of unknown meaning")));
    }
    // RFC 5280 4.1.2.6: critical where the subject is empty.
    if !facts.extensions.contains(&(ALTERNATIVE_NAMES.to_owned(), true)) {
        return odd("alternative names that are not critical");
    }
    judge_time(facts, wanted.now, life_max)
}

fn judge_time(
    facts: &LeafFacts,
    now: OffsetDateTime,
    life_max: time::Duration,
) -> Result<(), VerifyError> {
    if now < facts.not_before || now >= facts.not_after {
        return Err(VerifyError::Time {
            from: facts.not_before.into(),
            to: facts.not_after.into(),
            now: now.into(),
        });
    }
    let life = facts.not_after - facts.not_before;
    if life > life_max {
        return Err(VerifyError::Life { days: life.whole_days(), max: life_max.whole_days() });
    }
    Ok(())
}

/// All of `wanted`, and nothing beyond it.
fn same_set<T: Ord + ToString>(found: &[T], wanted: &[T]) -> Result<(), VerifyError> {
    let found: BTreeSet<&T> = found.iter().collect();
    let wanted: BTreeSet<&T> = wanted.iter().collect();
    if let Some(name) = wanted.difference(&found).next() {
        return Err(VerifyError::Names { what: "lacks", name: name.to_string() });
    }
    match found.difference(&wanted).next() {
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

#[cfg(test)]
mod tests {
    use raymtls_proto::serial::Serial;
    use time::macros::datetime;

    use super::*;

    const NOW: OffsetDateTime = datetime!(2026-11-24 08:00 UTC);
    const SPKI: &[u8] = b"a key";
    const BACKDATE: time::Duration = time::Duration::minutes(10);

    fn domain() -> TrustDomain {
        "ray.example".parse().unwrap()
    }

    fn agent() -> Subject {
        Subject::Agent("c1".parse().unwrap(), "n1".parse().unwrap())
    }

    fn ray_node() -> Subject {
        Subject::RayNode("c1".parse().unwrap(), "n1".parse().unwrap())
    }

    fn ray_driver() -> Subject {
        Subject::RayDriver("c1".parse().unwrap(), "n1".parse().unwrap())
    }

    /// Every field is set here: a new one does not compile until it is judged, or said not to be.
    fn facts(subject: &Subject, server_auth: bool, life: time::Duration) -> LeafFacts {
        let extensions = EXTENSIONS.map(|oid| (oid.to_owned(), oid == ALTERNATIVE_NAMES)).to_vec();
        LeafFacts {
            // Any serial is as good as another, and the issuer is for the chain to prove.
            serial: Serial::new(1, [7; 10]),
            issuer_der: Vec::new(),
            not_before: NOW - BACKDATE,
            not_after: NOW + life,
            spki_der: SPKI.to_vec(),
            subject_der: EMPTY_NAME_DER.to_vec(),
            addresses: Vec::new(),
            dns_names: Vec::new(),
            uris: vec![subject.uri(&domain())],
            other_names: 0,
            server_auth,
            client_auth: true,
            other_eku: false,
            is_ca: false,
            key_usage: Some(DIGITAL_SIGNATURE),
            path_len: None,
            authority_key_id: Some(vec![1]),
            extensions,
        }
    }

    fn good_identity() -> LeafFacts {
        facts(&agent(), false, time::Duration::days(30))
    }

    fn good_leaf() -> LeafFacts {
        let addresses = ["10.0.0.1", "127.0.0.1", "::1"];
        LeafFacts {
            addresses: addresses.map(|address| address.parse().unwrap()).to_vec(),
            dns_names: vec!["head.ray".to_owned(), "localhost".to_owned()],
            ..facts(&ray_node(), true, time::Duration::days(80))
        }
    }

    fn good_driver_leaf() -> LeafFacts {
        LeafFacts {
            addresses: vec!["10.0.0.1".parse().unwrap()],
            ..facts(&ray_driver(), true, time::Duration::days(80))
        }
    }

    fn identity_verdict(facts: &LeafFacts) -> Result<(), VerifyError> {
        let (subject, domain) = (agent(), domain());
        judge_identity(
            facts,
            &Wanted {
                subject: &subject,
                trust_domain: &domain,
                spki_der: SPKI,
                addresses: &[],
                dns_names: &[],
                now: NOW,
            },
        )
    }

    fn leaf_verdict(
        facts: &LeafFacts,
        subject: &Subject,
        addresses: &[&str],
        dns_names: &[&str],
    ) -> Result<(), VerifyError> {
        let addresses: Vec<IpAddr> = addresses.iter().map(|a| a.parse().unwrap()).collect();
        let dns_names: Vec<String> = dns_names.iter().map(|&name| name.to_owned()).collect();
        judge_leaf(
            facts,
            &Wanted {
                subject,
                trust_domain: &domain(),
                spki_der: SPKI,
                addresses: &addresses,
                dns_names: &dns_names,
                now: NOW,
            },
        )
    }

    type Mutation = (&'static str, fn(&mut LeafFacts));

    /// What makes any certificate of no use.
    const MUTATIONS: [Mutation; 21] = [
        ("notBefore in the future", |f| f.not_before = NOW + time::Duration::SECOND),
        ("over now", |f| f.not_after = NOW),
        ("a life too long", |f| f.not_after = NOW + time::Duration::days(100)),
        ("a life too long backwards", |f| f.not_before = NOW - time::Duration::days(100)),
        ("another key", |f| f.spki_der = b"another".to_vec()),
        ("a subject", |f| f.subject_der = vec![0x30, 0x01, 0x00]),
        ("another address", |f| f.addresses.push("10.0.0.2".parse().unwrap())),
        ("another DNS name", |f| f.dns_names.push("other.ray".to_owned())),
        ("no URI", |f| f.uris.clear()),
        ("a second URI", |f| f.uris.push("spiffe://ray.example/other".to_owned())),
        ("another URI", |f| f.uris = vec!["spiffe://other.example/x".to_owned()]),
        ("a name of another type", |f| f.other_names = 1),
        ("no clientAuth", |f| f.client_auth = false),
        ("the other serverAuth", |f| f.server_auth = !f.server_auth),
        ("another extended key usage", |f| f.other_eku = true),
        ("CA", |f| f.is_ca = true),
        ("a path length", |f| f.path_len = Some(0)),
        ("no key usage", |f| f.key_usage = None),
        ("keyCertSign", |f| f.key_usage = Some(DIGITAL_SIGNATURE | 0b10_0000)),
        ("no authority key identifier", |f| f.authority_key_id = None),
        ("an unknown extension", |f| f.extensions.push(("1.2.3".to_owned(), false))),
    ];

    #[test]
    fn no_mutated_identity_is_let_through() {
        identity_verdict(&good_identity()).unwrap();
        let own: [Mutation; 2] = [
            ("names that are not critical", |f| f.extensions[2].1 = false),
            ("a second longer than an identity lives", |f| {
                f.not_after = f.not_before + IDENTITY_LIFE_MAX + time::Duration::SECOND;
            }),
        ];
        for (name, mutate) in MUTATIONS.into_iter().chain(own) {
            let mut facts = good_identity();
            mutate(&mut facts);
            assert!(identity_verdict(&facts).is_err(), "{name}");
        }
    }

    #[test]
    fn no_mutated_leaf_is_let_through() {
        let own: [Mutation; 4] = [
            ("no address", |f| f.addresses.clear()),
            ("an address less", |f| f.addresses.truncate(f.addresses.len() - 1)),
            ("names that are not critical", |f| f.extensions[2].1 = false),
            ("a second longer than a leaf lives", |f| {
                f.not_after = f.not_before + LEAF_LIFE_MAX + time::Duration::SECOND;
            }),
        ];
        let node =
            |facts: &LeafFacts| leaf_verdict(facts, &ray_node(), &["10.0.0.1"], &["head.ray"]);
        let driver = |facts: &LeafFacts| leaf_verdict(facts, &ray_driver(), &["10.0.0.1"], &[]);
        node(&good_leaf()).unwrap();
        driver(&good_driver_leaf()).unwrap();
        for (name, mutate) in MUTATIONS.into_iter().chain(own) {
            let (mut node_facts, mut driver_facts) = (good_leaf(), good_driver_leaf());
            mutate(&mut node_facts);
            mutate(&mut driver_facts);
            assert!(node(&node_facts).is_err(), "node: {name}");
            assert!(driver(&driver_facts).is_err(), "driver: {name}");
        }
        let nodes_own: [Mutation; 4] = [
            ("no 127.0.0.1", |f| f.addresses.retain(|a| *a != IpAddr::V4(Ipv4Addr::LOCALHOST))),
            ("no ::1", |f| f.addresses.retain(|a| *a != IpAddr::V6(Ipv6Addr::LOCALHOST))),
            ("no localhost", |f| f.dns_names.retain(|name| name != "localhost")),
            ("a DNS name less", |f| f.dns_names.retain(|name| name != "head.ray")),
        ];
        for (name, mutate) in nodes_own {
            let mut facts = good_leaf();
            mutate(&mut facts);
            assert!(node(&facts).is_err(), "node: {name}");
        }
        let mut loopback = good_driver_leaf();
        loopback.addresses.push(Ipv4Addr::LOCALHOST.into());
        assert!(driver(&loopback).is_err(), "a driver that answers for loopback");
    }

    #[test]
    fn a_leaf_for_no_address_is_judged_by_nobody() {
        let mut facts = good_leaf();
        facts.addresses.remove(0);
        let verdict = leaf_verdict(&facts, &ray_node(), &[], &["head.ray"]);
        assert_eq!(verdict, Err(VerifyError::Missing("any address of this node")));
    }
}
