//! An issuer that can sign: its certificate and its unwrapped key. What it signs is read back and
//! compared with what was to be signed before anybody sees it.

use std::fmt;

use raymtls_proto::leaf::{LeafError, LeafFacts};
use rcgen::{Issuer, KeyPair, PublicKeyData, SignatureAlgorithm, SigningKey, SubjectPublicKeyInfo};
use rustls::pki_types::CertificateDer;
use thiserror::Error;
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, ParsedExtension, X509Certificate};
use zeroize::{Zeroize, ZeroizeOnDrop};

use super::{
    csr::key_hash,
    profile::{Contents, IssuerFacts, ProfileFault},
};
use crate::store::{Signed, unix_ms};

/// An issuer or root with its key.
pub struct Signer {
    certificate_der: CertificateDer<'static>,
    key_id: Vec<u8>,
    subject_der: Vec<u8>,
    not_after: OffsetDateTime,
    issuer: Issuer<'static, CaPrivateKey>,
}

/// Why nothing was signed.
#[derive(Debug, Error)]
pub enum SignError {
    /// The library failed.
    #[error("signing failed: {0}")]
    Library(#[from] rcgen::Error),
    /// What was signed is not what was to be.
    #[error(transparent)]
    Fault(#[from] ProfileFault),
    /// The issuer's own certificate cannot be read.
    #[error("issuer certificate: {0}")]
    Issuer(#[from] LeafError),
    /// Nothing can be issued below it any more.
    #[error("the issuer's own certificate has ended")]
    IssuerEnded,
}

impl Signer {
    /// An issuer from its certificate and key.
    ///
    /// # Errors
    /// The certificate cannot be read, or the key is not its.
    pub fn new(certificate_der: Vec<u8>, key: KeyPair) -> Result<Self, SignError> {
        let facts = LeafFacts::parse(&certificate_der)?;
        if facts.spki_der != key.subject_public_key_info() {
            return Err(LeafError("its key is another's").into());
        }
        let key_id = subject_key_id(&certificate_der)?;
        let certificate_der = CertificateDer::from(certificate_der);
        let issuer = Issuer::from_ca_cert_der(&certificate_der, CaPrivateKey(key))?;
        Ok(Self {
            certificate_der,
            key_id,
            subject_der: facts.subject_der,
            not_after: facts.not_after,
            issuer,
        })
    }

    /// Signs a certificate for a public key. No certificate outlives its issuer.
    ///
    /// # Errors
    /// See [`SignError`]; nothing that was signed leaves with an error.
    pub fn sign(
        &self,
        contents: &Contents,
        spki_der: &[u8],
        now: OffsetDateTime,
    ) -> Result<Signed, SignError> {
        let contents =
            Contents { not_after: contents.not_after.min(self.not_after), ..contents.clone() };
        if contents.not_after <= now {
            return Err(SignError::IssuerEnded);
        }
        let key = SubjectPublicKeyInfo::from_der(spki_der)?;
        let certificate = self.certificate(&contents, &key)?;
        contents.check(certificate.der(), spki_der, self.facts())?;
        Ok(Signed {
            serial: contents.serial,
            certificate_der: certificate.der().to_vec(),
            issued_ms: unix_ms(now),
            not_after_ms: unix_ms(contents.not_after),
            issuer_key_id: self.key_id.clone(),
            key_hash: key_hash(spki_der),
        })
    }

    fn certificate(
        &self,
        contents: &Contents,
        key: &SubjectPublicKeyInfo,
    ) -> Result<rcgen::Certificate, rcgen::Error> {
        // Tests have it sign something else, to see that it is caught.
        #[cfg(test)]
        if let Some(lie) = lie::told() {
            return lie(contents.params(), key, &self.issuer);
        }
        contents.params().signed_by(key, &self.issuer)
    }

    /// Signs what is no certificate and cannot be taken for one: the message begins with the name of
    /// its format.
    ///
    /// # Errors
    /// The library fails.
    pub fn sign_message(&self, message: &[u8]) -> Result<Vec<u8>, SignError> {
        Ok(self.issuer.key().sign(message)?)
    }

    /// The certificate.
    #[must_use]
    pub fn certificate_der(&self) -> &CertificateDer<'static> {
        &self.certificate_der
    }

    /// Its subject key identifier.
    #[must_use]
    pub fn key_id(&self) -> &[u8] {
        &self.key_id
    }

    /// Its notAfter.
    #[must_use]
    pub fn not_after(&self) -> OffsetDateTime {
        self.not_after
    }

    /// What a certificate it signed says of it.
    #[must_use]
    pub fn facts(&self) -> IssuerFacts<'_> {
        IssuerFacts { name_der: &self.subject_der, key_id: &self.key_id }
    }

    /// For CRLs.
    pub(crate) fn issuer(&self) -> &Issuer<'static, CaPrivateKey> {
        &self.issuer
    }
}

/// A key of the CA. Its encoding is wiped when it is dropped; the crypto library wipes what it frees.
pub(crate) struct CaPrivateKey(KeyPair);

impl CaPrivateKey {
    /// PKCS#8 in DER.
    pub(crate) fn pkcs8(&self) -> &[u8] {
        self.0.serialized_der()
    }
}

impl Drop for CaPrivateKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl ZeroizeOnDrop for CaPrivateKey {}

impl PublicKeyData for CaPrivateKey {
    fn der_bytes(&self) -> &[u8] {
        self.0.der_bytes()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        self.0.algorithm()
    }
}

impl SigningKey for CaPrivateKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.0.sign(message)
    }
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signer({}, ..)", hex::encode(&self.key_id))
    }
}

/// The SKI of a certificate (RFC 5280 4.2.1.2).
///
/// # Errors
/// It has none.
#[allow(clippy::wildcard_enum_match_arm, reason = "x509-parser's enum, not ours")]
pub fn subject_key_id(certificate_der: &[u8]) -> Result<Vec<u8>, LeafError> {
    let (_, certificate) = X509Certificate::from_der(certificate_der)
        .map_err(|_| LeafError("not an X.509 certificate in DER"))?;
    certificate
        .extensions()
        .iter()
        .find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0.to_vec()),
            _ => None,
        })
        .ok_or(LeafError("no subject key identifier"))
}

/// What a signer of this thread puts into certificates instead of what it was asked for. In tests
/// alone: nothing of it is compiled into a program.
#[cfg(test)]
pub(crate) mod lie {
    use std::cell::Cell;

    use rcgen::{Certificate, CertificateParams, Error, Issuer, SubjectPublicKeyInfo};

    pub(crate) type Lie = fn(
        CertificateParams,
        &SubjectPublicKeyInfo,
        &Issuer<'static, super::CaPrivateKey>,
    ) -> Result<Certificate, Error>;

    thread_local! {
        static LIE: Cell<Option<Lie>> = const { Cell::new(None) };
    }

    pub(super) fn told() -> Option<Lie> {
        LIE.get()
    }

    /// Tells it from here on, or with `None` the truth.
    pub(crate) fn tell(lie: Option<Lie>) {
        LIE.set(lie);
    }
}
