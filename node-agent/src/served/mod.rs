//! What Ray serves on this host, which is what counts: Ray reads its TLS files once, at process
//! start, so the date of a file says nothing of a process that runs.
//!
//! [`look`] is the whole of it: `proc` finds Ray's listening sockets, `probe` shakes hands with each,
//! `horizon` judges what they serve, and [`Served`] is what the agent says of it. It changes nothing
//! and ends no process.

pub mod command;
pub mod horizon;
pub mod job;
mod kept;
pub mod kind;
pub mod probe;
pub mod proc;
pub mod sockets;
pub mod table;
#[cfg(test)]
pub(crate) mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use raymtls_proto::{
    clock::Clock,
    leaf::LeafFacts,
    v1::{self, CertificateChain},
};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use time::OffsetDateTime;
use tokio::{sync::oneshot, time::timeout};
use x509_parser::prelude::{FromDer, X509Name};

use self::{
    horizon::{Leaf, State, Trust, Worth},
    job::Job,
    kind::{Class, Kind, printable},
    probe::{Answer, Hello, Limits, Prober, SetupError},
    proc::{Blind, Bounds, Found, Search, Socket},
};
use crate::{keys::PrivateKey, moment::Moment};

/// Why it could not be found out.
#[derive(Debug, Error)]
pub enum ServedError {
    /// /proc.
    #[error("cannot read the sockets of this host from /proc: {0}")]
    Proc(#[from] io::Error),
    /// A file of /proc does not come to its end.
    #[error(
        "the search for Ray's sockets in /proc has not ended after {}s: the host is busy, or a \
         process there cannot be read: look for one in state D, or with very many open files",
        .0.as_secs()
    )]
    Stuck(Duration),
}

/// What one look needs.
#[derive(Clone, Debug)]
pub struct Look {
    /// Where to find the sockets, and whose they may be.
    pub search: Search,
    /// How to ask them.
    pub prober: Prober,
    /// What counts.
    pub trust: Trust,
}

impl Look {
    /// With the leaf and key of one key folder. Whoever names itself as that leaf does counts.
    ///
    /// # Errors
    /// Leaf and key are of no use.
    pub fn new(
        chain: &CertificateChain,
        key: &PrivateKey,
        bundle: &v1::TrustBundle,
        plan: v1::PortPlan,
        uids: Vec<u32>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, SetupError> {
        let uris = LeafFacts::parse(&chain.leaf_der).map(|facts| facts.uris).unwrap_or_default();
        Ok(Self {
            search: Search { proc: "/proc".into(), uids, plan, bounds: Bounds::default() },
            prober: Prober::new(chain, key, clock, Limits::default())?,
            trust: Trust::new(bundle, uris),
        })
    }
}

/// What is known from one look to the next.
#[derive(Debug, Default)]
pub struct Memory {
    /// Sockets that answered, and not in TLS: they are not asked again, since HTTP servers log each
    /// greeting of TLS.
    plain: BTreeSet<u64>,
    /// A search that has not ended yet: no second one is begun beside it.
    search: Option<oneshot::Receiver<io::Result<Found>>>,
}

/// What Ray serves on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Served {
    /// When this was true.
    pub as_of: Moment,
    /// The worst state of the node's processes; absent where none of them listens.
    pub state: Option<State>,
    /// The running horizon: the earliest end of a leaf that one of the node's processes serves.
    pub horizon: Option<Moment>,
    /// The worst state of the drivers on this host.
    pub drivers_state: Option<State>,
    /// The earliest end of a leaf that a driver on this host serves.
    pub drivers_horizon: Option<Moment>,
    /// The processes, those whose horizon matters most first.
    pub processes: Vec<ProcessServed>,
    /// What could not be seen, in words.
    pub blind: Vec<String>,
}

/// What one process serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessServed {
    /// Its number; absent where it cannot be seen.
    pub pid: Option<u32>,
    /// Who runs it.
    pub uid: u32,
    /// What it says it is.
    pub kind: Kind,
    /// Whether it goes with the node, or is a user's.
    pub class: Class,
    /// Title or program.
    pub name: String,
    /// Ray's session, where the process names it.
    pub session: Option<String>,
    /// The job of Ray that a driver belongs to, where its open files tell.
    #[serde(default)]
    pub job: Option<Job>,
    /// Where it stands; absent where it serves no leaf and need not.
    pub state: Option<State>,
    /// The earliest end of a leaf it serves.
    pub horizon: Option<Moment>,
    /// Its listening sockets.
    pub sockets: Vec<SocketServed>,
}

/// What one socket serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketServed {
    /// Where it is bound.
    pub address: String,
    /// Which port of the cluster's plan it is.
    pub port: Option<String>,
    /// What it serves.
    pub serves: Serves,
}

