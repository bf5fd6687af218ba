//! One row: so many callers, one kind of call, for a while or until the keys made beforehand are
//! used up.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use node_agent::{
    client::{CallError, EnrollmentClient, NodeClient},
    keys::PrivateKey,
    statedir::Identity,
};
use raymtls_proto::{
    clock::{Clock, SystemClock},
    v1,
};

use crate::{
    Failure, machine,
    server::{Ca, LIMITS, Server},
};

/// Most calls of one row, however fast the server is.
const CALLS_MAX: usize = 20_000;
/// Keys made beforehand for a second of a row, where each call needs a new one.
const KEYS_PER_SECOND: u64 = 4_000;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A new machine, on a connection of its own.
    Enrolment,
    /// The next identity for a new key, on a new connection.
    RenewalFresh,
    /// A Ray leaf on a connection that is there.
    LeafKept,
    /// A Ray leaf on a new connection.
    LeafFresh,
    /// A Sync that brings nothing new and does not wait, on a connection that is there.
    SyncKept,
}

impl Kind {
    pub(crate) const ALL: [Self; 5] =
        [Self::Enrolment, Self::RenewalFresh, Self::LeafKept, Self::LeafFresh, Self::SyncKept];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Enrolment => "enrolment, fresh connection",
            Self::RenewalFresh => "identity renewal, fresh connection",
            Self::LeafKept => "leaf, kept connection",
            Self::LeafFresh => "leaf, fresh connection",
            Self::SyncKept => "Sync without news, kept connection",
        }
    }

    /// Whether every call is for a key the CA has not seen.
    fn wants_new_keys(self) -> bool {
        match self {
            Self::Enrolment | Self::RenewalFresh => true,
            Self::LeafKept | Self::LeafFresh | Self::SyncKept => false,
        }
    }

    /// Whether each answer holds a certificate.
    pub(crate) fn certifies(self) -> bool {
        match self {
            Self::Enrolment | Self::RenewalFresh | Self::LeafKept | Self::LeafFresh => true,
            Self::SyncKept => false,
        }
    }
}

/// What came of a row.
#[derive(Debug)]
pub(crate) struct Cell {
    pub(crate) kind: Kind,
    pub(crate) concurrency: usize,
    /// Of the calls that were answered, sorted.
    pub(crate) latencies: Vec<Duration>,
    pub(crate) failed: usize,
    pub(crate) first_failure: Option<String>,
    pub(crate) wall: Duration,
    pub(crate) server_cpu: Duration,
    pub(crate) client_cpu: Duration,
    /// Commits of the store, an `fdatasync` each.
    pub(crate) fdatasyncs: u64,
    /// What the store's files took on the disk.
    pub(crate) stored_bytes: u64,
    pub(crate) memory_mib: f64,
    pub(crate) load: f64,
}

/// A key and its CSR, made before the clock runs.
struct Prepared {
    key: PrivateKey,
    csr_der: Vec<u8>,
}

/// An enrolled machine with the CSR of its Ray leaf.
struct Member {
    identity: Identity,
    leaf_csr_der: Vec<u8>,
}

/// What the callers of a row share.
struct Work {
    ca: Arc<Ca>,
    kind: Kind,
    clock: Arc<dyn Clock>,
    until: Instant,
    calls: AtomicUsize,
    keys: Mutex<Vec<Prepared>>,
}

#[derive(Default)]
struct Tally {
    latencies: Vec<Duration>,
    failed: usize,
    first_failure: Option<String>,
}

/// Runs one row.
pub(crate) async fn measure(
    server: &Server,
    ca: &Arc<Ca>,
    kind: Kind,
    concurrency: usize,
    longest: Duration,
) -> Result<Cell, Failure> {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let keys = if kind.wants_new_keys() { prepare(longest).await? } else { Vec::new() };
    let mut members = Vec::new();
    while kind != Kind::Enrolment && members.len() < concurrency {
        members.push(enrol(ca, &clock).await?);
    }
    let (commits_before, disk_before) = (server.commits().await?, server.disk_bytes()?);
    let server_before = server.cpu_time()?;
    let client_before = machine::cpu_time(std::process::id())?;
    let began = Instant::now();
    let work = Arc::new(Work {
        ca: ca.clone(),
        kind,
        clock,
        until: began + longest,
        calls: AtomicUsize::new(0),
        keys: Mutex::new(keys),
    });
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..concurrency {
        callers.spawn(call(work.clone(), members.pop()));
    }
    let mut all = Tally::default();
    while let Some(tally) = callers.join_next().await {
        all.add(tally?);
    }
    let wall = began.elapsed();
    let server_cpu = server.cpu_time()? - server_before;
    let client_cpu = machine::cpu_time(std::process::id())? - client_before;
    all.latencies.sort_unstable();
    Ok(Cell {
        kind,
        concurrency,
        latencies: all.latencies,
        failed: all.failed,
        first_failure: all.first_failure,
        wall,
        server_cpu,
        client_cpu,
        fdatasyncs: server.commits().await?.saturating_sub(commits_before),
        stored_bytes: server.disk_bytes()?.saturating_sub(disk_before),
        memory_mib: server.memory_mib()?,
        load: machine::load_average()?,
    })
}

async fn prepare(longest: Duration) -> Result<Vec<Prepared>, Failure> {
    let wanted = usize::try_from(longest.as_secs() * KEYS_PER_SECOND)?.min(CALLS_MAX);
    let make = move || (0..wanted).map(|_| Prepared::new()).collect::<Result<Vec<_>, Failure>>();
    tokio::task::spawn_blocking(make).await?
}

