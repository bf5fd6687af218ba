//! What travels over the control socket of `ray-tunnel`: one JSON object a line, one line each way.
//! The agent asks; root and the tunnel's own user may too.

use std::{collections::BTreeMap, net::IpAddr};

use serde::{Deserialize, Serialize};

use super::reason::Reason;

/// Version of this exchange.
pub const VERSION: u32 = 1;
/// Longest request, in bytes.
pub const LINE_LEN_MAX: usize = 4 * 1024;
/// Longest answer, in bytes: a status names each peer.
pub const ANSWER_LEN_MAX: usize = 4 * 1024 * 1024;
/// Most peers a status names.
pub const PEERS_MAX: usize = 10_000;
/// Longest time a drain may take, in seconds: 30 days.
pub const DRAIN_SECONDS_MAX: u64 = 30 * 24 * 3_600;
/// Port of the capture proof: a connection to it at a captured address is answered by the
/// `ray-tunnel` of the same host, and never leaves it.
pub const PROOF_PORT: u16 = 15_009;
/// Bytes of a nonce of the capture proof.
pub const NONCE_LEN: usize = 16;

/// Name of the listeners that nftables redirects to.
pub const CAPTURED: &str = "captured";
/// Name of the listeners that other nodes dial.
pub const INBOUND: &str = "inbound";
/// Name of the control socket.
pub const CONTROL: &str = "control";

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Version of the exchange the caller speaks.
    pub version: u32,
    /// What is asked.
    #[serde(flatten)]
    pub ask: Ask,
}

impl Request {
    /// In the version of this release.
    #[must_use]
    pub fn new(ask: Ask) -> Self {
        Self { version: VERSION, ask }
    }
}

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
pub enum Ask {
    /// How it stands.
    Status,
    /// Read rules and key folder anew, and cut what they forbid.
    Reload,
    /// Accept nothing more, and exit when the last flow ended or the deadline is over.
    Drain {
        /// Seconds from now.
        deadline_seconds: u64,
    },
    /// Hand the listening sockets over: the answer's line comes with their descriptors, in the
    /// order in which it names them.
    Listeners,
    /// Answer the next connections to [`PROOF_PORT`] with these bytes.
    Prove {
        /// [`NONCE_LEN`] bytes, hex.
        nonce: String,
    },
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// How it stands.
    Status(Box<Status>),
    /// The new rules and key folder are in force.
    Reloaded(Reloaded),
    /// It drains.
    Draining {
        /// Flows that go on for now.
        flows: u64,
    },
    /// The listening sockets, with their descriptors.
    Listeners {
        /// `captured`, `inbound`, `control`: one for each descriptor, in their order.
        names: Vec<String>,
    },
    /// The nonce is kept.
    Proving,
    /// It did not work; what was in force stays so.
    Error {
        /// For a person.
        message: String,
    },
}

/// What a reload did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reloaded {
    /// The rules in force.
    pub generation: u64,
    /// Serial of the own leaf in force, hex.
    pub serial: String,
    /// Flows that were cut with a reset: their peer is blocked, revoked or no member any more.
    pub flows_cut: u64,
}

/// How `ray-tunnel` stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Of the program.
    pub version: String,
    /// Of the process.
    pub pid: u32,
    /// The rules in force.
    pub generation: u64,
    /// The key folder in force.
    pub key_folder: String,
    /// Serial of the own leaf, hex.
    pub serial: String,
    /// When the own leaf ends.
    pub not_after_unix: i64,
    /// Why the newest rules or key folder are not in force.
    pub stale: Option<String>,
    /// Whether new flows are taken; not while it drains.
    pub accepting: bool,
    /// Since when the CA counts as away here.
    pub ca_away_since_unix: Option<i64>,
    /// When the first flow is cut if the CA stays away.
    pub first_cut_unix: Option<i64>,
    /// Flows now.
    pub flows_now: u64,
    /// Flows of this host to others since the start.
    pub flows_out: u64,
    /// Flows of others to this host since the start.
    pub flows_in: u64,
    /// Flows that were cut since the start: blocked, revoked, expired, no member any more.
    pub flows_cut: u64,
    /// Bytes carried to other nodes since the start.
    pub bytes_out: u64,
    /// Bytes carried from other nodes since the start.
    pub bytes_in: u64,
    /// Handshakes under way.
    pub handshakes_now: u64,
    /// Handshakes that were finished since the start.
    pub handshakes_done: u64,
    /// Refusals since the start, by word.
    pub refusals: BTreeMap<Reason, u64>,
    /// Age of the oldest flow.
    pub oldest_flow_seconds: Option<u64>,
    /// Capture proofs that were answered since the start.
    pub proofs: u64,
    /// Peers with flows, at most [`PEERS_MAX`].
    pub peers: Vec<Peer>,
}

/// A node there are flows with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// The address the flows go to or come from.
    pub address: IpAddr,
    /// The member's name.
    pub name: String,
    /// End of its newest leaf that was seen.
    pub not_after_unix: i64,
    /// Flows with it now.
    pub flows: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_one_flat_object() {
        for (ask, text) in [
            (Ask::Status, r#"{"version":1,"ask":"status"}"#),
            (
                Ask::Drain { deadline_seconds: 5 },
                r#"{"version":1,"ask":"drain","deadline_seconds":5}"#,
            ),
            (Ask::Prove { nonce: "00".into() }, r#"{"version":1,"ask":"prove","nonce":"00"}"#),
        ] {
            let request = Request::new(ask);
            assert_eq!(serde_json::to_string(&request).unwrap(), text);
            assert_eq!(serde_json::from_str::<Request>(text).unwrap(), request);
        }
    }

    #[test]
    fn a_status_counts_refusals_by_word() {
        let status = Status { refusals: [(Reason::PortClosed, 3)].into(), ..Status::default() };
        let text = serde_json::to_string(&Answer::Status(Box::new(status))).unwrap();
        assert!(text.contains(r#""refusals":{"port_closed":3}"#), "{text}");
        assert!(matches!(serde_json::from_str(&text), Ok(Answer::Status(_))));
    }
}
