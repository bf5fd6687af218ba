//! A key folder is read while it is renewed, and its agent is killed: the real `node-agent` against
//! a CA in this process. Whoever opens the files sees a pair that fits, whole, every time.
//!
//! Wants `node-agent` in the target folder, and Python with its `ssl` module (OpenSSL).
#![allow(clippy::unwrap_used, reason = "helpers of tests: a panic is a failed test")]

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

const READS: u32 = 100_000;
const RENEW_EVERY: Duration = Duration::from_millis(100);
const KILLS: u32 = 20;
const SOON: Duration = Duration::from_secs(20);
const HOUR: Duration = Duration::from_secs(3_600);

/// Opens certificate then key, as a TLS library does, again and again; says what went wrong.
const READER: &str = r"
import ssl, sys
folder, reads = sys.argv[1], int(sys.argv[2])
wrong, serials = {}, set()
for n in range(reads):
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder + '/tls.crt', folder + '/tls.key')
        if n % 100 == 0:
            context.load_verify_locations(folder + '/ca.crt')
            context.load_verify_locations(folder + '/crl.pem')
            with open(folder + '/tls.crt') as file:
                serials.add(file.read())
    except Exception as error:
        wrong[repr(error)] = wrong.get(repr(error), 0) + 1
print('reads', reads, 'wrong', sum(wrong.values()), 'generations', len(serials))
for what, times in wrong.items():
    print(times, what)
sys.exit(bool(wrong))
";

struct Node {
    deployment: Deployment,
    agent: Option<Child>,
}

impl Node {
    /// Enrolled, its agent running.
    async fn new() -> Self {
        let deployment = Deployment::start().await;
        deployment.cluster("c1", HOUR).await;
        let node = Self { deployment, agent: None };
        let token = node.deployment.token("c1", v1::Role::Worker, 1).await;
        node.deployment.write_join("c1", &token, &node.at("join"));
        let enrolled = node
            .command(&["enroll", "--name", "w1", "--address", "10.0.0.1", "--join", "join"])
            .output()
            .await
            .unwrap();
        let said = String::from_utf8_lossy(&enrolled.stderr).into_owned();
        assert!(enrolled.status.success(), "{said}");
        node
    }

    fn at(&self, name: &str) -> PathBuf {
        self.deployment.folder.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary("node-agent"));
        command
            .args(arguments)
            .args(["--state-dir", "agent", "--tls-dir", "tls"])
            .current_dir(self.deployment.folder.path())
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }

    async fn run(&mut self) {
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

    async fn kill(&mut self) {
        self.agent.take().unwrap().kill().await.unwrap();
    }

    async fn ask(&self, ask: Ask) -> Result<Answer, String> {
        let path = self.at("agent.sock");
        timeout(SOON, socket::ask(&path, ask))
            .await
            .map_err(|e| e.to_string())?
            .map_err(|e| e.to_string())
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.at("log")).unwrap_or_default()
    }

    /// Every file of every key folder is whole, and certificate and key belong together.
    fn check_folders(&self) -> usize {
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_reads_while_renewing_see_no_pair_that_does_not_fit() {
    let mut node = Node::new().await;
    node.run().await;
    let reader = Command::new("python3")
        .args(["-c", READER])
        .arg(node.at("tls/k1"))
        .arg(READS.to_string())
        .kill_on_drop(true)
        .output();
    let reader = tokio::spawn(reader);
    let mut renewals = 0;
    while !reader.is_finished() {
        let asked = Instant::now();
        let answer = node.ask(Ask::Renew).await.unwrap();
        let Answer::Renewed(renewed) = answer else { panic!("{answer:?}\n{}", node.log()) };
        assert!(renewed.failed.is_empty(), "{renewed:?}");
        renewals += 1;
        sleep(RENEW_EVERY.saturating_sub(asked.elapsed())).await;
    }
    let output = reader.await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    println!("renewals {renewals}, {said}");
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(renewals >= 20, "only {renewals} renewals while it read: the test shows little");
    let generations: u32 = said.split_whitespace().last().unwrap().parse().unwrap();
    assert!(generations > 10, "the reader saw only {generations} certificates");
    node.kill().await;
    node.deployment.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_any_moment_the_agent_leaves_whole_files_and_recovers() {
    let mut node = Node::new().await;
    let mut folders = 0;
    for round in 0..KILLS {
        node.run().await;
        // Renewals and new key folders go on until the plug is pulled.
        let pulled = Instant::now() + Duration::from_millis(rand::random_range(5..150));
        while Instant::now() < pulled {
            let ask = if round % 2 == 0 { Ask::Renew } else { Ask::ExecFolder };
            let left = pulled.saturating_duration_since(Instant::now());
            let _ = timeout(left, node.ask(ask)).await;
        }
        node.kill().await;
        folders = folders.max(node.check_folders());
    }
    // The last start finds everything as it must be, and works.
    node.run().await;
    let Answer::Renewed(renewed) = node.ask(Ask::Renew).await.unwrap() else { panic!() };
    assert!(renewed.failed.is_empty() && !renewed.key_folders.is_empty(), "{renewed:?}");
    node.check_folders();
    let strays: Vec<_> = stray_files(&node.at("tls"));
    assert!(strays.is_empty(), "left behind: {strays:?}");
    node.kill().await;
    node.deployment.finish().await;
}

fn stray_files(folder: &Path) -> Vec<PathBuf> {
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

fn binary(name: &str) -> PathBuf {
    // This test runs from target/PROFILE/deps.
    let path = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join(name);
    assert!(path.exists(), "{} is missing: run `cargo build --bins` first", path.display());
    path
}
