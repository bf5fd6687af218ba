//! `ca-server export-key`: a CA's private key as a file that other programs read. The audit log has a
//! record of it before there is a file. It works on the data folder of a server that does not run: a
//! running one never gives a key away.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use raymtls_proto::{bundle, clock::Clock, durable};
use rustix::fs::OFlags;
use thiserror::Error;
use zeroize::Zeroizing;

use crate::{
    init,
    keys::{
        authority::{self, AuthorityError},
        kek::{Kek, KekError},
        signer::Signer,
    },
    store::{Authority, Store, StoreError, kv::KvStore, records::CaKey, sled::SledEngine},
};

/// Which key of an authority.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Which {
    /// The root's
    Root,
    /// The newest issuer's
    Issuer,
}

/// Why no key was written.
#[derive(Debug, Error)]
pub enum ExportError {
    /// No data folder.
    #[error("{0} holds no CA: name its data folder with --dir")]
    NoCa(PathBuf),
    /// Something is there.
    #[error("{0} is there already, and a key never replaces a file: name another with --out")]
    IsThere(PathBuf),
    /// The key-encryption key.
    #[error(transparent)]
    Kek(#[from] KekError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The key cannot be unwrapped.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The record is not whole.
    #[error("the record of authority {0} has no such key: run `ca-server check`")]
    Incomplete(Authority),
    /// There can be no such file.
    #[error("cannot write {path}: {error}; no key was written, and none is on record")]
    Open {
        /// Its path.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// The file.
    #[error(
        "the key was not written, though the audit log has a record of it: {path}: {error}{left}"
    )]
    Write {
        /// Its path.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
        /// What is to be done about the file, if it is there still.
        left: &'static str,
    },
}

/// Reads `control` or `cluster/NAME`, as an authority is written.
///
/// # Errors
/// It is neither.
pub fn authority(text: &str) -> Result<Authority, String> {
    match text.split_once('/') {
        None if text == "control" => Ok(Authority::Control),
        Some(("cluster", name)) => name.parse().map(Authority::Cluster).map_err(|e| format!("{e}")),
        None | Some(_) => Err("write control, or cluster/NAME".to_owned()),
    }
}

/// Writes a key with its certificate. Returns what the key is, in words.
///
/// # Errors
/// See [`ExportError`].
pub async fn export(
    dir: &Path,
    kek_file: &Path,
    authority: &Authority,
    which: Which,
    out: &Path,
    clock: &dyn Clock,
) -> Result<String, ExportError> {
    let store_dir = init::store_dir(dir);
    if !store_dir.join("db").exists() {
        return Err(ExportError::NoCa(dir.to_owned()));
    }
    let kek = Kek::read(kek_file)?;
    let now = clock.now();
    let store = KvStore::open(Box::new(SledEngine::open(&store_dir)?), now)?;
    let signer = signer(&store, &kek, authority, which).await?;
    let out = Out::open(out)?;
    let place = match which {
        Which::Root => "root",
        Which::Issuer => "issuer",
    };
    let subject = format!("{place} {} of {authority}", hex::encode(signer.key_id()));
    let actor = format!("uid:{}", rustix::process::getuid().as_raw());
    store.note_key_export(now, actor, authority.clone(), subject.clone()).await?;
    store.close().await;
    out.write(pem(&signer).as_bytes())?;
    Ok(subject)
}

/// The file under its own name from the start: a temporary or a second link would be another place a
/// key could stay, and not every file system has links. It is empty until the key is on record, and is
/// removed unless all of it was written.
struct Out {
    file: File,
    path: PathBuf,
    is_whole: bool,
}

impl Out {
    fn open(path: &Path) -> Result<Self, ExportError> {
        let opened = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
            .open(path);
        let path = path.to_owned();
        match opened {
            Ok(file) => Ok(Self { file, path, is_whole: false }),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(ExportError::IsThere(path)),
            Err(error) => Err(ExportError::Open { path, error }),
        }
    }

    fn write(mut self, content: &[u8]) -> Result<(), ExportError> {
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or_else(|| Path::new(".")).to_owned();
        let written = self
            .file
            .write_all(content)
            .and_then(|()| self.file.sync_all())
            .and_then(|()| durable::sync_folder(&folder));
        self.is_whole = written.is_ok();
        written.map_err(|error| ExportError::Write {
            left: if fs::remove_file(&self.path).is_ok() {
                ""
            } else {
                "; a part of the key may be in that file: remove it"
            },
            path: self.path.clone(),
            error,
        })
    }
}

impl Drop for Out {
    fn drop(&mut self) {
        if !self.is_whole {
            let _ = fs::remove_file(&self.path);
        }
    }
}

async fn signer(
    store: &KvStore,
    kek: &Kek,
    authority: &Authority,
    which: Which,
) -> Result<Signer, ExportError> {
    let incomplete = || ExportError::Incomplete(authority.clone());
    let (root, issuers): (Option<CaKey>, Vec<CaKey>) = match authority {
        Authority::Control => {
            let record = store.control().await?.ok_or_else(incomplete)?;
            (record.root, record.issuers)
        }
        Authority::Cluster(cluster) => {
            let record = store.cluster(cluster.clone()).await?;
            (record.root, record.issuers)
        }
    };
    let root = root.ok_or_else(incomplete)?;
    authority::check_signatures(authority, &root, &issuers)?;
    Ok(match which {
        Which::Root => authority::unwrap_root(kek, authority, &root)?,
        Which::Issuer => {
            let newest = issuers.first().ok_or_else(incomplete)?;
            authority::unwrap_issuer(kek, authority, &root, newest)?
        }
    })
}

/// The key, then its certificate.
fn pem(signer: &Signer) -> Zeroizing<String> {
    let key = Zeroizing::new(bundle::private_key_to_pem(signer.issuer().key().pkcs8()));
    Zeroizing::new([&key, &bundle::certificates_to_pem(&[signer.certificate_der()])[..]].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_written_whole_leaves_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key.pem");
        drop(Out::open(&path).unwrap());
        assert!(!path.exists());
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut out = Out::open(&path).unwrap();
        out.file = full;
        let failed = out.write(b"key").unwrap_err();
        assert!(matches!(failed, ExportError::Write { left: "", .. }), "{failed}");
        assert!(!path.exists());
        Out::open(&path).unwrap().write(b"key").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"key");
        assert!(matches!(Out::open(&path), Err(ExportError::IsThere(_))));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        let nowhere = Out::open(&folder.path().join("none/key.pem"));
        assert!(matches!(nowhere, Err(ExportError::Open { .. })));
    }

    #[test]
    fn an_authority_is_written_as_it_is_shown() {
        for text in ["control", "cluster/c1", "cluster/control"] {
            assert_eq!(authority(text).unwrap().to_string(), text);
        }
        for text in ["", "c1", "cluster/", "cluster/C1", "cluster/a/b", "control/"] {
            assert!(authority(text).is_err(), "{text:?}");
        }
    }
}
