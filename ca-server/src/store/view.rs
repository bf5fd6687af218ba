//! What a decision sees and writes: the engine's durable state, then what the group of commands
//! before it wrote, then its own writes. A decision that fails leaves nothing behind.

use std::{collections::BTreeMap, ops::Bound};

use prost::Message;
use raymtls_proto::digest::sha256;

use super::{
    StoreError, layout,
    record::Record,
    records::{AuditHead, AuditRecord},
};

/// An ordered key-value space, read.
pub trait Reader {
    /// The value of a key.
    ///
    /// # Errors
    /// The medium cannot be read.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError>;

    /// Up to `limit` pairs whose keys begin with `prefix` and lie after `after`, in key order.
    ///
    /// # Errors
    /// The medium cannot be read.
    fn scan(
        &self,
        prefix: &[u8],
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<(Vec<u8>, Vec<u8>)>, StoreError>;
}

/// The same, that makes a batch durable as a whole or not at all.
pub trait Engine: Reader + Send + 'static {
    /// Reads what is there beside the thread that owns the engine: what was written and is not yet
    /// durable too, and a commit in the making in part.
    fn reader(&self) -> Box<dyn Reader + Send + Sync>;

    /// Makes the writes durable, all or none. `None` deletes.
    ///
    /// # Errors
    /// Final: whether the writes are durable is unknown, and the engine must not be used again.
    fn commit(&mut self, writes: &Writes) -> Result<(), StoreError>;
}

/// Where a scan of `prefix` begins: behind `after`, if that lies in it.
#[must_use]
pub fn scan_start<'a>(prefix: &'a [u8], after: Option<&'a [u8]>) -> Bound<&'a [u8]> {
    match after {
        Some(after) if after >= prefix => Bound::Excluded(after),
        Some(_) | None => Bound::Included(prefix),
    }
}

/// Writes of a commit, by key.
pub type Writes = BTreeMap<Vec<u8>, Option<Vec<u8>>>;

/// The state one decision works on.
pub struct View<'a> {
    engine: &'a dyn Reader,
    group: &'a Writes,
    own: Writes,
    audit_head: AuditHead,
    now_ms: i64,
    started_ms: i64,
    kept: bool,
}

impl<'a> View<'a> {
    /// A view over what is durable and what the group wrote so far.
    #[must_use]
    pub fn new(
        engine: &'a dyn Reader,
        group: &'a Writes,
        audit_head: AuditHead,
        now_ms: i64,
        started_ms: i64,
    ) -> Self {
        Self { engine, group, own: Writes::new(), audit_head, now_ms, started_ms, kept: false }
    }

    /// When this server began to serve. Nobody was out of touch before: nobody could call.
    #[must_use]
    pub fn started_ms(&self) -> i64 {
        self.started_ms
    }

    /// The moment the decision is made at.
    #[must_use]
    pub fn now_ms(&self) -> i64 {
        self.now_ms
    }

    /// What was written so far stands even if the decision is no: an event that is on record although
    /// the answer is a refusal.
    pub fn keep(&mut self) {
        self.kept = true;
    }

