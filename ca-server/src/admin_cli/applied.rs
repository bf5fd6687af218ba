//! What the nodes of a cluster did with a change: a line as each of them says so, and at the end who
//! is missing and where a revoked leaf still works.

use std::time::Duration;

use clap::Args;
use raymtls_proto::v1::{self, admin_service_client::AdminServiceClient};
use serde::Serialize;
use time::OffsetDateTime;
use tokio::time::timeout;
use tonic::transport::Channel;

use super::{
    failure::Failure,
    moment::Moment,
    output::{Screen, printable},
};

/// Longest wait the CA allows, in seconds.
const WAIT_MAX: i64 = 120;
/// How much longer than the wait the CA's last word may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Names in one line, at most.
const NAMES_MAX: usize = 10;

/// The option of every command that waits for the nodes.
#[derive(Clone, Copy, Debug, Args)]
pub(super) struct Wait {
    /// How long to wait until every node has applied it; 0: do not wait.
    #[arg(long = "wait", value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=WAIT_MAX))]
    seconds: u32,
}

/// What the nodes did with the change.
#[derive(Debug, Serialize)]
pub(super) struct Acknowledgements {
    /// How long was waited at most; zero: not at all.
    wait_seconds: u32,
    peers: Vec<Peer>,
    slowest_milliseconds: Option<u32>,
    /// Expected, and did not say so in time.
    missing: Vec<String>,
    /// Where a leaf that the network does not keep out still works, with the reason.
    not_cut: Vec<NotCut>,
    /// Why nothing more was heard than this.
    watch_problem: Option<String>,
}

#[derive(Debug, Serialize)]
struct Peer {
    node: String,
    applied: bool,
    /// False: silent for so long that nobody waited for it.
    expected: bool,
    milliseconds: Option<u32>,
    /// What the node says it has in force.
    in_force: &'static str,
    problem: String,
    /// The last time it had any to close.
    sockets_closed: u32,
    /// The same of flows that the node's tunnel carried.
    flows_cut: u32,
    /// Blocks it leaves out by what it knows of itself, such as its own gateway.
    spared_blocks: u32,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct NotCut {
    why: &'static str,
    nodes: Vec<String>,
}

/// Waits for the nodes; a line for each that has applied the change. What cannot be watched is part of
/// the answer: the change stands all the same, and whoever asked for it must see what became of it.
///
/// # Errors
/// What was heard cannot be shown.
pub(super) async fn watch(
    admin: &mut AdminServiceClient<Channel>,
    cluster: &str,
    change: Option<v1::Change>,
    wait: Wait,
    screen: &mut Screen,
) -> Result<Acknowledgements, Failure> {
    let (mut peers, mut problem) = (Vec::new(), None);
    if wait.seconds > 0 && change.is_some() {
        let request = v1::WatchAppliedRequest {
            cluster: cluster.to_owned(),
            change,
            wait_seconds: wait.seconds,
        };
        let all = collect(admin, request, &mut peers, screen);
        let longest = Duration::from_secs(wait.seconds.into()) + PATIENCE;
        problem = match timeout(longest, all).await {
            Ok(Ok(())) => None,
            Ok(Err(failure @ Failure::Output(_))) => return Err(failure),
            Ok(Err(failure)) => Some(failure.to_string()),
            Err(_) => Some(format!("the CA did not end within {} s", longest.as_secs())),
        };
    }
    Ok(Acknowledgements::new(wait.seconds, peers, problem))
}

async fn collect(
    admin: &mut AdminServiceClient<Channel>,
    request: v1::WatchAppliedRequest,
    peers: &mut Vec<Peer>,
    screen: &mut Screen,
) -> Result<(), Failure> {
    let mut answers = admin.watch_applied(request).await?.into_inner();
    while let Some(applied) = answers.message().await? {
        let peer = Peer::new(applied);
        if peer.applied {
            screen.part(&peer.line())?;
        }
        match peers.iter_mut().find(|known| known.node == peer.node) {
            Some(known) => *known = peer,
            None => peers.push(peer),
        }
    }
    Ok(())
}

impl Peer {
    fn new(applied: v1::Applied) -> Self {
        let isolation = applied.isolation.unwrap_or_default();
        Self {
            node: applied.node,
            applied: applied.applied,
            expected: applied.expected,
            milliseconds: applied.applied.then_some(applied.milliseconds),
            in_force: in_force(isolation.in_force),
            problem: isolation.problem,
            sockets_closed: isolation.sockets_closed,
            flows_cut: isolation.flows_cut,
            spared_blocks: isolation.spared_blocks,
        }
    }

