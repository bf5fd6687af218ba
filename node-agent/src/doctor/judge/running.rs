//! What runs of Ray: until when it is served a good leaf, what it was told, who runs it, what it leaves
//! open. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::Path,
};

use raymtls_proto::v1;

use super::super::{
    Finding, Level,
    facts::{Facts, Process, Unseen, Variables},
};
use crate::{
    config::Config,
    keyfolder::number_of,
    moment::Moment,
    served::{
        ProcessServed, Served, Serves, SocketServed,
        horizon::State,
        kind::{Class, printable},
    },
    status::{SplitStatus, named},
};

/// So many processes or sockets are named.
const NAMED_MAX: usize = 5;

pub(super) fn judge(facts: &Facts, config: &Config) -> Vec<Finding> {
    let mut all = Vec::new();
    match &facts.served {
        Ok(served) => {
            all.extend(horizons(facts, served));
            all.extend(serves(facts, served));
            all.push(open_ports(facts, served));
        }
        Err(why) => all.push(Finding::unknown("horizon", why.as_str(), super::more_rights(facts))),
    }
    all.extend(environment(facts));
    all.push(token(facts));
    all.push(split(facts, config));
    all.push(key_access(facts));
    all
}

fn horizons(facts: &Facts, served: &Served) -> Vec<Finding> {
    if let Some(why) = &facts.not_asked {
        let what = format!("what Ray serves was not asked: {why}");
        let next = "run it as root, or as the user that runs Ray";
        return vec![Finding::unknown("horizon", what, next)];
    }
    if served.processes.is_empty() {
        return vec![Finding::ok("horizon", "no process of Ray listens on this host")];
    }
    let node = "recycle Ray on this host: `ray stop`, then start it through `node-agent exec`; a file that \
                was renewed helps no process that runs";
    let drivers = "their owners must start them again before that: nobody else can, and one that is older \
                   than its leaf hangs once its workers are recycled";
    let of = |check, class, state, at, next| {
        let finding = horizon(facts, check, state?, at, next);
        Some(naming(finding, served, class, state?))
    };
    [
        of("horizon", Class::Node, served.state, served.horizon, node),
        of("drivers", Class::Driver, served.drivers_state, served.drivers_horizon, drivers),
    ]
    .into_iter()
    .flatten()
    .chain(revoked(served))
    .collect()
}

/// With the processes that stand there, unless all is well.
fn naming(mut finding: Finding, served: &Served, class: Class, state: State) -> Finding {
    if finding.level == Level::Ok {
        return finding;
    }
    let stand = served.processes.iter().filter(|p| p.class == class && p.state == Some(state));
    let names: Vec<String> = stand.take(NAMED_MAX).map(named).collect();
    if !names.is_empty() {
        finding.what = format!("{}: {}", finding.what, names.join(", "));
    }
    finding
}

/// Ray asks nobody whether a key was revoked.
fn revoked(served: &Served) -> Option<Finding> {
    let names: Vec<String> = served.with_revoked_key().take(NAMED_MAX).map(named).collect();
    (!names.is_empty()).then(|| {
        Finding::new(
            "served",
            Level::Fail,
            format!("key revoked, and still served: {}", names.join(", ")),
            "recycle Ray on this host, and have the owners of drivers start them again: Ray takes a revoked \
             key until its leaf ends",
        )
    })
}

fn horizon(
    facts: &Facts,
    check: &'static str,
    state: State,
    at: Option<Moment>,
    next: &str,
) -> Finding {
    let when = at.map_or_else(
        || "no leaf of this node is served".to_owned(),
        |at| format!("the first leaf that is served ends {at} ({})", at.relative(facts.now)),
    );
    let what = format!("{}: {when}", state.word());
    match state {
        State::Fresh => Finding::ok(check, what),
        State::RecycleDue => Finding::new(check, Level::Warn, what, next),
        State::RecycleOverdue => Finding::new(check, Level::Fail, what, next),
        State::Unknown => Finding::new(
            check,
            Level::Warn,
            format!("a process of Ray that should serve a leaf of this node shows none; {when}"),
            "`ray_environment` and `served` of this list say which and why",
        ),
    }
}

