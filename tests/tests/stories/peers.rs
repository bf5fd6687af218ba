//! A revocation reaches every peer, and each says so.

use std::time::Duration;

use raymtls_tests::{Deployment, peers};

const PEERS: usize = 200;
/// Ten times the bar of a second, on a machine that does other things too.
const ALL_WITHIN: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_peers_apply_a_revocation_within_the_bar() {
    let deployment = Deployment::start().await;
    let figures = peers::revoke_one_among(&deployment, PEERS).await;
    println!("{figures}");
    assert_eq!((figures.told.len(), figures.acknowledged.len()), (PEERS, PEERS));
    let last = figures.acknowledged.last().unwrap();
    assert!(*last < ALL_WITHIN, "the last acknowledgement came after {last:?}");
    deployment.finish().await;
}
