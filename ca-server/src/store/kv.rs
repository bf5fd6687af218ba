//! The store over any [`Engine`]: the verbs, each sent as one decision to the thread that owns the
//! engine. What a verb decides is in [`decide`].

mod writer;

use std::{
    fmt,
    sync::{Arc, atomic::Ordering},
    thread,
    time::Duration,
};

use arc_swap::ArcSwapOption;
use async_trait::async_trait;
use prost::Message as _;
use raymtls_proto::{
    identity::{ClusterId, NodeName},
    serial::Serial,
    token::TokenId,
    v1,
};
use time::OffsetDateTime;
use tokio::sync::{mpsc, oneshot, watch};

use super::{
    Accepted, AuditAsk, AuditPage, AuditState, Authority, BackupPairs, Binding, Caller, EnrollAsk,
    EnrollPlan, Enrolled, FORMAT, Heard, LeafAsk, LeafPlan, LeafRevoked, MemberPage, NodeRevoked,
    Page, PrunePlan, RenewPlan, Revocations, Revoking, Signed, Standing, Store, StoreCounts,
    StoreError, Watched, decide, layout,
    records::{
        AuditHead, AuditRecord, BlockRecord, CaKey, CertificateRecord, Checkpoint, ClusterRecord,
        ControlRecord, CrlSet, Header, NodeRecord, RestoreRecord, RestoresRecord, TokenRecord,
    },
    unix_ms,
    view::{Engine, Reader, View, Writes, audit_hash, empty_audit_head},
};
use writer::{Decided, Job, Message, Shared, Writer};

/// A store. Dropping it without [`Store::close`] commits what is queued too, but does not wait.
pub struct KvStore {
    epoch: u64,
    queue: mpsc::Sender<Message>,
    shared: Arc<Shared>,
    /// Why the writer failed; the channel closes when the writer has let the engine go.
    failure: watch::Receiver<Option<String>>,
    /// Reads beside the writer; gone once the store is closed.
    reader: ArcSwapOption<Box<dyn Reader + Send + Sync>>,
    started_ms: i64,
}

impl KvStore {
    /// Makes a store in an engine that holds none, and opens it.
    ///
    /// # Errors
    /// There is a store, or the engine cannot commit.
    pub fn create(
        mut engine: Box<dyn Engine>,
        now: OffsetDateTime,
        epoch: u64,
    ) -> Result<Self, StoreError> {
        if engine.get(layout::HEADER)?.is_some() {
            return Err(StoreError::Open("there is a store here already".to_owned()));
        }
        let header = Header { format: FORMAT, epoch };
        let writes = Writes::from([(layout::HEADER.to_vec(), Some(header.encode_to_vec()))]);
        engine.commit(&writes)?;
        Self::open(engine, now)
    }

    /// Opens the store in an engine. `now` is when this server begins to serve.
    ///
    /// # Errors
    /// There is none, it is of another format, or it is damaged.
    pub fn open(engine: Box<dyn Engine>, now: OffsetDateTime) -> Result<Self, StoreError> {
        let started_ms = unix_ms(now);
        let nothing = Writes::new();
        let view = View::new(engine.as_ref(), &nothing, empty_audit_head(), started_ms, started_ms);
        let header = read_header(&view)?;
        let audit_head = read_audit_head(&view)?;
        let shared = Arc::new(Shared::default());
        shared.audit.send_replace(audit_head.index);
        for cluster in decide::cluster::list(&view)? {
            shared.publish(cluster);
        }
        let reader = ArcSwapOption::from_pointee(engine.reader());
        let (queue, failure) = start(engine, audit_head, started_ms, Arc::clone(&shared))?;
        Ok(Self { epoch: header.epoch, queue, shared, failure, reader, started_ms })
    }

    /// Ends when the store has failed, with why; never while it serves or after it was closed. The
    /// process must end then: whether what was not answered is on the disk, only a new start can
    /// tell.
    pub fn failed(&self) -> impl Future<Output = String> + Send + use<> {
        let mut failure = self.failure.clone();
        async move {
            let failed = failure.wait_for(Option::is_some).await.ok().and_then(|why| why.clone());
            match failed {
                Some(why) => why,
                None => std::future::pending().await,
            }
        }
    }

