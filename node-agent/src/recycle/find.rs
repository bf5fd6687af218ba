//! Which processes are this node's raylet and its gcs_server. A name is a claim that any task can make, so the
//! program file, the leaf, the session, the listening port and the parents must agree; where two agree, neither
//! is taken. It reads /proc and touches nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs, io,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
    time::Duration,
};

use thiserror::Error;

use crate::served::sockets;

/// Entries of `/proc` that are looked at.
const ENTRIES_MAX: usize = 65_536;
/// Candidates of one kind that are read.
const CANDIDATES_MAX: usize = 64;
/// So much of a command line or an environment is read, in bytes; one that is longer is not used.
const READ_LEN_MAX: u64 = 256 * 1024;
/// Open files of a candidate that are looked at.
const FILES_MAX: usize = 65_536;
/// Generations that are followed upwards.
const PARENTS_MAX: usize = 64;
/// How long the search may take: a process can keep its command line from being read.
const SEARCH_TIME_MAX: Duration = Duration::from_secs(10);
/// Where Ray 2.60 keeps its programs, below the package.
const RAYLET_END: &str = "ray/core/src/ray/raylet/raylet";
const RAYLET_BELOW: &str = "raylet/raylet";
const GCS_BELOW: &str = "gcs/gcs_server";

/// Why it is not known.
#[derive(Debug, Error)]
pub(super) enum FindError {
    #[error("/proc cannot be read: {0}")]
    Proc(#[from] io::Error),
    #[error(
        "the processes of uid {0} could not be read within {SEARCH_TIME_MAX:?}: one of them keeps its command line"
    )]
    Stuck(u32),
    #[error(
        "no raylet of uid {uid} with a leaf of {tls_dir} runs here{seen}: nothing to recycle; start Ray through `node-agent exec`"
    )]
    NoRaylet { uid: u32, tls_dir: String, seen: String },
    #[error(
        "more than one process passes for this node's {what} ({pids}): stop by hand what is not Ray's"
    )]
    Several { what: &'static str, pids: String },
    #[error("no gcs_server of this node's session runs here{0}")]
    NoGcs(String),
    #[error("{what} {pid} does not say {flag} on its command line")]
    Silent { what: &'static str, pid: i32, flag: &'static str },
}

/// A process as it was found. Its environment may hold a password of Redis: `Debug` is silent about it.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Daemon {
    pub(super) pid: i32,
    /// In the kernel's ticks since it booted: with the number it is of no other process.
    pub(super) started: u64,
    pub(super) parent: i32,
    pub(super) program: PathBuf,
    pub(super) words: Vec<Vec<u8>>,
    pub(super) variables: Vec<Vec<u8>>,
    pub(super) folder: PathBuf,
    /// Ports it listens on.
    pub(super) ports: BTreeSet<u16>,
}

impl std::fmt::Debug for Daemon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Daemon").field("pid", &self.pid).finish_non_exhaustive()
    }
}

impl Daemon {
    /// The value of a flag, as text.
    pub(super) fn flag(&self, name: &str) -> Option<&str> {
        let value = self.words.iter().find_map(|word| word.strip_prefix(name.as_bytes()))?;
        std::str::from_utf8(value).ok().filter(|value| !value.is_empty())
    }

    /// The value of a variable.
    pub(super) fn variable(&self, name: &str) -> Option<&OsStr> {
        let of =
            |all: &'_ [u8]| all.strip_prefix(name.as_bytes())?.strip_prefix(b"=").map(<[u8]>::len);
        let variable = self.variables.iter().find(|all| of(all).is_some())?;
        Some(OsStr::from_bytes(&variable[name.len() + 1..]))
    }

    fn leaf(&self) -> Option<PathBuf> {
        self.variable("RAY_TLS_SERVER_CERT").map(PathBuf::from)
    }

    fn port(&self, flag: &str) -> Option<u16> {
        self.flag(flag)?.parse().ok()
    }
}

/// What was found on this host.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) raylet: Daemon,
    pub(super) session: String,
    pub(super) node_id: String,
    /// `ADDRESS:PORT`.
    pub(super) gcs_address: String,
    /// Ray's own Python.
    pub(super) python: PathBuf,
    /// This host's gcs_server, or why there is none to speak of.
    pub(super) gcs: Result<Gcs, FindError>,
    /// Processes that call themselves so and are left alone, with the reason.
    pub(super) left_alone: Vec<String>,
}

