//! Who the other end is. Chain, time, use and CRLs are webpki's judgement; added to it are the grace
//! while the CA is away, and that name and address are those the rules list together. Nothing here
//! opens a connection.

use std::{net::IpAddr, sync::Arc, time::Duration};

use raymtls_proto::{
    identity::{NodeName, Subject},
    leaf::LeafFacts,
    serial::Serial,
};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        VerifierBuilderError, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};

use super::{
    credentials::{Credentials, Revoked},
    expiry::{Away, Standing},
    reason::{Reason, Refused},
    rules::{AddressBook, Rules},
};

/// What a peer's leaf says that matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PeerLeaf {
    pub(crate) name: NodeName,
    pub(crate) serial: Serial,
    pub(crate) issuer_der: Vec<u8>,
    pub(crate) not_after_unix: i64,
}

impl PeerLeaf {
    /// Reads a leaf that has been verified.
    ///
    /// # Errors
    /// It speaks for no node of this cluster.
    pub(crate) fn read(leaf_der: &[u8], rules: &Rules) -> Result<Self, Refused> {
        let facts = LeafFacts::parse(leaf_der)
            .map_err(|e| Refused::new(Reason::WrongName, e.to_string()))?;
        let name = node_named(&facts, rules)?;
        Ok(Self {
            name,
            serial: facts.serial,
            issuer_der: facts.issuer_der,
            not_after_unix: facts.not_after.unix_timestamp(),
        })
    }
}

fn node_named(facts: &LeafFacts, rules: &Rules) -> Result<NodeName, Refused> {
    let [uri] = &facts.uris[..] else {
        let why = format!("the leaf has {} URIs, one is wanted", facts.uris.len());
        return Err(Refused::new(Reason::WrongName, why));
    };
    match Subject::parse(uri, &rules.trust_domain) {
        Ok(Subject::RayNode(cluster, name)) if cluster == rules.cluster => Ok(name),
        Ok(Subject::RayNode(cluster, _) | Subject::RayDriver(cluster, _))
            if cluster != rules.cluster =>
        {
            let why = format!("the leaf is of cluster {cluster}, this is {}", rules.cluster);
            Err(Refused::new(Reason::WrongCluster, why))
        }
        Ok(
            Subject::RayNode(..) | Subject::RayDriver(..) | Subject::Agent(..) | Subject::Admin(..),
        ) => {
            Err(Refused::new(Reason::WrongName, format!("the leaf names {uri}, which is no node")))
        }
        Err(e) => Err(Refused::new(Reason::WrongName, e.to_string())),
    }
}

/// What the rules say of a peer at an address; the same for who dials and who is dialled.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Judge<'a> {
    pub(crate) book: &'a AddressBook,
    pub(crate) is_blocked: bool,
    pub(crate) revoked: &'a Revoked,
}

impl Judge<'_> {
    /// Whether flows with this address are allowed at all, before it has shown anything.
    ///
    /// # Errors
    /// Blocked, loopback, or no member's.
    pub(crate) fn address(&self, address: IpAddr) -> Result<&NodeName, Refused> {
        if self.is_blocked {
            return Err(Refused::new(Reason::Blocked, format!("{address} is blocked")));
        }
        let member = self.book.at(address).filter(|_| !address.is_loopback());
        member.ok_or_else(|| {
            Refused::new(Reason::NotAMember, format!("{address} is no address of a member"))
        })
    }

    /// Whether the holder of this leaf may be at this address.
    ///
    /// # Errors
    /// The above; another member's leaf; a leaf on a CRL.
    pub(crate) fn leaf(&self, leaf: &PeerLeaf, address: IpAddr) -> Result<(), Refused> {
        let listed = self.address(address)?;
        if *listed != leaf.name {
            let why = format!("the leaf of {} at {address}, which is {listed}", leaf.name);
            return Err(Refused::new(Reason::AddressMismatch, why));
        }
        if self.revoked.has(&leaf.issuer_der, &leaf.serial) {
            let serial = hex::encode(leaf.serial.as_bytes());
            let why = format!("serial {serial} of {} is revoked", leaf.name);
            return Err(Refused::new(Reason::Revoked, why));
        }
        Ok(())
    }
}

