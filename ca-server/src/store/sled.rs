//! The default engine: sled, one tree, used in the one way in which nothing acknowledged is lost.
//!
//! sled's `flush` hands the log to the system with `sync_file_range`, which neither waits for the
//! disk's own cache nor writes the file's length; so each commit ends with an `fdatasync` of the
//! log file. That file is the only one a commit may touch: sled moves whatever is too large for a
//! quarter of a log segment into files of its own (`blobs/`), which that `fdatasync` does not
//! cover. Hence long values are cut into pieces here, and a commit that finds a file there fails.
//!
//! Each commit has a number, in the database and in `head` beside it: whether the database has lost
//! commits by damage is seen when it is opened.

mod head;

use std::{
    collections::BTreeMap,
    fs::File,
    mem::MaybeUninit,
    ops::Bound,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use raymtls_proto::durable::{self, Access};
use rustix::fs::{RawDir, SeekFrom};
use sled::{Batch, Db, IVec};

use self::head::Head;
use super::{
    StoreError,
    view::{Engine, Reader, Writes, scan_start},
};
use crate::failpoint::{self, Point};

/// A sled database in a folder of its own.
#[derive(Debug)]
pub struct SledEngine {
    pairs: Pairs,
    log: File,
    /// The folder that must stay empty.
    blobs: File,
    dir: PathBuf,
    /// Keys whose values are cut, and into how many pieces.
    cut: BTreeMap<Vec<u8>, u32>,
    head: Head,
    /// Number of the newest commit.
    commits: u64,
}

impl SledEngine {
    /// Opens the database in `dir`, or makes an empty one.
    ///
    /// # Errors
    /// Another process has it open, it is damaged, or the system says no.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let open_error = |why: &dyn std::fmt::Display| {
            StoreError::Open(format!("store {}: {why}", dir.display()))
        };
        durable::make_folder(dir, Access { mode: 0o700, ..Access::PRIVATE })
            .map_err(|e| open_error(&e))?;
        let db = open_db(dir)?;
        let log = File::open(dir.join("db")).map_err(|e| open_error(&e))?;
        let cut = cut_values(&db).map_err(|e| open_error(&e))?;
        let commits = commits(&db).map_err(|e| open_error(&e))?;
        let (head, reached) = Head::open(dir).map_err(|e| open_error(&e))?;
        if commits < reached {
            return Err(open_error(&format!(
                "{} commits that were durable are missing: its file is damaged, and the database \
                 drops what lies behind the first damaged byte; restore a backup",
                reached - commits
            )));
        }
        let blobs = File::open(dir.join("blobs")).map_err(|e| open_error(&e))?;
        let engine = Self { pairs: Pairs(db), log, blobs, dir: dir.to_owned(), cut, head, commits };
        engine.settle().map_err(|e| open_error(&e))?;
        engine.refuse_blobs()?;
        Ok(engine)
    }

    /// Puts on the disk what opening made: sled syncs neither its configuration nor the folder.
    fn settle(&self) -> std::io::Result<()> {
        self.pairs.0.flush().map_err(std::io::Error::other)?;
        self.log.sync_all()?;
        File::open(self.dir.join("conf"))?.sync_all()?;
        durable::sync_folder(&self.dir)
    }

    fn refuse_blobs(&self) -> Result<(), StoreError> {
        let is_empty = is_empty(&self.blobs).map_err(|e| unavailable(&e))?;
        if !is_empty {
            return Err(StoreError::Unavailable(format!(
                "{} is not empty: what it holds is not covered by a commit; restore a backup",
                self.dir.join("blobs").display()
            )));
        }
        Ok(())
    }

    /// What one logical write comes to.
    fn add(&mut self, batch: &mut Batch, key: &[u8], value: Option<&[u8]>) {
        let pieces = value.map_or(0, |value| pieces_of(value.len()));
        match value {
            None => batch.remove(key),
            Some(value) if pieces == 0 => batch.insert(key, [&[WHOLE], value].concat()),
            Some(value) => {
                batch.insert(key, [&[CUT][..], &pieces.to_be_bytes()].concat());
                for (index, piece) in (0..).zip(value.chunks(PIECE_LEN)) {
                    batch.insert(piece_key(key, index), piece);
                }
            }
        }
        let before =
            if pieces == 0 { self.cut.remove(key) } else { self.cut.insert(key.to_vec(), pieces) };
        for index in pieces..before.unwrap_or(0) {
            batch.remove(piece_key(key, index));
        }
    }
}

/// The database as any thread may read it.
#[derive(Clone, Debug)]
struct Pairs(Db);

