//! A fleet that waits: so many agents, each with a connection of its own and a waiting Sync, as real
//! agents hold them. Limits are the server's defaults; the agents dial from addresses spread over
//! 127.0.0.0/8, since many limits count by address.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::Path,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use node_agent::{
    client::{CallLimits, EnrollmentClient, NodeClient, Target},
    keys::PrivateKey,
    state,
    statedir::Identity,
};
use prost::Message;
use raymtls_proto::{clock::SystemClock, v1};
use serde::Serialize;
use tokio::{sync::Semaphore, task::JoinSet};

use crate::{
    Failure, machine,
    server::{CLUSTER, Ca, LIMITS, Server},
    table,
};

/// What an agent asks for, and how long it pauses after news.
const WAIT_SECONDS: u32 = 50;
const PAUSE_MIN: Duration = Duration::from_millis(200);
const PAUSE_MORE: Duration = Duration::from_millis(800);
/// How often an enrolment is tried again.
const ENROL_TRIES_MAX: u32 = 8;
/// Enrolments under way at once.
const ENROLLING: usize = 64;
/// How long the idle fleet is watched.
const IDLE: Duration = Duration::from_secs(20);
/// How long the fleet has to hear of a change, or to come back.
const PATIENCE: Duration = Duration::from_secs(300);
const LOOK_AGAIN: Duration = Duration::from_millis(2);
/// How long the server stays away.
const AWAY: Duration = Duration::from_secs(20);
/// Nodes that join, one after the other.
const JOINS: u32 = 1_000;
const JOINS_WITHIN: Duration = Duration::from_secs(60);
/// Calls made beside the returning fleet, one after the other.
const HONEST_PAUSE: Duration = Duration::from_secs(1);

/// What was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Figures {
    agents: u32,
    enrol_seconds: f64,
    memory_mib: f64,
    kib_an_agent: f64,
    idle_cores: f64,
    change_first_ms: f64,
    change_median_ms: f64,
    change_last_ms: f64,
    away_seconds: f64,
    back_half_seconds: f64,
    back_all_seconds: f64,
    back_honest_calls: usize,
    back_honest_p99_ms: f64,
    back_memory_mib: f64,
    joins: u32,
    joins_seconds: f64,
    joins_known_to_all_after_ms: f64,
    joins_answers: u64,
    joins_answer_mib: f64,
    joins_server_cpu_seconds: f64,
    load_average: f64,
    /// Calls that failed while the server was there.
    pub(crate) failed: usize,
}

/// What the agents of the fleet share.
#[derive(Debug, Default)]
struct Shared {
    waiting: AtomicUsize,
    answers: AtomicU64,
    answer_bytes: AtomicU64,
    failed: AtomicUsize,
    first_failure: OnceLock<String>,
}

struct Agent {
    client: NodeClient,
    shared: Arc<Shared>,
    /// Counter of the newest version it knows, for who measures.
    seen: Arc<Seen>,
}

/// What an agent knows, and since when.
#[derive(Debug)]
struct Seen {
    counter: AtomicU64,
    /// Microseconds since the first enrolment.
    at: AtomicU64,
    began: Instant,
}

impl Seen {
    fn new(began: Instant) -> Self {
        Self { counter: AtomicU64::new(0), at: AtomicU64::new(0), began }
    }

    fn note(&self, counter: u64) {
        let micros = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX);
        if self.counter.swap(counter, Ordering::Relaxed) < counter {
            self.at.store(micros, Ordering::Relaxed);
        }
    }

    fn at(&self) -> Duration {
        Duration::from_micros(self.at.load(Ordering::Relaxed))
    }
}

