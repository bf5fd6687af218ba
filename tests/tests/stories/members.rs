//! The agents of a cluster hear who is a member and whom to cut off: at once where it presses, a
//! moment later where it does not.

use std::time::{Duration, Instant};

use ca_server::upkeep;
use node_agent::keys::PrivateKey;
use raymtls_proto::v1;
use raymtls_tests::{Deployment, Member, ask};
use tokio::task::JoinHandle;

const DAY: Duration = Duration::from_secs(86_400);
/// What is told at once is heard within this, on a busy machine too.
const AT_ONCE: Duration = Duration::from_secs(10);

async fn deployment() -> Deployment {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    // The tests call from loopback, which is no node's address.
    deployment.set("c1", "trust-ranges=on").await;
    deployment
}

/// So much time passes while the CA serves: a longer step would be a host that slept, or a clock that
/// jumped.
async fn pass(deployment: &Deployment, span: Duration) {
    const STEP: Duration = Duration::from_secs(240);
    let mut left = span;
    while !left.is_zero() {
        let step = left.min(STEP);
        deployment.clock.advance(step);
        upkeep::pass(&deployment.ca).await;
        left -= step;
    }
}

fn waiting(
    member: &Member,
    have: Option<v1::SyncVersion>,
) -> JoinHandle<(v1::SyncResponse, Instant)> {
    let client = member.client.clone();
    let ask = v1::SyncRequest { have, wait_seconds: 30, ..Default::default() };
    tokio::spawn(async move { (client.sync(ask).await.unwrap(), Instant::now()) })
}

fn told(answer: &v1::SyncResponse) -> Vec<(&str, v1::MemberState)> {
    let members = answer.members.iter().flat_map(|members| &members.members);
    members.map(|member| (member.name.as_str(), member.state())).collect()
}

#[tokio::test]
async fn a_node_gets_all_members_first_and_then_who_changed() {
    let deployment = deployment().await;
    let w1 = deployment.worker("c1", "w1", "10.0.0.1").await;
    let w2 = deployment.worker("c1", "w2", "10.0.0.2").await;
    let all = w1.client.sync(v1::SyncRequest::default()).await.unwrap();
    let members = all.members.as_ref().unwrap();
    assert!(members.snapshot && !members.more);
    assert_eq!(told(&all), [("w1", v1::MemberState::Member), ("w2", v1::MemberState::Member)]);
    assert_eq!(members.members[0].addresses, ["10.0.0.1"]);
    assert_eq!(all.blocks.as_ref(), None, "nobody was revoked yet");

    let news = waiting(&w1, all.version);
    tokio::time::sleep(Duration::from_millis(200)).await;
    w2.client.leave().await.unwrap();
    let (answer, _) = news.await.unwrap();
    assert_eq!(told(&answer), [("w2", v1::MemberState::Gone)]);
    assert!(!answer.members.as_ref().unwrap().snapshot);
    assert!(answer.settings.is_none() && answer.bundle.is_none());
    deployment.finish().await;
}

#[tokio::test]
async fn nodes_that_join_one_after_the_other_are_told_together() {
    let deployment = deployment().await;
    let w1 = deployment.worker("c1", "w1", "10.0.0.1").await;
    let all = w1.client.sync(v1::SyncRequest::default()).await.unwrap();
    let news = waiting(&w1, all.version);
    tokio::time::sleep(Duration::from_millis(200)).await;
    for number in 2..=4 {
        deployment.worker("c1", &format!("w{number}"), &format!("10.0.0.{number}")).await;
    }
    let (answer, _) = news.await.unwrap();
    assert_eq!(told(&answer).len(), 3, "{:?}", told(&answer));
    deployment.finish().await;
}

#[tokio::test]
async fn whom_to_cut_off_is_told_at_once_with_who_joined_a_moment_before() {
    let deployment = deployment().await;
    let w1 = deployment.worker("c1", "w1", "10.0.0.1").await;
    let _w2 = deployment.worker("c1", "w2", "10.0.0.2").await;
    let all = w1.client.sync(v1::SyncRequest::default()).await.unwrap();
    let news = waiting(&w1, all.version);
    tokio::time::sleep(Duration::from_millis(200)).await;
    deployment.worker("c1", "w3", "10.0.0.3").await;
    let began = Instant::now();
    deployment.revoke("c1", "w2").await;
    let (answer, heard) = news.await.unwrap();
    assert!(heard - began < AT_ONCE);
    let blocks = answer.blocks.as_ref().unwrap();
    let blocked: Vec<_> = blocks.blocks.iter().map(|b| (&*b.address, &*b.node)).collect();
    assert_eq!(blocked, [("10.0.0.2", "w2")]);
    let states = told(&answer);
    assert!(states.contains(&("w3", v1::MemberState::Member)), "{states:?}");
    assert!(states.contains(&("w2", v1::MemberState::Revoked)), "{states:?}");
    deployment.finish().await;
}

