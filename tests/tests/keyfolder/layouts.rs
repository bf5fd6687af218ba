//! Folders and files that are not as they should be when the agent comes: of others, open to others,
//! links, pipes. Each is refused in words or put right, and nothing outside is touched.

use std::{
    os::unix::fs::{PermissionsExt, chown, symlink},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{process::Command, time::timeout};

use crate::node::{Node, SOON, stray_files};

const OTHER: u32 = 54_321;

/// What a layout does to an enrolled machine.
type Prepare = fn(&Node);

enum Then {
    /// The agent refuses to start, and says this.
    Refuses(&'static [&'static str]),
    /// It starts, and nothing of what is outside was changed.
    Works,
}

fn mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// Puts a link in the place of what was moved away.
fn link_away(node: &Node, name: &str) {
    std::fs::rename(node.at(name), node.at("away")).unwrap();
    symlink(node.at("away"), node.at(name)).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layout_that_is_not_as_it_should_be_is_refused_or_put_right() {
    assert!(rustix::process::geteuid().is_root(), "wants root, to give files away");
    let layouts: [(&str, Prepare, Then); 14] = [
        ("parent open to all", |n| mode(&n.at(""), 0o777), Then::Refuses(&["chmod go-w"])),
        (
            "parent of another user",
            |n| chown(n.at(""), Some(OTHER), None).unwrap(),
            Then::Refuses(&["belongs to uid 54321"]),
        ),
        (
            "state folder of another user",
            |n| chown(n.at("agent"), Some(OTHER), None).unwrap(),
            Then::Refuses(&["/agent", "belongs to another user"]),
        ),
        (
            "state folder open to others",
            |n| mode(&n.at("agent"), 0o755),
            Then::Refuses(&["/agent", "chmod 700"]),
        ),
        ("state folder a link", |n| link_away(n, "agent"), Then::Refuses(&["/agent", "link"])),
        (
            "TLS folder of another user",
            |n| chown(n.at("tls"), Some(OTHER), None).unwrap(),
            Then::Refuses(&["/tls", "belongs to another user"]),
        ),
        (
            "TLS folder open to others",
            |n| mode(&n.at("tls"), 0o777),
            Then::Refuses(&["/tls", "may be written by others"]),
        ),
        ("TLS folder a link", |n| link_away(n, "tls"), Then::Refuses(&["/tls", "link"])),
        (
            "a key folder of another user",
            |n| chown(n.at("tls/k1"), Some(OTHER), None).unwrap(),
            Then::Works,
        ),
        ("a key folder a link", |n| link_away(n, "tls/k1"), Then::Works),
        (
            "a key with a second name",
            |n| std::fs::hard_link(n.at("tls/k1/tls.key"), n.at("copy.key")).unwrap(),
            Then::Works,
        ),
        ("a leaf that is a link", |n| link_away(n, "tls/k1/tls.crt"), Then::Works),
        (
            "an identity that is a pipe",
            |n| pipe(n, "agent/identity.pem"),
            Then::Refuses(&["identity.pem"]),
        ),
        ("ray.env a link", |n| link_away(n, "tls/ray.env"), Then::Works),
    ];
    for (name, prepare, then) in layouts {
        let mut node = Node::new().await;
        prepare(&node);
        let outside = std::fs::read(node.at("away")).ok();
        match then {
            Then::Refuses(words) => {
                let run = node.command(&["run", "--socket", "agent.sock"]).output();
                let output = timeout(SOON, run).await.unwrap_or_else(|_| panic!("{name}: it runs"));
                let said = String::from_utf8_lossy(&output.unwrap().stderr).into_owned();
                for word in words {
                    assert!(said.contains(word), "{name}: {word:?} is missing in: {said}");
                }
            }
            Then::Works => {
                node.run().await;
                let answer = node.ask(node_agent::api::Ask::ExecFolder).await.unwrap();
                assert!(
                    matches!(answer, node_agent::api::Answer::ExecFolder(_)),
                    "{name}: {answer:?}"
                );
                node.kill().await;
            }
        }
        assert_eq!(std::fs::read(node.at("away")).ok(), outside, "{name}: written through a link");
        if node.at("tls").is_dir() {
            assert!(stray_files(&node.at("tls")).is_empty(), "{name}");
        }
        node.deployment.finish().await;
    }
}

fn pipe(node: &Node, name: &str) {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    std::fs::remove_file(node.at(name)).unwrap();
    mknodat(CWD, node.at(name), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_join_file_that_others_can_read_or_write_is_refused_and_stays() {
    for (name, prepare) in [
        ("open to others", (|n: &Node| mode(&n.at("join"), 0o644)) as Prepare),
        ("a pipe", |n| pipe(n, "join")),
    ] {
        let node = Node::unenrolled().await;
        prepare(&node);
        let output = timeout(SOON, node.enroll(&[])).await;
        let output = output.unwrap_or_else(|_| panic!("{name}: it waits for ever"));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains("join"), "{name}: {said}");
        assert!(node.at("join").exists(), "{name}");
    }
}

/// With umask 000 nothing secret is open to others, not even for a moment.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_key_is_ever_open_to_others_whatever_the_umask_says() {
    let node = Node::unenrolled().await;
    let (going, top) = (Arc::new(AtomicBool::new(true)), node.at(""));
    let watching = std::thread::spawn({
        let going = going.clone();
        move || {
            let (mut looks, mut open) = (0_u64, Vec::new());
            while going.load(Relaxed) {
                for folder in ["agent", "tls", "tls/k1", "tls/.k1.new"] {
                    look(&top.join(folder), &mut open);
                }
                looks += 1;
            }
            (looks, open)
        }
    });
    let program = crate::node::binary("node-agent");
    let script = format!(
        "umask 000; exec {} enroll --name w1 --address 10.0.0.1 --join join --state-dir agent \
         --tls-dir tls",
        program.display()
    );
    let output = Command::new("sh").args(["-c", &script]).current_dir(node.at("")).output();
    let output = output.await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    going.store(false, Relaxed);
    let (looks, open) = watching.join().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(open.is_empty(), "open to others: {open:?}");
    assert!(looks > 100, "only {looks} looks");
    node.check_folders();
    node.deployment.finish().await;
}

/// Everything in there that others could read and that is no public file.
fn look(folder: &Path, open: &mut Vec<String>) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let public = ["tls.crt", "ca.crt", "crl.pem", "ray.env", "status.json"];
        let public = public.iter().any(|p| name == *p || name == format!(".{p}.tmp"));
        let Ok(metadata) = entry.path().symlink_metadata() else { continue };
        if metadata.is_file() && !public && metadata.permissions().mode() & 0o077 != 0 {
            open.push(format!("{name} {:o}", metadata.permissions().mode()));
        }
    }
}

/// Enrolled again with a group, the host keeps it: the daemon started later knows no flag.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_given_again_is_kept() {
    use std::os::unix::fs::MetadataExt;
    let mut node = Node::new().await;
    let again = node.enroll(&["--ray-group", "4242"]).await;
    assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
    node.run().await;
    let answer = node.ask(node_agent::api::Ask::ExecFolder).await.unwrap();
    assert!(matches!(answer, node_agent::api::Answer::ExecFolder(_)), "{answer:?}");
    for key in ["tls/k1/tls.key", "tls/k2/tls.key"] {
        assert_eq!(std::fs::metadata(node.at(key)).unwrap().gid(), 4_242, "{key}");
    }
    node.kill().await;
    node.deployment.finish().await;
}
