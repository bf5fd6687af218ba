//! Members: what peers are told of a node, for how long, and which addresses they cut off.

use raymtls_proto::{identity::Role, v1};

use super::{
    Place,
    fixture::{
        Ca, HOUR_MS, LEAF_LIFE_MS, LEASE_MS, START_MS, address, ask, at, c1, key, leaf_ask, name,
    },
};
use crate::store::{
    CONTACT_COARSE_MS, Caller, EnrollAsk, LeafAsk, LeafKind, Reach, Revoking,
    records::{AuditKind, MemberRecord},
};

const DAY_MS: i64 = 24 * HOUR_MS;
/// Silent for so long: to the millisecond no member any more.
const LAPSES_MS: i64 = LEASE_MS + CONTACT_COARSE_MS;

impl Ca {
    async fn told_since(&self, version: u64) -> Vec<(String, v1::MemberState, Vec<String>)> {
        let page = self.store.members(c1(), version, 1_000).await.unwrap();
        let told = |entry: MemberRecord| (entry.name.clone(), entry.state(), entry.addresses);
        page.entries.into_iter().map(told).collect()
    }

    async fn states(&self) -> Vec<(String, v1::MemberState)> {
        self.told_since(0).await.into_iter().map(|(name, state, _)| (name, state)).collect()
    }

    async fn blocks(&self, ms: i64) -> Vec<String> {
        let blocks = self.store.blocks(at(ms), c1()).await.unwrap();
        blocks.into_iter().map(|(address, _)| address).collect()
    }

    async fn lapse(&self, ms: i64) -> u32 {
        self.store.lapse_members(at(ms), c1(), at(0)).await.unwrap()
    }

    async fn set(&self, change: impl FnOnce(&mut v1::Settings)) {
        let before = self.cluster().await.settings().clone();
        let mut after = before.clone();
        change(&mut after);
        self.store.set_cluster(at(0), "uid:0".to_owned(), c1(), before, after).await.unwrap();
    }
}

fn member(name: &str) -> (String, v1::MemberState) {
    (name.to_owned(), v1::MemberState::Member)
}

pub(super) async fn a_member_counts_at_the_addresses_it_called_from(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let token = ca.token().await;
    let claims = EnrollAsk {
        addresses: vec![address(1).parse().unwrap(), address(9).parse().unwrap()],
        ..ask(&token, 1)
    };
    let node = ca.enroll(0, claims).await.unwrap();
    let told = ca.told_since(0).await;
    assert_eq!(told, [("n-1".to_owned(), v1::MemberState::Member, vec![address(1)])]);

    let before = ca.version().await;
    let source = Some(address(9).parse().unwrap());
    ca.identify(1, &Caller { source, ..node.caller() }).await.unwrap();
    let told = ca.told_since(before).await;
    assert_eq!(told[0].2, [address(1), address(9)], "a call came from it since");
    let quiet = ca.version().await;
    ca.identify(2, &node.caller()).await.unwrap();
    assert_eq!(ca.version().await, quiet, "nothing new, nobody is woken");
}

pub(super) async fn where_ranges_are_trusted_claimed_addresses_count_too(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let token = ca.token().await;
    let claims = EnrollAsk {
        addresses: vec![address(1).parse().unwrap(), address(9).parse().unwrap()],
        ..ask(&token, 1)
    };
    ca.enroll(0, claims).await.unwrap();
    let before = ca.version().await;
    ca.set(|settings| settings.trust_ranges = true).await;
    assert_eq!(ca.told_since(before).await[0].2, [address(1), address(9)]);
    let before = ca.version().await;
    ca.set(|settings| settings.trust_ranges = false).await;
    assert_eq!(ca.told_since(before).await[0].2, [address(1)]);
    ca.set(|settings| settings.trust_ranges = true).await;
    assert_eq!(ca.revoke(1, "n-1").await.blocked.addresses, [address(1), address(9)]);
}

pub(super) async fn pages_of_changes_join_to_the_whole(place: &dyn Place) {
    let ca = Ca::new(place).await;
    for number in 1..=7 {
        ca.node(0, number).await;
    }
    let whole = ca.told_since(0).await;
    assert_eq!(whole.len(), 7);
    let (mut joined, mut after) = (Vec::new(), 0);
    loop {
        let page = ca.store.members(c1(), after, 3).await.unwrap();
        joined.extend(page.entries.into_iter().map(|entry| entry.name));
        after = page.up_to;
        if !page.more {
            break;
        }
        assert!(page.up_to < ca.version().await);
    }
    assert_eq!(joined, whole.iter().map(|told| told.0.clone()).collect::<Vec<_>>());
    assert_eq!(after, ca.version().await);
}

