//! The agent's own folder (0700): its identity, the keys that wait for a certificate, what enrolment
//! bound to the node and what the CA said last. Nothing of it is for Ray.
//!
//! | file | holds |
//! |---|---|
//! | `identity.pem` | identity key and chain, one file, so that the pair cannot mismatch |
//! | `enroll.key`, `renew.key` | a key made before it was sent; the next try uses it again |
//! | `node.toml` | names, addresses, endpoints, control roots |
//! | `sync.pb` | the last settings, members, blocks, trust bundle and control CRL |
//! | `checkpoint.pb` | the newest signed checkpoint of the CA's audit log |
//! | `isolation.json` | whether a table was loaded and enforced, where the CA was |
//! | `status.json` | what the daemon last said of itself; no secret |
//! | `lock` | held by the one daemon or enrolment at work |

use std::{
    fs::File,
    io::{self, Read},
    net::SocketAddr,
    path::{Path, PathBuf},
};

use prost::Message as _;
use raymtls_proto::{
    bundle, checkpoint,
    durable::{self, Access},
    leaf::LeafFacts,
    serial::Serial,
    v1,
};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use time::OffsetDateTime;
use zeroize::Zeroizing;

use crate::keys::{KeyError, PrivateKey};
pub use crate::{memory::Memory, nodefile::NodeFile};

/// Identity key and chain.
pub(crate) const IDENTITY: &str = "identity.pem";

/// All files of the folder that are replaced.
const FILES: [&str; 8] = [
    IDENTITY,
    "enroll.key",
    "renew.key",
    "node.toml",
    "sync.pb",
    CHECKPOINT,
    "isolation.json",
    "status.json",
];
const CHECKPOINT: &str = "checkpoint.pb";

/// Longest file read back, in bytes: a bundle may hold many CRLs.
const FILE_LEN_MAX: u64 = 16 * 1024 * 1024;

/// What is wrong with the state folder.
#[derive(Debug, Error)]
pub enum StateError {
    /// The system says no.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// A key cannot be read or made.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// Somebody else holds the lock.
    #[error(
        "another node-agent works on {0}: stop it first (`systemctl stop node-agent`), \
         or give another --state-dir"
    )]
    Locked(String),
    /// No enrolment there.
    #[error("{0} holds no enrolment: run `node-agent enroll` first")]
    NotEnrolled(String),
    /// A file is not what it should be.
    #[error("{path} is damaged: {why}")]
    Damaged {
        /// The file.
        path: String,
        /// What is wrong with it.
        why: String,
    },
    /// Others may write or read it.
    #[error("{path} {why}")]
    Exposed {
        /// The folder.
        path: String,
        /// What is wrong with its owner or mode.
        why: String,
    },
}

/// An agent identity: its key and its chain.
#[derive(Debug)]
pub struct Identity {
    /// The key.
    pub key: PrivateKey,
    /// Leaf and issuers.
    pub chain: v1::CertificateChain,
    /// What the leaf says.
    pub facts: LeafFacts,
}

impl Identity {
    /// Puts a key and a chain together.
    ///
    /// # Errors
    /// The chain's leaf is unreadable or is for another key.
    pub fn new(key: PrivateKey, chain: v1::CertificateChain) -> Result<Self, String> {
        let facts = LeafFacts::parse(&chain.leaf_der).map_err(|e| e.to_string())?;
        if facts.spki_der != key.spki_der() {
            return Err("key and certificate do not belong together".to_owned());
        }
        Ok(Self { key, chain, facts })
    }

    /// Its serial number.
    #[must_use]
    pub fn serial(&self) -> Serial {
        self.facts.serial
    }

    fn to_pem(&self) -> Zeroizing<String> {
        let mut text = Zeroizing::new(String::with_capacity(4096));
        text.push_str(&self.key.to_pem());
        text.push_str(&self.chain.to_pem());
        text
    }
}

/// The agent's own folder.
#[derive(Clone, Debug)]
pub struct StateDir(PathBuf);

/// Held while a daemon or an enrolment works on the folder; released with the process.
#[derive(Debug)]
pub struct StateLock(File);

/// Closing alone is not enough: a child that another thread is about to start has a copy of the
/// descriptor until its program runs, and the lock would last as long.
impl Drop for StateLock {
    fn drop(&mut self) {
        let _ = rustix::fs::flock(&self.0, FlockOperation::Unlock);
    }
}

