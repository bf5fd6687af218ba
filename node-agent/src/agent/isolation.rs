//! Isolation: brings the kernel's table in line with what the CA said last. What to enforce is decided
//! in `isolation`; here is when, and what follows from a load that did not work.

use std::{collections::BTreeSet, net::IpAddr, ops::RangeInclusive, time::Duration};

use raymtls_proto::{clock::Clock, v1};
use time::OffsetDateTime;

use super::{
    Agent, Event, Task,
    cut::{Addresses, Cutting},
};
use crate::{
    isolation::{
        Counters, Mark, Policy, Protected, Verdict, clear, host, render, render_marked, rules_in,
        status::{IsolationStatus, word},
        table::{Seen, TableError},
        trial::Trial,
    },
    state,
    statedir::{IsolationRecord, Memory},
};

/// Own addresses and gateways are looked at this often, whatever else happens.
const LOOK_PAUSE: Duration = Duration::from_secs(60);
/// All routes are looked up this often.
const LOOKUP_PAUSE: Duration = Duration::from_secs(300);
/// The table is loaded again this often: a look sees rules, not what the sets hold.
const RELOAD_PAUSE: Duration = Duration::from_secs(300);
/// Looks at the table that fail in a row before it is a problem.
const BLIND_MAX: u32 = 3;
/// Endpoints of the CA that are kept of all that were reached.
const REACHED_MAX: usize = 16;
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
    pub(super) loaded: Option<Loaded>,
    /// What is to be in force, kept on the disk or not yet: a disk that is full must not let a node in
    /// again that was cut off.
    told: Memory,
    counters: Counters,
    pub(super) cutting: Cutting,
    load_problem: Option<String>,
    /// Looks that failed in a row.
    blind: u32,
    blind_problem: Option<String>,
    /// Of all routes; those that `/proc` shows are read each time.
    gateways: BTreeSet<IpAddr>,
    failures: u32,
    retry_at: Option<Duration>,
    look_at: Duration,
    reload_at: Duration,
    lookup_at: Duration,
    count_at: Duration,
    counting: Option<Task>,
    looking_up: Option<Task>,
    last_contact: Option<Duration>,
}

/// A table as this agent loaded it.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) verdict: Verdict,
    /// The ruleset with counters at zero, and without a mark.
    text: String,
    mark: Mark,
    rules: usize,
    /// The cluster's.
    pub(super) ports: Vec<RangeInclusive<u16>>,
    /// Those of the plan that stay open.
    left_open: Vec<u16>,
    /// All of which is in the table; absent while that is not known.
    pub(super) version: Option<v1::SyncVersion>,
    at: OffsetDateTime,
    pub(super) blocked: BTreeSet<IpAddr>,
    pub(super) blocked_entirely: BTreeSet<IpAddr>,
    /// Addresses that the CA lists and that are not cut off.
    spared: usize,
    members: usize,
}

impl Loaded {
    /// Which load it is.
    pub(super) fn mark(&self) -> Mark {
        self.mark
    }
}

impl Isolation {
    /// What is to be in force.
    pub(super) fn told(&self) -> &Memory {
        &self.told
    }

