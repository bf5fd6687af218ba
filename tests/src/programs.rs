//! The real programs of this build, for tests that start them.

use std::{
    ffi::OsStr,
    fmt::Debug,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
};

use tokio::process::Command;

/// A program of this build. A test runs from target/PROFILE/deps, a program from target/PROFILE.
pub fn binary(name: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let path = own.ancestors().skip(1).take(2).map(|folder| folder.join(name));
    let path = path.into_iter().find(|path| path.exists()).unwrap_or_default();
    assert!(path.exists(), "{name} is missing: run `cargo build --bins` first");
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