impl StateDir {
    /// Makes the folder if it is missing, and refuses one that others can enter.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn prepare(path: &Path) -> Result<Self, StateError> {
        let path = std::path::absolute(path)?;
        if let Some(parent) = path.parent() {
            durable::make_parents(parent)?;
        }
        durable::make_folder(&path, Access { mode: 0o700, uid: None, gid: None })?;
        Self::open(&path)
    }

    /// A folder that is there.
    ///
    /// # Errors
    /// Not there, or others can enter it.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        // Without a slash at the end, which would follow a symbolic link.
        let path: PathBuf = std::path::absolute(path)?.components().collect();
        let metadata = match std::fs::symlink_metadata(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(StateError::NotEnrolled(path.display().to_string()));
            }
            other => other.map_err(|e| naming(&path, &e))?,
        };
        let exposed = |why: &str| StateError::Exposed {
            path: path.display().to_string(),
            why: why.to_owned(),
        };
        use std::os::unix::fs::MetadataExt;
        if let Some(why) = fault_of_parent(&path)? {
            return Err(exposed(&why));
        }
        if metadata.is_symlink() {
            return Err(exposed("is a symbolic link: name the folder itself with --state-dir"));
        }
        if metadata.uid() != rustix::process::geteuid().as_raw() {
            return Err(exposed("belongs to another user: run the agent as its owner"));
        }
        if metadata.mode() & 0o077 != 0 {
            return Err(exposed(
                "may be entered by others and holds the identity key: run `chmod 700` on it",
            ));
        }
        Ok(Self(path))
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Takes the lock, or says that somebody has it.
    ///
    /// # Errors
    /// [`StateError::Locked`].
    pub fn lock(&self) -> Result<StateLock, StateError> {
        use std::os::unix::fs::OpenOptionsExt;
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(self.0.join("lock"))
            .map_err(|e| naming(&self.0, &e))?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(StateLock(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                Err(StateError::Locked(self.0.display().to_string()))
            }
            Err(e) => Err(naming(&self.0, &e.into()).into()),
        }
    }

    /// Removes what a crash left half written.
    ///
    /// # Errors
    /// The system's.
    pub fn sweep(&self) -> Result<(), StateError> {
        Ok(sweep_temporaries(&self.0, &FILES)?)
    }

    /// What enrolment bound to the node; `None` before it.
    ///
    /// # Errors
    /// Damage.
    pub fn node(&self) -> Result<Option<NodeFile>, StateError> {
        let path = self.0.join("node.toml");
        let Some(text) = read_if_there(&path)? else { return Ok(None) };
        let text = String::from_utf8_lossy(&text).into_owned();
        NodeFile::parse(&text).map(Some).map_err(|why| damaged(&path, why))
    }

    /// Keeps what enrolment bound to the node.
    ///
    /// # Errors
    /// The system's.
    pub fn put_node(&self, node: &NodeFile) -> Result<(), StateError> {
        Ok(durable::replace(&self.0.join("node.toml"), node.to_text().as_bytes(), Access::PRIVATE)?)
    }

    /// The identity; `None` before enrolment.
    ///
    /// # Errors
    /// Damage.
    pub fn identity(&self) -> Result<Option<Identity>, StateError> {
        let path = self.0.join(IDENTITY);
        let Some(text) = read_if_there(&path)?.map(Zeroizing::new) else { return Ok(None) };
        let text = Zeroizing::new(
            std::str::from_utf8(&text).map_err(|_| damaged(&path, "not text"))?.to_owned(),
        );
        let key = PrivateKey::from_pem(&text).ok_or_else(|| damaged(&path, "no key in it"))?;
        let mut certificates = bundle::certificates_from_pem(text.as_bytes())
            .map_err(|e| damaged(&path, e))?
            .into_iter()
            .map(|der| der.to_vec());
        let chain = v1::CertificateChain {
            leaf_der: certificates.next().ok_or_else(|| damaged(&path, "no certificate"))?,
            issuers_der: certificates.collect(),
        };
        Identity::new(key, chain).map(Some).map_err(|why| damaged(&path, why))
    }

    /// Replaces the identity, key and chain at once, and drops the keys that waited for it.
    ///
    /// # Errors
    /// The system's.
    pub fn put_identity(&self, identity: &Identity) -> Result<(), StateError> {
        let path = self.0.join(IDENTITY);
        durable::replace(&path, identity.to_pem().as_bytes(), Access::PRIVATE)?;
        self.drop_waiting(&identity.key.spki_der())
    }

    /// The key that waits for its certificate, made and on the disk before this returns. A damaged one
    /// is set aside: it costs a try, not the node.
    ///
    /// # Errors
    /// The system's.
    pub fn waiting_key(&self, purpose: WaitingKey) -> Result<PrivateKey, StateError> {
        let path = self.0.join(purpose.file());
        if let Some(key) = load_waiting(&path)? {
            return Ok(key);
        }
        let key = PrivateKey::generate()?;
        durable::create(&path, key.to_pem().as_bytes(), Access::PRIVATE)?;
        Ok(key)
    }

    /// Whether a key waits for its certificate.
    #[must_use]
    pub fn has_waiting_key(&self, purpose: WaitingKey) -> bool {
        self.0.join(purpose.file()).exists()
    }

    /// Drops waiting keys that became this identity.
    ///
    /// # Errors
    /// The system's.
    pub fn drop_waiting(&self, spki_der: &[u8]) -> Result<(), StateError> {
        for purpose in [WaitingKey::Enrolment, WaitingKey::Renewal] {
            let path = self.0.join(purpose.file());
            if load_waiting(&path)?.is_some_and(|key| key.spki_der() == spki_der) {
                std::fs::remove_file(&path)?;
            }
        }
        Ok(durable::sync_folder(&self.0)?)
    }

    /// What the CA said last, as far as it can be read.
    #[must_use]
    pub fn memory(&self) -> Memory {
        let bytes = read_if_there(&self.0.join("sync.pb")).ok().flatten().unwrap_or_default();
        Memory::decode(&bytes)
    }

    /// Keeps what the CA said.
    ///
    /// # Errors
    /// The system's.
    pub fn put_memory(&self, memory: &Memory) -> Result<(), StateError> {
        Ok(durable::replace(&self.0.join("sync.pb"), &memory.encode(), Access::PRIVATE)?)
    }

    /// The newest checkpoint of the CA's audit log that was seen. A damaged one is none: the next Sync
    /// brings another.
    #[must_use]
    pub fn checkpoint(&self) -> Option<v1::Checkpoint> {
        let bytes = read_if_there(&self.0.join(CHECKPOINT)).ok().flatten()?;
        v1::Checkpoint::decode(bytes.as_slice()).ok().filter(checkpoint::has_form)
    }

    /// Keeps a checkpoint.
    ///
    /// # Errors
    /// The system's.
    pub fn put_checkpoint(&self, checkpoint: &v1::Checkpoint) -> Result<(), StateError> {
        let bytes = checkpoint.encode_to_vec();
        Ok(durable::replace(&self.0.join(CHECKPOINT), &bytes, Access::PRIVATE)?)
    }

    /// What isolation did on this host; damaged or missing, nothing is known of it.
    #[must_use]
    pub fn isolation(&self) -> IsolationRecord {
        let bytes = read_if_there(&self.0.join("isolation.json")).ok().flatten();
        bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
    }

    /// Keeps what isolation did.
    ///
    /// # Errors
    /// The system's.
    pub fn put_isolation(&self, record: &IsolationRecord) -> Result<(), StateError> {
        let text = serde_json::to_vec(record).expect("a record is valid JSON");
        Ok(durable::replace(&self.0.join("isolation.json"), &text, Access::PRIVATE)?)
    }

    /// Where the daemon's status stands when the daemon is gone.
    #[must_use]
    pub fn status_path(&self) -> PathBuf {
        self.0.join("status.json")
    }
}

