//! `node-agent`: parses, calls the library, exits.

use std::process::ExitCode;

fn main() -> ExitCode {
    node_agent::cli::main()
}
