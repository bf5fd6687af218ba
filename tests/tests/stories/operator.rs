//! Who may do what over the operator's socket: the real `ca-admin`, run as root, as a member of the
//! operator group and as a stranger. The system says who may connect, the CA what they may do.
//!
//! Wants `ca-admin` in the target folder, and `setpriv`. Only root can be others: run by anybody else
//! the story tells of the own user alone, who is to the CA what root is.

use std::{
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::{Output, Stdio},
};

use raymtls_proto::v1::NodeState;
use raymtls_tests::{ADMIN_SOCKET, Deployment, programs::binary};
use tokio::process::Command;

/// Ids that no account of a machine has.
const GROUP: u32 = 54_321;
const MEMBER: u32 = 54_322;
const STRANGER: u32 = 54_323;

#[derive(Clone, Copy)]
enum Who {
    /// Root, or whoever runs the tests.
    Own,
    Member,
    Stranger,
}

struct Operators {
    deployment: Deployment,
    /// A copy everybody can run, wherever the target folder lies.
    ca_admin: PathBuf,
}

impl Operators {
    async fn new(group: Option<u32>) -> Self {
        let deployment = Deployment::start_for_group(group.map(|gid| gid.to_string())).await;
        let folder = deployment.folder.path();
        open_to_all(folder);
        let ca_admin = folder.join("ca-admin");
        std::fs::copy(binary("ca-admin"), &ca_admin).unwrap();
        open_to_all(&ca_admin);
        Self { deployment, ca_admin }
    }

    async fn run(&self, who: Who, arguments: &[&str]) -> Output {
        let folder = self.deployment.folder.path();
        let (uid, gid) = match who {
            Who::Own => return output(Command::new(&self.ca_admin), folder, arguments).await,
            Who::Member => (MEMBER, GROUP),
            Who::Stranger => (STRANGER, STRANGER),
        };
        let mut command = Command::new("setpriv");
        command
            .arg(format!("--reuid={uid}"))
            .arg(format!("--regid={gid}"))
            .args(["--clear-groups", "--"])
            .arg(&self.ca_admin);
        output(command, folder, arguments).await
    }

    async fn done(&self, who: Who, arguments: &[&str]) {
        let output = self.run(who, arguments).await;
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", said(&output));
    }

    async fn refused(&self, who: Who, arguments: &[&str], word: &str) {
        let output = self.run(who, arguments).await;
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", said(&output));
        assert!(said(&output).contains(word), "{arguments:?}: {}", said(&output));
    }

    /// Not even a connection, in words that say what to do.
    async fn shut_out(&self, who: Who, arguments: &[&str]) {
        let output = self.run(who, arguments).await;
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {}", said(&output));
        for word in ["Permission denied", "operator_group"] {
            assert!(said(&output).contains(word), "{arguments:?}: {}", said(&output));
        }
    }
}

#[tokio::test]
async fn root_creates_clusters_the_group_runs_them_and_a_stranger_cannot_connect() {
    let root = is_root();
    let operators = Operators::new(root.then_some(GROUP)).await;
    let create = |cluster| ["cluster", "create", cluster, "--max-job", "1d"];
    operators.done(Who::Own, &create("c1")).await;
    operators.done(Who::Own, &["cluster", "list"]).await;
    if !root {
        println!("not root: only the own user was played");
        return;
    }
    let deployment = &operators.deployment;
    deployment.worker("c1", "w1", "10.0.0.1").await;
    deployment.worker("c1", "w2", "10.0.0.2").await;

    // A member of the group: tokens and nodes, no clusters.
    let desk = deployment.folder.path().join("desk");
    std::fs::create_dir(&desk).unwrap();
    chown(&desk, Some(MEMBER), Some(GROUP)).unwrap();
    let token = ["token", "create", "--cluster", "c1", "--role", "worker", "--out", "desk/w3.join"];
    operators.done(Who::Member, &token).await;
    assert!(desk.join("w3.join").exists());
    // Nobody runs an agent here who could acknowledge it: the exit code says so, unless that is not
    // wanted.
    let revoke = |name, wait| {
        let which = ["node", "revoke", "--cluster", "c1", name, "--reason", "stolen disk"];
        [&which[..], &["--yes", "--wait", wait]].concat()
    };
    operators.done(Who::Member, &revoke("w1", "0")).await;
    let again = operators.run(Who::Member, &revoke("w1", "1")).await;
    assert_eq!(again.status.code(), Some(1), "{}", said(&again));
    assert!(said(&again).contains("the revocation stands, but 1 of its peers"), "{}", said(&again));
    operators.refused(Who::Member, &create("c2"), "ROLE_TOO_LOW").await;
    let set = ["cluster", "set", "c1", "max-job=2d", "--yes"];
    operators.refused(Who::Member, &set, "ROLE_TOO_LOW").await;

    // A stranger: nothing at all.
    for arguments in [&["cluster", "list"][..], &create("c3"), &revoke("w2", "0")] {
        operators.shut_out(Who::Stranger, arguments).await;
    }
    assert_eq!(deployment.node("c1", "w1").await.state(), NodeState::Revoked);
    assert_eq!(deployment.node("c1", "w2").await.state(), NodeState::Live);

    // Without a group the member is a stranger too.
    let Operators { deployment, .. } = operators;
    deployment.finish().await;
    let mut operators = Operators::new(None).await;
    operators.done(Who::Own, &create("c1")).await;
    operators.shut_out(Who::Member, &["cluster", "list"]).await;
    operators.deployment.stop().await;
}

async fn output(mut command: Command, folder: &Path, arguments: &[&str]) -> Output {
    command
        .args(["--socket".as_ref(), folder.join(ADMIN_SOCKET).as_os_str()])
        .args(arguments)
        .current_dir(folder)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn open_to_all(path: &Path) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
