//! One host looked at: real TLS servers in the place of Ray's processes.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use raymtls_proto::{
    clock::{SettableClock, TlsTime},
    v1,
};
use rustls::{
    RootCertStore, ServerConfig,
    server::WebPkiClientVerifier,
    sign::{CertifiedKey, SingleCertAndKey},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::Instant,
};
use tokio_rustls::TlsAcceptor;

use super::{
    super::{
        Look, Memory, ProcessServed, Served, ServedError, Serves,
        horizon::{State, Trust},
        kind::{Class, Kind},
        look,
        probe::{Limits, Prober},
    },
    judging::{Ca, NODE, NOW},
    *,
};
use crate::{keys::PrivateKey, status::Status};

const HOUR: Duration = Duration::from_secs(3_600);
/// SETTINGS without any, as a server of HTTP/2 begins.
const SETTINGS: &[u8] = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00";

/// A process of Ray as far as a caller sees it: gRPC's TLS with the files it read at its start.
#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) addr: SocketAddr,
    config: Arc<Mutex<Arc<ServerConfig>>>,
    /// What each caller said after the handshake, and how it went.
    heard: Arc<Mutex<Vec<(Vec<u8>, bool)>>>,
}

impl Server {
    pub(crate) async fn start(leaf: &(v1::CertificateChain, PrivateKey), trust: &Trust) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Self {
            addr: listener.local_addr().unwrap(),
            config: Arc::new(Mutex::new(config(leaf, trust))),
            heard: Arc::default(),
        };
        let serving = server.clone();
        tokio::spawn(async move {
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                tokio::spawn(serving.clone().answer(tcp));
            }
        });
        server
    }

    async fn answer(self, tcp: TcpStream) {
        let config = self.config.lock().unwrap().clone();
        let Ok(mut tls) = TlsAcceptor::from(config).accept(tcp).await else { return };
        tls.write_all(SETTINGS).await.unwrap();
        let mut said = Vec::new();
        // An end without close_notify is an error.
        let in_order = tls.read_to_end(&mut said).await.is_ok();
        self.heard.lock().unwrap().push((said, in_order));
    }

    /// What a restart does.
    pub(crate) fn restart(&self, leaf: &(v1::CertificateChain, PrivateKey), trust: &Trust) {
        *self.config.lock().unwrap() = config(leaf, trust);
    }
}

fn config(leaf: &(v1::CertificateChain, PrivateKey), trust: &Trust) -> Arc<ServerConfig> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    for root in &trust.roots {
        roots.add(root.clone()).unwrap();
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone());
    let clock = TlsTime(Arc::new(SettableClock::new(NOW)));
    let mut config = ServerConfig::builder_with_details(provider, Arc::new(clock))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(leaf.0.certificates(), leaf.1.to_der())
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

/// A listener that does something else with each caller.
async fn listener<F>(
    answer: impl Fn(TcpStream) -> F + Send + 'static,
) -> (SocketAddr, Arc<AtomicUsize>)
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let addr = at("127.0.0.1", listener.local_addr().unwrap().port());
    let calls = Arc::new(AtomicUsize::new(0));
    let counter = calls.clone();
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            counter.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(answer(tcp));
        }
    });
    (addr, calls)
}

async fn plain_http() -> (SocketAddr, Arc<AtomicUsize>) {
    listener(|mut tcp| async move {
        let mut request = [0; 64];
        let _ = tcp.read(&mut request).await;
        let _ = tcp.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
    })
    .await
}

async fn tar_pit() -> (SocketAddr, Arc<AtomicUsize>) {
    listener(|tcp| async move {
        tokio::time::sleep(HOUR).await;
        drop(tcp);
    })
    .await
}

fn prober(leaf: &(v1::CertificateChain, PrivateKey), limits: Limits) -> Prober {
    Prober::new(&leaf.0, &leaf.1, Arc::new(SettableClock::new(NOW)), limits).unwrap()
}

