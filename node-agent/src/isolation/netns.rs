//! The kernel's side of it, in a network namespace that the test makes and removes: what is loaded
//! drops, counts on over a reload, and closes the sockets it says it closes. Needs root.

use std::{
    collections::BTreeSet,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, TcpListener, TcpStream},
    os::{fd::AsFd, unix::fs::PermissionsExt},
    process::Command,
    time::{Duration, Instant},
};

use raymtls_proto::{
    durable::{self, Access},
    identity::{ClusterId, Role},
    ports, v1,
};

use super::{
    Counters, Mark, Policy, Verdict, clear, render, render_marked, rules_in, table::Kernel,
};

const OWN: &str = "10.77.0.1";
const BAD: &str = "10.77.0.9";

/// A namespace whose loopback has two addresses.
struct Namespace(String);

impl Namespace {
    fn make(name: &str) -> Self {
        let namespace = Self(format!("raymtls-agent-{name}-{}", std::process::id()));
        ip(&["netns", "add", &namespace.0]);
        let inside = ["-n", namespace.0.as_str()];
        for words in [
            &["link", "set", "lo", "up"][..],
            &["addr", "add", "10.77.0.1/32", "dev", "lo"],
            &["addr", "add", "10.77.0.9/32", "dev", "lo"],
        ] {
            ip(&[&inside, words].concat());
        }
        namespace
    }

    /// Programs that run in it.
    fn kernel(&self, folder: &std::path::Path) -> Kernel {
        for program in ["nft", "ss"] {
            let path = folder.join(program);
            let text = format!(
                "#!/bin/sh\nPATH=/usr/sbin:/usr/bin:/sbin:/bin\nexec ip netns exec {} {program} \"$@\"\n",
                self.0
            );
            durable::create(&path, text.as_bytes(), Access::PUBLIC).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        Kernel { program_path: folder.display().to_string(), ..Kernel::default() }
    }

    /// Runs in it, in a thread of its own.
    fn inside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let file = std::fs::File::open(format!("/run/netns/{}", self.0)).unwrap();
        let entered = std::thread::spawn(move || {
            let network = Some(rustix::thread::LinkNameSpaceType::Network);
            rustix::thread::move_into_link_name_space(file.as_fd(), network).unwrap();
            work()
        });
        entered.join().unwrap()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        ip(&["netns", "del", &self.0]);
    }
}

fn ip(words: &[&str]) {
    let output = Command::new("ip").args(words).output().unwrap();
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn policy(members: usize, blocked: &[&str], entirely: &[&str]) -> Policy {
    let settings =
        v1::Settings { port_plan: Some(ports::default_plan()), ..v1::Settings::default() };
    let cluster: ClusterId = "c1".parse().unwrap();
    let addresses = |texts: &[&str]| texts.iter().map(|t| t.parse().unwrap()).collect();
    let member = |i: usize| IpAddr::from([10, 80, (i / 100) as u8, (i % 100 * 2) as u8]);
    let mut policy = Policy::of(&cluster, Role::Head, settings, Verdict::Drop);
    policy.members = (0..members).map(member).collect();
    policy.blocked = addresses(blocked);
    policy.blocked_entirely = addresses(entirely);
    policy
}

/// A connection from the host to the bad address, both ends.
fn connection(port: u16) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((BAD, port)).unwrap();
    let here = TcpStream::connect((BAD, port)).unwrap();
    assert_eq!(here.local_addr().unwrap().ip(), OWN.parse::<IpAddr>().unwrap());
    (here, listener.accept().unwrap().0)
}

/// Whether what is written on one end comes out at the other.
fn works((mut here, mut there): (&TcpStream, &TcpStream)) -> bool {
    there.set_read_timeout(Some(Duration::from_millis(150))).unwrap();
    let mut byte = [0];
    here.write_all(b"x").is_ok() && there.read_exact(&mut byte).is_ok()
}

/// One way to say that nothing can be shown here: it fails, and is asked for by name where it may.
fn assert_root() {
    assert!(
        rustix::process::geteuid().is_root(),
        "wants root, to make a network namespace; without it: cargo test -- --skip netns"
    );
}