/// What isolation did on this host, kept across restarts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct IsolationRecord {
    /// The cluster it is about.
    pub cluster: String,
    /// The CA was reached through a table that drops: no later load opens the door.
    pub enforced: bool,
    /// This agent loaded the cluster's table, and did not remove it.
    pub table: bool,
    /// Where a connection of ours ended at the CA, the last first.
    pub reached: Vec<SocketAddr>,
}

/// What a key waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitingKey {
    /// The first identity.
    Enrolment,
    /// The next identity.
    Renewal,
}

impl WaitingKey {
    fn file(self) -> &'static str {
        match self {
            Self::Enrolment => "enroll.key",
            Self::Renewal => "renew.key",
        }
    }
}

/// When the CA issued a certificate: the serial says it to the millisecond, notBefore is backdated.
#[must_use]
pub fn issued_at(facts: &LeafFacts) -> OffsetDateTime {
    let nanoseconds = i128::from(facts.serial.unix_ms()) * 1_000_000;
    OffsetDateTime::from_unix_timestamp_nanos(nanoseconds)
        .ok()
        .filter(|issued| (facts.not_before..facts.not_after).contains(issued))
        .unwrap_or(facts.not_before)
}

/// A key that waits for its certificate, if there is one that can be read.
fn load_waiting(path: &Path) -> Result<Option<PrivateKey>, StateError> {
    match PrivateKey::load(path) {
        Ok(key) => Ok(Some(key)),
        Err(KeyError::Read { error, .. }) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(KeyError::Read { error, .. }) if error.kind() == io::ErrorKind::InvalidData => {
            set_aside(path)
        }
        Err(KeyError::Damaged(_)) => set_aside(path),
        Err(error @ (KeyError::Read { .. } | KeyError::Library(_))) => Err(error.into()),
    }
}

fn set_aside(path: &Path) -> Result<Option<PrivateKey>, StateError> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".damaged");
    std::fs::rename(path, &aside).map_err(|e| naming(path, &e))?;
    tracing::warn!(
        key = %path.display(), set_aside = %Path::new(&aside).display(),
        "a key that waited for its certificate is damaged: another is made"
    );
    Ok(None)
}

