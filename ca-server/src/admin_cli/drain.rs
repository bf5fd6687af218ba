//! `node revoke --drain`: tells Ray that a node is lost, after its peers have cut it off, so that Ray
//! places nothing there and restarts its actors elsewhere. It runs Ray's own program, in the
//! environment it was given; whatever comes of it, the revocation stands.

use std::{collections::BTreeSet, net::IpAddr, process::Stdio, time::Duration};

use clap::Args;
use serde::{Deserialize, Serialize};
use tokio::{io::AsyncReadExt, process::Command, time::timeout};

use super::output::printable;

/// All of it, at most: Ray's program takes seconds to start.
const TIME_MAX: Duration = Duration::from_secs(30);
/// Bytes of an answer of Ray's program that are read.
const ANSWER_LEN_MAX: u64 = 1024 * 1024;
/// Characters of its complaint that are shown.
const COMPLAINT_LEN_MAX: usize = 200;
/// What Ray is told about how long the node is still there, in seconds.
const DEADLINE_SECONDS: &str = "10";
const REASON: &str = "DRAIN_NODE_REASON_PREEMPTION";

#[derive(Debug, Args)]
pub(super) struct Drain {
    /// Tell Ray, too, that the node is lost: by the `ray` of PATH, with the RAY_* variables of this
    /// command (`node-agent exec -- ca-admin ...` on the head), or else say what to run there.
    #[arg(long)]
    drain: bool,

    /// Ray's head, as `ray` takes it.
    #[arg(long, value_name = "HOST:PORT", requires = "drain", value_parser = address)]
    ray_address: Option<String>,
}

/// What came of it.
#[derive(Debug, Serialize)]
pub(super) struct Drained {
    /// Ray took the order.
    done: bool,
    ray_node_id: Option<String>,
    /// Why not.
    problem: Option<String>,
    /// What to run on the head instead.
    run_on_head: Vec<String>,
}

impl Drain {
    /// Tells Ray; `None` where nobody asked for it. `blocked`: addresses that the CA has cut off for
    /// this node. Another one of its own may be a living node's by now, and Ray knows nodes by address.
    pub(super) async fn tell(&self, blocked: &[String]) -> Option<Drained> {
        if !self.drain {
            return None;
        }
        let addresses = blocked;
        if addresses.is_empty() {
            let why = "no address of the node is cut off, so none is sure to be its own";
            return Some(Drained::not_done(None, addresses, why.to_owned()));
        }
        let Some(ray_address) = &self.ray_address else {
            let why = "no --ray-address was given";
            return Some(Drained::not_done(None, addresses, why.to_owned()));
        };
        let mut found = None;
        let told = timeout(TIME_MAX, drain("ray", ray_address, addresses, &mut found)).await;
        let problem = told.unwrap_or_else(|_| Err(out_of_time())).err();
        Some(match problem {
            None => Drained { done: true, ray_node_id: found, problem: None, run_on_head: vec![] },
            Some(problem) => Drained::not_done(found, addresses, problem),
        })
    }
}

impl Drained {
    fn not_done(ray_node_id: Option<String>, addresses: &[String], problem: String) -> Self {
        let id = ray_node_id.as_deref().unwrap_or("ID");
        let mut run_on_head = vec![format!(
            "node-agent exec -- ray drain-node --node-id {id} --reason {REASON} --reason-message revoked \
             --deadline-remaining-seconds {DEADLINE_SECONDS}"
        )];
        if ray_node_id.is_none() {
            let list = match addresses.first() {
                Some(address) => format!("ray list nodes --filter node_ip={address}"),
                None => "ray list nodes".to_owned(),
            };
            run_on_head.insert(0, format!("node-agent exec -- {list}"));
        }
        Self { done: false, ray_node_id, problem: Some(problem), run_on_head }
    }

    /// In lines for a person.
    pub(super) fn text(&self) -> String {
        let id = self.ray_node_id.as_deref().unwrap_or("-");
        let Some(problem) = &self.problem else {
            return format!("  Ray drains its node {}\n", printable(id));
        };
        let mut text = format!(
            "  Ray was not told: {}; it finds the node dead by its own health check, or run on the head, \
             as Ray's user:\n",
            printable(problem)
        );
        for line in &self.run_on_head {
            text.push_str(&format!("    {}\n", printable(line)));
        }
        text
    }
}

/// One node of Ray's list.
#[derive(Debug, Deserialize)]
struct RayNode {
    node_id: String,
    #[serde(default)]
    node_ip: String,
    #[serde(default)]
    state: String,
}

