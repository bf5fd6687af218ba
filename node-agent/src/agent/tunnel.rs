//! Mode tunnel: keeps the data path in line with what the CA said. In this order: the kernel's rules,
//! the tunnel's rules, a process that has read them, a proof of capture; then Ray may be started. What is
//! missing is a refusal with its reason, never plaintext.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use raymtls_proto::{
    clock::{self, Clock},
    durable::{self, Access},
    identity::Role,
    v1,
};
use tokio::{sync::oneshot, task::JoinSet};

use super::{Agent, Event, Task};
use crate::{
    api::{Answer, ErrorKind},
    capture,
    isolation::{Capture, Mark, PROOF_ADDRESS, Verdict},
    keyfolder::KeyReaders,
    moment::Moment,
    state::AWAY_BACKOFF_MAX,
    status::tunnel::{PEERS_MAX, TunnelPeer, TunnelStatus},
    supervise::{Plan, Program, Supervised, Supervisor, client},
    tunnel::{
        control::{Ask, PROOF_PORT, Status},
        rules::Rules,
    },
    tunnelrules::{self, Heard},
};

/// A reload that failed is tried again after this.
const RELOAD_PAUSE: Duration = Duration::from_secs(1);
/// How long the agent waits for a tunnel that is not wanted any more.
const STOP_TIME_MAX: Duration = Duration::from_secs(3);
/// The CA counts as away for so long after it was back: agents of other nodes ask it later, and until then
/// their leaves are the ones that ended meanwhile.
const OTHERS_RETURN: Duration = Duration::from_secs(240);
const _: () = assert!(OTHERS_RETURN.as_secs() > AWAY_BACKOFF_MAX.as_secs());
/// Stands for a user that no process has: what would be the tunnel's is captured and goes nowhere.
const NO_UID: u32 = u32::MAX - 1;
/// Characters of a problem in a report.
const PROBLEM_LEN_MAX: usize = 200;

/// What is done about mode tunnel, and what is still to be done. Moments are time that passes.
#[derive(Debug, Default)]
pub(super) struct Tunnel {
    supervisor: Option<Supervisor>,
    /// As it was seen last.
    seen: Supervised,
    /// What a tunnel of another mode or time left was looked for.
    swept: bool,
    /// Stopped by hand.
    stopped: bool,
    generation: u64,
    written: Option<Rules>,
    write_at: Duration,
    reload_wanted: bool,
    reload_at: Duration,
    problem: Option<String>,
    reload_problem: Option<String>,
    /// What is in force in the kernel and in the tunnel.
    acked: Option<v1::SyncVersion>,
    /// Flows cut for the version, and in all.
    cut: (Option<v1::SyncVersion>, u32),
    cut_total: u64,
    asked: Asked,
    proved: Option<(Mark, time::OffsetDateTime)>,
    ask_at: Duration,
    prove_at: Duration,
    asking: Option<Task>,
    away: Option<Away>,
}

/// The CA is away, or came back a moment ago.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Away {
    since_unix: i64,
    until: Duration,
}

/// By whether the last call reached it: for a while after it is back it counts as away. `at_unix` is when it
/// was heard last.
fn away(
    reachable: Option<bool>,
    before: Option<Away>,
    at_unix: i64,
    now: Duration,
) -> Option<Away> {
    match (reachable, before) {
        (Some(true), Some(away)) if now > away.until => None,
        (Some(true), away) => away,
        (Some(false), away) => {
            let since_unix = away.map_or(at_unix, |away| away.since_unix);
            Some(Away { since_unix, until: now + OTHERS_RETURN })
        }
        // It was not asked yet.
        (None, away) => away.or(Some(Away { since_unix: at_unix, until: now })),
    }
}

/// What a look at the tunnel brought.
#[derive(Debug, Default)]
pub(super) struct Asked {
    /// Of the process that takes new flows.
    status: Option<Status>,
    /// Flows of those that drain.
    draining_flows: u64,
    problem: Option<String>,
    /// Of the table with this mark.
    proof: Option<(Mark, Result<(), String>)>,
}

impl Agent {
    /// Whether the cluster's mode is tunnel, and this node one that has a tunnel.
    pub(super) fn is_tunnel(&self) -> bool {
        let told = self.isolation.told().settings().or_else(|| self.memory.settings());
        told.is_some_and(|settings| settings.mode() == v1::Mode::Tunnel)
            && self.node.role != Role::Driver
    }

