//! Makes the calling process like another one: control groups, namespaces, limits, priority, users and groups.
//! What it cannot copy it refuses, before anything was done: a system call filter, capabilities of a user
//! other than root, another user namespace. Of one thread alone: these are a thread's properties.

use std::{fs, io, path::PathBuf};

use rustix::{
    fs::Mode,
    process::{
        Gid, Pid, PidfdFlags, Resource, Rlimit, Uid, chdir, pidfd_open, setpriority_process,
        setrlimit, setsid, umask,
    },
    thread::{
        CapabilitySet, ThreadNameSpaceType, capability_is_in_bounding_set,
        move_into_thread_name_spaces, remove_capability_from_bounding_set, sched_getaffinity,
        sched_setaffinity, set_no_new_privs, set_thread_groups, set_thread_res_gid,
        set_thread_res_uid,
    },
};
use thiserror::Error;

use super::find::read;

/// Where control groups are mounted.
const CGROUPS: &str = "/sys/fs/cgroup";
/// Capabilities that a kernel may know.
const CAPABILITIES_MAX: u32 = 64;

/// Namespaces that are entered where they differ. Processes and network are the same: find looks at no other.
const NAMESPACES: [(&str, ThreadNameSpaceType); 4] = [
    ("mnt", ThreadNameSpaceType::MOUNT),
    ("uts", ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME),
    ("ipc", ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION),
    ("cgroup", ThreadNameSpaceType::CONTROL_GROUP),
];

/// Names of limits as `/proc/PID/limits` has them.
const LIMITS: [(&str, Resource); 16] = [
    ("Max cpu time", Resource::Cpu),
    ("Max file size", Resource::Fsize),
    ("Max data size", Resource::Data),
    ("Max stack size", Resource::Stack),
    ("Max core file size", Resource::Core),
    ("Max resident set", Resource::Rss),
    ("Max processes", Resource::Nproc),
    ("Max open files", Resource::Nofile),
    ("Max locked memory", Resource::Memlock),
    ("Max address space", Resource::As),
    ("Max file locks", Resource::Locks),
    ("Max pending signals", Resource::Sigpending),
    ("Max msgqueue size", Resource::Msgqueue),
    ("Max nice priority", Resource::Nice),
    ("Max realtime priority", Resource::Rtprio),
    ("Max realtime timeout", Resource::Rttime),
];

/// Why it cannot be like it.
#[derive(Debug, Error)]
pub(super) enum LikeError {
    #[error("{what} of process {pid} cannot be read: {error}")]
    Read { what: &'static str, pid: i32, error: io::Error },
    #[error(
        "{what} of process {pid} cannot be taken over: {error}; as root, with the capabilities {needs}"
    )]
    Refused { what: &'static str, pid: i32, needs: &'static str, error: io::Error },
    #[error(
        "process {pid} {why}, which nobody can give to another: recycle the whole node instead"
    )]
    Beyond { pid: i32, why: String },
}

/// What `/proc/PID/status` says of a process.
#[derive(Debug, PartialEq, Eq)]
struct Standing {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    umask: u32,
    bounding: u64,
    has_capabilities: bool,
    no_new_privileges: bool,
    is_filtered: bool,
}

/// Becomes like the process with this number. In the order in which the rights for it are given up.
pub(super) fn become_like(pid: i32) -> Result<(), LikeError> {
    let standing = standing(pid)?;
    beyond(pid, &standing)?;
    let limits = text(pid, "limits")?;
    let nice = nice(&text(pid, "stat")?);
    let oom = text(pid, "oom_score_adj")?;
    let cwd = fs::read_link(format!("/proc/{pid}/cwd")).map_err(|error| LikeError::Read {
        what: "the folder",
        pid,
        error,
    })?;
    let handle = Pid::from_raw(pid).ok_or_else(|| gone(pid))?;
    let cpus = sched_getaffinity(Some(handle))
        .map_err(|e| refused("the CPUs", pid, "SYS_NICE")(e.into()))?;
    let handle = pidfd_open(handle, PidfdFlags::empty()).map_err(|_| gone(pid))?;

    join_cgroups(pid)?;
    // systemd and `ray start` alike lower it for some; only a privileged process may.
    write_own("/proc/self/oom_score_adj", oom.trim()).map_err(refused(
        "the OOM score",
        pid,
        "SYS_RESOURCE",
    ))?;
    sched_setaffinity(None, &cpus).map_err(|e| refused("the CPUs", pid, "SYS_NICE")(e.into()))?;
    if let Some(nice) = nice {
        setpriority_process(None, nice)
            .map_err(|e| refused("the priority", pid, "SYS_NICE")(e.into()))?;
    }
    let differing = differing_namespaces(pid);
    if !differing.is_empty() {
        move_into_thread_name_spaces(std::os::fd::AsFd::as_fd(&handle), differing)
            .map_err(|e| refused("the namespaces", pid, "SYS_ADMIN and SYS_CHROOT")(e.into()))?;
    }
    // It may lead others' signals nowhere: the terminal's are not for it.
    let _ = setsid();
    umask(Mode::from_raw_mode(standing.umask));
    for (resource, limit) in parse_limits(&limits) {
        setrlimit(resource, limit)
            .map_err(|e| refused("the limits", pid, "SYS_RESOURCE")(e.into()))?;
    }
    give_up(pid, &standing)?;
    // As that user: a folder that only root may enter is no folder of its.
    chdir(&cwd).map_err(|e| refused("the folder", pid, "none")(e.into()))
}

