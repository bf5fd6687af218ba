//! The daemon: look at the facts, decide (in `state`), act. One task owns everything; the waiting
//! Sync, the socket, the hooks and the HTTP listener run beside it and talk to it by messages. Every
//! await lies before the writes of an act, so that stopping never cuts a write in two.

mod answers;
mod cut;
mod execs;
mod isolation;
pub(crate) mod issue;
mod looks;
mod outcome;
mod revoked;
mod skew;
mod statusfile;
mod sync;
mod tunnel;
mod view;

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    pin::pin,
    sync::Arc,
    time::Duration,
};

use raymtls_proto::{clock::Clock, reason::Reaction, v1};
use thiserror::Error;
use time::OffsetDateTime;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::{AbortHandle, JoinSet},
    time::Instant,
};

use crate::{
    api::{Answer, Ask, ErrorKind},
    caclock::CaClock,
    client::{CallError, NodeClient, Target},
    config::Config,
    failure::Failure,
    hooks::{Event as HookEvent, Hooks},
    http,
    isolation::{
        Mark,
        table::{Seen, TableError},
    },
    keyfolder,
    keyfolder::{Folder, KeyFolderError, TlsDir},
    keys::KeyError,
    moment::Moment,
    notify,
    rayenv::Told,
    socket,
    state::{self, Action, Call, Facts, FolderFacts, Life, Standing},
    statedir::{
        Identity, Memory, NodeFile, StateDir, StateError, StateLock, WaitingKey, issued_at,
    },
    status::{Contact, Status},
    stopray,
    verify::{self, VerifyError},
};

#[cfg(test)]
pub(crate) use self::statusfile::tests::status as empty_status;

/// Most messages that wait for the daemon.
const EVENTS_LEN_MAX: usize = 64;

/// A connection is judged anew after this long: one that was made while the CA's certificate was good
/// must not be kept by whoever holds its key.
const CONNECTION_AGE_MAX: Duration = Duration::from_secs(3_600);

/// Stands where a reason word of the CA would: this agent found out by itself.
const IDENTITY_EXPIRED: &str = "IDENTITY_EXPIRED";

