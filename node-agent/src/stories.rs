//! The agent against a CA that does what the test says: files are real, TLS is real, time is set.

mod callers;
mod doctor;
mod enrolment;
mod failures;
mod hostile;
mod isolation;
mod looks;
mod skew;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use raymtls_proto::{
    clock::{Clock, SettableClock},
    identity::Role,
    reason::Reason,
    v1,
};
use time::macros::datetime;
use tokio::{sync::oneshot, task::JoinHandle};

use crate::{
    agent::{Agent, Handle},
    api::{Answer, Ask, ErrorKind},
    client::CallLimits,
    config::Config,
    enroll::{self, Enrolled, Options},
    failure::Failure,
    keyfolder::TlsDir,
    keys::PrivateKey,
    rayenv::RayEnv,
    statedir::{StateDir, WaitingKey},
    status::Status,
    testca::{Face, TestCa, system_clock},
};

/// How long a test waits for what must come.
const SOON: Duration = Duration::from_secs(10);

struct Place {
    folder: tempfile::TempDir,
    /// Where in the folder everything lies.
    inner: PathBuf,
    clock: Arc<dyn Clock>,
}

impl Place {
    fn new(clock: Arc<dyn Clock>) -> Self {
        Self { folder: tempfile::tempdir().unwrap(), inner: PathBuf::new(), clock }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(&self.inner).join(name)
    }

    fn options(&self) -> Options {
        Options {
            join: self.path("join"),
            state_dir: self.path("state"),
            tls_dir: self.path("tls"),
            name: "n1".parse().unwrap(),
            name_given: true,
            role: Role::Head,
            addresses: vec!["10.0.0.1".parse().unwrap()],
            dns_names: vec!["head.ray".parse().unwrap()],
            shared_address: false,
            ray_gid: None,
            keep_join_file: false,
            once: false,
            timeout: Duration::from_secs(2),
            limits: limits(),
        }
    }

    async fn enroll(&self, ca: &TestCa) -> Result<Enrolled, Failure> {
        ca.write_join(&self.path("join"));
        enroll::enroll(&self.options(), self.clock.clone()).await
    }

    fn config(&self) -> Config {
        let mut config = Config::in_process(self.path("state"), self.path("tls"));
        config.limits = limits();
        config
    }

    fn open(&self) -> Agent {
        Agent::open(self.config(), self.clock.clone()).unwrap()
    }

    fn run(&self) -> Running {
        Running::new(self.open())
    }

    fn state(&self) -> StateDir {
        StateDir::open(&self.path("state")).unwrap()
    }

    fn tls(&self) -> TlsDir {
        TlsDir::prepare(&self.path("tls"), None).unwrap()
    }

    fn env(&self) -> RayEnv {
        self.tls().env().unwrap()
    }
}

fn limits() -> CallLimits {
    CallLimits {
        connect: Duration::from_secs(2),
        call: Duration::from_secs(5),
        sync_wait: Duration::from_secs(1),
    }
}

struct Running {
    handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), Failure>>,
}

impl Running {
    fn new(agent: Agent) -> Self {
        let handle = agent.handle();
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(agent.run(async {
            let _ = stopped.await;
        }));
        Self { handle, stop: Some(stop), task }
    }

    async fn until(&self, what: &str, is_so: impl Fn(&Status) -> bool) -> Status {
        let mut watch = self.handle.watch();
        let found = tokio::time::timeout(SOON, watch.wait_for(|status| is_so(status))).await;
        match found {
            Ok(status) => status.unwrap().clone(),
            Err(_) => panic!("never came: {what}; now {:#?}", self.handle.status()),
        }
    }

    async fn stop(mut self) {
        drop(self.stop.take());
        self.task.await.unwrap().unwrap();
    }
}

fn current(status: &Status) -> &crate::status::FolderStatus {
    status.key_folders.iter().find(|folder| folder.current).unwrap()
}

fn mode_of(path: &Path) -> u32 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).unwrap().mode() & 0o7777
}

