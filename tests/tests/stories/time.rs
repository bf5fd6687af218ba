//! Clocks that are wrong and clocks that jump, of the host and of the CA: at the shortest leaf life
//! every node keeps a valid leaf, nobody hammers the CA, and whoever is wrong is told by how much.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use node_agent::{
    agent::{Agent, Handle},
    client::CallError,
    config::Config,
    enroll::{self, Options},
    failure::Failure,
    status::Status,
};
use raymtls_proto::{
    clock::{Clock, SettableClock},
    identity::Role,
    v1,
};
use raymtls_tests::{Deployment, limits, node_leaf, word};
use time::{OffsetDateTime, macros::datetime};
use tokio::{sync::oneshot, task::JoinHandle, time::timeout};

const SOON: Duration = Duration::from_secs(20);
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

struct Running {
    handle: Handle,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
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
        let options = Options {
            join: self.at("join"),
            state_dir: self.at("state"),
            tls_dir: self.at("tls"),
            name: "w1".parse().unwrap(),
            role: Role::Worker,
            addresses: vec!["10.0.0.1".parse().unwrap()],
            dns_names: vec![],
            shared_address: false,
            ray_gid: None,
            keep_join_file: false,
            once: false,
            timeout: SOON,
            limits: limits(),
        };
        enroll::enroll(&options, Arc::new(self.clock.clone())).await.map(drop)
    }

    fn run(&self) -> Running {
        let mut limits = limits();
        limits.sync_wait = Duration::from_secs(1);
        let config = Config { limits, ..Config::in_process(self.at("state"), self.at("tls")) };
        let agent = Agent::open(config, Arc::new(self.clock.clone())).unwrap();
        let handle = agent.handle();
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(async move {
            agent.run(async { drop(stopped.await) }).await.unwrap();
        });
        Running { handle, stop, task }
    }

    /// The same time passes here and at the CA.
    fn pass(&self, by: Duration) {
        self.clock.advance(by);
        self.deployment.clock.advance(by);
    }
}

impl Running {
    async fn until(&self, what: &str, is_so: impl Fn(&Status) -> bool) -> Status {
        let mut status = self.handle.watch();
        let found = timeout(SOON, status.wait_for(|status| is_so(status))).await;
        found
            .unwrap_or_else(|_| panic!("never {what}: {:#?}", self.handle.status()))
            .unwrap()
            .clone()
    }

    /// A leaf that is valid to whoever has the CA's time, and that nobody waits for the next of. Where
    /// the next one would not be valid here yet, that comes later: at two thirds of its life.
    async fn until_valid(&self, what: &str, ca: &SettableClock, keeps_longer: bool) -> Status {
        self.until(what, |s| {
            s.key_folders.iter().filter(|f| f.current).any(|f| {
                let left = f.leaf.not_after.time() - ca.now();
                // The CA says its time in whole seconds.
                let next = f.leaf.renew_at.time() + Duration::from_secs(2) > ca.now();
                next || keeps_longer && left >= MAX_JOB * 2 / 3
            })
        })
        .await
    }

    async fn stop(self) {
        let _ = self.stop.send(());
        self.task.await.unwrap();
    }
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
        let agent = host.run();
        agent.until("in touch", |s| s.clock_skew_seconds.is_some()).await;
        let keeps_longer = name == "ten minutes behind";
        for step in 0..STEPS {
            host.pass(STEP);
            let what = format!("valid, {name}, step {step}");
            let status = agent.until_valid(&what, &deployment.clock, keeps_longer).await;
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
            let status = agent.until_valid(&what, &deployment.clock, false).await;
            assert_eq!(status.standing, "enrolled", "{name}");
        }
        // Two minutes: one or two renewals, whatever the clock says.
        let renewals = agent.handle.status().renewals - before;
        assert!((1..=3).contains(&renewals), "{name}: {renewals} renewals in two minutes");
    }
    agent.until("agrees again", |s| !says_clock(s)).await;
    assert!(agent.handle.status().key_folders.len() <= 6, "too many new key folders");
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
    let status = agent.until_valid("valid at the CA's hour", &deployment.clock, false).await;
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
