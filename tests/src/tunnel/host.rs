//! Hosts as network namespaces on one bridge, and the `ray-tunnel` of each, started as the agent
//! starts it: sockets opened before, a user of its own, rules and key folder in files.

#![allow(clippy::wildcard_enum_match_arm, reason = "what is not expected fails the test")]

use std::{
    io::{BufRead, BufReader, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsFd, AsRawFd},
        unix::{
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use node_agent::tunnel::{
    control::{Answer, Ask, Reloaded, Request, Status},
    rules::{Member, PortRange, Rules, VERSION},
};
use raymtls_proto::{
    clock::{Clock, SystemClock},
    durable::{self, Access},
    identity::Role,
};
use tempfile::TempDir;

use super::{Authority, Leaf, authority::Signed};
use crate::{TRUST_DOMAIN, programs::binary};

/// The user of `ray-tunnel`; no other process has it.
pub const TUNNEL_UID: u32 = 64_371;
pub const CAPTURED_PORT: u16 = 15_001;
pub const INBOUND_PORT: u16 = 15_008;
/// Ports that are carried, both ways.
pub const CARRIED: (u16, u16) = (6_000, 6_999);
/// What waits for something is over after this, on a busy machine too.
pub const SOON: Duration = Duration::from_secs(60);

/// A bridge with hosts on it.
pub struct Lab {
    name: String,
    pub folder: TempDir,
    pub authority: Authority,
}

/// A host.
pub struct Host {
    namespace: String,
    pub name: String,
    pub v4: IpAddr,
    pub v6: IpAddr,
}

impl Default for Lab {
    fn default() -> Self {
        Self::new()
    }
}

impl Lab {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        assert!(rustix::process::geteuid().is_root(), "wants root, for network namespaces");
        let number = NEXT.fetch_add(1, Ordering::SeqCst);
        let name = format!("rt{}n{number}", std::process::id() % 100_000);
        ip(&["netns", "add", &name]);
        ip(&["-n", &name, "link", "add", "br0", "type", "bridge"]);
        ip(&["-n", &name, "link", "set", "br0", "up"]);
        let folder = tempfile::Builder::new().prefix("rt").tempdir_in("/var/tmp").unwrap();
        // The tunnel's user goes through it.
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(folder.path(), mode).unwrap();
        Self { name, folder, authority: Authority::new() }
    }

    /// A host with the addresses 10.77.0.N and fd77::N.
    pub fn host(&self, name: &str, number: u8) -> Host {
        let namespace = format!("{}h{number}", self.name);
        let port = format!("p{number}");
        ip(&["netns", "add", &namespace]);
        ip(&[
            "-n", &self.name, "link", "add", &port, "type", "veth", "peer", "name", "eth0",
            "netns", &namespace,
        ]);
        ip(&["-n", &self.name, "link", "set", &port, "master", "br0", "up"]);
        ip(&["-n", &namespace, "addr", "add", &format!("10.77.0.{number}/24"), "dev", "eth0"]);
        ip(&[
            "-n",
            &namespace,
            "addr",
            "add",
            &format!("fd77::{number}/64"),
            "dev",
            "eth0",
            "nodad",
        ]);
        ip(&["-n", &namespace, "link", "set", "lo", "up"]);
        ip(&["-n", &namespace, "link", "set", "eth0", "up"]);
        ip(&["-n", &namespace, "route", "add", "default", "dev", "eth0"]);
        Host {
            namespace,
            name: name.to_owned(),
            v4: IpAddr::from([10, 77, 0, number]),
            v6: format!("fd77::{number}").parse().unwrap(),
        }
    }

    /// The rules of one of these hosts.
    pub fn rules(&self, own: &Host, all: &[&Host]) -> Rules {
        let carried = PortRange::new(CARRIED.0, CARRIED.1).unwrap();
        let now = SystemClock.now().unix_timestamp();
        Rules {
            version: VERSION,
            generation: 1,
            cluster: "c1".parse().unwrap(),
            trust_domain: TRUST_DOMAIN.parse().unwrap(),
            node: own.name.parse().unwrap(),
            addresses: vec![own.v4, own.v6],
            key_folder: self.folder.path().join(&own.name).join("k1"),
            members: all.iter().map(|host| host.member()).collect(),
            blocked: Vec::new(),
            outbound_ports: vec![carried],
            inbound_ports: vec![carried],
            grace_seconds: 3_600,
            ca_away_since_unix: None,
            heard_unix: now,
            written_unix: now,
        }
    }

    /// `ray-tunnel` on a host, with a good leaf, and nftables that redirect to it.
    pub fn tunnel(&self, own: &Host, all: &[&Host]) -> Tunnel {
        let leaf = self.authority.sign(&Leaf::of("c1", &own.name, &[own.v4, own.v6]));
        let tunnel = self.prepare(own, all, &leaf);
        own.capture(all);
        let mut tunnel = tunnel;
        tunnel.start();
        tunnel
    }

    /// Files and sockets, no process.
    pub fn prepare(&self, own: &Host, all: &[&Host], leaf: &Signed) -> Tunnel {
        let mut tunnel = self.prepare_files(own, all, leaf);
        let [v4, v6] = [own.v4, own.v6];
        let bound = own.inside(move || {
            [
                ("captured", TcpListener::bind(("127.0.0.1", CAPTURED_PORT)).unwrap()),
                ("captured", TcpListener::bind(("::1", CAPTURED_PORT)).unwrap()),
                ("inbound", TcpListener::bind((v4, INBOUND_PORT)).unwrap()),
                ("inbound", TcpListener::bind((v6, INBOUND_PORT)).unwrap()),
            ]
        });
        tunnel.bound = bound.into();
        tunnel
    }

    /// Files, and no socket.
    pub fn prepare_files(&self, own: &Host, all: &[&Host], leaf: &Signed) -> Tunnel {
        let folder = self.folder.path().join(&own.name);
        let rules = self.rules(own, all);
        for path in [&folder, &rules.key_folder] {
            durable::make_folder(path, Access { mode: 0o755, uid: None, gid: None }).unwrap();
        }
        let tunnel = Tunnel {
            namespace: own.namespace.clone(),
            rules_path: folder.join("rules.json"),
            rules,
            folder,
            bound: Vec::new(),
            process: None,
            started: 0,
            log_is_stuck: false,
        };
        tunnel.write_rules();
        tunnel.write_leaf(leaf);
        tunnel.write("ca.crt", &self.authority.root_pem());
        tunnel.write("crl.pem", &self.authority.crl_pem(&[]));
        tunnel
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.namespace]).status();
    }
}

