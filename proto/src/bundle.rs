//! PEM and DER: certificate chains and trust bundles as files. DER travels and is stored; PEM is
//! for files and people.

use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer,
    pem::{self as pem_reader, PemObject},
};
use thiserror::Error;

use crate::v1;

/// Most certificates in one file: a chain is 2 or 3, a bundle a root or two.
const CERTIFICATES_MAX: usize = 32;

/// PEM that cannot be read.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum PemError {
    /// Broken or empty.
    #[error("no certificate in PEM form found")]
    Empty,
    /// Cut short or damaged.
    #[error("damaged PEM: {0}")]
    Damaged(String),
    /// Over the bound.
    #[error("more than {CERTIFICATES_MAX} certificates in one PEM text")]
    TooMany,
}

/// DER certificates as one PEM text, in the given order.
#[must_use]
pub fn certificates_to_pem<D: AsRef<[u8]>>(certificates_der: &[D]) -> String {
    to_pem("CERTIFICATE", certificates_der)
}

/// DER CRLs as one PEM text.
#[must_use]
pub fn crls_to_pem<D: AsRef<[u8]>>(crls_der: &[D]) -> String {
    to_pem("X509 CRL", crls_der)
}

/// A private key in PKCS#8 as PEM: the caller wipes it.
#[must_use]
pub fn private_key_to_pem(pkcs8_der: &[u8]) -> String {
    to_pem("PRIVATE KEY", &[pkcs8_der])
}

fn to_pem<D: AsRef<[u8]>>(label: &str, blocks_der: &[D]) -> String {
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    blocks_der
        .iter()
        .map(|der| pem::encode_config(&pem::Pem::new(label, der.as_ref()), config))
        .collect()
}

/// The certificates of a PEM text.
///
/// # Errors
/// None in it, damage, or more than 32.
pub fn certificates_from_pem(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, PemError> {
    let mut certificates = Vec::new();
    for certificate in CertificateDer::pem_slice_iter(text) {
        certificates.push(certificate.map_err(|e| damaged(&e))?);
        if certificates.len() > CERTIFICATES_MAX {
            return Err(PemError::TooMany);
        }
    }
    if certificates.is_empty() {
        return Err(PemError::Empty);
    }
    Ok(certificates)
}

/// The CRLs of a PEM text, as far as they can be read: 32 at most.
#[must_use]
pub fn crls_from_pem(text: &[u8]) -> Vec<Vec<u8>> {
    let crls = CertificateRevocationListDer::pem_slice_iter(text).take(CERTIFICATES_MAX);
    crls.filter_map(|crl| Some(crl.ok()?.to_vec())).collect()
}

/// In our words: the reader's quote the line, which can be of any length and hold a secret that was
/// pasted there.
#[allow(clippy::wildcard_enum_match_arm, reason = "the reader's enum, not ours, and open")]
fn damaged(error: &pem_reader::Error) -> PemError {
    let why = match error {
        pem_reader::Error::MissingSectionEnd { .. } => "a section has no end",
        pem_reader::Error::IllegalSectionStart { .. } => "a section's first line is damaged",
        pem_reader::Error::Base64Decode(_) => "a section is not base64",
        _ => "it cannot be read",
    };
    PemError::Damaged(why.to_owned())
}

impl v1::CertificateChain {
    /// Leaf first, then its issuers: the order TLS sends and Ray reads.
    #[must_use]
    pub fn certificates(&self) -> Vec<CertificateDer<'static>> {
        std::iter::once(&self.leaf_der)
            .chain(&self.issuers_der)
            .map(|der| CertificateDer::from(der.clone()))
            .collect()
    }

    /// The same as a PEM text.
    #[must_use]
    pub fn to_pem(&self) -> String {
        certificates_to_pem(&self.certificates())
    }
}
