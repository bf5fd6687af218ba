//! A backup: one file that holds every pair of a store, each piece encrypted and authenticated under the
//! key-encryption key, so that it can be neither read nor changed, cut or spliced without it. It is the
//! format in which a store's state goes from one to another, too.
//!
//! `ray-mtls backup 1` and a newline, 16 random bytes, then frames: four bytes of length, most
//! significant first, and as many of a protobuf message, wrapped under the name
//! `backup/RANDOM/NUMBER/KIND`. The first frame is of kind `head`, the last `end`, those between `pairs`:
//! pairs in the order in which they were written, of which the last on a key counts.

use std::io::{self, Read};

use prost::Message;
use thiserror::Error;

use crate::{
    keys::{
        kek::{Kek, KekError},
        random,
    },
    store::BackupPairs,
};

/// What a file begins with.
const MAGIC: &[u8] = b"ray-mtls backup 1\n";
const ID_LEN: usize = 16;
/// Longest frame that is read: a longest value with what is around it.
const FRAME_LEN_MAX: usize = 40 * 1024 * 1024;

/// The first frame.
#[derive(Clone, PartialEq, Message)]
pub struct Head {
    /// Format of the store.
    #[prost(uint32, tag = "1")]
    pub store_format: u32,
    /// Its epoch.
    #[prost(fixed64, tag = "2")]
    pub epoch: u64,
    /// When the backup was begun.
    #[prost(int64, tag = "3")]
    pub made_ms: i64,
    /// The deployment.
    #[prost(string, tag = "4")]
    pub trust_domain: String,
    /// Release that made it.
    #[prost(string, tag = "5")]
    pub server_version: String,
}

#[derive(Clone, PartialEq, Message)]
struct Pair {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    /// Absent: the key is deleted.
    #[prost(bytes = "vec", optional, tag = "2")]
    value: Option<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct Pairs {
    #[prost(message, repeated, tag = "1")]
    pairs: Vec<Pair>,
}

/// The last frame.
#[derive(Clone, PartialEq, Message)]
struct End {
    #[prost(uint64, tag = "1")]
    pairs: u64,
}

/// Why a backup does not read.
#[derive(Debug, Error)]
pub enum BackupError {
    /// The system.
    #[error("the backup cannot be read: {0}")]
    Read(#[from] io::Error),
    /// Another file.
    #[error("this is no backup of this release's format: it begins otherwise")]
    NoBackup,
    /// The key, or the file.
    #[error(
        "piece {0} of the backup does not open: the file was changed or cut, or this is not the \
         key-encryption key it was made with"
    )]
    Damaged(u64),
    /// It ends too soon.
    #[error("the backup is cut off: its last piece is missing")]
    Cut,
}

/// What a backup consists of, piece by piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Head,
    Pairs,
    End,
}

impl Kind {
    fn name(self, id: &str, number: u64) -> String {
        let kind = match self {
            Self::Head => "head",
            Self::Pairs => "pairs",
            Self::End => "end",
        };
        format!("backup/{id}/{number}/{kind}")
    }
}

/// Makes the bytes of a backup.
#[derive(Debug)]
pub struct Writer<'a> {
    kek: &'a Kek,
    id: String,
    number: u64,
    /// Pairs so far.
    pub pairs: u64,
}

impl<'a> Writer<'a> {
    /// Begins one: its first bytes.
    #[must_use]
    pub fn begin(kek: &'a Kek, head: &Head) -> (Self, Vec<u8>) {
        let id = random::bytes::<ID_LEN>();
        let mut writer = Self { kek, id: hex::encode(id), number: 0, pairs: 0 };
        let frame = writer.frame(Kind::Head, head);
        (writer, [MAGIC, &id, &frame].concat())
    }

    /// The bytes of some pairs.
    pub fn pairs(&mut self, pairs: BackupPairs) -> Vec<u8> {
        self.pairs += u64::try_from(pairs.len()).unwrap_or(0);
        let pairs = pairs.into_iter().map(|(key, value)| Pair { key, value }).collect();
        self.frame(Kind::Pairs, &Pairs { pairs })
    }

    /// The last bytes.
    #[must_use]
    pub fn end(mut self) -> Vec<u8> {
        let pairs = self.pairs;
        self.frame(Kind::End, &End { pairs })
    }

    fn frame(&mut self, kind: Kind, message: &impl Message) -> Vec<u8> {
        let sealed = self.kek.wrap(&kind.name(&self.id, self.number), &message.encode_to_vec());
        self.number += 1;
        let len = u32::try_from(sealed.len()).expect("a commit is bounded far below 4 GiB");
        [&len.to_be_bytes()[..], &sealed].concat()
    }
}