#[tokio::test]
async fn enrolment_makes_everything_ray_needs_and_can_be_run_again() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    let enrolled = place.enroll(&ca).await.unwrap();
    assert!(!enrolled.already && !place.path("join").exists());
    for (path, mode) in [
        ("state", 0o700),
        ("state/identity.pem", 0o600),
        ("tls", 0o755),
        ("tls/k1", 0o700),
        ("tls/k1/tls.key", 0o600),
        ("tls/k1/tls.crt", 0o644),
        ("tls/current/ca.crt", 0o644),
        ("tls/tls.crt", 0o644),
        ("tls/ray_token", 0o600),
    ] {
        assert_eq!(mode_of(&place.path(path)), mode, "{path}");
    }
    assert_eq!(place.env().files.unwrap().server_key, place.path("tls/k1/tls.key"));
    assert_eq!(place.env().token, Some(place.path("tls/ray_token")));
    assert_eq!(std::fs::read(place.path("tls/ray_token")).unwrap(), b"t0ken");
    assert!(!place.state().has_waiting_key(WaitingKey::Enrolment));

    let again = enroll::enroll(&place.options(), place.clock.clone()).await.unwrap();
    assert!(again.already);
    assert_eq!(again.leaf_serial, enrolled.leaf_serial);
    assert_eq!(ca.enrolments.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_lost_reply_costs_nothing_the_next_try_has_the_same_key() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    ca.with(|k| k.lose_replies = true);
    assert!(matches!(place.enroll(&ca).await, Err(Failure::Failed(_))));
    let waiting = place.state().waiting_key(WaitingKey::Enrolment).unwrap();
    ca.with(|k| k.lose_replies = false);
    place.enroll(&ca).await.unwrap();
    let identity = place.state().identity().unwrap().unwrap();
    assert_eq!(identity.key.spki_der(), waiting.spki_der());
}

#[tokio::test]
async fn a_refusal_names_the_reason_and_is_not_tried_again() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    ca.with(|k| k.refuse = Some(Reason::TokenSpent));
    let Err(Failure::Refused(text)) = place.enroll(&ca).await else { panic!("not refused") };
    assert!(text.starts_with("refused by the CA: TOKEN_SPENT: "), "{text}");
    assert_eq!(ca.enrolments.load(Ordering::SeqCst), 1);
    assert!(place.path("join").exists());
}

#[tokio::test]
async fn a_name_still_held_is_tried_again_until_the_time_is_up() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    ca.with(|k| k.refuse = Some(Reason::NodeNameTaken));
    let Err(Failure::Failed(text)) = place.enroll(&ca).await else { panic!("not failed") };
    assert!(text.contains("NODE_NAME_TAKEN"), "{text}");
    assert!(ca.enrolments.load(Ordering::SeqCst) > 1);
}

#[tokio::test]
async fn a_false_ca_gets_no_byte_of_the_token() {
    for face in [Face::AgentIdentity, Face::OtherRoot] {
        let ca = TestCa::start(face).await;
        let place = Place::new(system_clock());
        let Err(Failure::Failed(text)) = place.enroll(&ca).await else { panic!("not failed") };
        assert!(text.contains("not the CA of this deployment"), "{text}");
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(ca.bytes.load(Ordering::SeqCst), 0, "{face:?}");
    }
}

#[tokio::test]
async fn a_driver_for_once_keeps_no_identity() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    ca.write_join(&place.path("join"));
    let mut options = place.options();
    (options.role, options.once) = (Role::Driver, true);
    let enrolled = enroll::enroll(&options, place.clock.clone()).await.unwrap();
    assert_eq!(enrolled.identity_serial, None);
    assert!(!place.path("state").exists() && !place.path("join").exists());
    assert_eq!(place.env().files.unwrap().server_cert, place.path("tls/k1/tls.crt"));
    assert!(place.path("tls/ray_token").exists());
}

