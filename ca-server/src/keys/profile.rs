//! The certificate table: what each kind of certificate holds and how long it lives. A certificate
//! is described by [`Contents`], signed from it, and read back against it before it leaves.
//!
//! All are P-256 with SHA-256 (Ray refuses Ed25519). Leaves have an empty subject, a critical SAN
//! (RFC 5280 4.1.2.6), critical BasicConstraints CA:FALSE and critical keyUsage digitalSignature.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use raymtls_proto::{
    address::NodeAddress,
    identity::{AdminName, ClusterId, DnsName, NodeName, Subject, TrustDomain},
    leaf::{LeafError, LeafFacts},
    serial::Serial,
    v1,
};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyUsagePurpose, SanType, SerialNumber,
};
use thiserror::Error;
use time::{Duration, OffsetDateTime};

/// notBefore lies this far back, so that a node whose clock is behind can use its certificate.
pub const BACKDATE: Duration = Duration::minutes(10);
/// Life of a root.
pub const ROOT_LIFE: Duration = Duration::days(3_652);
/// Life of an issuer, where leaves do not ask for more.
pub const ISSUER_LIFE_MIN: Duration = Duration::days(90);
/// Life of the ca-server's TLS certificate; its key never leaves memory.
pub const CA_SERVER_LIFE: Duration = Duration::days(7);
/// Life of an agent identity. It is looked up on every call, so the date protects nothing; a long
/// one survives a week switched off.
pub const AGENT_IDENTITY_LIFE: Duration = Duration::days(30);
/// Life of an admin identity.
pub const ADMIN_IDENTITY_LIFE: Duration = Duration::hours(24);

/// A kind of certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// Self-signed, without path length: a cross certificate may stand below it.
    Root,
    /// Signs leaves; path length 0.
    Issuer,
    /// TLS server certificate of the ca-server.
    CaServer,
    /// An agent towards the CA.
    AgentIdentity,
    /// An operator towards the CA.
    AdminIdentity,
    /// A node's Ray processes.
    RayNode,
    /// A driver.
    RayDriver,
}

impl Profile {
    /// Whether it may serve TLS. Each Ray process serves and dials with the same leaf.
    fn server_auth(self) -> bool {
        match self {
            Self::CaServer | Self::RayNode | Self::RayDriver => true,
            Self::Root | Self::Issuer | Self::AgentIdentity | Self::AdminIdentity => false,
        }
    }

    /// Whether it may dial with it.
    fn client_auth(self) -> bool {
        match self {
            Self::AgentIdentity | Self::AdminIdentity | Self::RayNode | Self::RayDriver => true,
            Self::Root | Self::Issuer | Self::CaServer => false,
        }
    }

    fn is_ca(self) -> bool {
        match self {
            Self::Root | Self::Issuer => true,
            Self::CaServer
            | Self::AgentIdentity
            | Self::AdminIdentity
            | Self::RayNode
            | Self::RayDriver => false,
        }
    }

    /// No issuer below an issuer; a root may have a cross certificate below it.
    fn path_len(self) -> Option<u32> {
        (self == Self::Issuer).then_some(0)
    }

    fn basic_constraints(self) -> IsCa {
        match self {
            Self::Root => IsCa::Ca(BasicConstraints::Unconstrained),
            Self::Issuer => IsCa::Ca(BasicConstraints::Constrained(0)),
            Self::CaServer
            | Self::AgentIdentity
            | Self::AdminIdentity
            | Self::RayNode
            | Self::RayDriver => IsCa::ExplicitNoCa,
        }
    }

    /// As it is named in records and messages; CA certificates and the server's are not recorded.
    #[must_use]
    pub fn kind(self) -> v1::CertificateKind {
        match self {
            Self::AgentIdentity => v1::CertificateKind::AgentIdentity,
            Self::AdminIdentity => v1::CertificateKind::AdminIdentity,
            Self::RayNode => v1::CertificateKind::RayNode,
            Self::RayDriver => v1::CertificateKind::RayDriver,
            Self::Root | Self::Issuer | Self::CaServer => v1::CertificateKind::Unspecified,
        }
    }
}

