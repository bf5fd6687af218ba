//! What travels over the agent's socket: one JSON object a line, one line each way.

use serde::{Deserialize, Serialize};

use crate::{rayenv::RayEnv, status::Status};

/// Version of this exchange.
pub const VERSION: u32 = 1;
/// Longest line either way, in bytes.
pub const LINE_LEN_MAX: usize = 64 * 1024;
/// Longest answer, in bytes: a status names the sockets of Ray.
pub const ANSWER_LEN_MAX: usize = 4 * 1024 * 1024;

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Version of the exchange the caller speaks.
    pub version: u32,
    /// What is asked.
    #[serde(flatten)]
    pub ask: Ask,
}

/// What can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
pub enum Ask {
    /// The agent's status. Anyone.
    Status,
    /// A key folder for a process to be started. Root, the agent's user, Ray's user.
    ExecFolder,
    /// Renew now. Root and the agent's user.
    Renew,
    /// Leave the cluster. Root and the agent's user.
    Leave,
    /// Mode tunnel: a new process of ray-tunnel takes new flows, the old one keeps its own. Root and the
    /// agent's user.
    TunnelHandover {
        /// How long the old one may take.
        deadline_seconds: u64,
    },
    /// Mode tunnel: end ray-tunnel. Root and the agent's user.
    TunnelStop {
        /// How long its flows may go on.
        deadline_seconds: u64,
    },
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// The status.
    Status(Box<Status>),
    /// A key folder.
    ExecFolder(ExecFolder),
    /// What was renewed.
    Renewed(Renewed),
    /// The node left.
    Left {
        /// What remains and what to do.
        message: String,
    },
    /// What was done about the tunnel.
    Tunnel {
        /// For a person.
        message: String,
    },
    /// It did not work.
    Error(AnswerError),
}

/// A key folder for a process to be started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecFolder {
    /// Its environment.
    pub env: RayEnv,
    /// Why it is no new one, where it is not.
    pub note: Option<String>,
}

/// What `renew` did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewed {
    /// The identity, where it was renewed too.
    pub identity: Option<SerialChange>,
    /// Every key folder that was renewed.
    pub key_folders: Vec<SerialChange>,
    /// Key folders that were not, and why.
    pub failed: Vec<String>,
}

/// A certificate that took another's place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialChange {
    /// `identity` or the key folder.
    pub name: String,
    /// Serial before.
    pub old: String,
    /// Serial now.
    pub new: String,
}

/// Why it did not work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnswerError {
    /// Which exit code fits.
    pub kind: ErrorKind,
    /// For a person.
    pub message: String,
}

/// Kinds of error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// Tried, did not work.
    Failed,
    /// The CA said no.
    Refused,
    /// The caller may not ask this.
    Denied,
    /// Not understood.
    Invalid,
}

impl Answer {
    /// An error.
    pub(crate) fn error(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self::Error(AnswerError { kind, message: message.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_one_flat_object() {
        let request = Request { version: VERSION, ask: Ask::ExecFolder };
        let text = serde_json::to_string(&request).unwrap();
        assert_eq!(text, r#"{"version":1,"ask":"exec-folder"}"#);
        assert_eq!(serde_json::from_str::<Request>(&text).unwrap(), request);
    }
}
