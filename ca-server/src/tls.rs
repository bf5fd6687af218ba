//! TLS under the gRPC listeners: TLS 1.3 only, no tickets (a resumed session would skip the client
//! verifier), one provider, one clock. Each handshake runs in a task of its own, so that a stalled
//! one holds up no other; once a listener has as many of them at once as it may, the next ones wait
//! until one is through or its time is up (`HANDSHAKES_MAX`, `HANDSHAKE_TIME_MAX`).

use std::{
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::Duration,
};

use arc_swap::ArcSwap;
use prometheus_client::metrics::gauge::Gauge;
use raymtls_proto::{
    address::NodeAddress,
    clock::{Clock, TlsTime},
    identity::Subject,
    leaf::LeafFacts,
};
use rcgen::{KeyPair, PublicKeyData};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    version::TLS13,
};
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use crate::{
    ca::Ca,
    keys::{profile::Contents, random, signer::SignError},
    refusal::Refusal,
    store::{Authority, Caller},
};

/// A handshake that takes longer is dropped.
const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(5);
/// Handshakes of one listener at once.
const HANDSHAKES_MAX: usize = 64;
/// Connections of one listener at once.
const CONNECTIONS_MAX: usize = 16_384;
/// Connections that are through and wait to be served.
const READY_MAX: usize = 64;
/// Pause after a failed accept (out of file descriptors), so that the loop neither spins nor dies.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Silence after which the system probes a connection's other end.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(60);

/// A listener's TLS configuration, swapped as a whole.
pub type SharedConfig = Arc<ArcSwap<ServerConfig>>;