async fn drain(
    program: &str,
    ray_address: &str,
    addresses: &[String],
    found: &mut Option<String>,
) -> Result<(), String> {
    let mut living = BTreeSet::new();
    for address in addresses {
        let filter = format!("node_ip={address}");
        let list = [
            "list",
            "nodes",
            "--address",
            ray_address,
            "--format",
            "json",
            "--filter",
            &filter,
            // Ray cuts its list off: not by the dead ones.
            "--filter",
            "state=ALIVE",
        ];
        let answer = run(program, &list).await?;
        living.extend(alive(&answer, address)?);
    }
    let id = found.insert(the_only(living)?);
    let order = [
        "drain-node",
        "--address",
        ray_address,
        "--node-id",
        id,
        "--reason",
        REASON,
        "--reason-message",
        "revoked",
        "--deadline-remaining-seconds",
        DEADLINE_SECONDS,
    ];
    run(program, &order).await.map(drop)
}

/// The one that is meant. Two nodes on one host are two of Ray's at one address, and nothing tells
/// which of them was revoked.
fn the_only(mut living: BTreeSet<String>) -> Result<String, String> {
    let count = living.len();
    match living.pop_first() {
        None => Err("Ray knows no living node at the addresses that are cut off".to_owned()),
        Some(only) if count == 1 => Ok(only),
        Some(_) => Err(format!(
            "Ray knows {count} living nodes at the addresses that are cut off, and not which of them \
             was revoked"
        )),
    }
}

/// The ids of the nodes that live at the address; they go into a command line, so they must be ids.
fn alive(answer: &str, address: &str) -> Result<Vec<String>, String> {
    let is_id =
        |id: &str| !id.is_empty() && id.len() <= 128 && id.bytes().all(|b| b.is_ascii_hexdigit());
    let of_it = |node: &RayNode| node.state == "ALIVE" && is_same(&node.node_ip, address);
    let living = list(answer)?.into_iter().filter(of_it).map(|node| {
        if is_id(&node.node_id) {
            return Ok(node.node_id);
        }
        Err("Ray's list of nodes holds an id that is none".to_owned())
    });
    living.collect()
}

/// Ray's list of nodes; its program may say other things before and after it, such as lines of a log
/// that begin with a bracket, too.
fn list(answer: &str) -> Result<Vec<RayNode>, String> {
    let mut problem = "it printed none".to_owned();
    let mut at = 0;
    for line in answer.split_inclusive('\n') {
        if line.starts_with('[') {
            let mut values = serde_json::Deserializer::from_str(&answer[at..]).into_iter();
            match values.next() {
                Some(Ok(nodes)) => return Ok(nodes),
                Some(Err(error)) => problem = error.to_string(),
                None => {}
            }
        }
        at += line.len();
    }
    Err(format!("Ray's list of nodes: {problem}"))
}

fn is_same(one: &str, other: &str) -> bool {
    match (one.parse::<IpAddr>(), other.parse::<IpAddr>()) {
        (Ok(one), Ok(other)) => one.to_canonical() == other.to_canonical(),
        _ => one == other,
    }
}

async fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| format!("{program} could not be run: {e}"))?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let (out, err) = tokio::join!(read(out), read(err));
    let status = child.wait().await.map_err(|e| format!("{program}: {e}"))?;
    if status.success() {
        return Ok(out);
    }
    let last = err.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    let last: String = last.chars().take(COMPLAINT_LEN_MAX).collect();
    Err(format!("`{program} {}` ended with {status}: {last}", arguments[0]))
}

