//! What the stories share: a CA in this process with real TLS on loopback, a real store in a folder
//! of its own and a clock the test moves; nodes that enrol with it; and a judge of every certificate
//! it made, with parsers that are not ours.
//!
//! Connections come from 127.0.0.1, by which no node can be known, so nodes here name the addresses
//! they want and tokens carry ranges that hold them.

#![allow(
    missing_docs,
    clippy::missing_panics_doc,
    clippy::missing_errors_doc,
    clippy::unwrap_used,
    reason = "helpers of tests: a panic is a failed test"
)]

pub mod agents;
pub mod fuzz;
pub mod held;
pub mod judge;
pub mod manifests;
pub mod peers;
pub mod programs;
pub mod socket;
pub mod tunnel;
pub mod wire;

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use ca_server::{
    admin::{Operator, clusters, nodes, tokens},
    admin_socket,
    ca::{Ca, Endpoints},
    init,
    keys::kek::Kek,
    limits::Limits,
    proxy_protocol::TrustedProxies,
    serve::{self, Listeners},
    store::{Store, kv::KvStore, sled::SledEngine},
};
use node_agent::{
    client::{CallError, CallLimits, EnrollmentClient, NodeClient, Target},
    keys::PrivateKey,
    statedir::Identity,
};
use raymtls_proto::{
    clock::{Clock, SettableClock},
    durable::{self, Access},
    join::JoinFile,
    v1::{self, create_cluster_request::Life, enroll_request::Credential},
};
use secrecy::ExposeSecret;
use tempfile::TempDir;
use time::OffsetDateTime;
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};

/// Trust domain of every test.
pub const TRUST_DOMAIN: &str = "ray.example";
/// The operator's socket in the folder of a deployment.
pub const ADMIN_SOCKET: &str = "admin.sock";

/// A CA and everything it stands on.
pub struct Deployment {
    pub clock: SettableClock,
    pub folder: TempDir,
    pub ca: Arc<Ca>,
    pub store: Arc<KvStore>,
    pub enrollment: SocketAddr,
    pub nodes: SocketAddr,
    pub operator: Operator,
    /// The operator's socket is open to this group.
    group: Option<String>,
    serving: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
}

/// A node as a test plays it.
pub struct Member {
    pub name: String,
    pub answer: v1::EnrollResponse,
    pub identity: Identity,
    pub client: NodeClient,
}

impl Deployment {
    /// A new CA, serving, without clusters.
    pub async fn start() -> Self {
        Self::start_for_group(None).await
    }

    /// A new CA whose clock stands at `now`.
    pub async fn start_at(now: OffsetDateTime) -> Self {
        Self::start_with(None, SettableClock::new(now)).await
    }

    /// The same with the operator's socket open to a group.
    pub async fn start_for_group(group: Option<String>) -> Self {
        Self::start_with(group, SettableClock::new(start_time())).await
    }

    async fn start_with(group: Option<String>, clock: SettableClock) -> Self {
        Self::start_as(group, clock, Limits::highest(), TrustedProxies::default()).await
    }

    /// A new CA with limits that bite, behind these proxies.
    pub async fn start_within(limits: Limits, proxies: TrustedProxies) -> Self {
        Self::start_as(None, SettableClock::new(start_time()), limits, proxies).await
    }

    async fn start_as(
        group: Option<String>,
        clock: SettableClock,
        limits: Limits,
        proxies: TrustedProxies,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (dir, kek) = (folder.path().join("ca"), folder.path().join("kek"));
        init::init(&dir, &kek, &TRUST_DOMAIN.parse().unwrap(), &clock).await.unwrap();
        Self::serve(folder, clock, group, (limits, proxies)).await
    }