/// Why there is no TLS configuration.
#[derive(Debug, Error)]
pub enum TlsError {
    /// The server's certificate could not be signed.
    #[error(transparent)]
    Sign(#[from] SignError),
    /// The library.
    #[error("TLS: {0}")]
    Rustls(#[from] rustls::Error),
    /// The library's client verifier.
    #[error("TLS client verifier: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
    /// Key generation.
    #[error("key generation: {0}")]
    Key(#[from] rcgen::Error),
    /// There is no control authority.
    #[error(transparent)]
    Authority(#[from] Refusal),
}

/// Both TLS listeners' configurations, made anew from the control authority.
#[derive(Debug)]
pub struct Configs {
    /// Server-authenticated.
    pub enrollment: Arc<ServerConfig>,
    /// Mutual.
    pub nodes: Arc<ServerConfig>,
    /// When the server's certificate ends, in seconds since 1970.
    pub ends_unix: i64,
}

/// Makes a server key and certificate and the configurations with it. The key never leaves memory.
///
/// # Errors
/// See [`TlsError`].
pub fn configs(ca: &Ca) -> Result<Configs, TlsError> {
    let now = ca.clock.now();
    let control = ca.authority(&Authority::Control)?;
    let key = KeyPair::generate()?;
    let contents = Contents::ca_server(random::serial(now), now, &ca.trust_domain);
    let signed = control.active().sign(&contents, &key.subject_public_key_info(), now)?;
    let chain = vec![signed.certificate_der.into(), control.active().certificate_der().clone()];
    let mut roots = RootCertStore::empty();
    // An identity is signed by one of our own issuers: trusting them as they are saves the signature
    // between issuer and root in each handshake.
    for issuer in control.issuers() {
        roots.add(issuer.certificate_der().clone())?;
    }
    roots.add(CertificateDer::from(control.root_der.clone()))?;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build()?;
    let pkcs8 = || PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let enrollment =
        builder(&ca.clock)?.with_no_client_auth().with_single_cert(chain.clone(), pkcs8())?;
    let nodes =
        builder(&ca.clock)?.with_client_cert_verifier(verifier).with_single_cert(chain, pkcs8())?;
    Ok(Configs {
        enrollment: finish(enrollment),
        nodes: finish(nodes),
        ends_unix: signed.not_after_ms / 1_000,
    })
}

fn builder(
    clock: &Arc<dyn Clock>,
) -> Result<rustls::ConfigBuilder<ServerConfig, rustls::WantsVerifier>, rustls::Error> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    ServerConfig::builder_with_details(provider, Arc::new(TlsTime(Arc::clone(clock))))
        .with_protocol_versions(&[&TLS13])
}

fn finish(mut config: ServerConfig) -> Arc<ServerConfig> {
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Arc::new(config)
}

/// What is known of the other side of a connection, once the handshake is through.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Address the connection comes from.
    pub address: IpAddr,
    /// Its certificate, which chains to the control authority; `None` on the enrolment listener.
    identity: Option<Arc<Identity>>,
}

impl Peer {
    /// Canonical source address, if a node can be known by it.
    #[must_use]
    pub fn source(&self) -> Option<NodeAddress> {
        NodeAddress::new(self.address).ok()
    }

    /// The agent whose identity the connection presented.
    ///
    /// # Errors
    /// `IdentityUnknown` for any other certificate of the control authority.
    pub fn caller(&self, ca: &Ca) -> Result<Caller, Refusal> {
        let identity = self.identity.as_ref().ok_or(Refusal::IdentityUnknown)?;
        identity.caller.get_or_init(|| self.read(&identity.certificate, ca)).clone()
    }

    fn read(&self, certificate: &[u8], ca: &Ca) -> Result<Caller, Refusal> {
        let facts = LeafFacts::parse(certificate).map_err(|_| Refusal::IdentityUnknown)?;
        let [uri] = facts.uris.as_slice() else { return Err(Refusal::IdentityUnknown) };
        match Subject::parse(uri, &ca.trust_domain) {
            Ok(Subject::Agent(cluster, node)) => {
                Ok(Caller { cluster, node, serial: facts.serial, source: self.source() })
            }
            Ok(Subject::Admin(_) | Subject::RayNode(..) | Subject::RayDriver(..)) | Err(_) => {
                Err(Refusal::IdentityUnknown)
            }
        }
    }
}

/// The certificate of a connection's other side, and the agent in it: read at the first call.
#[derive(Debug)]
struct Identity {
    certificate: CertificateDer<'static>,
    caller: OnceLock<Result<Caller, Refusal>>,
}

/// A connection that is through its handshake.
#[derive(Debug)]
pub struct Connection {
    stream: TlsStream<TcpStream>,
    peer: Peer,
    open: Gauge,
    // Given back when the connection ends.
    _permit: tokio::sync::OwnedSemaphorePermit,
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.open.dec();
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Accepts connections for as long as somebody takes them.
pub async fn accept(
    ca: Arc<Ca>,
    name: &'static str,
    listener: TcpListener,
    config: SharedConfig,
    ready: mpsc::Sender<io::Result<Connection>>,
) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let handshake = tokio::select! {
            permit = Arc::clone(&handshakes).acquire_owned() => {
                permit.expect("the semaphore is never closed")
            }
            () = ready.closed() => return,
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = ready.closed() => return,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(listener = name, %error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&connections).try_acquire_owned() else {
            ca.metrics.handshake_failed(name, "too_many_connections");
            continue;
        };
        let acceptor = TlsAcceptor::from(config.load_full());
        let (ca, ready) = (Arc::clone(&ca), ready.clone());
        tokio::spawn(async move {
            let connection = shake_hands(&ca, name, acceptor, stream, address, permit).await;
            drop(handshake);
            if let Some(connection) = connection {
                // A closed channel means that the server is stopping.
                let _ = ready.send(Ok(connection)).await;
            }
        });
    }
}

/// The channel between the accept loop and the server.
#[must_use]
pub fn ready_channel()
-> (mpsc::Sender<io::Result<Connection>>, mpsc::Receiver<io::Result<Connection>>) {
    mpsc::channel(READY_MAX)
}

async fn shake_hands(
    ca: &Ca,
    name: &'static str,
    acceptor: TlsAcceptor,
    stream: TcpStream,
    address: SocketAddr,
    permit: tokio::sync::OwnedSemaphorePermit,
) -> Option<Connection> {
    let keepalive = rustix::net::sockopt::set_socket_keepalive(&stream, true)
        .and_then(|()| rustix::net::sockopt::set_tcp_keepidle(&stream, KEEPALIVE_AFTER));
    if let Err(error) = stream.set_nodelay(true).and_then(|()| keepalive.map_err(Into::into)) {
        debug!(listener = name, %address, %error, "socket options");
    }
    match tokio::time::timeout(HANDSHAKE_TIME_MAX, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => {
            let identity = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
            let identity = identity.map(|leaf| {
                let certificate = leaf.clone().into_owned();
                Arc::new(Identity { certificate, caller: OnceLock::new() })
            });
            let open = ca.metrics.connections(name);
            open.inc();
            let peer = Peer { address: address.ip().to_canonical(), identity };
            Some(Connection { stream, peer, open, _permit: permit })
        }
        Ok(Err(error)) => {
            ca.metrics.handshake_failed(name, "refused");
            debug!(listener = name, %address, %error, "handshake refused");
            None
        }
        Err(_) => {
            ca.metrics.handshake_failed(name, "timed_out");
            debug!(listener = name, %address, "handshake timed out");
            None
        }
    }
}