/// The gcs_server of this node.
#[derive(Debug)]
pub(super) struct Gcs {
    pub(super) daemon: Daemon,
    pub(super) port: u16,
    /// What its parent was started as, where that still runs and would not outlive it.
    pub(super) blocked_by: Option<String>,
}

/// Whose Ray is looked for.
#[derive(Clone, Debug)]
pub(super) struct Whose {
    pub(super) uid: u32,
    pub(super) tls_dir: PathBuf,
}

impl Whose {
    fn folders(&self) -> Vec<PathBuf> {
        let real = fs::canonicalize(&self.tls_dir).ok();
        [self.tls_dir.clone()].into_iter().chain(real).collect()
    }
}

/// Looks, in a thread of its own: to read of a process can block for as long as the process likes.
pub(super) async fn find(whose: &Whose) -> Result<Found, FindError> {
    let (answer, pending) = tokio::sync::oneshot::channel();
    let (uid, whose) = (whose.uid, whose.clone());
    let run = move || {
        // Whoever asked may have gone.
        let _ = answer.send(look(&whose));
    };
    std::thread::Builder::new().name("recycle-find".to_owned()).spawn(run)?;
    let found = tokio::time::timeout(SEARCH_TIME_MAX, pending).await;
    found.map_err(|_| FindError::Stuck(uid))?.map_err(io::Error::other)?
}

fn look(whose: &Whose) -> Result<Found, FindError> {
    let all = All::read(whose.uid)?;
    let folders = whose.folders();
    let (raylets, mut odd) = sift(&all.raylets, |raylet| judge_raylet(raylet, &folders, &all));
    let [raylet] = raylets.as_slice() else {
        return Err(if raylets.is_empty() {
            let seen =
                if odd.is_empty() { String::new() } else { format!(" ({})", odd.join("; ")) };
            FindError::NoRaylet {
                uid: whose.uid,
                tls_dir: whose.tls_dir.display().to_string(),
                seen,
            }
        } else {
            several("raylet", &raylets)
        });
    };
    let told = |flag| {
        let silent = FindError::Silent { what: "raylet", pid: raylet.pid, flag };
        raylet.flag(flag).map(str::to_owned).ok_or(silent)
    };
    let (session, node_id) = (told("--session-name=")?, told("--node_id=")?);
    let gcs_address = told("--gcs-address=")?;
    let python = told("--python_worker_command=")?;
    let python = python.split_whitespace().next().unwrap_or_default().into();
    let (gcs, odd_gcs) = find_gcs(raylet, &session, &gcs_address, &folders, &all);
    odd.extend(odd_gcs);
    Ok(Found {
        raylet: (*raylet).clone(),
        session,
        node_id,
        gcs_address,
        python,
        gcs,
        left_alone: odd,
    })
}

fn find_gcs(
    raylet: &Daemon,
    session: &str,
    address: &str,
    folders: &[PathBuf],
    all: &All,
) -> (Result<Gcs, FindError>, Vec<String>) {
    let judged = |gcs: &Daemon| judge_gcs(gcs, raylet, session, address, folders, all);
    let (found, odd) = sift(&all.gcs_servers, judged);
    let gcs = match found.as_slice() {
        [gcs] => {
            let port = gcs.port("--gcs_server_port=").unwrap_or_default();
            let blocked_by = all.blocking_parent(gcs.parent);
            Ok(Gcs { daemon: (*gcs).clone(), port, blocked_by })
        }
        [] if odd.is_empty() => Err(FindError::NoGcs(String::new())),
        [] => Err(FindError::NoGcs(format!(" ({})", odd.join("; ")))),
        several_found => Err(several("gcs_server", several_found)),
    };
    (gcs, odd)
}

fn several(what: &'static str, all: &[&Daemon]) -> FindError {
    let pids: Vec<String> = all.iter().map(|daemon| daemon.pid.to_string()).collect();
    FindError::Several { what, pids: pids.join(", ") }
}

/// Those that pass, and of the others why not.
fn sift(
    all: &[Daemon],
    judge: impl Fn(&Daemon) -> Result<(), &'static str>,
) -> (Vec<&Daemon>, Vec<String>) {
    let (mut pass, mut odd) = (Vec::new(), Vec::new());
    for daemon in all {
        match judge(daemon) {
            Ok(()) => pass.push(daemon),
            Err(why) => {
                let name = daemon.program.file_name().unwrap_or_default().to_string_lossy();
                odd.push(format!("{name} {} {why}: left alone", daemon.pid));
            }
        }
    }
    (pass, odd)
}

