//! What the real programs say to files that are cut short, of somebody else, of another release or
//! mistyped: an exit code that a script can tell apart, and words that say what to do. Wants
//! `ca-server`, `ca-admin` and `node-agent` in the target folder.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use ca_server::{
    init,
    store::{
        FORMAT, Store, layout,
        records::Header,
        sled::SledEngine,
        view::{Engine, Reader, Writes},
    },
};
use prost::Message;
use raymtls_proto::{
    clock::SettableClock,
    durable::{self, Access},
    v1,
};
use raymtls_tests::{ADMIN_SOCKET, Deployment, TRUST_DOMAIN};
use time::OffsetDateTime;

const DAY: Duration = Duration::from_secs(86_400);

/// sysexits(3).
const USAGE: i32 = 64;
const CONFIG: i32 = 78;

#[tokio::test]
async fn a_join_file_that_is_not_whole_or_not_ours_enrols_nobody() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let other = Deployment::start().await;
    other.cluster("c1", DAY).await;
    let folder = deployment.folder.path();
    let token = deployment.token("c1", v1::Role::Worker, 1).await;
    deployment.write_join("c1", &token, &folder.join("good"));
    let good = std::fs::read_to_string(folder.join("good")).unwrap();
    // The other CA's roots with our endpoints, and the other way round.
    let foreign_token = other.token("c1", v1::Role::Worker, 1).await;
    other.write_join("c1", &foreign_token, &folder.join("foreign"));
    let foreign = std::fs::read_to_string(folder.join("foreign")).unwrap();
    let at_us = foreign
        .replace(&other.enrollment.to_string(), &deployment.enrollment.to_string())
        .replace(&other.nodes.to_string(), &deployment.nodes.to_string());
    let secret = token.split('.').nth(1).unwrap();
    let cut = "cut short";
    let rows: Vec<(&str, String, i32, &str)> = vec![
        ("empty", String::new(), CONFIG, cut),
        ("cut in the token", good[..good.find(secret).unwrap() + 9].to_owned(), CONFIG, cut),
        ("cut in the root", good[..good.len() - 40].to_owned(), CONFIG, cut),
        ("a root less", good.replace("BEGIN CERT", "BEGIN CART"), CONFIG, cut),
        ("too large", format!("{good}#{}\n", "x".repeat(1 << 20)), CONFIG, "plain file of at most"),
        ("another format", good.replace("format = 1", "format = 2"), CONFIG, "upgrade"),
        ("an unknown key", format!("colour = 1\n{good}"), CONFIG, cut),
        ("not text", "\u{0}".repeat(300), CONFIG, cut),
        ("another CA's root", at_us, 1, "join file"),
        ("a token of another CA", good.replace(&token, &foreign_token), 2, "TOKEN_UNKNOWN"),
    ];
    let before = deployment.held().await;
    for (what, text, code, says) in rows {
        let output = enrol(folder, &text).await;
        let said = said(&output);
        assert_eq!(output.status.code(), Some(code), "{what}: {said}");
        assert!(said.contains(says), "{what}: {said}");
        assert!(!said.contains(&secret[..8]), "{what}: the token was shown");
        assert!(folder.join("join").exists(), "{what}: the file was taken away");
        assert_eq!(deployment.held().await, before, "{what}");
    }
    // As an editor on another system saves it, the same file is as good.
    let marked = format!("\u{feff}{good}");
    for (what, text) in [("line ends of DOS", good.replace('\n', "\r\n")), ("a BOM", marked)] {
        let output = enrol(folder, &text).await;
        assert_eq!(output.status.code(), Some(0), "{what}: {}", said(&output));
    }
    assert_eq!(deployment.held().await.nodes, before.nodes + 1);
    deployment.finish().await;
    let mut other = other;
    other.stop().await;
}

#[tokio::test]
async fn a_mistyped_configuration_is_named_with_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.toml");
    let rows = [
        ("ca-server", "kek_files = \"/x\"\n", "unknown field `kek_files`"),
        ("ca-server", "\n\nnode_listen = 7444\n", "line 3"),
        ("ca-server", "http_listen = \"0.0.0.0:7446\"\n", "loopback"),
        ("ca-server", "node_endpoints = [\"https://ca:7444\"]\n", "host:port"),
        ("ca-server", "kek_file = \"/x\n", "line 1"),
        ("node-agent", "state_folder = \"/x\"\n", "unknown field `state_folder`"),
        ("node-agent", "http_listen = \"7447\"\n", "7447"),
        ("node-agent", "ray_uid = \"no-such-user\"\n", "no user \"no-such-user\""),
        ("node-agent", "\nlog_format = \"xml\"\n", "line 2"),
    ];
    for (program, text, says) in rows {
        durable::replace(&file, text.as_bytes(), Access::PRIVATE).unwrap();
        let mut command = Command::new(binary(program));
        match program {
            "ca-server" => command.args(["serve", "--dir"]).arg(folder.path().join("ca")),
            _ => command.arg("run"),
        };
        let output = run(command.arg("--config").arg(&file)).await;
        let said = said(&output);
        assert_eq!(output.status.code(), Some(CONFIG), "{text:?}: {said}");
        assert!(said.contains(says), "{text:?}: {said}");
    }
}

