//! The agent's table against a CA that names members and blocks, with stand-ins for `nft` and `ss` that
//! note what they are given. That the kernel does what the table says is shown elsewhere.

use std::{os::unix::fs::PermissionsExt, time::Instant};

use raymtls_proto::durable::{self, Access};

use super::*;
use crate::isolation::table::Kernel;

/// Keeps the last ruleset as the table, or removes it; a file `fail` is what it says instead.
const NFT: &str = r#"#!/bin/sh
cd "$(dirname "$0")" || exit 1
if [ "$1" = -j ]; then
  if [ -f blind ]; then echo 'Error: Interrupted' >&2; exit 1; fi
  if [ -f table ]; then
    printf '{"nftables": [{"counter": {"name": "blocked", "packets": 7}},
      {"counter": {"name": "refused", "packets": 12}}'
    sed -n 's/.*counter \(load_[0-9a-f]*\) {.*/, {"counter": {"name": "\1", "packets": 0}}/p' table
    awk '/^\t[^\t]/ { chain = $1 == "chain" }
      chain && /^\t\t/ && $1 != "type" { print ", {\"rule\": {}}" }' table
    echo ']}'
    exit 0
  fi
  echo 'Error: No such file or directory' >&2
  exit 1
fi
cat >ruleset
if [ -f fail ]; then cat fail >&2; exit 1; fi
if [ "$(wc -l <ruleset)" -gt 2 ]; then cp ruleset table; else rm -f table; fi
echo "$(grep -c 'drop$' ruleset)" >>loads
"#;

const SS: &str = r#"#!/bin/sh
echo "$*" >>"$(dirname "$0")/cuts"
echo ESTAB; echo ESTAB
"#;

/// A place whose agent finds the stand-ins.
struct Guarded {
    place: Place,
    ca: Arc<TestCa>,
    role: Role,
}

impl Guarded {
    async fn new(isolation: v1::Isolation) -> Self {
        Self::of_role(isolation, Role::Head, system_clock()).await
    }

    async fn of_role(isolation: v1::Isolation, role: Role, clock: Arc<dyn Clock>) -> Self {
        let listen = "127.0.0.1:0".parse().unwrap();
        let ca = TestCa::start_at(Face::Ca, clock.clone(), listen).await;
        let guarded = Self { place: Place::new(clock), ca, role };
        for (name, text) in [("nft", NFT), ("ss", SS)] {
            let path = guarded.place.path(name);
            durable::create(&path, text.as_bytes(), Access::PUBLIC).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        let head = member("n1", v1::Role::Head, "10.0.0.1");
        let worker = member("n2", v1::Role::Worker, "10.0.0.2");
        guarded.ca.with(|k| {
            k.raw_isolation = Some(isolation.into());
            k.members = Some(vec![head, worker]);
            k.version = 100;
        });
        guarded.ca.write_join(&guarded.place.path("join"));
        let options = Options { role, ..guarded.place.options() };
        enroll::enroll(&options, guarded.place.clock.clone()).await.unwrap();
        guarded
    }

    fn config(&self) -> Config {
        let mut config = self.place.config();
        let folder = self.place.folder.path().display();
        config.isolation.kernel =
            Kernel { program_path: format!("{folder}:/usr/bin:/bin"), ..Kernel::default() };
        config.isolation.exec_wait = Duration::from_millis(300);
        config.isolation.count_pause = Duration::from_millis(200);
        config
    }

    fn run(&self) -> Running {
        self.run_with(self.config())
    }

    fn run_with(&self, config: Config) -> Running {
        Running::new(Agent::open(config, self.place.clock.clone()).unwrap())
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.place.path(name)).unwrap_or_default()
    }

    fn table(&self) -> String {
        self.read("table")
    }

    fn write(&self, name: &str, text: &str) {
        durable::replace(&self.place.path(name), text.as_bytes(), Access::PUBLIC).unwrap();
    }

