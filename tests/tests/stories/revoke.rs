//! A node is thrown out: it gets nothing any more, at once and for good.

use std::time::{Duration, Instant};

use node_agent::{keys::PrivateKey, statedir::Identity};
use raymtls_proto::v1;
use raymtls_tests::{Deployment, ask, node_leaf, word};

const DAY: Duration = Duration::from_secs(86_400);

#[tokio::test]
async fn a_revoked_node_gets_nothing_any_more_and_a_restart_changes_nothing() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let (token, key) = (deployment.token("c1", v1::Role::Worker, 1).await, PrivateKey::generate());
    let key = key.unwrap();
    // From its address, which is blocked only where a call came from it.
    let request = ask(&token, "c1", "w1", &[], &key);
    let source = "10.0.0.1".parse().unwrap();
    let answer = ca_server::enroll::enroll(&deployment.ca, request, source).await.unwrap();
    let identity = Identity::new(key, answer.identity.unwrap()).unwrap();
    let other = deployment.worker("c1", "w2", "10.0.0.2").await;
    let client = deployment.node_client(&identity);
    client.issue_leaf(node_leaf(&PrivateKey::generate().unwrap())).await.unwrap();
    let before = deployment.token("c1", v1::Role::Worker, 9).await;

    let revoked = deployment.revoke("c1", "w1").await;
    assert_eq!(revoked.certificates_revoked, 2, "an identity and a leaf");
    assert!(revoked.notes.iter().any(|note| note.contains("Ray checks no CRL")));

    let mut deployment = deployment;
    for round in ["at once", "after a restart"] {
        let client = deployment.node_client(&identity);
        let key = PrivateKey::generate().unwrap();
        let renewal = client.renew_identity(key.csr_der().unwrap()).await;
        assert_eq!(word(renewal), "REVOKED", "{round}");
        assert_eq!(word(client.issue_leaf(node_leaf(&key)).await), "REVOKED", "{round}");
        assert_eq!(word(client.sync(v1::SyncRequest::default()).await), "REVOKED", "{round}");
        assert_eq!(word(client.leave().await), "REVOKED", "{round}");
        let enroll = |token: &str, name: &str, address: &str, key: &PrivateKey| {
            let request = ask(token, "c1", name, &[address], key);
            let mut client = deployment.enrollment_client();
            async move { word(client.enroll(request).await) }
        };
        // The token generates names: the revoked one would not come up again anyway. From its
        // address with a token made before, nothing.
        assert_eq!(enroll(&before, "w", "10.0.0.1", &key).await, "ADDRESS_BLOCKED", "{round}");
        // Under its name, nothing with any token.
        let named = deployment.token_for("c1", "w1").await;
        assert_eq!(enroll(&named, "w1", "10.0.0.77", &key).await, "REVOKED", "{round}");
        // The innocent go on.
        let innocent = deployment.node_client(&other.identity);
        let leaf = innocent.issue_leaf(node_leaf(&PrivateKey::generate().unwrap())).await;
        assert_eq!(word(leaf), "OK", "{round}");
        deployment = deployment.restart().await;
    }

    // An operator who makes a new token has taken the address back on purpose.
    deployment.clock.advance(Duration::from_millis(1));
    let after = deployment.token("c1", v1::Role::Worker, 1).await;
    let key = PrivateKey::generate().unwrap();
    let request = ask(&after, "c1", "w3", &["10.0.0.1"], &key);
    assert_eq!(word(deployment.enrollment_client().enroll(request).await), "OK");
    deployment.finish().await;
}

#[tokio::test]
async fn the_waiting_sync_of_a_revoked_node_ends_at_once() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let member = deployment.worker("c1", "w1", "10.0.0.1").await;
    let first = member.client.sync(v1::SyncRequest::default()).await.unwrap();
    let wait = v1::SyncRequest { have: first.version, wait_seconds: 30, ..Default::default() };
    let waiting = tokio::spawn({
        let client = member.client.clone();
        async move { word(client.sync(wait).await) }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!waiting.is_finished(), "a Sync without news did not wait");

    let started = Instant::now();
    deployment.revoke("c1", "w1").await;
    assert_eq!(waiting.await.unwrap(), "REVOKED");
    // Milliseconds; ten times the bar of a second for a machine that does other things too.
    assert!(started.elapsed() < Duration::from_secs(10));
    deployment.finish().await;
}

#[tokio::test]
async fn revoking_a_node_voids_what_is_left_of_its_token() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let token = deployment.token("c1", v1::Role::Worker, 5).await;
    let key = PrivateKey::generate().unwrap();
    let member = deployment.enroll(ask(&token, "c1", "w", &["10.0.0.1"], &key), key).await.unwrap();
    assert_eq!(deployment.revoke("c1", &member.name).await.token_uses_voided, 4);
    let key = PrivateKey::generate().unwrap();
    let request = ask(&token, "c1", "w", &["10.0.0.2"], &key);
    assert_eq!(word(deployment.enrollment_client().enroll(request).await), "TOKEN_REVOKED");
    deployment.finish().await;
}

#[tokio::test]
async fn a_revoked_node_is_forgotten_only_when_its_last_leaf_has_ended() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", Duration::from_secs(120)).await;
    let member = deployment.worker("c1", "w1", "10.0.0.1").await;
    member.client.issue_leaf(node_leaf(&PrivateKey::generate().unwrap())).await.unwrap();
    deployment.revoke("c1", "w1").await;
    let forget = || {
        let request = v1::ForgetNodeRequest { cluster: "c1".to_owned(), name: "w1".to_owned() };
        ca_server::admin::nodes::forget(&deployment.ca, &deployment.operator, request)
    };
    let refused = forget().await.unwrap_err().refusal();
    assert_eq!(refused.reason().as_str(), "LEAF_STILL_LIVES");
    deployment.clock.advance(Duration::from_secs(240));
    forget().await.unwrap();
    let member = deployment.worker("c1", "w1", "10.0.0.1").await;
    member.client.issue_leaf(node_leaf(&PrivateKey::generate().unwrap())).await.unwrap();
    deployment.finish().await;
}
