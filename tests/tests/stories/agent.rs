//! The agent in this process against the real CA: it enrols, renews by the clock, is revoked, leaves
//! and comes back as another node.

use std::{path::PathBuf, sync::Arc, time::Duration};

use node_agent::{
    api::{Answer, Ask},
    enroll::{self, Enrolled},
    status::Status,
};
use raymtls_proto::v1;
use raymtls_tests::{
    Deployment,
    agents::{RunningAgent, config, options},
};

const DAY: Duration = Duration::from_secs(86_400);

struct Node<'a> {
    deployment: &'a Deployment,
}

impl Node<'_> {
    fn at(&self, name: &str) -> PathBuf {
        self.deployment.folder.path().join(name)
    }

    async fn enroll(&self, name: &str, address: &str) -> Enrolled {
        let token = self.deployment.token("c1", v1::Role::Worker, 1).await;
        self.deployment.write_join("c1", &token, &self.at("join"));
        let options = options(self.deployment.folder.path(), name, address);
        enroll::enroll(&options, Arc::new(self.deployment.clock.clone())).await.unwrap()
    }

    fn run(&self) -> RunningAgent {
        let config = config(self.deployment.folder.path());
        RunningAgent::start(config, Arc::new(self.deployment.clock.clone()))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_renews_by_the_clock_and_hears_of_its_revocation_at_once() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let node = Node { deployment: &deployment };
    let enrolled = node.enroll("w1", "10.0.0.1").await;
    let agent = node.run();
    let identity = enrolled.identity_serial.unwrap();
    agent.until("in touch", |s| s.ca.reachable == Some(true)).await;

    // A leaf lives two days and is renewed at a third; an identity daily.
    deployment.clock.advance(DAY + DAY / 100);
    let status = agent
        .until("renewed", |s| {
            s.identity.serial != identity && s.key_folders[0].leaf.serial != enrolled.leaf_serial
        })
        .await;
    assert_eq!(status.key_folders.len(), 1, "the key of a folder stays");

    deployment.revoke("c1", "w1").await;
    let is_revoked =
        |s: &Status| s.standing_reason.as_ref().is_some_and(|why| why.starts_with("REVOKED"));
    agent.until("revoked", is_revoked).await;
    assert!(node.at("tls/k1/tls.key").exists(), "a revoked agent deletes nothing");
    agent.stop().await;
    deployment.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_left_comes_back_as_another_node_with_a_folder_of_its_own() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let node = Node { deployment: &deployment };
    let first = node.enroll("w1", "10.0.0.1").await;
    let agent = node.run();
    let Answer::Left { .. } = agent.handle.ask(Ask::Leave).await else { panic!("stayed") };
    agent.stop().await;
    std::fs::remove_dir_all(node.at("state")).unwrap();

    let second = node.enroll("w2", "10.0.0.2").await;
    assert_ne!(second.key_folder, first.key_folder, "the first node's key folder was taken over");
    let agent = node.run();
    let Answer::Renewed(renewed) = agent.handle.ask(Ask::Renew).await else { panic!() };
    assert!(renewed.failed.is_empty() && renewed.key_folders.len() == 1, "{renewed:?}");
    agent.until("told", |s| s.problems.iter().any(|p| p.contains("earlier enrolment"))).await;
    agent.stop().await;
    deployment.finish().await;
}