    /// What the kernel's table does in mode tunnel.
    pub(super) fn capture(&self, settings: &v1::Settings) -> Option<Capture> {
        let is_tunnel = settings.mode() == v1::Mode::Tunnel && self.node.role != Role::Driver;
        let config = &self.config.tunnel;
        is_tunnel.then(|| Capture {
            users: self.ray_users(),
            tunnel_uid: config.user.map_or(NO_UID, |(uid, _)| uid),
            captured_port: config.captured_port,
            inbound_port: config.inbound_port,
            proof_port: PROOF_PORT,
        })
    }

    /// Ports of this host that no plan may take in mode tunnel.
    pub(super) fn tunnel_ports(&self, settings: &v1::Settings) -> Vec<u16> {
        let config = &self.config.tunnel;
        self.capture(settings)
            .map(|_| vec![config.captured_port, config.inbound_port, PROOF_PORT])
            .unwrap_or_default()
    }

    fn ray_users(&self) -> BTreeSet<u32> {
        let own = rustix::process::geteuid().as_raw();
        [0, own].into_iter().chain(self.config.ray_uid).collect()
    }

    /// Who reads the keys of the key folders.
    pub(super) fn set_key_readers(&mut self) -> bool {
        let readers = match (self.is_tunnel(), self.config.tunnel.user) {
            (false, _) => KeyReaders::Ray,
            (true, Some((_, gid))) => KeyReaders::Tunnel(gid),
            (true, None) => KeyReaders::Nobody,
        };
        self.tls.readers(readers)
    }

    /// A certificate, a root or a CRL in a key folder is another.
    pub(super) fn key_folder_changed(&mut self) {
        self.tunnel.reload_wanted = true;
        self.tunnel.reload_at = Duration::ZERO;
    }

    /// What time and news bring. Nothing in it waits for long.
    pub(super) async fn tend_tunnel(&mut self) {
        if !self.is_on_duty() {
            return;
        }
        self.align_key_readers();
        if !self.is_tunnel() {
            return self.end_tunnel().await;
        }
        self.tunnel.problem = self.why_no_tunnel();
        if self.tunnel.problem.is_none() {
            self.follow_tunnel().await;
        }
        self.begin_supervision();
        self.look_at_tunnel();
    }

    fn align_key_readers(&mut self) {
        if !self.set_key_readers() {
            return;
        }
        let folders: Vec<_> = self.folders.iter().map(|held| held.folder.clone()).collect();
        match self.tls.align_access(&folders) {
            Ok(were_others) => self.note_other_readers(were_others),
            Err(error) => {
                self.problem(format!("key folders keep their readers of before: {error}"));
            }
        }
    }

    /// A key that Ray's tasks could read until now is not the one to protect their traffic.
    pub(super) fn note_other_readers(&mut self, were_others: bool) {
        if were_others && self.is_tunnel() {
            tracing::info!("Ray's group could read the key until now: the tunnel gets a new one");
            self.folder_wanted = true;
        }
    }

    /// What must be so before any of it can work.
    fn why_no_tunnel(&self) -> Option<String> {
        let config = &self.config.tunnel;
        let Some((uid, gid)) = config.user else {
            return Some(format!(
                "there is no user {}: make one (useradd --system --no-create-home {}), or name another \
                 as tunnel.user in agent.toml",
                config.user_name, config.user_name
            ));
        };
        let own = rustix::process::geteuid().as_raw();
        let is_ray = self.config.ray_uid == Some(uid)
            || self.config.ray_gid.or(self.node.ray_gid) == Some(gid);
        if uid == 0 || is_ray {
            let whose = if uid == 0 { "root" } else { "Ray's user or group" };
            return Some(format!(
                "tunnel.user is {whose}: the tunnel needs a user and a group of its own, so that its key is \
                 out of Ray's reach"
            ));
        }
        if own != 0 && own != uid && !config.external {
            return Some(
                "this agent is not root and cannot start ray-tunnel as another user: let systemd start it \
                 (ray-tunnel.socket) and set tunnel.external = true in agent.toml"
                    .to_owned(),
            );
        }
        if self.tunnel.stopped {
            return Some(
                "ray-tunnel was stopped by `node-agent tunnel stop`: restart node-agent to start it"
                    .to_owned(),
            );
        }
        match self.isolation.in_force() {
            Some(_) => None,
            None => Some(
                "the kernel's table is not loaded: nothing is captured, and nothing is started"
                    .to_owned(),
            ),
        }
    }

