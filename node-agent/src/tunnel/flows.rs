//! The flows of now, by peer: what a revocation or an expiry cuts, and what the status tells. It
//! judges nothing and holds no socket.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::sync::oneshot;

use super::{
    control::{PEERS_MAX, Peer},
    reason::{Reason, Refused},
    verifier::PeerLeaf,
};

/// Which way a flow was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From this host.
    Out,
    /// To this host.
    In,
}

impl Direction {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Out => "out",
            Self::In => "in",
        }
    }
}

/// What was counted since the start.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) flows_out: AtomicU64,
    pub(crate) flows_in: AtomicU64,
    pub(crate) flows_cut: AtomicU64,
    pub(crate) bytes_out: AtomicU64,
    pub(crate) bytes_in: AtomicU64,
    pub(crate) handshakes_done: AtomicU64,
    pub(crate) proofs: AtomicU64,
    refusals: [AtomicU64; Reason::ALL.len()],
}

impl Counters {
    pub(crate) fn refused(&self, reason: Reason) {
        let at = Reason::ALL.iter().position(|known| *known == reason);
        self.refusals[at.expect("ALL has every reason")].fetch_add(1, Relaxed);
    }

    /// Those that happened, with their number.
    pub(crate) fn refusals(&self) -> impl Iterator<Item = (Reason, u64)> {
        let counted = Reason::ALL.iter().zip(&self.refusals);
        counted.map(|(reason, count)| (*reason, count.load(Relaxed))).filter(|(_, n)| *n > 0)
    }
}

/// All flows of now.
#[derive(Debug)]
pub(crate) struct Flows {
    pub(crate) counters: Counters,
    max: usize,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    len: usize,
    peers: HashMap<IpAddr, Peers>,
}

#[derive(Debug)]
struct Peers {
    /// The leaf of the newest handshake that ends last.
    newest: Arc<PeerLeaf>,
    flows: HashMap<u64, Live>,
}

#[derive(Debug)]
struct Live {
    leaf: Arc<PeerLeaf>,
    /// By the clock that does not jump.
    since: Duration,
    cut: oneshot::Sender<Reason>,
}

/// A flow's place in the table, for as long as it is held.
#[derive(Debug)]
pub(crate) struct Place {
    flows: Arc<Flows>,
    id: u64,
    address: IpAddr,
    /// Says why the flow is to end now.
    pub(crate) cut: oneshot::Receiver<Reason>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut table = self.flows.table();
        table.len -= 1;
        let Some(peer) = table.peers.get_mut(&self.address) else { return };
        peer.flows.remove(&self.id);
        if peer.flows.is_empty() {
            table.peers.remove(&self.address);
        }
    }
}

/// Flows with one peer that were cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    pub(crate) address: IpAddr,
    pub(crate) name: String,
    pub(crate) reason: Reason,
    pub(crate) flows: u64,
}

