//! A CA for tests: real TLS, real certificates, no store and no policy. It answers what a test tells
//! it to, so that the agent can be shown what a real CA never does.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    path::Path,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use raymtls_proto::{
    clock::{Clock, SystemClock, TlsTime},
    durable::{self, Access},
    identity::{Subject, TrustDomain},
    join::{Credential, JoinFile},
    leaf::LeafFacts,
    reason::Reason,
    serial::Serial,
    token::{BootstrapToken, TokenId},
    v1::{
        self,
        enrollment_service_server::{EnrollmentService, EnrollmentServiceServer},
        node_service_server::{NodeService, NodeServiceServer},
    },
};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, SanType, SerialNumber,
    SubjectPublicKeyInfo,
};
use rustls::{RootCertStore, ServerConfig, server::WebPkiClientVerifier};
use secrecy::ExposeSecret;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Request, Response, Status,
    transport::{Server, server::Connected},
};
use tonic_types::{ErrorDetails, StatusExt};
use x509_parser::prelude::{FromDer, X509CertificationRequest};

/// Who the TLS server of the CA says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Face {
    /// The CA.
    Ca,
    /// An agent identity under the right root.
    AgentIdentity,
    /// The right name under another root.
    OtherRoot,
}

type Issuer = CertifiedIssuer<'static, KeyPair>;

/// What tests turn.
#[derive(Debug)]
pub(crate) struct Knobs {
    pub(crate) leaf_life: Duration,
    pub(crate) identity_life: Duration,
    pub(crate) refuse: Option<Reason>,
    /// Refuses the next call with an identity, and that one only.
    pub(crate) refuse_next: Option<Reason>,
    pub(crate) refuse_leaf: Option<Reason>,
    /// Certifies this address besides those asked for.
    pub(crate) extra_address: Option<IpAddr>,
    /// Certifies another key.
    pub(crate) other_key: bool,
    /// Does everything and loses the reply.
    pub(crate) lose_replies: bool,
    pub(crate) ray_token: bool,
    pub(crate) directives: Vec<v1::Directive>,
    pub(crate) version: u64,
    pub(crate) mode: v1::Mode,
    /// Stands in the settings whatever this release knows of it.
    pub(crate) raw_mode: Option<i32>,
    pub(crate) raw_isolation: Option<i32>,
    /// Refuses calls with an identity with a word of a newer release.
    pub(crate) refuse_word: Option<&'static str>,
    pub(crate) control_crls: Vec<Vec<u8>>,
    /// The serial of a leaf, whatever stands in it.
    pub(crate) raw_serial: Option<[u8; 16]>,
    /// What the answers become at the last moment.
    pub(crate) bend_enrolment: Option<fn(&mut v1::EnrollResponse)>,
    pub(crate) bend_leaf: Option<fn(&mut v1::IssueLeafResponse)>,
    pub(crate) bend_sync: Option<fn(&mut v1::SyncResponse)>,
    /// Absent: of a release that knows no members.
    pub(crate) members: Option<Vec<v1::Member>>,
    /// Members in one answer; the version must be larger than the number of pages.
    pub(crate) page_len: usize,
    /// After so many pages it goes away.
    pub(crate) last_page: Option<usize>,
    pub(crate) blocks: Vec<v1::Block>,
    pub(crate) heads_applied: Option<u64>,
    pub(crate) lease_seconds: i64,
    pub(crate) port_plan: v1::PortPlan,
    /// Takes no new connection.
    pub(crate) deaf: bool,
}

pub(crate) struct TestCa {
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) knobs: Mutex<Knobs>,
    pub(crate) addr: SocketAddr,
    pub(crate) cluster_root_der: Vec<u8>,
    domain: TrustDomain,
    control: Issuer,
    control_root_der: Vec<u8>,
    cluster: Issuer,
    /// Certificates by key: the same key gets the same answer.
    identities: Mutex<HashMap<Vec<u8>, Vec<u8>>>,
    pub(crate) enrolments: AtomicUsize,
    pub(crate) leaves: AtomicUsize,
    /// Times a leaf was asked for, refused or not.
    pub(crate) leaf_calls: AtomicUsize,
    pub(crate) syncs: AtomicUsize,
    /// Each Sync's request and when it came.
    pub(crate) requests: Mutex<Vec<(std::time::Instant, v1::SyncRequest)>>,
    /// Bytes of application data that reached the server after its handshakes.
    pub(crate) bytes: AtomicUsize,
}

