//! The audit log's checkpoints: real agents keep them, and find out that a store was edited behind its
//! CA, or put back; they go on renewing, unless they are told not to.

use std::{path::Path, time::Duration};

use ca_server::store::{
    Store as _, layout,
    records::{AuditHead, AuditRecord},
    sled::SledEngine,
    view::{Engine as _, Reader as _, Writes, audit_hash},
};
use prost::Message as _;
use raymtls_proto::{checkpoint, durable, v1};
use raymtls_tests::{Deployment, agents::SOON};

use crate::host::{Host, renews};

const DAY: Duration = Duration::from_secs(86_400);

fn alarms(deployment: &Deployment, witness: &str) -> u64 {
    let (metrics, log_fault) = (&deployment.ca.metrics, deployment.ca.log_fault());
    metrics.audit_log_alarms(log_fault.is_some(), deployment.ca.contacts.log_alarms());
    let line = format!("raymtls_ca_audit_log_alarms{{witness=\"{witness}\"}} ");
    metrics.text().lines().find_map(|l| l.strip_prefix(&line)?.parse().ok()).unwrap()
}

async fn until_node(deployment: &Deployment, name: &str, is_so: impl Fn(&v1::Node) -> bool) {
    let until = tokio::time::Instant::now() + SOON;
    loop {
        let node = deployment.node("c1", name).await;
        if is_so(&node) {
            return;
        }
        assert!(tokio::time::Instant::now() < until, "{node:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn copy(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let (path, target) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        if path.is_dir() { copy(&path, &target) } else { drop(std::fs::copy(path, target)) }
    }
    durable::make_folder(to, durable::Access { mode: 0o700, ..durable::Access::PRIVATE }).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_store_put_back_is_an_alarm_on_each_node_and_stops_none_but_a_strict_one() {
    let saved = tempfile::tempdir().unwrap();
    let saved = saved.path().join("store");
    let mut deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let lax = Host::enroll(&deployment, "w1", "10.0.0.1", false).await;
    let strict = Host::enroll(&deployment, "w2", "10.0.0.2", true).await;
    let agents = [lax.start(&deployment), strict.start(&deployment)];
    for agent in &agents {
        agent.until("in touch", |status| status.ca.reachable == Some(true)).await;
    }
    renews(&agents[1]).await.expect("a strict agent renews while the log holds");
    deployment = deployment.restart_after(|dir| copy(&dir.join("store"), &saved)).await;
    for agent in agents {
        agent.stop().await;
    }

    let agents = [lax.start(&deployment), strict.start(&deployment)];
    deployment.token("c1", v1::Role::Worker, 1).await;
    let kept = lax.saw_newest(&deployment).await;
    strict.saw_newest(&deployment).await;
    let root = deployment.ca.authority(&ca_server::store::Authority::Control).unwrap();
    checkpoint::check(&kept, [root.root_der.as_slice()]).unwrap();
    until_node(&deployment, "w1", |node| node.log_checkpoint >= kept.index).await;
    assert_eq!((alarms(&deployment, "node"), alarms(&deployment, "store")), (0, 0));

    for agent in agents {
        agent.stop().await;
    }
    deployment = deployment.restart_after(|dir| copy(&saved, &dir.join("store"))).await;
    let agents = [lax.start(&deployment), strict.start(&deployment)];
    for agent in &agents {
        let status = agent.until("alarmed", |status| status.audit_log_alarm.is_some()).await;
        let why = status.audit_log_alarm.unwrap();
        assert!(why.contains("older state was put back"), "{why}");
        assert!(status.problems.contains(&why));
    }
    until_node(&deployment, "w1", |node| {
        let says = node
            .report
            .as_ref()
            .is_some_and(|report| report.log_alarm() == v1::LogAlarm::RolledBack);
        node.log_alarm() == v1::LogAlarm::RolledBack && says
    })
    .await;
    until_node(&deployment, "w2", |node| node.log_alarm() == v1::LogAlarm::RolledBack).await;
    assert_eq!((alarms(&deployment, "node"), alarms(&deployment, "store")), (2, 0));
    renews(&agents[0]).await.expect("an agent goes on renewing");
    let refused = renews(&agents[1]).await.unwrap_err();
    assert!(refused.contains("strict_audit_log"), "{refused}");
    assert_eq!(lax.kept(), Some(kept), "the proof was given up");
    for agent in agents {
        agent.stop().await;
    }
    deployment.stop().await;
}

/// Changes a record and computes every hash after it again, as who can write the store would.
fn edit(dir: &Path, index: u64) {
    let mut engine = SledEngine::open(&dir.join("store")).unwrap();
    let mut writes = Writes::new();
    let mut hash: Option<Vec<u8>> = None;
    let head = engine.get(layout::AUDIT_HEAD).unwrap().unwrap();
    let head = AuditHead::decode(head.as_slice()).unwrap();
    for at in index..=head.index {
        let value = engine.get(&layout::audit(at)).unwrap().unwrap();
        let mut record = AuditRecord::decode(value.as_slice()).unwrap();
        match hash {
            None => record.actor = "uid:4711".to_owned(),
            Some(hash) => record.previous_hash = hash,
        }
        let value = record.encode_to_vec();
        hash = Some(audit_hash(&value).to_vec());
        writes.insert(layout::audit(at), Some(value));
    }
    let head = AuditHead { hash: hash.unwrap(), ..head };
    writes.insert(layout::AUDIT_HEAD.to_vec(), Some(head.encode_to_vec()));
    engine.commit(&writes).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_edited_behind_its_ca_is_found_by_its_own_checkpoint_and_by_each_node() {
    let mut deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let host = Host::enroll(&deployment, "w1", "10.0.0.1", false).await;
    let agent = host.start(&deployment);
    let kept = host.saw_newest(&deployment).await;
    agent.stop().await;
    // The chain holds in itself, and its head is right.
    deployment = deployment.restart_after(|dir| edit(dir, 2)).await;
    deployment.store.verify_audit_chain().await.unwrap();
    assert_eq!(deployment.ca.log_fault(), Some(v1::LogAlarm::OtherRecord));
    let agent = host.start(&deployment);
    let status = agent.until("alarmed", |status| status.audit_log_alarm.is_some()).await;
    assert!(status.audit_log_alarm.unwrap().contains("another record"));
    until_node(&deployment, "w1", |node| node.log_alarm() == v1::LogAlarm::OtherRecord).await;
    assert_eq!((alarms(&deployment, "node"), alarms(&deployment, "store")), (1, 1));
    renews(&agent).await.expect("an agent goes on renewing");
    // Nothing vouches for the log from here on, and the proof in the store stays.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let state = deployment.store.audit_state().await.unwrap();
    assert!(state.newest_index > kept.index);
    assert_eq!(state.checkpoint.unwrap().hash, kept.hash);
    agent.stop().await;
    deployment.stop().await;
}

#[tokio::test]
async fn a_checkpoint_that_this_ca_did_not_sign_accuses_nobody() {
    let mut deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let member = deployment.worker("c1", "w1", "10.0.0.1").await;
    let other = Deployment::start().await;
    other.cluster("c1", DAY).await;
    let sync = async |checkpoint: Option<v1::Checkpoint>| {
        let request = v1::SyncRequest { checkpoint, ..v1::SyncRequest::default() };
        member.client.sync(request).await.unwrap().log.unwrap()
    };
    let good = loop {
        if let Some(newest) = sync(None).await.newest.filter(|newest| newest.index > 2) {
            break newest;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let told = sync(Some(good.clone())).await;
    assert_eq!(told.hash_at, good.hash);
    let forged = v1::Checkpoint { hash: vec![7; 32], ..good.clone() };
    sync(Some(forged)).await;
    assert_eq!(deployment.node("c1", "w1").await.log_alarm(), v1::LogAlarm::Unspecified);
    assert_eq!(alarms(&deployment, "node"), 0);
    // One that it did sign, for another log, does.
    let ca = &deployment.ca;
    let fork = ca_server::checkpoints::sign(ca, good.index, vec![7; 32]).unwrap();
    sync(Some(fork)).await;
    assert_eq!(deployment.node("c1", "w1").await.log_alarm(), v1::LogAlarm::OtherRecord);
    assert_eq!(alarms(&deployment, "node"), 1);
    sync(Some(good)).await;
    assert_eq!(alarms(&deployment, "node"), 0, "it holds again");
    deployment.stop().await;
}
