//! `ca-server restore`: a backup into a data folder of its own. What comes out is in a state in which only
//! Sync is answered, under a new epoch, until an operator accepts it.

use std::{
    fs::File,
    io::{self, BufReader},
    path::{Path, PathBuf},
};

use prost::Message as _;
use raymtls_proto::{
    clock::Clock,
    durable::{self, Access},
};
use thiserror::Error;

use crate::{
    backup::{BackupError, Head, Reader},
    init,
    keys::{
        kek::{Kek, KekError},
        random,
    },
    store::{
        FORMAT, Store as _, StoreError,
        kv::KvStore,
        layout,
        records::{Header, RestoreRecord},
        sled::SledEngine,
        unix_ms,
        view::{Engine as _, Writes},
    },
    trusted_folder::{self, FolderFault},
};

/// Bytes of one commit while the backup is written back.
const COMMIT_BYTES: usize = 4 * 1024 * 1024;

/// Why nothing was restored.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// There is one.
    #[error("{0} holds a CA already: nothing was changed; name another folder with --dir")]
    Exists(PathBuf),
    /// The backup.
    #[error(transparent)]
    Backup(#[from] BackupError),
    /// Its file.
    #[error("{path}: {error}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// A newer release's.
    #[error("the backup is of store format {0}, this program reads format {FORMAT}: upgrade")]
    Format(u32),
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
}

/// What was restored.
#[derive(Debug)]
pub struct Restored {
    /// When the backup was made.
    pub made_ms: i64,
    /// The deployment.
    pub trust_domain: String,
    /// Pairs of the backup.
    pub pairs: u64,
    /// Records of its audit log, whose hashes were computed again.
    pub audit_records: u64,
}

/// Restores a backup into a folder that holds no CA. The store is put in place as a whole: after a crash
/// the same command does it again.
///
/// # Errors
/// See [`RestoreError`].
pub async fn restore(
    from: &Path,
    dir: &Path,
    kek_file: &Path,
    clock: &dyn Clock,
    progress: &mut dyn FnMut(u64),
) -> Result<Restored, RestoreError> {
    let store_dir = init::store_dir(dir);
    if store_dir.symlink_metadata().is_ok() {
        return Err(RestoreError::Exists(dir.to_owned()));
    }
    if dir.symlink_metadata().is_ok() {
        trusted_folder::judge(dir)?;
    }
    let kek = Kek::read(kek_file)?;
    let file =
        File::open(from).map_err(|error| RestoreError::File { path: from.to_owned(), error })?;
    let mut reader = Reader::open(&kek, BufReader::new(file))?;
    if reader.head.store_format != FORMAT {
        return Err(RestoreError::Format(reader.head.store_format));
    }
    dir.parent().map_or(Ok(()), durable::make_parents)?;
    durable::make_folder(dir, Access { mode: 0o700, ..Access::PRIVATE })?;
    let unfinished = dir.join("store.new");
    if unfinished.exists() {
        std::fs::remove_dir_all(&unfinished)?;
    }
    let pairs = write_back(&mut reader, &unfinished, progress)?;
    let head = reader.head;
    let now = clock.now();
    let store = KvStore::open(Box::new(SledEngine::open(&unfinished)?), now)?;
    let audit_records = store.verify_audit_chain().await?;
    let restore = RestoreRecord {
        epoch_before: head.epoch,
        backup_ms: head.made_ms,
        restored_ms: unix_ms(now),
        ..RestoreRecord::default()
    };
    let actor = format!("uid:{}", rustix::process::geteuid().as_raw());
    store.mark_restored(now, actor, restore).await?;
    store.close().await;
    drop(store);
    std::fs::rename(&unfinished, &store_dir)?;
    durable::sync_folder(dir)?;
    let Head { made_ms, trust_domain, .. } = head;
    Ok(Restored { made_ms, trust_domain, pairs, audit_records })
}

/// The pairs, in their order, and a new epoch behind them.
fn write_back(
    reader: &mut Reader<'_, impl io::Read>,
    folder: &Path,
    progress: &mut dyn FnMut(u64),
) -> Result<u64, RestoreError> {
    let mut engine = SledEngine::open(folder)?;
    let (mut writes, mut bytes, mut count) = (Writes::new(), 0, 0);
    while let Some(pairs) = reader.next_pairs()? {
        count += u64::try_from(pairs.len()).unwrap_or(0);
        for (key, value) in pairs {
            bytes += key.len() + value.as_ref().map_or(0, Vec::len);
            writes.insert(key, value);
        }
        if bytes >= COMMIT_BYTES {
            engine.commit(&std::mem::take(&mut writes))?;
            bytes = 0;
            progress(count);
        }
    }
    let header = Header { format: FORMAT, epoch: random::epoch() };
    writes.insert(layout::HEADER.to_vec(), Some(header.encode_to_vec()));
    engine.commit(&writes)?;
    Ok(count)
}
