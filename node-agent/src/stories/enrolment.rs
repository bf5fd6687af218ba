//! Enrolment again, enrolment cut short, and enrolment by somebody who meant another machine: a token
//! is spent once, and a join file goes only when its token is.

use raymtls_proto::{
    durable::{self, Access},
    join::{Credential, JoinFile},
    token::{BootstrapToken, TokenId},
};
use secrecy::ExposeSecret;

use super::*;

/// A join file with another token, and changed as a test likes.
fn write_other_join(ca: &TestCa, path: &Path, change: impl FnOnce(&mut JoinFile)) {
    ca.write_join(path);
    let mut join = JoinFile::read(path).unwrap();
    join.credential = Credential::Token(BootstrapToken::new(TokenId::new([9; 8]), [9; 32]));
    change(&mut join);
    durable::replace(path, join.to_text().expose_secret().as_bytes(), Access::PRIVATE).unwrap();
}

async fn again(place: &Place) -> Result<Enrolled, Failure> {
    enroll::enroll(&place.options(), place.clock.clone()).await
}

fn cut_off_from_the_ca(place: &Place) {
    let mut node = place.state().node().unwrap().unwrap();
    node.node_endpoints = vec!["127.0.0.1:1".to_owned()];
    place.state().put_node(&node).unwrap();
}

#[tokio::test]
async fn the_join_file_goes_only_when_its_token_is_spent() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();

    write_other_join(&ca, &place.path("join"), |_| {});
    let enrolled = again(&place).await.unwrap();
    assert!(enrolled.already && enrolled.join_file.contains("was not used"), "{enrolled:?}");
    assert!(place.path("join").exists());

    let agent = place.run();
    agent.until("served", |s| s.ca.reachable == Some(true)).await;
    let enrolled = again(&place).await.unwrap();
    assert!(enrolled.already && place.path("join").exists(), "beside a daemon: {enrolled:?}");
    agent.stop().await;

    // The very file of the enrolment, as a run leaves it that was cut short at its end.
    ca.write_join(&place.path("join"));
    cut_off_from_the_ca(&place);
    assert!(again(&place).await.unwrap().already);
    assert!(place.path("join").exists(), "nobody said that the identity is served");
    let mut node = place.state().node().unwrap().unwrap();
    node.node_endpoints = vec![ca.addr.to_string()];
    place.state().put_node(&node).unwrap();
    assert_eq!(again(&place).await.unwrap().join_file, "removed");
    assert!(!place.path("join").exists());
    assert_eq!(again(&place).await.unwrap().join_file, "none was there");
    assert_eq!(ca.enrolments.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn what_differs_from_the_enrolment_is_refused_by_name() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    let before = place.state().node().unwrap();

    let refused = async |options: Options, what: &str| {
        let Err(Failure::Usage(text)) = enroll::enroll(&options, place.clock.clone()).await else {
            panic!("{what}: not refused")
        };
        for words in [what, "enrolled as n1", "node-agent leave", "another --state-dir"] {
            assert!(text.contains(words), "{words}: {text}");
        }
        assert!(place.path("join").exists(), "{what}");
        assert_eq!(place.state().node().unwrap(), before, "{what}");
    };
    type Change = fn(&mut Options);
    let table: [(&str, Change); 6] = [
        ("name n2", |o| o.name = "n2".parse().unwrap()),
        ("role worker", |o| o.role = Role::Worker),
        ("address 10.0.0.2 is asked for", |o| o.addresses.push("10.0.0.2".parse().unwrap())),
        ("DNS name b.ray is asked for", |o| o.dns_names.push("b.ray".parse().unwrap())),
        ("DNS name head.ray is bound", |o| o.dns_names = vec!["b.ray".parse().unwrap()]),
        ("role driver", |o| o.role = Role::Driver),
    ];
    write_other_join(&ca, &place.path("join"), |_| {});
    for (what, change) in table {
        let mut options = place.options();
        change(&mut options);
        refused(options, what).await;
    }
    // The host's name is no wish.
    let unnamed = Options { name: "n2".parse().unwrap(), name_given: false, ..place.options() };
    let kept = enroll::enroll(&unnamed, place.clock.clone()).await.unwrap();
    assert!(kept.already && kept.node == "n1", "{kept:?}");
    write_other_join(&ca, &place.path("join"), |join| join.cluster = "c2".parse().unwrap());
    refused(place.options(), "for cluster c2").await;
    write_other_join(&ca, &place.path("join"), |j| {
        j.trust_domain = "other.example".parse().unwrap();
    });
    refused(place.options(), "of deployment other.example").await;
    assert_eq!(ca.enrolments.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn the_ca_away_makes_no_other_enrolment_of_this_one() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    cut_off_from_the_ca(&place);
    write_other_join(&ca, &place.path("join"), |_| {});
    let mut options = place.options();
    options.name = "n2".parse().unwrap();
    let failure = enroll::enroll(&options, place.clock.clone()).await.unwrap_err();
    assert!(matches!(failure, Failure::Usage(_)), "{failure}");
    assert!(place.path("join").exists());
}

#[tokio::test]
async fn only_a_lock_that_is_held_is_taken_for_a_running_daemon() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    let lock = place.path("state/lock");
    std::fs::remove_file(&lock).unwrap();
    std::fs::create_dir(&lock).unwrap();
    let failure = again(&place).await.unwrap_err();
    assert!(matches!(failure, Failure::Failed(_)), "{failure}");
}

fn once(place: &Place) -> Options {
    Options { role: Role::Driver, once: true, dns_names: Vec::new(), ..place.options() }
}

#[tokio::test]
async fn a_driver_for_once_that_was_cut_short_goes_on_with_the_same_key() {
    let ca = TestCa::start(Face::Ca).await;
    type Turn = fn(&mut crate::testca::Knobs);
    let table: [(&str, Turn, Turn); 2] = [
        ("a lost reply", |k| k.lose_replies = true, |k| k.lose_replies = false),
        (
            "a second call that fails",
            |k| k.refuse_leaf = Some(Reason::StoreUnavailable),
            |k| k.refuse_leaf = None,
        ),
    ];
    for (name, turn, back) in table {
        let place = Place::new(system_clock());
        ca.write_join(&place.path("join"));
        ca.with(turn);
        let failure = enroll::enroll(&once(&place), place.clock.clone()).await.unwrap_err();
        assert!(matches!(failure, Failure::Failed(_)), "{name}: {failure}");
        let key_path = place.path("tls/.enroll-once.key");
        assert_eq!(mode_of(&key_path), 0o600, "{name}");
        let key = std::fs::read(&key_path).unwrap();
        assert!(place.path("join").exists(), "{name}");

        // Still the same key, however often it fails.
        enroll::enroll(&once(&place), place.clock.clone()).await.unwrap_err();
        assert_eq!(std::fs::read(&key_path).unwrap(), key, "{name}");
        ca.with(back);
        enroll::enroll(&once(&place), place.clock.clone()).await.unwrap();
        assert!(!key_path.exists() && !place.path("join").exists(), "{name}");
    }
}

#[tokio::test]
async fn a_driver_for_once_tries_each_of_its_calls_again() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    ca.write_join(&place.path("join"));
    ca.with(|k| k.refuse_next = Some(Reason::StoreUnavailable));
    let mut options = once(&place);
    options.timeout = SOON;
    enroll::enroll(&options, place.clock.clone()).await.unwrap();
    assert_eq!(ca.enrolments.load(Ordering::SeqCst), 1);
}
