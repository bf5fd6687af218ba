//! `doctor --fix`: ends the faults that carry a change, and those alone. Everything goes through the
//! descriptor of a folder that belongs to the caller; no link is followed, and only what belongs to the
//! caller and has one name is changed. It writes no file's content.

use std::{io, os::fd::OwnedFd, path::Path};

use rustix::{
    fs::{
        AtFlags, CWD, FileType, Gid, Mode, OFlags, Stat, fchmod, fchown, fstat, openat, renameat,
        statat, symlinkat, unlinkat,
    },
    process::geteuid,
};
use serde::Serialize;

use super::files::{Change, EntryKind, Fault, Folder};

/// Files that are removed with one half-made key folder; it has four and their temporaries.
const REMOVED_MAX: usize = 16;

/// What became of a fault.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Fixed {
    pub(crate) path: String,
    pub(crate) what: String,
    pub(crate) done: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "result", content = "why", rename_all = "snake_case")]
pub(crate) enum Outcome {
    Done,
    /// With `--dry-run`.
    Would,
    /// The operator must look.
    NotSafe(String),
    Failed(String),
}

/// How much may be changed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leave {
    /// A daemon may be at work in the folders: modes of folders alone.
    pub(crate) daemon: bool,
    /// Ray's group is configured, and not only what enrolment wrote down: a daemon may have another.
    pub(crate) group: bool,
    pub(crate) dry_run: bool,
}

/// Ends the faults of one folder, or says what it would do.
pub(crate) fn fix(folder: &Folder, faults: &[Fault], leave: Leave) -> Vec<Fixed> {
    let euid = geteuid().as_raw();
    let root = open_folder(&folder.path);
    let outcome = |fault: &Fault| {
        let Some(change) = &fault.change else {
            return Outcome::NotSafe(
                "only you can tell what it is: look, then put it right".to_owned(),
            );
        };
        if folder.uid != euid {
            let uid = folder.uid;
            return Outcome::NotSafe(format!(
                "the folder belongs to uid {uid}: run this as that user"
            ));
        }
        if let Some(why) =
            folder.misplaced.clone().or_else(|| unsafe_to(folder, fault, change, leave))
        {
            return Outcome::NotSafe(why);
        }
        if leave.dry_run {
            return Outcome::Would;
        }
        let applied = match &root {
            Ok(root) => apply(root, &fault.name, change, euid),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        };
        applied.map_or_else(|error| Outcome::Failed(error.to_string()), |()| Outcome::Done)
    };
    let told = |fault: &Fault| Fixed {
        path: folder.path.join(&fault.name).display().to_string(),
        what: match &fault.change {
            Some(change) => format!("{}: {}", fault.what, change.words()),
            None => fault.what.clone(),
        },
        done: outcome(fault),
    };
    faults.iter().map(told).collect()
}

/// Why a change is left to the operator.
fn unsafe_to(folder: &Folder, fault: &Fault, change: &Change, leave: Leave) -> Option<String> {
    let entry = folder.entries.iter().find(|entry| entry.name == fault.name);
    let is_folder =
        fault.name.is_empty() || entry.is_some_and(|entry| entry.kind == EntryKind::Folder);
    // What lies in there may be another's work under the name of ours.
    if let Some(open) = folder.opened_around(&fault.name) {
        return Some(format!("others could write into {open}: look at what lies in there first"));
    }
    if leave.daemon && !(is_folder && matches!(change, Change::Mode(_))) {
        let why = "a daemon may be at work in there, or that cannot be told: stop it first";
        return Some(why.to_owned());
    }
    match (change, entry) {
        (Change::Mode(mode), Some(entry)) => {
            let (added, taken) = (mode & !entry.mode, entry.mode & !mode);
            if added & 0o004 != 0 {
                return Some(
                    "others would read it: chmod it yourself once you have looked".to_owned(),
                );
            }
            if taken & 0o050 != 0 && !leave.group {
                return Some(UNTOLD_GROUP.to_owned());
            }
            None
        }
        (Change::Group(_), _) if !leave.group => Some(UNTOLD_GROUP.to_owned()),
        (
            Change::Mode(_)
            | Change::Group(_)
            | Change::Point(_)
            | Change::Remove
            | Change::RemoveFolder,
            _,
        ) => None,
    }
}

