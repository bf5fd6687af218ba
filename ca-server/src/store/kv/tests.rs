//! The writer: what is told and when, and how it fails.

use std::{sync::mpsc as std_mpsc, time::Duration};

use super::*;
use crate::{
    refusal::Refusal,
    store::{
        memory::MemoryEngine,
        records::{IdentityRecord, NodeStatus},
    },
};

type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

/// Memory whose commits wait for a word from the test, and do as it says.
struct Gated {
    inner: MemoryEngine,
    gate: std_mpsc::Receiver<Result<(), StoreError>>,
}

impl Reader for Gated {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.inner.get(key)
    }

    fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Pairs, StoreError> {
        self.inner.scan(prefix, after, limit)
    }
}

impl Engine for Gated {
    fn reader(&self) -> Box<dyn Reader + Send + Sync> {
        self.inner.reader()
    }

    fn commit(&mut self, writes: &Writes) -> Result<(), StoreError> {
        self.gate.recv().unwrap_or(Ok(()))?;
        self.inner.commit(writes)
    }
}

fn now() -> OffsetDateTime {
    OffsetDateTime::UNIX_EPOCH
}

/// A store whose commits wait, and the gate that lets them go on. Every commit goes on by itself
/// once the gate is dropped.
fn gated() -> (KvStore, std_mpsc::Sender<Result<(), StoreError>>, MemoryEngine) {
    let inner = MemoryEngine::new();
    let (open, gate) = std_mpsc::channel();
    open.send(Ok(())).unwrap();
    let engine = Gated { inner: inner.clone(), gate };
    (KvStore::create(Box::new(engine), now(), 7).unwrap(), open, inner)
}

fn plain() -> (KvStore, MemoryEngine) {
    let inner = MemoryEngine::new();
    (KvStore::create(Box::new(inner.clone()), now(), 7).unwrap(), inner)
}

async fn put(store: &KvStore, key: &'static str) -> Result<(), StoreError> {
    let decision = move |view: &mut View<'_>| {
        view.put_raw(key.into(), b"v".to_vec());
        Ok(())
    };
    store.decide(None, decision).await
}

async fn get(store: &KvStore, key: &'static str) -> Result<bool, StoreError> {
    store.decide(None, move |view| Ok(view.get_raw(key.as_bytes())?.is_some())).await
}

async fn is_pending<T>(future: &mut (impl Future<Output = T> + Unpin)) -> bool {
    tokio::time::timeout(Duration::from_millis(30), future).await.is_err()
}

#[tokio::test]
async fn nobody_is_told_before_the_commit_not_even_a_reader() {
    let (store, open, inner) = gated();
    let mut first = Box::pin(put(&store, "first"));
    assert!(is_pending(&mut first).await);
    // The second group: a write, a reader that sees it, and a refusal because of it.
    let mut second = Box::pin(async { tokio::join!(put(&store, "second"), get(&store, "second")) });
    assert!(is_pending(&mut second).await);
    open.send(Ok(())).unwrap();
    first.await.unwrap();
    assert!(is_pending(&mut second).await, "the reader would tell what is not durable");
    assert_eq!(inner.get(b"second").unwrap(), None);
    open.send(Ok(())).unwrap();
    let (written, seen) = second.await;
    written.unwrap();
    assert!(seen.unwrap());
    assert_eq!(
        store.counts(),
        StoreCounts {
            commit_micros: store.counts().commit_micros,
            jobs: 3,
            groups: 2,
            commits: 2,
            queued: 0
        }
    );
}

/// An engine whose next durable state can be seen before it is durable, as sled's can.
struct Ahead {
    durable: MemoryEngine,
    seen: MemoryEngine,
}

impl Reader for Ahead {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.durable.get(key)
    }

    fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Pairs, StoreError> {
        self.durable.scan(prefix, after, limit)
    }
}

impl Engine for Ahead {
    fn reader(&self) -> Box<dyn Reader + Send + Sync> {
        self.seen.reader()
    }

    fn commit(&mut self, writes: &Writes) -> Result<(), StoreError> {
        self.seen.commit(writes)?;
        self.durable.commit(writes)
    }
}

