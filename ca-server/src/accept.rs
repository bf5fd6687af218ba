//! The TCP listeners: from a connection to one that is through its handshake and served. Whoever
//! connects gets in at once; who then stalls is sent away by time, or sooner by those who come after
//! (`crowd`). A connection that has said nothing yet holds a socket and a small task, no TLS state.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use prometheus_client::metrics::gauge::Gauge;
use raymtls_proto::digest::sha256;
use rustix::io::Errno;
use thiserror::Error;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::{Instant, Sleep},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use crate::{
    ca::Ca,
    crowd::{Crowd, Place},
    limits::AddressKey,
    proxy_protocol::{self, Source},
    tls::{Identity, Peer, SharedConfig},
};

/// A handshake that takes longer is dropped, a balancer's header before it included.
const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(5);
/// Connections that are through and wait to be served.
const READY_MAX: usize = 64;
/// Pause after an accept that failed for want of something, so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// The log hears of failed accepts this often.
const TELL_EVERY: Duration = Duration::from_secs(10);
/// Silence after which the system probes a connection's other end.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(60);

/// What a listener allows.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Connections at once that are not through their handshake.
    pub handshakes: usize,
    /// Of these, of one address.
    pub handshakes_per_address: usize,
    /// Connections at once that are.
    pub connections: usize,
    /// Of these, of one holder: a node, or without one an address.
    pub connections_per_holder: usize,
    /// A connection ends after so long.
    pub life: Option<Duration>,
    /// A connection ends once nothing has come over it for so long.
    pub silence: Option<Duration>,
}

/// Who holds a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Holder {
    Address(AddressKey),
    /// SHA-256 of cluster and node, whose identity is in force. Renewals make no second holder.
    Node([u8; 32]),
    /// SHA-256 of a certificate that no node is known by: who has a retired one takes no place of the
    /// node's.
    Certificate([u8; 32]),
}

impl Holder {
    async fn of(peer: &Peer, ca: &Ca) -> Self {
        let Some(identity) = &peer.identity else {
            return Self::Address(AddressKey::of(peer.address));
        };
        if let Ok(caller) = peer.caller(ca)
            && ca.store.is_in_force(caller.clone()).await.unwrap_or(false)
        {
            // Neither name has a slash in it.
            return Self::Node(sha256(caller.actor().as_bytes()));
        }
        Self::Certificate(sha256(&identity.certificate))
    }
}

/// A connection that is through its handshake.
#[derive(Debug)]
pub struct Connection {
    stream: TlsStream<TcpStream>,
    peer: Peer,
    open: Gauge,
    place: Place<Holder>,
    limits: TimeLimits,
}

/// When a connection ends by itself.
#[derive(Debug)]
struct TimeLimits {
    life_ends: Option<Instant>,
    silence_max: Option<Duration>,
    end: Option<Pin<Box<Sleep>>>,
}

impl TimeLimits {
    fn new(bounds: &Bounds) -> Self {
        let life_ends = bounds.life.map(|life| Instant::now() + life);
        let mut limits = Self { life_ends, silence_max: bounds.silence, end: None };
        limits.end = limits.next_end().map(|end| Box::pin(tokio::time::sleep_until(end)));
        limits
    }

    fn next_end(&self) -> Option<Instant> {
        let silence_ends = self.silence_max.map(|max| Instant::now() + max);
        [self.life_ends, silence_ends].into_iter().flatten().min()
    }

    fn heard(&mut self) {
        let next = self.next_end();
        if let (Some(end), Some(next)) = (&mut self.end, next) {
            end.as_mut().reset(next);
        }
    }

    fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.end.as_mut().map_or(Poll::Pending, |end| end.as_mut().poll(cx))
    }
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
        if self.place.poll_evicted(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        if self.limits.poll_over(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if read.is_ready() && buf.filled().len() > before {
            self.limits.heard();
        }
        read
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

/// The channel between a listener and the server.
#[must_use]
pub fn ready_channel()
-> (mpsc::Sender<io::Result<Connection>>, mpsc::Receiver<io::Result<Connection>>) {
    mpsc::channel(READY_MAX)
}

/// Accepts connections for as long as somebody takes them.
pub async fn accept(
    ca: Arc<Ca>,
    name: &'static str,
    listener: TcpListener,
    config: SharedConfig,
    bounds: Bounds,
    ready: mpsc::Sender<io::Result<Connection>>,
) {
    let door = Arc::new(Door {
        ca,
        name,
        config,
        bounds,
        handshakes: Crowd::new(bounds.handshakes, bounds.handshakes_per_address),
        connections: Crowd::new(bounds.connections, bounds.connections_per_holder),
    });
    let mut failures = AcceptFailures::new(name);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = ready.closed() => return,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                door.ca.metrics.accept_failed(name);
                // A stalled connection gives its descriptor to the one that waits.
                if is_want(&error) && door.handshakes.evict_one() {
                    door.ca.metrics.connection_evicted(name);
                }
                failures.pause(&error).await;
                continue;
            }
        };
        let place = door.admit(AddressKey::of(address.ip()));
        let (door, ready) = (Arc::clone(&door), ready.clone());
        tokio::spawn(async move {
            if let Some(connection) = door.let_in(stream, address, place).await {
                // A closed channel means that the server is stopping.
                let _ = ready.send(Ok(connection)).await;
            }
        });
    }
}

/// What to do after an accept that failed; for every loop that accepts.
#[derive(Debug)]
pub struct AcceptFailures {
    listener: &'static str,
    told: Option<Instant>,
}

impl AcceptFailures {
    /// None so far.
    #[must_use]
    pub fn new(listener: &'static str) -> Self {
        Self { listener, told: None }
    }

    /// Tells the log now and then, and pauses where the next accept would fail too: a connection
    /// that its own end gave up in the queue holds nobody up.
    pub async fn pause(&mut self, error: &io::Error) {
        if !is_want(error) && error.kind() == io::ErrorKind::ConnectionAborted {
            return;
        }
        if self.told.is_none_or(|told| told.elapsed() > TELL_EVERY) {
            warn!(listener = self.listener, %error, "cannot accept connections");
            self.told = Some(Instant::now());
        }
        tokio::time::sleep(ACCEPT_PAUSE).await;
    }
}

/// Whether the system lacks what a connection needs.
fn is_want(error: &io::Error) -> bool {
    let wanting = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    Errno::from_io_error(error).is_some_and(|errno| wanting.contains(&errno))
}

/// A listener's state.
#[derive(Debug)]
struct Door {
    ca: Arc<Ca>,
    name: &'static str,
    config: SharedConfig,
    bounds: Bounds,
    handshakes: Crowd<AddressKey>,
    connections: Crowd<Holder>,
}

/// Why there is no connection.
#[derive(Debug, Error)]
enum Lost {
    #[error("handshake refused: {0}")]
    Refused(io::Error),
    #[error("no protocol named")]
    NoProtocol,
    #[error("PROXY protocol: {0}")]
    ProxyHeader(proxy_protocol::ProxyError),
    #[error("no handshake within {} s", HANDSHAKE_TIME_MAX.as_secs())]
    TimedOut,
    #[error("stalled while others came")]
    Evicted,
}

impl Door {
    fn admit(&self, address: AddressKey) -> Place<AddressKey> {
        let (place, made_room) = self.handshakes.enter(address);
        if made_room {
            self.ca.metrics.connection_evicted(self.name);
        }
        place
    }

    async fn let_in(
        &self,
        stream: TcpStream,
        address: SocketAddr,
        place: Place<AddressKey>,
    ) -> Option<Connection> {
        set_options(self.name, &stream, address);
        let shaking = self.shake_hands(stream, address.ip().to_canonical(), place);
        let lost = match tokio::time::timeout(HANDSHAKE_TIME_MAX, shaking).await {
            Ok(Ok((stream, peer))) => return Some(self.connection(stream, peer).await),
            Ok(Err(lost)) => lost,
            Err(_) => Lost::TimedOut,
        };
        let why = match &lost {
            Lost::Refused(_) => "refused",
            Lost::NoProtocol => "no_protocol",
            Lost::ProxyHeader(_) => "proxy_header",
            Lost::TimedOut => "timed_out",
            Lost::Evicted => "evicted",
        };
        self.ca.metrics.handshake_failed(self.name, why);
        debug!(listener = self.name, %address, %lost, "no connection");
        None
    }

