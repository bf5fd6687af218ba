//! The server under load: a process of its own with a store of its own, on free loopback ports.

use std::{
    fs::File,
    io::{self, Read},
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use hyper_util::rt::TokioIo;
use node_agent::client::{CallLimits, Target};
use raymtls_proto::{
    durable::{self, Access},
    v1::{self, admin_service_client::AdminServiceClient},
};
use rustls::pki_types::CertificateDer;
use secrecy::{ExposeSecret, SecretString};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
};
use tonic::transport::{Endpoint, Uri};

use crate::{Failure, machine};

pub(crate) const CLUSTER: &str = "load";
const TRUST_DOMAIN: &str = "load.test";
/// Where the callers say they are. No packet goes there.
const RANGE: &str = "10.0.0.0/8";
/// Longest wait for a start or a stop.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest answer of its HTTP listener, in bytes.
const ANSWER_LEN_MAX: u64 = 1 << 20;
/// The counter of its metrics.
const COMMITS: &str = "raymtls_ca_store_commits_total ";
/// Pause between two looks at a server that starts.
const LOOK_AGAIN: Duration = Duration::from_millis(1);
/// Most machines that enrol with one token.
const TOKEN_USES: u32 = 100_000;

/// Deadlines of the callers: longer than an agent's, because a full queue is what is measured.
pub(crate) const LIMITS: CallLimits = CallLimits {
    connect: Duration::from_secs(30),
    call: Duration::from_secs(60),
    sync_wait: Duration::ZERO,
};

/// A server's files and, while it runs, its process.
pub(crate) struct Server {
    binary: PathBuf,
    folder: PathBuf,
    enrollment: SocketAddr,
    node: SocketAddr,
    http: SocketAddr,
    /// The limits of its configuration.
    limits: String,
    process: Option<Child>,
}

/// What callers need: how to know the CA, and a token for as many as will come.
pub(crate) struct Ca {
    pub(crate) enrollment: Target,
    pub(crate) node: Target,
    token: SecretString,
    next_address: AtomicU32,
}

/// `ca-server` in the folder this program lies in.
pub(crate) fn beside_this_program() -> Result<PathBuf, Failure> {
    let path = std::env::current_exe()?.with_file_name("ca-server");
    if path.is_file() {
        return Ok(path);
    }
    Err(format!("there is no {}: build it, or name one with --ca-server", path.display()).into())
}

impl Server {
    /// Writes its configuration and runs `init`.
    pub(crate) fn prepare(binary: &Path, folder: &Path, limits: String) -> Result<Self, Failure> {
        let [enrollment, node, http] = free_ports()?;
        let server = Self {
            binary: binary.to_owned(),
            folder: folder.to_owned(),
            enrollment,
            node,
            http,
            limits,
            process: None,
        };
        durable::replace(&server.path("ca.toml"), server.config().as_bytes(), Access::PRIVATE)?;
        let status = Command::new(binary)
            .arg("init")
            .args(["--dir".as_ref(), server.path("state").as_os_str()])
            .args(["--trust-domain", TRUST_DOMAIN])
            .args(["--kek-file".as_ref(), server.path("kek").as_os_str()])
            .stdout(server.log()?)
            .stderr(server.log()?)
            .status()?;
        if status.success() {
            return Ok(server);
        }
        Err(format!("`ca-server init` failed: {}", server.last_words()).into())
    }