async fn enrol(ca: &Ca, clock: &Arc<dyn Clock>) -> Result<Member, Failure> {
    let Prepared { key, csr_der } = Prepared::new()?;
    let mut client = EnrollmentClient::new(&ca.enrollment, LIMITS, clock.clone())?;
    let answer = client.enroll(ca.enrolment(csr_der)).await?;
    let identity = Identity::new(key, answer.identity.unwrap_or_default())?;
    Ok(Member { identity, leaf_csr_der: Prepared::new()?.csr_der })
}

/// One caller: the next call begins when the last one was answered.
async fn call(work: Arc<Work>, member: Option<Member>) -> Tally {
    let mut tally = Tally::default();
    let outcome = match (work.kind, member) {
        (Kind::Enrolment, _) => enrolments(&work, &mut tally).await,
        (Kind::RenewalFresh, Some(member)) => renewals(&work, member, &mut tally).await,
        (Kind::LeafKept, Some(member)) => leaves_kept(&work, &member, &mut tally).await,
        (Kind::LeafFresh, Some(member)) => leaves_fresh(&work, &member, &mut tally).await,
        (Kind::SyncKept, Some(member)) => syncs(&work, &member, &mut tally).await,
        (Kind::RenewalFresh | Kind::LeafKept | Kind::LeafFresh | Kind::SyncKept, None) => {
            Err("there are fewer members than callers".into())
        }
    };
    if let Err(failure) = outcome {
        tally.fail(&failure);
    }
    tally
}

async fn enrolments(work: &Work, tally: &mut Tally) -> Result<(), Failure> {
    while let Some(prepared) = work.next_key() {
        let request = work.ca.enrolment(prepared.csr_der);
        let began = Instant::now();
        let mut client = EnrollmentClient::new(&work.ca.enrollment, LIMITS, work.clock.clone())?;
        tally.note(began, client.enroll(request).await);
    }
    Ok(())
}

async fn renewals(work: &Work, member: Member, tally: &mut Tally) -> Result<(), Failure> {
    let mut identity = member.identity;
    while let Some(Prepared { key, csr_der }) = work.next_key() {
        let began = Instant::now();
        let client = NodeClient::new(&work.ca.node, &identity, LIMITS, work.clock.clone())?;
        if let Some(answer) = tally.note(began, client.renew_identity(csr_der).await) {
            identity = Identity::new(key, answer.identity.unwrap_or_default())?;
        }
    }
    Ok(())
}

async fn leaves_kept(work: &Work, member: &Member, tally: &mut Tally) -> Result<(), Failure> {
    let client = NodeClient::new(&work.ca.node, &member.identity, LIMITS, work.clock.clone())?;
    // Opens the connection; belongs to no row.
    client.issue_leaf(member.leaf_request()).await?;
    while work.may_go_on() {
        let began = Instant::now();
        tally.note(began, client.issue_leaf(member.leaf_request()).await);
    }
    Ok(())
}

async fn leaves_fresh(work: &Work, member: &Member, tally: &mut Tally) -> Result<(), Failure> {
    while work.may_go_on() {
        let began = Instant::now();
        let client = NodeClient::new(&work.ca.node, &member.identity, LIMITS, work.clock.clone())?;
        tally.note(began, client.issue_leaf(member.leaf_request()).await);
    }
    Ok(())
}

async fn syncs(work: &Work, member: &Member, tally: &mut Tally) -> Result<(), Failure> {
    let client = NodeClient::new(&work.ca.node, &member.identity, LIMITS, work.clock.clone())?;
    let have = client.sync(v1::SyncRequest::default()).await?.version;
    while work.may_go_on() {
        let began = Instant::now();
        let ask = v1::SyncRequest { have, ..Default::default() };
        tally.note(began, client.sync(ask).await);
    }
    Ok(())
}

impl Work {
    fn may_go_on(&self) -> bool {
        Instant::now() < self.until && self.calls.fetch_add(1, Ordering::Relaxed) < CALLS_MAX
    }

    fn next_key(&self) -> Option<Prepared> {
        if !self.may_go_on() {
            return None;
        }
        self.keys.lock().expect("no code panics while it holds the keys").pop()
    }
}

impl Tally {
    fn note<T>(&mut self, began: Instant, answer: Result<T, CallError>) -> Option<T> {
        match answer {
            Ok(answer) => {
                self.latencies.push(began.elapsed());
                Some(answer)
            }
            Err(failure) => {
                self.fail(&failure);
                None
            }
        }
    }

    fn fail(&mut self, failure: &dyn std::fmt::Display) {
        self.failed += 1;
        self.first_failure.get_or_insert_with(|| failure.to_string());
    }

    fn add(&mut self, other: Self) {
        self.latencies.extend(other.latencies);
        self.failed += other.failed;
        self.first_failure = self.first_failure.take().or(other.first_failure);
    }
}

impl Prepared {
    fn new() -> Result<Self, Failure> {
        let key = PrivateKey::generate()?;
        let csr_der = key.csr_der()?;
        Ok(Self { key, csr_der })
    }
}

impl Member {
    fn leaf_request(&self) -> v1::IssueLeafRequest {
        v1::IssueLeafRequest {
            csr_der: self.leaf_csr_der.clone(),
            purpose: v1::LeafPurpose::Node.into(),
            ..Default::default()
        }
    }
}
