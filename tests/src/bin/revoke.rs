//! `revoke`: how long a revocation takes to reach so many peers that wait, and to be acknowledged by
//! them. The CA and the peers are one process, on loopback; what the agents do with it is not measured.
#![allow(clippy::unwrap_used, reason = "a tool for measuring: a panic says what is wrong")]

use clap::Parser;
use raymtls_tests::{Deployment, peers};

#[derive(Debug, Parser)]
#[command(
    version,
    about,
    after_help = "Example:\n  cargo run --release --bin revoke -- --peers 200"
)]
struct Args {
    /// How many peers wait.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    peers: u16,
}

#[tokio::main]
async fn main() {
    let args = Args::parse();
    let deployment = Deployment::start().await;
    println!("{}", peers::revoke_one_among(&deployment, args.peers.into()).await);
    deployment.finish().await;
}
