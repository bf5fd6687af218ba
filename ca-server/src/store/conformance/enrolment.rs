//! Tokens and the nodes they give.

use std::{collections::BTreeSet, sync::Arc};

use raymtls_proto::identity::Role;
use tokio::task::JoinSet;

use super::{
    Place,
    fixture::{
        Ca, HOUR_MS, IDENTITY_LIFE_MS, START_MS, address, ask, at, c1, key, race_lost, refusal,
    },
};
use crate::{
    refusal::Refusal,
    store::{
        EnrollAsk, EnrollPlan, Enrolled,
        records::{AuditKind, NodeStatus},
    },
};

const DAY_MS: i64 = 24 * HOUR_MS;

pub(super) async fn an_enrolled_node_is_what_was_bound(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let token = ca.token_with(|token| token.dns_names = vec!["head.example".to_owned()]).await;
    let ask = EnrollAsk {
        addresses: vec!["192.0.2.9".parse().unwrap()],
        dns_names: vec!["head.example".parse().unwrap()],
        ..ask(&token, 1)
    };
    let enrolled = ca.enroll(5, ask).await.unwrap();
    let node = ca.record("n-1").await;
    assert_eq!(enrolled.node, node);
    assert_eq!((node.node_status(), node.known_role()), (NodeStatus::Live, Role::Worker));
    let addresses: Vec<_> =
        node.addresses.iter().map(|bound| (bound.address.as_str(), bound.proved)).collect();
    assert_eq!(addresses, [("10.0.0.1", true), ("192.0.2.9", false)]);
    assert_eq!(node.dns_names, ["head.example"]);
    assert_eq!((node.enrolled_ms, node.contact_ms), (START_MS + 5, START_MS + 5));
    assert_eq!(node.current().serial, enrolled.identity.serial);
    let stored = ca.store.certificate(enrolled.identity.known_serial()).await.unwrap();
    assert_eq!(stored, enrolled.identity);
    assert_eq!((stored.node.as_str(), stored.cluster.as_str()), ("n-1", "c1"));
    assert_eq!(ca.token_record(&token).await.used, 1);
}

