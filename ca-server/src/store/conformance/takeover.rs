//! Who may have a name or an address that somebody had before.

use raymtls_proto::identity::Role;

use super::{
    Place,
    fixture::{Ca, MINUTE_MS, START_MS, address, ask, at, c1, key, leaf_ask, refusal},
};
use crate::{
    refusal::Refusal,
    store::{
        ABSENT_AFTER_MS, CONTACT_COARSE_MS, EnrollAsk, LeafAsk, LeafKind, records::NodeStatus,
    },
};

pub(super) async fn a_name_is_free_once_its_node_is_absent_to_the_millisecond(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let token = ca.token().await;
    ca.enroll(0, ask(&token, 1)).await.unwrap();
    let newcomer = EnrollAsk { name: "n-1".parse().unwrap(), ..ask(&token, 2) };
    let early = ca.enroll(ABSENT_AFTER_MS - 1, newcomer.clone()).await;
    assert_eq!(refusal(early), Refusal::NodeNameTaken("n-1".to_owned()));
    ca.enroll(ABSENT_AFTER_MS, newcomer).await.unwrap();
    let node = ca.record("n-1").await;
    assert_eq!(node.current().key_hash, key(2));
    assert_eq!(node.addresses[0].address, address(2));
    // The machine before it gave up its address with its name.
    let third = EnrollAsk { source: Some(address(1).parse().unwrap()), ..ask(&token, 3) };
    ca.enroll(ABSENT_AFTER_MS, third).await.unwrap();
}

pub(super) async fn an_address_is_free_once_its_holder_is_absent(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let token = ca.token().await;
    ca.enroll(0, ask(&token, 1)).await.unwrap();
    let newcomer = EnrollAsk { source: Some(address(1).parse().unwrap()), ..ask(&token, 2) };
    let early = refusal(ca.enroll(ABSENT_AFTER_MS - 1, newcomer.clone()).await);
    let taken = Refusal::AddressTaken { address: address(1), holder: "n-1".to_owned() };
    assert_eq!(early, taken);
    ca.enroll(ABSENT_AFTER_MS, newcomer).await.unwrap();
}

pub(super) async fn contact_keeps_a_node_present(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let token = ca.token().await;
    let node = ca.enroll(0, ask(&token, 1)).await.unwrap();
    let newcomer = EnrollAsk { name: "n-1".parse().unwrap(), ..ask(&token, 2) };
    // A word just before a contact would be written anew, and one just then.
    ca.identify(CONTACT_COARSE_MS - 1, &node.caller()).await.unwrap();
    assert_eq!(ca.record("n-1").await.contact_ms, START_MS);
    ca.identify(CONTACT_COARSE_MS, &node.caller()).await.unwrap();
    assert_eq!(ca.record("n-1").await.contact_ms, START_MS + CONTACT_COARSE_MS);
    let late = CONTACT_COARSE_MS + ABSENT_AFTER_MS;
    let early = ca.enroll(late - 1, newcomer.clone()).await;
    assert_eq!(refusal(early), Refusal::NodeNameTaken("n-1".to_owned()));
    ca.enroll(late, newcomer).await.unwrap();
}

pub(super) async fn nobody_is_absent_before_the_server_has_served_that_long(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let token = ca.token().await;
    ca.enroll(0, ask(&token, 1)).await.unwrap();
    let newcomer = EnrollAsk { name: "n-1".parse().unwrap(), ..ask(&token, 2) };
    let down = 60 * MINUTE_MS;
    let ca = ca.restart(place, down).await;
    let early = ca.enroll(down + ABSENT_AFTER_MS - 1, newcomer.clone()).await;
    assert_eq!(refusal(early), Refusal::NodeNameTaken("n-1".to_owned()));
    ca.enroll(down + ABSENT_AFTER_MS, newcomer).await.unwrap();
}

pub(super) async fn a_node_that_left_frees_name_and_address(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let token = ca.token().await;
    let node = ca.enroll(0, ask(&token, 1)).await.unwrap();
    ca.leave(1, &node.caller()).await.unwrap();
    assert_eq!(ca.record("n-1").await.node_status(), NodeStatus::Left);
    let left = Refusal::NodeLeft("n-1".to_owned());
    assert_eq!(refusal(ca.identify(2, &node.caller()).await), left);
    assert_eq!(refusal(ca.store.still_stands(node.caller()).await), left);
    assert_eq!(refusal(ca.renew(2, &node.caller(), key(9)).await), left);
    assert_eq!(refusal(ca.leave(2, &node.caller()).await), left);
    // The token's reply was used: the same key gets no second life from the same use.
    assert_eq!(refusal(ca.enroll(2, ask(&token, 1)).await), Refusal::TokenSpent(100));
    let by_address = EnrollAsk { source: Some(address(1).parse().unwrap()), ..ask(&token, 2) };
    ca.enroll(2, by_address).await.unwrap();
    let by_name = EnrollAsk { name: "n-1".parse().unwrap(), ..ask(&token, 3) };
    ca.enroll(2, by_name).await.unwrap();
    assert_eq!(ca.record("n-1").await.node_status(), NodeStatus::Live);
}

