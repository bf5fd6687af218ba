//! What the agent says of itself: to the socket, to the status file, to metrics and to people. It
//! holds no secret.

mod first_failure;
mod running;
pub mod tunnel;

use std::fmt::Write;

use raymtls_proto::span::Span;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

pub use self::first_failure::FirstFailure;
use crate::{
    caclock::{SKEW_REPORTED, skew_text},
    failure::Failure,
    isolation::status::IsolationStatus,
    moment::Moment,
    served::{Served, horizon::State},
};

/// One consistent view of the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// When this was true.
    pub as_of: Moment,
    /// Release of the agent.
    pub agent_version: String,
    /// Process id of the daemon.
    pub pid: u32,
    /// The deployment.
    pub trust_domain: String,
    /// The cluster.
    pub cluster: String,
    /// This node.
    pub node: String,
    /// What it is for.
    pub role: String,
    /// Addresses certified for it.
    pub addresses: Vec<String>,
    /// DNS names certified for it.
    pub dns_names: Vec<String>,
    /// `enrolled`, `refused`, `re-enrol needed` or `left`.
    pub standing: String,
    /// Reason word and sentence behind a standing other than `enrolled`.
    pub standing_reason: Option<String>,
    /// Contact with the CA.
    pub ca: Contact,
    /// The agent identity.
    pub identity: CertificateStatus,
    /// Key folders, oldest first.
    pub key_folders: Vec<FolderStatus>,
    /// Until when what starts now finds a valid leaf, if nothing is renewed any more.
    pub files_work_until: Option<Moment>,
    /// Whether Ray's token is there; absent where it is off.
    #[serde(default)]
    pub has_ray_token: Option<bool>,
    /// `ray.env` of this node.
    pub ray_env: String,
    /// What the operator set for the cluster.
    pub settings: Option<SettingsStatus>,
    /// Version of the cluster's history received, `epoch/counter`.
    pub received: Option<String>,
    /// Version applied on this node.
    pub applied: Option<String>,
    /// Whether the identity key is out of reach of Ray's tasks.
    pub two_key_split: SplitStatus,
    /// Certificates fetched since the start.
    pub renewals: u64,
    /// Seconds this host's clock was ahead of the CA's (behind: negative) when the CA answered last;
    /// absent before its first answer.
    #[serde(default)]
    pub clock_skew_seconds: Option<i64>,
    /// What was done about Ray on a revoked node; absent elsewhere.
    #[serde(default)]
    pub ray_stop: Option<RayStopStatus>,
    /// Who may reach Ray's ports of this host.
    #[serde(default)]
    pub isolation: IsolationStatus,
    /// The data path of mode tunnel; absent in mode files.
    #[serde(default)]
    pub tunnel: Option<tunnel::TunnelStatus>,
    /// What Ray's processes on this host serve; absent until they were looked at, and where Ray's TLS is
    /// not Ray's own.
    #[serde(default)]
    pub served: Option<Served>,
    /// Why they could not be looked at.
    #[serde(default)]
    pub served_problem: Option<String>,
    /// When other nodes take this one out of their tables; absent until the CA has not heard it for
    /// half a lease.
    #[serde(default)]
    pub lease_ends: Option<Moment>,
    /// What fails first if nobody acts; without the CA where it does not answer.
    #[serde(default)]
    pub first_failure: Option<FirstFailure>,
    /// What is wrong and does not stop the agent.
    pub problems: Vec<String>,
}

impl Status {
    /// Whether what starts now finds all it needs: a valid leaf, Ray's token unless it is off, and a
    /// table where isolation is enforced.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.files_work_until.is_some()
            && self.has_ray_token != Some(false)
            && self.isolation.is_ready()
            && self.tunnel.as_ref().is_none_or(|tunnel| tunnel.ready)
    }
}

impl Status {
    /// Whether the CA revoked this node: `exec` starts nothing on it, whatever its files say.
    pub(crate) fn is_revoked(&self) -> bool {
        let words = |text: &str| {
            text.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "REVOKED")
        };
        self.standing == "refused" && self.standing_reason.as_deref().is_some_and(words)
    }

    /// Read from the file of a daemon that ended: nothing is renewed any more.
    #[must_use]
    pub fn of_the_dead(mut self) -> Self {
        self.first_failure = FirstFailure::of(&self, false);
        self
    }
}

