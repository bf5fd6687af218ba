//! `ca-admin`, the operator's command line of a Ray mTLS certificate authority.

use std::process::ExitCode;

use ca_server::admin_cli::{self, CommandLine};
use clap::Parser;
use raymtls_proto::process;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    // Tokens pass through it.
    if let Err(error) = process::harden() {
        eprintln!("ca-admin: warning: {error}");
    }
    match CommandLine::try_parse() {
        Ok(command_line) => admin_cli::run(command_line).await,
        Err(error) => admin_cli::explain(&error),
    }
}
