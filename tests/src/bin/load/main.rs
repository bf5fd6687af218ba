//! `load`: what one certificate costs. Starts a fresh ca-server of its own on loopback, asks it for
//! certificates as agents do, and prints throughput, waiting times, CPU and memory, beside the
//! floor: what the same machine needs, in the same minute, for the cryptography alone. It judges
//! nothing; wall times say as much about the machine as about the program.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::{Parser, ValueEnum};

mod cell;
mod fleet;
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
  target/release/load --dir /mnt/disk       where the server's store lies decides the waiting times
  target/release/load -o json > figures.json
  target/release/load --fleet 10000         a fleet that waits for news; about five minutes

Takes about two minutes with the defaults: a row each for five kinds of call and three numbers of
callers, after the floor. Nothing it starts listens beyond loopback, and nothing stays."
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

    /// Measure so many agents that wait in Sync instead: memory, idle CPU, a change, a restart, joins.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(100..=20_000))]
    fleet: Option<u32>,

    /// How the figures are printed; progress goes to the standard error.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// Lines and a table in Markdown, as they come
    Text,
    /// One object at the end
    Json,
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
    let Args { ca_server, seconds, concurrency, dir, fleet, output } = args;
    let say = |text: String| match output {
        Output::Text => println!("{text}"),
        Output::Json => {}
    };
    let binary = ca_server.map_or_else(server::beside_this_program, Ok)?;
    let folder = tempfile::Builder::new().prefix("ray-mtls-load-").tempdir_in(&dir)?;

    let machine = machine::describe()?;
    say(format!("{machine}; store in {}\n", dir.display()));
    if cfg!(debug_assertions) {
        say("this is a debug build: its figures say little; use `cargo build --release`\n".into());
    }
    if let Some(agents) = fleet {
        let figures = fleet::measure(&binary, folder.path(), agents).await?;
        match output {
            Output::Text => say(figures.text()),
            Output::Json => println!("{}", serde_json::to_string_pretty(&figures)?),
        }
        return Ok(figures.failed);
    }
    eprintln!("measuring the floor");
    let path = folder.path().to_owned();
    let floor = tokio::task::spawn_blocking(move || floor::measure(&path)).await??;
    say(floor.text());

    let mut server = Server::prepare(&binary, folder.path(), raymtls_tests::no_limits())?;
    let mut starts = Vec::new();
    for _ in 0..EMPTY_STARTS {
        starts.push(server.start().await?);
        server.stop().await?;
    }
    server.start().await?;
    tokio::time::sleep(IDLE_AFTER).await;
    let (empty, idle_mib) = (table::median(&mut starts), server.memory_mib()?);
    say(format!(
        "start to ready with a KEK file: {} ms (median of {EMPTY_STARTS}, empty store); idle \
         memory: {idle_mib:.1} MiB\n",
        empty.as_millis()
    ));

    let ca = std::sync::Arc::new(server.open_cluster().await?);
    say(table::head());
    let mut done = Totals::default();
    let mut rows = Vec::new();
    for kind in Kind::ALL {
        for &concurrency in &concurrency {
            eprintln!("{}, {concurrency} callers, {seconds} s", kind.name());
            let longest = Duration::from_secs(seconds);
            let cell = cell::measure(&server, &ca, kind, concurrency.into(), longest).await?;
            say(table::row(&cell, &floor));
            rows.push(table::Row::new(&cell, &floor));
            done.add(&cell);
        }
    }
    if let Some(why) = &done.first_failure {
        eprintln!("first failed call: {why}");
    }
    tokio::time::sleep(IDLE_AFTER).await;
    let after_mib = server.memory_mib()?;
    server.stop().await?;
    let full = server.start().await?;
    let full_mib = server.memory_mib()?;
    server.stop().await?;
    say(format!(
        "\nmemory after the load: {after_mib:.1} MiB; start to ready: {} ms with {} certificates, \
         memory then: {full_mib:.1} MiB\nmemory and waiting times grow with what is stored: rows \
         follow one another in one store",
        full.as_millis(),
        done.certificates
    ));
    if output == Output::Json {
        let report = serde_json::json!({
            "machine": machine,
            "store_folder": dir,
            "debug_build": cfg!(debug_assertions),
            "floor": floor.json(),
            "start_empty_ms": table::ms(empty),
            "idle_mib": idle_mib,
            "rows": rows,
            "after_load_mib": after_mib,
            "certificates": done.certificates,
            "start_full_ms": table::ms(full),
            "start_full_mib": full_mib,
        });
        println!("{}", serde_json::to_string_pretty(&report)?);
    }
    Ok(done.failed)
}

#[derive(Default)]
struct Totals {
    certificates: usize,
    failed: usize,
    first_failure: Option<String>,
}

impl Totals {
    fn add(&mut self, cell: &Cell) {
        if cell.kind.certifies() {
            self.certificates += cell.latencies.len();
        }
        self.failed += cell.failed;
        if self.first_failure.is_none() {
            self.first_failure.clone_from(&cell.first_failure);
        }
    }
}
