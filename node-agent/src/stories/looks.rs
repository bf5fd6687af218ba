//! A raylet that serves what it read at its start, while its files are renewed: the daemon knows, and
//! says it to whoever asks. TLS is real; which process holds the socket is what a made-up /proc says.

use raymtls_proto::bundle;

use super::{Place, TestCa, *};
use crate::{
    config::LooksConfig,
    moment::Moment,
    served::{
        ProcessServed, Served, Serves, SocketServed,
        horizon::{State, Trust},
        kind::{Class, Kind},
        tests::{Host, story::Server},
    },
    status,
};

type Leaf = (v1::CertificateChain, PrivateKey);

/// What a process of Ray reads at its start.
fn read_at_start(place: &Place, folder: &str) -> (Leaf, Trust) {
    let at = |name: &str| place.path(&format!("tls/{folder}/{name}"));
    let certificates = |name: &str| {
        let pem = std::fs::read(at(name)).unwrap();
        bundle::certificates_from_pem(&pem).unwrap().into_iter()
    };
    let mut chain = certificates("tls.crt").map(|der| der.to_vec());
    let chain =
        v1::CertificateChain { leaf_der: chain.next().unwrap(), issuers_der: chain.collect() };
    let roots = certificates("ca.crt").map(|der| der.to_vec().into()).collect();
    let key = PrivateKey::load(&at("tls.key")).unwrap();
    ((chain, key), Trust { roots, uris: Vec::new(), revoked: std::collections::BTreeSet::new() })
}