/// What a socket serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum Serves {
    /// A leaf of this node, which counts.
    Leaf {
        /// Serial number.
        serial: String,
        /// When the CA issued it.
        issued: Moment,
        /// Its last moment.
        not_after: Moment,
        /// Names of the CAs it trusts.
        trusts: Vec<String>,
        /// Why it refused this node's leaf, if it did, or that it hung up on it.
        refused_us: Option<String>,
        /// The CA has revoked its key. Ray asks nobody, and takes it until it ends.
        #[serde(default)]
        revoked: bool,
    },
    /// Another certificate, which does not.
    Foreign {
        /// Why it does not count.
        why: String,
        /// Serial number.
        serial: Option<String>,
        /// Its last moment.
        not_after: Option<Moment>,
        /// Names of the CAs it trusts.
        trusts: Vec<String>,
        /// Why it refused this node's leaf, if it did.
        refused_us: Option<String>,
    },
    /// Without TLS, HTTP mostly: open to whoever reaches it.
    Plain {
        /// It answered so; else it is known of such a process, and was not asked.
        seen: bool,
    },
    /// No certificate.
    None {
        /// Why.
        why: String,
    },
    /// It was not asked.
    NotAsked {
        /// Why.
        why: String,
    },
}

/// Looks once at what Ray serves.
///
/// # Errors
/// The sockets of this host cannot be listed.
pub async fn look(
    look: &Look,
    memory: &mut Memory,
    now: OffsetDateTime,
) -> Result<Served, ServedError> {
    let found = memory.search(&look.search).await?;
    let crowd = Crowd::of(&found.sockets);
    let ask = |socket| memory.ask(socket, &crowd);
    let plan: Vec<Ask> = found.sockets.iter().map(ask).collect();
    let asked = found.sockets.iter().zip(&plan).filter(|(_, ask)| **ask == Ask::Dial);
    let addrs = asked.map(|(socket, _)| dialled(socket.addr)).collect();
    let mut answers = look.prober.ask_all(addrs).await.into_iter();
    let answers: Vec<Option<Answer>> =
        plan.iter().map(|ask| if *ask == Ask::Dial { answers.next() } else { None }).collect();
    memory.learn(&found, &answers);
    Ok(tell(found, &plan, answers, &look.trust, now))
}

fn begin(search: Search) -> io::Result<oneshot::Receiver<io::Result<Found>>> {
    let (answer, pending) = oneshot::channel();
    let run = move || {
        // Whoever asked may have gone.
        let _ = answer.send(search.run());
    };
    std::thread::Builder::new().name("served".to_owned()).spawn(run)?;
    Ok(pending)
}

/// Whether a socket is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ask {
    Dial,
    KnownPlain,
    SeenPlain,
    Elsewhere,
    Shared,
    TasksOwn,
}

/// What each socket means beside the others.
struct Crowd {
    /// The processes that listen at each address.
    holders: BTreeMap<SocketAddr, BTreeSet<Option<u32>>>,
    /// Those that listen on a port of the plan that Ray's TLS covers.
    on_plan: BTreeSet<u32>,
}

impl Crowd {
    fn of(sockets: &[Socket]) -> Self {
        let mut crowd = Self { holders: BTreeMap::new(), on_plan: BTreeSet::new() };
        for socket in sockets.iter().filter(|socket| !socket.elsewhere) {
            crowd.holders.entry(socket.addr).or_default().insert(socket.pid());
            if socket.port.is_some_and(|port| port.row().tls) {
                crowd.on_plan.extend(socket.pid());
            }
        }
        crowd
    }

    /// Whether what answers where this socket is dialled may be another process: a task can bind the
    /// same port once more (SO_REUSEPORT), or bind loopback where the socket is bound to all
    /// addresses.
    fn is_shared(&self, socket: &Socket) -> bool {
        let of_another = |addr: &SocketAddr| {
            let mut pids = self.holders.get(addr).into_iter().flatten();
            pids.any(|pid| *pid != socket.pid())
        };
        of_another(&socket.addr) || dialled(socket.addr).iter().any(of_another)
    }

    /// Whether a task or a driver opened it for its own ends: Ray's own port of such a process is
    /// another one. What listens there would print the greeting to its user.
    fn is_tasks_own(&self, socket: &Socket) -> bool {
        let runs_users_code =
            matches!(socket.kind(), Kind::Worker | Kind::Driver | Kind::RayClientDriver);
        let has_rays = socket.pid().is_some_and(|pid| self.on_plan.contains(&pid));
        runs_users_code && socket.port.is_none() && has_rays
    }
}