fn serves(process: &ProcessServed) -> Vec<&Serves> {
    process.sockets.iter().map(|socket| &socket.serves).collect()
}

fn serial(chain: &v1::CertificateChain) -> String {
    raymtls_proto::leaf::LeafFacts::parse(&chain.leaf_der).unwrap().serial.to_string()
}

#[tokio::test]
async fn what_runs_is_told_apart_from_what_lies_in_the_files() {
    let (ca, other) = (Ca::new("c1"), Ca::new("other"));
    let trust = ca.trust();
    let old = ca.leaf(NODE, NOW - 2 * HOUR, 6 * HOUR);
    let new = ca.leaf(NODE, NOW, 6 * HOUR);
    let raylet = Server::start(&old, &trust).await;
    let worker = Server::start(&new, &trust).await;
    let impostor = Server::start(&other.leaf(NODE, NOW, HOUR), &trust).await;
    let driver = Server::start(&old, &trust).await;
    let ended = Server::start(&ca.leaf(NODE, NOW - 3 * HOUR, HOUR), &trust).await;
    let (http, _) = plain_http().await;
    let web = Server::start(&new, &trust).await;

    let mut host = Host::new();
    let addrs = [raylet.addr, worker.addr, impostor.addr, driver.addr, ended.addr, http, web.addr];
    host.listen(addrs.into_iter().zip(1..));
    host.process(10, &["/r/raylet"], &[1]);
    host.process(20, &["ray::Counter.add"], &[2, 3]);
    let path = host.process(30, &["python3", "train.py"], &[4]);
    write(&path.join("maps"), "/ray/_raylet.so");
    host.process(40, &["ray::old"], &[5]);
    host.process(50, &["ray::Web.serve"], &[7, 6]);
    let look_at = Look { search: host.search(), prober: prober(&new, Limits::default()), trust };
    let mut memory = Memory::default();
    let served = look(&look_at, &mut memory, NOW).await.unwrap();
    let of = |served: &Served, pid: u32| {
        served.processes.iter().find(|process| process.pid == Some(pid)).unwrap().clone()
    };

    // The raylet and the driver hold the old leaf, whatever the files say.
    let process = of(&served, 10);
    assert_eq!((process.kind, process.class), (Kind::Raylet, Class::Node));
    assert_eq!(process.state, Some(State::Fresh));
    assert_eq!(process.horizon.map(|at| at.time()), Some(NOW + 4 * HOUR));
    let [Serves::Leaf { serial: served_serial, trusts, refused_us, .. }] = serves(&process)[..]
    else {
        panic!("{process:?}");
    };
    assert_eq!((served_serial, refused_us), (&serial(&old.0), &None));
    assert_eq!(trusts, &["CN=c1 root"]);
    let process = of(&served, 30);
    assert_eq!((process.kind, process.class), (Kind::Driver, Class::Driver));
    assert_eq!(served.drivers_horizon.map(|at| at.time()), Some(NOW + 4 * HOUR));

    // What a task opens beside its worker's port is shown, and counts for nothing.
    let process = of(&served, 20);
    assert_eq!(process.horizon.map(|at| at.time()), Some(NOW + 6 * HOUR));
    assert!(
        serves(&process)
            .iter()
            .any(|s| matches!(s, Serves::Foreign { why, .. } if why.contains("chain"))),
        "{process:?}"
    );

    // A leaf that has ended is the node's horizon all the same.
    assert_eq!(of(&served, 40).state, Some(State::RecycleOverdue));
    assert_eq!(served.state, Some(State::RecycleOverdue));
    assert_eq!(served.horizon.map(|at| at.time()), Some(NOW - 2 * HOUR));
    assert!(serves(&of(&served, 50)).contains(&&Serves::Plain { seen: true }));

    // Each caller said its preface and GOAWAY, and closed in order: nothing for a log.
    let heard = raylet.heard.lock().unwrap().clone();
    let [(said, in_order)] = &heard[..] else { panic!("{heard:?}") };
    assert!(said.starts_with(b"PRI * HTTP/2.0") && *in_order, "{said:?}");

    // After a restart the new leaf is seen.
    raylet.restart(&new, &look_at.trust);
    ended.restart(&new, &look_at.trust);
    let served = look(&look_at, &mut memory, NOW).await.unwrap();
    assert_eq!(served.state, Some(State::Fresh));
    assert_eq!(served.horizon.map(|at| at.time()), Some(NOW + 6 * HOUR));
    let text = serde_json::to_string(&served).unwrap();
    assert_eq!(serde_json::from_str::<Served>(&text).unwrap(), served);
}

