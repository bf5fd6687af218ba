//! The TLS folder: one folder per Ray key. `k<N>/tls.key` never changes; `tls.crt`, `ca.crt` and
//! `crl.pem` are each replaced by one rename. So whatever opens certificate then key of one folder
//! gets a pair, at any moment. It writes what it is given: judging comes before, in `verify`.

use std::{
    io,
    path::{Path, PathBuf},
};

use raymtls_proto::{
    bundle,
    durable::{self, Access},
    leaf::LeafFacts,
    v1,
};
use thiserror::Error;

use crate::{
    keys::{KeyError, PrivateKey},
    rayenv::{self, RayEnv, RayEnvError, Told},
    statedir::{fault_of_parent, read_if_there, sweep_temporaries},
};

/// Most key folders at one time.
pub const FOLDERS_MAX: usize = 16;

const KEY: &str = "tls.key";
const LEAF: &str = "tls.crt";
const ROOTS: &str = "ca.crt";
const CRLS: &str = "crl.pem";
const CURRENT: &str = "current";
const ENV: &str = "ray.env";
const TOKEN: &str = "ray_token";
const ONCE_KEY: &str = ".enroll-once.key";
/// Files of a key folder.
const FOLDER_FILES: [&str; 4] = [KEY, LEAF, ROOTS, CRLS];
/// Files and links beside the key folders.
const FILES: [&str; 8] = [KEY, LEAF, ROOTS, CRLS, CURRENT, ENV, TOKEN, ONCE_KEY];
/// What a file system of its own begins with.
const LOST_AND_FOUND: &str = "lost+found";

/// What is wrong with the TLS folder.
#[derive(Debug, Error)]
pub enum KeyFolderError {
    /// The system says no.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The group cannot be given.
    #[error(
        "cannot give {path} to group {gid}: run the agent as root, or make its user a member of \
         that group"
    )]
    Group {
        /// The file.
        path: String,
        /// Ray's group.
        gid: u32,
    },
    /// A key cannot be read.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The folder's path could not stand in `ray.env`.
    #[error("the TLS folder: {0}")]
    Path(#[from] RayEnvError),
    /// Others may write it.
    #[error(
        "the TLS folder {path} {why}: whoever writes there decides what Ray trusts; \
         it must belong to the agent's user, mode 0755"
    )]
    Exposed {
        /// The folder.
        path: String,
        /// What is wrong.
        why: &'static str,
    },
    /// Others may put another one in its place.
    #[error("the TLS folder {path} {why}")]
    Place {
        /// The folder.
        path: String,
        /// What is wrong, and the next step.
        why: String,
    },
    /// Somebody keeps other things there.
    #[error(
        "{path} is not a TLS folder of node-agent: it holds {entry:?} and no key folder; \
         name a folder of its own with --tls-dir"
    )]
    Foreign {
        /// The folder.
        path: String,
        /// One of the things in it.
        entry: String,
    },
    /// A key folder is not whole.
    #[error("key folder {name} is damaged: {why}")]
    Damaged {
        /// Which.
        name: String,
        /// What is wrong.
        why: String,
    },
}

/// A key folder, as it lies on the disk.
#[derive(Clone, Debug)]
pub struct Folder {
    /// N of `k<N>`.
    pub number: u32,
    /// Leaf and issuer.
    pub chain: v1::CertificateChain,
    /// What the leaf says.
    pub facts: LeafFacts,
}

impl Folder {
    /// `k<N>`.
    #[must_use]
    pub fn name(&self) -> String {
        folder_name(self.number)
    }
}

/// `k<N>`.
#[must_use]
pub fn folder_name(number: u32) -> String {
    format!("k{number}")
}

/// The TLS folder.
#[derive(Clone, Debug)]
pub struct TlsDir {
    path: PathBuf,
    /// Ray's group; without one only the agent's user reads Ray's token.
    gid: Option<u32>,
    /// Who may read the keys of the key folders.
    readers: KeyReaders,
}

/// Who may read the keys of the key folders besides the agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeyReaders {
    /// Ray, which speaks TLS itself: its group.
    #[default]
    Ray,
    /// The node's tunnel, of this group; Ray is none of it.
    Tunnel(u32),
    /// Nobody: there is a tunnel to be, and nobody knows its group.
    Nobody,
}

