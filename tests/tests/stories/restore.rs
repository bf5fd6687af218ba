//! A backup made while the CA serves, a restore, and what the nodes give back: real agents, `ca-admin`,
//! and a lost window in which nodes enrolled, renewed and were revoked. Wants `ca-admin` in the target
//! folder.

use std::{os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use ca_server::{
    check,
    keys::kek::Kek,
    restore::restore,
    store::{Authority, Store as _, records::AuditKind},
};
use raymtls_proto::{
    clock::Clock as _,
    durable::{self, Access},
    v1,
};
use raymtls_tests::{
    ADMIN_SOCKET, Deployment,
    agents::SOON,
    ask, node_leaf,
    programs::{binary, free_ports},
    word,
};
use tokio::{process::Command, runtime::Handle, task::block_in_place, time::Instant};
use x509_parser::prelude::{CertificateRevocationList, FromDer as _};

use crate::host::{Host, renews};

const DAY: Duration = Duration::from_secs(86_400);

async fn says(deployment: &Deployment, line: &str) -> (i32, String) {
    let folder = deployment.folder.path();
    let mut command = Command::new(binary("ca-admin"));
    command.current_dir(folder).arg("--socket").arg(folder.join(ADMIN_SOCKET));
    let output = command.args(line.split_whitespace()).output().await.unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8(text).unwrap())
}

/// Puts the backup in the place of the store, with the test's clock.
async fn restored(deployment: Deployment, backup: &str) -> Deployment {
    let clock = deployment.clock.clone();
    let folder = deployment.folder.path().to_owned();
    let (from, kek) = (folder.join(backup), folder.join("kek"));
    deployment
        .restart_after(|dir| {
            std::fs::remove_dir_all(dir).unwrap();
            let mut progress = |_| ();
            let back = restore(&from, dir, &kek, &clock, &mut progress);
            let back = block_in_place(|| Handle::current().block_on(back)).unwrap();
            assert!(back.pairs > 10 && back.audit_records > 5, "{back:?}");
        })
        .await
}