pub(super) async fn a_silent_node_lapses_to_the_millisecond_and_its_first_contact_brings_it_back(
    place: &dyn Place,
) {
    let ca = Ca::new(place).await;
    let silent = ca.node(0, 1).await;
    let heard = ca.node(0, 2).await;
    ca.identify(DAY_MS / 2, &heard.caller()).await.unwrap();
    assert_eq!(ca.lapse(LAPSES_MS - 1).await, 0);
    assert_eq!(ca.states().await, [member("n-1"), member("n-2")]);
    assert_eq!(ca.lapse(LAPSES_MS).await, 1);
    let lapsed = ("n-1".to_owned(), v1::MemberState::Lapsed);
    assert_eq!(ca.states().await, [member("n-2"), lapsed]);
    assert_eq!(ca.lapse(LAPSES_MS).await, 0, "once");

    ca.identify(LAPSES_MS + 1, &silent.caller()).await.unwrap();
    assert_eq!(ca.states().await, [member("n-2"), member("n-1")]);
    assert_eq!(ca.logged(AuditKind::MemberLapsed).await, 1);
    assert_eq!(ca.logged(AuditKind::MemberReturned).await, 1);
    assert_eq!(ca.lapse(LAPSES_MS + 2).await, 0, "its silence is counted anew");
}

pub(super) async fn time_in_which_the_ca_did_not_serve_is_nobody_s_silence(place: &dyn Place) {
    let ca = Ca::new(place).await;
    ca.node(0, 1).await;
    let started = 3 * DAY_MS;
    let ca = ca.restart(place, started).await;
    assert_eq!(ca.lapse(started).await, 0);
    assert_eq!(ca.lapse(started + LAPSES_MS - 1).await, 0, "within one full lease nobody goes");
    assert_eq!(ca.lapse(started + LAPSES_MS).await, 1);
}

pub(super) async fn a_machine_for_once_is_a_member_while_its_leaf_lives(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let token = ca.token_with(|token| token.role = Role::Driver.to_proto().into()).await;
    let once = EnrollAsk { role: Role::Driver, once: true, ..ask(&token, 1) };
    let driver = ca.enroll(0, once).await.unwrap();
    let leaf_at = 1;
    let ask = LeafAsk { kind: LeafKind::Driver, ..leaf_ask(101) };
    ca.leaf(leaf_at, &driver.caller(), ask).await.unwrap();
    ca.set(|settings| settings.lease_seconds = HOUR_MS / 1_000).await;
    // The lease ends before the leaf.
    const { assert!(HOUR_MS + CONTACT_COARSE_MS < LEAF_LIFE_MS) };
    assert_eq!(ca.lapse(leaf_at + LEAF_LIFE_MS - 1).await, 0);
    assert_eq!(ca.lapse(leaf_at + LEAF_LIFE_MS).await, 1);
}

pub(super) async fn who_is_gone_is_told_for_a_day_and_then_everything_anew(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let node = ca.node(0, 1).await;
    ca.node(0, 2).await;
    let before = ca.version().await;
    ca.leave(1, &node.caller()).await.unwrap();
    ca.forget(2, "n-1").await.unwrap();
    let gone = ("n-1".to_owned(), v1::MemberState::Gone, vec![address(1)]);
    let gone = [gone];
    assert_eq!(ca.told_since(before).await, gone);
    ca.lapse(2 + DAY_MS).await;
    assert_eq!(ca.told_since(before).await, gone);
    assert_eq!(ca.cluster().await.members_from, 0);
    ca.lapse(3 + DAY_MS).await;
    assert_eq!(ca.told_since(before).await, []);
    assert!(ca.cluster().await.members_from > before, "who stands there is told all");
}

