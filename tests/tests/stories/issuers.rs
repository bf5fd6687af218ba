//! The CA looks after itself: issuers, CRLs and its own certificate are renewed by the clock.

use std::time::Duration;

use ca_server::{store::Authority, upkeep};
use node_agent::keys::PrivateKey;
use raymtls_proto::{clock::Clock, leaf::LeafFacts, v1};
use raymtls_tests::{Deployment, node_leaf};

const DAY: Duration = Duration::from_secs(86_400);

#[tokio::test]
async fn the_ca_makes_its_next_issuer_in_time_and_old_leaves_go_on() {
    let deployment = Deployment::start().await;
    // Leaves live 20 days, so the issuer's 90 days are short of two of them after 50.
    deployment.cluster("c1", DAY * 10).await;
    let member = deployment.worker("c1", "w1", "10.0.0.1").await;
    let leaf = async || {
        let key = PrivateKey::generate().unwrap();
        member.client.issue_leaf(node_leaf(&key)).await.unwrap().leaf.unwrap()
    };
    let issuer_of =
        |chain: &v1::CertificateChain| LeafFacts::parse(&chain.issuers_der[0]).unwrap().serial;
    let first = leaf().await;
    let authority = Authority::Cluster("c1".parse().unwrap());
    let issuers = || deployment.ca.authority(&authority).unwrap().issuers().len();

    // Two thirds of the life of an identity later it was renewed; the story stays with one node
    // whose identity lives 30 days, and so looks at the authority alone.
    deployment.clock.advance(DAY * 49);
    upkeep::pass(&deployment.ca).await;
    assert_eq!(issuers(), 1, "too early");
    deployment.clock.advance(DAY * 2);
    upkeep::pass(&deployment.ca).await;
    assert_eq!(issuers(), 2, "the next issuer did not come");

    // New leaves are the new issuer's, under the same root.
    let deployment = deployment.restart().await;
    let member = deployment.worker("c1", "w2", "10.0.0.2").await;
    let key = PrivateKey::generate().unwrap();
    let answer = member.client.issue_leaf(node_leaf(&key)).await.unwrap();
    let second = answer.leaf.unwrap();
    assert_ne!(issuer_of(&first), issuer_of(&second));
    let bundle = answer.bundle.unwrap();
    assert_eq!(bundle.roots_der.len(), 1);
    assert_eq!(bundle.crls_der.len(), 3, "the root's and one of each live issuer");

    // No certificate outlives its issuer, whatever the settings ask for.
    let live = deployment.ca.authority(&authority).unwrap();
    let facts = LeafFacts::parse(&second.leaf_der).unwrap();
    assert!(facts.not_after <= live.active().not_after());
    assert!(facts.not_after - deployment.clock.now() <= time::Duration::days(20));
    deployment.finish().await;
}

#[tokio::test]
async fn crls_are_signed_anew_before_they_end() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    deployment.worker("c1", "w1", "10.0.0.1").await;
    let authority = Authority::Cluster("c1".parse().unwrap());
    let number = async || {
        let store: &dyn ca_server::store::Store = &*deployment.store;
        store.crls(authority.clone()).await.unwrap().unwrap().number
    };
    let first = number().await;
    deployment.clock.advance(DAY - Duration::from_secs(60));
    upkeep::pass(&deployment.ca).await;
    assert_eq!(number().await, first, "too early");
    deployment.clock.advance(Duration::from_secs(60));
    upkeep::pass(&deployment.ca).await;
    assert_eq!(number().await, first + 1);
    deployment.finish().await;
}