#[tokio::test]
async fn a_glance_is_good_for_a_yes_alone_and_the_commit_says_it_again() {
    let (durable, seen) = (MemoryEngine::new(), MemoryEngine::new());
    let engine = Ahead { durable: durable.clone(), seen: seen.clone() };
    let store = KvStore::create(Box::new(engine), now(), 7).unwrap();
    let cluster = ClusterRecord {
        cluster: "c1".to_owned(),
        settings: Some(v1::Settings { leaf_life_seconds: 600, ..v1::Settings::default() }),
        ..ClusterRecord::default()
    };
    let identity = IdentityRecord { serial: vec![1; 16], ..IdentityRecord::default() };
    let node = NodeRecord {
        cluster: "c1".to_owned(),
        name: "n1".to_owned(),
        role: v1::Role::Worker.into(),
        status: NodeStatus::Live.into(),
        identity: Some(IdentityRecord { not_after_ms: i64::MAX, ..identity }),
        ..NodeRecord::default()
    };
    let is = |node: &NodeRecord| {
        let (cluster, node) = (cluster.encode_to_vec(), node.encode_to_vec());
        Writes::from([
            (layout::cluster("c1"), Some(cluster)),
            (layout::node("c1", "n1"), Some(node)),
        ])
    };
    let revoked = NodeRecord { status: NodeStatus::Revoked.into(), ..node.clone() };
    let caller = Caller {
        cluster: "c1".parse().unwrap(),
        node: "n1".parse().unwrap(),
        serial: Serial::from_slice(&[1; 16]).unwrap(),
        source: None,
    };
    let plan = || store.plan_renew(now(), caller.clone(), [9; 32]);
    let put = |engine: &MemoryEngine, node| engine.clone().commit(&is(node)).unwrap();

    // A no that is not durable is not told: the writer judges, on what is.
    put(&durable, &node);
    put(&seen, &revoked);
    let jobs = store.counts().jobs;
    assert!(matches!(plan().await.unwrap(), RenewPlan::Issue));
    assert_eq!(store.counts().jobs, jobs + 1);

    // A yes needs no writer, and is worth nothing where the commit says no.
    put(&durable, &revoked);
    put(&seen, &node);
    let jobs = store.counts().jobs;
    assert!(matches!(plan().await.unwrap(), RenewPlan::Issue));
    assert_eq!(store.counts().jobs, jobs);
    let signed = Signed {
        serial: Serial::new(1, [3; 10]),
        certificate_der: vec![],
        issued_ms: 0,
        not_after_ms: 1,
        issuer_key_id: vec![],
        key_hash: [9; 32],
    };
    let refused = store.renew(now(), caller.clone(), signed).await.unwrap_err();
    assert!(matches!(refused, StoreError::Refused(Refusal::Revoked { .. })), "{refused}");
    store.close().await;
    assert!(plan().await.is_err(), "a closed store plans nothing");
}

#[tokio::test]
async fn a_refused_decision_leaves_nothing() {
    let (store, inner) = plain();
    let refused = store
        .decide::<()>(Some(now()), |view| {
            view.put_raw(b"half".to_vec(), b"v".to_vec());
            view.audit(AuditRecord::default());
            Err(Refusal::TokenUnknown.into())
        })
        .await;
    assert!(matches!(refused, Err(StoreError::Refused(Refusal::TokenUnknown))));
    put(&store, "whole").await.unwrap();
    assert_eq!(inner.get(b"half").unwrap(), None);
    assert_eq!(inner.get(layout::AUDIT_HEAD).unwrap(), None);
    assert_eq!(store.verify_audit_chain().await.unwrap(), 0);
}

#[tokio::test]
async fn what_cannot_be_stored_fails_alone() {
    let (store, inner) = plain();
    for (key, len) in [(vec![b'k'; 401], 1), (b"k".to_vec(), 32 * 1024 * 1024 + 1)] {
        let large = store
            .decide(None, move |view| {
                view.put_raw(key, vec![0; len]);
                Ok(())
            })
            .await;
        assert!(large.unwrap_err().to_string().contains("can be stored"));
    }
    put(&store, "small").await.unwrap();
    assert_eq!(inner.get(b"k").unwrap(), None);
}

#[tokio::test]
async fn a_failed_commit_is_final_and_fails_all_who_wait() {
    let (store, open, inner) = gated();
    let mut failed = Box::pin(store.failed());
    let mut all = Box::pin(async {
        tokio::join!(put(&store, "a"), put(&store, "b"), get(&store, "b"), get(&store, "c"))
    });
    assert!(is_pending(&mut all).await);
    assert!(is_pending(&mut failed).await);
    assert!(store.is_serving());
    open.send(Err(StoreError::Unavailable("no space left".to_owned()))).unwrap();
    let (a, b, c, d) = all.await;
    for answer in [a, b, c.map(drop), d.map(drop)] {
        assert!(matches!(answer, Err(StoreError::Unavailable(_))), "{answer:?}");
    }
    assert!(failed.await.contains("no space left"));
    assert!(!store.is_serving());
    let after = put(&store, "after").await.unwrap_err().to_string();
    assert!(after.contains("no space left"), "{after}");
    assert_eq!(inner.get(b"a").unwrap(), None);
    store.close().await;
}

