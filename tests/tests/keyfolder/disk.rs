//! The disk is full, or read-only. Mounts are made in a mount namespace of the test's own thread and
//! go with it; that wants root.

use std::path::Path;

use node_agent::api::{Answer, Ask};
use tokio::process::Command;

use crate::node::{Node, stray_files};

/// A small file system of its own at `tls`.
async fn mount_tls(node: &Node, options: &str) {
    std::fs::create_dir(node.at("tls")).unwrap();
    run("mount", &["-t", "tmpfs", "-o", options, "raymtls-test"], &node.at("tls")).await;
}

async fn run(program: &str, arguments: &[&str], last: &Path) {
    let output = Command::new(program).args(arguments).arg(last).output().await.unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Every file of a folder and its content.
fn contents(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_type().unwrap().is_file())
        .map(|entry| {
            (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
        })
        .collect();
    all.sort();
    all
}

/// Everything that is left of the space, to the last byte.
fn fill(path: &Path) {
    use std::io::Write;
    let mut file = std::fs::File::options().create(true).append(true).open(path).unwrap();
    for size in [4096, 1] {
        while file.write_all(&vec![b'x'; size]).is_ok() {}
    }
}

/// Asks for a renewal that fails, and returns why.
async fn fails(node: &Node) -> String {
    match node.ask(Ask::Renew).await.unwrap() {
        Answer::Renewed(renewed) => renewed.failed.join("; "),
        Answer::Error(error) => error.message,
        other @ (Answer::Status(_)
        | Answer::ExecFolder(_)
        | Answer::Tunnel { .. }
        | Answer::Left { .. }) => {
            panic!("{other:?}")
        }
    }
}

async fn works(node: &Node) {
    let Answer::Renewed(renewed) = node.ask(Ask::Renew).await.unwrap() else { panic!() };
    assert!(renewed.failed.is_empty() && !renewed.key_folders.is_empty(), "{renewed:?}");
}

/// The test's own thread has the mounts: the agents it starts see them, nobody else does.
fn in_a_mount_namespace(test: impl Future<Output = ()> + Send + 'static) {
    assert!(rustix::process::geteuid().is_root(), "wants root, to mount");
    let thread = std::thread::spawn(move || {
        #[allow(
            deprecated,
            reason = "a thread by itself: nothing else of it is shared on purpose"
        )]
        rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNS).unwrap();
        let made = std::process::Command::new("mount").args(["--make-rprivate", "/"]).status();
        assert!(made.unwrap().success());
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn a_full_disk_leaves_the_old_files_whole_and_the_next_try_works() {
    in_a_mount_namespace(async {
        let mut node = Node::unenrolled().await;
        mount_tls(&node, "size=256k,mode=0755").await;
        let enrolled = node.enroll(&[]).await;
        assert!(enrolled.status.success(), "{}", String::from_utf8_lossy(&enrolled.stderr));
        node.run().await;
        let before = contents(&node.at("tls/k1"));
        fill(&node.at("tls/k1/ballast"));
        let why = fails(&node).await;
        assert!(why.contains("tls/k1/tls.crt") && why.contains("No space left"), "{why}");
        let (after, ballast): (Vec<_>, Vec<_>) =
            contents(&node.at("tls/k1")).into_iter().partition(|(name, _)| name != "ballast");
        assert_eq!(after, before, "an old file was touched");
        assert_eq!(ballast.len(), 1);
        assert!(stray_files(&node.at("tls")).is_empty(), "{:?}", stray_files(&node.at("tls")));
        // A new key folder has no room either, and leaves nothing behind.
        let _ = node.ask(Ask::ExecFolder).await.unwrap();
        assert!(stray_files(&node.at("tls")).is_empty(), "{:?}", stray_files(&node.at("tls")));
        assert!(!node.at("tls/k2").exists());
        let Answer::Status(status) = node.ask(Ask::Status).await.unwrap() else { panic!() };
        assert!(
            status.problems.iter().any(|p| p.contains("No space left")),
            "{:?}",
            status.problems
        );
        std::fs::remove_file(node.at("tls/k1/ballast")).unwrap();
        works(&node).await;
        node.check_folders();
        node.kill().await;
        node.deployment.finish().await;
    });
}

#[test]
fn a_full_disk_at_enrolment_costs_no_token() {
    in_a_mount_namespace(async {
        let node = Node::unenrolled().await;
        mount_tls(&node, "size=64k,mode=0755").await;
        std::fs::create_dir(node.at("tls/lost+found")).unwrap();
        fill(&node.at("tls/lost+found/ballast"));
        let output = node.enroll(&["--timeout", "5s"]).await;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains("No space left"), "{said}");
        assert!(said.contains("/tls/"), "the path is not named: {said}");
        assert!(stray_files(&node.at("tls")).is_empty(), "{:?}", stray_files(&node.at("tls")));
        assert!(node.at("join").exists());
        std::fs::remove_dir_all(node.at("tls/lost+found")).unwrap();
        let output = node.enroll(&[]).await;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        node.check_folders();
        node.deployment.finish().await;
    });
}

#[test]
fn a_read_only_disk_is_said_and_the_old_leaf_stays_in_use() {
    in_a_mount_namespace(async {
        let mut node = Node::unenrolled().await;
        mount_tls(&node, "size=256k,mode=0755").await;
        assert!(node.enroll(&[]).await.status.success());
        node.run().await;
        let before = contents(&node.at("tls/k1"));
        run("mount", &["-o", "remount,ro"], &node.at("tls")).await;
        let why = fails(&node).await;
        assert!(why.contains("tls/k1/tls.crt") && why.contains("Read-only file system"), "{why}");
        assert_eq!(contents(&node.at("tls/k1")), before);
        let Answer::ExecFolder(folder) = node.ask(Ask::ExecFolder).await.unwrap() else { panic!() };
        assert!(folder.note.unwrap().contains("Read-only"), "no word of it to who starts Ray");
        run("mount", &["-o", "remount,rw"], &node.at("tls")).await;
        works(&node).await;
        node.check_folders();
        node.kill().await;
        node.deployment.finish().await;
    });
}