    async fn serve(
        folder: TempDir,
        clock: SettableClock,
        group: Option<String>,
        (limits, proxies): (Limits, TrustedProxies),
    ) -> Self {
        let engine = SledEngine::open(&init::store_dir(&folder.path().join("ca"))).unwrap();
        let store = Arc::new(KvStore::open(Box::new(engine), clock.now()).unwrap());
        let kek = Kek::read(&folder.path().join("kek")).unwrap();
        let enrollment = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let nodes = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addresses = (enrollment.local_addr().unwrap(), nodes.local_addr().unwrap());
        let endpoints = Endpoints {
            enrollment: vec![addresses.0.to_string()],
            nodes: vec![addresses.1.to_string()],
        };
        let dyn_store: Arc<dyn Store> = Arc::clone(&store) as _;
        let ca = Ca::load(dyn_store, Arc::new(clock.clone()), kek, endpoints).await.unwrap();
        let ca = Arc::new(ca.with_limits(limits).behind(proxies));
        let socket = folder.path().join(ADMIN_SOCKET);
        let listeners = Listeners {
            enrollment,
            nodes,
            http: TcpListener::bind("127.0.0.1:0").await.unwrap(),
            crl: None,
            admin: admin_socket::listen(&socket, group.as_deref()).await.unwrap(),
            operator_group: group.is_some(),
        };
        let (started, has_started) = oneshot::channel::<()>();
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = Arc::clone(&ca);
        let task = tokio::spawn(async move {
            let stop = async { drop(stopped.await) };
            let started = || started.send(()).unwrap();
            serve::serve(serving, listeners, started, stop).await.unwrap();
        });
        has_started.await.unwrap();
        Self {
            clock,
            folder,
            ca,
            store,
            enrollment: addresses.0,
            nodes: addresses.1,
            operator: Operator::on_socket(Some(0), 0, false),
            group,
            serving: Some((stop, task)),
        }
    }

    /// Stops serving and serves again from the same folder, on other ports.
    pub async fn restart(mut self) -> Self {
        self.stop().await;
        let Self { folder, clock, ca, store, group, .. } = self;
        let front = (ca.limits.clone(), ca.trusted_proxies.clone());
        drop((ca, store));
        Self::serve(folder, clock, group, front).await
    }

    pub async fn stop(&mut self) {
        if let Some((stop, task)) = self.serving.take() {
            let _ = stop.send(());
            task.await.unwrap();
        }
    }

    /// Has every certificate judged, the audit log checked, and stops.
    pub async fn finish(mut self) {
        judge::every_certificate(&*self.store, self.clock.now()).await;
        self.store.verify_audit_chain().await.unwrap();
        self.stop().await;
    }

    pub async fn cluster(&self, cluster: &str, max_job: Duration) -> v1::Cluster {
        let request = v1::CreateClusterRequest {
            cluster: cluster.to_owned(),
            life: Some(Life::MaxJobSeconds(max_job.as_secs().try_into().unwrap())),
        };
        clusters::create(&self.ca, &self.operator, request).await.unwrap()
    }

    pub async fn set(&self, cluster: &str, change: &str) -> v1::SetClusterResponse {
        let request = v1::SetClusterRequest {
            cluster: cluster.to_owned(),
            changes: vec![change.to_owned()],
            dry_run: false,
        };
        clusters::set(&self.ca, &self.operator, request).await.unwrap()
    }

    /// A token with ranges that hold 10.0.0.0/8.
    pub async fn token(&self, cluster: &str, role: v1::Role, uses: u32) -> String {
        self.token_with(v1::CreateTokenRequest {
            cluster: cluster.to_owned(),
            role: role.into(),
            uses,
            address_ranges: vec!["10.0.0.0/8".to_owned()],
            ..v1::CreateTokenRequest::default()
        })
        .await
    }

    /// A worker's token for one exact name, at any address.
    pub async fn token_for(&self, cluster: &str, name: &str) -> String {
        self.token_with(v1::CreateTokenRequest {
            cluster: cluster.to_owned(),
            role: v1::Role::Worker.into(),
            node_names: vec![name.to_owned()],
            any_address: true,
            ..v1::CreateTokenRequest::default()
        })
        .await
    }

    pub async fn token_with(&self, request: v1::CreateTokenRequest) -> String {
        tokens::create(&self.ca, &self.operator, request).await.unwrap().bootstrap_token
    }

    /// Writes a join file as `ca-admin token create` does.
    pub fn write_join(&self, cluster: &str, token: &str, path: &Path) {
        let target = self.target(self.enrollment);
        let join = JoinFile {
            trust_domain: TRUST_DOMAIN.parse().unwrap(),
            cluster: cluster.parse().unwrap(),
            enrollment_endpoints: target.endpoints,
            node_endpoints: vec![self.nodes.to_string()],
            control_roots: target.control_roots,
            token: token.parse().unwrap(),
        };
        durable::create(path, join.to_text().expose_secret().as_bytes(), Access::PRIVATE).unwrap();
    }

