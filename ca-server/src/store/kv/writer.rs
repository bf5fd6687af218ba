//! The one thread that owns the engine: it takes what is queued as a group, decides one after the
//! other, commits once, and only then answers anyone, those who only read included. It knows nothing
//! of what is decided.
//!
//! A commit that fails, or a decision that panics, is the end of it: whether the disk has the writes
//! is unknown, so nobody is answered and the process must start again from what the disk has.

use std::{
    collections::HashMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use prost::Message as _;
use tokio::sync::{mpsc, watch};

use crate::store::{
    BackupPairs, StoreError, Watched, layout,
    records::{AuditHead, ClusterRecord},
    view::{Engine, View, Writes},
};

/// A decision that waits for its turn.
pub(super) struct Job {
    /// The moment to decide at; `None` for one that asks no time.
    pub(super) now_ms: Option<i64>,
    /// Decides. Whoever waits for the answer learns that there is none when this is dropped.
    pub(super) decide: Box<dyn FnOnce(&mut View<'_>) -> Decided + Send>,
}

/// A decision made and not yet told.
pub(super) struct Decided {
    /// Its writes are to be kept: the answer is not a refusal.
    pub(super) keep: bool,
    /// Tells the answer, or the error that came up after it.
    pub(super) answer: Answer,
}

/// Tells an answer.
pub(super) type Answer = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

/// What the queue holds.
pub(super) enum Message {
    /// Decide.
    Decide(Job),
    /// Take nothing more, commit what is queued, let the engine go.
    Close,
}

/// What the thread and the store it works for share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    versions: Mutex<HashMap<String, watch::Sender<Watched>>>,
    pub(super) counters: Counters,
    /// Index of the newest durable audit record.
    pub(super) audit: watch::Sender<u64>,
    /// Where a backup in the making gets what is written meanwhile.
    tap: Mutex<Option<mpsc::Sender<BackupPairs>>>,
}

impl Shared {
    /// Begins a backup; `None` where one is in the making.
    pub(super) fn begin_backup(&self, queued_max: usize) -> Option<mpsc::Receiver<BackupPairs>> {
        let mut tap = self.tap();
        if tap.as_ref().is_some_and(|tap| !tap.is_closed()) {
            return None;
        }
        let (sender, pairs) = mpsc::channel(queued_max);
        *tap = Some(sender);
        Some(pairs)
    }

    /// Gives pairs to the backup in the making. One that does not take them in time is at an end: the
    /// writer waits for nobody.
    pub(super) fn to_backup(&self, pairs: impl FnOnce() -> BackupPairs) -> bool {
        let mut tap = self.tap();
        let Some(sender) = tap.as_ref() else { return false };
        let given = sender.try_send(pairs()).is_ok();
        if !given {
            *tap = None;
        }
        given
    }

    /// Ends the backup in the making. Whether it got everything.
    pub(super) fn end_backup(&self) -> bool {
        self.tap().take().is_some_and(|tap| !tap.is_closed())
    }

    fn tap(&self) -> MutexGuard<'_, Option<mpsc::Sender<BackupPairs>>> {
        self.tap.lock().expect("no code panics while it holds the tap")
    }

    /// The channel of a cluster's version; made on demand.
    pub(super) fn watch(&self, cluster: &str) -> watch::Receiver<Watched> {
        self.channel(cluster, |channel| channel.subscribe())
    }

    /// Wakes whoever waits for a cluster, if its version moved.
    pub(super) fn publish(&self, cluster: ClusterRecord) {
        let name = cluster.cluster.clone();
        self.channel(&name, |channel| {
            channel.send_if_modified(|seen| {
                let moved = seen.as_ref().is_none_or(|seen| seen.version != cluster.version);
                *seen = Some(Arc::new(cluster));
                moved
            });
        });
    }

    fn channel<T>(&self, cluster: &str, act: impl FnOnce(&watch::Sender<Watched>) -> T) -> T {
        let mut versions = self.versions();
        if let Some(channel) = versions.get(cluster) {
            return act(channel);
        }
        act(versions.entry(cluster.to_owned()).or_default())
    }

    fn versions(&self) -> MutexGuard<'_, HashMap<String, watch::Sender<Watched>>> {
        self.versions.lock().expect("no code panics while it holds the versions")
    }
}

/// Running totals.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) jobs: AtomicU64,
    pub(super) groups: AtomicU64,
    pub(super) commits: AtomicU64,
    pub(super) commit_micros: AtomicU64,
}

/// The thread's state.
pub(super) struct Writer<'a> {
    pub(super) engine: Box<dyn Engine>,
    pub(super) audit_head: AuditHead,
    pub(super) started_ms: i64,
    /// Newest moment any job was decided at: the time of those that ask none.
    pub(super) newest_ms: i64,
    pub(super) shared: &'a Shared,
}

