//! What ends a flow that lives: blocks, revocations, leaves that end. And what must not.

use std::{
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    time::{Duration as StdDuration, Instant},
};

use node_agent::tunnel::reason::Reason;
use raymtls_proto::clock::{Clock, SystemClock};
use raymtls_tests::tunnel::{Host, Lab, Leaf, Tunnel, host::SOON};
use time::Duration;

const PORT: u16 = 6_001;
/// Ten times the bar of a quiet machine.
const CUT_TIME_MAX: StdDuration = StdDuration::from_secs(5);

/// A flow from one host to another: its two ends.
fn flow(from: &Host, to: &Host, port: u16) -> (TcpStream, TcpStream) {
    let listener = to.listen(to.v4, port);
    let mut near = from.connect((to.v4, port)).unwrap();
    let (mut far, _) = listener.accept().unwrap();
    far.set_read_timeout(Some(SOON)).unwrap();
    near.write_all(b"x").unwrap();
    far.read_exact(&mut [0]).unwrap();
    (near, far)
}

fn is_alive((near, far): &mut (TcpStream, TcpStream)) -> bool {
    let mut byte = [0];
    near.write_all(b"y").is_ok() && far.read(&mut byte).is_ok_and(|read| read == 1)
}

fn is_reset(stream: &mut TcpStream) {
    let error = stream.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

struct Three {
    a: Host,
    b: Host,
    c: Host,
    at_a: Tunnel,
    at_b: Tunnel,
    _at_c: Tunnel,
    lab: Lab,
}

fn three() -> Three {
    let lab = Lab::new();
    let (a, b, c) = (lab.host("a", 1), lab.host("b", 2), lab.host("c", 3));
    let all = [&a, &b, &c];
    let (at_a, at_b, at_c) = (lab.tunnel(&a, &all), lab.tunnel(&b, &all), lab.tunnel(&c, &all));
    Three { at_a, at_b, _at_c: at_c, a, b, c, lab }
}

#[test]
fn a_block_or_a_revocation_resets_the_peers_flows_at_once_and_counts_them() {
    let mut three = three();
    let Three { a, b, c, at_a, lab, at_b, .. } = &mut three;
    let mut to_b = [flow(a, b, PORT), flow(a, b, PORT + 1), flow(b, a, PORT + 2)];
    let mut to_c = flow(a, c, PORT + 3);
    let began = Instant::now();
    let reloaded = at_a.change(|rules| rules.blocked = vec![b.v4]);
    assert_eq!(reloaded.flows_cut, 3);
    for (near, far) in &mut to_b {
        is_reset(near);
        is_reset(far);
    }
    assert!(began.elapsed() < CUT_TIME_MAX, "{:?}", began.elapsed());
    assert!(is_alive(&mut to_c), "another peer's flow was cut");
    // Nothing new either way.
    assert!(a.is_refused((b.v4, PORT)));
    assert_eq!(at_a.status().refusals.get(&Reason::Blocked), Some(&1));

    at_a.change(|rules| rules.blocked.clear());
    let mut again = flow(a, b, PORT + 4);
    let serial = hex::decode(at_b.status().serial).unwrap().try_into().unwrap();
    at_a.write("crl.pem", &lab.authority.crl_pem(&[serial]));
    assert_eq!(at_a.reload().unwrap().flows_cut, 1);
    is_reset(&mut again.0);
    is_reset(&mut again.1);

    // Who is no member any more is cut too.
    let reloaded = at_a.change(|rules| rules.members.retain(|m| m.name.as_str() != "c"));
    assert_eq!(reloaded.flows_cut, 1);
    is_reset(&mut to_c.1);
    assert_eq!(at_a.status().flows_cut, 5);
}

#[test]
fn files_that_change_are_read_without_being_asked() {
    let mut three = three();
    let Three { a, b, at_a, lab, .. } = &mut three;
    let mut held = flow(a, b, PORT);
    let next = lab.authority.sign(&Leaf::of("c1", "a", &[a.v4, a.v6]));
    at_a.write_leaf(&next);
    let serial = hex::encode(next.serial);
    at_a.wait("with the next leaf", |status| status.serial == serial);
    assert!(is_alive(&mut held), "a new leaf ended a flow");
    let _new = flow(a, b, PORT + 1);
}

#[test]
fn broken_rules_leave_the_old_ones_in_force_and_name_the_line() {
    let mut three = three();
    let Three { a, b, at_a, lab, .. } = &mut three;
    let mut held = flow(a, b, PORT);
    let good = at_a.rules.to_text();
    let line = 1 + good.lines().position(|l| l.contains("\"cluster\"")).unwrap();
    at_a.write_rules_text(&good.replace("\"cluster\": \"c1\"", "\"cluster\": c1"));
    let error = at_a.reload().unwrap_err();
    assert!(error.contains(&format!("rules.json, line {line}, column")), "{error}");
    assert!(error.contains("stays so"), "{error}");
    assert!(at_a.status().stale.unwrap().contains("line"), "the status does not say so");
    assert!(is_alive(&mut held));
    let _new = flow(a, b, PORT + 1);

    at_a.write_rules();
    at_a.reload().unwrap();
    assert_eq!(at_a.status().stale, None);
    // A leaf for another key, as when only half of a folder was replaced.
    let other = lab.authority.sign(&Leaf::of("c1", "a", &[a.v4, a.v6]));
    at_a.write("tls.crt", &other.chain_pem());
    assert!(at_a.reload().unwrap_err().contains("another key"));
    // And one of another node.
    let other = lab.authority.sign(&Leaf::of("c1", "b", &[a.v4, a.v6]));
    at_a.write_leaf(&other);
    assert!(at_a.reload().unwrap_err().contains("/node/a"));
    let _new = flow(a, b, PORT + 2);
}

#[test]
fn a_peer_whose_leaf_ends_is_cut_and_one_that_renews_is_not() {
    let lab = Lab::new();
    let (a, b, c) = (lab.host("a", 1), lab.host("b", 2), lab.host("c", 3));
    let all = [&a, &b, &c];
    let now = SystemClock.now();
    let ends = |host: &Host, seconds: i64| {
        let leaf = Leaf::of("c1", &host.name, &[host.v4, host.v6]);
        let (not_before, not_after) = (now, now + Duration::seconds(seconds));
        lab.authority.sign(&Leaf { not_before, not_after, ..leaf })
    };
    // a's own leaf decides how often it pings: each third second.
    let tunnels = [(&a, 36), (&b, 12), (&c, 12)].map(|(host, life)| {
        let mut tunnel = lab.prepare(host, &all, &ends(host, life));
        host.capture(&all);
        tunnel.start();
        tunnel
    });
    let (mut to_b, mut to_c) = (flow(&a, &b, PORT), flow(&a, &c, PORT));
    // c renews, b does not.
    tunnels[2].write_leaf(&ends(&c, 3_600));
    let seen = now.unix_timestamp() + 3_600;
    tunnels[0].wait("with c's next leaf", |status| {
        status.peers.iter().any(|peer| peer.name == "c" && peer.not_after_unix == seen)
    });
    tunnels[0].wait("cut", |status| status.flows_cut > 0);
    assert!(SystemClock.now() > now + Duration::seconds(12), "cut before its end");
    is_reset(&mut to_b.0);
    is_reset(&mut to_b.1);
    assert!(is_alive(&mut to_c), "the peer that renewed was cut");
    let status = tunnels[0].status();
    assert_eq!((status.flows_cut, status.peers.len()), (1, 1));
    assert!(a.is_refused((b.v4, PORT)));
    let refusals = tunnels[0].status().refusals;
    assert!(refusals.contains_key(&Reason::Expired), "{refusals:?}");
}

#[test]
fn a_flow_that_begins_long_after_the_tunnel_is_not_cut_by_the_leaf_it_began_with() {
    let lab = Lab::new();
    let (a, b) = (lab.host("a", 1), lab.host("b", 2));
    let all = [&a, &b];
    let _at_a = lab.tunnel(&a, &all);
    let short = |seconds| {
        let end = SystemClock.now() + Duration::seconds(seconds);
        lab.authority.sign(&Leaf::of("c1", &b.name, &[b.v4, b.v6]).until(end))
    };
    let mut at_b = lab.prepare(&b, &all, &short(20));
    b.capture(&all);
    at_b.start();
    // The tunnel of a had nobody to greet until now.
    std::thread::sleep(StdDuration::from_secs(3));
    at_b.write_leaf(&short(9));
    at_b.reload().unwrap();
    let mut old = flow(&a, &b, PORT);
    at_b.write_leaf(&short(600));
    at_b.reload().unwrap();
    std::thread::sleep(StdDuration::from_secs(11));
    assert!(is_alive(&mut old), "its newest leaf was not asked for in time");
}

#[test]
fn while_the_ca_is_away_an_ended_leaf_counts_for_the_grace_and_no_revoked_one() {
    let lab = Lab::new();
    let (a, b) = (lab.host("a", 1), lab.host("b", 2));
    let all = [&a, &b];
    let end = SystemClock.now() + Duration::seconds(3);
    let mut tunnels = all.map(|host| {
        let leaf = Leaf::of("c1", &host.name, &[host.v4, host.v6]).until(end);
        let mut tunnel = lab.prepare(host, &all, &lab.authority.sign(&leaf));
        tunnel.rules.ca_away_since_unix = Some(SystemClock.now().unix_timestamp() - 1);
        tunnel.rules.grace_seconds = 600;
        tunnel.write_rules();
        host.capture(&all);
        tunnel.start();
        tunnel
    });
    let mut old = flow(&a, &b, PORT);
    std::thread::sleep(StdDuration::from_secs(5));
    assert!(is_alive(&mut old), "cut in its grace");
    let mut new = flow(&a, &b, PORT + 1);
    let status = tunnels[0].status();
    assert_eq!(status.first_cut_unix, Some(end.unix_timestamp() + 600));
    // Revoked is revoked, whatever the CA's state.
    let serial = hex::decode(tunnels[1].status().serial).unwrap().try_into().unwrap();
    tunnels[0].write("crl.pem", &lab.authority.crl_pem(&[serial]));
    assert_eq!(tunnels[0].reload().unwrap().flows_cut, 2);
    is_reset(&mut old.1);
    is_reset(&mut new.1);
    tunnels[0].write("crl.pem", &lab.authority.crl_pem(&[]));
    tunnels[0].reload().unwrap();
    // The CA is back and did not renew: no grace any more.
    let _third = flow(&a, &b, PORT + 2);
    tunnels[0].change(|rules| rules.ca_away_since_unix = None);
    tunnels[0].wait("cut", |status| status.flows_now == 0);
}