/// Why an act did not succeed.
#[derive(Debug, Error)]
pub enum ActError {
    /// The CA gave no answer, or said no.
    #[error(transparent)]
    Call(#[from] CallError),
    /// What it gave must not replace a file.
    #[error("the CA's answer was not used: {0}")]
    Verify(#[from] VerifyError),
    /// The TLS folder.
    #[error(transparent)]
    KeyFolder(#[from] KeyFolderError),
    /// The state folder.
    #[error(transparent)]
    State(#[from] StateError),
    /// A key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The CRL would break every later call.
    #[error("the CA's control CRL was not used: {0}")]
    ControlCrl(String),
    /// No room for another key folder.
    #[error("there are {0} key folders already: the oldest must expire first")]
    TooManyFolders(usize),
}

impl ActError {
    /// The CA renews this leaf key no more; it answers, and a new key would do.
    fn is_key_too_old(&self) -> bool {
        matches!(self, Self::Call(call) if call.reaction() == Reaction::NewKeyFolder)
    }

    /// The CA said no, and trying again as it is will not help.
    fn is_refusal(&self) -> bool {
        match self {
            Self::Call(call) => match call.reaction() {
                Reaction::Stop | Reaction::Reenrol => true,
                Reaction::Retry | Reaction::NewKeyFolder => false,
            },
            Self::Verify(_)
            | Self::KeyFolder(_)
            | Self::State(_)
            | Self::Key(_)
            | Self::ControlCrl(_)
            | Self::TooManyFolders(_) => false,
        }
    }
}

impl From<ActError> for Failure {
    fn from(error: ActError) -> Self {
        if error.is_refusal() {
            Self::Refused(error.to_string())
        } else {
            Self::Failed(error.to_string())
        }
    }
}

/// The way to talk to a running agent from another task.
#[derive(Clone, Debug)]
pub struct Handle {
    events: mpsc::Sender<Event>,
    status: watch::Receiver<Status>,
}

impl Handle {
    /// Asks; authorisation comes before this.
    pub async fn ask(&self, ask: Ask) -> Answer {
        if ask == Ask::Status {
            return Answer::Status(Box::new(self.status()));
        }
        let (reply, answer) = oneshot::channel();
        let gone = || Answer::error(ErrorKind::Failed, "the agent is stopping");
        if self.events.send(Event::Asked(ask, reply)).await.is_err() {
            return gone();
        }
        answer.await.unwrap_or_else(|_| gone())
    }

    /// The status.
    #[must_use]
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// The status each time it changes.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }
}

/// What the daemon hears between two acts.
#[derive(Debug)]
enum Event {
    Asked(Ask, oneshot::Sender<Answer>),
    /// A Sync ended; the number says which one, the moment when its answer came.
    Synced(u64, Instant, Box<Result<v1::SyncResponse, CallError>>),
    RayStopped(Box<stopray::Outcome>),
    /// The table as it was seen while the one with this mark was loaded.
    Counted(Mark, Result<Option<Seen>, TableError>),
    /// The gateways of all routes.
    Gateways(BTreeSet<IpAddr>),
    /// Sockets of blocked hosts were closed, or could not be.
    Cut(cut::Done),
    /// A look at what Ray serves has ended.
    Looked(Box<looks::Looked>),
    /// How the tunnel stands, and whether capture was proved.
    TunnelSeen(Box<tunnel::Asked>),
}

/// The agent of one node.
#[derive(Debug)]
pub struct Agent {
    config: Config,
    clock: Arc<CaClock>,
    state: StateDir,
    tls: TlsDir,
    node: NodeFile,
    identity: Identity,
    memory: Memory,
    folders: Vec<AgentFolder>,
    current: Option<u32>,
    env_names: Option<u32>,
    standing: Standing,
    contact: Contact,
    /// Calls in a row that found no CA.
    failures: u32,
    calls_not_before: Option<Instant>,
    held: HashMap<Call, outcome::Held>,
    skew: skew::Skew,
    renewal_pending: bool,
    folder_wanted: bool,
    folder_made_at: Option<Instant>,
    client: Option<Connected>,
    sync: sync::Waiting,
    stopping: revoked::Stopping,
    status_file: statusfile::StatusFile,
    isolation: isolation::Isolation,
    tunnel: tunnel::Tunnel,
    looks: looks::Looks,
    askers: Vec<execs::Asker>,
    /// The version at which this node saw itself as a member.
    seen_at: Option<v1::SyncVersion>,
    /// What all live heads have applied, as the CA said last.
    heads_applied: Option<v1::SyncVersion>,
    hooks: Hooks,
    renewals: u64,
    problems: Vec<String>,
    event_sender: mpsc::Sender<Event>,
    events: mpsc::Receiver<Event>,
    status: watch::Sender<Status>,
    _lock: StateLock,
}

#[derive(Debug)]
struct AgentFolder {
    folder: Folder,
    key_too_old: bool,
    /// Since when this agent has its leaf, by time that passes.
    leaf_since: Duration,
}

/// The client with the identity in force.
#[derive(Debug)]
struct Connected {
    client: NodeClient,
    /// When it was made, by time that passes.
    since: Duration,
}

impl Agent {
    /// Takes the state folder over, finishes what a crash left, and reads everything.
    ///
    /// # Errors
    /// Not enrolled, another daemon at work, damaged or exposed folders.
    pub fn open(config: Config, clock: Arc<dyn Clock>) -> Result<Self, ActError> {
        let state = StateDir::open(&config.state_dir)?;
        let lock = state.lock()?;
        Self::open_locked(config, clock, state, lock)
    }

    pub(crate) fn open_locked(
        config: Config,
        clock: Arc<dyn Clock>,
        state: StateDir,
        lock: StateLock,
    ) -> Result<Self, ActError> {
        let clock = Arc::new(CaClock::new(clock));
        state.sweep()?;
        let not_enrolled = || StateError::NotEnrolled(state.path().display().to_string());
        let node = state.node()?.ok_or_else(not_enrolled)?;
        let identity = state.identity()?.ok_or_else(not_enrolled)?;
        if identity.facts.uris != [node.agent().uri(&node.trust_domain)] {
            // An enrolment under another name was cut short between its two files.
            return Err(not_enrolled().into());
        }
        state.drop_waiting(&identity.key.spki_der())?;
        let tls = TlsDir::prepare(&config.tls_dir, config.ray_gid.or(node.ray_gid))?;
        let (event_sender, events) = mpsc::channel(EVENTS_LEN_MAX);
        let renewal_pending = state.has_waiting_key(WaitingKey::Renewal);
        let status = view::empty(&node, &identity, clock.now());
        let mut agent = Self {
            memory: state.memory(),
            folders: Vec::new(),
            current: None,
            env_names: None,
            standing: Standing::Enrolled,
            contact: Contact {
                reachable: None,
                last_contact: None,
                last_error: None,
                next_try: None,
            },
            failures: 0,
            calls_not_before: None,
            held: HashMap::new(),
            skew: skew::Skew::default(),
            renewal_pending,
            folder_wanted: false,
            folder_made_at: None,
            client: None,
            sync: sync::Waiting::default(),
            stopping: revoked::Stopping::default(),
            status_file: statusfile::StatusFile::default(),
            isolation: isolation::Isolation::default(),
            tunnel: tunnel::Tunnel::default(),
            looks: looks::Looks::default(),
            askers: Vec::new(),
            seen_at: None,
            heads_applied: None,
            hooks: Hooks::none(),
            renewals: 0,
            problems: Vec::new(),
            event_sender,
            events,
            status: watch::Sender::new(status),
            config,
            clock,
            state,
            tls,
            node,
            identity,
            _lock: lock,
        };
        agent.reconcile()?;
        agent.note_membership(&Memory::default());
        agent.publish();
        Ok(agent)
    }

    /// The way to talk to it once it runs.
    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle { events: self.event_sender.clone(), status: self.status.subscribe() }
    }

    /// What it stands on, for tests and for `enroll`.
    #[must_use]
    pub fn node(&self) -> &NodeFile {
        &self.node
    }

    /// Runs until `stop` is ready. A write in hand is finished; the node does not leave its cluster.
    ///
    /// # Errors
    /// The socket cannot be had.
    pub async fn run(mut self, stop: impl Future<Output = ()>) -> Result<(), Failure> {
        let mut beside = JoinSet::new();
        let mut stop = pin!(stop);
        // Before anybody can ask, and before the service manager starts what needs this.
        self.begin_isolation().await;
        self.start_beside(&mut beside).await?;
        notify::status(&self.view());
        loop {
            self.publish();
            let now = self.clock.now();
            self.reconsider(now);
            let step = async {
                self.tend_isolation().await;
                self.tend_tunnel().await;
                self.tend_looks();
                self.answer_askers().await;
                match state::next_action(now, &self.look(now)) {
                    Action::Wait(until) => self.wait(now, until).await,
                    Action::IdentityOver => self.identity_over(),
                    Action::RemoveFolder(number) => self.remove_folder(number),
                    Action::Call(call) => self.call(call).await,
                }
            };
            tokio::select! {
                biased;
                () = &mut stop => break,
                () = step => {}
            }
        }
        notify::stopping();
        self.sync.end();
        beside.shutdown().await;
        if let Some(path) = &self.config.socket {
            let _ = std::fs::remove_file(path);
        }
        tracing::info!("stopped; all files stay as they are");
        Ok(())
    }

    async fn start_beside(&mut self, beside: &mut JoinSet<()>) -> Result<(), Failure> {
        if let Some(folder) = self.config.hooks_dir.clone() {
            self.hooks = Hooks::in_folder(folder);
        }
        if let Some(path) = self.config.socket.clone() {
            let listener = socket::listen(&path).await.map_err(|e| {
                Failure::Failed(format!("cannot listen at {}: {e}", path.display()))
            })?;
            let allowed = socket::Allowed {
                agent_uid: rustix::process::geteuid().as_raw(),
                ray_uid: self.config.ray_uid,
            };
            beside.spawn(socket::serve(listener, self.handle(), allowed));
        }
        if let Some(address) = self.config.http_listen {
            match http::listen(address).await {
                Ok(listener) => {
                    beside.spawn(http::serve(
                        listener,
                        self.status.subscribe(),
                        self.clock.clone(),
                    ));
                }
                // Certificates matter more than metrics: a port that is taken stops nothing.
                Err(error) => self.problem(format!("no metrics and health at {address}: {error}")),
            }
        }
        Ok(())
    }

    /// Brings links, `ray.env` and access in line with what is there.
    fn reconcile(&mut self) -> Result<(), ActError> {
        self.tls.sweep()?;
        let (folders, damaged) = self.tls.load()?;
        self.set_key_readers();
        let were_others = self.tls.align_access(&folders)?;
        self.note_other_readers(were_others);
        for error in damaged {
            self.problem(error.to_string());
        }
        let own = [self.node.ray().uri(&self.node.trust_domain)];
        let (folders, others): (Vec<_>, Vec<_>) =
            folders.into_iter().partition(|folder| folder.facts.uris == own);
        for other in others {
            // A Ray that was started before may still use it; nobody renews it any more.
            let name = other.name();
            self.problem(format!(
                "key folder {name} is of an earlier enrolment of this machine: remove it once no Ray \
                 process uses it"
            ));
        }
        let now = self.clock.elapsed();
        self.folders = folders.into_iter().map(|folder| AgentFolder::new(folder, now)).collect();
        let named = self.tls.current();
        let is_there = |n: &u32| self.folders.iter().any(|f| f.folder.number == *n);
        self.current = named.filter(is_there);
        self.env_names = self.tls.env_names();
        match self.current.or_else(|| self.newest_valid(self.clock.now())) {
            Some(number) => self.make_current(number)?,
            None => self.current = None,
        }
        if let Some(bundle) = self.memory.bundle().cloned() {
            self.write_bundle(&bundle)?;
        }
        Ok(())
    }

    fn look(&self, now: OffsetDateTime) -> Facts {
        let facts = &self.identity.facts;
        let on_the_wall =
            |at: Instant| state::after(now, at.saturating_duration_since(Instant::now()));
        let elapsed = self.clock.elapsed();
        Facts {
            standing: self.standing.clone(),
            identity: Life::of_identity(facts.serial, issued_at(facts), facts.not_after),
            renewal_pending: self.renewal_pending,
            folders: self.folders.iter().map(|folder| folder.facts(elapsed)).collect(),
            current: self.current,
            env_names: self.env_names,
            folder_wanted: self.folder_wanted,
            ca_now: self.clock.ca_now(),
            host_now: self.clock.host_now(),
            sync_waiting: self.sync.is_waiting(),
            calls_not_before: self.calls_not_before.map(on_the_wall),
            held: self.held.iter().map(|(call, held)| (*call, on_the_wall(held.until))).collect(),
        }
    }

    async fn call(&mut self, call: Call) {
        let done = match call {
            Call::RenewIdentity => self.renew_identity().await.map(drop),
            Call::NewFolder => self.new_folder().await.map(drop),
            Call::RenewLeaf(number) => match self.renew_leaf(number).await {
                // Noted at its folder; the next look decides about a new one.
                Err(error) if error.is_key_too_old() => Ok(()),
                other => other.map(drop),
            },
            Call::Sync => self.start_sync(),
        };
        if let Err(error) = done {
            self.failed(Some(call), &error);
        }
    }

    fn identity_over(&mut self) {
        self.sync.end();
        self.stand(Standing::ReenrolNeeded {
            reason: IDENTITY_EXPIRED.to_owned(),
            message: format!(
                "the agent identity has expired: it ended at {}, and this host's clock says {}",
                Moment::from(self.identity.facts.not_after),
                Moment::from(self.clock.host_now())
            ),
        });
    }

    /// A clock that stood wrong and was put right makes an identity valid again.
    fn reconsider(&mut self, now: OffsetDateTime) {
        let over = self.identity.facts.not_after <= now.min(self.clock.host_now());
        if !over
            && matches!(&self.standing, Standing::ReenrolNeeded { reason, .. } if reason == IDENTITY_EXPIRED)
        {
            self.stand(Standing::Enrolled);
        }
    }

    /// Waits for a message, for the moment, or for the next look at the clock.
    async fn wait(&mut self, now: OffsetDateTime, until: OffsetDateTime) {
        let left = Duration::try_from(until - now).unwrap_or_default().min(self.config.tick);
        let left = self.askers_wait().map_or(left, |wait| wait.min(left));
        let event = tokio::time::timeout(left, self.events.recv()).await;
        match event {
            Ok(Some(Event::Asked(Ask::ExecFolder, reply))) => self.asked_for_files(reply),
            Ok(Some(Event::Asked(Ask::TunnelHandover { deadline_seconds }, reply))) => {
                self.asked_for_handover(Duration::from_secs(deadline_seconds), reply);
            }
            Ok(Some(Event::Asked(Ask::TunnelStop { deadline_seconds }, reply))) => {
                self.asked_to_stop_tunnel(Duration::from_secs(deadline_seconds), reply);
            }
            Ok(Some(Event::Asked(ask, reply))) => {
                let answer = self.answer(ask).await;
                self.publish();
                let _ = reply.send(answer);
            }
            Ok(Some(Event::RayStopped(outcome))) => self.ray_stopped(*outcome),
            Ok(Some(Event::Synced(number, came, result))) => {
                self.synced(number, came, *result).await;
            }
            Ok(Some(Event::Counted(mark, seen))) => self.counted(mark, seen).await,
            Ok(Some(Event::Gateways(found))) => self.found_gateways(found).await,
            Ok(Some(Event::Cut(done))) => {
                self.cut_ended(done);
                self.sync.report_soon();
            }
            Ok(Some(Event::Looked(looked))) => self.looked(*looked),
            Ok(Some(Event::TunnelSeen(asked))) => self.tunnel_seen(*asked),
            // The agent holds a sender itself: the channel never ends.
            Ok(None) | Err(_) => {}
        }
    }

    /// The client with the identity in force.
    fn client(&mut self) -> Result<NodeClient, ActError> {
        let now = self.clock.elapsed();
        let fresh = |c: &&Connected| now.saturating_sub(c.since) < CONNECTION_AGE_MAX;
        if let Some(connected) = self.client.as_ref().filter(fresh) {
            return Ok(connected.client.clone());
        }
        let target = Target {
            endpoints: self.node.node_endpoints.clone(),
            trust_domain: self.node.trust_domain.clone(),
            control_roots: self.node.control_roots.clone(),
            control_crls: self.memory.control_crls().to_vec(),
            source: None,
        };
        let (limits, judges) = (self.config.limits, self.clock.judges());
        let client = NodeClient::judged_by(&target, &self.identity, limits, &judges)?;
        Ok(self.client.insert(Connected { client, since: now }).client.clone())
    }

    fn problem(&mut self, text: String) {
        tracing::error!("{text}");
        self.problems.push(text);
    }

    fn remove_folder(&mut self, number: u32) {
        // Out of the list first: one that cannot be removed is tried again at the next start.
        self.folders.retain(|f| f.folder.number != number);
        self.held.remove(&Call::RenewLeaf(number));
        let name = keyfolder::folder_name(number);
        match self.tls.remove(number) {
            Ok(()) => tracing::info!(key_folder = %name, "expired key folder removed"),
            Err(error) => self.problem(format!("expired key folder {name} stays: {error}")),
        }
    }

    /// Points `current` and `ray.env` at a folder.
    fn make_current(&mut self, number: u32) -> Result<(), ActError> {
        self.tls.point_current(number)?;
        self.current = Some(number);
        self.tls.put_env(number, &self.told())?;
        self.env_names = self.tls.env_names();
        self.key_folder_changed();
        Ok(())
    }

    /// Whether Ray's token is on.
    fn with_token(&self) -> bool {
        sync::with_token(&self.memory)
    }

    /// What Ray is told besides its files.
    fn told(&self) -> Told {
        Told::by(self.memory.settings(), self.node.role)
    }

    /// Writes roots and CRLs into every folder whose leaf verifies with them.
    fn write_bundle(&mut self, bundle: &v1::TrustBundle) -> Result<(), ActError> {
        let now = self.clock.now();
        let roots: Vec<_> = bundle.roots_der.iter().map(|der| der.as_slice().into()).collect();
        let mut changed = Vec::new();
        for AgentFolder { folder, .. } in &self.folders {
            if folder.facts.not_after <= now {
                continue;
            }
            if let Err(why) = verify::chains(&folder.chain, &roots, None, now) {
                let name = folder.name();
                tracing::error!(key_folder = %name, %why, "its leaf does not chain to the new roots: it keeps the old ones");
                continue;
            }
            if self.tls.put_bundle(folder.number, bundle)? {
                changed.push(folder.number);
            }
        }
        if !changed.is_empty() {
            self.key_folder_changed();
        }
        for number in changed {
            self.hooks.tell(HookEvent::BundleChanged, &self.tls.folder_path(number));
        }
        Ok(())
    }

    fn newest_valid(&self, now: OffsetDateTime) -> Option<u32> {
        let valid = |f: &&AgentFolder| f.folder.facts.not_after > now;
        self.folders.iter().filter(valid).map(|f| f.folder.number).max()
    }

    fn folder(&self, number: u32) -> Option<&AgentFolder> {
        self.folders.iter().find(|f| f.folder.number == number)
    }
}

impl AgentFolder {
    fn new(folder: Folder, leaf_since: Duration) -> Self {
        Self { folder, key_too_old: false, leaf_since }
    }

    fn life(&self) -> Life {
        let facts = &self.folder.facts;
        Life::of_leaf(facts.serial, issued_at(facts), facts.not_after)
    }

    fn facts(&self, elapsed: Duration) -> FolderFacts {
        FolderFacts {
            number: self.folder.number,
            life: self.life(),
            key_too_old: self.key_too_old,
            held_for: elapsed.saturating_sub(self.leaf_since),
        }
    }
}

/// Ends a task when it is dropped or told to.
#[derive(Debug)]
struct Task(AbortHandle);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}