impl Memory {
    /// In a thread of its own: to read of a process can block for as long as the process likes, and
    /// neither the daemon nor its end waits for that.
    async fn search(&mut self, search: &Search) -> Result<Found, ServedError> {
        let wait = search.bounds.wait;
        let pending = match self.search.take() {
            Some(pending) => pending,
            None => begin(search.clone())?,
        };
        let pending = self.search.insert(pending);
        let found = timeout(wait, pending).await.map_err(|_| ServedError::Stuck(wait))?;
        self.search = None;
        Ok(found.map_err(io::Error::other)??)
    }

    fn ask(&self, socket: &Socket, crowd: &Crowd) -> Ask {
        if socket.elsewhere {
            Ask::Elsewhere
        } else if crowd.is_tasks_own(socket) {
            Ask::TasksOwn
        } else if crowd.is_shared(socket) {
            Ask::Shared
        } else if socket.kind().is_plain_on(socket.port) {
            Ask::KnownPlain
        } else if self.plain.contains(&socket.inode) {
            Ask::SeenPlain
        } else {
            Ask::Dial
        }
    }

    /// No more is kept than there are sockets.
    fn learn(&mut self, found: &Found, answers: &[Option<Answer>]) {
        let plain = found.sockets.iter().zip(answers).filter(|(socket, answer)| {
            matches!(answer, Some(Answer::Plain)) || self.plain.contains(&socket.inode)
        });
        self.plain = plain.map(|(socket, _)| socket.inode).collect();
    }
}

/// The addresses that lead to a socket from this host.
fn dialled(bound: SocketAddr) -> Vec<SocketAddr> {
    let at = |ip: IpAddr| SocketAddr::new(ip, bound.port());
    match bound.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => vec![at(Ipv4Addr::LOCALHOST.into())],
        // Mostly of both families; a host may have no IPv6 loopback.
        IpAddr::V6(ip) if ip.is_unspecified() => {
            vec![at(Ipv6Addr::LOCALHOST.into()), at(Ipv4Addr::LOCALHOST.into())]
        }
        IpAddr::V4(_) | IpAddr::V6(_) => vec![bound],
    }
}

/// Puts together what was found and answered.
fn tell(
    found: Found,
    plan: &[Ask],
    answers: Vec<Option<Answer>>,
    trust: &Trust,
    now: OffsetDateTime,
) -> Served {
    let mut judged = Judged { trust, now, worths: BTreeMap::new() };
    // In the order found: a process's sockets stand side by side.
    let mut groups: Vec<(ProcessServed, Vec<Leaf>)> = Vec::new();
    for ((socket, ask), answer) in found.sockets.iter().zip(plan).zip(answers) {
        let (serves, leaf) = judged.serves(*ask, answer);
        let served = SocketServed {
            address: socket.addr.to_string(),
            port: socket.port.map(|port| port.row().name.to_owned()),
            serves,
        };
        let pid = socket.pid();
        let same = groups.last_mut().filter(|(last, _)| pid.is_some() && last.pid == pid);
        match same {
            Some((process, leaves)) => {
                process.sockets.push(served);
                leaves.extend(leaf);
            }
            None => groups.push((begun(socket, served), leaf.into_iter().collect())),
        }
    }
    summed(groups, &found.blind, now)
}

fn begun(socket: &Socket, first: SocketServed) -> ProcessServed {
    let kind = socket.kind();
    let process = socket.process.as_ref();
    ProcessServed {
        pid: socket.pid(),
        uid: socket.uid,
        kind,
        class: kind.class(),
        name: process.map(|process| process.name.clone()).unwrap_or_default(),
        session: process.and_then(|process| process.session.clone()),
        job: process.and_then(|process| process.job.clone()),
        state: None,
        horizon: None,
        sockets: vec![first],
    }
}

fn summed(
    mut groups: Vec<(ProcessServed, Vec<Leaf>)>,
    blind: &Blind,
    now: OffsetDateTime,
) -> Served {
    for (process, leaves) in &mut groups {
        process.horizon = horizon::earliest(&*leaves).map(Moment::from);
        let here = process.sockets.iter().any(SocketServed::is_here);
        process.state = horizon::state_of_process(process.kind, leaves, now)
            .filter(|_| here && !process.is_on_its_own());
    }
    let processes: Vec<ProcessServed> = groups.into_iter().map(|(process, _)| process).collect();
    let of = |class: Class| processes.iter().filter(move |process| process.class == class);
    Served {
        as_of: now.into(),
        state: of(Class::Node).filter_map(|process| process.state).max(),
        horizon: of(Class::Node).filter_map(|process| process.horizon).min(),
        drivers_state: of(Class::Driver).filter_map(|process| process.state).max(),
        drivers_horizon: of(Class::Driver).filter_map(|process| process.horizon).min(),
        blind: blind.sentences(),
        processes,
    }
}

impl ProcessServed {
    /// A program that uses Ray and listens for its own ends alone: it owes nobody a leaf.
    fn is_on_its_own(&self) -> bool {
        let is_own = |socket: &SocketServed| {
            socket.port.is_none() && matches!(socket.serves, Serves::Plain { .. })
        };
        self.kind == Kind::Driver && self.sockets.iter().all(is_own)
    }
}