#[tokio::test]
async fn a_program_with_a_port_of_its_own_alone_is_no_driver_without_a_leaf() {
    let ca = Ca::new("c1");
    let leaf = ca.leaf(NODE, NOW, HOUR);
    let (http, _) = plain_http().await;
    let mut host = Host::new();
    host.listen([(http, 1)]);
    let path = host.process(30, &["python3", "jupyter.py"], &[1]);
    write(&path.join("maps"), "/ray/_raylet.so");
    let prober = prober(&leaf, Limits::default());
    let look_at = Look { search: host.search(), prober, trust: ca.trust() };
    let mut memory = Memory::default();
    // The first look asks, and the next ones remember.
    for _ in 0..2 {
        let served = look(&look_at, &mut memory, NOW).await.unwrap();
        assert_eq!(served.processes[0].kind, Kind::Driver);
        assert_eq!((served.processes[0].state, served.drivers_state), (None, None));
    }
}

#[tokio::test]
async fn a_plain_port_is_greeted_once_or_not_at_all() {
    let ca = Ca::new("c1");
    let (known, known_calls) = plain_http().await;
    // As a server answers that takes a greeting of TLS for HTTP/0.9.
    let (unknown, unknown_calls) = listener(|mut tcp| async move {
        let mut request = [0; 64];
        let _ = tcp.read(&mut request).await;
        let _ = tcp.write_all(b"<!DOCTYPE HTML>\n<title>Error response</title>").await;
    })
    .await;
    let mut host = Host::new();
    host.listen([(known, 1), (unknown, 2)]);
    host.process(10, &["python", "/v/ray/dashboard/dashboard.py"], &[1]);
    host.process(20, &["ray::DashboardAgent"], &[2]);
    let look_at = Look {
        search: host.search(),
        prober: prober(&ca.leaf(NODE, NOW, HOUR), Limits::default()),
        trust: ca.trust(),
    };
    let mut memory = Memory::default();
    for _ in 0..3 {
        let served = look(&look_at, &mut memory, NOW).await.unwrap();
        let plain: Vec<_> = served.processes.iter().flat_map(serves).collect();
        assert_eq!(plain, [&Serves::Plain { seen: true }, &Serves::Plain { seen: false }]);
        // No leaf, no horizon; the agent of the dashboard ought to have one.
        assert_eq!((served.horizon, served.state), (None, Some(State::Unknown)));
    }
    assert_eq!((known_calls.load(Ordering::SeqCst), unknown_calls.load(Ordering::SeqCst)), (0, 1));
}

#[tokio::test]
async fn a_tar_pit_costs_its_own_bound_and_hides_nobody() {
    let ca = Ca::new("c1");
    let leaf = ca.leaf(NODE, NOW, HOUR);
    let raylet = Server::start(&leaf, &ca.trust()).await;
    let (pit, _) = tar_pit().await;
    let mut host = Host::new();
    // The raylet's socket stands behind the pits of its own process.
    host.listen((1..=7).map(|inode| (pit, inode)).chain([(raylet.addr, 8)]));
    host.process(10, &["/r/raylet"], &[1, 2, 3, 4, 5, 6, 7, 8]);
    let limits = Limits { socket: Duration::from_secs(1), ..Limits::default() };
    let look_at = Look { search: host.search(), prober: prober(&leaf, limits), trust: ca.trust() };
    let begun = Instant::now();
    let served = look(&look_at, &mut Memory::default(), NOW).await.unwrap();
    // Seven pits, four at a time: two bounds.
    assert!(begun.elapsed() >= Duration::from_secs(1));
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    let all = serves(&served.processes[0]);
    let silent =
        all.iter().filter(|s| matches!(s, Serves::None { why } if why.contains("in time")));
    assert_eq!(silent.count(), 7, "{all:?}");
    assert_eq!(served.processes[0].state, Some(State::Fresh));
}

