//! The status as it is made from the agent's facts, and where it goes: to whoever watches, to the
//! status file, to systemd.

use raymtls_proto::{
    clock::Clock,
    durable::{self, Access},
    identity::Role,
    leaf::LeafFacts,
    ports, v1,
};
use time::OffsetDateTime;
use tokio::time::Instant;

use super::{Agent, AgentFolder, skew};
use crate::{
    ephemeral,
    isolation::status::IsolationStatus,
    keyfolder::FOLDERS_MAX,
    moment::Moment,
    notify,
    state::{Life, Standing},
    statedir::{Identity, NodeFile, issued_at},
    status::{
        CertificateStatus, Contact, FirstFailure, FolderStatus, SettingsStatus, SplitStatus, Status,
    },
};

/// So many key folders are said to be many.
const FOLDERS_MANY: usize = 12;

impl Agent {
    pub(super) fn view(&self) -> Status {
        let now = self.clock.now();
        let mut status = empty(&self.node, &self.identity, now);
        status.standing = self.standing.word().to_owned();
        status.standing_reason = match &self.standing {
            Standing::Enrolled | Standing::Left => None,
            Standing::Refused { message, .. } => Some(message.clone()),
            Standing::ReenrolNeeded { message, .. } => {
                Some(format!("{message}; run `node-agent enroll` with a new join file"))
            }
        };
        status.ca = self.contact.clone();
        status.key_folders = self.folders.iter().map(|f| self.folder_status(f)).collect();
        status.files_work_until = self.files_work_until(now);
        status.has_ray_token = self.with_token().then(|| self.tls.has_token());
        status.ray_env = self.tls.env_path().display().to_string();
        status.settings =
            self.memory.settings().map(|settings| settings_status(settings, self.node.role));
        status.received = self.memory.version().map(version_text);
        status.applied = self.applied().map(version_text);
        let agent_uid = rustix::process::geteuid().as_raw();
        status.two_key_split = SplitStatus::of(self.config.ray_uid, agent_uid);
        status.renewals = self.renewals;
        status.clock_skew_seconds = self.clock.skew().map(seconds);
        status.problems = self.problems.clone();
        status.problems.extend(self.skew_reported().map(skew::problem));
        status.problems.extend(self.time_not_believed());
        status.problems.extend(self.not_done());
        status.problems.extend(self.unmet());
        status.ray_stop = self.ray_stop_status();
        status.isolation = self.isolation_status();
        status.tunnel = self.tunnel_status();
        (status.served, status.served_problem) = self.served_status(now);
        status.lease_ends = self.lease_ends(now).map(Moment::from);
        status.first_failure = first_failure(&status);
        status.problems.extend(status.lease_ends.map(|at| {
            format!(
                "the CA was not heard for half a lease: other nodes take this one out of their tables \
                 at {at}, and refuse it from then on"
            )
        }));
        status
    }

    /// Publishes the status where it changed.
    pub(super) fn publish(&mut self) {
        let status = self.view();
        if let Some(path) = &self.config.status_file {
            self.status_file.write(path, &status, Instant::now());
        }
        let same = {
            let last = self.status.borrow();
            Status { as_of: last.as_of, ..status.clone() } == *last
        };
        if same {
            return;
        }
        if self.is_on_duty() {
            notify::status(&status);
        }
        let text = serde_json::to_vec_pretty(&status).expect("a status is valid JSON");
        if let Err(error) = durable::replace(&self.state.status_path(), &text, Access::PUBLIC) {
            tracing::warn!(%error, "the status file cannot be written");
        }
        self.status.send_replace(status);
    }

    /// What starts now reads the current folder: its leaf's end is the first visible failure.
    pub(super) fn files_work_until(&self, now: OffsetDateTime) -> Option<Moment> {
        let not_after = self.folder(self.current?)?.folder.facts.not_after;
        (not_after > now).then(|| not_after.into())
    }

    fn folder_status(&self, held: &AgentFolder) -> FolderStatus {
        let number = held.folder.number;
        let life = held.life();
        FolderStatus {
            name: held.folder.name(),
            current: self.current == Some(number),
            named_by_ray_env: self.env_names == Some(number),
            key_too_old: held.key_too_old,
            leaf: certificate_status(&held.folder.facts, life),
        }
    }