impl Flows {
    /// A table with so many places.
    pub(crate) fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { counters: Counters::default(), max, table: Mutex::default() })
    }

    /// Whether there is a place now: asked before anything is spent on a flow.
    ///
    /// # Errors
    /// All are taken.
    pub(crate) fn has_place(&self) -> Result<(), Refused> {
        self.fits(self.table().len)
    }

    fn fits(&self, len: usize) -> Result<(), Refused> {
        if len >= self.max {
            let why = format!("{len} flows, at most {} are carried", self.max);
            return Err(Refused::new(Reason::TooMany, why));
        }
        Ok(())
    }

    /// Takes a place.
    ///
    /// # Errors
    /// All are taken.
    pub(crate) fn enter(
        self: &Arc<Self>,
        direction: Direction,
        address: IpAddr,
        leaf: PeerLeaf,
        now: Duration,
    ) -> Result<Place, Refused> {
        let mut table = self.table();
        self.fits(table.len)?;
        let (sender, cut) = oneshot::channel();
        let id = table.next;
        table.next += 1;
        table.len += 1;
        let leaf = Arc::new(leaf);
        let peer = table
            .peers
            .entry(address)
            .or_insert_with(|| Peers { newest: leaf.clone(), flows: HashMap::new() });
        let leaf = peer.see(leaf);
        peer.flows.insert(id, Live { leaf, since: now, cut: sender });
        drop(table);
        match direction {
            Direction::Out => &self.counters.flows_out,
            Direction::In => &self.counters.flows_in,
        }
        .fetch_add(1, Relaxed);
        Ok(Place { flows: self.clone(), id, address, cut })
    }

    /// A peer showed this leaf in a handshake without a flow.
    pub(crate) fn saw(&self, address: IpAddr, leaf: PeerLeaf) {
        if let Some(peer) = self.table().peers.get_mut(&address) {
            peer.see(Arc::new(leaf));
        }
    }

    /// The peers there are flows with.
    pub(crate) fn peers(&self) -> Vec<Peer> {
        let table = self.table();
        let told = table.peers.iter().take(PEERS_MAX).map(|(address, peer)| Peer {
            address: *address,
            name: peer.newest.name.to_string(),
            not_after_unix: peer.newest.not_after_unix,
            flows: u64::try_from(peer.flows.len()).unwrap_or(u64::MAX),
        });
        told.collect()
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.table().len
    }

    /// When the oldest began.
    pub(crate) fn oldest(&self) -> Option<Duration> {
        let table = self.table();
        table.peers.values().flat_map(|peer| peer.flows.values()).map(|flow| flow.since).min()
    }

    /// Cuts all flows for which there is a reason, which is asked for with the peer's address, the
    /// newest leaf it showed, and the one of the flow.
    pub(crate) fn cut(
        &self,
        reason: impl Fn(IpAddr, &PeerLeaf, &PeerLeaf) -> Option<Reason>,
    ) -> Vec<Cut> {
        let mut cuts: Vec<Cut> = Vec::new();
        let mut table = self.table();
        for (address, peer) in &mut table.peers {
            let newest = peer.newest.clone();
            let first = cuts.len();
            for (_, flow) in
                peer.flows.extract_if(|_, flow| reason(*address, &newest, &flow.leaf).is_some())
            {
                let Some(reason) = reason(*address, &newest, &flow.leaf) else { continue };
                let _ = flow.cut.send(reason);
                match cuts[first..].iter_mut().find(|cut| cut.reason == reason) {
                    Some(cut) => cut.flows += 1,
                    None => {
                        let name = newest.name.to_string();
                        cuts.push(Cut { address: *address, name, reason, flows: 1 });
                    }
                }
            }
        }
        drop(table);
        self.counters.flows_cut.fetch_add(cuts.iter().map(|cut| cut.flows).sum(), Relaxed);
        cuts
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("no code panics while it holds the table")
    }
}

impl Peers {
    /// Keeps the one that ends last; returns one that is equal to the given, shared where it can be.
    fn see(&mut self, leaf: Arc<PeerLeaf>) -> Arc<PeerLeaf> {
        if leaf == self.newest {
            return self.newest.clone();
        }
        if leaf.name != self.newest.name || leaf.not_after_unix >= self.newest.not_after_unix {
            self.newest = leaf.clone();
        }
        leaf
    }
}

/// Handshakes under way, bounded in all and for each address.
#[derive(Debug)]
pub(crate) struct Handshakes {
    max: usize,
    each_max: usize,
    now: Mutex<(usize, HashMap<IpAddr, usize>)>,
}

/// A place for a handshake.
#[derive(Debug)]
pub(crate) struct Turn {
    handshakes: Arc<Handshakes>,
    address: IpAddr,
}

impl Handshakes {
    pub(crate) fn new(max: usize, each_max: usize) -> Arc<Self> {
        Arc::new(Self { max, each_max, now: Mutex::default() })
    }