pub(crate) fn system_clock() -> Arc<dyn Clock> {
    Arc::new(SystemClock)
}

impl TestCa {
    pub(crate) async fn start(face: Face) -> Arc<Self> {
        Self::start_at(face, system_clock(), "127.0.0.1:0".parse().unwrap()).await
    }

    pub(crate) async fn start_at(face: Face, clock: Arc<dyn Clock>, addr: SocketAddr) -> Arc<Self> {
        let listener = TcpListener::bind(addr).await.unwrap();
        let (control_root_der, control) = authority("control", &*clock);
        let (cluster_root_der, cluster) = authority("c1", &*clock);
        let ca = Arc::new(Self {
            addr: listener.local_addr().unwrap(),
            clock,
            knobs: Mutex::new(Knobs {
                leaf_life: Duration::from_secs(3_600),
                identity_life: Duration::from_secs(30 * 24 * 3_600),
                refuse: None,
                refuse_next: None,
                refuse_leaf: None,
                extra_address: None,
                other_key: false,
                lose_replies: false,
                ray_token: true,
                directives: Vec::new(),
                version: 1,
                mode: v1::Mode::Files,
                raw_mode: None,
                raw_isolation: None,
                refuse_word: None,
                control_crls: Vec::new(),
                raw_serial: None,
                bend_enrolment: None,
                bend_leaf: None,
                bend_sync: None,
                members: None,
                page_len: usize::MAX,
                last_page: None,
                blocks: Vec::new(),
                heads_applied: None,
                lease_seconds: 0,
                port_plan: raymtls_proto::ports::default_plan(),
                deaf: false,
            }),
            requests: Mutex::default(),
            domain: "ray.example".parse().unwrap(),
            control_root_der,
            cluster_root_der,
            control,
            cluster,
            identities: Mutex::default(),
            enrolments: AtomicUsize::new(0),
            leaves: AtomicUsize::new(0),
            leaf_calls: AtomicUsize::new(0),
            syncs: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
        });
        tokio::spawn(ca.clone().serve(listener, face));
        ca
    }

    pub(crate) fn with<T>(&self, turn: impl FnOnce(&mut Knobs) -> T) -> T {
        turn(&mut self.knobs.lock().unwrap())
    }

    /// A join file for this CA.
    pub(crate) fn write_join(&self, path: &Path) {
        let join = JoinFile {
            trust_domain: self.domain.clone(),
            cluster: "c1".parse().unwrap(),
            enrollment_endpoints: vec![self.addr.to_string()],
            node_endpoints: vec![self.addr.to_string()],
            control_roots: vec![self.control_root_der.clone().into()],
            credential: Credential::Token(BootstrapToken::new(TokenId::new([1; 8]), [2; 32])),
        };
        let text = join.to_text();
        durable::replace(path, text.expose_secret().as_bytes(), Access::PRIVATE).unwrap();
    }