    /// Starts it; how long until it says it is ready.
    pub(crate) async fn start(&mut self) -> Result<Duration, Failure> {
        let began = Instant::now();
        let process = Command::new(&self.binary)
            .arg("serve")
            .args(["--dir".as_ref(), self.path("state").as_os_str()])
            .args(["--config".as_ref(), self.path("ca.toml").as_os_str()])
            .stdin(Stdio::null())
            .stdout(self.log()?)
            .stderr(self.log()?)
            .spawn()?;
        self.process = Some(process);
        while !self.is_ready().await {
            if let Some(status) = self.child()?.try_wait()? {
                return Err(format!("ca-server ended ({status}): {}", self.last_words()).into());
            }
            if began.elapsed() > PATIENCE {
                return Err(format!("ca-server is not ready: {}", self.last_words()).into());
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        Ok(began.elapsed())
    }

    /// Asks it to stop and waits until it has.
    pub(crate) async fn stop(&mut self) -> Result<(), Failure> {
        let Some(mut process) = self.process.take() else { return Ok(()) };
        let pid = rustix::process::Pid::from_child(&process);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let began = Instant::now();
        while process.try_wait()?.is_none() {
            if began.elapsed() > PATIENCE {
                process.kill()?;
                process.wait()?;
                return Err("ca-server did not stop when asked to".into());
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        Ok(())
    }

    pub(crate) fn memory_mib(&self) -> Result<f64, Failure> {
        machine::memory_mib(self.pid()?)
    }

    /// Commits of the store since the start: it ends each with one `fdatasync`.
    pub(crate) async fn commits(&self) -> Result<u64, Failure> {
        let text = self.get("/metrics").await?;
        let value = text.lines().find_map(|line| line.strip_prefix(COMMITS));
        Ok(value.ok_or("ca-server counts no commits")?.trim().parse()?)
    }

    /// What its store takes on the disk.
    pub(crate) fn disk_bytes(&self) -> Result<u64, Failure> {
        machine::disk_bytes(&self.path("state"))
    }

    pub(crate) fn cpu_time(&self) -> Result<Duration, Failure> {
        machine::cpu_time(self.pid()?)
    }

    /// Makes the cluster and a token everybody may use.
    pub(crate) async fn open_cluster(&self) -> Result<Ca, Failure> {
        let mut admin = self.admin().await?;
        let life = v1::create_cluster_request::Life::MaxJobSeconds(86_400);
        let request = v1::CreateClusterRequest { cluster: CLUSTER.to_owned(), life: Some(life) };
        admin.create_cluster(request).await?;
        let request = v1::CreateTokenRequest {
            cluster: CLUSTER.to_owned(),
            role: v1::Role::Worker.into(),
            ttl_seconds: 3_600,
            uses: TOKEN_USES,
            generate_names: true,
            address_ranges: vec![RANGE.to_owned()],
            ..Default::default()
        };
        let answer = admin.create_token(request).await?.into_inner();
        let target = |endpoint: SocketAddr| -> Result<Target, Failure> {
            Ok(Target {
                endpoints: vec![endpoint.to_string()],
                trust_domain: answer.trust_domain.parse()?,
                control_roots: answer
                    .control_roots_der
                    .iter()
                    .map(|der| CertificateDer::from(der.clone()))
                    .collect(),
                control_crls: Vec::new(),
                source: None,
            })
        };
        Ok(Ca {
            enrollment: target(self.enrollment)?,
            node: target(self.node)?,
            token: SecretString::from(answer.bootstrap_token),
            next_address: AtomicU32::new(1),
        })
    }

    pub(crate) async fn admin(
        &self,
    ) -> Result<AdminServiceClient<tonic::transport::Channel>, Failure> {
        let socket = self.path("admin.sock");
        let connector = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { Ok::<_, io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
        });
        let endpoint = Endpoint::from_static("http://admin.invalid").timeout(PATIENCE);
        Ok(AdminServiceClient::new(endpoint.connect_with_connector(connector).await?))
    }

    async fn is_ready(&self) -> bool {
        self.get("/readyz").await.is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"))
    }

    async fn get(&self, path: &str) -> io::Result<String> {
        let mut stream = TcpStream::connect(self.http).await?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: ca\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.take(ANSWER_LEN_MAX).read_to_string(&mut answer).await?;
        Ok(answer)
    }

    fn config(&self) -> String {
        let Self { enrollment, node, http, .. } = self;
        format!(
            "kek_file = {kek:?}\n\
             enrollment_listen = \"{enrollment}\"\n\
             node_listen = \"{node}\"\n\
             http_listen = \"{http}\"\n\
             admin_socket = {socket:?}\n\
             enrollment_endpoints = [\"{enrollment}\"]\n\
             node_endpoints = [\"{node}\"]\n\
             {limits}",
            kek = self.path("kek").display().to_string(),
            socket = self.path("admin.sock").display().to_string(),
            limits = self.limits,
        )
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn log(&self) -> io::Result<File> {
        File::options().create(true).append(true).open(self.path("log"))
    }

    /// The end of its log, for an error.
    fn last_words(&self) -> String {
        let mut text = String::new();
        let read = File::open(self.path("log")).and_then(|mut log| log.read_to_string(&mut text));
        let lines: Vec<&str> = text.lines().rev().take(5).collect();
        match read {
            Ok(_) => lines.into_iter().rev().collect::<Vec<_>>().join("\n"),
            Err(e) => format!("its log cannot be read: {e}"),
        }
    }

    fn child(&mut self) -> Result<&mut Child, Failure> {
        self.process.as_mut().ok_or_else(|| "ca-server is not running".into())
    }

    fn pid(&self) -> Result<u32, Failure> {
        Ok(self.process.as_ref().ok_or("ca-server is not running")?.id())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

impl Ca {
    /// The request of a machine nobody has seen yet.
    pub(crate) fn enrolment(&self, csr_der: Vec<u8>) -> v1::EnrollRequest {
        let number = self.next_address.fetch_add(1, Ordering::Relaxed);
        let [_, a, b, c] = number.to_be_bytes();
        let token = self.token.expose_secret().to_owned();
        v1::EnrollRequest {
            credential: Some(v1::enroll_request::Credential::BootstrapToken(token)),
            cluster: CLUSTER.to_owned(),
            role: v1::Role::Worker.into(),
            node_name: "node".to_owned(),
            addresses: vec![format!("10.{a}.{b}.{c}")],
            csr_der,
            ..Default::default()
        }
    }
}

/// Three loopback ports nobody listens on right now.
fn free_ports() -> io::Result<[SocketAddr; 3]> {
    let any = || TcpListener::bind(("127.0.0.1", 0));
    let held = [any()?, any()?, any()?];
    let mut ports = [SocketAddr::from(([127, 0, 0, 1], 0)); 3];
    for (port, listener) in ports.iter_mut().zip(&held) {
        *port = listener.local_addr()?;
    }
    Ok(ports)
}
