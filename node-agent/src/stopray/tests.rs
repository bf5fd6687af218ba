use std::{
    os::unix::{fs::PermissionsExt, process::CommandExt},
    process::{Child, Command, Stdio},
};

use super::*;

const UID: u32 = 61_234;
const OTHER: u32 = 61_235;
const SESSION: &str = "--session-name=session_2026-11-24_08-00-00_123456_789";

#[test]
fn only_a_revoked_node_stops_ray_and_never_everybody_s() {
    let refused = |reason: Reason| Standing::Refused {
        reason: reason.as_str().to_owned(),
        message: "says the test".to_owned(),
    };
    let settings = |keeps| v1::Settings { revoked_keeps_ray: keeps, ..v1::Settings::default() };
    let (keeps, stops) = (settings(true), settings(false));
    let expired = Standing::ReenrolNeeded { reason: "REVOKED".to_owned(), message: String::new() };
    let revoked = refused(Reason::Revoked);
    let ray = Decision::Stop { uid: 1_000 };
    for (name, standing, settings, ray_uid, decision) in [
        ("revoked", &revoked, Some(&stops), Some(1_000), ray),
        ("revoked, settings never seen", &revoked, None, Some(1_000), ray),
        ("revoked, Ray's user unknown", &revoked, Some(&stops), None, Decision::Stop { uid: 990 }),
        ("revoked, Ray kept", &revoked, Some(&keeps), Some(1_000), Decision::Kept),
        ("enrolled", &Standing::Enrolled, Some(&stops), Some(1_000), Decision::NotRevoked),
        ("left", &Standing::Left, Some(&stops), Some(1_000), Decision::NotRevoked),
        ("over", &refused(Reason::ClusterEnded), None, Some(1_000), Decision::NotRevoked),
        ("another standing", &expired, None, Some(1_000), Decision::NotRevoked),
    ] {
        assert_eq!(decide(standing, settings, ray_uid, 990), decision, "{name}");
    }
}

fn seen(program: &str, words: &[&str], cert: Option<&str>) -> Inside {
    Inside::Seen {
        program: program.into(),
        words: words.iter().map(|word| (*word).to_owned()).collect(),
        leaf: match cert {
            Some("hidden") => Leaf::Hidden,
            Some(path) => Leaf::At(path.into()),
            None => Leaf::None,
        },
    }
}

#[test]
fn what_belongs_to_this_node_s_ray_is_chosen_and_nothing_else() {
    const OURS: Option<&str> = Some("/t/k1/tls.crt");
    let log = "--logs-dir=/tmp/ray/session_2026-11-24_08-00-00_123456_789/logs";
    let other = "--session-name=session_2026-11-24_09-00-00_1_2";
    let python = "/v/bin/python3.11";
    let table = [
        ("a raylet of this node", 10, 1, seen("/r/raylet", &["/r/raylet", SESSION], OURS), true),
        ("the GCS", 11, 1, seen("/r/gcs_server", &["gcs_server"], OURS), true),
        ("a worker", 12, 10, seen(python, &["ray::IDLE"], None), true),
        ("what a worker started", 13, 12, seen("/bin/sh", &["sh"], OURS), true),
        ("a helper of the session", 14, 1, seen(python, &["x.py", log], None), true),
        ("Ray Client's server", 15, 1, seen(python, &["-m", "ray.util.client.server"], OURS), true),
        (
            "a raylet of another node",
            20,
            1,
            seen("/r/raylet", &["r", other], Some("/u/k1/c")),
            false,
        ),
        ("its worker", 21, 20, seen(python, &["ray::IDLE"], None), false),
        ("its helper", 22, 1, seen(python, &["x.py", other], None), false),
        ("a raylet without TLS", 23, 1, seen("/r/raylet", &["raylet"], None), false),
        (
            "a task that calls itself so",
            24,
            1,
            seen("/bin/sleep", &["raylet", SESSION], OURS),
            false,
        ),
        ("a driver", 25, 1, seen(python, &["driver.py"], OURS), false),
        ("a look at the logs", 26, 1, seen("/bin/tail", &["tail", log], OURS), false),
        ("a raylet in a container", 27, 1, Inside::Elsewhere, false),
        ("a child in a container", 28, 10, Inside::Elsewhere, false),
        (
            "a raylet we may not look into, on our ports",
            30,
            1,
            seen("/r/raylet", &["--node_manager_port=6701"], Some("hidden")),
            true,
        ),
        ("its worker", 31, 30, seen(python, &["ray::IDLE"], Some("hidden")), true),
        (
            "another cluster's on the same host",
            32,
            1,
            seen("/r/raylet", &["--node_manager_port=7701", other], Some("hidden")),
            false,
        ),
        ("its helper", 33, 1, seen(python, &["monitor.py", other], Some("hidden")), false),
        ("this process", 29, 10, seen("/r/raylet", &["raylet"], OURS), false),
    ];
    let processes: Vec<Process> = table
        .iter()
        .map(|(name, pid, parent, inside, _)| Process {
            pid: *pid,
            started: 1,
            parent: *parent,
            title: (*name).to_owned(),
            inside: inside.clone(),
        })
        .collect();
    let marks = Marks {
        tls_dir: "/t".into(),
        plan: Some(raymtls_proto::ports::default_plan()),
        ended_session: None,
    };
    let chosen = choose(&processes, &marks.folders(), &marks.flags(), None, 29);
    for (name, pid, _, _, is_chosen) in &table {
        assert_eq!(chosen.iter().any(|p| p.pid == *pid), *is_chosen, "{name}");
    }
    assert_eq!([chosen[0].pid, chosen[1].pid, chosen[2].pid], [10, 11, 30], "daemons first");
    let (_, outcome) =
        look(&processes.iter().filter(|p| p.pid == 32).cloned().collect::<Vec<_>>(), UID, &marks);
    assert!(outcome.problem.unwrap().contains("another cluster's on the same host 32"));
}