fn beyond(pid: i32, standing: &Standing) -> Result<(), LikeError> {
    let beyond = |why: &str| LikeError::Beyond { pid, why: why.to_owned() };
    if standing.is_filtered {
        return Err(beyond("runs under a system call filter"));
    }
    if standing.has_capabilities && standing.uid != 0 {
        return Err(beyond("has capabilities, and is not root's"));
    }
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/user")).ok();
    if namespace("self") != namespace(&pid.to_string()) {
        return Err(beyond("is in a user namespace of its own"));
    }
    Ok(())
}

fn give_up(pid: i32, standing: &Standing) -> Result<(), LikeError> {
    for number in 0..CAPABILITIES_MAX {
        let one = CapabilitySet::from_bits_retain(1 << number);
        let is_wanted = standing.bounding & (1 << number) != 0;
        if !is_wanted && capability_is_in_bounding_set(one) == Ok(true) {
            remove_capability_from_bounding_set(one)
                .map_err(|e| refused("the capabilities", pid, "SETPCAP")(e.into()))?;
        }
    }
    if standing.no_new_privileges {
        set_no_new_privs(true).map_err(|e| refused("no new privileges", pid, "none")(e.into()))?;
    }
    let groups: Vec<Gid> = standing.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    let (gid, uid) = (Gid::from_raw(standing.gid), Uid::from_raw(standing.uid));
    set_thread_groups(&groups).map_err(|e| refused("the groups", pid, "SETGID")(e.into()))?;
    set_thread_res_gid(gid, gid, gid).map_err(|e| refused("the group", pid, "SETGID")(e.into()))?;
    set_thread_res_uid(uid, uid, uid).map_err(|e| refused("the user", pid, "SETUID")(e.into()))
}

fn gone(pid: i32) -> LikeError {
    let error = io::Error::from(io::ErrorKind::NotFound);
    LikeError::Read { what: "the number", pid, error }
}

fn refused(
    what: &'static str,
    pid: i32,
    needs: &'static str,
) -> impl FnOnce(io::Error) -> LikeError {
    move |error| LikeError::Refused { what, pid, needs, error }
}

fn text(pid: i32, name: &'static str) -> Result<String, LikeError> {
    let bytes = read(pid, name).map_err(|error| LikeError::Read { what: name, pid, error })?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn standing(pid: i32) -> Result<Standing, LikeError> {
    let damaged = || LikeError::Read {
        what: "status",
        pid,
        error: io::Error::new(
            io::ErrorKind::InvalidData,
            "a line is missing, or its user or group is not one",
        ),
    };
    parse_standing(&text(pid, "status")?).ok_or_else(damaged)
}

fn parse_standing(status: &str) -> Option<Standing> {
    let line = |name: &str| Some(status.lines().find_map(|line| line.strip_prefix(name))?.trim());
    // Real, effective, saved and file system id: one user, or it is none we know how to be.
    let one = |name: &str| {
        let mut ids = line(name)?.split_whitespace().map(|id| id.parse::<u32>().ok());
        let first = ids.next()??;
        ids.all(|id| id == Some(first)).then_some(first)
    };
    let hex = |name: &str| u64::from_str_radix(line(name)?, 16).ok();
    Some(Standing {
        uid: one("Uid:")?,
        gid: one("Gid:")?,
        groups: line("Groups:")?
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()
            .ok()?,
        umask: u32::from_str_radix(line("Umask:")?, 8).ok()?,
        bounding: hex("CapBnd:")?,
        has_capabilities: hex("CapPrm:")? | hex("CapAmb:")? | hex("CapInh:")? != 0,
        no_new_privileges: line("NoNewPrivs:")? == "1",
        is_filtered: line("Seccomp:").is_some_and(|mode| mode != "0"),
    })
}

fn parse_limits(limits: &str) -> Vec<(Resource, Rlimit)> {
    let number =
        |text: &str| if text == "unlimited" { Some(None) } else { text.parse().ok().map(Some) };
    let limit = |line: &str, name: &str| {
        let mut fields = line.strip_prefix(name)?.split_whitespace();
        Some(Rlimit { current: number(fields.next()?)?, maximum: number(fields.next()?)? })
    };
    let of =
        |line| LIMITS.iter().find_map(|(name, resource)| Some((*resource, limit(line, name)?)));
    limits.lines().filter_map(of).collect()
}

/// The nineteenth field, see proc(5).
fn nice(stat: &str) -> Option<i32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(16)?.parse().ok()
}

