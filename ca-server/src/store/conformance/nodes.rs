//! Nodes on their way out: revoked, forgotten; and lists.

use std::collections::BTreeSet;

use super::{
    Place,
    fixture::{
        Ca, IDENTITY_LIFE_MS, LEAF_LIFE_MS, START_MS, address, ask, at, c1, caller, key, leaf_ask,
        name, refusal,
    },
};
use crate::{
    refusal::Refusal,
    store::{
        ABSENT_AFTER_MS, Authority, Caller, EnrollAsk, LeafAsk, NODES_REVOKED_MAX, PAGE_ROWS_MAX,
        Page, Revoking,
        records::{AuditKind, NodeStatus},
    },
};
use raymtls_proto::identity::Role;

pub(super) async fn a_revoked_node_gets_nothing(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let token = ca.token().await;
    let node = ca.enroll(0, ask(&token, 1)).await.unwrap();
    let calling = node.caller();
    let pending = ca.renew(1, &calling, key(11)).await.unwrap();
    let plan = ca.store.plan_leaf(at(1), calling.clone(), leaf_ask(100)).await.unwrap();
    ca.revoke_keeping(2, "n-1", true).await;
    let revoked = Refusal::Revoked { node: "n-1".to_owned(), reason: "stolen".to_owned() };
    assert_eq!(refusal(ca.identify(3, &calling).await), revoked);
    assert_eq!(refusal(ca.identify(3, &caller(&node.node, &pending)).await), revoked);
    assert_eq!(refusal(ca.store.still_stands(calling.clone()).await), revoked);
    assert_eq!(refusal(ca.renew(3, &calling, key(11)).await), revoked, "nor the same again");
    assert_eq!(refusal(ca.renew(3, &calling, key(12)).await), revoked);
    assert_eq!(refusal(ca.leaf(3, &calling, leaf_ask(100)).await), revoked);
    let leaf = ca.sign(1, key(100), plan.life_ms);
    let late = ca.store.record_leaf(at(3), calling.clone(), leaf_ask(100), plan, leaf).await;
    assert_eq!(refusal(late), revoked, "nor what was signed meanwhile");
    assert_eq!(refusal(ca.leave(3, &calling).await), revoked);
    // Not with the reply it had, not under its name, absent or not.
    assert_eq!(refusal(ca.enroll(3, ask(&token, 1)).await), revoked);
    let newer = ca.token_with(|token| token.created_ms = START_MS + 10).await;
    for ms in [10, 10 + ABSENT_AFTER_MS] {
        let by_name = EnrollAsk { name: name("n-1"), ..ask(&newer, 2) };
        assert_eq!(refusal(ca.enroll(ms, by_name).await), revoked);
    }
}

pub(super) async fn only_a_newer_token_may_use_a_revoked_address(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let older = ca.token().await;
    ca.enroll(0, ask(&older, 1)).await.unwrap();
    ca.revoke_keeping(100, "n-1", true).await;
    let blocked = Refusal::AddressBlocked { address: address(1), node: "n-1".to_owned() };
    let from = |token| EnrollAsk { source: Some(address(1).parse().unwrap()), ..ask(token, 2) };
    assert_eq!(refusal(ca.enroll(200, from(&older)).await), blocked);
    let driver = ca.token_with(|token| token.role = Role::Driver.to_proto().into()).await;
    let by_driver = EnrollAsk { role: Role::Driver, ..from(&driver) };
    assert_eq!(refusal(ca.enroll(200, by_driver).await), blocked, "for a driver too");
    let claimed = EnrollAsk {
        source: Some(address(2).parse().unwrap()),
        addresses: vec![address(1).parse().unwrap()],
        ..ask(&older, 2)
    };
    assert_eq!(refusal(ca.enroll(200, claimed).await), blocked);
    let same = ca.token_with(|token| token.created_ms = START_MS + 100).await;
    assert_eq!(refusal(ca.enroll(200, from(&same)).await), blocked, "of the same millisecond");
    let newer = ca.token_with(|token| token.created_ms = START_MS + 101).await;
    ca.enroll(200, from(&newer)).await.unwrap();
    // Forgetting the node does not let older tokens in again.
    ca.forget(201, "n-1").await.unwrap();
    let third = EnrollAsk { source: Some(address(1).parse().unwrap()), ..ask(&older, 3) };
    assert_eq!(refusal(ca.enroll(202, third).await), blocked);
}

