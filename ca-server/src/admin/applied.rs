//! Who has applied a change of a cluster: one answer for each node at once, then one as each of them
//! says so. It rests on the nodes' own reports.

use std::{sync::Arc, time::Duration};

use raymtls_proto::{identity::ClusterId, v1};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::Instant,
};
use tonic::Status;

use super::{Operator, clusters, convert};
use crate::{
    ca::Ca,
    refusal::Refusal,
    store::{
        StoreError,
        records::{NodeRecord, NodeStatus},
        unix_ms,
    },
};

/// Longest wait.
pub const WAIT_MAX: Duration = Duration::from_secs(120);
/// Waits of all operators at once.
pub const WATCHES_MAX: usize = 32;
/// Least time between two looks, whatever comes in.
const LOOK_PAUSE: Duration = Duration::from_millis(20);
/// Answers that may wait for a slow reader.
const ANSWERS_QUEUED: usize = 64;
/// A reader that takes none for this long after the wait is over is left alone.
const READER_PATIENCE: Duration = Duration::from_secs(5);

/// What goes out.
pub type Answers = mpsc::Receiver<Result<v1::Applied, Status>>;

/// Watches until every node that is expected to has applied the change, or the wait is over.
///
/// # Errors
/// A refusal, or the store's failure.
pub async fn watch(
    ca: &Arc<Ca>,
    operator: &Operator,
    watches: &Arc<Semaphore>,
    request: v1::WatchAppliedRequest,
) -> Result<Answers, StoreError> {
    operator.require(v1::AdminRole::Viewer, Some(&request.cluster))?;
    let cluster = clusters::id(&request.cluster)?;
    let change = change(ca, &cluster, request.change).await?;
    let turn = Arc::clone(watches).try_acquire_owned().map_err(|_| Refusal::RateLimited {
        what: "as many commands as may wait for the nodes already do",
        retry_after: Duration::from_secs(5),
    })?;
    let peers = peers(ca, &cluster).await?;
    let wait = wait(request.wait_seconds);
    let (sender, answers) = mpsc::channel(ANSWERS_QUEUED);
    let watch = Watch { ca: Arc::clone(ca), cluster, change, peers, sender, _turn: turn };
    tokio::spawn(tokio::time::timeout(wait + READER_PATIENCE, watch.run(wait)));
    Ok(answers)
}

/// A change that was made here.
async fn change(
    ca: &Ca,
    cluster: &ClusterId,
    asked: Option<v1::Change>,
) -> Result<v1::Change, StoreError> {
    let newest = ca.store.cluster(cluster.clone()).await?.version;
    let ours =
        |version: v1::SyncVersion| version.epoch == ca.store.epoch() && version.counter <= newest;
    let change = asked.filter(|change| change.version.is_some_and(ours));
    let text = "the change is none of this CA's: give one as the call that made it answered";
    Ok(change.ok_or_else(|| Refusal::RequestInvalid(text.to_owned()))?)
}

/// Nodes of the cluster that have an agent, by name.
async fn peers(ca: &Ca, cluster: &ClusterId) -> Result<Vec<Peer>, StoreError> {
    let (mut peers, mut page) = (Vec::new(), String::new());
    loop {
        let nodes = ca.store.nodes(cluster.clone(), page).await?;
        let has_agent = |node: &&NodeRecord| node.node_status() == NodeStatus::Live && !node.once;
        peers.extend(nodes.rows.iter().filter(has_agent).map(|node| peer(ca, node)));
        if nodes.next.is_empty() {
            return Ok(peers);
        }
        page = nodes.next;
    }
}

fn peer(ca: &Ca, node: &NodeRecord) -> Peer {
    let last = ca.contacts.last(&node.cluster, &node.name);
    let state = convert::node_state(node, &last, ca.started, ca.clock.now());
    Peer { name: node.name.clone(), expected: state == v1::NodeState::Live }
}

fn wait(seconds: u32) -> Duration {
    Duration::from_secs(seconds.into()).min(WAIT_MAX)
}

/// A node that has not applied the change yet.
#[derive(Debug)]
struct Peer {
    name: String,
    /// It is waited for.
    expected: bool,
}

struct Watch {
    ca: Arc<Ca>,
    cluster: ClusterId,
    change: v1::Change,
    peers: Vec<Peer>,
    sender: mpsc::Sender<Result<v1::Applied, Status>>,
    _turn: OwnedSemaphorePermit,
}

impl Watch {
    async fn run(mut self, wait: Duration) {
        let deadline = Instant::now() + wait;
        // Before the first look: what comes after it wakes the wait.
        let mut changed = self.ca.contacts.applied_changes(self.cluster.as_str());
        let mut over = !self.look(true).await;
        let ca = Arc::clone(&self.ca);
        let mut looked = Instant::now();
        while !over && self.peers.iter().any(|peer| peer.expected) {
            tokio::select! {
                changed = changed.changed() => over = changed.is_err(),
                () = tokio::time::sleep_until(deadline) => over = true,
                () = ca.stopped() => return,
                () = self.sender.closed() => return,
            }
            tokio::time::sleep_until((looked + LOOK_PAUSE).min(deadline)).await;
            changed.mark_unchanged();
            over |= !self.look(false).await;
            looked = Instant::now();
        }
    }

    /// Tells of those that have applied it since the last look, the first time of the others too.
    /// Whether somebody still listens.
    async fn look(&mut self, first: bool) -> bool {
        let mut missing = Vec::new();
        for peer in std::mem::take(&mut self.peers) {
            let applied = self.applied(&peer);
            let is_missing = applied.is_none();
            let answer = applied.or_else(|| first.then(|| not_yet(&peer)));
            if let Some(answer) = answer
                && self.sender.send(Ok(answer)).await.is_err()
            {
                return false;
            }
            if is_missing {
                missing.push(peer);
            }
        }
        self.peers = missing;
        true
    }

    fn applied(&self, peer: &Peer) -> Option<v1::Applied> {
        let (contacts, cluster) = (&self.ca.contacts, self.cluster.as_str());
        let at = contacts.applied(cluster, &peer.name, self.change.version?)?;
        let report = contacts.last(cluster, &peer.name).report;
        Some(v1::Applied {
            node: peer.name.clone(),
            applied: true,
            milliseconds: milliseconds(unix_ms(at) - self.change.asked_unix_ms),
            isolation: report.and_then(|report| report.isolation),
            expected: peer.expected,
        })
    }
}

fn not_yet(peer: &Peer) -> v1::Applied {
    v1::Applied { node: peer.name.clone(), expected: peer.expected, ..v1::Applied::default() }
}

/// A clock that was put right meanwhile makes nothing negative.
fn milliseconds(length: i64) -> u32 {
    u32::try_from(length.max(0)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_cut_to_its_bound_and_no_time_is_negative() {
        for (asked, waits) in [(0, 0), (10, 10), (120, 120), (121, 120), (u32::MAX, 120)] {
            assert_eq!(wait(asked), Duration::from_secs(waits), "{asked}");
        }
        for (length, shown) in [(-5, 0), (7, 7), (i64::MAX, u32::MAX)] {
            assert_eq!(milliseconds(length), shown);
        }
    }
}
