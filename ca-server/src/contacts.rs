//! What the running server knows of its nodes and does not store: when each was last heard of, what
//! it reported and has applied, and which of its calls waits.

mod acknowledged;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    sync::{Mutex, MutexGuard},
};

use raymtls_proto::{identity::Role, v1};
use time::{Duration, OffsetDateTime};
use tokio::sync::watch;

use crate::store::Caller;
pub use acknowledged::Acknowledged;

/// So many versions are remembered that a node said it had applied, with the moment.
const APPLIED_MAX: usize = 8;
/// A head is not waited for when it was silent for longer: an agent calls each minute.
const HEAD_SILENT_MAX: Duration = Duration::minutes(2);
/// The running horizon of a node counts for its cluster so long after it was heard of: a node that is
/// gone has none.
const HORIZON_SILENT_MAX: Duration = Duration::hours(1);

/// Contacts of all nodes. Bounded by the number of enrolled nodes: only an identified caller makes
/// an entry.
#[derive(Debug, Default)]
pub struct Contacts(Mutex<HashMap<String, ClusterContacts>>);

#[derive(Debug, Default)]
struct ClusterContacts {
    nodes: HashMap<String, Contact>,
    /// Those of them that are heads: a few.
    heads: BTreeSet<String>,
    /// Moves whenever a head says that it applied another version.
    applied_by_heads: watch::Sender<u64>,
    movers: acknowledged::Movers,
}

#[derive(Debug, Default)]
struct Contact {
    last: Option<OffsetDateTime>,
    report: Option<v1::Report>,
    reported: Option<OffsetDateTime>,
    /// What its table had counted when it last went over to another isolation.
    counted_before: Option<u64>,
    /// Newest last.
    applied: VecDeque<Applied>,
    /// Index of its checkpoint of the audit log, and what that says of this CA's.
    log: (u64, v1::LogAlarm),
    // The number of the newest wait; an older one that sees a newer number ends.
    wait: watch::Sender<u64>,
}

/// A version a node said it had applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Applied {
    /// Which.
    pub version: v1::SyncVersion,
    /// When the server heard of it first.
    pub at: OffsetDateTime,
}

/// What is known of one node.
#[derive(Clone, Debug, Default)]
pub struct LastContact {
    /// When it last called.
    pub at: Option<OffsetDateTime>,
    /// What it reported last: claims.
    pub report: Option<v1::Report>,
    /// When that was.
    pub reported: Option<OffsetDateTime>,
    /// Packets its table had refused when it last went over to another isolation, if this server heard of
    /// both: they are in its count to this day.
    pub counted_before: Option<u64>,
    /// Index of its checkpoint of the audit log, and what that says of this CA's.
    pub log: (u64, v1::LogAlarm),
}