pub(super) async fn revoking_blocks_no_address_another_live_node_has(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let token = ca.token_with(|token| token.shared_address = true).await;
    let shared = |number| EnrollAsk {
        source: Some("10.0.0.77".parse().unwrap()),
        shared_address: true,
        ..ask(&token, number)
    };
    ca.enroll(0, shared(1)).await.unwrap();
    ca.enroll(0, shared(2)).await.unwrap();
    ca.revoke_keeping(1, "n-1", true).await;
    ca.enroll(2, shared(3)).await.unwrap();
    ca.revoke_keeping(3, "n-2", true).await;
    ca.revoke_keeping(3, "n-3", true).await;
    let blocked = refusal(ca.enroll(4, shared(4)).await);
    assert!(matches!(blocked, Refusal::AddressBlocked { .. }), "{blocked}");
    // An exclusive one that was taken over meanwhile.
    ca.enroll(0, ask(&token, 10)).await.unwrap();
    let newcomer = EnrollAsk { source: Some(address(10).parse().unwrap()), ..ask(&token, 11) };
    ca.enroll(ABSENT_AFTER_MS, newcomer).await.unwrap();
    ca.revoke_keeping(ABSENT_AFTER_MS, "n-10", true).await;
    let again = EnrollAsk {
        name: name("n-11"),
        source: Some(address(10).parse().unwrap()),
        ..ask(&token, 12)
    };
    ca.enroll(2 * ABSENT_AFTER_MS, again).await.unwrap();
}

pub(super) async fn revoking_blocks_no_address_a_node_only_claimed(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let token = ca.token().await;
    let claims = EnrollAsk {
        addresses: vec![address(8).parse().unwrap(), address(9).parse().unwrap()],
        ..ask(&token, 1)
    };
    let node = ca.enroll(0, claims).await.unwrap();
    // A call came from one of them: that one is its own.
    let source = Some(address(8).parse().unwrap());
    ca.identify(1, &Caller { source, ..node.caller() }).await.unwrap();
    ca.revoke_keeping(100, "n-1", true).await;
    // The machine that is at the other one has a join file of before, and gets in.
    ca.enroll(200, ask(&token, 9)).await.unwrap();
    for own in [1, 8] {
        let from = EnrollAsk { source: Some(address(own).parse().unwrap()), ..ask(&token, 2) };
        let blocked = Refusal::AddressBlocked { address: address(own), node: "n-1".to_owned() };
        assert_eq!(refusal(ca.enroll(200, from).await), blocked);
    }
}

pub(super) async fn revoking_voids_what_is_left_of_the_token_unless_it_is_kept(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let token = ca.token_with(|token| token.uses = 5).await;
    for number in [1, 2] {
        ca.enroll(0, ask(&token, number)).await.unwrap();
    }
    assert_eq!(ca.revoke_keeping(1, "n-1", true).await.token_uses_voided, 0);
    ca.enroll(2, ask(&token, 3)).await.unwrap();
    assert_eq!(ca.revoke(3, "n-2").await.token_uses_voided, 2);
    assert_eq!(refusal(ca.enroll(4, ask(&token, 4)).await), Refusal::TokenRevoked);
    assert_eq!(ca.revoke(5, "n-3").await.token_uses_voided, 0, "none are left");
}

pub(super) async fn revoking_voids_the_tokens_of_earlier_enrolments_too(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let first = ca.token_with(|token| token.uses = 50).await;
    let second = ca.token_with(|token| token.uses = 1).await;
    ca.enroll(0, ask(&first, 1)).await.unwrap();
    ca.enroll(1, ask(&second, 1)).await.unwrap();
    assert_eq!(ca.revoke(2, "n-1").await.token_uses_voided, 49);
    assert_eq!(refusal(ca.enroll(3, ask(&first, 2)).await), Refusal::TokenRevoked);
}

pub(super) async fn a_leaf_of_an_earlier_life_keeps_a_revoked_node_on_record(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let node = ca.node(0, 1).await;
    ca.leaf(1, &node.caller(), leaf_ask(100)).await.unwrap();
    ca.forget(2, "n-1").await.unwrap();
    let token = ca.token().await;
    ca.enroll(3, EnrollAsk { name: name("n-1"), ..ask(&token, 9) }).await.unwrap();
    ca.revoke(4, "n-1").await;
    let early = refusal(ca.forget(5, "n-1").await);
    assert!(matches!(early, Refusal::LeafStillLives { .. }), "{early}");
    ca.forget(1 + LEAF_LIFE_MS, "n-1").await.unwrap();
}