impl Pairs {
    fn value(&self, key: &[u8], stored: &[u8]) -> Result<Vec<u8>, StoreError> {
        match stored.split_first() {
            Some((&WHOLE, value)) => Ok(value.to_vec()),
            Some((&CUT, pieces)) => {
                let pieces = pieces.try_into().map_err(|_| damaged(key, "no count of pieces"))?;
                self.join(key, u32::from_be_bytes(pieces))
            }
            Some(_) | None => Err(damaged(key, "neither whole nor cut")),
        }
    }

    fn join(&self, key: &[u8], pieces: u32) -> Result<Vec<u8>, StoreError> {
        let mut value = Vec::new();
        for index in 0..pieces {
            let piece = self.0.get(piece_key(key, index)).map_err(|e| unavailable(&e))?;
            value.extend_from_slice(&piece.ok_or_else(|| damaged(key, "a piece is missing"))?);
        }
        Ok(value)
    }
}

impl Reader for Pairs {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let stored = self.0.get(key).map_err(|e| unavailable(&e))?;
        stored.map(|stored| self.value(key, &stored)).transpose()
    }

    fn scan(
        &self,
        prefix: &[u8],
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<(Vec<u8>, Vec<u8>)>, StoreError> {
        let from = scan_start(prefix, after);
        self.0
            .range::<&[u8], _>((from, Bound::Unbounded))
            .take(limit)
            .take_while(|pair| pair.as_ref().map_or(true, |(key, _)| key.starts_with(prefix)))
            .map(|pair| {
                let (key, stored) = pair.map_err(|e| unavailable(&e))?;
                let value = self.value(&key, &stored)?;
                Ok((key.to_vec(), value))
            })
            .collect()
    }
}

impl Reader for SledEngine {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.pairs.get(key)
    }

    fn scan(
        &self,
        prefix: &[u8],
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<(Vec<u8>, Vec<u8>)>, StoreError> {
        self.pairs.scan(prefix, after, limit)
    }
}

impl Engine for SledEngine {
    fn reader(&self) -> Box<dyn Reader + Send + Sync> {
        Box::new(self.pairs.clone())
    }

    fn commit(&mut self, writes: &Writes) -> Result<(), StoreError> {
        failpoint::hit(Point::BeforeBatch);
        let mut batch = Batch::default();
        for (key, value) in writes {
            if key.len() > KEY_LEN_MAX {
                return Err(StoreError::Unavailable(format!(
                    "a key of {} bytes: at most {KEY_LEN_MAX} can be stored",
                    key.len()
                )));
            }
            self.add(&mut batch, key, value.as_deref());
        }
        self.commits += 1;
        batch.insert(COMMITS, &self.commits.to_be_bytes());
        self.pairs.0.apply_batch(batch).map_err(|e| unavailable(&e))?;
        failpoint::hit(Point::AfterBatch);
        self.pairs.0.flush().map_err(|e| unavailable(&e))?;
        failpoint::hit(Point::AfterFlush);
        self.log.sync_data().map_err(|e| unavailable(&e))?;
        failpoint::hit(Point::AfterFdatasync);
        self.refuse_blobs()?;
        self.head.note(self.commits).map_err(|e| unavailable(&e))
    }
}

fn open_db(dir: &Path) -> Result<Db, StoreError> {
    let config = sled::Config::new()
        .path(dir)
        .flush_every_ms(None)
        .cache_capacity(CACHE_BYTES)
        .use_compression(false);
    let mut opened = Err(String::new());
    for _ in 0..LOCK_TRIES {
        // sled panics on some damage.
        opened = match catch_unwind(AssertUnwindSafe(|| config.open())) {
            Ok(opened) => opened.map_err(|e| match e {
                sled::Error::Corruption { .. } => DAMAGED.to_owned(),
                sled::Error::CollectionNotFound(_)
                | sled::Error::Unsupported(_)
                | sled::Error::ReportableBug(_)
                | sled::Error::Io(_) => e.to_string(),
            }),
            Err(_) => Err(DAMAGED.to_owned()),
        };
        match &opened {
            // sled's threads let go of the lock a moment after the database is dropped.
            Err(why) if why.contains(LOCK_TAKEN) => thread::sleep(LOCK_WAIT),
            Err(_) | Ok(_) => break,
        }
    }
    opened.map_err(|why| {
        StoreError::Open(if why.contains(LOCK_TAKEN) {
            format!("another ca-server uses {}: stop it first", dir.display())
        } else {
            format!("store {}: {why}", dir.display())
        })
    })
}

