//! Stops Ray on a revoked node. This is the policy of an honest agent and no enforcement: whoever holds
//! the host starts Ray again; peers keep it out by their own tables.
//!
//! Stopped is what belongs to this node and nothing else: `raylet` and `gcs_server`, told by the file
//! they run, of Ray's configured user, in the agent's own process and network namespaces, started with
//! a leaf of this node's TLS folder (as far as their environment can be read: under the limits of our unit
//! it cannot where Ray has another user, and all of that user's count); their descendants of the same user; and the helpers `ray start`
//! left beside them (Ray 2.60). Drivers started by hand are not: they lose their raylet and end.

mod proc;

use std::{
    collections::BTreeSet,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use raymtls_proto::{reason::Reason, v1};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use tokio::time::Instant;

use crate::state::Standing;
use proc::{Inside, Leaf, Process};

/// How long a process has to end by itself.
const GRACE: Duration = Duration::from_secs(10);
/// How long a killed one may take to be gone.
const KILLED_TIME_MAX: Duration = Duration::from_secs(2);
/// Time between two looks.
const LOOK_PAUSE: Duration = Duration::from_millis(100);
/// Processes stopped in one go; what is left is found by the next.
const STOPPED_MAX: usize = 1_024;
/// So many of them are named.
const NAMED_MAX: usize = 16;

const DAEMONS: [&str; 2] = ["raylet", "gcs_server"];
/// What `ray stop` of 2.60 looks for among Python programs that `ray start` leaves running.
const HELPERS: [&str; 5] = [
    "monitor.py",
    "log_monitor.py",
    "dashboard.py",
    "ray.util.client.server",
    "ray_process_reaper.py",
];

/// What to do about Ray on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The node is not revoked.
    NotRevoked,
    /// The cluster's setting keeps it.
    Kept,
    /// Stop what this user runs of this node's Ray.
    Stop {
        /// Ray's user.
        uid: u32,
    },
}

/// Decides. Without a configured user it is the agent's own and never everybody's; without settings
/// it is their default, which stops Ray.
#[must_use]
pub fn decide(
    standing: &Standing,
    settings: Option<&v1::Settings>,
    ray_uid: Option<u32>,
    agent_uid: u32,
) -> Decision {
    match standing {
        Standing::Refused { reason, .. } if reason == Reason::Revoked.as_str() => {}
        Standing::Enrolled
        | Standing::Refused { .. }
        | Standing::ReenrolNeeded { .. }
        | Standing::Left => return Decision::NotRevoked,
    }
    if settings.is_some_and(|settings| settings.revoked_keeps_ray) {
        return Decision::Kept;
    }
    Decision::Stop { uid: ray_uid.unwrap_or(agent_uid) }
}

/// What became of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// How many processes were stopped.
    pub stopped: usize,
    /// The first of them, daemons before others, as `NAME PID`.
    pub named: Vec<String>,
    /// Why there may be more of Ray than was stopped.
    pub problem: Option<String>,
}

/// Stops Ray of this user with leaves of this TLS folder: daemons first, then the rest, and whatever is
/// still there after [`GRACE`] by force.
pub async fn stop(uid: u32, tls_dir: PathBuf) -> Outcome {
    let looked = tokio::task::spawn_blocking(move || look(uid, &tls_dir)).await;
    let (mut held, mut outcome) = match looked {
        Ok(Ok(looked)) => looked,
        Ok(Err(error)) => return Outcome::failed(format!("/proc cannot be read: {error}")),
        Err(error) => return Outcome::failed(error.to_string()),
    };
    signal(&mut held, Signal::TERM, uid, &mut outcome);
    outcome.stopped = held.len();
    outcome.named = held.iter().take(NAMED_MAX).map(|held| held.name.clone()).collect();
    wait_gone(&mut held, GRACE).await;
    if !held.is_empty() {
        signal(&mut held, Signal::KILL, uid, &mut outcome);
        wait_gone(&mut held, KILLED_TIME_MAX).await;
    }
    if let Some(first) = held.first() {
        outcome.problem =
            Some(format!("{} of uid {uid} do not end: {} ...", held.len(), first.name));
    }
    outcome
}

impl Outcome {
    fn failed(problem: String) -> Self {
        Self { problem: Some(problem), ..Self::default() }
    }

    /// Whether there was nothing to do and nothing in the way.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

/// A process that is held on to: its number cannot become another's in our hands.
struct Held {
    handle: OwnedFd,
    name: String,
}

fn look(uid: u32, tls_dir: &Path) -> io::Result<(Vec<Held>, Outcome)> {
    let all = proc::of_user(uid)?;
    let chosen = choose(&all, &ways_to(tls_dir), own_pid());
    let mut outcome = Outcome::default();
    if chosen.len() > STOPPED_MAX {
        outcome.problem = Some(format!("{} processes, {STOPPED_MAX} at a time", chosen.len()));
    }
    let hidden =
        all.iter().filter(|p| p.inside == Inside::Hidden && is_daemon_name(&p.title)).count();
    if hidden > 0 {
        outcome.problem = Some(format!(
            "what {hidden} processes of uid {uid} that call themselves Ray's daemons run cannot be \
             seen: the agent needs the capability SYS_PTRACE"
        ));
    }
    Ok((chosen.into_iter().take(STOPPED_MAX).filter_map(hold).collect(), outcome))
}

/// The folder as it is configured and as it is without links.
fn ways_to(tls_dir: &Path) -> Vec<PathBuf> {
    let real = std::fs::canonicalize(tls_dir).ok();
    [tls_dir.to_path_buf()].into_iter().chain(real).collect()
}

fn own_pid() -> i32 {
    i32::try_from(std::process::id()).unwrap_or_default()
}

/// The processes to stop, daemons first. Pure.
fn choose<'a>(all: &'a [Process], tls_dirs: &[PathBuf], own_pid: i32) -> Vec<&'a Process> {
    let (daemons, rest): (Vec<_>, Vec<_>) = all
        .iter()
        .filter(|process| process.pid > 1 && process.pid != own_pid)
        .partition(|process| is_daemon(process, tls_dirs));
    let sessions: BTreeSet<&str> =
        daemons.iter().flat_map(|process| sessions_of(process)).collect();
    let mut pids: BTreeSet<i32> = daemons.iter().map(|process| process.pid).collect();
    let is_helper = |process: &&Process| is_helper(process, tls_dirs, &sessions);
    // Beside no daemon of this node there is no session of this node.
    if !daemons.is_empty() {
        pids.extend(rest.iter().copied().filter(is_helper).map(|process| process.pid));
    }
    // Each round finds one more generation; a tree is no deeper than it has members.
    for _ in 0..rest.len() {
        let before = pids.len();
        let children =
            rest.iter().filter(|process| pids.contains(&process.parent) && is_here(process));
        let children: Vec<i32> = children.map(|process| process.pid).collect();
        pids.extend(children);
        if pids.len() == before {
            break;
        }
    }
    let rest = rest.into_iter().filter(|process| pids.contains(&process.pid));
    daemons.into_iter().chain(rest).collect()
}