    async fn shake_hands(
        &self,
        mut stream: TcpStream,
        from: IpAddr,
        mut place: Place<AddressKey>,
    ) -> Result<(TlsStream<TcpStream>, Peer), Lost> {
        let mut address = from;
        if self.ca.trusted_proxies.contains(from) {
            let source = unless_evicted(&mut place, proxy_protocol::read(&mut stream)).await?;
            if let Source::Client(client) = source.map_err(Lost::ProxyHeader)? {
                address = client;
                // From here on it is the client's, not the balancer's.
                drop(place);
                place = self.admit(AddressKey::of(client));
            }
        }
        // TLS state is made for those who say something.
        unless_evicted(&mut place, stream.readable()).await?.map_err(Lost::Refused)?;
        let acceptor = TlsAcceptor::from(self.config.load_full());
        let shaking = Box::pin(acceptor.accept(stream));
        let stream = unless_evicted(&mut place, shaking).await?.map_err(Lost::Refused)?;
        // RFC 9113 3.2: over TLS, HTTP/2 is spoken by its ALPN name only.
        if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
            return Err(Lost::NoProtocol);
        }
        let identity = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let identity = identity.map(|leaf| Arc::new(Identity::new(leaf.clone().into_owned())));
        Ok((stream, Peer { address, identity }))
    }

    async fn connection(&self, stream: TlsStream<TcpStream>, peer: Peer) -> Connection {
        let holder = Holder::of(&peer, &self.ca).await;
        let (place, made_room) = self.connections.enter(holder);
        if made_room {
            self.ca.metrics.connection_evicted(self.name);
        }
        let open = self.ca.metrics.connections(self.name);
        open.inc();
        Connection { stream, peer, open, place, limits: TimeLimits::new(&self.bounds) }
    }
}

async fn unless_evicted<T>(
    place: &mut Place<AddressKey>,
    act: impl Future<Output = T>,
) -> Result<T, Lost> {
    tokio::select! {
        done = act => Ok(done),
        () = place.evicted() => Err(Lost::Evicted),
    }
}

fn set_options(name: &'static str, stream: &TcpStream, address: SocketAddr) {
    let keepalive = rustix::net::sockopt::set_socket_keepalive(stream, true)
        .and_then(|()| rustix::net::sockopt::set_tcp_keepidle(stream, KEEPALIVE_AFTER));
    if let Err(error) = stream.set_nodelay(true).and_then(|()| keepalive.map_err(Into::into)) {
        debug!(listener = name, %address, %error, "socket options");
    }
}

#[cfg(test)]
mod tests {
    use raymtls_proto::clock::TlsTime;
    use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
    use tokio::io::AsyncReadExt;

    use super::*;
    use crate::{store::Authority, tls, upkeep, upkeep::tests::new_ca};

    const LONG: Duration = Duration::from_secs(60);
    /// How long nothing happens that should not.
    const SHORT: Duration = Duration::from_millis(200);
    /// Long enough for what should happen, on a busy machine too.
    const WHILE: Duration = Duration::from_secs(2);
    const ROOM: Bounds = Bounds {
        handshakes: 8,
        handshakes_per_address: 8,
        connections: 8,
        connections_per_holder: 8,
        life: None,
        silence: None,
    };

    struct Listening {
        ca: Arc<Ca>,
        address: SocketAddr,
        connections: mpsc::Receiver<io::Result<Connection>>,
        client: tokio_rustls::TlsConnector,
    }