/// Contact with the CA.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contact {
    /// Whether the last call got an answer; absent before the first.
    pub reachable: Option<bool>,
    /// The last answer.
    pub last_contact: Option<Moment>,
    /// What went wrong last, while it has not gone right again.
    pub last_error: Option<String>,
    /// When it is tried again.
    pub next_try: Option<Moment>,
}

/// One certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateStatus {
    /// Serial number.
    pub serial: String,
    /// Its last moment.
    pub not_after: Moment,
    /// When the next one is fetched.
    pub renew_at: Moment,
}

/// One key folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FolderStatus {
    /// `k<N>`.
    pub name: String,
    /// `current` points to it.
    pub current: bool,
    /// `ray.env` names it.
    pub named_by_ray_env: bool,
    /// The CA renews its key no more.
    pub key_too_old: bool,
    /// Its leaf.
    pub leaf: CertificateStatus,
}

/// What the operator set for the cluster, as far as the agent acts on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingsStatus {
    /// Life of a Ray leaf, in seconds.
    pub leaf_life_seconds: i64,
    /// `files` or `tunnel`.
    pub mode: String,
    /// `off`, `audit` or `enforce`.
    pub isolation: String,
    /// Ray's token is on.
    pub ray_token: bool,
    /// Flags with which `ray start` keeps to the cluster's port plan here.
    #[serde(default)]
    pub ray_start_flags: Vec<String>,
}

/// Ray was stopped because this node is revoked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RayStopStatus {
    /// When.
    pub at: Moment,
    /// How many processes.
    pub stopped: usize,
    /// The first of them.
    pub named: Vec<String>,
    /// Why some of Ray may still run.
    pub problem: Option<String>,
}

impl RayStopStatus {
    fn line(&self, now: OffsetDateTime) -> String {
        let mut text = match self.named.as_slice() {
            [] => "none stopped".to_owned(),
            named => format!("{} stopped ({})", self.stopped, named.join(", ")),
        };
        write!(text, " {}: this node is revoked", self.at.relative(now))
            .expect("writing to a String");
        if let Some(problem) = &self.problem {
            write!(text, "; NOT ALL: {problem}").expect("writing to a String");
        }
        text
    }
}

/// Whether the two-key split holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SplitStatus {
    /// Absent where the agent was not told who runs Ray.
    pub holds: Option<bool>,
    /// Why, in words.
    pub why: String,
}

impl SplitStatus {
    /// Ray's tasks must not reach the identity key: Ray runs neither as root nor as the agent.
    #[must_use]
    pub fn of(ray_uid: Option<u32>, agent_uid: u32) -> Self {
        let (holds, why) = match ray_uid {
            None => (None, "give --ray-uid, the user that runs Ray".to_owned()),
            Some(0) => (Some(false), "Ray runs as root: any task can read the identity key".into()),
            Some(uid) if uid == agent_uid => {
                let why = "Ray runs as the agent's user: any task can read the identity key";
                (Some(false), why.to_owned())
            }
            Some(uid) => {
                let why = "as long as Ray is started as it is configured to run";
                (Some(true), format!("{why}: Ray as uid {uid}, the agent as {agent_uid}"))
            }
        };
        Self { holds, why }
    }
}

/// What `status --check` says of the status of a daemon that answers.
///
/// # Errors
/// The CA does not serve this node, or what starts now would not find all it needs.
pub fn check(status: &Status, now: OffsetDateTime) -> Result<(), Failure> {
    if status.standing != "enrolled" {
        let reason = status.standing_reason.as_deref().unwrap_or("the CA gave no reason");
        return Err(Failure::Refused(format!("standing: {}: {reason}", status.standing)));
    }
    if status.files_work_until.is_none_or(|until| until.time() <= now) {
        return Err(Failure::Failed("there is no valid leaf: see `CA` and `problem`".to_owned()));
    }
    if status.has_ray_token == Some(false) {
        return Err(Failure::Failed("Ray's token is missing: see `CA` and `problem`".to_owned()));
    }
    if let Some(problem) = status.tunnel.as_ref().and_then(|tunnel| tunnel.problem.as_ref()) {
        return Err(Failure::Failed(format!("tunnel: {problem}")));
    }
    if let Some(problem) = &status.isolation.problem {
        return Err(Failure::Failed(format!("isolation: {problem}")));
    }
    if !status.isolation.is_ready() {
        return Err(Failure::Failed("isolation: the table is not loaded yet".to_owned()));
    }
    running::check(status.served.as_ref(), now)
}

