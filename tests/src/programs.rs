//! The real programs of this build, for tests that start them.

use std::{
    ffi::OsStr,
    fmt::Debug,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
};

use tokio::process::Command;

/// A program of this build. A test runs from target/PROFILE/deps.
pub fn binary(name: &str) -> PathBuf {
    let path = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join(name);
    assert!(path.exists(), "{} is missing: run `cargo build --bins` first", path.display());
    path
}

/// Runs a program that must succeed.
pub async fn run(program: &Path, arguments: &[impl AsRef<OsStr> + Debug]) {
    let output = Command::new(program).args(arguments).output().await.unwrap();
    assert!(
        output.status.success(),
        "{} {arguments:?}: {}\n{}",
        program.display(),
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Ports of loopback that nobody listens on, all of them other ones.
pub fn free_ports<const N: usize>() -> [SocketAddr; N] {
    let held: [TcpListener; N] =
        std::array::from_fn(|_| TcpListener::bind(("127.0.0.1", 0)).unwrap());
    held.map(|listener| listener.local_addr().unwrap())
}