async fn until(deployment: &Deployment, what: &str, is_so: impl Fn(&serde_json::Value) -> bool) {
    let end = Instant::now() + SOON;
    loop {
        let (code, json) = says(deployment, "-o json restore show").await;
        assert_eq!(code, 0, "{json}");
        let said: serde_json::Value = serde_json::from_str(&json).unwrap();
        if is_so(&said) {
            return;
        }
        assert!(Instant::now() < end, "never {what}: {json}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn control_crl(deployment: &Deployment) -> (u64, Vec<Vec<u8>>) {
    let control = deployment.ca.authority(&Authority::Control).unwrap();
    let (_, crl) = CertificateRevocationList::from_der(&control.crls_der()[1]).unwrap();
    let number = crl.crl_number().and_then(|number| u64::try_from(number).ok()).unwrap();
    (number, crl.iter_revoked_certificates().map(|one| one.raw_serial().to_vec()).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_goes_on_after_a_restore_and_who_was_revoked_in_the_lost_window_stays_so() {
    let mut deployment = Deployment::start().await;
    deployment.cluster("c1", 20 * DAY).await;
    let same = Host::enroll(&deployment, "same", "10.0.0.1", false).await;
    let renewed = Host::enroll(&deployment, "renewed", "10.0.0.2", false).await;
    let thief = Host::enroll(&deployment, "thief", "10.0.0.3", false).await;
    let old_token = deployment
        .token_with(v1::CreateTokenRequest {
            cluster: "c1".to_owned(),
            role: v1::Role::Worker.into(),
            uses: 5,
            ttl_seconds: 7 * 86_400,
            any_address: true,
            ..v1::CreateTokenRequest::default()
        })
        .await;
    let (code, text) = says(&deployment, "backup --out backup").await;
    assert!(code == 0 && text.contains("records"), "{text}");
    let path = deployment.folder.path().join("backup");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(says(&deployment, "backup --out backup").await.0, 1, "a file was replaced");

    // The lost window.
    deployment.clock.advance(DAY * 2 / 3);
    let agents = [same.start(&deployment), renewed.start(&deployment)];
    for agent in &agents {
        agent.until("in touch", |status| status.ca.reachable == Some(true)).await;
    }
    renews(&agents[1]).await.unwrap();
    let late = Host::enroll(&deployment, "late", "10.0.0.4", false).await;
    let taken = Host::enroll(&deployment, "taken", "10.0.0.5", false).await;
    for name in ["thief", "taken"] {
        deployment.revoke("c1", name).await;
    }
    let before = control_crl(&deployment);
    assert_eq!(before.1.len(), 2);
    let version = deployment.store.cluster("c1".parse().unwrap()).await.unwrap().version;
    for agent in &agents {
        agent
            .until("told of all", |status| {
                status.received.as_ref().is_some_and(|v| v.ends_with(&format!("/{version}")))
            })
            .await;
    }
    same.saw_newest(&deployment).await;
    for agent in agents {
        agent.stop().await;
    }
    let epoch = deployment.store.epoch();

    deployment = restored(deployment, "backup").await;
    assert!(deployment.ca.is_restored());
    assert_ne!(deployment.store.epoch(), epoch);
    let hosts = [&same, &renewed, &late];
    let agents = hosts.map(|host| host.start(&deployment));
    let lost = [thief.start(&deployment), taken.start(&deployment)];

    // Nothing but Sync is answered.
    let key = node_agent::keys::PrivateKey::generate().unwrap();
    let request = ask(&old_token, "c1", "new", &["10.0.0.9"], &key);
    let refused = deployment.enrollment_client().enroll(request.clone()).await;
    assert_eq!(word(refused), "CA_RESTORED");
    assert!(renews(&agents[0]).await.unwrap_err().contains("CA_RESTORED"));
    let (code, text) = says(&deployment, "token list --cluster c1").await;
    assert_eq!(code, 0, "reading is allowed: {text}");
    for line in
        ["cluster set c1 max-job=19d --yes", "node revoke --cluster c1 same --reason x --yes"]
    {
        let (code, text) = says(&deployment, line).await;
        assert!(code == 2 && text.contains("CA_RESTORED"), "{line}: {text}");
    }

    until(&deployment, "all heard", |said| {
        let done =
            said["notes"].as_array().unwrap().iter().all(|n| !n.to_string().contains("being"));
        said["nodes_heard"] == 5 && said["revocations"].as_array().unwrap().len() >= 4 && done
    })
    .await;
    let alarm = agents[0].until("alarmed", |status| status.audit_log_alarm.is_some()).await;
    assert!(alarm.audit_log_alarm.unwrap().contains("restored from a backup"));
    assert_eq!(
        alarm.received.unwrap().split('/').nth(1).unwrap(),
        version.to_string(),
        "it lost news"
    );
    let (code, text) = says(&deployment, "restore accept").await;
    assert!(code == 64 && text.contains("--yes"), "{text}");
    let (code, text) = says(&deployment, "restore accept --yes").await;
    assert_eq!(code, 0, "{text}");
    for (node, how) in [("renewed", "older identity"), ("late", "yes"), ("taken", "revoked after")]
    {
        let line = text.lines().rev().find(|line| line.starts_with(node)).unwrap_or_default();
        assert!(line.contains(how), "{node}: {text}");
    }
    assert!(text.contains("node thief of cluster c1 is revoked"), "{text}");
    assert!(!deployment.ca.is_restored());

    // Who was there goes on, with nothing enrolled again.
    for agent in &agents {
        let status = agent
            .until("served", |s| {
                s.audit_log_alarm.is_none()
                    && s.received.as_ref().is_some_and(|v| !v.starts_with(&format!("{epoch:016x}")))
            })
            .await;
        assert_eq!(status.standing, "enrolled");
        renews(agent).await.unwrap();
    }
    for (name, address) in [("renewed", "10.0.0.2"), ("late", "10.0.0.4")] {
        let node = deployment.node("c1", name).await;
        assert_eq!(node.state(), v1::NodeState::Live);
        assert_eq!(node.addresses[0].address, address);
    }
    // Who was revoked stays so.
    assert_eq!(deployment.node("c1", "thief").await.state(), v1::NodeState::Revoked);
    for agent in &lost {
        agent.until("refused", |status| status.standing != "enrolled").await;
        assert!(renews(agent).await.is_err());
    }
    let after = control_crl(&deployment);
    assert!(after.0 > before.0, "CRL number {} after {}", after.0, before.0);
    assert!(before.1.iter().all(|serial| after.1.contains(serial)), "a revocation is lost");
    // Tokens of the backup are void, and new ones are good.
    let refused = deployment.enrollment_client().enroll(request).await;
    assert_eq!(word(refused), "TOKEN_REVOKED");
    let new = deployment.worker("c1", "new", "10.0.0.9").await;
    new.client.issue_leaf(node_leaf(&key)).await.unwrap();

    let kinds: Vec<_> = deployment.audit_log().await.iter().map(|record| record.kind()).collect();
    for kind in [
        AuditKind::BackupMade,
        AuditKind::Restored,
        AuditKind::RestoreAccepted,
        AuditKind::NodeAdopted,
        AuditKind::RevocationsTakenBack,
    ] {
        assert!(kinds.contains(&kind), "{kind:?} is not on record");
    }
    for agent in agents.into_iter().chain(lost) {
        agent.stop().await;
    }
    let (folder, now) = (deployment.folder.path().to_owned(), deployment.clock.now());
    deployment.store.verify_audit_chain().await.unwrap();
    deployment.stop().await;
    drop((deployment.ca, deployment.store));
    holds(&folder, now);
}

fn holds(folder: &Path, now: time::OffsetDateTime) {
    let options = check::Options {
        dir: folder.join("ca"),
        scratch: None,
        kek_file: Some(folder.join("kek")),
        now_ms: ca_server::store::unix_ms(now),
    };
    let report = check::check(&options, &mut |_| ()).unwrap();
    assert_eq!(report.findings_total, 0, "{}", report.text());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_restores_into_an_empty_folder_alone_and_with_its_own_key_alone() {
    let mut deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let (code, text) = says(&deployment, "backup --out backup").await;
    assert_eq!(code, 0, "{text}");
    let (folder, clock) = (deployment.folder.path().to_owned(), deployment.clock.clone());
    let from = folder.join("backup");
    let back = async |dir: &str, kek: &str| {
        let (dir, kek) = (folder.join(dir), folder.join(kek));
        restore(&from, &dir, &kek, &clock, &mut |_| ()).await.map(drop).map_err(|e| e.to_string())
    };
    let error = back("ca", "kek").await.unwrap_err();
    assert!(error.contains("holds a CA already"), "{error}");
    Kek::create(&folder.join("other")).unwrap();
    let error = back("elsewhere", "other").await.unwrap_err();
    assert!(error.contains("not the key-encryption key"), "{error}");
    assert!(!folder.join("elsewhere/store").exists(), "something was made");
    back("elsewhere", "kek").await.unwrap();
    let bytes = std::fs::read(&from).unwrap();
    assert!(!bytes.windows(11).any(|part| part == b"ray.example"), "it can be read");
    deployment.stop().await;
}

/// A machine with all three programs.
struct Machine {
    folder: tempfile::TempDir,
    running: Vec<tokio::process::Child>,
}

impl Machine {
    fn command(&self, line: &str) -> Command {
        let mut words = line.split_whitespace();
        let mut command = Command::new(binary(words.next().unwrap()));
        command.current_dir(self.folder.path()).args(words).kill_on_drop(true);
        command
    }

    async fn run(&self, line: &str) -> (bool, String) {
        let output = self.command(line).output().await.unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(text).unwrap())
    }

    async fn must(&self, line: &str) -> String {
        let (done, text) = self.run(line).await;
        assert!(done, "{line}: {text}");
        text
    }

    /// Runs it until it says what it must.
    async fn until(&self, line: &str, is_so: impl Fn(&str) -> bool) -> String {
        let end = Instant::now() + 3 * SOON;
        loop {
            let (_, text) = self.run(line).await;
            if is_so(&text) {
                return text;
            }
            assert!(Instant::now() < end, "{line}: {text}\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    fn start(&mut self, line: &str) {
        let log = self.folder.path().join("log");
        let log = std::fs::File::options().create(true).append(true).open(log).unwrap();
        let child = self.command(line).stdout(log.try_clone().unwrap()).stderr(log).spawn();
        self.running.push(child.unwrap());
    }

    async fn serve(&mut self) {
        self.start("ca-server serve --dir ca --config config.toml");
        self.until("ca-admin --socket admin.sock cluster list", |text| !text.contains("error"))
            .await;
    }

    async fn enroll(&mut self, name: &str, address: &str) {
        let token =
            "ca-admin --socket admin.sock token create --cluster c1 --role worker --any-address";
        self.must(&format!("{token} --out {name}.join")).await;
        let folders = format!("--state-dir {name}.state --tls-dir {name}.tls");
        let who = format!("--name {name} --address {address} --join {name}.join");
        self.must(&format!("node-agent enroll {who} {folders}")).await;
        self.start(&format!("node-agent run {folders} --socket {name}.sock --http-listen off"));
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

#[tokio::test]
async fn the_programs_back_up_restore_and_go_on_with_a_node_that_the_backup_does_not_know() {
    let mut machine = Machine { folder: tempfile::tempdir().unwrap(), running: Vec::new() };
    let [enrollment, node, http] = free_ports();
    let config = format!(
        "kek_file = \"kek\"\nenrollment_listen = \"{enrollment}\"\nnode_listen = \"{node}\"\n\
         http_listen = \"{http}\"\nadmin_socket = \"admin.sock\"\n\
         enrollment_endpoints = [\"{enrollment}\"]\nnode_endpoints = [\"{node}\"]\n"
    );
    let path = machine.folder.path().join("config.toml");
    durable::create(&path, config.as_bytes(), Access::PRIVATE).unwrap();
    machine.must("ca-server init --dir ca --kek-file kek").await;
    machine.serve().await;
    let admin = "ca-admin --socket admin.sock";
    machine.must(&format!("{admin} cluster create c1 --max-job 2h")).await;
    machine.enroll("n1", "10.0.0.1").await;
    machine.must(&format!("{admin} backup --out backup")).await;
    machine.enroll("n2", "10.0.0.2").await;
    machine.until("node-agent status --socket n2.sock", |text| text.contains("n2")).await;

    machine.running.remove(0).kill().await.unwrap();
    std::fs::rename(machine.folder.path().join("ca"), machine.folder.path().join("lost")).unwrap();
    let text = machine.must("ca-server restore --from backup --dir ca --kek-file kek").await;
    assert!(text.contains("only Sync is answered"), "{text}");
    machine.must("ca-server check --dir ca --kek-file kek").await;
    let (done, text) = machine.run("ca-server restore --from backup --dir ca --kek-file kek").await;
    assert!(!done && text.contains("holds a CA already"), "{text}");
    machine.serve().await;
    let said =
        machine.until(&format!("{admin} restore show"), |text| text.contains("2 called")).await;
    assert!(said.contains("n2"), "{said}");
    let (done, text) = machine.run("node-agent renew --socket n1.sock").await;
    assert!(!done, "{text}");
    let text = machine.must(&format!("{admin} restore accept --yes")).await;
    assert!(text.contains("10.0.0.2"), "{text}");
    for name in ["n1", "n2"] {
        machine
            .until(&format!("node-agent renew --socket {name}.sock"), |text| text.contains("k1"))
            .await;
        let shown = machine.must(&format!("{admin} node show --cluster c1 {name}")).await;
        assert!(shown.contains("live") && !shown.contains("ALARM"), "{shown}");
    }
    machine.enroll("n3", "10.0.0.3").await;
}
