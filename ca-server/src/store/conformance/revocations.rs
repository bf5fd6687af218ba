//! A leaf's key revoked without its node, and a revoked node taken back.

use super::{
    Place,
    fixture::{Ca, LEAF_LIFE_MS, START_MS, address, ask, at, c1, key, leaf_ask, name, refusal},
};
use crate::{
    refusal::Refusal,
    store::{
        Authority, EnrollAsk, LeafRevoked, StoreError,
        records::{AuditKind, NodeRecord, NodeStatus},
    },
};
use raymtls_proto::serial::Serial;

impl Ca {
    async fn revoke_leaf(&self, ms: i64, serial: Serial) -> Result<LeafRevoked, StoreError> {
        let (actor, reason) = ("uid:0".to_owned(), "in a backup".to_owned());
        self.store.revoke_leaf(at(ms), actor, c1(), serial, reason).await
    }

    async fn reinstate(&self, ms: i64, node: &str) -> Result<NodeRecord, StoreError> {
        self.store.reinstate_node(at(ms), "uid:0".to_owned(), c1(), name(node)).await
    }

    async fn blocked(&self, ms: i64) -> Vec<String> {
        let blocks = self.store.blocks(at(ms), c1()).await.unwrap();
        blocks.into_iter().map(|(address, _)| address).collect()
    }
}

pub(super) async fn a_revoked_leaf_key_gets_no_certificate_and_its_node_another(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let node = ca.node(0, 1).await;
    let first = ca.leaf(1, &node.caller(), leaf_ask(100)).await.unwrap();
    let second = ca.leaf(2, &node.caller(), leaf_ask(100)).await.unwrap();
    let other = ca.leaf(3, &node.caller(), leaf_ask(101)).await.unwrap();
    let plan = ca.store.plan_leaf(at(4), node.caller(), leaf_ask(100)).await.unwrap();
    let before = ca.cluster().await;

    let revoked = ca.revoke_leaf(5, first.serial).await.unwrap();
    let serials = [second.serial, first.serial].map(|serial| serial.as_bytes().to_vec());
    assert_eq!(revoked.serials, serials, "newest first");
    assert_eq!((revoked.node.as_str(), revoked.not_after_ms), ("n-1", second.not_after_ms));
    let authority = Authority::Cluster(c1());
    let mut on_crl = ca.revoked_serials(6, authority.clone()).await;
    on_crl.reverse();
    assert_eq!(on_crl, serials);
    let after = ca.cluster().await;
    assert!(after.keys_version > before.version && after.pressing_version() > before.version);

    // Not even what was signed meanwhile.
    let late = ca.sign(4, key(100), plan.life_ms);
    let late = ca.store.record_leaf(at(6), node.caller(), leaf_ask(100), plan, late).await;
    assert_eq!(refusal(late), Refusal::KeyRevoked);
    assert_eq!(refusal(ca.leaf(6, &node.caller(), leaf_ask(100)).await), Refusal::KeyRevoked);
    ca.leaf(6, &node.caller(), leaf_ask(101)).await.unwrap();
    assert!(ca.store.certificate(other.serial).await.unwrap().revoked_ms == 0);
    // The node is what it was, and so are its addresses.
    assert_eq!(ca.record("n-1").await.node_status(), NodeStatus::Live);
    assert!(ca.blocked(6).await.is_empty());

    // Again: the same answer, nothing more.
    assert_eq!(ca.revoke_leaf(7, second.serial).await.unwrap(), revoked);
    assert_eq!(ca.logged(AuditKind::LeafKeyRevoked).await, 1);
    // When all have ended there is nothing to put on a CRL; the key stays revoked.
    let much_later = 3 * LEAF_LIFE_MS;
    assert!(ca.revoke_leaf(much_later, first.serial).await.unwrap().serials.is_empty());
    let again = ca.leaf(much_later, &node.caller(), leaf_ask(100)).await;
    assert_eq!(refusal(again), Refusal::KeyRevoked);
    let ca = ca.restart(place, much_later).await;
    let again = ca.leaf(much_later, &node.caller(), leaf_ask(100)).await;
    assert_eq!(refusal(again), Refusal::KeyRevoked);
}