#[tokio::test]
async fn a_leaf_is_renewed_at_a_third_in_its_folder_and_the_identity_daily() {
    let clock = SettableClock::new(datetime!(2026-11-24 08:00 UTC));
    let ca =
        TestCa::start_at(Face::Ca, Arc::new(clock.clone()), "127.0.0.1:0".parse().unwrap()).await;
    let place = Place::new(Arc::new(clock.clone()));
    let enrolled = place.enroll(&ca).await.unwrap();
    let key = place.tls().key(1).unwrap().spki_der();
    let agent = place.run();
    agent.until("a first sync", |s| s.received.is_some()).await;
    clock.advance(Duration::from_secs(1_199));
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(current(&agent.handle.status()).leaf.serial, enrolled.leaf_serial);
    clock.advance(Duration::from_secs(1));
    let status =
        agent.until("the next leaf", |s| current(s).leaf.serial != enrolled.leaf_serial).await;
    assert_eq!(current(&status).name, "k1");
    assert_eq!(place.tls().key(1).unwrap().spki_der(), key);

    let identity = status.identity.serial;
    ca.with(|k| k.leaf_life = Duration::from_secs(40 * 24 * 3_600));
    clock.advance(Duration::from_secs(24 * 3_600));
    let status = agent.until("the next identity", |s| s.identity.serial != identity).await;
    assert_eq!(status.standing, "enrolled");
    // The leaf expired meanwhile: what starts now needs another.
    let status = agent.until("a valid folder", |s| s.files_work_until.is_some()).await;
    assert_eq!(current(&status).name, "k2");
    agent.until("the expired folder is gone", |s| s.key_folders.len() == 1).await;
    assert!(!place.path("tls/k1").exists());
    agent.stop().await;
}

#[tokio::test]
async fn a_renewal_cut_short_is_completed_with_the_same_key() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    // As a crash leaves it: the key is on the disk, the CA may or may not have answered.
    let waiting = place.state().waiting_key(WaitingKey::Renewal).unwrap();
    let agent = place.run();
    agent.until("no key waits", |_| !place.state().has_waiting_key(WaitingKey::Renewal)).await;
    agent.until("a sync with the new identity", |s| s.received.is_some()).await;
    agent.stop().await;
    let identity = place.state().identity().unwrap().unwrap();
    assert_eq!(identity.key.spki_der(), waiting.spki_der());
}

#[tokio::test]
async fn a_bad_certificate_replaces_no_file() {
    type Turn = fn(&mut crate::testca::Knobs);
    let table: [(&str, Turn); 2] = [
        ("an address nobody asked for", |k| k.extra_address = Some("10.9.9.9".parse().unwrap())),
        ("another key", |k| k.other_key = true),
    ];
    for (name, turn) in table {
        let ca = TestCa::start(Face::Ca).await;
        let place = Place::new(system_clock());
        place.enroll(&ca).await.unwrap();
        let before = std::fs::read(place.path("tls/k1/tls.crt")).unwrap();
        ca.with(turn);
        let agent = place.run();
        let answer = agent.handle.ask(Ask::Renew).await;
        let Answer::Renewed(renewed) = answer else { panic!("{name}: {answer:?}") };
        assert!(renewed.key_folders.is_empty(), "{name}");
        assert!(renewed.failed[0].contains("was not used"), "{name}: {:?}", renewed.failed);
        assert_eq!(std::fs::read(place.path("tls/k1/tls.crt")).unwrap(), before, "{name}");
        agent.stop().await;
    }
}

#[tokio::test]
async fn a_revoked_node_keeps_its_files_and_comes_back_when_reinstated() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    let enrolled = place.enroll(&ca).await.unwrap();
    let mut config = place.config();
    config.pauses.refused = Duration::from_millis(500);
    let agent = Running::new(Agent::open(config, place.clock.clone()).unwrap());
    agent.until("a sync", |s| s.received.is_some()).await;
    ca.with(|k| k.refuse = Some(Reason::Revoked));
    let status = agent.until("refused", |s| s.standing == "refused").await;
    assert!(status.standing_reason.unwrap().contains("REVOKED"));
    assert_eq!(status.files_work_until, Some(enrolled.leaf_not_after));
    let folders = status.key_folders.len();
    let Answer::Error(error) = agent.handle.ask(Ask::ExecFolder).await else {
        panic!("a revoked node starts Ray")
    };
    assert_eq!(error.kind, ErrorKind::Refused);
    assert!(error.message.contains("nothing was started") && error.message.contains("REVOKED"));
    assert_eq!(agent.handle.status().key_folders.len(), folders);
    ca.with(|k| k.refuse = None);
    agent.until("served again", |s| s.standing == "enrolled").await;
    agent.stop().await;
    assert!(place.path("tls/k1/tls.crt").exists());
}