    /// Recomputes the audit log's hashes from the first record to its end and returns how many
    /// records there are.
    ///
    /// # Errors
    /// A record is missing, or is not the one that was written.
    pub async fn verify_audit_chain(&self) -> Result<u64, StoreError> {
        let mut seen = self.decide(None, |view| decide::audit::beginning(view)).await?;
        loop {
            let from = seen.clone();
            let (head, ended) = self.decide(None, move |view| check_audit(view, from)).await?;
            if ended {
                return Ok(head.index);
            }
            seen = head;
        }
    }

    /// Marks a store that was just restored: nothing but Sync is answered until an operator accepts it,
    /// and no token of the backup is good any more.
    ///
    /// # Errors
    /// The store's.
    pub async fn mark_restored(
        &self,
        now: OffsetDateTime,
        actor: String,
        restore: RestoreRecord,
    ) -> Result<(), StoreError> {
        self.decide(Some(now), move |view| decide::restore::mark(view, &actor, restore)).await?;
        let mut after = None;
        loop {
            let next = move |view: &mut View<'_>| decide::restore::void_tokens(view, after);
            after = self.decide(Some(now), next).await?;
            if after.is_none() {
                return Ok(());
            }
        }
    }

    async fn decide<T: Send + 'static>(
        &self,
        now: Option<OffsetDateTime>,
        decision: impl FnOnce(&mut View<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (tell, told) = oneshot::channel();
        let job = Job {
            now_ms: now.map(unix_ms),
            decide: Box::new(move |view| {
                let decided = decision(view);
                Decided {
                    keep: decided.is_ok() || view.is_kept(),
                    // Whoever asked may have gone meanwhile; what was decided stands.
                    answer: Box::new(move |stored| drop(tell.send(stored.and(decided)))),
                }
            }),
        };
        self.queue.try_send(Message::Decide(job)).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => {
                StoreError::Unavailable(format!("{QUEUE_MAX} decisions wait for the disk"))
            }
            mpsc::error::TrySendError::Closed(_) => self.stopped(),
        })?;
        told.await.unwrap_or_else(|_| Err(self.stopped()))
    }

    /// A plan made beside the writer, on what is written now: it waits for no flush and wakes nobody
    /// (sled holds its readers up while it takes a batch in, not while it flushes). Nothing of it may leave the CA, because what it saw need not be durable, nor belong
    /// together: it is good for signing, and the verb that commits judges all of it again. Only a
    /// plan that came out as yes is good for that; any other is for the writer to make.
    fn glance<T>(
        &self,
        now: OffsetDateTime,
        decision: impl FnOnce(&mut View<'_>) -> Result<T, StoreError>,
    ) -> Option<T> {
        self.look(unix_ms(now), decision)?.ok()
    }

    /// What a decision comes to on what is written now, whatever it is; `None` without a reader.
    fn look<T>(
        &self,
        now_ms: i64,
        decision: impl FnOnce(&mut View<'_>) -> Result<T, StoreError>,
    ) -> Option<Result<T, StoreError>> {
        if self.queue.is_closed() {
            return None;
        }
        let reader = self.reader.load();
        let reader = reader.as_ref()?;
        let nothing = Writes::new();
        let audit_head = empty_audit_head();
        let mut view = View::new(&***reader, &nothing, audit_head, now_ms, self.started_ms);
        Some(decision(&mut view))
    }

    fn stopped(&self) -> StoreError {
        let why = self.failure.borrow().clone();
        StoreError::Unavailable(why.unwrap_or_else(|| "the writer has stopped".to_owned()))
    }
}

impl fmt::Debug for KvStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvStore").field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

#[async_trait]
impl Store for KvStore {
    fn epoch(&self) -> u64 {
        self.epoch
    }

    fn watch(&self, cluster: &ClusterId) -> watch::Receiver<Watched> {
        self.shared.watch(cluster.as_str())
    }

    async fn initialize(
        &self,
        now: OffsetDateTime,
        control: ControlRecord,
    ) -> Result<(), StoreError> {
        self.decide(Some(now), move |view| decide::cluster::initialize(view, &control)).await
    }

    async fn control(&self) -> Result<Option<ControlRecord>, StoreError> {
        self.decide(None, move |view| decide::cluster::control(view)).await
    }

    async fn create_cluster(
        &self,
        now: OffsetDateTime,
        actor: String,
        cluster: ClusterRecord,
    ) -> Result<ClusterRecord, StoreError> {
        self.decide(Some(now), move |view| decide::cluster::create(view, &actor, cluster)).await
    }

    async fn set_cluster(
        &self,
        now: OffsetDateTime,
        actor: String,
        cluster: ClusterId,
        before: v1::Settings,
        after: v1::Settings,
    ) -> Result<ClusterRecord, StoreError> {
        self.decide(Some(now), move |view| {
            decide::cluster::set(view, &actor, &cluster, &before, &after)
        })
        .await
    }

    async fn cluster(&self, cluster: ClusterId) -> Result<ClusterRecord, StoreError> {
        self.decide(None, move |view| decide::cluster::get(view, &cluster)).await
    }

    async fn clusters(&self) -> Result<Vec<ClusterRecord>, StoreError> {
        self.decide(None, move |view| decide::cluster::list(view)).await
    }

    async fn add_issuer(
        &self,
        now: OffsetDateTime,
        authority: Authority,
        issuer: CaKey,
    ) -> Result<(), StoreError> {
        self.decide(Some(now), move |view| decide::cluster::add_issuer(view, &authority, &issuer))
            .await
    }

    async fn revocations(
        &self,
        now: OffsetDateTime,
        authority: Authority,
    ) -> Result<Revocations, StoreError> {
        self.decide(Some(now), move |view| decide::cluster::revocations(view, &authority)).await
    }

    async fn put_crls(
        &self,
        now: OffsetDateTime,
        authority: Authority,
        crls: CrlSet,
    ) -> Result<(), StoreError> {
        self.decide(Some(now), move |view| decide::cluster::put_crls(view, &authority, &crls)).await
    }

    async fn crls(&self, authority: Authority) -> Result<Option<CrlSet>, StoreError> {
        self.decide(None, move |view| decide::cluster::crls(view, &authority)).await
    }

    async fn create_token(
        &self,
        now: OffsetDateTime,
        token: TokenRecord,
    ) -> Result<(), StoreError> {
        self.decide(Some(now), move |view| decide::token::create(view, &token)).await
    }

    async fn revoke_token(
        &self,
        now: OffsetDateTime,
        actor: String,
        cluster: ClusterId,
        token: TokenId,
    ) -> Result<TokenRecord, StoreError> {
        self.decide(Some(now), move |view| decide::token::revoke(view, &actor, &cluster, &token))
            .await
    }

    async fn tokens(
        &self,
        cluster: ClusterId,
        page: String,
    ) -> Result<Page<TokenRecord>, StoreError> {
        self.decide(None, move |view| decide::token::list(view, &cluster, &page)).await
    }

    async fn check_token(&self, token: TokenId, secret_hash: [u8; 32]) -> Result<(), StoreError> {
        let check = move |view: &mut View<'_>| decide::token::check(view, &token, &secret_hash);
        // No time is asked.
        match self.look(self.started_ms, check.clone()) {
            Some(judged @ (Ok(()) | Err(StoreError::Refused(_)))) => judged,
            Some(Err(_)) | None => self.decide(None, check).await,
        }
    }

    async fn is_in_force(&self, caller: Caller) -> Result<bool, StoreError> {
        let ask = move |view: &mut View<'_>| decide::identity::is_in_force(view, &caller);
        match self.look(self.started_ms, ask.clone()) {
            Some(Ok(in_force)) => Ok(in_force),
            Some(Err(_)) | None => self.decide(None, ask).await,
        }
    }

    async fn plan_enroll(
        &self,
        now: OffsetDateTime,
        ask: EnrollAsk,
    ) -> Result<EnrollPlan, StoreError> {
        match self.glance(now, |view| decide::enroll::plan(view, &ask)) {
            Some(plan @ EnrollPlan::Issue(_)) => Ok(plan),
            // What was issued before leaves, so it must be durable.
            Some(EnrollPlan::Replay(_)) | None => {
                self.decide(Some(now), move |view| decide::enroll::plan(view, &ask)).await
            }
        }
    }

    async fn enroll(
        &self,
        now: OffsetDateTime,
        ask: EnrollAsk,
        binding: Binding,
        identity: Signed,
    ) -> Result<Enrolled, StoreError> {
        self.decide(Some(now), move |view| decide::enroll::enroll(view, &ask, &binding, &identity))
            .await
    }

    async fn identify(
        &self,
        now: OffsetDateTime,
        caller: Caller,
    ) -> Result<NodeRecord, StoreError> {
        self.decide(Some(now), move |view| decide::identity::identify(view, &caller)).await
    }

    async fn still_stands(&self, caller: Caller) -> Result<(), StoreError> {
        // What is written holds all that is durable, so a yes needs no turn of the writer: after a
        // change everybody who waits asks at once. A no may rest on what is not durable yet.
        let ask = move |view: &mut View<'_>| decide::identity::still_stands(view, &caller);
        match self.look(self.started_ms, ask.clone()) {
            Some(Ok(())) => Ok(()),
            Some(Err(_)) | None => self.decide(None, ask).await,
        }
    }

    async fn plan_renew(
        &self,
        now: OffsetDateTime,
        caller: Caller,
        key_hash: [u8; 32],
    ) -> Result<RenewPlan, StoreError> {
        let plan = move |view: &mut View<'_>| {
            decide::identity::identify(view, &caller)?;
            decide::identity::plan_renew(view, &caller, &key_hash)
        };
        match self.glance(now, plan.clone()) {
            Some(RenewPlan::Issue) => Ok(RenewPlan::Issue),
            // What was issued before leaves, so it must be durable.
            Some(RenewPlan::Replay(_)) | None => self.decide(Some(now), plan).await,
        }
    }

    async fn renew(
        &self,
        now: OffsetDateTime,
        caller: Caller,
        identity: Signed,
    ) -> Result<CertificateRecord, StoreError> {
        self.decide(Some(now), move |view| {
            decide::identity::identify_again(view, &caller)?;
            decide::identity::renew(view, &caller, &identity)
        })
        .await
    }

    async fn plan_leaf(
        &self,
        now: OffsetDateTime,
        caller: Caller,
        ask: LeafAsk,
    ) -> Result<LeafPlan, StoreError> {
        let plan = move |view: &mut View<'_>| {
            decide::identity::identify(view, &caller)?;
            decide::leaf::plan(view, &caller, &ask)
        };
        match self.glance(now, plan.clone()) {
            Some(plan) => Ok(plan),
            None => self.decide(Some(now), plan).await,
        }
    }

    async fn record_leaf(
        &self,
        now: OffsetDateTime,
        caller: Caller,
        ask: LeafAsk,
        plan: LeafPlan,
        leaf: Signed,
    ) -> Result<(), StoreError> {
        self.decide(Some(now), move |view| {
            decide::identity::identify_again(view, &caller)?;
            decide::leaf::record(view, &caller, &ask, &plan, &leaf)
        })
        .await
    }

    async fn leave(&self, now: OffsetDateTime, caller: Caller) -> Result<(), StoreError> {
        self.decide(Some(now), move |view| decide::node::leave(view, &caller)).await
    }

    async fn revoke_node(
        &self,
        now: OffsetDateTime,
        actor: String,
        cluster: ClusterId,
        node: NodeName,
        revoking: Revoking,
    ) -> Result<NodeRevoked, StoreError> {
        self.decide(Some(now), move |view| {
            decide::node::revoke(view, &actor, &cluster, &node, &revoking)
        })
        .await
    }

    async fn revoke_nodes(
        &self,
        now: OffsetDateTime,
        actor: String,
        cluster: ClusterId,
        nodes: Vec<NodeName>,
        revoking: Revoking,
    ) -> Result<Vec<NodeRecord>, StoreError> {
        self.decide(Some(now), move |view| {
            decide::revoke_nodes::revoke(view, &actor, &cluster, &nodes, &revoking)
        })
        .await
    }

    async fn revoke_leaf(
        &self,
        now: OffsetDateTime,
        actor: String,
        cluster: ClusterId,
        serial: Serial,
        reason: String,
    ) -> Result<LeafRevoked, StoreError> {
        self.decide(Some(now), move |view| {
            decide::revoke_leaf::revoke(view, &actor, &cluster, &serial, &reason)
        })
        .await
    }

    async fn reinstate_node(
        &self,
        now: OffsetDateTime,
        actor: String,
        cluster: ClusterId,
        node: NodeName,
    ) -> Result<NodeRecord, StoreError> {
        self.decide(Some(now), move |view| {
            decide::reinstate::reinstate(view, &actor, &cluster, &node)
        })
        .await
    }

    async fn forget_node(
        &self,
        now: OffsetDateTime,
        actor: String,
        cluster: ClusterId,
        node: NodeName,
    ) -> Result<(), StoreError> {
        self.decide(Some(now), move |view| decide::node::forget(view, &actor, &cluster, &node))
            .await
    }

    async fn node(&self, cluster: ClusterId, node: NodeName) -> Result<NodeRecord, StoreError> {
        self.decide(None, move |view| decide::node::get(view, &cluster, &node)).await
    }

    async fn nodes(
        &self,
        cluster: ClusterId,
        page: String,
    ) -> Result<Page<NodeRecord>, StoreError> {
        self.decide(None, move |view| decide::node::list(view, &cluster, &page)).await
    }

    async fn members(
        &self,
        cluster: ClusterId,
        after: u64,
        limit: usize,
    ) -> Result<MemberPage, StoreError> {
        self.decide(None, move |view| decide::member::since(view, &cluster, after, limit)).await
    }

    async fn blocks(
        &self,
        now: OffsetDateTime,
        cluster: ClusterId,
    ) -> Result<Vec<(String, BlockRecord)>, StoreError> {
        self.decide(Some(now), move |view| decide::block::list(view, &cluster)).await
    }

    async fn lapse_members(
        &self,
        now: OffsetDateTime,
        cluster: ClusterId,
        serving_since: OffsetDateTime,
    ) -> Result<u32, StoreError> {
        let since_ms = unix_ms(serving_since);
        self.decide(Some(now), move |view| decide::member::lapse(view, &cluster, since_ms)).await
    }

    async fn certificate(&self, serial: Serial) -> Result<CertificateRecord, StoreError> {
        self.decide(None, move |view| decide::certificate::get(view, &serial)).await
    }

    async fn certificates(
        &self,
        cluster: ClusterId,
        node: Option<NodeName>,
        page: String,
    ) -> Result<Page<CertificateRecord>, StoreError> {
        self.decide(None, move |view| {
            decide::certificate::list(view, &cluster, node.as_ref(), &page)
        })
        .await
    }

    async fn audit(&self, after: u64, limit: usize) -> Result<Vec<AuditRecord>, StoreError> {
        self.decide(None, move |view| decide::audit::list(view, after, limit)).await
    }

    async fn audit_page(&self, ask: AuditAsk) -> Result<AuditPage, StoreError> {
        let newest_index = *self.shared.audit.borrow();
        let page = move |view: &mut View<'_>| decide::audit::page(view, &ask, newest_index);
        // No time is asked; what is durable of this log never changes.
        match self.look(self.started_ms, page.clone()) {
            Some(page) => page,
            None => self.decide(None, page).await,
        }
    }

    async fn audit_state(&self) -> Result<AuditState, StoreError> {
        self.decide(None, move |view| decide::audit::state(view)).await
    }

    async fn audit_hash_at(&self, index: u64) -> Result<Option<Vec<u8>>, StoreError> {
        // What is asked for was durable when its checkpoint was signed, and records never change.
        match self.look(self.started_ms, |view| decide::audit::hash_at(view, index)) {
            Some(Ok(hash)) => Ok(hash),
            Some(Err(_)) | None => {
                self.decide(None, move |view| decide::audit::hash_at(view, index)).await
            }
        }
    }

    async fn put_checkpoint(&self, checkpoint: Checkpoint) -> Result<(), StoreError> {
        self.decide(None, move |view| decide::audit::put_checkpoint(view, &checkpoint)).await
    }

    async fn plan_prune(&self, before: OffsetDateTime) -> Result<PrunePlan, StoreError> {
        let before_ms = unix_ms(before);
        self.decide(None, move |view| decide::audit::plan_prune(view, before_ms)).await
    }

    async fn prune_audit(
        &self,
        now: OffsetDateTime,
        actor: String,
        checkpoint: Checkpoint,
    ) -> Result<bool, StoreError> {
        self.decide(Some(now), move |view| decide::audit::prune(view, &actor, &checkpoint)).await
    }

    async fn begin_backup(
        &self,
        now: OffsetDateTime,
        actor: String,
    ) -> Result<mpsc::Receiver<BackupPairs>, StoreError> {
        let pairs = self.shared.begin_backup(BACKUP_QUEUED_MAX);
        let pairs = pairs.ok_or_else(|| {
            let text = "a backup is in the making: wait until it has ended".to_owned();
            crate::refusal::Refusal::RequestInvalid(text)
        })?;
        let noted = move |view: &mut View<'_>| {
            decide::restore::note_backup(view, &actor);
            Ok(())
        };
        match self.decide(Some(now), noted).await {
            Ok(()) => Ok(pairs),
            Err(error) => {
                self.shared.end_backup();
                Err(error)
            }
        }
    }

    async fn backup_chunk(&self, after: Option<Vec<u8>>) -> Result<Option<Vec<u8>>, StoreError> {
        let shared = Arc::clone(&self.shared);
        self.decide(None, move |view| {
            let rows = decide::restore::chunk(view, after.as_deref())?;
            let last = rows.last().map(|(key, _)| key.clone());
            let pairs = rows.into_iter().map(|(key, value)| (key, Some(value))).collect();
            // In the writer's own order: what is written from here on comes behind it.
            if last.is_some() && !shared.to_backup(|| pairs) {
                let text =
                    "the backup was not taken as fast as the store was written to: try again";
                return Err(StoreError::Unavailable(text.to_owned()));
            }
            Ok(last)
        })
        .await
    }

    fn end_backup(&self) -> bool {
        self.shared.end_backup()
    }

    async fn standing(&self, caller: Caller) -> Result<Standing, StoreError> {
        self.decide(None, move |view| decide::restore::standing(view, &caller)).await
    }

    async fn plan_accept(&self, now: OffsetDateTime, heard: Heard) -> Result<Accepted, StoreError> {
        let plan = |view: &mut View<'_>| decide::restore::accept(view, "", &heard);
        self.look(unix_ms(now), plan).unwrap_or_else(|| Err(self.stopped()))
    }

    async fn accept_restore(
        &self,
        now: OffsetDateTime,
        actor: String,
        heard: Heard,
    ) -> Result<Accepted, StoreError> {
        self.decide(Some(now), move |view| decide::restore::accept(view, &actor, &heard)).await
    }

    async fn restores(&self) -> Result<RestoresRecord, StoreError> {
        self.decide(None, move |view| Ok(view.get(layout::RESTORES)?.unwrap_or_default())).await
    }

    async fn note_key_export(
        &self,
        now: OffsetDateTime,
        actor: String,
        authority: Authority,
        detail: String,
    ) -> Result<(), StoreError> {
        self.decide(Some(now), move |view| {
            decide::audit::note_key_export(view, &actor, &authority, detail)
        })
        .await
    }

    fn watch_audit(&self) -> watch::Receiver<u64> {
        self.shared.audit.subscribe()
    }

    fn is_serving(&self) -> bool {
        !self.queue.is_closed()
    }

    fn counts(&self) -> StoreCounts {
        let counters = &self.shared.counters;
        let queued = self.queue.max_capacity() - self.queue.capacity();
        StoreCounts {
            jobs: counters.jobs.load(Ordering::Relaxed),
            groups: counters.groups.load(Ordering::Relaxed),
            commits: counters.commits.load(Ordering::Relaxed),
            commit_micros: counters.commit_micros.load(Ordering::Relaxed),
            queued: u64::try_from(queued).unwrap_or(u64::MAX),
        }
    }

    async fn close(&self) {
        let reader = self.reader.swap(None);
        // A writer that has stopped takes no word, and needs none.
        let _ = self.queue.send(Message::Close).await;
        let mut failure = self.failure.clone();
        while failure.changed().await.is_ok() {}
        // A glance that began before still reads: the engine is let go when the last one has ended.
        while reader.as_ref().is_some_and(|reader| Arc::strong_count(reader) > 1) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Starts the writer's thread.
fn start(
    engine: Box<dyn Engine>,
    audit_head: AuditHead,
    started_ms: i64,
    shared: Arc<Shared>,
) -> Result<(mpsc::Sender<Message>, watch::Receiver<Option<String>>), StoreError> {
    let (queue, mut queued) = mpsc::channel(QUEUE_MAX);
    let (fail, failure) = watch::channel(None);
    let work = move || {
        let mut writer =
            Writer { engine, audit_head, started_ms, newest_ms: started_ms, shared: &shared };
        let ended = writer.run(&mut queued);
        queued.close();
        if let Err(why) = ended {
            tracing::error!(%why, "the store has failed: nothing is committed from here on");
            fail.send_replace(Some(why));
        }
        // Whoever still waits is told by the drop; then the engine goes; `fail` goes last, which ends
        // `close`.
        drop(queued);
        drop(writer);
        drop(fail);
    };
    thread::Builder::new()
        .name("store-writer".to_owned())
        .spawn(work)
        .map_err(|e| StoreError::Open(format!("the store's thread cannot be started: {e}")))?;
    Ok((queue, failure))
}

fn read_header(view: &View<'_>) -> Result<Header, StoreError> {
    let header: Header = view.get(layout::HEADER)?.ok_or_else(|| {
        StoreError::Open("there is no store here: make one with `ca-server init`".to_owned())
    })?;
    if header.format != FORMAT {
        return Err(StoreError::Open(format!(
            "the store has format {}, this program reads format {FORMAT}: upgrade",
            header.format
        )));
    }
    Ok(header)
}

/// The end of the audit log, if it is where its record says.
fn read_audit_head(view: &View<'_>) -> Result<AuditHead, StoreError> {
    let head = view.get(layout::AUDIT_HEAD)?.unwrap_or_else(empty_audit_head);
    if head.index > 0 {
        let newest = view.get_raw(&layout::audit(head.index))?;
        let newest = newest.ok_or_else(|| audit_damaged(head.index, "it is missing"))?;
        if audit_hash(&newest)[..] != head.hash {
            return Err(audit_damaged(head.index, "it is not the one that was written last"));
        }
    }
    let beyond = view.scan_raw(layout::AUDIT, Some(&layout::audit(head.index)), 1)?;
    if beyond.is_empty() {
        Ok(head)
    } else {
        Err(audit_damaged(head.index + 1, "it lies beyond the end of the log"))
    }
}

/// Checks one page of the audit log after `seen`: the end of the page, and whether it is the log's.
fn check_audit(view: &View<'_>, mut seen: AuditHead) -> Result<(AuditHead, bool), StoreError> {
    let from = layout::audit(seen.index);
    let rows = view.scan_raw(layout::AUDIT, Some(&from), AUDIT_PAGE_ROWS)?;
    let ended = rows.len() < AUDIT_PAGE_ROWS;
    for (key, value) in rows {
        let index = seen.index + 1;
        let record = AuditRecord::decode(value.as_slice())
            .map_err(|e| audit_damaged(index, &e.to_string()))?;
        if key != layout::audit(index) || record.index != index {
            return Err(audit_damaged(index, "it is missing"));
        }
        if record.previous_hash != seen.hash {
            return Err(audit_damaged(
                index,
                "the record before it is not the one it was written after",
            ));
        }
        seen = AuditHead { index, hash: audit_hash(&value).to_vec() };
    }
    if ended && seen != read_audit_head(view)? {
        return Err(audit_damaged(seen.index, "the log does not end here"));
    }
    Ok((seen, ended))
}

fn audit_damaged(index: u64, why: &str) -> StoreError {
    StoreError::Damaged { key: format!("audit record {index}"), why: why.to_owned() }
}

/// Decisions that may wait. One more is turned away at once: it would wait longer than its caller.
const QUEUE_MAX: usize = 8_192;
const AUDIT_PAGE_ROWS: usize = 512;
/// Pieces of a backup that may wait for whoever takes it.
const BACKUP_QUEUED_MAX: usize = 256;

#[cfg(test)]
mod tests;
