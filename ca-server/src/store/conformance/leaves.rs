//! Ray leaves.

use super::{
    Place,
    fixture::{
        Ca, LEAF_LIFE_MS, START_MS, address, ask, at, c1, caller, key, leaf_ask, name, race_lost,
        refusal,
    },
};
use crate::{
    refusal::Refusal,
    store::{
        ABSENT_AFTER_MS, EnrollAsk, IDENTITIES_MAX, LEAF_KEYS_MAX, LEAVES_MAX, LeafAsk,
        records::AuditKind,
    },
};
use raymtls_proto::v1;

pub(super) async fn a_leaf_states_what_is_bound_or_less(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let token = ca.token_with(|token| token.dns_names = vec!["a.example".to_owned()]).await;
    let claimed = "192.0.2.9".parse().unwrap();
    let ask = EnrollAsk { addresses: vec![claimed], ..ask(&token, 1) };
    let node = ca.enroll(0, ask).await.unwrap();
    let plan = |ask| ca.store.plan_leaf(at(1), node.caller(), ask);
    let all = plan(leaf_ask(100)).await.unwrap();
    assert_eq!(all.addresses, [address(1).parse().unwrap(), claimed]);
    assert_eq!(all.dns_names, ["a.example".parse().unwrap()]);
    assert_eq!((all.life_ms, all.ends_ms), (LEAF_LIFE_MS, None));
    let less = plan(LeafAsk { addresses: vec![claimed], ..leaf_ask(100) }).await.unwrap();
    assert_eq!(less.addresses, [claimed]);
    let more = LeafAsk { addresses: vec!["192.0.2.10".parse().unwrap()], ..leaf_ask(100) };
    assert!(matches!(refusal(plan(more).await), Refusal::AddressNotAllowed(_)));
    let more = LeafAsk { dns_names: vec!["b.example".parse().unwrap()], ..leaf_ask(100) };
    assert!(matches!(refusal(plan(more).await), Refusal::NameNotAllowed(_)));
    let leaf = ca.leaf(2, &node.caller(), leaf_ask(100)).await.unwrap();
    let record = ca.store.certificate(leaf.serial).await.unwrap();
    assert_eq!(record.kind(), v1::CertificateKind::RayNode);
    assert_eq!((record.node.as_str(), record.not_after_ms), ("n-1", START_MS + 2 + LEAF_LIFE_MS));
}

pub(super) async fn a_leaf_key_is_certified_for_one_leaf_life(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let node = ca.node(0, 1).await;
    for ms in [10, 10 + LEAF_LIFE_MS / 3, 10 + LEAF_LIFE_MS - 1] {
        ca.leaf(ms, &node.caller(), leaf_ask(100)).await.unwrap();
    }
    let (first, log) = (10 + LEAF_LIFE_MS, ca.log().await.len());
    for ms in [first, first + LEAF_LIFE_MS / 2] {
        let old = ca.leaf(ms, &node.caller(), leaf_ask(100)).await;
        assert_eq!(refusal(old), Refusal::KeyTooOld, "{ms}");
    }
    assert_eq!(ca.log().await.len(), log);
    ca.leaf(first, &node.caller(), leaf_ask(101)).await.unwrap();
    assert_eq!(ca.logged(AuditKind::LeafIssued).await, 4);
    let keys = ca.record("n-1").await.leaf_keys;
    assert_eq!(keys.len(), 2, "{keys:?}");
    assert_eq!(keys[0].first_issued_ms, START_MS + 10);
    assert_eq!(keys[0].not_after_ms, START_MS + 10 + 2 * LEAF_LIFE_MS - 1);
}

pub(super) async fn the_identity_key_is_no_leaf_key(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let node = ca.node(0, 1).await;
    ca.renew(1, &node.caller(), key(11)).await.unwrap();
    for number in [1, 11] {
        let refused = refusal(ca.leaf(2, &node.caller(), leaf_ask(number)).await);
        assert!(matches!(refused, Refusal::CsrInvalid(_)), "{number}: {refused}");
    }
}

pub(super) async fn a_node_has_a_bounded_number_of_leaf_keys(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let node = ca.node(0, 1).await;
    let keys = (100..).take(LEAF_KEYS_MAX);
    for number in keys {
        ca.leaf(1, &node.caller(), leaf_ask(number)).await.unwrap();
    }
    let calling = node.caller();
    let one_more = |ms| ca.leaf(ms, &calling, leaf_ask(99));
    let refused = refusal(one_more(LEAF_LIFE_MS).await);
    assert!(matches!(refused, Refusal::RateLimited { .. }), "{refused}");
    // One of those it has may still be renewed, and its certificates count to their end.
    ca.leaf(2, &node.caller(), leaf_ask(100)).await.unwrap();
    one_more(1 + LEAF_LIFE_MS).await.unwrap();
    // Those that have ended count no more; they are remembered one more life.
    assert_eq!(ca.record("n-1").await.leaf_keys.len(), LEAF_KEYS_MAX + 1);
    ca.leaf(2 + 3 * LEAF_LIFE_MS, &calling, leaf_ask(98)).await.unwrap();
    assert_eq!(ca.record("n-1").await.leaf_keys.len(), 1);
}

