//! What the running server knows of its nodes and does not store: when each was last heard of, what
//! it reported, and which of its calls waits.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard},
};

use raymtls_proto::v1;
use time::OffsetDateTime;
use tokio::sync::watch;

use crate::store::Caller;

type Key = (String, String);

/// Contacts of all nodes. Bounded by the number of enrolled nodes: only an identified caller makes
/// an entry.
#[derive(Debug, Default)]
pub struct Contacts {
    nodes: Mutex<HashMap<Key, Contact>>,
    /// Counts what was applied, by cluster: wakes whoever waits for it.
    applied: Mutex<HashMap<String, watch::Sender<u64>>>,
}

#[derive(Debug, Default)]
struct Contact {
    last: Option<OffsetDateTime>,
    report: Option<v1::Report>,
    // The newest version it applied, and when it said so first.
    applied: Option<(v1::SyncVersion, OffsetDateTime)>,
    // The number of the newest wait; an older one that sees a newer number ends.
    wait: watch::Sender<u64>,
}

/// What is known of one node.
#[derive(Clone, Debug, Default)]
pub struct LastContact {
    /// When it last called.
    pub at: Option<OffsetDateTime>,
    /// What it reported last: claims.
    pub report: Option<v1::Report>,
}

/// A call that waits, until a newer one of the same node begins.
#[derive(Debug)]
pub struct Wait {
    number: u64,
    newest: watch::Receiver<u64>,
}

impl Contacts {
    /// Notes that a node called.
    pub fn note(&self, caller: &Caller, now: OffsetDateTime) {
        self.lock().entry(key(caller)).or_default().last = Some(now);
    }

    /// Keeps a node's report.
    pub fn report(&self, caller: &Caller, report: v1::Report) {
        let news = {
            let mut contacts = self.lock();
            let contact = contacts.entry(key(caller)).or_default();
            let before = contact.applied.map(|(version, _)| version);
            let news = report.applied.filter(|applied| Some(*applied) != before);
            if let Some((applied, at)) = news.zip(contact.last) {
                contact.applied = Some((applied, at));
            }
            contact.report = Some(report);
            news.is_some()
        };
        if news {
            self.changes(caller.cluster.as_str(), |sender| sender.send_modify(|count| *count += 1));
        }
    }

    /// The newest version a node applied, when it said so first, and what its table does.
    #[must_use]
    pub fn applied(
        &self,
        cluster: &str,
        node: &str,
    ) -> Option<(v1::SyncVersion, OffsetDateTime, v1::IsolationReport)> {
        let contacts = self.lock();
        let contact = contacts.get(&(cluster.to_owned(), node.to_owned()))?;
        let (version, at) = contact.applied?;
        let isolation = contact.report.as_ref().and_then(|report| report.isolation.clone());
        Some((version, at, isolation.unwrap_or_default()))
    }

    /// Wakes when a node of the cluster has applied another version.
    pub fn applied_changed(&self, cluster: &str) -> watch::Receiver<u64> {
        self.changes(cluster, |sender| sender.subscribe())
    }

    fn changes<T>(&self, cluster: &str, act: impl FnOnce(&watch::Sender<u64>) -> T) -> T {
        let mut changes = self.applied.lock().expect("no code panics while it holds the changes");
        act(changes.entry(cluster.to_owned()).or_default())
    }

    /// Begins a wait; the node's older one ends.
    pub fn begin_wait(&self, caller: &Caller) -> Wait {
        let mut contacts = self.lock();
        let sender = &contacts.entry(key(caller)).or_default().wait;
        sender.send_modify(|number| *number += 1);
        let newest = sender.subscribe();
        let number = *newest.borrow();
        Wait { number, newest }
    }

    /// What is known of a node.
    #[must_use]
    pub fn last(&self, cluster: &str, node: &str) -> LastContact {
        let contacts = self.lock();
        let contact = contacts.get(&(cluster.to_owned(), node.to_owned()));
        contact.map_or_else(LastContact::default, |contact| LastContact {
            at: contact.last,
            report: contact.report.clone(),
        })
    }

    /// Forgets a node.
    pub fn forget(&self, cluster: &str, node: &str) {
        self.lock().remove(&(cluster.to_owned(), node.to_owned()));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Contact>> {
        self.nodes.lock().expect("no code panics while it holds the contacts")
    }
}

impl Wait {
    /// Returns when a newer wait of the same node has begun.
    pub async fn superseded(&mut self) {
        let number = self.number;
        // A dropped sender means that the node was forgotten: its identity is judged anew anyway.
        let _ = self.newest.wait_for(|newest| *newest != number).await;
    }
}

fn key(caller: &Caller) -> Key {
    (caller.cluster.to_string(), caller.node.to_string())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use raymtls_proto::serial::Serial;
    use tokio::time::timeout;

    use super::*;

    fn caller(random: u8) -> Caller {
        Caller {
            cluster: "c1".parse().unwrap(),
            node: "w1".parse().unwrap(),
            serial: Serial::new(1, [random; 10]),
            source: None,
        }
    }

    #[tokio::test]
    async fn a_forgotten_machine_s_wait_ends_and_nothing_of_it_is_left() {
        let contacts = Contacts::default();
        let (old, new) = (caller(1), caller(2));
        contacts.note(&old, OffsetDateTime::UNIX_EPOCH);
        contacts.report(&old, v1::Report::default());
        let mut wait = contacts.begin_wait(&old);
        contacts.forget("c1", "w1");
        let ended = timeout(Duration::from_secs(5), wait.superseded()).await;
        ended.expect("the old machine still waits");
        let last = contacts.last("c1", "w1");
        assert!(last.at.is_none() && last.report.is_none());

        // The new machine's waits are counted anew and end only for a newer one of its own.
        let mut first = contacts.begin_wait(&new);
        assert!(timeout(Duration::from_millis(50), first.superseded()).await.is_err());
        let _second = contacts.begin_wait(&new);
        timeout(Duration::from_secs(5), first.superseded()).await.expect("the older one waits on");
    }
}
