//! The audit log as operators and reviewers use it: shown, followed, exported, verified by the real
//! `ca-admin`; and who is told of which records. Wants `ca-admin` in the target folder.

use std::{process::Output, time::Duration};

use ca_server::admin::{Operator, audit, watches::Watches};
use prost::Message as _;
use raymtls_proto::{
    clock::Clock as _,
    durable::{self, Access},
    v1::{self, AuditKind, AuditRecord},
};
use raymtls_tests::{ADMIN_SOCKET, Deployment, programs::binary};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Command,
    time::timeout,
};

const DAY: Duration = Duration::from_secs(86_400);

fn ca_admin(deployment: &Deployment, line: &str) -> Command {
    let folder = deployment.folder.path();
    let mut command = Command::new(binary("ca-admin"));
    command.current_dir(folder).arg("--socket").arg(folder.join(ADMIN_SOCKET));
    command.args(line.split_whitespace()).kill_on_drop(true);
    command
}

async fn says(deployment: &Deployment, line: &str) -> (i32, String) {
    let output: Output = ca_admin(deployment, line).output().await.unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8(text).unwrap())
}

#[tokio::test]
async fn the_log_is_shown_by_filter_followed_exported_and_verified_elsewhere() {
    let mut deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    deployment.cluster("c2", DAY).await;
    deployment.worker("c1", "w1", "10.0.0.1").await;
    deployment.worker("c2", "w2", "10.0.0.2").await;
    deployment.revoke("c1", "w1").await;
    let log = deployment.audit_log().await;

    let (code, all) = says(&deployment, "log show").await;
    assert_eq!((code, all.lines().count()), (0, log.len()), "{all}");
    for (filter, wanted) in [
        ("--cluster c1", log.iter().filter(|r| r.cluster == "c1").count()),
        ("--node w2", log.iter().filter(|r| r.node == "w2").count()),
        ("--kind enrolled", 2),
        ("--actor uid:0 --kind node-revoked", 1),
        ("--cluster c1 --kind enrolled --since 1h", 1),
        ("--limit 3", 3),
    ] {
        let (code, text) = says(&deployment, &format!("log show {filter}")).await;
        assert_eq!((code, text.lines().count()), (0, wanted), "{filter}: {text}");
    }
    let enrolled = log.iter().find(|record| record.kind() == AuditKind::Enrolled).unwrap();
    let serial = hex::encode(&enrolled.serial);
    let (_, json) = says(&deployment, &format!("-o json log show --serial {serial}")).await;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["records"][0]["node"], "w1");
    assert_eq!(says(&deployment, "log show --cluster nowhere").await.0, 2);

    let mut follows = ca_admin(&deployment, "log show --cluster c2 --follow --limit 1");
    let mut follows = follows.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(follows.stdout.take().unwrap()).lines();
    let mut next = async || timeout(Duration::from_secs(20), lines.next_line()).await.unwrap();
    next().await.unwrap().expect("what there is comes first");
    deployment.token("c1", v1::Role::Worker, 1).await;
    deployment.token("c2", v1::Role::Worker, 1).await;
    let line = next().await.unwrap().unwrap();
    assert!(line.contains("token-created") && line.contains("cluster=c2"), "{line}");
    follows.kill().await.unwrap();

    let count = deployment.audit_log().await.len();
    let (code, text) = says(&deployment, "log export --out a.jsonl").await;
    assert!(code == 0 && text.contains(&format!("records 1 to {count}")), "{text}");
    deployment.revoke("c2", "w2").await;
    let (code, text) =
        says(&deployment, &format!("log export --after {count} --out b.jsonl")).await;
    assert!(code == 0 && text.contains(&format!("records {} to", count + 1)), "{text}");
    let (code, text) = says(&deployment, "log export --out a.jsonl").await;
    assert!(code == 1 && text.contains("never replaces"), "{text}");
    let (code, text) = says(&deployment, "log export --after 99999 --out c.jsonl").await;
    assert!(code == 64 && text.contains("the log ends at"), "{text}");
    deployment.stop().await;

    let folder = deployment.folder.path().to_owned();
    for file in ["a.jsonl", "b.jsonl"] {
        let (code, text) = says(&deployment, &format!("log verify {file}")).await;
        assert!(code == 0 && text.starts_with("holds: "), "{file}: {text}");
    }
    let good = std::fs::read_to_string(folder.join("a.jsonl")).unwrap();
    let changed = good.replacen("uid:0", "uid:1", 1);
    durable::create(&folder.join("bad.jsonl"), changed.as_bytes(), Access::PRIVATE).unwrap();
    let (code, text) = says(&deployment, "log verify bad.jsonl").await;
    assert!(code == 1 && text.contains("changed: its line says something else"), "{text}");
    let (code, json) = says(&deployment, "-o json log verify a.jsonl").await;
    assert!(code == 0 && json.contains("\"faults_total\": 0"), "{json}");
    // The second file goes on where the first ended.
    let last: serde_json::Value = serde_json::from_str(good.lines().last().unwrap()).unwrap();
    let second = std::fs::read_to_string(folder.join("b.jsonl")).unwrap();
    let first: serde_json::Value = serde_json::from_str(second.lines().next().unwrap()).unwrap();
    assert_eq!(first["previous_sha256"], last["last_sha256"]);
}

