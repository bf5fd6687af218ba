//! `ca-server check`: whether a data folder holds what a CA wrote, and all of it belongs together. It
//! takes the store's lock and works on a copy, because the database repairs what it opens: what was
//! found damaged stays as it was found.
//!
//! It cannot tell an old copy of a store from a new one: both hold in themselves.

mod walk;

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use raymtls_proto::digest::sha256;
use rustix::fs::{FlockOperation, OFlags, flock};
use serde::Serialize;
use thiserror::Error;

use crate::{
    init,
    keys::{
        kek::{Kek, KekError},
        random,
    },
    store::{sled::SledEngine, view::Reader},
};

/// Findings that are told one by one.
const FINDINGS_TOLD: usize = 100;
/// Name of the copy: this, a dot and random digits, which nobody can have made before.
const COPY: &str = "store.check";
const LOCK_TRIES: u32 = 10;
const LOCK_WAIT: Duration = Duration::from_millis(100);

/// What is checked, and with what.
#[derive(Clone, Debug)]
pub struct Options {
    /// The data folder.
    pub dir: PathBuf,
    /// Where the copy is made: a folder with room for the store. The data folder if none is named.
    pub scratch: Option<PathBuf>,
    /// With the key-encryption key every CA key is unwrapped too.
    pub kek_file: Option<PathBuf>,
    /// What counts as now.
    pub now_ms: i64,
}

/// Why nothing could be checked.
#[derive(Debug, Error)]
pub enum CheckError {
    /// No data folder.
    #[error("{0} holds no CA: name its data folder with --dir")]
    NoCa(PathBuf),
    /// A server runs.
    #[error("a ca-server uses {0}: stop it first, or check a copy that was made while none ran")]
    InUse(PathBuf),
    /// The copy.
    #[error("cannot copy the store to {path}: {error}; name a folder with room by --scratch")]
    Copy {
        /// Where to.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// The copy would not be ours alone.
    #[error(
        "others can change folder {0}, below which the store would be copied, and put files of their \
         own there: name by --scratch one that belongs to root or to who runs this, and that nobody \
         else may write to"
    )]
    Scratch(PathBuf),
    /// The store's files.
    #[error("{path}: {error}")]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// The key-encryption key.
    #[error(transparent)]
    Kek(#[from] KekError),
}

/// What a check found.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Records read.
    pub records: u64,
    /// Records of the audit log whose hashes were computed again.
    pub audit_records: u64,
    /// Index of the first one: those before it were pruned.
    pub audit_first: u64,
    /// Index of the last one.
    pub audit_last: u64,
    /// Its hash: to be compared with what was noted elsewhere.
    pub audit_last_sha256: String,
    /// SHA-256 over every key and value: two stores that hold the same have the same.
    pub state_sha256: String,
    /// What is wrong: the first of them.
    pub findings: Vec<Finding>,
    /// How much is wrong.
    pub findings_total: u64,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Where.
    pub at: String,
    /// What.
    pub what: String,
}

impl Report {
    fn find(&mut self, at: impl Into<String>, what: impl Into<String>) {
        self.findings_total += 1;
        if self.findings.len() < FINDINGS_TOLD {
            self.findings.push(Finding { at: at.into(), what: what.into() });
        }
    }

    /// For people: a line for each finding, then what it comes to.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        for Finding { at, what } in &self.findings {
            text.push_str(&format!("{}: {}\n", at.escape_debug(), what.escape_debug()));
        }
        let left_out = self.findings_total - u64::try_from(self.findings.len()).unwrap_or(0);
        if left_out > 0 {
            text.push_str(&format!("and {left_out} more\n"));
        }
        text + &if self.findings_total == 0 {
            format!(
                "holds: {} records, audit log {} to {}, last hash {}\n",
                self.records, self.audit_first, self.audit_last, self.audit_last_sha256
            )
        } else {
            format!(
                "{} records read, {} findings: do not serve from this folder, keep it, and restore \
                 a backup\n",
                self.records, self.findings_total
            )
        }
    }
}

/// Checks a data folder. `progress` hears how many records were read, from time to time.
///
/// # Errors
/// See [`CheckError`]; what is wrong with the store stands in the report.
pub fn check(options: &Options, progress: &mut dyn FnMut(u64)) -> Result<Report, CheckError> {
    let store = init::store_dir(&options.dir);
    if !store.join("db").exists() {
        return Err(CheckError::NoCa(options.dir.clone()));
    }
    let kek = options.kek_file.as_deref().map(Kek::read).transpose()?;
    let _lock = lock(&store)?;
    let scratch = options.scratch.as_deref().unwrap_or_else(|| {
        // We hold its lock: no other check works there.
        sweep(&options.dir);
        &options.dir
    });
    let copy = Copied::of(&store, scratch)?;
    let mut report = Report { audit_first: 1, ..Report::default() };
    match SledEngine::open(&copy.0) {
        Ok(engine) => walk::walk(&engine, options.now_ms, kek.as_ref(), &mut report, progress),
        Err(error) => {
            // The copy's name says nothing to whoever reads it.
            let said = error.to_string();
            let said = said.replace(&copy.0.display().to_string(), &store.display().to_string());
            report.find("store", format!("the database does not open: {said}"));
        }
    }
    Ok(report)
}

