//! A host as /proc shows it, made of files: which process holds which socket is what the test says,
//! while what answers there is real.

mod finding;
pub(crate) mod judging;
pub(crate) mod story;

use std::{
    net::{IpAddr, SocketAddr},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use raymtls_proto::ports;

use super::{
    proc::{Bounds, Search},
    sockets::tests::{HEAD, row},
};

/// A /proc with a network namespace `1` and a process namespace `1` that are the agent's own.
pub(crate) struct Host {
    folder: tempfile::TempDir,
    tables: [String; 2],
}

impl Host {
    pub(crate) fn new() -> Self {
        // In memory, as /proc is: thousands of links are slow to make on some disks.
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let host = Self { folder, tables: [HEAD.to_owned(), HEAD.to_owned()] };
        host.namespaces(&host.path().join("self"), "1", "1");
        host.write_tables("self");
        host
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// A process of the agent's own namespaces, with these sockets open.
    pub(crate) fn process(&self, pid: u32, arguments: &[&str], inodes: &[u64]) -> PathBuf {
        self.process_in(pid, arguments, inodes, "1", "1")
    }

    fn process_in(
        &self,
        pid: u32,
        arguments: &[&str],
        inodes: &[u64],
        net: &str,
        pids: &str,
    ) -> PathBuf {
        let path = self.path().join(pid.to_string());
        self.namespaces(&path, net, pids);
        std::fs::create_dir(path.join("fd")).unwrap();
        write(&path.join("cmdline"), &arguments.join("\0"));
        symlink(arguments.first().unwrap_or(&""), path.join("exe")).unwrap();
        symlink("/dev/null", path.join("fd/0")).unwrap();
        for (number, inode) in inodes.iter().enumerate() {
            symlink(format!("socket:[{inode}]"), path.join(format!("fd/{}", number + 1))).unwrap();
        }
        path
    }

    fn namespaces(&self, path: &Path, net: &str, pids: &str) {
        std::fs::create_dir_all(path.join("ns")).unwrap();
        symlink(format!("net:[{net}]"), path.join("ns/net")).unwrap();
        symlink(format!("pid:[{pids}]"), path.join("ns/pid")).unwrap();
    }

    /// Sockets that listen in the agent's own network namespace.
    pub(crate) fn listen(&mut self, sockets: impl IntoIterator<Item = (SocketAddr, u64)>) {
        for (addr, inode) in sockets {
            let table = usize::from(addr.is_ipv6());
            self.tables[table].push_str(&row(addr, 0x0A, own_uid(), inode));
        }
        self.write_tables("self");
    }

    fn write_tables(&self, of: &str) {
        let net = self.path().join(of).join("net");
        std::fs::create_dir_all(&net).unwrap();
        for (name, text) in ["tcp", "tcp6"].iter().zip(&self.tables) {
            write(&net.join(name), text);
        }
    }

    fn search(&self) -> Search {
        Search {
            proc: self.path().to_owned(),
            uids: vec![own_uid()],
            plan: ports::default_plan(),
            bounds: Bounds::default(),
        }
    }
}

fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

#[allow(clippy::disallowed_methods, reason = "a /proc made for one test need not outlive a crash")]
fn write(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
}

fn at(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse::<IpAddr>().unwrap(), port)
}