    /// Rules, then the process reads them.
    pub(super) async fn follow_tunnel(&mut self) {
        if !self.is_tunnel() || self.isolation.loaded.is_none() || self.tunnel.stopped {
            return;
        }
        self.see_supervisor();
        if let Err(why) = self.write_rules() {
            self.tunnel.reload_problem = Some(why);
            return;
        }
        let now = self.clock.elapsed();
        if self.tunnel.reload_wanted && now >= self.tunnel.reload_at {
            self.reload_tunnel().await;
        }
        if !self.tunnel.reload_wanted {
            self.tunnel.acked = self.isolation.loaded.as_ref().and_then(|loaded| loaded.version);
        }
    }

    fn see_supervisor(&mut self) {
        let Some(supervisor) = &self.tunnel.supervisor else { return };
        let state = supervisor.state();
        if state != self.tunnel.seen {
            (self.tunnel.ask_at, self.tunnel.prove_at) = (Duration::ZERO, Duration::ZERO);
            // Whatever was read before: it is asked to read again.
            self.key_folder_changed();
            self.tunnel.seen = state;
        }
    }

    /// Control sockets, that of the process that takes new flows first.
    fn controls(&self) -> Vec<PathBuf> {
        if self.config.tunnel.external {
            return vec![self.config.tunnel.control()];
        }
        if self.tunnel.seen.pid.is_none() { Vec::new() } else { self.tunnel.seen.controls.clone() }
    }

    /// Brings the rules file in line. An unchanged one is written again now and then: its age tells the
    /// tunnel whether this agent lives.
    fn write_rules(&mut self) -> Result<(), String> {
        let Some(number) = self.newest_valid(self.clock.now()).or(self.current) else {
            return Err("there is no key folder yet".to_owned());
        };
        let key_folder = self.tls.folder_path(number);
        let heard = self.ca_heard();
        let told = self.isolation.told().clone();
        let Some(settings) = told.settings() else { return Err("no settings yet".to_owned()) };
        let loaded = self.isolation.loaded.as_ref().ok_or("no table yet")?;
        let blocked = loaded.blocked.union(&loaded.blocked_entirely).copied();
        let listens = self.config.http_listen.map(|listen| listen.port());
        let closed: Vec<u16> =
            self.tunnel_ports(settings).into_iter().chain(listens).chain([22]).collect();
        let node = &self.node;
        let mut rules =
            tunnelrules::rules(node, &told, settings, &key_folder, blocked, &closed, heard);
        let now = self.clock.elapsed();
        let differs = self.tunnel.written.as_ref().is_none_or(|written| !same(written, &rules));
        if !differs && now < self.tunnel.write_at {
            return Ok(());
        }
        let path = self.config.tunnel.rules();
        if self.tunnel.generation == 0 {
            self.tunnel.generation = Rules::read(&path).map_or(0, |rules| rules.generation);
        }
        rules.generation = self.tunnel.generation + 1;
        rules.written_unix = self.clock.now().unix_timestamp();
        if let Some(fault) = rules.fault() {
            return Err(format!("the tunnel's rules cannot be: {fault}"));
        }
        let gid = self.config.tunnel.user.map(|(_, gid)| gid);
        let access = Access { mode: 0o640, uid: None, gid };
        make_folder(&self.config.tunnel.folder, gid)
            .and_then(|()| durable::replace(&path, rules.to_text().as_bytes(), access))
            .map_err(|error| format!("the tunnel's rules cannot be written: {error}"))?;
        self.tunnel.generation = rules.generation;
        self.tunnel.written = Some(rules);
        self.tunnel.write_at = now + self.config.tunnel.write_pause;
        self.key_folder_changed();
        Ok(())
    }