fn serves(facts: &Facts, served: &Served) -> Vec<Finding> {
    let mut all = Vec::new();
    let named = |what: &dyn Fn(&SocketServed) -> Option<String>| {
        let of = |p: &ProcessServed, s: &SocketServed| {
            what(s).map(|why| format!("{} at {}: {why}", who(p), s.address))
        };
        let all =
            served.processes.iter().flat_map(|p| p.sockets.iter().filter_map(move |s| of(p, s)));
        all.take(NAMED_MAX).collect::<Vec<_>>()
    };
    let refused = named(&|socket| match &socket.serves {
        Serves::Leaf { refused_us, .. } | Serves::Foreign { refused_us, .. } => refused_us.clone(),
        Serves::Plain { .. } | Serves::None { .. } | Serves::NotAsked { .. } => None,
    });
    if !refused.is_empty() {
        all.push(Finding::new(
            "served",
            Level::Fail,
            refused.join("; "),
            "`node-agent doctor --explain ADDRESS` says why; mostly Ray there has other roots: recycle it",
        ));
    }
    let foreign = named(&|socket| match &socket.serves {
        Serves::Foreign { why, .. } => Some(why.clone()),
        Serves::Leaf { .. }
        | Serves::Plain { .. }
        | Serves::None { .. }
        | Serves::NotAsked { .. } => None,
    });
    if !foreign.is_empty() {
        all.push(Finding::new(
            "served",
            Level::Warn,
            foreign.join("; "),
            "a program of a task, or Ray with other files than the agent's: start it through `node-agent exec`",
        ));
    }
    let on_tls = |socket: &SocketServed| socket.port.as_deref().is_some_and(is_covered);
    let plain = named(&|socket| match &socket.serves {
        Serves::Plain { seen: true } if on_tls(socket) => Some("no TLS".to_owned()),
        Serves::Plain { .. }
        | Serves::Leaf { .. }
        | Serves::Foreign { .. }
        | Serves::None { .. }
        | Serves::NotAsked { .. } => None,
    });
    if !plain.is_empty() {
        all.push(Finding::new(
            "served",
            Level::Fail,
            format!("{} on ports that Ray's TLS covers", plain.join("; ")),
            "stop Ray, and start it through `node-agent exec`: it runs without RAY_USE_TLS",
        ));
    }
    if !served.blind.is_empty() {
        all.push(Finding::unknown("served", served.blind.join("; "), super::more_rights(facts)));
    }
    all
}

fn who(process: &ProcessServed) -> String {
    let pid = process.pid.map(|pid| format!(" {pid}")).unwrap_or_default();
    format!("{}{pid}", process.kind.word())
}

/// Whether Ray's TLS covers a port of the plan.
fn is_covered(port: &str) -> bool {
    raymtls_proto::ports::PORTS.iter().any(|row| row.name == port && row.tls)
}

/// Ports that have no TLS, bound where the network reaches them.
fn open_ports(facts: &Facts, served: &Served) -> Finding {
    let reaches = |socket: &SocketServed| {
        socket.address.parse::<SocketAddr>().is_ok_and(|addr| !addr.ip().is_loopback())
    };
    let is_plain = |socket: &SocketServed| match &socket.serves {
        Serves::Plain { .. } => true,
        Serves::NotAsked { .. } | Serves::None { .. } => {
            socket.port.as_deref().is_some_and(|port| !is_covered(port))
        }
        Serves::Leaf { .. } | Serves::Foreign { .. } => false,
    };
    let mut open = BTreeMap::new();
    for process in &served.processes {
        for socket in process.sockets.iter().filter(|socket| reaches(socket) && is_plain(socket)) {
            let port = socket.port.as_deref().map(|port| format!(" ({port})")).unwrap_or_default();
            open.insert(format!("{}{port}", socket.address), who(process));
        }
    }
    if open.is_empty() {
        return Finding::ok(
            "plain_ports",
            "no port without TLS is bound where the network reaches it",
        );
    }
    let named: Vec<String> =
        open.iter().take(2 * NAMED_MAX).map(|(at, who)| format!("{who} at {at}")).collect();
    let what = format!("without TLS where the network reaches them: {}", named.join(", "));
    let enforced =
        facts.agent.status().is_some_and(|status| status.isolation.in_force == "enforce");
    if enforced {
        return Finding::ok(
            "plain_ports",
            format!("{what}; isolation lets in only whom the port table names"),
        );
    }
    Finding::new(
        "plain_ports",
        Level::Warn,
        what,
        "Ray has no TLS for them, and its token does not cover metrics: isolation=enforce closes them; \
         `ray start --dashboard-host=127.0.0.1` for the dashboard",
    )
}

/// What each process was told: the files of a key folder, and the token.
fn environment(facts: &Facts) -> Vec<Finding> {
    if facts.processes.is_empty() {
        return vec![Finding::ok("ray_environment", "no process of Ray was found")];
    }
    let mut groups: BTreeMap<Told, Vec<String>> = BTreeMap::new();
    for process in &facts.processes {
        let named = format!("{} {}", process.kind.word(), process.pid);
        match &process.variables {
            Ok(variables) => {
                for told in told(facts, variables) {
                    // One group however many files they name: a task can name any.
                    let (told, named) = if let Told::Elsewhere(files) = told {
                        (Told::Elsewhere(String::new()), format!("{named} with {files}"))
                    } else {
                        (told, named.clone())
                    };
                    groups.entry(told).or_default().push(named);
                }
            }
            Err(Unseen::Overwritten) => groups.entry(Told::Overwritten).or_default().push(named),
            Err(Unseen::Closed(why)) => {
                groups.entry(Told::Unread(why.clone())).or_default().push(named);
            }
        }
    }
    let findings = groups.into_iter().map(|(told, named)| told.finding(facts, &named));
    findings.collect()
}