/// Everything that is to stand in a certificate, but for key and issuer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contents {
    /// Its kind.
    pub profile: Profile,
    /// Its serial.
    pub serial: Serial,
    /// Common name; CA certificates alone have one.
    pub common_name: Option<String>,
    /// URI SAN.
    pub uri: Option<String>,
    /// Address SANs, in order.
    pub addresses: Vec<IpAddr>,
    /// DNS SANs, in order.
    pub dns_names: Vec<String>,
    /// First moment.
    pub not_before: OffsetDateTime,
    /// Last moment, before the issuer's own end is taken into account.
    pub not_after: OffsetDateTime,
}

/// A certificate that is not what was to be signed: a fault of ours, and never the caller's.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ProfileFault {
    /// Cannot be read back.
    #[error(transparent)]
    Unreadable(#[from] LeafError),
    /// Holds something else.
    #[error("the signed certificate differs from its policy in {0}")]
    Differs(&'static str),
}

impl Contents {
    /// TLS certificate of a ca-server.
    #[must_use]
    pub fn ca_server(serial: Serial, now: OffsetDateTime, domain: &TrustDomain) -> Self {
        Self {
            dns_names: vec![domain.server_name()],
            ..Self::leaf(Profile::CaServer, serial, now, CA_SERVER_LIFE)
        }
    }

    /// Identity of an agent.
    #[must_use]
    pub fn agent_identity(
        serial: Serial,
        now: OffsetDateTime,
        domain: &TrustDomain,
        cluster: &ClusterId,
        node: &NodeName,
    ) -> Self {
        let subject = Subject::Agent(cluster.clone(), node.clone());
        Self {
            uri: Some(subject.uri(domain)),
            ..Self::leaf(Profile::AgentIdentity, serial, now, AGENT_IDENTITY_LIFE)
        }
    }

    /// Identity of an operator.
    #[must_use]
    pub fn admin_identity(
        serial: Serial,
        now: OffsetDateTime,
        domain: &TrustDomain,
        admin: &AdminName,
    ) -> Self {
        Self {
            uri: Some(Subject::Admin(admin.clone()).uri(domain)),
            ..Self::leaf(Profile::AdminIdentity, serial, now, ADMIN_IDENTITY_LIFE)
        }
    }

    /// Leaf of a node's Ray processes. Ray dials loopback too, and checks the name it dials.
    #[must_use]
    pub fn ray_node(
        serial: Serial,
        now: OffsetDateTime,
        life: Duration,
        subject: (&TrustDomain, &ClusterId, &NodeName),
        addresses: &[NodeAddress],
        dns_names: &[DnsName],
    ) -> Self {
        let (domain, cluster, node) = subject;
        let loopback = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
        let mut names: Vec<String> = dns_names.iter().map(ToString::to_string).collect();
        if !names.iter().any(|name| name == "localhost") {
            names.push("localhost".to_owned());
        }
        Self {
            uri: Some(Subject::RayNode(cluster.clone(), node.clone()).uri(domain)),
            addresses: addresses.iter().map(|a| a.ip()).chain(loopback).collect(),
            dns_names: names,
            ..Self::leaf(Profile::RayNode, serial, now, life)
        }
    }

    /// Leaf of a driver: its own addresses alone. It serves the workers that use its objects.
    #[must_use]
    pub fn ray_driver(
        serial: Serial,
        now: OffsetDateTime,
        life: Duration,
        subject: (&TrustDomain, &ClusterId, &NodeName),
        addresses: &[NodeAddress],
    ) -> Self {
        let (domain, cluster, node) = subject;
        Self {
            uri: Some(Subject::RayDriver(cluster.clone(), node.clone()).uri(domain)),
            addresses: addresses.iter().map(|a| a.ip()).collect(),
            ..Self::leaf(Profile::RayDriver, serial, now, life)
        }
    }

    /// A CA certificate. `common_name` is unique to its key: Ray's handshake names the trusted CAs
    /// by subject only.
    #[must_use]
    pub fn authority(
        profile: Profile,
        serial: Serial,
        now: OffsetDateTime,
        life: Duration,
        common_name: String,
    ) -> Self {
        Self { common_name: Some(common_name), ..Self::leaf(profile, serial, now, life) }
    }

    fn leaf(profile: Profile, serial: Serial, now: OffsetDateTime, life: Duration) -> Self {
        // X.509 times are whole seconds.
        let now = now.replace_nanosecond(0).expect("zero is a nanosecond");
        Self {
            profile,
            serial,
            common_name: None,
            uri: None,
            addresses: Vec::new(),
            dns_names: Vec::new(),
            not_before: now - BACKDATE,
            not_after: now + life,
        }
    }

    /// What rcgen signs. Every default of rcgen's is replaced.
    #[must_use]
    pub fn params(&self) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.not_before = self.not_before;
        params.not_after = self.not_after;
        params.serial_number = Some(SerialNumber::from_slice(self.serial.as_bytes()));
        params.distinguished_name = DistinguishedName::new();
        if let Some(name) = &self.common_name {
            params.distinguished_name.push(DnType::CommonName, name.as_str());
        }
        params.subject_alt_names = self.alternative_names();
        params.is_ca = self.profile.basic_constraints();
        params.key_usages = if self.profile.is_ca() {
            vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign]
        } else {
            vec![KeyUsagePurpose::DigitalSignature]
        };
        if self.profile.server_auth() {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        if self.profile.client_auth() {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth);
        }
        // RFC 5280 4.2.1.1: a self-signed root may leave it out, everything else must have it.
        params.use_authority_key_identifier_extension = self.profile != Profile::Root;
        params
    }

    fn alternative_names(&self) -> Vec<SanType> {
        let ia5 = |text: &String| text.as_str().try_into().expect("names are ASCII by their types");
        let uri = self.uri.iter().map(|uri| SanType::URI(ia5(uri)));
        let addresses = self.addresses.iter().copied().map(SanType::IpAddress);
        let dns_names = self.dns_names.iter().map(|name| SanType::DnsName(ia5(name)));
        uri.chain(addresses).chain(dns_names).collect()
    }

    /// Reads a signed certificate back and compares it with what was to be signed.
    ///
    /// # Errors
    /// The first difference.
    pub fn check(
        &self,
        certificate_der: &[u8],
        spki_der: &[u8],
        issuer: IssuerFacts<'_>,
    ) -> Result<LeafFacts, ProfileFault> {
        let facts = LeafFacts::parse(certificate_der)?;
        let wants_ca = self.profile.is_ca();
        let uris: Vec<&String> = self.uri.iter().collect();
        let authority_key_id = (self.profile != Profile::Root).then_some(issuer.key_id);
        let differs = [
            ("serial", facts.serial != self.serial),
            ("public key", facts.spki_der != spki_der),
            ("issuer", facts.issuer_der != issuer.name_der),
            ("authority key identifier", facts.authority_key_id.as_deref() != authority_key_id),
            ("subject", (facts.subject_der == [0x30, 0]) != self.common_name.is_none()),
            ("notBefore", facts.not_before != self.not_before),
            ("notAfter", facts.not_after != self.not_after),
            ("addresses", facts.addresses != self.addresses),
            ("DNS names", facts.dns_names != self.dns_names),
            ("URIs", facts.uris.iter().collect::<Vec<_>>() != uris),
            ("names of other types", facts.other_names != 0),
            ("serverAuth", facts.server_auth != self.profile.server_auth()),
            ("clientAuth", facts.client_auth != self.profile.client_auth()),
            ("other extended key usages", facts.other_eku),
            ("CA flag", facts.is_ca != wants_ca),
            ("path length", facts.path_len != self.profile.path_len()),
            ("key usage", facts.key_usage != Some(if wants_ca { 0b110_0000 } else { 1 })),
            ("extensions", !same_extensions(&facts.extensions, &self.extensions())),
        ];
        match differs.iter().find(|(_, differs)| *differs) {
            Some((what, _)) => Err(ProfileFault::Differs(what)),
            None => Ok(facts),
        }
    }

    /// The extensions the profile has, and no other; with each whether it is critical.
    fn extensions(&self) -> Vec<(&'static str, bool)> {
        let mut extensions = vec![(KEY_USAGE, true), (SUBJECT_KEY_ID, false), (CONSTRAINTS, true)];
        if self.profile != Profile::Root {
            extensions.push((AUTHORITY_KEY_ID, false));
        }
        if !self.alternative_names().is_empty() {
            // RFC 5280 4.1.2.6: critical where the subject is empty.
            extensions.push((ALTERNATIVE_NAMES, self.common_name.is_none()));
        }
        if self.profile.server_auth() || self.profile.client_auth() {
            extensions.push((EXTENDED_KEY_USAGE, false));
        }
        extensions
    }
}