    impl Listening {
        async fn within(bounds: Bounds) -> Self {
            let (ca, clock) = new_ca().await;
            upkeep::pass(&ca).await;
            let config = tls::configs(&ca).unwrap().enrollment;
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let (ready, connections) = ready_channel();
            let shared = Arc::new(arc_swap::ArcSwap::from(config));
            tokio::spawn(accept(Arc::clone(&ca), "test", listener, shared, bounds, ready));
            let mut roots = RootCertStore::empty();
            let control = ca.authority(&Authority::Control).unwrap();
            roots.add(control.root_der.clone().into()).unwrap();
            let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
            let time = Arc::new(TlsTime(Arc::new(clock)));
            let mut client = ClientConfig::builder_with_details(provider, time)
                .with_protocol_versions(&[&rustls::version::TLS13])
                .unwrap()
                .with_root_certificates(roots)
                .with_no_client_auth();
            client.alpn_protocols = vec![b"h2".to_vec()];
            let client = tokio_rustls::TlsConnector::from(Arc::new(client));
            Self { ca, address, connections, client }
        }

        async fn dial(&mut self) -> (tokio_rustls::client::TlsStream<TcpStream>, Connection) {
            let tcp = TcpStream::connect(self.address).await.unwrap();
            let name = ServerName::try_from(self.ca.trust_domain.server_name()).unwrap();
            let client = self.client.connect(name, tcp).await.unwrap();
            let served = self.connections.recv().await.unwrap().unwrap();
            (client, served)
        }
    }

    async fn end_of(connection: &mut Connection) -> io::ErrorKind {
        let mut buffer = [0; 64];
        let read = tokio::time::timeout(LONG / 6, connection.read(&mut buffer));
        read.await.expect("the connection did not end").unwrap_err().kind()
    }

    #[tokio::test]
    async fn a_silent_connection_ends_and_one_that_talks_ends_with_its_life() {
        use tokio::io::AsyncWriteExt;

        let bounds = Bounds { life: Some(LONG), silence: Some(WHILE), ..ROOM };
        let mut listening = Listening::within(bounds).await;
        let (mut client, mut served) = listening.dial().await;
        client.write_all(b"slow").await.unwrap();
        served.read_exact(&mut [0; 4]).await.unwrap();
        assert_eq!(end_of(&mut served).await, io::ErrorKind::TimedOut);

        let bounds = Bounds { life: Some(WHILE), silence: Some(LONG), ..ROOM };
        let mut listening = Listening::within(bounds).await;
        let (mut client, mut served) = listening.dial().await;
        let began = Instant::now();
        let kind = loop {
            if client.write_all(b".").await.is_err() {
                break io::ErrorKind::TimedOut;
            }
            match served.read(&mut [0; 1]).await {
                Ok(_) => tokio::time::sleep(SHORT / 20).await,
                Err(error) => break error.kind(),
            }
            assert!(began.elapsed() < LONG / 6, "talking kept the connection");
        };
        assert_eq!(kind, io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_holder_s_newest_connections_stay_and_its_oldest_goes() {
        let mut listening = Listening::within(Bounds { connections_per_holder: 2, ..ROOM }).await;
        let mut all = Vec::new();
        for _ in 0..3 {
            all.push(listening.dial().await);
        }
        assert_eq!(end_of(&mut all[0].1).await, io::ErrorKind::ConnectionAborted);
        for (_, served) in &mut all[1..] {
            let read = tokio::time::timeout(SHORT, served.read(&mut [0; 1])).await;
            assert!(read.is_err(), "a newer connection ended");
        }
    }

    #[tokio::test]
    async fn who_stalls_before_its_handshake_makes_room_and_the_newcomer_gets_through() {
        let mut listening = Listening::within(Bounds { handshakes: 4, ..ROOM }).await;
        let mut stalled = Vec::new();
        for _ in 0..8 {
            stalled.push(TcpStream::connect(listening.address).await.unwrap());
        }
        let began = Instant::now();
        let _through = listening.dial().await;
        assert!(began.elapsed() < HANDSHAKE_TIME_MAX, "the newcomer waited for those that stall");
        // The oldest are closed at once; the newest still have their time.
        let closed = tokio::time::timeout(WHILE, stalled[0].read(&mut [0; 1])).await;
        assert!(matches!(closed, Ok(Ok(0) | Err(_))), "the oldest was kept: {closed:?}");
        assert!(tokio::time::timeout(SHORT, stalled[7].read(&mut [0; 1])).await.is_err());
    }
}
