//! What a listening socket serves, found out by a handshake that presents the node's leaf. The
//! handshake is carried through to the first frames of HTTP/2 and ended in order, so that a process
//! of Ray sees a caller that changed its mind, and logs nothing. It judges no certificate: that is
//! `horizon`'s.

use std::{
    io,
    net::SocketAddr,
    ops::RangeInclusive,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use raymtls_proto::{
    clock::{Clock, TlsTime},
    v1,
};
use rustls::{
    AlertDescription, ClientConfig, DigitallySignedStruct, Error as TlsError, SignatureScheme,
    client::{
        ResolvesClientCert, Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    sign::CertifiedKey,
};
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::TcpStream,
    task::JoinSet,
    time::{Instant, timeout, timeout_at},
};
use tokio_rustls::TlsConnector;

use crate::keys::PrivateKey;

/// Bounds of asking.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// One socket, from dialling to the end.
    pub socket: Duration,
    /// All of them.
    pub total: Duration,
    /// Sockets asked at a time.
    pub at_once: usize,
    /// Bytes read from one socket.
    pub read_len_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            socket: Duration::from_secs(3),
            total: Duration::from_secs(30),
            at_once: 4,
            read_len_max: 64 * 1024,
        }
    }
}

/// Most certificates of a chain that are kept.
const CHAIN_LEN_MAX: usize = 8;
/// Most names of CAs that are kept.
const TRUSTS_MAX: usize = 32;
/// What a client of HTTP/2 says first, and empty SETTINGS (RFC 9113 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00";
/// GOAWAY without an error, before any stream (RFC 9113 6.8).
const GOAWAY: &[u8] = b"\x00\x00\x08\x07\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00";
/// Types of the records in which TLS travels (RFC 8446 5.1).
const RECORD_TYPES: RangeInclusive<u8> = 20..=23;

/// Why nobody can be asked.
#[derive(Debug, Error)]
#[error("cannot ask what Ray serves: {0}")]
pub struct SetupError(String);

/// What a socket answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It shook hands.
    Tls(Hello),
    /// It answers, and not in TLS: HTTP mostly.
    Plain,
    /// It gave no certificate that it can prove to be its own.
    NoCertificate(String),
    /// Nothing listens there any more, or a firewall says no.
    Refused(String),
    /// It did not come to an end in time.
    Timeout,
    /// There was no time left to ask.
    NotAsked,
}

/// What a handshake brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// What it serves, leaf first. It has proved to hold the leaf's key.
    pub chain: v1::CertificateChain,
    /// Names of the CAs whose certificates it accepts, DER; empty where it names none or asks for no
    /// certificate.
    pub trusts_der: Vec<Vec<u8>>,
    /// Why it refused the node's leaf, if it did.
    pub refused_us: Option<String>,
    /// It ended the connection without a word where a server of HTTP/2 goes on.
    pub hung_up: bool,
}

/// Asks sockets. Cheap to clone; holds the node's key as long as it lives.
#[derive(Clone)]
pub struct Prober {
    config: ClientConfig,
    own: Option<Arc<CertifiedKey>>,
    algorithms: WebPkiSupportedAlgorithms,
    limits: Limits,
}

impl std::fmt::Debug for Prober {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prober").field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl Prober {
    /// With the leaf and key of the node. TLS 1.3 alone: every process of Ray speaks it.
    ///
    /// # Errors
    /// The key is of no use, or not the leaf's.
    pub fn new(
        chain: &v1::CertificateChain,
        key: &PrivateKey,
        clock: Arc<dyn Clock>,
        limits: Limits,
    ) -> Result<Self, SetupError> {
        let provider = provider();
        let own = CertifiedKey::from_der(chain.certificates(), key.to_der(), &provider)
            .map_err(|e| SetupError(e.to_string()))?;
        Self::with(provider, Some(Arc::new(own)), clock, limits)
    }

    /// Without a leaf: a process of Ray refuses it, and writes a line about that, after it has shown
    /// its own.
    ///
    /// # Errors
    /// TLS cannot be set up.
    pub fn without_leaf(clock: Arc<dyn Clock>, limits: Limits) -> Result<Self, SetupError> {
        Self::with(provider(), None, clock, limits)
    }

    /// The same with other bounds.
    #[must_use]
    pub fn within(self, limits: Limits) -> Self {
        Self { limits, ..self }
    }

