//! The listening sockets of the data path. The agent makes them and keeps them, so that new connections
//! wait in them while no process takes them; a restarted agent gets them back from a running tunnel.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
};

use raymtls_proto::durable::{self, Access};
use rustix::net::{
    AddressFamily, SocketFlags, SocketType, bind, listen, socket_with,
    sockopt::{set_ipv6_v6only, set_socket_reuseaddr},
};

use crate::tunnel::control::{CAPTURED, CONTROL, INBOUND};

/// Connections that wait to be taken; the kernel bounds it by net.core.somaxconn.
const BACKLOG: i32 = 4_096;
/// The name under which the running tunnel's control socket is found.
const CURRENT: &str = "control.sock";

/// The listening sockets but for the control socket, which each process has its own of.
#[derive(Debug)]
pub(crate) struct Listeners {
    pub(crate) captured: Vec<OwnedFd>,
    pub(crate) inbound: Vec<OwnedFd>,
}

impl Listeners {
    /// Makes them.
    ///
    /// # Errors
    /// An address that is taken or not this host's, by its name.
    pub(crate) fn bind(captured: &[SocketAddr], inbound: &[SocketAddr]) -> io::Result<Self> {
        let all = |addresses: &[SocketAddr]| -> io::Result<Vec<OwnedFd>> {
            addresses.iter().map(|address| listen_at(*address)).collect()
        };
        Ok(Self { captured: all(captured)?, inbound: all(inbound)? })
    }

    /// Those of a running tunnel, if they are the ones that would be made.
    pub(crate) fn taken(
        named: Vec<(String, OwnedFd)>,
        captured: &[SocketAddr],
        inbound: &[SocketAddr],
    ) -> Option<Self> {
        let mut taken = Self { captured: Vec::new(), inbound: Vec::new() };
        for (name, socket) in named {
            match name.as_str() {
                CAPTURED => taken.captured.push(socket),
                INBOUND => taken.inbound.push(socket),
                _ => {}
            }
        }
        let same = |sockets: &[OwnedFd], wanted: &[SocketAddr]| {
            let mut there: Vec<_> = sockets.iter().filter_map(address_of).collect();
            let mut wanted = wanted.to_vec();
            there.sort_unstable();
            wanted.sort_unstable();
            there == wanted
        };
        (same(&taken.captured, captured) && same(&taken.inbound, inbound)).then_some(taken)
    }

    /// Copies for a process, with the names it knows them by.
    pub(crate) fn copies(&self) -> io::Result<Vec<(&'static str, OwnedFd)>> {
        let captured = self.captured.iter().map(|socket| (CAPTURED, socket));
        let inbound = self.inbound.iter().map(|socket| (INBOUND, socket));
        captured
            .chain(inbound)
            .map(|(name, socket)| Ok((name, socket.as_fd().try_clone_to_owned()?)))
            .collect()
    }
}

fn address_of(socket: &OwnedFd) -> Option<SocketAddr> {
    let copy = socket.as_fd().try_clone_to_owned().ok()?;
    TcpListener::from(copy).local_addr().ok()
}

fn listen_at(address: SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let made = || -> io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(family, SocketType::STREAM, flags, None)?;
        set_socket_reuseaddr(&socket, true)?;
        if address.is_ipv6() {
            set_ipv6_v6only(&socket, true)?;
        }
        bind(&socket, &address)?;
        listen(&socket, BACKLOG)?;
        Ok(socket)
    };
    made().map_err(|error| {
        io::Error::new(error.kind(), format!("cannot listen at {address}: {error}"))
    })
}

/// The folder of rules and control sockets.
#[derive(Clone, Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    gid: u32,
}