/// Stand-in of a Ray daemon: a program of that name, started with a leaf of this TLS folder. It is
/// copied by another process: a file that this one writes may be open in a child of another test.
async fn raylet(place: &Path, tls: &Path) -> tokio::process::Child {
    let program = place.join("raylet");
    if !program.exists() {
        let copied = tokio::process::Command::new("cp").arg("/bin/sleep").arg(&program).status();
        assert!(copied.await.unwrap().success());
    }
    let mut command = tokio::process::Command::new(program);
    command.arg("300").env("RAY_TLS_SERVER_CERT", tls.join("k1/tls.crt"));
    command.kill_on_drop(true).spawn().unwrap()
}

#[tokio::test]
async fn a_revoked_node_stops_its_ray_and_says_so_unless_the_cluster_keeps_it() {
    for keeps in [false, true] {
        let ca = TestCa::start(Face::Ca).await;
        let place = Place::new(system_clock());
        place.enroll(&ca).await.unwrap();
        if keeps {
            ca.with(|k| {
                k.version += 1;
                k.bend_sync = Some(|answer| {
                    if let Some(settings) = &mut answer.settings {
                        settings.revoked_keeps_ray = true;
                    }
                });
            });
        }
        let mut ours = raylet(place.folder.path(), &place.path("tls")).await;
        let pid = ours.id().unwrap();
        let mut other = raylet(place.folder.path(), Path::new("/elsewhere")).await;
        let agent = place.run();
        let version = if keeps { "/2" } else { "/1" };
        agent.until("a sync", |s| s.received.as_ref().is_some_and(|v| v.ends_with(version))).await;
        ca.with(|k| k.refuse = Some(Reason::Revoked));
        let status = agent.until("refused", |s| s.standing == "refused").await;
        if keeps {
            tokio::time::sleep(Duration::from_millis(500)).await;
            assert_eq!((status.ray_stop, agent.handle.status().ray_stop), (None, None));
        } else {
            let status = agent.until("Ray is stopped", |s| s.ray_stop.is_some()).await;
            let stop = status.ray_stop.unwrap();
            let named = format!("raylet {pid}");
            assert_eq!((stop.stopped, stop.named, stop.problem), (1, vec![named], None));
        }
        assert_eq!(ours.try_wait().unwrap().is_none(), keeps, "keeps: {keeps}");
        assert!(other.try_wait().unwrap().is_none(), "another node's raylet");
        agent.stop().await;
    }
}

#[tokio::test]
async fn an_unknown_identity_means_enrol_again_and_enrolling_again_helps() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    let first = place.enroll(&ca).await.unwrap();
    ca.with(|k| k.refuse_next = Some(Reason::IdentityUnknown));
    let agent = place.run();
    let status = agent.until("re-enrol needed", |s| s.standing == "re-enrol needed").await;
    assert!(status.standing_reason.unwrap().contains("IDENTITY_UNKNOWN"));
    agent.stop().await;

    ca.with(|k| k.refuse_next = Some(Reason::IdentityUnknown));
    let second = place.enroll(&ca).await.unwrap();
    assert!(!second.already);
    assert_ne!(second.identity_serial, first.identity_serial);
    let agent = place.run();
    agent.until("served", |s| s.ca.reachable == Some(true)).await;
    assert_eq!(agent.handle.status().standing, "enrolled");
    agent.stop().await;
}

#[tokio::test]
async fn an_identity_that_ended_is_said_to_and_a_clock_put_right_brings_it_back() {
    let clock = SettableClock::new(datetime!(2026-11-24 08:00 UTC));
    let ca =
        TestCa::start_at(Face::Ca, Arc::new(clock.clone()), "127.0.0.1:0".parse().unwrap()).await;
    let place = Place::new(Arc::new(clock.clone()));
    place.enroll(&ca).await.unwrap();
    let agent = place.run();
    agent.until("served", |s| s.ca.reachable == Some(true)).await;
    let right = clock.now();
    clock.advance(Duration::from_secs(31 * 24 * 3_600));
    let status = agent.until("re-enrol needed", |s| s.standing == "re-enrol needed").await;
    assert!(status.standing_reason.unwrap().contains("expired"));
    clock.set(right);
    agent.until("enrolled", |s| s.standing == "enrolled").await;
    agent.stop().await;
}