    fn with(
        provider: Arc<CryptoProvider>,
        own: Option<Arc<CertifiedKey>>,
        clock: Arc<dyn Clock>,
        limits: Limits,
    ) -> Result<Self, SetupError> {
        let algorithms = provider.signature_verification_algorithms;
        let recorder = Arc::new(Recorder::new(own, algorithms));
        let mut config = ClientConfig::builder_with_details(provider, Arc::new(TlsTime(clock)))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| SetupError(e.to_string()))?
            .dangerous()
            .with_custom_certificate_verifier(recorder.clone())
            .with_client_cert_resolver(recorder.clone());
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Self { config, own: recorder.own.clone(), algorithms, limits })
    }

    /// Asks each, in order; the answers stand in the same order. A socket that keeps silent costs its
    /// own bound and holds up no other for longer. Each is one socket by the addresses that may lead
    /// to it, tried in turn.
    pub async fn ask_all(&self, addrs: Vec<Vec<SocketAddr>>) -> Vec<Answer> {
        let deadline = Instant::now() + self.limits.total;
        let mut answers = vec![Answer::NotAsked; addrs.len()];
        let mut waiting = addrs.into_iter().enumerate();
        let mut asked = JoinSet::new();
        loop {
            while asked.len() < self.limits.at_once {
                let Some((index, addrs)) = waiting.next() else { break };
                let prober = self.clone();
                asked.spawn(async move { (index, prober.ask(&addrs).await) });
            }
            match timeout_at(deadline, asked.join_next()).await {
                Ok(Some(Ok((index, answer)))) => answers[index] = answer,
                // One that panicked stays unasked.
                Ok(Some(Err(_))) => {}
                // What is under way ends with the set.
                Ok(None) | Err(_) => return answers,
            }
        }
    }

    /// Asks one socket, within its bound.
    pub async fn ask(&self, addrs: &[SocketAddr]) -> Answer {
        let dial = async { TcpStream::connect(addrs).await.map_err(Broken::Dial) };
        self.ask_through(dial).await
    }

    /// Asks whoever is at the other end of a connection, within the same bound.
    pub async fn ask_over(&self, tcp: TcpStream) -> Answer {
        self.ask_through(async { Ok(tcp) }).await
    }

    async fn ask_through(&self, dial: impl Future<Output = Result<TcpStream, Broken>>) -> Answer {
        let recorder = Arc::new(Recorder::new(self.own.clone(), self.algorithms));
        match timeout(self.limits.socket, self.shake_hands(dial, recorder.clone())).await {
            Ok(Ok(())) => recorder.hello(None, false),
            Ok(Err(broken)) => recorder.conclude(broken),
            // The certificate comes first; who stalls after it has said what is wanted.
            Err(_) if recorder.has_proved() => recorder.hello(None, false),
            Err(_) => Answer::Timeout,
        }
    }

    async fn shake_hands(
        &self,
        dial: impl Future<Output = Result<TcpStream, Broken>>,
        recorder: Arc<Recorder>,
    ) -> Result<(), Broken> {
        let tcp = dial.await?;
        let addr = tcp.peer_addr().map_err(Broken::Dial)?;
        let mut config = self.config.clone();
        config.dangerous().set_certificate_verifier(recorder.clone());
        config.client_auth_cert_resolver = recorder.clone();
        let metered = Metered::new(tcp, self.limits.read_len_max, recorder);
        let name = ServerName::from(addr.ip());
        let talk = async {
            let mut tls = TlsConnector::from(Arc::new(config)).connect(name, metered).await?;
            tls.write_all(PREFACE).await?;
            tls.flush().await?;
            // Its SETTINGS come when it has judged our certificate, or an alert does.
            let mut settings = [0; 9];
            tls.read_exact(&mut settings).await?;
            // It takes us. That it may have gone meanwhile is no matter.
            let _ = tls.write_all(GOAWAY).await;
            let _ = tls.shutdown().await;
            Ok(())
        };
        talk.await.map_err(Broken::Talk)
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        // The first share is the one Ray takes: no second round.
        kx_groups: vec![
            aws_lc_rs::kx_group::SECP256R1,
            aws_lc_rs::kx_group::X25519,
            aws_lc_rs::kx_group::SECP384R1,
        ],
        ..aws_lc_rs::default_provider()
    })
}

/// Where it went wrong.
enum Broken {
    Dial(io::Error),
    Talk(io::Error),
}