fn judge_raylet(raylet: &Daemon, folders: &[PathBuf], all: &All) -> Result<(), &'static str> {
    if !raylet.program.ends_with(RAYLET_END) {
        return Err("is no program of a Ray package");
    }
    is_of_node(raylet, folders)?;
    let others = all.raylets.iter().filter(|other| other.pid != raylet.pid);
    if others.into_iter().any(|other| all.descends(raylet.pid, other.pid)) {
        return Err("was started by a task");
    }
    match raylet.port("--node_manager_port=") {
        Some(port) if port != 0 && !raylet.ports.contains(&port) => {
            Err("does not listen on the port it names")
        }
        Some(_) | None if raylet.ports.is_empty() => Err("listens on no port"),
        Some(_) | None => Ok(()),
    }
}

fn judge_gcs(
    gcs: &Daemon,
    raylet: &Daemon,
    session: &str,
    address: &str,
    folders: &[PathBuf],
    all: &All,
) -> Result<(), &'static str> {
    let package = raylet.program.to_str().and_then(|path| path.strip_suffix(RAYLET_BELOW));
    if package.map(|package| PathBuf::from(package).join(GCS_BELOW)) != Some(gcs.program.clone()) {
        return Err("is not the program beside this node's raylet");
    }
    is_of_node(gcs, folders)?;
    if all.descends(gcs.pid, raylet.pid) {
        return Err("was started by a task");
    }
    if gcs.flag("--session-name=") != Some(session) {
        return Err("is of another session");
    }
    let port = gcs.port("--gcs_server_port=").filter(|port| *port != 0);
    let wanted = address.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
    if port.is_none() || port != wanted || !port.is_some_and(|port| gcs.ports.contains(&port)) {
        return Err("does not listen on the session's port");
    }
    Ok(())
}

fn is_of_node(daemon: &Daemon, folders: &[PathBuf]) -> Result<(), &'static str> {
    let leaf = daemon.leaf();
    let is_ours = leaf.is_some_and(|leaf| folders.iter().any(|folder| leaf.starts_with(folder)));
    if is_ours { Ok(()) } else { Err("was not started with a leaf of this node") }
}

/// The processes of one user, in our process and network namespaces.
#[derive(Default)]
struct All {
    parents: BTreeMap<i32, i32>,
    raylets: Vec<Daemon>,
    gcs_servers: Vec<Daemon>,
}

impl All {
    fn read(uid: u32) -> io::Result<Self> {
        let own = namespaces("self")?;
        let listening = sockets::listeners(Path::new("/proc/self/net"))?.sockets;
        let ports: BTreeMap<u64, u16> =
            listening.into_iter().map(|listener| (listener.inode, listener.addr.port())).collect();
        let mut all = Self::default();
        let entries = fs::read_dir("/proc")?.take(ENTRIES_MAX).flatten();
        for pid in entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok()) {
            // One that has ended meanwhile is none.
            let Ok(stat) = stat(pid) else { continue };
            all.parents.insert(pid, stat.parent);
            let Some(program) = candidate(pid, uid, &own) else { continue };
            let list = match program.file_name().and_then(OsStr::to_str) {
                Some("raylet") => &mut all.raylets,
                Some("gcs_server") => &mut all.gcs_servers,
                Some(_) | None => continue,
            };
            if list.len() < CANDIDATES_MAX
                && let Ok(daemon) = daemon(pid, stat, program, &ports)
            {
                list.push(daemon);
            }
        }
        Ok(all)
    }

    fn descends(&self, mut pid: i32, from: i32) -> bool {
        for _ in 0..PARENTS_MAX {
            match self.parents.get(&pid) {
                Some(parent) if *parent == from => return true,
                Some(parent) if *parent > 1 => pid = *parent,
                Some(_) | None => return false,
            }
        }
        false
    }

    /// `ray start --block` ends the whole head when one of its processes ends; a program that began Ray by
    /// itself does too.
    fn blocking_parent(&self, parent: i32) -> Option<String> {
        let words = read(parent, "cmdline").ok()?;
        blocking(&words).then(|| {
            let shown: Vec<String> = split(&words)
                .iter()
                .take(4)
                .map(|word| String::from_utf8_lossy(word).into_owned())
                .collect();
            format!("{} (pid {parent})", crate::served::kind::printable(&shown.join(" ")))
        })
    }
}

