//! A revocation among many peers: real gRPC over real TLS, each peer a client of its own that waits in
//! Sync as an agent does and says at once what it has applied. What an agent does between, load a
//! table, is not in it.

use std::{
    fmt,
    time::{Duration, Instant},
};

use node_agent::{client::NodeClient, keys::PrivateKey};
use raymtls_proto::v1;
use tokio::task::JoinSet;

use crate::{Deployment, ask, socket};

/// So long a peer waits in one call.
const WAIT_SECONDS: u32 = 50;
/// The last acknowledgement comes within this, or not at all.
const PATIENCE_SECONDS: u32 = 60;

/// When, from the start of the operator's call, each thing had happened.
#[derive(Debug)]
pub struct Figures {
    /// The call was answered.
    pub answered: Duration,
    /// A peer had the block, sorted.
    pub told: Vec<Duration>,
    /// The operator had a peer's acknowledgement, sorted.
    pub acknowledged: Vec<Duration>,
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |time: Duration| time.as_secs_f64() * 1_000.0;
        let half = |all: &[Duration]| ms(all[all.len() / 2]);
        let last = |all: &[Duration]| ms(all[all.len() - 1]);
        writeln!(f, "{} peers; from the start of the operator's call, in ms", self.told.len())?;
        writeln!(f, "  the call was answered   {:8.1}", ms(self.answered))?;
        let (told, acknowledged) = (&self.told, &self.acknowledged);
        writeln!(f, "  told to cut off         {:8.1} p50 {:8.1} max", half(told), last(told))?;
        write!(
            f,
            "  acknowledged            {:8.1} p50 {:8.1} max",
            half(acknowledged),
            last(acknowledged)
        )
    }
}

/// Enrols so many peers and a node to be thrown out, has all wait, revokes the one, and waits for the
/// acknowledgements of the others.
pub async fn revoke_one_among(deployment: &Deployment, count: usize) -> Figures {
    deployment.cluster("c1", Duration::from_secs(86_400)).await;
    let blocked = enrol_bad_one(deployment).await;
    let mut peers = Vec::new();
    for client in enrol(deployment, count).await {
        let have = settle(&client).await;
        peers.push((client, have));
    }
    let (told, mut heard) = tokio::sync::mpsc::unbounded_channel();
    let mut waiting = JoinSet::new();
    for (client, have) in peers {
        waiting.spawn(peer(client, have, blocked, told.clone()));
    }
    // All wait, and what the last enrolments changed has been told.
    tokio::time::sleep(Duration::from_secs(2)).await;

    let mut admin = socket::admin(deployment).await;
    let started = Instant::now();
    let request = v1::RevokeNodeRequest {
        cluster: "c1".to_owned(),
        name: "bad".to_owned(),
        reason: "stolen".to_owned(),
        ..v1::RevokeNodeRequest::default()
    };
    let revoked = admin.revoke_node(request).await.unwrap().into_inner();
    let answered = started.elapsed();
    assert_eq!(revoked.blocked_addresses, [blocked]);
    let request = v1::WatchAppliedRequest {
        cluster: "c1".to_owned(),
        change: revoked.change,
        wait_seconds: PATIENCE_SECONDS,
    };
    let mut answers = admin.watch_applied(request).await.unwrap().into_inner();
    let mut acknowledged = Vec::new();
    while let Some(applied) = answers.message().await.unwrap() {
        if applied.applied {
            acknowledged.push(started.elapsed());
        }
    }
    waiting.shutdown().await;
    drop(told);
    let mut told = Vec::new();
    while let Some(at) = heard.recv().await {
        told.push(Instant::duration_since(&at, started));
    }
    told.sort_unstable();
    Figures { answered, told, acknowledged }
}

/// From its own address, so that there is one to block; it does not call again.
async fn enrol_bad_one(deployment: &Deployment) -> &'static str {
    let address = "10.99.0.1";
    let token = deployment.token("c1", v1::Role::Worker, 1).await;
    let request = ask(&token, "c1", "bad", &[], &PrivateKey::generate().unwrap());
    let source = address.parse().unwrap();
    ca_server::enroll::enroll(&deployment.ca, request, source).await.unwrap();
    address
}

async fn enrol(deployment: &Deployment, count: usize) -> Vec<NodeClient> {
    let mut clients = Vec::new();
    for number in 0..count {
        let address = format!("10.1.{}.{}", number / 250, number % 250 + 1);
        clients.push(deployment.worker("c1", &format!("w{number}"), &address).await.client);
    }
    clients
}

/// Hears everything there is, without a wait.
async fn settle(client: &NodeClient) -> Option<v1::SyncVersion> {
    client.sync(v1::SyncRequest::default()).await.unwrap().version
}

/// As an agent does it: waits for news, and where they name the block, notes when; says at once what
/// it has applied.
async fn peer(
    client: NodeClient,
    mut have: Option<v1::SyncVersion>,
    blocked: &'static str,
    told: tokio::sync::mpsc::UnboundedSender<Instant>,
) {
    loop {
        let report = v1::Report {
            received: have,
            applied: have,
            isolation: Some(v1::IsolationReport {
                in_force: v1::Isolation::Enforce.into(),
                ..v1::IsolationReport::default()
            }),
            ..v1::Report::default()
        };
        let request = v1::SyncRequest {
            report: Some(report),
            have,
            wait_seconds: WAIT_SECONDS,
            ..v1::SyncRequest::default()
        };
        let Ok(answer) = client.sync(request).await else { return };
        let blocks = answer.blocks.iter().flat_map(|blocks| &blocks.blocks);
        if blocks.into_iter().any(|block| block.address == blocked) {
            let _ = told.send(Instant::now());
        }
        have = answer.version;
    }
}
