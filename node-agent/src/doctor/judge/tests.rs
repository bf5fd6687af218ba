//! One host on which all is well, and what each change to it is called.

use std::{collections::BTreeSet, path::PathBuf};

use raymtls_proto::{identity::Subject, leaf::LeafFacts, serial::Serial, v1};
use time::{OffsetDateTime, macros::datetime};

use super::{
    super::{
        Finding, Level,
        facts::{Agent, Facts, Key, Process, Room, Unseen, Variables},
        files::{Entry, EntryKind, Folder},
        own::Public,
    },
    judge,
};
use crate::{
    config::Config,
    isolation::status::IsolationStatus,
    moment::Moment,
    served::{
        ProcessServed, Served, Serves, SocketServed,
        horizon::State,
        kind::{Class, Kind},
    },
    status::{CertificateStatus, Contact, FolderStatus, SplitStatus, Status},
};

const NOW: OffsetDateTime = datetime!(2026-11-24 08:00 UTC);
const DAY: time::Duration = time::Duration::days(1);
const NINE_DAYS: time::Duration = time::Duration::days(9);
const RAY: u32 = 1_000;

fn config() -> Config {
    let mut config = Config::in_process("/state".into(), "/tls".into());
    config.ray_gid = Some(990);
    config
}

fn leaf() -> Public {
    let subject = Subject::RayNode("c1".parse().unwrap(), "n1".parse().unwrap());
    let issued = u64::try_from((NOW - DAY).unix_timestamp()).unwrap() * 1_000;
    let facts = LeafFacts {
        serial: Serial::new(issued, [7; 10]),
        issuer_der: vec![],
        not_before: NOW - DAY,
        not_after: NOW + NINE_DAYS,
        spki_der: vec![1],
        subject_der: vec![0x30, 0],
        addresses: vec!["10.0.0.1".parse().unwrap(), "127.0.0.1".parse().unwrap()],
        dns_names: vec![],
        uris: vec![subject.uri(&"ray.example".parse().unwrap())],
        other_names: 0,
        server_auth: true,
        client_auth: true,
        other_eku: false,
        is_ca: false,
        key_usage: Some(1),
        path_len: None,
        authority_key_id: Some(vec![1]),
        extensions: vec![],
    };
    let chain = v1::CertificateChain { leaf_der: vec![], issuers_der: vec![] };
    Public { chain, facts, roots: vec![] }
}

fn status() -> Status {
    let certificate = || CertificateStatus {
        serial: "01".into(),
        not_after: (NOW + NINE_DAYS).into(),
        renew_at: (NOW + DAY).into(),
    };
    Status {
        as_of: (NOW - DAY).into(),
        agent_version: "1".into(),
        pid: 1,
        trust_domain: "ray.example".into(),
        cluster: "c1".into(),
        node: "n1".into(),
        role: "worker".into(),
        addresses: vec![],
        dns_names: vec![],
        standing: "enrolled".into(),
        standing_reason: None,
        ca: Contact { reachable: Some(true), last_contact: None, last_error: None, next_try: None },
        identity: certificate(),
        key_folders: vec![FolderStatus {
            name: "k1".into(),
            current: true,
            named_by_ray_env: true,
            key_too_old: false,
            leaf: certificate(),
        }],
        files_work_until: None,
        has_ray_token: Some(true),
        ray_env: String::new(),
        settings: None,
        received: None,
        applied: None,
        two_key_split: SplitStatus { holds: None, why: String::new() },
        renewals: 0,
        clock_skew_seconds: Some(0),
        ray_stop: None,
        tunnel: None,
        isolation: IsolationStatus {
            wanted: "enforce".into(),
            in_force: "enforce".into(),
            ..IsolationStatus::default()
        },
        served: None,
        served_problem: None,
        lease_ends: None,
        first_failure: None,
        problems: vec![],
    }
}

fn entry(name: &str, kind: EntryKind, gid: u32, mode: u32) -> Entry {
    Entry { name: name.into(), kind, uid: 0, gid, mode, links: 1 }
}

