//! What counts, and from when on a process is to be recycled: tables.

use std::time::Duration;

use raymtls_proto::{leaf::LeafFacts, serial::Serial, v1};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer,
    DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair,
    KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use time::{OffsetDateTime, macros::datetime};

use super::super::{
    horizon::{self, Leaf, State, Trust, Worth},
    kind::{Class, Kind},
};
use crate::keys::PrivateKey;

pub(crate) const NOW: OffsetDateTime = datetime!(2026-11-24 08:00 UTC);
pub(super) const NODE: &str = "spiffe://ray.example/cluster/c1/node/n1";
const HOUR: Duration = Duration::from_secs(3_600);

/// A cluster's root and issuer.
pub(super) struct Ca {
    root_der: Vec<u8>,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// Root, as DER, and issuer of a cluster, good a day before [`NOW`] and long after it.
pub(crate) fn authority(name: &str) -> (Vec<u8>, CertifiedIssuer<'static, KeyPair>) {
    let params = |name: String, path_len: Option<u8>| {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.not_before = NOW - 24 * HOUR;
        params.not_after = NOW + 9_999 * HOUR;
        params.is_ca = IsCa::Ca(
            path_len.map_or(BasicConstraints::Unconstrained, BasicConstraints::Constrained),
        );
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
    };
    let key = || KeyPair::generate().unwrap();
    let root = CertifiedIssuer::self_signed(params(format!("{name} root"), None), key()).unwrap();
    let issuer = params(format!("{name} issuer"), Some(0));
    let issuer = CertifiedIssuer::signed_by(issuer, key(), &root).unwrap();
    (root.der().to_vec(), issuer)
}

impl Ca {
    pub(super) fn new(name: &str) -> Self {
        let (root_der, issuer) = authority(name);
        Self { root_der, issuer }
    }

    pub(super) fn bundle(&self) -> v1::TrustBundle {
        v1::TrustBundle { roots_der: vec![self.root_der.clone()], crls_der: vec![] }
    }

    pub(super) fn trust(&self) -> Trust {
        Trust::new(&self.bundle(), vec![NODE.to_owned()])
    }