#[tokio::test]
async fn old_records_are_pruned_up_to_a_checkpoint_and_the_rest_is_verified_from_there() {
    let mut deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    deployment.worker("c1", "w1", "10.0.0.1").await;
    let old = deployment.audit_log().await.len();
    let root = deployment.ca.authority(&ca_server::store::Authority::Control).unwrap();
    let root = raymtls_proto::bundle::certificates_to_pem(std::slice::from_ref(&root.root_der));
    let folder = deployment.folder.path().to_owned();
    durable::create(&folder.join("root.pem"), root.as_bytes(), Access::PRIVATE).unwrap();
    let (code, text) = says(&deployment, "log export --out all.jsonl").await;
    assert_eq!(code, 0, "{text}");

    let (code, text) = says(&deployment, "log prune --before 30d --yes").await;
    assert!(code == 2 && text.contains("31 days"), "{text}");
    // The CA's clock goes on; ca-admin's words are absolute.
    deployment.clock.advance(40 * DAY);
    deployment.cluster("c2", DAY).await;
    let before = (deployment.clock.now() - 32 * DAY).date();
    let (code, text) = says(&deployment, &format!("log prune --before {before} --dry-run")).await;
    assert!(code == 0 && text.contains("would be removed"), "{text}");
    assert!(deployment.audit_log().await.len() > old, "a dry run removed something");
    let (code, text) = says(&deployment, &format!("log prune --before {before} --yes")).await;
    assert!(code == 0 && text.contains(&format!("{} records removed", old - 1)), "{text}");
    assert!(text.contains(&format!("begins at record {old},")), "{text}");
    assert_eq!(deployment.audit_log().await.first().unwrap().index, old as u64);
    deployment.store.verify_audit_chain().await.unwrap();
    let (code, text) = says(&deployment, "log show --kind log-pruned").await;
    assert!(code == 0 && text.contains(&format!("records 1 to {}", old - 1)), "{text}");

    let (code, text) = says(&deployment, "log export --out rest.jsonl").await;
    assert!(code == 0 && text.contains(&format!("records 1 to {} were pruned", old - 1)), "{text}");
    deployment = deployment.restart().await;
    deployment.store.verify_audit_chain().await.unwrap();
    deployment.stop().await;
    for file in ["all.jsonl", "rest.jsonl"] {
        let (code, text) = says(&deployment, &format!("log verify --root root.pem {file}")).await;
        assert!(code == 0 && text.contains("signed checkpoint of record"), "{file}: {text}");
    }
    // The second goes on at the record that the first ended with, or holds it still.
    let rest = std::fs::read_to_string(folder.join("rest.jsonl")).unwrap();
    let kept = rest.lines().nth(1).unwrap();
    let all = std::fs::read_to_string(folder.join("all.jsonl")).unwrap();
    assert!(all.lines().any(|line| line == kept), "{kept}");
    drop(deployment.store);
    drop(deployment.ca);
    let options = ca_server::check::Options {
        dir: folder.join("ca"),
        scratch: None,
        kek_file: Some(folder.join("kek")),
        now_ms: 0,
    };
    let report = ca_server::check::check(&options, &mut |_| ()).unwrap();
    assert_eq!(report.audit_first, old as u64, "{}", report.text());
    assert!(!report.findings.iter().any(|f| f.at.contains("audit")), "{}", report.text());
}

