//! The leaf, key and roots that Ray starts with next: the files behind `current`. Read, not judged.

use std::path::Path;

use raymtls_proto::{bundle, leaf::LeafFacts, v1};
use rustls::pki_types::CertificateDer;

use crate::{keys::PrivateKey, statedir::read_if_there};

/// What lies in the current key folder.
#[derive(Debug)]
pub(crate) struct Own {
    pub(crate) chain: v1::CertificateChain,
    pub(crate) facts: LeafFacts,
    pub(crate) key: PrivateKey,
    pub(crate) roots: Vec<CertificateDer<'static>>,
}

/// Leaf and roots, which all may read.
#[derive(Clone, Debug)]
pub(crate) struct Public {
    pub(crate) chain: v1::CertificateChain,
    pub(crate) facts: LeafFacts,
    pub(crate) roots: Vec<CertificateDer<'static>>,
    /// Empty where they cannot be read.
    pub(crate) crls_der: Vec<Vec<u8>>,
}

impl Public {
    /// # Errors
    /// In words.
    pub(crate) fn load(tls_dir: &Path) -> Result<Self, String> {
        let folder = tls_dir.join("current");
        let mut certificates = read(&folder.join("tls.crt"))?.into_iter().map(|der| der.to_vec());
        let chain = v1::CertificateChain {
            leaf_der: certificates.next().unwrap_or_default(),
            issuers_der: certificates.collect(),
        };
        let facts = LeafFacts::parse(&chain.leaf_der)
            .map_err(|e| format!("{}: {e}", folder.join("tls.crt").display()))?;
        let crls = read_if_there(&folder.join("crl.pem")).ok().flatten().unwrap_or_default();
        let crls_der = bundle::crls_from_pem(&crls);
        Ok(Self { chain, facts, roots: read(&folder.join("ca.crt"))?, crls_der })
    }
}

impl Own {
    /// # Errors
    /// In words.
    pub(crate) fn load(tls_dir: &Path) -> Result<Self, String> {
        let Public { chain, facts, roots, .. } = Public::load(tls_dir)?;
        let key = tls_dir.join("current/tls.key");
        let key = PrivateKey::load(&key).map_err(|e| e.to_string())?;
        Ok(Self { chain, facts, key, roots })
    }
}

fn read(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let pem = read_if_there(path).map_err(|e| e.to_string())?;
    let pem = pem.ok_or_else(|| format!("there is no {}", path.display()))?;
    bundle::certificates_from_pem(&pem).map_err(|e| format!("{}: {e}", path.display()))
}
