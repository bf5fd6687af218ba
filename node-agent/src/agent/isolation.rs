//! Isolation: brings the kernel's table in line with what the CA said last. What to enforce is decided
//! in `isolation`; here is when, and what follows from a load that did not work.

use std::{collections::BTreeSet, net::IpAddr, time::Duration};

use raymtls_proto::{clock::Clock, v1};
use time::OffsetDateTime;

use super::{Agent, Event, Task};
use crate::{
    isolation::{
        Counters, Policy, Protected, Verdict, clear, host, render,
        status::{IsolationStatus, word},
        table::TableError,
        trial::Trial,
    },
    state,
    statedir::{IsolationRecord, Memory},
};

/// Own addresses and gateways are looked at this often, whatever else happens.
const LOOK_PAUSE: Duration = Duration::from_secs(60);
/// Names of the CA's endpoints are looked up this often.
const LOOKUP_PAUSE: Duration = Duration::from_secs(300);
/// Characters of a problem in a report.
const PROBLEM_LEN_MAX: usize = 200;
/// After the CA was heard, a failed trial is repeated no sooner than after this part of the pause.
const RETRIAL_MIN: f64 = 0.1;

/// What is loaded, and what is still to be done about it. Moments are time that passes.
#[derive(Debug, Default)]
pub(super) struct Isolation {
    /// Only the daemon enforces: an enrolment that syncs once does not.
    on_duty: bool,
    record: IsolationRecord,
    trial: Trial,
    loaded: Option<Loaded>,
    /// What is to be in force, kept on the disk or not yet: a disk that is full must not let a node in
    /// again that was cut off.
    told: Memory,
    counters: Counters,
    sockets_closed: u32,
    load_problem: Option<String>,
    cut_problem: Option<String>,
    failures: u32,
    retry_at: Option<Duration>,
    look_at: Duration,
    lookup_at: Duration,
    count_at: Duration,
    counting: Option<Task>,
    looking_up: Option<Task>,
    last_contact: Option<Duration>,
}

/// A table as this agent loaded it.
#[derive(Debug)]
struct Loaded {
    verdict: Verdict,
    /// The ruleset with counters at zero.
    text: String,
    /// All of which is in the table; absent while that is not known.
    version: Option<v1::SyncVersion>,
    at: OffsetDateTime,
    blocked: BTreeSet<IpAddr>,
    blocked_entirely: BTreeSet<IpAddr>,
    members: usize,
}

impl Isolation {
    pub(super) fn in_force(&self) -> Option<Verdict> {
        self.loaded.as_ref().map(|loaded| loaded.verdict)
    }

    pub(super) fn is_on_trial(&self) -> bool {
        matches!(self.trial, Trial::Running { until: Some(_) })
    }

    fn problem(&self, trial_time: Duration) -> Option<String> {
        let failed = matches!(self.trial, Trial::Failed { .. })
            && self.told.settings().map(v1::Settings::isolation) == Some(v1::Isolation::Enforce);
        let rolled_back = failed.then(|| {
            format!(
                "the CA was not reached within {} s after the first load of `enforce`, so the table \
                 only counts; tried again after new settings, or some time after the CA answers",
                trial_time.as_secs()
            )
        });
        self.load_problem.clone().or(rolled_back).or_else(|| self.cut_problem.clone())
    }
}

impl Agent {
    /// Whether what is remembered was loaded, so that Ray may be started.
    pub(super) fn is_on_duty(&self) -> bool {
        self.isolation.on_duty
    }

    /// Loads what is remembered. It comes before anybody can ask for Ray's files, and needs no CA.
    pub(super) async fn begin_isolation(&mut self) {
        let record = self.state.isolation();
        if record.cluster != self.node.cluster.as_str() && record.table {
            // Of an earlier enrolment: nobody would renew it.
            if let Ok(cluster) = record.cluster.parse()
                && let Err(error) = self.config.isolation.kernel.load(&clear(&cluster)).await
            {
                self.problem(format!("the table of {cluster} stays: {error}"));
            }
        }
        self.isolation.record = if record.cluster == self.node.cluster.as_str() {
            record
        } else {
            IsolationRecord { cluster: self.node.cluster.to_string(), ..IsolationRecord::default() }
        };
        self.isolation.record.ca.extend(host::literal_addresses(&self.node.node_endpoints));
        if self.isolation.record.enforced {
            self.isolation.trial = Trial::Passed;
        }
        let heard = self.clock.now().unix_timestamp() - self.memory.server_time_unix();
        let heard = u64::try_from(heard).ok().map(Duration::from_secs);
        self.isolation.last_contact = heard.and_then(|ago| self.clock.elapsed().checked_sub(ago));
        self.isolation.on_duty = true;
        let memory = self.memory.clone();
        self.enforce(&memory).await;
    }