#[tokio::test]
async fn files_that_are_renewed_hide_no_process_that_is_not() {
    let start = datetime!(2026-11-24 08:00 UTC);
    let clock = SettableClock::new(start);
    let ca =
        TestCa::start_at(Face::Ca, Arc::new(clock.clone()), "127.0.0.1:0".parse().unwrap()).await;
    let place = Place::new(Arc::new(clock.clone()));
    place.enroll(&ca).await.unwrap();
    let (leaf, trust) = read_at_start(&place, "k1");
    let raylet = Server::start(&leaf, &trust).await;
    let mut host = Host::new();
    host.listen([(raylet.addr, 1)]);
    host.process(10, &["/r/raylet"], &[1]);
    let config = Config {
        looks: Some(LooksConfig {
            proc: host.path().to_owned(),
            pause: Duration::ZERO,
            after_start: Duration::ZERO,
        }),
        ..place.config()
    };
    let agent = Running::new(Agent::open(config, place.clock.clone()).unwrap());

    // At the start, files and process agree.
    let state = |status: &Status| status.served.as_ref().and_then(|served| served.state);
    let status = agent
        .until("a look", |s| state(s) == Some(State::Fresh) && s.ca.reachable == Some(true))
        .await;
    let horizon = status.served.as_ref().unwrap().horizon.unwrap();
    assert_eq!(horizon, status.files_work_until.unwrap());
    let first = status.first_failure.clone().unwrap();
    assert_eq!(first.at, horizon);
    assert!(first.what.contains("raylet (pid 10)"), "{}", first.what);

    // The files are renewed; the process serves what it served.
    clock.advance(Duration::from_secs(1_900));
    let renewed = |s: &Status| s.files_work_until.is_some_and(|until| until > horizon);
    let due = |s: &Status| state(s) == Some(State::RecycleDue);
    let status = agent.until("a renewal and a recycle that is due", |s| renewed(s) && due(s)).await;
    assert_eq!(status.served.as_ref().unwrap().horizon, Some(horizon));
    let now = clock.now();
    status::check(&status, now).unwrap();
    clock.advance(Duration::from_secs(600));
    let status =
        agent.until("a recycle overdue", |s| state(s) == Some(State::RecycleOverdue)).await;
    let late = status::check(&status, clock.now()).unwrap_err().to_string();
    assert!(late.contains("recycle-overdue") && late.contains("raylet (pid 10)"), "{late}");
    let text = status::table(&status, clock.now(), true);
    for part in ["RECYCLE OVERDUE", "running horizon", "fails first", "raylet             10"] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    let told = || {
        let requests = ca.requests.lock().unwrap();
        let report = requests.last().and_then(|(_, request)| request.report.clone());
        report.and_then(|report| report.running)
    };
    let overdue = || {
        told().is_some_and(|r| r.recycle_state() == v1::RecycleState::Overdue && r.processes == 1)
    };
    for _ in 0..500 {
        if overdue() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(overdue(), "the CA hears of it: {:?}", told());

    // Started again, it serves the new leaf.
    let (leaf, trust) = read_at_start(&place, "k1");
    raylet.restart(&leaf, &trust);
    let status = agent.until("a fresh process", |s| state(s) == Some(State::Fresh)).await;
    assert!(status.served.unwrap().horizon.unwrap() > horizon);
    agent.stop().await;
}

#[tokio::test]
async fn a_look_follows_a_start_and_the_clock_and_none_follows_in_tunnel_mode() {
    let clock = SettableClock::new(datetime!(2026-11-24 08:00 UTC));
    let ca =
        TestCa::start_at(Face::Ca, Arc::new(clock.clone()), "127.0.0.1:0".parse().unwrap()).await;
    let place = Place::new(Arc::new(clock.clone()));
    place.enroll(&ca).await.unwrap();
    let host = Host::new();
    let config = Config {
        looks: Some(LooksConfig {
            proc: host.path().to_owned(),
            pause: Duration::from_secs(60),
            after_start: Duration::from_secs(10),
        }),
        ..place.config()
    };
    let agent = Running::new(Agent::open(config, place.clock.clone()).unwrap());
    let looked = |status: &Status| status.served.as_ref().map(|served| served.as_of);
    let first = looked(&agent.until("the first look", |s| looked(s).is_some()).await);
    let none_within = |seconds| {
        clock.advance(Duration::from_secs(seconds));
        let soon = Duration::from_millis(200);
        async move { tokio::time::sleep(soon).await }
    };
    let Answer::ExecFolder(_) = agent.handle.ask(Ask::ExecFolder).await else { panic!("refused") };
    none_within(9).await;
    assert_eq!(looked(&agent.handle.status()), first, "Ray does not listen yet");
    clock.advance(Duration::from_secs(2));
    let second = looked(&agent.until("a look after the start", |s| looked(s) > first).await);
    none_within(55).await;
    assert_eq!(looked(&agent.handle.status()), second, "no minute has passed");
    clock.advance(Duration::from_secs(6));
    agent.until("a look after a minute", |s| looked(s) > second).await;

    ca.with(|k| (k.mode, k.version) = (v1::Mode::Tunnel, 2));
    let mode = |s: &Status| s.settings.as_ref().is_some_and(|s| s.mode == "tunnel");
    agent.until("tunnel mode", mode).await;
    clock.advance(Duration::from_secs(61));
    agent.until("nothing to look at", |s| looked(s).is_none()).await;
    agent.stop().await;
}

#[test]
fn a_dead_daemon_s_file_is_judged_by_the_reader_s_clock() {
    let now = datetime!(2026-11-24 08:00 UTC);
    let hours = |hours| Moment::from(now + time::Duration::hours(hours));
    let raylet = ProcessServed {
        pid: Some(10),
        uid: 0,
        kind: Kind::Raylet,
        class: Class::Node,
        name: "raylet".to_owned(),
        session: None,
        job: None,
        state: Some(State::Fresh),
        horizon: Some(hours(6)),
        sockets: vec![SocketServed {
            address: "10.0.0.1:6701".to_owned(),
            port: None,
            serves: Serves::Leaf {
                serial: "01".to_owned(),
                issued: now.into(),
                not_after: hours(6),
                trusts: Vec::new(),
                refused_us: None,
                revoked: false,
            },
        }],
    };
    let served = Served {
        state: Some(State::Fresh),
        horizon: Some(hours(6)),
        processes: vec![raylet],
        ..Served::none(now)
    };
    let written = Status {
        served: Some(served),
        files_work_until: Some(hours(9)),
        ..crate::agent::empty_status(now)
    };
    let text = serde_json::to_string(&written).unwrap();
    let read = serde_json::from_str::<Status>(&text).unwrap().of_the_dead();
    assert_eq!(read.first_failure.as_ref().unwrap().at, hours(6));
    let text = status::table(&read, hours(5).time(), false);
    for part in [
        "what follows was true 5h ago",
        "recycle-overdue; looked at 5h ago",
        "RECYCLE OVERDUE    start Ray on this node again: raylet (pid 10)",
        "fails first        2026-11-24T14:00:00Z (in 1h): new connections to raylet (pid 10)",
    ] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    // Where nothing was seen, the files' date makes nothing well.
    let unseen = Status { served: None, ..read };
    let text = status::table(&unseen, now, true);
    assert!(text.contains("running horizon    not known"), "{text}");
}
