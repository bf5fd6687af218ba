//! Clocks that are wrong and clocks that jump, of the host and of the CA: at the shortest leaf life
//! every node keeps a valid leaf, nobody hammers the CA, and whoever is wrong is told by how much.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use node_agent::{client::CallError, enroll, failure::Failure, status::Status};
use raymtls_proto::{
    clock::{Clock, SettableClock},
    v1,
};
use raymtls_tests::{
    Deployment,
    agents::{RunningAgent, SOON, config, options},
    node_leaf, word,
};
use time::{OffsetDateTime, macros::datetime};

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3_600);
/// Longest job of the cluster: its leaves live four minutes, the shortest life there is.
const MAX_JOB: Duration = Duration::from_secs(120);
/// Time passes in steps of this size, so often.
const STEP: Duration = Duration::from_secs(20);
const STEPS: u32 = 24;
/// So many leaves in eight minutes at a renewal each 72 to 80 s, and a few to spare.
const LEAVES_MAX: u64 = 12;

/// A host with a clock of its own.
struct Host<'a> {
    deployment: &'a Deployment,
    clock: SettableClock,
    folder: tempfile::TempDir,
}

impl<'a> Host<'a> {
    fn new(deployment: &'a Deployment, ahead: time::Duration) -> Self {
        let clock = SettableClock::new(deployment.clock.now() + ahead);
        Self { deployment, clock, folder: tempfile::tempdir().unwrap() }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    async fn enroll(&self) -> Result<(), Failure> {
        let token = self.deployment.token("c1", v1::Role::Worker, 1).await;
        self.deployment.write_join("c1", &token, &self.at("join"));
        let options = options(self.folder.path(), "w1", "10.0.0.1");
        enroll::enroll(&options, Arc::new(self.clock.clone())).await.map(drop)
    }

    fn run(&self) -> RunningAgent {
        let mut config = config(self.folder.path());
        config.limits.sync_wait = Duration::from_secs(1);
        RunningAgent::start(config, Arc::new(self.clock.clone()))
    }

    /// The same time passes here and at the CA.
    fn pass(&self, by: Duration) {
        self.clock.advance(by);
        self.deployment.clock.advance(by);
    }
}

/// A leaf that is valid to whoever has the CA's time, and that nobody waits for the next of. Where
/// the next one would not be valid here yet, that comes later: at two thirds of its life.
async fn until_valid(
    agent: &RunningAgent,
    what: &str,
    ca: &SettableClock,
    keeps_longer: bool,
) -> Status {
    agent
        .until(what, |s| {
            s.key_folders.iter().filter(|f| f.current).any(|f| {
                let left = f.leaf.not_after.time() - ca.now();
                // The CA says its time in whole seconds.
                let next = f.leaf.renew_at.time() + Duration::from_secs(2) > ca.now();
                next || keeps_longer && left >= MAX_JOB * 2 / 3
            })
        })
        .await
}

/// Between two Syncs lie 0.2 s that pass, whatever the clocks do.
fn no_hot_loop(deployment: &Deployment, began: Instant) {
    let text = deployment.ca.metrics.text();
    let line = text.lines().find_map(|line| line.strip_prefix("raymtls_ca_syncs_total "));
    let syncs: f64 = line.unwrap().parse().unwrap();
    let seconds = began.elapsed().as_secs_f64();
    assert!(syncs <= 10.0 + 5.0 * seconds, "{syncs} Syncs in {seconds} s");
}

fn says_clock(status: &Status) -> bool {
    status.problems.iter().any(|p| p.contains("this host's clock is"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_with_a_wrong_clock_always_has_a_valid_leaf_and_says_how_wrong_it_is() {
    let minutes = time::Duration::minutes;
    for (name, ahead, said) in [
        ("right", minutes(0), None),
        ("a little ahead", time::Duration::seconds(30), None),
        ("ten minutes behind", minutes(-10), Some("behind the CA")),
        ("ten minutes ahead", minutes(10), Some("ahead of the CA")),
        ("an hour ahead", minutes(60), Some("ahead of the CA")),
    ] {
        let deployment = Deployment::start().await;
        deployment.cluster("c1", MAX_JOB).await;
        let host = Host::new(&deployment, ahead);
        host.enroll().await.unwrap_or_else(|e| panic!("{name}: {e}"));
        let began = Instant::now();
        let agent = host.run();
        agent.until("in touch", |s| s.clock_skew_seconds.is_some()).await;
        let keeps_longer = name == "ten minutes behind";
        for step in 0..STEPS {
            host.pass(STEP);
            let what = format!("valid, {name}, step {step}");
            let status = until_valid(&agent, &what, &deployment.clock, keeps_longer).await;
            assert_eq!(says_clock(&status), said.is_some(), "{name}: {:?}", status.problems);
        }
        let status = agent.handle.status();
        let off = status.clock_skew_seconds.unwrap() - ahead.whole_seconds();
        assert!(off.abs() <= 3, "{name}: {:?}", status.clock_skew_seconds);
        if let Some(said) = said {
            assert!(status.problems.iter().any(|p| p.contains(said)), "{:?}", status.problems);
            let table = node_agent::status::table(&status, host.clock.now(), true);
            assert!(table.contains("WRONG: ") && table.contains(said), "{table}");
        }
        assert!(status.renewals >= 2, "{name}: {} leaves in eight minutes", status.renewals);
        assert!(status.renewals <= LEAVES_MAX, "{name}: {} leaves", status.renewals);
        // A key is renewed for one leaf life, then another one takes its place.
        assert!(status.key_folders.len() <= 4, "{name}: {} folders", status.key_folders.len());
        no_hot_loop(&deployment, began);
        agent.stop().await;
        deployment.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_jumps_brings_no_outage_and_no_rush() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", MAX_JOB).await;
    let host = Host::new(&deployment, time::Duration::ZERO);
    host.enroll().await.unwrap();
    let began = Instant::now();
    let agent = host.run();
    agent.until("in touch", |s| s.clock_skew_seconds.is_some()).await;
    let far = [datetime!(2040-01-01 00:00 UTC), datetime!(2106-02-08 00:00 UTC)];
    let right = || deployment.clock.now();
    let jumps: [(&str, Box<dyn Fn() -> OffsetDateTime>); 7] = [
        ("an hour ahead", Box::new(move || right() + HOUR)),
        ("back", Box::new(right)),
        ("an hour behind", Box::new(move || right() - HOUR)),
        ("1970", Box::new(|| OffsetDateTime::UNIX_EPOCH)),
        ("2040", Box::new(move || far[0])),
        ("2106", Box::new(move || far[1])),
        ("right again", Box::new(right)),
    ];
    for (name, to) in jumps {
        let before = agent.handle.status().renewals;
        host.clock.set(to());
        for step in 0..6 {
            host.pass(STEP);
            let what = format!("valid, {name}, step {step}");
            let status = until_valid(&agent, &what, &deployment.clock, false).await;
            assert_eq!(status.standing, "enrolled", "{name}");
        }
        // Two minutes: one or two renewals, whatever the clock says.
        let renewals = agent.handle.status().renewals - before;
        assert!((1..=3).contains(&renewals), "{name}: {renewals} renewals in two minutes");
    }
    agent.until("agrees again", |s| !says_clock(s)).await;
    assert!(agent.handle.status().key_folders.len() <= 6, "too many new key folders");
    no_hot_loop(&deployment, began);
    agent.stop().await;
    deployment.finish().await;
}

/// The CA's clock jumps and is put right: what it made meanwhile is made again, and once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ca_whose_clock_jumps_is_followed_and_what_it_dated_ahead_is_made_again() {
    let mut deployment = Deployment::start().await;
    deployment.cluster("c1", MAX_JOB).await;
    let host = Host::new(&deployment, time::Duration::ZERO);
    host.enroll().await.unwrap();
    let agent = host.run();
    agent.until("in touch", |s| s.clock_skew_seconds.is_some()).await;
    let right = deployment.clock.now();
    let serial = |s: &Status| s.key_folders.iter().find(|f| f.current).unwrap().leaf.serial.clone();

    deployment.clock.set(right + HOUR);
    let status = until_valid(&agent, "valid at the CA's hour", &deployment.clock, false).await;
    let ahead = serial(&status);
    deployment.clock.set(right);
    let put_right = Instant::now();
    let status = agent.until("made again", |s| serial(s) != ahead).await;
    assert!(put_right.elapsed() < SOON);
    let not_after = status.key_folders.iter().find(|f| f.current).unwrap().leaf.not_after.time();
    assert!(not_after <= right + 5 * MINUTE, "valid until {not_after}");
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(agent.handle.status().renewals <= 6, "{} leaves", agent.handle.status().renewals);
    agent.stop().await;
    // Not judged: a leaf dated ahead is on record.
    deployment.stop().await;
}

/// The CA's clock stands three leaf lives ahead: what a running Ray reads stays, and once that clock is
/// put right all goes on with the same folder.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ca_three_lives_ahead_costs_no_folder_that_ray_may_use() {
    let mut deployment = Deployment::start().await;
    deployment.cluster("c1", MAX_JOB).await;
    let host = Host::new(&deployment, time::Duration::ZERO);
    host.enroll().await.unwrap();
    let agent = host.run();
    agent.until("in touch", |s| s.clock_skew_seconds.is_some()).await;
    let right = deployment.clock.now();
    let first = |s: &Status| s.key_folders.iter().find(|f| f.name == "k1").cloned();
    let serial = first(&agent.handle.status()).unwrap().leaf.serial;

    deployment.clock.set(right + 6 * MAX_JOB);
    // To the CA the leaf is long over; to Ray, which started with it, it is not.
    agent.until("a folder of the CA's hour", |s| s.key_folders.len() >= 2).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(first(&agent.handle.status()).is_some(), "{:?}", agent.handle.status().key_folders);
    assert!(host.at("tls/k1/tls.key").exists(), "the key of a running Ray was deleted");

    deployment.clock.set(right);
    until_valid(&agent, "valid again", &deployment.clock, false).await;
    for step in 0..5 {
        host.pass(STEP);
        until_valid(&agent, &format!("step {step}"), &deployment.clock, false).await;
    }
    agent.until("k1 renewed", |s| first(s).is_some_and(|k1| k1.leaf.serial != serial)).await;
    agent.stop().await;
    // Not judged: a leaf dated ahead is on record.
    deployment.stop().await;
}

/// The CA's clock steps back by more than a leaf lives. What it makes then is over to everybody else:
/// the leaf in hand serves to its end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ca_that_steps_back_by_more_than_a_life_ends_no_leaf_early() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", MAX_JOB).await;
    // The cluster's issuer is older than the step.
    deployment.clock.advance(2 * HOUR);
    let host = Host::new(&deployment, time::Duration::ZERO);
    host.enroll().await.unwrap();
    let agent = host.run();
    agent.until("in touch", |s| s.clock_skew_seconds.is_some()).await;
    let right = deployment.clock.now();
    let serial = |s: &Status| s.key_folders.iter().find(|f| f.current).unwrap().leaf.serial.clone();
    let before = serial(&agent.handle.status());

    deployment.clock.set(right - HOUR);
    agent.until("the step", |s| s.clock_skew_seconds.is_some_and(|skew| skew > 3_000)).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(serial(&agent.handle.status()), before, "a good leaf gave way to one that is over");

    deployment.clock.set(right);
    agent.until("put right", |s| !says_clock(s)).await;
    for step in 0..5 {
        host.pass(STEP);
        until_valid(&agent, &format!("step {step}"), &deployment.clock, false).await;
    }
    assert_ne!(serial(&agent.handle.status()), before, "renewed in time");
    agent.stop().await;
    deployment.finish().await;
}

/// Whoever holds the CA's key of last week says it is last week still: after its certificate has ended
/// no new connection is made, and no old one is kept for long. Where the host's own clock says that it
/// is valid, as where the CA's clock stood ahead and was put right, the CA is believed again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ca_certificate_that_is_over_is_refused_whatever_time_comes_with_it() {
    let deployment = Deployment::start().await;
    deployment.cluster("c1", MAX_JOB).await;
    let host = Host::new(&deployment, time::Duration::ZERO);
    host.enroll().await.unwrap();
    let agent = host.run();
    agent.until("in touch", |s| s.clock_skew_seconds.is_some()).await;
    let right = deployment.clock.now();

    // The CA's certificate lives seven days.
    host.clock.advance(8 * 24 * HOUR);
    let refused = |s: &Status| {
        let error = s.ca.last_error.as_deref().unwrap_or_default();
        s.ca.reachable == Some(false) && error.contains("its certificate is not valid")
    };
    agent.until("refused", refused).await;
    host.clock.set(right);
    agent.until("believed again", |s| s.ca.reachable == Some(true)).await;
    until_valid(&agent, "valid again", &deployment.clock, false).await;
    agent.stop().await;
    deployment.finish().await;
}

/// A clock so wrong that nothing can be verified: the error says so, and by how much.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_too_wrong_for_any_handshake_is_named_as_the_cause() {
    let mut deployment = Deployment::start().await;
    deployment.cluster("c1", MAX_JOB).await;
    for (name, ahead, said) in [
        // The CA's own certificate is dated ten minutes back.
        ("44 minutes behind", time::Duration::minutes(-44), "this host's clock is at least 34m"),
        ("twenty years ahead", time::Duration::days(7_300), "ahead of the CA"),
        ("1970", OffsetDateTime::UNIX_EPOCH - deployment.clock.now(), "behind the CA"),
    ] {
        let host = Host::new(&deployment, ahead);
        let error = host.enroll().await.unwrap_err().to_string();
        assert!(error.contains(said), "{name}: {error}");
        assert!(error.contains("nothing was sent"), "{name}: {error}");
        assert!(host.at("join").exists(), "{name}: the join file is gone");
    }
    deployment.stop().await;
}

/// Nothing outlives its issuer, at the edges of the calendar too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ca_in_a_far_year_makes_no_certificate_that_outlives_its_issuer() {
    for now in [datetime!(2038-01-19 03:14:00 UTC), datetime!(2049-12-31 23:58:00 UTC)] {
        let deployment = Deployment::start_at(now).await;
        deployment.cluster("c1", MAX_JOB).await;
        let member = deployment.worker("c1", "w1", "10.0.0.1").await;
        for _ in 0..4 {
            let key = node_agent::keys::PrivateKey::generate().unwrap();
            let made: Result<_, CallError> = member.client.issue_leaf(node_leaf(&key)).await;
            assert_eq!(word(made), "OK", "{now}");
            deployment.clock.advance(MINUTE);
        }
        // The judge reads every certificate: within its issuer's time, and as policy has it.
        deployment.finish().await;
    }
}
