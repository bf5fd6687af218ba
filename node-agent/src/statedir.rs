//! The agent's own folder (0700): its identity, the keys that wait for a certificate, what enrolment
//! bound to the node and what the CA said last. Nothing of it is for Ray.
//!
//! | file | holds |
//! |---|---|
//! | `identity.pem` | identity key and chain, one file, so that the pair cannot mismatch |
//! | `enroll.key`, `renew.key` | a key made before it was sent; the next try uses it again |
//! | `node.toml` | names, addresses, endpoints, control roots |
//! | `sync.pb` | the last settings, trust bundle and control CRL |
//! | `status.json` | what the daemon last said of itself; no secret |
//! | `lock` | held by the one daemon or enrolment at work |

use std::{
    fs::File,
    io::{self, Read},
    net::IpAddr,
    path::{Path, PathBuf},
};

use prost::Message;
use raymtls_proto::{
    bundle,
    durable::{self, Access},
    identity::{ClusterId, NodeName, Role, Subject, TrustDomain},
    leaf::LeafFacts,
    serial::Serial,
    v1,
};
use rustix::fs::FlockOperation;
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use time::OffsetDateTime;
use zeroize::Zeroizing;

pub(crate) use raymtls_proto::durable::make_parents;

use crate::keys::{KeyError, PrivateKey};

/// Format of `node.toml` this code writes.
const FORMAT: u32 = 1;
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

/// What enrolment bound to this node, and how to reach the CA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeFile {
    /// The deployment.
    pub trust_domain: TrustDomain,
    /// The cluster.
    pub cluster: ClusterId,
    /// This node.
    pub node: NodeName,
    /// What it is for.
    pub role: Role,
    /// Addresses the CA bound to it.
    pub addresses: Vec<IpAddr>,
    /// DNS names the CA bound to it.
    pub dns_names: Vec<String>,
    /// `host:port` of the CA's node listeners, tried in order.
    pub node_endpoints: Vec<String>,
    /// What the CA's certificate must chain to.
    pub control_roots: Vec<CertificateDer<'static>>,
    /// Group that may read the Ray leaf key, as given at enrolment.
    pub ray_gid: Option<u32>,
}

#[derive(Serialize, Deserialize)]
struct NodeText {
    format: u32,
    trust_domain: TrustDomain,
    cluster: ClusterId,
    node: NodeName,
    role: Role,
    addresses: Vec<IpAddr>,
    dns_names: Vec<String>,
    node_endpoints: Vec<String>,
    ray_gid: Option<u32>,
    // Last: a file cut short does not parse.
    control_roots: String,
}

impl NodeFile {
    /// Who the identity speaks for.
    #[must_use]
    pub fn agent(&self) -> Subject {
        Subject::Agent(self.cluster.clone(), self.node.clone())
    }

    /// Who the Ray leaf speaks for.
    #[must_use]
    pub fn ray(&self) -> Subject {
        match self.role {
            Role::Head | Role::Worker => Subject::RayNode(self.cluster.clone(), self.node.clone()),
            Role::Driver => Subject::RayDriver(self.cluster.clone(), self.node.clone()),
        }
    }

    /// DNS names its Ray leaf has: a driver's has none.
    #[must_use]
    pub fn leaf_dns_names(&self) -> &[String] {
        match self.role {
            Role::Head | Role::Worker => &self.dns_names,
            Role::Driver => &[],
        }
    }

    /// What its Ray leaf is for.
    #[must_use]
    pub fn purpose(&self) -> v1::LeafPurpose {
        match self.role {
            Role::Head | Role::Worker => v1::LeafPurpose::Node,
            Role::Driver => v1::LeafPurpose::Driver,
        }
    }

    fn to_text(&self) -> String {
        let text = NodeText {
            format: FORMAT,
            trust_domain: self.trust_domain.clone(),
            cluster: self.cluster.clone(),
            node: self.node.clone(),
            role: self.role,
            addresses: self.addresses.clone(),
            dns_names: self.dns_names.clone(),
            node_endpoints: self.node_endpoints.clone(),
            ray_gid: self.ray_gid,
            control_roots: bundle::certificates_to_pem(&self.control_roots),
        };
        toml::to_string(&text).expect("names, addresses and strings are valid TOML")
    }

