//! What goes wrong goes wrong alone: one call that fails holds back no other, and nothing is taken
//! for done that was not.

use raymtls_proto::durable::{self, Access};

use super::*;
use crate::state::Pauses;

fn problem(status: &Status, words: &str) -> bool {
    status.problems.iter().any(|problem| problem.contains(words))
}

fn start() -> SettableClock {
    SettableClock::new(datetime!(2026-11-24 08:00 UTC))
}

async fn ca_with(clock: &SettableClock) -> Arc<TestCa> {
    TestCa::start_at(Face::Ca, Arc::new(clock.clone()), "127.0.0.1:0".parse().unwrap()).await
}

async fn exec_folder(agent: &Running) {
    let answer = agent.handle.ask(Ask::ExecFolder).await;
    assert!(matches!(&answer, Answer::ExecFolder(folder) if folder.note.is_none()), "{answer:?}");
}

#[tokio::test]
async fn a_folder_without_its_key_holds_back_no_other() {
    let clock = start();
    let ca = ca_with(&clock).await;
    let place = Place::new(Arc::new(clock.clone()));
    place.enroll(&ca).await.unwrap();
    let agent = place.run();
    exec_folder(&agent).await;
    let before = agent.until("k2", |s| s.key_folders.len() == 2).await;
    std::fs::remove_file(place.path("tls/k1/tls.key")).unwrap();
    clock.advance(Duration::from_secs(1_200));
    agent
        .until("the next leaf of k2", |s| {
            current(s).name == "k2" && current(s).leaf.serial != current(&before).leaf.serial
        })
        .await;
    let status = agent.until("a word about k1", |s| problem(s, "renewal of k1")).await;
    assert_eq!(status.ca.last_error, None);
    ca.with(|k| k.version = 2);
    agent.until("a sync", |s| s.received.as_ref().is_some_and(|v| v.ends_with("/2"))).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_leaf_that_is_refused_stops_no_sync() {
    let clock = start();
    let ca = ca_with(&clock).await;
    let place = Place::new(Arc::new(clock.clone()));
    place.enroll(&ca).await.unwrap();
    let agent = place.run();
    ca.with(|k| k.refuse_leaf = Some(Reason::AddressNotAllowed));
    clock.advance(Duration::from_secs(1_200));
    agent.until("the refusal", |s| problem(s, "ADDRESS_NOT_ALLOWED")).await;
    ca.with(|k| k.version = 2);
    let status =
        agent.until("a sync", |s| s.received.as_ref().is_some_and(|v| v.ends_with("/2"))).await;
    assert_eq!(status.standing, "enrolled");
    let Answer::Error(error) = agent.handle.ask(Ask::Renew).await else { panic!("renewed") };
    assert_eq!(error.kind, ErrorKind::Refused);
    agent.stop().await;
}

#[tokio::test]
async fn an_answer_that_cannot_be_kept_is_asked_for_again() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    // A folder in the place of the file: nothing can be kept there.
    let kept = place.path("state/sync.pb");
    std::fs::remove_file(&kept).unwrap();
    std::fs::create_dir_all(kept.join("in the way")).unwrap();
    let agent = place.run();
    let status = agent.until("that it failed", |s| problem(s, "Sync: ")).await;
    assert_eq!((status.received, status.settings), (None, None));
    std::fs::remove_dir_all(&kept).unwrap();
    let status = agent.until("the answer", |s| s.received.is_some()).await;
    assert!(status.settings.is_some() && kept.is_file());
    agent.stop().await;
}

#[tokio::test]
async fn a_clock_that_jumps_removes_no_folder() {
    let clock = start();
    let ca = ca_with(&clock).await;
    let own = start();
    let place = Place::new(Arc::new(own.clone()));
    place.enroll(&ca).await.unwrap();
    let agent = place.run();
    exec_folder(&agent).await;
    agent.until("a sync", |s| s.received.is_some() && s.key_folders.len() == 2).await;
    own.advance(Duration::from_secs(5 * 3_600));
    agent.until("the jump", |s| s.files_work_until.is_none()).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(agent.handle.status().key_folders.len(), 2);
    own.set(clock.now());
    agent.until("the files", |s| s.files_work_until.is_some()).await;
    // The CA's clock comes to the same hour; by then the leaf has long ended for everybody.
    own.advance(Duration::from_secs(5 * 3_600));
    clock.advance(Duration::from_secs(5 * 3_600));
    agent.until("k1 is gone", |s| s.key_folders.iter().all(|f| f.name != "k1")).await;
    agent.stop().await;
}