impl Writer<'_> {
    /// Works until the queue is closed and empty.
    ///
    /// # Errors
    /// Why it cannot go on.
    pub(super) fn run(&mut self, queue: &mut mpsc::Receiver<Message>) -> Result<(), String> {
        let mut gathers = false;
        while let Some(first) = queue.blocking_recv() {
            if gathers {
                // The last group held several and wrote: others are about to ask too, and one flush does
                // for more of them. Who asks alone waits once, after such a group.
                thread::sleep(GATHER);
            }
            let mut group = Vec::new();
            let mut next = Some(first);
            while let Some(message) = next {
                match message {
                    Message::Decide(job) => group.push(job),
                    // What is queued already still comes; then the queue reports its end.
                    Message::Close => queue.close(),
                }
                next = if group.len() < GROUP_MAX { queue.try_recv().ok() } else { None };
            }
            let several = group.len() > 1;
            gathers = self.commit_group(group)? && several;
        }
        Ok(())
    }

    /// Whether anything was written.
    fn commit_group(&mut self, group: Vec<Job>) -> Result<bool, String> {
        let count = u64::try_from(group.len()).unwrap_or(u64::MAX);
        let (writes, answers) = self.decide(group)?;
        let wrote = !writes.is_empty();
        if wrote {
            let began = Instant::now();
            self.engine.commit(&writes).map_err(|e| format!("a commit failed: {e}"))?;
            let micros = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
            self.shared.counters.commits.fetch_add(1, Ordering::Relaxed);
            self.shared.counters.commit_micros.fetch_add(micros, Ordering::Relaxed);
            self.publish(&writes)?;
            self.shared.to_backup(|| {
                writes.iter().map(|(key, value)| (key.clone(), value.clone())).collect()
            });
            let newest = self.audit_head.index;
            self.shared.audit.send_if_modified(|seen| std::mem::replace(seen, newest) != newest);
        }
        self.shared.counters.groups.fetch_add(1, Ordering::Relaxed);
        self.shared.counters.jobs.fetch_add(count, Ordering::Relaxed);
        for (answer, stored) in answers {
            answer(stored);
        }
        Ok(wrote)
    }

    fn decide(&mut self, group: Vec<Job>) -> Result<(Writes, Vec<Told>), String> {
        let mut writes = Writes::new();
        let mut answers = Vec::with_capacity(group.len());
        for job in group {
            self.newest_ms = self.newest_ms.max(job.now_ms.unwrap_or(i64::MIN));
            let mut view = View::new(
                self.engine.as_ref(),
                &writes,
                self.audit_head.clone(),
                job.now_ms.unwrap_or(self.newest_ms),
                self.started_ms,
            );
            let decided = catch_unwind(AssertUnwindSafe(|| (job.decide)(&mut view)))
                .map_err(|_| "a decision panicked; the log has its words".to_owned())?;
            let (own, audit_head) = view.into_writes();
            let bounded = if decided.keep { check_bounds(&own) } else { Ok(()) };
            if decided.keep && bounded.is_ok() {
                writes.extend(own);
                self.audit_head = audit_head;
            }
            answers.push((decided.answer, bounded));
        }
        Ok((writes, answers))
    }

    fn publish(&self, writes: &Writes) -> Result<(), String> {
        let from = layout::CLUSTERS.to_vec();
        for (key, value) in writes.range(from..) {
            if !key.starts_with(layout::CLUSTERS) {
                break;
            }
            if let Some(value) = value {
                let cluster = ClusterRecord::decode(value.as_slice())
                    .map_err(|e| format!("a cluster was written that does not decode: {e}"))?;
                self.shared.publish(cluster);
            }
        }
        Ok(())
    }
}

/// An answer to tell after the commit, with the error that takes its place, if one.
type Told = (Answer, Result<(), StoreError>);

/// An engine that fails is final, so what no engine could store must not get that far.
fn check_bounds(writes: &Writes) -> Result<(), StoreError> {
    for (key, value) in writes {
        let (key_len, value_len) = (key.len(), value.as_ref().map_or(0, Vec::len));
        if key_len > KEY_LEN_MAX || value_len > VALUE_LEN_MAX {
            return Err(StoreError::Unavailable(format!(
                "the record at {:?} has a key of {key_len} and a value of {value_len} bytes: \
                 at most {KEY_LEN_MAX} and {VALUE_LEN_MAX} can be stored",
                String::from_utf8_lossy(key)
            )));
        }
    }
    Ok(())
}

/// How long a group is gathered where the one before it was of several.
const GATHER: Duration = Duration::from_millis(1);
/// Decisions of one commit.
const GROUP_MAX: usize = 1_024;
const KEY_LEN_MAX: usize = 400;
/// Six CRLs of 100 000 entries, 49 bytes each.
const VALUE_LEN_MAX: usize = 32 * 1024 * 1024;