const UNTOLD_GROUP: &str = "Ray's group is not configured, and Ray may read it by that: give --ray-group, or ray_group in agent.toml";

impl Change {
    fn words(&self) -> String {
        match self {
            Self::Mode(mode) => format!("give it mode {mode:04o}"),
            Self::Group(gid) => format!("give it group {gid}"),
            Self::Point(to) => format!("point it to {}", to.display()),
            Self::Remove | Self::RemoveFolder => "remove it".to_owned(),
        }
    }
}

fn apply(root: &OwnedFd, name: &str, change: &Change, euid: u32) -> io::Result<()> {
    if fstat(root)?.st_uid != euid {
        return Err(io::Error::other("the folder is another one by now"));
    }
    // A key folder is entered by its own descriptor: it may have become a link meanwhile.
    let (parent, base) = match name.split_once('/') {
        None => (None, name),
        Some((folder, base)) => (Some(open_in(root, folder, euid)?), base),
    };
    let at = parent.as_ref().unwrap_or(root);
    match change {
        Change::Mode(mode) if base.is_empty() => Ok(fchmod(root, Mode::from_raw_mode(*mode))?),
        Change::Mode(mode) => Ok(fchmod(owned(at, base, euid)?, Mode::from_raw_mode(*mode))?),
        Change::Group(gid) => Ok(fchown(owned(at, base, euid)?, None, Some(Gid::from_raw(*gid)))?),
        Change::Point(to) => point(at, base, to),
        Change::Remove => remove(at, base, euid),
        Change::RemoveFolder => remove_folder(at, base, euid),
    }
}

fn open_folder(path: &Path) -> io::Result<OwnedFd> {
    Ok(openat(CWD, path, flags() | OFlags::DIRECTORY, Mode::empty())?)
}

fn flags() -> OFlags {
    // A pipe in the place of a file would make the opener wait.
    OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK
}

fn open_in(root: &OwnedFd, name: &str, euid: u32) -> io::Result<OwnedFd> {
    let folder = openat(root, name, flags() | OFlags::DIRECTORY, Mode::empty())?;
    is_ours(&fstat(&folder)?, euid)?;
    Ok(folder)
}

/// What may be changed: a file with one name, or a folder, of the caller.
fn owned(at: &OwnedFd, name: &str, euid: u32) -> io::Result<OwnedFd> {
    let there = openat(at, name, flags(), Mode::empty())?;
    let stat = fstat(&there)?;
    is_ours(&stat, euid)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile if stat.st_nlink == 1 => Ok(there),
        FileType::Directory => Ok(there),
        FileType::RegularFile
        | FileType::Symlink
        | FileType::Fifo
        | FileType::Socket
        | FileType::CharacterDevice
        | FileType::BlockDevice
        | FileType::Unknown => Err(io::Error::other("it is another thing by now")),
    }
}

fn is_ours(stat: &Stat, euid: u32) -> io::Result<()> {
    if stat.st_uid == euid {
        return Ok(());
    }
    Err(io::Error::other(format!("it belongs to uid {}", stat.st_uid)))
}

fn point(at: &OwnedFd, name: &str, to: &Path) -> io::Result<()> {
    if let Ok(stat) = statat(at, name, AtFlags::SYMLINK_NOFOLLOW)
        && FileType::from_raw_mode(stat.st_mode) != FileType::Symlink
    {
        return Err(io::Error::other("it is no symbolic link by now"));
    }
    let temporary = format!(".{name}.tmp");
    match unlinkat(at, &*temporary, AtFlags::empty()) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    symlinkat(to, at, &*temporary)?;
    renameat(at, &*temporary, at, name)?;
    Ok(rustix::fs::fsync(at)?)
}

