//! Whose sockets are found, and what is said of those that are not.

use raymtls_proto::ports::Port;

use super::{
    super::{kind::Kind, proc::Found},
    *,
};

fn summary(found: &Found) -> Vec<(u16, Kind, Option<Port>, bool)> {
    let of = |socket: &super::super::proc::Socket| {
        (socket.addr.port(), socket.kind(), socket.port, socket.elsewhere)
    };
    found.sockets.iter().map(of).collect()
}

#[test]
fn rays_sockets_are_found_by_process_and_nobody_elses() {
    let mut host = Host::new();
    host.listen([
        (at("10.0.0.1", 22), 1),
        (at("10.0.0.1", 10_050), 2),
        (at("::", 6_701), 3),
        (at("::", 33_333), 4),
        (at("::ffff:10.0.0.1", 6_379), 5),
        (at("127.0.0.1", 8_080), 6),
        (at("10.0.0.1", 10_051), 7),
        (at("10.0.0.1", 6_705), 8),
    ]);
    host.process(10, &["/usr/sbin/sshd"], &[1]);
    let worker = host.process(20, &["ray::Counter.add"], &[2, 6]);
    symlink("/t/job-driver-x.log", worker.join("fd/9")).unwrap();
    host.process(30, &["/r/raylet", "--session-dir=/tmp/ray/session_9"], &[3, 4]);
    host.process(40, &["/r/gcs_server"], &[5]);
    let driver = host.process(50, &["/usr/bin/python3", "train.py"], &[7]);
    let log = format!("/t/session_9/logs/python-core-driver-0a000000{}_50.log", "f".repeat(48));
    symlink(&log, driver.join("fd/9")).unwrap();
    write(&driver.join("maps"), "7f00-7f01 r-xp 0 fe:01 1 /v/site-packages/ray/_raylet.so\n");
    host.process(60, &["nc", "-l", "6705"], &[8]);
    let found = host.search().run().unwrap();
    assert_eq!(
        summary(&found),
        [
            (6_379, Kind::GcsServer, Some(Port::Gcs), false),
            (6_701, Kind::Raylet, Some(Port::NodeManager), false),
            (33_333, Kind::Raylet, None, false),
            (10_051, Kind::Driver, Some(Port::Workers), false),
            (10_050, Kind::Worker, Some(Port::Workers), false),
            (8_080, Kind::Worker, None, false),
            (6_705, Kind::Other, Some(Port::DashboardAgentHttp), false),
        ]
    );
    let raylet = found.sockets[1].process.as_ref().unwrap();
    assert_eq!((raylet.pid, raylet.session.as_deref()), (30, Some("session_9")));
    let job = |at: usize| found.sockets[at].process.as_ref().unwrap().job.as_ref();
    assert_eq!(job(3).map(ToString::to_string).as_deref(), Some("job 0a000000"));
    assert_eq!(job(4), None, "a worker is nobody's driver");
    assert_eq!(found.blind.sentences(), Vec::<String>::new());
}

#[test]
fn sockets_of_other_users_are_not_rays() {
    let mut host = Host::new();
    host.listen([(at("10.0.0.1", 6_701), 1)]);
    host.process(30, &["/r/raylet"], &[1]);
    let others = Search { uids: vec![own_uid() + 1], ..host.search() };
    assert_eq!(others.run().unwrap().sockets, []);
    let anybodys = Search { uids: vec![], ..host.search() };
    assert_eq!(anybodys.run().unwrap().sockets.len(), 1);
}

#[test]
fn a_process_that_cannot_be_seen_is_said_to_be_one() {
    let mut host = Host::new();
    host.listen([(at("10.0.0.1", 6_701), 1), (at("10.0.0.1", 40_000), 2)]);
    // As /proc answers without SYS_PTRACE; root is not stopped by a mode.
    let path = host.process(30, &["/r/raylet"], &[]);
    std::fs::remove_dir_all(path.join("fd")).unwrap();
    let found = host.search().run().unwrap();
    assert_eq!(summary(&found), [(6_701, Kind::Other, Some(Port::NodeManager), false)]);
    assert_eq!(found.sockets[0].process, None);
    assert_eq!((found.blind.processes, found.blind.sockets), (1, 1));
    assert!(found.blind.sentences()[0].contains("SYS_PTRACE"), "{:?}", found.blind);
}