impl TlsDir {
    /// Makes the folder if it is missing. Refuses one that others can write or replace, and one that
    /// holds other things and no key folder of ours. A stray file beside key folders is left alone:
    /// it must not stop an agent that renews them.
    ///
    /// # Errors
    /// See [`KeyFolderError`].
    pub fn prepare(path: &Path, gid: Option<u32>) -> Result<Self, KeyFolderError> {
        // Without a slash at the end, which would follow a symbolic link.
        let path: PathBuf = std::path::absolute(path)?.components().collect();
        let path = rayenv::plain(&path)?;
        if let Some(parent) = path.parent() {
            durable::make_parents(parent)?;
        }
        let misplaced = |why| KeyFolderError::Place { path: path.display().to_string(), why };
        if let Some(why) = fault_of_parent(&path)? {
            return Err(misplaced(why));
        }
        if path.is_symlink() {
            return Err(misplaced("is a symbolic link: name the folder itself".to_owned()));
        }
        durable::make_folder(&path, Access { mode: 0o755, uid: None, gid: None })?;
        let metadata = std::fs::symlink_metadata(&path)?;
        use std::os::unix::fs::MetadataExt;
        let exposed = |why| KeyFolderError::Exposed { path: path.display().to_string(), why };
        if metadata.uid() != rustix::process::geteuid().as_raw() {
            return Err(exposed("belongs to another user"));
        }
        if metadata.mode() & 0o022 != 0 {
            return Err(exposed("may be written by others"));
        }
        refuse_foreign(&path)?;
        if let Some(gid) = gid.filter(|gid| !may_give(*gid)) {
            return Err(KeyFolderError::Group { path: path.display().to_string(), gid });
        }
        Ok(Self { path, gid, readers: KeyReaders::Ray })
    }

    /// Decides who may read the keys from now on. What is there is given to them by `align_access`.
    pub fn readers(&mut self, readers: KeyReaders) -> bool {
        std::mem::replace(&mut self.readers, readers) != readers
    }

