//! Private keys of this node: P-256, PKCS#8 in PEM, and the request for a certificate. A request
//! has an empty subject and asks for nothing: only its public key counts.

use std::{io::Read, path::Path};

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData};
use thiserror::Error;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::statedir::open_file;

/// Longest key file, in bytes; a real one has about 240, an identity with its chain about 2,500.
const KEY_FILE_LEN_MAX: usize = 64 * 1024;

/// Why there is no key.
#[derive(Debug, Error)]
pub enum KeyError {
    /// Cannot be read.
    #[error("cannot read the key {path}: {error}")]
    Read {
        /// The file.
        path: String,
        /// What the system says.
        error: std::io::Error,
    },
    /// No P-256 key in PEM. Says nothing of the content.
    #[error("{0} holds no P-256 private key in PEM form")]
    Damaged(String),
    /// The crypto library failed.
    #[error("cannot make a key or a request for it: {0}")]
    Library(#[from] rcgen::Error),
}

/// A P-256 private key. Prints nothing of itself; its encoding is wiped when it is dropped, and the
/// crypto library wipes what it frees.
pub struct PrivateKey(KeyPair);

impl Drop for PrivateKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl ZeroizeOnDrop for PrivateKey {}

impl PrivateKey {
    /// A new key.
    ///
    /// # Errors
    /// The crypto library's.
    pub fn generate() -> Result<Self, KeyError> {
        Ok(Self(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?))
    }

    /// The key in a PEM file, which may hold certificates too.
    ///
    /// # Errors
    /// Not there, not readable, or no key in it.
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        // As large as it may get: a buffer that grows leaves copies behind.
        let mut text = Zeroizing::new(String::with_capacity(KEY_FILE_LEN_MAX + 1));
        open_file(path)
            .and_then(|file| file.take(KEY_FILE_LEN_MAX as u64).read_to_string(&mut text))
            .map_err(|error| KeyError::Read { path: path.display().to_string(), error })?;
        Self::from_pem(&text).ok_or_else(|| KeyError::Damaged(path.display().to_string()))
    }

    /// The key in a PEM text.
    pub(crate) fn from_pem(text: &str) -> Option<Self> {
        use rustls::pki_types::{PrivateKeyDer, pem::PemObject};
        let der = PrivateKeyDer::from_pem_slice(text.as_bytes()).ok()?;
        KeyPair::from_der_and_sign_algo(&der, &PKCS_ECDSA_P256_SHA256).ok().map(Self)
    }

    /// PKCS#8 in PEM; wiped when dropped.
    #[must_use]
    pub fn to_pem(&self) -> Zeroizing<String> {
        Zeroizing::new(self.0.serialize_pem())
    }

    /// PKCS#8 in DER, for rustls.
    pub(crate) fn to_der(&self) -> rustls::pki_types::PrivateKeyDer<'static> {
        rustls::pki_types::PrivatePkcs8KeyDer::from(self.0.serialize_der()).into()
    }

    /// SubjectPublicKeyInfo in DER.
    #[must_use]
    pub fn spki_der(&self) -> Vec<u8> {
        self.0.subject_public_key_info()
    }

    /// A PKCS#10 request for this key that asks for nothing.
    ///
    /// # Errors
    /// The crypto library's.
    pub fn csr_der(&self) -> Result<Vec<u8>, KeyError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        Ok(params.serialize_request(&self.0)?.der().to_vec())
    }
}

impl std::fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PrivateKey(..)")
    }
}

#[cfg(test)]
mod tests {
    use x509_parser::prelude::{FromDer, X509CertificationRequest};

    use super::*;

    #[test]
    fn a_request_asks_for_nothing_and_is_signed() {
        let key = PrivateKey::generate().unwrap();
        let der = key.csr_der().unwrap();
        let (rest, csr) = X509CertificationRequest::from_der(&der).unwrap();
        assert!(rest.is_empty());
        let info = &csr.certification_request_info;
        assert_eq!(info.subject.as_raw(), [0x30, 0x00]);
        assert!(csr.requested_extensions().is_none());
        assert_eq!(info.subject_pki.raw, key.spki_der());
        csr.verify_signature().unwrap();
    }

    #[test]
    fn a_key_round_trips_through_pem() {
        let key = PrivateKey::generate().unwrap();
        let back = PrivateKey::from_pem(&key.to_pem()).unwrap();
        assert_eq!(back.spki_der(), key.spki_der());
        assert!(PrivateKey::from_pem("-----BEGIN PRIVATE KEY-----\n").is_none());
    }
}
