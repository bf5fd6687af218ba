//! How far a revocation reaches, on the real CA: whom it may not hit, who has applied it, a key without
//! its node, a token with its nodes, and the way back.

use std::{sync::Arc, time::Duration};

use ca_server::{
    admin::{certificates, clusters, nodes, tokens},
    enroll,
};
use node_agent::{enroll as agent_enroll, keys::PrivateKey};
use raymtls_proto::{serial::Serial, v1};
use raymtls_tests::{
    Deployment, Member,
    agents::{RunningAgent, config, options},
    ask, node_leaf, socket, word,
};
use tokio::time::timeout;

const DAY: Duration = Duration::from_secs(86_400);
/// What should happen at once happens within this, on a busy machine too.
const SOON: Duration = Duration::from_secs(20);

async fn deployment() -> Deployment {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    deployment
}

/// Enrols a node that calls from `source` and claims `addresses` besides; it is as good as its name.
async fn enrol_from(deployment: &Deployment, name: &str, source: &str, more: &Ask<'_>) {
    let token = deployment
        .token_with(v1::CreateTokenRequest {
            cluster: "c1".to_owned(),
            role: more.role.into(),
            any_address: true,
            shared_address: more.shared,
            ..v1::CreateTokenRequest::default()
        })
        .await;
    let key = PrivateKey::generate().unwrap();
    let request = v1::EnrollRequest {
        role: more.role.into(),
        shared_address: more.shared,
        ..ask(&token, "c1", name, more.addresses, &key)
    };
    enroll::enroll(&deployment.ca, request, source.parse().unwrap()).await.unwrap();
}

#[derive(Clone, Copy)]
struct Ask<'a> {
    role: v1::Role,
    addresses: &'a [&'a str],
    shared: bool,
}

const WORKER: Ask<'_> = Ask { role: v1::Role::Worker, addresses: &[], shared: false };

#[tokio::test]
async fn a_revocation_cuts_off_nobody_but_its_node() {
    let deployment = deployment().await;
    deployment.set("c1", "admin-ranges=10.0.9.0/24").await;
    let head = Ask { role: v1::Role::Head, ..WORKER };
    let shared = Ask { shared: true, ..WORKER };
    let driver = Ask { role: v1::Role::Driver, ..WORKER };
    // The bad one had the head's address certified before the head was there.
    enrol_from(&deployment, "bad-1", "10.0.0.66", &Ask { addresses: &["10.0.0.1"], ..WORKER })
        .await;
    enrol_from(&deployment, "head", "10.0.0.1", &head).await;
    // Host network: several nodes at one address.
    enrol_from(&deployment, "bad-2", "10.0.0.2", &shared).await;
    enrol_from(&deployment, "pod", "10.0.0.2", &shared).await;
    // Behind one address of a NAT.
    enrol_from(&deployment, "bad-3", "10.0.0.3", &driver).await;
    enrol_from(&deployment, "laptop", "10.0.0.3", &driver).await;
    // Among the operators' machines.
    enrol_from(&deployment, "bad-4", "10.0.9.4", &WORKER).await;
    // Its own alone.
    enrol_from(&deployment, "bad-5", "10.0.0.5", &WORKER).await;
    for (name, blocked, spared) in [
        ("bad-1", &["10.0.0.66"][..], &["10.0.0.1: "][..]),
        ("bad-2", &[], &["10.0.0.2: it is also live node pod's"]),
        ("bad-3", &[], &["10.0.0.3: it is also live node laptop's"]),
        ("bad-4", &[], &["10.0.9.4: it lies in the admin range 10.0.9.0/24"]),
        ("bad-5", &["10.0.0.5"], &[]),
    ] {
        let revoked = deployment.revoke("c1", name).await;
        assert_eq!(revoked.blocked_addresses, blocked, "{name}");
        let said = &revoked.spared_addresses;
        assert_eq!(said.len(), spared.len(), "{name}: {said:?}");
        for (said, begins) in said.iter().zip(spared) {
            assert!(said.starts_with(begins), "{name}: {said}");
        }
        // Asked again it says the same of what is cut off.
        assert_eq!(deployment.revoke("c1", name).await.blocked_addresses, blocked, "{name}");
    }
    // An address that is reused is cut off no more.
    deployment.clock.advance(Duration::from_millis(1));
    enrol_from(&deployment, "new", "10.0.0.5", &WORKER).await;
    let worker = deployment.worker("c1", "w1", "10.0.0.7").await;
    let told = worker.client.sync(v1::SyncRequest::default()).await.unwrap().blocks.unwrap();
    let told: Vec<_> = told.blocks.iter().map(|block| block.address.as_str()).collect();
    assert_eq!(told, ["10.0.0.66"]);
    deployment.finish().await;
}