    /// A CRL with one leaf.
    pub(super) fn crl_der(&self, leaf: &v1::CertificateChain) -> Vec<u8> {
        let facts = LeafFacts::parse(&leaf.leaf_der).unwrap();
        let revoked = RevokedCertParams {
            serial_number: SerialNumber::from_slice(facts.serial.as_bytes()),
            revocation_time: NOW,
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: NOW,
            next_update: NOW + HOUR,
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![revoked],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().der().to_vec()
    }

    /// A leaf issued at `issued` that lives for `life`.
    pub(super) fn leaf(
        &self,
        uri: &str,
        issued: OffsetDateTime,
        life: Duration,
    ) -> (v1::CertificateChain, PrivateKey) {
        self.leaf_for(
            uri,
            issued,
            life,
            &[ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
        )
    }

    fn leaf_for(
        &self,
        uri: &str,
        issued: OffsetDateTime,
        life: Duration,
        usages: &[ExtendedKeyUsagePurpose],
    ) -> (v1::CertificateChain, PrivateKey) {
        let key = PrivateKey::generate().unwrap();
        let unix_ms = u64::try_from(issued.unix_timestamp()).unwrap() * 1_000;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let serial = Serial::new(unix_ms, rand::random());
        params.serial_number = Some(SerialNumber::from_slice(serial.as_bytes()));
        params.not_before = issued - Duration::from_secs(600);
        params.not_after = issued + life;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        params.extended_key_usages = usages.to_vec();
        params.subject_alt_names = vec![
            SanType::URI(uri.try_into().unwrap()),
            SanType::IpAddress("127.0.0.1".parse().unwrap()),
        ];
        let spki = SubjectPublicKeyInfo::from_der(&key.spki_der()).unwrap();
        let leaf = params.signed_by(&spki, &self.issuer).unwrap();
        let issuers_der = vec![self.issuer.der().to_vec()];
        (v1::CertificateChain { leaf_der: leaf.der().to_vec(), issuers_der }, key)
    }
}

#[test]
fn only_this_nodes_leaf_under_the_clusters_root_counts() {
    use ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
    let (ours, theirs) = (Ca::new("c1"), Ca::new("c1"));
    let both = [ServerAuth, ClientAuth];
    let mut without_issuer = ours.leaf(NODE, NOW, HOUR).0;
    without_issuer.issuers_der.clear();
    let garbage = v1::CertificateChain { leaf_der: b"x".to_vec(), issuers_der: vec![] };
    for (name, chain, why) in [
        ("this node's", ours.leaf(NODE, NOW, HOUR).0, None),
        ("this node's, ended", ours.leaf(NODE, NOW - 3 * HOUR, HOUR).0, None),
        ("this node's, of a CA ahead", ours.leaf(NODE, NOW + HOUR, HOUR).0, None),
        (
            "another node's",
            ours.leaf("spiffe://ray.example/cluster/c1/node/n2", NOW, HOUR).0,
            Some("it names spiffe://ray.example/cluster/c1/node/n2, and not this node"),
        ),
        (
            "another root of the same name",
            theirs.leaf(NODE, NOW, HOUR).0,
            Some("it does not chain"),
        ),
        ("without its issuer", without_issuer, Some("it does not chain")),
        ("a client alone", ours.leaf_for(NODE, NOW, HOUR, &both[1..]).0, Some("as a server")),
        ("a server alone", ours.leaf_for(NODE, NOW, HOUR, &both[..1]).0, Some("it does not chain")),
        ("no certificate", garbage, Some("unreadable certificate")),
    ] {
        match (horizon::judge(&chain, &ours.trust(), NOW), why) {
            (Worth::Counts(_), None) => {}
            (Worth::Foreign { why, .. }, Some(wanted)) if why.contains(wanted) => {}
            (worth, _) => panic!("{name}: {worth:?}"),
        }
    }
}

#[test]
fn a_foreign_certificate_is_shown_as_far_as_it_can_be_read() {
    let ca = Ca::new("c1");
    let (chain, _) = ca.leaf("https://example.org/\u{7}", NOW, HOUR);
    let Worth::Foreign { why, serial, not_after } = horizon::judge(&chain, &ca.trust(), NOW) else {
        panic!("it counts");
    };
    assert!(why.contains("example.org") && !why.contains('\u{7}'), "{why}");
    assert_eq!(not_after, Some(NOW + HOUR));
    assert!(serial.is_some());
}

#[test]
fn a_process_is_fresh_due_or_overdue_by_what_is_left_of_its_leaf() {
    use State::{Fresh, RecycleDue, RecycleOverdue};
    let leaf = Leaf { serial: Serial::new(1, [0; 10]), issued: NOW, not_after: NOW + 6 * HOUR };
    let second = Duration::from_secs(1);
    for (passed, node, driver) in [
        (Duration::ZERO, Fresh, Fresh),
        (3 * HOUR - second, Fresh, Fresh),
        (3 * HOUR, RecycleDue, Fresh),
        (4 * HOUR - second, RecycleDue, Fresh),
        (4 * HOUR, RecycleOverdue, RecycleOverdue),
        (9 * HOUR, RecycleOverdue, RecycleOverdue),
    ] {
        assert_eq!(horizon::state_of(&leaf, Class::Node, NOW + passed), node, "{passed:?}");
        assert_eq!(horizon::state_of(&leaf, Class::Driver, NOW + passed), driver, "{passed:?}");
    }
}

#[test]
fn the_worst_leaf_speaks_for_a_process_and_none_at_all_is_unknown() {
    let ends = |hours: u32| Leaf {
        serial: Serial::new(1, [0; 10]),
        issued: NOW - HOUR,
        not_after: NOW + hours * HOUR,
    };
    let state = |kind, leaves: &[Leaf]| horizon::state_of_process(kind, leaves, NOW);
    assert_eq!(state(Kind::Raylet, &[ends(9), ends(1)]), Some(State::RecycleDue));
    assert_eq!(state(Kind::Raylet, &[]), Some(State::Unknown));
    assert_eq!(state(Kind::Dashboard, &[]), None);
    assert_eq!(state(Kind::Other, &[]), None);
    assert_eq!(horizon::earliest(&[ends(9), ends(1)]), Some(NOW + HOUR));
    assert!(State::Unknown > State::Fresh && State::Unknown < State::RecycleDue);
}
