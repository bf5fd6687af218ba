//! Plain HTTP on loopback: `/metrics`, `/livez`, `/readyz`. It reads the status and changes nothing.
//! Few connections at once, one request each, none of them for long.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{Router, extract::State, http::StatusCode, routing::get};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::Gauge,
    },
    registry::Registry,
};
use raymtls_proto::clock::Clock;
use time::OffsetDateTime;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
};

use crate::{
    served::{Served, kind::Class},
    status::{Status, tunnel::TunnelStatus},
};

/// Connections at once; the next ones wait.
const CONNECTIONS_MAX: usize = 16;
/// A request's headers must be there after this long.
const HEADERS_TIME_MAX: Duration = Duration::from_secs(5);
/// The answer must be taken after this long.
const CONNECTION_TIME_MAX: Duration = Duration::from_secs(15);
/// Pause after a failed accept (out of file descriptors), so that the loop neither spins nor dies.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

#[derive(Clone)]
struct Shared {
    status: watch::Receiver<Status>,
    clock: Arc<dyn Clock>,
    scrapes: Arc<AtomicU64>,
}

/// Listens.
///
/// # Errors
/// The system's.
pub async fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Answers for as long as it is polled.
pub async fn serve(listener: TcpListener, status: watch::Receiver<Status>, clock: Arc<dyn Clock>) {
    let shared = Shared { status, clock, scrapes: Arc::default() };
    let router = Router::new()
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(shared);
    accept_all(listener, router, HEADERS_TIME_MAX).await;
}

async fn accept_all(listener: TcpListener, router: Router, headers_time_max: Duration) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let place = places.clone().acquire_owned().await.expect("the semaphore is never closed");
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "metrics and health cannot accept");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let router = router.clone();
        tokio::spawn(async move {
            let answering = answer(stream, router, headers_time_max);
            if tokio::time::timeout(CONNECTION_TIME_MAX, answering).await.is_err() {
                tracing::debug!("an HTTP connection was cut off");
            }
            drop(place);
        });
    }
}

/// One request, then the place is free again.
async fn answer(stream: TcpStream, router: Router, headers_time_max: Duration) {
    let mut builder = auto::Builder::new(TokioExecutor::new()).http1_only();
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(headers_time_max)
        .keep_alive(false);
    let service = TowerToHyperService::new(router);
    if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!(%error, "an HTTP connection ended badly");
    }
}

/// Ready means that what starts now finds a valid leaf, Ray's token unless it is off, and a table
/// where isolation is enforced.
async fn ready(State(shared): State<Shared>) -> (StatusCode, String) {
    let (is_ready, is_isolated, until) = {
        let status = shared.status.borrow();
        (status.is_ready(), status.isolation.is_ready(), status.files_work_until)
    };
    if until.is_some() && !is_isolated {
        let text = "isolation is enforced and its table is not loaded\n".to_owned();
        return (StatusCode::SERVICE_UNAVAILABLE, text);
    }
    if until.is_some() && !is_ready {
        let text = "Ray's token is not there yet\n".to_owned();
        return (StatusCode::SERVICE_UNAVAILABLE, text);
    }
    match until.filter(|until| until.time() > shared.clock.now()) {
        Some(until) => (StatusCode::OK, format!("files work until {until}\n")),
        None => (StatusCode::SERVICE_UNAVAILABLE, "there is no valid leaf\n".to_owned()),
    }
}