async fn says_applied(member: &Member, version: Option<v1::SyncVersion>, isolation: v1::Isolation) {
    let report = v1::Report {
        received: version,
        applied: version,
        isolation: Some(v1::IsolationReport {
            in_force: isolation.into(),
            sockets_closed: 2,
            ..v1::IsolationReport::default()
        }),
        ..v1::Report::default()
    };
    let request = v1::SyncRequest { report: Some(report), ..v1::SyncRequest::default() };
    member.client.sync(request).await.unwrap();
}

#[tokio::test]
async fn who_has_applied_a_change_is_told_as_it_comes_and_who_has_not_at_the_end() {
    let mut deployment = deployment().await;
    let silent = deployment.worker("c1", "w3", "10.0.0.3").await;
    silent.client.sync(v1::SyncRequest::default()).await.unwrap();
    deployment.clock.advance(Duration::from_secs(30 * 60));
    let first = deployment.worker("c1", "w1", "10.0.0.1").await;
    let second = deployment.worker("c1", "w2", "10.0.0.2").await;
    enrol_from(&deployment, "bad", "10.0.0.9", &WORKER).await;
    let change = deployment.revoke("c1", "bad").await.change;
    let version = change.and_then(|change| change.version);
    let mut admin = socket::admin(&deployment).await;
    let ask = |change, wait_seconds| v1::WatchAppliedRequest {
        cluster: "c1".to_owned(),
        change,
        wait_seconds,
    };

    // A node's words go into logs and notes: none turns the line round.
    let mut turned = v1::Report::default();
    turned.isolation.get_or_insert_default().problem = "\u{202e}fine".to_owned();
    let turned = v1::SyncRequest { report: Some(turned), ..v1::SyncRequest::default() };
    assert_eq!(word(first.client.sync(turned).await), "REQUEST_INVALID");

    let mut answers = admin.watch_applied(ask(change, 30)).await.unwrap().into_inner();
    let mut at_first = Vec::new();
    for _ in 0..3 {
        let answer = answers.message().await.unwrap().unwrap();
        at_first.push((answer.node, answer.applied, answer.expected));
    }
    let told = |node: &str, expected| (node.to_owned(), false, expected);
    assert_eq!(at_first, [told("w1", true), told("w2", true), told("w3", false)]);
    deployment.clock.advance(Duration::from_millis(70));
    says_applied(&second, version, v1::Isolation::Enforce).await;
    let answer = timeout(SOON, answers.message()).await.unwrap().unwrap().unwrap();
    assert_eq!((answer.node.as_str(), answer.applied), ("w2", true));
    assert_eq!(answer.milliseconds, 70, "by the server's clock");
    assert_eq!(answer.isolation.unwrap().sockets_closed, 2);
    says_applied(&first, version, v1::Isolation::Off).await;
    let answer = timeout(SOON, answers.message()).await.unwrap().unwrap().unwrap();
    assert_eq!((answer.node.as_str(), answer.applied), ("w1", true));
    let end = timeout(SOON, answers.message()).await.expect("it waits for who is silent");
    assert_eq!(end.unwrap(), None);

    // A wait that is over ends without who is missing.
    let change = nodes_change(&deployment).await;
    let mut answers = admin.watch_applied(ask(Some(change), 1)).await.unwrap().into_inner();
    let mut count = 0;
    while let Some(answer) = timeout(SOON, answers.message()).await.unwrap().unwrap() {
        assert!(!answer.applied, "{answer:?}");
        count += 1;
    }
    assert_eq!(count, 3);
    // What was never made here is refused.
    let version = change.version.unwrap();
    for strange in [
        v1::SyncVersion { epoch: version.epoch ^ 1, ..version },
        v1::SyncVersion { counter: version.counter + 1_000, ..version },
    ] {
        let change = v1::Change { version: Some(strange), ..change };
        let refused = admin.watch_applied(ask(Some(change), 1)).await.unwrap_err();
        assert!(refused.message().contains("none of this CA's"), "{refused}");
    }
    // A server that stops lets nobody wait.
    let mut answers = admin.watch_applied(ask(Some(change), 100)).await.unwrap().into_inner();
    for _ in 0..3 {
        answers.message().await.unwrap().unwrap();
    }
    timeout(SOON, deployment.stop()).await.expect("the server waits for a watcher");
    assert!(!matches!(answers.message().await, Ok(Some(_))));
}

