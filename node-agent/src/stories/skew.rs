//! A CA of a newer release: words, settings and acts this agent does not know. It goes on with what
//! it knows, keeps its files, and says so.

use super::{Place, TestCa, *};

/// No release has such a value yet.
const FUTURE: i32 = 77;

#[tokio::test]
async fn a_setting_of_a_newer_release_is_told_and_stops_nothing_else() {
    let clock = SettableClock::new(datetime!(2026-11-24 08:00 UTC));
    let ca =
        TestCa::start_at(Face::Ca, Arc::new(clock.clone()), "127.0.0.1:0".parse().unwrap()).await;
    let place = Place::new(Arc::new(clock.clone()));
    let enrolled = place.enroll(&ca).await.unwrap();
    ca.with(|k| {
        (k.raw_mode, k.raw_isolation) = (Some(FUTURE), Some(FUTURE));
        k.directives = vec![v1::Directive { act: None }];
        k.version = 2;
    });
    let agent = place.run();
    let status = agent
        .until("the setting", |s| s.settings.as_ref().is_some_and(|s| s.mode == "unknown"))
        .await;
    for what in ["mode", "isolation"] {
        let told = status.problems.iter().filter(|p| p.starts_with(what) && p.contains("upgrade"));
        assert_eq!(told.count(), 1, "{what}: {:?}", status.problems);
    }
    assert_eq!(status.standing, "enrolled");
    assert_eq!(status.applied, None, "what is not understood is not applied");

    // Ray is not started in a mode nobody here knows; what runs is renewed as ever.
    let Answer::Error(error) = agent.handle.ask(Ask::ExecFolder).await else { panic!("served") };
    assert!(error.message.contains("upgrade node-agent"), "{}", error.message);
    clock.advance(Duration::from_secs(1_200));
    agent.until("the next leaf", |s| current(s).leaf.serial != enrolled.leaf_serial).await;

    // Put back, it is served again, without a restart.
    ca.with(|k| {
        (k.raw_mode, k.raw_isolation) = (None, None);
        k.version = 3;
    });
    agent.until("no complaint", |s| s.problems.is_empty()).await;
    let Answer::ExecFolder(_) = agent.handle.ask(Ask::ExecFolder).await else { panic!("refused") };
    agent.stop().await;
}

#[tokio::test]
async fn a_refusal_of_a_newer_release_is_tried_again_and_costs_no_file() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    let before = std::fs::read(place.path("tls/k1/tls.crt")).unwrap();
    ca.with(|k| k.refuse_word = Some("SOMETHING_NEW"));
    let agent = place.run();
    let status = agent.until("the refusal", |s| !s.problems.is_empty()).await;
    let problems = status.problems.join("; ");
    assert!(problems.contains("a refusal of a newer release"), "{problems}");
    assert_eq!(status.standing, "enrolled", "an unknown word is no verdict on this node");
    assert_eq!(std::fs::read(place.path("tls/k1/tls.crt")).unwrap(), before);
    ca.with(|k| k.refuse_word = None);
    agent.until("an answer", |s| s.problems.is_empty() && s.received.is_some()).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_state_folder_of_a_newer_format_is_refused_in_words_and_left_alone() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    let path = place.path("state/node.toml");
    // With fields of its own, and none of ours.
    let newer = "format = 2\nmachine = \"n1\"\n";
    raymtls_proto::durable::replace(
        &path,
        newer.as_bytes(),
        raymtls_proto::durable::Access::PRIVATE,
    )
    .unwrap();
    let refused = Agent::open(place.config(), place.clock.clone()).unwrap_err().to_string();
    assert!(refused.contains("format 2"), "{refused}");
    assert!(refused.contains("reads format 1: upgrade node-agent"), "{refused}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), newer);
}

#[tokio::test]
async fn an_act_of_a_newer_release_is_said_once_and_skipped() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
    let _subscriber = tracing::subscriber::set_default(subscriber);
    // Nobody obeys it, so it comes with every answer.
    ca.with(|k| k.directives = vec![v1::Directive { act: None }]);
    let agent = place.run();
    for version in 2..5 {
        ca.with(|k| k.version = version);
        let wanted = format!("7/{version}");
        let is_there = |s: &Status| s.received.as_ref().is_some_and(|r| r.ends_with(&wanted));
        agent.until("the version", is_there).await;
    }
    assert_eq!(
        log.text().matches("an act this release does not know").count(),
        1,
        "{}",
        log.text()
    );
    agent.stop().await;
}

/// What was logged.
#[derive(Clone, Default)]
struct Log(Arc<std::sync::Mutex<Vec<u8>>>);

impl Log {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