#[tokio::test]
async fn a_block_ends_connections_on_the_cluster_s_ports_or_on_all() {
    assert_root();
    let namespace = Namespace::make("a");
    let folder = tempfile::tempdir().unwrap();
    let kernel = namespace.kernel(folder.path());
    let cluster: ClusterId = "c1".parse().unwrap();
    assert_eq!(kernel.look(&cluster).await.unwrap(), None);
    kernel.load(&render(&policy(3, &[], &[]), Counters::default())).await.unwrap();
    assert_eq!(
        kernel.look(&cluster).await.unwrap().map(|seen| seen.counters),
        Some(Counters::default())
    );
    // The source is chosen by hand where the route would take the destination's address.
    ip(&[
        "-n",
        &namespace.0,
        "route",
        "replace",
        "local",
        BAD,
        "dev",
        "lo",
        "src",
        OWN,
        "table",
        "local",
    ]);
    let [ray, worker, other] = namespace.inside(|| [6_379, 10_050, 7_777].map(connection));
    let pair = |c: &(TcpStream, TcpStream)| works((&c.0, &c.1));
    assert!(pair(&ray) && pair(&worker) && pair(&other));

    let began = Instant::now();
    kernel.load(&render(&policy(3, &[BAD], &[]), Counters::default())).await.unwrap();
    eprintln!("3 members: loaded in {:?}", began.elapsed());
    assert!(!pair(&ray) && !pair(&worker) && pair(&other));
    let counted = kernel.look(&cluster).await.unwrap().unwrap().counters;
    assert!(counted.blocked >= 2, "{counted:?}");
    let bad: BTreeSet<IpAddr> = [BAD.parse().unwrap()].into();
    let cluster_ports = policy(3, &[], &[]).cluster_ports();
    assert_eq!(kernel.cut(&bad, Some(&cluster_ports)).await.unwrap(), 2);
    for cut in [&ray, &worker] {
        let error = (&cut.0).read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionAborted, "{error}");
    }
    assert!(pair(&other));

    kernel.load(&render(&policy(3, &[], &[BAD]), counted)).await.unwrap();
    assert!(!pair(&other));
    assert_eq!(kernel.cut(&bad, None).await.unwrap(), 1);
    let more = kernel.look(&cluster).await.unwrap().unwrap().counters;
    assert!(more.blocked > counted.blocked, "{more:?} after {counted:?}");

    let many = render(&policy(10_000, &[BAD], &[]), more);
    let began = Instant::now();
    kernel.load(&many).await.unwrap();
    let loaded = began.elapsed();
    let counting = Instant::now();
    kernel.look(&cluster).await.unwrap().unwrap();
    eprintln!("10,000 members: loaded in {loaded:?}, looked at in {:?}", counting.elapsed());
    assert!(loaded < Duration::from_secs(5), "{loaded:?}");
    kernel.load(&clear(&cluster)).await.unwrap();
    kernel.load(&clear(&cluster)).await.unwrap();
    assert_eq!(kernel.look(&cluster).await.unwrap(), None);
}

/// What nft takes and says of the table as the agent loads it: marked, counted by rules, and seen to be
/// emptied; and the CA passes it whatever is blocked, though not with the packet that opens a connection.
#[tokio::test]
async fn a_marked_table_is_known_again_and_lets_the_ca_s_answers_through() {
    assert_root();
    let namespace = Namespace::make("b");
    let folder = tempfile::tempdir().unwrap();
    let kernel = namespace.kernel(folder.path());
    let cluster: ClusterId = "c1".parse().unwrap();
    let source = ["route", "replace", "local", BAD, "dev", "lo", "src", OWN, "table", "local"];
    ip(&[&["-n", namespace.0.as_str()][..], &source].concat());
    let mut policy = policy(3, &[], &[BAD]);
    let plain = render(&policy, Counters::default());
    policy.protected.endpoints = BTreeSet::from([format!("{BAD}:7444").parse().unwrap()]);
    let text =
        render_marked(&policy, Counters { blocked: 1, refused: 2, ..Counters::default() }, Mark(7));
    kernel.load(&text).await.unwrap();
    let seen = kernel.look(&cluster).await.unwrap().unwrap();
    assert_eq!((seen.mark, seen.rules), (Some(Mark(7)), rules_in(&text)));
    assert_eq!(seen.counters.refused, 2);
    // The CA answers at a blocked address; the same address with another port does not.
    let dial = |port: u16| {
        namespace.inside(move || {
            let _listener = TcpListener::bind((BAD, port)).unwrap();
            let at = std::net::SocketAddr::new(BAD.parse().unwrap(), port);
            TcpStream::connect_timeout(&at, Duration::from_millis(300)).is_ok()
        })
    };
    assert_eq!((dial(7_444), dial(7_445)), (true, false));
    kernel.run("nft", &["flush", "chain", "inet", "raymtls_c1", "judge"], b"").await.unwrap();
    let emptied = kernel.look(&cluster).await.unwrap().unwrap();
    assert!(emptied.mark == seen.mark && emptied.rules < seen.rules, "{emptied:?}");
    kernel.load(&plain).await.unwrap();
    assert_eq!(kernel.look(&cluster).await.unwrap().unwrap().mark, None);
}