fn tls() -> Folder {
    let mut entries = vec![
        entry("k1", EntryKind::Folder, 990, 0o750),
        entry("k1/tls.key", EntryKind::File, 990, 0o640),
        entry("current", EntryKind::Link("k1".into()), 0, 0o777),
        entry("ray.env", EntryKind::File, 0, 0o644),
        entry("ray_token", EntryKind::File, 990, 0o640),
        entry("tls.key", EntryKind::Link("current/tls.key".into()), 0, 0o777),
    ];
    for name in ["tls.crt", "ca.crt", "crl.pem"] {
        entries.push(entry(&format!("k1/{name}"), EntryKind::File, 0, 0o644));
        entries.push(entry(name, EntryKind::Link(format!("current/{name}").into()), 0, 0o777));
    }
    let path = PathBuf::from("/tls");
    Folder { path, uid: 0, gid: 0, mode: 0o755, misplaced: None, entries, cut: false }
}

fn state() -> Folder {
    let path = PathBuf::from("/state");
    let entries = vec![entry("identity.pem", EntryKind::File, 0, 0o600)];
    Folder { path, uid: 0, gid: 0, mode: 0o700, misplaced: None, entries, cut: false }
}

fn raylet() -> ProcessServed {
    let leaf = Serves::Leaf {
        serial: "01".into(),
        issued: (NOW - DAY).into(),
        not_after: (NOW + NINE_DAYS).into(),
        trusts: vec![],
        refused_us: None,
    };
    ProcessServed {
        pid: Some(30),
        uid: RAY,
        kind: Kind::Raylet,
        class: Class::Node,
        name: "raylet".into(),
        session: None,
        state: Some(State::Fresh),
        horizon: Some((NOW + NINE_DAYS).into()),
        sockets: vec![SocketServed {
            address: "0.0.0.0:6701".into(),
            port: Some("node_manager".into()),
            serves: leaf,
        }],
    }
}

fn served(state: State, drivers: Option<State>) -> Served {
    Served {
        as_of: NOW.into(),
        state: Some(state),
        horizon: Some(Moment::from(NOW + NINE_DAYS)),
        drivers_state: drivers,
        drivers_horizon: drivers.map(|_| Moment::from(NOW + DAY)),
        processes: vec![raylet()],
        blind: vec![],
    }
}

fn process() -> Process {
    Process {
        pid: 30,
        uid: RAY,
        gids: vec![RAY, 990],
        kind: Kind::Raylet,
        advertises: Some("10.0.0.1".parse().unwrap()),
        variables: Ok(Variables {
            use_tls: Some("1".into()),
            cert: Some("/tls/k1/tls.crt".into()),
            auth_mode: Some("token".into()),
            token_path: Some("/tls/ray_token".into()),
            has_token: false,
        }),
    }
}

fn good() -> Facts {
    let room = Room { bytes: 1 << 30, files: 9_999, counts_files: true, read_only: false };
    Facts {
        now: NOW,
        euid: 0,
        tls_dir: "/tls".into(),
        enrolled_gid: Some(Some(990)),
        agent: Agent::Answers(Box::new(status())),
        leaf: Ok(leaf()),
        key: Key::IsTheLeafs,
        host_addresses: vec!["10.0.0.1".parse().unwrap()],
        settings: Ok(v1::Settings { ray_token: true, mode: 1, ..v1::Settings::default() }),
        served: Ok(served(State::Fresh, None)),
        not_asked: None,
        processes: vec![process()],
        state: Ok(state()),
        tls: Ok(tls()),
        exposed: vec![],
        rooms: vec![("/state".into(), Ok(room)), ("/tls".into(), Ok(room))],
        ca: Ok(vec![("ca:7444".into(), Ok(()))]),
        reserved: Ok(None),
    }
}

/// Without the chain, which a leaf of numbers has none of.
fn findings(facts: &Facts) -> Vec<Finding> {
    let all = judge(facts, &config());
    all.into_iter().filter(|finding| finding.check != "chain").collect()
}

