//! The process: how it starts, dies, is replaced, and what it may not do.

use std::{
    io::{Read, Write},
    os::unix::process::CommandExt,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use node_agent::tunnel::control::{Answer, Ask};
use raymtls_proto::durable::{self, Access};
use raymtls_tests::{
    programs::binary,
    tunnel::{
        Host, Lab, Leaf,
        host::{SOON, TUNNEL_UID, log_of},
    },
};

const PORT: u16 = 6_001;
const OPEN: Access = Access { mode: 0o777, uid: None, gid: None };

/// Echoes on each connection, for as long as the test runs.
fn echo(host: &Host, port: u16) {
    let listener = host.listen(host.v4, port);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let mut reader = stream.try_clone().unwrap();
                let _ = std::io::copy(&mut reader, &mut stream);
            });
        }
    });
}

#[test]
fn killed_with_its_sockets_held_those_who_dial_wait_for_the_next_process() {
    let lab = Lab::new();
    let (a, b) = (lab.host("a", 1), lab.host("b", 2));
    let (mut at_a, _at_b) = (lab.tunnel(&a, &[&a, &b]), lab.tunnel(&b, &[&a, &b]));
    echo(&b, PORT);
    let mut old = a.connect((b.v4, PORT)).unwrap();
    old.write_all(b"x").unwrap();
    old.read_exact(&mut [0]).unwrap();
    at_a.kill();
    assert!(old.read(&mut [0]).is_err(), "a flow outlived its process");
    // Nobody is there, and nobody is refused.
    let mut waiting = a.connect((b.v4, PORT)).unwrap();
    waiting.write_all(b"hello").unwrap();
    std::thread::sleep(Duration::from_millis(300));
    at_a.start();
    let mut read = [0; 5];
    waiting.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"hello");
}

#[test]
fn handed_over_to_a_new_process_no_flow_breaks_and_no_dial_fails() {
    let lab = Lab::new();
    let (a, b) = (lab.host("a", 1), lab.host("b", 2));
    let (mut at_a, mut at_b) = (lab.tunnel(&a, &[&a, &b]), lab.tunnel(&b, &[&a, &b]));
    echo(&b, PORT);
    let (stop, to) = (Arc::new(AtomicBool::new(false)), b.v4);
    // A flow for the whole time, and new ones one after the other.
    let mut long = a.connect((to, PORT)).unwrap();
    let load = std::thread::spawn({
        let stop = stop.clone();
        move || {
            let mut rounds = 0;
            while !stop.load(Ordering::SeqCst) {
                long.write_all(b"ping").unwrap();
                long.read_exact(&mut [0; 4]).unwrap();
                rounds += 1;
            }
            rounds
        }
    });
    let new_flows = |for_so_long: Duration| {
        let began = Instant::now();
        let mut made = 0;
        while began.elapsed() < for_so_long {
            let mut stream = a.connect((to, PORT)).unwrap();
            stream.write_all(b"new").unwrap();
            stream.read_exact(&mut [0; 3]).unwrap();
            made += 1;
        }
        made
    };
    let mut old = Vec::new();
    for tunnel in [&mut at_a, &mut at_b] {
        let draining = tunnel.hand_over();
        // Both accept for a while.
        new_flows(Duration::from_millis(200));
        draining.ask(Ask::Drain { deadline_seconds: 60 }).unwrap();
        assert!(new_flows(Duration::from_millis(200)) > 0);
        let Answer::Status(status) = draining.ask(Ask::Status).unwrap() else { panic!() };
        assert_eq!((status.accepting, status.flows_now), (false, 1));
        old.push(draining);
    }
    stop.store(true, Ordering::SeqCst);
    assert!(load.join().unwrap() > 50);
    for process in old {
        let (ended, log) = process.ended();
        assert!(ended.success(), "{log}");
    }
}

#[test]
fn a_drain_ends_with_the_last_flow_or_at_its_deadline() {
    let lab = Lab::new();
    let (a, b) = (lab.host("a", 1), lab.host("b", 2));
    let (mut at_a, _at_b) = (lab.tunnel(&a, &[&a, &b]), lab.tunnel(&b, &[&a, &b]));
    echo(&b, PORT);
    let mut held = a.connect((b.v4, PORT)).unwrap();
    held.write_all(b"x").unwrap();
    held.read_exact(&mut [0]).unwrap();
    assert_eq!(at_a.ask(Ask::Drain { deadline_seconds: 60 }), Answer::Draining { flows: 1 });
    std::thread::sleep(Duration::from_millis(300));
    held.write_all(b"y").unwrap();
    held.read_exact(&mut [0]).unwrap();
    drop(held);
    let (ended, log) = at_a.release().ended();
    assert!(ended.success(), "{ended} {log}");

    at_a.start();
    let mut held = a.connect((b.v4, PORT)).unwrap();
    held.write_all(b"x").unwrap();
    held.read_exact(&mut [0]).unwrap();
    let began = Instant::now();
    assert!(matches!(at_a.ask(Ask::Drain { deadline_seconds: 1 }), Answer::Draining { .. }));
    let (ended, _) = at_a.release().ended();
    assert!(ended.success() && began.elapsed() < SOON, "{ended}");
    assert!(held.read(&mut [0]).is_err(), "a flow outlived the deadline");
}

