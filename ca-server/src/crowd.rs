//! Who is here: connections in bounded number, of which no one holds more than a share. Whoever comes
//! gets in; where there is no room, the oldest connection of whoever holds most has to go. So a
//! newcomer never waits for those that stall, and a flood from one place pays for itself.
//!
//! Counts and chooses; closing is left to whoever holds the [`Place`].

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll},
};

use tokio::sync::oneshot;

/// Connections, by who holds them.
#[derive(Debug)]
pub struct Crowd<K: Ord + Hash + Copy>(Arc<Mutex<Inner<K>>>);

#[derive(Debug)]
struct Inner<K> {
    places_max: usize,
    share_max: usize,
    next: u64,
    taken: usize,
    /// Oldest first, as the numbers rise. Dropping a sender is what tells the place's holder.
    by_holder: HashMap<K, BTreeMap<u64, oneshot::Sender<()>>>,
    /// Whoever holds most comes last; of those that hold as many, the one with the oldest.
    by_size: BTreeSet<(usize, Reverse<u64>, K)>,
}

/// A place in the crowd, given back when it is dropped.
#[derive(Debug)]
pub struct Place<K: Ord + Hash + Copy> {
    crowd: Arc<Mutex<Inner<K>>>,
    holder: K,
    number: u64,
    evicted: oneshot::Receiver<()>,
}

impl<K: Ord + Hash + Copy> Crowd<K> {
    /// Room for so many, and for so many of one holder.
    #[must_use]
    pub fn new(places_max: usize, share_max: usize) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            places_max: places_max.max(1),
            share_max: share_max.max(1),
            next: 0,
            taken: 0,
            by_holder: HashMap::new(),
            by_size: BTreeSet::new(),
        })))
    }

    /// Takes a place, and says whether another had to go for it.
    #[must_use]
    pub fn enter(&self, holder: K) -> (Place<K>, bool) {
        let mut inner = lock(&self.0);
        let made_room = inner.make_room(holder);
        let number = inner.next;
        inner.next += 1;
        let (tell, evicted) = oneshot::channel();
        inner.change(holder, |places| {
            places.insert(number, tell);
        });
        (Place { crowd: Arc::clone(&self.0), holder, number, evicted }, made_room)
    }

    /// Has the oldest of whoever holds most go; whether there was one.
    pub fn evict_one(&self) -> bool {
        lock(&self.0).evict_of_largest()
    }

    /// Places taken.
    #[must_use]
    pub fn taken(&self) -> usize {
        lock(&self.0).taken
    }
}

impl<K: Ord + Hash + Copy> Place<K> {
    /// Ready once the place was given to another.
    pub fn poll_evicted(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        std::pin::Pin::new(&mut self.evicted).poll(cx).map(|_| ())
    }

    /// Ends once the place was given to another.
    pub async fn evicted(&mut self) {
        std::future::poll_fn(|cx| self.poll_evicted(cx)).await;
    }
}

impl<K: Ord + Hash + Copy> Drop for Place<K> {
    fn drop(&mut self) {
        lock(&self.crowd).remove(self.holder, self.number);
    }
}

impl<K: Ord + Hash + Copy> Inner<K> {
    fn make_room(&mut self, newcomer: K) -> bool {
        let held = self.by_holder.get(&newcomer).map_or(0, BTreeMap::len);
        if held >= self.share_max {
            self.evict_oldest(newcomer)
        } else if self.taken >= self.places_max {
            self.evict_of_largest()
        } else {
            false
        }
    }

    fn evict_of_largest(&mut self) -> bool {
        let largest = self.by_size.last().map(|(_, _, holder)| *holder);
        largest.is_some_and(|holder| self.evict_oldest(holder))
    }

    fn evict_oldest(&mut self, holder: K) -> bool {
        let oldest = self.by_holder.get(&holder).and_then(|places| places.keys().next().copied());
        oldest.is_some_and(|number| self.remove(holder, number))
    }

