//! Plain HTTP on loopback: `/metrics`, `/livez` (the process runs), `/readyz` (it can sign and
//! commit).

use std::sync::Arc;

use axum::{Router, extract::State, http::StatusCode, routing::get};

use crate::ca::Ca;

/// The routes.
pub fn router(ca: Arc<Ca>) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .with_state(ca)
}

async fn metrics(State(ca): State<Arc<Ca>>) -> ([(&'static str, &'static str); 1], String) {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([("content-type", kind)], ca.metrics.text())
}

async fn ready(State(ca): State<Arc<Ca>>) -> (StatusCode, &'static str) {
    if ca.is_stopping() {
        (StatusCode::SERVICE_UNAVAILABLE, "stopping\n")
    } else if ca.store.is_serving() {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "the store cannot commit\n")
    }
}