#[tokio::test]
async fn a_viewer_is_told_of_the_records_of_its_clusters_alone() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    deployment.cluster("c2", DAY).await;
    deployment.worker("c1", "w1", "10.0.0.1").await;
    deployment.worker("c2", "w2", "10.0.0.2").await;
    let viewer = Operator {
        actor: "admin:eve".to_owned(),
        role: v1::AdminRole::Viewer,
        clusters: vec!["c1".to_owned()],
    };
    let waits = std::sync::Arc::new(Watches::default());
    let ask = async |operator: &Operator, request: v1::ListAuditRequest| {
        audit::list(&deployment.ca, operator, &waits, request).await
    };
    let of = |cluster: &str| v1::ListAuditRequest {
        cluster: cluster.to_owned(),
        limit: 1_000,
        ..v1::ListAuditRequest::default()
    };
    let told = ask(&viewer, of("c1")).await.unwrap();
    let told: Vec<_> =
        told.records.iter().map(|stored| AuditRecord::decode(&stored[..]).unwrap()).collect();
    assert!(told.iter().any(|record| record.kind() == AuditKind::Enrolled));
    assert!(told.iter().all(|record| record.cluster == "c1"), "{told:?}");
    for other in ["c2", ""] {
        let refused = ask(&viewer, of(other)).await.unwrap_err().to_string();
        assert!(refused.contains("not in charge"), "{other:?}: {refused}");
    }
    let all = ask(&deployment.operator, of("")).await.unwrap();
    assert_eq!(all.records.len(), deployment.audit_log().await.len());

    let follow = |wait_seconds| v1::ListAuditRequest { cursor: all.next, wait_seconds, ..of("") };
    let began = tokio::time::Instant::now();
    let nothing = ask(&deployment.operator, follow(1)).await.unwrap();
    assert!(nothing.records.is_empty() && began.elapsed() >= Duration::from_secs(1));
    let mut taken: Vec<_> = std::iter::from_fn(|| waits.begin(&deployment.operator).ok()).collect();
    assert!(!taken.is_empty());
    // One turn is left for the operator.
    taken.pop();
    let waiting = ask(&deployment.operator, follow(20));
    let refused = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let refused = ask(&deployment.operator, follow(20)).await.map(drop);
        deployment.token("c1", v1::Role::Worker, 1).await;
        refused
    };
    let (woken, refused) = tokio::join!(waiting, refused);
    assert_eq!(woken.unwrap().records.len(), 1);
    assert!(refused.unwrap_err().to_string().contains("as many commands"));
    let odd = [
        v1::ListAuditRequest { kind: 99, ..of("") },
        v1::ListAuditRequest { serial: vec![1; 15], ..of("") },
        v1::ListAuditRequest { newest_first: true, wait_seconds: 1, ..of("") },
        v1::ListAuditRequest { actor: "x".repeat(600), ..of("") },
    ];
    for request in odd {
        assert!(ask(&deployment.operator, request.clone()).await.is_err(), "{request:?}");
    }
    deployment.finish().await;
}