    fn key_gid(&self) -> Option<u32> {
        match self.readers {
            KeyReaders::Ray => self.gid,
            KeyReaders::Tunnel(gid) => Some(gid),
            KeyReaders::Nobody => None,
        }
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where `ray.env` lies.
    #[must_use]
    pub fn env_path(&self) -> PathBuf {
        self.path.join(ENV)
    }

    /// Where a key folder lies.
    #[must_use]
    pub fn folder_path(&self, number: u32) -> PathBuf {
        self.path.join(folder_name(number))
    }

    /// Removes what a crash left half written: temporaries, and key folders not yet or no longer in
    /// their place.
    ///
    /// # Errors
    /// The system's.
    pub fn sweep(&self) -> Result<(), KeyFolderError> {
        sweep_temporaries(&self.path, &FILES)?;
        for entry in std::fs::read_dir(&self.path)? {
            let entry = entry?;
            // Of the entry itself: a link is no folder, wherever it points.
            if !entry.file_type()?.is_dir() {
                continue;
            }
            let name = entry.file_name().to_string_lossy().into_owned();
            if is_half_way(&name) {
                std::fs::remove_dir_all(entry.path())?;
            } else if number_of(&name).is_some() {
                sweep_temporaries(&entry.path(), &FOLDER_FILES)?;
            }
        }
        Ok(())
    }

    /// The key folders in order, and what is wrong with those that are not whole.
    ///
    /// # Errors
    /// The TLS folder itself cannot be read.
    pub fn load(&self) -> Result<(Vec<Folder>, Vec<KeyFolderError>), KeyFolderError> {
        let mut numbers: Vec<u32> = std::fs::read_dir(&self.path)?
            .filter_map(|entry| number_of(&entry.ok()?.file_name().to_string_lossy()))
            .collect();
        numbers.sort_unstable();
        let (mut folders, mut damaged) = (Vec::new(), Vec::new());
        for number in numbers {
            match self.load_folder(number) {
                Ok(folder) => folders.push(folder),
                Err(error) => damaged.push(error),
            }
        }
        Ok((folders, damaged))
    }

    fn load_folder(&self, number: u32) -> Result<Folder, KeyFolderError> {
        let damaged = |why: String| KeyFolderError::Damaged { name: folder_name(number), why };
        let path = self.folder_path(number);
        let pem = read_if_there(&path.join(LEAF))?.unwrap_or_default();
        let mut certificates = bundle::certificates_from_pem(&pem)
            .map_err(|e| damaged(format!("{LEAF}: {e}")))?
            .into_iter()
            .map(|der| der.to_vec());
        let chain = v1::CertificateChain {
            leaf_der: certificates.next().unwrap_or_default(),
            issuers_der: certificates.collect(),
        };
        let facts = LeafFacts::parse(&chain.leaf_der).map_err(|e| damaged(e.to_string()))?;
        if self.key(number)?.spki_der() != facts.spki_der {
            return Err(damaged(format!("{KEY} and {LEAF} do not belong together")));
        }
        Ok(Folder { number, chain, facts })
    }

    /// The key of a folder.
    ///
    /// # Errors
    /// Not readable.
    pub fn key(&self, number: u32) -> Result<PrivateKey, KeyFolderError> {
        Ok(PrivateKey::load(&self.folder_path(number).join(KEY))?)
    }

    /// The number the next key folder gets: never one that was there before a newer one.
    ///
    /// # Errors
    /// The TLS folder cannot be read.
    pub fn next_number(&self) -> Result<u32, KeyFolderError> {
        let numbers = std::fs::read_dir(&self.path)?
            .filter_map(|entry| number_of(&entry.ok()?.file_name().to_string_lossy()));
        Ok(numbers.max().map_or(1, |newest| newest.saturating_add(1)))
    }

    /// Puts a whole key folder in its place: there afterwards, or not there at all.
    ///
    /// # Errors
    /// The system's.
    pub fn create(
        &self,
        number: u32,
        key: &PrivateKey,
        chain: v1::CertificateChain,
        facts: LeafFacts,
        bundle: &v1::TrustBundle,
    ) -> Result<Folder, KeyFolderError> {
        let building = self.path.join(format!(".k{number}.new"));
        if building.exists() {
            std::fs::remove_dir_all(&building)?;
        }
        let built = self.build(number, &building, key, &chain, bundle);
        if built.is_err() {
            // On a full disk it would keep the next try from succeeding.
            let _ = std::fs::remove_dir_all(&building);
        }
        built?;
        Ok(Folder { number, chain, facts })
    }

    fn build(
        &self,
        number: u32,
        building: &Path,
        key: &PrivateKey,
        chain: &v1::CertificateChain,
        bundle: &v1::TrustBundle,
    ) -> Result<(), KeyFolderError> {
        granting(building, self.key_gid(), durable::make_folder(building, self.folder_access()))?;
        let key_path = building.join(KEY);
        let written = durable::create(&key_path, key.to_pem().as_bytes(), self.key_access());
        granting(&key_path, self.key_gid(), written)?;
        durable::create(&building.join(LEAF), chain.to_pem().as_bytes(), Access::PUBLIC)?;
        write_bundle(building, bundle)?;
        durable::sync_folder(building)?;
        std::fs::rename(building, self.folder_path(number))?;
        Ok(durable::sync_folder(&self.path)?)
    }

    /// Replaces the leaf of a key folder by one rename.
    ///
    /// # Errors
    /// The system's; the old leaf is whole then.
    pub fn replace_leaf(
        &self,
        number: u32,
        chain: &v1::CertificateChain,
    ) -> Result<(), KeyFolderError> {
        let path = self.folder_path(number).join(LEAF);
        Ok(durable::replace(&path, chain.to_pem().as_bytes(), Access::PUBLIC)?)
    }

    /// Brings roots and CRLs of a key folder up to date. Says whether anything changed.
    ///
    /// # Errors
    /// The system's.
    pub fn put_bundle(
        &self,
        number: u32,
        bundle: &v1::TrustBundle,
    ) -> Result<bool, KeyFolderError> {
        write_bundle(&self.folder_path(number), bundle)
    }

    /// Removes a key folder: out of its place by one rename, then its files.
    ///
    /// # Errors
    /// The system's.
    pub fn remove(&self, number: u32) -> Result<(), KeyFolderError> {
        let dying = self.path.join(format!(".k{number}.old"));
        std::fs::rename(self.folder_path(number), &dying)?;
        durable::sync_folder(&self.path)?;
        Ok(std::fs::remove_dir_all(&dying)?)
    }

    /// The folder `current` points to.
    #[must_use]
    pub fn current(&self) -> Option<u32> {
        let target = std::fs::read_link(self.path.join(CURRENT)).ok()?;
        number_of(target.to_str()?)
    }

    /// Points `current` at a key folder, with fixed links through it for those who want fixed paths.
    ///
    /// # Errors
    /// The system's.
    pub fn point_current(&self, number: u32) -> Result<(), KeyFolderError> {
        durable::point(&self.path.join(CURRENT), Path::new(&folder_name(number)))?;
        for name in [KEY, LEAF, ROOTS, CRLS] {
            let (link, target) = (self.path.join(name), Path::new(CURRENT).join(name));
            if std::fs::read_link(&link).ok().as_deref() != Some(&target) {
                durable::point(&link, &target)?;
            }
        }
        Ok(())
    }

    /// What `ray.env` says; `None` where it is missing or not ours.
    #[must_use]
    pub fn env(&self) -> Option<RayEnv> {
        let text = read_if_there(&self.env_path()).ok()??;
        RayEnv::parse(std::str::from_utf8(&text).ok()?).ok()
    }

    /// The key folder `ray.env` names.
    #[must_use]
    pub fn env_names(&self) -> Option<u32> {
        number_of(self.env()?.folder_name()?)
    }

    /// The environment for a key folder.
    #[must_use]
    pub fn env_for(&self, number: u32, told: &Told) -> RayEnv {
        let token = told.with_token.then(|| self.path.join(TOKEN));
        let env = if told.speaks_tls {
            RayEnv::of_folder(&self.folder_path(number), token.as_deref())
        } else {
            RayEnv::without_tls(token.as_deref())
        };
        env.with_ports(&told.ports)
    }

    /// Brings `ray.env` up to date. Says whether it changed.
    ///
    /// # Errors
    /// The system's.
    pub fn put_env(&self, number: u32, told: &Told) -> Result<bool, KeyFolderError> {
        let text = self.env_for(number, told).to_text();
        replace_if_other(&self.env_path(), text.as_bytes(), Access::PUBLIC)
    }

    /// Whether there is a file with Ray's token.
    #[must_use]
    pub fn has_token(&self) -> bool {
        self.path.join(TOKEN).exists()
    }

    /// Brings Ray's token up to date. Says whether it changed.
    ///
    /// # Errors
    /// The system's.
    pub fn put_token(&self, token: &[u8]) -> Result<bool, KeyFolderError> {
        let path = self.path.join(TOKEN);
        if read_if_there(&path)?.is_some_and(|old| zeroize::Zeroizing::new(old).as_slice() == token)
        {
            return Ok(false);
        }
        granting(&path, self.gid, durable::replace(&path, token, secret_access(self.gid)))?;
        Ok(true)
    }

    /// The key of an identity that is kept nowhere else, on the disk before this returns, so that a
    /// next run for the same `purpose` goes on with it. For another purpose there is another key.
    ///
    /// # Errors
    /// The system's, or the crypto library's.
    pub fn once_key(&self, purpose: &str) -> Result<PrivateKey, KeyFolderError> {
        let path = self.path.join(ONCE_KEY);
        let text = read_if_there(&path)?.map(zeroize::Zeroizing::new).unwrap_or_default();
        // PEM allows text before its first line.
        let known = std::str::from_utf8(&text).ok().and_then(|text| text.split_once('\n'));
        let known = known.filter(|(line, _)| *line == purpose);
        if let Some(key) = known.and_then(|(_, pem)| PrivateKey::from_pem(pem)) {
            return Ok(key);
        }
        let key = PrivateKey::generate()?;
        let mut text = zeroize::Zeroizing::new(String::with_capacity(4096));
        text.push_str(purpose);
        text.push('\n');
        text.push_str(&key.to_pem());
        durable::replace(&path, text.as_bytes(), Access::PRIVATE)?;
        Ok(key)
    }

    /// Removes that key.
    ///
    /// # Errors
    /// The system's.
    pub fn drop_once_key(&self) -> Result<(), KeyFolderError> {
        std::fs::remove_file(self.path.join(ONCE_KEY))?;
        Ok(durable::sync_folder(&self.path)?)
    }

    /// Gives what is there to those who are to read it, where it was made for others. Says whether others
    /// could read a key until now.
    ///
    /// # Errors
    /// The group cannot be given.
    pub fn align_access(&self, folders: &[Folder]) -> Result<bool, KeyFolderError> {
        let mut were_others = false;
        for folder in folders {
            let path = self.folder_path(folder.number);
            were_others |= self.align(&path.join(KEY), self.key_access())?;
            self.align(&path, self.folder_access())?;
        }
        if self.has_token() {
            self.align(&self.path.join(TOKEN), secret_access(self.gid))?;
        }
        Ok(were_others)
    }

    /// Says whether a group could read it that may not any more.
    fn align(&self, path: &Path, wanted: Access) -> Result<bool, KeyFolderError> {
        use std::os::unix::fs::{MetadataExt, PermissionsExt};
        let metadata = std::fs::symlink_metadata(path)?;
        if metadata.is_symlink() {
            return Ok(false);
        }
        let own_gid = rustix::process::getegid().as_raw();
        let gid = wanted.gid.unwrap_or(own_gid);
        let was_others = metadata.gid() != gid && metadata.mode() & 0o040 != 0;
        if metadata.gid() != gid {
            let given = rustix::fs::chown(path, None, Some(rustix::fs::Gid::from_raw(gid)));
            granting(path, wanted.gid, given.map_err(io::Error::from))?;
        }
        if metadata.mode() & 0o7777 != wanted.mode {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(wanted.mode))?;
        }
        Ok(was_others)
    }