#[tokio::test]
async fn a_panic_in_a_decision_is_final_and_hangs_nobody() {
    let (store, _) = plain();
    let panicked = store.decide::<()>(None, |_| panic!("on purpose")).await;
    assert!(matches!(panicked, Err(StoreError::Unavailable(_))));
    assert!(store.failed().await.contains("panicked"));
    assert!(matches!(put(&store, "after").await, Err(StoreError::Unavailable(_))));
}

#[tokio::test]
async fn a_full_queue_turns_away_at_once() {
    let (store, open, _) = gated();
    let store = Arc::new(store);
    let putting = || {
        let store = Arc::clone(&store);
        tokio::spawn(async move { put(&store, "k").await })
    };
    let mut first = putting();
    while is_pending(&mut first).await && store.counts().queued > 0 {}
    let waiting: Vec<_> = (0..QUEUE_MAX).map(|_| putting()).collect();
    while store.counts().queued < QUEUE_MAX as u64 {
        tokio::task::yield_now().await;
    }
    let one_more = tokio::time::timeout(Duration::from_secs(5), put(&store, "k")).await.unwrap();
    assert!(one_more.unwrap_err().to_string().contains("8192 decisions wait for the disk"));
    drop(open);
    for task in waiting {
        task.await.unwrap().unwrap();
    }
    put(&store, "k").await.unwrap();
}

#[tokio::test]
async fn closing_commits_what_is_queued() {
    let (store, open, inner) = gated();
    let mut queued = Box::pin(async { tokio::join!(put(&store, "a"), put(&store, "b")) });
    assert!(is_pending(&mut queued).await);
    let mut closed = Box::pin(store.close());
    assert!(is_pending(&mut closed).await);
    drop(open);
    closed.await;
    let (a, b) = queued.await;
    a.and(b).unwrap();
    assert!(inner.get(b"b").unwrap().is_some());
    assert!(!store.is_serving());
    assert!(matches!(put(&store, "after").await, Err(StoreError::Unavailable(_))));
    let mut failed = Box::pin(store.failed());
    assert!(is_pending(&mut failed).await, "closing is no failure");
}

#[test]
fn a_store_that_is_not_ours_to_read_is_refused_in_words() {
    let put = |pairs: &[(&[u8], Vec<u8>)]| {
        let mut engine = MemoryEngine::new();
        let writes = pairs.iter().map(|(key, value)| (key.to_vec(), Some(value.clone()))).collect();
        engine.commit(&writes).unwrap();
        engine
    };
    let header = |format| Header { format, epoch: 1 }.encode_to_vec();
    let first = AuditRecord { index: 1, previous_hash: vec![0; 32], ..AuditRecord::default() };
    let first = first.encode_to_vec();
    let head = |hash: &[u8]| AuditHead { index: 1, hash: hash.to_vec() }.encode_to_vec();
    let good = head(&audit_hash(&first));
    let table = [
        ("none", put(&[]), "make one with `ca-server init`"),
        (
            "newer",
            put(&[(layout::HEADER, header(FORMAT + 1))]),
            "the store has format 2, this program reads format 1: upgrade",
        ),
        ("garbled", put(&[(layout::HEADER, vec![0xff])]), "is damaged"),
        (
            "cut log",
            put(&[(layout::HEADER, header(FORMAT)), (layout::AUDIT_HEAD, good.clone())]),
            "audit record 1\" is damaged: it is missing",
        ),
        (
            "other end",
            put(&[
                (layout::HEADER, header(FORMAT)),
                (layout::AUDIT_HEAD, head(&[9; 32])),
                (&layout::audit(1), first.clone()),
            ]),
            "not the one that was written last",
        ),
        (
            "beyond",
            put(&[(layout::HEADER, header(FORMAT)), (&layout::audit(1), first.clone())]),
            "beyond the end",
        ),
    ];
    for (name, engine, words) in table {
        let refused = KvStore::open(Box::new(engine), now()).unwrap_err().to_string();
        assert!(refused.contains(words), "{name}: {refused}");
    }
    let whole = put(&[
        (layout::HEADER, header(FORMAT)),
        (layout::AUDIT_HEAD, good),
        (&layout::audit(1), first),
    ]);
    assert_eq!(KvStore::open(Box::new(whole.clone()), now()).unwrap().epoch(), 1);
    let again = KvStore::create(Box::new(whole), now(), 2).unwrap_err().to_string();
    assert!(again.contains("here already"), "{again}");
}

