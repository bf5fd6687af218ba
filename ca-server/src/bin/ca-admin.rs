//! `ca-admin`, the operator's command line of a Ray mTLS certificate authority.

use std::process::ExitCode;

use ca_server::admin_cli::{self, CommandLine};
use clap::Parser;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match CommandLine::try_parse() {
        Ok(command_line) => admin_cli::run(command_line).await,
        Err(error) => admin_cli::explain(&error),
    }
}