impl Host {
    /// Runs this on a thread of the host; sockets it makes stay the host's.
    pub fn inside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        inside(&self.namespace, work)
    }

    pub fn member(&self) -> Member {
        Member {
            name: self.name.parse().unwrap(),
            role: Role::Worker,
            addresses: vec![self.v4, self.v6],
        }
    }

    pub fn listen(&self, address: IpAddr, port: u16) -> TcpListener {
        self.inside(move || TcpListener::bind((address, port)).unwrap())
    }

    pub fn connect(&self, to: impl Into<SocketAddr>) -> std::io::Result<TcpStream> {
        let to = to.into();
        let stream = self.inside(move || TcpStream::connect_timeout(&to, SOON))?;
        stream.set_read_timeout(Some(SOON))?;
        // It may have been reset already.
        let _ = stream.set_nodelay(true);
        Ok(stream)
    }

    /// Whether a connection there comes to nothing.
    pub fn is_refused(&self, to: impl Into<SocketAddr>) -> bool {
        self.connect(to).and_then(|mut stream| std::io::Read::read(&mut stream, &mut [0])).is_err()
    }

    /// Connections to the others' carried ports go to this host's `ray-tunnel`.
    pub fn capture(&self, all: &[&Self]) {
        let others = || all.iter().filter(|host| host.namespace != self.namespace);
        let list = |addresses: Vec<String>| addresses.join(", ");
        let v4 =
            list(others().map(|host| host.v4.to_string()).chain(["192.0.2.1".into()]).collect());
        let v6 =
            list(others().map(|host| host.v6.to_string()).chain(["2001:db8::1".into()]).collect());
        let (first, last) = CARRIED;
        let table = format!(
            "table inet test_tunnel {{\n\
             chain capture {{\n type nat hook output priority -100; policy accept;\n\
             meta skuid {TUNNEL_UID} return\n\
             ip daddr {{ {v4} }} tcp dport {{ {first}-{last}, 15009 }} redirect to :{CAPTURED_PORT}\n\
             ip6 daddr {{ {v6} }} tcp dport {{ {first}-{last}, 15009 }} redirect to :{CAPTURED_PORT}\n\
             }}\n}}\n"
        );
        self.inside(move || {
            let mut nft =
                Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn().unwrap();
            nft.stdin.take().unwrap().write_all(table.as_bytes()).unwrap();
            assert!(nft.wait().unwrap().success(), "nft refuses:\n{table}");
        });
    }
}

