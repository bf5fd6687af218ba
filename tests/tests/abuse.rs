//! The real server under floods: handshakes that stall, file descriptors that run out, HTTP/2 that
//! only an attacker speaks. Beside each, honest nodes enrol and renew, and the process is watched from
//! outside: CPU time, memory, and whether it lives. The bar for an honest call is a second at the 99th
//! percentile; asserted is ten times that, since other tests run on the same cores.
//!
//! Wants `ca-server` and `ca-admin` in the target folder.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

mod abuse {
    pub(crate) mod server;
}

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use abuse::server::Server;
use node_agent::keys::PrivateKey;
use raymtls_proto::v1;
use raymtls_tests::{
    ask,
    wire::{Stranger, connect_from},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    sync::Mutex,
    task::JoinSet,
    time::{sleep, timeout},
};

/// One flood at a time: each measures.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

const STALLED: usize = 5_000;
/// Loopback addresses they come from.
const ADDRESSES: usize = 10;
const HONEST: usize = 60;
/// Ten times the bar of a second.
const HONEST_MAX: Duration = Duration::from_secs(10);
/// A connection that stalls in its handshake may hold this much of the server's memory.
const STALLED_KIB_MAX: f64 = 64.0;
const FILES_MAX: u32 = 128;
/// Fewer than the server has open already.
const FILES_NONE: u64 = 16;
/// CPU time of a server that does nothing for as long: a loop that spins takes all of it.
const IDLE_SHARE_MAX: f64 = 0.25;
/// Calls begun or reset on one connection, if it lasts as long.
const CALLS: u32 = 10_000;
const HEADERS: u32 = 1_000_000;
const HEADERS_IN_FRAME: u32 = 1_000;
const ATTACKERS: usize = 16;
const HTTP2_MIB_MAX: f64 = 48.0;
/// Connections of one node, and calls on each, whose answers are not taken.
const DEAF_CONNECTIONS: usize = 128;
const DEAF_CALLS: usize = 32;
const DEAF_MIB_MAX: f64 = 16.0;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_thousand_stalled_handshakes_hold_no_honest_node_up() {
    let _one = ONE_AT_A_TIME.lock().await;
    let server = Server::start(20_000).await;
    let hello: Arc<[u8]> = server.stranger().client_hello().into();
    server.honest().await;
    let before_mib = server.memory_mib();
    let open = Arc::new(AtomicUsize::new(0));
    let mut flood = JoinSet::new();
    for number in 0..STALLED {
        let to = if number % 2 == 0 { server.enrollment } else { server.nodes };
        flood.spawn(stall(number, to, Arc::clone(&hello), Arc::clone(&open)));
    }
    let began = Instant::now();
    while open.load(Ordering::Relaxed) < STALLED * 9 / 10 && began.elapsed() < HONEST_MAX {
        sleep(Duration::from_millis(50)).await;
    }

    let (mut times, mut peak_mib, mut looks) = (Vec::new(), before_mib, Vec::new());
    let cpu_before = server.cpu_time();
    let began = Instant::now();
    for _ in 0..HONEST {
        let (enrolled, renewed) = server.honest().await;
        times.extend([enrolled, renewed]);
        peak_mib = server.memory_mib().max(peak_mib);
        looks.push(open.load(Ordering::Relaxed));
        sleep(Duration::from_millis(50)).await;
    }
    let cpu_share = (server.cpu_time() - cpu_before).as_secs_f64() / began.elapsed().as_secs_f64();
    flood.shutdown().await;
    looks.sort_unstable();
    // The server cuts all of them every 5 s, and they come again.
    let usual = looks[looks.len() / 2];
    times.sort_unstable();
    let p99 = times[times.len() * 99 / 100];
    println!(
        "{STALLED} stalled handshakes ({usual} at half of the looks or more): {} honest calls on fresh \
         connections p50 {:?}, p99 {p99:?}; memory {before_mib:.1} MiB before, {peak_mib:.1} at most; \
         CPU {cpu_share:.2} cores; load {}",
        times.len(),
        times[times.len() / 2],
        load(),
    );
    assert!(p99 < HONEST_MAX, "{p99:?}");
    assert!(usual > STALLED / 2, "{usual} stalled: too few to show anything");
    let kib_each = (peak_mib - before_mib) * 1_024.0 / STALLED as f64;
    assert!(kib_each < STALLED_KIB_MAX, "{kib_each:.1} KiB each");
}

