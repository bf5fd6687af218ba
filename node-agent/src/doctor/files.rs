//! Owners and modes of what lies in the agent's two folders: what they are, and what they must be. A
//! fault carries the change that ends it, where that change is safe. [`Folder::read`] alone does I/O.

use std::{
    fs::Metadata,
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::Level;
use crate::keyfolder::{is_half_way, number_of};

/// Most entries of a folder and its key folders that are looked at.
const ENTRIES_MAX: usize = 1_024;
/// Files of a key folder, and the fixed links to them.
const KEY_FILES: [&str; 4] = ["tls.key", "tls.crt", "ca.crt", "crl.pem"];
/// Files of both folders that are replaced by way of a `.NAME.tmp`.
const REPLACED: [&str; 15] = [
    "tls.key",
    "tls.crt",
    "ca.crt",
    "crl.pem",
    "current",
    "ray.env",
    "ray_token",
    ".enroll-once.key",
    "identity.pem",
    "enroll.key",
    "renew.key",
    "node.toml",
    "sync.pb",
    "isolation.json",
    "status.json",
];

/// Bits that let others than the owner write.
const OTHERS_WRITE: u32 = 0o022;

/// Which folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    State,
    Tls,
}

/// A folder and what lies in it, key folders with their files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Folder {
    pub(crate) path: PathBuf,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mode: u32,
    /// What is wrong with the folder it lies in.
    pub(crate) misplaced: Option<String>,
    /// By path relative to the folder.
    pub(crate) entries: Vec<Entry>,
    /// There are more than were looked at.
    pub(crate) cut: bool,
}

/// One thing in a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) kind: EntryKind,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mode: u32,
    pub(crate) links: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum EntryKind {
    File,
    Folder,
    Link(PathBuf),
    Other,
}

/// Something that is not as it must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    /// Relative to the folder; empty: the folder itself.
    pub(crate) name: String,
    pub(crate) level: Level,
    pub(crate) what: String,
    /// What ends it, where that is safe; else the operator must look.
    pub(crate) change: Option<Change>,
}

/// What `--fix` can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Mode(u32),
    Group(u32),
    /// Points a link here.
    Point(PathBuf),
    Remove,
    RemoveFolder,
}

/// Ray's group, as far as it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Group {
    Unknown,
    /// The keys are the agent's alone.
    None,
    Of(u32),
}

impl Folder {
    /// Looks, without following a link.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn read(path: &Path) -> io::Result<Self> {
        let path: PathBuf = std::path::absolute(path)?.components().collect();
        let own = std::fs::symlink_metadata(&path)?;
        if !own.is_dir() {
            return Err(io::Error::other("it is no folder, or a symbolic link to one"));
        }
        let misplaced = crate::statedir::fault_of_parent(&path)?;
        let (mut entries, mut cut) = (Vec::new(), false);
        read_into(&path, "", &mut entries, &mut cut)?;
        let subs: Vec<String> =
            entries.iter().filter(|e| e.is_key_folder()).map(|e| e.name.clone()).collect();
        for sub in subs {
            // One that may not be entered is told by its own mode.
            let _ = read_into(&path.join(&sub), &format!("{sub}/"), &mut entries, &mut cut);
        }
        let mode = own.mode() & 0o7777;
        Ok(Self { path, uid: own.uid(), gid: own.gid(), mode, misplaced, entries, cut })
    }

    fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.name == name)
    }

    /// The folder around something that others could write into, if there is one.
    pub(super) fn opened_around(&self, name: &str) -> Option<String> {
        if !name.is_empty() && self.mode & OTHERS_WRITE != 0 {
            return Some(self.path.display().to_string());
        }
        let folder = self.entry(name.split_once('/')?.0)?;
        let is_open = folder.mode & OTHERS_WRITE != 0 || folder.uid != self.uid;
        is_open.then(|| self.path.join(&folder.name).display().to_string())
    }

    /// Whether a key folder is there, and it and its files are of the owner of this one.
    fn has_own(&self, name: &str) -> bool {
        let is_own = |name: &str, kind: &EntryKind| {
            self.entry(name).is_some_and(|entry| entry.uid == self.uid && entry.kind == *kind)
        };
        let file = |file: &str| is_own(&format!("{name}/{file}"), &EntryKind::File);
        number_of(name).is_some()
            && is_own(name, &EntryKind::Folder)
            && KEY_FILES[..3].iter().all(|name| file(name))
    }
}