/// Whether a command line is of a Python program or says that it waits for Ray.
fn blocking(cmdline: &[u8]) -> bool {
    let words = split(cmdline);
    let program = words.first().and_then(|word| word.rsplit(|b| *b == b'/').next());
    words.iter().any(|word| *word == b"--block")
        || program.is_some_and(|name| name.starts_with(b"python"))
}

/// The program file of a process that may be looked into: of this user through and through, and here.
fn candidate(pid: i32, uid: u32, own: &[PathBuf; 2]) -> Option<PathBuf> {
    let folder = fs::metadata(format!("/proc/{pid}")).ok()?;
    if folder.uid() != uid && folder.uid() != 0 {
        return None;
    }
    let status = read(pid, "status").ok()?;
    let status = String::from_utf8_lossy(&status);
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    let is_of_user = line.split_whitespace().all(|field| field.parse() == Ok(uid));
    if !is_of_user || namespaces(&pid.to_string()).ok()? != *own {
        return None;
    }
    fs::read_link(format!("/proc/{pid}/exe")).ok()
}

fn daemon(
    pid: i32,
    stat: Stat,
    program: PathBuf,
    ports: &BTreeMap<u64, u16>,
) -> io::Result<Daemon> {
    let files = fs::read_dir(format!("/proc/{pid}/fd"))?.take(FILES_MAX).flatten();
    let inodes = files.filter_map(|file| {
        let link = fs::read_link(file.path()).ok()?;
        link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse::<u64>().ok()
    });
    Ok(Daemon {
        pid,
        started: stat.started,
        parent: stat.parent,
        program,
        words: owned(&read(pid, "cmdline")?),
        variables: owned(&read(pid, "environ")?),
        folder: fs::read_link(format!("/proc/{pid}/cwd"))?,
        ports: inodes.filter_map(|inode| ports.get(&inode).copied()).collect(),
    })
}

fn owned(bytes: &[u8]) -> Vec<Vec<u8>> {
    split(bytes).into_iter().map(<[u8]>::to_vec).collect()
}

/// Words that end with a NUL each; an empty word counts.
fn split(bytes: &[u8]) -> Vec<&[u8]> {
    let bytes = bytes.strip_suffix(b"\0").unwrap_or(bytes);
    if bytes.is_empty() { Vec::new() } else { bytes.split(|b| *b == 0).collect() }
}

fn namespaces(process: &str) -> io::Result<[PathBuf; 2]> {
    let link = |kind: &str| fs::read_link(format!("/proc/{process}/ns/{kind}"));
    Ok([link("pid")?, link("net")?])
}

/// What `/proc/PID/stat` tells, see proc(5).
pub(super) struct Stat {
    parent: i32,
    pub(super) started: u64,
}

