//! What many waiting calls want at the same moment is read from the store once: a change wakes every
//! agent of a cluster.

use std::{
    collections::VecDeque,
    fmt::Debug,
    sync::{Arc, Mutex},
};

use tokio::sync::OnceCell;

use crate::store::StoreError;

/// Values kept, newest first: those of a few clusters.
const KEPT_MAX: usize = 16;

type Cell<V> = Arc<OnceCell<Arc<V>>>;

/// Values by key. A key names one state of the store, so that a value never changes.
#[derive(Debug)]
pub struct ReadOnce<K, V>(Mutex<VecDeque<(K, Cell<V>)>>);

impl<K, V> Default for ReadOnce<K, V> {
    fn default() -> Self {
        Self(Mutex::new(VecDeque::new()))
    }
}

impl<K: Eq, V> ReadOnce<K, V> {
    /// The value of a key; whoever asks first reads it, and the others wait for that.
    ///
    /// # Errors
    /// The read's own. The next who asks reads again.
    pub async fn get(
        &self,
        key: K,
        read: impl Future<Output = Result<V, StoreError>>,
    ) -> Result<Arc<V>, StoreError> {
        let cell = self.cell(key);
        cell.get_or_try_init(|| async { read.await.map(Arc::new) }).await.cloned()
    }

    fn cell(&self, key: K) -> Cell<V> {
        let mut kept = self.0.lock().expect("no code panics while it holds the values");
        if let Some((_, cell)) = kept.iter().find(|(of, _)| *of == key) {
            return Arc::clone(cell);
        }
        kept.truncate(KEPT_MAX - 1);
        let cell = Cell::default();
        kept.push_front((key, Arc::clone(&cell)));
        cell
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::refusal::Refusal;

    #[tokio::test]
    async fn what_many_want_at_once_is_read_once_and_a_failure_is_not_kept() {
        let (values, reads) = (ReadOnce::<u64, u64>::default(), AtomicUsize::new(0));
        let read = async |result| {
            reads.fetch_add(1, Ordering::Relaxed);
            tokio::task::yield_now().await;
            result
        };
        let failed = values.get(1, read(Err(Refusal::StoreUnavailable.into()))).await;
        assert!(failed.is_err());
        let both = tokio::join!(values.get(1, read(Ok(7))), values.get(1, read(Ok(8))));
        assert_eq!((*both.0.unwrap(), *both.1.unwrap()), (7, 7));
        assert_eq!(reads.load(Ordering::Relaxed), 2);
        for key in 2..100 {
            values.get(key, read(Ok(0))).await.unwrap();
        }
        assert_eq!(values.0.lock().unwrap().len(), KEPT_MAX);
    }
}