async fn metrics(State(shared): State<Shared>) -> ([(&'static str, &'static str); 1], String) {
    let scrapes = shared.scrapes.fetch_add(1, Ordering::Relaxed) + 1;
    let status = shared.status.borrow().clone();
    let text = render(&status, shared.clock.now(), scrapes);
    ([("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FolderLabel {
    key_folder: String,
    current: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModeLabel {
    mode: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ClassLabel {
    class: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    class: &'static str,
    state: &'static str,
}

/// Written anew for each scrape: a key folder that is gone leaves no series behind.
fn render(status: &Status, now: OffsetDateTime, scrapes: u64) -> String {
    let mut registry = Registry::with_prefix("raymtls_agent");
    let left = |until: OffsetDateTime| until.unix_timestamp() - now.unix_timestamp();
    let leaves = Family::<FolderLabel, Gauge>::default();
    for folder in &status.key_folders {
        let label =
            FolderLabel { key_folder: folder.name.clone(), current: folder.current.to_string() };
        leaves.get_or_create(&label).set(left(folder.leaf.not_after.time()));
    }
    registry.register(
        "leaf_seconds_left",
        "Seconds to the end of the leaf of a key folder",
        leaves,
    );
    if let Some(served) = &status.served {
        running(&mut registry, &served.at(now), now);
    }
    let mut gauge = |name: &str, help: &str, value: i64| {
        let gauge = Gauge::<i64>::default();
        gauge.set(value);
        registry.register(name, help, gauge);
    };
    gauge(
        "identity_seconds_left",
        "Seconds to the end of the agent identity",
        left(status.identity.not_after.time()),
    );
    gauge(
        "ca_reachable",
        "1 if the last call to the CA got an answer",
        i64::from(status.ca.reachable == Some(true)),
    );
    gauge("enrolled", "1 if the CA serves this node", i64::from(status.standing == "enrolled"));
    if let Some(last) = status.ca.last_contact {
        gauge("last_contact_timestamp_seconds", "When the CA answered last", last.unix());
    }
    if let Some(ends) = status.lease_ends {
        gauge(
            "lease_seconds_left",
            "Seconds until other nodes refuse this one: the CA has not heard it for half a lease",
            left(ends.time()),
        );
    }
    if let Some(skew) = status.clock_skew_seconds {
        gauge("clock_skew_seconds", "Seconds this host's clock is ahead of the CA's", skew);
    }
    let isolation = &status.isolation;
    let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
    gauge("isolation_members", "Hosts of the cluster in the table", count(isolation.members));
    gauge("isolation_blocked", "Addresses that are cut off", count(isolation.blocked));
    gauge(
        "isolation_problem",
        "1 if isolation is not what the settings say",
        i64::from(isolation.problem.is_some()),
    );
    if let Some(at) = isolation.loaded_at {
        gauge("isolation_loaded_timestamp_seconds", "When the table was loaded last", at.unix());
    }
    let applied = status.applied.as_deref().and_then(|version| version.split_once('/'));
    if let Some(counter) = applied.and_then(|(_, counter)| counter.parse().ok()) {
        gauge("applied_version", "Version of the cluster's history applied here", counter);
    }
    let modes = Family::<ModeLabel, Gauge>::default();
    for mode in ["off", "audit", "enforce"] {
        let label = ModeLabel { mode: mode.to_owned() };
        modes.get_or_create(&label).set((isolation.in_force == mode).into());
    }
    registry.register("isolation_in_force", "1 for what the table does", modes);
    let refused = ConstCounter::new(isolation.refused_packets);
    registry.register(
        "isolation_refused_packets",
        "Packets from whoever may not reach a port",
        refused,
    );
    let blocked = ConstCounter::new(isolation.blocked_packets);
    registry.register("isolation_blocked_packets", "Packets from or to blocked addresses", blocked);
    if let Some(tunnel) = &status.tunnel {
        tunnel_metrics(&mut registry, tunnel, now);
    }
    let counter = ConstCounter::new(status.renewals);
    registry.register("renewals", "Certificates fetched since the start", counter);
    registry.register("scrapes", "Times these metrics were read", ConstCounter::new(scrapes));
    let mut text = String::new();
    encode(&mut text, &registry).expect("writing to a String");
    text
}

/// Mode tunnel; no series of it in mode files.
fn tunnel_metrics(registry: &mut Registry, tunnel: &TunnelStatus, now: OffsetDateTime) {
    let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    let mut gauge = |name: &str, help: &str, value: i64| {
        let gauge = Gauge::<i64>::default();
        gauge.set(value);
        registry.register(name, help, gauge);
    };
    gauge(
        "tunnel_ready",
        "1 if Ray's connections are carried and capture is proved",
        tunnel.ready.into(),
    );
    gauge("tunnel_flows", "Flows that ray-tunnel carries", signed(tunnel.flows));
    gauge(
        "tunnel_draining",
        "Old processes of ray-tunnel whose flows go on",
        i64::try_from(tunnel.draining).unwrap_or(i64::MAX),
    );
    gauge(
        "tunnel_oldest_flow_seconds",
        "Age of the oldest flow",
        signed(tunnel.oldest_flow_seconds.unwrap_or_default()),
    );
    if let Some(at) = tunnel.proved_at {
        let age = now.unix_timestamp() - at.unix();
        gauge("tunnel_proof_age_seconds", "Seconds since capture was proved last", age);
    }
    if let Some(at) = tunnel.first_cut {
        let left = at.unix() - now.unix_timestamp();
        gauge(
            "tunnel_seconds_to_first_cut",
            "Seconds to the first cut of flows if nothing is renewed",
            left,
        );
    }
    if let Some(peer) = tunnel.peers.first() {
        let left = peer.not_after.unix() - now.unix_timestamp();
        gauge(
            "tunnel_peer_seconds_to_expiry",
            "Seconds to the end of the first leaf among those of peers with flows",
            left,
        );
    }
    let away = i64::from(tunnel.ca_away_since.is_some());
    gauge("tunnel_ca_away", "1 if ray-tunnel works in the grace of a CA that is away", away);
    let mut register = |name: &str, help: &str, count: u64| {
        registry.register(name, help, ConstCounter::new(count));
    };
    register(
        "tunnel_restarts",
        "Starts of ray-tunnel after one that ended by itself",
        u64::from(tunnel.restarts),
    );
    register("tunnel_flows_out", "Flows to other nodes since ray-tunnel started", tunnel.flows_out);
    register("tunnel_flows_in", "Flows from other nodes since ray-tunnel started", tunnel.flows_in);
    register("tunnel_flows_cut", "Flows cut since the agent started", tunnel.flows_cut);
    register("tunnel_bytes_out", "Bytes to other nodes since ray-tunnel started", tunnel.bytes_out);
    register("tunnel_bytes_in", "Bytes from other nodes since ray-tunnel started", tunnel.bytes_in);
    register(
        "tunnel_handshakes",
        "Handshakes that were finished since ray-tunnel started",
        tunnel.handshakes,
    );
    register(
        "tunnel_strangers",
        "Connections to Ray's ports by other users of this host, refused",
        tunnel.strangers,
    );
    register("tunnel_uncaptured", "Connections past the tunnel, refused", tunnel.uncaptured);
    let refusals = Family::<ReasonLabel, Counter>::default();
    for (reason, count) in &tunnel.refusals {
        refusals.get_or_create(&ReasonLabel { reason: reason.clone() }).inc_by(*count);
    }
    registry.register("tunnel_refusals", "Flows that were refused, by reason", refusals);
}

/// What Ray's processes serve: where no leaf is served there is no horizon, and no series of it.
fn running(registry: &mut Registry, served: &Served, now: OffsetDateTime) {
    let horizons = Family::<ClassLabel, Gauge>::default();
    let states = Family::<StateLabel, Gauge>::default();
    for (class, name, horizon) in
        [(Class::Node, "node", served.horizon), (Class::Driver, "driver", served.drivers_horizon)]
    {
        if let Some(at) = horizon {
            let left = at.unix() - now.unix_timestamp();
            horizons.get_or_create(&ClassLabel { class: name }).set(left);
        }
        for (state, count) in served.counts(class) {
            let label = StateLabel { class: name, state: state.word() };
            states.get_or_create(&label).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }
    registry.register(
        "seconds_to_horizon",
        "Seconds to the first end of a leaf that a process of Ray serves here, by class (node, driver)",
        horizons,
    );
    registry.register(
        "ray_processes",
        "Processes of Ray that serve a leaf or must, by class (node, driver) and state (fresh, unknown, recycle-due, recycle-overdue)",
        states,
    );
    let mut gauge = |name: &str, help: &str, value: i64| {
        let gauge = Gauge::<i64>::default();
        gauge.set(value);
        registry.register(name, help, gauge);
    };
    gauge(
        "ray_plain_ports",
        "Ports of Ray without TLS",
        i64::try_from(served.plain_ports().count()).unwrap_or(i64::MAX),
    );
    gauge(
        "ray_looked_timestamp_seconds",
        "When what Ray serves was looked at last",
        served.as_of.unix(),
    );
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    async fn serving(headers_time_max: Duration) -> SocketAddr {
        let listener = listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/livez", get(async || "ok\n"));
        tokio::spawn(accept_all(listener, router, headers_time_max));
        address
    }

    /// Sends a request and reads until the other end closes.
    async fn ask(address: SocketAddr) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET /livez HTTP/1.1\r\nHost: agent\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn connections_are_bounded_in_number_and_time_and_are_not_kept() {
        let headers_time_max = Duration::from_millis(500);
        let address = serving(headers_time_max).await;
        // The answer ends though the caller did not ask to close.
        let answer = tokio::time::timeout(SOON, ask(address)).await.expect("kept alive");
        assert!(answer.ends_with("ok\n"), "{answer}");

        let began = Instant::now();
        let mut mute = Vec::new();
        for _ in 0..CONNECTIONS_MAX {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(b"GET /livez HTTP/1.1\r\n").await.unwrap();
            mute.push(stream);
        }
        let answer = tokio::time::timeout(SOON, ask(address)).await;
        assert!(answer.expect("the mute hold all places").ends_with("ok\n"));
        assert!(began.elapsed() >= headers_time_max, "more connections at once than said");
    }
}
