//! A node renews and asks for leaves while an operator revokes it: whoever comes first, nothing is
//! issued after the revocation, and everything issued before it is revoked.

use std::{sync::Arc, time::Duration};

use ca_server::store::records::AuditKind;
use node_agent::keys::PrivateKey;
use raymtls_tests::{Deployment, node_leaf, word};
use tokio::{sync::Barrier, task::JoinSet};

/// In each run; ten times as many in the long one.
const RACES: usize = 40;
/// Calls of the node in one race.
const CALLS: usize = 6;
const DAY: Duration = Duration::from_secs(86_400);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_issued_after_a_revocation_that_raced_it() {
    race(RACES).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a minute: run by scripts/test.sh --full"]
async fn nothing_is_issued_after_a_revocation_that_raced_it_at_length() {
    race(10 * RACES).await;
}

async fn race(races: usize) {
    let ca = Arc::new(Deployment::start().await);
    ca.cluster("c1", DAY).await;
    let (mut issued, mut refused) = (0, 0);
    for number in 0..races {
        let name = format!("n{number}");
        let address = format!("10.{}.{}.1", number / 250, number % 250 + 1);
        let member = ca.worker("c1", &name, &address).await;
        // Connected before the race: a handshake would decide it.
        let client = member.client.clone();
        client.issue_leaf(node_leaf(&PrivateKey::generate().unwrap())).await.unwrap();
        let start = Arc::new(Barrier::new(CALLS + 1));
        let mut calls = JoinSet::new();
        for call in 0..CALLS {
            let (client, start) = (client.clone(), Arc::clone(&start));
            let key = PrivateKey::generate().unwrap();
            calls.spawn(async move {
                start.wait().await;
                if call == 0 {
                    word(client.renew_identity(key.csr_der().unwrap()).await)
                } else {
                    word(client.issue_leaf(node_leaf(&key)).await)
                }
            });
        }
        let (revoker, target) = (Arc::clone(&ca), name.clone());
        let revoked = async move {
            start.wait().await;
            // At another moment in each race.
            for _ in 0..number % 20 {
                tokio::task::yield_now().await;
            }
            revoker.revoke("c1", &target).await
        };
        revoked.await;
        for word in calls.join_all().await {
            match word {
                "OK" => issued += 1,
                "REVOKED" | "RACE_LOST" => refused += 1,
                other => panic!("{name}: {other}"),
            }
        }
        let late = client.issue_leaf(node_leaf(&PrivateKey::generate().unwrap())).await;
        assert_eq!(word(late), "REVOKED");
    }
    println!("{races} races: {issued} calls before the revocation, {refused} after");
    assert!(issued > 0 && refused > 0, "no race: {issued} issued, {refused} refused");

    let mut over = std::collections::BTreeSet::new();
    for record in ca.audit_log().await {
        let issuing = [AuditKind::LeafIssued, AuditKind::IdentityRenewed];
        if record.kind() == AuditKind::NodeRevoked {
            assert!(over.insert(record.node));
        } else if issuing.contains(&record.kind()) {
            assert!(!over.contains(&record.node), "{} after its revocation", record.node);
        }
    }
    assert_eq!(over.len(), races);
    for record in ca.certificates("c1").await {
        assert_ne!(record.revoked_ms, 0, "a certificate of {} lives on", record.node);
    }
    Arc::into_inner(ca).unwrap().finish().await;
}
