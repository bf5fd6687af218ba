//! Clusters: settings, issuers, CRLs, versions.

use std::time::Duration;

use raymtls_proto::v1;
use tokio::time::timeout;

use super::{
    Place,
    fixture::{
        Ca, EPOCH, HOUR_MS, START_MS, ask, at, c1, ca_key, caller, cluster, control, key, leaf_ask,
        refusal,
    },
};
use crate::{
    refusal::Refusal,
    store::{
        Authority, Watched,
        records::{CaKey, ClusterRecord, CrlSet, TokenRecord},
    },
};

pub(super) async fn a_control_authority_is_put_in_place_once(place: &dyn Place) {
    let store = place.create(at(0), EPOCH);
    assert_eq!(store.epoch(), EPOCH);
    assert_eq!(store.control().await.unwrap(), None);
    store.initialize(at(0), control()).await.unwrap();
    let again = refusal(store.initialize(at(1), control()).await);
    assert!(matches!(again, Refusal::AlreadyExists { .. }), "{again}");
    assert_eq!(store.control().await.unwrap(), Some(control()));
}

pub(super) async fn a_cluster_is_created_once(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let again = ca.store.create_cluster(at(0), "uid:0".to_owned(), cluster("c1")).await;
    let name = "c1".to_owned();
    assert_eq!(refusal(again), Refusal::AlreadyExists { what: "cluster", name });
    let created = ca.create("c0").await;
    assert_eq!((created.version, created.settings_version, created.bundle_version), (1, 1, 1));
    assert_eq!((created.ray_token_version, created.control_crl_version), (1, 1));
    let names: Vec<_> =
        ca.store.clusters().await.unwrap().into_iter().map(|cluster| cluster.cluster).collect();
    assert_eq!(names, ["c0", "c1"]);
    let unknown = refusal(ca.store.cluster("c2".parse().unwrap()).await);
    assert_eq!(unknown, Refusal::NotFound { what: "cluster", name: "c2".to_owned() });
}

pub(super) async fn settings_change_only_from_what_they_were(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let before = ca.cluster().await;
    let (old, new) = (before.settings().clone(), longer(&before));
    let set = |from: &v1::Settings, to: &v1::Settings| {
        ca.store.set_cluster(at(1), "uid:0".to_owned(), c1(), from.clone(), to.clone())
    };
    let after = set(&old, &new).await.unwrap();
    assert_eq!(after.settings(), &new);
    assert_eq!((after.version, after.settings_version), (2, 2));
    assert_eq!(after.bundle_version, 1);
    let late = refusal(set(&old, &new).await);
    assert!(matches!(late, Refusal::SettingInvalid(_)), "{late}");
    assert_eq!(set(&new, &new).await.unwrap(), after, "nothing changes, nothing moves");
    assert_eq!(ca.cluster().await, after);
}

pub(super) async fn the_newest_issuer_is_first_and_expired_ones_go(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let next = ca_key("next", START_MS + 9 * HOUR_MS);
    let name = |issuer: CaKey| String::from_utf8(issuer.key_id).unwrap();
    let names = |issuers: Vec<CaKey>| issuers.into_iter().map(name).collect::<Vec<_>>();
    let add = |ms, authority, issuer| ca.store.add_issuer(at(ms), authority, issuer);
    let cluster = Authority::Cluster(c1());
    add(HOUR_MS - 1, cluster.clone(), next.clone()).await.unwrap();
    add(HOUR_MS - 1, Authority::Control, next.clone()).await.unwrap();
    assert_eq!(names(ca.cluster().await.issuers), ["next", "issuer-1"]);
    let record = ca.store.control().await.unwrap().unwrap();
    assert_eq!(names(record.issuers), ["next", "control-1"]);
    // At its notAfter the first one is of no use to anybody.
    let third = ca_key("third", START_MS + 9 * HOUR_MS);
    add(HOUR_MS, cluster, third).await.unwrap();
    assert_eq!(names(ca.cluster().await.issuers), ["third", "next"]);
    let nobody = Authority::Cluster("c9".parse().unwrap());
    assert!(matches!(refusal(add(0, nobody, next).await), Refusal::NotFound { .. }));
}

pub(super) async fn crl_numbers_never_go_back(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let cluster = Authority::Cluster(c1());
    assert_eq!(ca.store.crls(cluster.clone()).await.unwrap(), None);
    let put = |number, size| ca.store.put_crls(at(1), cluster.clone(), crls(number, size));
    put(5, 10).await.unwrap();
    let version = ca.version().await;
    for late in [5, 4] {
        put(late, 20).await.unwrap();
        assert_eq!(ca.store.crls(cluster.clone()).await.unwrap(), Some(crls(5, 10)));
        assert_eq!(ca.version().await, version);
    }
    // As large as 50 000 entries make it.
    put(6, 2_500_000).await.unwrap();
    assert_eq!(ca.store.crls(cluster.clone()).await.unwrap(), Some(crls(6, 2_500_000)));
    let record = ca.cluster().await;
    assert_eq!((record.version, record.bundle_version), (version + 1, version + 1));
    let ca = ca.restart(place, 2).await;
    assert_eq!(ca.store.crls(cluster).await.unwrap(), Some(crls(6, 2_500_000)));
    assert_eq!(ca.store.crls(Authority::Control).await.unwrap(), None);
}