pub(super) async fn a_token_that_may_replace_takes_over_a_live_name(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let node = ca.node(0, 1).await;
    let pattern = ca
        .token_with(|token| {
            (token.replace, token.node_names) = (true, vec!["n-*".to_owned()]);
        })
        .await;
    let exact = ca
        .token_with(|token| {
            (token.replace, token.node_names) = (true, vec!["n-1".to_owned()]);
        })
        .await;
    let newcomer = |token| EnrollAsk { name: "n-1".parse().unwrap(), ..ask(token, 2) };
    let taken = Refusal::NodeNameTaken("n-1".to_owned());
    assert_eq!(refusal(ca.enroll(1, newcomer(&pattern)).await), taken);
    ca.enroll(1, newcomer(&exact)).await.unwrap();
    assert_eq!(refusal(ca.identify(2, &node.caller()).await), Refusal::IdentityUnknown);
    // The same machine, with the key it has, needs no such token.
    let again =
        EnrollAsk { source: Some(address(2).parse().unwrap()), ..newcomer(&ca.token().await) };
    ca.enroll(3, again).await.unwrap();
}

pub(super) async fn a_driver_for_once_leaves_its_name_to_the_next(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let driver = ca.token_with(|token| token.role = Role::Driver.to_proto().into()).await;
    let laptop = |number, once| EnrollAsk {
        role: Role::Driver,
        name: "laptop".parse().unwrap(),
        once,
        ..ask(&driver, number)
    };
    ca.enroll(0, laptop(1, true)).await.unwrap();
    ca.enroll(1, laptop(2, false)).await.unwrap();
    // One that keeps its identity keeps its name.
    let taken = Refusal::NodeNameTaken("laptop".to_owned());
    assert_eq!(refusal(ca.enroll(2, laptop(3, true)).await), taken);
    // And no worker takes a driver's name.
    ca.enroll(3, EnrollAsk { name: "desk".parse().unwrap(), ..laptop(4, true) }).await.unwrap();
    let worker = EnrollAsk { name: "desk".parse().unwrap(), ..ask(&ca.token().await, 5) };
    assert!(matches!(refusal(ca.enroll(4, worker).await), Refusal::NodeNameTaken(_)));
}

pub(super) async fn drivers_and_shared_addresses_hold_nothing(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let token = ca.token_with(|token| token.shared_address = true).await;
    let driver = ca.token_with(|token| token.role = Role::Driver.to_proto().into()).await;
    let from = |ask| EnrollAsk { source: Some("10.0.0.77".parse().unwrap()), ..ask };
    let driver_ask = |number| from(EnrollAsk { role: Role::Driver, ..ask(&driver, number) });
    let shared_ask = |number| from(EnrollAsk { shared_address: true, ..ask(&token, number) });
    let first = ca.enroll(0, driver_ask(1)).await.unwrap();
    ca.enroll(0, driver_ask(2)).await.unwrap();
    let sharing = ca.enroll(0, shared_ask(3)).await.unwrap();
    ca.enroll(0, shared_ask(4)).await.unwrap();
    ca.enroll(0, from(ask(&token, 5))).await.unwrap();
    // Behind a gateway whose address a node has, a driver still gets in.
    ca.enroll(0, driver_ask(6)).await.unwrap();
    // But only if it comes from there: a claim of a live node's address is refused.
    let elsewhere = EnrollAsk {
        source: Some("10.0.0.78".parse().unwrap()),
        addresses: vec!["10.0.0.77".parse().unwrap()],
        ..driver_ask(7)
    };
    let claimed = refusal(ca.enroll(0, elsewhere).await);
    assert!(matches!(claimed, Refusal::AddressTaken { .. }), "{claimed}");
    // Those that shared it before wait for the node that holds it now.
    let late = refusal(ca.leaf(1, &sharing.caller(), leaf_ask(50)).await);
    assert!(matches!(late, Refusal::AddressTaken { .. }), "{late}");
    let node_leaf = ca.leaf(1, &first.caller(), leaf_ask(100)).await;
    assert!(matches!(refusal(node_leaf), Refusal::RequestInvalid(_)));
    let driver_leaf = LeafAsk { kind: LeafKind::Driver, ..leaf_ask(100) };
    ca.leaf(1, &first.caller(), driver_leaf).await.unwrap();
}

pub(super) async fn an_address_taken_over_is_no_longer_certified_for_its_old_node(
    place: &dyn Place,
) {
    let ca = Ca::new(place).await;
    let token = ca.token().await;
    let old = ca.enroll(0, ask(&token, 1)).await.unwrap();
    let newcomer = EnrollAsk { source: Some(address(1).parse().unwrap()), ..ask(&token, 2) };
    ca.enroll(ABSENT_AFTER_MS, newcomer).await.unwrap();
    ca.identify(ABSENT_AFTER_MS + 1, &old.caller()).await.unwrap();
    let taken = Refusal::AddressTaken { address: address(1), holder: "n-2".to_owned() };
    let leaf = ca.store.plan_leaf(at(ABSENT_AFTER_MS + 2), old.caller(), leaf_ask(100)).await;
    assert_eq!(refusal(leaf), taken);
    // And when the newcomer goes, the old one's leaving does not free what it no longer holds.
    ca.leave(ABSENT_AFTER_MS + 3, &old.caller()).await.unwrap();
    let third = EnrollAsk { source: Some(address(1).parse().unwrap()), ..ask(&token, 3) };
    assert_eq!(refusal(ca.enroll(ABSENT_AFTER_MS + 4, third).await), taken);
    assert_eq!(ca.store.nodes(c1(), String::new()).await.unwrap().rows.len(), 2);
}
