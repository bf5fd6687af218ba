//! Identities: renewal, and what becomes of the one before.

use super::{
    Place,
    fixture::{Ca, HOUR_MS, IDENTITY_LIFE_MS, START_MS, ask, at, caller, key, refusal},
};
use crate::{
    refusal::Refusal,
    store::{
        ABSENT_AFTER_MS, EnrollAsk, EnrollPlan, RenewPlan,
        records::{AuditKind, NodeRecord},
    },
};

pub(super) async fn a_pending_identity_retires_the_current_one(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let node = ca.node(0, 1).await;
    let first = node.caller();
    let renewed = ca.renew(1, &first, key(11)).await.unwrap();
    let second = caller(&node.node, &renewed);
    // Issued and not used: the first one is still in force.
    ca.identify(2, &first).await.unwrap();
    ca.store.still_stands(first.clone()).await.unwrap();
    let pending = ca.record("n-1").await.pending.unwrap();
    assert_eq!((pending.serial, pending.key_hash), (renewed.serial.clone(), key(11).to_vec()));
    // The first call with it puts it in force, durably.
    let seen = ca.identify(3, &second).await.unwrap();
    assert_eq!(seen.current().serial, renewed.serial);
    assert_eq!(seen.pending, None);
    let ca = ca.restart(place, 4).await;
    assert_eq!(ca.record("n-1").await, seen);
    ca.identify(5, &second).await.unwrap();
    assert_eq!(ca.logged(AuditKind::IdentityActivated).await, 1);
    assert_eq!(ca.logged(AuditKind::IdentityReused).await, 0);
}

pub(super) async fn a_retired_identity_is_an_event(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let node = ca.node(0, 1).await;
    let renewed = ca.renew(1, &node.caller(), key(11)).await.unwrap();
    let second = caller(&node.node, &renewed);
    ca.identify(2, &second).await.unwrap();
    for ms in [3, 4, 3 + HOUR_MS - 1] {
        assert_eq!(refusal(ca.identify(ms, &node.caller()).await), Refusal::IdentityReused);
        assert_eq!(ca.record("n-1").await.reused_ms, START_MS + 3);
        assert_eq!(ca.logged(AuditKind::IdentityReused).await, 1, "not once a call");
    }
    assert_eq!(refusal(ca.identify(3 + HOUR_MS, &node.caller()).await), Refusal::IdentityReused);
    assert_eq!(ca.logged(AuditKind::IdentityReused).await, 2);
    // Whoever has the newer one is not thrown out by it.
    ca.identify(4 + HOUR_MS, &second).await.unwrap();
}

pub(super) async fn an_identity_signed_a_moment_before_it_was_recorded_is_no_stranger(
    place: &dyn Place,
) {
    let ca = Ca::new(place).await;
    let ask = ask(&ca.token().await, 1);
    let EnrollPlan::Issue(binding) = ca.store.plan_enroll(at(0), ask.clone()).await.unwrap() else {
        panic!("nobody enrolled yet");
    };
    let identity = ca.sign(0, ask.key_hash, IDENTITY_LIFE_MS);
    let node = ca.store.enroll(at(7), ask, binding, identity).await.unwrap();
    let renewed = ca.renew(8, &node.caller(), key(11)).await.unwrap();
    ca.identify(9, &caller(&node.node, &renewed)).await.unwrap();
    assert_eq!(refusal(ca.identify(10, &node.caller()).await), Refusal::IdentityReused);
}

pub(super) async fn a_renewal_asked_twice_is_answered_the_same(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let node = ca.node(0, 1).await;
    let renewed = ca.renew(1, &node.caller(), key(11)).await.unwrap();
    let ca = ca.restart(place, 2).await;
    let plan = ca.store.plan_renew(at(3), node.caller(), key(11)).await.unwrap();
    assert!(matches!(plan, RenewPlan::Replay(record) if *record == renewed));
    // Two that were planned before either was recorded: the second answer is the first.
    let late = ca.sign(4, key(11), IDENTITY_LIFE_MS);
    assert_eq!(ca.store.renew(at(4), node.caller(), late).await.unwrap(), renewed);
    assert_eq!(ca.logged(AuditKind::IdentityRenewed).await, 1);
}