    pub(super) fn counters(&self) -> Counters {
        self.counters
    }

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
        let open = self.loaded.iter().flat_map(|loaded| &loaded.left_open);
        let open: Vec<String> = open.map(u16::to_string).collect();
        let open = (!open.is_empty()).then(|| {
            format!(
                "the port plan covers {}, SSH's or this agent's: left open on this host; give Ray \
                 other ports",
                open.join(", ")
            )
        });
        let problems =
            [&self.load_problem, &rolled_back, &self.blind_problem, &self.cutting.problem];
        problems.into_iter().flatten().next().cloned().or(open)
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
                self.problem(format!(
                    "the table of cluster {cluster}, in which this host was before, stays in force: \
                     {error}; remove it by `node-agent isolation clear --cluster {cluster}`"
                ));
            }
        }
        self.isolation.record = if record.cluster == self.node.cluster.as_str() {
            record
        } else {
            IsolationRecord { cluster: self.node.cluster.to_string(), ..IsolationRecord::default() }
        };
        if self.isolation.record.enforced {
            self.isolation.trial = Trial::Passed;
        }
        let heard = self.clock.now().unix_timestamp() - self.memory.server_time_unix();
        let heard = u64::try_from(heard).ok().map(Duration::from_secs);
        self.isolation.last_contact = heard.and_then(|ago| self.clock.elapsed().checked_sub(ago));
        self.isolation.on_duty = true;
        self.find_table().await;
        let memory = self.memory.clone();
        self.enforce(&memory).await;
    }

    /// What an earlier run left in the kernel: its counters go on, and what bears an agent's mark is
    /// removed with isolation off even where no file knows of it.
    async fn find_table(&mut self) {
        match self.config.isolation.kernel.look(&self.node.cluster).await {
            Ok(Some(seen)) => {
                self.isolation.counters = seen.counters;
                self.isolation.record.table |= seen.mark.is_some();
            }
            Ok(None) => {}
            // A load says it where there is one; with isolation off nothing of this is needed.
            Err(error) => tracing::debug!(%error, "no look at the table"),
        }
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
        self.tend_cut(now);
        self.look_up(now);
        self.count(now);
    }

    /// Routes that `/proc` does not show, beside the loop.
    fn look_up(&mut self, now: Duration) {
        if self.isolation.loaded.is_none() || now < self.isolation.lookup_at {
            return;
        }
        self.isolation.lookup_at = now + LOOKUP_PAUSE;
        let (kernel, events) = (self.config.isolation.kernel.clone(), self.event_sender.clone());
        let task = tokio::spawn(async move {
            let found = host::all_gateways(&kernel).await;
            let _ = events.send(Event::Gateways(found)).await;
        });
        self.isolation.looking_up = Some(Task(task.abort_handle()));
    }

    pub(super) async fn found_gateways(&mut self, found: BTreeSet<IpAddr>) {
        if found != self.isolation.gateways {
            self.isolation.gateways = found;
            self.enforce_again().await;
        }
    }

    /// The CA answered on a connection that ended there: its place is no name server's word.
    fn note_endpoint(&mut self) {
        let reached = self.client.as_ref().and_then(|connected| connected.client.reached());
        let Some(reached) = reached.map(host::canonical) else { return };
        let known = &mut self.isolation.record.reached;
        let is_literal = || host::literal_endpoints(&self.node.node_endpoints).contains(&reached);
        if known.first() == Some(&reached) || is_literal() {
            return;
        }
        known.retain(|endpoint| *endpoint != reached);
        known.insert(0, reached);
        known.truncate(REACHED_MAX);
        self.isolation.look_at = Duration::ZERO;
        self.keep_record();
    }

    fn count(&mut self, now: Duration) {
        let Some(loaded) = self.isolation.loaded.as_ref() else { return };
        if now < self.isolation.count_at {
            return;
        }
        let mark = loaded.mark;
        self.isolation.count_at = now + self.config.isolation.count_pause;
        let (kernel, cluster) = (self.config.isolation.kernel.clone(), self.node.cluster.clone());
        let events = self.event_sender.clone();
        let task = tokio::spawn(async move {
            let _ = events.send(Event::Counted(mark, kernel.look(&cluster).await)).await;
        });
        self.isolation.counting = Some(Task(task.abort_handle()));
    }

    /// The table's counters, or that somebody removed, replaced or emptied it.
    pub(super) async fn counted(&mut self, mark: Mark, seen: Result<Option<Seen>, TableError>) {
        // Another was loaded while somebody looked.
        let Some(loaded) = self.isolation.loaded.as_ref().filter(|l| l.mark == mark) else {
            return;
        };
        let what = match seen {
            Err(error) => return self.not_seen_table(&error),
            Ok(None) => "removed",
            Ok(Some(seen)) if seen.mark != Some(mark) => "replaced",
            Ok(Some(seen)) => {
                self.isolation.counters = seen.counters;
                if seen.rules == loaded.rules { "" } else { "changed" }
            }
        };
        (self.isolation.blind, self.isolation.blind_problem) = (0, None);
        if !what.is_empty() {
            tracing::error!("somebody {what} the table of this cluster: it is loaded again");
            self.isolation.loaded = None;
            self.enforce_again().await;
        }
    }

    fn not_seen_table(&mut self, error: &TableError) {
        self.isolation.blind = self.isolation.blind.saturating_add(1);
        if self.isolation.blind == BLIND_MAX {
            tracing::warn!(%error, "the table cannot be looked at");
            self.isolation.blind_problem = Some(format!(
                "the table was loaded and cannot be looked at since: whether it is still there is not \
                 known: {error}"
            ));
        }
    }

    /// The CA answered, on a connection made after the last load if a trial runs.
    pub(super) fn isolation_heard(&mut self) {
        if self.isolation.on_duty {
            self.note_endpoint();
        }
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
        if let Some(before) = before.settings().filter(|before| *before != settings) {
            self.isolation.trial = self.isolation.trial.settings_changed();
            if before.port_plan != settings.port_plan {
                self.isolation.trial = self.isolation.trial.plan_changed();
                if std::mem::take(&mut self.isolation.record.enforced) {
                    self.keep_record();
                }
            }
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
        let fresh = self.clock.elapsed() < self.isolation.reload_at;
        let same = |loaded: &&mut Loaded| fresh && loaded.text == text;
        if let Some(loaded) = self.isolation.loaded.as_mut().filter(same) {
            if !memory.is_filling() {
                loaded.version = memory.version();
            }
            self.loaded_well();
            return;
        }
        let mark = Mark(rand::random());
        match self.load(&policy, mark).await {
            Ok(()) => self.loaded(&policy, text, mark, memory).await,
            Err(error) => self.not_loaded(&error.to_string()),
        }
    }

    fn policy(
        &self,
        memory: &Memory,
        settings: v1::Settings,
        verdict: Verdict,
    ) -> std::io::Result<Policy> {
        let (capture, tunnel_ports) = (self.capture(&settings), self.tunnel_ports(&settings));
        let mut policy = Policy::of(&self.node.cluster, self.node.role, settings, verdict);
        policy.capture = capture;
        policy.people(memory);
        let literal = host::literal_endpoints(&self.node.node_endpoints);
        // What listens on loopback alone is not guarded anyway.
        let listens = self.config.http_listen.filter(|listen| !listen.ip().is_loopback());
        let listens = listens.iter().map(std::net::SocketAddr::port);
        policy.never_guarded = listens.chain(tunnel_ports).collect();
        policy.protected = Protected {
            ca: literal.iter().map(std::net::SocketAddr::ip).collect(),
            endpoints: literal.into_iter().chain(self.isolation.record.reached.clone()).collect(),
            gateways: &host::gateways() | &self.isolation.gateways,
            own: host::own_addresses()?.into_iter().chain(self.node.addresses.clone()).collect(),
        };
        Ok(policy)
    }

    async fn load(&mut self, policy: &Policy, mark: Mark) -> Result<(), TableError> {
        if !self.isolation.record.table {
            // Kept first: a table that nobody knows of would never be removed.
            self.isolation.record.table = true;
            self.keep_record();
        }
        // As counted last: somebody may wait for this load, and a look takes as long as it does.
        let ruleset = render_marked(policy, self.isolation.counters, mark);
        self.config.isolation.kernel.load(&ruleset).await
    }

    async fn loaded(&mut self, policy: &Policy, text: String, mark: Mark, memory: &Memory) {
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
        let fresh = Addresses {
            some: fresh(&blocked, |loaded| &loaded.blocked),
            all: fresh(&blocked_entirely, |loaded| &loaded.blocked_entirely),
        };
        let loaded = Loaded {
            verdict: policy.verdict,
            rules: rules_in(&text),
            text,
            mark,
            ports: policy.cut_ports(),
            left_open: policy.left_open(),
            spared: policy.spared(),
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
        self.isolation.reload_at = self.clock.elapsed() + RELOAD_PAUSE;
        self.loaded_well();
        // Before sockets are closed under it: it counts what it cuts.
        self.follow_tunnel().await;
        if policy.verdict == Verdict::Drop {
            self.isolation.cutting.add(fresh);
            self.cut().await;
            self.begin_trial();
        }
    }

    fn loaded_well(&mut self) {
        self.isolation.load_problem = None;
        self.isolation.failures = 0;
        self.isolation.retry_at = None;
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
        self.isolation.cutting.forget();
        (self.isolation.blind, self.isolation.blind_problem) = (0, None);
        self.loaded_well();
    }

    /// The version whose settings, members and blocks are in the kernel; with isolation off there is
    /// nothing to load, and what was received is applied.
    pub(super) fn applied(&self) -> Option<v1::SyncVersion> {
        if self.is_tunnel() {
            return self.tunnel_acked();
        }
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
            sockets_closed: isolation.cutting.closed,
            flows_cut: self.flows_cut(),
            loaded_unix: isolation.loaded.as_ref().map_or(0, |l| l.at.unix_timestamp()),
            spared_blocks: isolation
                .loaded
                .as_ref()
                .map_or(0, |l| u32::try_from(l.spared).unwrap_or(u32::MAX)),
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
            sockets_closed: isolation.cutting.closed,
            spared: loaded.map_or(0, |l| l.spared),
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