    fn folder_access(&self) -> Access {
        let gid = self.key_gid();
        Access { mode: if gid.is_some() { 0o750 } else { 0o700 }, uid: None, gid }
    }

    fn key_access(&self) -> Access {
        secret_access(self.key_gid())
    }
}

/// Says what to do where a group was refused.
fn granting(path: &Path, gid: Option<u32>, done: io::Result<()>) -> Result<(), KeyFolderError> {
    match (done, gid) {
        (Err(e), Some(gid)) if e.kind() == io::ErrorKind::PermissionDenied => {
            Err(KeyFolderError::Group { path: path.display().to_string(), gid })
        }
        (other, _) => Ok(other?),
    }
}

fn secret_access(gid: Option<u32>) -> Access {
    Access { mode: if gid.is_some() { 0o640 } else { 0o600 }, uid: None, gid }
}

fn write_bundle(folder: &Path, trust: &v1::TrustBundle) -> Result<bool, KeyFolderError> {
    let roots = bundle::certificates_to_pem(&trust.roots_der);
    let crls = bundle::crls_to_pem(&trust.crls_der);
    let roots = replace_if_other(&folder.join(ROOTS), roots.as_bytes(), Access::PUBLIC)?;
    let crls = replace_if_other(&folder.join(CRLS), crls.as_bytes(), Access::PUBLIC)?;
    Ok(roots || crls)
}