pub(super) async fn a_revoked_node_s_addresses_are_cut_off_until_its_last_leaf_ends(
    place: &dyn Place,
) {
    let ca = Ca::new(place).await;
    ca.set(|settings| settings.leaf_life_seconds = 3 * DAY_MS / 1_000).await;
    let node = ca.node(0, 1).await;
    ca.leaf(1, &node.caller(), leaf_ask(101)).await.unwrap();
    let before = ca.cluster().await.blocks_version;
    let revoked = ca.revoke(2, "n-1").await;
    assert_eq!(revoked.blocked.addresses, [address(1)]);
    assert_eq!(revoked.version, ca.version().await);
    assert!(ca.cluster().await.blocks_version > before);
    let ends = 1 + 3 * DAY_MS;
    assert_eq!(ca.blocks(ends - 1).await, [address(1)]);
    assert_eq!(ca.blocks(ends).await, Vec::<String>::new());
    let told = ca.cluster().await.blocks_version;
    ca.lapse(ends - 1).await;
    assert_eq!(ca.cluster().await.blocks_version, told);
    ca.lapse(ends).await;
    assert!(ca.cluster().await.blocks_version > told, "agents are told that it is over");
}

pub(super) async fn a_node_without_a_leaf_is_cut_off_for_a_day(place: &dyn Place) {
    let ca = Ca::new(place).await;
    ca.node(0, 1).await;
    ca.revoke(2, "n-1").await;
    assert_eq!(ca.blocks(2 + DAY_MS - 1).await, [address(1)]);
    assert_eq!(ca.blocks(2 + DAY_MS).await, Vec::<String>::new());
}

pub(super) async fn an_address_certified_to_another_since_is_cut_off_no_more(place: &dyn Place) {
    let ca = Ca::new(place).await;
    ca.node(0, 1).await;
    ca.revoke(2, "n-1").await;
    let newer = ca.token_with(|token| token.created_ms = START_MS + 3).await;
    let source = Some(address(1).parse().unwrap());
    ca.enroll(4, EnrollAsk { source, ..ask(&newer, 2) }).await.unwrap();
    assert_eq!(ca.blocks(5).await, Vec::<String>::new());
}

pub(super) async fn an_address_taken_over_counts_for_its_new_node_alone(place: &dyn Place) {
    let ca = Ca::new(place).await;
    ca.node(0, 1).await;
    // Still a member by its lease, but out of touch: its address is free.
    let later = HOUR_MS;
    let token = ca.token().await;
    let source = Some(address(1).parse().unwrap());
    ca.enroll(later, EnrollAsk { source, ..ask(&token, 2) }).await.unwrap();
    let told = ca.told_since(0).await;
    let of = |name: &str| told.iter().find(|told| told.0 == name).unwrap().2.clone();
    assert_eq!(of("n-1"), Vec::<String>::new());
    assert_eq!(of("n-2"), [address(1)]);

    let spared = ca.revoke(later + 1, "n-1").await.blocked;
    assert_eq!(spared.addresses, Vec::<String>::new());
    assert!(spared.spared[0].1.contains("another node"), "{spared:?}");
    assert_eq!(ca.revoke(later + 2, "n-2").await.blocked.addresses, [address(1)]);
}

/// Every way in which a block could hit somebody else, beside the way in which it hits the node.
pub(super) async fn a_block_is_never_a_weapon(place: &dyn Place) {
    let ca = Ca::new(place).await;
    ca.set(|settings| settings.admin_ranges = vec![format!("{}/32", address(4))]).await;
    let reach = Reach { all_traffic: true, ca: vec![address(3).parse().unwrap()] };
    for (what, number, shared, spared_for) in [
        ("its own address", 1, false, None),
        ("host network: another node is at the same address", 2, true, Some("n-77")),
        ("the CA is on this host", 3, false, Some("the CA")),
        ("an operator's range holds it", 4, false, Some("admin range")),
    ] {
        let token = ca.token_with(|token| token.shared_address = shared).await;
        let bad = EnrollAsk { shared_address: shared, ..ask(&token, number) };
        if shared {
            let other = EnrollAsk { name: name("n-77"), key_hash: key(77), ..bad.clone() };
            ca.enroll(0, other).await.unwrap();
        }
        let node = ca.enroll(0, bad).await.unwrap().node.name;
        let (actor, reach) = ("uid:0".to_owned(), reach.clone());
        let revoking = Revoking { reach, ..Revoking::default() };
        let revoked = ca.store.revoke_node(at(1), actor, c1(), name(&node), revoking).await;
        let blocked = revoked.unwrap().blocked;
        if let Some(word) = spared_for {
            assert_eq!(blocked.addresses, Vec::<String>::new(), "{what}");
            assert!(blocked.spared[0].1.contains(word), "{what}: {blocked:?}");
        } else {
            assert_eq!(blocked.addresses, [address(number)], "{what}");
        }
    }
    let blocks = ca.store.blocks(at(2), c1()).await.unwrap();
    let all: Vec<_> = blocks.iter().map(|(at, block)| (at.clone(), block.all_traffic)).collect();
    assert_eq!(all, [(address(1), true)]);
}

