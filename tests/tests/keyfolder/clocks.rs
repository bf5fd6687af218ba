//! The real agent on a host whose clock is wrong and jumps, by libfaketime. Only the wall clock is
//! faked: a real one that jumps takes the monotonic clock nowhere.
//!
//! Wants Debian's package `faketime`.

use std::{path::Path, process::Stdio, time::Duration};

use node_agent::{
    api::{Answer, Ask},
    status::Status,
};
use tokio::time::{Instant, sleep};

use crate::node::{Node, SOON};

/// The CA's clock of these tests stands still, the host's goes on.
const NEAR: i64 = 40;

async fn status_at(node: &Node, skew: i64) -> Status {
    let began = Instant::now();
    loop {
        let Answer::Status(status) = node.ask(Ask::Status).await.unwrap() else { panic!() };
        if status.clock_skew_seconds.is_some_and(|found| (found - skew).abs() < NEAR) {
            return *status;
        }
        assert!(began.elapsed() < SOON, "{skew}: {:?}\n{}", status.clock_skew_seconds, node.log());
        sleep(Duration::from_millis(100)).await;
    }
}

fn set(file: &Path, offset: &str) {
    let access = raymtls_proto::durable::Access::PUBLIC;
    raymtls_proto::durable::replace(file, offset.as_bytes(), access).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_clock_that_is_wrong_and_jumps_is_told_and_stops_no_renewal() {
    let library =
        format!("/usr/lib/{}-linux-gnu/faketime/libfaketimeMT.so.1", std::env::consts::ARCH);
    assert!(Path::new(&library).exists(), "wants the package faketime");
    let mut node = Node::new().await;
    let (file, log) = (node.at("clock"), node.at("log"));
    set(&file, "-9m");
    let log = std::fs::File::options().create(true).append(true).open(log).unwrap();
    let mut command = node.command(&["run", "--socket", "agent.sock", "--http-listen", "off"]);
    command
        .env("LD_PRELOAD", &library)
        .env("FAKETIME_TIMESTAMP_FILE", &file)
        .env("FAKETIME_NO_CACHE", "1")
        .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        .env("DONT_FAKE_MONOTONIC", "1");
    node.agent = Some(command.stdout(Stdio::null()).stderr(log).spawn().unwrap());
    while node.ask(Ask::Status).await.is_err() {
        sleep(Duration::from_millis(20)).await;
    }
    for (offset, skew, said) in [
        ("-9m", -540, "behind the CA"),
        ("+1h", 3_600, "ahead of the CA"),
        ("-1h", -3_600, "behind the CA"),
    ] {
        set(&file, offset);
        let status = status_at(&node, skew).await;
        assert!(status.problems.iter().any(|p| p.contains(said)), "{:?}", status.problems);
        let Answer::Renewed(renewed) = node.ask(Ask::Renew).await.unwrap() else { panic!() };
        assert!(renewed.failed.is_empty() && renewed.key_folders.len() == 1, "{renewed:?}");
    }
    let told = node.log().matches("this host's clock is").count();
    assert!((1..=4).contains(&told), "told {told} times\n{}", node.log());
    node.check_folders();
    node.kill().await;
    node.deployment.finish().await;
}
