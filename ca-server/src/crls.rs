//! CRLs over plain HTTP, on a listener of their own, for proxies that check a whole chain. They are
//! signed and no secret; Ray asks for none. Where no `crl_listen` is configured there is no such
//! listener.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::{Path, State},
    http::StatusCode,
    routing::get,
};
use raymtls_proto::bundle::crls_to_pem;
use tokio::{net::TcpListener, sync::Mutex};

use crate::{ca::Ca, http, store::Authority};

/// What was read from the store is answered with for so long: whoever asks often costs little.
const FRESH: Duration = Duration::from_secs(1);

/// Serves until the server stops.
pub async fn serve(ca: Arc<Ca>, listener: TcpListener) {
    let router = router(Arc::clone(&ca));
    http::serve_router(ca, "crl", listener, router).await;
}

fn router(ca: Arc<Ca>) -> Router {
    let site = Arc::new(Site { ca, read: Mutex::new(HashMap::new()) });
    Router::new()
        .route("/crl/control.pem", get(control))
        .route("/crl/cluster/{file}", get(cluster))
        .with_state(site)
}

/// The server, and what it answered lately: one entry an authority at most.
struct Site {
    ca: Arc<Ca>,
    read: Mutex<HashMap<Authority, (Instant, String)>>,
}

type Answer = Result<([(&'static str, &'static str); 2], String), StatusCode>;

async fn control(State(site): State<Arc<Site>>) -> Answer {
    answer(&site, Authority::Control).await
}

async fn cluster(State(site): State<Arc<Site>>, Path(file): Path<String>) -> Answer {
    let id = file.strip_suffix(".pem").and_then(|name| name.parse().ok());
    answer(&site, Authority::Cluster(id.ok_or(StatusCode::NOT_FOUND)?)).await
}

/// The root's CRL and those of all live issuers, in PEM.
async fn answer(site: &Site, authority: Authority) -> Answer {
    const HEADERS: [(&str, &str); 2] =
        [("content-type", "application/x-pem-file"), ("cache-control", "max-age=60")];
    // An authority that is not there costs no look into the store.
    site.ca.authority(&authority).map_err(|_| StatusCode::NOT_FOUND)?;
    // Those of the backup may lack revocations that the nodes still know of.
    site.ca.require_accepted().map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?;
    let mut read = site.read.lock().await;
    if let Some((at, pem)) = read.get(&authority)
        && at.elapsed() < FRESH
    {
        return Ok((HEADERS, pem.clone()));
    }
    let set = site.ca.store.crls(authority.clone()).await;
    let set = set.map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?.ok_or(StatusCode::NOT_FOUND)?;
    let pem = crls_to_pem(&set.crls_der);
    read.insert(authority, (Instant::now(), pem.clone()));
    Ok((HEADERS, pem))
}

#[cfg(test)]
mod tests {
    use raymtls_proto::v1::{self, create_cluster_request::Life};

    use super::*;
    use crate::{
        admin::{Operator, clusters},
        http::tests::get_path,
        upkeep::{self, tests::new_ca},
    };

    #[tokio::test]
    async fn each_authority_s_crls_are_served_and_nothing_else() {
        let (ca, _) = new_ca().await;
        let operator = Operator::on_socket(Some(0), 0, false);
        let request = v1::CreateClusterRequest {
            cluster: "c1".to_owned(),
            life: Some(Life::MaxJobSeconds(86_400)),
        };
        clusters::create(&ca, &operator, request).await.unwrap();
        upkeep::pass(&ca).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(Arc::clone(&ca), listener));

        for (path, crls) in [("/crl/control.pem", 2), ("/crl/cluster/c1.pem", 2)] {
            let answer = get_path(address, path).await;
            assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
            assert_eq!(answer.matches("BEGIN X509 CRL").count(), crls, "{path}: root and issuer");
        }
        for path in ["/crl/cluster/c2.pem", "/crl/cluster/c1", "/crl/", "/metrics", "/crl/../etc"] {
            let answer = get_path(address, path).await;
            assert!(answer.starts_with("HTTP/1.1 404"), "{path}: {answer}");
        }
    }
}
