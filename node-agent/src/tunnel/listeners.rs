//! The listening sockets, which somebody else opened: the agent (`--fds`) or a service manager
//! (`LISTEN_FDS`, `LISTEN_FDNAMES`). They outlive this process there, so that who dials while it
//! restarts waits instead of being refused. It opens none itself.

use std::{
    io,
    net::TcpListener,
    os::{
        fd::{AsFd, OwnedFd, RawFd},
        unix::net::UnixListener,
    },
};

use rustix::{
    net::{AddressFamily, SocketType, sockopt},
    process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open},
};
use thiserror::Error;

use super::control::{CAPTURED, CONTROL, INBOUND};

/// Most sockets that are handed over.
const LISTENERS_MAX: usize = 64;

/// Why there is nothing to listen on.
#[derive(Debug, Error)]
pub(super) enum ListenersError {
    /// Nobody handed any over.
    #[error(
        "no listening sockets: hand them over with --fds captured=N,inbound=N,control=N, or from a \
         service manager with these names (FileDescriptorName=)"
    )]
    None,
    /// One kind is missing.
    #[error("no listening socket is named {0}")]
    Missing(&'static str),
    /// A name nobody knows.
    #[error("descriptor {fd} is named {name:?}: {CAPTURED}, {INBOUND} and {CONTROL} are known")]
    Name {
        /// The descriptor.
        fd: RawFd,
        /// Its name.
        name: String,
    },
    /// Not of the form.
    #[error("{0:?} is not of the form captured=3,inbound=4,control=5")]
    Form(String),
    /// Too many.
    #[error("{0} listening sockets, at most {LISTENERS_MAX} are taken")]
    TooMany(usize),
    /// Something else than its name says.
    #[error("descriptor {fd}, {name}, is no listening socket of its kind")]
    Kind {
        /// The descriptor.
        fd: RawFd,
        /// Its name.
        name: String,
    },
    /// The system says no.
    #[error("descriptor {fd} cannot be taken: {error}")]
    Io {
        /// The descriptor.
        fd: RawFd,
        /// What the system says.
        error: io::Error,
    },
}

/// What was handed over.
#[derive(Debug, Default)]
pub(crate) struct Listeners {
    pub(crate) captured: Vec<TcpListener>,
    pub(crate) inbound: Vec<TcpListener>,
    pub(crate) control: Vec<UnixListener>,
}

impl Listeners {
    /// By `--fds`, or else from the service manager.
    ///
    /// # Errors
    /// See [`ListenersError`].
    pub(crate) fn take(fds: Option<&str>) -> Result<Self, ListenersError> {
        let named = match fds {
            Some(fds) => parse(fds)?,
            None => sd_notify::listen_fds_with_names()
                .map_err(|error| ListenersError::Io { fd: 3, error })?
                .collect(),
        };
        if named.is_empty() {
            return Err(ListenersError::None);
        }
        if named.len() > LISTENERS_MAX {
            return Err(ListenersError::TooMany(named.len()));
        }
        let mut listeners = Self::default();
        for (fd, name) in named {
            listeners.add(fd, name)?;
        }
        for (name, len) in [
            (CAPTURED, listeners.captured.len()),
            (INBOUND, listeners.inbound.len()),
            (CONTROL, listeners.control.len()),
        ] {
            if len == 0 {
                return Err(ListenersError::Missing(name));
            }
        }
        Ok(listeners)
    }

    fn add(&mut self, fd: RawFd, name: String) -> Result<(), ListenersError> {
        let io = |error| ListenersError::Io { fd, error };
        let socket = own(fd).map_err(io)?;
        let is_unix = match name.as_str() {
            CAPTURED | INBOUND => false,
            CONTROL => true,
            _ => return Err(ListenersError::Name { fd, name }),
        };
        if !listens(&socket, is_unix) {
            return Err(ListenersError::Kind { fd, name });
        }
        if is_unix {
            let listener = UnixListener::from(socket);
            listener.set_nonblocking(true).map_err(io)?;
            self.control.push(listener);
        } else {
            let listener = TcpListener::from(socket);
            listener.set_nonblocking(true).map_err(io)?;
            let kept = if name == CAPTURED { &mut self.captured } else { &mut self.inbound };
            kept.push(listener);
        }
        Ok(())
    }

    /// Their ports.
    pub(crate) fn ports(listeners: &[TcpListener]) -> Vec<u16> {
        listeners.iter().filter_map(|l| Some(l.local_addr().ok()?.port())).collect()
    }
}

/// `captured=3,inbound=4`.
fn parse(fds: &str) -> Result<Vec<(RawFd, String)>, ListenersError> {
    let one = |part: &str| {
        let (name, fd) = part.split_once('=')?;
        let fd: RawFd = fd.parse().ok().filter(|fd| *fd > 2)?;
        Some((fd, name.to_owned()))
    };
    let parts = fds.split(',').map(one).collect::<Option<Vec<_>>>();
    parts.ok_or_else(|| ListenersError::Form(fds.to_owned()))
}

/// A descriptor of this process by its number, as one that is owned: asked for like one of another
/// process, because nothing else takes a number and is safe.
fn own(fd: RawFd) -> io::Result<OwnedFd> {
    let this = pidfd_open(getpid(), PidfdFlags::empty())?;
    Ok(pidfd_getfd(this, fd, PidfdGetfdFlags::empty())?)
}

fn listens(socket: &OwnedFd, is_unix: bool) -> bool {
    let socket = socket.as_fd();
    let is_stream = sockopt::socket_type(socket) == Ok(SocketType::STREAM);
    let family = sockopt::socket_domain(socket);
    let fits = if is_unix {
        family == Ok(AddressFamily::UNIX)
    } else {
        family == Ok(AddressFamily::INET) || family == Ok(AddressFamily::INET6)
    };
    fits && is_stream && sockopt::socket_acceptconn(socket) == Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fds_are_names_and_numbers_above_the_standard_ones() {
        let parsed = parse("captured=3,captured=4,control=5").unwrap();
        assert_eq!(parsed[1], (4, CAPTURED.to_owned()));
        for bad in ["", "captured", "captured=", "captured=2", "captured=x", "captured=3,"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_descriptor_that_does_not_listen_is_refused() {
        use std::os::fd::AsRawFd;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (unix, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut listeners = Listeners::default();
        listeners.add(listener.as_raw_fd(), INBOUND.into()).unwrap();
        for (fd, name) in [
            (client.as_raw_fd(), INBOUND),
            (listener.as_raw_fd(), CONTROL),
            (unix.as_raw_fd(), CONTROL),
            (listener.as_raw_fd(), "other"),
        ] {
            assert!(listeners.add(fd, name.into()).is_err(), "{name}");
        }
        assert!(matches!(listeners.add(9_999, INBOUND.into()), Err(ListenersError::Io { .. })));
    }
}