    /// Whether the writes stand even if the decision is no.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.kept
    }

    /// What the decision wrote, and where the audit log ends after it.
    #[must_use]
    pub fn into_writes(self) -> (Writes, AuditHead) {
        (self.own, self.audit_head)
    }

    /// Reads a record.
    ///
    /// # Errors
    /// The medium cannot be read, or the record does not decode.
    pub fn get<M: Record>(&self, key: &[u8]) -> Result<Option<M>, StoreError> {
        self.get_raw(key)?.map(|value| decode(key, &value)).transpose()
    }

    /// Reads a value as it is.
    ///
    /// # Errors
    /// The medium cannot be read.
    pub fn get_raw(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        for writes in [&self.own, self.group] {
            if let Some(written) = writes.get(key) {
                return Ok(written.clone());
            }
        }
        self.engine.get(key)
    }

    /// Reads up to `limit` records whose keys begin with `prefix` and lie after `after`.
    ///
    /// # Errors
    /// The medium cannot be read, or a record does not decode.
    pub fn scan<M: Record>(
        &self,
        prefix: &[u8],
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<(Vec<u8>, M)>, StoreError> {
        self.scan_raw(prefix, after, limit)?
            .into_iter()
            .map(|(key, value)| decode(&key, &value).map(|record| (key, record)))
            .collect()
    }

    /// The same with values as they are.
    ///
    /// # Errors
    /// The medium cannot be read.
    pub fn scan_raw(
        &self,
        prefix: &[u8],
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<(Vec<u8>, Vec<u8>)>, StoreError> {
        let written: BTreeMap<_, _> = [self.group, &self.own]
            .into_iter()
            .flat_map(|writes| {
                writes
                    .range::<[u8], _>((scan_start(prefix, after), Bound::Unbounded))
                    .take_while(|(key, _)| key.starts_with(prefix))
            })
            .collect();
        // What is deleted here hides that many of the engine's pairs.
        let hidden = written.values().filter(|value| value.is_none()).count();
        let mut pairs: BTreeMap<_, _> =
            self.engine.scan(prefix, after, limit + hidden)?.into_iter().collect();
        for (key, value) in written {
            match value {
                Some(value) => pairs.insert(key.clone(), value.clone()),
                None => pairs.remove(key),
            };
        }
        Ok(pairs.into_iter().take(limit).collect())
    }

    /// Writes a record.
    pub fn put<M: Message>(&mut self, key: Vec<u8>, record: &M) {
        self.put_raw(key, record.encode_to_vec());
    }

    /// Writes a value as it is.
    pub fn put_raw(&mut self, key: Vec<u8>, value: Vec<u8>) {
        self.own.insert(key, Some(value));
    }

    /// Deletes a key.
    pub fn delete(&mut self, key: Vec<u8>) {
        self.own.insert(key, None);
    }

    /// Appends to the audit log. Index, time and hash of the record before are filled in here.
    pub fn audit(&mut self, record: AuditRecord) {
        let record = AuditRecord {
            index: self.audit_head.index + 1,
            previous_hash: self.audit_head.hash.clone(),
            at_ms: self.now_ms,
            ..record
        };
        let encoded = record.encode_to_vec();
        self.audit_head = AuditHead { index: record.index, hash: audit_hash(&encoded).to_vec() };
        self.put_raw(layout::audit(record.index), encoded);
        self.put(layout::AUDIT_HEAD.to_vec(), &self.audit_head.clone());
    }
}

/// The hash that the next record carries: SHA-256 of the record's bytes as stored.
#[must_use]
pub fn audit_hash(encoded: &[u8]) -> [u8; 32] {
    sha256(encoded)
}

/// The audit head of an empty log.
#[must_use]
pub fn empty_audit_head() -> AuditHead {
    AuditHead { index: 0, hash: vec![0; 32] }
}

/// Reads a value as the record it is.
///
/// # Errors
/// `Damaged`.
pub fn decode<M: Record>(key: &[u8], value: &[u8]) -> Result<M, StoreError> {
    M::read(value)
        .map_err(|why| StoreError::Damaged { key: String::from_utf8_lossy(key).into_owned(), why })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::MemoryEngine;

    #[test]
    fn a_scan_sees_through_what_was_deleted_and_written_since() {
        let key = |name: &str| format!("n/{name}").into_bytes();
        let write = |name: &str| (key(name), Some(name.as_bytes().to_vec()));
        let mut engine = MemoryEngine::new();
        let durable = ["a", "b", "c", "d", "e", "g"].map(write);
        engine
            .commit(&durable.into_iter().chain([(b"o/".to_vec(), Some(vec![]))]).collect())
            .unwrap();
        let group = Writes::from([(key("a"), None), (key("c"), None), write("f")]);
        let mut view = View::new(&engine, &group, empty_audit_head(), 0, 0);
        view.delete(key("b"));
        view.put_raw(key("c"), b"again".to_vec());

        let found = |after: Option<&str>, limit| {
            let after = after.map(key);
            let rows = view.scan_raw(b"n/", after.as_deref(), limit).unwrap();
            rows.into_iter().map(|(key, _)| String::from_utf8(key).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(found(None, 9), ["n/c", "n/d", "n/e", "n/f", "n/g"]);
        // As many as were asked for, whatever is hidden before them.
        assert_eq!(found(None, 3), ["n/c", "n/d", "n/e"]);
        assert_eq!(found(Some("d"), 2), ["n/e", "n/f"]);
        assert_eq!(found(Some("g"), 2), Vec::<String>::new());
        assert_eq!(view.get_raw(&key("c")).unwrap().unwrap(), b"again");
    }
}