/// Who is to have signed.
#[derive(Clone, Copy, Debug)]
pub struct IssuerFacts<'a> {
    /// Its subject, DER.
    pub name_der: &'a [u8],
    /// Its subject key identifier.
    pub key_id: &'a [u8],
}

fn same_extensions(found: &[(String, bool)], wanted: &[(&str, bool)]) -> bool {
    found.len() == wanted.len()
        && wanted.iter().all(|(oid, critical)| {
            found.iter().any(|(other, is_critical)| other == oid && is_critical == critical)
        })
}

const SUBJECT_KEY_ID: &str = "2.5.29.14";
const KEY_USAGE: &str = "2.5.29.15";
const ALTERNATIVE_NAMES: &str = "2.5.29.17";
const CONSTRAINTS: &str = "2.5.29.19";
const AUTHORITY_KEY_ID: &str = "2.5.29.35";
const EXTENDED_KEY_USAGE: &str = "2.5.29.37";

#[cfg(test)]
mod tests {
    use raymtls_proto::identity::ClusterId;
    use rcgen::{Issuer, KeyPair, PublicKeyData};

    use super::*;

    fn contents() -> Contents {
        let now = OffsetDateTime::UNIX_EPOCH + Duration::days(20_000);
        let domain: TrustDomain = "ray.example".parse().unwrap();
        let (cluster, node): (ClusterId, NodeName) = ("c1".parse().unwrap(), "n1".parse().unwrap());
        let subject = (&domain, &cluster, &node);
        let addresses = ["10.0.0.1".parse().unwrap()];
        let serial = Serial::new(1, [7; 10]);
        Contents::ray_node(serial, now, Duration::days(1), subject, &addresses, &[])
    }