/// What `ray-tunnel` stands on, and the process that is asked.
pub struct Tunnel {
    namespace: String,
    folder: PathBuf,
    pub rules_path: PathBuf,
    pub rules: Rules,
    bound: Vec<(&'static str, TcpListener)>,
    process: Option<Process>,
    started: usize,
    /// Its log goes into a pipe that nobody reads, and not into a file.
    pub log_is_stuck: bool,
}

/// A process with a control socket of its own.
pub struct Process {
    child: Child,
    log_path: PathBuf,
    pub control_path: PathBuf,
}

impl Tunnel {
    /// Starts the process and waits until it answers.
    pub fn start(&mut self) {
        assert!(self.process.is_none(), "one at a time");
        self.process = Some(self.spawn(TUNNEL_UID));
        self.wait_ready();
    }

    /// Puts another process with the same sockets in the place of this one, which goes on.
    pub fn hand_over(&mut self) -> Process {
        let next = self.spawn(TUNNEL_UID);
        next.wait_ready();
        self.process.replace(next).unwrap()
    }

    /// Another process with the same sockets.
    pub fn spawn(&mut self, uid: u32) -> Process {
        self.started += 1;
        let control_path = self.folder.join(format!("control.{}.sock", self.started));
        let control = UnixListener::bind(&control_path).unwrap();
        let fds: Vec<String> = self
            .bound
            .iter()
            .map(|(name, listener)| (*name, listener.as_fd()))
            .chain([("control", control.as_fd())])
            .map(|(name, fd)| {
                // std opens everything so that a child does not have it.
                rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).unwrap();
                format!("{name}={}", fd.as_raw_fd())
            })
            .collect();
        let log_path = control_path.with_extension("log");
        let log = if self.log_is_stuck {
            Stdio::piped()
        } else {
            #[allow(clippy::disallowed_methods, reason = "a log, not a file anybody relies on")]
            std::fs::File::create(&log_path).unwrap().into()
        };
        let rules = self.rules_path.clone();
        let child = inside(&self.namespace, move || {
            Command::new(binary("ray-tunnel"))
                .args(["run", "--rules"])
                .arg(rules)
                .args(["--fds", &fds.join(",")])
                .env_clear()
                .env("RUST_LOG", "debug")
                .uid(uid)
                .gid(uid)
                .stdout(Stdio::null())
                .stderr(log)
                .spawn()
                .unwrap()
        });
        Process { child, log_path, control_path }
    }

    fn process(&self) -> &Process {
        self.process.as_ref().unwrap()
    }

    pub fn wait_ready(&self) {
        self.process().wait_ready();
    }

    pub fn control_path(&self) -> PathBuf {
        self.process().control_path.clone()
    }

    pub fn pid(&self) -> u32 {
        self.process().child.id()
    }

    /// The process, which is no longer this one's.
    pub fn release(&mut self) -> Process {
        self.process.take().unwrap()
    }

    /// SIGKILL; returns what it wrote.
    pub fn kill(&mut self) -> String {
        self.release().kill()
    }

    pub fn ask(&self, ask: Ask) -> Answer {
        self.process().ask(ask).unwrap()
    }