pub(super) async fn a_renewal_with_another_key_replaces_the_pending_one(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let node = ca.node(0, 1).await;
    let lost = ca.renew(1, &node.caller(), key(11)).await.unwrap();
    let kept = ca.renew(2, &node.caller(), key(12)).await.unwrap();
    ca.identify(3, &caller(&node.node, &kept)).await.unwrap();
    assert_eq!(refusal(ca.identify(4, &caller(&node.node, &lost)).await), Refusal::IdentityReused);
}

pub(super) async fn a_renewal_wants_a_new_key(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let node = ca.node(0, 1).await;
    let same = refusal(ca.renew(1, &node.caller(), key(1)).await);
    assert!(matches!(same, Refusal::CsrInvalid(_)), "{same}");
    assert_eq!(ca.record("n-1").await.pending, None);
}

pub(super) async fn who_was_replaced_does_not_stand(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let node = ca.node(0, 1).await;
    let renewed = ca.renew(1, &node.caller(), key(11)).await.unwrap();
    ca.identify(2, &caller(&node.node, &renewed)).await.unwrap();
    assert_eq!(refusal(ca.store.still_stands(node.caller()).await), Refusal::Superseded);
    assert_eq!(refusal(ca.renew(3, &node.caller(), key(12)).await), Refusal::IdentityReused);
    assert_eq!(refusal(ca.leave(3, &node.caller()).await), Refusal::Superseded);
    ca.store.still_stands(caller(&node.node, &renewed)).await.unwrap();
}

pub(super) async fn a_call_proves_the_address_it_comes_from(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let token = ca.token().await;
    let claimed = "192.0.2.9".parse().unwrap();
    let ask = EnrollAsk { addresses: vec![claimed], ..ask(&token, 1) };
    let node = ca.enroll(0, ask).await.unwrap();
    let mut calling = node.caller();
    let proved = |node: &NodeRecord| node.addresses.iter().map(|a| a.proved).collect::<Vec<_>>();
    assert_eq!(proved(&node.node), [true, false]);
    for elsewhere in [None, Some("198.51.100.1".parse().unwrap())] {
        calling.source = elsewhere;
        ca.identify(1, &calling).await.unwrap();
    }
    assert_eq!(proved(&ca.record("n-1").await), [true, false]);
    calling.source = Some(claimed);
    ca.identify(2, &calling).await.unwrap();
    assert_eq!(proved(&ca.record("n-1").await), [true, true]);
}

pub(super) async fn an_identity_of_another_life_is_unknown(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let token = ca.token().await;
    let old = ca.enroll(0, ask(&token, 1)).await.unwrap();
    let newcomer = EnrollAsk { name: "n-1".parse().unwrap(), ..ask(&token, 2) };
    ca.enroll(ABSENT_AFTER_MS, newcomer).await.unwrap();
    let late = ABSENT_AFTER_MS + 1;
    assert_eq!(refusal(ca.identify(late, &old.caller()).await), Refusal::IdentityUnknown);
    assert_eq!(refusal(ca.store.still_stands(old.caller()).await), Refusal::Superseded);
    assert_eq!(ca.logged(AuditKind::IdentityReused).await, 0);
    let mut nobody = old.caller();
    nobody.node = "n-9".parse().unwrap();
    assert_eq!(refusal(ca.identify(late, &nobody).await), Refusal::IdentityUnknown);
    let mut unissued = old.caller();
    unissued.serial = ca.sign(late, key(50), 1).serial;
    assert_eq!(refusal(ca.identify(late, &unissued).await), Refusal::IdentityUnknown);
}