#[tokio::test]
async fn a_node_that_joins_hears_when_the_heads_have_applied_what_holds_it() {
    let deployment = deployment().await;
    let token = deployment.token("c1", v1::Role::Head, 1).await;
    let key = PrivateKey::generate().unwrap();
    let request = v1::EnrollRequest {
        role: v1::Role::Head.into(),
        ..ask(&token, "c1", "h1", &["10.0.0.9"], &key)
    };
    let head = deployment.enroll(request, key).await.unwrap();
    let began = v1::SyncRequest { report: Some(v1::Report::default()), ..Default::default() };
    let first = head.client.sync(began).await.unwrap();
    let w1 = deployment.worker("c1", "w1", "10.0.0.1").await;
    let asks = v1::SyncRequest { heads_applied: first.version, ..Default::default() };
    let seen = w1.client.sync(asks).await.unwrap();
    let counter = seen.heads_applied.map(|version| version.counter);
    assert_eq!(counter, Some(0), "the head has not said anything");

    let wanted = v1::SyncRequest {
        have: seen.version,
        heads_applied: seen.version,
        wait_seconds: 30,
        ..Default::default()
    };
    let client = w1.client.clone();
    let joining = tokio::spawn(async move { client.sync(wanted).await.unwrap() });
    let report = |version| v1::SyncRequest {
        report: Some(v1::Report { applied: version, ..Default::default() }),
        have: version,
        ..Default::default()
    };
    head.client.sync(report(first.version)).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!joining.is_finished(), "the head applied a version without the node");
    head.client.sync(report(seen.version)).await.unwrap();
    let answer = joining.await.unwrap();
    assert_eq!(answer.heads_applied, seen.version);
    deployment.finish().await;
}

/// An agent that died while its Ray works on: its node is a member for the lease and no longer, and
/// is back with its first contact.
#[tokio::test]
async fn a_node_whose_agent_died_is_a_member_until_its_lease_ends() {
    let deployment = deployment().await;
    deployment.set("c1", "lease=24h").await;
    let w1 = deployment.worker("c1", "w1", "10.0.0.1").await;
    let w2 = deployment.worker("c1", "w2", "10.0.0.2").await;
    let mut have = None;
    for hours in 1..=25 {
        pass(&deployment, Duration::from_secs(3_600)).await;
        let ask = v1::SyncRequest { have, ..Default::default() };
        let answer = w1.client.sync(ask).await.unwrap();
        have = answer.version;
        let lapsed = told(&answer).contains(&("w2", v1::MemberState::Lapsed));
        assert_eq!(lapsed, hours == 25, "{hours}");
    }
    w2.client.sync(v1::SyncRequest::default()).await.unwrap();
    let ask = v1::SyncRequest { have, ..Default::default() };
    let back = w1.client.sync(ask).await.unwrap();
    assert_eq!(told(&back), [("w2", v1::MemberState::Member)]);
    deployment.finish().await;
}

/// The CA was down for three days: nobody lapses within one lease of its return.
#[tokio::test]
async fn the_lease_stands_still_while_the_ca_is_away() {
    let mut deployment = deployment().await;
    let w1 = deployment.worker("c1", "w1", "10.0.0.1").await;
    deployment.worker("c1", "w2", "10.0.0.2").await;
    let identity = w1.identity;
    deployment.stop().await;
    deployment.clock.advance(3 * DAY);
    let deployment = deployment.restart().await;
    let client = deployment.node_client(&identity);
    upkeep::pass(&deployment.ca).await;
    let all = client.sync(v1::SyncRequest::default()).await.unwrap();
    assert_eq!(told(&all).len(), 2, "{:?}", told(&all));
    pass(&deployment, DAY + Duration::from_secs(600)).await;
    let ask = v1::SyncRequest { have: all.version, ..Default::default() };
    let answer = client.sync(ask).await.unwrap();
    assert!(told(&answer).contains(&("w2", v1::MemberState::Lapsed)), "{:?}", told(&answer));
    deployment.finish().await;
}
