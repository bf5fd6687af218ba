//! Who has applied a version, for whoever watches many nodes at once: the names of those that moved, and
//! one look at several of them.

use std::sync::Arc;

use raymtls_proto::v1;
use time::OffsetDateTime;
use tokio::sync::broadcast;

use super::{Contacts, is_at_least};

/// Names that wait for a slow watcher; one that falls behind further must look at all.
const NAMES_MAX: usize = 1_024;

/// Names of nodes, as each says that it applied another version.
#[derive(Debug)]
pub(super) struct Movers(broadcast::Sender<Arc<str>>);

impl Movers {
    /// Tells whoever watches.
    pub(super) fn tell(&self, node: &str) {
        if self.0.receiver_count() > 0 {
            // The last one may have gone meanwhile.
            let _ = self.0.send(node.into());
        }
    }
}

impl Default for Movers {
    fn default() -> Self {
        Self(broadcast::channel(NAMES_MAX).0)
    }
}

/// A node that has applied a version.
#[derive(Clone, Debug, PartialEq)]
pub struct Acknowledged {
    /// Its name.
    pub node: String,
    /// When the server first heard that it had applied this version or a newer one.
    pub at: OffsetDateTime,
    /// What its table does: claims.
    pub isolation: Option<v1::IsolationReport>,
}

impl Contacts {
    /// The names of the cluster's nodes from now on, as each says that it applied another version.
    #[must_use]
    pub fn movers(&self, cluster: &str) -> broadcast::Receiver<Arc<str>> {
        self.lock().entry(cluster.to_owned()).or_default().movers.0.subscribe()
    }

    /// Those of the nodes that have applied this version or a newer one.
    #[must_use]
    pub fn acknowledged<'a>(
        &self,
        cluster: &str,
        nodes: impl Iterator<Item = &'a str>,
        version: v1::SyncVersion,
    ) -> Vec<Acknowledged> {
        let clusters = self.lock();
        let Some(cluster) = clusters.get(cluster) else { return Vec::new() };
        let acknowledged = |node: &str| {
            let contact = cluster.nodes.get(node)?;
            let mut all = contact.applied.iter();
            let at = all.find(|applied| is_at_least(applied.version, version))?.at;
            let isolation = contact.report.as_ref().and_then(|report| report.isolation.clone());
            Some(Acknowledged { node: node.to_owned(), at, isolation })
        };
        nodes.filter_map(acknowledged).collect()
    }
}

#[cfg(test)]
mod tests {
    use raymtls_proto::{identity::Role, serial::Serial};
    use tokio::sync::broadcast::error::TryRecvError;

    use super::*;
    use crate::store::Caller;

    const START: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

    fn say(contacts: &Contacts, node: &str, counter: u64) {
        let caller = Caller {
            cluster: "c1".parse().unwrap(),
            node: node.parse().unwrap(),
            serial: Serial::new(1, [1; 10]),
            source: None,
        };
        let applied = Some(v1::SyncVersion { epoch: 1, counter });
        let report = v1::Report { applied, ..v1::Report::default() };
        contacts.report(&caller, Role::Worker, report, START);
    }

    #[test]
    fn a_watcher_hears_the_names_of_those_that_moved_and_whether_it_missed_some() {
        let contacts = Contacts::default();
        say(&contacts, "w1", 1);
        let mut movers = contacts.movers("c1");
        say(&contacts, "w2", 1);
        say(&contacts, "w2", 1);
        say(&contacts, "w1", 2);
        let heard: Vec<_> = std::iter::from_fn(|| movers.try_recv().ok()).collect();
        let heard: Vec<&str> = heard.iter().map(AsRef::as_ref).collect();
        assert_eq!(heard, ["w2", "w1"], "what is said again is no move");
        for counter in 0..=u64::try_from(NAMES_MAX).unwrap() {
            say(&contacts, "w3", 10 + counter);
        }
        assert!(matches!(movers.try_recv(), Err(TryRecvError::Lagged(_))));

        let version = |counter| v1::SyncVersion { epoch: 1, counter };
        let nodes = ["w1", "w2", "w9"];
        let named = |counter| -> Vec<_> {
            let all = contacts.acknowledged("c1", nodes.into_iter(), version(counter));
            all.into_iter().map(|one| one.node).collect()
        };
        assert_eq!(named(1), ["w1", "w2"]);
        assert_eq!(named(2), ["w1"]);
        assert!(contacts.acknowledged("c2", nodes.into_iter(), version(1)).is_empty());
    }
}
