//! `load`: what one certificate costs. Starts a fresh ca-server of its own on loopback, asks it for
//! certificates as agents do, and prints throughput, waiting times, CPU and memory, beside the
//! floor: what the same machine needs, in the same minute, for the cryptography alone. It judges
//! nothing; wall times say as much about the machine as about the program.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::Parser;

mod cell;
mod floor;
mod machine;
mod server;
mod table;

use cell::{Cell, Kind};
use server::Server;

/// Error of the program: words for the person who runs it.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Starts measured of an empty server.
const EMPTY_STARTS: usize = 5;
/// Settling time before the idle memory is read.
const IDLE_AFTER: Duration = Duration::from_secs(1);

#[derive(Debug, Parser)]
#[command(
    version,
    about = "Measures what ca-server needs for one certificate",
    after_help = "\
Examples:
  cargo build --release && target/release/load
  target/release/load --seconds 10 --concurrency 1,64
  target/release/load --dir /mnt/disk       where the server's store lies decides the waiting times"
)]
struct Args {
    /// The server to measure; without it the one beside this program.
    #[arg(long, value_name = "PATH")]
    ca_server: Option<PathBuf>,

    /// Longest time of one row, in seconds.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=60))]
    seconds: u64,

    /// How many callers at once, one row for each.
    #[arg(long, value_name = "N,N", value_delimiter = ',', default_value = "1,16,128",
          value_parser = clap::value_parser!(u16).range(1..=1_000))]
    concurrency: Vec<u16>,

    /// Folder for the server's store; a folder inside it is made and removed again.
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    dir: PathBuf,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> ExitCode {
    match run(Args::parse()).await {
        Ok(0) => ExitCode::SUCCESS,
        Ok(failed) => {
            eprintln!("error: {failed} calls failed; the figures above are of no use");
            ExitCode::FAILURE
        }
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> Result<usize, Failure> {
    let binary = args.ca_server.map_or_else(server::beside_this_program, Ok)?;
    let folder = tempfile::Builder::new().prefix("ray-mtls-load-").tempdir_in(&args.dir)?;

    println!("{}", machine::describe()?);
    println!("{}\n", machine::disk(folder.path())?);
    if cfg!(debug_assertions) {
        println!("this is a debug build: its figures say little; use `cargo build --release`\n");
    }
    let floor = tokio::task::spawn_blocking(floor::measure).await??;
    println!("{}", floor.text());

    let mut server = Server::prepare(&binary, folder.path())?;
    let mut starts = Vec::new();
    for _ in 0..EMPTY_STARTS {
        starts.push(server.start().await?);
        server.stop().await?;
    }
    server.start().await?;
    tokio::time::sleep(IDLE_AFTER).await;
    println!(
        "start to ready: {} ms (median of {EMPTY_STARTS}, empty store); idle memory: {:.1} MiB\n",
        table::median(&mut starts).as_millis(),
        server.memory_mib()?
    );

    let ca = std::sync::Arc::new(server.open_cluster().await?);
    println!("{}", table::head());
    let mut done = Totals::default();
    for kind in Kind::ALL {
        for &concurrency in &args.concurrency {
            let seconds = Duration::from_secs(args.seconds);
            let cell = cell::measure(&server, &ca, kind, concurrency.into(), seconds).await?;
            println!("{}", table::row(&cell, &floor));
            done.add(&cell);
        }
    }
    if let Some(why) = &done.first_failure {
        println!("first failed call: {why}");
    }
    server.stop().await?;
    let full = server.start().await?;
    println!(
        "\nstart to ready: {} ms with {} certificates; memory then: {:.1} MiB",
        full.as_millis(),
        done.replies,
        server.memory_mib()?
    );
    server.stop().await?;
    println!(
        "memory and waiting times grow with what is stored: rows follow one another in one store"
    );
    Ok(done.failed)
}

#[derive(Default)]
struct Totals {
    replies: usize,
    failed: usize,
    first_failure: Option<String>,
}

impl Totals {
    fn add(&mut self, cell: &Cell) {
        self.replies += cell.latencies.len();
        self.failed += cell.failed;
        if self.first_failure.is_none() {
            self.first_failure.clone_from(&cell.first_failure);
        }
    }
}