    pub async fn tokens(&self, cluster: &str) -> Vec<v1::Token> {
        let request = v1::ListTokensRequest { cluster: cluster.to_owned(), page: String::new() };
        tokens::list(&self.ca, &self.operator, request).await.unwrap().tokens
    }

    pub async fn revoke(&self, cluster: &str, name: &str) -> v1::RevokeNodeResponse {
        let request = v1::RevokeNodeRequest {
            cluster: cluster.to_owned(),
            name: name.to_owned(),
            reason: "stolen".to_owned(),
            keep_token: false,
            all_traffic: false,
        };
        nodes::revoke(&self.ca, &self.operator, request).await.unwrap()
    }

    pub async fn node(&self, cluster: &str, name: &str) -> v1::Node {
        let request = v1::GetNodeRequest { cluster: cluster.to_owned(), name: name.to_owned() };
        nodes::show(&self.ca, &self.operator, request).await.unwrap()
    }

    /// Where the enrolment listener is and what it must prove.
    pub fn target(&self, endpoint: SocketAddr) -> Target {
        let control = self.ca.authority(&ca_server::store::Authority::Control).unwrap();
        Target {
            endpoints: vec![endpoint.to_string()],
            trust_domain: TRUST_DOMAIN.parse().unwrap(),
            control_roots: vec![control.root_der.clone().into()],
            control_crls: Vec::new(),
            source: None,
        }
    }

    pub fn enrollment_client(&self) -> EnrollmentClient {
        let target = self.target(self.enrollment);
        EnrollmentClient::new(&target, limits(), Arc::new(self.clock.clone())).unwrap()
    }

    pub fn node_client(&self, identity: &Identity) -> NodeClient {
        let target = self.target(self.nodes);
        NodeClient::new(&target, identity, limits(), Arc::new(self.clock.clone())).unwrap()
    }

    pub async fn enroll(
        &self,
        request: v1::EnrollRequest,
        key: PrivateKey,
    ) -> Result<Member, CallError> {
        let answer = self.enrollment_client().enroll(request).await?;
        let identity = Identity::new(key, answer.identity.clone().unwrap()).unwrap();
        let client = self.node_client(&identity);
        Ok(Member { name: answer.node_name.clone(), answer, identity, client })
    }

    /// A worker enrolled with a token of its own.
    pub async fn worker(&self, cluster: &str, name: &str, address: &str) -> Member {
        let token = self.token(cluster, v1::Role::Worker, 1).await;
        let key = PrivateKey::generate().unwrap();
        self.enroll(ask(&token, cluster, name, &[address], &key), key).await.unwrap()
    }
}

/// An enrolment of a worker.
pub fn ask(
    token: &str,
    cluster: &str,
    name: &str,
    addresses: &[&str],
    key: &PrivateKey,
) -> v1::EnrollRequest {
    v1::EnrollRequest {
        credential: Some(Credential::BootstrapToken(token.to_owned())),
        cluster: cluster.to_owned(),
        role: v1::Role::Worker.into(),
        node_name: name.to_owned(),
        addresses: addresses.iter().map(|&address| address.to_owned()).collect(),
        dns_names: Vec::new(),
        csr_der: key.csr_der().unwrap(),
        shared_address: false,
        once: false,
    }
}

/// A leaf of a node, for all that is bound to it.
pub fn node_leaf(key: &PrivateKey) -> v1::IssueLeafRequest {
    v1::IssueLeafRequest {
        csr_der: key.csr_der().unwrap(),
        purpose: v1::LeafPurpose::Node.into(),
        addresses: Vec::new(),
        dns_names: Vec::new(),
    }
}

/// The `[limits]` table of a configuration that limits nothing: for what measures something else.
#[must_use]
pub fn no_limits() -> String {
    let keys = Limits::highest().table();
    keys.iter()
        .fold("[limits]\n".to_owned(), |text, (key, value)| text + &format!("{key} = {value}\n"))
}

/// The reason word of a refused call.
pub fn word(result: Result<impl Sized, CallError>) -> &'static str {
    result.err().map_or("OK", |error| error.word())
}

pub fn limits() -> CallLimits {
    CallLimits {
        connect: Duration::from_secs(10),
        call: Duration::from_secs(30),
        sync_wait: Duration::from_secs(5),
    }
}

/// The machine's time: other programs (OpenSSL) judge the certificates too.
#[allow(clippy::disallowed_methods, reason = "where the tests' own clocks begin")]
fn start_time() -> OffsetDateTime {
    OffsetDateTime::now_utc()
}
