//! The key-encryption key: 32 random bytes in a file outside the data folder, which wrap every CA
//! key and every cluster's Ray token with AES-256-GCM. A copy of the data folder alone is worth
//! nothing.

use std::{fmt, path::Path};

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use raymtls_proto::durable::{self, Access};
use thiserror::Error;
use zeroize::Zeroizing;

use super::random;
use crate::trusted_file::{self, FileFault};

/// Longest file, in bytes: 64 digits and what an editor may put after them.
const FILE_LEN_MAX: usize = 128;

/// The key-encryption key.
pub struct Kek(RandomizedNonceKey);

/// Why the KEK or what it wraps is of no use.
#[derive(Debug, Error)]
pub enum KekError {
    /// The file cannot be made.
    #[error("key-encryption key: {0}")]
    File(#[from] std::io::Error),
    /// It cannot be read, or is not to be believed.
    #[error("the key-encryption key {path}: {fault}")]
    Fault {
        /// Its path.
        path: String,
        /// What is wrong with it.
        fault: FileFault,
    },
    /// Others may read it.
    #[error(
        "the key-encryption key {path} may be read by others (mode {mode:04o}): run `chmod 600` \
         on it; if others may have copied it together with the data folder, the CA is compromised"
    )]
    Exposed {
        /// Its path.
        path: String,
        /// Permission bits.
        mode: u32,
    },
    /// Not 64 hexadecimal digits.
    #[error(
        "the key-encryption key {0} is damaged: 64 hexadecimal digits are wanted; \
         put the copy back that you keep apart"
    )]
    Damaged(String),
    /// Another KEK wrapped it, or it was changed, or moved to another's place.
    #[error(
        "{0:?} cannot be unwrapped: this is not the key-encryption key that wrapped it, \
         or the store was changed behind the CA"
    )]
    Unwrap(String),
}

impl Kek {
    /// Makes a new one and writes it; refuses to replace a file.
    ///
    /// # Errors
    /// See [`KekError`].
    pub fn create(path: &Path) -> Result<Self, KekError> {
        let bytes = Zeroizing::new(random::bytes::<32>());
        let mut text = Zeroizing::new(hex::encode(*bytes));
        text.push('\n');
        durable::create(path, text.as_bytes(), Access::PRIVATE)?;
        Ok(Self::new(&bytes))
    }

    /// Reads one that only its owner can read.
    ///
    /// # Errors
    /// See [`KekError`].
    pub fn read(path: &Path) -> Result<Self, KekError> {
        let named = || path.display().to_string();
        let text = trusted_file::read(path, 0o077, FILE_LEN_MAX).map_err(|fault| match fault {
            FileFault::Exposed(mode) => KekError::Exposed { path: named(), mode },
            FileFault::TooLong(_) | FileFault::NotText => KekError::Damaged(named()),
            FileFault::System(_) | FileFault::Owner(_) => KekError::Fault { path: named(), fault },
        })?;
        let mut bytes = Zeroizing::new([0; 32]);
        hex::decode_to_slice(text.trim_end(), &mut *bytes)
            .map_err(|_| KekError::Damaged(named()))?;
        Ok(Self::new(&bytes))
    }

    fn new(bytes: &[u8; 32]) -> Self {
        let key = RandomizedNonceKey::new(&AES_256_GCM, bytes);
        Self(key.expect("AES-256-GCM takes 32 bytes"))
    }

    /// Wraps a secret under a name; it unwraps under the same name only. Nonce, then ciphertext and
    /// tag.
    #[must_use]
    pub fn wrap(&self, name: &str, secret: &[u8]) -> Vec<u8> {
        let mut sealed = secret.to_vec();
        let nonce = self
            .0
            .seal_in_place_append_tag(Aad::from(name.as_bytes()), &mut sealed)
            .expect("AES-256-GCM seals anything below 64 GiB");
        [&nonce.as_ref()[..], &sealed].concat()
    }

    /// Unwraps a secret.
    ///
    /// # Errors
    /// `Unwrap`.
    pub fn unwrap(&self, name: &str, wrapped: &[u8]) -> Result<Zeroizing<Vec<u8>>, KekError> {
        let failed = || KekError::Unwrap(name.to_owned());
        if wrapped.len() < NONCE_LEN {
            return Err(failed());
        }
        let (nonce, sealed) = wrapped.split_at(NONCE_LEN);
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| failed())?;
        let mut buffer = Zeroizing::new(sealed.to_vec());
        let length = self
            .0
            .open_in_place(nonce, Aad::from(name.as_bytes()), &mut buffer)
            .map_err(|_| failed())?
            .len();
        buffer.truncate(length);
        Ok(buffer)
    }
}

impl fmt::Debug for Kek {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Kek(..)")
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_wrapped_secret_unwraps_under_its_own_name_and_key_only() {
        let kek = Kek::new(&[1; 32]);
        let wrapped = kek.wrap("cluster/c1/root", b"secret");
        assert_eq!(*kek.unwrap("cluster/c1/root", &wrapped).unwrap(), b"secret");
        assert!(kek.unwrap("cluster/c2/root", &wrapped).is_err());
        assert!(Kek::new(&[2; 32]).unwrap("cluster/c1/root", &wrapped).is_err());
        let mut changed = wrapped.clone();
        *changed.last_mut().unwrap() ^= 1;
        assert!(kek.unwrap("cluster/c1/root", &changed).is_err());
        assert!(kek.unwrap("cluster/c1/root", &wrapped[..5]).is_err());
        assert_ne!(wrapped, kek.wrap("cluster/c1/root", b"secret"), "a nonce came up twice");
    }

    #[test]
    fn a_kek_others_can_read_or_that_is_cut_short_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kek");
        let wrapped = Kek::create(&path).unwrap().wrap("a", b"b");
        assert!(Kek::create(&path).is_err(), "a KEK was overwritten");
        assert_eq!(*Kek::read(&path).unwrap().unwrap("a", &wrapped).unwrap(), b"b");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(Kek::read(&path), Err(KekError::Exposed { mode: 0o640, .. })));
        durable::replace(&path, b"abcd\n", Access::PRIVATE).unwrap();
        assert!(matches!(Kek::read(&path), Err(KekError::Damaged(_))));
    }

    #[test]
    fn a_kek_with_more_behind_it_than_is_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kek");
        Kek::create(&path).unwrap();
        let mut text = std::fs::read_to_string(&path).unwrap();
        text.push_str(&" ".repeat(FILE_LEN_MAX));
        text.push('x');
        durable::replace(&path, text.as_bytes(), Access::PRIVATE).unwrap();
        assert!(matches!(Kek::read(&path), Err(KekError::Damaged(_))));
    }

    #[test]
    fn a_kek_of_another_user_is_refused_in_words() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: only root can give a file away");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kek");
        Kek::create(&path).unwrap();
        std::os::unix::fs::chown(&path, Some(4_321), None).unwrap();
        let error = Kek::read(&path).unwrap_err().to_string();
        assert!(error.contains("belongs to uid 4321"), "{error}");
    }
}