/// Checks what is read, wherever that lies.
#[must_use]
pub fn read_through(reader: &dyn Reader, now_ms: i64, kek: Option<&Kek>) -> Report {
    let mut report = Report { audit_first: 1, ..Report::default() };
    walk::walk(reader, now_ms, kek, &mut report, &mut |_| ());
    report
}

/// The lock a server holds: sled takes the same one.
fn lock(store: &Path) -> Result<File, CheckError> {
    let path = store.join("db");
    let unread = |error: io::Error| CheckError::Read { path: path.clone(), error };
    let file = File::open(&path).map_err(unread)?;
    for _ in 0..LOCK_TRIES {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            // A server that has just stopped lets go of it a moment later.
            Err(rustix::io::Errno::WOULDBLOCK) => thread::sleep(LOCK_WAIT),
            Err(error) => return Err(unread(error.into())),
        }
    }
    Err(CheckError::InUse(store.to_owned()))
}

/// Removes what checks left in the data folder that were killed.
fn sweep(dir: &Path) {
    let is_copy =
        |name: &str| name.strip_prefix(COPY).is_some_and(|r| r.is_empty() || r.starts_with('.'));
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(is_copy) {
            // One that stays only takes room.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// A copy of the store, removed when it is done with.
struct Copied(PathBuf);

impl Copied {
    fn of(store: &Path, scratch: &Path) -> Result<Self, CheckError> {
        let path = scratch.join(format!("{COPY}.{}", hex::encode(random::bytes::<8>())));
        let uncopied = |error: io::Error| CheckError::Copy { path: path.clone(), error };
        if can_be_changed_by_others(scratch).map_err(uncopied)? {
            return Err(CheckError::Scratch(scratch.to_owned()));
        }
        // Ours from the moment it is there; until then nothing is removed on the way out.
        make_own_folder(&path).map_err(uncopied)?;
        let copy = Self(path.clone());
        copy_files(store, &path).map_err(uncopied)?;
        Ok(copy)
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        // What stays is named like a copy, and private.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Whether others could put something in the place of a folder that lies here.
fn can_be_changed_by_others(folder: &Path) -> io::Result<bool> {
    let metadata = fs::metadata(folder)?;
    let (mode, owner) = (metadata.mode(), metadata.uid());
    if owner != 0 && owner != rustix::process::geteuid().as_raw() {
        return Ok(true);
    }
    // The server's own group may: Kubernetes lets the group of a volume write.
    let own_group = metadata.gid() == rustix::process::getegid().as_raw();
    let closed = if own_group { 0o002 } else { 0o022 };
    let sticky = mode & 0o1000 != 0;
    Ok(mode & closed != 0 && !sticky)
}

/// Refuses one that is there already.
fn make_own_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(path)
}

/// The store's folder is flat, but for the one in which nothing must be. What is copied to is made
/// here and nowhere else: nothing that is there is written to, through a link or otherwise.
fn copy_files(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            make_own_folder(&target)?;
            copy_files(&entry.path(), &target)?;
        } else {
            let mut copy = File::options()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
                .open(target)?;
            io::copy(&mut File::open(entry.path())?, &mut copy)?;
        }
    }
    Ok(())
}

/// A hash over a growing sequence of pairs.
struct State([u8; 32]);

impl State {
    fn add(&mut self, key: &[u8], value: &[u8]) {
        let parts = [&self.0[..], &sha256(key), &sha256(value)].concat();
        self.0 = sha256(&parts);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;

    #[test]
    fn a_copy_is_made_where_nobody_else_can_put_one_and_overwrites_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (store, scratch) = (folder.path().join("store"), folder.path().join("scratch"));
        let victim = folder.path().join("victim");
        for made in [&store, &scratch] {
            make_own_folder(made).unwrap();
        }
        File::create_new(&victim).unwrap();
        // What was there under the name that was always the same.
        make_own_folder(&scratch.join(COPY)).unwrap();
        symlink(&victim, scratch.join(COPY).join("db")).unwrap();
        io::Write::write_all(&mut File::create_new(store.join("db")).unwrap(), b"rows").unwrap();
        let copy = Copied::of(&store, &scratch).unwrap();
        assert_eq!(fs::read(copy.0.join("db")).unwrap(), b"rows");
        assert_eq!(fs::metadata(&copy.0).unwrap().mode() & 0o777, 0o700);
        assert_eq!(fs::read(&victim).unwrap(), b"", "written through a link");
        assert!(copy_files(&store, &scratch.join(COPY)).is_err(), "a file in the way was taken");
        assert_eq!(fs::read(&victim).unwrap(), b"");
        drop(copy);
        assert_eq!(fs::read_dir(&scratch).unwrap().count(), 1, "a copy was left");
        for (mode, refused) in [(0o1777, false), (0o777, true), (0o702, true)] {
            fs::set_permissions(&scratch, fs::Permissions::from_mode(mode)).unwrap();
            let copied = Copied::of(&store, &scratch);
            assert_eq!(matches!(copied, Err(CheckError::Scratch(_))), refused, "{mode:o}");
        }
        if rustix::process::geteuid().is_root() {
            fs::set_permissions(&scratch, fs::Permissions::from_mode(0o700)).unwrap();
            chown(&scratch, Some(4_321), None).unwrap();
            assert!(matches!(Copied::of(&store, &scratch), Err(CheckError::Scratch(_))));
        }
        sweep(&scratch);
        assert_eq!(fs::read_dir(&scratch).unwrap().count(), 0);
    }
}