    fn ca_heard(&mut self) -> Heard {
        let last = self.contact.last_contact.map(|at| at.time().unix_timestamp());
        let at_unix = last.unwrap_or_else(|| self.memory.server_time_unix()).max(1);
        let now = self.clock.elapsed();
        self.tunnel.away = away(self.contact.reachable, self.tunnel.away, at_unix, now);
        match self.tunnel.away {
            Some(away) => Heard { at_unix: away.since_unix, is_away: true },
            None => Heard { at_unix, is_away: false },
        }
    }

    /// All of its processes read rules and key folder anew, and cut what those forbid.
    async fn reload_tunnel(&mut self) {
        let controls = self.controls();
        let mut failed = None;
        // All at once: who drains and answers late holds up nobody.
        let mut asked: JoinSet<_> = controls
            .into_iter()
            .enumerate()
            .map(|(index, control)| async move { (index, client::reload(&control).await) })
            .collect();
        while let Some(answer) = asked.join_next().await {
            let Ok((index, answer)) = answer else { continue };
            match answer {
                Ok(done) => self.count_cut(done.flows_cut),
                // One that drains may be gone; it is not asked again.
                Err(error) if index == 0 => failed = Some(error.to_string()),
                Err(error) => tracing::debug!(%error, "an old ray-tunnel was not reached"),
            }
        }
        self.tunnel.reload_wanted = failed.is_some();
        if let Some(why) = &failed {
            self.tunnel.reload_at = self.clock.elapsed() + RELOAD_PAUSE;
            if self.tunnel.reload_problem.as_ref() != Some(why) {
                tracing::error!(%why, "ray-tunnel did not take the new rules: what was in force stays");
            }
        }
        self.tunnel.reload_problem = failed;
        self.tunnel.ask_at = Duration::ZERO;
    }

    fn count_cut(&mut self, flows: u64) {
        if flows == 0 {
            return;
        }
        tracing::warn!(
            flows,
            "flows were cut: their peer is blocked, revoked or no member any more"
        );
        let version = self.isolation.loaded.as_ref().and_then(|loaded| loaded.version);
        let count = u32::try_from(flows).unwrap_or(u32::MAX);
        let (of, known) = self.tunnel.cut;
        let known = if of == version { known } else { 0 };
        self.tunnel.cut = (version, known.saturating_add(count));
        self.tunnel.cut_total = self.tunnel.cut_total.saturating_add(flows);
        self.sync.report_soon();
    }

    fn begin_supervision(&mut self) {
        let config = &self.config.tunnel;
        let ready = self.tunnel.problem.is_none() && self.tunnel.written.is_some();
        let Some((uid, gid)) = config.user else { return };
        if !ready || config.external || self.tunnel.supervisor.is_some() {
            return;
        }
        let own = rustix::process::geteuid().as_raw();
        let port = config.captured_port;
        let captured = ["127.0.0.1", "::1"]
            .map(|loopback| SocketAddr::new(loopback.parse().expect("two addresses"), port));
        let has_v6 = std::path::Path::new("/proc/net/if_inet6").exists();
        let captured = captured.into_iter().filter(|at| has_v6 || at.is_ipv4()).collect();
        let any = ["0.0.0.0", "::"].map(|any| any.parse().expect("two addresses"));
        let own_addresses: Vec<IpAddr> =
            if config.any_address { any.to_vec() } else { self.node.addresses.clone() };
        let inbound = own_addresses
            .into_iter()
            .filter(|at| has_v6 || at.is_ipv4())
            .map(|at| SocketAddr::new(at, config.inbound_port))
            .collect();
        let program = Program {
            path: config.program.clone(),
            user: (own == 0).then_some((uid, gid)),
            rules: config.rules(),
        };
        let plan = Plan { program, folder: config.folder.clone(), gid, captured, inbound };
        self.tunnel.supervisor = Some(Supervisor::begin(plan));
    }

