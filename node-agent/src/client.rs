//! Calls to the CA. TLS 1.3 with the control root of the join file and one fixed server name,
//! whatever endpoint is dialled; no tickets; every wait has an end. No request byte leaves before
//! the server's certificate has been verified.

mod knock;

pub use knock::knock;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use raymtls_proto::{
    clock::{Clock, TlsTime},
    identity::TrustDomain,
    reason::{self, Reaction, Reason},
    span::Span,
    v1::{
        self, enrollment_service_client::EnrollmentServiceClient,
        node_service_client::NodeServiceClient,
    },
};
use rustls::{
    CertificateError, ClientConfig,
    client::{Resumption, WebPkiServerVerifier},
    pki_types::{CertificateDer, CertificateRevocationListDer, ServerName},
};
use thiserror::Error;
use tokio::net::{TcpSocket, TcpStream, lookup_host};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint},
};

use crate::{statedir::Identity, verify};

/// Bounds of every call.
#[derive(Clone, Copy, Debug)]
pub struct CallLimits {
    /// TCP and TLS to one endpoint.
    pub connect: Duration,
    /// One call, connecting included.
    pub call: Duration,
    /// How long a Sync asks the CA to wait.
    pub sync_wait: Duration,
}

impl Default for CallLimits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            call: Duration::from_secs(15),
            sync_wait: Duration::from_secs(50),
        }
    }
}

/// Largest answer, in bytes: CRLs grow.
const ANSWER_LEN_MAX: usize = 16 * 1024 * 1024;
/// Largest request, in bytes.
const REQUEST_LEN_MAX: usize = 64 * 1024;
/// A waiting call notices a dead connection after these two.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a call gave no answer.
#[derive(Clone, Debug, Error)]
pub enum CallError {
    /// No endpoint could be reached, or the connection broke.
    #[error("the CA cannot be reached: {0}")]
    Away(String),
    /// Something answers that is not the CA. Nothing was sent to it.
    #[error(
        "what answers is not the CA of this deployment, nothing was sent to it: {0}; \
         compare the endpoints, the join file and the clock of this machine"
    )]
    Untrusted(String),
    /// The certificate of what answers is over, or not valid yet: mostly the clock of this host is
    /// wrong. Nothing was sent.
    #[error("nothing was sent to the CA: {0}")]
    Clock(String),
    /// The CA said no, or failed.
    #[error("{}", refusal_text(*reason, message))]
    Refused {
        /// The reason word, where it is one this program knows.
        reason: Option<Reason>,
        /// The CA's sentence.
        message: String,
        /// How long it asks to wait.
        retry_after: Option<Duration>,
    },
    /// Cannot be asked: our own configuration.
    #[error("cannot set up TLS: {0}")]
    Setup(String),
}

impl CallError {
    /// What an agent does about it.
    #[must_use]
    pub fn reaction(&self) -> Reaction {
        match self {
            Self::Away(_) | Self::Untrusted(_) | Self::Clock(_) | Self::Setup(_) => Reaction::Retry,
            Self::Refused { reason, .. } => reason.map_or(Reaction::Retry, Reason::reaction),
        }
    }

    /// The reason word, or what stands for it.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Away(_) => "CA_AWAY",
            Self::Untrusted(_) => "CA_UNTRUSTED",
            Self::Clock(_) => "CLOCK",
            Self::Setup(_) => "SETUP",
            Self::Refused { reason, .. } => reason.map_or("UNKNOWN", Reason::as_str),
        }
    }

    /// How long the CA asks to wait.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused { retry_after, .. } => *retry_after,
            Self::Away(_) | Self::Untrusted(_) | Self::Clock(_) | Self::Setup(_) => None,
        }
    }
}

fn refusal_text(reason: Option<Reason>, message: &str) -> String {
    match reason {
        Some(reason) => format!("{}: {message}", reason.as_str()),
        None => format!("the CA answered: {message}"),
    }
}

/// Where the CA is and how to know it.
#[derive(Clone, Debug)]
pub struct Target {
    /// `host:port`, tried in order.
    pub endpoints: Vec<String>,
    /// Gives the one server name.
    pub trust_domain: TrustDomain,
    /// What its certificate must chain to.
    pub control_roots: Vec<CertificateDer<'static>>,
    /// What was revoked under those roots; may be empty.
    pub control_crls: Vec<Vec<u8>>,
    /// Address to dial from; `None` leaves it to the system.
    pub source: Option<IpAddr>,
}

/// The one call made without an identity.
#[derive(Debug)]
pub struct EnrollmentClient {
    grpc: EnrollmentServiceClient<Channel>,
    dialler: Dialler,
    limits: CallLimits,
}

