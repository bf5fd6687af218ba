//! A host with a real agent, that finds its CA again where that serves next.

use std::{sync::Arc, time::Duration};

use ca_server::store::Store as _;
use node_agent::{
    api::{Answer, Ask},
    enroll,
};
use prost::Message as _;
use raymtls_proto::{durable, v1};
use raymtls_tests::{
    Deployment,
    agents::{RunningAgent, SOON, config, options},
};
use tempfile::TempDir;

/// A host: its folders, where its agent's are.
pub(crate) struct Host {
    pub(crate) folder: TempDir,
    strict: bool,
}

impl Host {
    pub(crate) async fn enroll(
        deployment: &Deployment,
        name: &str,
        address: &str,
        strict: bool,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let token = deployment.token("c1", v1::Role::Worker, 1).await;
        deployment.write_join("c1", &token, &folder.path().join("join"));
        let clock = Arc::new(deployment.clock.clone());
        enroll::enroll(&options(folder.path(), name, address), clock).await.unwrap();
        Self { folder, strict }
    }

    /// Starts its agent against the CA as it listens now.
    pub(crate) fn start(&self, deployment: &Deployment) -> RunningAgent {
        let path = self.folder.path().join("state/node.toml");
        let text = std::fs::read_to_string(&path).unwrap();
        let endpoints = text.lines().find(|line| line.starts_with("node_endpoints")).unwrap();
        let now = format!("node_endpoints = [{:?}]", deployment.nodes.to_string());
        durable::replace(&path, text.replace(endpoints, &now).as_bytes(), durable::Access::PRIVATE)
            .unwrap();
        let mut config = config(self.folder.path());
        config.strict_audit_log = self.strict;
        // What holds nothing up here is not waited for.
        config.limits.sync_wait = Duration::from_secs(1);
        RunningAgent::start(config, Arc::new(deployment.clock.clone()))
    }

    pub(crate) fn kept(&self) -> Option<v1::Checkpoint> {
        let bytes = std::fs::read(self.folder.path().join("state/checkpoint.pb")).ok()?;
        Some(v1::Checkpoint::decode(bytes.as_slice()).unwrap())
    }

    /// Waits until it holds a checkpoint of the newest record.
    pub(crate) async fn saw_newest(&self, deployment: &Deployment) -> v1::Checkpoint {
        let until = tokio::time::Instant::now() + SOON;
        loop {
            let newest = deployment.store.audit_state().await.unwrap().newest_index;
            if let Some(kept) = self.kept().filter(|kept| kept.index >= newest) {
                return kept;
            }
            assert!(tokio::time::Instant::now() < until, "{:?} of {newest}", self.kept());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Renews all it has.
pub(crate) async fn renews(agent: &RunningAgent) -> Result<(), String> {
    match agent.handle.ask(Ask::Renew).await {
        Answer::Renewed(done) if done.failed.is_empty() => Ok(()),
        Answer::Renewed(done) => Err(done.failed.join("; ")),
        other @ (Answer::Status(_)
        | Answer::ExecFolder(_)
        | Answer::Tunnel { .. }
        | Answer::Left { .. }
        | Answer::Error(_)) => Err(format!("{other:?}")),
    }
}