/// What a process was told, the worst first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Told {
    NoTls,
    Gone(String),
    Elsewhere(String),
    NoToken,
    TokenInEnvironment,
    Unread(String),
    Folder(String),
    Overwritten,
}

fn told(facts: &Facts, variables: &Variables) -> Vec<Told> {
    let settings = facts.settings.as_ref().ok();
    // In tunnel mode the agent carries Ray's traffic, and Ray itself has no TLS.
    let is_files = settings.is_none_or(|settings| settings.mode() != v1::Mode::Tunnel);
    let mut all = Vec::new();
    if is_files {
        let on = variables.use_tls.as_deref();
        if on.is_some_and(|on| on == "1" || on.eq_ignore_ascii_case("true")) {
            all.push(folder(facts, variables.cert.as_deref()));
        } else {
            all.push(Told::NoTls);
        }
    }
    let wants_token = settings.map_or_else(|| has_token(facts) == Some(true), |s| s.ray_token);
    if wants_token && variables.auth_mode.as_deref() != Some("token") {
        all.push(Told::NoToken);
    }
    if variables.has_token {
        all.push(Told::TokenInEnvironment);
    }
    all
}

fn folder(facts: &Facts, cert: Option<&Path>) -> Told {
    let Some(cert) = cert else { return Told::Elsewhere("no file at all".to_owned()) };
    let inside = cert.strip_prefix(&facts.tls_dir).ok().and_then(|path| path.to_str());
    let name =
        inside.and_then(|path| path.strip_suffix("/tls.crt")).filter(|n| number_of(n).is_some());
    let Some(name) = name else { return Told::Elsewhere(printable(&cert.display().to_string())) };
    let is_there =
        facts.tls.as_ref().ok().is_none_or(|tls| tls.entries.iter().any(|e| e.name == name));
    if is_there { Told::Folder(name.to_owned()) } else { Told::Gone(name.to_owned()) }
}

fn has_token(facts: &Facts) -> Option<bool> {
    facts.agent.status().and_then(|status| status.has_ray_token)
}

impl Told {
    fn finding(self, facts: &Facts, named: &[String]) -> Finding {
        const CHECK: &str = "ray_environment";
        let more = named.len().saturating_sub(NAMED_MAX);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let who = format!(
            "{}{more}",
            named.iter().take(NAMED_MAX).cloned().collect::<Vec<_>>().join(", ")
        );
        let again = "stop it, and start it through `node-agent exec`";
        match self {
            Self::NoTls => {
                let what = format!("{who}: started without RAY_USE_TLS=1, it speaks plaintext");
                Finding::new(CHECK, Level::Fail, what, again)
            }
            Self::Gone(folder) => Finding::new(
                CHECK,
                Level::Fail,
                format!(
                    "{who}: started with key folder {folder}, which is gone: no new worker can start"
                ),
                again,
            ),
            Self::Elsewhere(_) => Finding::new(
                CHECK,
                Level::Warn,
                format!(
                    "{who}: started with files in no key folder of {}",
                    facts.tls_dir.display()
                ),
                "files behind a link or elsewhere change under it, and a leaf can meet another key: start it \
                 through `node-agent exec`",
            ),
            Self::NoToken => Finding::new(
                CHECK,
                Level::Fail,
                format!(
                    "{who}: started without RAY_AUTH_MODE=token: its HTTP ports run code for anyone"
                ),
                again,
            ),
            Self::TokenInEnvironment => Finding::new(
                CHECK,
                Level::Warn,
                format!(
                    "{who}: Ray's token stands in the environment, which children and logs inherit"
                ),
                "use RAY_AUTH_TOKEN_PATH, as `node-agent exec` does",
            ),
            Self::Unread(why) => {
                let what = format!("{who}: what it was told cannot be read: {why}");
                Finding::unknown(CHECK, what, super::more_rights(facts))
            }
            Self::Overwritten => {
                let what =
                    "their titles lie over what they were told: they have it from the raylet";
                Finding::ok(CHECK, format!("{who}: {what}"))
            }
            Self::Folder(folder) => {
                let note = match named_by_ray_env(facts) {
                    Some(env) if env == folder => "which ray.env names",
                    Some(_) => {
                        "older than what ray.env names; it is renewed as long as it is served"
                    }
                    None => "which is there",
                };
                Finding::ok(CHECK, format!("{who}: key folder {folder}, {note}"))
            }
        }
    }
}

