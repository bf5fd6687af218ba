//! Whose the listening sockets of Ray on this host are: /proc, by number of socket. It looks at the
//! agent's own network namespace, and names what Ray has in another one of the same process
//! namespace. It opens no connection.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, Read},
    net::SocketAddr,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use raymtls_proto::{
    ports::{PORTS, Port},
    v1,
};

use super::{
    job::Job,
    kind::{self, Class, Kind},
    sockets::{self, Listener},
};

/// Bounds of one search.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Most process numbers that are listed at all.
    pub pids_listed_max: usize,
    /// Most processes whose open files are looked through, those of Ray's own kinds first.
    pub pids_max: usize,
    /// Most open files of one process that are looked at.
    pub files_max: usize,
    /// Most sockets in the answer.
    pub sockets_max: usize,
    /// Most sockets of one process in the answer: a task that opens thousands crowds out no other.
    pub sockets_of_process_max: usize,
    /// Most other network namespaces.
    pub namespaces_max: usize,
    /// Longest wait for a search.
    pub wait: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            pids_listed_max: 65_536,
            pids_max: 4_096,
            files_max: 65_536,
            sockets_max: 1_024,
            sockets_of_process_max: 16,
            namespaces_max: 32,
            wait: Duration::from_secs(10),
        }
    }
}

/// Most open files that one search looks at, of all processes: a task may open many in many.
const FILES_TOTAL_MAX: usize = 262_144;
/// So many open files of a driver are asked for its job: Ray opens its own early.
const JOB_FILES_MAX: usize = 1_024;
/// Longest command line that is read, in bytes: a raylet's holds that of its workers too.
const CMDLINE_LEN_MAX: u64 = 32 * 1024;
/// Longest map of a process's memory that is read, in bytes.
const MAPS_LEN_MAX: u64 = 2 * 1024 * 1024;
/// What a program has in its memory if it uses Ray: the core library of Python, C++ and Java.
const RAY_LIBRARIES: [&str; 3] = ["/_raylet.so", "/libray_api.so", "libcore_worker_library_java"];

/// Where to look, and for whose sockets.
#[derive(Clone, Debug)]
pub struct Search {
    /// `/proc`.
    pub proc: PathBuf,
    /// Users whose sockets can be Ray's; empty: any.
    pub uids: Vec<u32>,
    /// The cluster's ports: whoever listens there is looked at.
    pub plan: v1::PortPlan,
    /// Bounds.
    pub bounds: Bounds,
}

/// A process that listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its number, in the agent's process namespace.
    pub pid: u32,
    /// What it is, as it says.
    pub kind: Kind,
    /// Title or program, printable.
    pub name: String,
    /// Ray's session, where it says so.
    pub session: Option<String>,
    /// The job a driver belongs to, where its files tell.
    pub job: Option<Job>,
}

/// A listening socket of Ray.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    /// Where it is bound.
    pub addr: SocketAddr,
    /// Who opened it.
    pub uid: u32,
    /// Its number.
    pub inode: u64,
    /// Which port of the plan it is.
    pub port: Option<Port>,
    /// Whose it is; `None`: cannot be seen.
    pub process: Option<Process>,
    /// It lies in another network namespace: an address there may be another host's here.
    pub elsewhere: bool,
}

impl Socket {
    /// What its process is, as far as it can be seen.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.process.as_ref().map_or(Kind::Other, |process| process.kind)
    }

    /// The number of its process, if that can be seen.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(|process| process.pid)
    }
}

/// What could not be seen, or was not looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Blind {
    /// Processes of Ray whose open files this agent may not read (SYS_PTRACE).
    pub processes: usize,
    /// Sockets outside the plan's ports whose process was not found.
    pub sockets: usize,
    /// Sockets of Ray beyond the bounds.
    pub sockets_left_out: usize,
    /// Processes beyond the bounds.
    pub processes_left_out: usize,
    /// Processes of Ray in containers with process and network namespaces of their own.
    pub contained: usize,
}

/// What a search brought, those whose horizon matters most first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The sockets.
    pub sockets: Vec<Socket>,
    /// What it did not see.
    pub blind: Blind,
}