impl EnrollmentClient {
    /// Prepares it; nothing is dialled yet.
    ///
    /// # Errors
    /// [`CallError::Setup`].
    pub fn new(
        target: &Target,
        limits: CallLimits,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, CallError> {
        let dialler = Dialler::new(target, None, limits, &[clock])?;
        let grpc = EnrollmentServiceClient::new(dialler.channel())
            .max_decoding_message_size(ANSWER_LEN_MAX)
            .max_encoding_message_size(REQUEST_LEN_MAX);
        Ok(Self { grpc, dialler, limits })
    }

    /// Turns a bootstrap token into an identity.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn enroll(
        &mut self,
        request: v1::EnrollRequest,
    ) -> Result<v1::EnrollResponse, CallError> {
        let call = self.grpc.enroll(with_deadline(request, self.limits.call));
        self.dialler.bounded(self.limits.call, call).await
    }
}

/// The calls made with an identity. Clones share one connection.
#[derive(Clone, Debug)]
pub struct NodeClient {
    grpc: NodeServiceClient<Channel>,
    dialler: Dialler,
    limits: CallLimits,
}

impl NodeClient {
    /// Prepares it; nothing is dialled yet.
    ///
    /// # Errors
    /// [`CallError::Setup`].
    pub fn new(
        target: &Target,
        identity: &Identity,
        limits: CallLimits,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, CallError> {
        Self::judged_by(target, identity, limits, &[clock])
    }

    /// The same, with a server that is good where its certificate is within its time by one of these
    /// clocks.
    ///
    /// # Errors
    /// [`CallError::Setup`].
    pub fn judged_by(
        target: &Target,
        identity: &Identity,
        limits: CallLimits,
        clocks: &[Arc<dyn Clock>],
    ) -> Result<Self, CallError> {
        let dialler = Dialler::new(target, Some(identity), limits, clocks)?;
        let grpc = NodeServiceClient::new(dialler.channel())
            .max_decoding_message_size(ANSWER_LEN_MAX)
            .max_encoding_message_size(REQUEST_LEN_MAX);
        Ok(Self { grpc, dialler, limits })
    }

    /// Where the last connection ended, at a server that proved to be the CA.
    #[must_use]
    pub fn reached(&self) -> Option<SocketAddr> {
        *self.dialler.0.reached.lock().expect("no code panics while it holds this")
    }

    /// The next identity.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn renew_identity(
        &self,
        csr_der: Vec<u8>,
    ) -> Result<v1::RenewIdentityResponse, CallError> {
        let request = with_deadline(v1::RenewIdentityRequest { csr_der }, self.limits.call);
        let mut grpc = self.grpc.clone();
        self.dialler.bounded(self.limits.call, grpc.renew_identity(request)).await
    }

    /// A Ray leaf.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn issue_leaf(
        &self,
        request: v1::IssueLeafRequest,
    ) -> Result<v1::IssueLeafResponse, CallError> {
        let request = with_deadline(request, self.limits.call);
        let mut grpc = self.grpc.clone();
        self.dialler.bounded(self.limits.call, grpc.issue_leaf(request)).await
    }

    /// Reports, and waits for news as long as the request says.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn sync(&self, request: v1::SyncRequest) -> Result<v1::SyncResponse, CallError> {
        let wait = Duration::from_secs(u64::from(request.wait_seconds));
        let bound = self.limits.call + wait;
        let request = with_deadline(request, bound);
        let mut grpc = self.grpc.clone();
        self.dialler.bounded(bound, grpc.sync(request)).await
    }

    /// Says that the node goes away for good.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn leave(&self) -> Result<v1::LeaveResponse, CallError> {
        let request = with_deadline(v1::LeaveRequest {}, self.limits.call);
        let mut grpc = self.grpc.clone();
        self.dialler.bounded(self.limits.call, grpc.leave(request)).await
    }
}

async fn connect(endpoint: &str, source: Option<IpAddr>) -> io::Result<TcpStream> {
    let Some(source) = source else { return TcpStream::connect(endpoint).await };
    let mut addresses = lookup_host(endpoint).await?;
    let address = addresses.find(|address| address.is_ipv4() == source.is_ipv4());
    let address = address.ok_or(io::ErrorKind::AddrNotAvailable)?;
    let socket = if source.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.bind((source, 0).into())?;
    socket.connect(address).await
}

fn with_deadline<T>(message: T, deadline: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    request
}

/// Dials the endpoints in order until one proves to be the CA.
#[derive(Clone)]
struct Dialler(Arc<DiallerInner>);

struct DiallerInner {
    source: Option<IpAddr>,
    /// It has no identity and dials the enrolment port.
    enrols: bool,
    endpoints: Vec<String>,
    server_name: ServerName<'static>,
    /// One for each clock the server's certificate is judged by.
    tls: Vec<TlsConnector>,
    limits: CallLimits,
    /// Why the last dial failed: tonic passes no typed error on.
    last_failure: Mutex<Option<DialFailure>>,
    reached: Mutex<Option<SocketAddr>>,
}