/// The node was let in, so it is not yet that late.
#[tokio::test]
async fn a_time_after_the_end_of_the_identity_is_not_believed_and_said() {
    let clock = start();
    let ca = ca_with(&clock).await;
    let place = Place::new(Arc::new(start()));
    place.enroll(&ca).await.unwrap();
    let agent = place.run();
    let before = agent.until("in touch", |s| s.clock_skew_seconds.is_some()).await;
    for far in [datetime!(2027-11-24 08:00 UTC), datetime!(9999-12-31 23:59:59 UTC)] {
        let right = start().now();
        clock.set(far);
        let told = format!("says it is {}", far.year());
        let status = agent.until("not believed", |s| problem(s, &told)).await;
        assert_eq!(status.standing, "enrolled");
        assert_eq!(status.files_work_until, before.files_work_until);
        clock.set(right);
        agent.until("believed", |s| s.problems.is_empty()).await;
    }
    assert_eq!(agent.handle.status().key_folders, before.key_folders);
    agent.stop().await;
}

#[tokio::test]
async fn a_control_crl_that_no_connection_could_use_is_not_kept() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    // Version 1: readable, and refused by webpki.
    let v1_crl = hex::decode(
        "302e301d300a06082a8648ce3d0403023000170d3236303130313030303030305a\
         300a06082a8648ce3d040302030100",
    )
    .unwrap();
    ca.with(|k| (k.control_crls, k.version) = (vec![v1_crl], 2));
    let agent = place.run();
    let status = agent.until("a word about it", |s| problem(s, "control CRL")).await;
    assert!(status.received.is_some_and(|version| version.ends_with("/1")));
    let Answer::Renewed(renewed) = agent.handle.ask(Ask::Renew).await else { panic!("failed") };
    assert_eq!(renewed.key_folders.len(), 1);
    agent.stop().await;
}

#[tokio::test]
async fn an_identity_used_by_two_is_told() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    ca.with(|k| k.refuse = Some(Reason::Superseded));
    let agent = place.run();
    let status = agent.until("a word", |s| problem(s, "another agent uses this identity")).await;
    assert_eq!((status.standing.as_str(), status.ca.reachable), ("enrolled", Some(true)));
    ca.with(|k| k.refuse = None);
    agent.until("no word", |s| !problem(s, "another agent")).await;
    agent.stop().await;
}

#[tokio::test]
async fn key_too_old_for_a_new_key_is_a_failure_with_a_pause() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    std::fs::remove_dir_all(place.path("tls/k1")).unwrap();
    ca.with(|k| k.refuse_leaf = Some(Reason::KeyTooOld));
    let before = ca.leaf_calls.load(Ordering::SeqCst);
    let agent = place.run();
    agent.until("a word", |s| problem(s, "a new key folder: KEY_TOO_OLD")).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let calls = ca.leaf_calls.load(Ordering::SeqCst) - before;
    assert!((1..=4).contains(&calls), "{calls}");
    agent.stop().await;
}

#[tokio::test]
async fn a_node_that_must_enrol_again_asks_now_and_then_whether_it_must() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    ca.with(|k| k.refuse = Some(Reason::IdentityUnknown));
    let mut config = place.config();
    config.pauses = Pauses { reenrol: Duration::from_millis(200), ..Pauses::default() };
    let agent = Running::new(Agent::open(config, place.clock.clone()).unwrap());
    agent.until("re-enrol needed", |s| s.standing == "re-enrol needed").await;
    let Answer::Error(error) = agent.handle.ask(Ask::Renew).await else { panic!("renewed") };
    assert_eq!(error.kind, ErrorKind::Refused);
    // The CA has its store back.
    ca.with(|k| k.refuse = None);
    agent.until("enrolled", |s| s.standing == "enrolled").await;
    agent.stop().await;
}