    /// Asks how it stands, and proves capture, beside the loop.
    fn look_at_tunnel(&mut self) {
        let now = self.clock.elapsed();
        let controls = self.controls();
        let Some(mark) = self.isolation.loaded.as_ref().map(|loaded| loaded.mark()) else { return };
        let proved = self.tunnel.proved.is_some_and(|(of, _)| of == mark);
        let prove = !proved || now >= self.tunnel.prove_at;
        if controls.is_empty()
            || (now < self.tunnel.ask_at && proved)
            || self.tunnel.asking.is_some()
        {
            return;
        }
        let pause = if proved { self.config.tunnel.ask_pause } else { RELOAD_PAUSE };
        self.tunnel.ask_at = now + pause;
        if prove {
            self.tunnel.prove_at = now + self.config.tunnel.proof_pause;
        }
        let addresses = if prove { self.proof_addresses() } else { Vec::new() };
        let events = self.event_sender.clone();
        let task = tokio::spawn(async move {
            let mut asked = look(&controls).await;
            if prove && asked.status.is_some() {
                asked.proof = Some((mark, capture::prove(&controls, &addresses).await));
            }
            let _ = events.send(Event::TunnelSeen(Box::new(asked))).await;
        });
        self.tunnel.asking = Some(Task(task.abort_handle()));
    }

    /// A member of each family; where there is none, an address that is handed over for this alone.
    fn proof_addresses(&self) -> Vec<IpAddr> {
        let own: BTreeSet<IpAddr> = self.node.addresses.iter().copied().collect();
        let name = self.node.node.as_str();
        let told = self.isolation.told();
        let others: Vec<IpAddr> = told
            .members()
            .filter(|(other, peer)| *other != name && peer.role != Role::Driver)
            .flat_map(|(_, peer)| peer.addresses.iter().copied().collect::<Vec<_>>())
            .filter(|address| !own.contains(address))
            .collect();
        let v4 = others.iter().copied().find(IpAddr::is_ipv4);
        let v6 = others.iter().copied().find(IpAddr::is_ipv6);
        let mut all: Vec<IpAddr> = v4.into_iter().chain(v6).collect();
        if all.is_empty() {
            all.push(PROOF_ADDRESS.into());
        }
        all
    }

    pub(super) fn tunnel_seen(&mut self, asked: Asked) {
        self.tunnel.asking = None;
        if let Some((mark, proof)) = &asked.proof {
            match proof {
                Ok(()) => self.tunnel.proved = Some((*mark, self.clock.now())),
                Err(why) => {
                    tracing::error!(%why, "capture is not proved: Ray is not started");
                    self.tunnel.proved = None;
                }
            }
        }
        let proof = asked.proof.or_else(|| self.tunnel.asked.proof.take());
        self.tunnel.asked = Asked { proof, ..asked };
    }