    async fn serve(self: Arc<Self>, listener: TcpListener, face: Face) {
        let acceptor = TlsAcceptor::from(Arc::new(self.server_config(face)));
        let (sender, incoming) = mpsc::channel(16);
        let router = Server::builder()
            .add_service(EnrollmentServiceServer::from_arc(self.clone()))
            .add_service(NodeServiceServer::from_arc(self.clone()));
        tokio::spawn(router.serve_with_incoming(ReceiverStream::new(incoming)));
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            if self.with(|k| k.deaf) {
                continue;
            }
            let (ca, acceptor, sender) = (self.clone(), acceptor.clone(), sender.clone());
            tokio::spawn(async move {
                let Ok(tls) = acceptor.accept(tcp).await else { return };
                if face == Face::Ca {
                    let _ = sender.send(Ok::<_, std::io::Error>(Connection(tls))).await;
                } else {
                    ca.count(tls).await;
                }
            });
        }
    }

    async fn count(&self, mut tls: TlsStream<TcpStream>) {
        let mut buffer = [0; 1024];
        while let Ok(read @ 1..) = tls.read(&mut buffer).await {
            self.bytes.fetch_add(read, Ordering::SeqCst);
        }
    }

    fn server_config(&self, face: Face) -> ServerConfig {
        let key = KeyPair::generate().unwrap();
        let other = authority("control", &*self.clock).1;
        let issuer = if face == Face::OtherRoot { &other } else { &self.control };
        let mut params = leaf_params(&*self.clock, Duration::from_secs(40 * 24 * 3_600));
        match face {
            Face::Ca | Face::OtherRoot => {
                let name = self.domain.server_name().try_into().unwrap();
                params.subject_alt_names = vec![SanType::DnsName(name)];
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            }
            Face::AgentIdentity => {
                // Even with the CA's name in it: the usage alone must be enough to refuse it.
                let name = self.domain.server_name().try_into().unwrap();
                params.subject_alt_names = vec![SanType::DnsName(name)];
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
            }
        }
        let certificate = params.signed_by(&key, issuer).unwrap();
        let chain = vec![certificate.der().clone(), issuer.der().clone()];
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(self.control_root_der.clone().into()).unwrap();
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
                .allow_unauthenticated()
                .build()
                .unwrap();
        let mut config =
            ServerConfig::builder_with_details(provider, Arc::new(TlsTime(self.clock.clone())))
                .with_protocol_versions(&[&rustls::version::TLS13])
                .unwrap()
                .with_client_cert_verifier(verifier)
                .with_single_cert(
                    chain,
                    rustls::pki_types::PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
                )
                .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        config
    }

    fn refusal(&self) -> Result<(), Status> {
        self.with(|k| k.refuse).map_or(Ok(()), |reason| Err(reason.status("says the test", None)))
    }

    fn node_refusal(&self) -> Result<(), Status> {
        if let Some(word) = self.with(|k| k.refuse_word) {
            let info = ErrorDetails::with_error_info(word, "raymtls.v1", HashMap::new());
            let text = "a refusal of a newer release";
            return Err(Status::with_error_details(Code::PermissionDenied, text, info));
        }
        if let Some(reason) = self.with(|k| k.refuse_next.take()) {
            return Err(reason.status("says the test, once", None));
        }
        self.refusal()
    }

    fn reply<T>(&self, message: T) -> Result<Response<T>, Status> {
        if self.with(|k| k.lose_replies) {
            return Err(Status::unavailable("the reply was lost"));
        }
        Ok(Response::new(message))
    }

    fn identity(&self, csr_der: &[u8], node: &str) -> v1::CertificateChain {
        let spki = spki_of(csr_der);
        let life = self.with(|k| k.identity_life);
        let mut identities = self.identities.lock().unwrap();
        let leaf_der = identities.entry(spki.clone()).or_insert_with(|| {
            let mut params = leaf_params(&*self.clock, life);
            let subject = Subject::Agent("c1".parse().unwrap(), node.parse().unwrap());
            let uri = subject.uri(&self.domain).try_into().unwrap();
            params.subject_alt_names = vec![SanType::URI(uri)];
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
            sign(params, &spki, &self.control)
        });
        chain(leaf_der.clone(), &self.control)
    }

    fn leaf(&self, request: &v1::IssueLeafRequest, node: &str) -> v1::CertificateChain {
        self.leaves.fetch_add(1, Ordering::SeqCst);
        let (life, extra, other_key) = self.with(|k| (k.leaf_life, k.extra_address, k.other_key));
        let mut params = leaf_params(&*self.clock, life);
        if let Some(serial) = self.with(|k| k.raw_serial) {
            params.serial_number = Some(SerialNumber::from_slice(&serial));
        }
        let (cluster, name) = ("c1".parse().unwrap(), node.parse().unwrap());
        let driver = request.purpose() == v1::LeafPurpose::Driver;
        let subject = if driver {
            Subject::RayDriver(cluster, name)
        } else {
            Subject::RayNode(cluster, name)
        };
        let asked = request.addresses.iter().map(|a| a.parse::<IpAddr>().unwrap());
        let mut addresses: Vec<IpAddr> = asked.chain(extra).collect();
        if !driver {
            addresses.extend(["127.0.0.1".parse::<IpAddr>().unwrap(), "::1".parse().unwrap()]);
        }
        params.subject_alt_names =
            vec![SanType::URI(subject.uri(&self.domain).try_into().unwrap())];
        params.subject_alt_names.extend(addresses.into_iter().map(SanType::IpAddress));
        let localhost = (!driver).then_some("localhost");
        for name in request.dns_names.iter().map(String::as_str).chain(localhost) {
            params.subject_alt_names.push(SanType::DnsName(name.try_into().unwrap()));
        }
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let spki = if other_key {
            rcgen::PublicKeyData::subject_public_key_info(&KeyPair::generate().unwrap())
        } else {
            spki_of(&request.csr_der)
        };
        chain(sign(params, &spki, &self.cluster), &self.cluster)
    }

    fn bundle(&self) -> v1::TrustBundle {
        v1::TrustBundle { roots_der: vec![self.cluster_root_der.clone()], crls_der: vec![] }
    }

    fn settings(&self) -> v1::Settings {
        let (life, ray_token) = self.with(|k| (k.leaf_life, k.ray_token));
        let (mode, isolation) =
            self.with(|k| (k.raw_mode.unwrap_or_else(|| k.mode.into()), k.raw_isolation));
        v1::Settings {
            leaf_life_seconds: i64::try_from(life.as_secs()).unwrap(),
            mode,
            isolation: isolation.unwrap_or_else(|| v1::Isolation::Off.into()),
            ray_token,
            port_plan: Some(self.with(|k| k.port_plan)),
            lease_seconds: self.with(|k| k.lease_seconds),
            ..v1::Settings::default()
        }
    }

    fn heads_are_at(&self, request: &v1::SyncRequest) -> bool {
        let heads = self.with(|k| k.heads_applied);
        request.heads_applied.is_some_and(|wanted| heads >= Some(wanted.counter))
    }

    /// Members page by page, each page but the last of a version of its own; blocks with the first.
    fn add_members(&self, answer: &mut v1::SyncResponse, have: Option<v1::SyncVersion>) {
        let (members, page_len, version, blocks) =
            self.with(|k| (k.members.clone(), k.page_len, k.version, k.blocks.clone()));
        let Some(members) = members else { return };
        let pages: Vec<_> = members.chunks(page_len).collect();
        let have = have.map(|have| have.counter);
        if have == Some(version) {
            return;
        }
        let page = have.and_then(|have| usize::try_from(have).ok()).filter(|h| *h < pages.len());
        let snapshot = have.is_none();
        let page = page.unwrap_or_default();
        let members = pages.get(page).map(|page| page.to_vec()).unwrap_or_default();
        let more = page + 1 < pages.len();
        answer.members = Some(v1::Members { snapshot, members, more });
        if page == 0 {
            answer.blocks = Some(v1::Blocks { blocks });
        }
        if more {
            let counter = u64::try_from(page + 1).unwrap();
            answer.version = Some(v1::SyncVersion { counter, ..self.version() });
        }
    }

    fn version(&self) -> v1::SyncVersion {
        v1::SyncVersion { epoch: 7, counter: self.with(|k| k.version) }
    }
}