#[tokio::test]
async fn no_setting_shuts_the_ca_s_own_port_and_none_keeps_isolation_on() {
    let deployment = deployment().await;
    let worker = deployment.worker("c1", "w1", "10.0.0.1").await;
    worker.client.sync(v1::SyncRequest::default()).await.unwrap();
    let set = |change: String| {
        let request = v1::SetClusterRequest {
            cluster: "c1".to_owned(),
            changes: vec![change],
            dry_run: false,
        };
        clusters::set(&deployment.ca, &deployment.operator, request)
    };
    let port = deployment.ca.endpoints.nodes[0].rsplit_once(':').unwrap().1.to_owned();
    for (change, said) in [
        ("collective-ports=20-5000".to_owned(), "port 22 of SSH"),
        (format!("port.gcs={port}"), "of the CA"),
    ] {
        let refused = set(change).await.unwrap_err().to_string();
        assert!(refused.contains(said), "{refused}");
    }
    // A plan from before there was such a check.
    let store = &deployment.ca.store;
    let before = store.cluster("c1".parse().unwrap()).await.unwrap().settings().clone();
    let mut old = v1::Settings { isolation: v1::Isolation::Enforce.into(), ..before.clone() };
    old.port_plan.as_mut().unwrap().metrics_export = 6_818;
    let (now, actor) = (deployment.ca.clock.now(), "uid:0".to_owned());
    store.set_cluster(now, actor, "c1".parse().unwrap(), before, old).await.unwrap();
    let off = set("isolation=off".to_owned()).await.expect("it can be turned off");
    let said = off.notes.join("; ");
    assert!(said.contains("open to whoever reaches these hosts, revoked nodes"), "{said}");
    let refused = set("isolation=enforce".to_owned()).await.unwrap_err().to_string();
    assert!(refused.contains("6817-6819 of Slurm"), "{refused}");
    deployment.finish().await;
}

