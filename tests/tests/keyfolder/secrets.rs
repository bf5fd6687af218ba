//! Secrets stay where they belong: the real programs from the making of a CA to a renewal, with logs at
//! trace level, and then a look everywhere else. A process of the same user cannot read their memory,
//! and they leave no core file.

use std::{
    io::Write,
    net::TcpListener,
    os::unix::{fs::chown, net::UnixListener},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use ca_server::{
    init,
    keys::kek::Kek,
    store::{Store, kv::KvStore, records::CaKey, sled::SledEngine},
};
use raymtls_proto::{
    clock::{Clock, SystemClock},
    digest::sha256,
    durable::{self, Access},
};

use crate::node::{SOON, binary};

/// A user that is nobody here.
const NOBODY: u32 = 65_534;
/// How a P-256 key begins in PKCS#8, up to its curve: the wrapper of every key a CA has.
const PKCS8_P256: [u8; 17] = [
    0x30, 0x81, 0x87, 0x02, 0x01, 0x00, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02,
    0x01,
];

struct Place {
    folder: tempfile::TempDir,
    running: Vec<Child>,
    /// Who runs the programs, where it is not the one who runs the test.
    user: Option<u32>,
    /// What was ever printed.
    printed: Vec<u8>,
}

impl Drop for Place {
    fn drop(&mut self) {
        for child in &mut self.running {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Place {
    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, program: &str, arguments: &str) -> Command {
        let mut command = match self.user {
            None => Command::new(binary(program)),
            Some(uid) => as_user(uid, &self.at(&format!("bin/{program}"))),
        };
        command.args(arguments.split_whitespace()).current_dir(self.folder.path());
        command.env("RUST_LOG", "trace").env("RAYMTLS_LOG", "trace").stdin(Stdio::null());
        command
    }

    fn run(&mut self, program: &str, arguments: &str) -> Output {
        let output = self.command(program, arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {arguments}: {said}");
        self.printed.extend([&output.stdout[..], &output.stderr].concat());
        output
    }

    fn start(&mut self, program: &str, arguments: &str, socket: &str) {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.at(&format!("{program}.log")))
            .unwrap();
        let mut command = self.command(program, arguments);
        let child = command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        self.running.push(child);
        let began = Instant::now();
        while std::os::unix::net::UnixStream::connect(self.at(socket)).is_err() {
            assert!(began.elapsed() < SOON, "{program} does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn text(&self, name: &str) -> String {
        std::fs::read_to_string(self.at(name)).unwrap()
    }
}

/// What must be found nowhere else.
struct Needle(&'static str, Vec<u8>);

fn needles(place: &Place, token: &str) -> Vec<Needle> {
    let kek = place.text("kek").trim().to_owned();
    let body = |name: &str| {
        let text = place.text(name);
        // One line out of the middle: the secret number lies there.
        text.lines().nth(1).unwrap().as_bytes()[40..].to_vec()
    };
    let der = |name: &str| {
        let pem = pem::parse_many(place.text(name)).unwrap().remove(0);
        pem.contents()[36..68].to_vec()
    };
    vec![
        Needle("token", token.as_bytes().to_vec()),
        Needle("KEK, digits", kek.clone().into_bytes()),
        Needle("KEK, bytes", hex::decode(kek).unwrap()),
        Needle("Ray's token", place.text("tls/ray_token").trim().as_bytes().to_vec()),
        Needle("identity key, PEM", body("agent/identity.pem")),
        Needle("identity key, number", der("agent/identity.pem")),
        Needle("leaf key, PEM", body("tls/k1/tls.key")),
        Needle("leaf key, number", der("tls/k1/tls.key")),
    ]
}

/// The secret number of each of the CA's keys, out of the store with the KEK. Ends the server, whose
/// store it is.
fn ca_keys(place: &mut Place) -> Vec<Needle> {
    for child in &mut place.running {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    place.running.clear();
    let kek = Kek::read(&place.at("kek")).unwrap();
    let engine = SledEngine::open(&init::store_dir(&place.at("ca"))).unwrap();
    let store = KvStore::open(Box::new(engine), SystemClock.now()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (control, cluster) = runtime.block_on(async {
        let cluster = store.cluster("c1".parse().unwrap()).await.unwrap();
        (store.control().await.unwrap().unwrap(), cluster)
    });
    let number = |authority: &str, of: &str, key: &CaKey, root: &CaKey| {
        let hash = |key: &CaKey| hex::encode(sha256(&key.certificate_der));
        let name = format!("{authority}/{of}/{}/under/{}", hash(key), hash(root));
        kek.unwrap(&name, &key.wrapped_key).unwrap()[36..68].to_vec()
    };
    let (control_root, cluster_root) = (control.root.unwrap(), cluster.root.unwrap());
    let (control_issuer, cluster_issuer) = (&control.issuers[0], &cluster.issuers[0]);
    vec![
        Needle("control root", number("control", "root", &control_root, &control_root)),
        Needle("control issuer", number("control", "issuer", control_issuer, &control_root)),
        Needle("cluster root", number("cluster/c1", "root", &cluster_root, &cluster_root)),
        Needle("cluster issuer", number("cluster/c1", "issuer", cluster_issuer, &cluster_root)),
    ]
}

fn holds(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

fn files_in(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files_in(&path) } else { vec![path] }).collect()
}

fn as_user(uid: u32, program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    let (user, group) = (format!("--reuid={uid}"), format!("--regid={uid}"));
    command.args([&user, &group, "--clear-groups"]).arg(program);
    command
}

/// A copy of the programs that the user can reach, in a folder of the user.
fn give_programs(place: &Place, uid: u32) {
    std::fs::create_dir(place.at("bin")).unwrap();
    for program in ["ca-server", "ca-admin", "node-agent"] {
        std::fs::copy(binary(program), place.at("bin").join(program)).unwrap();
    }
    chown(place.at(""), Some(uid), Some(uid)).unwrap();
    chown(place.at("ca.toml"), Some(uid), Some(uid)).unwrap();
}

fn made(user: Option<u32>) -> (Place, String) {
    let folder = tempfile::tempdir().unwrap();
    let mut place = Place { folder, running: Vec::new(), user, printed: Vec::new() };
    let held: [TcpListener; 4] = std::array::from_fn(|_| TcpListener::bind("127.0.0.1:0").unwrap());
    let [enrollment, node, http, agent] = held.map(|l| l.local_addr().unwrap().port());
    let config = format!(
        "kek_file = \"kek\"\nenrollment_listen = \"127.0.0.1:{enrollment}\"\n\
         node_listen = \"127.0.0.1:{node}\"\nhttp_listen = \"127.0.0.1:{http}\"\n\
         admin_socket = \"admin.sock\"\nenrollment_endpoints = [\"127.0.0.1:{enrollment}\"]\n\
         node_endpoints = [\"127.0.0.1:{node}\"]\n"
    );
    durable::replace(&place.at("ca.toml"), config.as_bytes(), Access::PRIVATE).unwrap();
    if let Some(uid) = user {
        give_programs(&place, uid);
    }
    place.run("ca-server", "init --dir ca --kek-file kek");
    place.start("ca-server", "serve --dir ca --config ca.toml", "admin.sock");
    place.run("ca-admin", "--socket admin.sock cluster create c1 --max-job 2h -o json");
    place.run(
        "ca-admin",
        "--socket admin.sock token create --cluster c1 --role worker --any-address --out join -o json",
    );
    let join = place.text("join");
    let line = join.lines().find(|line| line.starts_with("token")).unwrap();
    let token = line.trim_end_matches('"').rsplit('.').next().unwrap().to_owned();
    assert!(token.len() >= 40, "no secret in the join file's line");
    place.run(
        "node-agent",
        "enroll --name w1 --address 10.0.0.1 --join join --state-dir agent --tls-dir tls -o json",
    );
    let run = format!(
        "run --state-dir agent --tls-dir tls --socket agent.sock --http-listen 127.0.0.1:{agent}"
    );
    place.start("node-agent", &run, "agent.sock");
    (place, token)
}

#[test]
fn no_secret_is_in_arguments_environment_logs_output_or_store() {
    let (mut place, token) = made(None);
    place.run("node-agent", "renew --socket agent.sock -o json");
    place.run("node-agent", "status --socket agent.sock --state-dir agent -o json");
    for what in ["node list --cluster c1", "cert list --cluster c1", "token list --cluster c1"] {
        place.run("ca-admin", &format!("--socket admin.sock {what} -o json"));
    }
    let mut places: Vec<(String, Vec<u8>)> = vec![("printed".to_owned(), place.printed.clone())];
    for child in &place.running {
        for file in ["cmdline", "environ"] {
            let path = format!("/proc/{}/{file}", child.id());
            places.push((path.clone(), std::fs::read(path).unwrap()));
        }
    }
    let logs = ["ca-server.log", "node-agent.log"].map(|name| place.at(name));
    for log in &logs {
        let text = std::fs::read_to_string(log).unwrap();
        assert!(text.contains("TRACE"), "{} is not at trace level", log.display());
    }
    let store = files_in(&place.at("ca"));
    let public = ["agent/status.json", "tls/ray.env", "tls/k1/tls.crt"].map(|name| place.at(name));
    for path in logs.iter().chain(&store).chain(&public) {
        places.push((path.display().to_string(), std::fs::read(path).unwrap()));
    }
    let mut needles = needles(&place, &token);
    needles.push(Needle("a CA's key, its wrapper", PKCS8_P256.to_vec()));
    needles.extend(ca_keys(&mut place));
    for Needle(what, needle) in &needles {
        assert!(needle.len() >= 16, "{what}: too short to look for");
        for (name, content) in &places {
            assert!(!holds(content, needle), "{what} is in {name}");
        }
    }
    // The looking itself works: each is found where it belongs.
    for (file, needle) in [("agent/identity.pem", 4), ("tls/k1/tls.key", 6), ("kek", 1)] {
        assert!(holds(&std::fs::read(place.at(file)).unwrap(), &needles[needle].1), "{file}");
    }
}

#[test]
fn the_memory_of_the_programs_is_closed_to_their_own_user_and_to_core_files() {
    let (mut place, _) = made(Some(NOBODY));
    let denied = |pid: u32, file: &str| {
        let mut read = as_user(NOBODY, Path::new("head"));
        let read = read.arg("-c1").arg(format!("/proc/{pid}/{file}")).output().unwrap();
        String::from_utf8_lossy(&read.stderr).contains("Permission denied")
    };
    let mut other = as_user(NOBODY, Path::new("sleep")).arg("60").spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    for file in ["environ", "mem"] {
        assert!(!denied(other.id(), file), "{file}: the looking itself does not work");
    }
    other.kill().unwrap();
    other.wait().unwrap();
    // A server that takes the call and says nothing keeps `ca-admin` there to be looked at.
    let silent = UnixListener::bind(place.at("silent.sock")).unwrap();
    chown(place.at("silent.sock"), Some(NOBODY), Some(NOBODY)).unwrap();
    let mut admin = place.command("ca-admin", "--socket silent.sock cluster list");
    let admin = admin.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let (_connection, _) = silent.accept().unwrap();
    place.running.push(admin);
    assert_eq!(place.running.len(), 3);
    for child in &mut place.running {
        let pid = child.id();
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
        let words: Vec<_> = core.split_whitespace().collect();
        assert_eq!(words[4..6], ["0", "0"], "{core}");
        for file in ["environ", "mem"] {
            assert!(denied(pid, file), "/proc/{pid}/{file} can be read");
        }
        assert!(child.try_wait().unwrap().is_none(), "{pid} had ended");
    }
}

/// What `exec` becomes has the limits its caller had: Ray's own core files are its own affair.
#[test]
fn what_exec_starts_keeps_its_own_limits() {
    let (place, _) = made(None);
    let command = "ulimit -S -c 1024; exec \"$0\" exec --socket agent.sock -- sh -c 'ulimit -c'";
    let output = Command::new("sh")
        .args(["-c", command])
        .arg(binary("node-agent"))
        .current_dir(place.at(""))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(said.trim(), "1024", "{}", String::from_utf8_lossy(&output.stderr));
}

/// Copies what a process has written in its memory into a file, as root reads it.
const DUMPER: &str = r"
import sys
pid, file = sys.argv[1:]
with open(f'/proc/{pid}/maps') as maps, open(f'/proc/{pid}/mem', 'rb', 0) as mem, open(file, 'wb') as out:
    for line in maps:
        span, access = line.split()[:2]
        if not access.startswith('rw'):
            continue
        low, high = (int(end, 16) for end in span.split('-'))
        try:
            mem.seek(low)
            out.write(mem.read(high - low))
        except OSError:
            continue
";

/// How often each of the lines, in hexadecimal, is in a file.
const COUNTER: &str = r"
import sys
with open(sys.argv[1], 'rb') as file:
    data = file.read()
print(*(data.count(bytes.fromhex(line)) for line in sys.stdin.read().split()))
";

fn dump(pid: u32, file: &Path) {
    let mut dumper = Command::new("python3");
    let done = dumper.args(["-c", DUMPER, &pid.to_string()]).arg(file).status().unwrap();
    assert!(done.success());
    assert!(std::fs::metadata(file).unwrap().len() > 1 << 20, "hardly any memory was read");
}

fn count(file: &Path, needles: &[Needle]) -> Vec<usize> {
    let mut counter = Command::new("python3")
        .args(["-c", COUNTER])
        .arg(file)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines: Vec<_> = needles.iter().map(|Needle(_, needle)| hex::encode(needle)).collect();
    counter.stdin.take().unwrap().write_all(lines.join("\n").as_bytes()).unwrap();
    let output = counter.wait_with_output().unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    said.split_whitespace().map(|number| number.parse().unwrap()).collect()
}

/// Root reads any memory: what it finds there is what the programs still hold. The buffers of the TLS
/// and HTTP libraries and of the reader of PEM are not ours to wipe, so what passed through them is shown
/// and not judged.
#[test]
fn what_was_done_with_is_not_kept_in_memory() {
    let (mut place, token) = made(None);
    place.run("node-agent", "renew --socket agent.sock -o json");
    let files = ["ca-server.memory", "node-agent.memory"].map(|name| place.at(name));
    for (child, file) in place.running.iter().zip(&files) {
        dump(child.id(), file);
    }
    let mut looked = needles(&place, &token);
    looked.extend(ca_keys(&mut place));
    let [ca, agent] = files.map(|file| count(&file, &looked));
    for (number, Needle(what, _)) in looked.iter().enumerate() {
        println!("{what}: {} in ca-server, {} in node-agent", ca[number], agent[number]);
    }
    let found = |counts: &[usize], what: &str| {
        let at = looked.iter().position(|Needle(name, _)| *name == what);
        counts[at.unwrap_or_else(|| panic!("no {what}"))]
    };
    // Its schedule for AES begins with the key itself: the looking works, and there is no other copy.
    assert_eq!(found(&ca, "KEK, bytes"), 1);
    let gone_from_ca = ["KEK, digits", "control root", "cluster root"];
    let never_at_ca =
        ["identity key, PEM", "identity key, number", "leaf key, PEM", "leaf key, number"];
    for what in gone_from_ca.iter().chain(&never_at_ca) {
        assert_eq!(found(&ca, what), 0, "{what} is in ca-server's memory");
    }
    for what in ["token", "KEK, digits", "KEK, bytes", "cluster root", "cluster issuer"] {
        assert_eq!(found(&agent, what), 0, "{what} is in node-agent's memory");
    }
}