#[tonic::async_trait]
impl EnrollmentService for TestCa {
    async fn enroll(
        &self,
        request: Request<v1::EnrollRequest>,
    ) -> Result<Response<v1::EnrollResponse>, Status> {
        self.enrolments.fetch_add(1, Ordering::SeqCst);
        self.refusal()?;
        let request = request.into_inner();
        let identity = self.identity(&request.csr_der, &request.node_name);
        let mut answer = v1::EnrollResponse {
            node_name: request.node_name,
            addresses: request.addresses,
            dns_names: request.dns_names,
            identity: Some(identity),
            settings: Some(self.settings()),
            bundle: Some(self.bundle()),
            server_time_unix: self.clock.now().unix_timestamp(),
        };
        if let Some(bend) = self.with(|k| k.bend_enrolment) {
            bend(&mut answer);
        }
        self.reply(answer)
    }
}

#[tonic::async_trait]
impl NodeService for TestCa {
    async fn renew_identity(
        &self,
        request: Request<v1::RenewIdentityRequest>,
    ) -> Result<Response<v1::RenewIdentityResponse>, Status> {
        self.node_refusal()?;
        let identity = self.identity(&request.into_inner().csr_der, "n1");
        self.reply(v1::RenewIdentityResponse {
            identity: Some(identity),
            server_time_unix: self.clock.now().unix_timestamp(),
        })
    }

    async fn issue_leaf(
        &self,
        request: Request<v1::IssueLeafRequest>,
    ) -> Result<Response<v1::IssueLeafResponse>, Status> {
        self.leaf_calls.fetch_add(1, Ordering::SeqCst);
        self.node_refusal()?;
        if let Some(reason) = self.with(|k| k.refuse_leaf) {
            return Err(reason.status("says the test", None));
        }
        let leaf = self.leaf(&request.into_inner(), "n1");
        let mut answer = v1::IssueLeafResponse {
            leaf: Some(leaf),
            bundle: Some(self.bundle()),
            server_time_unix: self.clock.now().unix_timestamp(),
        };
        if let Some(bend) = self.with(|k| k.bend_leaf) {
            bend(&mut answer);
        }
        self.reply(answer)
    }

