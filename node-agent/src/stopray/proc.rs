//! What the processes of one user are, read from `/proc`. It signals none and decides nothing.
//!
//! A process decides how long it takes to read its command line and its environment: it may have mapped
//! them from a file system that does not answer. So what can be had without them comes first.

use std::{
    ffi::OsStr,
    fs, io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// Entries of `/proc` that are looked at.
const ENTRIES_MAX: usize = 65_536;
/// So much of a command line or of an environment is read, in bytes.
const READ_LEN_MAX: u64 = 256 * 1024;
/// Words of a command line that are kept, and bytes of one.
const WORDS_MAX: usize = 64;
const WORD_LEN_MAX: usize = 4_096;
/// What the kernel writes behind the path of a program whose file was replaced.
const DELETED: &str = " (deleted)";

/// One process. Number and start together are of no other process until the host boots again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) pid: i32,
    /// In the kernel's ticks since it booted.
    pub(super) started: u64,
    pub(super) parent: i32,
    /// What it calls itself: a claim.
    pub(super) title: String,
    pub(super) inside: Inside,
}

/// What only its own user sees, and who may trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Inside {
    /// We may not look.
    Hidden,
    /// It has other process ids or another network than we.
    Elsewhere,
    Seen {
        /// The file it runs.
        program: PathBuf,
        /// Those asked for; none before they were read.
        words: Vec<String>,
        leaf: Leaf,
    },
}

/// `RAY_TLS_SERVER_CERT` as the process was started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Leaf {
    /// The environment is a file of its user alone, and we may not read others' files.
    Hidden,
    None,
    At(PathBuf),
}

/// All processes whose real and effective user is this one, without words, and with leaves unseen. It
/// waits for none of them.
pub(super) fn of_user(uid: u32) -> io::Result<Vec<Process>> {
    let own = Namespaces::of("self")?;
    let entries = fs::read_dir("/proc")?.take(ENTRIES_MAX).flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    // One that has ended meanwhile is none.
    Ok(pids.filter(|pid| is_of_user(*pid, uid)).filter_map(|pid| look(pid, &own).ok()).collect())
}

/// When the process with this number began.
pub(super) fn started(pid: i32) -> io::Result<u64> {
    stat(pid).map(|stat| stat.started)
}

fn look(pid: i32, own: &Namespaces) -> io::Result<Process> {
    let Stat { title, parent, started } = stat(pid)?;
    let inside = match inside(pid, own) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Inside::Hidden,
        other => other?,
    };
    Ok(Process { pid, started, parent, title, inside })
}

fn inside(pid: i32, own: &Namespaces) -> io::Result<Inside> {
    if Namespaces::of(&pid.to_string())? != *own {
        return Ok(Inside::Elsewhere);
    }
    let program = without_mark(&fs::read_link(format!("/proc/{pid}/exe"))?);
    Ok(Inside::Seen { program, words: Vec::new(), leaf: Leaf::Hidden })
}

/// Reads what only its memory tells: the words that matter, and the leaf. This can block for as long as
/// the process likes.
pub(super) fn read_memory(process: &Process, matters: impl Fn(&str) -> bool) -> Inside {
    let Inside::Seen { program, .. } = &process.inside else { return process.inside.clone() };
    let words = read(process.pid, "cmdline").unwrap_or_default();
    let words = words
        .split(|b| *b == 0)
        .filter(|word| !word.is_empty() && word.len() <= WORD_LEN_MAX)
        .map(String::from_utf8_lossy)
        .filter(|word| matters(word))
        .take(WORDS_MAX)
        .map(std::borrow::Cow::into_owned)
        .collect();
    let leaf = leaf(process.pid).unwrap_or(Leaf::Hidden);
    Inside::Seen { program: program.clone(), words, leaf }
}

fn leaf(pid: i32) -> io::Result<Leaf> {
    let environment = match read(pid, "environ") {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Ok(Leaf::Hidden),
        other => other?,
    };
    let mut variables = environment.split(|b| *b == 0);
    let path = variables.find_map(|variable| variable.strip_prefix(b"RAY_TLS_SERVER_CERT="));
    Ok(path.map_or(Leaf::None, |path| Leaf::At(OsStr::from_bytes(path).into())))
}

fn without_mark(program: &Path) -> PathBuf {
    let text = program.to_str().and_then(|text| text.strip_suffix(DELETED));
    text.map_or_else(|| program.to_path_buf(), PathBuf::from)
}

#[derive(PartialEq, Eq)]
struct Namespaces([PathBuf; 2]);

impl Namespaces {
    fn of(process: &str) -> io::Result<Self> {
        let link = |kind: &str| fs::read_link(format!("/proc/{process}/ns/{kind}"));
        Ok(Self([link("pid")?, link("net")?]))
    }
}

struct Stat {
    title: String,
    parent: i32,
    started: u64,
}

/// `/proc/PID/stat`, see proc(5): the title stands in brackets and may hold anything.
fn stat(pid: i32) -> io::Result<Stat> {
    let text = String::from_utf8_lossy(&read(pid, "stat")?).into_owned();
    parse_stat(&text).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

fn parse_stat(text: &str) -> Option<Stat> {
    let (before, after) = text.rsplit_once(')')?;
    let title = before.split_once('(')?.1.to_owned();
    let fields: Vec<&str> = after.split_whitespace().collect();
    // The third field, the state, is the first one here.
    Some(Stat {
        title,
        parent: fields.get(1)?.parse().ok()?,
        started: fields.get(19)?.parse().ok()?,
    })
}

fn is_of_user(pid: i32, uid: u32) -> bool {
    let Ok(status) = read(pid, "status") else { return false };
    uids(&String::from_utf8_lossy(&status)) == Some((uid, uid))
}

/// The real and the effective user.
fn uids(status: &str) -> Option<(u32, u32)> {
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    let mut fields = line.split_whitespace();
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

fn read(pid: i32, name: &str) -> io::Result<Vec<u8>> {
    use io::Read;
    let file = fs::File::open(format!("/proc/{pid}/{name}"))?;
    let mut bytes = Vec::new();
    file.take(READ_LEN_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_title_cannot_forge_its_parent() {
        let rest = "S 7 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 4711 0";
        for title in ["raylet", "a) S 99 (b", "ray let"] {
            let stat = parse_stat(&format!("42 ({title}) {rest}")).unwrap();
            assert_eq!((stat.title.as_str(), stat.parent, stat.started), (title, 7, 4_711));
        }
        assert!(parse_stat("42 (raylet) S").is_none());
    }

    #[test]
    fn both_users_are_read() {
        let status = "Name:\traylet\nUid:\t1000\t0\t0\t0\nGid:\t7\t7\t7\t7\n";
        assert_eq!(uids(status), Some((1_000, 0)));
        assert_eq!(uids("Name:\tx\n"), None);
    }

    #[test]
    fn a_replaced_program_keeps_its_name() {
        assert_eq!(without_mark(Path::new("/r/raylet (deleted)")), Path::new("/r/raylet"));
        assert_eq!(without_mark(Path::new("/r/raylet")), Path::new("/r/raylet"));
    }

    #[test]
    fn this_process_is_found_as_it_is() {
        let all = of_user(rustix::process::geteuid().as_raw()).unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        let found = all.iter().find(|process| process.pid == own).unwrap();
        let Inside::Seen { program, .. } = &found.inside else { panic!("{found:?}") };
        assert_eq!(*program, std::env::current_exe().unwrap());
        assert_eq!(started(own).unwrap(), found.started);
    }
}