impl Folder {
    /// Makes it: the agent alone writes there, the tunnel's group reads.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn make(path: &Path, gid: u32) -> io::Result<Self> {
        if let Some(parent) = path.parent() {
            durable::make_parents(parent)?;
        }
        durable::make_folder(path, Access { mode: 0o750, uid: None, gid: Some(gid) })?;
        // One that was made for another group, too.
        give(path, gid, 0o750)?;
        Ok(Self { path: path.to_owned(), gid })
    }

    /// The name that points at the running tunnel's control socket.
    pub(crate) fn current(&self) -> PathBuf {
        self.path.join(CURRENT)
    }

    /// Every control socket that lies there, but not the name that points at one.
    pub(crate) fn controls(&self) -> Vec<PathBuf> {
        let Ok(entries) = std::fs::read_dir(&self.path) else { return Vec::new() };
        let mut all: Vec<PathBuf> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| number_of(path).is_some())
            .collect();
        all.sort_by_key(|path| number_of(path));
        all
    }

    /// A control socket of its own for the next process. Root and the agent may ask by it: the tunnel
    /// looks at who does; the folder keeps everybody else away.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn next_control(&self) -> io::Result<(PathBuf, UnixListener)> {
        let last = self.controls().iter().filter_map(|path| number_of(path)).max();
        let number = last.unwrap_or_default().saturating_add(1);
        let path = self.path.join(format!("{CONTROL}-{number}.sock"));
        let listener = UnixListener::bind(&path)?;
        listener.set_nonblocking(true)?;
        give(&path, self.gid, 0o660)?;
        Ok((path, listener))
    }

    /// Points the known name at the control socket of the process that takes new flows.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn point_current(&self, control: &Path) -> io::Result<()> {
        let name = control.file_name().map(Path::new).unwrap_or(control);
        durable::point(&self.current(), name)
    }

    /// Which control socket the known name points at.
    pub(crate) fn pointed(&self) -> Option<PathBuf> {
        let name = std::fs::read_link(self.current()).ok()?;
        let path = self.path.join(name);
        number_of(&path).map(|_| path)
    }
}

fn give(path: &Path, gid: u32, mode: u32) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    rustix::fs::chown(path, None, Some(rustix::fs::Gid::from_raw(gid)))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
}

fn number_of(path: &Path) -> Option<u32> {
    let name = path.file_name()?.to_str()?;
    name.strip_prefix(CONTROL)?.strip_prefix('-')?.strip_suffix(".sock")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own_gid() -> u32 {
        rustix::process::getegid().as_raw()
    }

    #[test]
    fn each_process_has_a_control_socket_of_its_own_and_one_name_points_at_the_newest() {
        let folder = tempfile::tempdir().unwrap();
        let folder = Folder::make(&folder.path().join("tunnel"), own_gid()).unwrap();
        assert_eq!(folder.pointed(), None);
        let (first, _one) = folder.next_control().unwrap();
        let (second, _two) = folder.next_control().unwrap();
        assert!(first.ends_with("control-1.sock") && second.ends_with("control-2.sock"));
        folder.point_current(&first).unwrap();
        folder.point_current(&second).unwrap();
        assert_eq!(folder.pointed(), Some(second.clone()));
        assert_eq!(folder.controls(), [first, second]);
    }

    #[test]
    fn sockets_are_adopted_only_if_they_are_the_ones_that_would_be_made() {
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let made = Listeners::bind(&[any], &[any]).unwrap();
        let captured = address_of(&made.captured[0]).unwrap();
        let inbound = address_of(&made.inbound[0]).unwrap();
        let named = || {
            let copies = made.copies().unwrap().into_iter();
            copies.map(|(name, fd)| (name.to_owned(), fd)).collect::<Vec<_>>()
        };
        assert!(Listeners::taken(named(), &[captured], &[inbound]).is_some());
        assert!(Listeners::taken(named(), &[inbound], &[captured]).is_none());
        assert!(Listeners::taken(Vec::new(), &[captured], &[inbound]).is_none());
    }

    #[test]
    fn an_address_that_cannot_be_had_is_named() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let error = Listeners::bind(&[address], &[]).unwrap_err().to_string();
        assert!(error.contains(&address.to_string()), "{error}");
    }
}