/// A change nobody has applied.
async fn nodes_change(deployment: &Deployment) -> v1::Change {
    deployment.set("c1", "ray-client=on").await;
    let cluster = clusters::show(&deployment.ca, &deployment.operator, "c1").await.unwrap();
    v1::Change { version: cluster.version, asked_unix_ms: 0 }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_leaf_key_is_revoked_starts_a_new_key_folder_at_once() {
    let deployment = deployment().await;
    let token = deployment.token("c1", v1::Role::Worker, 1).await;
    deployment.write_join("c1", &token, &deployment.folder.path().join("join"));
    let options = options(deployment.folder.path(), "w1", "10.0.0.1");
    let clock = Arc::new(deployment.clock.clone());
    let enrolled = agent_enroll::enroll(&options, clock.clone()).await.unwrap();
    let agent = RunningAgent::start(config(deployment.folder.path()), clock);
    agent.until("in touch", |s| s.ca.reachable == Some(true)).await;

    let serial: Serial = enrolled.leaf_serial.parse().unwrap();
    let revoke = |serial: Serial| {
        let request = v1::RevokeCertificateRequest {
            cluster: "c1".to_owned(),
            serial: serial.as_bytes().to_vec(),
            reason: "in a backup".to_owned(),
        };
        certificates::revoke(&deployment.ca, &deployment.operator, request)
    };
    let revoked = revoke(serial).await.unwrap();
    assert_eq!((revoked.serials.len(), revoked.node.as_str()), (1, "w1"));
    let notes = revoked.notes.join("\n");
    assert!(notes.contains("accept the leaf until") && notes.contains("no address is blocked"));
    let status = agent.until("in a new folder", |s| s.key_folders.len() == 2).await;
    assert_eq!(status.standing, "enrolled");
    let crl = deployment.folder.path().join("tls/k2/crl.pem");
    assert!(crl.exists());
    let on_crl = deployment.store_crl_serials("c1").await;
    assert_eq!(on_crl, [serial.to_string()]);

    // The identity of the node is not to be revoked so.
    let identity = enrolled.identity_serial.unwrap().parse().unwrap();
    let refused = revoke(identity).await.unwrap_err().to_string();
    assert!(refused.ends_with("node \"w1\": revoke the node"), "{refused}");
    let node = deployment.node("c1", "w1").await;
    assert_eq!(node.state(), v1::NodeState::Live);
    agent.stop().await;
    deployment.finish().await;
}

#[tokio::test]
async fn a_token_is_revoked_with_every_node_that_ever_had_it() {
    let deployment = deployment().await;
    let token = deployment.token("c1", v1::Role::Worker, 4).await;
    let mut of_it = Vec::new();
    for address in ["10.0.0.1", "10.0.0.2", "10.0.0.3"] {
        let key = PrivateKey::generate().unwrap();
        let member = deployment.enroll(ask(&token, "c1", "w", &[address], &key), key).await;
        of_it.push(member.unwrap());
    }
    let other = deployment.worker("c1", "other", "10.0.0.4").await;
    // One has left, one has enrolled again with another token since.
    of_it[1].client.leave().await.unwrap();
    let again = deployment
        .token_with(v1::CreateTokenRequest {
            cluster: "c1".to_owned(),
            role: v1::Role::Worker.into(),
            node_names: vec![of_it[2].name.clone()],
            any_address: true,
            replace: true,
            ..v1::CreateTokenRequest::default()
        })
        .await;
    let key = PrivateKey::generate().unwrap();
    let request = ask(&again, "c1", &of_it[2].name, &["10.0.0.3"], &key);
    let again = deployment.enroll(request, key).await.unwrap();

    let id = token.split('.').next().unwrap().to_owned();
    let request =
        v1::RevokeTokenNodesRequest { cluster: "c1".to_owned(), id, reason: "leaked".to_owned() };
    let revoke = |request: v1::RevokeTokenNodesRequest| {
        tokens::revoke_with_nodes(&deployment.ca, &deployment.operator, request)
    };
    let answer = revoke(request.clone()).await.unwrap();
    let mut names: Vec<_> = of_it.iter().map(|member| member.name.clone()).collect();
    names.sort();
    assert_eq!(answer.nodes, names);
    assert_eq!(answer.token.as_ref().unwrap().state(), v1::TokenState::Revoked);
    assert!(answer.change.is_some());
    for name in &names {
        let node = deployment.node("c1", name).await;
        assert_eq!(
            (node.state(), node.revoked_reason.as_str()),
            (v1::NodeState::Revoked, "leaked")
        );
    }
    let leaf = || node_leaf(&PrivateKey::generate().unwrap());
    assert_eq!(word(again.client.issue_leaf(leaf()).await), "REVOKED");
    assert_eq!(word(other.client.issue_leaf(leaf()).await), "OK");
    assert!(revoke(request.clone()).await.unwrap().nodes.is_empty(), "once");
    let without_reason = v1::RevokeTokenNodesRequest { reason: " ".to_owned(), ..request };
    assert!(revoke(without_reason).await.is_err());
    deployment.finish().await;
}

#[tokio::test]
async fn a_node_taken_back_is_no_member_until_it_enrols_again() {
    let deployment = deployment().await;
    enrol_from(&deployment, "w1", "10.0.0.1", &WORKER).await;
    let peer = deployment.worker("c1", "w2", "10.0.0.2").await;
    deployment.revoke("c1", "w1").await;
    let blocks = async || peer.client.sync(v1::SyncRequest::default()).await.unwrap().blocks;
    assert_eq!(blocks().await.unwrap().blocks.len(), 1);
    let request = v1::ReinstateNodeRequest { cluster: "c1".to_owned(), name: "w1".to_owned() };
    let reinstate = || nodes::reinstate(&deployment.ca, &deployment.operator, request.clone());
    let answer = reinstate().await.unwrap();
    assert_eq!(answer.node.unwrap().state(), v1::NodeState::Left);
    assert!(answer.notes[0].contains("enrol it again"), "{:?}", answer.notes);
    assert!(blocks().await.unwrap_or_default().blocks.is_empty());
    assert!(reinstate().await.unwrap_err().to_string().contains("is not revoked"));
    deployment.clock.advance(Duration::from_millis(1));
    let token = deployment.token_for("c1", "w1").await;
    let key = PrivateKey::generate().unwrap();
    let back = deployment.enroll(ask(&token, "c1", "w1", &["10.0.0.1"], &key), key).await.unwrap();
    let leaf = back.client.issue_leaf(node_leaf(&PrivateKey::generate().unwrap())).await;
    assert_eq!(word(leaf), "OK");
    deployment.finish().await;
}

#[tokio::test]
async fn before_isolation_is_enforced_the_counts_of_the_audit_are_told() {
    let deployment = deployment().await;
    deployment.set("c1", "isolation=audit").await;
    let member = deployment.worker("c1", "w1", "10.0.0.1").await;
    let report = v1::Report {
        isolation: Some(v1::IsolationReport {
            in_force: v1::Isolation::Audit.into(),
            refused_packets: 17,
            ..v1::IsolationReport::default()
        }),
        ..v1::Report::default()
    };
    let ask = v1::SyncRequest { report: Some(report), ..v1::SyncRequest::default() };
    member.client.sync(ask).await.unwrap();
    deployment.worker("c1", "w2", "10.0.0.2").await;
    let request = v1::SetClusterRequest {
        cluster: "c1".to_owned(),
        changes: vec!["isolation=enforce".to_owned()],
        dry_run: true,
    };
    let said = clusters::set(&deployment.ca, &deployment.operator, request).await.unwrap().notes;
    let said = said.join("\n");
    assert!(said.contains("would refuse were counted on: w1 (17 since its table"), "{said}");
    assert!(said.contains("nothing was reported since the CA started by: w2"), "{said}");
    deployment.finish().await;
}