impl Search {
    /// Looks once. It blocks: files of /proc are read.
    ///
    /// # Errors
    /// The agent's own table of sockets cannot be read.
    pub fn run(&self) -> io::Result<Found> {
        let mut blind = Blind::default();
        let processes = self.processes(&mut blind)?;
        let mut listening = self.here(&mut blind)?;
        listening.extend(self.elsewhere(&processes, &mut blind));
        let owners = self.owners(&processes, &listening, &mut blind);
        let mut sockets = self.name(&listening, &owners, &mut blind);
        sockets.sort_by_key(|socket| {
            let pid = socket.pid().unwrap_or(u32::MAX);
            // What a task opens besides its worker's own port comes after it.
            (socket.elsewhere, socket.kind(), pid, socket.port.is_none(), socket.addr)
        });
        let sockets = self.bounded(sockets, &mut blind);
        Ok(Found { sockets, blind })
    }

    fn here(&self, blind: &mut Blind) -> io::Result<Vec<(Listener, bool)>> {
        let found = sockets::listeners(&self.proc.join("self/net"))?;
        blind.sockets_left_out += usize::from(found.cut);
        Ok(self.of_users(found.sockets).map(|listener| (listener, false)).collect())
    }

    /// What listens in the other network namespaces in which Ray runs, of this process namespace.
    fn elsewhere(&self, processes: &[Process], blind: &mut Blind) -> Vec<(Listener, bool)> {
        let (Some(net), Some(pid)) = (self.namespace("self", "net"), self.namespace("self", "pid"))
        else {
            return Vec::new();
        };
        let (mut seen, mut all) = (BTreeSet::from([net]), Vec::new());
        for process in processes.iter().filter(|process| process.kind != Kind::Other) {
            let of = process.pid.to_string();
            let Some(net) = self.namespace(&of, "net").filter(|net| !seen.contains(net)) else {
                continue;
            };
            if self.namespace(&of, "pid") != Some(pid.clone()) {
                blind.contained += 1;
                continue;
            }
            if seen.len() > self.bounds.namespaces_max {
                blind.processes_left_out += 1;
                continue;
            }
            seen.insert(net);
            let found = sockets::listeners(&self.of(process.pid, "net")).unwrap_or_default();
            all.extend(self.of_users(found.sockets).map(|listener| (listener, true)));
        }
        all
    }

    fn namespace(&self, of: &str, which: &str) -> Option<PathBuf> {
        std::fs::read_link(self.proc.join(of).join("ns").join(which)).ok()
    }

    fn of_users(&self, listeners: Vec<Listener>) -> impl Iterator<Item = Listener> {
        listeners.into_iter().filter(|listener| self.is_of_user(listener.uid))
    }

    fn is_of_user(&self, uid: u32) -> bool {
        self.uids.is_empty() || self.uids.contains(&uid)
    }

    /// The processes of Ray's users, those of Ray's kinds first.
    fn processes(&self, blind: &mut Blind) -> io::Result<Vec<Process>> {
        let mut pids: Vec<u32> = std::fs::read_dir(&self.proc)?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .take(self.bounds.pids_listed_max)
            .collect();
        pids.sort_unstable();
        let mut processes: Vec<Process> =
            pids.into_iter().filter_map(|pid| self.process(pid)).collect();
        processes.sort_by_key(|process| (process.kind, process.pid));
        blind.processes_left_out += processes.len().saturating_sub(self.bounds.pids_max);
        processes.truncate(self.bounds.pids_max);
        Ok(processes)
    }

    fn process(&self, pid: u32) -> Option<Process> {
        let uid = std::fs::metadata(self.proc.join(pid.to_string())).ok()?.uid();
        // The folder of one that hides its memory belongs to root.
        if !self.is_of_user(uid) && uid != 0 {
            return None;
        }
        let cmdline = read_part(&self.of(pid, "cmdline"), CMDLINE_LEN_MAX)?;
        if cmdline.is_empty() {
            // A thread of the kernel, or a process that has ended.
            return None;
        }
        let exe = std::fs::read_link(self.of(pid, "exe")).ok();
        let exe_name = exe.as_deref().and_then(Path::file_name).and_then(|name| name.to_str());
        let exe_name = exe_name.map(|name| name.strip_suffix(" (deleted)").unwrap_or(name));
        let claim = kind::claim(&cmdline, exe_name);
        let kind = claim.kind.unwrap_or(Kind::Other);
        Some(Process { pid, kind, name: claim.name, session: claim.session, job: None })
    }

