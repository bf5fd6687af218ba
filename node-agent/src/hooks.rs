//! Hooks: programs of the operator, run after files changed. Each has a bounded time and an
//! environment of a few known variables. A failing hook is logged and changes nothing.

use std::{
    io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

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

    /// Runs the hooks for an event, later and elsewhere.
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
        match run_one(&hook, event, key_folder).await {
            Ok(()) => tracing::debug!(hook = %hook.display(), event = event.word(), "hook done"),
            Err(error) => {
                tracing::error!(hook = %hook.display(), event = event.word(), %error, "hook failed");
            }
        }
    }
}

/// The executables of the folder in the order of their names. No folder: no hooks.
fn list(folder: &Path) -> io::Result<Vec<PathBuf>> {
    use std::os::unix::fs::PermissionsExt;
    if !folder.exists() {
        return Ok(Vec::new());
    }
    refuse_writable(folder)?;
    let mut hooks = Vec::new();
    for entry in std::fs::read_dir(folder)?.take(HOOKS_MAX) {
        let path = entry?.path();
        let metadata = std::fs::metadata(&path)?;
        if metadata.is_file() && metadata.permissions().mode() & 0o111 != 0 {
            hooks.push(path);
        }
    }
    hooks.sort();
    Ok(hooks)
}

async fn run_one(hook: &Path, event: Event, key_folder: &Path) -> io::Result<()> {
    refuse_writable(hook)?;
    let mut child = Command::new(hook)
        .env_clear()
        .env("PATH", PATH)
        .env("RAYMTLS_EVENT", event.word())
        .env("RAYMTLS_KEY_FOLDER", key_folder)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    match tokio::time::timeout(HOOK_TIME_MAX, child.wait()).await {
        Ok(ended) => {
            let ended = ended?;
            if ended.success() { Ok(()) } else { Err(io::Error::other(ended.to_string())) }
        }
        Err(_) => {
            child.kill().await?;
            let text = format!("it ran longer than {} s and was killed", HOOK_TIME_MAX.as_secs());
            Err(io::Error::new(io::ErrorKind::TimedOut, text))
        }
    }
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
        run_one(&hook, Event::LeafRenewed, Path::new("/t/k3")).await.unwrap();
        let seen = std::fs::read_to_string(out).unwrap();
        assert!(seen.contains("RAYMTLS_EVENT=leaf-renewed\nRAYMTLS_KEY_FOLDER=/t/k3\n"), "{seen}");
        assert!(!seen.contains("HOME=") && !seen.contains("CARGO"), "{seen}");
    }

    #[tokio::test]
    async fn a_hook_that_others_can_write_is_not_run() {
        let folder = tempfile::tempdir().unwrap();
        let hook = hook(folder.path(), "bad", "#!/bin/sh\nexit 0\n");
        std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o777)).unwrap();
        let error = run_one(&hook, Event::LeafRenewed, Path::new("/t/k3")).await.unwrap_err();
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
}