#[test]
fn a_host_on_which_all_is_well_has_nothing_to_look_at() {
    let findings = findings(&good());
    let bad: Vec<_> = findings.iter().filter(|finding| finding.level != Level::Ok).collect();
    assert!(bad.is_empty(), "{bad:#?}");
    assert!(findings.iter().all(|finding| finding.next.is_none()), "{findings:#?}");
    let checks: BTreeSet<_> = findings.iter().map(|finding| finding.check).collect();
    assert_eq!(checks.len(), 20, "{checks:?}");
}

type Change = (&'static str, fn(&mut Facts), &'static str, Level, &'static str);

fn of_status(facts: &mut Facts, change: impl FnOnce(&mut Status)) {
    let mut status = status();
    change(&mut status);
    facts.agent = Agent::Answers(Box::new(status));
}

fn of_variables(facts: &mut Facts, change: impl FnOnce(&mut Variables)) {
    change(facts.processes[0].variables.as_mut().unwrap());
}

fn of_tls(facts: &mut Facts, name: &str, change: impl FnOnce(&mut Entry)) {
    let tls = facts.tls.as_mut().unwrap();
    change(tls.entries.iter_mut().find(|entry| entry.name == name).unwrap());
}

fn serve(facts: &mut Facts, address: &str, port: Option<&str>, serves: Serves) {
    let socket = SocketServed { address: address.into(), port: port.map(Into::into), serves };
    facts.served.as_mut().unwrap().processes[0].sockets.push(socket);
}

fn foreign(refused_us: Option<&str>) -> Serves {
    let why = "it names no node".to_owned();
    let refused_us = refused_us.map(Into::into);
    Serves::Foreign { why, serial: None, not_after: None, trusts: vec![], refused_us }
}

fn room(facts: &mut Facts, change: impl FnOnce(&mut Room)) {
    change(facts.rooms[1].1.as_mut().unwrap());
}

#[test]
fn each_change_for_the_worse_is_found_and_called_by_its_name() {
    use Level::{Fail, Unknown, Warn};
    let rows: Vec<Change> = vec![
        ("silent", |f| f.agent = Agent::Silent("no socket".into()), "daemon", Fail, "no status"),
        (
            "wrote",
            |f| f.agent = Agent::Wrote(Box::new(status()), "refused".into()),
            "daemon",
            Fail,
            "it wrote its status 1d ago",
        ),
        (
            "revoked",
            |f| {
                of_status(f, |s| {
                    s.standing = "refused".into();
                    s.standing_reason = Some("REVOKED: by ops".into());
                });
            },
            "standing",
            Fail,
            "refused: REVOKED",
        ),
        (
            "a problem",
            |f| of_status(f, |s| s.problems.push("no nft".into())),
            "problem",
            Warn,
            "no nft",
        ),
        ("clock", |f| of_status(f, |s| s.clock_skew_seconds = Some(7_200)), "clock", Fail, "2h"),
        (
            "no clock",
            |f| of_status(f, |s| s.clock_skew_seconds = None),
            "clock",
            Unknown,
            "not compared",
        ),
        (
            "ca away",
            |f| f.ca = Ok(vec![("a".into(), Err("a: refused".into()))]),
            "ca",
            Fail,
            "refused",
        ),
        (
            "one endpoint away",
            |f| f.ca = Ok(vec![("a".into(), Ok(())), ("b".into(), Err("b: refused".into()))]),
            "ca",
            Warn,
            "b: refused",
        ),
        (
            "nobody knows the ca",
            |f| {
                of_status(f, |s| s.ca.reachable = None);
                f.ca = Err("closed".into());
            },
            "ca",
            Unknown,
            "closed",
        ),
        ("no leaf", |f| f.leaf = Err("there is no tls.crt".into()), "leaf", Fail, "there is no"),
        (
            "no leaf to see",
            |f| {
                f.leaf = Err("permission denied".into());
                f.euid = 7;
            },
            "leaf",
            Unknown,
            "permission denied",
        ),
        ("another key", |f| f.key = Key::IsAnother, "key", Fail, "do not belong together"),
        ("key unread", |f| f.key = Key::Unread("denied".into()), "key", Unknown, "denied"),
        (
            "no serverAuth",
            |f| f.leaf.as_mut().unwrap().facts.server_auth = false,
            "usage",
            Fail,
            "lacks serverAuth",
        ),
        (
            "no clientAuth",
            |f| f.leaf.as_mut().unwrap().facts.client_auth = false,
            "usage",
            Fail,
            "lacks clientAuth",
        ),
        ("over", |f| f.leaf.as_mut().unwrap().facts.not_after = NOW, "validity", Fail, "ended"),
        (
            "too early",
            |f| f.leaf.as_mut().unwrap().facts.not_before = NOW + DAY,
            "validity",
            Fail,
            "holds in 1d only",
        ),
        (
            "late",
            |f| f.leaf.as_mut().unwrap().facts.not_after = NOW + DAY / 2,
            "validity",
            Warn,
            "should have been renewed",
        ),
        (
            "advertised elsewhere",
            |f| f.processes[0].advertises = Some("10.0.0.2".parse().unwrap()),
            "address",
            Fail,
            "advertises 10.0.0.2, and the leaf is for 10.0.0.1",
        ),
        (
            "no address of this host",
            |f| {
                f.processes.clear();
                f.host_addresses = vec!["10.0.0.2".parse().unwrap()];
            },
            "address",
            Warn,
            "none of these",
        ),
        (
            "a key all can read",
            |f| of_tls(f, "k1/tls.key", |e| e.mode = 0o644),
            "tls_files",
            Fail,
            "/tls/k1/tls.key has mode 0644, where 0640 is right",
        ),
        (
            "another group",
            |f| of_tls(f, "k1/tls.key", |e| e.gid = 0),
            "tls_files",
            Fail,
            "has group 0, where Ray's is 990",
        ),
        (
            "another's file",
            |f| of_tls(f, "ray.env", |e| e.uid = RAY),
            "tls_files",
            Fail,
            "belongs to uid 1000",
        ),
        ("two names", |f| of_tls(f, "ray.env", |e| e.links = 2), "tls_files", Fail, "has 2 names"),
        (
            "current leads nowhere",
            |f| of_tls(f, "current", |e| e.kind = EntryKind::Link("k7".into())),
            "tls_files",
            Fail,
            "points to \"k7\", where k1 is right",
        ),
        (
            "left over",
            |f| {
                let entry = entry("k1/.tls.crt.tmp", EntryKind::File, 0, 0o600);
                f.tls.as_mut().unwrap().entries.push(entry);
            },
            "tls_files",
            Warn,
            "half written",
        ),
        (
            "an open state folder",
            |f| f.state.as_mut().unwrap().mode = 0o755,
            "state_files",
            Fail,
            "has mode 0755, where 0700 is right",
        ),
        (
            "an open identity",
            |f| f.state.as_mut().unwrap().entries[0].mode = 0o640,
            "state_files",
            Fail,
            "identity.pem has mode 0640",
        ),
        (
            "a folder anyone can replace",
            |f| f.state.as_mut().unwrap().misplaced = Some("lies in /tmp".into()),
            "state_files",
            Fail,
            "lies in /tmp",
        ),
        (
            "a state folder unseen",
            |f| f.state = Err("denied".into()),
            "state_files",
            Unknown,
            "denied",
        ),
        (
            "hooks",
            |f| f.exposed.push("/h may be written by others".into()),
            "operator_files",
            Fail,
            "/h may",
        ),
        (
            "due",
            |f| f.served = Ok(served(State::RecycleDue, None)),
            "horizon",
            Warn,
            "recycle-due: the first leaf that is served ends 2026-12-03",
        ),
        (
            "overdue",
            |f| f.served = Ok(served(State::RecycleOverdue, None)),
            "horizon",
            Fail,
            "recycle-overdue",
        ),
        (
            "an old driver",
            |f| f.served = Ok(served(State::Fresh, Some(State::RecycleOverdue))),
            "drivers",
            Fail,
            "(in 1d)",
        ),
        ("no /proc", |f| f.served = Err("no /proc".into()), "horizon", Unknown, "no /proc"),
        ("nobody asked", |f| f.not_asked = Some("no key".into()), "horizon", Unknown, "no key"),
        (
            "it refuses us",
            |f| serve(f, "0.0.0.0:6702", None, foreign(Some("alert UnknownCA"))),
            "served",
            Fail,
            "raylet 30 at 0.0.0.0:6702: alert UnknownCA",
        ),
        (
            "foreign",
            |f| serve(f, "0.0.0.0:6702", None, foreign(None)),
            "served",
            Warn,
            "names no node",
        ),
        (
            "plaintext Ray",
            |f| serve(f, "127.0.0.1:6702", Some("object_manager"), Serves::Plain { seen: true }),
            "served",
            Fail,
            "on ports that Ray's TLS covers",
        ),
        (
            "blind",
            |f| f.served.as_mut().unwrap().blind.push("2 processes".into()),
            "served",
            Unknown,
            "2 processes",
        ),
        (
            "an open HTTP port",
            |f| {
                of_status(f, |s| s.isolation.in_force = "off".into());
                let plain = Serves::Plain { seen: false };
                serve(f, "10.0.0.1:8265", Some("dashboard"), plain);
            },
            "plain_ports",
            Warn,
            "raylet 30 at 10.0.0.1:8265 (dashboard)",
        ),
        ("no TLS", |f| of_variables(f, |v| v.use_tls = None), "ray_environment", Fail, "raylet 30"),
        (
            "TLS is off",
            |f| of_variables(f, |v| v.use_tls = Some("0".into())),
            "ray_environment",
            Fail,
            "RAY_USE_TLS",
        ),
        (
            "a folder that is gone",
            |f| of_variables(f, |v| v.cert = Some("/tls/k9/tls.crt".into())),
            "ray_environment",
            Fail,
            "k9, which is gone",
        ),
        (
            "files behind a link",
            |f| of_variables(f, |v| v.cert = Some("/tls/current/tls.crt".into())),
            "ray_environment",
            Warn,
            "in no key folder",
        ),
        (
            "no token",
            |f| of_variables(f, |v| v.auth_mode = None),
            "ray_environment",
            Fail,
            "RAY_AUTH_MODE",
        ),
        (
            "the token itself",
            |f| of_variables(f, |v| v.has_token = true),
            "ray_environment",
            Warn,
            "stands in the environment",
        ),
        (
            "an environment unread",
            |f| f.processes[0].variables = Err(Unseen::Closed("denied".into())),
            "ray_environment",
            Unknown,
            "denied",
        ),
        (
            "no token file",
            |f| f.tls.as_mut().unwrap().entries.retain(|e| e.name != "ray_token"),
            "ray_token",
            Fail,
            "missing",
        ),
        ("token off", |f| f.settings.as_mut().unwrap().ray_token = false, "ray_token", Warn, "off"),
        ("Ray as root", |f| f.processes[0].uid = 0, "two_key_split", Warn, "as root"),
        ("nobody knows", |f| f.processes.clear(), "two_key_split", Unknown, "not configured"),
        (
            "out of Ray's group",
            |f| f.processes[0].gids = vec![RAY],
            "key_access",
            Fail,
            "raylet 30 (uid 1000)",
        ),
        (
            "isolation failed",
            |f| of_status(f, |s| s.isolation.problem = Some("rolled back".into())),
            "isolation",
            Fail,
            "rolled back",
        ),
        (
            "isolation off",
            |f| of_status(f, |s| s.isolation = IsolationStatus::default()),
            "isolation",
            Warn,
            "off: whoever",
        ),
        (
            "isolation not yet",
            |f| of_status(f, |s| s.isolation.in_force = "off".into()),
            "isolation",
            Warn,
            "WANTED",
        ),
        ("ports", |f| f.reserved = Ok(Some("6701".into())), "reserved_ports", Warn, "6701"),
        ("ports unseen", |f| f.reserved = Err("x".into()), "reserved_ports", Unknown, "x"),
        ("no room", |f| room(f, |r| r.bytes = 0), "room", Fail, "0 MiB are left at /tls"),
        ("little room", |f| room(f, |r| r.bytes = 9 << 20), "room", Warn, "9 MiB"),
        ("no files", |f| room(f, |r| r.files = 0), "room", Warn, "0 more files"),
        ("read-only", |f| room(f, |r| r.read_only = true), "room", Fail, "read-only"),
    ];
    for (name, change, check, level, part) in rows {
        let mut facts = good();
        change(&mut facts);
        let all = findings(&facts);
        let found = all.iter().find(|f| f.check == check && f.level == level);
        let found = found.unwrap_or_else(|| panic!("{name}: {all:#?}"));
        assert!(found.what.contains(part), "{name}: {}", found.what);
        assert!(found.next.as_ref().is_some_and(|next| !next.is_empty()), "{name}");
        assert!(all.iter().all(|f| (f.level == Level::Ok) == f.next.is_none()), "{name}: {all:#?}");
    }
}

#[test]
fn a_host_that_is_not_enrolled_is_told_so_once() {
    let gone = || "No such file or directory (os error 2)".to_owned();
    let mut facts = good();
    facts.state = Err(gone());
    facts.tls = Err(gone());
    facts.reserved = Err("/state holds no enrolment: run node-agent enroll first".to_owned());
    facts.ca = Err("this host is not enrolled".to_owned());
    let all = findings(&facts);
    let unknown: Vec<_> = all.iter().filter(|f| f.level == Level::Unknown).collect();
    let [one] = unknown[..] else { panic!("{all:#?}") };
    assert!(one.what.contains("/state, /tls"), "{one:?}");
    assert!(one.next.as_ref().is_some_and(|next| next.contains("enroll")), "{one:?}");
}

#[test]
fn a_title_over_an_environment_is_no_fault() {
    let mut facts = good();
    let agent = Process {
        pid: 31,
        kind: Kind::DashboardAgent,
        variables: Err(Unseen::Overwritten),
        ..process()
    };
    facts.processes.push(agent);
    let all = findings(&facts);
    assert!(all.iter().all(|finding| finding.level == Level::Ok), "{all:#?}");
}

#[test]
fn enforced_isolation_closes_what_has_no_tls() {
    let mut facts = good();
    serve(&mut facts, "10.0.0.1:8265", Some("dashboard"), Serves::Plain { seen: false });
    let all = findings(&facts);
    let found = all.iter().find(|finding| finding.check == "plain_ports").unwrap();
    assert_eq!(found.level, Level::Ok, "{found:?}");
    assert!(found.what.contains("10.0.0.1:8265"), "{found:?}");
}

#[test]
fn a_leaf_without_a_chain_is_found() {
    let all = judge(&good(), &config());
    let found = all.iter().find(|finding| finding.check == "chain").unwrap();
    assert_eq!(found.level, Level::Fail, "{found:?}");
}

#[test]
fn a_tunnel_that_is_not_ready_is_a_failure_and_mode_files_says_nothing_of_it() {
    use crate::status::tunnel::TunnelStatus;
    for (tunnel, wanted) in [
        (None, None),
        (Some(TunnelStatus { ready: true, ..TunnelStatus::default() }), Some(Level::Ok)),
        (
            Some(TunnelStatus { problem: Some("no process".into()), ..TunnelStatus::default() }),
            Some(Level::Fail),
        ),
    ] {
        let mut facts = good();
        facts.agent = Agent::Answers(Box::new(Status { tunnel, ..status() }));
        let found = findings(&facts).into_iter().find(|finding| finding.check == "tunnel");
        assert_eq!(found.map(|finding| finding.level), wanted);
    }
}