/// The first end of a leaf that runs in a cluster, in seconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Horizons {
    /// Of the nodes' processes.
    pub node: Option<i64>,
    /// Of drivers.
    pub driver: Option<i64>,
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
        self.with(caller, |contact| contact.last = Some(now));
    }

    /// Keeps a node's report and what it says it applied.
    pub fn report(&self, caller: &Caller, role: Role, report: v1::Report, now: OffsetDateTime) {
        let mut clusters = self.lock();
        let cluster = clusters.entry(caller.cluster.to_string()).or_default();
        let contact = cluster.nodes.entry(caller.node.to_string()).or_default();
        let is_head = role == Role::Head;
        if is_head {
            cluster.heads.insert(caller.node.to_string());
        }
        let applied = report.applied;
        contact.note_isolation(report.isolation.as_ref());
        contact.report = Some(report);
        contact.reported = Some(now);
        let Some(version) = applied else { return };
        if contact.applied.back().is_some_and(|last| last.version == version) {
            return;
        }
        if contact.applied.len() == APPLIED_MAX {
            contact.applied.pop_front();
        }
        contact.applied.push_back(Applied { version, at: now });
        if is_head {
            cluster.applied_by_heads.send_modify(|moved| *moved += 1);
        }
        cluster.movers.tell(caller.node.as_str());
    }

    /// Notes what a node's checkpoint of the audit log says.
    pub fn note_log(&self, caller: &Caller, index: u64, alarm: v1::LogAlarm) {
        self.with(caller, |contact| contact.log = (index, alarm));
    }

    /// How many nodes hold a checkpoint that the audit log contradicts, or say that they do.
    #[must_use]
    pub fn log_alarms(&self) -> usize {
        let clusters = self.lock();
        let nodes = clusters.values().flat_map(|cluster| cluster.nodes.values());
        nodes.filter(|contact| contact.has_log_alarm()).count()
    }

    /// Moves whenever a head of the cluster says that it applied another version.
    #[must_use]
    pub fn applied_changes_of_heads(&self, cluster: &str) -> watch::Receiver<u64> {
        self.lock().entry(cluster.to_owned()).or_default().applied_by_heads.subscribe()
    }

    /// What all heads of the cluster have applied that were heard of lately; `None` where none has
    /// said so in this epoch.
    #[must_use]
    pub fn heads_applied(
        &self,
        cluster: &str,
        epoch: u64,
        now: OffsetDateTime,
    ) -> Option<v1::SyncVersion> {
        let clusters = self.lock();
        let cluster = clusters.get(cluster)?;
        let heads = cluster.heads.iter().filter_map(|name| cluster.nodes.get(name));
        let heard = |contact: &&Contact| contact.last.is_some_and(|at| now - at <= HEAD_SILENT_MAX);
        heads
            .filter(heard)
            .map(|head| head.applied.back().map(|a| a.version).filter(|v| v.epoch == epoch))
            .map(|version| version.unwrap_or(v1::SyncVersion { epoch, counter: 0 }))
            .min_by_key(|version| version.counter)
    }

    /// Begins a wait; the node's older one ends.
    pub fn begin_wait(&self, caller: &Caller) -> Wait {
        self.with(caller, |contact| {
            contact.wait.send_modify(|number| *number += 1);
            let newest = contact.wait.subscribe();
            let number = *newest.borrow();
            Wait { number, newest }
        })
    }

    /// What is known of a node.
    #[must_use]
    pub fn last(&self, cluster: &str, node: &str) -> LastContact {
        let clusters = self.lock();
        let contact = clusters.get(cluster).and_then(|cluster| cluster.nodes.get(node));
        contact.map_or_else(LastContact::default, |contact| LastContact {
            at: contact.last,
            report: contact.report.clone(),
            reported: contact.reported,
            counted_before: contact.counted_before,
            log: contact.log,
        })
    }

    /// Where each cluster stands, by what nodes say that were heard of lately.
    #[must_use]
    pub fn horizons(&self, now: OffsetDateTime) -> BTreeMap<String, Horizons> {
        let clusters = self.lock();
        let of = |cluster: &ClusterContacts| {
            let heard = cluster
                .nodes
                .values()
                .filter(|contact| contact.last.is_some_and(|at| now - at <= HORIZON_SILENT_MAX));
            let running = heard.filter_map(|contact| contact.report.as_ref()?.running);
            running.fold(Horizons::default(), |all, running| Horizons {
                node: earlier(all.node, running.horizon_unix),
                driver: earlier(all.driver, running.driver_horizon_unix),
            })
        };
        clusters.iter().map(|(name, cluster)| (name.clone(), of(cluster))).collect()
    }

    /// Forgets a node.
    pub fn forget(&self, cluster: &str, node: &str) {
        if let Some(cluster) = self.lock().get_mut(cluster) {
            cluster.nodes.remove(node);
            cluster.heads.remove(node);
        }
    }

    /// A node has left or was revoked: nobody waits for it, and what it said is of no use. When it was
    /// heard last stays known.
    pub fn gone(&self, caller: &Caller) {
        let mut clusters = self.lock();
        let Some(cluster) = clusters.get_mut(caller.cluster.as_str()) else { return };
        cluster.heads.remove(caller.node.as_str());
        if let Some(contact) = cluster.nodes.get_mut(caller.node.as_str()) {
            (contact.report, contact.reported, contact.counted_before) = (None, None, None);
            contact.log = Default::default();
            contact.applied.clear();
        }
    }

    fn with<T>(&self, caller: &Caller, act: impl FnOnce(&mut Contact) -> T) -> T {
        let mut clusters = self.lock();
        let cluster = clusters.entry(caller.cluster.to_string()).or_default();
        act(cluster.nodes.entry(caller.node.to_string()).or_default())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, ClusterContacts>> {
        self.0.lock().expect("no code panics while it holds the contacts")
    }
}

impl Contact {
    fn has_log_alarm(&self) -> bool {
        let says = self.report.as_ref().is_some_and(|r| r.log_alarm != 0);
        says || self.log.1 != v1::LogAlarm::Unspecified
    }

    /// What was counted between the last report of the isolation before and the change goes to the one
    /// after: rather too much than too little.
    fn note_isolation(&mut self, now: Option<&v1::IsolationReport>) {
        let before = self.report.as_ref().and_then(|report| report.isolation.as_ref());
        let (Some(before), Some(now)) = (before, now) else { return };
        if before.in_force != now.in_force {
            self.counted_before = Some(before.refused_packets);
        }
        // The table was made anew.
        if self.counted_before.is_some_and(|counted| counted > now.refused_packets) {
            self.counted_before = Some(0);
        }
    }
}

/// Zero is none.
fn earlier(first: Option<i64>, unix: i64) -> Option<i64> {
    first.into_iter().chain((unix != 0).then_some(unix)).min()
}

/// Whether what was applied holds a version; of another epoch it does not.
#[must_use]
pub fn is_at_least(applied: v1::SyncVersion, version: v1::SyncVersion) -> bool {
    applied.epoch == version.epoch && applied.counter >= version.counter
}