    /// What time brings: the end of a trial, another try, other addresses of this host or of the CA.
    pub(super) async fn tend_isolation(&mut self) {
        if !self.isolation.on_duty {
            return;
        }
        let now = self.clock.elapsed();
        let before = self.isolation.trial;
        self.isolation.trial = before.at(now);
        let moved = self.isolation.trial != before;
        if moved && self.isolation.trial.verdict() == Verdict::Count {
            tracing::error!(
                "the CA answered before the first load of `enforce` and does not since: the table \
                 only counts from now on, nothing is dropped"
            );
        }
        let retry = self.isolation.retry_at.is_some_and(|at| now >= at);
        if moved || retry || now >= self.isolation.look_at {
            self.isolation.look_at = now + LOOK_PAUSE;
            self.enforce_again().await;
        }
        self.look_up(now);
        self.count(now);
    }

    fn look_up(&mut self, now: Duration) {
        let is_off = self.isolation.loaded.is_none();
        if is_off || now < self.isolation.lookup_at {
            return;
        }
        self.isolation.lookup_at = now + LOOKUP_PAUSE;
        let (endpoints, events) = (self.node.node_endpoints.clone(), self.event_sender.clone());
        let task = tokio::spawn(async move {
            let (found, all) = host::resolve(&endpoints).await;
            let _ = events.send(Event::Resolved(found, all)).await;
        });
        self.isolation.looking_up = Some(Task(task.abort_handle()));
    }

    /// Where the CA is, newly looked up. What is not found any more stays: a name server that is away
    /// must not uncover the CA.
    pub(super) async fn resolved(&mut self, mut found: BTreeSet<IpAddr>, all: bool) {
        if !all {
            let before = self.isolation.record.ca.iter().copied();
            found = found.into_iter().chain(before).take(host::ADDRESSES_MAX).collect();
        }
        if found == self.isolation.record.ca {
            return;
        }
        self.isolation.record.ca = found;
        self.keep_record();
        self.enforce_again().await;
    }

    fn count(&mut self, now: Duration) {
        if self.isolation.loaded.is_none() || now < self.isolation.count_at {
            return;
        }
        self.isolation.count_at = now + self.config.isolation.count_pause;
        let (kernel, cluster) = (self.config.isolation.kernel.clone(), self.node.cluster.clone());
        let events = self.event_sender.clone();
        let task = tokio::spawn(async move {
            let _ = events.send(Event::Counted(kernel.counters(&cluster).await)).await;
        });
        self.isolation.counting = Some(Task(task.abort_handle()));
    }

    /// The table's counters, or that somebody removed it.
    pub(super) async fn counted(&mut self, counted: Result<Option<Counters>, TableError>) {
        match counted {
            Ok(Some(counters)) => self.isolation.counters = counters,
            Ok(None) if self.isolation.loaded.is_some() => {
                tracing::error!("somebody removed the table of this cluster: it is loaded again");
                self.isolation.loaded = None;
                self.enforce_again().await;
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "the table's counters cannot be read"),
        }
    }

    /// The CA answered, on a connection made after the last load if a trial runs.
    pub(super) fn isolation_heard(&mut self) {
        let now = self.clock.elapsed();
        let share = RETRIAL_MIN + (1.0 - RETRIAL_MIN) * rand::random::<f64>();
        let wait = self.config.isolation.retrial_pause.mul_f64(share);
        self.isolation.last_contact = Some(now);
        self.isolation.trial = self.isolation.trial.heard(now, wait);
        if self.isolation.trial == Trial::Passed && !self.isolation.record.enforced {
            tracing::info!("the CA was reached through the table: `enforce` stays from now on");
            self.isolation.record.enforced = true;
            self.keep_record();
        }
    }

    fn keep_record(&mut self) {
        if let Err(error) = self.state.put_isolation(&self.isolation.record) {
            self.problem(format!("what isolation did cannot be kept: {error}"));
        }
    }

    async fn enforce_again(&mut self) {
        let memory = self.isolation.told.clone();
        self.enforce(&memory).await;
    }