    /// Whether it was still there.
    fn remove(&mut self, holder: K, number: u64) -> bool {
        let mut removed = None;
        self.change(holder, |places| removed = places.remove(&number));
        removed.is_some()
    }

    /// Changes what a holder has, and what is known of its size.
    fn change(&mut self, holder: K, change: impl FnOnce(&mut BTreeMap<u64, oneshot::Sender<()>>)) {
        let places = self.by_holder.entry(holder).or_default();
        if let Some(oldest) = places.keys().next() {
            self.by_size.remove(&(places.len(), Reverse(*oldest), holder));
        }
        let before = places.len();
        change(places);
        let after = places.len();
        self.taken = self.taken + after - before;
        match places.keys().next() {
            Some(oldest) => {
                self.by_size.insert((after, Reverse(*oldest), holder));
            }
            None => {
                self.by_holder.remove(&holder);
            }
        }
    }
}

fn lock<K>(inner: &Mutex<Inner<K>>) -> MutexGuard<'_, Inner<K>> {
    inner.lock().expect("no code panics while it holds this")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_evicted(place: &mut Place<u8>) -> bool {
        let waker = std::task::Waker::noop();
        place.poll_evicted(&mut Context::from_waker(waker)).is_ready()
    }

    fn enter(crowd: &Crowd<u8>, holders: &[u8]) -> Vec<Place<u8>> {
        holders.iter().map(|&holder| crowd.enter(holder).0).collect()
    }

    fn gone(places: &mut [Place<u8>]) -> Vec<usize> {
        (0..places.len()).filter(|&at| is_evicted(&mut places[at])).collect()
    }

    #[test]
    fn room_is_made_by_the_oldest_of_whoever_holds_most() {
        let rows: [(&str, &[u8], u8, &[usize]); 5] = [
            ("room enough", &[1, 1, 2], 3, &[]),
            ("the largest pays", &[2, 1, 1, 1], 3, &[1]),
            ("the largest pays for itself", &[2, 1, 1, 1], 1, &[1]),
            ("among equals the oldest goes, not the highest number", &[9, 1, 2, 3], 4, &[0]),
            ("among equals the oldest goes, not the lowest number", &[1, 9, 8, 7], 4, &[0]),
        ];
        for (what, there, newcomer, expected) in rows {
            let crowd = Crowd::new(4, 100);
            let mut places = enter(&crowd, there);
            let (mut new, made_room) = crowd.enter(newcomer);
            assert_eq!(gone(&mut places), expected, "{what}");
            assert_eq!(made_room, !expected.is_empty(), "{what}");
            assert!(!is_evicted(&mut new), "{what}: the newcomer itself");
        }
    }

    #[test]
    fn a_holder_at_its_share_pays_though_there_is_room() {
        let crowd = Crowd::new(100, 2);
        let mut places = enter(&crowd, &[1, 2, 1, 1]);
        assert_eq!(gone(&mut places), [0]);
        assert_eq!(crowd.taken(), 3);
    }

    #[test]
    fn a_flood_from_one_place_never_evicts_the_one_of_another() {
        let crowd = Crowd::new(16, 1_000);
        let mut honest = enter(&crowd, &[2]);
        let mut flood = Vec::new();
        for _ in 0..10_000 {
            flood.push(crowd.enter(1).0);
            flood.retain_mut(|place| !is_evicted(place));
        }
        assert_eq!(gone(&mut honest), [0; 0]);
        assert_eq!(crowd.taken(), 16);
    }

    #[test]
    fn what_leaves_gives_its_place_back_once() {
        let crowd = Crowd::new(2, 2);
        let mut places = enter(&crowd, &[1, 1]);
        assert!(crowd.evict_one());
        assert_eq!(crowd.taken(), 1);
        drop(places.remove(0));
        assert_eq!(crowd.taken(), 1, "the evicted one gave back a place it no longer had");
        drop(places);
        assert_eq!(crowd.taken(), 0);
        assert!(!crowd.evict_one());
        let inner = lock(&crowd.0);
        assert!(inner.by_holder.is_empty() && inner.by_size.is_empty(), "something is left behind");
    }
}
