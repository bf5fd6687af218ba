//! Hooks: programs of the operator, run after files changed. Each has a bounded time and an
//! environment of a few known variables. A failing hook is logged and changes nothing.
//!
//! As with run-parts, a hook's name is of letters, digits, `-` and `_`: what editors and packages
//! leave behind (`10-reload~`, `10-reload.dpkg-old`) is not run.

use std::{
    io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use rustix::process::{Pid, Signal};
use tokio::{process::Command, sync::mpsc};

use crate::config::is_ours_alone;

/// How long one hook may run.
const HOOK_TIME_MAX: Duration = Duration::from_secs(30);
/// Most events that wait for the hooks.
const QUEUE_LEN_MAX: usize = 64;
/// Most hooks that are run.
const HOOKS_MAX: usize = 64;
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What happened to the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A key folder has its next leaf.
    LeafRenewed,
    /// There is a new key folder.
    NewKeyFolder,
    /// Roots or CRLs changed.
    BundleChanged,
    /// Ray's token changed.
    RayTokenChanged,
}

impl Event {
    fn word(self) -> &'static str {
        match self {
            Self::LeafRenewed => "leaf-renewed",
            Self::NewKeyFolder => "new-key-folder",
            Self::BundleChanged => "bundle-changed",
            Self::RayTokenChanged => "ray-token-changed",
        }
    }
}

/// Tells the hooks, which run in a task of their own, one after the other.
#[derive(Clone, Debug)]
pub struct Hooks(Option<mpsc::Sender<(Event, PathBuf)>>);

impl Hooks {
    /// No hooks.
    #[must_use]
    pub fn none() -> Self {
        Self(None)
    }

    /// Hooks of a folder, looked at anew for each event.
    #[must_use]
    pub fn in_folder(folder: PathBuf) -> Self {
        let (sender, mut events) = mpsc::channel::<(Event, PathBuf)>(QUEUE_LEN_MAX);
        tokio::spawn(async move {
            while let Some((event, key_folder)) = events.recv().await {
                run_all(&folder, event, &key_folder).await;
            }
        });
        Self(Some(sender))
    }

    /// Runs the hooks for an event, later and elsewhere. A `key_folder` that is none of `k<N>` is not
    /// told to them.
    pub fn tell(&self, event: Event, key_folder: &Path) {
        let Some(sender) = &self.0 else { return };
        if sender.try_send((event, key_folder.to_path_buf())).is_err() {
            tracing::warn!(event = event.word(), "too many events wait for the hooks, one is lost");
        }
    }
}

async fn run_all(folder: &Path, event: Event, key_folder: &Path) {
    let hooks = match list(folder) {
        Ok(hooks) => hooks,
        Err(error) => {
            tracing::error!(folder = %folder.display(), %error, "no hook is run");
            return;
        }
    };
    for hook in hooks {
        match run_one(&hook, event, key_folder, HOOK_TIME_MAX).await {
            Ok(()) => tracing::debug!(hook = %hook.display(), event = event.word(), "hook done"),
            Err(error) => {
                tracing::error!(hook = %hook.display(), event = event.word(), %error, "hook failed");
            }
        }
    }
}

/// The executables of the folder in the order of their names. No folder: no hooks.
fn list(folder: &Path) -> io::Result<Vec<PathBuf>> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    refuse_writable(folder)?;
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        paths.push(entry?.path());
    }
    paths.sort();
    let mut hooks: Vec<_> = paths.into_iter().filter(|path| is_hook(path)).collect();
    if hooks.len() > HOOKS_MAX {
        tracing::warn!(folder = %folder.display(), "only the first {HOOKS_MAX} hooks are run");
        hooks.truncate(HOOKS_MAX);
    }
    Ok(hooks)
}

/// One bad entry costs itself, not the others.
fn is_hook(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) => {
            tracing::warn!(hook = %path.display(), %error, "not run: it cannot be looked at");
            return false;
        }
    };
    if !metadata.is_file() || metadata.permissions().mode() & 0o111 == 0 {
        return false;
    }
    let fits = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    let named =
        path.file_name().is_some_and(|name| name.as_encoded_bytes().iter().all(|b| fits(*b)));
    if !named {
        tracing::warn!(
            hook = %path.display(),
            "not run: a hook's name is of letters, digits, - and _"
        );
    }
    named
}

async fn run_one(
    hook: &Path,
    event: Event,
    key_folder: &Path,
    time_max: Duration,
) -> io::Result<()> {
    refuse_writable(hook)?;
    let mut command = Command::new(hook);
    command
        .env_clear()
        .env("PATH", PATH)
        .env("RAYMTLS_EVENT", event.word())
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .process_group(0)
        .kill_on_drop(true);
    if is_key_folder(key_folder) {
        command.env("RAYMTLS_KEY_FOLDER", key_folder);
    }
    let mut child = command.spawn()?;
    let group = child.id().and_then(|id| Pid::from_raw(id.cast_signed()));
    match tokio::time::timeout(time_max, child.wait()).await {
        Ok(ended) => {
            let ended = ended?;
            if ended.success() { Ok(()) } else { Err(io::Error::other(ended.to_string())) }
        }
        Err(_) => {
            // With everything it started: the group is its own and cannot be another's while the
            // hook is not waited for.
            if let Some(group) = group {
                rustix::process::kill_process_group(group, Signal::KILL)?;
            }
            child.wait().await?;
            let text = format!("it ran longer than {} s and was killed", time_max.as_secs());
            Err(io::Error::new(io::ErrorKind::TimedOut, text))
        }
    }
}

