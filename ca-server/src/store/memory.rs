//! An engine that forgets when the process ends: for tests of everything above it.

use std::{
    collections::BTreeMap,
    ops::Bound,
    sync::{Arc, Mutex, MutexGuard},
};

use super::{
    StoreError,
    view::{Engine, Reader, Writes, scan_start},
};

/// Pairs in memory. Clones share them, so that a store can be closed and opened again.
#[derive(Clone, Debug, Default)]
pub struct MemoryEngine(Arc<Mutex<BTreeMap<Vec<u8>, Vec<u8>>>>);

impl MemoryEngine {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn pairs(&self) -> MutexGuard<'_, BTreeMap<Vec<u8>, Vec<u8>>> {
        self.0.lock().expect("no code panics while it holds the pairs")
    }
}

impl Reader for MemoryEngine {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.pairs().get(key).cloned())
    }

    fn scan(
        &self,
        prefix: &[u8],
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<(Vec<u8>, Vec<u8>)>, StoreError> {
        let from = scan_start(prefix, after);
        let pairs = self.pairs();
        Ok(pairs
            .range::<[u8], _>((from, Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(prefix))
            .take(limit)
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect())
    }
}

impl Engine for MemoryEngine {
    fn reader(&self) -> Box<dyn Reader + Send + Sync> {
        Box::new(self.clone())
    }

    fn commit(&mut self, writes: &Writes) -> Result<(), StoreError> {
        let mut pairs = self.pairs();
        for (key, value) in writes {
            match value {
                Some(value) => pairs.insert(key.clone(), value.clone()),
                None => pairs.remove(key),
            };
        }
        Ok(())
    }
}