impl Wait {
    /// Returns when a newer wait of the same node has begun.
    pub async fn superseded(&mut self) {
        let number = self.number;
        // A dropped sender means that the node was forgotten: its identity is judged anew anyway.
        let _ = self.newest.wait_for(|newest| *newest != number).await;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration as Span;

    use raymtls_proto::serial::Serial;
    use tokio::time::timeout;

    use super::*;

    fn caller(random: u8) -> Caller {
        named("w1", random)
    }

    fn named(name: &str, random: u8) -> Caller {
        Caller {
            cluster: "c1".parse().unwrap(),
            node: name.parse().unwrap(),
            serial: Serial::new(1, [random; 10]),
            source: None,
        }
    }

    const START: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

    fn version(counter: u64) -> v1::SyncVersion {
        v1::SyncVersion { epoch: 1, counter }
    }

    fn heard(contacts: &Contacts, version: v1::SyncVersion) -> Option<OffsetDateTime> {
        let all = contacts.acknowledged("c1", ["w1"].into_iter(), version);
        all.first().map(|one| one.at)
    }

    fn applied(counter: u64) -> v1::Report {
        v1::Report { applied: Some(version(counter)), ..v1::Report::default() }
    }

    #[tokio::test]
    async fn a_forgotten_machine_s_wait_ends_and_nothing_of_it_is_left() {
        let contacts = Contacts::default();
        let (old, new) = (caller(1), caller(2));
        contacts.note(&old, START);
        contacts.report(&old, Role::Worker, applied(1), START);
        let mut wait = contacts.begin_wait(&old);
        contacts.forget("c1", "w1");
        let ended = timeout(Span::from_secs(5), wait.superseded()).await;
        ended.expect("the old machine still waits");
        let last = contacts.last("c1", "w1");
        assert!(last.at.is_none() && last.report.is_none());
        assert_eq!(heard(&contacts, version(1)), None);

        // The new machine's waits are counted anew and end only for a newer one of its own.
        let mut first = contacts.begin_wait(&new);
        assert!(timeout(Span::from_millis(50), first.superseded()).await.is_err());
        let _second = contacts.begin_wait(&new);
        timeout(Span::from_secs(5), first.superseded()).await.expect("the older one waits on");
    }

    #[test]
    fn a_version_was_applied_when_it_or_a_newer_one_was_first_heard_of() {
        let contacts = Contacts::default();
        let later = |s: i64| START + Duration::seconds(s);
        for (counter, at) in [(3, 1), (3, 2), (5, 3), (9, 4)] {
            contacts.report(&caller(1), Role::Worker, applied(counter), later(at));
        }
        let heard_of = |counter| heard(&contacts, version(counter));
        assert_eq!(heard_of(2), Some(later(1)));
        assert_eq!(heard_of(3), Some(later(1)));
        assert_eq!(heard_of(4), Some(later(3)));
        assert_eq!(heard_of(9), Some(later(4)));
        assert_eq!(heard_of(10), None);
        let other_epoch = v1::SyncVersion { epoch: 2, counter: 1 };
        assert_eq!(heard(&contacts, other_epoch), None);
        for counter in 10..100 {
            contacts.report(&caller(1), Role::Worker, applied(counter), later(5));
        }
        assert_eq!(heard_of(2), Some(later(5)), "what is remembered is bounded");
    }

    #[test]
    fn the_first_leaf_to_end_counts_while_its_node_is_heard_of() {
        let contacts = Contacts::default();
        let say = |name, horizon_unix, driver_horizon_unix| {
            let running =
                v1::Running { horizon_unix, driver_horizon_unix, ..v1::Running::default() };
            let report = v1::Report { running: Some(running), ..v1::Report::default() };
            contacts.note(&named(name, 1), START);
            contacts.report(&named(name, 1), Role::Worker, report, START);
        };
        say("w1", 500, 0);
        say("w2", 400, 900);
        say("w3", 0, 0);
        let at = |now| contacts.horizons(now)["c1"];
        assert_eq!(at(START), Horizons { node: Some(400), driver: Some(900) });
        let later = START + HORIZON_SILENT_MAX + Duration::seconds(1);
        contacts.note(&named("w1", 1), later);
        assert_eq!(at(later), Horizons { node: Some(500), driver: None });
    }

    #[test]
    fn only_heads_heard_of_lately_are_waited_for() {
        let contacts = Contacts::default();
        let heads = |now| contacts.heads_applied("c1", 1, now).map(|version| version.counter);
        let say = |name, role, counter, now| {
            contacts.note(&named(name, 1), now);
            contacts.report(&named(name, 1), role, applied(counter), now);
        };
        say("w1", Role::Worker, 1, START);
        assert_eq!(heads(START), None, "a worker is no head");
        say("h1", Role::Head, 7, START);
        say("h2", Role::Head, 5, START);
        assert_eq!(heads(START), Some(5), "the one that is behind counts");
        let later = START + HEAD_SILENT_MAX + Duration::seconds(1);
        say("h1", Role::Head, 8, later);
        assert_eq!(heads(later), Some(8), "one is silent");
        say("h2", Role::Head, 5, later);
        contacts.gone(&named("h2", 1));
        assert_eq!(heads(later), Some(8), "one was revoked");
        assert_eq!(contacts.heads_applied("c1", 2, later).map(|v| v.counter), Some(0));
    }
}
