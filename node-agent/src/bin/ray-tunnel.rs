//! `ray-tunnel`: parses, calls the library, exits.

use std::process::ExitCode;

fn main() -> ExitCode {
    node_agent::tunnel::run::main()
}