/// The number of the newest commit that is there.
/// Whether a folder holds nothing, by a descriptor that is open: a commit must not fail for want of one.
fn is_empty(folder: &File) -> std::io::Result<bool> {
    rustix::fs::seek(folder, SeekFrom::Start(0))?;
    let mut buffer = [MaybeUninit::uninit(); 1_024];
    let mut entries = RawDir::new(folder, &mut buffer);
    while let Some(entry) = entries.next() {
        if !matches!(entry?.file_name().to_bytes(), b"." | b"..") {
            return Ok(false);
        }
    }
    Ok(true)
}

fn commits(db: &Db) -> Result<u64, String> {
    let Some(stored) = db.get(COMMITS).map_err(|e| e.to_string())? else { return Ok(0) };
    let bytes = stored.as_ref().try_into();
    bytes.map(u64::from_be_bytes).map_err(|_| "the number of its commits is damaged".to_owned())
}

fn cut_values(db: &Db) -> sled::Result<BTreeMap<Vec<u8>, u32>> {
    let mut cut = BTreeMap::new();
    for pair in db.scan_prefix(PIECES) {
        let (piece, _): (IVec, IVec) = pair?;
        let key = &piece[PIECES.len()..piece.len() - PIECE_INDEX_LEN];
        *cut.entry(key.to_vec()).or_insert(0) += 1;
    }
    Ok(cut)
}

/// How many pieces a value is cut into; zero for one that stays whole.
fn pieces_of(len: usize) -> u32 {
    if len <= PIECE_LEN {
        return 0;
    }
    u32::try_from(len.div_ceil(PIECE_LEN)).expect("values are bounded far below 4 GiB")
}

fn piece_key(key: &[u8], index: u32) -> Vec<u8> {
    [PIECES, key, &index.to_be_bytes()].concat()
}

fn unavailable(why: &dyn std::fmt::Display) -> StoreError {
    StoreError::Unavailable(why.to_string())
}

fn damaged(key: &[u8], why: &str) -> StoreError {
    StoreError::Damaged { key: String::from_utf8_lossy(key).into_owned(), why: why.to_owned() }
}

/// sled's default is 1 GiB.
const CACHE_BYTES: u64 = 32 * 1024 * 1024;
/// Pieces of cut values lie here, each under its value's key and its index; no record's key begins
/// like this.
const PIECES: &[u8] = b"~/";
/// The number of the newest commit; no piece's key begins like this.
const COMMITS: &[u8] = b"~commits";
const PIECE_INDEX_LEN: usize = size_of::<u32>();
/// First byte of a stored value: what follows is all of it.
const WHOLE: u8 = 0;
/// First byte of a stored value: what follows is the count of its pieces.
const CUT: u8 = 1;
/// sled splits a page by the number of its pairs (16), merges one of 3 with another, and rewrites it
/// as one entry of its log; an entry over a quarter of a segment (131 052 bytes) would become a
/// blob. 20 pairs of a longest key and a longest value stay below it.
const PIECE_LEN: usize = 6_000;
const KEY_LEN_MAX: usize = 400;
const _: () = assert!(20 * (PIECE_LEN + KEY_LEN_MAX + 24) < 512 * 1024 / 4 - 20);