    /// Process by socket; of several that hold one socket, the first.
    fn owners<'a>(
        &self,
        processes: &'a [Process],
        listening: &[(Listener, bool)],
        blind: &mut Blind,
    ) -> BTreeMap<u64, &'a Process> {
        let mut wanted: BTreeSet<u64> =
            listening.iter().map(|(listener, _)| listener.inode).collect();
        let (mut owners, mut files_left) = (BTreeMap::new(), FILES_TOTAL_MAX);
        for (at, process) in processes.iter().enumerate() {
            if wanted.is_empty() {
                break;
            }
            if files_left == 0 {
                blind.processes_left_out += processes.len() - at;
                break;
            }
            let Ok(files) = std::fs::read_dir(self.of(process.pid, "fd")) else {
                // It may have ended meanwhile.
                let lives = self.proc.join(process.pid.to_string()).exists();
                blind.processes += usize::from(lives && process.kind != Kind::Other);
                continue;
            };
            for file in files.take(self.bounds.files_max.min(files_left)).flatten() {
                files_left -= 1;
                let inode = std::fs::read_link(file.path()).ok().and_then(|link| inode_of(&link));
                if let Some(inode) = inode.filter(|inode| wanted.remove(inode)) {
                    owners.insert(inode, process);
                }
            }
        }
        owners
    }

    /// Those that are Ray's: of one of its processes, of a program that uses it, or on its ports.
    fn name(
        &self,
        listening: &[(Listener, bool)],
        owners: &BTreeMap<u64, &Process>,
        blind: &mut Blind,
    ) -> Vec<Socket> {
        let (mut drivers, mut jobs) = (BTreeMap::new(), BTreeMap::new());
        let mut sockets = Vec::new();
        for (listener, elsewhere) in listening {
            let port = port_of(&self.plan, listener.addr.port());
            let mut process = owners.get(&listener.inode).map(|process| (*process).clone());
            if let Some(process) = process.as_mut().filter(|process| process.kind == Kind::Other) {
                let pid = process.pid;
                if *drivers.entry(pid).or_insert_with(|| self.uses_ray(pid)) {
                    process.kind = Kind::Driver;
                }
            }
            if let Some(process) = process.as_mut().filter(|process| is_driver(process)) {
                let pid = process.pid;
                process.job = jobs.entry(pid).or_insert_with(|| self.job(pid)).clone();
            }
            let is_rays = process.as_ref().is_some_and(|process| process.kind != Kind::Other);
            if is_rays || (port.is_some() && !elsewhere) {
                let (addr, uid, inode) = (listener.addr, listener.uid, listener.inode);
                sockets.push(Socket { addr, uid, inode, port, process, elsewhere: *elsewhere });
            } else if process.is_none() && !elsewhere {
                blind.sockets += 1;
            }
        }
        sockets
    }

    fn uses_ray(&self, pid: u32) -> bool {
        let maps = read_part(&self.of(pid, "maps"), MAPS_LEN_MAX).unwrap_or_default();
        let maps = String::from_utf8_lossy(&maps);
        RAY_LIBRARIES.iter().any(|library| maps.contains(library))
    }

    fn job(&self, pid: u32) -> Option<Job> {
        let files = std::fs::read_dir(self.of(pid, "fd")).ok()?.take(JOB_FILES_MAX);
        Job::by_files(files.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok()))
    }

    fn bounded(&self, sockets: Vec<Socket>, blind: &mut Blind) -> Vec<Socket> {
        let found = sockets.len();
        let mut of_process: BTreeMap<u32, usize> = BTreeMap::new();
        let kept: Vec<Socket> = sockets
            .into_iter()
            .filter(|socket| {
                let Some(process) = &socket.process else { return true };
                let count = of_process.entry(process.pid).or_default();
                *count += 1;
                *count <= self.bounds.sockets_of_process_max
            })
            .take(self.bounds.sockets_max)
            .collect();
        blind.sockets_left_out += found - kept.len();
        kept
    }

    fn of(&self, pid: u32, file: &str) -> PathBuf {
        self.proc.join(pid.to_string()).join(file)
    }
}

fn is_driver(process: &Process) -> bool {
    process.kind.class() == Class::Driver
}

/// The first of the plan's ports with this number.
fn port_of(plan: &v1::PortPlan, number: u16) -> Option<Port> {
    let has = |port: Port| port.range(plan).is_some_and(|range| range.contains(&number));
    PORTS.iter().map(|row| row.port).find(|port| has(*port))
}

/// `socket:[4711]`.
fn inode_of(link: &Path) -> Option<u64> {
    link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// The first bytes of a file of /proc.
fn read_part(path: &Path, len_max: u64) -> Option<Vec<u8>> {
    let mut content = Vec::new();
    File::open(path).ok()?.take(len_max).read_to_end(&mut content).ok()?;
    Some(content)
}
