//! The audit log, and what is left after a restart.

use prost::Message as _;

use super::{
    Place,
    fixture::{Ca, EPOCH, HOUR_MS, START_MS, ask, at, c1, ca_key, caller, key, leaf_ask},
};
use crate::store::{
    Authority,
    records::{AuditKind, AuditRecord, CrlSet},
    view::audit_hash,
};

pub(super) async fn every_change_is_on_record(place: &dyn Place) {
    let ca = Ca::new(place).await;
    do_everything(&ca).await;
    let log = ca.log().await;
    let kinds: Vec<_> = log.iter().map(AuditRecord::kind).collect();
    assert_eq!(
        kinds,
        [
            AuditKind::Initialized,
            AuditKind::ClusterCreated,
            AuditKind::ClusterSet,
            AuditKind::IssuerCreated,
            AuditKind::TokenCreated,
            AuditKind::Enrolled,
            AuditKind::Enrolled,
            AuditKind::LeafIssued,
            AuditKind::IdentityRenewed,
            AuditKind::IdentityActivated,
            AuditKind::IdentityReused,
            AuditKind::TokenRevoked,
            AuditKind::NodeLeft,
            AuditKind::NodeRevoked,
            AuditKind::CrlSigned,
            AuditKind::NodeForgotten,
        ]
    );
    let enrolled = &log[5];
    assert!(enrolled.actor.starts_with("token:") && !enrolled.token_id.is_empty());
    assert_eq!((enrolled.cluster.as_str(), enrolled.node.as_str()), ("c1", "n-1"));
    assert_eq!((enrolled.serial.len(), enrolled.at_ms), (16, START_MS + 3));
    assert_eq!(log[7].actor, "node:c1/n-1");
    assert_eq!((log[13].actor.as_str(), log[13].detail.as_str()), ("uid:0", "stolen"));
}

pub(super) async fn the_audit_chain_is_whole_after_everything(place: &dyn Place) {
    let ca = Ca::new(place).await;
    do_everything(&ca).await;
    let before = ca.log().await;
    let ca = ca.restart(place, HOUR_MS).await;
    ca.token().await;
    let log = ca.log().await;
    assert_eq!(log.len(), before.len() + 1);
    let mut previous = vec![0; 32];
    for (index, record) in (1..).zip(&log) {
        assert_eq!(record.index, index);
        assert_eq!(record.previous_hash, previous, "{index}");
        previous = audit_hash(&record.encode_to_vec()).to_vec();
    }
    let part = ca.store.audit(3, 2).await.unwrap();
    assert_eq!(part, log[3..5]);
    assert!(ca.store.audit(log.len() as u64, 9).await.unwrap().is_empty());
}

pub(super) async fn everything_survives_closing(place: &dyn Place) {
    let ca = Ca::new(place).await;
    do_everything(&ca).await;
    let before = everything(&ca).await;
    assert!(ca.store.is_serving());
    let ca = ca.restart(place, HOUR_MS).await;
    assert_eq!(everything(&ca).await, before);
    assert_eq!(ca.store.epoch(), EPOCH);
    assert!(ca.store.is_serving());
    ca.store.close().await;
    assert!(!ca.store.is_serving());
    ca.store.close().await;
}

/// Each verb that changes something, once.
async fn do_everything(ca: &Ca) {
    let operator = || "uid:0".to_owned();
    let before = ca.cluster().await.settings().clone();
    let mut after = before.clone();
    after.lease_seconds = 99;
    ca.store.set_cluster(at(1), operator(), c1(), before, after).await.unwrap();
    let issuer = ca_key("issuer-2", START_MS + 9 * HOUR_MS);
    ca.store.add_issuer(at(2), Authority::Cluster(c1()), issuer).await.unwrap();
    let token = ca.token().await;
    let a = ca.enroll(3, ask(&token, 1)).await.unwrap();
    let b = ca.enroll(4, ask(&token, 2)).await.unwrap();
    ca.leaf(5, &a.caller(), leaf_ask(100)).await.unwrap();
    let renewed = ca.renew(6, &a.caller(), key(11)).await.unwrap();
    ca.identify(7, &caller(&a.node, &renewed)).await.unwrap();
    ca.identify(8, &a.caller()).await.expect_err("a retired identity is an event and a refusal");
    ca.store.revoke_token(at(9), operator(), c1(), token).await.unwrap();
    ca.leave(10, &b.caller()).await.unwrap();
    ca.revoke_keeping(11, "n-1", true).await;
    let crls = CrlSet { number: 1, crls_der: vec![vec![1; 100]], ..CrlSet::default() };
    ca.store.put_crls(at(12), Authority::Cluster(c1()), crls).await.unwrap();
    ca.forget(13, "n-2").await.unwrap();
}

/// Everything that can be read, as text.
async fn everything(ca: &Ca) -> Vec<String> {
    let store = &ca.store;
    let cluster = || Authority::Cluster(c1());
    vec![
        format!("{:?}", store.control().await.unwrap()),
        format!("{:?}", store.clusters().await.unwrap()),
        format!("{:?}", store.crls(cluster()).await.unwrap()),
        format!("{:?}", store.revocations(at(14), cluster()).await.unwrap()),
        format!("{:?}", store.revocations(at(14), Authority::Control).await.unwrap()),
        format!("{:?}", store.tokens(c1(), String::new()).await.unwrap()),
        format!("{:?}", store.nodes(c1(), String::new()).await.unwrap()),
        format!("{:?}", store.certificates(c1(), None, String::new()).await.unwrap()),
        format!("{:?}", ca.log().await),
    ]
}