    /// A signer that was told to put something else in is caught before the reply.
    #[test]
    fn a_certificate_that_differs_from_its_policy_is_caught() {
        let ca_key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        ca.serial_number = Some(SerialNumber::from_slice(&[1; 16]));
        let name_der =
            LeafFacts::parse(ca.self_signed(&ca_key).unwrap().der()).unwrap().subject_der;
        let key_id = ca.key_identifier(&ca_key);
        let issuer = Issuer::new(ca, &ca_key);
        let issuer_facts = IssuerFacts { name_der: &name_der, key_id: &key_id };
        let key = KeyPair::generate().unwrap();
        let other_key = KeyPair::generate().unwrap();
        let wanted = contents();
        let sign = |key: &KeyPair, change: &dyn Fn(&mut CertificateParams)| {
            let mut params = wanted.params();
            change(&mut params);
            let signed = params.signed_by(key, &issuer).unwrap();
            wanted.check(signed.der(), &key.subject_public_key_info(), issuer_facts)
        };

        sign(&key, &|_| {}).unwrap();
        let evil = || SanType::DnsName("evil".try_into().unwrap());
        let table: [(&str, &dyn Fn(&mut CertificateParams)); 8] = [
            ("DNS names", &|p| p.subject_alt_names.push(evil())),
            ("CA flag", &|p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
            ("notAfter", &|p| p.not_after += Duration::SECOND),
            ("serial", &|p| p.serial_number = Some(SerialNumber::from_slice(&[9; 16]))),
            ("clientAuth", &|p| p.extended_key_usages.truncate(1)),
            ("key usage", &|p| p.key_usages.push(KeyUsagePurpose::KeyCertSign)),
            ("authority key identifier", &|p| p.use_authority_key_identifier_extension = false),
            ("subject", &|p| p.distinguished_name.push(DnType::CommonName, "x")),
        ];
        for (what, change) in table {
            assert_eq!(sign(&key, change).unwrap_err(), ProfileFault::Differs(what), "{what}");
        }
        let signed = wanted.params().signed_by(&other_key, &issuer).unwrap();
        let spki_der = key.subject_public_key_info();
        let fault = wanted.check(signed.der(), &spki_der, issuer_facts).unwrap_err();
        assert_eq!(fault, ProfileFault::Differs("public key"));
    }
}
