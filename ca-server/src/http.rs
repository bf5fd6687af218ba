//! Plain HTTP on loopback: `/metrics`, `/livez` (the process runs), `/readyz` (it can sign and
//! commit). Few connections at once, none of them for long, and one answer on each.

use std::{io, sync::Arc, time::Duration};

use axum::{Router, extract::State, http::StatusCode, routing::get};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tracing::debug;

use crate::{accept::AcceptFailures, ca::Ca};

/// Connections at once; the next ones wait.
const CONNECTIONS_MAX: u32 = 16;
/// A request's headers must be there after this long.
const HEADERS_TIME_MAX: Duration = Duration::from_secs(5);
/// A connection is cut off after this long.
const CONNECTION_TIME_MAX: Duration = Duration::from_secs(15);
/// Names in an answer at most.
const NAMES_MAX: usize = 8;

/// Serves until the server stops, then finishes what it began.
pub async fn serve(ca: Arc<Ca>, listener: TcpListener) {
    let router = router(Arc::clone(&ca));
    serve_router(ca, "http", listener, router).await;
}

/// The same bounds for what another listener answers.
pub async fn serve_router(ca: Arc<Ca>, name: &'static str, listener: TcpListener, router: Router) {
    serve_within(ca, name, listener, router, HEADERS_TIME_MAX).await;
}

async fn serve_within(
    ca: Arc<Ca>,
    name: &'static str,
    listener: TcpListener,
    router: Router,
    headers_time_max: Duration,
) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX as usize));
    let mut failures = AcceptFailures::new(name);
    loop {
        let accepted = tokio::select! {
            accepted = accept(&slots, &listener) => accepted,
            () = ca.stopped() => break,
        };
        let (slot, stream) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                ca.metrics.accept_failed(name);
                failures.pause(&error).await;
                continue;
            }
        };
        let (ca, router) = (Arc::clone(&ca), router.clone());
        tokio::spawn(async move {
            let answering = answer(&ca, router, stream, headers_time_max);
            if tokio::time::timeout(CONNECTION_TIME_MAX, answering).await.is_err() {
                debug!(listener = name, "a connection was cut off");
            }
            drop(slot);
        });
    }
    drop(listener);
    // All slots are free once the last connection has ended.
    let _ = slots.acquire_many(CONNECTIONS_MAX).await;
}

async fn accept(
    slots: &Arc<Semaphore>,
    listener: &TcpListener,
) -> io::Result<(tokio::sync::OwnedSemaphorePermit, TcpStream)> {
    let slot = Arc::clone(slots).acquire_owned().await.expect("the semaphore is never closed");
    let (stream, _) = listener.accept().await?;
    Ok((slot, stream))
}

async fn answer(ca: &Ca, router: Router, stream: TcpStream, headers_time_max: Duration) {
    let mut builder = auto::Builder::new(TokioExecutor::new()).http1_only();
    let mut http1 = builder.http1();
    http1.timer(TokioTimer::new()).header_read_timeout(headers_time_max).keep_alive(false);
    let service = TowerToHyperService::new(router);
    let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = ca.stopped() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        debug!(listener = "http", %error, "a connection ended badly");
    }
}

fn router(ca: Arc<Ca>) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .with_state(ca)
}

async fn metrics(State(ca): State<Arc<Ca>>) -> ([(&'static str, &'static str); 1], String) {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ca.metrics.ready(why_not_ready(&ca).await.is_none());
    ca.metrics.horizons(&ca.contacts.horizons(ca.clock.now()));
    ca.metrics.audit_log_alarms(ca.log_fault().is_some(), ca.contacts.log_alarms());
    ([("content-type", kind)], ca.metrics.text())
}

async fn ready(State(ca): State<Arc<Ca>>) -> (StatusCode, String) {
    match why_not_ready(&ca).await {
        None => (StatusCode::OK, "ok\n".to_owned()),
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
    }
}