#[tokio::test]
async fn an_audit_record_changed_behind_our_back_is_found() {
    let (store, mut inner) = plain();
    for n in 0..1_100 {
        let event = move |view: &mut View<'_>| {
            view.audit(AuditRecord { detail: format!("{n}"), ..AuditRecord::default() });
            Ok(())
        };
        store.decide(None, event).await.unwrap();
    }
    assert_eq!(store.verify_audit_chain().await.unwrap(), 1_100);
    for index in [1, 512, 513, 1_099, 1_100] {
        let key = layout::audit(index);
        let written = inner.get(&key).unwrap().unwrap();
        let mut forged = AuditRecord::decode(written.as_slice()).unwrap();
        forged.actor = "nobody".to_owned();
        for change in [Some(forged.encode_to_vec()), None] {
            inner.commit(&Writes::from([(key.clone(), change)])).unwrap();
            let found = store.verify_audit_chain().await;
            assert!(matches!(found, Err(StoreError::Damaged { .. })), "{index}: {found:?}");
        }
        inner.commit(&Writes::from([(key, Some(written))])).unwrap();
    }
    assert_eq!(store.verify_audit_chain().await.unwrap(), 1_100);
}

#[tokio::test]
async fn watchers_see_a_version_when_it_is_durable_and_from_the_start() {
    let (store, open, inner) = gated();
    let cluster: ClusterId = "c1".parse().unwrap();
    let record = ClusterRecord {
        cluster: cluster.to_string(),
        settings: Some(v1::Settings::default()),
        version: 3,
        ..ClusterRecord::default()
    };
    let mut watching = store.watch(&cluster);
    assert_eq!(version_of(&watching.borrow_and_update()), 0);
    let mut written = Box::pin(store.decide(None, move |view| {
        view.put(layout::cluster("c1"), &record);
        Ok(())
    }));
    assert!(is_pending(&mut written).await);
    assert!(!watching.has_changed().unwrap(), "not durable yet");
    drop(open);
    written.await.unwrap();
    assert_eq!(version_of(&watching.borrow_and_update()), 3, "published before the answer");
    let opened = KvStore::open(Box::new(inner), now()).unwrap();
    assert_eq!(version_of(&opened.watch(&cluster).borrow()), 3);
}

fn version_of(watched: &Watched) -> u64 {
    watched.as_ref().map_or(0, |cluster| cluster.version)
}

/// Whatever is written between two chunks, before them or behind them.
#[tokio::test]
async fn a_backup_is_the_store_as_it_stands_at_its_end() {
    let (store, inner) = plain();
    let key = |n: u32| format!("k/{n:05}").into_bytes();
    let write = async |n: u32, value: Option<&'static [u8]>| {
        let key = key(n);
        let decision = move |view: &mut View<'_>| {
            match value {
                Some(value) => view.put_raw(key, value.to_vec()),
                None => view.delete(key),
            }
            Ok(())
        };
        store.decide(None, decision).await.unwrap();
    };
    for n in 0..2_000 {
        write(n, Some(b"first")).await;
    }
    let mut pairs = store.begin_backup(now(), "uid:0".to_owned()).await.unwrap();
    assert!(store.begin_backup(now(), "uid:0".to_owned()).await.is_err(), "two at once");
    let mut replayed = std::collections::BTreeMap::new();
    let mut take = |pairs: Vec<(Vec<u8>, Option<Vec<u8>>)>| {
        for (key, value) in pairs {
            match value {
                Some(value) => drop(replayed.insert(key, value)),
                None => drop(replayed.remove(&key)),
            }
        }
    };
    let (mut after, mut round) = (None, 0);
    loop {
        after = store.backup_chunk(after).await.unwrap();
        for n in [round * 7, round * 131 % 2_000, 1_999 - round * 3, 3_000 + round] {
            write(n, (n % 3 != 0).then_some(b"second".as_slice())).await;
        }
        round += 1;
        while let Ok(more) = pairs.try_recv() {
            take(more);
        }
        if after.is_none() {
            break;
        }
    }
    assert!(round > 3, "{round} chunks");
    write(5, Some(b"last")).await;
    assert!(store.end_backup());
    while let Some(more) = pairs.recv().await {
        take(more);
    }
    write(6, Some(b"too late")).await;
    let mut now_there: std::collections::BTreeMap<_, _> =
        inner.scan(b"", None, 10_000).unwrap().into_iter().collect();
    let late = now_there.insert(key(6), replayed.get(&key(6)).cloned().unwrap_or_default());
    assert_eq!(late.as_deref(), Some(b"too late".as_slice()));
    if !replayed.contains_key(&key(6)) {
        now_there.remove(&key(6));
    }
    assert_eq!(replayed, now_there);
}

#[tokio::test]
async fn a_backup_that_is_not_taken_ends_and_holds_up_no_writer() {
    let (store, _) = plain();
    let pairs = store.begin_backup(now(), "uid:0".to_owned()).await.unwrap();
    for _ in 0..BACKUP_QUEUED_MAX + 1 {
        put(&store, "k/x").await.unwrap();
    }
    assert!(store.backup_chunk(None).await.is_err(), "it goes on with a hole");
    assert!(!store.end_backup());
    drop(pairs);
    store.begin_backup(now(), "uid:0".to_owned()).await.unwrap();
}
