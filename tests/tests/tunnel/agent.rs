//! Mode tunnel as an operator meets it: a real CA, real agents that start real `ray-tunnel`s, the kernel's
//! real tables, on hosts that are network namespaces. Echo servers play Ray.

use std::{
    io::{Read, Write},
    net::{IpAddr, TcpListener, TcpStream},
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use raymtls_proto::durable::{self, Access};
use raymtls_tests::{
    programs::binary,
    tunnel::{
        Host, Lab,
        host::{SOON, TUNNEL_UID},
    },
};
use serde_json::Value;

/// Ray's user, and one who is not.
const RAY: u32 = 64_372;
const OTHER: u32 = 64_373;
/// A worker's port of the plan.
const PORT: u16 = 10_002;

/// A CA and agents, each on its host.
struct Cluster {
    lab: Lab,
    ca: Host,
    nodes: Vec<Host>,
    running: Vec<(String, Child)>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in 0..self.nodes.len() {
            if let Some(pid) = self.pid(node) {
                kill(pid, "KILL");
            }
        }
        for (_, child) in &mut self.running {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Cluster {
    fn start() -> Self {
        let lab = Lab::new();
        let (ca, nodes) = (lab.host("ca", 250), vec![lab.host("n1", 1), lab.host("n2", 2)]);
        let mut cluster = Self { lab, ca, nodes, running: Vec::new() };
        let at = |name: &str| cluster.path(name).display().to_string();
        let (kek, socket, v4) = (at("kek"), at("admin.sock"), cluster.ca.v4);
        cluster.write(
            "ca.toml",
            &format!(
                "kek_file = '{kek}'\nadmin_socket = '{socket}'\nenrollment_endpoints = ['{v4}:7443']\n\
                 node_endpoints = ['{v4}:7444']\n"
            ),
        );
        let dir = at("ca");
        succeed(Command::new(binary("ca-server")).args([
            "init",
            "--dir",
            &dir,
            "--kek-file",
            &kek,
        ]));
        let mut serve = Command::new(binary("ca-server"));
        serve.args(["serve", "--dir", &dir, "--config", &at("ca.toml")]);
        let child = spawn(&cluster.ca, serve);
        cluster.running.push(("ca".to_owned(), child));
        wait("the CA's socket", || cluster.path("admin.sock").exists());
        cluster.admin(&["cluster", "create", "c1", "--max-job", "1d"]);
        cluster
    }

    fn path(&self, name: &str) -> PathBuf {
        self.lab.folder.path().join(name)
    }

    fn at(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn write(&self, name: &str, text: &str) {
        durable::replace(&self.path(name), text.as_bytes(), Access::PUBLIC).unwrap();
    }

    fn try_admin(&self, words: &[&str]) -> Output {
        let socket = self.at("admin.sock");
        let mut command = Command::new(binary("ca-admin"));
        command.args(["--socket", &socket]).args(words).output().unwrap()
    }

    fn admin(&self, words: &[&str]) -> String {
        let output = self.try_admin(words);
        assert!(output.status.success(), "{words:?}: {}", text_of(&output));
        text_of(&output)
    }

    fn enrol(&mut self, node: usize, role: &str) {
        let host = &self.nodes[node];
        let name = host.name.clone();
        let join = self.at(&format!("{name}.join"));
        self.admin(&[
            "token",
            "create",
            "--cluster",
            "c1",
            "--role",
            role,
            "--any-address",
            "--out",
            &join,
        ]);
        let mut command = Command::new(binary("node-agent"));
        let (state, tls) = (self.at(&format!("{name}.state")), self.at(&format!("{name}.tls")));
        command.args(["enroll", "--join", &join, "--state-dir", &state, "--tls-dir", &tls]);
        command.args(["--role", role, "--name", &name]);
        let v6 = host.v6.to_string();
        command.args(["--address", &v6, "--address", &host.v4.to_string()]);
        self.write(
            &format!("{name}.toml"),
            &format!(
                "ray_uid = {RAY}\nray_group = '{RAY}'\nstate_dir = '{state}'\ntls_dir = '{tls}'\n\
                 socket = '{}'\nhooks_dir = '{}'\n[tunnel]\nuser = {TUNNEL_UID}\nfolder = '{}'\n\
                 program = '{}'\n",
                self.at(&format!("{name}.sock")),
                self.at("no-hooks"),
                self.at(&format!("{name}.tunnel")),
                binary("ray-tunnel").display(),
            ),
        );
        let output = host.inside(move || command.output().unwrap());
        assert!(output.status.success(), "{}", text_of(&output));
        self.run(node);
    }

    fn run(&mut self, node: usize) {
        let host = &self.nodes[node];
        let mut command = Command::new(binary("node-agent"));
        command.args(["run", "--config", &self.at(&format!("{}.toml", host.name))]);
        let child = spawn(host, command);
        self.running.push((host.name.clone(), child));
    }

    /// Ends an agent as a crash does.
    fn kill_agent(&mut self, node: usize) {
        let name = &self.nodes[node].name;
        let index = self.running.iter().position(|(other, _)| other == name).unwrap();
        let (_, mut child) = self.running.remove(index);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn agent(&self, node: usize, words: &[&str]) -> Output {
        let socket = self.at(&format!("{}.sock", self.nodes[node].name));
        let mut command = Command::new(binary("node-agent"));
        command.args(words).args(["--socket", &socket]);
        command.output().unwrap()
    }

    /// `exec`, as Ray's user.
    fn exec(&self, node: usize) -> Output {
        let socket = self.at(&format!("{}.sock", self.nodes[node].name));
        let agent = binary("node-agent").display().to_string();
        let mut command = as_user(RAY);
        command.args([&agent, "exec", "--socket", &socket, "--", "env"]);
        self.nodes[node].inside(move || command.output().unwrap())
    }

    fn tunnel(&self, node: usize) -> Option<Value> {
        let output = self.agent(node, &["status", "-o", "json"]);
        let status: Value = serde_json::from_slice(&output.stdout).ok()?;
        (output.status.success() && !status["tunnel"].is_null()).then(|| status["tunnel"].clone())
    }

    fn is_ready(&self, node: usize) -> bool {
        self.tunnel(node).is_some_and(|tunnel| tunnel["ready"] == true)
    }

    fn pid(&self, node: usize) -> Option<u64> {
        self.tunnel(node)?["pid"].as_u64()
    }

    fn table(&self, node: usize) -> String {
        let mut command = Command::new("nft");
        command.args(["list", "table", "inet", "raymtls_c1"]);
        text_of(&self.nodes[node].inside(move || command.output().unwrap()))
    }

    /// Whether this user hears its word again.
    fn reaches(&self, from: &Host, user: u32, to: IpAddr, port: u16) -> bool {
        let script =
            format!("exec 3<>/dev/tcp/{to}/{port} && echo word >&3 && read -r w <&3 && echo $w");
        let mut command = as_user(user);
        command.args(["timeout", "3", "bash", "-c", &script]);
        let output = from.inside(move || command.output().unwrap());
        String::from_utf8_lossy(&output.stdout).trim() == "word"
    }
}

fn as_user(user: u32) -> Command {
    let mut command = Command::new("setpriv");
    let user = user.to_string();
    command.args(["--reuid", &user, "--regid", &user, "--clear-groups"]).current_dir("/");
    command
}

fn spawn(host: &Host, mut command: Command) -> Child {
    command.stdin(Stdio::null());
    host.inside(move || command.spawn().unwrap())
}

fn succeed(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", text_of(&output));
}

fn text_of(output: &Output) -> String {
    let texts = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    texts.concat()
}

fn kill(pid: u64, signal: &str) {
    succeed(Command::new("kill").args(["-s", signal, &pid.to_string()]));
}

fn wait(what: &str, so: impl Fn() -> bool) -> Duration {
    let began = Instant::now();
    while !so() {
        assert!(began.elapsed() < SOON * 2, "not so: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
    began.elapsed()
}

fn echo(listener: TcpListener) {
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            std::thread::spawn(move || {
                let mut bytes = [0; 1_024];
                while let Ok(length @ 1..) = stream.read(&mut bytes) {
                    if stream.write_all(&bytes[..length]).is_err() {
                        return;
                    }
                }
            });
        }
    });
}

fn is_alive(flow: &mut TcpStream) -> bool {
    let mut byte = [0];
    flow.write_all(b"x").is_ok() && flow.read_exact(&mut byte).is_ok()
}

/// Two nodes in mode tunnel, ready, with a Ray on the second one.
fn in_mode_tunnel() -> Cluster {
    let mut cluster = Cluster::start();
    // Addresses that no call came from, the IPv6 ones here, are members' only so.
    cluster.admin(&["cluster", "set", "c1", "isolation=enforce", "trust-ranges=on", "--yes"]);
    cluster.admin(&["cluster", "set", "c1", "mode=tunnel", "--yes"]);
    cluster.enrol(0, "head");
    cluster.enrol(1, "worker");
    for node in [0, 1] {
        wait("ready", || cluster.is_ready(node));
    }
    wait("both know both", || {
        (0..2).all(|node| cluster.table(node).contains("10.77.0.1, 10.77.0.2"))
    });
    wait("ready after it", || cluster.is_ready(0) && cluster.is_ready(1));
    echo(cluster.nodes[1].listen(cluster.nodes[1].v4, PORT));
    echo(cluster.nodes[1].listen(cluster.nodes[1].v6, PORT));
    cluster
}

#[test]
fn ray_s_users_alone_reach_members_alone_and_nothing_is_ever_plaintext() {
    let cluster = in_mode_tunnel();
    let stranger = cluster.lab.host("stranger", 9);
    echo(stranger.listen(stranger.v4, PORT));
    let (one, two) = (&cluster.nodes[0], &cluster.nodes[1]);
    for (who, from, user, to, port, wanted) in [
        ("Ray's user to a member", one, RAY, two.v4, PORT, true),
        ("the same over IPv6", one, RAY, two.v6, PORT, true),
        ("root to a member", one, 0, two.v4, PORT, true),
        ("another user to a member", one, OTHER, two.v4, PORT, false),
        ("the tunnel's user past itself", one, TUNNEL_UID, two.v4, PORT, false),
        ("Ray's user to no member", one, RAY, stranger.v4, PORT, false),
        ("another user to no member is none of ours", one, OTHER, stranger.v4, PORT, true),
        ("another user of the same host", two, OTHER, two.v4, PORT, false),
        ("Ray's user of the same host", two, RAY, two.v4, PORT, true),
        ("a port for its own host alone", one, RAY, two.v4, 6_703, false),
        ("a stranger to Ray", &stranger, 0, two.v4, PORT, false),
        ("a stranger to the tunnel", &stranger, 0, two.v4, 15_008, false),
    ] {
        assert_eq!(cluster.reaches(from, user, to, port), wanted, "{who}");
    }
    let carried = cluster.tunnel(0).unwrap();
    assert!(carried["flows_out"].as_u64().is_some(), "{carried}");
    wait("what was refused is counted", || {
        cluster.tunnel(0).is_some_and(|t| t["uncaptured"].as_u64() >= Some(2))
            && cluster.tunnel(1).is_some_and(|t| t["strangers"].as_u64() >= Some(1))
    });

    // Ray is started without TLS and with the token; its user cannot read the key.
    let environment = text_of(&cluster.exec(0));
    assert!(environment.contains("RAY_USE_TLS=0") && environment.contains("RAY_AUTH_MODE=token"));
    assert!(!environment.contains("RAY_TLS_"), "{environment}");
    let mut read = as_user(RAY);
    read.args(["cat", &cluster.at("n1.tls/current/tls.key")]);
    assert!(!read.output().unwrap().status.success(), "Ray's user reads the key");

    // Without the kernel's table nothing is captured, and the member takes no plaintext.
    let mut delete = Command::new("nft");
    delete.args(["delete", "table", "inet", "raymtls_c1"]);
    assert!(one.inside(move || delete.output().unwrap()).status.success());
    assert!(!cluster.reaches(one, RAY, two.v4, PORT), "plaintext arrived");
    wait("the table is back", || cluster.table(0).contains("redirect"));
    wait("and capture proved", || cluster.reaches(one, RAY, two.v4, PORT));
}

#[test]
fn the_data_path_outlives_agents_and_crashes_are_healed() {
    let mut cluster = in_mode_tunnel();
    let to = cluster.nodes[1].v4;

    // Killed: what is dialled meanwhile waits, and is carried.
    let before = cluster.pid(0).unwrap();
    kill(before, "KILL");
    let began = Instant::now();
    assert!(cluster.reaches(&cluster.nodes[0], RAY, to, PORT), "it waits for the next process");
    eprintln!("dialled and heard {:?} after a kill", began.elapsed());
    wait("another process", || cluster.pid(0).is_some_and(|pid| pid != before));
    assert_eq!(cluster.tunnel(0).unwrap()["restarts"], 1);
    wait("ready", || cluster.is_ready(0));

    // Handed over: the flow goes on in the old process, new ones come to the new one.
    let mut flow = cluster.nodes[0].connect((to, PORT)).unwrap();
    assert!(is_alive(&mut flow));
    let before = cluster.pid(0).unwrap();
    let said = cluster.agent(0, &["tunnel", "handover", "--deadline", "60s"]);
    assert!(said.status.success(), "{}", text_of(&said));
    wait("another process is ready", || {
        cluster.pid(0).is_some_and(|pid| pid != before) && cluster.is_ready(0)
    });
    assert!(is_alive(&mut flow), "the old process keeps its flows");
    assert!(cluster.reaches(&cluster.nodes[0], RAY, to, PORT));

    // The agent dies: flows and new connections go on, and the next agent takes the process over.
    let before = cluster.pid(0).unwrap();
    cluster.kill_agent(0);
    assert!(is_alive(&mut flow) && cluster.reaches(&cluster.nodes[0], RAY, to, PORT));
    cluster.run(0);
    wait("ready again", || cluster.is_ready(0));
    let tunnel = cluster.tunnel(0).unwrap();
    assert_eq!((tunnel["pid"].as_u64(), &tunnel["adopted"]), (Some(before), &true.into()));
    assert!(is_alive(&mut flow));
    kill(before, "KILL");
    wait("an adopted one is started again, too", || {
        cluster.pid(0).is_some_and(|pid| pid != before) && cluster.is_ready(0)
    });
    assert!(is_alive(&mut flow), "the process that drains was another");

    // Stopped: refused, and Ray is not started.
    let said = cluster.agent(0, &["tunnel", "stop", "--deadline", "0s"]);
    assert!(said.status.success(), "{}", text_of(&said));
    assert!(!cluster.reaches(&cluster.nodes[0], RAY, to, PORT));
    let refused = cluster.exec(0);
    let text = text_of(&refused);
    assert!(!refused.status.success() && text.contains("node-agent tunnel stop"), "{text}");
}

#[test]
fn a_revocation_cuts_flows_and_says_so_and_the_mode_goes_both_ways() {
    let cluster = in_mode_tunnel();
    let to = cluster.nodes[1].v4;
    let mut flow = cluster.nodes[0].connect((to, PORT)).unwrap();
    assert!(is_alive(&mut flow));
    let said =
        cluster.admin(&["node", "revoke", "--cluster", "c1", "--reason", "t", "--yes", "n2"]);
    assert!(said.contains("1 flows of its tunnel cut"), "{said}");
    assert!(!is_alive(&mut flow));
    assert!(!cluster.reaches(&cluster.nodes[0], RAY, to, PORT));

    let refused = cluster.try_admin(&["cluster", "set", "c1", "isolation=off", "--yes"]);
    let text = text_of(&refused);
    assert!(!refused.status.success() && text.contains("set isolation=enforce"), "{text}");
    let key = || std::fs::read_link(cluster.path("n1.tls/current")).unwrap();
    let before = key();
    let said = cluster.admin(&["cluster", "set", "c1", "mode=files", "--yes"]);
    assert!(said.contains("stop Ray on every node"), "{said}");
    wait("mode files", || cluster.tunnel(0).is_none() && !cluster.table(0).contains("redirect"));
    let environment = text_of(&cluster.exec(0));
    assert!(environment.contains("RAY_USE_TLS=1"), "{environment}");
    assert_ne!(key(), before, "each start of Ray has a key of its own");
    let of_files = key();
    cluster.admin(&["cluster", "set", "c1", "mode=tunnel", "--yes"]);
    wait("mode tunnel again", || cluster.is_ready(0));
    wait("a key that Ray could not read", || key() != of_files);
    assert!(cluster.table(0).contains("redirect"));
}