pub(super) fn stat(pid: i32) -> io::Result<Stat> {
    let text = read(pid, "stat")?;
    let text = String::from_utf8_lossy(&text);
    let parse = || {
        // The title stands in brackets and may hold anything; the state, the third field, comes next.
        let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
        Some(Stat { parent: fields.get(1)?.parse().ok()?, started: fields.get(19)?.parse().ok()? })
    };
    parse().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

pub(super) fn read(pid: i32, name: &str) -> io::Result<Vec<u8>> {
    use io::Read;
    let mut bytes = Vec::new();
    fs::File::open(format!("/proc/{pid}/{name}"))?
        .take(READ_LEN_MAX + 1)
        .read_to_end(&mut bytes)?;
    if bytes.len() as u64 > READ_LEN_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("longer than {READ_LEN_MAX} bytes"),
        ));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SITE: &str = "/v/lib/python3.11/site-packages";
    const SESSION: &str = "session_2026-11-24_08-00-00_123456_789";

    fn daemon(pid: i32, program: &str, words: &[&str], leaf: &str, ports: &[u16]) -> Daemon {
        Daemon {
            pid,
            started: 1,
            parent: 1,
            program: format!("{SITE}/{program}").into(),
            words: words.iter().map(|word| word.as_bytes().to_vec()).collect(),
            variables: vec![format!("RAY_TLS_SERVER_CERT={leaf}").into_bytes()],
            folder: "/".into(),
            ports: ports.iter().copied().collect(),
        }
    }

    fn raylet() -> Daemon {
        let words = ["raylet", "--node_manager_port=6701", "--gcs-address=10.0.0.1:6379"];
        daemon(10, RAYLET_END, &words, "/t/k1/tls.crt", &[6701])
    }

    #[test]
    fn a_task_that_calls_itself_gcs_server_is_left_alone() {
        let folders = [PathBuf::from("/t")];
        let session = format!("--session-name={SESSION}");
        let words = ["gcs_server", "--gcs_server_port=6379", session.as_str()];
        let gcs = "ray/core/src/ray/gcs/gcs_server";
        let leaf = "/t/k1/tls.crt";
        let real = daemon(11, gcs, &words, leaf, &[6379]);
        let other_session = [
            "gcs_server",
            "--gcs_server_port=6379",
            "--session-name=session_2026-11-24_09-00-00_1_2",
        ];
        let other_port = ["gcs_server", "--gcs_server_port=6380", session.as_str()];
        for (name, candidate, parents, why) in [
            ("Ray's own", real.clone(), vec![(11, 1)], None),
            (
                "a copy of another program",
                daemon(12, "../../../../tmp/gcs_server", &words, leaf, &[6379]),
                vec![(12, 1)],
                Some("is not the program beside this node's raylet"),
            ),
            (
                "Ray's program, run by a task",
                real,
                vec![(11, 40), (40, 10)],
                Some("was started by a task"),
            ),
            (
                "run by a task that went away, without the port",
                daemon(13, gcs, &words, leaf, &[]),
                vec![(13, 1)],
                Some("does not listen on the session's port"),
            ),
            (
                "on a port of its own",
                daemon(14, gcs, &other_port, leaf, &[6380]),
                vec![(14, 1)],
                Some("does not listen on the session's port"),
            ),
            (
                "of another session",
                daemon(15, gcs, &other_session, leaf, &[6379]),
                vec![(15, 1)],
                Some("is of another session"),
            ),
            (
                "of another node",
                daemon(16, gcs, &words, "/u/k1/tls.crt", &[6379]),
                vec![(16, 1)],
                Some("was not started with a leaf of this node"),
            ),
        ] {
            let all = All { parents: parents.into_iter().collect(), ..All::default() };
            let judged = judge_gcs(&candidate, &raylet(), SESSION, "10.0.0.1:6379", &folders, &all);
            assert_eq!(judged.err(), why, "{name}");
        }
    }

    #[test]
    fn of_two_that_pass_neither_is_taken() {
        let words = ["gcs_server", "--gcs_server_port=6379", &format!("--session-name={SESSION}")];
        let twin =
            |pid| daemon(pid, "ray/core/src/ray/gcs/gcs_server", &words, "/t/k1/tls.crt", &[6379]);
        let all = All { gcs_servers: vec![twin(11), twin(12)], ..All::default() };
        let (found, _) =
            find_gcs(&raylet(), SESSION, "10.0.0.1:6379", &[PathBuf::from("/t")], &all);
        assert!(matches!(found, Err(FindError::Several { .. })), "{found:?}");
    }

    #[test]
    fn a_raylet_of_a_task_is_none() {
        let folders = [PathBuf::from("/t")];
        let inner = Daemon { pid: 20, parent: 15, ..raylet() };
        let all = All {
            parents: [(10, 1), (15, 10), (20, 15)].into_iter().collect(),
            raylets: vec![raylet(), inner.clone()],
            ..All::default()
        };
        assert_eq!(judge_raylet(&raylet(), &folders, &all), Ok(()));
        assert_eq!(judge_raylet(&inner, &folders, &all), Err("was started by a task"));
        let deaf = Daemon { ports: BTreeSet::new(), ..raylet() };
        assert!(judge_raylet(&deaf, &folders, &All::default()).is_err());
    }

    #[test]
    fn whoever_waits_for_ray_is_seen() {
        for (cmdline, blocks) in [
            (&b"/sbin/init\0"[..], false),
            (b"bash\0-c\0x\0", false),
            (b"/usr/bin/tini\0--\0ray\0start\0--head\0--block\0", true),
            (b"/v/bin/python\0/v/bin/ray\0start\0--head\0--block\0", true),
            (b"/v/bin/python3\0driver.py\0", true),
            (b"", false),
        ] {
            assert_eq!(blocking(cmdline), blocks, "{}", String::from_utf8_lossy(cmdline));
        }
    }
}