pub(super) async fn revoking_revokes_every_certificate_that_lives(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let node = ca.node(0, 1).await;
    let calling = node.caller();
    ca.leaf(0, &calling, leaf_ask(100)).await.unwrap();
    let live = [
        ca.leaf(1, &calling, leaf_ask(101)).await.unwrap(),
        ca.leaf(1, &calling, leaf_ask(102)).await.unwrap(),
    ];
    let pending = ca.renew(2, &calling, key(11)).await.unwrap();
    ca.node(0, 2).await;
    let ms = LEAF_LIFE_MS;
    let revoked = ca.revoke(ms, "n-1").await;
    assert_eq!(revoked.certificates, 4, "two leaves, two identities; one leaf has expired");
    assert_eq!(revoked.node.node_status(), NodeStatus::Revoked);
    assert_eq!(revoked.node, ca.record("n-1").await);
    let leaves: Vec<_> = live.iter().map(|leaf| leaf.serial.as_bytes().to_vec()).collect();
    assert_eq!(ca.revoked_serials(ms, Authority::Cluster(c1())).await, leaves);
    let identities = [node.identity.serial.clone(), pending.serial];
    assert_eq!(ca.revoked_serials(ms, Authority::Control).await, identities);
    assert_eq!(ca.store.control().await.unwrap().unwrap().revocations, 2);
    assert_eq!(ca.cluster().await.revocations, 2);
    let record = ca.store.certificate(live[0].serial).await.unwrap();
    assert_eq!((record.revoked_ms, record.revoked_reason.as_str()), (START_MS + ms, "stolen"));
    let again = ca.revoke(ms + 1, "n-1").await;
    assert_eq!((again.certificates, again.node), (0, revoked.node));
    assert_eq!(ca.logged(AuditKind::NodeRevoked).await, 1);
}

pub(super) async fn expired_revocations_leave_the_list_and_stay_counted(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let node = ca.node(0, 1).await;
    ca.leaf(5, &node.caller(), leaf_ask(100)).await.unwrap();
    ca.revoke(6, "n-1").await;
    let cluster = || Authority::Cluster(c1());
    let last = 5 + LEAF_LIFE_MS - 1;
    for (ms, leaves) in [(last, 1), (last + 1, 0), (last, 0)] {
        let revocations = ca.store.revocations(at(ms), cluster()).await.unwrap();
        assert_eq!((revocations.count, revocations.entries.len()), (1, leaves), "{ms}");
    }
    assert_eq!(ca.revoked_serials(IDENTITY_LIFE_MS - 1, Authority::Control).await.len(), 1);
    assert_eq!(ca.revoked_serials(IDENTITY_LIFE_MS, Authority::Control).await.len(), 0);
}

pub(super) async fn a_revoked_node_is_forgotten_only_when_its_last_leaf_has_expired(
    place: &dyn Place,
) {
    let ca = Ca::new(place).await;
    let node = ca.node(0, 1).await;
    ca.leaf(10, &node.caller(), leaf_ask(100)).await.unwrap();
    ca.leaf(20, &node.caller(), leaf_ask(100)).await.unwrap();
    ca.leaf(15, &node.caller(), leaf_ask(101)).await.unwrap();
    ca.revoke(30, "n-1").await;
    let early = refusal(ca.forget(20 + LEAF_LIFE_MS - 1, "n-1").await);
    assert!(matches!(early, Refusal::LeafStillLives { .. }), "{early}");
    ca.forget(20 + LEAF_LIFE_MS, "n-1").await.unwrap();
    let gone = refusal(ca.store.node(c1(), name("n-1")).await);
    assert_eq!(gone, Refusal::NotFound { what: "node", name: "n-1".to_owned() });
}

pub(super) async fn a_forgotten_node_is_unknown_and_its_name_free(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let token = ca.token().await;
    let node = ca.enroll(0, ask(&token, 1)).await.unwrap();
    ca.forget(1, "n-1").await.unwrap();
    assert_eq!(refusal(ca.identify(2, &node.caller()).await), Refusal::IdentityUnknown);
    assert!(matches!(refusal(ca.forget(2, "n-1").await), Refusal::NotFound { .. }));
    // Its use stays spent: its key gets nothing back from it.
    assert_eq!(refusal(ca.enroll(2, ask(&token, 1)).await), Refusal::TokenSpent(100));
    let newcomer = EnrollAsk {
        name: name("n-1"),
        source: Some(address(1).parse().unwrap()),
        ..ask(&token, 2)
    };
    ca.enroll(3, newcomer).await.unwrap();
    // What it was issued stays on record.
    ca.store.certificate(node.identity.known_serial()).await.unwrap();
}