#[tokio::test]
async fn two_thousand_sockets_are_bounded_in_number_and_time() {
    let ca = Ca::new("c1");
    let leaf = ca.leaf(NODE, NOW, HOUR);
    let raylet = Server::start(&leaf, &ca.trust()).await;
    let (pit, pit_calls) = tar_pit().await;
    let mut host = Host::new();
    // Ten sockets in each of 200 processes, each process at an address of its own.
    let pit_of = |inode: u64| at(&format!("127.0.1.{}", (inode - 1) / 10 + 1), pit.port());
    host.listen((1..=2_000).map(|inode| (pit_of(inode), inode)).chain([(raylet.addr, 5_000)]));
    for n in 0..200 {
        let inodes: Vec<u64> = (1..=10).map(|i| u64::from(n) * 10 + i).collect();
        host.process(100 + n, &["ray::task"], &inodes);
    }
    host.process(99, &["/r/raylet"], &[5_000]);
    let limits = Limits {
        socket: Duration::from_secs(1),
        total: Duration::from_secs(2),
        ..Limits::default()
    };
    let look_at = Look { search: host.search(), prober: prober(&leaf, limits), trust: ca.trust() };
    let begun = Instant::now();
    let served = look(&look_at, &mut Memory::default(), NOW).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    let sockets: usize = served.processes.iter().map(|process| process.sockets.len()).sum();
    assert_eq!(sockets, 1_024);
    assert_eq!(
        (served.processes[0].kind, served.processes[0].state),
        (Kind::Raylet, Some(State::Fresh))
    );
    assert!(pit_calls.load(Ordering::SeqCst) <= 4 * 2 + 4, "four at a time, each for a second");
    assert_eq!(served.blind, ["977 or more listening sockets beyond the bounds of one look"]);
}

#[tokio::test]
async fn a_service_of_a_task_is_not_greeted_beside_its_workers_own_port() {
    let ca = Ca::new("c1");
    let leaf = ca.leaf(NODE, NOW, HOUR);
    let worker = Server::start(&leaf, &ca.trust()).await;
    let (service, calls) = plain_http().await;
    let mut host = Host::new();
    host.listen([(worker.addr, 1), (service, 2)]);
    host.process(10, &["ray::Web.serve"], &[1, 2]);
    let mut search = host.search();
    search.plan.worker_min = worker.addr.port().into();
    search.plan.worker_max = worker.addr.port().into();
    let look_at = Look { search, prober: prober(&leaf, Limits::default()), trust: ca.trust() };
    let served = look(&look_at, &mut Memory::default(), NOW).await.unwrap();
    let [Serves::Leaf { .. }, Serves::NotAsked { why }] = serves(&served.processes[0])[..] else {
        panic!("{served:?}");
    };
    assert!(why.contains("port plan"), "{why}");
    assert_eq!(calls.load(Ordering::SeqCst), 0);
    // Where Ray does not keep to the plan, any port may be the worker's own.
    let look_at = Look { search: host.search(), ..look_at };
    let served = look(&look_at, &mut Memory::default(), NOW).await.unwrap();
    assert_eq!((served.state, calls.load(Ordering::SeqCst)), (Some(State::Fresh), 1));
}

