//! The audit log as operators and reviewers use it: shown, followed, exported, verified by the real
//! `ca-admin`; and who is told of which records. Wants `ca-admin` in the target folder.

use std::{process::Output, time::Duration};

use ca_server::admin::{Operator, audit, watches::Watches};
use prost::Message as _;
use raymtls_proto::{
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