/// Runs all of it.
pub(crate) async fn measure(binary: &Path, folder: &Path, agents: u32) -> Result<Figures, Failure> {
    let mut server = Server::prepare(binary, folder, String::new())?;
    server.start().await?;
    let empty_mib = server.memory_mib()?;
    let ca = Arc::new(server.open_cluster().await?);
    let shared = Arc::new(Shared::default());
    let mut fleet = Fleet {
        began: Instant::now(),
        seen: Vec::new(),
        tasks: JoinSet::new(),
        shared: shared.clone(),
    };
    eprintln!("enrolling {agents} agents");
    let began = Instant::now();
    fleet.grow(&ca, agents, None).await?;
    let enrol = began.elapsed();
    fleet.wait_for(|all| all.shared.waiting.load(Ordering::Relaxed) >= all.seen.len()).await?;
    fleet.catch_up(&server).await?;

    eprintln!("watching the idle fleet for {} s", IDLE.as_secs());
    tokio::time::sleep(Duration::from_secs(5)).await;
    let cpu = server.cpu_time()?;
    tokio::time::sleep(IDLE).await;
    let idle_cores = (server.cpu_time()? - cpu).as_secs_f64() / IDLE.as_secs_f64();
    let memory_mib = server.memory_mib()?;

    eprintln!("changing a setting");
    let mut heard = fleet.change(&server).await?;
    heard.sort_unstable();

    let honest = Honest::enrol(&ca).await?;
    eprintln!("stopping the server for {} s", AWAY.as_secs());
    let failed = shared.failed.load(Ordering::Relaxed);
    server.stop().await?;
    tokio::time::sleep(AWAY).await;
    let back = fleet.come_back(&mut server, honest).await?;
    // What failed while nobody was there is no failure.
    shared.failed.store(failed, Ordering::Relaxed);
    if let Some(why) = shared.first_failure.get() {
        eprintln!("the first that failed, perhaps while nobody was there: {why}");
    }

    eprintln!("{JOINS} more join within {} s", JOINS_WITHIN.as_secs());
    fleet.catch_up(&server).await?;
    let (answers, bytes) = fleet.counts();
    let cpu = server.cpu_time()?;
    let began = Instant::now();
    fleet.grow(&ca, JOINS, Some(JOINS_WITHIN / JOINS)).await?;
    let joined = began.elapsed();
    fleet.catch_up(&server).await?;
    let known = began.elapsed().saturating_sub(joined);
    let joins_cpu = server.cpu_time()? - cpu;
    let (answers_after, bytes_after) = fleet.counts();

    let figures = Figures {
        agents,
        enrol_seconds: enrol.as_secs_f64(),
        memory_mib,
        kib_an_agent: (memory_mib - empty_mib) * 1024.0 / f64::from(agents),
        idle_cores,
        change_first_ms: table::ms(heard[0]),
        change_median_ms: table::ms(heard[heard.len() / 2]),
        change_last_ms: table::ms(heard[heard.len() - 1]),
        away_seconds: AWAY.as_secs_f64(),
        back_half_seconds: back.half.as_secs_f64(),
        back_all_seconds: back.all.as_secs_f64(),
        back_honest_calls: back.honest_calls,
        back_honest_p99_ms: table::ms(back.honest_p99),
        back_memory_mib: back.memory_mib,
        joins: JOINS,
        joins_seconds: joined.as_secs_f64(),
        joins_known_to_all_after_ms: table::ms(known),
        joins_answers: answers_after - answers,
        joins_answer_mib: mib(bytes_after - bytes),
        joins_server_cpu_seconds: joins_cpu.as_secs_f64(),
        load_average: machine::load_average()?,
        failed: shared.failed.load(Ordering::Relaxed),
    };
    fleet.tasks.shutdown().await;
    server.stop().await?;
    Ok(figures)
}

struct Fleet {
    began: Instant,
    seen: Vec<Arc<Seen>>,
    tasks: JoinSet<()>,
    shared: Arc<Shared>,
}

struct Back {
    half: Duration,
    all: Duration,
    honest_calls: usize,
    honest_p99: Duration,
    memory_mib: f64,
}

impl Fleet {
    /// Enrols so many more, at once or with a pause before each.
    async fn grow(
        &mut self,
        ca: &Arc<Ca>,
        agents: u32,
        every: Option<Duration>,
    ) -> Result<(), Failure> {
        let places = Arc::new(Semaphore::new(ENROLLING));
        let mut enrolling = JoinSet::new();
        for _ in 0..agents {
            if let Some(every) = every {
                tokio::time::sleep(every).await;
            }
            let number = u32::try_from(self.seen.len())?;
            let seen = Arc::new(Seen::new(self.began));
            self.seen.push(seen.clone());
            let place = places.clone().acquire_owned().await?;
            let (ca, shared) = (ca.clone(), self.shared.clone());
            enrolling.spawn(async move {
                let identity = enrol(&ca, number).await?;
                drop(place);
                let client = client(&ca, &identity, number)?;
                Ok::<_, Failure>(Agent { client, shared, seen })
            });
            while let Some(agent) = enrolling.try_join_next() {
                self.tasks.spawn(agent??.run());
            }
        }
        while let Some(agent) = enrolling.join_next().await {
            self.tasks.spawn(agent??.run());
        }
        Ok(())
    }

