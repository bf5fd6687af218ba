//! Reading a file the server stands on: only root or the server's own user may have made it, others
//! may do no more with it than they should, and it has a longest length.

use std::{fs::File, io::Read, os::unix::fs::MetadataExt, path::Path};

use thiserror::Error;
use zeroize::Zeroizing;

/// Why a file is not read. Whoever reads says what to do about it.
#[derive(Debug, Error)]
pub enum FileFault {
    /// The system's words.
    #[error(transparent)]
    System(#[from] std::io::Error),
    /// Its mode gives others more than they should have.
    #[error("mode {0:04o}")]
    Exposed(u32),
    /// It belongs to a user who is neither root nor the server's own.
    #[error("belongs to uid {0}, who is neither root nor the user of ca-server: run `chown` on it")]
    Owner(u32),
    /// Longer than it may be.
    #[error("longer than {0} bytes")]
    TooLong(usize),
    /// Not text.
    #[error("not UTF-8")]
    NotText,
}

/// Reads a text of at most `len_max` bytes whose mode has none of the `closed` bits.
///
/// # Errors
/// See [`FileFault`].
pub fn read(path: &Path, closed: u32, len_max: usize) -> Result<Zeroizing<String>, FileFault> {
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    let (mode, owner) = (metadata.mode() & 0o7777, metadata.uid());
    if owner != 0 && owner != rustix::process::geteuid().as_raw() {
        return Err(FileFault::Owner(owner));
    }
    if mode & closed != 0 {
        return Err(FileFault::Exposed(mode));
    }
    // Room for all of it from the start: a buffer that grows leaves copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(len_max + 1));
    file.take(len_max as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > len_max {
        return Err(FileFault::TooLong(len_max));
    }
    let text = std::str::from_utf8(&bytes).map_err(|_| FileFault::NotText)?;
    Ok(Zeroizing::new(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use raymtls_proto::durable::{self, Access};

    use super::*;

    #[test]
    fn a_file_is_read_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        for (content, whole) in [("", true), ("1234", true), ("12345", false)] {
            durable::replace(&path, content.as_bytes(), Access::PRIVATE).unwrap();
            match read(&path, 0o077, 4) {
                Ok(text) => assert_eq!((text.as_str(), whole), (content, true)),
                Err(fault) => assert!(!whole && matches!(fault, FileFault::TooLong(4)), "{fault}"),
            }
        }
        durable::replace(&path, b"\xff", Access::PRIVATE).unwrap();
        assert!(matches!(read(&path, 0o077, 4), Err(FileFault::NotText)));
    }

    #[test]
    fn a_file_of_another_user_is_refused() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: only root can give a file away");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let access = Access { uid: Some(4_321), ..Access::PRIVATE };
        durable::replace(&path, b"", access).unwrap();
        assert!(matches!(read(&path, 0o077, 4), Err(FileFault::Owner(4_321))));
    }
}
