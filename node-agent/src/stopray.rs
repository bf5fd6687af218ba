//! Stops Ray on a revoked node. This is the policy of an honest agent and no enforcement: whoever holds
//! the host starts Ray again; peers keep it out by their own tables.
//!
//! Stopped is what belongs to this node and nothing else: `raylet` and `gcs_server`, told by the file
//! they run, of Ray's configured user, in the agent's own process and network namespaces, started with
//! a leaf of this node's TLS folder; their descendants of the same user; and the helpers `ray start`
//! left beside them (Ray 2.60). Drivers started by hand are not: they lose their raylet and end.

//!
//! Under the limits of our unit the environment cannot be read where Ray has another user. There a daemon
//! is this node's if its command line names a port of the cluster's plan; what names none is left alone and
//! named: it may be another cluster's on the same host.

mod proc;

use std::{
    collections::BTreeSet,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
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
/// How long all processes of Ray's user may take to be read.
const READ_TIME_MAX: Duration = Duration::from_secs(10);
/// Threads that may hang in a process that keeps them.
const STUCK_MAX: usize = 4;
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

/// The flags by which Ray's daemons are told their ports (Ray 2.60).
const PORT_FLAGS: [&str; 3] =
    ["--gcs_server_port=", "--node_manager_port=", "--object_manager_port="];

/// Threads that read processes now.
static READERS: AtomicUsize = AtomicUsize::new(0);

/// By what a process is known as this node's.
#[derive(Clone, Debug, Default)]
pub struct Marks {
    /// The node's TLS folder.
    pub tls_dir: PathBuf,
    /// The cluster's, if it is known.
    pub plan: Option<v1::PortPlan>,
    /// The session of a raylet that has just ended by itself: its helpers are still this node's.
    pub ended_session: Option<String>,
}

impl Marks {
    /// The folder as it is configured and as it is without links.
    fn folders(&self) -> Vec<PathBuf> {
        let real = std::fs::canonicalize(&self.tls_dir).ok();
        [self.tls_dir.clone()].into_iter().chain(real).collect()
    }

    fn flags(&self) -> Vec<String> {
        let Some(plan) = self.plan else { return Vec::new() };
        let ports = [plan.gcs, plan.node_manager, plan.object_manager];
        PORT_FLAGS
            .iter()
            .zip(ports)
            .filter(|(_, port)| *port != 0)
            .map(|(flag, port)| format!("{flag}{port}"))
            .collect()
    }
}

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

/// Stops Ray of this user that bears these marks: daemons first, then the rest, and whatever is
/// still there after ten seconds by force.
pub async fn stop(uid: u32, marks: Marks) -> Outcome {
    stop_within(uid, marks, READ_TIME_MAX).await
}

async fn stop_within(uid: u32, marks: Marks, read_time: Duration) -> Outcome {
    let (all, stuck) = match read_all(uid, read_time).await {
        Ok(read) => read,
        Err(error) => return Outcome::failed(format!("/proc cannot be read: {error}")),
    };
    let (mut held, mut outcome) = look(&all, uid, &marks);
    outcome.problem = outcome.problem.or(stuck);
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

/// All processes of the user, as far as they could be read in time, and why not all of it could. A thread
/// that a process keeps is left behind; the daemon and its end wait for none.
async fn read_all(uid: u32, most: Duration) -> io::Result<(Vec<Process>, Option<String>)> {
    let mut all = proc::of_user(uid)?;
    // A stuck helper keeps no daemon from being seen.
    all.sort_by_key(|process| !could_be_daemon(process));
    if READERS.fetch_add(1, Ordering::SeqCst) >= STUCK_MAX {
        READERS.fetch_sub(1, Ordering::SeqCst);
        return Ok((all, Some(stuck_text(uid, most))));
    }
    let shared = Arc::new(Mutex::new(all));
    let (ended, end) = tokio::sync::oneshot::channel();
    let work = Arc::clone(&shared);
    let read = move || {
        let get = |at: usize| lock(&work).get(at).cloned();
        let mut at = 0;
        while let Some(process) = get(at) {
            let inside = proc::read_memory(&process, matters);
            if let Some(process) = lock(&work).get_mut(at) {
                process.inside = inside;
            }
            at += 1;
        }
        READERS.fetch_sub(1, Ordering::SeqCst);
        let _ = ended.send(());
    };
    if let Err(error) = std::thread::Builder::new().name("stopray".to_owned()).spawn(read) {
        READERS.fetch_sub(1, Ordering::SeqCst);
        return Err(error);
    }
    let in_time = tokio::time::timeout(most, end).await.is_ok();
    // Taken out: a reader that comes back later finds nothing more to read.
    let all = std::mem::take(&mut *lock(&shared));
    Ok((all, (!in_time).then(|| stuck_text(uid, most))))
}

fn lock(all: &Mutex<Vec<Process>>) -> std::sync::MutexGuard<'_, Vec<Process>> {
    all.lock().expect("no code panics while it holds this")
}

fn stuck_text(uid: u32, most: Duration) -> String {
    format!(
        "a process of uid {uid} kept its command line from being read for {most:?}: what is behind it \
         was judged by less"
    )
}

fn could_be_daemon(process: &Process) -> bool {
    matches!(&process.inside, Inside::Seen { program, .. } if is_daemon_name(&file_name(program)))
}

/// The words by which something is decided here.
fn matters(word: &str) -> bool {
    session_in(word).is_some()
        || PORT_FLAGS.iter().any(|flag| word.starts_with(flag))
        || is_helper_word(word)
}

fn look(all: &[Process], uid: u32, marks: &Marks) -> (Vec<Held>, Outcome) {
    let ended = marks.ended_session.as_deref();
    let chosen = choose(all, &marks.folders(), &marks.flags(), ended, own_pid());
    let mut outcome = Outcome::default();
    if chosen.len() > STOPPED_MAX {
        outcome.problem = Some(format!("{} processes, {STOPPED_MAX} at a time", chosen.len()));
    }
    let unsure = all.iter().filter(|process| {
        could_be_daemon(process)
            && matches!(&process.inside, Inside::Seen { leaf: Leaf::Hidden, .. })
            && !chosen.iter().any(|chosen| chosen.pid == process.pid)
    });
    let unsure: Vec<String> =
        unsure.take(NAMED_MAX).map(|p| format!("{} {}", p.title, p.pid)).collect();
    if !unsure.is_empty() {
        outcome.problem = Some(format!(
            "whether {} of uid {uid} is of this node cannot be seen, and no port of the cluster's plan \
             is in its command line: left alone; stop it by hand if it is, or start Ray with the plan's ports",
            unsure.join(", ")
        ));
    }
    let hidden =
        all.iter().filter(|p| p.inside == Inside::Hidden && is_daemon_name(&p.title)).count();
    if hidden > 0 {
        outcome.problem = Some(format!(
            "what {hidden} processes of uid {uid} that call themselves Ray's daemons run cannot be \
             seen: the agent needs the capability SYS_PTRACE"
        ));
    }
    (chosen.into_iter().take(STOPPED_MAX).filter_map(hold).collect(), outcome)
}

fn own_pid() -> i32 {
    i32::try_from(std::process::id()).unwrap_or_default()
}

/// The processes to stop, daemons first. Pure.
fn choose<'a>(
    all: &'a [Process],
    tls_dirs: &[PathBuf],
    flags: &[String],
    ended_session: Option<&str>,
    own_pid: i32,
) -> Vec<&'a Process> {
    let (daemons, rest): (Vec<_>, Vec<_>) = all
        .iter()
        .filter(|process| process.pid > 1 && process.pid != own_pid)
        .partition(|process| is_daemon(process, tls_dirs, flags));
    let sessions: BTreeSet<&str> =
        daemons.iter().flat_map(|process| sessions_of(process)).chain(ended_session).collect();
    let mut pids: BTreeSet<i32> = daemons.iter().map(|process| process.pid).collect();
    let is_helper = |process: &&Process| is_helper(process, tls_dirs, &sessions);
    // Beside no daemon of this node there is no session of this node.
    if !daemons.is_empty() || ended_session.is_some() {
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

/// Another node of the same host and user has a folder and ports of its own, and a Ray without TLS is
/// no node's. Where the environment may not be read, the ports decide.
fn is_daemon(process: &Process, tls_dirs: &[PathBuf], flags: &[String]) -> bool {
    let Inside::Seen { program, words, leaf } = &process.inside else { return false };
    let is_ours = match leaf {
        Leaf::Hidden => words.iter().any(|word| flags.contains(word)),
        Leaf::None | Leaf::At(_) => is_ours(leaf, tls_dirs),
    };
    is_daemon_name(&file_name(program)) && is_ours
}

fn is_daemon_name(name: &str) -> bool {
    DAEMONS.contains(&name)
}

fn is_ours(leaf: &Leaf, tls_dirs: &[PathBuf]) -> bool {
    match leaf {
        Leaf::Hidden | Leaf::None => false,
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
    of_session || (is_ours(leaf, tls_dirs) && words.iter().any(|word| is_helper_word(word)))
}

fn is_helper_word(word: &str) -> bool {
    HELPERS.contains(&word) || HELPERS.contains(&file_name(Path::new(word)).as_ref())
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
