//! A real server with its own folder, and what the system says of its process.

use std::{
    fs::File,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use node_agent::{
    client::{CallLimits, EnrollmentClient, NodeClient, Target},
    keys::PrivateKey,
    statedir::Identity,
};
use raymtls_proto::{
    clock::SystemClock,
    durable::{self, Access},
    join::JoinFile,
    v1::{self, enroll_request::Credential},
};
use raymtls_tests::{
    programs::{binary, free_ports, run},
    wire::Stranger,
};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use secrecy::ExposeSecret;
use tokio::{
    net::UnixStream,
    process::{Child, Command},
    time::sleep,
};

const START_TRIES: u32 = 400;
const START_WAIT: Duration = Duration::from_millis(25);
const LIMITS: CallLimits = CallLimits {
    connect: Duration::from_secs(20),
    call: Duration::from_secs(20),
    sync_wait: Duration::ZERO,
};
/// `USER_HZ`, in which /proc counts CPU time: 100 on every Linux this runs on.
const TICK: Duration = Duration::from_millis(10);

pub(crate) struct Server {
    child: Child,
    folder: tempfile::TempDir,
    admin: PathBuf,
    join: JoinFile,
    pub(crate) enrollment: SocketAddr,
    pub(crate) nodes: SocketAddr,
}

impl Server {
    /// Serving, with at most so many open files.
    pub(crate) async fn start(files_max: u32) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), files_max, &[]).await
    }

    /// Serving by a clock that is wrong by what a file says (libfaketime; monotonic clocks stay). The
    /// file lies in the server's folder.
    pub(crate) async fn start_by_clock_file(name: &str, offset: &str) -> Self {
        let library =
            format!("/usr/lib/{}-linux-gnu/faketime/libfaketimeMT.so.1", std::env::consts::ARCH);
        assert!(Path::new(&library).exists(), "wants the package faketime");
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(name);
        durable::replace(&file, offset.as_bytes(), Access::PUBLIC).unwrap();
        let environment = [
            ("LD_PRELOAD", library.as_str()),
            ("FAKETIME_TIMESTAMP_FILE", text(&file)),
            ("FAKETIME_NO_CACHE", "1"),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
            ("DONT_FAKE_MONOTONIC", "1"),
        ];
        let environment = environment.map(|(name, value)| (name, value.to_owned()));
        Self::start_in(folder, 1_024, &environment).await
    }

    /// Puts the clock of such a server.
    pub(crate) fn put_clock(&self, name: &str, offset: &str) {
        let file = self.folder.path().join(name);
        durable::replace(&file, offset.as_bytes(), Access::PUBLIC).unwrap();
    }

    async fn start_in(
        folder: tempfile::TempDir,
        files_max: u32,
        environment: &[(&str, String)],
    ) -> Self {
        let server = binary("ca-server");
        let admin = server.with_file_name("ca-admin");
        let [enrollment, nodes, http] = free_ports();
        let at = |name: &str| folder.path().join(name);
        let dir = at("ca");
        let init = ["init", "--dir", text(&dir), "--kek-file", text(&at("kek"))].map(str::to_owned);
        run(&server, &init).await;
        let config = format!(
            "kek_file = {kek:?}\n\
             enrollment_listen = \"{enrollment}\"\n\
             node_listen = \"{nodes}\"\n\
             http_listen = \"{http}\"\n\
             admin_socket = {socket:?}\n\
             enrollment_endpoints = [\"{enrollment}\"]\n\
             node_endpoints = [\"{nodes}\"]\n\
             {limits}",
            kek = at("kek"),
            socket = at("admin.sock"),
            limits = raymtls_tests::no_limits(),
        );
        durable::replace(&at("config.toml"), config.as_bytes(), Access::PRIVATE).unwrap();
        let log = File::options().create(true).append(true).open(at("log")).unwrap();
        let script = format!("ulimit -n {files_max}; exec \"$0\" \"$@\"");
        let mut child = Command::new("sh")
            .args(["-c", &script, text(&server), "serve", "--dir", text(&dir)])
            .args(["--config", text(&at("config.toml"))])
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        wait_for(&mut child, &at("admin.sock")).await;
        let join = make_join(&admin, folder.path()).await;
        Self { child, folder, admin, join, enrollment, nodes }
    }

    /// Runs `ca-admin`.
    pub(crate) async fn admin(&self, arguments: &[&str]) {
        run(&self.admin, &over_socket(self.folder.path(), arguments)).await;
    }

    /// Somebody connects to the operator's socket and says nothing.
    pub(crate) async fn connect_admin(&self) -> UnixStream {
        UnixStream::connect(self.folder.path().join("admin.sock")).await.unwrap()
    }

    /// How long a node needs to enrol on a fresh connection, and then to renew on another.
    pub(crate) async fn honest(&self) -> (Duration, Duration) {
        let began = Instant::now();
        let identity = self.enrol().await;
        let enrolled = began.elapsed();
        let next = PrivateKey::generate().unwrap().csr_der().unwrap();
        let began = Instant::now();
        let target = self.target(self.nodes);
        let client = NodeClient::new(&target, &identity, LIMITS, Arc::new(SystemClock)).unwrap();
        client.renew_identity(next).await.unwrap();
        (enrolled, began.elapsed())
    }

    /// A node of a name of its own.
    pub(crate) async fn enrol(&self) -> Identity {
        let key = PrivateKey::generate().unwrap();
        let request = v1::EnrollRequest {
            credential: Some(Credential::BootstrapToken(
                self.join.token().unwrap().expose().expose_secret().to_owned(),
            )),
            cluster: "c1".to_owned(),
            role: v1::Role::Worker.into(),
            node_name: "honest".to_owned(),
            addresses: vec![
                Ipv4Addr::from(0x0a00_0000 + rand::random_range(1..1 << 24)).to_string(),
            ],
            csr_der: key.csr_der().unwrap(),
            ..v1::EnrollRequest::default()
        };
        let target = self.target(self.enrollment);
        let mut client = EnrollmentClient::new(&target, LIMITS, Arc::new(SystemClock)).unwrap();
        let answer = client.enroll(request).await.unwrap();
        Identity::new(key, answer.identity.unwrap()).unwrap()
    }

    pub(crate) fn stranger(&self) -> Stranger {
        let root = self.join.control_roots[0].clone();
        Stranger::new(root, &self.join.trust_domain.server_name())
    }

    /// Somebody who has a node's identity and follows no rule of ours.
    pub(crate) fn enrolled(&self, identity: &Identity) -> Stranger {
        let root = self.join.control_roots[0].clone();
        Stranger::enrolled(root, &self.join.trust_domain.server_name(), identity)
    }

    pub(crate) fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Changes how many files it may have open from now on.
    pub(crate) fn limit_files(&self, files_max: u64) {
        let limit = Rlimit { current: Some(files_max), maximum: Some(files_max.max(128)) };
        prlimit(Some(self.pid()), Resource::Nofile, limit).unwrap();
    }

    /// User and system time so far.
    pub(crate) fn cpu_time(&self) -> Duration {
        let stat =
            std::fs::read_to_string(format!("/proc/{}/stat", self.pid().as_raw_pid())).unwrap();
        // The name in parentheses may hold spaces; utime and stime are fields 14 and 15.
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks: u32 = fields[11].parse::<u32>().unwrap() + fields[12].parse::<u32>().unwrap();
        TICK * ticks
    }

    /// Resident memory.
    pub(crate) fn memory_mib(&self) -> f64 {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.pid().as_raw_pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let kib: f64 = line.trim().trim_end_matches(" kB").parse().unwrap();
        kib / 1_024.0
    }

    /// What it said.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    fn pid(&self) -> Pid {
        let id = i32::try_from(self.child.id().unwrap()).unwrap();
        Pid::from_raw(id).unwrap()
    }

    fn target(&self, endpoint: SocketAddr) -> Target {
        Target {
            endpoints: vec![endpoint.to_string()],
            trust_domain: self.join.trust_domain.clone(),
            control_roots: self.join.control_roots.clone(),
            control_crls: vec![],
            source: None,
        }
    }
}

async fn make_join(admin: &Path, folder: &Path) -> JoinFile {
    let join = folder.join("join");
    let cluster = ["cluster", "create", "c1", "--max-job", "2h"];
    run(admin, &over_socket(folder, &cluster)).await;
    let token = ["token", "create", "--cluster", "c1", "--role", "worker", "--uses", "100000"];
    let life = ["--ttl", "24h"];
    let what = ["--generate-names", "--any-address", "--out", text(&join)];
    run(admin, &over_socket(folder, &[&token[..], &life, &what].concat())).await;
    JoinFile::read(&join).unwrap()
}

fn over_socket(folder: &Path, arguments: &[&str]) -> Vec<String> {
    let socket = folder.join("admin.sock");
    let socket = ["--socket", text(&socket)];
    [&socket[..], arguments].concat().into_iter().map(str::to_owned).collect()
}

async fn wait_for(child: &mut Child, socket: &Path) {
    for _ in 0..START_TRIES {
        assert!(child.try_wait().unwrap().is_none(), "the server ended");
        if UnixStream::connect(socket).await.is_ok() {
            return;
        }
        sleep(START_WAIT).await;
    }
    panic!("the server does not listen");
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
