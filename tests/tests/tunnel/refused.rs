//! Who is refused, by either end, and with which word.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    time::Duration as StdDuration,
};

use node_agent::tunnel::{
    header::{HEADER_LEN, Header},
    reason::Reason,
};
use raymtls_proto::clock::{Clock, SystemClock};
use raymtls_tests::tunnel::{
    Authority, Host, Lab, Leaf,
    authority::Signed,
    host::{INBOUND_PORT, SOON},
    peer::{ask, flow, serve},
};
use time::Duration;

const PORT: u16 = 6_001;

fn own(lab: &Lab, host: &Host) -> Leaf {
    let _ = lab;
    Leaf::of("c1", &host.name, &[host.v4, host.v6])
}

/// The leaves nobody must accept, each with its word.
fn bad_leaves(lab: &Lab, host: &Host, other: &Host) -> Vec<(&'static str, Signed, Reason)> {
    let now = SystemClock.now();
    let good = || own(lab, host);
    let sign = |leaf: &Leaf| lab.authority.sign(leaf);
    let later = Leaf { not_before: now + Duration::HOUR, not_after: now + Duration::DAY, ..good() };
    let of_driver = Leaf { uri: "spiffe://ray.example/cluster/c1/driver/b".into(), ..good() };
    let of_agent = Leaf { uri: "spiffe://ray.example/cluster/c1/agent/b".into(), ..good() };
    vec![
        ("expired", sign(&good().until(now - Duration::SECOND * 5)), Reason::Expired),
        ("not yet valid", sign(&later), Reason::NotYetValid),
        ("of another authority", Authority::new().sign(&good()), Reason::UnknownIssuer),
        (
            "of another cluster's authority",
            Authority::new().sign(&Leaf::of("c2", &host.name, &[host.v4, host.v6])),
            Reason::WrongCluster,
        ),
        (
            "of another cluster, signed here",
            sign(&Leaf::of("c2", &host.name, &[host.v4, host.v6])),
            Reason::WrongCluster,
        ),
        ("of a driver", sign(&of_driver), Reason::WrongName),
        ("of an agent", sign(&of_agent), Reason::WrongName),
        (
            "of another member, used here",
            sign(&Leaf::of("c1", &other.name, &[host.v4, host.v6])),
            Reason::AddressMismatch,
        ),
    ]
}

#[test]
fn a_server_refuses_each_bad_leaf_with_its_word_and_connects_to_nothing() {
    let lab = Lab::new();
    let (a, b, c) = (lab.host("a", 1), lab.host("b", 2), lab.host("c", 3));
    let mut at_a = lab.tunnel(&a, &[&a, &b, &c]);
    let victim = a.listen(a.v4, PORT);
    victim.set_nonblocking(true).unwrap();
    let dial = |from: &Host| from.connect((a.v4, INBOUND_PORT)).unwrap();
    let refused = |reason: Reason| at_a.status().refusals.get(&reason).copied().unwrap_or(0);
    let header = flow((a.v4, PORT));

    let mut bad = bad_leaves(&lab, &b, &c);
    // A stolen leaf and key, whole and valid, used from the address of another member.
    let stolen = lab.authority.sign(&own(&lab, &c));
    bad.push(("stolen", stolen, Reason::AddressMismatch));
    for (name, leaf, reason) in &bad {
        let before = refused(*reason);
        let said = ask(dial(&b), &lab.authority, Some(leaf), &header).err();
        at_a.wait(name, |s| s.refusals.get(reason).copied().unwrap_or(0) == before + 1);
        let said = said.unwrap_or_else(|| panic!("{name} was let in"));
        // What the chain does not show is said inside TLS.
        if matches!(reason, Reason::AddressMismatch | Reason::WrongName) {
            assert_eq!(said, reason.as_str(), "{name}");
        }
    }
    assert!(ask(dial(&b), &lab.authority, None, &header).is_err());
    at_a.wait("without certificate", |s| s.refusals.contains_key(&Reason::NoCertificate));

    let good = lab.authority.sign(&own(&lab, &b));
    at_a.write("crl.pem", &lab.authority.crl_pem(&[good.serial]));
    at_a.reload().unwrap();
    let said = ask(dial(&b), &lab.authority, Some(&good), &header).unwrap_err();
    assert!(said.contains("Revoked"), "{said}");
    at_a.write("crl.pem", &lab.authority.crl_pem(&[]));
    at_a.change(|rules| rules.blocked = vec![b.v4]);
    assert!(b.is_refused((a.v4, INBOUND_PORT)), "a blocked address was greeted");
    at_a.change(|rules| rules.blocked.clear());

    assert!(victim.accept().is_err(), "something was connected to");
    // And the same with the good leaf is let in.
    ask(dial(&b), &lab.authority, Some(&good), &header).unwrap();
    victim.accept().unwrap();
}