#[tokio::test]
async fn no_task_answers_in_the_raylets_place() {
    let ca = Ca::new("c1");
    let (old, new) = (ca.leaf(NODE, NOW - 4 * HOUR, 5 * HOUR), ca.leaf(NODE, NOW, 5 * HOUR));
    // Any task can read the node's key, and bind loopback where the raylet is bound to all.
    let thief = Server::start(&new, &ca.trust()).await;
    let raylet = Server::start(&old, &ca.trust()).await;
    let mut host = Host::new();
    host.listen([(at("0.0.0.0", thief.addr.port()), 1), (thief.addr, 2), (raylet.addr, 3)]);
    host.process(10, &["/r/raylet"], &[1]);
    host.process(20, &["ray::thief"], &[2]);
    host.process(30, &["ray::honest"], &[3]);
    let look_at =
        Look { search: host.search(), prober: prober(&new, Limits::default()), trust: ca.trust() };
    let served = look(&look_at, &mut Memory::default(), NOW).await.unwrap();
    let raylet = &served.processes[0];
    assert_eq!(
        (raylet.kind, raylet.state, raylet.horizon),
        (Kind::Raylet, Some(State::Unknown), None)
    );
    let [Serves::NotAsked { why }] = serves(raylet)[..] else { panic!("{raylet:?}") };
    assert!(why.starts_with("another process listens"), "{why}");
    assert_eq!(served.processes[2].state, Some(State::RecycleOverdue));
}