    /// Brings the kernel in line with this. What cannot be loaded leaves the last table in force.
    pub(super) async fn enforce(&mut self, memory: &Memory) {
        if !self.isolation.on_duty {
            return;
        }
        let before = std::mem::replace(&mut self.isolation.told, memory.clone());
        let Some(settings) = memory.settings() else { return };
        if before.settings().is_some_and(|before| before != settings) {
            self.isolation.trial = self.isolation.trial.settings_changed();
        }
        let verdict = match v1::Isolation::try_from(settings.isolation) {
            Ok(v1::Isolation::Off) => return self.remove_table().await,
            Ok(v1::Isolation::Audit) => Verdict::Count,
            Ok(v1::Isolation::Enforce) => self.isolation.trial.verdict(),
            Ok(v1::Isolation::Unspecified) | Err(_) => {
                let text = "the setting isolation is one this release does not know: upgrade \
                            node-agent; the last table stays";
                self.isolation.load_problem = Some(text.to_owned());
                return;
            }
        };
        if !memory.knows_members() {
            let text = "the CA has not said who the members are: there is no table yet";
            self.isolation.load_problem = Some(text.to_owned());
            return;
        }
        let policy = match self.policy(memory, settings.clone(), verdict) {
            Ok(policy) => policy,
            Err(error) => return self.not_loaded(&format!("own addresses: {error}")),
        };
        let text = render(&policy, Counters::default());
        if let Some(loaded) = self.isolation.loaded.as_mut().filter(|l| l.text == text) {
            if !memory.is_filling() {
                loaded.version = memory.version();
            }
            self.loaded_well();
            return;
        }
        match self.load(&policy).await {
            Ok(()) => self.loaded(&policy, text, memory).await,
            Err(error) => self.not_loaded(&error.to_string()),
        }
    }

    fn policy(
        &self,
        memory: &Memory,
        settings: v1::Settings,
        verdict: Verdict,
    ) -> std::io::Result<Policy> {
        let mut policy = Policy::of(&self.node.cluster, self.node.role, settings, verdict);
        policy.people(memory);
        policy.protected = Protected {
            ca: self.isolation.record.ca.clone(),
            gateways: host::gateways(),
            own: host::own_addresses()?.into_iter().chain(self.node.addresses.clone()).collect(),
        };
        Ok(policy)
    }

    async fn load(&mut self, policy: &Policy) -> Result<(), TableError> {
        if !self.isolation.record.table {
            // Kept first: a table that nobody knows of would never be removed.
            self.isolation.record.table = true;
            self.keep_record();
        }
        let kernel = &self.config.isolation.kernel;
        // The load says what is wrong with nft; a table that is not there has counted nothing more.
        if let Ok(Some(counters)) = kernel.counters(&self.node.cluster).await {
            self.isolation.counters = counters;
        }
        kernel.load(&render(policy, self.isolation.counters)).await
    }

    async fn loaded(&mut self, policy: &Policy, text: String, memory: &Memory) {
        let (blocked, blocked_entirely) = (policy.blocked(), policy.blocked_entirely());
        let before = self.isolation.loaded.take();
        let version = match &before {
            // Not all pages are there yet: what was in force is, and the blocks are new.
            Some(before) if memory.is_filling() => before.version,
            Some(_) | None => memory.version().filter(|_| !memory.is_filling()),
        };
        let dropped = before.filter(|before| before.verdict == Verdict::Drop);
        let fresh = |now: &BTreeSet<IpAddr>, of: fn(&Loaded) -> &BTreeSet<IpAddr>| {
            let known =
                |address: &&IpAddr| dropped.as_ref().is_some_and(|l| of(l).contains(*address));
            now.iter().filter(|address| !known(address)).copied().collect::<BTreeSet<_>>()
        };
        let some = fresh(&blocked, |loaded| &loaded.blocked);
        let all = fresh(&blocked_entirely, |loaded| &loaded.blocked_entirely);
        let loaded = Loaded {
            verdict: policy.verdict,
            text,
            version,
            at: self.clock.now(),
            blocked,
            blocked_entirely,
            members: memory.members().count(),
        };
        tracing::info!(
            mode = word(Some(loaded.verdict)),
            members = loaded.members,
            blocked = loaded.blocked.len() + loaded.blocked_entirely.len(),
            "the table is loaded"
        );
        self.isolation.loaded = Some(loaded);
        self.loaded_well();
        if policy.verdict == Verdict::Drop {
            self.cut(&some, &all, policy).await;
            self.begin_trial();
        }
    }

    fn loaded_well(&mut self) {
        self.isolation.load_problem = None;
        self.isolation.failures = 0;
        self.isolation.retry_at = None;
    }

    async fn cut(&mut self, some: &BTreeSet<IpAddr>, all: &BTreeSet<IpAddr>, policy: &Policy) {
        if some.is_empty() && all.is_empty() {
            return;
        }
        let kernel = &self.config.isolation.kernel;
        let ports = policy.cluster_ports();
        let on_ports = kernel.cut(some, Some(&ports)).await;
        let everywhere = kernel.cut(all, None).await;
        let closed = [&on_ports, &everywhere].into_iter().flatten().sum::<usize>();
        self.isolation.sockets_closed = u32::try_from(closed).unwrap_or(u32::MAX);
        self.isolation.cut_problem = on_ports.and(everywhere).err().map(|error| {
            format!("packets of blocked hosts are dropped, but their sockets stay open: {error}")
        });
        tracing::info!(closed, "sockets of blocked hosts closed");
    }

