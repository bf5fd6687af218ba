//! A root, an issuer and what they sign for a test: leaves of any name, address and time, and CRLs.

use std::net::IpAddr;

use raymtls_proto::{
    bundle,
    clock::{Clock, SystemClock},
    identity::Subject,
};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer,
    DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair,
    KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use time::{Duration, OffsetDateTime};

use crate::TRUST_DOMAIN;

/// Root and issuer of a cluster.
pub struct Authority {
    root_der: Vec<u8>,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// What a leaf is to say.
#[derive(Clone, Debug)]
pub struct Leaf {
    pub uri: String,
    pub addresses: Vec<IpAddr>,
    pub not_before: OffsetDateTime,
    pub not_after: OffsetDateTime,
    pub serial: [u8; 16],
}

/// A leaf with its chain and key.
pub struct Signed {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: KeyPair,
    pub serial: [u8; 16],
}

impl Signed {
    /// For rustls.
    pub fn key_der(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.key.serialize_der()).into()
    }

    pub fn chain_pem(&self) -> String {
        bundle::certificates_to_pem(&self.chain)
    }
}

impl Leaf {
    /// Of a node, valid for a day.
    pub fn of(cluster: &str, node: &str, addresses: &[IpAddr]) -> Self {
        let subject = Subject::RayNode(cluster.parse().unwrap(), node.parse().unwrap());
        let now = SystemClock.now();
        let mut serial: [u8; 16] = rand::random();
        serial[0] = 0x01;
        Self {
            uri: subject.uri(&TRUST_DOMAIN.parse().unwrap()),
            addresses: addresses.to_vec(),
            not_before: now - Duration::MINUTE,
            not_after: now + Duration::DAY,
            serial,
        }
    }

    #[must_use]
    pub fn until(self, not_after: OffsetDateTime) -> Self {
        Self { not_after, not_before: self.not_before.min(not_after - Duration::MINUTE), ..self }
    }
}

impl Default for Authority {
    fn default() -> Self {
        Self::new()
    }
}

impl Authority {
    pub fn new() -> Self {
        let root = CertifiedIssuer::self_signed(ca_params("root", 1), key()).unwrap();
        let root_der = root.der().to_vec();
        let issuer = CertifiedIssuer::signed_by(ca_params("issuer", 0), key(), &root).unwrap();
        Self { root_der, issuer }
    }

    pub fn root_pem(&self) -> String {
        bundle::certificates_to_pem(&[&self.root_der])
    }

    pub fn root_der(&self) -> CertificateDer<'static> {
        self.root_der.clone().into()
    }

    pub fn sign(&self, leaf: &Leaf) -> Signed {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.not_before = leaf.not_before;
        params.not_after = leaf.not_after;
        params.serial_number = Some(SerialNumber::from_slice(&leaf.serial));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.subject_alt_names = vec![SanType::URI(leaf.uri.clone().try_into().unwrap())];
        let loopback = ["127.0.0.1".parse().unwrap(), "::1".parse().unwrap()];
        let addresses = leaf.addresses.iter().copied().chain(loopback);
        params.subject_alt_names.extend(addresses.map(SanType::IpAddress));
        let key = key();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let chain = vec![certificate.der().clone(), self.issuer.der().clone()];
        Signed { chain, key, serial: leaf.serial }
    }

    /// The CRL of the issuer.
    pub fn crl_pem(&self, revoked: &[[u8; 16]]) -> String {
        let now = SystemClock.now();
        let entry = |serial: &[u8; 16]| RevokedCertParams {
            serial_number: SerialNumber::from_slice(serial),
            revocation_time: now - Duration::MINUTE,
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: now - Duration::MINUTE,
            next_update: now + Duration::DAY,
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: revoked.iter().map(entry).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let crl = params.signed_by(&self.issuer).unwrap();
        bundle::crls_to_pem(&[crl.der()])
    }
}

fn key() -> KeyPair {
    KeyPair::generate().unwrap()
}

fn ca_params(name: &str, path_len: u8) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    let now = SystemClock.now();
    params.not_before = now - Duration::days(400);
    params.not_after = now + Duration::days(400);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_len));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}