pub(super) async fn a_token_of_n_uses_gives_exactly_n_nodes(place: &dyn Place) {
    let ca = Arc::new(Ca::new(place).await);
    let token = ca.token_with(|token| token.uses = 10).await;
    let answers = race(&ca, (1..=64).map(|number| ask(&token, number))).await;
    let (enrolled, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(Result::is_ok);
    assert_eq!((enrolled.len(), refused.len()), (10, 54));
    for answer in refused {
        assert_eq!(refusal(answer), Refusal::TokenSpent(10));
    }
    assert_eq!(ca.token_record(&token).await.used, 10);
    assert_eq!(ca.store.nodes(c1(), String::new()).await.unwrap().rows.len(), 10);
    assert_eq!(ca.store.certificates(c1(), None, String::new()).await.unwrap().rows.len(), 10);
    assert_eq!(ca.logged(AuditKind::Enrolled).await, 10);
}

pub(super) async fn one_key_that_races_itself_spends_one_use(place: &dyn Place) {
    let ca = Arc::new(Ca::new(place).await);
    let token = ca.token().await;
    let answers = race(&ca, (0..32).map(|_| ask(&token, 1))).await;
    let serials: BTreeSet<_> =
        answers.into_iter().map(|answer| answer.unwrap().identity.serial).collect();
    assert_eq!(serials.len(), 1);
    assert_eq!(ca.token_record(&token).await.used, 1);
    assert_eq!(ca.store.certificates(c1(), None, String::new()).await.unwrap().rows.len(), 1);
}

pub(super) async fn the_same_key_gets_the_same_answer(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let token = ca.token_with(|token| (token.uses, token.expires_ms) = (1, START_MS + 10)).await;
    let first = ca.enroll(1, ask(&token, 1)).await.unwrap();
    let ca = ca.restart(place, 2).await;
    // Spent and expired meanwhile: a lost reply costs nothing for a day.
    for ms in [2, 10, DAY_MS] {
        let again = ca.enroll(ms, ask(&token, 1)).await.unwrap();
        assert_eq!(again.identity, first.identity, "{ms}");
    }
    assert_eq!(refusal(ca.enroll(1 + DAY_MS, ask(&token, 1)).await), Refusal::TokenExpired);
    let revoked = ca.token_with(|token| token.uses = 1).await;
    ca.enroll(1, ask(&revoked, 2)).await.unwrap();
    let actor = "uid:0".to_owned();
    ca.store.revoke_token(at(2), actor, c1(), revoked.clone()).await.unwrap();
    assert_eq!(refusal(ca.enroll(3, ask(&revoked, 2)).await), Refusal::TokenRevoked);
}

pub(super) async fn another_key_needs_another_use(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let token = ca.token_with(|token| token.uses = 2).await;
    ca.enroll(1, ask(&token, 1)).await.unwrap();
    ca.enroll(1, ask(&token, 2)).await.unwrap();
    assert_eq!(refusal(ca.enroll(1, ask(&token, 3)).await), Refusal::TokenSpent(2));
    assert_eq!(ca.token_record(&token).await.used, 2);
}

pub(super) async fn a_refused_attempt_spends_nothing(place: &dyn Place) {
    let ca = Ca::new(place).await;
    ca.create("c2").await;
    let ranged = ca
        .token_with(|token| {
            token.any_address = false;
            token.address_ranges = vec!["10.0.0.0/24".to_owned()];
            token.node_names = vec!["n-*".to_owned()];
            token.expires_ms = START_MS + 100;
            token.uses = 1;
        })
        .await;
    let revoked = ca.token().await;
    let actor = "uid:0".to_owned();
    ca.store.revoke_token(at(0), actor, c1(), revoked.clone()).await.unwrap();
    let taken = ca.node(0, 200).await;
    let good = ask(&ranged, 1);
    let table: [(&str, i64, EnrollAsk, fn(&Refusal) -> bool); 12] = [
        ("at expiry", 100, good.clone(), |r| *r == Refusal::TokenExpired),
        ("revoked", 1, ask(&revoked, 1), |r| *r == Refusal::TokenRevoked),
        ("other name", 1, EnrollAsk { name: "other".parse().unwrap(), ..good.clone() }, |r| {
            *r == Refusal::TokenNodeMismatch("other".to_owned())
        }),
        ("other role", 1, EnrollAsk { role: Role::Head, ..good.clone() }, |r| {
            matches!(r, Refusal::TokenRoleMismatch { .. })
        }),
        ("other cluster", 1, EnrollAsk { cluster: "c2".parse().unwrap(), ..good.clone() }, |r| {
            *r == Refusal::TokenClusterMismatch("c2".to_owned())
        }),
        ("no such cluster", 1, EnrollAsk { cluster: "c9".parse().unwrap(), ..good.clone() }, |r| {
            *r == Refusal::TokenClusterMismatch("c9".to_owned())
        }),
        (
            "source outside",
            1,
            EnrollAsk { source: Some("10.0.1.1".parse().unwrap()), ..good.clone() },
            |r| matches!(r, Refusal::AddressNotAllowed(_)),
        ),
        (
            "claimed outside",
            1,
            EnrollAsk { addresses: vec!["10.0.1.1".parse().unwrap()], ..good.clone() },
            |r| matches!(r, Refusal::AddressNotAllowed(_)),
        ),
        ("no address", 1, EnrollAsk { source: None, ..good.clone() }, |r| {
            matches!(r, Refusal::AddressNotAllowed(_))
        }),
        (
            "DNS name not allowed",
            1,
            EnrollAsk { dns_names: vec!["x.example".parse().unwrap()], ..good.clone() },
            |r| matches!(r, Refusal::NameNotAllowed(_)),
        ),
        (
            "name taken",
            1,
            EnrollAsk { name: taken.node.name.parse().unwrap(), ..good.clone() },
            |r| *r == Refusal::NodeNameTaken("n-200".to_owned()),
        ),
        (
            "address taken",
            1,
            EnrollAsk { source: Some(address(200).parse().unwrap()), ..good.clone() },
            |r| matches!(r, Refusal::AddressTaken { holder, .. } if holder == "n-200"),
        ),
    ];
    let (before, log) = (ca.token_record(&ranged).await, ca.log().await.len());
    for (name, ms, ask, expected) in table {
        let refused = refusal(ca.enroll(ms, ask).await);
        assert!(expected(&refused), "{name}: {refused}");
        assert_eq!(ca.token_record(&ranged).await, before, "{name}");
    }
    assert_eq!(ca.log().await.len(), log);
    // To the last millisecond its one use is there.
    ca.enroll(99, good).await.unwrap();
    assert_eq!(refusal(ca.enroll(99, ask(&ranged, 2)).await), Refusal::TokenSpent(1));
}

pub(super) async fn an_unknown_token_and_a_wrong_secret_are_one_word(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let token = ca.token().await;
    let unknown = "ffffffffffffffff".parse().unwrap();
    let wrong = EnrollAsk { secret_hash: [8; 32], ..ask(&token, 1) };
    // Whoever does not know the secret learns nothing of the token, not even that it is revoked.
    let revoked = ca.token().await;
    let actor = "uid:0".to_owned();
    ca.store.revoke_token(at(0), actor, c1(), revoked.clone()).await.unwrap();
    let blind = EnrollAsk { secret_hash: [8; 32], ..ask(&revoked, 1) };
    for ask in [ask(&unknown, 1), wrong, blind] {
        assert_eq!(refusal(ca.enroll(1, ask).await), Refusal::TokenUnknown);
    }
    assert_eq!(ca.token_record(&token).await.used, 0);
}

pub(super) async fn what_changed_while_the_identity_was_signed_loses(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let token = ca.token_with(|token| token.uses = 3).await;
    let plan = |ask| async {
        match ca.store.plan_enroll(at(1), ask).await.unwrap() {
            EnrollPlan::Issue(binding) => binding,
            EnrollPlan::Replay(_) => panic!("nobody enrolled yet"),
        }
    };
    let slow = ask(&token, 1);
    let binding = plan(slow.clone()).await;
    // Another machine of the same name is faster.
    let fast =
        EnrollAsk { key_hash: key(2), source: Some(address(2).parse().unwrap()), ..slow.clone() };
    ca.enroll(2, fast).await.unwrap();
    let identity = ca.sign(1, slow.key_hash, IDENTITY_LIFE_MS);
    let serial = identity.serial;
    let lost = ca.store.enroll(at(3), slow, binding, identity).await;
    assert_eq!(refusal(lost), Refusal::NodeNameTaken("n-1".to_owned()));
    assert_eq!(ca.token_record(&token).await.used, 1);
    let unsigned = refusal(ca.store.certificate(serial).await);
    assert_eq!(unsigned, Refusal::CertificateNotFound(serial));
    // What was signed is not what was planned.
    let mut other = plan(ask(&token, 3)).await;
    other.addresses.push("192.0.2.9".parse().unwrap());
    let identity = ca.sign(1, key(3), IDENTITY_LIFE_MS);
    let unplanned = ca.store.enroll(at(3), ask(&token, 3), other, identity).await;
    assert!(!race_lost(unplanned).is_empty());
    assert_eq!(ca.token_record(&token).await.used, 1);
    // The token is revoked between planning and recording.
    let slow = ask(&token, 3);
    let binding = plan(slow.clone()).await;
    let actor = "uid:0".to_owned();
    ca.store.revoke_token(at(4), actor, c1(), token.clone()).await.unwrap();
    let identity = ca.sign(1, slow.key_hash, IDENTITY_LIFE_MS);
    assert_eq!(
        refusal(ca.store.enroll(at(5), slow, binding, identity).await),
        Refusal::TokenRevoked
    );
}

pub(super) async fn tokens_are_listed_and_revoked_in_their_own_cluster(place: &dyn Place) {
    let ca = Ca::new(place).await;
    ca.create("c2").await;
    let here = ca.token().await;
    let there = ca.token_with(|token| token.cluster = "c2".to_owned()).await;
    let c2 = || "c2".parse().unwrap();
    let rows = ca.store.tokens(c1(), String::new()).await.unwrap().rows;
    assert_eq!(rows.iter().map(|token| token.id.as_str()).collect::<Vec<_>>(), [here.as_str()]);
    let revoke =
        |ms, cluster| ca.store.revoke_token(at(ms), "uid:0".to_owned(), cluster, there.clone());
    assert!(matches!(refusal(revoke(1, c1()).await), Refusal::NotFound { what: "token", .. }));
    assert_eq!(revoke(2, c2()).await.unwrap().revoked_ms, START_MS + 2);
    assert_eq!(revoke(3, c2()).await.unwrap().revoked_ms, START_MS + 2, "once");
    assert_eq!(ca.logged(AuditKind::TokenRevoked).await, 1);
    let taken = ca.token_record(&here).await;
    let again = refusal(ca.store.create_token(at(1), taken).await);
    assert!(matches!(again, Refusal::AlreadyExists { what: "token", .. }));
}

async fn race(
    ca: &Arc<Ca>,
    asks: impl Iterator<Item = EnrollAsk>,
) -> Vec<Result<Enrolled, crate::store::StoreError>> {
    let mut tasks = JoinSet::new();
    for ask in asks {
        let ca = Arc::clone(ca);
        tasks.spawn(async move { ca.enroll(1, ask).await });
    }
    tasks.join_all().await
}