    /// A table that drops is loaded for the first time: the next call makes a new connection, which
    /// shows whether the CA can still be reached.
    fn begin_trial(&mut self) {
        let before = self.isolation.trial;
        let (now, contact) = (self.clock.elapsed(), self.isolation.last_contact);
        self.isolation.trial = before.loaded(now, contact, self.config.isolation.trial_time);
        if before != self.isolation.trial {
            self.client = None;
            self.sync.end();
        }
    }

    fn not_loaded(&mut self, why: &str) {
        let last = match self.isolation.in_force() {
            Some(verdict) => format!("the last one ({}) stays", word(Some(verdict))),
            None => "there is none of this agent".to_owned(),
        };
        let wait = state::backoff(self.isolation.failures, rand::random());
        self.isolation.failures = self.isolation.failures.saturating_add(1);
        self.isolation.retry_at = Some(self.clock.elapsed() + wait);
        tracing::error!(%why, retry_in = ?wait, "the table could not be loaded: {last}");
        self.isolation.load_problem = Some(format!("the table was not loaded, {last}: {why}"));
    }

    /// With `off` there is no table, unless somebody else made one.
    async fn remove_table(&mut self) {
        if self.isolation.record.table {
            let ruleset = clear(&self.node.cluster);
            if let Err(error) = self.config.isolation.kernel.load(&ruleset).await {
                self.not_loaded(&format!("it cannot be removed: {error}"));
                return;
            }
            self.isolation.record.table = false;
            self.keep_record();
            tracing::info!("isolation is off: the table is removed");
        }
        self.isolation.loaded = None;
        self.isolation.counters = Counters::default();
        self.isolation.cut_problem = None;
        self.loaded_well();
    }

    /// The version whose settings, members and blocks are in the kernel; with isolation off there is
    /// nothing to load, and what was received is applied.
    pub(super) fn applied(&self) -> Option<v1::SyncVersion> {
        let off = self.memory.settings()?.isolation() == v1::Isolation::Off;
        match &self.isolation.loaded {
            Some(loaded) => loaded.version,
            None => self.memory.version().filter(|_| off),
        }
    }

    pub(super) fn isolation_report(&self) -> v1::IsolationReport {
        let isolation = &self.isolation;
        let in_force = match isolation.in_force() {
            None => v1::Isolation::Off,
            Some(Verdict::Count) => v1::Isolation::Audit,
            Some(Verdict::Drop) => v1::Isolation::Enforce,
        };
        let problem = isolation.problem(self.config.isolation.trial_time).unwrap_or_default();
        let plain = |c: char| if c == ' ' || c.is_ascii_graphic() { c } else { '?' };
        v1::IsolationReport {
            in_force: in_force.into(),
            problem: problem.chars().map(plain).take(PROBLEM_LEN_MAX).collect(),
            blocked_packets: isolation.counters.blocked,
            refused_packets: isolation.counters.refused,
            sockets_closed: isolation.sockets_closed,
            loaded_unix: isolation.loaded.as_ref().map_or(0, |l| l.at.unix_timestamp()),
            spared_blocks: 0,
        }
    }

    pub(super) fn isolation_status(&self) -> IsolationStatus {
        let isolation = &self.isolation;
        let wanted =
            self.memory.settings().map_or("off", |s| super::view::isolation_word(s.isolation()));
        let loaded = isolation.loaded.as_ref();
        IsolationStatus {
            wanted: wanted.to_owned(),
            in_force: word(isolation.in_force()).to_owned(),
            members: loaded.map_or(0, |l| l.members),
            blocked: loaded.map_or(0, |l| l.blocked.union(&l.blocked_entirely).count()),
            blocked_packets: isolation.counters.blocked,
            refused_packets: isolation.counters.refused,
            loaded_at: loaded.map(|l| l.at.into()),
            sockets_closed: isolation.sockets_closed,
            problem: isolation.problem(self.config.isolation.trial_time),
        }
    }

    /// When the CA was not heard for half a lease, the moment at which this node's peers take it out
    /// of their sets.
    pub(super) fn lease_ends(&self, now: OffsetDateTime) -> Option<OffsetDateTime> {
        let settings = self.memory.settings()?;
        let lease = time::Duration::seconds(settings.lease_seconds);
        let guarded = matches!(settings.isolation(), v1::Isolation::Audit | v1::Isolation::Enforce);
        let kept = self.memory.server_time_unix();
        let kept =
            raymtls_proto::clock::from_unix(kept).filter(|at| *at > OffsetDateTime::UNIX_EPOCH);
        let heard = self.contact.last_contact.map(crate::moment::Moment::time).or(kept)?;
        let half_over = now >= heard.checked_add(lease / 2)?;
        (guarded && lease.is_positive() && half_over).then(|| heard.checked_add(lease)).flatten()
    }
}