/// The token's event has the TLS folder, which is none.
fn is_key_folder(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).and_then(|n| n.strip_prefix('k'));
    name.is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()))
}

fn refuse_writable(path: &Path) -> io::Result<()> {
    if is_ours_alone(path)? {
        return Ok(());
    }
    let text = format!(
        "{} may be written by others, or belongs to another user than root and the agent's",
        path.display()
    );
    Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use raymtls_proto::durable::{Access, create};

    use super::*;

    fn hook(folder: &Path, name: &str, text: &str) -> PathBuf {
        let path = folder.join(name);
        create(&path, text.as_bytes(), Access { mode: 0o755, uid: None, gid: None }).unwrap();
        path
    }

    #[tokio::test]
    async fn a_hook_learns_the_event_and_inherits_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let text = format!("#!/bin/sh\nenv | sort > {}\n", out.display());
        let hook = hook(folder.path(), "10-note", &text);
        run_one(&hook, Event::LeafRenewed, Path::new("/t/k3"), HOOK_TIME_MAX).await.unwrap();
        let seen = std::fs::read_to_string(out).unwrap();
        assert!(seen.contains("RAYMTLS_EVENT=leaf-renewed\nRAYMTLS_KEY_FOLDER=/t/k3\n"), "{seen}");
        assert!(!seen.contains("HOME=") && !seen.contains("CARGO"), "{seen}");
    }

    #[tokio::test]
    async fn a_hook_that_others_can_write_is_not_run() {
        let folder = tempfile::tempdir().unwrap();
        let hook = hook(folder.path(), "bad", "#!/bin/sh\nexit 0\n");
        std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o777)).unwrap();
        let error = run_one(&hook, Event::LeafRenewed, Path::new("/t/k3"), HOOK_TIME_MAX)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(list(folder.path()).is_err());
    }

    #[test]
    fn only_executables_are_hooks_and_no_folder_is_none() {
        let folder = tempfile::tempdir().unwrap();
        hook(folder.path(), "20", "#!/bin/sh\n");
        hook(folder.path(), "10", "#!/bin/sh\n");
        create(&folder.path().join("README"), b"", Access::PUBLIC).unwrap();
        let names: Vec<_> = list(folder.path()).unwrap();
        assert_eq!(names, [folder.path().join("10"), folder.path().join("20")]);
        assert_eq!(list(Path::new("/nonexistent/hooks")).unwrap(), Vec::<PathBuf>::new());
    }

    #[test]
    fn names_are_those_of_run_parts_and_one_bad_entry_costs_itself() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["10-a", "20_B", "30.sh", "40~", "50.dpkg-old"] {
            hook(folder.path(), name, "#!/bin/sh\n");
        }
        std::os::unix::fs::symlink("nowhere", folder.path().join("00-gone")).unwrap();
        let hooks = list(folder.path()).unwrap();
        assert_eq!(hooks, [folder.path().join("10-a"), folder.path().join("20_B")]);
    }

    #[test]
    fn the_first_by_name_are_run_where_there_are_too_many() {
        let folder = tempfile::tempdir().unwrap();
        for number in (0..HOOKS_MAX + 8).rev() {
            hook(folder.path(), &format!("{number:03}"), "#!/bin/sh\n");
            create(&folder.path().join(format!("{number:03}-note")), b"", Access::PUBLIC).unwrap();
        }
        let hooks = list(folder.path()).unwrap();
        assert_eq!(hooks.len(), HOOKS_MAX);
        assert_eq!(hooks[HOOKS_MAX - 1], folder.path().join(format!("{:03}", HOOKS_MAX - 1)));
    }

    #[tokio::test]
    async fn a_hook_that_takes_too_long_is_killed_with_all_it_started() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("pid");
        let text = format!("#!/bin/sh\nsleep 600 &\necho $! > {}\nwait\n", out.display());
        let hook = hook(folder.path(), "slow", &text);
        let time_max = Duration::from_secs(1);
        let error =
            run_one(&hook, Event::LeafRenewed, Path::new("/t/k3"), time_max).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let pid: i32 = std::fs::read_to_string(out).unwrap().trim().parse().unwrap();
        for _ in 0..100 {
            // Gone, or dead and not yet waited for by whoever inherited it.
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            if stat.is_empty() || stat.contains(") Z ") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("what the hook started is still there");
    }

    #[tokio::test]
    async fn an_event_without_a_key_folder_names_none() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let text = format!("#!/bin/sh\nenv > {}\n", out.display());
        let hook = hook(folder.path(), "note", &text);
        let tls = Path::new("/var/lib/ray-mtls/tls");
        run_one(&hook, Event::RayTokenChanged, tls, HOOK_TIME_MAX).await.unwrap();
        let seen = std::fs::read_to_string(out).unwrap();
        assert!(!seen.contains("RAYMTLS_KEY_FOLDER"), "{seen}");
    }
}