#[tokio::test]
async fn the_socket_and_http_tell_what_the_agent_knows() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    let enrolled = place.enroll(&ca).await.unwrap();
    let socket = place.path("agent.sock");
    // A port nobody else has: taken and given back.
    let http = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut config = place.config();
    (config.socket, config.http_listen) = (Some(socket.clone()), Some(http));
    let agent = Running::new(Agent::open(config, place.clock.clone()).unwrap());
    let status = agent.until("served", |s| s.ca.reachable == Some(true)).await;
    assert_eq!(status.first_failure, None, "files are renewed, and nothing runs");
    assert_eq!(mode_of(&socket), 0o666);

    let answer = crate::socket::ask(&socket, Ask::Status).await.unwrap();
    let Answer::Status(status) = answer else { panic!("{answer:?}") };
    assert_eq!(current(&status).leaf.serial, enrolled.leaf_serial);
    let answer = crate::socket::ask(&socket, Ask::Renew).await.unwrap();
    let Answer::Renewed(renewed) = answer else { panic!("{answer:?}") };
    assert_eq!(renewed.key_folders[0].old, enrolled.leaf_serial);

    assert!(get(http, "/readyz").await.contains("200 OK"));
    let metrics = get(http, "/metrics").await;
    for line in ["raymtls_agent_ca_reachable 1\n", "raymtls_agent_renewals_total 1\n"] {
        assert!(metrics.contains(line), "{metrics}");
    }
    let on_disk: Status =
        serde_json::from_slice(&std::fs::read(place.state().status_path()).unwrap()).unwrap();
    assert_eq!(on_disk.renewals, 1);
    agent.stop().await;
    assert!(!socket.exists());
}

async fn get(address: std::net::SocketAddr, path: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

#[tokio::test]
async fn exec_gets_a_folder_of_its_own_but_not_ten_at_once() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    let pause = Duration::from_millis(150);
    let mut config = place.config();
    config.pauses.exec_folder = pause;
    let agent = Running::new(Agent::open(config, place.clock.clone()).unwrap());
    let exec = async || {
        let answer = agent.handle.ask(Ask::ExecFolder).await;
        let Answer::ExecFolder(folder) = answer else { panic!("{answer:?}") };
        (folder.env.folder_name().unwrap().to_owned(), folder.note)
    };
    assert_eq!(exec().await, ("k2".to_owned(), None));
    let (name, note) = exec().await;
    assert_eq!(name, "k2");
    assert!(note.unwrap().contains("less than 150ms old"));
    tokio::time::sleep(pause).await;
    assert_eq!(exec().await, ("k3".to_owned(), None));
    for _ in 0..14 {
        tokio::time::sleep(pause).await;
        exec().await;
    }
    let (name, note) = exec().await;
    assert_eq!(name, "k15");
    assert!(note.unwrap().contains("15 already"));
    let problem = |s: &Status| s.problems.iter().any(|p| p.contains("15 of 16 key folders"));
    agent.until("that there are many", problem).await;
    agent.stop().await;
}

#[tokio::test]
async fn without_the_ca_exec_gets_the_newest_valid_folder_and_is_told() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    let mut node = place.state().node().unwrap().unwrap();
    node.node_endpoints = vec!["127.0.0.1:1".to_owned()];
    place.state().put_node(&node).unwrap();
    let agent = place.run();
    let status = agent.until("the CA is away", |s| s.ca.reachable == Some(false)).await;
    assert_eq!(status.standing, "enrolled");
    let first = status.first_failure.unwrap();
    assert_eq!(Some(first.at), status.files_work_until);
    assert!(first.what.contains("Ray cannot be started"), "{}", first.what);
    let Answer::ExecFolder(folder) = agent.handle.ask(Ask::ExecFolder).await else {
        panic!("no folder")
    };
    assert_eq!(folder.env.folder_name(), Some("k1"));
    assert!(folder.note.unwrap().contains("cannot be reached"));
    agent.stop().await;
}

#[tokio::test]
async fn a_dead_endpoint_is_passed_over() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    let mut node = place.state().node().unwrap().unwrap();
    node.node_endpoints.insert(0, "127.0.0.1:1".to_owned());
    place.state().put_node(&node).unwrap();
    let agent = place.run();
    agent.until("served", |s| s.ca.reachable == Some(true)).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_key_too_old_gets_a_folder_after_it() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    let agent = place.run();
    ca.with(|k| k.refuse_leaf = Some(Reason::KeyTooOld));
    let Answer::Renewed(renewed) = agent.handle.ask(Ask::Renew).await else { panic!("failed") };
    assert!(renewed.key_folders.is_empty() && renewed.failed[0].contains("KEY_TOO_OLD"));
    ca.with(|k| k.refuse_leaf = None);
    let status = agent.until("k2", |s| s.key_folders.len() == 2).await;
    assert_eq!(current(&status).name, "k2");
    assert_eq!(place.env().folder_name(), Some("k2"));
    agent.stop().await;
}