    /// The mode is not tunnel: what is there of one ends.
    async fn end_tunnel(&mut self) {
        if let Some(supervisor) = self.tunnel.supervisor.take() {
            let stopped = supervisor.stop(Duration::ZERO);
            let _ = tokio::time::timeout(STOP_TIME_MAX, stopped).await;
            tracing::info!("mode tunnel is over: ray-tunnel was stopped");
            self.tunnel = Tunnel::default();
        }
        if std::mem::replace(&mut self.tunnel.swept, true) || self.config.tunnel.external {
            return;
        }
        // Of an agent that ran before the mode changed.
        let Ok(entries) = std::fs::read_dir(&self.config.tunnel.folder) else { return };
        for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
            if path.extension().is_some_and(|extension| extension == "sock") {
                let _ = client::ask(&path, Ask::Drain { deadline_seconds: 0 }).await;
                let _ = std::fs::remove_file(&path);
            }
        }
        let _ = std::fs::remove_file(self.config.tunnel.rules());
    }

    /// Why Ray may not be started in mode tunnel; `None` if it may.
    pub(super) fn tunnel_unready(&self) -> Option<String> {
        let tunnel = &self.tunnel;
        if let Some(why) = tunnel.problem.as_ref().or(tunnel.reload_problem.as_ref()) {
            return Some(why.clone());
        }
        if self.isolation.in_force() != Some(Verdict::Drop) {
            return Some(
                "the table does not refuse strangers yet (isolation is not enforced here)"
                    .to_owned(),
            );
        }
        if tunnel.written.is_none() {
            return Some("its rules are not written yet".to_owned());
        }
        if !self.config.tunnel.external && tunnel.seen.pid.is_none() {
            let why = tunnel.seen.problem.clone();
            return Some(why.unwrap_or_else(|| "ray-tunnel has not started yet".to_owned()));
        }
        let Some(status) = &tunnel.asked.status else {
            let why = tunnel.asked.problem.clone();
            return Some(why.unwrap_or_else(|| "ray-tunnel was not asked yet".to_owned()));
        };
        if !status.accepting {
            return Some("ray-tunnel takes no new flows: it drains".to_owned());
        }
        if let Some(stale) = &status.stale {
            return Some(format!("ray-tunnel works by older rules: {stale}"));
        }
        if tunnel.reload_wanted {
            return Some("ray-tunnel has not read the newest rules yet".to_owned());
        }
        let mark = self.isolation.loaded.as_ref().map(|loaded| loaded.mark());
        if tunnel.proved.map(|(of, _)| of) == mark && mark.is_some() {
            return None;
        }
        let failed = tunnel.asked.proof.as_ref().and_then(|(_, proof)| proof.clone().err());
        Some(failed.unwrap_or_else(|| "capture is not proved yet".to_owned()))
    }

    /// The version that kernel and tunnel have in force.
    pub(super) fn tunnel_acked(&self) -> Option<v1::SyncVersion> {
        self.tunnel.acked
    }

    pub(super) fn flows_cut(&self) -> u32 {
        self.tunnel.cut.1
    }

    pub(super) fn tunnel_report(&self) -> Option<v1::TunnelReport> {
        let status = self.tunnel_status()?;
        let plain = |c: char| if c == ' ' || c.is_ascii_graphic() { c } else { '?' };
        let problem = status.problem.unwrap_or_default();
        Some(v1::TunnelReport {
            ready: status.ready,
            problem: problem.chars().map(plain).take(PROBLEM_LEN_MAX).collect(),
            flows: u32::try_from(status.flows).unwrap_or(u32::MAX),
            flows_total: status.flows_in.saturating_add(status.flows_out),
            refused_total: status
                .refusals
                .values()
                .fold(0, |sum, count| sum.saturating_add(*count)),
            restarts: status.restarts,
            proved_unix: status.proved_at.map_or(0, |at| at.unix()),
        })
    }

    pub(super) fn tunnel_status(&self) -> Option<TunnelStatus> {
        if !self.is_tunnel() || !self.is_on_duty() {
            return None;
        }
        let tunnel = &self.tunnel;
        let process = tunnel.asked.status.clone().unwrap_or_default();
        let problem = self.tunnel_unready();
        let moment = |unix: i64| clock::from_unix(unix).map(Moment::from);
        let mut peers: Vec<TunnelPeer> = process
            .peers
            .iter()
            .filter_map(|peer| {
                Some(TunnelPeer {
                    name: peer.name.clone(),
                    address: peer.address.to_string(),
                    not_after: moment(peer.not_after_unix)?,
                    flows: peer.flows,
                })
            })
            .collect();
        peers.sort_by_key(|peer| peer.not_after.unix());
        let left_out = peers.len().saturating_sub(PEERS_MAX);
        peers.truncate(PEERS_MAX);
        let counters = self.isolation.counters();
        let external = self.config.tunnel.external.then_some(process.pid).filter(|pid| *pid != 0);
        Some(TunnelStatus {
            ready: problem.is_none(),
            problem,
            pid: tunnel.seen.pid.and_then(|pid| u32::try_from(pid).ok()).or(external),
            adopted: tunnel.seen.adopted,
            restarts: tunnel.seen.restarts,
            draining: tunnel.seen.controls.len().saturating_sub(1),
            generation: process.generation,
            flows: process.flows_now.saturating_add(tunnel.asked.draining_flows),
            flows_out: process.flows_out,
            flows_in: process.flows_in,
            flows_cut: tunnel.cut_total,
            bytes_out: process.bytes_out,
            bytes_in: process.bytes_in,
            handshakes: process.handshakes_done,
            refusals: process
                .refusals
                .iter()
                .map(|(reason, count)| (reason.as_str().to_owned(), *count))
                .collect(),
            peers,
            peers_left_out: left_out,
            oldest_flow_seconds: process.oldest_flow_seconds,
            proved_at: tunnel.proved.map(|(_, at)| at.into()),
            first_cut: process.first_cut_unix.and_then(moment),
            ca_away_since: process.ca_away_since_unix.and_then(moment),
            strangers: counters.strangers,
            uncaptured: counters.uncaptured,
            users: users_text(self.config.ray_uid),
        })
    }

    /// Asked by hand: answers when it is done, and the loop goes on meanwhile.
    pub(super) fn asked_for_handover(
        &mut self,
        deadline: Duration,
        reply: oneshot::Sender<Answer>,
    ) {
        let Some(supervisor) = &self.tunnel.supervisor else {
            let _ = reply
                .send(Answer::error(ErrorKind::Failed, no_supervisor(self.config.tunnel.external)));
            return;
        };
        let done = supervisor.handover(deadline);
        tokio::spawn(async move {
            let said =
                done.await.unwrap_or_else(|_| Err("another handover is under way".to_owned()));
            let _ = reply.send(match said {
                Ok(message) => Answer::Tunnel { message },
                Err(why) => Answer::error(ErrorKind::Failed, why),
            });
        });
    }

    pub(super) fn asked_to_stop_tunnel(
        &mut self,
        deadline: Duration,
        reply: oneshot::Sender<Answer>,
    ) {
        let Some(supervisor) = self.tunnel.supervisor.take() else {
            let _ = reply
                .send(Answer::error(ErrorKind::Failed, no_supervisor(self.config.tunnel.external)));
            return;
        };
        self.tunnel.stopped = true;
        self.tunnel.seen = Supervised::default();
        self.tunnel.asked = Asked::default();
        let done = supervisor.stop(deadline);
        tokio::spawn(async move {
            let _ = done.await;
            drop(supervisor);
            let message = "ray-tunnel is stopped: Ray's connections between nodes are refused until \
                           node-agent is restarted";
            let _ = reply.send(Answer::Tunnel { message: message.to_owned() });
        });
    }
}

