//! The `ca-server` program.

/// Each certificate takes some hundred small allocations on several threads; the system's allocator
/// needs about a tenth of the CPU time of a call for them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    ca_server::run::main()
}