fn remove(at: &OwnedFd, name: &str, euid: u32) -> io::Result<()> {
    is_ours(&statat(at, name, AtFlags::SYMLINK_NOFOLLOW)?, euid)?;
    Ok(unlinkat(at, name, AtFlags::empty())?)
}

/// Its files, and then itself; whatever is no file in there keeps it.
fn remove_folder(at: &OwnedFd, name: &str, euid: u32) -> io::Result<()> {
    let folder = open_in(at, name, euid)?;
    let entries = rustix::fs::Dir::read_from(&folder)?.take(REMOVED_MAX);
    for entry in entries {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            unlinkat(&folder, entry.file_name(), AtFlags::empty())?;
        }
    }
    Ok(unlinkat(at, name, AtFlags::REMOVEDIR)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use raymtls_proto::durable::{self, Access};

    use super::{
        super::files::{Group, Which, faults},
        *,
    };

    struct Tls(tempfile::TempDir);

    impl Tls {
        fn new() -> Self {
            let tls = Self(tempfile::tempdir().unwrap());
            tls.mode("", 0o755);
            std::fs::create_dir(tls.path("k1")).unwrap();
            tls.mode("k1", 0o700);
            tls.file("k1/tls.key", 0o600);
            for name in ["tls.crt", "ca.crt", "crl.pem"] {
                tls.file(&format!("k1/{name}"), 0o644);
            }
            tls.file("ray.env", 0o644);
            symlink("k1", tls.path("current")).unwrap();
            for name in ["tls.key", "tls.crt", "ca.crt", "crl.pem"] {
                symlink(format!("current/{name}"), tls.path(name)).unwrap();
            }
            tls
        }

        fn path(&self, name: &str) -> std::path::PathBuf {
            // Without a slash at the end, which would follow a link.
            self.0.path().join("tls").components().chain(Path::new(name).components()).collect()
        }

        fn file(&self, name: &str, mode: u32) {
            durable::replace(&self.path(name), b"x", Access { mode, uid: None, gid: None })
                .unwrap();
        }

        fn mode(&self, name: &str, mode: u32) {
            if name.is_empty() && !self.path("").exists() {
                std::fs::create_dir(self.path("")).unwrap();
            }
            std::fs::set_permissions(self.path(name), std::fs::Permissions::from_mode(mode))
                .unwrap();
        }

        fn mode_of(&self, name: &str) -> u32 {
            std::fs::symlink_metadata(self.path(name)).unwrap().mode() & 0o7777
        }

        fn fix(&self, dry_run: bool) -> Vec<Fixed> {
            self.fix_as(Leave { dry_run, ..ALL })
        }

        fn fix_as(&self, leave: Leave) -> Vec<Fixed> {
            let folder = Folder::read(&self.path("")).unwrap();
            fix(&folder, &faults(&folder, Which::Tls, Group::None), leave)
        }
    }

    const ALL: Leave = Leave { daemon: false, group: true, dry_run: false };

    fn left(fixed: &[Fixed]) -> bool {
        !fixed.is_empty() && fixed.iter().all(|one| matches!(one.done, Outcome::NotSafe(_)))
    }

    #[test]
    fn what_lay_where_others_could_write_is_not_touched_and_never_opened_to_others() {
        let tls = Tls::new();
        tls.mode("", 0o777);
        // The token under the name of what all may read, and no way to the true folder.
        tls.file("ray_token", 0o600);
        std::fs::rename(tls.path("ray_token"), tls.path("ray.env")).unwrap();
        std::fs::remove_file(tls.path("current")).unwrap();
        tls.file(".ray.env.tmp", 0o600);

        let first = tls.fix(false);
        let done: Vec<&Fixed> = first.iter().filter(|one| one.done == Outcome::Done).collect();
        assert!(
            matches!(done.as_slice(), [one] if one.what.contains("give it mode 0755")),
            "{first:#?}"
        );
        assert_eq!(tls.mode_of(""), 0o755);
        assert!(!tls.path("current").exists() && tls.path(".ray.env.tmp").exists());
        // Nor is it by a second run.
        tls.fix(false);
        assert_eq!(tls.mode_of("ray.env"), 0o600);
    }

    #[test]
    fn no_link_leads_to_a_key_folder_that_another_user_may_have_made() {
        let tls = Tls::new();
        std::fs::create_dir(tls.path("k9")).unwrap();
        tls.mode("k9", 0o755);
        for name in ["tls.key", "tls.crt", "ca.crt"] {
            tls.file(&format!("k9/{name}"), 0o644);
        }
        std::fs::remove_file(tls.path("current")).unwrap();
        let mut folder = Folder::read(&tls.path("")).unwrap();
        let points = |folder: &Folder| {
            let all = faults(folder, Which::Tls, Group::None);
            let to = all.into_iter().find(|fault| fault.name == "current").unwrap().change;
            to == Some(Change::Point("k9".into()))
        };
        assert!(points(&folder));
        for name in ["k9", "k9/tls.key", "k9/ca.crt"] {
            let of = |folder: &mut Folder| {
                let at = folder.entries.iter().position(|entry| entry.name == name).unwrap();
                folder.entries[at].uid ^= 1;
            };
            of(&mut folder);
            assert!(!points(&folder), "{name}");
            of(&mut folder);
        }
        symlink("k9", tls.path("current")).unwrap();
        let mut folder = Folder::read(&tls.path("")).unwrap();
        folder.entries.iter_mut().find(|entry| entry.name == "k9/ca.crt").unwrap().uid ^= 1;
        let all = faults(&folder, Which::Tls, Group::None);
        let current = all.iter().find(|fault| fault.name == "current").unwrap();
        assert_eq!(current.change, Some(Change::Point("k1".into())), "one that is there already");
    }

    #[test]
    fn rays_way_to_its_key_is_not_narrowed_on_a_guess() {
        let tls = Tls::new();
        tls.mode("k1", 0o750);
        tls.mode("k1/tls.key", 0o640);
        assert!(left(&tls.fix_as(Leave { group: false, ..ALL })));
        assert_eq!((tls.mode_of("k1"), tls.mode_of("k1/tls.key")), (0o750, 0o640));
        let folder = Folder::read(&tls.path("")).unwrap();
        let other = faults(&folder, Which::Tls, Group::Of(folder.gid + 1));
        assert!(left(&fix(&folder, &other, Leave { group: false, ..ALL })), "another group's");
    }

    #[test]
    fn what_is_as_it_must_be_is_left_alone() {
        assert_eq!(Tls::new().fix(false), []);
    }

    #[test]
    fn modes_links_and_leftovers_are_put_right_and_then_nothing_is_left() {
        let tls = Tls::new();
        tls.mode("", 0o700);
        tls.mode("k1", 0o755);
        tls.mode("k1/tls.key", 0o644);
        tls.mode("k1/tls.crt", 0o646);
        tls.mode("ray.env", 0o666);
        std::fs::remove_file(tls.path("current")).unwrap();
        std::fs::remove_file(tls.path("ca.crt")).unwrap();
        symlink("/etc/passwd", tls.path("ca.crt")).unwrap();
        tls.file(".ray.env.tmp", 0o600);
        tls.file("k1/.tls.crt.tmp", 0o600);
        std::fs::create_dir(tls.path(".k2.new")).unwrap();
        tls.file(".k2.new/tls.key", 0o600);

        let would = tls.fix(true);
        assert_eq!(would.len(), 10, "{would:#?}");
        assert!(would.iter().all(|fixed| fixed.done == Outcome::Would), "{would:#?}");
        assert_eq!(tls.mode_of("k1/tls.key"), 0o644, "a dry run changes nothing");

        let done = tls.fix(false);
        assert!(done.iter().all(|fixed| fixed.done == Outcome::Done), "{done:#?}");
        assert_eq!(tls.fix(false), []);
        for (name, mode) in [
            ("", 0o755),
            ("k1", 0o700),
            ("k1/tls.key", 0o600),
            ("k1/tls.crt", 0o644),
            ("ray.env", 0o644),
        ] {
            assert_eq!(tls.mode_of(name), mode, "{name}");
        }
        assert_eq!(std::fs::read_link(tls.path("current")).unwrap(), Path::new("k1"));
        assert_eq!(std::fs::read_link(tls.path("ca.crt")).unwrap(), Path::new("current/ca.crt"));
        assert!(!tls.path(".k2.new").exists() && !tls.path("k1/.tls.crt.tmp").exists());
    }

    #[test]
    fn nothing_outside_is_touched_however_it_is_planted() {
        let tls = Tls::new();
        let outside = tls.0.path().join("outside");
        durable::replace(&outside, b"x", Access { mode: 0o666, uid: None, gid: None }).unwrap();
        // A link in the place of a key, a second name of a file of elsewhere, a folder that is a link.
        std::fs::remove_file(tls.path("k1/tls.key")).unwrap();
        symlink(&outside, tls.path("k1/tls.key")).unwrap();
        std::fs::remove_file(tls.path("ray.env")).unwrap();
        std::fs::hard_link(&outside, tls.path("ray.env")).unwrap();
        let elsewhere = tls.0.path().join("elsewhere");
        std::fs::create_dir(&elsewhere).unwrap();
        std::fs::set_permissions(&elsewhere, std::fs::Permissions::from_mode(0o777)).unwrap();
        symlink(&elsewhere, tls.path("k2")).unwrap();

        let fixed = tls.fix(false);
        assert_eq!(fixed.len(), 3, "{fixed:#?}");
        assert!(fixed.iter().all(|f| matches!(f.done, Outcome::NotSafe(_))), "{fixed:#?}");
        for (path, mode) in [(&outside, 0o666), (&elsewhere, 0o777)] {
            let now = std::fs::symlink_metadata(path).unwrap();
            assert_eq!(now.mode() & 0o7777, mode, "{}", path.display());
        }
        // What changed between the look and the change is found by its descriptor.
        let euid = geteuid().as_raw();
        let root = open_folder(&tls.path("")).unwrap();
        for (name, change) in [
            ("k1/tls.key", Change::Mode(0o600)),
            ("ray.env", Change::Mode(0o644)),
            ("k2", Change::Mode(0o700)),
            ("k2/tls.key", Change::Mode(0o600)),
            ("k2", Change::RemoveFolder),
            ("k1", Change::Point("k9".into())),
        ] {
            assert!(apply(&root, name, &change, euid).is_err(), "{name}: {change:?}");
        }
        assert!(apply(&root, "k1/tls.crt", &Change::Mode(0o644), euid + 1).is_err(), "another's");
        assert!(open_folder(&tls.path("k2")).is_err(), "a link in the place of the folder");
    }

    #[test]
    fn beside_a_daemon_nothing_but_modes_of_folders_changes() {
        let tls = Tls::new();
        tls.mode("k1", 0o777);
        tls.mode("ray.env", 0o666);
        tls.file(".ray.env.tmp", 0o600);
        std::fs::remove_file(tls.path("current")).unwrap();
        let fixed = tls.fix_as(Leave { daemon: true, ..ALL });
        let done: Vec<&Fixed> = fixed.iter().filter(|one| one.done == Outcome::Done).collect();
        assert!(matches!(done.as_slice(), [one] if one.path.ends_with("/k1")), "{fixed:#?}");
        assert!(tls.path(".ray.env.tmp").exists() && !tls.path("current").exists());
        assert_eq!((tls.mode_of("k1"), tls.mode_of("ray.env")), (0o700, 0o666));
    }

    #[test]
    fn a_folder_of_another_user_is_not_touched() {
        let tls = Tls::new();
        tls.mode("ray.env", 0o666);
        let mut folder = Folder::read(&tls.path("")).unwrap();
        let all = faults(&folder, Which::Tls, Group::None);
        folder.uid += 1;
        let fixed = fix(&folder, &all, ALL);
        assert!(matches!(fixed[0].done, Outcome::NotSafe(_)), "{fixed:?}");
        assert_eq!(tls.mode_of("ray.env"), 0o666);
    }
}