pub(super) async fn a_name_that_comes_back_again_and_again_has_its_share_each_time(
    place: &dyn Place,
) {
    let ca = Ca::new(place).await;
    let lives = u8::try_from(LEAF_KEYS_MAX).unwrap() + 4;
    for life in 0..lives {
        let token = ca.token().await;
        let ask = EnrollAsk {
            name: name("n-1"),
            source: Some(address(1).parse().unwrap()),
            ..ask(&token, 1 + life)
        };
        let node = ca.enroll(life.into(), ask).await.unwrap();
        ca.leaf(life.into(), &node.caller(), leaf_ask(100 + life)).await.unwrap();
        ca.leave(life.into(), &node.caller()).await.unwrap();
    }
    assert_eq!(ca.record("n-1").await.leaf_keys.len(), usize::from(lives), "none is forgotten");
}

pub(super) async fn a_key_that_was_too_old_does_not_become_young(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let node = ca.node(0, 1).await;
    let calling = node.caller();
    ca.leaf(1, &calling, leaf_ask(100)).await.unwrap();
    ca.leaf(1 + LEAF_LIFE_MS, &calling, leaf_ask(101)).await.unwrap();
    let again = refusal(ca.leaf(2 + LEAF_LIFE_MS, &calling, leaf_ask(100)).await);
    assert_eq!(again, Refusal::KeyTooOld);
}

pub(super) async fn one_key_has_one_purpose_and_one_node(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let (one, two) = (ca.node(0, 1).await, ca.node(0, 2).await);
    ca.leaf(1, &one.caller(), leaf_ask(100)).await.unwrap();
    let taken = |refusal| matches!(refusal, Refusal::CsrInvalid(_));
    assert!(taken(refusal(ca.renew(2, &one.caller(), key(100)).await)), "a leaf key as identity");
    assert!(taken(refusal(ca.leaf(2, &two.caller(), leaf_ask(100)).await)), "another node's");
    let thief = EnrollAsk { key_hash: key(100), ..ask(&ca.token().await, 3) };
    assert!(taken(refusal(ca.enroll(2, thief).await)), "another node's leaf key as identity");
    ca.leaf(2, &one.caller(), leaf_ask(100)).await.unwrap();
}

pub(super) async fn a_node_has_a_bounded_number_of_certificates(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let node = ca.node(0, 1).await;
    let calling = node.caller();
    for _ in 0..LEAVES_MAX {
        ca.leaf(1, &calling, leaf_ask(100)).await.unwrap();
    }
    let refused = refusal(ca.leaf(2, &calling, leaf_ask(101)).await);
    assert!(matches!(refused, Refusal::RateLimited { .. }), "{refused}");
    ca.leaf(1 + LEAF_LIFE_MS, &calling, leaf_ask(101)).await.unwrap();
    for number in 1..IDENTITIES_MAX {
        let key_hash = [number.to_be_bytes(); 8].concat().try_into().unwrap();
        ca.renew(3, &calling, key_hash).await.unwrap();
    }
    let refused = refusal(ca.renew(4, &calling, key(255)).await);
    assert!(matches!(refused, Refusal::RateLimited { .. }), "{refused}");
}

pub(super) async fn a_node_that_was_away_holds_its_address_again(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let token = ca.token().await;
    let first = ca.enroll(0, ask(&token, 1)).await.unwrap();
    let at_its_address =
        |number| EnrollAsk { source: Some(address(1).parse().unwrap()), ..ask(&token, number) };
    let second = ca.enroll(ABSENT_AFTER_MS, at_its_address(2)).await.unwrap();
    ca.leave(ABSENT_AFTER_MS + 1, &second.caller()).await.unwrap();
    ca.leaf(ABSENT_AFTER_MS + 2, &first.caller(), leaf_ask(100)).await.unwrap();
    let third = refusal(ca.enroll(ABSENT_AFTER_MS + 3, at_its_address(3)).await);
    assert!(matches!(third, Refusal::AddressTaken { .. }), "{third}");
}

pub(super) async fn what_changed_while_the_leaf_was_signed_loses(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let node = ca.node(0, 1).await;
    let calling = node.caller();
    let plan = ca.store.plan_leaf(at(1), calling.clone(), leaf_ask(100)).await.unwrap();
    let before = ca.cluster().await.settings().clone();
    let shorter = v1::Settings { leaf_life_seconds: 240, ..before.clone() };
    ca.store.set_cluster(at(2), "uid:0".to_owned(), c1(), before, shorter).await.unwrap();
    let leaf = ca.sign(1, key(100), plan.life_ms);
    let late =
        ca.store.record_leaf(at(3), calling.clone(), leaf_ask(100), plan, leaf.clone()).await;
    assert!(!race_lost(late).is_empty());
    assert!(matches!(
        refusal(ca.store.certificate(leaf.serial).await),
        Refusal::CertificateNotFound(_)
    ));
    let plan = ca.store.plan_leaf(at(4), calling.clone(), leaf_ask(100)).await.unwrap();
    let renewed = ca.renew(5, &calling, key(11)).await.unwrap();
    ca.identify(6, &caller(&node.node, &renewed)).await.unwrap();
    let leaf = ca.sign(4, key(100), plan.life_ms);
    let late = ca.store.record_leaf(at(7), calling, leaf_ask(100), plan, leaf).await;
    assert_eq!(refusal(late), Refusal::Superseded);
    assert_eq!(ca.logged(AuditKind::LeafIssued).await, 0);
}
