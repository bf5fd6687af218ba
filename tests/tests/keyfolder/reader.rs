//! Somebody reads a key folder all the time while it is renewed.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use node_agent::{
    api::{Answer, Ask},
    keyfolder::TlsDir,
};
use tokio::{process::Command, time::sleep};

use crate::node::Node;

/// Reads of one key folder.
const READS: u32 = 100_000;
/// Key folders read so often in a full run: a million reads. A CA keeps no node so many live leaves that
/// one could be renewed for as long.
const FOLDERS_FULL: u32 = 10;
/// Reads through `current` while the key changes.
const READS_CURRENT: u32 = 4_000;
const RENEW_EVERY: Duration = Duration::from_millis(100);

/// Opens certificate then key, as a TLS library does, again and again; says what went wrong. `pinned`
/// asks once per read where `current` points and reads both files there.
const READER: &str = r"
import os, ssl, sys
folder, reads, pinned = sys.argv[1], int(sys.argv[2]), sys.argv[3] == 'pinned'
wrong, serials = {}, set()
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
for n in range(reads):
    try:
        at = os.path.realpath(folder) if pinned else folder
        context.load_cert_chain(at + '/tls.crt', at + '/tls.key')
        if n % 100 == 0:
            fresh = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            fresh.load_verify_locations(at + '/ca.crt')
            fresh.load_verify_locations(at + '/crl.pem')
            with open(at + '/tls.crt') as file:
                serials.add(file.read())
    except Exception as error:
        what = getattr(error, 'reason', None) or repr(error)
        wrong[what] = wrong.get(what, 0) + 1
mismatched = wrong.pop('KEY_VALUES_MISMATCH', 0)
print('reads', reads, 'mismatched', mismatched, 'otherwise wrong', sum(wrong.values()), wrong, 'generations', len(serials))
";

/// What the reader saw.
struct Seen {
    said: String,
    mismatched: u32,
    clean: bool,
    generations: u32,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_while_renewing_see_no_pair_that_does_not_fit() {
    read_while_renewing(READS).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "minutes: scripts/check full"]
async fn a_million_reads_while_renewing_see_no_pair_that_does_not_fit() {
    for _ in 0..FOLDERS_FULL {
        read_while_renewing(READS).await;
    }
}

async fn read_while_renewing(reads: u32) {
    let mut node = Node::new().await;
    node.run().await;
    let (seen, renewals) = read(&mut node, "tls/k1", reads, "plain", Ask::Renew).await;
    println!("renewals {renewals}, {}", seen.said);
    assert!(seen.clean && seen.mismatched == 0, "{}", seen.said);
    assert!(renewals >= 20, "only {renewals} renewals while it read: the test shows little");
    assert!(seen.generations > 10, "the reader saw only {} certificates", seen.generations);
    node.kill().await;
    node.deployment.finish().await;
}

/// Certificate and key opened in two steps through `current` may lie in two key folders. Who asks once
/// where `current` points and reads there sees pairs only.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_resolves_current_once_sees_pairs_only() {
    let mut node = Node::new().await;
    node.run().await;
    let Answer::ExecFolder(_) = node.ask(Ask::ExecFolder).await.unwrap() else { panic!() };
    node.kill().await;
    for how in ["plain", "pinned"] {
        let going = Arc::new(AtomicBool::new(true));
        let changing = std::thread::spawn({
            let (tls, going) = (TlsDir::prepare(&node.at("tls"), None).unwrap(), going.clone());
            move || change_current(&tls, &going)
        });
        let output = reader(&node, "tls/current", READS_CURRENT, how).output().await.unwrap();
        going.store(false, Relaxed);
        let changes = changing.join().unwrap();
        let seen = Seen::parse(&output);
        println!("{how}: {changes} changes of current, {}", seen.said);
        assert!(seen.clean, "{}", seen.said);
        assert!(how == "plain" || seen.mismatched == 0, "{}", seen.said);
        assert!(changes > 100, "only {changes} changes: the test shows little");
    }
    node.deployment.finish().await;
}

/// Between two key folders, much faster than any agent would.
fn change_current(tls: &TlsDir, going: &AtomicBool) -> u32 {
    let mut changes = 0;
    while going.load(Relaxed) {
        tls.point_current(changes % 2 + 1).unwrap();
        changes += 1;
        std::thread::sleep(Duration::from_millis(1));
    }
    changes
}

impl Seen {
    fn parse(output: &std::process::Output) -> Self {
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        let after = |name: &str| -> u32 {
            let rest = said.split_once(name).unwrap_or_else(|| panic!("{output:?}")).1;
            rest.split_whitespace().next().unwrap().parse().unwrap()
        };
        Self {
            mismatched: after(" mismatched "),
            clean: after(" otherwise wrong ") == 0,
            generations: after(" generations "),
            said,
        }
    }
}

async fn read(node: &mut Node, folder: &str, reads: u32, how: &str, ask: Ask) -> (Seen, u32) {
    let reading = tokio::spawn(reader(node, folder, reads, how).output());
    let mut renewals = 0;
    while !reading.is_finished() {
        let asked = Instant::now();
        let answer = node.ask(ask).await.unwrap();
        let Answer::Renewed(renewed) = answer else { panic!("{answer:?}\n{}", node.log()) };
        assert!(renewed.failed.is_empty(), "{renewed:?}");
        renewals += 1;
        sleep(RENEW_EVERY.saturating_sub(asked.elapsed())).await;
    }
    (Seen::parse(&reading.await.unwrap().unwrap()), renewals)
}

fn reader(node: &Node, folder: &str, reads: u32, how: &str) -> Command {
    let mut reader = Command::new("python3");
    reader.args(["-c", READER]).arg(node.at(folder)).args([&reads.to_string(), how]);
    reader.kill_on_drop(true);
    reader
}