fn named_by_ray_env(facts: &Facts) -> Option<String> {
    let folders = &facts.agent.status()?.key_folders;
    Some(folders.iter().find(|folder| folder.named_by_ray_env)?.name.clone())
}

fn token(facts: &Facts) -> Finding {
    let wanted = facts.settings.as_ref().ok().map(|settings| settings.ray_token);
    let wanted = wanted.or_else(|| Some(facts.agent.status()?.settings.as_ref()?.ray_token));
    if wanted == Some(false) {
        return Finding::new(
            "ray_token",
            Level::Warn,
            "it is off: whoever reaches Ray's HTTP ports runs code, TLS or not",
            "`ca-admin cluster set CLUSTER ray-token=on`, then recycle Ray everywhere",
        );
    }
    let Ok(tls) = &facts.tls else {
        return Finding::unknown(
            "ray_token",
            "the TLS folder cannot be read",
            super::more_rights(facts),
        );
    };
    if tls.entries.iter().any(|entry| entry.name == "ray_token") {
        return Finding::ok("ray_token", "it is there; `tls_files` judges who may read it");
    }
    match wanted {
        None => Finding::unknown(
            "ray_token",
            "it is not there, and whether the cluster has one is not known",
            "start the daemon",
        ),
        Some(_) => Finding::new(
            "ray_token",
            Level::Fail,
            "it is missing, and Ray is not started without it",
            "the CA brings it: `node-agent status`, line CA",
        ),
    }
}

/// By who runs Ray in truth, as far as it runs; else by who is configured to.
fn split(facts: &Facts, config: &Config) -> Finding {
    const CHECK: &str = "two_key_split";
    let agent = match (&facts.state, &facts.tls) {
        (Ok(folder), _) | (Err(_), Ok(folder)) => folder.uid,
        (Err(_), Err(_)) => {
            return Finding::unknown(
                CHECK,
                "the agent's folders cannot be seen",
                super::more_rights(facts),
            );
        }
    };
    let of_node = |process: &&Process| process.kind.class() == Class::Node;
    let running: BTreeSet<u32> = facts.processes.iter().filter(of_node).map(|p| p.uid).collect();
    let uids: Vec<Option<u32>> = if running.is_empty() {
        vec![config.ray_uid]
    } else {
        running.into_iter().map(Some).collect()
    };
    let splits: Vec<SplitStatus> =
        uids.into_iter().map(|uid| SplitStatus::of(uid, agent)).collect();
    if let Some(broken) = splits.iter().find(|split| split.holds == Some(false)) {
        return Finding::new(
            CHECK,
            Level::Warn,
            broken.why.as_str(),
            "give Ray a user of its own, the agent --ray-uid and --ray-group (docs/operations.md, Start Ray)",
        );
    }
    match splits.first() {
        Some(split) if split.holds == Some(true) => Finding::ok(CHECK, split.why.as_str()),
        Some(_) | None => Finding::unknown(
            CHECK,
            "Ray does not run, and who runs it is not configured",
            "ray_uid in agent.toml",
        ),
    }
}

/// Each new worker reads the key: Ray takes one it cannot open for an empty one, and says nothing.
fn key_access(facts: &Facts) -> Finding {
    const CHECK: &str = "key_access";
    let Ok(tls) = &facts.tls else {
        return Finding::unknown(CHECK, "the TLS folder cannot be read", super::more_rights(facts));
    };
    let blocked = facts.processes.iter().filter_map(|process| {
        let cert = process.variables.as_ref().ok()?.cert.as_ref()?;
        let folder = cert.strip_prefix(&tls.path).ok()?.parent()?.to_str()?;
        let entry = |name: &str| tls.entries.iter().find(|entry| entry.name == name);
        let (folder, key) = (entry(folder)?, entry(&format!("{folder}/tls.key"))?);
        let may = |uid: u32, gid: u32, mode: u32, bit: u32| {
            let bits = if process.uid == uid {
                mode >> 6
            } else if process.gids.contains(&gid) {
                mode >> 3
            } else {
                mode
            };
            process.uid == 0 || bits & bit != 0
        };
        let reads =
            may(folder.uid, folder.gid, folder.mode, 0o1) && may(key.uid, key.gid, key.mode, 0o4);
        (!reads).then(|| format!("{} {} (uid {})", process.kind.word(), process.pid, process.uid))
    });
    let blocked: Vec<String> = blocked.take(NAMED_MAX).collect();
    if blocked.is_empty() {
        return Finding::ok(
            CHECK,
            "no running process of Ray is kept from the key it was started with",
        );
    }
    Finding::new(
        CHECK,
        Level::Fail,
        format!("may not read the key any more: {}: no new worker can start", blocked.join(", ")),
        "Ray's user must be in the group of --ray-group; restart the daemon after changing it, then recycle Ray",
    )
}