/// Out of touch, taken over, free again: the first node is back where it was.
pub(super) async fn an_address_taken_back_counts_again(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let first = ca.node(0, 1).await;
    let token = ca.token().await;
    let source = Some(address(1).parse().unwrap());
    let second = ca.enroll(HOUR_MS, EnrollAsk { source, ..ask(&token, 2) }).await.unwrap();
    ca.leave(HOUR_MS + 1, &second.caller()).await.unwrap();
    ca.leaf(HOUR_MS + 2, &first.caller(), leaf_ask(101)).await.unwrap();
    let told = ca.told_since(0).await;
    let back = told.iter().find(|told| told.0 == "n-1").unwrap();
    assert_eq!(back.2, [address(1)]);
    // And whoever was there meanwhile cannot have it cut off.
    let blocked = ca.revoke(HOUR_MS + 3, "n-2").await.blocked;
    assert_eq!(blocked.addresses, Vec::<String>::new(), "{blocked:?}");
    assert_eq!(ca.revoke(HOUR_MS + 4, "n-1").await.blocked.addresses, [address(1)]);
}

pub(super) async fn a_call_alone_takes_an_address_back_that_is_free(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let first = ca.node(0, 1).await;
    let token = ca.token().await;
    let source = Some(address(1).parse().unwrap());
    let second = ca.enroll(HOUR_MS, EnrollAsk { source, ..ask(&token, 2) }).await.unwrap();
    ca.identify(HOUR_MS + 1, &first.caller()).await.unwrap();
    let counts = async || {
        let told = ca.told_since(0).await;
        told.into_iter().find(|told| told.0 == "n-1").unwrap().2
    };
    assert_eq!(counts().await, Vec::<String>::new(), "the other one is live");
    ca.leave(HOUR_MS + 2, &second.caller()).await.unwrap();
    ca.identify(HOUR_MS + 3, &first.caller()).await.unwrap();
    assert_eq!(counts().await, [address(1)]);
}

/// A claim is no proof: it neither takes a member out of the sets nor lifts a block.
pub(super) async fn only_a_call_from_it_makes_an_address_count_for_another(place: &dyn Place) {
    let ca = Ca::new(place).await;
    ca.node(0, 1).await;
    ca.node(0, 5).await;
    ca.revoke(1, "n-5").await;
    let later = ca.token_with(|token| token.created_ms = START_MS + 2).await;
    let claims = EnrollAsk {
        addresses: vec![address(1).parse().unwrap(), address(5).parse().unwrap()],
        ..ask(&later, 2)
    };
    let claimer = ca.enroll(HOUR_MS, claims).await.unwrap();
    let counts = async |name: &str| {
        let told = ca.told_since(0).await;
        told.into_iter().find(|told| told.0 == name).unwrap().2
    };
    assert_eq!(counts("n-1").await, [address(1)], "out of touch, and a member by its lease");
    assert_eq!(ca.blocks(HOUR_MS).await, [address(5)]);
    for number in [1, 5] {
        let source = Some(address(number).parse().unwrap());
        ca.identify(HOUR_MS + 1, &Caller { source, ..claimer.caller() }).await.unwrap();
    }
    assert_eq!(counts("n-1").await, Vec::<String>::new());
    assert_eq!(counts("n-2").await.len(), 3);
    assert_eq!(ca.blocks(HOUR_MS + 2).await, Vec::<String>::new());
    assert_eq!(ca.logged(AuditKind::AddressLost).await, 1);
}

pub(super) async fn an_address_spared_for_another_is_cut_off_when_nobody_needs_it(
    place: &dyn Place,
) {
    let ca = Ca::new(place).await;
    let token = ca.token_with(|token| token.shared_address = true).await;
    let shared = |number| EnrollAsk {
        source: Some(address(7).parse().unwrap()),
        shared_address: true,
        ..ask(&token, number)
    };
    ca.enroll(0, shared(1)).await.unwrap();
    let other = ca.enroll(0, shared(2)).await.unwrap();
    assert_eq!(ca.revoke(1, "n-1").await.blocked.addresses, Vec::<String>::new());
    ca.lapse(2).await;
    assert_eq!(ca.blocks(2).await, Vec::<String>::new());
    ca.leave(3, &other.caller()).await.unwrap();
    ca.lapse(4).await;
    assert_eq!(ca.blocks(4).await, [address(7)]);
}