#[test]
fn members_reach_what_is_listed_and_nothing_else() {
    let lab = Lab::new();
    let (a, b) = (lab.host("a", 1), lab.host("b", 2));
    let mut at_a = lab.tunnel(&a, &[&a, &b]);
    let leaf = lab.authority.sign(&own(&lab, &b));
    let loopback: IpAddr = "127.0.0.1".parse().unwrap();
    // All of these listen.
    let _listening = [a.listen(loopback, PORT), a.listen(a.v4, 22), a.listen(loopback, PORT + 1)];
    // The tunnel's own port is not reached even where the rules forget it.
    at_a.change(|rules| {
        let all = node_agent::tunnel::rules::PortRange::new(INBOUND_PORT, INBOUND_PORT).unwrap();
        rules.inbound_ports.push(all);
    });
    let ping_with_port = {
        let mut header = flow((a.v4, PORT));
        header[1] = 1;
        header
    };
    let mut version = flow((a.v4, PORT));
    version[0] = 9;
    let mut zeros = flow((a.v4, PORT));
    zeros[23] = 1;
    for (name, header, reason) in [
        ("ssh", flow((a.v4, 22)), Reason::PortClosed),
        ("the tunnel itself", flow((a.v4, INBOUND_PORT)), Reason::PortClosed),
        ("loopback", flow((loopback, PORT)), Reason::AddressMismatch),
        ("loopback v6", flow(("::1".parse().unwrap(), PORT)), Reason::AddressMismatch),
        ("any", flow(("0.0.0.0".parse().unwrap(), PORT)), Reason::AddressMismatch),
        ("another host", flow((b.v4, PORT)), Reason::AddressMismatch),
        ("a service of loopback alone", flow((a.v4, PORT + 1)), Reason::NoListener),
        ("nothing", flow((a.v4, PORT + 2)), Reason::NoListener),
        ("a ping with a port", ping_with_port, Reason::BadHeader),
        ("another version", version, Reason::BadHeader),
        ("more than zeros", zeros, Reason::BadHeader),
    ] {
        let stream = b.connect((a.v4, INBOUND_PORT)).unwrap();
        let said = ask(stream, &lab.authority, Some(&leaf), &header).unwrap_err();
        assert_eq!(said, reason.as_str(), "{name}");
    }
    let ping: [u8; HEADER_LEN] = Header::Ping { address: a.v4 }.encode();
    let stream = b.connect((a.v4, INBOUND_PORT)).unwrap();
    ask(stream, &lab.authority, Some(&leaf), &ping).unwrap();
    assert_eq!(at_a.status().flows_in, 0);
}

#[test]
fn a_client_refuses_each_bad_leaf_with_its_word_and_sends_nothing() {
    let lab = Lab::new();
    let (a, b, c) = (lab.host("a", 1), lab.host("b", 2), lab.host("c", 3));
    let at_a = lab.tunnel(&a, &[&a, &b, &c]);
    let listener = b.listen(b.v4, INBOUND_PORT);
    let refused = |reason: Reason| at_a.status().refusals.get(&reason).copied().unwrap_or(0);
    let elsewhere = own(&lab, &c);
    let loopback = Leaf { addresses: Vec::new(), ..own(&lab, &b) };
    let mut bad = bad_leaves(&lab, &b, &c);
    bad.push((
        "whole, of another address",
        lab.authority.sign(&elsewhere),
        Reason::AddressMismatch,
    ));
    bad.push(("of loopback alone", lab.authority.sign(&loopback), Reason::AddressMismatch));
    for (name, leaf, reason) in bad {
        let before = refused(reason);
        let mut local = a.connect((b.v4, PORT)).unwrap();
        local.write_all(b"secret").unwrap();
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        let served = serve(stream, &lab.authority, &leaf, Ok(()));
        assert!(served.is_err(), "{name} was asked for a flow");
        assert!(local.read(&mut [0]).is_err(), "{name}: the flow was not reset");
        at_a.wait(name, |status| status.refusals.get(&reason).copied().unwrap_or(0) == before + 1);
    }
    // The same with a good leaf carries.
    let good = lab.authority.sign(&own(&lab, &b));
    let mut local = a.connect((b.v4, PORT)).unwrap();
    local.write_all(b"hello").unwrap();
    let (stream, _) = listener.accept().unwrap();
    let mut served = serve(stream, &lab.authority, &good, Ok(())).unwrap();
    let mut read = [0; 5];
    served.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"hello");
}

