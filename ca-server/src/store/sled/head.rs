//! How far the store was: a small file beside the database, with the number of the newest durable
//! commit. A database that opens with an earlier one has lost commits: sled takes the first damaged
//! byte of its log for its end and drops, without a word, what lies behind.
//!
//! The file is written after each commit and not synced, for it must only never be ahead: after a
//! power cut it may be some seconds old, and a loss within them is not seen here.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::Path,
};

use raymtls_proto::digest::sha256;

/// Its name in the store's folder.
const NAME: &str = "head";
/// Number, then as many bytes of its hash.
const HALF: usize = size_of::<u64>();

/// The file.
#[derive(Debug)]
pub(super) struct Head(File);

impl Head {
    /// Opens it, and reads the number; zero in a store that has none yet.
    ///
    /// # Errors
    /// `InvalidData` where it does not hold what was written, or whatever the system says.
    pub(super) fn open(folder: &Path) -> io::Result<(Self, u64)> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(folder.join(NAME))?;
        let len = file.metadata()?.len();
        if len == 0 {
            return Ok((Self(file), 0));
        }
        let mut bytes = [0; 2 * HALF];
        let whole = len == bytes.len() as u64 && file.read_exact_at(&mut bytes, 0).is_ok();
        let mut number = [0; HALF];
        number.copy_from_slice(&bytes[..HALF]);
        let number = u64::from_be_bytes(number);
        if !whole || bytes != content(number) {
            let text = format!(
                "{NAME} is damaged, which says how far the store was: keep a copy of the store, run \
                 `ca-server check`, and remove {NAME} only if nothing else is found"
            );
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok((Self(file), number))
    }

    /// Notes a commit that is durable.
    ///
    /// # Errors
    /// Whatever the system says.
    pub(super) fn note(&self, number: u64) -> io::Result<()> {
        self.0.write_all_at(&content(number), 0)
    }
}

impl Drop for Head {
    fn drop(&mut self) {
        // What is not synced here is written by the system, some seconds later.
        let _ = self.0.sync_data();
    }
}

fn content(number: u64) -> [u8; 2 * HALF] {
    let mut bytes = [0; 2 * HALF];
    bytes[..HALF].copy_from_slice(&number.to_be_bytes());
    let check = sha256(&bytes[..HALF]);
    bytes[HALF..].copy_from_slice(&check[..HALF]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_comes_back_and_a_changed_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (head, number) = Head::open(folder.path()).unwrap();
        assert_eq!(number, 0);
        for number in [1, 255, u64::MAX] {
            head.note(number).unwrap();
            assert_eq!(Head::open(folder.path()).unwrap().1, number);
        }
        for at in 0..2 * HALF {
            let mut bytes = content(7);
            bytes[at] ^= 1;
            head.0.write_all_at(&bytes, 0).unwrap();
            let error = Head::open(folder.path()).unwrap_err().to_string();
            assert!(error.contains("head is damaged"), "{error}");
        }
        head.0.set_len(3).unwrap();
        assert!(Head::open(folder.path()).is_err());
    }
}