async fn read(stream: Option<impl tokio::io::AsyncRead + Unpin>) -> String {
    let mut bytes = Vec::new();
    if let Some(stream) = stream {
        // What was read before an error is all there is.
        let _ = stream.take(ANSWER_LEN_MAX).read_to_end(&mut bytes).await;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn out_of_time() -> String {
    format!("it did not answer within {} s", TIME_MAX.as_secs())
}

fn address(text: &str) -> Result<String, String> {
    let fits = |b: u8| b.is_ascii_alphanumeric() || b".:[]-_".contains(&b);
    let good =
        text.contains(':') && !text.starts_with('-') && text.len() <= 255 && text.bytes().all(fits);
    if good { Ok(text.to_owned()) } else { Err("write HOST:PORT".to_owned()) }
}

#[cfg(test)]
mod tests {
    use raymtls_proto::durable::{self, Access};

    use super::*;

    const AT: &str = "10.77.0.7";

    fn row(id: &str, state: &str, ip: &str) -> String {
        format!(r#"{{"node_id": "{id}", "state": "{state}", "node_ip": "{ip}", "labels": []}}"#)
    }

    #[test]
    fn the_living_nodes_of_the_address_are_found_and_only_an_id_is_believed() {
        let rows =
            [row("ab01", "DEAD", AT), row("cd02", "ALIVE", AT), row("ef03", "ALIVE", "10.77.0.8")];
        let found = Ok(vec!["cd02".to_owned()]);
        assert_eq!(alive(&format!("[{}]", rows.join(",")), AT), found);
        for before in ["a warning", "[2026-11-24 15:30:01,123 I 1 1] log", "[INFO] log", "[1, 2]"] {
            let answer = format!("{before}\n[{}]\n[W] bye", rows.join(",\n"));
            assert_eq!(alive(&answer, AT), found, "{before}");
        }
        assert_eq!(alive("[]", AT), Ok(vec![]));
        for id in ["--help", ""] {
            assert!(alive(&format!("[{}]", row(id, "ALIVE", AT)), AT).is_err(), "{id}");
        }
        for bad in ["", "[{", "[INFO] nothing more"] {
            assert!(alive(bad, AT).is_err(), "{bad}");
        }
    }

    /// A `ray` that knows these nodes and writes down what it is told.
    fn played(nodes: &[String]) -> (tempfile::TempDir, String) {
        let folder = tempfile::tempdir().unwrap();
        let (program, told) = (folder.path().join("ray"), folder.path().join("told"));
        let script = format!(
            "#!/bin/sh\necho \"$@\" >> {}\n[ \"$1\" = list ] && echo '[{}]'\nexit 0\n",
            told.display(),
            nodes.join(",")
        );
        let written = folder.path().join("written");
        durable::create(&written, script.as_bytes(), Access::PRIVATE).unwrap();
        // Copied by another process: a program that this one had open for writing may be busy.
        let copied = std::process::Command::new("install")
            .args(["-m", "755"])
            .arg(written)
            .arg(&program)
            .status();
        assert!(copied.unwrap().success());
        (folder, program.display().to_string())
    }

    #[tokio::test]
    async fn ray_is_told_of_the_only_living_node_at_the_addresses_and_of_no_other() {
        let one = row("cd02", "ALIVE", AT);
        for (nodes, said) in [
            (vec![row("ab01", "DEAD", AT), one.clone()], None),
            (vec![one.clone(), row("ef03", "ALIVE", AT)], Some("Ray knows 2 living nodes")),
            (vec![row("ef03", "ALIVE", "10.77.0.8")], Some("Ray knows no living node")),
        ] {
            let (folder, program) = played(&nodes);
            let (mut found, addresses) = (None, [AT.to_owned()]);
            let ended = drain(&program, "head:6379", &addresses, &mut found).await;
            let told = std::fs::read_to_string(folder.path().join("told")).unwrap();
            let Some(said) = said else {
                assert_eq!(ended, Ok(()));
                assert!(told.contains("--node-id cd02"), "{told}");
                continue;
            };
            let problem = ended.unwrap_err();
            assert!(problem.starts_with(said), "{problem}");
            assert!(!told.contains("drain-node") && found.is_none(), "{told}");
        }
    }

    #[tokio::test]
    async fn where_no_address_is_cut_off_nothing_is_asked_of_ray() {
        let drain = Drain { drain: true, ray_address: Some("head:6379".to_owned()) };
        let drained = drain.tell(&[]).await.unwrap();
        assert!(!drained.done);
        assert!(drained.text().contains("no address of the node is cut off"), "{}", drained.text());
        assert_eq!(drained.run_on_head[0], "node-agent exec -- ray list nodes");
    }

    #[tokio::test]
    async fn without_ray_it_says_what_to_run_on_the_head() {
        let addresses = ["10.77.0.7".to_owned()];
        let mut found = None;
        let problem = drain("no-such-ray", "head:6379", &addresses, &mut found).await.unwrap_err();
        let text = Drained::not_done(found, &addresses, problem).text();
        assert!(text.contains("no-such-ray could not be run"), "{text}");
        assert!(text.contains("ray list nodes --filter node_ip=10.77.0.7"), "{text}");
        assert!(text.contains("ray drain-node --node-id ID --reason DRAIN_NODE_"), "{text}");
    }

    #[test]
    fn an_address_is_no_option() {
        assert!(address("head.ray:6379").is_ok() && address("[fd00::1]:6379").is_ok());
        for bad in ["head", "--address:1", "a b:1", "$(x):1"] {
            assert!(address(bad).is_err(), "{bad}");
        }
    }
}
