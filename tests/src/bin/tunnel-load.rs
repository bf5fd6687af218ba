//! `tunnel-load`: what the tunnel costs on this machine. Two hosts as network namespaces, one
//! `ray-tunnel` on each; the same traffic in the clear and through the tunnel, in turns, so that both
//! see the same machine. Wants root, `ip` and `nft`. It judges nothing.

#![allow(clippy::unwrap_used, reason = "a measurement that fails has no result")]

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use clap::Parser;
use raymtls_tests::tunnel::{Host, Lab, Tunnel};

/// In the clear, and redirected.
const PLAIN_PORT: u16 = 5_001;
const CARRIED_PORT: u16 = 6_001;
const CHUNK_LEN: usize = 256 * 1024;
const TRIPS: u32 = 2_000;
const DIALS: u32 = 300;
/// USER_HZ, which Linux shows everywhere.
const TICKS_PER_SECOND: u64 = 100;

#[derive(Debug, Parser)]
#[command(
    about = "Measures what ray-tunnel costs against plain TCP",
    after_help = "\
Examples:
  cargo build --release && sudo target/release/tunnel-load
  sudo target/release/tunnel-load --rounds 8 --bulk-mib 2048 --streams 4"
)]
struct Args {
    /// How often each is measured; the median is told.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// MiB of one bulk transfer, of all streams together.
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    bulk_mib: u64,
    /// Streams of a bulk transfer.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=64))]
    streams: u64,
    /// Flows that wait, for their memory; none: not measured.
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(0..=20_000))]
    idle: u32,
}

fn main() {
    let args = Args::parse();
    if cfg!(debug_assertions) {
        println!("this is a debug build: its figures say little; use `cargo build --release`\n");
    }
    let lab = Lab::new();
    let (a, b) = (lab.host("a", 1), lab.host("b", 2));
    let (at_a, at_b) = (lab.tunnel(&a, &[&a, &b]), lab.tunnel(&b, &[&a, &b]));
    let stage = Stage { a, b, at_a, at_b };
    for port in [PLAIN_PORT, CARRIED_PORT] {
        serve(stage.b.listen(stage.b.v4, port));
    }
    let mut rows: Vec<(&str, [Vec<f64>; 2])> = Vec::new();
    let mut cpu = Vec::new();
    let mut dial_cpu = Vec::new();
    for round in 0..args.rounds {
        eprintln!("round {} of {}", round + 1, args.rounds);
        for (way, port) in [PLAIN_PORT, CARRIED_PORT].into_iter().enumerate() {
            let mut note = |name: &'static str, figure: f64| {
                if !rows.iter().any(|(known, _)| *known == name) {
                    rows.push((name, Default::default()));
                }
                let row = rows.iter_mut().find(|(known, _)| *known == name).unwrap();
                row.1[way].push(figure);
            };
            let before = stage.cpu();
            note("bulk, MB/s", stage.bulk(port, args.bulk_mib, args.streams));
            let spent = stage.cpu() - before;
            if port == CARRIED_PORT {
                let gb = mib(args.bulk_mib) as f64 / 1e9;
                cpu.push(spent.as_secs_f64() / gb);
            }
            note("round trip of 64 bytes, us", stage.trips(port));
            let before = stage.cpu();
            note("dial to first byte, us", stage.dials(port));
            if port == CARRIED_PORT {
                dial_cpu.push((stage.cpu() - before).as_secs_f64() * 1e3 / f64::from(DIALS));
            }
        }
    }
    println!("| median of {} rounds | plain | tunnel | ratio |\n|---|---|---|---|", args.rounds);
    for (name, [plain, carried]) in &mut rows {
        let (plain, carried) = (median(plain), median(carried));
        println!("| {name} | {plain:.0} | {carried:.0} | {:.2} |", carried / plain);
    }
    println!(
        "\nray-tunnel's CPU, both ends: {:.2} s a GB, {:.2} ms a dial",
        median(&mut cpu),
        median(&mut dial_cpu)
    );
    println!(
        "memory after it: {} and {} KiB",
        stage.at_a.memory() / 1024,
        stage.at_b.memory() / 1024
    );
    if args.idle > 0 {
        stage.idle(args.idle);
    }
}

struct Stage {
    a: Host,
    b: Host,
    at_a: Tunnel,
    at_b: Tunnel,
}