pub(super) async fn a_control_crl_concerns_every_cluster(place: &dyn Place) {
    let ca = Ca::new(place).await;
    ca.create("c2").await;
    ca.store.put_crls(at(1), Authority::Control, crls(1, 10)).await.unwrap();
    for cluster in ca.store.clusters().await.unwrap() {
        assert_eq!((cluster.version, cluster.control_crl_version), (2, 2), "{}", cluster.cluster);
        assert_eq!((cluster.bundle_version, cluster.settings_version), (1, 1));
    }
}

pub(super) async fn a_version_moves_exactly_when_something_its_agents_must_know_changes(
    place: &dyn Place,
) {
    let ca = Ca::new(place).await;
    let token = ca.token().await;
    let a = ca.enroll(1, ask(&token, 1)).await.unwrap();
    let b = ca.enroll(1, ask(&token, 2)).await.unwrap();
    let enrolled = ca.version().await;
    assert_eq!(enrolled, 3, "each is told to the others");
    ca.leaf(2, &b.caller(), leaf_ask(100)).await.unwrap();
    let renewed = ca.renew(3, &b.caller(), key(101)).await.unwrap();
    ca.identify(HOUR_MS, &caller(&b.node, &renewed)).await.unwrap();
    ca.store.revoke_token(at(4), "uid:0".to_owned(), c1(), token).await.unwrap();
    ca.store.revocations(at(5), Authority::Cluster(c1())).await.unwrap();
    assert_eq!(ca.version().await, enrolled, "agents need not know of any of these");
    // A waiting agent that left, was revoked or forgotten must be told so, and its peers.
    ca.leave(6, &a.caller()).await.unwrap();
    let left = ca.version().await;
    assert!(left > enrolled);
    ca.revoke(7, "n-2").await;
    let revoked = ca.version().await;
    assert!(revoked > left);
    ca.revoke(8, "n-2").await;
    assert_eq!(ca.version().await, revoked, "it was revoked already");
    ca.forget(9, "n-1").await.unwrap();
    assert!(ca.version().await > revoked);
}

pub(super) async fn a_watcher_wakes_when_its_cluster_changes_and_not_for_another(
    place: &dyn Place,
) {
    let ca = Ca::new(place).await;
    ca.create("c2").await;
    let ca = ca.restart(place, 1).await;
    let mut watching = ca.store.watch(&c1());
    assert_eq!(version_of(&watching.borrow_and_update()), 1, "known from the start");
    ca.token().await;
    let c2 = Authority::Cluster("c2".parse().unwrap());
    ca.store.put_crls(at(2), c2, crls(1, 1)).await.unwrap();
    assert!(!watching.has_changed().unwrap());
    let (woken, set) = tokio::join!(timeout(Duration::from_secs(5), watching.changed()), async {
        let before = ca.cluster().await;
        let (old, new) = (before.settings().clone(), longer(&before));
        ca.store.set_cluster(at(3), "uid:0".to_owned(), c1(), old, new).await
    });
    woken.unwrap().unwrap();
    assert_eq!(version_of(&watching.borrow_and_update()), set.unwrap().version);
}

pub(super) async fn an_ended_cluster_gives_nothing(place: &dyn Place) {
    let ca = Ca::new(place).await;
    let token = ca.token().await;
    let node = ca.enroll(1, ask(&token, 1)).await.unwrap();
    let before = ca.cluster().await;
    let ends =
        v1::Settings { ends_unix: (START_MS + HOUR_MS) / 1_000, ..before.settings().clone() };
    let settings = before.settings().clone();
    ca.store.set_cluster(at(2), "uid:0".to_owned(), c1(), settings, ends).await.unwrap();
    let plan = ca.store.plan_leaf(at(HOUR_MS - 1), node.caller(), leaf_ask(100)).await.unwrap();
    assert_eq!(plan.ends_ms, Some(START_MS + HOUR_MS), "no leaf outlives it");
    let ended = Refusal::ClusterEnded("c1".to_owned());
    assert_eq!(refusal(ca.leaf(HOUR_MS, &node.caller(), leaf_ask(100)).await), ended);
    assert_eq!(refusal(ca.enroll(HOUR_MS, ask(&token, 2)).await), ended);
    assert_eq!(ca.token_record(&token).await.used, 1);
    let late = ca.token_record(&token).await;
    let late = TokenRecord { id: "00000000000000ff".to_owned(), ..late };
    assert_eq!(refusal(ca.store.create_token(at(HOUR_MS), late).await), ended);
}

fn longer(cluster: &ClusterRecord) -> v1::Settings {
    let settings = cluster.settings().clone();
    v1::Settings { leaf_life_seconds: settings.leaf_life_seconds + 60, ..settings }
}

fn crls(number: u64, size: usize) -> CrlSet {
    CrlSet {
        crls_der: vec![vec![3; size]],
        number,
        covers: 0,
        next_update_ms: START_MS + HOUR_MS,
        issuers: vec![b"issuer-1".to_vec()],
        ..CrlSet::default()
    }
}

fn version_of(watched: &Watched) -> u64 {
    watched.as_ref().map_or(0, |cluster| cluster.version)
}