pub(super) async fn pages_join_to_the_whole(place: &dyn Place) {
    let ca = Ca::new(place).await;
    ca.create("c10").await;
    let count = 2 * PAGE_ROWS_MAX + 1;
    let token = ca.token_with(|token| token.uses = 1_000).await;
    let mut first = None;
    for number in 0..count {
        let mut key_hash = [0; 32];
        key_hash[..8].copy_from_slice(&(number as u64).to_be_bytes());
        let ask = EnrollAsk {
            name: name(&format!("w{number}")),
            source: Some(format!("10.1.{}.{}", number / 200, number % 200 + 1).parse().unwrap()),
            key_hash,
            ..ask(&token, 0)
        };
        let enrolled = ca.enroll(number as i64, ask).await.unwrap();
        first.get_or_insert(enrolled);
        ca.token().await;
    }
    let nodes = whole(|page| ca.store.nodes(c1(), page)).await;
    let names: BTreeSet<_> = nodes.iter().map(|node| &node.name).collect();
    assert_eq!((nodes.len(), names.len()), (count, count));
    assert!(nodes.is_sorted_by(|a, b| a.name < b.name));
    assert_eq!(whole(|page| ca.store.tokens(c1(), page)).await.len(), count + 1);
    let certificates = whole(|page| ca.store.certificates(c1(), None, page)).await;
    assert_eq!(certificates.len(), count);
    assert!(certificates.is_sorted_by(|a, b| a.issued_ms < b.issued_ms));
    let first = first.unwrap();
    for ms in 0..3 {
        let ask = LeafAsk { key_hash: key(250), ..leaf_ask(0) };
        ca.leaf(1_000 + ms, &first.caller(), ask).await.unwrap();
    }
    let of_one = whole(|page| ca.store.certificates(c1(), Some(name("w0")), page)).await;
    assert_eq!(of_one.len(), 4);
    assert!(whole(|page| ca.store.nodes("c10".parse().unwrap(), page)).await.is_empty());
    for wrong in ["zz", "0", &"ab".repeat(2_000)] {
        let refused = refusal(ca.store.nodes(c1(), wrong.to_owned()).await);
        assert!(matches!(refused, Refusal::RequestInvalid(_)), "{refused}");
    }
}

async fn whole<T, E: std::fmt::Debug, F: Future<Output = Result<Page<T>, E>>>(
    page: impl Fn(String) -> F,
) -> Vec<T> {
    let (mut rows, mut next) = (Vec::new(), String::new());
    loop {
        let part = page(next).await.unwrap();
        assert!(part.rows.len() <= PAGE_ROWS_MAX);
        rows.extend(part.rows);
        next = part.next;
        if next.is_empty() {
            return rows;
        }
    }
}

/// What their peers see of it, and that nobody is woken once for each.
pub(super) async fn several_nodes_are_revoked_in_one_decision_as_one_by_one(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let token = ca.token_with(|token| token.uses = 5).await;
    for number in 1..=5 {
        ca.enroll(0, ask(&token, number)).await.unwrap();
    }
    ca.revoke(1, "n-5").await;
    let mut watched = ca.store.watch(&c1());
    watched.mark_unchanged();
    let names = ["n-1", "n-2", "n-99", "n-5", "n-3"].map(name).to_vec();
    let revoke = |ms, names| {
        let revoking = Revoking { reason: "leaked".to_owned(), ..Revoking::default() };
        ca.store.revoke_nodes(at(ms), "uid:0".to_owned(), c1(), names, revoking)
    };
    let revoked = revoke(2, names.clone()).await.unwrap();
    let revoked: Vec<_> = revoked.into_iter().map(|node| node.name).collect();
    assert_eq!(revoked, ["n-1", "n-2", "n-3"], "neither who is gone nor who was revoked before");
    assert!(watched.has_changed().unwrap());
    let seen = watched.borrow_and_update().as_ref().unwrap().version;
    assert_eq!(seen, ca.store.cluster(c1()).await.unwrap().version, "one wake holds all of it");
    for (node, reason) in [("n-1", "leaked"), ("n-3", "leaked"), ("n-5", "stolen"), ("n-4", "")] {
        assert_eq!(ca.record(node).await.revoked_reason, reason, "{node}");
    }
    let blocks = ca.store.blocks(at(3), c1()).await.unwrap();
    let blocked: Vec<_> = blocks.into_iter().map(|(address, _)| address).collect();
    assert_eq!(blocked, [1, 2, 3, 5].map(address));
    assert_eq!(ca.logged(AuditKind::NodeRevoked).await, 4);
    assert!(revoke(4, names).await.unwrap().is_empty(), "once");
    assert!(!watched.has_changed().unwrap(), "nothing new for anybody");
    let many: Vec<_> = (0..=NODES_REVOKED_MAX).map(|n| name(&format!("m-{n}"))).collect();
    assert!(revoke(5, many).await.is_err());
}