pub(super) async fn a_node_that_was_long_gone_has_nobody_cut_off(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let node = ca.node(0, 1).await;
    ca.leave(1, &node.caller()).await.unwrap();
    let revoked = ca.revoke(2, "n-1").await.blocked;
    assert_eq!(revoked.addresses, Vec::<String>::new());
    assert_eq!(ca.blocks(3).await, Vec::<String>::new());
    // Older tokens are barred from the address all the same.
    let older = ca.token().await;
    let again = EnrollAsk { source: Some(address(1).parse().unwrap()), ..ask(&older, 2) };
    assert!(ca.enroll(4, again).await.is_err());
}

pub(super) async fn what_two_revocations_cut_off_one_reinstatement_does_not_free(
    place: &dyn Place,
) {
    let ca = Ca::new(place).await;
    let token = ca.token_with(|token| token.shared_address = true).await;
    for number in [1, 2] {
        let source = Some(address(7).parse().unwrap());
        let shared = EnrollAsk { source, shared_address: true, ..ask(&token, number) };
        ca.enroll(0, shared).await.unwrap();
    }
    ca.revoke(1, "n-1").await;
    ca.revoke(2, "n-2").await;
    assert_eq!(ca.blocks(3).await, [address(7)]);
    for (name_of, left) in [("n-2", 1), ("n-1", 0)] {
        let actor = "uid:0".to_owned();
        ca.store.reinstate_node(at(4), actor, c1(), name(name_of)).await.unwrap();
        assert_eq!(ca.blocks(5).await.len(), left, "{name_of}");
    }
}

/// Claims of others in between change nothing: whoever calls from the address has it, and nobody else.
pub(super) async fn whoever_had_an_address_loses_it_to_the_one_that_calls_from_it(
    place: &dyn Place,
) {
    let ca = Ca::new(place).await;
    ca.node(0, 1).await;
    let token = ca.token().await;
    let claims =
        |number| EnrollAsk { addresses: vec![address(1).parse().unwrap()], ..ask(&token, number) };
    // The first is out of touch; two claim its address, one after the other, and the last one calls.
    let second = ca.enroll(HOUR_MS, claims(2)).await.unwrap();
    ca.leave(HOUR_MS + 1, &second.caller()).await.unwrap();
    let third = ca.enroll(HOUR_MS + 2, claims(3)).await.unwrap();
    let source = Some(address(1).parse().unwrap());
    ca.identify(HOUR_MS + 3, &Caller { source, ..third.caller() }).await.unwrap();
    let told = ca.told_since(0).await;
    let of = |name: &str| told.iter().find(|told| told.0 == name).unwrap().2.clone();
    assert_eq!(of("n-1"), Vec::<String>::new());
    assert!(of("n-3").contains(&address(1)));
    assert!(ca.revoke(HOUR_MS + 4, "n-3").await.blocked.addresses.contains(&address(1)));
}

/// A driver shares its address with whoever is there: a node that came back as one loses nothing.
pub(super) async fn a_node_that_came_back_as_a_driver_keeps_the_address_it_shares(
    place: &dyn Place,
) {
    let ca = Ca::new(place).await;
    ca.node(0, 1).await;
    let drivers = ca.token_with(|token| token.role = Role::Driver.to_proto().into()).await;
    let driver = EnrollAsk { role: Role::Driver, key_hash: key(11), ..ask(&drivers, 1) };
    ca.enroll(HOUR_MS, driver).await.unwrap();
    let token = ca.token().await;
    let source = Some(address(1).parse().unwrap());
    ca.enroll(HOUR_MS + 1, EnrollAsk { source, ..ask(&token, 2) }).await.unwrap();
    let told = ca.told_since(0).await;
    let of = |name: &str| told.iter().find(|told| told.0 == name).unwrap().2.clone();
    assert_eq!(of("n-1"), [address(1)]);
    assert_eq!(of("n-2"), [address(1)]);
    assert_eq!(ca.logged(AuditKind::AddressLost).await, 0);
}