const DAMAGED: &str = "the database is damaged: restore a backup";
const LOCK_TAKEN: &str = "could not acquire lock";
const LOCK_TRIES: u32 = 10;
const LOCK_WAIT: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn a_commit_is_there_after_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let mut engine = SledEngine::open(dir.path()).unwrap();
        engine.commit(&writes([("a/1", Some(10)), ("a/2", Some(20)), ("b/1", Some(5))])).unwrap();
        engine.commit(&writes([("a/1", None)])).unwrap();
        drop(engine);
        let engine = SledEngine::open(dir.path()).unwrap();
        assert_eq!(engine.get(b"a/1").unwrap(), None);
        assert_eq!(engine.get(b"a/2").unwrap(), Some(vec![b'v'; 20]));
        assert_eq!(keys(&engine, b"a/", None, 9), ["a/2"]);
    }

    #[test]
    fn a_scan_keeps_to_its_prefix_its_start_and_its_limit() {
        let dir = tempfile::tempdir().unwrap();
        let mut engine = SledEngine::open(dir.path()).unwrap();
        let pairs = ["a/1", "a/2", "a/3", "b/1"].map(|key| (key, Some(1)));
        engine.commit(&writes(pairs)).unwrap();
        let page = |prefix: &str, after: Option<&str>, limit| {
            keys(&engine, prefix.as_bytes(), after.map(str::as_bytes), limit).join(" ")
        };
        assert_eq!(page("a/", None, 9), "a/1 a/2 a/3");
        assert_eq!(page("a/", None, 2), "a/1 a/2");
        assert_eq!(page("a/", Some("a/1"), 9), "a/2 a/3");
        assert_eq!(page("a/", Some("a/3"), 9), "");
        assert_eq!(page("c/", None, 9), "");
    }

    #[test]
    fn a_file_among_the_blobs_fails_each_commit_until_it_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let mut engine = SledEngine::open(dir.path()).unwrap();
        let stray = dir.path().join("blobs/1");
        for _ in 0..2 {
            engine.commit(&writes([("a", Some(1))])).unwrap();
            durable::replace(&stray, b"x", Access::PRIVATE).unwrap();
            for _ in 0..2 {
                let error = engine.commit(&writes([("b", Some(1))])).unwrap_err().to_string();
                assert!(error.contains("blobs is not empty"), "{error}");
            }
            std::fs::remove_file(&stray).unwrap();
        }
    }

    #[test]
    fn values_of_any_length_come_back_and_never_become_blobs() {
        let dir = tempfile::tempdir().unwrap();
        let mut engine = SledEngine::open(dir.path()).unwrap();
        let lens = [0, 1, PIECE_LEN, PIECE_LEN + 1, 2 * PIECE_LEN, 1_000_000, PIECE_LEN, 70_000, 3];
        for len in lens {
            engine.commit(&writes([("l/grown", Some(len)), ("l/beside", Some(9))])).unwrap();
            assert_eq!(engine.get(b"l/grown").unwrap().unwrap().len(), len);
            assert_eq!(keys(&engine, b"l/", None, 9), ["l/beside", "l/grown"]);
            drop(engine);
            engine = SledEngine::open(dir.path()).unwrap();
            assert_eq!(engine.get(b"l/grown").unwrap(), Some(vec![b'v'; len]));
        }
        assert_eq!(engine.pairs.0.scan_prefix(PIECES).count(), 0, "no piece is left behind");
    }

    #[test]
    fn pages_full_of_longest_pairs_never_become_blobs() {
        let dir = tempfile::tempdir().unwrap();
        let mut engine = SledEngine::open(dir.path()).unwrap();
        let key = |n: usize| format!("k/{}{n:06}", "x".repeat(KEY_LEN_MAX - 8));
        for round in 0..60 {
            let names: Vec<_> = (0..10).map(|n| key((round * 7 + n * 31) % 600)).collect();
            let pairs = names.iter().map(|name| (name.as_str(), Some(PIECE_LEN - 1)));
            engine.commit(&writes(pairs)).unwrap();
            let gone = key((round * 13) % 600);
            engine.commit(&writes([(gone.as_str(), None)])).unwrap();
        }
    }

    #[test]
    fn commits_that_damage_has_cut_off_are_missed_when_it_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let mut engine = SledEngine::open(dir.path()).unwrap();
        for n in 0..20 {
            engine.commit(&writes([(format!("a/{n}").as_str(), Some(200))])).unwrap();
        }
        drop(engine);
        let path = dir.path().join("db");
        let log = std::fs::read(&path).unwrap();
        let at = log.windows(4).position(|bytes| bytes == b"vvvv").unwrap() + 2_000;
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .write_all_at(&[log[at] ^ 1], at as u64)
            .unwrap();
        let refused = SledEngine::open(dir.path()).unwrap_err().to_string();
        assert!(refused.contains("commits that were durable are missing"), "{refused}");
        assert!(refused.contains("restore a backup"), "{refused}");
    }

    #[test]
    fn a_store_in_use_is_refused_in_words() {
        let dir = tempfile::tempdir().unwrap();
        let _held = SledEngine::open(dir.path()).unwrap();
        let refused = SledEngine::open(dir.path()).unwrap_err().to_string();
        assert!(refused.starts_with("another ca-server uses /"), "{refused}");
    }

    fn writes<'a>(pairs: impl IntoIterator<Item = (&'a str, Option<usize>)>) -> Writes {
        pairs
            .into_iter()
            .map(|(key, len)| (key.as_bytes().to_vec(), len.map(|len| vec![b'v'; len])))
            .collect()
    }

    fn keys(engine: &SledEngine, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Vec<String> {
        let pairs = engine.scan(prefix, after, limit).unwrap();
        pairs.into_iter().map(|(key, _)| String::from_utf8(key).unwrap()).collect()
    }
}
