//! Wires everything: three gRPC listeners, HTTP on loopback, upkeep, and a shutdown that finishes
//! what it began. Listeners and the stop signal come from outside, so that a test binds port 0.

use std::{future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use raymtls_proto::v1::{
    self, admin_service_server, enrollment_service_server, node_service_server,
};
use thiserror::Error;
use time::OffsetDateTime;
use tokio::{
    net::{TcpListener, UnixListener, UnixStream},
    sync::mpsc,
    task::JoinSet,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic_health::{
    ServingStatus,
    server::{HealthReporter, health_reporter},
};
use tracing::{error, info, warn};

use crate::{
    accept::{self, AcceptFailures, Bounds},
    ca::Ca,
    checkpoints, crls,
    descriptors::Budget,
    grpc::{admin::Admin, enrollment::Enrollment, node::Node},
    http,
    keys::profile::CA_SERVER_LIFE,
    tls::{self, SharedConfig, TlsError},
    upkeep,
};

/// Streams of one connection at once.
const STREAMS_MAX: u32 = 32;
/// The same of a node's: a Sync that waits, and what its agent asks meanwhile.
const NODE_STREAMS_MAX: u32 = 8;
/// Longest list of headers, in bytes.
const HEADERS_LEN_MAX: u32 = 8 * 1_024;
/// Streams a peer may open and reset before the connection is closed (rapid reset).
const RESETS_MAX: usize = 32;
/// Bytes a peer may send before they are taken, on one stream and on one connection: a call has 64 KiB
/// at most.
const STREAM_WINDOW_LEN: u32 = 128 * 1_024;
const CONNECTION_WINDOW_LEN: u32 = 256 * 1_024;
/// A call that takes longer is ended; a Sync waits up to 60 s.
const CALL_TIME_MAX: Duration = Duration::from_secs(90);
/// The same for an enrolment, from its first header to its last byte.
const ENROLL_TIME_MAX: Duration = Duration::from_secs(30);
/// A connection to the enrolment listener ends then, whatever it is used for, so that slow headers or
/// pings keep none.
const ENROLLMENT_LIFE: Duration = Duration::from_secs(120);
/// And then, if nothing comes.
const ENROLLMENT_SILENCE: Duration = Duration::from_secs(30);
/// Connections of one node at once; its agent has one, for a moment two, and a command of the same host
/// another. The newest stay, so an agent that starts again gets in.
const CONNECTIONS_PER_NODE_MAX: usize = 4;
/// A connection is closed after this long, so that agents spread over replicas and new settings.
const CONNECTION_AGE_MAX: Duration = Duration::from_secs(60 * 60);
/// How long calls in flight may take to end when the server stops.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(10);
/// HTTP/2 pings find dead peers.
const PING_EVERY: Duration = Duration::from_secs(60);

/// Where the server listens.
#[derive(Debug)]
pub struct Listeners {
    /// Enrolment.
    pub enrollment: TcpListener,
    /// Nodes.
    pub nodes: TcpListener,
    /// Metrics and probes.
    pub http: TcpListener,
    /// CRLs, where they are wanted.
    pub crl: Option<TcpListener>,
    /// Operators; its mode says who may connect.
    pub admin: UnixListener,
    /// The operator's socket is open to a group.
    pub operator_group: bool,
}

/// Why the server ended.
#[derive(Debug, Error)]
pub enum ServeError {
    /// TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A listener.
    #[error("listener: {0}")]
    Listener(#[from] io::Error),
    /// A gRPC server.
    #[error("gRPC: {0}")]
    Grpc(#[from] tonic::transport::Error),
    /// Reflection.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Serves until `stop` ends, then finishes what it began. Calls `started` once issuers, CRLs and the
/// server's own certificate are there and every listener is served.
///
/// # Errors
/// See [`ServeError`].
pub async fn serve(
    ca: Arc<Ca>,
    listeners: Listeners,
    started: impl FnOnce() + Send,
    stop: impl Future<Output = ()> + Send,
) -> Result<(), ServeError> {
    upkeep::pass(&ca).await;
    let certificates = Certificates::make(&ca)?;
    ca.metrics.started(ca.started.unix_timestamp());
    let (health, health_service) = health_reporter();
    tell(&health, ServingStatus::Serving).await;

    let mut servers: JoinSet<Result<(), ServeError>> = JoinSet::new();
    servers.spawn({
        let serving = http::serve(Arc::clone(&ca), listeners.http);
        async move {
            serving.await;
            Ok(())
        }
    });
    if let Some(listener) = listeners.crl {
        let serving = crls::serve(Arc::clone(&ca), listener);
        servers.spawn(async move {
            serving.await;
            Ok(())
        });
    }
    servers.spawn({
        let health = health_service.clone();
        let config = Arc::clone(&certificates.enrollment);
        let (name, bounds) = ("enrollment", enrollment_bounds(&ca));
        let incoming = start_tls(&ca, name, listeners.enrollment, config, bounds);
        let router = bounded(ENROLL_TIME_MAX, STREAMS_MAX)
            .add_service(health)
            .add_service(Enrollment::server(Arc::clone(&ca)));
        let stopped = stopped(Arc::clone(&ca));
        async move { Ok(router.serve_with_incoming_shutdown(incoming, stopped).await?) }
    });
    servers.spawn({
        let health = health_service.clone();
        let config = Arc::clone(&certificates.nodes);
        let (name, bounds) = ("nodes", node_bounds(&ca));
        let incoming = start_tls(&ca, name, listeners.nodes, config, bounds);
        let router = bounded(CALL_TIME_MAX, NODE_STREAMS_MAX)
            .add_service(health)
            .add_service(Node::server(Arc::clone(&ca)));
        let stopped = stopped(Arc::clone(&ca));
        async move { Ok(router.serve_with_incoming_shutdown(incoming, stopped).await?) }
    });
    servers.spawn({
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(v1::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()?;
        let router = bounded(CALL_TIME_MAX, STREAMS_MAX)
            .add_service(health_service)
            .add_service(reflection)
            .add_service(Admin::server(Arc::clone(&ca), listeners.operator_group));
        let incoming = start_admin(&ca, listeners.admin);
        let stopped = stopped(Arc::clone(&ca));
        async move { Ok(router.serve_with_incoming_shutdown(incoming, stopped).await?) }
    });
    let checkpoints = tokio::spawn(checkpoints::keep(Arc::clone(&ca)));
    let upkeep = tokio::spawn(keep_up(Arc::clone(&ca), certificates, health.clone()));
    started();

    let ended = tokio::select! {
        () = stop => Ok(()),
        ended = servers.join_next() => first_error(ended),
    };
    upkeep.abort();
    checkpoints.abort();
    tell(&health, ServingStatus::NotServing).await;
    ca.stop();
    info!("stopping: finishing the calls in flight");
    if tokio::time::timeout(DRAIN_TIME_MAX, drain(&mut servers)).await.is_err() {
        warn!("some calls did not end in time and are cut off");
    }
    ca.store.close().await;
    ended
}

fn start_tls(
    ca: &Arc<Ca>,
    name: &'static str,
    listener: TcpListener,
    config: SharedConfig,
    bounds: Bounds,
) -> ReceiverStream<io::Result<accept::Connection>> {
    let (ready, connections) = accept::ready_channel();
    tokio::spawn(accept::accept(Arc::clone(ca), name, listener, config, bounds, ready));
    ReceiverStream::new(connections)
}

/// The operator's connections. tonic would ask a listener that cannot accept again at once, for ever.
fn start_admin(ca: &Arc<Ca>, listener: UnixListener) -> ReceiverStream<io::Result<UnixStream>> {
    let (ready, connections) = mpsc::channel(1);
    let ca = Arc::clone(ca);
    tokio::spawn(async move {
        let mut failures = AcceptFailures::new("admin");
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = ready.closed() => return,
            };
            match accepted {
                // A closed channel means that the server is stopping.
                Ok((stream, _)) => drop(ready.send(Ok(stream)).await),
                Err(error) => {
                    ca.metrics.accept_failed("admin");
                    failures.pause(&error).await;
                }
            }
        }
    });
    ReceiverStream::new(connections)
}

fn enrollment_bounds(ca: &Ca) -> Bounds {
    let budget = Budget::now();
    Bounds {
        handshakes: budget.handshakes,
        handshakes_per_address: ca.limits.handshakes_per_address as usize,
        connections: budget.enrollment,
        connections_per_holder: ca.limits.enrollment_connections_per_address as usize,
        life: Some(ENROLLMENT_LIFE),
        silence: Some(ENROLLMENT_SILENCE),
    }
}

/// Whoever is through has an identity, may be cut off by it, and stays.
fn node_bounds(ca: &Ca) -> Bounds {
    let budget = Budget::now();
    Bounds {
        handshakes: budget.handshakes,
        handshakes_per_address: ca.limits.handshakes_per_address as usize,
        connections: budget.nodes,
        connections_per_holder: CONNECTIONS_PER_NODE_MAX,
        life: None,
        silence: None,
    }
}

fn bounded(call_time_max: Duration, streams_max: u32) -> Server {
    Server::builder()
        .timeout(call_time_max)
        .initial_stream_window_size(STREAM_WINDOW_LEN)
        .initial_connection_window_size(CONNECTION_WINDOW_LEN)
        .max_concurrent_streams(streams_max)
        .concurrency_limit_per_connection(streams_max as usize)
        .http2_max_header_list_size(HEADERS_LEN_MAX)
        .http2_max_pending_accept_reset_streams(Some(RESETS_MAX))
        .http2_max_local_error_reset_streams(Some(RESETS_MAX))
        .http2_keepalive_interval(Some(PING_EVERY))
        .http2_keepalive_timeout(Some(Duration::from_secs(20)))
        .max_connection_age(CONNECTION_AGE_MAX)
        .max_connection_age_grace(CALL_TIME_MAX)
}

async fn stopped(ca: Arc<Ca>) {
    ca.stopped().await;
}

async fn drain(servers: &mut JoinSet<Result<(), ServeError>>) {
    while let Some(ended) = servers.join_next().await {
        if let Err(error) = first_error(Some(ended)) {
            error!(%error, "a listener ended badly");
        }
    }
}

fn first_error(
    ended: Option<Result<Result<(), ServeError>, tokio::task::JoinError>>,
) -> Result<(), ServeError> {
    match ended {
        Some(Ok(ended)) => ended,
        Some(Err(panicked)) => Err(io::Error::other(panicked).into()),
        None => Ok(()),
    }
}

/// Services that health is told of, by name; the empty one is the server as a whole.
const SERVICES: [&str; 4] = [
    "",
    enrollment_service_server::SERVICE_NAME,
    node_service_server::SERVICE_NAME,
    admin_service_server::SERVICE_NAME,
];

async fn tell(health: &HealthReporter, status: ServingStatus) {
    for service in SERVICES {
        health.set_service_status(service, status).await;
    }
}

/// The listeners' TLS configurations and when their certificate ends.
#[derive(Debug)]
struct Certificates {
    enrollment: SharedConfig,
    nodes: SharedConfig,
    ends_unix: i64,
    issuer_key_id: Vec<u8>,
}

impl Certificates {
    fn make(ca: &Ca) -> Result<Self, TlsError> {
        let configs = tls::configs(ca)?;
        ca.metrics.server_certificate_ends(configs.ends_unix);
        Ok(Self {
            enrollment: Arc::new(ArcSwap::from(configs.enrollment)),
            nodes: Arc::new(ArcSwap::from(configs.nodes)),
            ends_unix: configs.ends_unix,
            issuer_key_id: active_issuer(ca),
        })
    }

    /// Makes new ones past half their life, or once the control issuer is another.
    fn renew(&mut self, ca: &Ca, now: OffsetDateTime) -> Result<(), TlsError> {
        let left = self.ends_unix - now.unix_timestamp();
        if left > CA_SERVER_LIFE.whole_seconds() / 2 && self.issuer_key_id == active_issuer(ca) {
            return Ok(());
        }
        let configs = tls::configs(ca)?;
        ca.metrics.server_certificate_ends(configs.ends_unix);
        self.enrollment.store(configs.enrollment);
        self.nodes.store(configs.nodes);
        self.ends_unix = configs.ends_unix;
        self.issuer_key_id = active_issuer(ca);
        info!("the server's own certificate was renewed");
        Ok(())
    }
}

fn active_issuer(ca: &Ca) -> Vec<u8> {
    let control = ca.authority(&crate::store::Authority::Control);
    control.map(|control| control.active().key_id().to_vec()).unwrap_or_default()
}

async fn keep_up(ca: Arc<Ca>, mut certificates: Certificates, health: HealthReporter) {
    loop {
        tokio::time::sleep(upkeep::EVERY).await;
        upkeep::pass(&ca).await;
        if let Err(error) = certificates.renew(&ca, ca.clock.now()) {
            error!(%error, "the server's own certificate could not be renewed");
        }
        if !ca.store.is_serving() {
            tell(&health, ServingStatus::NotServing).await;
        }
    }
}

/// Binds a TCP listener with the address in the error.
///
/// # Errors
/// The system's words and the address.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .map_err(|e| io::Error::new(e.kind(), format!("cannot listen on {address}: {e}")))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use hyper_util::rt::TokioIo;
    use tokio::{net::UnixStream, sync::oneshot};
    use tonic::transport::Endpoint;
    use tonic_health::pb::{
        HealthCheckRequest, health_check_response::ServingStatus as Said,
        health_client::HealthClient,
    };

    use super::*;
    use crate::{admin_socket, store::Authority, upkeep::tests::new_ca};

    async fn health(socket: &Path) -> HealthClient<tonic::transport::Channel> {
        let socket = socket.to_owned();
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { Ok::<_, io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
        });
        let endpoint = Endpoint::from_static("http://ca.invalid");
        HealthClient::new(endpoint.connect_with_connector(connector).await.unwrap())
    }

    #[tokio::test]
    async fn started_is_said_when_all_is_there_and_stopping_is_told_to_whoever_watches() {
        let (ca, _) = new_ca().await;
        assert!(ca.authority(&Authority::Control).unwrap().crls_der().is_empty());
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("ca-admin.sock");
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        let listeners = Listeners {
            enrollment: bind(loopback).await.unwrap(),
            nodes: bind(loopback).await.unwrap(),
            http: bind(loopback).await.unwrap(),
            crl: None,
            admin: admin_socket::listen(&socket, None).await.unwrap(),
            operator_group: false,
        };
        let (started, has_started) = oneshot::channel();
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = tokio::spawn({
            let ca = Arc::clone(&ca);
            async move {
                let seen = Arc::clone(&ca);
                let started = move || {
                    let crls = seen.authority(&Authority::Control).unwrap().crls_der().len();
                    let certificate = seen
                        .metrics
                        .text()
                        .lines()
                        .any(|line| line.contains("certificate") && !line.ends_with(" 0"));
                    started.send((crls, certificate)).unwrap();
                };
                serve(ca, listeners, started, async { drop(stopped.await) }).await
            }
        });
        assert_eq!(has_started.await.unwrap(), (2, true), "CRLs and the server's certificate");

        let mut watched = Vec::new();
        for service in SERVICES {
            let request = HealthCheckRequest { service: service.to_owned() };
            let mut client = health(&socket).await;
            let mut said = client.watch(request).await.unwrap().into_inner();
            let first = said.message().await.unwrap().unwrap();
            assert_eq!(first.status(), Said::Serving, "{service:?}");
            watched.push((service, said));
        }
        stop.send(()).unwrap();
        for (service, said) in &mut watched {
            let next = tokio::time::timeout(Duration::from_secs(5), said.message()).await;
            let next = next.expect("nothing was said").unwrap().unwrap();
            assert_eq!(next.status(), Said::NotServing, "{service:?}");
        }
        drop(watched);
        serving.await.unwrap().unwrap();
    }
}
