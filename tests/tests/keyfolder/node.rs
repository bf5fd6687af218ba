//! A machine with the real `node-agent`, against a CA in this process with a cluster `c1`.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use node_agent::{
    api::{Answer, Ask},
    keys::PrivateKey,
    socket,
};
use raymtls_proto::{bundle::certificates_from_pem, clock::Clock, leaf::LeafFacts, v1};
use raymtls_tests::Deployment;
use tokio::{
    process::{Child, Command},
    time::{sleep, timeout},
};

pub(crate) const SOON: Duration = Duration::from_secs(20);
const HOUR: Duration = Duration::from_secs(3_600);

/// A node of a CA in this process.
pub(crate) struct Node {
    pub(crate) deployment: Deployment,
    pub(crate) agent: Option<Child>,
}

impl Node {
    /// Enrolled; its agent does not run yet.
    pub(crate) async fn new() -> Self {
        let node = Self::unenrolled().await;
        let enrolled = node.enroll(&[]).await;
        let said = String::from_utf8_lossy(&enrolled.stderr).into_owned();
        assert!(enrolled.status.success(), "{said}");
        node
    }

    /// With a join file, not yet used.
    pub(crate) async fn unenrolled() -> Self {
        let deployment = Deployment::start().await;
        deployment.cluster("c1", HOUR).await;
        let node = Self { deployment, agent: None };
        let token = node.deployment.token("c1", v1::Role::Worker, 1).await;
        node.deployment.write_join("c1", &token, &node.at("join"));
        node
    }

    /// Runs `enroll` with the flags and the join file.
    pub(crate) async fn enroll(&self, flags: &[&str]) -> std::process::Output {
        let name = ["enroll", "--name", "w1", "--address", "10.0.0.1", "--join", "join"];
        self.command(&[&name[..], flags].concat()).output().await.unwrap()
    }

    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.deployment.folder.path().join(name)
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary("node-agent"));
        command
            .args(arguments)
            .args(["--state-dir", "agent", "--tls-dir", "tls"])
            .current_dir(self.deployment.folder.path())
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }

    pub(crate) async fn run(&mut self) {
        let log = std::fs::File::options().create(true).append(true).open(self.at("log")).unwrap();
        let mut command = self.command(&["run", "--socket", "agent.sock"]);
        let agent = command.stdout(Stdio::null()).stderr(log).spawn().unwrap();
        self.agent = Some(agent);
        let started = Instant::now();
        while !matches!(self.ask(Ask::Status).await, Ok(Answer::Status(_))) {
            assert!(started.elapsed() < SOON, "the agent does not answer:\n{}", self.log());
            sleep(Duration::from_millis(20)).await;
        }
    }

    pub(crate) async fn kill(&mut self) {
        self.agent.take().unwrap().kill().await.unwrap();
    }

    pub(crate) async fn ask(&self, ask: Ask) -> Result<Answer, String> {
        let path = self.at("agent.sock");
        timeout(SOON, socket::ask(&path, ask))
            .await
            .map_err(|e| e.to_string())?
            .map_err(|e| e.to_string())
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.at("log")).unwrap_or_default()
    }

    /// Every file of every key folder is whole, and certificate and key belong together.
    pub(crate) fn check_folders(&self) -> usize {
        let mut folders = 0;
        for entry in std::fs::read_dir(self.at("tls")).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if path.is_symlink() || !path.is_dir() || name.starts_with('.') {
                continue;
            }
            let read = |file: &str| std::fs::read(path.join(file)).unwrap();
            let chain = certificates_from_pem(&read("tls.crt")).unwrap();
            assert_eq!(chain.len(), 2, "{name}: leaf and issuer");
            let facts = LeafFacts::parse(&chain[0]).unwrap();
            let key = PrivateKey::load(&path.join("tls.key")).unwrap();
            assert_eq!(facts.spki_der, key.spki_der(), "{name}: mismatched");
            assert!(facts.not_after > self.deployment.clock.now());
            assert_eq!(certificates_from_pem(&read("ca.crt")).unwrap().len(), 1);
            assert!(read("crl.pem").ends_with(b"-----END X509 CRL-----\n"));
            folders += 1;
        }
        let current = std::fs::read_link(self.at("tls/current")).unwrap();
        assert!(self.at("tls").join(current).join("tls.key").exists());
        folders
    }
}

/// What begins with a dot: nothing of ours does, once an act is over.
pub(crate) fn stray_files(folder: &Path) -> Vec<PathBuf> {
    let mut strays = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_str().unwrap().starts_with('.') {
            strays.push(path.clone());
        }
        if path.is_dir() && !path.is_symlink() {
            strays.extend(stray_files(&path));
        }
    }
    strays
}

/// A program of this build.
pub(crate) fn binary(name: &str) -> PathBuf {
    // This test runs from target/PROFILE/deps.
    let path = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join(name);
    assert!(path.exists(), "{} is missing: run `cargo build --bins` first", path.display());
    path
}