fn replace_if_other(path: &Path, content: &[u8], access: Access) -> Result<bool, KeyFolderError> {
    if read_if_there(path)?.as_deref() == Some(content) {
        return Ok(false);
    }
    durable::replace(path, content, access)?;
    Ok(true)
}

/// Whether this process can give its files to a group: found out before anything is spent.
fn may_give(gid: u32) -> bool {
    let own = rustix::process::getegid().as_raw();
    let member = || {
        let groups = rustix::process::getgroups().unwrap_or_default();
        groups.iter().any(|group| group.as_raw() == gid)
    };
    rustix::process::geteuid().is_root() || own == gid || member()
}

/// Whether a folder is ours, or empty enough to become ours.
fn refuse_foreign(path: &Path) -> Result<(), KeyFolderError> {
    let mut foreign = None;
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if number_of(&name).is_some() && entry.path().join(KEY).exists() {
            return Ok(());
        }
        if !is_own_name(&name) {
            foreign = Some(name);
        }
    }
    match foreign {
        None => Ok(()),
        Some(entry) => Err(KeyFolderError::Foreign { path: path.display().to_string(), entry }),
    }
}

fn is_own_name(name: &str) -> bool {
    let temporary = name.strip_prefix('.').and_then(|name| name.strip_suffix(".tmp"));
    FILES.contains(&name)
        || temporary.is_some_and(|name| FILES.contains(&name))
        || number_of(name).is_some()
        || is_half_way(name)
        || name == LOST_AND_FOUND
}

/// `.k<N>.new` and `.k<N>.old`: a key folder not yet or no longer in its place.
pub(crate) fn is_half_way(name: &str) -> bool {
    let number = name
        .strip_prefix(".k")
        .and_then(|name| name.strip_suffix(".new").or_else(|| name.strip_suffix(".old")));
    number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

/// N of `k<N>`.
pub(crate) fn number_of(name: &str) -> Option<u32> {
    let digits = name.strip_prefix('k')?;
    (!digits.is_empty() && !digits.starts_with('0') && digits.bytes().all(|b| b.is_ascii_digit()))
        .then(|| digits.parse().ok())
        .flatten()
}

#[cfg(test)]
mod tests;
