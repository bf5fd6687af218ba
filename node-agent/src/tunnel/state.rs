//! What all parts of the process share: what is in force, the flows, the counts.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex, RwLock,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{
    control::{NONCE_LEN, Reloaded, Status},
    expiry::Away,
    flows::{Cut, Direction, Flows, Handshakes},
    inforce::{InForce, LoadError},
    quiet::Quiet,
    reason::Refused,
};
use raymtls_proto::clock::Clock;

/// Most flows, where the descriptors suffice.
const FLOWS_MAX: usize = 65_536;
/// Most handshakes under way, in all and with one address.
const HANDSHAKES_MAX: usize = 4_096;
const HANDSHAKES_EACH_MAX: usize = 256;

/// The process.
#[derive(Debug)]
pub(crate) struct Tunnel {
    pub(crate) rules_path: PathBuf,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) flows: Arc<Flows>,
    /// Those of others with this host.
    pub(crate) handshakes_in: Arc<Handshakes>,
    /// Those of this host with others.
    pub(crate) handshakes_out: Arc<Handshakes>,
    /// Where every node's tunnel is dialled: the port of this one.
    pub(crate) inbound_port: u16,
    /// Ports of the tunnel itself, which nobody reaches through it.
    pub(crate) own_ports: Vec<u16>,
    pub(crate) nonce: Mutex<Option<[u8; NONCE_LEN]>>,
    /// One more reference than connections that were accepted and carry no flow yet.
    taken: Arc<()>,
    in_force: RwLock<Arc<InForce>>,
    stale: Mutex<Option<String>>,
    reloading: Mutex<()>,
    is_draining: AtomicBool,
    quiet: Quiet,
}

impl Tunnel {
    /// With what is in force at the start and so many descriptors.
    ///
    /// # Errors
    /// Rules or key folder are of no use.
    pub(crate) fn new(
        rules_path: PathBuf,
        clock: Arc<dyn Clock>,
        descriptors_max: usize,
        inbound_port: u16,
        own_ports: Vec<u16>,
    ) -> Result<Self, LoadError> {
        let in_force = InForce::load(&rules_path, &clock)?;
        // Two descriptors a flow, and half of all for handshakes and the rest.
        let flows_max = FLOWS_MAX.min(descriptors_max / 4).max(1);
        let handshakes_max = HANDSHAKES_MAX.min(descriptors_max / 8).max(1);
        let handshakes = || Handshakes::new(handshakes_max, HANDSHAKES_EACH_MAX);
        Ok(Self {
            rules_path,
            clock,
            flows: Flows::new(flows_max),
            handshakes_in: handshakes(),
            handshakes_out: handshakes(),
            inbound_port,
            own_ports,
            nonce: Mutex::default(),
            taken: Arc::default(),
            in_force: RwLock::new(Arc::new(in_force)),
            stale: Mutex::default(),
            reloading: Mutex::default(),
            is_draining: AtomicBool::new(false),
            quiet: Quiet::default(),
        })
    }

    /// What is in force now.
    pub(crate) fn in_force(&self) -> Arc<InForce> {
        self.in_force.read().expect("no code panics while it swaps").clone()
    }

    /// Seconds since 1970.
    pub(crate) fn now_unix(&self) -> i64 {
        self.clock.now().unix_timestamp()
    }

    /// Reads rules and key folder anew, puts them in force and cuts what they forbid.
    ///
    /// # Errors
    /// What was in force stays so.
    pub(crate) fn reload(&self) -> Result<Reloaded, LoadError> {
        let _one_at_a_time = self.reloading.lock().expect("a reload does not panic");
        let new = match InForce::load(&self.rules_path, &self.clock) {
            Ok(new) => Arc::new(new),
            Err(error) => {
                *self.stale.lock().expect("no code panics here") = Some(error.to_string());
                return Err(error);
            }
        };
        *self.in_force.write().expect("no code panics while it swaps") = new.clone();
        *self.stale.lock().expect("no code panics here") = None;
        let cuts = self.flows.cut(|address, newest, leaf| {
            let judge = new.judge(address);
            let judged = judge.leaf(leaf, address).and_then(|()| judge.leaf(newest, address));
            judged.err().map(|refused| refused.reason)
        });
        say_cuts(&cuts);
        Ok(Reloaded {
            generation: new.rules.generation,
            serial: hex::encode(new.credentials.facts.serial.as_bytes()),
            flows_cut: cuts.iter().map(|cut| cut.flows).sum(),
        })
    }

    /// Why the newest rules or key folder are not in force.
    pub(crate) fn stale(&self) -> Option<String> {
        self.stale.lock().expect("no code panics here").clone()
    }

    /// Counts a refusal and says it, once in a while.
    pub(crate) fn refused(&self, direction: Direction, peer: SocketAddr, refused: &Refused) {
        self.flows.counters.refused(refused.reason);
        let said = self.quiet.says(refused.reason, peer.ip(), self.clock.elapsed());
        if let Some(left_out) = said {
            tracing::warn!(
                reason = %refused.reason, direction = direction.as_str(),
                peer = %peer.ip(), port = peer.port(), left_out,
                "a flow was refused: {}", refused.why
            );
        }
    }

    /// Held from accept until a flow has its place, or none comes of it.
    pub(crate) fn taking(&self) -> Arc<()> {
        self.taken.clone()
    }

    /// Whether anything that was accepted lives.
    pub(crate) fn is_idle(&self) -> bool {
        Arc::strong_count(&self.taken) == 1 && self.flows.len() == 0
    }

    /// From now on nothing new is accepted.
    pub(crate) fn drain(&self) {
        self.is_draining.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::SeqCst)
    }

    /// How it stands.
    pub(crate) fn status(&self) -> Status {
        use std::sync::atomic::Ordering::Relaxed;
        let in_force = self.in_force();
        let facts = &in_force.credentials.facts;
        let away = Away::of(&in_force.rules, self.now_unix());
        let counters = &self.flows.counters;
        let peers = self.flows.peers();
        let own_end = facts.not_after.unix_timestamp();
        let ends = peers.iter().map(|peer| peer.not_after_unix).chain([own_end]);
        let len = |len: usize| u64::try_from(len).unwrap_or(u64::MAX);
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            generation: in_force.rules.generation,
            key_folder: in_force.rules.key_folder.display().to_string(),
            serial: hex::encode(facts.serial.as_bytes()),
            not_after_unix: own_end,
            stale: self.stale(),
            accepting: !self.is_draining(),
            ca_away_since_unix: away.since_unix(),
            first_cut_unix: ends.map(|end| away.cut_unix(end)).min(),
            flows_now: len(self.flows.len()),
            flows_out: counters.flows_out.load(Relaxed),
            flows_in: counters.flows_in.load(Relaxed),
            flows_cut: counters.flows_cut.load(Relaxed),
            bytes_out: counters.bytes_out.load(Relaxed),
            bytes_in: counters.bytes_in.load(Relaxed),
            handshakes_now: len(self.handshakes_in.len() + self.handshakes_out.len()),
            handshakes_done: counters.handshakes_done.load(Relaxed),
            refusals: counters.refusals().collect(),
            oldest_flow_seconds: self
                .flows
                .oldest()
                .map(|since| self.clock.elapsed().saturating_sub(since).as_secs()),
            proofs: counters.proofs.load(Relaxed),
            peers,
        }
    }
}

/// Cuts are said each: there are as many as peers.
pub(crate) fn say_cuts(cuts: &[Cut]) {
    for cut in cuts {
        let Cut { address, name, reason, flows } = cut;
        tracing::warn!(peer = %address, %name, %reason, flows, "flows were cut");
    }
}
