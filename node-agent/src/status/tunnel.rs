//! What the agent says of mode tunnel.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::moment::Moment;

/// Peers that are shown; the rest is counted.
pub(crate) const PEERS_MAX: usize = 200;

/// The data path, as the agent knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelStatus {
    /// Rules are in force, a process takes flows, and capture was proved: Ray may be started.
    pub ready: bool,
    /// Why not.
    pub problem: Option<String>,
    /// The process that takes new flows.
    pub pid: Option<u32>,
    /// It was there before this agent, which took it over.
    pub adopted: bool,
    /// Starts after one that ended by itself.
    pub restarts: u32,
    /// Old processes whose flows go on.
    pub draining: usize,
    /// Rules in force there.
    pub generation: u64,
    /// Flows now, of all its processes.
    pub flows: u64,
    /// Flows since the process began: of this host, and of others.
    pub flows_out: u64,
    /// Of others.
    pub flows_in: u64,
    /// Flows that were cut since this agent began.
    pub flows_cut: u64,
    /// Bytes to other nodes.
    pub bytes_out: u64,
    /// Bytes from other nodes.
    pub bytes_in: u64,
    /// Handshakes that were finished.
    pub handshakes: u64,
    /// Flows that were refused, by reason.
    pub refusals: BTreeMap<String, u64>,
    /// Peers with flows, and the end of the newest leaf seen of each; the first to end come first.
    pub peers: Vec<TunnelPeer>,
    /// Peers that are not shown.
    pub peers_left_out: usize,
    /// Age of the oldest flow.
    pub oldest_flow_seconds: Option<u64>,
    /// When capture was seen to work last.
    pub proved_at: Option<Moment>,
    /// Since when the CA counts as away at the tunnel.
    #[serde(default)]
    pub ca_away_since: Option<Moment>,
    /// When the first leaf of this node or of a peer with flows ends, grace included, if nothing is renewed:
    /// flows are cut then.
    pub first_cut: Option<Moment>,
    /// Connections that users of this host who may not use Ray opened to its ports, and were refused.
    pub strangers: u64,
    /// Connections past the tunnel, which were refused.
    pub uncaptured: u64,
    /// Who may use Ray on this host.
    pub users: String,
}

/// A node that flows go to or come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelPeer {
    /// Its name.
    pub name: String,
    /// Where.
    pub address: String,
    /// The end of its newest leaf that was seen.
    pub not_after: Moment,
    /// Flows with it.
    pub flows: u64,
}

impl TunnelStatus {
    /// Without what changes with each flow.
    #[must_use]
    pub(crate) fn lasting(&self) -> Self {
        Self {
            ready: self.ready,
            problem: self.problem.clone(),
            pid: self.pid,
            restarts: self.restarts,
            draining: self.draining,
            users: self.users.clone(),
            ..Self::default()
        }
    }

    /// For a person.
    #[must_use]
    pub(crate) fn lines(&self, now: OffsetDateTime) -> Vec<String> {
        let pid = self.pid.map_or_else(|| "no process".to_owned(), |pid| format!("process {pid}"));
        let word = if self.ready { "ready" } else { "NOT READY" };
        let mut lines = vec![format!(
            "{word}, {pid}, {} flows ({} to, {} from others since its start), {} restarts",
            self.flows, self.flows_out, self.flows_in, self.restarts
        )];
        lines.extend(self.problem.as_ref().map(|problem| format!("PROBLEM: {problem}")));
        let proof = self.proved_at.map_or_else(|| "never".to_owned(), |at| at.relative(now));
        lines.push(format!(
            "capture proved {proof}; refused here: {} of other users, {} past the tunnel",
            self.strangers, self.uncaptured
        ));
        if !self.refusals.is_empty() {
            let all: Vec<String> =
                self.refusals.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
            lines.push(format!("flows refused: {}", all.join(", ")));
        }
        if let Some(first) = self.peers.first() {
            lines.push(format!(
                "{} peers; the first leaf to end is {}'s: {}",
                self.peers.len() + self.peers_left_out,
                first.name,
                first.not_after.relative(now)
            ));
        }
        if let Some(at) = self.first_cut.filter(|_| self.ca_away_since.is_some()) {
            lines.push(format!(
                "the CA is away: the first flow is cut at {at} ({})",
                at.relative(now)
            ));
        }
        if self.draining > 0 {
            lines.push(format!("{} old processes drain", self.draining));
        }
        lines.push(format!("used by {}", self.users));
        lines
    }
}