#[derive(Clone, Debug, Error)]
#[error("{text}")]
struct DialFailure {
    text: String,
    why: DialFault,
}

/// Follows on a connection that was made and then ended by the other side, without an answer. The
/// node port does so to whoever has no certificate.
const OTHER_PORT: &str = "; something answers there and ends the connection: if it does so again, it is \
                          not the enrolment port: compare enrollment_endpoints of the join file with \
                          enrollment_listen of ca-server";

/// What stood in the way, the gravest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum DialFault {
    Untrusted,
    Clock,
    Away,
}

impl Dialler {
    fn new(
        target: &Target,
        identity: Option<&Identity>,
        limits: CallLimits,
        clocks: &[Arc<dyn Clock>],
    ) -> Result<Self, CallError> {
        let server_name = ServerName::try_from(target.trust_domain.server_name())
            .map_err(|e| CallError::Setup(e.to_string()))?;
        let connector = |clock: &Arc<dyn Clock>| {
            let config = tls_config(target, identity, Arc::clone(clock))?;
            Ok(TlsConnector::from(Arc::new(config)))
        };
        let tls: Result<_, String> = clocks.iter().map(connector).collect();
        Ok(Self(Arc::new(DiallerInner {
            source: target.source,
            enrols: identity.is_none(),
            endpoints: target.endpoints.clone(),
            server_name,
            tls: tls.map_err(CallError::Setup)?,
            limits,
            last_failure: Mutex::new(None),
            reached: Mutex::new(None),
        })))
    }

    /// A channel that dials when it is used and again after the connection broke.
    fn channel(&self) -> Channel {
        let dialler = self.clone();
        let connector = tower::service_fn(move |_: http::Uri| {
            let dialler = dialler.clone();
            async move { dialler.dial().await.map(TokioIo::new) }
        });
        // A plain `http` address: TLS is ours. The origin is what the CA sees as :scheme and
        // :authority.
        let origin = format!("https://{}", self.0.server_name.to_str());
        Endpoint::from_static("http://ca")
            .origin(origin.parse().expect("a DNS name makes a valid URI"))
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .connect_with_connector_lazy(connector)
    }

    async fn dial(&self) -> Result<TlsStream<TcpStream>, DialFailure> {
        let mut failures = Vec::new();
        for endpoint in &self.0.endpoints {
            match self.dial_one(endpoint).await {
                Ok(stream) => {
                    self.remember(None);
                    *self.0.reached.lock().expect("no code panics while it holds this") =
                        stream.get_ref().0.peer_addr().ok();
                    return Ok(stream);
                }
                Err(failure) => failures.push(failure),
            }
        }
        let failure = DialFailure {
            text: failures.iter().map(|f| f.text.as_str()).collect::<Vec<_>>().join("; "),
            why: failures.iter().map(|f| f.why).min().unwrap_or(DialFault::Away),
        };
        self.remember(Some(failure.clone()));
        Err(failure)
    }

    /// A server whose certificate is outside its time by one clock is judged by the next.
    async fn dial_one(&self, endpoint: &str) -> Result<TlsStream<TcpStream>, DialFailure> {
        let mut last = None;
        for tls in &self.0.tls {
            match self.dial_judged(endpoint, tls).await {
                Err(failure) if failure.why == DialFault::Clock => last = Some(failure),
                other => return other,
            }
        }
        Err(last.expect("there is a clock to judge by"))
    }

    async fn dial_judged(
        &self,
        endpoint: &str,
        tls: &TlsConnector,
    ) -> Result<TlsStream<TcpStream>, DialFailure> {
        let away =
            |why: String| DialFailure { text: format!("{endpoint}: {why}"), why: DialFault::Away };
        let dial = async {
            let tcp = connect(endpoint, self.0.source).await.map_err(|e| away(e.to_string()))?;
            tcp.set_nodelay(true).map_err(|e| away(e.to_string()))?;
            let connect = tls.connect(self.0.server_name.clone(), tcp);
            connect.await.map_err(|e| {
                let mut failure = handshake_failure(endpoint, &e);
                if self.0.enrols && failure.why == DialFault::Away {
                    failure.text.push_str(OTHER_PORT);
                }
                failure
            })
        };
        let limit = self.0.limits.connect;
        tokio::time::timeout(limit, dial)
            .await
            .unwrap_or_else(|_| Err(away(format!("no answer in {} s", limit.as_secs()))))
    }

    async fn bounded<T>(
        &self,
        limit: Duration,
        call: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T, CallError> {
        self.remember(None);
        match tokio::time::timeout(limit, call).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(self.call_error(&status)),
            Err(_) => Err(CallError::Away(format!("no answer in {} s", limit.as_secs()))),
        }
    }