/// The status for a person. `now` is the reader's clock; `live` says that the daemon answered itself.
#[must_use]
pub fn table(status: &Status, now: OffsetDateTime, live: bool) -> String {
    let mut out = String::new();
    let mut line = |name: &str, text: &str| {
        writeln!(out, "{name:<18} {text}").expect("writing to a String");
    };
    if !live {
        let age = status.as_of.relative(now);
        line("DAEMON", &format!("does not answer; what follows was true {age}"));
    }
    line("node", &format!("{} ({}) of cluster {}", status.node, status.role, status.cluster));
    line("addresses", &join(&status.addresses));
    if !status.dns_names.is_empty() {
        line("DNS names", &join(&status.dns_names));
    }
    let reason = status.standing_reason.as_deref().map(|r| format!(": {r}")).unwrap_or_default();
    line("standing", &format!("{}{reason}", status.standing));
    line("CA", &contact(&status.ca, now));
    if let Some(skew) = status.clock_skew_seconds {
        line("clock", &clock_line(skew));
    }
    let is_renewed = status.standing == "enrolled";
    let shown = |leaf: &CertificateStatus| {
        if is_renewed {
            certificate(leaf, now)
        } else {
            format!("{}, not renewed any more", ends(leaf, now))
        }
    };
    line("identity", &shown(&status.identity));
    for folder in &status.key_folders {
        let marks = [
            (folder.current, "current"),
            (folder.named_by_ray_env, "ray.env"),
            (folder.key_too_old, "key too old to renew"),
            (folder.leaf.not_after.time() <= now, "EXPIRED"),
        ];
        let marks: Vec<&str> = marks.iter().filter(|(on, _)| *on).map(|(_, mark)| *mark).collect();
        let name = format!("key folder {}", folder.name);
        let leaf = if folder.key_too_old { ends(&folder.leaf, now) } else { shown(&folder.leaf) };
        line(&name, format!("{leaf}  {}", marks.join(", ")).trim_end());
    }
    match status.files_work_until {
        _ if status.is_revoked() => line("files", "exec starts nothing: this node is revoked"),
        Some(until) => line("files work until", &format!("{until} ({})", until.relative(now))),
        None => line("files work until", "there is no valid leaf"),
    }
    if status.has_ray_token == Some(false) {
        line(
            "Ray token",
            "MISSING: the CA has not delivered it yet, Ray is not started without it",
        );
    }
    for (name, text) in running::lines(status, now) {
        line(name, &text);
    }
    line("ray.env", &status.ray_env);
    if let Some(settings) = &status.settings {
        let token = if settings.ray_token { "on" } else { "off" };
        let life = Span::seconds(settings.leaf_life_seconds);
        let text = format!(
            "mode {}, isolation {}, leaf life {life}, Ray token {token}",
            settings.mode, settings.isolation
        );
        line("settings", &text);
    }
    for text in status.tunnel.iter().flat_map(|tunnel| tunnel.lines(now)) {
        line("tunnel", &text);
    }
    line("isolation", &status.isolation.line(status.applied.as_deref(), now));
    if let Some(problem) = &status.isolation.problem {
        line("ISOLATION PROBLEM", problem);
    }
    let split = match status.two_key_split.holds {
        Some(true) => "holds",
        Some(false) => "DOES NOT HOLD",
        None => "unknown",
    };
    line("two-key split", &format!("{split}: {}", status.two_key_split.why));
    if let Some(ray_stop) = &status.ray_stop {
        line("Ray", &ray_stop.line(now));
    }
    for problem in &status.problems {
        line("problem", problem);
    }
    if let Some(served) = &status.served {
        out.push_str(&running::processes(served, now));
    }
    out
}

/// The other side of a second is within what is measured.
fn clock_line(skew_seconds: i64) -> String {
    if skew_seconds.saturating_abs() <= SKEW_REPORTED.whole_seconds() {
        return "agrees with the CA's".to_owned();
    }
    format!("WRONG: {}", skew_text(skew_seconds))
}