    async fn wait_for(&self, done: impl Fn(&Self) -> bool) -> Result<Duration, Failure> {
        let began = Instant::now();
        while !done(self) {
            if began.elapsed() > PATIENCE {
                return Err(format!("not within {} s", PATIENCE.as_secs()).into());
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        Ok(began.elapsed())
    }

    /// Waits until everybody knows the cluster as it stands.
    async fn catch_up(&self, server: &Server) -> Result<Duration, Failure> {
        let version = version(server).await?;
        self.wait_for(|all| all.knows(version) == all.seen.len()).await
    }

    fn knows(&self, version: u64) -> usize {
        self.seen.iter().filter(|seen| seen.counter.load(Ordering::Relaxed) >= version).count()
    }

    fn counts(&self) -> (u64, u64) {
        let Shared { answers, answer_bytes, .. } = &*self.shared;
        (answers.load(Ordering::Relaxed), answer_bytes.load(Ordering::Relaxed))
    }

    /// Changes a setting; when, from before the change, each agent had heard of it.
    async fn change(&self, server: &Server) -> Result<Vec<Duration>, Failure> {
        let mut admin = server.admin().await?;
        let asked = self.began.elapsed();
        let request = v1::SetClusterRequest {
            cluster: CLUSTER.to_owned(),
            changes: vec!["lease=30h".to_owned()],
            dry_run: false,
        };
        admin.set_cluster(request).await?;
        self.catch_up(server).await?;
        Ok(self.seen.iter().map(|seen| seen.at().saturating_sub(asked)).collect())
    }

    /// Starts the server again; how long until half and all wait again, and how long the calls of one
    /// more machine take meanwhile.
    async fn come_back(&self, server: &mut Server, honest: Honest) -> Result<Back, Failure> {
        server.start().await?;
        let began = Instant::now();
        let times = Arc::new(Mutex::new(Vec::new()));
        let calling = tokio::spawn(honest.call_on(times.clone()));
        let waiting = |all: &Self| all.shared.waiting.load(Ordering::Relaxed);
        self.wait_for(|all| waiting(all) * 2 >= all.seen.len()).await?;
        let half = began.elapsed();
        self.wait_for(|all| waiting(all) >= all.seen.len()).await?;
        let all = began.elapsed();
        calling.abort();
        let mut times = times.lock().expect("no code panics while it holds the times").clone();
        times.sort_unstable();
        let p99 = times.get(times.len() * 99 / 100).copied();
        Ok(Back {
            half,
            all,
            honest_calls: times.len(),
            honest_p99: p99.ok_or("no call was answered while the fleet came back")?,
            memory_mib: server.memory_mib()?,
        })
    }
}

/// One more machine, which asks for everything on a new connection again and again.
struct Honest {
    ca: Arc<Ca>,
    identity: Identity,
}

impl Honest {
    async fn enrol(ca: &Arc<Ca>) -> Result<Self, Failure> {
        let identity = enrol(ca, u32::MAX).await?;
        Ok(Self { ca: ca.clone(), identity })
    }

    async fn call_on(self, times: Arc<Mutex<Vec<Duration>>>) {
        loop {
            let began = Instant::now();
            let Ok(client) = client(&self.ca, &self.identity, u32::MAX) else { return };
            let request = v1::SyncRequest::default();
            if client.sync(request).await.is_ok() {
                let mut times = times.lock().expect("no code panics while it holds the times");
                times.push(began.elapsed());
            }
            tokio::time::sleep(HONEST_PAUSE).await;
        }
    }
}

/// The address agent `number` dials from: as far from its neighbours as the range allows.
fn source(number: u32) -> IpAddr {
    let [_, a, b, c] = number.wrapping_mul(0x9E_3779).to_be_bytes();
    Ipv4Addr::new(127, a, b, c.clamp(1, 254)).into()
}

/// Tries again, as `enroll` does: on a busy machine a handshake can take longer than the server waits.
async fn enrol(ca: &Ca, number: u32) -> Result<Identity, Failure> {
    let key = PrivateKey::generate()?;
    let request = ca.enrolment(key.csr_der()?);
    let target = Target { source: Some(source(number)), ..ca.enrollment.clone() };
    let mut failures = 0;
    loop {
        let mut client = EnrollmentClient::new(&target, LIMITS, Arc::new(SystemClock))?;
        match client.enroll(request.clone()).await {
            Ok(answer) => return Ok(Identity::new(key, answer.identity.unwrap_or_default())?),
            Err(error) if failures == ENROL_TRIES_MAX => return Err(error.into()),
            Err(_) => tokio::time::sleep(state::backoff(failures, rand::random())).await,
        }
        failures += 1;
    }
}

fn client(ca: &Ca, identity: &Identity, number: u32) -> Result<NodeClient, Failure> {
    let target = Target { source: Some(source(number)), ..ca.node.clone() };
    let limits = CallLimits::default();
    Ok(NodeClient::new(&target, identity, limits, Arc::new(SystemClock))?)
}

async fn version(server: &Server) -> Result<u64, Failure> {
    let request = v1::GetClusterRequest { cluster: CLUSTER.to_owned() };
    let cluster = server.admin().await?.get_cluster(request).await?.into_inner();
    Ok(cluster.version.unwrap_or_default().counter)
}

impl Agent {
    /// As an agent does it: hear, wait for more; where the server is away, come back with full jitter.
    async fn run(self) {
        let (mut have, mut continues, mut failures) = (None, false, 0);
        loop {
            let report = v1::Report { received: have, applied: have, ..Default::default() };
            let wait_seconds = if have.is_some() { WAIT_SECONDS } else { 0 };
            let request = v1::SyncRequest {
                report: Some(report),
                have,
                wait_seconds,
                continues,
                ..Default::default()
            };
            self.shared.waiting.fetch_add(1, Ordering::Relaxed);
            let answer = self.client.sync(request).await;
            self.shared.waiting.fetch_sub(1, Ordering::Relaxed);
            match answer {
                Ok(answer) => {
                    failures = 0;
                    self.shared.answers.fetch_add(1, Ordering::Relaxed);
                    let bytes = u64::try_from(answer.encoded_len()).unwrap_or(u64::MAX);
                    self.shared.answer_bytes.fetch_add(bytes, Ordering::Relaxed);
                    continues = answer.members.as_ref().is_some_and(|members| members.more);
                    have = answer.version;
                    if !continues {
                        let counter = have.map_or(0, |version| version.counter);
                        self.seen.note(counter);
                        let pause = PAUSE_MIN + PAUSE_MORE.mul_f64(rand::random());
                        tokio::time::sleep(pause).await;
                    }
                }
                Err(error) => {
                    self.shared.failed.fetch_add(1, Ordering::Relaxed);
                    let _ = self.shared.first_failure.set(error.to_string());
                    tokio::time::sleep(state::backoff(failures, rand::random())).await;
                    failures = failures.saturating_add(1);
                }
            }
        }
    }
}

fn mib(bytes: u64) -> f64 {
    Duration::from_micros(bytes).as_secs_f64() * 1e6 / f64::from(1 << 20)
}

impl Figures {
    /// For a person.
    pub(crate) fn text(&self) -> String {
        let Self { agents, joins, failed, .. } = self;
        format!(
            "{agents} agents wait: {:.0} MiB in all, {:.1} KiB each; idle {:.3} cores\n\
             enrolled in {:.0} s from {agents} addresses\n\
             a setting changed: heard by the first after {:.0} ms, half {:.0} ms, the last {:.0} ms\n\
             server away for {:.0} s: half wait again {:.0} s after its start, all after {:.0} s; \
             another machine's {} calls meanwhile: p99 {:.0} ms; memory then {:.0} MiB\n\
             {joins} joined in {:.0} s: known to all {:.0} ms after the last; {} answers, {:.1} MiB, \
             {:.1} s of server CPU\n\
             {failed} calls failed while the server was there; load average {:.1}",
            self.memory_mib,
            self.kib_an_agent,
            self.idle_cores,
            self.enrol_seconds,
            self.change_first_ms,
            self.change_median_ms,
            self.change_last_ms,
            self.away_seconds,
            self.back_half_seconds,
            self.back_all_seconds,
            self.back_honest_calls,
            self.back_honest_p99_ms,
            self.back_memory_mib,
            self.joins_seconds,
            self.joins_known_to_all_after_ms,
            self.joins_answers,
            self.joins_answer_mib,
            self.joins_server_cpu_seconds,
            self.load_average,
        )
    }
}
