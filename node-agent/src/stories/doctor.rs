//! The doctor on a host that was really enrolled: with and without its daemon and its CA.

use raymtls_proto::durable;

use super::*;
use crate::doctor::{self, Finding, Level};

/// A user whom no process has, so that what this machine runs is no part of it.
const NOBODY: u32 = 4_000_000_000;

async fn examine(place: &Place) -> Vec<Finding> {
    let mut config = place.config();
    config.socket = Some(place.path("agent.sock"));
    config.ray_uid = Some(NOBODY);
    doctor::examine(&config, place.clock.clone()).await
}

fn level(findings: &[Finding], check: &str) -> Level {
    let found = findings.iter().find(|finding| finding.check == check);
    found.unwrap_or_else(|| panic!("no {check} in {findings:#?}")).level
}

#[tokio::test]
async fn the_doctor_sees_an_enrolled_host_as_it_is() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    let mut config = place.config();
    config.socket = Some(place.path("agent.sock"));
    let agent = Agent::open(config, place.clock.clone()).unwrap();
    let running = Running::new(agent);
    running.until("contact", |s| s.clock_skew_seconds.is_some()).await;

    let findings = examine(&place).await;
    for check in [
        "daemon",
        "standing",
        "ca",
        "clock",
        "key",
        "chain",
        "usage",
        "validity",
        "state_files",
        "tls_files",
        "operator_files",
        "ray_token",
        "room",
        "reserved_ports",
    ] {
        let is_host = ["reserved_ports", "room", "operator_files"].contains(&check);
        let got = level(&findings, check);
        assert!(got == Level::Ok || (is_host && got != Level::Unknown), "{check}: {findings:#?}");
    }
    // The stand-in's leaf is for an address that no host of the test has.
    assert_eq!(level(&findings, "address"), Level::Warn);
    assert_eq!(level(&findings, "two_key_split"), Level::Ok);
    let calls = (ca.leaf_calls.load(Ordering::SeqCst), ca.enrolments.load(Ordering::SeqCst));
    assert_eq!(calls, (1, 1), "it made no call");
    running.stop().await;
    drop(ca);
}

#[tokio::test]
async fn the_doctor_finds_what_was_broken_behind_the_agents_back() {
    let ca = TestCa::start(Face::Ca).await;
    let place = Place::new(system_clock());
    place.enroll(&ca).await.unwrap();
    let folder = place.path("tls/k1");
    let public = durable::Access::PUBLIC;
    durable::replace(
        &folder.join("tls.key"),
        PrivateKey::generate().unwrap().to_pem().as_bytes(),
        public,
    )
    .unwrap();
    std::fs::copy(place.path("state/identity.pem"), folder.join("ca.crt")).unwrap();
    std::fs::remove_file(place.path("tls/ray_token")).unwrap();
    let elsewhere = place.path("tls/current");
    std::fs::remove_file(&elsewhere).unwrap();
    std::os::unix::fs::symlink("./k1", &elsewhere).unwrap();

    let findings = examine(&place).await;
    for check in ["daemon", "key", "chain", "tls_files", "ray_token"] {
        assert_eq!(level(&findings, check), Level::Fail, "{check}: {findings:#?}");
    }
    assert_eq!(level(&findings, "ca"), Level::Ok, "without the daemon: {findings:#?}");
}