async fn why_not_ready(ca: &Ca) -> Option<String> {
    if ca.is_stopping() {
        return Some("stopping".to_owned());
    }
    if !ca.store.is_serving() {
        return Some("the store cannot commit".to_owned());
    }
    let now = ca.clock.now();
    let mut expired = Vec::new();
    for (authority, live) in ca.authorities() {
        // What cannot be looked up is not known to have ended.
        if live.active().not_after() <= now && !ca.has_ended(&authority).await.unwrap_or(false) {
            expired.push(authority.to_string());
        }
    }
    let more = expired.len().saturating_sub(NAMES_MAX);
    expired.truncate(NAMES_MAX);
    let names = expired.join(", ");
    match more {
        0 if names.is_empty() => None,
        0 => Some(format!("the active issuer has expired: {names}")),
        more => Some(format!("the active issuer has expired: {names} and {more} more")),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Instant;

    use raymtls_proto::v1::{self, create_cluster_request::Life};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::{
        admin::{Operator, clusters},
        upkeep::tests::new_ca,
    };

    const DAY: Duration = Duration::from_secs(86_400);

    pub(crate) async fn get_path(address: std::net::SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: ca\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    async fn serving(ca: &Arc<Ca>, headers_time_max: Duration) -> std::net::SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = router(Arc::clone(ca));
        tokio::spawn(serve_within(Arc::clone(ca), "http", listener, router, headers_time_max));
        address
    }

    #[tokio::test]
    async fn connections_that_say_nothing_are_bounded_in_number_and_time() {
        let (ca, _) = new_ca().await;
        let headers_time_max = Duration::from_millis(500);
        let address = serving(&ca, headers_time_max).await;
        assert!(get_path(address, "/livez").await.ends_with("ok\n"));

        let began = Instant::now();
        let mut mute = Vec::new();
        for _ in 0..CONNECTIONS_MAX {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(b"GET /livez HTTP/1.1\r\n").await.unwrap();
            mute.push(stream);
        }
        let answer = get_path(address, "/livez");
        let answer = tokio::time::timeout(Duration::from_secs(10), answer).await;
        assert!(answer.expect("the mute hold all places").ends_with("ok\n"));
        assert!(began.elapsed() >= headers_time_max, "more connections at once than said");
        let mut rest = Vec::new();
        let ended = mute[0].read_to_end(&mut rest);
        tokio::time::timeout(Duration::from_secs(10), ended).await.expect("still open").ok();
    }

    #[tokio::test]
    async fn a_connection_gets_one_answer_and_ends() {
        let (ca, _) = new_ca().await;
        let address = serving(&ca, HEADERS_TIME_MAX).await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET /livez HTTP/1.1\r\nHost: ca\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        let ended = tokio::time::timeout(HEADERS_TIME_MAX / 2, stream.read_to_string(&mut answer));
        ended.await.expect("it is kept for a next request").unwrap();
        assert!(answer.ends_with("ok\n"), "{answer}");
    }

    #[tokio::test]
    async fn a_server_whose_issuer_has_expired_is_not_ready_and_says_whose() {
        let (ca, clock) = new_ca().await;
        let operator = Operator::on_socket(Some(0), 0, false);
        let create = |cluster: &str, life| {
            let request =
                v1::CreateClusterRequest { cluster: cluster.to_owned(), life: Some(life) };
            clusters::create(&ca, &operator, request)
        };
        create("c1", Life::MaxJobSeconds(86_400)).await.unwrap();
        create("over", Life::MaxLifeSeconds(86_400)).await.unwrap();
        let address = serving(&ca, HEADERS_TIME_MAX).await;
        let ready = async || get_path(address, "/readyz").await;
        assert!(ready().await.starts_with("HTTP/1.1 200"));

        // Nobody tended anything for as long as issuers live.
        clock.advance(DAY * 400);
        let answer = ready().await;
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
        assert!(answer.ends_with("expired: control, cluster/c1\n"), "{answer}");
    }
}
