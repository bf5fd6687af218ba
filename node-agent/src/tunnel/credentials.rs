//! What a key folder holds, ready for TLS: the own leaf and key, the cluster's roots and CRLs. It
//! reads the four files and refuses a set that does not belong together; the files are the agent's.

use std::{
    collections::HashSet,
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use raymtls_proto::{bundle, identity::Subject, leaf::LeafFacts, serial::Serial};
use rustls::{
    RootCertStore,
    pki_types::{CertificateRevocationListDer, pem::PemObject},
    sign::CertifiedKey,
};
use thiserror::Error;
use x509_parser::prelude::{CertificateRevocationList, FromDer};

use super::rules::{Rules, read_bounded};
use crate::keys::{KeyError, PrivateKey};

/// Largest file of a key folder, in bytes: CRLs grow.
const FILE_LEN_MAX: u64 = 8 * 1024 * 1024;
/// Most CRLs.
const CRLS_MAX: usize = 64;

/// Why a key folder cannot be used.
#[derive(Debug, Error)]
pub(super) enum CredentialsError {
    /// A file cannot be read.
    #[error("{path} cannot be read: {error}")]
    Io {
        /// The file.
        path: String,
        /// What the system says.
        error: std::io::Error,
    },
    /// A file holds something else.
    #[error("{path}: {why}")]
    Damaged {
        /// The file.
        path: String,
        /// What is wrong.
        why: String,
    },
    /// The key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The leaf is another node's.
    #[error("{path} names {found:?}; this node is {wanted}")]
    OtherNode {
        /// The file.
        path: String,
        /// What stands in it.
        found: Vec<String>,
        /// What should.
        wanted: String,
    },
}

/// A key folder's content.
pub(crate) struct Credentials {
    /// Leaf, issuer and key.
    pub(crate) own: Arc<CertifiedKey>,
    /// What the leaf says.
    pub(crate) facts: LeafFacts,
    /// What peers must chain to.
    pub(crate) roots: Arc<RootCertStore>,
    /// As the verifiers take them.
    pub(crate) crls: Vec<CertificateRevocationListDer<'static>>,
    /// What is on the CRLs.
    pub(crate) revoked: Revoked,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({})", hex::encode(self.facts.serial.as_bytes()))
    }
}

impl Credentials {
    /// Reads the key folder the rules name.
    ///
    /// # Errors
    /// See [`CredentialsError`].
    pub(crate) fn load(rules: &Rules) -> Result<Self, CredentialsError> {
        let file = |name: &str| rules.key_folder.join(name);
        let (chain_path, roots_path, crls_path) =
            (file("tls.crt"), file("ca.crt"), file("crl.pem"));
        let chain = certificates(&chain_path)?;
        let leaf = chain.first().ok_or_else(|| damaged(&chain_path, "no certificate in it"))?;
        let facts = LeafFacts::parse(leaf).map_err(|e| damaged(&chain_path, e))?;
        let subject = Subject::RayNode(rules.cluster.clone(), rules.node.clone());
        let wanted = subject.uri(&rules.trust_domain);
        if facts.uris != [wanted.clone()] {
            let (path, found) = (chain_path.display().to_string(), facts.uris);
            return Err(CredentialsError::OtherNode { path, found, wanted });
        }
        let key = PrivateKey::load(&file("tls.key"))?;
        if key.spki_der() != facts.spki_der {
            return Err(damaged(&chain_path, "it is for another key than tls.key"));
        }
        let signer = super::provider()
            .key_provider
            .load_private_key(key.to_der())
            .map_err(|e| damaged(&file("tls.key"), e))?;
        let crls = crls(&crls_path)?;
        Ok(Self {
            own: Arc::new(CertifiedKey::new(chain, signer)),
            facts,
            roots: Arc::new(roots(&roots_path)?),
            revoked: Revoked::of(&crls).map_err(|why| damaged(&crls_path, why))?,
            crls,
        })
    }
}

/// Issuer and serial of everything on the CRLs.
#[derive(Debug, Default)]
pub(crate) struct Revoked(HashSet<(Vec<u8>, Vec<u8>)>);

impl Revoked {
    fn of(crls: &[CertificateRevocationListDer<'_>]) -> Result<Self, &'static str> {
        let mut revoked = HashSet::new();
        for der in crls {
            let Ok((&[], crl)) = CertificateRevocationList::from_der(der) else {
                return Err("unreadable CRL");
            };
            let issuer = crl.issuer().as_raw();
            let serials = crl.iter_revoked_certificates().map(|entry| bare(entry.raw_serial()));
            revoked.extend(serials.map(|serial| (issuer.to_vec(), serial.to_vec())));
        }
        Ok(Self(revoked))
    }

    /// Whether this leaf is.
    pub(crate) fn has(&self, issuer_der: &[u8], serial: &Serial) -> bool {
        !self.0.is_empty()
            && self.0.contains(&(issuer_der.to_vec(), bare(serial.as_bytes()).to_vec()))
    }
}

/// Without zeros in front: DER adds one, a fixed width several.
fn bare(serial: &[u8]) -> &[u8] {
    let zeros = serial.iter().take_while(|byte| **byte == 0).count();
    &serial[zeros..]
}

fn certificates(
    path: &Path,
) -> Result<Vec<rustls::pki_types::CertificateDer<'static>>, CredentialsError> {
    bundle::certificates_from_pem(&read(path)?).map_err(|e| damaged(path, e))
}

fn roots(path: &Path) -> Result<RootCertStore, CredentialsError> {
    let mut store = RootCertStore::empty();
    for root in certificates(path)? {
        store.add(root).map_err(|e| damaged(path, e))?;
    }
    if store.is_empty() {
        return Err(damaged(path, "no root in it"));
    }
    Ok(store)
}

fn crls(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, CredentialsError> {
    let text = read(path)?;
    let mut crls = Vec::new();
    for crl in CertificateRevocationListDer::pem_slice_iter(&text) {
        crls.push(crl.map_err(|e| damaged(path, format!("{e:?}")))?);
        if crls.len() > CRLS_MAX {
            return Err(damaged(path, format!("more than {CRLS_MAX} CRLs in it")));
        }
    }
    Ok(crls)
}

fn read(path: &Path) -> Result<Vec<u8>, CredentialsError> {
    read_bounded(path, FILE_LEN_MAX)
        .map_err(|error| CredentialsError::Io { path: path.display().to_string(), error })
}

fn damaged(path: &Path, why: impl ToString) -> CredentialsError {
    CredentialsError::Damaged { path: path.display().to_string(), why: why.to_string() }
}

/// The files whose change means that there is something new to read.
pub(crate) fn files(rules_path: &Path, key_folder: &Path) -> Vec<PathBuf> {
    let of_folder = ["tls.key", "tls.crt", "ca.crt", "crl.pem"].map(|name| key_folder.join(name));
    std::iter::once(rules_path.to_path_buf()).chain(of_folder).collect()
}
