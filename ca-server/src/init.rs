//! `ca-server init`: a data folder with a control authority, and the key that wraps its keys.

use std::{
    io,
    path::{Path, PathBuf},
};

use raymtls_proto::{
    clock::Clock,
    durable::{self, Access},
    identity::TrustDomain,
};
use thiserror::Error;

use crate::{
    keys::{
        authority::{self, AuthorityError},
        kek::{Kek, KekError},
        profile::AGENT_IDENTITY_LIFE,
        random,
    },
    store::{Authority, Store, StoreError, kv::KvStore, records::ControlRecord, sled::SledEngine},
    trusted_folder::{self, FolderFault},
};

/// Why there is no new CA.
#[derive(Debug, Error)]
pub enum InitError {
    /// There is one.
    #[error("{0} holds a CA already: nothing was changed; start it with `ca-server serve`")]
    Exists(PathBuf),
    /// A folder.
    #[error(transparent)]
    Folder(#[from] io::Error),
    /// The data folder was there, and is not ours alone.
    #[error(transparent)]
    NotOurs(#[from] FolderFault),
    /// The key-encryption key.
    #[error(transparent)]
    Kek(#[from] KekError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The keys.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
}

/// What was made.
#[derive(Debug)]
pub struct Made {
    /// The key-encryption key was made, rather than found.
    pub kek_made: bool,
    /// Control root, DER.
    pub root_der: Vec<u8>,
}

/// Makes a CA in an empty folder. The data folder is put in place as a whole: after a crash the same
/// command does it again.
///
/// # Errors
/// See [`InitError`].
pub async fn init(
    dir: &Path,
    kek_file: &Path,
    trust_domain: &TrustDomain,
    clock: &dyn Clock,
) -> Result<Made, InitError> {
    if is_there(&store_dir(dir)) {
        return Err(InitError::Exists(dir.to_owned()));
    }
    if is_there(dir) {
        trusted_folder::judge(dir)?;
    }
    let now = clock.now();
    let kek_made = !kek_file.exists();
    let kek = if kek_made {
        kek_file.parent().map_or(Ok(()), durable::make_parents)?;
        Kek::create(kek_file)?
    } else {
        Kek::read(kek_file)?
    };
    dir.parent().map_or(Ok(()), durable::make_parents)?;
    durable::make_folder(dir, Access { mode: 0o700, ..Access::PRIVATE })?;
    let keys = authority::create(&kek, &Authority::Control, now, AGENT_IDENTITY_LIFE)?;
    let root_der = keys.root.certificate_der.clone();
    let control = ControlRecord {
        trust_domain: trust_domain.to_string(),
        root: Some(keys.root),
        issuers: vec![keys.issuer],
        revocations: 0,
    };
    let unfinished = dir.join("store.new");
    if unfinished.exists() {
        std::fs::remove_dir_all(&unfinished)?;
    }
    let store = KvStore::create(Box::new(SledEngine::open(&unfinished)?), now, random::epoch())?;
    store.initialize(now, control).await?;
    store.close().await;
    drop(store);
    std::fs::rename(&unfinished, store_dir(dir))?;
    durable::sync_folder(dir)?;
    Ok(Made { kek_made, root_der })
}

/// Where the store lies in the data folder.
#[must_use]
pub fn store_dir(dir: &Path) -> PathBuf {
    dir.join("store")
}

fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use raymtls_proto::clock::SystemClock;

    use super::*;

    #[tokio::test]
    async fn a_folder_that_others_can_write_gets_no_ca() {
        let folder = tempfile::tempdir().unwrap();
        let (dir, kek) = (folder.path().join("ca"), folder.path().join("kek"));
        std::fs::create_dir(&dir).unwrap();
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o777)).unwrap();
        let domain = "ray.example".parse().unwrap();
        let error = init(&dir, &kek, &domain, &SystemClock).await.unwrap_err();
        assert!(error.to_string().contains("may be written by others"), "{error}");
        assert!(!kek.exists() && !is_there(&store_dir(&dir)), "something was made");
    }
}
