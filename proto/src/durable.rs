//! Files that are either the old one or the new one: temporary file of the final mode and owner,
//! write, fsync, rename, fsync of the folder. Readers never see half a file, nor a file with
//! another's permissions; a crash leaves at most a stray `.NAME.tmp`, replaced by the next write.

use std::{
    fs::{DirBuilder, File},
    io::{self, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{Gid, OFlags, Uid};

/// Permission bits and owner of a file, set when it is made and not after. Ids that are `None` stay
/// those of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Permission bits, whatever the umask says.
    pub mode: u32,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
}

impl Access {
    /// Read and write for the process's own user alone.
    pub const PRIVATE: Self = Self { mode: 0o600, uid: None, gid: None };
    /// Readable by everyone: nothing secret.
    pub const PUBLIC: Self = Self { mode: 0o644, uid: None, gid: None };
}

/// Replaces `path` by a file with this content, durably.
///
/// # Errors
/// Whatever the system says, with the path in the message; the old file is whole then.
pub fn replace(path: &Path, content: &[u8], access: Access) -> io::Result<()> {
    let temporary = temporary_path(path)?;
    let written = remove_if_there(&temporary)
        .and_then(|()| write_new(&temporary, content, access))
        .and_then(|()| std::fs::rename(&temporary, path))
        .and_then(|()| sync_folder(folder_of(path)));
    if written.is_err() {
        // The old file is untouched; a temporary left behind would only take room.
        let _ = std::fs::remove_file(&temporary);
    }
    written.map_err(|e| naming(path, &e))
}

/// Makes `path` with this content, durably, and refuses if it is there already.
///
/// # Errors
/// `AlreadyExists`, or whatever the system says.
pub fn create(path: &Path, content: &[u8], access: Access) -> io::Result<()> {
    let temporary = temporary_path(path)?;
    let written = remove_if_there(&temporary)
        .and_then(|()| write_new(&temporary, content, access))
        .and_then(|()| std::fs::hard_link(&temporary, path))
        .and_then(|()| std::fs::remove_file(&temporary))
        .and_then(|()| sync_folder(folder_of(path)));
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    written.map_err(|e| naming(path, &e))
}

/// A new file that grows piece by piece, and is there under its name once it is whole. Dropped before
/// that, it leaves nothing.
#[derive(Debug)]
pub struct Growing {
    writer: io::BufWriter<File>,
    temporary: PathBuf,
    path: PathBuf,
}

impl Growing {
    /// Begins a file that is not there.
    ///
    /// # Errors
    /// `AlreadyExists`, or whatever the system says.
    pub fn begin(path: &Path, access: Access) -> io::Result<Self> {
        if path.symlink_metadata().is_ok() {
            return Err(naming(path, &io::Error::from(io::ErrorKind::AlreadyExists)));
        }
        let temporary = temporary_path(path)?;
        let opened = remove_if_there(&temporary).and_then(|()| open_new(&temporary, access));
        let file = opened.map_err(|e| naming(path, &e))?;
        Ok(Self { writer: io::BufWriter::new(file), temporary, path: path.to_owned() })
    }

    /// Puts it in place, durably. It replaces nothing.
    ///
    /// # Errors
    /// `AlreadyExists`, or whatever the system says.
    pub fn finish(mut self) -> io::Result<()> {
        self.writer
            .flush()
            .and_then(|()| self.writer.get_ref().sync_all())
            .and_then(|()| std::fs::hard_link(&self.temporary, &self.path))
            .and_then(|()| remove_if_there(&self.temporary))
            .and_then(|()| sync_folder(folder_of(&self.path)))
            .map_err(|e| naming(&self.path, &e))
    }
}

impl Write for Growing {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        self.writer.write(piece)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

impl Drop for Growing {
    fn drop(&mut self) {
        // Once it is in place the temporary name is gone.
        let _ = remove_if_there(&self.temporary);
    }
}

/// Points the symlink `path` at `target` by one rename, durably.
///
/// # Errors
/// Whatever the system says.
pub fn point(path: &Path, target: &Path) -> io::Result<()> {
    let temporary = temporary_path(path)?;
    let pointed = remove_if_there(&temporary)
        .and_then(|()| std::os::unix::fs::symlink(target, &temporary))
        .and_then(|()| std::fs::rename(&temporary, path))
        .and_then(|()| sync_folder(folder_of(path)));
    if pointed.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    pointed.map_err(|e| naming(path, &e))
}

/// Makes a folder with exactly this mode and owner, or leaves one that is there.
///
/// # Errors
/// Whatever the system says.
pub fn make_folder(path: &Path, access: Access) -> io::Result<()> {
    let made = DirBuilder::new().mode(0o700).create(path);
    match made {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => return Ok(()),
        other => other.map_err(|e| naming(path, &e))?,
    }
    let folder = File::open(path)?;
    give(&folder, access).map_err(|e| naming(path, &e))?;
    sync_folder(folder_of(path))
}

/// Makes a folder that ours are to lie in and those above it, as far as they are missing, with mode
/// 0755 whatever the umask says: others must get through to what is theirs.
///
/// # Errors
/// Whatever the system says.
pub fn make_parents(folder: &Path) -> io::Result<()> {
    if folder.as_os_str().is_empty() || folder.is_dir() {
        return Ok(());
    }
    folder.parent().map_or(Ok(()), make_parents)?;
    make_folder(folder, Access { mode: 0o755, uid: None, gid: None })
}

/// Flushes a folder's entries to the disk.
///
/// # Errors
/// Whatever the system says.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

fn write_new(path: &Path, content: &[u8], access: Access) -> io::Result<()> {
    let mut file = open_new(path, access)?;
    file.write_all(content)?;
    file.sync_all()
}

fn open_new(path: &Path, access: Access) -> io::Result<File> {
    // 0600 until owner and mode are right: never wider than asked, not even for a moment.
    let file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(path)?;
    give(&file, access)?;
    Ok(file)
}

fn give(file: &File, access: Access) -> io::Result<()> {
    if access.uid.is_some() || access.gid.is_some() {
        rustix::fs::fchown(file, access.uid.map(Uid::from_raw), access.gid.map(Gid::from_raw))?;
    }
    // After fchown, which clears set-id bits; fchmod is not subject to the umask.
    file.set_permissions(std::fs::Permissions::from_mode(access.mode))
}

fn temporary_path(path: &Path) -> io::Result<PathBuf> {
    let name = path
        .file_name()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "a file name is wanted"))?;
    let mut hidden = b".".to_vec();
    hidden.extend_from_slice(name.as_bytes());
    hidden.extend_from_slice(b".tmp");
    Ok(path.with_file_name(std::ffi::OsStr::from_bytes(&hidden)))
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."))
}