#[tokio::test]
async fn a_process_that_cannot_be_read_to_its_end_holds_up_no_agent() {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    let ca = Ca::new("c1");
    let leaf = ca.leaf(NODE, NOW, HOUR);
    let host = Host::new();
    let cmdline = host.process(10, &["ray::stuck"], &[]).join("cmdline");
    std::fs::remove_file(&cmdline).unwrap();
    // Reading it waits for a writer, as a command line in memory that never comes does.
    mknodat(CWD, &cmdline, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let bounds = Bounds { wait: Duration::from_millis(100), ..Bounds::default() };
    let search = Search { bounds, ..host.search() };
    let look_at = Look { search, prober: prober(&leaf, Limits::default()), trust: ca.trust() };
    let (mut memory, begun) = (Memory::default(), Instant::now());
    for _ in 0..2 {
        let stuck = look(&look_at, &mut memory, NOW).await;
        assert!(matches!(stuck, Err(ServedError::Stuck(_))), "{stuck:?}");
    }
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    // When it can be read again, the next look sees it.
    drop(std::fs::File::options().write(true).open(&cmdline).unwrap());
    std::fs::remove_file(&cmdline).unwrap();
    let mut look_at = look_at;
    look_at.search.bounds.wait = Duration::from_secs(20);
    assert_eq!(look(&look_at, &mut memory, NOW).await.unwrap().processes, []);
}

#[tokio::test]
async fn a_process_that_refuses_the_nodes_leaf_still_shows_its_own() {
    let (ca, other) = (Ca::new("c1"), Ca::new("other"));
    let leaf = ca.leaf(NODE, NOW, HOUR);
    // It trusts other roots than those under which the node has its leaf.
    let raylet = Server::start(&leaf, &other.trust()).await;
    let answer = prober(&leaf, Limits::default()).ask(&[raylet.addr]).await;
    let super::super::probe::Answer::Tls(hello) = answer else { panic!("{answer:?}") };
    assert_eq!(serial(&hello.chain), serial(&leaf.0));
    let why = hello.refused_us.unwrap();
    assert!(why.contains("UnknownCA"), "{why}");
}

#[tokio::test]
async fn a_revoked_key_and_a_hang_up_are_told_and_change_no_horizon() {
    let ca = Ca::new("c1");
    let (stolen, good) = (ca.leaf(NODE, NOW, 6 * HOUR), ca.leaf(NODE, NOW, 6 * HOUR));
    let bundle = v1::TrustBundle { crls_der: vec![ca.crl_der(&stolen.0)], ..ca.bundle() };
    let raylet = Server::start(&stolen, &ca.trust()).await;
    // It shows its certificate, takes ours, and closes without a word.
    let acceptor = TlsAcceptor::from(config(&good, &ca.trust()));
    let (mute, _) = listener(move |tcp| {
        let acceptor = acceptor.clone();
        async move { drop(acceptor.accept(tcp).await) }
    })
    .await;
    let mut host = Host::new();
    host.listen([(raylet.addr, 1), (mute, 2)]);
    host.process(10, &["/r/raylet"], &[1]);
    host.process(20, &["ray::IDLE"], &[2]);
    let look_at = Look {
        search: host.search(),
        prober: prober(&good, Limits::default()),
        trust: Trust::new(&bundle, vec![NODE.to_owned()]),
    };
    let served = look(&look_at, &mut Memory::default(), NOW).await.unwrap();
    let revoked: Vec<_> = served.with_revoked_key().map(|process| process.pid).collect();
    assert_eq!(revoked, [Some(10)]);
    let refusing: Vec<_> = served.refusing().collect();
    assert_eq!(refusing, [format!("worker (pid 20) at {mute}")]);
    assert_eq!((served.state, served.horizon), (Some(State::Fresh), Some((NOW + 6 * HOUR).into())));
    let status = Status { served: Some(served), ..crate::agent::empty_status(NOW) };
    let text = crate::status::table(&status, NOW, true);
    for part in [
        "KEY REVOKED        raylet (pid 10)",
        "REFUSED BY RAY     worker (pid 20)",
        "; KEY REVOKED\n",
    ] {
        assert!(text.contains(part), "{part} in\n{text}");
    }
    let metrics = crate::http::render(&status, NOW, 1);
    for line in ["ray_refusing_sockets 1\n", "ray_revoked_key_processes 1\n"] {
        assert!(metrics.contains(line), "{line} in\n{metrics}");
    }
}

#[tokio::test]
async fn a_certificate_without_its_key_is_no_answer() {
    use super::super::probe::Answer;
    let ca = Ca::new("c1");
    let (nodes, own) = (ca.leaf(NODE, NOW, HOUR), ca.leaf(NODE, NOW, HOUR));
    let server = Server::start(&nodes, &ca.trust()).await;
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let key = provider.key_provider.load_private_key(own.1.to_der()).unwrap();
    let stolen = Arc::new(CertifiedKey::new(nodes.0.certificates(), key));
    let mut config = (**server.config.lock().unwrap()).clone();
    config.cert_resolver = Arc::new(SingleCertAndKey::from(stolen));
    *server.config.lock().unwrap() = Arc::new(config);
    let answer = prober(&nodes, Limits::default()).ask(&[server.addr]).await;
    assert!(matches!(answer, Answer::NoCertificate(_)), "{answer:?}");
}

#[tokio::test]
async fn what_never_stops_sending_and_what_is_gone_are_told_apart() {
    use super::super::probe::Answer;
    let ca = Ca::new("c1");
    let prober = prober(&ca.leaf(NODE, NOW, HOUR), Limits::default());
    let (babbler, _) = listener(|mut tcp| async move {
        // Handshake records of a message that has no end.
        let record = [[22, 3, 3, 0x40, 0].as_slice(), &[0xFF; 0x4000]].concat();
        while tcp.write_all(&record).await.is_ok() {}
    })
    .await;
    let answer = prober.ask(&[babbler]).await;
    assert!(matches!(answer, Answer::NoCertificate(_)), "{answer:?}");
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let answer = prober.ask(&[gone]).await;
    assert!(matches!(answer, Answer::Refused(_)), "{answer:?}");
}

#[test]
fn a_socket_of_all_addresses_is_dialled_on_loopback() {
    let dialled = |addr: &str| {
        let addrs = super::super::dialled(addr.parse().unwrap());
        addrs.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(dialled("0.0.0.0:6701"), ["127.0.0.1:6701"]);
    assert_eq!(dialled("[::]:6701"), ["[::1]:6701", "127.0.0.1:6701"]);
    assert_eq!(dialled("10.0.0.1:6701"), ["10.0.0.1:6701"]);
}