    fn parse(text: &str) -> Result<Self, String> {
        let text: NodeText = toml::from_str(text).map_err(|e| e.message().to_owned())?;
        if text.format != FORMAT {
            return Err(format!("format {}, this program reads format {FORMAT}", text.format));
        }
        Ok(Self {
            trust_domain: text.trust_domain,
            cluster: text.cluster,
            node: text.node,
            role: text.role,
            addresses: text.addresses,
            dns_names: text.dns_names,
            node_endpoints: text.node_endpoints,
            ray_gid: text.ray_gid,
            control_roots: bundle::certificates_from_pem(text.control_roots.as_bytes())
                .map_err(|e| e.to_string())?,
        })
    }
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
pub struct StateLock(#[allow(dead_code, reason = "held, not read")] File);

impl StateDir {
    /// Makes the folder if it is missing, and refuses one that others can enter.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn prepare(path: &Path) -> Result<Self, StateError> {
        let path = std::path::absolute(path)?;
        if let Some(parent) = path.parent() {
            make_parents(parent)?;
        }
        durable::make_folder(&path, Access { mode: 0o700, uid: None, gid: None })?;
        Self::open(&path)
    }

    /// A folder that is there.
    ///
    /// # Errors
    /// Not there, or others can enter it.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        let path = std::path::absolute(path)?;
        let metadata = match std::fs::metadata(&path) {
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
        sweep_temporaries(&self.0)?;
        Ok(())
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
        let path = self.0.join("identity.pem");
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
        let path = self.0.join("identity.pem");
        durable::replace(&path, identity.to_pem().as_bytes(), Access::PRIVATE)?;
        self.drop_waiting(&identity.key.spki_der())
    }

    /// The key that waits for its certificate, made and on the disk before this returns.
    ///
    /// # Errors
    /// The system's, or damage.
    pub fn waiting_key(&self, purpose: WaitingKey) -> Result<PrivateKey, StateError> {
        let path = self.0.join(purpose.file());
        if path.exists() {
            return Ok(PrivateKey::load(&path)?);
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
    /// The system's, or damage.
    pub fn drop_waiting(&self, spki_der: &[u8]) -> Result<(), StateError> {
        for purpose in [WaitingKey::Enrolment, WaitingKey::Renewal] {
            let path = self.0.join(purpose.file());
            if path.exists() && PrivateKey::load(&path)?.spki_der() == spki_der {
                std::fs::remove_file(&path)?;
            }
        }
        Ok(durable::sync_folder(&self.0)?)
    }

    /// What the CA said last. Unreadable memory is no memory: the CA is asked for everything again.
    #[must_use]
    pub fn memory(&self) -> Memory {
        read_if_there(&self.0.join("sync.pb"))
            .ok()
            .flatten()
            .and_then(|bytes| v1::SyncResponse::decode(bytes.as_slice()).ok())
            .map(Memory)
            .unwrap_or_default()
    }

    /// Keeps what the CA said.
    ///
    /// # Errors
    /// The system's.
    pub fn put_memory(&self, memory: &Memory) -> Result<(), StateError> {
        let bytes = memory.0.encode_to_vec();
        Ok(durable::replace(&self.0.join("sync.pb"), &bytes, Access::PRIVATE)?)
    }

    /// Where the daemon's status stands when the daemon is gone.
    #[must_use]
    pub fn status_path(&self) -> PathBuf {
        self.0.join("status.json")
    }
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

/// The last answer of the CA in each of its parts, without the Ray token, which lies in the TLS
/// folder for Ray to read.
#[derive(Clone, Default)]
pub struct Memory(v1::SyncResponse);

impl Memory {
    /// The version all parts are of.
    #[must_use]
    pub fn version(&self) -> Option<v1::SyncVersion> {
        self.0.version
    }

    /// The cluster's settings.
    #[must_use]
    pub fn settings(&self) -> Option<&v1::Settings> {
        self.0.settings.as_ref()
    }

    /// What Ray must trust.
    #[must_use]
    pub fn bundle(&self) -> Option<&v1::TrustBundle> {
        self.0.bundle.as_ref()
    }

    /// What the CA revoked of its own certificates.
    #[must_use]
    pub fn control_crls(&self) -> &[Vec<u8>] {
        self.0.control_crl.as_ref().map_or(&[], |crl| &crl.crls_der)
    }

    /// Takes over the parts an answer has.
    pub fn merge(&mut self, answer: &v1::SyncResponse) {
        let known = &mut self.0;
        known.version = answer.version.or(known.version);
        known.settings = answer.settings.clone().or_else(|| known.settings.take());
        known.bundle = answer.bundle.clone().or_else(|| known.bundle.take());
        known.control_crl = answer.control_crl.clone().or_else(|| known.control_crl.take());
        known.server_time_unix = answer.server_time_unix;
    }

    /// Takes over settings and bundle that came with another answer.
    pub fn learn(&mut self, settings: Option<v1::Settings>, bundle: Option<v1::TrustBundle>) {
        let known = &mut self.0;
        known.settings = settings.or_else(|| known.settings.take());
        known.bundle = bundle.or_else(|| known.bundle.take());
    }

    /// Makes the next Sync ask for everything.
    pub fn forget_version(&mut self) {
        self.0.version = None;
    }
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Memory({:?})", self.0.version)
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

/// Removes `.NAME.tmp` files of a folder.
pub(crate) fn sweep_temporaries(folder: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(folder).map_err(|e| naming(folder, &e))? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with('.') && name.ends_with(".tmp") && !entry.file_type()?.is_dir() {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// A bounded read; `None` where there is no file.
pub(crate) fn read_if_there(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|e| naming(path, &e))?,
    };
    let mut content = Vec::new();
    file.take(FILE_LEN_MAX).read_to_end(&mut content).map_err(|e| naming(path, &e))?;
    Ok(Some(content))
}

fn naming(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

fn damaged(path: &Path, why: impl ToString) -> StateError {
    StateError::Damaged { path: path.display().to_string(), why: why.to_string() }
}