/// Removes the `.NAME.tmp` that a crash left of these files, and nothing else: the folder may be one
/// that somebody named by mistake.
pub(crate) fn sweep_temporaries(folder: &Path, names: &[&str]) -> io::Result<()> {
    for name in names {
        let path = folder.join(format!(".{name}.tmp"));
        match std::fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => std::fs::remove_file(&path).map_err(|e| naming(&path, &e))?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(naming(&path, &e)),
        }
    }
    Ok(())
}

/// What is wrong with the folder that `path` lies in: whoever writes there can put another folder in
/// the place of `path`.
pub(crate) fn fault_of_parent(path: &Path) -> io::Result<Option<String>> {
    use std::os::unix::fs::MetadataExt;
    let Some(parent) = path.parent() else { return Ok(None) };
    let metadata = std::fs::metadata(parent).map_err(|e| naming(parent, &e))?;
    let (owner, mode) = (metadata.uid(), metadata.mode());
    let named = parent.display();
    if owner != 0 && owner != rustix::process::geteuid().as_raw() {
        return Ok(Some(format!(
            "lies in {named}, which belongs to uid {owner}, who can put another folder in its \
             place: name one that lies in a folder of root or of the agent's user"
        )));
    }
    let sticky = mode & 0o1000 != 0;
    Ok((mode & 0o022 != 0 && !sticky).then(|| {
        format!(
            "lies in {named}, where others may write and put another folder in its place: run \
             `chmod go-w {named}`, or name one that lies elsewhere"
        )
    }))
}

/// A bounded read; `None` where there is no file.
pub(crate) fn read_if_there(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match open_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|e| naming(path, &e))?,
    };
    let mut content = Vec::new();
    file.take(FILE_LEN_MAX).read_to_end(&mut content).map_err(|e| naming(path, &e))?;
    Ok(Some(content))
}

/// Opens a regular file; a pipe in its place would make the reader wait for ever.
pub(crate) fn open_file(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    if file.metadata()?.is_file() {
        return Ok(file);
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "not a file: remove what lies there"))
}

fn naming(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

fn damaged(path: &Path, why: impl ToString) -> StateError {
    StateError::Damaged { path: path.display().to_string(), why: why.to_string() }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn state() -> (tempfile::TempDir, StateDir) {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::prepare(&folder.path().join("state")).unwrap();
        (folder, state)
    }

    #[test]
    fn only_our_own_temporaries_are_swept() {
        let (_folder, state) = state();
        for name in [".sync.pb.tmp", ".backup.tmp", ".node.toml.tmp.old"] {
            durable::create(&state.path().join(name), b"x", Access::PRIVATE).unwrap();
        }
        std::fs::create_dir(state.path().join(".node.toml.tmp")).unwrap();
        state.sweep().unwrap();
        assert!(!state.path().join(".sync.pb.tmp").exists());
        for kept in [".backup.tmp", ".node.toml.tmp.old", ".node.toml.tmp"] {
            assert!(state.path().join(kept).exists(), "{kept}");
        }
    }

    #[test]
    fn a_lock_that_is_dropped_is_free_though_a_child_has_its_descriptor() {
        let (_folder, state) = state();
        let lock = state.lock().unwrap();
        // What a child has between its fork and its program.
        let inherited = lock.0.try_clone().unwrap();
        assert!(matches!(state.lock(), Err(StateError::Locked(_))));
        drop(lock);
        state.lock().unwrap();
        drop(inherited);
    }

    #[test]
    fn a_folder_others_can_replace_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        for (mode, good) in [(0o755, true), (0o1777, true), (0o777, false), (0o775, false)] {
            std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(mode)).unwrap();
            let prepared = StateDir::prepare(&folder.path().join("state"));
            assert_eq!(prepared.is_ok(), good, "{mode:o}: {prepared:?}");
        }
    }

    #[test]
    fn a_damaged_waiting_key_is_set_aside_and_made_anew() {
        for content in [&b"no key"[..], b"", b"\xff\xfe"] {
            let (_folder, state) = state();
            let path = state.path().join("renew.key");
            durable::create(&path, content, Access::PRIVATE).unwrap();
            state.drop_waiting(b"some key").unwrap();
            assert!(!path.exists());
            durable::create(&path, content, Access::PRIVATE).unwrap();
            let key = state.waiting_key(WaitingKey::Renewal).unwrap();
            let again = state.waiting_key(WaitingKey::Renewal).unwrap();
            assert_eq!(again.spki_der(), key.spki_der());
            assert_eq!(std::fs::read(state.path().join("renew.key.damaged")).unwrap(), content);
        }
    }
}
