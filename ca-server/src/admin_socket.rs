//! The operator's socket: made in a folder of its own and moved into place, so that it never stands
//! there with another mode; never over one that another server answers on. Who may do what over it is `admin`'s to say.

use std::{
    io,
    os::unix::fs::{FileTypeExt, PermissionsExt, chown},
    path::Path,
    time::Duration,
};

use raymtls_proto::durable::{self, Access};
use tokio::net::{UnixListener, UnixStream};
use tracing::warn;

/// How often it is asked whether another server still answers: one that ends lets go late.
const ANSWER_TRIES: u32 = 10;
const ANSWER_WAIT: Duration = Duration::from_millis(50);

/// Listens at `path`: 0600, or 0660 with the operator group. Missing folders above it let everyone
/// through, since others have sockets there too.
///
/// # Errors
/// Another server answers there, there is no such group, or the system's words.
pub async fn listen(path: &Path, group: Option<&str>) -> io::Result<UnixListener> {
    let named = |e: io::Error| {
        io::Error::new(e.kind(), format!("operator's socket {}: {e}", path.display()))
    };
    let gid = group.map(group_id).transpose().map_err(named)?;
    let parent = path.parent().unwrap_or_else(|| Path::new("/"));
    durable::make_parents(parent).map_err(named)?;
    must_be_free(path).await.map_err(named)?;
    let private = parent.join(".ca-admin.new");
    if private.exists() {
        // Left by a server that was killed between two of these lines.
        std::fs::remove_dir_all(&private).map_err(named)?;
    }
    durable::make_folder(&private, Access { mode: 0o700, ..Access::PRIVATE }).map_err(named)?;
    let made = private.join("socket");
    let bound = UnixListener::bind(&made).and_then(|listener| {
        let mode = if gid.is_some() { 0o660 } else { 0o600 };
        if let Some(gid) = gid {
            chown(&made, None, Some(gid))?;
        }
        std::fs::set_permissions(&made, std::fs::Permissions::from_mode(mode))?;
        std::fs::rename(&made, path)?;
        Ok(listener)
    });
    if let Err(error) = std::fs::remove_dir_all(&private) {
        warn!(%error, folder = %private.display(), "left behind");
    }
    bound.map_err(named)
}

/// Nothing lies there, or a socket nobody listens on any more.
async fn must_be_free(path: &Path) -> io::Result<()> {
    let taken = |why: &str| Err(io::Error::new(io::ErrorKind::AddrInUse, why.to_owned()));
    let Ok(metadata) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !metadata.file_type().is_socket() {
        return taken("something that is no socket lies there: name another admin_socket");
    }
    for _ in 0..ANSWER_TRIES {
        match UnixStream::connect(path).await {
            Err(e) if is_nobody(&e) => return Ok(()),
            // A queue that is full is one that somebody made.
            Ok(_) | Err(_) => tokio::time::sleep(ANSWER_WAIT).await,
        }
    }
    taken("another ca-server answers there: stop it, or give this one another admin_socket")
}

fn is_nobody(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound)
}

/// A group's id by name or number, from /etc/group.
fn group_id(group: &str) -> io::Result<u32> {
    if let Ok(gid) = group.parse() {
        return Ok(gid);
    }
    let groups = std::fs::read_to_string("/etc/group")?;
    let gid = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(group)).then(|| fields.nth(1)?.parse().ok()).flatten()
    });
    gid.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("there is no group {group}")))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use rustix::{fs::Mode, process::umask};

    use super::*;

    #[tokio::test]
    async fn the_socket_s_mode_says_who_may_and_its_folder_lets_them_through() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/ray-mtls/ca-admin.sock");
        let own_gid = rustix::process::getegid().as_raw();
        // As the server does; what the other tests make has a mode of its own.
        let before = umask(Mode::RWXG | Mode::RWXO);
        let closed = listen(&path, None).await.map(drop);
        let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o777;
        let closed_mode = mode(&path);
        let open = listen(&path, Some(&own_gid.to_string())).await;
        umask(before);
        closed.unwrap();
        open.unwrap();
        assert_eq!(closed_mode, 0o600);
        assert_eq!(mode(&path), 0o660);
        assert_eq!(std::fs::metadata(&path).unwrap().gid(), own_gid);
        let parent = path.parent().unwrap();
        assert_eq!(mode(parent), 0o755, "the operator group cannot reach the socket");
        assert_eq!(mode(parent.parent().unwrap()), 0o755);
        assert_eq!(std::fs::read_dir(parent).unwrap().count(), 1, "something was left behind");
    }

    #[tokio::test]
    async fn a_group_that_is_not_there_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca-admin.sock");
        let error = listen(&path, Some("no-such-group")).await.unwrap_err().to_string();
        assert!(error.contains("no group no-such-group"), "{error}");
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn the_socket_of_another_server_is_left_to_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca-admin.sock");
        let first = listen(&path, None).await.unwrap();
        let error = listen(&path, None).await.unwrap_err().to_string();
        assert!(error.contains("another ca-server answers there"), "{error}");
        assert!(error.contains(path.to_str().unwrap()), "{error}");
        assert!(UnixStream::connect(&path).await.is_ok(), "the first one is not reached any more");
        drop(first);
        listen(&path, None).await.unwrap();
    }

    #[tokio::test]
    async fn a_file_in_the_socket_s_place_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca-admin.sock");
        durable::replace(&path, b"mine", Access::PRIVATE).unwrap();
        let error = listen(&path, None).await.unwrap_err().to_string();
        assert!(error.contains("no socket lies there"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    }
}