/// Reads a backup.
#[derive(Debug)]
pub struct Reader<'a, R> {
    kek: &'a Kek,
    file: R,
    id: String,
    number: u64,
    pairs: u64,
    /// What it is a backup of.
    pub head: Head,
}

impl<'a, R: Read> Reader<'a, R> {
    /// Opens one.
    ///
    /// # Errors
    /// See [`BackupError`].
    pub fn open(kek: &'a Kek, mut file: R) -> Result<Self, BackupError> {
        let (mut magic, mut id) = ([0; MAGIC.len()], [0; ID_LEN]);
        let begun = file.read_exact(&mut magic).and_then(|()| file.read_exact(&mut id));
        if begun.is_err() || magic != MAGIC {
            return Err(BackupError::NoBackup);
        }
        let id = hex::encode(id);
        let mut reader = Self { kek, file, id, number: 0, pairs: 0, head: Head::default() };
        let sealed = reader.sealed()?;
        reader.head = reader.unwrap(Kind::Head, &sealed)?;
        Ok(reader)
    }

    /// The next pairs; `None` at the end, which is there.
    ///
    /// # Errors
    /// See [`BackupError`].
    pub fn next_pairs(&mut self) -> Result<Option<BackupPairs>, BackupError> {
        let sealed = self.sealed()?;
        let (number, pairs) = (self.number, self.unwrap::<Pairs>(Kind::Pairs, &sealed));
        let Ok(Pairs { pairs }) = pairs else {
            self.number = number;
            let end: End = self.unwrap(Kind::End, &sealed)?;
            let is_whole = end.pairs == self.pairs && self.file.read(&mut [0])? == 0;
            return if is_whole { Ok(None) } else { Err(BackupError::Damaged(self.number)) };
        };
        self.pairs += u64::try_from(pairs.len()).unwrap_or(0);
        Ok(Some(pairs.into_iter().map(|pair| (pair.key, pair.value)).collect()))
    }

    fn sealed(&mut self) -> Result<Vec<u8>, BackupError> {
        let mut len = [0; 4];
        self.file.read_exact(&mut len).map_err(cut)?;
        let len = u32::from_be_bytes(len) as usize;
        if len > FRAME_LEN_MAX {
            return Err(BackupError::Damaged(self.number));
        }
        let mut sealed = vec![0; len];
        self.file.read_exact(&mut sealed).map_err(cut)?;
        Ok(sealed)
    }

    fn unwrap<M: Message + Default>(
        &mut self,
        kind: Kind,
        sealed: &[u8],
    ) -> Result<M, BackupError> {
        let name = kind.name(&self.id, self.number);
        let damaged = BackupError::Damaged(self.number);
        self.number += 1;
        match self.kek.unwrap(&name, sealed) {
            Ok(plain) => M::decode(plain.as_slice()).map_err(|_| damaged),
            Err(KekError::Unwrap(_)) => Err(damaged),
            Err(error) => Err(BackupError::Read(io::Error::other(error.to_string()))),
        }
    }
}

fn cut(error: io::Error) -> BackupError {
    if error.kind() == io::ErrorKind::UnexpectedEof { BackupError::Cut } else { error.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(kek: &Kek) -> Vec<u8> {
        let head = Head { epoch: 7, ..Head::default() };
        let (mut writer, mut file) = Writer::begin(kek, &head);
        file.extend(writer.pairs(vec![(b"a".to_vec(), Some(b"secret words".to_vec()))]));
        file.extend(writer.pairs(vec![(b"a".to_vec(), None), (b"b".to_vec(), Some(vec![]))]));
        file.extend(writer.end());
        file
    }

    fn read(kek: &Kek, file: &[u8]) -> Result<BackupPairs, BackupError> {
        let mut reader = Reader::open(kek, file)?;
        let mut all = Vec::new();
        while let Some(pairs) = reader.next_pairs()? {
            all.extend(pairs);
        }
        Ok(all)
    }

    #[test]
    fn every_changed_byte_every_cut_and_another_key_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let kek = Kek::create(&folder.path().join("kek")).unwrap();
        let other = Kek::create(&folder.path().join("other")).unwrap();
        let file = file(&kek);
        assert_eq!(read(&kek, &file).unwrap().len(), 3);
        assert!(!file.windows(6).any(|part| part == b"secret"), "it is not encrypted");
        assert!(matches!(read(&other, &file), Err(BackupError::Damaged(0))));
        for len in 0..file.len() {
            assert!(read(&kek, &file[..len]).is_err(), "the first {len} bytes passed");
        }
        for at in 0..file.len() {
            let mut changed = file.clone();
            changed[at] ^= 1;
            assert!(read(&kek, &changed).is_err(), "byte {at} passed");
        }
        assert!(read(&kek, &[&file[..], b"x"].concat()).is_err(), "more behind the end passed");
    }
}