impl Stage {
    fn to(&self, port: u16) -> SocketAddr {
        (self.b.v4, port).into()
    }

    /// MB a second.
    fn bulk(&self, port: u16, all_mib: u64, streams: u64) -> f64 {
        let each = mib(all_mib) / streams;
        let began = Instant::now();
        let sending: Vec<_> = (0..streams)
            .map(|_| {
                let mut stream = self.a.connect(self.to(port)).unwrap();
                std::thread::spawn(move || {
                    let mut left = each;
                    stream.write_all(&[b'b'; 1]).unwrap();
                    stream.write_all(&each.to_be_bytes()).unwrap();
                    let chunk = vec![7; CHUNK_LEN];
                    while left > 0 {
                        let len = usize::try_from(left).unwrap_or(CHUNK_LEN).min(CHUNK_LEN);
                        stream.write_all(&chunk[..len]).unwrap();
                        left -= len as u64;
                    }
                    stream.read_exact(&mut [0]).unwrap();
                })
            })
            .collect();
        sending.into_iter().for_each(|thread| thread.join().unwrap());
        (each * streams) as f64 / 1e6 / began.elapsed().as_secs_f64()
    }

    /// Microseconds of one.
    fn trips(&self, port: u16) -> f64 {
        let mut stream = self.a.connect(self.to(port)).unwrap();
        stream.write_all(b"e").unwrap();
        let mut bytes = [1; 64];
        let mut turn = |stream: &mut TcpStream| {
            stream.write_all(&bytes).unwrap();
            stream.read_exact(&mut bytes).unwrap();
        };
        turn(&mut stream);
        let began = Instant::now();
        (0..TRIPS).for_each(|_| turn(&mut stream));
        began.elapsed().as_secs_f64() * 1e6 / f64::from(TRIPS)
    }

    /// Microseconds of one.
    fn dials(&self, port: u16) -> f64 {
        let to = self.to(port);
        self.a.inside(move || {
            let began = Instant::now();
            for _ in 0..DIALS {
                let mut stream = TcpStream::connect(to).unwrap();
                stream.set_nodelay(true).unwrap();
                stream.write_all(b"e1").unwrap();
                stream.read_exact(&mut [0]).unwrap();
            }
            began.elapsed().as_secs_f64() * 1e6 / f64::from(DIALS)
        })
    }

    fn idle(&self, count: u32) {
        let before = [self.at_a.memory(), self.at_b.memory()];
        let held: Vec<TcpStream> = (0..count)
            .map(|_| {
                let mut stream = self.a.connect(self.to(CARRIED_PORT)).unwrap();
                stream.write_all(b"e1").unwrap();
                stream.read_exact(&mut [0]).unwrap();
                stream
            })
            .collect();
        std::thread::sleep(Duration::from_secs(1));
        let after = [self.at_a.memory(), self.at_b.memory()];
        let grown = |end: usize| (after[end].saturating_sub(before[end])) as f64 / 1024.0 / 1024.0;
        println!("{} idle flows: {:.1} and {:.1} MiB more", held.len(), grown(0), grown(1));
    }

    /// What both processes have used.
    fn cpu(&self) -> Duration {
        cpu_of(self.at_a.pid()) + cpu_of(self.at_b.pid())
    }
}

/// `b`: swallows so many bytes and says so; `e`: sends back what comes.
fn serve(listener: TcpListener) {
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let _ = stream.set_nodelay(true);
                let mut kind = [0];
                if stream.read_exact(&mut kind).is_err() {
                    return;
                }
                let mut buffer = vec![0; CHUNK_LEN];
                if kind == *b"e" {
                    while let Ok(read @ 1..) = stream.read(&mut buffer) {
                        if stream.write_all(&buffer[..read]).is_err() {
                            return;
                        }
                    }
                    return;
                }
                let mut len = [0; 8];
                stream.read_exact(&mut len).unwrap();
                let mut left = u64::from_be_bytes(len);
                while left > 0 {
                    left -= stream.read(&mut buffer).unwrap() as u64;
                }
                let _ = stream.write_all(&[1]);
            });
        }
    });
}

fn mib(count: u64) -> u64 {
    count * 1024 * 1024
}

fn cpu_of(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 1_000 / TICKS_PER_SECOND)
}

fn median(figures: &mut [f64]) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}