#[tokio::test]
async fn a_leaf_life_that_cannot_hold_is_refused_with_the_sum() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let before = deployment.held().await;
    let rows: [(&[&str], i32, &str); 7] = [
        (&["cluster", "create", "c2", "--max-job", "41d"], 2, "2 x max-job = 82d"),
        (&["cluster", "create", "c2", "--max-job", "1m"], 2, "2 x max-job = 2m"),
        (&["cluster", "create", "c2", "--max-life", "1m"], 2, "max-life"),
        // Lengths of time want a unit.
        (&["cluster", "create", "c2", "--max-job", "20"], USAGE, "20d"),
        (&["cluster", "create", "c2", "--max-job", "20 parsecs"], USAGE, "20d"),
        (&["cluster", "set", "c1", "max-job=41d", "--yes"], 2, "2 x max-job = 82d"),
        (&["cluster", "set", "c1", "max-job=20", "--yes"], 2, "20d"),
    ];
    for (arguments, code, says) in rows {
        let mut command = Command::new(binary("ca-admin"));
        command.arg("--socket").arg(deployment.folder.path().join(ADMIN_SOCKET));
        let output = run(command.args(arguments)).await;
        let said = said(&output);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(said.contains(says), "{arguments:?}: {said}");
    }
    assert_eq!(deployment.held().await, before);
    let settings = deployment.store.clusters().await.unwrap().remove(0).settings.unwrap();
    assert_eq!(settings.leaf_life_seconds, 2 * 86_400);
    let mut deployment = deployment;
    deployment.stop().await;
}

#[tokio::test]
async fn a_store_of_a_newer_format_is_refused_and_left_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, kek) = (folder.path().join("ca"), folder.path().join("kek"));
    let clock = SettableClock::new(OffsetDateTime::UNIX_EPOCH + 20_000 * DAY);
    init::init(&dir, &kek, &TRUST_DOMAIN.parse().unwrap(), &clock).await.unwrap();
    let header = |dir: &Path| {
        let engine = SledEngine::open(&init::store_dir(dir)).unwrap();
        Header::decode(engine.get(layout::HEADER).unwrap().unwrap().as_slice()).unwrap()
    };
    let newer = Header { format: FORMAT + 1, ..header(&dir) };
    let mut engine = SledEngine::open(&init::store_dir(&dir)).unwrap();
    let write = (layout::HEADER.to_vec(), Some(newer.encode_to_vec()));
    engine.commit(&Writes::from([write])).unwrap();
    drop(engine);

    let config = folder.path().join("config.toml");
    let text = format!(
        "kek_file = {kek:?}\nadmin_socket = {:?}\nenrollment_listen = \"127.0.0.1:0\"\n\
         node_listen = \"127.0.0.1:0\"\nhttp_listen = \"127.0.0.1:0\"\n",
        folder.path().join(ADMIN_SOCKET)
    );
    durable::replace(&config, text.as_bytes(), Access::PRIVATE).unwrap();
    let mut command = Command::new(binary("ca-server"));
    let output = run(command.args(["serve", "--dir"]).arg(&dir).arg("--config").arg(&config)).await;
    let said = said(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let wanted = format!("the store has format {}, this program reads format {FORMAT}", FORMAT + 1);
    assert!(said.contains(&wanted) && said.contains("upgrade"), "{said}");
    assert_eq!(header(&dir), newer, "it was changed");
}

#[tokio::test]
async fn a_state_folder_of_a_newer_format_is_refused_by_every_command() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let folder = deployment.folder.path();
    let token = deployment.token("c1", v1::Role::Worker, 1).await;
    deployment.write_join("c1", &token, &folder.join("good"));
    let good = std::fs::read_to_string(folder.join("good")).unwrap();
    let output = enrol(folder, &good).await;
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    let node = folder.join("state/node.toml");
    durable::replace(&node, b"format = 2\nmachine = \"w1\"\n", Access::PRIVATE).unwrap();
    let mut command = Command::new(binary("node-agent"));
    command.arg("run").arg("--state-dir").arg(folder.join("state"));
    let output = run(command.arg("--tls-dir").arg(folder.join("tls"))).await;
    let said = said(&output);
    assert_ne!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("it has format 2") && said.contains("upgrade node-agent"), "{said}");
    assert!(folder.join("tls/current/tls.crt").exists(), "its files are there as before");
    deployment.finish().await;
}

async fn enrol(folder: &Path, text: &str) -> Output {
    let join = folder.join("join");
    durable::replace(&join, text.as_bytes(), Access::PRIVATE).unwrap();
    let mut command = Command::new(binary("node-agent"));
    command.args(["enroll", "--name", "w1", "--role", "worker", "--address", "10.0.0.1"]);
    command.args(["--timeout", "5s", "--join"]).arg(&join);
    command.arg("--state-dir").arg(folder.join("state"));
    run(command.arg("--tls-dir").arg(folder.join("tls"))).await
}

async fn run(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let waits = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap());
    tokio::time::timeout(Duration::from_secs(30), waits).await.expect("it goes on").unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned()
}

fn binary(name: &str) -> PathBuf {
    // This test runs from target/PROFILE/deps.
    let path = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join(name);
    assert!(path.exists(), "{} is missing: run `cargo build --bins` first", path.display());
    path
}