fn contact(ca: &Contact, now: OffsetDateTime) -> String {
    let last = ca.last_contact.map_or_else(|| "never".to_owned(), |at| at.relative(now));
    let mut text = match ca.reachable {
        Some(true) => format!("answers, last {last}"),
        Some(false) => format!("AWAY, last answer {last}"),
        None => "not asked yet".to_owned(),
    };
    if let Some(error) = &ca.last_error {
        text = format!("{text}; {error}");
    }
    match ca.next_try {
        Some(at) if at.time() > now => text = format!("{text}; next try {}", at.relative(now)),
        Some(_) => text.push_str("; trying now"),
        None => {}
    }
    text
}

fn certificate(certificate: &CertificateStatus, now: OffsetDateTime) -> String {
    format!("{}, {}", ends(certificate, now), renewal(certificate.renew_at, now))
}

fn ends(certificate: &CertificateStatus, now: OffsetDateTime) -> String {
    let not_after = certificate.not_after;
    format!("{}  ends {not_after} ({})", certificate.serial, not_after.relative(now))
}

fn renewal(at: Moment, now: OffsetDateTime) -> String {
    if at.time() > now {
        return format!("renewal due {}", at.relative(now));
    }
    format!("RENEWAL OVERDUE since {at} ({})", at.relative(now))
}

fn join(words: &[String]) -> String {
    words.join(", ")
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;

    use super::*;

    #[test]
    fn a_revoked_node_is_promised_nothing() {
        let now = datetime!(2026-11-24 08:00 UTC);
        let later = Moment::from(now + time::Duration::days(9));
        let certificate =
            CertificateStatus { serial: "01".into(), not_after: later, renew_at: later };
        let mut status = crate::agent::empty_status(now);
        status.identity = certificate;
        status.files_work_until = Some(later);
        status.first_failure = FirstFailure::of(&status, false);
        let promises = ["files work until", "fails first", "renewal due"];
        status.standing = "enrolled".into();
        let text = table(&status, now, true);
        assert!(promises.iter().all(|promise| text.contains(promise)), "{text}");
        status.standing = "refused".into();
        status.standing_reason = Some("REVOKED: node n1 is revoked".into());
        let text = table(&status, now, true);
        assert!(!promises.iter().any(|promise| text.contains(promise)), "{text}");
        assert!(text.contains("exec starts nothing"), "{text}");
        status.standing_reason = Some("KEY_REVOKED: a key".into());
        assert!(!status.is_revoked());
    }

    #[test]
    fn a_renewal_that_is_overdue_is_said_to_be() {
        let at = Moment::from(datetime!(2026-11-24 08:00 UTC));
        for (now, text) in [
            (datetime!(2026-11-24 07:58 UTC), "renewal due in 2m"),
            (datetime!(2026-11-24 08:00 UTC), "RENEWAL OVERDUE since 2026-11-24T08:00:00Z (now)"),
            (
                datetime!(2026-11-24 08:01 UTC),
                "RENEWAL OVERDUE since 2026-11-24T08:00:00Z (1m ago)",
            ),
        ] {
            assert_eq!(renewal(at, now), text);
        }
    }

    #[test]
    fn a_try_whose_time_has_come_is_under_way() {
        let at = datetime!(2026-11-24 08:00 UTC);
        let away = Contact {
            reachable: Some(false),
            last_contact: None,
            last_error: None,
            next_try: Some(at.into()),
        };
        for (now, end) in [
            (at - time::Duration::seconds(18), "; next try in 18s"),
            (at, "; trying now"),
            (at + time::Duration::seconds(18), "; trying now"),
        ] {
            let text = contact(&away, now);
            assert!(text.ends_with(end), "{text}");
        }
    }

    #[test]
    fn the_split_holds_only_between_two_users() {
        assert_eq!(SplitStatus::of(None, 0).holds, None);
        assert_eq!(SplitStatus::of(Some(0), 0).holds, Some(false));
        assert_eq!(SplitStatus::of(Some(0), 990).holds, Some(false));
        assert_eq!(SplitStatus::of(Some(990), 990).holds, Some(false));
        assert_eq!(SplitStatus::of(Some(1000), 0).holds, Some(true));
    }
}