#[test]
fn with_a_log_that_nobody_reads_it_goes_on() {
    let lab = Lab::new();
    let (a, b) = (lab.host("a", 1), lab.host("b", 2));
    let (mut at_a, _at_b) = (lab.tunnel(&a, &[&a, &b]), lab.tunnel(&b, &[&a, &b]));
    at_a.kill();
    at_a.log_is_stuck = true;
    at_a.start();
    echo(&b, PORT);
    // Each is worth a line of more than 100 bytes, and a pipe takes 64 KiB.
    for _ in 0..700 {
        let mut stream = a.connect((b.v4, PORT)).unwrap();
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
    }
    assert_eq!(at_a.status().flows_out, 700);
}

#[test]
fn its_listeners_come_back_over_the_control_socket() {
    use std::mem::MaybeUninit;

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
    let lab = Lab::new();
    let (a, b) = (lab.host("a", 1), lab.host("b", 2));
    let at_a = lab.tunnel(&a, &[&a, &b]);
    let mut stream = std::os::unix::net::UnixStream::connect(at_a.control_path()).unwrap();
    stream.write_all(b"{\"version\":1,\"ask\":\"listeners\"}\n").unwrap();
    let (mut text, mut fds) = ([0; 1024], Vec::new());
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut room = [std::io::IoSliceMut::new(&mut text)];
    let received =
        rustix::net::recvmsg(&stream, &mut room, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    let answer: Answer = serde_json::from_slice(&text[..received.bytes]).unwrap();
    let Answer::Listeners { names } = answer else { panic!("{answer:?}") };
    assert_eq!(names, ["captured", "captured", "inbound", "inbound", "control"]);
    assert_eq!(fds.len(), 5);
    let inbound = std::net::TcpListener::from(fds.remove(2));
    assert_eq!(inbound.local_addr().unwrap(), (a.v4, 15_008).into());
}

#[test]
fn it_gives_up_what_it_may_not_have_and_refuses_to_start_with_more() {
    let lab = Lab::new();
    let (a, b) = (lab.host("a", 1), lab.host("b", 2));
    let mut at_a = lab.tunnel(&a, &[&a, &b]);
    let status = std::fs::read_to_string(format!("/proc/{}/status", at_a.pid())).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    assert_eq!(field("Uid:"), TUNNEL_UID.to_string());
    for caps in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(field(caps), "0000000000000000", "{caps}");
    }
    assert_eq!(field("NoNewPrivs:"), "1");
    use std::os::unix::fs::MetadataExt;
    let owner = std::fs::metadata(format!("/proc/{}/mem", at_a.pid())).unwrap().uid();
    assert_eq!(owner, 0, "another process of its user can read its memory");

    let rules_path = at_a.rules_path.clone();
    let refuses = |more: &[&str], words: &str| {
        let mut command = Command::new(binary("ray-tunnel"));
        command.args(["run", "--rules"]).arg(&rules_path).env_clear();
        command.args(more);
        let output = command.stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(words), "{said}");
    };
    refuses(&[], "no listening sockets");
    refuses(&["--fds", "inbound=0"], "is not of the form");
    refuses(&["--fds", "inbound=900"], "cannot be taken");
    let (ended, log) = at_a.spawn(0).ended();
    assert!(!ended.success() && log.contains("does not run as root"), "{log}");
}

#[test]
fn it_starts_from_a_service_manager_at_the_first_connection() {
    let lab = Lab::new();
    let (a, b) = (lab.host("a", 1), lab.host("b", 2));
    let _at_b = lab.tunnel(&b, &[&a, &b]);
    echo(&b, PORT);
    let leaf = lab.authority.sign(&Leaf::of("c1", "a", &[a.v4, a.v6]));
    let at_a = lab.prepare_files(&a, &[&a, &b], &leaf);
    a.capture(&[&a, &b]);
    let control = lab.folder.path().join("open/control.sock");
    durable::make_folder(control.parent().unwrap(), OPEN).unwrap();
    let (rules, v4) = (at_a.rules_path.clone(), a.v4);
    let mut manager = a.inside(move || {
        Command::new("systemd-socket-activate")
            .args(["--listen=127.0.0.1:15001", &format!("--listen={v4}:15008")])
            .arg(format!("--listen={}", control.display()))
            .arg("--fdname=captured:inbound:control")
            .arg(binary("ray-tunnel"))
            .args(["run", "--rules"])
            .arg(rules)
            .uid(TUNNEL_UID)
            .gid(TUNNEL_UID)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    });
    let began = Instant::now();
    let mut stream = loop {
        match a.connect((b.v4, PORT)) {
            Ok(stream) => break stream,
            Err(error) => assert!(began.elapsed() < SOON, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    stream.write_all(b"hello").unwrap();
    let mut read = [0; 5];
    let read_it = stream.read_exact(&mut read);
    let _ = manager.kill();
    let log = log_of(manager);
    read_it.unwrap_or_else(|error| panic!("{error}\n{log}"));
    assert_eq!(&read, b"hello");
}