/// Connects and stalls, again and again: silent, after half a `ClientHello`, or after all of it.
async fn stall(number: usize, to: SocketAddr, hello: Arc<[u8]>, open: Arc<AtomicUsize>) {
    let said = match number / 2 % 3 {
        0 => &hello[..0],
        1 => &hello[..hello.len() / 2],
        _ => &hello[..],
    };
    let from = u8::try_from(1 + number % ADDRESSES).unwrap();
    loop {
        if let Ok(mut stream) = connect_from(from, to).await {
            open.fetch_add(1, Ordering::Relaxed);
            if stream.write_all(said).await.is_ok() {
                // Until the server has had enough of it.
                while stream.read(&mut [0; 4_096]).await.is_ok_and(|len| len > 0) {}
            }
            open.fetch_sub(1, Ordering::Relaxed);
        } else {
            sleep(Duration::from_millis(100)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_file_descriptors_the_server_neither_spins_nor_dies_and_recovers() {
    let _one = ONE_AT_A_TIME.lock().await;
    let mut server = Server::start(FILES_MAX).await;
    assert!(server.log().contains("at most 128 open files"), "{}", server.log());

    // More connections than descriptors: stalled ones make room, the reserve stays.
    let mut held = hold(&server, 150).await;
    sleep(Duration::from_secs(1)).await;
    let (enrolled, renewed) = server.honest().await;
    server.admin(&["node", "list", "--cluster", "c1"]).await;
    println!(
        "{FILES_MAX} files, 300 stalled connections: enrolment {enrolled:?}, renewal {renewed:?}"
    );
    assert!(enrolled.max(renewed) < HONEST_MAX);

    // Not one descriptor left: nothing can be accepted on any socket.
    server.limit_files(FILES_NONE);
    held.extend(hold(&server, 20).await);
    let mut operators = Vec::new();
    for _ in 0..4 {
        operators.push(server.connect_admin().await);
    }
    let (cpu_before, began) = (server.cpu_time(), Instant::now());
    sleep(Duration::from_secs(3)).await;
    let share = (server.cpu_time() - cpu_before).as_secs_f64() / began.elapsed().as_secs_f64();
    let told = server.log().matches("cannot accept").count();
    println!("no file left: {share:.3} cores, {told} lines in the log");
    assert!(server.is_alive(), "{}", server.log());
    assert!(told > 0, "every connection was accepted: the limit did not bite");
    assert!(told <= 8, "the log is flooded: {told} lines");
    assert!(share < IDLE_SHARE_MAX, "it spins: {share:.2} cores");

    // Descriptors are there again.
    server.limit_files(FILES_MAX.into());
    drop((held, operators));
    let (enrolled, renewed) = server.honest().await;
    println!("files again: enrolment {enrolled:?}, renewal {renewed:?}");
    server.admin(&["node", "list", "--cluster", "c1"]).await;
}

async fn hold(server: &Server, on_each: usize) -> Vec<TcpStream> {
    let mut held = Vec::new();
    for _ in 0..on_each {
        held.push(connect_from(1, server.enrollment).await.unwrap());
        held.push(connect_from(2, server.nodes).await.unwrap());
    }
    held
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http2_that_only_an_attacker_speaks_ends_its_own_connection() {
    let _one = ONE_AT_A_TIME.lock().await;
    let mut server = Server::start(20_000).await;
    let stranger = Arc::new(server.stranger());
    server.honest().await;
    let before_mib = server.memory_mib();
    let mut peak_mib = before_mib;

    // A message of 1 MiB is refused before it is read.
    let key = PrivateKey::generate().unwrap();
    let mut large = ask("nonsense", "c1", "w1", &[], &key);
    large.csr_der = vec![0; 1 << 20];
    let status = stranger.grpc(1, server.enrollment).await.enroll(large).await.unwrap_err();
    println!("1 MiB: {:?}, {}", status.code(), status.message());
    let refused = [tonic::Code::ResourceExhausted, tonic::Code::OutOfRange, tonic::Code::Unknown];
    assert!(refused.contains(&status.code()), "{status}");

    let attacks: [(&str, Attack); 3] = [
        ("a million headers", Attack::Headers),
        ("rapid reset", Attack::Resets),
        ("streams without end", Attack::Streams),
    ];
    for (what, attack) in attacks {
        let mut attackers = JoinSet::new();
        for _ in 0..ATTACKERS {
            let (stranger, to) = (Arc::clone(&stranger), server.enrollment);
            attackers.spawn(async move { attack.run(&stranger, to).await });
        }
        let (enrolled, renewed) = server.honest().await;
        let sent = attackers.join_all().await;
        peak_mib = server.memory_mib().max(peak_mib);
        println!(
            "{what}: {ATTACKERS} connections closed after {:?} bytes at most; meanwhile enrolment \
             {enrolled:?}, renewal {renewed:?}",
            sent.iter().max().unwrap()
        );
        assert!(enrolled.max(renewed) < HONEST_MAX, "{what}");
    }
    println!("memory {before_mib:.1} MiB before, {peak_mib:.1} at most");
    assert!(peak_mib - before_mib < HTTP2_MIB_MAX, "{before_mib:.1} -> {peak_mib:.1} MiB");
    assert!(server.is_alive());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_takes_no_answer_holds_little_memory() {
    let _one = ONE_AT_A_TIME.lock().await;
    let server = Server::start(20_000).await;
    let deaf = server.enrolled(&server.enrol().await);
    server.honest().await;
    let before_mib = server.memory_mib();
    let mut held = JoinSet::new();
    for _ in 0..DEAF_CONNECTIONS {
        let Ok(client) = deaf.deaf(server.nodes).await else { continue };
        for _ in 0..DEAF_CALLS {
            let mut client = client.clone();
            held.spawn(async move { client.sync(v1::SyncRequest::default()).await.map(drop) });
        }
    }
    let (enrolled, renewed) = server.honest().await;
    let grown_mib = server.memory_mib() - before_mib;
    held.shutdown().await;
    println!(
        "{DEAF_CONNECTIONS} connections of one node with {DEAF_CALLS} Syncs each whose answers it \
         does not take: {grown_mib:.1} MiB more than before; meanwhile enrolment {enrolled:?}, \
         renewal {renewed:?}"
    );
    assert!(enrolled.max(renewed) < HONEST_MAX);
    assert!(grown_mib < DEAF_MIB_MAX, "{grown_mib:.1} MiB");
}

#[derive(Clone, Copy)]
enum Attack {
    /// One call with headers that never end.
    Headers,
    /// Calls that are reset as soon as they are made.
    Resets,
    /// Calls that are begun and left.
    Streams,
}

impl Attack {
    /// Sends until the server closes the connection; how many bytes that took.
    async fn run(self, stranger: &Stranger, to: SocketAddr) -> usize {
        let stream = stranger.tls(connect_from(1, to).await.unwrap()).await.unwrap();
        let (mut reads, mut writes) = tokio::io::split(stream);
        let sent = AtomicUsize::new(0);
        let sending = async {
            let all = async {
                send(&mut writes, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &sent).await?;
                send(&mut writes, &frame(SETTINGS, 0, 0, &[]), &sent).await?;
                for number in 0..self.steps() {
                    send(&mut writes, &self.step(number), &sent).await?;
                }
                Ok::<_, std::io::Error>(())
            };
            if all.await.is_ok() {
                // All is said, and the connection must be closed all the same.
                std::future::pending::<()>().await;
            }
        };
        let ended = timeout(HONEST_MAX, async {
            tokio::select! {
                () = until_closed(&mut reads) => {}
                () = sending => {}
            }
        });
        ended.await.expect("the server keeps the connection");
        sent.into_inner()
    }

    fn steps(self) -> u32 {
        match self {
            Self::Headers => 1 + HEADERS / HEADERS_IN_FRAME,
            Self::Resets | Self::Streams => CALLS,
        }
    }

    fn step(self, number: u32) -> Vec<u8> {
        let stream = 1 + 2 * number;
        match self {
            Self::Headers if number == 0 => frame(HEADERS_FRAME, 0, 1, &call()),
            Self::Headers => {
                // A literal field named "a" of value "b", not to be remembered.
                let fields = b"\x00\x01a\x01b".repeat(HEADERS_IN_FRAME as usize);
                frame(CONTINUATION, 0, 1, &fields)
            }
            Self::Resets => {
                let mut both = frame(HEADERS_FRAME, END_HEADERS, stream, &call());
                both.extend(frame(RST_STREAM, 0, stream, &[0, 0, 0, 8]));
                both
            }
            Self::Streams => frame(HEADERS_FRAME, END_HEADERS, stream, &call()),
        }
    }
}

async fn send(
    writes: &mut (impl AsyncWrite + Unpin),
    bytes: &[u8],
    sent: &AtomicUsize,
) -> std::io::Result<()> {
    writes.write_all(bytes).await?;
    writes.flush().await?;
    sent.fetch_add(bytes.len(), Ordering::Relaxed);
    Ok(())
}

async fn until_closed(reads: &mut (impl AsyncRead + Unpin)) {
    let mut buffer = [0; 4_096];
    while reads.read(&mut buffer).await.is_ok_and(|len| len > 0) {}
}

const HEADERS_FRAME: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;

/// RFC 9113 4.1.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&len[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The headers of an Enroll, in HPACK: POST, https, path, authority and content type.
fn call() -> Vec<u8> {
    let path = b"/raymtls.v1.EnrollmentService/Enroll";
    let kind = b"application/grpc";
    let mut fields = vec![0x83, 0x87, 0x04, u8::try_from(path.len()).unwrap()];
    fields.extend(path);
    fields.extend(b"\x01\x02ca\x0f\x10");
    fields.push(u8::try_from(kind.len()).unwrap());
    fields.extend(kind);
    fields
}

fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap();
    text.split(' ').next().unwrap().to_owned()
}

/// The real server under libfaketime: an operator or NTP puts the clock an hour ahead, back, an hour
/// behind. Whoever enrols and renews is served all the while, and nothing spins.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ca_whose_clock_jumps_by_an_hour_serves_on_and_does_not_spin() {
    const CLOCK: &str = "clock";
    let mut server = Server::start_by_clock_file(CLOCK, "+0").await;
    let begins = server.enrol().await.facts.not_after;
    for (offset, hours) in [("+0", 0), ("+1h", 1), ("+0", 0), ("-1h", -1), ("+0", 0)] {
        server.put_clock(CLOCK, offset);
        let moved = server.enrol().await.facts.not_after - begins;
        assert!((moved.as_seconds_f64() / 3_600.0 - f64::from(hours)).abs() < 0.02, "{moved}");
        let (began, cpu_before) = (Instant::now(), server.cpu_time());
        server.honest().await;
        sleep(Duration::from_secs(1)).await;
        let cpu = server.cpu_time() - cpu_before;
        assert!(cpu < began.elapsed() / 2, "{offset}: {cpu:?} of CPU in {:?}", began.elapsed());
        assert!(server.is_alive(), "{offset}:\n{}", server.log());
    }
}
