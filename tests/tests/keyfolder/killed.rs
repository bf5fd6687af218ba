//! The agent is killed at any moment.

use std::time::{Duration, Instant};

use node_agent::api::{Answer, Ask};
use tokio::time::timeout;

use crate::node::{Node, stray_files};

const KILLS: u32 = 20;

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
