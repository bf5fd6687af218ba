//! Who has applied a change of a cluster: one answer for each node at once, then one as each of them
//! says so. It rests on the nodes' own reports.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use raymtls_proto::{identity::ClusterId, v1};
use tokio::{
    sync::{
        broadcast::{self, error::RecvError},
        mpsc,
    },
    time::Instant,
};
use tonic::Status;

use super::{
    Operator, clusters, convert,
    watches::{Turn, Watches},
};
use crate::{
    ca::Ca,
    contacts::Acknowledged,
    refusal::Refusal,
    store::{
        StoreError,
        records::{NodeRecord, NodeStatus},
        unix_ms,
    },
};

/// Longest wait.
pub const WAIT_MAX: Duration = Duration::from_secs(120);
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
    watches: &Arc<Watches>,
    request: v1::WatchAppliedRequest,
) -> Result<Answers, StoreError> {
    operator.require(v1::AdminRole::Viewer, Some(&request.cluster))?;
    let cluster = clusters::id(&request.cluster)?;
    let change = change(ca, &cluster, request.change).await?;
    let turn = watches.begin(operator)?;
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

/// Nodes of the cluster that have an agent, by name, and whether each is expected to apply the change.
async fn peers(ca: &Ca, cluster: &ClusterId) -> Result<BTreeMap<String, bool>, StoreError> {
    let (mut peers, mut page) = (BTreeMap::new(), String::new());
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

fn peer(ca: &Ca, node: &NodeRecord) -> (String, bool) {
    let last = ca.contacts.last(&node.cluster, &node.name);
    let state = convert::node_state(node, &last, ca.started, ca.clock.now());
    (node.name.clone(), state == v1::NodeState::Live)
}

fn wait(seconds: u32) -> Duration {
    Duration::from_secs(seconds.into()).min(WAIT_MAX)
}

struct Watch {
    ca: Arc<Ca>,
    cluster: ClusterId,
    change: v1::Change,
    /// Those that have not applied the change yet, and whether each is waited for.
    peers: BTreeMap<String, bool>,
    sender: mpsc::Sender<Result<v1::Applied, Status>>,
    _turn: Turn,
}

/// Nodes to look at.
#[derive(Debug)]
enum Moved {
    /// Those that said something since the last look.
    Some(BTreeSet<Arc<str>>),
    /// More than could be kept in mind.
    Many,
}

impl Watch {
    async fn run(mut self, wait: Duration) {
        let deadline = Instant::now() + wait;
        // Before the first look: what comes after it wakes the wait.
        let mut movers = self.ca.contacts.movers(self.cluster.as_str());
        if !self.first_look().await {
            return;
        }
        let ca = Arc::clone(&self.ca);
        let (mut over, mut looked) = (false, Instant::now());
        while !over && self.peers.values().any(|expected| *expected) {
            let mut moved = Moved::Some(BTreeSet::new());
            tokio::select! {
                name = movers.recv() => over = !moved.note(name),
                () = tokio::time::sleep_until(deadline) => over = true,
                () = ca.stopped() => return,
                () = self.sender.closed() => return,
            }
            tokio::time::sleep_until((looked + LOOK_PAUSE).min(deadline)).await;
            moved.note_waiting(&mut movers);
            over |= !self.look(&moved).await;
            looked = Instant::now();
        }
    }

    /// Tells of everybody. Whether somebody still listens.
    async fn first_look(&mut self) -> bool {
        if !self.look(&Moved::Many).await {
            return false;
        }
        for (node, expected) in &self.peers {
            let not_yet =
                v1::Applied { node: node.clone(), expected: *expected, ..v1::Applied::default() };
            if self.sender.send(Ok(not_yet)).await.is_err() {
                return false;
            }
        }
        true
    }

    /// Tells of those that have applied it since the last look. Whether somebody still listens.
    async fn look(&mut self, moved: &Moved) -> bool {
        for acknowledged in self.acknowledged(moved) {
            let Some(expected) = self.peers.remove(&acknowledged.node) else { continue };
            let answer = self.applied(acknowledged, expected);
            if self.sender.send(Ok(answer)).await.is_err() {
                return false;
            }
        }
        true
    }

    fn acknowledged(&self, moved: &Moved) -> Vec<Acknowledged> {
        let Some(version) = self.change.version else { return Vec::new() };
        let (contacts, cluster) = (&self.ca.contacts, self.cluster.as_str());
        match moved {
            Moved::Some(names) => {
                let names = names.iter().map(AsRef::as_ref);
                let pending = names.filter(|name| self.peers.contains_key(*name));
                contacts.acknowledged(cluster, pending, version)
            }
            Moved::Many => {
                contacts.acknowledged(cluster, self.peers.keys().map(String::as_str), version)
            }
        }
    }

    fn applied(&self, acknowledged: Acknowledged, expected: bool) -> v1::Applied {
        v1::Applied {
            node: acknowledged.node,
            applied: true,
            milliseconds: milliseconds(
                unix_ms(acknowledged.at).saturating_sub(self.change.asked_unix_ms),
            ),
            isolation: acknowledged.isolation,
            expected,
        }
    }
}

impl Moved {
    /// Whether more may come.
    fn note(&mut self, name: Result<Arc<str>, RecvError>) -> bool {
        match (name, &mut *self) {
            (Ok(name), Self::Some(names)) => {
                names.insert(name);
            }
            (Ok(_), Self::Many) => {}
            (Err(RecvError::Lagged(_)), _) => *self = Self::Many,
            (Err(RecvError::Closed), _) => return false,
        }
        true
    }

    /// Those that wait already; a burst of them is looked at as all.
    fn note_waiting(&mut self, movers: &mut broadcast::Receiver<Arc<str>>) {
        for _ in 0..movers.len() {
            match movers.try_recv() {
                Ok(name) => drop(self.note(Ok(name))),
                Err(broadcast::error::TryRecvError::Lagged(_)) => *self = Self::Many,
                Err(_) => return,
            }
        }
    }
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