impl SocketServed {
    /// Whether it did not take this node's leaf.
    #[must_use]
    pub fn refuses(&self) -> bool {
        match &self.serves {
            Serves::Leaf { refused_us, .. } => refused_us.is_some(),
            // Whoever is a stranger may refuse us.
            Serves::Foreign { .. }
            | Serves::Plain { .. }
            | Serves::None { .. }
            | Serves::NotAsked { .. } => false,
        }
    }

    fn is_here(&self) -> bool {
        !matches!(&self.serves, Serves::NotAsked { why } if why == ELSEWHERE)
    }
}

/// Many sockets serve the same chain, and each is judged once.
struct Judged<'a> {
    trust: &'a Trust,
    now: OffsetDateTime,
    worths: BTreeMap<Vec<u8>, (CertificateChain, Worth)>,
}

impl Judged<'_> {
    fn serves(&mut self, ask: Ask, answer: Option<Answer>) -> (Serves, Option<Leaf>) {
        let serves = match (ask, answer) {
            (Ask::KnownPlain, _) => Serves::Plain { seen: false },
            (Ask::SeenPlain, _) | (Ask::Dial, Some(Answer::Plain)) => Serves::Plain { seen: true },
            (Ask::TasksOwn, _) => Serves::NotAsked {
                why: "outside the cluster's port plan: the program's own".to_owned(),
            },
            (Ask::Shared, _) => Serves::NotAsked {
                why: "another process listens on the same port, and might answer instead"
                    .to_owned(),
            },
            (Ask::Elsewhere, _) => Serves::NotAsked { why: ELSEWHERE.to_owned() },
            (Ask::Dial, Some(Answer::Tls(hello))) => return self.hello(hello),
            (Ask::Dial, Some(Answer::NoCertificate(why) | Answer::Refused(why))) => {
                Serves::None { why: printable(&why) }
            }
            (Ask::Dial, Some(Answer::Timeout)) => {
                Serves::None { why: "no answer in time".to_owned() }
            }
            (Ask::Dial, Some(Answer::NotAsked) | None) => {
                Serves::NotAsked { why: "no time was left".to_owned() }
            }
        };
        (serves, None)
    }

    fn hello(&mut self, hello: Hello) -> (Serves, Option<Leaf>) {
        let trusts = hello.trusts_der.iter().map(|der| ca_name(der)).collect();
        let refused_us = hello.refused_us;
        let hung_up = hello.hung_up;
        match self.worth(hello.chain) {
            Worth::Counts(leaf) => {
                // What a stranger's program does after our leaf is its own affair.
                let refused_us = refused_us.or_else(|| hung_up.then(|| HUNG_UP.to_owned()));
                let serves = Serves::Leaf {
                    serial: leaf.serial.to_string(),
                    issued: leaf.issued.into(),
                    not_after: leaf.not_after.into(),
                    trusts,
                    refused_us,
                    revoked: self.trust.revoked.contains(&leaf.serial),
                };
                (serves, Some(leaf))
            }
            Worth::Foreign { why, serial, not_after } => {
                let not_after = not_after.map(Moment::from);
                (Serves::Foreign { why, serial, not_after, trusts, refused_us }, None)
            }
        }
    }

    fn worth(&mut self, chain: CertificateChain) -> Worth {
        if let Some((known, worth)) = self.worths.get(&chain.leaf_der)
            && *known == chain
        {
            return worth.clone();
        }
        let worth = horizon::judge(&chain, self.trust, self.now);
        self.worths.insert(chain.leaf_der.clone(), (chain, worth.clone()));
        worth
    }
}

fn ca_name(der: &[u8]) -> String {
    match X509Name::from_der(der) {
        Ok(([], name)) => printable(&name.to_string()),
        Ok(_) | Err(_) => "a name that cannot be read".to_owned(),
    }
}

impl Blind {
    /// In words; empty where everything was seen.
    #[must_use]
    pub fn sentences(&self) -> Vec<String> {
        [
            (
                self.processes,
                "processes of Ray whose sockets this agent may not see: give it SYS_PTRACE",
            ),
            (
                self.sockets,
                "listening sockets whose process cannot be seen: give the agent SYS_PTRACE",
            ),
            (self.sockets_left_out, "or more listening sockets beyond the bounds of one look"),
            (self.processes_left_out, "processes beyond the bounds of one look"),
            (
                self.contained,
                "processes of Ray in containers of their own: an agent in there sees them",
            ),
        ]
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{count} {what}"))
        .collect()
    }
}

const HUNG_UP: &str = "it hung up on the leaf of this node without a word";
const ELSEWHERE: &str = "it lies in another network namespace";