fn no_supervisor(external: bool) -> &'static str {
    if external {
        "tunnel.external is set: systemd holds ray-tunnel (systemctl restart ray-tunnel)"
    } else {
        "this agent runs no ray-tunnel: the mode is not tunnel, or it was stopped"
    }
}

fn users_text(ray_uid: Option<u32>) -> String {
    match ray_uid {
        Some(0) => "root, as which Ray runs: every process of root may use Ray here".to_owned(),
        Some(uid) => format!("uid {uid} (Ray), root: every process of theirs"),
        None => "root alone: ray_uid is not set".to_owned(),
    }
}

/// But for what each writing has of its own.
fn same(one: &Rules, other: &Rules) -> bool {
    let bare =
        |rules: &Rules| Rules { generation: 0, written_unix: 0, heard_unix: 0, ..rules.clone() };
    bare(one) == bare(other)
}

fn make_folder(path: &std::path::Path, gid: Option<u32>) -> std::io::Result<()> {
    if let Some(parent) = path.parent() {
        durable::make_parents(parent)?;
    }
    durable::make_folder(path, Access { mode: 0o750, uid: None, gid })
}

async fn look(controls: &[PathBuf]) -> Asked {
    let mut asked = Asked::default();
    for (index, control) in controls.iter().enumerate() {
        match client::status(control).await {
            Ok(status) if index == 0 => asked.status = Some(status),
            Ok(status) => {
                asked.draining_flows = asked.draining_flows.saturating_add(status.flows_now);
            }
            Err(error) if index == 0 => asked.problem = Some(error.to_string()),
            Err(_) => {}
        }
    }
    asked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ca_that_is_back_counts_as_away_until_the_other_agents_may_have_asked_it() {
        let at = Duration::from_secs;
        let asked = |reachable, before, seconds| away(reachable, before, 1_000, at(seconds));
        assert_eq!(asked(Some(true), None, 5), None, "it always answered");
        let gone = asked(Some(false), None, 10);
        assert_eq!(gone, Some(Away { since_unix: 1_000, until: at(10) + OTHERS_RETURN }));
        let still = away(Some(false), gone, 2_000, at(60));
        let still_until = at(60) + OTHERS_RETURN;
        assert_eq!(still, Some(Away { since_unix: 1_000, until: still_until }), "since the first");
        assert_eq!(asked(Some(true), still, 61), still, "others still ask for it");
        assert_eq!(asked(Some(true), still, still_until.as_secs()), still);
        assert_eq!(asked(Some(true), still, still_until.as_secs() + 1), None);
        // A daemon that begins knows only when the CA was heard.
        let new = asked(None, None, 3);
        assert_eq!(new, Some(Away { since_unix: 1_000, until: at(3) }));
        assert_eq!(asked(Some(true), new, 4), None, "its first call reached it");
    }
}
