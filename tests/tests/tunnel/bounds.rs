//! Many at once: what a flow that waits costs, and what handshakes that never end cost the others.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use raymtls_tests::tunnel::{
    Host, Lab,
    host::{INBOUND_PORT, SOON},
};

const PORT: u16 = 6_001;
const IDLE_FLOWS: usize = 400;
const IDLE_FLOWS_FULL: usize = 2_000;
/// 30 MiB for 2,000; ten times that here.
const FLOW_LEN_MAX: u64 = 10 * 30 * 1024 * 1024 / 2_000;
const STALLED: usize = 1_000;
const STALLED_FULL: usize = 5_000;

/// So many flows that have carried something and wait; figures of both ends.
fn idle_flows(count: usize) -> [u64; 2] {
    let lab = Lab::new();
    let (a, b) = (lab.host("a", 1), lab.host("b", 2));
    let (at_a, at_b) = (lab.tunnel(&a, &[&a, &b]), lab.tunnel(&b, &[&a, &b]));
    let before = [at_a.memory(), at_b.memory()];
    let listener = b.listen(b.v4, PORT);
    let mut held = Vec::new();
    for _ in 0..count {
        let mut near = a.connect((b.v4, PORT)).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        near.write_all(&[1; 20_000]).unwrap();
        far.read_exact(&mut [0; 20_000]).unwrap();
        far.write_all(&[2; 20_000]).unwrap();
        near.read_exact(&mut [0; 20_000]).unwrap();
        held.push((near, far));
    }
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(at_a.status().flows_now, u64::try_from(count).unwrap());
    let after = [at_a.memory(), at_b.memory()];
    eprintln!(
        "{count} idle flows: {} and {} KiB before, {} and {} KiB after",
        before[0] / 1024,
        before[1] / 1024,
        after[0] / 1024,
        after[1] / 1024
    );
    [after[0] - before[0], after[1] - before[1]]
}

#[test]
fn a_flow_that_waits_costs_little() {
    for grown in idle_flows(IDLE_FLOWS) {
        let each = grown / u64::try_from(IDLE_FLOWS).unwrap();
        assert!(each < FLOW_LEN_MAX, "{each} bytes a flow");
    }
}

#[test]
#[ignore = "the count of the promise; takes half a minute"]
fn two_thousand_flows_that_wait_fit_in_thirty_mib_an_end() {
    for grown in idle_flows(IDLE_FLOWS_FULL) {
        assert!(grown < 30 * 1024 * 1024, "{} KiB", grown / 1024);
    }
}

/// Connections that say nothing, or half a hello, and stay.
fn stall(from: &Host, to: &Host, count: usize) -> Vec<TcpStream> {
    let to = (to.v4, INBOUND_PORT).into();
    from.inside(move || {
        (0..count)
            .filter_map(|n| {
                let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(1)).ok()?;
                if n % 2 == 0 {
                    let _ = stream.write_all(&[22, 3, 1, 2, 0, 1]);
                }
                Some(stream)
            })
            .collect()
    })
}

fn stalled_handshakes(count: usize) {
    let lab = Lab::new();
    let (a, b, c) = (lab.host("a", 1), lab.host("b", 2), lab.host("c", 3));
    let stranger = lab.host("x", 9);
    let all = [&a, &b, &c];
    let (at_a, _at_b) = (lab.tunnel(&a, &all), lab.tunnel(&b, &all));
    let _at_c = lab.tunnel(&c, &all);
    let listener = a.listen(a.v4, PORT);
    let mut near = b.connect((a.v4, PORT)).unwrap();
    let (mut far, _) = listener.accept().unwrap();
    far.set_nodelay(true).unwrap();
    let mut slowest = Duration::ZERO;
    let mut turn = |rounds: usize| {
        for _ in 0..rounds {
            let began = Instant::now();
            near.write_all(b"ping").unwrap();
            far.read_exact(&mut [0; 4]).unwrap();
            far.write_all(b"pong").unwrap();
            near.read_exact(&mut [0; 4]).unwrap();
            slowest = slowest.max(began.elapsed());
        }
    };
    turn(10);
    let mut held = Vec::new();
    for part in 0..10 {
        let from = if part % 2 == 0 { &c } else { &stranger };
        held.extend(stall(from, &a, count / 10));
        turn(20);
    }
    let status = at_a.status();
    assert!(status.handshakes_now <= 256, "of one address: {}", status.handshakes_now);
    // A member that does not stall gets in, while those that do still hold on.
    let mut new = b.connect((a.v4, PORT)).unwrap();
    let (mut served, _) = listener.accept().unwrap();
    new.write_all(b"new").unwrap();
    served.set_read_timeout(Some(SOON)).unwrap();
    served.read_exact(&mut [0; 3]).unwrap();
    turn(20);
    assert!(slowest < Duration::from_secs(2), "a flow in progress waited {slowest:?}");
    eprintln!("{count} stalled: slowest round trip {slowest:?}, {:?}", status.refusals);
}

#[test]
fn handshakes_that_stall_harm_no_flow_and_no_other_member() {
    stalled_handshakes(STALLED);
}

#[test]
#[ignore = "the count of the promise; takes a minute"]
fn five_thousand_handshakes_that_stall_harm_no_flow_and_no_other_member() {
    stalled_handshakes(STALLED_FULL);
}