    pub fn write_rules(&self) {
        self.write_rules_text(&self.rules.to_text());
    }

    /// Whatever it is.
    pub fn write_rules_text(&self, text: &str) {
        self.write_at(&self.rules_path, text);
    }

    pub fn write_leaf(&self, leaf: &Signed) {
        self.write("tls.key", &leaf.key.serialize_pem());
        self.write("tls.crt", &leaf.chain_pem());
    }

    /// A file of the key folder.
    pub fn write(&self, name: &str, text: &str) {
        self.write_at(&self.rules.key_folder.join(name), text);
    }

    fn write_at(&self, path: &Path, text: &str) {
        let access = Access { mode: 0o640, uid: None, gid: Some(TUNNEL_UID) };
        durable::replace(path, text.as_bytes(), access).unwrap();
    }

    pub fn status(&self) -> Status {
        let answer = self.ask(Ask::Status);
        let Answer::Status(status) = answer else { panic!("{answer:?}") };
        *status
    }

    pub fn reload(&self) -> Result<Reloaded, String> {
        let answer = self.ask(Ask::Reload);
        if let Answer::Error { message } = answer {
            return Err(message);
        }
        let Answer::Reloaded(reloaded) = answer else { panic!("{answer:?}") };
        Ok(reloaded)
    }

    /// Writes the rules after this change, and has them read.
    pub fn change(&mut self, change: impl FnOnce(&mut Rules)) -> Reloaded {
        self.rules.generation += 1;
        change(&mut self.rules);
        self.write_rules();
        self.reload().unwrap()
    }

    /// Waits until the status is as it should be.
    pub fn wait(&self, what: &str, is_so: impl Fn(&Status) -> bool) -> Status {
        let began = Instant::now();
        loop {
            let status = self.status();
            if is_so(&status) {
                return status;
            }
            assert!(began.elapsed() < SOON, "never {what}: {status:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Resident memory, in bytes.
    pub fn memory(&self) -> u64 {
        memory_of(self.pid())
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            let log = process.kill();
            if std::thread::panicking() {
                eprintln!("--- {}\n{log}", self.rules.node);
            }
        }
    }
}

impl Process {
    /// Waits until it answers.
    pub fn wait_ready(&self) {
        let began = Instant::now();
        loop {
            match self.ask(Ask::Status) {
                Ok(Answer::Status(_)) => return,
                other => assert!(began.elapsed() < SOON, "not ready: {other:?}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn ask(&self, ask: Ask) -> std::io::Result<Answer> {
        let mut stream = UnixStream::connect(&self.control_path)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut line = serde_json::to_vec(&Request::new(ask))?;
        line.push(b'\n');
        stream.write_all(&line)?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        Ok(serde_json::from_str(&answer)?)
    }

    /// SIGKILL; returns what it wrote.
    pub fn kill(mut self) -> String {
        let _ = self.child.kill();
        let _ = self.child.wait();
        std::fs::read_to_string(&self.log_path).unwrap_or_default()
    }

    /// Waits for its end; what it wrote.
    pub fn ended(mut self) -> (std::process::ExitStatus, String) {
        let ended = self.child.wait().unwrap();
        (ended, std::fs::read_to_string(&self.log_path).unwrap_or_default())
    }
}

/// What an ended process wrote.
pub fn log_of(mut child: Child) -> String {
    let mut log = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        let _ = std::io::Read::read_to_string(&mut stderr, &mut log);
    }
    let _ = child.wait();
    log
}

/// Resident memory of a process, in bytes.
pub fn memory_of(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

fn inside<T: Send + 'static>(namespace: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let file = std::fs::File::open(format!("/run/netns/{namespace}")).unwrap();
    let entered = std::thread::spawn(move || {
        let network = Some(rustix::thread::LinkNameSpaceType::Network);
        rustix::thread::move_into_link_name_space(file.as_fd(), network).unwrap();
        work()
    });
    entered.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn ip(arguments: &[&str]) {
    let status = Command::new("ip").args(arguments).status().unwrap();
    assert!(status.success(), "ip {arguments:?}: {status}");
}