pub(super) async fn an_identity_is_not_revoked_without_its_node(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let node = ca.node(0, 1).await;
    let refused = refusal(ca.revoke_leaf(1, node.identity.known_serial()).await);
    assert!(refused.to_string().ends_with("node \"n-1\": revoke the node"), "{refused}");
    ca.identify(2, &node.caller()).await.unwrap();
    let strange = Serial::new(1, [9; 10]);
    assert_eq!(refusal(ca.revoke_leaf(1, strange).await), Refusal::CertificateNotFound(strange));
    // A leaf of another cluster is none of this one's.
    ca.create("c2").await;
    let leaf = ca.leaf(1, &node.caller(), leaf_ask(100)).await.unwrap();
    let (actor, reason) = ("uid:0".to_owned(), "x".to_owned());
    let c2 = "c2".parse().unwrap();
    let refused = ca.store.revoke_leaf(at(2), actor, c2, leaf.serial, reason).await;
    assert_eq!(refusal(refused), Refusal::CertificateNotFound(leaf.serial));
}

pub(super) async fn a_forgotten_node_s_leaf_can_still_be_revoked(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let node = ca.node(0, 1).await;
    let leaf = ca.leaf(1, &node.caller(), leaf_ask(100)).await.unwrap();
    ca.forget(2, "n-1").await.unwrap();
    assert_eq!(ca.revoke_leaf(3, leaf.serial).await.unwrap().serials.len(), 1);
}

pub(super) async fn a_node_taken_back_enrols_with_a_new_token_and_none_of_its_old_keys(
    place: &dyn Place,
) {
    let ca = Ca::new(place).await;
    let older = ca.token().await;
    let node = ca.enroll(0, ask(&older, 1)).await.unwrap();
    let leaf = ca.leaf(1, &node.caller(), leaf_ask(100)).await.unwrap();
    assert!(ca.reinstate(2, "n-1").await.is_err(), "it is not revoked");
    ca.revoke_keeping(100, "n-1", true).await;
    assert_eq!(ca.blocked(101).await, [address(1)]);
    let version = ca.version().await;

    let back = ca.reinstate(200, "n-1").await.unwrap();
    assert_eq!(back.node_status(), NodeStatus::Left);
    assert!(ca.blocked(201).await.is_empty(), "its addresses are cut off no more");
    assert!(ca.cluster().await.blocks_version > version, "and its peers are told");
    assert!(ca.reinstate(201, "n-1").await.is_err(), "once");
    assert_eq!(ca.logged(AuditKind::NodeReinstated).await, 1);
    let revoked = ca.store.certificate(leaf.serial).await.unwrap();
    assert_eq!(revoked.revoked_ms, START_MS + 100, "what was revoked stays so");
    let on_crl = ca.revoked_serials(201, Authority::Cluster(c1())).await;
    assert_eq!(on_crl, [leaf.serial.as_bytes().to_vec()]);
    assert!(ca.identify(202, &node.caller()).await.is_err(), "its old identity is worth nothing");

    // A token of before stays barred from its address; a new one is not.
    let again = |token| EnrollAsk { key_hash: key(2), ..ask(token, 1) };
    let blocked = Refusal::AddressBlocked { address: address(1), node: "n-1".to_owned() };
    assert_eq!(refusal(ca.enroll(203, again(&older)).await), blocked);
    let newer = ca.token_with(|token| token.created_ms = START_MS + 201).await;
    let node = ca.enroll(204, again(&newer)).await.unwrap();
    let old_key = ca.leaf(205, &node.caller(), leaf_ask(100)).await;
    assert_eq!(refusal(old_key), Refusal::KeyRevoked, "whoever stole it has it still");
    ca.leaf(205, &node.caller(), leaf_ask(101)).await.unwrap();
    // And it can be revoked once more.
    ca.revoke_keeping(300, "n-1", true).await;
    assert_eq!(ca.blocked(301).await, [address(1)]);
}
