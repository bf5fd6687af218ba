//! What was seen of this host, as data: a check is a function of it. What could not be seen is an
//! error that says why.

use std::{net::IpAddr, path::PathBuf};

use raymtls_proto::v1;
use time::OffsetDateTime;

use super::{files::Folder, own::Public};
use crate::{
    served::{Served, kind::Kind},
    status::Status,
};

/// All of it.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    pub(crate) now: OffsetDateTime,
    /// Who looks.
    pub(crate) euid: u32,
    pub(crate) tls_dir: PathBuf,
    /// Ray's group as given at enrolment, where that can be read.
    pub(crate) enrolled_gid: Option<Option<u32>>,
    pub(crate) agent: Agent,
    pub(crate) leaf: Result<Public, String>,
    pub(crate) key: Key,
    /// Addresses of this host's interfaces.
    pub(crate) host_addresses: Vec<IpAddr>,
    /// What the CA told of the cluster, from the state folder.
    pub(crate) settings: Result<v1::Settings, String>,
    pub(crate) served: Result<Served, String>,
    /// Why the sockets were found and not asked.
    pub(crate) not_asked: Option<String>,
    pub(crate) processes: Vec<Process>,
    pub(crate) state: Result<Folder, String>,
    pub(crate) tls: Result<Folder, String>,
    /// Files of the operator that others may write, or that cannot be read.
    pub(crate) exposed: Vec<String>,
    pub(crate) rooms: Vec<(PathBuf, Result<Room, String>)>,
    /// Each endpoint of the CA, and why it does not answer.
    pub(crate) ca: Result<Vec<(String, Result<(), String>)>, String>,
    /// Ports of Ray that the kernel may give away.
    pub(crate) reserved: Result<Option<String>, String>,
}

/// What the agent says of itself.
#[derive(Clone, Debug)]
pub(crate) enum Agent {
    Answers(Box<Status>),
    /// It does not answer, and wrote this.
    Wrote(Box<Status>, String),
    Silent(String),
}

impl Agent {
    pub(crate) fn status(&self) -> Option<&Status> {
        match self {
            Self::Answers(status) | Self::Wrote(status, _) => Some(status),
            Self::Silent(_) => None,
        }
    }
}

/// The key beside the leaf.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Key {
    IsTheLeafs,
    IsAnother,
    Unread(String),
}

/// One running process of Ray.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    pub(crate) uid: u32,
    /// Its groups; empty where they cannot be seen.
    pub(crate) gids: Vec<u32>,
    pub(crate) kind: Kind,
    /// The address it was told to advertise.
    pub(crate) advertises: Option<IpAddr>,
    pub(crate) variables: Result<Variables, Unseen>,
}

/// Why the variables of a process are not known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Unseen {
    /// It wrote its title over them, as Ray's Python processes do; they are those of its raylet.
    Overwritten,
    /// They cannot be read.
    Closed(String),
}

/// The variables that decide TLS and token. The token itself is never kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Variables {
    pub(crate) use_tls: Option<String>,
    pub(crate) cert: Option<PathBuf>,
    pub(crate) auth_mode: Option<String>,
    pub(crate) token_path: Option<PathBuf>,
    /// The token stands in the environment itself.
    pub(crate) has_token: bool,
}

/// What is left on the disk of a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Room {
    pub(crate) bytes: u64,
    pub(crate) files: u64,
    /// The file system counts its files at all.
    pub(crate) counts_files: bool,
    pub(crate) read_only: bool,
}