fn differing_namespaces(pid: i32) -> ThreadNameSpaceType {
    let link = |process: &str, kind: &str| fs::read_link(format!("/proc/{process}/ns/{kind}")).ok();
    let of = pid.to_string();
    let differ = |kind: &str| link("self", kind) != link(&of, kind);
    NAMESPACES
        .iter()
        .filter(|(kind, _)| differ(kind))
        .fold(ThreadNameSpaceType::empty(), |all, (_, flag)| all | *flag)
}

fn join_cgroups(pid: i32) -> Result<(), LikeError> {
    let own = text_of_self();
    let wanted = text(pid, "cgroup")?;
    for folder in cgroups_to_join(&own, &wanted, PathBuf::from(CGROUPS).join("unified").exists()) {
        write_own(&format!("{}/cgroup.procs", folder.display()), "0").map_err(refused(
            "the control group",
            pid,
            "none beside root's files",
        ))?;
    }
    if text_of_self() == wanted {
        return Ok(());
    }
    Err(LikeError::Beyond {
        pid,
        why: "is in a control group that cannot be seen from here".to_owned(),
    })
}

fn text_of_self() -> String {
    fs::read_to_string("/proc/self/cgroup").unwrap_or_default()
}

/// Folders whose control group differs, by lines `NUMBER:CONTROLLERS:PATH`, see cgroups(7).
fn cgroups_to_join(own: &str, wanted: &str, has_unified: bool) -> Vec<PathBuf> {
    let own: Vec<&str> = own.lines().collect();
    let folder = |line: &str| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?.strip_prefix('/')?);
        let hierarchy = match controllers {
            "" if has_unified => "unified",
            named => named.strip_prefix("name=").unwrap_or(named),
        };
        let is_below = path.split('/').all(|part| part != "..");
        is_below.then(|| PathBuf::from(CGROUPS).join(hierarchy).join(path))
    };
    wanted.lines().filter(|line| !own.contains(line)).filter_map(folder).collect()
}

/// A file of the kernel: nothing is made, and nothing can be half written.
fn write_own(path: &str, value: &str) -> io::Result<()> {
    use io::Write;
    fs::OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Name:\tgcs_server\nUmask:\t0027\nUid:\t61001\t61001\t61001\t61001\n\
        Gid:\t61001\t61001\t61001\t61001\nGroups:\t7 990 \nCapInh:\t0000000000000000\n\
        CapPrm:\t0000000000000000\nCapBnd:\t000001fffeffffff\nCapAmb:\t0000000000000000\n\
        NoNewPrivs:\t1\nSeccomp:\t0\n";

    #[test]
    fn users_groups_and_rights_are_read_and_two_users_are_none() {
        let standing = parse_standing(STATUS).unwrap();
        assert_eq!((standing.uid, standing.gid, standing.umask), (61_001, 61_001, 0o027));
        assert_eq!(standing.groups, [7, 990]);
        assert_eq!(standing.bounding, 0x1ff_feff_ffff);
        assert!(standing.no_new_privileges && !standing.is_filtered && !standing.has_capabilities);
        let suid = STATUS.replace("Uid:\t61001\t61001", "Uid:\t61001\t0");
        assert_eq!(parse_standing(&suid), None);
        let filtered = STATUS.replace("Seccomp:\t0", "Seccomp:\t2");
        assert!(beyond(1, &parse_standing(&filtered).unwrap()).is_err());
        let raised = STATUS.replace("CapAmb:\t0000000000000000", "CapAmb:\t0000000000001000");
        assert!(beyond(1, &parse_standing(&raised).unwrap()).is_err());
    }

    #[test]
    fn every_limit_of_this_kernel_is_read() {
        let limits = fs::read_to_string("/proc/self/limits").unwrap();
        let parsed = parse_limits(&limits);
        assert_eq!(parsed.len(), LIMITS.len(), "{limits}");
        for (resource, limit) in parsed {
            assert_eq!(rustix::process::getrlimit(resource), limit, "{resource:?}");
        }
    }

    #[test]
    fn only_what_differs_of_the_control_groups_is_joined() {
        let own = "4:memory:/a\n1:name=systemd:/\n0::/user.slice\n";
        for (wanted, unified, folders) in [
            (own, true, vec![]),
            ("4:memory:/b\n1:name=systemd:/\n0::/user.slice\n", true, vec!["memory/b"]),
            ("1:name=systemd:/x\n", true, vec!["systemd/x"]),
            ("0::/system.slice/ray.service\n", false, vec!["system.slice/ray.service"]),
            ("0::/system.slice/ray.service\n", true, vec!["unified/system.slice/ray.service"]),
            ("0::/../other\n", false, vec![]),
        ] {
            let folders: Vec<PathBuf> =
                folders.iter().map(|f| PathBuf::from(CGROUPS).join(f)).collect();
            assert_eq!(cgroups_to_join(own, wanted, unified), folders, "{wanted}");
        }
    }

    #[test]
    fn the_priority_stands_behind_any_title() {
        let stat = "42 (a) S 9 (b) S 7 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 5 1 0 4711 0";
        assert_eq!(nice(stat), Some(5));
    }
}
