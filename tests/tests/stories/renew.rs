//! An identity is renewed for a new key, replies are lost, the old one is retired; leaves are
//! renewed for their key until the key is too old.

use std::time::Duration;

use node_agent::{keys::PrivateKey, statedir::Identity};
use raymtls_proto::{leaf::LeafFacts, v1};
use raymtls_tests::{Deployment, Member, node_leaf, word};

const DAY: Duration = Duration::from_secs(86_400);

async fn next_identity(member: &Member) -> Identity {
    let key = PrivateKey::generate().unwrap();
    let answer = member.client.renew_identity(key.csr_der().unwrap()).await.unwrap();
    Identity::new(key, answer.identity.unwrap()).unwrap()
}

#[tokio::test]
async fn any_number_of_lost_replies_ends_in_the_same_identity() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let member = deployment.worker("c1", "w1", "10.0.0.1").await;
    let key = PrivateKey::generate().unwrap();
    let csr_der = key.csr_der().unwrap();
    let first = member.client.renew_identity(csr_der.clone()).await.unwrap().identity;
    for _ in 0..3 {
        let client = deployment.node_client(&member.identity);
        let again = client.renew_identity(csr_der.clone()).await.unwrap().identity;
        assert_eq!(again, first);
    }
    let deployment = deployment.restart().await;
    let client = deployment.node_client(&member.identity);
    assert_eq!(client.renew_identity(csr_der).await.unwrap().identity, first);

    // The current identity works until the next is used.
    client.issue_leaf(node_leaf(&PrivateKey::generate().unwrap())).await.unwrap();
    deployment.finish().await;
}

#[tokio::test]
async fn the_first_call_with_the_next_identity_retires_the_one_before() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let member = deployment.worker("c1", "w1", "10.0.0.1").await;
    let next = next_identity(&member).await;

    let client = deployment.node_client(&next);
    client.issue_leaf(node_leaf(&PrivateKey::generate().unwrap())).await.unwrap();
    let retired = member.client.issue_leaf(node_leaf(&PrivateKey::generate().unwrap())).await;
    assert_eq!(word(retired), "IDENTITY_REUSED");

    // Using a retired one is an event, and blocks nobody.
    let records = ca_server::store::Store::audit(&*deployment.store, 0, 200).await.unwrap();
    let reused = ca_server::store::records::AuditKind::IdentityReused;
    assert_eq!(records.iter().filter(|record| record.kind() == reused).count(), 1);
    client.issue_leaf(node_leaf(&PrivateKey::generate().unwrap())).await.unwrap();
    deployment.finish().await;
}

#[tokio::test]
async fn an_identity_wants_a_key_of_its_own() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let member = deployment.worker("c1", "w1", "10.0.0.1").await;
    let own = member.identity.key.csr_der().unwrap();
    assert_eq!(word(member.client.renew_identity(own.clone()).await), "CSR_INVALID");
    let leaf = v1::IssueLeafRequest { csr_der: own, ..node_leaf(&member.identity.key) };
    assert_eq!(word(member.client.issue_leaf(leaf).await), "CSR_INVALID", "the two-key split");
    deployment.finish().await;
}

#[tokio::test]
async fn a_leaf_is_renewed_for_its_key_for_one_leaf_life_and_no_longer() {
    let deployment = Deployment::start().await;
    // Leaves live 4 minutes.
    deployment.cluster("c1", Duration::from_secs(120)).await;
    let member = deployment.worker("c1", "w1", "10.0.0.1").await;
    let key = PrivateKey::generate().unwrap();
    let issue = || deployment.node_client(&member.identity);

    let first = issue().issue_leaf(node_leaf(&key)).await.unwrap().leaf.unwrap();
    deployment.clock.advance(Duration::from_secs(239));
    let second = issue().issue_leaf(node_leaf(&key)).await.unwrap().leaf.unwrap();
    let facts = |chain: &v1::CertificateChain| LeafFacts::parse(&chain.leaf_der).unwrap();
    assert_eq!(facts(&first).spki_der, facts(&second).spki_der);
    assert_ne!(facts(&first).serial, facts(&second).serial);
    assert!(facts(&first).not_after < facts(&second).not_after);

    deployment.clock.advance(Duration::from_secs(1));
    assert_eq!(word(issue().issue_leaf(node_leaf(&key)).await), "KEY_TOO_OLD");
    issue().issue_leaf(node_leaf(&PrivateKey::generate().unwrap())).await.unwrap();
    deployment.finish().await;
}

#[tokio::test]
async fn a_leaf_holds_a_subset_of_what_is_bound_to_the_node() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let member = deployment.worker("c1", "w1", "10.0.0.1").await;
    let key = PrivateKey::generate().unwrap();
    let foreign = v1::IssueLeafRequest { addresses: vec!["10.0.0.2".into()], ..node_leaf(&key) };
    assert_eq!(word(member.client.issue_leaf(foreign).await), "ADDRESS_NOT_ALLOWED");
    let named = v1::IssueLeafRequest { dns_names: vec!["head.example".into()], ..node_leaf(&key) };
    assert_eq!(word(member.client.issue_leaf(named).await), "NAME_NOT_ALLOWED");

    let leaf = member.client.issue_leaf(node_leaf(&key)).await.unwrap().leaf.unwrap();
    let facts = LeafFacts::parse(&leaf.leaf_der).unwrap();
    let addresses: Vec<String> = facts.addresses.iter().map(ToString::to_string).collect();
    assert_eq!(addresses, ["10.0.0.1", "127.0.0.1", "::1"]);
    assert_eq!(facts.uris, ["spiffe://ray.example/cluster/c1/node/w1"]);
    assert_eq!(facts.dns_names, ["localhost"]);
    deployment.finish().await;
}

#[tokio::test]
async fn an_expired_identity_must_enrol_again() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let member = deployment.worker("c1", "w1", "10.0.0.1").await;
    deployment.clock.advance(DAY * 30 + Duration::from_secs(1));
    // The server's own certificate has ended too; the upkeep of a running server renews it.
    let deployment = deployment.restart().await;
    let client = deployment.node_client(&member.identity);
    let late = client.issue_leaf(node_leaf(&PrivateKey::generate().unwrap())).await;
    assert_ne!(word(late), "OK");

    // Its name is free by then.
    let member = deployment.worker("c1", "w1", "10.0.0.1").await;
    member.client.issue_leaf(node_leaf(&PrivateKey::generate().unwrap())).await.unwrap();
    deployment.finish().await;
}