#[test]
fn what_the_other_end_refuses_is_told_by_its_word_here() {
    let lab = Lab::new();
    let (a, b) = (lab.host("a", 1), lab.host("b", 2));
    let at_a = lab.tunnel(&a, &[&a, &b]);
    let mut at_b = lab.tunnel(&b, &[&a, &b]);
    let refusals = || at_a.status().refusals;
    let reset = |port: u16| {
        assert!(a.is_refused((b.v4, port)), "the flow was not reset");
    };
    reset(PORT);
    assert_eq!(refusals().get(&Reason::NoListener), Some(&1));
    at_b.change(|rules| rules.inbound_ports.clear());
    reset(PORT);
    assert_eq!(refusals().get(&Reason::PortClosed), Some(&1));
    // Of a leaf that b has on its CRL a hears by an alert.
    let a_serial = hex::decode(at_a.status().serial).unwrap();
    at_b.write("crl.pem", &lab.authority.crl_pem(&[a_serial.try_into().unwrap()]));
    at_b.reload().unwrap();
    reset(PORT);
    assert_eq!(refusals().get(&Reason::Revoked), Some(&1));
    at_b.kill();
    drop(at_b);
    // A process that another test starts at this moment may hold b's listener for some milliseconds.
    let gone = || a.connect((b.v4, INBOUND_PORT)).is_err();
    assert!((0..200).any(|_| gone() || wait_a_moment()), "b still listens");
    reset(PORT);
    assert_eq!(refusals().get(&Reason::Unreachable), Some(&1));
}

fn wait_a_moment() -> bool {
    std::thread::sleep(StdDuration::from_millis(10));
    false
}

#[test]
fn who_was_not_redirected_is_refused() {
    let lab = Lab::new();
    let (a, b, stranger) = (lab.host("a", 1), lab.host("b", 2), lab.host("x", 9));
    let at_a = lab.tunnel(&a, &[&a, &b]);
    // A program of the host that dials the tunnel itself.
    let straight: SocketAddr = "127.0.0.1:15001".parse().unwrap();
    assert!(a.is_refused(straight));
    assert_eq!(at_a.status().refusals.get(&Reason::NotCaptured), Some(&1));
    // A port that is redirected and that the rules do not carry.
    assert!(a.is_refused((b.v4, 15_009)), "no nonce was given");
    // A stranger is not greeted, and costs no handshake.
    assert!(stranger.is_refused((a.v4, INBOUND_PORT)));
    assert_eq!(at_a.status().refusals.get(&Reason::NotAMember), Some(&1));
    assert_eq!(at_a.status().handshakes_done, 0);
}

#[test]
fn garbage_at_the_listeners_harms_nobody() {
    let lab = Lab::new();
    let (a, b) = (lab.host("a", 1), lab.host("b", 2));
    let at_a = lab.tunnel(&a, &[&a, &b]);
    let leaf = lab.authority.sign(&own(&lab, &b));
    let echo = a.listen(a.v4, PORT);
    let mut flow_in = ask(
        b.connect((a.v4, INBOUND_PORT)).unwrap(),
        &lab.authority,
        Some(&leaf),
        &flow((a.v4, PORT)),
    )
    .unwrap();
    let (mut served, _) = echo.accept().unwrap();
    let mut sent = 0;
    for round in 0..300_usize {
        let mut bytes = vec![0; rand::random_range(0..2_000)];
        rand::fill(&mut bytes[..]);
        match round % 3 {
            // A record's head, so that it is read further.
            0 if bytes.len() > 5 => bytes[..5].copy_from_slice(&[22, 3, 1, 1, 200]),
            1 => bytes = b"GET / HTTP/1.1\r\n\r\n".to_vec(),
            _ => {}
        }
        let mut stream = b.connect((a.v4, INBOUND_PORT)).unwrap();
        stream.set_read_timeout(Some(StdDuration::from_millis(1))).unwrap();
        let _ = stream.write_all(&bytes);
        let _ = stream.read(&mut [0; 64]);
        // Headers of garbage, behind a good handshake.
        if round % 10 == 0 {
            let mut header = [0; HEADER_LEN];
            rand::fill(&mut header[..]);
            header[20] = 1;
            let stream = b.connect((a.v4, INBOUND_PORT)).unwrap();
            let said = ask(stream, &lab.authority, Some(&leaf), &header).unwrap_err();
            assert_eq!(said, Reason::BadHeader.as_str());
            sent += 1;
        }
        let _: TcpStream = stream;
    }
    let status = at_a.status();
    assert_eq!(status.refusals.get(&Reason::BadHeader), Some(&sent));
    assert!(status.refusals[&Reason::NoTls] > 100, "{:?}", status.refusals);
    flow_in.write_all(b"still here").unwrap();
    let mut read = [0; 10];
    served.read_exact(&mut read).unwrap();
    assert_eq!(&read, b"still here");
}