fn read_into(path: &Path, prefix: &str, all: &mut Vec<Entry>, cut: &mut bool) -> io::Result<()> {
    for entry in std::fs::read_dir(path)? {
        if all.len() == ENTRIES_MAX {
            *cut = true;
            break;
        }
        let entry = entry?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        // Of the entry itself, never of what a link points to; one that is gone is none.
        let Ok(metadata) = std::fs::symlink_metadata(entry.path()) else { continue };
        all.push(Entry::of(name, &metadata, &entry.path()));
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(())
}

impl Entry {
    fn of(name: String, metadata: &Metadata, path: &Path) -> Self {
        let kind = match metadata.file_type() {
            kind if kind.is_symlink() => {
                EntryKind::Link(std::fs::read_link(path).unwrap_or_default())
            }
            kind if kind.is_dir() => EntryKind::Folder,
            kind if kind.is_file() => EntryKind::File,
            _ => EntryKind::Other,
        };
        let (uid, gid) = (metadata.uid(), metadata.gid());
        Self { name, kind, uid, gid, mode: metadata.mode() & 0o7777, links: metadata.nlink() }
    }

    fn is_key_folder(&self) -> bool {
        self.kind == EntryKind::Folder && number_of(&self.name).is_some()
    }
}

/// Everything that is not as it must be.
#[must_use]
pub(crate) fn faults(folder: &Folder, which: Which, group: Group) -> Vec<Fault> {
    let mut all = Vec::new();
    if let Some(why) = &folder.misplaced {
        all.push(Fault {
            name: String::new(),
            level: Level::Fail,
            what: why.clone(),
            change: None,
        });
    }
    let wanted = if which == Which::State { 0o700 } else { 0o755 };
    if folder.mode != wanted {
        let level = if folder.mode & !wanted == 0 { Level::Warn } else { Level::Fail };
        all.push(mode_fault("", folder.mode, wanted, level));
    }
    for entry in &folder.entries {
        all.extend(entry_faults(folder, entry, which, group));
    }
    if which == Which::Tls {
        all.extend(links(folder));
    }
    all
}

fn entry_faults(folder: &Folder, entry: &Entry, which: Which, group: Group) -> Vec<Fault> {
    if let Some(change) = leftover(entry) {
        let what = "was left half written by a crash".to_owned();
        let name = entry.name.clone();
        return vec![Fault { name, level: Level::Warn, what, change: Some(change) }];
    }
    let Some(wanted) = Wanted::of(&entry.name, which, group) else { return Vec::new() };
    let at = |level, what: String, change| Fault { name: entry.name.clone(), level, what, change };
    if entry.kind != wanted.kind {
        let what = format!("is {}, where {} belongs", entry.kind.word(), wanted.kind.word());
        return vec![at(Level::Fail, what, None)];
    }
    if entry.uid != folder.uid {
        // It may be that user's work: giving it to the agent would make it the agent's.
        let what = format!("belongs to uid {}, who may have written it", entry.uid);
        return vec![at(Level::Fail, what, None)];
    }
    if entry.kind == EntryKind::File && entry.links > 1 {
        let what = format!("has {} names: it may be a file of elsewhere", entry.links);
        return vec![at(Level::Fail, what, None)];
    }
    let mut all = Vec::new();
    // The group first: a mode that lets a group read goes to the right one.
    if let Some(gid) = wanted.gid.filter(|gid| *gid != entry.gid) {
        let what = format!("has group {}, where Ray's is {gid}", entry.gid);
        all.push(at(Level::Fail, what, Some(Change::Group(gid))));
    }
    let too_wide = entry.mode & !wanted.most != 0;
    if too_wide || entry.mode & wanted.least != wanted.least {
        all.push(mode_fault(&entry.name, entry.mode, wanted.most, Level::Fail));
    }
    all
}

fn mode_fault(name: &str, mode: u32, wanted: u32, level: Level) -> Fault {
    let what = format!("has mode {mode:04o}, where {wanted:04o} is right");
    Fault { name: name.to_owned(), level, what, change: Some(Change::Mode(wanted)) }
}

/// What a crash leaves.
fn leftover(entry: &Entry) -> Option<Change> {
    let (folder, base) = entry.name.rsplit_once('/').unwrap_or(("", &entry.name));
    let temporary = base.strip_prefix('.').and_then(|base| base.strip_suffix(".tmp"));
    let is_ours = temporary.is_some_and(|name| REPLACED.contains(&name));
    match &entry.kind {
        EntryKind::File | EntryKind::Link(_) if is_ours => Some(Change::Remove),
        EntryKind::Folder if folder.is_empty() && is_half_way(base) => Some(Change::RemoveFolder),
        EntryKind::File | EntryKind::Folder | EntryKind::Link(_) | EntryKind::Other => None,
    }
}

impl EntryKind {
    fn word(&self) -> &'static str {
        match self {
            Self::File => "a file",
            Self::Folder => "a folder",
            Self::Link(_) => "a symbolic link",
            Self::Other => "something else",
        }
    }
}