fn is_here(process: &Process) -> bool {
    match process.inside {
        Inside::Seen { .. } => true,
        Inside::Hidden | Inside::Elsewhere => false,
    }
}

fn is_daemon(process: &Process, tls_dirs: &[PathBuf]) -> bool {
    let Inside::Seen { program, leaf, .. } = &process.inside else { return false };
    is_daemon_name(&file_name(program)) && is_ours(leaf, tls_dirs)
}

fn is_daemon_name(name: &str) -> bool {
    DAEMONS.contains(&name)
}

/// Another node of the same host and user has a folder of its own, and a Ray without TLS is no node's.
/// Where we may not look it is taken for ours: it is of Ray's user, and beside us.
fn is_ours(leaf: &Leaf, tls_dirs: &[PathBuf]) -> bool {
    match leaf {
        Leaf::Hidden => true,
        Leaf::None => false,
        Leaf::At(path) => tls_dirs.iter().any(|folder| path.starts_with(folder)),
    }
}

/// A Python program that is told one of these sessions, or is one of those `ray start` leaves, with our
/// leaf. (Some overwrite their environment with a title.)
fn is_helper(process: &Process, tls_dirs: &[PathBuf], sessions: &BTreeSet<&str>) -> bool {
    let Inside::Seen { program, words, leaf } = &process.inside else { return false };
    if !file_name(program).starts_with("python") {
        return false;
    }
    let of_session = words
        .iter()
        .filter(|word| word.starts_with("--"))
        .any(|word| session_in(word).is_some_and(|session| sessions.contains(session)));
    let is_named = |word: &String| {
        HELPERS.contains(&word.as_str()) || HELPERS.contains(&file_name(Path::new(word)).as_ref())
    };
    of_session || (is_ours(leaf, tls_dirs) && words.iter().any(is_named))
}

fn file_name(path: &Path) -> std::borrow::Cow<'_, str> {
    path.file_name().unwrap_or_default().to_string_lossy()
}

fn sessions_of(process: &Process) -> Vec<&str> {
    let Inside::Seen { words, .. } = &process.inside else { return Vec::new() };
    words.iter().filter_map(|word| session_in(word)).collect()
}

/// The name Ray gives a session: `session_2026-11-24_08-00-00_123456_789`.
fn session_in(word: &str) -> Option<&str> {
    let name = &word[word.find("session_2")?..];
    let is_end = |c: char| !(c.is_ascii_digit() || c == '-' || c == '_');
    let after =
        name["session_".len()..].find(is_end).map_or(name.len(), |at| "session_".len() + at);
    Some(&name[..after])
}

/// By number and start the process is the one that was looked at.
fn hold(process: &Process) -> Option<Held> {
    let handle = pidfd_open(Pid::from_raw(process.pid)?, PidfdFlags::empty()).ok()?;
    let is_same = proc::started(process.pid).ok()? == process.started;
    is_same.then(|| Held { handle, name: format!("{} {}", process.title, process.pid) })
}

/// Those that are gone are let go; those that may not be touched too, and it is said.
fn signal(held: &mut Vec<Held>, signal: Signal, uid: u32, outcome: &mut Outcome) {
    let mut denied = 0;
    held.retain(|held| match pidfd_send_signal(&held.handle, signal) {
        Ok(()) => true,
        Err(Errno::SRCH) => false,
        Err(_) => {
            denied += 1;
            false
        }
    });
    if denied > 0 {
        outcome.problem = Some(format!(
            "{denied} processes of Ray (uid {uid}) may not be stopped: the agent needs the capability \
             KILL"
        ));
    }
}

async fn wait_gone(held: &mut Vec<Held>, most: Duration) {
    let end = Instant::now() + most;
    loop {
        forget_gone(held);
        if held.is_empty() || Instant::now() >= end {
            return;
        }
        tokio::time::sleep(LOOK_PAUSE).await;
    }
}

/// A handle is readable once its process has ended.
fn forget_gone(held: &mut Vec<Held>) {
    let mut handles: Vec<_> =
        held.iter().map(|held| PollFd::new(&held.handle, PollFlags::IN)).collect();
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    if poll(&mut handles, Some(&now)).is_err() {
        return;
    }
    let ended: Vec<bool> = handles.iter().map(|handle| !handle.revents().is_empty()).collect();
    let mut ended = ended.into_iter();
    held.retain(|_| !ended.next().unwrap_or_default());
}

#[cfg(test)]
mod tests;