#[test]
fn another_network_namespace_is_named_and_a_container_counted() {
    let mut host = Host::new();
    host.listen([(at("0.0.0.0", 6_379), 1)]);
    host.process(10, &["/r/gcs_server"], &[1]);
    for (pid, inode, net, pids) in [(20, 2, "2", "1"), (21, 3, "2", "1"), (30, 4, "3", "2")] {
        host.process_in(pid, &["/r/raylet"], &[inode], net, pids);
    }
    let tables = [
        format!(
            "{HEAD}{}",
            [2, 3].map(|inode| row(at("0.0.0.0", 6_701), 0x0A, own_uid(), inode)).concat()
        ),
        HEAD.to_owned(),
    ];
    let own = std::mem::replace(&mut host.tables, tables);
    host.write_tables("20");
    host.tables = own;
    let found = host.search().run().unwrap();
    assert_eq!(
        summary(&found),
        [
            (6_379, Kind::GcsServer, Some(Port::Gcs), false),
            (6_701, Kind::Raylet, Some(Port::NodeManager), true),
            (6_701, Kind::Raylet, Some(Port::NodeManager), true),
        ]
    );
    assert_eq!(found.blind.contained, 1);
}

#[test]
fn a_task_that_opens_2000_sockets_crowds_out_nobody() {
    let mut host = Host::new();
    let flood: Vec<u64> = (1_000..3_000).collect();
    host.listen(
        flood
            .iter()
            .map(|inode| (at("127.0.0.1", 20_000 + u16::try_from(*inode).unwrap()), *inode)),
    );
    host.listen([(at("10.0.0.1", 10_002), 1), (at("10.0.0.1", 6_701), 2)]);
    let held: Vec<u64> = flood.iter().copied().chain([1]).collect();
    host.process(10, &["ray::flood"], &held);
    host.process(20, &["/r/raylet"], &[2]);
    let found = host.search().run().unwrap();
    let each = Bounds::default().sockets_of_process_max;
    assert_eq!(found.sockets.len(), each + 1);
    assert_eq!(found.sockets[0].kind(), Kind::Raylet);
    assert_eq!(found.sockets[1].port, Some(Port::Workers), "the worker's own comes first");
    assert_eq!(found.blind.sockets_left_out, 2_001 - each);
}

#[test]
fn beyond_the_bounds_rays_own_processes_come_first() {
    let mut host = Host::new();
    host.listen((0..50).map(|n| (at("127.0.0.1", 20_000 + n), u64::from(n))));
    for n in 0..49 {
        host.process(100 + n, &["ray::task"], &[u64::from(n)]);
    }
    host.process(999, &["/r/raylet"], &[49]);
    let bounds = Bounds { sockets_max: 10, pids_max: 20, ..Bounds::default() };
    let found = Search { bounds, ..host.search() }.run().unwrap();
    assert_eq!((found.sockets.len(), found.sockets[0].kind()), (10, Kind::Raylet));
    assert_eq!((found.blind.sockets_left_out, found.blind.processes_left_out), (10, 30));
}

#[test]
fn the_hosts_own_proc_is_read() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let plan = raymtls_proto::v1::PortPlan { node_manager: u32::from(port), ..Default::default() };
    let search =
        Search { proc: "/proc".into(), plan, uids: vec![own_uid()], bounds: Bounds::default() };
    let found = search.run().unwrap();
    let own = found.sockets.iter().find(|socket| socket.addr.port() == port).unwrap();
    let process = own.process.as_ref().unwrap();
    assert_eq!((process.pid, process.kind), (std::process::id(), Kind::Other));
    assert_eq!((own.port, own.elsewhere), (Some(Port::NodeManager), false));
}

#[test]
fn a_table_that_cannot_be_read_is_an_error_and_not_an_empty_host() {
    let host = Host::new();
    std::fs::remove_file(host.path().join("self/net/tcp")).unwrap();
    assert!(host.search().run().is_err());
    // A kernel without IPv6 has no second table.
    let host = Host::new();
    std::fs::remove_file(host.path().join("self/net/tcp6")).unwrap();
    assert_eq!(host.search().run().unwrap(), Found::default());
}