    /// A place, if one is free.
    ///
    /// # Errors
    /// Too many in all, or with this address.
    pub(crate) fn take(self: &Arc<Self>, address: IpAddr) -> Result<Turn, Refused> {
        let mut now = self.lock();
        let (all, each) = &mut *now;
        let held = each.get(&address).copied().unwrap_or(0);
        if *all >= self.max || held >= self.each_max {
            let why = format!(
                "{all} handshakes are under way, {held} of them with {address}; at most {} and {}",
                self.max, self.each_max
            );
            return Err(Refused::new(Reason::TooMany, why));
        }
        *all += 1;
        each.insert(address, held + 1);
        drop(now);
        Ok(Turn { handshakes: self.clone(), address })
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.lock().0
    }

    fn lock(&self) -> MutexGuard<'_, (usize, HashMap<IpAddr, usize>)> {
        self.now.lock().expect("no code panics while it holds the count")
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut now = self.handshakes.lock();
        let (all, each) = &mut *now;
        *all -= 1;
        if let Some(held) = each.get_mut(&self.address) {
            *held -= 1;
            if *held == 0 {
                each.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(name: &str, serial: u8, not_after_unix: i64) -> PeerLeaf {
        PeerLeaf {
            name: name.parse().unwrap(),
            serial: raymtls_proto::serial::Serial::from_slice(&[1, serial]).unwrap(),
            issuer_der: vec![1],
            not_after_unix,
        }
    }

    fn enter(flows: &Arc<Flows>, address: &str, leaf: PeerLeaf) -> Place {
        flows.enter(Direction::Out, address.parse().unwrap(), leaf, Duration::ZERO).unwrap()
    }

    #[test]
    fn a_cut_tells_the_flow_and_counts_it_once() {
        let flows = Flows::new(10);
        let mut hit = enter(&flows, "192.0.2.2", leaf("w1", 1, 10));
        let mut spared = enter(&flows, "192.0.2.3", leaf("w2", 2, 10));
        let w1 = |address: IpAddr, _: &PeerLeaf, _: &PeerLeaf| {
            (address.to_string() == "192.0.2.2").then_some(Reason::Blocked)
        };
        let cuts = flows.cut(w1);
        assert_eq!((cuts.len(), cuts[0].flows, cuts[0].name.as_str()), (1, 1, "w1"));
        assert_eq!(hit.cut.try_recv(), Ok(Reason::Blocked));
        assert!(spared.cut.try_recv().is_err());
        assert!(flows.cut(w1).is_empty());
        assert_eq!(flows.len(), 2, "a flow has its place until it is gone");
        drop((hit, spared));
        assert_eq!((flows.len(), flows.peers().len()), (0, 0));
        assert_eq!(flows.counters.flows_cut.load(Relaxed), 1);
    }

    #[test]
    fn the_leaf_that_ends_last_counts_for_all_flows_of_a_peer() {
        let flows = Flows::new(10);
        let address = "192.0.2.2".parse().unwrap();
        let _flow = enter(&flows, "192.0.2.2", leaf("w1", 1, 10));
        flows.saw(address, leaf("w1", 2, 30));
        flows.saw(address, leaf("w1", 3, 20));
        assert_eq!(flows.peers()[0].not_after_unix, 30);
        // Another node at the address: the old one's leaf counts no more.
        flows.saw(address, leaf("w9", 4, 20));
        assert_eq!(flows.peers()[0].not_after_unix, 20);
    }

    #[test]
    fn places_and_handshakes_are_bounded() {
        let flows = Flows::new(1);
        let held = enter(&flows, "192.0.2.2", leaf("w1", 1, 10));
        assert_eq!(flows.has_place().unwrap_err().reason, Reason::TooMany);
        drop(held);
        assert!(flows.has_place().is_ok());

        let handshakes = Handshakes::new(3, 2);
        let (one, two) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        let held = [handshakes.take(one).unwrap(), handshakes.take(one).unwrap()];
        assert!(handshakes.take(one).is_err(), "each");
        let other = handshakes.take(two).unwrap();
        assert!(handshakes.take(two).is_err(), "in all");
        drop(held);
        assert!(handshakes.take(one).is_ok());
        drop(other);
        assert_eq!(handshakes.len(), 0);
    }
}