#[tokio::test]
async fn a_directive_makes_one_folder_and_an_unknown_one_none() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    let act = v1::directive::Act::NewKeyFolder(v1::NewKeyFolder { reason: "test".to_owned() });
    ca.with(|k| {
        k.directives = vec![v1::Directive { act: Some(act) }, v1::Directive { act: None }];
        k.version = 2;
    });
    let agent = place.run();
    agent.until("k2", |s| s.key_folders.len() == 2).await;
    ca.with(|k| k.directives.clear());
    tokio::time::sleep(Duration::from_millis(200)).await;
    let status = agent.handle.status();
    assert_eq!(current(&status).name, status.key_folders.last().unwrap().name);
    agent.stop().await;
}

#[tokio::test]
async fn tunnel_mode_is_refused_in_words() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    ca.with(|k| {
        k.mode = v1::Mode::Tunnel;
        k.version = 2;
    });
    let agent = place.run();
    agent.until("the setting", |s| s.settings.as_ref().is_some_and(|s| s.mode == "tunnel")).await;
    let Answer::Error(error) = agent.handle.ask(Ask::ExecFolder).await else { panic!("served") };
    assert!(error.message.contains("tunnel"), "{}", error.message);
    agent.stop().await;
}

#[tokio::test]
async fn a_second_agent_on_the_same_folder_is_refused() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    let first = place.open();
    let error = Agent::open(place.config(), place.clock.clone()).unwrap_err();
    assert!(error.to_string().contains("another node-agent"), "{error}");
    drop(first);
    place.open();
}

#[tokio::test]
async fn leaving_keeps_the_files_and_ends_all_calls() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    let agent = place.run();
    let Answer::Left { message } = agent.handle.ask(Ask::Leave).await else { panic!("stayed") };
    assert!(message.contains("all files stay"), "{message}");
    agent.until("left", |s| s.standing == "left").await;
    let (leaves, syncs) = (&ca.leaves, &ca.syncs);
    let before = (leaves.load(Ordering::SeqCst), syncs.load(Ordering::SeqCst));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!((leaves.load(Ordering::SeqCst), syncs.load(Ordering::SeqCst)), before);
    assert!(place.path("tls/k1/tls.key").exists());
    agent.stop().await;
}

#[tokio::test]
async fn a_start_finishes_what_a_crash_left() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    let tls = place.path("tls");
    std::fs::create_dir(tls.join(".k2.new")).unwrap();
    std::fs::create_dir(tls.join(".k0.old")).unwrap();
    std::os::unix::fs::symlink("nowhere", tls.join(".ray.env.tmp")).unwrap();
    std::os::unix::fs::symlink("nowhere", tls.join("k1/.tls.crt.tmp")).unwrap();
    std::fs::remove_file(tls.join("current")).unwrap();
    std::fs::remove_file(tls.join("ray.env")).unwrap();
    let identity = place.state().identity().unwrap().unwrap();
    raymtls_proto::durable::create(
        &place.path("state/renew.key"),
        identity.key.to_pem().as_bytes(),
        raymtls_proto::durable::Access::PRIVATE,
    )
    .unwrap();
    let agent = place.open();
    let hidden = |folder: &Path| {
        let entries = std::fs::read_dir(folder).unwrap();
        entries
            .filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().starts_with('.'))
            .count()
    };
    assert_eq!((hidden(&tls), hidden(&tls.join("k1"))), (0, 0));
    assert_eq!(place.tls().current(), Some(1));
    assert_eq!(place.env().folder_name(), Some("k1"));
    // The renewal was complete but for this file.
    assert!(!place.state().has_waiting_key(WaitingKey::Renewal));
    drop(agent);
    let key = PrivateKey::load(&tls.join("k1/tls.key")).unwrap();
    let (folders, damaged) = place.tls().load().unwrap();
    assert!(damaged.is_empty());
    assert_eq!(folders[0].facts.spki_der, key.spki_der());
}