/// What something must be.
struct Wanted {
    kind: EntryKind,
    /// Bits it may have, and those it must.
    most: u32,
    least: u32,
    gid: Option<u32>,
}

impl Wanted {
    fn of(name: &str, which: Which, group: Group) -> Option<Self> {
        match which {
            Which::State => Self::in_state(name),
            Which::Tls => Self::in_tls(name, group),
        }
    }

    fn in_state(name: &str) -> Option<Self> {
        let known = REPLACED[8..].contains(&name) || name == "lock" || name.ends_with(".damaged");
        // Behind a folder of mode 0700; the status holds no secret.
        let most = if name == "status.json" { 0o644 } else { 0o600 };
        known.then_some(Self { kind: EntryKind::File, most, least: 0o600, gid: None })
    }

    fn in_tls(name: &str, group: Group) -> Option<Self> {
        let file = |most, least, gid| Some(Self { kind: EntryKind::File, most, least, gid });
        let secret = match group {
            Group::Unknown => (0o640, 0o600, None),
            Group::None => (0o600, 0o600, None),
            Group::Of(gid) => (0o640, 0o640, Some(gid)),
        };
        match name.split_once('/') {
            None if number_of(name).is_some() => {
                let (most, least, gid) = match group {
                    Group::Unknown => (0o750, 0o700, None),
                    Group::None => (0o700, 0o700, None),
                    Group::Of(gid) => (0o750, 0o750, Some(gid)),
                };
                Some(Self { kind: EntryKind::Folder, most, least, gid })
            }
            None if name == "ray.env" => file(0o644, 0o644, None),
            None if name == "ray_token" => file(secret.0, secret.1, secret.2),
            None if name == ".enroll-once.key" => file(0o600, 0o600, None),
            Some((_, "tls.key")) => file(secret.0, secret.1, secret.2),
            Some((_, base)) if KEY_FILES.contains(&base) => file(0o644, 0o644, None),
            None | Some(_) => None,
        }
    }
}

/// The fixed paths: `current`, and the links through it.
fn links(folder: &Folder) -> Vec<Fault> {
    // Ray believes the roots it finds there: none is followed that another user may have made.
    let is_closed = |e: &&Entry| e.mode & OTHERS_WRITE == 0 && folder.has_own(&e.name);
    let newest = folder.entries.iter().filter(|e| e.is_key_folder()).filter(is_closed);
    let newest = newest.filter_map(|e| number_of(&e.name)).max();
    let Some(newest) = newest.map(crate::keyfolder::folder_name) else { return Vec::new() };
    let points_somewhere = |target: &Path| folder.has_own(target.to_str().unwrap_or_default());
    let current = link_fault(folder, "current", Path::new(&newest), points_somewhere);
    let fixed = KEY_FILES.iter().filter_map(|name| {
        let target = Path::new("current").join(name);
        link_fault(folder, name, &target, |there| there == target)
    });
    current.into_iter().chain(fixed).collect()
}

fn link_fault(
    folder: &Folder,
    name: &str,
    target: &Path,
    is_right: impl Fn(&Path) -> bool,
) -> Option<Fault> {
    let (what, change) = match folder.entry(name).map(|entry| &entry.kind) {
        Some(EntryKind::Link(to)) if is_right(to) => return None,
        Some(EntryKind::Link(to)) => (
            format!("points to {:?}, where {} is right", to, target.display()),
            Some(Change::Point(target.to_owned())),
        ),
        None => ("is missing".to_owned(), Some(Change::Point(target.to_owned()))),
        Some(EntryKind::File | EntryKind::Folder | EntryKind::Other) => {
            ("is no symbolic link: move it away".to_owned(), None)
        }
    };
    Some(Fault { name: name.to_owned(), level: Level::Fail, what, change })
}
