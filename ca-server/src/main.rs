//! The `ca-server` program.

fn main() -> std::process::ExitCode {
    ca_server::run::main()
}