#[test]
fn a_session_s_name_is_found_in_a_word() {
    let name = "session_2026-11-24_08-00-00_123456_789";
    for (word, found) in [
        (format!("--log_dir=/tmp/ray/{name}/logs"), Some(name)),
        (format!("--session-name={name}"), Some(name)),
        ("--session-dir=/tmp/ray/session_latest".to_owned(), None),
    ] {
        assert_eq!(session_in(&word), found, "{word}");
    }
}

/// Stand-ins of Ray's daemons: real processes of a user of their own, with the names, the environment
/// and the tree of real ones.
struct Stage {
    folder: tempfile::TempDir,
    children: Vec<Child>,
}

impl Stage {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for program in DAEMONS {
            // By another process: a file that this one writes may be open in a child of another test.
            let copied =
                Command::new("cp").arg("/bin/sh").arg(folder.path().join(program)).status();
            assert!(copied.unwrap().success());
        }
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(folder.path(), open).unwrap();
        Self { folder, children: Vec::new() }
    }

    fn tls(&self) -> PathBuf {
        self.folder.path().join("tls")
    }

    /// Runs a script of sh under a name and a user, and returns its place among the children.
    fn start(&mut self, name: &str, uid: u32, tls: &Path, script: &str) -> usize {
        let child = Command::new(self.folder.path().join(name))
            .args(["-c", script])
            .env_clear()
            .env("RAY_TLS_SERVER_CERT", tls.join("k1/tls.crt"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .uid(uid)
            .spawn()
            .unwrap();
        self.children.push(child);
        self.children.len() - 1
    }

    fn lives(&mut self, index: usize) -> bool {
        self.children[index].try_wait().unwrap().is_none()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn marks(tls: &Path) -> Marks {
    Marks { tls_dir: tls.to_path_buf(), plan: None, ended_session: None }
}

fn descendants(uid: u32) -> usize {
    proc::of_user(uid).unwrap().len()
}

/// One story, so that no two tests share the users.
#[tokio::test]
async fn real_processes_of_this_node_end_and_all_others_live_on() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not run: other users' processes need root");
        return;
    }
    let mut stage = Stage::new();
    let tls = stage.tls();
    let sleep = "sleep 300 & wait";
    let gcs = stage.start("gcs_server", UID, &tls, sleep);
    // It does not heed SIGTERM, and its child lies one deeper.
    let raylet = stage.start("raylet", UID, &tls, "trap '' TERM; (sleep 300 & wait) & wait; wait");
    let of_other_user = stage.start("raylet", OTHER, &tls, sleep);
    let of_other_node = stage.start("raylet", UID, Path::new("/elsewhere"), "exec sleep 300");
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(descendants(UID), 6);

    let began = Instant::now();
    let outcome = stop(UID, marks(&tls)).await;
    assert!(began.elapsed() >= GRACE, "SIGKILL came before its time: {:?}", began.elapsed());
    assert_eq!((outcome.stopped, &outcome.problem), (5, &None), "{outcome:?}");
    assert!(outcome.named[..2].iter().any(|name| name.starts_with("raylet ")), "{outcome:?}");
    assert!(!stage.lives(gcs) && !stage.lives(raylet));
    assert!(stage.lives(of_other_user) && stage.lives(of_other_node));
    assert_eq!(descendants(UID), 1, "another node's");
    let again = stop(UID, marks(&stage.tls())).await;
    assert!(again.is_nothing(), "{again:?}");
}

/// As it is without the capability: somebody else looks and signals, in a thread of its own.
#[test]
fn a_missing_permission_is_named() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not run: other users' processes need root");
        return;
    }
    const VICTIM: u32 = 61_236;
    let mut stage = Stage::new();
    let tls = stage.tls();
    let raylet = stage.start("raylet", VICTIM, &tls, "sleep 300 & wait");
    std::thread::sleep(Duration::from_millis(300));
    let read = |uid| {
        let all = proc::of_user(uid).unwrap();
        all.into_iter()
            .map(|p| Process { inside: proc::read_memory(&p, matters), ..p })
            .collect::<Vec<_>>()
    };
    let (all, _) = look(&read(VICTIM), VICTIM, &marks(&tls));
    assert_eq!(all.len(), 2);
    let problem = std::thread::spawn(move || {
        use rustix::{process::Uid, thread::set_thread_res_uid};
        let (root, nobody) = (Uid::ROOT, Uid::from_raw(65_534));
        set_thread_res_uid(nobody, nobody, root).unwrap();
        let (held, seen) = look(&read(VICTIM), VICTIM, &marks(&tls));
        assert!(held.is_empty());
        let (mut all, mut outcome) = (all, Outcome::default());
        signal(&mut all, Signal::TERM, VICTIM, &mut outcome);
        [seen.problem.unwrap(), outcome.problem.unwrap()]
    });
    let [seen, signalled] = problem.join().unwrap();
    assert!(seen.contains("SYS_PTRACE"), "{seen}");
    assert!(signalled.contains("2 processes of Ray") && signalled.contains("KILL"), "{signalled}");
    assert!(stage.lives(raylet));
}