/// The client's check of the server's chain.
#[derive(Debug)]
pub(crate) struct ServerCheck {
    webpki: Arc<WebPkiServerVerifier>,
    rules: Arc<Rules>,
}

impl ServerCheck {
    /// # Errors
    /// Roots or CRLs are of no use.
    pub(crate) fn new(
        credentials: &Credentials,
        rules: Arc<Rules>,
    ) -> Result<Self, VerifierBuilderError> {
        let roots = credentials.roots.clone();
        // An issuer whose CRL has not come yet is no reason to stand still: members and blocks are
        // judged besides.
        let webpki = WebPkiServerVerifier::builder_with_provider(roots, super::provider())
            .with_crls(credentials.crls.iter().cloned())
            .allow_unknown_revocation_status()
            .build()?;
        Ok(Self { webpki, rules })
    }
}

impl ServerCertVerifier for ServerCheck {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        with_grace(&self.rules, end_entity, now, |now| {
            let webpki = &self.webpki;
            webpki.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}

/// The server's check of the client's chain.
#[derive(Debug)]
pub(crate) struct ClientCheck {
    webpki: Arc<dyn ClientCertVerifier>,
    rules: Arc<Rules>,
}

impl ClientCheck {
    /// # Errors
    /// Roots or CRLs are of no use.
    pub(crate) fn new(
        credentials: &Credentials,
        rules: Arc<Rules>,
    ) -> Result<Self, VerifierBuilderError> {
        let roots = credentials.roots.clone();
        let webpki = WebPkiClientVerifier::builder_with_provider(roots, super::provider())
            .with_crls(credentials.crls.iter().cloned())
            .allow_unknown_revocation_status()
            .clear_root_hint_subjects()
            .build()?;
        Ok(Self { webpki, rules })
    }
}

impl ClientCertVerifier for ClientCheck {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.webpki.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        with_grace(&self.rules, end_entity, now, |now| {
            self.webpki.verify_client_cert(end_entity, intermediates, now)
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}

/// An expired leaf in its grace is judged as at its last moment: chain, use, name and CRL count as
/// ever.
fn with_grace<T>(
    rules: &Rules,
    leaf: &CertificateDer<'_>,
    now: UnixTime,
    verify: impl Fn(UnixTime) -> Result<T, Error>,
) -> Result<T, Error> {
    let error = match verify(now) {
        Err(Error::InvalidCertificate(error)) => error,
        judged => return judged,
    };
    let Ok(facts) = LeafFacts::parse(leaf) else {
        return Err(Error::InvalidCertificate(error));
    };
    if is_expired(&error) {
        let now_unix = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let end_unix = facts.not_after.unix_timestamp();
        if Away::of(rules, now_unix).standing(end_unix, now_unix) == Standing::Graced {
            let end = Duration::from_secs(u64::try_from(end_unix).unwrap_or(0));
            return verify(UnixTime::since_unix_epoch(end));
        }
    }
    // Of an issuer nobody here knows, or of one that only has the name of ours.
    if matches!(error, CertificateError::UnknownIssuer | CertificateError::BadSignature)
        && let Err(refused) = node_named(&facts, rules)
        && refused.reason == Reason::WrongCluster
    {
        let other = CertificateError::Other(OtherError(Arc::new(refused)));
        return Err(Error::InvalidCertificate(other));
    }
    Err(Error::InvalidCertificate(error))
}

fn is_expired(error: &CertificateError) -> bool {
    matches!(error, CertificateError::Expired | CertificateError::ExpiredContext { .. })
}

#[cfg(test)]
#[path = "verifier_tests.rs"]
mod tests;