    async fn sync(
        &self,
        request: Request<v1::SyncRequest>,
    ) -> Result<Response<v1::SyncResponse>, Status> {
        self.syncs.fetch_add(1, Ordering::SeqCst);
        let request = request.into_inner();
        self.requests.lock().unwrap().push((std::time::Instant::now(), request.clone()));
        let mut left = request.wait_seconds * 100;
        while request.have == Some(self.version()) && left > 0 && !self.heads_are_at(&request) {
            self.node_refusal()?;
            tokio::time::sleep(Duration::from_millis(10)).await;
            left -= 1;
        }
        self.node_refusal()?;
        let have = request.have.and_then(|have| usize::try_from(have.counter).ok());
        if have.is_some()
            && have > self.with(|k| k.last_page)
            && self.with(|k| k.last_page).is_some()
        {
            self.with(|k| k.deaf = true);
            return Err(Status::unavailable("away"));
        }
        let mut answer = v1::SyncResponse {
            version: Some(self.version()),
            settings: Some(self.settings()),
            bundle: Some(self.bundle()),
            ray_token: self.with(|k| k.ray_token).then(|| v1::RayToken { token: b"t0ken".into() }),
            control_crl: Some(v1::ControlCrl { crls_der: self.with(|k| k.control_crls.clone()) }),
            directives: self.with(|k| k.directives.clone()),
            server_time_unix: self.clock.now().unix_timestamp(),
            heads_applied: self
                .with(|k| k.heads_applied)
                .map(|counter| v1::SyncVersion { epoch: 7, counter }),
            ..Default::default()
        };
        self.add_members(&mut answer, request.have);
        if let Some(bend) = self.with(|k| k.bend_sync) {
            bend(&mut answer);
        }
        self.reply(answer)
    }

    async fn leave(
        &self,
        _: Request<v1::LeaveRequest>,
    ) -> Result<Response<v1::LeaveResponse>, Status> {
        self.node_refusal()?;
        self.reply(v1::LeaveResponse {})
    }
}

/// A TLS connection as tonic wants it.
struct Connection(TlsStream<TcpStream>);

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buffer)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

fn authority(name: &str, clock: &dyn Clock) -> (Vec<u8>, Issuer) {
    let key = KeyPair::generate().unwrap();
    let root = CertifiedIssuer::self_signed(ca_params(&format!("{name} root"), clock, None), key);
    let root = root.unwrap();
    let params = ca_params(&format!("{name} issuer"), clock, Some(0));
    let issuer = CertifiedIssuer::signed_by(params, KeyPair::generate().unwrap(), &root).unwrap();
    (root.der().to_vec(), issuer)
}

fn ca_params(name: &str, clock: &dyn Clock, path_len: Option<u8>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = clock.now() - Duration::from_secs(3_600);
    params.not_after = clock.now() + Duration::from_secs(3650 * 24 * 3_600);
    params.is_ca =
        IsCa::Ca(path_len.map_or(BasicConstraints::Unconstrained, BasicConstraints::Constrained));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn leaf_params(clock: &dyn Clock, life: Duration) -> CertificateParams {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let now = clock.now();
    let count = u64::try_from(COUNT.fetch_add(1, Ordering::SeqCst)).unwrap();
    let mut random = [0; 10];
    // The last bytes decide the jitter: none here, so that tests can count seconds.
    random[..6].copy_from_slice(&count.to_be_bytes()[2..]);
    let unix_ms = u64::try_from(now.unix_timestamp_nanos() / 1_000_000).unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.serial_number = Some(SerialNumber::from_slice(Serial::new(unix_ms, random).as_bytes()));
    params.not_before = now - Duration::from_secs(600);
    params.not_after = now + life;
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    params
}

fn sign(params: CertificateParams, spki_der: &[u8], issuer: &Issuer) -> Vec<u8> {
    let key = SubjectPublicKeyInfo::from_der(spki_der).unwrap();
    let der = params.signed_by(&key, issuer).unwrap().der().to_vec();
    LeafFacts::parse(&der).unwrap();
    der
}

fn chain(leaf_der: Vec<u8>, issuer: &Issuer) -> v1::CertificateChain {
    v1::CertificateChain { leaf_der, issuers_der: vec![issuer.der().to_vec()] }
}

fn spki_of(csr_der: &[u8]) -> Vec<u8> {
    let (_, csr) = X509CertificationRequest::from_der(csr_der).unwrap();
    csr.verify_signature().unwrap();
    csr.certification_request_info.subject_pki.raw.to_vec()
}
