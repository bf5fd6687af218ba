//! The CA killed under load, again and again, at random moments and between any two steps of an
//! issuance. After each death the store is opened and must hold everything that was acknowledged,
//! and nothing half: no issuance lost, no use spent twice, no serial twice, the audit chain whole.
//! SIGKILL leaves the system's page cache alone: this shows nothing about a power cut.
//!
//! Wants a `ca-server` built with `--features fail-points`, in `RAYMTLS_FAILPOINT_BIN` or in the
//! target folder, and `ca-admin` beside it.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

mod crash {
    pub(crate) mod deployment;
    pub(crate) mod ledger;
    pub(crate) mod load;
}

use std::{sync::Arc, time::Duration};

use ca_server::{failpoint::Point, store::Store};
use raymtls_proto::clock::{Clock, SystemClock};
use raymtls_tests::judge;
use tokio::time::{sleep, timeout};

use crash::{deployment::Deployment, ledger::Ledger, load};

const ROUNDS: usize = 20;
/// Kept low: the fail point's turn must come while the load runs.
const TURN_MAX: u64 = 60;
const POINT_WAIT: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_any_moment_the_ca_loses_nothing_it_acknowledged() {
    let deployment = Deployment::new().await;
    let ledger = Arc::new(Ledger::default());

    // Someone pulls the plug at random moments.
    for round in 0..ROUNDS {
        let mut server = deployment.start(None).await;
        let load = load::start(&deployment, &ledger);
        sleep(Duration::from_millis(rand::random_range(20..500))).await;
        server.kill().await;
        load.stop().await;
        ledger.check(&deployment, &format!("random {round}")).await;
    }

    // And between any two steps of an issuance.
    for round in 0..ROUNDS {
        let point = Point::ALL[round % Point::ALL.len()];
        let armed = format!("{}:{}", point.name(), rand::random_range(5..TURN_MAX));
        let mut server = deployment.start(Some(&armed)).await;
        let load = load::start(&deployment, &ledger);
        let died = timeout(POINT_WAIT, server.died()).await;
        let died = died.unwrap_or_else(|_| {
            panic!("{armed} was not reached: is the binary built with --features fail-points?")
        });
        assert!(died, "{armed}: the server ended otherwise\n{}", deployment.log());
        load.stop().await;
        ledger.check(&deployment, &armed).await;
    }

    // What was never answered is asked again, and costs no second use.
    let mut server = deployment.start(None).await;
    load::settle(&deployment, &ledger).await;
    server.kill().await;
    ledger.check_all(&deployment).await;
    let store = deployment.store();
    judge::every_certificate(&store, SystemClock.now()).await;
    store.close().await;
    eprintln!("{}", ledger.summary());
    assert!(ledger.acknowledged() > 500, "too little load to show anything: {}", ledger.summary());
}
