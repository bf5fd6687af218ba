//! Plain HTTP on loopback: `/metrics`, `/livez`, `/readyz`. It reads the status and changes nothing.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use axum::{Router, extract::State, http::StatusCode, routing::get};
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::ConstCounter, family::Family, gauge::Gauge},
    registry::Registry,
};
use raymtls_proto::clock::Clock;
use time::OffsetDateTime;
use tokio::{net::TcpListener, sync::watch};

use crate::status::Status;

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
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!(%error, "metrics and health ended");
    }
}

/// Ready means that what starts now finds a valid leaf.
async fn ready(State(shared): State<Shared>) -> (StatusCode, String) {
    let until = shared.status.borrow().files_work_until;
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
    let counter = ConstCounter::new(status.renewals);
    registry.register("renewals", "Certificates fetched since the start", counter);
    registry.register("scrapes", "Times these metrics were read", ConstCounter::new(scrapes));
    let mut text = String::new();
    encode(&mut text, &registry).expect("writing to a String");
    text
}