    /// Settings that cannot be followed, and configuration that cannot work.
    fn unmet(&self) -> Vec<String> {
        let mut all = Vec::new();
        let agent_uid = rustix::process::geteuid().as_raw();
        if let Some(uid) = self.config.ray_uid.filter(|uid| *uid != 0 && *uid != agent_uid)
            && !self.is_tunnel()
            && self.config.ray_gid.or(self.node.ray_gid).is_none()
        {
            all.push(format!("uid {uid} runs Ray and cannot read its key: give --ray-group"));
        }
        if self.sync.is_contested() {
            all.push(
                "another agent uses this identity: revoke the node if it is not yours".to_owned(),
            );
        }
        let in_use = self.folders.len();
        if in_use >= FOLDERS_MANY {
            all.push(format!(
                "{in_use} of {FOLDERS_MAX} key folders are in use, each start by `exec` makes one: \
                 at {FOLDERS_MAX} there is no new key; they go some time after their leaves ended"
            ));
        }
        let Some(settings) = self.memory.settings() else { return all };
        all.extend(unknown(settings));
        if matches!(settings.isolation(), v1::Isolation::Audit | v1::Isolation::Enforce) {
            all.extend(ephemeral::problem(settings, self.node.role));
        }
        if settings.mode() == v1::Mode::Tunnel && self.node.role == Role::Driver {
            all.push("mode is tunnel, in which drivers run on members: `exec` refuses".to_owned());
        }
        all
    }
}

/// While the CA answers and serves this node, its files are renewed.
fn first_failure(status: &Status) -> Option<FirstFailure> {
    let renewed = status.ca.reachable == Some(true) && status.standing == "enrolled";
    FirstFailure::of(status, renewed)
}

/// Settings with values of a newer release.
pub(super) fn unknown(settings: &v1::Settings) -> Vec<String> {
    let text = |what: &str, value: i32, means: &str| {
        format!(
            "{what} is a value this release does not know ({value}): upgrade node-agent; {means}"
        )
    };
    let mode = v1::Mode::try_from(settings.mode)
        .is_err()
        .then(|| text("mode", settings.mode, "files are kept, `exec` refuses"));
    let isolation = v1::Isolation::try_from(settings.isolation)
        .is_err()
        .then(|| text("isolation", settings.isolation, "the last table stays"));
    mode.into_iter().chain(isolation).collect()
}

/// A status before anything happened.
pub(super) fn empty(node: &NodeFile, identity: &Identity, now: OffsetDateTime) -> Status {
    let facts = &identity.facts;
    let life = Life::of_identity(facts.serial, issued_at(facts), facts.not_after);
    Status {
        as_of: now.into(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        trust_domain: node.trust_domain.to_string(),
        cluster: node.cluster.to_string(),
        node: node.node.to_string(),
        role: node.role.to_string(),
        addresses: node.addresses.iter().map(ToString::to_string).collect(),
        dns_names: node.dns_names.clone(),
        standing: Standing::Enrolled.word().to_owned(),
        standing_reason: None,
        ca: Contact { reachable: None, last_contact: None, last_error: None, next_try: None },
        identity: certificate_status(facts, life),
        key_folders: Vec::new(),
        files_work_until: None,
        has_ray_token: None,
        ray_env: String::new(),
        settings: None,
        received: None,
        applied: None,
        two_key_split: SplitStatus { holds: None, why: String::new() },
        renewals: 0,
        clock_skew_seconds: None,
        ray_stop: None,
        isolation: IsolationStatus::default(),
        tunnel: None,
        served: None,
        served_problem: None,
        lease_ends: None,
        first_failure: None,
        problems: Vec::new(),
    }
}

fn certificate_status(facts: &LeafFacts, life: Life) -> CertificateStatus {
    CertificateStatus {
        serial: facts.serial.to_string(),
        not_after: facts.not_after.into(),
        renew_at: life.renew_at.into(),
    }
}

fn settings_status(settings: &v1::Settings, role: Role) -> SettingsStatus {
    let mode = match settings.mode() {
        v1::Mode::Files => "files",
        v1::Mode::Tunnel => "tunnel",
        v1::Mode::Unspecified => "unknown",
    };
    SettingsStatus {
        leaf_life_seconds: settings.leaf_life_seconds,
        mode: mode.to_owned(),
        isolation: isolation_word(settings.isolation()).to_owned(),
        ray_token: settings.ray_token,
        ray_start_flags: ports::ray_start_flags(role.to_proto(), settings),
    }
}

pub(super) fn isolation_word(isolation: v1::Isolation) -> &'static str {
    match isolation {
        v1::Isolation::Off => "off",
        v1::Isolation::Audit => "audit",
        v1::Isolation::Enforce => "enforce",
        v1::Isolation::Unspecified => "unknown",
    }
}

fn version_text(version: v1::SyncVersion) -> String {
    format!("{:016x}/{}", version.epoch, version.counter)
}

/// Whole seconds, to the nearest.
pub(super) fn seconds(span: time::Duration) -> i64 {
    let half = time::Duration::milliseconds(500) * if span.is_negative() { -1 } else { 1 };
    span.saturating_add(half).whole_seconds()
}