    /// What the answer itself says comes first: the last dial may have been another call's.
    fn call_error(&self, status: &Status) -> CallError {
        let reason = Reason::of(status);
        if reason.is_none()
            && let Some(failure) = self.last_failure()
        {
            return match failure.why {
                DialFault::Untrusted => CallError::Untrusted(failure.text),
                DialFault::Clock => CallError::Clock(failure.text),
                DialFault::Away => CallError::Away(failure.text),
            };
        }
        if reason.is_none() && is_transport(status.code()) {
            let mut text = with_sources(status);
            // A dial that failed would have been told: something listens there.
            if self.0.enrols && is_ended(status) {
                text.push_str(OTHER_PORT);
            }
            return CallError::Away(text);
        }
        CallError::Refused {
            reason,
            message: bounded_text(status.message()),
            retry_after: reason::retry_after(status),
        }
    }

    fn remember(&self, failure: Option<DialFailure>) {
        *self.0.last_failure.lock().expect("no code panics while it holds this") = failure;
    }

    fn last_failure(&self) -> Option<DialFailure> {
        self.0.last_failure.lock().expect("no code panics while it holds this").clone()
    }
}

impl std::fmt::Debug for Dialler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Dialler({:?})", self.0.endpoints)
    }
}

fn tls_config(
    target: &Target,
    identity: Option<&Identity>,
    clock: Arc<dyn Clock>,
) -> Result<ClientConfig, String> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = server_verifier(&target.control_roots, &target.control_crls)?;
    let builder = ClientConfig::builder_with_details(provider, Arc::new(TlsTime(clock)))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| e.to_string())?
        .with_webpki_verifier(verifier);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(identity) => builder
            .with_client_auth_cert(identity.chain.certificates(), identity.key.to_der())
            .map_err(|e| e.to_string())?,
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// What judges the CA's server. It also judges whether roots and CRLs are of use for that.
///
/// # Errors
/// The verifier's words.
pub(crate) fn server_verifier(
    roots: &[CertificateDer<'_>],
    crls_der: &[Vec<u8>],
) -> Result<Arc<WebPkiServerVerifier>, String> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let roots = Arc::new(verify::root_store(roots)?);
    let crls = crls_der.iter().cloned().map(CertificateRevocationListDer::from);
    WebPkiServerVerifier::builder_with_provider(roots, provider)
        .with_crls(crls)
        .allow_unknown_revocation_status()
        .build()
        .map_err(|e| e.to_string())
}

/// Tells a handshake that failed because of who answered, or because of a clock, from one that the
/// network broke.
fn handshake_failure(endpoint: &str, error: &io::Error) -> DialFailure {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    let (text, why) = match inner {
        Some(rustls::Error::InvalidCertificate(fault)) => match clock_fault(fault) {
            Some(text) => (text, DialFault::Clock),
            None => (error.to_string(), DialFault::Untrusted),
        },
        Some(_) | None => (error.to_string(), DialFault::Away),
    };
    DialFailure { text: format!("{endpoint}: {text}"), why }
}

/// The words for a certificate that is outside its time.
fn clock_fault(fault: &CertificateError) -> Option<String> {
    #[allow(clippy::wildcard_enum_match_arm, reason = "rustls adds variants")]
    let (bound, time, side) = match fault {
        CertificateError::NotValidYetContext { time, not_before } => (not_before, time, "behind"),
        CertificateError::ExpiredContext { time, not_after } => (not_after, time, "ahead of"),
        _ => return None,
    };
    let seconds = i64::try_from(bound.as_secs().abs_diff(time.as_secs())).unwrap_or(i64::MAX);
    Some(format!(
        "its certificate is not valid at the time this host's clock shows; this host's clock is at \
         least {} {side} the CA: set it right (`timedatectl status` shows it), or the CA's own",
        Span::seconds(seconds)
    ))
}

fn is_transport(code: Code) -> bool {
    matches!(code, Code::Unavailable | Code::Unknown | Code::DeadlineExceeded | Code::Cancelled)
}

/// Made here because the connection ended, and neither answered by the server nor out of time.
fn is_ended(status: &Status) -> bool {
    let mut source = std::error::Error::source(status);
    let has_source = source.is_some();
    while let Some(error) = source {
        if error.is::<tonic::TimeoutExpired>() {
            return false;
        }
        source = error.source();
    }
    has_source
}

/// A status with what lies under it: "transport error" alone helps nobody.
fn with_sources(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut source = std::error::Error::source(status);
    while let Some(error) = source.filter(|_| text.len() < 400) {
        let words = error.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        source = error.source();
    }
    bounded_text(&text)
}

fn bounded_text(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(500).collect()
}

#[cfg(test)]
mod tests;