#[tokio::test]
async fn news_after_news_does_not_make_the_agent_hurry() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    ca.with(|k| k.version = 2);
    let agent = place.run();
    agent.until("served", |s| s.ca.reachable == Some(true)).await;
    let before = ca.syncs.load(Ordering::SeqCst);
    for _ in 0..75 {
        ca.with(|k| k.version += 1);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let syncs = ca.syncs.load(Ordering::SeqCst) - before;
    assert!((1..=8).contains(&syncs), "{syncs}");
    agent.stop().await;
}

#[tokio::test]
async fn a_node_without_the_token_that_is_on_is_not_ready() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    assert!(place.open().handle().status().is_ready());
    std::fs::remove_file(place.path("tls/ray_token")).unwrap();
    let status = place.open().handle().status();
    assert!(status.files_work_until.is_some() && !status.is_ready());
    ca.with(|k| (k.ray_token, k.version) = (false, 2));
    let agent = place.run();
    agent.until("ready without a token", Status::is_ready).await;
    agent.stop().await;
}

#[tokio::test]
async fn leaving_again_after_a_lost_reply_is_done() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    let agent = place.run();
    agent.until("served", |s| s.ca.reachable == Some(true)).await;
    ca.with(|k| k.lose_replies = true);
    let Answer::Error(_) = agent.handle.ask(Ask::Leave).await else { panic!("no reply was lost") };
    ca.with(|k| (k.lose_replies, k.refuse) = (false, Some(Reason::NodeLeft)));
    for _ in 0..2 {
        let answer = agent.handle.ask(Ask::Leave).await;
        assert!(matches!(answer, Answer::Left { .. }), "{answer:?}");
        assert_eq!(agent.handle.status().standing, "left");
    }
    let Answer::Error(error) = agent.handle.ask(Ask::Renew).await else { panic!("renewed") };
    assert_eq!(error.kind, ErrorKind::Refused);
    assert_eq!(agent.handle.status().standing, "left");
    agent.stop().await;
}

#[tokio::test]
async fn a_file_that_cannot_be_replaced_fails_its_own_call_only() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    let agent = place.run();
    exec_folder(&agent).await;
    std::fs::remove_file(place.path("tls/k1/tls.key")).unwrap();
    durable::create(&place.path("tls/k1/tls.key"), b"no key", Access::PRIVATE).unwrap();
    let Answer::Renewed(renewed) = agent.handle.ask(Ask::Renew).await else { panic!("failed") };
    assert_eq!(renewed.key_folders.len(), 1);
    assert_eq!(renewed.key_folders[0].name, "k2");
    assert!(renewed.failed[0].starts_with("k1: "), "{:?}", renewed.failed);
    agent.stop().await;
}

#[tokio::test]
async fn a_check_tells_a_node_that_is_not_served_from_files_that_are_over() {
    use crate::status::check;
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    let agent = place.run();
    let good = agent.until("served", |s| s.ca.reachable == Some(true) && s.is_ready()).await;
    agent.stop().await;
    let end = good.files_work_until.unwrap().time();
    let second = Duration::from_secs(1);
    assert!(check(&good, end - second).is_ok());
    assert!(matches!(check(&good, end), Err(Failure::Failed(_))), "the leaf is over");
    type Change = fn(&mut Status);
    let table: [(&str, Change, u8); 6] = [
        ("no leaf", |s| s.files_work_until = None, 1),
        ("no token", |s| s.has_ray_token = Some(false), 1),
        ("refused", |s| s.standing = "refused".to_owned(), 2),
        ("must enrol", |s| s.standing = "re-enrol needed".to_owned(), 2),
        ("left", |s| s.standing = "left".to_owned(), 2),
        ("away", |s| s.ca.reachable = Some(false), 0),
    ];
    for (name, change, code) in table {
        let mut status = good.clone();
        change(&mut status);
        let found = match check(&status, end - second) {
            Ok(()) => std::process::ExitCode::SUCCESS,
            Err(failure) => failure.exit_code(),
        };
        assert_eq!(
            format!("{found:?}"),
            format!("{:?}", std::process::ExitCode::from(code)),
            "{name}"
        );
    }
}