/// Takes down what the server shows and accepts any certificate: what it is worth is judged later.
/// That the server holds the certificate's key is verified here, since nothing later can.
struct Recorder {
    own: Option<Arc<CertifiedKey>>,
    algorithms: WebPkiSupportedAlgorithms,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    chain: Option<v1::CertificateChain>,
    proved: bool,
    trusts_der: Vec<Vec<u8>>,
    first_byte: Option<u8>,
}

impl std::fmt::Debug for Recorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recorder").field("seen", &self.seen).finish_non_exhaustive()
    }
}

impl Recorder {
    fn new(own: Option<Arc<CertifiedKey>>, algorithms: WebPkiSupportedAlgorithms) -> Self {
        Self { own, algorithms, seen: Mutex::default() }
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_proved(&self) -> bool {
        self.seen().proved
    }

    fn hello(&self, refused_us: Option<String>, hung_up: bool) -> Answer {
        let mut seen = self.seen();
        let Some(chain) = seen.chain.take() else {
            return Answer::NoCertificate("it showed none".to_owned());
        };
        let trusts_der = std::mem::take(&mut seen.trusts_der);
        Answer::Tls(Hello { chain, trusts_der, refused_us, hung_up })
    }

    fn conclude(&self, broken: Broken) -> Answer {
        let error = match broken {
            Broken::Dial(error) => return Answer::Refused(error.to_string()),
            Broken::Talk(error) => error,
        };
        if self.has_proved() {
            let refused = refusal(&error);
            let hung_up = refused.is_none();
            return self.hello(refused, hung_up);
        }
        if self.seen().first_byte.is_some_and(|byte| !RECORD_TYPES.contains(&byte)) {
            return Answer::Plain;
        }
        Answer::NoCertificate(match alert(&error) {
            Some(AlertDescription::ProtocolVersion) => "it does not speak TLS 1.3".to_owned(),
            Some(_) | None => error.to_string(),
        })
    }
}

/// The alert with which the other side ended the handshake.
fn alert(error: &io::Error) -> Option<AlertDescription> {
    let TlsError::AlertReceived(alert) = error.get_ref()?.downcast_ref()? else { return None };
    Some(*alert)
}

/// Whether the server ended the connection over our certificate. One that merely closes after it
/// has shown its own has not said so.
fn refusal(error: &io::Error) -> Option<String> {
    alert(error).map(|alert| format!("it refused the leaf of this node: alert {alert:?}"))
}

impl ServerCertVerifier for Recorder {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        let issuers = intermediates.iter().take(CHAIN_LEN_MAX - 1);
        self.seen().chain = Some(v1::CertificateChain {
            leaf_der: end_entity.to_vec(),
            issuers_der: issuers.map(|issuer| issuer.to_vec()).collect(),
        });
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Err(TlsError::General("TLS 1.2 is not offered".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        let valid = verify_tls13_signature(message, certificate, signature, &self.algorithms)?;
        self.seen().proved = true;
        Ok(valid)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ResolvesClientCert for Recorder {
    fn resolve(&self, names_der: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.seen().trusts_der =
            names_der.iter().take(TRUSTS_MAX).map(|name| name.to_vec()).collect();
        self.own.clone()
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// A connection that is read up to a bound, and whose first byte is remembered.
struct Metered {
    tcp: TcpStream,
    left: usize,
    recorder: Arc<Recorder>,
}

impl Metered {
    fn new(tcp: TcpStream, read_len_max: usize, recorder: Arc<Recorder>) -> Self {
        Self { tcp, left: read_len_max, recorder }
    }

    fn count(&mut self, read: &[u8]) -> io::Result<()> {
        let mut seen = self.recorder.seen();
        seen.first_byte = seen.first_byte.or_else(|| read.first().copied());
        drop(seen);
        match self.left.checked_sub(read.len()) {
            Some(left) => self.left = left,
            None => return Err(io::Error::other("it sends more than an answer has")),
        }
        Ok(())
    }
}

impl AsyncRead for Metered {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        match Pin::new(&mut self.tcp).poll_read(context, buffer) {
            Poll::Ready(Ok(())) => Poll::Ready(self.count(&buffer.filled()[before..])),
            other @ (Poll::Ready(Err(_)) | Poll::Pending) => other,
        }
    }
}

impl AsyncWrite for Metered {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(context)
    }
}
