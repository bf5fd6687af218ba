//! Many rates in fixed memory: a count-min sketch of generic cell rates. A key has one cell in each of
//! four rows, placed by a hash whose seed is drawn at start; what it has used is the least of its
//! cells. Cells are never given up, so there is no eviction that could hand somebody a fresh start:
//! keys that share cells can only be judged too strictly. Which cells a key has, nobody outside can
//! tell; but whoever has keys by the ten thousand can fill them all, so what is counted by a key that
//! strangers can make up must not shut anybody out.
//!
//! Takes any key, and how long it is since some moment that stays the same: the wall clock may jump, and
//! nobody should be locked out by that.

use std::{
    hash::{BuildHasher, Hash, RandomState},
    marker::PhantomData,
    sync::Mutex,
    time::Duration,
};

use super::{Rate, Wait};

const ROWS: usize = 4;
/// Cells of a row: with 8 bytes each, half a MiB for a sketch of many. While 1,000 addresses are over
/// their limit, one in about 80,000 others is judged with them.
const CELLS: usize = 16_384;

/// A rate for each key.
#[derive(Debug)]
pub(super) struct Sketch<K> {
    rate: Rate,
    seeds: [RandomState; ROWS],
    cells: usize,
    /// Row after row. What is used of a cell grows back until this moment, in microseconds.
    whole_at_us: Mutex<Box<[u64]>>,
    key: PhantomData<fn(&K)>,
}

impl<K: Hash> Sketch<K> {
    /// For any number of keys.
    pub(super) fn of_many(rate: Rate) -> Self {
        Self::new(rate, CELLS)
    }

    /// For the one key there is.
    pub(super) fn of_one(rate: Rate) -> Self {
        Self::new(rate, 1)
    }

    fn new(rate: Rate, cells: usize) -> Self {
        Self {
            rate,
            seeds: std::array::from_fn(|_| RandomState::new()),
            cells,
            whole_at_us: Mutex::new(vec![0; ROWS * cells].into_boxed_slice()),
            key: PhantomData,
        }
    }

    /// Takes one, or says how long until there is one. A refused one costs nothing.
    pub(super) fn take(&self, elapsed: Duration, key: &K) -> Wait {
        let now_us = microseconds(elapsed);
        let places = self.places(key);
        let mut whole_at = self.lock();
        let used_until = used_until(now_us, &places, &whole_at);
        let wait = self.wait(now_us, used_until);
        if wait.is_none() {
            let next = used_until + self.rate.period_us;
            for place in places {
                // A cell that others have used more keeps what they used.
                whole_at[place] = whole_at[place].max(next);
            }
        }
        wait
    }

    fn wait(&self, now_us: u64, used_until_us: u64) -> Wait {
        let after = used_until_us + self.rate.period_us;
        let over_us = after.saturating_sub(now_us + self.rate.full_us());
        (over_us > 0).then(|| Duration::from_micros(over_us))
    }

    fn places(&self, key: &K) -> [usize; ROWS] {
        std::array::from_fn(|row| {
            let hash = self.seeds[row].hash_one(key);
            // The remainder is smaller than `cells`, which is a usize.
            row * self.cells + (hash % self.cells as u64) as usize
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Box<[u64]>> {
        self.whole_at_us.lock().expect("no code panics while it holds this")
    }
}

fn used_until(now_us: u64, places: &[usize; ROWS], whole_at: &[u64]) -> u64 {
    places.iter().map(|&place| whole_at[place]).min().unwrap_or_default().max(now_us)
}

fn microseconds(elapsed: Duration) -> u64 {
    u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX / 2)
}