fn naming(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_replaced_file_has_the_mode_asked_for_and_leaves_no_temporary() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        for (content, mode) in [("one", 0o600), ("two", 0o640)] {
            replace(&path, content.as_bytes(), Access { mode, ..Access::PRIVATE }).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), content);
            assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, mode);
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn create_refuses_what_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kek");
        create(&path, b"first", Access::PRIVATE).unwrap();
        let error = create(&path, b"second", Access::PRIVATE).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&path).unwrap(), b"first");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_growing_file_is_there_when_it_is_whole_and_replaces_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut growing = Growing::begin(&path, Access::PRIVATE).unwrap();
        growing.write_all(b"one").unwrap();
        assert!(!path.exists());
        drop(growing);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let mut growing = Growing::begin(&path, Access::PRIVATE).unwrap();
        growing.write_all(b"one").unwrap();
        growing.finish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"one");
        let error = Growing::begin(&path, Access::PRIVATE).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_symlink_in_the_temporary_s_place_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let victim = folder.path().join("victim");
        create(&victim, b"whole", Access::PRIVATE).unwrap();
        std::os::unix::fs::symlink(&victim, folder.path().join(".key.tmp")).unwrap();
        replace(&folder.path().join("key"), b"new", Access::PRIVATE).unwrap();
        assert_eq!(std::fs::read(&victim).unwrap(), b"whole");
    }

    #[test]
    fn missing_parents_let_others_through_whatever_the_umask_says() {
        use rustix::{fs::Mode, process::umask};

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/ray-mtls");
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        // The other tests of this process make nothing but what has a mode of its own.
        let before = umask(Mode::RWXG | Mode::RWXO);
        let made = make_parents(&path);
        umask(before);
        made.unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o777;
        for name in ["run", "run/ray-mtls"] {
            assert_eq!(mode(&folder.path().join(name)), 0o755, "{name}");
        }
        assert_eq!(mode(folder.path()), 0o700, "a folder that was there stays as it was");
        for there in [&path, Path::new(""), Path::new("/")] {
            make_parents(there).unwrap();
        }
    }

    #[test]
    fn a_link_is_repointed_in_one_step() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("current");
        for target in ["k1", "k2"] {
            point(&link, Path::new(target)).unwrap();
            assert_eq!(std::fs::read_link(&link).unwrap(), Path::new(target));
        }
    }
}
