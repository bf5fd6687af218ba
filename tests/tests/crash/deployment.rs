//! A CA of its own in a temporary folder: its processes, its ports, its token.

use std::{
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use ca_server::store::{kv::KvStore, sled::SledEngine};
use node_agent::client::Target;
use raymtls_proto::{
    clock::{Clock, SystemClock},
    durable::{self, Access},
    join::JoinFile,
};
use raymtls_tests::programs::{binary, free_ports, run};
use tokio::{
    net::UnixStream,
    process::{Child, Command},
    time::sleep,
};

const START_TRIES: u32 = 400;
const START_WAIT: Duration = Duration::from_millis(25);

pub(crate) struct Deployment {
    folder: tempfile::TempDir,
    server: PathBuf,
    pub(crate) join: Join,
}

/// The parts of the join file the load needs.
pub(crate) struct Join {
    pub(crate) token: String,
    pub(crate) token_id: String,
    pub(crate) enrollment: Target,
    pub(crate) node: Target,
}

pub(crate) struct Server(Child);

impl Deployment {
    /// Initialized, with cluster `c1` and a token for as many nodes as there will be.
    pub(crate) async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let server = server_binary();
        let [enrollment, node, http] = free_ports();
        let at = |name: &str| folder.path().join(name);
        run(&server, &["init", "--dir", text(&at("ca")), "--kek-file", text(&at("kek"))]).await;
        let config = format!(
            "kek_file = {kek:?}\n\
             enrollment_listen = \"{enrollment}\"\n\
             node_listen = \"{node}\"\n\
             http_listen = \"{http}\"\n\
             admin_socket = {socket:?}\n\
             enrollment_endpoints = [\"{enrollment}\"]\n\
             node_endpoints = [\"{node}\"]\n\
             {limits}",
            kek = at("kek"),
            socket = at("admin.sock"),
            limits = raymtls_tests::no_limits(),
        );
        durable::replace(&at("config.toml"), config.as_bytes(), Access::PRIVATE).unwrap();

        let mut running = spawn(folder.path(), &server, None).await;
        let (admin, socket) = (server.with_file_name("ca-admin"), at("admin.sock"));
        let join = at("join");
        run(&admin, &["--socket", text(&socket), "cluster", "create", "c1", "--max-job", "2h"])
            .await;
        let create = ["--socket", text(&socket), "token", "create", "--cluster", "c1"];
        let what = ["--role", "worker", "--uses", USES, "--generate-names", "--any-address"];
        run(&admin, &[&create[..], &what, &["--out", text(&join)]].concat()).await;
        running.kill().await;

        let join = Join::from(JoinFile::read(&join).unwrap());
        Self { folder, server, join }
    }

    /// Starts the server, armed if a point is named, and waits until it listens or is dead.
    pub(crate) async fn start(&self, fail_point: Option<&str>) -> Server {
        spawn(self.folder.path(), &self.server, fail_point).await
    }

    /// The dead server's store.
    pub(crate) fn store(&self) -> KvStore {
        let engine = SledEngine::open(&self.folder.path().join("ca").join("store")).unwrap();
        KvStore::open(Box::new(engine), SystemClock.now()).unwrap()
    }

    /// What the servers said.
    pub(crate) fn log(&self) -> String {
        let log = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
        let from = log.len().saturating_sub(4_000);
        log.get(from..).unwrap_or_default().to_owned()
    }
}

impl Server {
    /// SIGKILL, and gone when this returns.
    pub(crate) async fn kill(&mut self) {
        self.0.kill().await.unwrap();
    }

    /// Waits for its end: whether SIGKILL was it.
    pub(crate) async fn died(&mut self) -> bool {
        self.0.wait().await.unwrap().signal() == Some(9)
    }
}

impl Join {
    fn from(join: JoinFile) -> Self {
        use secrecy::ExposeSecret;
        let target = |endpoints| Target {
            endpoints,
            trust_domain: join.trust_domain.clone(),
            control_roots: join.control_roots.clone(),
            control_crls: vec![],
            source: None,
        };
        Self {
            token: join.token().unwrap().expose().expose_secret().to_owned(),
            token_id: join.token().unwrap().id().to_string(),
            enrollment: target(join.enrollment_endpoints.clone()),
            node: target(join.node_endpoints.clone()),
        }
    }
}

async fn spawn(folder: &Path, server: &Path, fail_point: Option<&str>) -> Server {
    let log = std::fs::File::options().create(true).append(true).open(folder.join("log")).unwrap();
    let mut command = Command::new(server);
    command
        .args(["serve", "--dir", text(&folder.join("ca"))])
        .args(["--config", text(&folder.join("config.toml"))])
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .kill_on_drop(true);
    if let Some(fail_point) = fail_point {
        command.env("RAYMTLS_FAIL_POINT", fail_point);
    }
    let mut child = command.spawn().unwrap();
    for _ in 0..START_TRIES {
        // An armed one may be dead before it listens.
        if child.try_wait().unwrap().is_some() && fail_point.is_some() {
            return Server(child);
        }
        // The socket is bound last; one of an earlier server refuses.
        if UnixStream::connect(folder.join("admin.sock")).await.is_ok() {
            return Server(child);
        }
        sleep(START_WAIT).await;
    }
    let log = std::fs::read_to_string(folder.join("log")).unwrap_or_default();
    panic!("the server does not listen:\n{log}");
}

/// One with fail points: a name in the environment, or this build's.
fn server_binary() -> PathBuf {
    let named = std::env::var_os("RAYMTLS_FAILPOINT_BIN").map(PathBuf::from);
    let path = named.unwrap_or_else(|| binary("ca-server"));
    assert!(
        path.exists(),
        "{} is missing: run `cargo build -p ca-server --features fail-points` first",
        path.display()
    );
    path
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

const USES: &str = "100000";