    /// How long it took from `since` until a report came that this version is applied.
    async fn acknowledged(&self, version: u64, since: Instant) -> (Duration, v1::Report) {
        let began = Instant::now();
        loop {
            let found = {
                let requests = self.ca.requests.lock().unwrap();
                let applies = |r: &v1::Report| r.applied.is_some_and(|v| v.counter == version);
                let report = |r: &v1::SyncRequest| r.report.clone().filter(applies);
                requests.iter().find_map(|(when, r)| Some((*when - since, report(r)?)))
            };
            if let Some(found) = found {
                eprintln!("version {version} acknowledged after {:?}", found.0);
                return found;
            }
            assert!(began.elapsed() < SOON, "{version} was never acknowledged");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Something changes at the CA.
    fn change(&self, turn: impl FnOnce(&mut crate::testca::Knobs)) {
        self.ca.with(|k| {
            turn(k);
            k.version += 1;
        });
    }
}

fn member(name: &str, role: v1::Role, address: &str) -> v1::Member {
    v1::Member {
        name: name.to_owned(),
        role: role.into(),
        state: v1::MemberState::Member.into(),
        addresses: vec![address.to_owned()],
    }
}

fn block(address: &str, all_traffic: bool) -> v1::Block {
    let (address, node) = (address.to_owned(), "n9".to_owned());
    v1::Block { address, node, until_unix: 0, all_traffic }
}

fn in_force(status: &Status) -> &str {
    &status.isolation.in_force
}

fn at(version: u64) -> impl Fn(&Status) -> bool {
    move |status| status.applied.as_deref() == Some(&format!("{:016x}/{version}", 7))
}

#[tokio::test]
async fn a_block_is_in_the_table_and_acknowledged_at_once() {
    let guarded = Guarded::new(v1::Isolation::Enforce).await;
    let agent = guarded.run();
    agent.until("the first table", at(100)).await;
    assert!(guarded.table().contains("elements = { 10.0.0.1, 10.0.0.2 }"), "{}", guarded.table());
    tokio::time::sleep(Duration::from_millis(1_500)).await;

    let revoked = Instant::now();
    guarded.change(|k| {
        k.members.as_mut().unwrap()[1].state = v1::MemberState::Revoked.into();
        k.blocks = vec![block("10.0.0.2", false), block("10.0.0.7", true)];
    });
    agent.until("the block", at(101)).await;
    let table = guarded.table();
    for set in ["set blocked4", "set cut4"] {
        let set = table.split(set).nth(1).unwrap().split('}').next().unwrap();
        assert!(set.contains("10.0.0."), "{table}");
    }
    let cuts = guarded.read("cuts");
    let (ports, all): (Vec<&str>, Vec<&str>) =
        cuts.lines().partition(|l| l.contains("sport = :6379"));
    assert!(ports.len() == 1 && ports[0].contains("( dst 10.0.0.2 ) and"), "{cuts}");
    assert_eq!(all, ["-HtKn dst 10.0.0.7"]);
    let (took, report) = guarded.acknowledged(101, revoked).await;
    let isolation = report.isolation.unwrap();
    assert_eq!(isolation.in_force(), v1::Isolation::Enforce);
    assert_eq!((isolation.sockets_closed, isolation.problem.as_str()), (4, ""));
    // Sooner than the least pause between two Syncs; on a busy machine not each time.
    let mut fastest = took;
    for version in 102..112 {
        if fastest < Duration::from_millis(200) {
            break;
        }
        let blocked = Instant::now();
        guarded.change(|k| k.blocks.push(block(&format!("10.0.1.{version}"), false)));
        fastest = fastest.min(guarded.acknowledged(version, blocked).await.0);
    }
    assert!(fastest < Duration::from_millis(200), "{fastest:?}");
    // The acknowledging Sync waits: it is one, not a stream of them.
    let syncs = guarded.ca.syncs.load(Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(guarded.ca.syncs.load(Ordering::SeqCst) <= syncs + 1);
    let status = agent.until("the counters", |s| s.isolation.refused_packets == 12).await;
    assert_eq!((status.isolation.blocked_packets, status.isolation.members), (7, 1));
    agent.stop().await;
    assert!(!guarded.table().is_empty(), "a stopped agent leaves its table");
}

#[tokio::test]
async fn a_snapshot_in_pages_is_loaded_as_a_whole() {
    let guarded = Guarded::new(v1::Isolation::Audit).await;
    let members =
        (1..=10).map(|i| member(&format!("m{i}"), v1::Role::Worker, &format!("10.1.{i}.1")));
    guarded.ca.with(|k| (k.members, k.page_len) = (Some(members.collect()), 3));
    // It knows nothing.
    std::fs::remove_file(guarded.place.path("state/sync.pb")).unwrap();
    let agent = guarded.run();
    let status = agent.until("the table", at(100)).await;
    assert_eq!(status.isolation.members, 10);
    assert_eq!(guarded.read("loads"), "0\n", "one load, and no rule that drops");
    agent.stop().await;
}

/// What the CA forgot while it could not be reached would never be told to who goes on with the next page.
#[tokio::test]
async fn pages_that_were_interrupted_are_all_asked_for_again() {
    let guarded = Guarded::new(v1::Isolation::Audit).await;
    let members =
        (1..=10).map(|i| member(&format!("m{i}"), v1::Role::Worker, &format!("10.1.{i}.1")));
    guarded.ca.with(|k| {
        (k.members, k.page_len, k.last_page) = (Some(members.collect()), 3, Some(1));
    });
    std::fs::remove_file(guarded.place.path("state/sync.pb")).unwrap();
    let agent = guarded.run();
    let began = Instant::now();
    // Two pages came, the third does not.
    while !guarded.ca.with(|k| k.deaf) {
        assert!(began.elapsed() < SOON, "never paged");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    agent.until("the CA is away", |s| s.ca.reachable == Some(false)).await;
    let before = guarded.ca.requests.lock().unwrap().len();
    guarded.ca.with(|k| {
        k.members.as_mut().unwrap().remove(0);
        (k.deaf, k.last_page) = (false, None);
    });
    let status = agent.until("the table", at(100)).await;
    assert_eq!(status.isolation.members, 9, "one of the first page is gone");
    let first = guarded.ca.requests.lock().unwrap()[before].1.clone();
    assert!(first.have.is_none() && !first.continues, "{first:?}");
    agent.stop().await;
}

#[tokio::test]
async fn the_kept_table_is_loaded_before_anybody_can_ask_with_the_ca_away() {
    let guarded = Guarded::new(v1::Isolation::Enforce).await;
    let agent = guarded.run();
    agent.until("the table", at(100)).await;
    agent.stop().await;
    let before = guarded.table();
    // The host starts again; the CA does not.
    std::fs::remove_file(guarded.place.path("table")).unwrap();
    guarded.ca.with(|k| k.deaf = true);
    let mut config = guarded.config();
    let socket = guarded.place.path("agent.sock");
    config.socket = Some(socket.clone());
    let agent = guarded.run_with(config);
    let began = Instant::now();
    while !socket.exists() {
        assert!(began.elapsed() < SOON, "no socket");
        tokio::task::yield_now().await;
    }
    assert_eq!(guarded.table().lines().count(), before.lines().count(), "the socket came first");
    agent.until("the version it knows", at(100)).await;
    agent.stop().await;
}

#[tokio::test]
async fn a_load_that_fails_keeps_ray_from_starting_under_enforce_alone() {
    for (isolation, starts) in [(v1::Isolation::Enforce, false), (v1::Isolation::Audit, true)] {
        let guarded = Guarded::new(isolation).await;
        guarded.write("fail", "Error: Operation not permitted");
        let agent = guarded.run();
        let problem = |s: &Status| s.isolation.problem.clone().unwrap_or_default();
        let status = agent.until("a problem", |s| problem(s).contains("NET_ADMIN")).await;
        assert_eq!((in_force(&status), status.applied.as_deref()), ("off", None));
        let now = guarded.place.clock.now();
        assert!(crate::status::check(&status, now).unwrap_err().to_string().contains("NET_ADMIN"));
        let answer = agent.handle.ask(Ask::ExecFolder).await;
        match (&answer, starts) {
            (Answer::ExecFolder(_), true) => {}
            (Answer::Error(error), false) => {
                assert!(error.message.contains("NET_ADMIN"), "{error:?}");
                assert!(error.message.contains("Ray is not started"), "{error:?}");
            }
            (_, _) => panic!("{isolation:?}: {answer:?}"),
        }
        // What was put right is tried again by itself.
        std::fs::remove_file(guarded.place.path("fail")).unwrap();
        agent.until("the table", at(100)).await;
        assert!(matches!(agent.handle.ask(Ask::ExecFolder).await, Answer::ExecFolder(_)));
        // A later load that fails keeps the last table, and is a problem.
        let table = guarded.table();
        guarded.write("fail", "Error: out of memory");
        guarded.change(|k| k.blocks = vec![block("10.0.0.9", false)]);
        let status = agent.until("another problem", |s| problem(s).contains("out of memory")).await;
        assert!(problem(&status).contains("stays") && at(100)(&status), "{:?}", status.isolation);
        assert_eq!(guarded.table(), table);
        agent.stop().await;
    }
}

#[tokio::test]
async fn a_first_enforce_that_cuts_off_the_ca_is_taken_back_and_later_ones_are_not() {
    let guarded = Guarded::new(v1::Isolation::Audit).await;
    let mut config = guarded.config();
    config.isolation.trial_time = Duration::from_millis(500);
    config.isolation.retrial_pause = Duration::from_millis(300);
    config.limits.connect = Duration::from_millis(200);
    let agent = guarded.run_with(config.clone());
    agent.until("audit", |s| in_force(s) == "audit" && s.ca.reachable == Some(true)).await;
    guarded.change(|k| {
        k.raw_isolation = Some(v1::Isolation::Enforce.into());
        k.deaf = true;
    });
    agent.until("enforce", |s| in_force(s) == "enforce").await;
    let status = agent.until("audit again", |s| in_force(s) == "audit").await;
    let problem = status.isolation.problem.unwrap();
    assert!(problem.contains("the CA was not reached"), "{problem}");
    assert!(!guarded.table().contains(" drop"), "{}", guarded.table());
    // The CA is back: it is tried again, and stays.
    guarded.ca.with(|k| k.deaf = false);
    agent
        .until("enforce for good", |s| in_force(s) == "enforce" && s.isolation.problem.is_none())
        .await;
    let record = || guarded.place.state().isolation().enforced;
    let began = Instant::now();
    while !record() {
        assert!(began.elapsed() < SOON, "never confirmed");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    agent.stop().await;
    // After a restart too: the CA goes away right after it answered.
    let agent = guarded.run_with(config);
    agent.until("a contact", |s| s.ca.reachable == Some(true)).await;
    guarded.change(|k| {
        k.blocks = vec![block("10.0.0.9", false)];
        k.deaf = true;
    });
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    assert_eq!(in_force(&agent.handle.status()), "enforce");
    assert!(guarded.table().contains(" drop"));
    agent.stop().await;
}

#[tokio::test]
async fn a_worker_starts_ray_when_the_head_knows_it_or_after_a_while() {
    let guarded = Guarded::of_role(v1::Isolation::Enforce, Role::Worker, system_clock()).await;
    assert_eq!(guarded.role, Role::Worker);
    let mut config = guarded.config();
    config.pauses.exec_folder = Duration::ZERO;
    let agent = guarded.run_with(config.clone());
    agent.until("the table", at(100)).await;
    let began = Instant::now();
    let Answer::ExecFolder(folder) = agent.handle.ask(Ask::ExecFolder).await else { panic!() };
    assert!(began.elapsed() >= config.isolation.exec_wait, "it did not wait");
    assert!(folder.note.unwrap().contains("each head has this node"));
    agent.stop().await;

    config.isolation.exec_wait = Duration::from_secs(8);
    let agent = guarded.run_with(config);
    agent.until("the table", at(100)).await;
    let asked = tokio::spawn({
        let handle = agent.handle.clone();
        async move { handle.ask(Ask::ExecFolder).await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!asked.is_finished(), "no head has said anything");
    // The loop goes on meanwhile: the status answers, and a change is applied.
    guarded.change(|k| k.blocks = vec![block("10.0.0.9", false)]);
    agent.until("the change", at(101)).await;
    assert!(!asked.is_finished());
    guarded.ca.with(|k| k.heads_applied = Some(100));
    let answer = tokio::time::timeout(Duration::from_secs(4), asked).await.expect("still waits");
    let Answer::ExecFolder(folder) = answer.unwrap() else { panic!("no folder") };
    assert_eq!(folder.note, None);
    agent.stop().await;
}

/// Nobody told the agent before: what refuses the new folder is the first word of it.
#[tokio::test]
async fn exec_starts_no_ray_where_its_own_call_learns_of_the_revocation() {
    let guarded = Guarded::new(v1::Isolation::Off).await;
    let mut config = guarded.config();
    config.pauses.exec_folder = Duration::ZERO;
    let agent = guarded.run_with(config);
    agent.until("enrolled", at(100)).await;
    guarded.ca.with(|k| k.refuse_leaf = Some(Reason::Revoked));
    let answer = agent.handle.ask(Ask::ExecFolder).await;
    let Answer::Error(error) = &answer else { panic!("Ray starts: {answer:?}") };
    assert!(error.message.contains("nothing was started"), "{error:?}");
    agent.stop().await;
}

#[tokio::test]
async fn off_removes_the_agent_s_own_table_and_no_other() {
    let guarded = Guarded::new(v1::Isolation::Off).await;
    guarded.write("table", "somebody's\n");
    let agent = guarded.run();
    agent.until("applied", at(100)).await;
    assert_eq!(guarded.table(), "somebody's\n");
    assert_eq!(guarded.read("loads"), "", "with isolation off nft is not needed");
    guarded.change(|k| k.raw_isolation = Some(v1::Isolation::Audit.into()));
    agent.until("audit", |s| in_force(s) == "audit").await;
    agent.stop().await;
    // By another process, too.
    guarded.change(|k| k.raw_isolation = Some(v1::Isolation::Off.into()));
    let agent = guarded.run();
    agent.until("off", |s| in_force(s) == "off" && at(102)(s)).await;
    assert_eq!(guarded.table(), "");
    agent.stop().await;
}

#[tokio::test]
async fn a_table_that_somebody_removed_comes_back() {
    let guarded = Guarded::new(v1::Isolation::Audit).await;
    let mut config = guarded.config();
    // No answer of the CA brings it back.
    config.limits.sync_wait = Duration::from_secs(60);
    let agent = guarded.run_with(config);
    agent.until("the table", at(100)).await;
    std::fs::remove_file(guarded.place.path("table")).unwrap();
    let began = Instant::now();
    while guarded.table().is_empty() {
        assert!(began.elapsed() < SOON, "never came back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    agent.stop().await;
}

/// Whoever empties a chain, or loads a table of his own, opens the door without removing anything.
#[tokio::test]
async fn a_table_that_somebody_emptied_or_replaced_is_loaded_again() {
    let guarded = Guarded::new(v1::Isolation::Enforce).await;
    let mut config = guarded.config();
    config.limits.sync_wait = Duration::from_secs(60);
    let agent = guarded.run_with(config);
    agent.until("the table", at(100)).await;
    let whole = guarded.table();
    let flushed: String =
        whole.lines().filter(|l| !l.contains("goto judge")).map(|l| format!("{l}\n")).collect();
    let of_a_script: String =
        whole.lines().filter(|l| !l.contains("load_")).map(|l| format!("{l}\n")).collect();
    for (name, text) in [("emptied", flushed), ("replaced", of_a_script)] {
        assert_ne!(text, whole);
        guarded.write("table", &text);
        let began = Instant::now();
        while guarded.table().lines().count() != whole.lines().count() {
            assert!(began.elapsed() < SOON, "{name}: never came back");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    // Its own table it leaves alone.
    let loads = guarded.read("loads");
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(guarded.read("loads"), loads);
    agent.stop().await;
}

/// A disk that kept nothing of it: the mark in the table says whose it is.
#[tokio::test]
async fn off_removes_a_table_that_no_file_knows_of() {
    let guarded = Guarded::new(v1::Isolation::Enforce).await;
    let agent = guarded.run();
    agent.until("the table", at(100)).await;
    agent.stop().await;
    std::fs::remove_file(guarded.place.path("state/isolation.json")).unwrap();
    guarded.change(|k| k.raw_isolation = Some(v1::Isolation::Off.into()));
    let agent = guarded.run();
    agent.until("off", |s| in_force(s) == "off" && at(101)(s)).await;
    assert_eq!(guarded.table(), "");
    agent.stop().await;
}

#[tokio::test]
async fn a_look_that_fails_for_long_is_a_problem_until_one_succeeds() {
    let guarded = Guarded::new(v1::Isolation::Enforce).await;
    let agent = guarded.run();
    agent.until("the table", at(100)).await;
    guarded.write("blind", "");
    let problem = |s: &Status| s.isolation.problem.clone().unwrap_or_default();
    agent.until("a problem", |s| problem(s).contains("cannot be looked at")).await;
    std::fs::remove_file(guarded.place.path("blind")).unwrap();
    agent.until("none", |s| s.isolation.problem.is_none()).await;
    assert_eq!(guarded.read("loads").lines().count(), 1, "no look loads anything");
    agent.stop().await;
}

#[tokio::test]
async fn sockets_that_could_not_be_closed_are_tried_again_and_nobody_waits_for_it() {
    let guarded = Guarded::new(v1::Isolation::Enforce).await;
    let agent = guarded.run();
    agent.until("the table", at(100)).await;
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    // One that does not end, and says no in the end.
    guarded.write("ss", "#!/bin/sh\nsleep 3; echo not today >&2; exit 1\n");
    let path = guarded.place.path("ss");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    let revoked = Instant::now();
    guarded.change(|k| k.blocks = vec![block("10.0.0.7", true)]);
    let (took, _) = guarded.acknowledged(101, revoked).await;
    assert!(took < Duration::from_millis(2_500), "{took:?}");
    agent
        .until("a problem", |s| {
            s.isolation.problem.as_ref().is_some_and(|p| p.contains("not today"))
        })
        .await;
    guarded.write("ss", SS);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    // Another block that succeeds must not make it forget the first.
    guarded.change(|k| k.blocks.push(block("10.0.0.8", true)));
    agent.until("no problem", |s| s.isolation.problem.is_none()).await;
    assert!(guarded.read("cuts").contains("dst 10.0.0.7"), "{}", guarded.read("cuts"));
    agent.stop().await;
}

#[tokio::test]
async fn another_port_plan_is_a_trial_again_and_closes_neither_ssh_nor_the_ca() {
    let guarded = Guarded::new(v1::Isolation::Enforce).await;
    let mut config = guarded.config();
    config.isolation.trial_time = Duration::from_millis(500);
    config.isolation.retrial_pause = Duration::from_millis(300);
    config.limits.connect = Duration::from_millis(200);
    let agent = guarded.run_with(config);
    agent.until("the table", at(100)).await;
    let began = Instant::now();
    while !guarded.place.state().isolation().enforced {
        assert!(began.elapsed() < SOON, "never confirmed");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let endpoint = format!("elements = {{ 127.0.0.1 . {} }}", guarded.ca.addr.port());
    assert!(guarded.table().contains(&endpoint), "{}", guarded.table());
    guarded.change(|k| {
        let plan = raymtls_proto::ports::default_plan();
        k.port_plan = v1::PortPlan { collective_min: 20, collective_max: 5_000, ..plan };
        k.deaf = true;
    });
    let status = agent.until("audit", |s| in_force(s) == "audit").await;
    assert!(status.isolation.problem.unwrap().contains("the CA was not reached"));
    for ports in ["tcp dport 20-21 goto judge", "tcp dport 23-5000 goto judge"] {
        assert!(guarded.table().contains(ports), "{}", guarded.table());
    }
    guarded.ca.with(|k| k.deaf = false);
    guarded.change(|k| k.blocks = vec![block("10.0.0.2", false), block("10.0.0.9", false)]);
    let open =
        |s: &Status| s.isolation.problem.as_ref().is_some_and(|p| p.contains("covers 22, SSH"));
    let status = agent.until("what stays open", |s| open(s) && s.isolation.blocked == 1).await;
    // A live member is listed and not blocked: that is said, too.
    assert_eq!(status.isolation.spared, 1);
    let spares = || {
        let requests = guarded.ca.requests.lock().unwrap();
        let report = requests.last().and_then(|(_, r)| r.report.clone()?.isolation);
        report.is_some_and(|report| report.spared_blocks == 1)
    };
    let began = Instant::now();
    while !spares() {
        assert!(began.elapsed() < SOON, "never reported");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    agent.stop().await;
}

/// Whoever answers the lookup of the CA's name names what he likes: what counts is who proved to be it.
#[tokio::test]
async fn a_name_of_the_ca_spares_nobody_and_the_endpoint_behind_it_stays_open() {
    let guarded = Guarded::new(v1::Isolation::Enforce).await;
    let mut node = guarded.place.state().node().unwrap().unwrap();
    let port = guarded.ca.addr.port();
    node.node_endpoints = vec![format!("localhost:{port}")];
    guarded.place.state().put_node(&node).unwrap();
    guarded.ca.with(|k| k.blocks = vec![block("10.0.0.9", true)]);
    let agent = guarded.run();
    agent.until("the table", at(100)).await;
    let wanted = format!("elements = {{ 127.0.0.1 . {port} }}");
    let began = Instant::now();
    while !guarded.table().contains(&wanted) {
        assert!(began.elapsed() < SOON, "{}", guarded.table());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(guarded.place.state().isolation().reached, [guarded.ca.addr]);
    agent.stop().await;
}

#[tokio::test]
async fn a_block_that_cannot_be_kept_on_the_disk_stays_in_force() {
    let guarded = Guarded::new(v1::Isolation::Enforce).await;
    let agent = guarded.run();
    agent.until("the table", at(100)).await;
    // What comes with the block cannot be written.
    let token = guarded.place.path("tls/ray_token");
    std::fs::remove_file(&token).unwrap();
    durable::make_parents(&token.join("in/the/way")).unwrap();
    guarded.change(|k| k.blocks = vec![block("10.0.0.9", false)]);
    agent.until("the block, though not kept", |s| s.isolation.blocked == 1).await;
    agent.until("a failure", |s| s.problems.iter().any(|p| p.contains("Sync"))).await;
    assert!(agent.handle.status().received.unwrap().ends_with("/100"));
    std::fs::remove_file(guarded.place.path("table")).unwrap();
    let began = Instant::now();
    while guarded.table().is_empty() {
        assert!(began.elapsed() < SOON, "never came back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(guarded.table().contains("elements = { 10.0.0.9 }"), "{}", guarded.table());
    agent.stop().await;
}

#[tokio::test]
async fn a_node_that_is_not_heard_says_when_its_lease_ends() {
    let clock = SettableClock::new(datetime!(2026-11-24 08:00 UTC));
    let guarded = Guarded::of_role(v1::Isolation::Audit, Role::Head, Arc::new(clock.clone())).await;
    guarded.change(|k| k.lease_seconds = 600);
    let agent = guarded.run();
    agent.until("the table", at(101)).await;
    guarded.ca.with(|k| k.refuse_word = Some("AWAY"));
    let lease = |s: &Status| s.problems.iter().any(|p| p.contains("half a lease"));
    tokio::time::sleep(Duration::from_millis(200)).await;
    clock.advance(Duration::from_secs(290));
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!lease(&agent.handle.status()));
    clock.advance(Duration::from_secs(15));
    let status = agent.until("a warning", lease).await;
    assert!(
        status.problems.iter().any(|p| p.contains("2026-11-24T08:10:00Z")),
        "{:?}",
        status.problems
    );
    agent.stop().await;
}
