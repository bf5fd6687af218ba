//! A node waits for news and gets what changed, no more.

use std::time::Duration;

use ca_server::admin::clusters;
use raymtls_proto::v1;
use raymtls_tests::{Deployment, word};

const DAY: Duration = Duration::from_secs(86_400);

#[tokio::test]
async fn a_node_gets_everything_first_and_then_what_changed() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let member = deployment.worker("c1", "w1", "10.0.0.1").await;

    let all = member.client.sync(v1::SyncRequest::default()).await.unwrap();
    assert_eq!(all.settings.as_ref().unwrap().max_job_seconds, 86_400);
    assert_eq!(all.ray_token.as_ref().unwrap().token.len(), 64);
    assert!(!all.control_crl.as_ref().unwrap().crls_der.is_empty());
    let bundle = all.bundle.as_ref().unwrap();
    assert_eq!((bundle.roots_der.len(), bundle.crls_der.len()), (1, 2));

    let ask = v1::SyncRequest { have: all.version, wait_seconds: 0, ..Default::default() };
    let nothing = member.client.sync(ask).await.unwrap();
    assert!(nothing.settings.is_none() && nothing.bundle.is_none());
    assert!(nothing.ray_token.is_none() && nothing.control_crl.is_none());

    // Waiting, it hears of a change when it is made.
    let wait = v1::SyncRequest { have: all.version, wait_seconds: 30, ..Default::default() };
    let waiting = tokio::spawn({
        let client = member.client.clone();
        async move { client.sync(wait).await }
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    deployment.set("c1", "ray-client=on").await;
    let news = waiting.await.unwrap().unwrap();
    assert!(news.settings.unwrap().ray_client);
    assert!(news.bundle.is_none() && news.ray_token.is_none());

    // A version of another epoch, or of the future, means everything anew.
    let version = all.version.unwrap();
    for strange in [
        v1::SyncVersion { epoch: version.epoch ^ 1, ..version },
        v1::SyncVersion { counter: version.counter + 1_000, ..version },
    ] {
        let ask = v1::SyncRequest { have: Some(strange), wait_seconds: 30, ..Default::default() };
        let answer = member.client.sync(ask).await.unwrap();
        assert!(answer.settings.is_some() && answer.ray_token.is_some());
    }
    deployment.finish().await;
}

#[tokio::test]
async fn the_newest_wait_of_a_node_wins() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let member = deployment.worker("c1", "w1", "10.0.0.1").await;
    let have = member.client.sync(v1::SyncRequest::default()).await.unwrap().version;
    let wait = || {
        let client = member.client.clone();
        let ask = v1::SyncRequest { have, wait_seconds: 20, ..Default::default() };
        tokio::spawn(async move { word(client.sync(ask).await) })
    };
    let older = wait();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let newer = wait();
    assert_eq!(older.await.unwrap(), "SUPERSEDED");
    deployment.set("c1", "ray-client=on").await;
    assert_eq!(newer.await.unwrap(), "OK");
    deployment.finish().await;
}

#[tokio::test]
async fn the_cluster_knows_which_node_s_running_leaf_ends_first() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let running = |horizon_unix, recycle_state: v1::RecycleState| v1::Running {
        horizon_unix,
        recycle_state: recycle_state.into(),
        processes: 9,
        ..v1::Running::default()
    };
    let nodes = [
        ("w1", "10.0.0.1", Some(running(2_000_000_000, v1::RecycleState::Fresh))),
        ("w2", "10.0.0.2", Some(running(1_900_000_000, v1::RecycleState::Overdue))),
        ("w3", "10.0.0.3", None),
    ];
    for (name, address, running) in nodes {
        let member = deployment.worker("c1", name, address).await;
        let report = v1::Report { running, ..v1::Report::default() };
        let ask = v1::SyncRequest { report: Some(report), ..v1::SyncRequest::default() };
        member.client.sync(ask).await.unwrap();
    }
    let cluster = clusters::show(&deployment.ca, &deployment.operator, "c1").await.unwrap();
    let horizon = cluster.horizon.unwrap();
    assert_eq!((horizon.unix, horizon.node.as_str()), (1_900_000_000, "w2"));
    assert_eq!((horizon.nodes_overdue, horizon.nodes_unknown), (1, 1));
    deployment.finish().await;
}

#[tokio::test]
async fn a_report_of_what_runs_has_bounds() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let member = deployment.worker("c1", "w1", "10.0.0.1").await;
    let most = v1::Running {
        horizon_unix: 253_402_300_799,
        processes: 65_536,
        recycle_state: 77,
        ..v1::Running::default()
    };
    for (running, wanted) in [
        (most, "OK"),
        (v1::Running { horizon_unix: 253_402_300_800, ..most }, "REQUEST_INVALID"),
        (v1::Running { looked_unix: i64::MIN, ..most }, "REQUEST_INVALID"),
        (v1::Running { driver_horizon_unix: i64::MAX, ..most }, "REQUEST_INVALID"),
        (v1::Running { processes: 65_537, ..most }, "REQUEST_INVALID"),
        (v1::Running { plain_ports: u32::MAX, ..most }, "REQUEST_INVALID"),
    ] {
        let report = v1::Report { running: Some(running), ..v1::Report::default() };
        let ask = v1::SyncRequest { report: Some(report), ..v1::SyncRequest::default() };
        assert_eq!(word(member.client.sync(ask).await), wanted, "{running:?}");
    }
    deployment.finish().await;
}

#[tokio::test]
async fn what_a_node_reports_is_shown_as_its_claim() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", DAY).await;
    let member = deployment.worker("c1", "w1", "10.0.0.1").await;
    let report = v1::Report { agent_version: "9.9.9".to_owned(), ..v1::Report::default() };
    let ask = v1::SyncRequest { report: Some(report.clone()), ..v1::SyncRequest::default() };
    member.client.sync(ask).await.unwrap();
    assert_eq!(deployment.node("c1", "w1").await.report, Some(report));
    let crowded =
        v1::Report { key_folders: vec![v1::KeyFolder::default(); 65], ..v1::Report::default() };
    let ask = v1::SyncRequest { report: Some(crowded), ..v1::SyncRequest::default() };
    assert_eq!(word(member.client.sync(ask).await), "REQUEST_INVALID");
    deployment.finish().await;
}
