//! Judging a folder the server stands on: only root or the server's own user may own it, and nobody
//! else may put other files into it. What lies in it and above it is not looked at.

use std::{os::unix::fs::MetadataExt, path::Path};

use thiserror::Error;

/// Why a folder is not used.
#[derive(Debug, Error)]
pub enum FolderFault {
    /// The system's words.
    #[error("folder {0}: {1}")]
    System(String, std::io::Error),
    /// It belongs to somebody else.
    #[error(
        "folder {path} belongs to uid {owner}, who is neither root nor the user of ca-server and \
         can put another store there: run `chown -R` on it"
    )]
    Owner {
        /// Its path.
        path: String,
        /// Whose it is.
        owner: u32,
    },
    /// It is everybody's, like `/tmp`.
    #[error(
        "folder {path} is shared by all users (mode {mode:04o}): leave it as it is, and name a folder \
         of the CA's own, such as /var/lib/ray-mtls/ca"
    )]
    Shared {
        /// Its path.
        path: String,
        /// Permission bits.
        mode: u32,
    },
    /// Others may change it.
    #[error(
        "folder {path} may be written by others (mode {mode:04o}), who can put another store \
         there: run `chmod 700` on it if it is the CA's alone, or else name another"
    )]
    Exposed {
        /// Its path.
        path: String,
        /// Permission bits.
        mode: u32,
    },
}

/// Judges a folder; what is no reason to stop is given back as a warning.
///
/// # Errors
/// See [`FolderFault`].
pub fn judge(path: &Path) -> Result<Option<String>, FolderFault> {
    let named = || path.display().to_string();
    let metadata = std::fs::metadata(path).map_err(|e| FolderFault::System(named(), e))?;
    let (mode, owner) = (metadata.mode() & 0o7777, metadata.uid());
    if owner != 0 && owner != rustix::process::geteuid().as_raw() {
        return Err(FolderFault::Owner { path: named(), owner });
    }
    // The server's own group may: Kubernetes lets the group of a volume write (fsGroup).
    let own_group = metadata.gid() == rustix::process::getegid().as_raw();
    let closed = if own_group { 0o002 } else { 0o022 };
    if mode & 0o1000 != 0 && mode & 0o022 != 0 {
        return Err(FolderFault::Shared { path: named(), mode });
    }
    if mode & closed != 0 {
        return Err(FolderFault::Exposed { path: named(), mode });
    }
    Ok((mode & 0o077 != 0).then(|| {
        format!(
            "folder {} is open to others (mode {mode:04o}): run `chmod 700` on it",
            path.display()
        )
    }))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, chown};

    use super::*;

    #[test]
    fn writing_is_refused_and_reading_is_worth_a_word() {
        let folder = tempfile::tempdir().unwrap();
        for (mode, warned) in [(0o700, false), (0o755, true), (0o750, true), (0o2770, true)] {
            std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(judge(folder.path()).unwrap().is_some(), warned, "{mode:o}");
        }
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o702)).unwrap();
        assert!(matches!(judge(folder.path()), Err(FolderFault::Exposed { mode: 0o702, .. })));
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o1777)).unwrap();
        let shared = judge(folder.path()).unwrap_err().to_string();
        assert!(shared.contains("of the CA's own") && !shared.contains("chmod"), "{shared}");
    }

    #[test]
    fn another_user_or_a_foreign_group_that_writes_is_refused() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: only root can give a folder away");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o770)).unwrap();
        chown(folder.path(), None, Some(4_321)).unwrap();
        assert!(matches!(judge(folder.path()), Err(FolderFault::Exposed { mode: 0o770, .. })));
        chown(folder.path(), Some(4_321), None).unwrap();
        assert!(matches!(judge(folder.path()), Err(FolderFault::Owner { owner: 4_321, .. })));
    }
}
