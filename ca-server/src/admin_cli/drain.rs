//! `node revoke --drain`: tells Ray that a node is lost, after its peers have cut it off, so that Ray
//! places nothing there and restarts its actors elsewhere. It runs Ray's own program, in the
//! environment it was given; whatever comes of it, the revocation stands.

use std::{process::Stdio, time::Duration};

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
    /// Tells Ray; `None` where nobody asked for it.
    pub(super) async fn tell(&self, addresses: &[String]) -> Option<Drained> {
        if !self.drain {
            return None;
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
        let address = addresses.first().map_or("ADDRESS", String::as_str);
        let id = ray_node_id.as_deref().unwrap_or("ID");
        let mut run_on_head = vec![format!(
            "node-agent exec -- ray drain-node --node-id {id} --reason {REASON} --reason-message revoked \
             --deadline-remaining-seconds {DEADLINE_SECONDS}"
        )];
        if ray_node_id.is_none() {
            run_on_head
                .insert(0, format!("node-agent exec -- ray list nodes --filter node_ip={address}"));
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
    state: String,
}

async fn drain(
    program: &str,
    ray_address: &str,
    addresses: &[String],
    found: &mut Option<String>,
) -> Result<(), String> {
    for address in addresses {
        let filter = format!("node_ip={address}");
        let list =
            ["list", "nodes", "--address", ray_address, "--format", "json", "--filter", &filter];
        let answer = run(program, &list).await?;
        *found = alive(&answer)?;
        if found.is_some() {
            break;
        }
    }
    let id = found.as_ref().ok_or("Ray knows no living node of its addresses")?;
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

/// The id of the node that lives; it goes into a command line, so it must be one.
fn alive(answer: &str) -> Result<Option<String>, String> {
    // Ray may say other things before the list.
    let list = answer.find('[').map_or("[]", |at| &answer[at..]);
    let nodes: Vec<RayNode> =
        serde_json::from_str(list.trim()).map_err(|e| format!("Ray's list of nodes: {e}"))?;
    let alive = nodes.into_iter().find(|node| node.state == "ALIVE");
    let is_id = |id: &String| id.len() <= 128 && id.bytes().all(|b| b.is_ascii_hexdigit());
    Ok(alive.map(|node| node.node_id).filter(is_id))
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
    use super::*;

    #[test]
    fn the_living_node_is_found_and_only_an_id_is_believed() {
        let list = r#"some warning
[{"node_id": "ab01", "state": "DEAD"}, {"node_id": "cd02", "state": "ALIVE", "node_ip": "x"}]"#;
        assert_eq!(alive(list), Ok(Some("cd02".to_owned())));
        assert_eq!(alive("[]"), Ok(None));
        assert_eq!(alive(r#"[{"node_id": "--help", "state": "ALIVE"}]"#), Ok(None));
        assert!(alive("[{").is_err());
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
