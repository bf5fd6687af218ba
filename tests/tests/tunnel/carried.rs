//! What one end does, the other end sees.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    thread::JoinHandle,
};

use node_agent::tunnel::control::{Answer, Ask};
use raymtls_tests::tunnel::{Host, Lab, Tunnel};

const PORT: u16 = 6_001;

struct Two {
    a: Host,
    b: Host,
    at_a: Tunnel,
    at_b: Tunnel,
    _lab: Lab,
}

fn two() -> Two {
    let lab = Lab::new();
    let (a, b) = (lab.host("a", 1), lab.host("b", 2));
    let (at_a, at_b) = (lab.tunnel(&a, &[&a, &b]), lab.tunnel(&b, &[&a, &b]));
    Two { a, b, at_a, at_b, _lab: lab }
}

/// Serves one connection.
fn once<T: Send + 'static>(
    listener: TcpListener,
    work: impl FnOnce(TcpStream) -> T + Send + 'static,
) -> JoinHandle<T> {
    std::thread::spawn(move || work(listener.accept().unwrap().0))
}

#[test]
fn bytes_go_both_ways_over_both_families() {
    let two = two();
    for address in [two.b.v4, two.b.v6] {
        let echo = once(two.b.listen(address, PORT), |mut stream| {
            let mut bytes = vec![0; 3_000_000];
            stream.read_exact(&mut bytes).unwrap();
            stream.write_all(&bytes).unwrap();
            stream.peer_addr().unwrap().ip()
        });
        let mut stream = two.a.connect((address, PORT)).unwrap();
        let sent: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
        let mut reader = stream.try_clone().unwrap();
        let reading = std::thread::spawn(move || {
            let mut read = vec![0; 3_000_000];
            reader.read_exact(&mut read).unwrap();
            read
        });
        stream.write_all(&sent).unwrap();
        assert!(reading.join().unwrap() == sent, "other bytes came back");
        assert_eq!(echo.join().unwrap(), address, "Ray sees its own node's address");
    }
    let (at_a, at_b) = (two.at_a.status(), two.at_b.status());
    assert_eq!((at_a.flows_out, at_b.flows_in), (2, 2));
    assert_eq!((at_a.bytes_out, at_a.bytes_in), (6_000_000, 6_000_000));
    assert_eq!((at_b.bytes_out, at_b.bytes_in), (6_000_000, 6_000_000));
    two.at_a.wait("without flows", |status| status.flows_now == 0 && status.peers.is_empty());
    two.at_b.wait("without flows", |status| status.flows_now == 0);
}

#[test]
fn an_end_of_sending_is_carried_and_the_other_way_stays_open() {
    let two = two();
    // Reads all there is, and only then says how much that was.
    let sink = once(two.b.listen(two.b.v4, PORT), |mut stream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        stream.write_all(format!("got {}", all.len()).as_bytes()).unwrap();
    });
    let mut stream = two.a.connect((two.b.v4, PORT)).unwrap();
    stream.write_all(&[7; 100_000]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).unwrap();
    assert_eq!(said, "got 100000");
    sink.join().unwrap();
    two.at_a.wait("without flows", |status| status.flows_now == 0);
}

#[test]
fn a_server_that_ends_first_can_still_be_written_to() {
    let two = two();
    let sink = once(two.b.listen(two.b.v4, PORT), |mut stream| {
        stream.write_all(b"bye").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        all.len()
    });
    let mut stream = two.a.connect((two.b.v4, PORT)).unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).unwrap();
    assert_eq!(said, "bye");
    stream.write_all(&[7; 100_000]).unwrap();
    drop(stream);
    assert_eq!(sink.join().unwrap(), 100_000);
}

/// Its end is a reset.
fn reset(stream: TcpStream) {
    rustix::net::sockopt::set_socket_linger(&stream, Some(std::time::Duration::ZERO)).unwrap();
    drop(stream);
}

#[test]
fn a_reset_of_either_end_is_a_reset_at_the_other() {
    let two = two();
    let victim = once(two.b.listen(two.b.v4, PORT), |mut stream| {
        stream.set_read_timeout(Some(raymtls_tests::tunnel::host::SOON)).unwrap();
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        stream.read(&mut byte).unwrap_err().kind()
    });
    let mut stream = two.a.connect((two.b.v4, PORT)).unwrap();
    stream.write_all(b"x").unwrap();
    two.at_b.wait("a byte there", |status| status.bytes_in == 1);
    reset(stream);
    assert_eq!(victim.join().unwrap(), ErrorKind::ConnectionReset);

    let breaker = once(two.b.listen(two.b.v4, PORT + 1), |mut stream| {
        stream.read_exact(&mut [0]).unwrap();
        reset(stream);
    });
    let mut stream = two.a.connect((two.b.v4, PORT + 1)).unwrap();
    stream.write_all(b"x").unwrap();
    breaker.join().unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn a_reset_after_the_end_of_sending_is_carried_too() {
    let two = two();
    let victim = once(two.b.listen(two.b.v4, PORT), |mut stream| {
        stream.set_read_timeout(Some(raymtls_tests::tunnel::host::SOON)).unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        // The client has ended its sending and waits for an answer; now it goes away.
        let mut error = stream.take_error().unwrap();
        let began = std::time::Instant::now();
        while error.is_none() && began.elapsed() < raymtls_tests::tunnel::host::SOON {
            std::thread::sleep(std::time::Duration::from_millis(10));
            error = stream.take_error().unwrap();
        }
        error.is_some()
    });
    let mut stream = two.a.connect((two.b.v4, PORT)).unwrap();
    stream.write_all(b"x").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    two.at_b.wait("a byte there", |status| status.bytes_in == 1);
    std::thread::sleep(std::time::Duration::from_millis(200));
    reset(stream);
    assert!(victim.join().unwrap(), "no reset came");
}

#[test]
fn a_dial_that_was_redirected_is_proven_by_the_nonce() {
    let two = two();
    let proof = "00112233445566778899aabbccddeeff";
    assert_eq!(two.at_a.ask(Ask::Prove { nonce: proof.into() }), Answer::Proving);
    // A member's address, and one that is nobody's: neither leaves the host.
    for address in [two.b.v4, two.b.v6, "192.0.2.1".parse().unwrap()] {
        let mut stream = two.a.connect((address, 15_009)).unwrap();
        let mut nonce = Vec::new();
        stream.read_to_end(&mut nonce).unwrap();
        assert_eq!(hex::encode(nonce), proof, "{address}");
    }
    assert_eq!(two.at_a.status().proofs, 3);
    assert_eq!(two.at_b.status().flows_in, 0);
}