    fn line(&self) -> String {
        let mut line = format!(
            "  {}: {} ms, isolation {}, {} sockets closed at its last cut",
            printable(&self.node),
            self.milliseconds.unwrap_or_default(),
            self.in_force,
            self.sockets_closed
        );
        if self.flows_cut > 0 {
            line.push_str(&format!(", {} flows of its tunnel cut", self.flows_cut));
        }
        if self.spared_blocks > 0 {
            line.push_str(&format!(", {} blocks left out by its own list", self.spared_blocks));
        }
        if !self.problem.is_empty() {
            line.push_str(&format!("; it says: {}", printable(&self.problem)));
        }
        line + "\n"
    }
}

impl Acknowledgements {
    fn new(wait_seconds: u32, peers: Vec<Peer>, watch_problem: Option<String>) -> Self {
        let named = |is: &dyn Fn(&&Peer) -> bool| {
            peers.iter().filter(is).map(|peer| peer.node.clone()).collect::<Vec<_>>()
        };
        let missing = named(&|peer| !peer.applied && peer.expected);
        let without = |word: &str| named(&|peer| peer.applied && peer.in_force == word);
        let not_cut = [
            ("isolation off", without("off")),
            ("isolation audit", without("audit")),
            ("isolation unknown", without("unknown")),
            (
                "left out by its own list",
                named(&|peer| peer.applied && peer.in_force == "enforce" && peer.spared_blocks > 0),
            ),
            ("no acknowledgement", missing.clone()),
            ("silent for long", named(&|peer| !peer.applied && !peer.expected)),
        ];
        let not_cut = not_cut
            .into_iter()
            .filter(|(_, nodes)| !nodes.is_empty())
            .map(|(why, nodes)| NotCut { why, nodes });
        Self {
            wait_seconds,
            slowest_milliseconds: peers.iter().filter_map(|peer| peer.milliseconds).max(),
            missing,
            not_cut: not_cut.collect(),
            watch_problem,
            peers,
        }
    }

    /// The end of the answer. `leaf_until`: until when Ray accepts the leaf that was revoked.
    pub(super) fn closing(&self, leaf_until: Moment, now: OffsetDateTime) -> String {
        if self.wait_seconds == 0 {
            return "  its peers were not waited for: `ca-admin node list` shows who has applied it\n"
                .to_owned();
        }
        let mut text = match &self.watch_problem {
            Some(problem) => format!(
                "  its peers could not be watched to the end: {}; `ca-admin node list` shows who has \
                 applied it\n",
                printable(problem)
            ),
            None => String::new(),
        };
        if self.peers.is_empty() && self.watch_problem.is_some() {
            return text;
        }
        let expected = self.peers.iter().filter(|peer| peer.expected || peer.applied).count();
        let applied: Vec<_> = self.peers.iter().filter(|peer| peer.applied).collect();
        text.push_str(&format!("  applied by {} of {expected} peers", applied.len()));
        if let Some(slowest) = applied.iter().max_by_key(|peer| peer.milliseconds) {
            let ms = slowest.milliseconds.unwrap_or_default();
            text.push_str(&format!(", the slowest ({}) after {ms} ms", printable(&slowest.node)));
        }
        text.push('\n');
        if !self.missing.is_empty() {
            let waited = self.wait_seconds;
            text.push_str(&format!(
                "  missing after {waited} s: {}\n",
                printable(&names(&self.missing))
            ));
        }
        if leaf_until.is_after(now) && !self.not_cut.is_empty() {
            let open: usize = self.not_cut.iter().map(|part| part.nodes.len()).sum();
            let parts =
                self.not_cut.iter().map(|part| format!("{} ({})", part.why, names(&part.nodes)));
            text.push_str(&format!(
                "  leaf works until {} at {open} of {} peers: {}\n",
                leaf_until.human(now),
                self.peers.len(),
                printable(&parts.collect::<Vec<_>>().join(", "))
            ));
        }
        text
    }

    /// What is wrong with how it went; the revocation itself stands.
    pub(super) fn verdict(&self) -> Result<(), Failure> {
        if let Some(problem) = &self.watch_problem {
            return Err(Failure::Failed(format!(
                "the revocation stands, but its peers could not be watched: {problem}"
            )));
        }
        if self.missing.is_empty() {
            return Ok(());
        }
        Err(Failure::Failed(format!(
            "the revocation stands, but {} of its peers did not acknowledge it within {} s: {}; see \
             `ca-admin node list` and the agents' logs",
            self.missing.len(),
            self.wait_seconds,
            names(&self.missing)
        )))
    }
}

fn names(all: &[String]) -> String {
    let mut text = all.iter().take(NAMES_MAX).cloned().collect::<Vec<_>>().join(", ");
    if all.len() > NAMES_MAX {
        text.push_str(&format!(" and {} more", all.len() - NAMES_MAX));
    }
    text
}

/// What a node says it has in force.
pub(super) fn in_force(isolation: i32) -> &'static str {
    match v1::Isolation::try_from(isolation) {
        Ok(v1::Isolation::Off) => "off",
        Ok(v1::Isolation::Audit) => "audit",
        Ok(v1::Isolation::Enforce) => "enforce",
        Ok(v1::Isolation::Unspecified) | Err(_) => "unknown",
    }
}
